"""Pictures of a trained VAE, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import IdentityTransform
from torch import Tensor
from torch.nn import functional as F

from fastvae.training.data import NO_LABEL
from fastvae.training.metrics import WIDE

DPI = 120
# The longer side of each image in pixels: smaller images are enlarged by a whole factor, larger ones are averaged.
SMALLEST, LARGEST = 64, 256
# The longer side of a picture, roughly. Matplotlib draws up to 65,535 pixels.
MOST_PIXELS = 32_000
GAP, GAP_OF_PAIRS, MARGIN = 5, 16, 10
# The most classes in a legend, and the most whose names are written among the points.
MOST_IN_LEGEND, MOST_NAMED = 20, 100


def grid(
    images: Tensor,
    file: Path,
    title: str,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """Draws images (N, C, H, W) in [0, 1] row by row, as a square or in this number of columns."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    _save(sheet(images, columns), file, title, row_labels, column_labels)


def reconstructions(x: Tensor, x_hat: Tensor, file: Path, *, columns: int = 8, images: str = "Held-out images") -> None:
    """Draws each original with its reconstruction to the right, in this number of columns of pairs."""
    _save(sheet(pairs(x, x_hat), 2 * min(columns, len(x)), paired=True), file, f"{images}, the reconstruction to the right of each")


def pairs(x: Tensor, x_hat: Tensor) -> Tensor:
    return torch.stack([x, x_hat], dim=1).flatten(0, 1)


def table_reconstructions(x: Tensor, x_hat: Tensor, file: Path) -> None:
    """Draws the values of a table (N, F) against their reconstructions, and the explained variance of each column."""
    x, x_hat = x.double().cpu(), x_hat.double().cpu()
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    values, columns = figure.subplots(1, 2)
    points = torch.linspace(0, x.numel() - 1, min(x.numel(), 5000)).long()
    values.scatter(x.flatten()[points].numpy(), x_hat.flatten()[points].numpy(), s=6, alpha=0.5)
    values.axline((0, 0), slope=1, color="black", linewidth=0.8)
    values.set(title="Values and their reconstructions", xlabel="value", ylabel="reconstruction")
    variance = x.var(0, correction=0)
    share = 1 - (x - x_hat).square().mean(0) / torch.where(variance > 0, variance, torch.nan)
    order = share.nan_to_num(-torch.inf).argsort(descending=True)
    columns.stairs(share[order].clamp_min(-0.1).numpy(), np.arange(len(order) + 1) + 0.5, fill=True)
    columns.set(title="Variance explained, 1 − MSE/variance", xlabel="column, the best first", ylim=(-0.1, 1.02))
    columns.axhline(0, color="black", linewidth=0.8)
    columns.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file, dpi=120)


