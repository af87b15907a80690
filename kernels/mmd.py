"""MMD² and its gradient on a GPU: prepare (`fastvae.kernels.prepare`), sweep, finish, with no copy to or from the host.

The sweep takes a block of rows of z = [x; y] against the columns of one sample, tile by tile, and keeps its sums in registers: those of
formula (1) of `fastvae.reference.mmd`, and Σ_j w_j·W_ij·(u_i − u_j) of a row's gradient, over scaled rows u, where W_ij is the pair's slope
−φ'. Each program owns its sums: no atomics, a fixed order, the same bits every time.
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
from fastvae.kernels.config import (
    WGMMA,
    SweepConfig,
    TermsConfig,
    column_splits,
    device_limits,
    padded_dim,
    sweep_config,
    terms_config,
)
from fastvae.kernels.families import (
    GAUSSIAN,
    NO_CLOSED_FORM,
    NORMAL_PRIOR,
    POLYNOMIAL_DIAGONAL,
    RATIONAL_QUADRATIC_LARGE,
    RIESZ,
    Family,
    closed_form_term,
)
from fastvae.kernels.launch import launch
from fastvae.kernels.plan import (
    CONSTANT,
    DIAGONAL,
    GRADIENT_SCALE,
    OTHER_GRADIENT,
    OTHER_VALUE,
    OWN_GRADIENT,
    OWN_VALUE,
    PLAN,
    PRECISION_PASS,
    PRIOR,
    SCALE,
    SLOPE_CONSTANT,
    SLOPE_CONSTANT_GRADIENT,
    TOTAL,
    UNBIASED_SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    DeviceKernelPlan,
    device_kernel_plan,
)
from fastvae.kernels.prepare import (
    ROW_BLOCK,
    STATISTICS,
    Sample,
    as_product,
    from_row,
    load_rows,
    padded,
    prepare,
    sample_rows,
)
from fastvae.kernels.products import (
    BF16,
    BF16X3,
    DIFFERENCES,
    column_parts,
    dot,
    load_block,
    load_rounded_rows,
    product_name,
    row_sums,
    split_operand,
    tile_exponent,
)
from fastvae.kernels.reductions import add_shares, share_of, total
from fastvae.kernels.sums import (
    bandwidth_terms,
    evaluate_sum,
    gammas_of,
    load_group,
    load_numbers,
    load_parameters,
    load_table,
    subtracted_constants,
    term_count,
    term_number,
)

# From so many pairs on a sweep is worth launches of its own.
_APART = 1 << 26

# Bits of the flags of a sample: the gradient of its rows is wanted, they meet the other sample, each pair within it is met once.
_GRADIENT, _CROSS, _SYMMETRIC = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


# Tuples hold pointers in a kernel and tensors on the host. B is the number of problems.


class PartSums(NamedTuple):
    """What a sweep writes, in parts: sums over shares of the columns of the own and of the other sample, in turn."""

    value_ptr: Any  # (1 + terms, parts, B, swept rows), sums over columns as they enter MMD²: of the kernel, then of `bandwidth_terms`
    slope_ptr: Any  # (parts, B, rows with gradient), Σ_j w_j·(W − constant)
    moments_ptr: Any  # (parts, B, rows with gradient, D), Σ_j w_j·(W − constant)·u_j, by differences of u_j − u_i
    parts: Any


class Sizes(NamedTuple):
    """Numbers of rows."""

    n: Any  # of x
    m: Any  # of y
    x_padded: Any  # of x that are swept, with their padding; those of y come behind them
    y_padded: Any
    first_gradient: Any  # the first swept row whose gradient is wanted
    gradient_rows: Any


class SweepSpec(NamedTuple):
    """The constexprs of a sweep besides its tile's."""

    TABLE: int
    PASS: int  # runs if it is the plan's
    SAMPLES: int
    BATCHED: bool  # several problems
    GRADIENT: bool
    TERMS: int  # how many `bandwidth_terms` a program sums in the place of the kernel, or 0
    GROUPS: int  # of bandwidths, each of which has its own programs
    WEIGHTED: bool
    PRODUCT: int
    D: int
    FAMILY: Family
    BANDWIDTHS: int
    SQUARINGS: int


class _KernelTable(NamedTuple):
    """The coefficients of the sum of kernels, what is subtracted from its value and slope, and the scale of the rows."""

    entries: Any
    ptr: Any
    parameters: Any
    value_constant: Any
    slope_constant: Any
    scale: Any


class _Sums(NamedTuple):
    """What a program accumulates over tiles; value and slope over columns 8 apart, see `row_sums`."""

    value: Any
    slope: Any
    moments: Any
    terms: Any


