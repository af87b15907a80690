"""A kernel and its derivative over one tile of pairs of rows after another: what every pairwise operation walks on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.kernel_sums import EXPONENT_ERROR, LOG2_E, HostKernelSum, KernelSum
from fastvae.radial import RBF, Energy, Kernel, Laplace, Polynomial, RationalQuadratic

# 512² float32 values fill one second-level cache of 1 MiB; 256² and 1024² were slower with one thread. Each thread takes its share of every
# operation on a tile, which more threads therefore make larger: two are 1.1 to 1.35 times as fast with 768² as with 512².
TILE = 512
_LARGEST_TILE = 2048

# oneDNN's products of float32, which PyTorch's compiler takes for linear layers. For tiles of 512² they are 1.4 to 2.3 times as fast as
# MKL's on an AMD EPYC 9005, from 4 to 786 features.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
# Each shape is compiled, for half a millisecond, and kept, in most of a MiB: they have to be few. The start of a product takes ten
# microseconds more than MKL's, which tiles of fewer pairs, or fewer multiply-adds, do not win back.
LINEAR_MULTIPLE = 64
_LINEAR_PAIRS = 1 << 17
_LINEAR_FROM = 600_000

# A gradient from moments loses the share of h in the distance of its rows from the centre: from so many times the limit of products on,
# which are distances of 3e5 bandwidths at least, it is from differences.
_FAR = 1e6

# In the place of infinity, as of differences of float64 and their squares.
_LARGEST = 1e270

# Products in float64 leave a root of ‖x−y‖² too few digits where it is under this many roundings of ‖x‖²: such pairs are taken from
# differences.
_NEAR = 2.0**26


@dataclass
class Points:
    """One sample as the tiles read it."""

    z: Tensor  # (N, D), as it came
    weights: Tensor  # (N,)
    uniform: bool  # all weights are 1/N
    right: Tensor  # (N, D + 2), of each row what `Tiles.left` is multiplied by
    weighted: Tensor  # (D + 1, N): w_j·[z_j, 1], centred
    moments: Tensor | None  # (D + 1, N): Σ_j w_j·W_ij·[z_j, 1], of tiles that are not far
    far_pull: Tensor | None  # (N, D): Σ_j w_j·W_ij·(z_i − z_j) over those that are
    tiles: list[slice]
    radius2: dict[int, float]  # the largest ‖z‖² of each tile of rows, centred, by its start

    def __len__(self) -> int:
        return self.z.shape[0]


def most_rows() -> int:
    """Of a tile: TILE times the root of the number of threads."""
    step = _step()
    return min(_LARGEST_TILE, step * math.ceil(TILE / step * math.sqrt(torch.get_num_threads())))


def tiles_of(rows: int, start: int = 0) -> list[slice]:
    """Slices from `start` to `rows`, as few as `most_rows` allows, of one size but the last."""
    parts = -(-(rows - start) // most_rows())
    size = min(most_rows(), -(-(rows - start) // (parts * _step())) * _step()) if parts else 1
    return [slice(first, min(first + size, rows)) for first in range(start, rows, size)]


def _step() -> int:
    """What sizes of tiles are multiples of, to be few."""
    return max(1, TILE // 4)


class Rung(NamedTuple):
    """One bandwidth of a tile, in buffers that the next one reuses."""

    weight: float  # a_b
    slope_weight: float  # a_b·γ_b/γ_0
    value: Tensor  # k_b − shift·φ(0)
    slope: Tensor  # −φ'(t_b) − shift, φ'(t_b) for a kernel of x·y


class Exponentials(NamedTuple):
    """2^t and exp(t) − 1 of t ≤ 0, and the square of such a power; in place."""

    exp2_: Callable[[Tensor], Tensor]
    expm1_: Callable[[Tensor], Tensor]
    square_: Callable[[Tensor], Tensor]


_EXPONENTIALS = Exponentials(Tensor.exp2_, Tensor.expm1_, Tensor.square_)


def _without_denormal(exponent: float) -> Exponentials:
    """Of which powers and their squares are 2^exponent at least."""
    least = 2 ** (exponent / 2)
    return Exponentials(lambda t: t.clamp_(min=exponent).exp2_(), Tensor.expm1_, lambda power: power.clamp_(min=least).square_())


# Denormal numbers take a processor a hundred times as long. Their exponents start here, and powers far enough from them have products with
# weights and points that are none. A pass that leaves them out is worth its time in tiles of which the farthest pairs have so many times
# these exponents: of normal samples few pairs are over a third as far.
_DENORMAL = {torch.float32: -126.0, torch.float64: -1022.0}
_WITHOUT_DENORMAL = {dtype: _without_denormal(0.8 * exponent) for dtype, exponent in _DENORMAL.items()}
_MANY = 2.5


def exponentials(farthest: float, dtype: torch.dtype) -> Exponentials:
    """For exponents of a power of two down to −farthest."""
    return _WITHOUT_DENORMAL[dtype] if _MANY < farthest / -_DENORMAL[dtype] < math.inf else _EXPONENTIALS


def linear(dtype: torch.dtype) -> Callable[..., Any] | None:
    """oneDNN's product of numbers of `dtype`, unless it is not there or switched off."""
    return _LINEAR if dtype == torch.float32 and torch._C._get_mkldnn_enabled() else None