def latent(z: Tensor, labels: Tensor, file: Path, *, classes: Sequence[str] = ()) -> None:
    """Draws codes (N, D) on their first two principal axes, coloured by class, and the density of each coordinate; the prior in black."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    plane, line = figure.subplots(1, 2)
    latent_plane(plane, z, labels, classes)
    values = z.double().cpu().numpy()
    limit = max(4.0, float(np.quantile(np.abs(values), 0.995)))
    bins = np.linspace(-limit, limit, 41)
    for d in range(min(values.shape[1], 64)):
        counts, _ = np.histogram(values[:, d], bins=bins)
        line.plot((bins[:-1] + bins[1:]) / 2, counts / (len(values) * (bins[1] - bins[0])), linewidth=0.8, alpha=0.6)
    at = np.linspace(-limit, limit, 401)
    line.plot(at, np.exp(-0.5 * at**2) / math.sqrt(2 * math.pi), color="black", linewidth=1.5, label="N(0, 1)")
    line.set(title="Density of each coordinate of the codes", xlabel="z")
    line.legend(**_BESIDE)
    figure.savefig(file, dpi=DPI)


def latent_plane(axes: Axes, z: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> None:
    points = _principal(z.double().cpu()).numpy()
    found, rank = np.unique(labels.cpu().numpy(), return_inverse=True)
    names = ["none" if label == NO_LABEL else classes[label] if classes else str(label) for label in found]
    in_legend = len(found) <= MOST_IN_LEGEND
    palette = matplotlib.colormaps["tab10" if len(found) <= 10 else "tab20" if in_legend else "turbo"]
    colours = palette(np.arange(len(found)) if in_legend else np.linspace(0, 1, len(found)))
    axes.scatter(points[:, 0], points[:, 1], s=6, alpha=0.7, color=colours[rank], linewidths=0)
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius in (1, 2, 3):
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="black", linewidth=0.8, linestyle=":" if radius > 1 else "-")
    limit = max(3.2, float(np.quantile(np.abs(points), 0.995)))
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title="Codes on two principal axes; N(0, I) at 1, 2, 3σ")
    if (found == NO_LABEL).all():
        return
    if in_legend:
        handles = [axes.scatter([], [], s=24, color=[colour], label=name) for name, colour in zip(names, colours, strict=True)]
        axes.legend(handles=handles, **_BESIDE)
        return
    if len(found) <= MOST_NAMED:
        for k, name in enumerate(names):
            at = np.clip(points[rank == k].mean(0), -0.97 * limit, 0.97 * limit)
            box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": colours[k], "linewidth": 0.5, "alpha": 0.8}
            axes.text(at[0], at[1], name, fontsize=5, ha="center", va="center", bbox=box)
    bar = axes.figure.colorbar(matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(found) - 1), palette), ax=axes)
    ticks = np.linspace(0, len(found) - 1, 6).round().astype(int)
    bar.set_ticks(ticks, labels=[names[k] for k in ticks])
    bar.set_label(f"label, {len(found)} of them")


def loss_curves(history: Sequence[dict[str, float]], file: Path) -> None:
    """Draws each term of the loss over the epochs, for training and validation."""
    titles = {"loss": "Loss", "reconstruction": "−log p(x|z), nats", "kl": "KL, nats", "mmd": "MMD²"}
    terms = [term for term in titles if any(f"{stage}/{term}" in row for row in history for stage in ("train", "val"))]
    if not terms:
        return
    figure = Figure(figsize=(3.2 * len(terms) + 1.2, 3.2), layout="constrained")
    lines = {}
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        for stage, name, colour in (("train", "training", "C0"), ("val", "validation", "C1")):
            points = [(row["epoch"], row[f"{stage}/{term}"]) for row in history if f"{stage}/{term}" in row]
            if points:
                lines[name] = axes.plot(*zip(*points, strict=True), color=colour, marker=marker(len(points)))[0]
        axes.set(xlabel="epoch", title=titles[term])
        whole_numbers(axes)
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=DPI)


def marker(points: int) -> str | None:
    """A marker for the points of a short line: a line with a single point would be invisible without."""
    return "." if points <= 12 else None


def whole_numbers(axes: Axes) -> None:
    """Puts ticks at whole numbers, also if there are only one or two."""
    low, high = axes.dataLim.intervalx
    if math.isfinite(low) and high - low < 1:
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def sheet(images: Tensor, columns: int, *, paired: bool = False) -> np.ndarray[Any, Any]:
    """Images (N, C, H, W) in [0, 1], row by row, as one array of bytes (height, width, 3) in which all pixels have the same size."""
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    images = images.detach().float().cpu().clamp(0, 1)
    images = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    longer, largest = max(height, width), max(1, min(LARGEST, MOST_PIXELS // max(rows, columns) - GAP))
    if longer > largest:
        size = [max(1, round(side * largest / longer)) for side in (height, width)]
        images = torch.nn.functional.interpolate(images, size, mode="area")
    factor = max(1, min(SMALLEST, largest) // longer)
    images = (255 * images).round().to(torch.uint8).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = images.shape[2:]
    # Grey gaps separate the images.
    left = [column * (width + GAP) + (column // 2 * (GAP_OF_PAIRS - GAP) if paired else 0) for column in range(columns)]
    drawn = np.full((rows * (height + GAP) - GAP, left[-1] + width, 3), 128, dtype=np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top = i // columns * (height + GAP)
        drawn[top : top + height, left[i % columns] : left[i % columns] + width] = image
    drawn[(rows - 1) * (height + GAP) :, left[(n - 1) % columns] + width :] = 255
    return drawn


def show(axes: Axes, drawn: np.ndarray[Any, Any], title: str) -> None:
    """Shows a sheet as one of several axes of a figure."""
    axes.imshow(drawn, interpolation="antialiased")
    axes.set_title(title)
    axes.axis("off")


def _save(drawn: np.ndarray[Any, Any], file: Path, title: str, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()) -> None:
    """Saves a sheet pixel by pixel, with room for its title and labels."""
    figure = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def write(text: str, size: float, **options: Any) -> tuple[Any, int, int]:
        written = figure.text(0, 0, text, fontsize=size, transform=IdentityTransform(), va="center", **options)
        box = written.get_window_extent(renderer)
        return written, math.ceil(box.width), math.ceil(box.height)

    heading = write(title, 11)
    rows, columns = [write(text, 8, ha="right") for text in row_labels], [write(text, 8, ha="center") for text in column_labels]
    height, width = drawn.shape[:2]
    left = MARGIN + max((w + MARGIN for _, w, _ in rows), default=0)
    above = max((h + MARGIN for _, _, h in columns), default=0)
    top = MARGIN + height + above + MARGIN + heading[2] + MARGIN
    figure.set_size_inches((max(left + width, MARGIN + heading[1]) + MARGIN) / DPI, top / DPI)
    heading[0].set_position((MARGIN, top - MARGIN - heading[2] / 2))
    for i, (text, _, _) in enumerate(rows):
        text.set_position((left - MARGIN / 2, MARGIN + height * (1 - (i + 0.5) / len(rows))))
    for i, (text, _, h) in enumerate(columns):
        text.set_position((left + width * (i + 0.5) / len(columns), MARGIN + height + MARGIN / 2 + h / 2))
    figure.figimage(drawn, left, MARGIN)
    figure.savefig(file, dpi=DPI)


# Legends go beside the axes, where they hide no points.
_BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, "fontsize": 8, "frameon": False}


def _principal(z: Tensor) -> Tensor:
    """z on the first two principal axes of z − mean, (N, 2); the second is 0 if D is 1."""
    if z.shape[1] == 1:
        return torch.cat([z, torch.zeros_like(z)], dim=1)
    centred = z - z.mean(0)
    if z.shape[1] > WIDE and len(z) > 1:
        # Of wide codes an SVD takes many seconds.
        _, axes = torch.linalg.eigh(centred @ centred.T)
        axes = F.normalize(centred.T @ axes[:, [-1, -2]], dim=0)
        return z @ axes
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return z @ axes[:2].T if len(axes) > 1 else z[:, :2]
