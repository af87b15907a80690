"""Each kernel family on the CPU: φ and −φ' of a whole tile of pairs, in place. One class a family.

A tile comes as one number for each pair, which the widest bandwidth determines: −t_0·exponent_scale of a radial kernel, √(2·t_0) of a
function of the distance, t_0 of a kernel of x·y. Narrower bandwidths follow from it by their ratios γ_b/γ_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastvae.kernel_sums import LOG2_E, HostKernelSum
from fastvae.radial import MATERN_32, MATERN_52, RBF, Kernel, Laplace, Matern32, Matern52, Polynomial, RationalQuadratic, Riesz, Sum


class Exponentials(NamedTuple):
    """In place: 2^t and exp(t) − 1 of t ≤ 0, and the square of such an exponential."""

    exp2_: Callable[[Tensor], Tensor]
    expm1_: Callable[[Tensor], Tensor]
    square_: Callable[[Tensor], Tensor]


_EXPONENTIALS = Exponentials(Tensor.exp2_, Tensor.expm1_, Tensor.square_)


def _clamped(exponent: float) -> Exponentials:
    """Exponentials are clamped so that they and their squares are at least 2^exponent."""
    least = 2 ** (exponent / 2)
    return Exponentials(lambda t: t.clamp_(min=exponent).exp2_(), Tensor.expm1_, lambda power: power.clamp_(min=least).square_())


# Denormal numbers are a hundred times slower. They begin at these exponents; clamped at 0.8 of them, products with weights and points are
# normal too. The clamp is worth its time only where the farthest pairs of a tile are beyond 2.5 times these exponents: for normal samples
# few pairs are more than a third as far.
_DENORMAL_EXPONENT = {torch.float32: -126.0, torch.float64: -1022.0}
_CLAMPED = {dtype: _clamped(0.8 * exponent) for dtype, exponent in _DENORMAL_EXPONENT.items()}
_CLAMP_FROM = 2.5


def exponentials(farthest: float, dtype: torch.dtype) -> Exponentials:
    """For exponents, to base 2, down to −farthest."""
    return _CLAMPED[dtype] if _CLAMP_FROM < farthest / -_DENORMAL_EXPONENT[dtype] < math.inf else _EXPONENTIALS


@dataclass(frozen=True)
class TileEvaluator:
    """Evaluates one bandwidth after another of a sum of kernels over a tile. A subclass for each family, made by `tile_evaluator`."""

    kernel: Kernel
    squarings: tuple[int, ...]  # as in `HostKernelSum`
    subtract_constant: tuple[int, ...]  # likewise
    exponent_scale: float = 1.0  # by which the exponent of a tile is multiplied

    neg_dphi_is_value: ClassVar[bool] = False  # −φ' = φ, so that no second tile is needed
    slope_is_optional: ClassVar[bool] = False  # without `neg_dphi`, only k is computed

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor, functions: Exponentials) -> Tensor:
        """Writes k_n, or k_n − φ(0) where that is subtracted, into `out`; returns −φ'(t_n), or φ'(t_n) for a kernel of x·y.

        On entry `out` holds k_{n−1}, or is `exponent` itself. The result is in `neg_dphi`; it is `out` where −φ' = φ, from both of which
        φ(0) is then subtracted. `neg_dphi` is None only where `slope_is_optional`; the result is then `out`.
        """
        raise NotImplementedError

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        """φ''(t_n) from what `evaluate` returned, k − φ(0) being taken of no bandwidth; where φ' counts as 0, so does φ''."""
        raise NotImplementedError

    def logarithm_(self, exponent: Tensor, slope: Tensor | None, unit: float) -> Tensor | None:
        """Overwrites the tile with unit·log k of its single bandwidth, an exponential's being the tile itself. Returns −φ'/φ, in `slope`;
        None if it is 1 or not wanted."""
        raise NotImplementedError


