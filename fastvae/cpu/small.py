"""Few rows on a CPU: MMD² and batches of it, quadratic forms and K·v, from one array of all pairs of rows.

With rows z = [x; y] and signed weights w = [p; −q], MMD² is wᵀKw. The gradient of row i is a sum over j of w_j·φ'(t_ij)·(z_i − z_j), for
which one product K·[w·z, w] is enough. For few rows the overhead of tiles would exceed their work. A quadratic form has several columns of
weights: formulas (1) and (2) of `fastvae.reference.quadratic_form`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.cpu.families import TileEvaluator, exponentials, tile_evaluator
from fastvae.cpu.products import is_faster_by_onednn, multiply, onednn_product
from fastvae.cpu.quadratic_form import pair_weights
from fastvae.cpu.tiles import LEAST_EXPONENT, LEAST_SHARE, LEAST_SHARE_OF_MOMENTS, LEAST_SQUARE, are_distances_in_range
from fastvae.kernel_sums import (
    EXPONENT_ERROR,
    LOG2_E,
    HostKernelSum,
    KernelSum,
    Numbers,
    is_nearly_constant,
    rbf_normal_mean_exponent,
    rbf_normal_self_exponent,
    read,
)
from fastvae.radial import Kernel, Sum

# Up to this many pairs of rows of [x; y] one array of them is faster than tiles.
_PAIRS = 1 << 20
# Or up to four times as many where one sample has no more rows, or both have more features than this: tiles then take much of their time
# to prepare the rows.
_FEW_ROWS, _MANY_FEATURES = 64, 256
# The same for a quadratic form, of which the streaming path computes half the tiles.
_FORM_PAIRS = 3 << 18
# The most pairs, and numbers of a sample, in the problems of a batch that are taken together: arrays that fit the second-level cache.
_PAIRS_AT_ONCE = 1 << 18
_NUMBERS_AT_ONCE = 1 << 17

# Up to this many pairs adding the norms is faster than making them part of the product.
_PAIRS_OF_SUMS = 1 << 16
# Up to this many numbers Python reads them faster than PyTorch reduces them.
_READ = 256

# Scales whose products float32 can represent. Others are left to the streaming path.
SCALES = 1e-6, 1e6
# Of distances from products in float64.
_DISTANCE_ERROR = 2.0**-26
# With fewer pairs float32 gains nothing.
_FEWEST_PAIRS = 1 << 13
# With fewer differences all of them take no more time than those of near pairs alone.
_FEWEST_DIFFERENCES = 1 << 18

Result = tuple[Tensor, Tensor | None, Tensor | None]


class _Plan(NamedTuple):
    """What depends on the kernel and the dtype alone."""

    host_sum: HostKernelSum
    evaluator: TileEvaluator
    scale: float  # of the rows, a number of their dtype
    bandwidths: tuple[float, ...]  # for which this scale is exact, widest first
    diagonal: float  # k(z, z) without the constant that is subtracted
    value_constant: float  # subtracted from each pair's k
    gradient_scale: float  # from Σ_j W_ij·(s_i − s_j) of the scaled rows s, for a kernel of x·y from Σ_j W_ij·s_j, to the gradient


@functools.lru_cache(maxsize=256)
def _plan(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, dtype: torch.dtype, subtracted: int) -> _Plan:
    """With sums of k − φ(0) for so many of the widest bandwidths."""
    kernels = KernelSum.of(kernel, bandwidth, weights, dim, torch.device("cpu"), None)
    subtract_constant = torch.tensor([float(n < subtracted or not kernel.radial) for n in range(len(bandwidth))], device="cpu")
    host_sum = HostKernelSum.of(replace(kernels, subtract_constant=subtract_constant))
    evaluator = tile_evaluator(host_sum)
    scale = (host_sum.gamma * (2 * evaluator.exponent_scale if kernel.radial else 1.0)) ** 0.5
    rounded = scale if dtype == torch.float64 else float(np.float32(scale))
    # A rounded scale belongs to slightly different bandwidths, which the closed form of a prior has to use too.
    bandwidths = tuple(h * scale / rounded for h in kernels.bandwidth.tolist())
    constants = [kernel.value_at_zero * a for a in host_sum.weights]
    diagonal = math.fsum(c for c, subtract in zip(constants, host_sum.subtract_constant, strict=True) if not subtract)
    value_constant = math.fsum(c for c, subtract in zip(constants, host_sum.subtract_constant, strict=True) if subtract)
    gradient_scale = -rounded / evaluator.exponent_scale if kernel.radial else rounded
    return _Plan(host_sum, evaluator, rounded, bandwidths, diagonal, value_constant, gradient_scale)


class _Rows(NamedTuple):
    """Rows, prepared for the array of all their pairs."""

    plan: _Plan
    farthest: float  # at least the largest exponent of a pair, to base 2
    scaled: Tensor
    neg_half_norm2: Tensor  # −½‖s_i‖² of the scaled rows


def problems_at_once(rows: int, dim: int) -> int:
    """How many problems with `rows` rows in both samples together `mmd` takes at once; 0 if one is too large."""
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
    """MMD² (...) of x (..., N, D) and y (..., M, D), and the gradients to them or None, in the accumulation dtype.

    The result is None where products are not accurate enough for this data; the streaming path then takes differences.
    """
    result_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.shape[-2] + (0 if y is None else y.shape[-2])
    if isinstance(kernel, Sum) and count * count > _PAIRS_AT_ONCE:
        # Its terms have arrays of their own, whose new pages take longer than tiles.
        return None
    z = given = (x if y is None else torch.cat([x, y], -2)).to(torch.float64 if kernel.takes_distance else result_dtype)
    if kernel.radial:
        z = z - z.mean(-2, keepdim=True)
    if (prepared := _prepare(kernel, bandwidth, bandwidth_weights, z, y is None)) is None:
        return None
    if (exponent := _exponents(kernel, prepared, prepared, result_dtype)) is None:
        return None
    plan, _, scaled, _ = prepared
    dtype, scaled = exponent.dtype, scaled.to(exponent.dtype)
    host_sum, wanted, x_rows = plan.host_sum, (x_grad, y_grad), x.shape[-2]
    signed, samples, row_weights, extras, sum_of_squares = _Weights.of(x, y, x_weights, y_weights, unbiased, dtype)

    # With one sample all sums are its own.
    scale: float | Tensor = 1.0
    if y is None and unbiased:
        scale, extras = 1 + extras[0], [0.0]
    own = samples if unbiased and y is not None else []
    sums, own_sums, slope = _sums(prepared, exponent, signed, own, unbiased or kernel.radial, x_grad or y_grad)
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
        if slope.shape[-2] > x_rows and not y_grad:
            slope, scaled = slope.narrow(-2, 0, x_rows), scaled.narrow(-2, 0, x_rows)
        gradient = _product(slope, weighted)
        if kernel.radial:
            is_sum = plan.evaluator.neg_dphi_is_value and len(host_sum.ratios) == 1 and not own
            slope_sums = sums.narrow(-2, 0, slope.shape[-2]) if is_sum else slope @ signed
            if host_sum.slope_constant:
                # The constant that each pair's slope lacks.
                slope_sums = slope_sums.clone() if is_sum else slope_sums
                for rows, extra in zip(samples if y_grad else samples[:1], extras, strict=False):
                    for total, part in ((gradient, weighted), (slope_sums, signed)):
                        own_part = part[..., rows, :].sum(-2, keepdim=True)
                        total[..., rows, :] += host_sum.slope_constant * (part.sum(-2, keepdim=True) + extra * own_part)
            # Not in one operation: for equal rows the two products are the same number, which a fused multiply-add would not cancel.
            gradient = (scaled * slope_sums).sub_(gradient)
        for n, rows in enumerate(samples):
            if wanted[n]:
                part = gradient[..., rows, :] if y_grad else gradient
                gradients[n] = (part * (2 * plan.gradient_scale * scale * row_weights[n])).to(result_dtype).contiguous()
    if y is None:
        prior = _prior(plan.bandwidths, host_sum.weights, x.shape[-1], sum(host_sum.subtract_constant))
        squares = given.square().sum(-1, keepdim=True, dtype=torch.float64)
        value = value + prior.within
        if x_weights is None and prior.single is not None:
            slope_of_square, *factors = prior.single
            powers = squares.mul_(slope_of_square).exp_()
            value.add_(powers.sum((-2, -1)), alpha=factors[0] / x_rows)
            if gradients[0] is not None:
                gradients[0].addcmul_(given, powers.to(dtype), value=factors[1] / x_rows)
        else:
            exponents = torch.addcmul(prior.constants, squares, prior.slopes)
            powers = exponents.exp()
            means = powers @ prior.factors
            values = means
            if any(host_sum.subtract_constant):
                values = torch.where(prior.subtract_constant, exponents.expm1(), powers) @ prior.factors
            value = value + (values.narrow(-1, 0, 1) * signed).sum((-2, -1))
            if gradients[0] is not None:
                gradients[0].addcmul_(given, (means.narrow(-1, 1, 1) * signed).to(dtype))
    return value.to(result_dtype), gradients[0], gradients[1]


def quadratic_form(
    kernel: Kernel, z: Tensor, v: Tensor, bandwidth: Numbers, bandwidth_weights: Numbers, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """S (C, C) in float64 for z (N, D) and v (N, C), and from an upstream (C, C) the gradient to z in the accumulation dtype.

    The result is None where z has too many rows, and as that of `mmd`.
    """
    result_dtype = z.dtype
    if (found := _pairs_of_one_sample(kernel, bandwidth, bandwidth_weights, z)) is None:
        return None
    prepared, exponent = found
    plan, _, scaled, _ = prepared
    v, scaled = v.to(exponent.dtype), scaled.to(exponent.dtype)
    sums, _, slope = _sums(prepared, exponent, v, [], True, upstream is not None)
    total = v.double().T @ sums.double()
    if plan.value_constant:
        total += plan.value_constant * pair_weights(v)
    if upstream is None or slope is None:
        return total, None
    coefficients = v @ (upstream + upstream.T).to(scaled.dtype)
    gradient = _product(slope.mul_(coefficients @ v.T), scaled)
    if kernel.radial:
        slope_sums, constant = slope.sum(1, keepdim=True), plan.host_sum.slope_constant
        if constant:
            gradient += constant * (coefficients @ (v.T @ scaled))
            slope_sums += constant * (coefficients @ v.sum(0))[:, None]
        gradient = (scaled * slope_sums).sub_(gradient)
    return total, (gradient * plan.gradient_scale).to(result_dtype).contiguous()


def kernel_matrix(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, z: Tensor) -> tuple[Tensor, float] | None:
    """K (N, N) of z (N, D) less a constant, with 0 on its diagonal, and this constant. None as from `quadratic_form`."""
    if (found := _pairs_of_one_sample(kernel, bandwidth, bandwidth_weights, z)) is None:
        return None
    prepared, exponent = found
    total: Tensor | None = None
    for _, weight, value, _ in _evaluated(prepared, exponent, False):
        if total is not None:
            total.add_(value, alpha=weight)
        elif len(prepared.plan.host_sum.ratios) == 1:
            total = value if weight == 1 else value.mul_(weight)
        else:
            total = value * weight
    assert total is not None
    return total.fill_diagonal_(0), prepared.plan.value_constant


class SmallKernelMatmul(NamedTuple):
    """`kernel_matmul` of few rows of x and y, or its gradients, of which one call overwrites the exponents."""

    kernel: Kernel
    x: _Rows
    y: _Rows
    exponent: Tensor  # (N, M)

    @staticmethod
    def of(kernel: Kernel, x: Tensor, y: Tensor, bandwidth: Numbers, bandwidth_weights: Numbers) -> SmallKernelMatmul | None:
        """None where there are too many rows, and as from `mmd`."""
        found = _pairs_of_two_samples(kernel, bandwidth, bandwidth_weights, x, y, True)
        return None if found is None else SmallKernelMatmul(kernel, *found)

    def matmul(self, v: Tensor) -> Tensor:
        """Σ_j k(x_i, y_j)·v_j, (N, C), for v (M, C), in the dtype of v."""
        weights = v.to(self.exponent.dtype)
        sums, _, _ = _sums(self.x, self.exponent, weights, [], False, False)
        return self._with_constant(sums, weights).to(v.dtype)

    def gradients(self, v: Tensor, grad: Tensor, x: bool, y: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The gradients of Σ_ij grad_i·v_j·k(x_i, y_j) to x and y, or None, and to v, in the dtype of v."""
        plan, dtype = self.x.plan, v.dtype
        v, grad = v.to(self.exponent.dtype), grad.to(self.exponent.dtype)
        # Pairs (y_j, x_i), whose sums over x are the gradient to v.
        sums, _, slope = _sums(self.x, self.exponent.T.contiguous(), grad, [], False, x or y)
        gradients: list[Tensor | None] = [None, None]
        if slope is not None:
            if plan.host_sum.slope_constant:
                slope.add_(plan.host_sum.slope_constant)
            slope.mul_(v @ grad.T)
            for n, (wanted, rows, others, weights) in enumerate(((x, self.x, self.y, slope.T), (y, self.y, self.x, slope))):
                if wanted:
                    gradient = weights @ others.scaled
                    if self.kernel.radial:
                        gradient = (rows.scaled * weights.sum(1, keepdim=True)).sub_(gradient)
                    gradients[n] = (gradient * plan.gradient_scale).to(dtype)
        return gradients[0], gradients[1], self._with_constant(sums, grad).to(dtype)

    def _with_constant(self, sums: Tensor, weights: Tensor) -> Tensor:
        """Adds the constant that each pair lacks. Weights that are not finite make every sum nan."""
        constant = self.x.plan.value_constant * weights.sum(0, dtype=torch.float64)
        return sums + (constant + 0 * constant.sum())


