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
from fastvae.kernels.config import MatmulConfig, column_splits, device_limits, difference_products, matmul_config
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
from fastvae.kernels.prepare import ROW_BLOCK, Sample, block_of, padded, prepare
from fastvae.kernels.products import (
    DIFFERENCES,
    column_exponent,
    column_parts,
    difference_exponent,
    dot,
    is_bfloat16,
    load_parts,
    load_rounded_rows,
    operand_buffers,
    product_name,
    row_sums,
    split_operand,
    store_parts,
)
from fastvae.kernels.reductions import share_of, total
from fastvae.kernels.sums import evaluate_sum, load_parameters, load_table

# Tuples hold pointers in a kernel and tensors on the host. C and D are columns of v and features with their padding.


class Points(NamedTuple):
    """Rows of a sample."""

    hi_ptr: Any  # (N, D), scaled, as the two operands of `dot`; as they came in the pass by differences
    lo_ptr: Any
    neg_half_norm2_ptr: Any  # (N,), −½‖u‖²; 0 for a polynomial, and in the padding what makes k zero


class Parts(NamedTuple):
    """g and v as the two operands of `dot`, (rows, C), 0 in the padding."""

    hi_ptr: Any
    lo_ptr: Any


class PartBuffers(NamedTuple):
    """Memory for the operands of `dot` in every precision; the last two are the first two as bfloat16."""

    hi_ptr: Any
    lo_ptr: Any
    hi16_ptr: Any
    lo16_ptr: Any


class Samples(NamedTuple):
    """Rows of x and of y; in the operands the first row of y, and all rows with their padding."""

    n: Any
    m: Any
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


class SweepSpec(NamedTuple):
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


class BlockOfRows(NamedTuple):
    """Rows of a program, and their first features as operands of `dot` with the pointers to them."""

    neg_half_norm2: Any
    hi: Any
    lo: Any
    hi_ptrs: Any
    lo_ptrs: Any


@triton.jit
def _load_rows(points: Points, start_n, SPEC: tl.constexpr):
    local = tl.arange(0, SPEC.BLOCK_N)
    neg_half_norm2 = tl.load(points.neg_half_norm2_ptr + (start_n + local))
    start = tl.cast(start_n, tl.int64) * SPEC.D
    offs = local[:, None] * SPEC.D + tl.arange(0, SPEC.BLOCK_K)[None, :]
    hi_ptrs = points.hi_ptr + start + offs
    lo_ptrs = points.lo_ptr + start + offs
    hi, lo = load_parts(hi_ptrs, lo_ptrs, SPEC.PRODUCT)
    return BlockOfRows(neg_half_norm2, hi, lo, hi_ptrs, lo_ptrs)


