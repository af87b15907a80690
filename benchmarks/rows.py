"""Committed rows: writing them, reading them, and what tables and plots take from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Ends the provider's name in rows that were measured with huge pages.
HUGE_PAGES = ", huge pages"


def append(path: Path, *rows: dict[str, Any]) -> None:
    """Adds rows to a file. Call it after each case, so that an interrupted run keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(benchmark: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a benchmark, of every device; only the newest row of each case."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(results.glob(f"{benchmark}_*.jsonl")):
        for row in read(path):
            key = tuple(row.get(name) for name in ("device", "threads", "provider", "direction", "n", "dim", "bandwidths"))
            newest[key] = row
    return list(newest.values())


def milliseconds(row: dict[str, Any]) -> float | None:
    """The time that comparisons use: processor time with one CPU thread, as other load disturbs it less; wall-clock time otherwise."""
    return row.get("processor_ms" if row["threads"] == 1 else "median_ms", row.get("median_ms"))


def machines(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The (device, threads) found in the rows."""
    return sorted({machine_of(row) for row in rows})


def machine_of(row: dict[str, Any]) -> tuple[str, int]:
    return row["device"], row["threads"]
