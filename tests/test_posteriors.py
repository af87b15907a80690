"""Posteriors as other projects write them: z, KL and gradients against their formulas in float64."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence

import fastvae
from tests.cases import DEVICE, accumulation, needs_cpu, one_thread

# A few roundings, relative to the norm; of the result's own dtype for bfloat16 and float16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Of each number, relative to the larger of its size and 1.
FLOAT64 = 1e-12
PRECISE = (torch.float64, torch.float32)
ALL = (torch.float64, *TOLERANCE)


def latent_diffusion(dims, eps, m, other=None):
    """`DiagonalGaussianDistribution` of CompVis/latent-diffusion (ldm/modules/distributions/distributions.py) and diffusers."""
    posterior, prior = (None if t is None else Transcribed(t, dims=dims) for t in (m, other))
    return posterior.mean + posterior.std * eps, posterior.kl(prior)


def stable_audio(eps, x):
    """`vae_sample` of Stability-AI/stable-audio-tools (models/bottleneck.py); diffusers' autoencoder_oobleck.py has the same KL."""
    mean, scale = x.chunk(2, 1)
    std = F.softplus(scale) + 1e-4
    return eps * std + mean, (mean * mean + std * std - torch.log(std * std) - 1).sum(1).mean()


def scvi(activation, eps, mu, s, prior_mu=0.0, prior_scale=1.0):
    """`Encoder` of scverse/scvi-tools (nn/_base_components.py), and the KL of its models."""
    variance = activation(s) + 1e-4
    prior = Normal(torch.as_tensor(prior_mu).expand_as(mu), torch.as_tensor(prior_scale).expand_as(mu))
    return mu + variance.sqrt() * eps, kl_divergence(Normal(mu, variance.sqrt()), prior).sum(-1)


def scvi_ln(eps, *inputs):
    """The same with distribution="ln"."""
    z, kl = scvi(torch.exp, eps, *inputs)
    return z.softmax(-1), kl


def nvae(eps, mu, log_sigma, prior_mu, prior_log_sigma):
    """`Normal` of NVlabs/NVAE (distributions.py)."""
    mu, log_sigma, prior_mu, prior_log_sigma = (5 * torch.tanh(t / 5) for t in (mu, log_sigma, prior_mu, prior_log_sigma))
    sigma, prior_sigma = log_sigma.exp() + 1e-2, prior_log_sigma.exp() + 1e-2
    ratio = sigma / prior_sigma
    return eps * sigma + mu, 0.5 * (((mu - prior_mu) / prior_sigma) ** 2 + ratio**2) - 0.5 - torch.log(ratio)


def twice_the_mean(z, kl):
    return z, 2 * kl.mean()


def with_zeros(mu, log_sigma):
    return mu, log_sigma, torch.zeros_like(mu), torch.zeros_like(mu)


def torch_distributions(eps, mu, std, prior_mu=0.0, prior_std=1.0):
    prior = Normal(torch.as_tensor(prior_mu).expand_as(mu), torch.as_tensor(prior_std).expand_as(mu))
    return mu + eps * std, kl_divergence(Independent(Normal(mu, std), 1), Independent(prior, 1))


def pythae(eps, mu, logvar):
    """`VAE` of clementchadebec/benchmark_VAE (models/vae/vae_model.py)."""
    return mu + eps * (0.5 * logvar).exp(), -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)


def multivae(eps, mu, logvar, prior_mu, prior_logvar):
    """`kl_divergence` of AgatheSenellart/MultiVae (models/base/base_utils.py)."""
    kl = 0.5 * (prior_logvar - logvar + (logvar - prior_logvar).exp() + (mu - prior_mu) ** 2 / prior_logvar.exp() - 1)
    return mu + eps * (0.5 * logvar).exp(), kl.sum(-1)


def halves(dim, formula):
    """The formula of a pair for moments."""
    return lambda eps, *moments: formula(eps, *(half for t in moments for half in t.chunk(2, dim)))


