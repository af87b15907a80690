"""Sums of unlike kernels against their terms, one at a time in float64."""

import math

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.cpu import small
from fastvae.radial import IMQ, RBF, Energy, Laplace, Linear, Matern32, Matern52, Polynomial, RationalQuadratic, Riesz, kernel_of
from tests.cases import DEVICE, evaluate, needs_cpu, needs_triton

SUMS = [
    RBF() + Laplace().scaled(2),
    0.5 * RationalQuadratic(0.2) + RationalQuadratic(3.0).scaled(1.5) + IMQ(),
    RBF() + Matern32() + 0.1 * Riesz(0.7),
    RBF() + 0.3 * Linear(),
    Riesz() + Polynomial(2) + 2 * Linear().scaled(1.5),
    0.5 * RBF(),
    Linear(),
]
BACKENDS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]


def samples(dtype, n=30, m=20):
    x = torch.randn(n, 4, dtype=torch.float64, device=DEVICE)
    return x.to(dtype), (torch.randn(m, 4, dtype=torch.float64, device=DEVICE) + 0.5).to(dtype)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kernel", SUMS, ids=lambda kernel: kernel.name)
def test_values_and_gradients(kernel, dtype, rtol, backend, monkeypatch):
    x, y = samples(dtype)
    v = torch.randn(20, 2, dtype=dtype, device=DEVICE)
    options = {"kernel": kernel, "bandwidth": (0.7, 1.5)}
    for pairs in (0, 1 << 20) if backend == "cpu" else (0,):
        monkeypatch.setattr(small, "_PAIRS", pairs)
        for estimator in ("biased", "unbiased"):
            actual = evaluate(fastvae.mmd, x, y, **options, estimator=estimator, backend=backend)
            exact = evaluate(reference.mmd, x.double(), y.double(), **options, estimator=estimator)
            for a, e in zip(actual, exact, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=rtol, atol=rtol * float(e.abs().max()))
        out = fastvae.kernel_matmul(x, y, v, **options, backend=backend)
        expected = reference.kernel_matmul(x.double(), y.double(), v.double(), **options)
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_formula():
    x, y = samples(torch.float64, 3, 3)

    def k(u, v):
        d = math.dist(u, v)
        return 3 * math.exp(-d * d / 2) + math.exp(-d / 2) + 0.5 * sum(s * t for s, t in zip(u, v, strict=True))

    a, b = x.tolist(), y.tolist()
    expected = sum(k(u, v) for u in a for v in a) / 9 + sum(k(u, v) for u in b for v in b) / 9 - 2 * sum(k(u, v) for u in a for v in b) / 9
    kernel = 3 * RBF() + Laplace().scaled(2) + 0.5 * Linear()
    for backend in (None, "reference"):
        assert fastvae.mmd(x, y, kernel=kernel, backend=backend).item() == pytest.approx(expected, rel=1e-11)


