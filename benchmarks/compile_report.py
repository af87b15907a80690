"""Compile every kernel variant for each architecture, with no GPU, and say what bounds it.

    python -m benchmarks.compile_report                                 all rows, into benchmarks/results/compile_report.jsonl
    python -m benchmarks.compile_report --arch 90 --match D64 highest   only rows whose variant holds every given word, printed
    python -m benchmarks.compile_report --quick                         the rows that the tests compile again

A row holds registers, spills and shared memory; the instructions in the inner loop for a pair of points (for an element, in row-wise
kernels; for a pair and a dimension, in those of total correlation and of few rows; for a row, a slice and a point, in those of SIGReg), by
unit; the cycles that each unit needs for them on one multiprocessor; and the time of one sweep over N = 65,536 rows against as many columns
(half of the pairs where the sweep is symmetric) or 1,024 slices, or of 1,024 problems of few rows, on the GPU named, were its slowest unit
always busy.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton

from benchmarks.gpus import CACHE_BYTES, EXPONENTIALS, GPU, GPUS, ISSUE
from benchmarks.sass import Binary, argument_types, compile_kernel, is_matrix
from fastvae.cpu.sigreg import Points
from fastvae.kernels import (
    families,
    few_rows,
    kernel_hvp,
    kernel_matmul,
    ksd_to_normal,
    log_kernel_density,
    mmd,
    plan,
    prepare,
    products,
    reparameterize_kl,
    sigreg,
    sums,
    total_correlation,
)
from fastvae.kernels.config import (
    SHARED_MEMORY,
    DensityConfig,
    FewRowsConfig,
    HessianConfig,
    MatmulConfig,
    RowConfig,
    SweepConfig,
    TermsConfig,
    density_config,
    difference_products,
    few_rows_config,
    hvp_config,
    matmul_config,
    padded_dim,
    slice_config,
    stein_config,
    stein_hessian_config,
    sweep_config,
    terms_config,
)
from fastvae.parametrisation import Parametrisation
from fastvae.radial import KERNELS, RBF, Energy, Kernel, Laplace, Matern32, Matern52, Polynomial, RationalQuadratic, Riesz, Sum

RESULTS = Path(__file__).parent / "results" / "compile_report.jsonl"
PREDICTED_ROWS, PREDICTED_SLICES = 65_536, 1024
PREDICTED_PROBLEMS = 1024  # of few rows
ARCHITECTURES = tuple(GPUS)
PRECISIONS = ("highest", "high", "medium", "ieee", "float64")
# Fewer than 16 features are padded to 16; the kernels for 256 features are those for all more.
DIMS = (16, 64, 128, 256)
_POINTER = {"highest": "*bf16", "medium": "*bf16", "high": "*fp32", "ieee": "*fp32", "float64": "*fp64", "tf32x3": "*fp32"}
_PRODUCTS = {"tf32x3": 3, "highest": 3, "medium": 1, "high": 1, "ieee": 1, "float64": 1}


def kernel_words(kernel: Kernel) -> list[str]:
    """Its name and parameters as words of a variant's name; none for the one without a name before it had siblings."""
    if isinstance(kernel, RBF):
        return []
    if isinstance(kernel, Sum):
        return ["sum", *(word for term in kernel.terms for word in kernel_words(term.kernel) or ["rbf"])]
    return [kernel.name, *(f"{name}{value:g}" for name, value in dataclasses.asdict(kernel).items())]


@dataclass(frozen=True)
class Sweep:
    """One variant of `mmd.sweep_kernel`."""

    precision: str
    dim: int
    gradient: bool
    within: bool
    bandwidths: int = 1
    weighted: bool = False
    squared: bool = True  # each bandwidth's k is the square of the one before
    kernel: Kernel = RBF()  # noqa: RUF009, frozen
    second_pass: bool = False  # of more exact products, for smaller bandwidths
    batched: bool = False
    terms: bool = False  # the sums for derivatives to bandwidths and their weights

    @property
    def symmetric(self) -> bool:
        return self.within and not self.gradient

    @property
    def name(self) -> str:
        parts = [
            "terms" if self.terms else "value+gradient" if self.gradient else "value",
            self.precision,
            f"D{self.dim}",
            "within" if self.within else "across",
            f"bandwidths{self.bandwidths}",
        ]
        parts += ["unrelated"] * (not self.squared) + ["weighted"] * self.weighted + ["finer"] * self.second_pass
        parts += ["batched"] * self.batched
        return " ".join(parts + kernel_words(self.kernel))


@dataclass(frozen=True)
class Differences:
    """One variant of `mmd.sweep_kernel` by differences."""

    dtype: str
    dim: int
    gradient: bool
    bandwidths: int = 1
    kernel: Kernel = RBF()  # noqa: RUF009, frozen
    terms: bool = False
    within: ClassVar[bool] = True

    @property
    def name(self) -> str:
        sums = "terms" if self.terms else "value+gradient" if self.gradient else "value"
        parts = [sums, self.dtype, f"D{self.dim}", "within", f"bandwidths{self.bandwidths}"]
        return " ".join(parts + kernel_words(self.kernel))


@dataclass(frozen=True)
class Matmul:
    """One variant of a kernel of `kernel_matmul`, or of `log_kernel_density`, which biases of rows and columns belong to."""

    direction: str  # forward, backward or log sums
    precision: str
    dim: int
    columns: int
    bandwidths: int = 1
    kernel: Kernel = RBF()  # noqa: RUF009, frozen
    differences: bool = False
    biased: bool = False

    @property
    def name(self) -> str:
        parts = [self.direction, self.precision, f"D{self.dim}", f"C{self.columns}", f"bandwidths{self.bandwidths}"]
        return " ".join(parts + ["differences"] * self.differences + ["biased"] * self.biased + kernel_words(self.kernel))


@dataclass(frozen=True)
class HVP:
    """One variant of a kernel of `kernel_hvp`, with every direction."""

    to: str  # points or factors
    precision: str
    dim: int
    columns: int
    bandwidths: int = 1
    kernel: Kernel = RBF()  # noqa: RUF009, frozen
    differences: bool = False
    within: bool = False

    @property
    def name(self) -> str:
        parts = ["hvp", self.to, self.precision, f"D{self.dim}", f"C{self.columns}", f"bandwidths{self.bandwidths}"]
        parts += ["differences"] * self.differences + ["within"] * self.within
        return " ".join(parts + kernel_words(self.kernel))


