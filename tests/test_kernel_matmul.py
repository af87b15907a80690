"""K·v on the CPU path and on the Triton kernels against the dense reference in float64."""

import functools
from types import SimpleNamespace

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.cpu import small
from fastvae.radial import KERNELS, RationalQuadratic
from tests.cases import DEVICE, TOLERANCE, TRITON_TOLERANCE, evaluate, gradcheck, needs_triton, without_few_pairs

pytestmark = pytest.mark.usefixtures("interpreter_warnings")

BACKENDS = [None, pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
ALL_KERNELS = [*KERNELS, RationalQuadratic(0.5)]


def problem(n=70, m=50, d=5, c=3, dtype=torch.float64, offset=0.0):
    generator = torch.Generator().manual_seed(1)
    x, y, v = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((n, d), (m, d), (m, c)))
    return tuple(t.to(DEVICE, dtype) for t in (x + offset, y + offset, v))


def relative_errors(actual, exact):
    return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True)]


def loss(function, g, **options):
    """A scalar whose upstream differs from row to row and from column to column."""
    return lambda x, y, v: (function(x, y, v, **options) * g).sum()


@pytest.mark.parametrize("bandwidth", [(0.8, 1.6, 3.2), (60.0,)])
@pytest.mark.parametrize("backend", [*BACKENDS, "streaming", pytest.param("sweeps", marks=BACKENDS[1].marks)])
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(kernel, backend, bandwidth, dtype, monkeypatch):
    if backend == "streaming":
        monkeypatch.setattr(small, "_PAIRS", 0)
        backend = None
    if backend == "sweeps":
        if dtype == torch.float64:
            pytest.skip("float64 has no other way")
        without_few_pairs(monkeypatch)
        backend = "triton"
    x, y, v = problem(dtype=dtype)
    g = torch.randn(70, 3, dtype=torch.float64, device=DEVICE)
    options = {"bandwidth": bandwidth, "bandwidth_weights": (0.5, 1.0, 2.0)[: len(bandwidth)], "kernel": kernel}
    actual = evaluate(loss(fastvae.kernel_matmul, g.to(dtype), backend=backend, precision="highest", **options), x, y, v)
    exact = evaluate(loss(reference.kernel_matmul, g, **options), x.double(), y.double(), v.double())
    out = fastvae.kernel_matmul(x, y, v, backend=backend, precision="highest", **options)
    expected = reference.kernel_matmul(x.double(), y.double(), v.double(), **options)
    tolerance = TOLERANCE[dtype][1] * (5 if backend == "triton" and dtype == torch.float32 else 1)
    assert max(relative_errors((out, *actual[1:]), (expected, *exact[1:]))) < tolerance


