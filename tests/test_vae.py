import copy
import importlib.util
import json
import math
import pickle

import pytest
import torch
from torch import nn

from fastvae import Standardise, mmd
from fastvae.objectives import Gaussian, Likelihood, VAEObjective
from fastvae.vae import VAE, conv_decoder, conv_encoder, mlp_decoder, mlp_encoder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("posterior", ["gaussian", "deterministic"])
@pytest.mark.parametrize(("build", "shape"), [(VAE.mlp, 784), (VAE.mlp, (1, 8, 8)), (VAE.conv, (1, 8, 8)), (VAE.conv, (3, 7, 5))])
def test_shapes(build, shape, posterior, likelihood):
    vae = build(shape, latent_dim=4, likelihood=likelihood, posterior=posterior)
    x = torch.rand(5, *([shape] if isinstance(shape, int) else shape))
    output = vae(x)
    assert output.reconstruction.shape == x.shape == vae.reconstruct(x).shape == vae.sample(5).shape
    assert output.z.shape == output.mu.shape == (5, 4)
    if posterior == "gaussian":
        assert output.logvar.shape == (5, 4)
        assert output.kl.shape == (5,)
    else:
        assert output.z is output.mu
        assert output.logvar is None
        assert output.kl is None


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 14), (13, 31)])
@pytest.mark.parametrize("channels", [(4,), (4, 8), (4, 8, 16)])
def test_convolutions_return_to_the_size_they_came_from(size, channels):
    code = conv_encoder((2, *size), channels, 3, hidden=16)(torch.rand(2, 2, *size))
    assert code.shape == (2, 6)
    assert conv_decoder(3, channels[::-1], (2, *size), hidden=16)(code[:, :3]).shape == (2, 2, *size)


def test_forward_is_encode_reparameterise_decode():
    vae = VAE.mlp(12, latent_dim=3).double()
    x, eps = torch.rand(6, 12, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    output = vae(x, eps=eps)
    mu, logvar = vae.encode(x)
    z = mu + (logvar / 2).exp() * eps
    torch.testing.assert_close(output.z, z)
    torch.testing.assert_close(output.reconstruction, vae.decode(z))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    ).sum(1)
    torch.testing.assert_close(output.kl, expected)
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(mu))


def test_samples_of_one_x_lie_together():
    vae = VAE.mlp(12, latent_dim=3).double()
    x, eps = torch.rand(6, 12, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    output = vae(x, eps=eps, samples=4)
    assert output.z.shape == (24, 3)
    assert output.reconstruction.shape == (24, 12)
    assert output.mu.shape == output.logvar.shape == (6, 3)
    for k in range(4):
        alone = vae(x, eps=eps[:, k])
        torch.testing.assert_close(output.z[k::4], alone.z)
        torch.testing.assert_close(output.kl, alone.kl)


def linear_gaussian(sigma=0.5):
    """p(x) = N(b, W·Wᵀ + sigma²·I), with its exact posterior as the encoder."""
    torch.manual_seed(1)
    decoder = nn.Linear(2, 5).double()
    w, b = decoder.weight.detach().clone(), decoder.bias.detach()
    precision = torch.eye(2, dtype=torch.float64) + w.T @ w / sigma**2
    # Independent dimensions, as the encoder's are.
    q, values = torch.linalg.eigh(precision)[1], torch.linalg.eigvalsh(precision)
    with torch.no_grad():
        decoder.weight.copy_(w @ q)
    encoder = nn.Linear(5, 4).double()
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.weight[:2] = (w @ q).T / sigma**2 / values[:, None]
        encoder.bias[:2] = -encoder.weight[:2] @ b
        encoder.bias[2:] = -values.log()
    vae = VAE(encoder, decoder, latent_dim=2, likelihood=Gaussian(sigma)).double()
    evidence = torch.distributions.MultivariateNormal(b, w @ w.T + sigma**2 * torch.eye(5, dtype=torch.float64))
    return vae, evidence


def test_log_likelihood_of_the_exact_posterior_is_exact():
    vae, evidence = linear_gaussian()
    x = evidence.sample((7,))
    for samples, chunk in ((1, 50), (10, 3)):
        torch.testing.assert_close(vae.log_likelihood(x, samples=samples, chunk=chunk), evidence.log_prob(x))


@pytest.mark.parametrize("logvar", [-10.0, -40.0, -89.0, -300.0])
def test_log_likelihood_of_one_sample_is_the_elbo_of_a_narrow_posterior(logvar):
    """In float32 z − mu has no digit left of the noise; its mean share is ½ a dimension."""
    mu = torch.tensor([0.5, -1.0, 0.3, 2.0, 0.7, -0.2, 1.5])
    encoder = nn.Linear(7, 14)
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.bias.copy_(torch.cat([mu, torch.full_like(mu, logvar)]))
    vae = VAE(encoder, nn.Identity(), latent_dim=7)
    x = torch.zeros(4000, 7)
    output = vae(x)
    elbo = (vae.likelihood.log_prob(output.reconstruction, x) - output.kl).mean().item()
    estimate = vae.log_likelihood(x, samples=1, generator=generator())
    # Of 4000 draws of ½·Σ eps², whose variance is 7/2.
    assert estimate.mean().item() == pytest.approx(elbo, abs=5 * (3.5 / 4000) ** 0.5 + 5 * 7 * math.exp(0.5 * logvar))


def test_log_likelihood_nears_the_evidence_from_below():
    vae, evidence = linear_gaussian()
    with torch.no_grad():
        vae.encoder.bias[:2] += 0.5
    x = evidence.sample((400,))
    exact = evidence.log_prob(x).mean().item()
    gaps = [exact - vae.log_likelihood(x, samples=samples, chunk=64, generator=generator()).mean().item() for samples in (1, 10, 1000)]
    assert gaps[0] > 5 * gaps[1] > 5 * abs(gaps[2])
    assert abs(gaps[2]) < 0.02


def test_log_likelihood_holds_one_chunk_at_a_time(monkeypatch):
    vae, rows = VAE.mlp(12, latent_dim=3), []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: rows.append(len(z)) or decode(z))
    vae.log_likelihood(torch.rand(4, 12), samples=11, chunk=5)
    assert rows == [20, 20, 4]


