"""The tiles of all pairs of rows: their sizes, the distances in them, and the sums that gradients are made of.

Every pairwise operation on a CPU goes through them one after another. `fastvae.cpu.families` evaluates the kernel over each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.cpu.families import exponentials, tile_evaluator
from fastvae.cpu.products import is_faster_by_onednn, multiply, onednn_product
from fastvae.kernel_sums import EXPONENT_ERROR, LOG2_E, HostKernelSum, KernelSum
from fastvae.radial import Kernel

# 512² float32 values fill one second-level cache of 1 MiB; 256² and 1024² were slower with one thread. Each thread takes its share of every
# operation on a tile, so that more threads make tiles larger: two are 1.1 to 1.35 times as fast with 768² as with 512².
TILE = 512
_LARGEST_TILE = 2048

# A gradient from moments loses digits where rows are far from the centre relative to the bandwidth. From this many times the largest
# squared distance at which products are used, at least 3e5 bandwidths, it is computed from differences.
_FAR = 1e6

# Of powers of two relative to the sum of a row or a column: smaller ones add nothing, and denormal numbers are a hundred times slower.
LEAST_EXPONENT = {torch.float32: -100.0, torch.float64: -1000.0}

# Used in place of infinity, for differences of float64 and their squares.
_LARGEST = 1e270

# Products in float64 leave √‖x−y‖² too few digits where ‖x−y‖² is less than this many rounding errors of ‖x‖². The distances of such pairs
# are computed from differences.
_NEAR_IN_ROUNDINGS = 2.0**26

# For float32 samples and functions of the distance: the least ‖x−y‖² of a tile relative to the largest ‖x‖² + ‖y‖² from which products in
# float32 are accurate enough, and that from which moments in float32 are.
LEAST_SHARE, LEAST_SHARE_OF_MOMENTS = 2.0**-6, 2.0**-12

# Squares from this on, and their products with weights, are normal numbers in float32.
LEAST_SQUARE = 1e-30


@dataclass
class TiledSample:
    """One sample, prepared for `Tiles`."""

    z: Tensor  # (N, D), as given
    weights: Tensor  # (N,)
    uniform: bool  # all weights are 1/N
    right: Tensor  # (N, D + 2), the right factor of the product of which `Tiles.left` is the left one
    weighted: Tensor  # (D + 1, N): w_j·[z_j, 1], centred
    moments: Tensor | None  # (D + 1, N): Σ_j w_j·W_ij·[z_j, 1], over the tiles that are not far
    direct: Tensor | None  # (N, D): Σ_j w_j·W_ij·(z_i − z_j) over tiles whose moments would lose digits
    tiles: list[slice]
    radius2: dict[int, float]  # the largest ‖z‖² in each tile of rows, centred; keyed by the tile's first row
    bias: Tensor | None = field(default=None, kw_only=True)  # (N,), see `Tiles.sums`

    def __len__(self) -> int:
        return self.z.shape[0]


def most_rows() -> int:
    """The most rows of a tile: TILE times the root of the number of threads."""
    step = _step()
    return min(_LARGEST_TILE, step * math.ceil(TILE / step * math.sqrt(torch.get_num_threads())))


def tiles_of(rows: int, start: int = 0) -> list[slice]:
    """As few slices from `start` to `rows` as `most_rows` allows, all of one size but the last."""
    parts = -(-(rows - start) // most_rows())
    size = min(most_rows(), -(-(rows - start) // (parts * _step())) * _step()) if parts else 1
    return [slice(first, min(first + size, rows)) for first in range(start, rows, size)]


def _step() -> int:
    """Sizes of tiles are multiples of this, so that there are few different ones."""
    return max(1, TILE // 4)


class BandwidthTile(NamedTuple):
    """One bandwidth's values over a tile, in buffers that the next bandwidth overwrites."""

    weight: float  # a_b
    slope_weight: float  # a_b·γ_b/γ_0
    value: Tensor  # k_b, or k_b − φ(0)
    neg_dphi: Tensor  # −φ'(t_b), or φ'(t_b) for a kernel of x·y; see `TileEvaluator.evaluate`. Only if the slope is wanted
    curvature_weight: float  # a_b·(γ_b/γ_0)²
    curvature: Tensor | None  # φ''(t_b)