@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_several_tiles_far_from_the_origin(kernel):
    x, y, v = problem(1100, 700, 3, 20, torch.float32, 100.0)
    g = torch.randn(1100, 20, dtype=torch.float64, device=DEVICE)
    actual = evaluate(loss(fastvae.kernel_matmul, g.float(), kernel=kernel), x, y, v)
    exact = evaluate(loss(reference.kernel_matmul, g, kernel=kernel), x.double(), y.double(), v.double())
    assert max(relative_errors(actual[1:], exact[1:])) < 2e-5


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace", "polynomial"])
@pytest.mark.parametrize("precision", ["ieee", "high", "medium"])
def test_triton_precisions(precision, kernel, monkeypatch):
    without_few_pairs(monkeypatch)
    x, y, v = problem(dtype=torch.float32)
    g = torch.randn(70, 3, dtype=torch.float64, device=DEVICE)
    options = {"bandwidth": 1.7, "kernel": kernel}
    precise = {"backend": "triton", "precision": precision, **options}
    actual = evaluate(loss(fastvae.kernel_matmul, g.float(), **precise), x, y, v)
    exact = evaluate(loss(reference.kernel_matmul, g, **options), x.double(), y.double(), v.double())
    out, expected = fastvae.kernel_matmul(x, y, v, **precise), reference.kernel_matmul(x.double(), y.double(), v.double(), **options)
    assert max(relative_errors((out, *actual[1:]), (expected, *exact[1:]))) < TRITON_TOLERANCE[precision][1]


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace", "energy"])
@pytest.mark.parametrize(("dtype", "distance"), [(torch.float32, 100.0), (torch.float64, 1e4)])
@pytest.mark.parametrize("few", [True, False])
def test_triton_clusters_far_apart_with_a_small_bandwidth(kernel, dtype, distance, few, monkeypatch):
    """Where products lose the distances within a cluster, differences keep them."""
    if not few:
        without_few_pairs(monkeypatch)
    x, y, v = problem(40, 30, 3, 2)
    x, y = (0.1 * z + distance * (torch.arange(len(z), device=DEVICE) % 2)[:, None] for z in (x, y))
    y[0] = x[0]
    x, y, v = (t.to(dtype) for t in (x, y, v))
    g = torch.randn(40, 2, dtype=torch.float64, device=DEVICE)
    options = {"bandwidth": (0.2, 0.1), "kernel": kernel}
    actual = evaluate(loss(fastvae.kernel_matmul, g.to(dtype), backend="triton", **options), x, y, v)
    exact = evaluate(loss(reference.kernel_matmul, g, **options), x.double(), y.double(), v.double())
    assert max(relative_errors(actual[1:], exact[1:])) < TOLERANCE[dtype][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """On Triton of one kernel, as the values and gradients of all are compared with the reference's."""
    x, y, v = (t.requires_grad_() for t in problem(5, 4, 3, 2))
    for kernel in ["rbf"] if backend else KERNELS:
        function = functools.partial(fastvae.kernel_matmul, kernel=kernel, backend=backend)
        assert gradcheck(function, (x, y, v), backend)


def test_cpu_a_small_sum_keeps_its_digits():
    """Of a row, −Σv of the narrow bandwidth and nearly Σv of the wide one."""
    x, v = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.1], [0.3], [-0.5]])
    options = {"bandwidth": (1e3, 1e-3), "backend": "cpu"}
    exact = fastvae.kernel_matmul(x.double(), x.double(), v.double(), **options)
    assert exact[0].abs() < 1e-5
    torch.testing.assert_close(fastvae.kernel_matmul(x, x, v, **options)[0].double(), exact[0], rtol=1e-4, atol=0)


def test_gradient_to_the_bandwidths():
    x, y, v = (t.requires_grad_() for t in problem(5, 4, 3, 2))
    h, a = (torch.tensor(t, dtype=torch.float64, device=DEVICE, requires_grad=True) for t in ((0.8, 1.7), (0.3, 2.0)))
    assert torch.autograd.gradcheck(lambda *t: fastvae.kernel_matmul(*t[:3], bandwidth=t[3], bandwidth_weights=t[4]), (x, y, v, h, a))


@pytest.mark.parametrize("row", [0, 5])
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("sweeps", marks=BACKENDS[1].marks)])
def test_gradient_to_the_bandwidth_with_a_row_far_from_the_others(backend, kernel, row, monkeypatch):
    """It is a sum of gradients times distances: those of the others would not cancel beside the distance to the far one."""
    if backend == "sweeps":
        without_few_pairs(monkeypatch)
        backend = "triton"
    x, y, v = problem(dtype=torch.float32)
    x[row] = 1e20
    h = torch.tensor(1.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    gradient = evaluate(lambda h: fastvae.kernel_matmul(x, y, v, kernel=kernel, bandwidth=h, backend=backend).sum(), h)[1]
    double = [t.double() for t in (x, y, v)]
    exact = evaluate(lambda h: reference.kernel_matmul(*double, kernel=kernel, bandwidth=h).sum(), h)[1]
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=0)


def test_autocast_computes_in_float32():
    x, y, v = problem(dtype=torch.float32)
    h = torch.tensor([0.8, 1.7], device=DEVICE, requires_grad=True)
    exact = fastvae.kernel_matmul(x, y, v, bandwidth=h)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(fastvae.kernel_matmul(x, y, v, bandwidth=h), exact, rtol=0, atol=0)


def test_vector_and_a_sample_with_itself():
    x, _, _ = problem()
    v = torch.randn(70, dtype=torch.float64, device=DEVICE)
    for kernel in KERNELS:
        actual = evaluate(lambda x, v, k=kernel: (fastvae.kernel_matmul(x, x, v, kernel=k) * v).sum(), x, v)
        exact = evaluate(lambda x, v, k=kernel: (reference.kernel_matmul(x, x, v, kernel=k) * v).sum(), x, v)
        torch.testing.assert_close(actual, exact)