class Transcribed:
    """`DiagonalGaussianDistribution` of diffusers, which has dims 1, 2 and 3."""

    def __init__(self, parameters, deterministic=False, *, dims=None):
        self.mean, raw = parameters.chunk(2, 1)
        self.dims = dims or tuple(range(1, parameters.ndim))
        self.logvar = raw.clamp(-30, 20)
        self.deterministic = deterministic
        self.std, self.var = ((0.5 * self.logvar).exp(), self.logvar.exp()) if not deterministic else [torch.zeros_like(self.mean)] * 2

    def sample(self, generator=None):
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)

    def mode(self):
        return self.mean

    def kl(self, other=None):
        if self.deterministic:
            return torch.tensor([0.0])
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1 - self.logvar).sum(self.dims)
        summands = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1 - self.logvar + other.logvar
        return 0.5 * summands.sum(self.dims)

    def nll(self, sample, dims=(1, 2, 3)):
        if self.deterministic:
            return torch.tensor([0.0])
        return 0.5 * (math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var).sum(dims)


@dataclass(frozen=True)
class Posterior:
    """A posterior of another project, and the call that replaces it.

    Attributes:
        shapes: of the inputs: moments, or μ and s; then those of the prior, if it has parameters.
        theirs: (ε, *inputs) → (z, KL), the project's formula.
        options: of our call.
        dim: the dimension along which moments are split; None for a pair.
        before: what becomes of the inputs before our call.
        after: what becomes of z and KL after it.
        positive: whether the second half is positive.
        spread: a factor of the second half, so that it leaves the bounds.
        dtypes: those in which the numbers are finite and `before` is exact enough.
    """

    name: str
    shapes: tuple
    theirs: object
    options: dict
    dim: int | None = None
    before: object = lambda *inputs: inputs
    after: object = lambda z, kl: (z, kl)
    positive: bool = False
    spread: float = 1.0
    dtypes: tuple = ALL

    def call(self, eps, *inputs):
        inputs = self.before(*inputs)
        if self.dim is None:
            mu, s, *prior = inputs
            return self.after(*fastvae.reparameterize_kl(mu, s, eps=eps, prior=tuple(prior) or None, **self.options))
        m, *prior = inputs
        prior = prior[0] if prior else None
        return self.after(*fastvae.reparameterize_kl_moments(m, dim=self.dim, eps=eps, prior=prior, **self.options))

    def kl(self, *inputs):
        """The KL alone."""
        inputs = self.before(*inputs)
        if self.dim is None:
            return self.after(inputs[0], fastvae.gaussian_kl(*inputs, **self.options))[1]
        parts = [half for t in inputs for half in t.chunk(2, self.dim)]
        return self.after(parts[0], fastvae.gaussian_kl(*parts, **{"kl_dims": "all"} | self.options))[1]

    def inputs(self, dtype, layout="contiguous"):
        """ε and the inputs, with values of which some, but not all, are beyond the bounds."""
        generator = torch.Generator().manual_seed(5)
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        halves = [half for t in inputs for half in t.chunk(2, self.dim)] if self.dim is not None else inputs
        for s in halves[1::2]:
            s.mul_(self.spread)
            if self.positive:
                s.abs_().add_(0.3)
        eps = torch.randn(halves[0].shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        # Noise is usually drawn contiguous.
        noise_layout = "contiguous" if layout in ("channels_last", "part") else layout
        return [LAYOUTS[noise_layout](eps), *(LAYOUTS[layout](t.to(DEVICE, dtype)) for t in inputs)]


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t if t.ndim < 3 else t.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda t: torch.stack([t, -t], -1)[..., 0],
    "part": lambda t: torch.cat([t, t], 1).chunk(2, 1)[0] if t.ndim > 1 else t,
}
PICTURES, VIDEO, AUDIO, TOKENS, ROWS, MAPS = (3, 8, 5, 4), (2, 6, 3, 4, 2), (3, 8, 7), (3, 5, 8), (6, 5), (3, 4, 5, 2)
BOUNDS = {"logvar_bounds": (-30.0, 20.0)}
STABLE_AUDIO = {"scale": "softplus", "scale_offset": 1e-4, "kl_dims": 1}
NVAE = {"scale": "log_std", "scale_offset": 1e-2, "soft_clamp": 5.0, "kl_dims": ()}
FAR = {"spread": 20.0, "dtypes": PRECISE}
DIFFUSERS = partial(latent_diffusion, None)

