"""Generated problems of every operation: agreement with float64, invariances, and nan where an input is not finite.

A case is a problem of a few rows and one change of it under which the result is known: the operation is run on the changed problem, the
dense reference in float64 on the one before. All changes are exact in the dtype of the case, so that one tolerance serves them all. An
example of Hypothesis holds 25 cases made from its seed, as one of its own draws costs more than a case.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastvae
from fastvae import radial, reference
from fastvae.checks import triton_interpreter
from fastvae.cpu import quadratic_form as cpu_quadratic_form
from fastvae.cpu import reparameterize_kl as cpu_reparameterize_kl
from fastvae.cpu import small as cpu_small
from fastvae.cpu import tiles as cpu_tiles
from fastvae.cpu import total_correlation as cpu_total_correlation
from fastvae.radial import RBF, Kernel, Polynomial, RationalQuadratic
from fastvae.reference.mmd import bandwidths, kernel_matrix
from tests.cases import (
    DEVICE,
    DISTANCE_KERNELS,
    TOLERANCE,
    TRITON_TOLERANCE,
    PairErrors,
    accumulation,
    assert_close,
    evaluate,
    needs_triton,
    output_rounding,
    peak_bytes,
)
from tests.test_total_correlation import ROUNDINGS as TOTAL_CORRELATION_ROUNDINGS
from tests.test_total_correlation import assert_close as assert_total_correlation_close

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
PROFILE = settings.get_profile("repeatable")

DTYPES = [torch.float32] * 5 + [torch.float64] * 3 + [torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "columns of a wider one", "every other row", "flipped", "inside another"]
TWISTS = ["none", "none", "duplicates", "constant column", "outlier", "denormal", "clusters", "near duplicates", "all equal"]
# The RBF kernel three times as often as the others.
OTHER_KERNELS = [kernel for name, kernel in radial.KERNELS.items() if name not in ("rbf", "rational_quadratic")]
KERNELS = [RBF(), RBF(), RBF(), RationalQuadratic(0.5), RationalQuadratic(2.3), *OTHER_KERNELS, Polynomial(1)]

# Hypothesis draws otherwise whenever the source of the library changes. All of these can be run, and have been.
cases = given(seed=st.integers(0, 39), most_rows=st.integers(2, 9), most_features=st.integers(1, 6))


def each(check):
    """`check(generator of numbers, most rows, most features)` on every case of an example; a failure names its case."""

    @pytest.mark.slow
    @cases
    @PROFILE
    def test(seed, most_rows, most_features):
        for n in range(25):
            check(random.Random(f"{seed} {n}"), most_rows, most_features)

    test.__name__ = test.__qualname__ = check.__name__
    test.__doc__ = check.__doc__
    return test


@dataclass(frozen=True)
class Sample:
    """How the rows of a sample are made and lie in memory."""

    rows: int
    features: int
    seed: int
    twist: str
    offset: float
    dtype: torch.dtype

    def values(self) -> Tensor:
        """Multiples of 2⁻⁸ where nothing else is asked for: they can be moved and turned without rounding."""
        generator = torch.Generator().manual_seed(self.seed)
        grid = 4 if self.dtype in (torch.float16, torch.bfloat16) else 256
        z = (torch.randn(self.rows, self.features, generator=generator, dtype=torch.float64) * grid).round() / grid
        pick = random.Random(self.seed)
        if self.twist == "duplicates":
            z = z[[pick.randrange(self.rows) for _ in range(self.rows)]]
        elif self.twist == "all equal":
            z = z[:1].expand_as(z).clone()
        elif self.twist == "constant column":
            z[:, pick.randrange(self.features)] = pick.choice([0.0, 1.0, 300.0])
        elif self.twist == "outlier":
            largest = {torch.float16: 3.0, torch.bfloat16: 12.0, torch.float32: 15.0, torch.float64: 30.0}[self.dtype]
            z[pick.randrange(self.rows)] = 10 ** pick.uniform(1, largest)
        elif self.twist == "denormal":
            z *= torch.finfo(self.dtype).tiny * 2**-4
        elif self.twist == "clusters":
            z += 100 * torch.randn(self.rows, 1, generator=generator, dtype=torch.float64).sign()
        elif self.twist == "near duplicates":
            near = z[:1] * (1 + 2 * torch.finfo(self.dtype).eps * torch.randn(z.shape, generator=generator, dtype=torch.float64))
            z = torch.where(torch.rand(self.rows, 1, generator=generator) < 0.6, near, z)
        return (z + self.offset).to(self.dtype)

    @property
    def exact(self) -> bool:
        """Whether sums and differences of values are."""
        return self.twist in ("none", "duplicates", "all equal", "constant column", "clusters") and self.offset <= 1000


def draw_sample(pick: random.Random, rows: int, features: int, dtype: torch.dtype, twist: str, offset: float) -> Sample:
    return Sample(pick.randint(1, rows), features, pick.randrange(2**31), twist, offset, dtype)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of t in another place and order of memory."""
    rows, features = t.shape
    if layout == "transposed":
        t = t.T.contiguous().T
    elif layout == "columns of a wider one":
        t = torch.stack([t, -t], 2).flatten(1)[:, ::2]
    elif layout == "every other row":
        t = torch.stack([t, t + 1], 1).flatten(0, 1)[::2]
    elif layout == "flipped":
        t = t.flip(0).flip(0) if t.dtype == torch.bfloat16 else torch.from_numpy(t.flip(0).numpy()[::-1].copy())
    elif layout == "inside another":
        wide = torch.full((rows + 2, features + 3), math.nan, dtype=t.dtype)
        wide[1:-1, 2:-1] = t
        t = wide[1:-1, 2:-1]
    return t.detach().to(DEVICE).requires_grad_()


def dense(t: Tensor) -> Tensor:
    return t.detach().to(DEVICE, torch.float64).requires_grad_()


