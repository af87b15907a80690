"""K(x, y)·v and its gradient on a GPU: formulas (1) and (2) of `fastvae.reference.kernel_matmul`, tile by tile, without K.

As in `fastvae.kernels.mmd` there are three steps: prepare (`fastvae.kernels.prepare`), sweep a block of rows over all columns, finish.
Forward sums k_ij·v_j. The gradient to the rows is a sweep in which the weight of a pair is g_i·v_j, itself a product of matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels import few_pairs
from fastvae.kernels.config import MatmulConfig, column_splits, device_limits, matmul_config, padded_dim
from fastvae.kernels.few_pairs import weighted_by_upstream
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.plan import (
    CONSTANT,
    GRADIENT_SCALE,
    PRECISION_PASS,
    SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    DeviceKernelPlan,
    device_kernel_plan,
)
from fastvae.kernels.prepare import ROW_BLOCK, Operands, Sample, as_product, block_of, from_row, padded, prepare
from fastvae.kernels.products import (
    DIFFERENCES,
    column_parts,
    dot,
    load_block,
    load_parts,
    load_rounded_rows,
    operand_buffers,
    operand_ptr,
    product_name,
    row_sums,
    split_operand,
    store_parts,
    tile_exponent,
)
from fastvae.kernels.reductions import add_shares, share_of, total
from fastvae.kernels.sums import evaluate_log2, evaluate_sum, load_parameters, load_table

# Tuples hold pointers in a kernel and tensors on the host. C and D are columns of v and features with their padding.


class FactorOperands(NamedTuple):
    """g, and from row `first_y` on v, or one of the two, as operands of `dot`; 0 in the padding."""

    hi_ptr: Any  # (rows, C), see `fastvae.kernels.products.operand_ptr`
    lo_ptr: Any
    first_y: Any
    rows: Any


class FactorSums(NamedTuple):
    """Sums over rows of g, then of v, as `factors_kernel` stores them."""

    sum_ptr: Any  # (programs, C), float64
    not_finite_ptr: Any  # (blocks,), float64, 0, or nan if a number is not finite
    blocks: Any


class ValueSums(NamedTuple):
    """Σ_j (k_ij − value_constant)·v_j over each share of the columns j."""

    value_ptr: Any  # (splits, rows, C)
    rows: Any
    splits: Any


class GradientSums(NamedTuple):
    """Sums over each share of the columns j with the weights w_ij = −φ'_ij·(g_i·v_j), for the gradient to each row i that is swept."""

    weight_ptr: Any  # (splits, rows), Σ_j w_ij
    moment_ptr: Any  # (splits, rows, D), Σ_j w_ij·u_j, in the pass by differences of u_j − u_i
    rows: Any
    splits: Any


class SampleGradients(NamedTuple):
    """The gradients to x and y, and how many rows these have."""

    x_ptr: Any  # (n, FEATURES)
    y_ptr: Any
    n: Any
    m: Any


class MatmulSpec(NamedTuple):
    """Constants of a sweep."""

    PRECISION_PASS: int  # number of the pass
    WITHIN: bool  # x against itself, without the pairs i = i; the rows of v come after those of g
    PRODUCT: int  # how products are taken
    FAMILY: Any  # of `fastvae.kernels.families`
    BANDWIDTHS: int
    SQUARINGS: int
    D: int
    C: int
    BLOCK_N: int
    BLOCK_M: int
    BLOCK_K: int  # features of a step of the exponent's product
    BLOCK_C: int  # columns of v of a program of the product, or of a step of g·v
    BLOCK_D: int = 0  # features of a block of moments
    BIASED: bool = False  # k of one bandwidth is multiplied by 2^−bias of the row and of the column


