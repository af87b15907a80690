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
    difference_config,
    difference_products,
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
    Family,
    closed_form_term,
)
from fastvae.kernels.launch import launch
from fastvae.kernels.plan import (
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
from fastvae.kernels.prepare import ROW_BLOCK, STATISTICS, Sample, SweptRows, load_rows, padded, prepare, sample_rows
from fastvae.kernels.products import (
    BF16,
    BF16X3,
    DIFFERENCES,
    column_exponent,
    column_parts,
    difference_exponent,
    dot,
    load_parts,
    load_rounded_rows,
    product_name,
    row_sums,
    split_operand,
)
from fastvae.kernels.reductions import share_of, total
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


class Inputs(NamedTuple):
    """What a sweep reads, of B problems.

    Attributes:
        hi_ptr, lo_ptr: (B, rows, D), operands of x, and from row `first_y` on those of y; by differences the original rows.
        neg_half_norm2_ptr: (B, rows), see `fastvae.kernels.prepare.Operands`.
        weight_ptr: (B, rows).
        plan_ptr: (B, PLAN).
        table_ptr: (B, TABLE).
    """

    hi_ptr: Any
    lo_ptr: Any
    neg_half_norm2_ptr: Any
    weight_ptr: Any
    plan_ptr: Any
    table_ptr: Any


class PartSums(NamedTuple):
    """What a sweep writes, for each of its parts: own and other sample, and shares of the columns.

    Attributes:
        value_ptr: (1 + terms, parts, B, swept rows), sums over columns as they enter MMD²: of the kernel, then of `bandwidth_terms`.
        slope_ptr: (parts, B, rows with gradient), Σ_j w_j·(W − constant).
        moments_ptr: (parts, B, rows with gradient, D), Σ_j w_j·(W − constant)·u_j, by differences of u_j − u_i.
    """

    value_ptr: Any
    slope_ptr: Any
    moments_ptr: Any


class SweepSizes(NamedTuple):
    """The numbers of rows of a sweep, and where they start.

    Attributes:
        n, m: rows of x and y.
        first_y, rows: the first operand of y, and the number of operands.
        swept_rows: rows of all launches together. Those of x come first.
        first_block: the first block of this launch.
        x_start, y_start: the first row of each sample that is swept.
        x_blocks: blocks of x, after which those of y come.
        x_flags, y_flags: see above.
        first_gradient: the first block whose gradient is wanted.
        gradient_rows: rows with gradient.
    """

    n: Any
    m: Any
    first_y: Any
    rows: Any
    swept_rows: Any
    first_block: Any
    x_start: Any
    x_blocks: Any
    y_start: Any
    x_flags: Any
    y_flags: Any
    first_gradient: Any
    gradient_rows: Any


class SweepSpec(NamedTuple):
    """The constexprs of a sweep besides its tile's.

    Attributes:
        PASS: this pass, which runs if it is the plan's.
        BATCHED: whether there are several problems.
        TERMS: how many `bandwidth_terms` a program sums in the place of the kernel, or 0.
        GROUPS: of bandwidths, each of which has its own programs.
    """

    TABLE: int
    PASS: int
    SAMPLES: int
    BATCHED: bool
    GRADIENT: bool
    TERMS: int
    GROUPS: int
    WEIGHTED: bool
    PRODUCT: int
    D: int
    FAMILY: Family
    BANDWIDTHS: int
    SQUARINGS: int


class _Rows(NamedTuple):
    """A block of rows: its first features as operands, −½‖u‖², for differences the features of its block of moments, where it lies."""

    hi: Any
    lo: Any
    neg_half_norm2: Any
    out: Any
    hi_ptrs: Any
    lo_ptrs: Any
    offs_n: Any


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
    sums, rows, inputs, table, start_m, last_m, d_out,
    DIAGONAL: tl.constexpr, SLOPES: tl.constexpr, SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums with those of one tile added. DIAGONAL leaves out the pairs of a row with itself."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    TERMS: tl.constexpr = SPEC.TERMS
    D: tl.constexpr = SPEC.D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    hi_ptr, lo_ptr, weight_ptr, offs_n = inputs.hi_ptr, inputs.lo_ptr, inputs.weight_ptr, rows.offs_n
    value_acc, slope_acc, moments, terms = sums.value, sums.slope, sums.moments, sums.terms
    if SPEC.PRODUCT == DIFFERENCES:
        exponent = difference_exponent(hi_ptr, hi_ptr, offs_n, start_m, table.scale, FAMILY, D, BLOCK_M)
        col_hi, col_lo = rows.hi, rows.lo
    else:
        exponent, col_hi, col_lo = column_exponent(
            rows.hi, rows.lo, rows.neg_half_norm2, rows.hi_ptrs, rows.lo_ptrs, hi_ptr, lo_ptr, inputs.neg_half_norm2_ptr, start_m,
            FAMILY, SPEC.PRODUCT, D, BLOCK_M, BLOCK_K,
        )  # fmt: skip
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
            col = tl.load(hi_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :])
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - rows.out[:, None, :]) * table.scale), 1)
        else:
            if SLOPES:
                slope_acc += row_sums(slope)
            col_hi, col_lo = column_parts(col_hi, col_lo, hi_ptr, lo_ptr, start_m, d_out, SPEC.PRODUCT, D, BLOCK_M, BLOCK_K, BLOCK_D)
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


