"""The time that the host (Python, PyTorch's dispatcher and autograd) takes for a step of `mmd` on a GPU, measured without a GPU.

    python -m benchmarks.host_time      appends a row to benchmarks/results/host_time.jsonl, in a few seconds

A small batch on a GPU waits for the host. Its time is measured here without those of the allocator and of the kernel launches:

- `fastvae` does on CPU tensors what it does on a GPU, up to the launch of each compiled kernel, which is left out.
- Eager code runs on CPU tensors of two rows, with next to nothing to compute. (Fake and meta tensors would go through Python at each
  operator and take fifty times as long.)

Eager code launches ten times as many kernels, at some microseconds each, so the ratio on a GPU is another one:
`python -m benchmarks.gpu --stage host` measures it. `launch_us` is the time of one launch at which `fastvae` takes 0.8 of eager's time. If
it is negative, `fastvae` takes less than that even if launches cost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

# Chosen before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime.interpreter import InterpretedFunction

import fastvae
from benchmarks.machine import conditions
from benchmarks.measure import summaries
from benchmarks.providers import matrix
from benchmarks.rows import RESULTS, append
from fastvae.kernels import launch

# Counted by a profiler on an H100: eager code's launches, and the one of PyTorch in a step of `fastvae`, which scales the gradient.
EAGER_LAUNCHES, PYTORCH_LAUNCHES = 67, 1
BOUND = 0.8


class CountingKernel:
    """Stands for a compiled kernel: it only counts its launches."""

    launches = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self._run

    def _run(self, *args: Any) -> None:
        CountingKernel.launches += 1


@contextmanager
def launches_left_out() -> Iterator[mock.MagicMock]:
    """Yields the mock that a kernel's first launch, which compiles it, calls."""
    with (
        mock.patch.object(launch, "_compiled", {}),
        mock.patch.object(launch, "CompiledKernel", CountingKernel),
        mock.patch.object(InterpretedFunction, "__getitem__", return_value=lambda *args, **constants: CountingKernel()) as first_launches,
    ):
        yield first_launches


def steps(n: int, dim: int) -> dict[str, Callable[[], None]]:
    """Steps that take MMD² and its gradient to x."""
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
        CountingKernel.launches = 0
        times = summaries(both, "cpu", rounds, 60.0)
        if first_launches.called:
            raise RuntimeError("a repeated step compiled a kernel again")
    launches = {"fastvae": CountingKernel.launches // times["fastvae"]["rounds"] + PYTORCH_LAUNCHES, "eager": EAGER_LAUNCHES}
    ours, eager = (1e3 * times[name]["median_ms"] for name in both)
    needed = (ours - BOUND * eager) / (BOUND * launches["eager"] - launches["fastvae"])
    case = {"operation": "mmd", "direction": "forward+backward", "n": n, "d": dim, "launches": launches}
    return case | {"ratio": round(ours / eager, 3), "launch_us": round(needed, 2)} | times


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    row = measure() | conditions("cpu")
    print(json.dumps(row))
    append(RESULTS / "host_time.jsonl", row)


if __name__ == "__main__":
    main()
