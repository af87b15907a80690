"""A one-page report on a run, or on several side by side, from their logs: report.html, which is self-contained, and report.png."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fastvae.training.configs import read_yaml
from fastvae.training.pictures import marker, whole_numbers

# Row by row.
PICTURES = (("reconstructions.png",), ("samples.png", "latent.png"))
TABLE = {
    "negative_elbo": ("−ELBO", "nats", "{:.2f}"),
    "reconstruction": ("−log p(x|z)", "nats", "{:.2f}"),
    "kl": ("KL(q(z|x) ‖ p(z))", "nats", "{:.2f}"),
    "mutual_information": ("mutual information I(x; z)", "nats", "{:.2f}"),
    "active_units": ("active units", "", "{:.0f}"),
    "total_correlation": ("total correlation of q(z)", "nats", "{:.2f}"),
    "marginal_mmd": ("MMD² of q(z) to N(0, I)", "", "{:.2g}"),
    "mmd_standardised": ("that in standard deviations at N(0, I)", "", "{:.1f}"),
}
# The metrics that `fastvae test` prints, by group, and their titles.
TEST_GROUPS = {
    "Loss (nats)": {
        "loss": "loss",
        "negative_elbo": "−ELBO",
        "nll": "−log p(x), importance-weighted",
        "reconstruction": "−log p(x|z)",
        "kl": "KL(q(z|x) ‖ N(0, I))",
        "mmd": "MMD² to N(0, I), of batches",
        "total_correlation_term": "total correlation, of batches",
        "dip": "DIP",
    },
    "Codes": {
        "evaluation_size": "codes measured",
        "active_units": "active units",
        "collapsed_units": "collapsed units",
        "mutual_information": "mutual information I(x; z), nats",
        "total_correlation": "total correlation, nats",
        "logvar_min": "smallest log-variance",
        "logvar_max": "largest log-variance",
    },
    "q(z) beside N(0, I)": {
        "marginal_mean": "largest mean",
        "marginal_std_min": "smallest standard deviation",
        "marginal_std_max": "largest standard deviation",
        "marginal_correlation": "largest correlation",
        "marginal_mmd": "MMD²",
        "mmd_within": "MMD²: within the codes",
        "mmd_cross": "MMD²: between codes and prior",
        "mmd_prior": "MMD²: within the prior",
        "mmd_standardised": "MMD² in standard deviations at N(0, I)",
    },
}
COUNTS = ("evaluation_size", "active_units", "collapsed_units")
COLOURS = ("#1f5fa8", "#d1622b", "#3c8d5a", "#8a4fa0", "#6b6b6b")
MOST_RUNS = len(COLOURS)
DPI = 110


@dataclass
class Run:
    """The log of one run: for each metric its (epoch, value) or (step, value) pairs in order."""

    name: str
    folder: Path
    epochs: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    steps: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def curve(self, metric: str) -> tuple[str, list[tuple[float, float]]]:
        """The stage and the points of a metric: of the validation if it has them, else of the training."""
        return next(
            ((stage, self.epochs[f"{stage}/{metric}"]) for stage in ("val", "train") if self.epochs.get(f"{stage}/{metric}")), ("", [])
        )

    def last(self, metric: str) -> float:
        points = self.curve(metric)[1]
        return points[-1][1] if points else math.nan

    def dimensions(self, metric: str) -> list[float]:
        """The last value for each latent dimension, largest first."""
        stage = self.curve(f"{metric}_000")[0]
        names = sorted(name for name in self.epochs if name.startswith(f"{stage}/{metric}_") and name[-3:].isdigit())
        return sorted((self.epochs[name][-1][1] for name in names), reverse=True)


def report(runs: list[str], output: str | None = None) -> None:
    """Report on runs side by side, from their logs, on one page: report.html and report.png.

    Args:
        runs: Folders of runs, at most five. A folder with several versions of a run stands for the newest one.
        output: The folder for the two files; the first run's by default.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"runs must name one to {MOST_RUNS} folders, got {len(runs)}")
    loaded = _named([read_run(run_folder(run)) for run in runs])
    folder = Path(output) if output else loaded[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    figures = [("What the codes keep", overview(loaded)), ("Over the epochs", curves(loaded))]
    figures += [(f"Pictures of {run.name}", figure) for run in loaded if (figure := pictures(run)) is not None]
    images = [(title, _png(figure)) for title, figure in figures]
    (folder / "report.html").write_text(page(loaded, images), encoding="utf-8")
    _stack([Image.open(io.BytesIO(png)) for _, png in images], folder / "report.png")
    sys.stdout.write(f"{sentence(loaded)}\nReport: {(folder / 'report.html').resolve()}\n")


def run_folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "metrics.csv").is_file():
        versions = [file.parent for file in folder.glob("version_*/metrics.csv")]
        if not versions:
            raise FileNotFoundError(f"runs must be folders of runs with a metrics.csv, got {path!r}")
        folder = max(versions, key=lambda version: (version / "metrics.csv").stat().st_mtime_ns)
    return folder


