"""Launch choices as data: one frozen config for each kernel, chosen from shape, dtype and architecture. No autotuning."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace

import torch


class _Config:
    """The base of the configs."""

    def launch(self, *without: str) -> dict[str, int]:
        """The keyword arguments of a kernel: its constexprs in capitals, but those in `without`, and the compiler's options."""
        given: dict[str, int] = {}
        for name, value in vars(self).items():
            if name.startswith("block") or name == "vector":
                given[name.upper()] = value
            elif name == "registers" and value is not None:
                given["maxnreg"] = value
            elif name.startswith("num_"):
                given[name] = value
        return {name: value for name, value in given.items() if name not in without}


@dataclass(frozen=True)
class SweepConfig(_Config):
    """The tile of a sweep over pairs, and how many warps and pipeline stages work on it."""

    block_n: int  # rows of the tile, a multiple of block_m
    block_m: int  # columns of the tile
    block_k: int  # features of one step of the exponent's product
    block_d: int  # features of the gradient that a program keeps
    num_warps: int
    num_stages: int
    registers: int | None = None  # limit for each thread, so that more blocks share a multiprocessor; None leaves it to the compiler


@dataclass(frozen=True)
class DensityConfig(_Config):
    """The tile of a sweep over posteriors in every dimension."""

    block_n: int  # rows (or posteriors) that a program owns, at least one for each thread
    block_m: int  # posteriors (or rows) of a step of its sweep
    block_d: int  # dimensions whose gradients it keeps in registers
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class FewRowsConfig(_Config):
    """How a program goes through the pairs of one problem of few rows."""

    block_n: int  # all rows of both samples
    block_m: int  # rows of a step, each of which meets all rows
    block_d: int  # features of a step
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class MatmulConfig(SweepConfig):
    """`SweepConfig` for the product K·v and its gradient."""

    block_c: int = field(kw_only=True)  # columns of v that a program of the product keeps, or of one step of the gradient's product g·v


@dataclass(frozen=True)
class HessianConfig(SweepConfig):
    """`SweepConfig` for the Hessian of a kernel Stein discrepancy times a direction."""

    split: bool = field(kw_only=True)  # a program takes one bandwidth, and not all of them in a loop