@contextlib.contextmanager
def small_tiles(small: bool):
    """Tiles of a few rows, so that a few rows are many tiles."""
    values = [
        (cpu_tiles, "TILE", 3),
        (cpu_small, "_PAIRS", 0),
        (cpu_small, "_FORM_PAIRS", 0),
        (cpu_quadratic_form, "_OWN_TILE", 0.7),
        (cpu_quadratic_form, "_LARGEST_TILE", 1.4),
        (cpu_reparameterize_kl, "BLOCK", 7),
        (cpu_total_correlation, "BLOCK", 12),
        (cpu_total_correlation, "MOST_COLUMNS", 3),
        (cpu_total_correlation, "FEWEST_COLUMNS", 2),
    ]
    before = [getattr(module, name) for module, name, _ in values]
    try:
        for module, name, value in values if small else []:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(values, before, strict=True):
            setattr(module, name, value)


def draw_bandwidths(pick: random.Random, kernel: Kernel, points: list[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """h_b, and a_b or None. A power of a product past the largest number is no problem of the polynomial's: its h goes with the data."""
    size = max(t.double().norm(dim=1).max().item() for t in points)
    if not kernel.radial:
        # Up to 1e30, with what follows.
        size = min(max(size, 1e-3) * 10 ** pick.uniform(-1, 2), 1e29)
    elif pick.random() < 0.6:
        spread = torch.cat(points).double().std(0, correction=0).norm().item()
        size = min(max(spread * 10 ** pick.uniform(-1.5, 1.5), 1e-6), 1e6)
    else:
        size = 10 ** pick.uniform(-6, 6)
    shape = pick.choice(["one", "one", "ladder", "squares", "any"])
    h = {
        "one": [size],
        "ladder": [size * 2 ** (n / 2) for n in range(pick.randint(2, 5))],
        "squares": [size, 2 * size],
        "any": [size * 10 ** pick.uniform(-2, 2) for _ in range(3)] if kernel.radial else [size, 1.7 * size],
    }[shape]
    weights = None
    if pick.random() < 0.3:
        weights = tuple(pick.choice([0.25, 1.0, 3.0, -0.5]) for _ in h)
    return tuple(h), weights


def draw_weights(pick: random.Random, rows: int, dtype: torch.dtype, signed: bool) -> Tensor:
    """Multiples of 1/256 that sum to one."""
    cuts = sorted(pick.randint(0, 256) for _ in range(rows - 1))
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, 256], strict=True)]
    if signed and rows > 1:
        parts[0], parts[-1] = parts[0] - 32, parts[-1] + 32
    return torch.tensor(parts, dtype=torch.float64).div(256).to(dtype)


@dataclass(frozen=True)
class Problem:
    """MMD² of two samples, or K(x, y)·v, as tensors of one dtype without layout."""

    x: Tensor
    y: Tensor | None
    bandwidth: tuple[float, ...]
    bandwidth_weights: tuple[float, ...] | None
    kernel: Kernel
    estimator: str
    x_weights: Tensor | None
    y_weights: Tensor | None

    def options(self, dtype: torch.dtype | None = None) -> dict[str, object]:
        weights = {"x_weights": self.x_weights}
        if self.y is not None:
            weights |= {"y_weights": self.y_weights, "kernel": self.kernel}
        weights = {k: w.to(DEVICE, dtype or w.dtype) if isinstance(w, Tensor) else w for k, w in weights.items()}
        return {"bandwidth": self.bandwidth, "bandwidth_weights": self.bandwidth_weights, "estimator": self.estimator, **weights}

    @property
    def points(self) -> list[Tensor]:
        return [self.x] if self.y is None else [self.x, self.y]


def draw_points(pick: random.Random, rows: int, features: int, count: int, least: int = 1) -> tuple[list[Tensor], bool]:
    """Samples, and whether they may be moved and turned exactly."""
    dtype, twist = pick.choice(DTYPES), pick.choice(TWISTS)
    features = pick.randint(1, features)
    offset = pick.choice([0.0, 0.0, 0.0, 1.0, 100.0, 1e4])
    if dtype in (torch.bfloat16, torch.float16) and offset > 1:
        offset = 64.0 if dtype == torch.float16 else 8.0
    if twist in ("denormal", "near duplicates"):
        offset = 0.0
    samples = [draw_sample(pick, rows, features, dtype, twist, offset) for _ in range(count)]
    samples = [replace(sample, rows=max(sample.rows, least)) for sample in samples]
    points = [sample.values() for sample in samples]
    if count > 1 and twist in ("duplicates", "all equal", "near duplicates"):
        # Rows of the one among those of the other.
        points[1][0] = points[0][0]
    return points, all(sample.exact for sample in samples)


def draw_problem(pick: random.Random, rows: int, features: int, prior: bool) -> tuple[Problem, bool]:
    estimator = pick.choice(["biased", "unbiased"])
    kernel = RBF() if prior else pick.choice(KERNELS)
    points, exact = draw_points(pick, rows, features, 1 if prior else 2, 1 if estimator == "biased" else 2)
    dtype = points[0].dtype
    bandwidth, a = draw_bandwidths(pick, kernel, points)
    weights: list[Tensor | None] = [None, None]
    if pick.random() < 0.4:
        signed = pick.random() < 0.2
        weights = [draw_weights(pick, len(t), accumulation(dtype), signed) for t in points] + [None]
        if estimator == "unbiased" and any(w is not None and (w.square().sum() > 0.9 or (w != 0).sum() < 2) for w in weights):
            weights = [None, None]
    return Problem(points[0], None if prior else points[1], bandwidth, a, kernel, estimator, *weights[:2]), exact


# What the gradients of a changed problem are to be taken back to.
def same(*gradients: Tensor) -> tuple[Tensor, ...]:
    return gradients


