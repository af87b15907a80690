import logging
import math
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from fastvae.training.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    Checkpoints,
    EpochSampler,
    GivenOptions,
    RandomState,
    ResumableLoader,
    checkpoint_file,
    is_whole,
    newest_first,
    random_state,
    read_checkpoint,
    set_random_state,
)
from fastvae.training.command import NEWEST_TWO
from fastvae.training.data import ImageData
from fastvae.training.module import ImageVAE
from tests.processes import start

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]
BATCHES = 4


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(folder, *, steps=2 * BATCHES, every=1, ckpt_path=None, validation=0.1, callbacks=(), **options):
    """Two epochs, and everything that has a state: Adam, dropout, a schedule, binarisation, validation."""
    torch.manual_seed(0)
    data = ImageData("digits", batch_size=360, binarisation="dynamic", validation=validation)
    module = ImageVAE(
        [1, 8, 8], latent_dim=2, hidden=[8], objective="beta_vae", kl_schedule="linear", kl_schedule_steps=6, diagnostics_size=50
    )
    module.vae.encoder.append(torch.nn.Dropout(0.1))
    saving = {**NEWEST_TWO, "save_top_k": -1} if every == 1 else NEWEST_TWO
    saving = saving | ({"every_n_train_steps": every} if every else {"save_on_train_epoch_end": True})
    trainer = Trainer(
        max_epochs=2,
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[Checkpoints(dirpath=folder, filename="{step}", **saving), RandomState(), *callbacks],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert trainer.num_training_batches == options.get("limit_train_batches", BATCHES)
    return module.state_dict()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_resumed_at_any_step_ends_with_the_same_weights(tmp_path, accumulate):
    steps = 2 * BATCHES if accumulate == 1 else 4
    full = fit(tmp_path / "full", steps=steps, accumulate_grad_batches=accumulate)
    checkpoints = newest_first(tmp_path / "full")
    assert len(checkpoints) == steps
    for checkpoint in checkpoints[1:]:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        resumed = fit(tmp_path / "resumed", steps=steps, ckpt_path=checkpoint, accumulate_grad_batches=accumulate)
        assert all(torch.equal(full[name], resumed[name]) for name in full), checkpoint


@pytest.mark.parametrize("validation", [0.1, 0])
def test_a_run_of_so_many_steps_resumed_at_the_end_of_an_epoch(tmp_path, validation):
    """Lightning alone would go on with the order of the epoch after the next."""
    full = fit(tmp_path / "full", every=None, validation=validation)
    _, first = newest_first(tmp_path / "full")
    assert first.name == f"step={BATCHES}.ckpt"
    resumed = fit(tmp_path / "resumed", every=None, validation=validation, ckpt_path=first)
    assert all(torch.equal(full[name], resumed[name]) for name in full)


def test_a_callback_saves_the_random_state_of_its_own_step(tmp_path):
    """Whether it comes before or after `RandomState`."""

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    torch.manual_seed(0)
    data = TensorDataset(torch.rand(40, 1, 8, 8), torch.zeros(40))
    states, quiet = [], dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    class Record(Callback):
        def on_train_batch_start(self, *_):
            states.append(torch.get_rng_state())

    run = Trainer(max_steps=5, callbacks=[SaveAt(), RandomState(), Record()], accelerator="cpu", limit_val_batches=0, **quiet)
    run.fit(ImageVAE([1, 8, 8], hidden=[8], objective="vae", diagnostics_size=0), DataLoader(data, 10), DataLoader(data, 10))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["RandomState"]
    assert torch.equal(saved["torch"], states[3])


class StopAt(Callback):
    """Stops as `max_time` does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"validation": 0}, {"val_check_interval": 2}, {"accumulate_grad_batches": 3}, {"limit_train_batches": 3}],
    ids=lambda options: "".join(options) or "plain",
)
def test_a_run_that_stopped_within_an_epoch_goes_on_there(tmp_path, options):
    steps = {"accumulate_grad_batches": 4, "limit_train_batches": 6}.get("".join(options), 2 * BATCHES)
    full = fit(tmp_path / "full", steps=-1, every=None, **options)
    for step in range(1, steps):
        # By the number of steps and as by the time, in turn.
        stopped = {"steps": step} if step % 2 else {"callbacks": [StopAt(step)], "steps": -1}
        folder = tmp_path / str(step)
        fit(folder, every=None, **stopped, **options)
        [newest, *_] = newest_first(folder)
        assert newest.name == f"step={step}.ckpt"
        resumed = fit(folder / "resumed", steps=-1, every=None, ckpt_path=newest, **options)
        assert all(torch.equal(full[name], resumed[name]) for name in full), newest
        assert newest_first(folder / "resumed")[0].name == f"step={steps}.ckpt"


def test_a_measurement_that_is_stopped_saves_nothing(tmp_path):
    class Stop(Callback):
        def on_test_batch_start(self, *_):
            raise SIGTERMException

    saving = Checkpoints(dirpath=tmp_path / "saved", save_last="link", save_on_exception=True, **NEWEST_TWO)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    with pytest.raises(SIGTERMException):
        Trainer(callbacks=[saving, Stop()], **options).test(ImageVAE([1, 8, 8]), ImageData("digits"), verbose=False)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_is_of_plain_types(tmp_path):
    fit(tmp_path, steps=1)
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert {"python", "numpy", "torch", "cuda"} == set(saved["callbacks"]["RandomState"])
    assert saved["optimizer_states"]
    assert saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"seen": 1}]


def test_the_last_two_are_kept(tmp_path):
    fit(tmp_path, steps=8, every=2)
    assert [file.name for file in newest_first(tmp_path)] == ["step=8.ckpt", "step=6.ckpt"]
    assert all(is_whole(file) for file in newest_first(tmp_path))


def test_random_state_round_trip():
    state = random_state()
    first = (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn())  # noqa: NPY002
    set_random_state(state)
    assert first == (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), np.random.randn())  # noqa: NPY002


def test_a_loader_goes_on_within_its_epoch():
    data = ImageData("digits", batch_size=360, binarisation="dynamic", seed=3)
    data.setup()

    def epoch(number, state=None):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        if state is not None:
            loader.load_state_dict(state)
        return [x for x, _ in loader]

    loader = data.train_dataloader()
    first, second = [x for x, _ in loader], [x for x, _ in loader]
    assert len(first) == BATCHES
    assert not torch.equal(first[0], second[0])
    for number, batches in enumerate((first, second)):
        for seen in range(BATCHES):
            again = epoch(number, {"seen": seen})
            assert len(again) == BATCHES - seen
            assert all(map(torch.equal, again, batches[seen:]))
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.state_dict() == {"seen": 2}
    list(iterator)
    assert loader.state_dict() == {"seen": 0}


def test_a_loader_of_any_data_set():
    x = torch.arange(10.0)
    data = torch.utils.data.TensorDataset(x)
    loader = ResumableLoader(data, 3, sampler=EpochSampler(data, 0))
    loader.load_state_dict({"seen": 2})
    order = torch.cat([batch for (batch,) in ResumableLoader(data, 3, sampler=EpochSampler(data, 0))])
    assert torch.equal(torch.cat([batch for (batch,) in loader]), order[6:])
    assert torch.equal(order.sort().values, x)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, file)

    def cut_off(checkpoint, stream):
        stream.write(b"PK half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(2)}, file)
    assert torch.load(file, weights_only=True) == {"step": torch.tensor(1)}
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_not_a_whole_checkpoint(tmp_path):
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.rand(1000)}, file)
    assert is_whole(file)
    raw = file.read_bytes()
    for name, other in {
        "truncated": raw[:-100],
        "flipped": raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
        "empty": b"",
        "text": b"not found",
    }.items():
        (tmp_path / name).write_bytes(other)
        assert not is_whole(tmp_path / name), name
    assert not is_whole(tmp_path / "absent")
    assert not is_whole(tmp_path)


OPTIONS = {
    "data": "name digits batch_size 360 binarisation dynamic",
    "model": "latent_dim 2 hidden [8] diagnostics_size 50 objective beta_vae kl_schedule cosine kl_schedule_steps 6",
    "trainer": "max_epochs 2 enable_progress_bar false",
}
SMALL = ["--checkpoint_every", "3"]
for group, words in OPTIONS.items():
    names, values = words.split()[::2], words.split()[1::2]
    SMALL += [word for name, value in zip(names, values, strict=True) for word in (f"--{group}.{name}", value)]


SEVERAL = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2"]


def last_weights(folder):
    newest = max(folder.glob("version_*"), key=lambda version: int(version.name.split("_")[1]))
    return torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    runs = tmp_path / "runs"
    assert start(tmp_path, *SMALL, "--name", "full").end()[0] == 0
    full = last_weights(runs / "full")

    def resume(name):
        code, err = start(tmp_path, "--ckpt_path", "last", "--name", name).end()
        assert code == 0, err
        weights = last_weights(runs / name)
        assert all(torch.equal(full[key], weights[key]) for key in full), name
        return err

    assert start(tmp_path, *SMALL, "--name", "killed", at="step5").end()[0] == -signal.SIGKILL
    newest, before = newest_first(runs / "killed" / "version_0" / "checkpoints")
    assert [newest.name, before.name] == ["epoch=0-step=4.ckpt", "step=3.ckpt"]
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=rf"'last', 'best' or the file of a complete checkpoint, got '.*step=4.ckpt': use '{re.escape(str(before))}'"
    ):
        checkpoint_file(str(newest), runs / "killed")
    assert f"warning: {str(newest.relative_to(tmp_path))!r} is not a complete checkpoint, using the one before it" in resume("killed")

    # The signal comes in the last step of an epoch, and is heeded in the validation after it.
    code, err = start(tmp_path, *SMALL, "--name", "stopped", at="step3", event=signal.SIGTERM).end()
    assert code == 0
    assert err.splitlines()[-1].startswith(f"stopped by SIGTERM at step 4; to resume: fastvae fit --ckpt_path {runs}/stopped/version_0/")
    assert "warn" not in resume("stopped").lower()

    code, err = start(tmp_path, *SMALL, "--name", "interrupted", at="step2", event=signal.SIGINT).end()
    assert code == 130
    assert err.splitlines()[-1].startswith(f"stopped by Ctrl-C at step 3; to resume: fastvae fit --ckpt_path {runs}/interrupted/version_0/")
    assert "Traceback" not in err
    resume("interrupted")


@pytest.mark.slow
def test_stopped_early_and_resumed(tmp_path):
    runs = tmp_path / "runs"
    # No loss falls by 10,000 nats: after the first measurement two more are waited for.
    early = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.patience", "2"]
    early += ["--trainer.callbacks.min_delta", "1e4", "--trainer.max_epochs", "9"]
    code, err = start(tmp_path, *SMALL, *early, "--name", "full").end()
    assert code == 0, err
    [newest, before] = newest_first(runs / "full" / "version_0" / "checkpoints")[:2]
    assert [newest.name, before.name] == ["epoch=2-step=12.ckpt", "step=12.ckpt"]
    full = last_weights(runs / "full")
    assert start(tmp_path, *SMALL, *early, "--name", "killed", at="step10").end()[0] == -signal.SIGKILL
    code, err = start(tmp_path, "--ckpt_path", "last", "--name", "killed").end()
    assert code == 0, err
    assert "warn" not in err.lower()
    weights = last_weights(runs / "killed")
    assert all(torch.equal(full[key], weights[key]) for key in full)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    """To the bit, and no process group is left; where only one is killed the other one stops."""
    runs = tmp_path / "runs"
    code, err = start(tmp_path, *SMALL, *SEVERAL, "--name", "full", several=True).end()
    assert code == 0, err
    full = last_weights(runs / "full")
    for name, at in {"both": "step3", "second": "step3 of rank 1", "first": "step3 of rank 0"}.items():
        code, err = start(tmp_path, *SMALL, *SEVERAL, "--name", name, at=at, several=True).end()
        assert code != 0
        # Lightning may kill the first one before it has said so.
        if name == "first" or code == 1:
            assert "error: all processes of the run must be alive, got no answer from another one" in err
        code, err = start(tmp_path, "--ckpt_path", "last", "--name", name, several=True).end()
        assert code == 0, err
        assert "warn" not in err.lower()
        weights = last_weights(runs / name)
        assert all(torch.equal(full[key], weights[key]) for key in full), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_run_with_a_sentence_and_leaves_the_last_checkpoint(tmp_path):
    code, err = start(tmp_path, *SMALL, "--name", "filled", at="step5", event="full disk").end()
    assert code == 1
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    folder = tmp_path / "runs" / "filled" / "version_0" / "checkpoints"
    assert not list(folder.glob(".*partial"))
    assert newest_first(folder)[0] == checkpoint_file("last", tmp_path / "runs" / "filled")


@pytest.mark.slow
def test_two_runs_at_once_have_a_folder_each(tmp_path):
    for code, err in [run.end() for run in [start(tmp_path, *SMALL, "--name", "same") for _ in range(2)]]:
        assert code == 0, err
    folders = sorted(Path(tmp_path / "runs" / "same").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    first, second = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders)
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])
    lines = [(folder / "metrics.csv").read_text().count("\n") for folder in folders]
    assert lines[0] == lines[1]


def test_a_validation_loader_has_no_part_in_the_training():
    """Also one that draws its seed from the generator of the training's noise."""
    x = torch.rand(40, 1, 8, 8)

    def weights(batches):
        torch.manual_seed(0)
        module = ImageVAE([1, 8, 8], hidden=[8], objective="vae", diagnostics_size=0)
        loaders = [DataLoader(TensorDataset(x, torch.zeros(40)), 10) for _ in range(2)]
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        run = Trainer(
            max_epochs=3, num_sanity_val_steps=0, callbacks=[RandomState()], limit_val_batches=batches, accelerator="cpu", **quiet
        )
        run.fit(module, *loaders)
        return [p.detach() for p in module.parameters()]

    for with_validation, without in zip(weights(1.0), weights(0), strict=True):
        assert with_validation.equal(without)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_best_checkpoint_is_that_of_the_least_validation_loss(tmp_path):
    class Losses(LightningModule):
        def __init__(self, losses):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.losses = losses

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.losses[self.current_epoch])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    loader = torch.utils.data.DataLoader(torch.ones(4, 1), 4)
    for losses, epoch, loaders in (([3.0, 1.0, 2.0, math.nan], 1, [loader]), ([3.0, 2.0, 1.0, 0.5], 3, [loader]), ([0.0] * 4, None, [])):
        shutil.rmtree(folder, ignore_errors=True)
        saving = [Checkpoints(folder, save_last="link", save_on_train_epoch_end=True, **NEWEST_TWO), BestCheckpoint(folder)]
        trainer = Trainer(
            max_epochs=4,
            callbacks=saving,
            logger=False,
            plugins=[AtomicCheckpointIO()],
            accelerator="cpu",
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Losses(losses), loader, *loaders)
        if epoch is None:
            with pytest.raises(FileNotFoundError, match=r"ckpt_path must not be 'best' for a run without validation"):
                checkpoint_file("best", tmp_path / "runs")
            continue
        best = checkpoint_file("best", tmp_path / "runs")
        assert read_checkpoint(best)["epoch"] == epoch
        os.utime(best)
        assert read_checkpoint(checkpoint_file("last", tmp_path / "runs"))["epoch"] == 3
        assert sorted(file.name for file in folder.iterdir()) == ["best.ckpt", "epoch=2-step=3.ckpt", "epoch=3-step=4.ckpt", "last.ckpt"]


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        [group] = trainer.optimizers[0].param_groups
        self.seen.append((group["lr"], group["betas"]))


