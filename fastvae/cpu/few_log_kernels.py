"""Few rows on a CPU: log densities and normalised products from one array of all pairs. Formulas of `fastvae.reference.log_kernel_density`.

An array is kept for the backward pass, in place of a second sweep. Each function takes one problem, x (N, D) and y (M, D), or a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastvae.cpu.families import TileEvaluator, tile_evaluator
from fastvae.cpu.small import SCALES, has_few_pairs, pair_exponents
from fastvae.kernel_sums import HostKernelSum, KernelSum
from fastvae.radial import Kernel

# Powers of e whose square is a normal number, also divided by the number of rows: between them the root of a product keeps its digits.
_RANGE = {torch.float32: 35.0, torch.float64: 300.0}

Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class LogKernel(NamedTuple):
    """log Σ_b a_b·k_b, and −½/γ_0 times its derivative."""

    kernel: Kernel
    evaluator: TileEvaluator
    gamma: float  # of the widest bandwidth
    ratios: tuple[float, ...]  # γ_b/γ_0
    log_weights: tuple[float, ...]

    def of_pairs(self, x: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """x and y, centred if that is needed; the logarithm of each pair; −∂/∂t_0 of it, or None for 1. None where products of rows are
        not accurate enough."""
        if not has_few_pairs(x, y):
            return None
        if (found := pair_exponents(self.kernel, self.gamma, self.ratios[-1], x, y)) is None:
            return None
        x, y, exponent = found
        if len(self.ratios) == 1:
            slopes = self.evaluator.logarithm_(exponent, torch.empty_like(exponent) if slope else None, 1.0)
            return x, y, exponent, slopes
        logs, slopes = exponent.new_empty((2, len(self.ratios), *exponent.shape)).unbind(0)
        for ratio, weight, log, out in zip(self.ratios, self.log_weights, logs, slopes, strict=True):
            torch.mul(exponent, ratio**0.5 if self.kernel.takes_distance else ratio, out=log)
            found_slope = self.evaluator.logarithm_(log, out if slope else None, 1.0)
            if slope:
                out.fill_(ratio) if found_slope is None else out.mul_(ratio)
            log.add_(weight)
        return x, y, logs.logsumexp(0), logs.softmax(0).mul_(slopes).sum(0) if slope else None

    def row_gradients(self, weights: Tensor, x: Tensor, y: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients to x and y of Σ weights_ij·log_ij, of which the slope is in the weights already."""
        pairs = (wanted[0], x, y, weights), (wanted[1], y, x, weights.mT)
        to_x, to_y = (
            (rows * w.sum(-1, keepdim=True)).sub_(w @ others).mul_(-2 * self.gamma) if want else None for want, rows, others, w in pairs
        )
        return to_x, to_y


@functools.lru_cache(maxsize=256)
def log_kernel(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int | None) -> LogKernel | None:
    """None where numbers are out of range. With `dim` each k_b is multiplied by (2πh_b²)^(−dim/2)."""
    # False for a nan, which stands for a rule, too.
    if not (min(weights) > 0 and SCALES[0] < min(bandwidth) <= max(bandwidth) < SCALES[1]):
        return None
    host_sum = HostKernelSum.of(KernelSum.of(kernel, bandwidth, weights, 1, torch.device("cpu"), None))
    widths = sorted(bandwidth, reverse=True)
    log_weights = (math.log(a) - 0.5 * (dim or 0) * math.log(2 * math.pi * h * h) for a, h in zip(host_sum.weights, widths, strict=True))
    return LogKernel(kernel, tile_evaluator(host_sum), host_sum.gamma, host_sum.ratios, tuple(log_weights))


