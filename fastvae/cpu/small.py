"""MMD² of samples of few rows and of batches of them, quadratic forms and K·v: value and gradient from one array of all pairs of rows.

With rows z = [x; y] and signed weights w = [p; −q] the value is wᵀKw, and the gradient to row i a sum over j of w_j·φ'(t_ij)·(z_i − z_j),
for which one product K·[w·z, w] does. For few rows the streaming path's operations would take longer than its tiles. A quadratic form has
weights of several columns, formulas (1) and (2) of `fastvae.reference.quadratic_form`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.cpu.tiles import Profile, by_linear, exponentials, is_linear, linear
from fastvae.kernel_sums import (
    EXPONENT_ERROR,
    LOG2_E,
    SHIFT_BELOW,
    HostKernelSum,
    KernelSum,
    Numbers,
    rbf_normal_mean_exponent,
    rbf_normal_self_exponent,
    read,
)
from fastvae.radial import RBF, Kernel

# Pairs of rows of [x; y] up to which one array of them is faster than tiles.
_PAIRS = 1 << 20
# The same of a quadratic form, of which tiles need half.
_FORM_PAIRS = 3 << 18
# Pairs, and numbers of a sample, of the problems of a batch that are taken at once: arrays that stay in the second-level cache.
_PAIRS_AT_ONCE = 1 << 18
_NUMBERS_AT_ONCE = 1 << 17

# Pairs up to which adding the halves takes less time than a product with them.
_PAIRS_OF_SUMS = 1 << 16
# Numbers that Python reads faster than PyTorch reduces them.
_READ = 256

# Scales and mean squares whose products are numbers of float32: of others the streaming path takes care.
_SCALES = 1e-6, 1e6
_LEAST_SQUARE = 1e-30

Result = tuple[Tensor, Tensor | None, Tensor | None]


class _Plan(NamedTuple):
    """What follows from the kernel and the dtype alone."""

    host_sum: HostKernelSum
    profile: Profile
    scale: float  # of the points, a number of their dtype
    bandwidths: tuple[float, ...]  # that this scale stands for, widest first
    diagonal: float  # k(z, z) without its shift
    shift: float  # of k
    factor: float  # of a gradient, from Σ_j W_ij·(s_i − s_j) of the scaled rows s, of a kernel of x·y from Σ_j W_ij·s_j


@functools.lru_cache(maxsize=256)
def _plan(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, dtype: torch.dtype, shifted: int) -> _Plan:
    """With sums of k − φ(0) for the `shifted` widest bandwidths."""
    kernels = KernelSum.of(kernel, bandwidth, weights, dim, torch.device("cpu"), None)
    host_sum = HostKernelSum.of(
        replace(kernels, shifts=torch.tensor([float(n < shifted or not kernel.radial) for n in range(len(bandwidth))], device="cpu"))
    )
    profile = Profile.of(host_sum)
    scale = (host_sum.gamma * (2 * profile.unit if kernel.radial else 1.0)) ** 0.5
    rounded = scale if dtype == torch.float64 else float(np.float32(scale))
    # A rounded scale is that of other bandwidths, and so has to be the closed form of a prior.
    bandwidths = tuple(h * scale / rounded for h in kernels.bandwidth.tolist())
    diagonal = kernel.value_at_zero * math.fsum(a * (1 - shift) for a, shift in zip(host_sum.weights, host_sum.shifts, strict=True))
    shift = kernel.value_at_zero * math.fsum(a * shift for a, shift in zip(host_sum.weights, host_sum.shifts, strict=True))
    return _Plan(host_sum, profile, rounded, bandwidths, diagonal, shift, -rounded / profile.unit if kernel.radial else rounded)


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
    if kernel.takes_distance and result_dtype == torch.float64:
        return None
    # The slope of a rooted kernel is steep between rows near to one another.
    dtype = torch.float64 if kernel.takes_distance else result_dtype
    z = given = (x if y is None else torch.cat([x, y], -2)).to(dtype)
    if kernel.radial:
        z = z - z.mean(-2, keepdim=True)
    if (planned := _plan_for(kernel, bandwidth, bandwidth_weights, z, y is None)) is None:
        return None
    plan, farthest, scaled, half = planned
    host_sum, wanted, first = plan.host_sum, (x_grad, y_grad), x.shape[-2]
    signed, samples, row_weights, extras, sum_of_squares = _Weights.of(x, y, x_weights, y_weights, unbiased, dtype)

    # Of one sample all sums are its own.
    scale: float | Tensor = 1.0
    if y is None and unbiased:
        scale, extras = 1 + extras[0], [0.0]
    exponent = _exponents(kernel, scaled, scaled, half, half)
    own = samples if unbiased and y is not None else []
    sums, own_sums, slope = _sums(plan, farthest, exponent, signed, own, unbiased or kernel.radial, x_grad or y_grad)
    value = (sums * signed).sum((-2, -1), dtype=torch.float64)
    for rows, extra, own_sum in zip(own, extras, own_sums, strict=False):
        form = (own_sum * signed[..., rows, :]).sum((-2, -1), dtype=torch.float64)
        value = value + form * (extra[..., 0, 0] if isinstance(extra, Tensor) else extra)
    if y is None and unbiased:
        value = value * (scale[..., 0, 0] if isinstance(scale, Tensor) else scale)
    if kernel.radial and not unbiased:
        value = value + plan.diagonal * sum_of_squares
    gradients: list[Tensor | None] = [None, None]
    if slope is not None:
        weighted = scaled * signed
        for rows, extra in zip(own, extras, strict=False):
            block = slope[..., rows, rows]
            block.addcmul_(block, extra) if isinstance(extra, Tensor) else block.add_(block, alpha=extra)
        if slope.shape[-2] > first and not y_grad:
            slope, scaled = slope.narrow(-2, 0, first), scaled.narrow(-2, 0, first)
        pull = _product(slope, weighted)
        if kernel.radial:
            is_sum = plan.profile.kernel_is_slope and len(host_sum.ratios) == 1 and not own
            slope_sums = sums.narrow(-2, 0, slope.shape[-2]) if is_sum else slope @ signed
            if host_sum.slope_shift:
                # Every pair's 1, which the slopes leave out.
                slope_sums = slope_sums.clone() if is_sum else slope_sums
                for rows, extra in zip(samples if y_grad else samples[:1], extras, strict=False):
                    for total, part in ((pull, weighted), (slope_sums, signed)):
                        own_part = part[..., rows, :].sum(-2, keepdim=True)
                        total[..., rows, :] += host_sum.slope_shift * (part.sum(-2, keepdim=True) + extra * own_part)
            # Not in one operation: of equal rows the two products are the same number, which multiply-adds would not cancel.
            pull = (scaled * slope_sums).sub_(pull)
        for n, rows in enumerate(samples):
            if wanted[n]:
                part = pull[..., rows, :] if y_grad else pull
                gradients[n] = (part * (2 * plan.factor * scale * row_weights[n])).to(result_dtype).contiguous()
    if y is None:
        prior = _prior(kernel, plan.bandwidths, host_sum.weights, x.shape[-1], sum(host_sum.shifts))
        squares = given.square().sum(-1, keepdim=True, dtype=torch.float64)
        value = value + prior.within
        if x_weights is None and prior.single is not None:
            slope_of_square, *factors = prior.single
            powers = squares.mul_(slope_of_square).exp_()
            value.add_(powers.sum((-2, -1)), alpha=factors[0] / first)
            if gradients[0] is not None:
                gradients[0].addcmul_(given, powers.to(dtype), value=factors[1] / first)
        else:
            exponents = torch.addcmul(prior.constants, squares, prior.slopes)
            powers = exponents.exp()
            means = powers @ prior.factors
            shifted = torch.where(prior.shifts, exponents.expm1(), powers) @ prior.factors if any(host_sum.shifts) else means
            value = value + (shifted.narrow(-1, 0, 1) * signed).sum((-2, -1))
            if gradients[0] is not None:
                gradients[0].addcmul_(given, (means.narrow(-1, 1, 1) * signed).to(dtype))
    return value.to(result_dtype), gradients[0], gradients[1]


def quadratic_form(
    kernel: Kernel, z: Tensor, v: Tensor, bandwidth: Numbers, bandwidth_weights: Numbers, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """S (C, C) in float64 of z (N, D) and v (N, C), and from an upstream (C, C) the gradient to z in the accumulation dtype.

    None where z has too many rows, or as of `mmd`.
    """
    result_dtype = z.dtype
    if (planned := _plan_for_rows(kernel, bandwidth, bandwidth_weights, z)) is None:
        return None
    plan, farthest, scaled, half = planned
    host_sum, dtype = plan.host_sum, scaled.dtype
    v = v.to(dtype)
    sums, _, slope = _sums(plan, farthest, _exponents(kernel, scaled, scaled, half, half), v, [], True, upstream is not None)
    exact = v.double()
    total = exact.T @ sums.double()
    if plan.shift:
        column_sums = exact.sum(0)
        total += plan.shift * (column_sums[:, None] * column_sums - exact.T @ exact)
    if upstream is None or slope is None:
        return total, None
    coefficients = v @ (upstream + upstream.T).to(dtype)
    pull = _product(slope.mul_(coefficients @ v.T), scaled)
    if kernel.radial:
        slope_sums = slope.sum(1, keepdim=True)
        if host_sum.slope_shift:
            pull += host_sum.slope_shift * (coefficients @ (v.T @ scaled))
            slope_sums += host_sum.slope_shift * (coefficients @ v.sum(0))[:, None]
        pull = (scaled * slope_sums).sub_(pull)
    return total, (pull * plan.factor).to(result_dtype).contiguous()


def kernel_matrix(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, z: Tensor) -> tuple[Tensor, float] | None:
    """K (N, N) of z (N, D) less a number in each pair, 0 on its diagonal, and this number. None as of `quadratic_form`."""
    if (planned := _plan_for_rows(kernel, bandwidth, bandwidth_weights, z)) is None:
        return None
    plan, farthest, scaled, half = planned
    total: Tensor | None = None
    for _, weight, value, _ in _evaluated(plan, farthest, _exponents(kernel, scaled, scaled, half, half)):
        if total is not None:
            total.add_(value, alpha=weight)
        elif len(plan.host_sum.ratios) == 1:
            total = value if weight == 1 else value.mul_(weight)
        else:
            total = value * weight
    assert total is not None
    return total.fill_diagonal_(0), plan.shift


class Rows(NamedTuple):
    """Rows of x and y, as `kernel_matmul` and its gradients take them."""

    kernel: Kernel
    plan: _Plan
    farthest: float
    x: Tensor  # scaled
    y: Tensor
    x_half: Tensor
    y_half: Tensor

    @staticmethod
    def of(kernel: Kernel, x: Tensor, y: Tensor, bandwidth: Numbers, bandwidth_weights: Numbers) -> Rows | None:
        """None where there are too many, or as of `mmd`."""
        if not problems_at_once(x.shape[0] + y.shape[0], x.shape[1]) or (kernel.takes_distance and x.dtype == torch.float64):
            return None
        z = torch.cat([x, y])
        z = _centred(kernel, z.double() if kernel.takes_distance else z, len(x))
        if (planned := _plan_for(kernel, bandwidth, bandwidth_weights, z, False)) is None:
            return None
        plan, farthest, scaled, half = planned
        sizes = x.shape[0], y.shape[0]
        return Rows(kernel, plan, farthest, *scaled.split_with_sizes(sizes), *half.split_with_sizes(sizes))

    def matmul(self, v: Tensor) -> Tensor:
        """Σ_j k(x_i, y_j)·v_j, (N, C), of v (M, C), in the dtype of v."""
        exponent = _exponents(self.kernel, self.x, self.y, self.x_half, self.y_half)
        weights = v.to(self.x.dtype)
        sums, _, _ = _sums(self.plan, self.farthest, exponent, weights, [], False, False)
        return self._whole(sums, weights).to(v.dtype)

    def gradients(self, v: Tensor, grad: Tensor, x: bool, y: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Of Σ_ij grad_i·v_j·k(x_i, y_j) to x and y, those wanted, and to v, in the dtype of v."""
        plan, dtype = self.plan, v.dtype
        # From the columns' side, whose sums are the gradient to v.
        exponent = _exponents(self.kernel, self.y, self.x, self.y_half, self.x_half)
        v, grad = v.to(self.x.dtype), grad.to(self.x.dtype)
        sums, _, slope = _sums(plan, self.farthest, exponent, grad, [], False, x or y)
        pulls: list[Tensor | None] = [None, None]
        if slope is not None:
            if plan.host_sum.slope_shift:
                slope.add_(plan.host_sum.slope_shift)
            slope.mul_(v @ grad.T)
            for n, (wanted, to, of, weights) in enumerate(((x, self.x, self.y, slope.T), (y, self.y, self.x, slope))):
                if wanted:
                    pull = weights @ of
                    if self.kernel.radial:
                        pull = (to * weights.sum(1, keepdim=True)).sub_(pull)
                    pulls[n] = (pull * plan.factor).to(dtype)
        return pulls[0], pulls[1], self._whole(sums, grad).to(dtype)

    def _whole(self, sums: Tensor, weights: Tensor) -> Tensor:
        """With what the shifts leave out of each pair. Weights that are not finite make every sum nan."""
        left_out = self.plan.shift * weights.sum(0, dtype=torch.float64)
        return sums + (left_out + 0 * left_out.sum())


