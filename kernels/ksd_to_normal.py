"""The kernel Stein discrepancy to N(0, I), its gradient and Hessian on a GPU: formulas of `fastvae.reference.ksd_to_normal`.

As in `fastvae.kernels.mmd` there are three steps: prepare (`fastvae.kernels.prepare`), sweep a block of rows over all columns, finish. With
W = φ − c the gradient of row i is Σ_j W_ij·(x_j − x_i) + x_i·Σ_j φ_ij, so that one product of a tile with the columns is enough. x·y is
½‖x‖² + ½‖y‖² − ½d², of rows that are neither moved nor scaled.

With A = φ − P and B = φ'·dt − Q of formula (5), row i of the Hessian times a direction a is twice
Σ_j [A_ij·(a_j − a_i) + B_ij·(x_j − x_i)] + a_i·Σ_j φ_ij + x_i·Σ_j φ'_ij·dt_ij.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.config import HessianConfig, SweepConfig, column_splits, device_limits, padded_dim, stein_config, stein_hessian_config
from fastvae.kernels.families import (
    GAUSSIAN,
    RATIONAL_QUADRATIC_HALF,
    RATIONAL_QUADRATIC_LARGE,
    RATIONAL_QUADRATIC_ONE,
    Family,
    phi,
    squared_scale,
)
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.mmd import load_rounded
from fastvae.kernels.plan import PLAN, PRECISION_PASS, SCALE, VALUE_SCALE, DeviceKernelPlan, device_kernel_plan
from fastvae.kernels.prepare import ROW_BLOCK, Operands, Sample, as_product, from_row, load_rows, padded, prepare, store_rows
from fastvae.kernels.products import (
    BF16,
    BF16X3,
    DIFFERENCES,
    column_parts,
    dot,
    load_block,
    load_parts,
    operand_buffers,
    product_name,
    row_sums,
    split_operand,
    tile_exponent,
)
from fastvae.kernels.reductions import add_shares, share_of
from fastvae.kernels.sums import gammas_of, load_numbers, load_parameters

# Coefficients of a bandwidth. Of a pair with exponent e (`fastvae.kernels.products`), t' = ratio·e, q = 1/(1 − t') and p = t'·q:
# u = φ·(½‖x‖² + ½‖y‖² + constant + linear·e + p·(first + second·p)), W = φ + slope_scale·q·(u + φ·q·(slope + slope_of_q·q));
# of a Gaussian u = φ·(½‖x‖² + ½‖y‖² + constant + linear·e), W = slope_scale·u + slope·φ.
# `linear` has two parts, as its rounding would be a bias in x·y, which the mean over the pairs does not average out.
RATIO, WEIGHT, CONSTANT, LINEAR, LINEAR_REST = (tl.constexpr(n) for n in range(5))
FIRST, SECOND, SLOPE, SLOPE_OF_Q, SLOPE_SCALE = (tl.constexpr(n) for n in range(5, 10))
COEFFICIENTS = tl.constexpr(10)


# Tuples hold pointers in a kernel and tensors on the host. B is the number of problems.


class Stein(NamedTuple):
    """What `stein_kernel` writes."""

    half_ptr: Any  # (B, rows), ½‖x‖² of the rows of `Operands`
    coefficient_ptr: Any  # (bandwidths, COEFFICIENTS)


class PartSums(NamedTuple):
    """What a sweep writes, (parts, B, rows) each: sums over a share of the columns."""

    value_ptr: Any  # Σ_j u_ij
    phi_ptr: Any  # Σ_j φ_ij
    slope_ptr: Any  # Σ_j W_ij
    moments_ptr: Any  # (parts, B, rows, D), Σ_j W_ij·u_j of the scaled rows u, by differences of u_j − u_i
    parts: Any
    rows: Any


class SteinSpec(NamedTuple):
    """The constexprs of a sweep."""

    PASS: int  # runs if it is the plan's
    BATCHED: bool  # several problems
    GRADIENT: bool
    PRODUCT: int
    D: int
    FAMILY: Family
    BANDWIDTHS: int
    BLOCK_N: int
    BLOCK_M: int
    BLOCK_K: int  # features of a step of the exponent's product
    BLOCK_D: int  # features of a block of moments


class _Sums(NamedTuple):
    """What a program accumulates over tiles; all but the moments over columns 8 apart, see `row_sums`."""

    value: Any
    phi: Any
    slope: Any
    moments: Any


@triton.jit(do_not_specialize=["n", "rows"])
def stein_kernel(
    z_ptr,  # (B, n, FEATURES)
    numbers,  # of `fastvae.kernel_sums.KernelNumbers`
    stein: Stein,
    n,
    rows,
    SPEC: tl.constexpr,
    SUM: tl.constexpr,
):
    """½‖x‖² of a block of rows, 0 in the padding, and from the first program the coefficients of all bandwidths."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    problem = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = stein.half_ptr.dtype.element_ty

    # load, compute, store
    norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    for start_d in range(0, SPEC.D, BLOCK_D):
        z, _ = load_rows(z_ptr + problem * n * SPEC.FEATURES, offs_n, offs_n < n, start_d + tl.arange(0, BLOCK_D), SPEC.FEATURES)
        z = z.to(tl.float64)
        norm2 += tl.sum(z * z, 1)
    tl.store(stein.half_ptr + problem * rows + offs_n, (0.5 * norm2).to(dtype), mask=offs_n < rows)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
        gammas = gammas_of(values, FAMILY, KERNELS, SPEC.FEATURES)
        linear = 1.0 / squared_scale(gammas[0], values, FAMILY, KERNELS)
        for b in tl.static_range(KERNELS):
            out_ptr = stein.coefficient_ptr + b * COEFFICIENTS
            _store_coefficients(out_ptr, values, gammas[b], gammas[b] / gammas[0], values[KERNELS + b], linear, SPEC, SUM)


