"""Reparameterise + KL on a GPU: formulas (1) to (4) of `fastvae.reference.reparameterize_kl`, each array moved once.

Arrays are (B, R, D) as in `fastvae.layouts`. A program owns a tile of rows and features of one b, and its sum of the KL. The noise is read,
or generated from a seed wherever it is needed and then never stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import LOG2_E
from fastvae.kernels.config import RowConfig, row_config
from fastvae.kernels.launch import launch, tensor_key
from fastvae.layouts import Layout, Rows
from fastvae.parametrisation import LINEAR, Parametrisation

# exp(x) = exp2(_LOG2_E·x); tl.exp takes three instructions more.
_LOG2_E = tl.constexpr(LOG2_E)
_HALF_LOG2_E = tl.constexpr(0.5 * LOG2_E)
# Below it log softplus(s) is s.
_LINEAR = tl.constexpr(LINEAR)
# The least normal numbers.
_TINY_32, _TINY_64 = tl.constexpr(2.0**-126), tl.constexpr(2.0**-1022)


class Array(NamedTuple):
    """(B, R, D) with contiguous features, and strides in units of VECTOR elements, so that the compiler knows them to be multiples."""

    ptr: Any
    stride_b: Any
    stride_r: Any


class Inputs(NamedTuple):
    """μ and s; ε, a seed or None; and μ₀ and s₀, or None for N(0, I)."""

    mu: Any
    s: Any
    noise: Any
    prior_mu: Any
    prior_s: Any


class Gradients(NamedTuple):
    """To z and KL; to μ, s, μ₀ and s₀. Those that are not there are None."""

    z: Any
    kl: Any
    mu: Any
    s: Any
    prior_mu: Any
    prior_s: Any


class Sizes(NamedTuple):
    R: Any
    D: Any  # in units of VECTOR elements
    blocks_r: Any
    blocks_d: Any


class RowSpec(NamedTuple):
    """What the compiler knows about a call."""

    SCALE: str
    OFFSET: float
    LOG_OFFSET: float
    BOUNDED: bool
    LOW: float
    HIGH: float
    SOFT_CLAMP: float  # 0 for none
    Z: bool
    SEEDED: bool
    PRIOR: bool
    PRIOR_GRADIENT: bool
    SUM_R: bool  # over which dimensions the KL is summed
    SUM_D: bool  # backward: one gradient to the KL is for a whole row
    BATCHED: bool  # more than one b
    SPLIT_D: bool  # more than one block of features
    MASK_KL: bool  # the KL of a padded element is not zero
    VECTOR: int
    BLOCK_N: int
    BLOCK_D: int


class Place(NamedTuple):
    """Where a program's tile starts, and its rows and features from there on."""

    block_r: Any  # its number among the blocks of rows of all b
    block_d: Any
    b: Any
    block_of_b: Any  # its number among the blocks of rows of this b
    first_r: Any
    first_d: Any
    offs_n: Any
    offs_d: Any
    mask_n: Any
    mask_d: Any


class Gaussian(NamedTuple):
    """μ and s within their bounds, σ, log σ², and s before it was bounded."""

    mu: Any
    s: Any
    std: Any
    logvar: Any
    unbounded_s: Any


