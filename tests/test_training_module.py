import inspect
import logging
import math
import re
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from fastvae import Standardise, mmd
from fastvae.objectives import Bernoulli, Gaussian, VAEObjective
from fastvae.training.callbacks import NonFiniteError, Pictures, StopAtNonFinite
from fastvae.training.data import ImageData, scaled
from fastvae.training.module import OBJECT_OPTIONS, ImageVAE, VAEModule
from fastvae.training.schedule import Schedule
from fastvae.vae import VAE

# Lightning's own remarks on a small run on a CPU: nothing that this package could answer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:You .* but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
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


def autoencoder_kl(**options):
    sizes = {"latent_channels": 2, "channels": [4, 4], "likelihood": "laplace", "scale": 0.5}
    return ImageVAE([1, 8, 8], architecture="autoencoder_kl", **sizes, **options)


def test_latents_with_locations_are_trained_and_measured(tmp_path):
    module = autoencoder_kl(objective="mmd_vae", mmd_rows="location", channels_last=True)
    assert (module.vae.latent_shape, module.vae.logvar_bounds) == ((2, 4, 4), (-30, 20))
    assert repr(module.vae.likelihood) == "Laplace(scale=0.5)"
    assert autoencoder_kl(logvar_bounds=(-8, 2)).vae.logvar_bounds == (-8, 2)
    before = module.vae.decoder[0].weight.detach().clone()
    history = Pictures()
    fit = plain(tmp_path, 1, [history], limit_train_batches=2, limit_val_batches=1)
    fit.fit(module, ImageData("digits", batch_size=16))
    assert not torch.equal(before, module.vae.decoder[0].weight)
    (row,) = history.history
    assert {f"val/kl_dimension_{d:03d}" for d in range(32)} <= row.keys()
    assert all(math.isfinite(value) for value in row.values())
    for name in ("latent", "reconstructions", "samples"):
        assert (tmp_path / f"{name}.png").is_file()
    (measured,) = fit.test(module, ImageData("digits", batch_size=16, test=0.02), verbose=False)
    assert measured["test/evaluation_size"] == 36


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
        ({"objective": "wae_mmd", "lambda_": 4.0, "mmd_rows": "location"}, 0, 4),
        ({"objective": "wae_mmd", "lambda_": 4.0, "kernel": "imq"}, 0, 4),
        ({"objective": "capacity_vae", "gamma": 30.0, "capacity": 5.0}, 30, 0),
        ({"objective": "dip_vae", "lambda_od": 2.0, "dip_kind": "ii"}, 1, 0),
        ({"objective": "beta_tc_vae", "beta": 6.0, "dataset_size": 100}, 1, 0),
        ({"objective": "vae", "free_bits": 0.5, "free_bits_group": 3}, 1, 0),
        ({"objective": "iwae", "samples": 3, "bound_gradient": "doubly"}, 1, 0),
    ],
)
def test_options_reach_the_objective(options, kl_weight, mmd_weight):
    module = ImageVAE([1, 8, 8], **options)
    assert (module.objective.kl_weight, module.objective.mmd_weight) == (kl_weight, mmd_weight)
    assert module.objective.bandwidth == options.get("bandwidth")
    assert module.objective.estimator == options.get("estimator", "unbiased")
    assert module.objective.mmd_rows == options.get("mmd_rows", "sample")
    assert module.vae.posterior == ("deterministic" if options["objective"] == "wae_mmd" else "gaussian")