class _RBFEvaluator(TileEvaluator):
    neg_dphi_is_value = True

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor, functions: Exponentials) -> Tensor:
        subtract, squarings = self.subtract_constant[n], self.squarings[n]
        if squarings:
            if self.subtract_constant[n - 1] and not subtract:
                out.add_(1)
            for _ in range(squarings):
                # (1 + e)² − 1 = e·(e + 2)
                out.mul_(out + 2) if subtract else functions.square_(out)
            return out
        if out is not exponent:
            torch.mul(exponent, ratio if subtract == self.subtract_constant[0] else ratio * LOG2_E, out=out)
        return functions.expm1_(out) if subtract else functions.exp2_(out)

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        return neg_dphi

    def logarithm_(self, exponent: Tensor, slope: Tensor | None, unit: float) -> Tensor | None:
        return None


class _RationalQuadraticEvaluator(TileEvaluator):
    kernel: RationalQuadratic

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor, functions: Exponentials) -> Tensor:
        alpha = self.kernel.alpha
        torch.mul(exponent, -ratio / alpha, out=out)
        if alpha == 1 and not self.subtract_constant[n]:
            out.add_(1).reciprocal_()
            return torch.mul(out, out, out=neg_dphi)
        if alpha == 1:
            torch.add(out, 1, out=neg_dphi).pow_(-2)
        else:
            # log1p, as the rounding of 1 + t/α would be multiplied by a large α.
            functions.exp2_(torch.log1p(out, out=neg_dphi).mul_(-(alpha + 1) * LOG2_E))
        if self.subtract_constant[n]:
            functions.expm1_(out.log1p_().mul_(-alpha))
        else:
            out.add_(1).mul_(neg_dphi)
        return neg_dphi

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        alpha = self.kernel.alpha
        return (exponent * (-ratio / alpha)).add_(1).reciprocal_().mul_(neg_dphi).mul_(1 + 1 / alpha)

    def logarithm_(self, exponent: Tensor, slope: Tensor | None, unit: float) -> Tensor | None:
        exponent.mul_(-1 / self.kernel.alpha)
        if slope is not None:
            torch.add(exponent, 1, out=slope).reciprocal_()
        exponent.log1p_().mul_(-self.kernel.alpha * unit)
        return slope


def _zero_if_infinite_(slope: Tensor) -> Tensor:
    """In place: 0 for a pair of identical rows. A mask would take ten times as long."""
    # The root of −0 is −0.
    return slope.nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)


class _LaplaceEvaluator(TileEvaluator):
    slope_is_optional = True

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor | None, functions: Exponentials) -> Tensor:
        root, subtract = ratio**0.5, self.subtract_constant[n]
        if neg_dphi is not None:
            _zero_if_infinite_(torch.reciprocal(exponent, out=neg_dphi))
        torch.mul(exponent, -root if subtract else -LOG2_E * root, out=out)
        functions.expm1_(out) if subtract else functions.exp2_(out)
        if neg_dphi is None:
            return out
        neg_dphi.addcmul_(neg_dphi, out) if subtract else neg_dphi.mul_(out)
        return neg_dphi if ratio == 1 else neg_dphi.mul_(1 / root)

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        inverse = _zero_if_infinite_(torch.mul(exponent, ratio**0.5).reciprocal_())
        return inverse.addcmul_(inverse, inverse).mul_(neg_dphi)

    def logarithm_(self, exponent: Tensor, slope: Tensor | None, unit: float) -> Tensor | None:
        if slope is not None:
            _zero_if_infinite_(torch.reciprocal(exponent, out=slope))
        exponent.mul_(-unit)
        return slope


# Below this u, 1 − φ is a series, to rounding: the formula loses digits there.
_NEAR_ZERO = {torch.float32: 0.5, torch.float64: 0.05}


