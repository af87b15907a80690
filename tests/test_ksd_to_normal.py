"""The kernel Stein discrepancy to N(0, I) against its definition by autograd, the dense reference, and a transcription in numpy."""

import numpy as np
import pytest
import torch
from torch import func

import fastvae
from fastvae import reference
from fastvae.cpu import ksd_to_normal as cpu
from fastvae.ops.common import kernel_arguments
from fastvae.ops.ksd_to_normal import hvp_op, ksd_op
from fastvae.radial import IMQ, RBF, RationalQuadratic
from fastvae.reference.ksd_to_normal import stein_kernel
from fastvae.reference.mmd import bandwidths
from tests.cases import DEVICE, evaluate, gradcheck, needs_cpu, needs_triton, peak_bytes

# Of PyTorch's own, on the first forward-mode call.
pytestmark = [pytest.mark.usefixtures("interpreter_warnings"), pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")]

BACKENDS = [pytest.param(None, marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
# 50 is evaluated from 1 − q.
KERNELS = [RBF(), IMQ(), RationalQuadratic(0.5), RationalQuadratic(2.3), RationalQuadratic(50.0)]
LADDER = {"bandwidth": (0.3, 1.7, 40.0), "bandwidth_weights": (0.5, 2.0, -0.3)}
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_estimator = pytest.mark.parametrize("estimator", ["biased", "unbiased"])


def sample(n=70, d=5, dtype=torch.float64, offset=0.0, scale=0.9):
    generator = torch.Generator().manual_seed(4)
    return (scale * torch.randn(n, d, dtype=torch.float64, generator=generator) + offset).to(DEVICE, dtype)


def assert_as_reference(z, value_rtol, grad_rtol, backend=None, **options):
    """The values of pairs cancel in their mean, so that its error is relative to the mean of their sizes too."""
    value, gradient = evaluate(lambda z: fastvae.ksd_to_normal(z, backend=backend, **options), z)
    exact, exact_gradient = evaluate(lambda z: reference.ksd_to_normal(z, **options), z.double())
    u = stein_kernel(z.double(), *bandwidths(z.double(), options["bandwidth"], options.get("bandwidth_weights")), options["kernel"])
    error = value_rtol * (exact.abs() + 0.1 * u.abs().mean())
    assert value.dtype == z.dtype == gradient.dtype
    assert abs(value.double() - exact) <= error
    assert (gradient.double() - exact_gradient).norm() <= grad_rtol * exact_gradient.norm()
    # Without a gradient.
    assert abs(fastvae.ksd_to_normal(z, backend=backend, **options).double() - exact) <= error


@each_kernel
def test_the_reference_is_the_stein_kernel_of_autograd(kernel):
    """u = trace of ∂x∂y k + score(x)·∂y k + score(y)·∂x k + score(x)·score(y)·k, with the score −x of N(0, I)."""
    z = sample(4, 3)

    def k(x, y):
        return kernel.phi((x - y).square().sum() * kernel.gamma(torch.tensor(1.3, dtype=x.dtype), 3))

    def u(x, y):
        mixed = func.jacfwd(func.grad(k, 1), 0)(x, y)
        return mixed.trace() - x @ func.grad(k, 1)(x, y) - y @ func.grad(k)(x, y) + (x @ y) * k(x, y)

    expected = torch.stack([torch.stack([u(x, y) for y in z]) for x in z])
    one = torch.ones(1, dtype=z.dtype, device=DEVICE)
    torch.testing.assert_close(stein_kernel(z, 1.3 * one, one, kernel), expected)
    torch.testing.assert_close(fastvae.ksd_to_normal(z, bandwidth=1.3, kernel=kernel), expected.mean())


def test_the_inverse_multiquadric_of_the_literature():
    """(c² + d²)^−½ with c = 1.5, in numpy, by its own derivatives. Source: Gorham and Mackey 2017, section 3."""
    z, c, beta = sample(20, 3).cpu().numpy(), 1.5, -0.5
    total = 0.0
    for x in z:
        for y in z:
            r = x - y
            base = c**2 + r @ r
            k, to_x = base**beta, 2 * beta * base ** (beta - 1) * r
            trace = -2 * beta * (base ** (beta - 1) * len(x) + 2 * (beta - 1) * base ** (beta - 2) * (r @ r))
            total += trace - x @ -to_x - y @ to_x + (x @ y) * k
    value = fastvae.ksd_to_normal(torch.tensor(z), kernel=RationalQuadratic(0.5), bandwidth=c, bandwidth_weights=[1 / c])
    assert value.item() == pytest.approx(total / len(z) ** 2, rel=1e-12)


@each_backend
@each_kernel
@pytest.mark.parametrize("options", [{"bandwidth": 1.2}, {"estimator": "unbiased", **LADDER}], ids=["one", "ladder"])
def test_float64(options, kernel, backend):
    assert_as_reference(sample(40), 1e-12, 1e-11, kernel=kernel, backend=backend, **options)


@each_kernel
@needs_cpu
@pytest.mark.parametrize(
    ("n", "d", "offset", "bandwidth"),
    [
        (1, 3, 0.0, 1.0),
        (70, 1, 0.0, 2.0),
        (70, 5, 0.0, 0.3),
        (70, 5, 0.0, 1000.0),
        (70, 5, 1000.0, 1.5),
        pytest.param(530, 4, 0.0, 2.0, marks=pytest.mark.slow),
        pytest.param(530, 4, 1000.0, 100.0, marks=pytest.mark.slow),
    ],
)
def test_float32(kernel, n, d, offset, bandwidth):
    z = sample(n, d, torch.float32, offset)
    assert_as_reference(z, 1e-5, 2e-5, kernel=kernel, bandwidth=bandwidth)
    if n == 70:
        assert_as_reference(z, 1e-5, 2e-5, kernel=kernel, bandwidth=(bandwidth, 3 * bandwidth), estimator="unbiased")


@needs_triton
@pytest.mark.interpreter
@each_kernel
@pytest.mark.parametrize(
    ("n", "d", "offset", "options"),
    [
        (1, 3, 0.0, {"bandwidth": 1.0}),
        (70, 17, 0.0, {"bandwidth": 4.0}),
        (40, 5, 1000.0, {"bandwidth": 300.0, "estimator": "unbiased"}),
        (40, 5, 0.0, {"bandwidth": (0.1, 2.0, 9.0), "estimator": "unbiased"}),
    ],
)
def test_triton_in_float32(kernel, n, d, offset, options):
    assert_as_reference(sample(n, d, torch.float32, offset), 3e-5, 1e-4, kernel=kernel, backend="triton", **options)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize(("precision", "value_rtol", "grad_rtol"), [("ieee", 1e-5, 2e-5), ("high", 1e-3, 5e-3), ("medium", 2e-2, 5e-2)])
def test_precision(precision, value_rtol, grad_rtol):
    value, gradient = evaluate(
        lambda z: fastvae.ksd_to_normal(z, bandwidth=3.0, precision=precision, backend="triton"), sample(80, 8, torch.float32)
    )
    exact, exact_gradient = evaluate(lambda z: reference.ksd_to_normal(z, bandwidth=3.0), sample(80, 8, torch.float32).double())
    assert abs(value - exact) <= value_rtol * exact
    assert (gradient - exact_gradient).norm() <= grad_rtol * exact_gradient.norm()


@each_backend
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_clusters_far_apart_and_duplicates(kernel, backend):
    """Products of rows would lose the distances within a cluster; a row's duplicates are pairs like others."""
    z = sample(60, 4, torch.float32)
    z[:30] += 3000
    z[10:20] = z[0]
    z[40:50] = z[35]
    assert_as_reference(z, 1e-5, 1e-4, kernel=kernel, bandwidth=0.5, estimator="unbiased", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_backend
def test_half_precision(dtype, backend):
    z = sample(60, 4).to(dtype)
    value, gradient = evaluate(lambda z: fastvae.ksd_to_normal(z, backend=backend), z)
    exact, exact_gradient = evaluate(reference.ksd_to_normal, z.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=3e-5)
    assert (gradient.double() - exact_gradient).norm() < 1e-2 * exact_gradient.norm()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(fastvae.ksd_to_normal(z, backend=backend), value)


@each_backend
@each_estimator
@pytest.mark.parametrize("rows", [6, pytest.param(520, marks=pytest.mark.slow)])
def test_batches(rows, estimator, backend):
    if backend == "triton" and rows > 6:
        pytest.skip("takes the same launches as few rows")
    z = torch.stack([sample(rows, 3), 2 * sample(rows, 3) + 1, sample(rows, 3, offset=3e4)])
    options = {"estimator": estimator, "bandwidth": 1.4, "backend": backend}
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=z.dtype, device=DEVICE)
    values, gradient = evaluate(lambda z: fastvae.ksd_to_normal(z, **options) @ weights, z)
    singles = [evaluate(lambda z: fastvae.ksd_to_normal(z, **options), one) for one in z]
    torch.testing.assert_close(values, sum(w * value for w, (value, _) in zip(weights, singles, strict=True)))
    torch.testing.assert_close(gradient, torch.stack([w * g for w, (_, g) in zip(weights, singles, strict=True)]))
    if backend is None:
        with pytest.warns(UserWarning, match="is treated as a batch of 3 samples"):
            assert fastvae.ksd_to_normal(z[None], **options).shape == (1, 3)


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [8, 600])
def test_numbers_that_are_not_finite(bad, rows, backend):
    if backend == "triton" and rows > 8:
        pytest.skip("the interpreter is slow")
    z = sample(rows, 3, torch.float32)
    z[3, 1] = bad
    value, gradient = evaluate(lambda z: fastvae.ksd_to_normal(z, bandwidth=0.1, kernel="rbf", backend=backend), z)
    assert value.isnan()
    assert gradient.isnan().any()


@needs_cpu
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_several_tiles_are_one_array(kernel, monkeypatch):
    z = sample(530, 6, torch.float32)
    options = {"kernel": kernel, **LADDER}
    streamed = evaluate(lambda z: fastvae.ksd_to_normal(z, **options), z)
    monkeypatch.setattr(cpu, "_PAIRS", 1 << 20)
    for a, b in zip(streamed, evaluate(lambda z: fastvae.ksd_to_normal(z, **options), z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@each_backend
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_gradcheck(kernel, backend):
    assert gradcheck(lambda z: fastvae.ksd_to_normal(z, kernel=kernel, backend=backend), (sample(7, 2).requires_grad_(),), backend)


def test_opcheck():
    arguments = kernel_arguments(RationalQuadratic(1.0), [1.5, 2.0], [1.0, 1.0])
    for z, whole, start in ((sample(6, 2), None, 0), (torch.stack([sample(6, 2)] * 2), None, 0), (sample(9, 2)[2:8], sample(9, 2), 2)):
        torch.library.opcheck(ksd_op, (z, whole, *arguments, start, True, "", "", "", True))
    with pytest.raises(RuntimeError, match="was called without the gradient that backward needs"):
        ksd_op(sample(6, 2).requires_grad_(), None, *arguments, 0, True, "", "", "", False)[0].backward()


@each_backend
@each_estimator
def test_shares_of_rows_sum_to_the_whole(estimator, backend):
    """What ranks compute: sums of their rows over all rows, the first of which is inside of a tile."""
    z, arguments = sample(100, 3), kernel_arguments(RBF(), [1.5], [1.0])
    options = estimator == "unbiased", "", backend or "", "", True
    parts = [ksd_op(z[rows], z, *arguments, rows.start, *options) for rows in (slice(0, 70), slice(70, 71), slice(71, 100))]
    value, gradient = evaluate(lambda z: reference.ksd_to_normal(z, kernel="rbf", bandwidth=1.5, estimator=estimator), z)
    torch.testing.assert_close(sum(part[0] for part in parts), value)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


@pytest.mark.slow
def test_compile():
    z = sample(40, 3, torch.float32)
    compiled = torch.compile(lambda z, h: fastvae.ksd_to_normal(2 * z, bandwidth=[h, 3.0]), fullgraph=True, backend="aot_eager")
    for h in (1.0, 2.0):
        for actual, expected in zip(
            evaluate(lambda z, h=h: compiled(z, h), z),
            evaluate(lambda z, h=h: fastvae.ksd_to_normal(2 * z, bandwidth=[h, 3.0]), z),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)


@needs_cpu
@pytest.mark.slow
def test_memory():
    """Beyond what it needs for rows, tiles; not an array of all pairs, which would be 256 MiB."""
    small, large = (peak_bytes(lambda z: fastvae.ksd_to_normal(z, bandwidth=4.0), [torch.randn(n, 16)]) for n in (2048, 8192))
    assert large < 40 << 20
    assert large - small < 40 * (8192 - 2048) * 16


@needs_cpu
def test_rounding_of_coefficients_is_no_bias():
    """x·y follows from d² times a number: rounded, it would be wrong by the same share in all pairs, whose mean is near zero."""
    z = sample(500, 16, torch.float32)
    for kernel in KERNELS[:3]:
        value = fastvae.ksd_to_normal(z, bandwidth=1234.567, kernel=kernel, estimator="unbiased").double()
        exact = reference.ksd_to_normal(z.double(), bandwidth=1234.567, kernel=kernel, estimator="unbiased")
        # Rounding errors of float32 for d² = 26 in 500 rows.
        assert abs(value - exact) < 2e-7


def test_normal_rows_have_none_and_others_have_some():
    z = torch.randn(1000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for kernel in ("rbf", "imq"):
        none, some = (fastvae.ksd_to_normal(t, kernel=kernel, bandwidth=2.0, estimator="unbiased").item() for t in (z, 1.3 * z))
        assert abs(none) < 0.03
        assert some > 0.05


def test_a_bandwidth_on_the_device_gives_the_same():
    z = sample(20, 3)
    for actual, expected in zip(
        evaluate(lambda z: fastvae.ksd_to_normal(z, bandwidth=torch.tensor([1.5, 2.5], device=DEVICE)), z),
        evaluate(lambda z: fastvae.ksd_to_normal(z, bandwidth=np.array([1.5, 2.5])), z),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("n", [7, 700])
def test_a_wide_inverse_multiquadric_in_float32(n, gradient):
    """Its value is of the size of γ, which constants of the size of one would drown."""
    z = (0.01 * torch.randn(n, 8)).requires_grad_(gradient)
    exact = fastvae.ksd_to_normal(z.detach().double(), bandwidth=1e3)
    torch.testing.assert_close(fastvae.ksd_to_normal(z, bandwidth=1e3).detach().double(), exact, rtol=1e-5, atol=0)


def second_derivative(function, z, direction):
    z = z.clone().requires_grad_()
    value = function(z)
    (gradient,) = torch.autograd.grad(value, z, torch.ones_like(value), create_graph=True)
    return torch.autograd.grad(gradient, z, direction)[0]


def assert_second_derivative_as_reference(z, rtol, backend=None, **options):
    direction = sample(*z.shape[-2:]).flip(0).to(z).expand_as(z)
    actual = second_derivative(lambda z: 1.5 * fastvae.ksd_to_normal(z, backend=backend, **options), z, direction)
    expected = second_derivative(lambda z: 1.5 * reference.ksd_to_normal(z, **options), z.double(), direction.double())
    assert actual.dtype == z.dtype
    assert (actual.double() - expected).abs().max() <= rtol * expected.abs().max()


@each_backend
@each_kernel
@each_estimator
@pytest.mark.parametrize("options", [{"bandwidth": 1.2}, LADDER], ids=["one", "ladder"])
def test_second_derivative_in_float64(options, estimator, kernel, backend):
    assert_second_derivative_as_reference(sample(40), 1e-10, backend, kernel=kernel, estimator=estimator, **options)


@each_kernel
@needs_cpu
@pytest.mark.parametrize(
    ("n", "d", "offset", "bandwidth"),
    [
        (1, 3, 0.0, 1.0),
        (70, 1, 0.0, 2.0),
        (70, 5, 0.0, 0.3),
        (70, 5, 0.0, 1000.0),
        (70, 5, 1000.0, 1.5),
        pytest.param(600, 4, 0.0, 2.0, marks=pytest.mark.slow),
        pytest.param(600, 4, 1000.0, 100.0, marks=pytest.mark.slow),
    ],
)
def test_second_derivative_in_float32(kernel, n, d, offset, bandwidth):
    z = sample(n, d, torch.float32, offset)
    assert_second_derivative_as_reference(z, 1e-4, kernel=kernel, bandwidth=bandwidth)
    if n == 70:
        assert_second_derivative_as_reference(z, 1e-4, kernel=kernel, bandwidth=(bandwidth, 3 * bandwidth), estimator="unbiased")


@needs_triton
@pytest.mark.interpreter
@each_kernel
@pytest.mark.parametrize(
    ("n", "d", "offset", "options"),
    [
        (1, 3, 0.0, {"bandwidth": 1.0}),
        (70, 17, 0.0, {"bandwidth": 4.0}),
        (40, 5, 1000.0, {"bandwidth": 300.0, "estimator": "unbiased"}),
        (40, 5, 0.0, {"bandwidth": (0.1, 2.0, 9.0), "estimator": "unbiased"}),
    ],
)
def test_second_derivative_by_triton_in_float32(kernel, n, d, offset, options):
    assert_second_derivative_as_reference(sample(n, d, torch.float32, offset), 1e-4, "triton", kernel=kernel, **options)


@needs_triton
@pytest.mark.interpreter
def test_triton_batch_of_more_than_one_launch(monkeypatch, interpreter_warnings):
    from fastvae.ops import common

    z, direction = (
        torch.stack([sample(6, 3, torch.float64) * n for n in (1, 2, 3)]),
        torch.ones(3, 6, 3, dtype=torch.float64, device=DEVICE),
    )

    def results():
        value = fastvae.ksd_to_normal(leaf := z.clone().requires_grad_(), backend="triton")
        (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        return value, gradient, torch.autograd.grad(gradient, leaf, direction)[0], fastvae.ksd_to_normal(z, backend="triton")

    expected = results()
    monkeypatch.setattr(common, "_MOST_PADDED", 2 * 128 * 16)
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize(("precision", "rtol"), [("ieee", 2e-5), ("high", 5e-3), ("medium", 5e-2)])
def test_precision_of_the_second_derivative(precision, rtol):
    z = sample(80, 70, torch.float32)
    direction = z.flip(0)
    actual = second_derivative(lambda z: fastvae.ksd_to_normal(z, bandwidth=9.0, precision=precision, backend="triton"), z, direction)
    exact = second_derivative(lambda z: reference.ksd_to_normal(z, bandwidth=9.0), z.double(), direction.double())
    assert (actual - exact).abs().max() <= rtol * exact.abs().max()


@needs_triton
@pytest.mark.interpreter
def test_second_derivative_by_triton_with_a_program_for_each_bandwidth(monkeypatch):
    """As on a B200."""
    from fastvae.kernels import ksd_to_normal as kernels
    from fastvae.kernels.config import stein_hessian_config

    monkeypatch.setattr(
        kernels, "stein_hessian_config", lambda dim, products, count, _, power: stein_hessian_config(dim, products, count, 100, power)
    )
    kernels._hessian_configs.cache_clear()
    z = torch.stack([sample(70, 3), 2 * sample(70, 3) + 1])
    assert_second_derivative_as_reference(z, 1e-10, "triton", kernel="rbf", estimator="unbiased", **LADDER)
    assert_second_derivative_as_reference(z[0], 1e-10, "triton", bandwidth=1.2)
    kernels._hessian_configs.cache_clear()


@needs_cpu
@pytest.mark.parametrize("kernel", [RBF(), IMQ(), RationalQuadratic(50.0)], ids=str)
@pytest.mark.parametrize("options", [{"bandwidth": 2.0}, {"estimator": "unbiased", **LADDER}], ids=["one", "ladder"])
def test_second_derivative_of_several_tiles(kernel, options):
    assert_second_derivative_as_reference(sample(530, 3), 1e-10, kernel=kernel, **options)
    assert_second_derivative_as_reference(sample(530, 3, torch.float32, 3.0), 1e-4, kernel=kernel, **options)


@each_backend
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_second_derivative_of_clusters_far_apart_and_duplicates(kernel, backend):
    for offset in (3000, 3e7):
        z = sample(60, 4, torch.float32)
        z[:30] += offset
        z[10:20] = z[0]
        z[40:50] = z[35]
        assert_second_derivative_as_reference(z, 1e-4, backend, kernel=kernel, bandwidth=0.5, estimator="unbiased")


@each_backend
@each_estimator
@pytest.mark.parametrize("rows", [6, pytest.param(520, marks=pytest.mark.slow)])
def test_second_derivative_of_batches(rows, estimator, backend):
    if backend == "triton" and rows > 6:
        pytest.skip("takes the same launches as few rows")
    z = torch.stack([sample(rows, 3), 2 * sample(rows, 3) + 1, sample(rows, 3, offset=3e4)])
    assert_second_derivative_as_reference(z, 1e-10, backend, estimator=estimator, bandwidth=(1.4, 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_backend
def test_second_derivative_in_half_precision(dtype, backend):
    assert_second_derivative_as_reference(sample(60, 4).to(dtype), 1e-2, backend)


@each_kernel
def test_gradgradcheck(kernel):
    """Of Triton the tests above compare the same derivatives with the reference's."""
    for z, options in ((sample(5, 2), {"estimator": "unbiased"}), (torch.stack([sample(4, 2), -sample(4, 2)]), {"bandwidth": [0.7, 2.0]})):
        z.requires_grad_()
        assert torch.autograd.gradgradcheck(
            lambda z, options=options: fastvae.ksd_to_normal(z, kernel=kernel, **options),
            (z,),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
        )


@needs_cpu
@pytest.mark.parametrize("rows", [6, 530])
def test_second_derivatives_of_autograd(rows):
    """In reverse mode, in forward mode and in both, and twice to the factor of the loss."""
    z, direction = sample(rows, 2), sample(rows, 2).flip(0)
    ways = {
        "hvp": lambda f: torch.autograd.functional.hvp(f, z, direction)[1],
        "vhp": lambda f: torch.autograd.functional.vhp(f, z, direction)[1],
        "jvp": lambda f: func.jvp(f, (z,), (direction,))[1],
        "jvp(grad)": lambda f: func.jvp(func.grad(f), (z,), (direction,))[1],
        "grad(jvp)": lambda f: func.grad(lambda z: func.jvp(f, (z,), (direction,))[1])(z),
        "grad(grad)": lambda f: func.grad(lambda z: func.grad(f)(z).square().sum())(z),
        "vmap(jvp(grad))": lambda f: torch.vmap(lambda v: func.jvp(func.grad(f), (z,), (v,))[1])(torch.stack([direction, z])),
        "dual numbers": lambda f: dual_derivative(f, z, direction),
        "dual numbers of a gradient": lambda f: dual_derivative(lambda z: torch.autograd.grad(f(z), z, create_graph=True)[0], z, direction),
    }
    if rows == 6:
        ways |= {
            "hessian": lambda f: torch.autograd.functional.hessian(f, z),
            "hessian, forward mode": lambda f: torch.autograd.functional.hessian(
                f, z, vectorize=True, outer_jacobian_strategy="forward-mode"
            ),
            "jacrev(jacfwd)": lambda f: func.jacrev(func.jacfwd(f))(z),
        }
    for name, way in ways.items():
        actual, expected = (
            way(lambda z, b=backend: fastvae.ksd_to_normal(z, bandwidth=[1.0, 2.0], backend=b).square()) for backend in (None, "reference")
        )
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda message, name=name: f"{name}: {message}")


def dual_derivative(function, z, direction):
    z = z.clone().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        result = function(torch.autograd.forward_ad.make_dual(z, direction))
        return torch.autograd.forward_ad.unpack_dual(result).tangent.detach()


@needs_cpu
def test_a_gradient_of_a_derivative_in_forward_mode():
    z, direction = sample(6, 2).requires_grad_(), sample(6, 2).flip(0)
    gradients = []
    for backend in (None, "reference"):
        with torch.autograd.forward_ad.dual_level():
            value = fastvae.ksd_to_normal(torch.autograd.forward_ad.make_dual(z, direction), backend=backend)
            gradients += torch.autograd.grad(torch.autograd.forward_ad.unpack_dual(value).tangent, z)
    torch.testing.assert_close(*gradients)


@needs_cpu
def test_a_third_derivative_raises_unless_z_is_constant_in_it():
    z, direction = sample(6, 2), sample(6, 2).flip(0)

    def of_factor(function):
        return lambda h: func.jvp(lambda z: func.grad(lambda z: h**3 * function(z))(z), (z,), (direction,))[1].square().sum()

    h = torch.tensor(1.3, dtype=z.dtype)
    actual, expected = (func.grad(of_factor(function))(h) for function in (fastvae.ksd_to_normal, reference.ksd_to_normal))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    ways = [
        lambda: func.grad(lambda z: func.jvp(func.grad(fastvae.ksd_to_normal), (z,), (direction,))[1].sum())(z),
        lambda: func.grad(lambda z: func.hessian(fastvae.ksd_to_normal)(z).sum())(z),
        lambda: second_derivative(lambda z: torch.autograd.grad(fastvae.ksd_to_normal(z), z, create_graph=True)[0].sum(), z, direction),
    ]
    for way in ways:
        with pytest.raises(NotImplementedError, match="ksd_to_normal has no third derivative: call it with backend='reference'"):
            way()


@needs_cpu
def test_second_derivative_with_bandwidths_as_a_tensor():
    z, bandwidths = sample(6, 2), torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    actual, expected = (
        torch.vmap(lambda h, b=backend: func.hessian(lambda z: fastvae.ksd_to_normal(z, bandwidth=h, backend=b))(z))(bandwidths)
        for backend in (None, "reference")
    )
    torch.testing.assert_close(actual, expected)


def test_opcheck_of_the_hessian_product():
    arguments = kernel_arguments(RationalQuadratic(1.0), [1.5, 2.0], [1.0, 1.0])
    z, batch = sample(9, 2), torch.stack([sample(6, 2)] * 2)
    for tensors, start in (((z, z, None, None), 0), ((batch, batch, None, None), 0), ((z[2:8], z[2:8], z, z), 2)):
        torch.library.opcheck(hvp_op, (*tensors, *arguments, start, True, "", ""))


@each_backend
@each_estimator
def test_hessian_products_of_shares_are_rows_of_the_whole(estimator, backend):
    z, direction, arguments = sample(100, 3), sample(100, 3).flip(0), kernel_arguments(RBF(), [1.5], [1.0])
    parts = [
        hvp_op(z[rows], direction[rows], z, direction, *arguments, rows.start, estimator == "unbiased", "", backend or "")
        for rows in (slice(0, 70), slice(70, 71), slice(71, 100))
    ]
    expected = second_derivative(lambda z: reference.ksd_to_normal(z, kernel="rbf", bandwidth=1.5, estimator=estimator), z, direction)
    torch.testing.assert_close(torch.cat(parts), expected)


@each_backend
@pytest.mark.parametrize("rows", [8, 600])
def test_second_derivative_of_numbers_that_are_not_finite(rows, backend):
    if backend == "triton" and rows > 8:
        pytest.skip("the interpreter is slow")
    z, direction = sample(rows, 3, torch.float32), torch.ones(rows, 3, device=DEVICE)
    z[3, 1] = float("inf")
    to_z = second_derivative(lambda z: fastvae.ksd_to_normal(z, bandwidth=0.1, kernel="rbf", backend=backend), z, direction)
    assert to_z.isnan().any()


@needs_cpu
@pytest.mark.slow
def test_memory_of_a_second_derivative():
    """In one sweep of its own, after the value is freed with its tiles."""

    def function(z):
        (gradient,) = torch.autograd.grad(fastvae.ksd_to_normal(z, bandwidth=4.0), z, create_graph=True)
        return gradient.sum()

    small, large = (peak_bytes(function, [torch.randn(n, 16)]) for n in (2048, 8192))
    assert large < 60 << 20
    assert large - small < 120 * (8192 - 2048) * 16