@pytest.mark.parametrize(
    ("shape", "options", "kind"),
    [
        ([1, 8, 8], {}, Bernoulli),
        ([3, 8, 8], {"architecture": "conv", "channels": [4]}, Bernoulli),
        ([5], {}, Gaussian),
        ([1, 8, 8], {"optimal_sigma": True}, Gaussian),
        ([1, 8, 8], {"learn_sigma": True}, Gaussian),
        ([5], {"likelihood": "bernoulli"}, Bernoulli),
        ([1, 8, 8], {"likelihood": "gaussian"}, Gaussian),
    ],
)
def test_the_default_likelihood_follows_the_data(shape, options, kind):
    assert type(ImageVAE(shape, **options).vae.likelihood) is kind
    if kind is Bernoulli:
        with pytest.raises(ValueError, match=r"model.optimal_sigma must be false for model.likelihood bernoulli"):
            ImageVAE(shape, **options | {"likelihood": "bernoulli", "optimal_sigma": True})


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("table", "options", "sentence"),
    [
        (np.arange(256.0).repeat(3).reshape(-1, 3), {}, "data must lie in [0, 1] for a Bernoulli likelihood, got values from "),
        (
            np.random.default_rng(0).random((100, 3)),
            {"standardise": True},
            "data must lie in [0, 1] for a Bernoulli likelihood, got values from ",
        ),
        (np.random.default_rng(0).random((100, 3)), {}, None),
    ],
)
def test_a_bernoulli_of_other_data_is_refused_before_the_first_step(tmp_path, table, options, sentence, compile):
    np.save(tmp_path / "x.npy", table)
    data = ImageData("table", path=str(tmp_path / "x.npy"), validation=0, **options)
    module = ImageVAE([3], latent_dim=2, hidden=[4], likelihood="bernoulli", compile=compile and sentence is not None)
    if sentence is None:
        plain(tmp_path, 1).fit(module, data)
        return
    for start in (plain(tmp_path, 1).fit, plain(tmp_path).test):
        with pytest.raises(ValueError, match=re.escape(sentence) + ".*model.likelihood gaussian takes any"):
            start(module, data)
        assert not module.trainer.global_step


@pytest.mark.parametrize("source", ["ImageData", "a loader of one's own"])
def test_losses_are_those_of_the_prepared_data(tmp_path, source):
    x = torch.from_numpy(np.random.default_rng(0).normal(1000, 5, (90, 3)))
    np.save(tmp_path / "x.npy", x)
    data = ImageData("table", path=str(tmp_path / "x.npy"), standardise=True, validation=0, test=0)
    module = ImageVAE([3], latent_dim=2, hidden=[4], objective="wae_mmd")
    if source == "ImageData":
        [results] = plain(tmp_path).test(module, data, verbose=False)
    else:
        module.vae.preparation = Standardise.of(x)
        [results] = plain(tmp_path).test(module, DataLoader(TensorDataset(x, torch.zeros(90)), 90), verbose=False)
    y = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    code = module.vae.encoder(torch.from_numpy(y).float())
    error = (module.vae.decoder(code).detach().numpy() - y) ** 2
    assert results["test/reconstruction"] == pytest.approx(0.5 * error.sum(1).mean() + 1.5 * math.log(2 * math.pi), rel=1e-5)
    with torch.no_grad():  # out of a run, in the units of the data
        torch.testing.assert_close(module(x).mu, code)


