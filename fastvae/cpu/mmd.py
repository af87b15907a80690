"""One sweep over all pairs of rows, tile by tile: sums of k(x, y) and of its derivative, without the N×M array.

With rows z = [x; y] and signed weights w = [p; −q], MMD² is the quadratic form wᵀKw. A row's gradient is a sum over j of
w_j·φ'(d²_ij)·(z_i − z_j), so that Σ_j w_j·φ'(d²_ij)·[z_j, 1] is all that a sweep keeps of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.radial import EXPONENT_ERROR, LOG2_E, PairSums, Radial, RBFLadder

# 512² float32 values fill one second-level cache of 1 MiB; 256² and 1024² were slower.
TILE = 512


def pair_sums(
    x: Tensor,
    p: Tensor | None,
    y: Tensor | None,
    q: Tensor | None,
    centre: Tensor,
    kernel: Radial,
    x_scale: float | Tensor,
    y_scale: float | Tensor,
    x_grad: bool,
    y_grad: bool,
) -> PairSums:
    """Sweep all pairs of rows of x (N, D) and y (M, D), in float32 or float64, with weights p (N,) and q (M,), equal if None."""
    ladder = RBFLadder.of(kernel)
    sweep = _Sweep(ladder, *_arithmetic(x, y, centre, ladder))
    a = sweep.points(x, p, x_grad)
    within_x = sweep.within(a, float(x_scale))
    within_y = across = 0.0
    b = None
    if y is not None:
        b = sweep.points(y, q, y_grad)
        within_y = sweep.within(b, float(y_scale))
        across = sweep.across(a, b)
    totals = [x.new_tensor(total, dtype=torch.float64) for total in (within_x, within_y, across)]
    return PairSums(totals[0], totals[1], totals[2], sweep.pull(a), None if b is None else sweep.pull(b))


def _arithmetic(x: Tensor, y: Tensor | None, centre: Tensor, kernel: RBFLadder) -> tuple[Tensor, float]:
    """The centre in the dtype of the sweep, and the largest ‖z − centre‖² at which the products of that dtype are exact enough."""
    steepest = kernel.gamma * kernel.ratios[-1] / EXPONENT_ERROR[x.dtype]
    limit = 1 / (steepest * torch.finfo(x.dtype).eps)
    radius2 = max(float((z - centre).square().sum(1).max()) for z in (x, y) if z is not None)
    if not radius2 > limit:
        return centre, limit
    # A few outliers may be what makes the radius: unlike the mean, the median stays with the others.
    pooled = x if y is None else torch.cat([x, y])
    return pooled.median(0).values.double(), 1 / (steepest * torch.finfo(torch.float64).eps)


@dataclass
class _Points:
    rows: Tensor  # (N, D), centred
    dtype: torch.dtype  # of the input
    weights: Tensor  # (N,)
    uniform: float | None  # the weight, where all are equal
    left: Tensor  # (N, D + 2): left @ right is the exponent of the widest bandwidth
    right: Tensor  # (D + 2, N)
    weighted: Tensor  # (D + 1, N): w_j·[z_j, 1]
    moments: Tensor | None  # (D + 1, N)
    far: list[bool]  # for each tile of rows, whether distances to it must come from differences


class _Sweep:
    def __init__(self, kernel: RBFLadder, centre: Tensor, limit: float) -> None:
        self.kernel, self.centre, self.limit, self.dtype = kernel, centre, limit, centre.dtype
        # exp2 is the fastest exponential there is; expm1 has no such twin.
        self.unit = 1.0 if kernel.shifts[0] else LOG2_E
        buffers = 1 if len(kernel.ratios) == 1 else 3
        self.buffers = [centre.new_empty(TILE * TILE) for _ in range(buffers)]

    def points(self, z: Tensor, weights: Tensor | None, gradient: bool) -> _Points:
        dtype, z = z.dtype, z.to(self.dtype) - self.centre
        uniform = 1 / z.shape[0] if weights is None else None
        weights = z.new_full(z.shape[:1], 1 / z.shape[0]) if weights is None else weights.to(self.dtype)
        # In float64, as a rounded scale would be another bandwidth than that of the closed form of a prior.
        scaled = (z.double() * (2 * self.kernel.gamma * self.unit) ** 0.5).to(self.dtype)
        one = torch.ones_like(z[:, :1])
        half = scaled.square().sum(1, keepdim=True).mul_(-0.5)
        left, right = torch.cat([scaled, half, one], 1), torch.cat([scaled, one, half], 1).T.contiguous()
        far = [bool(rows.square().sum(1).max() > self.limit) for rows in torch.split(z, TILE)]
        weighted = torch.cat([z, one], 1).T.contiguous() * weights
        # Contiguous rows of moments: for few features the product with a tile is up to six times faster than with contiguous columns.
        moments = torch.zeros_like(weighted) if gradient else None
        return _Points(z, dtype, weights, uniform, left, right, weighted, moments, far)

    @staticmethod
    def pull(a: _Points) -> Tensor | None:
        return None if a.moments is None else (a.moments[-1:].T * a.rows - a.moments[:-1].T).to(a.dtype)

    def within(self, a: _Points, scale: float) -> float:
        total = 0.0
        tiles = _tiles(a.weights.shape[0])
        for n, i in enumerate(tiles):
            for j in tiles[n:]:
                total += self._tile(a, i, a, j, scale) * (1 if i == j else 2)
        self._shifted_moments(a, a, scale)
        return total

    def across(self, a: _Points, b: _Points) -> float:
        total = 0.0
        for i in _tiles(a.weights.shape[0]):
            for j in _tiles(b.weights.shape[0]):
                total += self._tile(a, i, b, j, -1.0)
        self._shifted_moments(a, b, -1.0)
        self._shifted_moments(b, a, -1.0)
        return total

    def _tile(self, a: _Points, i: slice, b: _Points, j: slice, scale: float) -> float:
        """Σ p p k over a tile; its share of the moments is added on the way."""
        diagonal = a is b and i == j
        total = 0.0
        gradient = a.moments is not None or b.moments is not None
        exponent = self._buffer(0, i, j)
        self._exponent(a, i, b, j, exponent)
        single = len(self.kernel.ratios) == 1
        power = exponent if single else self._buffer(1, i, j)
        slope = exponent if single else self._buffer(2, i, j)
        for rung, (ratio, weight) in enumerate(zip(self.kernel.ratios, self.kernel.weights, strict=True)):
            self._climb(rung, exponent, power)
            if diagonal:
                power.fill_diagonal_(0)
            total += weight * _quadratic_form(power, a, i, b, j)
            if gradient and not single:
                torch.mul(power, weight, out=slope) if rung == 0 else slope.add_(power, alpha=weight * ratio)
        alpha = scale * self.kernel.weights[0] if single else scale
        if a.moments is not None:
            a.moments[:, i].addmm_(b.weighted[:, j], slope.T, alpha=alpha)
        if b.moments is not None and not diagonal:
            b.moments[:, j].addmm_(a.weighted[:, i], slope, alpha=alpha)
        return total

    def _buffer(self, n: int, i: slice, j: slice) -> Tensor:
        rows, columns = i.stop - i.start, j.stop - j.start
        return self.buffers[n][: rows * columns].view(rows, columns)

    def _exponent(self, a: _Points, i: slice, b: _Points, j: slice, out: Tensor) -> None:
        if a.far[i.start // TILE] or b.far[j.start // TILE]:
            distance = torch.cdist(a.rows[i], b.rows[j], compute_mode="donot_use_mm_for_euclid_dist")
            torch.mul(distance, distance, out=out).mul_(-self.kernel.gamma * self.unit)
        else:
            torch.mm(a.left[i], b.right[:, j], out=out)

    def _climb(self, rung: int, exponent: Tensor, power: Tensor) -> None:
        """k_b − shift_b into `power`, which holds k_{b−1} − shift_{b−1}."""
        kernel = self.kernel
        shift, squarings = kernel.shifts[rung], kernel.squarings[rung]
        if squarings:
            if kernel.shifts[rung - 1] and not shift:
                power.add_(1)
            for _ in range(squarings):
                # (1 + e)² − 1 = e·(e + 2)
                power.mul_(power + 2 if shift else power)
            return
        unit = (1.0 if shift else LOG2_E) / self.unit
        if power is not exponent:
            torch.mul(exponent, kernel.ratios[rung] * unit, out=power)
        if shift:
            power.expm1_()
        else:
            power.exp2_()

    def _shifted_moments(self, a: _Points, b: _Points, scale: float) -> None:
        """The share of the shifts in the moments: every pair's 1, summed in closed form."""
        if a.moments is not None and self.kernel.shifted_slope:
            a.moments += b.weighted.sum(1, keepdim=True) * (scale * self.kernel.shifted_slope)


def _tiles(rows: int) -> list[slice]:
    return [slice(start, min(start + TILE, rows)) for start in range(0, rows, TILE)]


def _quadratic_form(k: Tensor, a: _Points, i: slice, b: _Points, j: slice) -> float:
    # Rows in float32, their sum in float64: the rounding of one sum over the tile would not average out between few tiles.
    if a.uniform is not None and b.uniform is not None:
        return a.uniform * b.uniform * float(k.sum(1).sum(dtype=torch.float64))
    return float(a.weights[i].double() @ (k @ b.weights[j]).double())
