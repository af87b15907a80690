"""Few rows on a CPU: log densities and products with a kernel matrix from one array of all pairs, which is kept for the backward pass.

Each function takes one problem, x (N, D) and y (M, D), or a batch. In numbered formulas of `fastvae.reference.log_kernel_density`,
exp(l_ij) is the kernel matrix K up to a factor for each row or each column that cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu.families import TileEvaluator, exponentials, tile_evaluator
from fastvae.cpu.small import SCALES, pair_exponents
from fastvae.kernel_sums import LOG2_E, HostKernelSum, KernelSum, is_nearly_constant
from fastvae.radial import Kernel

# With exponents to base e up to this, sums of k and their quotients are normal numbers.
_REACH = {torch.float32: 60.0, torch.float64: 600.0}

Exponents = tuple[Tensor, Tensor, Tensor, float]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Pairs(NamedTuple):
    """K, and what its gradient takes."""

    x: Tensor  # as given, or centred
    y: Tensor
    k: Tensor  # (..., N, M)
    slope: Tensor | None  # −½/γ_0 times the derivative of each k to d², if it is wanted; it may be k
    shift: Tensor | None  # the logarithm of the factor that each row or column lacks, as a column or a row


class FewRows(NamedTuple):
    """Σ_b a_b·k_b over the pairs of few rows."""

    kernel: Kernel
    evaluator: TileEvaluator
    gamma: float  # of the widest bandwidth
    ratios: tuple[float, ...]  # γ_b/γ_0
    weights: tuple[float, ...]  # a_b over the largest of them
    log_scale: float  # the logarithm of the largest
    log_spread: float  # of the largest over the smallest

    def pairs(self, x: Tensor, y: Tensor, slope: bool, divided: bool, shift: int | None) -> Pairs | None:
        """K over exp(`log_scale`). None where products of rows are not accurate enough, or all k are close to φ(0).

        If K is to be `divided` by its sums, none may underflow: each row (`shift` −1) or column (−2) may then lack a factor; if neither
        may, the result is None.
        """
        found = self.exponents(x, y)
        return None if found is None else self.of_exponents(*found, slope, divided, shift)

    def exponents(self, x: Tensor, y: Tensor, *options: Any) -> Exponents | None:
        """`pair_exponents` of the widest bandwidth."""
        return pair_exponents(self.kernel, self.gamma * self.evaluator.exponent_scale, self.ratios[-1], x, y, *options)

    def of_exponents(
        self, x: Tensor, y: Tensor, exponent: Tensor, reach: float, slope: bool, divided: bool, shift: int | None
    ) -> Pairs | None:
        """`pairs` of what `exponents` found, which it may overwrite."""
        single = len(self.ratios) == 1
        if not divided:
            mean = float(exponent.mean())
            if is_nearly_constant(self.kernel, 0.5 * mean * mean if self.kernel.takes_distance else -mean / self.evaluator.exponent_scale):
                return None
        elif self.log_spread + reach / self.evaluator.exponent_scale > _REACH[exponent.dtype]:
            return None if shift is None else self._shifted(x, y, exponent, slope, shift)
        if single and self.evaluator.neg_dphi_is_value:
            value = exponentials(reach, exponent.dtype).exp2_(exponent)
            return Pairs(x, y, value, value, None)
        total: Tensor | None = None
        slopes: Tensor | None = None
        value = torch.empty_like(exponent)
        scratch: Any = torch.empty_like(exponent) if slope or not self.evaluator.slope_is_optional else None
        if self.evaluator.neg_dphi_is_value:
            scratch = value
        for n, (ratio, weight) in enumerate(zip(self.ratios, self.weights, strict=True)):
            functions = exponentials(reach * LOG2_E * ratio, exponent.dtype)
            neg_dphi = self.evaluator.evaluate(n, ratio, exponent, value, scratch, functions)
            if single:
                return Pairs(x, y, value, neg_dphi, None)
            total = value * weight if total is None else total.add_(value, alpha=weight)
            if slope:
                slopes = neg_dphi * weight if slopes is None else slopes.add_(neg_dphi, alpha=weight * ratio)
        assert total is not None
        return Pairs(x, y, total, slopes, None)

    def _shifted(self, x: Tensor, y: Tensor, exponent: Tensor, slope: bool, dim: int) -> Pairs:
        """From logarithms, less the largest of each row or column."""
        # One more factor in front of each kernel makes logarithms natural.
        exponent.mul_(1 / self.evaluator.exponent_scale)
        log, slopes = exponent, None
        if len(self.ratios) == 1:
            slopes = self.evaluator.logarithm_(exponent, torch.empty_like(exponent) if slope else None, 1.0)
        else:
            logs, each_slope = exponent.new_empty((2, len(self.ratios), *exponent.shape)).unbind(0)
            for ratio, weight, out, out_slope in zip(self.ratios, self.weights, logs, each_slope, strict=True):
                torch.mul(exponent, ratio**0.5 if self.kernel.takes_distance else ratio, out=out)
                found = self.evaluator.logarithm_(out, out_slope if slope else None, 1.0)
                if slope:
                    out_slope.fill_(ratio) if found is None else out_slope.mul_(ratio)
                out.add_(math.log(weight))
            log, slopes = logs.logsumexp(0), logs.softmax(0).mul_(each_slope).sum(0) if slope else None
        largest = log.amax(dim, keepdim=True)
        k = log.sub_(largest).exp_()
        return Pairs(x, y, k, k if slopes is None else slopes.mul_(k), largest)

    def gradients(
        self, x: Tensor, y: Tensor, slope: Tensor, u: Tensor | None, v: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients to x and y of Σ u_i·v_j·k_ij, with u (..., N, 1) and v (..., M, 1), None for 1; `slope` as in `Pairs`."""
        found: list[Tensor | None] = [None, None]
        for n, (rows, others, w, left, right) in enumerate(((x, y, slope, u, v), (y, x, slope.mT, v, u))):
            if wanted[n]:
                sums = w.sum(-1, keepdim=True) if right is None else w @ right
                moments = w @ (others if right is None else others * right)
                found[n] = (rows * sums).sub_(moments).mul_(-2 * self.gamma if left is None else left * (-2 * self.gamma))
        return found[0], found[1]


