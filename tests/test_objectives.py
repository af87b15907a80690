import copy
import math

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch._dynamo.testing import CompileCounter

from fastvae import reference
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


def numpy_kl(output):
    mu, logvar = output.mu.detach().numpy(), output.logvar.detach().numpy()
    return 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar)


def numpy_kl_tensor(output):
    return torch.from_numpy(numpy_kl(output).sum(1))


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
        torch.stack([t.detach() for t in terms[:4]]),
        torch.tensor([nll + kl_weight * kl + mmd_weight * mmd, nll, kl, mmd], dtype=torch.float64),
    )


def test_summands_add_up_to_the_loss(output, x):
    objective = VAEObjective(kl_weight=0.5, mmd_weight=2.0, dip=(3.0, 4.0, "i"))
    terms = objective(output, x)
    assert set(terms.summands) == {"reconstruction", "kl", "mmd", "dip"}
    assert sum(term.item() for term in terms.summands.values()) == pytest.approx(terms.loss.item())
    assert set(VAEObjective.mmd_vae(1.0)(output, x, all_terms=True).summands) == {"reconstruction", "mmd"}


def test_capacity_holds_each_sample(output, x):
    nll = VAEObjective(kl_weight=0.0)(output, x).loss.item()
    each = numpy_kl(output).sum(1)
    terms = VAEObjective.capacity_vae(30.0, 1.2)(output, x)
    assert terms.loss.item() - nll == pytest.approx(30 * np.abs(each - 1.2).mean())
    assert terms.kl.item() == pytest.approx(each.mean())
    # Above the capacity the KL is pulled down, below it up.
    (gradient,) = torch.autograd.grad(terms.loss, output.kl)
    np.testing.assert_array_equal(gradient.sign().numpy(), np.sign(each - 1.2))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("floor", [1e-9, 0.6, 1e3])
def test_free_bits_are_a_floor_on_the_mean_of_each_group(floor, group, output, x):
    nll = VAEObjective(kl_weight=0.0)(output, x).loss.item()
    groups = numpy_kl(output).mean(0).reshape(-1, group).sum(1)
    objective = VAEObjective(kl_weight=2.0, free_bits=floor, free_bits_group=group)
    output = output._replace(kl=numpy_kl_tensor(output))
    terms = objective(output, x)
    assert terms.loss.item() - nll == pytest.approx(2 * np.maximum(groups, floor).sum())
    (gradient,) = torch.autograd.grad(terms.loss, output.mu)
    free = np.repeat(groups < floor, group)
    assert not gradient[:, torch.from_numpy(free)].any()
    assert free.all() or gradient[:, torch.from_numpy(~free)].any()


@pytest.mark.parametrize("kind", ["i", "ii"])
def test_dip_is_the_distance_of_the_covariance_from_the_identity(kind, output, x):
    mu, logvar = output.mu.detach().numpy(), output.logvar.detach().numpy()
    s = np.cov(mu.T, bias=True) + (np.diag(np.exp(logvar).mean(0)) if kind == "ii" else 0)
    expected = 5 * sum(s[i, j] ** 2 for i in range(LATENT) for j in range(LATENT) if i != j)
    expected += (50 if kind == "i" else 5) * sum((s[i, i] - 1) ** 2 for i in range(LATENT))
    terms = VAEObjective.dip_vae(5.0, kind=kind)(output, x)
    assert terms.dip.item() == pytest.approx(expected)
    assert terms.loss.item() == pytest.approx(VAEObjective.vae()(output, x).loss.item() + expected)
    other = VAEObjective.dip_vae(5.0, 0.0, kind=kind)(output, x).dip.item()
    assert other == pytest.approx(5 * sum(s[i, j] ** 2 for i in range(LATENT) for j in range(LATENT) if i != j))


@pytest.mark.parametrize("kind", ["i", "ii"])
def test_gradient_of_dip(kind, output, x):
    objective = VAEObjective.dip_vae(2.0, kind=kind)
    assert torch.autograd.gradcheck(lambda mu, logvar: objective(output._replace(mu=mu, logvar=logvar), x).dip, (output.mu, output.logvar))


