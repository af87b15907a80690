"""A bandwidth for each problem of a batch, against a loop over the problems."""

import pytest
import torch

import fastvae
from tests.cases import DEVICE, evaluate, gradcheck, needs_triton

WARNS = pytest.mark.filterwarnings("ignore:. of shape .* is treated as a batch")


def batch(*sizes, dtype=torch.float64, offset=0.0):
    x, y = (torch.randn(*sizes, rows, 3, dtype=torch.float64, device=DEVICE) + offset for rows in (5, 4))
    h = torch.logspace(-0.5, 1.5, x.shape[:-2].numel(), dtype=torch.float64, device=DEVICE).reshape(*sizes, 1)
    return x.to(dtype), (y + 0.5).to(dtype), h


def one_by_one(x, y, h, **options):
    """The sum over problems, weighted so that an exchange of two of them is seen."""
    problems = zip(x.flatten(0, -3), y.flatten(0, -3), h.flatten(), strict=True)
    return sum((n + 1) * fastvae.mmd(*rows, bandwidth=width, **options) for n, (*rows, width) in enumerate(problems))


def together(x, y, h, **options):
    values = fastvae.mmd(x, y, bandwidth=h, **options)
    assert values.shape == x.shape[:-2]
    return values.flatten() @ torch.arange(1, 1 + values.numel(), dtype=values.dtype, device=values.device)


@WARNS
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace", "matern32", "energy", ("rbf", "laplace")], ids=str)
def test_values_and_gradients(kernel, estimator, backend):
    options = {"kernel": kernel, "estimator": estimator, "backend": backend}
    points = batch(2, 2)
    actual, exact = (evaluate(f, *points, **options) for f in (together, one_by_one))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_weights_and_gradcheck():
    x, y, h = batch(2)
    p = torch.rand(2, 5, dtype=torch.float64, device=DEVICE)
    p = p / p.sum(-1, keepdim=True)
    exact = torch.stack([fastvae.mmd(*rows, bandwidth=width, x_weights=q) for *rows, width, q in zip(x, y, h, p, strict=True)])
    torch.testing.assert_close(fastvae.mmd(x, y, bandwidth=h, x_weights=p), exact)
    points = tuple(t.requires_grad_() for t in (x, y, h))
    assert gradcheck(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h, x_weights=p), points, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_the_origin(dtype):
    """The rows as they are after rounding: differences of these are exact."""
    x, y, h = batch(3, dtype=dtype, offset=1e4 if dtype == torch.float32 else 30.0)
    if dtype == torch.float32:
        x[0, 0] += 1e4  # An outlier in the place of the centre.
    exact = evaluate(together, x.double(), y.double(), h)
    for a, e in zip(evaluate(together, x, y, h), exact, strict=True):
        rtol = 1e-2 if a.dtype == torch.bfloat16 else 1e-4
        assert (a.double() - e).norm() <= rtol * e.norm()


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
def test_triton_takes_few_rows_in_one_launch(monkeypatch):
    from fastvae.kernels import mmd

    monkeypatch.setattr(mmd, "prepare", lambda *_, **__: pytest.fail("few rows went to the sweeps"))
    x, y, h = batch(2, dtype=torch.float32)
    exact = evaluate(one_by_one, x.double(), y.double(), h, kernel="laplace", backend="reference")
    for a, e in zip(evaluate(together, x, y, h, kernel="laplace", backend="triton"), exact, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=1e-5)


@WARNS
def test_transforms_and_the_compiler():
    torch.compiler.reset()
    x, y, h = batch(2, 2)
    exact = evaluate(together, x, y, h)
    mapped = torch.vmap(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h))
    factors = torch.arange(1, 5, dtype=torch.float64, device=DEVICE).view(2, 2)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for function in (lambda *args: (mapped(*args) * factors).sum(), compiled):
        for a, e in zip(evaluate(function, x, y, h), exact, strict=True):
            torch.testing.assert_close(a, e)
    torch.testing.assert_close(torch.func.grad(together)(x, y, h), exact[1])


def test_a_bandwidth_that_is_not_positive_makes_its_problem_nan_where_it_is_not_read():
    x, y, h = batch(2)
    h[0] = -1.0
    values = torch.compile(lambda h: fastvae.mmd(x, y, bandwidth=h), backend="eager")(h)
    assert values.isnan().tolist() == [True, False]
