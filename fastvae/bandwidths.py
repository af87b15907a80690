"""Bandwidths from the data, without an array of all pairs: the rules named by `bandwidth="median"` and `bandwidth="mean"`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastvae import checks
from fastvae.devices import float64_on_cpu
from fastvae.dispatch import needs_dispatcher

# Squared distances kept at once by an exact selection (128 MiB).
CAPACITY = 1 << 24
# Up to _MAX_PAIRS_KEPT distances are all kept. Of more pairs, one in _PAIRS_PER_SAMPLE but at most _MAX_SAMPLES is drawn for a bracket.
_MAX_PAIRS_KEPT, _PAIRS_PER_SAMPLE, _MAX_SAMPLES = 1 << 17, 512, 1 << 18
# Up to this many features, and for few rows, differences take less time than tiles of products.
_MAX_FEATURES_OF_DIFFERENCES = 32
# With fewer pairs, float64 alone takes no longer than float32 followed by float64. With fewer features float32 is not vectorised.
_MIN_PAIRS_IN_FLOAT32, _MIN_FEATURES_IN_FLOAT32 = 1 << 12, 8
# Distances whose squares float32 can represent, and how many numbers are recomputed in float64 at most.
_FLOAT32_DISTANCES, _MAX_RECOMPUTED = (1e-15, 1e15), 1 << 16
# Rows of a tile of float64 distances, which should stay in the second-level cache.
_TILE = 256
# If ‖x‖² + ‖y‖² − 2x·y is below this share of the norms, fewer than eight digits of it are left in float64.
_CANCELLED = 1e-7
# Numbers in a block of differences.
_BLOCK = 1 << 22


@float64_on_cpu
def median_bandwidth(
    x: Tensor, y: Tensor | None = None, *, self_pairs: bool = False, pairs: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The median rule: h = √(½·median d²) over the pairs i < j of the rows of x and y together, so that exp(−d²/2h²) = 1/e at the median.

    The result is exact, in memory O((N + M)·D) and in the time of about one sweep over all pairs; or it is that of some random pairs. If
    the number of pairs is even, the median is the lower of the two middle values, as in `torch.median`. On a GPU it takes three sweeps in
    float64, which is slow on a consumer GPU; the call does not wait for them.

    Args:
        x: (..., N, D), floating point. With batch dimensions, the pairs within each item are pooled: there is one bandwidth a call.
        y: (..., M, D), same batch dimensions, dtype and device as x; None for the pairs of x alone.
        self_pairs: Take the median over all n² entries of the matrix of distances, including its diagonal of zeros.
        pairs: The number of random pairs, drawn with replacement, to use instead of all pairs.
        generator: The source of the random pairs, on the device of x.

    Returns:
        h, a float64 scalar in the units of the data, on the device of x, detached. nan if an input holds a nan or an infinity.

    Raises:
        TypeError: As in `fastvae.mmd`.
        ValueError: As in `fastvae.mmd`; also fewer than two rows in all, pairs less than one, or a median of 0, as for data that are mostly
            duplicates (nan where reading it would wait for a GPU).

    Source: Gretton et al. 2012, "A kernel two-sample test", section 8; the convention is that of alibi-detect's `sigma_median`.
    """
    checks.flag("self_pairs", self_pairs)
    z = pooled(x, y)
    n = z.shape[1]
    total = z.shape[0] * (n * (n - 1) // 2)
    if pairs is None:
        rank = (total - 1) // 2
        if self_pairs:
            # The diagonal comes first among the n² sorted entries, then each pair twice.
            rank = max(((2 * total + z.shape[0] * n - 1) // 2 - z.shape[0] * n) // 2, -1)
        squared = ranked_squared_distance(z, rank)
    else:
        checks.integer("pairs", pairs, at_least=1)
        drawn = _random_squared_distances(z, pairs, generator, self_pairs)
        rank = (pairs - 1) // 2
        # On a GPU `kthvalue` is not deterministic.
        squared = drawn.kthvalue(rank + 1).values if drawn.device.type == "cpu" else drawn.sort().values[rank]
    return checks.positive_distance("median", (0.5 * squared).sqrt())


@float64_on_cpu
def mean_bandwidth(x: Tensor, y: Tensor | None = None, *, self_pairs: bool = False) -> Tensor:
    """The mean rule: h = √(½·mean d²) over the pairs i ≠ j of the rows of x and y together, in closed form, in time O((N + M)·D).

    For n rows with mean c, Σ_{i≠j} d² = 2n·Σ_i ‖z_i − c‖². On a GPU the call does not wait.

    Args:
        x: (..., N, D), floating point. With batch dimensions, the pairs within each item are pooled: there is one bandwidth a call.
        y: (..., M, D), same batch dimensions, dtype and device as x; None for the pairs of x alone.
        self_pairs: Divide by n², the number of entries of the matrix of distances, instead of n² − n.

    Returns:
        h, a float64 scalar in the units of the data, on the device of x, detached. nan if an input holds a nan or an infinity.

    Raises:
        TypeError: As in `fastvae.mmd`.
        ValueError: As in `fastvae.mmd`; also fewer than two rows in all, or a mean of 0 (nan where reading it would wait for a GPU).

    Source: Long et al. 2015, "Learning transferable features with deep adaptation networks", section 4, with n²; alibi-detect's
    `sigma_mean`, with n² − n.
    """
    checks.flag("self_pairs", self_pairs)
    z = pooled(x, y).double()
    for _ in range(2):
        # Twice, as the first mean is rounded if z is far from the origin.
        z = z - z.mean(1, keepdim=True)
    n = z.shape[1]
    return checks.positive_distance("mean", (z.square().sum((1, 2)).mean() / (n if self_pairs else n - 1)).sqrt())


def resolve(rule: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The bandwidth that a rule finds, as a vector of length one."""
    return {"median": median_bandwidth, "mean": mean_bandwidth}[rule](x, y).reshape(1)


def pooled(x: Tensor, y: Tensor | None) -> Tensor:
    """The rows of x and y together, (items, rows, D), detached."""
    if y is None:
        checks.samples(x, batched=True)
        checks.two_rows("x", x)
        z = x
    else:
        checks.samples(x, y, batched=True)
        z = torch.cat([x, y], -2)
    return z.detach().reshape(-1, *z.shape[-2:])


@torch.library.custom_op("fastvae::ranked_squared_distance", mutates_args=(), schema="(Tensor z, SymInt rank) -> Tensor")
def _ranked_op(*args: Any) -> Tensor:
    return _select(*args)


@_ranked_op.register_kernel("cuda")
def _select_on_gpu(z: Tensor, rank: int) -> Tensor:
    """A radix select: three histograms of all pairs give the bits of the answer, and the host waits for none of them."""
    from fastvae.kernels.ranked_squared_distance import BITS, BLOCK, histogram

    items, rows, dim = z.shape
    points = z.new_zeros(items, dim, -(-rows // BLOCK) * BLOCK, dtype=torch.float64)
    points[..., :rows] = z.mT
    known = torch.zeros(1, dtype=torch.int64, device=z.device)
    below = torch.full_like(known, rank)
    counts = known.new_empty(1 << BITS)
    for shift in (2 * BITS, BITS, 0) if rank >= 0 else ():
        histogram(points, rows, known, shift, counts.zero_())
        up_to = counts.cumsum(0)
        # Rows that are not finite may be missing from the counts.
        digit = torch.searchsorted(up_to, below, right=True).clamp(max=len(counts) - 1)
        below = below - (up_to - counts).index_select(0, digit)
        known = known << BITS | digit
    return torch.where(z.isfinite().all(), known.view(torch.float64)[0], torch.nan)


@_ranked_op.register_fake
def _fake(z: Tensor, rank: int) -> Tensor:
    return z.new_empty((), dtype=torch.float64)


@_ranked_op.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], z: Tensor, rank: int) -> tuple[Tensor, int]:
    return torch.stack([_ranked_op(one, rank) for one in z.unbind(in_dims[0] or 0)]), 0


def ranked_squared_distance(z: Tensor, rank: int) -> Tensor:
    """The d² of this rank, from 0, among the pairs i < j within the items of z (items, rows, D); 0 if the rank is negative."""
    if z.device.type == "cpu" and not needs_dispatcher(z):
        return _select(z, rank)
    return cast(Tensor, _ranked_op(z, rank))


def _select(z: Tensor, rank: int) -> Tensor:
    """Random pairs give a bracket; a sweep counts the d² below it and keeps those inside."""
    n, dim = z.shape[1:]
    if not bool(z.isfinite().all()):
        return z.new_full((), torch.nan, dtype=torch.float64)
    if rank < 0:
        return z.new_zeros((), dtype=torch.float64)
    total = z.shape[0] * (n * (n - 1) // 2)
    if z.dtype != torch.float64 and dim >= _MIN_FEATURES_IN_FLOAT32 and _MIN_PAIRS_IN_FLOAT32 <= total <= _MAX_PAIRS_KEPT:
        found = _select_by_float32(z.float(), rank)
        if found is not None:
            return found
    z = z.double()
    if dim <= _MAX_FEATURES_OF_DIFFERENCES and z.shape[0] * n * n <= _MAX_PAIRS_KEPT:
        # The matrix has zeros for each row with itself, and each pair twice.
        distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        return _kth_smallest(distances.view(-1), z.shape[0] * n + 2 * rank).square()
    # Centred at the median, as a single outlier moves the mean away from all other rows.
    z = z - _kth_smallest(z.mT, (n - 1) // 2)[:, None]
    # The result does not depend on the random numbers, so the global generator is left alone.
    generator = torch.Generator("cpu").manual_seed(0)
    low, high = 0.0, torch.inf
    if total > _MAX_PAIRS_KEPT:
        sample = _random_squared_distances(z, min(total // _PAIRS_PER_SAMPLE, _MAX_SAMPLES), generator, False)
        low, high = _bracket(sample, rank / total, low, high)
    while True:
        below, inside, kept = _sweep(z, low, high, generator)
        if below > rank:
            low, high = 0.0, low
        elif below + inside <= rank:
            low, high = high, torch.inf
        elif inside == len(kept):
            return _kth_smallest(kept, rank - below)
        elif bool(kept.min() == kept.max()):
            return kept[0]
        else:
            low, high = _bracket(kept, (rank - below) / inside, low, high)


def _select_by_float32(z: Tensor, rank: int) -> Tensor | None:
    """Selects in float32, then in float64 among the pairs that float32 finds close; None if these are many or float32 cannot hold d²."""
    distances = torch.cat([torch.pdist(rows) for rows in z])
    found = float(_kth_smallest(distances, rank))
    if not _FLOAT32_DISTANCES[0] < found < _FLOAT32_DISTANCES[1]:
        return None
    # Four times the rounding error of a sum of this many squares.
    slack = found * (z.shape[2] + 8) * torch.finfo(torch.float32).eps
    values = distances.numpy()
    below = int(np.count_nonzero(values < found - slack))
    near = np.flatnonzero((values >= found - slack) & (values <= found + slack))
    if len(near) * z.shape[2] > _MAX_RECOMPUTED:
        return None
    n = z.shape[1]
    item, pair = np.divmod(near, n * (n - 1) // 2)
    # The number of pairs of row i with later rows, and the index of the first of them.
    counts = np.arange(n - 1, 0, -1)
    starts = np.cumsum(counts) - counts
    i = np.searchsorted(starts, pair, side="right") - 1
    j = pair - starts[i] + i + 1
    return _kth_smallest((z[item, i].double() - z[item, j].double()).square().sum(1), rank - below)


def _sweep(z: Tensor, low: float, high: float, generator: torch.Generator) -> tuple[int, int, Tensor]:
    """How many d² are below `low`, how many lie in [low, high], and these values, or a random part of them if there are too many."""
    below, inside, share, held = 0, 0, 1.0, 0
    kept: list[Tensor] = []
    for d2 in _squared_distances(z):
        count, found = _within(d2, low, high)
        below += count
        inside += len(found)
        kept.append(_thin(found, share, generator))
        held += len(kept[-1])
        while held > CAPACITY:
            share /= 2
            kept = [_thin(torch.cat(kept), 0.5, generator)]
            held = len(kept[0])
    return below, inside, torch.cat(kept)


def _within(d2: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many values are below `low`, and the values in [low, high]."""
    if low <= 0 and high == torch.inf:
        return 0, d2.flatten().clone()
    # numpy compares and selects eight times faster than PyTorch.
    values = d2.numpy()
    under = values < low
    return int(np.count_nonzero(under)), torch.from_numpy(values[(values <= high) ^ under])


def _kth_smallest(values: Tensor, rank: int) -> Tensor:
    """The value of this rank, counted from 0, in the last dimension; by numpy, which is several times faster than PyTorch."""
    return torch.from_numpy(np.partition(values.numpy(), rank))[..., rank]


def _thin(values: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if share == 1:
        return values
    return values[torch.rand(len(values), device="cpu", generator=generator) < share]


def _bracket(sample: Tensor, fraction: float, low: float, high: float) -> tuple[float, float]:
    """Bounds of the quantile, four standard deviations of its rank to each side: about one sample in ten thousand misses it."""
    count = len(sample)
    ordered = sample.sort().values
    margin = 4 * (fraction * (1 - fraction) * count) ** 0.5 + 4
    first, last = int(fraction * count - margin), int(fraction * count + margin) + 1
    return (float(ordered[first]) if first >= 0 else low, float(ordered[last]) if last < count else high)


def _squared_distances(z: Tensor) -> Iterator[Tensor]:
    """d² of all pairs i < j within the items of z (items, rows, D), tile by tile. Each tile reuses the memory of the last one."""
    buffer = z.new_empty(min(_TILE, z.shape[1]) ** 2)
    for rows in z:
        # Sorted by norm, so that outliers share tiles.
        norm, order = rows.square().sum(1, keepdim=True).sort(0)
        rows, one = rows[order[:, 0]], torch.ones_like(norm)
        left, right = torch.cat([-2 * rows, norm, one], 1), torch.cat([rows, one, norm], 1).T.contiguous()
        tiles = [slice(start, min(start + _TILE, len(rows))) for start in range(0, len(rows), _TILE)]
        largest = norm[[tile.stop - 1 for tile in tiles], 0].tolist()
        for (i, most), (j, more) in itertools.combinations_with_replacement(zip(tiles, largest, strict=True), 2):
            a, b = left[i], right[:, j]
            d2 = torch.mm(a, b, out=buffer[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1]))
            if i == j:
                d2.fill_diagonal_(torch.inf)
            # Products of close pairs far from the origin cancel: their tile is computed by differences.
            if float(d2.amin()) < _CANCELLED * (most + more):
                d2 = torch.cdist(rows[i], rows[j], compute_mode="donot_use_mm_for_euclid_dist").square_()
            yield d2[tuple(torch.triu_indices(row=len(d2), col=len(d2), offset=1, device="cpu"))] if i == j else d2


def _random_squared_distances(z: Tensor, pairs: int, generator: torch.Generator | None, self_pairs: bool) -> Tensor:
    """d² of pairs of rows of z (items, rows, D), drawn with replacement."""
    z = z.double()
    items, n, dim = z.shape
    block = max(_BLOCK // dim, 1)

    def draw(below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), device=z.device, generator=generator)

    parts = []
    for count in [block] * (pairs // block) + [pairs % block]:
        item, i, j = draw(items, count), draw(n, count), draw(n if self_pairs else n - 1, count)
        if not self_pairs:
            j = j + (j >= i)
        parts.append((z[item, i] - z[item, j]).square().sum(1))
    return torch.cat(parts)