def change(problem: Problem, exact: bool, pick: random.Random):
    """A problem of the same value, how to take its gradients back, and what was done."""
    x, y = problem.x, problem.y
    radial, prior = problem.kernel.radial, y is None
    half = x.dtype in (torch.float16, torch.bfloat16)
    names = ["nothing", "nothing", "rows in another order", "features in another order and sign"]
    if problem.estimator == "biased":
        # Where the weights of both are the same numbers: what rounds them may be more than what rounds the rest.
        names += ["every row twice"] + ["a weighted row in two"] * (problem.x_weights is not None or math.log2(len(x)).is_integer())
    if not prior:
        names += ["x and y swapped"]
        if exact and not half:
            names += ["all in other units"] + ["moved"] * radial + ["turned"] * (x.shape[1] >= 4)
    elif exact and not half and x.shape[1] >= 4:
        names += ["turned"]
    name = pick.choice(names)
    weights = problem.x_weights, problem.y_weights

    def with_points(function, back, rows=lambda w: w):
        """The problem with `function` of each sample and `rows` of its weights."""
        new = [None if w is None else rows(w) for w in weights]
        return replace(problem, x=function(x), y=None if y is None else function(y), x_weights=new[0], y_weights=new[1]), back, name

    if name == "rows in another order":
        orders = [torch.randperm(len(t), generator=torch.Generator().manual_seed(pick.randrange(2**31))) for t in problem.points]
        moved = [t[order] for t, order in zip(problem.points, orders, strict=True)] + [None]
        new = [None if w is None else w[order] for w, order in zip(weights, [*orders, orders[0]], strict=False)]
        changed = replace(problem, x=moved[0], y=moved[1], x_weights=new[0], y_weights=new[1])
        return changed, lambda *g: tuple(t[order.argsort()] for t, order in zip(g, orders, strict=True)), name
    if name == "features in another order and sign":
        order = list(range(x.shape[1]))
        pick.shuffle(order)
        signs = torch.tensor([pick.choice([-1, 1]) for _ in order])
        inverse = torch.tensor(order).argsort()
        return with_points(lambda t: t[:, order] * signs.to(t), lambda *g: tuple((t * signs.to(t))[:, inverse] for t in g))
    if name == "every row twice":
        halved = [None if w is None else (w / 2).repeat(2) for w in weights]
        changed = replace(problem, x=x.repeat(2, 1), y=None if y is None else y.repeat(2, 1), x_weights=halved[0], y_weights=halved[1])
        return changed, lambda *g: tuple(sum(t.chunk(2)) for t in g), name
    if name == "a weighted row in two":
        row = pick.randrange(len(x))
        p = x.new_full((len(x),), 1 / len(x), dtype=accumulation(x.dtype)) if problem.x_weights is None else problem.x_weights
        p = torch.cat([p, p[row : row + 1] / 2])
        p[row] /= 2

        def back(grad, *others):
            grad = grad.clone()
            grad[row] += grad[-1]
            return grad[:-1], *others

        return replace(problem, x=torch.cat([x, x[row : row + 1]]), x_weights=p), back, name
    if name == "x and y swapped":
        swapped = replace(problem, x=y, y=x, x_weights=problem.y_weights, y_weights=problem.x_weights)
        return swapped, lambda a, b: (b, a), name
    if name == "all in other units":
        unit = 2.0 ** pick.randint(-10, 10)
        changed = with_points(lambda t: t * unit, lambda *g: tuple(t * unit for t in g))[0]
        return replace(changed, bandwidth=tuple(h * unit for h in problem.bandwidth)), lambda *g: tuple(t * unit for t in g), name
    if name == "moved":
        step = torch.randint(-1000, 1000, x.shape[1:], generator=torch.Generator().manual_seed(pick.randrange(2**31)))
        return with_points(lambda t: t + step.to(t), same)
    if name == "turned":
        # Hadamard's matrix: the only rotation of a few features whose entries are powers of two.
        turn = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
        return with_points(
            lambda t: torch.cat([(t[:, :4].double() @ turn).to(t.dtype), t[:, 4:]], 1),
            lambda *g: tuple(torch.cat([t[:, :4] @ turn, t[:, 4:]], 1) for t in g),
        )
    return problem, same, name


def value_and_gradients(function, points: list[Tensor], **options):
    value = function(*points, **options)
    return value.detach(), torch.autograd.grad(value, points)


def assert_within(error: Tensor, allowed: Tensor, what: str, case: object) -> None:
    """Elementwise; a nan is no error that is allowed."""
    wrong = ~(error <= allowed)
    assert not wrong.any(), f"{what} off by {error[wrong][0].item():.3e} where {allowed[wrong][0].item():.3e} is rounding: {case}"


def check_mmd(pick: random.Random, rows: int, features: int, prior: bool, backend: str | None = None) -> None:
    problem, exact = draw_problem(pick, rows, features, prior)
    changed, back, name = change(problem, exact, pick)
    dtype = problem.x.dtype
    layouts = [pick.choice(LAYOUTS) for _ in changed.points]
    function = "mmd_to_normal" if prior else "mmd"
    small = pick.random() < 0.5
    case = f"{function}, {name}, {layouts}, small tiles {small}", problem

    with small_tiles(small):
        points = [lay_out(t, layout) for t, layout in zip(changed.points, layouts, strict=True)]
        value, gradients = value_and_gradients(getattr(fastvae, function), points, backend=backend, **changed.options())
        alone = value
        if pick.random() < 0.2:
            alone = getattr(fastvae, function)(*(t.detach() for t in points), backend=backend, **changed.options())
    assert value.dtype == accumulation(dtype)
    assert [g.dtype for g in gradients] == [dtype] * len(points)
    exact_points = [dense(t) for t in problem.points]
    expected, expected_gradients = value_and_gradients(getattr(reference, function), exact_points, **problem.options(torch.float64))
    value_limit, gradient_limits = mmd_limits(problem, changed.points if name == "a weighted row in two" else None)
    allowed = value_limit + output_rounding(accumulation(dtype), expected)
    assert_within((value - expected).abs(), allowed, "value", case)
    assert_within((alone - expected).abs(), allowed, "value without gradient", case)
    if problem.estimator == "biased" and all(a > 0 for a in problem.bandwidth_weights or [1]):
        assert_within(-value, allowed, "an MMD² below zero", case)
    gradients = back(*(g.double() for g in gradients))
    for g, e, limit in zip(gradients, expected_gradients, gradient_limits, strict=True):
        # What was rounded after a turn is a mixture of features.
        size = e.norm(dim=1, keepdim=True) if name == "turned" else e
        assert_within((g - e).abs(), limit + output_rounding(dtype, size), "gradient", case)


