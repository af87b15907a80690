"""The custom op and the autograd.Function of MMD²: formulas (1) to (3) of `fastvae.reference.mmd`, around one sweep of a backend.

The op returns the value and the gradients that the call asks for, all from one sweep; the loss is a scalar, so that backward only scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae import checks
from fastvae.cpu import compiled, small
from fastvae.cpu import mmd as cpu
from fastvae.cpu.closed_forms import Sample, bandwidth_gradients
from fastvae.kernel_sums import KernelNumbers, KernelSum, rounding_of_sum
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    accumulation_dtype,
    compiled_op,
    forbid_second_derivative,
    kernel_numbers,
    loop_over_batch,
    matmul_precision,
    needs_grad,
    no_forward_mode,
    unit_weights,
    without_autocast,
)
from fastvae.radial import RBF, Energy, Polynomial, RationalQuadratic

SCHEMA = (
    "(Tensor x, Tensor? y, Tensor? x_weights, Tensor? y_weights, Tensor? all_x, Tensor? all_y, Tensor? all_x_weights, "
    f"Tensor? all_y_weights, SymInt x_start, SymInt y_start, {KERNEL_SCHEMA}, "
    "bool unbiased, str precision, str backend, bool x_grad, bool y_grad, bool bandwidth_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Problem(NamedTuple):
    """The arguments of the op, in the order of its schema. Points and weights may have one leading batch dimension.

    With `all_x` and `all_y`, x and y are rows of them from `x_start` and `y_start` on: the value is then these rows' share in MMD² of the
    whole samples, and the gradients are those of all of it.
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
    bandwidth: Tensor | None
    bandwidth_weights: Tensor | None
    bandwidth_numbers: list[float]
    weight_numbers: list[float]
    kernel: str
    kernel_parameters: list[float]
    unbiased: bool
    precision: str
    backend: str
    x_grad: bool
    y_grad: bool
    bandwidth_grad: bool


# Points and weights come first.
_BATCHED = Problem._fields.index("x_start")

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Of which a gradient that is not asked for is None.
Found = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]

# Elements of a padded sample of all problems of one launch, 64 MiB in float32, of which a sweep has about ten copies: four thousand
# problems of up to 128 rows and 32 features, which fill any GPU.
_PADDED = 1 << 24


@torch.library.custom_op("fastvae::mmd", mutates_args=(), schema=SCHEMA)
def mmd_op(*args: Any) -> Result:
    """(MMD², its gradients to x, y, bandwidths and their weights) in the accumulation dtype, the last two in float64; y = None is N(0, I).

    A gradient not asked for is empty."""
    value, *gradients = _on_device(Problem(*args))
    dtypes = (value.dtype, value.dtype, torch.float64, torch.float64)
    empty = (value.new_empty(0, dtype=dtype) if t is None else t for t, dtype in zip(gradients, dtypes, strict=True))
    return cast(Result, (value, *empty))


def _on_device(problem: Problem) -> Found:
    return (_triton if problem.backend == "triton" or problem.x.is_cuda else _on_cpu)(problem)


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
    """Of one problem."""
    family, h, a = kernel_numbers(problem)
    sweep = cpu.BandwidthSweep if problem.bandwidth_grad else compiled.Sweep if problem.backend == "inductor" else cpu.Sweep
    dtype = accumulation_dtype(problem.x.dtype)
    samples = _samples(problem, torch.float64 if problem.bandwidth_grad else dtype)
    value, gradients, kernel, sums = cpu.mmd(sweep, samples, family, h, a, problem.unbiased)
    grad_x, grad_y = (None if g is None else g.to(dtype) for g in [*gradients, None][:2])
    if not problem.bandwidth_grad:
        return value.to(dtype), grad_x, grad_y, None, None
    return value.to(dtype), grad_x, grad_y, *bandwidth_gradients(samples, kernel, h, problem.unbiased, *sums.chunk(2))