def test_witness_is_the_difference_of_mean_embeddings_and_averages_to_mmd():
    x, y, _ = problem()
    at_x, at_y = fastvae.witness(x, x, y, bandwidth=1.3), fastvae.witness(y, x, y, bandwidth=1.3)
    torch.testing.assert_close(at_x.mean() - at_y.mean(), fastvae.mmd(x, y, bandwidth=1.3))


def test_opcheck():
    x, y, v = (t.requires_grad_() for t in problem(5, 4, 3, 2))
    h = torch.ones(1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastvae.kernel_matmul.default, (x, y, v, h, h, [], [], "rbf", [], "", ""))
    torch.library.opcheck(
        torch.ops.fastvae.kernel_matmul_backward.default,
        (
            torch.randn(5, 2, dtype=torch.float64, device=DEVICE),
            *(t.detach() for t in (x, y, v)),
            h,
            h,
            [],
            [],
            "rbf",
            [],
            "",
            "",
            True,
            False,
            True,
            False,
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_nan_out(backend):
    x, y, v = problem(5, 4, 3, 2)
    for t, finite in ((y, y.clone()), (v, v.clone())):
        t[1, 1] = float("nan")
        assert fastvae.kernel_matmul(x, y, v, backend=backend).isnan().all()
        _, *gradients = evaluate(lambda *inputs: fastvae.kernel_matmul(*inputs, backend=backend).sum(), x, y, v)
        assert all(gradient.isnan().all() for gradient in gradients)
        t.copy_(finite)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_triton_few_pairs_that_are_not_finite(bad):
    """In float32 a row of x alone is lost with its own numbers, a number of y or v loses all that depends on it."""
    inputs = problem(20, 9, 3, 2, torch.float32)
    for lost in range(3):
        x, y, v = (t.clone() for t in inputs)
        (x, y, v)[lost][1, 1] = bad
        _, to_x, to_y, to_v = evaluate(lambda *t: fastvae.kernel_matmul(*t, backend="triton").sum(), x, y, v)
        out = fastvae.kernel_matmul(x, y, v, backend="triton")
        if lost == 0:
            assert out[1].isnan().all()
            assert to_x[1].isnan().all()
            assert to_y.isnan().all()
            assert to_v.isnan().all()
            assert out[2:].isfinite().all()
        else:
            assert out.isnan().all()
            assert to_x.isnan().all()
            assert to_y[1].isnan().all()
            assert to_v[1].isnan().all() or lost == 2


@needs_triton
@pytest.mark.interpreter
def test_triton_few_pairs_have_bounds(monkeypatch):
    from fastvae.kernel_sums import KernelNumbers
    from fastvae.kernels import few_pairs
    from fastvae.radial import RBF

    def few(n, m, features, columns, dtype=torch.float32, bandwidths=1):
        x, y = (torch.empty(size, features, dtype=dtype, device="meta") for size in (n, m))
        numbers = KernelNumbers.of(RBF(), (1.0,) * bandwidths, (1.0,) * bandwidths, features, False, torch.device("cpu"))
        return few_pairs.plan_if_few(numbers, x, y, columns) is not None

    assert few(2048, 2048, 64, 32)
    assert few(4096, 4096, 16, 16)
    assert few(10, 1_000_000, 16, 16)
    assert not few(4096, 4096, 64, 16)
    assert not few(10, 10, 65, 1)
    assert not few(10, 10, 2, 33)
    assert not few(10, 10, 2, 2, torch.float64)
    assert few(10, 10, 2, 2, bandwidths=6)
    assert not few(10, 10, 2, 2, bandwidths=7)
    monkeypatch.setattr(few_pairs, "_is_captured", lambda x: True)
    assert few(512, 512, 16, 16)
    assert not few(1024, 1024, 16, 16)


@needs_triton
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Else on a second GPU they read the memory of the first."""
    from fastvae.kernels import launch

    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(launch.torch.cuda, "device", Device)
    monkeypatch.setattr(launch.torch.cuda, "current_device", lambda: 1 if entered else 0)
    kernel = {(4, 5, 6): lambda *args: entered.append(args)}
    monkeypatch.setitem(launch._compiled, ("function", torch.device("cuda", 1), "key"), (kernel, ("constant",)))
    launch.launch(SimpleNamespace(fn="function"), "key", torch.device("cuda", 1), (4, 5, 6), ("argument",), dict)
    assert entered == [torch.device("cuda", 1), ("argument", "constant"), "left"]