SCHEDULES = {
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 10),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, max_lr=0.01, total_steps=20),
    "cyclic": lambda optimizer: schedules.CyclicLR(optimizer, 1e-4, 1e-2, step_size_up=4, cycle_momentum=False),
    "plateau": lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=0, threshold=0.99),
}


@pytest.mark.parametrize(("schedule", "follows_lr"), [("cosine", True), ("one cycle", False), ("cyclic", False), ("plateau", True)])
def test_a_schedule_of_the_rate_is_left_as_it_is_but_for_a_new_rate(tmp_path, schedule, follows_lr):
    def rates(given, steps, lr=1e-3, ckpt_path=None, save=None):
        data = ImageData("digits", batch_size=600, validation=0)
        interval = "epoch" if schedule == "plateau" else "step"
        module = ImageVAE(data.shape, lr=lr, lr_scheduler=SCHEDULES[schedule], lr_scheduler_interval=interval, diagnostics_size=0)
        seen = Rates()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_steps=steps, callbacks=[seen, *given], accelerator="cpu", **quiet)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(save)
        return seen.seen

    expected = rates([], 9)
    assert rates([GivenOptions()], 6, save=tmp_path / "6.ckpt") == expected[:6]
    assert rates([GivenOptions()], 9, ckpt_path=tmp_path / "6.ckpt") == expected[6:]
    tenth = [lr for lr, _ in rates([GivenOptions()], 9, lr=1e-4, ckpt_path=tmp_path / "6.ckpt")]
    assert tenth == pytest.approx([lr / 10 if follows_lr else lr for lr, _ in expected[6:]])


def test_a_run_in_float64_goes_on_with_every_digit(tmp_path):
    full = fit(tmp_path / "full", steps=4, precision="64-true")
    fit(tmp_path / "part", steps=2, precision="64-true")
    resumed = fit(tmp_path / "rest", steps=4, ckpt_path=newest_first(tmp_path / "part")[0], precision="64-true")
    assert all(torch.equal(full[name], resumed[name]) for name in full)
