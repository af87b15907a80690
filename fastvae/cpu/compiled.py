"""The sums of MMD² over all pairs of rows, in loops that `torch.compile` makes of distance, kernel and sums at once.

For RBF kernels of one bandwidth or of a ladder by squaring. Of few features distances are differences, and nothing of a pair is stored but
in tiles on the diagonal; of more features they are the products of the plain path, whose all else is. A block is some rows against some
columns, few enough for memory even if the compiler stored one number a pair.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastvae.cpu import mmd
from fastvae.cpu.tiles import Exponentials, Points, Profile
from fastvae.kernel_sums import KernelSum
from fastvae.radial import RBF

_ROWS, _COLUMNS, _TILE = 4096, 2048, 512

# Features up to which differences are faster than products, and rows of a sample under which calls cost more than what loops save.
_FEW = 8
_FEWEST_ROWS = 1024

# Rows and columns of a first call, from which the compiler takes what is worth a thread. Equal sizes would be taken for one.
_FIRST = (509, 2039)

# What every k is at least, on the diagonal too: of numbers next to nothing the processor takes ten times as long.
_LEAST = 2.0**-100

Compiled = Callable[..., Any]
State = tuple[object, ...]


@dataclass
class Rows(Points):
    """One sample as the compiled loops read it."""

    columns: Tensor | None  # (D, N), of few features
    pulls: Tensor | None  # (D, N): of each row Σ_j w_j·W_ij·(x_i − y_j)


class Sweep(mmd.Sweep):
    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor) -> None:
        super().__init__(kernel, samples, centre)
        # Of other kernels, and of bandwidths that are not squares of one another, the compiler stores what it makes on the way.
        self._fuses = (
            isinstance(self.kernel, RBF) and all(self.host_sum.squarings[1:]) and min(map(len, samples)) >= _FEWEST_ROWS and _compiles()
        )
        self._few = self._raw = False
        if self._fuses and samples[0].shape[-1] <= _FEW:
            reach = max(float((z - self.centre).abs().max()) for z in samples)
            # What the compiled exponential adds to far pairs a farther one would pull back with.
            self._few = reach * self.scale < 2.0**40
            self._raw = self._few and samples[0].dtype != self.dtype and self._differs_enough(samples, reach)
        self._dtype = samples[0].dtype if self._raw else self.dtype
        self._scale = 1.0 if self._raw else self.scale * 0.5**0.5
        new, ratios, weights = functools.partial(torch.tensor, dtype=self._dtype), self.host_sum.ratios, self.host_sum.weights
        self._factors = new(ratios), new(weights), new([a * r for a, r in zip(weights, ratios, strict=True)])
        # Of squared raw differences the exponents, in two parts: rounded it would be another bandwidth than that of a prior.
        unit = -0.5 * self.scale**2
        self._unit = new([unit, unit - float(new(unit))])

    def _differs_enough(self, samples: Sequence[Tensor], reach: float) -> bool:
        """Whether differences of float32 samples as they are do for sums of which products would need float64: of a narrow bandwidth, but
        not of a few outliers to a wide one, whose k near one needs more than float32."""
        typical = min(float((z - self.centre).square().sum(1).median()) for z in samples)
        return self.host_sum.gamma * typical > 0.1 and max(reach, self.scale, 1 / self.scale) < 1e15

    def points(self, z: Tensor, weights: Tensor | None, gradient: bool, tiles: list[slice] | None = None) -> Rows:
        if not self._few:
            return Rows(**vars(super().points(z, weights, gradient, tiles)), columns=None, pulls=None)
        points = super().points(z, weights, gradient, _parts(slice(0, z.shape[0]), _TILE))
        columns = _copy(z.T if self._raw else (self.centred(z).double() * self._scale).T.to(self._dtype))
        return Rows(**vars(points), columns=columns, pulls=torch.zeros_like(columns) if gradient else None)

    @torch.no_grad()
    def within(self, a: Rows, scale: float) -> Any:  # type: ignore[override]
        if not self._few:
            return super().within(a, scale)
        total = self._halves(a, a.tiles, scale)
        self._shifted_moments(a, a, scale)
        return total

    @torch.no_grad()
    def across(self, a: Rows, b: Rows, scale: float) -> Any:  # type: ignore[override]
        if not self._few:
            return super().across(a, b, scale)
        rows, columns = (b, a) if a.pulls is None else (a, b)
        total = self._rows(rows, slice(0, len(rows)), columns, slice(0, len(columns)), scale)
        if a.pulls is not None and b.pulls is not None:
            self._rows(b, slice(0, len(b)), a, slice(0, len(a)), scale)
        self._shifted_moments(a, b, scale)
        self._shifted_moments(b, a, scale)
        return total

    def pull(self, a: Rows) -> Tensor:  # type: ignore[override]
        pull = super().pull(a)
        return pull if a.pulls is None else pull + a.pulls.T / self._scale

    def _halves(self, a: Rows, tiles: list[slice], scale: float) -> float:
        """Σ w·w·k over all pairs of rows in the tiles. Loops over differences know of no diagonal: pairs in one tile are from products."""
        if len(tiles) == 1:
            return float(self._tile(a, tiles[0], a, tiles[0], scale))
        half = len(tiles) // 2
        first, second = (slice(part[0].start, part[-1].stop) for part in (tiles[:half], tiles[half:]))
        # Of two rows the value once, and the pull on either.
        total = 2 * self._rows(a, first, a, second, scale)
        if a.pulls is not None:
            self._rows(a, second, a, first, scale)
        return total + self._halves(a, tiles[:half], scale) + self._halves(a, tiles[half:], scale)

    def _rows(self, a: Rows, rows: slice, b: Rows, columns: slice, scale: float) -> float:
        """Σ w·w·k over rows of a and columns of b that have no row in common; the pull on the rows is added on the way."""
        total = 0.0
        for i, j in itertools.product(_parts(rows, _ROWS), _parts(columns, _COLUMNS)):
            assert a.columns is not None
            assert b.columns is not None
            weights = None if b.uniform else _copy(b.weights[j].to(self._dtype))
            block = _of_points(_state(), self.profile, a.columns.shape[0], not b.uniform, self._raw, a.pulls is not None, self._dtype)
            # Of views the compiler would tell those at the start of their storage from others.
            sums, pulls = block(_copy(a.columns[:, i]), _copy(b.columns[:, j]), weights, self._unit, *self._factors)
            if a.pulls is not None:
                a.pulls[:, i].add_(pulls, alpha=scale / len(b) if b.uniform else scale)
            total += _weighted(sums, a, i, b)
        return total

    def _tile(self, a: Points, i: slice, b: Points, j: slice, scale: float) -> Any:
        diagonal = a is b and i == j
        # Of one RBF kernel the uncompiled operations on a tile are as fast. But the two exponentials err by different means, which would
        # not cancel between samples of one law.
        compiled = self._fuses and not self._raw and (self._few or not self.single)
        if not compiled or (diagonal and any(self.profile.shifts)):
            return super()._tile(a, i, b, j, scale)
        weights = None if b.uniform else b.weights[j].clone()
        tile = self._exponent(a, i, b, j)
        if diagonal:
            tile.fill_diagonal_(-torch.inf)
        sums, _ = _of_exponents(_state(), self.profile, not b.uniform, self.dtype)(tile, weights, *self._factors)
        self.add_moments(tile, a, i, b, j, scale)
        return _weighted(sums, a, i, b)


def _weighted(sums: Tensor, a: Points, i: slice, b: Points) -> float:
    """Σ_i w_i·sums_i over rows of a, where the equal weights of b are left out of the sums."""
    exact = sums.double()
    total = float(exact.sum()) / len(a) if a.uniform else float(exact @ a.weights[i].double())
    return total / len(b) if b.uniform else total


def _compiles() -> bool:
    """Whether `torch.compile` does, which a user can switch off: operation by operation a block would be stored many times."""
    from torch._dynamo import config, eval_frame

    stance = getattr(eval_frame, "_stance", None)
    return not config.disable and getattr(stance, "stance", "default") == "default"


def _state() -> State:
    """What the compiler makes code for; each has its own, as one function's code has room for eight."""
    return (
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _parts(rows: slice, most: int) -> list[slice]:
    count = rows.stop - rows.start
    parts = -(-count // most)
    return [slice(rows.start + count * n // parts, rows.start + count * (n + 1) // parts) for n in range(parts)]


def _sums(
    profile: Profile, exponent: Tensor, weights: Tensor | None, ratios: Tensor, values: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """w_j·Σ_b a_b·k_b and w_j·Σ_b a_b·(γ_b/γ_0)·s_b of each pair, from its exponent."""
    count = len(profile.squarings)
    value = exponent.clone() if count > 1 else exponent
    total = slope_total = exponent
    for n in range(count):
        slope = profile.evaluate(n, ratios[n] if n else 1.0, exponent, value, None, _EXPONENTIALS)
        total = values[n] * value + total if n else values[n] * value
        slope_total = slopes[n] * slope + slope_total if n else slopes[n] * slope
    return (total, slope_total) if weights is None else (total * weights, slope_total * weights)


def _exp2_(t: Tensor) -> Tensor:
    if t.dtype != torch.float32:
        return t.exp2_()
    power, fraction, series = _split(t)
    return t.copy_(power * (series * fraction + 1.0))


def _square_(t: Tensor) -> Tensor:
    return t.copy_(t * t + _LEAST) if t.dtype == torch.float32 else t.square_()


def _expm1_(t: Tensor) -> Tensor:
    # What the compiler makes of expm1 is exp − 1.
    if t.dtype != torch.float32:
        power = t.exp()
        near = torch.where(power == 1, t, (power - 1) * t / power.log())
        return t.copy_(torch.where(power < 0.5, power - 1, near))
    # log₂e in two parts: rounded it would be another bandwidth.
    power, fraction, series = _split(t * 1.4426950 + t * 1.9259630e-8)
    return t.copy_(power * (series * fraction) + (power - 1))


def _split(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^n, f with |f| ≤ ½, and s for 2^t = 2^n·(1 + f·s). A call of the C library would keep a loop's sums out of the registers."""
    t = t.clamp(min=-100.0)
    n = t.round()
    f = t - n
    # In numbers of single precision: before rounding its relative error is at most 3e-9, and its mean 3e-12, which squarings multiply.
    # Numbers with a name would be loaded for each pair.
    series = 1.532731403e-4 * f + 1.339114038e-3
    series = series * f + 9.618503973e-3
    series = series * f + 5.550359190e-2
    series = series * f + 2.402264774e-1
    # The bits of 2^n are a whole number, which single precision holds; the compiler stores and loads what it takes for another type.
    power = (n * 2.0**23 + 127 * 2.0**23).to(torch.int32).view(torch.float32)
    return power, f, series * f + 6.931471825e-1


_EXPONENTIALS = Exponentials(_exp2_, _expm1_, _square_)


@functools.cache
def _of_points(state: State, profile: Profile, dim: int, weighted: bool, raw: bool, gradient: bool, dtype: torch.dtype) -> Compiled:
    """Of rows (D, R) and columns (D, C) with weights (C,): Σ_j w_j·k_ij (R,), and Σ_j w_j·W_ij·(x_i − y_j) (D, R)."""

    def block(rows: Tensor, columns: Tensor, weights: Tensor | None, unit: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        arms = [rows[d, :, None] - columns[d] for d in range(dim)]
        squares = functools.reduce(lambda squares, arm: squares + arm * arm, arms[1:], arms[0] * arms[0])
        exponent = squares * unit[0] + squares * unit[1] if raw else -squares
        total, slope = _sums(profile, exponent, weights, *factors)
        return total.sum(1), torch.stack([(slope * arm).sum(1) for arm in arms]) if gradient else rows

    rows, columns = (torch.zeros(dim, dim + n, dtype=dtype) for n in _FIRST)
    return _compile(block, profile, rows, columns, columns[0].clone() if weighted else None, rows.new_ones(2))


@functools.cache
def _of_exponents(state: State, profile: Profile, weighted: bool, dtype: torch.dtype) -> Compiled:
    """Of exponents (R, C) and the columns' weights (C,): Σ_j w_j·k_ij (R,) and its summands, and in the exponents' place W_ij."""

    def tile(exponent: Tensor, weights: Tensor | None, *factors: Tensor) -> tuple[Tensor, Tensor]:
        total, slope = _sums(profile, exponent, None, *factors)
        exponent.copy_(slope)
        total = total if weights is None else total * weights
        # The summands are not wanted, but the loop that sums them would make them again.
        return total.sum(1), total

    exponent = torch.zeros(_FIRST, dtype=dtype)
    return _compile(tile, profile, exponent, exponent[0].clone() if weighted else None)


def _compile(function: Compiled, profile: Profile, *first: Tensor | None) -> Compiled:
    # Functions of one code share the compiler's memory of it, which holds eight.
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    from torch._inductor import config

    # Multiply-adds in one instruction; older versions of PyTorch have a switch with two positions.
    fused: Any = "fast" if isinstance(config.cpp.enable_floating_point_contract_flag, str) else True
    options = {"cpp.enable_floating_point_contract_flag": fused}
    compiled = torch.compile(own, dynamic=True, fullgraph=True, options=options)
    assert first[0] is not None
    try:
        compiled(*first, *(torch.ones(len(profile.squarings), dtype=first[0].dtype) for _ in range(3)))
    except Exception as error:
        if "CxxCompiler" not in f"{error!r}{error.__cause__!r}":
            raise
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = lines[0] if lines else type(error).__name__
        raise RuntimeError(f"backend='inductor' must have a C++ compiler that torch.compile can use, got {reason}") from error
    return compiled