def _triton(problem: Problem) -> Found:
    precision = matmul_precision(problem.precision)
    with without_autocast(problem.x.device):
        if problem.x.ndim == 2:
            return _sweep(problem, precision)
        step = _problems_at_once(problem)
        parts = (itemgetter(slice(n, n + step)) for n in range(0, problem.x.shape[0], step))
        return _joined([_sweep(_of_tensors(problem, part), precision) for part in parts])


def _sweep(problem: Problem, precision: str) -> Found:
    """Of one problem, or of a batch in the same launches."""
    from fastvae.kernels import mmd as kernels

    device, (family, h, a) = problem.x.device, kernel_numbers(problem)
    dtype = accumulation_dtype(problem.x.dtype)

    def sample(z: Tensor, weights: Tensor | None, whole: Tensor | None, whole_weights: Tensor | None, start: int, grad: bool) -> Any:
        entire, p = (z, weights) if whole is None else (whole, whole_weights)
        tolerance = 0.0 if p is None else max(rounding_of_sum(p.dtype), rounding_of_sum(dtype))
        p = None if p is None else p.to(dtype).contiguous()
        return kernels.Sample(entire.contiguous(), p, tolerance, start, z.shape[-2], grad)

    x = sample(problem.x, problem.x_weights, problem.all_x, problem.all_x_weights, problem.x_start, problem.x_grad)
    y = None
    if problem.y is not None:
        y = sample(problem.y, problem.y_weights, problem.all_y, problem.all_y_weights, problem.y_start, problem.y_grad)
    dim = problem.x.shape[-1]
    numbers = KernelNumbers.of(family, h, a, dim, y is None, device)
    value, grad_x, grad_y, sums, shifts = kernels.mmd(x, y, numbers, problem.unbiased, problem.bandwidth_grad, precision)
    if not problem.bandwidth_grad:
        return value, grad_x, grad_y, None, None
    kernel = KernelSum.of(family, h, a, dim, device, None)
    kernel = replace(kernel, shifts=shifts.double().view(*value.shape, -1) if family.radial else torch.ones_like(kernel.gamma))
    terms = (t.view(*value.shape, -1) for t in _sums_of_terms(kernel, sums))
    return value, grad_x, grad_y, *bandwidth_gradients(_samples(problem, dtype), kernel, h, problem.unbiased, *terms)


def _sums_of_terms(kernel: KernelSum, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pairs of each k_b − shift and of each ∂k_b/∂log h_b, from those of `fastvae.kernels.pairs.bandwidth_terms`."""
    family, ratios = kernel.kernel, kernel.ratios
    if isinstance(family, Energy):
        values = sums * ratios.sqrt()
        return values, -values
    if isinstance(family, Polynomial):
        terms = [(n, c * sums[:, n - 1 : n] * ratios**n) for n, c in family.powers]
        return torch.stack([term for _, term in terms]).sum(0), torch.stack([-2 * n * term for n, term in terms]).sum(0)
    values, slopes = sums[:, ::2], sums[:, 1::2]
    # t is −t_0·log₂e, −t_0/α or −√(2·t_0)·log₂e.
    if isinstance(family, RBF):
        return values, -2 * math.log(2) * ratios * slopes
    if isinstance(family, RationalQuadratic):
        return values, -2 * family.alpha * ratios * slopes
    return values, -math.log(2) * ratios.sqrt() * slopes


def _joined(parts: list[Found]) -> Found:
    """Of a batch, from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    columns: Any = zip(*parts, strict=True)
    return cast(Found, tuple(None if column[0] is None else torch.cat(column) for column in columns))


@mmd_op.register_fake
def _fake(*args: Any) -> Result:
    problem = Problem(*args)
    x, y, dtype = problem.x, problem.y, accumulation_dtype(problem.x.dtype)
    batch = x.shape[:-2]
    grad_x = x.new_empty(x.shape if problem.x_grad else (0,), dtype=dtype)
    grad_y = x.new_empty(y.shape if problem.y_grad and y is not None else (0,), dtype=dtype)
    count = len(kernel_numbers(problem)[1])
    grad_h, grad_a = (x.new_empty((*batch, count) if problem.bandwidth_grad else (0,), dtype=torch.float64) for _ in range(2))
    return x.new_empty(batch, dtype=dtype), grad_x, grad_y, grad_h, grad_a


@mmd_op.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Result, tuple[int | None, ...]]:
    """A batch dimension of the op itself, in the place of one more of `torch.vmap`."""
    problem = Problem(*args)
    if any(isinstance(dim, int) for dim in in_dims[4:]):
        return cast("tuple[Result, tuple[int | None, ...]]", loop_over_batch(mmd_op, info.batch_size, in_dims, args))
    tensors, batched = [], problem.x.ndim - (in_dims[0] is not None) == 3
    for t, dim in zip(problem[:4], in_dims[:4], strict=True):
        t = t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        tensors.append(t.flatten(0, 1) if t is not None and batched else t)
    results = mmd_op(*tensors, *args[4:])
    if batched:
        results = tuple(t.unflatten(0, (info.batch_size, -1)) if t.numel() else t for t in results)
    return cast(Result, tuple(results)), tuple(0 if t.numel() else None for t in results)


