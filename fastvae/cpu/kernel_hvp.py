"""The product of the Hessian of a sum over pairs with a direction, tile by tile. Formulas (2) to (4) of `fastvae.reference.kernel_hvp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.cpu.small import pair_exponents
from fastvae.cpu.tiles import TiledSample, Tiles
from fastvae.kernel_sums import KernelSum, Numbers
from fastvae.radial import Kernel, terms_of

# One array of all pairs takes less time than tiles up to about this many pairs.
_FEW_PAIRS = 256 * 256
# The most pairs of all problems of a batch in one array: each array of them is then 8 MiB.
_PAIRS_AT_ONCE = 1 << 20


class Rows(NamedTuple):
    """One of the two samples, with what belongs to its rows. All may have a batch dimension."""

    points: Tensor  # (N, D)
    factors: Tensor  # (N, C), u or v
    direction: Tensor | None  # of the points
    factors_direction: Tensor | None


Results = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
Wanted = Sequence[bool]  # to x, y, u and v


def problems_at_once(x: Rows, y: Rows) -> int:
    """How many problems of a batch `few_rows` should take together; 0 if tiles are faster."""
    pairs = x.points.shape[-2] * y.points.shape[-2]
    return _PAIRS_AT_ONCE // pairs if pairs <= _FEW_PAIRS else 0


def few_rows(kernel: Kernel, bandwidth: Numbers, weights: Numbers, x: Rows, y: Rows, same: bool, wanted: Wanted) -> Results:
    """From arrays of all pairs, on any device; with `same` y is x. In float64, unless products of rows are exact enough in float32."""
    dtype = x.points.dtype
    x, y, base = _squared_distances(kernel, bandwidth, x, y)
    has_factors_direction = x.factors_direction is not None or y.factors_direction is not None
    derivatives = _derivatives(kernel, bandwidth, weights, base, x.points.shape[-1], has_factors_direction)
    if same:
        for t in derivatives:
            t.diagonal(dim1=-2, dim2=-1).zero_()
    slope, curvature, *values = derivatives
    k = values[0] if values else None
    s = _directional(x, y, kernel.radial)
    c = x.factors @ y.factors.mT
    e = _sum_of_products((x.factors, _transposed(y.factors_direction)), (x.factors_direction, y.factors.mT))
    if same and e is not None:
        e = 0.5 * (e + e.mT)
    p: Tensor | None = slope * c
    q: Tensor | None = None
    if s is not None:
        q = (curvature * s).mul_(c)
    if e is not None:
        q = slope * e if q is None else q.addcmul_(slope, e)
    dk = slope * s if s is not None and any(wanted[2:]) else None
    found: list[Tensor | None] = [None] * 4
    for n, (rows, others) in enumerate(((x, y), (y, x))):
        if wanted[n]:
            found[n] = _row_results(rows, others, p, q, kernel.radial).mul_(2 if same else 1)
        if wanted[2 + n]:
            total = _sum_of_products((dk, others.factors), (k, others.factors_direction))
            found[2 + n] = torch.zeros_like(rows.factors) if total is None else total
        p, q, dk, k = (_transposed(t) for t in (p, q, dk, k))
    return tuple(None if t is None else t.to(dtype) for t in found)  # type: ignore[return-value]


def _squared_distances(kernel: Kernel, bandwidth: Numbers, x: Rows, y: Rows) -> tuple[Rows, Rows, Tensor]:
    """The rows, centred, and ‖x − y‖² or x·y of each pair, in the dtype in which they are exact enough."""
    if kernel.radial and not kernel.slope_takes_distance and x.points.dtype == torch.float32 and x.points.is_cpu:
        narrowest = min(scale for *_, scale in terms_of(kernel)) * min(float(h) for h in bandwidth)
        gamma = 0.5 / narrowest**2
        centre = x.points.mean(-2, keepdim=True)
        found = pair_exponents(kernel, gamma, 1.0, x.points - centre, y.points - centre, True) if 1e-8 < narrowest < 1e8 else None
        if found is not None:
            return x._replace(points=found[0]), y._replace(points=found[1]), found[2].mul_(-1 / gamma).clamp_(min=0)
    x, y = (Rows(*(None if t is None else t.double() for t in rows)) for rows in (x, y))  # type: ignore[arg-type]
    if not kernel.radial:
        return x, y, x.points @ y.points.mT
    centre = x.points.mean(-2, keepdim=True)
    x, y = (rows._replace(points=rows.points - centre) for rows in (x, y))
    return x, y, torch.cdist(x.points, y.points, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _derivatives(kernel: Kernel, bandwidth: Numbers, weights: Numbers, base: Tensor, dim: int, value: bool) -> list[Tensor]:
    """Σ_b a_b·2γ_b·φ'(t_b), Σ_b a_b·4γ_b²·φ''(t_b) and, if `value`, Σ_b a_b·k_b, from `base` = t/γ; with 1 in place of 2 for x·y."""
    totals: list[Tensor] = []
    for weight, term, scale in terms_of(kernel):
        for h, a in zip(bandwidth, weights, strict=True):
            gamma = (0.5 if term.radial else 1 / dim) / (scale * h) ** 2
            rate, t = (2 if term.radial else 1) * gamma, base * gamma
            slope, curvature = term.derivatives(t)
            parts = [slope * (a * weight * rate), curvature * (a * weight * rate**2)]
            if value:
                parts.append(term.phi(t) * (a * weight))
            totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
    return totals