@dataclass(frozen=True)
class Stein:
    """One variant of `ksd_to_normal.ksd_kernel`, or of `hessian_kernel`."""

    precision: str
    dim: int
    gradient: bool
    bandwidths: int = 1
    kernel: Kernel = RationalQuadratic(1.0)  # noqa: RUF009, frozen
    second_pass: bool = False
    differences: bool = False
    batched: bool = False
    hessian: bool = False

    @property
    def name(self) -> str:
        sums = "hessian" if self.hessian else "value+gradient" if self.gradient else "value"
        parts = ["stein", sums, self.precision, f"D{self.dim}", f"bandwidths{self.bandwidths}"]
        parts += ["finer"] * self.second_pass + ["differences"] * self.differences + ["batched"] * self.batched
        return " ".join(parts + kernel_words(self.kernel))


@dataclass(frozen=True)
class Rows:
    """One variant of a kernel of `reparameterize_kl`: (B, R, D) with a KL summed over R, D or both."""

    direction: str
    dtype: str
    dim: int
    seeded: bool
    form: str = ""  # what it is of; rows of `dim` features by default
    rows: tuple[int, int] = (1, PREDICTED_ROWS)  # B and R
    sum_r: bool = False
    sum_d: bool = True
    parametrisation: Parametrisation = Parametrisation()  # noqa: RUF009, a NamedTuple
    prior: bool = False
    halves: bool = True  # μ and s are halves of rows twice as long

    @property
    def name(self) -> str:
        return f"{self.direction} {self.dtype} {self.form or f'D{self.dim}'}{' seeded' if self.seeded else ''}"

    @property
    def itemsize(self) -> int:
        return {"bf16": 2, "fp32": 4, "fp64": 8}[self.dtype]

    @property
    def call(self) -> reparameterize_kl.Call:
        (b, r), d, backward = self.rows, self.dim, self.direction == "backward"
        dense, given = (r * d if b > 1 else 0, d), (2 * r * d if b > 1 else 0, 2 * d if self.halves else d)
        eps, prior = None if self.seeded else dense, given if self.prior else None
        kl = None if self.sum_d or (self.sum_r and not backward) else dense if not self.sum_r else (d if b > 1 else 0, 0)
        strides = [given, given, eps, prior, prior, dense, kl] + [given, given, prior, prior] * backward
        # The second of two halves starts `dim` elements after the first.
        alignment = math.gcd(16 // self.itemsize, d)
        sums = self.sum_r and not backward, self.sum_d
        return reparameterize_kl.Call(
            (b, r, d), tuple(strides), self.itemsize, alignment, self.parametrisation, self.seeded, *sums, not backward
        )


_DIFFUSERS = Parametrisation(bounds=(-30.0, 20.0))
_FORMS: tuple[dict[str, Any], ...] = (
    # The latents of a picture of 512², of which a sum takes several tiles; in the memory format that convolutions prefer.
    {"form": "images", "dim": 4 * 64 * 64, "rows": (1, 64), "parametrisation": _DIFFUSERS},
    {"form": "channels_last", "dim": 4, "rows": (64, 64 * 64), "sum_r": True, "parametrisation": _DIFFUSERS},
    # Stable Audio
    {"form": "audio", "dim": 1024, "rows": (16, 64), "sum_r": True, "sum_d": False, "parametrisation": Parametrisation("softplus", 1e-4)},
    {"form": "prior", "dim": 64, "prior": True},
    # NVAE
    {"form": "elementwise", "dim": 4096, "sum_d": False, "parametrisation": Parametrisation("log_std", 0.01, None, 5.0), "prior": True},
)


@dataclass(frozen=True)
class Density:
    """One variant of a kernel of `total_correlation`."""

    direction: str  # marginal, joint, rows or columns
    dtype: str
    dim: int
    stratified: bool

    @property
    def name(self) -> str:
        return f"{self.direction} {self.dtype} D{self.dim} {'stratified' if self.stratified else 'weighted'}"


@dataclass(frozen=True)
class FewRows:
    """One variant of `few_rows.few_rows_kernel`, value and gradients."""

    rows: int  # of both samples together
    dim: int
    bandwidths: int = 1
    kernel: Kernel = RBF()  # noqa: RUF009, frozen
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return " ".join([f"{self.rows} rows", self.dtype, f"D{self.dim}", f"bandwidths{self.bandwidths}", *kernel_words(self.kernel)])


@dataclass(frozen=True)
class Slices:
    """One variant of a kernel of `sigreg`, with 16 points in two chains, or 5 in one."""

    direction: str  # forward or backward
    precision: str
    dim: int
    odd: bool = False

    @property
    def name(self) -> str:
        return f"{self.direction} {self.precision} D{self.dim} {'odd' if self.odd else 'all'}"

    @property
    def points(self) -> tuple[int, int]:
        """Steps and chains."""
        return (5, 1) if self.odd else (8, 2)


Variant = Sweep | Differences | Matmul | HVP | Stein | Rows | Density | FewRows | Slices
# Kernel, binary, cycles and instructions by unit.
Described = tuple[str, Binary, dict[str, float], dict[str, float]]


# Of a radial kernel of each kind, and that of MMD-GAN without its linear kernel.
SUMS = (
    RBF() + RationalQuadratic(2.3) + Laplace() + Matern32() + Riesz(),
    RationalQuadratic(0.1) + RationalQuadratic() + RationalQuadratic(10.0),
)


def variants(architecture: int) -> Iterator[Variant]:
    """All of them on sm_90; elsewhere the shortest ones, and the longest, which take the most registers."""
    for precision in PRECISIONS:
        for dim in DIMS:
            for gradient in (False, True):
                for within in (False, True):
                    for bandwidths in (1, 5):
                        longest = gradient and within and bandwidths == 5
                        shortest = not within and bandwidths == 1
                        exact = precision in ("ieee", "float64")
                        ends = (longest and (dim == 64 or not exact)) or (shortest and not exact and architecture != 86)
                        if architecture == 90 or ends:
                            yield Sweep(precision, dim, gradient, within, bandwidths)
    for gradient in (False, True):
        yield Sweep("highest", 64, gradient, True, 5, weighted=True, squared=False)
        for dim in (16, 64):
            yield Sweep("highest", dim, gradient, True, batched=True)
        for dtype in ("fp32", "fp64"):
            yield Differences(dtype, 16, gradient, 5)
        yield from _family(architecture, gradient)
    yield from _terms(architecture)
    yield from _matmuls(architecture)
    yield from _few_rows(architecture)
    yield from _hvps(architecture)
    yield from _steins(architecture)
    yield from _biased_matmuls(architecture)
    for direction in ("forward", "backward"):
        for seeded in (False, True):
            for dtype in ("fp32", "bf16"):
                yield Rows(direction, dtype, 64, seeded)
        # No two elements move at once, and the widest numbers.
        for dtype in ("fp32", "fp64"):
            yield Rows(direction, dtype, 7, seeded=True)
        for form in _FORMS:
            for dtype in ("fp32", "bf16"):
                yield Rows(direction, dtype, seeded=True, **form)
    for direction in ("marginal", "joint", "rows", "columns"):
        for stratified in (False, True):
            # As many dimensions as a block of gradients has.
            for dim in (16, 32):
                yield Density(direction, "fp32", dim, stratified)
            if architecture == 90:
                yield Density(direction, "fp64", 8, stratified)

    for direction in ("forward", "backward"):
        yield Slices(direction, "highest", 64)
        if architecture == 90:
            for dim in (16, 256):
                yield Slices(direction, "highest", dim)
            for precision in ("high", "medium", "ieee", "float64"):
                yield Slices(direction, precision, 64)
            yield Slices(direction, "highest", 64, odd=True)


def _family(architecture: int, gradient: bool) -> Iterator[Variant]:
    """Every kernel, and the second pass of the RBF; a sum of energy or polynomial kernels is one of them."""
    kernels = (kernel for kernel in KERNELS.values() if kernel.canonical()[0] == kernel)
    for kernel in (*kernels, Energy(), RationalQuadratic(2.3), RationalQuadratic(0.5)):
        second_pass, many = isinstance(kernel, RBF), not (kernel.homogeneous or isinstance(kernel, Polynomial))
        if architecture == 90:
            for dim in (16, 64, 256):
                yield Sweep("highest", dim, gradient, True, 5 if many else 1, squared=False, kernel=kernel, second_pass=second_pass)
            if many:
                yield Sweep("highest", 64, gradient, True, 1, squared=False, kernel=kernel, second_pass=second_pass)
            if gradient and not second_pass and kernel.radial:
                yield Differences("fp32", 16, gradient, 5 if many else 1, kernel)
        elif gradient and kernel in (RBF(), RationalQuadratic(2.3), Laplace()):
            yield Sweep("highest", 64, gradient, True, 5, squared=False, kernel=kernel, second_pass=second_pass)
    for kernel in SUMS:
        if architecture == 90:
            for dim in (16, 64, 256):
                yield Sweep("highest", dim, gradient, True, len(kernel.terms), kernel=kernel)
            for dtype in ("fp32", "fp64"):
                yield Differences(dtype, 16, gradient, len(kernel.terms), kernel)
        elif gradient:
            yield Sweep("highest", 64, gradient, True, len(kernel.terms), kernel=kernel)


def _terms(architecture: int) -> Iterator[Variant]:
    """The sums for derivatives to bandwidths, of as many as a program takes, and of one."""
    for precision in PRECISIONS:
        yield Sweep(precision, 64, False, True, 4 if precision == "float64" else 5, terms=True)
    for kernel in (RationalQuadratic(2.3), RationalQuadratic(50.0), Laplace()):
        yield Sweep("highest", 64, False, True, 5, kernel=kernel, terms=True)
    for dtype in ("fp32", "fp64"):
        yield Differences(dtype, 16, False, 4 if dtype == "fp64" else 5, terms=True)
    if architecture == 90:
        for dim in (16, 256):
            yield Sweep("highest", dim, False, True, 5, terms=True)
        for weighted, second_pass, batched in ((True, False, False), (False, True, False), (False, False, True)):
            yield Sweep("highest", 64, False, True, 5, weighted, second_pass=second_pass, batched=batched, terms=True)
        for kernel in (RBF(), RationalQuadratic(1.0), RationalQuadratic(0.5), Energy(), Polynomial(), Polynomial(8)):
            yield Sweep("highest", 64, False, True, kernel=kernel, terms=True)


def _matmuls(architecture: int) -> Iterator[Variant]:
    for direction in ("forward", "backward"):
        yield Matmul(direction, "highest", 64, 64)
        yield Matmul(direction, "highest", 64, 64, 5, RationalQuadratic(2.3))
        if architecture == 90:
            for dim in (16, 256):
                yield Matmul(direction, "highest", dim, 64)
            yield Matmul(direction, "highest", 16, 16)
            for precision in ("medium", "ieee", "float64"):
                yield Matmul(direction, precision, 64, 64, 5)
            for kernel in (Laplace(), Polynomial()):
                yield Matmul(direction, "highest", 64, 16, 1, kernel)
            for kernel in SUMS:
                yield Matmul(direction, "highest", 64, 64, len(kernel.terms), kernel)
            for precision in ("highest", "float64"):
                yield Matmul(direction, precision, 16, 16, 5, differences=True)


def _hvps(architecture: int) -> Iterator[Variant]:
    for to in ("points", "factors"):
        for dim in (16, 64, 128):
            yield HVP(to, "highest", dim, 64)
        yield HVP(to, "highest", 64, 1)
        yield HVP(to, "highest", 64, 1, 5, RationalQuadratic(2.3))
        yield HVP(to, "highest", 64, 1, within=True)
        yield HVP(to, "float64", 64, 64, 5)
        if architecture == 90:
            yield HVP(to, "highest", 16, 1)
            for kernel in (RBF(), RationalQuadratic(2.3), Matern32()):
                yield HVP(to, "highest", 64, 16, 5, kernel, within=True)
            yield HVP(to, "highest", 256, 64)
            for precision in ("high", "medium", "ieee"):
                yield HVP(to, precision, 64, 64, 5)
            for kernel in (RBF(), Laplace(), RationalQuadratic(2.3), Matern32(), Matern52()):
                yield HVP(to, "highest", 64, 64, 5, kernel)
            for kernel in (RBF(), Laplace(), RationalQuadratic(2.3), RationalQuadratic(1.0), Energy(), Polynomial()):
                yield HVP(to, "highest", 64, 1, 1, kernel) if kernel != RBF() else HVP(to, "highest", 64, 1, 5)
            for precision in ("highest", "float64"):
                yield HVP(to, precision, 16, 16, 5, differences=True)


def _few_rows(architecture: int) -> Iterator[Variant]:
    """Groups of four against four, as in inductive moment matching, and the most rows and bandwidths."""
    yield FewRows(8, 4096)
    yield FewRows(8, 4096, kernel=Laplace(), dtype="bf16")
    yield FewRows(128, 16, 6, RationalQuadratic(2.3))
    if architecture == 90:
        for rows, dim in ((16, 512), (32, 128), (64, 64), (128, 16)):
            yield FewRows(rows, dim)
        for kernel in (RBF(), Laplace(), Energy()):
            yield FewRows(128, 16, 6, kernel)
        yield FewRows(128, 16, 4, RBF() + RationalQuadratic(2.3) + Laplace() + Matern32())


def _steins(architecture: int) -> Iterator[Variant]:
    for gradient, hessian in ((False, False), (True, False), (True, True)):
        variant = functools.partial(Stein, gradient=gradient, hessian=hessian)
        yield variant("highest", 64)
        yield variant("highest", 64, bandwidths=5, kernel=RationalQuadratic(2.3))
        if architecture == 90:
            for dim in (16, 256):
                yield variant("highest", dim, bandwidths=5, kernel=RationalQuadratic(2.3))
            for precision in ("high", "medium", "ieee", "float64"):
                yield variant(precision, 64, bandwidths=5)
            for kernel in (RBF(), RationalQuadratic(0.5), RationalQuadratic(50.0)):
                yield variant("highest", 64, kernel=kernel)
            yield variant("highest", 64, bandwidths=5, kernel=RBF(), second_pass=True)
            yield variant("highest", 64, batched=True)
            for precision in ("highest", "float64"):
                yield variant(precision, 16, bandwidths=5, kernel=RationalQuadratic(2.3), differences=True)


def _biased_matmuls(architecture: int) -> Iterator[Variant]:
    for direction, columns in (("log sums", 1), ("forward", 64), ("backward", 64)):
        yield Matmul(direction, "highest", 64, columns, biased=True)
        yield Matmul(direction, "highest", 64, columns, kernel=RationalQuadratic(2.3), biased=True)
        if architecture == 90:
            for dim in (16, 256):
                yield Matmul(direction, "highest", dim, columns, biased=True)
            for precision in ("medium", "ieee", "float64"):
                yield Matmul(direction, precision, 64, columns, biased=True)
            for kernel in (Laplace(), Matern32(), Matern52()):
                yield Matmul(direction, "highest", 64, columns, kernel=kernel, biased=True)
            for precision in ("highest", "float64"):
                yield Matmul(direction, precision, 16, min(columns, 16), differences=True, biased=True)


def quick(variant: Variant, architecture: int) -> bool:
    """Whether the tests compile it: what the issue counts, and what takes most registers or shared memory."""
    if architecture != 90:
        worst = Sweep("highest", 64, True, True, 5), Sweep("high", 128, True, True, 5), Sweep("high", 64, False, True, 5, terms=True)
        return architecture != 86 and variant in worst
    if isinstance(variant, Rows):
        return variant.form in ("", "channels_last", "elementwise") and (not variant.form or variant.dtype == "fp32")
    if isinstance(variant, Density):
        return variant.dtype == "fp32" and variant.dim == 32
    if isinstance(variant, FewRows):
        return variant.kernel == RationalQuadratic(2.3) or variant.dtype == "bf16"
    if isinstance(variant, Slices):
        return variant == Slices(variant.direction, "highest", 64)
    counted = {
        *(Sweep("highest", 16, False, within, bandwidths) for within in (False, True) for bandwidths in (1, 5)),
        *(Sweep(precision, 64, True, False) for precision in PRECISIONS),
        *(Sweep("highest", dim, True, True, 5) for dim in DIMS),
        Sweep("highest", 256, False, True, 5),
        Sweep("highest", 64, False, True, 5, terms=True),
        *(Sweep("highest", 64, True, True, 5, squared=False, kernel=kernel) for kernel in (RationalQuadratic(2.3), Laplace())),
        *(Matmul(direction, "highest", 64, 64) for direction in ("forward", "backward")),
        HVP("points", "highest", 64, 64),
        HVP("factors", "highest", 64, 64),
        HVP("points", "highest", 64, 1, within=True),
        Stein("highest", 64, True),
        Stein("highest", 64, True, hessian=True),
        Stein("highest", 64, True, 5, RationalQuadratic(2.3)),
    }
    return variant in counted


def config_of(variant: Variant, architecture: int) -> SweepConfig | RowConfig | DensityConfig | FewRowsConfig:
    if isinstance(variant, Sweep):
        products = products_of(variant.kernel, variant.precision, variant.second_pass)[1]
        if variant.terms:
            return terms_config(variant.dim, products, variant.bandwidths, architecture, _steep(variant.kernel))
        plain = variant.kernel == RBF() and not variant.within and not variant.batched
        return sweep_config(variant.dim, products, variant.gradient, variant.bandwidths, architecture, _powers(variant.kernel), plain)
    if isinstance(variant, Matmul):
        products = products_of(variant.kernel, variant.precision, self_pairs=True)[1]
        if variant.differences:
            products = difference_products(8 if variant.precision == "float64" else 4)
        backward = variant.direction == "backward"
        powers = _powers(variant.kernel)
        sizes = variant.dim, variant.columns
        return matmul_config(*sizes, products, backward, variant.bandwidths, architecture, powers, variant.biased)
    if isinstance(variant, HVP):
        products = products_of(variant.kernel, variant.precision, self_pairs=not variant.within)[1]
        if variant.differences:
            products = difference_products(8 if variant.precision == "float64" else 4)
        many = _powers(variant.kernel) or kernel_hvp.takes_exact_distances(families.family_of(variant.kernel))
        return hvp_config(variant.dim, variant.columns, products, variant.to == "points", variant.bandwidths, architecture, many)
    if isinstance(variant, Stein):
        products = products_of(variant.kernel, variant.precision, variant.second_pass)[1]
        if variant.differences:
            products = difference_products(8 if variant.precision == "float64" else 4)
        power = ksd_to_normal.is_power(families.family_of(variant.kernel))
        if variant.hessian:
            return stein_hessian_config(variant.dim, products, variant.bandwidths, architecture, power)
        return stein_config(variant.dim, products, variant.gradient, variant.bandwidths, architecture, power)
    if isinstance(variant, Differences):
        products = difference_products(8 if variant.dtype == "fp64" else 4)
        if variant.terms:
            return terms_config(variant.dim, products, variant.bandwidths, architecture, _steep(variant.kernel))
        return sweep_config(variant.dim, products, variant.gradient, variant.bandwidths, architecture)
    if isinstance(variant, FewRows):
        return few_rows_config(variant.rows, variant.dim)
    if isinstance(variant, Density):
        gradient = variant.direction in ("rows", "columns")
        return density_config(variant.dim, variant.dtype == "fp64", gradient, variant.stratified, architecture)
    if isinstance(variant, Slices):
        return slice_config(variant.dim, variant.precision, variant.direction == "backward", architecture)
    return reparameterize_kl.plan_of(variant.call).config


def row(variant: Variant, architecture: int) -> dict[str, Any]:
    """Compile a variant and describe it."""
    describe: Any = {
        Sweep: _sweep, Differences: _differences, Matmul: _matmul, HVP: _hvp, Stein: _stein, Rows: _rows, Density: _density,
        FewRows: _few, Slices: _slices,
    }  # fmt: skip
    config = config_of(variant, architecture)
    kernel, binary, units, work = describe[type(variant)](variant, config, architecture)
    gpu = GPUS[architecture]
    bound = max(units, key=lambda unit: units[unit])
    pair_and_dimension = dict.fromkeys((Density, FewRows), "pair and dimension")
    per = ({Rows: "element", Slices: "row, slice and point"} | pair_and_dimension).get(type(variant), "pair")
    return {
        "kernel": kernel,
        "variant": variant.name,
        "arch": f"sm_{architecture}",
        "config": dataclasses.asdict(config),
        "registers": binary.registers,
        "stack_bytes": binary.stack,
        "spill_instructions": binary.local,
        "shared_bytes": binary.shared,
        "shared_limit": SHARED_MEMORY[architecture] << 10,
        "blocks": _blocks(binary, config.num_warps, architecture),
        "per": per,
        **work,
        "cycles": {unit: round(cycles, 4) for unit, cycles in units.items()},
        "bound": bound,
        "gpu": gpu.name,
        "predicted_ms": round(_count(variant) * units[bound] / (gpu.multiprocessors * gpu.ghz * 1e6), 3),
        "triton": triton.__version__,
    }


def _blocks(binary: Binary, num_warps: int, architecture: int) -> int:
    """Blocks that a multiprocessor holds at once, by their registers, shared memory and warps."""
    registers = 65_536 // (32 * num_warps * -(-max(binary.registers, 1) // 8) * 8)
    # A kibibyte of each block is the system's.
    shared = (SHARED_MEMORY[architecture] + 1 << 10) // (binary.shared + 1024)
    warps = 48 if architecture in (86, 89, 120) else 64
    return min(registers, shared, warps // num_warps, 32)


def _count(variant: Variant) -> float:
    if isinstance(variant, Rows):
        return PREDICTED_ROWS * variant.dim
    if isinstance(variant, Density):
        return PREDICTED_ROWS**2 * variant.dim
    if isinstance(variant, FewRows):
        return PREDICTED_PROBLEMS * variant.rows**2 * variant.dim
    if isinstance(variant, Slices):
        return PREDICTED_ROWS * PREDICTED_SLICES * math.prod(variant.points)
    symmetric = isinstance(variant, Sweep) and variant.symmetric
    return PREDICTED_ROWS**2 / (2 if symmetric else 1)


def _rate(products: str, gpu: GPU) -> float:
    """Multiply-adds a cycle of a multiprocessor."""
    rates = {"highest": gpu.bf16, "medium": gpu.bf16, "high": gpu.tf32, "tf32x3": gpu.tf32, "ieee": gpu.fp32, "float64": gpu.fp64}
    return rates[products]


def _powers(kernel: Kernel) -> bool:
    return isinstance(kernel, plan.MANY_REGISTERS)


def _steep(kernel: Kernel) -> bool:
    return families.family_of(kernel).number == families.RATIONAL_QUADRATIC_LARGE.value


def products_of(kernel: Kernel, precision: str, second_pass: bool = False, self_pairs: bool = False) -> tuple[int, str]:
    """The constexpr PRODUCT, and what `kernels.config` calls these products."""
    family = families.family_of(kernel)
    product = plan.precision_products(family, "ieee" if precision == "float64" else precision, self_pairs)[int(second_pass)]
    return product, products.product_name(product, torch.float64 if precision == "float64" else torch.float32)


def _compile_sweep(variant: Sweep | Differences, config: SweepConfig, architecture: int, product: int, dim: int) -> Binary:
    scalar = "*fp64" if "float64" in variant.name or "fp64" in variant.name else "*fp32"
    types = {
        "operands": prepare.Operands(*[scalar] * 4, "i32", "i32"),
        "tables": prepare.PlanTables("*fp64", scalar, "*fp64"),
        "part_sums": mmd.PartSums(scalar, scalar, scalar, "i32"),
        "swept": prepare.SweptRows(*["i32"] * len(prepare.SweptRows._fields)),
        "sizes": mmd.Sizes(*["i32"] * len(mmd.Sizes._fields)),
        **dict.fromkeys(("first_row", "x_flags", "y_flags"), "i32"),
    }
    sweep = variant if isinstance(variant, Sweep) else None
    squared = variant.kernel == RBF() and (sweep is None or sweep.squared)
    family = families.family_of(variant.kernel)
    spec = mmd.SweepSpec(
        TABLE=plan.table_size(family, variant.bandwidths),
        PASS=int(product == products.DIFFERENCES.value or (sweep is not None and sweep.second_pass)),
        SAMPLES=1 if variant.within else 2,
        BATCHED=sweep is not None and sweep.batched,
        GRADIENT=variant.gradient,
        TERMS=sums.term_count(family, config.bandwidths) if isinstance(config, TermsConfig) else 0,
        GROUPS=config.groups(variant.bandwidths) if isinstance(config, TermsConfig) else 1,
        WEIGHTED=sweep is not None and sweep.weighted,
        PRODUCT=product,
        D=dim,
        FAMILY=family,
        BANDWIDTHS=variant.bandwidths,
        SQUARINGS=sums.pack_squarings((0, *[int(squared)] * (variant.bandwidths - 1))),
    )
    return compile_kernel(mmd.sweep_kernel, types, {"SPEC": spec} | config.launch(), architecture)


def _sweep(variant: Sweep, config: SweepConfig, architecture: int) -> Described:
    dim = padded_dim(variant.dim, config)
    product, products = products_of(variant.kernel, variant.precision, variant.second_pass)
    operand = _POINTER[products]
    binary = _compile_sweep(variant, config, architecture, product, dim)
    ops = _inner_loop(binary, dim // config.block_k)
    work = _per_unit(ops, config.block_n * config.block_m / (32 * config.num_warps))
    gpu = GPUS[architecture]
    multiplied = _PRODUCTS[products] * (dim + (config.block_d if variant.gradient else 0))
    width = {"*bf16": 2, "*fp32": 4, "*fp64": 8}[operand] * (2 if products in ("highest", "tf32x3") else 1)
    loaded = width * dim / config.block_n
    if dim > config.block_k:
        loaded += width * dim / config.block_m + width * config.block_d / config.block_n * variant.gradient
    blocks = dim // config.block_d
    units = _cycles(work, gpu.fp64)
    units["products"] = multiplied / _rate(products, gpu)
    units["memory"] = loaded / CACHE_BYTES
    # Each block of features of the gradient takes a sweep of its own.
    repeats = blocks if variant.gradient else 1
    return "mmd.sweep_kernel", binary, {unit: repeats * cycles for unit, cycles in units.items()}, work


def _differences(variant: Differences, config: SweepConfig, architecture: int) -> Described:
    dim = -(-variant.dim // 16) * 16
    binary = _compile_sweep(variant, config, architecture, products.DIFFERENCES.value, dim)
    blocks = dim // config.block_d
    work = _per_unit(_inner_loop(binary, dim), config.block_n * config.block_m / (32 * config.num_warps))
    repeats = blocks if variant.gradient else 1
    units = {unit: repeats * cycles for unit, cycles in _cycles(work, GPUS[architecture].fp64).items()}
    return "mmd.sweep_kernel", binary, units, work


def _matmul(variant: Matmul, config: MatmulConfig, architecture: int) -> Described:
    backward = variant.direction == "backward"
    fn = kernel_matmul.gradient_kernel if backward else kernel_matmul.matmul_kernel
    if variant.direction == "log sums":
        fn = log_kernel_density.log_sum_kernel
    dim = padded_dim(variant.dim, config)
    columns = prepare.padded(variant.columns, config.block_c)
    product, kind = products_of(variant.kernel, variant.precision, self_pairs=True)
    if variant.differences:
        product, kind = products.DIFFERENCES.value, "float64" if variant.precision == "float64" else "ieee"
    scalar = "*fp64" if variant.precision == "float64" else "*fp32"

    def pick(name: str) -> str:
        return "*fp64" if name == "plan_ptr" else scalar if name.endswith("_ptr") else "i32"

    options = config.launch() if backward else config.launch("BLOCK_D")
    blocks = {name: options.pop(name) for name in list(options) if name.startswith("BLOCK")}
    spec = kernel_matmul.MatmulSpec(
        PRECISION_PASS=int(variant.differences),
        WITHIN=False,
        PRODUCT=product,
        FAMILY=families.family_of(variant.kernel),
        BANDWIDTHS=variant.bandwidths,
        SQUARINGS=sums.pack_squarings((0, *[int(variant.kernel == RBF())] * (variant.bandwidths - 1))),
        D=dim,
        C=columns,
        BIASED=variant.biased,
        **blocks,
    )
    binary = compile_kernel(fn, argument_types(fn, pick), {"SPEC": spec} | options, architecture)
    steps = dim if variant.differences else dim // config.block_k
    work = _per_unit(_inner_loop(binary, steps), config.block_n * config.block_m / (32 * config.num_warps))
    gpu = GPUS[architecture]
    units = _cycles(work, gpu.fp64)
    kept = columns + config.block_d if backward else 0 if variant.direction == "log sums" else config.block_c
    units["products"] = _PRODUCTS[kind] * ((0 if variant.differences else dim) + kept) / _rate(kind, gpu)
    repeats = dim // config.block_d if backward else columns // config.block_c
    module = "log_kernel_density" if variant.direction == "log sums" else "kernel_matmul"
    return f"{module}.{fn.__name__}", binary, {unit: repeats * cycles for unit, cycles in units.items()}, work


def _hvp(variant: HVP, config: MatmulConfig, architecture: int) -> Described:
    points, dim = variant.to == "points", padded_dim(variant.dim, config)
    fn = kernel_hvp.points_kernel if points else kernel_hvp.factors_kernel
    multiplied = variant.columns <= kernel_hvp.MOST_MULTIPLIED
    columns = variant.columns if multiplied else prepare.padded(variant.columns, config.block_c)
    product, kind = products_of(variant.kernel, variant.precision, self_pairs=not variant.within)
    if variant.differences:
        product, kind = products.DIFFERENCES.value, "float64" if variant.precision == "float64" else "ieee"
    scalar, family = "*fp64" if variant.precision == "float64" else "*fp32", families.family_of(variant.kernel)
    types = {
        **dict.fromkeys(("points", "directions"), prepare.Operands(*[scalar] * 4, "i32", "i32")),
        "factors": kernel_hvp.Factors(*[scalar] * 4),
        "plan_ptr": "*fp64",
        "table_ptr": scalar,
        "start": kernel_hvp.Start(*["i32"] * len(kernel_hvp.Start._fields)),
        **({"sums": kernel_hvp.PointSums(scalar, scalar, scalar, "i32", "i32")} if points else {"out_ptr": scalar}),
    }
    options = config.launch()
    blocks = {name: options.pop(name) for name in list(options) if name.startswith("BLOCK")}
    spec = kernel_hvp.HVPSpec(
        PRECISION_PASS=int(variant.differences),
        WITHIN=variant.within,
        PRODUCT=product,
        MULTIPLIED=multiplied,
        FAMILY=family,
        BANDWIDTHS=variant.bandwidths,
        EXACT_NEAR=kernel_hvp.takes_exact_distances(family),
        D=dim,
        C=columns,
        ROW_DIR=True,
        COLUMN_DIR=True,
        ROW_FACTOR_DIR=points,
        COLUMN_FACTOR_DIR=True,
        **blocks,
    )
    binary = compile_kernel(fn, types, {"SPEC": spec} | options, architecture)
    steps = dim if variant.differences else dim // config.block_k
    work = _per_unit(_inner_loop(binary, steps), config.block_n * config.block_m / (32 * config.num_warps))
    gpu = GPUS[architecture]
    units = _cycles(work, gpu.fp64)
    of_factors = 0 if multiplied else 3 * columns if points else 2 * config.block_c
    of_points = 0 if variant.differences else 3 * dim + (2 * config.block_d if points else 0)
    units["products"] = _PRODUCTS[kind] * (of_points + of_factors) / _rate(kind, gpu)
    repeats = dim // config.block_d if points else 1 if multiplied else columns // config.block_c
    return f"kernel_hvp.{fn.__name__}", binary, {unit: repeats * cycles for unit, cycles in units.items()}, work


def _stein(variant: Stein, config: SweepConfig, architecture: int) -> Described:
    dim = padded_dim(variant.dim, config)
    product, kind = products_of(variant.kernel, variant.precision, variant.second_pass)
    if variant.differences:
        product, kind = products.DIFFERENCES.value, "float64" if variant.precision == "float64" else "ieee"
    scalar, family = "*fp64" if variant.precision == "float64" else "*fp32", families.family_of(variant.kernel)
    operands: Any = prepare.Operands(*[scalar] * 4, "i32", "i32")
    types: dict[str, Any] = {"operands": operands, "tables": prepare.PlanTables("*fp64", scalar, "*fp64")}
    if variant.hessian:
        fn = ksd_to_normal.hessian_kernel
        types |= {"directions": operands, "curvature": ksd_to_normal.Curvature(*[scalar] * 3)}
        types["part_sums"] = ksd_to_normal.HessianSums(*[scalar] * 6, "i32", "i32")
    else:
        fn = ksd_to_normal.ksd_kernel
        types |= {"stein": ksd_to_normal.Stein(scalar, scalar), "part_sums": ksd_to_normal.PartSums(*[scalar] * 4, "i32", "i32")}
    types |= {"swept": prepare.SweptRows(*["i32"] * len(prepare.SweptRows._fields)), "n": "i32"}
    spec = ksd_to_normal.spec_of(
        config, int(variant.second_pass or variant.differences), variant.batched, variant.gradient, product, dim, family, variant.bandwidths
    )
    options = config.launch("BLOCK_N", "BLOCK_M", "BLOCK_K", "BLOCK_D")
    if isinstance(config, HessianConfig):
        options["SPLIT"] = config.split
    binary = compile_kernel(fn, types, {"SPEC": spec} | options, architecture)
    # In a loop, or a program each.
    loop, repeats = (1, variant.bandwidths) if options.get("SPLIT") else (variant.bandwidths if variant.hessian else 1, 1)
    # Of both loops within that over the columns, where there are two.
    steps = max(loop, dim if variant.differences else dim // config.block_k)
    work = _per_unit(_inner_loop(binary, steps), config.block_n * config.block_m / (32 * config.num_warps))
    gpu = GPUS[architecture]
    units = _cycles(work, gpu.fp64)
    if not variant.differences:
        features = 3 * dim + 2 * config.block_d if variant.hessian else dim + (config.block_d if variant.gradient else 0)
        units["products"] = _PRODUCTS[kind] * features / _rate(kind, gpu)
    repeats *= dim // config.block_d if variant.gradient else 1
    return f"ksd_to_normal.{fn.__name__}", binary, {unit: repeats * cycles for unit, cycles in units.items()}, work


def _rows(variant: Rows, config: RowConfig, architecture: int) -> Described:
    backward = variant.direction == "backward"
    fn = reparameterize_kl.backward_kernel if backward else reparameterize_kl.forward_kernel
    call = variant.call
    spec = reparameterize_kl.plan_of(call).spec
    kl_type = "*fp64" if variant.dtype == "fp64" else "*fp32"
    kl, seed = reparameterize_kl.Array(kl_type, "i32", "i32"), reparameterize_kl.Array("*i64", "i32", "i32")
    given: Any = [None if strides is None else reparameterize_kl.Array(f"*{variant.dtype}", "i32", "i32") for strides in call.strides]
    mu, s, eps, prior_mu, prior_s, z, _, *grads = given
    inputs = reparameterize_kl.Inputs(mu, s, seed if variant.seeded else eps, prior_mu, prior_s)
    types: dict[str, Any] = {"inputs": inputs, "sizes": reparameterize_kl.Sizes("i32", "i32", "i32", "i32")}
    types |= {"grads": reparameterize_kl.Gradients(z, kl, *grads)} if backward else {"z": z, "kl": kl}
    binary = compile_kernel(fn, types, {"SPEC": spec, "num_warps": config.num_warps}, architecture)
    work = _per_unit(binary.code, config.block_n * config.block_d / (32 * config.num_warps))
    gpu = GPUS[architecture]
    units = _cycles(work, gpu.fp64)
    arrays = sum(strides is not None for strides in call.strides)
    units["memory"] = arrays * variant.itemsize * gpu.multiprocessors * gpu.ghz * 1e9 / gpu.bytes_per_second
    return f"reparameterize_kl.{variant.direction}_kernel", binary, units, work


def _density(variant: Density, config: DensityConfig, architecture: int) -> Described:
    gradient = variant.direction in ("rows", "columns")
    fn = total_correlation.gradient_kernel if gradient else getattr(total_correlation, f"{variant.direction}_kernel")

    def pick(name: str) -> str:
        return "*fp64" if name == "marginal_sum_ptr" else f"*{variant.dtype}" if name.endswith("_ptr") else "i32"

    types = argument_types(fn, pick)
    if gradient:
        pointer = f"*{variant.dtype}"
        rows = variant.direction == "rows"
        types["sums"] = total_correlation.PerInput(pointer, None, None) if rows else total_correlation.PerInput(None, pointer, pointer)
    dtype = torch.float64 if variant.dtype == "fp64" else torch.float32
    constants = {
        "OF_ROWS": variant.direction == "rows",
        "STRATIFIED": variant.stratified,
        "LEAST_SUM": total_correlation.LEAST_SUM[dtype],
        "LOWEST": torch.finfo(dtype).min,
    } | config.launch()
    constants = {name: value for name, value in constants.items() if name in fn.arg_names or name.startswith("num_")}
    binary = compile_kernel(fn, types, constants, architecture, aligned=("rows", "columns"))
    # A turn of the sweep looks at each dimension in turn: the joint exponent at all of them, gradients at those of a block.
    turns = 1 if variant.direction == "marginal" else variant.dim if variant.direction == "joint" else config.block_d
    work = _per_unit(_inner_loop(binary, turns), turns * config.block_n * config.block_m / (32 * config.num_warps))
    return f"total_correlation.{variant.direction}_kernel", binary, _cycles(work, GPUS[architecture].fp64), work


def _few(variant: FewRows, config: FewRowsConfig, architecture: int) -> Described:
    family, fn = families.family_of(variant.kernel), few_rows.few_rows_kernel
    numbers = 2 * variant.bandwidths + family.parameters
    types = argument_types(fn, lambda name: "*fp32" if name.endswith("_ptr") else "i32")
    types |= {"numbers": ("fp32",) * (3 * numbers), "x_ptr": f"*{variant.dtype}", "y_ptr": f"*{variant.dtype}"}
    evaluated = 1 if family.homogeneous else variant.bandwidths
    spec = few_rows.FewRowsSpec(numbers, False, family, evaluated, variant.bandwidths, 0, False, True, True)
    binary = compile_kernel(fn, types, {"SPEC": spec} | config.launch(), architecture)
    # The loop over columns, with one over features for the distances and one for the gradients.
    steps = -(-variant.dim // config.block_d)
    ops = max((loop.weighed(steps) for loop in binary.loops), key=lambda loop: loop.total())
    work = _per_unit(ops, config.block_n * config.block_m * variant.dim / (32 * config.num_warps))
    units = _cycles(work, GPUS[architecture].fp64)
    gpu = GPUS[architecture]
    width = (4 if variant.dtype == "fp32" else 2) + 4
    units["memory"] = width * gpu.multiprocessors * gpu.ghz * 1e9 / gpu.bytes_per_second / variant.rows
    return "few_rows.few_rows_kernel", binary, units, work


def _slices(variant: Slices, config: SweepConfig, architecture: int) -> Described:
    backward = variant.direction == "backward"
    fn = sigreg.gradient_kernel if backward else sigreg.sums_kernel
    double = variant.precision == "float64"
    scalar = "fp64" if double else "fp32"
    types = argument_types(fn, lambda name: f"*{scalar}" if name.endswith("_ptr") else "i32")
    steps, chains = variant.points
    z = torch.empty(1, 0, variant.dim, dtype=torch.float64 if double else torch.float32)
    spec = sigreg.spec_of(z, Points(0.1, steps, variant.odd), variant.precision)
    if double and not backward:
        # A launch for each chain.
        spec, chains = spec._replace(LAST=1), 1
    constants = {"SPEC": spec} | config.launch(*(() if backward else ("BLOCK_D",)))
    binary = compile_kernel(fn, types, constants, architecture)
    loop = _inner_loop(binary, math.ceil(variant.dim / config.block_k), ("FFMA", "DFMA"))
    work = _per_unit(loop, steps * chains * config.block_n * config.block_m / (32 * config.num_warps))
    gpu = GPUS[architecture]
    units = _cycles(work, gpu.fp64)
    precision = "tf32x3" if variant.precision == "highest" else variant.precision
    multiplied = _PRODUCTS[precision] * variant.dim / _rate(precision, gpu)
    if backward:
        precision = "highest" if variant.precision == "high" else variant.precision
        multiplied += _PRODUCTS[precision] * config.block_d / _rate(precision, gpu)
    units["products"] = multiplied / (steps * chains)
    # Each block of features of the gradient takes a sweep of its own.
    repeats = math.ceil(variant.dim / config.block_d) if backward else 1
    return f"sigreg.{fn.__name__}", binary, {unit: repeats * cycles for unit, cycles in units.items()}, work


def _inner_loop(binary: Binary, trips: int = 1, arithmetic_ops: tuple[str, ...] = ("MUFU", "DFMA")) -> collections.Counter[str]:
    """The first of the longest kind: the loop that masks the tiles on the diagonal comes after the one over all other tiles."""
    loops = [loop.weighed(trips) for loop in binary.loops]
    arithmetic = [sum(n for op, n in loop.items() if op.startswith(arithmetic_ops)) for loop in loops]
    return next(loop for loop, n in zip(loops, arithmetic, strict=True) if 2 * n >= max(arithmetic))


def _per_unit(ops: collections.Counter[str], count: float) -> dict[str, float]:
    def instructions(*prefixes: str) -> float:
        return round(sum(n for op, n in ops.items() if op.startswith(prefixes)) / count, 3)

    total = round(sum(ops.values()) / count, 3)
    # A conversion of one number at a time (F2F) takes the exponential unit.
    exponential = instructions("MUFU", "F2F.")
    matrix = round(sum(n for op, n in ops.items() if is_matrix(op)) / count, 3)
    return {
        "instructions": total,
        "spills": instructions("LDL", "STL"),
        "exponential": exponential,
        "matrix": matrix,
        "double": instructions("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"),
        "other": round(total - exponential - matrix, 3),
    }


def _cycles(work: dict[str, float], double_rate: int) -> dict[str, float]:
    units = {"exponentials": work["exponential"] / EXPONENTIALS, "issue": work["instructions"] / ISSUE}
    if work["double"]:
        units["double"] = work["double"] / double_rate
    return units


def format_row(row: dict[str, Any]) -> str:
    config = "×".join(str(row["config"][key]) for key in ("block_n", "block_m", "block_k", "block_d") if key in row["config"])
    spill = (
        f" SPILLS {row['stack_bytes']} B, {row['spill_instructions']} instructions"
        if row["stack_bytes"] or row["spill_instructions"]
        else ""
    )
    over = f" OVER THE LIMIT of {row['shared_limit']}" if row["shared_bytes"] > row["shared_limit"] else ""
    return (
        f"{row['arch']:6} {row['kernel'].split('.')[0]}.{row['kernel'].split('.')[1]:20} {row['variant']:52} {config:11} "
        f"{row['config']['num_warps']} warps, {row['registers']:3} registers, {row['shared_bytes']:6} B shared{over}{spill}; "
        f"{row['instructions']:6.2f} instructions/{row['per']} ({row['exponential']:.2f} exponential, {row['matrix']:.2f} matrix); "
        f"{row['spills']:g} of spills; {row['blocks']} blocks a multiprocessor; "
        f"{row['bound']} bound, {row['predicted_ms']} ms on {row['gpu']}"
    )


def sort_key(row: dict[str, Any]) -> tuple[int, str, str]:
    return int(row["arch"][3:]), row["kernel"], row["variant"]


def load(path: Path = RESULTS) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows by kernel, variant and architecture."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["kernel"], row["variant"], row["arch"]): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--match", nargs="+", default=[], help="words that a variant's name must hold")
    parser.add_argument("--quick", action="store_true", help="what the tests compile")
    parser.add_argument("--output", type=Path, help="where to write the rows; the committed file, if nothing is left out")
    args = parser.parse_args()
    rows = []
    for architecture in args.arch:
        for variant in variants(architecture):
            if all(word in variant.name.split() for word in args.match) and (quick(variant, architecture) or not args.quick):
                rows.append(row(variant, architecture))
                print(format_row(rows[-1]), flush=True)
    output = args.output
    if output is None and not args.match and not args.quick and set(args.arch) == set(ARCHITECTURES):
        output = RESULTS
    if output is not None:
        output.write_text("".join(json.dumps(r) + "\n" for r in sorted(rows, key=sort_key)))


if __name__ == "__main__":
    main()
