"""The custom op of MMD² and its derivatives. Formulas (1) to (3) of `fastvae.reference.mmd`.

The op returns the value and the wanted gradients from one sweep over the pairs. As MMD² is a scalar, backward only scales them. Where the
gradients are to be differentiated themselves, they are results of `_Gradients`, whose derivative takes one more sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastvae.dispatch import accumulation_dtype, in_forward_mode, needs_dispatcher
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    autograd_function,
    compiled_op,
    custom_op,
    dot,
    forbid_bandwidth_derivative,
    gradient_to,
    gradients_function,
    leaves,
    needs_grad,
    refuse_bandwidth_tangents,
    refuse_tangents,
    save_arguments,
    saved_arguments,
)
from fastvae.ops.mmd_problem import KERNEL, Problem, evaluate, hessian_product

SCHEMA = (
    "(Tensor x, Tensor? y, Tensor? x_weights, Tensor? y_weights, Tensor? all_x, Tensor? all_y, Tensor? all_x_weights, "
    f"Tensor? all_y_weights, SymInt x_start, SymInt y_start, Tensor? y_norm, {KERNEL_SCHEMA}, "
    "bool unbiased, str precision, str backend, str group, bool x_grad, bool y_grad, bool bandwidth_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_ARGUMENTS = len(Problem._fields) - 1 + len(KernelArguments._fields)
# The positions of x, y, the bandwidth and its weights among the arguments, in the order of the op's gradients.
_DIFFERENTIABLE = (0, 1, KERNEL, KERNEL + 1)

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _op(*args: Any) -> Result:
    """MMD² and its gradients to x, y, bandwidths and their weights, in the accumulation dtype, the last two in float64.

    y = None is N(0, I). A gradient not asked for is empty.
    """
    value, *gradients = evaluate(Problem.of(*args))
    dtypes = (value.dtype, value.dtype, torch.float64, torch.float64)
    empty = (value.new_empty(0, dtype=dtype) if t is None else t for t, dtype in zip(gradients, dtypes, strict=True))
    return cast(Result, (value, *empty))


def _fake(*args: Any) -> Result:
    problem = Problem.of(*args)
    x, y, dtype = problem.x, problem.y, accumulation_dtype(problem.x.dtype)
    batch = x.shape[:-2]
    grad_x = x.new_empty(x.shape if problem.x_grad else (0,), dtype=dtype)
    grad_y = x.new_empty(y.shape if problem.y_grad and y is not None else (0,), dtype=dtype)
    count = len(problem.kernel.unpack()[1])
    grad_h, grad_a = (x.new_empty((*batch, count) if problem.bandwidth_grad else (0,), dtype=torch.float64) for _ in range(2))
    return x.new_empty(batch, dtype=dtype), grad_x, grad_y, grad_h, grad_a


# x, y and their weights may have a batch dimension.
mmd_op = custom_op("mmd", SCHEMA, _op, _fake, batched=4)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise backward gets zeros for them, with a launch each.
    ctx.set_materialize_grads(False)
    save_arguments(ctx, inputs, output[1:])


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _ARGUMENTS
    if grad_value is not None:
        wanted = [ctx.needs_input_grad[n] for n in _DIFFERENTIABLE]
        for n, grad in zip(_DIFFERENTIABLE, _gradients_of(grad_value, ctx, wanted), strict=True):
            grads[n] = grad
    return tuple(grads)


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_tangents(tangents)
    x = saved_arguments(ctx)[0][0]
    one = x.new_ones(x.shape[:-2], dtype=accumulation_dtype(x.dtype))
    grads = _gradients_of(one, ctx, [tangent is not None for tangent in tangents[:2]] + [False, False])
    return dot(grads[:2], tangents[:2]), None, None, None, None


def _gradients_of(grad_value: Tensor, ctx: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    arguments, found = saved_arguments(ctx)
    return _gradients(grad_value, [arguments[n] for n in _DIFFERENTIABLE], found, wanted, lambda: arguments)


def _gradients(
    grad_value: Tensor,
    sources: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    wanted: Sequence[bool],
    arguments: Callable[[], Sequence[Any]],
) -> list[Tensor | None]:
    """The gradients to x, y, the bandwidths and their weights, from those of the value alone. `arguments` are those of the op."""
    found = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    for grad, want in zip(found, wanted, strict=True):
        if want and (grad is None or grad.numel() == 0):
            raise RuntimeError("fastvae::mmd was called without the gradient that backward needs: call fastvae.mmd, which asks for it")
    results: list[Tensor | None] = [None] * 4
    if torch.is_grad_enabled() or in_forward_mode():
        found = [*found[:2], *(t if t is None else forbid_bandwidth_derivative("mmd", t, *sources) for t in found[2:])]
        if any(wanted[:2]):
            given = arguments()
            numbers = [t if t is None else forbid_bandwidth_derivative("mmd", t) for t in given[KERNEL : KERNEL + 2]]
            given = leaves([*given[:KERNEL], *numbers, *given[KERNEL + 2 :]])
            to_rows = _Gradients.apply(grad_value, *found[:2], *given)
            results[:2] = [t if want else None for t, want in zip(to_rows, wanted, strict=False)]
    else:
        for place, (t, grad) in enumerate(zip(sources[:2], found[:2], strict=True)):
            results[place] = None if t is None or grad is None else gradient_to(t, grad, grad_value)
    for place in (2, 3):
        grad, source = found[place], sources[place]
        if grad is not None and source is not None:
            # The same for all of a batch.
            results[place] = (grad_value[..., None] * grad).sum_to_size(source.shape).to(source)
    return results


def _refuse_tangents(tangents: Sequence[Tensor | None]) -> None:
    """Of all arguments but x and y."""
    refuse_bandwidth_tangents("mmd", *tangents[KERNEL : KERNEL + 2])
    for n, argument in enumerate(("x_weights", "y_weights"), 2):
        refuse_tangents("mmd", argument, tangents[n])


# The gradients to x and y.
_Gradients = gradients_function(
    "mmd", 2, lambda arguments, *directions: hessian_product(Problem.of(*arguments), *directions), _refuse_tangents
)
_MMD = autograd_function("MMD", "mmd", mmd_op, _setup_context, _backward, _jvp)


class _EagerMMD(torch.autograd.Function):
    """MMD² where there is neither a transform of `torch.func` nor forward mode. Its inputs are the tensors that may have a derivative, then
    the problem.

    A Function of all arguments, with `setup_context`, takes 50 µs longer, as much as a small problem.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        problem = args[-1]
        value, *gradients = mmd_op(*problem.arguments()) if needs_dispatcher(*problem[:2]) else evaluate(problem)
        # Samples and weights that need no gradient may change in place, as long as no second derivative needs them.
        ctx.versions = [None if t is None or t.is_inference() else t._version for t in problem[:4]]
        wanted = ctx.needs_input_grad[:4]
        ctx.problem = problem._make([*(None if want else t for t, want in zip(problem[:2], wanted, strict=False)), *problem[2:]])
        ctx.save_for_backward(*(t if want else None for t, want in zip(args[:4], wanted, strict=True)), *gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: activation checkpointing allows no more.
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]

        def arguments() -> tuple[Any, ...]:
            rows = [t if want else fixed for t, want, fixed in zip(tensors, wanted, ctx.problem[:2], strict=False)]
            problem = Problem._make([*rows, *ctx.problem[2:]])
            for t, version in zip(problem[:4], ctx.versions, strict=True):
                if t is not None and version not in (None, t._version):
                    raise RuntimeError(
                        "a second derivative needs samples and weights that have not changed since the forward pass: pass a clone of one "
                        "that changes"
                    )
            return problem.arguments()

        return (*_gradients(grads[0], tensors[:4], tensors[4:], wanted, arguments), None)


