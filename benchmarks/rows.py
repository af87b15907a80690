"""Committed rows: how they are read, and which of them a table or a plot takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# What the providers of rows are called that were measured with them.
HUGE_PAGES = ", huge pages"


def load(benchmark: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a benchmark, of every device; of equal cases the newest row only."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(results.glob(f"{benchmark}_*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = tuple(row.get(name) for name in ("device", "threads", "provider", "direction", "n", "dim", "bandwidths"))
            newest[key] = row
    return list(newest.values())


def milliseconds(row: dict[str, Any]) -> float | None:
    """What comparisons take: of one thread of a CPU the processor's time, which a busy machine disturbs less than the clock."""
    return row.get("processor_ms" if row["threads"] == 1 else "median_ms", row.get("median_ms"))


def machines(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """(device, threads) of the rows."""
    return sorted({machine_of(row) for row in rows})


def machine_of(row: dict[str, Any]) -> tuple[str, int]:
    return row["device"], row["threads"]
