"""The pair sweep of MMD on a GPU: a block of rows against all columns, tile by tile, its sums kept in registers.

The sums over columns are those of formula (1) of `fastvae.reference.mmd` and of a row's gradient, Σ_j w_j·W_ij·(u_i − u_j), over the scaled
rows of `fastvae.kernels.pairs`. Each program owns its rows: no atomics, a fixed order, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.config import column_splits, device_limits, difference_config, padded_dim, sweep_config
from fastvae.kernels.pairs import (
    DIFFERENCES,
    GAUSSIAN,
    POLYNOMIAL,
    Evaluation,
    Operands,
    column_exponent,
    column_parts,
    dot,
    load_parameters,
    load_parts,
    load_table,
    products_of,
    radial,
    row_sums,
    split,
)
from fastvae.radial import KernelSum, RationalQuadratic


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
    parameters,
    value_shift,
    slope_shift,
    start_m,
    d_out,
    value_acc,
    slope_acc,
    moments,
    DIAGONAL: tl.constexpr,
    SLOPES: tl.constexpr,
    FAMILY: tl.constexpr,
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
    offs_m = start_m + tl.arange(0, BLOCK_M)
    exponent, col_hi, col_lo = column_exponent(
        row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, col_hi_ptr, col_lo_ptr, col_half_ptr, start_m, FAMILY, MODE, D, BLOCK_M, BLOCK_K
    )
    value, slope = radial(exponent, table, table_ptr, parameters, value_shift, slope_shift, FAMILY, GRADIENT, BANDWIDTHS, SQUARINGS)
    if DIAGONAL:
        off_diagonal = offs_n[:, None] != offs_m[None, :]
        value = tl.where(off_diagonal, value, 0.0)
        slope = tl.where(off_diagonal, slope, 0.0)
    if WEIGHTED:
        col_weight = tl.load(col_weight_ptr + offs_m)
        value = value * col_weight[None, :]
        slope = slope * col_weight[None, :]
    value_acc += row_sums(value)
    if GRADIENT:
        if SLOPES:
            slope_acc += row_sums(slope)
        col_hi, col_lo = column_parts(col_hi, col_lo, col_hi_ptr, col_lo_ptr, start_m, d_out, MODE, D, BLOCK_M, BLOCK_K, BLOCK_D)
        slope_hi, slope_lo = split(slope, MODE)
        moments = dot(slope_hi, slope_lo, col_hi, col_lo, moments, MODE)
    return value_acc, slope_acc, moments


@triton.jit(do_not_specialize=["row_blocks", "table_size", "padding"])
def sweep_kernel(
    row_hi_ptr,  # (B, N, D), scaled rows, and in SPLIT mode their low parts
    row_lo_ptr,
    row_half_ptr,  # (B, N), −½‖u‖², or 0 for a polynomial
    col_hi_ptr,  # (B, M, D)
    col_lo_ptr,
    col_half_ptr,  # (B, M), of a padded column what makes its k 0
    col_weight_ptr,  # (B, M)
    table_ptr,  # (B, table_size): ratios, weights and slopes of each bandwidth, then the parameters of the family
    shift_ptr,  # (B, 2), Σ_b of the shifted weights and slopes
    route_ptr,  # (B,), the number of the pass that runs
    value_ptr,  # (SPLITS, B, N), Σ_j w_j·(k − shift)
    slope_ptr,  # (SPLITS, B, N), Σ_j w_j·(W − shift)
    moments_ptr,  # (SPLITS, B, N, D), Σ_j w_j·(W − shift)·u_j
    row_blocks,  # N / BLOCK_N
    M,  # columns with their padding; N and M are multiples of BLOCK_N, so that no load needs a mask
    padding,  # columns that are padding
    table_size,
    ROUTE: tl.constexpr,
    BATCHED: tl.constexpr,  # B > 1
    WITHIN: tl.constexpr,  # rows and columns are the same sample, whose diagonal is left out
    SYMMETRIC: tl.constexpr,  # columns from the diagonal on, those right of it twice
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MODE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # features of a step of the exponent's product
    BLOCK_D: tl.constexpr,  # features of a block of moments
):
    """Row sums of a block of rows against a share of the columns of their problem, one of a batch of B.

    Program 0 is the block of all B·N rows, program 1 the block of moments, program 2 the share.
    """
    if BATCHED:
        # Bases of their own for the pointers take registers, which one problem is spared.
        problem = tl.program_id(0) // row_blocks
        route_ptr += problem
    if tl.load(route_ptr) != ROUTE:
        return
    # One bandwidth of a Gaussian has its value for slope, and of a polynomial only moments are wanted.
    SLOPES: tl.constexpr = FAMILY < POLYNOMIAL and (FAMILY != GAUSSIAN or BANDWIDTHS > 1)
    # where
    start_n = tl.program_id(0) * BLOCK_N
    d_out = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    if BATCHED:
        start_n -= problem * row_blocks * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    if BATCHED:
        first_row = tl.cast(problem, tl.int64) * row_blocks * BLOCK_N
        row_start += first_row * D
        row_half_ptr += first_row
        value_ptr += first_row
        slope_ptr += first_row
        first_column = tl.cast(problem, tl.int64) * M
        col_hi_ptr += first_column * D
        col_lo_ptr += first_column * D
        col_half_ptr += first_column
        col_weight_ptr += first_column
        table_ptr += problem * table_size
        shift_ptr += 2 * problem

    # load
    row_half = tl.load(row_half_ptr + offs_n)
    row_hi_ptrs = row_hi_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_lo_ptrs = row_lo_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, MODE)
    value_shift = tl.load(shift_ptr)
    slope_shift = tl.load(shift_ptr + 1)
    table = load_table(table_ptr, GRADIENT, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, MODE)

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
            col_half_ptr, col_weight_ptr, table, table_ptr, parameters, value_shift, slope_shift, shifted_m, d_out,
            value_acc, slope_acc, moments, False, SLOPES, FAMILY, GRADIENT, WEIGHTED, MODE, BANDWIDTHS, SQUARINGS,
            D, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if SYMMETRIC:
        value_acc += value_acc
    if WITHIN:  # noqa: SIM102, one is known to the compiler and the other is not
        if split == 0:
            for start_m in tl.range(start_n, start_n + BLOCK_N, BLOCK_M, num_stages=1):
                value_acc, slope_acc, moments = _tile(
                    row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, offs_n, col_hi_ptr, col_lo_ptr,
                    col_half_ptr, col_weight_ptr, table, table_ptr, parameters, value_shift, slope_shift, start_m, d_out,
                    value_acc, slope_acc, moments, True, SLOPES, FAMILY, GRADIENT, WEIGHTED, MODE, BANDWIDTHS, SQUARINGS,
                    D, BLOCK_M, BLOCK_K, BLOCK_D,
                )  # fmt: skip
    value = tl.sum(value_acc, 1)
    slope = value
    if SLOPES:
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


@triton.jit(do_not_specialize=["row_blocks", "columns", "M", "table_size"])
def differences_kernel(
    row_ptr,  # (B, N, D), rows as they came, not centred, whose differences round least; N is a multiple of BLOCK_N
    col_ptr,  # (B, columns, D), columns with their padding
    col_weight_ptr,  # (B, columns)
    table_ptr,
    shift_ptr,
    scale_ptr,  # (1,), of the scaled rows
    route_ptr,
    value_ptr,  # (SPLITS, B, N)
    slope_ptr,  # (SPLITS, B, N), zero
    moments_ptr,  # (SPLITS, B, N, D), Σ_j w_j·(W − shift)·(u_j − u_i)
    row_blocks,
    columns,
    M,  # columns without padding
    table_size,
    ROUTE: tl.constexpr,
    BATCHED: tl.constexpr,  # B > 1
    WITHIN: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums of `sweep_kernel` from u_j − u_i itself, for points whose norms dwarf the bandwidth."""
    if BATCHED:
        # Bases of their own for the pointers take registers, which one problem is spared.
        problem = tl.program_id(0) // row_blocks
        route_ptr += problem
    if tl.load(route_ptr) != ROUTE:
        return
    # where
    d_out = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    if BATCHED:
        offs_n -= problem * row_blocks * BLOCK_N
    row_start = offs_n[:, None].to(tl.int64) * D
    if BATCHED:
        first_row = tl.cast(problem, tl.int64) * row_blocks * BLOCK_N
        row_start += first_row * D
        value_ptr += first_row
        slope_ptr += first_row
        first_column = tl.cast(problem, tl.int64) * columns
        col_ptr += first_column * D
        col_weight_ptr += first_column
        table_ptr += problem * table_size
        shift_ptr += 2 * problem

    # load
    value_shift = tl.load(shift_ptr)
    scale = tl.load(scale_ptr)
    slope_shift = tl.load(shift_ptr + 1)
    table = load_table(table_ptr, GRADIENT, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, DIFFERENCES)
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
        value, slope = radial(exponent, table, table_ptr, parameters, value_shift, slope_shift, FAMILY, GRADIENT, BANDWIDTHS, SQUARINGS)
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


