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
    curvature: list[CurvatureBandwidth]
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
        CurvatureBandwidth.all_of(host_sum, exponent_scale, dim),
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
    centred = _scaled(z, scale, plan.steepest)
    if centred is None:
        return None
    scaled, minus_halves, farthest = centred
    halves = z.double().square() @ _column(0.5, z.shape[-1], torch.float64)
    exponent = _multiply_add(minus_halves, scaled, scaled.mT).add_(minus_halves.mT)
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


def _scaled(z: Tensor, scale: float, steepest: float) -> tuple[Tensor, Tensor, float] | None:
    """The rows, centred and scaled, −½ of their squares (..., N, 1) and the largest of these squares, unless they are too large."""
    if not _SCALES[0] < scale < _SCALES[1]:
        return None
    # In float64, as a rounded scale would be a bias too.
    scaled = (z - z.mean(-2, keepdim=True)).double().mul_(scale).to(z.dtype)
    minus_halves = scaled.square() @ _column(-0.5, z.shape[-1], z.dtype)
    farthest = -2 * float(minus_halves.min())
    if not farthest * steepest * torch.finfo(z.dtype).eps <= EXPONENT_ERROR[z.dtype]:
        return None
    return scaled, minus_halves, farthest


def _multiply_add(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.addmm(total, left, right) if left.ndim == 2 else torch.baddbmm(total, left, right)


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


class CurvatureBandwidth(NamedTuple):
    """The coefficients of one bandwidth in formula (5). With e as in `SteinBandwidth`, G = 1/(1 + t/α) and v = G or for a large α v = e·G

    V = −(∂u/∂t)/(φ·G) = ½‖x‖² + ½‖y‖² + constant + linear·e + first·v + second·v²,
    T = (∂²u/∂t²)/(φ·G²)/steep = V + more_first·G + more_second·G²,

    and for the RBF kernel G = 1, V = ½‖x‖² + ½‖y‖² + constant + linear·e, T = V + more_first.
    """

    ratio: float  # γ_b/γ_0
    weight: float
    alpha: float  # inf for the RBF kernel
    constant: float
    linear: float
    first: float
    second: float
    more_first: float
    more_second: float
    steep: float  # 1 + 1/α
    twice_gamma: float
    in_g: bool = False  # whether v is G

    @staticmethod
    def all_of(host_sum: HostKernelSum, exponent_scale: float, dim: int) -> list[CurvatureBandwidth]:
        """Widest first, for rows of `dim` features."""
        kernel, bandwidths = host_sum.kernel, []
        for ratio, weight in zip(host_sum.ratios, host_sum.weights, strict=True):
            gamma = ratio * host_sum.gamma
            half_d2, twice = 0.5 / (host_sum.gamma * exponent_scale), 2 * gamma
            if not isinstance(kernel, RationalQuadratic):
                more = 2 + 4 * gamma
                linear = half_d2 + more * ratio / exponent_scale
                bandwidths.append(CurvatureBandwidth(ratio, weight, math.inf, twice * dim + more, linear, 0.0, 0.0, more, 0.0, 1.0, twice))
                continue
            alpha = float(kernel.alpha)
            steep, curved = 1 + 1 / alpha, 4 * gamma * (alpha + 1)
            first, second = (2 * alpha + twice * dim - curved) * steep, curved * (1 + 2 / alpha)
            more_of_g = first / (alpha + 1), 2 * second / (alpha + 1), steep, twice
            in_g = alpha <= _LARGEST_ALPHA
            if in_g:
                of_v = -2 * alpha, half_d2, first, second
            else:
                constant = 2 + twice * dim * steep + curved / alpha
                of_v = constant, half_d2, ratio * (first + 2 * second) / alpha, second * (ratio / alpha) ** 2
            bandwidths.append(CurvatureBandwidth(ratio, weight, alpha, *of_v, *more_of_g, in_g))
        return bandwidths


class _Curvature(NamedTuple):
    """Arrays with one number for each pair, of formula (5)."""

    phi: Tensor  # φ
    of_direction: Tensor  # φ − P
    of_rows: Tensor  # (φ'·dt − Q)/2γ
    cross: Tensor  # −φ'·dt/2γ
    g: Tensor
    scratch: Tensor


def _evaluate_curvature(
    c: CurvatureBandwidth,
    exponent: Tensor,
    s: Tensor,
    halves: tuple[Tensor, Tensor],
    dots: tuple[Tensor, Tensor],
    out: _Curvature,
    functions: Exponentials,
) -> _Curvature:
    """Formula (5) in `out`. `halves` are ½‖x‖² and ½‖y‖² of rows that are not moved, `dots` their products with their directions."""
    phi, of_direction, of_rows, cross, g, scratch = out
    rows, columns = halves[0].to(phi.dtype), (halves[1] + c.constant).to(phi.dtype)
    torch.add(rows, exponent, alpha=c.linear, out=of_direction).add_(columns)
    # dq − s
    torch.add(dots[0].to(phi.dtype), s, alpha=-2, out=of_rows).add_(dots[1].to(phi.dtype))
    if c.alpha == math.inf:
        functions.exp2_(torch.mul(exponent, c.ratio, out=phi))
        minus_dphi = phi
        # After φ, which may be zero where V is very large.
        of_direction.mul_(phi)
        torch.add(of_direction, phi, alpha=c.more_first, out=scratch)
        of_rows.mul_(phi).addcmul_(s, scratch, value=-c.twice_gamma)
    else:
        torch.add(_scalar(1.0, g.dtype), exponent, alpha=-c.ratio / c.alpha, out=g).reciprocal_()
        v = g if c.in_g else torch.mul(exponent, g, out=scratch)
        of_direction.add_(v, alpha=c.first).addcmul_(v, v, value=c.second)
        torch.add(of_direction, g, alpha=c.more_first, out=scratch).addcmul_(g, g, value=c.more_second).mul_(g)
        of_rows.addcmul_(s, scratch, value=-c.twice_gamma * c.steep)
        if c.alpha == 1:
            phi = g  # itself, in place of a copy
        elif c.alpha == 0.5:
            torch.sqrt(g, out=phi)
        else:
            # log1p, as the rounding of 1 + t/α would be multiplied by a large α.
            functions.exp2_(torch.mul(exponent, -c.ratio / c.alpha, out=phi).log1p_().mul_(-c.alpha * LOG2_E))
        minus_dphi = torch.mul(phi, g, out=scratch)
        of_direction.mul_(minus_dphi)
        of_rows.mul_(minus_dphi)
    torch.add(phi, of_direction, alpha=c.twice_gamma, out=of_direction)
    torch.mul(s, minus_dphi, out=cross)
    return out._replace(phi=phi)


class _Directed(NamedTuple):
    """A sample with a direction for each row, prepared for `_CurvatureSweep`."""

    rows: TiledSample
    right: Tensor  # (N, 2D + 2), the right factor of the product that is (z_i − z_j)·(a_i − a_j)
    weighted: Tensor  # (D + 1, N): [a_j, 1]
    moments: Tensor  # (D + 1, N): Σ_j (φ − P)_ij·[a_j, 1]
    direction: Tensor
    halves: Tensor
    dots: Tensor  # (N,): z·a, in float64
    phi_sums: Tensor  # (N,): Σ_j φ_ij
    cross_sums: Tensor  # (N,): Σ_j φ'_ij·dt_ij


class _CurvatureSweep(Tiles):
    """The sums of formula (5) over pairs of rows of one problem, tile by tile."""

    def __init__(self, kernel: KernelSum, z: Tensor, centre: Tensor) -> None:
        super().__init__(kernel, [z], centre)
        self.bandwidths = CurvatureBandwidth.all_of(self.host_sum, self.evaluator.exponent_scale, z.shape[1])
        self._left_of_s: tuple[_Directed, slice, Tensor] | None = None

    def directed(self, z: Tensor, direction: Tensor, moments: bool) -> _Directed:
        rows = self.prepare(z, torch.ones_like(z[:, 0]), moments)
        direction = direction.to(self.dtype)
        centred = self.centred(z)
        dots = torch.linalg.vecdot(z.double(), direction.double())
        weighted = torch.cat([direction.T, torch.ones_like(direction.T[:1])])
        right = torch.cat([direction, centred, weighted[-1:].T, torch.linalg.vecdot(centred, direction)[:, None]], 1)
        halves = 0.5 * torch.cat([z[i].to(self.dtype).square().sum(1, dtype=torch.float64) for i in rows.tiles])
        sums = self.centre.new_zeros((2, len(z)))
        return _Directed(rows, right, weighted, torch.zeros_like(weighted), direction, halves, dots, *sums)

    def s(self, a: _Directed, i: slice, b: _Directed, j: slice) -> Tensor:
        """(z_i − z_j)·(a_i − a_j) over a tile."""
        if max(a.rows.radius2[i.start], b.rows.radius2[j.start]) > self.limit:
            return self._s_by_differences(a, i, b, j)
        if self._left_of_s is None or self._left_of_s[0] is not a or self._left_of_s[1] != i:
            dim = a.direction.shape[1]
            direction, centred, one, dot = a.right[i].split_with_sizes((dim, dim, 1, 1), 1)
            self._left_of_s = a, i, torch.cat([-centred, -direction, dot, one], 1)
        return self.product("s", self._left_of_s[2], b.right[j].T)

    def _s_by_differences(self, a: _Directed, i: slice, b: _Directed, j: slice) -> Tensor:
        out, difference = self.buffer("s", i, j).zero_(), self.buffer("difference", i, j)
        x, y, x_direction, y_direction = a.rows.z[i].double(), b.rows.z[j].double(), a.direction[i], b.direction[j]
        for d in range(x.shape[1]):
            torch.sub(x[:, d, None], y[:, d], out=difference)
            out.addcmul_(difference, x_direction[:, d, None] - y_direction[:, d])
        return out

    def add_tile(self, a: _Directed, i: slice, b: _Directed, j: slice) -> None:
        """Adds a tile's share to the sums of a, and of b if it is a."""
        exponent, s = self._exponent(a.rows, i, b.rows, j), self.s(a, i, b, j)
        out = _Curvature(*(self.buffer(name, i, j) for name in _Curvature._fields))
        reach = a.rows.radius2[i.start] ** 0.5 + b.rows.radius2[j.start] ** 0.5
        farthest = self.host_sum.gamma * LOG2_E * reach * reach
        halves, dots = (a.halves[i, None], b.halves[None, j]), (a.dots[i, None], b.dots[None, j])
        within, diagonal = a is b, a is b and i == j
        of_direction, of_rows = out.of_direction, out.of_rows
        if not self.single:
            of_direction, of_rows = (self.buffer(f"total {name}", i, j).zero_() for name in ("of_direction", "of_rows"))
        for c in self.bandwidths:
            pairs = _evaluate_curvature(c, exponent, s, halves, dots, out, exponentials(farthest * c.ratio, self.dtype))
            if diagonal:
                for t in pairs[:4]:
                    t.fill_diagonal_(0)
            for total, tile, factor in ((0, pairs.phi, c.weight), (1, pairs.cross, -c.weight * c.twice_gamma)):
                (a.phi_sums, a.cross_sums)[total][i].add_(tile.sum(1), alpha=factor)
                if within and not diagonal:
                    (a.phi_sums, a.cross_sums)[total][j].add_(tile.sum(0), alpha=factor)
            if not self.single:
                of_direction.add_(pairs.of_direction, alpha=c.weight)
                of_rows.add_(pairs.of_rows, alpha=c.weight * c.twice_gamma)
        weight, twice_gamma = (self.bandwidths[0].weight, self.bandwidths[0].twice_gamma) if self.single else (1.0, 1.0)
        self.add_moments(of_rows, a.rows, i, b.rows, j, weight * twice_gamma)
        self.add_product(a.moments[:, i], b.weighted[:, j], of_direction.T, weight)
        if within and not diagonal:
            self.add_product(a.moments[:, j], a.weighted[:, i], of_direction, weight)

    def result(self, a: _Directed, weights: float) -> Tensor:
        """Half of the Hessian of Σ_ij u_ij times the direction; `weights` is what φ of a row with itself adds."""
        of_direction = a.direction * (a.phi_sums + weights - a.moments[-1])[:, None] + a.moments[:-1].T
        return of_direction + a.rows.z * a.cross_sums[:, None] - self.row_gradient(a.rows)


def hessian_product(kernel: KernelSum, z: Tensor, direction: Tensor, others: Sequence[tuple[Tensor, Tensor]], unbiased: bool) -> Tensor:
    """The rows of z (N, D) in the Hessian of KSD² of them and `others` times a direction, which comes with each of these too."""
    whole = torch.cat([z, *(rows for rows, _ in others)]) if others else z
    sweep = _CurvatureSweep(kernel, whole, stable_mean(whole))
    a = sweep.directed(z, direction, True)
    for n, i in enumerate(a.rows.tiles):
        for j in a.rows.tiles[n:]:
            sweep.add_tile(a, i, a, j)
    for rows, its_direction in others:
        b = sweep.directed(rows, its_direction, False)
        for i in a.rows.tiles:
            for j in b.rows.tiles:
                sweep.add_tile(a, i, b, j)
    factor = 2 / (len(whole) * (len(whole) - unbiased)) + zero_if_finite(whole)
    weights = 0.0 if unbiased else float(kernel.weights.sum())
    return sweep.result(a, weights).mul_(factor).to(z.dtype)


def hessian_product_of_few_rows(
    kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], z: Tensor, direction: Tensor, unbiased: bool
) -> Tensor | None:
    """`hessian_product` of each problem of z (..., N, D), from one array of pairs. None where products of rows are not accurate enough."""
    plan, count = _plan(kernel, bandwidth, weights, z.shape[-1], z.dtype), z.shape[-2]
    scale = plan.stein.scale
    centred = _scaled(z, scale, plan.steepest)
    if centred is None:
        return None
    scaled, minus_halves, farthest = centred
    exponent = _multiply_add(minus_halves, scaled, scaled.mT).add_(minus_halves.mT)
    # (z_i − z_j)·(a_i − a_j), less the two products of a row with its own direction
    crossed = (scaled @ direction.mT).mul_(-1 / scale)
    s = crossed + crossed.mT
    own = crossed.diagonal(dim1=-2, dim2=-1)[..., None]
    s.sub_(own).sub_(own.mT)
    halves = z.double().square() @ _column(0.5, z.shape[-1], torch.float64)
    dots = torch.linalg.vecdot(z.double(), direction.double())[..., None]
    # The arrays that are summed come first, so that one operation sums all of them.
    arrays = exponent.new_empty((len(_Curvature._fields), *exponent.shape))
    out, summed = _Curvature(*arrays.unbind(0)), arrays[:4]
    functions = exponentials(2 * LOG2_E * plan.steepest * farthest, z.dtype)
    total: Tensor | None = None
    for c in plan.curvature:
        pairs = _evaluate_curvature(c, exponent, s, (halves, halves.mT), (dots, dots.mT), out, functions)
        if pairs.phi is not out.phi:
            out.phi.copy_(pairs.phi)
        summed.diagonal(dim1=-2, dim2=-1).zero_()
        sums = summed.sum(-1, keepdim=True)
        of_rows = torch.addcmul((out.of_rows @ scaled).div_(scale), scaled, sums[2], value=-1 / scale).addcmul_(z, sums[3], value=-1)
        part = (out.of_direction @ direction).addcmul_(direction, sums[0] - sums[1]).add_(of_rows, alpha=c.twice_gamma)
        total = _accumulated(total, part, c.weight)
    assert total is not None
    if not unbiased:
        total = total.add_(direction, alpha=plan.weights)
    return total.mul_(2 / (count * (count - unbiased)))
