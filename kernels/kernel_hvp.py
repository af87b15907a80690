"""The Hessian of S = Σ_ij (u_i·v_j)·k(x_i, y_j) times a direction on a GPU: the formulas of `fastvae.reference.kernel_hvp`, tile by tile.

As in `fastvae.kernels.kernel_matmul` there are three steps: prepare (`fastvae.kernels.prepare`), sweep a block of rows over all columns,
finish. With the exponent ε = −½‖x_i − y_j‖² of scaled rows, σ = dk/dε and σ' its derivative, a tile has

    dε_ij = −(x_i − y_j)·(x_dir_i − y_dir_j)        P_ij = σ·c_ij        Q_ij = σ'·dε_ij·c_ij + σ·e_ij
    to x_i: x_dir_i·Σ_j P_ij + x_i·Σ_j Q_ij − Σ_j (P_ij·y_dir_j + Q_ij·y_j)          to u_i: Σ_j σ·dε_ij·v_j + k_ij·v_dir_j

up to constants. Results to y and v are those to x and u with the samples exchanged. A kernel of x·y has ε = x_i·y_j and the last sum alone.
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
from fastvae.kernels.config import MatmulConfig, column_splits, device_limits, hvp_config, padded_dim
from fastvae.kernels.families import MATERN_32, Family
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.plan import (
    CONSTANT,
    GRADIENT_SCALE,
    PRECISION_PASS,
    SCALE,
    VALUE_SCALE,
    DeviceKernelPlan,
    device_kernel_plan,
)
from fastvae.kernels.prepare import ROW_BLOCK, Operands, Sample, as_product, block_of, padded, prepare
from fastvae.kernels.products import (
    BF16X3,
    DIFFERENCES,
    IEEE,
    TF32X3,
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
)
from fastvae.kernels.reductions import add_shares, share_of, total
from fastvae.kernels.sums import evaluate_change, load_parameters, load_table

# Tuples hold pointers in a kernel and tensors on the host. C and D are columns of u and v and features with their padding; rows are those
# of `fastvae.kernels.prepare.Operands`. In tuples "factors" are u, and from row `first_y` on v.


class Given(NamedTuple):
    """Rows that belong to those of x and to those of y; None for zeros."""

    x_ptr: Any  # (n, COLUMNS)
    y_ptr: Any  # (m, COLUMNS)
    n: Any
    m: Any


class Stored(NamedTuple):
    """What `store_kernel` writes."""

    hi_ptr: Any  # (rows, C)
    lo_ptr: Any
    change_ptr: Any  # (rows,), −x·x_dir of each row, if they are directions to points
    not_finite_ptr: Any  # (programs,), float64, 0, or nan if a number is not finite
    first_y: Any
    rows: Any


class PointResult(NamedTuple):
    """The result to x or y, and what is needed for it besides the sums."""

    out_ptr: Any  # (n, FEATURES)
    not_finite_ptr: Any  # (blocks,)
    first_row: Any  # of the operands
    n: Any
    blocks: Any


class Factors(NamedTuple):
    """Factors and their direction as operands of `dot`, 0 in the padding."""

    hi_ptr: Any  # (rows, C)
    lo_ptr: Any
    dir_hi_ptr: Any
    dir_lo_ptr: Any


class Start(NamedTuple):
    """Where a sweep starts among the operands and among the factors. For one sample against itself v comes after u."""

    row: Any
    column: Any
    row_factor: Any
    column_factor: Any
    columns: Any  # how many, with their padding
    features: Any  # D and C, which the compiler is not to know where they bound a loop
    factors: Any


class PointSums(NamedTuple):
    """What `points_kernel` writes for each share of the columns j."""

    p_ptr: Any  # (splits, rows), Σ_j P_ij
    q_ptr: Any
    moment_ptr: Any  # (splits, rows, D), Σ_j P_ij·y_dir_j + Q_ij·y_j, in the pass by differences to x_dir_i and x_i
    rows: Any
    splits: Any


class HVPSpec(NamedTuple):
    """Constants of a sweep."""

    PRECISION_PASS: int  # number of the pass
    WITHIN: bool  # one sample against itself, without the pairs i = i
    PRODUCT: int  # how products of points are taken
    MULTIPLIED: bool  # one or two columns of factors, without products of matrices
    FAMILY: Any  # of `fastvae.kernels.families`
    BANDWIDTHS: int
    EXACT_NEAR: bool  # tiles with near pairs take differences, see `takes_exact_distances`
    D: int
    C: int
    ROW_DIR: bool  # which directions there are
    COLUMN_DIR: bool
    ROW_FACTOR_DIR: bool
    COLUMN_FACTOR_DIR: bool
    BLOCK_N: int
    BLOCK_M: int
    BLOCK_K: int  # features of a step of the products that the exponent and its change are made of
    BLOCK_C: int  # columns of factors of a step, or of a program of `factors_kernel`
    BLOCK_D: int  # features of a block of moments


# A pair is near if its squared distance is at most this share of its ‖x‖² + ‖y‖²: products of three parts then have an error of 2⁻¹⁵, those
# of float64 one of 2⁻³⁸.
_NEAR, _NEAR_DOUBLE = tl.constexpr(2.0**-7), tl.constexpr(2.0**-14)


@triton.jit
def store_kernel(
    given: Given,
    points: Operands,  # not read unless DIRECTIONS
    plan_ptr,
    stored: Stored,
    DIRECTIONS: tl.constexpr,  # to points, scaled as these; else factors
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    FIRST_PRODUCT: tl.constexpr,  # of the first pass
    SECOND_PRODUCT: tl.constexpr,  # −1 if there is none before differences
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A share of the rows as operands of `dot`, as the pass that runs takes them."""
    # where
    hi_ptr, lo_ptr, first_y, rows = stored.hi_ptr, stored.lo_ptr, stored.first_y, stored.rows
    dtype: tl.constexpr = hi_ptr.dtype.element_ty
    first, last = share_of(rows, tl.program_id(0), tl.num_programs(0), BLOCK_N)
    precision_pass = tl.load(plan_ptr + PRECISION_PASS)
    scale = tl.load(plan_ptr + SCALE)
    not_finite = tl.zeros([BLOCK_N], dtype=tl.float64)

    # load, compute, store
    for start_n in range(first, last, BLOCK_N):
        is_y = start_n >= first_y
        row = start_n + tl.arange(0, BLOCK_N)
        local = (row - tl.where(is_y, first_y, 0)).to(tl.int64)
        change = tl.zeros([BLOCK_N], dtype=tl.float64)
        for start_c in range(0, C, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            offs_in = local[:, None] * COLUMNS + offs_c[None, :]
            in_columns = (offs_c < COLUMNS)[None, :]
            z = tl.zeros([BLOCK_N, BLOCK_C], dtype=dtype)
            if given.x_ptr is not None:
                z += tl.load(given.x_ptr + offs_in, mask=(local < given.n)[:, None] & in_columns & (is_y == 0), other=0.0).to(dtype)
            if given.y_ptr is not None:
                z += tl.load(given.y_ptr + offs_in, mask=(local < given.m)[:, None] & in_columns & is_y, other=0.0).to(dtype)
            not_finite += tl.sum(z.to(tl.float64) * 0.0, 1)
            offs = row.to(tl.int64)[:, None] * C + offs_c[None, :]
            mask = (offs_c < C)[None, :] & (row < rows)[:, None]
            scaled = z
            if DIRECTIONS:
                scaled = (z.to(tl.float64) * scale).to(dtype)
            if precision_pass == 0:
                change += _store_products(scaled, points, hi_ptr, lo_ptr, offs, mask, DIRECTIONS, FIRST_PRODUCT)
            elif SECOND_PRODUCT >= 0:
                if precision_pass == 1:
                    change += _store_products(scaled, points, hi_ptr, lo_ptr, offs, mask, DIRECTIONS, SECOND_PRODUCT)
                else:
                    store_parts(scaled, z, hi_ptr, lo_ptr, offs, mask, DIFFERENCES)
            else:
                store_parts(scaled, z, hi_ptr, lo_ptr, offs, mask, DIFFERENCES)
        if DIRECTIONS:
            tl.store(stored.change_ptr + row, change.to(dtype), mask=row < rows)
    tl.store(stored.not_finite_ptr + tl.program_id(0), tl.sum(not_finite))


@triton.jit
def _store_products(scaled, points, hi_ptr, lo_ptr, offs, mask, DIRECTIONS: tl.constexpr, PRODUCT: tl.constexpr):
    """Stores rows as operands of products. Returns −x·x_dir of each row as products see both, or 0."""
    dtype: tl.constexpr = scaled.dtype
    rounded = store_parts(scaled, scaled, hi_ptr, lo_ptr, offs, mask, PRODUCT)
    if DIRECTIONS:
        point = load_rounded_rows(points.hi_ptr, points.lo_ptr, offs, mask, dtype, PRODUCT)
        return -tl.sum(point.to(tl.float64) * rounded.to(tl.float64), 1)
    else:
        return tl.zeros([scaled.shape[0]], dtype=tl.float64)


@triton.jit
def _load_feature(hi_ptr, lo_ptr, offs, dtype: tl.constexpr, PRODUCT: tl.constexpr):
    """One feature of rows as products see them."""
    feature = tl.load(hi_ptr + offs).to(dtype)
    if PRODUCT == BF16X3 or PRODUCT == TF32X3:  # noqa: SIM109
        feature += tl.load(lo_ptr + offs).to(dtype)
    return feature


@triton.jit
def _by_differences(points, directions, start_n, start_m, scale, dtype: tl.constexpr, SPEC: tl.constexpr):
    """ε and dε of a tile by differences, feature by feature, of rows and directions that are multiplied by `scale`."""
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    exponent = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
    change = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
    # Offsets of 32 bits to scalar pointers: fewer registers.
    local_n, local_m = tl.arange(0, BLOCK_N) * SPEC.D, tl.arange(0, BLOCK_M) * SPEC.D
    n, m = tl.cast(start_n, tl.int64) * SPEC.D, tl.cast(start_m, tl.int64) * SPEC.D
    for k in range(SPEC.D):
        row = _load_feature(points.hi_ptr + (n + k), points.lo_ptr + (n + k), local_n, dtype, PRODUCT)
        column = _load_feature(points.hi_ptr + (m + k), points.lo_ptr + (m + k), local_m, dtype, PRODUCT)
        difference = (row[:, None] - column[None, :]) * scale
        exponent -= difference * difference
        if SPEC.ROW_DIR and SPEC.COLUMN_DIR:
            row = _load_feature(directions.hi_ptr + (n + k), directions.lo_ptr + (n + k), local_n, dtype, PRODUCT)
            column = _load_feature(directions.hi_ptr + (m + k), directions.lo_ptr + (m + k), local_m, dtype, PRODUCT)
            change -= difference * (row[:, None] - column[None, :])
        elif SPEC.ROW_DIR:
            row = _load_feature(directions.hi_ptr + (n + k), directions.lo_ptr + (n + k), local_n, dtype, PRODUCT)
            change -= difference * row[:, None]
        elif SPEC.COLUMN_DIR:
            column = _load_feature(directions.hi_ptr + (m + k), directions.lo_ptr + (m + k), local_m, dtype, PRODUCT)
            change += difference * column[None, :]
    return 0.5 * exponent, change * scale


@triton.jit
def _exponent_and_change(rows, row_dirs, points, directions, start_n, start_m, scale, features, SPEC: tl.constexpr):
    """ε and dε of a tile, and the last features that it loaded of the columns and of their directions."""
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    FAMILY: tl.constexpr = SPEC.FAMILY
    D: tl.constexpr = SPEC.D
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_K: tl.constexpr = SPEC.BLOCK_K
    dtype: tl.constexpr = rows.neg_half_norm2.dtype
    col_hi, col_lo, dir_hi, dir_lo = rows.hi, rows.lo, rows.hi, rows.lo
    if PRODUCT == DIFFERENCES:
        exponent, change = _by_differences(points, directions, start_n, start_m, scale, dtype, SPEC)
        if FAMILY.padding > -float("inf") and not FAMILY.homogeneous:
            # An infinite distance times its inverse, or times k = 0, is nan.
            exponent = tl.maximum(exponent, -1e308 if exponent.dtype == tl.float64 else -3e38)
    else:
        exponent = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
        change = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        local_m = tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        n, m = tl.cast(start_n, tl.int64) * D, tl.cast(start_m, tl.int64) * D
        if FAMILY.radial:
            exponent += rows.neg_half_norm2[:, None] + tl.load(points.neg_half_norm2_ptr + offs_m)[None, :]
            if SPEC.ROW_DIR:
                change += row_dirs.neg_half_norm2[:, None]
            if SPEC.COLUMN_DIR:
                change += tl.load(directions.neg_half_norm2_ptr + offs_m)[None, :]
        if D == BLOCK_K:
            col_hi, col_lo = load_parts(points.hi_ptr + m + local_m, points.lo_ptr + m + local_m, PRODUCT)
            exponent = dot(rows.hi, rows.lo, tl.trans(col_hi), tl.trans(col_lo), exponent, PRODUCT)
            if SPEC.ROW_DIR:
                change = dot(row_dirs.hi, row_dirs.lo, tl.trans(col_hi), tl.trans(col_lo), change, PRODUCT)
            if SPEC.COLUMN_DIR:
                dir_hi, dir_lo = load_parts(directions.hi_ptr + m + local_m, directions.lo_ptr + m + local_m, PRODUCT)
                change = dot(rows.hi, rows.lo, tl.trans(dir_hi), tl.trans(dir_lo), change, PRODUCT)
        else:
            # Offsets of 32 bits to scalar pointers: fewer registers.
            local_n = tl.arange(0, BLOCK_N)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
            # A bound that the compiler does not know: unrolled, the loop would load everything at once into registers.
            for start_k in range(0, features, BLOCK_K):
                at_n, at_m = n + start_k, m + start_k
                row_hi, row_lo = load_parts(points.hi_ptr + at_n + local_n, points.lo_ptr + at_n + local_n, PRODUCT)
                right_hi, right_lo = load_parts(points.hi_ptr + at_m + local_m, points.lo_ptr + at_m + local_m, PRODUCT)
                exponent = dot(row_hi, row_lo, tl.trans(right_hi), tl.trans(right_lo), exponent, PRODUCT)
                if SPEC.ROW_DIR:
                    left_hi, left_lo = load_parts(directions.hi_ptr + at_n + local_n, directions.lo_ptr + at_n + local_n, PRODUCT)
                    change = dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), change, PRODUCT)
                if SPEC.COLUMN_DIR:
                    right_hi, right_lo = load_parts(directions.hi_ptr + at_m + local_m, directions.lo_ptr + at_m + local_m, PRODUCT)
                    change = dot(row_hi, row_lo, tl.trans(right_hi), tl.trans(right_lo), change, PRODUCT)
        if SPEC.EXACT_NEAR:
            # Products lose the distance of near rows, on which these slopes depend most.
            norms = rows.neg_half_norm2[:, None] + tl.load(points.neg_half_norm2_ptr + offs_m)[None, :]
            near = exponent - (_NEAR_DOUBLE if dtype == tl.float64 else _NEAR) * norms
            if SPEC.WITHIN:
                near = tl.where(rows.offs_n[:, None] != offs_m[None, :], near, -1.0)
            if tl.max(near) >= 0.0:
                exponent, change = _by_differences(points, directions, start_n, start_m, 1.0, dtype, SPEC)
    return exponent, change, col_hi, col_lo, dir_hi, dir_lo


