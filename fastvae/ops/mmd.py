"""The custom op of MMD² and its derivatives. Formulas (1) to (3) of `fastvae.reference.mmd`.

The op returns the value and the wanted gradients from one sweep over the pairs. As MMD² is a scalar, backward only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastvae.dispatch import accumulation_dtype, needs_dispatcher
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    autograd_function,
    compiled_op,
    forbid_second_derivative,
    loop_over_batch,
    needs_grad,
)
from fastvae.ops.mmd_problem import KERNEL, Problem, evaluate

SCHEMA = (
    "(Tensor x, Tensor? y, Tensor? x_weights, Tensor? y_weights, Tensor? all_x, Tensor? all_y, Tensor? all_x_weights, "
    f"Tensor? all_y_weights, SymInt x_start, SymInt y_start, Tensor? y_norm, {KERNEL_SCHEMA}, "
    "bool unbiased, str precision, str backend, bool x_grad, bool y_grad, bool bandwidth_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_ARGUMENTS = len(Problem._fields) - 1 + len(KernelArguments._fields)
# The positions of x, y, the bandwidth and its weights among the arguments, in the order of the op's gradients.
_DIFFERENTIABLE = (0, 1, KERNEL, KERNEL + 1)

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastvae::mmd", mutates_args=(), schema=SCHEMA)
def mmd_op(*args: Any) -> Result:
    """MMD² and its gradients to x, y, bandwidths and their weights, in the accumulation dtype, the last two in float64.

    y = None is N(0, I). A gradient not asked for is empty.
    """
    value, *gradients = evaluate(Problem.of(*args))
    dtypes = (value.dtype, value.dtype, torch.float64, torch.float64)
    empty = (value.new_empty(0, dtype=dtype) if t is None else t for t, dtype in zip(gradients, dtypes, strict=True))
    return cast(Result, (value, *empty))


@mmd_op.register_fake
def _fake(*args: Any) -> Result:
    problem = Problem.of(*args)
    x, y, dtype = problem.x, problem.y, accumulation_dtype(problem.x.dtype)
    batch = x.shape[:-2]
    grad_x = x.new_empty(x.shape if problem.x_grad else (0,), dtype=dtype)
    grad_y = x.new_empty(y.shape if problem.y_grad and y is not None else (0,), dtype=dtype)
    count = len(problem.kernel.unpack()[1])
    grad_h, grad_a = (x.new_empty((*batch, count) if problem.bandwidth_grad else (0,), dtype=torch.float64) for _ in range(2))
    return x.new_empty(batch, dtype=dtype), grad_x, grad_y, grad_h, grad_a


@mmd_op.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Result, tuple[int | None, ...]]:
    """The op has a batch dimension of its own, into which this one goes."""
    problem = Problem.of(*args)
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise backward gets zeros for them, with a launch each.
    ctx.set_materialize_grads(False)
    _save(ctx, [inputs[n] for n in _DIFFERENTIABLE], [ctx.needs_input_grad[n] for n in _DIFFERENTIABLE], output[1:])


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _ARGUMENTS
    if grad_value is not None:
        wanted = [ctx.needs_input_grad[n] for n in _DIFFERENTIABLE]
        for n, grad in zip(_DIFFERENTIABLE, _gradients(ctx, grad_value, wanted), strict=True):
            grads[n] = grad
    return tuple(grads)


def _save(ctx: Any, sources: Sequence[Tensor | None], wanted: Sequence[bool], gradients: Sequence[Tensor | None]) -> None:
    # The inputs are needed only to refuse their second derivative. One that needs no gradient may be changed in place meanwhile.
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


_MMD = autograd_function("MMD", "mmd", mmd_op, _setup_context, _backward)


class _EagerMMD(torch.autograd.Function):
    """MMD² where no transform of `torch.func` is active. Its inputs are the tensors that may have a derivative, then the problem.

    A Function of all arguments, with `setup_context`, takes 50 µs longer, as much as a small problem.
    """

    jvp = _MMD.jvp

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        problem = args[-1]
        value, *gradients = mmd_op(*problem.arguments()) if needs_dispatcher(*problem[:2]) else evaluate(problem)
        _save(ctx, args[:4], ctx.needs_input_grad[:4], gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grads[0], ctx.needs_input_grad), None, None, None)


def apply_mmd(rows: Sequence[Any], kernel: KernelArguments, unbiased: bool, precision: str, backend: str) -> Tensor:
    """MMD², differentiable. `rows` are the fields of `Problem` before the kernel."""
    x, y, h, a = rows[0], rows[1], kernel.bandwidth, kernel.bandwidth_weights
    options = unbiased, precision, backend, needs_grad(x), needs_grad(y), needs_grad(h, a)
    # Outside of the compiler by way of a Function, which refuses derivatives in forward mode: the op would drop them.
    if torch.compiler.is_compiling():
        return cast(Tensor, compiled_op("mmd", mmd_op, *rows, *kernel, *options)[0])
    if torch._C._are_functorch_transforms_active():
        return cast(Tensor, _MMD.apply(*rows, *kernel, *options)[0])
    problem = Problem._make([*rows, kernel, *options])
    # A Function takes as long as some of the sums. One is needed to refuse derivatives in forward mode.
    if not needs_grad(*rows[:4], h, a) and torch.autograd.forward_ad._current_level < 0 and not needs_dispatcher(x, y, *rows[2:4], h, a):
        return evaluate(problem)[0]
    return cast(Tensor, _EagerMMD.apply(x, y, h, a, problem.x_weights, problem.y_weights, problem))  # type: ignore[no-untyped-call]
