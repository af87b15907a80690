"""Prepare a sweep over pairs in two launches: statistics of the data, then the operands and the plan that follow from them.

No number that depends on the data returns to the host: the device chooses the products, the subtracted constants and the scales. Numbers of
the caller, such as a bandwidth, are arguments of the kernels and no tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.families import (
    GAUSSIAN,
    MIXED,
    NO_CLOSED_FORM,
    NORMAL_PRIOR,
    Family,
    closed_form_term,
    exp_minus_one_if,
    ratios_to,
    representable_gamma,
    squared_scale,
)
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.plan import (
    CONSTANT,
    DIAGONAL,
    GRADIENT_SCALE,
    NEAR_SHARE,
    OTHER_GRADIENT,
    OTHER_VALUE,
    OWN_GRADIENT,
    OWN_VALUE,
    PLAN,
    PRECISION_PASS,
    PRIOR,
    ROUNDING,
    ROUNDING_DOUBLE,
    SCALE,
    SLOPE_CONSTANT,
    SLOPE_CONSTANT_GRADIENT,
    TOTAL,
    UNBIASED_SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    DeviceKernelPlan,
    near_distance,
)
from fastvae.kernels.products import DIFFERENCES, operand_buffers, operand_ptr, store_parts
from fastvae.kernels.reductions import share_of
from fastvae.kernels.sums import gammas_of, load_numbers, subtracted_constants

# Statistics of a program's rows, float64: Σ‖z−c‖², or Σ‖z‖² against N(0, I); max ‖z−c‖²; Σw²; 0, or nan if a number is not finite;
# and Σw. The sixth place fills 16 bytes.
STATISTICS = tl.constexpr(6)

# Rows of each sample whose mean is the centre.
_CENTRE_ROWS = tl.constexpr(128)

# Rows of each sample among which near pairs are counted, and of a program that does.
_NEAR_ROWS = tl.constexpr(128)
_NEAR_BLOCK = 16


# Tuples hold pointers in a kernel and tensors on the host. B is the number of problems; FEATURES and D are the numbers of features without
# and with their padding.


class Samples(NamedTuple):
    """Both samples as they were given; x twice if there is one."""

    x_ptr: Any  # (B, n, FEATURES)
    y_ptr: Any
    x_weight_ptr: Any  # (B, n)
    y_weight_ptr: Any
    n: Any
    m: Any


class Statistics(NamedTuple):
    """What `statistics_kernel` writes."""

    centre_ptr: Any  # (B, programs, D), the same for every program of a problem
    sum_ptr: Any  # (B, programs, D), float64, Σw·(z−c) with the weights as they were given, or Σ(z−c)
    statistic_ptr: Any  # (B, programs, STATISTICS), float64


class Operands(NamedTuple):
    """The rows as products take them: those of x, and from row `first_y` on those of y."""

    hi_ptr: Any  # (B, rows, D), high and low parts, see `fastvae.kernels.products.operand_ptr`; by differences the original rows
    lo_ptr: Any
    neg_half_norm2_ptr: Any  # (B, rows), −½‖u‖²; 0 for a polynomial, and in the padding `Family.padding`
    weight_ptr: Any  # (B, rows), weights that sum to one, 0 in the padding
    first_y: Any
    rows: Any


class PlanTables(NamedTuple):
    """What the first program of a problem writes, and the sums of closed forms."""

    plan_ptr: Any  # (B, PLAN), float64, see `fastvae.kernels.plan`
    table_ptr: Any  # (B, TABLE), ratios, weights and slopes of each bandwidth, then `load_parameters`, then the subtracted constants
    closed_form_ptr: Any  # (B, programs), float64


class SweptRows(NamedTuple):
    """The rows of each sample that a sweep takes sums of."""

    x_start: Any
    x_rows: Any
    y_start: Any
    y_rows: Any


class Factors(NamedTuple):
    """Numbers of the caller."""

    cross_x: Any  # with what factor a sweep over x takes the mean over pairs of both
    cross_y: Any
    x_tolerance: Any  # by how much the sum of its weights may differ from one
    y_tolerance: Any


class SampleSpec(NamedTuple):
    """The constexprs of the samples."""

    SAMPLES: int
    CHUNKS: int  # programs for the statistics of each, a power of two
    NORMAL: bool  # against N(0, I)
    X_WEIGHTED: bool
    Y_WEIGHTED: bool
    FEATURES: int
    D: int
    BLOCK_N: int
    BLOCK_D: int


class SumSpec(NamedTuple):
    """The constexprs of a sum of kernels."""

    FAMILY: Family
    KERNELS: int
    BANDWIDTHS: int  # of them in the table
    TABLE: int
    NUMBERS: int  # of `fastvae.kernel_sums.KernelNumbers`
    ON_DEVICE: bool
    CLOSED_FORM: int
    FIRST_PRODUCT: int  # of the first pass
    SECOND_PRODUCT: int  # −1 if differences come next
    LIMITS: tuple[float, float]  # the largest γ·‖z−c‖² of these passes


@triton.jit
def from_row(operands, row, D: tl.constexpr):
    """The operands from row `row` on, which has 64 bits so that offsets do not overflow. Rows are D elements apart."""
    return Operands(
        operands.hi_ptr + row * D,
        operands.lo_ptr + row * D,
        operands.neg_half_norm2_ptr + row,
        operands.weight_ptr + row,
        operands.first_y,
        operands.rows,
    )


@triton.jit
def as_product(operands, PRODUCT: tl.constexpr):
    """The operands as pointers to the dtype of their products."""
    return Operands(
        operand_ptr(operands.hi_ptr, PRODUCT),
        operand_ptr(operands.lo_ptr, PRODUCT),
        operands.neg_half_norm2_ptr,
        operands.weight_ptr,
        operands.first_y,
        operands.rows,
    )


@triton.jit
def _mean_of_some_rows(z_ptr, rows, offs_d, mask_d, FEATURES: tl.constexpr):
    """The mean of up to `_CENTRE_ROWS` rows, exact where they are equal."""
    count = tl.minimum(rows, _CENTRE_ROWS)
    offs = tl.arange(0, _CENTRE_ROWS)
    row = (offs.to(tl.int64) * rows) // count
    mask = (offs < count)[:, None] & mask_d[None, :]
    first = tl.load(z_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float64)
    z = tl.load(z_ptr + row[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
    return first + tl.sum(tl.where(mask, z - first[None, :], 0.0), 0) / count


@triton.jit
def sample_rows(samples, problem, is_y, SPEC: tl.constexpr):
    """Where the rows and weights of x or y start, and how many rows there are."""
    z_ptr, weight_ptr, rows = samples.x_ptr + problem * samples.n * SPEC.FEATURES, samples.x_weight_ptr + problem * samples.n, samples.n
    if SPEC.SAMPLES == 2:  # noqa: SIM102, one is known to the compiler and the other is not
        if is_y:
            z_ptr, weight_ptr = samples.y_ptr + problem * samples.m * SPEC.FEATURES, samples.y_weight_ptr + problem * samples.m
            rows = samples.m
    return z_ptr, weight_ptr, rows


@triton.jit
def load_rows(z_ptr, row, mask_n, offs_d, FEATURES: tl.constexpr):
    """Features of a block of rows, 0 outside of them, and the mask of what is inside."""
    mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
    return tl.load(z_ptr + row.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0), mask


@triton.jit
def _weight(weight_ptr, offs_n, mask_n, is_x, SPEC: tl.constexpr):
    """Weights of rows of a sample as they were given, float64: 1 where only the other sample has weights, and 0 outside of it."""
    if SPEC.X_WEIGHTED and SPEC.Y_WEIGHTED:
        return tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float64)
    else:
        given = is_x if SPEC.X_WEIGHTED else is_x == 0
        weight = tl.load(weight_ptr + offs_n, mask=mask_n & given, other=0.0).to(tl.float64)
        return tl.where(given, weight, tl.where(mask_n, 1.0, 0.0))


@triton.jit
def statistics_kernel(samples, statistics, RADIAL: tl.constexpr, SUMS: tl.constexpr, SPEC: tl.constexpr):
    """The centre of a problem, the origin unless RADIAL, and the statistics of a share of the rows of one of its samples."""
    # where
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    FEATURES: tl.constexpr = SPEC.FEATURES
    WEIGHTED: tl.constexpr = SPEC.X_WEIGHTED or SPEC.Y_WEIGHTED
    program = tl.program_id(0)
    problem = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = statistics.centre_ptr.dtype.element_ty
    slot = problem * (SPEC.SAMPLES * SPEC.CHUNKS) + program
    centre_ptr = statistics.centre_ptr + slot * SPEC.D
    sum_ptr = statistics.sum_ptr + slot * SPEC.D
    for start_d in range(0, SPEC.D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < FEATURES
        centre = tl.zeros([BLOCK_D], dtype=tl.float64)
        if RADIAL:
            x_ptr, y_ptr = samples.x_ptr + problem * samples.n * FEATURES, samples.y_ptr + problem * samples.m * FEATURES
            centre = _mean_of_some_rows(x_ptr, samples.n, offs_d, mask_d, FEATURES)
            if SPEC.SAMPLES == 2:
                centre = 0.5 * (centre + _mean_of_some_rows(y_ptr, samples.m, offs_d, mask_d, FEATURES))
        tl.store(centre_ptr + offs_d, centre.to(dtype))
    # The threads of a program read each other's part of the centre.
    tl.debug_barrier()
    z_ptr, weight_ptr, rows = sample_rows(samples, problem, program >= SPEC.CHUNKS, SPEC)
    first, last = share_of(rows, program % SPEC.CHUNKS, SPEC.CHUNKS, 1)

    # compute
    squares = tl.zeros([BLOCK_N], dtype=tl.float64)
    furthest = tl.zeros([BLOCK_N], dtype=tl.float64)
    weights = tl.zeros([BLOCK_N], dtype=tl.float64)
    weights2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    not_finite = tl.zeros([BLOCK_N], dtype=tl.float64)
    for start_n in range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        distance2 = tl.zeros([BLOCK_N], dtype=tl.float64)
        norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
        for start_d in range(0, SPEC.D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            z, mask = load_rows(z_ptr, offs_n, mask_n, offs_d, FEATURES)
            z = z.to(tl.float64)
            difference = tl.where(mask, z - tl.load(centre_ptr + offs_d).to(tl.float64)[None, :], 0.0)
            distance2 += tl.sum(difference * difference, 1)
            not_finite += tl.sum(z * 0.0, 1)
            if SPEC.NORMAL:
                norm2 += tl.sum(z * z, 1)
        squares += norm2 if SPEC.NORMAL else distance2
        furthest = tl.maximum(furthest, distance2)
        if WEIGHTED:
            weight = _weight(weight_ptr, offs_n, mask_n, program < SPEC.CHUNKS, SPEC)
            weights += weight
            weights2 += weight * weight
    if SUMS:
        for start_d in range(0, SPEC.D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            centre = tl.load(centre_ptr + offs_d)
            total = tl.zeros([BLOCK_D], dtype=tl.float64)
            for start_n in range(first, last, BLOCK_N):
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask_n = offs_n < last
                z, mask = load_rows(z_ptr, offs_n, mask_n, offs_d, FEATURES)
                difference = tl.where(mask, z.to(dtype) - centre[None, :], 0.0).to(tl.float64)
                if WEIGHTED:
                    difference *= _weight(weight_ptr, offs_n, mask_n, program < SPEC.CHUNKS, SPEC)[:, None]
                total += tl.sum(difference, 0)
            tl.store(sum_ptr + offs_d, total)

    # store
    statistic_ptr = statistics.statistic_ptr + slot * STATISTICS
    tl.store(statistic_ptr, tl.sum(squares))
    tl.store(statistic_ptr + 1, tl.max(furthest))
    tl.store(statistic_ptr + 2, tl.sum(weights2))
    tl.store(statistic_ptr + 3, tl.sum(not_finite))
    tl.store(statistic_ptr + 4, tl.sum(weights))


@triton.jit
def _load_statistics(statistic_ptr, CHUNKS: tl.constexpr):
    """The statistics of a sample, from those of its programs."""
    offs = tl.arange(0, CHUNKS) * STATISTICS
    squares, weights2 = tl.sum(tl.load(statistic_ptr + offs)), tl.sum(tl.load(statistic_ptr + offs + 2))
    not_finite, weights = tl.sum(tl.load(statistic_ptr + offs + 3)), tl.sum(tl.load(statistic_ptr + offs + 4))
    return squares, tl.max(tl.load(statistic_ptr + offs + 1)), weights2, not_finite, weights


@triton.jit
def _stride_of(rows):
    """Every how many rows of a sample one is looked at for near pairs."""
    return tl.cdiv(rows, _NEAR_ROWS)


@triton.jit
def near_pairs_kernel(samples, statistic_ptr, near_ptr, NEAR: tl.constexpr, SPEC: tl.constexpr, BLOCK_N: tl.constexpr):
    """The number of near pairs of a block of rows with some rows of both samples, over the most that may be: into near_ptr (B, programs),
    float64."""
    # where
    problem = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if samples.x_ptr.dtype.element_ty == tl.float64 else tl.float32
    statistic_ptr += problem * (SPEC.SAMPLES * SPEC.CHUNKS * STATISTICS)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, SPEC.SAMPLES * _NEAR_ROWS)
    row_ptrs, row_mask = _some_rows(samples, problem, offs_n, SPEC)
    column_ptrs, column_mask = _some_rows(samples, problem, offs_m, SPEC)

    # load and compute
    COLUMNS: tl.constexpr = SPEC.SAMPLES * _NEAR_ROWS
    distance2 = tl.zeros([BLOCK_N, COLUMNS], dtype=dtype)
    for d in range(SPEC.FEATURES):
        row = tl.load(row_ptrs + d, mask=row_mask, other=0.0).to(dtype)
        difference = row[:, None] - tl.load(column_ptrs + d, mask=column_mask, other=0.0).to(dtype)[None, :]
        distance2 += difference * difference
    furthest = tl.max(tl.load(statistic_ptr + tl.arange(0, SPEC.SAMPLES * SPEC.CHUNKS) * STATISTICS + 1))
    pairs = row_mask[:, None] & column_mask[None, :] & (offs_n[:, None] != offs_m[None, :])
    near = tl.sum((pairs & (distance2.to(tl.float64) < NEAR * furthest)).to(tl.float64))

    # store
    n, m = samples.n, samples.m
    rows = tl.cdiv(n, _stride_of(n)) + (tl.cdiv(m, _stride_of(m)) if SPEC.SAMPLES == 2 else 0)
    most = NEAR_SHARE * rows.to(tl.float64) * rows.to(tl.float64)
    tl.store(near_ptr + problem * tl.num_programs(0) + tl.program_id(0), near / most)


@triton.jit
def _some_rows(samples, problem, offs, SPEC: tl.constexpr):
    """Pointers to these of up to `_NEAR_ROWS` rows of each sample, and which of them there are."""
    row = offs.to(tl.int64) * _stride_of(samples.n)
    x_ptr = samples.x_ptr + problem * samples.n * SPEC.FEATURES
    ptrs, mask = x_ptr + row * SPEC.FEATURES, (offs < _NEAR_ROWS) & (row < samples.n)
    if SPEC.SAMPLES == 2:
        row = (offs - _NEAR_ROWS).to(tl.int64) * _stride_of(samples.m)
        in_y = (offs >= _NEAR_ROWS) & (row < samples.m)
        y_ptr = samples.y_ptr + problem * samples.m * SPEC.FEATURES
        ptrs, mask = tl.where(offs < _NEAR_ROWS, ptrs, y_ptr + row * SPEC.FEATURES), mask | in_y
    return ptrs, mask


class _Totals(NamedTuple):
    """Statistics of a problem: spread is the mean squared distance of two rows, poison 0 or nan."""

    spread: Any
    furthest: Any
    poison: Any
    x_weight: Any
    y_weight: Any
    x_weights2: Any
    y_weights2: Any


@triton.jit
def _totals(samples, statistic_ptr, factors, SPEC: tl.constexpr):
    """The `_Totals` of a problem."""
    x_squares, furthest, x_weights2, poison, x_weight = _load_statistics(statistic_ptr, SPEC.CHUNKS)
    spread = x_squares / samples.n.to(tl.float64)
    y_weights2, y_weight = x_weights2, x_weight
    if SPEC.SAMPLES == 2:
        y_squares, y_furthest, y_weights2, y_poison, y_weight = _load_statistics(statistic_ptr + SPEC.CHUNKS * STATISTICS, SPEC.CHUNKS)
        spread += y_squares / samples.m.to(tl.float64)
        poison += y_poison
        furthest = tl.maximum(furthest, y_furthest)
    elif SPEC.NORMAL:
        spread += SPEC.FEATURES
    else:
        spread += spread
    if SPEC.X_WEIGHTED:
        poison += tl.where(tl.abs(x_weight - 1.0) <= factors.x_tolerance, 0.0, float("nan"))
    if SPEC.Y_WEIGHTED:
        poison += tl.where(tl.abs(y_weight - 1.0) <= factors.y_tolerance, 0.0, float("nan"))
    return _Totals(spread, furthest, poison, x_weight, y_weight, x_weights2, y_weights2)


@triton.jit
def _unless_homogeneous(number, b: tl.constexpr, FAMILY: tl.constexpr):
    """The number, or 0 for a homogeneous part of a sum, which is 0 at 0 and as exact at any bandwidth."""
    PART: tl.constexpr = FAMILY.parts[b] if FAMILY.number == MIXED else FAMILY
    if FAMILY.number == MIXED and PART.homogeneous:
        return number * 0.0
    else:
        return number


@triton.jit
def _precision_pass(gammas, furthest, near_ptr, NEAR_BLOCKS: tl.constexpr, SUM: tl.constexpr):
    """The number of the pass that runs: the fastest whose products are exact enough."""
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    precision_pass = tl.zeros([], dtype=tl.int32)
    if FAMILY.radial:
        narrowest = gammas[KERNELS - 1]
        if FAMILY.number == MIXED:
            narrowest = 0.0 * gammas[0]
            for b in tl.static_range(KERNELS):
                narrowest = tl.maximum(narrowest, _unless_homogeneous(gammas[b], b, FAMILY))
        steepness = narrowest * furthest
        precision_pass = (steepness > SUM.LIMITS[0]).to(tl.int32)
        if SUM.SECOND_PRODUCT >= 0:
            precision_pass += (steepness > SUM.LIMITS[1]).to(tl.int32)
        if NEAR_BLOCKS > 0:
            near = tl.sum(tl.load(near_ptr + tl.arange(0, NEAR_BLOCKS)))
            precision_pass = tl.where(near > 1.0, 1, precision_pass)
    return precision_pass


@triton.jit
def store_rows(scaled, z, operands, offs, mask, precision_pass, SUM: tl.constexpr):
    """Store rows as the pass that runs takes them, and return them as its products see them."""
    hi_ptr, lo_ptr = operands.hi_ptr, operands.lo_ptr
    rounded = scaled
    if precision_pass == 0:
        rounded = store_parts(scaled, z, hi_ptr, lo_ptr, offs, mask, SUM.FIRST_PRODUCT)
    if SUM.SECOND_PRODUCT >= 0:
        if precision_pass == 1:
            rounded = store_parts(scaled, z, hi_ptr, lo_ptr, offs, mask, SUM.SECOND_PRODUCT)
        if precision_pass == 2:
            rounded = store_parts(scaled, z, hi_ptr, lo_ptr, offs, mask, DIFFERENCES)
    elif SUM.FAMILY.radial:  # noqa: SIM102
        if precision_pass == 1:
            rounded = store_parts(scaled, z, hi_ptr, lo_ptr, offs, mask, DIFFERENCES)
    return rounded


@triton.jit
def operands_kernel(
    samples,
    statistics,
    numbers,  # of `fastvae.kernel_sums.KernelNumbers`
    near_ptr,  # (B, NEAR_BLOCKS), of `near_pairs_kernel`
    operands,
    tables,
    swept,
    factors,
    NEAR_BLOCKS: tl.constexpr,  # of an unbounded slope, else 0
    UNBIASED: tl.constexpr,
    SPEC: tl.constexpr,
    SUM: tl.constexpr,
):
    """The operands of a block of rows, and from the first block the plan."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    problem = tl.program_id(1).to(tl.int64)
    start_n = tl.program_id(0) * BLOCK_N
    operands = from_row(operands, problem * operands.rows, SPEC.D)
    dtype: tl.constexpr = operands.neg_half_norm2_ptr.dtype.element_ty
    statistic_ptr = statistics.statistic_ptr + problem * (SPEC.SAMPLES * SPEC.CHUNKS * STATISTICS)
    centre_ptr = statistics.centre_ptr + problem * (SPEC.SAMPLES * SPEC.CHUNKS * SPEC.D)

    # what follows from the statistics
    totals = _totals(samples, statistic_ptr, factors, SPEC)
    values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
    gammas = gammas_of(values, FAMILY, KERNELS, SPEC.FEATURES)
    gamma = gammas[0]
    constants = subtracted_constants(totals.spread, gammas, FAMILY, KERNELS)
    precision_pass = _precision_pass(gammas, totals.furthest, near_ptr + problem * NEAR_BLOCKS, NEAR_BLOCKS, SUM)
    if FAMILY.takes_distance:
        gamma = representable_gamma(gamma, totals.furthest, dtype, FAMILY)
    scale2 = squared_scale(gamma, values, FAMILY, KERNELS)
    scale = tl.sqrt(scale2)

    # load, compute, store
    offs_n = start_n + tl.arange(0, BLOCK_N)
    is_y = (start_n >= operands.first_y) & (SPEC.SAMPLES == 2)
    z_ptr, sample_weight_ptr, count = sample_rows(samples, problem, is_y, SPEC)
    start = tl.where(is_y, swept.y_start, swept.x_start)
    swept_rows = tl.where(is_y, swept.y_rows, swept.x_rows)
    local = offs_n - tl.where(is_y, operands.first_y, 0)
    in_sweep = (local >= start) & (local < start + swept_rows)
    weight_sum = tl.where(is_y, totals.y_weight, totals.x_weight)
    equal = 1.0 / count.to(tl.float64)
    mask_n = local < count
    row_mask = offs_n < operands.rows
    norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    neg_half_norm2 = tl.zeros([BLOCK_N], dtype=dtype)
    for start_d in range(0, SPEC.D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        z, mask = load_rows(z_ptr, local, mask_n, offs_d, SPEC.FEATURES)
        z = z.to(dtype)
        scaled = (z - tl.load(centre_ptr + offs_d)[None, :]).to(tl.float64) * scale
        scaled = tl.where(mask, scaled, 0.0).to(dtype)
        offs = offs_n.to(tl.int64)[:, None] * SPEC.D + offs_d[None, :]
        rounded = store_rows(scaled, z, operands, offs, row_mask[:, None], precision_pass, SUM)
        neg_half_norm2 -= 0.5 * tl.sum(rounded * rounded, 1)
        if SUM.CLOSED_FORM != NO_CLOSED_FORM:
            norm2 += tl.sum(z.to(tl.float64) * z.to(tl.float64), 1)
    if FAMILY.radial:
        neg_half_norm2 = tl.where(mask_n, neg_half_norm2, FAMILY.padding)
    else:
        neg_half_norm2 = tl.zeros([BLOCK_N], dtype=dtype)
    tl.store(operands.neg_half_norm2_ptr + offs_n, neg_half_norm2, mask=row_mask)
    p = tl.where(mask_n, equal, 0.0)
    if SPEC.X_WEIGHTED or SPEC.Y_WEIGHTED:
        row_weight = (_weight(sample_weight_ptr, local, mask_n, is_y == 0, SPEC) / weight_sum).to(dtype)
        tl.store(operands.weight_ptr + offs_n, row_weight, mask=row_mask)
        p = row_weight.to(tl.float64)
    if SUM.CLOSED_FORM != NO_CLOSED_FORM:
        value, _ = closed_form_term(norm2, tl.where(in_sweep, p, 0.0), constants, values, gammas, SUM.CLOSED_FORM, FAMILY, KERNELS)
        tl.store(tables.closed_form_ptr + problem * tl.num_programs(0) + tl.program_id(0), tl.sum(value))

    if start_n == 0:
        plan_ptr, table_ptr = tables.plan_ptr + problem * PLAN, tables.table_ptr + problem * SUM.TABLE
        tl.store(plan_ptr + PRECISION_PASS, precision_pass.to(tl.float64))
        tl.store(plan_ptr + SCALE, scale)
        identical = -(ROUNDING_DOUBLE if dtype == tl.float64 else ROUNDING) * totals.furthest * scale2
        value_scale = _store_plan(plan_ptr, values, gammas, gamma, constants, scale, totals, UNBIASED, SUM)
        _store_means(plan_ptr, value_scale, samples, totals, factors, UNBIASED, SPEC)
        _store_table(table_ptr, values, gammas, gamma, constants, identical, SUM)


@triton.jit
def _store_table(table_ptr, values, gammas, gamma, constants, identical, SUM: tl.constexpr):
    """The coefficients of each bandwidth, and the parameters behind them."""
    FAMILY: tl.constexpr = SUM.FAMILY
    BANDWIDTHS: tl.constexpr = SUM.BANDWIDTHS
    PARAMETERS: tl.constexpr = FAMILY.parameters
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    for b in tl.static_range(BANDWIDTHS):
        ratio, slope_ratio = ratios_to(gamma, gammas, b, values, FAMILY, SUM.KERNELS)
        weight = values[SUM.KERNELS + b]
        if FAMILY.number != MIXED:
            # Below one, because of `representable_gamma`, k is one in any case, but that of a padded column would not be zero.
            ratio = tl.where(ratio < 1.0, 1.0, ratio)
        tl.store(table_ptr + b, ratio.to(dtype))
        tl.store(table_ptr + (BANDWIDTHS + b), weight.to(dtype))
        tl.store(table_ptr + (2 * BANDWIDTHS + b), (weight * slope_ratio).to(dtype))
        tl.store(table_ptr + (SUM.TABLE - BANDWIDTHS + b), constants[b].to(dtype))
    for k in tl.static_range(PARAMETERS):
        tl.store(table_ptr + (3 * BANDWIDTHS + k), values[2 * SUM.KERNELS + k].to(dtype))
    if FAMILY.takes_distance:
        tl.store(table_ptr + (3 * BANDWIDTHS + PARAMETERS), identical.to(dtype))


@triton.jit
def _store_plan(plan_ptr, values, gammas, gamma, constants, scale, totals, UNBIASED: tl.constexpr, SUM: tl.constexpr):
    """Store the plan's entries of the sum of kernels: constants, scales and closed forms. Returns VALUE_SCALE."""
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    weights = tl.zeros([], dtype=tl.float64)
    scaled_weights = tl.zeros([], dtype=tl.float64)
    value_constant = tl.zeros([], dtype=tl.float64)
    slope_constant = tl.zeros([], dtype=tl.float64)
    prior = tl.zeros([], dtype=tl.float64)
    for b in tl.static_range(KERNELS):
        ratio, _ = ratios_to(gamma, gammas, b, values, FAMILY, KERNELS)
        weight = values[KERNELS + b]
        scaled_weights += weight * ratio
        weights += _unless_homogeneous(weight, b, FAMILY)
        value_constant += constants[b] * weight
        if FAMILY.number == GAUSSIAN:
            slope_constant += constants[b] * weight * ratio
        if SUM.CLOSED_FORM == NORMAL_PRIOR:
            prior += weight * exp_minus_one_if(values[2 * KERNELS + b], constants[b] > 0)
    slope_constant_gradient = tl.where(slope_constant == 0.0, 0.0, -4.0 * gamma * slope_constant)
    diagonal = weights - value_constant
    value_scale = weights * 0.0 + 1.0
    constant = value_constant
    if FAMILY.homogeneous:
        value_scale = scaled_weights
        value_constant *= 0.0
        constant = value_constant
        diagonal *= 0.0
    elif not FAMILY.radial:
        value_constant *= 0.0
        constant = values[2 * KERNELS + FAMILY.parameters]
        diagonal *= 0.0
    elif KERNELS == 1:
        value_scale = weights
        value_constant = constants[0]
        slope_constant = constants[0]
    if FAMILY.number != GAUSSIAN:
        slope_constant *= 0.0
    if UNBIASED:
        diagonal *= 0.0
    if FAMILY.radial:
        gradient_scale = -4.0 * (gamma / scale) * value_scale
        if FAMILY.neg_dphi_factor != 1.0:
            gradient_scale *= FAMILY.neg_dphi_factor
        if FAMILY.takes_distance and not FAMILY.homogeneous and KERNELS == 1:
            _, slope_ratio = ratios_to(gamma, gammas, 0, values, FAMILY, KERNELS)
            gradient_scale *= slope_ratio
    else:
        gradient_scale = 2.0 * scale
    tl.store(plan_ptr + VALUE_CONSTANT, value_constant)
    tl.store(plan_ptr + SLOPE_CONSTANT, slope_constant)
    tl.store(plan_ptr + GRADIENT_SCALE, gradient_scale + totals.poison)
    tl.store(plan_ptr + SLOPE_CONSTANT_GRADIENT, slope_constant_gradient)
    tl.store(plan_ptr + DIAGONAL, diagonal)
    tl.store(plan_ptr + PRIOR, prior)
    tl.store(plan_ptr + VALUE_SCALE, value_scale + totals.poison)
    tl.store(plan_ptr + CONSTANT, constant)
    return value_scale


@triton.jit
def _store_means(plan_ptr, value_scale, samples, totals, factors, UNBIASED: tl.constexpr, SPEC: tl.constexpr):
    """Store the plan's entries of the samples: the factors of sums over rows and columns."""
    WEIGHTED: tl.constexpr = SPEC.X_WEIGHTED or SPEC.Y_WEIGHTED
    n, m = samples.n.to(tl.float64), samples.m.to(tl.float64)
    # Not finite where VALUE_SCALE is not.
    x_scale = value_scale * 0.0 + 1.0
    y_scale = x_scale
    x_mean = 1.0 / n
    y_mean = 1.0 / m
    if UNBIASED:
        x_scale = 1.0 / (1.0 - (totals.x_weights2 / (totals.x_weight * totals.x_weight) if WEIGHTED else x_mean))
        y_scale = 1.0 / (1.0 - (totals.y_weights2 / (totals.y_weight * totals.y_weight) if WEIGHTED else y_mean))
    if WEIGHTED:
        x_mean = x_scale * 0.0 + 1.0
        y_mean = x_mean
    tl.store(plan_ptr + OWN_VALUE, x_scale * x_mean + totals.poison)
    tl.store(plan_ptr + (OWN_VALUE + 1), y_scale * y_mean + totals.poison)
    tl.store(plan_ptr + OTHER_VALUE, factors.cross_x * y_mean)
    tl.store(plan_ptr + (OTHER_VALUE + 1), factors.cross_y * x_mean)
    tl.store(plan_ptr + OWN_GRADIENT, x_scale * x_mean)
    tl.store(plan_ptr + (OWN_GRADIENT + 1), y_scale * y_mean)
    tl.store(plan_ptr + OTHER_GRADIENT, -y_mean if SPEC.SAMPLES == 2 else x_scale * x_mean)
    tl.store(plan_ptr + (OTHER_GRADIENT + 1), -x_mean)
    tl.store(plan_ptr + UNBIASED_SCALE, x_scale)
    tl.store(plan_ptr + (UNBIASED_SCALE + 1), y_scale)
    tl.store(plan_ptr + TOTAL, totals.x_weight if WEIGHTED else n)
    tl.store(plan_ptr + (TOTAL + 1), totals.y_weight if WEIGHTED else m)


class Sample(NamedTuple):
    """One sample of one problem or of each of a batch."""

    points: Tensor  # (N, D) or (batch, N, D), contiguous
    weights: Tensor | None  # (N,) or (batch, N) in the accumulation dtype, or None for 1/N each
    tolerance: float  # by how much their sum may differ from one; otherwise the result is nan
    start: int  # the rows that are swept, all unless data are parallel
    rows: int
    gradient: bool  # whether the gradient of these rows is wanted

    @staticmethod
    def of(points: Tensor) -> Sample:
        """All rows of one problem, (N, D)."""
        return Sample(points.contiguous(), None, 0.0, 0, points.shape[0], False)

    @property
    def whole(self) -> bool:
        return self.rows == self.points.shape[-2]

    @property
    def problems(self) -> int:
        return 1 if self.points.ndim == 2 else self.points.shape[0]


class Prepared(NamedTuple):
    """What `prepare` leaves for the kernels that follow."""

    key: Hashable  # of `launch`, for what depends on the samples and on the sum of kernels
    specs: Callable[[], dict[str, Any]]  # makes the constexprs SPEC and SUM
    samples: Samples
    statistics: Statistics
    operands: Operands
    tables: PlanTables
    swept: SweptRows


def prepare(
    samples: Sequence[Sample],
    kernel: KernelNumbers,
    plan: DeviceKernelPlan,
    d: int,
    block: int,
    *,
    sums: bool = False,
    unbiased: bool = False,
    closed_form: int = NO_CLOSED_FORM.value,
    counts: tuple[float, float] = (0.0, 0.0),
) -> Prepared:
    """Statistics and operands of one or two samples, padded to `d` features and whole blocks of `block` rows.

    Args:
        sums: whether the sums of the rows are wanted.
        closed_form: which a row adds by itself.
        counts: with what factor a sweep over each sample takes the mean over the pairs of both.
    """
    two = len(samples) == 2
    x, y = samples[0], samples[-1]
    points = x.points
    batch, (n, dim), m, device = x.problems, points.shape[-2:], y.points.shape[-2], points.device
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    # Rows of a share may start within a block.
    first_y, y_rows = (padded(z.points.shape[-2], block) + (0 if x.whole and y.whole else block) for z in (x, y))
    rows = first_y + (y_rows if two else 0)
    # One number of chunks for all but small samples, as each is compiled apart.
    chunks = _CHUNKS if max(n, m) > 8 * ROW_BLOCK else 1
    slots, blocks = len(samples) * chunks, -(-rows // ROW_BLOCK)
    empty = functools.partial(torch.empty, device=device)
    # All but the last are multiples of 16 bytes, as a launch assumes.
    sizes = (PLAN.value * batch, slots * d * batch, slots * STATISTICS.value * batch, blocks * batch if closed_form else 0)
    plan_entries, sums_of_rows, statistics_entries, closed_forms = torch.split_with_sizes(empty(sum(sizes), dtype=torch.float64), sizes)
    centre = empty((batch, slots, d), dtype=dtype)
    buffers = operand_buffers((batch, rows, d), dtype, plan.precision_passes, device)
    weighted = any(sample.weights is not None for sample in samples)
    sizes = batch * rows, batch * rows if weighted else 0, batch * plan.table
    neg_half_norm2, weights, table = torch.split_with_sizes(empty(sum(sizes), dtype=dtype), sizes)
    given = x.weights is not None, two and y.weights is not None
    tensors = (points, y.points, *(neg_half_norm2 if sample.weights is None else sample.weights for sample in (x, y)))
    on_device = isinstance(kernel.arguments, Tensor)
    key = (
        plan, kernel.count, on_device, chunks, two, given, sums, unbiased, closed_form, batch > 1, dim, d, tensor_key(*tensors)
    )  # fmt: skip

    def spec() -> SampleSpec:
        return SampleSpec(len(samples), chunks, closed_form == NORMAL_PRIOR.value, *given, dim, d, ROW_BLOCK, block_of(d))

    def specs() -> dict[str, Any]:
        products = (*plan.precision_passes, -1)[:2]
        second = products[1] if products[1] != DIFFERENCES.value else -1
        return {
            "SPEC": spec(),
            "SUM": SumSpec(
                plan.family, kernel.count, plan.bandwidths, plan.table, kernel.numbers, on_device, closed_form, products[0], second,
                plan.limits,
            ),
            "num_warps": 8,
        }  # fmt: skip

    given_samples = Samples(*tensors, n, m)
    statistics = Statistics(centre, sums_of_rows, statistics_entries)
    launch(
        statistics_kernel, key, device, (slots, batch, 1), (given_samples, statistics),
        lambda: {"RADIAL": plan.family.radial, "SUMS": sums, "SPEC": spec()},
    )  # fmt: skip
    # Products lose the direction of the distance of near rows, on which an unbounded slope depends.
    near, near_blocks = plan_entries, 0
    if plan.family.takes_distance:
        near_blocks = len(samples) * _NEAR_ROWS.value // _NEAR_BLOCK
        near = empty(batch * near_blocks, dtype=torch.float64)
        launch(
            near_pairs_kernel, key, device, (near_blocks, batch, 1), (given_samples, statistics_entries, near),
            lambda: {"NEAR": near_distance(dtype == torch.float64), "SPEC": spec(), "BLOCK_N": _NEAR_BLOCK},
        )  # fmt: skip
    operands = Operands(*buffers, neg_half_norm2, weights, first_y, rows)
    tables = PlanTables(plan_entries, table, closed_forms)
    swept = SweptRows(x.start, x.rows, *((y.start, y.rows) if two else (0, 0)))
    launch(
        operands_kernel, key, device, (blocks, batch, 1),
        (given_samples, statistics, kernel.arguments, near, operands, tables, swept, Factors(*counts, x.tolerance, y.tolerance)),
        lambda: specs() | {"NEAR_BLOCKS": near_blocks, "UNBIASED": unbiased},
    )  # fmt: skip
    return Prepared(key, specs, given_samples, statistics, operands, tables, swept)


def padded(rows: int, block: int) -> int:
    return rows + -rows % block


def block_of(size: int) -> int:
    """A power of two that divides `size`, at most 32."""
    return min(size & -size, 32)


# Programs that take the statistics of a sample.
_CHUNKS = 64

# Rows of a step of the statistics, and of a program of the kernels around a sweep. Every block of a sweep holds whole ones.
ROW_BLOCK = 64