def test_dip_under_autocast_is_not_rounded():
    vae, x = VAE.mlp(6, latent_dim=3), torch.rand(64, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae(x, eps=torch.zeros(64, 3))
        dip = VAEObjective.dip_vae(1.0)(output, x).dip
    torch.testing.assert_close(dip, VAEObjective.dip_vae(1.0)(output._replace(mu=output.mu.float()), x).dip)


@pytest.mark.parametrize("estimator", ["minibatch_weighted", "minibatch_stratified"])
def test_beta_tc_vae_weights_the_total_correlation(estimator, output, x):
    expected = reference.total_correlation(
        output.z, output.mu, output.logvar, dataset_size=100, estimator=estimator
    ).total_correlation.item()
    terms = VAEObjective.beta_tc_vae(6.0, 100, estimator=estimator)(output, x)
    assert terms.total_correlation.item() == pytest.approx(expected)
    assert terms.loss.item() == pytest.approx(VAEObjective.vae()(output, x).loss.item() + 5 * expected)
    assert set(terms.summands) == {"reconstruction", "kl", "total_correlation"}


def test_a_batch_larger_than_the_training_set_can_be_evaluated(output, x):
    assert VAEObjective.beta_tc_vae(6.0, 2)(output, x).loss.isfinite()


@pytest.mark.parametrize("h", [None, 2.0, [1.0, 3.0]])
def test_wae_with_the_inverse_multiquadric_kernel(h, output, x):
    prior = torch.randn(11, LATENT, dtype=torch.float64)
    terms = VAEObjective.wae_mmd(7.0, kernel="imq", bandwidth=h)(output._replace(kl=None, logvar=None), x, prior=prior)
    squares = [s * 2 * LATENT for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)] if h is None else np.square(h).reshape(-1).tolist()
    z, y = output.z.detach().numpy(), prior.numpy()

    def k(a, b):
        return sum(c / (c + ((a[:, None] - b[None]) ** 2).sum(-1)) for c in squares)

    within = [(k(a, a).sum() - np.trace(k(a, a))) / (len(a) * (len(a) - 1)) for a in (z, y)]
    assert terms.mmd.item() == pytest.approx(sum(within) - 2 * k(z, y).mean())
    assert terms.loss.item() == pytest.approx(terms.reconstruction.item() + 7 * terms.mmd.item())


def test_weights_are_set_between_steps(output, x):
    objective = VAEObjective(kl_weight=0.0, mmd_weight=1.0, capacity=0.0)
    for weights in ({"kl_weight": 0.25, "mmd_weight": 3.0}, {"kl_weight": 0.0}, {"kl_weight": 2.0, "mmd_weight": 0.5, "capacity": 1.0}):
        objective.set(**weights)
    expected = VAEObjective(kl_weight=2.0, mmd_weight=0.5, capacity=1.0)
    assert objective(output, x).loss.item() == pytest.approx(expected(output, x).loss.item())
    assert "kl_weight=2, mmd_weight=0.5" in str(objective)
    assert not objective.state_dict()


def test_a_weight_that_is_set_does_not_compile_anew(output, x):
    objective = VAEObjective.info_vae(0.5, 2.0)
    objective.set(kl_weight=0.0)
    count = CompileCounter()
    compiled = torch.compile(lambda z: objective(VAEOutput(output[0], z, *output[2:]), x).loss, fullgraph=True, backend=count)
    for weight in (0.0, 0.5, 1.0):
        objective.set(kl_weight=weight)
        torch.testing.assert_close(compiled(output.z), objective(output, x).loss)
    assert count.frame_count == 1


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


