"""The pair sweep of MMD on a GPU: a block of rows against all columns, tile by tile, its sums kept in registers.

Rows come in scaled by √(2γ_0·log₂e), so that k of the widest bandwidth is exp2(u_i·u_j − ½‖u_i‖² − ½‖u_j‖²). The sums over columns are
those of formula (1) of `fastvae.reference.mmd` and of a row's gradient, Σ_j w_j·W_ij·(u_i − u_j). Each program owns its rows: no atomics, a
fixed order, the same bits every time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.config import SweepConfig, column_splits, device_limits, difference_config, padded_dim, sweep_config
from fastvae.radial import EXPONENT_ERROR, LOG2_E, RBF, KernelSum

IEEE = tl.constexpr(0)
TF32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
SPLIT = tl.constexpr(3)
PRECISION = {"ieee": IEEE.value, "high": TF32.value, "medium": BF16.value, "highest": SPLIT.value}

# Bandwidths whose 3 coefficients each a thread keeps in registers; more are read again for each tile.
MAX_HOISTED = tl.constexpr(6)

# Steepest γ·‖x‖² for split products: two bfloat16 parts place a point to 2⁻¹⁷ of its norm, and from here on gradients lost more than 1e-4.
SPLIT_LIMIT = 64.0

# Three bits of the constexpr SQUARINGS are the squarings of one bandwidth.
_SQUARING_BITS = 3


# Triton's interpreter keeps bfloat16 as bits, which its dot would multiply.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a_hi, a_lo, b_hi, b_lo, acc, MODE: tl.constexpr):
    """a @ b + acc; in SPLIT mode a = a_hi + a_lo, b = b_hi + b_lo, without the product of the two low parts."""
    if _INTERPRETED and MODE >= BF16:
        a_hi, a_lo, b_hi, b_lo = a_hi.to(tl.float32), a_lo.to(tl.float32), b_hi.to(tl.float32), b_lo.to(tl.float32)
    if MODE == SPLIT:
        acc = tl.dot(a_lo, b_hi, acc)
        acc = tl.dot(a_hi, b_lo, acc)
        return tl.dot(a_hi, b_hi, acc)
    elif MODE == BF16:
        return tl.dot(a_hi, b_hi, acc)
    elif MODE == TF32:
        return tl.dot(a_hi, b_hi, acc, input_precision="tf32")
    else:
        return tl.dot(a_hi, b_hi, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _split(w, MODE: tl.constexpr):
    """w as the two operands that `_dot` takes in this mode."""
    if MODE == SPLIT:
        # Truncated, not rounded: a rounding whose result is read back takes the unit that the exponentials need.
        hi = (w.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return hi.to(tl.bfloat16), (w - hi).to(tl.bfloat16)
    elif MODE == BF16:
        hi = w.to(tl.bfloat16)
        return hi, hi
    else:
        return w, w


@triton.jit
def _table(table_ptr, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr):
    """Ratios, weights and slopes as scalars: those needed, loaded once where they are few enough to stay in registers."""
    table = ()
    if BANDWIDTHS > 1 and BANDWIDTHS <= MAX_HOISTED:
        for n in tl.static_range(3 * BANDWIDTHS):
            if (n < BANDWIDTHS and (n == 0 or (SQUARINGS >> (3 * n)) & 7 != 0)) or (n >= 2 * BANDWIDTHS and not GRADIENT):
                table += (0.0,)
            else:
                table += (tl.load(table_ptr + n),)
    return table


@triton.jit
def _entry(table, table_ptr, n: tl.constexpr, BANDWIDTHS: tl.constexpr):
    if BANDWIDTHS <= MAX_HOISTED:
        return table[n]
    else:
        return tl.load(table_ptr + n)


@triton.jit
def _radial(
    exponent, table, table_ptr, value_shift, slope_shift, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr
):
    """Σ_b a_b·k_b and Σ_b a_b·(γ_b/γ_0)·k_b, each less its shift, or k_0 − shift twice for one bandwidth."""
    power = tl.exp2(exponent)
    if BANDWIDTHS == 1:
        value = power - value_shift
        return value, value
    else:
        value = power * _entry(table, table_ptr, BANDWIDTHS, BANDWIDTHS) - value_shift
        slope = value
        if GRADIENT:
            slope = power * _entry(table, table_ptr, 2 * BANDWIDTHS, BANDWIDTHS) - slope_shift
        for b in tl.static_range(1, BANDWIDTHS):
            if (SQUARINGS >> (3 * b)) & 7 == 0:
                power = tl.exp2(exponent * _entry(table, table_ptr, b, BANDWIDTHS))
            else:
                for _ in tl.static_range((SQUARINGS >> (3 * b)) & 7):
                    power = power * power
            value += power * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
            if GRADIENT:
                slope += power * _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
        return value, slope


@triton.jit
def _row_sums(tile):
    """Sums over columns 8 apart, which one thread of a matrix unit's tile holds: no exchange between threads, few registers."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8]), 1)


