"""Quadratic forms of a kernel matrix and their gradient, tile by tile: formulas (1) and (2) of `fastvae.reference.quadratic_form`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.cpu.tiles import TILE, Points, Tiles, tiles_of
from fastvae.radial import KernelSum

# Rows of a group under which it shares its tile with its neighbours.
_OWN_TILE = TILE // 4
# A few rows past a tile are cheaper in it than in a tile of their own.
_LARGEST_TILE = TILE * 9 // 8


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

    k stands for k − shift·φ(0). The pull is that of `fastvae.radial.Sweep` with w_j·W_ij replaced by (v_i·B·v_jᵀ)·W_ij. `progress` is
    called with the fraction done.
    """
    tiles = Tiles(kernel, [z], centre)
    v = v.to(tiles.dtype)
    rows = _rows(v)
    a = tiles.points(z, z.new_ones(z.shape[0]), upstream is not None, rows)
    used = [_used(v[i]) for i in rows]
    # For each tile its rows of v as contiguous columns, those that are not all zero.
    columns = [v[i, c].T.contiguous() for i, c in zip(rows, used, strict=True)]
    total = z.new_zeros(v.shape[1] if diagonal else v.shape[1:] * 2, dtype=torch.float64)
    b = None if upstream is None else (upstream + upstream.T).to(v)
    for n, i in enumerate(rows):
        for m, j in enumerate(rows[n:], n):
            k, slope = tiles.sums(a, i, a, j, slope=upstream is not None)
            c, d = used[n], used[m]
            if values and diagonal:
                total[d] += (v[i, d] * _product(k, columns[m])).sum(0, dtype=torch.float64) * (1 if n == m else 2)
            elif values:
                block = columns[n] @ _product(k, columns[m])
                total[c, d] += block
                if n != m:
                    total[d, c] += block.T
            if b is not None:
                _add_pull(tiles, slope, a, i, j, columns[n].T, b[c, d], columns[m])
        if progress is not None:
            # Tiles right of the diagonal: the first rows have most of them.
            left = len(rows) - n - 1
            progress(1 - left * (left + 1) / (len(rows) * (len(rows) + 1)))
    return total, None if upstream is None else tiles.pull(a)


def _add_pull(tiles: Tiles, slope: Tensor, a: Points, i: slice, j: slice, left: Tensor, b: Tensor, right: Tensor) -> None:
    """The moments of a tile with left @ b @ right as coefficients."""
    if 1 not in b.shape:
        tiles.add_moments(slope.mul_(tiles.product("coefficient", left @ b, right)), a, i, a, j, 1.0)
        return
    # Coefficients that are a number of the row times one of the column need no tile of their own.
    rows, columns = ((left @ b)[:, 0], right[0]) if b.shape[1] == 1 else (left[:, 0], (b @ right)[0])
    assert a.moments is not None
    a.moments[:, i] += (a.weighted[:, j] * columns) @ slope.T * rows
    if i != j:
        a.moments[:, j] += (a.weighted[:, i] * rows) @ slope * columns


def _product(k: Tensor, v_t: Tensor) -> Tensor:
    """k @ v_tᵀ."""
    return torch.mv(k, v_t[0])[:, None] if v_t.shape[0] == 1 else k @ v_t.T


def _used(v: Tensor) -> slice:
    """The columns from the first to the last that is not all zero."""
    used = v.ne(0).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


def _rows(v: Tensor) -> list[slice]:
    """Tiles of rows; where rows come sorted by a group each, the larger groups have tiles of their own."""
    group = v.ne(0).to(torch.int8).argmax(1)
    if bool((v.ne(0).sum(1) > 1).any()) or bool((group.diff() < 0).any()):
        return tiles_of(v.shape[0])
    rows, start, end = [], 0, 0
    for size in group.bincount().tolist():
        if size >= _OWN_TILE:
            rows += tiles_of(end, start)
            parts = -(-size // _LARGEST_TILE)
            rows += [slice(end + size * n // parts, end + size * (n + 1) // parts) for n in range(parts)]
            start = end + size
        end += size
    return rows + tiles_of(v.shape[0], start)
