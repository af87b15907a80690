"""Commands of `fastvae` with flags drawn at random from Lightning's and ours: `python -m tests.drawn_commands [HOW_MANY [SEED]]`.

Each has to end well or in one sentence, never in a traceback, and what it was given has to show in what it did.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import shlex
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

from fastvae.training.command import run
from fastvae.training.configs import read_yaml

SMALL = {
    **{"data.name": "digits", "data.batch_size": "400", "model.latent_dim": "2", "model.hidden": "[8]"},
    **{"trainer.max_epochs": "1", "model.diagnostics_size": "50", "trainer.accelerator": "cpu"},
}
# Wrong values among the right ones: they are to be refused.
TRAINER = {
    "max_epochs": ("2", "0", "-7", "x"),
    "min_epochs": ("1", "3"),
    "max_steps": ("3", "0", "-1", "-5", "1.5"),
    "min_steps": ("2", "9"),
    "max_time": ("00:00:00:00", "00:01:00:00", "{seconds: 0}", "soon"),
    "limit_train_batches": ("2", "0.5", "0", "1.0", "7.5", "-1"),
    "limit_val_batches": ("1", "0", "0.5"),
    "limit_test_batches": ("1", "0.5", "0"),
    "overfit_batches": ("1", "0.5"),
    "val_check_interval": ("2", "0.5", "100", "0", "00:00:10"),
    "check_val_every_n_epoch": ("2", "null", "0"),
    "num_sanity_val_steps": ("1", "-1", "0"),
    "log_every_n_steps": ("1", "0", "3"),
    "enable_checkpointing": ("false", "true", "perhaps"),
    "enable_progress_bar": ("false", "true"),
    "enable_model_summary": ("false", "true"),
    "accumulate_grad_batches": ("2", "0", "-1"),
    "gradient_clip_val": ("0.5", "0", "-1", "x"),
    "gradient_clip_algorithm": ("value", "norm", "max"),
    "deterministic": ("true", "warn", "maybe"),
    "benchmark": ("true", "false"),
    "inference_mode": ("false", "true"),
    "use_distributed_sampler": ("false",),
    "profiler": ("simple", "advanced", "pytorch", "PassThroughProfiler", "lightning.pytorch.profilers.SimpleProfiler", "quick"),
    "detect_anomaly": ("true",),
    "barebones": ("true",),
    "plugins": ("null", "[]", "BitsandbytesPrecision", "lightning.pytorch.plugins.MixedPrecision", "nothing"),
    "sync_batchnorm": ("true",),
    "reload_dataloaders_every_n_epochs": ("1", "-1"),
    "default_root_dir": ("elsewhere",),
    "enable_autolog_hparams": ("false",),
    "model_registry": ("mine",),
    "limit_predict_batches": ("1",),
    "fast_dev_run": ("true", "2", "-1"),
    "accelerator": ("auto", "gpu", "mps", "tpu", "abacus"),
    "strategy": ("auto", "ddp", "fsdp", "deepspeed", "ddp_find_unused_parameters_true", "single_device", "magic"),
    "devices": ("1", "auto", "99", "0", "[0]", "-1", "many"),
    "num_nodes": ("1", "0", "2"),
    "precision": ("32", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "transformer-engine", "fp7"),
    "logger": ("false", "true", "null", "TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CSVLogger", "nowhere.Logger"),
    "callbacks": (
        *("LearningRateMonitor", "EarlyStopping", "ModelCheckpoint", "ModelSummary", "DeviceStatsMonitor", "RichProgressBar", "Timer"),
        *("TQDMProgressBar", "StochasticWeightAveraging", "GradientAccumulationScheduler", "LambdaCallback", "ModelPruning", "[]", "null"),
        *(
            "BatchSizeFinder",
            "LearningRateFinder",
            "OnExceptionCheckpoint",
            "ThroughputMonitor",
            "BackboneFinetuning",
            "EMAWeightAveraging",
        ),
        *("RichModelSummary", "Nothing", "fastvae.training.schedule.Schedule", "SpikeDetection", "BasePredictionWriter", "os.system"),
    ),
}
# What those need beside their name.
NEEDED = {
    "EarlyStopping": {"monitor": ("val/loss", "train/loss", "val/los", "kl"), "patience": ("1", "0", "-2")},
    "ModelCheckpoint": {"monitor": ("val/loss", "train/kl", "nothing"), "dirpath": ("saved",), "every_n_train_steps": ("1",)},
    "StochasticWeightAveraging": {"swa_lrs": ("0.01", "-1"), "swa_epoch_start": ("0.1", "7")},
    "GradientAccumulationScheduler": {"scheduling": ("{0: 2}", "{}")},
    "CSVLogger": {"save_dir": ("logged",)},
    "TensorBoardLogger": {"save_dir": ("logged",)},
    "OnExceptionCheckpoint": {"dirpath": ("saved",)},
    "fastvae.training.schedule.Schedule": {"weight": ("kl_weight", "mmd_weight", "weight"), "steps": ("2", "0")},
}
MODEL = {
    "architecture": ("conv", "mlp", "autoencoder_kl", "transformer"),
    "latent_dim": ("3", "1", "0", "x"),
    "hidden": ("[4]", "[8, 4]", "[]", "8", "[0]"),
    "channels": ("[2]", "[2, 2, 2]", "[2, 2, 2, 2, 2]"),
    "latent_channels": ("2", "0"),
    "likelihood": ("gaussian", "bernoulli", "laplace", "poisson"),
    "sigma": ("0.5", "0", "-1"),
    "learn_sigma": ("true",),
    "optimal_sigma": ("true",),
    "posterior": ("deterministic", "gaussian"),
    "logvar_bounds": ("[-4, 2]", "[2, -4]", "3"),
    "objective": ("vae", "beta_vae", "info_vae", "mmd_vae", "wae_mmd", "beta_tc_vae", "capacity_vae", "dip_vae", "iwae", "gan"),
    "beta": ("4", "-1"),
    "alpha": ("0.5", "2"),
    "lambda_": ("10", "-5"),
    "kernel": ("imq", "cauchy"),
    "bandwidth": ("2", "0"),
    "estimator": ("biased", "linear"),
    "mmd_rows": ("location", "pixel"),
    "free_bits": ("0.5", "-1"),
    "samples": ("2", "0"),
    "kl_schedule": ("linear", "cyclical"),
    "kl_schedule_steps": ("3", "0"),
    "mmd_schedule": ("cosine",),
    "lr": ("1e-4", "0.01", "-1", "fast"),
    "evaluation_size": ("100", "0"),
    "diagnostics_size": ("0", "20", "-1"),
    "nll_samples": ("2", "-1"),
    "gradient_norms_every": ("1",),
    "channels_last": ("true",),
}
DATA = {
    "name": ("digits", "folder", "table", "cifar"),
    "path": ("nowhere",),
    "batch_size": ("300", "1", "0", "10000"),
    "binarisation": ("dynamic", "often"),
    "image_size": ("8", "0"),
    "standardise": ("true",),
    "validation": ("0", "0.5", "1"),
    "test": ("0", "0.5", "-1"),
    "seed": ("3", "x"),
}
OWN = {
    "name": ("mine", "a b"),
    "runs": ("others",),
    "checkpoint_every": ("2", "-1"),
    "seed_everything": ("5", "true", "x"),
    "bogus": ("1",),
    "weights_only": ("true",),
}
GROUPS = ((TRAINER, "trainer."), (MODEL, "model."), (DATA, "data."), (OWN, ""))
APPLIED = {
    "sample": {"n": ("3", "0", "x"), "output": ("s.png", "s.npy", "s.gif"), "seed": ("1",)},
    "reconstruct": {"n": ("3", "0"), "output": ("r.png", "r.npy", "r"), "path": ("nowhere", "odd.npy")},
    "encode": {"n": ("5", "0"), "output": ("c.npz", "c.txt"), "path": ("nowhere", "odd.npy")},
    "traverse": {"image": ("1", "100000"), "reach": ("2", "-1"), "steps": ("3", "1"), "output": ("t.png", "t.npy")},
    "export": {"output": ("exported",)},
    "report": {"output": ("reported",)},
}


def draw(rng: random.Random) -> list[str]:
    command = rng.choices(["fit", "resume", "test", *APPLIED], weights=[12, 4, 3, *[0.5] * len(APPLIED)])[0]
    if command in APPLIED:
        options = {name: rng.choice(values) for name, values in APPLIED[command].items() if rng.random() < 0.4}
        last = [] if command != "report" else [rng.choice(["runs/mmd_vae", "nowhere"])]
        return [command, *last, *flags(options)]
    options = {"fit": dict(SMALL), "resume": {"trainer.max_epochs": str(rng.randint(2, 9))}}.get(command, {})
    for _ in range(rng.randint(1, 3)):
        group, prefix = rng.choices(GROUPS, weights=[6, 3, 1, 1])[0]
        name = rng.choice(list(group))
        value = rng.choice(group[name])
        options[f"{prefix}{name}"] = value
        for needed, values in NEEDED.get(value, {}).items():
            if rng.random() < 0.8:
                options[f"{prefix}{name}.{needed}"] = rng.choice(values)
    # The class stands before what it is given.
    words = flags(dict(sorted(options.items(), key=lambda item: item[0].count("."))))
    return {"fit": ["fit"], "resume": ["fit", "--ckpt_path", "last"], "test": ["test"]}[command] + words


def flags(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def call(args: list[str]) -> tuple[int | None, str, str]:
    """(exit status, or None for a traceback; what it wrote)"""
    out, err = io.StringIO(), io.StringIO()
    for name in ("lightning.fabric", "lightning.pytorch"):  # their handler keeps the stream of the first call
        logging.getLogger(name).handlers = [logging.StreamHandler(err)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code: int | None = run(list(args))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            code = None
            traceback.print_exc()
    torch.use_deterministic_algorithms(False)
    torch.set_anomaly_enabled(False)
    return code, out.getvalue(), err.getvalue()


def fault(args: list[str], code: int | None, out: str, err: str) -> str | None:
    """What is wrong with an ending, None if nothing is."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if code is None or "Traceback" in err:
        return "a traceback"
    if code:
        return None if len(errors) == 1 and err.rstrip().endswith(errors[0]) else "no sentence at the end"
    if errors:
        return "an error and exit status 0"
    return ignored(args, out, err) if args[0] in ("fit", "test") else None


