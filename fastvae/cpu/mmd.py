"""The sums of MMD² over all pairs of rows, tile by tile, without the N×M array.

With rows z = [x; y] and signed weights w = [p; −q], MMD² is the quadratic form wᵀKw. A row's gradient is a sum over j of
w_j·φ'(t_ij)·(z_i − z_j), so that Σ_j w_j·φ'(t_ij)·[z_j, 1] is all that a sweep keeps of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.cpu.tiles import Points, Rung, Tiles
from fastvae.radial import KernelSum


class Sweep(Tiles):
    """`fastvae.radial.Sweep` on a CPU, of a batch of one problem."""

    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor, gradient: bool) -> None:
        super().__init__(kernel, [z[0] for z in samples], centre[0])

    def points(self, z: Tensor, weights: Tensor | None, gradient: bool, tiles: list[slice] | None = None) -> Points:
        return super().points(z[0], None if weights is None else weights[0], gradient, tiles)

    def within(self, a: Points, scale: Tensor) -> Tensor:
        total, tiles = 0.0, a.tiles
        for n, i in enumerate(tiles):
            for j in tiles[n:]:
                total += self._tile(a, i, a, j, float(scale)) * (1 if i == j else 2)
        self._shifted_moments(a, a, float(scale))
        return torch.as_tensor(total, dtype=torch.float64, device=scale.device).reshape(1, -1)

    def across(self, a: Points, b: Points, scale: Tensor) -> Tensor:
        total = 0.0
        for i in a.tiles:
            for j in b.tiles:
                total += self._tile(a, i, b, j, float(scale))
        self._shifted_moments(a, b, float(scale))
        self._shifted_moments(b, a, float(scale))
        return torch.as_tensor(total, dtype=torch.float64, device=scale.device).reshape(1, -1)

    def pull(self, a: Points) -> Tensor:
        return super().pull(a)[None]

    def _tile(self, a: Points, i: slice, b: Points, j: slice, scale: float) -> Any:
        """Σ w·w·k over a tile; its share of the moments is added on the way."""
        gradient = a.moments is not None or b.moments is not None
        total, slope = 0.0, None
        for n, rung in enumerate(self.rungs(a, i, b, j)):
            total += self._sums(n, rung, a, i, b, j)
            if not gradient:
                continue
            if self.single:
                slope, scale = rung.slope, scale * rung.slope_weight
            elif slope is None:
                slope = torch.mul(rung.slope, rung.slope_weight, out=self.buffer("slope total", i, j))
            else:
                slope.add_(rung.slope, alpha=rung.slope_weight)
        if slope is not None:
            self.add_moments(slope, a, i, b, j, scale)
        return total

    def _sums(self, n: int, rung: Rung, a: Points, i: slice, b: Points, j: slice) -> Any:
        """What the n-th bandwidth adds to the sums."""
        return rung.weight * _quadratic_form(rung.value, a, i, b, j)

    def _shifted_moments(self, a: Points, b: Points, scale: float) -> None:
        """The share of the shifts in the moments: every pair's 1, summed in closed form."""
        if a.moments is not None and self.ladder.slope_shift:
            a.moments += b.weighted.sum(1, keepdim=True) * (scale * self.ladder.slope_shift)


class BandwidthSweep(Sweep):
    """Whose sums are that of the kernel, those of each k_b − shift·φ(0), and those of each ∂k_b/∂log h_b = −2·t_b·φ'(t_b)."""

    def _exponent(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        exponent = super()._exponent(a, i, b, j)
        t = self.buffer("t", i, j)
        if self.kernel.rooted:
            torch.mul(exponent, exponent, out=t)
        else:
            torch.mul(exponent, -2 / self.profile.unit, out=t)
        if a is b and i == j:
            t.fill_diagonal_(0)
        return exponent

    def _sums(self, n: int, rung: Rung, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        count = len(self.ladder.ratios)
        # 2·t_0, or −2·t_0 where the slope is φ' and not −φ'.
        t = self.buffer("t", i, j)
        derivative = torch.mul(t, rung.slope, out=self.buffer("derivative", i, j))
        if self.profile.kernel_is_slope and self.profile.shifts[n]:
            derivative.add_(t)
        sums = torch.zeros(1 + 2 * count, dtype=torch.float64)
        sums[1 + n] = _quadratic_form(rung.value, a, i, b, j)
        sums[1 + count + n] = self.ladder.ratios[n] * _quadratic_form(derivative, a, i, b, j)
        sums[0] = rung.weight * sums[1 + n]
        return sums


def _quadratic_form(k: Tensor, a: Points, i: slice, b: Points, j: slice) -> float:
    # Rows in float32, their sum in float64: the rounding of one sum over the tile would not average out between few tiles.
    if a.uniform and b.uniform:
        return float(k.sum(1).sum(dtype=torch.float64)) / (len(a) * len(b))
    return float(a.weights[i].double() @ (k @ b.weights[j]).double())