class SmallLogKernel(NamedTuple):
    """Sums of k = 2^log2 of one bandwidth between few rows of x and y, of one problem or of each of a batch: see `Streaming`."""

    x: _Rows
    y: _Rows
    log2: Tensor  # (..., N, M)
    ratio: Tensor | None  # −φ'/φ, or None for 1

    @staticmethod
    def of(kernel: Kernel, x: Tensor, y: Tensor, bandwidth: Numbers, slope: bool) -> SmallLogKernel | None:
        """None where there are too many rows, and as from `mmd`. For gradients `slope` must be set."""
        if (found := _pairs_of_two_samples(kernel, bandwidth, [1.0], x, y, False)) is None:
            return None
        rows, columns, log2 = found
        return SmallLogKernel(rows, columns, log2, rows.plan.evaluator.logarithm_(log2, torch.empty_like(log2) if slope else None, LOG2_E))

    def log2_sums(self, bias: Tensor | None, transposed: bool = False) -> Tensor:
        log2 = self.log2.mT if transposed else self.log2
        log2 = log2.clone() if bias is None else log2 - bias[..., None, :].to(log2.dtype)
        highest = log2.amax(-1, keepdim=True)
        # −∞ where all weights are zero, from which nothing can be subtracted.
        finite = highest.clamp(min=torch.finfo(highest.dtype).min)
        return log2.sub_(finite).clamp_(min=LEAST_EXPONENT[log2.dtype]).exp2_().sum(-1).log2_().add_(highest[..., 0])

    def matmul(self, v: Tensor, row: Tensor, column: Tensor, transposed: bool = False) -> Tensor:
        powers = self._powers(row, column)
        return (powers.mT if transposed else powers) @ v.to(powers.dtype)

    def gradients(
        self, v: Tensor, grad: Tensor, row: Tensor, column: Tensor, x_grad: bool, y_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        powers = self._powers(row, column)
        if self.ratio is not None:
            powers.mul_(self.ratio)
        weights = powers.mul_(grad.to(powers.dtype) @ v.to(powers.dtype).mT)
        gradients: list[Tensor | None] = [None, None]
        for n, (wanted, rows, others, w) in enumerate(((x_grad, self.x, self.y, weights), (y_grad, self.y, self.x, weights.mT))):
            if wanted:
                gradient = (rows.scaled * w.sum(-1, keepdim=True)).sub_(w @ others.scaled)
                gradients[n] = gradient * self.x.plan.gradient_scale
        return gradients[0], gradients[1]

    def _powers(self, row: Tensor, column: Tensor) -> Tensor:
        # In the order of `log2_sums`: what rounding does there cancels.
        log2 = self.log2 - column[..., None, :].to(self.log2.dtype)
        return log2.sub_(row[..., :, None].to(log2.dtype)).clamp_(min=LEAST_EXPONENT[log2.dtype]).exp2_()


def has_few_pairs(x: Tensor, y: Tensor) -> bool:
    """Whether one array of all pairs of x and y, or of all of a batch, is faster than tiles."""
    n, m = x.shape[-2], y.shape[-2]
    prepares_much = min(n, m) <= _FEW_ROWS or x.shape[-1] > _MANY_FEATURES
    return x.shape[:-2].numel() * n * m <= (4 * _PAIRS if prepares_much else _PAIRS)


def _least_exact(reach: float, narrowest: float) -> float:
    """The least 2·t at which distances √(2t) from products in float64 are as exact as float32, in the value of the narrowest bandwidth and
    in its slope.

    `reach` bounds 2·t. An error of t is one of √(2t) divided by that, and is relative to t in a slope.
    """
    error = 0.5 * reach * torch.finfo(torch.float64).eps / _DISTANCE_ERROR
    return max(error, error * error * narrowest)


def pair_exponents(
    kernel: Kernel,
    gamma: float,
    narrowest: float,
    x: Tensor,
    y: Tensor,
    centred: bool = False,
    y_norm2: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """x (..., N, D) and y (..., M, D), centred if that is needed; −γ·d² of each pair, or √(2γ)·d for a function of the distance; and a
    bound of its size. In `dtype`, that of x if None, or in float64.

    `narrowest` is the ratio of the largest γ to this one. None where neither products nor differences are accurate enough.
    """
    dtype, same = dtype or x.dtype, x is y
    if kernel.takes_distance:
        x = x.double()
        y = x if same else y.double()
    x_norm2 = torch.linalg.vecdot(x, x)
    y_norm2 = x_norm2 if same else torch.linalg.vecdot(y, y) if y_norm2 is None else y_norm2
    # Of γ·d², by products. An infinity or a nan is left to the streaming path.
    reach = 2 * gamma * (float(x_norm2.max()) + float(y_norm2.max()))
    error = 0.5 * reach * torch.finfo(x.dtype).eps
    # Rows as given only where their mean adds no error worth mentioning.
    limit = EXPONENT_ERROR[x.dtype] * (1 if centred else 0.1)
    if kernel.takes_distance:
        left = x, x_norm2[..., None]
        right = left if same else (y, y_norm2[..., None])
        # For float64 samples float64 has no digits to spare.
        found = _distances(kernel, left, right, 2 * gamma, reach, narrowest, dtype) if centred or dtype == torch.float32 else None
        if found is not None:
            return x.to(found.dtype), y.to(found.dtype), found, (2 * reach) ** 0.5
    elif error * narrowest * kernel.steepness <= limit:
        multiply = torch.addmm if x.ndim == 2 else torch.baddbmm
        columns = y_norm2 if x.ndim == 2 else y_norm2.unsqueeze(-2)
        exponent = multiply(columns, x, y.mT, alpha=2 * gamma, beta=-gamma).add_(x_norm2.unsqueeze(-1), alpha=-gamma)
        return x, y, exponent, reach
    if not centred:
        centre = 0.5 * x.mean(-2, keepdim=True) + 0.5 * y.mean(-2, keepdim=True)
        x = x - centre
        return pair_exponents(kernel, gamma, narrowest, x, x if same else y - centre, True, dtype=dtype)
    if dtype == torch.float32 and kernel.takes_distance and (reach * narrowest) ** 0.5 * torch.finfo(x.dtype).eps < _DISTANCE_ERROR:
        return x, y, torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mul_((2 * gamma) ** 0.5), (2 * reach) ** 0.5
    return None


def _distances(
    kernel: Kernel,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    factor: float,
    reach: float,
    narrowest: float,
    dtype: torch.dtype,
    in_float64: bool = True,
) -> Tensor | None:
    """√(2t) = √factor·‖x−y‖ from products of rows, in float64 with their ‖x‖² (..., N, 1); None where they are not exact enough.

    In `dtype`, or, if `in_float64`, in float64 where float32 would lose too many digits. For a sample and itself, the same object twice,
    the diagonal is 0. `reach` bounds factor·(‖x‖² + ‖y‖²).
    """
    many = left[0].shape[:-1].numel() * right[0].shape[-2] >= _FEWEST_PAIRS
    in_float32 = many and dtype == torch.float32 and are_distances_in_range(kernel, reach, narrowest)
    multiply = torch.addmm if left[0].ndim == 2 else torch.baddbmm
    for product_dtype in [torch.float32] * in_float32 + [torch.float64] * in_float64:
        (x, x_norm2), (y, y_norm2) = left, right
        if product_dtype == torch.float32:
            x, x_norm2, y, y_norm2 = (t.float() for t in (x, x_norm2, y, y_norm2))
        squares = multiply(y_norm2.mT, x, y.mT, alpha=-2 * factor, beta=factor).add_(x_norm2, alpha=factor)
        if left is right:
            squares.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        least = float(squares.amin())
        if product_dtype == torch.float64 or least >= LEAST_SHARE * reach:
            break
    else:
        return None
    near = _least_exact(reach, narrowest)
    if squares.dtype == torch.float64 and not (near <= least and least > 0):
        by_differences = dtype != torch.float64 and squares.numel() * x.shape[-1] < _FEWEST_DIFFERENCES
        if by_differences or not _refine(squares, x, y, factor, near):
            return None
    if left is right:
        squares.diagonal(dim1=-2, dim2=-1).zero_()
    return (squares.float() if in_float32 and least >= LEAST_SHARE_OF_MOMENTS * reach else squares).sqrt_()


def _refine(squares: Tensor, x: Tensor, y: Tensor, factor: float, near: float) -> bool:
    """Computes the pairs below `near` from differences; False where they are too many, or not exact enough either."""
    pairs = (squares < near).nonzero().unbind(-1)
    if not near < math.inf or pairs[0].numel() * x.shape[-1] > squares.numel():
        return False
    x, y = x[pairs[:-1]], y[pairs[:-2] + pairs[-1:]]
    d2, roundings = (x - y).square_().sum(-1), torch.finfo(torch.float64).eps / _DISTANCE_ERROR
    if bool(((d2 > 0) & (d2 < roundings**2 * (x.square().sum(-1) + y.square().sum(-1)))).any()):
        return False
    squares[pairs] = d2.mul_(factor)
    return True


def _exponents(kernel: Kernel, left: _Rows, right: _Rows, dtype: torch.dtype) -> Tensor | None:
    """The array that `TileEvaluator.evaluate` takes: a number for each pair of rows, in `dtype` or in float64. None as from `mmd`."""
    u, v = left.scaled, right.scaled
    if not kernel.radial:
        return _product(u, v.mT)
    u_half, v_half = left.neg_half_norm2, right.neg_half_norm2
    if kernel.takes_distance:
        sides = [(rows.scaled, -2 * rows.neg_half_norm2) for rows in ((left,) if left is right else (left, right))]
        is_large = u.shape[-2] * v.shape[-2] > _PAIRS_AT_ONCE
        reach, narrowest = left.farthest / LOG2_E, left.plan.host_sum.ratios[-1]
        distances = _distances(kernel, sides[0], sides[-1], 1.0, reach, narrowest, dtype, not is_large)
        if distances is None and dtype != torch.float64 and not is_large:
            return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")
        # Tiles use their memory again: the new pages of large arrays of float64 can take longer than what is done in them.
        return distances
    if u.ndim == 2 and u.shape[0] * v.shape[0] > _PAIRS_OF_SUMS:
        return _product(torch.cat([u, u_half, torch.ones_like(u_half)], 1), torch.cat([v, torch.ones_like(v_half), v_half], 1).T)
    product = torch.addmm if u.ndim == 2 else torch.baddbmm
    return product(u_half, u, v.mT).add_(v_half.mT)


def _prepare(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, z: Tensor, prior: bool, subtract: bool = True) -> _Rows | None:
    """Centred rows z (..., N, D), scaled, with their plan. None if products of them are not accurate enough.

    `prior` says that they are compared with N(0, I), `subtract` that sums may be of k − φ(0).
    """
    h, a = read(bandwidth), read(bandwidth_weights)
    assert not isinstance(h, Tensor)
    assert not isinstance(a, Tensor)
    dim, dtype = z.shape[-1], z.dtype
    plan = _plan(kernel, h, a, dim, dtype, 0)
    if not SCALES[0] < plan.scale < SCALES[1]:
        return None
    scaled = z * plan.scale
    neg_half_norm2 = _neg_half_norm2(scaled)
    if neg_half_norm2.numel() <= _READ and neg_half_norm2.ndim == 2:
        numbers = neg_half_norm2.view(-1).tolist()
        mean, most = -2 * sum(numbers) / len(numbers), -2 * min(numbers)
    else:
        # Of a batch, the mean of the problem whose rows are closest to each other.
        mean, most = -2 * float(neg_half_norm2.mean(-2).max()), -2 * float(neg_half_norm2.min())
    if not (mean > LEAST_SQUARE and most < math.inf):
        return None
    if not kernel.radial:
        return _Rows(plan, math.inf, scaled, neg_half_norm2)
    # For the widest bandwidth t = scale·‖s_i − s_j‖² of the scaled rows.
    scale, ratios = 0.5 / plan.evaluator.exponent_scale, plan.host_sum.ratios
    # Products are wrong by eps in t. A function of the distance is computed from differences, which are wrong by eps in √t.
    eps = torch.finfo(dtype).eps ** (2 if kernel.takes_distance else 1)
    if not scale * most * ratios[-1] * kernel.steepness * eps <= EXPONENT_ERROR[dtype]:
        return None
    # The problem whose rows are closest decides for a batch: sums of k − φ(0) are as accurate where sums of k would do.
    distance = scale * 2 * mean if not prior else scale * mean + plan.host_sum.gamma * dim
    if subtract and (subtracted := sum(is_nearly_constant(kernel, ratio * distance) for ratio in ratios)):
        plan = _plan(kernel, h, a, dim, dtype, subtracted)
        scaled = z * plan.scale
        neg_half_norm2 = _neg_half_norm2(scaled)
    return _Rows(plan, 4 * LOG2_E * scale * most, scaled, neg_half_norm2)


def _pairs_of_one_sample(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, z: Tensor) -> tuple[_Rows, Tensor] | None:
    """Prepared rows, and the exponents of their pairs, for z (N, D) as given; None if it has too many rows."""
    if z.shape[0] ** 2 > _FORM_PAIRS:
        return None
    rows = _centred(kernel, z.double() if kernel.takes_distance else z)
    if (prepared := _prepare(kernel, bandwidth, bandwidth_weights, rows, False)) is None:
        return None
    exponent = _exponents(kernel, prepared, prepared, z.dtype)
    return None if exponent is None else (prepared, exponent)


def _pairs_of_two_samples(
    kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, x: Tensor, y: Tensor, subtract: bool
) -> tuple[_Rows, _Rows, Tensor] | None:
    """The same for each pair of x (..., N, D) and y (..., M, D); `subtract` as for `_prepare`."""
    sizes = x.shape[-2], y.shape[-2]
    if not problems_at_once(sum(sizes), x.shape[-1]):
        return None
    z = torch.cat([x, y], -2)
    z = _centred(kernel, z.double() if kernel.takes_distance else z, sizes[0])
    if (prepared := _prepare(kernel, bandwidth, bandwidth_weights, z, False, subtract)) is None:
        return None
    plan, farthest, *parts = prepared
    left, right = (_Rows(plan, farthest, *part) for part in zip(*(t.split_with_sizes(sizes, -2) for t in parts), strict=True))
    if (exponent := _exponents(kernel, left, right, x.dtype)) is None:
        return None
    left, right = (rows._replace(scaled=rows.scaled.to(exponent.dtype)) for rows in (left, right))
    return left, right, exponent


def _centred(kernel: Kernel, z: Tensor, x_rows: int | None = None) -> Tensor:
    """Rows less their mean, or, of the first `x_rows` rows and the others, less the average of their means; as in the streaming path."""
    if not kernel.radial:
        return z
    # First less one row: far from the origin the mean is rounded, even where all rows are equal.
    z = z - z[..., :1, :]
    if x_rows is None:
        return z.sub_(z.mean(-2, keepdim=True))
    return z.sub_(z[..., :x_rows, :].mean(-2, keepdim=True).add_(z[..., x_rows:, :].mean(-2, keepdim=True)).mul_(0.5))


def _neg_half_norm2(scaled: Tensor) -> Tensor:
    """−½‖s_i‖² of the rows after scaling, so that their rounding cancels between rows close to each other."""
    # A product takes half the time of a sum.
    return scaled.square() @ _minus_halves(scaled.shape[-1], scaled.dtype)


@functools.lru_cache(maxsize=64)
def _minus_halves(features: int, dtype: torch.dtype) -> Tensor:
    return torch.full((features, 1), -0.5, dtype=dtype, device="cpu")


class _Weights(NamedTuple):
    """The weights of [x; y]. For each sample: its rows, and the factor of its own sum in formula (2), less one."""

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
        rows = _sample_slices([part.shape[-1] for part in parts])
        extras = [(square / (1 - square) if unbiased else 0 * square)[..., None, None].to(dtype) for square in squares]
        return _Weights(signed, rows, [signed[..., own, :] for own in rows], extras, torch.stack(squares).sum(0))


def _sample_slices(sizes: list[int]) -> list[slice]:
    return [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]


@functools.lru_cache(maxsize=64)
def _equal_weights(n: int, m: int, unbiased: bool, dtype: torch.dtype) -> _Weights:
    sizes = [n, m] if m else [n]
    signed = torch.tensor([1 / n] * n + [-1 / m for _ in range(m)], dtype=dtype, device="cpu")[:, None]
    extras = [1 / (size - 1) if unbiased else 0.0 for size in sizes]
    row_weights = [1 / n, -1 / m] if m else [1 / n]
    return _Weights(signed, _sample_slices(sizes), row_weights, extras, sum(map(abs, row_weights)))


def _sums(
    prepared: _Rows, exponent: Tensor, weights: Tensor, samples: Sequence[slice], without_diagonal: bool, gradient: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """K·w, the same over the rows of each of `samples` alone, and for a gradient W, which may overwrite the exponents."""
    sums: list[Tensor] = []
    total: Tensor | None = None
    single = len(prepared.plan.host_sum.ratios) == 1
    for ratio, weight, value, neg_dphi in _evaluated(prepared, exponent, gradient):
        if without_diagonal:
            for t in (value,) if neg_dphi is value else (value, neg_dphi):
                t.fill_diagonal_(0) if t.ndim == 2 else t.diagonal(dim1=-2, dim2=-1).zero_()
        more = [value @ weights, *(value[..., rows, rows] @ weights[..., rows, :] for rows in samples)]
        if not single or weight != 1:
            more = [part * weight for part in more]
        sums = [old.add_(new) for old, new in zip(sums, more, strict=True)] if sums else more
        if not gradient:
            continue
        if single:
            total = neg_dphi if weight == 1 else neg_dphi.mul_(weight)
        elif total is None:
            total = neg_dphi * (weight * ratio)
        else:
            total.add_(neg_dphi, alpha=weight * ratio)
    return sums[0], sums[1:], total


def _evaluated(prepared: _Rows, exponent: Tensor, slope: bool) -> Iterator[tuple[float, float, Tensor, Tensor]]:
    """For each bandwidth γ_b/γ_0, a_b, k and, if `slope`, −φ' of every pair; the next overwrites them, and maybe the exponents."""
    host_sum, evaluator = prepared.plan.host_sum, prepared.plan.evaluator
    value = exponent if all(host_sum.squarings[1:]) else torch.empty_like(exponent)
    scratch: Any = value if evaluator.neg_dphi_is_value else None
    if scratch is None and (slope or not evaluator.slope_is_optional):
        scratch = torch.empty_like(exponent)
    for n, (ratio, weight) in enumerate(zip(host_sum.ratios, host_sum.weights, strict=True)):
        functions = exponentials(prepared.farthest * ratio, exponent.dtype)
        yield ratio, weight, value, evaluator.evaluate(n, ratio, exponent, value, scratch, functions)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.ndim == 2 and (product := onednn_product(left.dtype)) is not None:
        (rows, features), columns = left.shape, right.shape[1]
        if is_faster_by_onednn((rows, columns), features):
            return multiply(product, left, right)
        if is_faster_by_onednn((rows, features), columns):
            return multiply(product, right.T.contiguous(), left.T).T
    return left @ right


class _Prior(NamedTuple):
    """E_y k(x, y) for each bandwidth and E k(y, y') of the RBF kernel as numbers, y ~ N(0, I). Source: Rustamov 2019."""

    slopes: Tensor  # −½/(h_b² + 1), of the exponent in ‖x‖²
    constants: Tensor  # log E k(0, y)
    subtract_constant: Tensor
    factors: Tensor  # −2·a_b and 2·a_b/(h_b² + 1), of the value and of the gradient s·x
    within: float
    single: tuple[float, float, float] | None  # for one bandwidth, if nothing is subtracted: its slope and its two factors times E k(0, y)


@functools.lru_cache(maxsize=256)
def _prior(bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, subtracted: int) -> _Prior:
    h, a = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (bandwidth, weights))
    subtract_constant, slopes = torch.arange(len(bandwidth), device="cpu") < subtracted, -0.5 / (h.square() + 1)
    constants = rbf_normal_mean_exponent(torch.zeros(1, dim, dtype=torch.float64, device="cpu"), h)[0]
    within = rbf_normal_self_exponent(dim, h)
    factors = torch.stack([-2 * a, -4 * a * slopes], 1)
    single = None
    if len(bandwidth) == 1 and not subtracted:
        value, gradient = (factors[0] * constants.exp()).tolist()
        single = float(slopes), value, gradient
    within_sum = float(torch.where(subtract_constant, within.expm1(), within.exp()) @ a)
    return _Prior(slopes, constants, subtract_constant, factors, within_sum, single)
