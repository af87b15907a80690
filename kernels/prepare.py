"""What a sweep reads of its samples, in two launches: statistics of the data, then the operands and the plan that follow from them.

No number that depends on the data returns to the host: the precision of the products, the shifts and the scales are chosen on the device,
and numbers of the caller, such as a bandwidth, are arguments of the kernels and not tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae import kernel_sums
from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.pairs import (
    BF16,
    DIFFERENCES,
    ENERGY,
    GAUSSIAN,
    LAPLACE,
    NEAR_SHARE,
    POLYNOMIAL,
    QUADRATIC_HALF,
    QUADRATIC_ONE,
    SPLIT,
    SPLIT_TF32,
    TF32,
    family_of,
    limits_of,
    modes_of,
    near_of,
    pack_squarings,
    padding_of,
    parameter_count,
    rounding_of,
)
from fastvae.radial import Energy, Kernel, Polynomial

# Statistics of a program's rows, float64: Σ‖z−c‖², or Σ‖z‖² against N(0, I); max ‖z−c‖²; Σw²; 0, or nan if a number is not finite;
# and Σw. The sixth place fills 16 bytes.
STATISTICS = tl.constexpr(6)

# Entries of the plan of a problem, float64.
ROUTE = tl.constexpr(0)  # number of the pass that runs
SCALE = tl.constexpr(1)  # of the operands
VALUE_SHIFT, SLOPE_SHIFT = tl.constexpr(2), tl.constexpr(3)  # constants subtracted from each pair
OWN_VALUE, OTHER_VALUE = tl.constexpr(4), tl.constexpr(6)  # factors of a row's sum over its own and the other sample; x, then y
OWN_PULL, OTHER_PULL = tl.constexpr(8), tl.constexpr(10)  # the same of its gradient
GRADIENT_SCALE = tl.constexpr(12)  # from sums over operands to a gradient, without the row's weight
LEFT_OUT = tl.constexpr(13)  # factor of what SLOPE_SHIFT leaves out of the gradient
UNBIASED_SCALE = tl.constexpr(14)  # 1/(1 − Σp²), or 1; x, then y
DIAGONAL = tl.constexpr(16)  # k(z, z) without its shift
PRIOR = tl.constexpr(17)  # E k(y, y') without its shift
UNIT = tl.constexpr(18)  # factor of a sum of kernels
CONSTANT = tl.constexpr(19)  # what each pair lacks of the kernel after it
TOTAL = tl.constexpr(20)  # sum of the rows' weights as they came, or their number; x, then y
PLAN = 22

# Least ‖u‖² of the farthest row with the Laplace kernel, in float32 and float64: k is then one, and the squares of distances are numbers.
_LEAST, _LEAST_DOUBLE = tl.constexpr(1e-24), tl.constexpr(1e-40)

_SHIFT_BELOW = tl.constexpr(kernel_sums.SHIFT_BELOW)
LOG2_E = tl.constexpr(kernel_sums.LOG2_E)

# Rows of each sample whose mean is the centre.
_CENTRE_ROWS = tl.constexpr(128)

# Rows of each sample among which near pairs are counted, and of a program that does.
_NEAR_ROWS = tl.constexpr(128)
_NEAR_BLOCK = 16

# Which closed form a row adds by itself.
NO_OWN_TERM, NORMAL_PRIOR, POLYNOMIAL_DIAGONAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_numbers(numbers, COUNT: tl.constexpr, ON_DEVICE: tl.constexpr):
    """`fastvae.kernel_sums.KernelNumbers` in float64, from a tensor or from three float32 that sum to each."""
    values = ()
    for n in tl.static_range(COUNT):
        if ON_DEVICE:
            values += (tl.load(numbers + n),)
        else:
            high, middle, low = numbers[3 * n], numbers[3 * n + 1], numbers[3 * n + 2]
            values += (tl.cast(high, tl.float64) + tl.cast(middle, tl.float64) + tl.cast(low, tl.float64),)
    return values


@triton.jit
def gammas_of(values, FAMILY: tl.constexpr, KERNELS: tl.constexpr, FEATURES: tl.constexpr):
    """γ of each bandwidth, nan where that is not positive."""
    gammas = ()
    for b in tl.static_range(KERNELS):
        h2 = values[b] * values[b]
        gamma = 0.5 / h2 if FAMILY < POLYNOMIAL else 1.0 / (FEATURES * h2)
        gammas += (tl.where(values[b] > 0, gamma, float("nan")),)
    return gammas


@triton.jit
def gain_of(gamma, values, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """The square of the scale that makes of points what `fastvae.kernels.pairs` takes."""
    if FAMILY == GAUSSIAN:
        return gamma * (2 * LOG2_E)
    elif FAMILY == LAPLACE:
        return gamma * (4 * LOG2_E * LOG2_E)
    elif FAMILY == ENERGY or FAMILY == QUADRATIC_HALF:  # noqa: SIM109
        return gamma * 4
    elif FAMILY == QUADRATIC_ONE:
        return gamma * 2
    elif FAMILY < POLYNOMIAL:
        return gamma * 2 / values[2 * KERNELS]
    else:
        return gamma


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


@triton.jit(do_not_specialize=["n", "m"])
def statistics_kernel(
    x_ptr,  # (B, n, FEATURES)
    y_ptr,  # (B, m, FEATURES)
    x_weight_ptr,  # (B, n)
    y_weight_ptr,
    centre_ptr,  # (B, PROGRAMS, D), the same for every program of a problem
    sum_ptr,  # (B, PROGRAMS, D), float64, Σw·(z−c), w as it came, or Σ(z−c) without weights
    statistic_ptr,  # (B, PROGRAMS, STATISTICS), float64
    n,
    m,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,  # programs of a sample, a power of two
    NORMAL: tl.constexpr,  # against N(0, I)
    RADIAL: tl.constexpr,  # of a kernel of x·y the centre is the origin
    SUMS: tl.constexpr,
    X_WEIGHTED: tl.constexpr,
    Y_WEIGHTED: tl.constexpr,
    FEATURES: tl.constexpr,
    D: tl.constexpr,  # features with their padding
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The centre of a problem, and the statistics of a share of the rows of one of its samples."""
    # where
    program = tl.program_id(0)
    problem = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = centre_ptr.dtype.element_ty
    slot = problem * (SAMPLES * CHUNKS) + program
    x_ptr += problem * n * FEATURES
    y_ptr += problem * m * FEATURES
    centre_ptr += slot * D
    sum_ptr += slot * D
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < FEATURES
        centre = tl.zeros([BLOCK_D], dtype=tl.float64)
        if RADIAL:
            centre = _mean_of_some_rows(x_ptr, n, offs_d, mask_d, FEATURES)
            if SAMPLES == 2:
                centre = 0.5 * (centre + _mean_of_some_rows(y_ptr, m, offs_d, mask_d, FEATURES))
        tl.store(centre_ptr + offs_d, centre.to(dtype))
    # The threads of a program read each other's part of the centre.
    tl.debug_barrier()
    z_ptr, rows, weight_ptr = x_ptr, n, x_weight_ptr + problem * n
    if SAMPLES == 2:  # noqa: SIM102, one is known to the compiler and the other is not
        if program >= CHUNKS:
            z_ptr, rows, weight_ptr = y_ptr, m, y_weight_ptr + problem * m
    share = tl.cdiv(rows, CHUNKS)
    first = (program % CHUNKS) * share
    last = tl.minimum(first + share, rows)

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
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
            z = tl.load(z_ptr + offs_n.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
            difference = tl.where(mask, z - tl.load(centre_ptr + offs_d).to(tl.float64)[None, :], 0.0)
            distance2 += tl.sum(difference * difference, 1)
            not_finite += tl.sum(z * 0.0, 1)
            if NORMAL:
                norm2 += tl.sum(z * z, 1)
        squares += norm2 if NORMAL else distance2
        furthest = tl.maximum(furthest, distance2)
        if X_WEIGHTED or Y_WEIGHTED:
            weight = _weight(weight_ptr, offs_n, mask_n, program < CHUNKS, X_WEIGHTED, Y_WEIGHTED)
            weights += weight
            weights2 += weight * weight
    if SUMS:
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            centre = tl.load(centre_ptr + offs_d)
            total = tl.zeros([BLOCK_D], dtype=tl.float64)
            for start_n in range(first, last, BLOCK_N):
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask_n = offs_n < last
                mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
                z = tl.load(z_ptr + offs_n.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0).to(dtype)
                difference = tl.where(mask, z - centre[None, :], 0.0).to(tl.float64)
                if X_WEIGHTED or Y_WEIGHTED:
                    difference *= _weight(weight_ptr, offs_n, mask_n, program < CHUNKS, X_WEIGHTED, Y_WEIGHTED)[:, None]
                total += tl.sum(difference, 0)
            tl.store(sum_ptr + offs_d, total)

    # store
    statistic_ptr += slot * STATISTICS
    tl.store(statistic_ptr, tl.sum(squares))
    tl.store(statistic_ptr + 1, tl.max(furthest))
    tl.store(statistic_ptr + 2, tl.sum(weights2))
    tl.store(statistic_ptr + 3, tl.sum(not_finite))
    tl.store(statistic_ptr + 4, tl.sum(weights))


@triton.jit
def _weight(weight_ptr, offs_n, mask_n, is_x, X_WEIGHTED: tl.constexpr, Y_WEIGHTED: tl.constexpr):
    """Weights of rows of a sample as they came, float64: 1 where only the other sample has weights, and 0 outside of it."""
    if X_WEIGHTED and Y_WEIGHTED:
        return tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float64)
    else:
        given = is_x if X_WEIGHTED else is_x == 0
        weight = tl.load(weight_ptr + offs_n, mask=mask_n & given, other=0.0).to(tl.float64)
        return tl.where(given, weight, tl.where(mask_n, 1.0, 0.0))


