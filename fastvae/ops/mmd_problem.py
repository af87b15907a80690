"""One MMD² as the op gets it, and its value and gradients on each backend. Formulas (1) to (3) of `fastvae.reference.mmd`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import mmd as cpu
from fastvae.cpu import small
from fastvae.cpu.closed_forms import Sample, bandwidth_gradients, diagonal_hessian_product, normal_hessian_product
from fastvae.cpu.inductor import InductorSweep
from fastvae.dispatch import accumulation_dtype, runs_on_triton
from fastvae.kernel_sums import rounding_of_sum
from fastvae.ops.common import (
    KernelArguments,
    direction_of_all_ranks,
    matmul_precision,
    problems_in_a_launch,
    unit_weights,
    without_autocast,
)
from fastvae.ops.kernel_hvp import kernel_hvp


class Problem(NamedTuple):
    """The arguments of the op. Rows and their weights may have one leading batch dimension.

    With `all_x` and `all_y`, x and y are their rows from `x_start` and `y_start` on. The value is then the share of these rows in the MMD²
    of the whole samples, and the gradients to them are those of the whole MMD².

    With `y_norm`, y is fixed: no pair within y is taken, as their mean is `y_norm`, and `all_y` is None.

    `group` names the process group whose ranks hold the other rows of `all_x` and `all_y`.
    """

    x: Tensor
    y: Tensor | None
    x_weights: Tensor | None
    y_weights: Tensor | None
    all_x: Tensor | None
    all_y: Tensor | None
    all_x_weights: Tensor | None
    all_y_weights: Tensor | None
    x_start: int
    y_start: int
    y_norm: Tensor | None
    kernel: KernelArguments
    unbiased: bool
    precision: str
    backend: str
    group: str
    x_grad: bool
    y_grad: bool
    bandwidth_grad: bool

    @staticmethod
    def of(*args: Any) -> Problem:
        """From the arguments of the op, in the order of its schema."""
        return Problem._make((*args[:KERNEL], KernelArguments(*args[KERNEL:_OPTIONS]), *args[_OPTIONS:]))

    def arguments(self) -> tuple[Any, ...]:
        """The reverse of `of`."""
        return *self[:KERNEL], *self.kernel, *self[KERNEL + 1 :]


# Positions among the arguments: rows and weights, which may have a batch dimension, come first.
_BATCHED = Problem._fields.index("x_start")
KERNEL = Problem._fields.index("kernel")
_OPTIONS = KERNEL + len(KernelArguments._fields)

# The value and the gradients to x, y, bandwidths and their weights, None for one that is not asked for.
Found = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


def evaluate(problem: Problem) -> Found:
    """From a single sweep over the pairs."""
    return (_on_triton if runs_on_triton(problem.backend, problem.x) else _on_cpu)(problem)


def _on_cpu(problem: Problem) -> Found:
    with without_autocast(problem.x.device):
        if problem.x.ndim == 2:
            return _small(problem) or _streaming(problem)
        parts, step = [], max(1, _small_problems(problem))
        for n in range(0, problem.x.shape[0], step):
            some = _of_tensors(problem, itemgetter(slice(n, n + step)))
            if (result := _small(some)) is not None:
                parts.append(result)
                continue
            # One problem at a time, whose tiles stay in cache.
            singles = (_streaming(_of_tensors(some, itemgetter(k))) for k in range(some.x.shape[0]))
            parts += [cast(Found, tuple(None if t is None else t[None] for t in single)) for single in singles]
        return _joined(parts)


def _streaming(problem: Problem) -> Found:
    """One problem, tile by tile."""
    family, h, a = problem.kernel.unpack()
    sweep = cpu.CPUBandwidthSweep if problem.bandwidth_grad else InductorSweep if problem.backend == "inductor" else cpu.CPUSweep
    dtype = accumulation_dtype(problem.x.dtype)
    samples = _prepared_samples(problem, torch.float64 if problem.bandwidth_grad else dtype)
    value, gradients, kernel, sums = cpu.mmd(sweep, samples, family, h, a, problem.unbiased, problem.y_norm)
    grad_x, grad_y = (None if g is None else g.to(dtype) for g in [*gradients, None][:2])
    if not problem.bandwidth_grad:
        return value.to(dtype), grad_x, grad_y, None, None
    return value.to(dtype), grad_x, grad_y, *bandwidth_gradients(samples, kernel, h, problem.unbiased, *sums.chunk(2))


def _on_triton(problem: Problem) -> Found:
    precision = matmul_precision(problem.precision)
    with without_autocast(problem.x.device):
        if problem.x.ndim == 2:
            return _triton_sweep(problem, precision)
        if (result := _few_rows(problem)) is not None:
            return result
        step = problems_in_a_launch(max(t.shape[1] for t in problem[:2] if isinstance(t, Tensor)), problem.x.shape[2])
        parts = (itemgetter(slice(n, n + step)) for n in range(0, problem.x.shape[0], step))
        return _joined([_triton_sweep(_of_tensors(problem, part), precision) for part in parts])


def _few_rows(problem: Problem) -> Found | None:
    """A batch of problems of few rows, in one launch; None if sweeps should take them."""
    x, y, weights = problem.x, problem.y, (problem.x_weights, problem.y_weights)
    if y is None or problem.bandwidth_grad or any(p is not None for p in weights):
        return None
    from fastvae.kernels.few_rows import mmd_if_few_rows

    result = mmd_if_few_rows(x, y, problem.kernel.numbers(x), problem.unbiased, problem.x_grad, problem.y_grad)
    return None if result is None else (*result, None, None)


def _triton_sweep(problem: Problem, precision: str) -> Found:
    """One problem, or a batch in the same launches."""
    import fastvae.kernels.mmd as kernels
    from fastvae.kernels.sums import bandwidth_sums

    dtype = accumulation_dtype(problem.x.dtype)
    samples: list[Any] = []
    for z, weights, whole, whole_weights, start, grad in _samples(problem):
        entire, p = (z, weights) if whole is None else (whole, whole_weights)
        tolerance = 0.0 if p is None else max(rounding_of_sum(p.dtype), rounding_of_sum(dtype))
        p = None if p is None else p.to(dtype).contiguous()
        samples.append(kernels.Sample(entire.contiguous(), p, tolerance, start, z.shape[-2], grad))
    if problem.y_norm is not None:
        # No row of y is swept: its pairs with x are counted from x.
        samples[1] = samples[1]._replace(tolerance=math.inf, rows=0)
    x, y = [*samples, None][:2]
    numbers = problem.kernel.numbers(problem.x, prior=y is None)
    value, grad_x, grad_y, sums, subtracted, constant = kernels.mmd(x, y, numbers, problem.unbiased, problem.bandwidth_grad, precision)
    if problem.y_norm is not None:
        share: Any = problem.x.shape[-2] / x.points.shape[-2]
        if problem.x_weights is not None:
            share = problem.x_weights.double().sum(-1) / x.weights.double().sum(-1)
        value = (value.double() + share * (problem.y_norm - constant)).to(dtype)
    if not problem.bandwidth_grad:
        return value, grad_x, grad_y, None, None
    kernel = problem.kernel.sum(problem.x.shape[-1], problem.x.device, None)
    radial = kernel.kernel.radial
    kernel = replace(kernel, subtract_constant=subtracted.double().view(*value.shape, -1) if radial else torch.ones_like(kernel.gamma))
    terms = (t.view(*value.shape, -1) for t in bandwidth_sums(kernel.kernel, sums, kernel.ratios))
    h = problem.kernel.unpack()[1]
    return value, grad_x, grad_y, *bandwidth_gradients(_prepared_samples(problem, dtype), kernel, h, problem.unbiased, *terms)


def hessian_product(problem: Problem, x_direction: Tensor | None, y_direction: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The Hessian of MMD² times a direction of x and y, None for 0, in the accumulation dtype: for x and y, if they have a gradient.

    Differentiable to the direction alone. In a process group each rank gives the direction of its rows and gets their result.
    """
    if x_direction is None and y_direction is None:
        return None, None
    x, *others = (_moving(problem, *given) for given in zip("xy", _samples(problem), (x_direction, y_direction), strict=False))
    results: list[list[Tensor | None]] = [[], []]
    for n, rows in enumerate((x, *others)):
        if rows.gradient and not (n == 1 and problem.y_norm is not None):
            results[n] += _within(problem, rows)
    if others and problem.all_x is None:
        for result, found in zip(results, _pairs(problem, x, others[0], -2.0), strict=True):
            result.append(found)
    elif others:
        for n, (rows, other) in enumerate(((x, others[0]), (others[0], x))):
            if rows.gradient:
                results[n].append(_pairs(problem, rows, other.whole, -2.0)[0])
    elif x.direction is not None:
        results[0].append(normal_hessian_product(x.z, x.p, *problem.kernel.vectors(x.z.device)[1:], x.direction))
    given = ([t for t in parts if t is not None] for parts in results)
    return cast("tuple[Tensor | None, Tensor | None]", tuple(torch.stack(parts).sum(0) if parts else None for parts in given))