def _exponents(kernel: Kernel, left: Tensor, right: Tensor, left_half: Tensor, right_half: Tensor) -> Tensor:
    """A number for each pair of scaled rows of which k is a function; `left_half` is −½‖left_i‖²."""
    if kernel.takes_distance:
        return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    if not kernel.radial:
        return _product(left, right.mT)
    if left.ndim == 2 and left.shape[0] * right.shape[0] > _PAIRS_OF_SUMS:
        ones = torch.ones_like(left_half), torch.ones_like(right_half)
        return _product(torch.cat([left, left_half, ones[0]], 1), torch.cat([right, ones[1], right_half], 1).T)
    product = torch.addmm if left.ndim == 2 else torch.baddbmm
    return product(left_half, left, right.mT).add_(right_half.mT)


def _plan_for(
    kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, z: Tensor, prior: bool
) -> tuple[_Plan, float, Tensor, Tensor] | None:
    """The plan for these rows, the largest exponent to base 2 of a pair, the rows, scaled, and −½ of their squared norms.

    None if products of them are not exact enough. `prior` says that they stand against N(0, I)."""
    h, a = read(bandwidth), read(bandwidth_weights)
    assert not isinstance(h, Tensor)
    assert not isinstance(a, Tensor)
    dim, dtype = z.shape[-1], z.dtype
    plan = _plan(kernel, h, a, dim, dtype, 0)
    if not _SCALES[0] < plan.scale < _SCALES[1]:
        return None
    scaled = z * plan.scale
    half = _half_squares(scaled)
    if half.numel() <= _READ and half.ndim == 2:
        numbers = half.view(-1).tolist()
        least, most = -2 * sum(numbers) / len(numbers), -2 * min(numbers)
    else:
        least, most = -2 * float(half.mean(-2).max()), -2 * float(half.min())
    if not (least > _LEAST_SQUARE and most < math.inf):
        return None
    if not kernel.radial:
        return plan, math.inf, scaled, half
    # The exponents' size in natural units: of the widest bandwidth t = ‖scaled‖²/(2·unit).
    half_unit, ratios = 0.5 / plan.profile.unit, plan.host_sum.ratios
    # Of a rooted kernel differences of centred rows are exact enough, but the root of t is what they round.
    if not half_unit * most * ratios[-1] * torch.finfo(dtype).eps ** (2 if kernel.takes_distance else 1) <= EXPONENT_ERROR[dtype]:
        return None
    # Sums of k − φ(0) are as exact as sums of k where fewer would do: of a batch the nearest rows decide.
    distance = half_unit * 2 * least if not prior else half_unit * least + plan.host_sum.gamma * dim
    exponents = [ratio * distance for ratio in ratios]
    if shifted := sum(((2 * t) ** 0.5 if kernel.takes_distance else t) < SHIFT_BELOW for t in exponents):
        plan = _plan(kernel, h, a, dim, dtype, shifted)
        scaled = z * plan.scale
        half = _half_squares(scaled)
    return plan, 4 * LOG2_E * half_unit * most, scaled, half


