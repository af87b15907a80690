import inspect
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from matplotlib.image import imread
from PIL import Image

from fastvae.cli import FILE_COMMANDS, main, misspelt
from fastvae.training.callbacks import Pictures, Progress
from fastvae.training.command import COMMANDS
from fastvae.training.configs import PACKAGED
from fastvae.version import __version__
from tests import drawn_commands
from tests.test_training_data import dsprites, write_idx

SMALL = ["--data.name", "digits", "--data.batch_size", "512", "--model.latent_dim", "3", "--model.hidden", "[16]"]
PICTURES = ("reconstructions.png", "samples.png", "latent.png", "loss_curves.png")


@pytest.fixture
def pictures():
    """A test that asks for it has runs that draw theirs, which takes longer than most of them."""


@pytest.fixture
def inside(tmp_path, monkeypatch, capfd, request):
    """Runs the command in this process, in `tmp_path`; returns what it said: importing Lightning takes longer than most of these runs."""
    monkeypatch.chdir(tmp_path)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Pictures, "on_train_end", lambda *_: None)
    for name in ("lightning.fabric", "lightning.pytorch"):  # their handler keeps the stream of the test that imported them
        logging.getLogger(name).setLevel(logging.ERROR)

    def call(*args, code=0):
        with pytest.raises(SystemExit) as end:
            main(args)
        out, err = capfd.readouterr()
        assert end.value.code == code, out + err
        return out, err

    return call


