"""Callbacks that stop at a non-finite number, at Ctrl-C or at an unknown metric, show progress, and draw pictures."""

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
from fastvae.training.data import ImageData, chunks, prepared
from fastvae.training.module import VAEModule


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is nan or infinite."""


class StopAtNonFinite(Callback):
    """Raises `NonFiniteError` before a non-finite loss or gradient reaches the weights, so that the last checkpoint is a good one."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            observed = dict(pl_module.observed) if isinstance(pl_module, VAEModule) else {}
            x = {"x": observed.pop("x")} if observed else {}
            self._stop(trainer, "loss", {**x, **dict(pl_module.named_parameters()), **observed, "loss": loss})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if trainer.precision == "16-mixed":  # its loss scaler makes infinite gradients by design, and skips them
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
        # In a table, columns of different units are the usual reason.
        table = isinstance(data, ImageData) and len(data.shape) == 1 and not data.standardise
        raise NonFiniteError(
            f"{what} must be finite, got a non-finite one at step {trainer.global_step} "
            f"(epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx}), "
            f"first seen in {first}; the last good checkpoint is {path or 'not yet written'}"
            + ("; try --data.standardise true, which scales the columns of a table" if table else "")
        )


class Interrupt(Callback):
    """Lets the first Ctrl-C stop the run between two steps, as SIGTERM does, and a second one at once. Only for a single process."""

    def __init__(self) -> None:
        self._previous_handler: Any = None
        self._interrupted = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def stop(*_: object) -> None:
            self._interrupted = trainer._signal_connector.received_sigterm = True
            self._restore()

        # Python handles signals in its main thread only.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, stop)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        if self._interrupted and isinstance(exception, SIGTERMException):
            exception.args = (f"stopped by Ctrl-C at step {trainer.global_step}",)

    def _restore(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None


class KnownMetrics(Callback):
    """Raises an error before the first step if a callback or schedule monitors a metric that nothing logs."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        given = [callback for callback in callbacks if type(callback).__module__.split(".")[0] != "fastvae"]
        waiting = {type(callback).__name__: callback.monitor for callback in given if getattr(callback, "monitor", None)}
        waiting |= {type(config.scheduler).__name__: config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        waiting = {name: metric for name, metric in waiting.items() if str(metric).startswith(("train/", "val/")) or "/" not in str(metric)}
        # A callback from another package may log its own metrics.
        known_callbacks = all(type(callback).__module__.split(".")[0] == "lightning" for callback in given)
        if not (waiting and known_callbacks and isinstance(data, ImageData) and isinstance(pl_module, VAEModule)):
            return
        x = trainer.precision_plugin.convert_input(torch.rand(8, *data.shape, device=pl_module.device))
        with trainer.precision_plugin.forward_context():
            known = pl_module.metric_names(x)
        for name, metric in waiting.items():
            if metric.startswith("val/") and not sum(trainer.num_val_batches):
                raise ValueError(f"monitor of {name} must be a training metric in a run without validation, got {metric!r}")
            if metric not in known | set(trainer.callback_metrics) and not metric.startswith("lr-") and metric not in ("step", "epoch"):
                raise ValueError(f"monitor of {name} must be one of {', '.join(sorted(known))}, got {metric!r}")


SHOWN = {"train/loss": "loss", "train/reconstruction": "rec", "train/kl": "kl", "train/mmd": "mmd", "val/loss": "val"}


class Progress(ProgressBar):
    """Shows one progress bar for each epoch if stderr or stdout is a terminal, else writes one line for each epoch to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
        self._bar: tqdm[Any] | None = None
        self._last_update = 0.0

    def disable(self) -> None:
        """Called in all processes but the first."""
        self._stream = None
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(self._title(), self.total_train_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is None and self._stream is not None:
            self._begin(self._title(), self.total_train_batches)  # a resumed epoch
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
        """The metrics, those of the training as means over the epoch so far, in as many digits as fit the terminal."""
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
            self._bar = tqdm(desc=title, total=total, file=self._stream, bar_format=form, dynamic_ncols=True, postfix=("",))

    def _step(self, done: int) -> None:
        if self._bar is not None:
            # Updated no more often than the bar is drawn, as reading the numbers waits for the device.
            now = time.monotonic()
            if now > self._last_update + self._bar.mininterval:
                self._last_update = now
                self._bar.postfix = (self._numbers(),)
            self._bar.update(done - self._bar.n)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Pictures(Callback):
    """Writes latent.png, loss_curves.png, reconstructions.png and, for images, samples.png to the run's folder after the fit."""

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
        # A resumed epoch replaces the part of it that was recorded before.
        self.history = [row for row in self.history if row["epoch"] != trainer.current_epoch]
        self.history.append({"epoch": trainer.current_epoch, **metrics})

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        log_dir = trainer.log_dir  # a collective call: every process needs to make it
        if not (trainer.is_global_zero and log_dir and isinstance(data, ImageData) and isinstance(pl_module, VAEModule)):
            return
        folder = Path(log_dir)
        split = data.splits["val"] if len(data.splits["val"].images) else data.splits["test"]
        shown = split._replace(images=split.images[:2000], labels=split.labels[:2000])
        vae = pl_module.vae.eval()
        x = prepared(shown.images, data.preparation).to(vae.origin)
        outputs = [vae(part, prepared=True) for part in chunks(x)]
        generator = torch.Generator(x.device).manual_seed(data.seed)
        if x.ndim == 4:
            pictures.reconstructions(x[:32], vae.reconstruct(x[:32]).reshape(x[:32].shape), folder / "reconstructions.png")
            samples = vae.sample(100, generator=generator).reshape(-1, *x.shape[1:])
            pictures.grid(samples, folder / "samples.png", "Samples: decoded draws from the prior N(0, I)")
        else:
            # Standardised, as columns of different units share one axis.
            mu = torch.cat([output.mu for output in outputs])
            pictures.table_reconstructions(x, vae.likelihood.mean(vae.decode(mu)), folder / "reconstructions.png")
        z = torch.cat([output.z.flatten(1) for output in outputs])
        pictures.latent(z, shown.labels, folder / "latent.png", classes=data.classes)
        pictures.loss_curves(self.history, folder / "loss_curves.png")
