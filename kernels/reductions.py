"""How programs divide a long sum among them, and how the parts that they stored are added up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share_of(count, number, shares, BLOCK: tl.constexpr):
    """Where share `number` of 0 … count − 1 starts and ends, if cut into `shares` of whole blocks."""
    size = tl.cdiv(tl.cdiv(count, BLOCK), shares) * BLOCK
    start = number * size
    return start, tl.minimum(start + size, count)


@triton.jit
def total(part_ptr, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of `count` float64 numbers, one every STRIDE, in a fixed order."""
    parts = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        parts += tl.load(part_ptr + offs * STRIDE, mask=offs < count, other=0.0)
    return tl.sum(parts)


@triton.jit
def add_shares(out, ptrs, stride, shares, mask):
    """`out` and what lies at `ptrs`, in each of `shares` shares that are `stride` apart, in a fixed order."""
    for share in range(0, shares):
        out += tl.load(ptrs + tl.cast(share, tl.int64) * stride, mask=mask, other=0.0).to(out.dtype)
    return out
