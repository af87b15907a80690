"""Hessian-vector products of sums over pairs, and the second derivatives that are made of them, against the dense reference in float64."""

import functools
import itertools

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.cpu import kernel_hvp as cpu
from fastvae.ops.common import kernel_arguments
from fastvae.radial import KERNELS, RBF, Laplace, Matern32, Polynomial, RationalQuadratic
from tests.cases import DEVICE, needs_triton

pytestmark = [
    pytest.mark.usefixtures("interpreter_warnings"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # of PyTorch's own, on the first forward-mode call
]

TRITON = pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])
MIX = RBF() + 0.5 * Laplace().scaled(2) + Matern32()
ALL_KERNELS = [*KERNELS, RationalQuadratic(0.5), RationalQuadratic(3.0), MIX]
BANDWIDTHS = [(1.3,), (0.5, 1.0, 2.0, 1.4, 3.1)]
# On each backend; tests/test_kernel_hvp_kernels.py has every family on Triton.
EACH = [("cpu", kernel) for kernel in [*ALL_KERNELS, RBF() + Polynomial()]]
EACH += [pytest.param("triton", kernel, marks=TRITON.marks) for kernel in ("rbf", "laplace", "polynomial", MIX)]
# Of which of x, y, u and v there is a direction.
DIRECTIONS = [(1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def name_of(kernel):
    return getattr(kernel, "name", str(kernel))


def random(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]


def problem(n, m, d, c, same, given):
    x, y, v, u, mix = random((n, d), (m, d), (m, c), (n, c), (c, c))
    # Identical rows, where kernels of the distance have no derivative.
    y = 1.2 * y + 0.3
    y[:3] = x[:3]
    if same:
        v = random((n, c), seed=1)[0]
        u, y = v @ (mix + mix.T), None
    tensors = [x, y, u, v]
    every = random((n, d), (m, d), (n, c), (m, c), seed=2)
    directions = [t if on else None for t, on in zip(every, given, strict=True)]
    if same:
        directions[1] = directions[3] = None
    return tensors, directions


def is_dense(tensors, directions, dtype, options, backend=""):
    same = tensors[1] is None
    tensors, directions = ([None if t is None else t.to(dtype) for t in ts] for ts in (tensors, directions))
    exact = ([None if t is None else t.double() for t in ts] for ts in (tensors, directions))
    given, along = exact
    expected = reference.kernel_hvp(*given, along, **options)
    kernel = options["kernel"]
    kernel = KERNELS[kernel] if isinstance(kernel, str) else kernel
    numbers = kernel_arguments(kernel, options["bandwidth"], options["bandwidth_weights"])
    wanted = True, not same, True, not same
    found = torch.ops.fastvae.kernel_hvp(*tensors, *directions, *numbers, "highest", backend, *wanted)
    for actual, exact in zip((t for t, want in zip(found, wanted, strict=True) if want), expected[: sum(wanted)], strict=True):
        assert actual.dtype == dtype
        assert (actual - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=name_of)
@pytest.mark.parametrize(("bandwidth", "dtype"), [*zip(BANDWIDTHS, TOLERANCE, strict=True)])
@pytest.mark.parametrize("way", ["few rows", "tiles"])
def test_on_a_cpu(way, dtype, bandwidth, kernel, monkeypatch):
    if way == "tiles":
        monkeypatch.setattr(cpu, "_FEW_PAIRS", 0)
    options = {"kernel": kernel, "bandwidth": bandwidth, "bandwidth_weights": (0.5, 1.0, 2.0, 0.7, 0.3)[: len(bandwidth)]}
    for same, c, given in itertools.product((False, True), (1, 3), DIRECTIONS):
        if any(on and not (same and n % 2) for n, on in enumerate(given)):
            is_dense(*problem(37, 29, 5, c, same, given), dtype, options)


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "polynomial"])
@pytest.mark.parametrize("c", [1, 2])
def test_several_tiles(kernel, c):
    options = {"kernel": kernel, "bandwidth": (1.5,), "bandwidth_weights": (1.0,)}
    is_dense(*problem(1100, 700, 3, c, False, (1, 1, 0, 0)), torch.float64, options)
    is_dense(*problem(1100, 700, 3, c, True, (1, 0, 1, 0)), torch.float64, options)


@pytest.mark.parametrize("kernel", ["rbf", "imq", "matern52", "laplace", "energy"])
@pytest.mark.parametrize("backend", ["", TRITON])
def test_far_from_the_origin(kernel, backend, monkeypatch):
    monkeypatch.setattr(cpu, "_FEW_PAIRS", 0)
    tensors, directions = problem(70, 50, 5, 2, False, (1, 1, 0, 0))
    tensors = [tensors[0] + 1000, tensors[1] + 1000, *tensors[2:]]
    options = {"kernel": kernel, "bandwidth": (1.5,), "bandwidth_weights": (1.0,)}
    is_dense(tensors, directions, torch.float32, options, backend)