def error(err):
    """The one line of a wrong call's error."""
    lines = [line for line in err.splitlines() if "Seed set to" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def files(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


@pytest.mark.slow
def test_fit_test_and_resume(tmp_path, inside):
    command = [sys.executable, "-c", "from fastvae.cli import main; main()", "fit", *SMALL, "--trainer.max_epochs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "mmd_vae" / "version_0"
    assert str(run) in done.stdout
    assert "warn" not in (done.stdout + done.stderr).lower()
    assert {file.name for file in run.iterdir()} >= {*PICTURES, "config.yaml", "metrics.csv", "checkpoints"}
    assert any(file.name.startswith("events.out.tfevents") for file in run.iterdir())
    for name in PICTURES:
        assert imread(run / name).std() > 0.01
    first = files(run)

    out, _ = inside("test")
    assert "mutual information I(x; z), nats" in out
    folder = tmp_path / "runs" / "mmd_vae" / "test_0"
    assert (folder / "metrics.csv").is_file()
    assert json.loads((folder / "test.json").read_text())["test/evaluation_size"] == 359

    out, err = inside("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert "version_1" in out
    assert "warn" not in (out + err).lower()
    epochs = [line.split(",")[0] for line in (tmp_path / "runs" / "mmd_vae" / "version_1" / "metrics.csv").read_text().splitlines()[1:]]
    assert set(epochs) == {"2"}
    assert files(run) == first


@pytest.mark.slow
def test_configuration_file_and_own_data(tmp_path, inside, pictures):
    folder = tmp_path / "mine"
    folder.mkdir()
    np.savez(folder / "mine.npz", images=np.random.default_rng(0).integers(0, 256, (60, 9, 11), dtype=np.uint8))
    config = tmp_path / "config.yaml"
    config.write_text(
        "name: mine\nmodel: {architecture: conv, channels: [4], hidden: [8], objective: info_vae, lambda_: 5}\ndata: {batch_size: 20}\n"
    )
    out, _ = inside("fit", "--config", str(config), "--data.path", str(folder), "--trainer.max_epochs", "1", "--runs", "out")
    assert str(tmp_path / "out" / "mine" / "version_0") in out
    # The data are found from another folder, also where they were given by a path of this one.
    inside("fit", "--config", str(config), "--data.path", "mine", "--trainer.max_epochs", "1", "--runs", "out")
    os.chdir("/")
    out, _ = inside("test", "--runs", str(tmp_path / "out"))
    os.chdir(tmp_path)
    assert "active units" in out
    _, err = inside("test", "--runs", "out", "--data.name", "digits", "--data.path", "null", code=1)
    assert "error: ckpt_path must be a checkpoint of this model" in err


@pytest.mark.slow
def test_compare(tmp_path, inside):
    out, _ = inside("compare", "--epochs", "1")
    for row in ("mutual information", "active units", "ELBO", "MMD-VAE", "7.49"):
        assert row in out
    run = tmp_path / "runs" / "compare" / "version_0"
    assert (run / "table.txt").read_text() in out
    assert imread(run / "compare.png").std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["fit", "--bogus", "3"], 2, ["unrecognized arguments: --bogus 3", "--help"]),
        (["nope"], 2, ["'nope'", "fit"]),
        (["compare", "--epochs", "x"], 2, ["epochs must be an integer, got x"]),
        (["fit", "--trainer.max_epoch", "3"], 2, ["unrecognized arguments: --trainer.max_epoch, did you mean --trainer.max_epochs?"]),
        (["fit", "--trainer.precision", "fp7"], 2, ["trainer.precision must be one of 64, 32, 16, 'transformer-engine',", "null, got fp7"]),
        (["fit", *SMALL, "--trainer.logger", "WandbLogger"], 1, ["error: WandbLogger cannot be made", "wandb"]),
        (["fit", *SMALL, "--trainer.devices", "9999"], 1, ["trainer.devices must be at most", "got 9999"]),
        (["fit", *SMALL, "--trainer.num_nodes", "2"], 1, ["trainer.num_nodes must be 1 unless a launcher sets MASTER_ADDR, got 2"]),
        (["fit", *SMALL, "--trainer.check_val_every_n_epoch", "0"], 1, ["trainer.check_val_every_n_epoch must be at least 1, got 0"]),
        (["fit", *SMALL, "--trainer.default_root_dir", "x"], 2, ["unrecognized arguments: --trainer.default_root_dir x"]),
        (["fit", *SMALL, "--model.beta", "4"], 1, ["model.objective must be beta_vae or beta_tc_vae for model.beta, got mmd_vae"]),
        (["fit", *SMALL, "--checkpoint_every", "3", "--trainer.enable_checkpointing", "false"], 1, ["checkpoint_every must be 0"]),
        (["fit", "--config", "absent.yaml"], 2, ["mnist_mmd_vae, mnist_vae, table, got 'absent.yaml', which is not there"]),
        (
            ["fit", "--model.lr_scheduler", "ReduceLROnPlateau"],
            2,
            ["lr_scheduler must be the full path of a class, such as torch.optim.lr_scheduler.ReduceLROnPlateau, got ReduceLROnPlateau"],
        ),
        (
            ["fit", "--model.optimizer", "Foo"],
            2,
            ["model.optimizer must be the full path of a class, such as torch.optim.AdamW, got Foo (see"],
        ),
        (["fit", "--data.name", "cifar"], 2, ["data.name must be one of", "'fashion_mnist'", "got cifar"]),
        (["fit", "--model.latent_dim", "x"], 2, ["model.latent_dim must be an integer, got x"]),
        (["fit", "--model.bandwidth", "x"], 2, ["model.bandwidth must be one of a number, null, got x"]),
        (["fit", "--data.batch_size", "0"], 1, ["data.batch_size must be at least 1, got 0"]),
        (
            ["fit", *SMALL, "--model.objective", "info_vae", "--model.lambda_", "0.001"],
            1,
            ["alpha + lambda_ - 1 must be at least 0", "maximise"],
        ),
        (["report"], 2, ["runs"]),
        (["report", "nowhere"], 1, ["runs must be folders of runs with a metrics.csv, got 'nowhere'"]),
        (["sample", "--n", "x"], 2, ["n must be an integer, got x"]),
        (["fit", *SMALL, "--checkpoint_every", "-3"], 1, ["checkpoint_every must be at least 0, got -3"]),
        (["test"], 1, ["ckpt_path must not be 'last' before a run has written a checkpoint"]),
        (
            ["fit", "--ckpt_path", "absent.ckpt"],
            1,
            ["ckpt_path must be 'last', 'best' or the file of a complete checkpoint, got 'absent.ckpt'"],
        ),
    ],
)
def test_a_wrong_call_is_one_sentence(tmp_path, inside, args, code, words):
    line = error(inside(*args, code=code)[1])
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got the empty file 'c.yaml'"),
        ("# nothing\n", "got the empty file 'c.yaml'"),
        ("model:\n  lr: 1\n bad: ]\n", "got 'c.yaml', line 3: "),
        ("model: 3\n", "model must hold options such as 'model: {…}', got 3 in 'c.yaml'"),
        ("[1, 2]\n", "got list in 'c.yaml'"),
    ],
)
def test_a_configuration_that_is_none_is_named_with_its_line(tmp_path, inside, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert words in error(inside("fit", "--config", "c.yaml", code=2)[1])


QUICK = [*SMALL, "--trainer.max_epochs", "1", "--model.diagnostics_size", "50", "--trainer.enable_model_summary", "false"]


@pytest.mark.slow
def test_flags_go_before_what_the_checkpoint_was_trained_with(tmp_path, inside):
    inside("fit", *QUICK, "--model.objective", "beta_vae", "--model.beta", "4", "--trainer.callbacks", "EarlyStopping", *EARLY)

    def resumed(*args, epochs, path="last"):
        inside("fit", "--ckpt_path", path, "--trainer.max_epochs", str(epochs), *args)
        runs = (tmp_path / "runs" / "beta_vae").glob("version_*")
        newest = max(runs, key=lambda run: int(run.name.split("_")[1]))
        return torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)

    saved = resumed("--model.lr", "1e-4", "--trainer.callbacks.patience", "9", epochs=2)
    assert saved["hyper_parameters"]["lr"] == saved["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
    assert saved["hyper_parameters"]["beta"] == 4
    assert [state["patience"] for name, state in saved["callbacks"].items() if name.startswith("EarlyStopping")] == [9]
    waiting = "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}\n"
    (tmp_path / "more.yaml").write_text("model: {beta: 7}\ndata: {name: digits}\nname: beta_vae\n" + waiting)
    saved = resumed("--config", "more.yaml", epochs=3)
    assert [saved["hyper_parameters"][name] for name in ("beta", "lr", "latent_dim")] == [7, 1e-4, 3]
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
    path = str(tmp_path / "runs" / "beta_vae" / "version_2" / "checkpoints" / "last.ckpt")
    seeds = [["--seed_everything", "8"], ["--seed_everything", "9"], ["--seed_everything=8"], []]
    weights = [resumed(*seed, epochs=4, path=path)["state_dict"]["vae.encoder.1.weight"] for seed in seeds]
    assert torch.equal(weights[0], weights[2])
    assert not any(torch.equal(weights[0], weights[k]) for k in (1, 3))
    assert "importance-weighted" in inside("test", "--model.nll_samples", "2")[0]
    assert "must be a checkpoint of this model" in inside("test", "--model.latent_dim", "5", code=1)[1]


@pytest.mark.slow
def test_a_configuration_beside_a_checkpoint_leaves_the_rest_of_the_run_as_it_was(tmp_path, inside):
    inside("fit", *QUICK, "--data.batch_size", "77", "--name", "run")
    (tmp_path / "rate.yaml").write_text("model: {lr: 5.0e-4}\n")
    for version, given in ((1, "rate.yaml"), (2, "{model: {lr: 5.0e-4}}")):
        inside("fit", "--ckpt_path", "last", "--config", given, "--trainer.max_epochs", str(version + 1))
        config = yaml.safe_load((tmp_path / "runs" / "run" / f"version_{version}" / "config.yaml").read_text())
        assert (config["data"]["batch_size"], config["data"]["name"], config["model"]["lr"]) == (77, "digits", 5e-4)
    assert "codes measured" in inside("test", "--config", "rate.yaml")[0]  # other data would not have the model's shape


SCHEDULED = {
    "StepLR": ({"step_size": 1}, {"step_size": 2, "gamma": 0.5}),
    "OneCycleLR": ({"max_lr": 0.01, "total_steps": 18}, {"max_lr": 0.02, "total_steps": 30}),
    "torch.optim.lr_scheduler.ReduceLROnPlateau": ({"threshold": 1e3, "patience": 9}, {"threshold": 1e3, "patience": 1}),
}


def flags_of(group, options):
    return [word for name, value in options.items() for word in (f"--{group}.{name}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULED)
def test_an_option_of_the_schedule_that_is_given_otherwise_is_obeyed(tmp_path, inside, schedule):
    before, after = (flags_of("model.lr_scheduler", options) for options in SCHEDULED[schedule])

    def rate(*args):
        inside("fit", *QUICK, "--name", "rates", *args)
        newest = max((tmp_path / "runs" / "rates").glob("version_*"), key=lambda run: int(run.name.split("_")[1]))
        [group] = torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
        return [group["lr"], group["betas"]]

    chosen = ["--model.lr_scheduler", schedule, "--model.lr_scheduler_interval", "step" if schedule == "OneCycleLR" else "epoch"]
    # Lightning saves an epoch's checkpoint before this schedule has heard of the epoch's loss, which it then never hears of.
    epochs = "4" if schedule.endswith("Plateau") else "5"
    expected = rate(*chosen, *after, "--trainer.max_epochs", epochs)
    assert expected != rate(*chosen, *before, "--trainer.max_epochs", "5")
    rate(*chosen, *before, "--trainer.max_epochs", "2")
    assert rate("--ckpt_path", "last", *after, "--trainer.max_epochs", "5") == expected


@pytest.mark.slow
def test_what_a_checkpoint_goes_on_with_is_not_given_otherwise(tmp_path, inside):
    inside("fit", *QUICK, "--name", "learned", "--model.learn_sigma", "true")
    inside("fit", *QUICK, "--name", "optimal", "--model.optimal_sigma", "true")
    inside("fit", *QUICK, "--name", "fixed", "--model.likelihood", "gaussian", "--model.optimizer", "SGD")
    inside("fit", *QUICK, "--name", "rprop", "--model.optimizer", "Rprop", "--model.lr_scheduler", "StepLR", *STEP)
    before = files(tmp_path)
    more = ["--trainer.max_epochs", "2"]
    sigma = ["--model.sigma", "0.05"]
    kept = ", as in ckpt_path"
    for name, args, words in (
        ("learned", sigma, "model.sigma must not be given with ckpt_path if model.learn_sigma is true, as it comes from the checkpoint"),
        ("learned", ["--model.sigma", "1"], "model.sigma must not be given with ckpt_path"),
        ("optimal", sigma, "model.sigma must not be given with ckpt_path if model.optimal_sigma is true"),
        ("optimal", ["--model", "{sigma: 0.05}"], "model.sigma must not be given with ckpt_path if model.optimal_sigma is true"),
        ("learned", ["--model.optimizer", "SGD"], f"model.optimizer must be torch.optim.Adam{kept}"),
        ("fixed", ["--model.optimizer", "Adam"], f"model.optimizer must be torch.optim.SGD{kept}"),
        ("fixed", ["--model.lr_scheduler", "StepLR", *STEP], f"model.lr_scheduler must be null{kept}"),
        ("rprop", ["--model.lr_scheduler", "LinearLR"], f"model.lr_scheduler must be torch.optim.lr_scheduler.StepLR{kept}"),
        ("rprop", ["--model.lr", "1"], f"model.lr must be 0.001{kept}, got 1.0: the state of torch.optim.Rprop"),
        ("learned", ["--model.optimizer", "Adam", "--model.optimizer.amsgrad", "true"], f"model.optimizer.amsgrad must be false{kept}"),
    ):
        assert error(inside("fit", "--name", name, "--ckpt_path", "last", *more, *args, code=1)[1]).startswith(f"error: {words}")
    for name in ("learned", "optimal"):
        line = error(inside("test", "--name", name, *sigma, code=1)[1])
        assert line.startswith("error: model.sigma must not be given with ckpt_path")
    assert files(tmp_path) == before
    inside("fit", "--name", "fixed", "--ckpt_path", "last", *more, *sigma, "--model.optimizer.momentum", "0.9")
    inside("test", "--name", "learned", "--model.optimizer", "SGD")


STEP = ["--model.lr_scheduler.step_size", "2"]


@pytest.mark.slow
def test_a_configuration_in_braces_is_read_as_a_file_is(tmp_path, inside):
    inside("fit", *QUICK)
    for config in ("{ckpt_path: last}", '{"ckpt_path": "last", "trainer": {"max_epochs": 1}, "data": {"name": "digits"}}'):
        assert inside("fit", "--config", config, *QUICK)[0].startswith("nothing to do: ")
    line = error(inside("fit", "--config", "{model: ]}", code=2)[1])
    assert line.startswith("error: config must be a file of YAML, got '{model: ]}', line 1: ")


@pytest.mark.slow
def test_an_option_without_a_use_is_refused_wherever_it_is_given(tmp_path, inside):
    (tmp_path / "beta.yaml").write_text("model: {beta: 4}\n")
    (tmp_path / "dotted.yaml").write_text("model.beta: 4\n")
    (tmp_path / "model.yaml").write_text("beta: 4\n")
    for args in (
        ["--model", "{beta: 4}"],
        ["--model={beta: 4}"],
        ["--model", "model.yaml"],
        ["--config", "beta.yaml"],
        ["--config", "dotted.yaml"],
        ["--config={model: {beta: 4}}"],
    ):
        line = error(inside("fit", *QUICK, *args, code=1)[1])
        assert line == "error: model.objective must be beta_vae or beta_tc_vae for model.beta, got mmd_vae", args
    for args in (["--model.lr_scheduler_interval", "step"], ["--config", "{model: {lr_scheduler_interval: step}}"]):
        line = error(inside("fit", *QUICK, *args, code=1)[1])
        assert line == "error: model.lr_scheduler must be given for model.lr_scheduler_interval, got none"
    inside("fit", *QUICK, "--name", "one", "--model.objective", "beta_vae", "--model.beta", "4")
    written = str(tmp_path / "runs" / "one" / "version_0" / "config.yaml")
    inside("fit", "--config", written, "--name", "same", "--trainer.max_epochs", "1")
    inside("fit", "--config", written, "--name", "other", "--model.objective", "vae")


EARLY = ["--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.patience", "3"]


@pytest.mark.slow
def test_a_run_that_has_come_to_its_end(tmp_path, inside):
    inside("fit", *QUICK)
    before = files(tmp_path)
    out, _ = inside("fit", "--ckpt_path", "last")
    assert out.startswith("nothing to do: ")
    assert "after 1 of 1 epochs; to continue: --trainer.max_epochs 2" in out
    out, _ = inside("fit", "--ckpt_path", "last", "--trainer.max_epochs", "9", "--trainer.max_steps", "2")
    assert "after 3 of 2 steps" in out
    out, _ = inside("fit", "--ckpt_path", "last", "--trainer.max_epochs", "9", "--trainer.max_time", "00:00:00:00")
    assert "s of trainer.max_time" in out
    assert files(tmp_path) == before
    early = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.min_delta", "1e5", *EARLY]
    inside("fit", *QUICK, "--name", "early", *early, "--trainer.callbacks.patience", "1", "--trainer.max_epochs", "5")
    out, _ = inside("fit", "--name", "early", "--ckpt_path", "last")
    assert "by EarlyStopping; to continue: --trainer.callbacks.patience 3" in out
    inside("fit", "--name", "early", "--ckpt_path", "last", "--trainer.callbacks.patience", "3")
    assert (tmp_path / "runs" / "early" / "version_1").exists()


@pytest.mark.slow
def test_one_callback_by_its_name_and_a_run_that_averages_weights_goes_on(tmp_path, inside):
    inside("fit", *QUICK, "--trainer.callbacks", "LearningRateMonitor")
    averaged = ["--trainer.callbacks", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"]
    inside("fit", *QUICK, "--name", "averaged", *averaged)
    assert "device: cpu" in (tmp_path / "runs" / "averaged" / "version_0" / "config.yaml").read_text()
    out, _ = inside("fit", "--name", "averaged", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert "averaged/version_1" in out
    inside("fit", *QUICK, "--name", "timed", "--trainer.callbacks", "Timer", "--trainer.callbacks.duration", "00:01:00:00")
    inside("fit", "--name", "timed", "--ckpt_path", "last", "--trainer.max_epochs", "2")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precision_from_fit_to_pictures(tmp_path, inside, pictures, precision):
    inside("fit", *QUICK, "--trainer.precision", precision)
    run = tmp_path / "runs" / "mmd_vae" / "version_0"
    assert {file.name for file in run.iterdir()} >= set(PICTURES)
    weight = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["vae.encoder.1.weight"]
    assert weight.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    inside("test")
    inside("sample", "--n", "3")


@pytest.mark.slow
def test_without_a_logger_and_without_checkpoints(tmp_path, inside, pictures):
    out, _ = inside("fit", *QUICK, "--trainer.logger", "false", "--name", "quiet")
    run = tmp_path / "runs" / "quiet" / "version_0"
    assert {file.name for file in run.iterdir()} == {*PICTURES, "config.yaml", "checkpoints"}
    # What it prints, in another folder.
    os.chdir("/")
    assert "Codes" in inside(*out.splitlines()[-1].partition("fastvae ")[2].split(), "--runs", str(tmp_path / "runs"))[0]
    os.chdir(tmp_path)
    out, _ = inside("fit", *QUICK, "--trainer.enable_checkpointing", "false", "--name", "unsaved")
    assert "fastvae test" not in out
    assert not (tmp_path / "runs" / "unsaved" / "version_0" / "checkpoints").exists()
    inside("fit", *QUICK, "--trainer.fast_dev_run", "true", "--name", "tried")
    assert not (tmp_path / "runs" / "tried").exists()
    inside("fit", *QUICK, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--name", "own")
    assert (tmp_path / "runs" / "own" / "version_0" / "checkpoints" / "last.ckpt").exists()
    assert list((tmp_path / "logs").rglob("metrics.csv"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/los"],
            "monitor of EarlyStopping must be one of train/",
        ),
        (
            ["--data.validation", "0", "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"],
            "monitor of EarlyStopping must be a training metric in a run without validation, got 'val/loss'",
        ),
        (["--data.batch_size", "1"], "data.batch_size must be at least 2 for the unbiased MMD, got 1: or use --model.estimator biased"),
    ],
)
def test_what_is_refused_before_the_first_step(tmp_path, inside, args, words):
    line = inside("fit", *QUICK, *args, code=1)[1].splitlines()[-1]
    assert line.startswith(f"error: {words}")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_metric_that_is_logged_may_be_waited_for(inside):
    for metric in ("val/mutual_information", "val/kl_dimension_002", "train/mmd", "train/loss_epoch"):
        inside("fit", *QUICK, "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", metric)
    without = ["--data.validation", "0", "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "train/active_units"]
    inside("fit", *QUICK, *without)


@pytest.mark.slow
def test_data_of_another_shape(tmp_path, inside):
    inside("fit", *QUICK)
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "x.npy", np.zeros((20, 5, 5), dtype=np.uint8))
    for command in ("encode", "reconstruct", "traverse"):
        line = error(inside(command, "--path", "other", code=1)[1])
        assert line == "error: data must have the shape that the model was trained on, (1, 8, 8), got (1, 5, 5)"


@pytest.mark.slow
def test_a_flag_that_is_known_is_not_taken_for_a_misspelt_one(inside):
    for command in ("fit", "test"):
        flags = set(re.findall(r"--(?:data|model|trainer)\.\w+\+?", inside(command, "--help")[0]))
        assert len(flags) > 80
        assert all(misspelt([command, flag, "1"]) is None for flag in flags)
    assert misspelt(["fit", "--model.latentdim=3"]) == "unrecognized arguments: --model.latentdim, did you mean --model.latent_dim?"
    assert not set(FILE_COMMANDS) ^ set(COMMANDS)


@pytest.fixture
def own_handlers(monkeypatch):
    for name in ("lightning.fabric", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)


@pytest.mark.slow
def test_commands_drawn_at_random(own_handlers):
    """`python -m tests.drawn_commands` for more of them."""
    assert drawn_commands.main(12, 3) == 0


@pytest.mark.slow
def test_each_flag_of_lightnings_trainer_is_obeyed_or_refused(own_handlers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pictures, "on_train_end", lambda *_: None)
    assert set(drawn_commands.TRAINER) == set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    for name, [value, *_] in drawn_commands.TRAINER.items():
        args = ["fit", *drawn_commands.flags(drawn_commands.SMALL | {f"trainer.{name}": value})]
        ending = drawn_commands.call(args)
        assert drawn_commands.fault(args, *ending) is None, (args, ending)


def test_progress_is_whole_at_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bar = Progress()
    metrics = {"train/loss": 105.4321, "train/reconstruction": 79.84, "train/kl": 25.541, "train/mmd": -0.001234567, "val/loss": 104.71}
    bar._trainer = SimpleNamespace(max_epochs=60, current_epoch=11, _results=None, callback_metrics=metrics)
    assert bar._numbers() == "loss 105.4 rec 79.84 kl 25.54 mmd -0.001235 val 104.7"
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    bar._stream = stream
    bar._begin(bar._title(), 100)
    bar._bar.ncols, bar._bar.dynamic_ncols = 79, None
    bar._step(50)
    bar._bar.postfix = (bar._numbers(),)
    assert str(bar._bar).endswith(bar._numbers())
    assert str(bar._bar).startswith("Epoch 12/60 |")
    assert len(str(bar._bar)) <= 79
    bar._end()


@pytest.mark.slow
def test_a_wrong_call_of_the_module_leaves_the_process_with_one_sentence():
    command = [sys.executable, "-m", "fastvae", "fit", "--data.path", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert error(done.stderr) == "error: data.path must be a folder or a file that exists, got 'nowhere'"
    assert done.returncode == 1


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"fastvae {__version__}\n"


@pytest.mark.slow
def test_a_corrupt_file_and_a_corrupt_checkpoint(tmp_path, inside):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    assert "it is corrupt" in error(inside("fit", "--data.path", str(tmp_path), code=1)[1])
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut off")
    assert "complete checkpoint" in error(inside("test", "--ckpt_path", str(tmp_path / "broken.ckpt"), code=1)[1])


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_one_sentence(inside):
    _, err = inside("fit", *SMALL, "--model.lr", "1e30", code=1)
    assert err.splitlines()[-1].startswith("error: loss must be finite, got a non-finite one at step 1 (epoch 0, batch 1)")


def test_an_apple_gpu_is_left_to_who_asks_for_it(inside, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    # Lightning remembers what it has found.
    monkeypatch.setattr("lightning.fabric.accelerators.mps.MPSAccelerator.is_available", staticmethod(lambda: True))
    _, err = inside("fit", *SMALL, "--trainer.max_epochs", "1")
    assert "on the CPU, as MPS has no float64" in err
    assert "not used" not in err
    _, err = inside("fit", *SMALL, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
    assert "no float64" not in err


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(PACKAGED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_is_valid(inside, config):
    out, _ = inside("fit", "--config", str(config), "--print_config")
    assert f"name: {config.stem}" in out


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(PACKAGED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_trains(tmp_path, inside, pictures, config):
    """Its own network and loss, on a few made-up data of the shape and the file names that it asks for."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    path = folder
    if config.stem in ("celeba", "autoencoder_kl"):
        for k in range(160):
            Image.fromarray(random.integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(folder / f"{k:06d}.jpg")
    elif config.stem == "dsprites":
        path = folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
        dsprites(path, n=300, imgs=random.integers(0, 2, (300, 64, 64), dtype=np.uint8))
    elif config.stem == "table":
        path = folder / "matrix.npy"
        np.save(path, random.normal(size=(100, 30)))
    else:
        for name, n in (("train", 100), ("t10k", 20)):
            write_idx(folder / f"{name}-images-idx3-ubyte.gz", random.integers(0, 256, (n, 28, 28), dtype=np.uint8))
            write_idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--data.batch_size", "30"]
    quick += ["--model.nll_samples", "2"] if config.stem == "mnist_binary" else []
    inside("fit", "--config", str(config), "--data.path", str(path), *quick)
    run = tmp_path / "runs" / config.stem / "version_0"
    assert {"latent.png", "loss_curves.png"} <= {file.name for file in run.glob("*.png")}
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(bool(t.isfinite().all()) for t in saved["state_dict"].values())
    assert "Loss (nats" in inside("test")[0]


@pytest.mark.slow
def test_a_table_from_fit_to_export(tmp_path, inside, pictures):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(120, 5)))
    config = PACKAGED / "table.yaml"
    quick = ["--trainer.max_epochs", "2", "--model.hidden", "[8]", "--model.latent_dim", "2", "--data.batch_size", "40"]
    inside("fit", "--config", str(config), "--data.path", "x.npy", *quick)
    assert {file.name for file in (tmp_path / "runs" / "table" / "version_0").glob("*.png")} == set(PICTURES) - {"samples.png"}
    inside("test")
    inside("sample", "--n", "7", "--output", "samples.npy")
    assert np.load("samples.npy").shape == (7, 5)
    assert "output must be a .npy file for data other than images" in error(inside("sample", code=1)[1])
    inside("encode")
    with np.load("codes.npz") as codes:
        assert codes["mu"].shape == (24, 2)
    assert "I(x; z) = " in inside("report", "runs/table")[0]


@pytest.mark.slow
def test_two_processes_write_one_run(tmp_path):
    # Lightning starts the second process with the script and the arguments of the first.
    (tmp_path / "fastvae.py").write_text("import sys; sys.path.pop(0); from fastvae.cli import main; main()")
    several = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.max_epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "fastvae.py", "fit", *SMALL, *several]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = (tmp_path / "runs" / "mmd_vae").iterdir()
    assert {file.name for file in run.iterdir()} >= {*PICTURES, "config.yaml", "metrics.csv", "checkpoints"}
    assert done.stdout.count("Measure its codes") == 1


@pytest.mark.slow
def test_help(inside):
    out, _ = inside("--help")
    assert all(word in out for word in ("fit", "test", "compare", "report", "sample", "reconstruct", "encode", "traverse", "export"))
    out = " ".join(inside("fit", "--help")[0].partition("\noptions:")[2].split())
    assert out.index("--runs RUNS") < out.index("--data.path PATH") < out.index("--model.lr LR") < out.index("--trainer.accelerator ACC")
    assert out.index("last (the newest") < out.index("--trainer.accelerator ACC")
    assert "--weights_only" not in out
    assert "--model.lambda_" in out


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastvae.training.command", None)
    for module in ("lightning", "lightning.pytorch", "jsonargparse"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r'pip install "fastvae-mmd\[train\]"'):
        main(["fit"])


@pytest.mark.slow
def test_the_package_does_not_import_lightning():
    code = "import sys, fastvae, fastvae.vae, fastvae.objectives, fastvae.training.metrics; sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_process_group_of_the_caller_is_left(inside, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inside("--help")
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