def test_a_checkpoint_brings_its_preparation_to_whatever_is_tested(tmp_path):
    rng = np.random.default_rng(0)
    files = {name: str(tmp_path / f"{name}.npy") for name in ("a", "b")}
    for k, file in enumerate(files.values()):
        np.save(file, rng.normal(k, 1 + k, (200, 3)))
    data = ImageData("table", path=files["a"], standardise=True, validation=0)
    module = ImageVAE([3], latent_dim=2, hidden=[4])
    run = plain(tmp_path, 1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    own = module.vae.preparation
    other = ImageData("table", path=files["b"], standardise=True, validation=0, test=0)
    fresh = ImageVAE([3], latent_dim=2, hidden=[4])
    for start in (plain(tmp_path, 2).fit, plain(tmp_path).test):
        start(fresh, other, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        assert torch.equal(fresh.vae.preparation.mean, own.mean)
        batch, _ = next(iter(other.test_dataloader()))
        assert batch.mean() > 0.5  # 1, less its own mean would be 0
    assert torch.equal(ImageVAE.load_from_checkpoint(tmp_path / "a.ckpt").vae.preparation.scale, own.scale)
    # A model that has a preparation prepares the next table by it too.
    last = ImageData("table", path=files["b"], standardise=True, validation=0)
    plain(tmp_path, 1).fit(module, last)
    assert last.preparation is own
    bare = ImageData("table", path=files["b"], validation=0)
    with pytest.raises(ValueError, match=r"data.standardise must be true, as in ckpt_path, got false"):
        plain(tmp_path).test(ImageVAE([3], latent_dim=2, hidden=[4]), bare, ckpt_path=tmp_path / "a.ckpt")


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


def test_a_module_knows_all_its_options(tmp_path):
    """Those with their defaults too. An option that a later version wrote is left out."""
    module = ImageVAE([8], latent_dim=2, hidden=[4])
    options = inspect.signature(ImageVAE).parameters
    assert all(parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in options.values())
    assert set(options) - set(OBJECT_OPTIONS) <= set(module.hparams)
    torch.save(
        {"state_dict": module.state_dict(), "hyper_parameters": {**module.hparams, "later": 1}, "pytorch-lightning_version": "2.6.0"},
        tmp_path / "later.ckpt",
    )
    assert ImageVAE.load_from_checkpoint(tmp_path / "later.ckpt").hparams.lr == module.hparams.lr


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


def test_a_table_of_unlike_units_is_told_to_be_standardised(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3)) * [1, 1e18, 1e30])
    data = ImageData("table", str(tmp_path / "x.npy"), batch_size=10)
    data.setup()
    trainer = plain(tmp_path, 1, [StopAtNonFinite()])
    with pytest.raises(NonFiniteError, match=r"; try --data\.standardise true, which scales the columns of a table"):
        trainer.fit(ImageVAE(data.shape, objective="vae", likelihood="gaussian"), datamodule=data)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    module = ImageVAE([1, 8, 8], latent_dim=3, hidden=[16])
    name, weight = list(module.vae.named_parameters())[-1]
    weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match=f"step 0 .*first seen in vae.{name}; the last good checkpoint is not yet written"):
        plain(tmp_path, 1, [StopAtNonFinite()]).fit(module, ImageData("digits"))


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


