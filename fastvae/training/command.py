"""The command line, based on LightningCLI: names and folders of runs, resuming, and error messages."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fastvae import checks
from fastvae.distributed import is_initialized
from fastvae.training.apply import encode, export, reconstruct, sample, traverse
from fastvae.training.callbacks import Interrupt, KnownMetrics, Pictures, Progress, StopAtNonFinite
from fastvae.training.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    Checkpoints,
    GivenOptions,
    RandomState,
    checkpoint_file,
    finished,
    read_checkpoint,
)
from fastvae.training.compare import compare
from fastvae.training.configs import check_config, restrict, with_packaged
from fastvae.training.data import ImageData, new_folder
from fastvae.training.module import ImageVAE
from fastvae.training.report import measured, report
from fastvae.version import __version__

# Warnings that are hidden: users can do nothing about them.
QUIET = (
    "The '.*_dataloader' does not have many workers",  # a batch is one indexing of a tensor in memory
    "The number of training batches .* is smaller than the logging interval",  # epoch means are logged anyway
    "The dirpath has changed from",  # a resumed run gets a new folder, so that the old one stays unchanged
    "You defined a `validation_step` but have no `val_dataloader`",  # --data.validation 0 asks for that
    r"It is recommended to use `self.log\('train/",  # the terms are those of the global batch on each process
    "GPU available but not used",  # Apple's; a message of our own says why
    "Total length of `list` across ranks is zero",  # --data.validation 0 on several processes
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # between Lightning and a newer torch
    r"(?s)\s*By default only one Jsonargparse|.*was deprecated in v4.*removed\s+in\s+v5",  # between Lightning and a newer jsonargparse
)
NEWEST_TWO: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": 2, "enable_version_counter": False}
# Options of the model that come from the data, and their names there.
LINKS = {"shape": "data.shape", "dataset_size": "data.train_size"}
# Lightning's options that are not supported: nothing is predicted, --runs gives the folder, and there is no model registry.
UNUSED = ("limit_predict_batches", "default_root_dir", "model_registry")
# Options of the model that only some of its objectives, likelihoods, architectures or schedules use.
MMD_OBJECTIVES = ("info_vae", "mmd_vae", "wae_mmd")
KL_OBJECTIVES = ("vae", "beta_vae", "info_vae", "capacity_vae", "dip_vae", "beta_tc_vae")
USED_BY: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("channels",): ("architecture", ("conv", "autoencoder_kl")),
    ("latent_dim", "hidden"): ("architecture", ("mlp", "conv")),
    ("latent_channels", "blocks"): ("architecture", ("autoencoder_kl",)),
    ("sigma", "learn_sigma", "optimal_sigma"): ("likelihood", ("gaussian", "auto")),
    ("scale",): ("likelihood", ("laplace",)),
    ("beta",): ("objective", ("beta_vae", "beta_tc_vae")),
    ("alpha",): ("objective", ("info_vae",)),
    ("lambda_", "bandwidth", "estimator", "mmd_rows", "mmd_schedule"): ("objective", MMD_OBJECTIVES),
    ("kernel",): ("objective", ("wae_mmd",)),
    ("tc_estimator",): ("objective", ("beta_tc_vae",)),
    ("free_bits", "free_bits_group"): ("objective", ("vae", "beta_vae")),
    ("gamma", "capacity", "capacity_schedule", "capacity_schedule_steps"): ("objective", ("capacity_vae",)),
    ("lambda_od", "lambda_d", "dip_kind"): ("objective", ("dip_vae",)),
    ("samples", "bound_gradient"): ("objective", ("iwae",)),
    ("kl_schedule",): ("objective", KL_OBJECTIVES),
    ("kl_schedule_steps",): ("kl_schedule", ("linear", "cosine", "cyclical")),
    ("kl_schedule_cycles",): ("kl_schedule", ("cyclical",)),
    ("mmd_schedule_steps",): ("mmd_schedule", ("linear", "cosine", "cyclical")),
}
# Options that an optimizer stores in its state, so that they cannot change later.
FIXED_OPTIONS = {
    **dict.fromkeys([f"torch.optim.{name}" for name in ("Adam", "AdamW", "NAdam", "RAdam")], ("amsgrad",)),
    "torch.optim.Adagrad": ("initial_accumulator_value",),
    "torch.optim.RMSprop": ("centered", "momentum"),
    "torch.optim.Rprop": ("lr",),
}
REPORTED_HELP = "Folders of runs, at most five. A folder with several versions of a run stands for the newest one."
CKPT_PATH_HELP = {
    "fit": "Resume from this checkpoint: a file, last (the newest of all runs) or best. Other flags override the options of that run.",
    "test": "A checkpoint: a file, last (the newest of all runs, the default) or best.",
}
KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "Sequence": "a list", "NoneType": "null"}
# The commands that are functions.
COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (compare, report, sample, reconstruct, encode, traverse, export)
}
ERRORS = (ValueError, OSError, FloatingPointError, MisconfigurationException)


class Parser(LightningArgumentParser):
    """Reports errors in one sentence, and lists `COMMANDS` besides Lightning's subcommands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {plain(message)} (see --help)\n")
        sys.exit(2)

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        action = super().add_subcommands(*args, **kwargs)
        for name in COMMANDS:
            parser = command_parser(name)
            action.add_subcommand(name, parser, help=parser.description)
        return action


