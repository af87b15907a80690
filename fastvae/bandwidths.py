"""Bandwidths from the data: the rules that `bandwidth="median"` and `bandwidth="mean"` name, without an array of all pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastvae import checks
from fastvae.devices import float64_on_cpu

# Squared distances kept at once by an exact selection (128 MiB).
CAPACITY = 1 << 24
# Up to so many pairs all are kept. Of more, one in _SHARE, but no more than _SAMPLE, is drawn to tell where to look.
_ALL, _SHARE, _SAMPLE = 1 << 17, 512, 1 << 18
# Features of which differences, of few rows, take less time than tiles of products.
_FEW_FEATURES = 32
# Of fewer pairs the distances in float64 take no longer than to choose between them.
_FEW = 1 << 12
# Features from which float32 differences are vectors, the distances that are numbers of float32 with their squares, and how many numbers
# of pairs near the one of a rank are few.
_VECTOR, _DISTANCES, _NEAR_NUMBERS = 8, (1e-15, 1e15), 1 << 16
# Rows of a tile of float64 distances, which is to stay in the second-level cache.
_TILE = 256
# Of ‖x‖² + ‖y‖² − 2x·y below this share of the norms fewer than eight digits are left in float64.
_NEAR = 1e-7
# Numbers of a block of differences.
_BLOCK = 1 << 22


@float64_on_cpu
def median_bandwidth(
    x: Tensor, y: Tensor | None = None, *, self_pairs: bool = False, pairs: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """h = √(½·median d²) over the pairs i < j of the rows of x and y together, which makes exp(−d²/2h²) = 1/e at the median.

    Exact, in memory O((N + M)·D), in the time of about one sweep over all pairs; or of some random pairs. Of an even number of pairs the
    median is the lower of the two in the middle, as with `torch.median`; `numpy.median` takes their mean. On a GPU it is found in three
    sweeps by differences in float64, which is slow on a GPU made for graphics, and the call does not wait for it.

    Args:
        x: (..., N, D), floating point. With batch dimensions the pairs within all items are taken together: one bandwidth a call.
        y: (..., M, D), same batch dimensions, dtype and device as x; None for the pairs of x alone.
        self_pairs: take the median over all n² entries of the matrix of distances, its diagonal of zeros included.
        pairs: how many pairs, drawn at random with replacement, to take in place of all.
        generator: where the random pairs are drawn from; on the device of x.

    Returns:
        A float64 scalar in the units of the data, on the device of x, detached. nan if an input holds a nan or an infinity.

    Raises:
        TypeError, ValueError: x or y as in `fastvae.mmd`; fewer than two rows in all; pairs less than one; a median of 0, as of data that
            are mostly duplicates, where it can be read without waiting (elsewhere it is nan).

    Source: Gretton et al. 2012, "A kernel two-sample test", section 8; the convention is that of alibi-detect's `sigma_median`.
    """
    z = pooled(x, y)
    n = z.shape[1]
    total = z.shape[0] * (n * (n - 1) // 2)
    if pairs is None:
        rank = (total - 1) // 2
        if self_pairs:
            # Of the sorted n² entries the diagonal comes first, and then each pair twice.
            rank = max(((2 * total + z.shape[0] * n - 1) // 2 - z.shape[0] * n) // 2, -1)
        squared = ranked_squared_distance(z, rank)
    else:
        checks.integer("pairs", pairs, at_least=1)
        drawn = _random_squared_distances(z, pairs, generator, self_pairs)
        squared = _ranked(drawn, (pairs - 1) // 2)
    return checks.positive_distance("median", (0.5 * squared).sqrt())


@float64_on_cpu
def mean_bandwidth(x: Tensor, y: Tensor | None = None, *, self_pairs: bool = False) -> Tensor:
    """h = √(½·mean d²) over the pairs i ≠ j of the rows of x and y together, in closed form, in O((N + M)·D).

    With n rows and their mean c, Σ_{i≠j} d² = 2n·Σ_i ‖z_i − c‖². On a GPU the call does not wait.

    Args:
        x: (..., N, D), floating point. With batch dimensions the pairs within all items are taken together: one bandwidth a call.
        y: (..., M, D), same batch dimensions, dtype and device as x; None for the pairs of x alone.
        self_pairs: divide by n², as over all entries of the matrix of distances, not by n² − n.

    Returns:
        A float64 scalar in the units of the data, on the device of x, detached. nan if an input holds a nan or an infinity.

    Raises:
        TypeError, ValueError: x or y as in `fastvae.mmd`; fewer than two rows in all; a mean of 0, where it can be read without waiting.

    Source: Long et al. 2015, "Learning transferable features with deep adaptation networks", section 4, with n²; alibi-detect's
    `sigma_mean`, with n² − n.
    """
    z = _centred(pooled(x, y))
    n = z.shape[1]
    return checks.positive_distance("mean", (z.square().sum((1, 2)).mean() / (n if self_pairs else n - 1)).sqrt())


def resolve(rule: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The bandwidth of a rule by name, as a vector of one."""
    return {"median": median_bandwidth, "mean": mean_bandwidth}[rule](x, y).reshape(1)