@functools.lru_cache(maxsize=256)
def few_rows(kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int | None) -> FewRows | None:
    """None where numbers are out of range. With `dim` each k_b is multiplied by (2πh_b²)^(−dim/2)."""
    # False for a nan, which stands for a rule, too.
    if not (min(weights) > 0 and SCALES[0] < min(bandwidth) <= max(bandwidth) < SCALES[1]):
        return None
    host_sum = HostKernelSum.of(KernelSum.of(kernel, bandwidth, weights, 1, torch.device("cpu"), None))
    widths = sorted(bandwidth, reverse=True)
    logs = [math.log(a) - 0.5 * (dim or 0) * math.log(2 * math.pi * h * h) for a, h in zip(host_sum.weights, widths, strict=True)]
    most = max(logs)
    relative = tuple(max(math.exp(log - most), 1e-300) for log in logs)
    return FewRows(kernel, tile_evaluator(host_sum), host_sum.gamma, host_sum.ratios, relative, most, most - min(logs))


@dataclass(frozen=True)
class Density:
    """(1), with weights of 1/M if there are none."""

    operation: ClassVar[str] = "log_kernel_density"
    rows: FewRows

    def evaluate(self, x: Tensor, y: Tensor, w: Tensor | None, gradients: bool) -> tuple[Tensor | None, ...] | None:
        """log p, (..., N), and the tensors that `gradients` takes."""
        if w is not None:
            least, most = (float(bound) for bound in w.aminmax())
            if not (least >= 0 and 1e-10 < most < 1e10):
                return None
        if (pairs := self.rows.pairs(x, y, gradients, True, -1)) is None:
            return None
        sums = pairs.k.sum(-1) if w is None else (pairs.k @ w.to(pairs.k.dtype)[..., None])[..., 0]
        constant = self.rows.log_scale - (math.log(y.shape[-2]) if w is None else 0)
        density = sums.log().add_(constant if pairs.shift is None else pairs.shift[..., 0] + constant)
        return density, sums, *pairs

    def gradients(self, grad: Tensor, w: Tensor | None, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        sums, pairs = tensors[0], Pairs._make(tensors[1:])
        u = (grad / sums).unsqueeze(-1)
        v = None if w is None else w.to(sums.dtype)[..., None]
        to_w = (pairs.k.mT @ u)[..., 0] if wanted[2] else None
        return *self.rows.gradients(pairs.x, pairs.y, cast(Tensor, pairs.slope), u, v, wanted), to_w


@dataclass(frozen=True)
class Product:
    """(2), or K·v."""

    operation: ClassVar[str] = "kernel_matmul with normalize"
    rows: FewRows
    normalize: str | None

    def evaluate(self, x: Tensor, y: Tensor, v: Tensor, gradients: bool) -> tuple[Tensor | None, ...] | None:
        """(..., N, C), and the tensors that `gradients` takes."""
        if not math.isfinite(float(v.sum())):
            return None
        shift = -1 if self.normalize == "rows" else -2 if self.normalize == "columns" else None
        if (pairs := self.rows.pairs(x, y, gradients, self.normalize is not None, shift)) is None:
            return None
        # The factors of each row and each column, of which P is K times both.
        row = column = None
        if self.normalize in ("rows", "both"):
            row = pairs.k.sum(-1, keepdim=True)
            row = row.reciprocal_() if self.normalize == "rows" else row.rsqrt_()
        if self.normalize in ("columns", "both"):
            column = pairs.k.sum(-2).unsqueeze(-1)
            column = column.reciprocal_() if self.normalize == "columns" else column.rsqrt_()
        v = v.to(pairs.k.dtype)
        out = pairs.k @ (v if column is None else v * column)
        out = out if row is None else out * row
        return out, out, row, column, *pairs

    def gradients(self, grad: Tensor, v: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        (out, row, column), pairs = tensors[:3], Pairs._make(tensors[3:])
        grad, v, slope = grad.to(out.dtype), v.to(out.dtype), cast(Tensor, pairs.slope)
        left = grad if row is None or column is None else grad * row
        to_v = None
        if wanted[2] or column is not None:
            to_v = pairs.k.mT @ (left if column is not None or row is None else grad * row)
            to_v = to_v if column is None else to_v * column
        if not (wanted[0] or wanted[1]):
            return None, None, to_v
        # (3) over K
        of_rows = None if row is None else (grad * out).sum(-1, keepdim=True)
        of_columns = None if column is None or to_v is None else (v * to_v).sum(-1)[..., None, :]
        if row is not None and column is not None and of_rows is not None and of_columns is not None:
            of_rows, of_columns = of_rows.mul_(row.square()), of_columns.mul_(column.square().mT)
            weights = (left @ (v * column).mT).sub_(of_rows, alpha=0.5).sub_(of_columns, alpha=0.5).mul_(slope)
        elif row is not None:
            weights = (grad @ v.mT).sub_(of_rows).mul_(row).mul_(slope)
        elif column is not None:
            weights = (grad @ v.mT).sub_(of_columns).mul_(column.mT).mul_(slope)
        else:
            weights = (grad @ v.mT).mul_(slope)
        return *self.rows.gradients(pairs.x, pairs.y, weights, None, None, wanted), to_v if wanted[2] else None


class Landmarks(NamedTuple):
    """A fixed sample, prepared."""

    centre: Tensor  # (D,)
    z: Tensor  # (M, D), less the centre
    norm2: Tensor  # ‖z‖²

    @staticmethod
    def of(points: Tensor) -> Landmarks:
        centre = points.mean(0)
        z = points - centre
        return Landmarks(centre, z, torch.linalg.vecdot(z, z))


@dataclass(frozen=True)
class ToMean:
    """MMD² of x (N, D) to a fixed sample y (M, D) with weights of any sum, formula (1) of `fastvae.reference.kernel_mean`."""

    operation: ClassVar[str] = "mmd"
    rows: FewRows
    norm: Tensor
    unbiased: bool
    landmarks: Callable[[torch.dtype], Landmarks]

    def evaluate(self, x: Tensor, y: Tensor, weights: Tensor | None, gradients: bool) -> tuple[Tensor | None, ...] | None:
        """The value in float64, and the tensors that `gradients` takes."""
        n, dtype = len(x), x.dtype
        # As in `pair_exponents`.
        centre, z, z_norm2 = self.landmarks(torch.float64 if self.rows.kernel.takes_distance else dtype)
        x = x.to(centre.dtype) - centre
        across, own = self.rows.exponents(x, z, True, z_norm2, dtype), self.rows.exponents(x, x, True, None, dtype)
        if across is None or own is None:
            return None
        exponent, reach = torch.cat([own[2], across[2]], 1), max(own[3], across[3])
        if (pairs := self.rows.of_exponents(x, z, exponent, reach, gradients, False, None)) is None:
            return None
        k, slope = pairs.k, pairs.slope
        scale = math.exp(self.rows.log_scale)
        factors = k.new_full((n + len(z), 1), scale / (n - self.unbiased))
        of_z = factors[n:]
        of_z.fill_(-2 * scale / len(z)) if weights is None else torch.mul(weights.unsqueeze(1), -2 * scale, out=of_z)
        for t in (k,) if slope is None or slope is k else (k, slope):
            t[:, :n].fill_diagonal_(0)
        diagonal = 0.0 if self.unbiased else self.rows.kernel.value_at_zero * scale * math.fsum(self.rows.weights)
        value = (k @ factors).sum(dtype=torch.float64).add_(diagonal).mul_(1 / n).add_(self.norm)
        if gradients and slope is not None:
            # Each row of x is in pairs as a row and as a column.
            factors[:n].mul_(2)
            slope.mul_(factors.mT)
        return value, x, z, slope

    def gradients(self, grad: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        x, z, slope = tensors
        n, (x, z) = len(x), (t.to(slope.dtype) for t in (x, z))
        moments = torch.addmm(slope[:, :n] @ x, slope[:, n:], z)
        factor = grad.to(x.dtype) * (-2 * self.rows.gamma / n)
        return (x * slope.sum(-1, keepdim=True)).sub_(moments).mul_(factor), None, None
