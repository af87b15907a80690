"""Reparameterise + KL on every backend against formulas in numpy and the dense reference in float64."""

import numpy as np
import pytest
import torch

import fastvae
from fastvae import reference
from tests.cases import DEVICE, needs_triton

BACKENDS = [pytest.param("cpu"), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
SHAPES = [(1, 1), (1, 7), (7, 5), (130, 33), (3, 3000), (2, 3, 4)]
# Some roundings of a term; the output's own rounding for bfloat16 and float16.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tensors(shape, dtype, count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(count)]


def test_reference_is_the_formula():
    mu, logvar, eps = tensors((6, 4), torch.float64)
    z, kl = reference.reparameterize_kl(mu, logvar, eps=eps)
    m, lv, e = (t.cpu().numpy() for t in (mu, logvar, eps))
    np.testing.assert_allclose(z.cpu().numpy(), m + np.sqrt(np.exp(lv)) * e, rtol=1e-13)
    np.testing.assert_allclose(kl.cpu().numpy(), -0.5 * (1 + lv - m * m - np.exp(lv)).sum(1), rtol=1e-12)


def test_reference_kl_is_that_of_torch_distributions():
    mu, logvar, _ = tensors((6, 4), torch.float64)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    _, kl = reference.reparameterize_kl(mu, logvar, per_dimension=True)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, prior))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, per_dimension):
    mu, logvar, eps, dz = tensors(shape, dtype, 4)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    dkl = tensors(shape if per_dimension else shape[:-1], accumulation, 5)[-1]

    def run(function, to, **options):
        m, lv = (t.to(to).detach().requires_grad_() for t in (mu, logvar))
        z, kl = function(m, lv, eps=eps.to(to), per_dimension=per_dimension, **options)
        upstream = (dz.to(z.dtype), dkl.to(kl.dtype))
        return z, kl, *torch.autograd.grad((z, kl), (m, lv), upstream)

    actual = run(fastvae.reparameterize_kl, dtype, backend=backend)
    exact = run(reference.reparameterize_kl, torch.float64)
    assert [t.dtype for t in actual] == [dtype, accumulation, dtype, dtype]
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= TOLERANCE[dtype] * (e.norm() + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_contiguous(backend):
    mu, logvar, eps = (t.T for t in tensors((5, 70), torch.float32))
    logvar = logvar[:, :1].expand_as(logvar)
    for a, e in zip(
        fastvae.reparameterize_kl(mu, logvar, eps=eps, backend=backend), reference.reparameterize_kl(mu, logvar, eps=eps), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_dimension", [False, True])
def test_gradcheck(backend, per_dimension):
    mu, logvar, eps = tensors((3, 4), torch.float64)

    def function(mu, logvar):
        return fastvae.reparameterize_kl(mu, logvar, eps=eps, per_dimension=per_dimension, backend=backend)

    inputs = (mu.requires_grad_(), logvar.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_noise_under_a_large_mean_keeps_its_gradient(backend):
    """z − μ would be rounding here: the gradient to logvar has to come from ε itself."""
    mu, logvar = torch.full((4, 3), 100.0, device=DEVICE), torch.full((4, 3), -20.0, device=DEVICE)
    eps = torch.ones_like(mu)
    logvar.requires_grad_()
    z, _ = fastvae.reparameterize_kl(mu, logvar, eps=eps, backend=backend)
    (grad,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5 * np.exp(-10.0)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("interpreter_warnings")
def test_a_value_that_is_not_finite_gives_nan(backend):
    mu, logvar, eps = tensors((4, 3), torch.float32)
    for source in (mu, logvar):
        original = source[1, 2].item()
        source[1, 2] = float("nan")
        z, kl = fastvae.reparameterize_kl(mu, logvar, eps=eps, backend=backend)
        assert z[1, 2].isnan()
        assert kl.isnan().tolist() == [False, True, False, False]
        source[1, 2] = original


def test_noise_comes_from_the_generator():
    mu, logvar, _ = tensors((50, 20), torch.float32)
    draws = [fastvae.reparameterize_kl(mu, logvar, generator=torch.Generator(DEVICE).manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    noise = (draws[0] - mu) * (-0.5 * logvar).exp()
    assert abs(noise.mean().item()) < 0.1
    assert abs(noise.std().item() - 1) < 0.1


@pytest.mark.parametrize("per_dimension", [False, True])
def test_opcheck(per_dimension):
    mu, logvar, eps = tensors((3, 4), torch.float64)
    mu.requires_grad_()
    logvar.requires_grad_()
    torch.library.opcheck(torch.ops.fastvae.reparameterize_kl.default, (mu, logvar, eps, per_dimension, ""))
    grad_kl = (mu if per_dimension else mu[:, 0]).detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastvae.reparameterize_kl_backward.default, (eps, grad_kl, mu, logvar, eps, per_dimension, ""))


def test_compiles_whole():
    def loss(mu, logvar, eps):
        z, kl = fastvae.reparameterize_kl(2 * mu, logvar, eps=eps)
        return z.sin().sum() + kl.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        mu, logvar, eps = tensors((rows, 3), torch.float32)
        results = []
        for function in (compiled, loss):
            m = mu.clone().requires_grad_()
            value = function(m, logvar, eps)
            results.append((value.detach(), *torch.autograd.grad(value, m)))
        torch.testing.assert_close(results[0], results[1])


def test_compiles_whole_with_its_own_noise():
    mu, logvar, _ = tensors((4, 3), torch.float32)
    z, kl = torch.compile(fastvae.reparameterize_kl, fullgraph=True, backend="aot_eager")(mu, logvar)
    assert z.shape == mu.shape
    torch.testing.assert_close(kl, reference.reparameterize_kl(mu, logvar)[1])


def test_functional_gradient():
    mu, logvar, eps = tensors((4, 3), torch.float32)
    grad = torch.func.grad(lambda mu: fastvae.reparameterize_kl(mu, logvar, eps=eps)[1].sum())(mu)
    torch.testing.assert_close(grad, mu)