@triton.jit
def _block_of_columns(hi, lo, operands, start_m, d_out, SPEC: tl.constexpr):
    """Block `d_out` of the features of the columns: those already loaded if one block holds all."""
    D: tl.constexpr = SPEC.D
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    if D > SPEC.BLOCK_K or D > BLOCK_D:
        local = tl.arange(0, SPEC.BLOCK_M)[:, None] * D + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        start = tl.cast(start_m, tl.int64) * D
        hi, lo = load_parts(operands.hi_ptr + start + local, operands.lo_ptr + start + local, SPEC.PRODUCT)
    return hi, lo


@triton.jit
def _factors_as_product(factors: Factors, PRODUCT: tl.constexpr):
    return Factors(
        operand_ptr(factors.hi_ptr, PRODUCT),
        operand_ptr(factors.lo_ptr, PRODUCT),
        operand_ptr(factors.dir_hi_ptr, PRODUCT),
        operand_ptr(factors.dir_lo_ptr, PRODUCT),
    )


@triton.jit
def _add_factor_products(c, e, factors: Factors, at_n, at_m, SPEC: tl.constexpr):
    """c and e of a tile with a block of columns of factors added, of which the first elements are at `at_n` and `at_m`."""
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    local_c = tl.arange(0, SPEC.BLOCK_C)[None, :]
    local_n, local_m = tl.arange(0, SPEC.BLOCK_N)[:, None] * SPEC.C + local_c, tl.arange(0, SPEC.BLOCK_M)[:, None] * SPEC.C + local_c
    u_hi, u_lo = load_parts(factors.hi_ptr + at_n + local_n, factors.lo_ptr + at_n + local_n, PRODUCT)
    v_hi, v_lo = load_parts(factors.hi_ptr + at_m + local_m, factors.lo_ptr + at_m + local_m, PRODUCT)
    if SPEC.ROW_DIR or SPEC.COLUMN_DIR:
        c = dot(u_hi, u_lo, tl.trans(v_hi), tl.trans(v_lo), c, PRODUCT)
    if SPEC.COLUMN_FACTOR_DIR:
        dir_hi, dir_lo = load_parts(factors.dir_hi_ptr + at_m + local_m, factors.dir_lo_ptr + at_m + local_m, PRODUCT)
        e = dot(u_hi, u_lo, tl.trans(dir_hi), tl.trans(dir_lo), e, PRODUCT)
    if SPEC.ROW_FACTOR_DIR:
        dir_hi, dir_lo = load_parts(factors.dir_hi_ptr + at_n + local_n, factors.dir_lo_ptr + at_n + local_n, PRODUCT)
        e = dot(dir_hi, dir_lo, tl.trans(v_hi), tl.trans(v_lo), e, PRODUCT)
    return c, e