@pytest.mark.parametrize("compiled", [False, True])
def test_learned_sigma_of_a_perfect_reconstruction_stays_at_its_bound_and_comes_back(compiled):
    x = torch.zeros(50, 20)
    likelihood = Gaussian(0.1, learned=True, least_sigma=0.01)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.1)
    log_prob = torch.compile(likelihood.mean_log_prob, fullgraph=True, backend="eager") if compiled else likelihood.mean_log_prob

    def train(reconstruction, steps):
        for _ in range(steps):
            loss = -log_prob(reconstruction, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train(x, 60) == pytest.approx(20 * (math.log(0.01) + 0.5 * math.log(2 * math.pi)))
    assert likelihood.sigma == pytest.approx(0.01)
    assert likelihood.eval().log_prob(x, x).isfinite().all()
    likelihood.train()
    train(x + 0.3, 200)
    assert likelihood.sigma > 0.1


def test_learned_sigma_takes_two_losses_before_their_backward_pass_and_torch_vmap():
    x, reconstructions = torch.rand(4, 3), torch.rand(2, 4, 3)
    likelihood = Gaussian(0.5, learned=True)
    sum(likelihood.log_prob(reconstruction, x).sum() for reconstruction in reconstructions).backward()
    both, likelihood.log_sigma.grad = likelihood.log_sigma.grad, None
    likelihood.log_prob(reconstructions.flatten(0, 1), torch.cat([x, x])).sum().backward()
    torch.testing.assert_close(both, likelihood.log_sigma.grad)
    gradients = torch.vmap(torch.func.grad(lambda reconstruction: likelihood.log_prob(reconstruction, x).sum()))(reconstructions)
    torch.testing.assert_close(gradients, (x - reconstructions) / 0.25)


def test_one_batch_that_is_not_finite_does_not_stay_in_the_running_sigma():
    likelihood, x = Gaussian(0.5, optimal=True), torch.ones(4, 3)
    for value in (torch.nan, torch.inf):
        assert not likelihood.mean_log_prob(x * value, x).isfinite()
        assert likelihood.sigma == pytest.approx(0.5)
    likelihood.mean_log_prob(0 * x, x)
    assert likelihood.sigma == pytest.approx((0.9 * 0.25 + 0.1) ** 0.5)


def test_optimal_sigma_is_that_of_the_batch(output, x):
    likelihood = Gaussian(0.5, optimal=True)
    sigma = (x - output.reconstruction).square().mean().sqrt().item()
    for other in (0.9 * sigma, sigma, 1.1 * sigma):
        assert (
            likelihood.log_prob(output.reconstruction, x).sum().item()
            >= Gaussian(other).log_prob(output.reconstruction, x).sum().item() - 1e-9
        )
    torch.testing.assert_close(
        torch.autograd.grad(likelihood.log_prob(output.reconstruction, x).sum(), output.reconstruction),
        torch.autograd.grad(Gaussian(sigma).log_prob(output.reconstruction, x).sum(), output.reconstruction),
    )
    perfect = likelihood.log_prob(x, x)
    torch.testing.assert_close(perfect, Gaussian(math.exp(-6)).log_prob(x, x))


def test_optimal_sigma_of_evaluation_is_that_of_training():
    x = 0.3 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    likelihood = Gaussian(optimal=True)
    for _ in range(100):
        likelihood.log_prob(torch.zeros_like(x), x)
    assert likelihood.sigma == pytest.approx(x.square().mean().sqrt().item(), rel=1e-3)
    likelihood.eval()
    noisy = x[:5] * 10
    torch.testing.assert_close(likelihood.log_prob(noisy * 0, noisy), Gaussian(likelihood.sigma).log_prob(noisy * 0, noisy))
    copy = Gaussian(optimal=True)
    copy.load_state_dict(likelihood.state_dict())
    assert copy.sigma == likelihood.sigma


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
        (lambda: VAEObjective.info_vae(1.5, 2.0), r"alpha must be at most 1, .* maximise the KL, got 1.5"),
        (lambda: VAEObjective.mmd_vae(-1.0), r"^lambda_ must be at least 0, got -1"),
        (lambda: VAEObjective.wae_mmd(-2.0), r"lambda_ must be at least 0, got -2"),
        (lambda: VAEObjective.beta_vae(-0.5), r"beta must be at least 0, got -0.5"),
        (lambda: VAEObjective(kl_weight=-1.0), r"kl_weight must be at least 0, got -1"),
        (lambda: VAEObjective(mmd_weight=math.nan), r"mmd_weight must be finite, got nan"),
        (lambda: VAEObjective(bandwidth=0.0), r"bandwidth must be greater than 0, got 0"),
        (lambda: VAEObjective(estimator="linear"), r"estimator must be one of 'biased', 'unbiased', got 'linear'"),
        (lambda: VAEObjective(tc_weight=1.0), r"dataset_size must be given for the total correlation, got None"),
        (lambda: VAEObjective.beta_tc_vae(0.5, 10), r"beta must be at least 1, got 0.5"),
        (lambda: VAEObjective.beta_tc_vae(2.0, 10, estimator="exact"), r"^estimator must be one of 'minibatch_weighted', .* got 'exact'"),
        (lambda: VAEObjective.wae_mmd(1.0, kernel="cosine"), r"kernel must be one of .*'imq'.* got 'cosine'"),
        (lambda: VAEObjective(capacity=-1.0), r"capacity must be at least 0, got -1"),
        (lambda: VAEObjective(capacity=1.0, free_bits=1.0), r"capacity must be None if free_bits are given, .* got 1"),
        (lambda: VAEObjective(free_bits=-0.1), r"free_bits must be at least 0, got -0.1"),
        (lambda: VAEObjective(free_bits_group=0), r"free_bits_group must be at least 1, got 0"),
        (lambda: VAEObjective.dip_vae(-1.0), r"lambda_od must be at least 0, got -1"),
        (lambda: VAEObjective.dip_vae(1.0, kind="iii"), r"kind must be one of 'i', 'ii', got 'iii'"),
        (lambda: VAEObjective().set(kl_weight=-1.0), r"kl_weight must be at least 0, got -1"),
        (lambda: VAEObjective().set(capacity=1.0), r"capacity must be given to the constructor before it can be set, got None"),
        (lambda: VAEObjective.iwae(0), r"samples must be at least 1, got 0"),
        (lambda: VAEObjective.iwae(2, gradient="vimco"), r"gradient must be one of 'reparameterised', 'doubly', got 'vimco'"),
        (lambda: Gaussian(learned=True, optimal=True), r"optimal must be False if learned is True"),
        (lambda: Gaussian(optimal=True, least_sigma=0.0), r"least_sigma must be greater than 0, got 0"),
        (lambda: Gaussian(0.0), r"sigma must be greater than 0, got 0"),
        (lambda: Gaussian(1e-3, learned=True), r"sigma must be at least least_sigma, 0\.00247875, if it is learned, got 0\.001"),
        (lambda: Gaussian().log_prob(torch.zeros(2, 3), torch.zeros(2, 4)), r"x must have as many features as the reconstruction, got"),
    ],
)
def test_error_sentences(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_kl_weight_on_a_deterministic_posterior(output, x):
    deterministic = output._replace(logvar=None, kl=None)
    assert VAEObjective.wae_mmd(1.0)(deterministic, x).kl is None
    with pytest.raises(ValueError, match="tc_weight must be 0 for a deterministic posterior"):
        VAEObjective(kl_weight=0.0, tc_weight=1.0, dataset_size=10)(deterministic, x)
    with pytest.raises(ValueError, match="kl_weight must be 0 for a deterministic posterior, which has no KL, got 1"):
        VAEObjective.vae()(deterministic, x)


def test_one_sample_with_the_unbiased_estimator(output, x):
    one = VAEOutput(*(t[:1] for t in output[:5]), Bernoulli())
    with pytest.raises(ValueError, match=r"at least two samples for the unbiased MMD, got one: pass drop_last=True"):
        VAEObjective.mmd_vae(1.0)(one, x[:1])
    assert VAEObjective.mmd_vae(1.0, estimator="biased")(one, x[:1]).loss.isfinite()


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


K = 5


def importance_weighted(gradient, vae, x, eps):
    objective = VAEObjective.iwae(K, gradient=gradient)
    return objective(vae(x, eps=eps, samples=K), x)


@pytest.fixture
def model():
    return VAE.mlp(FEATURES, latent_dim=LATENT, hidden=(4,), likelihood=Gaussian(0.7)).double()


def log_weights(vae, x, z, mu, logvar):
    """(N, K) by torch.distributions."""
    posterior = D.Independent(D.Normal(mu.unsqueeze(1), (logvar / 2).exp().unsqueeze(1)), 1)
    prior = D.Independent(D.Normal(torch.zeros_like(z), torch.ones_like(z)), 1)
    likelihood = D.Independent(D.Normal(vae.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]), 0.7), 1)
    return likelihood.log_prob(x.unsqueeze(1)) + prior.log_prob(z) - posterior.log_prob(z)


