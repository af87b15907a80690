"""Callbacks: stop at the first non-finite number, at Ctrl-C and at a metric that nothing logs; tell and draw what was learned."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from fastvae.training import pictures
from fastvae.training.data import ImageData, prepared
from fastvae.training.module import VAEModule


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is nan or infinite."""


class StopAtNonFinite(Callback):
    """Raises `NonFiniteError` before a non-finite loss or gradient reaches the weights: the last checkpoint written is a good one."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            observed = dict(pl_module.observed) if isinstance(pl_module, VAEModule) else {}
            x = {"x": observed.pop("x")} if observed else {}
            self._stop(trainer, "loss", {**x, **dict(pl_module.named_parameters()), **observed, "loss": loss})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if trainer.precision == "16-mixed":  # its loss scaler makes infinite gradients, and skips them, by design
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if not math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
            named = {f"the gradient of {name}": p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            self._stop(trainer, "gradient", named)

    def _stop(self, trainer: Trainer, what: str, named: dict[str, Tensor]) -> None:
        first = next((name for name, tensor in named.items() if not torch.isfinite(tensor.detach()).all()), f"the norm of the {what}")
        checkpoint = trainer.checkpoint_callback
        path = (checkpoint.last_model_path or checkpoint.best_model_path) if isinstance(checkpoint, ModelCheckpoint) else ""
        data = getattr(trainer, "datamodule", None)
        # Columns of unlike units are the usual reason.
        table = isinstance(data, ImageData) and len(data.shape) == 1 and not data.standardise
        raise NonFiniteError(
            f"{what} must be finite, got a non-finite one at step {trainer.global_step} "
            f"(epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx}), "
            f"first seen in {first}; the last good checkpoint is {path or 'not yet written'}"
            + ("; --data.standardise true scales the columns of a table" if table else "")
        )


class Interrupt(Callback):
    """Ctrl-C stops between two steps, as SIGTERM does; a second one at once. Several processes are left to Lightning."""

    def __init__(self) -> None:
        self._before: Any = None
        self._came = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def stop(*_: object) -> None:
            self._came = trainer._signal_connector.received_sigterm = True
            self._restore()

        # Python hears of signals in its first thread alone.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, stop)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        if self._came and isinstance(exception, SIGTERMException):
            exception.args = (f"stopped by Ctrl-C at step {trainer.global_step}",)

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


class KnownMetrics(Callback):
    """Refuses a callback that waits for a metric of the run that nothing logs, before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        given = [callback for callback in callbacks if type(callback).__module__.split(".")[0] != "fastvae"]
        waiting = {type(callback).__name__: callback.monitor for callback in given if getattr(callback, "monitor", None)}
        waiting |= {type(config.scheduler).__name__: config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        waiting = {name: metric for name, metric in waiting.items() if str(metric).startswith(("train/", "val/")) or "/" not in str(metric)}
        # A callback from elsewhere may log metrics of its own.
        known_callbacks = all(type(callback).__module__.split(".")[0] == "lightning" for callback in given)
        if not (waiting and known_callbacks and isinstance(data, ImageData) and isinstance(pl_module, VAEModule)):
            return
        x = trainer.precision_plugin.convert_input(torch.rand(8, *data.shape, device=pl_module.device))
        with trainer.precision_plugin.forward_context():
            known = pl_module.metric_names(x)
        for name, metric in waiting.items():
            if metric.startswith("val/") and not sum(trainer.num_val_batches):
                raise ValueError(f"{name}'s monitor must be a metric of the training where there is no validation, got {metric!r}")
            if metric not in known | set(trainer.callback_metrics) and not metric.startswith("lr-") and metric not in ("step", "epoch"):
                raise ValueError(f"{name}'s monitor must be one of {', '.join(sorted(known))}, got {metric!r}")


SHOWN = {"train/loss": "loss", "train/reconstruction": "rec", "train/kl": "kl", "train/mmd": "mmd", "val/loss": "val"}


class Progress(ProgressBar):
    """One bar an epoch, within the terminal's width, on the stream that is one; where none is, a line an epoch on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
        self._bar: tqdm[Any] | None = None
        self._told = 0.0

    def disable(self) -> None:
        """Of the processes but the first one."""
        self._stream = None
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(self._title(), self.total_train_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is None and self._stream is not None:
            self._begin(self._title(), self.total_train_batches)  # an epoch that is gone on with
        self._step(batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.postfix = (self._numbers(),)
        elif self.enabled:
            sys.stderr.write(f"{self._title()}  {self._numbers()}\n")
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("Test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step(batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()  # so that the error begins a line

    def _title(self) -> str:
        last = self.trainer.max_epochs
        return f"Epoch {self.trainer.current_epoch + 1}{f'/{last}' if last and last > 0 else ''}"

    def _numbers(self) -> str:
        """Of the training their means over the epoch as far as it is."""
        results, shown = self.trainer._results, {}
        for name, short in SHOWN.items():
            running = results.get(f"training_step.{name}") if results else None
            if running is not None and running.cumulated_batch_size:
                shown[short] = float(running.value / running.cumulated_batch_size)
            elif name in self.trainer.callback_metrics:
                shown[short] = float(self.trainer.callback_metrics[name])
        room = shutil.get_terminal_size().columns - len(self._title()) - 14
        texts = [" ".join(f"{name} {value:#.{digits}g}" for name, value in shown.items()) for digits in (4, 3, 2)]
        return next((text for text in texts if len(text) <= room), texts[-1])

    def _begin(self, title: str, total: float) -> None:
        self._end()
        if self._stream is not None:
            form = "{desc} |{bar}| {remaining} {postfix[0]}"
            self._bar = tqdm(
                *(None, title, total if math.isfinite(total) else None),
                **{"file": self._stream, "bar_format": form, "dynamic_ncols": True, "postfix": ("",)},
            )

    def _step(self, done: int) -> None:
        if self._bar is not None:
            # As seldom as it is drawn, as the numbers have to be fetched from the device.
            now = time.monotonic()
            if now > self._told + self._bar.mininterval:
                self._told = now
                self._bar.postfix = (self._numbers(),)
            self._bar.update(done - self._bar.n)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Pictures(Callback):
    """Writes latent.png, loss_curves.png, reconstructions.png and, of images, samples.png into the run's folder after the fit."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {
            name.removesuffix("_epoch"): float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")
        }
        # An epoch that was stopped and gone on with is told of once.
        self.history = [row for row in self.history if row["epoch"] != trainer.current_epoch]
        self.history.append({"epoch": trainer.current_epoch, **metrics})

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        log_dir = trainer.log_dir  # asked for by every process, as the first one tells the others
        if not (trainer.is_global_zero and log_dir and isinstance(data, ImageData) and isinstance(pl_module, VAEModule)):
            return
        folder = Path(log_dir)
        split = data.splits["val"] if len(data.splits["val"].images) else data.splits["test"]
        shown = split._replace(images=split.images[:2000], labels=split.labels[:2000])
        vae = pl_module.vae.eval()
        x = prepared(shown.images, data.preparation).to(vae.origin)
        output = vae(x, prepared=True)
        generator = torch.Generator(x.device).manual_seed(data.seed)
        if x.ndim == 4:
            pictures.reconstructions(x[:32], vae.reconstruct(x[:32]).reshape(x[:32].shape), folder / "reconstructions.png")
            samples = vae.sample(100, generator=generator).reshape(-1, *x.shape[1:])
            pictures.grid(samples, folder / "samples.png", "Samples: decoded draws from the prior N(0, I)")
        else:
            # As the network has them, where columns of different units share an axis.
            pictures.table_reconstructions(x, vae.likelihood.mean(vae.decode(output.mu)), folder / "reconstructions.png")
        pictures.latent(output.z, shown.labels, folder / "latent.png", classes=data.classes)
        pictures.loss_curves(self.history, folder / "loss_curves.png")