POSTERIORS = [
    Posterior("diffusers", (PICTURES,), DIFFUSERS, BOUNDS, 1),
    Posterior("diffusers, clamped", (PICTURES,), DIFFUSERS, BOUNDS, 1, **FAR),
    Posterior("diffusers, kl(other)", (PICTURES,) * 2, DIFFUSERS, BOUNDS, 1),
    Posterior("diffusers, kl(other), clamped", (PICTURES,) * 2, DIFFUSERS, BOUNDS, 1, **FAR),
    Posterior("diffusers, kl(other) of one prior", (PICTURES, (1, 8, 1, 1)), DIFFUSERS, BOUNDS, 1),
    Posterior("video", (VIDEO,), DIFFUSERS, BOUNDS, 1),
    Posterior("video, clamped", (VIDEO,), DIFFUSERS, BOUNDS, 1, **FAR),
    Posterior("video, as diffusers sums it", (VIDEO,), partial(latent_diffusion, (1, 2, 3)), {**BOUNDS, "kl_dims": (1, 2, 3)}, 1),
    Posterior("Stable Audio", (AUDIO,), stable_audio, STABLE_AUDIO, 1, after=twice_the_mean),
    # Beyond 20, PyTorch takes softplus(s) for s: an error of 2e-9.
    Posterior("Stable Audio, far", (AUDIO,), stable_audio, STABLE_AUDIO, 1, after=twice_the_mean, spread=20.0, dtypes=(torch.float32,)),
    Posterior("tokens", (TOKENS,), halves(-1, pythae), {"kl_dims": -1}, -1),
    Posterior("tokens of one dimension", ((4, 2),), halves(-1, pythae), {}, -1),
    Posterior("scvi-tools", (ROWS,) * 2, partial(scvi, torch.exp), {"scale_offset": 1e-4}),
    Posterior(
        "scvi-tools, softplus and a prior's mean and scale",
        (ROWS, ROWS, (5,), (5,)),
        lambda eps, mu, s, prior_mu, raw: scvi(F.softplus, eps, mu, s, prior_mu, raw.exp()),
        {"scale": "variance"},
        before=lambda mu, s, prior_mu, raw: (mu, F.softplus(s) + 1e-4, prior_mu, raw.exp() ** 2),
        dtypes=PRECISE,
    ),
    Posterior("scvi-tools, ln", (ROWS,) * 2, scvi_ln, {"scale_offset": 1e-4}, after=lambda z, kl: (z.softmax(-1), kl)),
    Posterior("NVAE", (MAPS,) * 4, nvae, NVAE),
    Posterior("NVAE, clamped", (MAPS,) * 4, nvae, NVAE, spread=5.0, dtypes=PRECISE),
    Posterior("NVAE, first group", (MAPS,) * 2, lambda eps, *q: nvae(eps, *with_zeros(*q)), NVAE, before=with_zeros),
    Posterior("torch.distributions", (ROWS,) * 2, torch_distributions, {"scale": "std"}, positive=True),
    Posterior("torch.distributions, two normals", (ROWS,) * 4, torch_distributions, {"scale": "std"}, positive=True),
    Posterior("pythae", (ROWS,) * 2, pythae, {}),
    Posterior("multivae", (ROWS,) * 4, multivae, {}),
    Posterior("multivae, one prior", (ROWS, ROWS, (5,), (5,)), multivae, {}),
    Posterior("maps of mu and logvar", (MAPS,) * 2, pythae, {"kl_dims": (-1,)}),
]


