"""MMD² of samples of few rows and of batches of them, and quadratic forms: value and gradient from one array of all pairs of rows.

With rows z = [x; y] and signed weights w = [p; −q] the value is wᵀKw, and the gradient to row i a sum over j of w_j·φ'(t_ij)·(z_i − z_j),
for which one product K·[w·z, w] does. For few rows the streaming path's operations would take longer than its tiles. A quadratic form has
weights of several columns, formulas (1) and (2) of `fastvae.reference.quadratic_form`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.cpu.tiles import Profile, by_linear, exponentials, is_linear, linear
from fastvae.radial import (
    EXPONENT_ERROR,
    LOG2_E,
    RBF,
    SHIFT_BELOW,
    Kernel,
    KernelSum,
    Ladder,
    Numbers,
    middle,
    rbf_normal_mean_exponent,
    rbf_normal_self_exponent,
    read,
)

# Pairs of rows of [x; y] up to which one array of them is faster than tiles.
_PAIRS = 1 << 20
# Pairs, and numbers of a sample, of the problems of a batch that are taken at once: arrays that stay in the second-level cache.
_PAIRS_AT_ONCE = 1 << 18
_NUMBERS_AT_ONCE = 1 << 17

# Scales and mean squares whose products are numbers of float32: of others the streaming path takes care.
_SCALES = 1e-6, 1e6
_LEAST_SQUARE = 1e-30

Result = tuple[Tensor, Tensor | None, Tensor | None]


class _Plan(NamedTuple):
    """What follows from the kernel and the dtype alone."""

    ladder: Ladder
    profile: Profile
    scale: float  # of the points, a number of their dtype
    bandwidths: tuple[float, ...]  # that this scale stands for, widest first
    farthest: float  # exponent of a power of two that a pair of rows can have


@functools.lru_cache(maxsize=256)
def _plan(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, dtype: torch.dtype, shifted: int) -> _Plan:
    """With sums of k − φ(0) for the `shifted` widest bandwidths."""
    kernels = KernelSum.of(kernel, bandwidth, weights, dim, torch.device("cpu"), None)
    ladder = Ladder.of(replace(kernels, shifts=torch.tensor([float(n < shifted or not kernel.radial) for n in range(len(bandwidth))])))
    profile = Profile.of(ladder)
    scale = (ladder.gamma * (2 * profile.unit if kernel.radial else 1.0)) ** 0.5
    rounded = scale if dtype == torch.float64 else float(np.float32(scale))
    # A rounded scale is that of other bandwidths, and so has to be the closed form of a prior.
    return _Plan(ladder, profile, rounded, tuple(h * scale / rounded for h in kernels.bandwidth.tolist()), 0.0)


def problems_at_once(rows: int, dim: int) -> int:
    """How many problems, of `rows` rows of both samples each, `mmd` is to take; 0 if one is too large for it."""
    if rows * rows > _PAIRS:
        return 0
    return max(1, min(_PAIRS_AT_ONCE // (rows * rows), _NUMBERS_AT_ONCE // (rows * dim)))


def mmd(
    x: Tensor,
    y: Tensor | None,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    kernel: Kernel,
    bandwidth: Numbers,
    bandwidth_weights: Numbers,
    unbiased: bool,
    x_grad: bool,
    y_grad: bool,
) -> Result | None:
    """MMD² (...) of x (..., N, D) and y (..., M, D), and the gradients that are wanted, in the accumulation dtype.

    None where products are not exact enough for this data, which the streaming path then takes differences of.
    """
    result_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if kernel.rooted and result_dtype == torch.float64:
        return None
    # The slope of a rooted kernel is steep between rows near to one another.
    dtype = torch.float64 if kernel.rooted else result_dtype
    z = given = (x if y is None else torch.cat([x, y], -2)).to(dtype)
    if kernel.radial:
        z = z - z.mean(-2, keepdim=True)
    h, a = read(bandwidth), read(bandwidth_weights)
    assert not isinstance(h, Tensor)
    assert not isinstance(a, Tensor)
    if (planned := _plan_for(kernel, h, a, z, y is None)) is None:
        return None
    plan, scaled, squares = planned
    ladder, gradient = plan.ladder, x_grad or y_grad
    samples = [slice(0, x.shape[-2]), slice(x.shape[-2], z.shape[-2])][: 1 if y is None else 2]
    weights = _weights(x, y, x_weights, y_weights, dtype)
    extras = [_extra(s, p, unbiased, dtype) for s, p in zip(samples, (x_weights, y_weights), strict=False)]

    points, exponent = _exponents(kernel, scaled, squares)
    # Rows whose pull is wanted; of all of them one product has the sums of k too, where the slope is k.
    moved = slice(0, x.shape[-2] if not y_grad else z.shape[-2])
    at_once = gradient and plan.profile.kernel_is_slope and len(ladder.ratios) == 1 and not unbiased and moved.stop == z.shape[-2]
    sums, own_sums, slope = _sums(plan, exponent, weights, samples if unbiased else [], unbiased or kernel.radial, gradient, at_once)
    moments = None
    if slope is not None:
        weighted = points * weights
        for rows, extra in zip(samples, extras, strict=True):
            if unbiased:
                block = slope[..., rows, rows]
                block.addcmul_(block, extra) if isinstance(extra, Tensor) else block.add_(block, alpha=extra)
        moments = _product(slope[..., moved, :], weighted)
        if at_once:
            sums = moments[..., -1:].clone() if ladder.slope_shift else moments[..., -1:]
        if ladder.slope_shift:
            # Every pair's 1, which the slopes leave out.
            for rows, extra in zip(samples if y_grad else samples[:1], extras, strict=False):
                own = weighted[..., rows, :].sum(-2, keepdim=True)
                moments[..., rows, :] += ladder.slope_shift * (weighted.sum(-2, keepdim=True) + extra * own)
    assert sums is not None
    value = (sums * weights).sum((-2, -1), dtype=torch.float64)
    for rows, extra, own_sum in zip(samples, extras, own_sums, strict=False):
        form = (own_sum * weights[..., rows, :]).sum((-2, -1), dtype=torch.float64)
        value = value + form * (extra[..., 0, 0] if isinstance(extra, Tensor) else extra)
    if kernel.radial and not unbiased:
        constant = kernel.at_zero * math.fsum(a * (1 - shift) for a, shift in zip(ladder.weights, ladder.shifts, strict=True))
        if x_weights is None and y_weights is None:
            value = value + constant * sum(1 / (rows.stop - rows.start) for rows in samples)
        else:
            value = value + constant * weights.double().square().sum((-2, -1))
    gradients: list[Tensor | None] = [None, None]
    if moments is not None:
        if kernel.radial:
            pull = (scaled[..., moved, :] * moments[..., -1:]).sub_(moments[..., :-1])
            factor = -2 * plan.scale / plan.profile.unit
        else:
            pull, factor = moments, 2 * plan.scale
        for n, (rows, sign, p) in enumerate(zip(samples, (1, -1), (x_weights, y_weights), strict=False)):
            if (x_grad, y_grad)[n]:
                row_weights = sign / (rows.stop - rows.start) if p is None else weights[..., rows, :]
                gradients[n] = (pull[..., rows, :] * (factor * row_weights)).to(result_dtype)
    if y is None:
        prior = _prior(kernel, plan.bandwidths, ladder.weights, x.shape[-1], sum(ladder.shifts))
        exponents = given.square().sum(-1, keepdim=True, dtype=torch.float64) * prior.slopes + prior.constants
        powers = exponents.exp()
        shifted = torch.where(prior.shifts, exponents.expm1(), powers) if any(ladder.shifts) else powers
        value = value - 2 * ((shifted @ prior.weights)[..., None] * weights).sum((-2, -1)) + prior.within
        if gradients[0] is not None:
            gradients[0] += given * ((powers @ prior.slope_weights)[..., None] * weights).to(dtype)
    return value.to(result_dtype), gradients[0], gradients[1]


def quadratic_form(
    kernel: Kernel, z: Tensor, v: Tensor, bandwidth: Numbers, bandwidth_weights: Numbers, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """S (C, C) in float64 of z (N, D) and v (N, C), and from an upstream (C, C) the gradient to z in the accumulation dtype.

    None where z has too many rows, or as of `mmd`.
    """
    result_dtype = z.dtype
    if not problems_at_once(*z.shape) or (kernel.rooted and result_dtype == torch.float64):
        return None
    dtype = torch.float64 if kernel.rooted else result_dtype
    z, v = z.to(dtype), v.to(dtype)
    if kernel.radial:
        z = z - middle(z)
    h, a = read(bandwidth), read(bandwidth_weights)
    assert not isinstance(h, Tensor)
    assert not isinstance(a, Tensor)
    if (planned := _plan_for(kernel, h, a, z, False)) is None:
        return None
    plan, scaled, squares = planned
    ladder = plan.ladder
    points, exponent = _exponents(kernel, scaled, squares)
    sums, _, slope = _sums(plan, exponent, v, [], True, upstream is not None, False)
    assert sums is not None
    exact = v.double()
    total = exact.T @ sums.double()
    if any(ladder.shifts):
        column_sums = exact.sum(0)
        constant = kernel.at_zero * math.fsum(a * shift for a, shift in zip(ladder.weights, ladder.shifts, strict=True))
        total += constant * (column_sums[:, None] * column_sums - exact.T @ exact)
    if upstream is None or slope is None:
        return total, None
    coefficients = v @ (upstream + upstream.T).to(dtype)
    moments = _product(slope.mul_(coefficients @ v.T), points)
    if ladder.slope_shift:
        moments += ladder.slope_shift * (coefficients @ (v.T @ points))
    if not kernel.radial:
        return total, (moments * plan.scale).to(result_dtype)
    pull = (scaled * moments[:, -1:]).sub_(moments[:, :-1])
    return total, (pull * (-plan.scale / plan.profile.unit)).to(result_dtype)


def _exponents(kernel: Kernel, scaled: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """What the moments are taken of, and a number for each pair of rows of which k is a function; may write to `squares`."""
    if not kernel.radial:
        return scaled, _product(scaled, scaled.mT)
    ones = torch.ones_like(squares)
    if kernel.rooted:
        return torch.cat([scaled, ones], -1), torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist")
    half = squares.mul_(-0.5)
    left = torch.cat([scaled, ones, half], -1)
    return left[..., :-1], _product(left, torch.cat([scaled, half, ones], -1).mT)


def _plan_for(kernel: Kernel, h: tuple[float, ...], a: tuple[float, ...], z: Tensor, prior: bool) -> tuple[_Plan, Tensor, Tensor] | None:
    """The plan for these rows, they themselves, scaled, and their squares; None if products of them are not exact enough."""
    dim, dtype = z.shape[-1], z.dtype
    plan = _plan(kernel, h, a, dim, dtype, 0)
    if not _SCALES[0] < plan.scale < _SCALES[1]:
        return None
    scaled = z * plan.scale
    # Of the scaled rows, so that what they were rounded by cancels between near ones.
    squares = scaled.square().sum(-1, keepdim=True)
    means = squares.mean(-2)
    least, most = float(means) if means.numel() == 1 else float(means.min()), float(squares.max())
    if not (least > _LEAST_SQUARE and most < math.inf):
        return None
    if not kernel.radial:
        return plan, scaled, squares
    # The exponents' size in natural units: of the widest bandwidth t = ‖scaled‖²/(2·unit).
    half_unit, ratios = 0.5 / plan.profile.unit, plan.ladder.ratios
    if not kernel.rooted and not half_unit * most * ratios[-1] * torch.finfo(dtype).eps <= EXPONENT_ERROR[dtype]:
        return None
    # Sums of k − φ(0) are as exact as sums of k where fewer would do: of a batch the nearest rows decide.
    distance = half_unit * 2 * least if not prior else half_unit * least + plan.ladder.gamma * dim
    exponents = [ratio * distance for ratio in ratios]
    if shifted := sum(((2 * t) ** 0.5 if kernel.rooted else t) < SHIFT_BELOW for t in exponents):
        plan = _plan(kernel, h, a, dim, dtype, shifted)
        scaled = z * plan.scale
        squares = scaled.square().sum(-1, keepdim=True)
    return plan._replace(farthest=4 * LOG2_E * half_unit * most), scaled, squares


def _weights(x: Tensor, y: Tensor | None, p: Tensor | None, q: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[p; −q], (..., N + M, 1), or one for all problems."""
    if p is None and q is None:
        return _equal_weights(x.shape[-2], 0 if y is None else y.shape[-2], dtype)
    parts = [x.new_full(x.shape[:-1], 1 / x.shape[-2], dtype=dtype) if p is None else p.to(dtype)]
    if y is not None:
        parts.append(y.new_full(y.shape[:-1], -1 / y.shape[-2], dtype=dtype) if q is None else -q.to(dtype))
    return torch.cat(parts, -1)[..., None]


