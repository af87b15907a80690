"""Quadratic forms and the MMD between groups against the dense reference and against one MMD a pair."""

import itertools

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.cpu import small
from fastvae.ops.common import kernel_arguments
from fastvae.ops.quadratic_form import quadratic_form_op
from fastvae.radial import KERNELS
from tests.cases import DEVICE, INTEGERS, Copies, evaluate, gradcheck, needs_cpu, needs_triton, without_few_pairs

pytestmark = pytest.mark.usefixtures("interpreter_warnings")

BACKENDS = [None, pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]


def groups_of_rows(n=90, d=4, groups=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(groups, (n,), generator=generator)
    z = torch.randn(n, d, dtype=torch.float64, generator=generator) + 0.3 * labels[:, None]
    return z.to(DEVICE, dtype), labels.to(DEVICE)


def one_by_one(z, labels, groups, **options):
    values = z.new_zeros(groups, groups)
    for g, h in itertools.permutations(range(groups), 2):
        values = values.index_put((torch.tensor(g), torch.tensor(h)), reference.mmd(z[labels == g], z[labels == h], **options))
    return values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("estimator", "upstream"), [("biased", "uniform"), ("unbiased", "any")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_group_mmd_is_one_mmd_a_pair(kernel, estimator, upstream, backend):
    z, labels = groups_of_rows()
    weights = (
        torch.ones(5, 5, dtype=torch.float64, device=DEVICE)
        if upstream == "uniform"
        else torch.randn(5, 5, dtype=torch.float64, device=DEVICE)
    )
    options = {"kernel": kernel, "estimator": estimator, "bandwidth": (1.1, 2.3)}
    actual = evaluate(lambda z: (weights * fastvae.group_mmd(z, labels, backend=backend, **options).values).sum(), z)
    exact = evaluate(lambda z: (weights * one_by_one(z, labels, 5, **options)).sum(), z)
    torch.testing.assert_close(actual, exact)
    torch.testing.assert_close(fastvae.group_mmd(z, labels, backend=backend, **options).values, one_by_one(z, labels, 5, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
def test_many_soft_groups_and_weights_of_bandwidths_in_a_tensor(kernel, estimator, backend):
    """More groups than a block of a kernel has, some of them without a member."""
    z, _ = groups_of_rows(150)
    weights = torch.rand(150, 70, dtype=torch.float64, device=DEVICE).sub(0.9).clamp(min=0)
    weights[:, ::9] = 0
    upstream = torch.randn(70, 70, dtype=torch.float64, device=DEVICE).T
    options = {"kernel": kernel, "estimator": estimator, "bandwidth_weights": torch.tensor([0.3], dtype=torch.float64, device=DEVICE)}
    results = [
        evaluate(lambda z, b=b: (upstream * fastvae.group_mmd(z, weights, backend=b, **options).values).sum(), z)
        for b in (backend, "reference")
    ]
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("bandwidth", [1.0, 40.0])
def test_several_tiles_in_float32(bandwidth):
    z, labels = groups_of_rows(1300, 6, 7, torch.float32)
    actual = evaluate(lambda z: fastvae.group_mmd(z, labels, bandwidth=bandwidth, estimator="unbiased").mean(), z)
    exact = evaluate(lambda z: one_by_one(z, labels, 7, bandwidth=bandwidth, estimator="unbiased").sum() / 42, z.double())
    assert actual[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    assert (actual[1].double() - exact[1]).norm() < 1e-5 * exact[1].norm()


@needs_triton
@pytest.mark.interpreter
# Every pair of two of these.
@pytest.mark.parametrize(
    ("bandwidth", "few", "soft"),
    [
        ((1.0,), True, False),
        ((1.0,), False, True),
        ((40.0,), True, True),
        ((40.0,), False, False),
        ((0.3, 1.0, 300.0), True, False),
        ((0.3, 1.0, 300.0), False, True),
    ],
)
def test_triton_in_float32(bandwidth, few, soft, monkeypatch):
    if not few:
        without_few_pairs(monkeypatch)
    z, labels = groups_of_rows(300, 6, 7, torch.float32)
    options = {"bandwidth": bandwidth, "estimator": "unbiased", "kernel": "imq"}
    groups = torch.rand(300, 7, device=DEVICE) + torch.nn.functional.one_hot(labels, 7) if soft else labels
    weights = torch.randn(7, 7, dtype=torch.float64, device=DEVICE)
    actual = evaluate(lambda z: (weights * fastvae.group_mmd(z, groups, backend="triton", **options).values).sum(), z)
    exact = evaluate(
        lambda z: (weights * fastvae.group_mmd(z, groups.double() if soft else groups, backend="reference", **options).values).sum(),
        z.double(),
    )
    assert actual[0].item() == pytest.approx(exact[0].item(), rel=1e-4)
    assert (actual[1].double() - exact[1]).norm() < 1e-4 * exact[1].norm()


@pytest.mark.parametrize("rows", [7, 13])
def test_equal_rows_far_from_the_origin(rows):
    """Their mean in float32 is none of them: distances from it would have roundings, and MMD² and its gradient with them."""
    z = torch.full((rows, 3), 9999.7, device=DEVICE)
    weights = torch.rand(rows, 2, device=DEVICE)
    value, gradient = evaluate(lambda z: fastvae.group_mmd(z, weights, bandwidth=1e-3, estimator="biased").mean(), z)
    assert value.abs() < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_and_pairs_of_every_integer_dtype(dtype):
    z, labels, pairs = torch.randn(9, 2, device=DEVICE), torch.tensor([0, 1, 2] * 3, device=DEVICE), torch.tensor([[0, 1], [2, 1]])
    expected = fastvae.group_mmd(z, labels, pairs=pairs).values
    for num_groups in (None, 3):
        found = fastvae.group_mmd(z, labels.to(dtype), num_groups=num_groups, pairs=pairs.to(dtype)).values
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"groups must hold integers or floating-point weights, got torch\.bool"):
        fastvae.group_mmd(z, labels > 0)
    with pytest.raises(ValueError, match=r"pairs must be pairs of integers, shape \(P, 2\), got shape \(2, 2\) of torch\.bool"):
        fastvae.group_mmd(z, labels, pairs=pairs > 0)


def test_soft_weights_and_pairs():
    """The local MMD: class c of one domain against class c of the other, rows weighted by their probabilities."""
    z, _ = groups_of_rows(60)
    probabilities = torch.rand(60, 3, dtype=torch.float64, device=DEVICE)
    weights = torch.zeros(60, 6, dtype=torch.float64, device=DEVICE)
    weights[:25, :3], weights[25:, 3:] = probabilities[:25], probabilities[25:]
    actual = evaluate(lambda z: fastvae.group_mmd(z, weights, pairs=[(c, c + 3) for c in range(3)]).mean(), z)

    def local(z):
        p, q = (t / t.sum(0) for t in (probabilities[:25], probabilities[25:]))
        return sum(reference.mmd(z[:25], z[25:], x_weights=p[:, c], y_weights=q[:, c]) for c in range(3)) / 3

    torch.testing.assert_close(actual, evaluate(local, z))


def test_overlapping_soft_groups_count_a_row_with_itself():
    z, _ = groups_of_rows(30)
    weights = torch.rand(30, 3, dtype=torch.float64, device=DEVICE)
    p = weights / weights.sum(0)
    for kernel in KERNELS:
        values = fastvae.group_mmd(z, weights, kernel=kernel).values
        expected = reference.mmd(z, z, x_weights=p[:, 0], y_weights=p[:, 2], kernel=kernel)
        torch.testing.assert_close(values[0, 2], expected)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_small_groups_are_excluded_and_reported(estimator):
    z, labels = groups_of_rows(40, groups=3)
    labels = torch.where(labels == 1, 4, labels)
    labels[0] = 3
    result = fastvae.group_mmd(z.requires_grad_(), labels, num_groups=6, estimator=estimator)
    assert result.valid.tolist() == [True, False, True, False, True, False]
    assert result.values.isfinite().all()
    assert not result.values[3].any()
    (grad,) = torch.autograd.grad(result.mean(), z)
    assert not grad[0].any()
    assert grad[1:].any()
    pairs = [(0, 2), (0, 4), (2, 4)]
    expected = sum(fastvae.mmd(z[labels == g], z[labels == h], estimator=estimator) for g, h in pairs) / 3
    torch.testing.assert_close(result.mean(), expected)


@needs_cpu
def test_a_uniform_upstream_costs_no_second_sweep(monkeypatch):
    from fastvae.ops import quadratic_form as op

    sweeps = []
    original = op._evaluate
    monkeypatch.setattr(op, "_evaluate", lambda *args, **options: sweeps.append(1) or original(*args, **options))
    z, labels = groups_of_rows()
    z.requires_grad_()
    for estimator in ("biased", "unbiased"):
        result = fastvae.group_mmd(z, labels, backend="cpu", estimator=estimator)
        torch.autograd.grad(3 * result.mean() + result.values.triu().sum(), z)
    assert len(sweeps) == 2
    torch.autograd.grad(fastvae.group_mmd(z, labels, backend="cpu").values[0].sum(), z)
    assert len(sweeps) == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_quadratic_form(kernel, backend):
    z, _ = groups_of_rows(40)
    v, h = torch.randn(40, 3, dtype=torch.float64, device=DEVICE), torch.tensor([1.3, 50.0], dtype=torch.float64)
    for diagonal in (False, True):

        def form(z, diagonal=diagonal):
            return quadratic_form_op(z, v, *kernel_arguments(KERNELS[kernel], h, [1.0, 1.0]), "", backend or "", diagonal)

        torch.testing.assert_close(form(z), reference.quadratic_form(z, v, bandwidth=h, kernel=kernel, diagonal=diagonal))


@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2)], torch.tensor([[0, 1], [1, 2]])])
def test_group_mmd_copies_pairs_to_a_device_once(pairs, kernel):
    z, labels = torch.empty(6, 2, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    for _ in range(2):
        with Copies() as copies:
            fastvae.group_mmd(z, labels, num_groups=3, pairs=pairs, kernel=kernel)
    assert not copies.found


def test_opcheck():
    z, _ = groups_of_rows(8)
    v = torch.randn(8, 3, dtype=torch.float64, device=DEVICE)
    arguments = (z.requires_grad_(), v, *kernel_arguments(KERNELS["rbf"], [1.0], [1.0]), "", "")
    for diagonal in (False, True):
        torch.library.opcheck(torch.ops.fastvae.quadratic_form.default, (*arguments, diagonal))
    ones = torch.ones(3, dtype=torch.float64, device=DEVICE)
    for given in (None, torch.tensor([[0, 1], [0, 2]], device=DEVICE)):
        weights = (ones, ones, 8 * ones, False, given)
        torch.library.opcheck(torch.ops.fastvae.group_mmd.default, (*arguments, *weights, given is None and DEVICE == "cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    z, _ = groups_of_rows(7, 3, 2)
    weights = torch.rand(7, 2, dtype=torch.float64, device=DEVICE)
    for kernel in ["rbf"] if backend else KERNELS:
        options = {"kernel": kernel, "backend": backend}
        assert gradcheck(lambda z, o=options: fastvae.group_mmd(z, weights, **o).values[0, 1], (z.requires_grad_(),), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_excluded_group_touches_no_other(backend):
    """Of one member, whose weight is past float32."""
    z, weights = torch.randn(6, 3, device=DEVICE, requires_grad=True), torch.rand(6, 3, dtype=torch.float64, device=DEVICE)
    weights[:, 2] = torch.eye(6, dtype=torch.float64, device=DEVICE)[0] * 1e39
    result = fastvae.group_mmd(z, weights, backend=backend)
    (gradient,) = torch.autograd.grad(result.mean(), z)
    assert result.valid.tolist() == [True, True, False]
    torch.testing.assert_close(result.values[:2, :2], fastvae.group_mmd(z, weights[:, :2], backend=backend).values)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("weights", [[1.0], [0.7], [2.0, 0.5, 1.5]])
@pytest.mark.parametrize("name", ["rbf", "rational_quadratic", "laplace"])
def test_the_matrix_of_few_rows(name, weights):
    z, h = torch.randn(20, 4), [3.0, 1.5, 20.0][: len(weights)]
    matrix, shift = small.kernel_matrix(KERNELS[name], h, weights, z)
    basis = torch.eye(20, dtype=torch.float64)
    dense = reference.kernel_matmul(z.double(), z.double(), basis, bandwidth=h, bandwidth_weights=weights, kernel=KERNELS[name])
    torch.testing.assert_close(matrix.double() + shift * (1 - basis), dense * (1 - basis), rtol=1e-5, atol=1e-5)
