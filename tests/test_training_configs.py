"""Configurations and checkpoints of strangers: what they name is refused before it is imported, and nothing in them runs."""

import sys

import pytest
import torch
import yaml
from jsonargparse import _common

from fastvae.training.apply import load
from fastvae.training.apply import test_data as read_data
from fastvae.training.checkpoints import AtomicCheckpointIO, is_whole, read_checkpoint
from fastvae.training.command import run
from fastvae.training.configs import MOST_VALUES, PACKAGED, read_yaml
from fastvae.training.module import ImageVAE

CALLBACK = "{trainer: {callbacks: [{class_path: %s}]}}"
AVERAGING = CALLBACK % "lightning.pytorch.callbacks.StochasticWeightAveraging, init_args: {swa_lrs: 0.1, avg_fn: %s}"


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """`run` restricts jsonargparse for its process."""
    monkeypatch.setattr(_common, "parsing_settings", dict(_common.parsing_settings))
    monkeypatch.chdir(tmp_path)


def bomb():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join([*lines, "model: {hidden: *a8}"])


CONFIGS = {
    "a package of the user's": (CALLBACK % "intruder.Callback", "got intruder.Callback: --trust"),
    "an installed module": (CALLBACK % "idlelib.idle.Callback", "got idlelib.idle.Callback: --trust"),
    "a function": (AVERAGING % "os.system", "got os.system"),
    "a function by way of another module": (AVERAGING % "lightning.pytorch.trainer.trainer.os.system", "got posix.system"),
    "a callback that calls functions": (CALLBACK % "lightning.pytorch.callbacks.LambdaCallback", "LambdaCallback: --trust"),
    "a model": ("model: {class_path: intruder.Model}", "does not accept option"),
    "the option itself": ("trust: [intruder]", "'trust' is not accepted"),
    "a tag": ('trainer: !!python/object/apply:os.system ["touch run"]', "could not determine a constructor for the tag"),
    "a name's tag": ("model: {lr: !!python/name:os.system }", "could not determine a constructor for the tag"),
    "aliases of aliases": (bomb(), "must hold at most 10,000 values"),
    "nested deep": ("model: " + "[" * 100 + "]" * 100, "must be nested at most 32 deep"),
    # From 6.0.4 on PyYAML has a limit of its own, of a thousand, and "exceeded maximum nesting depth" is its sentence.
    "nested without end": ("model: " + "[" * 10**5 + "]" * 10**5, "nest"),
    "interpolation": ("data: {batch_size: '${oc.env:HOME}'}", "data.batch_size must be an integer, got ${oc.env:HOME}"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_runs_no_code(tmp_path, monkeypatch, capsys, kind):
    text, sentence = CONFIGS[kind]
    (tmp_path / "intruder.py").write_text("open('run', 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        run(["fit", "--config", "config.yaml", "--print_config"])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "run").exists()
    assert "idlelib.idle" not in sys.modules


def test_what_a_configuration_may_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "friend.py").write_text("from lightning.pytorch import Callback\nclass Mine(Callback): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for callback, trust in (("lightning.pytorch.callbacks.ModelSummary", []), ("friend.Mine", ["--trust", "friend"])):
        (tmp_path / "config.yaml").write_text(CALLBACK % callback)
        with pytest.raises(SystemExit) as end:
            run(["fit", *trust, "--config", "config.yaml", "--print_config"])
        out = capsys.readouterr().out
        assert end.value.code == 0
        assert yaml.safe_load(out)["trainer"]["callbacks"][0]["class_path"].rsplit(".")[-1] in callback
        assert "trust" not in out


@pytest.mark.parametrize("given", ["--config=table", "--config table", "--config table.yaml", "-c configs/table.yaml"])
def test_a_configuration_of_the_package_is_found_by_its_name(capsys, given):
    with pytest.raises(SystemExit) as end:
        run(["fit", *given.split(), "--print_config"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert yaml.safe_load(out)["model"]["optimal_sigma"] is True


def test_a_file_goes_before_a_configuration_of_the_package(tmp_path, capsys):
    (tmp_path / "table").write_text("name: mine")
    with pytest.raises(SystemExit):
        run(["fit", "--config", "table", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "mine"


def test_an_unknown_configuration_is_told_the_names_there_are(capsys):
    names = sorted(file.stem for file in PACKAGED.glob("*.yaml"))
    assert "mnist_vae" in names
    for absent in ("tables", "elsewhere/table"):
        with pytest.raises(SystemExit):
            run(["fit", "--config", absent])
        assert f"one of {', '.join(names)}, got '{absent}'" in capsys.readouterr().err


def test_values_are_counted_with_their_aliases():
    assert read_yaml("a: [1, 2.5e-3, x]\nb: {c: true}") == {"a": [1, 2.5e-3, "x"], "b": {"c": True}}
    assert len(read_yaml(str([1] * (MOST_VALUES - 1)))) == MOST_VALUES - 1
    with pytest.raises(yaml.YAMLError, match="at most 10,000 values"):
        read_yaml(str([1] * MOST_VALUES))


class Intruder:
    def __reduce__(self):
        return open, ("run", "w")


def saved(file, **changes):
    module = ImageVAE([1, 8, 8], latent_dim=2, hidden=[8])
    checkpoint = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.0",
        "loops": {},
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint | changes, file)
    return checkpoint["hyper_parameters"]


PLAIN = {"shape": [1, 8, 8], "latent_dim": 2, "hidden": [8]}
LARGE = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 10**6, "out_features": 10**6}}
CHECKPOINTS = {
    "a pickle": ({"callbacks": Intruder()}, "must be a checkpoint of tensors and plain values"),
    "a pickle of the options": ({"hyper_parameters": Intruder()}, "must be a checkpoint of tensors and plain values"),
    "weights of another model": ({"hyper_parameters": PLAIN | {"latent_dim": 3}}, "must be a checkpoint of this model"),
    "a model that fills the memory": ({"hyper_parameters": PLAIN | {"hidden": [10**9, 10**9]}}, "must be a checkpoint of this model"),
    "options that are a list": ({"hyper_parameters": [1, 2]}, "must be a checkpoint of this model"),
    "an option without a name": ({"hyper_parameters": PLAIN | {1: 2}}, "must be a checkpoint of this model"),
    "an unknown option": ({"hyper_parameters": PLAIN | {"bogus": 1}}, "bogus"),
    "an option of another type": ({"hyper_parameters": PLAIN | {"hidden": {}}}, "hidden"),
    "an encoder of one's own": ({"hyper_parameters": PLAIN | {"encoder": {"class_path": "intruder.Net"}}}, "PACKAGE allows intruder.Net"),
    "an encoder that is a function": ({"hyper_parameters": PLAIN | {"encoder": {"class_path": "os.mkdir"}}}, "must name an encoder"),
    "an encoder that is no module": ({"hyper_parameters": PLAIN | {"encoder": {"class_path": "torch.optim.Adam"}}}, "must name an encoder"),
    "an encoder that fills the memory": ({"hyper_parameters": PLAIN | {"encoder": LARGE}}, "must be a checkpoint of this model"),
    "a decoder that is a number": ({"hyper_parameters": PLAIN | {"decoder": 3}}, "must name a decoder"),
    "a preparation that is none": ({"state_dict": {"vae.preparation._extra_state": torch.ones(())}}, "must be a checkpoint of this model"),
    "a preparation of no numbers": ({"state_dict": {"vae.preparation._extra_state": torch.full((2, 3), torch.nan)}}, "must be finite"),
    "no weights": ({"state_dict": None}, "got a file without a state_dict"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_runs_no_code(tmp_path, capsys, kind):
    changes, sentence = CHECKPOINTS[kind]
    file = tmp_path / "a.ckpt"
    saved(file, **changes)
    assert is_whole(file)
    with pytest.raises(ValueError, match=sentence):
        load(str(file), "runs")
    assert run(["sample", "--ckpt_path", str(file)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_a_run_goes_on_from_no_pickle(tmp_path, capsys, subcommand):
    saved(tmp_path / "a.ckpt", callbacks=Intruder())
    assert run([subcommand, "--ckpt_path", "a.ckpt", "--data.name", "digits"]) == 1
    assert "must be a checkpoint of tensors and plain values" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["fit", "--weights_only", "false"])
    assert "unrecognized arguments: --weights_only" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert not (tmp_path / "run").exists()


def test_what_a_checkpoint_names_is_not_called(tmp_path):
    saved(tmp_path / "a.ckpt", hyper_parameters=PLAIN | {"_instantiator": "intruder.call", "_class_path": "intruder.Model"})
    assert load(str(tmp_path / "a.ckpt"), "runs").vae.latent_dim == 2
    assert read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["_instantiator"] == "intruder.call"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{bogus: 1}", "must hold options of data"),
        ("[1, 2]", "must hold options of data"),
        ("{name: cifar}", "data.name must be one of"),
        ("{name: digits, batch_size: x}", "batch_size"),
        ("!!python/object/apply:os.system [touch run]", "path must be given"),
    ],
)
def test_the_configuration_beside_a_checkpoint(tmp_path, data, sentence):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    saved(folder / "a.ckpt")
    (folder.parent / "config.yaml").write_text(f"data: {data}")
    with pytest.raises(ValueError, match=sentence):
        read_data(load(str(folder / "a.ckpt"), "runs"), str(folder / "a.ckpt"), None, "runs", None)


def test_the_configuration_beside_a_checkpoint_names_nothing_else(tmp_path, capsys):
    folder = tmp_path / "downloaded" / "checkpoints"
    folder.mkdir(parents=True)
    saved(folder / "a.ckpt")
    (folder.parent / "config.yaml").write_text(AVERAGING % "os.system")
    with pytest.raises(SystemExit):
        run(["fit", "--ckpt_path", str(folder / "a.ckpt"), "--data.name", "digits"])
    assert "got os.system" in capsys.readouterr().err