def mmd_limits(problem: Problem, repeated: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """What rounding may do to the value, and to each row's gradient (N, 1)."""
    prior = problem.y is None
    errors = PairErrors.of(
        problem.kernel, problem.bandwidth, problem.bandwidth_weights, problem.points, shifted=True, prior=prior, repeated=repeated
    )
    weights = [problem.x_weights, problem.y_weights][: len(problem.points)]
    weights = [
        torch.full((len(t),), 1 / len(t), dtype=torch.float64) if w is None else w.double().abs()
        for w, t in zip(weights, problem.points, strict=True)
    ]
    if problem.estimator == "unbiased":
        scale = max(1 / (1 - float(w.square().sum())) for w in weights)
    else:
        scale = 1.0
    w = torch.cat(weights)
    value = torch.tensor(errors.value * scale * (float(w.sum()) + prior) ** 2, device=DEVICE)
    rows = 2 * scale * w * (errors.gradient @ w + errors.gradient.max() * prior)
    return value, [t[:, None].to(DEVICE) for t in rows.split([len(t) for t in problem.points])]


@each
def test_mmd(pick, rows, features):
    """MMD² of two samples and its gradients are those of float64, and stay when the problem changes only its form."""
    check_mmd(pick, rows, features, prior=False)


@each
def test_mmd_to_normal(pick, rows, features):
    """The same against the standard normal."""
    check_mmd(pick, rows, features, prior=True)


def check_kernel_matmul(pick: random.Random, rows: int, features: int, backend: str | None = None) -> None:
    points, exact = draw_points(pick, rows, features, 2)
    dtype, kernel = points[0].dtype, pick.choice(KERNELS)
    bandwidth, a = draw_bandwidths(pick, kernel, points)
    generator = torch.Generator().manual_seed(pick.randrange(2**31))
    columns = pick.randint(1, 3)
    v, g = (torch.randn(len(t), columns, generator=generator) for t in reversed(points))
    v, g = (v * 10.0 ** pick.choice([0, 0, -3, 3])).to(dtype).double(), g.to(dtype).double()
    options = {"bandwidth": bandwidth, "bandwidth_weights": a, "kernel": kernel}
    problem = Problem(*points, bandwidth, a, kernel, "unbiased", None, None)
    changed, back, name = change(problem, exact, pick)
    left, right, upstream = v, g, g
    if name == "x and y swapped":
        left, upstream = g, v
    order = None
    if name == "rows in another order":
        # The same order for a row and what belongs to it: y stays as it is.
        order = torch.randperm(len(points[0]), generator=generator)
        changed = replace(problem, x=points[0][order])
        upstream = g[order]
    small = pick.random() < 0.5
    layouts = [pick.choice(LAYOUTS) for _ in range(3)]
    case = f"kernel_matmul, {name}, {layouts}, small tiles {small}, seed of v {generator.initial_seed()}, {columns} columns", problem

    exact_inputs = [dense(t) for t in (*points, v)]
    exact_out = reference.kernel_matmul(*exact_inputs, **options)
    exact_gradients = torch.autograd.grad((exact_out * right.to(DEVICE)).sum(), exact_inputs)
    exact_out = exact_out.detach()
    with small_tiles(small):
        inputs = [lay_out(t, layout) for t, layout in zip((changed.x, changed.y, left.to(dtype)), layouts, strict=True)]
        out = fastvae.kernel_matmul(*inputs, backend=backend, **{**options, "bandwidth": changed.bandwidth})
        gradients = torch.autograd.grad((out * upstream.to(out)).sum(), inputs)
    assert out.dtype == accumulation(dtype)
    errors = PairErrors.of(kernel, bandwidth, a, points, shifted=False)
    between = errors.gradient[: len(points[0]), len(points[0]) :] * (g.abs() @ v.abs().T)
    limits = [errors.value * v.abs().sum(0, keepdim=True), between.sum(1, keepdim=True), between.sum(0)[:, None]]
    limits += [errors.value * g.abs().sum(0, keepdim=True)]
    actual = [out.detach(), *gradients]
    if name == "x and y swapped":
        actual = [gradients[2], gradients[1], gradients[0], out.detach()]
    elif order is not None:
        actual[0], actual[1] = actual[0][order.argsort()], actual[1][order.argsort()]
    else:
        actual[1], actual[2] = back(actual[1].double(), actual[2].double())
    for what, result, e, limit in zip(("K·v", "gradient to x", "to y", "to v"), actual, (exact_out, *exact_gradients), limits, strict=True):
        kind = accumulation(dtype) if what == "K·v" and name != "x and y swapped" else dtype
        size = e.norm(dim=1, keepdim=True) if name == "turned" else e
        least = errors.least * max(map(len, points))
        assert_within((result.double() - e).abs(), limit.to(DEVICE) + least + output_rounding(kind, size), what, case)


@each
def test_kernel_matmul(pick, rows, features):
    """K·v and its gradients, also with the roles of its two samples exchanged."""
    check_kernel_matmul(pick, rows, features)


def dense_group_mmd(z: Tensor, p: Tensor, problem: Problem) -> Tensor:
    """(G, G) from normalised weights p (N, G), without the diagonal, which is zero."""
    k = kernel_matrix(z, z, *bandwidths(z, problem.bandwidth, problem.bandwidth_weights), problem.kernel)
    sums = p.T @ k @ p
    own = sums.diagonal()
    if problem.estimator == "unbiased":
        own = (own - (p.square() * k.diagonal()[:, None]).sum(0)) / (1 - p.square().sum(0))
    return (own[:, None] + own - 2 * sums) * (1 - torch.eye(p.shape[1], dtype=z.dtype, device=z.device))


def check_group_mmd(pick: random.Random, rows: int, features: int, backend: str | None = None) -> None:
    groups, soft = pick.randint(1, 3), pick.random() < 0.3
    (z,), exact = draw_points(pick, rows + 4, features, 1, 2 * groups)
    dtype, kernel = z.dtype, pick.choice(KERNELS)
    bandwidth, a = draw_bandwidths(pick, kernel, [z])
    problem = Problem(z, z, bandwidth, a, kernel, pick.choice(["biased", "unbiased"]), None, None)
    changed, back, name = change(replace(problem, estimator="unbiased"), exact, pick)
    labels = [n % groups for n in range(len(z))]
    pick.shuffle(labels)
    labels = torch.tensor(labels)
    if soft:
        weights = torch.tensor([[pick.choice([0.0, 0.25, 1.0, 3.0]) for _ in range(groups)] for _ in labels], dtype=torch.float64)
        weights[:2] = 1.0
    else:
        weights = torch.nn.functional.one_hot(labels, groups).double()
    p = weights / weights.sum(0)
    generator = torch.Generator().manual_seed(pick.randrange(2**31))
    upstream = torch.ones(groups, groups, dtype=torch.float64)
    if pick.random() < 0.5:
        upstream = torch.randn(groups, groups, generator=generator, dtype=torch.float64).float().double()
    members = weights.to(accumulation(dtype)) if soft else labels
    inverse = slice(None)
    if name == "rows in another order":
        order = torch.randperm(len(z), generator=generator)
        changed, members, inverse = replace(problem, x=z[order]), members[order], order.argsort()
    small, layout = pick.random() < 0.5, pick.choice(LAYOUTS)
    case = f"group_mmd, {name}, {layout}, small tiles {small}, soft {soft}", upstream, weights, problem

    exact_z = dense(z)
    exact_values = dense_group_mmd(exact_z, p.to(DEVICE), problem)
    (exact_gradient,) = torch.autograd.grad((exact_values * upstream.to(DEVICE)).sum(), exact_z)
    exact_values = exact_values.detach()
    with small_tiles(small):
        x = lay_out(changed.x, layout)
        result = fastvae.group_mmd(
            x, members.to(DEVICE), num_groups=groups, bandwidth=changed.bandwidth, bandwidth_weights=a, kernel=kernel,
            estimator=problem.estimator, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad((result.values * upstream.to(result.values)).sum(), x)
    assert result.valid.all()
    values = result.values.detach()
    errors = PairErrors.of(kernel, bandwidth, a, [z], shifted=True, rounded_weights=True)
    scale = 1 / (1 - p.square().sum(0)) if problem.estimator == "unbiased" else torch.ones(groups, dtype=torch.float64)
    allowed = 4 * errors.value * scale.max() + output_rounding(accumulation(dtype), exact_values)
    assert_within((values - exact_values).abs(), allowed, "value", case)
    gradient = gradient.double()
    if isinstance(inverse, Tensor):
        gradient = gradient[inverse]
    elif name != "x and y swapped":
        gradient = back(gradient, gradient)[0]
    # |v_i·B·v_jᵀ| of formula (2) of the reference.
    b = 2 * torch.diag(scale * (upstream.abs().sum(0) + upstream.abs().sum(1))) + 2 * (upstream.abs() + upstream.abs().T)
    limit = ((p @ b @ p.T) * errors.gradient).sum(1, keepdim=True).to(DEVICE) + errors.least
    size = exact_gradient.norm(dim=1, keepdim=True) if name == "turned" else exact_gradient
    if not kernel.radial:
        # That of the rows with themselves is a summand of its own, rounded to the dtype before they meet.
        size = size.abs() + limit / torch.finfo(accumulation(dtype)).eps
    allowed = limit + output_rounding(dtype, size)
    # Two parts of a polynomial's gradient that are infinite in float16 have no sum.
    assert_within((gradient - exact_gradient).abs().where(allowed.isfinite(), 0), allowed, "gradient", case)


@each
def test_group_mmd(pick, rows, features):
    """The MMD² of all pairs of groups, of labels and of weights, and its gradient for a uniform and for any upstream."""
    check_group_mmd(pick, rows, features)


def check_reparameterize_kl(pick: random.Random, rows: int, features: int, backend: str | None = None) -> None:
    dtype = pick.choice(DTYPES)
    n, d = pick.randint(1, rows), pick.randint(1, features)
    generator = torch.Generator().manual_seed(pick.randrange(2**31))
    mu, logvar, eps, dz = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(4))
    mu = mu * 10.0 ** pick.choice([-40 if dtype == torch.float32 else -3, -3, 0, 0, 2]) + pick.choice([0, 0, 0, 100])
    logvar = logvar * pick.choice([0.01, 1, 1, 3]) + pick.choice([0, 0, -2, -18, 5])
    if pick.random() < 0.1:
        logvar[pick.randrange(n), pick.randrange(d)] = pick.choice([-80.0, 80.0] if dtype not in (torch.float16,) else [-20.0, 10.0])
    per_dimension, small = pick.random() < 0.3, pick.random() < 0.5
    mu, logvar, eps, dz = (t.to(dtype).double() for t in (mu, logvar, eps, dz))
    dkl = torch.randn((n, d) if per_dimension else (n,), generator=generator).double()
    name = pick.choice(["nothing", "nothing", "rows in another order", "features in another order", "noise of the other sign"])
    rows_order, columns_order = torch.arange(n), torch.arange(d)
    if name == "rows in another order":
        rows_order = torch.randperm(n, generator=generator)
    elif name == "features in another order":
        columns_order = torch.randperm(d, generator=generator)
    layouts = [pick.choice(LAYOUTS) for _ in range(3)]
    case = f"reparameterize_kl, {name}, {layouts}, small blocks {small}, {dtype}, per dimension {per_dimension}", mu, logvar, eps

    exact_inputs = [dense(t) for t in (mu, logvar)]
    expected = reference.reparameterize_kl(*exact_inputs, eps=eps.to(DEVICE), kl_dims=() if per_dimension else -1)
    expected_gradients = torch.autograd.grad(expected, exact_inputs, (dz.to(DEVICE), dkl.to(DEVICE)))
    expected = [t.detach() for t in expected]
    flip = -1 if name == "noise of the other sign" else 1

    def arrange(t):
        return t[rows_order][:, columns_order] if t.ndim == 2 else t[rows_order]

    with small_tiles(small):
        m, lv, e = (lay_out(arrange(t).to(dtype), layout) for t, layout in zip((mu, logvar, flip * eps), layouts, strict=True))
        z, kl = fastvae.reparameterize_kl(m, lv, eps=e.detach(), kl_dims=() if per_dimension else -1, backend=backend)
        gradients = torch.autograd.grad((z, kl), (m, lv), (arrange(dz).to(z), arrange(dkl).to(kl)))
    assert (z.dtype, kl.dtype) == (dtype, accumulation(dtype))
    size = 8 * torch.finfo(accumulation(dtype)).eps
    noise = (0.5 * logvar).exp() * eps.abs()
    column = dkl.abs() if per_dimension else dkl.abs()[:, None]
    twice_kl = mu.square() + (1 + logvar.abs()) * logvar.exp() + 1 + logvar.abs()
    limits = [
        size * (mu.abs() + (1 + logvar.abs()) * noise),
        size * (twice_kl if per_dimension else d * twice_kl.sum(1)),
        size * (dz.abs() + column * mu.abs()),
        size * ((1 + logvar.abs()) * noise * dz.abs() + column * (1 + (1 + logvar.abs()) * logvar.exp())),
    ]
    kinds = [dtype, accumulation(dtype), dtype, dtype]
    results = [t.detach()[rows_order.argsort()] for t in (z, kl, *gradients)]
    results = [t[:, columns_order.argsort()] if t.ndim == 2 else t for t in results]
    if flip < 0:
        # z(−ε) = 2μ − z(ε); the gradient of KL is as before, and that of z to logvar has the other sign.
        half = column if per_dimension else dkl[:, None]
        results[0] = 2 * mu.to(DEVICE) - results[0].double()
        results[3] = -(results[3].double() - (half * (logvar.exp() - 1)).to(DEVICE)) if not per_dimension else None
    for what, result, e, limit, kind in zip(
        ("z", "KL", "gradient to mu", "to logvar"), results, (*expected, *expected_gradients), limits, kinds, strict=True
    ):
        if result is None:
            continue
        bound = limit.to(DEVICE) + output_rounding(kind, limit.to(DEVICE) / size + e.abs() if flip < 0 else e)
        assert_within((result.double() - e).abs(), bound, what, case)
    assert_within(
        -kl.double(), (limits[1].to(DEVICE))[rows_order] if not per_dimension else arrange(limits[1]).to(DEVICE), "KL below zero", case
    )


@each
def test_reparameterize_kl(pick, rows, features):
    """z, KL and their gradients; z is symmetric in ε, and KL never negative."""
    check_reparameterize_kl(pick, rows, features)


def check_total_correlation(pick: random.Random, rows: int, features: int, backend: str | None = None) -> None:
    dtype, estimator = pick.choice(DTYPES), pick.choice(["minibatch_weighted", "minibatch_stratified"])
    n, d = pick.randint(2, rows), pick.randint(1, features)
    generator = torch.Generator().manual_seed(pick.randrange(2**31))
    mu, logvar, eps = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(3))
    mu, logvar = mu * 10.0 ** pick.choice([-3, 0, 0, 0, 2]), logvar * pick.choice([0.1, 1, 2]) + pick.choice([-12, -2, -2, 0, 3])
    z = mu + (0.5 * logvar).exp() * eps
    twist = pick.choice(["none", "none", "duplicates", "one far", "constant column"])
    if twist == "duplicates":
        z[1], mu[1], logvar[1] = z[0], mu[0], logvar[0]
    elif twist == "one far":
        # In units of σ: float32 holds no density whose logarithm is past 10⁵.
        z[pick.randrange(n)] += logvar.min().mul(0.5).exp() * 10 ** pick.uniform(0.5, 1.5)
    elif twist == "constant column":
        z[:, 0], mu[:, 0], logvar[:, 0] = 1.0, 1.0, -1.0
    inputs = [t.to(dtype) for t in (z, mu, logvar)]
    name = pick.choice(["nothing", "nothing", "features in another order and sign", "rows in another order"])
    rows_order, columns_order, signs = torch.arange(n), torch.arange(d), torch.ones(d)
    if name == "features in another order and sign":
        columns_order = torch.randperm(d, generator=generator)
        signs = torch.tensor([pick.choice([-1.0, 1.0]) for _ in range(d)])
    elif name == "rows in another order" and estimator == "minibatch_weighted":
        rows_order = torch.randperm(n, generator=generator)
    elif name == "rows in another order":
        # Stratified weights tell a row from the next: only the whole may turn.
        rows_order = torch.arange(n).roll(pick.randrange(n))
    dataset_size, small = n + pick.choice([0, 1, 1000, 10**9]), pick.random() < 0.5
    options = {"dataset_size": dataset_size, "estimator": estimator}
    layouts = [pick.choice(LAYOUTS) for _ in range(3)]
    case = f"total_correlation, {name}, {twist}, {layouts}, small tiles {small}, {dtype}, {options}", inputs

    exact = total_correlation_terms(reference.total_correlation, [dense(t) for t in inputs], options)
    factors = [signs, signs, torch.ones(d)]
    with small_tiles(small):
        changed = [(t * f.to(t))[rows_order][:, columns_order] for t, f in zip(inputs, factors, strict=True)]
        changed = [lay_out(t, layout) for t, layout in zip(changed, layouts, strict=True)]
        actual = total_correlation_terms(fastvae.total_correlation, changed, {**options, "backend": backend})
    back = [t[rows_order.argsort()][:, columns_order.argsort()] * f.to(t) for t, f in zip(actual[1], factors, strict=True)]
    # A weight of a pair is as good as the exponent of its joint density.
    z, mu, logvar = (t.double() for t in inputs)
    exponents = (z[:, None] - mu).square() * (-logvar).exp()
    dim = d + exponents.sum(2).max().item()
    try:
        assert_total_correlation_close((actual[0], []), (exact[0], []), dim, dtype)
    except AssertionError as error:
        raise AssertionError(f"{error}: {case}") from None
    # Gradients are sums of parts, of each density and of the prior, that may cancel; float16 and bfloat16 round each of them.
    parts = ((z - mu) * (-logvar).exp()).norm() + exponents.diagonal().norm() + z.norm() + n**0.5
    eps = TOTAL_CORRELATION_ROUNDINGS * torch.finfo(accumulation(dtype)).eps
    relative = eps * (sum(term.abs().item() for term in exact[0]) + dim)
    if dtype != accumulation(dtype):
        relative += 4 * torch.finfo(dtype).eps
    for result, e in zip(back, exact[1], strict=True):
        error, allowed = (result.double() - e).norm(), relative * (e.norm() + 5 * parts.to(e) / n)
        assert_within(error, allowed + output_rounding(dtype, e).norm(), "gradient", case)


