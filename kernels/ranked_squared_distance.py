"""The histograms of a radix selection among the squared distances of all pairs of rows, which are never stored.

Non-negative float64 numbers have the same order as their bits read as integers. Three histograms of 21 bits each find the number of a given
rank: each counts the next bits of all numbers that begin with the bits already known. The distances are sums of squared differences, which
are as exact for near pairs far from the origin as for others, and equal in every pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.launch import integer_key, launch, tensor_key

BITS = 21
# Rows of a tile. 64×64 distances in float64 take 32 registers of each thread of 8 warps.
BLOCK, WARPS = 64, 8


@triton.jit(do_not_specialize=["shift"])
def histogram_kernel(
    z_ptr,  # (items, D, blocks·BLOCK), contiguous, float64
    known_ptr,  # (1,), int64
    counts_ptr,  # (2 ** BITS,), int64
    N,
    blocks,
    D,
    shift,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # where
    item = tl.program_id(0) // blocks
    start_n = tl.program_id(1) * BLOCK
    start_m = (tl.program_id(0) % blocks) * BLOCK
    offs_n = start_n + tl.arange(0, BLOCK)
    offs_m = start_m + tl.arange(0, BLOCK)
    stride = blocks * BLOCK
    if start_m >= start_n:
        # load and compute
        z_ptr += item.to(tl.int64) * D * stride
        d2 = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
        for _ in range(D):
            difference = tl.load(z_ptr + offs_n)[:, None] - tl.load(z_ptr + offs_m)[None, :]
            d2 += difference * difference
            z_ptr += stride

        # store
        bits = d2.to(tl.int64, bitcast=True)
        counted = (offs_n[:, None] < offs_m[None, :]) & (offs_m < N)[None, :] & (bits >> (shift + BITS) == tl.load(known_ptr))
        digit = (bits >> shift) & ((1 << BITS) - 1)
        tl.atomic_add(counts_ptr + digit, tl.full([BLOCK, BLOCK], 1, tl.int64), mask=counted, sem="relaxed")


def histogram(z: Tensor, rows: int, known: Tensor, shift: int, counts: Tensor) -> None:
    """Count in counts (2 ** BITS,) the bits from bit `shift` on of each d² of two rows of an item whose higher bits are `known` (1,).

    z is (items, D, N), contiguous, float64, padded from N = `rows` to a multiple of BLOCK.
    """
    items, dim, padded = z.shape
    blocks = padded // BLOCK
    launch(
        histogram_kernel, (tensor_key(z, known, counts), integer_key(rows, blocks, dim)), z.device, (items * blocks, blocks, 1),
        (z, known, counts, rows, blocks, dim, shift), lambda: {"BITS": BITS, "BLOCK": BLOCK, "num_warps": WARPS},
    )  # fmt: skip