class _Moving(NamedTuple):
    """A sample, or some rows of one, with its direction; None for 0. All tensors may have a batch dimension."""

    z: Tensor  # (N, D)
    p: Tensor  # (N, 1), its weights
    direction: Tensor | None  # (N, D)
    scale: Any = 1.0  # as that of `fastvae.cpu.closed_forms.Sample`
    gradient: bool = False
    all_rows: Any = None  # the whole sample, if these are some rows of it

    @property
    def whole(self) -> _Moving:
        return self.all_rows or self


def _moving(problem: Problem, name: str, sample: Any, direction: Tensor | None) -> _Moving:
    (z, weights, whole, whole_weights, _, gradient), dtype = sample, accumulation_dtype(problem.x.dtype)
    is_fixed = name == "y" and problem.y_norm is not None
    total = whole if whole is not None else z
    if weights is None:
        p, all_p = (t.new_full((*t.shape[:-1], 1), 1 / total.shape[-2], dtype=dtype) for t in (z, total))
        squares: Any = 1 / total.shape[-2]
    else:
        # Weights of fixed rows sum to one only as far as large ones of both signs can.
        p = (weights.to(dtype) if is_fixed else unit_weights(weights, whole_weights, dtype))[..., None]
        all_p = p if whole_weights is None else unit_weights(whole_weights, None, dtype)[..., None]
        squares = all_p.double().square().sum((-2, -1), keepdim=True)
    scale = 1 / (1 - squares) if problem.unbiased and not is_fixed else 1.0
    direction = None if direction is None else direction.to(dtype)
    all_rows = None
    if whole is not None:
        moved = direction_of_all_ranks(name, torch.zeros_like(z) if direction is None else direction, problem.group)
        all_rows = _Moving(whole, all_p, moved)
    return _Moving(z, p, direction, scale, gradient, all_rows)