def ignored(args: list[str], out: str, err: str) -> str | None:
    """A flag that does not show in what a run wrote."""
    given = {name.removeprefix("--"): value for name, value in zip(args[1::2], args[2::2], strict=True)}
    if "fast_dev_run" in " ".join(args) or out.startswith("nothing to do"):
        return None
    marker = "Pictures" if args[0] == "fit" else "All numbers"
    place = next((line.partition(": ")[2] for line in out.splitlines() if line.startswith(marker)), "")
    if not place:
        return f"no line {marker}"
    folder = Path(place) if args[0] == "fit" else Path(place).parent
    config = read_yaml((folder / "config.yaml").read_text())
    for name, value in given.items():
        if name in ("ckpt_path", "seed_everything") or name.count(".") > 1:
            continue
        found = config
        for part in name.split("."):
            found = found[part] if isinstance(found, dict) else found
        wanted = read_yaml(value)
        if isinstance(found, list) and found and isinstance(found[0], dict):
            found = found[-1]
        if isinstance(found, dict) and "class_path" in found:
            found = found["class_path"].rsplit(".", 1)[-1]
            wanted = value.rsplit(".", 1)[-1]
        if name == "data.path":
            wanted = str(Path(value).resolve())
        if name not in ("trainer.max_time", "trainer.devices") and found != wanted and str(found) != value:
            return f"{name} {value} is {found!r} in config.yaml"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if given.get("trainer.enable_checkpointing") == "false" or "trainer.barebones" in given:
        return "checkpoints" if (folder / "checkpoints").exists() else None
    if args[0] == "test":
        results = json.loads(Path(place).read_text())
        return "no nll" if given.get("model.nll_samples") == "2" and "test/nll" not in results else None
    if not checkpoint.is_file():
        without_a_step = "max_epochs=0" in err or "Time limit reached. Elapsed time is 0:00:00" in err
        without_a_step |= "0" in (given.get("trainer.limit_train_batches"), given.get("trainer.max_steps"))
        return None if without_a_step else "no checkpoint"
    saved = torch.load(checkpoint, weights_only=True)
    for name, value in given.items():
        if name.startswith("model.") and saved["hyper_parameters"][name[6:]] not in (read_yaml(value), tuple(_list(read_yaml(value)))):
            return f"{name} {value} is {saved['hyper_parameters'][name[6:]]!r} in the checkpoint"
    rate = saved["optimizer_states"][0]["param_groups"][0]["lr"]
    if "model.lr" in given and "trainer.callbacks" not in given and rate != float(given["model.lr"]):
        return f"lr {rate}"
    if given.get("trainer.precision") in ("64-true", "bf16-true") and saved["state_dict"]["vae.encoder.1.weight"].dtype not in (
        torch.float64,
        torch.bfloat16,
    ):
        return "precision"
    if given.get("trainer.logger") == "false" and (folder / "metrics.csv").exists():
        return "logger"
    if given.get("trainer.enable_progress_bar") == "false" and "Epoch 1" in err:
        return "progress bar"
    if given.get("trainer.profiler") in ("simple", "advanced", "pytorch") and "Profile" not in out + err and "profile" not in out + err:
        return "profiler"
    return None


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def main(how_many: int = 200, seed: int = 0) -> int:
    rng = random.Random(seed)
    counts = {"well": 0, "a sentence": 0, "faults": 0}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(folder)
        np.save("odd.npy", np.zeros((9, 5, 5), dtype=np.uint8))
        call(["fit", *flags(SMALL)])
        for k in range(how_many):
            args = draw(rng)
            code, out, err = call(args)
            wrong = fault(args, code, out, err)
            counts["faults" if wrong else "a sentence" if code else "well"] += 1
            last = next((line for line in reversed(err.splitlines()) if line.strip()), "") if code or wrong else ""
            sys.stdout.write(
                f"{k:3} {'FAULT ' + wrong if wrong else 'error' if code else 'well'}: fastvae {shlex.join(args)}\n      {last[:300]}\n"
                if wrong or os.environ.get("ALL")
                else ""
            )
            if wrong:
                sys.stdout.write("".join(f"      | {line[:200]}\n" for line in (out + err).splitlines()[-8:]))
            sys.stdout.flush()
    sys.stdout.write(f"{counts}\n")
    return bool(counts["faults"])


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
