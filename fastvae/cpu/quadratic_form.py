"""Quadratic forms of a kernel matrix and their gradient, tile by tile: formulas (1) and (2) of `fastvae.reference.quadratic_form`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.cpu.tiles import LINEAR_MULTIPLE, Tiles, most_rows, tiles_of
from fastvae.kernel_sums import KernelSum

# Of a tile, the rows of a group under which it shares its tile with its neighbours.
_OWN_TILE = 1 / 4
# Products of rows that are no multiple of the processor's vectors are slower by a quarter, and those of a multiple of `LINEAR_MULTIPLE` the
# fastest, for which a group is padded by up to this share.
_MULTIPLE = 16
_PADDED = 1 / 8
# A few rows past a tile are cheaper in it than in a tile of their own.
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
    """S (C, C), or its diagonal (C,), in float64, of z (N, D) and v (N, C), and with an upstream (C, C) the pull on z (N, D).

    k stands for k − shift·φ(0). The pull is that of `fastvae.cpu.mmd.Sweep` with w_j·W_ij replaced by (v_i·B·v_jᵀ)·W_ij. `progress` is
    called with the fraction done.
    """
    tiles = Tiles(kernel, [z], centre)
    v = v.to(tiles.dtype)
    group, order = _groups(v) or (None, None)
    rows, source = (tiles_of(len(v)), None) if group is None or order is None else _rows(group, order)
    points = z
    if source is not None:
        # Padding stands where the points are seen from, with a weight of zero.
        kept = source >= 0
        points = torch.where(kept[:, None], z[source], centre)
        v = v[source] * kept[:, None]
    # Where each row is of one group its weight goes with its moments, and the coefficients of a tile of two groups are one number.
    row_weights = torch.ones_like(v[:, 0]) if group is None else v.sum(1)
    a = tiles.points(points, row_weights, upstream is not None, rows)
    used = [_used(v[i]) for i in rows]
    # For each tile its rows of v as contiguous columns, those that are not all zero.
    columns = [v[i, c].T.contiguous() for i, c in zip(rows, used, strict=True)]
    # … and where that is one column, as the vector that it is.
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
            # Of a row of tiles at once: one by one these would take as long as the products.
            sums = (torch.stack(products) @ left_weights).double()
            total[used[n].start].index_add_(0, torch.tensor(groups, device=sums.device), sums)
        if progress is not None:
            # Tiles right of the diagonal: the first rows have most of them.
            left_over = len(rows) - n - 1
            progress(1 - left_over * (left_over + 1) / (len(rows) * (len(rows) + 1)))
    if not diagonal:
        total += total.T.clone()
    if upstream is None:
        return total, None
    pull = tiles.pull(a) * row_weights[:, None].to(z.dtype)
    return total, pull if source is None else torch.empty_like(z).index_copy_(0, source[kept], pull[kept])


def _product(k: Tensor, v_t: Tensor) -> Tensor:
    """k @ v_tᵀ."""
    return torch.mv(k, v_t[0])[:, None] if v_t.shape[0] == 1 else k @ v_t.T


def _used(v: Tensor) -> slice:
    """The columns from the first to the last that is not all zero."""
    used = v.ne(0).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


def _groups(v: Tensor) -> tuple[Tensor, Tensor] | None:
    """The column of each row's one weight that is not zero, if that is all each has, sorted, and the rows in that order."""
    used = v.ne(0)
    if bool((used.sum(1) > 1).any()):
        return None
    group, order = used.to(torch.int8).argmax(1).sort(stable=True)
    return group, order


def _rows(group: Tensor, order: Tensor) -> tuple[list[slice], Tensor]:
    """Tiles of rows sorted by group, of which the larger groups have their own, and the row at each place, −1 for padding."""
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
        if padding > _PADDED * count:
            padding = -count % _MULTIPLE
        places.append(torch.nn.functional.pad(order[first : first + count], (0, padding), value=-1))
        starts.append(starts[-1] + len(places[-1]))
        first += count
    return [slice(*ends) for ends in itertools.pairwise(starts)], torch.cat(places)
