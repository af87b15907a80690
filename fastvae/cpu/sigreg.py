"""The sums of `fastvae.reference.sigreg` and their gradient, tile by tile. Numbers in brackets are formulas there.

A tile of projections takes one sine and one cosine of θ = base·p. The others follow by the recurrence f_{j+1} = 2·cos(2θ)·f_j − f_{j−1},
which holds for the odd multiples of θ and for the even ones. 2·cos(2θ) is computed as 2 − 4·sin²θ: for small θ the rounding of cos θ
would multiply the error of the gradient by ten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.dispatch import accumulation_dtype

# Projections of a tile, for each thread, and its slices.
BLOCK, SLICES = 7 << 13, 256


class Points(NamedTuple):
    """t = base·(1, 3, 5, …), `steps` of them, if `odd`; else base·(1, 2, 3, …), twice as many, in two chains of odd and even multiples."""

    base: float
    steps: int
    odd: bool

    @property
    def chains(self) -> int:
        return 1 if self.odd else 2

    def values(self, device: torch.device) -> Tensor:
        """t in float64, (steps, chains)."""
        step = 2 if self.odd else 1
        multiples = torch.arange(1, step * self.steps * self.chains + 1, step, dtype=torch.float64, device=device)
        return (self.base * multiples).view(self.steps, self.chains)


def forward(z: Tensor, directions: Tensor, points: Points) -> Tensor:
    """Σ_n cos(t·p_nk) and Σ_n sin(t·p_nk), (steps, chains, 2, B, K) in float64, for z (B, N, D) and directions (D, K)."""
    tiles = _Tiles(z, directions, points, 2)
    sums = z.new_zeros(points.steps, points.chains, 2, z.shape[0], directions.shape[1], dtype=torch.float64)
    for slices in tiles.slices():
        for problems, rows in tiles.rows():
            x, current, previous = tiles.start(problems, rows, slices)
            tiles.before(current, previous)
            out = sums[:, :, :, problems, slices]
            for j in range(points.steps):
                if j:
                    # f_j up to its sign, (−1)^⌈j/2⌉: in place, one call.
                    previous.addcmul_(x, current, value=-1.0 if j % 2 else 1.0)
                    current, previous = previous, current
                out[j].add_(current.sum(-2), alpha=1 if j % 4 in (0, 3) else -1)
    return sums


def backward(grad: Tensor, z: Tensor, directions: Tensor, points: Points) -> Tensor:
    """(3), the gradient to z (B, N, D) from that to the sums, (steps, chains, 2, B, K). By Clenshaw's recurrence, from the last point."""
    tiles = _Tiles(z, directions, points, 3)
    coefficients = angle_coefficients(grad, points).to(tiles.dtype)[:, :, :, :, None, :]
    dz = torch.zeros_like(tiles.z)
    for slices in tiles.slices():
        along = tiles.directions[:, slices].T
        for problems, rows in tiles.rows():
            x, current, later, last = tiles.start(problems, rows, slices)
            c = coefficients[:, :, :, problems, :, slices]
            later.copy_(c[-1].expand_as(later))
            last.zero_()
            for j in range(points.steps - 2, -1, -1):
                torch.sub(c[j], last, out=last).addcmul_(x, later)
                later, last = last, later
            # Σ_j c_j·f_j = f_0·b_0 − f_−1·b_1, where f_−1 is (cos θ, −sin θ) of the odd multiples and (1, 0) of the even ones.
            later[0, 0] -= last[0, 0]
            later[0, 1] += last[0, 1]
            dp = current.mul_(later).sum((0, 1))
            if points.chains == 2:
                dp -= last[1, 0]
            dz[problems, rows].flatten(0, 1).addmm_(dp.flatten(0, 1), along)
    return dz


def angle_coefficients(grad: Tensor, points: Points) -> Tensor:
    """The factors of cos(t·p) and sin(t·p) in (3)."""
    t = points.values(grad.device)[:, :, None, None]
    return torch.stack([t * grad[:, :, 1], -t * grad[:, :, 0]], 2)


class _Tiles:
    """Projections of z (B, N, D), in tiles of some rows of one problem, or of several whole problems, and some slices."""

    def __init__(self, z: Tensor, directions: Tensor, points: Points, states: int) -> None:
        self.dtype = accumulation_dtype(z.dtype)
        self.z, self.directions, self.points = z.to(self.dtype).contiguous(), directions.to(self.dtype), points
        problems, rows, _ = z.shape
        self.columns = min(directions.shape[1], SLICES)
        most = max(1, BLOCK * torch.get_num_threads() // self.columns)
        self.block = min(rows, most)
        self.problems = max(1, min(problems, most // rows))
        self.states = states
        self.buffer = self.z.new_empty((1 + 2 * points.chains * states) * self.problems * self.block * self.columns)

    def slices(self) -> Iterator[slice]:
        return _blocks(self.directions.shape[1], self.columns)

    def rows(self) -> Iterator[tuple[slice, slice]]:
        problems, rows, _ = self.z.shape
        return ((b, n) for b in _blocks(problems, self.problems) for n in _blocks(rows, self.block))

    def start(self, problems: slice, rows: slice, slices: slice) -> list[Tensor]:
        """2·cos(2θ), (problems, rows, slices); (cos, sin) of θ and, if even multiples are wanted, of 2θ, (chains, 2, problems, rows,
        slices); and room for other states of the recurrence, of the same shape."""
        z = self.z[problems, rows]
        shape = *z.shape[:2], slices.stop - slices.start
        size, chains = math.prod(shape), self.points.chains
        state = 2 * chains * size
        x = self.buffer[:size].view(shape)
        starts = range(size, size + self.states * state, state)
        current, *others = (self.buffer[start : start + state].view(chains, 2, *shape) for start in starts)
        # Not base·directions, whose rounding would turn the angles of all rows the same way: far from the origin errors would not average.
        torch.mm(z.flatten(0, 1), self.directions[:, slices], out=x.flatten(0, 1))
        x.mul_(self.points.base)
        torch.cos(x, out=current[0, 0])
        torch.sin(x, out=current[0, 1])
        if chains == 2:
            torch.mul(current[0, 0], current[0, 1], out=current[1, 1]).mul_(2)
            torch.mul(current[0, 1], current[0, 1], out=current[1, 0]).mul_(-2).add_(1)
            torch.mul(current[1, 0], 2, out=x)
        else:
            torch.mul(current[0, 1], current[0, 1], out=x).mul_(-4).add_(2)
        return [x, current, *others]

    def before(self, current: Tensor, previous: Tensor) -> None:
        """(cos, sin) of the multiples two before those of `current`: of −θ and 0."""
        previous[0, 0] = current[0, 0]
        torch.neg(current[0, 1], out=previous[0, 1])
        if self.points.chains == 2:
            previous[1, 0] = 1
            previous[1, 1] = 0


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
