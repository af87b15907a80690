"""backend="inductor": the sums of MMD² over all pairs of rows, in loops that `torch.compile` makes of distance, kernel and sums together.

It applies to RBF kernels of one bandwidth, or of several that are squares of one another. With few features distances are computed from
differences, and nothing is stored for a pair except in tiles on the diagonal. With more features they are the products of `cpu.mmd`, which
does all the rest. A block is small enough to fit in memory even if the compiler stored one number for each pair.
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

from fastvae.cpu.families import Exponentials, TileEvaluator
from fastvae.cpu.mmd import CPUSweep
from fastvae.cpu.tiles import TiledSample
from fastvae.kernel_sums import KernelSum

_ROWS, _COLUMNS, _TILE = 4096, 2048, 512

# Up to this many features differences are faster than products. With fewer rows in a sample, calls cost more than the loops save.
_MOST_FEATURES = 8
_FEWEST_ROWS = 1024

# Rows and columns of the first call, from which the compiler decides what to split among threads. It would take equal sizes for one size.
_EXAMPLE_SIZES = (509, 2039)

# Every k is at least this, on the diagonal too: denormal numbers are ten times slower.
_LEAST = 2.0**-100

Compiled = Callable[..., Any]
State = tuple[object, ...]


@dataclass
class InductorSample(TiledSample):
    """One sample, prepared for the compiled loops over differences."""

    columns: Tensor  # (D, N)
    row_gradients: Tensor | None  # (D, N): Σ_j w_j·W_ij·(x_i − y_j) for each row


class InductorSweep(CPUSweep):
    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor) -> None:
        super().__init__(kernel, samples, centre)
        # For other kernels and bandwidths the compiler would store intermediate results.
        squares = self.kernel.is_exponential and all(self.host_sum.squarings[1:])
        self._fuses = squares and min(map(len, samples)) >= _FEWEST_ROWS and _compiles()
        self._by_differences = self._of_given_rows = False
        if self._fuses and samples[0].shape[-1] <= _MOST_FEATURES:
            reach = max(float((z - self.centre).abs().max()) for z in samples)
            # The compiled exponential is never zero: the gradient of a pair farther than this would not vanish.
            self._by_differences = reach * self.scale < 2.0**40
            self._of_given_rows = self._by_differences and samples[0].dtype != self.dtype and self._differs_enough(samples, reach)
        self._dtype = samples[0].dtype if self._of_given_rows else self.dtype
        self._scale = 1.0 if self._of_given_rows else self.scale * 0.5**0.5
        new, ratios, weights = functools.partial(torch.tensor, dtype=self._dtype), self.host_sum.ratios, self.host_sum.weights
        self._factors = new(ratios), new(weights), new([a * r for a, r in zip(weights, ratios, strict=True)])
        # From squared differences of the given rows to exponents, as a sum of two numbers: rounded to one, it would be another bandwidth
        # than that of the prior's closed form.
        scale = -0.5 * self.scale**2
        self._exponent_scale = new([scale, scale - float(new(scale))])

    def _differs_enough(self, samples: Sequence[Tensor], reach: float) -> bool:
        """Whether differences of the float32 rows are accurate enough where products would need float64.

        They are for a narrow bandwidth. They are not for a wide one and a few outliers, whose k near one needs more than float32.
        """
        typical = min(float((z - self.centre).square().sum(1).median()) for z in samples)
        return self.host_sum.gamma * typical > 0.1 and max(reach, self.scale, 1 / self.scale) < 1e15

    def prepare(self, z: Tensor, weights: Tensor | None, gradient: bool, tiles: list[slice] | None = None) -> TiledSample:
        if not self._by_differences:
            return super().prepare(z, weights, gradient, tiles)
        sample = super().prepare(z, weights, gradient, _parts(slice(0, z.shape[0]), _TILE))
        columns = _copy(z.T if self._of_given_rows else (self.centred(z).double() * self._scale).T.to(self._dtype))
        return InductorSample(**vars(sample), columns=columns, row_gradients=torch.zeros_like(columns) if gradient else None)

    @torch.no_grad()
    def within(self, a: InductorSample, scale: float) -> Any:  # type: ignore[override]
        if not self._by_differences:
            return super().within(a, scale)
        total = self._halves(a, a.tiles, scale)
        self._add_constant_moments(a, a, scale)
        return total

    @torch.no_grad()
    def across(self, a: InductorSample, b: InductorSample, scale: float) -> Any:  # type: ignore[override]
        if not self._by_differences:
            return super().across(a, b, scale)
        rows, columns = (b, a) if a.row_gradients is None else (a, b)
        total = self._rows(rows, slice(0, len(rows)), columns, slice(0, len(columns)), scale)
        if a.row_gradients is not None and b.row_gradients is not None:
            self._rows(b, slice(0, len(b)), a, slice(0, len(a)), scale)
        self._add_constant_moments(a, b, scale)
        self._add_constant_moments(b, a, scale)
        return total

    def row_gradient(self, a: TiledSample) -> Tensor:
        gradient = super().row_gradient(a)
        if isinstance(a, InductorSample) and a.row_gradients is not None:
            gradient = gradient + a.row_gradients.T / self._scale
        return gradient

    def _halves(self, a: InductorSample, tiles: list[slice], scale: float) -> float:
        """Σ w·w·k over all pairs of rows in the tiles. The compiled loops cannot skip the diagonal: pairs in one tile come by products."""
        if len(tiles) == 1:
            return float(self._tile(a, tiles[0], a, tiles[0], scale))
        half = len(tiles) // 2
        first, second = (slice(part[0].start, part[-1].stop) for part in (tiles[:half], tiles[half:]))
        # The value of each pair once, the gradient for each of its rows.
        total = 2 * self._rows(a, first, a, second, scale)
        if a.row_gradients is not None:
            self._rows(a, second, a, first, scale)
        return total + self._halves(a, tiles[:half], scale) + self._halves(a, tiles[half:], scale)

    def _rows(self, a: InductorSample, rows: slice, b: InductorSample, columns: slice, scale: float) -> float:
        """Σ w·w·k over rows of a and columns of b that have no row in common; their share is added to the gradients of the rows."""
        total = 0.0
        for i, j in itertools.product(_parts(rows, _ROWS), _parts(columns, _COLUMNS)):
            weights = None if b.uniform else _copy(b.weights[j].to(self._dtype))
            wants_gradient = a.row_gradients is not None
            kind = not b.uniform, self._of_given_rows, wants_gradient, self._dtype
            block = _of_points(_state(), self.evaluator, a.columns.shape[0], *kind)
            # Copies, as the compiler would tell views at the start of their storage from others.
            sums, gradients = block(_copy(a.columns[:, i]), _copy(b.columns[:, j]), weights, self._exponent_scale, *self._factors)
            if a.row_gradients is not None:
                a.row_gradients[:, i].add_(gradients, alpha=scale / len(b) if b.uniform else scale)
            total += _weighted(sums, a, i, b)
        return total

    def _tile(self, a: TiledSample, i: slice, b: TiledSample, j: slice, scale: float) -> Any:
        diagonal = a is b and i == j
        # For one RBF kernel, uncompiled operations on a tile are as fast. But the errors of the two exponentials have different means,
        # which would not cancel between samples of one distribution.
        compiled = self._fuses and not self._of_given_rows and (self._by_differences or not self.single)
        if not compiled or (diagonal and any(self.evaluator.subtract_constant)):
            return super()._tile(a, i, b, j, scale)
        weights = None if b.uniform else b.weights[j].clone()
        tile = self._exponent(a, i, b, j)
        if diagonal:
            tile.fill_diagonal_(-torch.inf)
        sums, _ = _of_exponents(_state(), self.evaluator, not b.uniform, self.dtype)(tile, weights, *self._factors)
        self.add_moments(tile, a, i, b, j, scale)
        return _weighted(sums, a, i, b)


def _weighted(sums: Tensor, a: TiledSample, i: slice, b: TiledSample) -> float:
    """Σ_i w_i·sums_i over rows of a. The sums lack the weights of b if these are equal."""
    exact = sums.double()
    total = float(exact.sum()) / len(a) if a.uniform else float(exact @ a.weights[i].double())
    return total / len(b) if b.uniform else total


def _compiles() -> bool:
    """Whether `torch.compile` is switched on. Without it a block would be stored many times, once for each operation."""
    from torch._dynamo import config, eval_frame

    stance = getattr(eval_frame, "_stance", None)
    return not config.disable and getattr(stance, "stance", "default") == "default"


def _state() -> State:
    """The settings that the compiler specialises code for. Each has a function of its own, as the compiler keeps eight versions of one."""
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
    evaluator: TileEvaluator, exponent: Tensor, weights: Tensor | None, ratios: Tensor, values: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """w_j·Σ_b a_b·k_b and w_j·W_ij for each pair, from its exponent."""
    count = len(evaluator.squarings)
    value = exponent.clone() if count > 1 else exponent
    total = slope_total = exponent
    for n in range(count):
        slope = evaluator.evaluate(n, ratios[n] if n else 1.0, exponent, value, value, _EXPONENTIALS)
        total = values[n] * value + total if n else values[n] * value
        slope_total = slopes[n] * slope + slope_total if n else slopes[n] * slope
    return (total, slope_total) if weights is None else (total * weights, slope_total * weights)


def _exp2_(t: Tensor) -> Tensor:
    if t.dtype != torch.float32:
        return t.exp2_()
    power, fraction, series = _exp2_parts(t)
    return t.copy_(power * (series * fraction + 1.0))


def _square_(t: Tensor) -> Tensor:
    return t.copy_(t * t + _LEAST) if t.dtype == torch.float32 else t.square_()


def _expm1_(t: Tensor) -> Tensor:
    # The compiler would replace expm1 by exp − 1.
    if t.dtype != torch.float32:
        power = t.exp()
        near = torch.where(power == 1, t, (power - 1) * t / power.log())
        return t.copy_(torch.where(power < 0.5, power - 1, near))
    # log₂e as a sum of two numbers: rounded to one, it would be another bandwidth.
    power, fraction, series = _exp2_parts(t * 1.4426950 + t * 1.9259630e-8)
    return t.copy_(power * (series * fraction) + (power - 1))


def _exp2_parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^n, f with |f| ≤ ½ and s, such that 2^t = 2^n·(1 + f·s). A call to the C library would keep a loop's sums out of the registers."""
    t = t.clamp(min=-100.0)
    n = t.round()
    f = t - n
    # Coefficients of single precision. Before rounding, the relative error is at most 3e-9, and its mean, which squarings multiply, 3e-12.
    # They are literals, as named numbers would be loaded for each pair.
    series = 1.532731403e-4 * f + 1.339114038e-3
    series = series * f + 9.618503973e-3
    series = series * f + 5.550359190e-2
    series = series * f + 2.402264774e-1
    # The bits of 2^n as an integer, which single precision represents exactly.
    power = (n * 2.0**23 + 127 * 2.0**23).to(torch.int32).view(torch.float32)
    return power, f, series * f + 6.931471825e-1


