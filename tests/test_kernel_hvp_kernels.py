"""The Triton kernels of Hessian-vector products against the dense Hessian in float64."""

import pytest
import torch
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.radial import RBF, Energy, Kernel, Laplace, Matern32, Matern52, Polynomial, RationalQuadratic, Riesz
from fastvae.reference.mmd import kernel_matrix
from tests.cases import DEVICE, needs_triton

pytestmark = [needs_triton, pytest.mark.interpreter, pytest.mark.usefixtures("interpreter_warnings")]

RADIAL = [
    RBF(),
    RationalQuadratic(1.0),
    RationalQuadratic(0.5),
    RationalQuadratic(2.3),
    RationalQuadratic(50.0),
    Laplace(),
    Matern32(),
    Matern52(),
    Energy(),
    Riesz(1.5),
    Riesz(0.7),
]
KERNELS = [*RADIAL, Polynomial(), Polynomial(1), Polynomial(2, coef0=0.5)]
BANDWIDTHS = {1: (1.7,), 5: (0.8, 1.6, 2.0, 3.2, 6.4)}
WEIGHTS = {1: (1.3,), 5: (0.5, 1.0, 2.0, -0.3, 0.7)}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
ALL = (True,) * 4


def problem(n: int, m: int | None, d: int, c: int, offset: float = 0.0) -> list[Tensor | None]:
    """x, y, u, v in float64; with m None u and v are the same, and there is no y."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(rows, d, dtype=torch.float64, generator=generator) * (3 / d) ** 0.5 + offset for rows in (n, m or 1))
    u, v = (torch.randn(rows, c, dtype=torch.float64, generator=generator) for rows in (n, m or n))
    x, y, u, v = (t.to(DEVICE) for t in (x, y, u, v))
    return [x, None, u, u] if m is None else [x, y, u, v]


def directions_of(inputs: list[Tensor | None], given: str) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    x, y, u, v = (
        None if t is None else torch.randn(t.shape, dtype=torch.float64, generator=generator).to(DEVICE) if name in given else None
        for name, t in zip("xyuv", inputs, strict=True)
    )
    return [x, y, u, v] if inputs[1] is not None else [x, None, u, u]


def dense(kernel: Kernel, bandwidths: int, inputs: list[Tensor | None], directions: list[Tensor | None]) -> list[Tensor | None]:
    """The Hessian of the dense sum times the directions; of a sample against itself as `kernel_hvp` defines it."""
    x, y, u, v = inputs
    h, a = (torch.tensor(t, dtype=torch.float64, device=DEVICE) for t in (BANDWIDTHS[bandwidths], WEIGHTS[bandwidths]))
    within = y is None

    def s(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        pairs = (u @ v.T) * kernel_matrix(x, y, h, a, kernel)
        return pairs.sum() - pairs.diagonal().sum() if within else pairs.sum()

    points = (x, x if within else y, u, v)
    changes = [directions[0] if within and n == 1 else t for n, t in enumerate(directions)]
    points = tuple(z.clone().requires_grad_() for z in points)
    gradients = torch.autograd.grad(s(*points), points, create_graph=True)
    along = sum(((g * t).sum() for g, t in zip(gradients, changes, strict=True) if t is not None), start=0.0 * points[0].sum())
    to_x, to_y, to_u, to_v = torch.autograd.grad(along, points, materialize_grads=True)
    return [to_x + to_y, None, to_u, to_v] if within else [to_x, to_y, to_u, to_v]


def evaluate(kernel, bandwidths, inputs, directions, dtype=torch.float32, precision="highest", wanted=ALL):
    from fastvae.kernels.kernel_hvp import kernel_hvp

    numbers = KernelNumbers.of(kernel, BANDWIDTHS[bandwidths], WEIGHTS[bandwidths], inputs[0].shape[1], False, inputs[0].device)
    x, y, u, v, *directions = (None if t is None else t.to(dtype) for t in (*inputs, *directions))
    wanted = [want and not (y is None and n == 1) for n, want in enumerate(wanted)]
    return kernel_hvp(numbers, x, y, u, v, directions, wanted, precision)


def errors(actual: list[Tensor | None], exact: list[Tensor | None]) -> list[float]:
    """The largest error of each result relative to its largest entry."""
    assert [a is None for a in actual] == [e is None for e in exact]
    pairs = [(a, e) for a, e in zip(actual, exact, strict=True) if a is not None]
    return [((a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for a, e in pairs]


def rounded(inputs, dtype):
    return [None if t is None else t.to(dtype).double() for t in inputs]


def check(kernel, bandwidths, inputs, directions, dtype=torch.float32, precision="highest", tolerance=None):
    inputs, directions = rounded(inputs, dtype), rounded(directions, dtype)
    actual = evaluate(kernel, bandwidths, inputs, directions, dtype, precision)
    found = errors(actual, dense(kernel, bandwidths, inputs, directions))
    assert max(found) < (tolerance or TOLERANCE[dtype]), found


# Every pair of two of these, for each kernel.
@pytest.mark.parametrize(
    ("bandwidths", "m", "dtype"), [(1, 50, torch.float32), (1, None, torch.float64), (5, 50, torch.float64), (5, None, torch.float32)]
)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_families(kernel, bandwidths, m, dtype):
    inputs = problem(70, m, 3, 3)
    check(kernel, bandwidths, inputs, directions_of(inputs, "xyuv"), dtype)


@pytest.mark.parametrize("given", ["x", "y", "u", "v", "xy", "uv", "xu", "yu", "xv"])
@pytest.mark.parametrize(("kernel", "c"), [(RBF(), 1), (RBF(), 3), (Polynomial(), 3)], ids=str)
def test_absent_directions(kernel, c, given):
    inputs = problem(40, 70, 5, c)
    check(kernel, 1, inputs, directions_of(inputs, given), torch.float64)


@pytest.mark.parametrize("given", ["x", "u"])
@pytest.mark.parametrize("c", [1, 3])
def test_absent_directions_of_one_sample(c, given):
    inputs = problem(70, None, 5, c)
    check(RBF(), 1, inputs, directions_of(inputs, given), torch.float64)


@pytest.mark.parametrize("only", range(4))
def test_one_result(only):
    wanted = [number == only for number in range(4)]
    inputs = problem(40, 30, 3, 3)
    directions = directions_of(inputs, "xyuv")
    actual, exact = evaluate(RBF(), 1, inputs, directions, torch.float64, wanted=wanted), dense(RBF(), 1, inputs, directions)
    assert max(errors(actual, [e if want else None for e, want in zip(exact, wanted, strict=True)])) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("d", "c"), [(3, 20), (3, 70), (40, 1), (40, 3), (130, 1), (130, 2), (130, 20)])
@pytest.mark.parametrize(("kernel", "dtype"), [(RationalQuadratic(2.3), torch.float32), (Laplace(), torch.float64)], ids=str)
def test_sizes(kernel, d, c, dtype):
    inputs = problem(70, 30, d, c)
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"), dtype)


@pytest.mark.parametrize("m", [520, None])
def test_shares_of_columns(m):
    """Few rows against many columns, which several programs share."""
    inputs = problem(20 if m else 520, m, 3, 2)
    check(RBF(), 5, inputs, directions_of(inputs, "xyuv"))


@pytest.mark.parametrize("m", [50, None])
@pytest.mark.parametrize("kernel", RADIAL, ids=str)
def test_far_from_the_origin(kernel, m):
    inputs = problem(70, m, 5, 3, offset=1000.0)
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"))


@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 2e-5), ("high", 1e-2), ("medium", 1e-1)])
@pytest.mark.parametrize("kernel", [RBF(), RationalQuadratic(2.3), Laplace(), Polynomial()], ids=str)
def test_precisions(kernel, precision, tolerance):
    inputs = problem(70, 50, 5, 20)
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"), precision=precision, tolerance=tolerance)


@pytest.mark.parametrize(("m", "dtype"), [(50, torch.float64), (None, torch.float32)])
@pytest.mark.parametrize("kernel", [RBF(), Laplace(), Matern32(), Energy(), Riesz(0.7), Riesz(1.5)], ids=str)
def test_identical_rows(kernel, m, dtype):
    """φ' and φ'' of a function of the distance count as 0 there."""
    x, y, u, v = problem(70, m, 5, 3)
    x[1], x[5] = x[0], x[4]
    if y is not None:
        y[3] = x[0]
    inputs = [x, y, u, v]
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"), dtype)