def test_further_options_reach_the_model():
    objective = ImageVAE([1, 8, 8], objective="capacity_vae", capacity=5.0).objective
    assert objective.capacity == 5
    objective = ImageVAE([1, 8, 8], objective="dip_vae", lambda_od=2.0, dip_kind="ii").objective
    assert (objective.dip_weights, objective.dip_kind) == ((2, 2), "ii")
    objective = ImageVAE([1, 8, 8], objective="beta_tc_vae", beta=6.0, dataset_size=100, tc_estimator="minibatch_stratified").objective
    assert (objective.tc_weight, objective.dataset_size, objective.tc_estimator) == (5, 100, "minibatch_stratified")
    objective = ImageVAE([1, 8, 8], objective="beta_vae", free_bits=0.5, free_bits_group=3).objective
    assert (objective.free_bits, objective.free_bits_group) == (0.5, 3)
    objective = ImageVAE([1, 8, 8], objective="iwae", samples=3, bound_gradient="doubly").objective
    assert (objective.samples, objective.gradient) == (3, "doubly")
    assert ImageVAE([1, 8, 8], objective="wae_mmd", kernel="imq").objective.kernel.name == "imq"
    vae = ImageVAE([1, 8, 8], likelihood="gaussian", optimal_sigma=True, sigma=0.5, logvar_bounds=(-5.0, 2.0)).vae
    assert vae.likelihood.optimal
    assert vae.likelihood.sigma == pytest.approx(0.5)
    assert vae.logvar_bounds == (-5, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"objective": "mmd_vae", "free_bits": 1.0},
            "model.free_bits must be 0 unless model.objective is vae or beta_vae, got 1 for mmd_vae",
        ),
        ({"objective": "beta_tc_vae"}, "model.dataset_size must be given for model.objective beta_tc_vae, got none"),
        ({"compile": True, "gradient_norms_every": 1}, "gradient_norms_every must be 0 if compile is true, got 1"),
    ],
)
def test_options_that_do_not_go_together(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageVAE([1, 8, 8], **options)


class Recorder(Callback):
    def __init__(self):
        self.rows, self.steps = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        objective = pl_module.objective
        self.steps.append([float(w) for w in (objective.kl_weight, objective.mmd_weight, objective.capacity or 0)])

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_schedules_move_the_weights_with_the_optimiser_steps(tmp_path):
    data = ImageData("digits", batch_size=324, validation=0)
    module = ImageVAE(
        data.shape,
        hidden=[8],
        objective="info_vae",
        alpha=0.5,
        lambda_=4.5,
        kl_schedule="linear",
        kl_schedule_steps=4,
        mmd_schedule="cosine",
        mmd_schedule_steps=2,
    )
    seen = Recorder()
    plain(tmp_path, 2, [seen], accumulate_grad_batches=2).fit(module, data)
    # Five batches an epoch: the last one steps alone.
    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert len(seen.steps) == 10
    assert [row[0] for row in seen.steps] == pytest.approx([min(0.5, step / 8) for step in steps])
    assert [row[1] for row in seen.steps] == pytest.approx([[0, 2, 4][min(step, 2)] for step in steps])


def test_the_capacity_is_raised(tmp_path):
    data = ImageData("digits", batch_size=324, validation=0)
    module = ImageVAE(data.shape, hidden=[8], objective="capacity_vae", capacity=8.0, gamma=2.0, capacity_schedule_steps=4)
    seen = Recorder()
    plain(tmp_path, 1, [seen]).fit(module, data)
    assert [row[2] for row in seen.steps] == [0, 2, 4, 6, 8]


def test_a_schedule_of_anyones_module(tmp_path):
    vae = VAE(torch.nn.Linear(5, 4), torch.nn.Linear(2, 5), latent_dim=2)
    loader = DataLoader(TensorDataset(torch.rand(16, 5), torch.zeros(16)), batch_size=4)
    seen = Recorder()
    plain(tmp_path, 1, [Schedule("kl_weight", steps=4, start=1.0, end=3.0), seen]).fit(VAEModule(vae, VAEObjective.vae()), loader)
    assert [row[0] for row in seen.steps] == [1, 1.5, 2, 2.5]
    with pytest.raises(ValueError, match=r"weight must be one of 'kl_weight', .* got 'lr'"):
        Schedule("lr")


class Steps(Callback):
    """What is logged of each step and epoch, and what the steps were."""

    def __init__(self, fails_at=None):
        self.fails_at, self.steps, self.epochs = fails_at, [], []

    def on_train_epoch_start(self, *_):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen = [outputs["loss"], pl_module.observed["the reconstruction term"], pl_module.observed["kl"].mean()]
        self.steps.append((len(batch[0]), *map(float, seen)))
        logged = [trainer.callback_metrics[name].item() for name in ("train/loss", "train/loss_step")]
        assert logged == [self.steps[-1][1]] * 2
        if trainer.global_step == self.fails_at:
            raise RuntimeError("stopped")

    def on_train_epoch_end(self, trainer, pl_module):
        n, *terms = torch.tensor(self.steps, dtype=torch.float64).T
        logged = [trainer.callback_metrics[f"train/{name}"].item() for name in ("loss", "reconstruction", "kl")]
        self.epochs.append((logged, [float(n @ term / n.sum()) for term in terms]))


class LogsMore(ImageVAE):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("more", loss.detach())
        return loss


@pytest.mark.parametrize(("module_class", "options"), [(ImageVAE, {}), (ImageVAE, {"gradient_norms_every": 1}), (LogsMore, {})])
def test_each_step_logs_its_loss_and_each_epoch_its_means(tmp_path, module_class, options):
    data = ImageData("digits", batch_size=500, validation=0)
    seen = Steps(fails_at=5)
    run, module = plain(tmp_path, 3, [seen]), module_class(data.shape, hidden=[8], objective="vae", **options)
    with pytest.raises(RuntimeError, match="stopped"):
        run.fit(module, data)
    seen.fails_at = None
    run.fit(module, data)
    assert len(seen.epochs) == 3
    for logged, expected in seen.epochs:
        assert logged == pytest.approx(expected, rel=1e-5)


def test_a_training_step_needs_no_trainer():
    module = ImageVAE([1, 8, 8], hidden=[8], objective="vae", diagnostics_size=0)
    with pytest.warns(UserWarning, match="not registered"):
        assert module.training_step((torch.rand(5, 1, 8, 8), torch.zeros(5)), 0).isfinite()


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", None)])
def test_adam_is_fused_on_a_cpu_unless_lightning_could_not_clip(tmp_path, precision, fused):
    module = ImageVAE([1, 8, 8], hidden=[8])
    run = plain(tmp_path, 1, precision=precision, gradient_clip_val=1.0)
    run.fit(module, ImageData("digits", batch_size=512))
    assert run.optimizers[0].defaults["fused"] is fused


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_the_codes_are_measured_in_each_epoch(tmp_path, validation):
    data = ImageData("digits", batch_size=300, validation=validation)
    module = ImageVAE(data.shape, latent_dim=3, hidden=[8], objective="vae", diagnostics_size=100, gradient_norms_every=2)
    seen = Recorder()
    plain(tmp_path, 2, [seen]).fit(module, data)
    row = seen.rows[-1]
    stage = "val" if validation else "train"
    measures = ["mutual_information", "total_correlation", "active_units", "logvar_min", "logvar_max", "mmd_within", "mmd_standardised"]
    for name in [*measures, "kl_dimension_000", "kl_dimension_002", "mu_variance_001", "negative_elbo"]:
        assert math.isfinite(row[f"{stage}/{name}"]), name
    assert row[f"{stage}/evaluation_size"] == 100
    assert row["train/gradient_norm_reconstruction"] > 0
    assert row["train/gradient_norm_kl"] > 0
    assert f"{'train' if validation else 'val'}/active_units" not in row


def test_gradient_norms_are_those_of_the_terms(tmp_path):
    torch.manual_seed(0)
    data = ImageData("digits", batch_size=2000, validation=0, test=0)
    module = ImageVAE(data.shape, latent_dim=2, hidden=[8], objective="mmd_vae", lambda_=10.0, gradient_norms_every=1)
    expected = {}
    inner = module._log_gradient_norms

    def both(terms):
        for name, term in terms.summands.items():
            module.zero_grad()
            term.backward(retain_graph=True)
            expected[name] = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None))
        module.zero_grad()
        inner(terms)

    module._log_gradient_norms = both
    seen = Recorder()
    plain(tmp_path, 1, [seen]).fit(module, data)
    for name in ("reconstruction", "mmd"):
        assert seen.rows[0][f"train/gradient_norm_{name}"] == pytest.approx(expected[name], rel=1e-5)