@triton.jit
def _tile(
    row_hi,
    row_lo,
    row_half,
    row_hi_ptrs,
    row_lo_ptrs,
    offs_n,
    col_hi_ptr,
    col_lo_ptr,
    col_half_ptr,
    col_weight_ptr,
    table,
    table_ptr,
    value_shift,
    slope_shift,
    start_m,
    d_out,
    value_acc,
    slope_acc,
    moments,
    DIAGONAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MODE: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of the sweep: its sums added to the accumulators."""
    # where
    offs_m = start_m + tl.arange(0, BLOCK_M)
    local_m = tl.arange(0, BLOCK_M)[:, None] * D
    start = tl.cast(start_m, tl.int64) * D
    col_hi_ptrs = col_hi_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])
    col_lo_ptrs = col_lo_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])

    # load and multiply; the norms come first, so that the products add to them for nothing
    exponent = row_half[:, None] + tl.load(col_half_ptr + offs_m)[None, :]
    if D == BLOCK_K:
        col_hi = tl.load(col_hi_ptrs)
        col_lo = col_hi
        if MODE == SPLIT:
            col_lo = tl.load(col_lo_ptrs)
        exponent = _dot(row_hi, row_lo, tl.trans(col_hi), tl.trans(col_lo), exponent, MODE)
    else:
        for start_k in range(0, D, BLOCK_K):
            left_hi = tl.load(row_hi_ptrs + start_k)
            right_hi = tl.load(col_hi_ptrs + start_k)
            left_lo = left_hi
            right_lo = right_hi
            if MODE == SPLIT:
                left_lo = tl.load(row_lo_ptrs + start_k)
                right_lo = tl.load(col_lo_ptrs + start_k)
            exponent = _dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), exponent, MODE)

    # compute
    value, slope = _radial(exponent, table, table_ptr, value_shift, slope_shift, GRADIENT, BANDWIDTHS, SQUARINGS)
    if DIAGONAL:
        off_diagonal = offs_n[:, None] != offs_m[None, :]
        value = tl.where(off_diagonal, value, 0.0)
        slope = tl.where(off_diagonal, slope, 0.0)
    if WEIGHTED:
        col_weight = tl.load(col_weight_ptr + offs_m)
        value = value * col_weight[None, :]
        slope = slope * col_weight[None, :]
    value_acc += _row_sums(value)
    if GRADIENT:
        if BANDWIDTHS > 1:
            slope_acc += _row_sums(slope)
        if D > BLOCK_K or D > BLOCK_D:
            offs_out = local_m + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            col_hi = tl.load(col_hi_ptr + start + offs_out)
            col_lo = col_hi
            if MODE == SPLIT:
                col_lo = tl.load(col_lo_ptr + start + offs_out)
        slope_hi, slope_lo = _split(slope, MODE)
        moments = _dot(slope_hi, slope_lo, col_hi, col_lo, moments, MODE)
    return value_acc, slope_acc, moments


@triton.jit(do_not_specialize=["padding"])
def sweep_kernel(
    row_hi_ptr,  # (N, D), scaled rows, and in SPLIT mode their low parts
    row_lo_ptr,
    row_half_ptr,  # (N,), −½‖u‖²
    col_hi_ptr,  # (M, D)
    col_lo_ptr,
    col_half_ptr,  # (M,), −inf for a padded column, whose k is 0
    col_weight_ptr,  # (M,)
    table_ptr,  # (3, BANDWIDTHS), ratios, weights and slopes
    shift_ptr,  # (2,), Σ_b of the shifted weights and slopes
    differences_ptr,  # (1,), nonzero where `differences_kernel` takes over
    value_ptr,  # (SPLITS, N), Σ_j w_j·(k − shift)
    slope_ptr,  # (SPLITS, N), Σ_j w_j·(W − shift)
    moments_ptr,  # (SPLITS, N, D), Σ_j w_j·(W − shift)·u_j
    M,  # columns with their padding; N and M are multiples of BLOCK_N, so that no load needs a mask
    padding,  # columns that are padding
    WITHIN: tl.constexpr,  # rows and columns are the same sample, whose diagonal is left out
    SYMMETRIC: tl.constexpr,  # columns from the diagonal on, those right of it twice
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MODE: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # features of a step of the exponent's product
    BLOCK_D: tl.constexpr,  # features of a block of moments
):
    """Row sums of a block of rows against a share of the columns; program 1 is the block of moments, program 2 the share."""
    if tl.load(differences_ptr) != 0:
        return
    # where
    start_n = tl.program_id(0) * BLOCK_N
    d_out = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D

    # load
    row_half = tl.load(row_half_ptr + offs_n)
    row_hi_ptrs = row_hi_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_lo_ptrs = row_lo_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_hi = tl.load(row_hi_ptrs)
    row_lo = row_hi
    if MODE == SPLIT:
        row_lo = tl.load(row_lo_ptrs)
    value_shift = tl.load(shift_ptr)
    slope_shift = tl.load(shift_ptr + 1)
    table = _table(table_ptr, GRADIENT, BANDWIDTHS, SQUARINGS)

    # compute
    value_acc = tl.zeros([BLOCK_N, 8], dtype=row_half.dtype)
    slope_acc = value_acc
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=row_half.dtype)
    # This loop skips the tiles on the diagonal, which come masked after it: a self-pair in the products would swamp small sums.
    columns = M
    if SYMMETRIC:
        columns = M - start_n - BLOCK_N
    elif WITHIN:
        columns = M - BLOCK_N
    share = tl.cdiv(tl.cdiv(columns, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    first = split * share
    last = tl.minimum(first + share, columns)
    for start_m in range(first, last, BLOCK_M):
        shifted_m = start_m
        if SYMMETRIC:
            shifted_m = start_m + start_n + BLOCK_N
        elif WITHIN:
            shifted_m = tl.where(start_m >= start_n, start_m + BLOCK_N, start_m)
        value_acc, slope_acc, moments = _tile(
            row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, offs_n, col_hi_ptr, col_lo_ptr,
            col_half_ptr, col_weight_ptr, table, table_ptr, value_shift, slope_shift, shifted_m, d_out,
            value_acc, slope_acc, moments, False, GRADIENT, WEIGHTED, MODE, BANDWIDTHS, SQUARINGS, D, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if SYMMETRIC:
        value_acc += value_acc
    if WITHIN:  # noqa: SIM102, one is known to the compiler and the other is not
        if split == 0:
            for start_m in tl.range(start_n, start_n + BLOCK_N, BLOCK_M, num_stages=1):
                value_acc, slope_acc, moments = _tile(
                    row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, offs_n, col_hi_ptr, col_lo_ptr,
                    col_half_ptr, col_weight_ptr, table, table_ptr, value_shift, slope_shift, start_m, d_out,
                    value_acc, slope_acc, moments, True, GRADIENT, WEIGHTED, MODE, BANDWIDTHS, SQUARINGS, D, BLOCK_M, BLOCK_K, BLOCK_D,
                )  # fmt: skip
    value = tl.sum(value_acc, 1)
    slope = value
    if BANDWIDTHS > 1:
        slope = tl.sum(slope_acc, 1)
    if not WEIGHTED:
        # A padded column has added −shift. Split 0 takes it back, whichever split has added it: the shares are summed.
        padded = tl.where(split == 0, padding, 0)
        if SYMMETRIC:
            padded = tl.where(start_n + BLOCK_N == M, padded, 2 * padded)
        value += padded * value_shift
        slope += padded * slope_shift

    # store
    if d_out == 0:
        tl.store(value_ptr + tl.cast(split, tl.int64) * rows + offs_n, value)
        if GRADIENT:
            tl.store(slope_ptr + tl.cast(split, tl.int64) * rows + offs_n, slope)
    if GRADIENT:
        offs_out = local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        tl.store(moments_ptr + (tl.cast(split, tl.int64) * rows * D + row_start) + offs_out, moments)


@triton.jit(do_not_specialize=["M"])
def differences_kernel(
    row_ptr,  # (N, D), rows as they came, not centred, whose differences round least; N is a multiple of BLOCK_N
    col_ptr,  # (M, D)
    col_weight_ptr,  # (M,)
    table_ptr,
    shift_ptr,
    scale_ptr,  # (1,), of the scaled rows
    differences_ptr,
    value_ptr,  # (SPLITS, N)
    slope_ptr,  # (SPLITS, N), zero
    moments_ptr,  # (SPLITS, N, D), Σ_j w_j·(W − shift)·(u_j − u_i)
    M,  # columns without padding
    WITHIN: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums of `sweep_kernel` from u_j − u_i itself, for points whose norms dwarf the bandwidth."""
    if tl.load(differences_ptr) == 0:
        return
    # where
    d_out = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    row_start = offs_n[:, None].to(tl.int64) * D

    # load
    value_shift = tl.load(shift_ptr)
    scale = tl.load(scale_ptr)
    slope_shift = tl.load(shift_ptr + 1)
    table = _table(table_ptr, GRADIENT, BANDWIDTHS, SQUARINGS)
    row_out = tl.load(row_ptr + row_start + offs_d[None, :])

    # compute
    value_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=row_out.dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=row_out.dtype)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    first = split * share
    last = tl.minimum(first + share, M)
    for start_m in range(first, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        col_start = offs_m[:, None].to(tl.int64) * D
        exponent = tl.zeros([BLOCK_N, BLOCK_M], dtype=row_out.dtype)
        for start_k in range(0, D, BLOCK_K):
            row = tl.load(row_ptr + row_start + (start_k + offs_k)[None, :])
            col = tl.load(col_ptr + col_start + (start_k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
            difference = (row[:, None, :] - col[None, :, :]) * scale
            exponent -= 0.5 * tl.sum(difference * difference, 2)
        value, slope = _radial(exponent, table, table_ptr, value_shift, slope_shift, GRADIENT, BANDWIDTHS, SQUARINGS)
        # A padded column is a pair of nothing; loading zeros alone would make it a pair with the origin.
        counts = mask_m[None, :] & ((offs_n[:, None] != offs_m[None, :]) | (not WITHIN))
        value = tl.where(counts, value, 0.0)
        slope = tl.where(counts, slope, 0.0)
        if WEIGHTED:
            col_weight = tl.load(col_weight_ptr + offs_m, mask=mask_m, other=0.0)
            value = value * col_weight[None, :]
            slope = slope * col_weight[None, :]
        value_acc += value
        if GRADIENT:
            col = tl.load(col_ptr + col_start + offs_d[None, :], mask=mask_m[:, None], other=0.0)
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - row_out[:, None, :]) * scale), 1)

    # store
    if d_out == 0:
        tl.store(value_ptr + tl.cast(split, tl.int64) * rows + offs_n, tl.sum(value_acc, 1))
        if GRADIENT:
            tl.store(slope_ptr + tl.cast(split, tl.int64) * rows + offs_n, tl.zeros([BLOCK_N], dtype=row_out.dtype))
    if GRADIENT:
        tl.store(moments_ptr + tl.cast(split, tl.int64) * rows * D + row_start + offs_d[None, :], moments)