@triton.jit
def _counted(tile, offs_n, offs_m, last_m, weight_ptr, DIAGONAL: tl.constexpr, SPEC: tl.constexpr):
    """A tile without the pairs that do not count, times the weights of its columns."""
    if DIAGONAL:
        tile = tl.where(offs_n[:, None] != offs_m[None, :], tile, 0.0)
    if SPEC.PRODUCT == DIFFERENCES:
        # Padded columns are rows of zeros here, pairs with the origin.
        tile = tl.where((offs_m < last_m)[None, :], tile, 0.0)
    if SPEC.WEIGHTED:
        tile = tile * tl.load(weight_ptr + offs_m)[None, :]
    return tile


@triton.jit
def _add_tile(
    sums, rows, row_out, operands, table, start_m, last_m, d_out,
    DIAGONAL: tl.constexpr, SLOPES: tl.constexpr, SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums with those of one tile added. DIAGONAL leaves out the pairs of a row with itself. Differences take `row_out`, the features
    of the rows in the block of moments."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    TERMS: tl.constexpr = SPEC.TERMS
    D: tl.constexpr = SPEC.D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    weight_ptr, offs_n = operands.weight_ptr, rows.offs_n
    value_acc, slope_acc, moments, terms = sums.value, sums.slope, sums.moments, sums.terms
    exponent, col_hi, col_lo = tile_exponent(rows, operands, start_m, table.scale, FAMILY, SPEC.PRODUCT, D, BLOCK_M, BLOCK_K)
    if TERMS > 0:
        new = ()
        tiles = bandwidth_terms(exponent, table.entries, table.parameters, FAMILY, TERMS)
        for n in tl.static_range(TERMS):
            new += (terms[n] + tl.sum(_counted(tiles[n], offs_n, offs_m, last_m, weight_ptr, DIAGONAL, SPEC), 1),)
        terms = new
    else:
        value, slope = evaluate_sum(
            exponent, table.entries, table.ptr, table.parameters, table.value_constant, table.slope_constant,
            FAMILY, SPEC.GRADIENT, SPEC.BANDWIDTHS, SPEC.SQUARINGS,
        )  # fmt: skip
        value = _counted(value, offs_n, offs_m, last_m, weight_ptr, DIAGONAL, SPEC)
        slope = _counted(slope, offs_n, offs_m, last_m, weight_ptr, DIAGONAL, SPEC)
        value_acc += row_sums(value)
    if SPEC.GRADIENT:
        if SPEC.PRODUCT == DIFFERENCES:
            offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
            col = tl.load(operands.hi_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :])
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - row_out[:, None, :]) * table.scale), 1)
        else:
            if SLOPES:
                slope_acc += row_sums(slope)
            col_hi, col_lo = column_parts(col_hi, col_lo, operands, start_m, d_out, SPEC.PRODUCT, D, BLOCK_M, BLOCK_K, BLOCK_D)
            slope_hi, slope_lo = split_operand(slope, SPEC.PRODUCT)
            # A tensor core's accumulator truncates: each tile starts from zero, and its sum is added in the accumulation dtype.
            moments += dot(slope_hi, slope_lo, col_hi, col_lo, tl.zeros_like(moments), SPEC.PRODUCT)
    return _Sums(value_acc, slope_acc, moments, terms)


