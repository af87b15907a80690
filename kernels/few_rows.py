"""MMD² and its gradients for a batch of problems of few rows on a GPU: one launch, one program for each problem.

In float32, for inputs of at most that precision. Distances are sums of squared differences, which need no statistics of the data, and no
rows are padded to the tile of a sweep: a sweep takes 64 rows where four are given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.config import FewRowsConfig, few_rows_config
from fastvae.kernels.families import GAUSSIAN, RATIONAL_QUADRATIC_LARGE, Family, ratios_to, representable_gamma, squared_scale
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.plan import device_kernel_plan
from fastvae.kernels.sums import MOST_IN_REGISTERS, evaluate_sum, gammas_of, load_numbers, subtracted_constants
from fastvae.radial import Sum

# The most rows of a sample, and for more than `_FEW` rows of both the most multiplications of a problem. Beyond them a sweep, which pads
# each sample to 64 rows but has tensor cores, should be as fast: estimated from instructions, not measured.
_MOST_ROWS, _FEW, _MOST_WORK = 64, 32, 1 << 18

# Exponents below this are it: k is 0 there, and the root of an infinite one would be nan.
_LEAST_EXPONENT = tl.constexpr(-1e37)


class FewRowsSpec(NamedTuple):
    """The constexprs besides the tile's."""

    NUMBERS: int  # of `KernelNumbers`
    ON_DEVICE: bool
    FAMILY: Family
    BANDWIDTHS: int  # that are evaluated
    KERNELS: int  # that are given
    SQUARINGS: int
    UNBIASED: bool
    X_GRAD: bool
    Y_GRAD: bool


class _Sum(NamedTuple):
    """A sum of kernels: what `evaluate_sum` takes, the scale of the rows, and the factors of values and gradients."""

    table: Any
    parameters: Any
    scale: Any
    value_scale: Any
    gradient_scale: Any


@triton.jit
def _row_ptrs(row, x_ptr, y_ptr, n, features):
    """Where rows start that are counted through x and then y, (BLOCK, 1)."""
    in_x = row < n
    return tl.where(in_x, x_ptr + row * features, y_ptr + (row - n) * features)[:, None]


@triton.jit
def _load_block(row_ptrs, mask_n, start_d, features, BLOCK_D: tl.constexpr):
    """Some features of rows in float32, 0 outside of them, with the numbers of the features and the mask of what is inside."""
    offs_d = (start_d + tl.arange(0, BLOCK_D))[None, :]
    mask = mask_n[:, None] & (offs_d < features)
    return tl.load(row_ptrs + offs_d, mask=mask, other=0.0).to(tl.float32), offs_d, mask