def pack_squarings(squarings: tuple[int, ...]) -> int:
    """The constexpr SQUARINGS."""
    return sum(n << (_SQUARING_BITS * b) for b, n in enumerate(squarings))


@dataclass
class _Operands:
    """One sample as the kernels read it: padded to whole blocks with rows of weight zero and features that are zero."""

    points: Tensor  # (N, D), as they came
    hi: Tensor  # (N, D), centred and scaled, in the dtype of the products
    lo: Tensor
    half: Tensor  # (N,), −inf in the padding
    weights: Tensor | None  # (N,)
    rows: int
    dim: int

    def product(self) -> Tensor:
        """The rows as the products see them."""
        dtype = self.points.dtype
        return self.hi.to(dtype) if self.hi is self.lo else self.hi.to(dtype) + self.lo.to(dtype)

    @staticmethod
    def of(z: Tensor, weights: Tensor | None, centre: Tensor, scale: Tensor, mode: int, config: SweepConfig) -> _Operands:
        rows, dim = z.shape
        padding = -rows % config.block_n
        blocks = (0, padded_dim(dim, config) - dim, 0, padding)
        points, scaled = (torch.nn.functional.pad(t, blocks).contiguous() for t in (z, ((z - centre).double() * scale).to(z.dtype)))
        hi = lo = scaled
        if mode in (BF16.value, SPLIT.value):
            hi = lo = scaled.to(torch.bfloat16)
        if mode == SPLIT.value:
            lo = (scaled - hi).to(torch.bfloat16)
        half = torch.full_like(scaled[:, 0], float("-inf"))
        operands = _Operands(points, hi, lo, half, weights, rows, dim)
        # Norms of what the products see, so that a point stays at distance zero from itself.
        half[:rows] = operands.product()[:rows].square().sum(1).mul_(-0.5)
        if weights is not None:
            operands.weights = torch.nn.functional.pad(weights, (0, padding))
        return operands


