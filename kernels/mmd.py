"""MMD² and its gradient on a GPU: prepare (`fastvae.kernels.prepare`), sweep, finish, with no copy to or from the host.

The sweep takes a block of rows of z = [x; y] against the columns of one sample, tile by tile, its sums kept in registers: those of formula
(1) of `fastvae.reference.mmd` and of a row's gradient, Σ_j w_j·W_ij·(u_i − u_j), over scaled rows u. Each program owns its sums: no
atomics, a fixed order, the same bits every time.
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
from fastvae.kernels.launch import launch
from fastvae.kernels.pairs import (
    BF16,
    DIFFERENCES,
    ENERGY,
    GAUSSIAN,
    LAPLACE,
    POLYNOMIAL,
    QUADRATIC_STEEP,
    SPLIT,
    bandwidth_terms,
    column_exponent,
    column_parts,
    difference_exponent,
    dot,
    load_group,
    load_parameters,
    load_parts,
    load_table,
    products_of,
    radial,
    row_sums,
    split,
    term_count,
    term_number,
)
from fastvae.kernels.prepare import (
    DIAGONAL,
    GRADIENT_SCALE,
    LEFT_OUT,
    LOG2_E,
    NO_OWN_TERM,
    NORMAL_PRIOR,
    OTHER_PULL,
    OTHER_VALUE,
    OWN_PULL,
    OWN_VALUE,
    PLAN,
    POLYNOMIAL_DIAGONAL,
    PRIOR,
    ROUTE,
    ROW_BLOCK,
    SCALE,
    SLOPE_SHIFT,
    STATISTICS,
    TOTAL,
    UNBIASED_SCALE,
    UNIT,
    VALUE_SHIFT,
    Evaluation,
    Sample,
    evaluation_of,
    gammas_of,
    load_numbers,
    own_term,
    padded,
    prepare,
    seen_rows,
    shifts_of,
)
from fastvae.radial import RationalQuadratic

# From so many pairs on a sweep is worth launches of its own.
_APART = 1 << 26

# Bits of the flags of a sample: the gradient of its rows is wanted, they meet the other sample, each pair within it is met once.
_GRADIENT, _CROSS, _SYMMETRIC = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _counted(
    tile, offs_n, offs_m, last_m, weight_ptr,
    DIAGONAL: tl.constexpr, WEIGHTED: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """A tile without what is no pair, times the weights of its columns."""
    if DIAGONAL:
        tile = tl.where(offs_n[:, None] != offs_m[None, :], tile, 0.0)
    if MODE == DIFFERENCES:
        # Padded columns are rows of zeros here, pairs with the origin.
        tile = tl.where((offs_m < last_m)[None, :], tile, 0.0)
    if WEIGHTED:
        tile = tile * tl.load(weight_ptr + offs_m)[None, :]
    return tile


@triton.jit
def _tile(
    row_hi, row_lo, row_half, row_out, row_hi_ptrs, row_lo_ptrs, offs_n, hi_ptr, lo_ptr, half_ptr, weight_ptr,
    table, table_ptr, parameters, value_shift, slope_shift, scale, start_m, last_m, d_out, value_acc, slope_acc, moments, terms,
    DIAGONAL: tl.constexpr, SLOPES: tl.constexpr, TERMS: tl.constexpr, FAMILY: tl.constexpr, GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr, MODE: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the sweep: its sums added to the accumulators."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if MODE == DIFFERENCES:
        exponent = difference_exponent(hi_ptr, hi_ptr, offs_n, start_m, scale, FAMILY, D, BLOCK_M)
        col_hi, col_lo = row_hi, row_lo
    else:
        exponent, col_hi, col_lo = column_exponent(
            row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, hi_ptr, lo_ptr, half_ptr, start_m, FAMILY, MODE, D, BLOCK_M, BLOCK_K
        )
    if TERMS > 0:
        sums = ()
        tiles = bandwidth_terms(exponent, table, parameters, FAMILY, TERMS)
        for n in tl.static_range(TERMS):
            sums += (terms[n] + tl.sum(_counted(tiles[n], offs_n, offs_m, last_m, weight_ptr, DIAGONAL, WEIGHTED, MODE), 1),)
        terms = sums
    else:
        value, slope = radial(exponent, table, table_ptr, parameters, value_shift, slope_shift, FAMILY, GRADIENT, BANDWIDTHS, SQUARINGS)
        value = _counted(value, offs_n, offs_m, last_m, weight_ptr, DIAGONAL, WEIGHTED, MODE)
        slope = _counted(slope, offs_n, offs_m, last_m, weight_ptr, DIAGONAL, WEIGHTED, MODE)
        value_acc += row_sums(value)
    if GRADIENT:
        if MODE == DIFFERENCES:
            offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
            col = tl.load(hi_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :])
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - row_out[:, None, :]) * scale), 1)
        else:
            if SLOPES:
                slope_acc += row_sums(slope)
            col_hi, col_lo = column_parts(col_hi, col_lo, hi_ptr, lo_ptr, start_m, d_out, MODE, D, BLOCK_M, BLOCK_K, BLOCK_D)
            slope_hi, slope_lo = split(slope, MODE)
            # A tensor core's accumulator truncates: each tile starts from zero, and its sum is added in the accumulation dtype.
            moments += dot(slope_hi, slope_lo, col_hi, col_lo, tl.zeros_like(moments), MODE)
    return value_acc, slope_acc, moments, terms


@triton.jit
def _store_terms(out_ptr, part_size, terms, group, FAMILY: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """Sums of one block of rows, each behind all parts of the one before."""
    stride = tl.cast(tl.num_programs(2), tl.int64) * part_size
    for t in tl.static_range(TERMS):
        term_ptr = out_ptr + (1 + term_number(group, t, FAMILY, TERMS, BANDWIDTHS)) * stride
        tl.store(term_ptr + tl.arange(0, terms[t].shape[0]), terms[t])


@triton.jit(
    do_not_specialize=[
        "n",
        "m",
        "first_y",
        "rows",
        "swept_rows",
        "first_block",
        "x_start",
        "x_blocks",
        "y_start",
        "x_flags",
        "y_flags",
        "first_gradient",
        "gradient_rows",
    ]
)
def sweep_kernel(
    hi_ptr,  # (B, rows, D), operands of x, from `first_y` on of y; in DIFFERENCES mode rows as they came
    lo_ptr,
    half_ptr,  # (B, rows), −½‖u‖², or 0 for a polynomial; of a padded row what makes its k 0
    weight_ptr,  # (B, rows)
    plan_ptr,  # (B, PLAN)
    table_ptr,  # (B, TABLE)
    value_ptr,  # (1 + terms, PARTS, B, swept_rows), sums over the columns as they enter MMD²: of the kernel, then `bandwidth_terms`
    slope_ptr,  # (PARTS, B, rows with gradient), Σ_j w_j·(W − shift)
    moments_ptr,  # (PARTS, B, rows with gradient, D), Σ_j w_j·(W − shift)·u_j, in DIFFERENCES mode of u_j − u_i
    n,
    m,
    first_y,
    rows,
    swept_rows,  # by all launches together
    first_block,  # of this one
    x_start,  # rows of x from here on are swept, by x_blocks blocks, then those of y
    x_blocks,
    y_start,
    x_flags,
    y_flags,
    first_gradient,  # the first block whose gradient is wanted
    gradient_rows,
    PLAN_SIZE: tl.constexpr,
    TABLE: tl.constexpr,
    PASS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BATCHED: tl.constexpr,  # B > 1
    GRADIENT: tl.constexpr,
    TERMS: tl.constexpr,  # not the kernel's sums but this many `bandwidth_terms` a program
    GROUPS: tl.constexpr,  # of bandwidths, each of its own programs
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
    """Sums of a block of rows over a share of the columns of its own or of the other sample.

    Program 0 is the block of rows from `first_block` on, program 1 the block of moments or the group of bandwidths and the problem of a
    batch, program 2 the share, own and other in turn.
    """
    # where
    d_out = tl.program_id(1)
    batches = 1
    if BATCHED:
        # Bases of their own for the pointers take registers, which one problem is spared.
        d_blocks: tl.constexpr = D // BLOCK_D if GRADIENT else GROUPS
        problem = (tl.program_id(1) // d_blocks).to(tl.int64)
        d_out = tl.program_id(1) % d_blocks
        batches = tl.num_programs(1) // d_blocks
        plan_ptr += problem * PLAN_SIZE
        table_ptr += problem * TABLE
        # A problem has the same bytes in every pass.
        halves: tl.constexpr = 2 if MODE == BF16 or MODE == SPLIT else 1  # noqa: SIM109, Triton has no `in`
        hi_ptr += problem * rows * (halves * D)
        lo_ptr += problem * rows * (halves * D)
        half_ptr += problem * rows
        weight_ptr += problem * rows
        value_ptr += problem * swept_rows
        slope_ptr += problem * gradient_rows
        moments_ptr += problem * gradient_rows * D
    if tl.load(plan_ptr + ROUTE) != PASS:
        return
    # One bandwidth of a Gaussian has its value for slope, and of a polynomial only moments are wanted.
    SLOPES: tl.constexpr = FAMILY < POLYNOMIAL and (FAMILY != GAUSSIAN or BANDWIDTHS > 1)
    dtype: tl.constexpr = half_ptr.dtype.element_ty
    block = first_block + tl.program_id(0)
    part = tl.program_id(2)
    is_y = (block >= x_blocks) & (SAMPLES == 2)
    sample = is_y.to(tl.int32)
    other = part % SAMPLES
    flags = tl.where(is_y, y_flags, x_flags)
    if GRADIENT and D > BLOCK_D:  # noqa: SIM102, one is known to the compiler and the other is not
        if (d_out > 0) & ((flags & _GRADIENT) == 0):
            return
    terms = ()
    for _ in tl.static_range(TERMS):
        terms += (tl.zeros([BLOCK_N], dtype=dtype),)
    if SAMPLES == 2:  # noqa: SIM102
        if (other == 1) & ((flags & _CROSS) == 0):
            # Nor have they a gradient: a value of zero is all there is to store.
            out_ptr = value_ptr + tl.cast(part, tl.int64) * batches * swept_rows + block * BLOCK_N
            if TERMS > 0:
                _store_terms(out_ptr, batches * swept_rows, terms, d_out, FAMILY, TERMS, BANDWIDTHS)
            else:
                tl.store(out_ptr + tl.arange(0, BLOCK_N), tl.zeros([BLOCK_N], dtype))
            return
    start_n = tl.where(is_y, first_y + y_start + (block - x_blocks) * BLOCK_N, x_start + block * BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    local_k = tl.arange(0, BLOCK_K)[None, :]

    # load
    row_half = tl.load(half_ptr + offs_n)
    row_hi_ptrs = hi_ptr + row_start + (local_n + local_k)
    row_lo_ptrs = lo_ptr + row_start + (local_n + local_k)
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, MODE)
    row_out = row_half
    if MODE == DIFFERENCES and GRADIENT:
        row_out = tl.load(hi_ptr + row_start + (local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]))
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    value_shift = tl.load(plan_ptr + VALUE_SHIFT).to(dtype)
    slope_shift = tl.load(plan_ptr + SLOPE_SHIFT).to(dtype)
    if TERMS > 0:
        table = load_group(table_ptr, d_out, FAMILY, TERMS, BANDWIDTHS, TABLE)
    else:
        table = load_table(table_ptr, GRADIENT, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, MODE)

    # The columns of the own sample without the band of tiles on the diagonal, which come masked after the others: a self-pair in the
    # products would swamp small sums. Or those of the other sample, which has no such band.
    in_y = sample + other == 1
    first_m = tl.where(in_y, first_y, 0)
    true_m = tl.where(in_y, first_y + m, n)
    last_m = tl.where(in_y, first_y + tl.cdiv(m, BLOCK_N) * BLOCK_N, tl.cdiv(n, BLOCK_N) * BLOCK_N)
    band = first_m
    band_end = first_m
    if other == 0:
        band = tl.minimum(start_n // BLOCK_M * BLOCK_M, last_m)
        band_end = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, last_m)
    twice = ((flags & _SYMMETRIC) != 0) & (other == 0)
    left = tl.where(twice, 0, band - first_m)
    columns = left + (last_m - band_end)
    share = tl.cdiv(tl.cdiv(columns, BLOCK_M), tl.num_programs(2) // SAMPLES) * BLOCK_M
    first = part // SAMPLES * share
    last = tl.minimum(first + share, columns)

    # compute
    value_acc = tl.zeros([BLOCK_N, 8], dtype=dtype)
    slope_acc = value_acc
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    for offset in range(first, last, BLOCK_M):
        start_m = tl.multiple_of(tl.where(offset >= left, band_end + (offset - left), first_m + offset), BLOCK_M)
        value_acc, slope_acc, moments, terms = _tile(
            row_hi, row_lo, row_half, row_out, row_hi_ptrs, row_lo_ptrs, offs_n, hi_ptr, lo_ptr, half_ptr, weight_ptr,
            table, table_ptr, parameters, value_shift, slope_shift, scale, start_m, true_m, d_out, value_acc, slope_acc,
            moments, terms, False, SLOPES, TERMS, FAMILY, GRADIENT, WEIGHTED, MODE, BANDWIDTHS, SQUARINGS, D, BLOCK_M, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if twice:
        value_acc += value_acc
    if TERMS > 0:
        counts = ()
        for t in tl.static_range(TERMS):
            counts += (terms[t] * tl.where(twice, 2.0, 1.0).to(dtype),)
        terms = counts
    if part < SAMPLES:
        for start_m in tl.range(band, band_end, BLOCK_M, num_stages=1):
            value_acc, slope_acc, moments, terms = _tile(
                row_hi, row_lo, row_half, row_out, row_hi_ptrs, row_lo_ptrs, offs_n, hi_ptr, lo_ptr, half_ptr, weight_ptr,
                table, table_ptr, parameters, value_shift, slope_shift, scale, start_m, true_m, d_out, value_acc, slope_acc,
                moments, terms, True, SLOPES, TERMS, FAMILY, GRADIENT, WEIGHTED, MODE, BANDWIDTHS, SQUARINGS, D, BLOCK_M, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    value = tl.sum(value_acc, 1)
    slope = tl.sum(slope_acc, 1) if SLOPES else value
    if not WEIGHTED and MODE != DIFFERENCES:
        # A padded column has added −shift. The first share takes it back, whichever has added it: the shares are summed.
        in_band = tl.maximum(band_end - tl.maximum(true_m, band), 0)
        padded = (last_m - true_m) - in_band
        padded = tl.where(part < SAMPLES, in_band + tl.where(twice, 2 * padded, padded), 0)
        value += padded * value_shift
        slope += padded * slope_shift

    # store
    out = tl.cast(part, tl.int64) * batches
    if TERMS > 0:
        factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_VALUE, OTHER_VALUE) + sample)).to(dtype)
        sums = ()
        for t in tl.static_range(TERMS):
            term = terms[t]
            if len(table) > 0 and t % 2 == 0 and not WEIGHTED and MODE != DIFFERENCES:
                term += padded * table[t + 1]
            sums += (term * factor,)
        out_ptr = value_ptr + out * swept_rows + block * BLOCK_N
        _store_terms(out_ptr, batches * swept_rows, sums, d_out, FAMILY, TERMS, BANDWIDTHS)
    elif d_out == 0:
        factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_VALUE, OTHER_VALUE) + sample)).to(dtype)
        tl.store(value_ptr + out * swept_rows + block * BLOCK_N + tl.arange(0, BLOCK_N), value * factor)
    if GRADIENT:  # noqa: SIM102
        if (flags & _GRADIENT) != 0:
            factor = tl.load(plan_ptr + (tl.where(other == 0, OWN_PULL, OTHER_PULL) + sample)).to(dtype)
            out = out * gradient_rows + (block - first_gradient) * BLOCK_N
            if d_out == 0:
                tl.store(slope_ptr + out + tl.arange(0, BLOCK_N), slope * factor)
            offs_out = local_n + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            tl.store(moments_ptr + out * D + offs_out, moments * factor)


@triton.jit(
    do_not_specialize=[
        "n", "m", "first_y", "rows", "x_start", "x_rows", "x_padded", "y_start", "y_rows", "y_padded", "first_gradient", "gradient_rows",
        "own_terms", "parts",
    ]
)  # fmt: skip
def finish_kernel(
    x_ptr,
    y_ptr,
    centre_ptr,
    sum_ptr,
    statistic_ptr,
    numbers,
    hi_ptr,
    lo_ptr,
    hi16_ptr,
    lo16_ptr,
    weight_ptr,
    plan_ptr,
    own_ptr,
    value_ptr,
    slope_ptr,
    moments_ptr,
    mmd_ptr,  # (B,)
    term_ptr,  # (B, TERMS), float64
    grad_x_ptr,  # (B, x_rows, FEATURES)
    grad_y_ptr,
    n,
    m,
    first_y,
    rows,
    x_start,
    x_rows,
    x_padded,
    y_start,
    y_rows,
    y_padded,
    first_gradient,  # row of the sweep at which the rows with gradient start
    gradient_rows,
    own_terms,
    parts,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUMBERS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    FAMILY: tl.constexpr,
    KERNELS: tl.constexpr,
    OWN: tl.constexpr,
    CROSS: tl.constexpr,  # rows with gradient meet the other sample
    GRADIENT: tl.constexpr,
    TERMS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MODE_0: tl.constexpr,
    MODE_1: tl.constexpr,
    PLAN_SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a step of the value's sum
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """MMD² of a problem by program 0 and each sum of terms by the next ones, in float64 and a fixed order; by each other the gradient of a
    block of rows."""
    problem = tl.program_id(1).to(tl.int64)
    batches = tl.num_programs(1)
    dtype: tl.constexpr = mmd_ptr.dtype.element_ty
    plan_ptr += problem * PLAN_SIZE
    weight_ptr += problem * rows
    padded = x_padded + y_padded
    if tl.program_id(0) <= TERMS:
        own_ptr += problem * own_terms
        value_ptr += tl.program_id(0).to(tl.int64) * parts * batches * padded
        total = tl.zeros([BLOCK_R], dtype=tl.float64)
        squares = tl.zeros([BLOCK_R], dtype=tl.float64)
        shares = tl.zeros([BLOCK_R], dtype=tl.float64)
        for start in range(0, padded, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            in_x = row < x_rows
            in_y = (row >= x_padded) & (row < x_padded + y_rows)
            mask = in_x | in_y
            p = tl.where(in_x, 1.0 / n.to(tl.float64), 1.0 / m.to(tl.float64))
            if WEIGHTED:
                source = tl.where(in_x, x_start + row, first_y + y_start + (row - x_padded))
                p = tl.load(weight_ptr + source, mask=mask, other=0.0).to(tl.float64)
            p = tl.where(mask, p, 0.0)
            value = tl.zeros([BLOCK_R], dtype=tl.float64)
            for part in range(0, parts):
                offset = (tl.cast(part, tl.int64) * batches + problem) * padded
                value += tl.load(value_ptr + offset + row, mask=mask, other=0.0).to(tl.float64)
            total += p * value
            squares += p * p
            shares += p
        if TERMS > 0:  # noqa: SIM102, one is known to the compiler and the other is not
            if tl.program_id(0) > 0:
                term = tl.program_id(0) - 1
                sum_of_terms = tl.sum(total)
                if FAMILY == LAPLACE or FAMILY == ENERGY:  # noqa: SIM109, Triton has no `in`
                    # Of energy, and of each t·s_b, in units of the widest bandwidth, not of `scaled_gamma`.
                    gammas = gammas_of(load_numbers(numbers, NUMBERS, ON_DEVICE), FAMILY, KERNELS, FEATURES)
                    factor = 2.0 * tl.sqrt(gammas[0]) / tl.load(plan_ptr + SCALE)
                    if FAMILY == LAPLACE:
                        factor = tl.where(term % 2 == 1, LOG2_E * factor, 1.0)
                    sum_of_terms *= factor
                tl.store(term_ptr + problem * TERMS + term, sum_of_terms)
                return
        mmd = tl.load(plan_ptr + UNIT) * tl.sum(total) + tl.load(plan_ptr + DIAGONAL) * tl.sum(squares)
        if OWN == NORMAL_PRIOR:
            mmd += tl.load(plan_ptr + PRIOR) * tl.sum(shares)
        if OWN != NO_OWN_TERM:
            terms = tl.zeros([BLOCK_R], dtype=tl.float64)
            for start in range(0, own_terms, BLOCK_R):
                offs = start + tl.arange(0, BLOCK_R)
                terms += tl.load(own_ptr + offs, mask=offs < own_terms, other=0.0)
            mmd += tl.sum(terms)
        tl.store(mmd_ptr + problem, mmd.to(dtype))
        return
    if GRADIENT:
        # where
        start_n = (tl.program_id(0) - 1 - TERMS) * BLOCK_N
        in_y = start_n + first_gradient >= x_padded
        local = start_n + tl.arange(0, BLOCK_N)
        z_ptr, grad_ptr, count = x_ptr + (problem * n + x_start) * FEATURES, grad_x_ptr + problem * x_rows * FEATURES, x_rows
        source = x_start
        p = 1.0 / n.to(tl.float64)
        if SAMPLES == 2:  # noqa: SIM102
            if in_y:
                local = local + (first_gradient - x_padded)
                z_ptr, grad_ptr, count = y_ptr + (problem * m + y_start) * FEATURES, grad_y_ptr + problem * y_rows * FEATURES, y_rows
                source = first_y + y_start
                p = 1.0 / m.to(tl.float64)
        mask_n = local < count
        sample = in_y.to(tl.int32)
        route = tl.load(plan_ptr + ROUTE).to(tl.int32)
        scale = tl.load(plan_ptr + GRADIENT_SCALE).to(dtype)
        left_out = tl.load(plan_ptr + LEFT_OUT)
        own_scale = tl.load(plan_ptr + (UNBIASED_SCALE + sample))
        out_row = start_n + tl.arange(0, BLOCK_N)
        p = tl.zeros([BLOCK_N], dtype=tl.float64) + p
        if WEIGHTED:
            p = tl.load(weight_ptr + source + local, mask=mask_n, other=0.0).to(tl.float64)
        sums = sum_ptr + problem * (SAMPLES * CHUNKS * D)
        centre_ptr += problem * (SAMPLES * CHUNKS * D)
        operand_row = (problem * rows + source + local).to(tl.int64)

        # load and compute
        norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
        slope = tl.zeros([BLOCK_N], dtype=dtype)
        if FAMILY < POLYNOMIAL:
            for part in range(0, parts):
                offset = (tl.cast(part, tl.int64) * batches + problem) * gradient_rows
                slope += tl.load(slope_ptr + offset + out_row, mask=mask_n, other=0.0)
        if OWN != NO_OWN_TERM:
            for start_d in range(0, D, BLOCK_D):
                offs_d = start_d + tl.arange(0, BLOCK_D)
                mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
                z = tl.load(z_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
                norm2 += tl.sum(z * z, 1)
        values = load_numbers(numbers, NUMBERS, ON_DEVICE)
        gammas = gammas_of(values, FAMILY, KERNELS, FEATURES)
        squares = 0.0
        if OWN == NORMAL_PRIOR:
            statistics = statistic_ptr + problem * (SAMPLES * CHUNKS * STATISTICS)
            squares = tl.sum(tl.load(statistics + tl.arange(0, CHUNKS) * STATISTICS))
        shifts = shifts_of(squares / n.to(tl.float64) + FEATURES, gammas, FAMILY, KERNELS)
        _, own_slope = own_term(norm2, p, shifts, values, gammas, OWN, FAMILY, KERNELS)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
            moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
            for part in range(0, parts):
                offset = (tl.cast(part, tl.int64) * batches + problem) * gradient_rows
                moments += tl.load(moments_ptr + (offset + out_row)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
            pull = moments
            if FAMILY < POLYNOMIAL:
                offs = operand_row[:, None] * D + offs_d[None, :]
                offs16 = offs + problem * rows * D
                seen = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
                if route == 0:
                    seen = seen_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, dtype, MODE_0)
                if MODE_1 >= 0:  # noqa: SIM102
                    if route == 1:
                        seen = seen_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, dtype, MODE_1)
                # Sums of differences need no row beside them: there `seen` is zero.
                pull = slope[:, None] * seen - moments
            gradient = p.to(dtype)[:, None] * (scale * pull)
            z = tl.load(z_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0).to(dtype)
            if FAMILY == GAUSSIAN:  # noqa: SIM102
                if left_out != 0.0:
                    # Σ_j w_j·(z_i − z_j) of each sample, times the constant that its pairs lack.
                    centred = (z - tl.load(centre_ptr + offs_d)[None, :]).to(tl.float64)
                    mean = _sum(sums + sample * (CHUNKS * D), offs_d, CHUNKS, D, BLOCK_D) / tl.load(plan_ptr + (TOTAL + sample))
                    rest = own_scale * (centred - mean[None, :])
                    if CROSS:
                        total = _sum(sums + (1 - sample) * (CHUNKS * D), offs_d, CHUNKS, D, BLOCK_D)
                        mean = total / tl.load(plan_ptr + (TOTAL + 1 - sample))
                        rest -= centred - mean[None, :]
                    gradient += (left_out * p[:, None] * rest).to(dtype)
            if OWN != NO_OWN_TERM:
                gradient += own_slope.to(dtype)[:, None] * z
            tl.store(grad_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], gradient, mask=mask)


@triton.jit
def _sum(sum_ptr, offs_d, CHUNKS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ_j w_j·(z_j − c) over a sample, from the sums of its programs."""
    total = tl.zeros([BLOCK_D], dtype=tl.float64)
    for chunk in range(CHUNKS):
        total += tl.load(sum_ptr + chunk * D + offs_d)
    return total


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
    evaluation: Evaluation, dim: int, dtype: torch.dtype, gradient: bool, apart: bool, terms: bool, pair: bool, device: torch.device
) -> _Choice:
    """`pair` says that there are two samples, of one problem."""
    architecture, powers = device_limits(device).architecture, isinstance(evaluation.kernel, RationalQuadratic)
    plain = pair and evaluation.family == GAUSSIAN.value
    configs, values = (
        [
            difference_config(dtype.itemsize)
            if mode == DIFFERENCES.value
            else sweep_config(dim, products_of(mode, dtype), pulls, evaluation.bandwidths, architecture, powers, plain)
            for mode in evaluation.modes * wanted
        ]
        for pulls, wanted in ((gradient, True), (False, apart))
    )
    term_configs = [
        terms_config(dim, difference_products(dtype.itemsize) if mode == DIFFERENCES.value else products_of(mode, dtype),
                     evaluation.bandwidths, architecture, evaluation.family == QUADRATIC_STEEP.value)
        for mode in evaluation.modes * terms
    ]  # fmt: skip
    all_configs = [entry for of in (configs, values, term_configs) for entry in zip(evaluation.modes, of, strict=False)]
    features = max(padded_dim(dim, config) for mode, config in all_configs if mode != DIFFERENCES.value)
    block = max(ROW_BLOCK, *(config.block_n for _, config in all_configs))
    return _Choice(tuple(configs), tuple(values), tuple(term_configs), features, block)