@dataclass
class Points:
    """One sample of each problem, and what has pulled on its rows so far."""

    z: Tensor  # (B, N, D)
    weights: Tensor | None  # (B, N)
    padded_weights: Tensor | None
    operands: list[Operands]  # for each pass
    pull: Tensor | None


class Sweep:
    """`fastvae.radial.Sweep` on a GPU."""

    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor, gradient: bool, precision: str) -> None:
        dtype = samples[0].dtype
        self.evaluation = Evaluation.of(kernel, samples, centre, precision)
        self.device = device_limits(centre.device)
        self.configs = [
            sweep_config(
                samples[0].shape[-1],
                products_of(mode, dtype),
                gradient,
                self.evaluation.bandwidths,
                self.device.architecture,
                isinstance(kernel.kernel, RationalQuadratic),
            )
            for mode in self.evaluation.modes
        ]
        self.difference_config = difference_config(dtype.itemsize)
        self.rounded_scale = self.evaluation.scale.to(dtype)

    def points(self, z: Tensor, weights: Tensor | None, gradient: bool) -> Points:
        # One padding for every pass, whose sums share their buffers.
        rows = z.shape[1] + -z.shape[1] % max(config.block_n for config in self.configs)
        features = max(padded_dim(z.shape[2], config) for config in self.configs)
        operands = Operands.of(z, self.evaluation, self.evaluation.modes, rows, features)
        padded = None if weights is None else torch.nn.functional.pad(weights, (0, rows - z.shape[1])).contiguous()
        return Points(z, weights, padded, operands, torch.zeros_like(z) if gradient else None)

    def within(self, a: Points, scale: Tensor) -> Tensor:
        return self._add(a, a, scale)

    def across(self, a: Points, b: Points, scale: Tensor) -> Tensor:
        if b.pull is not None:
            self._add(b, a, scale)
        return self._add(a, b, scale)

    def pull(self, a: Points) -> Tensor:
        assert a.pull is not None
        return a.pull

    def _add(self, rows: Points, columns: Points, scale: Tensor) -> Tensor:
        """Σ_ij w_i·w_j·(k − shift), (B,); the pull of the columns on the rows is added to theirs."""
        value, pull = self._row_sums(rows, columns)
        if rows.pull is not None:
            # What the sweep leaves out of each pair, in closed form.
            centre = self.evaluation.centre[:, None]
            centred = columns.z - centre
            mean = centred.mean(1) if columns.weights is None else torch.einsum("bm,bmd->bd", columns.weights, centred)
            left_out = self.evaluation.slope_shift[:, None, None] * (rows.z - centre - mean[:, None])
            rows.pull += scale.to(pull.dtype)[:, None, None] * (pull + left_out)
        return value.mean(1) if rows.weights is None else (rows.weights * value).sum(1)

    def _row_sums(self, rows: Points, columns: Points) -> tuple[Tensor, Tensor]:
        """Σ_j w_j·(k − shift) (B, N), float64, and if wanted the pull Σ_j w_j·(W − shift)·(z_i − z_j) (B, N, D), with w = 1/M where the
        columns have no weights."""
        gradient = rows.pull is not None
        within, weighted, evaluation = rows is columns, columns.weights is not None, self.evaluation
        points = rows.operands[0].points
        batch, n, d = points.shape
        m, columns_used = columns.operands[0].points.shape[1], columns.operands[0].rows
        config = self.configs[0]
        programs = batch * (n // config.block_n) * (d // config.block_d if gradient else 1)
        splits = column_splits(programs, m // config.block_m, self.device.multiprocessors)
        value = points.new_empty(splits, batch, n)
        slope = torch.empty_like(value) if gradient else value
        moments = points.new_empty(splits, batch, n, d) if gradient else value
        weights = value if columns.padded_weights is None else columns.padded_weights
        constants = {"GRADIENT": gradient, "WEIGHTED": weighted, "WITHIN": within, "D": d, "BATCHED": batch > 1, **evaluation.constants}
        symmetric = within and not gradient and not weighted
        table_size = evaluation.table.shape[-1]
        for number, (mode, config, a, b) in enumerate(zip(evaluation.modes, self.configs, rows.operands, columns.operands, strict=True)):
            blocks = n // config.block_n
            sweep_kernel[(batch * blocks, d // config.block_d if gradient else 1, splits)](
                a.hi, a.lo, a.half, b.hi, b.lo, b.half, weights, evaluation.table, evaluation.shifts, evaluation.route,
                value, slope, moments, blocks, m, m - columns_used, table_size,
                **constants, ROUTE=number, SYMMETRIC=symmetric, MODE=mode, **config.launch(),
            )  # fmt: skip
        if evaluation.by_differences is not None:
            config = self.difference_config
            blocks = n // config.block_n
            differences_kernel[(batch * blocks, d // config.block_d if gradient else 1, splits)](
                points, columns.operands[0].points, weights, evaluation.table, evaluation.shifts, self.rounded_scale, evaluation.route,
                value, slope, moments, blocks, m, columns_used, table_size,
                **constants, ROUTE=evaluation.by_differences, **config.launch(),
            )  # fmt: skip
        mean = 1 / columns_used if columns.weights is None else 1.0
        value = value.sum(0, dtype=torch.float64)[:, : rows.z.shape[1]] * (mean * evaluation.value_unit)
        if not gradient:
            return value, moments
        return value, evaluation.pull(moments.sum(0), slope.sum(0), rows.operands) * mean