class _MaternEvaluator(TileEvaluator):
    """φ and −φ' are polynomials of u = √(2ν)·d/h times exp(−u)."""

    factor: ClassVar[float]  # u² = factor·t
    series: ClassVar[tuple[float, ...]]

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor, functions: Exponentials) -> Tensor:
        # Rounding may make t of near rows negative.
        torch.mul(exponent, -self.factor * ratio, out=out).clamp_(min=0).sqrt_()
        if not self.subtract_constant[n]:
            functions.exp2_(torch.mul(out, -LOG2_E, out=neg_dphi))
            return self._finish(out, neg_dphi)
        series = torch.full_like(out, self.series[-1])
        for coefficient in self.series[-2::-1]:
            series.mul_(out).neg_().add_(coefficient)
        series.mul_(out).mul_(out).neg_()
        is_near = out < _NEAR_ZERO[out.dtype]
        torch.neg(out, out=neg_dphi).exp_()
        neg_dphi = self._finish(out, neg_dphi)
        torch.where(is_near, series, out.sub_(1), out=out)
        return neg_dphi

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        u = (exponent * (-self.factor * ratio)).clamp_(min=0).sqrt_()
        return self._curvature(u).mul_(neg_dphi)

    def logarithm_(self, exponent: Tensor, slope: Tensor | None, unit: float) -> Tensor | None:
        # Not infinite, as ∞ − ∞ is nan.
        u = exponent.mul_(-self.factor).clamp_(min=0, max=1e30).sqrt_()
        polynomial = self._less_one(u)
        if slope is not None:
            torch.add(polynomial, 1, out=slope).reciprocal_().mul_(self._slope(u))
        torch.sub(polynomial.log1p_(), u, out=exponent).mul_(unit)
        return slope

    def _finish(self, out: Tensor, neg_dphi: Tensor) -> Tensor:
        """From u and exp(−u) to φ and −φ'."""
        raise NotImplementedError

    def _curvature(self, u: Tensor) -> Tensor:
        """−φ''/φ', which may overwrite u."""
        raise NotImplementedError

    def _less_one(self, u: Tensor) -> Tensor:
        """φ·exp(u) − 1, a new tensor."""
        raise NotImplementedError

    def _slope(self, u: Tensor) -> Tensor | float:
        """−φ'·exp(u)"""
        raise NotImplementedError


class _Matern32Evaluator(_MaternEvaluator):
    factor, series = 6.0, MATERN_32

    def _finish(self, out: Tensor, neg_dphi: Tensor) -> Tensor:
        out.add_(1).mul_(neg_dphi)
        return neg_dphi.mul_(3)

    def _curvature(self, u: Tensor) -> Tensor:
        # The root of −0 is −0.
        return u.reciprocal_().mul_(3).masked_fill_(u.isinf(), 0)

    def _less_one(self, u: Tensor) -> Tensor:
        return u.clone()

    def _slope(self, u: Tensor) -> Tensor | float:
        return 3.0


class _Matern52Evaluator(_MaternEvaluator):
    factor, series = 10.0, MATERN_52

    def _finish(self, out: Tensor, neg_dphi: Tensor) -> Tensor:
        # φ = (1 + u)·e + ⅓·u²·e and −φ' = 5/3·(1 + u)·e with e = exp(−u)
        power = out * neg_dphi
        out.mul_(power).mul_(1 / 3).add_(neg_dphi.add_(power))
        return neg_dphi.mul_(5 / 3)

    def _curvature(self, u: Tensor) -> Tensor:
        return u.add_(1).reciprocal_().mul_(5)

    def _less_one(self, u: Tensor) -> Tensor:
        return torch.addcmul(u, u, u, value=1 / 3)

    def _slope(self, u: Tensor) -> Tensor | float:
        return (u + 1).mul_(5 / 3)


class _RieszEvaluator(TileEvaluator):
    kernel: Riesz
    slope_is_optional = True

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor | None, functions: Exponentials) -> Tensor:
        r = self.kernel.r
        torch.mul(exponent, ratio**0.5, out=out)
        if neg_dphi is None:
            return out.neg_() if r == 1 else out.log_().mul_(r).exp_().neg_()
        if r == 1:
            torch.reciprocal(out, out=neg_dphi)
        else:
            # One logarithm and two exponentials take less time than a power.
            torch.mul(out.log_(), r - 2, out=neg_dphi).exp_().mul_(r)
            out.mul_(r).exp_()
        out.neg_()
        return _zero_if_infinite_(neg_dphi)

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        inverse = _zero_if_infinite_(torch.mul(exponent, ratio**0.5).reciprocal_())
        return inverse.square_().mul_(neg_dphi).mul_(2 - self.kernel.r)


