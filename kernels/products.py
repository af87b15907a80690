"""Products of rows in every precision, and the exponent of a pair of rows that follows from them.

Rows arrive scaled, so that u_i·u_j − ½‖u_i‖² − ½‖u_j‖² = −½‖u_i − u_j‖² is what `fastvae.kernels.families.phi` takes for the widest
bandwidth. For a polynomial it is u_i·u_j.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.config import difference_products

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
def operand_ptr(ptr, PRODUCT: tl.constexpr):
    """A pointer to operands of float32 or float64 as one to what `store_parts` has put there: bfloat16 fills half of the memory."""
    if PRODUCT == BF16 or PRODUCT == BF16X3:  # noqa: SIM109
        return ptr.to(tl.pointer_type(tl.bfloat16))
    else:
        return ptr


@triton.jit
def load_parts(hi_ptrs, lo_ptrs, PRODUCT: tl.constexpr):
    """The high and low parts; the high part twice where `dot` takes one."""
    hi = tl.load(hi_ptrs)
    lo = hi
    if PRODUCT == BF16X3 or PRODUCT == TF32X3:  # noqa: SIM109
        lo = tl.load(lo_ptrs)
    return hi, lo


@triton.jit
def round_tf32(z):
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
def store_parts(scaled, points, hi_ptr, lo_ptr, offs, mask, PRODUCT: tl.constexpr):
    """Store the operands of one pass. Returns the rows as its products see them, that is, rounded."""
    if PRODUCT == BF16 or PRODUCT == BF16X3:  # noqa: SIM109
        rounded = _round_bf16(scaled)
        tl.store(operand_ptr(hi_ptr, PRODUCT) + offs, rounded.to(tl.bfloat16), mask=mask)
        if PRODUCT == BF16X3:
            lo = _round_bf16(scaled - rounded)
            tl.store(operand_ptr(lo_ptr, PRODUCT) + offs, lo.to(tl.bfloat16), mask=mask)
            rounded += lo
        return rounded
    elif PRODUCT == TF32 or PRODUCT == TF32X3:  # noqa: SIM109
        hi = round_tf32(scaled)
        tl.store(hi_ptr + offs, hi, mask=mask)
        if PRODUCT == TF32X3:
            lo = round_tf32(scaled - hi)
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
def load_rounded_rows(hi_ptr, lo_ptr, offs, mask, dtype: tl.constexpr, PRODUCT: tl.constexpr):
    """The rows that `store_parts` returned."""
    rounded = tl.load(operand_ptr(hi_ptr, PRODUCT) + offs, mask=mask, other=0.0).to(dtype)
    if PRODUCT == BF16X3 or PRODUCT == TF32X3:  # noqa: SIM109
        rounded += tl.load(operand_ptr(lo_ptr, PRODUCT) + offs, mask=mask, other=0.0).to(dtype)
    return rounded


class BlockOfRows(NamedTuple):
    """Rows of a program, and their first features as operands of `dot` with the pointers to them."""

    offs_n: Any
    ptrs: Any  # to the first feature of each
    neg_half_norm2: Any
    hi: Any
    lo: Any
    hi_ptrs: Any
    lo_ptrs: Any


@triton.jit
def load_block(operands, start_n, PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The block of rows from `start_n` on of `fastvae.kernels.prepare.Operands`."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    neg_half_norm2 = tl.load(operands.neg_half_norm2_ptr + offs_n)
    start = tl.cast(start_n, tl.int64) * D
    offs = tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    hi_ptrs = operands.hi_ptr + start + offs
    lo_ptrs = operands.lo_ptr + start + offs
    hi, lo = load_parts(hi_ptrs, lo_ptrs, PRODUCT)
    return BlockOfRows(offs_n, operands.hi_ptr + offs_n.to(tl.int64) * D, neg_half_norm2, hi, lo, hi_ptrs, lo_ptrs)


@triton.jit
def tile_exponent(
    rows: BlockOfRows, operands, start_m, scale,
    FAMILY: tl.constexpr, PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exponent of a block of rows against the columns from `start_m` on, and the last features that it loaded of the columns."""
    if PRODUCT == DIFFERENCES:
        exponent = _difference_exponent(rows.ptrs, operands.hi_ptr, start_m, scale, FAMILY, D, BLOCK_M)
        return exponent, rows.hi, rows.lo
    else:
        return _product_exponent(rows, operands, start_m, FAMILY, PRODUCT, D, BLOCK_M, BLOCK_K)