@triton.jit(do_not_specialize=["first_row", "first_column", "columns"])
def matmul_kernel(
    operands: Operands,
    v: FactorOperands,  # of the columns
    plan_ptr,  # (PLAN,), of `fastvae.kernels.prepare`, as the table
    table_ptr,
    bias_ptr,  # (rows,), to base 2, +∞ in the padding; not read unless BIASED
    out_ptr,  # (splits, N, C), Σ_j (k − value_constant)·v_j
    first_row,  # of the operands
    first_column,
    columns,  # with their padding
    SPEC: tl.constexpr,
):
    """A block of rows of K·v over a share of the columns of K; program 1 is the block of columns of v, program 2 the share."""
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PRECISION_PASS:
        return
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    C: tl.constexpr = SPEC.C
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_C: tl.constexpr = SPEC.BLOCK_C
    operands = as_product(operands, SPEC.PRODUCT)
    first_row, first_column = tl.multiple_of(first_row, BLOCK_N), tl.multiple_of(first_column, BLOCK_M)
    x, y = from_row(operands, tl.cast(first_row, tl.int64), SPEC.D), from_row(operands, tl.cast(first_column, tl.int64), SPEC.D)
    v_hi_ptr, v_lo_ptr = operand_ptr(v.hi_ptr, SPEC.PRODUCT), operand_ptr(v.lo_ptr, SPEC.PRODUCT)
    start_n = tl.program_id(0) * BLOCK_N
    share = tl.program_id(2)
    padded_n = tl.num_programs(0) * BLOCK_N
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + offs_c[None, :]

    # load
    rows = load_block(x, start_n, SPEC.PRODUCT, SPEC.D, BLOCK_N, SPEC.BLOCK_K)
    dtype: tl.constexpr = rows.neg_half_norm2.dtype
    value_constant = tl.load(plan_ptr + VALUE_CONSTANT).to(dtype)
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    table = load_table(table_ptr, FAMILY, False, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, SPEC.PRODUCT)
    if SPEC.BIASED:
        row_bias = tl.load(bias_ptr + first_row + rows.offs_n)

    # compute
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=dtype)
    first, last = share_of(columns, share, tl.num_programs(2), BLOCK_M)
    for start_m in range(first, last, BLOCK_M):
        exponent, _, _ = tile_exponent(rows, y, start_m, scale, FAMILY, SPEC.PRODUCT, SPEC.D, BLOCK_M, SPEC.BLOCK_K)
        if SPEC.BIASED:
            column_bias = tl.load(bias_ptr + first_column + start_m + tl.arange(0, BLOCK_M))
            value, _ = _biased(exponent, row_bias, column_bias, parameters, FAMILY)
        else:
            value, _ = evaluate_sum(
                exponent, table, table_ptr, parameters, value_constant, 0.0, FAMILY, False, SPEC.BANDWIDTHS, SPEC.SQUARINGS
            )
        if SPEC.WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            value = tl.where(rows.offs_n[:, None] != offs_m[None, :], value, 0.0)
        start_v = tl.cast(start_m, tl.int64) * C
        v_hi, v_lo = load_parts(v_hi_ptr + start_v + local_v, v_lo_ptr + start_v + local_v, SPEC.PRODUCT)
        value_hi, value_lo = split_operand(value, SPEC.PRODUCT)
        # From zero for each tile: a tensor core's accumulator truncates.
        out += dot(value_hi, value_lo, v_hi, v_lo, tl.zeros_like(out), SPEC.PRODUCT)

    # store
    start = (tl.cast(share, tl.int64) * padded_n + start_n) * C
    tl.store(out_ptr + start + (tl.arange(0, BLOCK_N)[:, None] * C + offs_c[None, :]), out)