def is_linear(pairs: Sequence[int], features: int) -> bool:
    """Whether oneDNN's product of, or with, an array of so many pairs is faster."""
    rows, columns = pairs
    few_shapes = rows % LINEAR_MULTIPLE == columns % LINEAR_MULTIPLE == 0
    return few_shapes and rows * columns >= _LINEAR_PAIRS and rows * columns * features >= _LINEAR_FROM


def by_linear(product: Callable[..., Any], left: Tensor, right: Tensor) -> Tensor:
    # Of a weight whose rows do not lie side by side the product takes a thousand times as long.
    weight = right.T if right.is_contiguous() or right.T.is_contiguous() else right.T.contiguous()
    return cast(Tensor, product(left, weight, None, "none", [], ""))


class Profile(NamedTuple):
    """How the bandwidths of a `HostKernelSum` follow from the exponents of the widest: what of it does not change with their scale."""

    kernel: Kernel
    squarings: tuple[int, ...]
    shifts: tuple[int, ...]
    unit: float  # of the exponents
    coefficients: tuple[float, ...]  # of a polynomial

    @staticmethod
    def of(host_sum: HostKernelSum) -> Profile:
        # exp2 takes a quarter of the time of exp, or half on other processors; expm1 has no such twin.
        unit = LOG2_E if isinstance(host_sum.kernel, RBF) and not host_sum.shifts[0] else 1.0
        coefficients = tuple(host_sum.kernel.coefficients) if isinstance(host_sum.kernel, Polynomial) else ()
        return Profile(host_sum.kernel, host_sum.squarings, host_sum.shifts, unit, coefficients)

    @property
    def kernel_is_slope(self) -> bool:
        return isinstance(self.kernel, RBF)

    def evaluate(
        self,
        n: int,
        ratio: float | Tensor,
        exponent: Tensor,
        out: Tensor,
        slope: Tensor | None,
        exponentials: Exponentials = _EXPONENTIALS,
    ) -> Tensor:
        """k_n − shift·φ(0) into `out`, which holds that of n − 1 or is `exponent`; returns the slope, in `slope` unless it is k_n."""
        kernel, shift = self.kernel, self.shifts[n]
        exp2_, expm1_, _ = exponentials
        if isinstance(kernel, RBF):
            self._climb(n, ratio, exponent, out, exponentials)
            return out
        assert slope is not None
        if isinstance(kernel, RationalQuadratic):
            torch.mul(exponent, -ratio / kernel.alpha, out=out)
            if kernel.alpha == 1:
                torch.add(out, 1, out=slope).pow_(-2)
            else:
                # 1 + t/α would lose what a large α multiplies again.
                exp2_(torch.log1p(out, out=slope).mul_(-(kernel.alpha + 1) * LOG2_E))
            if shift:
                expm1_(out.log1p_().mul_(-kernel.alpha))
            else:
                out.add_(1).mul_(slope)
        elif isinstance(kernel, Laplace):
            torch.mul(exponent, -LOG2_E * ratio**0.5, out=out)
            exp2_(slope.copy_(out)).div_(out).mul_(-LOG2_E).masked_fill_(out == 0, 0)
            expm1_(out.div_(LOG2_E)) if shift else exp2_(out)
        elif isinstance(kernel, Energy):
            torch.mul(exponent, -(ratio**0.5), out=out)
            torch.reciprocal(out, out=slope).neg_().masked_fill_(out == 0, 0)
        elif isinstance(kernel, Polynomial):
            t = torch.mul(exponent, ratio, out=slope)
            out.fill_(self.coefficients[0])
            for coefficient in self.coefficients[1:]:
                out.mul_(t).add_(coefficient)
            out.mul_(t)
            if not shift:
                out.add_(kernel.value_at_zero)
            slope.add_(kernel.coef0).pow_(len(self.coefficients) - 1).mul_(len(self.coefficients))
        else:
            raise AssertionError(f"{kernel.name} has no tile")
        return slope

    def _climb(self, n: int, ratio: float | Tensor, exponent: Tensor, power: Tensor, exponentials: Exponentials) -> None:
        shift, squarings = self.shifts[n], self.squarings[n]
        if squarings:
            if self.shifts[n - 1] and not shift:
                power.add_(1)
            for _ in range(squarings):
                # (1 + e)² − 1 = e·(e + 2)
                power.mul_(power + 2) if shift else exponentials.square_(power)
            return
        if power is not exponent:
            torch.mul(exponent, ratio if shift == self.shifts[0] else ratio * LOG2_E, out=power)
        if shift:
            exponentials.expm1_(power)
        else:
            exponentials.exp2_(power)


