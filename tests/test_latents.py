"""Latents with channels, height and width: the VAE, its objectives, and the command with the networks of AutoencoderKL."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn

from fastvae import VAE, Bernoulli, Gaussian, Laplace, VAEObjective, VAEOutput, mmd, mmd_to_normal
from fastvae.objectives import ImportanceWeighted

N, C, H, W = 6, 2, 3, 2
SHAPE = (C, H, W)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


class Pair(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=1)


def vae(encoder=None, latent_dim=SHAPE, **options):
    """Encoder: three channels to 2·C of half the size; decoder: back."""
    torch.manual_seed(0)
    encode = nn.Conv2d(3, 2 * C, 2, stride=2)
    encoder = encode if encoder is None else nn.Sequential(encode, encoder)
    return VAE(encoder, nn.ConvTranspose2d(C, 3, 2, stride=2), latent_dim=latent_dim, **options).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("encoder", [None, Pair()])
def test_forward_is_that_of_the_flattened_latents(encoder, layout):
    model = vae(encoder, logvar_bounds=(-8.0, 2.0)).to(memory_format=layout)
    x, eps = noise(N, 3, 2 * H, 2 * W).contiguous(memory_format=layout), noise(N, *SHAPE, seed=1)
    output = model(x, eps=eps)
    mu, raw = model.encoder(x).chunk(2, dim=1) if encoder is None else model.encoder(x)
    logvar = -3 + 5 * ((raw + 3) / 5).tanh()
    torch.testing.assert_close(output.mu, mu)
    torch.testing.assert_close(output.logvar, logvar)
    torch.testing.assert_close(output.z, mu + (logvar / 2).exp() * eps, check_stride=False)
    torch.testing.assert_close(output.reconstruction, model.decoder(output.z), check_stride=False)
    kl = D.kl_divergence(D.Normal(mu, (logvar / 2).exp()), D.Normal(0.0, 1.0))
    torch.testing.assert_close(output.kl, kl.flatten(1).sum(1))
    assert (model.latent_dim, model.latent_shape, tuple(model.sample(4).shape)) == (C * H * W, SHAPE, (4, 3, 2 * H, 2 * W))


def test_means_are_not_copied():
    encoded = noise(N, 2 * C, H, W).contiguous(memory_format=torch.channels_last)
    model = VAE(nn.Identity(), nn.Identity(), latent_dim=SHAPE)
    assert model.encode(encoded)[0].data_ptr() == encoded.data_ptr()
    z = noise(N, C, H, W).contiguous(memory_format=torch.channels_last)
    assert VAEObjective(mmd_rows="location")._rows(z).data_ptr() == z.data_ptr()


def test_other_sizes_of_pictures():
    model = VAE.autoencoder_kl((3, 8, 8), channels=(4, 8, 8))
    x = torch.rand(2, 3, 12, 20)
    output = model(x)
    assert output.z.shape == (2, 4, 3, 5)
    assert output.reconstruction.shape == model.reconstruct(x).shape == x.shape
    assert model.sample(2).shape == (2, 3, 8, 8)
    assert model(x, samples=3).z.shape == (6, 4, 3, 5)
    assert VAEObjective.info_vae(0.5, 3.0, mmd_rows="location")(output, x).loss.isfinite()


@pytest.mark.parametrize("posterior", ["gaussian", "deterministic"])
@pytest.mark.parametrize(("channels", "factor"), [((4,), 1), ((4, 8, 12), 4), ((2, 4, 4, 8), 8)])
def test_shapes_of_autoencoder_kl(channels, factor, posterior):
    model = VAE.autoencoder_kl((1, 16, 8), latent_channels=3, channels=channels, blocks=2, posterior=posterior)
    output = model(torch.rand(2, 1, 16, 8))
    assert output.z.shape[1:] == model.latent_shape == (3, 16 // factor, 8 // factor)
    assert output.reconstruction.shape == (2, 1, 16, 8)
    # Each block adds to what it gets; latent diffusion has 32 groups at 128 channels and more.
    norms = [m for m in VAE.autoencoder_kl((3, 8, 8), channels=(128, 256)).modules() if isinstance(m, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32}


def test_a_residual_block_adds_to_its_shortcut():
    from fastvae.autoencoder_kl import ResidualBlock

    x = torch.randn(2, 4, 5, 5)
    for width in (4, 8):
        block = ResidualBlock(4, width)
        norm, _, conv, norm2, _, conv2 = block.residual
        assert torch.equal(block(x), block.shortcut(x))  # until it is trained
        nn.init.normal_(conv2.weight)
        f = conv2(nn.functional.silu(norm2(conv(nn.functional.silu(norm(x))))))
        torch.testing.assert_close(block(x), f + (x if width == 4 else block.shortcut(x)))
        assert all(layer.kernel_size == (3, 3) for layer in (conv, conv2))


def test_pixels_of_autoencoder_kl_lie_between_minus_one_and_one_inside():
    model = VAE.autoencoder_kl((1, 4, 4), channels=(4,))
    inputs = []
    model.encoder[1].register_forward_hook(lambda layer, args, result: inputs.append(args[0]))
    x = torch.rand(2, 1, 4, 4)
    z, _ = model.encode(x)
    assert torch.equal(inputs[0], 2 * x - 1)
    last = model.decoder[-2]
    assert isinstance(last, nn.Conv2d)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, -1.0)
    assert not model.decode(z).any()
    nn.init.constant_(last.bias, 1.0)
    assert (model.decode(z) == 1).all()


def outputs(samples=1):
    """An output with latents (N, C, H, W), and the same with (N, C·H·W)."""
    mu, logvar, eps = noise(N, *SHAPE), noise(N, *SHAPE, seed=1), noise(N * samples, *SHAPE, seed=2)
    reconstruction = noise(N * samples, 5, seed=3)

    def output(*latents):
        mu, logvar, eps = (t.detach().clone().requires_grad_() for t in latents)
        z = mu.repeat_interleave(samples, 0) + (logvar / 2).exp().repeat_interleave(samples, 0) * eps
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
        return VAEOutput(reconstruction, z, mu, logvar, kl, Gaussian(), None, eps)

    return output(mu, logvar, eps), output(*(t.flatten(1) for t in (mu, logvar, eps)))


@pytest.mark.parametrize(
    "objective",
    [
        VAEObjective.vae(),
        VAEObjective.vae(free_bits=0.8, free_bits_group=H * W),
        VAEObjective.info_vae(0.5, 10.0),
        VAEObjective.wae_mmd(10.0, kernel="imq"),
        VAEObjective.beta_tc_vae(4.0, 50),
        VAEObjective.capacity_vae(3.0, 2.0),
        VAEObjective.dip_vae(2.0, kind="ii"),
        VAEObjective.iwae(3),
        VAEObjective.iwae(3, gradient="doubly"),
    ],
    ids=lambda objective: f"{type(objective).__name__}({objective.extra_repr()})",
)
def test_objectives_are_those_of_the_flattened_latents(objective):
    x, prior = noise(N, 5, seed=4), noise(7, *SHAPE, seed=5)
    results = []
    for output, drawn in zip(outputs(objective.samples), (prior, prior.flatten(1)), strict=True):
        terms = objective(output, x, all_terms=True, prior=drawn)
        gradients = torch.autograd.grad(terms.loss, [output.mu, output.logvar])
        results.append([terms.loss, terms.kl, terms.mmd, *(gradient.flatten(1) for gradient in gradients)])
    # An MMD of weight zero draws its own sample of the prior, but has a closed form here.
    for result, flattened in zip(*results, strict=True):
        torch.testing.assert_close(result, flattened)


def rows_of_locations(t):
    return np.array([t[n, :, h, w].tolist() for n in range(len(t)) for h in range(H) for w in range(W)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_the_mmd_of_locations(kernel, layout):
    output, flat = outputs()
    output = output._replace(z=output.z.contiguous(memory_format=layout))
    prior, x = noise(5, *SHAPE, seed=5), noise(N, 5, seed=4)
    objective = VAEObjective(kl_weight=0.0, mmd_weight=2.0, kernel=kernel, mmd_rows="location")
    rows, drawn = torch.from_numpy(rows_of_locations(output.z)), torch.from_numpy(rows_of_locations(prior))
    if kernel == "rbf":
        expected = mmd_to_normal(rows, bandwidth=math.sqrt(C), estimator="unbiased", backend="reference")
    else:
        scales = [math.sqrt(2 * C * s) for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
        expected = mmd(rows, drawn, bandwidth=scales, kernel="imq", estimator="unbiased", backend="reference")
    terms = objective(output, x, prior=prior)
    torch.testing.assert_close(terms.mmd, expected)
    torch.testing.assert_close(objective(output, x, prior=drawn).mmd, expected)
    # One sample has several rows.
    assert objective(VAEOutput(*(t[:1] for t in output[:5]), Gaussian()), x[:1], prior=prior).loss.isfinite()
    # Codes (N, D) have one location.
    whole = VAEObjective(kl_weight=0.0, mmd_weight=2.0, kernel=kernel)
    drawn = prior.flatten(1)
    assert torch.equal(objective(flat, x, prior=drawn).mmd, whole(flat, x, prior=drawn).mmd)


@pytest.mark.parametrize(
    "build", [VAEObjective.mmd_vae, VAEObjective.wae_mmd, lambda lambda_, **rows: VAEObjective.info_vae(1.0, lambda_, **rows)]
)
def test_constructors_take_mmd_rows(build):
    assert build(3.0).mmd_rows == "sample"
    objective = build(3.0, mmd_rows="location")
    assert objective.mmd_rows == "location"
    assert "mmd_rows='location'" in repr(objective)


def test_log_likelihood_is_that_of_the_flattened_latents():
    model = vae()
    flat = VAE(
        nn.Sequential(model.encoder, nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, SHAPE), model.decoder),
        latent_dim=C * H * W,
    )
    # Flattened, the means come first too: channels are the outermost dimension.
    x = noise(N, 3, 2 * H, 2 * W)
    values = [m.log_likelihood(x, samples=5, chunk=3, generator=generator()) for m in (model, flat)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(m(x, samples=4, generator=generator(1)).z.flatten(1) for m in (model, flat)))
    objective = ImportanceWeighted(4)
    torch.testing.assert_close(*(objective(m(x, samples=4, generator=generator(1)), x).loss for m in (model, flat)))


def test_one_graph():
    model, objective = vae(), VAEObjective.info_vae(0.5, 10.0, mmd_rows="location")

    def step(x, eps):
        return objective(model(x, eps=eps), x).loss

    x, eps = noise(3, 3, 2 * H, 2 * W), noise(3, *SHAPE)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x, eps), step(x, eps))


def test_laplace_is_that_of_torch():
    x, reconstruction = noise(N, 3, 4), noise(N, 12, seed=1)
    for scale in (1.0, 0.2):
        likelihood = Laplace(scale)
        expected = D.Laplace(reconstruction, scale).log_prob(x.flatten(1)).sum(1)
        torch.testing.assert_close(likelihood.log_prob(reconstruction, x), expected)
        torch.testing.assert_close(likelihood.mean_log_prob(reconstruction, x), expected.mean())
    assert likelihood.mean(reconstruction) is reconstruction
    assert repr(likelihood) == "Laplace(scale=0.2)"
    assert likelihood.log_prob(reconstruction.bfloat16(), x.bfloat16()).dtype == torch.float32

    class Half(Laplace):
        def log_prob(self, reconstruction, x):
            return super().log_prob(reconstruction, x) / 2

    torch.testing.assert_close(Half().mean_log_prob(reconstruction, x), Laplace().mean_log_prob(reconstruction, x) / 2)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: vae(latent_dim=()), ValueError, r"latent_dim must be a number or a shape \(C, H, W\), got an empty one"),
        (lambda: vae(latent_dim=(2, 0, 3)), ValueError, "every size of latent_dim must be at least 1, got 0"),
        (lambda: vae(latent_dim=(2, 1.5, 3)), TypeError, "every size of latent_dim must be an integer, got float"),
        (lambda: vae(latent_dim="234"), TypeError, "latent_dim must be an integer, got str"),
        (lambda: VAE.mlp(5, latent_dim=(2, 1, 1)), TypeError, "latent_dim must be an integer, got tuple"),
        (
            lambda: vae(latent_dim=(3, H, W))(noise(N, 3, 4, 4)),
            ValueError,
            r"encoder's result must have shape \(N, 6, H, W\), got \(6, 4, 2, 2\)",
        ),
        (lambda: vae(latent_dim=4)(noise(N, 3, 4, 4)), ValueError, r"encoder's result must have shape \(N, 8\), got \(6, 4, 2, 2\)"),
        (lambda: vae(latent_dim=(2, 9))(noise(N, 3, 4, 4)), ValueError, r"must have shape \(N, 4, …\), got \(6, 4, 2, 2\)"),
        (
            lambda: vae(Pair(), latent_dim=(4, H, W))(noise(N, 3, 4, 4)),
            ValueError,
            r"encoder's mu must have shape \(N, 4, H, W\), got \(6, 2, 2, 2\)",
        ),
        (lambda: VAE.autoencoder_kl((3, 6, 8)), ValueError, r"H and W multiples of 4 for 3 numbers of channels, got \(3, 6, 8\)"),
        (lambda: VAE.autoencoder_kl((64, 64)), ValueError, r"shape must be \(C, H, W\) with H and W multiples of 4"),
        (lambda: VAE.autoencoder_kl((3, 8, 8), channels=()), ValueError, "channels must hold 1 to 16 numbers, got 0"),
        (lambda: VAE.autoencoder_kl((3, 8, 8), blocks=10**9), ValueError, "blocks must be at most 16, got 1000000000"),
        (lambda: VAE.autoencoder_kl((3, 8, 8), latent_channels=0), ValueError, "latent_channels must be at least 1, got 0"),
        (
            lambda: VAEObjective.mmd_vae(1.0, mmd_rows="pixel"),
            ValueError,
            "mmd_rows must be one of 'sample', 'location', got 'pixel'",
        ),
        (lambda: VAEObjective(dip=(1.0, 1.0, "iii")), ValueError, "the kind of dip must be one of 'i', 'ii', got 'iii'"),
        (lambda: Laplace(0.0), ValueError, "scale must be greater than 0, got 0"),
    ],
)
def test_error_sentences(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_a_pretrained_autoencoder_kl(tmp_path):
    options = {"latent_channels": 2, "channels": (4, 8), "blocks": 2, "logvar_bounds": (-9.0, 3.0)}
    model = VAE.autoencoder_kl((1, 8, 4), likelihood=Laplace(0.3), **options).eval()
    model.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert (again.latent_shape, again.networks, again.logvar_bounds) == ((2, 4, 2), model.networks, (-9, 3))
    assert repr(again.likelihood) == "Laplace(scale=0.3)"
    assert torch.equal(again.sample(2, generator=generator()), model.sample(2, generator=generator()))
    changed = copy.deepcopy(model)
    changed.encoder[2].residual[1] = nn.ReLU()
    with pytest.raises(ValueError, match=r"encoder must be the one that VAE.autoencoder_kl made"):
        changed.save_pretrained(tmp_path)
    changed.networks = None
    changed.save_pretrained(tmp_path)
    own = VAE.from_pretrained(tmp_path, encoder=copy.deepcopy(changed.encoder), decoder=copy.deepcopy(changed.decoder))
    assert own.latent_shape == (2, 4, 2)
    assert isinstance(model.likelihood, Laplace)
    assert isinstance(VAE.mlp(3, latent_dim=1, likelihood="laplace").likelihood, Laplace)
    assert isinstance(VAE.mlp(3, latent_dim=1, likelihood="bernoulli").likelihood, Bernoulli)