@triton.jit
def _statistics(statistic_ptr, CHUNKS: tl.constexpr):
    """Those of a sample, from its programs'."""
    offs = tl.arange(0, CHUNKS) * STATISTICS
    squares, weights2 = tl.sum(tl.load(statistic_ptr + offs)), tl.sum(tl.load(statistic_ptr + offs + 2))
    not_finite, weights = tl.sum(tl.load(statistic_ptr + offs + 3)), tl.sum(tl.load(statistic_ptr + offs + 4))
    return squares, tl.max(tl.load(statistic_ptr + offs + 1)), weights2, not_finite, weights


@triton.jit
def _share_of(rows):
    """Every how many rows of a sample are looked at for near pairs."""
    return tl.cdiv(rows, _NEAR_ROWS)


@triton.jit(do_not_specialize=["n", "m"])
def near_pairs_kernel(
    x_ptr,
    y_ptr,
    statistic_ptr,
    near_ptr,  # (B, programs), float64
    n,
    m,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    NEAR: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of some rows of both samples, how many pairs with a block of them are near, over the most that may be."""
    # where
    problem = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x_ptr += problem * n * FEATURES
    y_ptr += problem * m * FEATURES
    statistic_ptr += problem * (SAMPLES * CHUNKS * STATISTICS)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, SAMPLES * _NEAR_ROWS)
    row_ptrs, row_mask = _some_rows(x_ptr, y_ptr, offs_n, n, m, SAMPLES, FEATURES)
    column_ptrs, column_mask = _some_rows(x_ptr, y_ptr, offs_m, n, m, SAMPLES, FEATURES)

    # load and compute
    distance2 = tl.zeros([BLOCK_N, SAMPLES * _NEAR_ROWS], dtype=dtype)
    for d in range(FEATURES):
        row = tl.load(row_ptrs + d, mask=row_mask, other=0.0).to(dtype)
        difference = row[:, None] - tl.load(column_ptrs + d, mask=column_mask, other=0.0).to(dtype)[None, :]
        distance2 += difference * difference
    furthest = tl.max(tl.load(statistic_ptr + tl.arange(0, SAMPLES * CHUNKS) * STATISTICS + 1))
    pairs = row_mask[:, None] & column_mask[None, :] & (offs_n[:, None] != offs_m[None, :])
    near = tl.sum((pairs & (distance2.to(tl.float64) < NEAR * furthest)).to(tl.float64))

    # store
    rows = tl.cdiv(n, _share_of(n)) + (tl.cdiv(m, _share_of(m)) if SAMPLES == 2 else 0)
    most = NEAR_SHARE * rows.to(tl.float64) * rows.to(tl.float64)
    tl.store(near_ptr + problem * tl.num_programs(0) + tl.program_id(0), near / most)


@triton.jit
def _some_rows(x_ptr, y_ptr, offs, n, m, SAMPLES: tl.constexpr, FEATURES: tl.constexpr):
    """Where these of up to `_NEAR_ROWS` rows of each sample are, and which there are."""
    row = offs.to(tl.int64) * _share_of(n)
    ptrs, mask = x_ptr + row * FEATURES, (offs < _NEAR_ROWS) & (row < n)
    if SAMPLES == 2:
        row = (offs - _NEAR_ROWS).to(tl.int64) * _share_of(m)
        in_y = (offs >= _NEAR_ROWS) & (row < m)
        ptrs, mask = tl.where(offs < _NEAR_ROWS, ptrs, y_ptr + row * FEATURES), mask | in_y
    return ptrs, mask


@triton.jit
def _exp_minus(t, shifted):
    """exp(t), or exp(t) − 1 without cancellation."""
    power = tl.exp(t)
    # Kahan's quotient: (e^t − 1)·t/log(e^t) of the rounded power.
    log = tl.log(power)
    minus_one = tl.where(power == 1.0, t, (power - 1.0) * t / tl.where(log == 0.0, 1.0, log))
    minus_one = tl.where(power == 0.0, -1.0, minus_one)
    return tl.where(shifted, minus_one, power)


@triton.jit
def own_term(norm2, p, shifts, values, gammas, OWN: tl.constexpr, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """What a row of squared norm `norm2` and weight p adds to MMD² by itself, and s of its gradient s·z, in float64.

    Against N(0, I), −2·p·Σ_b a_b·E_y k_b(z, y); of a polynomial p²·(k(z, z) − k(0, 0)).
    """
    value = tl.zeros_like(norm2)
    slope = tl.zeros_like(norm2)
    if OWN == NORMAL_PRIOR:
        for b in tl.static_range(KERNELS):
            weight = values[KERNELS + b]
            steepness = values[4 * KERNELS + b]
            exponent = values[3 * KERNELS + b] - 0.5 * steepness * norm2
            value -= weight * _exp_minus(exponent, shifts[b] > 0)
            slope += weight * steepness * tl.exp(exponent)
        value *= 2 * p
        slope *= 2 * p
    elif OWN == POLYNOMIAL_DIAGONAL:
        gamma = gammas[0]
        t = gamma * norm2
        for n in tl.static_range(FAMILY - POLYNOMIAL):
            slope = slope * t + value
            value = value * t + values[2 * KERNELS + n]
        # Horner's scheme of Σ c_n·t^n ends with the power 0, which this lacks.
        slope = slope * t + value
        value = value * t
        value *= p * p
        slope *= 2 * p * p * gamma
    return value, slope


@triton.jit
def shifts_of(spread, gammas, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """1 for each bandwidth of which k − φ(0) is summed, else 0."""
    shifts = ()
    for b in tl.static_range(KERNELS):
        t = gammas[b] * spread
        if FAMILY == LAPLACE or FAMILY == ENERGY:  # noqa: SIM109, Triton has no `in`
            t = tl.sqrt(2.0 * t)
        shifts += (tl.where(t < _SHIFT_BELOW, 1.0, 0.0).to(tl.float64),)
    return shifts


@triton.jit
def scaled_gamma(gamma, furthest, dtype: tl.constexpr, FAMILY: tl.constexpr):
    """The γ that a function of the root is evaluated with; what is left is a factor.

    An energy kernel has the same shape at each, and the one of Laplace is one less a multiple of d at all small ones.
    """
    # The scale of denormal numbers is none of float32.
    furthest = tl.maximum(furthest, 1e-70)
    if FAMILY == ENERGY:
        return 0.25 / furthest
    else:
        least = (_LEAST_DOUBLE if dtype == tl.float64 else _LEAST) / (furthest * (4 * LOG2_E * LOG2_E))
        # A comparison with nan is false: nan stays nan.
        return tl.where(gamma < least, least, gamma)


@triton.jit
def _round_tf32(z):
    # Tensor cores truncate. The sum of bits would carry out of a nan.
    rounded = ((z.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(z * 0.0 == 0.0, rounded, z)


@triton.jit
def _round_bf16(z):
    # To even, as a GPU rounds; the interpreter truncates.
    bits = z.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(z * 0.0 == 0.0, rounded, z)


@triton.jit
def store_parts(scaled, points, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, MODE: tl.constexpr):
    """The operands of one pass; returns the points as its products see them."""
    if MODE == BF16 or MODE == SPLIT:  # noqa: SIM109
        seen = _round_bf16(scaled)
        tl.store(hi16_ptr + offs16, seen.to(tl.bfloat16), mask=mask)
        if MODE == SPLIT:
            lo = _round_bf16(scaled - seen)
            tl.store(lo16_ptr + offs16, lo.to(tl.bfloat16), mask=mask)
            seen += lo
        return seen
    elif MODE == TF32 or MODE == SPLIT_TF32:  # noqa: SIM109
        hi = _round_tf32(scaled)
        tl.store(hi_ptr + offs, hi, mask=mask)
        if MODE == SPLIT_TF32:
            lo = _round_tf32(scaled - hi)
            tl.store(lo_ptr + offs, lo, mask=mask)
            hi += lo
        return hi
    elif MODE == DIFFERENCES:
        # As they came: the differences of rows that were not moved round least.
        tl.store(hi_ptr + offs, points, mask=mask)
        return points
    else:
        tl.store(hi_ptr + offs, scaled, mask=mask)
        return scaled


@triton.jit(do_not_specialize=["n", "m", "first_y", "rows", "x_start", "x_rows", "y_start", "y_rows"])
def operands_kernel(
    x_ptr,
    y_ptr,
    x_weight_ptr,
    y_weight_ptr,
    centre_ptr,
    statistic_ptr,
    numbers,  # of `fastvae.kernel_sums.KernelNumbers`
    near_ptr,  # (B, NEAR_BLOCKS), of `near_pairs_kernel`
    hi_ptr,  # (B, rows, D), operands of the pass that runs; `hi16_ptr` and `lo16_ptr` are the same memory
    lo_ptr,
    hi16_ptr,
    lo16_ptr,
    half_ptr,  # (B, rows), −½‖u‖², in the padding what makes k zero
    weight_ptr,  # (B, rows), 0 in the padding
    plan_ptr,  # (B, PLAN), float64
    table_ptr,  # (B, TABLE): ratios, weights and slopes of each bandwidth, then the parameters of the family, then shifts
    own_ptr,  # (B, programs), float64, Σ of `own_term`
    n,
    m,
    first_y,  # row of the operands at which y starts
    rows,
    x_start,  # the rows that the sweep takes sums of
    x_rows,
    y_start,
    y_rows,
    limit_0,  # steepest γ·‖z−c‖² for the products of the passes
    limit_1,
    cross_x,  # factor of the mean over pairs of x and y that a sweep over x takes
    cross_y,
    padding,
    rounding,
    x_tolerance,  # of the sum of the weights
    y_tolerance,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    NORMAL: tl.constexpr,
    NUMBERS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    FAMILY: tl.constexpr,
    KERNELS: tl.constexpr,  # bandwidths
    BANDWIDTHS: tl.constexpr,  # entries of the table for each
    TABLE: tl.constexpr,
    NEAR_BLOCKS: tl.constexpr,  # of a function of the root, whose differences are taken where many pairs are near
    MODE_0: tl.constexpr,
    MODE_1: tl.constexpr,  # or −1
    OWN: tl.constexpr,
    UNBIASED: tl.constexpr,
    X_WEIGHTED: tl.constexpr,
    Y_WEIGHTED: tl.constexpr,
    PLAN_SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The operands of a block of rows, and from the first block the plan."""
    # where
    problem = tl.program_id(1).to(tl.int64)
    start_n = tl.program_id(0) * BLOCK_N
    dtype: tl.constexpr = half_ptr.dtype.element_ty
    RADIAL: tl.constexpr = FAMILY < POLYNOMIAL
    statistic_ptr += problem * (SAMPLES * CHUNKS * STATISTICS)
    centre_ptr += problem * (SAMPLES * CHUNKS * D)
    n64, m64 = n.to(tl.float64), m.to(tl.float64)

    # the plan
    x_squares, furthest, x_weights2, poison, x_total = _statistics(statistic_ptr, CHUNKS)
    spread = x_squares / n64
    y_weights2, y_total = x_weights2, x_total
    if SAMPLES == 2:
        y_squares, y_furthest, y_weights2, y_poison, y_total = _statistics(statistic_ptr + CHUNKS * STATISTICS, CHUNKS)
        spread += y_squares / m64
        poison += y_poison
        furthest = tl.maximum(furthest, y_furthest)
    elif NORMAL:
        spread += FEATURES
    else:
        spread += spread
    if X_WEIGHTED:
        poison += tl.where(tl.abs(x_total - 1.0) <= x_tolerance, 0.0, float("nan"))
    if Y_WEIGHTED:
        poison += tl.where(tl.abs(y_total - 1.0) <= y_tolerance, 0.0, float("nan"))
    values = load_numbers(numbers, NUMBERS, ON_DEVICE)
    gammas = gammas_of(values, FAMILY, KERNELS, FEATURES)
    gamma = gammas[0]
    route = tl.zeros([], dtype=tl.int32)
    shifts = shifts_of(spread, gammas, FAMILY, KERNELS)
    if RADIAL:
        steepness = gammas[KERNELS - 1] * furthest
        route = (steepness > limit_0).to(tl.int32)
        if MODE_1 >= 0:
            route += (steepness > limit_1).to(tl.int32)
        if NEAR_BLOCKS > 0:
            near = tl.sum(tl.load(near_ptr + problem * NEAR_BLOCKS + tl.arange(0, NEAR_BLOCKS)))
            route = tl.where(near > 1.0, 1, route)
    if FAMILY == LAPLACE or FAMILY == ENERGY:  # noqa: SIM109, Triton has no `in`
        gamma = scaled_gamma(gamma, furthest, dtype, FAMILY)
    gain = gain_of(gamma, values, FAMILY, KERNELS)
    scale = tl.sqrt(gain)

    # load, compute, store
    offs_n = start_n + tl.arange(0, BLOCK_N)
    is_x = start_n < first_y
    weight_sum = x_total
    local = offs_n
    z_ptr, count = x_ptr + problem * n * FEATURES, n
    sample_weight_ptr = x_weight_ptr + problem * n
    swept = (local >= x_start) & (local < x_start + x_rows)
    equal = 1.0 / n64
    if SAMPLES == 2:  # noqa: SIM102
        if start_n >= first_y:
            local = offs_n - first_y
            weight_sum = y_total
            z_ptr, count = y_ptr + problem * m * FEATURES, m
            sample_weight_ptr = y_weight_ptr + problem * m
            swept = (local >= y_start) & (local < y_start + y_rows)
            equal = 1.0 / m64
    mask_n = local < count
    row_mask = offs_n < rows
    own_row = problem * rows + offs_n
    norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    half = tl.zeros([BLOCK_N], dtype=dtype)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (offs_d < FEATURES)[None, :]
        z = tl.load(z_ptr + local.to(tl.int64)[:, None] * FEATURES + offs_d[None, :], mask=mask, other=0.0).to(dtype)
        scaled = (z - tl.load(centre_ptr + offs_d)[None, :]).to(tl.float64) * scale
        scaled = tl.where(mask, scaled, 0.0).to(dtype)
        offs = own_row[:, None] * D + offs_d[None, :]
        # A problem has the same bytes in every pass, as each of a batch takes its own.
        offs16 = offs + problem * rows * D
        inside = row_mask[:, None]
        seen = scaled
        if route == 0:
            seen = store_parts(scaled, z, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, inside, MODE_0)
        if MODE_1 >= 0:
            if route == 1:
                seen = store_parts(scaled, z, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, inside, MODE_1)
            if route == 2:
                seen = store_parts(scaled, z, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, inside, DIFFERENCES)
        elif RADIAL:  # noqa: SIM102
            if route == 1:
                seen = store_parts(scaled, z, hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, inside, DIFFERENCES)
        half -= 0.5 * tl.sum(seen * seen, 1)
        if OWN != NO_OWN_TERM:
            norm2 += tl.sum(z.to(tl.float64) * z.to(tl.float64), 1)
    if RADIAL:
        # Farther than float32, as an argument is, can say.
        half = tl.where(mask_n, half, 1e300 if FAMILY == ENERGY and dtype == tl.float64 else padding)
    else:
        half = tl.zeros([BLOCK_N], dtype=dtype)
    tl.store(half_ptr + own_row, half, mask=row_mask)
    p = tl.where(mask_n, equal, 0.0)
    if X_WEIGHTED or Y_WEIGHTED:
        row_weight = (_weight(sample_weight_ptr, local, mask_n, is_x, X_WEIGHTED, Y_WEIGHTED) / weight_sum).to(dtype)
        tl.store(weight_ptr + own_row, row_weight, mask=row_mask)
        p = row_weight.to(tl.float64)
    if OWN != NO_OWN_TERM:
        value, _ = own_term(norm2, tl.where(swept, p, 0.0), shifts, values, gammas, OWN, FAMILY, KERNELS)
        tl.store(own_ptr + problem * tl.num_programs(0) + tl.program_id(0), tl.sum(value))

    if start_n == 0:
        plan_ptr += problem * PLAN_SIZE
        table_ptr += problem * TABLE
        weights_sum = tl.zeros([], dtype=tl.float64)
        value_shift = tl.zeros([], dtype=tl.float64)
        slope_shift = tl.zeros([], dtype=tl.float64)
        prior = tl.zeros([], dtype=tl.float64)
        energy = tl.zeros([], dtype=tl.float64)
        for b in tl.static_range(KERNELS):
            ratio = gammas[b] / gamma
            if FAMILY == LAPLACE or FAMILY == ENERGY:  # noqa: SIM109
                ratio = tl.sqrt(ratio)
            weight = values[KERNELS + b]
            energy += weight * ratio
            weights_sum += weight
            value_shift += shifts[b] * weight
            if FAMILY == GAUSSIAN:
                slope_shift += shifts[b] * weight * ratio
            if OWN == NORMAL_PRIOR:
                prior += weight * _exp_minus(values[2 * KERNELS + b], shifts[b] > 0)
            if b < BANDWIDTHS:
                # Under one, of `scaled_gamma`, k is one in any case, but that of a padded column is not zero.
                tl.store(table_ptr + b, tl.where(ratio < 1.0, 1.0, ratio).to(dtype))
                tl.store(table_ptr + (BANDWIDTHS + b), weight.to(dtype))
                tl.store(table_ptr + (2 * BANDWIDTHS + b), (weight * ratio).to(dtype))
                tl.store(table_ptr + (TABLE - BANDWIDTHS + b), shifts[b].to(dtype))
        if FAMILY == LAPLACE or FAMILY == ENERGY:  # noqa: SIM109
            tl.store(table_ptr + 3 * BANDWIDTHS, (-rounding * furthest * gain).to(dtype))
        else:
            for k in tl.static_range(TABLE - 4 * BANDWIDTHS):
                tl.store(table_ptr + (3 * BANDWIDTHS + k), values[2 * KERNELS + k].to(dtype))
        left_out = tl.where(slope_shift == 0.0, 0.0, -4.0 * gamma * slope_shift)
        diagonal = weights_sum - value_shift
        unit = weights_sum * 0.0 + 1.0
        constant = value_shift
        if FAMILY == ENERGY:
            unit = energy
            value_shift *= 0.0
            constant = value_shift
            diagonal *= 0.0
        elif not RADIAL:
            value_shift *= 0.0
            constant = values[2 * KERNELS + (FAMILY - POLYNOMIAL)]
            diagonal *= 0.0
        elif KERNELS == 1:
            unit = weights_sum
            value_shift = shifts[0]
            slope_shift = shifts[0]
        if FAMILY != GAUSSIAN:
            slope_shift *= 0.0
        if UNBIASED:
            diagonal *= 0.0
        x_scale = unit * 0.0 + 1.0
        y_scale = x_scale
        x_mean = 1.0 / n64
        y_mean = 1.0 / m64
        if UNBIASED:
            x_scale = 1.0 / (1.0 - (x_weights2 / (x_total * x_total) if (X_WEIGHTED or Y_WEIGHTED) else x_mean))
            y_scale = 1.0 / (1.0 - (y_weights2 / (y_total * y_total) if (X_WEIGHTED or Y_WEIGHTED) else y_mean))
        if X_WEIGHTED or Y_WEIGHTED:
            x_mean = x_scale * 0.0 + 1.0
            y_mean = x_mean
        tl.store(plan_ptr + ROUTE, route.to(tl.float64))
        tl.store(plan_ptr + SCALE, scale)
        tl.store(plan_ptr + VALUE_SHIFT, value_shift)
        tl.store(plan_ptr + SLOPE_SHIFT, slope_shift)
        tl.store(plan_ptr + OWN_VALUE, x_scale * x_mean + poison)
        tl.store(plan_ptr + (OWN_VALUE + 1), y_scale * y_mean + poison)
        tl.store(plan_ptr + OTHER_VALUE, cross_x * y_mean)
        tl.store(plan_ptr + (OTHER_VALUE + 1), cross_y * x_mean)
        tl.store(plan_ptr + OWN_PULL, x_scale * x_mean)
        tl.store(plan_ptr + (OWN_PULL + 1), y_scale * y_mean)
        tl.store(plan_ptr + OTHER_PULL, -y_mean if SAMPLES == 2 else x_scale * x_mean)
        tl.store(plan_ptr + (OTHER_PULL + 1), -x_mean)
        if RADIAL:
            gradient_scale = -4.0 * (gamma / scale) * unit
            if FAMILY == LAPLACE:
                gradient_scale *= LOG2_E
                if KERNELS == 1:
                    gradient_scale *= tl.sqrt(gammas[0] / gamma)
        else:
            gradient_scale = 2.0 * scale
        tl.store(plan_ptr + GRADIENT_SCALE, gradient_scale + poison)
        tl.store(plan_ptr + LEFT_OUT, left_out)
        tl.store(plan_ptr + UNBIASED_SCALE, x_scale)
        tl.store(plan_ptr + (UNBIASED_SCALE + 1), y_scale)
        tl.store(plan_ptr + DIAGONAL, diagonal)
        tl.store(plan_ptr + PRIOR, prior)
        tl.store(plan_ptr + UNIT, unit + poison)
        tl.store(plan_ptr + CONSTANT, constant)
        tl.store(plan_ptr + TOTAL, x_total if (X_WEIGHTED or Y_WEIGHTED) else n64)
        tl.store(plan_ptr + (TOTAL + 1), y_total if (X_WEIGHTED or Y_WEIGHTED) else m64)


@triton.jit
def seen_rows(hi_ptr, lo_ptr, hi16_ptr, lo16_ptr, offs, offs16, mask, dtype: tl.constexpr, MODE: tl.constexpr):
    """Rows as the products of a pass saw them."""
    if MODE == BF16 or MODE == SPLIT:  # noqa: SIM109
        seen = tl.load(hi16_ptr + offs16, mask=mask, other=0.0).to(dtype)
        if MODE == SPLIT:
            seen += tl.load(lo16_ptr + offs16, mask=mask, other=0.0).to(dtype)
        return seen
    else:
        seen = tl.load(hi_ptr + offs, mask=mask, other=0.0)
        if MODE == SPLIT_TF32:
            seen += tl.load(lo_ptr + offs, mask=mask, other=0.0)
        return seen


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How kernels evaluate a sum of kernels: what follows from these, the dtype and the precision alone.

    Attributes:
        family, bandwidths, squarings: constexprs.
        modes: how the products of each pass are taken; a pass runs where its number is the plan's ROUTE.
        limits: the steepest γ·‖z−c‖² for the products of the first passes.
        table: entries of the table of a problem.
        padding: half of a padded column, with which it counts as zero.
        rounding: of ‖u_i − u_j‖² by products, relative to the largest ‖u‖².
    """

    kernel: Kernel
    family: int
    bandwidths: int
    squarings: int
    modes: tuple[int, ...]
    limits: tuple[float, float]
    table: int
    padding: float
    rounding: float

    @property
    def constants(self) -> dict[str, int]:
        return {"FAMILY": self.family, "BANDWIDTHS": self.bandwidths, "SQUARINGS": self.squarings}


@functools.lru_cache(maxsize=256)
def evaluation_of(
    kernel: Kernel, count: int, squarings: tuple[int, ...], dtype: torch.dtype, precision: str, self_pairs: bool = False
) -> Evaluation:
    """Of `count` bandwidths; `self_pairs` says that some pairs may be of a row with itself."""
    double = dtype == torch.float64
    modes = modes_of(kernel, "ieee" if double else precision, self_pairs)
    limits = [*limits_of(kernel, modes, dtype), math.inf]
    # A sum of energy or polynomial kernels is one of them.
    bandwidths = 1 if isinstance(kernel, (Energy, Polynomial)) else count
    return Evaluation(
        kernel=kernel,
        family=family_of(kernel),
        bandwidths=bandwidths,
        squarings=pack_squarings(squarings),
        modes=(*modes, DIFFERENCES.value) if kernel.radial else modes,
        limits=(limits[0], limits[1]),
        table=4 * bandwidths + parameter_count(kernel),
        padding=padding_of(kernel),
        rounding=rounding_of(double),
    )


@dataclass(frozen=True)
class Sample:
    """One sample of one problem or of each of a batch.

    Attributes:
        points: (N, D) or (batch, N, D), contiguous.
        weights: (N,) or (batch, N) in the accumulation dtype, or None for 1/N each.
        tolerance: by how much their sum may differ from one, else the result is nan.
        start, rows: the rows that are swept; all, but for data parallelism.
        gradient: whether their gradient is wanted.
    """

    points: Tensor
    weights: Tensor | None
    tolerance: float
    start: int
    rows: int
    gradient: bool

    @staticmethod
    def of(points: Tensor) -> Sample:
        """All of one problem's, (N, D)."""
        return Sample(points.contiguous(), None, 0.0, 0, points.shape[0], False)

    @property
    def whole(self) -> bool:
        return self.rows == self.points.shape[-2]

    @property
    def problems(self) -> int:
        return 1 if self.points.ndim == 2 else self.points.shape[0]


@dataclass(frozen=True, eq=False)
class Operands:
    """What the kernels of one call read, as `operands_kernel` writes it.

    Attributes:
        key: of `launch`, for what depends on the samples and on the sum of kernels.
        plan_constants: makes the constexprs of a Triton kernel that reads bandwidths, their weights and the plan.
        first_y, rows: the row at which y starts, and all of them, with their padding.
        blocks: programs of a problem that wrote them.
        inputs: both samples, x twice for one, and their weights.
    """

    key: Hashable
    plan_constants: Callable[[], dict[str, Any]]
    first_y: int
    rows: int
    blocks: int
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    numbers: tuple[float, ...] | Tensor
    centre: Tensor
    sums: Tensor
    statistics: Tensor
    hi: Tensor
    lo: Tensor
    hi16: Tensor
    lo16: Tensor
    half: Tensor
    weights: Tensor
    plan: Tensor
    table: Tensor
    own_terms: Tensor

    def parts(self, mode: int) -> tuple[Tensor, Tensor]:
        """Those of a pass, in the dtype of its products."""
        return (self.hi16, self.lo16) if is_narrow(mode) else (self.hi, self.lo)

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hi, self.lo, self.hi16, self.lo16


def prepare(
    samples: Sequence[Sample],
    kernel: KernelNumbers,
    evaluation: Evaluation,
    d: int,
    block: int,
    *,
    sums: bool = False,
    unbiased: bool = False,
    own: int = NO_OWN_TERM.value,
    counts: tuple[float, float] = (0.0, 0.0),
) -> Operands:
    """Statistics and operands of one or two samples, padded to `d` features and whole blocks of `block` rows.

    `sums` asks for the sums of the rows, `own` says which closed form a row adds, `counts` with what factor a sweep over each sample takes
    the mean over the pairs of both.
    """
    two = len(samples) == 2
    x, y, normal = samples[0], samples[-1], own == NORMAL_PRIOR.value
    points = x.points
    batch, (n, dim), m, device = x.problems, points.shape[-2:], y.points.shape[-2], points.device
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    # Rows of a share may start within a block.
    first_y, y_rows = (padded(z.points.shape[-2], block) + (0 if x.whole and y.whole else block) for z in (x, y))
    rows = first_y + (y_rows if two else 0)
    # One number of chunks for all but small samples, as each is compiled for itself.
    chunks = _CHUNKS if max(n, m) > 8 * ROW_BLOCK else 1
    slots, blocks = len(samples) * chunks, -(-rows // ROW_BLOCK)
    empty = functools.partial(torch.empty, device=device)
    # All but the last are multiples of 16 bytes, as a launch takes it for granted.
    sizes = (PLAN * batch, slots * d * batch, slots * STATISTICS.value * batch, blocks * batch if own else 0)
    plan, sums_of_rows, statistics, own_terms = torch.split_with_sizes(empty(sum(sizes), dtype=torch.float64), sizes)
    centre = empty((batch, slots, d), dtype=dtype)
    hi, lo, hi16, lo16 = part_buffers((batch, rows, d), dtype, evaluation.modes, device)
    weighted = any(sample.weights is not None for sample in samples)
    sizes = batch * rows, batch * rows if weighted else 0, batch * evaluation.table
    half, weights, table = torch.split_with_sizes(empty(sum(sizes), dtype=dtype), sizes)
    given = x.weights is not None, two and y.weights is not None
    inputs = (points, y.points, *(half if sample.weights is None else sample.weights for sample in (x, y)))
    on_device = isinstance(kernel.arguments, Tensor)
    key = (
        evaluation, kernel.count, on_device, chunks, two, given, sums, unbiased, own, batch > 1, dim, d, tensor_key(*inputs)
    )  # fmt: skip

    def constants() -> dict[str, Any]:
        return {"SAMPLES": len(samples), "CHUNKS": chunks, "FEATURES": dim, "D": d, "BLOCK_N": ROW_BLOCK, "BLOCK_D": block_of(d)}

    def plan_constants() -> dict[str, Any]:
        modes = (*evaluation.modes, -1)
        return constants() | {
            "NUMBERS": kernel.numbers, "ON_DEVICE": on_device, "FAMILY": evaluation.family, "KERNELS": kernel.count, "OWN": own,
            "PLAN_SIZE": PLAN, "MODE_0": modes[0], "MODE_1": modes[1] if modes[1] != DIFFERENCES.value else -1, "num_warps": 8,
        }  # fmt: skip

    launch(
        statistics_kernel, key, device, (slots, batch, 1), (*inputs, centre, sums_of_rows, statistics, n, m),
        lambda: constants() | {
            "NORMAL": normal, "RADIAL": evaluation.kernel.radial, "SUMS": sums, "X_WEIGHTED": given[0], "Y_WEIGHTED": given[1]
        },
    )  # fmt: skip
    # Products lose the direction of a function of the root between near rows.
    near, near_blocks = plan, 0
    if evaluation.kernel.takes_distance:
        near_blocks = len(samples) * _NEAR_ROWS.value // _NEAR_BLOCK
        near = empty(batch * near_blocks, dtype=torch.float64)
        launch(
            near_pairs_kernel, key, device, (near_blocks, batch, 1), (points, y.points, statistics, near, n, m),
            lambda: {
                "SAMPLES": len(samples), "CHUNKS": chunks, "NEAR": near_of(dtype == torch.float64), "FEATURES": dim,
                "BLOCK_N": _NEAR_BLOCK,
            },
        )  # fmt: skip
    y_share = (y.start, y.rows) if two else (0, 0)
    launch(
        operands_kernel, key, device, (blocks, batch, 1),
        (
            *inputs, centre, statistics, kernel.arguments, near, hi, lo, hi16, lo16, half, weights, plan, table, own_terms,
            n, m, first_y, rows, x.start, x.rows, *y_share, *evaluation.limits, *counts, evaluation.padding, evaluation.rounding,
            x.tolerance, y.tolerance,
        ),
        lambda: plan_constants() | {
            "NORMAL": normal, "BANDWIDTHS": evaluation.bandwidths, "TABLE": evaluation.table, "NEAR_BLOCKS": near_blocks,
            "UNBIASED": unbiased, "X_WEIGHTED": given[0], "Y_WEIGHTED": given[1],
        },
    )  # fmt: skip
    return Operands(
        key, plan_constants, first_y, rows, blocks, inputs, kernel.arguments, centre, sums_of_rows, statistics,
        hi, lo, hi16, lo16, half, weights, plan, table, own_terms,
    )  # fmt: skip


def part_buffers(
    shape: tuple[int, ...], dtype: torch.dtype, modes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hi and lo for `dot` in any of these modes, one buffer for both where none of them splits, and the same memory as bfloat16."""
    hi = torch.empty(shape, dtype=dtype, device=device)
    lo = torch.empty_like(hi) if SPLIT.value in modes or SPLIT_TF32.value in modes else hi
    return (hi, lo, hi, lo) if dtype == torch.float64 else (hi, lo, hi.view(torch.bfloat16), lo.view(torch.bfloat16))


def is_narrow(mode: int) -> bool:
    """Whether the products of this mode are of bfloat16."""
    return mode in (BF16.value, SPLIT.value)


def padded(rows: int, block: int) -> int:
    return rows + -rows % block


def block_of(size: int) -> int:
    """A power of two that divides `size`, at most 32."""
    return min(size & -size, 32)


# Programs that take the statistics of a sample.
_CHUNKS = 64

# Rows of a step of the statistics, and of a program of the kernels around a sweep; every block of a sweep holds whole ones.
ROW_BLOCK = 64