@triton.jit
def _factor_tiles(factors: Factors, row, column, columns, dtype: tl.constexpr, SPEC: tl.constexpr):
    """c and e of a tile. `row` and `column` are the first ones among the factors."""
    C: tl.constexpr = SPEC.C
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_C: tl.constexpr = SPEC.BLOCK_C
    c = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
    e = tl.zeros([BLOCK_N, BLOCK_M], dtype=dtype)
    at_n, at_m = tl.cast(row, tl.int64) * C, tl.cast(column, tl.int64) * C
    if SPEC.MULTIPLIED:
        local_n, local_m = tl.arange(0, BLOCK_N) * C, tl.arange(0, BLOCK_M) * C
        for k in tl.static_range(C):
            u = tl.load(factors.hi_ptr + (at_n + k) + local_n)[:, None]
            v = tl.load(factors.hi_ptr + (at_m + k) + local_m)[None, :]
            if SPEC.ROW_DIR or SPEC.COLUMN_DIR:
                c += u * v
            if SPEC.COLUMN_FACTOR_DIR:
                e += u * tl.load(factors.dir_hi_ptr + (at_m + k) + local_m)[None, :]
            if SPEC.ROW_FACTOR_DIR:
                e += tl.load(factors.dir_hi_ptr + (at_n + k) + local_n)[:, None] * v
    elif C == BLOCK_C:
        c, e = _add_factor_products(c, e, factors, at_n, at_m, SPEC)
    else:
        for start_c in range(0, columns, BLOCK_C):
            c, e = _add_factor_products(c, e, factors, at_n + start_c, at_m + start_c, SPEC)
    return c, e