@triton.jit
def forward_kernel(
    inputs: Inputs,
    z: Array,
    kl: Array,  # a sum for each tile, or the KL itself if there is only one tile to a sum
    sizes: Sizes,
    SPEC: tl.constexpr,
):
    dtype: tl.constexpr = kl.ptr.dtype.element_ty
    place = _place(sizes, SPEC)
    mask = place.mask_n[:, None] & place.mask_d[None, :]

    # load
    q = _load_gaussian(inputs.mu, inputs.s, place, dtype, SPEC)

    # compute z by formula (1)
    if SPEC.Z:
        eps = _load_noise(inputs.noise, place, sizes, SPEC).to(dtype)
        tl.store(_pointers(z, place, SPEC), (q.mu + q.std * eps).to(z.ptr.dtype.element_ty), mask=mask)

    # compute the KL by formula (2)
    if SPEC.PRIOR:
        p = _load_gaussian(inputs.prior_mu, inputs.prior_s, place, dtype, SPEC)
        t, ratio, _ = _relative(q, p, SPEC)
        twice_kl = t * t + (ratio * ratio - 1) - (q.logvar - p.logvar)
    else:
        twice_kl = q.mu * q.mu + (q.std * q.std - 1) - q.logvar
    if SPEC.MASK_KL:
        twice_kl = tl.where(mask, twice_kl, 0.0)

    # store
    if SPEC.SUM_R and SPEC.SUM_D:
        tl.store(kl.ptr + tl.program_id(0), 0.5 * tl.sum(twice_kl))
    elif SPEC.SUM_R:
        row = kl.ptr + place.block_r.to(tl.int64) * sizes.D * SPEC.VECTOR + place.first_d
        tl.store(row + place.offs_d, 0.5 * tl.sum(twice_kl, 0), mask=place.mask_d)
    elif SPEC.SUM_D:
        first = kl.ptr + (place.b * sizes.R + place.first_r) * sizes.blocks_d + place.block_d
        tl.store(first + place.offs_n * sizes.blocks_d, 0.5 * tl.sum(twice_kl, 1), mask=place.mask_n)
    else:
        tl.store(_pointers(kl, place, SPEC), 0.5 * twice_kl, mask=mask)


@triton.jit
def backward_kernel(grads: Gradients, inputs: Inputs, sizes: Sizes, SPEC: tl.constexpr):
    dtype: tl.constexpr = grads.kl.ptr.dtype.element_ty
    place = _place(sizes, SPEC)
    mask = place.mask_n[:, None] & place.mask_d[None, :]

    # load
    if SPEC.SUM_D:
        rows = grads.kl.ptr + place.b * grads.kl.stride_b + (place.first_r + place.offs_n) * grads.kl.stride_r
        dkl = tl.load(rows, mask=place.mask_n, other=0.0)[:, None]
    else:
        dkl = tl.load(_pointers(grads.kl, place, SPEC), mask=mask, other=0.0)
    if SPEC.Z:
        dz = tl.load(_pointers(grads.z, place, SPEC), mask=mask, other=0.0).to(dtype)
        eps = _load_noise(inputs.noise, place, sizes, SPEC).to(dtype)
    q = _load_gaussian(inputs.mu, inputs.s, place, dtype, SPEC)

    # compute the gradients by formulas (3) and (4)
    if SPEC.PRIOR:
        p = _load_gaussian(inputs.prior_mu, inputs.prior_s, place, dtype, SPEC)
        t, ratio, prior_std = _relative(q, p, SPEC)
        grad_mu = dkl * t / prior_std
        if SPEC.PRIOR_GRADIENT:
            _store_gradients(grads.prior_mu, grads.prior_s, -grad_mu, dkl * (1 - t * t - ratio * ratio), p, place, SPEC)
    else:
        ratio = q.std
        grad_mu = dkl * q.mu
    grad_log_std = dkl * (ratio * ratio - 1)
    if SPEC.Z:
        grad_mu = dz + grad_mu
        grad_log_std = dz * eps * q.std + grad_log_std

    # store
    _store_gradients(grads.mu, grads.s, grad_mu, grad_log_std, q, place, SPEC)


@triton.jit
def _place(sizes: Sizes, SPEC: tl.constexpr):
    block_r = tl.program_id(0)
    block_d = tl.cast(0, tl.int32)
    if SPEC.SPLIT_D:
        block_d = block_r % sizes.blocks_d
        block_r = block_r // sizes.blocks_d
    b = tl.cast(0, tl.int32)
    block_of_b = block_r
    if SPEC.BATCHED:
        b = block_r // sizes.blocks_r
        block_of_b = block_r % sizes.blocks_r
    # 64 bits for where the tile starts, 32 within it
    first_r = block_of_b.to(tl.int64) * SPEC.BLOCK_N
    first_d = block_d.to(tl.int64) * SPEC.BLOCK_D
    offs_n = tl.arange(0, SPEC.BLOCK_N)
    offs_d = tl.arange(0, SPEC.BLOCK_D)
    mask_n = offs_n < sizes.R - first_r
    mask_d = offs_d < tl.cast(sizes.D, tl.int64) * SPEC.VECTOR - first_d
    return Place(block_r, block_d, b.to(tl.int64), block_of_b.to(tl.int64), first_r, first_d, offs_n, offs_d, mask_n, mask_d)


