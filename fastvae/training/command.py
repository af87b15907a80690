"""The command line on LightningCLI: what a run is called, where it goes, and how an error reads."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fastvae import checks
from fastvae.distributed import is_initialized
from fastvae.training.apply import encode, export, reconstruct, sample, traverse
from fastvae.training.callbacks import Pictures, StopAtNonFinite
from fastvae.training.checkpoints import AtomicCheckpointIO, BestCheckpoint, Checkpoints, RandomState, checkpoint_file, read_checkpoint
from fastvae.training.compare import compare
from fastvae.training.configs import restrict
from fastvae.training.data import ImageData, new_folder
from fastvae.training.module import ImageVAE
from fastvae.training.report import report

# Each is true of our runs, and none asks the user for anything.
QUIET = (
    "The '.*_dataloader' does not have many workers",  # a batch is one indexing of a tensor in memory
    "The number of training batches .* is smaller than the logging interval",  # epoch means are logged all the same
    "The dirpath has changed from",  # a resumed run has a folder of its own, so that the old one stays as it was
    "You defined a `validation_step` but have no `val_dataloader`",  # --data.validation 0 asks for that
    r"It is recommended to use `self.log\('train/",  # the terms are those of the global batch on each process
    "GPU available but not used",  # Apple's, and why is said
    "Total length of `list` across ranks is zero",  # the same
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # between Lightning and a newer torch
    r"(?s)\s*By default only one Jsonargparse|.*was deprecated in v4.*removed\s+in\s+v5",  # the same with jsonargparse
)
NEWEST_TWO: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": 2, "enable_version_counter": False}
KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "Sequence": "a list", "NoneType": "null"}
# Each command that is a function, and its positional argument if it has one.
COMMANDS: dict[str, tuple[Callable[..., None], str | None]] = {
    "compare": (compare, None),
    "report": (report, "runs"),
    "sample": (sample, None),
    "reconstruct": (reconstruct, None),
    "encode": (encode, None),
    "traverse": (traverse, None),
    "export": (export, None),
}
HELP = {"runs": "Folders of runs, or of several versions of one, of which the newest is taken."}
ERRORS = (ValueError, OSError, FloatingPointError, MisconfigurationException)


class Parser(LightningArgumentParser):
    """Says an error in one sentence, and lists `COMMANDS` beside Lightning's own subcommands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {plain(message)} (see --help)\n")
        sys.exit(2)

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        action = super().add_subcommands(*args, **kwargs)
        for name in COMMANDS:
            action.add_subcommand(name, command_parser(name), help=command_parser(name).description)
        return action