def _directional(x: Rows, y: Rows, radial: bool) -> Tensor | None:
    """s_ij of (2) or (4) for each pair; None if no points have a direction."""
    across = _sum_of_products((x.direction, y.points.mT), (x.points, _transposed(y.direction)))
    if across is None or not radial:
        return across
    own = [None if z.direction is None else (z.points * z.direction).sum(-1, keepdim=True) for z in (x, y)]
    s = across.neg_()
    s = s if own[0] is None else s.add_(own[0])
    return s if own[1] is None else s.add_(own[1].mT)


def _row_results(rows: Rows, others: Rows, p: Tensor | None, q: Tensor | None, radial: bool) -> Tensor:
    """(3), or (4), of the points of `rows`."""
    total = torch.zeros_like(rows.points)
    for pairs, own, other in ((p, rows.direction, others.direction), (q, rows.points, others.points)):
        if pairs is None:
            continue
        if radial and own is not None:
            total += own * pairs.sum(-1, keepdim=True)
        if other is not None:
            total.add_(pairs @ other, alpha=-1 if radial else 1)
    return total


def _sum_of_products(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for left, right in pairs:
        if left is not None and right is not None:
            total = left @ right if total is None else total + left @ right
    return total


def _transposed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.mT


def kernel_hvp(kernel: KernelSum, x: Rows, y: Rows, same: bool, centre: Tensor, wanted: Wanted) -> Results:
    """The results of one problem that are wanted, tile by tile, in the dtype of x; with `same` y is x.

    No constant is subtracted from `kernel`.
    """
    sweep = _Sweep(Tiles(kernel, [x.points] if same else [x.points, y.points], centre, True), x, y, same, wanted)
    sweep.run()
    return tuple(None if t is None else t.to(x.points.dtype).contiguous() for t in sweep.results())  # type: ignore[return-value]


@dataclass
class _Side:
    """One of the two samples, prepared, and the sums over its pairs."""

    sample: TiledSample
    scaled: Tensor  # (N, D), the points as they are in products
    direction: Tensor | None  # (N, D), scaled
    factors: Tensor  # (C, N)
    factors_direction: Tensor | None
    # The left factors of the moments of the other side: [direction; 1; 0], or [1] without a direction, and [scaled; 0; 1], (D + 2, N). With
    # one column of factors they are multiplied by it, and the other side's moments by its own.
    of_p: Tensor | None
    of_q: Tensor
    moments: Tensor | None  # (D + 2, N)
    factors_result: Tensor | None  # (C, N)


_Part = Callable[[_Side], "Tensor | None"]


class _Sweep:
    """The sums of (3) or (4) over all tiles, in the units of the tiles.

    Points and directions are scaled, so that s is −2γ_0·s of a radial kernel and γ_0·s of a kernel of x·y. Derivatives of the kernel are
    those to t_0, −φ' in place of φ' if it is radial: P and Q are then P/−2γ_0 and Q/−2γ_0, or P/γ_0 and Q/γ_0.
    """

    def __init__(self, tiles: Tiles, x: Rows, y: Rows, same: bool, wanted: Wanted) -> None:
        self.tiles, self.same, self.radial = tiles, same, tiles.kernel.radial
        self.moves = x.direction is not None or y.direction is not None
        self.has_factors_direction = x.factors_direction is not None or y.factors_direction is not None
        # c_ij is one product of two numbers, which the moments take.
        self.single = x.factors.shape[1] == 1 and not self.has_factors_direction
        self.rows = wanted[0] or wanted[1]
        self.x = self._side(x, wanted[0], wanted[2])
        self.y = self._side(y, False, False, self.x.sample) if same else self._side(y, wanted[1], wanted[3])
        self.factors_of_s = self._factors_of_s() if self.moves else None

    def _side(self, rows: Rows, wanted: bool, factors_wanted: bool, sample: TiledSample | None = None) -> _Side:
        sample, dim = sample or self.tiles.prepare(rows.points, None, False), rows.points.shape[1]
        scaled, dtype = sample.right[:, :dim], self.tiles.dtype
        direction = None if rows.direction is None else (rows.direction.double() * self.tiles.scale).to(dtype)
        factors = rows.factors.T.to(dtype).contiguous()
        of_p = None
        of_q = scaled.new_zeros(dim + 2, len(sample))
        of_q[:dim], of_q[dim + 1] = scaled.T, 1
        if self.moves and direction is None:
            of_p = torch.ones_like(of_q[:1])
        elif direction is not None:
            of_p = torch.zeros_like(of_q)
            of_p[:dim], of_p[dim] = direction.T, 1
        if self.single:
            of_q *= factors
            of_p = None if of_p is None else of_p * factors
        return _Side(
            sample, scaled, direction, factors, None if rows.factors_direction is None else rows.factors_direction.T.to(dtype).contiguous(),
            of_p, of_q, torch.zeros_like(of_q) if wanted else None, torch.zeros_like(factors) if factors_wanted else None,
        )  # fmt: skip

    def _factors_of_s(self) -> tuple[Tensor, Tensor]:
        """left (N, …) and right (…, M), of which s is the product, with the sign of the slope."""
        x, y, sign = self.x, self.y, -1 if self.radial else 1
        left, right = [], []
        if x.direction is not None:
            left.append(x.direction)
            right.append(sign * y.scaled)
        if y.direction is not None:
            left.append(x.scaled)
            right.append(sign * y.direction)
        if self.radial:
            own = [None if side.direction is None else (side.scaled * side.direction).sum(1, keepdim=True) for side in (x, y)]
            if own[0] is not None:
                left.append(own[0])
                right.append(torch.ones_like(y.scaled[:, :1]))
            if own[1] is not None:
                left.append(torch.ones_like(x.scaled[:, :1]))
                right.append(own[1])
        # The slope of a radial kernel is −φ'.
        return torch.cat(left, 1).mul_(sign / self.tiles.evaluator.exponent_scale), torch.cat(right, 1).T

    def run(self) -> None:
        for n, i in enumerate(self.x.sample.tiles):
            for j in self.y.sample.tiles[n:] if self.same else self.y.sample.tiles:
                self._tile(i, j)

    def _tile(self, i: slice, j: slice) -> None:
        tiles, x, y = self.tiles, self.x, self.y
        k, slope, curvature = tiles.derivatives(x.sample, i, y.sample, j, value=self.has_factors_direction, curvature=self.moves)
        s = None
        if self.factors_of_s is not None:
            s = tiles.product("s", self.factors_of_s[0][i], self.factors_of_s[1][:, j])
        if self.x.factors_result is not None or self.y.factors_result is not None:
            self._add_factors_results(i, j, k, slope, s)
        if not self.rows:
            return
        p = None if s is None else slope
        q = None if s is None else torch.mul(curvature, s, out=tiles.buffer("q", i, j))
        if not self.single:
            e = self._factor_tile(i, j) if self.has_factors_direction else None
            e = None if e is None else e.mul_(slope)
            if s is not None and q is not None:
                c = tiles.product("c", x.factors[:, i].T, y.factors[:, j])
                p, q = slope.mul_(c), q.mul_(c)
            q = e if q is None else q if e is None else q.add_(e)
        self._add(i, j, lambda side: side.moments, (lambda side: side.of_p, p), (lambda side: side.of_q, q))

    def _factor_tile(self, i: slice, j: slice) -> Tensor:
        """e_ij of (2) over a tile."""
        u, v, du, dv = self.x.factors, self.y.factors, self.x.factors_direction, self.y.factors_direction
        pairs = ((v, du), (du, v)) if self.same else ((u, dv), (du, v))
        given = [(left, right) for left, right in pairs if left is not None and right is not None]
        left, right = torch.cat([left[:, i] for left, _ in given]), torch.cat([right[:, j] for _, right in given])
        e = self.tiles.product("e", left.T, right)
        return e.mul_(0.5) if self.same else e

    def _add_factors_results(self, i: slice, j: slice, k: Tensor | None, slope: Tensor, s: Tensor | None) -> None:
        dk = None if s is None else torch.mul(slope, s, out=self.tiles.buffer("dk", i, j))
        self._add(i, j, lambda side: side.factors_result, (lambda side: side.factors, dk), (lambda side: side.factors_direction, k))

    def _add(self, i: slice, j: slice, total: _Part, *products: tuple[_Part, Tensor | None]) -> None:
        """Adds the products of a tile with parts of the columns to a part of the rows, and the same the other way round."""
        x, y = self.x, self.y
        for part, pairs in products:
            if pairs is None:
                continue
            self._add_product(total(x), i, part(y), j, pairs.T)
            # Of one sample, a tile stands for its mirror image too.
            if not self.same:
                self._add_product(total(y), j, part(x), i, pairs)
            elif i != j:
                self._add_product(total(x), j, part(y), i, pairs)

    def _add_product(self, total: Tensor | None, rows: slice, left: Tensor | None, columns: slice, pairs: Tensor) -> None:
        if total is None or left is None:
            return
        if len(left) == len(total):
            self.tiles.add_product(total[:, rows], left[:, columns], pairs, 1.0)
        else:
            total[-2, rows].addmv_(pairs.T, left[0, columns])

    def results(self) -> list[Tensor | None]:
        sides = [self.x] if self.same else [self.x, self.y]
        points = [self._row_result(side) for side in sides]
        factors = [None if side.factors_result is None else side.factors_result.T for side in sides]
        return [points[0], None, factors[0], None] if self.same else [*points, *factors]

    def _row_result(self, side: _Side) -> Tensor | None:
        if side.moments is None:
            return None
        total, p, q = side.moments[:-2].T, side.moments[-2], side.moments[-1]
        if self.radial:
            total = total - side.scaled * q[:, None]
            if side.direction is not None:
                total = total - side.direction * p[:, None]
        if self.single:
            total = total * side.factors.T
        return torch.mul(total, self.tiles.scale / self.tiles.evaluator.exponent_scale * (2 if self.same else 1))