def total_correlation_terms(function, inputs, options):
    terms = function(*inputs, **options)
    gradients = torch.autograd.grad(sum(weight * term for weight, term in zip((1.0, 3.0, -0.7), terms, strict=True)), inputs)
    return [t.detach() for t in terms], list(gradients)


@each
def test_total_correlation(pick, rows, features):
    """The terms of β-TC-VAE and their gradients, with rows and features in another order."""
    check_total_correlation(pick, rows, features)


def test_total_correlation_of_a_sample_that_no_posterior_explains():
    generator = torch.Generator().manual_seed(0)
    mu, logvar, eps = (torch.randn(64, 2, generator=generator) for _ in range(3))
    logvar = 0.1 * logvar - 12
    z = mu + (0.5 * logvar).exp() * eps
    z[1] += 92
    _, exact = total_correlation_terms(reference.total_correlation, [dense(t) for t in (z, mu, logvar)], {"dataset_size": 65})
    inputs = [lay_out(t, "contiguous") for t in (z, mu, logvar)]
    _, actual = total_correlation_terms(fastvae.total_correlation, inputs, {"dataset_size": 65})
    for a, e in zip(actual, exact, strict=True):
        assert ((a - e).norm(dim=1) < 1e-4 * e.norm(dim=1)).all()