@dataclass
class Points:
    """One sample, and what has pulled on its rows so far."""

    z: Tensor  # (N, D), centred
    weights: Tensor | None
    operands: _Operands
    pull: Tensor | None


class Sweep:
    """`fastvae.radial.Sweep` on a GPU."""

    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor, gradient: bool, precision: str) -> None:
        if not isinstance(kernel.kernel, RBF):
            raise NotImplementedError(f"kernel={kernel.kernel.name!r} must have backend='cpu' or 'reference', got 'triton'")
        dtype = samples[0].dtype
        self.centre = centre
        self.mode = IEEE.value if dtype == torch.float64 else PRECISION[precision]
        self.bandwidths = len(kernel.squarings)
        self.squarings = pack_squarings(kernel.squarings)
        self.device = device_limits(centre.device)
        products = "float64" if dtype == torch.float64 else precision
        self.config = sweep_config(samples[0].shape[1], products, gradient, self.bandwidths, self.device.architecture)
        self.difference_config = difference_config(dtype.itemsize)
        slopes = kernel.weights * kernel.ratios
        self.scale = (2 * LOG2_E * kernel.gamma[0]).sqrt()
        self.rounded_scale = self.scale.to(dtype)
        self.table = torch.stack([kernel.ratios, kernel.weights, slopes]).to(dtype)
        # With one bandwidth the kernels leave its weight out.
        self.unit = kernel.weights[0] if self.bandwidths == 1 else 1.0
        shifts = torch.stack([kernel.weights @ kernel.shifts, slopes @ kernel.slope_shifts])
        self.slope_shift = shifts[1].to(dtype)
        self.shifts = (kernel.shifts.expand(2) if self.bandwidths == 1 else shifts).to(dtype).contiguous()
        limit = SPLIT_LIMIT if self.mode == SPLIT.value else EXPONENT_ERROR[dtype] / torch.finfo(dtype).eps
        radius2 = torch.stack([(z - centre).square().sum(1).max() for z in samples]).max()
        self.differences = (kernel.gamma[-1] * radius2 > limit).to(torch.int32)

    def points(self, z: Tensor, weights: Tensor | None, gradient: bool) -> Points:
        operands = _Operands.of(z, weights, self.centre, self.scale, self.mode, self.config)
        return Points(z - self.centre, weights, operands, torch.zeros_like(z) if gradient else None)

    def within(self, a: Points, scale: float | Tensor) -> Tensor:
        return self._add(a, a, scale)

    def across(self, a: Points, b: Points, scale: float | Tensor) -> Tensor:
        if b.pull is not None:
            self._add(b, a, scale)
        return self._add(a, b, scale)

    def pull(self, a: Points) -> Tensor:
        assert a.pull is not None
        return a.pull

    def _add(self, rows: Points, columns: Points, scale: float | Tensor) -> Tensor:
        """Σ_ij w_i·w_j·(k − shift); the pull of the columns on the rows is added to theirs."""
        value, pull = self.row_sums(rows.operands, columns.operands, rows.pull is not None)
        if rows.pull is not None:
            # What the sweep leaves out of each pair, in closed form.
            mean = columns.z.mean(0) if columns.weights is None else columns.weights @ columns.z
            rows.pull += scale * (pull + self.slope_shift * (rows.z - mean))
        return value.mean() if rows.weights is None else rows.weights.double() @ value

    def row_sums(self, rows: _Operands, columns: _Operands, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Σ_j w_j·(k − shift) (N,) and Σ_j w_j·(W − shift)·(u_i − u_j) (N, D), with w = 1/M where the columns have no weights."""
        within = rows is columns
        n, d = rows.points.shape
        m = columns.half.numel()
        config = self.config
        blocks = (n // config.block_n, d // config.block_d if gradient else 1)
        splits = column_splits(blocks[0] * blocks[1], m // config.block_m, self.device.multiprocessors)
        value = rows.half.new_empty(splits, n)
        slope = torch.empty_like(value) if gradient else value
        moments = rows.points.new_empty(splits, n, d) if gradient else value
        weights = columns.half if columns.weights is None else columns.weights
        weighted = columns.weights is not None
        constants = {"GRADIENT": gradient, "WEIGHTED": weighted, "BANDWIDTHS": self.bandwidths, "SQUARINGS": self.squarings, "D": d}
        sweep_kernel[(*blocks, splits)](
            rows.hi, rows.lo, rows.half, columns.hi, columns.lo, columns.half, weights, self.table, self.shifts, self.differences,
            value, slope, moments, m, m - columns.rows, **constants, WITHIN=within,
            SYMMETRIC=within and not gradient and not weighted, MODE=self.mode, **config.launch(),
        )  # fmt: skip
        config = self.difference_config
        differences_kernel[(n // config.block_n, d // config.block_d if gradient else 1, splits)](
            rows.points, columns.points, weights, self.table, self.shifts, self.rounded_scale, self.differences, value, slope, moments,
            columns.rows, **constants, WITHIN=within, **config.launch(),
        )  # fmt: skip
        mean = 1 / columns.rows if columns.weights is None else 1.0
        value = value.sum(0, dtype=torch.float64)[: rows.rows] * (mean * self.unit)
        if not gradient:
            return value, None
        pull = torch.addcmul(moments.sum(0).neg_(), slope.sum(0)[:, None], rows.product())
        return value, pull[: rows.rows, : rows.dim] * (mean * self.unit / self.scale).to(pull.dtype)
