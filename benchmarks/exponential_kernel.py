"""A kernel that only takes exponentials: a GPU's rate of them is a ceiling of the other kernels. Needs Triton, so it is imported late."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

_BLOCK, _PROGRAMS, _REPEATS = 1024, 8192, 256
EXPONENTIALS = _BLOCK * _PROGRAMS * _REPEATS


@triton.jit
def _exponential_kernel(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(out_ptr + offs)
    for _ in range(REPEATS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)


def launcher() -> Callable[[], None]:
    """A compiled launch that takes EXPONENTIALS exponentials."""
    out = torch.rand(_BLOCK * _PROGRAMS, device="cuda")

    def launch() -> None:
        _exponential_kernel[(_PROGRAMS,)](out, REPEATS=_REPEATS, BLOCK=_BLOCK)

    launch()
    return launch