@triton.jit
def _pointers(array: Array, place: Place, SPEC: tl.constexpr):
    VECTOR: tl.constexpr = SPEC.VECTOR
    BYTES: tl.constexpr = VECTOR * array.ptr.dtype.element_ty.primitive_bitwidth // 8
    tl.assume(array.stride_r >= 0)  # then a product takes one instruction
    first = array.ptr + place.b * array.stride_b * VECTOR + place.block_of_b * array.stride_r * (VECTOR * SPEC.BLOCK_N) + place.first_d
    # Of halves of an array the second often starts at no multiple of 16 bytes, but always at one of a vector.
    first = tl.multiple_of(first, BYTES)
    return first + (place.offs_n * VECTOR)[:, None].to(tl.int64) * array.stride_r + place.offs_d[None, :]


@triton.jit
def _load_gaussian(mu_array: Array, s_array: Array, place: Place, dtype: tl.constexpr, SPEC: tl.constexpr):
    """μ and σ of a tile. A padded element has μ = 0 and, but for an offset, σ = 1, as far as the bounds allow."""
    mask = place.mask_n[:, None] & place.mask_d[None, :]
    S: tl.constexpr = 1.0 if SPEC.SCALE == "std" or SPEC.SCALE == "variance" else 0.0
    mu = tl.load(_pointers(mu_array, place, SPEC), mask=mask, other=0.0).to(dtype)
    unbounded_s = tl.load(_pointers(s_array, place, SPEC), mask=mask, other=S).to(dtype)
    s = unbounded_s
    if SPEC.SOFT_CLAMP != 0:
        mu = SPEC.SOFT_CLAMP * tanh(mu / SPEC.SOFT_CLAMP)
        s = SPEC.SOFT_CLAMP * tanh(s / SPEC.SOFT_CLAMP)
    if SPEC.BOUNDED:
        # tl.clamp would lose nan.
        s = tl.where(s < SPEC.LOW, SPEC.LOW, s)
        s = tl.where(s > SPEC.HIGH, SPEC.HIGH, s)
    std, logvar = _spread(s, SPEC)
    return Gaussian(mu, s, std, logvar, unbounded_s)


@triton.jit
def _spread(s, SPEC: tl.constexpr):
    """σ and log σ², as `fastvae.parametrisation` has them."""
    if SPEC.SCALE == "logvar" and SPEC.OFFSET == 0:
        std = tl.exp2(s * _HALF_LOG2_E)
        logvar = s
    elif SPEC.SCALE == "log_std" and SPEC.OFFSET == 0:
        std = tl.exp2(s * _LOG2_E)
        logvar = 2 * s
    elif SPEC.SCALE == "logvar" or SPEC.SCALE == "variance":
        var = (tl.exp2(s * _LOG2_E) if SPEC.SCALE == "logvar" else s) + SPEC.OFFSET
        std = tl.sqrt(var)
        logvar = tl.log(var)
    else:
        if SPEC.SCALE == "log_std":
            std = tl.exp2(s * _LOG2_E) + SPEC.OFFSET
        elif SPEC.SCALE == "softplus":
            std = softplus(s) + SPEC.OFFSET
        else:
            std = s + SPEC.OFFSET
        logvar = 2 * tl.log(std)
        if SPEC.SCALE == "softplus" and SPEC.OFFSET == 0:
            logvar = tl.where(s < _LINEAR, 2 * s, logvar)
    return std, logvar


@triton.jit
def _relative(q: Gaussian, p: Gaussian, SPEC: tl.constexpr):
    """(μ − μ₀)/σ₀, σ/σ₀ and σ₀, also where both σ underflow, as `fastvae.parametrisation` has them."""
    TINY: tl.constexpr = _TINY_64 if p.std.dtype == tl.float64 else _TINY_32
    std = tl.where(p.std < TINY, TINY, p.std)
    ratio = q.std / std
    if SPEC.OFFSET == 0 and SPEC.SCALE != "std" and SPEC.SCALE != "variance":
        FACTOR: tl.constexpr = _HALF_LOG2_E if SPEC.SCALE == "logvar" else _LOG2_E
        ratio = tl.where(p.std < TINY, tl.exp2((q.s - p.s) * FACTOR), ratio)
    return (q.mu - p.mu) / std, ratio, std