@triton.jit
def _furthest(row_ptrs, first_ptr, mask_n, features, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The largest squared distance from the first row, float64."""
    norm2 = tl.zeros([BLOCK_N], dtype=tl.float64)
    for start_d in range(0, features, BLOCK_D):
        z, offs_d, mask = _load_block(row_ptrs, mask_n, start_d, features, BLOCK_D)
        first = tl.load(first_ptr + offs_d, mask=offs_d < features, other=0.0).to(tl.float32)
        difference = tl.where(mask, z - first, 0.0).to(tl.float64)
        norm2 += tl.sum(difference * difference, 1)
    return tl.max(norm2)


@triton.jit
def _kernel_sum(numbers, furthest, SPEC: tl.constexpr):
    """The sum of kernels for rows that are at most √`furthest` from the first, and γ of each bandwidth."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    KERNELS: tl.constexpr = SPEC.KERNELS
    PARAMETERS: tl.constexpr = FAMILY.parameters
    values = load_numbers(numbers, SPEC.NUMBERS, SPEC.ON_DEVICE)
    gammas = gammas_of(values, FAMILY, KERNELS, 1)
    gamma = gammas[0]
    if FAMILY.takes_distance:
        gamma = representable_gamma(gamma, furthest, tl.float32, FAMILY)
    value_scale = values[KERNELS]
    slope_scale = value_scale
    if FAMILY.homogeneous:
        value_scale *= 0.0
        for b in tl.static_range(KERNELS):
            ratio, _ = ratios_to(gamma, gammas, b, values, FAMILY, KERNELS)
            value_scale += values[KERNELS + b] * ratio
        slope_scale = value_scale
    elif BANDWIDTHS > 1:
        value_scale = value_scale * 0.0 + 1.0
        slope_scale = value_scale
    elif FAMILY.takes_distance:
        _, slope_ratio = ratios_to(gamma, gammas, 0, values, FAMILY, KERNELS)
        slope_scale *= slope_ratio
    ratios = ()
    weights = ()
    slopes = ()
    if BANDWIDTHS > 1:
        for b in tl.static_range(BANDWIDTHS):
            ratio, slope_ratio = ratios_to(gamma, gammas, b, values, FAMILY, KERNELS)
            ratios += (ratio.to(tl.float32),)
            weights += (values[KERNELS + b].to(tl.float32),)
            slopes += ((values[KERNELS + b] * slope_ratio).to(tl.float32),)
    parameters = ()
    for k in tl.static_range(PARAMETERS):
        parameters += (values[2 * KERNELS + k].to(tl.float32),)
    if FAMILY.takes_distance:
        # Only an exponent of zero is that of an identical pair.
        parameters += (tl.zeros([], dtype=tl.float32),)
    scale = tl.sqrt(squared_scale(gamma, values, FAMILY, KERNELS))
    gradient_scale = 4.0 * (gamma / scale) * slope_scale * FAMILY.neg_dphi_factor
    return _Sum(ratios + weights + slopes, parameters, scale.to(tl.float32), value_scale, gradient_scale), gammas


@triton.jit
def _value_constant(spread, gammas, kernel, SPEC: tl.constexpr):
    """What is subtracted from each value: Σ_b a_b over the bandwidths for which most k_b are near φ(0). A single one lacks its a_b."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    constants = subtracted_constants(spread, gammas, FAMILY, SPEC.KERNELS)
    constant = tl.zeros([], dtype=tl.float32)
    if not FAMILY.homogeneous:
        for b in tl.static_range(BANDWIDTHS):
            constant += constants[b].to(tl.float32) * (kernel.table[BANDWIDTHS + b] if BANDWIDTHS > 1 else 1.0)
    return constant


@triton.jit(do_not_specialize=["n", "m", "features"])
def few_rows_kernel(
    x_ptr,  # (problems, n, features), contiguous, as are all
    y_ptr,  # (problems, m, features)
    numbers,  # of `fastvae.kernel_sums.KernelNumbers`
    mmd_ptr,  # (problems,)
    grad_x_ptr,  # as x, in float32
    grad_y_ptr,
    n,
    m,
    features,
    BLOCK_N: tl.constexpr,  # at least n + m
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Formulas (1) and (2) of `fastvae.reference.mmd` for the problem of a program: BLOCK_M columns at a time against all rows."""
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    GRADIENT: tl.constexpr = SPEC.X_GRAD or SPEC.Y_GRAD
    problem = tl.program_id(0).to(tl.int64)
    x_offset, y_offset = problem * n * features, problem * m * features
    x_ptr += x_offset
    y_ptr += y_offset
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < n + m
    row_ptrs = _row_ptrs(offs_n, x_ptr, y_ptr, n, features)
    grad_ptrs = _row_ptrs(offs_n, grad_x_ptr + x_offset, grad_y_ptr + y_offset, n, features)
    wanted = mask_n & (((offs_n < n) & SPEC.X_GRAD) | ((offs_n >= n) & SPEC.Y_GRAD))
    furthest = tl.zeros([], dtype=tl.float64)
    if FAMILY.takes_distance:
        furthest = _furthest(row_ptrs, x_ptr, mask_n, features, BLOCK_N, BLOCK_D)
    kernel, gammas = _kernel_sum(numbers, furthest, SPEC)
    # The factors of k in formula (1) or (2) for pairs within x, within y and of both.
    of_x, of_y = 1.0 / n.to(tl.float64), 1.0 / m.to(tl.float64)
    own_x, own_y, other = of_x * of_x, of_y * of_y, -of_x * of_y
    if SPEC.UNBIASED:
        own_x, own_y = of_x / (n - 1), of_y / (m - 1)

    # load and compute
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float64)
    constant = tl.zeros([], dtype=tl.float32)
    not_finite = tl.zeros([], dtype=tl.float32)
    for start_m in range(0, n + m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < n + m
        column_ptrs = _row_ptrs(offs_m, x_ptr, y_ptr, n, features)
        squares = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_D], dtype=tl.float32)
        zeros = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for start_d in range(0, features, BLOCK_D):
            z, _, _ = _load_block(row_ptrs, mask_n, start_d, features, BLOCK_D)
            columns, _, _ = _load_block(column_ptrs, mask_m, start_d, features, BLOCK_D)
            difference = (z[None, :, :] - columns[:, None, :]) * kernel.scale
            squares += difference * difference
            zeros += columns * 0.0
        not_finite += tl.sum(zeros)
        exponent = -0.5 * tl.sum(squares, 2)
        exponent = tl.where(exponent < _LEAST_EXPONENT, _LEAST_EXPONENT, exponent)
        counted = mask_m[:, None] & mask_n[None, :]
        if start_m == 0:
            pairs = tl.minimum(n + m, BLOCK_M) * (n + m)
            spread = -tl.sum(tl.where(counted, exponent, 0.0)) / pairs
            scale = kernel.scale.to(tl.float64)
            constant = _value_constant(2.0 * spread / (scale * scale), gammas, kernel, SPEC)
        value, slope = evaluate_sum(
            exponent, kernel.table, x_ptr, kernel.parameters, constant, 0.0, FAMILY, GRADIENT, BANDWIDTHS, SPEC.SQUARINGS
        )
        if SPEC.UNBIASED:
            counted = counted & (offs_m[:, None] != offs_n[None, :])
        factor = tl.where(offs_n < n, own_x, other)[None, :]
        factor = tl.where((offs_m < n)[:, None], factor, tl.where(offs_n < n, other, own_y)[None, :])
        total += tl.where(counted, value.to(tl.float64) * factor, 0.0)
        if GRADIENT:
            if FAMILY.number == GAUSSIAN and BANDWIDTHS == 1:
                # Its slope is its value, less the constant.
                slope += constant
            slope = tl.where(counted, slope.to(tl.float64) * (factor * kernel.gradient_scale), 0.0).to(tl.float32)
            for start_d in range(0, features, BLOCK_D):
                z, offs_d, mask = _load_block(row_ptrs, mask_n, start_d, features, BLOCK_D)
                columns, _, _ = _load_block(column_ptrs, mask_m, start_d, features, BLOCK_D)
                difference = (z[None, :, :] - columns[:, None, :]) * kernel.scale
                gradient = not_finite - tl.sum(slope[:, :, None] * difference, 0)
                mask = mask & wanted[:, None]
                if start_m > 0:
                    gradient += tl.load(grad_ptrs + offs_d, mask=mask, other=0.0)
                tl.store(grad_ptrs + offs_d, gradient, mask=mask)

    # store
    tl.store(mmd_ptr + problem, (tl.sum(total) * kernel.value_scale + not_finite).to(tl.float32))