@triton.jit
def _store_coefficients(out_ptr, values, gamma, ratio, weight, linear, SPEC: tl.constexpr, SUM: tl.constexpr):
    FAMILY: tl.constexpr = SUM.FAMILY
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    constant = 2.0 * SPEC.FEATURES * gamma
    scale = 2.0 * gamma
    if FAMILY.number == GAUSSIAN:
        linear += ratio * (2.0 + 4.0 * gamma) / FAMILY.scale
        first = gamma * 0.0
        second = first
        slope = 1.0 + 4.0 * gamma + 8.0 * gamma * gamma
        slope_of_q = first
    else:
        alpha = values[2 * SUM.KERNELS]
        second = 4.0 * gamma * (alpha + 1.0)
        first = 2.0 * alpha + constant + second
        slope = (2.0 * alpha + constant - second) / alpha
        slope_of_q = 2.0 * second / alpha
    rounded = linear.to(dtype)
    tl.store(out_ptr + RATIO, ratio.to(dtype))
    tl.store(out_ptr + WEIGHT, weight.to(dtype))
    tl.store(out_ptr + CONSTANT, constant.to(dtype))
    tl.store(out_ptr + LINEAR, rounded)
    tl.store(out_ptr + LINEAR_REST, (linear - rounded.to(tl.float64)).to(dtype))
    tl.store(out_ptr + FIRST, first.to(dtype))
    tl.store(out_ptr + SECOND, second.to(dtype))
    tl.store(out_ptr + SLOPE, slope.to(dtype))
    tl.store(out_ptr + SLOPE_OF_Q, slope_of_q.to(dtype))
    tl.store(out_ptr + SLOPE_SCALE, scale.to(dtype))


