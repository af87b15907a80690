"""K(x, y)·v, its gradient, and vᵀKv of few pairs on a GPU, each in one launch: small problems spend their time on launches.

In float32, for inputs of at most that precision. Distances are sums of squared differences, which need no statistics of the data. So there
is no preparation, which in `fastvae.kernels.kernel_matmul` chooses how products are taken.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae import kernel_sums as formulas
from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.families import (
    GAUSSIAN,
    RATIONAL_QUADRATIC,
    RATIONAL_QUADRATIC_HALF,
    RATIONAL_QUADRATIC_LARGE,
    RATIONAL_QUADRATIC_ONE,
    Family,
    squared_scale,
)
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.plan import DeviceKernelPlan, device_kernel_plan
from fastvae.kernels.sums import MOST_IN_REGISTERS, evaluate_sum, gammas_of, load_numbers

_SHIFT_BELOW = tl.constexpr(formulas.SHIFT_BELOW)
_LN_2 = tl.constexpr(1 / formulas.LOG2_E)
_FAMILIES = (
    GAUSSIAN.value,
    RATIONAL_QUADRATIC.value,
    RATIONAL_QUADRATIC_HALF.value,
    RATIONAL_QUADRATIC_ONE.value,
    RATIONAL_QUADRATIC_LARGE.value,
)

# Rows of a program and columns of a step; features of a step of the distances and of the gradient.
_BLOCK_N, _BLOCK_M, _UNROLL, _BLOCK_D = tl.constexpr(8), tl.constexpr(256), tl.constexpr(4), tl.constexpr(8)

# Most multiplications for which this is faster than sweeps; fewer in a CUDA graph, whose launches cost the host nothing.
# Measured on an H200: stage "few pairs" in benchmarks/results/gpu.jsonl.
_MOST_WORK, _MOST_WORK_OF_A_GRAPH = 1 << 29, 1 << 24
# Beyond these the kernels spill registers.
_MOST_FEATURES, _MOST_COLUMNS = 64, 32


class KernelSpec(NamedTuple):
    """What the compiler knows about a sum of kernels."""

    NUMBERS: int  # of `KernelNumbers`
    ON_DEVICE: bool
    FAMILY: Family
    BANDWIDTHS: int
    SQUARINGS: int


class Coefficients(NamedTuple):
    """A sum of kernels: γ of the widest bandwidth, the scales of points and values, and what `load_table` and `load_parameters` return."""

    gamma: Any
    scale: Any
    value_scale: Any
    table: Any
    parameters: Any


@triton.jit
def _load_kernel_sum(numbers, SPEC: tl.constexpr):
    FAMILY: tl.constexpr = SPEC.FAMILY
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    values = load_numbers(numbers, SPEC.NUMBERS, SPEC.ON_DEVICE)
    gammas = gammas_of(values, FAMILY, BANDWIDTHS, 1)
    scale = tl.sqrt(squared_scale(gammas[0], values, FAMILY, BANDWIDTHS)).to(tl.float32)
    value_scale = values[BANDWIDTHS]
    table = ()
    if BANDWIDTHS > 1:
        value_scale = value_scale * 0.0 + 1.0
        for b in tl.static_range(BANDWIDTHS):
            table += ((gammas[b] / gammas[0]).to(tl.float32),)
        for b in tl.static_range(BANDWIDTHS):
            table += (values[BANDWIDTHS + b].to(tl.float32),)
        for b in tl.static_range(BANDWIDTHS):
            table += ((values[BANDWIDTHS + b] * (gammas[b] / gammas[0])).to(tl.float32),)
    parameters = ()
    if FAMILY.number != GAUSSIAN:
        parameters += (values[2 * BANDWIDTHS].to(tl.float32),)
    return Coefficients(gammas[0], scale, value_scale, table, parameters)


@triton.jit
def _exponent(x_ptrs, y_ptrs, mask_n, mask_m, features, scale, x_not_finite, y_not_finite):
    """The exponents that `evaluate_sum` takes, and both accumulators with nan added where a row or a column is not finite."""
    exponent = tl.zeros([mask_n.shape[0], mask_m.shape[0]], dtype=tl.float32)
    for start_k in range(0, features, _UNROLL):
        for n in tl.static_range(_UNROLL):
            inside = start_k + n < features
            x = tl.load(x_ptrs + (start_k + n), mask=mask_n & inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptrs + (start_k + n), mask=mask_m & inside, other=0.0).to(tl.float32)
            difference = (x[:, None] - y[None, :]) * scale
            exponent -= difference * difference
            x_not_finite += x * 0.0
            y_not_finite += y * 0.0
    return 0.5 * exponent, x_not_finite, y_not_finite


@triton.jit
def _value_constant(exponent, mask_n, mask_m, pairs, kernel: Coefficients, SPEC: tl.constexpr):
    """The constant to subtract from each k: Σ_b a_b over the bandwidths for which most k_b are near one."""
    FAMILY: tl.constexpr = SPEC.FAMILY
    BANDWIDTHS: tl.constexpr = SPEC.BANDWIDTHS
    spread = -tl.sum(tl.where(mask_n[:, None] & mask_m[None, :], exponent, 0.0)) / pairs
    spread *= _LN_2 if FAMILY.number == GAUSSIAN else kernel.parameters[0]
    if BANDWIDTHS == 1:
        return tl.where(spread < _SHIFT_BELOW, 1.0, 0.0).to(tl.float32)
    else:
        constant = tl.zeros([], dtype=tl.float32)
        for b in tl.static_range(BANDWIDTHS):
            constant += tl.where(kernel.table[b] * spread < _SHIFT_BELOW, kernel.table[BANDWIDTHS + b], 0.0)
        return constant


@triton.jit
def weighted_by_upstream(v_ptr, upstream_ptr, offs_n, mask_n, offs_c, columns):
    """Columns `offs_c` of v·(A + Aᵀ), float64, for rows of v and the upstream A of vᵀKv."""
    product = tl.zeros([offs_n.shape[0], offs_c.shape[0]], dtype=tl.float64)
    for column in range(columns):
        weight = tl.load(v_ptr + offs_n * columns + column, mask=mask_n, other=0.0).to(tl.float64)
        upstream = tl.load(upstream_ptr + column * columns + offs_c, mask=offs_c < columns, other=0.0)
        upstream += tl.load(upstream_ptr + offs_c * columns + column, mask=offs_c < columns, other=0.0)
        product += weight[:, None] * upstream[None, :]
    return product


@triton.jit(do_not_specialize=["n", "m", "features", "columns"])
def matmul_kernel(
    x_ptr,  # (n, features), contiguous, as are all
    y_ptr,  # (m, features)
    v_ptr,  # (m, columns)
    numbers,  # of `fastvae.kernel_sums.KernelNumbers`
    out_ptr,  # (n, columns), or (programs, columns, columns) of float64 if FORM
    n,
    m,
    features,
    columns,
    WITHIN: tl.constexpr,  # x and y are the same sample, without the pairs i = i
    FORM: tl.constexpr,  # vᵀ·(K·v) of the rows of a program
    BLOCK_C: tl.constexpr,
    SPEC: tl.constexpr,
):
    """A block of rows of K·v."""
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    offs_n, offs_c = tl.program_id(0) * _BLOCK_N + tl.arange(0, _BLOCK_N), tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < n, offs_c < columns
    kernel = _load_kernel_sum(numbers, SPEC)

    # load and compute
    out = tl.zeros([_BLOCK_N, BLOCK_C], dtype=tl.float64)
    v_sum = tl.zeros([BLOCK_C], dtype=tl.float64)
    value_constant = tl.zeros([], dtype=tl.float32)
    x_not_finite = tl.zeros([_BLOCK_N], dtype=tl.float32)
    y_not_finite = tl.zeros([_BLOCK_M], dtype=tl.float32)
    for start_m in range(0, m, _BLOCK_M):
        offs_m = start_m + tl.arange(0, _BLOCK_M)
        mask_m = offs_m < m
        exponent, x_not_finite, y_not_finite = _exponent(
            x_ptr + offs_n * features, y_ptr + offs_m * features, mask_n, mask_m, features, kernel.scale, x_not_finite, y_not_finite
        )
        if start_m == 0:
            pairs = tl.minimum(n - tl.program_id(0) * _BLOCK_N, _BLOCK_N) * tl.minimum(m, _BLOCK_M)
            value_constant = _value_constant(exponent, mask_n, mask_m, pairs, kernel, SPEC)
        value, _ = evaluate_sum(
            exponent, kernel.table, v_ptr, kernel.parameters, value_constant, 0.0, FAMILY, False, SPEC.BANDWIDTHS, SPEC.SQUARINGS
        )
        if WITHIN:
            value = tl.where(offs_n[:, None] != offs_m[None, :], value, 0.0)
        v = tl.load(v_ptr + offs_m[:, None] * columns + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        v_sum += tl.sum(v.to(tl.float64), 0)
        out += tl.sum(value[:, :, None] * v[None, :, :], 1).to(tl.float64)

    # store
    mask = mask_n[:, None] & mask_c[None, :]
    paired = tl.zeros_like(out) + v_sum[None, :]
    if WITHIN:
        paired -= tl.load(v_ptr + offs_n[:, None] * columns + offs_c[None, :], mask=mask, other=0.0).to(tl.float64)
    # The sum of v is not finite if a number of v is not.
    not_finite = x_not_finite + tl.sum(y_not_finite) + tl.sum(v_sum * 0.0).to(tl.float32)
    out = (out + paired * value_constant) * kernel.value_scale + not_finite[:, None]
    if FORM:
        out = tl.where(mask, out, 0.0)
        for start_c in range(0, columns, 8):
            left = start_c + tl.arange(0, 8)
            inside_left = mask_n[:, None] & (left < columns)[None, :]
            weights = tl.load(v_ptr + offs_n[:, None] * columns + left[None, :], mask=inside_left, other=0.0).to(tl.float64)
            offs = (tl.program_id(0) * columns + left)[:, None] * columns + offs_c[None, :]
            form = tl.sum(weights[:, :, None] * out[:, None, :], 0)
            tl.store(out_ptr + offs, form, mask=(left < columns)[:, None] & mask_c[None, :])
    else:
        tl.store(out_ptr + offs_n[:, None] * columns + offs_c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "m", "features", "columns"])
def gradient_kernel(
    x_ptr,  # (n, features), contiguous, as are all
    y_ptr,  # (m, features)
    g_ptr,  # (n, columns)
    v_ptr,  # (m, columns)
    upstream_ptr,  # None, or A (columns, columns), float64: x = y, the pairs i = i are left out, and v·(A + Aᵀ) takes the place of g
    numbers,
    grad_ptr,  # (n, features)
    n,
    m,
    features,
    columns,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # steps of the gradient
    SPEC: tl.constexpr,
):
    """The gradient of Σ_ij (g_i·v_j)·k_ij to a block of rows of x."""
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    offs_n, offs_c = tl.program_id(0) * _BLOCK_N + tl.arange(0, _BLOCK_N), tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < n, offs_c < columns
    kernel = _load_kernel_sum(numbers, SPEC)

    # load
    if upstream_ptr is not None:
        g = weighted_by_upstream(v_ptr, upstream_ptr, offs_n, mask_n, offs_c, columns).to(tl.float32)
    else:
        mask_g = mask_n[:, None] & mask_c[None, :]
        g = tl.load(g_ptr + offs_n[:, None] * columns + offs_c[None, :], mask=mask_g, other=0.0).to(tl.float32)

    # compute
    row_gradients = ()
    for _block in tl.static_range(BLOCKS):
        row_gradients += (tl.zeros([_BLOCK_N, _BLOCK_D], dtype=tl.float32),)
    x_not_finite = tl.zeros([_BLOCK_N], dtype=tl.float32)
    y_not_finite = tl.zeros([_BLOCK_M], dtype=tl.float32)
    for start_m in range(0, m, _BLOCK_M):
        offs_m = start_m + tl.arange(0, _BLOCK_M)
        mask_m = offs_m < m
        exponent, x_not_finite, y_not_finite = _exponent(
            x_ptr + offs_n * features, y_ptr + offs_m * features, mask_n, mask_m, features, kernel.scale, x_not_finite, y_not_finite
        )
        _, weight = evaluate_sum(exponent, kernel.table, v_ptr, kernel.parameters, 0.0, 0.0, FAMILY, True, SPEC.BANDWIDTHS, SPEC.SQUARINGS)
        v = tl.load(v_ptr + offs_m[:, None] * columns + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        weight *= tl.dot(g, tl.trans(v), input_precision="ieee", out_dtype=tl.float32)
        if upstream_ptr is not None:
            weight = tl.where(offs_n[:, None] != offs_m[None, :], weight, 0.0)
        sums = ()
        for block in tl.static_range(BLOCKS):
            offs_d = tl.arange(0, _BLOCK_D) + block * _BLOCK_D
            mask_d = (offs_d < features)[None, :]
            x = tl.load(x_ptr + offs_n[:, None] * features + offs_d[None, :], mask=mask_n[:, None] & mask_d, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + offs_m[:, None] * features + offs_d[None, :], mask=mask_m[:, None] & mask_d, other=0.0).to(tl.float32)
            sums += (row_gradients[block] + tl.sum(weight[:, :, None] * (y[None, :, :] - x[:, None, :]), 1),)
        row_gradients = sums

    # store
    not_finite = x_not_finite + tl.sum(y_not_finite)
    for block in tl.static_range(BLOCKS):
        offs_d = tl.arange(0, _BLOCK_D) + block * _BLOCK_D
        row_gradient = row_gradients[block].to(tl.float64)
        # An infinite number in g or v makes the sums infinite, and 0 times them nan.
        grad = 2.0 * kernel.gamma * kernel.value_scale * row_gradient + (not_finite[:, None] + row_gradient * 0.0)
        mask = mask_n[:, None] & (offs_d < features)[None, :]
        tl.store(grad_ptr + offs_n[:, None] * features + offs_d[None, :], grad.to(tl.float32), mask=mask)


def plan_if_few(kernel: KernelNumbers, x: Tensor, y: Tensor, columns: int) -> DeviceKernelPlan | None:
    """How these kernels evaluate the sum of kernels, or None if sweeps should."""
    (n, features), m = x.shape, y.shape[0]
    if x.dtype == torch.float64 or features > _MOST_FEATURES or columns > _MOST_COLUMNS or kernel.count > MOST_IN_REGISTERS.value:
        return None
    work = n * m * (features + columns)
    if work > _MOST_WORK_OF_A_GRAPH and (work > _MOST_WORK or _is_captured(x)):
        return None
    plan = device_kernel_plan(kernel.kernel, kernel.count, kernel.squarings, torch.float32, "ieee")
    return plan if plan.family.number in _FAMILIES else None


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def matmul(
    plan: DeviceKernelPlan, kernel: KernelNumbers, x: Tensor, y: Tensor, v: Tensor, dtype: torch.dtype = torch.float32, within: bool = False
) -> Tensor:
    """K(x, y)·v (N, C); with `within` y is x and the pairs i = i are left out."""
    out = torch.empty((x.shape[0], v.shape[1]), dtype=dtype, device=x.device)
    return _matmul(plan, kernel, x, y, v, out, within, form=False)


def quadratic_form(plan: DeviceKernelPlan, kernel: KernelNumbers, z: Tensor, v: Tensor) -> Tensor:
    """vᵀKv without the pairs i = i, as parts (P, C, C) that sum to it, float64."""
    programs, columns = triton.cdiv(z.shape[0], _BLOCK_N.value), v.shape[1]
    out = torch.empty((programs, columns, columns), dtype=torch.float64, device=z.device)
    return _matmul(plan, kernel, z, z, v, out, within=True, form=True)


def _matmul(
    plan: DeviceKernelPlan, kernel: KernelNumbers, x: Tensor, y: Tensor, v: Tensor, out: Tensor, within: bool, form: bool
) -> Tensor:
    x, y, v = x.contiguous(), y.contiguous(), v.contiguous()
    block_c = _padded(v.shape[1])
    launch(
        matmul_kernel, _key(plan, kernel, block_c, within, form, tensor_key(x, y, v, out)), x.device,
        (triton.cdiv(x.shape[0], _BLOCK_N.value), 1, 1),
        (x, y, v, kernel.arguments, out, x.shape[0], y.shape[0], *x.shape[1:], *v.shape[1:]),
        lambda: {"WITHIN": within, "FORM": form, "BLOCK_C": block_c, "SPEC": _spec(plan, kernel), "num_warps": 8},
    )  # fmt: skip
    return out


def gradient(
    plan: DeviceKernelPlan, kernel: KernelNumbers, x: Tensor, y: Tensor, g: Tensor, v: Tensor, upstream: Tensor | None = None
) -> Tensor:
    """The gradient of Σ_ij (g_i·v_j)·k(x_i, y_j) to x, in float32; with an upstream (C, C) that of vᵀKv, for x = y and g = v."""
    x, y, g, v = x.contiguous(), y.contiguous(), g.contiguous(), v.contiguous()
    grad, blocks = torch.empty(x.shape, dtype=torch.float32, device=x.device), triton.cdiv(x.shape[1], _BLOCK_D.value)
    block_c, alignment = _padded(v.shape[1]), None if upstream is None else tensor_key(upstream)
    launch(
        gradient_kernel, _key(plan, kernel, block_c, blocks, alignment, tensor_key(x, y, g, v, grad)), x.device,
        (triton.cdiv(x.shape[0], _BLOCK_N.value), 1, 1),
        (x, y, g, v, upstream, kernel.arguments, grad, x.shape[0], y.shape[0], *x.shape[1:], *v.shape[1:]),
        lambda: {"BLOCK_C": block_c, "BLOCKS": blocks, "SPEC": _spec(plan, kernel), "num_warps": 8},
    )  # fmt: skip
    return grad


def _key(plan: DeviceKernelPlan, kernel: KernelNumbers, *others: Hashable) -> Hashable:
    return plan, kernel.numbers, isinstance(kernel.arguments, Tensor), others


def _spec(plan: DeviceKernelPlan, kernel: KernelNumbers) -> KernelSpec:
    return KernelSpec(kernel.numbers, isinstance(kernel.arguments, Tensor), **plan.constants)


def _padded(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))