def _plan_for_rows(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, z: Tensor) -> tuple[_Plan, float, Tensor, Tensor] | None:
    """`_plan_for` z (N, D) as given, against itself; None if its rows are too many."""
    if z.shape[0] ** 2 > _FORM_PAIRS or (kernel.takes_distance and z.dtype == torch.float64):
        return None
    z = _centred(kernel, z.double() if kernel.takes_distance else z)
    return _plan_for(kernel, bandwidth, bandwidth_weights, z, False)


def _centred(kernel: Kernel, z: Tensor, first: int | None = None) -> Tensor:
    """Rows seen from their mean, or from the middle between the means of the first and of the others, as the streaming path sees them."""
    if not kernel.radial:
        return z
    # From a row first: the mean of rows far from the origin is itself rounded, also where they are equal.
    z = z - z[0]
    return z.sub_(z.mean(0) if first is None else z[:first].mean(0).add_(z[first:].mean(0)).mul_(0.5))


def _half_squares(scaled: Tensor) -> Tensor:
    """−½‖z_i‖² of the scaled rows, so that what they were rounded by cancels between near ones."""
    # A product takes half the time of a sum.
    return scaled.square() @ _minus_halves(scaled.shape[-1], scaled.dtype)


@functools.lru_cache(maxsize=64)
def _minus_halves(features: int, dtype: torch.dtype) -> Tensor:
    return torch.full((features, 1), -0.5, dtype=dtype, device="cpu")