def pooled(x: Tensor, y: Tensor | None) -> Tensor:
    """The rows of x and y together, (items, rows, D), detached."""
    checks.points("x", x, batched=True)
    z = x
    if y is not None:
        checks.points("y", y, batched=True)
        checks.same_features("x", x, "y", y)
        checks.same_batch("x", x, "y", y)
        checks.same_kind("x", x, "y", y)
        z = torch.cat([x, y], -2)
    checks.enough_pairs(z)
    return z.detach().reshape(-1, *z.shape[-2:])


@torch.library.custom_op("fastvae::ranked_squared_distance", mutates_args=(), schema="(Tensor z, SymInt rank) -> Tensor")
def _ranked_op(*args: Any) -> Tensor:
    return _select(*args)


@_ranked_op.register_kernel("cuda")
def _select_on_gpu(z: Tensor, rank: int) -> Tensor:
    """The bits of the answer, from three histograms of all pairs; nothing that the host does depends on them."""
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
        # None of rows that are not finite need be counted.
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
    if z.device.type == "cpu" and not checks.needs_dispatcher(z):
        return _select(z, rank)
    return cast(Tensor, _ranked_op(z, rank))


def _select(z: Tensor, rank: int) -> Tensor:
    """One sweep counts what is below a bracket, which random pairs suggest, and keeps what is inside it."""
    n, dim = z.shape[1:]
    if not bool(z.isfinite().all()):
        return z.new_full((), torch.nan, dtype=torch.float64)
    if rank < 0:
        return z.new_zeros((), dtype=torch.float64)
    total = z.shape[0] * (n * (n - 1) // 2)
    if z.dtype != torch.float64 and dim >= _VECTOR and _FEW <= total <= _ALL and (found := _select_near(z.float(), rank)) is not None:
        return found
    z = z.double()
    if dim <= _FEW_FEATURES and z.shape[0] * n * n <= _ALL:
        # Rows are at zero distance from themselves, and each pair is there twice.
        distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        return _least(distances.view(-1), z.shape[0] * n + 2 * rank).square()
    # Not the mean, which one far row moves away from all the others.
    z = z - _least(z.mT, (n - 1) // 2)[:, None]
    # Of its own, as the result depends on no random number.
    generator = torch.Generator("cpu").manual_seed(0)
    low, high = 0.0, torch.inf
    if total > _ALL:
        sample = _random_squared_distances(z, min(total // _SHARE, _SAMPLE), generator, False)
        low, high = _bracket(sample, rank / total, low, high)
    while True:
        below, inside, kept = _sweep(z, low, high, generator)
        if below > rank:
            low, high = 0.0, low
        elif below + inside <= rank:
            low, high = high, torch.inf
        elif inside == len(kept):
            return _least(kept, rank - below)
        elif bool(kept.min() == kept.max()):
            return kept[0]
        else:
            low, high = _bracket(kept, (rank - below) / inside, low, high)


def _select_near(z: Tensor, rank: int) -> Tensor | None:
    """In float64 only the pairs that float32 puts near the one of this rank; None if they are many, or their squares no float32."""
    distances = torch.cat([torch.pdist(rows) for rows in z])
    found = float(_least(distances, rank))
    if not _DISTANCES[0] < found < _DISTANCES[1]:
        return None
    # Four times what sums of so many squares are rounded by.
    slack = found * (z.shape[2] + 8) * torch.finfo(torch.float32).eps
    values = distances.numpy()
    below = int(np.count_nonzero(values < found - slack))
    near = np.flatnonzero((values >= found - slack) & (values <= found + slack))
    if len(near) * z.shape[2] > _NEAR_NUMBERS:
        return None
    n = z.shape[1]
    item, pair = np.divmod(near, n * (n - 1) // 2)
    # Pairs of row i with later ones, and of the rows before it.
    counts = np.arange(n - 1, 0, -1)
    starts = np.cumsum(counts) - counts
    i = np.searchsorted(starts, pair, side="right") - 1
    j = pair - starts[i] + i + 1
    return _least((z[item, i].double() - z[item, j].double()).square().sum(1), rank - below)


def _sweep(z: Tensor, low: float, high: float, generator: torch.Generator) -> tuple[int, int, Tensor]:
    """How many d² are below `low` and how many from it to `high`, and those, or a random part of them where they are too many."""
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
    """How many values are below `low`, and those from it to `high`."""
    if low <= 0 and high == torch.inf:
        return 0, d2.flatten().clone()
    # numpy compares and selects eight times faster than PyTorch does.
    values = d2.numpy()
    under = values < low
    return int(np.count_nonzero(under)), torch.from_numpy(values[(values <= high) ^ under])


def _least(values: Tensor, rank: int) -> Tensor:
    """Of this rank, from 0, in the last dimension, which numpy finds several times faster than PyTorch."""
    return torch.from_numpy(np.partition(values.numpy(), rank))[..., rank]


def _thin(values: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if share == 1:
        return values
    return values[torch.rand(len(values), device="cpu", generator=generator) < share]


def _bracket(sample: Tensor, fraction: float, low: float, high: float) -> tuple[float, float]:
    """Where the quantile lies but for one in ten thousand samples: four standard deviations of its rank to each side."""
    count = len(sample)
    ordered = sample.sort().values
    margin = 4 * (fraction * (1 - fraction) * count) ** 0.5 + 4
    first, last = int(fraction * count - margin), int(fraction * count + margin) + 1
    return (float(ordered[first]) if first >= 0 else low, float(ordered[last]) if last < count else high)


def _squared_distances(z: Tensor) -> Iterator[Tensor]:
    """d² of all pairs i < j within the items of z (items, rows, D), a tile in each; the next one reuses its memory."""
    buffer = z.new_empty(min(_TILE, z.shape[1]) ** 2)
    for rows in z:
        # In the order of their norms, so that far rows share tiles.
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
            # A d² so small beside the norms has lost its digits: duplicates, or near pairs that are far from the others.
            if float(d2.amin()) < _NEAR * (most + more):
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


def _ranked(values: Tensor, rank: int) -> Tensor:
    """The value of this rank, from 0. On a GPU `kthvalue` is no deterministic algorithm."""
    return values.kthvalue(rank + 1).values if values.device.type == "cpu" else values.sort().values[rank]


def _centred(z: Tensor) -> Tensor:
    """z in float64 less the mean of each item, in two steps: the mean of what is far from the origin is itself rounded."""
    z = z.double()
    z = z - z.mean(1, keepdim=True)
    return z - z.mean(1, keepdim=True)