def config_of(x: Tensor, y: Tensor) -> FewRowsConfig | None:
    """The config for problems (B, N, D) and (B, M, D), or None if sweeps should take them."""
    (n, features), rows = x.shape[1:], x.shape[1] + y.shape[1]
    if max(n, rows - n) > _MOST_ROWS or (rows > _FEW and rows * rows * features > _MOST_WORK):
        return None
    return few_rows_config(rows, features)


def mmd_if_few_rows(
    x: Tensor, y: Tensor, kernel: KernelNumbers, unbiased: bool, x_grad: bool, y_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """MMD² (B,) of each problem (B, N, D) and (B, M, D), and its gradients; None if sweeps should take them."""
    config = config_of(x, y)
    # More unlike kernels would spill.
    most = 4 if isinstance(kernel.kernel, Sum) else MOST_IN_REGISTERS.value
    if config is None or x.dtype == torch.float64 or not kernel.kernel.radial or kernel.count > most:
        return None
    plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, torch.float32, "ieee")
    if any(part.number == RATIONAL_QUADRATIC_LARGE.value for part in (plan.family, *plan.family.parts)):
        return None  # Its quotients would spill.
    x, y = x.contiguous(), y.contiguous()
    value = torch.empty(x.shape[0], device=x.device)
    grad_x, grad_y = (torch.empty(z.shape, device=z.device) if grad else None for z, grad in ((x, x_grad), (y, y_grad)))
    given = [value if grad is None else grad for grad in (grad_x, grad_y)]
    on_device = isinstance(kernel.arguments, Tensor)
    key = plan, kernel.count, kernel.numbers, on_device, config, unbiased, x_grad, y_grad, tensor_key(x, y, value, *given)
    launch(
        few_rows_kernel, key, x.device, (x.shape[0], 1, 1),
        (x, y, kernel.arguments, value, *given, x.shape[1], y.shape[1], x.shape[2]),
        lambda: config.launch() | {
            "SPEC": FewRowsSpec(
                kernel.numbers, on_device, plan.family, plan.bandwidths, kernel.count, plan.squarings, unbiased, x_grad, y_grad
            )
        },
    )  # fmt: skip
    return value, grad_x, grad_y
