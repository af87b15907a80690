"""Kernel Stein discrepancy to N(0, I) on a CPU: tile by tile, or from one array of all pairs for few rows.

The notation is that of `fastvae.reference.ksd_to_normal`. With W = φ − c the sum Σ_j ∂u(x_i, x_j)/∂x_i is
Σ_j W_ij·(x_j − x_i) + x_i·Σ_j φ_ij, one product of a tile with the rows, which may be moved to any centre. x·y is ½‖x‖² + ½‖y‖² − ½d² of
rows that are not moved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fastvae.cpu.families import Exponentials, exponentials
from fastvae.cpu.tiles import TiledSample, Tiles
from fastvae.dispatch import zero_if_finite
from fastvae.kernel_sums import EXPONENT_ERROR, LOG2_E, HostKernelSum, KernelSum, stable_mean
from fastvae.radial import Kernel, RationalQuadratic

# Up to this many pairs one array of them is faster than tiles, and so many pairs of a batch are taken at once.
_PAIRS = 1 << 18

# Up to this α the rounding of q = 1/(1 + t/α) is small enough for polynomials in q; from there on they are polynomials in 1 − q.
_LARGEST_ALPHA = 16

# Scales of rows whose squares float32 can represent. Others are left to tiles.
_SCALES = 1e-6, 1e6

# The value in float64, and the gradient if it is wanted.
Result = tuple[Tensor, "Tensor | None"]


class SteinBandwidth(NamedTuple):
    """The coefficients of one bandwidth. A pair comes as e = −t_0·exponent_scale; with g = 1/(α + t), v = g or for a large α v = e·g

    u = φ·(½‖x‖² + ½‖y‖² + constant + linear·e + first·v + second·v²),
    W = slope_factor·(φ + slope_scale·g·(u + φ·g·(slope + slope_of_g·g))),

    and for the RBF kernel u = φ·(½‖x‖² + ½‖y‖² + constant + linear·e), W = slope_factor·(u + slope·φ).
    """

    ratio: float  # γ_b/γ_0
    weight: float
    alpha: float  # inf for the RBF kernel
    constant: float
    linear: float
    first: float
    second: float
    slope: float
    slope_of_g: float
    slope_scale: float
    slope_factor: float
    in_g: bool = False  # whether v is g


class _Stein(NamedTuple):
    """All bandwidths, widest first, and the scale of rows whose products are exponents."""

    bandwidths: list[SteinBandwidth]
    scale: float

    @staticmethod
    def of(host_sum: HostKernelSum, exponent_scale: float, dim: int, dtype: torch.dtype) -> _Stein:
        """For rows of `dim` features."""
        kernel, widest = host_sum.kernel, host_sum.gamma
        # −d²/2 is this times e, and of an RBF kernel −t_b·(2 + 4γ_b) is this times e.
        half_d2 = 0.5 / (widest * exponent_scale)
        more = [ratio * (2 + 4 * ratio * widest) / exponent_scale if kernel.is_exponential else 0.0 for ratio in host_sum.ratios]
        if dtype == torch.float32:
            # A rounded coefficient would be a bias in x·y, which the mean over the pairs does not average out.
            half_d2 = float(np.float32(half_d2 + more[0])) - more[0]
        bandwidths = []
        for ratio, weight, linear in zip(host_sum.ratios, host_sum.weights, more, strict=True):
            gamma, linear = ratio * widest, half_d2 + linear
            constant = 2 * gamma * dim
            if not isinstance(kernel, RationalQuadratic):
                slope = (1 + 4 * gamma + 8 * gamma**2) / (2 * gamma)
                bandwidths.append(SteinBandwidth(ratio, weight, math.inf, constant, linear, 0.0, 0.0, slope, 0.0, 0.0, 2 * gamma))
                continue
            alpha = float(kernel.alpha)
            second = 4 * gamma * (alpha + 1)
            first, slope = (2 * alpha + constant + sign * second for sign in (1, -1))
            of_values = constant, linear, ratio * first, ratio**2 * second
            # Of a wide kernel the constants of polynomials in g would cancel to a number as small as γ.
            in_g = alpha <= _LARGEST_ALPHA and gamma > 0.25
            if in_g:
                of_values = constant - first + second, linear, alpha * (first - 2 * second), alpha**2 * second
            bandwidths.append(SteinBandwidth(ratio, weight, alpha, *of_values, slope, 2 * alpha * second, 2 * gamma * alpha, 1.0, in_g))
        return _Stein(bandwidths, half_d2**-0.5)


class _Pairs(NamedTuple):
    """Arrays with one number for each pair."""

    value: Tensor  # u
    phi: Tensor
    slope: Tensor  # W/slope_factor
    g: Tensor


def _evaluate(
    c: SteinBandwidth, exponent: Tensor, halves: tuple[Tensor, Tensor], out: _Pairs, gradient: bool, functions: Exponentials
) -> _Pairs:
    """u, φ and, for a gradient, W/slope_factor, in `out`, whose `phi` may be `exponent` for the last bandwidth of an RBF kernel.

    `halves` are ½‖x‖² (…, N, 1) and ½‖y‖² (…, 1, M), in float64.
    """
    value, phi, slope, g = out
    # Rounded after the sum: a constant in float32 may be lost, or be rounded in the same direction for all rows.
    rows, columns = halves[0].to(value.dtype), (halves[1] + c.constant).to(value.dtype)
    torch.add(rows, exponent, alpha=c.linear, out=value).add_(columns)
    if c.alpha == math.inf:
        if phi is not exponent or c.ratio != 1:
            torch.mul(exponent, c.ratio, out=phi)
        value.mul_(functions.exp2_(phi))
        if gradient:
            torch.add(value, phi, alpha=c.slope, out=slope)
        return out
    torch.add(_scalar(c.alpha, g.dtype), exponent, alpha=-c.ratio, out=g).reciprocal_()
    v = g if c.in_g else torch.mul(exponent, g, out=slope)
    value.add_(v, alpha=c.first).addcmul_(v, v, value=c.second)
    if c.alpha == 1:
        phi = g  # itself, in place of a copy
    elif c.alpha == 0.5:
        torch.mul(g, 0.5, out=phi).sqrt_()
    else:
        # log1p, as the rounding of 1 + t/α would be multiplied by a large α.
        functions.exp2_(torch.mul(exponent, -c.ratio / c.alpha, out=phi).log1p_().mul_(-c.alpha * LOG2_E))
    value.mul_(phi)
    if gradient:
        torch.add(_scalar(c.slope, g.dtype), g, alpha=c.slope_of_g, out=slope).mul_(g)
        torch.addcmul(value, slope, phi, out=slope)
        torch.addcmul(phi, g, slope, value=c.slope_scale, out=slope)
    return out._replace(phi=phi)


@functools.lru_cache(maxsize=256)
def _scalar(number: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(number, dtype=dtype, device="cpu")


class _Sweep(Tiles):
    """The sums over pairs of rows of one problem, tile by tile."""

    def __init__(self, kernel: KernelSum, z: Tensor, centre: Tensor, gradient: bool) -> None:
        super().__init__(kernel, [z], centre)
        self.bandwidths, self.scale = _Stein.of(self.host_sum, self.evaluator.exponent_scale, z.shape[1], self.dtype)
        self.gradient = gradient

    def halves(self, a: TiledSample) -> Tensor:
        """½‖x‖² of each row, (N,), in float64."""
        return torch.cat([0.5 * a.z[i].to(self.dtype).square().sum(1, dtype=torch.float64) for i in a.tiles])

    def add_tile(self, a: TiledSample, i: slice, b: TiledSample, j: slice, halves: tuple[Tensor, Tensor], phi_sums: Tensor) -> float:
        """Σ u over a tile, less its diagonal; a tile off the diagonal of one sample counts twice. `halves` are those of its rows.

        Adds its share to the moments, of W in place of w_j·W_ij, and to `phi_sums`, Σ_j φ_ij of the rows of a.
        """
        total = 0.0
        within, diagonal = a is b, a is b and i == j
        exponent = self._exponent(a, i, b, j)
        out = _Pairs(*(self.buffer(name, i, j) for name in ("value", "phi", "slope", "g")))
        if self.single and self.kernel.is_exponential:
            out = out._replace(phi=exponent)
        reach = a.radius2[i.start] ** 0.5 + b.radius2[j.start] ** 0.5
        farthest = self.host_sum.gamma * LOG2_E * reach * reach
        slope = out.slope if self.single else self.buffer("slope total", i, j).zero_()
        for c in self.bandwidths:
            pairs = _evaluate(c, exponent, halves, out, self.gradient, exponentials(farthest * c.ratio, self.dtype))
            if diagonal:
                for t in (pairs.value, pairs.phi, pairs.slope):
                    t.fill_diagonal_(0)
            # Rows are summed in the dtype of the tile, their sums in float64.
            total += c.weight * float(pairs.value.sum(1).sum(dtype=torch.float64))
            if not self.gradient:
                continue
            phi_sums[i].add_(pairs.phi.sum(1), alpha=c.weight)
            if within and not diagonal:
                phi_sums[j].add_(pairs.phi.sum(0), alpha=c.weight)
            if not self.single:
                slope.add_(pairs.slope, alpha=c.weight * c.slope_factor)
        if self.gradient:
            c = self.bandwidths[0]
            self.add_moments(slope, a, i, b, j, c.weight * c.slope_factor if self.single else 1.0)
        return total * (2 if within and not diagonal else 1)


def ksd_to_normal(kernel: KernelSum, z: Tensor, others: Sequence[Tensor], unbiased: bool, gradient: bool) -> Result:
    """The share of rows z (N, D) in KSD² of them and `others`, and the gradient of the whole to z."""
    whole = torch.cat([z, *others]) if others else z
    sweep = _Sweep(kernel, whole, stable_mean(whole), gradient)
    a = sweep.prepare(z, torch.ones_like(z[:, 0]), gradient)
    halves, phi_sums = sweep.halves(a), sweep.centre.new_zeros(len(a))
    total = 0.0
    for n, i in enumerate(a.tiles):
        for j in a.tiles[n:]:
            total += sweep.add_tile(a, i, a, j, (halves[i, None], halves[None, j]), phi_sums)
    for rows in others:
        b = sweep.prepare(rows, torch.ones_like(rows[:, 0]), False)
        other_halves = sweep.halves(b)
        for i in a.tiles:
            for j in b.tiles:
                total += sweep.add_tile(a, i, b, j, (halves[i, None], other_halves[None, j]), phi_sums)
    # Rows that are not finite give nan, which sums of kernels alone may not show.
    zero = zero_if_finite(z, *others)
    weights = float(kernel.weights.sum())
    if not unbiased:
        diagonal = float((kernel.weights * kernel.gamma).sum())
        total += weights * 2 * float(halves.sum()) + 2 * z.shape[1] * diagonal * len(z)
        phi_sums += weights
    factor = 1 / (len(whole) * (len(whole) - unbiased)) + zero
    if not gradient:
        return total * factor, None
    row_gradient = z * phi_sums[:, None].to(z.dtype) - sweep.row_gradient(a)
    return total * factor, row_gradient.mul_((2 * factor).to(z.dtype))


class _Plan(NamedTuple):
    """What depends on the kernels, the number of features and the dtype alone."""

    stein: _Stein
    steepest: float  # γ of the narrowest bandwidth, over the scale squared
    weights: float  # Σ_b a_b
    diagonal: float  # 2·D·Σ_b a_b·γ_b
    near_origin: list[_Term]  # widest first; none for kernels that `near_origin` does not take


class _Term(NamedTuple):
    """One bandwidth of `near_origin`."""

    weight: float
    gamma: float
    alpha: float  # inf for the RBF kernel


@functools.lru_cache(maxsize=256)
def _plan(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, dtype: torch.dtype) -> _Plan:
    kernels = KernelSum.of(kernel, bandwidth, weights, dim, torch.device("cpu"), None)
    host_sum, exponent_scale = HostKernelSum.of(kernels), LOG2_E if kernel.is_exponential else 1.0
    gamma, pairs = host_sum.gamma, list(zip(host_sum.ratios, host_sum.weights, strict=True))
    alpha = float(kernel.alpha) if isinstance(kernel, RationalQuadratic) else math.inf
    near_origin = [_Term(weight, ratio * gamma, alpha) for ratio, weight in pairs if alpha in (0.5, 1, math.inf)]
    return _Plan(
        _Stein.of(host_sum, exponent_scale, dim, dtype),
        host_sum.ratios[-1] / (2 * exponent_scale),
        math.fsum(weights),
        2 * dim * gamma * math.fsum(ratio * weight for ratio, weight in pairs),
        near_origin,
    )


def problems_at_once(rows: int) -> int:
    """How many problems of a batch `few_rows` takes at once; 0 if one is too large."""
    return _PAIRS // (rows * rows)


def few_rows(
    kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], z: Tensor, unbiased: bool, gradient: bool
) -> Result | None:
    """KSD² of each problem of z (..., N, D), in float64, and its gradient. None where products of rows are not accurate enough."""
    plan, count = _plan(kernel, bandwidth, weights, z.shape[-1], z.dtype), z.shape[-2]
    bandwidths, scale = plan.stein
    if not _SCALES[0] < scale < _SCALES[1]:
        return None
    # In float64, as a rounded scale would be a bias too.
    scaled = (z - z.mean(-2, keepdim=True)).double().mul_(scale).to(z.dtype)
    minus_halves = scaled.square() @ _column(-0.5, z.shape[-1], z.dtype)
    farthest = -2 * float(minus_halves.min())
    if not farthest * plan.steepest * torch.finfo(z.dtype).eps <= EXPONENT_ERROR[z.dtype]:
        return None
    halves = z.double().square() @ _column(0.5, z.shape[-1], torch.float64)
    multiply = torch.addmm if z.ndim == 2 else torch.baddbmm
    exponent = multiply(minus_halves, scaled, scaled.mT).add_(minus_halves.mT)
    # The arrays that are summed come first, so that one operation sums all of them.
    arrays = exponent.new_empty((4, *exponent.shape))
    out = _Pairs(*arrays.unbind(0))
    summed = arrays[: 3 if gradient else 1]
    functions = exponentials(2 * LOG2_E * plan.steepest * farthest, z.dtype)
    sums: Tensor | None = None
    slope = out.slope
    for n, c in enumerate(bandwidths):
        _evaluate(c, exponent, (halves, halves.mT), out._replace(g=out.phi) if c.alpha == 1 else out, gradient, functions)
        summed.diagonal(dim1=-2, dim2=-1).zero_()
        found = summed.sum(-1, keepdim=True)
        if sums is None:
            sums = found if c.weight == 1 else found * c.weight
        else:
            sums.add_(found, alpha=c.weight)
        if gradient and len(bandwidths) > 1:
            factor = c.weight * c.slope_factor
            slope = slope.add_(out.slope, alpha=factor) if n else out.slope * factor
    assert sums is not None
    number = count * (count - unbiased)
    # Rows are summed in their dtype, their sums in float64.
    value = sums[0].sum((-2, -1), dtype=torch.float64)
    if not unbiased:
        value = value.add_(halves.sum((-2, -1)), alpha=2 * plan.weights).add_(count * plan.diagonal)
    value.div_(number)
    if not gradient:
        return value, None
    factor = 1.0 if len(bandwidths) > 1 else bandwidths[0].weight * bandwidths[0].slope_factor
    slope_sums = sums[2] if len(bandwidths) == 1 and factor == 1 else slope.sum(-1, keepdim=True)
    moments = (slope @ scaled).addcmul_(scaled, slope_sums, value=-1).mul_(2 * factor / scale / number)
    phi_sums = sums[1] if unbiased else sums[1].add_(plan.weights)
    return value, moments.addcmul_(z, phi_sums, value=2 / number)


def near_origin(
    kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], z: Tensor, unbiased: bool, gradient: bool
) -> Result | None:
    """`few_rows` in fewer calls of PyTorch, from x·y itself. None for other kernels, and where z is far from the origin.

    With g = 1/(1 + t/α), u = φ·(x·y − 2α + (2α + 2γ·D − s)·g + s·g²), s = 4γ·(α + 1), and of the RBF kernel
    u = φ·(x·y + 2γ·D − (2 + 4γ)·t). The gradient to x_i is the sum over j of (φ − 2u')·x_j + 2u'·x_i, where u' = ∂u/∂d².
    """
    *_, count, dim = z.shape
    terms = _plan(kernel, bandwidth, weights, dim, z.dtype).near_origin
    norm2 = torch.linalg.vecdot(z, z)
    farthest = float(norm2.max())
    # False for a nan too.
    if not (terms and farthest <= 4 * dim + 20 and farthest * terms[-1].gamma * torch.finfo(z.dtype).eps <= EXPONENT_ERROR[z.dtype]):
        return None
    products = z @ z.mT
    d2 = torch.add(norm2.unsqueeze(-1), norm2.unsqueeze(-2)).sub_(products, alpha=2)
    sums = of_slopes = moments = cast(Tensor, None)
    for weight, gamma, alpha in terms:
        slope_of_t = 2 + 4 * gamma
        if alpha == math.inf:
            g = phi = exponentials(4 * LOG2_E * gamma * farthest, z.dtype).exp2_(d2 * (-gamma * LOG2_E))
            u = torch.add(products, d2, alpha=-gamma * slope_of_t).add_(2 * gamma * dim).mul_(phi)
        else:
            second = 4 * gamma * (alpha + 1)
            g = torch.add(d2, alpha / gamma).reciprocal_().mul_(alpha / gamma)
            phi = g if alpha == 1 else g.sqrt()
            # In two steps, as a rounded coefficient would be a bias.
            u = torch.addcmul(products, g, g, value=second).add_(g, alpha=2 * gamma * dim - second).add_(g, alpha=2 * alpha)
            u.sub_(2 * alpha).mul_(phi)
        if unbiased:
            for t in (u, phi) if phi is g else (u, phi, g):
                t.diagonal(dim1=-2, dim2=-1).zero_()
        row_sums = u.sum(-1)
        sums = _accumulated(sums, row_sums, weight)
        if not gradient:
            continue
        # −u'/γ, and φ − 2u' over a factor.
        if alpha == math.inf:
            slope_sums = phi.sum(-1).mul_(slope_of_t).add_(row_sums)
            slope, factor = u.add_(phi, alpha=slope_of_t + 0.5 / gamma), 2 * gamma
        else:
            first = 2 * alpha + 2 * gamma * dim - second
            minus_slope = torch.add(_scalar(first / alpha, z.dtype), g, alpha=2 * second / alpha).mul_(g).mul_(phi).add_(u).mul_(g)
            # The gradient of the pair of a row with itself is x_i: the rest would cancel only to rounding.
            minus_slope.diagonal(dim1=-2, dim2=-1).zero_()
            slope_sums = minus_slope.sum(-1)
            slope, factor = minus_slope.mul_(2 * gamma).add_(phi), 1.0
        of_slopes = _accumulated(of_slopes, slope_sums, -2 * gamma * weight)
        moments = _accumulated(moments, slope @ z, factor * weight)
    number = count * (count - unbiased)
    # Rows are summed in their dtype, their sums in float64.
    value = sums.sum(-1, dtype=torch.float64).div_(number)
    if not gradient:
        return value, None
    return value, moments.add_(z * of_slopes.unsqueeze(-1)).mul_(2 / number)


def _accumulated(total: Tensor | None, part: Tensor, factor: float) -> Tensor:
    if total is None:
        return part if factor == 1 else part * factor
    return total.add_(part, alpha=factor)


@functools.lru_cache(maxsize=64)
def _column(number: float, rows: int, dtype: torch.dtype) -> Tensor:
    """A product with it takes half the time of a sum."""
    return torch.full((rows, 1), number, dtype=dtype, device="cpu")
