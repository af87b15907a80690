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
from fastvae.cpu.closed_forms import Sample, bandwidth_gradients
from fastvae.cpu.inductor import InductorSweep
from fastvae.dispatch import accumulation_dtype, runs_on_triton
from fastvae.kernel_sums import rounding_of_sum
from fastvae.ops.common import KernelArguments, matmul_precision, unit_weights, without_autocast


class Problem(NamedTuple):
    """The arguments of the op. Rows and their weights may have one leading batch dimension.

    With `all_x` and `all_y`, x and y are their rows from `x_start` and `y_start` on. The value is then the share of these rows in the MMD²
    of the whole samples, and the gradients to them are those of the whole MMD².

    With `y_norm`, y is fixed: no pair within y is taken, as their mean is `y_norm`, and `all_y` is None.
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

# The most elements of a padded sample of all problems in one launch, 64 MiB in float32, of which a sweep has about ten copies. That is four
# thousand problems of up to 128 rows and 32 features, enough to fill any GPU.
_MOST_PADDED = 1 << 24


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
        # As many problems of a batch as one launch takes. Each is padded to whole tiles, which is much for a small one.
        rows = max(t.shape[1] for t in problem[:2] if isinstance(t, Tensor))
        step = max(1, _MOST_PADDED // ((rows + -rows % 128) * (problem.x.shape[2] + -problem.x.shape[2] % 16)))
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
        if prepared and problem.y_norm is not None:
            # These sum to one as far as large weights of both signs can.
            p, whole_p = (None if weights is None else weights.to(dtype)), None
        else:
            p, whole_p = (None if given is None else unit_weights(given, whole_weights, dtype) for given in (weights, whole_weights))
        whole = None if whole is None else whole.to(dtype)
        prepared.append(Sample.of(z.to(dtype), p, whole, whole_p, start, problem.unbiased, grad))
    return prepared