class RunTrainer(Trainer):
    """Lightning's Trainer. It writes to the run's folder, wherever its loggers write."""

    @property
    def log_dir(self) -> str | None:
        folder: str | None = self.strategy.broadcast(None if self.fast_dev_run else self.default_root_dir)  # type: ignore[attr-defined]
        return folder


class NothingToDo(Exception):
    """The run to resume is already finished."""


class CommandLine(LightningCLI):
    """`fit` and `test` of `ImageVAE` on `ImageData`."""

    saving: Checkpoints | None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # Checkpoints are always read with weights_only.
        return {name: {*skip, "weights_only"} for name, skip in LightningCLI.subcommands().items() if name in ("fit", "test")}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--runs", type=str, default="runs", help="The folder of all runs.")
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run's files go to RUNS/NAME/version_K, where K is the next free number. By default the objective's name.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=0,
            help="The number of training steps between two checkpoints, in addition to one an epoch. The last two of each kind are kept.",
        )
        super().add_default_arguments_to_parser(parser)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ImageData, "data")
        parser.add_lightning_class_args(ImageVAE, "model")
        parser.add_class_arguments(RunTrainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=set(UNUSED))
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        for name, shown in LINKS.items():
            parser.link_arguments(shown, f"model.{name}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest in ("model.encoder", "model.decoder"):
                # The default help would list hundreds of PyTorch's modules.
                action.extra_help = str  # type: ignore[attr-defined]
            if action.dest == "ckpt_path":
                action.help = CKPT_PATH_HELP[subcommand]
        # Our options come before Lightning's.
        parser._action_groups = sorted(parser._action_groups, key=lambda group: (group.title or "").startswith(("Lightning's", "Linked")))
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        given = args
        before = self._checkpoint(parser, args)
        self.seeded = False
        if before is not None:
            # The checkpoint's model options and its run's configuration are defaults, which the given arguments override.
            command, checkpoint = before
            saved = read_checkpoint(checkpoint)
            self._subcommand_parsers[command].set_defaults(_model_defaults(saved, checkpoint))
            own_config = checkpoint.parent.parent / "config.yaml"
            own = ["--config", str(own_config)] if own_config.is_file() else []
            self.seeded = any(arg.partition("=")[0] == "--seed_everything" for arg in args)
            at = args.index(command) + 1
            args = [*args[:at], *own, *args[at:]]
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        if before is not None:
            config.ckpt_path = str(checkpoint.resolve())
            if command == "fit" and (why := finished(saved, config.trainer)):
                raise NothingToDo(f"nothing to do: {checkpoint} finished {why}")
        config.name = config.name or config.model.objective
        if config.data.path and Path(config.data.path).exists():
            config.data.path = str(Path(config.data.path).resolve())  # so that its checkpoint finds it from any folder
        checks.integer("checkpoint_every", config.checkpoint_every, at_least=0)
        if config.checkpoint_every and not _saves(config.trainer):
            raise ValueError(f"checkpoint_every must be 0 if checkpoints are disabled, got {config.checkpoint_every}")
        _check_devices(config.trainer)
        flags, configurations = _given(given, self.config.subcommand)
        _check_used(config.model, flags, configurations)
        if before is not None:
            _check_unchanged(config.model, saved.get("hyper_parameters", {}), flags, fits=command == "fit")
        if config.trainer.check_val_every_n_epoch is not None:
            checks.integer("trainer.check_val_every_n_epoch", config.trainer.check_val_every_n_epoch, at_least=1)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's method would replace the given options by those of the checkpoint."""

    def _checkpoint(self, parser: LightningArgumentParser, args: list[str]) -> tuple[str, Path] | None:
        """The subcommand and the checkpoint that it resumes or measures; None without a checkpoint."""
        # Parsed in advance, as the checkpoint decides the defaults of the main parser.
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("-c", "--config", action="append", default=[])
        for name in ("ckpt_path", "runs", "name"):
            first.add_argument(f"--{name}")
        try:
            given, others = first.parse_known_args(args)
            configurations = [check_config(file) for file in given.config]
        except (argparse.ArgumentError, ValueError, OSError) as error:
            parser.error(str(error))
        chosen: dict[str, Any] = {"runs": "runs"}
        command = others[0] if others else ""
        for options in (*(_of_command(options, command) for options in configurations), vars(given)):
            chosen |= {name: value for name, value in options.items() if value is not None}
        path = chosen.get("ckpt_path") or ("last" if command == "test" else None)
        if command not in ("fit", "test") or path is None or {"-h", "--help"}.intersection(others):
            return None
        return command, checkpoint_file(str(path), Path(str(chosen["runs"]), str(chosen.get("name", "*"))))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self._get(self.config_init, "trainer")
        fits = self.subcommand == "fit"
        if not options.fast_dev_run:
            prefix = "version" if fits else "test"
            parent = Path(self._get(self.config, "runs"), self._get(self.config, "name"))
            # Only the first process creates the folder.
            folder = new_folder(parent, prefix) if getattr(rank_zero_only, "rank", 0) == 0 else parent / prefix
            kwargs["default_root_dir"] = str(folder)
            if options.logger in (None, True) and not options.barebones:
                place = (folder.parent.parent, folder.parent.name, folder.name)
                csv = CSVLogger(*place)
                _ = csv.experiment  # opened while its folder is empty: it would warn about deleting files otherwise
                kwargs["logger"] = [csv, TensorBoardLogger(*place, default_hp_metric=False)] if fits else [csv]
        if options.accelerator == "auto" and torch.backends.mps.is_available():
            sys.stderr.write(
                "training on the CPU, as MPS has no float64, which the losses need: --trainer.accelerator mps runs the networks on MPS\n"
            )
            kwargs["accelerator"] = "cpu"
        callbacks = [*_listed(options.callbacks), StopAtNonFinite(), Pictures(), KnownMetrics(), GivenOptions()]
        self.random_state, self.saving = RandomState(restore=not self.seeded), None
        callbacks += [self.random_state, Interrupt()]
        given_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if options.enable_progress_bar is not False and not options.barebones and not given_bar:
            callbacks.append(Progress())
        if _saves(options):
            saved = None if options.fast_dev_run else folder / "checkpoints"
            every = self._get(self.config, "checkpoint_every")
            self.saving = Checkpoints(saved, save_last="link", save_on_train_epoch_end=True, save_on_exception=True, **NEWEST_TWO)
            callbacks += [self.saving, BestCheckpoint(saved)]
            if every:
                callbacks.append(Checkpoints(saved, filename="{step}", every_n_train_steps=every, **NEWEST_TWO))
        plugins = [*_listed(options.plugins), AtomicCheckpointIO()]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing here: `start` runs the subcommand, so that `run` can tell errors in parsing from later ones."""

    def start(self) -> None:
        super()._run_subcommand(str(self.subcommand))

    def before_fit(self) -> None:
        """Checks that the unbiased MMD has at least two samples in a batch, or one of several locations."""
        objective = self.model.objective
        sizes = {"data.batch_size": self.datamodule.batch_size, "data.train_size": self.datamodule.train_size}
        located = objective.mmd_rows == "location" and len(self.model.vae.latent_shape) > 1
        if objective.mmd_weight and objective.estimator == "unbiased" and self.trainer.world_size == 1 and not located:
            for name, size in sizes.items():
                if size < 2:
                    raise ValueError(f"{name} must be at least 2 for the unbiased MMD, got {size}: or use --model.estimator biased")

    def after_fit(self) -> None:
        folder, last = self.trainer.log_dir, self.saving.last_model_path if self.saving else ""
        if folder and self.trainer.is_global_zero:
            saved = "Pictures, logs and checkpoints" if last else "Pictures and logs"
            sys.stdout.write(f"\n{saved}: {Path(folder).resolve()}\n")
            if last:
                sys.stdout.write(f"Measure its codes: fastvae test --ckpt_path {last}\n")

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        results = next(iter(self.trainer.test(verbose=False, **kwargs)), None)
        if results is None:
            raise ValueError("trainer.limit_test_batches must leave at least one batch, got none")
        folder = self.trainer.log_dir
        if self.trainer.is_global_zero:
            if verbose:
                standardised = self.model.vae.preparation is not None
                sys.stdout.write(f"{measured(results, standardised=standardised)}\n")
            if folder:
                file = Path(folder, "test.json")
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                sys.stdout.write(f"\nAll numbers: {file.resolve()}\n")


def run(args: list[str]) -> int:
    """Runs `fastvae` with `args` and returns its exit status. A wrong argument, file or number gives one sentence on stderr."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in ("Tip", "SIGTERMException was raised"))
    )
    # Not an option of the main parser, where a configuration could set it.
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--trust", action="append", default=[])
    grouped = is_initialized()
    command: CommandLine | None = None
    try:
        trusted, args = named.parse_known_args(args)
        restrict(trusted.trust)
        if args[:1] and args[0] in COMMANDS:
            COMMANDS[args[0]](**command_parser(args[0]).parse_args(args[1:]).as_dict())
        else:
            command = CommandLine(
                ImageVAE,
                ImageData,
                parser_class=Parser,
                trainer_class=RunTrainer,
                parser_kwargs={
                    "prog": "fastvae",
                    "version": __version__,
                    "description": "Train and measure variational autoencoders on images and tables. A configuration may name classes of "
                    "fastvae, Lightning and PyTorch; --trust PACKAGE lets it name those of PACKAGE.",
                },
                seed_everything_default=0,
                auto_configure_optimizers=False,
                args=with_packaged(args),
                trainer_defaults={"max_epochs": 60, "num_sanity_val_steps": 0},
            )
            command.start()
    except NothingToDo as end:
        sys.stdout.write(f"{end}\n")
    except SIGTERMException as end:
        sys.stderr.write(f"{str(end) or 'stopped by SIGTERM'}\n")
        return 130 if "Ctrl-C" in str(end) else 0
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        return 130
    except Exception as error:
        among_processes = isinstance(error, RuntimeError) and torch.distributed.is_available()
        # Gloo's errors have no class of their own.
        if among_processes and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            sentence = "all processes of the run must be alive, got no answer from another one: to resume, fastvae fit --ckpt_path last"
            sys.stderr.write(f"error: {sentence} ({' '.join(str(error).split())})\n")
        elif isinstance(error, ERRORS) or _by_arguments(error, command):
            sys.stderr.write(f"error: {plain(str(error)) or type(error).__name__}\n")
        else:
            raise
        return 1
    finally:
        # A Gloo worker that still holds the last collective when the interpreter exits aborts the process. Lightning only shuts down NCCL.
        if not grouped and is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
            # The caches of a compiled step may still hold the group: its workers need the interpreter to release the last collective.
            time.sleep(0.1)
    return 0


