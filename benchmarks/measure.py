"""Time and memory of steps."""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Steps = dict[str, Callable[[], object]]
T = TypeVar("T")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Time:
    """Wall-clock and processor time in seconds. On a CPU, other load disturbs the processor time less."""

    wall: float
    processor: float


def timed(step: Callable[[], object], device: str) -> Time:
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return Time(time.perf_counter() - wall, time.process_time() - processor)


def in_turn(cases: Iterable[T], rounds: int, seconds: float) -> Iterator[T]:
    """Each case once a round, so that other load affects all alike. After `seconds` no round begins, but there are three at least.

    The order changes from round to round: a small step takes a tenth longer after one that fills the caches.
    """
    order, shuffle = list(cases), random.Random(0).shuffle
    start = time.perf_counter()
    for n in range(rounds):
        if n >= 3 and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        yield from order


def interleaved(steps: Steps, device: str, rounds: int, seconds: float) -> dict[str, list[Time]]:
    """Times of each step, `in_turn`."""
    times: dict[str, list[Time]] = {name: [] for name in steps}
    for name in in_turn(steps, rounds, seconds):
        times[name].append(timed(steps[name], device))
    return times


def summary(times: list[Time], device: str) -> dict[str, float]:
    """Median, 20th and 80th percentile in ms."""

    def quantile(values: list[float], q: float) -> float:
        values = sorted(values)
        return values[min(len(values) - 1, math.floor(q * len(values)))]

    wall = [1e3 * t.wall for t in times]
    row = {"median_ms": statistics.median(wall), "p20_ms": quantile(wall, 0.2), "p80_ms": quantile(wall, 0.8)}
    if device == "cpu":
        row["processor_ms"] = statistics.median(1e3 * t.processor for t in times)
    return {name: round(value, 4) for name, value in row.items()} | {"rounds": len(times)}


def summaries(
    steps: Steps, device: str, rounds: int, seconds: float, *, warm_up: int = 0, memory: bool = False
) -> dict[str, dict[str, Any]]:
    """The `summary` of each step after `warm_up` rounds; with `memory` the extra memory of a step too."""
    extra = {name: {"extra_mib": peak_extra_mib(step, device)} if memory else {} for name, step in steps.items()}
    interleaved(steps, device, warm_up, seconds)
    return {name: summary(times, device) | extra[name] for name, times in interleaved(steps, device, rounds, seconds).items()}


def peak_extra_mib(step: Callable[[], object], device: str) -> float | None:
    """The peak of the memory that a step holds beyond what was held before it, or None where the system does not tell."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize(device)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    if sys.platform == "linux":
        # The step could use freed memory that the allocator kept, and this use would not be seen.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # On Linux this resets the peak of the process.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    step()
    return round(max(0, _status("VmHWM") - before) / 2**10, 2)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def run_once(step: Callable[[], T]) -> tuple[T, dict[str, float | None]]:
    """The result of a step on the CPU that takes too long to be repeated, and its seconds and extra memory."""
    results: list[T] = []
    start = time.perf_counter()
    extra = peak_extra_mib(lambda: results.append(step()), "cpu")
    return results[0], {"seconds": round(time.perf_counter() - start, 2), "extra_mib": None if extra is None else round(extra)}
