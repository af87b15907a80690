"""MMD on the CPU path and on the Triton kernels against the dense reference in float64, and what autograd and the compiler make of it."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import reference
from fastvae.cpu import families, products, small
from fastvae.cpu.mmd import CPUSweep
from fastvae.radial import KERNELS, RBF, RationalQuadratic
from tests.cases import (
    CASES,
    DEVICE,
    DISTANCE_KERNELS,
    KERNEL_CASES,
    STREAMING_CASES,
    TOLERANCE,
    TRITON_TOLERANCE,
    Case,
    assert_close,
    evaluate,
    expected,
    gradcheck,
    needs_cpu,
    needs_triton,
    one_thread,
    peak_bytes,
    problems,
)


def run(case: Case, name: str, **options):
    """Actual and expected (value, gradients …), and the value of a call that wants no gradient."""
    points = case.points() if name == "mmd" else case.points()[:1]
    weights = {k: w for k, w in case.weights(case.accumulation_dtype).items() if name == "mmd" or k == "x_weights"}
    function = getattr(fastvae, name)
    actual = evaluate(function, *points, **case.options, **weights, **options)
    value_only = function(*points, **case.options, **weights, **options)
    return actual, expected(case, name, *points), value_only


def size(case: Case) -> tuple[int, float]:
    rows = 1 if case.layout == "expanded" else min(case.n, case.m)
    return rows, sum(map(abs, case.bandwidth_weights or (1.0,) * len(case.bandwidth)))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("case", "name"), problems(STREAMING_CASES))
def test_cpu(case, name, streams, monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("the default backend is not the CPU's")
    if streams:
        monkeypatch.setattr(small, "_PAIRS", 0)
    actual, reference_values, value_only = run(case, name)
    assert actual[0].dtype == case.accumulation_dtype
    assert all(grad.dtype == case.dtype for grad in actual[1:])
    tolerance = TOLERANCE[case.accumulation_dtype]
    if case.dtype != case.accumulation_dtype:
        tolerance = (tolerance[0], torch.finfo(case.dtype).eps, tolerance[2])
    assert_close(actual, reference_values, tolerance, *size(case))
    assert_close([value_only], reference_values[:1], tolerance, *size(case))


# The interpreter is slow: of the cases in float64 those that differ from float32 by more than digits.
IN_FLOAT64 = "one bandwidth,", "unbiased", "tile", "past a block", "squaring", "unrelated", "narrow", "wide", "weights,", "far from"
CASES_TRITON = [case for case in CASES if case.dtype == torch.float32 or any(words in case.name for words in IN_FLOAT64)]
KERNEL_CASES_TRITON = [case for case in KERNEL_CASES if case.dtype == torch.float32 or "weights" in case.name or "duplicates" in case.name]


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(("case", "name"), problems([*CASES_TRITON, *KERNEL_CASES_TRITON]))
def test_triton(case, name):
    actual, reference_values, value_only = run(case, name, backend="triton", precision="highest")
    tolerance = TOLERANCE[torch.float64] if case.dtype == torch.float64 else TRITON_TOLERANCE["highest"]
    assert_close(actual, reference_values, tolerance, *size(case))
    assert_close([value_only], reference_values[:1], tolerance, *size(case))


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("precision", ["high", "medium", "ieee"])
@pytest.mark.parametrize(
    "case",
    [CASES[0], CASES[9], CASES[17], *(case for case in KERNEL_CASES_TRITON if case.name.endswith(" "))],
    ids=lambda case: case.name,
)
def test_triton_precision(case, precision):
    actual, reference_values, _ = run(case, "mmd", backend="triton", precision=precision)
    assert_close(actual, reference_values, TRITON_TOLERANCE[precision], *size(case))


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("alpha", [100.0, 1000.0])
def test_triton_rational_quadratic_of_large_alpha(alpha):
    """α multiplies every error of the logarithm, also what 1 + d²/(2αh²) has rounded away of d²."""
    case = Case("steep", kernel=RationalQuadratic(alpha))
    actual, reference_values, _ = run(case, "mmd", backend="triton", precision="ieee")
    assert_close(actual, reference_values, (1e-6, 1e-6, 0.0), *size(case))


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("precision", ["highest", "high", "medium", "ieee"])
def test_triton_equal_rows_are_at_distance_zero(precision):
    """Norms and products are of the same points, whatever the products round: else k of equal rows is not 1."""
    x = torch.randn(64, 16, device=DEVICE)
    value = fastvae.mmd(x, x.flip(0), bandwidth=0.7, backend="triton", precision=precision)
    assert abs(value.item()) <= 1e-6


@needs_triton
@pytest.mark.interpreter
def test_rounding_to_tf32_keeps_a_nan():
    x, y = torch.randn(20, 3, device=DEVICE), torch.randn(20, 3, device=DEVICE)
    # Rounded by a sum of bits it would be −0.
    y.view(torch.int32)[4, 1] = 0x7FFFFFFF
    for result in evaluate(lambda x, y: fastvae.mmd(x, y, backend="triton", precision="high"), x, y):
        assert result.isnan().all()


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_half(dtype):
    case = Case("half", dtype=dtype)
    actual, reference_values, _ = run(case, "mmd", backend="triton", precision="highest")
    value, grad, absolute = TRITON_TOLERANCE["highest"]
    assert_close(actual, reference_values, (value, max(grad, torch.finfo(dtype).eps), absolute), *size(case))


@pytest.mark.parametrize("case", [case for case in STREAMING_CASES if "several tiles" in case.name], ids=lambda case: case.name)
def test_cpu_without_onednn(case, monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("the default backend is not the CPU's")
    monkeypatch.setattr(products, "_LINEAR", None)
    actual, reference_values, _ = run(case, "mmd")
    assert_close(actual, reference_values, TOLERANCE[case.accumulation_dtype], *size(case))


@pytest.mark.skipif(products._LINEAR is None or DEVICE != "cpu", reason="needs oneDNN and data on a CPU")
def test_cpu_products_by_onednn(monkeypatch):
    """Of few shapes, as each is compiled and kept, and with no weight whose rows lie apart, which take a thousand times as long."""
    shapes, linear = set(), products._LINEAR

    def recorded(left, weight, *options):
        assert weight.is_contiguous() or weight.T.is_contiguous()
        shapes.add((*left.shape, weight.shape[0]))
        return linear(left, weight, *options)

    monkeypatch.setattr(products, "_LINEAR", recorded)
    for n in (1100, 1200):
        x, y, v = torch.randn(n, 16, requires_grad=True), torch.randn(n + 20, 16), torch.randn(n + 20, 5)
        with one_thread():
            fastvae.mmd(x, y, bandwidth=4.0).backward()
            torch.autograd.grad(fastvae.kernel_matmul(x, y, v, bandwidth=4.0).sum(), x)
            fastvae.group_mmd(x, torch.randint(3, (n,)), bandwidth=4.0).mean().backward()
    assert {(512, 18, 512), (17, 512, 512), (5, 512, 512)} <= shapes
    assert all(size % 64 == 0 or size in (5, 17, 18) for shape in shapes for size in shape)
    shapes.clear()
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    fastvae.mmd(x, y, bandwidth=4.0).backward()
    assert not shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [(1.0,), (1.0, 2**0.5, 2.0), (1.0, 1.3)])
@pytest.mark.parametrize("streams", [False, True])
def test_cpu_powers_are_not_denormal(bandwidth, dtype, streams, monkeypatch):
    """They take a hundred times as long: a narrow bandwidth would take up to 1.9 times as long as a wide one."""
    evaluator = families._RBFEvaluator
    least, evaluate_power = [], evaluator.evaluate

    def recorded(self, n, ratio, exponent, out, *options):
        slope = evaluate_power(self, n, ratio, exponent, out, *options)
        least.append(out[out > 0].min())
        return slope

    monkeypatch.setattr(evaluator, "evaluate", recorded)
    if streams:
        monkeypatch.setattr(small, "_PAIRS", 0)
    narrow = {torch.float32: 0.2, torch.float64: 0.06}[dtype]
    options = {"bandwidth": tuple(narrow * h for h in bandwidth)}
    x, y = torch.randn(300, 8, dtype=dtype), torch.randn(200, 8, dtype=dtype)
    actual = evaluate(fastvae.mmd, x, y, **options, backend="cpu")
    assert len(least) == (3 if streams else 1) * len(bandwidth)
    assert all(power.dtype == dtype and power >= torch.finfo(dtype).tiny for power in least)
    assert_close(actual, evaluate(reference.mmd, x.double(), y.double(), **options), TOLERANCE[dtype], 200, len(bandwidth))


@pytest.mark.parametrize(("name", "most"), [("mmd", 60), ("mmd_to_normal", 65)])
def test_cpu_takes_few_operations_for_few_rows(name, most):
    """Tiles take hundreds, which no product of few rows is worth."""
    samples = [torch.randn(32, 4) for _ in range(2 if name == "mmd" else 1)]
    x, y = samples if name == "mmd" else (*samples, None)
    operations = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    for _ in range(2):
        # What follows from the bandwidths alone is kept from the first call.
        operations.clear()
        with Recorder():
            value, grad_x, _ = small.mmd(x, y, None, None, RBF(), [2.0], [1.0], False, True, False)
    assert len(operations) <= most, operations
    x = x.requires_grad_()
    actual = fastvae.mmd(x, y, bandwidth=2.0) if y is not None else fastvae.mmd_to_normal(x, bandwidth=2.0)
    actual.backward()
    assert torch.equal(actual, value)
    torch.testing.assert_close(x.grad, grad_x)


def test_cpu_batch_with_a_problem_that_products_are_not_exact_enough_for(monkeypatch):
    """It and those that are taken with it go to the streaming path, and nothing else."""
    monkeypatch.setattr(small, "_PAIRS_AT_ONCE", 2 * 40**2)
    results, direct = [], small.mmd
    monkeypatch.setattr(small, "mmd", lambda *args: results.append(direct(*args)) or results[-1])
    x, y = torch.randn(5, 20, 3), torch.randn(5, 20, 3)
    x[2, :10] += 1000

    def loss(function, x, y):
        return function(x, y, bandwidth=(0.5, 2.0)).sum()

    actual = evaluate(partial(loss, fastvae.mmd), x, y)
    assert [result is None for result in results] == [False, True, False]
    assert_close(actual, evaluate(partial(loss, reference.mmd), x.double(), y.double()), TOLERANCE[torch.float32], 20, 2)


def test_clusters_far_apart_with_a_small_bandwidth():
    """Centring is not enough here: with ‖x‖² + ‖y‖² − 2x·y in float32 the gradient is off by several percent."""
    side = 100 * torch.sign(torch.randn(300, 1, dtype=torch.float64))
    x, y = (side + 0.1 * torch.randn(300, 4, dtype=torch.float64) for _ in range(2))
    for dtype in (torch.float32, torch.float64):
        a, b = x.to(dtype), y.to(dtype)
        actual = evaluate(fastvae.mmd, a, b, bandwidth=0.2, backend="cpu")
        assert_close(actual, evaluate(reference.mmd, a.double(), b.double(), bandwidth=0.2), TOLERANCE[dtype], 300)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
def test_triton_clusters_far_apart_with_a_small_bandwidth():
    side = 100 * torch.sign(torch.randn(60, 1, dtype=torch.float64))
    x, y = ((side + 0.1 * torch.randn(60, 4, dtype=torch.float64)).float().to(DEVICE) for _ in range(2))
    for weights in ({}, {"x_weights": torch.full((60,), 1 / 60, device=DEVICE)}):
        for bandwidth in (0.2, (0.1, 0.2)):
            actual = evaluate(fastvae.mmd, x, y, bandwidth=bandwidth, backend="triton", **weights)
            exact = evaluate(reference.mmd, x.double(), y.double(), bandwidth=bandwidth)
            assert_close(actual, exact, TRITON_TOLERANCE["ieee"], 60)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("kernel", DISTANCE_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_takes_differences_where_products_lose_the_direction_of_many_pairs(kernel, dtype):
    side = 100 * torch.sign(torch.randn(60, 1, dtype=torch.float64))
    x, y = ((side + 0.1 * torch.randn(60, 4, dtype=torch.float64)).to(DEVICE, dtype) for _ in range(2))
    y[0] = x[0]
    actual = evaluate(fastvae.mmd, x, y, bandwidth=20.0, kernel=kernel, backend="triton")
    exact = evaluate(reference.mmd, x.double(), y.double(), bandwidth=20.0, kernel=kernel)
    # |k| of two rows on the two sides, whose distance is 20 bandwidths.
    assert_close(actual, exact, TRITON_TOLERANCE["ieee"], 60, {"energy": 20.0, "riesz": 20**1.5}.get(kernel, 1.0))


@needs_cpu
@pytest.mark.parametrize("pairs", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["matern32", "matern52"])
def test_matern_of_a_wide_bandwidth(kernel, dtype, pairs, monkeypatch):
    """k is 1 to many digits, and 1 − k an incomplete gamma function."""
    monkeypatch.setattr(small, "_PAIRS", pairs)
    x, y = torch.randn(90, 3, dtype=dtype), torch.randn(70, 3, dtype=dtype) + 0.2

    def mean(a, b, h):
        u = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist") * (3 if kernel == "matern32" else 5) ** 0.5 / h
        two, three = torch.full_like(u, 2), torch.full_like(u, 3)
        rest = torch.special.gammainc(two, u) if kernel == "matern32" else torch.special.gammainc(three, u) + u * u / 6 * torch.exp(-u)
        return -rest.mean()

    for h in (20.0, 1e3, 1e8):
        value = fastvae.mmd(x, y, bandwidth=h, kernel=kernel)
        exact = mean(x, x, h) + mean(y, y, h) - 2 * mean(x, y, h)
        assert value.item() == pytest.approx(exact.item(), rel=3e-5 if dtype == torch.float32 else 1e-10, abs=0)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(("bandwidth", "dtype"), [(1e-15, torch.float32), (1e-15, torch.float64), (1e-25, torch.float64)])
def test_triton_energy_of_a_tiny_bandwidth(bandwidth, dtype):
    """Padding lies farther than any pair, whose square it would else be taken for."""
    x, y = (torch.randn(rows, 4, dtype=torch.float64, device=DEVICE) for rows in (70, 50))
    value = fastvae.mmd(x.to(dtype), y.to(dtype), bandwidth=bandwidth, kernel="energy", backend="triton")
    exact = reference.mmd(x, y, bandwidth=bandwidth, kernel="energy")
    torch.testing.assert_close(value.double(), exact, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(("steepness", "precision_pass"), [(11.0, 0), (13.0, 1), (250.0, 1), (260.0, 2)])
def test_triton_takes_finer_products_for_smaller_bandwidths(monkeypatch, steepness, precision_pass):
    from fastvae.kernels import prepare as kernels
    from fastvae.kernels.plan import PRECISION_PASS

    plans, original = [], kernels.launch

    def recorded(fn, key, device, grid, args, constants):
        if fn is kernels.operands_kernel:
            plans.append(args[fn.arg_names.index("tables")].plan_ptr)
        original(fn, key, device, grid, args, constants)

    monkeypatch.setattr(kernels, "launch", recorded)
    x, y = (torch.randn(60, 4, device=DEVICE) for _ in range(2))
    # Near pairs, so that a small bandwidth has something to see.
    y[:30] = x[:30] + 0.2 * torch.randn(30, 4, device=DEVICE)
    centre = 0.5 * (x.mean(0) + y.mean(0))  # all of so few rows
    radius2 = max((z - centre).square().sum(1).max().item() for z in (x, y))
    bandwidth = (radius2 / (2 * steepness)) ** 0.5
    actual = evaluate(fastvae.mmd, x, y, bandwidth=bandwidth, backend="triton", precision="highest")
    assert plans[0][PRECISION_PASS.value].item() == precision_pass
    exact = evaluate(reference.mmd, x.double(), y.double(), bandwidth=bandwidth)
    assert_close(actual, exact, TRITON_TOLERANCE["highest"], 1000)


def test_nearly_constant_kernel_keeps_its_digits():
    """Every k within 1e-3 of one, as in CMMD: sums of k would lose what sums of k − 1 keep."""
    x, y = torch.randn(2000, 64), torch.randn(2000, 64) + 0.02
    x, y = (torch.nn.functional.normalize(t) for t in (x, y))
    exact = fastvae.mmd(x.double(), y.double(), bandwidth=30.0, backend="cpu")
    assert fastvae.mmd(x, y, bandwidth=30.0, backend="cpu").item() == pytest.approx(exact.item(), rel=1e-5)


def test_same_sample_has_no_mmd():
    x = torch.randn(600, 3)
    assert abs(fastvae.mmd(x, x.clone(), bandwidth=1.5).item()) < 1e-7


BACKENDS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "y"])
def test_a_value_that_is_not_finite_gives_nan(backend, value, where):
    points = {"x": torch.randn(9, 3, device=DEVICE), "y": torch.randn(8, 3, device=DEVICE)}
    points[where][4, 1] = value
    result, *grads = evaluate(fastvae.mmd, points["x"], points["y"], backend=backend)
    assert result.isnan()
    assert all(grad.isnan().any() for grad in grads)
    assert fastvae.mmd_to_normal(points[where], backend=backend).isnan()


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bandwidth", [(1.5,), (1.0, 2**0.5, 2.0), (0.6, 9.0)])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradcheck(backend, bandwidth, estimator):
    x, y = (torch.randn(rows, 2, dtype=torch.float64, device=DEVICE, requires_grad=True) for rows in (4, 3))
    options = {"bandwidth": bandwidth, "estimator": estimator, "backend": backend}
    assert gradcheck(lambda x, y: fastvae.mmd(x, y, **options), (x, y), backend)
    assert gradcheck(lambda x: fastvae.mmd_to_normal(x, **options), (x,), backend)


@needs_triton
@pytest.mark.interpreter
def test_gradcheck_by_differences():
    x, y = (
        torch.randn(rows, 2, dtype=torch.float64, device=DEVICE) * 0.1 + 1e4 * (torch.arange(rows, device=DEVICE) % 2)[:, None]
        for rows in (4, 3)
    )
    x, y = x.requires_grad_(), y.requires_grad_()
    for backend in ("cpu", "triton") if DEVICE == "cpu" else ("triton",):
        assert gradcheck(lambda x, y, backend=backend: fastvae.mmd(x, y, bandwidth=0.2, backend=backend), (x, y), backend)


def test_only_the_wanted_gradients(monkeypatch):
    asked = []
    monkeypatch.setattr(small, "_PAIRS", 0)
    original = CPUSweep.prepare
    monkeypatch.setattr(CPUSweep, "prepare", lambda sweep, z, w, gradient: asked.append(gradient) or original(sweep, z, w, gradient))
    x, y = torch.randn(5, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    fastvae.mmd(x, y, backend="cpu")
    fastvae.mmd(x, y.detach(), backend="cpu")
    with torch.no_grad():
        fastvae.mmd(x, y, backend="cpu")
    assert asked == [True, True, True, False, False, False]


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "linear"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_of_every_kernel(kernel, estimator):
    x, y = (torch.randn(4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    h, a = (torch.tensor(t, dtype=torch.float64, device=DEVICE, requires_grad=True) for t in ((0.8, 1.7), (0.3, 2.0)))
    options = {"kernel": kernel, "estimator": estimator}
    assert torch.autograd.gradcheck(lambda x, y, h, a: fastvae.mmd(x, y, bandwidth=h, bandwidth_weights=a, **options), (x, y, h, a))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradient_to_the_bandwidths_against_the_normal(estimator):
    x = torch.randn(6, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    h = torch.tensor((0.8, 1.7, 30.0), dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, h: fastvae.mmd_to_normal(x, bandwidth=h, estimator=estimator), (x, h))


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", DISTANCE_KERNELS)
def test_kernels_with_a_cusp_have_no_gradient_there(kernel, backend):
    x = torch.randn(1, 4, device=DEVICE).expand(20, 4)
    value, *gradients = evaluate(fastvae.mmd, x, x.clone(), kernel=kernel, backend=backend)
    assert value.item() == 0
    assert not any(grad.any() for grad in gradients)


@pytest.mark.filterwarnings("ignore:. of shape .* is treated as a batch")
def test_batch_dimensions():
    x, y = (torch.randn(2, 3, rows, 4, dtype=torch.float64, device=DEVICE) for rows in (9, 7))
    p = torch.rand(2, 3, 9, dtype=torch.float64, device=DEVICE)
    options = {"x_weights": p / p.sum(-1, keepdim=True), "bandwidth": (0.9, 2.0)}
    actual, exact = (evaluate(lambda *points, f=f: (f(*points, **options) ** 2).sum(), x, y) for f in (fastvae.mmd, reference.mmd))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e)
    assert fastvae.mmd_to_normal(x).shape == (2, 3)
    h = torch.tensor((0.9, 2.0), dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, h: fastvae.mmd(x, y[:, :2], bandwidth=h), (x[:, :2, :4].clone().requires_grad_(), h))


@pytest.mark.usefixtures("interpreter_warnings")
@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kernel", "weighted", "scales"),
    [
        ("rbf", False, (1e-3, 1.0, 30.0)),
        ("rbf", False, (30.0, 1.0, 1e-3)),
        ("laplace", True, (1e-3, 1.0, 30.0)),
        ("polynomial", False, (30.0, 1.0, 1e-3)),
    ],
)
def test_a_batch_is_one_launch_of_the_same_numbers(kernel, weighted, scales, monkeypatch):
    """Problems of different scales, so that each has its own shifts, its own pass and its own coincident pairs."""
    from fastvae.kernels import mmd as kernels

    launches = []
    monkeypatch.setattr(kernels, "column_splits", lambda programs, *_: launches.append(programs) or 1)
    scale = torch.tensor(scales, device=DEVICE)[:, None, None]
    rows = 128 if weighted else 140
    x, y = torch.randn(3, rows, 5, device=DEVICE) * scale + scale, torch.randn(3, 70, 5, device=DEVICE) * scale
    p = torch.rand(128, 3, device=DEVICE).T if weighted else None  # not contiguous, and no row is padding
    p = None if p is None else p / p.sum(-1, keepdim=True)
    options = {"kernel": kernel, "bandwidth": (0.5, 1.0), "backend": "triton"}
    singles = [evaluate(partial(fastvae.mmd, x_weights=None if p is None else p[n]), x[n], y[n], **options) for n in range(3)]
    assert len(launches) == 3
    launches.clear()
    x.requires_grad_(), y.requires_grad_()
    values = fastvae.mmd(x, y, x_weights=p, **options)
    assert len(launches) == 1
    gradients = torch.autograd.grad(values.sum(), (x, y))
    for actual, parts in zip((values.detach(), *gradients), zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(parts), rtol=0, atol=0)


def with_bandwidths(function, x, y, h, a, **options):
    """Value and gradients to points, bandwidths and their weights."""
    tensors = [t.detach().clone().requires_grad_() for t in (x, y, h, a) if t is not None]
    *points, bandwidth, weights = tensors
    value = function(*points, bandwidth=bandwidth, bandwidth_weights=weights, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), tensors)


BACKENDS = ["cpu", "inductor", pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("options", "batch"), [("unbiased", ()), ("weights", (2,))])
@pytest.mark.parametrize("kernel", [*KERNELS, RationalQuadratic(2.3), RationalQuadratic(0.5), RationalQuadratic(50.0), "normal"])
def test_gradients_to_bandwidths_and_weights(kernel, options, batch, backend):
    x, y = (torch.randn(*batch, rows, 5, dtype=torch.float64, device=DEVICE) for rows in (70, 40))
    h = torch.tensor((1.0, 30.0, 0.5, 2.0, 1.0), dtype=torch.float64, device=DEVICE)
    a = torch.tensor((0.3, 1.0, -0.2, 2.0, 0.7), dtype=torch.float64, device=DEVICE)
    p, q = (torch.rand(z.shape[:-1], dtype=torch.float64, device=DEVICE) for z in (x, y))
    named = {"estimator": options} if options != "weights" else {"x_weights": p / p.sum(-1, keepdim=True)}
    name = "mmd_to_normal" if kernel == "normal" else "mmd"
    if name == "mmd":
        named |= {"kernel": kernel} | ({"y_weights": q / q.sum(-1, keepdim=True)} if options == "weights" else {})
    arguments = x, y if name == "mmd" else None, h, a
    actual = with_bandwidths(getattr(fastvae, name), *arguments, backend=backend, **named)
    for got, exact in zip(actual, with_bandwidths(getattr(reference, name), *arguments, **named), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "polynomial"])
def test_an_outlier_does_not_drown_the_gradient_to_a_bandwidth(kernel, backend):
    x, y = torch.randn(100, 4, device=DEVICE), torch.randn(100, 4, device=DEVICE)
    x[3] = 1e5
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    actual = with_bandwidths(fastvae.mmd, x, y, one, one, kernel=kernel, backend=backend)
    exact = with_bandwidths(reference.mmd, x.double(), y.double(), one, one, kernel=kernel)
    for got, expected_gradient in zip(actual[-2:], exact[-2:], strict=True):
        torch.testing.assert_close(got, expected_gradient, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("interpreter_warnings")
@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("wanted", ["bandwidth", "bandwidth_weights"])
def test_triton_gradient_to_bandwidths_alone(wanted):
    """Each pair within a sample is then met once."""
    x, y = (torch.randn(rows, 3, dtype=torch.float64, device=DEVICE) for rows in (150, 90))
    gradients = []
    for backend in ("triton", "reference"):
        numbers = {"bandwidth": torch.tensor((0.7, 1.9, 40.0), device=DEVICE), "bandwidth_weights": torch.ones(3, device=DEVICE)}
        numbers[wanted].requires_grad_()
        gradients += torch.autograd.grad(fastvae.mmd(x, y, backend=backend, **numbers), numbers[wanted])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("interpreter_warnings")
@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kernel", "bandwidth", "weighted"), [("rbf", 1.5, True), ("rbf", 15.0, False), ("laplace", 1.5, True), ("polynomial", 1.5, False)]
)
def test_triton_rows_of_larger_samples(kernel, bandwidth, weighted):
    """The share of a rank, whose rows start and end within a tile of the samples of all."""
    x, y = torch.randn(150, 5, dtype=torch.float64, device=DEVICE), torch.randn(101, 5, dtype=torch.float64, device=DEVICE) + 0.2
    p, q = torch.rand(150, dtype=torch.float64, device=DEVICE), torch.rand(101, dtype=torch.float64, device=DEVICE)
    whole = (p / p.sum(), q / q.sum()) if weighted else (None, None)
    parameters = {"polynomial": [3.0, 1.0]}.get(kernel, [])
    total, gradients, to_kernel = 0.0, [], 0.0
    for rows_x, rows_y in ((slice(0, 33), slice(0, 70)), (slice(33, 150), slice(70, 101))):
        own = (whole[0][rows_x], whole[1][rows_y]) if weighted else (None, None)
        arguments = (x[rows_x], y[rows_y], *own, x, y, *whole, rows_x.start, rows_y.start, None, None, None, [bandwidth], [1.0])
        value, *grads, grad_h, grad_a = torch.ops.fastvae.mmd(*arguments, kernel, parameters, True, "", "triton", "", True, True, True)
        total, gradients = total + value, [*gradients, grads]
        to_kernel = to_kernel + torch.cat([grad_h, grad_a])
        # The shares are of one sum, whatever gradients a rank wants.
        for flags in ((False, True, False), (True, False, False), (False, False, False)):
            other = torch.ops.fastvae.mmd(*arguments, kernel, parameters, True, "", "triton", "", *flags)[0]
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-13)
    options = {"bandwidth": bandwidth, "kernel": kernel, "estimator": "unbiased"}
    weights = {"x_weights": whole[0], "y_weights": whole[1]} if weighted else {}
    actual = total, *(torch.cat(parts) for parts in zip(*gradients, strict=True))
    exact = evaluate(reference.mmd, x, y, **options, **weights)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13)
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    options.pop("bandwidth")
    exact = with_bandwidths(reference.mmd, x, y, bandwidth * one, one, **options, **weights)
    torch.testing.assert_close(to_kernel, torch.cat(exact[-2:]), rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("interpreter_warnings")
@needs_triton
@pytest.mark.interpreter
def test_a_batch_of_more_than_one_launch(monkeypatch):
    from fastvae.ops import common

    # In float32 one kernel for few rows would take them.
    x, y = (torch.randn(5, rows, 3, dtype=torch.float64, device=DEVICE) for rows in (6, 4))
    expected_values = fastvae.mmd(x, y, backend="triton")
    monkeypatch.setattr(common, "_MOST_PADDED", 2 * 128 * 16)
    torch.testing.assert_close(fastvae.mmd(x, y, backend="triton"), expected_values, rtol=0, atol=0)


def test_gradient_from_outside_of_vmap():
    xs, y = torch.randn(3, 20, 4, device=DEVICE), torch.randn(15, 4, device=DEVICE)
    exact = evaluate(lambda xs, y: torch.stack([fastvae.mmd(x, y) for x in xs]).sum(), xs, y)
    nested = torch.vmap(torch.vmap(fastvae.mmd, (0, None)), (0, None))
    actual = evaluate(lambda xs, y: nested(xs[:, None], y).sum(), xs, y)
    torch.testing.assert_close(actual, exact)


def test_vmap_and_jacobians():
    xs, y = torch.randn(3, 6, 2, dtype=torch.float64, device=DEVICE), torch.randn(5, 2, dtype=torch.float64, device=DEVICE)
    values = torch.stack([fastvae.mmd(x, y) for x in xs])
    torch.testing.assert_close(torch.vmap(fastvae.mmd, (0, None))(xs, y), values)
    nested = torch.vmap(torch.vmap(fastvae.mmd, (0, None)), (None, 0))(xs, torch.stack([y, y + 1]))
    torch.testing.assert_close(nested, torch.stack([values, torch.stack([fastvae.mmd(x, y + 1) for x in xs])]))
    gradients = torch.stack([torch.func.grad(fastvae.mmd)(x, y) for x in xs])
    torch.testing.assert_close(torch.vmap(torch.func.grad(fastvae.mmd), (0, None))(xs, y), gradients)
    jacobian = torch.func.jacrev(lambda x: torch.stack([fastvae.mmd(x, y), fastvae.mmd_to_normal(x)]))(xs[0])
    torch.testing.assert_close(jacobian, torch.stack([gradients[0], torch.func.grad(fastvae.mmd_to_normal)(xs[0])]))


@pytest.mark.parametrize("y", [torch.randn(4, 2, dtype=torch.float64), None])
def test_opcheck(y):
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = None if y is None else y.requires_grad_()
    h = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for kernel in ((h, h, [], []), (None, None, [1.0, 2.0], [0.5, 1.0])):
        for bandwidth_grad in (False, True):
            arguments = (x, y, *[None] * 6, 0, 0, None, *kernel, "rbf", [], False, "", "", "", True, y is not None, bandwidth_grad)
            torch.library.opcheck(torch.ops.fastvae.mmd.default, arguments)


def test_op_called_without_its_gradient_says_so():
    x = torch.randn(5, 2, requires_grad=True)
    value, *_ = torch.ops.fastvae.mmd(
        x, *[None] * 7, 0, 0, None, None, None, [1.0], [1.0], "rbf", [], False, "", "", "", False, False, False
    )
    with pytest.raises(RuntimeError, match="without the gradient that backward needs"):
        value.backward()


def test_compiles_whole_and_once_for_all_sizes():
    compilations = []

    def backend(module, inputs):
        compilations.append(module)
        return module.forward

    def loss(x, y):
        return fastvae.mmd(2 * x, y, bandwidth=[1.0, 2.0], estimator="unbiased") + fastvae.mmd_to_normal(x)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (10, 23, 600):
        x, y = torch.randn(rows, 4, requires_grad=True), torch.randn(rows + 3, 4)
        torch.testing.assert_close(compiled(x, y), loss(x, y))
    assert len(compilations) == 1


def test_numbers_are_no_tensors_of_a_compiled_graph():
    """A node on the CPU would switch CUDA graphs off. A bandwidth that changes from step to step becomes a tensor, filled on the device."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x, y = torch.randn(9, 2, device=DEVICE), torch.randn(7, 2, device=DEVICE)
    for function in (
        lambda h: fastvae.mmd(x, y, bandwidth=[h, 2 * h], bandwidth_weights=[0.5, 2.0]),
        lambda h: fastvae.kernel_matmul(x, y, y, bandwidth=h).sum(),
        lambda h: fastvae.group_mmd(x, (x > 0).float(), bandwidth=h).mean(),
    ):
        graphs.clear()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for step in range(4):
            torch.testing.assert_close(compiled(1.0 + step), function(1.0 + step))
        assert len(graphs) == 2
        assert not any(node.target in (torch.tensor, torch.as_tensor, torch.full) for node in graphs[0])
        assert all(node.kwargs["device"] == x.device for node in graphs[1] if node.target is torch.full)


