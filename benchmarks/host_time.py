"""The host's time of a step of `mmd`, without a GPU and without its launches: python -m benchmarks.host_time

On a GPU a step of a small batch takes as long as the host does, for Python, PyTorch's dispatcher, autograd, the allocator and the launches.
Here is the host's time without the last two:

- `fastvae` runs on CPU tensors of N rows as on a GPU, to the point where a known compiled kernel would be launched, and returns.
- Eager code calls the operators of a GPU on CPU tensors of two rows, which leave it next to nothing to compute. (Fake and meta tensors go
  through Python at each operator, and take fifty times as long.)

A launch takes some microseconds, and eager code has ten times as many, so that the ratio of these times is not that of a GPU, which
`python -m benchmarks.gpu --stage host` measures. `launch_us` is how long one must take for `fastvae` to take 0.8 of eager's time; below
zero it takes less than that without them. The row goes to benchmarks/results/host_time.jsonl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

# Chosen before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime.interpreter import InterpretedFunction

import fastvae
from benchmarks.measure import commit, interleaved, machine, summary
from benchmarks.providers import matrix, versions
from fastvae.kernels import launch

RESULTS = Path(__file__).parent / "results" / "host_time.jsonl"
# As a profiler counted them on an H100; PyTorch's in a step of `fastvae` scales the gradient.
EAGER_LAUNCHES, PYTORCH_LAUNCHES = 67, 1
BOUND = 0.8


class Kernel:
    """What `launch` takes for a compiled kernel, which counts its launches and does nothing else."""

    launches = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self._run

    def _run(self, *args: Any) -> None:
        Kernel.launches += 1


@contextmanager
def launches_left_out() -> Iterator[mock.MagicMock]:
    """Yields what counts the kernels that were not known yet."""
    with (
        mock.patch.object(launch, "_compiled", {}),
        mock.patch.object(launch, "CompiledKernel", Kernel),
        mock.patch.object(InterpretedFunction, "__getitem__", return_value=lambda *args, **constants: Kernel()) as first_launches,
    ):
        yield first_launches


def steps(n: int, dim: int) -> dict[str, Callable[[], None]]:
    """Value and gradient to x."""
    x, y = torch.randn(n, dim, requires_grad=True), torch.randn(n, dim)
    a, b = torch.randn(2, dim, requires_grad=True), torch.randn(2, dim)
    h = dim**0.5

    def fused() -> None:
        x.grad = None
        fastvae.mmd(x, y, bandwidth=h, backend="triton").backward()

    def eager() -> None:
        a.grad = None
        matrix(a, b, (h,)).backward()

    return {"fastvae": fused, "eager": eager}


def measure(n: int = 128, dim: int = 16, rounds: int = 1000) -> dict[str, Any]:
    with launches_left_out() as first_launches:
        both = steps(n, dim)
        for step in both.values():
            for _ in range(20):
                step()
        first_launches.reset_mock()
        Kernel.launches = 0
        times = {name: summary(values, "cpu") for name, values in interleaved(both, "cpu", rounds, 60.0).items()}
        if first_launches.called:
            raise RuntimeError("a step has launches that are not found by their key")
    launches = {"fastvae": Kernel.launches // times["fastvae"]["rounds"] + PYTORCH_LAUNCHES, "eager": EAGER_LAUNCHES}
    ours, eager = (1e3 * times[name]["median_ms"] for name in both)
    needed = (ours - BOUND * eager) / (BOUND * launches["eager"] - launches["fastvae"])
    of = {"operation": "mmd", "direction": "forward+backward", "n": n, "d": dim, "launches": launches}
    return of | {"ratio": round(ours / eager, 3), "launch_us": round(needed, 2)} | times


def main() -> None:
    torch.set_num_threads(1)
    common = {"device": machine("cpu"), "commit": commit(), "date": datetime.now(timezone.utc).date().isoformat(), **versions()}
    with RESULTS.open("a") as file:
        line = json.dumps({**measure(), **common})
        print(line)
        file.write(line + "\n")


if __name__ == "__main__":
    main()
