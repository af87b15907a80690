"""K(x, y)·v and its gradient on a GPU: formulas (1) and (2) of `fastvae.reference.kernel_matmul`, tile by tile, without K.

Prepare (`fastvae.kernels.prepare`), sweep, finish, as in `fastvae.kernels.mmd`: a block of rows goes over all columns. Forward keeps
Σ_j k_ij·v_j; the gradient to the rows is a sweep in which the weight of a pair is g_i·v_j, a product of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels import few_pairs
from fastvae.kernels.config import MatmulConfig, column_splits, device_limits, difference_products, matmul_config
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.pairs import (
    DIFFERENCES,
    POLYNOMIAL,
    column_exponent,
    column_parts,
    difference_exponent,
    dot,
    load_parameters,
    load_parts,
    load_table,
    products_of,
    radial,
    row_sums,
    split,
)
from fastvae.kernels.prepare import (
    CONSTANT,
    GRADIENT_SCALE,
    ROUTE,
    ROW_BLOCK,
    SCALE,
    UNIT,
    VALUE_SHIFT,
    Evaluation,
    Sample,
    block_of,
    evaluation_of,
    is_narrow,
    padded,
    part_buffers,
    prepare,
    seen_rows,
    store_parts,
)
from fastvae.radial import RationalQuadratic


@triton.jit(do_not_specialize=["n", "m", "first_y", "rows"])
def factors_kernel(
    g_ptr,  # (n, COLUMNS)
    v_ptr,  # (m, COLUMNS)
    upstream_ptr,  # (COLUMNS, COLUMNS), float64, of a quadratic form
    plan_ptr,
    hi_ptr,  # (rows, C), g, from `first_y` on v, as the products of the pass that runs take them
    lo_ptr,
    hi16_ptr,
    lo16_ptr,
    sum_ptr,  # (programs, C), float64, sums over the rows of a program
    poison_ptr,  # (programs, C / BLOCK_C), float64, 0, or nan if a number is not finite
    n,
    m,
    first_y,
    rows,
    CHUNKS: tl.constexpr,  # programs for each of g and v
    COLUMNS: tl.constexpr,
    C: tl.constexpr,  # columns with their padding
    MODE: tl.constexpr,
    RADIAL: tl.constexpr,
    FORM: tl.constexpr,  # v·(A + Aᵀ) of the upstream A takes the place of g
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The factors of a share of the rows in a block of columns."""
    # where
    program = tl.program_id(0)
    dtype: tl.constexpr = hi_ptr.dtype.element_ty
    is_v = program >= CHUNKS
    start, end = tl.where(is_v, first_y, 0), tl.where(is_v, rows, first_y)
    source_ptr, count = g_ptr, n
    if is_v:
        source_ptr, count = v_ptr, m
    share = tl.cdiv(tl.cdiv(end - start, BLOCK_N), CHUNKS) * BLOCK_N
    first = (program % CHUNKS) * share
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    route = tl.load(plan_ptr + ROUTE)

    # load, compute, store
    total = tl.zeros([BLOCK_C], dtype=tl.float64)
    for start_n in range(first, tl.minimum(first + share, end - start), BLOCK_N):
        local = start_n + tl.arange(0, BLOCK_N)
        mask = (local < count)[:, None] & (offs_c < COLUMNS)[None, :]
        factor = tl.load(source_ptr + local.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :], mask=mask, other=0.0).to(dtype)
        if FORM:  # noqa: SIM102, one is known to the compiler and the other is not
            if is_v == 0:
                product = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64)
                for column in range(COLUMNS):
                    weight = tl.load(v_ptr + local.to(tl.int64) * COLUMNS + column, mask=local < count, other=0.0).to(tl.float64)
                    upstream = tl.load(upstream_ptr + column * COLUMNS + offs_c, mask=offs_c < COLUMNS, other=0.0)
                    upstream += tl.load(upstream_ptr + offs_c * COLUMNS + column, mask=offs_c < COLUMNS, other=0.0)
                    product += weight[:, None] * upstream[None, :]
                factor = product.to(dtype)
        total += tl.sum(factor.to(tl.float64), 0)
        offs = (start + local).to(tl.int64)[:, None] * C + offs_c[None, :]
        inside = (local < end - start)[:, None] & (offs_c < C)[None, :]
        if RADIAL:
            if route == 0:
                store_parts(factor, factor, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs, inside, MODE)
            else:
                store_parts(factor, factor, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs, inside, DIFFERENCES)
        else:
            store_parts(factor, factor, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs, inside, MODE)
    tl.store(sum_ptr + program.to(tl.int64) * C + offs_c, total)
    tl.store(poison_ptr + program * tl.num_programs(1) + tl.program_id(1), tl.sum(total * 0.0))