def outputs_and_gradients(function, inputs):
    """Results of a function and their gradients to inputs, which keep their layout, from gradients in the layout of the results."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    # Few digits, so that they are the same in every dtype.
    drawn = [torch.randn(t.shape, generator=generator).bfloat16() for t in results]
    upstream = [torch.empty_like(t).copy_(values) for t, values in zip(results, drawn, strict=True)]
    return results, torch.autograd.grad(results, leaves, upstream)


def assert_close(actual, exact):
    """Each number in float64; the norm in other dtypes."""
    exact = exact.detach()
    assert actual.shape == exact.shape
    if actual.dtype == torch.float64:
        worst = ((actual - exact).abs() / exact.abs().clamp(min=1)).max()
        assert worst <= FLOAT64
    else:
        error, norm = (actual.double() - exact).norm(), exact.norm()
        assert error <= TOLERANCE[actual.dtype] * norm


CASES = [(posterior, dtype) for posterior in POSTERIORS for dtype in posterior.dtypes]


@pytest.mark.parametrize(
    ("posterior", "dtype", "layout"),
    [
        pytest.param(posterior, dtype, layout, id=f"{posterior.name}-{dtype}-{layout}")
        for posterior, dtype in CASES
        for layout in (LAYOUTS if dtype in PRECISE else ["contiguous", "channels_last"])
    ],
)
def test_a_posterior_of_another_project(posterior, dtype, layout):
    eps, *inputs = posterior.inputs(dtype, layout)
    (z, kl), grads = outputs_and_gradients(partial(posterior.call, eps), inputs)
    exact, exact_grads = outputs_and_gradients(partial(posterior.theirs, eps.double()), [t.double() for t in inputs])
    assert (z.dtype, kl.dtype) == (dtype, accumulation(dtype))
    assert_close(z, exact[0])
    assert_close(kl, exact[1])
    for t, grad, exact_grad in zip(inputs, grads, exact_grads, strict=True):
        assert grad.dtype == t.dtype
        assert_close(grad, exact_grad)
    if layout == "channels_last" and inputs[0].ndim > 3:
        memory_format = torch.channels_last if inputs[0].ndim == 4 else torch.channels_last_3d
        assert all(t.is_contiguous(memory_format=memory_format) for t in (z, grads[0]))


@pytest.mark.parametrize(
    ("posterior", "dtype"), [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in CASES if case[1] in PRECISE]
)
def test_the_kl_alone(posterior, dtype):
    _, *inputs = posterior.inputs(dtype)
    (kl,), grads = outputs_and_gradients(lambda *t: [posterior.kl(*t)], inputs)
    exact_inputs = [t.double() for t in inputs]
    (exact,), exact_grads = outputs_and_gradients(lambda *t: [posterior.theirs(torch.zeros((), dtype=torch.float64), *t)[1]], exact_inputs)
    for actual, expected in zip((kl, *grads), (exact, *exact_grads), strict=True):
        assert_close(actual, expected)


def test_a_scale_beyond_its_bounds_gets_no_gradient():
    m = torch.zeros(1, 4, 1, 1, dtype=torch.float64, device=DEVICE)
    m[0, 2:, 0, 0] = torch.tensor([-31.0, 20.5])
    m.requires_grad_()
    z, kl = fastvae.reparameterize_kl_moments(m, eps=torch.ones_like(m[:, :2]), logvar_bounds=(-30.0, 20.0))
    (grad,) = torch.autograd.grad(z.sum() + kl.sum(), m)
    assert grad.flatten().tolist() == [1, 1, 0, 0]


def test_losses_of_means():
    """Their gradients are expanded scalars."""
    posterior = POSTERIORS[0]
    eps, m = posterior.inputs(torch.float64)
    grads = []
    for function, x in ((posterior.call, m), (posterior.theirs, m.clone())):
        leaf = x.requires_grad_()
        z, kl = function(eps, leaf)
        grads.append(torch.autograd.grad(z.mean() + 1e-6 * kl.mean(), leaf)[0])
    assert_close(*grads)


def own_class():
    return pytest.importorskip("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution


ORACLES = [pytest.param(lambda: Transcribed, id="transcribed"), pytest.param(own_class, id="diffusers", marks=pytest.mark.slow)]
CALLS = {
    **{name: lambda q, p, x, name=name: getattr(q, name) for name in ("mean", "logvar", "std", "var")},
    "mode()": lambda q, p, x: q.mode(),
    "sample()": lambda q, p, x: q.sample(),
    "sample(generator)": lambda q, p, x: q.sample(torch.Generator(DEVICE).manual_seed(3)),
    "sample(generator=)": lambda q, p, x: q.sample(generator=torch.Generator(DEVICE).manual_seed(3)),
    "kl()": lambda q, p, x: q.kl(),
    "kl(other)": lambda q, p, x: q.kl(p),
    "kl(other=)": lambda q, p, x: q.kl(other=p),
    "nll(sample)": lambda q, p, x: q.nll(x),
    "nll(sample, dims)": lambda q, p, x: q.nll(x, dims=(1, -1)),
    "nll of the sample": lambda q, p, x: q.nll(q.sample(torch.Generator(DEVICE).manual_seed(3)), [1, 2, 3]),
}


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize("oracle", ORACLES)
def test_the_class_of_latent_diffusion(oracle, spread, deterministic, layout):
    oracle = oracle()
    generator = torch.Generator().manual_seed(0)
    m, other, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (PICTURES, PICTURES, (*MAPS[:1], 4, 5, 4)))
    m[:, 4:] *= spread
    for name, call in CALLS.items():
        found = []
        for posterior in (fastvae.DiagonalGaussianDistribution, oracle):
            leaves = [LAYOUTS[layout](t).clone().requires_grad_() for t in (m, other, x)]
            torch.manual_seed(1)
            result = call(posterior(leaves[0], deterministic), posterior(leaves[1]), leaves[2])
            grads = [None] * 3
            if result.requires_grad:
                grads = torch.autograd.grad(
                    (result * torch.linspace(1, 2, result.numel()).view_as(result)).sum(), leaves, allow_unused=True
                )
            found.append((result, *(torch.zeros(1) if g is None or not g.any() else g for g in grads)))
        for actual, expected in zip(*found, strict=True):
            assert actual.shape == expected.shape, name
            assert_close(actual.double(), expected.double())


@needs_cpu
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [PICTURES, VIDEO, AUDIO], ids=str)
def test_sample_and_kl_are_the_two_in_one_pass(shape, layout, seeded):
    m = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64))
    found = []
    for one_pass in (True, False):
        torch.manual_seed(4)
        leaf, generator = m.clone().requires_grad_(), torch.Generator().manual_seed(5) if seeded else None
        posterior = fastvae.DiagonalGaussianDistribution(leaf)
        z, kl = posterior.sample_and_kl(generator) if one_pass else (posterior.sample(generator), posterior.kl())
        found.append((z, kl, *torch.autograd.grad((z * z.detach()).sum() + kl.sum(), leaf)))
    assert found[0][1].shape == shape[:1]
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


def test_a_deterministic_posterior_samples_its_mean():
    m = torch.randn(PICTURES, dtype=torch.float64, device=DEVICE)
    z, kl = fastvae.DiagonalGaussianDistribution(m, deterministic=True).sample_and_kl()
    assert torch.equal(z, m[:, :4])
    assert kl.tolist() == [0.0]


@needs_cpu
def test_the_class_takes_the_scales_of_other_projects():
    m = torch.randn(AUDIO, dtype=torch.float64)
    posterior = fastvae.DiagonalGaussianDistribution(m, logvar_bounds=None, scale="softplus", scale_offset=1e-4)
    z, kl = stable_audio(torch.randn(m[:, :4].shape, generator=torch.Generator().manual_seed(2), dtype=m.dtype), m)
    assert_close(posterior.sample(torch.Generator().manual_seed(2)), z)
    assert_close(2 * posterior.kl().mean() / m.shape[-1], kl)
    assert_close(posterior.std, F.softplus(m[:, 4:]) + 1e-4)
    assert_close(posterior.logvar, 2 * posterior.std.log())
    tokens = fastvae.DiagonalGaussianDistribution(m.mT, dim=-1, logvar_bounds=None, scale="softplus", scale_offset=1e-4)
    assert_close(tokens.kl(), posterior.kl())
    assert_close(tokens.mean, posterior.mean.mT)


def trained(monkeypatch, posterior, one_pass=False):
    """Losses and weights of a few steps of diffusers' AutoencoderKL, with a class of the posterior."""
    from diffusers.models.autoencoders import autoencoder_kl

    monkeypatch.setattr(autoencoder_kl, "DiagonalGaussianDistribution", posterior)
    torch.manual_seed(0)
    channels = {"block_out_channels": (8,), "norm_num_groups": 2, "latent_channels": 2}
    model = autoencoder_kl.AutoencoderKL(**channels, mid_block_add_attention=False).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pictures, losses = torch.rand(4, 3, 8, 8, dtype=torch.float64), []
    for _ in range(5):
        latents = model.encode(pictures).latent_dist
        assert type(latents) is posterior
        z, kl = latents.sample_and_kl() if one_pass else (latents.sample(), latents.kl())
        loss = (model.decode(z).sample - pictures).abs().sum() / 4 + 0.1 * kl.sum() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