class _Weights(NamedTuple):
    """The weights of [x; y], and of each sample its rows and how often its own sum counts in formula (2), beyond once."""

    signed: Tensor  # [p; −q], (..., N + M, 1), or one for all problems
    rows: list[slice]
    row_weights: Sequence[float | Tensor]  # p_i, and −q_j
    extras: Sequence[float | Tensor]  # 1/(1 − Σ p_i²) − 1
    sum_of_squares: float | Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor | None, p: Tensor | None, q: Tensor | None, unbiased: bool, dtype: torch.dtype) -> _Weights:
        if p is None and q is None:
            return _equal_weights(x.shape[-2], 0 if y is None else y.shape[-2], unbiased, dtype)
        parts = [x.new_full(x.shape[:-1], 1 / x.shape[-2], dtype=dtype) if p is None else p.to(dtype)]
        if y is not None:
            parts.append(y.new_full(y.shape[:-1], 1 / y.shape[-2], dtype=dtype) if q is None else q.to(dtype))
        squares = [part.double().square().sum(-1) for part in parts]
        signed = torch.cat([parts[0], *(-part for part in parts[1:])], -1)[..., None]
        rows = _rows([part.shape[-1] for part in parts])
        extras = [(square / (1 - square) if unbiased else 0 * square)[..., None, None].to(dtype) for square in squares]
        return _Weights(signed, rows, [signed[..., own, :] for own in rows], extras, torch.stack(squares).sum(0))