@triton.jit
def poison_of(poison_ptr, count, BLOCK: tl.constexpr):
    """0, or nan if a factor is not finite."""
    poison = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        poison += tl.load(poison_ptr + offs, mask=offs < count, other=0.0)
    return tl.sum(poison)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    row_hi_ptr,  # (N, D), scaled rows, in a split mode with their low parts; in DIFFERENCES mode rows as they came
    row_lo_ptr,
    row_half_ptr,  # (N,), −½‖u‖², or 0 for a polynomial
    col_hi_ptr,  # (M, D)
    col_lo_ptr,
    col_half_ptr,  # (M,), of a padded column what makes its k 0
    v_hi_ptr,  # (M, C), 0 in the padding
    v_lo_ptr,
    plan_ptr,  # (PLAN,), of `fastvae.kernels.prepare`
    table_ptr,
    out_ptr,  # (SPLITS, N, C), Σ_j (k − shift)·v_j
    M,  # columns with their padding
    PASS: tl.constexpr,
    WITHIN: tl.constexpr,  # rows and columns are the same sample, whose diagonal is left out
    MODE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # features of a step of the exponent's product
    BLOCK_C: tl.constexpr,  # columns of v of a program
):
    """A block of rows of K·v over a share of the columns of K; program 1 is the block of columns of v, program 2 the share."""
    if tl.load(plan_ptr + ROUTE) != PASS:
        return
    # where
    start_n = tl.program_id(0) * BLOCK_N
    part = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + offs_c[None, :]

    # load
    row_half = tl.load(row_half_ptr + offs_n)
    row_hi_ptrs = row_hi_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_lo_ptrs = row_lo_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, MODE)
    value_shift = tl.load(plan_ptr + VALUE_SHIFT).to(row_half.dtype)
    scale = tl.load(plan_ptr + SCALE).to(row_half.dtype)
    table = load_table(table_ptr, False, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, MODE)

    # compute
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=row_half.dtype)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    first = part * share
    last = tl.minimum(first + share, M)
    for start_m in range(first, last, BLOCK_M):
        if MODE == DIFFERENCES:
            exponent = difference_exponent(row_hi_ptr, col_hi_ptr, offs_n, start_m, scale, FAMILY, D, BLOCK_M)
        else:
            exponent, _, _ = column_exponent(
                row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, col_hi_ptr, col_lo_ptr, col_half_ptr, start_m,
                FAMILY, MODE, D, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        value, _ = radial(exponent, table, table_ptr, parameters, value_shift, 0.0, FAMILY, False, BANDWIDTHS, SQUARINGS)
        if WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            value = tl.where(offs_n[:, None] != offs_m[None, :], value, 0.0)
        start = tl.cast(start_m, tl.int64) * C
        v_hi, v_lo = load_parts(v_hi_ptr + start + local_v, v_lo_ptr + start + local_v, MODE)
        value_hi, value_lo = split(value, MODE)
        # From zero for each tile: a tensor core's accumulator truncates.
        out += dot(value_hi, value_lo, v_hi, v_lo, tl.zeros_like(out), MODE)

    # store
    out_start = (tl.cast(part, tl.int64) * rows + start_n) * C
    tl.store(out_ptr + out_start + (tl.arange(0, BLOCK_N)[:, None] * C + offs_c[None, :]), out)


@triton.jit(do_not_specialize=["first_y", "rows", "first_block"])
def gradient_kernel(
    hi_ptr,  # (rows, D), scaled rows of x, from `first_y` on of y, in a split mode with their low parts; in DIFFERENCES mode as they came
    lo_ptr,
    half_ptr,  # (rows,)
    factor_hi_ptr,  # (rows, C), g of the rows of x, v of those of y, 0 in the padding
    factor_lo_ptr,
    plan_ptr,
    table_ptr,
    slope_ptr,  # (SPLITS, swept rows), Σ_j (g_i·v_j)·W
    moments_ptr,  # (SPLITS, swept rows, D), Σ_j (g_i·v_j)·W·u_j, in DIFFERENCES mode of u_j − u_i
    first_y,
    rows,
    first_block,  # of the rows that are swept
    PASS: tl.constexpr,
    WITHIN: tl.constexpr,  # rows of x against themselves, without the pairs i = i, v after g among the factors
    MODE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # features of a block of moments
    BLOCK_C: tl.constexpr,  # columns of v of a step of the product with g
):
    """The gradient sums of a block of rows over a share of the columns; program 1 is the block of moments, program 2 the share."""
    if tl.load(plan_ptr + ROUTE) != PASS:
        return
    # where
    start_n = (first_block + tl.program_id(0)) * BLOCK_N
    d_out = tl.program_id(1)
    part = tl.program_id(2)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    row_factor = tl.cast(start_n, tl.int64) * C + (tl.arange(0, BLOCK_N)[:, None] * C + tl.arange(0, BLOCK_C)[None, :])
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + tl.arange(0, BLOCK_C)[None, :]
    is_x = start_n < first_y
    first_m = 0 if WITHIN else tl.where(is_x, first_y, 0)
    last_m = first_y if WITHIN else tl.where(is_x, rows, first_y)

    # load
    row_half = tl.load(half_ptr + offs_n)
    row_hi_ptrs = hi_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_lo_ptrs = lo_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, MODE)
    g_hi, g_lo = load_parts(factor_hi_ptr + row_factor, factor_lo_ptr + row_factor, MODE)
    scale = tl.load(plan_ptr + SCALE).to(row_half.dtype)
    table = load_table(table_ptr, True, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, MODE)
    if MODE == DIFFERENCES:
        row_out = tl.load(hi_ptr + row_start + (local_n + offs_d[None, :]))

    # compute
    slope_acc = tl.zeros([BLOCK_N, 8], dtype=row_half.dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=row_half.dtype)
    share = tl.cdiv(tl.cdiv(last_m - first_m, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    first = first_m + part * share
    last = tl.minimum(first + share, last_m)
    for start_m in range(first, last, BLOCK_M):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        if MODE == DIFFERENCES:
            exponent = difference_exponent(hi_ptr, hi_ptr, offs_n, start_m, scale, FAMILY, D, BLOCK_M)
        else:
            exponent, col_hi, col_lo = column_exponent(
                row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, hi_ptr, lo_ptr, half_ptr, start_m,
                FAMILY, MODE, D, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        _, slope = radial(exponent, table, table_ptr, parameters, 0.0, 0.0, FAMILY, True, BANDWIDTHS, SQUARINGS)
        coefficient = tl.zeros([BLOCK_N, BLOCK_M], dtype=row_half.dtype)
        start = tl.cast(start_m + first_y if WITHIN else start_m, tl.int64) * C
        if C == BLOCK_C:
            v_hi, v_lo = load_parts(factor_hi_ptr + start + local_v, factor_lo_ptr + start + local_v, MODE)
            coefficient = dot(g_hi, g_lo, tl.trans(v_hi), tl.trans(v_lo), coefficient, MODE)
        else:
            for start_c in range(0, C, BLOCK_C):
                row_ptrs = row_factor + start_c
                column_ptrs = start + local_v + start_c
                left_hi, left_lo = load_parts(factor_hi_ptr + row_ptrs, factor_lo_ptr + row_ptrs, MODE)
                v_hi, v_lo = load_parts(factor_hi_ptr + column_ptrs, factor_lo_ptr + column_ptrs, MODE)
                coefficient = dot(left_hi, left_lo, tl.trans(v_hi), tl.trans(v_lo), coefficient, MODE)
        slope = slope * coefficient
        if WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            slope = tl.where(offs_n[:, None] != offs_m[None, :], slope, 0.0)
        if MODE == DIFFERENCES:
            col = tl.load(hi_ptr + tl.cast(start_m, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]))
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - row_out[:, None, :]) * scale), 1)
        else:
            if FAMILY < POLYNOMIAL:
                slope_acc += row_sums(slope)
            col_hi, col_lo = column_parts(col_hi, col_lo, hi_ptr, lo_ptr, start_m, d_out, MODE, D, BLOCK_M, BLOCK_K, BLOCK_D)
            slope_hi, slope_lo = split(slope, MODE)
            moments += dot(slope_hi, slope_lo, col_hi, col_lo, tl.zeros_like(moments), MODE)

    # store
    out = tl.cast(part, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if d_out == 0:
        tl.store(slope_ptr + out * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(slope_acc, 1))
    tl.store(moments_ptr + out * BLOCK_N * D + (local_n + offs_d[None, :]), moments)


@triton.jit
def sum_of_columns(total_ptr, offs_c, CHUNKS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_j v_j, from the sums of `factors_kernel`."""
    total = tl.zeros([BLOCK_C], dtype=tl.float64)
    for chunk in range(CHUNKS):
        total += tl.load(total_ptr + chunk * C + offs_c)
    return total


@triton.jit
def sum_of_shares(sums_ptr, offs_n, offs_c, mask, rows, splits, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_j (k − shift)·v_j, from the sums of `matmul_kernel` over all shares of the columns."""
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64)
    for split_n in range(0, splits):
        row = tl.cast(split_n, tl.int64) * rows + offs_n
        out += tl.load(sums_ptr + row[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float64)
    return out


@triton.jit(do_not_specialize=["n", "rows", "splits", "poisons"])
def matmul_finish_kernel(
    sums_ptr,  # (SPLITS, rows, C), of `matmul_kernel`
    v_ptr,  # (n, COLUMNS), of a sample against itself
    total_ptr,  # (CHUNKS, C), of `factors_kernel`
    poison_ptr,
    plan_ptr,
    out_ptr,  # (n, COLUMNS)
    n,
    rows,
    splits,
    poisons,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    WITHIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """K·v of a block of rows in a block of columns: the sums of all shares, and what the shift leaves out of each pair."""
    # where
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_n < n)[:, None] & (offs_c < COLUMNS)[None, :]
    offs_out = offs_n.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :]

    # load and compute
    paired = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64) + sum_of_columns(total_ptr, offs_c, CHUNKS, C, BLOCK_C)[None, :]
    if WITHIN:
        paired -= tl.load(v_ptr + offs_out, mask=mask, other=0.0).to(tl.float64)
    out = sum_of_shares(sums_ptr, offs_n, offs_c, mask, rows, splits, C, BLOCK_N, BLOCK_C)
    out = out * tl.load(plan_ptr + UNIT) + paired * tl.load(plan_ptr + CONSTANT) + poison_of(poison_ptr, poisons, 1024)

    # store
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "m", "first_y", "first_row", "swept", "splits", "poisons"])
def gradient_finish_kernel(
    hi_ptr,
    lo_ptr,
    hi16_ptr,
    lo16_ptr,
    slope_ptr,
    moments_ptr,
    poison_ptr,
    plan_ptr,
    grad_x_ptr,  # (n, FEATURES)
    grad_y_ptr,
    n,
    m,
    first_y,
    first_row,  # of the rows that are swept
    swept,
    splits,
    poisons,
    RADIAL: tl.constexpr,
    MODE: tl.constexpr,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of a block of rows in a block of features."""
    # where
    out_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first_row + out_row
    grad_ptr, local, count = grad_x_ptr, row, n
    if first_row + tl.program_id(0) * BLOCK_N >= first_y:
        grad_ptr, local, count = grad_y_ptr, row - first_y, m
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = local < count
    mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
    dtype: tl.constexpr = slope_ptr.dtype.element_ty

    # load and compute
    scale = 0.5 * tl.load(plan_ptr + GRADIENT_SCALE) + poison_of(poison_ptr, poisons, 1024)
    slope = tl.zeros([BLOCK_N], dtype=dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    for part in range(0, splits):
        source = tl.cast(part, tl.int64) * swept + out_row
        if RADIAL:
            slope += tl.load(slope_ptr + source, mask=mask_n, other=0.0)
        moments += tl.load(moments_ptr + source[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    pull = moments
    if RADIAL:
        pull = -moments
        # Sums of differences need no row beside them.
        if tl.load(plan_ptr + ROUTE) == 0:
            offs = row.to(tl.int64)[:, None] * D + offs_d[None, :]
            pull += slope[:, None] * seen_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs, mask, dtype, MODE)

    # store
    tl.store(grad_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], scale.to(dtype) * pull, mask=mask)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a launch takes from the kernel, dtype and numbers of features and columns alone; configs by whether it is the gradient's."""

    configs: dict[bool, tuple[MatmulConfig, ...]]  # of each pass
    features: int
    columns: int
    block: int  # rows


@functools.lru_cache(maxsize=256)
def _choice(evaluation: Evaluation, dim: int, columns: int, dtype: torch.dtype, device: torch.device) -> _Choice:
    architecture, powers = device_limits(device).architecture, isinstance(evaluation.kernel, RationalQuadratic)
    configs = {}
    for gradient in (False, True):
        names = (
            difference_products(dtype.itemsize) if mode == DIFFERENCES.value else products_of(mode, dtype) for mode in evaluation.modes
        )
        configs[gradient] = tuple(
            matmul_config(dim, columns, name, gradient, evaluation.bandwidths, architecture, powers) for name in names
        )
    every = [*configs[False], *configs[True]]
    return _Choice(
        configs,
        features=max(config.padded(dim, config.block_k, config.block_d) for config in every),
        columns=max(config.padded(columns, config.block_c) for config in every),
        block=max(ROW_BLOCK, *(max(config.block_n, config.block_m) for config in every)),
    )


@dataclass(frozen=True, eq=False)
class _Factors:
    """g and v, as `factors_kernel` writes them."""

    buffers: tuple[Tensor, Tensor, Tensor, Tensor]
    sums: Tensor
    poison: Tensor

    def parts(self, mode: int) -> tuple[Tensor, Tensor]:
        hi, lo, hi16, lo16 = self.buffers
        return (hi16, lo16) if is_narrow(mode) else (hi, lo)


class Product:
    """Sums over the columns of K, of one or two samples."""

    def __init__(self, kernel: KernelNumbers, samples: Sequence[Tensor], columns: int, precision: str) -> None:
        self.device, self.count, self.dim = samples[0].device, columns, samples[0].shape[1]
        self.dtype = torch.float64 if samples[0].dtype == torch.float64 else torch.float32
        evaluation = evaluation_of(kernel.kernel, kernel.count, kernel.squarings, self.dtype, precision, self_pairs=True)
        self.choice = _choice(evaluation, self.dim, columns, self.dtype, self.device)
        self.evaluation, self.sizes = evaluation, [z.shape[0] for z in samples]
        self.operands = prepare([Sample.of(z) for z in samples], kernel, evaluation, self.choice.features, self.choice.block)
        self.first_y, self.rows = self.operands.first_y, self.operands.rows

    def factors(self, *given: Tensor, upstream: Tensor | None = None) -> _Factors:
        """Of g (N, C) and v (M, C), or of one alone; of v twice with an upstream A (C, C) in float64, of v·(A + Aᵀ) in the place of g."""
        # In one dtype, as a pointer to either is; zeros and ones need no wider one.
        choice, given = self.choice, tuple((t if t.dtype == torch.bool else t.to(self.dtype)).contiguous() for t in given)
        g, v = given[0], given[-1]
        first_y = padded(g.shape[0], choice.block)
        rows = first_y + (padded(v.shape[0], choice.block) if len(given) == 2 else 0)
        c, chunks = choice.columns, _CHUNKS if rows > 8 * ROW_BLOCK else 1
        block_c, programs = block_of(c), len(given) * chunks
        sums, poison = torch.empty(programs * (c + c // block_c), dtype=torch.float64, device=self.device).split(
            (programs * c, programs * (c // block_c))
        )
        buffers = part_buffers((rows, c), self.dtype, self.evaluation.modes, self.device)
        launch(
            factors_kernel, (self.operands.key, self.count, chunks, upstream is not None, tensor_key(g, v)), self.device,
            (programs, c // block_c, 1),
            (
                g, v, self.operands.plan if upstream is None else upstream, self.operands.plan, *buffers, sums, poison,
                g.shape[0], v.shape[0], first_y, rows,
            ),
            lambda: {
                "CHUNKS": chunks, "COLUMNS": self.count, "C": c, "MODE": self.evaluation.modes[0],
                "RADIAL": self.evaluation.kernel.radial, "FORM": upstream is not None, "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c,
                "num_warps": 8,
            },
        )  # fmt: skip
        return _Factors(buffers, sums.view(len(given), chunks, c), poison)

    def sweep(self, factors: _Factors, *, transposed: bool = False, within: bool = False) -> tuple[Tensor, int, int]:
        """The sums of `matmul_kernel`, the rows of each share, and the number of shares."""
        d, c, configs = self.choice.features, self.choice.columns, self.choice.configs[False]
        # The factors are those of the columns, or g before v.
        x, y = slice(0, self.first_y), slice(self.first_y, self.rows)
        if within:
            y = x
        if transposed:
            x, y = y, x
        n, m = x.stop - x.start, y.stop - y.start
        programs, tiles = (n // configs[0].block_n) * (c // configs[0].block_c), m // configs[0].block_m
        splits = column_splits(programs, tiles, device_limits(self.device).multiprocessors)
        sums = torch.empty(splits * n * c, dtype=self.dtype, device=self.device)
        key, half = (self.operands.key, self.count, within), self.operands.half
        for number, (mode, config) in enumerate(zip(self.evaluation.modes, configs, strict=True)):
            # Rows of bfloat16 lie side by side too, in the first half of their memory.
            hi, lo = (part.view(-1, d) for part in self.operands.parts(mode))
            launch(
                matmul_kernel, (key, number), self.device, (n // config.block_n, c // config.block_c, splits),
                (
                    hi[x], lo[x], half[x], hi[y], lo[y], half[y], *factors.parts(mode), self.operands.plan, self.operands.table, sums, m,
                ),
                lambda number=number, mode=mode, config=config: {
                    "PASS": number, "WITHIN": within, "MODE": mode, "D": d, "C": c,
                } | self.evaluation.constants | config.launch(moments=False),
            )  # fmt: skip
        return sums, n, splits

    def matmul(self, factors: _Factors, dtype: torch.dtype, *, transposed: bool = False, within: Tensor | None = None) -> Tensor:
        """K·v (N, C), or if `transposed` Kᵀ·g; with `within` this v, and the rows against themselves without the pairs i = i."""
        sums, n, splits = self.sweep(factors, transposed=transposed, within=within is not None)
        size, c = self.sizes[-1] if transposed else self.sizes[0], self.choice.columns
        out = torch.empty((size, self.count), dtype=dtype, device=self.device)
        own, block_c, chunks = out if within is None else within, block_of(c), factors.sums.shape[1]
        key = self.operands.key, self.count, within is not None, dtype, chunks, tensor_key(own)
        launch(
            matmul_finish_kernel, key, self.device, (triton.cdiv(size, ROW_BLOCK), c // block_c, 1),
            (sums, own, factors.sums, factors.poison, self.operands.plan, out, size, n, splits, factors.poison.numel()),
            lambda: {
                "CHUNKS": chunks, "COLUMNS": self.count, "C": c, "WITHIN": within is not None, "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c
            },
        )  # fmt: skip
        return out

    def gradients(self, factors: _Factors, *, x: bool, y: bool, within: bool = False) -> list[Tensor | None]:
        """Σ_j g_i·v_j·∂k_ij/∂x_i (N, D) and the same of y (M, D), those wanted; with `within` of x against itself, without j = i."""
        d, configs = self.choice.features, self.choice.configs[True]
        first_row, swept = 0 if x else self.first_y, (self.first_y if x else 0) + (self.rows - self.first_y if y else 0)
        programs = (swept // configs[0].block_n) * (d // configs[0].block_d)
        columns = self.first_y if within or not x else self.rows - self.first_y
        splits = column_splits(programs, columns // configs[0].block_m, device_limits(self.device).multiprocessors)
        slope, moments = torch.empty(splits * swept * (1 + d), dtype=self.dtype, device=self.device).split(
            (splits * swept, splits * swept * d)
        )
        key, operands = (self.operands.key, self.count, within), self.operands
        for number, (mode, config) in enumerate(zip(self.evaluation.modes, configs, strict=True)):
            launch(
                gradient_kernel, (key, number), self.device, (swept // config.block_n, d // config.block_d, splits),
                (
                    *operands.parts(mode), operands.half, *factors.parts(mode), operands.plan, operands.table, slope, moments,
                    self.first_y, self.rows, first_row // config.block_n,
                ),
                lambda number=number, mode=mode, config=config: {
                    "PASS": number, "WITHIN": within, "MODE": mode, "D": d, "C": self.choice.columns,
                } | self.evaluation.constants | config.launch(moments=True),
            )  # fmt: skip
        grads = [
            torch.empty((size, self.dim), dtype=self.dtype, device=self.device) if wanted else None
            for size, wanted in zip((self.sizes * 2)[:2], (x, y), strict=True)
        ]
        grad_x, grad_y = (slope if grad is None else grad for grad in grads)
        block_d = block_of(d)
        launch(
            gradient_finish_kernel, key, self.device, (swept // ROW_BLOCK, d // block_d, 1),
            (
                *operands.buffers, slope, moments, factors.poison, operands.plan, grad_x, grad_y, self.sizes[0], self.sizes[-1],
                self.first_y, first_row, swept, splits, factors.poison.numel(),
            ),
            lambda: {
                "RADIAL": self.evaluation.kernel.radial, "MODE": self.evaluation.modes[0], "FEATURES": self.dim, "D": d,
                "BLOCK_N": ROW_BLOCK, "BLOCK_D": block_d,
            },
        )  # fmt: skip
        return grads


# Programs that write each of the factors.
_CHUNKS = 64


def kernel_matmul(kernel: KernelNumbers, x: Tensor, y: Tensor, v: Tensor, precision: str) -> Tensor:
    """Σ_j k(x_i, y_j)·v_j, shape (N, C), of x (N, D), y (M, D) and v (M, C), in the accumulation dtype."""
    if (few := few_pairs.evaluation_of_few(kernel, x, y, v.shape[1])) is not None:
        return few_pairs.matmul(few, kernel, x, y, v)
    product = Product(kernel, [x, y], v.shape[1], precision)
    return product.matmul(product.factors(v), product.dtype)


def kernel_matmul_backward(
    kernel: KernelNumbers,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    grad: Tensor,
    x_grad: bool,
    y_grad: bool,
    v_grad: bool,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of Σ_ij grad_i·v_j·k(x_i, y_j) to x, y and v, those wanted."""
    if (few := few_pairs.evaluation_of_few(kernel, x, y, v.shape[1])) is not None:
        return (
            few_pairs.gradient(few, kernel, x, y, grad, v) if x_grad else None,
            few_pairs.gradient(few, kernel, y, x, v, grad) if y_grad else None,
            few_pairs.matmul(few, kernel, y, x, grad) if v_grad else None,
        )
    product = Product(kernel, [x, y], v.shape[1], precision)
    factors = product.factors(grad, v)
    grads: list[Tensor | None] = [None, None]
    if x_grad or y_grad:
        grads = product.gradients(factors, x=x_grad, y=y_grad)
    return grads[0], grads[1], product.matmul(factors, product.dtype, transposed=True) if v_grad else None