_EXPONENTIALS = Exponentials(_exp2_, _expm1_, _square_)


@functools.cache
def _of_points(
    state: State, evaluator: TileEvaluator, dim: int, weighted: bool, of_given_rows: bool, gradient: bool, dtype: torch.dtype
) -> Compiled:
    """A function of rows (D, R) and columns (D, C) with weights (C,): Σ_j w_j·k_ij (R,) and Σ_j w_j·W_ij·(x_i − y_j) (D, R)."""

    def block(rows: Tensor, columns: Tensor, weights: Tensor | None, scale: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        differences = [rows[d, :, None] - columns[d] for d in range(dim)]
        squares = functools.reduce(lambda squares, d: squares + d * d, differences[1:], differences[0] * differences[0])
        exponent = squares * scale[0] + squares * scale[1] if of_given_rows else -squares
        total, slope = _sums(evaluator, exponent, weights, *factors)
        return total.sum(1), torch.stack([(slope * d).sum(1) for d in differences]) if gradient else rows

    rows, columns = (torch.zeros(dim, dim + n, dtype=dtype) for n in _EXAMPLE_SIZES)
    return _compile(block, evaluator, rows, columns, columns[0].clone() if weighted else None, rows.new_ones(2))


@functools.cache
def _of_exponents(state: State, evaluator: TileEvaluator, weighted: bool, dtype: torch.dtype) -> Compiled:
    """A function of exponents (R, C) and weights of the columns (C,): Σ_j w_j·k_ij (R,) and its summands; W_ij replaces the exponents."""

    def tile(exponent: Tensor, weights: Tensor | None, *factors: Tensor) -> tuple[Tensor, Tensor]:
        total, slope = _sums(evaluator, exponent, None, *factors)
        exponent.copy_(slope)
        total = total if weights is None else total * weights
        # The summands are not needed, but the loop that sums them would compute them again.
        return total.sum(1), total

    exponent = torch.zeros(_EXAMPLE_SIZES, dtype=dtype)
    return _compile(tile, evaluator, exponent, exponent[0].clone() if weighted else None)


def _compile(function: Compiled, evaluator: TileEvaluator, *example: Tensor | None) -> Compiled:
    compiled = _version(function, dynamic=True)
    assert example[0] is not None
    compiled(*example, *(torch.ones(len(evaluator.squarings), dtype=example[0].dtype) for _ in range(3)))
    return compiled


@functools.cache
def _version_for(function: Compiled, state: State, key: object) -> Compiled:
    return _version(function, dynamic=None)


def fused(function: Compiled, key: object, *args: Any) -> Any:
    """function(*args), in loops that `torch.compile` makes, with a version for each `key`; uncompiled if `torch.compile` is off."""
    return _version_for(function, _state(), key)(*args) if _compiles() else function(*args)


def _version(function: Compiled, dynamic: bool | None) -> Compiled:
    # Functions with one code object share the compiler's cache, which holds eight versions.
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    from torch._inductor import config

    # Multiply-adds in one instruction. Older versions of PyTorch take a bool here.
    contract: Any = "fast" if isinstance(config.cpp.enable_floating_point_contract_flag, str) else True
    compiled = torch.compile(own, dynamic=dynamic, fullgraph=True, options={"cpp.enable_floating_point_contract_flag": contract})

    def run(*args: Any) -> Any:
        try:
            return compiled(*args)
        except Exception as error:
            if "CxxCompiler" not in f"{error!r}{error.__cause__!r}":
                raise
            lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
            reason = lines[0] if lines else type(error).__name__
            raise RuntimeError(f"backend='inductor' must have a C++ compiler that torch.compile can use, got {reason}") from error

    return run