class Tiles:
    """The tiles of a sum of kernels between samples, all of which are in `samples`. The pair of a row with itself counts as zero."""

    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor, second_derivative: bool = False) -> None:
        self.host_sum = HostKernelSum.of(kernel)
        # Whether the distances of near pairs have to be exact.
        self.exact = kernel.kernel.slope_takes_distance if second_derivative else kernel.kernel.takes_distance
        self.centre, self.limit = _arithmetic(self.host_sum, samples, centre, self.exact)
        # Only distances need float64, and only where rows are near each other.
        self.mixed = False
        if self.exact and not second_derivative and samples[0].dtype == torch.float32:
            radius2 = max(float((z - self.centre).square().sum(1).max()) for z in samples)
            self.mixed = are_distances_in_range(kernel.kernel, 8 * self.host_sum.gamma * radius2, self.host_sum.ratios[-1])
        self.dtype = samples[0].dtype if self.mixed else self.centre.dtype
        # Of a mixed tile: whether its moments, and whether any distance so far, needed float64.
        self._is_near = self._was_near = False
        self.kernel = self.host_sum.kernel
        self.single = len(self.host_sum.ratios) == 1
        self.evaluator = tile_evaluator(self.host_sum)
        # Rows are multiplied by this, so that their products are the exponents of the widest bandwidth.
        self.scale = (self.host_sum.gamma * (2 * self.evaluator.exponent_scale if self.kernel.radial else 1.0)) ** 0.5
        self._onednn = onednn_product(self.dtype)
        if self._onednn is not None and max(map(len, samples)) >= TILE:
            # oneDNN allocates each result, which is freed with its tile. The C library keeps a freed block for the next result only if it
            # is smaller than the largest block freed so far, up to 32 MiB; otherwise the system has to map its pages again.
            self.centre.new_empty(min(4 * most_rows() ** 2, 8_000_000))
        self._buffers: dict[str, Tensor] = {}
        # The left factor stays the same while the columns change.
        self._left: tuple[TiledSample, slice, Tensor] | None = None

    def prepare(self, z: Tensor, weights: Tensor | None, gradient: bool, tiles: list[slice] | None = None) -> TiledSample:
        """A sample (N, D) with weights (N,), or 1/N each."""
        (n, dim), new = z.shape, functools.partial(self.centre.new_empty, dtype=self.dtype)
        w = new(n).fill_(1 / n) if weights is None else weights.to(self.dtype)
        right, weighted = new(n, dim + 2), new(dim + 1, n)
        tiles = tiles_of(n) if tiles is None else tiles
        radius2 = {}
        for i in tiles:
            rows = self.centred(z[i])
            scaled, one, neg_half_norm2 = right[i].split_with_sizes((dim, 1, 1), 1)
            # In float64: a rounded scale would mean a bandwidth that differs from that of the prior's closed form.
            scaled.copy_(rows.double() * self.scale)
            one.fill_(1)
            torch.mul(rows.T, w[i], out=weighted[:-1, i])
            if self.kernel.radial:
                torch.sum(scaled.square(), 1, keepdim=True, out=neg_half_norm2).mul_(-0.5)
            else:
                neg_half_norm2.zero_()
            radius2[i.start] = float(neg_half_norm2.min()) * -2 / self.scale**2
        weighted[-1] = w
        # Moments are contiguous along the rows of z: for few features their product with a tile is then up to six times faster.
        return TiledSample(z, w, weights is None, right, weighted, torch.zeros_like(weighted) if gradient else None, None, tiles, radius2)

    def centred(self, z: Tensor) -> Tensor:
        return (z.to(self.centre.dtype) - self.centre).to(self.dtype)

    def left(self, a: TiledSample, i: slice) -> Tensor:
        """(rows, D + 2); its product with `right` of other rows is the exponent of the widest bandwidth."""
        if self._left is None or self._left[0] is not a or self._left[1] != i:
            scaled, one, neg_half_norm2 = a.right[i].split_with_sizes((a.z.shape[1], 1, 1), 1)
            self._left = a, i, torch.cat([scaled, neg_half_norm2, one], 1)
        return self._left[2]

    def row_gradient(self, a: TiledSample) -> Tensor:
        """Σ_j w_j·W_ij·(z_i − z_j) for each row of a, (N, D), from the sums of `add_moments`; −½·Σ_j w_j·W_ij·z_j for a kernel of x·y.

        W = Σ_b a_b·(γ_b/γ_0)·(−φ'(t_b)), with φ' in place of −φ' for a kernel of x·y. A gradient is −4·γ_0·w_i times this for every kernel.
        """
        assert a.moments is not None
        if not self.kernel.radial:
            return (-0.5 * a.moments[:-1].T).to(a.z.dtype)
        z = self.centred(a.z)
        if a.direct is None:
            return z.mul_(a.moments[-1:].T).sub_(a.moments[:-1].T).to(a.z.dtype)
        if z.dtype == torch.float64:
            z.clamp_(-_LARGEST, _LARGEST)
        return z.mul_(a.moments[-1:].T).sub_(a.moments[:-1].T).add_(a.direct).to(a.z.dtype)

    def evaluate_bandwidths(
        self, a: TiledSample, i: slice, b: TiledSample, j: slice, slope: bool = True, curvature: bool = False
    ) -> Iterator[BandwidthTile]:
        exponent = self._exponent(a, i, b, j)
        overwrites = all(self.host_sum.squarings[1:]) and (not curvature or self.evaluator.neg_dphi_is_value)
        value = exponent if overwrites else self.buffer("value", i, j)
        scratch: Any = value if self.evaluator.neg_dphi_is_value else None
        if scratch is None and (slope or not self.evaluator.slope_is_optional):
            scratch = self.buffer("neg_dphi", i, j)
        # The largest distance that two rows of the tile can have.
        reach = a.radius2[i.start] ** 0.5 + b.radius2[j.start] ** 0.5
        farthest = self.host_sum.gamma * LOG2_E * reach * reach
        for n, (ratio, weight) in enumerate(zip(self.host_sum.ratios, self.host_sum.weights, strict=True)):
            neg_dphi = self.evaluator.evaluate(n, ratio, exponent, value, scratch, exponentials(farthest * ratio, self.dtype))
            second = self.evaluator.curvature(ratio, exponent, neg_dphi) if curvature else None
            if a is b and i == j:
                for t in (value, neg_dphi) if second is None else (value, neg_dphi, second):
                    t.fill_diagonal_(0)
            yield BandwidthTile(weight, weight * ratio, value, neg_dphi, weight * ratio * ratio, second)

    def derivatives(
        self, a: TiledSample, i: slice, b: TiledSample, j: slice, value: bool, curvature: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Σ_b a_b·k_b if `value`, W of `row_gradient` and, if `curvature`, Σ_b a_b·(γ_b/γ_0)²·φ''(t_b) over a tile; some may be the same.

        No constant must be subtracted.
        """
        names = ("total", "slope total", "curvature total")
        totals: list[Tensor | None] = [None] * 3
        for tile in self.evaluate_bandwidths(a, i, b, j, curvature=curvature):
            if self.single and tile.weight == 1:
                return tile.value, tile.neg_dphi, tile.neg_dphi if tile.curvature is None else tile.curvature
            parts = (
                (tile.value if value else None, tile.weight),
                (tile.neg_dphi, tile.slope_weight),
                (tile.curvature, tile.curvature_weight),
            )
            for n, (name, (part, weight)) in enumerate(zip(names, parts, strict=True)):
                total = totals[n]
                if part is None:
                    continue
                if total is None:
                    totals[n] = torch.mul(part, weight, out=self.buffer(name, i, j))
                else:
                    total.add_(part, alpha=weight)
        total, slope, second = totals
        assert slope is not None
        return total, slope, slope if second is None else second

    def sums(self, a: TiledSample, i: slice, b: TiledSample, j: slice, slope: bool) -> tuple[Tensor, Tensor]:
        """Σ_b a_b·k_b and, if `slope`, W of `row_gradient` over a tile, each without the constants that are subtracted.

        With biases both are of one bandwidth, and multiplied by 2^(−a.bias_i − b.bias_j).
        """
        if a.bias is not None and b.bias is not None:
            value, ratio = self.logarithms(a, i, b, j, slope)
            # In this order: what rounding does to k·2^−b.bias cancels in a bias of a that is the logarithm of its sums.
            value.sub_(b.bias[j]).sub_(a.bias[i, None]).clamp_(min=LEAST_EXPONENT[self.dtype]).exp2_()
            return value, value if ratio is None else ratio.mul_(value)
        if self.single:
            weight, slope_weight, value, neg_dphi, *_ = next(self.evaluate_bandwidths(a, i, b, j, slope))
            if weight != 1:
                value.mul_(weight)
                if neg_dphi is not value:
                    neg_dphi.mul_(slope_weight)
            return value, neg_dphi
        total, slope_total = self.buffer("total", i, j).zero_(), self.buffer("slope total", i, j)
        if slope:
            slope_total.zero_()
        for weight, slope_weight, value, neg_dphi, *_ in self.evaluate_bandwidths(a, i, b, j, slope):
            total.add_(value, alpha=weight)
            if slope:
                slope_total.add_(neg_dphi, alpha=slope_weight)
        return total, slope_total

    def logarithms(self, a: TiledSample, i: slice, b: TiledSample, j: slice, slope: bool) -> tuple[Tensor, Tensor | None]:
        """log₂ k of one bandwidth over a tile, without its weight, and if `slope` −φ'/φ, or None for 1."""
        exponent = self._exponent(a, i, b, j)
        return exponent, self.evaluator.logarithm_(exponent, self.buffer("neg_dphi", i, j) if slope else None, LOG2_E)

    def add_moments(self, slope: Tensor, a: TiledSample, i: slice, b: TiledSample, j: slice, scale: float) -> None:
        """Adds a tile's share to the moments of a, and of b unless the tile is on the diagonal of one sample. `slope` is that of the tile
        evaluated last."""
        is_far = max(a.radius2[i.start], b.radius2[j.start]) > _FAR * self.limit
        if is_far or self._is_near:
            for sample in (a, b):
                if sample.moments is not None and sample.direct is None:
                    sample.direct = torch.zeros_like(sample.z, dtype=torch.float64)
            (self._add_far_row_gradient if is_far else self._add_near_row_gradient)(slope, a, i, b, j, scale)
            return
        if a.moments is not None:
            self.add_product(a.moments[:, i], b.weighted[:, j], slope.T, scale)
        if b.moments is not None and not (a is b and i == j):
            self.add_product(b.moments[:, j], a.weighted[:, i], slope, scale)

    def _add_near_row_gradient(self, slope: Tensor, a: TiledSample, i: slice, b: TiledSample, j: slice, scale: float) -> None:
        """From moments in float64."""
        x, y, w = a.z[i].double() - self.centre, b.z[j].double() - self.centre, self.buffer("slope", i, j, torch.float64).copy_(slope)
        if a.direct is not None:
            a.direct[i].add_(_by_moments(x, w, y, b.weights[j]), alpha=scale)
        if b.direct is not None and not (a is b and i == j):
            b.direct[j].add_(_by_moments(y, w.T, x, a.weights[i]), alpha=scale)

    def _add_far_row_gradient(self, slope: Tensor, a: TiledSample, i: slice, b: TiledSample, j: slice, scale: float) -> None:
        """From differences."""
        x, y, difference = a.z[i].double(), b.z[j].double(), self.buffer("difference", i, j, torch.float64)
        left, right = a.weights[i].double(), b.weights[j].double()
        for d in range(x.shape[1]):
            pairs = torch.sub(x[:, d, None], y[:, d], out=difference).clamp_(-_LARGEST, _LARGEST).mul_(slope)
            if a.direct is not None:
                a.direct[i, d].add_(pairs @ right, alpha=scale)
            if b.direct is not None and not (a is b and i == j):
                b.direct[j, d].sub_(left @ pairs, alpha=scale)

    def buffer(self, name: str, i: slice, j: slice, dtype: torch.dtype | None = None) -> Tensor:
        """A tile for this name, kept for the next call, in the dtype of the tiles or another one."""
        rows, columns = i.stop - i.start, j.stop - j.start
        if name not in self._buffers or self._buffers[name].numel() < rows * columns:
            self._buffers[name] = self.centre.new_empty(rows * columns, dtype=dtype or self.dtype)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left (rows, features) @ right (features, columns) of a tile, in the buffer of this name or in a new tensor."""
        (rows, features), columns = left.shape, right.shape[1]
        if self._onednn is not None and is_faster_by_onednn((rows, columns), features):
            return multiply(self._onednn, left, right)
        return torch.mm(left, right, out=self.buffer(name, slice(0, rows), slice(0, columns)))

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
        """total (features, columns) += scale·left (features, rows) @ right (rows, columns) of a tile."""
        if self._onednn is not None and is_faster_by_onednn(right.shape, left.shape[0]):
            total.add_(multiply(self._onednn, left, right), alpha=scale)
        else:
            total.addmm_(left, right, alpha=scale)

    def _exponent(self, a: TiledSample, i: slice, b: TiledSample, j: slice) -> Tensor:
        """The tile that `TileEvaluator.evaluate` takes."""
        radius2 = a.radius2[i.start], b.radius2[j.start]
        is_far, self._is_near = max(radius2) > self.limit, False
        if not (self.exact or is_far):
            return self.product("exponent", self.left(a, i), b.right[j].T)
        largest, diagonal = self._scale_of_squares() * sum(radius2), a is b and i == j
        if self.mixed and not (is_far or self._was_near):
            out = self.product("exponent", self.left(a, i), b.right[j].T).mul_(-2)
            if self._least(out, diagonal) >= max(LEAST_SHARE * largest, LEAST_SQUARE):
                return out.sqrt_()
            # So have other tiles, most likely.
            self._was_near = True
        squares, least = self._exact_squares(a, i, b, j, largest, is_far)
        if not self.kernel.takes_distance:
            return torch.mul(squares, -self.evaluator.exponent_scale, out=self.buffer("exponent", i, j))
        if not self.mixed:
            return squares.sqrt_()
        out = self.buffer("exponent", i, j)
        self._is_near = is_far or least < max(LEAST_SHARE_OF_MOMENTS * largest, LEAST_SQUARE)
        # Squares that float32 cannot represent have roots that it can.
        return out.copy_(squares.sqrt_()) if is_far or least < LEAST_SQUARE else out.copy_(squares).sqrt_()

    def _exact_squares(self, a: TiledSample, i: slice, b: TiledSample, j: slice, largest: float, is_far: bool) -> tuple[Tensor, float]:
        """In float64, 2·t_0 of a tile for a function of the distance, otherwise t_0; and the least of a mixed tile that is not far."""
        squares, diagonal = self.buffer("squares", i, j, torch.float64), a is b and i == j
        if is_far:
            self._differences(a, i, b, j, squares)
            return squares, 0.0
        torch.mm(self._exact_factor(a, i, 0), self._exact_factor(b, j, 1).T, out=squares)
        squares.mul_(-2 if self.kernel.takes_distance else -1)
        near, least = _NEAR_IN_ROUNDINGS * torch.finfo(torch.float64).eps * largest, self._least(squares, diagonal)
        if least < near:
            self._refine(a, i, b, j, squares, near)
            least = self._least(squares, diagonal) if self.mixed else least
        return squares, least

    def _least(self, squares: Tensor, diagonal: bool) -> float:
        """The least number in a tile; on the `diagonal` of a sample less that of the tile, which becomes 0."""
        if not diagonal:
            return float(squares.min())
        least = float(squares.fill_diagonal_(math.inf).min())
        squares.fill_diagonal_(0)
        return least

    def _exact_factor(self, a: TiledSample, i: slice, place: int) -> Tensor:
        """In float64: as `left`, or for `place` 1 as `TiledSample.right`."""
        if a.right.dtype == torch.float64:
            return a.right[i] if place else self.left(a, i)
        scaled = (a.z[i].double() - self.centre).mul_(self.scale)
        norms = scaled.square().sum(1, keepdim=True).mul_(-0.5)
        ones = torch.ones_like(norms)
        return torch.cat([scaled, *((ones, norms) if place else (norms, ones))], 1)

    def _differences(self, a: TiledSample, i: slice, b: TiledSample, j: slice, out: Tensor) -> None:
        # From the rows as given: two close rows may both be far from the centre.
        distance = torch.cdist(a.z[i].double(), b.z[j].double(), compute_mode="donot_use_mm_for_euclid_dist")
        torch.mul(distance, distance, out=out).mul_(self._scale_of_squares())
        if not self.kernel.homogeneous:
            # Infinity times k = 0 would be nan. The largest value times any ratio of bandwidths stays finite.
            out.clamp_(max=_LARGEST)

    def _refine(self, a: TiledSample, i: slice, b: TiledSample, j: slice, out: Tensor, near: float) -> None:
        """Computes the squared distances in a tile that are below `near` from differences."""
        left, right = (out < near).nonzero().unbind(1)
        if left.numel() * a.z.shape[1] > out.numel():
            self._differences(a, i, b, j, out)
            return
        x, y = (z.double() - self.centre for z in (a.z[i][left], b.z[j][right]))
        d2 = (x - y).square().sum(1)
        # Pairs closer than the rounding error of the rows count as identical: an unbounded slope would amplify a random direction.
        rounding = 16 * torch.finfo(torch.float64).eps
        d2[d2 <= rounding**2 * (x.square().sum(1) + y.square().sum(1))] = 0
        out[left, right] = d2 * self._scale_of_squares()

    def _scale_of_squares(self) -> float:
        """Of what a tile has of ‖x − y‖²."""
        return self.host_sum.gamma * (2 if self.kernel.takes_distance else 1)


def _by_moments(x: Tensor, w: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights_j·w_ij·(x_i − y_j), (N, D), in float64."""
    # Contiguous along the rows, as in `Tiles.prepare`.
    moments = torch.cat([y.T, y.new_ones(1, len(y))]).mul_(weights) @ w.T
    return (x * moments[-1:].T).sub_(moments[:-1].T)


def are_distances_in_range(kernel: Kernel, reach: float, narrowest: float) -> bool:
    """Whether distances √(2t) are as exact in float32 as the exponents of other kernels, and their squares are finite there.

    `reach` bounds 2t for the widest bandwidth, and `narrowest` is the ratio of the largest γ to its.
    """
    is_exact = kernel.homogeneous or (reach * narrowest) ** 0.5 * torch.finfo(torch.float32).eps <= EXPONENT_ERROR[torch.float32]
    return is_exact and LEAST_SQUARE < reach < 1e30


def _arithmetic(host_sum: HostKernelSum, samples: Sequence[Tensor], centre: Tensor, exact_distances: bool) -> tuple[Tensor, float]:
    """The centre, in the dtype of the tiles, and the largest ‖z − centre‖² at which products in that dtype are accurate enough."""
    dtype = samples[0].dtype
    steepest = host_sum.gamma * host_sum.ratios[-1] * host_sum.kernel.steepness / EXPONENT_ERROR[dtype]
    limit = float("inf") if not host_sum.kernel.radial else 1 / steepest
    exact = limit / torch.finfo(torch.float64).eps
    if not exact_distances:
        limit = limit / torch.finfo(dtype).eps
        if all(float((z - centre).square().sum(1).max()) <= limit for z in samples):
            return centre, limit
    # A few outliers may determine the radius. Unlike the mean, the median stays with the other rows.
    rows = torch.cat(list(samples)).double()
    median = rows.median(0).values
    if host_sum.kernel.homogeneous:
        # Without a bandwidth to compare with, distances are compared with those of the other rows.
        exact = float(rows.sub_(median).square_().sum(1).median()) * EXPONENT_ERROR[dtype] / torch.finfo(torch.float64).eps
    return median, exact