class _PolynomialEvaluator(TileEvaluator):
    kernel: Polynomial

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor, functions: Exponentials) -> Tensor:
        t, (highest, *others) = torch.mul(exponent, ratio, out=neg_dphi), self.kernel.powers
        out.fill_(highest[1])
        for _, coefficient in others:
            out.mul_(t).add_(coefficient)
        out.mul_(t)
        if not self.subtract_constant[n]:
            out.add_(self.kernel.value_at_zero)
        return t.add_(self.kernel.coef0).pow_(highest[0] - 1).mul_(highest[0])

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        return self.kernel.derivatives(exponent * ratio)[1]


class _SumEvaluator(TileEvaluator):
    kernel: Sum
    slope_is_optional = True

    def evaluate(self, n: int, ratio: Any, exponent: Tensor, out: Tensor, neg_dphi: Tensor | None, functions: Exponentials) -> Tensor:
        total, value, slope = torch.zeros_like(exponent), torch.empty_like(exponent), torch.empty_like(exponent)
        if neg_dphi is not None:
            neg_dphi.zero_()
        for weight, part, share, tile in self._parts(exponent):
            scratch: Any = None if neg_dphi is None and part.slope_is_optional else slope
            found = part.evaluate(n, ratio * share * part.exponent_scale, tile, value, scratch, functions)
            total.add_(value, alpha=weight)
            if neg_dphi is None:
                continue
            neg_dphi.add_(found, alpha=weight * share)
            if part.neg_dphi_is_value and self.subtract_constant[n]:
                neg_dphi.add_(weight * share)
        out.copy_(total)
        return out if neg_dphi is None else neg_dphi

    def _parts(self, exponent: Tensor) -> Iterator[tuple[float, TileEvaluator, float, Tensor]]:
        """For each term its weight, its evaluator, by what factor its γ exceeds that of the sum, and the tile that it takes."""
        neg_t = exponent.square().mul_(-0.5) if self.kernel.takes_distance else exponent
        for weight, kernel, scale in self.kernel.terms:
            # Made anew, as it is cheap beside a tile.
            part = _evaluator(kernel, (0,) * len(self.squarings), self.subtract_constant)
            yield weight, part, scale**-2, exponent if kernel.takes_distance else neg_t

    def curvature(self, ratio: float, exponent: Tensor, neg_dphi: Tensor) -> Tensor:
        total, value, slope = torch.zeros_like(exponent), torch.empty_like(exponent), torch.empty_like(exponent)
        for weight, part, share, tile in self._parts(exponent):
            relative = ratio * share
            found = part.evaluate(0, relative * part.exponent_scale, tile, value, slope, _EXPONENTIALS)
            total.add_(part.curvature(relative, tile, found), alpha=weight * share * share)
        return total


_EVALUATORS: dict[type[Kernel], type[TileEvaluator]] = {
    RBF: _RBFEvaluator,
    RationalQuadratic: _RationalQuadraticEvaluator,
    Laplace: _LaplaceEvaluator,
    Matern32: _Matern32Evaluator,
    Matern52: _Matern52Evaluator,
    Riesz: _RieszEvaluator,
    Polynomial: _PolynomialEvaluator,
    Sum: _SumEvaluator,
}


def tile_evaluator(host_sum: HostKernelSum) -> TileEvaluator:
    return _evaluator(host_sum.kernel, host_sum.squarings, host_sum.subtract_constant)


def _evaluator(kernel: Kernel, squarings: tuple[int, ...], subtract_constant: tuple[int, ...]) -> TileEvaluator:
    if type(kernel) not in _EVALUATORS:
        raise NotImplementedError(f"kernel {kernel.name!r} must have an evaluator in fastvae/cpu/families.py")
    # exp2 takes a quarter to a half of the time of exp, depending on the processor. expm1 has no counterpart to base 2.
    exponent_scale = LOG2_E if kernel.is_exponential and not subtract_constant[0] else 1.0
    return _EVALUATORS[type(kernel)](kernel, squarings, subtract_constant, exponent_scale)
