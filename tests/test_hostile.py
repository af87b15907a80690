"""What a hostile reading found, each with the case that broke."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import reference
from fastvae.cpu import small
from fastvae.ops import mmd_problem
from fastvae.radial import RBF, RationalQuadratic
from tests.cases import DEVICE, DISTANCE_KERNELS, evaluate, needs_cpu, needs_triton


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_fewer_digits_than_the_points(dtype, weights_dtype):
    x, y = torch.randn(3, 2, device=DEVICE).to(dtype), torch.randn(5, 2, device=DEVICE).to(dtype)
    weights = torch.full((3,), 1 / 3, dtype=weights_dtype, device=DEVICE)
    torch.testing.assert_close(fastvae.mmd(x, y, x_weights=weights), fastvae.mmd(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", DISTANCE_KERNELS)
@pytest.mark.parametrize(("dtype", "distance"), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.float64, 1e-9)])
def test_each_point_near_another_of_the_other_sample(kernel, dtype, distance):
    """Where y is all but x, the near pairs are the whole gradient."""
    x = torch.randn(700, 2, dtype=torch.float64)
    y = (x[torch.randperm(700)] + distance * torch.randn(700, 2, dtype=torch.float64)).to(dtype)
    x = x.to(dtype)
    actual = evaluate(fastvae.mmd, x, y, kernel=kernel, backend="cpu")
    exact = evaluate(reference.mmd, x.double(), y.double(), kernel=kernel)
    # In float32 the sums over far pairs cancel, whose slope is the larger for Riesz.
    bound = {"riesz": 5e-3}.get(kernel, 4e-6) if dtype == torch.float32 else 1e-6 if distance == 1e-6 else 1e-4
    for a, e in zip(actual[1:], exact[1:], strict=True):
        assert relative(a, e) < bound


@needs_cpu
@pytest.mark.parametrize("pairs", [0, 1 << 20])
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 0.3, 2.0])
@pytest.mark.parametrize("kernel", DISTANCE_KERNELS)
def test_near_rows(kernel, distance, pairs, monkeypatch):
    """Distances, and moments made of them, are float32 only where no two rows are too near each other."""
    monkeypatch.setattr(small, "_PAIRS", pairs)
    x, y = torch.randn(150, 16) + 3, torch.randn(120, 16) + 3
    x[1:40:2] = x[:40:2] + distance * torch.randn(20, 16) / 4
    y[:20] = x[60:80] + distance * torch.randn(20, 16) / 4
    actual = evaluate(fastvae.mmd, x, y, kernel=kernel, bandwidth=4.0, backend="cpu")
    exact = evaluate(reference.mmd, x.double(), y.double(), kernel=kernel, bandwidth=4.0)
    for a, e in zip(actual, exact, strict=True):
        assert relative(a, e) < 4e-6


@needs_cpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-8)])
@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-4])
@pytest.mark.parametrize("kernel", DISTANCE_KERNELS)
def test_few_near_rows_are_refined(kernel, distance, dtype, bound, monkeypatch):
    """In the array of all pairs, by themselves."""
    x, y = torch.randn(150, 16, dtype=dtype) + 3, torch.randn(2, 120, 16, dtype=dtype) + 3
    x[1], y[:, 7] = x[0] + distance, x[3] + distance
    for u, v in ((x, y[0]), (x.expand(2, -1, -1), y)):
        exact = evaluate(lambda *z: reference.mmd(*z, kernel=kernel, bandwidth=4.0).sum(), u.double(), v.double())
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cdist", lambda *_, **__: pytest.fail("all distances were computed from differences"))
            patch.setattr(mmd_problem, "_streaming", lambda *_: pytest.fail("tiles took few rows"))
            actual = evaluate(lambda *z: fastvae.mmd(*z, kernel=kernel, bandwidth=4.0, backend="cpu").sum(), u, v)
        for a, e in zip(actual, exact, strict=True):
            assert relative(a, e) < bound


@needs_cpu
@pytest.mark.parametrize("unit", [1e-18, 1e-22, 1e-26])
@pytest.mark.parametrize("kernel", ["laplace", "energy"])
def test_one_sample_in_a_much_smaller_unit_than_the_other(kernel, unit, monkeypatch):
    """Its squared distances are denormal in float32, or 0."""
    monkeypatch.setattr(small, "_PAIRS", 0)
    x, y = torch.randn(400, 32) * unit, torch.randn(150, 32)
    actual = evaluate(fastvae.mmd, x, y, kernel=kernel, bandwidth=4.0, backend="cpu")
    exact = evaluate(reference.mmd, x.double(), y.double(), kernel=kernel, bandwidth=4.0)
    for a, e in zip(actual, exact, strict=True):
        assert relative(a, e) < 4e-6


@pytest.mark.parametrize("outlier", [1e6, 1e10, 1e15])
@pytest.mark.parametrize("kernel", ["rbf", "laplace", "energy"])
def test_one_row_far_from_the_others(kernel, outlier):
    x, y = torch.randn(530, 3), torch.randn(300, 3) + 0.3
    x[5] = outlier
    h = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    actual = evaluate(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h, kernel=kernel, backend="cpu"), x, y, h)
    exact = evaluate(lambda x, y, h: reference.mmd(x, y, bandwidth=h, kernel=kernel), x.double(), y.double(), h)
    errors = [relative(a, e) for a, e in zip(actual, exact, strict=True)]
    # At 1e15 the derivative to the bandwidth is beyond float64.
    assert max(errors if outlier < 1e15 else errors[:3]) < 1e-5


@needs_cpu
@pytest.mark.parametrize("unit", [1e-25, 1e25])
@pytest.mark.parametrize("n", [40, 600])
def test_gradients_of_data_in_a_very_small_or_large_unit(n, unit):
    """1/h² is past the range of float32, the gradients are not."""
    x, y, v, labels = torch.randn(n, 3) * unit, torch.randn(50, 3) * unit, torch.randn(50, 2), torch.arange(n) % 2
    h = torch.tensor(unit, dtype=torch.float64, requires_grad=True)

    def of_rows(x, y, h):
        return fastvae.kernel_matmul(x, y, v.to(x.dtype), bandwidth=h, backend="cpu" if x.dtype == torch.float32 else "reference").sum()

    def of_groups(x):
        backend = "cpu" if x.dtype == torch.float32 else "reference"
        return fastvae.group_mmd(x, labels, num_groups=2, bandwidth=unit, backend=backend).values.sum()

    for function, tensors in ((of_rows, (x, y, h)), (of_groups, (x,))):
        actual, exact = evaluate(function, *tensors), evaluate(function, *(t.double() for t in tensors))
        assert max(relative(a, e) for a, e in zip(actual, exact, strict=True)) < 1e-4


BACKENDS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter]), "reference"]


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("backend", BACKENDS)
def test_fill_values_of_the_issue(backend):
    """A column of which the mean overflows, and rows of 0 and 5 of which the other rows are farther than float64 can tell them apart."""
    x, y = torch.tensor([[2e38, 0.0], [2e38, 1.0]], device=DEVICE), torch.tensor([[2e38, 3.0], [2e38, 4.0]], device=DEVICE)
    assert fastvae.mmd(x, y, backend=backend).item() == pytest.approx(1.527586, rel=1e-5)
    x, y = torch.tensor([[1e20], [1e20], [0.0]], device=DEVICE), torch.tensor([[1e20], [1e20], [5.0]], device=DEVICE)
    assert fastvae.mmd(x, y, backend=backend).item() == pytest.approx(2 / 9, rel=1e-5)


def filled(n, m, fill, where):
    """Samples with a fill value in one column, in most rows or in some cells; the same bits in float32 and float64."""
    x, y = torch.randn(n, 3), torch.randn(m, 3) + 0.5
    for z in (x, y):
        cells = {"column": (slice(None), 0), "rows": slice(len(z) // 3, None), "cells": torch.rand(z.shape) < 0.3}[where]
        z[cells] = fill
    return x.to(DEVICE), y.to(DEVICE)


# Of one sample alone: `test_one_row_far_from_the_others`.
FILLS = [(fill, where) for fill in (1e20, 2e38, -3.4e38) for where in ("column", "rows", "cells")]


@needs_cpu
@pytest.mark.parametrize(("fill", "where"), FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_fill_values(kernel, dtype, fill, where):
    x, y = filled(12, 9, fill, where)
    weights = torch.rand(len(x), dtype=torch.float64)
    weights, h = weights / weights.sum(), torch.tensor([0.5, 2.0], dtype=torch.float64)
    cases = [
        (lambda x, y, of, **options: of.mmd(x, y, bandwidth=(0.5, 2.0), **options), (x, y)),
        (lambda x, y, of, **options: of.mmd(x, y, estimator="unbiased", **options), (x, y)),
        (lambda x, y, of, **options: of.mmd(x, y, x_weights=weights.to(x), **options), (x, y)),
        (lambda x, y, h, of, **options: of.mmd(x, y, bandwidth=h, **options), (x, y, h)),
        (lambda x, of, **options: of.mmd_to_normal(x, **options), (x,)),
    ]
    for function, inputs in cases[: 5 if kernel == "rbf" else 4]:
        actual = evaluate(function, *(t if t is h else t.to(dtype) for t in inputs), of=fastvae, kernel=kernel, backend="cpu")
        expected = evaluate(function, *(t.double() for t in inputs), of=reference, kernel=kernel)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-6 if dtype == torch.float32 else 1e-11)


@needs_cpu
@pytest.mark.parametrize(("fill", "where"), FILLS)
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_fill_values_of_products_and_groups(kernel, fill, where):
    x, y = filled(12, 9, fill, where)
    v = torch.randn(len(y), 2)
    labels = torch.arange(len(x) + len(y)) >= len(x)

    def groups(z, **options):
        return fastvae.group_mmd(z, labels.long(), **options).values[0, 1]

    cases = [
        (lambda *args, **options: fastvae.kernel_matmul(*args, **options).square().sum(), (x, y, v)),
        (groups, (torch.cat([x, y]),)),
        (lambda *args, **options: fastvae.mmd(*args, **options)[0], (torch.stack([x, x + 1]), torch.stack([y, y]))),
    ]
    for function, inputs in cases:
        actual = evaluate(function, *inputs, kernel=kernel, backend="cpu")
        expected = evaluate(function, *(t.double() for t in inputs), kernel=kernel, backend="reference")
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-6 * max(1, e.abs().max().item()))


@needs_cpu
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_fill_values_near_the_largest_float64(kernel):
    """What is infinitely far from all else is another point of which all kernels are zero, as one farther than any h is."""
    x, y = (t.double() for t in filled(12, 9, 1e20, "rows"))
    expected = evaluate(fastvae.mmd, x, y, kernel=kernel, backend="cpu")
    huge = [torch.where(t == 1e20, sign * 1.7e308, t) for t, sign in ((x, 1), (y, 1))]
    for a, e in zip(evaluate(fastvae.mmd, *huge, kernel=kernel, backend="cpu"), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_activation_checkpointing():
    x, y = torch.randn(6, 2, device=DEVICE, requires_grad=True), torch.randn(5, 2, device=DEVICE)
    for loss in (
        lambda x: fastvae.mmd(x, y),
        lambda x: fastvae.kernel_matmul(x, y, y).sum(),
        lambda x: fastvae.kernel_matmul(x, y, y, normalize="both").square().sum(),
        lambda x: fastvae.log_kernel_density(x, y).sum(),
        lambda x: fastvae.group_mmd(x, torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)).mean(),
        lambda x: fastvae.total_correlation(x, x + 1, 0.1 * x, dataset_size=9).total_correlation,
        lambda x: fastvae.sigreg(x, directions=torch.eye(2, device=DEVICE)),
        lambda x: fastvae.reparameterize_kl(x, 0.1 * x, eps=torch.ones_like(x))[1].sum(),
    ):
        (grad,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
        torch.testing.assert_close(grad, torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.slow
def test_compiles_without_gradients_and_with_one_tensor_twice(gradient):
    x = torch.randn(6, 2, device=DEVICE, requires_grad=gradient)
    labels = torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)
    for function in (
        lambda x: fastvae.mmd(x, x, bandwidth=2.0),
        lambda x: fastvae.kernel_matmul(x, x, x),
        lambda x: fastvae.kernel_matmul(x, x, x, normalize="rows"),
        lambda x: fastvae.log_kernel_density(x, x),
        lambda x: fastvae.witness(x, x, x + 1),
        lambda x: fastvae.group_mmd(x, labels, num_groups=2).values,
    ):
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
    # torch 2.6 stops at the context that the sentence is raised in.
    with pytest.raises(Exception, match=r"num_groups must be given|WITH_EXCEPT_START"):
        torch.compile(lambda x: fastvae.group_mmd(x, labels).values, fullgraph=True, backend="aot_eager")(x)


def test_a_kernel_of_the_users_own_is_refused():
    class Heavy(RBF):
        pass

    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="kernel must be one of the classes of fastvae"):
        fastvae.mmd(x, x, kernel=Heavy())


@pytest.mark.parametrize("bandwidth", [1.0, 100.0, 1000.0])
def test_witness_of_a_wide_kernel(bandwidth):
    points, x, y = torch.randn(50, 2), torch.randn(700, 2), torch.randn(600, 2) + 0.2
    exact = fastvae.witness(points.double(), x.double(), y.double(), bandwidth=bandwidth, backend="reference")
    assert relative(fastvae.witness(points, x, y, bandwidth=bandwidth, backend="cpu"), exact) < 2e-5


def test_witness_of_bfloat16():
    points, x, y = (torch.randn(n, 2).bfloat16() for n in (5, 1000, 1003))
    torch.testing.assert_close(fastvae.witness(points, x, y), fastvae.witness(points.float(), x.float(), y.float()))


@pytest.mark.parametrize("alpha", [0.3, 30.0, 1000.0])
def test_rational_quadratic_of_any_alpha(alpha):
    x, y = torch.randn(300, 4), torch.randn(200, 4) + 0.3
    actual = evaluate(fastvae.mmd, x, y, kernel=RationalQuadratic(alpha), backend="cpu")
    exact = evaluate(reference.mmd, x.double(), y.double(), kernel=RationalQuadratic(alpha))
    assert max(relative(a, e) for a, e in zip(actual, exact, strict=True)) < 1e-5


def test_almost_the_expected_upstream_is_another():
    z, labels = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3
    upstream = 1 + 1e-7 * torch.randn(3, 3, dtype=torch.float64)
    actual, exact = (
        evaluate(lambda z, backend=backend: (upstream * fastvae.group_mmd(z, labels, backend=backend).values).sum(), z)[1]
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-14)


def test_vmap_over_weights():
    x, y = torch.randn(4, 2), torch.randn(5, 2)
    weights = torch.rand(3, 4)
    weights = weights / weights.sum(1, keepdim=True)
    actual = torch.vmap(lambda w: fastvae.mmd(x, y, x_weights=w))(weights)
    torch.testing.assert_close(actual, torch.stack([fastvae.mmd(x, y, x_weights=w) for w in weights]))


def test_no_process_group():
    with pytest.raises(TypeError, match="that this process is in, got bool"):
        fastvae.mmd(torch.randn(3, 2), torch.randn(3, 2), process_group=True)


@needs_cpu
@pytest.mark.parametrize("rows", [32, 700])
def test_gradients_of_the_energy_kernel_amid_fill_values(rows):
    x, y = torch.randn(rows, 3), torch.randn(rows + 8, 3)
    x[:-2, :2] = y[:-3, :2] = 1e20
    value, to_x, _ = evaluate(fastvae.mmd, x, y, kernel="energy")
    exact, exact_to_x, _ = evaluate(reference.mmd, x.double(), y.double(), kernel="energy")
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert (to_x.double() - exact_to_x).norm() < 1e-6 * exact_to_x.norm()
