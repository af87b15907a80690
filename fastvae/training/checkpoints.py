"""Checkpoints that make a resumed run equal to an uninterrupted one: random states, the position in the data, complete files."""

from __future__ import annotations

import glob
import math
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, RandomSampler

from fastvae.distributed import is_initialized


class RandomState(Callback):
    """Saves and restores the random states of Python, numpy and torch.

    Validation and measurements at the end of an epoch draw random numbers too; the states are restored after them, so that they do not
    change the training. An epoch that `max_steps` or `max_time` ends before its last batch is saved as unfinished.
    """

    def __init__(self, *, restore: bool = True) -> None:
        self._restore = restore
        self._loaded: dict[str, Any] | None = None
        self._after_step: dict[str, Any] | None = None
        self._measuring = False
        self.started = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = False

    def state_dict(self) -> dict[str, Any]:
        """The random states of all processes at the start of the next step, also while they are not yet, or not again, the current ones."""
        own = self._loaded or (self._after_step if self._measuring else None) or random_state()
        if not is_initialized():
            return own
        states: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(states, own)
        return {**states[0], "others": states[1:]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank = dist.get_rank() if is_initialized() else 0
        others = state_dict.pop("others", [])
        self._loaded = dict(enumerate([state_dict, *others])).get(rank) if self._restore else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts a stopped epoch as finished, and would start the next one.
        epoch, batches = checkpoint["loops"]["fit_loop"]["epoch_progress"], trainer.fit_loop.epoch_loop.batch_progress
        if batches.current.ready and not batches.is_last_batch and epoch["total"]["processed"] == epoch["total"]["started"]:
            for count in epoch.values():
                count["processed"] -= 1
                count["completed"] = min(count["completed"], count["processed"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # With max_steps, Lightning resumes within an epoch even if it was saved at its end: it would skip the number of the next epoch, on
        # which the order of the data depends.
        if "loops" not in checkpoint or trainer.max_steps == -1:
            return
        fit_loop = checkpoint["loops"]["fit_loop"]
        epoch, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
        if batches["is_last_batch"] and epoch["total"]["processed"] == epoch["total"]["started"]:
            for count in epoch.values():
                count["completed"] = count["processed"]
            batches["is_last_batch"] = False
            # Lightning adds one to the step of the logger.
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
            for progress in (batches, fit_loop["epoch_loop.val_loop.batch_progress"]):
                progress["current"] = dict.fromkeys(progress["current"], 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not earlier, as Lightning may draw random numbers before the first step.
        if self.started:
            return
        self.started = True
        if self._loaded is not None:
            set_random_state(self._loaded)
        elif trainer.global_rank > 0:
            # All processes start with the same seed, but their noise must differ.
            torch.manual_seed(epoch_seed(torch.initial_seed(), trainer.global_step, stream=1 + trainer.global_rank))
        self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Here and not at the start of a validation, before which its loader has drawn a seed.
        self._after_step = random_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring = False
        if self._after_step is not None:
            set_random_state(self._after_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_end(trainer, pl_module)


def random_state() -> dict[str, Any]:
    """The global random states, in types that `torch.load(weights_only=True)` can read."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    # A run may be resumed with fewer GPUs than before.
    for device in range(min(torch.cuda.device_count(), len(state["cuda"]))):
        torch.cuda.set_rng_state(state["cuda"][device].cpu(), device)


class GivenOptions(Callback):
    """Options that are given to a resumed run override those in the state of its checkpoint: learning rate, schedule, patience."""

    def __init__(self) -> None:
        self._before: list[dict[str, Any]] = []
        self._given: list[dict[str, Any]] = []
        self._other_schedule = False

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["optimizers"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        before, given = (options.get("lr_scheduler") for options in (checkpoint.get("hyper_parameters", {}), pl_module.hparams))
        self._other_schedule = bool(before and given and before != given)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patience = {early: early.patience for early in trainer.early_stopping_callbacks if early is not None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for early, patience in self._patience.items():
            early.patience = patience
        self._given = [dict(optimizer.defaults) for optimizer in trainer.optimizers]
        for optimizer, given, before in zip(trainer.optimizers, self._given, self._before, strict=False):
            changed = {name: value for name, value in given.items() if name not in before or value != before[name]}
            lr = before["lr"]
            ratios = []
            for group in optimizer.param_groups:
                # A schedule continues with the new rate, unless it set its own initial rate.
                follows_lr = lr and math.isclose(group.get("initial_lr", lr), lr)
                ratios.append(given["lr"] / lr if follows_lr else 1.0)
                rates = {name: group[name] * ratios[-1] for name in ("lr", "initial_lr") if name in group}
                group.update(changed | rates)
            for config in trainer.lr_scheduler_configs:
                if config.scheduler.optimizer is optimizer and hasattr(config.scheduler, "base_lrs"):
                    config.scheduler.base_lrs = [rate * ratio for rate, ratio in zip(config.scheduler.base_lrs, ratios, strict=True)]
        make: Any = pl_module.lr_scheduler if self._other_schedule else None
        if make is not None:
            for config in trainer.lr_scheduler_configs:
                config.scheduler = _replaced_scheduler(config.scheduler, make)


def _replaced_scheduler(scheduler: Any, make: Callable[[Any], Any]) -> Any:
    """The scheduler that `make` makes, advanced to the step of `scheduler`."""
    optimizer = scheduler.optimizer
    if isinstance(scheduler, ReduceLROnPlateau):
        made = make(optimizer)
        state = ("best", "num_bad_epochs") if made.mode == scheduler.mode else ()
        for name in (*state, "cooldown_counter", "last_epoch", "_last_lr"):
            setattr(made, name, getattr(scheduler, name))
        return made
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
        group.update(optimizer.defaults)
    made = make(optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the checkpoint's optimizer has taken the steps
        for _ in range(scheduler.last_epoch):
            made.step()
    return made


class Checkpoints(ModelCheckpoint):
    """Also saves on SIGTERM, which Lightning raises between two steps. Other exceptions may come in the middle of one."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and self.save_on_exception and trainer.state.fn == TrainerFn.FITTING:
            super().on_exception(trainer, pl_module, exception)
            path = self.last_model_path or self.best_model_path
            stopped = str(exception) or f"stopped by SIGTERM at step {trainer.global_step}"
            exception.args = (f"{stopped}; to resume: fastvae fit --ckpt_path {path}",)


class BestCheckpoint(ModelCheckpoint):
    """Keeps best.ckpt, the checkpoint with the lowest validation loss of this run's epochs. Without validation there is none."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder, filename="best", monitor="val/loss", enable_version_counter=False, save_on_train_epoch_end=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder and renames it, so that no checkpoint is partial. Reads only tensors and plain values.

    Lightning writes to the system's temporary folder instead, from which a move to another disk is a copy, and not atomic.
    """

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def read_checkpoint(checkpoint: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint. Only tensors and plain values are read: loading other pickled objects may run code."""
    try:
        saved: object = torch.load(checkpoint, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        reason = str(error).replace("\n", " ").split(". ")[0]
        raise ValueError(f"ckpt_path must be a checkpoint of tensors and plain values, got {str(checkpoint)!r} ({reason})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise ValueError(f"ckpt_path must be a run's checkpoint, got a file without a state_dict, {str(checkpoint)!r}")
    return saved


def finished(saved: dict[str, Any], trainer: Any) -> str | None:
    """Why a run with these trainer options is finished at this checkpoint, and how to continue it; None if it is not finished."""
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    patience = [callback.init_args.patience for callback in callbacks if "EarlyStopping" in str(getattr(callback, "class_path", ""))]
    try:
        epochs, steps = saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], saved["global_step"]
        seconds = saved["callbacks"].get("Timer", {}).get("time_elapsed", {}).get("train", 0)
        early = [state for name, state in saved["callbacks"].items() if name.startswith("EarlyStopping")]
        stopped = bool(patience) and any(state["stopped_epoch"] and state["wait_count"] >= max(patience) for state in early)
    except (KeyError, TypeError, AttributeError):
        return None
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        return f"after {epochs} of {trainer.max_epochs} epochs; to continue: --trainer.max_epochs {epochs + max(epochs, 1)}"
    if 0 <= trainer.max_steps <= steps:
        return f"after {steps} of {trainer.max_steps} steps; to continue: --trainer.max_steps {steps + max(steps, 1)}, or -1"
    if trainer.max_time is not None and Timer(trainer.max_time).time_remaining() <= seconds:
        return f"after {seconds:.0f} s of trainer.max_time; to continue, pass a longer time, or null"
    return f"by EarlyStopping; to continue: --trainer.callbacks.patience {2 * max(patience) + 1}" if stopped else None


def is_whole(checkpoint: Path) -> bool:
    """Whether the file is a complete result of `torch.save`: nothing compressed, and all checksums right."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist()) and archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error):
        return False


def newest_first(*folders: Path) -> list[Path]:
    """The checkpoints in these folders that can be resumed, without links and best.ckpt."""
    found = [file for folder in folders for file in folder.glob("*.ckpt")]
    files = [file for file in found if file.is_file() and not file.is_symlink() and file.name != "best.ckpt"]
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def checkpoint_file(path: str, folder: Path) -> Path:
    """The complete checkpoint at this path. "last" is the newest one of the runs in `folder`, which may be a pattern, and "best" the best
    one of that run."""
    if path == "last":
        return last_checkpoint(folder)
    checkpoint = last_checkpoint(folder).with_name("best.ckpt") if path == "best" else Path(path)
    if path == "best" and not checkpoint.is_file():
        raise FileNotFoundError(
            f"ckpt_path must not be 'best' for a run without validation, got no best.ckpt in {str(checkpoint.parent)!r}"
        )
    if not is_whole(checkpoint):
        before = next((str(file) for file in newest_first(checkpoint.parent) if is_whole(file)), None)
        hint = f": use {before!r}, a complete one beside it" if before else ""
        raise ValueError(f"ckpt_path must be 'last', 'best' or the file of a complete checkpoint, got {path!r}{hint}")
    return checkpoint


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of all runs in `folder`, which may be a pattern. Incomplete ones are skipped with a warning."""
    files = newest_first(*map(Path, glob.glob(f"{folder}/version_*/checkpoints")))
    if not files:
        raise FileNotFoundError(f"ckpt_path must not be 'last' before a run has written a checkpoint, got none in {str(folder)!r}")
    for file in files:
        if is_whole(file):
            return file
        sys.stderr.write(f"warning: {str(file)!r} is not a complete checkpoint, using the one before it\n")
    raise ValueError(f"ckpt_path must be a complete checkpoint, got none among the {len(files)} files in {str(folder)!r}")


class EpochSampler(RandomSampler):
    """Shuffles each epoch by the seed and the epoch's number alone. The epoch counts up unless Lightning sets it."""

    def __init__(self, data: Any, seed: int) -> None:
        super().__init__(data, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(epoch_seed(self.seed, self.epoch))
        self.epoch += 1
        return super().__iter__()


def epoch_seed(seed: int, epoch: int, stream: int = 0) -> int:
    """A different seed for each seed, epoch and stream."""
    return int(np.random.SeedSequence((seed % 2**63, epoch, stream)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader whose state, which Lightning saves in its checkpoints, is the position in the epoch.

    A resumed epoch starts again and skips the batches that were seen. Its random draws therefore depend on the epoch's number alone, as
    with `EpochSampler` and the data set's `start_epoch(epoch)`, which is called before the first batch of each epoch.
    """

    _seen = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # The epoch is read at the first batch, as Lightning makes the iterator before it sets the sampler's epoch.
        skip, self._skip = self._skip, 0
        if hasattr(self.dataset, "start_epoch"):
            self.dataset.start_epoch(getattr(self.sampler, "epoch", 0))
        self._seen = 0
        for batch in super().__iter__():
            self._seen += 1
            if self._seen > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self._seen % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._skip = state_dict["seen"]