def _rows(sizes: list[int]) -> list[slice]:
    return [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]


@functools.lru_cache(maxsize=64)
def _equal_weights(n: int, m: int, unbiased: bool, dtype: torch.dtype) -> _Weights:
    sizes = [n, m] if m else [n]
    signed = torch.tensor([1 / n] * n + [-1 / m for _ in range(m)], dtype=dtype, device="cpu")[:, None]
    extras = [1 / (size - 1) if unbiased else 0.0 for size in sizes]
    row_weights = [1 / n, -1 / m] if m else [1 / n]
    return _Weights(signed, _rows(sizes), row_weights, extras, sum(map(abs, row_weights)))


def _sums(
    plan: _Plan, farthest: float, exponent: Tensor, weights: Tensor, samples: Sequence[slice], without_diagonal: bool, gradient: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """K·w, of `samples` the same over their own rows, and for a gradient W, which may take the place of the exponents."""
    sums: list[Tensor] = []
    total: Tensor | None = None
    single = len(plan.host_sum.ratios) == 1
    for ratio, weight, value, slope in _evaluated(plan, farthest, exponent):
        if without_diagonal:
            for t in (value,) if slope is value else (value, slope):
                t.fill_diagonal_(0) if t.ndim == 2 else t.diagonal(dim1=-2, dim2=-1).zero_()
        more = [value @ weights, *(value[..., rows, rows] @ weights[..., rows, :] for rows in samples)]
        if not single or weight != 1:
            more = [part * weight for part in more]
        sums = [old.add_(new) for old, new in zip(sums, more, strict=True)] if sums else more
        if not gradient:
            continue
        if single:
            total = slope if weight == 1 else slope.mul_(weight)
        elif total is None:
            total = slope * (weight * ratio)
        else:
            total.add_(slope, alpha=weight * ratio)
    return sums[0], sums[1:], total


def _evaluated(plan: _Plan, farthest: float, exponent: Tensor) -> Iterator[tuple[float, float, Tensor, Tensor]]:
    """Of each bandwidth its ratio and weight, and k and its slope of every pair, which the next one overwrites, as it may the exponents."""
    host_sum, profile = plan.host_sum, plan.profile
    value = exponent if all(host_sum.squarings[1:]) else torch.empty_like(exponent)
    scratch = None if profile.kernel_is_slope else torch.empty_like(exponent)
    for n, (ratio, weight) in enumerate(zip(host_sum.ratios, host_sum.weights, strict=True)):
        slope = profile.evaluate(n, ratio, exponent, value, scratch, exponentials(farthest * ratio, exponent.dtype))
        yield ratio, weight, value, slope


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
    factors: Tensor  # −2·a_b and 2·a_b/(h_b² + 1), of the value and of the gradient s·x
    within: float
    single: tuple[float, float, float] | None  # of one bandwidth without shift: its slope, and its two factors, each times E k(0, y)


@functools.lru_cache(maxsize=256)
def _prior(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, shifted: int) -> _Prior:
    assert isinstance(kernel, RBF)
    h, a = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (bandwidth, weights))
    shifts, slopes = torch.arange(len(bandwidth), device="cpu") < shifted, -0.5 / (h.square() + 1)
    constants = rbf_normal_mean_exponent(torch.zeros(1, dim, dtype=torch.float64, device="cpu"), h)[0]
    within = rbf_normal_self_exponent(dim, h)
    factors = torch.stack([-2 * a, -4 * a * slopes], 1)
    single = None
    if len(bandwidth) == 1 and not shifted:
        value, gradient = (factors[0] * constants.exp()).tolist()
        single = float(slopes), value, gradient
    return _Prior(slopes, constants, shifts, factors, float(torch.where(shifts, within.expm1(), within.exp()) @ a), single)