@pytest.mark.parametrize("kernel", DISTANCE_KERNELS)
def test_one_outlier_leaves_the_other_pairs_their_direction(kernel):
    """Products of float64 lose a distance of 1 beside one of 10⁹."""
    x, y = torch.randn(300, 3), torch.randn(90, 3)
    x[7] = 1e9
    actual = value_and_gradients(fastvae.mmd, [x.requires_grad_(), y.requires_grad_()], kernel=kernel, backend="cpu")
    exact = value_and_gradients(reference.mmd, [dense(x), dense(y)], kernel=kernel)
    torch.testing.assert_close(actual[0].double(), exact[0])
    for a, e in zip(actual[1], exact[1], strict=True):
        assert (a - e).norm() < 1e-6 * e.norm()


@pytest.mark.parametrize("bandwidth", [30.0, 1000.0])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("soft", [False, True])
def test_groups_under_a_wide_bandwidth_keep_their_digits(bandwidth, estimator, soft):
    """Weights of a thirtieth, rounded, do not sum to one: MMD² of a nearly constant kernel is a difference of such sums."""
    z, labels = torch.randn(90, 3), torch.arange(90) % 3
    groups = torch.nn.functional.one_hot(labels).float() if soft else labels
    values = fastvae.group_mmd(z, groups, bandwidth=bandwidth, estimator=estimator, backend="cpu").values
    a, b = (z[labels == n].double() for n in (0, 1))
    exact = reference.mmd(a, b, bandwidth=bandwidth, estimator=estimator).item()
    assert values[0, 1].item() == pytest.approx(exact, rel=1e-4, abs=1e-9 / bandwidth**2)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter]), "reference"])