@triton.jit(do_not_specialize=["first_block"])
def gradient_kernel(
    points: Operands,
    factors: FactorOperands,  # g for the rows of x, then v for those of y
    plan_ptr,
    table_ptr,
    bias_ptr,  # as that of `matmul_kernel`
    sums: GradientSums,
    first_block,  # of the rows that are swept
    SPEC: tl.constexpr,
):
    """The gradient sums of a block of rows over a share of the columns; program 1 is the block of moments, program 2 the share."""
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PRECISION_PASS:
        return
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    D: tl.constexpr = SPEC.D
    C: tl.constexpr = SPEC.C
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_C: tl.constexpr = SPEC.BLOCK_C
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    start_n = (first_block + tl.program_id(0)) * BLOCK_N
    d_out = tl.program_id(1)
    share = tl.program_id(2)
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    offs_g = tl.cast(start_n, tl.int64) * C + (tl.arange(0, BLOCK_N)[:, None] * C + tl.arange(0, BLOCK_C)[None, :])
    is_x = start_n < points.first_y
    first_m = 0 if SPEC.WITHIN else tl.where(is_x, points.first_y, 0)
    last_m = points.first_y if SPEC.WITHIN else tl.where(is_x, points.rows, points.first_y)
    points = as_product(points, SPEC.PRODUCT)
    g_hi_ptr, g_lo_ptr = operand_ptr(factors.hi_ptr, SPEC.PRODUCT), operand_ptr(factors.lo_ptr, SPEC.PRODUCT)

    # load
    rows = load_block(points, start_n, SPEC.PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    dtype: tl.constexpr = rows.neg_half_norm2.dtype
    g_hi, g_lo = load_parts(g_hi_ptr + offs_g, g_lo_ptr + offs_g, SPEC.PRODUCT)
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    table = load_table(table_ptr, FAMILY, True, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, SPEC.PRODUCT)
    if SPEC.BIASED:
        row_bias = tl.load(bias_ptr + rows.offs_n)
    if SPEC.PRODUCT == DIFFERENCES:
        row = tl.load(points.hi_ptr + tl.cast(start_n, tl.int64) * D + (local_n + offs_d[None, :]))

    # compute
    weight_sums = tl.zeros([BLOCK_N, 8], dtype=dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    first, last = share_of(last_m - first_m, share, tl.num_programs(2), BLOCK_M)
    for start_m in range(first_m + first, first_m + last, BLOCK_M):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        exponent, col_hi, col_lo = tile_exponent(rows, points, start_m, scale, FAMILY, SPEC.PRODUCT, D, BLOCK_M, SPEC.BLOCK_K)
        if SPEC.BIASED:
            column_bias = tl.load(bias_ptr + start_m + tl.arange(0, BLOCK_M))
            _, neg_dphi = _biased(exponent, row_bias, column_bias, parameters, FAMILY)
        else:
            _, neg_dphi = evaluate_sum(exponent, table, table_ptr, parameters, 0.0, 0.0, FAMILY, True, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
        start_v = start_m + points.first_y if SPEC.WITHIN else start_m
        weight = neg_dphi * _factor_products(g_hi_ptr, g_lo_ptr, g_hi, g_lo, offs_g, start_v, dtype, SPEC)
        if SPEC.WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            weight = tl.where(rows.offs_n[:, None] != offs_m[None, :], weight, 0.0)
        if SPEC.PRODUCT == DIFFERENCES:
            column = tl.load(points.hi_ptr + tl.cast(start_m, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]))
            moments += tl.sum(weight[:, :, None] * ((column[None, :, :] - row[:, None, :]) * scale), 1)
        else:
            if FAMILY.radial:
                weight_sums += row_sums(weight)
            col_hi, col_lo = column_parts(col_hi, col_lo, points, start_m, d_out, SPEC.PRODUCT, D, BLOCK_M, SPEC.BLOCK_K, BLOCK_D)
            weight_hi, weight_lo = split_operand(weight, SPEC.PRODUCT)
            moments += dot(weight_hi, weight_lo, col_hi, col_lo, tl.zeros_like(moments), SPEC.PRODUCT)

    # store
    out = tl.cast(share, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if d_out == 0:
        tl.store(sums.weight_ptr + out * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(weight_sums, 1))
    tl.store(sums.moment_ptr + out * BLOCK_N * D + (local_n + offs_d[None, :]), moments)


@triton.jit
def _biased(exponent, row_bias, column_bias, parameters, FAMILY: tl.constexpr):
    """k·2^(−biases) of a tile, and −φ' times the same."""
    value, ratio = evaluate_log2(exponent, parameters, FAMILY)
    # In the order of `log_kernel_density.log_sum_kernel`: what rounding does there cancels.
    value = tl.exp2((value - column_bias[None, :]) - row_bias[:, None])
    return value, value * ratio


@triton.jit
def _factor_products(hi_ptr, lo_ptr, g_hi, g_lo, offs_g, start_v, dtype: tl.constexpr, SPEC: tl.constexpr):
    """g_i·v_j of a tile; g_hi and g_lo are the first columns of g, at offs_g."""
    C: tl.constexpr = SPEC.C
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    products = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
    start = tl.cast(start_v, tl.int64) * C
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + tl.arange(0, SPEC.BLOCK_C)[None, :]
    if C == SPEC.BLOCK_C:
        v_hi, v_lo = load_parts(hi_ptr + start + local_v, lo_ptr + start + local_v, SPEC.PRODUCT)
        products = dot(g_hi, g_lo, tl.trans(v_hi), tl.trans(v_lo), products, SPEC.PRODUCT)
    else:
        offs_v = start + local_v
        for start_c in range(0, C, SPEC.BLOCK_C):
            left_hi, left_lo = load_parts(hi_ptr + (offs_g + start_c), lo_ptr + (offs_g + start_c), SPEC.PRODUCT)
            v_hi, v_lo = load_parts(hi_ptr + (offs_v + start_c), lo_ptr + (offs_v + start_c), SPEC.PRODUCT)
            products = dot(left_hi, left_lo, tl.trans(v_hi), tl.trans(v_lo), products, SPEC.PRODUCT)
    return products


@triton.jit(do_not_specialize=["n", "m"])
def factors_kernel(
    g_ptr,  # (n, COLUMNS)
    v_ptr,  # (m, COLUMNS)
    upstream_ptr,  # (COLUMNS, COLUMNS), float64, A of a quadratic form, of which v·(A + Aᵀ) takes the place of g; or None
    plan_ptr,
    n,
    m,
    factors: FactorOperands,  # as the products of the pass that runs take them
    sums: FactorSums,
    CHUNKS: tl.constexpr,  # programs for each of g and v
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A share of the rows of g or v as operands of `dot`, and their sums, in a block of columns."""
    # where
    program = tl.program_id(0)
    dtype: tl.constexpr = factors.hi_ptr.dtype.element_ty
    is_v = program >= CHUNKS
    start = tl.where(is_v, factors.first_y, 0)
    end = tl.where(is_v, factors.rows, factors.first_y)
    source_ptr, count = g_ptr, n
    if is_v:
        source_ptr, count = v_ptr, m
    first, last = share_of(end - start, program % CHUNKS, CHUNKS, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    precision_pass = tl.load(plan_ptr + PRECISION_PASS)

    # load, compute, store
    column_sums = tl.zeros([BLOCK_C], dtype=tl.float64)
    for start_n in range(first, last, BLOCK_N):
        local = start_n + tl.arange(0, BLOCK_N)
        mask = (local < count)[:, None] & (offs_c < COLUMNS)[None, :]
        factor = tl.load(source_ptr + local.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :], mask=mask, other=0.0).to(dtype)
        if upstream_ptr is not None:  # noqa: SIM102, one is known to the compiler and the other is not
            if is_v == 0:
                factor = weighted_by_upstream(v_ptr, upstream_ptr, local.to(tl.int64), local < count, offs_c, COLUMNS).to(dtype)
        column_sums += tl.sum(factor.to(tl.float64), 0)
        offs = (start + local).to(tl.int64)[:, None] * C + offs_c[None, :]
        inside = (local < end - start)[:, None] & (offs_c < C)[None, :]
        if precision_pass == 0:
            store_parts(factor, factor, factors.hi_ptr, factors.lo_ptr, offs, inside, PRODUCT)
        else:
            store_parts(factor, factor, factors.hi_ptr, factors.lo_ptr, offs, inside, DIFFERENCES)
    tl.store(sums.sum_ptr + program.to(tl.int64) * C + offs_c, column_sums)
    tl.store(sums.not_finite_ptr + program * tl.num_programs(1) + tl.program_id(1), tl.sum(column_sums * 0.0))


@triton.jit
def sum_of_columns(sum_ptr, offs_c, CHUNKS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_j v_j, from the sums of `factors_kernel`."""
    return add_shares(tl.zeros([BLOCK_C], dtype=tl.float64), sum_ptr + offs_c, C, CHUNKS, offs_c < C)


@triton.jit
def sum_of_shares(sums: ValueSums, offs_n, offs_c, mask, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_j (k − value_constant)·v_j over all columns j."""
    value_ptrs = sums.value_ptr + offs_n.to(tl.int64)[:, None] * C + offs_c[None, :]
    return add_shares(tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64), value_ptrs, tl.cast(sums.rows, tl.int64) * C, sums.splits, mask)


@triton.jit(do_not_specialize=["n"])
def matmul_finish_kernel(
    sums: ValueSums,  # of `matmul_kernel`
    v_ptr,  # (n, COLUMNS), if a sample is multiplied with itself
    factors: FactorSums,
    plan_ptr,
    out_ptr,  # (n, COLUMNS)
    n,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    WITHIN: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """K·v of a block of rows in a block of columns: the sums over all shares, and the constant that was subtracted from each pair."""
    # where
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_n < n)[:, None] & (offs_c < COLUMNS)[None, :]
    offs_out = offs_n.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :]

    # load and compute
    v_sum = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64) + sum_of_columns(factors.sum_ptr, offs_c, CHUNKS, C, BLOCK_C)[None, :]
    if WITHIN:
        v_sum -= tl.load(v_ptr + offs_out, mask=mask, other=0.0).to(tl.float64)
    out = sum_of_shares(sums, offs_n, offs_c, mask, C, BLOCK_N, BLOCK_C) * tl.load(plan_ptr + VALUE_SCALE)
    if not BIASED:
        out += v_sum * tl.load(plan_ptr + CONSTANT)
    out += total(factors.not_finite_ptr, factors.blocks, 1, 1024)

    # store
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row"])
def gradient_finish_kernel(
    points: Operands,
    sums: GradientSums,
    factors: FactorSums,
    plan_ptr,
    grads: SampleGradients,
    first_row,  # of the rows that are swept
    RADIAL: tl.constexpr,
    PRODUCT: tl.constexpr,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient to a block of rows in a block of features."""
    # where
    out_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first_row + out_row
    grad_ptr, local, count = grads.x_ptr, row, grads.n
    if first_row + tl.program_id(0) * BLOCK_N >= points.first_y:
        grad_ptr, local, count = grads.y_ptr, row - points.first_y, grads.m
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = local < count
    mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
    dtype: tl.constexpr = sums.weight_ptr.dtype.element_ty

    # load and compute
    scale = 0.5 * tl.load(plan_ptr + GRADIENT_SCALE) + total(factors.not_finite_ptr, factors.blocks, 1, 1024)
    moment_ptrs = sums.moment_ptr + out_row.to(tl.int64)[:, None] * D + offs_d[None, :]
    moments = add_shares(tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype), moment_ptrs, tl.cast(sums.rows, tl.int64) * D, sums.splits, mask)
    row_gradient = moments
    if RADIAL:
        weight_sum = add_shares(tl.zeros([BLOCK_N], dtype=dtype), sums.weight_ptr + out_row, sums.rows, sums.splits, mask_n)
        row_gradient = -moments
        # Moments of differences already lack u_i·Σ_j w_ij.
        if tl.load(plan_ptr + PRECISION_PASS) == 0:
            offs = row.to(tl.int64)[:, None] * D + offs_d[None, :]
            row_gradient += weight_sum[:, None] * load_rounded_rows(points.hi_ptr, points.lo_ptr, offs, mask, dtype, PRODUCT)

    # store
    tl.store(grad_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], scale.to(dtype) * row_gradient, mask=mask)


@dataclass(frozen=True, eq=False)
class _LaunchChoice:
    """What launches take from the kernel, the dtype and the numbers of features and columns alone."""

    configs: dict[bool, tuple[MatmulConfig, ...]]  # of each pass, by whether it is the gradient's
    features: int  # with their padding, as columns
    columns: int
    block: int  # rows to which samples are padded


@functools.lru_cache(maxsize=256)
def _launch_choice(plan: DeviceKernelPlan, dim: int, columns: int, dtype: torch.dtype, device: torch.device, biased: bool) -> _LaunchChoice:
    architecture, powers = device_limits(device).architecture, plan.powers
    names = [product_name(product, dtype) for product in plan.precision_passes]
    configs = {
        gradient: tuple(matmul_config(dim, columns, name, gradient, plan.bandwidths, architecture, powers, biased) for name in names)
        for gradient in (False, True)
    }
    every = [*configs[False], *configs[True]]
    return _LaunchChoice(
        configs,
        features=max(padded_dim(dim, config) for config in every),
        columns=max(padded(columns, config.block_c) for config in every),
        block=max(ROW_BLOCK, *(max(config.block_n, config.block_m) for config in every)),
    )


class PreparedFactors(NamedTuple):
    """What `factors_kernel` writes."""

    operands: FactorOperands
    sums: FactorSums
    chunks: int  # of the sums of each of g and v


class Product:
    """Sums over the columns of K(x, y), or of K(x, x) if one sample is given."""

    def __init__(self, kernel: KernelNumbers, samples: Sequence[Tensor], columns: int, precision: str, biased: bool = False) -> None:
        self.device, self.columns, self.dim = samples[0].device, columns, samples[0].shape[1]
        self.dtype = torch.float64 if samples[0].dtype == torch.float64 else torch.float32
        plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, self.dtype, precision, self_pairs=True)
        self.choice = _launch_choice(plan, self.dim, columns, self.dtype, self.device, biased)
        self.plan, self.sizes = plan, [z.shape[0] for z in samples]
        self.prepared = prepare([Sample.of(z) for z in samples], kernel, plan, self.choice.features, self.choice.block)
        self.first_y, self.rows = self.prepared.operands.first_y, self.prepared.operands.rows

    def factors(self, *given: Tensor, upstream: Tensor | None = None) -> PreparedFactors:
        """g (N, C) and v (M, C), or one of them. With an upstream A (C, C) in float64 give v twice: v·(A + Aᵀ) takes the place of g."""
        # One pointer in the kernel reads both, so they have one dtype. Booleans stay as narrow as they are.
        choice, given = self.choice, tuple((t if t.dtype == torch.bool else t.to(self.dtype)).contiguous() for t in given)
        g, v = given[0], given[-1]
        first_y = padded(g.shape[0], choice.block)
        rows = first_y + (padded(v.shape[0], choice.block) if len(given) == 2 else 0)
        c, chunks = choice.columns, _CHUNKS if rows > 8 * ROW_BLOCK else 1
        block_c, programs = block_of(c), len(given) * chunks
        blocks = programs * (c // block_c)
        column_sums, not_finite = torch.empty(programs * c + blocks, dtype=torch.float64, device=self.device).split((programs * c, blocks))
        operands = FactorOperands(*operand_buffers((rows, c), self.dtype, self.plan.precision_passes, self.device), first_y, rows)
        sums = FactorSums(column_sums, not_finite, blocks)
        launch(
            factors_kernel, (self.prepared.key, self.columns, chunks, upstream is not None, tensor_key(g, v)), self.device,
            (programs, c // block_c, 1),
            (g, v, upstream, self.prepared.tables.plan_ptr, g.shape[0], v.shape[0], operands, sums),
            lambda: {
                "CHUNKS": chunks, "COLUMNS": self.columns, "C": c, "PRODUCT": self.plan.precision_passes[0],
                "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c, "num_warps": 8,
            },
        )  # fmt: skip
        return PreparedFactors(operands, sums, chunks)

    def sweep_constants(self, number: int, config: MatmulConfig, within: bool, gradient: bool, biased: bool) -> dict[str, Any]:
        """Constexprs and options of the sweep of pass `number`."""
        options = config.launch() if gradient else config.launch("BLOCK_D")
        blocks = {name: options.pop(name) for name in list(options) if name.startswith("BLOCK")}
        sizes = {"D": self.choice.features, "C": self.choice.columns, "BIASED": biased}
        return {"SPEC": MatmulSpec(number, within, self.plan.precision_passes[number], **self.plan.constants, **sizes, **blocks)} | options

    def biases(self, *given: Tensor | None) -> Tensor:
        """Of the rows of x and of y, None for 0, as `matmul_kernel` takes them."""
        out = torch.full((self.rows,), torch.inf, dtype=self.dtype, device=self.device)
        for start, size, bias in zip((0, self.first_y), self.sizes, given, strict=True):
            out[start : start + size] = 0 if bias is None else bias
        return out

    def sweep(self, factors: PreparedFactors, *, transposed: bool = False, within: bool = False, biases: Tensor | None = None) -> ValueSums:
        c, configs = self.choice.columns, self.choice.configs[False]
        # The first row and the number of rows; factors belong to the columns.
        x, y = (0, self.first_y), (self.first_y, self.rows - self.first_y)
        if within:
            y = x
        if transposed:
            x, y = y, x
        (first_row, n), (first_column, m) = x, y
        programs, tiles = (n // configs[0].block_n) * (c // configs[0].block_c), m // configs[0].block_m
        splits = column_splits(programs, tiles, device_limits(self.device).multiprocessors)
        sums = torch.empty(splits * n * c, dtype=self.dtype, device=self.device)
        plan, table, _ = self.prepared.tables
        for number, config in enumerate(configs):
            launch(
                matmul_kernel, (self.prepared.key, self.columns, within, number, biases is not None), self.device,
                (n // config.block_n, c // config.block_c, splits),
                (self.prepared.operands, factors.operands, plan, table, table if biases is None else biases, sums,
                 first_row, first_column, m),
                functools.partial(self.sweep_constants, number, config, within, gradient=False, biased=biases is not None),
            )  # fmt: skip
        return ValueSums(sums, n, splits)

    def matmul(
        self,
        factors: PreparedFactors,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        within: Tensor | None = None,
        biases: Tensor | None = None,
    ) -> Tensor:
        """K·v (N, C), or Kᵀ·g if `transposed`. `within` is v if a sample is multiplied with itself, without the pairs i = i."""
        sums = self.sweep(factors, transposed=transposed, within=within is not None, biases=biases)
        size, c = self.sizes[-1] if transposed else self.sizes[0], self.choice.columns
        out = torch.empty((size, self.columns), dtype=dtype, device=self.device)
        own, block_c = out if within is None else within, block_of(c)
        key = self.prepared.key, self.columns, within is not None, biases is not None, dtype, factors.chunks, tensor_key(own)
        launch(
            matmul_finish_kernel, key, self.device,
            (triton.cdiv(size, ROW_BLOCK), c // block_c, 1), (sums, own, factors.sums, self.prepared.tables.plan_ptr, out, size),
            lambda: {
                "CHUNKS": factors.chunks, "COLUMNS": self.columns, "C": c, "WITHIN": within is not None,
                "BIASED": biases is not None, "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c,
            },
        )  # fmt: skip
        return out

    def gradients(
        self, factors: PreparedFactors, *, x: bool, y: bool, within: bool = False, biases: Tensor | None = None
    ) -> list[Tensor | None]:
        """The gradients Σ_j g_i·v_j·∂k_ij/∂x_i (N, D) and to y (M, D) that are wanted; with `within` x against itself, without j = i."""
        d, configs, operands = self.choice.features, self.choice.configs[True], self.prepared.operands
        first_row, swept = 0 if x else self.first_y, (self.first_y if x else 0) + (self.rows - self.first_y if y else 0)
        programs = (swept // configs[0].block_n) * (d // configs[0].block_d)
        columns = self.first_y if within or not x else self.rows - self.first_y
        splits = column_splits(programs, columns // configs[0].block_m, device_limits(self.device).multiprocessors)
        sizes = splits * swept, splits * swept * d
        sums = GradientSums(*torch.empty(sum(sizes), dtype=self.dtype, device=self.device).split(sizes), swept, splits)
        key, (plan, table, _) = (self.prepared.key, self.columns, within, biases is not None), self.prepared.tables
        for number, config in enumerate(configs):
            launch(
                gradient_kernel, (key, number), self.device, (swept // config.block_n, d // config.block_d, splits),
                (operands, factors.operands, plan, table, table if biases is None else biases, sums, first_row // config.block_n),
                functools.partial(self.sweep_constants, number, config, within, gradient=True, biased=biases is not None),
            )  # fmt: skip
        grads = [
            torch.empty((size, self.dim), dtype=self.dtype, device=self.device) if wanted else None
            for size, wanted in zip((self.sizes * 2)[:2], (x, y), strict=True)
        ]
        grad_x, grad_y = (sums.weight_ptr if grad is None else grad for grad in grads)
        block_d = block_of(d)
        launch(
            gradient_finish_kernel, key, self.device, (swept // ROW_BLOCK, d // block_d, 1),
            (operands, sums, factors.sums, plan, SampleGradients(grad_x, grad_y, self.sizes[0], self.sizes[-1]), first_row),
            lambda: {
                "RADIAL": self.plan.kernel.radial, "PRODUCT": self.plan.precision_passes[0], "FEATURES": self.dim, "D": d,
                "BLOCK_N": ROW_BLOCK, "BLOCK_D": block_d,
            },
        )  # fmt: skip
        return grads


# Programs that write g, and as many that write v.
_CHUNKS = 64


def kernel_matmul(kernel: KernelNumbers, x: Tensor, y: Tensor, v: Tensor, precision: str) -> Tensor:
    """Σ_j k(x_i, y_j)·v_j, shape (N, C), of x (N, D), y (M, D) and v (M, C), in the accumulation dtype."""
    if (few := few_pairs.plan_if_few(kernel, x, y, v.shape[1])) is not None:
        return few_pairs.matmul(few, kernel, x, y, v)
    product = Product(kernel, [x, y], v.shape[1], precision)
    return product.matmul(product.factors(v), product.dtype)


def kernel_matmul_backward(
    kernel: KernelNumbers, x: Tensor, y: Tensor, v: Tensor, grad: Tensor, x_grad: bool, y_grad: bool, v_grad: bool, precision: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of Σ_ij grad_i·v_j·k(x_i, y_j) to x, y and v, those wanted."""
    if (few := few_pairs.plan_if_few(kernel, x, y, v.shape[1])) is not None:
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
