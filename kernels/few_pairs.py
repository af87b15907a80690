"""K(x, y)·v, its gradient, and vᵀKv of few pairs on a GPU, each in one launch: what a small problem waits for are launches.

In float32, for inputs of no more. Distances are sums of squared differences, so that nothing has to be known of the data before: the
preparation of `fastvae.kernels.kernel_matmul`, which chooses how products are taken, falls away.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae import kernel_sums as formulas
from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.pairs import GAUSSIAN, MAX_HOISTED, QUADRATIC, QUADRATIC_HALF, QUADRATIC_ONE, QUADRATIC_STEEP, radial
from fastvae.kernels.prepare import Evaluation, evaluation_of, gain_of, gammas_of, load_numbers

_SHIFT_BELOW = tl.constexpr(formulas.SHIFT_BELOW)
_LN_2 = tl.constexpr(1 / formulas.LOG2_E)
_FAMILIES = (GAUSSIAN.value, QUADRATIC.value, QUADRATIC_HALF.value, QUADRATIC_ONE.value, QUADRATIC_STEEP.value)

# Rows of a program and columns of a step; features of a step of the distances and of the pull.
_BLOCK_N, _BLOCK_M, _UNROLL, _BLOCK_D = 8, 256, 4, 8

# Most multiplications for which this is faster than sweeps; fewer in a CUDA graph, which costs the host nothing.
# Measured on an H200: stage "few pairs" in benchmarks/results/gpu.jsonl.
_MOST_WORK, _MOST_WORK_OF_A_GRAPH = 1 << 29, 1 << 24
# Beyond, the kernels spill registers.
_MOST_FEATURES, _MOST_COLUMNS = 64, 32


@triton.jit
def _kernel_of(numbers, NUMBERS: tl.constexpr, ON_DEVICE: tl.constexpr, FAMILY: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """γ of the widest bandwidth, the scale of the points, the factor of all sums, and as of `load_table` and `load_parameters`."""
    values = load_numbers(numbers, NUMBERS, ON_DEVICE)
    gammas = gammas_of(values, FAMILY, BANDWIDTHS, 1)
    scale = tl.sqrt(gain_of(gammas[0], values, FAMILY, BANDWIDTHS)).to(tl.float32)
    unit = values[BANDWIDTHS]
    table = ()
    if BANDWIDTHS > 1:
        unit = unit * 0.0 + 1.0
        for b in tl.static_range(BANDWIDTHS):
            table += ((gammas[b] / gammas[0]).to(tl.float32),)
        for b in tl.static_range(BANDWIDTHS):
            table += (values[BANDWIDTHS + b].to(tl.float32),)
        for b in tl.static_range(BANDWIDTHS):
            table += ((values[BANDWIDTHS + b] * (gammas[b] / gammas[0])).to(tl.float32),)
    parameters = ()
    if FAMILY != GAUSSIAN:
        parameters += (values[2 * BANDWIDTHS].to(tl.float32),)
    return gammas[0], scale, unit, table, parameters


@triton.jit
def _exponent(x_ptrs, y_ptrs, mask_n, mask_m, features, scale, x_poison, y_poison, UNROLL: tl.constexpr):
    """What `radial` takes of the squared distances of a block of rows and columns; and 0, or nan if one has a number that is not finite."""
    exponent = tl.zeros([mask_n.shape[0], mask_m.shape[0]], dtype=tl.float32)
    for start_k in range(0, features, UNROLL):
        for n in tl.static_range(UNROLL):
            inside = start_k + n < features
            x = tl.load(x_ptrs + (start_k + n), mask=mask_n & inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptrs + (start_k + n), mask=mask_m & inside, other=0.0).to(tl.float32)
            difference = (x[:, None] - y[None, :]) * scale
            exponent -= difference * difference
            x_poison += x * 0.0
            y_poison += y * 0.0
    return 0.5 * exponent, x_poison, y_poison


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
    NUMBERS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    WITHIN: tl.constexpr,  # x and y are the same sample, without the pairs i = i
    FORM: tl.constexpr,  # vᵀ·(K·v) of the rows of a program
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of rows of K·v."""
    # where
    offs_n, offs_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < n, offs_c < columns
    _gamma, scale, unit, table, parameters = _kernel_of(numbers, NUMBERS, ON_DEVICE, FAMILY, BANDWIDTHS)

    # load and compute
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64)
    total = tl.zeros([BLOCK_C], dtype=tl.float64)
    shift = tl.zeros([], dtype=tl.float32)
    x_poison = tl.zeros([BLOCK_N], dtype=tl.float32)
    y_poison = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start_m in range(0, m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        exponent, x_poison, y_poison = _exponent(
            x_ptr + offs_n * features, y_ptr + offs_m * features, mask_n, mask_m, features, scale, x_poison, y_poison, UNROLL
        )
        if start_m == 0:
            # Sums of k − 1 where most are near one.
            pairs = tl.minimum(n - tl.program_id(0) * BLOCK_N, BLOCK_N) * tl.minimum(m, BLOCK_M)
            spread = -tl.sum(tl.where(mask_n[:, None] & mask_m[None, :], exponent, 0.0)) / pairs
            spread *= _LN_2 if FAMILY == GAUSSIAN else parameters[0]
            if BANDWIDTHS == 1:
                shift = tl.where(spread < _SHIFT_BELOW, 1.0, 0.0).to(tl.float32)
            else:
                for b in tl.static_range(BANDWIDTHS):
                    shift += tl.where(table[b] * spread < _SHIFT_BELOW, table[BANDWIDTHS + b], 0.0)
        value, _ = radial(exponent, table, v_ptr, parameters, shift, 0.0, FAMILY, False, BANDWIDTHS, SQUARINGS)
        if WITHIN:
            value = tl.where(offs_n[:, None] != offs_m[None, :], value, 0.0)
        v = tl.load(v_ptr + offs_m[:, None] * columns + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        total += tl.sum(v.to(tl.float64), 0)
        out += tl.sum(value[:, :, None] * v[None, :, :], 1).to(tl.float64)

    # store
    mask = mask_n[:, None] & mask_c[None, :]
    paired = tl.zeros_like(out) + total[None, :]
    if WITHIN:
        paired -= tl.load(v_ptr + offs_n[:, None] * columns + offs_c[None, :], mask=mask, other=0.0).to(tl.float64)
    # What is not finite in v is in the total.
    poison = x_poison + tl.sum(y_poison) + tl.sum(total * 0.0).to(tl.float32)
    out = (out + paired * shift) * unit + poison[:, None]
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
    upstream_ptr,  # (columns, columns), float64, of a quadratic form
    numbers,
    grad_ptr,  # (n, features)
    n,
    m,
    features,
    columns,
    NUMBERS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    FORM: tl.constexpr,  # x and y are the same sample, without the pairs i = i, and v·(A + Aᵀ) of the upstream A takes the place of g
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # features of a step of the pull, of which there are so many:
    BLOCKS: tl.constexpr,
):
    """The gradient of Σ_ij (g_i·v_j)·k_ij to a block of rows of x."""
    # where
    offs_n, offs_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < n, offs_c < columns
    gamma, scale, unit, table, parameters = _kernel_of(numbers, NUMBERS, ON_DEVICE, FAMILY, BANDWIDTHS)

    # load
    if FORM:
        product = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float64)
        for column in range(columns):
            weight = tl.load(v_ptr + offs_n * columns + column, mask=mask_n, other=0.0).to(tl.float64)
            upstream = tl.load(upstream_ptr + column * columns + offs_c, mask=mask_c, other=0.0)
            upstream += tl.load(upstream_ptr + offs_c * columns + column, mask=mask_c, other=0.0)
            product += weight[:, None] * upstream[None, :]
        g = product.to(tl.float32)
    else:
        mask_g = mask_n[:, None] & mask_c[None, :]
        g = tl.load(g_ptr + offs_n[:, None] * columns + offs_c[None, :], mask=mask_g, other=0.0).to(tl.float32)

    # compute
    pulls = ()
    for _block in tl.static_range(BLOCKS):
        pulls += (tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32),)
    x_poison = tl.zeros([BLOCK_N], dtype=tl.float32)
    y_poison = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start_m in range(0, m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        exponent, x_poison, y_poison = _exponent(
            x_ptr + offs_n * features, y_ptr + offs_m * features, mask_n, mask_m, features, scale, x_poison, y_poison, UNROLL
        )
        _, slope = radial(exponent, table, v_ptr, parameters, 0.0, 0.0, FAMILY, True, BANDWIDTHS, SQUARINGS)
        v = tl.load(v_ptr + offs_m[:, None] * columns + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        slope *= tl.dot(g, tl.trans(v), input_precision="ieee", out_dtype=tl.float32)
        if FORM:
            slope = tl.where(offs_n[:, None] != offs_m[None, :], slope, 0.0)
        sums = ()
        for block in tl.static_range(BLOCKS):
            offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < features)[None, :]
            x = tl.load(x_ptr + offs_n[:, None] * features + offs_d[None, :], mask=mask_n[:, None] & mask_d, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + offs_m[:, None] * features + offs_d[None, :], mask=mask_m[:, None] & mask_d, other=0.0).to(tl.float32)
            sums += (pulls[block] + tl.sum(slope[:, :, None] * (y[None, :, :] - x[:, None, :]), 1),)
        pulls = sums

    # store
    poison = x_poison + tl.sum(y_poison)
    for block in tl.static_range(BLOCKS):
        offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        pull = pulls[block].to(tl.float64)
        # Of an infinite number among g and v the sums are infinite.
        grad = 2.0 * gamma * unit * pull + (poison[:, None] + pull * 0.0)
        mask = mask_n[:, None] & (offs_d < features)[None, :]
        tl.store(grad_ptr + offs_n[:, None] * features + offs_d[None, :], grad.to(tl.float32), mask=mask)


def evaluation_of_few(kernel: KernelNumbers, x: Tensor, y: Tensor, columns: int) -> Evaluation | None:
    """How kernels here evaluate it; None where they don't."""
    (n, features), m = x.shape, y.shape[0]
    if x.dtype == torch.float64 or features > _MOST_FEATURES or columns > _MOST_COLUMNS or kernel.count > MAX_HOISTED.value:
        return None
    work = n * m * (features + columns)
    if work > _MOST_WORK_OF_A_GRAPH and (work > _MOST_WORK or _is_captured(x)):
        return None
    evaluation = evaluation_of(kernel.kernel, kernel.count, kernel.squarings, torch.float32, "ieee")
    return evaluation if evaluation.family in _FAMILIES else None


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def matmul(
    evaluation: Evaluation,
    kernel: KernelNumbers,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    dtype: torch.dtype = torch.float32,
    within: bool = False,
) -> Tensor:
    """K(x, y)·v (N, C); if `within` y is x and the pairs i = i are left out."""
    out = torch.empty((x.shape[0], v.shape[1]), dtype=dtype, device=x.device)
    return _matmul(evaluation, kernel, x, y, v, out, within, form=False)


def quadratic_form(evaluation: Evaluation, kernel: KernelNumbers, z: Tensor, v: Tensor) -> Tensor:
    """vᵀKv without the pairs i = i, as parts (P, C, C) that sum to it, float64."""
    programs, columns = triton.cdiv(z.shape[0], _BLOCK_N), v.shape[1]
    out = torch.empty((programs, columns, columns), dtype=torch.float64, device=z.device)
    return _matmul(evaluation, kernel, z, z, v, out, within=True, form=True)


def _matmul(
    evaluation: Evaluation,
    kernel: KernelNumbers,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    out: Tensor,
    within: bool,
    form: bool,
) -> Tensor:
    x, y, v = x.contiguous(), y.contiguous(), v.contiguous()
    block_c = _padded(v.shape[1])
    launch(
        matmul_kernel, _key(evaluation, kernel, block_c, within, form, tensor_key(x, y, v, out)), x.device,
        (triton.cdiv(x.shape[0], _BLOCK_N), 1, 1), (x, y, v, kernel.arguments, out, x.shape[0], y.shape[0], *x.shape[1:], *v.shape[1:]),
        lambda: {**_constants(evaluation, kernel, block_c), "WITHIN": within, "FORM": form},
    )  # fmt: skip
    return out


def gradient(
    evaluation: Evaluation, kernel: KernelNumbers, x: Tensor, y: Tensor, g: Tensor, v: Tensor, upstream: Tensor | None = None
) -> Tensor:
    """The gradient of Σ_ij (g_i·v_j)·k(x_i, y_j) to x, in float32; with an upstream (C, C) that of vᵀKv, for x = y and g = v."""
    x, y, g, v = x.contiguous(), y.contiguous(), g.contiguous(), v.contiguous()
    grad, blocks = torch.empty(x.shape, dtype=torch.float32, device=x.device), triton.cdiv(x.shape[1], _BLOCK_D)
    tensors, block_c = (x, y, g, v, g if upstream is None else upstream, grad), _padded(v.shape[1])
    launch(
        gradient_kernel, _key(evaluation, kernel, block_c, blocks, upstream is not None, tensor_key(*tensors)), x.device,
        (triton.cdiv(x.shape[0], _BLOCK_N), 1, 1),
        (*tensors[:5], kernel.arguments, grad, x.shape[0], y.shape[0], *x.shape[1:], *v.shape[1:]),
        lambda: {
            **_constants(evaluation, kernel, block_c), "FORM": upstream is not None, "BLOCK_D": _BLOCK_D, "BLOCKS": blocks
        },
    )  # fmt: skip
    return grad


def _key(evaluation: Evaluation, kernel: KernelNumbers, *others: Hashable) -> Hashable:
    return evaluation, kernel.numbers, isinstance(kernel.arguments, Tensor), others


def _constants(evaluation: Evaluation, kernel: KernelNumbers, block_c: int) -> dict[str, int]:
    return {
        "NUMBERS": kernel.numbers, "ON_DEVICE": isinstance(kernel.arguments, Tensor), **evaluation.constants,
        "BLOCK_N": _BLOCK_N, "BLOCK_M": _BLOCK_M, "BLOCK_C": block_c, "UNROLL": _UNROLL, "num_warps": 8,
    }  # fmt: skip


def _padded(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))
