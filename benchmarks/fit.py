"""The time of a training step in `fastvae fit`, in Lightning's Trainer without it, and in plain loops: python -m benchmarks.training --fit

All use the command's model, objective, DataLoader and images, 784 pixels of noise in memory. The exception is pythae, a peer, with a VAE of
the same widths. Adam is PyTorch's default, but `fastvae fit` uses the fused one on a CPU, so one plain loop has that too. A step is timed
from the end of an epoch's first step to the end of its last one; the first epoch is left out. `epoch_ms` is per step too, but up to the end
of the next epoch's first step, so that it includes the checkpoints and metrics of the epoch's end.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.machine import version
from benchmarks.measure import Time, in_turn, summary
from fastvae.training.command import run
from fastvae.training.data import ImageData
from fastvae.training.module import ImageVAE

BATCH, STEPS, EPOCHS = 128, 100, 6
OBJECTIVES = ("vae", "mmd_vae")


class Stopwatch(Callback):
    """Reads both clocks at the end of each step. `marks` belongs to the class, as the command makes its own instance."""

    marks: list[Time] = []  # noqa: RUF012

    def on_train_batch_end(self, *_: object) -> None:
        Stopwatch.marks.append(Time(time.perf_counter(), time.process_time()))


def data(folder: Path) -> ImageData:
    return ImageData(path=str(folder), batch_size=BATCH, validation=0)


def model(objective: str) -> ImageVAE:
    return ImageVAE([1, 28, 28], latent_dim=20, objective=objective)  # type: ignore[arg-type]


class MinimalModule(LightningModule):
    """The least that Lightning trains."""

    def __init__(self, objective: str) -> None:
        super().__init__()
        built = model(objective)
        self.vae, self.objective = built.vae, built.objective

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.objective(self.vae(batch[0]), batch[0]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def plain_loop(model: nn.Module, loss: Callable[[Tensor], Tensor], folder: Path, fused: bool | None = None) -> None:
    images, stopwatch = data(folder), Stopwatch()
    images.setup()
    loader = images.train_dataloader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    for _ in range(EPOCHS):
        for x, _ in loader:
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
            stopwatch.on_train_batch_end()


def plain(objective: str, folder: Path, fused: bool | None = None) -> None:
    built = model(objective)
    plain_loop(built, lambda x: built.objective(built.vae(x), x).loss, folder, fused)


def lightning(objective: str, folder: Path) -> None:
    quiet: dict[str, bool] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[Stopwatch()], **quiet).fit(MinimalModule(objective), data(folder))  # type: ignore[arg-type]


def fit(objective: str, folder: Path) -> None:
    options = {"path": str(folder), "batch_size": str(BATCH), "validation": "0"}
    arguments = [f"--data.{name}={value}" for name, value in options.items()]
    arguments += [f"--model.objective={objective}", "--model.latent_dim=20", f"--runs={folder.parent / 'runs'}"]
    arguments += [f"--trainer.max_epochs={EPOCHS}", "--trainer.accelerator=cpu", "--trainer.callbacks+=benchmarks.fit.Stopwatch"]
    status = run(["--trust=benchmarks", "fit", *arguments])
    assert status == 0


def pythae(objective: str, folder: Path) -> None:
    from pythae.models import INFOVAE_MMD, VAE, INFOVAE_MMD_Config, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.layers(x).chunk(2, dim=1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z))

    sizes: dict[str, Any] = {"input_dim": (1, 28, 28), "latent_dim": 20, "reconstruction_loss": "bce"}
    weights: dict[str, Any] = {"kernel_choice": "rbf", "alpha": 1.0, "lbd": 1000.0}
    built = (
        VAE(VAEConfig(**sizes), encoder=Encoder(), decoder=Decoder())
        if objective == "vae"
        else INFOVAE_MMD(INFOVAE_MMD_Config(**sizes, **weights), encoder=Encoder(), decoder=Decoder())
    )
    plain_loop(built, lambda x: built({"data": x}).loss, folder)


VARIANTS: dict[str, Callable[[str, Path], None]] = {
    "plain loop": plain,
    "plain loop, fused Adam": functools.partial(plain, fused=True),
    "Lightning alone": lightning,
    "fastvae fit": fit,
    "pythae, plain loop": pythae,
}


def epochs(variant: Callable[[str, Path], None], objective: str) -> tuple[list[Time], list[Time]]:
    """The time of a step in each epoch but the first, and in each of these but the last the time of a step with the epoch's end."""
    Stopwatch.marks.clear()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name) / "images"
        folder.mkdir()
        images = np.random.default_rng(0).integers(0, 256, (STEPS * BATCH, 28, 28), dtype=np.uint8)
        np.save(folder / "train.npy", images)
        np.save(folder / "test.npy", images[:BATCH])
        variant(objective, folder)
    marks = Stopwatch.marks
    assert len(marks) == EPOCHS * STEPS

    def between(first: int, last: int) -> Time:
        n = last - first
        return Time((marks[last].wall - marks[first].wall) / n, (marks[last].processor - marks[first].processor) / n)

    starts = range(STEPS, EPOCHS * STEPS, STEPS)
    return [between(start, start + STEPS - 1) for start in starts], [between(start, start + STEPS) for start in starts[:-1]]


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of all variants, which train in turn until `seconds` are spent; three times at least."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    present = {name: variant for name, variant in VARIANTS.items() if variant is not pythae or version("pythae") != "not installed"}
    cases = [(objective, name) for objective in OBJECTIVES for name in present]
    steps: dict[tuple[str, str], list[Time]] = {case: [] for case in cases}
    with_end: dict[tuple[str, str], list[Time]] = {case: [] for case in cases}
    for case in in_turn(cases, sys.maxsize, seconds):
        for times, more in zip((steps[case], with_end[case]), epochs(present[case[1]], case[0]), strict=True):
            times += more
    for objective in OBJECTIVES:
        base = summary(steps[objective, "plain loop"], "cpu")["processor_ms"]
        for name in VARIANTS:
            row: dict[str, Any] = {"benchmark": "training", "batch": BATCH, "provider": f"{name}, {objective}"}
            if name not in present:
                yield row | {"status": "not installed"}
                continue
            found = summary(steps[objective, name], "cpu")
            epoch = statistics.median(1e3 * t.processor for t in with_end[objective, name])
            yield row | found | {"epoch_ms": round(epoch, 4), "over_plain": round(found["processor_ms"] / base, 3)}