def dense_and_ours(function, inputs, backend=None):
    """The derivative of gradients along a direction, by both; and of the upstream of `function`."""
    results = []
    for way in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves, way)
        upstream = random(out.shape, seed=3)[0].to(out).requires_grad_()
        gradients = torch.autograd.grad(out, leaves, upstream, create_graph=True)
        along = [t.to(out) for t in random(*(t.shape for t in gradients), seed=4)]
        results.append(torch.autograd.grad(sum((g * t).sum() for g, t in zip(gradients, along, strict=True)), [*leaves, upstream]))
    return results


def is_same(function, inputs, backend=None, tolerance=1e-10):
    for actual, exact in zip(*dense_and_ours(function, inputs, backend), strict=True):
        assert (actual - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize(("backend", "kernel"), EACH, ids=name_of)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_mmd(backend, estimator, kernel):
    cases = itertools.product(BANDWIDTHS, ((), (3,)), (False, True))
    for bandwidth, batch, weighted in cases if backend == "cpu" else ((BANDWIDTHS[1], (), True), (BANDWIDTHS[1], (3,), False)):
        x, y, p, q = random((*batch, 9, 3), (*batch, 7, 3), (*batch, 9), (*batch, 7))
        weights = {"x_weights": p.softmax(-1), "y_weights": q.softmax(-1)} if weighted else {}
        options = {"bandwidth": bandwidth, "kernel": kernel, "estimator": estimator, **weights}
        is_same(lambda x, y, backend, o=options: fastvae.mmd(x, y, backend=backend, **o), (x, y), backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["cpu", "inductor", TRITON])
def test_mmd_of_many_rows(backend, dtype):
    n = 150 if backend == "triton" else 530
    x, y = (t.to(dtype) for t in random((n, 4), (n - 9, 4)))
    cases = itertools.product(("rbf", "laplace", "polynomial") if backend == "cpu" else ("rbf",), ("biased", "unbiased"))
    for kernel, estimator in cases if backend != "triton" else (("rbf", "biased"), ("laplace", "unbiased")):
        options = {"bandwidth": 1.5, "kernel": kernel, "estimator": estimator}
        actual, _ = dense_and_ours(lambda x, y, backend, o=options: fastvae.mmd(x, y, backend=backend, **o), (x, y), backend)
        _, exact = dense_and_ours(lambda x, y, backend, o=options: fastvae.mmd(x, y, backend=backend, **o), (x.double(), y.double()))
        # Not that of the upstream, whose terms cancel.
        for one, other in zip(actual[:2], exact[:2], strict=True):
            assert (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_to_normal(backend):
    for batch, estimator, weighted in itertools.product(((), (2,)), ("biased", "unbiased"), (False, True)):
        x, p = random((*batch, 40, 3), (*batch, 40))
        options = {"bandwidth": (0.7, 1.5), "estimator": estimator, "x_weights": p.softmax(-1) if weighted else None}
        is_same(lambda x, backend, o=options: fastvae.mmd_to_normal(x, backend=backend, **o), (x,), backend)


@pytest.mark.parametrize(("backend", "kernel"), [*EACH, (None, "rbf"), (None, "laplace")], ids=name_of)
def test_kernel_matmul_and_witness(backend, kernel):
    cases = itertools.product(BANDWIDTHS, ((), (3,)), (1, 4))
    for bandwidth, batch, c in cases if backend != "triton" else ((BANDWIDTHS[1], (), 4), (BANDWIDTHS[1], (3,), 1)):
        x, y, v = random((*batch, 9, 3), (*batch, 7, 3), (*batch, 7, c))
        options = {"bandwidth": bandwidth, "kernel": kernel}
        is_same(lambda x, y, v, backend, o=options: fastvae.kernel_matmul(x, y, v, backend=backend, **o), (x, y, v), backend)
    is_same(lambda t, x, y, backend: fastvae.witness(t, x, y, kernel=kernel, backend=backend), random((5, 3), (9, 3), (7, 3)), backend)


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "polynomial", MIX], ids=name_of)
@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_group_mmd(backend, kernel):
    z, weights = random((30, 3), (30, 3))
    for groups, estimator in itertools.product((torch.arange(30, device=DEVICE) % 3, weights.exp()), ("biased", "unbiased")):
        options = {"num_groups": 3, "kernel": kernel, "estimator": estimator, "bandwidth": BANDWIDTHS[1]}
        function = lambda z, backend, g=groups, o=options: fastvae.group_mmd(z, g, backend=backend, **o).values.sin()  # noqa: E731
        is_same(function, (z,), backend)