def command_parser(name: str) -> jsonargparse.ArgumentParser:
    function = COMMANDS[name]
    parser = jsonargparse.ArgumentParser(prog=f"fastvae {name}", allow_abbrev=False, description=(function.__doc__ or "").split("\n\n")[0])
    parser.error = Parser.error.__get__(parser)  # type: ignore[method-assign]
    if function is report:
        parser.add_argument("runs", type=str, nargs="+", help=REPORTED_HELP)
    parser.add_function_arguments(function, skip={"runs"} if function is report else None)
    return parser


def _by_arguments(error: Exception, command: CommandLine | None) -> bool:
    """Whether another package raised the error because of the arguments: Lightning at any time, others before the first step."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    trains = command is not None and command.random_state.started
    by_lightning = package in ("lightning", "jsonargparse")
    return not isinstance(error, Warning) and (by_lightning or (package != "fastvae" and not trains))


def _listed(value: Any) -> list[Any]:
    """The value as a list: one or several may be given."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _saves(trainer: jsonargparse.Namespace) -> bool:
    return trainer.enable_checkpointing is not False and not trainer.barebones


def _model_defaults(saved: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    options = saved.get("hyper_parameters", {})
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"ckpt_path must be a checkpoint of this model, got other options in {str(checkpoint)!r}")
    return {f"model.{name}": value for name, value in options.items() if not name.startswith("_") and name not in LINKS}