@pytest.mark.parametrize("gradient", ["reparameterised", "doubly"])
def test_importance_weighted_bound(gradient, model, x):
    eps = torch.randn(N, K, LATENT, dtype=torch.float64)
    mu, logvar = model.encode(x)
    z = mu.unsqueeze(1) + (logvar / 2).exp().unsqueeze(1) * eps
    log_w = log_weights(model, x, z, mu, logvar)
    terms = importance_weighted(gradient, model, x, eps)
    torch.testing.assert_close(terms.loss, -(log_w.exp().mean(1)).log().mean())
    torch.testing.assert_close(terms.kl, model(x).kl.mean().detach())
    assert not terms.kl.requires_grad
    expected = torch.autograd.grad(terms.loss, list(model.parameters()), retain_graph=True)
    if gradient == "reparameterised":
        torch.testing.assert_close(expected, torch.autograd.grad(-log_w.logsumexp(1).mean(), list(model.parameters())))
        return
    # Each sample's part of Tucker et al. 2019, equation (8), by itself.
    share = log_w.detach().softmax(1)
    for i in range(N):
        for k in range(K):
            leaf = z[i, k].detach().reshape(1, 1, -1).requires_grad_()
            lw = log_weights(model, x[i : i + 1], leaf, mu[i : i + 1].detach(), logvar[i : i + 1].detach())
            (g,) = torch.autograd.grad(lw.sum(), leaf)
            z[i, k].backward(-(share[i, k] ** 2) * g.reshape(-1) / N, retain_graph=True)
            inner = log_weights(model, x[i : i + 1], leaf.detach(), mu[i : i + 1].detach(), logvar[i : i + 1].detach())
            (-share[i, k] * inner.sum() / N).backward()
    torch.testing.assert_close(expected, tuple(p.grad for p in model.parameters()))