def test_importance_weighted_training_and_likelihood(tmp_path):
    data = ImageData("digits", batch_size=300, binarisation="dynamic")
    module = ImageVAE(data.shape, latent_dim=3, hidden=[16], objective="iwae", samples=4, bound_gradient="doubly", nll_samples=20)
    run = plain(tmp_path, 3)
    run.fit(module, data)
    [metrics] = run.test(module, data, verbose=False)
    assert metrics["test/nll"] < metrics["test/loss"] < metrics["test/negative_elbo"]


@pytest.mark.parametrize("objective", ["vae", "mmd_vae", "beta_tc_vae", "dip_vae", "iwae"])
def test_mixed_precision_is_near_full_precision(tmp_path, objective):
    def losses(precision):
        torch.manual_seed(0)
        data = ImageData("digits", batch_size=300, validation=0)
        module = ImageVAE(data.shape, latent_dim=3, hidden=[32], objective=objective, lambda_=100.0, beta=2.0, dataset_size=1438, samples=2)
        seen = Recorder()
        plain(tmp_path, 3, [seen, StopAtNonFinite()], precision=precision).fit(module, data)
        assert all(p.dtype == torch.float32 for p in module.parameters())
        return torch.tensor([row["train/loss_epoch"] for row in seen.rows])

    torch.testing.assert_close(losses("bf16-mixed"), losses("32-true"), rtol=0.02, atol=0)