def test_a_list_is_a_sum():
    x, y = samples(torch.float64)
    each = [fastvae.mmd(x, y, kernel=kernel) for kernel in ("rbf", "laplace")]
    torch.testing.assert_close(fastvae.mmd(x, y, kernel=["rbf", "laplace"]), sum(each))
    torch.testing.assert_close(fastvae.MMDLoss(kernel=["rbf", Laplace()])(x, y), sum(each))
    torch.testing.assert_close(
        fastvae.witness(x, x, y, kernel=["rbf", "laplace"]), sum(fastvae.witness(x, x, y, kernel=k) for k in ("rbf", "laplace"))
    )


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_radial_kernels_in_other_functions(backend):
    x, y = samples(torch.float64)
    z, labels, kernel = torch.cat([x, y]), torch.arange(50, device=DEVICE) % 2, RBF() + 0.5 * Laplace().scaled(2)
    expected = reference.mmd(z[::2], z[1::2], kernel=kernel)
    torch.testing.assert_close(fastvae.group_mmd(z, labels, kernel=kernel, backend=backend).values[0, 1], expected)
    mean = fastvae.KernelMean.fit(z[1::2], kernel=kernel, bandwidth=1.0, method="all")
    torch.testing.assert_close(fastvae.mmd(z[::2], mean, backend=backend), expected)
    found = fastvae.two_sample_test(x, y, kernel=kernel, bandwidth=1.0, permutations=9, backend=backend)
    assert found.statistic == pytest.approx(reference.mmd(x, y, kernel=kernel, estimator="unbiased").item(), rel=1e-9)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_few_rows(backend):
    x, y = (torch.randn(3, n, 5, device=DEVICE) for n in (4, 6))
    options = {"kernel": RBF() + Laplace() + 0.1 * Riesz(0.7)}
    actual = evaluate(lambda x, y: fastvae.mmd(x, y, **options, backend=backend).sum(), x, y)
    exact = evaluate(lambda x, y: reference.mmd(x, y, **options).sum(), x.double(), y.double())
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("far", [0.0, 100.0])
@pytest.mark.parametrize("h", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("kernel", [Matern52() + Energy() + RationalQuadratic(50.0), Matern52() + RBF().scaled(0.02)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_and_wide_bandwidths(kernel, h, far, backend):
    x, y = (t + far for t in samples(torch.float32))
    x[3], x[5], x[7] = y[2], x[6], y[4] + 0.01
    actual = evaluate(fastvae.mmd, x, y, kernel=kernel, bandwidth=h, backend=backend)
    exact = evaluate(reference.mmd, x.double(), y.double(), kernel=kernel, bandwidth=h)
    for a, e in zip(actual, exact, strict=True):
        assert (a.double() - e).norm() <= 2e-5 * e.norm() + 1e-8


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.interpreter
@needs_triton
def test_one_sweep_on_triton(monkeypatch):
    from fastvae.kernels import kernel_matmul, mmd

    swept = []

    def launch(fn, *args):
        swept.append(fn.fn.__name__)
        return actual(fn, *args)

    actual = mmd.launch
    x, y = samples(torch.float32)
    for module in (mmd, kernel_matmul):
        monkeypatch.setattr(module, "launch", launch)
    options = {"kernel": RBF() + Laplace() + Linear(), "bandwidth": (0.7, 1.5), "backend": "triton"}
    one = {"kernel": "laplace", "bandwidth": (0.7, 1.5), "backend": "triton"}
    counts = []
    for chosen in (options, one):
        for function, arguments in ((fastvae.mmd, (x, y)), (fastvae.kernel_matmul, (x, y, y))):
            swept.clear()
            function(*arguments, **chosen)
            counts.append(swept.copy())
    assert counts[:2] == counts[2:]


@pytest.mark.parametrize("kernel", SUMS, ids=lambda kernel: kernel.name)
def test_gradcheck_with_bandwidths(kernel):
    x, y = (t.requires_grad_() for t in samples(torch.float64, 4, 3))
    h = torch.tensor((0.8, 1.7), dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h, kernel=kernel), (x, y, h))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_far_from_the_origin(estimator, weighted):
    x, y = (t + 100 for t in samples(torch.float32))
    weights = {"x_weights": torch.rand(30, device=DEVICE)} if weighted else {}
    weights = {name: p / p.sum() for name, p in weights.items()}
    exact = reference.mmd(
        x.double(), y.double(), kernel=Linear(), estimator=estimator, **{n: p.double() / p.double().sum() for n, p in weights.items()}
    )
    torch.testing.assert_close(fastvae.mmd(x, y, kernel=Linear(), estimator=estimator, **weights).double(), exact, rtol=1e-5, atol=1e-6)


def test_names_and_parameters_go_through_a_schema():
    for kernel in SUMS[:3]:
        canonical, _ = kernel.canonical()
        assert kernel_of(canonical.name, canonical.parameters) == canonical


@pytest.mark.slow
def test_compiles():
    x, y = samples(torch.float32)
    kernel = RBF() + Laplace().scaled(2) + 0.5 * Linear()
    compiled = torch.compile(lambda x, y: fastvae.mmd(x, y, kernel=kernel), fullgraph=True, backend="aot_eager")
    for a, e in zip(evaluate(compiled, x, y), evaluate(fastvae.mmd, x, y, kernel=kernel), strict=True):
        torch.testing.assert_close(a, e)
    # Parameters that change from call to call
    compiled = torch.compile(lambda x, w: fastvae.mmd(x, y, kernel=RationalQuadratic(w) + w * RBF()), fullgraph=True, backend="aot_eager")
    for w in (1.0, 2.0, 3.0):
        torch.testing.assert_close(compiled(x, w), fastvae.mmd(x, y, kernel=RationalQuadratic(w) + w * RBF()))


def test_sums_by_other_means():
    assert sum([RBF(), Laplace()]) == RBF() + Laplace()
    assert RBF() - Laplace() / 2 == RBF() + -0.5 * Laplace()
    assert -RBF() == -1.0 * RBF()
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + RBF()
    x, _ = samples(torch.float64)
    assert fastvae.ksd_to_normal(x, kernel=1 * RBF()) == fastvae.ksd_to_normal(x, kernel=RBF())
    assert fastvae.mmd_to_normal(x, kernel=sum([RBF()])) == fastvae.mmd_to_normal(x, kernel=RBF())


def test_batches():
    x, y = torch.randn(3, 6, 2, device=DEVICE), torch.randn(3, 5, 2, device=DEVICE)
    kernel = RBF() + Linear()
    values = torch.stack([fastvae.mmd(a, b, kernel=kernel) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(fastvae.mmd(x, y, kernel=kernel), values)
    torch.testing.assert_close(torch.vmap(lambda a, b: fastvae.mmd(a, b, kernel=kernel))(x, y), values)


def test_errors():
    x, y = samples(torch.float64)
    for function, arguments in ((fastvae.group_mmd, (x, torch.arange(30, device=DEVICE) % 2)), (fastvae.two_sample_test, (x, y))):
        with pytest.raises(
            ValueError, match=r"kernel must hold functions of the distance alone, got 'sum:rbf\+linear': mmd and kernel_matmul of two"
        ):
            function(*arguments, kernel=RBF() + Linear())
    with pytest.raises(ValueError, match="kernel must hold at least one kernel, got none"):
        fastvae.mmd(x, y, kernel=[])
    with pytest.raises(ValueError, match="factor must be between 1e-6 and 1e6, got 0"):
        RBF().scaled(0)
    with pytest.raises(ValueError, match=r"the product of factors must be between 1e-6 and 1e6, got 1000000000000\.0"):
        RBF().scaled(1e6).scaled(1e6)
    with pytest.raises(ValueError, match="the product of the weights of a kernel must be a finite number, got inf"):
        1e200 * (1e200 * RBF())
    with pytest.raises(ValueError, match="the weight of a kernel must be a finite number, got nan"):
        math.nan * RBF()