def _flags(sample: Sample, gradient: bool, cross: bool) -> int:
    symmetric = sample.whole and not gradient
    return gradient * _GRADIENT.value | cross * _CROSS.value | symmetric * _SYMMETRIC.value


def mmd(
    x: Sample, y: Sample | None, kernel: KernelNumbers, unbiased: bool, bandwidth_grad: bool, precision: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """(MMD² () or (batch,), against N(0, I) without y; its gradients to x and y; with `bandwidth_grad` the sums of `bandwidth_terms` over
    the pairs (B, terms), and the shifts of the bandwidths (B, bandwidths), widest first)."""
    samples = [x] if y is None else [x, y]
    batch, shape, (n, dim) = x.problems, x.points.shape[:-2], x.points.shape[-2:]
    m, two, device = samples[-1].points.shape[-2], len(samples) == 2, x.points.device
    dtype = torch.float64 if x.points.dtype == torch.float64 else torch.float32
    gradient = any(sample.gradient for sample in samples)
    weighted = any(sample.weights is not None for sample in samples)
    if precision == "high" and gradient and batch * n * m >= _APART and device_limits(device).architecture in WGMMA:
        # Three products of bfloat16 parts then take less time than one of tf32: 0.65 of it at D 64 (H200).
        precision = "highest"
    evaluation = evaluation_of(kernel.kernel, kernel.count, kernel.squarings, dtype, precision)
    terms = term_count(kernel.kernel, kernel.count) if bandwidth_grad else 0
    # Rows without gradient beside rows with one take about half the time in a kernel of values alone, if they are worth its launches.
    lone = [sample for sample in samples if gradient and not sample.gradient]
    apart = any(batch * sample.rows * sample.points.shape[-2] >= _APART for sample in lone)
    choice = _choice(evaluation, dim, dtype, gradient, apart, terms > 0, two and batch == 1, device)
    d = choice.features

    # The rows that are swept, and what of them.
    sizes = [padded(sample.rows, choice.block) for sample in samples]
    x_padded, y_padded = (*sizes, 0)[:2]
    y_start, y_rows = (0, 0) if y is None else (y.start, y.rows)
    # Rows with a gradient meet the other sample. The value takes those of x, as every rank does whatever its gradients, or those of y where
    # they alone are swept so.
    counted = x.gradient or not all(sample.whole for sample in samples) or not samples[-1].gradient
    flags = _flags(x, x.gradient, two and counted), _flags(samples[-1], samples[-1].gradient, two and samples[-1].gradient)
    first_gradient = 0 if x.gradient else x_padded
    gradient_rows = sum(size for sample, size in zip(samples, sizes, strict=True) if sample.gradient)
    own = NORMAL_PRIOR if y is None else NO_OWN_TERM if kernel.kernel.radial or unbiased else POLYNOMIAL_DIAGONAL

    operands = prepare(
        samples, kernel, evaluation, d, choice.block, sums=gradient and evaluation.family == GAUSSIAN.value, unbiased=unbiased,
        own=own.value, counts=(-2.0, 0.0) if counted else (0.0, -2.0),
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
    key = operands.key, gradient, terms
    of_x, of_y, of_all = (0, x_padded), (x_padded, y_padded), (0, swept_rows)
    sweeps: list[tuple[bool, tuple[int, int], Sequence[SweepConfig], tuple[int, int]]]
    if apart:
        pulled, rest = (of_x, of_y) if x.gradient else (of_y, of_x)
        sweeps = [(True, flags, choice.configs, pulled), (False, flags, choice.values, rest)]
    else:
        sweeps = [(gradient, flags, choice.configs, of_all)]
    if terms:
        value_flags = _flags(x, False, two and counted), _flags(samples[-1], False, two and not counted)
        sweeps.append((False, value_flags, choice.terms, of_all))
    for pulls, (x_flags, y_flags), configs, (first_row, some_rows) in sweeps:
        for number, (mode, config) in enumerate(zip(evaluation.modes, configs, strict=True)):
            share, groups = 0, 1
            if isinstance(config, TermsConfig):
                share, groups = term_count(kernel.kernel, config.bandwidths), config.groups(evaluation.bandwidths)
            block = config.block_n
            launch(
                sweep_kernel, (key, number, share, pulls), device,
                (some_rows // block, batch * (d // config.block_d if pulls else groups), parts),
                (
                    *operands.parts(mode), operands.half, operands.weights, operands.plan, operands.table, value, slope, moments, n, m,
                    operands.first_y, operands.rows, swept_rows, first_row // block, x.start, x_padded // block, y_start, x_flags, y_flags,
                    first_gradient // block, gradient_rows,
                ),
                lambda number=number, mode=mode, config=config, pulls=pulls, share=share, groups=groups: {
                    "PLAN_SIZE": PLAN, "TABLE": evaluation.table, "PASS": number, "SAMPLES": len(samples), "BATCHED": batch > 1,
                    "GRADIENT": pulls, "TERMS": share, "GROUPS": groups, "WEIGHTED": weighted, "MODE": mode, "D": d,
                } | evaluation.constants | config.launch(),
            )  # fmt: skip

    # finish
    result, sums = empty(shape), torch.empty((batch, terms), dtype=torch.float64, device=device)
    grads = [empty((*shape, sample.rows, dim)) if sample.gradient else None for sample in samples]
    grad_x, grad_y = (result if grad is None else grad for grad in (grads * 2)[:2])
    launch(
        finish_kernel, key, device, (1 + terms + gradient_rows // ROW_BLOCK, batch, 1),
        (
            *operands.inputs[:2], operands.centre, operands.sums, operands.statistics, operands.numbers, *operands.buffers,
            operands.weights, operands.plan, operands.own_terms, value, slope, moments, result, sums, grad_x, grad_y, n, m,
            operands.first_y, operands.rows, x.start, x.rows, x_padded, y_start, y_rows, y_padded, first_gradient, gradient_rows,
            operands.blocks, parts,
        ),
        lambda: operands.plan_constants() | {"CROSS": two, "GRADIENT": gradient, "TERMS": terms, "WEIGHTED": weighted, "BLOCK_R": 1024},
    )  # fmt: skip
    return result, grads[0], grads[1] if two else None, sums, operands.table.view(batch, -1)[:, -evaluation.bandwidths :]
