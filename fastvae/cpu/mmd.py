"""MMD² on a CPU: sums over all pairs of rows, tile by tile, without the N×M array.

With rows z = [x; y] and signed weights w = [p; −q], MMD² is the quadratic form wᵀKw. A row's gradient is a sum over j of
w_j·φ'(t_ij)·(z_i − z_j), so that it follows from the moments Σ_j w_j·φ'(t_ij)·[z_j, 1], which a sweep adds up tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvae.cpu.closed_forms import Sample, diagonal, prior
from fastvae.cpu.tiles import BandwidthTile, TiledSample, Tiles
from fastvae.dispatch import zero_if_finite
from fastvae.kernel_sums import KernelSum, Numbers, stable_mean
from fastvae.radial import Kernel


class CPUSweep(Tiles):
    """The sums of MMD² over all pairs of rows, and the moments of each row's gradient.

    The notation is that of formula (1) of `fastvae.reference.mmd`; k stands for k − φ(0) where the constant is subtracted. The row gradient
    of a is the sum of scale·Σ_j w_j·W_ij·(z_i − z_j) over all sums that a takes part in, with W as in `Tiles.row_gradient`.
    """

    takes_slope: ClassVar[bool] = False  # without a gradient too

    def within(self, a: TiledSample, scale: float) -> Any:
        """Σ_{i≠j} w_i·w_j·k(a_i, a_j), in a subclass followed by its other sums."""
        total, tiles = 0.0, a.tiles
        for n, i in enumerate(tiles):
            for j in tiles[n:]:
                total += self._tile(a, i, a, j, scale) * (1 if i == j else 2)
        self._add_constant_moments(a, a, scale)
        return total

    def across(self, a: TiledSample, b: TiledSample, scale: float) -> Any:
        """Σ_ij w_i·w_j·k(a_i, b_j), likewise."""
        total = 0.0
        for i in a.tiles:
            for j in b.tiles:
                total += self._tile(a, i, b, j, scale)
        self._add_constant_moments(a, b, scale)
        self._add_constant_moments(b, a, scale)
        return total

    def _tile(self, a: TiledSample, i: slice, b: TiledSample, j: slice, scale: float) -> Any:
        """Σ w·w·k over a tile, whose share is added to the moments."""
        gradient = a.moments is not None or b.moments is not None
        total, slope = 0.0, None
        for n, tile in enumerate(self.evaluate_bandwidths(a, i, b, j, gradient or self.takes_slope)):
            total += self._sums(n, tile, a, i, b, j)
            if not gradient:
                continue
            if self.single:
                slope, scale = tile.neg_dphi, scale * tile.slope_weight
            elif slope is None:
                slope = torch.mul(tile.neg_dphi, tile.slope_weight, out=self.buffer("slope total", i, j))
            else:
                slope.add_(tile.neg_dphi, alpha=tile.slope_weight)
        if slope is not None:
            self.add_moments(slope, a, i, b, j, scale)
        return total

    def _sums(self, n: int, tile: BandwidthTile, a: TiledSample, i: slice, b: TiledSample, j: slice) -> Any:
        """The share of the n-th bandwidth in the sums."""
        return tile.weight * _quadratic_form(tile.value, a, i, b, j)

    def _add_constant_moments(self, a: TiledSample, b: TiledSample, scale: float) -> None:
        """The moments of the constant that is subtracted from each pair's slope, in closed form."""
        if a.moments is not None and self.host_sum.slope_constant:
            a.moments += b.weighted.sum(1, keepdim=True) * (scale * self.host_sum.slope_constant)


class CPUBandwidthSweep(CPUSweep):
    """For gradients to bandwidths. After the sum over the kernel come those over each k_b, or k_b − φ(0) where the constant is subtracted,
    and those over each ∂k_b/∂log h_b = −2·t_b·φ'(t_b)."""

    takes_slope = True

    def _exponent(self, a: TiledSample, i: slice, b: TiledSample, j: slice) -> Tensor:
        exponent = super()._exponent(a, i, b, j)
        t = self.buffer("t", i, j)
        if self.kernel.takes_distance:
            torch.mul(exponent, exponent, out=t)
        else:
            torch.mul(exponent, -2 / self.evaluator.exponent_scale, out=t)
        if a is b and i == j:
            t.fill_diagonal_(0)
        return exponent

    def _sums(self, n: int, tile: BandwidthTile, a: TiledSample, i: slice, b: TiledSample, j: slice) -> Tensor:
        count = len(self.host_sum.ratios)
        # 2·t_0, or −2·t_0 where the tile has φ' in place of −φ'.
        t = self.buffer("t", i, j)
        derivative = torch.mul(t, tile.neg_dphi, out=self.buffer("derivative", i, j))
        if self.evaluator.neg_dphi_is_value and self.evaluator.subtract_constant[n]:
            derivative.add_(t)
        sums = torch.zeros(1 + 2 * count, dtype=torch.float64, device="cpu")
        sums[1 + n] = _quadratic_form(tile.value, a, i, b, j)
        sums[1 + count + n] = self.host_sum.ratios[n] * _quadratic_form(derivative, a, i, b, j)
        sums[0] = tile.weight * sums[1 + n]
        return sums


