"""The README's tables, from the committed rows: python -m benchmarks.table --n 8192 --device AMD --threads 1."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from benchmarks.rows import HUGE_PAGES, load, machine_of, machines, milliseconds

_DIRECTION = {"forward": "forward", "forward+backward": "forward and backward"}


def tables(n: int | None = None, machine: str = "", threads: int | None = None) -> str:
    """All tables, or those of devices with `machine` in their name or of so many threads, and of `mmd` only the rows of one N."""
    kinds = (("mmd", n), ("reparameterize_kl", None))
    return "\n\n".join(text for benchmark, rows in kinds for text in _tables(benchmark, rows, machine, threads))


def _tables(benchmark: str, n: int | None, machine: str, threads: int | None) -> list[str]:
    rows = [row for row in load(benchmark) if n in (None, row["n"]) and machine in row["device"] and threads in (None, row["threads"])]
    texts = []
    for found_on, suffix in itertools.product(machines(rows), ("", HUGE_PAGES)):
        here = [row for row in rows if machine_of(row) == found_on and row["provider"].endswith(HUGE_PAGES) == bool(suffix)]
        if not here:
            continue
        providers = sorted(
            dict.fromkeys(row["provider"].removesuffix(suffix) for row in here), key=lambda name: not name.startswith("fastvae")
        )
        cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
        for row in here:
            case = (row["direction"], row["n"], row["dim"], row.get("bandwidths", 0))
            cases.setdefault(case, {})[row["provider"].removesuffix(suffix)] = row
        lines = [_title(benchmark, here, suffix), ""]
        head = ["", "N", "D", *(["bandwidths"] if benchmark == "mmd" else []), *providers]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for (direction, n, dim, bandwidths), found in sorted(cases.items(), key=lambda case: case[0]):
            cells = [_DIRECTION[direction], f"{n:,}", str(dim), *([str(bandwidths)] if benchmark == "mmd" else [])]
            lines.append("| " + " | ".join(cells + [_cell(found.get(name), found.get("fastvae")) for name in providers]) + " |")
        if not suffix:
            lines += [""] + [f"- {name}: {why}" for name, why in _reasons(here).items()]
        texts.append("\n".join(lines).rstrip())
    return texts


def _title(benchmark: str, rows: list[dict[str, Any]], suffix: str) -> str:
    row = rows[-1]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "pykeops", "geomloss") if row[name] != "not installed")
    on_cpu = any("processor_ms" in r for r in rows)
    unit = "processor time" if on_cpu and row["threads"] == 1 else "time"
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}, " if on_cpu else ""
    return f"`{benchmark}`{suffix}, float32, {row['device']}, {threads}median {unit} in ms (times `fastvae`'s), {versions}, {row['date']}:"


def _cell(row: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    time = None if row is None else milliseconds(row)
    base = None if ours is None else milliseconds(ours)
    if time is None or row is None:
        return "–"
    ratio = "" if base is None or row is ours else f" ({time / base:.1f}×)"
    return f"{time:.3g}{ratio}" if time < 1000 else f"{time:.0f}{ratio}"


def _reasons(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What a reader has to know of a provider: how it was built, and why a cell is empty."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for text in (row["note"], "" if row["status"] == "ok" else row["status"].split(":")[0]):
            if text and text not in reasons.setdefault(row["provider"], []):
                reasons[row["provider"]].append(text)
    return {name: "; ".join(texts) for name, texts in reasons.items() if texts}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, help="only the rows of mmd with this N")
    parser.add_argument("--device", default="", help="only devices with this in their name")
    parser.add_argument("--threads", type=int, help="only rows of so many threads")
    args = parser.parse_args()
    print(tables(args.n, args.device, args.threads))