def test_what_is_not_finite_gives_nan(backend):
    """Wherever it is and whichever kernel: value and gradient."""
    device = DEVICE if backend == "triton" else "cpu"
    for n in range(10 if backend == "triton" else 200):
        pick = random.Random(n)
        torch.manual_seed(n)
        x, y, v = (torch.randn(shape).to(device) for shape in ((pick.randint(2, 6), 3), (pick.randint(2, 6), 3), (6, 2)))
        v = v[: len(y)]
        value = pick.choice([math.nan, math.inf, -math.inf])
        kernel = pick.choice(KERNELS)
        h = 10 ** pick.uniform(-2, 2)
        options = {"backend": backend, "kernel": kernel, "bandwidth": h}
        where = pick.choice([x, y])
        where[pick.randrange(len(where)), pick.randrange(3)] = value
        x.requires_grad_(), y.requires_grad_(), v.requires_grad_()
        z = torch.cat([x, y]).detach().requires_grad_()
        labels = torch.arange(len(z), device=device) % 2
        outputs = [
            ("mmd", fastvae.mmd(x, y, **options), [x, y]),
            ("linear mmd", fastvae.mmd(z[: (len(z) + 1) // 2], z[len(z) // 2 :], estimator="linear", **options), [z]),
            ("kernel_matmul", fastvae.kernel_matmul(x, y, v, **options), [x, y, v]),
            ("group_mmd", fastvae.group_mmd(z, labels, **options).values[0, 1], [z]),
        ]
        if where is x:
            outputs.append(("mmd_to_normal", fastvae.mmd_to_normal(x, bandwidth=h, backend=backend), [x]))
        posterior = [where, torch.zeros_like(where), torch.zeros_like(where)]
        pick.shuffle(posterior)
        posterior = [t.detach().requires_grad_() for t in posterior]
        terms = fastvae.total_correlation(*posterior, dataset_size=9, backend=backend)
        outputs += [(f"total_correlation.{name}", term, posterior) for name, term in zip(terms._fields, terms, strict=True)]
        for name, output, inputs in outputs:
            case = f"{name}, {value}, {kernel}, {h}"
            # Of few pairs on a GPU a row of x is lost alone.
            lost = output.isnan()
            assert lost.any() if name == "kernel_matmul" else lost.all(), case
            gradients = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
            if backend != "reference":
                assert any(g is not None and g.isnan().any() for g in gradients), f"gradient of {case}"


@pytest.mark.usefixtures("interpreter_warnings")
@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(8))
def test_triton_agrees_with_the_cpu_and_the_reference(seed):
    """Problems without the extremes that the tables of products are not made for; on a GPU its own arithmetic, else the interpreter's."""
    pick = random.Random(seed)
    problem, _ = draw_problem(pick, 6, 4, prior=seed % 4 == 3)
    generator = torch.Generator().manual_seed(seed)
    dtype = pick.choice([torch.float32, torch.float64])
    points = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in problem.points]
    weights = [None if w is None else w.to(dtype) for w in (problem.x_weights, problem.y_weights)]
    problem = replace(problem, x=points[0], y=None if problem.y is None else points[1], x_weights=weights[0], y_weights=weights[1])
    problem = replace(problem, bandwidth=tuple(0.7 * 2**n for n in range(len(problem.bandwidth))))
    function = "mmd_to_normal" if problem.y is None else "mmd"
    exact = value_and_gradients(getattr(reference, function), [dense(t) for t in points], **problem.options(torch.float64))
    size = sum(abs(a) for a in problem.bandwidth_weights or [1.0] * len(problem.bandwidth))
    for backend in ("triton", *(["cpu"] if DEVICE == "cpu" else [])):
        inputs = [lay_out(t, pick.choice(LAYOUTS)) for t in points]
        value, gradients = value_and_gradients(
            getattr(fastvae, function), inputs, backend=backend, precision="highest", **problem.options()
        )
        tolerance = TOLERANCE[dtype] if backend == "cpu" or dtype == torch.float64 else TRITON_TOLERANCE["highest"]
        scale = max(1.0, exact[0].abs().item()) * (1 if problem.estimator == "biased" else 10)
        assert_close((value, *gradients), (exact[0], *exact[1]), tolerance, 1, size * scale)


def all_operations(n: int, d: int = 4, seed: int = 0, backend: str | None = None):
    """(name, function of leaves to a scalar, leaves) of every operation."""
    generator = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(n, d, generator=generator) for _ in range(3))
    v = torch.randn(n, 2, generator=generator)
    labels = torch.arange(n) % 4
    x, y, z, v, labels = (t.to(DEVICE) for t in (x, y, z, v, labels))

    def kl(mu, logvar):
        sample, divergence = fastvae.reparameterize_kl(mu, logvar, eps=z, backend=backend)
        return sample.square().sum() + divergence.sum()

    two = {"bandwidth": (1.0, 3.0), "backend": backend}
    return [
        ("mmd", lambda x, y: fastvae.mmd(x, y, **two), (x, y)),
        ("mmd_to_normal", lambda x: fastvae.mmd_to_normal(x, **two), (x,)),
        ("kernel_matmul", lambda x, y, v: fastvae.kernel_matmul(x, y, v, **two).square().sum(), (x, y, v)),
        ("group_mmd", lambda x: fastvae.group_mmd(x, labels, num_groups=4, **two).mean(), (x,)),
        ("reparameterize_kl", kl, (x, y)),
        (
            "total_correlation",
            lambda *t: fastvae.total_correlation(*t, dataset_size=2 * n, backend=backend).total_correlation,
            (x, y, z),
        ),
    ]


