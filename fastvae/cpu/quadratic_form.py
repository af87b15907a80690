"""Quadratic forms of a kernel matrix and their gradient, tile by tile. Formulas (1) and (2) of `fastvae.reference.quadratic_form`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.cpu.products import LINEAR_MULTIPLE
from fastvae.cpu.tiles import Tiles, most_rows, tiles_of
from fastvae.kernel_sums import KernelSum

# A group with fewer rows than this share of a tile shares its tile with its neighbours.
_OWN_TILE = 1 / 4
# Products are slower by a quarter where the number of rows is no multiple of the processor's vectors, and fastest where it is a multiple of
# `LINEAR_MULTIPLE`, to which a group is padded if that adds at most this share of rows.
_VECTOR_MULTIPLE = 16
_MOST_PADDING = 1 / 8
# A few rows more than a tile are cheaper in one larger tile than in a tile of their own.
_LARGEST_TILE = 9 / 8


def quadratic_form(
    kernel: KernelSum,
    z: Tensor,
    v: Tensor,
    centre: Tensor,
    upstream: Tensor | None,
    values: bool = True,
    diagonal: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S (C, C), or its diagonal (C,), in float64, for z (N, D) and v (N, C), and with an upstream (C, C) the row gradient of z (N, D).

    Both lack the constants that `kernel` subtracts. The row gradient is that of `Tiles` with (v_i·B·v_jᵀ)·W_ij in place of w_j·W_ij.
    `progress` is called with the fraction done.
    """
    tiles = Tiles(kernel, [z], centre)
    v = v.to(tiles.dtype)
    group, order = _groups(v) or (None, None)
    rows, source = (tiles_of(len(v)), None) if group is None or order is None else _rows(group, order)
    points = z
    if source is not None:
        # Padding is at the centre, with a weight of zero.
        kept = source >= 0
        points = torch.where(kept[:, None], z[source], centre)
        v = v[source] * kept[:, None]
    # Where each row belongs to one group, its weight is part of its moments, and a tile of two groups has a single coefficient.
    row_weights = torch.ones_like(v[:, 0]) if group is None else v.sum(1)
    a = tiles.prepare(points, row_weights, upstream is not None, rows)
    used = [_used(v[i]) for i in rows]
    # For each tile its rows of v as contiguous columns, without those that are all zero.
    columns = [v[i, c].T.contiguous() for i, c in zip(rows, used, strict=True)]
    # Where that is one column, as a vector.
    single = [None if group is None or c.shape[0] != 1 else c[0] for c in columns]
    total = z.new_zeros(v.shape[1] if diagonal else v.shape[1:] * 2, dtype=torch.float64)
    b = None if upstream is None else (upstream + upstream.T).to(v)
    numbers = None if b is None else b.tolist()
    for n, i in enumerate(rows):
        groups: list[int] = []
        products: list[Tensor] = []
        for m, j in enumerate(rows[n:], n):
            k, slope = tiles.sums(a, i, a, j, slope=upstream is not None)
            c, d = used[n], used[m]
            if values and diagonal:
                total[d] += (v[i, d] * _product(k, columns[m])).sum(0, dtype=torch.float64) * (1 if n == m else 2)
            elif values and single[n] is not None and (right_weights := single[m]) is not None:
                groups.append(d.start)
                products.append(k.mv(right_weights * 0.5 if n == m else right_weights))
            elif values:
                block = columns[n] @ _product(k, columns[m])
                total[c, d] += block * (0.5 if n == m else 1)
            if numbers is not None and single[n] is not None and single[m] is not None:
                tiles.add_moments(slope, a, i, a, j, numbers[c.start][d.start])
            elif b is not None:
                left, right = (columns[n], columns[m]) if group is None else (columns[n].ne(0).to(b), columns[m].ne(0).to(b))
                slope.mul_(tiles.product("coefficient", left.T @ b[c, d], right))
                tiles.add_moments(slope, a, i, a, j, 1.0)
        if products and (left_weights := single[n]) is not None:
            # For a row of tiles at once: one at a time they would take as long as the products.
            sums = (torch.stack(products) @ left_weights).double()
            total[used[n].start].index_add_(0, torch.tensor(groups, device=sums.device), sums)
        if progress is not None:
            # Only tiles right of the diagonal are taken, of which the first rows have most.
            left_over = len(rows) - n - 1
            progress(1 - left_over * (left_over + 1) / (len(rows) * (len(rows) + 1)))
    if not diagonal:
        total += total.T.clone()
    if upstream is None:
        return total, None
    gradient = tiles.row_gradient(a) * row_weights[:, None].to(z.dtype)
    return total, gradient if source is None else torch.empty_like(z).index_copy_(0, source[kept], gradient[kept])


def pair_weights(v: Tensor, diagonal: bool = False) -> Tensor:
    """Σ_{i≠j} v_ic·v_jd (C, C), or its diagonal (C,), in float64: how much a constant in each pair adds to S."""
    exact = v.double()
    column_sums = exact.sum(0)
    if diagonal:
        return column_sums.square() - exact.square().sum(0)
    return column_sums[:, None] * column_sums - exact.T @ exact


def _product(k: Tensor, v_t: Tensor) -> Tensor:
    """k @ v_tᵀ."""
    return torch.mv(k, v_t[0])[:, None] if v_t.shape[0] == 1 else k @ v_t.T


def _used(v: Tensor) -> slice:
    """From the first column to the last that is not all zero."""
    used = v.ne(0).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


def _groups(v: Tensor) -> tuple[Tensor, Tensor] | None:
    """The group of each row, sorted, and the rows in that order. None if a row has a weight in several groups."""
    used = v.ne(0)
    if bool((used.sum(1) > 1).any()):
        return None
    group, order = used.to(torch.int8).argmax(1).sort(stable=True)
    return group, order


def _rows(group: Tensor, order: Tensor) -> tuple[list[slice], Tensor]:
    """Tiles of rows sorted by group, in which larger groups have tiles of their own, and the row at each place, −1 for padding."""
    counts, starts, start, end = [], [0], 0, 0
    own, largest = (int(share * most_rows()) for share in (_OWN_TILE, _LARGEST_TILE))
    for size in group.bincount().tolist():
        if size >= own:
            counts += [i.stop - i.start for i in tiles_of(end, start)]
            parts = -(-size // largest)
            counts += [size * (n + 1) // parts - size * n // parts for n in range(parts)]
            start = end + size
        end += size
    counts += [i.stop - i.start for i in tiles_of(len(group), start)]
    places, first = [], 0
    for count in counts:
        padding = -count % LINEAR_MULTIPLE
        if padding > _MOST_PADDING * count:
            padding = -count % _VECTOR_MULTIPLE
        places.append(torch.nn.functional.pad(order[first : first + count], (0, padding), value=-1))
        starts.append(starts[-1] + len(places[-1]))
        first += count
    return [slice(*ends) for ends in itertools.pairwise(starts)], torch.cat(places)