def _small_problems(problem: Problem) -> int:
    """How many of a batch the direct formula takes at once; 0 for what is left to a sweep."""
    if problem.all_x is not None or problem.all_y is not None or problem.bandwidth_grad:
        return 0
    rows = problem.x.shape[-2] + (0 if problem.y is None else problem.y.shape[-2])
    return small.problems_at_once(rows, problem.x.shape[-1])


def _small(problem: Problem) -> Found | None:
    if not _small_problems(problem):
        return None
    dtype = accumulation_dtype(problem.x.dtype)
    p, q = problem.x_weights, problem.y_weights
    p, q = p if p is None else unit_weights(p, None, dtype), q if q is None else unit_weights(q, None, dtype)
    result = small.mmd(problem.x, problem.y, p, q, *kernel_numbers(problem), problem.unbiased, problem.x_grad, problem.y_grad)
    return None if result is None else (*result, None, None)


def _problems_at_once(problem: Problem) -> int:
    """Of a batch as many as one launch takes: kernels pad each to whole tiles, which small ones are far from."""
    rows = max(t.shape[1] for t in problem[:2] if isinstance(t, Tensor))
    return max(1, _PADDED // ((rows + -rows % 128) * (problem.x.shape[2] + -problem.x.shape[2] % 16)))


def _of_tensors(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with a function of each tensor that may have a batch dimension."""
    return Problem._make([*(function(t) if isinstance(t, Tensor) else t for t in problem[:_BATCHED]), *problem[_BATCHED:]])


def _samples(problem: Problem, dtype: torch.dtype) -> list[Sample]:
    """In this dtype; weights over their sums."""

    def sample(z: Tensor, weights: Tensor | None, whole: Tensor | None, whole_weights: Tensor | None, start: int, grad: bool) -> Sample:
        if weights is not None:
            given = whole_weights
            whole_weights = None if given is None else unit_weights(given, None, dtype)
            weights = unit_weights(weights, given, dtype)
        return Sample.of(z.to(dtype), weights, None if whole is None else whole.to(dtype), whole_weights, start, problem.unbiased, grad)

    x = sample(problem.x, problem.x_weights, problem.all_x, problem.all_x_weights, problem.x_start, problem.x_grad)
    if problem.y is None:
        return [x]
    return [x, sample(problem.y, problem.y_weights, problem.all_y, problem.all_y_weights, problem.y_start, problem.y_grad)]


# Where the arguments are that have a gradient, in the order of the op's gradients.
_DIFFERENTIABLE = tuple(Problem._fields.index(name) for name in ("x", "y", "bandwidth", "bandwidth_weights"))


def apply_mmd(*args: Any) -> Tensor:
    """MMD², differentiable; arguments of `torch.ops.fastvae.mmd` without the last three, which say what gradients are wanted."""
    x, y, h, a = sources = [args[n] for n in _DIFFERENTIABLE]
    problem = Problem._make((*args, needs_grad(x), y is not None and needs_grad(y), needs_grad(h, a)))
    # Outside of the compiler by way of the Function, which refuses forward-mode derivatives: the op would drop them.
    if torch.compiler.is_compiling():
        return cast(Tensor, compiled_op("mmd", mmd_op, *problem)[0])
    if torch._C._are_functorch_transforms_active():
        return cast(Tensor, MMD.apply(*problem)[0])  # type: ignore[no-untyped-call]
    return cast(Tensor, _EagerMMD.apply(*sources, problem.x_weights, problem.y_weights, problem))  # type: ignore[no-untyped-call]


class MMD(torch.autograd.Function):
    """(MMD² and its gradients); only the first is differentiable. Arguments of `torch.ops.fastvae.mmd`."""

    generate_vmap_rule = True
    jvp = no_forward_mode("mmd")

    @staticmethod
    def forward(*args: Any) -> Result:
        return cast(Result, mmd_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        ctx.mark_non_differentiable(*output[1:])
        # Else backward is handed zeros in their place, a launch each.
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


class _EagerMMD(torch.autograd.Function):
    """`MMD` where no transform of `torch.func` needs more. Its inputs are the tensors that may have a derivative, then the problem.

    One of all arguments, with `setup_context`, takes 50 µs longer, as much as a small problem.
    """

    jvp = MMD.jvp

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        problem = args[-1]
        value, *gradients = mmd_op(*problem) if checks.needs_dispatcher(*problem[:2]) else _on_device(problem)
        _save(ctx, args[:4], ctx.needs_input_grad[:4], gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grads[0], ctx.needs_input_grad), None, None, None)


def _save(ctx: Any, sources: Sequence[Tensor | None], wanted: Sequence[bool], gradients: Sequence[Tensor | None]) -> None:
    # The inputs are not needed but to refuse their second derivative: one that needs no gradient may change in place meanwhile.
    ctx.save_for_backward(*[source if want else None for source, want in zip(sources, wanted, strict=True)], *gradients)


def _gradients(ctx: Any, grad_value: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    # Unpacked once: activation checkpointing allows no more.
    tensors = ctx.saved_tensors
    sources, gradients = tensors[:4], tensors[4:]
    results: list[Tensor | None] = [None] * 4
    for place in range(4):
        if not wanted[place]:
            continue
        source, grad = sources[place], gradients[place]
        if grad is None or grad.numel() == 0:
            raise RuntimeError("fastvae::mmd was called without the gradient that backward needs: call fastvae.mmd, which asks for it")
        grad = forbid_second_derivative("mmd", grad, *sources)
        if place > 1:
            # The same bandwidths for all of a batch.
            results[place] = (grad_value[..., None] * grad).sum_to_size(source.shape).to(source)
        else:
            results[place] = (grad * (grad_value[:, None, None] if grad_value.ndim else grad_value)).to(source.dtype)
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    wanted = [ctx.needs_input_grad[n] for n in _DIFFERENTIABLE]
    _save(ctx, [inputs[n] for n in _DIFFERENTIABLE], wanted, output[1:])


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(Problem._fields)
    if grad_value is not None:
        wanted = [ctx.needs_input_grad[n] for n in _DIFFERENTIABLE]
        for n, grad in zip(_DIFFERENTIABLE, _gradients(ctx, grad_value, wanted), strict=True):
            grads[n] = grad
    return tuple(grads)


mmd_op.register_autograd(_backward, setup_context=_setup_context)