def bits(n: int, backend: str | None = None) -> str:
    """Of the values and gradients of all operations."""
    digest = hashlib.sha256()
    for _, function, inputs in all_operations(n, backend=backend):
        leaves = [t.clone().requires_grad_() for t in inputs]
        value = function(*leaves)
        for result in (value, *torch.autograd.grad(value, leaves)):
            digest.update(result.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def every_bit() -> list[str]:
    """With one thread and with two: products may then add in another order."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(bits(600))
    torch.set_num_threads(before)
    if triton_interpreter():
        from benchmarks.interpreter import emulate_tf32

        emulate_tf32()
        found.append(bits(40, "triton"))
    return found


@pytest.mark.slow
def test_same_input_same_bits_in_every_process():
    """Also of Triton's interpreter, which is there without the patch of these tests."""
    command = [sys.executable, "-c", "from tests.test_properties import every_bit; print(every_bit())"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(every_bit())


@pytest.mark.usefixtures("deterministic_algorithms")
def test_deterministic_algorithms_hold_for_every_operation():
    assert bits(40) == bits(40)


@pytest.mark.parametrize("name", [name for name, *_ in all_operations(4)])
def test_default_device(name):
    """Numbers and indices lie where the data are, or on the CPU, and not on the device that PyTorch makes new tensors on."""
    ((_, function, inputs),) = (operation for operation in all_operations(1300) if operation[0] == name)
    with torch.device("meta"):
        actual = evaluate(function, *inputs)
    torch.testing.assert_close(actual, evaluate(function, *inputs), rtol=0, atol=0)


def test_default_device_of_a_test_and_of_pairs():
    x, y = (torch.randn(40, 3, device=DEVICE) for _ in range(2))
    labels = torch.arange(40, device=DEVICE) % 3

    def results():
        p_values = [
            fastvae.two_sample_test(x, y, permutations=20, seed=0, **o).p_value
            for o in ({}, {"bandwidth": 1.0, "method": "wild_bootstrap"})
        ]
        return *p_values, fastvae.group_mmd(x, labels, num_groups=3, pairs=[(0, 1)]).values

    with torch.device("meta"):
        actual = results()
    torch.testing.assert_close(actual, results(), rtol=0, atol=0)


# Peak of the bytes that value and gradients of float32 samples take beyond the inputs, their results among them: for each row more, as a
# multiple of its 4·D bytes. Measured with D = 16, and 1.25 times that.
PEAK = {
    "mmd": 8.5,
    "mmd_to_normal": 8.0,
    "kernel_matmul": 9.0,
    "group_mmd": 14.0,
    "reparameterize_kl": 5.0,
    "total_correlation": 18.0,
}


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the allocations of the CPU path")
@pytest.mark.parametrize("name", PEAK)
def test_memory_grows_with_n_as_promised(name):
    """With N and not with its square: between two sizes by no more than the constant of `PEAK` a row."""
    d, small, large = 16, 1024, 4096
    peaks = []
    for n in (small, large):
        ((_, function, inputs),) = (operation for operation in all_operations(n, d, backend="cpu") if operation[0] == name)
        peaks.append(peak_bytes(function, inputs))
    assert peaks[1] - peaks[0] <= PEAK[name] * 4 * d * (large - small), f"{(peaks[1] - peaks[0]) / (4 * d * (large - small)):.1f}"
