"""Time, memory and the ceilings of the machine."""

from __future__ import annotations

import ctypes
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Time:
    """Seconds: the clock's, and on a CPU the processor's, which a busy machine disturbs less."""

    wall: float
    processor: float


def timed(step: Callable[[], object], device: str) -> Time:
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return Time(time.perf_counter() - wall, time.process_time() - processor)


def interleaved(steps: dict[str, Callable[[], object]], device: str, rounds: int, seconds: float) -> dict[str, list[Time]]:
    """Each step once a round, so that what else the machine does falls on all alike; fewer rounds once `seconds` are spent, but three.

    In an order that changes: a small step takes a tenth longer after one that fills the caches.
    """
    times: dict[str, list[Time]] = {name: [] for name in steps}
    order, shuffle = list(steps.items()), random.Random(0).shuffle
    start = time.perf_counter()
    for n in range(rounds):
        if n >= 3 and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name, step in order:
            times[name].append(timed(step, device))
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


def peak_extra_mib(step: Callable[[], object], device: str) -> float | None:
    """The most memory that a step holds beyond what was held before it; None where the system does not say."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize(device)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    if sys.platform == "linux":
        # Freed memory that the allocator keeps would be used again, and not seen.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # Linux resets a process's peak when asked so.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    step()
    return round(max(0, _status("VmHWM") - before) / 2**10, 2)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: multiply-adds, exponentials and copied bytes (read and written) a second."""

    multiply_adds: float
    exponentials: float
    copied: float

    @staticmethod
    def measure(device: str) -> Ceilings:
        size = 8192 if device == "cuda" else 512
        a = torch.randn(size, size, device=device)
        if device == "cuda":
            a = a.bfloat16()
        product = torch.empty_like(a)
        tile = torch.rand(512, 512, device=device)
        long = torch.empty(1 << (28 if device == "cuda" else 24), device=device)
        target = torch.empty_like(long)
        steps: dict[str, Callable[[], object]] = {
            "product": lambda: torch.mm(a, a, out=product),
            "copy": lambda: target.copy_(long),
        }
        if device == "cpu":
            # In place, as a second tile would not stay in cache, and of ones anew, as exponentials of exponentials overflow.
            ones = torch.ones_like(tile)
            steps["exponential"] = lambda: [ones.exp2_().fill_(1) for _ in range(16)]
            steps["fill"] = lambda: [ones.fill_(1) for _ in range(16)]
            if torch.backends.mkldnn.is_available():
                # MKL's products are half as fast on some processors.
                layout = a.to_mkldnn()
                steps["product of oneDNN"] = lambda: torch.nn.functional.linear(layout, layout)
        best = {name: min(t.wall for t in times) for name, times in interleaved(steps, device, 15, 10).items()}
        exponentials = 16 * tile.numel() / (best["exponential"] - best["fill"]) if device == "cpu" else _gpu_exponentials()
        fastest_product = min(seconds for name, seconds in best.items() if name.startswith("product"))
        return Ceilings(size**3 / fastest_product, exponentials, 2 * 4 * long.numel() / best["copy"])


def _gpu_exponentials() -> float:
    from benchmarks.gpu_ceiling import exponentials_per_second

    return exponentials_per_second()


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
