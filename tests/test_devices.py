"""A device without float64: no tensor of it is made there, and what comes back is that of the CPU."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae import VAE, Gaussian, MMDLoss, VAEObjective, devices, recipes
from tests import fake_mps

pytestmark = pytest.mark.filterwarnings("ignore:.* runs on the CPU, as fakemps has no float64")

labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
RECIPES = (
    *("pythae", "wae", "info_vae", "pytorch_vae", "geomloss", "alibi_detect", "dan", "pytorch_adapt", "deepda"),
    *("mmd_gan", "cmmd", "mmdagg", "mmdfuse"),
)
# Each of x and y (8, 3).
CALLS = {
    "mmd": fastvae.mmd,
    "mmd of the reference": functools.partial(fastvae.mmd, backend="reference"),
    "mmd, linear": functools.partial(fastvae.mmd, estimator="linear"),
    "mmd of a rule": functools.partial(fastvae.mmd, bandwidth="median"),
    "mmd of tensors": lambda x, y: fastvae.mmd(x, y, bandwidth=x[0].exp(), bandwidth_weights=y[0], x_weights=x.detach()[:, 0].softmax(0)),
    "mmd of a mean": lambda x, y: fastvae.mmd(x + y, fastvae.KernelMean(torch.eye(3), torch.ones(3), norm=1.0, bandwidth=2.0)),
    "mmd of a mean on the device": lambda x, y: fastvae.mmd(x + y, fastvae.KernelMean(torch.eye(3), norm=1.0, bandwidth=2.0).to(x.device)),
    "mmd by name": lambda x, y: fastvae.mmd(y=y, x=x),
    "mmd_to_normal": lambda x, y: fastvae.mmd_to_normal(x + y),
    "ksd_to_normal": lambda x, y: fastvae.ksd_to_normal(x + y, bandwidth=y.detach()[0].exp()),
    "mmd, twice": lambda x, y: torch.autograd.grad(fastvae.mmd(x, y), x, create_graph=True)[0].square().sum(),
    "ksd_to_normal, twice": lambda x, y: torch.autograd.grad(fastvae.ksd_to_normal(x + y), x, create_graph=True)[0].square().sum(),
    "MMDLoss": lambda x, y: MMDLoss(bandwidth=x.detach()[0].exp())(x, y),
    "kernel_matmul": lambda x, y: fastvae.kernel_matmul(x, y, y),
    "kernel_matmul, normalised": lambda x, y: fastvae.kernel_matmul(x, y, y, normalize="rows"),
    "log_kernel_density": lambda x, y: fastvae.log_kernel_density(x, y, normalized=True),
    "witness": lambda x, y: fastvae.witness(x, y, x + 1),
    "group_mmd": lambda x, y: fastvae.group_mmd(x + y, labels.to(x.device), pairs=torch.tensor([[0, 1]]).to(x.device)).values,
    "group_mmd of weights": lambda x, y: fastvae.group_mmd(x, y.detach().exp()).mean(),
    "reparameterize_kl": lambda x, y: fastvae.reparameterize_kl(x, y, eps=torch.ones_like(x))[1],
    "total_correlation": lambda x, y: sum(fastvae.total_correlation(x, y, x, dataset_size=9)),
    "sigreg": lambda x, y: fastvae.sigreg(x, directions=y.detach().T / y.detach().norm(dim=1)),
    "SIGReg": lambda x, y: fastvae.SIGReg(5)(x * y, generator=torch.Generator().manual_seed(0)),
    "median_bandwidth": lambda x, y: x.sum() * fastvae.median_bandwidth(x, y),
    "mean_bandwidth": lambda x, y: y.sum() * fastvae.mean_bandwidth(x),
    **{f"recipes.{name}": getattr(recipes, name) for name in RECIPES},
    "recipes.trvae": lambda x, y: recipes.trvae(x + y, labels.to(x.device)),
    "recipes.kid": lambda x, y: recipes.kid(x, y, subsets=3, subset_size=5, generator=torch.Generator().manual_seed(0)).mean,
}
OBJECTIVES = {
    "elbo": VAEObjective(),
    "info-vae": VAEObjective(mmd_weight=3.0),
    "wae": VAEObjective(kl_weight=0.5, mmd_weight=3.0, kernel="imq", estimator="biased"),
    "tc": VAEObjective(tc_weight=2.0, dataset_size=100),
    "dip": VAEObjective(dip=(1.0, 2.0, "ii")),
    "free bits": VAEObjective(free_bits=0.1),
    "iwae": VAEObjective.iwae(3, gradient="doubly"),
}


# A device is there for all of a process, and another one than CUDA's, for PyTorch's autograd too: this file is run in one of its own.
OWN_PROCESS = os.environ.get("FASTVAE_FAKE_DEVICE") == "1"


@pytest.mark.slow
@pytest.mark.skipif(OWN_PROCESS or torch.cuda.is_available(), reason="the device must be the only one")
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="uses PyTorch's inner parts as torch 2.13 has them")
def test_in_a_process_of_its_own():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "FASTVAE_FAKE_DEVICE": "1"}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def device(monkeypatch):
    if not OWN_PROCESS:
        pytest.skip("in a process of its own")
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", (*devices.WITHOUT_FLOAT64, fake_mps.NAME))
    return fake_mps.device()


def test_the_device_has_no_float64(device):
    for make in (lambda: torch.zeros(3, dtype=torch.float64, device=device), torch.zeros(3, device=device).double):
        with pytest.raises(TypeError, match="fakemps has no float64"):
            make()
    assert torch.ones(3, device=device).sum().item() == 3


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, device):
    expected, actual = [], []
    for place, found in ((torch.device("cpu"), expected), (device, actual)):
        torch.manual_seed(0)
        x, y = (torch.randn(8, 3).to(place).requires_grad_() for _ in range(2))
        value = CALLS[name](x, y)
        assert value.device == place
        assert value.dtype in (torch.float32, torch.float64)
        found += [value, *torch.autograd.grad(value.sum(), (x, y), allow_unused=True)]
    assert actual[0].dtype == torch.float32
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.device == device
            torch.testing.assert_close(one.cpu(), other.float(), rtol=1e-5, atol=1e-6)


def test_two_sample_test(device):
    x, y = torch.randn(20, 2), torch.randn(25, 2) + 0.5
    expected, actual = (fastvae.two_sample_test(x.to(place), y.to(place), permutations=50, seed=1) for place in ("cpu", device))
    assert actual.p_value == expected.p_value
    assert actual.null.device == device
    torch.testing.assert_close(actual.null.cpu(), expected.null.float())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training(name, device):
    objective, losses = OBJECTIVES[name], []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = VAE.mlp(5, latent_dim=2, hidden=(8,), likelihood=Gaussian(learned=True))
        x, eps, prior = torch.rand(6, 5), torch.randn(6, objective.samples, 2), torch.randn(6, 2)
        eps = eps[:, 0] if objective.samples == 1 else eps
        model.to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(x.to(place), eps=eps.to(place), samples=objective.samples)
            loss = objective(output, x.to(place), prior=prior.to(place)).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.cpu())
    torch.testing.assert_close(losses[1], losses[0])


def test_measures_of_codes(device):
    from fastvae.training.metrics import code_summary

    mu, logvar, z = torch.randn(3, 40, 2).unbind()
    torch.manual_seed(0)
    expected = code_summary(mu, logvar, z)
    torch.manual_seed(0)
    actual = code_summary(*(t.to(device) for t in (mu, logvar, z)))
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()


@pytest.mark.filterwarnings("default:.* runs on the CPU, as fakemps has no float64")
def test_says_where_it_runs(device):
    x = torch.zeros(3, 2, device=device)
    with pytest.warns(UserWarning, match="^mmd runs on the CPU, as fakemps has no float64$") as caught:
        fastvae.mmd(x, x + 1)
    assert caught[0].filename == __file__