@pytest.mark.parametrize("encoder", ["pair", "tensor"])
def test_bounded_logvar(encoder):
    low, high = -8.0, 2.0
    raw = torch.tensor([-1e30, -100.0, -3.0, -2.9, 0.0, 100.0, 1e30], dtype=torch.float64, requires_grad=True)
    module = nn.Identity() if encoder == "tensor" else Halves()
    vae = VAE(module, nn.Identity(), latent_dim=1, logvar_bounds=(low, high))
    _, logvar = vae.encode(torch.stack([torch.zeros(7), raw], dim=1))
    logvar = logvar.squeeze(1)
    assert ((logvar >= low) & (logvar <= high)).all()
    (gradient,) = torch.autograd.grad(logvar.sum(), raw)
    torch.testing.assert_close(gradient, 1 - ((logvar.detach() + 3) / 5) ** 2)
    assert gradient[2] == 1
    assert vae(torch.tensor([[0.0, 1e30]])).kl.isfinite().all()


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=1)


def test_logvar_is_not_bounded_by_default():
    vae = VAE(nn.Identity(), nn.Identity(), latent_dim=1)
    assert vae.encode(torch.tensor([[0.0, 1e4]]))[1].item() == 1e4


def test_randomness_is_an_argument():
    vae, x = VAE.mlp(12, latent_dim=3), torch.rand(6, 12)
    assert torch.equal(vae(x, generator=generator(1)).z, vae(x, generator=generator(1)).z)
    assert not torch.equal(vae(x, generator=generator(1)).z, vae(x, generator=generator(2)).z)
    assert torch.equal(vae.sample(4, generator=generator(1)), vae.sample(4, generator=generator(1)))


def test_samples_and_reconstructions_are_in_the_units_of_the_data():
    vae = VAE.mlp(12, latent_dim=3, likelihood="bernoulli")
    for image in (vae.sample(50), vae.reconstruct(100 * torch.rand(50, 12))):
        assert 0 <= image.min().item() <= image.max().item() <= 1


def test_sample_follows_the_dtype_of_the_module():
    assert VAE.mlp(12, latent_dim=3).double().sample(2).dtype == torch.float64