def _pairs(problem: Problem, x: _Moving, y: _Moving | None, factor: Any) -> list[Tensor | None]:
    """The Hessian of `factor` times Σ p_i·q_j·k(x_i, y_j) times the direction, for x and y; without y for x alone."""
    z, q, moved = (x.z, x.p, None) if y is None else (y.z, y.p, y.direction)
    to_y = y is not None and y.gradient
    given = x.z, None if y is None else z, (factor * x.p).to(x.p.dtype), q, x.direction, moved, None, None
    return kernel_hvp("mmd", *given, *problem.kernel, problem.precision, problem.backend, x.gradient, to_y, False, False)[:2]


def _within(problem: Problem, x: _Moving) -> list[Tensor | None]:
    """The same for the mean of k over the pairs of one sample."""
    kernel, parts = problem.kernel.vectors(x.z.device), []
    if x.all_rows is not None:
        # One of the two places of each row, with the pairs of a row and itself.
        parts.append(_pairs(problem, x, x.all_rows, 2 * x.scale)[0])
    elif x.direction is not None:
        parts.append(_pairs(problem, x, None, x.scale)[0])
    # Pairs of a row and itself: the biased estimator adds them, the unbiased one takes them from the sum over all rows.
    if not kernel[0].radial and x.direction is not None and problem.unbiased == (x.all_rows is not None):
        own = diagonal_hessian_product(x.z, x.p.double().square(), *kernel, x.direction)
        parts.append((-x.scale * own).to(own.dtype) if problem.unbiased else own)
    return parts


def _joined(parts: list[Found]) -> Found:
    """The results of a batch, from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    columns: Any = zip(*parts, strict=True)
    return cast(Found, tuple(None if column[0] is None else torch.cat(column) for column in columns))


def _small_problems(problem: Problem) -> int:
    """How many problems of a batch `cpu.small` takes at once; 0 if it does not take them."""
    if problem.all_x is not None or problem.all_y is not None or problem.y_norm is not None or problem.bandwidth_grad:
        return 0
    rows = problem.x.shape[-2] + (0 if problem.y is None else problem.y.shape[-2])
    return small.problems_at_once(rows, problem.x.shape[-1])


def _small(problem: Problem) -> Found | None:
    if not _small_problems(problem):
        return None
    dtype = accumulation_dtype(problem.x.dtype)
    p, q = problem.x_weights, problem.y_weights
    p, q = p if p is None else unit_weights(p, None, dtype), q if q is None else unit_weights(q, None, dtype)
    result = small.mmd(problem.x, problem.y, p, q, *problem.kernel.unpack(), problem.unbiased, problem.x_grad, problem.y_grad)
    return None if result is None else (*result, None, None)


def _of_tensors(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with the function applied to each tensor that may have a batch dimension."""
    return Problem._make([*(function(t) if isinstance(t, Tensor) else t for t in problem[:_BATCHED]), *problem[_BATCHED:]])


def _samples(problem: Problem) -> list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, bool]]:
    """The rows, weights, whole sample, its weights, first row and `grad` of x, and of y if there is one."""
    samples = [(problem.x, problem.x_weights, problem.all_x, problem.all_x_weights, problem.x_start, problem.x_grad)]
    if problem.y is not None:
        samples.append((problem.y, problem.y_weights, problem.all_y, problem.all_y_weights, problem.y_start, problem.y_grad))
    return samples


def _prepared_samples(problem: Problem, dtype: torch.dtype) -> list[Sample]:
    """The samples in this dtype, with normalised weights."""
    prepared: list[Sample] = []
    for z, weights, whole, whole_weights, start, grad in _samples(problem):
        is_fixed = bool(prepared) and problem.y_norm is not None
        if is_fixed:
            # These sum to one as far as large weights of both signs can.
            p, whole_p = (None if weights is None else weights.to(dtype)), None
        else:
            p, whole_p = (None if given is None else unit_weights(given, whole_weights, dtype) for given in (weights, whole_weights))
        whole = None if whole is None else whole.to(dtype)
        prepared.append(Sample.of(z.to(dtype), p, whole, whole_p, start, problem.unbiased and not is_fixed, grad))
    return prepared