@pytest.mark.parametrize("objective", [VAEObjective.vae(), VAEObjective.mmd_vae(100.0), VAEObjective.beta_tc_vae(2.0, 300)])
def test_float16_with_a_loss_scaler(objective):
    """In a plain loop, as Lightning has no float16 on a CPU."""
    torch.manual_seed(0)
    x = torch.rand(300, 1, 8, 8)
    vae = VAE.mlp((1, 8, 8), latent_dim=3, hidden=(32,), likelihood="bernoulli")
    optimizer, scaler, losses = torch.optim.Adam(vae.parameters(), lr=1e-2), torch.amp.GradScaler("cpu"), []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = objective(vae(x), x).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert losses[-1] < 0.99 * losses[0]
    assert all(bool(p.isfinite().all()) for p in vae.parameters())


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    def weights(batch_size, accumulate):
        torch.manual_seed(0)
        vae = VAE.mlp(5, latent_dim=2, hidden=(8,), posterior="deterministic")
        module = VAEModule(vae, VAEObjective(kl_weight=0.0), lr=1e-2)
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
        x = torch.rand(32, 5, generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(x, torch.zeros(32)), batch_size=batch_size)
        plain(tmp_path, 3, accumulate_grad_batches=accumulate).fit(module, loader)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.testing.assert_close(weights(8, 4), weights(32, 1))


def test_channels_last_is_the_same_training(tmp_path):
    def weights(channels_last):
        torch.manual_seed(0)
        data = ImageData("digits", batch_size=400)
        module = ImageVAE(data.shape, "conv", latent_dim=2, channels=[4, 8], hidden=[8], channels_last=channels_last)
        formats = {p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1}
        assert formats == {channels_last}
        plain(tmp_path, 1).fit(module, data)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mmd_vae", "beta_tc_vae", "iwae"])
def test_the_training_step_is_one_graph_for_every_batch_size(tmp_path, objective, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    options = {"objective": objective, "hidden": [8], "beta": 2.0, "dataset_size": 1797, "samples": 3, "kl_schedule": "linear"}
    module = ImageVAE([1, 8, 8], latent_dim=3, compile=True, **options)
    data = ImageData("digits", batch_size=300, validation=0)
    plain(tmp_path, 1, [StopAtNonFinite()]).fit(module, data)
    module.trainer.fit_loop._combined_loader = None
    for n in (7, 64, 129):
        output, terms = module._train_terms(torch.rand(n, 1, 8, 8))
        assert len(output.mu) == n
        terms.loss.backward()
    assert counter.frame_count <= 2


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("precision", "backend"), [(torch.float32, "inductor"), (torch.bfloat16, "aot_eager")])
def test_a_compiled_step_trains_as_the_plain_one_does(precision, backend):
    """Forward, reparameterise + KL, MMD, backward, at several batch sizes, without compiling anew."""

    def step(x, eps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            return objective(vae(x, eps=eps), x).loss

    torch._dynamo.reset()
    vae = VAE.conv((1, 8, 8), latent_dim=3, channels=[4], hidden=8).to(memory_format=torch.channels_last)
    objective = VAEObjective.info_vae(0.5, 100.0)
    objective.set(kl_weight=0.3)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    parameters = list(vae.parameters())
    rounding = {"rtol": 0.05, "atol": 0.5} if precision == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (12, 7, 33):
            x, eps = torch.rand(n, 1, 8, 8), torch.randn(n, 3)
            losses = [f(x, eps) for f in (compiled, step)]
            gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
            for actual, expected in zip((losses[0].detach(), *gradients[0]), (losses[1].detach(), *gradients[1]), strict=True):
                torch.testing.assert_close(actual, expected, **rounding)