class Pair(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.mu, self.logvar = nn.Linear(5, 2), nn.Linear(5, width)

    def forward(self, x):
        return self.mu(x), self.logvar(x)


@pytest.mark.parametrize("encoder", [Pair(), nn.Linear(5, 4)])
def test_any_user_module(encoder):
    vae = VAE(encoder, nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5)), latent_dim=2, likelihood=Gaussian(0.3, learned=True))
    x = torch.rand(7, 5)
    VAEObjective.info_vae(0.5, 3.0)(vae(x), x).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in vae.parameters())
    assert any(name.endswith("log_sigma") for name, _ in vae.named_parameters())
    copy = VAE(encoder, vae.decoder, latent_dim=2, likelihood=Gaussian(learned=True))
    copy.load_state_dict(vae.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: VAE.mlp(5, latent_dim=0), ValueError, "latent_dim must be at least 1, got 0"),
        (
            lambda: VAE.mlp(5, latent_dim=2, likelihood="poisson"),
            ValueError,
            "likelihood must be one of 'gaussian', 'bernoulli', 'laplace', got 'poisson'",
        ),
        (
            lambda: VAE.mlp(5, latent_dim=2, posterior="flow"),
            ValueError,
            "posterior must be one of 'gaussian', 'deterministic', got 'flow'",
        ),
        (lambda: VAE.mlp(5, latent_dim=2, hidden=(0,)), ValueError, "every size of hidden must be at least 1, got 0"),
        (lambda: VAE.mlp(0, latent_dim=2), ValueError, "every size of shape must be at least 1, got 0"),
        (
            lambda: VAE.conv((1, 3, 8), latent_dim=2),
            ValueError,
            r"shape must be \(C, H, W\) with H, W ≥ 4 for 2 convolutions .*got \(1, 3, 8\)",
        ),
        (lambda: VAE.conv((8, 8), latent_dim=2), ValueError, r"shape must be \(C, H, W\)"),
        (
            lambda: VAE(nn.Linear(5, 2), nn.Identity(), latent_dim=2)(torch.rand(3, 5)),
            ValueError,
            r"encoder's result must have shape \(N, 4\), got \(3, 2\)",
        ),
        (
            lambda: VAE(Pair(3), nn.Identity(), latent_dim=2)(torch.rand(3, 5)),
            ValueError,
            r"encoder's logvar must have shape \(N, 2\), got \(3, 3\)",
        ),
        (
            lambda: VAE(nn.Linear(5, 4), nn.Identity(), latent_dim=2, posterior="deterministic")(torch.rand(3, 5)),
            ValueError,
            r"a deterministic encoder's result must have shape \(N, 2\), got \(3, 4\)",
        ),
        (
            lambda: VAE(Three(), nn.Identity(), latent_dim=2)(torch.rand(3, 5)),
            TypeError,
            r"encoder must return a tensor or the pair \(mu, logvar\), got tuple",
        ),
        (lambda: VAE.mlp(5, latent_dim=2)(torch.rand(3, 5), samples=0), ValueError, "samples must be at least 1, got 0"),
        (
            lambda: VAE.mlp(5, latent_dim=2, posterior="deterministic")(torch.rand(3, 5), samples=2),
            ValueError,
            "samples must be 1 for a deterministic posterior, which has a single code, got 2",
        ),
        (
            lambda: VAE.mlp(5, latent_dim=2, posterior="deterministic").log_likelihood(torch.rand(3, 5)),
            ValueError,
            "posterior must be 'gaussian' for a likelihood of x, got 'deterministic'",
        ),
        (
            lambda: VAE.mlp(5, latent_dim=2, logvar_bounds=(1.0, 1.0)),
            ValueError,
            r"logvar_bounds must be \(low, high\) with low < high, got \(1, 1\)",
        ),
        (lambda: VAE.mlp(5, latent_dim=2).sample(0), ValueError, "n must be at least 1, got 0"),
    ],
)
def test_error_sentences(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


class Three(nn.Module):
    def forward(self, x):
        return x, x, x


def test_builders_are_plain_modules():
    assert mlp_encoder(12, (7, 6), 3)(torch.rand(2, 3, 4)).shape == (2, 6)
    assert mlp_decoder(3, (6, 7), (3, 2, 2))(torch.rand(2, 3)).shape == (2, 3, 2, 2)
    assert [type(m).__name__ for m in mlp_encoder(12, (7,), 3)] == ["Flatten", "Linear", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("objective", "posterior"),
    [(VAEObjective.vae(), "gaussian"), (VAEObjective.mmd_vae(20.0), "gaussian"), (VAEObjective.wae_mmd(20.0), "deterministic")],
)
@pytest.mark.slow
def test_training_lowers_the_loss_and_brings_the_samples_to_the_data(objective, posterior):
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(512)
    data = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(512, 2)
    vae = VAE.mlp(2, latent_dim=2, hidden=(64,), likelihood=Gaussian(0.1), posterior=posterior)

    def distance():
        with torch.no_grad():
            return mmd(vae.sample(512, generator=generator(3)), data, bandwidth=0.3, estimator="unbiased").item()

    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    before, losses = distance(), []
    for _ in range(400):
        loss = objective(vae(data), data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert distance() < 0.2 * before


def test_five_lines_in_anyones_loop():
    import fastvae

    loader, losses = torch.linspace(0, 1, 784).round().expand(10, 32, 784), []
    model = fastvae.VAE.mlp(784, latent_dim=20, likelihood="bernoulli")
    objective = fastvae.VAEObjective.mmd_vae(lambda_=1000)
    optimizer = torch.optim.Adam(model.parameters())
    for x in loader:
        loss = objective(model(x), x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("objective", [VAEObjective.vae(), VAEObjective.info_vae(0.5, 10.0)])
@pytest.mark.slow
def test_one_compiled_graph(objective):
    vae = VAE.mlp(12, latent_dim=3, likelihood="bernoulli")

    def step(x, eps):
        return objective(vae(x, eps=eps), x).loss

    x, eps = torch.rand(8, 12), torch.randn(8, 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, eps), step(x, eps))


def test_state_dict_round_trip():
    vae, copy = VAE.conv((1, 8, 8), latent_dim=2, channels=(4,)), VAE.conv((1, 8, 8), latent_dim=2, channels=(4,))
    copy.load_state_dict(vae.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(vae.reconstruct(x), copy.reconstruct(x))


def test_float64_gradients_of_the_whole_model():
    vae = VAE.mlp(3, latent_dim=2, hidden=(4,), likelihood=Gaussian(0.5)).double()
    x, eps = torch.rand(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: VAEObjective.info_vae(0.5, 10.0)(vae(x, eps=eps), x).loss, x)


class Laplace(Likelihood):
    def log_prob(self, reconstruction, x):
        return -(reconstruction - x).abs().flatten(1).sum(1)

    def mean(self, reconstruction):
        return reconstruction


PRETRAINED = {
    "mlp": (lambda: VAE.mlp(5, latent_dim=2, hidden=(4, 3), logvar_bounds=(-8.0, 2.0)), {}),
    "images": (lambda: VAE.mlp((1, 5, 5), latent_dim=2, hidden=(), likelihood="bernoulli", posterior="deterministic"), {}),
    "conv": (lambda: VAE.conv((3, 9, 8), latent_dim=2, channels=(4, 5), hidden=6).to(memory_format=torch.channels_last), {}),
    "learned": (lambda: VAE.mlp(5, latent_dim=2, likelihood=Gaussian(0.3, learned=True)).double(), {}),
    "optimal": (lambda: VAE.mlp(5, latent_dim=2, likelihood=Gaussian(0.3, optimal=True, least_sigma=0.2)), {}),
    "prepared": (lambda: VAE.mlp(5, latent_dim=2, preparation=Standardise.of(2459000.5 + torch.rand(20, 5).double())), {}),
    "bfloat16": (lambda: VAE.mlp(5, latent_dim=2).bfloat16(), {}),
    "own networks": (
        lambda: VAE(nn.Linear(5, 4), nn.Linear(2, 5), latent_dim=2),
        {"encoder": lambda: nn.Linear(5, 4), "decoder": lambda: nn.Linear(2, 5)},
    ),
    "own likelihood": (lambda: VAE.mlp(5, latent_dim=2, likelihood=Laplace()), {"likelihood": Laplace}),
}


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("case", PRETRAINED)
def test_a_pretrained_vae_is_the_one_that_was_saved(tmp_path, monkeypatch, case, file):
    if file == "model.safetensors":
        pytest.importorskip("safetensors")
    build, given = PRETRAINED[case]
    vae = build().eval()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.1)
    if case == "optimal":
        vae.likelihood.running_variance.fill_(0.7)
    vae.save_pretrained(tmp_path)  # whichever file this is, it goes with the next
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" and file == "model.pt" else find(name))
    vae.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", file]
    json.loads((tmp_path / "config.json").read_text())
    if given:
        with pytest.raises(ValueError, match=r"must be given"):
            VAE.from_pretrained(tmp_path)
    copy = VAE.from_pretrained(tmp_path, **{name: make() for name, make in given.items()})
    assert not copy.training
    assert copy.state_dict().keys() == vae.state_dict().keys()
    for name, tensor in vae.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name
        assert copy.state_dict()[name].dtype == tensor.dtype
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in vae.parameters()]
    assert copy.logvar_bounds == vae.logvar_bounds
    assert repr(copy.likelihood) == repr(vae.likelihood)
    assert torch.equal(copy.sample(3, generator=generator()), vae.sample(3, generator=generator()))
    x = vae.sample(4).detach()
    assert torch.equal(copy.reconstruct(x), vae.reconstruct(x))
    if vae.posterior == "gaussian":
        a, b = (m.log_likelihood(x, samples=2, generator=generator()) for m in (vae, copy))
        assert torch.equal(a, b)


class Intruder:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder, config: (folder / "config.json").unlink(), "must hold config.json and model.safetensors or model.pt, got none"),
        (lambda folder, config: (folder / "model.pt").unlink(), "must hold config.json and model.safetensors or model.pt, got none"),
        (lambda folder, config: (folder / "config.json").write_text("{"), "must hold the config.json and weights of a VAE"),
        (lambda folder, config: (folder / "config.json").write_text("[1]"), "must hold the config.json and weights of a VAE"),
        (lambda folder, config: (folder / "config.json").write_text("[" * 100_000), "must hold the config.json and weights of a VAE"),
        (lambda folder, config: config["networks"].update(hidden=[10**9, 10**9]), "size mismatch"),
        (lambda folder, config: config.update(latent_dim=10**12), "must hold the config.json and weights of a VAE"),
        (lambda folder, config: config["networks"].update(architecture="__init__"), "encoder and decoder must be given"),
        (lambda folder, config: config.update(posterior="x"), "posterior must be one of"),
        (lambda folder, config: config.update(bogus=1), "bogus"),
        (lambda folder, config: config["likelihood"].update(kind="os.system"), "likelihood must be given for a custom one, os.system"),
        (lambda folder, config: config["preparation"].update(scale=[0] * 5), "scale greater than 0"),
        (lambda folder, config: config.update(preparation=None), None),
        (lambda folder, config: torch.save([1], folder / "model.pt"), "must hold a dictionary of tensors"),
        (lambda folder, config: (folder / "model.pt").write_bytes(pickle.dumps(Intruder(), protocol=2)), "must hold tensors only"),
        (lambda folder, config: (folder / "model.pt").write_bytes(b""), "must hold tensors only"),
    ],
)
def test_a_folder_of_something_else_is_one_sentence(tmp_path, monkeypatch, capfd, change, sentence):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    VAE.mlp(5, latent_dim=2, preparation=Standardise.of(torch.rand(9, 5))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before = json.dumps(config)
    change(tmp_path, config)
    if json.dumps(config) != before:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if sentence is None:
        assert VAE.from_pretrained(tmp_path).preparation is None
        return
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        VAE.from_pretrained(tmp_path)
    assert "run" not in capfd.readouterr().out


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    VAE.mlp(5, latent_dim=2).save_pretrained(tmp_path)
    (tmp_path / "model.pt").rename(tmp_path / "model.safetensors")
    with pytest.raises(ImportError, match=r"safetensors must be installed to read .*model.safetensors"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_networks_that_were_changed_are_not_saved_as_those_they_were(tmp_path, name):
    vae = VAE.mlp(4, latent_dim=2, hidden=(8,)).eval()
    other = nn.Sequential(*(nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in getattr(vae, name)))
    setattr(vae, name, other)
    with pytest.raises(ValueError, match=rf"{name} must be the one that VAE.mlp made, got another: set vae.networks = None"):
        vae.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    vae.networks = None
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path, encoder=copy.deepcopy(vae.encoder), decoder=copy.deepcopy(vae.decoder))
    x = torch.rand(5, 4)
    assert torch.equal(again.reconstruct(x), vae.reconstruct(x))


class Shifted(VAE):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("shift", torch.ones(4), persistent=False)


def test_a_class_of_its_own_keeps_the_buffers_that_are_not_saved(tmp_path):
    given = {"encoder": torch.nn.Linear(4, 4), "decoder": torch.nn.Linear(2, 4)}
    Shifted(**given, latent_dim=2).save_pretrained(tmp_path)
    assert torch.equal(Shifted.from_pretrained(tmp_path, **given).shift, torch.ones(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make_objective", [lambda: VAEObjective.mmd_vae(100.0), lambda: VAEObjective.beta_tc_vae(3.0, 1000)])
def test_a_training_step_as_a_cuda_graph(make_objective):
    """A replayed step is the plain one, with the batch and the weight that it finds in their places."""
    vae = VAE.mlp(16, latent_dim=3, hidden=(32,)).cuda()
    objective = make_objective().cuda()
    name = "mmd_weight" if objective.mmd_weight else "tc_weight"
    objective.set(**{name: 2.0})
    x, eps = torch.rand(256, 16, device="cuda"), torch.randn(256, 3, device="cuda")
    parameters = list(vae.parameters())

    def step():
        loss = objective(vae(x, eps=eps), x).loss
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    from benchmarks.gpu_steps import graph_of

    captured = []
    replay = graph_of(lambda: captured.__setitem__(slice(None), step()))
    for weight in (2.0, 50.0):
        x.copy_(torch.rand_like(x))
        eps.copy_(torch.randn_like(eps))
        objective.set(**{name: weight})
        replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