@functools.lru_cache(maxsize=64)
def _equal_weights(n: int, m: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([1 / n] * n + [-1 / m for _ in range(m)], dtype=dtype, device="cpu")[:, None]


def _extra(rows: slice, weights: Tensor | None, unbiased: bool, dtype: torch.dtype) -> float | Tensor:
    """1/(1 − Σ p_i²) − 1, by which a sample's own sums are more in formula (2) of `fastvae.reference.mmd`."""
    if not unbiased:
        return 0.0
    if weights is None:
        n: int = rows.stop - rows.start
        return 1 / (n - 1)
    square = weights.double().square().sum(-1)[..., None, None]
    extra: Tensor = (square / (1 - square)).to(dtype)
    return extra


def _sums(
    plan: _Plan, exponent: Tensor, weights: Tensor, samples: Sequence[slice], without_diagonal: bool, gradient: bool, at_once: bool
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    """K·w, of `samples` the same over their own rows, and for a gradient W, which may take the place of the exponents."""
    ladder, profile = plan.ladder, plan.profile
    own: list[Tensor] = []
    sums: Tensor | None = None
    total: Tensor | None = None
    value = exponent if all(ladder.squarings[1:]) else torch.empty_like(exponent)
    scratch = None if profile.kernel_is_slope else torch.empty_like(exponent)
    single = len(ladder.ratios) == 1
    for n, (ratio, weight) in enumerate(zip(ladder.ratios, ladder.weights, strict=True)):
        slope = profile.evaluate(n, ratio, exponent, value, scratch, exponentials(plan.farthest * ratio, exponent.dtype))
        if without_diagonal:
            for t in (value,) if slope is value else (value, slope):
                t.diagonal(dim1=-2, dim2=-1).zero_()
        if not at_once:
            parts = [value @ weights, *(value[..., rows, rows] @ weights[..., rows, :] for rows in samples)]
            more = parts if single and weight == 1 else [part * weight for part in parts]
            sums = more[0] if sums is None else sums.add_(more[0])
            own = [old.add_(new) for old, new in zip(own, more[1:], strict=True)] if own else more[1:]
        if not gradient:
            continue
        if single:
            total = slope if weight == 1 else slope.mul_(weight)
        elif total is None:
            total = slope * (weight * ratio)
        else:
            total.add_(slope, alpha=weight * ratio)
    return sums, own, total


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.ndim == 2 and (product := linear(left.dtype)) is not None:
        (rows, features), columns = left.shape, right.shape[1]
        if is_linear((rows, columns), features):
            return by_linear(product, left, right)
        if is_linear((rows, features), columns):
            return by_linear(product, right.T.contiguous(), left.T).T
    return left @ right


class _Prior(NamedTuple):
    """E_y k(x, y) of each bandwidth and E k(y, y') as numbers: y ~ N(0, I). Source: Rustamov 2019."""

    slopes: Tensor  # −½/(h_b² + 1), of the exponent in ‖x‖²
    constants: Tensor  # log E k(0, y)
    shifts: Tensor
    weights: Tensor  # a_b
    slope_weights: Tensor  # 2·a_b/(h_b² + 1)
    within: float


@functools.lru_cache(maxsize=256)
def _prior(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, shifted: int) -> _Prior:
    assert isinstance(kernel, RBF)
    h, a = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (bandwidth, weights))
    shifts, slopes = torch.arange(len(bandwidth), device="cpu") < shifted, -0.5 / (h.square() + 1)
    constants = rbf_normal_mean_exponent(torch.zeros(1, dim, dtype=torch.float64, device="cpu"), h)[0]
    within = rbf_normal_self_exponent(dim, h)
    return _Prior(slopes, constants, shifts, a, -4 * a * slopes, float(torch.where(shifts, within.expm1(), within.exp()) @ a))
