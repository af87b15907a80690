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

_DIRECTION = "forward+backward"
# A provider has one colour in all plots.
_PROVIDERS = ("fastvae", "fastvae, closed-form prior", "eager", "torch.compile", "KeOps", "geomloss", "fastvae, inductor")
_COLOURS = {provider: f"C{k}" for k, provider in enumerate(_PROVIDERS)}


def main() -> None:
    rows = [row for row in load("mmd") if row["direction"] == _DIRECTION and row["status"] == "ok" and row["threads"] == 1]
    rows = [row for row in rows if not row["provider"].endswith(HUGE_PAGES)]
    for device, _ in machines(rows):
        here = [row for row in rows if row["device"] == device]
        name = re.sub(r"\W+", "-", device.lower()).strip("-")
        # The dimension of the series over N is the one with the most sizes.
        sizes = {dim: {row["n"] for row in here if row["dim"] == dim and row["bandwidths"] == 1} for dim in {row["dim"] for row in here}}
        dim = max(sizes, key=lambda dim: len(sizes[dim]))
        # Of one bandwidth the compiled loops are as fast as the plain path, whose line they would hide.
        series = [row for row in here if row["dim"] == dim and row["bandwidths"] == 1 and row["provider"] != "fastvae, inductor"]
        title = f"MMD² and its gradient, {device}"
        _lines(series, "n", "N = M", milliseconds, "ms", f"{title}, D {dim}", RESULTS / f"{name}-time.png")
        _lines(
            series, "n", "N = M", lambda row: row["extra_mib"], "MiB beyond the inputs", f"{title}, D {dim}", RESULTS / f"{name}-memory.png"
        )
        n = max(row["n"] for row in here if row["dim"] != dim)
        grid = [row for row in here if row["n"] == n and row["bandwidths"] == 1]
        ours = {row["dim"]: milliseconds(row) for row in grid if row["provider"] == "fastvae"}
        known = [row for row in grid if row["dim"] in ours]
        _lines(
            known, "dim", "D", lambda row, ours=ours: milliseconds(row) / ours[row["dim"]], "times as long as fastvae", f"{title}, N {n}",
            RESULTS / f"{name}-speed-up.png",
        )  # fmt: skip


def _lines(
    rows: list[dict[str, Any]],
    key: str,
    key_label: str,
    value: Callable[[dict[str, Any]], float | None],
    label: str,
    title: str,
    path: Path,
) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((row[key], value(row)) for row in rows if row["provider"] == provider and value(row))
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
