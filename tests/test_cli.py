import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from fastvae.cli import main
from tests.test_training_data import dsprites, write_idx

SMALL = ["--data.name", "digits", "--data.batch_size", "512", "--model.latent_dim", "3", "--model.hidden", "[16]"]
PICTURES = ("reconstructions.png", "samples.png", "latent.png", "loss_curves.png")


def fastvae(folder, *args, code=0):
    """Runs the command in a process of its own in `folder`; returns what it said."""
    command = [sys.executable, "-c", "from fastvae.cli import main; main()", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def inside(tmp_path, monkeypatch, capfd):
    """The same in this process, in `tmp_path`: importing Lightning takes longer than most of these runs."""
    monkeypatch.chdir(tmp_path)
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
def test_fit_test_and_resume(tmp_path):
    out, err = fastvae(tmp_path, "fit", *SMALL, "--trainer.max_epochs", "2")
    run = tmp_path / "runs" / "mmd_vae" / "version_0"
    assert str(run) in out
    assert "warn" not in (out + err).lower()
    assert {file.name for file in run.iterdir()} >= {*PICTURES, "config.yaml", "metrics.csv", "checkpoints"}
    assert any(file.name.startswith("events.out.tfevents") for file in run.iterdir())
    for name in PICTURES:
        assert imread(run / name).std() > 0.01
    first = files(run)

    out, _ = fastvae(tmp_path, "test")
    assert "test/mutual_information" in out
    assert (tmp_path / "runs" / "mmd_vae" / "test_0" / "metrics.csv").is_file()

    out, err = fastvae(tmp_path, "fit", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert "version_1" in out
    assert "warn" not in (out + err).lower()
    epochs = [line.split(",")[0] for line in (tmp_path / "runs" / "mmd_vae" / "version_1" / "metrics.csv").read_text().splitlines()[1:]]
    assert set(epochs) == {"2"}
    assert files(run) == first


@pytest.mark.slow
def test_a_wrong_call_leaves_the_process_with_one_sentence(tmp_path):
    _, err = fastvae(tmp_path, "fit", "--data.path", "nowhere", code=1)
    assert error(err) == "error: data.path must be a folder that exists, got 'nowhere'"


@pytest.mark.slow
def test_configuration_file_and_own_data(tmp_path, inside):
    folder = tmp_path / "mine"
    folder.mkdir()
    np.savez(folder / "mine.npz", images=np.random.default_rng(0).integers(0, 256, (60, 9, 11), dtype=np.uint8))
    config = tmp_path / "config.yaml"
    config.write_text(
        "name: mine\nmodel: {architecture: conv, channels: [4], hidden: [8], objective: info_vae, lambda_: 5}\ndata: {batch_size: 20}\n"
    )
    out, _ = inside("fit", "--config", str(config), "--data.path", str(folder), "--trainer.max_epochs", "1", "--runs", "out")
    assert str(tmp_path / "out" / "mine" / "version_0") in out
    out, _ = inside("test", "--runs", "out")
    assert "test/active_units" in out
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
        (["fit", "--trainer.max_epoch", "3"], 2, ["unrecognized arguments: --trainer.max_epoch 3"]),
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
        (["fit", "--ckpt_path", "absent.ckpt"], 1, ["ckpt_path must be 'last' or a whole checkpoint's file, got 'absent.ckpt'"]),
    ],
)
def test_a_wrong_call_is_one_sentence(tmp_path, inside, args, code, words):
    line = error(inside(*args, code=code)[1])
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_corrupt_file_and_a_corrupt_checkpoint(tmp_path, inside):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    assert "it is corrupt" in error(inside("fit", "--data.path", str(tmp_path), code=1)[1])
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut off")
    assert "whole checkpoint" in error(inside("test", "--ckpt_path", str(tmp_path / "broken.ckpt"), code=1)[1])


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_one_sentence(inside):
    _, err = inside("fit", *SMALL, "--model.lr", "1e30", code=1)
    assert err.splitlines()[-1].startswith("error: loss must be finite, got a non-finite one at step 1 (epoch 0, batch 1)")


def test_an_apple_gpu_is_left_to_who_asks_for_it(inside, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    _, err = inside("fit", *SMALL, "--trainer.max_epochs", "1")
    assert "on the CPU, as MPS has no float64" in err
    assert "not used" not in err
    _, err = inside("fit", *SMALL, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
    assert "no float64" not in err


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_is_valid(inside, config):
    out, _ = inside("fit", "--config", str(config), "--print_config")
    assert f"name: {config.stem}" in out


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_trains(tmp_path, inside, config):
    """Its own network and loss, on a few made-up data of the shape and the file names that it asks for."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    path = folder
    if config.stem == "celeba":
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
    assert "test/loss" in inside("test")[0]


@pytest.mark.slow
def test_a_table_from_fit_to_export(tmp_path, inside):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(120, 5)))
    config = Path(__file__).parent.parent / "configs" / "table.yaml"
    quick = ["--trainer.max_epochs", "2", "--model.hidden", "[8]", "--model.latent_dim", "2", "--data.batch_size", "40"]
    inside("fit", "--config", str(config), "--data.path", "x.npy", *quick)
    assert {file.name for file in (tmp_path / "runs" / "table" / "version_0").glob("*.png")} == set(PICTURES) - {"samples.png"}
    inside("test")
    inside("sample", "--n", "7", "--output", "samples.npy")
    assert np.load("samples.npy").shape == (7, 5)
    assert "output must be a .npy file where the data are no images" in error(inside("sample", code=1)[1])
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
    out, _ = inside("fit", "--help")
    assert "--data.path" in out
    assert "--model.lambda_" in out


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastvae.training.command", None)
    for module in ("lightning", "lightning.pytorch", "jsonargparse"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r'pip install "fastvae-mmd\[train\]"'):
        main(["fit"])


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
