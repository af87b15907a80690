"""The exponential rate of a GPU, from a kernel that does nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.measure import timed

_BLOCK, _PROGRAMS, _REPEATS = 1024, 8192, 256


@triton.jit
def _exponentials(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(out_ptr + offs)
    for _ in range(REPEATS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)


def exponentials_per_second() -> float:
    out = torch.rand(_BLOCK * _PROGRAMS, device="cuda")

    def step() -> None:
        _exponentials[(_PROGRAMS,)](out, REPEATS=_REPEATS, BLOCK=_BLOCK)

    step()
    return _BLOCK * _PROGRAMS * _REPEATS / min(timed(step, "cuda").wall for _ in range(10))