@triton.jit
def _exponent(block: BlockOfRows, rows: Points, columns: Points, offs_n, start_m, scale, SPEC: tl.constexpr):
    """The exponents of a tile, and the last features of its columns that were loaded for them."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    if SPEC.PRODUCT == DIFFERENCES:
        exponent = difference_exponent(rows.hi_ptr, columns.hi_ptr, offs_n, start_m, scale, FAMILY, SPEC.D, SPEC.BLOCK_M)
        return exponent, block.hi, block.lo
    else:
        return column_exponent(
            block.hi, block.lo, block.neg_half_norm2, block.hi_ptrs, block.lo_ptrs,
            columns.hi_ptr, columns.lo_ptr, columns.neg_half_norm2_ptr, start_m,
            FAMILY, SPEC.PRODUCT, SPEC.D, SPEC.BLOCK_M, SPEC.BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    rows: Points,
    columns: Points,
    v: Parts,
    plan_ptr,  # (PLAN,), of `fastvae.kernels.prepare`, as the table
    table_ptr,
    out_ptr,  # (splits, N, C), Σ_j (k − value_constant)·v_j
    M,  # columns with their padding
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
    start_n = tl.program_id(0) * BLOCK_N
    share = tl.program_id(2)
    padded_n = tl.num_programs(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + offs_c[None, :]

    # load
    block = _load_rows(rows, start_n, SPEC)
    dtype: tl.constexpr = block.neg_half_norm2.dtype
    value_constant = tl.load(plan_ptr + VALUE_CONSTANT).to(dtype)
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    table = load_table(table_ptr, False, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, SPEC.PRODUCT)

    # compute
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=dtype)
    first, last = share_of(M, share, tl.num_programs(2), BLOCK_M)
    for start_m in range(first, last, BLOCK_M):
        exponent, _, _ = _exponent(block, rows, columns, offs_n, start_m, scale, SPEC)
        value, _ = evaluate_sum(exponent, table, table_ptr, parameters, value_constant, 0.0, FAMILY, False, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
        if SPEC.WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            value = tl.where(offs_n[:, None] != offs_m[None, :], value, 0.0)
        start_v = tl.cast(start_m, tl.int64) * C
        v_hi, v_lo = load_parts(v.hi_ptr + start_v + local_v, v.lo_ptr + start_v + local_v, SPEC.PRODUCT)
        value_hi, value_lo = split_operand(value, SPEC.PRODUCT)
        # From zero for each tile: a tensor core's accumulator truncates.
        out += dot(value_hi, value_lo, v_hi, v_lo, tl.zeros_like(out), SPEC.PRODUCT)

    # store
    start = (tl.cast(share, tl.int64) * padded_n + start_n) * C
    tl.store(out_ptr + start + (tl.arange(0, BLOCK_N)[:, None] * C + offs_c[None, :]), out)


@triton.jit(do_not_specialize=["first_block"])
def gradient_kernel(
    points: Points,  # of x, then of y
    factors: Parts,  # g for the rows of x, then v for those of y
    plan_ptr,
    table_ptr,
    sums: GradientSums,
    samples: Samples,
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
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    offs_g = tl.cast(start_n, tl.int64) * C + (tl.arange(0, BLOCK_N)[:, None] * C + tl.arange(0, BLOCK_C)[None, :])
    is_x = start_n < samples.first_y
    first_m = 0 if SPEC.WITHIN else tl.where(is_x, samples.first_y, 0)
    last_m = samples.first_y if SPEC.WITHIN else tl.where(is_x, samples.rows, samples.first_y)

    # load
    block = _load_rows(points, start_n, SPEC)
    dtype: tl.constexpr = block.neg_half_norm2.dtype
    g_hi, g_lo = load_parts(factors.hi_ptr + offs_g, factors.lo_ptr + offs_g, SPEC.PRODUCT)
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    table = load_table(table_ptr, True, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, SPEC.PRODUCT)
    if SPEC.PRODUCT == DIFFERENCES:
        row = tl.load(points.hi_ptr + tl.cast(start_n, tl.int64) * D + (local_n + offs_d[None, :]))

    # compute
    weight_sums = tl.zeros([BLOCK_N, 8], dtype=dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    first, last = share_of(last_m - first_m, share, tl.num_programs(2), BLOCK_M)
    for start_m in range(first_m + first, first_m + last, BLOCK_M):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        exponent, col_hi, col_lo = _exponent(block, points, points, offs_n, start_m, scale, SPEC)
        _, neg_dphi = evaluate_sum(exponent, table, table_ptr, parameters, 0.0, 0.0, FAMILY, True, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
        start_v = start_m + samples.first_y if SPEC.WITHIN else start_m
        weight = neg_dphi * _factor_products(factors, g_hi, g_lo, offs_g, start_v, dtype, SPEC)
        if SPEC.WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            weight = tl.where(offs_n[:, None] != offs_m[None, :], weight, 0.0)
        if SPEC.PRODUCT == DIFFERENCES:
            column = tl.load(points.hi_ptr + tl.cast(start_m, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]))
            moments += tl.sum(weight[:, :, None] * ((column[None, :, :] - row[:, None, :]) * scale), 1)
        else:
            if FAMILY.radial:
                weight_sums += row_sums(weight)
            col_hi, col_lo = column_parts(
                col_hi, col_lo, points.hi_ptr, points.lo_ptr, start_m, d_out, SPEC.PRODUCT, D, BLOCK_M, SPEC.BLOCK_K, BLOCK_D
            )
            weight_hi, weight_lo = split_operand(weight, SPEC.PRODUCT)
            moments += dot(weight_hi, weight_lo, col_hi, col_lo, tl.zeros_like(moments), SPEC.PRODUCT)

    # store
    out = tl.cast(share, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if d_out == 0:
        tl.store(sums.weight_ptr + out * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(weight_sums, 1))
    tl.store(sums.moment_ptr + out * BLOCK_N * D + (local_n + offs_d[None, :]), moments)


@triton.jit
def _factor_products(factors: Parts, g_hi, g_lo, offs_g, start_v, dtype: tl.constexpr, SPEC: tl.constexpr):
    """g_i·v_j of a tile; g_hi and g_lo are the first columns of g, at offs_g."""
    C: tl.constexpr = SPEC.C
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    products = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
    start = tl.cast(start_v, tl.int64) * C
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + tl.arange(0, SPEC.BLOCK_C)[None, :]
    if C == SPEC.BLOCK_C:
        v_hi, v_lo = load_parts(factors.hi_ptr + start + local_v, factors.lo_ptr + start + local_v, SPEC.PRODUCT)
        products = dot(g_hi, g_lo, tl.trans(v_hi), tl.trans(v_lo), products, SPEC.PRODUCT)
    else:
        offs_v = start + local_v
        for start_c in range(0, C, SPEC.BLOCK_C):
            left_hi, left_lo = load_parts(factors.hi_ptr + (offs_g + start_c), factors.lo_ptr + (offs_g + start_c), SPEC.PRODUCT)
            v_hi, v_lo = load_parts(factors.hi_ptr + (offs_v + start_c), factors.lo_ptr + (offs_v + start_c), SPEC.PRODUCT)
            products = dot(left_hi, left_lo, tl.trans(v_hi), tl.trans(v_lo), products, SPEC.PRODUCT)
    return products


@triton.jit
def factors_kernel(
    g_ptr,  # (n, COLUMNS)
    v_ptr,  # (m, COLUMNS)
    upstream_ptr,  # (COLUMNS, COLUMNS), float64, A of a quadratic form, of which v·(A + Aᵀ) takes the place of g; or None
    plan_ptr,
    parts: PartBuffers,  # (rows, C), g, from `first_y` on v, as the products of the pass that runs take them
    sums: FactorSums,
    samples: Samples,
    CHUNKS: tl.constexpr,  # programs for each of g and v
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    PRODUCT: tl.constexpr,
    RADIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A share of the rows of g or v as operands of `dot`, and their sums, in a block of columns."""
    # where
    program = tl.program_id(0)
    dtype: tl.constexpr = parts.hi_ptr.dtype.element_ty
    is_v = program >= CHUNKS
    start = tl.where(is_v, samples.first_y, 0)
    end = tl.where(is_v, samples.rows, samples.first_y)
    source_ptr, count = g_ptr, samples.n
    if is_v:
        source_ptr, count = v_ptr, samples.m
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
        if RADIAL:
            if precision_pass == 0:
                store_parts(factor, factor, parts.hi_ptr, parts.lo_ptr, parts.hi16_ptr, parts.lo16_ptr, offs, offs, inside, PRODUCT)
            else:
                store_parts(factor, factor, parts.hi_ptr, parts.lo_ptr, parts.hi16_ptr, parts.lo16_ptr, offs, offs, inside, DIFFERENCES)
        else:
            store_parts(factor, factor, parts.hi_ptr, parts.lo_ptr, parts.hi16_ptr, parts.lo16_ptr, offs, offs, inside, PRODUCT)
    tl.store(sums.sum_ptr + program.to(tl.int64) * C + offs_c, column_sums)
    tl.store(sums.not_finite_ptr + program * tl.num_programs(1) + tl.program_id(1), tl.sum(column_sums * 0.0))