@triton.jit
def _of_problem(inputs, sums, sizes, problem, SPEC: tl.constexpr):
    """The inputs and outputs of one problem of a batch."""
    # A problem has the same bytes in every pass.
    halves: tl.constexpr = 2 if SPEC.PRODUCT == BF16 or SPEC.PRODUCT == BF16X3 else 1
    own_inputs = Inputs(
        inputs.hi_ptr + problem * sizes.rows * (halves * SPEC.D),
        inputs.lo_ptr + problem * sizes.rows * (halves * SPEC.D),
        inputs.neg_half_norm2_ptr + problem * sizes.rows,
        inputs.weight_ptr + problem * sizes.rows,
        inputs.plan_ptr + problem * PLAN,
        inputs.table_ptr + problem * SPEC.TABLE,
    )
    own_sums = PartSums(
        sums.value_ptr + problem * sizes.swept_rows,
        sums.slope_ptr + problem * sizes.gradient_rows,
        sums.moments_ptr + problem * sizes.gradient_rows * SPEC.D,
    )
    return own_inputs, own_sums


@triton.jit
def sweep_kernel(
    inputs, part_sums, sizes, SPEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over a share of the columns of its own or of the other sample.

    Program 0 is the block of rows from `first_block` on, program 1 the block of moments or the group of bandwidths and the problem of a
    batch, program 2 the share, own and other in turn. A step of the exponent's product takes BLOCK_K features, a block of moments BLOCK_D.
    """
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    SAMPLES: tl.constexpr = SPEC.SAMPLES
    TERMS: tl.constexpr = SPEC.TERMS
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    D: tl.constexpr = SPEC.D
    d_out = tl.program_id(1)
    batches = 1
    if SPEC.BATCHED:
        # Bases of their own for the pointers take registers, which one problem is spared.
        d_blocks: tl.constexpr = D // BLOCK_D if SPEC.GRADIENT else SPEC.GROUPS
        problem = (tl.program_id(1) // d_blocks).to(tl.int64)
        d_out = tl.program_id(1) % d_blocks
        batches = tl.num_programs(1) // d_blocks
        inputs, part_sums = _of_problem(inputs, part_sums, sizes, problem, SPEC)
    plan_ptr = inputs.plan_ptr
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PASS:
        return
    # One bandwidth of a Gaussian has its value for slope, and a polynomial needs only moments.
    SLOPES: tl.constexpr = FAMILY.radial and (FAMILY.number != GAUSSIAN or SPEC.BANDWIDTHS > 1)
    dtype: tl.constexpr = inputs.neg_half_norm2_ptr.dtype.element_ty
    swept_rows = sizes.swept_rows
    block = sizes.first_block + tl.program_id(0)
    part = tl.program_id(2)
    is_y = (block >= sizes.x_blocks) & (SAMPLES == 2)
    sample = is_y.to(tl.int32)
    other = part % SAMPLES
    flags = tl.where(is_y, sizes.y_flags, sizes.x_flags)
    if SPEC.GRADIENT and D > BLOCK_D:  # noqa: SIM102, one is known to the compiler and the other is not
        if (d_out > 0) & ((flags & _GRADIENT) == 0):
            return
    terms = ()
    for _ in tl.static_range(TERMS):
        terms += (tl.zeros([BLOCK_N], dtype=dtype),)
    if SAMPLES == 2:  # noqa: SIM102
        if (other == 1) & ((flags & _CROSS) == 0):
            # These rows have no gradient either: a value of zero is all there is to store.
            out_ptr = part_sums.value_ptr + tl.cast(part, tl.int64) * batches * swept_rows + block * BLOCK_N
            if TERMS > 0:
                _store_terms(out_ptr, batches * swept_rows, terms, d_out, SPEC)
            else:
                tl.store(out_ptr + tl.arange(0, BLOCK_N), tl.zeros([BLOCK_N], dtype))
            return
    y_row = sizes.first_y + sizes.y_start + (block - sizes.x_blocks) * BLOCK_N
    start_n = tl.where(is_y, y_row, sizes.x_start + block * BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    local_k = tl.arange(0, BLOCK_K)[None, :]

    # load
    row_neg_half_norm2 = tl.load(inputs.neg_half_norm2_ptr + offs_n)
    row_hi_ptrs = inputs.hi_ptr + row_start + (local_n + local_k)
    row_lo_ptrs = inputs.lo_ptr + row_start + (local_n + local_k)
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, PRODUCT)
    row_out = row_neg_half_norm2
    if PRODUCT == DIFFERENCES and SPEC.GRADIENT:
        row_out = tl.load(inputs.hi_ptr + row_start + (local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]))
    rows = _Rows(row_hi, row_lo, row_neg_half_norm2, row_out, row_hi_ptrs, row_lo_ptrs, offs_n)
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    value_constant = tl.load(plan_ptr + VALUE_CONSTANT).to(dtype)
    slope_constant = tl.load(plan_ptr + SLOPE_CONSTANT).to(dtype)
    table_ptr = inputs.table_ptr
    if TERMS > 0:
        entries = load_group(table_ptr, d_out, FAMILY, TERMS, SPEC.BANDWIDTHS, SPEC.TABLE)
    else:
        entries = load_table(table_ptr, SPEC.GRADIENT, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, PRODUCT)
    table = _KernelTable(entries, table_ptr, parameters, value_constant, slope_constant, scale)

    # The columns of the own sample without the band of tiles on the diagonal, which come masked after the others: a self-pair in the
    # products would swamp small sums. Or those of the other sample, which has no such band.
    in_y = sample + other == 1
    first_m = tl.where(in_y, sizes.first_y, 0)
    true_m = tl.where(in_y, sizes.first_y + sizes.m, sizes.n)
    last_m = tl.where(in_y, sizes.first_y + tl.cdiv(sizes.m, BLOCK_N) * BLOCK_N, tl.cdiv(sizes.n, BLOCK_N) * BLOCK_N)
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
        sums = _add_tile(sums, rows, inputs, table, start_m, true_m, d_out, False, SLOPES, SPEC, BLOCK_M, BLOCK_K, BLOCK_D)
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
            sums = _add_tile(sums, rows, inputs, table, start_m, true_m, d_out, True, SLOPES, SPEC, BLOCK_M, BLOCK_K, BLOCK_D)
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
    out = tl.cast(part, tl.int64) * batches
    if TERMS > 0:
        factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_VALUE, OTHER_VALUE) + sample)).to(dtype)
        scaled_terms = ()
        for t in tl.static_range(TERMS):
            term = sums.terms[t]
            if len(entries) > 0 and t % 2 == 0 and not SPEC.WEIGHTED and PRODUCT != DIFFERENCES:
                term += padded * entries[t + 1]
            scaled_terms += (term * factor,)
        out_ptr = part_sums.value_ptr + out * swept_rows + block * BLOCK_N
        _store_terms(out_ptr, batches * swept_rows, scaled_terms, d_out, SPEC)
    elif d_out == 0:
        factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_VALUE, OTHER_VALUE) + sample)).to(dtype)
        tl.store(part_sums.value_ptr + out * swept_rows + block * BLOCK_N + tl.arange(0, BLOCK_N), value * factor)
    if SPEC.GRADIENT:  # noqa: SIM102
        if (flags & _GRADIENT) != 0:
            factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_GRADIENT, OTHER_GRADIENT) + sample)).to(dtype)
            out = out * sizes.gradient_rows + (block - sizes.first_gradient) * BLOCK_N
            if d_out == 0:
                tl.store(part_sums.slope_ptr + out + tl.arange(0, BLOCK_N), slope * factor)
            offs_out = local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            tl.store(part_sums.moments_ptr + out * D + offs_out, sums.moments * factor)


class Results(NamedTuple):
    """What `finish_kernel` writes.

    Attributes:
        mmd_ptr: (B,).
        term_ptr: (B, TERMS), float64.
        grad_x_ptr, grad_y_ptr: (B, x_rows, FEATURES), (B, y_rows, FEATURES).
    """

    mmd_ptr: Any
    term_ptr: Any
    grad_x_ptr: Any
    grad_y_ptr: Any


class FinishSizes(NamedTuple):
    """Numbers of rows and sums.

    Attributes:
        x_padded, y_padded: swept rows of each sample with their padding.
        first_gradient, gradient_rows: the first row of the sweep with a gradient, and how many there are.
        closed_forms: sums of closed forms of a problem.
        parts: of the sums.
    """

    x_padded: Any
    y_padded: Any
    first_gradient: Any
    gradient_rows: Any
    closed_forms: Any
    parts: Any


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
    batches = tl.num_programs(1)
    dtype: tl.constexpr = results.mmd_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
    weight_ptr = operands.weight_ptr + problem * operands.rows
    padded = sizes.x_padded + sizes.y_padded
    value_ptr = part_sums.value_ptr + tl.program_id(0).to(tl.int64) * sizes.parts * batches * padded

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
        row_value = tl.zeros([BLOCK_R], dtype=tl.float64)
        for part in range(0, sizes.parts):
            offset = (tl.cast(part, tl.int64) * batches + problem) * padded
            row_value += tl.load(value_ptr + offset + row, mask=mask, other=0.0).to(tl.float64)
        value += p * row_value
        squares += p * p
        shares += p

    # store
    if TERMS > 0:  # noqa: SIM102, one is known to the compiler and the other is not
        if tl.program_id(0) > 0:
            term = tl.program_id(0) - 1
            sum_of_terms = tl.sum(value)
            if FAMILY.takes_distance:
                # From the exponent's units to √(2t) of the widest bandwidth: that of a homogeneous kernel, and t' of each other one.
                gammas = gammas_of(load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE), FAMILY, SUM.KERNELS, SPEC.FEATURES)
                factor = 2.0 * tl.sqrt(gammas[0]) / tl.load(plan_ptr + SCALE)
                if not FAMILY.homogeneous:
                    factor *= FAMILY.scale
                    if not FAMILY.unbounded_slope:
                        factor *= factor
                    factor = tl.where(term % 2 == 1, factor, 1.0)
                sum_of_terms *= factor
            tl.store(results.term_ptr + problem * TERMS + term, sum_of_terms)
            return
    mmd = tl.load(plan_ptr + VALUE_SCALE) * tl.sum(value) + tl.load(plan_ptr + DIAGONAL) * tl.sum(squares)
    if SUM.CLOSED_FORM == NORMAL_PRIOR:
        mmd += tl.load(plan_ptr + PRIOR) * tl.sum(shares)
    if SUM.CLOSED_FORM != NO_CLOSED_FORM:
        mmd += total(tables.closed_form_ptr + problem * sizes.closed_forms, sizes.closed_forms, 1, BLOCK_R)
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
    batches = tl.num_programs(1)
    dtype: tl.constexpr = results.mmd_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
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
        p = tl.load(operands.weight_ptr + problem * operands.rows + source + local, mask=mask_n, other=0.0).to(tl.float64)
    scale = tl.load(plan_ptr + GRADIENT_SCALE).to(dtype)
    operand_row = (problem * operands.rows + source + local).to(tl.int64)

    # load and compute
    slope = tl.zeros([BLOCK_N], dtype=dtype)
    if FAMILY.radial:
        for part in range(0, sizes.parts):
            offset = (tl.cast(part, tl.int64) * batches + problem) * sizes.gradient_rows
            slope += tl.load(part_sums.slope_ptr + offset + out_row, mask=mask_n, other=0.0)
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
        moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
        for part in range(0, sizes.parts):
            offset = (tl.cast(part, tl.int64) * batches + problem) * sizes.gradient_rows
            moments += tl.load(part_sums.moments_ptr + (offset + out_row)[:, None] * SPEC.D + offs_d[None, :], mask=mask, other=0.0)
        row_gradient = moments
        if FAMILY.radial:
            rounded = _load_rounded(operands, plan_ptr, problem, operand_row, offs_d, mask, dtype, SPEC, SUM)
            row_gradient = slope[:, None] * rounded - moments
        gradient = p.to(dtype)[:, None] * (scale * row_gradient)
        if FAMILY.number == GAUSSIAN:
            gradient += _slope_constant_gradient(z, statistics, plan_ptr, problem, sample, offs_d, p, SPEC)
        if SUM.CLOSED_FORM != NO_CLOSED_FORM:
            gradient += closed_slope.to(dtype)[:, None] * z
        tl.store(grad_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], gradient, mask=mask)


@triton.jit
def _load_rounded(operands, plan_ptr, problem, row, offs_d, mask, dtype: tl.constexpr, SPEC: tl.constexpr, SUM: tl.constexpr):
    """The rows as the products of the pass that has run saw them. Sums of differences need none: they get zeros."""
    hi_ptr, lo_ptr, hi16_ptr, lo16_ptr = operands.hi_ptr, operands.lo_ptr, operands.hi16_ptr, operands.lo16_ptr
    precision_pass = tl.load(plan_ptr + PRECISION_PASS).to(tl.int32)
    offs = row[:, None] * SPEC.D + offs_d[None, :]
    offs16 = offs + problem * operands.rows * SPEC.D
    rounded = tl.zeros_like(mask).to(dtype)
    if precision_pass == 0:
        rounded = load_rounded_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, dtype, SUM.FIRST_PRODUCT)
    if SUM.SECOND_PRODUCT >= 0:  # noqa: SIM102
        if precision_pass == 1:
            rounded = load_rounded_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, dtype, SUM.SECOND_PRODUCT)
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
    sums = tl.zeros([offs_d.shape[0]], dtype=tl.float64)
    for chunk in range(SPEC.CHUNKS):
        sums += tl.load(sum_ptr + sample * (SPEC.CHUNKS * SPEC.D) + chunk * SPEC.D + offs_d)
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
    configs, values = (
        [
            difference_config(dtype.itemsize)
            if product == DIFFERENCES.value
            else sweep_config(dim, product_name(product, dtype), with_gradient, plan.bandwidths, architecture, powers, gaussian_pair)
            for product in plan.precision_passes * wanted
        ]
        for with_gradient, wanted in ((gradient, True), (False, apart))
    )
    term_configs = [
        terms_config(
            dim,
            difference_products(dtype.itemsize) if product == DIFFERENCES.value else product_name(product, dtype),
            plan.bandwidths, architecture, plan.family.number == RATIONAL_QUADRATIC_LARGE.value,
        )
        for product in plan.precision_passes * terms
    ]  # fmt: skip
    all_configs = [entry for of in (configs, values, term_configs) for entry in zip(plan.precision_passes, of, strict=False)]
    features = max(padded_dim(dim, config) for product, config in all_configs if product != DIFFERENCES.value)
    block = max(ROW_BLOCK, *(config.block_n for _, config in all_configs))
    return _Choice(tuple(configs), tuple(values), tuple(term_configs), features, block)


def _flags(sample: Sample, gradient: bool, cross: bool) -> int:
    symmetric = sample.whole and not gradient
    return gradient * _GRADIENT.value | cross * _CROSS.value | symmetric * _SYMMETRIC.value


def mmd(
    x: Sample, y: Sample | None, kernel: KernelNumbers, unbiased: bool, bandwidth_grad: bool, precision: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """MMD² () or (batch,), against N(0, I) without y; its gradients to x and y; with `bandwidth_grad` the sums of `bandwidth_terms` over
    the pairs (B, terms); and which constants were subtracted of the bandwidths (B, bandwidths), widest first."""
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
    y_start, y_rows = (0, 0) if y is None else (y.start, y.rows)
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
    part_sums = PartSums(value, slope, moments)
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
    for needs_gradient, (x_flags, y_flags), configs, (first_row, some_rows) in sweeps:
        for number, (product, config) in enumerate(zip(plan.precision_passes, configs, strict=True)):
            share, groups = 0, 1
            if isinstance(config, TermsConfig):
                share, groups = term_count(plan.family, config.bandwidths), config.groups(plan.bandwidths)
            spec = functools.partial(
                SweepSpec, plan.table, number, len(samples), batch > 1, needs_gradient, share, groups, weighted, product, d, plan.family,
                plan.bandwidths, plan.squarings,
            )  # fmt: skip
            block = config.block_n
            sizes = SweepSizes(
                n, m, prepared.first_y, prepared.rows, swept_rows, first_row // block, x.start, x_padded // block, y_start,
                x_flags, y_flags, first_gradient // block, gradient_rows,
            )  # fmt: skip
            launch(
                sweep_kernel, (key, number, share, needs_gradient), device,
                (some_rows // block, batch * (d // config.block_d if needs_gradient else groups), parts),
                (
                    Inputs(*prepared.parts(product), prepared.neg_half_norm2, prepared.operands.weight_ptr, prepared.plan, prepared.table),
                    part_sums, sizes,
                ),
                lambda spec=spec, config=config: {"SPEC": spec()} | config.launch(),
            )  # fmt: skip

    # finish
    result, sums = empty(shape), torch.empty((batch, terms), dtype=torch.float64, device=device)
    grads = [empty((*shape, sample.rows, dim)) if sample.gradient else None for sample in samples]
    grad_x, grad_y = (result if grad is None else grad for grad in (grads * 2)[:2])
    tables, results = prepared.tables, Results(result, sums, grad_x, grad_y)
    launch(
        finish_kernel, key, device, (1 + terms + gradient_rows // ROW_BLOCK, batch, 1),
        (
            prepared.samples, prepared.statistics, prepared.numbers, prepared.operands, tables, part_sums, results,
            SweptRows(x.start, x.rows, y_start, y_rows),
            FinishSizes(x_padded, y_padded, first_gradient, gradient_rows, prepared.blocks, parts),
        ),
        lambda: prepared.specs() | {"GRADIENT": gradient, "TERMS": terms, "BLOCK_R": 1024},
    )  # fmt: skip
    return result, grads[0], grads[1] if two else None, sums, prepared.table.view(batch, -1)[:, -plan.bandwidths :]