@pytest.mark.parametrize("logvar", [-10.0, -40.0, -89.0, -200.0])
@pytest.mark.parametrize("gradient", ["reparameterised", "doubly"])
def test_importance_weighted_bound_of_narrow_posteriors(gradient, logvar):
    """In float32 z has no digit left of eps, which the bound is a function of."""
    mu, eps = torch.randn(N, 3), torch.randn(N, K, 3)
    logvar = torch.full_like(mu, logvar)

    def bound(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (mu, logvar)]
        vae = VAE(Given(*leaves), torch.nn.Identity(), latent_dim=3)
        loss = importance_weighted(gradient, vae, torch.zeros(N, 3, dtype=dtype), eps.to(dtype)).loss
        return loss.detach(), torch.autograd.grad(loss, leaves)

    loss, gradients = bound(torch.float32)
    exact, exact_gradients = bound(torch.float64)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert all(t.isfinite().all() for t in gradients)
    # The other gradient to mu is one of eps/σ, which at logvar −200 is no float32.
    for n in {"reparameterised": (0, 1), "doubly": (1,) if logvar[0, 0] > -177 else ()}[gradient]:
        torch.testing.assert_close(gradients[n].double(), exact_gradients[n], rtol=1e-4, atol=1e-5)


class Given(torch.nn.Module):
    """An encoder that returns what it was given."""

    def __init__(self, mu, logvar):
        super().__init__()
        self.posterior = mu, logvar

    def forward(self, x):
        return self.posterior


@pytest.mark.parametrize("gradient", ["reparameterised", "doubly"])
def test_importance_weighted_bound_without_the_noise(gradient, model, x):
    eps = torch.randn(N, K, LATENT, dtype=torch.float64)
    objective = VAEObjective.iwae(K, gradient=gradient)
    found = []
    for keep in (True, False):
        output = model(x, eps=eps, samples=K)
        terms = objective(output if keep else output._replace(eps=None), x)
        found.append((terms.loss, *torch.autograd.grad(terms.loss, list(model.parameters()))))
    torch.testing.assert_close(found[0], found[1])
    # Where 1/σ² is no float32 the bound is one of z = μ, but a number.
    mu, logvar = torch.randn(N, 2), torch.full((N, 2), -90.0)
    output = VAEOutput(torch.zeros(N, 1), mu.clone(), mu, logvar, torch.zeros(N), Gaussian())
    assert VAEObjective.iwae(1, gradient=gradient)(output, torch.zeros(N, 1)).loss.isfinite()


def test_both_gradients_of_the_bound_have_one_mean(model, x):
    parameters = list(model.encoder.parameters())

    def gradients(gradient, draws=300):
        rows = []
        for _ in range(draws):
            loss = importance_weighted(gradient, model, x, torch.randn(N, K, LATENT, dtype=torch.float64)).loss
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        rows = torch.stack(rows)
        return rows.mean(0), rows.std(0) / math.sqrt(draws)

    (mean_a, error_a), (mean_b, error_b) = gradients("reparameterised"), gradients("doubly")
    standardised = (mean_a - mean_b) / (error_a.square() + error_b.square()).sqrt().clamp_min(1e-12)
    assert standardised.square().mean().sqrt().item() < 1.5
    assert error_b.square().sum() < error_a.square().sum()