@dataclass(frozen=True)
class TermsConfig(SweepConfig):
    """`SweepConfig` for the sums of which derivatives to bandwidths are made."""

    bandwidths: int = field(kw_only=True)  # whose sums a program keeps

    def groups(self, bandwidths: int) -> int:
        """Into how many groups so many bandwidths fall."""
        return -(-bandwidths // self.bandwidths)


@dataclass(frozen=True)
class RowConfig(_Config):
    """A block of a row-wise kernel."""

    block_n: int
    block_d: int
    vector: int  # how many elements move at once, at most 16 bytes; every row starts at a multiple of them
    num_warps: int


@dataclass(frozen=True)
class Device:
    """What launch choices depend on: an architecture as 10·major + minor of its compute capability, and its multiprocessors."""

    architecture: int
    multiprocessors: int


# The interpreter has no device: it gets the choices for an H200.
DEFAULT_DEVICE = Device(90, 132)

# KiB of shared memory that a block may use.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}

# How a multiprocessor multiplies: Hopper by groups of warps, the B200 in tensor memory, all others as sm_80 does.
WGMMA, _TCGEN05 = (90,), (100, 103)


@dataclass(frozen=True)
class _Rule:
    """The tile for up to `dim` features and `bandwidths` bandwidths: the fastest measured, or else the one whose slowest unit needs the
    fewest cycles. None spills in its inner loop or exceeds shared memory, as `benchmarks/results/compile_report.jsonl` shows."""

    dim: float
    bandwidths: float
    config: SweepConfig


_ANY = math.inf
# A block of features as wide as the rows.
_ALL = 0

_RULES: dict[tuple[str, bool], tuple[_Rule, ...]] = {
    ("wgmma", False): (
        _Rule(32, _ANY, SweepConfig(128, 128, _ALL, _ALL, 4, 3)),
        # Two blocks a multiprocessor take 0.63 of the time of one (H200, D 64).
        _Rule(64, 1, SweepConfig(128, 128, _ALL, _ALL, 8, 2, registers=128)),
        _Rule(128, _ANY, SweepConfig(128, 128, _ALL, _ALL, 8, 2)),
        _Rule(_ANY, _ANY, SweepConfig(128, 128, 64, 64, 8, 2)),
    ),
    ("wgmma", True): (
        # Small blocks, several a multiprocessor, of which one multiplies while others take exponentials: at D 16 0.8 and at D 64 0.75 of
        # the time of one block of 8 warps (H100); four blocks at D 64 0.89 of that of three (H200).
        _Rule(32, _ANY, SweepConfig(64, 64, _ALL, _ALL, 4, 3)),
        _Rule(64, 1, SweepConfig(64, 64, _ALL, _ALL, 4, 2, registers=128)),
        _Rule(64, _ANY, SweepConfig(128, 64, _ALL, _ALL, 8, 2)),
        _Rule(128, 1, SweepConfig(64, 64, _ALL, _ALL, 4, 2)),
        _Rule(128, _ANY, SweepConfig(64, 32, _ALL, _ALL, 4, 2)),
        # 32 columns or 64 features a block, without a register spilled at the loop's ends, take twice the time at D 256 (H100).
        _Rule(_ANY, 1, SweepConfig(64, 64, 64, 128, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(64, 64, 64, 64, 4, 2)),
    ),
    ("tcgen05", False): (
        _Rule(32, _ANY, SweepConfig(128, 128, _ALL, _ALL, 4, 3)),
        _Rule(128, _ANY, SweepConfig(128, 64, _ALL, _ALL, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(128, 64, 64, 64, 4, 1)),
    ),
    ("tcgen05", True): (
        _Rule(64, 1, SweepConfig(64, 64, _ALL, _ALL, 4, 1)),
        _Rule(64, _ANY, SweepConfig(64, 32, _ALL, _ALL, 4, 1)),
        _Rule(128, 1, SweepConfig(64, 32, _ALL, _ALL, 4, 1)),
        _Rule(_ANY, _ANY, SweepConfig(64, 32, 64, 128, 4, 1)),
    ),
    ("mma", False): (
        _Rule(32, _ANY, SweepConfig(128, 64, _ALL, _ALL, 4, 2)),
        _Rule(64, 1, SweepConfig(128, 64, _ALL, _ALL, 4, 2)),
        _Rule(64, _ANY, SweepConfig(64, 64, _ALL, _ALL, 4, 2)),
        _Rule(128, _ANY, SweepConfig(64, 32, _ALL, _ALL, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(128, 64, 32, 32, 8, 2)),
    ),
    ("mma", True): (
        _Rule(32, _ANY, SweepConfig(64, 64, _ALL, _ALL, 4, 2)),
        _Rule(64, _ANY, SweepConfig(128, 32, _ALL, _ALL, 8, 2)),
        _Rule(128, 1, SweepConfig(64, 32, _ALL, _ALL, 4, 1)),
        _Rule(_ANY, _ANY, SweepConfig(64, 32, 32, 64, 4, 2)),
    ),
    # One tf32 product, whose operand from registers is rearranged: larger blocks take 0.7 of the small ones' time at D 64 (H100).
    ("wgmma tf32", True): (
        _Rule(64, _ANY, SweepConfig(128, 64, _ALL, _ALL, 8, 3)),
        _Rule(128, 1, SweepConfig(64, 64, _ALL, _ALL, 4, 2)),
        _Rule(128, _ANY, SweepConfig(64, 32, _ALL, _ALL, 4, 2)),
        _Rule(_ANY, 1, SweepConfig(64, 64, 64, 128, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(64, 64, 64, 64, 4, 2)),
    ),
    # Three tf32 products instead of three of bfloat16: the operands take twice the room.
    ("wgmma tf32x3", False): (
        _Rule(64, _ANY, SweepConfig(128, 128, _ALL, _ALL, 8, 2)),
        _Rule(_ANY, _ANY, SweepConfig(128, 128, 32, 32, 8, 2)),
    ),
    ("wgmma tf32x3", True): (
        _Rule(16, _ANY, SweepConfig(128, 64, _ALL, _ALL, 8, 2)),
        _Rule(64, _ANY, SweepConfig(128, 32, _ALL, _ALL, 8, 2)),
        _Rule(_ANY, _ANY, SweepConfig(64, 32, 32, 64, 4, 2)),
    ),
    ("tcgen05 tf32x3", False): (
        _Rule(64, _ANY, SweepConfig(64, 64, _ALL, _ALL, 4, 1)),
        _Rule(_ANY, _ANY, SweepConfig(128, 64, 32, 32, 8, 2)),
    ),
    ("tcgen05 tf32x3", True): (
        _Rule(32, _ANY, SweepConfig(64, 32, _ALL, _ALL, 4, 2)),
        _Rule(_ANY, 1, SweepConfig(64, 64, 32, 64, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(64, 32, 32, 64, 4, 2)),
    ),
    ("mma tf32x3", False): (
        _Rule(32, _ANY, SweepConfig(128, 64, _ALL, _ALL, 8, 2)),
        _Rule(_ANY, _ANY, SweepConfig(128, 64, 32, 32, 8, 2)),
    ),
    ("mma tf32x3", True): (
        _Rule(32, _ANY, SweepConfig(64, 32, _ALL, _ALL, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(64, 32, 32, 32, 4, 2)),
    ),
    # Multiply-adds read whole rows of both operands into registers: 16 features at a time.
    ("ieee", False): (_Rule(_ANY, _ANY, SweepConfig(64, 64, 16, 16, 4, 2)),),
    ("ieee", True): (
        _Rule(32, _ANY, SweepConfig(64, 32, 16, _ALL, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(64, 32, 16, 64, 4, 2)),
    ),
    ("float64", False): (_Rule(_ANY, _ANY, SweepConfig(64, 32, 16, 16, 4, 2)),),
    ("float64", True): (
        _Rule(16, _ANY, SweepConfig(32, 32, 16, 16, 4, 2)),
        _Rule(_ANY, _ANY, SweepConfig(32, 32, 16, 32, 4, 2)),
    ),
}

# With fewer tiles for each program, its start and the sum over the shares cost more than an idle multiprocessor.
MIN_TILES = 4


@functools.lru_cache(maxsize=64)
def device_limits(device: torch.device) -> Device:
    if device.type != "cuda":
        return DEFAULT_DEVICE
    major, minor = torch.cuda.get_device_capability(device)
    return Device(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


def column_splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many shares to cut the columns of each program, so that a small sample still fills the device twice."""
    return max(1, min(2 * multiprocessors // programs, tiles // MIN_TILES))


def sweep_config(
    dim: int, precision: str, gradient: bool, bandwidths: int, architecture: int, powers: bool = False, gaussian_pair: bool = True
) -> SweepConfig:
    """For rows of `dim` features; `precision` is one of `fastvae.mmd`, "tf32x3", "float64" or of `difference_products`; `powers` says that
    φ is a power of 1 + t, `gaussian_pair` that it is a Gaussian between two samples of one problem."""
    if precision in (difference_products(4), difference_products(8)):
        return SweepConfig(32, 32 if precision == difference_products(4) else 16, 4, 8, 4, 1)
    unit = "wgmma" if architecture in WGMMA else "tcgen05" if architecture in _TCGEN05 else "mma"
    unit += " tf32x3" * (precision == "tf32x3") + " tf32" * (precision == "high" and gradient and unit == "wgmma")
    rules = _RULES[precision if precision in ("ieee", "float64") else unit, gradient]
    config = next(rule.config for rule in rules if dim <= rule.dim and bandwidths <= rule.bandwidths)
    if powers and config.block_m > (32 if bandwidths > 1 else 64 if gradient else math.inf):
        # The powers of all bandwidths, or with them the slope, take more registers than the products.
        config = replace(config, block_m=config.block_m // 2)
    if gradient and not gaussian_pair:
        # Other kernels need more registers and would spill.
        config = replace(config, registers=None)
    whole = max(16, _next_power_of_2(dim))
    return replace(config, block_k=config.block_k or whole, block_d=config.block_d or whole)


def stein_config(dim: int, precision: str, gradient: bool, bandwidths: int, architecture: int, power: bool) -> SweepConfig:
    """For a kernel Stein discrepancy, of which more than one number a pair is kept; `power` says that φ takes a logarithm."""
    config = sweep_config(dim, precision, gradient, bandwidths, architecture, powers=True, gaussian_pair=False)
    double, several = precision in ("float64", difference_products(8)), bandwidths > 1
    most = 16 if several and (double or (gradient and dim > 16)) else 32 if several or double else 64 if power or gradient else 128
    config = replace(config, block_m=min(config.block_m, most), registers=None)
    if double and several:
        return replace(config, block_n=32, **({} if precision == "float64" else {"block_m": 8, "block_d": 4}))
    if gradient and architecture in _TCGEN05:
        # Results of products pass through registers there.
        return replace(config, block_m=min(config.block_m, 32), block_d=min(config.block_d, 32) if several else config.block_d)
    return replace(config, block_k=min(config.block_k, 32)) if several and gradient and precision == "tf32x3" else config


def stein_hessian_config(dim: int, precision: str, bandwidths: int, architecture: int, power: bool) -> HessianConfig:
    """For the Hessian of a kernel Stein discrepancy times a direction: two products a tile more than its gradient, and as many moments
    again. `power` says that φ takes a logarithm. The largest tiles that do not spill; not measured."""
    # Results of products pass through registers on a B200, for which Triton 3.7 cannot compile a loop within that over the columns.
    split = architecture in _TCGEN05
    if precision == difference_products(4):
        return HessianConfig(32, 16, 4, 8, 4, 1, split=split)
    if precision == difference_products(8):
        return HessianConfig(32, 8, 4, 4, 4, 1, split=split)
    if precision == "float64":
        return HessianConfig(32, 16, 16, 16, 4, 2, split=split)
    if precision == "ieee":
        return HessianConfig(64, 16, 16, min(max(16, _next_power_of_2(dim)), 32), 4, 2, split=split)
    block = min(max(16, _next_power_of_2(dim)), 64)
    block_k = min(block, 32) if precision == "tf32x3" or split else block
    if split:
        return HessianConfig(64, 16, block_k, block, 4, 1, split=split)
    if block == 16:
        return HessianConfig(64, 16 if precision == "tf32x3" else 32, block_k, block, 4, 2, split=split)
    if architecture in WGMMA:
        return HessianConfig(128, 16, block_k, block, 8, 2, split=split)
    return HessianConfig(64, 16, block_k, block, 4, 2, split=split)


def terms_config(dim: int, precision: str, bandwidths: int, architecture: int, steep: bool) -> TermsConfig:
    """`precision` may also be that of `difference_products`; `steep` says that φ is a power with an exponent so large that its logarithm is
    corrected by a quotient."""
    double = precision in ("float64", difference_products(8))
    # Groups of equal size, none so large that it spills.
    groups = -(-bandwidths // (2 if steep else 4 if double else 5))
    share = -(-bandwidths // groups)
    if precision in (difference_products(4), difference_products(8)):
        return TermsConfig(32, 16 if double else 32, 16, 16, 4, 1, bandwidths=share)
    if precision in ("ieee", "float64"):
        return TermsConfig(32 if double else 64, 32, 16, 16, 4, 2, bandwidths=share)
    # Three products of tf32 take twice the room.
    block_k = min(max(16, _next_power_of_2(dim)), 32 if precision == "tf32x3" else 64)
    return TermsConfig(64, 64 if architecture in WGMMA + _TCGEN05 else 32, block_k, block_k, 4, 2, bandwidths=share)


def padded_dim(dim: int, config: SweepConfig) -> int:
    """The number of features with their padding to whole blocks."""
    return dim + -dim % max(config.block_k, config.block_d)


def difference_products(itemsize: int) -> str:
    """The pass by differences as a `precision`, for numbers of this many bytes."""
    return f"differences{8 * itemsize}"


def matmul_config(
    dim: int, columns: int, precision: str, gradient: bool, bandwidths: int, architecture: int, powers: bool = False, biased: bool = False
) -> MatmulConfig:
    """For K·v of rows of `dim` features and v of `columns` columns; `precision` may also be that of `difference_products`. `biased` says
    that rows and columns have biases."""
    if biased and precision == difference_products(8):
        # Larger tiles of float64 spill with the biases.
        return MatmulConfig(32, 32, 16, 4 if gradient else 16, 4, 1, block_c=16)
    if precision in (difference_products(4), difference_products(8)):
        block_d = 8 if precision == difference_products(4) else 4
        return MatmulConfig(32, 64, 16, block_d, 4, 1, block_c=16) if gradient else MatmulConfig(64, 64, 16, 16, 4, 1, block_c=16)
    if precision == "float64":
        return MatmulConfig(32, 32, 16, 16, 4, 1, block_c=16)
    if precision == "ieee":
        return MatmulConfig(64, 32, 16, 32 if gradient and dim > 16 else 16, 4, 1, block_c=16 if gradient else 32)
    # Whole rows and columns up to 64 and blocks of them above; wider tiles as long as registers last.
    block_c = min(max(16, _next_power_of_2(columns)), 64)
    block_d = min(max(16, _next_power_of_2(dim)), 64)
    several_powers = powers and bandwidths > 1
    small = max(block_c, block_d) <= 16 and not several_powers
    # All registers: the compiler's own limit for sm_86 is three or four blocks a multiprocessor, and spills.
    limit = None if architecture in WGMMA or architecture in _TCGEN05 or small else 255
    if gradient:
        tile = (128, 64, 8) if small and architecture in WGMMA else (64, 32, 4)
        return MatmulConfig(tile[0], tile[1], min(block_d, 32), block_d, tile[2], 1, limit, block_c=min(block_c, 32))
    if architecture in WGMMA or small:
        block_c = min(block_c, 32) if several_powers else block_c
        return MatmulConfig(128, 64, min(block_d, 32), min(block_d, 32), 8, 2, block_c=block_c)
    limit = None if several_powers else limit
    return MatmulConfig(64, 32, min(block_d, 32), min(block_d, 32), 4, 2, limit, block_c=min(block_c, 32))


def hvp_config(dim: int, columns: int, precision: str, points: bool, bandwidths: int, architecture: int, many: bool) -> MatmulConfig:
    """For Hessian-vector products of rows of `dim` features and factors of `columns` columns, of which `points` says that the result is to
    the rows; `precision` may also be that of `difference_products`. `many` says that φ takes many registers. None of this is measured: each
    is the largest tile that spills nothing in its loop, as `benchmarks/results/compile_report.jsonl` shows."""
    block_d = min(max(16, _next_power_of_2(dim)), 64)
    if precision == difference_products(4):
        return MatmulConfig(32, 32, 16, 8, 4, 1, block_c=16) if points else MatmulConfig(32, 64, 16, 16, 4, 1, block_c=16)
    if precision == difference_products(8):
        return MatmulConfig(32, 16, 16, 4, 4, 1, block_c=16) if points else MatmulConfig(32, 32, 16, 16, 4, 1, block_c=16)
    if precision == "float64":
        # Two stages keep what is loaded out of the registers.
        return MatmulConfig(32, 16, 16, min(block_d, 32), 4, 2 if columns > 2 else 1, block_c=16)
    if precision == "ieee":
        return MatmulConfig(32, 32, 16, min(block_d, 32), 4, 1, block_c=16)
    # Elsewhere products keep more of the factors in registers.
    widest = 32 if architecture in WGMMA + _TCGEN05 or not points else 16
    block_c = min(max(16, _next_power_of_2(columns)), widest)
    if many and bandwidths > 1 and not points and columns > 2:
        return MatmulConfig(64, 32, 16, block_d, 4, 2, block_c=block_c)
    if many and bandwidths > 1 and points and precision == "highest":
        return MatmulConfig(64, 16, min(block_d, 32), block_d, 4, 1, block_c=block_c)
    return MatmulConfig(64, 32, min(block_d, 32), block_d, 4, 1, 255, block_c=block_c)


def few_rows_config(rows: int, features: int) -> FewRowsConfig:
    """For problems of so many rows of both samples together. A thread keeps up to 16 sums of squares, or 32 for more than 16 rows: with
    more the kernel spills. Not measured."""
    block_n = max(8, _next_power_of_2(rows))
    num_warps, most = (4, 16) if block_n <= 16 else (8, 1024 // block_n)
    return FewRowsConfig(block_n, 8, min(max(8, _next_power_of_2(features)), most), num_warps)


def density_config(dim: int, double: bool, gradient: bool, stratified: bool, architecture: int) -> DensityConfig:
    """For `dim` dimensions. Each block of dimensions computes the joint exponent anew, and each step places its sums once: both are as long
    as spills nothing, which `benchmarks/results/compile_report.jsonl` shows. Stratified weights take registers of their own."""
    if not gradient:
        return DensityConfig(128, 16 if double else 32, 1, 4, 1)
    if double:
        return DensityConfig(128, 8, min(_next_power_of_2(dim), 8), 4, 1)
    block_d = min(_next_power_of_2(dim), 16 if architecture == 120 and not stratified else 32)
    block_m = 32 if stratified or (architecture < 90 and block_d == 16) else 64
    if stratified and architecture in _TCGEN05 and block_d == 16:
        block_m = 16
    return DensityConfig(128, block_m, block_d, 4, 1)


def slice_config(dim: int, precision: str, gradient: bool, architecture: int) -> SweepConfig:
    """For projections of rows of `dim` features on slices, the columns of the tile; `precision` is one of `fastvae.mmd` or "float64".

    As many rows as registers allow: a thread sums over its own rows before it exchanges sums with others. None of this is measured.
    """
    if precision in ("ieee", "float64"):
        return SweepConfig(16 if precision == "float64" else 32, 32, 16, 16, 4, 1)
    block_d = min(max(16, _next_power_of_2(dim)), 64)
    if gradient:
        return SweepConfig(32, 64, min(block_d, 32), block_d, 4, 1)
    return SweepConfig(64 if architecture in WGMMA + _TCGEN05 else 32, 64, block_d, block_d, 4, 1)


def row_config(
    sizes: tuple[int, int, int], itemsize: int, vector: int, sum_r: bool = False, sum_d: bool = False, prior: bool = False
) -> RowConfig:
    """For (B, R, D) of which `vector` elements move at once, and a sum over R, D or both, which should fit a tile where it can: the sums of
    several tiles need a second launch. None of this is measured but the tile of 2,048 elements, 16 a thread."""
    b, r, d = sizes
    # Half as many where an element takes twice the registers, for itself or, without vectors, for its address.
    per_thread = 16 if itemsize < 8 and vector > 1 else 8
    if prior:
        # Two Gaussians and their gradients: with 16 elements a thread up to 197 registers, in float64 with 8 they spill.
        per_thread //= 2
    # Noise is made four columns at a time.
    rows, columns = _next_power_of_2(r), max(4, _next_power_of_2(d))
    # For a sum over rows alone, lines of 128 bytes in float32.
    line = min(columns, 32)
    summed = (rows if sum_r else 1) * (columns if sum_d else line)
    elements = 128 * per_thread
    if (sum_r or sum_d) and summed == 2 * elements:
        # Two tiles to a sum are one of eight warps.
        elements *= 2
    block_d = min(columns, max(line, elements // rows) if sum_r and not sum_d else elements)
    block_n = elements // block_d
    if b > 1 or sum_r:
        # A tile is of one b. With b = 1 one compiled kernel is for every number of rows.
        block_n = min(block_n, rows)
    return RowConfig(block_n, block_d, vector, max(1, block_n * block_d // (32 * per_thread)))


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
