"""The machine that a row was measured on: its names, versions and ceilings."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleaved


@dataclass(frozen=True)
class Ceilings:
    """The highest rates measured, each per second: multiply-adds, exponentials, and bytes copied (read and written)."""

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
        source = torch.empty(1 << (28 if device == "cuda" else 24), device=device)
        target = torch.empty_like(source)
        steps: dict[str, Callable[[], object]] = {
            "product": lambda: torch.mm(a, a, out=product),
            "copy": lambda: target.copy_(source),
        }
        if device == "cuda":
            from benchmarks import exponential_kernel

            exponentials = exponential_kernel.EXPONENTIALS
            steps["exponential"] = exponential_kernel.launcher()
        else:
            # In place, so that the tile stays in cache; filled with ones again, as exponentials of exponentials overflow.
            tile = torch.ones(512, 512)
            exponentials = 16 * tile.numel()
            steps["exponential"] = lambda: [tile.exp2_().fill_(1) for _ in range(16)]
            steps["fill"] = lambda: [tile.fill_(1) for _ in range(16)]
            if torch.backends.mkldnn.is_available():
                # On some processors MKL's products are half as fast as oneDNN's.
                layout = a.to_mkldnn()
                steps["product of oneDNN"] = lambda: torch.nn.functional.linear(layout, layout)
        best = {name: min(t.wall for t in times) for name, times in interleaved(steps, device, 15, 10).items()}
        fastest_product = min(seconds for name, seconds in best.items() if name.startswith("product"))
        exponential = best["exponential"] - best.get("fill", 0)
        return Ceilings(size**3 / fastest_product, exponentials / exponential, 2 * 4 * source.numel() / best["copy"])


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


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def conditions(device: str, *packages: str) -> dict[str, Any]:
    """The fields that every row has: device, threads, versions of PyTorch, of its peers and of `packages`, commit and date."""
    versions = {name: version(name) for name in ("torch", "triton", "pykeops", "geomloss", *packages)}
    date = datetime.now(timezone.utc).date().isoformat()
    return {"device": machine(device), "threads": torch.get_num_threads(), **versions, "commit": commit(), "date": date}
