"""MMD² of a batch of problems of few rows in one Triton kernel, against the reference in float64."""

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.radial import Energy, Laplace, Matern32, Matern52, RationalQuadratic, Riesz
from tests.cases import DEVICE, needs_triton

pytestmark = [needs_triton, pytest.mark.interpreter, pytest.mark.usefixtures("interpreter_warnings")]

# float32, and the errors of float32 arithmetic are all there are: distances come by differences.
RTOL, ATOL = 3e-5, 2e-7


@pytest.fixture(autouse=True)
def no_sweeps(monkeypatch):
    """A problem that goes to the sweeps fails."""
    from fastvae.kernels import mmd

    monkeypatch.setattr(mmd, "prepare", lambda *_, **__: pytest.fail("few rows went to the sweeps"))


def evaluate(function, *points):
    """Values and gradients of their sum."""
    points = [z.detach().clone().requires_grad_() for z in points]
    values = function(*points)
    return values.detach(), *torch.autograd.grad(values.sum(), points)


def compare(x, y, **options):
    actual = evaluate(lambda *points: fastvae.mmd(*points, backend="triton", **options), x, y)
    exact = evaluate(lambda *points: reference.mmd(*points, **options), x.double(), y.double())
    for n, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert a.dtype == torch.float32 if n == 0 else x.dtype
        problems = a.reshape(len(x), -1).double(), e.reshape(len(x), -1)
        for found, wanted in zip(*problems, strict=True):
            error, size = (found - wanted).norm().item(), wanted.norm().item()
            assert error <= RTOL * size + ATOL * (1 if n == 0 else size), f"result {n} is off by {error:.1e} of {size:.1e}"


def points(n, m, features, scale=(0.5, 1.0, 2.0)):
    scale = torch.tensor(scale, device=DEVICE)[:, None, None]
    return torch.randn(len(scale), n, features, device=DEVICE) * scale, torch.randn(len(scale), m, features, device=DEVICE) + 0.5


KERNELS = ["rbf", "imq", RationalQuadratic(0.5), RationalQuadratic(2.3), Laplace(), Energy(), Matern32(), Matern52(), Riesz(0.5)]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("bandwidth", [1.5, (0.7, 1.4, 2.8)], ids=str)
def test_kernels(kernel, estimator, bandwidth):
    compare(*points(4, 3, 11), kernel=kernel, estimator=estimator, bandwidth=bandwidth)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (4, 4, 70), (16, 17, 9)], ids=str)
def test_shapes(shape):
    compare(*points(*shape), bandwidth=4.0)


@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace", "energy"])
@pytest.mark.parametrize("bandwidth", [1e-3, 1e2, 1e20], ids=str)
def test_bandwidths(kernel, bandwidth):
    x, y = points(4, 4, 6)
    if bandwidth < 1:
        # Rows so close that k is neither 0 nor 1.
        x, y = x * 1e-3, y * 1e-3
    compare(x * (bandwidth if bandwidth > 1e10 else 1), y * (bandwidth if bandwidth > 1e10 else 1), kernel=kernel, bandwidth=bandwidth)


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "energy"])
def test_far_from_the_origin_with_duplicates(kernel):
    x, y = points(4, 4, 6)
    x, y = x + 1000, y + 1000
    x[:, 1], y[:, 2] = x[:, 0], x[:, 3]
    compare(x, y, kernel=kernel, estimator="unbiased")


def test_bandwidth_on_the_device():
    x, y = points(4, 4, 6)
    compare(x, y, bandwidth=torch.tensor((0.8, 2.0), dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(wanted):
    x, y = points(3, 5, 6)
    gradients = evaluate(lambda *points: fastvae.mmd(*points, backend="triton"), x, y)
    x.requires_grad_(wanted[0]), y.requires_grad_(wanted[1])
    value = fastvae.mmd(x, y, backend="triton")
    # On a GPU these are kernels of their own, with roundings of their own.
    tolerance = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {"rtol": RTOL, "atol": ATOL}
    torch.testing.assert_close(value.detach(), gradients[0], **tolerance)
    if any(wanted):
        value.sum().backward()
    for z, want, gradient in zip((x, y), wanted, gradients[1:], strict=True):
        assert (z.grad is not None) == want
        if want:
            torch.testing.assert_close(z.grad, gradient, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, y = (z.to(dtype) for z in points(4, 4, 6))
    exact = evaluate(reference.mmd, x.double(), y.double())
    actual = evaluate(lambda *points: fastvae.mmd(*points, backend="triton"), x, y)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=RTOL, atol=ATOL)
    for a, e in zip(actual[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2 * torch.finfo(dtype).eps * e.abs().max().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_seen_in_its_problem_alone(bad):
    x, y = points(3, 9, 6)
    exact = evaluate(lambda *points: fastvae.mmd(*points, backend="triton"), x, y)
    y[1, 8, 5] = bad
    actual = evaluate(lambda *points: fastvae.mmd(*points, backend="triton"), x, y)
    for a, e in zip(actual, exact, strict=True):
        assert a[1].isnan().all()
        torch.testing.assert_close(a[[0, 2]], e[[0, 2]], rtol=0, atol=0)


def test_what_sweeps_take(monkeypatch):
    from fastvae.kernels import few_rows, mmd

    assert few_rows.config_of(*(torch.empty(2, 64, 8, device=DEVICE),) * 2) is not None
    assert few_rows.config_of(torch.empty(2, 65, 1, device=DEVICE), torch.empty(2, 2, 1, device=DEVICE)) is None
    assert few_rows.config_of(*(torch.empty(2, 64, 64, device=DEVICE),) * 2) is None
    assert few_rows.config_of(*(torch.empty(2, 16, 5000, device=DEVICE),) * 2) is not None
    swept = []
    sweep = mmd.mmd
    monkeypatch.undo()
    monkeypatch.setattr(mmd, "mmd", lambda *args: swept.append(args) or sweep(*args))
    x, y = points(4, 3, 5)
    p = torch.full((3, 4), 0.25, device=DEVICE)
    many = [1.0 + n for n in range(7)]
    for options in ({"kernel": "polynomial"}, {"x_weights": p}, {"kernel": RationalQuadratic(50.0)}, {"bandwidth": many}):
        fastvae.mmd(x, y, backend="triton", **options)
    fastvae.mmd(x.double(), y.double(), backend="triton")
    assert len(swept) == 5