class Tiles:
    """The tiles of `kernel` between samples of which `samples` are all; a pair of a row with itself counts as zero."""

    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor) -> None:
        self.host_sum = HostKernelSum.of(kernel)
        self.centre, self.limit = _arithmetic(self.host_sum, samples, centre)
        self.dtype = self.centre.dtype
        self.kernel = self.host_sum.kernel
        self.single = len(self.host_sum.ratios) == 1
        self.profile = Profile.of(self.host_sum)
        # Of the points, whose products are then the exponents of the widest bandwidth.
        self.scale = (self.host_sum.gamma * (2 * self.profile.unit if self.kernel.radial else 1.0)) ** 0.5
        self._linear = linear(self.dtype)
        if self._linear is not None and max(map(len, samples)) >= TILE:
            # What a product returns is freed with its tile. The C library keeps for the next one what is smaller than the largest block
            # freed so far, up to 32 MiB, and has the system map the pages of others anew.
            self.centre.new_empty(min(4 * most_rows() ** 2, 8_000_000))
        self._buffers: dict[str, Tensor] = {}
        # Rows of tiles stay the same while columns change.
        self._left: tuple[Points, slice, Tensor] | None = None

    def points(self, z: Tensor, weights: Tensor | None, gradient: bool, tiles: list[slice] | None = None) -> Points:
        (n, dim), new = z.shape, self.centre.new_empty
        w = new(n).fill_(1 / n) if weights is None else weights.to(self.dtype)
        right, weighted = new(n, dim + 2), new(dim + 1, n)
        tiles = tiles_of(n) if tiles is None else tiles
        radius2 = {}
        for i in tiles:
            rows = self.centred(z[i])
            scaled, one, half = right[i].split_with_sizes((dim, 1, 1), 1)
            # In float64, as a rounded scale would be another bandwidth than that of the closed form of a prior.
            scaled.copy_(rows.double() * self.scale)
            one.fill_(1)
            torch.mul(rows.T, w[i], out=weighted[:-1, i])
            if self.kernel.radial:
                torch.sum(scaled.square(), 1, keepdim=True, out=half).mul_(-0.5)
            else:
                half.zero_()
            radius2[i.start] = float(half.min()) * -2 / self.scale**2
        weighted[-1] = w
        # Contiguous rows of moments: for few features the product with a tile is up to six times faster than with contiguous columns.
        return Points(z, w, weights is None, right, weighted, torch.zeros_like(weighted) if gradient else None, None, tiles, radius2)

    def centred(self, z: Tensor) -> Tensor:
        return z.to(self.dtype) - self.centre

    def left(self, a: Points, i: slice) -> Tensor:
        """(rows, D + 2), whose product with the right of other rows is the exponent of the widest bandwidth."""
        if self._left is None or self._left[0] is not a or self._left[1] != i:
            scaled, one, half = a.right[i].split_with_sizes((a.z.shape[1], 1, 1), 1)
            self._left = a, i, torch.cat([scaled, half, one], 1)
        return self._left[2]

    def pull(self, a: Points) -> Tensor:
        """The pull on each row of `fastvae.cpu.mmd.Sweep`, from the moments."""
        assert a.moments is not None
        if not self.kernel.radial:
            return (-0.5 * a.moments[:-1].T).to(a.z.dtype)
        z = self.centred(a.z)
        if a.far_pull is None:
            return z.mul_(a.moments[-1:].T).sub_(a.moments[:-1].T).to(a.z.dtype)
        return z.clamp_(-_LARGEST, _LARGEST).mul_(a.moments[-1:].T).sub_(a.moments[:-1].T).add_(a.far_pull).to(a.z.dtype)

    def rungs(self, a: Points, i: slice, b: Points, j: slice) -> Iterator[Rung]:
        exponent = self._exponent(a, i, b, j)
        value = exponent if all(self.host_sum.squarings[1:]) else self.buffer("value", i, j)
        # Of two rows as far apart as rows of the tile can be.
        reach = a.radius2[i.start] ** 0.5 + b.radius2[j.start] ** 0.5
        farthest = self.host_sum.gamma * LOG2_E * reach * reach
        for n, (ratio, weight) in enumerate(zip(self.host_sum.ratios, self.host_sum.weights, strict=True)):
            scratch = None if self.profile.kernel_is_slope else self.buffer("slope", i, j)
            slope = self.profile.evaluate(n, ratio, exponent, value, scratch, exponentials(farthest * ratio, self.dtype))
            if a is b and i == j:
                value.fill_diagonal_(0)
                slope.fill_diagonal_(0)
            yield Rung(weight, weight * ratio, value, slope)

    def sums(self, a: Points, i: slice, b: Points, j: slice, slope: bool) -> tuple[Tensor, Tensor]:
        """Σ_b a_b·k_b, and if `slope` Σ_b a_b·(γ_b/γ_0)·s_b, over a tile, each less its shifts."""
        if self.single:
            rung = next(self.rungs(a, i, b, j))
            if rung.weight != 1:
                rung.value.mul_(rung.weight)
                if rung.slope is not rung.value:
                    rung.slope.mul_(rung.slope_weight)
            return rung.value, rung.slope
        total, slope_total = self.buffer("total", i, j).zero_(), self.buffer("slope total", i, j)
        if slope:
            slope_total.zero_()
        for rung in self.rungs(a, i, b, j):
            total.add_(rung.value, alpha=rung.weight)
            if slope:
                slope_total.add_(rung.slope, alpha=rung.slope_weight)
        return total, slope_total

    def add_moments(self, slope: Tensor, a: Points, i: slice, b: Points, j: slice, scale: float) -> None:
        """A tile's share of the moments of a, and of b but for a tile on the diagonal of one sample."""
        if max(a.radius2[i.start], b.radius2[j.start]) > _FAR * self.limit:
            self._add_far_pull(slope, a, i, b, j, scale)
            return
        if a.moments is not None:
            self.add_product(a.moments[:, i], b.weighted[:, j], slope.T, scale)
        if b.moments is not None and not (a is b and i == j):
            self.add_product(b.moments[:, j], a.weighted[:, i], slope, scale)

    def _add_far_pull(self, slope: Tensor, a: Points, i: slice, b: Points, j: slice, scale: float) -> None:
        for points in (a, b):
            if points.moments is not None and points.far_pull is None:
                points.far_pull = torch.zeros_like(points.z, dtype=self.dtype)
        x, y = a.z[i].double(), b.z[j].double()
        for d in range(x.shape[1]):
            pull = torch.sub(x[:, d, None], y[:, d], out=self.buffer("difference", i, j)).clamp_(-_LARGEST, _LARGEST).mul_(slope)
            if a.far_pull is not None:
                a.far_pull[i, d].add_(pull @ b.weights[j], alpha=scale)
            if b.far_pull is not None and not (a is b and i == j):
                b.far_pull[j, d].sub_(a.weights[i] @ pull, alpha=scale)

    def buffer(self, name: str, i: slice, j: slice) -> Tensor:
        """A tile of its own for each name."""
        rows, columns = i.stop - i.start, j.stop - j.start
        if name not in self._buffers or self._buffers[name].numel() < rows * columns:
            self._buffers[name] = self.centre.new_empty(rows * columns)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left (rows, features) @ right (features, columns) of a tile, in the buffer of this name or a tensor of its own."""
        (rows, features), columns = left.shape, right.shape[1]
        if self._is_linear(rows, columns, features):
            return self._by_linear(left, right)
        return torch.mm(left, right, out=self.buffer(name, slice(0, rows), slice(0, columns)))

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
        """total (features, columns) += scale·left (features, rows) @ right (rows, columns) of a tile."""
        if self._is_linear(right.shape[0], right.shape[1], left.shape[0]):
            total.add_(self._by_linear(left, right), alpha=scale)
        else:
            total.addmm_(left, right, alpha=scale)

    def _is_linear(self, rows: int, columns: int, features: int) -> bool:
        return self._linear is not None and is_linear((rows, columns), features)

    def _by_linear(self, left: Tensor, right: Tensor) -> Tensor:
        assert self._linear is not None
        return by_linear(self._linear, left, right)

    def _exponent(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        """−t_0 times the unit; √(2·t_0) for a rooted kernel, t_0 for one of x·y."""
        radius2 = a.radius2[i.start], b.radius2[j.start]
        if max(radius2) > self.limit:
            out = self.buffer("exponent", i, j)
            self._differences(a, i, b, j, out)
        else:
            out = self.product("exponent", self.left(a, i), b.right[j].T)
            if self.kernel.takes_distance:
                out.mul_(-2)
                near = _NEAR * torch.finfo(self.dtype).eps * 2 * self.host_sum.gamma * sum(radius2)
                if float(out.min()) < near:
                    self._refine(a, i, b, j, out, near)
        if self.kernel.takes_distance:
            out.sqrt_()
        return out

    def _differences(self, a: Points, i: slice, b: Points, j: slice, out: Tensor) -> None:
        # Of rows as they came: those near one another may both be far from the centre.
        distance = torch.cdist(a.z[i].double(), b.z[j].double(), compute_mode="donot_use_mm_for_euclid_dist")
        torch.mul(distance, distance, out=out).mul_(self.host_sum.gamma * (2 if self.kernel.takes_distance else -self.profile.unit))
        if not isinstance(self.kernel, Energy):
            # Infinity times the k of zero would be nan; times all ratios of bandwidths this is none.
            out.clamp_(-_LARGEST, _LARGEST)

    def _refine(self, a: Points, i: slice, b: Points, j: slice, out: Tensor, near: float) -> None:
        """The 2·t_0 of a tile that are under `near`, from differences."""
        left, right = (out < near).nonzero().unbind(1)
        if left.numel() * a.z.shape[1] > out.numel():
            self._differences(a, i, b, j, out)
            return
        x, y = self.centred(a.z[i][left]), self.centred(b.z[j][right])
        d2, rounding = (x - y).square().sum(1), 16 * torch.finfo(self.dtype).eps
        # Nearer than points are exact they count as coincident: a direction between them is none, and its slope has no bound.
        d2[d2 <= rounding**2 * (x.square().sum(1) + y.square().sum(1))] = 0
        out[left, right] = d2 * (2 * self.host_sum.gamma)


def _arithmetic(host_sum: HostKernelSum, samples: Sequence[Tensor], centre: Tensor) -> tuple[Tensor, float]:
    """The centre in the dtype of the tiles, and the largest ‖z − centre‖² at which the products of that dtype are exact enough."""
    dtype = samples[0].dtype
    steepest = host_sum.gamma * host_sum.ratios[-1] / EXPONENT_ERROR[dtype]
    limit = float("inf") if not host_sum.kernel.radial else 1 / steepest
    exact = limit / torch.finfo(torch.float64).eps
    if not host_sum.kernel.takes_distance:
        limit = limit / torch.finfo(dtype).eps
        if all(float((z - centre).square().sum(1).max()) <= limit for z in samples):
            return centre, limit
    # A few outliers may be what makes the radius: unlike the mean, the median stays with the others.
    rows = torch.cat(list(samples)).double()
    median = rows.median(0).values
    if isinstance(host_sum.kernel, Energy):
        # It has no bandwidth: what is far is so beside the other rows.
        exact = float(rows.sub_(median).square_().sum(1).median()) * EXPONENT_ERROR[dtype] / torch.finfo(torch.float64).eps
    return median, exact
