"""PNG pictures of a trained VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.training.data import NO_LABEL


def grid(images: Tensor, file: Path, title: str, *, columns: int | None = None) -> None:
    """Images (N, C, H, W) in [0, 1], row by row, as a square or with the number of columns given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows + 0.4), layout="constrained")
    show(figure.add_subplot(), images, columns, title)
    figure.savefig(file, dpi=120)


def reconstructions(x: Tensor, x_hat: Tensor, file: Path, *, columns: int = 8) -> None:
    """Originals on the left, their reconstructions on the right."""
    rows = math.ceil(len(x) / columns)
    figure = Figure(figsize=(1.2 * columns + 0.4, 0.6 * rows + 0.5), layout="constrained")
    for axes, images, title in zip(figure.subplots(1, 2), (x, x_hat), ("Held-out images", "Reconstructions"), strict=True):
        show(axes, images, columns, title)
    figure.savefig(file, dpi=120)


def latent(z: Tensor, labels: Tensor, file: Path) -> None:
    """Codes (N, D) on their first two principal axes, by label, beside each coordinate's density; the prior N(0, I) in black."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    plane, line = figure.subplots(1, 2)
    latent_plane(plane, z, labels)
    _marginals(line, z)
    figure.savefig(file, dpi=120)


def latent_plane(axes: Axes, z: Tensor, labels: Tensor) -> None:
    points, y = _principal(z.double().cpu()).numpy(), labels.cpu().numpy()
    for label in np.unique(y):
        chosen = points[y == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=6, alpha=0.7, color=f"C{label % 10}", label=None if label == NO_LABEL else str(label))
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius in (1, 2, 3):
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="black", linewidth=0.8, linestyle=":" if radius > 1 else "-")
    reach = max(3.2, float(np.quantile(np.abs(points), 0.995)))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title="Codes on two principal axes; N(0, I) at 1, 2, 3σ")
    if (y != NO_LABEL).any():
        axes.legend(loc="upper right", fontsize=7, markerscale=2)


def loss_curves(history: Sequence[dict[str, float]], file: Path) -> None:
    """Each term of the loss over the epochs, training and validation."""
    terms = [
        term for term in ("loss", "reconstruction", "kl", "mmd") if any(f"train/{term}" in row or f"val/{term}" in row for row in history)
    ]
    figure = Figure(figsize=(3.4 * max(len(terms), 1), 3.2), layout="constrained")
    for axes, term in zip(np.atleast_1d(figure.subplots(1, max(len(terms), 1))), terms, strict=False):
        for stage in ("train", "val"):
            points = [(row["epoch"], row[f"{stage}/{term}"]) for row in history if f"{stage}/{term}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=stage, marker="." if len(points) == 1 else None)
        axes.set(xlabel="epoch", title="MMD²" if term == "mmd" else f"{term} (nats)")
        axes.legend()
    figure.savefig(file, dpi=120)


def show(axes: Axes, images: Tensor, columns: int, title: str) -> None:
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    # One pixel of grey between the images, so that each is seen as one.
    sheet = torch.full((rows * (height + 1), columns * (width + 1), 3), 0.5)
    for i, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image[: 3 if channels >= 3 else 1].permute(1, 2, 0)
    axes.imshow(sheet[:-1, :-1].numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def _marginals(axes: Axes, z: Tensor) -> None:
    values = z.double().cpu().numpy()
    bins = np.linspace(-4, 4, 41)
    for d in range(min(values.shape[1], 64)):
        density, _ = np.histogram(values[:, d], bins=bins, density=True)
        axes.plot((bins[:-1] + bins[1:]) / 2, density, linewidth=0.8, alpha=0.6)
    grid_points = np.linspace(-4, 4, 200)
    axes.plot(grid_points, np.exp(-0.5 * grid_points**2) / math.sqrt(2 * math.pi), color="black", linewidth=1.5, label="N(0, 1)")
    axes.set(title="Density of each coordinate of the codes", xlabel="z")
    axes.legend()


def _principal(z: Tensor) -> Tensor:
    """z − mean on its first two principal axes (N, 2), the mean's part along them kept; zeros where D is 1."""
    if z.shape[1] == 1:
        return torch.cat([z, torch.zeros_like(z)], dim=1)
    _, _, axes = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    return z @ axes[:2].T if len(axes) > 1 else z[:, :2]