@needs_cpu
@pytest.mark.slow
def test_autoencoder_kl_trains_with_one_name_replaced(monkeypatch):
    theirs = trained(monkeypatch, own_class())
    assert theirs[0][-1] < 0.99 * theirs[0][0]
    for one_pass in (False, True):
        ours = trained(monkeypatch, fastvae.DiagonalGaussianDistribution, one_pass)
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_learned_conditional_prior_goes_to_the_moments_of_its_posteriors():
    """Of fixed N(μ_i, σ_i²) with label c, argmin Σ KL to N(m_c, v_c) has m_c = mean μ_i and v_c = mean (σ_i² + (μ_i − m_c)²)."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(60, 2, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2))
    labels = torch.arange(60, device=DEVICE) % 3
    mu += labels[:, None]
    prior = [torch.zeros(3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(prior, lr=0.5)
    for _ in range(150):
        _, kl = fastvae.reparameterize_kl(mu, logvar, prior=(prior[0][labels], prior[1][labels]))
        loss = 3 * kl.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    groups = [(mu[labels == c], logvar[labels == c]) for c in range(3)]
    mean = torch.stack([m.mean(0) for m, _ in groups])
    variance = torch.stack([(lv.exp() + (m - m.mean(0)) ** 2).mean(0) for m, lv in groups])
    least = 0.5 * (variance.log() - torch.stack([lv.mean(0) for _, lv in groups])).sum(1)
    torch.testing.assert_close(prior[0].detach(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prior[1].detach().exp(), variance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.detach().view(20, 3).mean(0), least, rtol=1e-6, atol=1e-6)


def sequence_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def allocated(function):
    """Bytes of each allocation of a call, with one thread, in order."""
    with one_thread(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, sizes


def peak(sizes):
    live = most = 0
    for size in sizes:
        live += size
        most = max(most, live)
    return most


# No less than one array of a block, of which the CPU path may hold several at a time; the least array of a test is four times as large.
BLOCK = 1 << 20


LARGE = [
    pytest.param(shape, layout, id=f"{shape}-{layout}")
    for shape in ((16, 8, 128, 128), (16, 8, 8, 64, 32), (16, 8, 16384), (16, 16384, 8))
    for layout in LAYOUTS
    if (shape[-1], layout) != (8, "permuted")
]
# Neither the dimensions that are summed over nor the others are neighbours in memory.
LARGE += [((16, 16384, 8), name) for name in ("permuted", "sequence_first")]


@needs_cpu
@pytest.mark.parametrize(("shape", "layout"), LARGE)
def test_no_layout_is_copied(shape, layout):
    """Forward allocates z and KL, backward one array of the size of the moments; all else is as large as a block."""
    dim = -1 if shape[-1] == 8 else 1
    m = (LAYOUTS | {"sequence_first": sequence_first})[layout](torch.randn(shape)).requires_grad_()
    eps, dz = (torch.randn_like(m.detach().chunk(2, dim)[0]) for _ in range(2))
    (z, kl), sizes = allocated(lambda: fastvae.reparameterize_kl_moments(m, dim=dim, eps=eps, logvar_bounds=(-1.0, 1.5)))
    assert [n for n in sizes if n > BLOCK] == [z.nbytes]
    assert peak(sizes) <= z.nbytes + kl.nbytes + 3 * BLOCK
    dkl = torch.rand_like(kl)
    (grad,), sizes = allocated(lambda: torch.autograd.grad((z, kl), m, (dz, dkl)))
    assert [n for n in sizes if n > BLOCK] == [grad.nbytes]
    assert peak(sizes) <= grad.nbytes + 3 * BLOCK
    mu, raw = m.chunk(2, dim)
    logvar = raw.clamp(-1, 1.5)
    exact = pythae(eps, mu, logvar)[0], 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    for actual, expected in zip((z, kl, grad), (*exact, *torch.autograd.grad(exact, m, (dz, dkl))), strict=True):
        assert_close(actual, expected)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_of_moments_are_not_copied(layout):
    mu, logvar = LAYOUTS[layout](torch.randn(16, 8, 128, 128)).chunk(2, 1)
    eps = torch.randn_like(mu)
    (z, _), sizes = allocated(lambda: fastvae.reparameterize_kl(mu, logvar, eps=eps, kl_dims="all"))
    assert [n for n in sizes if n > BLOCK] == [z.nbytes]


M, P, X = torch.zeros(4, 6, 5, 3), torch.zeros(4, 6, 5, 2), torch.zeros(4, 3)
MOMENTS, CLASS = fastvae.reparameterize_kl_moments, fastvae.DiagonalGaussianDistribution
PAIR, KL = partial(fastvae.reparameterize_kl, X, X), partial(fastvae.gaussian_kl, X, X)
BAD = [
    ("moments", partial(MOMENTS, M[:, :5])),
    ("moments", partial(MOMENTS, M, dim=2)),
    ("parameters", partial(CLASS, M[:, :5])),
    ("dim", partial(MOMENTS, M, dim=4)),
    ("dim", partial(MOMENTS, M, dim=-5)),
    ("dim", partial(CLASS, M, dim=4)),
    ("kl_dims", partial(MOMENTS, M, kl_dims=4)),
    ("kl_dims", partial(MOMENTS, M, kl_dims=(1, -3))),
    ("kl_dims", partial(MOMENTS, M, kl_dims="every")),
    ("kl_dims", partial(PAIR, kl_dims=(1, 1))),
    ("kl_dims", partial(KL, kl_dims=-3)),
    ("prior", partial(MOMENTS, M, prior=P)),
    ("prior", partial(MOMENTS, M, prior=M[:, :5])),
    ("prior", partial(MOMENTS, M, prior=M[:, :1])),
    ("prior", partial(MOMENTS, M, prior=(M, M))),
    ("prior", partial(PAIR, prior=X)),
    ("prior", partial(PAIR, prior=(X,))),
    (r"prior\w*", partial(PAIR, prior=(X, X[:, :2]))),
    (r"prior\w*", partial(PAIR, prior=(X.double(), X.double()))),
    (r"prior\w*", partial(KL, X[:2], X[:2])),
    (r"prior_\w+", partial(KL, X)),
    ("logvar", partial(fastvae.gaussian_kl, X, None)),
    ("logvar", partial(fastvae.reparameterize_kl, X, None)),
    ("kl_dims", partial(MOMENTS, M, kl_dims=torch.tensor([0, 1]))),
    ("kl_dims", partial(MOMENTS, M, kl_dims=None)),
    ("half of moments", partial(MOMENTS, M, eps=M)),
    ("generator", partial(MOMENTS, M, generator=3)),
    ("deterministic", partial(CLASS, M, M)),
    ("other", partial(CLASS(M).kl, 3)),
    ("parameters of self", partial(CLASS(M).kl, CLASS(M[..., :2]))),
    ("sample", partial(CLASS(M).nll, M)),
    ("generator", partial(CLASS(M).sample, [torch.Generator(), torch.Generator()])),
    ("generator", partial(CLASS(M).sample_and_kl, 3)),
    ("sample", partial(CLASS(M).nll, M[:, :3][None])),
]
for call in (partial(MOMENTS, M), PAIR, KL, partial(CLASS, M)):
    BAD += [
        ("logvar_bounds", partial(call, logvar_bounds=(20.0, -30.0))),
        ("logvar_bounds", partial(call, logvar_bounds=(1.0,))),
        ("logvar_bounds", partial(call, logvar_bounds=(-30.0, 10.0), scale="softplus")),
        ("logvar_bounds", partial(call, logvar_bounds=(-1e40, 1e40))),
        ("scale", partial(call, scale="sigma", logvar_bounds=None)),
        ("soft_clamp", partial(call, soft_clamp=0.0)),
    ]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_a_bad_call_gets_one_sentence(name, call):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* must .*, got .+$") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_attribute_read_without_gradients_does_not_cut_them():
    parameters = M.clone().requires_grad_()
    posterior = CLASS(parameters)
    with torch.no_grad():
        assert posterior.mean.isfinite().all()
        assert posterior.std.isfinite().all()
    assert torch.autograd.grad(posterior.sample().sum() + posterior.var.sum(), parameters)[0].any()


def test_the_class_compiles_whole():
    def loss(m):
        posterior = CLASS(m)
        z, kl = posterior.sample_and_kl()
        return posterior.mode().sum() + posterior.std.sum() + kl.sum() + 0 * z.sum() + CLASS(m, scale="softplus").kl().sum()

    parameters = torch.rand_like(M)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(parameters), loss(parameters))


def test_a_deterministic_sample_is_no_view():
    parameters = torch.ones(2, 4, 3, 3)
    for z in (CLASS(parameters, True).sample(), CLASS(parameters, True).sample_and_kl()[0]):
        z.zero_()
    assert parameters.all()


def test_generators_of_each_item():
    def generators():
        return [torch.Generator().manual_seed(n) for n in range(len(M))]

    posterior = CLASS(M)
    each = torch.cat([CLASS(m[None]).sample(generator=g) for m, g in zip(M, generators(), strict=True)])
    torch.testing.assert_close(posterior.sample(generators()), each)
    torch.testing.assert_close(posterior.sample_and_kl(generators())[0], each)


def test_posteriors_are_broadcast_to_one_another():
    one, all_ = CLASS(torch.randn(1, 4, 2, 2)), CLASS(torch.randn(3, 4, 2, 2))
    torch.testing.assert_close(one.kl(all_), CLASS(one.parameters.expand(3, -1, -1, -1)).kl(all_))
    torch.testing.assert_close(all_.kl(one), all_.kl(CLASS(one.parameters.expand(3, -1, -1, -1))))


def test_nll_in_half_precision():
    parameters = torch.zeros(2, 2, 3, dtype=torch.float16)
    parameters[:, 1] = -20
    nll = CLASS(parameters).nll(torch.full((2, 1, 3), 0.001, dtype=torch.float16))
    exact = CLASS(parameters.double()).nll(torch.full((2, 1, 3), 0.001, dtype=torch.float16).double())
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=0)


def test_a_posterior_of_fewer_dimensions():
    p, q = CLASS(torch.randn(5, 4, 6, 2)), CLASS(torch.randn(6, 2))
    expected = 0.5 * ((p.mean - q.mean).square() / q.var + p.var / q.var - 1 - p.logvar + q.logvar).sum((1, 2, 3))
    torch.testing.assert_close(p.kl(q), expected)


def test_priors_under_autocast():
    mu, logvar, prior_mu, prior_logvar = (torch.randn(4, 6).bfloat16() for _ in range(4))
    expected = fastvae.gaussian_kl(*(t.float() for t in (mu, logvar, prior_mu, prior_logvar)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fastvae.gaussian_kl(mu, logvar, prior_mu, prior_logvar), expected)
        torch.testing.assert_close(fastvae.gaussian_kl(mu.float(), logvar.float(), prior_mu, prior_logvar), expected)