FUNCTIONS = {
    "mmd": lambda x, y, v, **o: fastvae.mmd(x, y, **o),
    "mmd, unbiased": lambda x, y, v, **o: fastvae.mmd(x, y, estimator="unbiased", **o),
    "mmd_to_normal": lambda x, y, v, **o: fastvae.mmd_to_normal(x, **o),
    "kernel_matmul": lambda x, y, v, **o: fastvae.kernel_matmul(x, y, v, **o),
    "group_mmd": lambda x, y, v, **o: fastvae.group_mmd(x, torch.tensor([0, 0, 1, 1, 1], device=x.device), num_groups=2, **o).values,
}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, k) for name in FUNCTIONS for k in ("rbf", "imq", "laplace", "matern32", "polynomial") if k == "rbf" or name != "mmd_to_normal"],
)
def test_gradgradcheck(name, kernel):
    """On Triton of one kernel, as the tests above compare the same derivatives with the reference's."""
    inputs = [t.cpu().requires_grad_() for t in random((5, 2), (4, 2), (4, 2))]
    function = functools.partial(FUNCTIONS[name], kernel=kernel, backend="cpu")
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", [TRITON])
def test_gradgradcheck_on_triton(backend, name):
    inputs = [t.requires_grad_() for t in random((5, 2), (4, 2), (4, 2))]
    assert torch.autograd.gradgradcheck(functools.partial(FUNCTIONS[name], kernel="rbf", backend=backend), inputs, fast_mode=True)


def test_second_derivatives_are_zero_at_identical_rows():
    """Of kernels of the distance, as their first ones; of others they are what they are."""
    x = torch.ones(4, 3, dtype=torch.float64, device=DEVICE)
    for kernel in ("laplace", "energy", "riesz"):
        assert (torch.func.hessian(lambda x, k=kernel: fastvae.mmd(x, x.detach() + 0.0, kernel=k))(x) == 0).all()
    assert (torch.func.hessian(lambda x: fastvae.kernel_matmul(x, torch.ones_like(x), x, kernel="matern32").sum())(x) != 0).any()


@pytest.mark.parametrize("way", ["few rows", "tiles"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_nan_out(bad, way, monkeypatch):
    """Of few rows, results that depend on the number."""
    if way == "tiles":
        monkeypatch.setattr(cpu, "_FEW_PAIRS", 0)
    for place in range(4):
        tensors, directions = problem(40, 30, 3, 2, False, (1, 1, 1, 1))
        tensors[place][3, 0] = bad
        found = torch.ops.fastvae.kernel_hvp(*tensors, *directions, *kernel_arguments(RBF(), (1.0,), (1.0,)), "", "", *[True] * 4)
        assert found[0].isnan().any() if way == "few rows" else all(t.isnan().all() for t in found)
        x, y = tensors[0], tensors[1]
        if place < 2:
            assert torch.autograd.functional.vhp(lambda x, y=y: fastvae.mmd(x, y), x, directions[0])[1].isnan().all()


def test_is_deterministic_and_linear_in_memory():
    x, y = (t.float() for t in random((3000, 8), (3000, 8)))
    first, second = (torch.autograd.functional.vhp(lambda x: fastvae.mmd(x, y), x, x)[1] for _ in range(2))
    assert (first == second).all()


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True])
def test_opcheck(same):
    tensors, directions = ([None if t is None else t.cpu() for t in ts] for ts in problem(6, 5, 3, 2, same, (1, not same, 1, not same)))
    directions = [t if t is None else t.requires_grad_() for t in directions]
    numbers = kernel_arguments(RBF(), (1.0, 2.0), (0.5, 1.0))
    arguments = (*tensors, *directions, *numbers, "", "", True, not same, True, not same)
    torch.library.opcheck(torch.ops.fastvae.kernel_hvp.default, arguments)


def test_bandwidths_say_the_way_out():
    """Which is to divide the samples, or to detach the bandwidth."""
    (x, y), h = random((6, 3), (5, 3)), torch.tensor([1.3], dtype=torch.float64, device=DEVICE)

    def penalty(function):
        leaf, scale = x.clone().requires_grad_(), h.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, scale), leaf, create_graph=True)
        return gradient.square().sum(), leaf, scale

    loss, leaf, scale = penalty(lambda x, h: fastvae.mmd(x, y, bandwidth=h))
    assert torch.autograd.grad(loss, leaf, retain_graph=True)[0].norm() > 0
    with pytest.raises(NotImplementedError, match=r"mmd has no second derivative with respect to bandwidths .* divide the samples"):
        torch.autograd.grad(loss, scale)
    penalty(lambda x, h: fastvae.mmd(x, y, bandwidth=h.detach()))[0].backward()
    loss, _, scale = penalty(lambda x, h: fastvae.mmd(x / h, y / h))
    dense, _, expected = penalty(lambda x, h: fastvae.mmd(x, y, bandwidth=h, backend="reference"))
    torch.testing.assert_close(torch.autograd.grad(loss, scale), torch.autograd.grad(dense, expected))
