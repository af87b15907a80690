"""MMD² on a CPU, its sums over all pairs of rows taken tile by tile, without the N×M array.

With rows z = [x; y] and signed weights w = [p; −q], MMD² is the quadratic form wᵀKw. A row's gradient is a sum over j of
w_j·φ'(t_ij)·(z_i − z_j), so that Σ_j w_j·φ'(t_ij)·[z_j, 1] is all that a sweep keeps of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.cpu.closed_forms import Sample, diagonal, prior
from fastvae.cpu.tiles import Points, Rung, Tiles
from fastvae.kernel_sums import KernelSum, Numbers, stable_mean
from fastvae.ops.common import zero_if_finite
from fastvae.radial import Kernel


class Sweep(Tiles):
    """Sums over all pairs of rows, and with them the pull on each row.

    Notation of formula (1) of `fastvae.reference.mmd`; k stands for k − shift·φ(0). With s_b = −φ'(t_b) and W = Σ_b a_b·(γ_b/γ_0)·s_b,
    the pull on row i of a gathers scale·Σ_j w_j·W_ij·(z_i − z_j) over every sum that a takes part in. For a kernel of x·y, of which
    s_b = φ'(t_b), the summand is −½·w_j·W_ij·z_j, so that a row's gradient is −4γ_0·w_i times its pull for every kernel.
    """

    def within(self, a: Points, scale: float) -> Any:
        """Σ_{i≠j} w_i·w_j·k(a_i, a_j), and what other sums the sweep takes behind it."""
        total, tiles = 0.0, a.tiles
        for n, i in enumerate(tiles):
            for j in tiles[n:]:
                total += self._tile(a, i, a, j, scale) * (1 if i == j else 2)
        self._shifted_moments(a, a, scale)
        return total

    def across(self, a: Points, b: Points, scale: float) -> Any:
        """Σ_ij w_i·w_j·k(a_i, b_j), likewise."""
        total = 0.0
        for i in a.tiles:
            for j in b.tiles:
                total += self._tile(a, i, b, j, scale)
        self._shifted_moments(a, b, scale)
        self._shifted_moments(b, a, scale)
        return total

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
        if a.moments is not None and self.host_sum.slope_shift:
            a.moments += b.weighted.sum(1, keepdim=True) * (scale * self.host_sum.slope_shift)


class BandwidthSweep(Sweep):
    """Whose sums are that of the kernel, those of each k_b − shift·φ(0), and those of each ∂k_b/∂log h_b = −2·t_b·φ'(t_b)."""

    def _exponent(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        exponent = super()._exponent(a, i, b, j)
        t = self.buffer("t", i, j)
        if self.kernel.takes_distance:
            torch.mul(exponent, exponent, out=t)
        else:
            torch.mul(exponent, -2 / self.profile.unit, out=t)
        if a is b and i == j:
            t.fill_diagonal_(0)
        return exponent

    def _sums(self, n: int, rung: Rung, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        count = len(self.host_sum.ratios)
        # 2·t_0, or −2·t_0 where the slope is φ' and not −φ'.
        t = self.buffer("t", i, j)
        derivative = torch.mul(t, rung.slope, out=self.buffer("derivative", i, j))
        if self.profile.kernel_is_slope and self.profile.shifts[n]:
            derivative.add_(t)
        sums = torch.zeros(1 + 2 * count, dtype=torch.float64, device="cpu")
        sums[1 + n] = _quadratic_form(rung.value, a, i, b, j)
        sums[1 + count + n] = self.host_sum.ratios[n] * _quadratic_form(derivative, a, i, b, j)
        sums[0] = rung.weight * sums[1 + n]
        return sums


def _quadratic_form(k: Tensor, a: Points, i: slice, b: Points, j: slice) -> float:
    # Rows in float32, their sum in float64: the rounding of one sum over the tile would not average out between few tiles.
    if a.uniform and b.uniform:
        return float(k.sum(1).sum(dtype=torch.float64)) / (len(a) * len(b))
    return float(a.weights[i].double() @ (k @ b.weights[j]).double())


def mmd(
    sweep_of: type[Sweep], samples: Sequence[Sample], kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, unbiased: bool
) -> tuple[Tensor, list[Tensor | None], KernelSum, Tensor]:
    """MMD² of two samples, or of one against N(0, I), in float64; the gradients to the rows of each, those wanted; the kernel, and what
    other sums the sweep takes."""
    mean = torch.stack([stable_mean(sample.whole) / len(samples) for sample in samples]).sum(0)
    # MMD² of a radial kernel does not change when both samples move; float32 is useless far from the origin.
    centre = mean if kernel.radial else torch.zeros_like(mean)
    origin = mean if len(samples) == 2 else torch.zeros_like(mean)
    spread = torch.stack([(sample.whole - origin).square().sum(1, dtype=torch.float64).mean() for sample in samples]).sum()
    if len(samples) == 1:
        spread = spread + mean.shape[0]
    kernels = KernelSum.of(kernel, bandwidth, bandwidth_weights, mean.shape[0], mean.device, spread)

    sweep = sweep_of(kernels, [sample.whole for sample in samples], centre)
    points = [sweep.points(sample.z, sample.weights, sample.gradient) for sample in samples]
    # nan for a sample that is not finite, which sums of kernels may not show.
    zero = zero_if_finite(*(sample.whole for sample in samples))
    sums: Any = zero
    for sample, rows in zip(samples, points, strict=True):
        scale = float(sample.scale)
        sums = sums + scale * sample.share**2 * sweep.within(rows, scale * sample.share)
        for other, weights, share in sample.others:
            sums = sums + scale * sample.share * share * sweep.across(rows, sweep.points(other, weights, False), scale * share)
    if any(sample.whole is not sample.z for sample in samples) and len(samples) == 2:
        # The rows of each against the whole of the other, for a gradient that takes nothing from elsewhere.
        whole = [sweep.points(sample.whole, sample.whole_weights, False) for sample in samples]
        sums = sums - 2 * samples[0].share * sweep.across(points[0], whole[1], -1.0)
        if samples[1].gradient:
            sweep.across(points[1], whole[0], -1.0)
    elif len(samples) == 2:
        sums = sums - 2 * sweep.across(points[0], points[1], -1.0)
    gradients = [
        _gradient(sample, sweep.pull(rows), kernels.gamma[0] + zero) if sample.gradient else None
        for sample, rows in zip(samples, points, strict=True)
    ]
    sums = sums.reshape(-1)
    value = sums[0]
    if not unbiased:
        for sample, gradient in zip(samples, gradients, strict=True):
            value = value + diagonal(sample, kernels, gradient)[0] @ kernels.weights
    if len(samples) == 1:
        value = value + prior(samples[0], kernels, gradients[0])[0] @ kernels.weights
    return value, gradients, kernels, sums[1:]


def _gradient(sample: Sample, pull: Tensor, gamma: Tensor) -> Tensor:
    """−4γ_0·w_i times the pull of a sweep."""
    # In two factors: γ itself may be past the range of float32.
    scale = gamma.sqrt()
    return pull.mul_(scale.to(pull.dtype)).mul_(sample.row_weights * (-4 * scale).to(pull.dtype)).contiguous()