@dataclass(frozen=True)
class Density:
    """log Σ_j w_j·Σ_b a_b·k_b(x_i, y_j), with weights of 1/M if there are none."""

    operation: ClassVar[str] = "log_kernel_density"
    log_kernel: LogKernel

    def evaluate(self, x: Tensor, y: Tensor, w: Tensor | None, gradients: bool) -> tuple[Tensor | None, ...] | None:
        """(1), (..., N), and what `gradients` takes."""
        if w is not None:
            least, most = (float(bound) for bound in w.aminmax())
            # A gradient to a weight of zero is not its share divided by it.
            if not (0 < most < math.inf and (least > 0 if gradients else least >= 0)):
                return None
        if (found := self.log_kernel.of_pairs(x, y, gradients)) is None:
            return None
        x, y, log, slope = found
        if w is not None:
            log.add_(w.log()[..., None, :])
        shares = log.softmax(-1)
        # The largest share is that of the largest term: this term over the sum.
        density = log.amax(-1).sub_(shares.amax(-1).log_())
        constant = (0.0 if w is not None else -math.log(y.shape[-2])) + self._constant
        return density.add_(constant) if constant else density, shares, x, y, slope

    @property
    def _constant(self) -> float:
        weights = self.log_kernel.log_weights
        return weights[0] if len(weights) == 1 else 0.0

    def gradients(self, grad: Tensor, w: Tensor | None, tensors: list[Tensor], wanted: tuple[bool, ...]) -> Gradients:
        shares, x, y, slope = tensors
        weights = shares * grad.to(shares.dtype)[..., None]
        to_w = weights.sum(-2).div_(w) if w is not None and wanted[2] else None
        if slope is not None:
            weights.mul_(slope)
        return *self.log_kernel.row_gradients(weights, x, y, wanted[:2]), to_w


@dataclass(frozen=True)
class NormalizedProduct:
    """(2)"""

    operation: ClassVar[str] = "kernel_matmul"
    log_kernel: LogKernel
    normalize: str

    def evaluate(self, x: Tensor, y: Tensor, v: Tensor, gradients: bool) -> tuple[Tensor | None, ...] | None:
        """(..., N, C), and what `gradients` takes."""
        least, most = (float(bound) for bound in v.aminmax())
        if not (least > -math.inf and most < math.inf):
            return None
        if (found := self.log_kernel.of_pairs(x, y, gradients)) is None:
            return None
        x, y, log, slope = found
        row = None if self.normalize == "columns" else log.softmax(-1)
        column = None if self.normalize == "rows" else log.softmax(-2)
        if row is None or column is None:
            p = column if row is None else row
        elif _range(log) < _RANGE[log.dtype]:
            p = (row * column).sqrt_()
        else:
            p = log.sub(log.logsumexp(-1, keepdim=True), alpha=0.5).sub_(log.logsumexp(-2, keepdim=True), alpha=0.5).exp_()
        assert p is not None
        out = p @ v.to(p.dtype)
        return out, p, row, column, out, x, y, slope

    def gradients(self, grad: Tensor, v: Tensor, tensors: list[Tensor], wanted: tuple[bool, ...]) -> Gradients:
        p, row, column, out, x, y, slope = tensors
        grad, v = grad.to(p.dtype), v.to(p.dtype)
        to_v = p.mT @ grad if wanted[2] or column is not None else None
        if not (wanted[0] or wanted[1]):
            return None, None, to_v
        weights = grad @ v.mT
        of_rows = None if row is None else (grad * out).sum(-1, keepdim=True)
        of_columns = None if column is None else (v * to_v).sum(-1)[..., None, :]
        if of_rows is None or of_columns is None:
            weights.sub_(of_columns if of_rows is None else of_rows).mul_(p)
        else:
            weights.mul_(p).addcmul_(row, of_rows, value=-0.5).addcmul_(column, of_columns, value=-0.5)
        if slope is not None:
            weights.mul_(slope)
        return *self.log_kernel.row_gradients(weights, x, y, wanted[:2]), to_v if wanted[2] else None


def _range(log: Tensor) -> float:
    least, most = log.aminmax()
    return float(most) - float(least)