@triton.jit
def sum_of_columns(sum_ptr, offs_c, CHUNKS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_j v_j, from the sums of `factors_kernel`."""
    columns = tl.zeros([BLOCK_C], dtype=tl.float64)
    for chunk in range(CHUNKS):
        columns += tl.load(sum_ptr + chunk * C + offs_c)
    return columns


@triton.jit
def sum_of_shares(sums: ValueSums, offs_n, offs_c, mask, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ_j (k − value_constant)·v_j over all columns j."""
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64)
    for share in range(0, sums.splits):
        row = tl.cast(share, tl.int64) * sums.rows + offs_n
        out += tl.load(sums.value_ptr + row[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float64)
    return out


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
    out = out + v_sum * tl.load(plan_ptr + CONSTANT) + total(factors.not_finite_ptr, factors.blocks, 1, 1024)

    # store
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row"])
def gradient_finish_kernel(
    points: PartBuffers,
    sums: GradientSums,
    factors: FactorSums,
    plan_ptr,
    grad_x_ptr,  # (n, FEATURES)
    grad_y_ptr,  # (m, FEATURES)
    samples: Samples,
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
    grad_ptr, local, count = grad_x_ptr, row, samples.n
    if first_row + tl.program_id(0) * BLOCK_N >= samples.first_y:
        grad_ptr, local, count = grad_y_ptr, row - samples.first_y, samples.m
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = local < count
    mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
    dtype: tl.constexpr = sums.weight_ptr.dtype.element_ty

    # load and compute
    scale = 0.5 * tl.load(plan_ptr + GRADIENT_SCALE) + total(factors.not_finite_ptr, factors.blocks, 1, 1024)
    weight_sum = tl.zeros([BLOCK_N], dtype=dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    for share in range(0, sums.splits):
        source = tl.cast(share, tl.int64) * sums.rows + out_row
        if RADIAL:
            weight_sum += tl.load(sums.weight_ptr + source, mask=mask_n, other=0.0)
        moments += tl.load(sums.moment_ptr + source[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    row_gradient = moments
    if RADIAL:
        row_gradient = -moments
        # Moments of differences already lack u_i·Σ_j w_ij.
        if tl.load(plan_ptr + PRECISION_PASS) == 0:
            offs = row.to(tl.int64)[:, None] * D + offs_d[None, :]
            row_gradient += weight_sum[:, None] * load_rounded_rows(
                points.hi_ptr, points.lo_ptr, points.hi16_ptr, points.lo16_ptr, offs, offs, mask, dtype, PRODUCT
            )

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
def _launch_choice(plan: DeviceKernelPlan, dim: int, columns: int, dtype: torch.dtype, device: torch.device) -> _LaunchChoice:
    architecture, powers = device_limits(device).architecture, plan.powers
    configs = {}
    for gradient in (False, True):
        names = (
            difference_products(dtype.itemsize) if product == DIFFERENCES.value else product_name(product, dtype)
            for product in plan.precision_passes
        )
        configs[gradient] = tuple(matmul_config(dim, columns, name, gradient, plan.bandwidths, architecture, powers) for name in names)
    every = [*configs[False], *configs[True]]
    return _LaunchChoice(
        configs,
        features=max(config.padded(dim, config.block_k, config.block_d) for config in every),
        columns=max(config.padded(columns, config.block_c) for config in every),
        block=max(ROW_BLOCK, *(max(config.block_n, config.block_m) for config in every)),
    )


@dataclass(frozen=True, eq=False)
class _Factors:
    """g and v, as `factors_kernel` writes them."""

    buffers: PartBuffers
    sums: FactorSums
    chunks: int  # of the sums of each

    def parts(self, product: int) -> Parts:
        hi, lo, hi16, lo16 = self.buffers
        return Parts(hi16, lo16) if is_bfloat16(product) else Parts(hi, lo)


class Product:
    """Sums over the columns of K(x, y), or of K(x, x) if one sample is given."""

    def __init__(self, kernel: KernelNumbers, samples: Sequence[Tensor], columns: int, precision: str) -> None:
        self.device, self.columns, self.dim = samples[0].device, columns, samples[0].shape[1]
        self.dtype = torch.float64 if samples[0].dtype == torch.float64 else torch.float32
        plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, self.dtype, precision, self_pairs=True)
        self.choice = _launch_choice(plan, self.dim, columns, self.dtype, self.device)
        self.plan, self.sizes = plan, [z.shape[0] for z in samples]
        self.operands = prepare([Sample.of(z) for z in samples], kernel, plan, self.choice.features, self.choice.block)
        self.first_y, self.rows = self.operands.first_y, self.operands.rows

    def factors(self, *given: Tensor, upstream: Tensor | None = None) -> _Factors:
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
        buffers = PartBuffers(*operand_buffers((rows, c), self.dtype, self.plan.precision_passes, self.device))
        sums = FactorSums(column_sums, not_finite, blocks)
        launch(
            factors_kernel, (self.operands.key, self.columns, chunks, upstream is not None, tensor_key(g, v)), self.device,
            (programs, c // block_c, 1),
            (g, v, upstream, self.operands.plan, buffers, sums, Samples(g.shape[0], v.shape[0], first_y, rows)),
            lambda: {
                "CHUNKS": chunks, "COLUMNS": self.columns, "C": c, "PRODUCT": self.plan.precision_passes[0],
                "RADIAL": self.plan.kernel.radial, "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c, "num_warps": 8,
            },
        )  # fmt: skip
        return _Factors(buffers, sums, chunks)

    def _sweep_constants(self, number: int, config: MatmulConfig, within: bool, gradient: bool) -> dict[str, Any]:
        """Constexprs and options of the sweep of pass `number`."""
        options = config.launch(moments=gradient)
        blocks = {name: options.pop(name) for name in list(options) if name.startswith("BLOCK")}
        sizes = {"D": self.choice.features, "C": self.choice.columns}
        return {"SPEC": SweepSpec(number, within, self.plan.precision_passes[number], **self.plan.constants, **sizes, **blocks)} | options

    def sweep(self, factors: _Factors, *, transposed: bool = False, within: bool = False) -> ValueSums:
        d, c, configs = self.choice.features, self.choice.columns, self.choice.configs[False]
        # Factors belong to the columns; if there are two, g comes first.
        x, y = slice(0, self.first_y), slice(self.first_y, self.rows)
        if within:
            y = x
        if transposed:
            x, y = y, x
        n, m = x.stop - x.start, y.stop - y.start
        programs, tiles = (n // configs[0].block_n) * (c // configs[0].block_c), m // configs[0].block_m
        splits = column_splits(programs, tiles, device_limits(self.device).multiprocessors)
        sums = torch.empty(splits * n * c, dtype=self.dtype, device=self.device)
        key, neg_half_norm2 = (self.operands.key, self.columns, within), self.operands.neg_half_norm2
        for number, (product, config) in enumerate(zip(self.plan.precision_passes, configs, strict=True)):
            # Rows of bfloat16 fill the first half of their memory.
            hi, lo = (part.view(-1, d) for part in self.operands.parts(product))
            rows, columns = (Points(hi[z], lo[z], neg_half_norm2[z]) for z in (x, y))
            launch(
                matmul_kernel, (key, number), self.device, (n // config.block_n, c // config.block_c, splits),
                (rows, columns, factors.parts(product), self.operands.plan, self.operands.table, sums, m),
                functools.partial(self._sweep_constants, number, config, within, gradient=False),
            )  # fmt: skip
        return ValueSums(sums, n, splits)

    def matmul(self, factors: _Factors, dtype: torch.dtype, *, transposed: bool = False, within: Tensor | None = None) -> Tensor:
        """K·v (N, C), or Kᵀ·g if `transposed`. `within` is v if a sample is multiplied with itself, without the pairs i = i."""
        sums = self.sweep(factors, transposed=transposed, within=within is not None)
        size, c = self.sizes[-1] if transposed else self.sizes[0], self.choice.columns
        out = torch.empty((size, self.columns), dtype=dtype, device=self.device)
        own, block_c = out if within is None else within, block_of(c)
        key = self.operands.key, self.columns, within is not None, dtype, factors.chunks, tensor_key(own)
        launch(
            matmul_finish_kernel, key, self.device,
            (triton.cdiv(size, ROW_BLOCK), c // block_c, 1), (sums, own, factors.sums, self.operands.plan, out, size),
            lambda: {
                "CHUNKS": factors.chunks, "COLUMNS": self.columns, "C": c, "WITHIN": within is not None,
                "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c,
            },
        )  # fmt: skip
        return out

    def gradients(self, factors: _Factors, *, x: bool, y: bool, within: bool = False) -> list[Tensor | None]:
        """The gradients Σ_j g_i·v_j·∂k_ij/∂x_i (N, D) and to y (M, D) that are wanted; with `within` x against itself, without j = i."""
        d, configs, operands = self.choice.features, self.choice.configs[True], self.operands
        first_row, swept = 0 if x else self.first_y, (self.first_y if x else 0) + (self.rows - self.first_y if y else 0)
        programs = (swept // configs[0].block_n) * (d // configs[0].block_d)
        columns = self.first_y if within or not x else self.rows - self.first_y
        splits = column_splits(programs, columns // configs[0].block_m, device_limits(self.device).multiprocessors)
        sizes = splits * swept, splits * swept * d
        sums = GradientSums(*torch.empty(sum(sizes), dtype=self.dtype, device=self.device).split(sizes), swept, splits)
        key, samples = (operands.key, self.columns, within), Samples(self.sizes[0], self.sizes[-1], self.first_y, self.rows)
        for number, (product, config) in enumerate(zip(self.plan.precision_passes, configs, strict=True)):
            points = Points(*operands.parts(product), operands.neg_half_norm2)
            launch(
                gradient_kernel, (key, number), self.device, (swept // config.block_n, d // config.block_d, splits),
                (points, factors.parts(product), operands.plan, operands.table, sums, samples, first_row // config.block_n),
                functools.partial(self._sweep_constants, number, config, within, gradient=True),
            )  # fmt: skip
        grads = [
            torch.empty((size, self.dim), dtype=self.dtype, device=self.device) if wanted else None
            for size, wanted in zip((self.sizes * 2)[:2], (x, y), strict=True)
        ]
        grad_x, grad_y = (sums.weight_ptr if grad is None else grad for grad in grads)
        block_d = block_of(d)
        launch(
            gradient_finish_kernel, key, self.device, (swept // ROW_BLOCK, d // block_d, 1),
            (PartBuffers(*operands.buffers), sums, factors.sums, operands.plan, grad_x, grad_y, samples, first_row),
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