@triton.jit
def _store_terms(out_ptr, part_size, terms, group, SPEC: tl.constexpr):
    """Store the terms of a block of rows, each behind all parts of the one before."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    TERMS: tl.constexpr = SPEC.TERMS
    stride = tl.cast(tl.num_programs(2), tl.int64) * part_size
    for t in tl.static_range(TERMS):
        term_ptr = out_ptr + (1 + term_number(group, t, FAMILY, TERMS, SPEC.BANDWIDTHS)) * stride
        tl.store(term_ptr + tl.arange(0, terms[t].shape[0]), terms[t])


@triton.jit(do_not_specialize=["first_row", "x_flags", "y_flags"])
def sweep_kernel(
    operands, tables, part_sums, swept, sizes, first_row, x_flags, y_flags, SPEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over a share of the columns of its own or of the other sample.

    Program 0 is the block of rows from `first_row` on, program 1 the block of moments or the group of bandwidths and the problem of a
    batch, program 2 the share, own and other in turn. A step of the exponent's product takes BLOCK_K features, a block of moments BLOCK_D.
    """
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    SAMPLES: tl.constexpr = SPEC.SAMPLES
    TERMS: tl.constexpr = SPEC.TERMS
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    D: tl.constexpr = SPEC.D
    d_out = tl.program_id(1)
    part = tl.program_id(2)
    out = tl.cast(part, tl.int64)
    batches = 1
    plan_ptr, table_ptr = tables.plan_ptr, tables.table_ptr
    operands = as_product(operands, PRODUCT)
    if SPEC.BATCHED:
        # Bases of their own for the pointers take registers, which one problem is spared.
        d_blocks: tl.constexpr = D // BLOCK_D if SPEC.GRADIENT else SPEC.GROUPS
        problem = (tl.program_id(1) // d_blocks).to(tl.int64)
        d_out = tl.program_id(1) % d_blocks
        batches = tl.num_programs(1) // d_blocks
        # A problem has the same bytes in every pass.
        halves: tl.constexpr = 2 if PRODUCT == BF16 or PRODUCT == BF16X3 else 1  # noqa: SIM109
        operands = from_row(operands, problem * operands.rows, halves * D)
        plan_ptr += problem * PLAN
        table_ptr += problem * SPEC.TABLE
        out = out * batches + problem
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PASS:
        return
    # One bandwidth of a Gaussian has its value for slope, and a polynomial needs only moments.
    SLOPES: tl.constexpr = FAMILY.radial and (FAMILY.number != GAUSSIAN or SPEC.BANDWIDTHS > 1)
    dtype: tl.constexpr = operands.neg_half_norm2_ptr.dtype.element_ty
    row = first_row + tl.program_id(0) * BLOCK_N
    swept_rows = sizes.x_padded + sizes.y_padded
    is_y = (row >= sizes.x_padded) & (SAMPLES == 2)
    sample = is_y.to(tl.int32)
    other = part % SAMPLES
    flags = tl.where(is_y, y_flags, x_flags)
    if SPEC.GRADIENT and D > BLOCK_D:  # noqa: SIM102, one is known to the compiler and the other is not
        if (d_out > 0) & ((flags & _GRADIENT) == 0):
            return
    terms = ()
    for _ in tl.static_range(TERMS):
        terms += (tl.zeros([BLOCK_N], dtype=dtype),)
    if SAMPLES == 2:  # noqa: SIM102
        if (other == 1) & ((flags & _CROSS) == 0):
            # These rows have no gradient either: a value of zero is all there is to store.
            out_ptr = part_sums.value_ptr + out * swept_rows + row
            if TERMS > 0:
                _store_terms(out_ptr, batches * swept_rows, terms, d_out, SPEC)
            else:
                tl.store(out_ptr + tl.arange(0, BLOCK_N), tl.zeros([BLOCK_N], dtype))
            return
    y_row = operands.first_y + swept.y_start + (row - sizes.x_padded)
    start_n = tl.where(is_y, y_row, swept.x_start + row)
    local_n = tl.arange(0, BLOCK_N)[:, None] * D

    # load
    rows = load_block(operands, start_n, PRODUCT, D, BLOCK_N, BLOCK_K)
    row_out = rows.neg_half_norm2
    if PRODUCT == DIFFERENCES and SPEC.GRADIENT:
        row_start = tl.cast(start_n, tl.int64) * D
        row_out = tl.load(operands.hi_ptr + row_start + (local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]))
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    value_constant = tl.load(plan_ptr + VALUE_CONSTANT).to(dtype)
    slope_constant = tl.load(plan_ptr + SLOPE_CONSTANT).to(dtype)
    if TERMS > 0:
        entries = load_group(table_ptr, d_out, FAMILY, TERMS, SPEC.BANDWIDTHS, SPEC.TABLE)
    else:
        entries = load_table(table_ptr, FAMILY, SPEC.GRADIENT, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, PRODUCT)
    table = _KernelTable(entries, table_ptr, parameters, value_constant, slope_constant, scale)

    # The columns of the own sample without the band of tiles on the diagonal, which come masked after the others: a self-pair in the
    # products would swamp small sums. Or those of the other sample, which has no such band.
    in_y = sample + other == 1
    first_m = tl.where(in_y, operands.first_y, 0)
    true_m = tl.where(in_y, operands.first_y + sizes.m, sizes.n)
    last_m = tl.where(in_y, operands.first_y + tl.cdiv(sizes.m, BLOCK_N) * BLOCK_N, tl.cdiv(sizes.n, BLOCK_N) * BLOCK_N)
    band = first_m
    band_end = first_m
    if other == 0:
        band = tl.minimum(start_n // BLOCK_M * BLOCK_M, last_m)
        band_end = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, last_m)
    twice = ((flags & _SYMMETRIC) != 0) & (other == 0)
    left = tl.where(twice, 0, band - first_m)
    columns = left + (last_m - band_end)
    first, last = share_of(columns, part // SAMPLES, tl.num_programs(2) // SAMPLES, BLOCK_M)

    # compute
    zeros = tl.zeros([BLOCK_N, 8], dtype=dtype)
    sums = _Sums(zeros, zeros, tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype), terms)
    for offset in range(first, last, BLOCK_M):
        start_m = tl.multiple_of(tl.where(offset >= left, band_end + (offset - left), first_m + offset), BLOCK_M)
        sums = _add_tile(sums, rows, row_out, operands, table, start_m, true_m, d_out, False, SLOPES, SPEC, BLOCK_M, BLOCK_K, BLOCK_D)
    value_acc, slope_acc, moments, terms = sums.value, sums.slope, sums.moments, sums.terms
    if twice:
        value_acc += value_acc
    if TERMS > 0:
        counts = ()
        for t in tl.static_range(TERMS):
            counts += (terms[t] * tl.where(twice, 2.0, 1.0).to(dtype),)
        terms = counts
    sums = _Sums(value_acc, slope_acc, moments, terms)
    if part < SAMPLES:
        for start_m in tl.range(band, band_end, BLOCK_M, num_stages=1):
            sums = _add_tile(sums, rows, row_out, operands, table, start_m, true_m, d_out, True, SLOPES, SPEC, BLOCK_M, BLOCK_K, BLOCK_D)
    value = tl.sum(sums.value, 1)
    slope = tl.sum(sums.slope, 1) if SLOPES else value
    if not SPEC.WEIGHTED and PRODUCT != DIFFERENCES:
        # A padded column has added −constant. The first share takes it back, whichever has added it: the shares are summed.
        in_band = tl.maximum(band_end - tl.maximum(true_m, band), 0)
        padded = (last_m - true_m) - in_band
        padded = tl.where(part < SAMPLES, in_band + tl.where(twice, 2 * padded, padded), 0)
        value += padded * value_constant
        slope += padded * slope_constant

    # store
    if TERMS > 0:
        factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_VALUE, OTHER_VALUE) + sample)).to(dtype)
        scaled_terms = ()
        for t in tl.static_range(TERMS):
            term = sums.terms[t]
            if len(entries) > 0 and t % 2 == 0 and not SPEC.WEIGHTED and PRODUCT != DIFFERENCES:
                term += padded * entries[t + 1]
            scaled_terms += (term * factor,)
        out_ptr = part_sums.value_ptr + out * swept_rows + row
        _store_terms(out_ptr, batches * swept_rows, scaled_terms, d_out, SPEC)
    elif d_out == 0:
        factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_VALUE, OTHER_VALUE) + sample)).to(dtype)
        tl.store(part_sums.value_ptr + out * swept_rows + row + tl.arange(0, BLOCK_N), value * factor)
    if SPEC.GRADIENT:  # noqa: SIM102
        if (flags & _GRADIENT) != 0:
            factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_GRADIENT, OTHER_GRADIENT) + sample)).to(dtype)
            out = out * sizes.gradient_rows + (row - sizes.first_gradient)
            if d_out == 0:
                tl.store(part_sums.slope_ptr + out + tl.arange(0, BLOCK_N), slope * factor)
            offs_out = local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            tl.store(part_sums.moments_ptr + out * D + offs_out, sums.moments * factor)


