"""SIGReg on a GPU: formulas (1) and (3) of `fastvae.reference.sigreg`.

A tile has slices in its rows and rows of z in its columns, so that a thread sums over columns that it owns. It takes one sine and one
cosine of θ = base·p. The others follow by f_{j+1} = 2·cos(2θ)·f_j − f_{j−1}, one multiply-add each, for the odd multiples of θ and then for
the even ones. Programs own their sums; there are no atomics, and results are the same bit for bit every time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.cpu.sigreg import Points, angle_coefficients
from fastvae.dispatch import accumulation_dtype
from fastvae.kernels.config import SweepConfig, column_splits, device_limits, slice_config
from fastvae.kernels.launch import integer_key, launch, tensor_key
from fastvae.kernels.products import BF16, BF16X3, IEEE, PRODUCT_OF_PRECISION, TF32, TF32X3, dot, round_tf32, split_operand
from fastvae.kernels.reductions import share_of

# Rows that a program sums over in float32; their sums are added in float64.
_MOST_ROWS = 8192


class SliceSpec(NamedTuple):
    """What the kernels are compiled for."""

    TURNS: float  # base/2π; an argument would be rounded to float32
    STEPS: int
    CHAINS: int
    FIRST: int  # the chains that a launch sums over, from here
    LAST: int  # to before here
    D: int
    DOUBLE: bool
    PRODUCT: int  # of the projections
    GRADIENT_PRODUCT: int


@triton.jit
def _cos_sin(turns):
    """(cos, sin) of 2π·turns, of any size, to the rounding of its fractional part."""
    f = turns - tl.floor(turns + 0.5)
    w = f * f
    # Of half the angle, by polynomials of least error over |f| ≤ ½.
    if turns.dtype == tl.float64:
        s = ((7.697826768224191e-07 * w - 2.1903497074626018e-05) * w + 0.0004662998161898394) * w - 0.007370430505916944
        s = ((s * w + 0.0821458865731029) * w - 0.5992645293189447) * w + 2.5501640398773007
        s = ((s * w - 5.167712780049969) * w + 3.141592653589793) * f
        c = ((-1.3479054836358117e-07 * w + 4.301203720851614e-06) * w - 0.00010463763434072599) * w + 0.0019295742401671152
        c = ((c * w - 0.025806891384027284) * w + 0.23533063035860233) * w - 1.3352627688545824
        c = ((c * w + 4.0587121264167685) * w - 4.934802200544679) * w + 1.0
    else:
        s = (0.07765591227601387 * w - 0.5982904112834275) * w + 2.550077386528912
        s = ((s * w - 5.167710076668315) * w + 3.1415926400772034) * f
        c = ((-0.024627111595228457 * w + 0.23507436832239592) * w - 1.3352399607008951) * w + 4.0587114146834375
        c = (c * w - 4.934802196986985) * w + 1.0
    return 1.0 - 2.0 * s * s, 2.0 * s * c


@triton.jit
def _operand(values, PRODUCT: tl.constexpr):
    if PRODUCT == TF32:
        values = round_tf32(values)
    return split_operand(values, PRODUCT)


@triton.jit
def _projections(
    z_ptrs, direction_ptrs, mask_n, mask_k, dtype: tl.constexpr,
    D: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p of some slices and rows, (BLOCK_M, BLOCK_N), 0 in the padding. Pointers are to the first feature of each."""
    p = tl.zeros([BLOCK_M, BLOCK_N], dtype=dtype)
    for start_d in range(0, D, BLOCK_K):
        offs_d = start_d + tl.arange(0, BLOCK_K)
        mask_d = offs_d < D
        z = tl.load(z_ptrs[:, None] + offs_d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0).to(dtype)
        a = tl.load(direction_ptrs[:, None] + offs_d[None, :], mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        z_hi, z_lo = _operand(z, PRODUCT)
        a_hi, a_lo = _operand(a, PRODUCT)
        p = dot(a_hi, a_lo, tl.trans(z_hi), tl.trans(z_lo), p, PRODUCT)
    return p


@triton.jit(do_not_specialize=["N", "splits"])
def sums_kernel(
    z_ptr,  # (B, N, D)
    direction_ptr,  # (K, D)
    sum_ptr,  # (splits, STEPS, CHAINS, 2, B, K)
    N,
    K,
    splits,
    SPEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(1), the sums over a share of the rows of one problem, for some slices."""
    # where
    D: tl.constexpr = SPEC.D
    STEPS: tl.constexpr = SPEC.STEPS
    CHAINS: tl.constexpr = SPEC.CHAINS
    FIRST: tl.constexpr = SPEC.FIRST
    LAST: tl.constexpr = SPEC.LAST
    DTYPE: tl.constexpr = tl.float64 if SPEC.DOUBLE else tl.float32
    blocks = tl.cdiv(K, BLOCK_M)
    problem, problems, split = tl.program_id(0) // blocks, tl.num_programs(0) // blocks, tl.program_id(1)
    offs_k = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_k = offs_k < K
    first, last = share_of(N, split, splits, BLOCK_N)
    z_ptr += tl.cast(problem, tl.int64) * N * D
    sums = ()
    for _ in tl.static_range(2 * (LAST - FIRST) * STEPS):
        sums += (tl.zeros([BLOCK_M], dtype=DTYPE),)

    for start_n in range(first, last, BLOCK_N):
        # load
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        z_ptrs = z_ptr + tl.cast(offs_n, tl.int64) * D
        p = _projections(z_ptrs, direction_ptr + offs_k * D, mask_n, mask_k, DTYPE, D, SPEC.PRODUCT, BLOCK_N, BLOCK_M, BLOCK_K)
        # compute; the recurrence keeps the padding at 0
        cosine, sine = _cos_sin(p * SPEC.TURNS)
        one = tl.where(mask_n, 1.0, 0.0).to(DTYPE)[None, :]
        cosine *= one
        sine *= one
        x = 2.0 - 4.0 * sine * sine
        added = ()
        for chain in tl.static_range(FIRST, LAST):
            if chain == 0:
                c, s, last_c, last_s = cosine, sine, cosine, -sine
            else:
                c, s = one - 2.0 * sine * sine, 2.0 * sine * cosine
                last_c, last_s = tl.zeros_like(p) + one, tl.zeros_like(p)
            for j in tl.static_range(STEPS):
                if j > 0:
                    next_c, next_s = x * c - last_c, x * s - last_s
                    last_c, last_s, c, s = c, s, next_c, next_s
                added += (
                    sums[2 * ((chain - FIRST) * STEPS + j)] + tl.sum(c, 1),
                    sums[2 * ((chain - FIRST) * STEPS + j) + 1] + tl.sum(s, 1),
                )
        sums = added

    # store
    size = tl.cast(problems, tl.int64) * K
    out_ptr = sum_ptr + split * (2 * STEPS * CHAINS) * size + problem * K + offs_k
    for chain in tl.static_range(FIRST, LAST):
        for j in tl.static_range(STEPS):
            for part in tl.static_range(2):
                tl.store(out_ptr + ((j * CHAINS + chain) * 2 + part) * size, sums[2 * ((chain - FIRST) * STEPS + j) + part], mask=mask_k)


@triton.jit(do_not_specialize=["N", "splits"])
def gradient_kernel(
    z_ptr,  # (B, N, D)
    direction_ptr,  # (K, D)
    coefficient_ptr,  # (B, K, STEPS, CHAINS, 2), of cos and sin in (3)
    grad_ptr,  # (splits, B, N, D)
    N,
    K,
    splits,
    SPEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(3), the gradient to a block of features of some rows, from a share of the slices."""
    # where
    D: tl.constexpr = SPEC.D
    STEPS: tl.constexpr = SPEC.STEPS
    CHAINS: tl.constexpr = SPEC.CHAINS
    DTYPE: tl.constexpr = tl.float64 if SPEC.DOUBLE else tl.float32
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks = tl.cdiv(N, BLOCK_N) * PARTS
    problem, problems, split = tl.cast(tl.program_id(0) // blocks, tl.int64), tl.num_programs(0) // blocks, tl.program_id(1)
    block = tl.program_id(0) % blocks
    offs_n = block // PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_d = block % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    row = problem * N + offs_n
    first, last = share_of(K, split, splits, BLOCK_M)
    gradient = tl.zeros([BLOCK_D, BLOCK_N], dtype=DTYPE)

    for start_k in range(first, last, BLOCK_M):
        # load
        offs_k = start_k + tl.arange(0, BLOCK_M)
        mask_k = offs_k < last
        p = _projections(z_ptr + row * D, direction_ptr + offs_k * D, mask_n, mask_k, DTYPE, D, SPEC.PRODUCT, BLOCK_N, BLOCK_M, BLOCK_K)
        # compute; coefficients of the padding are 0
        cosine, sine = _cos_sin(p * SPEC.TURNS)
        x = 2.0 - 4.0 * sine * sine
        sine_2 = 2.0 * sine * cosine
        dp = tl.zeros_like(p)
        coefficient_ptrs = coefficient_ptr + (problem * K + offs_k) * (2 * STEPS * CHAINS)
        for chain in tl.static_range(CHAINS):
            if chain == 0:
                c, s, last_c, last_s = cosine, sine, cosine, -sine
            else:
                c, s = 0.5 * x, sine_2
                last_c, last_s = tl.zeros_like(p) + 1.0, tl.zeros_like(p)
            for j in tl.static_range(STEPS):
                if j > 0:
                    next_c, next_s = x * c - last_c, x * s - last_s
                    last_c, last_s, c, s = c, s, next_c, next_s
                ptrs = coefficient_ptrs + (j * CHAINS + chain) * 2
                dp += tl.load(ptrs, mask=mask_k, other=0.0)[:, None] * c
                dp += tl.load(ptrs + 1, mask=mask_k, other=0.0)[:, None] * s
        a_ptrs = direction_ptr + offs_k[:, None] * D + offs_d[None, :]
        a_hi, a_lo = split_operand(tl.load(a_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0), SPEC.GRADIENT_PRODUCT)
        dp_hi, dp_lo = split_operand(dp, SPEC.GRADIENT_PRODUCT)
        # From zero, as a tensor core truncates long sums.
        zero = tl.zeros([BLOCK_D, BLOCK_N], dtype=DTYPE)
        gradient += dot(tl.trans(a_hi), tl.trans(a_lo), dp_hi, dp_lo, zero, SPEC.GRADIENT_PRODUCT)

    # store
    out_ptrs = grad_ptr + (tl.cast(split, tl.int64) * problems * N + row)[None, :] * D + offs_d[:, None]
    tl.store(out_ptrs, gradient, mask=mask_n[None, :] & mask_d[:, None])


def forward(z: Tensor, directions: Tensor, points: Points, precision: str) -> Tensor:
    """The sums, (steps, chains, 2, B, K) in float64, for z (B, N, D) and directions (D, K)."""
    problems, n, _ = z.shape
    slices = directions.shape[1]
    config = _config(z, precision, gradient=False)
    blocks = triton.cdiv(slices, config.block_m)
    splits = column_splits(blocks * problems, triton.cdiv(n, config.block_n), device_limits(z.device).multiprocessors)
    splits = max(splits, triton.cdiv(n, _MOST_ROWS))
    shape = splits, points.steps, points.chains, 2, problems, slices
    sums = torch.empty(shape, dtype=accumulation_dtype(z.dtype), device=z.device)
    spec = spec_of(z, points, precision)
    # In float64 the sums of both chains take more registers than there are.
    for first in range(points.chains) if spec.DOUBLE else (0,):
        own = spec._replace(FIRST=first, LAST=first + 1) if spec.DOUBLE else spec
        _launch(sums_kernel, (blocks * problems, splits, 1), (z, directions, sums), own, config)
    return sums.sum(0, dtype=torch.float64)


def backward(grad: Tensor, z: Tensor, directions: Tensor, points: Points, precision: str) -> Tensor:
    """The gradient to z (B, N, D), in its dtype, from that to the sums."""
    problems, n, dim = z.shape
    config = _config(z, precision, gradient=True)
    blocks = triton.cdiv(n, config.block_n) * triton.cdiv(dim, config.block_d)
    tiles = triton.cdiv(directions.shape[1], config.block_m)
    splits = column_splits(blocks * problems, tiles, device_limits(z.device).multiprocessors)
    dtype = accumulation_dtype(z.dtype)
    out = torch.empty((splits, problems, n, dim), dtype=dtype, device=z.device)
    coefficients = angle_coefficients(grad, points).movedim((3, 4), (0, 1)).to(dtype).contiguous()
    _launch(gradient_kernel, (blocks * problems, splits, 1), (z, directions, coefficients, out), spec_of(z, points, precision), config)
    return (out[0] if splits == 1 else out.sum(0)).to(z.dtype)


def spec_of(z: Tensor, points: Points, precision: str) -> SliceSpec:
    """An error of p is multiplied by t, and products are not what takes time: "highest" takes three of TF32 for p. The gradient takes
    bfloat16, whose operands a tensor core transposes, where it can."""
    double = z.dtype == torch.float64
    product = IEEE.value if double else TF32X3.value if precision == "highest" else PRODUCT_OF_PRECISION[precision]
    gradient = product if product in (IEEE.value, BF16.value) else BF16X3.value
    turns = points.base / (2 * math.pi)
    return SliceSpec(turns, points.steps, points.chains, 0, points.chains, z.shape[-1], double, product, gradient)


def _config(z: Tensor, precision: str, gradient: bool) -> SweepConfig:
    precision = "float64" if z.dtype == torch.float64 else precision
    return slice_config(z.shape[-1], precision, gradient, device_limits(z.device).architecture)


def _launch(kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], spec: SliceSpec, config: SweepConfig) -> None:
    z, directions, *others = tensors
    z, directions = z.contiguous(), directions.to(accumulation_dtype(z.dtype)).T.contiguous()
    n, slices = z.shape[1], directions.shape[0]
    key = spec, config, tensor_key(z, directions, *others), integer_key(slices)
    args = (z, directions, *others, n, slices, grid[1])
    without = () if kernel is gradient_kernel else ("BLOCK_D",)
    launch(kernel, key, z.device, grid, args, lambda: {"SPEC": spec, **config.launch(*without)})
