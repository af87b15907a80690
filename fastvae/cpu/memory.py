"""Memory for large results."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# NumPy's threshold too: smaller arrays seldom need new memory from the system.
_HUGE_FROM = 4 << 20


def new_empty(like: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty_strided` without gaps. For a large result on a CPU it asks Linux for huge pages: with small ones, page faults of a
    32 MiB result take three times as long as its computation."""
    out = like.new_empty_strided(shape, strides, dtype=dtype)
    size = out.numel() * out.element_size()
    if size >= _HUGE_FROM and out.is_cpu and (advise := _madvise()) is not None:
        first, last = -(-out.data_ptr() // mmap.PAGESIZE), (out.data_ptr() + size) // mmap.PAGESIZE
        # If there are none, the call fails and the memory is usable all the same.
        advise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