def test_functional_gradient():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    _, expected_grad, _ = evaluate(fastvae.mmd, x, y)
    torch.testing.assert_close(torch.func.grad(fastvae.mmd)(x, y), expected_grad)


def test_autocast_computes_in_float32():
    x, y = torch.randn(40, 8), torch.randn(30, 8)
    exact = fastvae.mmd(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastvae.mmd(x, y).item() == exact.item()
        assert fastvae.mmd(x.bfloat16(), y).item() == fastvae.mmd(x.bfloat16().float(), y).item()


def test_bandwidth_as_a_tensor():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    for bandwidth in (torch.tensor(1.5), torch.tensor([1.0, 2.0])):
        assert fastvae.mmd(x, y, bandwidth=bandwidth).item() == fastvae.mmd(x, y, bandwidth=bandwidth.tolist()).item()


def test_same_bits_every_time():
    x, y = torch.randn(1100, 5), torch.randn(700, 5)
    first, second = (evaluate(fastvae.mmd, x, y, bandwidth=(1.0, 3.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loss_module():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    loss = fastvae.MMDLoss(bandwidth=(1.0, 2.0), estimator="unbiased")
    assert loss(x, y).item() == fastvae.mmd(x, y, bandwidth=(1.0, 2.0), estimator="unbiased").item()
    assert loss(x).item() == fastvae.mmd_to_normal(x, bandwidth=(1.0, 2.0), estimator="unbiased").item()
    assert "bandwidth=(1.0, 2.0)" in repr(loss)


def test_memory_grows_with_n_and_not_with_its_square():
    """Peak bytes of tensors that the sweep allocates, counted by the profiler at two sizes."""

    def peak(n):
        return peak_bytes(partial(fastvae.mmd_to_normal, backend="cpu"), [torch.randn(n, 4)])

    small, large = peak(1024), peak(8192)
    assert large < 1024 * 8192 * 4
    assert large - small < 40 * 4 * 7168 * 4


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of PyTorch's own, on the first forward-mode call
def test_gradients_are_contiguous():
    """As the fake says: the compiler builds on it."""
    x, y = torch.randn(3, 20).T, torch.randn(3, 9).T
    arguments = (*[None] * 6, 0, 0, None, None, None, [1.0], [1.0], "rbf", [], False, "", "", "", True, True, False)
    _, grad_x, grad_y, *_ = torch.ops.fastvae.mmd(x, y, *arguments)
    assert grad_x.is_contiguous()
    assert grad_y.is_contiguous()


def test_default_device_does_not_matter():
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    value = fastvae.mmd(x, y, bandwidth=(1.0, 2.0))
    with torch.device("meta"):
        assert fastvae.mmd(x, y, bandwidth=(1.0, 2.0)).item() == value.item()


def test_the_pair_term_and_the_closed_form_have_the_same_bandwidth():
    """A scale rounded to float32 is another bandwidth: MMD² near zero then keeps the difference, more of it the more rows there are."""
    x = torch.randn(4000, 10)
    exact = fastvae.mmd_to_normal(x.double(), bandwidth=10**0.5, backend="cpu").item()
    assert fastvae.mmd_to_normal(x, bandwidth=10**0.5, backend="cpu").item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("outlier", [1e3, 1e9, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_outlier(dtype, outlier, where):
    points = {"x": torch.randn(600, 3, dtype=dtype), "y": torch.randn(90, 3, dtype=dtype)}
    points[where][7] = outlier
    actual = evaluate(fastvae.mmd, points["x"], points["y"], bandwidth=(0.7, 1.0), backend="cpu")
    exact = evaluate(reference.mmd, points["x"].double(), points["y"].double(), bandwidth=(0.7, 1.0))
    assert_close(actual, exact, TOLERANCE[dtype], 90, 2.0)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(("dtype", "outliers"), [(torch.float64, (1e200, 0.0)), (torch.float32, (1e38, -1e38))])
def test_triton_outliers_whose_squares_overflow(dtype, outliers):
    x, y = torch.randn(40, 3, dtype=dtype, device=DEVICE), torch.randn(30, 3, dtype=dtype, device=DEVICE)
    x[0], x[1] = outliers
    actual = evaluate(fastvae.mmd, x, y, backend="triton")
    assert_close(actual, evaluate(reference.mmd, x.double(), y.double()), TRITON_TOLERANCE["ieee"], 30)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
def test_triton_pairs_and_the_closed_form_shift_the_same_bandwidths():
    """A bandwidth at the very edge of being shifted, with a gradient, for which the closed form is added to the pairs."""
    x = torch.randn(40, 5, device=DEVICE)
    spread = x.double().square().sum(1).mean().item() + 5
    for rounding in (-1e-8, 0.0, 1e-8):
        h = torch.tensor((0.5 * spread * (1 + rounding) / 0.2) ** 0.5, dtype=torch.float64, requires_grad=True)
        exact = reference.mmd_to_normal(x.double(), bandwidth=h.item()).item()
        assert fastvae.mmd_to_normal(x, bandwidth=h, backend="triton").item() == pytest.approx(exact, abs=1e-6)


def test_a_ladder_of_many_squarings():
    bandwidth = tuple(0.05 * 2 ** (n / 2) for n in range(40))
    x, y = torch.randn(60, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    exact = evaluate(reference.mmd, x, y, bandwidth=bandwidth)
    assert_close(evaluate(fastvae.mmd, x, y, bandwidth=bandwidth, backend="cpu"), exact, TOLERANCE[torch.float64], 50, 40.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_infinite_row(backend):
    assert fastvae.mmd_to_normal(torch.tensor([[float("inf"), 1.0]]), backend=backend).isnan()


def test_what_needs_no_gradient_may_change_before_backward():
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    _, expected_grad, _ = evaluate(fastvae.mmd, x, y)
    value = fastvae.mmd(x, y)
    y.add_(1)
    value.backward()
    torch.testing.assert_close(x.grad, expected_grad)


def test_tiny_data_and_bandwidth():
    """γ itself overflows float32 here."""
    x, y = torch.randn(50, 3) * 1e-20, torch.randn(40, 3) * 1e-20
    actual = evaluate(fastvae.mmd, x, y, bandwidth=1e-20, backend="cpu")
    assert_close(actual, evaluate(reference.mmd, x.double(), y.double(), bandwidth=1e-20), TOLERANCE[torch.float32], 40)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bandwidth", [1e-30, 1e-20, 1e25, 1e30])
@pytest.mark.parametrize(
    ("kernel", "count"), [("rbf", 1), ("rbf", 2), ("laplace", 2), ("energy", 1), (RationalQuadratic(2.3), 2), (RationalQuadratic(50.0), 2)]
)
def test_bandwidths_of_any_size(kernel, bandwidth, backend, count):
    """With data of their size and of size one, in float32; what float32 can't hold is there zero."""
    h = bandwidth * torch.tensor((1.0, 3.0 if bandwidth < 1 else 0.3), dtype=torch.float64, device=DEVICE)[:count]
    a = torch.tensor((1.0, 0.5), dtype=torch.float64, device=DEVICE)[:count]
    for size in (bandwidth, 1.0):
        x, y = torch.randn(30, 3, device=DEVICE) * size, (torch.randn(20, 3, device=DEVICE) + 0.5) * size
        actual = with_bandwidths(fastvae.mmd, x, y, h, a, kernel=kernel, backend=backend)
        exact = with_bandwidths(reference.mmd, x.double(), y.double(), h, a, kernel=kernel)
        # Of k, and of its derivative to log h, of the narrowest.
        narrow = float(h.min())
        t = size / narrow if kernel in ("laplace", "energy") else (size / narrow) ** 2
        scales = (t, t) if kernel == "energy" else (1.0, min(t, 1.0))
        scales = scales[0], *(float(g.abs().max()) for g in exact[1:3]), scales[1] / narrow, scales[0]
        for got, wanted, scale, tolerance in zip(actual, exact, scales, (1e-5, 1e-4, 1e-4, 1e-4, 1e-5), strict=True):
            least = 1e-37 / bandwidth if wanted.numel() == count and bandwidth < 1 else 1e-37
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=max(tolerance * scale, least))


def test_reference_backend_keeps_the_contract():
    x, y = torch.randn(20, 3), torch.randn(15, 3)
    exact = fastvae.mmd(x.bfloat16(), y.bfloat16())
    dense = fastvae.mmd(x.bfloat16(), y.bfloat16(), backend="reference")
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fastvae.mmd(x, y, backend="reference"), fastvae.mmd(x, y))
    weights = torch.full((20,), 0.05, dtype=torch.float64)
    torch.testing.assert_close(fastvae.mmd(x, y, x_weights=weights, backend="reference"), fastvae.mmd(x, y))


def test_compiled_call_gives_nan_for_what_it_cannot_check():
    x, y = torch.randn(20, 3), torch.randn(15, 3)
    compiled = torch.compile(fastvae.mmd, fullgraph=True, backend="eager")
    assert compiled(x, y, x_weights=torch.full((20,), 0.3)).isnan()
    assert compiled(x, y, bandwidth=torch.tensor([-1.0])).isnan()
    assert compiled(x, y, x_weights=torch.full((20,), 0.05)).isfinite()


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(
    ("wanted", "kernel", "batch", "estimator"),
    [
        (0, "rbf", (), "biased"),
        (0, "laplace", (2,), "unbiased"),
        (1, "rbf", (2,), "unbiased"),
        (1, "laplace", (), "unbiased"),
        (1, "laplace", (2,), "biased"),
    ],
)
def test_a_large_sample_without_gradient_is_swept_apart(monkeypatch, wanted, kernel, batch, estimator):
    from fastvae.kernels import mmd as kernels

    points = [torch.randn(*batch, n, 70, device=DEVICE) for n in (90, 130)]
    options = {"bandwidth": (4.0, 8.0), "kernel": kernel, "estimator": estimator}

    def result(points, **more):
        points = [p.clone().requires_grad_(number == wanted) for number, p in enumerate(points)]
        value = fastvae.mmd(*points, **options, **more)
        return value.detach(), *torch.autograd.grad(value.sum(), points[wanted])

    launches, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args: launches.append(args[0]) or launch(*args))
    together = result(points, backend="triton")
    sweeps = launches.count(kernels.sweep_kernel)
    monkeypatch.setattr(kernels, "_APART", 1)
    apart = result(points, backend="triton")
    assert launches.count(kernels.sweep_kernel) == 3 * sweeps
    exact = result([p.double() for p in points], backend="reference")
    for a, b, e in zip(apart, together, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@needs_triton
@pytest.mark.interpreter
def test_high_precision_of_large_samples_is_the_highest_on_hopper(monkeypatch):
    from fastvae.kernels import config
    from fastvae.kernels import mmd as kernels

    if kernels.device_limits(torch.device(DEVICE)).architecture not in config.WGMMA:
        pytest.skip("another architecture")
    x, y = torch.randn(40, 5, device=DEVICE), torch.randn(30, 5, device=DEVICE)
    wanted = evaluate(fastvae.mmd, x, y, backend="triton", precision="highest")
    assert evaluate(fastvae.mmd, x, y, backend="triton", precision="high")[0] != wanted[0]
    monkeypatch.setattr(kernels, "_APART", 40 * 30)
    assert evaluate(fastvae.mmd, x, y, backend="triton", precision="high")[0] == wanted[0]


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["mmd", "mmd_to_normal"])
def test_options_reach_the_kernels(monkeypatch, name):
    from fastvae.kernels import mmd as kernels

    seen = []
    original = kernels.mmd
    monkeypatch.setattr(kernels, "mmd", lambda *args: seen.append(args[-1]) or original(*args))
    points = [torch.randn(5, 3, device=DEVICE), torch.randn(4, 3, device=DEVICE)][: 1 if name == "mmd_to_normal" else 2]
    getattr(fastvae, name)(*points, backend="triton", precision="ieee")
    fastvae.MMDLoss(backend="triton", precision="high")(*points)
    getattr(fastvae, name)(*points, backend="triton")
    assert seen == ["ieee", "high", "highest"]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        getattr(fastvae, name)(*points, backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen[-1] == "high"


def test_loss_module_passes_its_options_on():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    p, q = torch.softmax(torch.randn(9), 0), torch.softmax(torch.randn(7), 0)
    loss = fastvae.MMDLoss(bandwidth=(1.0, 2.0), bandwidth_weights=(0.3, 0.7))
    options = {"bandwidth": (1.0, 2.0), "bandwidth_weights": (0.3, 0.7)}
    assert loss(x, y, x_weights=p, y_weights=q).item() == fastvae.mmd(x, y, x_weights=p, y_weights=q, **options).item()
    assert loss(x, x_weights=p).item() == fastvae.mmd_to_normal(x, x_weights=p, **options).item()


def test_samples_that_need_no_gradient_may_change_in_place():
    """As long as no second derivative is taken, which needs them."""
    x, y = torch.randn(5, 2, requires_grad=True), torch.randn(4, 2)
    value, expected = fastvae.mmd(x, y), torch.func.grad(fastvae.mmd)(x.detach(), y.clone())
    y.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, x, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="a second derivative needs samples and weights that have not changed since"):
        torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("backend", ["cpu", "inductor"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "dim"), [(33, 5), (256, 20), (512, 20), (1100, 20)])
def test_gradients_lie_as_the_compiler_expects_them(n, dim, kernel, backend):
    """Their fakes are contiguous, which products of some shapes are not."""
    x, y = torch.randn(n, dim, requires_grad=True), torch.randn(n, dim, requires_grad=True)
    for inputs in ((x,), (x, y)):
        loss = fastvae.mmd(x, y if len(inputs) == 2 else y.detach(), kernel=kernel, backend=backend)
        assert all(grad.is_contiguous() for grad in torch.autograd.grad(loss, inputs))
    labels = torch.arange(n) % 3
    others = [fastvae.kernel_matmul(x, y, y, kernel=kernel), fastvae.group_mmd(x, labels, num_groups=3, kernel=kernel).mean()]
    for loss in others:
        assert torch.autograd.grad(loss.sum(), x)[0].is_contiguous()


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(("kernel", "rows"), [*((kernel, (40, 30)) for kernel in DISTANCE_KERNELS), ("laplace", (300, 150))])
def test_triton_takes_differences_where_many_pairs_are_near(kernel, rows):
    """A function of the root, of rows near to one another and one far away: products would lose the directions between them."""
    x, y = (1e-4 * torch.randn(n, 5, device=DEVICE) for n in rows)
    x[0] += 10
    actual = evaluate(fastvae.mmd, x, y, kernel=kernel, bandwidth=10.0, backend="triton")
    exact = evaluate(reference.mmd, x.double(), y.double(), kernel=kernel, bandwidth=10.0)
    for a, e in zip(actual[1:], exact[1:], strict=True):
        assert (a - e)[1:].norm() < 1e-5 * e[1:].norm()


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the threads of a CPU")
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", [case for case in STREAMING_CASES if "several tiles" in case.name], ids=lambda case: case.name)
def test_cpu_of_several_threads(case, threads, monkeypatch):
    """Tiles are larger with more threads; most tests run with one."""
    monkeypatch.setattr(small, "_PAIRS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual, reference_values, _ = run(case, "mmd")
    finally:
        torch.set_num_threads(before)
    assert_close(actual, reference_values, TOLERANCE[case.accumulation_dtype], *size(case))