@triton.jit
def _evaluate(exponent, row_half, column_half, coefficient_ptr, parameters, SPEC: tl.constexpr):
    """u, φ and W of a tile, for one bandwidth."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    column_half = column_half + tl.load(coefficient_ptr + CONSTANT)
    value = exponent * tl.load(coefficient_ptr + LINEAR_REST) + column_half[None, :]
    value = exponent * tl.load(coefficient_ptr + LINEAR) + (value + row_half[:, None])
    t = exponent
    if SPEC.BANDWIDTHS > 1:
        t = exponent * tl.load(coefficient_ptr + RATIO)
    if FAMILY.number == GAUSSIAN:
        power = tl.exp2(t)
        value = value * power
        slope = value * tl.load(coefficient_ptr + SLOPE_SCALE) + power * tl.load(coefficient_ptr + SLOPE)
    else:
        root = tl.rsqrt(1.0 - t)
        q = root * root
        p = t * q
        value += p * (tl.load(coefficient_ptr + FIRST) + p * tl.load(coefficient_ptr + SECOND))
        power = q
        if FAMILY.number == RATIONAL_QUADRATIC_HALF:
            power = root
        elif FAMILY.number != RATIONAL_QUADRATIC_ONE:
            power, _ = phi(t, parameters, FAMILY, False)
        value = value * power
        slope = value + power * q * (tl.load(coefficient_ptr + SLOPE) + q * tl.load(coefficient_ptr + SLOPE_OF_Q))
        slope = power + tl.load(coefficient_ptr + SLOPE_SCALE) * q * slope
    return value, power, slope


@triton.jit
def _counted(tile, offs_n, offs_m, n, MASKED: tl.constexpr):
    """A tile without its pairs of a row with itself, and without padded columns."""
    if MASKED:
        tile = tl.where((offs_n[:, None] != offs_m[None, :]) & (offs_m < n)[None, :], tile, 0.0)
    return tile


@triton.jit
def _add_tile(
    sums, rows, row_half, row_out, operands, stein, parameters, scale, start_m, n, d_out,
    MASKED: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The sums with those of one tile added. Differences take `row_out`, the features of the rows in the block of moments."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    D: tl.constexpr = SPEC.D
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_K: tl.constexpr = SPEC.BLOCK_K
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = rows.offs_n
    exponent, col_hi, col_lo = tile_exponent(rows, operands, start_m, scale, FAMILY, PRODUCT, D, BLOCK_M, BLOCK_K)
    column_half = tl.load(stein.half_ptr + offs_m)
    value_acc, phi_acc, slope_acc, moments = sums.value, sums.phi, sums.slope, sums.moments
    slope = exponent
    for b in tl.static_range(BANDWIDTHS):
        coefficient_ptr = stein.coefficient_ptr + b * COEFFICIENTS
        value, power, one_slope = _evaluate(exponent, row_half, column_half, coefficient_ptr, parameters, SPEC)
        value = row_sums(_counted(value, offs_n, offs_m, n, MASKED))
        power = row_sums(_counted(power, offs_n, offs_m, n, MASKED))
        if BANDWIDTHS > 1:
            weight = tl.load(coefficient_ptr + WEIGHT)
            value, power, one_slope = value * weight, power * weight, one_slope * weight
        value_acc += value
        if SPEC.GRADIENT:
            phi_acc += power
            slope = one_slope if b == 0 else slope + one_slope
    if SPEC.GRADIENT:
        slope = _counted(slope, offs_n, offs_m, n, MASKED)
        if PRODUCT == DIFFERENCES:
            offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
            col = tl.load(operands.hi_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :])
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - row_out[:, None, :]) * scale), 1)
        else:
            slope_acc += row_sums(slope)
            col_hi, col_lo = column_parts(col_hi, col_lo, operands, start_m, d_out, PRODUCT, D, BLOCK_M, BLOCK_K, BLOCK_D)
            slope_hi, slope_lo = split_operand(slope, PRODUCT)
            # A tensor core's accumulator truncates: each tile starts from zero, and its sum is added in the accumulation dtype.
            moments += dot(slope_hi, slope_lo, col_hi, col_lo, tl.zeros_like(moments), PRODUCT)
    return _Sums(value_acc, phi_acc, slope_acc, moments)


@triton.jit(do_not_specialize=["n"])
def ksd_kernel(operands, tables, stein: Stein, part_sums: PartSums, swept, n, SPEC: tl.constexpr):
    """Sums of a block of rows over a share of the columns.

    Program 0 is the block of rows, program 1 the block of moments and the problem of a batch, program 2 the share.
    """
    # where
    D: tl.constexpr = SPEC.D
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    FAMILY: tl.constexpr = SPEC.FAMILY
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    d_blocks: tl.constexpr = D // BLOCK_D if SPEC.GRADIENT else 1
    d_out = tl.program_id(1) % d_blocks
    share = tl.program_id(2)
    out = tl.cast(share, tl.int64)
    plan_ptr = tables.plan_ptr
    half_ptr = stein.half_ptr
    operands = as_product(operands, PRODUCT)
    if SPEC.BATCHED:
        problem = (tl.program_id(1) // d_blocks).to(tl.int64)
        # A problem has the same bytes in every pass.
        elements: tl.constexpr = 2 if PRODUCT == BF16 or PRODUCT == BF16X3 else 1  # noqa: SIM109
        operands = from_row(operands, problem * operands.rows, elements * D)
        plan_ptr += problem * PLAN
        half_ptr += problem * operands.rows
        out = out * (tl.num_programs(1) // d_blocks) + problem
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PASS:
        return
    stein = Stein(half_ptr, stein.coefficient_ptr)
    dtype: tl.constexpr = operands.neg_half_norm2_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_N
    start_n = swept.x_start + row
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)

    # load
    rows = load_block(operands, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    row_half = tl.load(half_ptr + rows.offs_n)
    row_out = rows.neg_half_norm2
    if PRODUCT == DIFFERENCES and SPEC.GRADIENT:
        row_out = tl.load(operands.hi_ptr + tl.cast(start_n, tl.int64) * D + (local_n + offs_d[None, :]))
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    parameters = load_parameters(tables.table_ptr, FAMILY, SPEC.BANDWIDTHS, PRODUCT)

    # compute: tiles of true columns without a pair of a row with itself, then, masked, the others. The last one has padding, unless the
    # columns fill it.
    whole = n // BLOCK_M * BLOCK_M
    band = tl.minimum(start_n // BLOCK_M * BLOCK_M, whole)
    band_end = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, whole)
    first, last = share_of(band + (whole - band_end), share, tl.num_programs(2), BLOCK_M)
    zeros = tl.zeros([BLOCK_N, 8], dtype=dtype)
    sums = _Sums(zeros, zeros, zeros, tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype))
    for offset in range(first, last, BLOCK_M):
        start_m = tl.multiple_of(tl.where(offset >= band, band_end + (offset - band), offset), BLOCK_M)
        sums = _add_tile(sums, rows, row_half, row_out, operands, stein, parameters, scale, start_m, n, d_out, False, SPEC)
    if share == 0:
        masked = band_end - band + tl.cdiv(n - whole, BLOCK_M) * BLOCK_M
        for offset in tl.range(0, masked, BLOCK_M, num_stages=1):
            start_m = tl.multiple_of(tl.where(band + offset < band_end, band + offset, whole), BLOCK_M)
            sums = _add_tile(sums, rows, row_half, row_out, operands, stein, parameters, scale, start_m, n, d_out, True, SPEC)

    # store
    out = out * part_sums.rows + row
    if d_out == 0:
        tl.store(part_sums.value_ptr + out + tl.arange(0, BLOCK_N), tl.sum(sums.value, 1))
        if SPEC.GRADIENT:
            tl.store(part_sums.phi_ptr + out + tl.arange(0, BLOCK_N), tl.sum(sums.phi, 1))
            tl.store(part_sums.slope_ptr + out + tl.arange(0, BLOCK_N), tl.sum(sums.slope, 1))
    if SPEC.GRADIENT:
        tl.store(part_sums.moments_ptr + out * D + (local_n + offs_d[None, :]), sums.moments)


@triton.jit(do_not_specialize=["n"])
def ksd_finish_kernel(
    z_ptr,  # (B, n, FEATURES)
    numbers,
    operands,
    tables,
    stein: Stein,
    part_sums: PartSums,
    swept,
    value_ptr,  # (B,)
    gradient_ptr,  # (B, swept rows, FEATURES)
    n,
    UNBIASED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPEC: tl.constexpr,
    SUM: tl.constexpr,
):
    """KSD² of a problem by program 0, in float64 and a fixed order; by each other the gradient of a block of rows."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    problem = tl.program_id(1).to(tl.int64)
    batches = tl.cast(tl.num_programs(1), tl.int64)
    dtype: tl.constexpr = value_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
    values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
    gammas = gammas_of(values, FAMILY, KERNELS, SPEC.FEATURES)
    # With one bandwidth the sums lack its weight.
    weight = values[KERNELS] if KERNELS == 1 else values[KERNELS] * 0.0 + 1.0
    weights = values[KERNELS] * 0.0
    slopes = weights
    for b in tl.static_range(KERNELS):
        weights += values[KERNELS + b]
        slopes += values[KERNELS + b] * gammas[b]
    if UNBIASED:
        weights = weights * 0.0
        slopes = slopes * 0.0
    pairs = n.to(tl.float64) * (n.to(tl.float64) - (1.0 if UNBIASED else 0.0))
    # nan if a number of the problem is not finite
    factor = 1.0 / pairs + tl.load(plan_ptr + VALUE_SCALE) * 0.0
    stride = batches * part_sums.rows
    first = problem * part_sums.rows

    # load, compute, store
    if tl.program_id(0) == 0:
        half_ptr = stein.half_ptr + problem * operands.rows + swept.x_start
        total = tl.zeros([BLOCK_R], dtype=tl.float64)
        for start in range(0, swept.x_rows, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            mask = row < swept.x_rows
            sums = add_shares(tl.zeros([BLOCK_R], tl.float64), part_sums.value_ptr + first + row, stride, part_sums.parts, mask)
            own = 2.0 * weights * tl.load(half_ptr + row, mask=mask, other=0.0).to(tl.float64) + 2.0 * SPEC.FEATURES * slopes
            total += tl.where(mask, weight * sums + own, 0.0)
        tl.store(value_ptr + problem, (factor * tl.sum(total)).to(dtype))
        return
    start_n = (tl.program_id(0) - 1) * BLOCK_N
    row = start_n + tl.arange(0, BLOCK_N)
    mask_n = row < swept.x_rows
    source = swept.x_start + row
    operands = from_row(operands, problem * operands.rows, SPEC.D)
    z_ptr += problem * n * SPEC.FEATURES
    gradient_ptr += problem * swept.x_rows * SPEC.FEATURES
    zeros = tl.zeros([BLOCK_N], dtype=dtype)
    phi_sum = add_shares(zeros, part_sums.phi_ptr + first + row, stride, part_sums.parts, mask_n)
    slope = add_shares(zeros, part_sums.slope_ptr + first + row, stride, part_sums.parts, mask_n)
    # In float64, as the scale of the rows may be small.
    of_moments = (2.0 * weight * factor / tl.load(plan_ptr + SCALE)).to(dtype)
    of_row = (2.0 * factor * (weight * phi_sum.to(tl.float64) + weights)).to(dtype)
    for start_d in range(0, SPEC.D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        z, mask = load_rows(z_ptr, source, mask_n, offs_d, SPEC.FEATURES)
        moments_ptrs = part_sums.moments_ptr + (first + row)[:, None] * SPEC.D + offs_d[None, :]
        moments = add_shares(tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype), moments_ptrs, stride * SPEC.D, part_sums.parts, mask)
        rounded = load_rounded(operands, plan_ptr, source, offs_d, mask, dtype, SPEC, SUM)
        gradient = of_moments * (moments - slope[:, None] * rounded) + of_row[:, None] * z.to(dtype)
        tl.store(gradient_ptr + row.to(tl.int64)[:, None] * SPEC.FEATURES + offs_d[None, :], gradient, mask=mask)


def is_power(family: Family) -> bool:
    """Whether φ takes a logarithm and an exponential."""
    return family.number not in (GAUSSIAN.value, RATIONAL_QUADRATIC_HALF.value, RATIONAL_QUADRATIC_ONE.value)


def spec_of(
    config: SweepConfig, number: int, batched: bool, gradient: bool, product: int, d: int, family: Family, bandwidths: int
) -> SteinSpec:
    blocks = config.block_n, config.block_m, config.block_k, config.block_d
    return SteinSpec(number, batched, gradient, product, d, family, bandwidths, *blocks)


@functools.lru_cache(maxsize=256)
def _configs(plan: DeviceKernelPlan, dim: int, dtype: torch.dtype, gradient: bool, device: torch.device) -> tuple[SweepConfig, ...]:
    """The configs of each pass."""
    architecture = device_limits(device).architecture
    names = [product_name(product, dtype) for product in plan.precision_passes]
    return tuple(stein_config(dim, name, gradient, plan.bandwidths, architecture, is_power(plan.family)) for name in names)


def ksd_to_normal(
    z: Tensor, start: int, rows: int, gradient: bool, kernel: KernelNumbers, unbiased: bool, precision: str
) -> tuple[Tensor, Tensor | None]:
    """The share of `rows` rows from `start` on in KSD² () or (batch,) of z (N, D) or (batch, N, D), and the gradient to them."""
    z = z.contiguous()
    sample = Sample(z, None, 0.0, start, rows, gradient)
    (n, dim), batch, device = z.shape[-2:], sample.problems, z.device
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, dtype, precision)
    configs = _configs(plan, dim, dtype, gradient, device)
    d = max(padded_dim(dim, config) for config in configs)
    block = max(ROW_BLOCK, *(config.block_n for config in configs))
    prepared = prepare([sample], kernel, plan, d, block, unbiased=unbiased)
    operands, tables, swept = prepared.operands, prepared.tables, prepared.swept
    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    stein = Stein(empty((batch, operands.rows)), empty((plan.bandwidths, COEFFICIENTS.value)))
    launch(
        stein_kernel, prepared.key, device, (-(-operands.rows // ROW_BLOCK), batch, 1),
        (z, kernel.arguments, stein, n, operands.rows), prepared.specs,
    )  # fmt: skip

    swept_rows, config = padded(rows, block), configs[0]
    d_blocks = d // config.block_d if gradient else 1
    parts = column_splits(batch * d_blocks * (swept_rows // config.block_n), -(-n // config.block_m), device_limits(device).multiprocessors)
    value_sums = empty(parts * batch * swept_rows)
    phi_sums = slopes = moments = value_sums
    if gradient:
        phi_sums, slopes = empty(parts * batch * swept_rows), empty(parts * batch * swept_rows)
        moments = empty(parts * batch * swept_rows * d)
    part_sums = PartSums(value_sums, phi_sums, slopes, moments, parts, swept_rows)
    key = prepared.key, gradient
    for number, config in enumerate(configs):
        d_blocks = d // config.block_d if gradient else 1
        launch(
            ksd_kernel, (key, number), device, (swept_rows // config.block_n, batch * d_blocks, parts),
            (operands, tables, stein, part_sums, swept, n),
            lambda number=number, config=config: {
                "SPEC": spec_of(
                    config, number, batch > 1, gradient, plan.precision_passes[number], d, plan.family, plan.bandwidths
                ),
            } | config.launch("BLOCK_N", "BLOCK_M", "BLOCK_K", "BLOCK_D"),
        )  # fmt: skip
    value = empty(z.shape[:-2])
    grad = empty((*z.shape[:-2], rows, dim)) if gradient else None
    launch(
        ksd_finish_kernel, key, device, (1 + (swept_rows // ROW_BLOCK if gradient else 0), batch, 1),
        (z, kernel.arguments, operands, tables, stein, part_sums, swept, value, value if grad is None else grad, n),
        lambda: prepared.specs() | {"UNBIASED": unbiased, "BLOCK_R": 1024},
    )  # fmt: skip
    return value, grad


# Coefficients of a bandwidth in formula (5). With G = q and v = G, or p for a large α,
# V = −u'/(φ·G) = ½‖x‖² + ½‖y‖² + constant + linear·e + v·(first + second·v), T = u''/(φ·G²)/steep = V + G·(more_first + more_second·G);
# of a Gaussian G = 1, V = ½‖x‖² + ½‖y‖² + constant + linear·e and T = V + more_first. SLOPE is 2γ·steep.
H_RATIO, H_WEIGHT, H_CONSTANT, H_LINEAR, H_FIRST = (tl.constexpr(n) for n in range(5))
H_SECOND, H_MORE_FIRST, H_MORE_SECOND, H_TWICE_GAMMA, H_SLOPE = (tl.constexpr(n) for n in range(5, 10))
H_COEFFICIENTS = tl.constexpr(10)


class Curvature(NamedTuple):
    """What `direction_kernel` writes beside the directions a as products take them, over the scale of the rows.

    Their −½‖u‖² is −u·a in its place.
    """

    half_ptr: Any  # (B, rows), ½‖x‖² of the rows of `Operands`
    dot_ptr: Any  # (B, rows), x·a
    coefficient_ptr: Any  # (bandwidths, H_COEFFICIENTS)


class HessianSums(NamedTuple):
    """What a sweep writes, (parts, B, rows) each: sums over a share of the columns."""

    phi_ptr: Any  # Σ_j φ_ij
    cross_ptr: Any  # Σ_j φ'·dt/2γ
    of_direction_ptr: Any  # Σ_j (φ − P)
    of_rows_ptr: Any  # Σ_j (φ'·dt − Q)/2γ
    direction_moments_ptr: Any  # (parts, B, rows, D), Σ_j (φ − P)·a_j of the scaled directions, by differences of a_j − a_i
    row_moments_ptr: Any  # (parts, B, rows, D), Σ_j (φ'·dt − Q)/2γ·u_j, by differences of u_j − u_i
    parts: Any
    rows: Any


class Pairs(NamedTuple):
    """The pairs of a tile."""

    exponent: Any
    neg_s: Any  # −(x − y)·(a_x − a_y)
    row_half: Any  # ½‖x‖²
    column_half: Any
    row_dot: Any  # x·a_x
    column_dot: Any
    offs_n: Any
    offs_m: Any
    n: Any  # columns


class DirectedRows(NamedTuple):
    """The rows of a program and their directions."""

    rows: Any  # `fastvae.kernels.products.BlockOfRows`
    directions: Any
    half: Any  # ½‖x‖²
    dot: Any  # x·a
    row_out: Any  # by differences, the features in the block of moments
    direction_out: Any


class _Curved(NamedTuple):
    """What a program accumulates over tiles, as `_Sums`."""

    phi: Any
    cross: Any
    of_direction: Any
    of_rows: Any
    direction_moments: Any
    row_moments: Any


@triton.jit(do_not_specialize=["n", "rows"])
def direction_kernel(
    z_ptr,  # (B, n, FEATURES)
    direction_ptr,  # likewise
    numbers,
    operands,
    directions,
    tables,
    curvature: Curvature,
    n,
    rows,
    SPEC: tl.constexpr,
    SUM: tl.constexpr,
):
    """Directions of a block of rows as operands, `Curvature`, and from the first program the coefficients of all bandwidths."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    problem = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < rows
    dtype: tl.constexpr = curvature.half_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
    precision_pass = tl.load(plan_ptr + PRECISION_PASS).to(tl.int32)
    inverse_scale = 1.0 / tl.load(plan_ptr + SCALE)
    operands = from_row(operands, problem * rows, SPEC.D)
    directions = from_row(directions, problem * rows, SPEC.D)
    z_ptr += problem * n * SPEC.FEATURES
    direction_ptr += problem * n * SPEC.FEATURES

    # load, compute, store
    norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    dot = tl.zeros([BLOCK_N], dtype=tl.float64)
    neg_moved = tl.zeros([BLOCK_N], dtype=dtype)
    for start_d in range(0, SPEC.D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        z, mask = load_rows(z_ptr, offs_n, offs_n < n, offs_d, SPEC.FEATURES)
        a, _ = load_rows(direction_ptr, offs_n, offs_n < n, offs_d, SPEC.FEATURES)
        z, a = z.to(tl.float64), a.to(tl.float64)
        norm2 += tl.sum(z * z, 1)
        dot += tl.sum(z * a, 1)
        offs = offs_n.to(tl.int64)[:, None] * SPEC.D + offs_d[None, :]
        moved = load_rounded(operands, plan_ptr, offs_n, offs_d, mask, dtype, SPEC, SUM)
        rounded = store_rows((a * inverse_scale).to(dtype), a.to(dtype), directions, offs, row_mask[:, None], precision_pass, SUM)
        neg_moved -= tl.sum(moved * rounded, 1)
    tl.store(directions.neg_half_norm2_ptr + offs_n, neg_moved, mask=row_mask)
    tl.store(curvature.half_ptr + problem * rows + offs_n, (0.5 * norm2).to(dtype), mask=row_mask)
    tl.store(curvature.dot_ptr + problem * rows + offs_n, dot.to(dtype), mask=row_mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
        gammas = gammas_of(values, FAMILY, KERNELS, SPEC.FEATURES)
        linear = 1.0 / squared_scale(gammas[0], values, FAMILY, KERNELS)
        for b in tl.static_range(KERNELS):
            out_ptr = curvature.coefficient_ptr + b * H_COEFFICIENTS
            _store_curvature(out_ptr, values, gammas[b], gammas[b] / gammas[0], values[KERNELS + b], linear, SPEC, SUM)


@triton.jit
def _store_curvature(out_ptr, values, gamma, ratio, weight, linear, SPEC: tl.constexpr, SUM: tl.constexpr):
    FAMILY: tl.constexpr = SUM.FAMILY
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    twice = 2.0 * gamma
    zero = gamma * 0.0
    if FAMILY.number == GAUSSIAN:
        more_first = 2.0 + 4.0 * gamma
        linear += ratio * more_first / FAMILY.scale
        constant = twice * SPEC.FEATURES + more_first
        first = zero
        second = zero
        more_second = zero
        steep = zero + 1.0
    else:
        alpha = values[2 * SUM.KERNELS]
        steep = 1.0 + 1.0 / alpha
        curved = 4.0 * gamma * (alpha + 1.0)
        first = (2.0 * alpha + twice * SPEC.FEATURES - curved) * steep
        second = curved * (1.0 + 2.0 / alpha)
        constant = -2.0 * alpha
        more_first = first / (alpha + 1.0)
        more_second = 2.0 * second / (alpha + 1.0)
        if FAMILY.number == RATIONAL_QUADRATIC_LARGE:
            constant = 2.0 + twice * SPEC.FEATURES * steep + curved / alpha
            first += 2.0 * second
    tl.store(out_ptr + H_RATIO, ratio.to(dtype))
    tl.store(out_ptr + H_WEIGHT, weight.to(dtype))
    tl.store(out_ptr + H_CONSTANT, constant.to(dtype))
    tl.store(out_ptr + H_LINEAR, linear.to(dtype))
    tl.store(out_ptr + H_FIRST, first.to(dtype))
    tl.store(out_ptr + H_SECOND, second.to(dtype))
    tl.store(out_ptr + H_MORE_FIRST, more_first.to(dtype))
    tl.store(out_ptr + H_MORE_SECOND, more_second.to(dtype))
    tl.store(out_ptr + H_TWICE_GAMMA, twice.to(dtype))
    tl.store(out_ptr + H_SLOPE, (twice * steep).to(dtype))


@triton.jit
def _evaluate_curvature(pairs: Pairs, coefficient_ptr, parameters, SPEC: tl.constexpr):
    """φ, φ'·dt/2γ, φ − P and (φ'·dt − Q)/2γ of a tile, for one bandwidth."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    exponent, neg_s, row_half, column_half = pairs.exponent, pairs.neg_s, pairs.row_half, pairs.column_half
    value = exponent * tl.load(coefficient_ptr + H_LINEAR) + (column_half + tl.load(coefficient_ptr + H_CONSTANT))[None, :]
    value += row_half[:, None]
    t = exponent
    if SPEC.BANDWIDTHS > 1:
        t = exponent * tl.load(coefficient_ptr + H_RATIO)
    # (x·a_y + a_x·y) − s
    of_rows = 2.0 * neg_s + (pairs.row_dot[:, None] + pairs.column_dot[None, :])
    if FAMILY.number == GAUSSIAN:
        power = tl.exp2(t)
        cross = neg_s * power
        # After φ, which may be zero where V is very large.
        value = value * power
        of_rows = of_rows * power
        curved = neg_s * (value + power * tl.load(coefficient_ptr + H_MORE_FIRST))
    else:
        root = tl.rsqrt(1.0 - t)
        q = root * root
        if FAMILY.number == RATIONAL_QUADRATIC_LARGE:
            p = t * q
            value += p * (tl.load(coefficient_ptr + H_FIRST) + p * tl.load(coefficient_ptr + H_SECOND))
        else:
            value += q * (tl.load(coefficient_ptr + H_FIRST) + q * tl.load(coefficient_ptr + H_SECOND))
        power = q
        if FAMILY.number == RATIONAL_QUADRATIC_HALF:
            power = root
        elif FAMILY.number != RATIONAL_QUADRATIC_ONE:
            power, _ = phi(t, parameters, FAMILY, False)
        minus_dphi = power * q
        cross = neg_s * minus_dphi
        curved = cross * (q * (value + q * (tl.load(coefficient_ptr + H_MORE_FIRST) + q * tl.load(coefficient_ptr + H_MORE_SECOND))))
        value = value * minus_dphi
        of_rows = of_rows * minus_dphi
    of_rows += curved * tl.load(coefficient_ptr + H_SLOPE)
    of_direction = power + value * tl.load(coefficient_ptr + H_TWICE_GAMMA)
    return power, cross, of_direction, of_rows


@triton.jit
def _neg_s(
    rows, row_directions, col_hi, col_lo, operands, directions, start_m,
    PRODUCT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """−(x − y)·(a_x − a_y) of a tile, and the last features that it loaded of the directions of the columns."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if PRODUCT == DIFFERENCES:
        dtype: tl.constexpr = rows.neg_half_norm2.dtype
        offs = offs_m.to(tl.int64) * D
        neg_s = tl.zeros([rows.neg_half_norm2.shape[0], BLOCK_M], dtype=dtype)
        for k in range(D):
            difference = tl.load(rows.ptrs + k)[:, None] - tl.load(operands.hi_ptr + offs + k)[None, :]
            neg_s -= difference * (tl.load(row_directions.ptrs + k)[:, None] - tl.load(directions.hi_ptr + offs + k)[None, :])
        return neg_s, row_directions.hi, row_directions.lo
    else:
        offs = tl.cast(start_m, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, BLOCK_K)[None, :])
        neg_s = row_directions.neg_half_norm2[:, None] + tl.load(directions.neg_half_norm2_ptr + offs_m)[None, :]
        if D == BLOCK_K:
            hi, lo = load_parts(directions.hi_ptr + offs, directions.lo_ptr + offs, PRODUCT)
            neg_s = dot(rows.hi, rows.lo, tl.trans(hi), tl.trans(lo), neg_s, PRODUCT)
            neg_s = dot(row_directions.hi, row_directions.lo, tl.trans(col_hi), tl.trans(col_lo), neg_s, PRODUCT)
            return neg_s, hi, lo
        else:
            for start_k in range(0, D, BLOCK_K):
                left_hi, left_lo = load_parts(rows.hi_ptrs + start_k, rows.lo_ptrs + start_k, PRODUCT)
                right_hi, right_lo = load_parts(directions.hi_ptr + offs + start_k, directions.lo_ptr + offs + start_k, PRODUCT)
                neg_s = dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), neg_s, PRODUCT)
            for start_k in range(0, D, BLOCK_K):
                left_hi, left_lo = load_parts(row_directions.hi_ptrs + start_k, row_directions.lo_ptrs + start_k, PRODUCT)
                right_hi, right_lo = load_parts(operands.hi_ptr + offs + start_k, operands.lo_ptr + offs + start_k, PRODUCT)
                neg_s = dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), neg_s, PRODUCT)
            return neg_s, row_directions.hi, row_directions.lo


@triton.jit
def _add_curved_tile(
    sums, block: DirectedRows, operands, directions, curvature, parameters, scale, start_m, n, d_out,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The sums with those of one tile added."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    D: tl.constexpr = SPEC.D
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_K: tl.constexpr = SPEC.BLOCK_K
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = block.rows
    offs_n = rows.offs_n
    exponent, col_hi, col_lo = tile_exponent(rows, operands, start_m, scale, FAMILY, PRODUCT, D, BLOCK_M, BLOCK_K)
    neg_s, dir_hi, dir_lo = _neg_s(rows, block.directions, col_hi, col_lo, operands, directions, start_m, PRODUCT, D, BLOCK_M, BLOCK_K)
    column_half = tl.load(curvature.half_ptr + offs_m)
    column_dot = tl.load(curvature.dot_ptr + offs_m)
    phi_acc, cross_acc, direction_acc, rows_acc = sums.phi, sums.cross, sums.of_direction, sums.of_rows
    pairs = Pairs(exponent, neg_s, block.half, column_half, block.dot, column_dot, offs_n, offs_m, n)
    if BANDWIDTHS == 1 or SPLIT:
        power, cross, of_direction, of_rows = _evaluate_curvature(pairs, curvature.coefficient_ptr, parameters, SPEC)
        phi_acc += row_sums(_counted(power, offs_n, offs_m, n, MASKED))
        cross_acc += row_sums(_counted(cross, offs_n, offs_m, n, MASKED))
    else:
        of_direction = tl.zeros_like(exponent)
        of_rows = tl.zeros_like(exponent)
        # Not unrolled: the arrays of several bandwidths would not fit the registers.
        for b in range(BANDWIDTHS):
            coefficient_ptr = curvature.coefficient_ptr + b * H_COEFFICIENTS
            power, cross, one_direction, one_rows = _evaluate_curvature(pairs, coefficient_ptr, parameters, SPEC)
            weight = tl.load(coefficient_ptr + H_WEIGHT)
            steep_weight = weight * tl.load(coefficient_ptr + H_TWICE_GAMMA)
            phi_acc += weight * row_sums(_counted(power, offs_n, offs_m, n, MASKED))
            cross_acc += steep_weight * row_sums(_counted(cross, offs_n, offs_m, n, MASKED))
            of_direction += weight * one_direction
            of_rows += steep_weight * one_rows
    of_direction = _counted(of_direction, offs_n, offs_m, n, MASKED)
    of_rows = _counted(of_rows, offs_n, offs_m, n, MASKED)
    direction_moments, row_moments = sums.direction_moments, sums.row_moments
    if PRODUCT == DIFFERENCES:
        offs = offs_m.to(tl.int64)[:, None] * D + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        col = tl.load(directions.hi_ptr + offs)
        direction_moments += tl.sum(of_direction[:, :, None] * ((col[None, :, :] - block.direction_out[:, None, :]) / scale), 1)
        col = tl.load(operands.hi_ptr + offs)
        row_moments += tl.sum(of_rows[:, :, None] * ((col[None, :, :] - block.row_out[:, None, :]) * scale), 1)
    else:
        direction_acc += row_sums(of_direction)
        rows_acc += row_sums(of_rows)
        dir_hi, dir_lo = column_parts(dir_hi, dir_lo, directions, start_m, d_out, PRODUCT, D, BLOCK_M, BLOCK_K, BLOCK_D)
        hi, lo = split_operand(of_direction, PRODUCT)
        # A tensor core's accumulator truncates: each tile starts from zero, and its sum is added in the accumulation dtype.
        direction_moments += dot(hi, lo, dir_hi, dir_lo, tl.zeros_like(direction_moments), PRODUCT)
        col_hi, col_lo = column_parts(col_hi, col_lo, operands, start_m, d_out, PRODUCT, D, BLOCK_M, BLOCK_K, BLOCK_D)
        hi, lo = split_operand(of_rows, PRODUCT)
        row_moments += dot(hi, lo, col_hi, col_lo, tl.zeros_like(row_moments), PRODUCT)
    return _Curved(phi_acc, cross_acc, direction_acc, rows_acc, direction_moments, row_moments)


@triton.jit(do_not_specialize=["n"])
def hessian_kernel(
    operands, directions, tables, curvature: Curvature, part_sums: HessianSums, swept, n, SPLIT: tl.constexpr, SPEC: tl.constexpr
):
    """The sums of formula (5) of a block of rows over a share of the columns. Programs are those of `ksd_kernel`."""
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    D: tl.constexpr = SPEC.D
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    PRODUCT: tl.constexpr = SPEC.PRODUCT
    d_blocks: tl.constexpr = D // BLOCK_D
    d_out = tl.program_id(1) % d_blocks
    # With SPLIT a program takes one bandwidth.
    split: tl.constexpr = SPEC.BANDWIDTHS if SPLIT else 1
    share = tl.program_id(2) // split
    shares = tl.num_programs(2) // split
    problem = (tl.program_id(1) // d_blocks).to(tl.int64)
    plan_ptr = tables.plan_ptr
    half_ptr = curvature.half_ptr
    dot_ptr = curvature.dot_ptr
    operands = as_product(operands, PRODUCT)
    directions = as_product(directions, PRODUCT)
    if SPEC.BATCHED:
        # A problem has the same bytes in every pass.
        elements: tl.constexpr = 2 if PRODUCT == BF16 or PRODUCT == BF16X3 else 1  # noqa: SIM109
        operands = from_row(operands, problem * operands.rows, elements * D)
        directions = from_row(directions, problem * directions.rows, elements * D)
        plan_ptr += problem * PLAN
        half_ptr += problem * operands.rows
        dot_ptr += problem * operands.rows
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PASS:
        return
    coefficient_ptr = curvature.coefficient_ptr + tl.program_id(2) % split * H_COEFFICIENTS
    curvature = Curvature(half_ptr, dot_ptr, coefficient_ptr)
    dtype: tl.constexpr = operands.neg_half_norm2_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_N
    start_n = swept.x_start + row
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)

    # load
    rows = load_block(operands, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    row_directions = load_block(directions, start_n, PRODUCT, D, BLOCK_N, SPEC.BLOCK_K)
    row_half = tl.load(half_ptr + rows.offs_n)
    row_dot = tl.load(dot_ptr + rows.offs_n)
    row_out = rows.neg_half_norm2
    direction_out = row_out
    if PRODUCT == DIFFERENCES:
        offs = tl.cast(start_n, tl.int64) * D + (local_n + offs_d[None, :])
        row_out = tl.load(operands.hi_ptr + offs)
        direction_out = tl.load(directions.hi_ptr + offs)
    block = DirectedRows(rows, row_directions, row_half, row_dot, row_out, direction_out)
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    parameters = load_parameters(tables.table_ptr, FAMILY, SPEC.BANDWIDTHS, PRODUCT)

    # compute, as in `ksd_kernel`
    whole = n // BLOCK_M * BLOCK_M
    band = tl.minimum(start_n // BLOCK_M * BLOCK_M, whole)
    band_end = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, whole)
    first, last = share_of(band + (whole - band_end), share, shares, BLOCK_M)
    zeros = tl.zeros([BLOCK_N, 8], dtype=dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
    sums = _Curved(zeros, zeros, zeros, zeros, moments, moments)
    for offset in range(first, last, BLOCK_M):
        start_m = tl.multiple_of(tl.where(offset >= band, band_end + (offset - band), offset), BLOCK_M)
        sums = _add_curved_tile(sums, block, operands, directions, curvature, parameters, scale, start_m, n, d_out, False, SPLIT, SPEC)
    if share == 0:
        masked = band_end - band + tl.cdiv(n - whole, BLOCK_M) * BLOCK_M
        for offset in tl.range(0, masked, BLOCK_M, num_stages=1):
            start_m = tl.multiple_of(tl.where(band + offset < band_end, band + offset, whole), BLOCK_M)
            sums = _add_curved_tile(sums, block, operands, directions, curvature, parameters, scale, start_m, n, d_out, True, SPLIT, SPEC)

    # store
    out = (tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // d_blocks) + problem) * part_sums.rows + row
    weight = 1.0
    steep_weight = 1.0
    if split > 1:
        weight = tl.load(coefficient_ptr + H_WEIGHT)
        steep_weight = weight * tl.load(coefficient_ptr + H_TWICE_GAMMA)
    if d_out == 0:
        offs_n = out + tl.arange(0, BLOCK_N)
        tl.store(part_sums.phi_ptr + offs_n, weight * tl.sum(sums.phi, 1))
        tl.store(part_sums.cross_ptr + offs_n, steep_weight * tl.sum(sums.cross, 1))
        tl.store(part_sums.of_direction_ptr + offs_n, weight * tl.sum(sums.of_direction, 1))
        tl.store(part_sums.of_rows_ptr + offs_n, steep_weight * tl.sum(sums.of_rows, 1))
    offs = out * D + (local_n + offs_d[None, :])
    tl.store(part_sums.direction_moments_ptr + offs, weight * sums.direction_moments)
    tl.store(part_sums.row_moments_ptr + offs, steep_weight * sums.row_moments)


@triton.jit(do_not_specialize=["n"])
def hessian_finish_kernel(
    z_ptr,  # (B, n, FEATURES)
    direction_ptr,  # likewise
    numbers,
    operands,
    directions,
    tables,
    part_sums: HessianSums,
    swept,
    out_ptr,  # (B, swept rows, FEATURES)
    n,
    UNBIASED: tl.constexpr,
    SPEC: tl.constexpr,
    SUM: tl.constexpr,
):
    """Formula (5) over the number of pairs, of a block of rows."""
    # where
    FAMILY: tl.constexpr = SUM.FAMILY
    KERNELS: tl.constexpr = SUM.KERNELS
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_D: tl.constexpr = SPEC.BLOCK_D
    problem = tl.program_id(1).to(tl.int64)
    batches = tl.cast(tl.num_programs(1), tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    plan_ptr = tables.plan_ptr + problem * PLAN
    values = load_numbers(numbers, SUM.NUMBERS, SUM.ON_DEVICE)
    gammas = gammas_of(values, FAMILY, KERNELS, SPEC.FEATURES)
    # With one bandwidth the sums lack its weight and 2γ.
    weight = values[KERNELS] if KERNELS == 1 else values[KERNELS] * 0.0 + 1.0
    steep_weight = weight * (2.0 * gammas[0]) if KERNELS == 1 else weight
    weights = values[KERNELS] * 0.0
    if not UNBIASED:
        for b in tl.static_range(KERNELS):
            weights += values[KERNELS + b]
    pairs = n.to(tl.float64) * (n.to(tl.float64) - (1.0 if UNBIASED else 0.0))
    # nan if a number of the problem is not finite
    factor = 2.0 / pairs + tl.load(plan_ptr + VALUE_SCALE) * 0.0
    scale = tl.load(plan_ptr + SCALE)
    stride = batches * part_sums.rows
    first = problem * part_sums.rows
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = row < swept.x_rows
    source = swept.x_start + row
    operands = from_row(operands, problem * operands.rows, SPEC.D)
    directions = from_row(directions, problem * directions.rows, SPEC.D)
    z_ptr += problem * n * SPEC.FEATURES
    direction_ptr += problem * n * SPEC.FEATURES
    out_ptr += problem * swept.x_rows * SPEC.FEATURES

    # load, compute, store
    zeros = tl.zeros([BLOCK_N], dtype=dtype)
    phi_sum = add_shares(zeros, part_sums.phi_ptr + first + row, stride, part_sums.parts, mask_n)
    cross = add_shares(zeros, part_sums.cross_ptr + first + row, stride, part_sums.parts, mask_n)
    direction_sum = add_shares(zeros, part_sums.of_direction_ptr + first + row, stride, part_sums.parts, mask_n)
    row_sum = add_shares(zeros, part_sums.of_rows_ptr + first + row, stride, part_sums.parts, mask_n)
    # In float64, as the scale of the rows may be small.
    of_direction_moments = (factor * weight * scale).to(dtype)
    of_row_moments = (factor * steep_weight / scale).to(dtype)
    of_direction = (factor * (weight * phi_sum.to(tl.float64) + weights)).to(dtype)
    of_row = (factor * steep_weight * cross.to(tl.float64)).to(dtype)
    for start_d in range(0, SPEC.D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        z, mask = load_rows(z_ptr, source, mask_n, offs_d, SPEC.FEATURES)
        a, _ = load_rows(direction_ptr, source, mask_n, offs_d, SPEC.FEATURES)
        offs = (first + row)[:, None] * SPEC.D + offs_d[None, :]
        block = tl.zeros([BLOCK_N, BLOCK_D], dtype=dtype)
        moments = add_shares(block, part_sums.direction_moments_ptr + offs, stride * SPEC.D, part_sums.parts, mask)
        rounded = load_rounded(directions, plan_ptr, source, offs_d, mask, dtype, SPEC, SUM)
        result = of_direction_moments * (moments - direction_sum[:, None] * rounded) + of_direction[:, None] * a.to(dtype)
        moments = add_shares(block, part_sums.row_moments_ptr + offs, stride * SPEC.D, part_sums.parts, mask)
        rounded = load_rounded(operands, plan_ptr, source, offs_d, mask, dtype, SPEC, SUM)
        result += of_row_moments * (moments - row_sum[:, None] * rounded) + of_row[:, None] * z.to(dtype)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * SPEC.FEATURES + offs_d[None, :], result, mask=mask)


@functools.lru_cache(maxsize=256)
def _hessian_configs(plan: DeviceKernelPlan, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[HessianConfig, ...]:
    """The configs of each pass."""
    architecture = device_limits(device).architecture
    names = [product_name(product, dtype) for product in plan.precision_passes]
    return tuple(stein_hessian_config(dim, name, plan.bandwidths, architecture, is_power(plan.family)) for name in names)


def hessian_product(z: Tensor, direction: Tensor, start: int, rows: int, kernel: KernelNumbers, unbiased: bool, precision: str) -> Tensor:
    """`rows` rows from `start` on of the Hessian of KSD² of z (N, D) or (batch, N, D) times a direction of this shape."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    z, direction = z.contiguous(), direction.to(dtype).contiguous()
    sample = Sample(z, None, 0.0, start, rows, True)
    (n, dim), batch, device = z.shape[-2:], sample.problems, z.device
    plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, dtype, precision)
    configs = _hessian_configs(plan, dim, dtype, device)
    d = max(padded_dim(dim, config) for config in configs)
    block = max(ROW_BLOCK, *(config.block_n for config in configs))
    prepared = prepare([sample], kernel, plan, d, block, unbiased=unbiased)
    operands, tables, swept = prepared.operands, prepared.tables, prepared.swept
    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    buffers = operand_buffers((batch, operands.rows, d), dtype, plan.precision_passes, device)
    directions = Operands(*buffers, empty((batch, operands.rows)), operands.weight_ptr, operands.first_y, operands.rows)
    curvature = Curvature(empty((batch, operands.rows)), empty((batch, operands.rows)), empty((plan.bandwidths, H_COEFFICIENTS.value)))
    key = prepared.key, tensor_key(direction)
    launch(
        direction_kernel, key, device, (-(-operands.rows // ROW_BLOCK), batch, 1),
        (z, direction, kernel.arguments, operands, directions, tables, curvature, n, operands.rows), prepared.specs,
    )  # fmt: skip

    swept_rows, config = padded(rows, block), configs[0]
    programs = batch * (d // config.block_d) * (swept_rows // config.block_n)
    split = plan.bandwidths if config.split else 1
    parts = split * column_splits(programs * split, -(-n // config.block_m), device_limits(device).multiprocessors)
    sums = [empty(parts * batch * swept_rows) for _ in range(4)] + [empty(parts * batch * swept_rows * d) for _ in range(2)]
    part_sums = HessianSums(*sums, parts, swept_rows)
    for number, config in enumerate(configs):
        launch(
            hessian_kernel, (key, number), device, (swept_rows // config.block_n, batch * (d // config.block_d), parts),
            (operands, directions, tables, curvature, part_sums, swept, n),
            lambda number=number, config=config: {
                "SPLIT": config.split,
                "SPEC": spec_of(config, number, batch > 1, True, plan.precision_passes[number], d, plan.family, plan.bandwidths),
            } | config.launch("BLOCK_N", "BLOCK_M", "BLOCK_K", "BLOCK_D"),
        )  # fmt: skip
    out = empty((*z.shape[:-2], rows, dim))
    launch(
        hessian_finish_kernel, key, device, (swept_rows // ROW_BLOCK, batch, 1),
        (z, direction, kernel.arguments, operands, directions, tables, part_sums, swept, out, n),
        lambda: prepared.specs() | {"UNBIASED": unbiased},
    )  # fmt: skip
    return out