def _quadratic_form(k: Tensor, a: TiledSample, i: slice, b: TiledSample, j: slice) -> float:
    # Rows are summed in float32, their sums in float64: the rounding of one float32 sum over the tile does not average out over few tiles.
    if a.uniform and b.uniform:
        return float(k.sum(1).sum(dtype=torch.float64)) / (len(a) * len(b))
    return float(a.weights[i].double() @ (k @ b.weights[j]).double())


def mmd(
    sweep_type: type[CPUSweep],
    samples: Sequence[Sample],
    kernel: Kernel,
    bandwidth: Numbers,
    bandwidth_weights: Numbers,
    unbiased: bool,
    y_norm: Tensor | None,
) -> tuple[Tensor, list[Tensor | None], KernelSum, Tensor]:
    """MMD² of two samples, or of one against N(0, I), in float64; the gradients to the rows of each, or None; the sum of kernels; and the
    other sums of the sweep. `y_norm` replaces the mean over the pairs of the second sample."""
    mean = torch.stack([stable_mean(sample.whole) / len(samples) for sample in samples]).sum(0)
    # MMD² of a radial kernel does not change when both samples are shifted, and float32 loses its digits far from the origin.
    centre = mean if kernel.radial else torch.zeros_like(mean)
    origin = mean if len(samples) == 2 else torch.zeros_like(mean)
    spread = torch.stack([(sample.whole - origin).square().sum(1, dtype=torch.float64).mean() for sample in samples]).sum()
    if len(samples) == 1:
        spread = spread + mean.shape[0]
    kernels = KernelSum.of(kernel, bandwidth, bandwidth_weights, mean.shape[0], mean.device, spread)

    sweep = sweep_type(kernels, [sample.whole for sample in samples], centre)
    tiled = [sweep.prepare(sample.z, sample.weights, sample.gradient) for sample in samples]
    # A sample that is not finite gives nan, which sums of kernels alone may not show.
    zero = zero_if_finite(*(sample.whole for sample in samples))
    sums: Any = zero
    own = samples if y_norm is None else samples[:1]
    for sample, rows in zip(own, tiled, strict=False):
        scale = float(sample.scale)
        sums = sums + scale * sample.share**2 * sweep.within(rows, scale * sample.share)
        for other, weights, share in sample.others:
            sums = sums + scale * sample.share * share * sweep.across(rows, sweep.prepare(other, weights, False), scale * share)
    if any(sample.whole is not sample.z for sample in samples) and len(samples) == 2:
        # The rows of each against all of the other: their gradient is then complete.
        whole = [sweep.prepare(sample.whole, sample.whole_weights, False) for sample in samples]
        sums = sums - 2 * samples[0].share * sweep.across(tiled[0], whole[1], -1.0)
        if samples[1].gradient:
            sweep.across(tiled[1], whole[0], -1.0)
    elif len(samples) == 2:
        sums = sums - 2 * sweep.across(tiled[0], tiled[1], -1.0)
    gradients = [
        _gradient(sample, sweep.row_gradient(rows), kernels.gamma[0] + zero) if sample.gradient else None
        for sample, rows in zip(samples, tiled, strict=True)
    ]
    sums = sums.reshape(-1)
    value = sums[0]
    if not unbiased:
        for sample, gradient in zip(own, gradients, strict=False):
            value = value + diagonal(sample, kernels, gradient)[0] @ kernels.weights
    if y_norm is not None:
        # The sums lack the constant of the pairs of x and twice that of the pairs of both.
        value = value + samples[0].exact_row_weights().sum() * (y_norm - kernels.value_constant)
    if len(samples) == 1:
        value = value + prior(samples[0], kernels, gradients[0])[0] @ kernels.weights
    return value, gradients, kernels, sums[1:]


def _gradient(sample: Sample, row_gradient: Tensor, gamma: Tensor) -> Tensor:
    """−4γ_0·w_i times the row gradient of a sweep."""
    # In two factors, as γ itself may be out of the range of float32.
    scale = gamma.sqrt()
    return row_gradient.mul_(scale.to(row_gradient.dtype)).mul_(sample.row_weights * (-4 * scale).to(row_gradient.dtype)).contiguous()