def test_more_samples_bound_more_tightly(model, x):
    with torch.no_grad():
        bounds = [sum(VAEObjective.iwae(k)(model(x, samples=k), x).loss.item() for _ in range(200)) / 200 for k in (1, 10)]
    assert bounds[1] < bounds[0]


def test_importance_weighted_needs_its_samples(model, x):
    with pytest.raises(ValueError, match=r"output must hold samples=5 codes for each x, got 9 codes for 9 x"):
        VAEObjective.iwae(K)(model(x), x)
    deterministic = VAE.mlp(FEATURES, latent_dim=2, posterior="deterministic").double()
    with pytest.raises(ValueError, match="posterior must be 'gaussian' for the importance-weighted bound"):
        VAEObjective.iwae(1)(deterministic(x), x)


no_hooks = pytest.mark.skipif(torch.__version__ < (2, 13), reason="the compiler of torch 2.6 and 2.11 cannot do with a tensor's hook")


@pytest.mark.parametrize("gradient", ["reparameterised", pytest.param("doubly", marks=no_hooks)])
@pytest.mark.slow
def test_importance_weighted_bound_of_one_compiled_graph(gradient, model, x):
    eps = torch.randn(N, K, LATENT, dtype=torch.float64)
    compiled = torch.compile(lambda: importance_weighted(gradient, model, x, eps).loss, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(importance_weighted(gradient, model, x, eps).loss, parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(), parameters), expected)


class Halved(Bernoulli):
    def log_prob(self, reconstruction, x):
        return 0.5 * super().log_prob(reconstruction, x)


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), Halved(), Gaussian(0.3), Gaussian(0.3, learned=True), Gaussian(0.3, optimal=True)],
    ids=lambda likelihood: f"{type(likelihood).__name__}({likelihood.extra_repr()})",
)
def test_mean_of_the_log_likelihood(likelihood):
    x = torch.rand(6, 3, 4, 5)
    rows = torch.randn(6, 3, 4, 5, requires_grad=True)
    leaves = [rows, *likelihood.parameters()]
    results = []
    for mean in (copy.deepcopy(likelihood).mean_log_prob, lambda *args: copy.deepcopy(likelihood).log_prob(*args).mean()):
        assert mean(rows, x).shape == ()
        results.append(mean(rows, x).detach())
    torch.testing.assert_close(*results)
    short = torch.autograd.grad(likelihood.mean_log_prob(rows, x), leaves)
    for a, b in zip(short, torch.autograd.grad(likelihood.log_prob(rows, x).mean(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_log_likelihood_of_an_instance_counts():
    likelihood = Bernoulli()
    likelihood.log_prob = lambda reconstruction, x: torch.zeros(len(x))
    assert likelihood.mean_log_prob(torch.randn(4, 3), torch.rand(4, 3)) == 0


def test_a_module_that_has_but_log_prob():
    class Zero(torch.nn.Module):
        def log_prob(self, reconstruction, x):
            return torch.zeros(len(x))

    x = torch.rand(4, 3)
    output = VAEOutput(torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2), torch.zeros(4, 2), torch.ones(4), Zero())
    assert VAEObjective.vae()(output, x).loss == 1


@pytest.mark.parametrize("own", [False, True])
def test_a_bernoulli_of_other_values_is_refused_once(own):
    class Own(Bernoulli):
        def log_prob(self, reconstruction, x):
            return super().log_prob(reconstruction, x)

    for x, told in (
        (torch.arange(256.0)[None], "from 0 to 255"),
        (torch.randn(4, 3) - 9, "from -"),
        (torch.tensor([[0.5, math.inf]]), "from 0.5 to inf"),
    ):
        for call in ("log_prob", "mean_log_prob"):
            with pytest.raises(ValueError, match=rf"x must lie in \[0, 1\] for a Bernoulli likelihood, got values {told}.*pixels / 255"):
                getattr(Own() if own else Bernoulli(), call)(torch.zeros_like(x), x)
    likelihood = Bernoulli()
    likelihood.log_prob(torch.zeros(2, 3), torch.tensor([[0, 0.5, 1]]).repeat(2, 1))
    likelihood.log_prob(torch.zeros(2, 3), torch.full((2, 3), 7.0))  # looked at once
    assert Bernoulli().log_prob(torch.zeros(1, 1), torch.tensor([[math.nan]])).isnan()
