"""Log densities, and products normalised by them, on the CPU path and on the Triton kernels against the dense reference in float64."""

import math

import numpy as np
import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.cpu import small
from fastvae.radial import RationalQuadratic
from tests.cases import DEVICE, evaluate, gradcheck, needs_triton

pytestmark = pytest.mark.usefixtures("interpreter_warnings")

BACKENDS = [None, pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
KERNELS = ["rbf", "imq", "rational_quadratic", "laplace", "matern32", "matern52", RationalQuadratic(0.5), RationalQuadratic(2.3)]
NORMALIZATIONS = ["rows", "columns", "both"]
# Relative errors of values and gradients: some tens of rounding errors of the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def problem(n=70, m=50, d=5, c=3, batch=(), dtype=torch.float64, offset=0.0):
    generator = torch.Generator().manual_seed(1)
    shapes = (n, d), (m, d), (m, c)
    x, y, v = (torch.randn(*batch, *shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return tuple(t.to(DEVICE, dtype) for t in (x + offset, y + offset, v))


def weights(y):
    return torch.rand(y.shape[:-1], dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y)


def assert_near(actual, exact, rtol):
    for a, e in zip(actual, exact, strict=True):
        assert (a.double() - e).norm() <= rtol * e.norm()


def densities(upstream, **options):
    def function(x, y, w):
        density = fastvae.log_kernel_density(x, y, y_weights=w, **options)
        return (density * upstream.to(density)).sum()

    return function


def products(upstream, **options):
    def function(x, y, v):
        out = fastvae.kernel_matmul(x, y, v, **options)
        return (out * upstream.to(out)).sum()

    return function


@pytest.mark.parametrize("bandwidth", [(1.7,), (0.8, 1.6), (60.0,)])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(kernel, streaming, bandwidth, dtype, monkeypatch):
    if streaming:
        monkeypatch.setattr(small, "_PAIRS", 0)
    assert_as_reference(None, kernel, bandwidth, dtype, NORMALIZATIONS, batch=(2,))


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_triton(kernel, dtype):
    several = kernel == "rbf"
    assert_as_reference("triton", kernel, (0.8, 1.6) if several else (1.7,), dtype, NORMALIZATIONS if several else ["both"])


def assert_as_reference(backend, kernel, bandwidth, dtype, normalizations, batch=()):
    x, y, v = problem(n=40, m=30, dtype=dtype, batch=batch)
    options = {"bandwidth": bandwidth, "bandwidth_weights": (0.5, 2.0)[: len(bandwidth)], "kernel": kernel}
    g = torch.randn(*batch, 40, 3, dtype=torch.float64, device=DEVICE)
    functions = [(densities, g[..., 0], {}, weights(y))]
    functions += [(products, g, {"normalize": normalize}, v) for normalize in normalizations]
    for function, upstream, more, last in functions:
        actual = evaluate(function(upstream, backend=backend, precision="highest", **more, **options), x, y, last)
        exact = evaluate(function(upstream, backend="reference", **more, **options), *(t.double() for t in (x, y, last)))
        assert_near(actual, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS[:4])
def test_unnormalised_batches(kernel):
    x, y, v = problem(6, 5, 3, 2, batch=(2, 3))
    with pytest.warns(UserWarning, match="a batch of 6 samples"):
        actual = evaluate(products(torch.ones(1), kernel=kernel, bandwidth=(1.0, 2.0)), x, y, v)
    problems = zip(*(t.flatten(0, 1) for t in (x, y, v)), strict=True)
    exact = [evaluate(products(torch.ones(1), kernel=kernel, bandwidth=(1.0, 2.0)), *problem) for problem in problems]
    for a, parts in zip(actual[1:], list(zip(*exact, strict=True))[1:], strict=True):
        torch.testing.assert_close(a.flatten(0, 1), torch.stack(parts))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_several_tiles_far_from_the_origin(kernel):
    x, y, v = problem(1100, 600, 3, 4, dtype=torch.float32, offset=100.0)
    g = torch.randn(1100, 4, dtype=torch.float64, device=DEVICE)
    for function, upstream, more, last in [
        (densities, g[:, 0], {}, weights(y)),
        (products, g, {"normalize": "both"}, v),
    ]:
        actual = evaluate(function(upstream, kernel=kernel, **more), x, y, last)
        exact = evaluate(function(upstream, kernel=kernel, backend="reference", **more), *(t.double() for t in (x, y, last)))
        assert_near(actual[1:], exact[1:], 2e-5)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", ["rbf", "laplace"])
def test_every_kernel_value_underflows(kernel, backend, streaming, monkeypatch):
    if streaming:
        monkeypatch.setattr(small, "_PAIRS", 0)
    x, y, v = problem(9, 7, 3, 2, dtype=torch.float32)
    options = {"bandwidth": 0.02 if kernel == "rbf" else 0.003, "kernel": kernel}
    x = x + 5
    # Powers are clamped at 2^-100 in float32.
    assert (fastvae.kernel_matmul(x, y, v, **options).abs() < 1e-28).all()
    density = fastvae.log_kernel_density(x, y, backend=backend, **options)
    exact = fastvae.log_kernel_density(x.double(), y.double(), backend="reference", **options)
    torch.testing.assert_close(density.double(), exact, rtol=1e-6, atol=0)
    out = fastvae.kernel_matmul(x, y, torch.ones_like(v), normalize="rows", backend=backend, **options)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_one_row_and_duplicates(kernel, backend):
    x, y, v = problem(1, 1, 3, 2)
    options = {"kernel": kernel, "backend": backend}
    exact = fastvae.log_kernel_density(x, y, kernel=kernel, backend="reference")
    torch.testing.assert_close(fastvae.log_kernel_density(x, y, **options), exact)
    torch.testing.assert_close(fastvae.kernel_matmul(x, y, v, normalize="both", **options), v)
    same = x.expand(4, 3)
    torch.testing.assert_close(fastvae.log_kernel_density(same, same, **options), torch.zeros_like(same[:, 0]), rtol=0, atol=1e-12)
    grads = evaluate(densities(torch.ones(1), **options), same, same, torch.ones_like(same[:, 0]))[1:3]
    assert max(g.abs().max() for g in grads) < 1e-12
    # A weight of zero takes a row out, however near it is.
    y = torch.cat([y, x])
    without = fastvae.log_kernel_density(x, y[:1], y_weights=y.new_ones(1), **options)
    torch.testing.assert_close(fastvae.log_kernel_density(x, y, y_weights=y.new_tensor([1.0, 0.0]), **options), without)
    assert fastvae.log_kernel_density(x, y, y_weights=y.new_zeros(2), **options).item() == -math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_not_finite_stay_visible(backend, value):
    for n in range(2):
        x, y, v = problem(6, 5, 3, 2, dtype=torch.float32)
        (x, y)[n][0, 0] = value
        assert fastvae.log_kernel_density(x, y, backend=backend).isnan().all()
        assert fastvae.kernel_matmul(x, y, v, normalize="columns", backend=backend).isnan().all()
    x, y, v = problem(6, 5, 3, 2, batch=(2,), dtype=torch.float32)
    x[0, 0, 0] = value
    density = fastvae.log_kernel_density(x, y, backend=backend)
    assert density[0].isnan().all()
    assert density[1].isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "backend"), [("rbf", None), ("laplace", None), pytest.param("rbf", *BACKENDS[1].values, marks=BACKENDS[1].marks)]
)
def test_gradcheck(kernel, backend):
    x, y, v = (t.requires_grad_() for t in problem(5, 4, 3, 2))
    h, a = (torch.tensor(t, dtype=torch.float64, device=DEVICE, requires_grad=True) for t in ((0.8, 1.7), (0.3, 2.0)))
    w = weights(y).requires_grad_()

    def density(x, y, w, h, a):
        return fastvae.log_kernel_density(x, y, y_weights=w, bandwidth=h, bandwidth_weights=a, kernel=kernel, backend=backend)

    assert gradcheck(density, (x, y, w, h, a), backend)
    for normalize in NORMALIZATIONS:
        options = {"normalize": normalize, "kernel": kernel, "backend": backend, "bandwidth": (0.8, 1.7)}
        assert gradcheck(lambda *points, options=options: fastvae.kernel_matmul(*points, **options), (x, y, v), backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kernel", ["rbf", "laplace"])
@pytest.mark.parametrize("h", [0.02, 1.0])
def test_weights_of_zero(kernel, backend, streaming, h, monkeypatch):
    """Gradients are those of log Σ_j w_j·Σ_b a_b·k_b, to a row of weight zero and a bandwidth of weight zero too."""
    if streaming:
        monkeypatch.setattr(small, "_PAIRS", 0)
    x, y, _ = problem(6, 5, 2)
    w, a = weights(y), torch.tensor([0.0, 0.7, 1.5], dtype=x.dtype, device=DEVICE)
    w[[1, 3]] = 0
    widths = h * torch.tensor([1.0, 30.0, 60.0], dtype=x.dtype, device=DEVICE)

    def plain(x, y, w, widths, a):
        d2 = (x[:, None] - y).square().sum(-1)[..., None]
        k = (-d2.sqrt() / widths).exp() if kernel == "laplace" else (-0.5 * d2 / widths.square()).exp()
        return ((k @ a) @ w).log().sum()

    def fused(x, y, w, widths, a):
        return fastvae.log_kernel_density(x, y, y_weights=w, bandwidth=widths, bandwidth_weights=a, kernel=kernel, backend=backend).sum()

    for actual, exact in zip(evaluate(fused, x, y, w, widths, a), evaluate(plain, x, y, w, widths, a), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-11)


def test_weights_below_zero_are_nan():
    x, y, _ = problem(6, 5, 2)
    w = weights(y)
    for backend in ("reference", "cpu"):
        for options in ({"y_weights": torch.where(w == w.max(), -1.0, w)}, {"bandwidth": [1.0, 2.0], "bandwidth_weights": [1.0, -1.0]}):
            assert fastvae.log_kernel_density(x, y, backend=backend, **options).isnan().all()


@pytest.mark.parametrize("dim", [1, 4])
def test_is_the_density_of_scipy_and_scikit_learn(dim):
    stats, neighbors = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.neighbors")
    x, y, _ = (t.cpu() for t in problem(20, 30, dim))
    w = weights(y) / weights(y).sum()
    options = {"bandwidth": 0.3, "normalized": True}
    estimate = neighbors.KernelDensity(bandwidth=0.3).fit(y.numpy(), sample_weight=w.numpy())
    expected = estimate.score_samples(x.numpy())
    np.testing.assert_allclose(fastvae.log_kernel_density(x, y, y_weights=w, **options).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(
        fastvae.log_kernel_density(x, y, bandwidth=(0.3, 0.3), bandwidth_weights=(0.25, 0.75), normalized=True).numpy(),
        neighbors.KernelDensity(bandwidth=0.3).fit(y.numpy()).score_samples(x.numpy()), rtol=1e-10,
    )  # fmt: skip
    if dim == 1:
        # Its bandwidth is a multiple of the standard deviation.
        variance = np.cov(y[:, 0].numpy(), aweights=w.numpy())
        scipy = stats.gaussian_kde(y[:, 0].numpy(), bw_method=0.3 / variance**0.5, weights=w.numpy())
        np.testing.assert_allclose(expected, scipy.logpdf(x[:, 0].numpy()), rtol=1e-10)
    double = fastvae.log_kernel_density(x, y, backend="reference", **options)
    torch.testing.assert_close(fastvae.log_kernel_density(x, y, **options), double)


def test_rows_normalised_is_attention():
    x, y, v = problem(12, 9, 8, 4, batch=(2,))
    h = 1.3
    bias = -y.square().sum(-1)[:, None, :] / (2 * h**2)
    expected = torch.nn.functional.scaled_dot_product_attention(x, y, v, bias.expand(2, 12, 9), scale=1 / h**2)
    torch.testing.assert_close(fastvae.kernel_matmul(x, y, v, bandwidth=h, normalize="rows"), expected)


def test_mean_shift():
    x, y, _ = problem()
    h = 0.9
    x.requires_grad_()
    (score,) = torch.autograd.grad(fastvae.log_kernel_density(x, y, bandwidth=h).sum(), x)
    torch.testing.assert_close(x + h**2 * score, fastvae.kernel_matmul(x, y, y, bandwidth=h, normalize="rows"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    x, y, v = problem(dtype=dtype)
    exact = fastvae.log_kernel_density(x.double(), y.double())
    assert fastvae.log_kernel_density(x, y).dtype == torch.float32
    torch.testing.assert_close(fastvae.log_kernel_density(x, y).double(), exact, rtol=1e-5, atol=1e-5)
    x, y, v = (t.float() for t in (x, y, v))
    for call in (lambda: fastvae.log_kernel_density(x, y), lambda: fastvae.kernel_matmul(x, y, v, normalize="both")):
        expected = call()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            torch.testing.assert_close(call(), expected, rtol=0, atol=0)
    grads = evaluate(densities(torch.ones(1)), x.to(dtype), y.to(dtype), weights(y).to(dtype))[1:]
    assert {g.dtype for g in grads} == {dtype}


@pytest.mark.slow
def test_opcheck():
    x, y, v = (t.requires_grad_() for t in problem(6, 5, 3, 2, batch=(2,)))
    kernel = (None, None, [1.3], [1.0], "laplace", [])
    torch.library.opcheck(torch.ops.fastvae.log_kernel_density, (x, y, weights(y).requires_grad_(), *kernel, "", ""))
    for normalize in NORMALIZATIONS:
        torch.library.opcheck(torch.ops.fastvae.normalized_matmul, (x, y, v, *kernel, normalize, "", ""))


def test_second_derivative_raises():
    x, y, v = (t.requires_grad_() for t in problem(5, 4, 3, 2))
    product = fastvae.kernel_matmul(x, y, v, normalize="rows")
    for name, out in (("log_kernel_density", fastvae.log_kernel_density(x, y)), ("kernel_matmul with normalize", product)):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"^{name} has no second derivative"):
            grad.sum().backward()
    (grad,) = torch.autograd.grad(fastvae.log_kernel_density(x, y, backend="reference").sum(), x, create_graph=True)
    grad.square().sum().backward()


def test_reference_is_the_plain_sum():
    x, y, v = problem(6, 5, 3, 2)
    k = reference.kernel_matmul(x, y, torch.eye(5, dtype=x.dtype, device=DEVICE), bandwidth=(0.8, 1.6), kernel="imq")
    options = {"bandwidth": (0.8, 1.6), "kernel": "imq"}
    torch.testing.assert_close(reference.log_kernel_density(x, y, **options), k.mean(1).log())
    torch.testing.assert_close(reference.normalized_matmul(x, y, v, normalize="rows", **options), (k / k.sum(1, keepdim=True)) @ v)
    torch.testing.assert_close(reference.normalized_matmul(x, y, v, normalize="columns", **options), (k / k.sum(0)) @ v)
    both = k / (k.sum(1, keepdim=True) * k.sum(0)).sqrt()
    torch.testing.assert_close(reference.normalized_matmul(x, y, v, normalize="both", **options), both @ v)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_few_rows_of_one_bandwidth(offset):
    """Far from the origin rows have to be centred first, or their products would lose the distances."""
    x, y, _ = problem(dtype=torch.float32, offset=offset)
    g = torch.randn(70, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def weighted(x, y, **options):
        density = fastvae.log_kernel_density(x, y, bandwidth=1.3, **options)
        return (density * g.to(density)).sum()

    exact = evaluate(lambda x, y: weighted(x, y, backend="reference"), x.double(), y.double())
    assert_near(evaluate(weighted, x, y), exact, 1e-5)
    density = fastvae.log_kernel_density(x, y, bandwidth=1.3, normalized=True)
    torch.testing.assert_close(density, fastvae.log_kernel_density(x, y, bandwidth=(1.3,), normalized=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("bandwidth", [(4.0,), (1.0,), (2.0, 4.0, 8.0)], ids=str)
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_few_rows_of_many_features(kernel, bandwidth, close):
    """By products in float32, from k itself or, where that may underflow, from logarithms; distances of equal rows by differences."""
    x, y, v = problem(n=30, m=20, d=64, dtype=torch.float32)
    if close:
        y[0] = x[0]
    # No sum cancels.
    v, g = v.abs(), torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).abs().to(DEVICE)
    options = {"kernel": kernel, "bandwidth": bandwidth, "bandwidth_weights": (0.5, 2.0, 1.0)[: len(bandwidth)]}
    functions = [(densities, g[:, 0], {}, weights(y))]
    functions += [(products, g, {"normalize": normalize}, v) for normalize in NORMALIZATIONS]
    if not close:
        functions.append((products, g, {}, v))
    for function, upstream, more, last in functions:
        actual = evaluate(function(upstream, **more, **options), x, y, last)
        exact = evaluate(function(upstream, backend="reference", **more, **options), *(t.double() for t in (x, y, last)))
        # Errors of exponents of up to 100.
        assert_near(actual, exact, 3e-5)


@pytest.mark.parametrize("normalize", ["rows", "columns", "both"])
def test_gradients_of_a_narrow_bandwidth_in_float32(normalize):
    """Logarithms of millions, whose rounding to float32 would be a factor of the gradients."""
    x, y, v = torch.tensor([[0.3]]), torch.tensor([[-1.0], [0.1], [2.0]]), torch.tensor([1.0, 2.0, 3.0])

    def gradients(function, *points):
        points = [t.clone().requires_grad_() for t in points]
        return torch.autograd.grad(function(*points).sum(), points)

    def product(x, y, v):
        return fastvae.kernel_matmul(x, y, v, bandwidth=1e-3, normalize=normalize)

    for actual, exact in zip(gradients(product, x, y, v), gradients(product, x.double(), y.double(), v.double()), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)

    def density(x, y):
        return fastvae.log_kernel_density(x, y, bandwidth=1e-3)

    for actual, exact in zip(gradients(density, x, y), gradients(density, x.double(), y.double()), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
