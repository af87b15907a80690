"""Callbacks: stop at the first non-finite number; draw what was learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

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
        raise NonFiniteError(
            f"{what} must be finite, got a non-finite one at step {trainer.global_step} "
            f"(epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx}), "
            f"first seen in {first}; the last good checkpoint is {path or 'not yet written'}"
        )


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
        x = prepared(shown.images, data.preparation).to(pl_module.device)
        vae = pl_module.vae.eval()
        output = vae(x, prepared=True)
        generator = torch.Generator(x.device).manual_seed(data.seed)
        if x.ndim == 4:
            pictures.reconstructions(x[:32], vae.reconstruct(x[:32]).reshape(x[:32].shape), folder / "reconstructions.png")
            samples = vae.sample(100, generator=generator).reshape(-1, *x.shape[1:])
            pictures.grid(samples, folder / "samples.png", "Samples: decoded draws from the prior N(0, I)")
        else:
            pictures.table_reconstructions(x, vae.reconstruct(x), folder / "reconstructions.png")
        pictures.latent(output.z, shown.labels, folder / "latent.png", classes=data.classes)
        pictures.loss_curves(self.history, folder / "loss_curves.png")
