"""Plots drawn from the committed rows: python -m benchmarks.plot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.rows import HUGE_PAGES, RESULTS, load, machines, milliseconds

Row = dict[str, Any]
Value = Callable[[Row], float | None]

_DIRECTION = "forward+backward"
# A provider has one colour in all plots.
_PROVIDERS = ("fastvae", "fastvae, closed-form prior", "eager", "torch.compile", "KeOps", "geomloss", "fastvae, inductor")
_COLOURS = {provider: f"C{k}" for k, provider in enumerate(_PROVIDERS)}
# The lines of the README's plot, their names there and their style: dashes show two lines that lie on each other.
_OVERVIEW = {
    "fastvae": ("fastvae", {"linewidth": 3.2, "zorder": 3}),
    "geomloss": ("geomloss", {}),
    "KeOps": ("KeOps", {}),
    "torch.compile": ("torch.compile", {"linestyle": (0, (4, 2)), "zorder": 2.5}),
    "eager": ("eager PyTorch", {"linewidth": 2.4}),
}


def main() -> None:
    """Draws the plots of the device whose series over N has the most sizes."""
    rows = [row for row in load("mmd") if row["direction"] == _DIRECTION and row["threads"] == 1]
    rows = [row for row in rows if not row["provider"].endswith(HUGE_PAGES)]
    tried, rows = rows, [row for row in rows if row["status"] == "ok"]
    device = max((device for device, _ in machines(rows)), key=lambda device: len(_sizes(rows, device)))
    here = [row for row in rows if row["device"] == device]
    dim, ns = _series(here)
    # With one bandwidth the compiled loops are as fast as the plain path and would hide its line.
    series = [
        row for row in here if row["dim"] == dim and row["n"] in ns and row["bandwidths"] == 1 and row["provider"] != "fastvae, inductor"
    ]
    name = re.sub(r"\W+", "-", device.lower()).strip("-")
    title = f"MMD² and its gradient, {device}"
    too_large = {row["provider"] for row in tried if row["device"] == device and row["dim"] == dim and row["status"].startswith("not run")}
    _overview(series, too_large, RESULTS / f"{name}-overview.png")
    _lines(series, "n", "N = M", milliseconds, "ms", f"{title}, D {dim}", RESULTS / f"{name}-time.png")
    _lines(series, "n", "N = M", _extra_mib, "MiB beyond the inputs", f"{title}, D {dim}", RESULTS / f"{name}-memory.png")
    n = max(row["n"] for row in here if row["dim"] != dim)
    grid = [row for row in here if row["n"] == n and row["bandwidths"] == 1]
    ours = {row["dim"]: milliseconds(row) for row in grid if row["provider"] == "fastvae"}
    _lines(
        [row for row in grid if row["dim"] in ours], "dim", "D", lambda row: milliseconds(row) / ours[row["dim"]],
        "times as long as fastvae", f"{title}, N {n}", RESULTS / f"{name}-speed-up.png",
    )  # fmt: skip


def _sizes(rows: list[Row], device: str) -> set[int]:
    return _series([row for row in rows if row["device"] == device])[1]


def _series(rows: list[Row]) -> tuple[int, set[int]]:
    """The D with the most sizes N, and these sizes."""
    sizes = {dim: {row["n"] for row in rows if row["dim"] == dim and row["bandwidths"] == 1} for dim in {row["dim"] for row in rows}}
    dim = max(sizes, key=lambda dim: len(sizes[dim]))
    return dim, sizes[dim]


def _extra_mib(row: Row) -> float | None:
    mib: float | None = row["extra_mib"]
    return mib


def _points(rows: list[Row], provider: str, key: str, value: Value) -> list[tuple[float, float]]:
    return sorted((row[key], number) for row in rows if row["provider"] == provider and (number := value(row)))


def _overview(rows: list[Row], too_large: set[str], path: Path) -> None:
    """Time and memory over N side by side. A cross ends the lines of providers in `too_large`, whose next size does not fit."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained")
    for axes, value, title in zip(panels, (milliseconds, _extra_mib), ("Time", "Memory beyond the inputs"), strict=True):
        for provider, (label, style) in _OVERVIEW.items():
            points = _points(rows, provider, "n", value)
            if points:
                marker, size = ("X", 11 if provider == "eager" else 7) if provider in too_large else ("o", 7)
                axes.plot(
                    *zip(*points, strict=True), label=label, color=_COLOURS[provider], marker=marker, markersize=size, markevery=[-1],
                    **{"linewidth": 1.8} | style,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="rows of each sample, N")
        axes.set_title(title, fontsize=13, loc="left")
        ticks = [64, 256, 1024, 4096, 16384, 65536]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlim(28, 90000)
        axes.minorticks_off()
        axes.tick_params(labelsize=10.5)
        axes.xaxis.label.set_size(11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _named_ticks(panels[0], {0.1: "0.1 ms", 1: "1 ms", 10: "10 ms", 100: "100 ms", 1e3: "1 s", 1e4: "10 s", 1e5: "100 s"})
    _named_ticks(panels[1], {0.1: "0.1 MiB", 1: "1 MiB", 10: "10 MiB", 100: "100 MiB", 1024: "1 GiB", 10240: "10 GiB"})
    legend = figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=11, frameon=False)
    legend.get_texts()[0].set_fontweight("bold")
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


def _named_ticks(axes: Any, ticks: dict[float, str]) -> None:
    axes.set_ylim(bottom=min(ticks))
    low, high = axes.get_ylim()
    shown = {tick: name for tick, name in ticks.items() if low <= tick <= high}
    axes.set_yticks(list(shown), list(shown.values()))
    axes.minorticks_off()


def _lines(rows: list[Row], key: str, key_label: str, value: Value, label: str, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = _points(rows, provider, key, value)
        if points:
            ours = provider == "fastvae"
            axes.plot(
                *zip(*points, strict=True), "o-", label=provider, color=_COLOURS.get(provider), linewidth=3 if ours else 1.2,
                zorder=3 if ours else 2, markersize=5,
            )  # fmt: skip
    ticks = sorted({row[key] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel=key_label, ylabel=label, title=title)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:,g}")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