def _of_command(options: dict[str, Any], command: str) -> dict[str, Any]:
    """The options of a configuration. One that is given before the command holds them under the command's name."""
    inner = options.get(command)
    return options | inner if isinstance(inner, dict) else options


def _given(args: list[str], command: str) -> tuple[set[str], list[dict[str, Any]]]:
    """The names of the model's options that are given as flags, and the model's options in each configuration."""
    flags: set[str] = set()
    configurations = []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = arg.partition("=")
        value = value if equals else following
        if name.startswith("--model."):
            flags.add(name.split(".")[1].removesuffix("+"))
        elif name == "--model" and value.lstrip().startswith("{"):
            flags |= check_config(value).keys()
        elif name == "--model":
            configurations.append(check_config(value))
        elif name in ("--config", "-c"):
            options = _of_command(check_config(value), command)
            dotted = {key.removeprefix("model."): option for key, option in options.items() if str(key).startswith("model.")}
            configurations.append(options.get("model", {}) | dotted)
    return flags, configurations


def _check_used(model: jsonargparse.Namespace, flags: set[str], configurations: list[dict[str, Any]]) -> None:
    """Checks that no option of the model is given that has no effect.

    A configuration may hold defaults, and the options of its own objective, architecture, … even if a flag chooses another one.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(ImageVAE).parameters.items()}
    # YAML has lists where the defaults are tuples.
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    for names, (chooser, choices) in USED_BY.items():
        given = flags.intersection(names)
        for options in configurations:
            if options.get(chooser) not in choices:
                given |= {name for name in options.keys() & set(names) if options[name] != defaults[name]}
        for name in sorted(given):
            if model[chooser] not in choices:
                raise ValueError(f"model.{chooser} must be {' or '.join(choices)} for model.{name}, got {model[chooser]}")
    interval = "lr_scheduler_interval" in flags or model.lr_scheduler_interval != defaults["lr_scheduler_interval"]
    if interval and model.lr_scheduler is None:
        raise ValueError("model.lr_scheduler must be given for model.lr_scheduler_interval, got none")


def _check_unchanged(model: jsonargparse.Namespace, before: dict[str, Any], flags: set[str], *, fits: bool) -> None:
    """Checks that no option changes that is part of the checkpoint's state: a trained sigma, and the state of the optimizer."""
    found = next((name for name in ("learn_sigma", "optimal_sigma") if before.get(name)), None)
    if found and ("sigma" in flags or model.sigma != before.get("sigma", model.sigma)):
        raise ValueError(f"model.sigma must not be given with ckpt_path if model.{found} is true, as it comes from the checkpoint")
    if not fits:
        return
    for name, default in {"optimizer": "torch.optim.Adam", "lr_scheduler": "null"}.items():
        (is_, options), (was, options_before) = (_class_and_options(chosen, default) for chosen in (model[name], before.get(name)))
        if name in before and is_ != was:
            raise ValueError(f"model.{name} must be {was}, as in ckpt_path, whose state it continues, got {is_}")
        for fixed in FIXED_OPTIONS.get(is_, ()):
            values = [model.lr, before.get("lr")] if fixed == "lr" else [chosen.get(fixed) or 0 for chosen in (options, options_before)]
            if name in before and values[0] != values[1]:
                option, got, must = "lr" if fixed == "lr" else f"{name}.{fixed}", values[0], type(values[0])(values[1])
                sentence = f"must be {must}, as in ckpt_path, got {got}: the state of {is_} depends on it"
                raise ValueError(f"model.{option} {sentence.replace('True', 'true').replace('False', 'false')}")


