"""Products of rows in every precision, and the exponent of a pair of rows that follows from them.

Rows arrive scaled, so that u_i·u_j − ½‖u_i‖² − ½‖u_j‖² = −½‖u_i − u_j‖² is what `fastvae.kernels.families.phi` takes for the widest
bandwidth. For a polynomial it is u_i·u_j.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# The constexpr PRODUCT: how products are taken. BF16X3 and TF32X3 take three products of the high and low parts of their operands.
# DIFFERENCES takes no product for the exponent, but sums squared differences, feature by feature.
IEEE = tl.constexpr(0)
TF32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
BF16X3 = tl.constexpr(3)
TF32X3 = tl.constexpr(4)
DIFFERENCES = tl.constexpr(5)
# By the `precision` of the public functions.
PRODUCT_OF_PRECISION = {"ieee": IEEE.value, "high": TF32.value, "medium": BF16.value, "highest": BF16X3.value}

# Triton's interpreter keeps bfloat16 as bits, which its dot would multiply.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a_hi, a_lo, b_hi, b_lo, acc, PRODUCT: tl.constexpr):
    """a @ b + acc. With three products a = a_hi + a_lo and b = b_hi + b_lo, and the product of the two low parts is left out."""
    if INTERPRETED and (PRODUCT == BF16 or PRODUCT == BF16X3):  # noqa: SIM109, Triton has no `in`
        a_hi, a_lo, b_hi, b_lo = a_hi.to(tl.float32), a_lo.to(tl.float32), b_hi.to(tl.float32), b_lo.to(tl.float32)
    if PRODUCT == BF16X3:
        acc = tl.dot(a_lo, b_hi, acc)
        acc = tl.dot(a_hi, b_lo, acc)
        return tl.dot(a_hi, b_hi, acc)
    elif PRODUCT == TF32X3:
        acc = tl.dot(a_lo, b_hi, acc, input_precision="tf32")
        acc = tl.dot(a_hi, b_lo, acc, input_precision="tf32")
        return tl.dot(a_hi, b_hi, acc, input_precision="tf32")
    elif PRODUCT == BF16:
        return tl.dot(a_hi, b_hi, acc)
    elif PRODUCT == TF32:
        return tl.dot(a_hi, b_hi, acc, input_precision="tf32")
    else:
        return tl.dot(a_hi, b_hi, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def split_operand(w, PRODUCT: tl.constexpr):
    """w as the high and low parts that `dot` takes; the same twice where it takes one."""
    if PRODUCT == BF16X3:
        # Truncated, not rounded: a rounding whose result is read back takes the unit that the exponentials need.
        hi = (w.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return hi.to(tl.bfloat16), (w - hi).to(tl.bfloat16)
    elif PRODUCT == TF32X3:
        hi = (w.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        return hi, w - hi
    elif PRODUCT == BF16:
        hi = w.to(tl.bfloat16)
        return hi, hi
    else:
        return w, w


@triton.jit
def load_parts(hi_ptrs, lo_ptrs, PRODUCT: tl.constexpr):
    """The high and low parts; the high part twice where `dot` takes one."""
    hi = tl.load(hi_ptrs)
    lo = hi
    if PRODUCT == BF16X3 or PRODUCT == TF32X3:  # noqa: SIM109
        lo = tl.load(lo_ptrs)
    return hi, lo


@triton.jit
def _round_tf32(z):
    # Tensor cores truncate. The sum of bits would carry out of a nan.
    rounded = ((z.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(z * 0.0 == 0.0, rounded, z)


@triton.jit
def _round_bf16(z):
    # To even, as a GPU rounds; the interpreter truncates.
    bits = z.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(z * 0.0 == 0.0, rounded, z)


@triton.jit
def store_parts(scaled, points, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, PRODUCT: tl.constexpr):
    """Store the operands of one pass. Returns the rows as its products see them, that is, rounded."""
    if PRODUCT == BF16 or PRODUCT == BF16X3:  # noqa: SIM109
        rounded = _round_bf16(scaled)
        tl.store(hi16_ptr + offs16, rounded.to(tl.bfloat16), mask=mask)
        if PRODUCT == BF16X3:
            lo = _round_bf16(scaled - rounded)
            tl.store(lo16_ptr + offs16, lo.to(tl.bfloat16), mask=mask)
            rounded += lo
        return rounded
    elif PRODUCT == TF32 or PRODUCT == TF32X3:  # noqa: SIM109
        hi = _round_tf32(scaled)
        tl.store(hi_ptr + offs, hi, mask=mask)
        if PRODUCT == TF32X3:
            lo = _round_tf32(scaled - hi)
            tl.store(lo_ptr + offs, lo, mask=mask)
            hi += lo
        return hi
    elif PRODUCT == DIFFERENCES:
        # Neither moved nor scaled: differences of the original rows have the smallest rounding errors.
        tl.store(hi_ptr + offs, points, mask=mask)
        return points
    else:
        tl.store(hi_ptr + offs, scaled, mask=mask)
        return scaled


@triton.jit
def load_rounded_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, dtype: tl.constexpr, PRODUCT: tl.constexpr):
    """The rows that `store_parts` returned."""
    if PRODUCT == BF16 or PRODUCT == BF16X3:  # noqa: SIM109
        rounded = tl.load(hi16_ptr + offs16, mask=mask, other=0.0).to(dtype)
        if PRODUCT == BF16X3:
            rounded += tl.load(lo16_ptr + offs16, mask=mask, other=0.0).to(dtype)
        return rounded
    else:
        rounded = tl.load(hi_ptr + offs, mask=mask, other=0.0)
        if PRODUCT == TF32X3:
            rounded += tl.load(lo_ptr + offs, mask=mask, other=0.0)
        return rounded


@triton.jit
def column_exponent(
    row_hi, row_lo, row_neg_half_norm2, row_hi_ptrs, row_lo_ptrs, col_hi_ptr, col_lo_ptr, col_neg_half_norm2_ptr, start_m,
    FAMILY: tl.constexpr, PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exponent of a block of rows against the columns from `start_m` on, and the last features of the columns that it loaded."""
    # where
    offs_m = start_m + tl.arange(0, BLOCK_M)
    local_m = tl.arange(0, BLOCK_M)[:, None] * D
    start = tl.cast(start_m, tl.int64) * D
    col_hi_ptrs = col_hi_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])
    col_lo_ptrs = col_lo_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])

    # load and multiply; the products are accumulated onto the norms, which costs nothing
    if FAMILY.radial:
        exponent = row_neg_half_norm2[:, None] + tl.load(col_neg_half_norm2_ptr + offs_m)[None, :]
    else:
        exponent = tl.zeros([row_neg_half_norm2.shape[0], BLOCK_M], dtype=row_neg_half_norm2.dtype)
    if D == BLOCK_K:
        col_hi, col_lo = load_parts(col_hi_ptrs, col_lo_ptrs, PRODUCT)
        exponent = dot(row_hi, row_lo, tl.trans(col_hi), tl.trans(col_lo), exponent, PRODUCT)
        return exponent, col_hi, col_lo
    else:
        for start_k in range(0, D, BLOCK_K):
            left_hi, left_lo = load_parts(row_hi_ptrs + start_k, row_lo_ptrs + start_k, PRODUCT)
            right_hi, right_lo = load_parts(col_hi_ptrs + start_k, col_lo_ptrs + start_k, PRODUCT)
            exponent = dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), exponent, PRODUCT)
        return exponent, row_hi, row_lo