class Results(NamedTuple):
    """What `finish_kernel` writes."""

    mmd_ptr: Any  # (B,)
    term_ptr: Any  # (B, TERMS), float64
    grad_x_ptr: Any  # (B, x_rows, FEATURES)
    grad_y_ptr: Any


@triton.jit
def finish_kernel(
    samples, statistics, numbers, operands, tables, part_sums, results, swept, sizes,
    GRADIENT: tl.constexpr, TERMS: tl.constexpr, BLOCK_R: tl.constexpr, SPEC: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """MMD² of a problem by program 0 and each sum of terms by the next ones, in float64 and a fixed order; by each other the gradient of a
    block of rows."""
    if tl.program_id(0) <= TERMS:
        _finish_value(samples, numbers, operands, tables, part_sums, results, swept, sizes, TERMS, BLOCK_R, SPEC, SUM)
        return
    if GRADIENT:
        start_n = (tl.program_id(0) - 1 - TERMS) * SPEC.BLOCK_N
        _finish_gradient(samples, statistics, numbers, operands, tables, part_sums, results, swept, sizes, start_n, SPEC, SUM)


@triton.jit
def _finish_value(
    samples, numbers, operands, tables, part_sums, results, swept, sizes,
    TERMS: tl.constexpr, BLOCK_R: tl.constexpr, SPEC: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """MMD² of a problem, or a sum of terms, with BLOCK_R rows a step."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    problem = tl.program_id(1).to(tl.int64)
    batches = tl.cast(tl.num_programs(1), tl.int64)
    dtype: tl.constexpr = results.mmd_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
    weight_ptr = operands.weight_ptr + problem * operands.rows
    padded = sizes.x_padded + sizes.y_padded
    value_ptr = part_sums.value_ptr + (tl.program_id(0) * part_sums.parts * batches + problem) * padded

    # load and compute
    value = tl.zeros([BLOCK_R], dtype=tl.float64)
    squares = tl.zeros([BLOCK_R], dtype=tl.float64)
    shares = tl.zeros([BLOCK_R], dtype=tl.float64)
    for start in range(0, padded, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        in_x = row < swept.x_rows
        in_y = (row >= sizes.x_padded) & (row < sizes.x_padded + swept.y_rows)
        mask = in_x | in_y
        p = tl.where(in_x, 1.0 / samples.n.to(tl.float64), 1.0 / samples.m.to(tl.float64))
        if SPEC.X_WEIGHTED or SPEC.Y_WEIGHTED:
            source = tl.where(in_x, swept.x_start + row, operands.first_y + swept.y_start + (row - sizes.x_padded))
            p = tl.load(weight_ptr + source, mask=mask, other=0.0).to(tl.float64)
        p = tl.where(mask, p, 0.0)
        value += p * add_shares(tl.zeros([BLOCK_R], dtype=tl.float64), value_ptr + row, batches * padded, part_sums.parts, mask)
        squares += p * p
        shares += p

    # store
    if TERMS > 0:  # noqa: SIM102, one is known to the compiler and the other is not
        if tl.program_id(0) > 0:
            term = tl.program_id(0) - 1
            sum_of_terms = tl.sum(value)
            if FAMILY.takes_distance:
                # From the exponent's units to √(2t) of the widest bandwidth: φ of a homogeneous kernel, and t' of each other one.
                values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
                gammas = gammas_of(values, FAMILY, SUM.KERNELS, SPEC.FEATURES)
                factor = 2.0 * tl.sqrt(gammas[0]) / tl.load(plan_ptr + SCALE)
                if FAMILY.number == RIESZ:
                    factor = tl.exp2(values[2 * SUM.KERNELS] * tl.log2(factor))
                if not FAMILY.homogeneous:
                    factor *= FAMILY.scale
                    factor = tl.where(term % 2 == 1, factor, 1.0)
                sum_of_terms *= factor
            tl.store(results.term_ptr + problem * TERMS + term, sum_of_terms)
            return
    mmd = tl.load(plan_ptr + VALUE_SCALE) * tl.sum(value) + tl.load(plan_ptr + DIAGONAL) * tl.sum(squares)
    if SUM.CLOSED_FORM == NORMAL_PRIOR:
        mmd += tl.load(plan_ptr + PRIOR) * tl.sum(shares)
    if SUM.CLOSED_FORM != NO_CLOSED_FORM:
        programs = tl.cdiv(operands.rows, SPEC.BLOCK_N)
        mmd += total(tables.closed_form_ptr + problem * programs, programs, 1, BLOCK_R)
    tl.store(results.mmd_ptr + problem, mmd.to(dtype))


@triton.jit
def _finish_gradient(
    samples, statistics, numbers, operands, tables, part_sums, results, swept, sizes, start_n, SPEC: tl.constexpr, SUM: tl.constexpr
):
    """The gradient of the block of rows that starts at row `start_n` of those with gradient."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    FEATURES: tl.constexpr = SPEC.FEATURES
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    problem = tl.program_id(1).to(tl.int64)
    operands = from_row(operands, problem * operands.rows, SPEC.D)
    dtype: tl.constexpr = results.mmd_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
    slope_ptr = part_sums.slope_ptr + problem * sizes.gradient_rows
    moments_ptr = part_sums.moments_ptr + problem * sizes.gradient_rows * SPEC.D
    part_size = tl.cast(tl.num_programs(1), tl.int64) * sizes.gradient_rows
    n, m = samples.n.to(tl.float64), samples.m.to(tl.float64)
    in_y = start_n + sizes.first_gradient >= sizes.x_padded
    out_row = start_n + tl.arange(0, BLOCK_N)
    local = out_row
    z_ptr, _weight_ptr, _count = sample_rows(samples, problem, in_y, SPEC)
    z_ptr += tl.cast(swept.x_start, tl.int64) * FEATURES
    grad_ptr, count = results.grad_x_ptr + problem * swept.x_rows * FEATURES, swept.x_rows
    source = swept.x_start
    p = 1.0 / n
    if SPEC.SAMPLES == 2:  # noqa: SIM102
        if in_y:
            local = local + (sizes.first_gradient - sizes.x_padded)
            z_ptr += tl.cast(swept.y_start - swept.x_start, tl.int64) * FEATURES
            grad_ptr, count = results.grad_y_ptr + problem * swept.y_rows * FEATURES, swept.y_rows
            source = operands.first_y + swept.y_start
            p = 1.0 / m
    mask_n = local < count
    sample = in_y.to(tl.int32)
    p = tl.zeros([BLOCK_N], dtype=tl.float64) + p
    if SPEC.X_WEIGHTED or SPEC.Y_WEIGHTED:
        p = tl.load(operands.weight_ptr + source + local, mask=mask_n, other=0.0).to(tl.float64)
    scale = tl.load(plan_ptr + GRADIENT_SCALE).to(dtype)

    # load and compute
    slope = tl.zeros([BLOCK_N], dtype=dtype)
    if FAMILY.radial:
        slope = add_shares(slope, slope_ptr + out_row, part_size, part_sums.parts, mask_n)
    norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    if SUM.CLOSED_FORM != NO_CLOSED_FORM:
        for start_d in range(0, SPEC.D, BLOCK_D):
            z, _ = load_rows(z_ptr, local, mask_n, start_d + tl.arange(0, BLOCK_D), FEATURES)
            norm2 += tl.sum(z.to(tl.float64) * z.to(tl.float64), 1)
    values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
    gammas = gammas_of(values, FAMILY, KERNELS, FEATURES)
    squares = 0.0
    if SUM.CLOSED_FORM == NORMAL_PRIOR:
        statistic_ptr = statistics.statistic_ptr + problem * (SPEC.SAMPLES * SPEC.CHUNKS * STATISTICS)
        squares = tl.sum(tl.load(statistic_ptr + tl.arange(0, SPEC.CHUNKS) * STATISTICS))
    constants = subtracted_constants(squares / n + FEATURES, gammas, FAMILY, KERNELS)
    _, closed_slope = closed_form_term(norm2, p, constants, values, gammas, SUM.CLOSED_FORM, FAMILY, KERNELS)
    for start_d in range(0, SPEC.D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        z, mask = load_rows(z_ptr, local, mask_n, offs_d, FEATURES)
        z = z.to(dtype)
        moments_ptrs = moments_ptr + out_row.to(tl.int64)[:, None] * SPEC.D + offs_d[None, :]
        moments = add_shares(tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype), moments_ptrs, part_size * SPEC.D, part_sums.parts, mask)
        row_gradient = moments
        if FAMILY.radial:
            rounded = load_rounded(operands, plan_ptr, source + local, offs_d, mask, dtype, SPEC, SUM)
            row_gradient = slope[:, None] * rounded - moments
        gradient = p.to(dtype)[:, None] * (scale * row_gradient)
        if FAMILY.number == GAUSSIAN:
            gradient += _slope_constant_gradient(z, statistics, plan_ptr, problem, sample, offs_d, p, SPEC)
        if SUM.CLOSED_FORM != NO_CLOSED_FORM:
            gradient += closed_slope.to(dtype)[:, None] * z
        tl.store(grad_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], gradient, mask=mask)


@triton.jit
def load_rounded(operands, plan_ptr, row, offs_d, mask, dtype: tl.constexpr, SPEC: tl.constexpr, SUM: tl.constexpr):
    """The rows as the products of the pass that has run saw them. Sums of differences need none: they get zeros."""
    precision_pass = tl.load(plan_ptr + PRECISION_PASS).to(tl.int32)
    offs = row.to(tl.int64)[:, None] * SPEC.D + offs_d[None, :]
    rounded = tl.zeros_like(mask).to(dtype)
    if precision_pass == 0:
        rounded = load_rounded_rows(operands.hi_ptr, operands.lo_ptr, offs, mask, dtype, SUM.FIRST_PRODUCT)
    if SUM.SECOND_PRODUCT >= 0:  # noqa: SIM102
        if precision_pass == 1:
            rounded = load_rounded_rows(operands.hi_ptr, operands.lo_ptr, offs, mask, dtype, SUM.SECOND_PRODUCT)
    return rounded


@triton.jit
def _slope_constant_gradient(z, statistics, plan_ptr, problem, sample, offs_d, p, SPEC: tl.constexpr):
    """The gradient of the constant that the slopes of all pairs lack: that times Σ_j w_j·(z_i − z_j) over each sample."""
    gradient = tl.zeros_like(z)
    factor = tl.load(plan_ptr + SLOPE_CONSTANT_GRADIENT)
    if factor != 0.0:
        slots = SPEC.SAMPLES * SPEC.CHUNKS * SPEC.D
        sum_ptr = statistics.sum_ptr + problem * slots
        centred = (z - tl.load(statistics.centre_ptr + problem * slots + offs_d)[None, :]).to(tl.float64)
        mean = _mean(sum_ptr, plan_ptr, sample, offs_d, SPEC)
        rest = tl.load(plan_ptr + (UNBIASED_SCALE + sample)) * (centred - mean[None, :])
        if SPEC.SAMPLES == 2:
            mean = _mean(sum_ptr, plan_ptr, 1 - sample, offs_d, SPEC)
            rest -= centred - mean[None, :]
        gradient = (factor * p[:, None] * rest).to(z.dtype)
    return gradient


@triton.jit
def _mean(sum_ptr, plan_ptr, sample, offs_d, SPEC: tl.constexpr):
    """Σ_j w_j·(z_j − c) over a sample whose weights sum to one, from the sums of its programs."""
    sum_ptrs = sum_ptr + sample * (SPEC.CHUNKS * SPEC.D) + offs_d
    sums = add_shares(tl.zeros([offs_d.shape[0]], dtype=tl.float64), sum_ptrs, SPEC.D, SPEC.CHUNKS, offs_d < SPEC.D)
    return sums / tl.load(plan_ptr + (TOTAL + sample))


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a launch takes from the kernel, dtype and number of features alone."""

    configs: tuple[SweepConfig, ...]  # of each pass
    values: tuple[SweepConfig, ...]  # the same without gradient, if some rows are swept apart
    terms: tuple[TermsConfig, ...]  # the same of `bandwidth_terms`, if they are wanted
    features: int
    block: int  # rows


@functools.lru_cache(maxsize=256)
def _choice(
    plan: DeviceKernelPlan, dim: int, dtype: torch.dtype, gradient: bool, apart: bool, terms: bool, pair: bool, device: torch.device
) -> _Choice:
    """`pair` says that there are two samples, of one problem."""
    architecture, powers = device_limits(device).architecture, plan.powers
    gaussian_pair = pair and plan.family.number == GAUSSIAN.value
    names = [product_name(product, dtype) for product in plan.precision_passes]

    def sweep_configs(with_gradient: bool) -> tuple[SweepConfig, ...]:
        return tuple(sweep_config(dim, name, with_gradient, plan.bandwidths, architecture, powers, gaussian_pair) for name in names)

    steep = plan.family.number == RATIONAL_QUADRATIC_LARGE.value
    configs, values = sweep_configs(gradient), sweep_configs(False) if apart else ()
    term_configs = tuple(terms_config(dim, name, plan.bandwidths, architecture, steep) for name in names) if terms else ()
    every = *configs, *values, *term_configs
    features = max(padded_dim(dim, config) for config in every)
    block = max(ROW_BLOCK, *(config.block_n for config in every))
    return _Choice(configs, values, term_configs, features, block)


def _flags(sample: Sample, gradient: bool, cross: bool) -> int:
    symmetric = sample.whole and not gradient
    return gradient * _GRADIENT.value | cross * _CROSS.value | symmetric * _SYMMETRIC.value


def mmd(
    x: Sample, y: Sample | None, kernel: KernelNumbers, unbiased: bool, bandwidth_grad: bool, precision: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """MMD² () or (batch,), against N(0, I) without y; its gradients to x and y; and with `bandwidth_grad` the sums of `bandwidth_terms`
    over the pairs (B, terms), and which constants were subtracted of the bandwidths (B, bandwidths), widest first. Where no row of y is
    swept, the last is what each pair lacks of the kernel, () or (batch,), which then does not cancel."""
    samples = [x] if y is None else [x, y]
    batch, shape, (n, dim) = x.problems, x.points.shape[:-2], x.points.shape[-2:]
    m, two, device = samples[-1].points.shape[-2], len(samples) == 2, x.points.device
    dtype = torch.float64 if x.points.dtype == torch.float64 else torch.float32
    gradient = any(sample.gradient for sample in samples)
    weighted = any(sample.weights is not None for sample in samples)
    if precision == "high" and gradient and batch * n * m >= _APART and device_limits(device).architecture in WGMMA:
        # Three products of bfloat16 parts then take less time than one of tf32: 0.65 of it at D 64 (H200).
        precision = "highest"
    plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, dtype, precision)
    terms = term_count(plan.family, kernel.count) if bandwidth_grad else 0
    # Rows without gradient beside rows with one take about half the time in a kernel of values alone, if they are worth its launches.
    lone = [sample for sample in samples if gradient and not sample.gradient]
    apart = any(batch * sample.rows * sample.points.shape[-2] >= _APART for sample in lone)
    choice = _choice(plan, dim, dtype, gradient, apart, terms > 0, two and batch == 1, device)
    d = choice.features

    # The rows that are swept, and what of them.
    padded_rows = [padded(sample.rows, choice.block) for sample in samples]
    x_padded, y_padded = (*padded_rows, 0)[:2]
    # Rows with a gradient meet the other sample. The value takes those of x, as every rank does whatever its gradients, or those of y where
    # they alone are swept so.
    counted = x.gradient or not all(sample.whole for sample in samples) or not samples[-1].gradient
    flags = _flags(x, x.gradient, two and counted), _flags(samples[-1], samples[-1].gradient, two and samples[-1].gradient)
    first_gradient = 0 if x.gradient else x_padded
    gradient_rows = sum(size for sample, size in zip(samples, padded_rows, strict=True) if sample.gradient)
    closed_form = NORMAL_PRIOR if y is None else NO_CLOSED_FORM if plan.family.radial or unbiased else POLYNOMIAL_DIAGONAL

    prepared = prepare(
        samples, kernel, plan, d, choice.block, sums=gradient and plan.family.number == GAUSSIAN.value, unbiased=unbiased,
        closed_form=closed_form.value, counts=(-2.0, 0.0) if counted else (0.0, -2.0),
    )  # fmt: skip

    # sweep
    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    config = choice.configs[0]
    swept_rows = x_padded + y_padded
    programs = len(samples) * batch * (swept_rows // config.block_n) * (d // config.block_d if gradient else 1)
    tiles = -(-max(n, m) // config.block_m)
    parts = len(samples) * column_splits(programs, tiles, device_limits(device).multiprocessors)
    value = empty((1 + terms) * parts * batch * swept_rows)
    slope, moments = value, value
    if gradient:
        slope, moments = empty(parts * batch * gradient_rows), empty(parts * batch * gradient_rows * d)
    part_sums = PartSums(value, slope, moments, parts)
    sizes = Sizes(n, m, x_padded, y_padded, first_gradient, gradient_rows)
    key = prepared.key, gradient, terms
    of_x, of_y, of_all = (0, x_padded), (x_padded, y_padded), (0, swept_rows)
    sweeps: list[tuple[bool, tuple[int, int], Sequence[SweepConfig], tuple[int, int]]]
    if apart:
        with_gradient, rest = (of_x, of_y) if x.gradient else (of_y, of_x)
        sweeps = [(True, flags, choice.configs, with_gradient), (False, flags, choice.values, rest)]
    else:
        sweeps = [(gradient, flags, choice.configs, of_all)]
    if terms:
        value_flags = _flags(x, False, two and counted), _flags(samples[-1], False, two and not counted)
        sweeps.append((False, value_flags, choice.terms, of_all))
    for needs_gradient, sample_flags, configs, (first_row, some_rows) in sweeps:
        for number, config in enumerate(configs):
            share, groups = 0, 1
            if isinstance(config, TermsConfig):
                share, groups = term_count(plan.family, config.bandwidths), config.groups(plan.bandwidths)
            launch(
                sweep_kernel, (key, number, share, needs_gradient), device,
                (some_rows // config.block_n, batch * (d // config.block_d if needs_gradient else groups), parts),
                (prepared.operands, prepared.tables, part_sums, prepared.swept, sizes, first_row, *sample_flags),
                lambda number=number, config=config, needs_gradient=needs_gradient, share=share, groups=groups: {
                    "SPEC": SweepSpec(
                        plan.table, number, len(samples), batch > 1, needs_gradient, share, groups, weighted, plan.precision_passes[number],
                        d, plan.family, plan.bandwidths, plan.squarings,
                    ),
                } | config.launch(),
            )  # fmt: skip

    # finish
    result = empty(shape)
    sums, subtracted = result, prepared.tables.table_ptr
    if terms:
        sums = torch.empty((batch, terms), dtype=torch.float64, device=device)
        subtracted = subtracted.view(batch, -1)[:, -plan.bandwidths :]
    grads = [empty((*shape, sample.rows, dim)) if sample.gradient else None for sample in samples]
    grad_x, grad_y = (result if grad is None else grad for grad in (grads * 2)[:2])
    results = Results(result, sums, grad_x, grad_y)
    launch(
        finish_kernel, key, device, (1 + terms + gradient_rows // ROW_BLOCK, batch, 1),
        (
            prepared.samples, prepared.statistics, kernel.arguments, prepared.operands, prepared.tables, part_sums, results, prepared.swept,
            sizes,
        ),
        lambda: prepared.specs() | {"GRADIENT": gradient, "TERMS": terms, "BLOCK_R": 1024},
    )  # fmt: skip
    constant = result
    if two and not y.rows:
        constant = prepared.tables.plan_ptr.view(batch, PLAN.value)[:, CONSTANT.value].reshape(shape)
    return result, grads[0], grads[1] if two else None, sums, subtracted, constant