@triton.jit
def _product_exponent(
    rows: BlockOfRows, operands, start_m,
    FAMILY: tl.constexpr, PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # where
    offs_m = start_m + tl.arange(0, BLOCK_M)
    local_m = tl.arange(0, BLOCK_M)[:, None] * D
    start = tl.cast(start_m, tl.int64) * D
    col_hi_ptrs = operands.hi_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])
    col_lo_ptrs = operands.lo_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])

    # load and multiply; the products are accumulated onto the norms, which costs nothing
    if FAMILY.radial:
        exponent = rows.neg_half_norm2[:, None] + tl.load(operands.neg_half_norm2_ptr + offs_m)[None, :]
    else:
        exponent = tl.zeros([rows.neg_half_norm2.shape[0], BLOCK_M], dtype=rows.neg_half_norm2.dtype)
    if D == BLOCK_K:
        col_hi, col_lo = load_parts(col_hi_ptrs, col_lo_ptrs, PRODUCT)
        exponent = dot(rows.hi, rows.lo, tl.trans(col_hi), tl.trans(col_lo), exponent, PRODUCT)
        return exponent, col_hi, col_lo
    else:
        for start_k in range(0, D, BLOCK_K):
            left_hi, left_lo = load_parts(rows.hi_ptrs + start_k, rows.lo_ptrs + start_k, PRODUCT)
            right_hi, right_lo = load_parts(col_hi_ptrs + start_k, col_lo_ptrs + start_k, PRODUCT)
            exponent = dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), exponent, PRODUCT)
        return exponent, rows.hi, rows.lo


@triton.jit
def _difference_exponent(row_ptrs, col_ptr, start_m, scale, FAMILY: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """For a radial kernel, by differences, feature by feature, of rows that were neither moved nor scaled."""
    col_ptrs = col_ptr + (start_m + tl.arange(0, BLOCK_M)).to(tl.int64) * D
    exponent = tl.zeros([row_ptrs.shape[0], BLOCK_M], dtype=scale.dtype)
    for k in range(D):
        difference = (tl.load(row_ptrs + k)[:, None] - tl.load(col_ptrs + k)[None, :]) * scale
        exponent -= difference * difference
    if FAMILY.padding > -float("inf") and not FAMILY.homogeneous:
        # An infinite distance times its inverse, or times k = 0, is nan.
        exponent = tl.maximum(exponent, -1e308 if exponent.dtype == tl.float64 else -3e38)
    return 0.5 * exponent


@triton.jit
def column_parts(
    col_hi, col_lo, operands, start_m, d_out,
    PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Block `d_out` of the features of the columns: the features already loaded if one block holds all of them."""
    if D > BLOCK_K or D > BLOCK_D:
        offs_out = tl.arange(0, BLOCK_M)[:, None] * D + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        start = tl.cast(start_m, tl.int64) * D
        col_hi, col_lo = load_parts(operands.hi_ptr + start + offs_out, operands.lo_ptr + start + offs_out, PRODUCT)
    return col_hi, col_lo


@triton.jit
def row_sums(tile):
    """Sums over columns 8 apart, which one thread holds of a tensor core's tile: no exchange between threads, few registers."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8]), 1)


def product_name(product: int, dtype: torch.dtype) -> str:
    """What `fastvae.kernels.config` calls these products."""
    if product == DIFFERENCES.value:
        return difference_products(dtype.itemsize)
    names = {TF32X3.value: "tf32x3"} | {value: name for name, value in PRODUCT_OF_PRECISION.items()}
    return "float64" if dtype == torch.float64 else names[product]


def operand_buffers(
    shape: tuple[int, ...], dtype: torch.dtype, precision_passes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Memory for the high and low parts; both share it if no pass has low parts."""
    hi = torch.empty(shape, dtype=dtype, device=device)
    return hi, torch.empty_like(hi) if BF16X3.value in precision_passes or TF32X3.value in precision_passes else hi