@triton.jit
def difference_exponent(row_ptr, col_ptr, offs_n, start_m, scale, FAMILY: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """The exponent of a radial kernel by differences, feature by feature, of rows that were neither moved nor scaled."""
    row_ptrs = row_ptr + offs_n.to(tl.int64) * D
    col_ptrs = col_ptr + (start_m + tl.arange(0, BLOCK_M)).to(tl.int64) * D
    exponent = tl.zeros([offs_n.shape[0], BLOCK_M], dtype=scale.dtype)
    for k in range(D):
        difference = (tl.load(row_ptrs + k)[:, None] - tl.load(col_ptrs + k)[None, :]) * scale
        exponent -= difference * difference
    if FAMILY.takes_distance and not FAMILY.homogeneous:
        # An infinite distance times its inverse is nan.
        exponent = tl.maximum(exponent, -1e308 if exponent.dtype == tl.float64 else -3e38)
    return 0.5 * exponent


@triton.jit
def column_parts(col_hi, col_lo, col_hi_ptr, col_lo_ptr, start_m, d_out, PRODUCT: tl.constexpr, D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Block `d_out` of the features of the columns: the features already loaded if one block holds all of them."""
    if D > BLOCK_K or D > BLOCK_D:
        offs_out = tl.arange(0, BLOCK_M)[:, None] * D + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        start = tl.cast(start_m, tl.int64) * D
        col_hi, col_lo = load_parts(col_hi_ptr + start + offs_out, col_lo_ptr + start + offs_out, PRODUCT)
    return col_hi, col_lo


@triton.jit
def row_sums(tile):
    """Sums over columns 8 apart, which one thread holds of a tensor core's tile: no exchange between threads, few registers."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8]), 1)


def product_name(product: int, dtype: torch.dtype) -> str:
    """What `fastvae.kernels.config` calls these products."""
    names = {TF32X3.value: "tf32x3"} | {value: name for name, value in PRODUCT_OF_PRECISION.items()}
    return "float64" if dtype == torch.float64 else names[product]


def is_bfloat16(product: int) -> bool:
    """Whether the operands of these products are bfloat16."""
    return product in (BF16.value, BF16X3.value)


def operand_buffers(
    shape: tuple[int, ...], dtype: torch.dtype, precision_passes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the high and low parts in `dtype`, and views of it as bfloat16. Both parts share it if no pass has low parts."""
    hi = torch.empty(shape, dtype=dtype, device=device)
    lo = torch.empty_like(hi) if BF16X3.value in precision_passes or TF32X3.value in precision_passes else hi
    return (hi, lo, hi, lo) if dtype == torch.float64 else (hi, lo, hi.view(torch.bfloat16), lo.view(torch.bfloat16))
