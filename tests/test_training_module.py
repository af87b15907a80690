import logging

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from fastvae import mmd
from fastvae.objectives import VAEObjective
from fastvae.training.callbacks import NonFiniteError, Pictures, StopAtNonFinite
from fastvae.training.data import ImageData, scaled
from fastvae.training.module import ImageVAE, VAEModule
from fastvae.vae import VAE

# Lightning's own remarks on a small run on a CPU: nothing that this package could answer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:You .* but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance"),
]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)


def trainer(tmp_path, epochs=2, callbacks=(), **options):
    quietly = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=list(callbacks), logger=False, **quietly, **options)


def plain(tmp_path, epochs=2, callbacks=(), **options):
    return trainer(tmp_path, epochs, callbacks, enable_checkpointing=False, **options)


def test_fit_lowers_the_loss_and_brings_the_samples_to_the_data(tmp_path):
    data = ImageData("digits", batch_size=64)
    module = ImageVAE(data.shape, latent_dim=4, hidden=[64], lambda_=50.0)
    x = scaled(data.splits["test"].images).flatten(1)

    def distance():
        with torch.no_grad():
            samples = module.vae.sample(400, generator=torch.Generator().manual_seed(0)).flatten(1)
        return mmd(samples, x, bandwidth=2.0, estimator="unbiased").item()

    history = Pictures()
    before = distance()
    plain(tmp_path, 12, [history]).fit(module, data)
    losses = [row["val/loss"] for row in history.history]
    assert losses[-1] < 0.9 * losses[0]
    assert distance() < 0.3 * before


def test_any_vae_any_objective_any_loader(tmp_path):
    x = torch.rand(64, 5)
    vae = VAE(torch.nn.Linear(5, 4), torch.nn.Linear(2, 5), latent_dim=2)
    loader = DataLoader(TensorDataset(x, torch.zeros(64)), batch_size=16)
    weights = vae.decoder.weight.detach().clone()
    plain(tmp_path, 1).fit(VAEModule(vae, VAEObjective.beta_vae(2.0), lr=0.1), loader)
    assert not torch.equal(weights, vae.decoder.weight)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    def weights():
        torch.manual_seed(3)
        module = ImageVAE([1, 8, 8], latent_dim=2, hidden=[8])
        plain(tmp_path, 1).fit(module, ImageData("digits", batch_size=256))
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize(
    ("options", "kl_weight", "mmd_weight"),
    [
        ({"objective": "vae"}, 1, 0),
        ({"objective": "beta_vae", "beta": 3.0}, 3, 0),
        ({"objective": "info_vae", "alpha": 0.5, "lambda_": 4.0}, 0.5, 3.5),
        ({"objective": "mmd_vae", "lambda_": 4.0, "bandwidth": 2.0, "estimator": "biased"}, 0, 4),
        ({"objective": "wae_mmd", "lambda_": 4.0}, 0, 4),
    ],
)
def test_options_reach_the_objective(options, kl_weight, mmd_weight):
    module = ImageVAE([1, 8, 8], **options)
    assert (module.objective.kl_weight, module.objective.mmd_weight) == (kl_weight, mmd_weight)
    assert module.objective.bandwidth == options.get("bandwidth")
    assert module.objective.estimator == options.get("estimator", "unbiased")
    assert module.vae.posterior == ("deterministic" if options["objective"] == "wae_mmd" else "gaussian")


@pytest.mark.parametrize(
    "options", [{"architecture": "conv", "channels": [4, 8]}, {"likelihood": "gaussian", "sigma": 0.2, "learn_sigma": True}]
)
def test_a_checkpoint_rebuilds_the_module(tmp_path, options):
    module = ImageVAE([1, 8, 8], latent_dim=3, hidden=[16], **options)
    data = ImageData("digits", batch_size=512)
    run = trainer(tmp_path, 1, [ModelCheckpoint(tmp_path, save_last=True)])
    run.fit(module, data)
    copy = ImageVAE.load_from_checkpoint(tmp_path / "last.ckpt")
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(copy.vae.reconstruct(x), module.vae.eval().reconstruct(x))


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path):
    data = ImageData("digits", batch_size=512)
    trainer(tmp_path, 1, [ModelCheckpoint(tmp_path, save_last=True)]).fit(ImageVAE([1, 8, 8], latent_dim=3, hidden=[16]), data)
    with pytest.raises(
        ValueError, match=r"ckpt_path must be a checkpoint of this model, got vae\.\S+ \(\d.*\) in it and \(\d.*\) in the model"
    ):
        plain(tmp_path).test(ImageVAE([1, 8, 8], latent_dim=4, hidden=[16]), data, ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_test_reports_the_codes(tmp_path):
    data = ImageData("digits", batch_size=100, test=0.5)
    [metrics] = plain(tmp_path).test(ImageVAE([1, 8, 8], latent_dim=3, evaluation_size=250), data, verbose=False)
    named = {name.removeprefix("test/") for name in metrics}
    assert named >= {"loss", "reconstruction", "kl", "mmd", "mutual_information", "active_units", "collapsed_units", "marginal_mmd"}
    assert metrics["test/evaluation_size"] == 250
    assert abs(metrics["test/mutual_information"]) < 0.1
    [metrics] = plain(tmp_path).test(ImageVAE([1, 8, 8], latent_dim=3, objective="wae_mmd"), data, verbose=False)
    assert "test/mutual_information" not in metrics
    assert metrics["test/evaluation_size"] == 898


class Poisoned(LightningDataModule):
    """The third batch of the second epoch holds a nan."""

    def __init__(self, epoch=1):
        super().__init__()
        self.epoch = epoch

    def train_dataloader(self):
        x = torch.rand(40, 1, 8, 8)
        if self.trainer.current_epoch == self.epoch:
            x[25] = torch.nan
        return DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=10)


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    module = ImageVAE([1, 8, 8], latent_dim=3, hidden=[16])
    run = trainer(tmp_path, 3, [StopAtNonFinite(), ModelCheckpoint(tmp_path, save_last=True)], reload_dataloaders_every_n_epochs=1)
    with pytest.raises(
        NonFiniteError, match=r"got a non-finite one at step 6 \(epoch 1, batch 2\), first seen in x; the last .* is .*last\.ckpt"
    ):
        run.fit(module, Poisoned())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert all(bool(t.isfinite().all()) for t in saved["state_dict"].values())
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_a_non_finite_loss_before_any_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="the last good checkpoint is not yet written"):
        plain(tmp_path, 1, [StopAtNonFinite()]).fit(ImageVAE([1, 8, 8]), Poisoned(epoch=0))


class Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


class BadGradient(torch.nn.Linear):
    def forward(self, x):
        return Overflowing.apply(super().forward(x))


def test_a_non_finite_gradient_stops_before_the_weights_change(tmp_path):
    vae = VAE(BadGradient(5, 4), torch.nn.Linear(2, 5), latent_dim=2)
    before = vae.encoder.weight.detach().clone()
    loader = DataLoader(TensorDataset(torch.rand(8, 5), torch.zeros(8)), batch_size=4)
    with pytest.raises(NonFiniteError, match=r"gradient must be finite, .*first seen in the gradient of vae\.encoder\.weight"):
        plain(tmp_path, 1, [StopAtNonFinite()]).fit(VAEModule(vae, VAEObjective.vae()), loader)
    assert torch.equal(before, vae.encoder.weight)


def test_a_kl_weight_on_a_deterministic_posterior():
    with pytest.raises(ValueError, match="kl_weight must be 0 for a deterministic posterior"):
        ImageVAE([1, 8, 8], objective="vae", posterior="deterministic")