def read_run(folder: Path) -> Run:
    """The log of a run, preceded by that of the run that it resumes."""
    run = Run(folder.parent.name, folder)
    rows = _rows(folder)
    before = _predecessor(folder)
    if before is not None:
        first = min((row["step"] for row in rows if "step" in row), default=math.inf)
        rows = [row for row in _rows(before) if row.get("step", math.inf) < first] + rows
    by_epoch: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        epoch, step = row.pop("epoch", math.nan), row.pop("step", math.nan)
        for name, value in row.items():
            if name.endswith("_step") or "gradient_norm" in name:
                run.steps[name].append((step, value))
            else:
                by_epoch[name.removesuffix("_epoch")][epoch] = value
    for name, points in by_epoch.items():
        run.epochs[name] = sorted(points.items())
    return run


def _rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log, without empty cells."""
    file = folder / "metrics.csv"
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            return [{name: float(text) for name, text in row.items() if name and text} for row in csv.DictReader(stream)]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file} must hold numbers, got {error}") from error


def _predecessor(folder: Path) -> Path | None:
    try:
        config = read_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        before = Path(config["ckpt_path"]).parent.parent
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    return before if (before / "metrics.csv").is_file() and before.resolve() != folder.resolve() else None


def _named(runs: list[Run]) -> list[Run]:
    """Adds the version to the names of runs that have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.name} {run.folder.name}"
    return runs


def sentence(runs: list[Run]) -> str:
    """A summary of the information in the codes of each run."""
    parts = []
    for run in runs:
        units, all_units = run.last("active_units"), len(run.dimensions("mu_variance"))
        of = f" of {all_units}" if all_units else ""
        parts.append(f"{run.name}: I(x; z) = {run.last('mutual_information'):.2f} nats, {units:.0f}{of} active units")
    return "; ".join(parts)


def measured(results: Mapping[str, float], *, standardised: bool = False) -> str:
    """The results of a test as text, by group, with four digits. `standardised` marks losses of standardised data."""
    values = {name.removeprefix("test/"): value for name, value in results.items()}
    titles = {name: title for names in TEST_GROUPS.values() for name, title in names.items()}
    width = max(map(len, titles.values()))
    lines = []
    for group, names in {**TEST_GROUPS, "Others": {name: name for name in values if name not in titles}}.items():
        if found := [name for name in names if name in values]:
            heading = "Loss (nats, of the standardised data)" if standardised and group.startswith("Loss") else group
            lines += ["", heading, *(f"  {names[name]:<{width}}  {_digits(name, values[name]):>10}" for name in found)]
    return "\n".join(lines)


def _digits(name: str, value: float) -> str:
    return f"{value:.0f}" if name in COUNTS else f"{value:#.4g}".removesuffix(".")