@triton.jit
def points_kernel(
    points: Operands,
    directions: Operands,  # with −x·x_dir in the place of −½‖x‖²
    factors: Factors,
    plan_ptr,
    table_ptr,
    sums: PointSums,
    start: Start,
    SPEC: tl.constexpr,
):
    """The sums for the result to a block of rows over a share of the columns; program 1 is the block of moments, program 2 the share."""
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PRECISION_PASS:
        return
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    D: tl.constexpr = SPEC.D
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    POINTS: tl.constexpr = SPEC.ROW_DIR or SPEC.COLUMN_DIR
    FACTORS: tl.constexpr = SPEC.ROW_FACTOR_DIR or SPEC.COLUMN_FACTOR_DIR
    row = tl.program_id(0) * BLOCK_N
    d_out = tl.program_id(1)
    share = tl.program_id(2)
    start_n = start.row + row
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    local_n = tl.arange(0, BLOCK_N)[:, None] * D + offs_d[None, :]
    local_m = tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]
    points, directions = as_product(points, PRODUCT), as_product(directions, PRODUCT)
    if not SPEC.MULTIPLIED:
        factors = _factors_as_product(factors, PRODUCT)

    # load
    rows = load_block(points, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    row_dirs = rows
    if SPEC.ROW_DIR:
        row_dirs = load_block(directions, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    dtype: tl.constexpr = rows.neg_half_norm2.dtype
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    # By differences only a distance of 0 counts as that of an identical pair.
    IDENTICAL: tl.constexpr = DIFFERENCES if SPEC.EXACT_NEAR else PRODUCT
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, IDENTICAL)
    row_out = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    row_dir_out = row_out
    if PRODUCT == DIFFERENCES:
        at_n = tl.cast(start_n, tl.int64) * D + local_n
        row_out = tl.load(points.hi_ptr + at_n)
        if SPEC.ROW_DIR:
            row_dir_out = tl.load(directions.hi_ptr + at_n)

    # compute
    p_sums = tl.zeros([BLOCK_N, 8], dtype=dtype)
    q_sums = tl.zeros([BLOCK_N, 8], dtype=dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    first, last = share_of(start.columns, share, tl.num_programs(2), BLOCK_M)
    for offset in range(first, last, BLOCK_M):
        start_m = start.column + offset
        exponent, change, col_hi, col_lo, dir_hi, dir_lo = _exponent_and_change(
            rows, row_dirs, points, directions, start_n, start_m, scale, start.features, SPEC
        )
        # Read again for each tile: registers are few.
        table = load_table(table_ptr, FAMILY, True, BANDWIDTHS, 0)
        _, slope, slope_change = evaluate_change(exponent, change, table, table_ptr, parameters, FAMILY, POINTS, BANDWIDTHS)
        c, e = _factor_tiles(factors, start.row_factor + row, start.column_factor + offset, start.factors, dtype, SPEC)
        p = slope * c
        q = slope * e
        if POINTS:
            q = slope_change * c
            if FACTORS:
                q += slope * e
        if SPEC.WITHIN:
            other = rows.offs_n[:, None] != (start_m + tl.arange(0, BLOCK_M))[None, :]
            p, q = tl.where(other, p, 0.0), tl.where(other, q, 0.0)
        if PRODUCT == DIFFERENCES:
            at_m = tl.cast(start_m, tl.int64) * D + local_m
            column = tl.load(points.hi_ptr + at_m)
            moments += tl.sum(q[:, :, None] * ((column[None, :, :] - row_out[:, None, :]) * scale), 1)
            if POINTS:
                column_dir = tl.zeros_like(column)
                if SPEC.COLUMN_DIR:
                    column_dir = tl.load(directions.hi_ptr + at_m)
                moments += tl.sum(p[:, :, None] * ((column_dir[None, :, :] - row_dir_out[:, None, :]) * scale), 1)
        else:
            if FAMILY.radial:
                q_sums += row_sums(q)
                if SPEC.ROW_DIR:
                    p_sums += row_sums(p)
            col_hi, col_lo = _block_of_columns(col_hi, col_lo, points, start_m, d_out, SPEC)
            q_hi, q_lo = split_operand(q, PRODUCT)
            # From zero for each tile: a tensor core's accumulator truncates.
            moment = dot(q_hi, q_lo, col_hi, col_lo, tl.zeros_like(moments), PRODUCT)
            if SPEC.COLUMN_DIR:
                dir_hi, dir_lo = _block_of_columns(dir_hi, dir_lo, directions, start_m, d_out, SPEC)
                p_hi, p_lo = split_operand(p, PRODUCT)
                moment = dot(p_hi, p_lo, dir_hi, dir_lo, moment, PRODUCT)
            moments += moment

    # store
    out = tl.cast(share, tl.int64) * sums.rows + row
    if d_out == 0:
        tl.store(sums.p_ptr + out + tl.arange(0, BLOCK_N), tl.sum(p_sums, 1))
        tl.store(sums.q_ptr + out + tl.arange(0, BLOCK_N), tl.sum(q_sums, 1))
    tl.store(sums.moment_ptr + out * D + local_n, moments)


@triton.jit
def factors_kernel(
    points: Operands,
    directions: Operands,  # as those of `points_kernel`
    factors: Factors,
    plan_ptr,
    table_ptr,
    out_ptr,  # (splits, rows, C), Σ_j dk_ij·v_j + k_ij·v_dir_j
    start: Start,
    SPEC: tl.constexpr,
):
    """The result to the factors of a block of rows over a share of the columns; program 1 is the block of C, program 2 the share."""
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PRECISION_PASS:
        return
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    D: tl.constexpr = SPEC.D
    C: tl.constexpr = SPEC.C
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_C: tl.constexpr = SPEC.BLOCK_C
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    POINTS: tl.constexpr = SPEC.ROW_DIR or SPEC.COLUMN_DIR
    row = tl.program_id(0) * BLOCK_N
    share = tl.program_id(2)
    start_n = start.row + row
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    local_m = tl.arange(0, BLOCK_M)[:, None] * C + offs_c[None, :]
    points, directions = as_product(points, PRODUCT), as_product(directions, PRODUCT)
    if not SPEC.MULTIPLIED:
        factors = _factors_as_product(factors, PRODUCT)

    # load
    rows = load_block(points, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    row_dirs = rows
    if SPEC.ROW_DIR:
        row_dirs = load_block(directions, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    dtype: tl.constexpr = rows.neg_half_norm2.dtype
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    value_scale = tl.load(plan_ptr + VALUE_SCALE).to(dtype)
    change_scale = 0.5 * tl.load(plan_ptr + GRADIENT_SCALE) / tl.load(plan_ptr + SCALE)
    change_scale = (-change_scale if FAMILY.radial else change_scale).to(dtype)
    # φ(0) of a polynomial
    constant = tl.load(plan_ptr + CONSTANT).to(dtype)
    # By differences only a distance of 0 counts as that of an identical pair.
    IDENTICAL: tl.constexpr = DIFFERENCES if SPEC.EXACT_NEAR else PRODUCT
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, IDENTICAL)

    # compute
    WIDTH: tl.constexpr = 8 if SPEC.MULTIPLIED else BLOCK_C
    out = tl.zeros([BLOCK_N, WIDTH], dtype=dtype)
    second = tl.zeros([BLOCK_N, 8], dtype=dtype)
    first, last = share_of(start.columns, share, tl.num_programs(2), BLOCK_M)
    for offset in range(first, last, BLOCK_M):
        start_m = start.column + offset
        exponent, change, _, _, _, _ = _exponent_and_change(
            rows, row_dirs, points, directions, start_n, start_m, scale, start.features, SPEC
        )
        table = load_table(table_ptr, FAMILY, True, BANDWIDTHS, 0)
        value, slope, _ = evaluate_change(exponent, change, table, table_ptr, parameters, FAMILY, False, BANDWIDTHS)
        value = value * value_scale
        if not FAMILY.radial:
            value += constant
        change = change * slope * change_scale
        if SPEC.WITHIN:
            other = rows.offs_n[:, None] != (start_m + tl.arange(0, BLOCK_M))[None, :]
            value, change = tl.where(other, value, 0.0), tl.where(other, change, 0.0)
        column = tl.cast(start.column_factor + offset, tl.int64) * C
        if SPEC.MULTIPLIED:
            at_m = column + tl.arange(0, BLOCK_M) * C
            for k in tl.static_range(C):
                terms = tl.zeros_like(value)
                if POINTS:
                    terms += change * tl.load(factors.hi_ptr + at_m + k)[None, :]
                if SPEC.COLUMN_FACTOR_DIR:
                    terms += value * tl.load(factors.dir_hi_ptr + at_m + k)[None, :]
                if k == 0:
                    out += row_sums(terms)
                else:
                    second += row_sums(terms)
        else:
            terms = tl.zeros_like(out)
            if POINTS:
                v_hi, v_lo = load_parts(factors.hi_ptr + column + local_m, factors.lo_ptr + column + local_m, PRODUCT)
                change_hi, change_lo = split_operand(change, PRODUCT)
                terms = dot(change_hi, change_lo, v_hi, v_lo, terms, PRODUCT)
            if SPEC.COLUMN_FACTOR_DIR:
                v_hi, v_lo = load_parts(factors.dir_hi_ptr + column + local_m, factors.dir_lo_ptr + column + local_m, PRODUCT)
                value_hi, value_lo = split_operand(value, PRODUCT)
                terms = dot(value_hi, value_lo, v_hi, v_lo, terms, PRODUCT)
            # From zero for each tile: a tensor core's accumulator truncates.
            out += terms

    # store
    out_ptr += (tl.cast(share, tl.int64) * tl.num_programs(0) * BLOCK_N + row) * C
    local = tl.arange(0, BLOCK_N) * C
    if SPEC.MULTIPLIED:
        tl.store(out_ptr + local, tl.sum(out, 1))
        if C > 1:
            tl.store(out_ptr + local + 1, tl.sum(second, 1))
    else:
        tl.store(out_ptr + local[:, None] + offs_c[None, :], out)


@triton.jit
def _row_terms(points, directions, sums: PointSums, row, offs, mask_n, mask, ROW_DIR: tl.constexpr, PRODUCT: tl.constexpr):
    """x_dir_i·Σ_j P_ij + x_i·Σ_j Q_ij in a block of features."""
    dtype: tl.constexpr = sums.p_ptr.dtype.element_ty
    zeros = tl.zeros([mask.shape[0]], dtype=dtype)
    q_sum = add_shares(zeros, sums.q_ptr + row, sums.rows, sums.splits, mask_n)
    terms = q_sum[:, None] * load_rounded_rows(points.hi_ptr, points.lo_ptr, offs, mask, dtype, PRODUCT)
    if ROW_DIR:
        p_sum = add_shares(zeros, sums.p_ptr + row, sums.rows, sums.splits, mask_n)
        terms += p_sum[:, None] * load_rounded_rows(directions.hi_ptr, directions.lo_ptr, offs, mask, dtype, PRODUCT)
    return terms


@triton.jit
def points_finish_kernel(
    points: Operands,
    directions: Operands,
    sums: PointSums,
    plan_ptr,
    result: PointResult,
    RADIAL: tl.constexpr,
    WITHIN: tl.constexpr,
    ROW_DIR: tl.constexpr,
    FIRST_PRODUCT: tl.constexpr,
    SECOND_PRODUCT: tl.constexpr,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The result to a block of rows in a block of features; twice that of a sample against itself, through both of its places."""
    # where
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = row < result.n
    mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
    dtype: tl.constexpr = sums.p_ptr.dtype.element_ty

    # load and compute
    scale = (1.0 if WITHIN else 0.5) * tl.load(plan_ptr + GRADIENT_SCALE) + total(result.not_finite_ptr, result.blocks, 1, 1024)
    moment_ptrs = sums.moment_ptr + row.to(tl.int64)[:, None] * D + offs_d[None, :]
    out = add_shares(tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype), moment_ptrs, tl.cast(sums.rows, tl.int64) * D, sums.splits, mask)
    if RADIAL:
        out = -out
        # Moments of differences already lack what belongs to the row.
        precision_pass = tl.load(plan_ptr + PRECISION_PASS)
        offs = (result.first_row + row).to(tl.int64)[:, None] * D + offs_d[None, :]
        if precision_pass == 0:
            out += _row_terms(points, directions, sums, row, offs, mask_n, mask, ROW_DIR, FIRST_PRODUCT)
        if SECOND_PRODUCT >= 0:  # noqa: SIM102, one is known to the compiler and the other is not
            if precision_pass == 1:
                out += _row_terms(points, directions, sums, row, offs, mask_n, mask, ROW_DIR, SECOND_PRODUCT)

    # store
    tl.store(result.out_ptr + row.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], scale.to(dtype) * out, mask=mask)


@triton.jit(do_not_specialize=["rows", "splits", "n", "blocks"])
def factors_finish_kernel(
    sum_ptr,  # (splits, rows, C)
    plan_ptr,
    not_finite_ptr,  # (blocks,)
    out_ptr,  # (n, COLUMNS)
    rows,
    splits,
    n,
    blocks,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The result to the factors of a block of rows in a block of columns."""
    # where
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < n)[:, None] & (offs_c < COLUMNS)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    # load and compute
    ptrs = sum_ptr + row.to(tl.int64)[:, None] * C + offs_c[None, :]
    out = add_shares(tl.zeros([BLOCK_N, BLOCK_C], dtype=dtype), ptrs, tl.cast(rows, tl.int64) * C, splits, mask)
    poison = total(not_finite_ptr, blocks, 1, 1024) + 0.0 * tl.load(plan_ptr + VALUE_SCALE)

    # store
    tl.store(out_ptr + row.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :], out + poison.to(dtype), mask=mask)


# Most columns of factors whose products are taken without products of matrices: a matrix product has at least 16.
MOST_MULTIPLIED = 2
# Most programs that store the rows of one operand.
_MOST_PROGRAMS = 256


@dataclass(frozen=True, eq=False)
class _LaunchChoice:
    """What launches take from the kernel, the dtype and the numbers of features and columns alone."""

    configs: dict[bool, tuple[MatmulConfig, ...]]  # of each pass, by whether it is that of the results to points
    multiplied: bool
    features: int  # with their padding, as columns
    columns: int
    block: int  # rows to which samples are padded


@functools.lru_cache(maxsize=256)
def _launch_choice(plan: DeviceKernelPlan, dim: int, columns: int, dtype: torch.dtype, device: torch.device) -> _LaunchChoice:
    architecture = device_limits(device).architecture
    names = [product_name(product, dtype) for product in plan.precision_passes]
    many = plan.powers or takes_exact_distances(plan.family)
    configs = {
        points: tuple(hvp_config(dim, columns, name, points, plan.bandwidths, architecture, many) for name in names)
        for points in (False, True)
    }
    every = [*configs[False], *configs[True]]
    multiplied = columns <= MOST_MULTIPLIED
    return _LaunchChoice(
        configs,
        multiplied,
        features=max(padded_dim(dim, config) for config in every),
        columns=columns if multiplied else max(padded(columns, config.block_c) for config in every),
        block=max(ROW_BLOCK, *(max(config.block_n, config.block_m) for config in every)),
    )


def takes_exact_distances(family: Family) -> bool:
    """Whether φ' is a function of the distance: products lose that of near rows, and this is what their second derivative depends on."""
    return family.takes_distance or family.number == MATERN_32.value


class _Problem:
    """What the sweeps of one problem share. x and y have the numbers 0 and 1; one sample against itself has both at the same rows."""

    def __init__(
        self,
        kernel: KernelNumbers,
        x: Tensor,
        y: Tensor | None,
        factors: Sequence[Tensor],
        directions: Sequence[Tensor | None],
        precision: str,
    ) -> None:
        self.within, self.device, self.dim, self.columns = y is None, x.device, x.shape[1], factors[0].shape[1]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, self.dtype, precision, self_pairs=not self.within)
        first, second = (*plan.precision_passes, -1)[:2]
        self.products = first, second if second != DIFFERENCES.value else -1
        self.choice = _launch_choice(plan, self.dim, self.columns, self.dtype, self.device)
        samples = [x] if y is None else [x, y]
        self.plan, self.sizes = plan, (x.shape[0], samples[-1].shape[0])
        self.prepared = prepare([Sample.of(z) for z in samples], kernel, plan, self.choice.features, self.choice.block)
        points = self.prepared.operands
        first_y = padded(x.shape[0], self.choice.block)
        rows = first_y + padded(self.sizes[1], self.choice.block)
        self.factor_starts = 0, first_y
        self.starts = (0, 0) if self.within else (0, first_y)
        self.padded_sizes = first_y, rows - first_y

        x_dir, y_dir, *factor_dirs = directions
        self.point_dirs = (x_dir is not None,) * 2 if self.within else (x_dir is not None, y_dir is not None)
        self.factor_dirs = tuple(direction is not None for direction in factor_dirs)
        self.not_finite = torch.zeros(3 * _MOST_PROGRAMS, dtype=torch.float64, device=self.device)
        stored = self._stored(factors, rows, 0)
        self.factors = Factors(*stored, *(self._stored(factor_dirs, rows, 1) if any(self.factor_dirs) else stored))
        self.directions = points
        if any(self.point_dirs):
            change = torch.empty(points.rows, dtype=self.dtype, device=self.device)
            given = (x_dir, None if self.within else y_dir)
            hi, lo = self._stored(given, points.rows, 2, change)
            self.directions = Operands(hi, lo, change, points.weight_ptr, points.first_y, points.rows)

    def _stored(self, given: Sequence[Tensor | None], rows: int, number: int, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows that belong to those of x and of y as operands; directions to points where their −x·x_dir is to be written to `change`."""
        x, y = (None if t is None else t.to(self.dtype).contiguous() for t in given)
        is_direction, multiplied = change is not None, self.choice.multiplied and change is None
        columns, c = (self.dim, self.choice.features) if is_direction else (self.columns, self.choice.columns)
        first, second = (IEEE.value, -1) if multiplied else self.products
        hi, lo = operand_buffers((rows, c), self.dtype, (first, second), self.device)
        not_finite = self.not_finite[number * _MOST_PROGRAMS :]
        block_c = block_of(c)
        key = (
            self.prepared.key, self.columns, number, x is None, y is None, tensor_key(*(t for t in (x, y) if t is not None))
        )  # fmt: skip
        launch(
            store_kernel, key, self.device, (min(triton.cdiv(rows, ROW_BLOCK), _MOST_PROGRAMS), 1, 1),
            (Given(x, y, *self.sizes), self.prepared.operands, self.prepared.tables.plan_ptr,
             Stored(hi, lo, hi if change is None else change, not_finite, self.padded_sizes[0], rows)),
            lambda: {
                "DIRECTIONS": is_direction, "COLUMNS": columns, "C": c, "FIRST_PRODUCT": first, "SECOND_PRODUCT": second,
                "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c,
            },
        )  # fmt: skip
        return hi, lo

    def _sweep(self, side: int, points: bool) -> tuple[Any, ...]:
        """The start of a sweep over the rows of sample `side`, their number, and the constexprs of their directions."""
        other = 1 - side
        start = Start(
            self.starts[side], self.starts[other], self.factor_starts[side], self.factor_starts[other], self.padded_sizes[other],
            self.choice.features, self.choice.columns,
        )  # fmt: skip
        flags = self.point_dirs[side], self.point_dirs[other], points and self.factor_dirs[side], self.factor_dirs[other]
        return start, self.padded_sizes[side], flags

    def _splits(self, programs: int, tiles: int, flags: Sequence[bool]) -> int:
        """Into how many shares the columns are cut; none where no direction changes the result."""
        return column_splits(programs, tiles, device_limits(self.device).multiprocessors) if any(flags) else 0

    def _constants(self, number: int, config: MatmulConfig, flags: Sequence[bool]) -> dict[str, Any]:
        """Constexprs and options of the sweep of pass `number`."""
        options = config.launch()
        blocks = {name: options.pop(name) for name in list(options) if name.startswith("BLOCK")}
        sizes = self.choice.features, self.choice.columns
        spec = HVPSpec(
            number, self.within, self.plan.precision_passes[number], self.choice.multiplied, self.plan.family, self.plan.bandwidths,
            takes_exact_distances(self.plan.family), *sizes, *flags, **blocks,
        )  # fmt: skip
        return {"SPEC": spec} | options

    def to_points(self, side: int) -> Tensor:
        """The result to x or y."""
        start, rows, flags = self._sweep(side, True)
        size, d, configs = self.sizes[side], self.choice.features, self.choice.configs[True]
        programs = (rows // configs[0].block_n) * (d // configs[0].block_d)
        splits = self._splits(programs, start.columns // configs[0].block_m, flags)
        sizes = splits * rows, splits * rows, splits * rows * d
        sums = PointSums(*torch.empty(sum(sizes), dtype=self.dtype, device=self.device).split(sizes), rows, splits)
        plan, table, _ = self.prepared.tables
        key = self.prepared.key, self.columns, self.within, flags
        for number, config in enumerate(configs if splits else ()):
            launch(
                points_kernel, (key, number), self.device, (rows // config.block_n, d // config.block_d, splits),
                (self.prepared.operands, self.directions, self.factors, plan, table, sums, start),
                functools.partial(self._constants, number, config, flags),
            )  # fmt: skip
        out = torch.empty((size, self.dim), dtype=self.dtype, device=self.device)
        block_d = block_of(d)
        launch(
            points_finish_kernel, key, self.device, (triton.cdiv(size, ROW_BLOCK), d // block_d, 1),
            (self.prepared.operands, self.directions, sums, plan,
             PointResult(out, self.not_finite, start.row, size, self.not_finite.numel())),
            lambda: {
                "RADIAL": self.plan.family.radial, "WITHIN": self.within, "ROW_DIR": flags[0],
                "FIRST_PRODUCT": self.products[0], "SECOND_PRODUCT": self.products[1],
                "FEATURES": self.dim, "D": d, "BLOCK_N": ROW_BLOCK, "BLOCK_D": block_d,
            },
        )  # fmt: skip
        return out

    def to_factors(self, side: int) -> Tensor:
        """The result to u or v."""
        start, rows, flags = self._sweep(side, False)
        size, c, configs = self.sizes[side], self.choice.columns, self.choice.configs[False]
        blocks = 1 if self.choice.multiplied else c // configs[0].block_c
        programs = (rows // configs[0].block_n) * blocks
        splits = self._splits(programs, start.columns // configs[0].block_m, flags)
        sums = torch.empty(splits * rows * c, dtype=self.dtype, device=self.device)
        plan, table, _ = self.prepared.tables
        key = self.prepared.key, self.columns, self.within, flags
        for number, config in enumerate(configs if splits else ()):
            blocks = 1 if self.choice.multiplied else c // config.block_c
            launch(
                factors_kernel, (key, number), self.device, (rows // config.block_n, blocks, splits),
                (self.prepared.operands, self.directions, self.factors, plan, table, sums, start),
                functools.partial(self._constants, number, config, flags),
            )  # fmt: skip
        out = torch.empty((size, self.columns), dtype=self.dtype, device=self.device)
        block_c = block_of(c)
        launch(
            factors_finish_kernel, key, self.device, (triton.cdiv(size, ROW_BLOCK), c // block_c, 1),
            (sums, plan, self.not_finite, out, rows, splits, size, self.not_finite.numel()),
            lambda: {"COLUMNS": self.columns, "C": c, "BLOCK_N": ROW_BLOCK, "BLOCK_C": block_c},
        )  # fmt: skip
        return out


def kernel_hvp(
    kernel: KernelNumbers,
    x: Tensor,
    y: Tensor | None,
    u: Tensor,
    v: Tensor,
    directions: Sequence[Tensor | None],
    wanted: Sequence[bool],
    precision: str,
) -> list[Tensor | None]:
    """The Hessian of S times the directions to x (N, D), y (M, D), u (N, C) and v (M, C), each of which may be None for zero.

    With y None x is against itself without the pairs i = i, u·vᵀ and its change are symmetric, and the result to x is that through both
    places; y has no direction of its own and no result.

    Returns:
        The results wanted, to x, y, u and v, in the accumulation dtype; None for the others.
    """
    problem = _Problem(kernel, x, y, (u, v), directions, precision)
    sweeps = (problem.to_points, 0), (problem.to_points, 1), (problem.to_factors, 0), (problem.to_factors, 1)
    return [sweep(side) if want else None for (sweep, side), want in zip(sweeps, wanted, strict=True)]