@pytest.mark.parametrize(("dtype", "distance"), [(torch.float32, 100.0), (torch.float64, 1e4)])
@pytest.mark.parametrize(("m", "given"), [(30, "xyuv"), (30, "yu"), (None, "x")])
@pytest.mark.parametrize("kernel", [RBF(), RationalQuadratic(2.3), Laplace(), Energy()], ids=str)
def test_clusters_far_apart(kernel, given, m, dtype, distance):
    """Where products lose the distances within a cluster, differences keep them."""
    inputs = [
        0.3 * z + distance * (torch.arange(len(z), device=DEVICE) % 2)[:, None] if z is not None and n < 2 else z
        for n, z in enumerate(problem(40, m, 3, 3))
    ]
    check(kernel, 1, inputs, directions_of(inputs, given), dtype)


@pytest.mark.parametrize(("m", "distance"), [(100, 0.1), (None, 0.01)])
@pytest.mark.parametrize("kernel", [Laplace(), Energy(), Riesz(0.7), Riesz(1.5), Matern32()], ids=str)
def test_near_pairs(kernel, distance, m):
    """One pair whose second derivative exceeds all others, and whose distance products of rows would lose."""
    x, y, u, v = problem(100, m, 5, 3)
    (x if y is None else y)[1] = x[0] + distance / 5**0.5
    inputs = [x, y, u, v]
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"))


@pytest.mark.parametrize("scale", [1e-15, 1e12])
@pytest.mark.parametrize("kernel", [RBF(), Laplace(), Energy(), Riesz(0.7)], ids=str)
def test_tiny_and_huge_rows(kernel, scale):
    x, y, u, v = problem(40, 30, 3, 1)
    inputs = [scale * x, scale * y, u, v]
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"))


@pytest.mark.parametrize(("bad", "c"), [(float("nan"), 1), (float("inf"), 3)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_makes_every_result_nan(c, bad):
    inputs = problem(20, 30, 3, c)
    directions = directions_of(inputs, "xyuv")
    for number in range(8):
        changed = [t.clone() for t in (*inputs, *directions)]
        changed[number][1, 0] = bad
        for dtype in (torch.float32, torch.float64):
            assert all(t.isnan().all() for t in evaluate(RBF(), 1, changed[:4], changed[4:], dtype)), number


@pytest.mark.parametrize(("scale", "c"), [(1.0, 1), (1.0, 3), (4.0, 1), (100.0, 3)])
@pytest.mark.parametrize("kernel", [RBF(), RationalQuadratic(2.3), Matern32()], ids=str)
def test_products_of_each_pass_of_one_sample(kernel, scale, c):
    """Without pairs i = i the widest bandwidths take products of bfloat16, narrower ones those of TF32, and the narrowest differences."""
    x, _, u, v = problem(70, None, 5, c)
    x = scale * x
    x[1::2] = x[::2] + 0.5 * torch.randn(35, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    inputs = [x, None, u, v]
    check(kernel, 1, inputs, directions_of(inputs, "xyuv"))