def overview(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    information, units, reconstruction, mmd = (figure.add_subplot(grid[0, k]) for k in range(4))
    _bars(information, runs, "mutual_information", "Mutual information I(x; z), nats")
    size = max(np.nan_to_num([run.last("evaluation_size") for run in runs]))
    if size > 1:
        information.axvline(math.log(size), color="#999999", linewidth=1, linestyle=":")
        information.set_xlim(0, math.log(size) * 1.3)
        information.set_xlabel(f"at most log {size:.0f} = {math.log(size):.2f}, the number of codes", fontsize=8)
    _bars(units, runs, "active_units", "Active units")
    units.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    total = max((len(run.dimensions("mu_variance")) for run in runs), default=0)
    if total:
        units.axvline(total, color="#999999", linewidth=1, linestyle=":")
        units.set_xlim(0, total * 1.2)
    _bars(reconstruction, runs, "reconstruction", "−log p(x|z), nats")
    _bars(mmd, runs, "mmd_standardised", "MMD² to N(0, I), standardised")
    _dimensions(figure.add_subplot(grid[1, :2]), runs, "kl_dimension", "KL of each latent dimension, nats, largest first")
    _dimensions(figure.add_subplot(grid[1, 2:]), runs, "mu_variance", "Var of the posterior mean of each dimension, largest first")
    _legend(figure, runs)
    return figure


def curves(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(14, 6.9), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    titles = {
        "reconstruction": "−log p(x|z), nats",
        "kl": "KL, nats",
        "mutual_information": "I(x; z), nats",
        "active_units": "Active units",
        "total_correlation": "Total correlation, nats",
        "mmd_standardised": "MMD² to N(0, I), standardised",
    }
    for axes, (metric, title) in zip(panels, titles.items(), strict=False):
        for run, colour in zip(runs, COLOURS, strict=False):
            for stage, style in (("train", ":"), ("val", "-")):
                points = run.epochs.get(f"{stage}/{metric}", [])
                if points:
                    _line(axes, points, color=colour, linestyle=style)
        _finish(axes, title, "epoch")
    panels[3].yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    terms = dict(zip(sorted({name for run in runs for name in run.steps if "gradient_norm" in name}), ("-", "--", ":", "-."), strict=False))
    for run, colour in zip(runs, COLOURS, strict=False):
        low, high = run.curve("logvar_min")[1], run.curve("logvar_max")[1]
        if low and high:
            panels[6].fill_between([e for e, _ in low], [v for _, v in low], [v for _, v in high], color=colour, alpha=0.25, linewidth=0)
            _line(panels[6], low, color=colour)
            _line(panels[6], high, color=colour)
        for name, style in terms.items():
            if name in run.steps:
                _line(panels[7], run.steps[name], color=colour, linestyle=style)
    _finish(panels[6], "Range of logvar", "epoch")
    _finish(panels[7], "Gradient norm of each term", "step")
    if terms:
        panels[7].set_yscale("log")
    for axes in panels:
        if not axes.lines:
            _not_logged(axes)
    styles = {"training": ":", "validation": "-"} | {
        f"gradient of {name.split('norm_')[1].replace('_', ' ')}": style for name, style in terms.items()
    }
    _legend(figure, runs, styles)
    return figure


def pictures(run: Run) -> Figure | None:
    """The pictures in the run's folder, or None if there are none."""
    found = [[imread(run.folder / file) for file in row if (run.folder / file).is_file()] for row in PICTURES]
    rows = [row for row in found if row]
    if not rows:
        return None
    widths = [[image.shape[1] / image.shape[0] for image in row] for row in rows]
    heights = [min(14 / sum(row), 5) for row in widths]
    figure = Figure(figsize=(14, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(run.name, fontsize=12, fontweight="bold")
    for part, row, width in zip(figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0], rows, widths, strict=True):
        for axes, image in zip(part.subplots(1, len(row), width_ratios=width, squeeze=False)[0], row, strict=True):
            axes.imshow(image)
            axes.axis("off")
    return figure


def page(runs: list[Run], images: list[tuple[str, bytes]]) -> str:
    head = "".join(f'<th style="color:{colour}">{html.escape(run.name)}</th>' for run, colour in zip(runs, COLOURS, strict=False))
    rows = []
    for metric, (title, unit, form) in TABLE.items():
        values = [run.last(metric) for run in runs]
        cells = "".join(f"<td>{form.format(value) if math.isfinite(value) else '–'}</td>" for value in values)
        rows.append(f"<tr><th>{html.escape(title)}{f' ({unit})' if unit else ''}</th>{cells}</tr>")
    figures = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in images
    )
    folders = "".join(f"<li>{html.escape(run.name)}: <code>{html.escape(str(run.folder))}</code></li>" for run in runs)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#222}"
        "img{max-width:100%;height:auto}h1{margin-bottom:.2rem}h2{margin-top:2rem;border-bottom:1px solid #ddd}"
        "table{border-collapse:collapse}th,td{padding:.25rem 1rem;text-align:right;border-bottom:1px solid #eee}"
        "th:first-child{text-align:left;font-weight:normal}p.lead{font-size:1.05rem}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(" and ".join(run.name for run in runs))}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(' and '.join(run.name for run in runs))}</h1>"
        f'<p class="lead">{html.escape(sentence(runs))}.</p>'
        f"<table><tr><th>last epoch, on validation data if there is any</th>{head}</tr>{''.join(rows)}</table>{figures}"
        f"<h2>Runs</h2><ul>{folders}</ul></body></html>\n"
    )


def _legend(figure: Figure, runs: list[Run], styles: dict[str, str] | None = None) -> None:
    """Draws a legend above all panels: the runs by colour, then the line styles."""
    handles = [Line2D([], [], color=colour, linewidth=6, label=run.name) for run, colour in zip(runs, COLOURS, strict=False)]
    handles += [Line2D([], [], color="#444444", linestyle=style, label=name) for name, style in (styles or {}).items()]
    columns = 6 if max(len(str(handle.get_label())) for handle in handles) < 25 else 3
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def _bars(axes: Axes, runs: list[Run], metric: str, title: str) -> None:
    values = [run.last(metric) for run in runs]
    positions = np.arange(len(runs))[::-1]
    axes.barh(positions, np.nan_to_num(values), color=COLOURS[: len(runs)], height=0.6)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for position, value in zip(positions, values, strict=True):
        text = f"{value:.4g}" if math.isfinite(value) else "not logged"
        axes.annotate(text, (max(np.nan_to_num(value), 0), position), xytext=(4, 0), textcoords="offset points", va="center", bbox=box)
    axes.set(yticks=[], ylim=(-1, len(runs)))
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _finish(axes, title, "")
    if not np.isfinite(values).any():
        _not_logged(axes)


def _dimensions(axes: Axes, runs: list[Run], metric: str, title: str) -> None:
    width = 0.8 / len(runs)
    for i, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        values = run.dimensions(metric)
        axes.bar(np.arange(1, len(values) + 1) + (i - (len(runs) - 1) / 2) * width, values, width, color=colour)
    _finish(axes, title, "latent dimension, sorted")
    if not any(run.dimensions(metric) for run in runs):
        _not_logged(axes)


def _not_logged(axes: Axes) -> None:
    for text in axes.texts:
        text.set_visible(False)
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not logged", ha="center", va="center", color="#999999", transform=axes.transAxes)


def _line(axes: Axes, points: list[tuple[float, float]], **options: Any) -> None:
    axes.plot(*zip(*points, strict=True), marker=marker(len(points)), linewidth=1.4, **options)


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    if label:
        whole_numbers(axes)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white")
    return stream.getvalue()


def _stack(images: list[Image.Image], file: Path) -> None:
    """Saves the figures below one another as one picture."""
    width = max(image.width for image in images)
    sheet = Image.new("RGBA", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    sheet.save(file, dpi=(DPI, DPI))