def apply_mmd(rows: Sequence[Any], kernel: KernelArguments, unbiased: bool, precision: str, backend: str, group: str = "") -> Tensor:
    """MMD², differentiable twice. `rows` are the fields of `Problem` before the kernel."""
    x, y, h, a = rows[0], rows[1], kernel.bandwidth, kernel.bandwidth_weights
    tangents, y_norm = in_forward_mode(), rows[-1]
    grads = needs_grad(x) or tangents, needs_grad(y) or (tangents and y is not None and y_norm is None), needs_grad(h, a)
    options = unbiased, precision, backend, group, *grads
    # Outside of the compiler by way of a Function: the op would drop derivatives in forward mode.
    if torch.compiler.is_compiling():
        return cast(Tensor, compiled_op("mmd", mmd_op, *rows, *kernel, *options)[0])
    if torch._C._are_functorch_transforms_active() or tangents:
        return cast(Tensor, _MMD.apply(*rows, *leaves(kernel), *options)[0])
    problem = Problem._make([*rows, kernel, *options])
    # A Function takes as long as some of the sums.
    if not needs_grad(*rows[:4], h, a) and not needs_dispatcher(x, y, *rows[2:4], h, a):
        return evaluate(problem)[0]
    return cast(Tensor, _EagerMMD.apply(x, y, h, a, problem))  # type: ignore[no-untyped-call]