@triton.jit
def _store_gradients(mu_array: Array, s_array: Array, grad_mu, grad_log_std, q: Gaussian, place: Place, SPEC: tl.constexpr):
    """From the gradients to the bounded μ and to log σ, those to μ and s."""
    if SPEC.SCALE == "variance":
        grad_s = 0.5 * grad_log_std / (q.std * q.std)
    elif SPEC.SCALE == "std":
        grad_s = grad_log_std / q.std
    elif SPEC.SCALE == "softplus":
        grad_s = grad_log_std * tl.where(q.s > 20, 1.0, sigmoid(q.s)) / q.std
        if SPEC.OFFSET == 0:
            grad_s = tl.where(q.s < _LINEAR, grad_log_std, grad_s)
    else:
        FACTOR: tl.constexpr = 0.5 if SPEC.SCALE == "logvar" else 1.0
        grad_s = FACTOR * grad_log_std
        if SPEC.OFFSET != 0:
            # exp(s)/(exp(s) + o), without overflow
            grad_s *= sigmoid(q.s - SPEC.LOG_OFFSET)
    if SPEC.SOFT_CLAMP != 0:
        t = q.mu / SPEC.SOFT_CLAMP
        grad_mu *= 1 - t * t
        t = q.s / SPEC.SOFT_CLAMP
        grad_s *= 1 - t * t
    if SPEC.BOUNDED:
        # As in torch.clamp, a value at a bound has its gradient.
        grad_s = tl.where((q.unbounded_s < SPEC.LOW) | (q.unbounded_s > SPEC.HIGH), 0.0, grad_s)
    mask = place.mask_n[:, None] & place.mask_d[None, :]
    tl.store(_pointers(mu_array, place, SPEC), grad_mu.to(mu_array.ptr.dtype.element_ty), mask=mask)
    tl.store(_pointers(s_array, place, SPEC), grad_s.to(s_array.ptr.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """Accurate near zero too, where 1 − exp(−2·|x|) would lose digits: there Lambert's continued fraction, to 1e-18 below ½."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2 * _LOG2_E))
    far = (1 - e) / (1 + e)
    near_x = tl.where(size > 0.5, 0.0, x)
    q = near_x * near_x
    top = 34459425 + q * (4729725 + q * (135135 + q * (990 + q)))
    bottom = 34459425 + q * (16216200 + q * (945945 + q * (13860 + q * 45)))
    return tl.where(size > 0.5, tl.where(x < 0, -far, far), near_x * top / bottom)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and x above 20, as in PyTorch. The last term restores the digits of exp(x) that 1 + exp(x) has lost."""
    e = tl.exp2(tl.where(x > 20, 20.0, x) * _LOG2_E)
    u = 1 + e
    return tl.where(x > 20, x, tl.log(u) + (e - (u - 1)) / u)


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * _LOG2_E)
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _load_noise(noise: Array, place: Place, sizes: Sizes, SPEC: tl.constexpr):
    if SPEC.SEEDED:
        eps = normal(tl.load(noise.ptr), place.b * sizes.R + place.first_r, place.first_d, SPEC.BLOCK_N, SPEC.BLOCK_D)
    else:
        eps = tl.load(_pointers(noise, place, SPEC), mask=place.mask_n[:, None] & place.mask_d[None, :], other=0.0)
    return eps


@triton.jit
def normal(seed, first_n, start_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """ε of a block. Columns 4q to 4q + 3 of row n come from Philox's counter (q, n), so that they do not depend on the blocks."""
    first_quad = tl.cast(start_d // 4, tl.int32)
    quad = first_quad + tl.arange(0, BLOCK_D // 4)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    row = first_n + tl.arange(0, BLOCK_N)[:, None] + tl.zeros_like(quad)
    x0, x1, x2, x3 = tl.philox(seed, quad, row.to(tl.int32), (row >> 32).to(tl.int32), tl.zeros_like(quad))
    e0, e1 = normal_pair(x0, x1)
    e2, e3 = normal_pair(x2, x3)
    return tl.join(tl.join(e0, e2), tl.join(e1, e3)).reshape([BLOCK_N, BLOCK_D])


@triton.jit
def normal_pair(x, y):
    """The Box–Muller transform of two random words: x gives a length of up to 6.8, y an angle in half a turn and a sign.

    The polynomials are accurate to 1e-6. tl.log takes three times the instructions, and tl.cos, which reduces any argument, ten times.
    """
    u = (x.to(tl.float32) * 2.0**-32 + 2.0**-33).to(tl.int32, bitcast=True)
    # −2·ln u = halvings·2·ln 2 − 2·ln(1 − r/2)
    halvings = (126 - (u >> 23)).to(tl.float32)
    r = 2 - ((u & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    series = 1.0000008 + r * (0.24991871 + r * (0.084602987 + r * (0.023987969 + r * (0.031595609 + r * (-0.018962292 + r * 0.015149004)))))
    # Rounded up to u = 1, the largest words would have a square just below zero.
    length = tl.sqrt(tl.maximum(halvings * 1.3862944 + r * series, 0.0))
    length = tl.where((y & 1) == 1, -length, length)
    turn = ((y >> 9) | 0x3F800000).to(tl.float32, bitcast=True) * 2 - 3
    q = turn * turn
    cos = 1.0 + q * (-1.2336982 + q * (0.25365067 + q * (-0.020810515 + q * 0.00085813447)))
    sin = turn * (1.5707951 + q * (-0.64592572 + q * (0.079500007 - q * 0.0043705859)))
    return length * cos, length * sin


def forward(layout: Layout, inputs: Any, parametrisation: Parametrisation, z: Rows | None, kl: Tensor) -> None:
    """Fills z, unless it is None, and KL, whose features are in the order of the layout.

    `inputs` are μ, s, ε, a seed or None, μ₀ and s₀, as `Rows`.
    """
    sum_r, sum_d = (layout.sums_sizes[n] != layout.sizes[n] for n in (1, 2))
    arrays = [*inputs, z, None if sum_r or sum_d else layout.rows_of_sums(kl)]
    plan = _planned(layout.sizes, arrays, parametrisation, sum_r, sum_d, whole_sums=True)
    parts = kl if plan.parts.numel() == kl.numel() else kl.new_empty(plan.parts)
    mu, s, noise, prior_mu, prior_s, out, each_kl = plan.arrays(arrays)
    arguments = Inputs(mu, s, noise, prior_mu, prior_s), out, each_kl or Array(parts, 0, 0), plan.sizes
    _launch(forward_kernel, plan, arguments, [*arrays[:-1], Rows(parts, 0, 0)])
    if parts is not kl:
        sums = layout.view_sums(kl)
        torch.sum(parts, [dim for dim, size in enumerate(sums.shape) if size != parts.shape[dim]], keepdim=True, out=sums)


def backward(
    layout: Layout, grad_z: Rows | None, grad_kl: Tensor, inputs: Any, parametrisation: Parametrisation, grads: Sequence[Rows | None]
) -> None:
    """Fills the gradients to μ, s, μ₀ and s₀ from dKL (B, R, D), of size 1 where the KL was summed over."""
    (b, r, d), (stride_b, stride_r, stride_d) = grad_kl.shape, grad_kl.stride()
    # One number for each row if the KL was summed over D, or if the gradient is a number that was expanded.
    sum_d = stride_d == 0 or layout.sums_sizes[2] != layout.sizes[2]
    if stride_d != 1 and d > 1 and not sum_d:
        grad_kl = grad_kl.contiguous()
        stride_b, stride_r, _ = grad_kl.stride()
    dkl = Rows(grad_kl, stride_b if b > 1 else 0, stride_r if r > 1 else 0)
    arrays = [*inputs, grad_z, None if sum_d else dkl, *grads]
    plan = _planned(layout.sizes, arrays, parametrisation, False, sum_d)
    mu, s, noise, prior_mu, prior_s, dz, each_dkl, *outs = plan.arrays(arrays)
    arguments = Gradients(dz, each_dkl or Array(*dkl), *outs), Inputs(mu, s, noise, prior_mu, prior_s), plan.sizes
    _launch(backward_kernel, plan, arguments, [*arrays[:6], dkl, *grads], *dkl[1:])


class Call(NamedTuple):
    """All that a launch depends on but the addresses."""

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int] | None, ...]  # of each array
    itemsize: int
    alignment: int  # of all arrays, in elements
    parametrisation: Parametrisation
    seeded: bool
    sum_r: bool
    sum_d: bool
    whole_sums: bool  # a sum of the KL should fit a tile: forward


class Plan(NamedTuple):
    spec: RowSpec
    config: RowConfig
    programs: int
    sizes: Sizes
    units: tuple[tuple[int, int] | None, ...]  # the strides of each array
    parts: torch.Size  # of the sums of the tiles
    key: int  # a number for what is compiled: spec, config and which integers take 64 bits

    def arrays(self, arrays: Sequence[Rows | None]) -> list[Array | None]:
        return [None if rows is None or unit is None else Array(rows.tensor, *unit) for rows, unit in zip(arrays, self.units, strict=True)]


def _planned(
    sizes: tuple[int, int, int],
    arrays: Sequence[Rows | None],
    parametrisation: Parametrisation,
    sum_r: bool,
    sum_d: bool,
    whole_sums: bool = False,
) -> Plan:
    mu, noise = arrays[0], arrays[2]
    assert mu is not None
    seeded = noise is not None and not noise.tensor.is_floating_point()
    itemsize = mu.tensor.element_size()
    addresses = [
        rows.tensor.data_ptr() // rows.tensor.element_size() for rows in arrays if rows is not None and not (seeded and rows is noise)
    ]
    strides = tuple([None if rows is None else rows[1:] for rows in arrays])
    alignment = math.gcd(16 // itemsize, *addresses)
    return plan_of(Call(sizes, strides, itemsize, alignment, parametrisation, seeded, sum_r, sum_d, whole_sums))


# A number is hashed faster than the options that it stands for.
_keys: dict[Hashable, int] = {}


@functools.lru_cache(maxsize=256)
def plan_of(call: Call) -> Plan:
    b, r, d = call.sizes
    vector = math.gcd(d, call.alignment, *(stride for strides in call.strides if strides for stride in strides))
    sums = (call.sum_r and call.whole_sums, call.sum_d and call.whole_sums)
    prior = call.strides[3] is not None
    config = row_config(call.sizes, call.itemsize, vector, *sums, prior)
    blocks_r, blocks_d = -(-r // config.block_n), -(-d // config.block_d)
    p = call.parametrisation
    low, high = p.bounds or (0.0, 0.0)
    # Whether μ = 0 and the s that is loaded for a padded element give a KL of 0.
    zero = p.offset == 0 and p.scale != "softplus" and low <= 0 <= high and (p.scale not in ("std", "variance") or p.soft_clamp is None)
    spec = RowSpec(
        SCALE=p.scale,
        OFFSET=p.offset,
        LOG_OFFSET=math.log(p.offset) if p.offset else 0.0,
        BOUNDED=p.bounds is not None,
        LOW=low,
        HIGH=high,
        SOFT_CLAMP=p.soft_clamp or 0.0,
        Z=call.strides[5] is not None,
        SEEDED=call.seeded,
        PRIOR=prior,
        PRIOR_GRADIENT=len(call.strides) > 9 and call.strides[9] is not None,
        SUM_R=call.sum_r,
        SUM_D=call.sum_d,
        BATCHED=b > 1,
        SPLIT_D=blocks_d > 1,
        MASK_KL=not zero,
        **config.launch("num_warps"),
    )
    units = tuple(None if strides is None else (strides[0] // vector, strides[1] // vector) for strides in call.strides)
    sizes = Sizes(r, d // vector, blocks_r, blocks_d)
    parts = torch.Size((b, blocks_r if call.sum_r else r, blocks_d if call.sum_d else d))
    long = tuple(number >= 1 << 31 for number in (*sizes, *(n for unit in units if unit for n in unit)))
    key = _keys.setdefault((spec, config, long), len(_keys))
    return Plan(spec, config, b * blocks_r * blocks_d, sizes, units, parts, key)


def _launch(fn: Any, plan: Plan, arguments: tuple[Any, ...], arrays: Sequence[Rows | None], *strides: int) -> None:
    tensors = [rows.tensor for rows in arrays if rows is not None]
    key = plan.key, tensor_key(*tensors), tuple([stride >= 1 << 31 for stride in strides])
    launch(
        fn, key, tensors[0].device, (plan.programs, 1, 1), arguments,
        lambda: {"SPEC": plan.spec, "num_warps": plan.config.num_warps},
    )  # fmt: skip