def _class_and_options(chosen: Any, default: str) -> tuple[str, dict[str, Any]]:
    chosen = chosen.as_dict() if isinstance(chosen, jsonargparse.Namespace) else chosen
    return (chosen.get("class_path", default), chosen.get("init_args") or {}) if isinstance(chosen, dict) else (default, {})


def _check_devices(trainer: jsonargparse.Namespace) -> None:
    """Checks the number of devices and nodes. On a CPU each device is a process with its own copy of data and network."""
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    most = max(os.cpu_count() or 1, 2)
    if on_cpu and str(trainer.devices).isdigit() and int(trainer.devices) > most:
        raise ValueError(f"trainer.devices must be at most {most} on this CPU, as each is a process, got {trainer.devices}")
    # Without a launcher, Lightning would wait for the other nodes for ever.
    if str(trainer.num_nodes) not in ("0", "1") and not {"MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID"}.intersection(os.environ):
        raise ValueError(f"trainer.num_nodes must be 1 unless a launcher sets MASTER_ADDR, got {trainer.num_nodes}")


def plain(message: str) -> str:
    """jsonargparse's message on one line, without the names of Python types."""
    if denied := re.search(r"Importing '(.*?)' is not allowed", message):
        return f"a configuration may name classes of fastvae, Lightning and PyTorch, got {denied[1]}: --trust PACKAGE allows a package's"
    message = " ".join(message.split())
    if unknown := re.search(r'Parser key "(.*?)": - Expected a path but (\S+) either .*Callable', message):
        like = "torch.optim.AdamW" if unknown[1].endswith("optimizer") else "torch.optim.lr_scheduler.ReduceLROnPlateau"
        return f"{unknown[1]} must be the full path of a class, such as {like}, got {unknown[2]}"
    if failed := re.search(
        r"(?:Parser key \"(.*?)\": )?.*Problem with given class_path '(.*?)': (.*?)(?: - Expected a| Given value|$)", message
    ):
        return f"{failed[1] + ': ' if failed[1] else ''}{failed[2].rpartition('.')[2]} cannot be made, {failed[3]}"
    message = re.sub(r"(?:an? )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(r"(?:an? )?<class '(?:\w+\.)*(\w+)'>", lambda found: KINDS.get(found[1], found[1]), message)
    message = re.sub(
        r"Does not validate against .* Subtypes: \[(.*?)\] Errors:.* Given value: ", r"Expected one of \1. Got value: ", message
    )
    message = re.sub(r"one of (?=one of )|(?<=, )one of ", "", message)
    return re.sub(r'Parser key "(.*?)": Expected (.*?)\. Got value: (.*)', r"\1 must be \2, got \3", message)