class ProgressBar(TQDMProgressBar):
    """One bar an epoch; into a file or a pipe, where a bar cannot be redrawn, only its ends."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10 if sys.stderr.isatty() else 10**9)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()  # so that the error begins a line

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


class CommandLine(LightningCLI):
    """`fit` and `test` of `ImageVAE` on `ImageData`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--runs", type=str, default="runs", help="The folder of all runs.")
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run's files go to RUNS/NAME/version_K, K the next free number. The objective's name by default.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=0,
            help="Training steps between two checkpoints, beside that of each epoch. The last two of each kind are kept.",
        )
        for action in parser._actions:
            if action.dest in ("model.encoder", "model.decoder"):
                # The hundreds of modules of PyTorch are none of the user's own.
                action.extra_help = str  # type: ignore[attr-defined]
        parser.link_arguments("data.shape", "model.shape", apply_on="instantiate")
        parser.link_arguments("data.train_size", "model.dataset_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        checkpoint = self._checkpoint(config)
        if checkpoint is not None:
            # A run's own configuration is the default of what continues or measures it; what is given here goes before it.
            own_config = checkpoint.parent.parent / "config.yaml"
            if not config.config and own_config.is_file():
                at = args.index(self.config.subcommand) + 1
                self.config = parser.parse_args([*args[:at], "--config", str(own_config), *args[at:]])
                config = self.config[self.config.subcommand]
            config.ckpt_path = str(checkpoint)
        config.name = config.name or config.model.objective
        checks.integer("checkpoint_every", config.checkpoint_every, at_least=0)

    def _checkpoint(self, config: jsonargparse.Namespace) -> Path | None:
        path = config.ckpt_path or ("last" if self.config.subcommand == "test" else None)
        if path is None:
            return None
        checkpoint = checkpoint_file(path, Path(config.runs, config.name or "*"))
        read_checkpoint(checkpoint)
        return checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self._get(self.config_init, "trainer").logger in (None, True):
            prefix = "version" if self.subcommand == "fit" else "test"
            parent = Path(self._get(self.config, "runs"), self._get(self.config, "name"))
            # Of several processes the first one writes.
            folder = new_folder(parent, prefix) if getattr(rank_zero_only, "rank", 0) == 0 else parent / prefix
            place = (folder.parent.parent, folder.parent.name, folder.name)
            csv = CSVLogger(*place)
            _ = csv.experiment  # takes its folder while it is empty: found with files in it, it would warn that it may delete them
            kwargs["logger"] = [csv, TensorBoardLogger(*place, default_hp_metric=False)] if self.subcommand == "fit" else [csv]
        if self._get(self.config_init, "trainer").accelerator == "auto" and torch.backends.mps.is_available():
            sys.stderr.write(
                "on the CPU, as MPS has no float64, which the losses need: --trainer.accelerator mps trains the networks there\n"
            )
            kwargs["accelerator"] = "cpu"
        callbacks = self._get(self.config_init, "trainer").callbacks or []
        bar = [ProgressBar()] if self._get(self.config, "trainer").enable_progress_bar is not False else []
        every = self._get(self.config, "checkpoint_every")
        if every:
            callbacks = [*callbacks, Checkpoints(filename="{step}", every_n_train_steps=every, **NEWEST_TWO)]
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        return super().instantiate_trainer(callbacks=[*callbacks, RandomState(), *bar], plugins=[*plugins, AtomicCheckpointIO()], **kwargs)

    def after_fit(self) -> None:
        folder, last = self.trainer.log_dir, getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        if folder and last and self.trainer.is_global_zero:
            sys.stdout.write(
                f"\nPictures, logs and checkpoints: {Path(folder).resolve()}\nMeasure its codes: fastvae test --ckpt_path {last}\n"
            )


def run(args: list[str]) -> int:
    """The exit status of `fastvae` with `args`; a wrong argument, file or number is one sentence on stderr."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in ("Tip", "SIGTERMException was raised"))
    )
    # Not an option of the parser, which a configuration could set.
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--trust", action="append", default=[])
    grouped = is_initialized()
    try:
        trusted, args = named.parse_known_args(args)
        restrict(trusted.trust)
        if args[:1] and args[0] in COMMANDS:
            COMMANDS[args[0]][0](**command_parser(args[0]).parse_args(args[1:]).as_dict())
        else:
            CommandLine(
                ImageVAE,
                ImageData,
                parser_class=Parser,
                parser_kwargs={
                    "description": "Train and measure variational autoencoders on images. A configuration may name classes of fastvae, "
                    "Lightning and PyTorch; --trust PACKAGE lets it name those of PACKAGE."
                },
                seed_everything_default=0,
                auto_configure_optimizers=False,
                args=args,
                trainer_defaults={
                    "max_epochs": 60,
                    "num_sanity_val_steps": 0,
                    "callbacks": [
                        Checkpoints(save_last="link", save_on_train_epoch_end=True, save_on_exception=True, **NEWEST_TWO),
                        BestCheckpoint(),
                        StopAtNonFinite(),
                        Pictures(),
                    ],
                },
            )
    except SIGTERMException as end:
        sys.stderr.write(f"{str(end) or 'stopped by SIGTERM'}\n")
    except ERRORS as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except RuntimeError as error:
        # Gloo has no class of errors of its own.
        if not (torch.distributed.is_available() and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))):
            raise
        sentence = "the processes of the run must all be there, got no answer from another one: to go on, fastvae fit --ckpt_path last"
        sys.stderr.write(f"error: {sentence} ({' '.join(str(error).split())})\n")
        return 1
    finally:
        # A worker of Gloo that still holds the last collective while the interpreter ends aborts the process; Lightning only ends NCCL's.
        if not grouped and is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
            # A compiled step's caches hold the group still: here its workers have the interpreter to let go of the last collective.
            time.sleep(0.1)
    return 0


def command_parser(name: str) -> jsonargparse.ArgumentParser:
    function, positional = COMMANDS[name]
    parser = jsonargparse.ArgumentParser(prog=f"fastvae {name}", allow_abbrev=False, description=(function.__doc__ or "").split("\n\n")[0])
    parser.error = Parser.error.__get__(parser)  # type: ignore[method-assign]
    if positional:
        parser.add_argument(positional, type=str, nargs="+", help=HELP[positional])
    parser.add_function_arguments(function, skip={positional} if positional else None)
    return parser


def plain(message: str) -> str:
    """jsonargparse's message on one line, without Python's names of types."""
    if denied := re.search(r"Importing '(.*?)' is not allowed", message):
        return f"a configuration may name classes of fastvae, Lightning and PyTorch, got {denied[1]}: --trust PACKAGE allows a package's"
    message = re.sub(r"(?:an? )?typing\.Literal\[(.*?)\]", r"one of \1", " ".join(message.split()))
    message = re.sub(r"(?:an? )?<class '(?:\w+\.)*(\w+)'>", lambda found: KINDS.get(found[1], found[1]), message)
    message = re.sub(
        r"Does not validate against .* Subtypes: \[(.*?)\] Errors:.* Given value: ", r"Expected one of \1. Got value: ", message
    )
    return re.sub(r'Parser key "(.*?)": Expected (.*?)\. Got value: (.*)', r"\1 must be \2, got \3", message)
