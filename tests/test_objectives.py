import math

import numpy as np
import pytest
import torch
from torch import distributions as D

from fastvae.objectives import Bernoulli, Gaussian, VAEObjective, VAEOutput
from fastvae.vae import VAE

N, FEATURES, LATENT = 9, 6, 3


@pytest.fixture
def x():
    return torch.rand(N, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def output():
    g = torch.Generator().manual_seed(1)
    reconstruction, (z, mu, logvar) = (
        torch.randn(N, FEATURES, dtype=torch.float64, generator=g),
        torch.randn(3, N, LATENT, generator=g).double(),
    )
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
    return VAEOutput(*(t.requires_grad_() for t in (reconstruction, z, mu, logvar, kl.detach())), Bernoulli())


def numpy_mmd(z, h, *, unbiased):
    """The three expectations by loops over numbers: the first over pairs, the others from the integrals of Gaussian products."""
    n, d = z.shape
    pairs = [math.exp(-sum((z[i] - z[j]) ** 2) / (2 * h * h)) for i in range(n) for j in range(n) if not unbiased or i != j]
    to_prior = [(h**2 / (h**2 + 1)) ** (d / 2) * math.exp(-sum(z[i] ** 2) / (2 * (h * h + 1))) for i in range(n)]
    return np.mean(pairs) - 2 * np.mean(to_prior) + (h**2 / (h**2 + 2)) ** (d / 2)


def numpy_terms(output, x, h, *, unbiased=True):
    logits, z, mu, logvar = (t.detach().numpy() for t in output[:4])
    t = x.numpy()
    nll = -(t * np.log(1 / (1 + np.exp(-logits))) + (1 - t) * np.log(1 - 1 / (1 + np.exp(-logits)))).sum(1).mean()
    kl = np.mean([sum(0.5 * (m**2 + math.exp(v) - 1 - v) for m, v in zip(*row, strict=True)) for row in zip(mu, logvar, strict=True)])
    return nll, kl, numpy_mmd(z, h, unbiased=unbiased)


@pytest.mark.parametrize(
    ("objective", "kl_weight", "mmd_weight"),
    [
        (VAEObjective.vae(), 1, 0),
        (VAEObjective.beta_vae(4.0), 4, 0),
        (VAEObjective.info_vae(0.25, 10.0), 0.75, 9.25),
        (VAEObjective.info_vae(-1.0, 3.0), 2, 1),
        (VAEObjective.mmd_vae(10.0), 0, 10),
        (VAEObjective.wae_mmd(7.0), 0, 7),
        (VAEObjective(kl_weight=0.5, mmd_weight=2.0), 0.5, 2),
    ],
)
def test_loss_is_the_weighted_sum_of_its_terms(objective, kl_weight, mmd_weight, output, x):
    nll, kl, mmd = numpy_terms(output, x, math.sqrt(LATENT))
    terms = objective(output, x, all_terms=True)
    torch.testing.assert_close(
        torch.stack([t.detach() for t in terms]), torch.tensor([nll + kl_weight * kl + mmd_weight * mmd, nll, kl, mmd], dtype=torch.float64)
    )


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_bandwidth_and_estimator_are_passed_on(estimator, output, x):
    terms = VAEObjective.mmd_vae(1.0, bandwidth=0.7, estimator=estimator)(output, x)
    assert terms.mmd.item() == pytest.approx(numpy_mmd(output.z.detach().numpy(), 0.7, unbiased=estimator == "unbiased"))


def test_default_estimator_is_unbiased():
    assert VAEObjective().estimator == "unbiased"


def test_terms_of_weight_zero_are_not_computed_and_carry_no_gradient(output, x):
    assert VAEObjective.vae()(output, x).mmd is None
    terms = VAEObjective.vae()(output, x, all_terms=True)
    assert not terms.mmd.requires_grad
    assert terms.kl.requires_grad
    assert not VAEObjective.mmd_vae(1.0)(output, x).kl.requires_grad


def test_an_infinite_kl_of_weight_zero_does_not_reach_the_loss(output, x):
    terms = VAEObjective.mmd_vae(1.0)(output._replace(kl=torch.full((N,), math.inf)), x)
    assert torch.isfinite(terms.loss)


def test_gradient_of_the_loss(output, x):
    objective = VAEObjective.info_vae(0.5, 5.0)

    def loss(reconstruction, z, kl):
        return objective(output._replace(reconstruction=reconstruction, z=z, kl=kl), x).loss

    assert torch.autograd.gradcheck(loss, (output.reconstruction, output.z, output.kl))


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("learned", [False, True])
def test_gaussian_is_the_density_of_torch_distributions(sigma, learned, output, x):
    likelihood = Gaussian(sigma, learned=learned).double()
    expected = D.Independent(D.Normal(output.reconstruction, sigma), 1).log_prob(x)
    torch.testing.assert_close(likelihood.log_prob(output.reconstruction, x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(likelihood.mean(output.reconstruction), output.reconstruction)


def test_learned_sigma_finds_the_noise_of_the_data():
    x = 0.3 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    likelihood = Gaussian(learned=True)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(200):
        loss = -likelihood.log_prob(torch.zeros_like(x), x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert likelihood.sigma == pytest.approx(x.square().mean().sqrt().item(), rel=1e-2)


def test_bernoulli_is_the_density_of_torch_distributions(output, x):
    binary = x.round()
    expected = D.Independent(D.Bernoulli(logits=output.reconstruction), 1).log_prob(binary)
    torch.testing.assert_close(Bernoulli().log_prob(output.reconstruction, binary), expected)
    torch.testing.assert_close(Bernoulli().mean(output.reconstruction), D.Bernoulli(logits=output.reconstruction).mean)


def test_likelihoods_sum_over_the_features_of_images(x):
    images = x.reshape(N, 1, 2, 3)
    for likelihood in (Gaussian(0.5), Bernoulli()):
        torch.testing.assert_close(likelihood.log_prob(images, images), likelihood.log_prob(x, x))
        torch.testing.assert_close(likelihood.log_prob(x, images), likelihood.log_prob(x, x))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: VAEObjective.info_vae(-1.0, 1.0),
            r"alpha \+ lambda_ - 1 must be at least 0, .* maximise the MMD, got -1 from alpha=-1 and lambda_=1",
        ),
        (lambda: VAEObjective.info_vae(0.0, 0.001), r"alpha \+ lambda_ - 1 must be at least 0, .* got -0.999"),
        (lambda: VAEObjective.info_vae(1.5, 2.0), r"alpha must be at most 1, .* maximise it, got 1.5"),
        (lambda: VAEObjective.mmd_vae(-1.0), r"must be at least 0, .* got -1 from"),
        (lambda: VAEObjective.wae_mmd(-2.0), r"lambda_ must be at least 0, got -2"),
        (lambda: VAEObjective.beta_vae(-0.5), r"beta must be at least 0, got -0.5"),
        (lambda: VAEObjective(kl_weight=-1.0), r"kl_weight must be at least 0, got -1"),
        (lambda: VAEObjective(mmd_weight=math.nan), r"mmd_weight must be finite, got nan"),
        (lambda: VAEObjective(bandwidth=0.0), r"bandwidth must be greater than 0, got 0"),
        (lambda: VAEObjective(estimator="linear"), r"estimator must be one of 'biased', 'unbiased', got 'linear'"),
        (lambda: Gaussian(0.0), r"sigma must be greater than 0, got 0"),
        (lambda: Gaussian().log_prob(torch.zeros(2, 3), torch.zeros(2, 4)), r"x must have the features of the reconstruction, got shapes"),
    ],
)
def test_error_sentences(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_kl_weight_on_a_deterministic_posterior(output, x):
    deterministic = output._replace(logvar=None, kl=None)
    assert VAEObjective.wae_mmd(1.0)(deterministic, x).kl is None
    with pytest.raises(ValueError, match="kl_weight must be 0 for a deterministic posterior, which has no KL, got 1"):
        VAEObjective.vae()(deterministic, x)


def test_one_sample_with_the_unbiased_estimator(output, x):
    one = VAEOutput(*(t[:1] for t in output[:5]), Bernoulli())
    with pytest.raises(ValueError, match="two rows"):
        VAEObjective.mmd_vae(1.0)(one, x[:1])


def test_weights_that_cancel_are_zero():
    objective = VAEObjective.info_vae(-1.8, 2.8)
    assert objective.mmd_weight == 0


def test_logging_a_batch_of_one():
    vae = VAE.mlp(4, latent_dim=2)
    x = torch.randn(1, 4)
    assert VAEObjective.vae()(vae(x), x, all_terms=True).mmd is None


def test_half_precision_likelihood_sums_in_float32():
    x = torch.rand(4, 3, 64, 64)
    exact = Gaussian(0.1).log_prob(x * 0, x)
    half = Gaussian(0.1).log_prob(x.half() * 0, x.half())
    torch.testing.assert_close(half, exact, rtol=1e-3, atol=0)


def test_autocast_takes_noise_and_parts_of_another_precision():
    vae = VAE.mlp(4, latent_dim=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae(torch.randn(5, 4), eps=torch.randn(5, 2))
    assert output.z.dtype == torch.float32
