"""The custom op of the Hessian of a sum over pairs times a direction. Formulas of `fastvae.reference.kernel_hvp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import kernel_hvp as cpu
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton, zero_if_finite
from fastvae.kernel_sums import read, stable_mean
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    custom_op,
    differentiable,
    forbid_third_derivative,
    kernel_arguments,
    matmul_precision,
    save_inputs,
    saved_arguments,
    without_autocast,
)
from fastvae.radial import terms_of

SCHEMA = (
    "(Tensor x, Tensor? y, Tensor u, Tensor v, Tensor? x_direction, Tensor? y_direction, Tensor? u_direction, Tensor? v_direction, "
    f"{KERNEL_SCHEMA}, str precision, str backend, bool to_x, bool to_y, bool to_u, bool to_v) -> (Tensor, Tensor, Tensor, Tensor)"
)
_TENSORS = 8

Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Problem(NamedTuple):
    """The arguments of the op. All tensors but those of the kernel may have one batch dimension."""

    x: Tensor
    y: Tensor | None
    u: Tensor
    v: Tensor
    x_direction: Tensor | None
    y_direction: Tensor | None
    u_direction: Tensor | None
    v_direction: Tensor | None
    kernel: KernelArguments
    precision: str
    backend: str
    wanted: tuple[bool, ...]  # to x, y, u and v

    @staticmethod
    def of(*args: Any) -> Problem:
        """From the arguments of the op, in the order of its schema."""
        return Problem._make([*args[:_TENSORS], KernelArguments(*args[_TENSORS:-6]), *args[-6:-4], args[-4:]])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but those of the kernel."""
        return cast("tuple[Tensor | None, ...]", self[:_TENSORS])

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.x.dtype)

    def rows(self) -> tuple[cpu.Rows, cpu.Rows]:
        """x and y, which is x where there is none, in the accumulation dtype."""
        x, y, u, v, *directions = (None if t is None else t.to(self.dtype) for t in self.tensors)
        if y is None:
            y, directions[1] = x, directions[0]
        return cpu.Rows(x, u, *directions[::2]), cpu.Rows(y, v, *directions[1::2])  # type: ignore[arg-type]


def _evaluate(*args: Any) -> Results:
    """The results in the accumulation dtype. One not asked for is empty."""
    problem = Problem.of(*args)
    with without_autocast(problem.x.device):
        return cast(Results, tuple(problem.x.new_empty(0, dtype=problem.dtype) if t is None else t for t in _results(problem)))


def _results(problem: Problem) -> Sequence[Tensor | None]:
    (x, y), same, kernel = problem.rows(), problem.y is None, problem.kernel.unpack()
    on_triton, batch = runs_on_triton(problem.backend, problem.x), problem.x.shape[:-2]
    step = cpu.problems_at_once(x, y)
    if step and (batch or not on_triton):
        parts = [slice(n, n + step) for n in range(0, batch[0], step)] if batch else [...]
        found = [
            cpu.few_rows(kernel[0], read(kernel[1]), read(kernel[2]), _of(x, part), _of(y, part), same, problem.wanted) for part in parts
        ]
        return found[0] if len(found) == 1 else _joined(torch.cat, found)
    if batch:
        return _joined(torch.stack, [_results(_item(problem, n)) for n in range(batch[0])])
    if on_triton:
        return _on_triton(problem)
    centre = torch.zeros_like(x.points[0])
    if kernel[0].radial:
        centre = 0.5 * stable_mean(x.points) + 0.5 * stable_mean(y.points)
    zero = zero_if_finite(*(t for t in problem.tensors if t is not None)).to(problem.dtype)
    results = cpu.kernel_hvp(problem.kernel.sum(x.points.shape[1], x.points.device, None), x, y, same, centre, problem.wanted)
    return [None if t is None else t + zero for t in results]


def _of(rows: cpu.Rows, part: Any) -> cpu.Rows:
    return cpu.Rows(*(None if t is None else t[part] for t in rows))  # type: ignore[arg-type]


def _item(problem: Problem, n: int) -> Problem:
    return Problem._make([*(None if t is None else t[n] for t in problem.tensors), *problem[_TENSORS:]])


def _joined(join: Callable[[list[Tensor]], Tensor], found: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    return [None if parts[0] is None else join(cast("list[Tensor]", parts)) for parts in zip(*found, strict=True)]


def _on_triton(problem: Problem) -> Sequence[Tensor | None]:
    import fastvae.kernels.kernel_hvp as kernels
    from fastvae.kernels.quadratic_form import quadratic_form_backward

    kernel, bandwidth, weights = problem.kernel.unpack()
    found: list[Sequence[Tensor | None]] = []
    # A sum of unlike kernels takes a sweep for each.
    for weight, term, scale in terms_of(kernel):
        h, a = (
            factor * numbers if isinstance(numbers, Tensor) else [factor * number for number in numbers]
            for factor, numbers in ((scale, bandwidth), (weight, weights))
        )
        numbers = kernel_arguments(term, h, a).numbers(problem.x)
        directions = problem.tensors[4:] if problem.y is not None else (problem.x_direction, None, None, None)
        found.append(kernels.kernel_hvp(numbers, *problem[:4], directions, problem.wanted, matmul_precision(problem.precision)))
    if problem.y is None and problem.u_direction is not None and problem.wanted[0]:
        # e of (2), symmetric, is a quadratic form.
        columns = torch.cat([problem.v, problem.u_direction], 1)
        one = torch.eye(problem.v.shape[1], dtype=torch.float64, device=problem.x.device)
        upstream = torch.kron(one.new_tensor([[0.0, 0.5], [0.5, 0.0]]), one)
        numbers = problem.kernel.numbers(problem.x)
        found.append(
            [quadratic_form_backward(numbers, problem.x, columns, upstream, matmul_precision(problem.precision)), None, None, None]
        )
    if len(found) == 1:
        return found[0]
    given = ([t for t in parts if t is not None] for parts in zip(*found, strict=True))
    return [torch.stack(parts).sum(0) if parts else None for parts in given]


def _fake(*args: Any) -> Results:
    problem = Problem.of(*args)
    shapes = (None if t is None else t.shape for t in problem[:4])
    return cast(
        Results,
        tuple(
            problem.x.new_empty(shape if want and shape is not None else (0,), dtype=problem.dtype)
            for shape, want in zip(shapes, problem.wanted, strict=True)
        ),
    )


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """A Hessian is symmetric: the gradient to its direction is its product with the upstream."""
    arguments, _ = saved_arguments(ctx)
    wanted = ctx.needs_input_grad[4:_TENSORS]
    to_directions: list[Tensor | None] = [None] * 4
    # A result that was not asked for is empty, as its upstream may be.
    directions = [None if grad is None or not grad.numel() else grad for grad in grads]
    if any(grad is not None for grad in directions):
        found = _apply(*arguments[:4], *directions, *arguments[_TENSORS:-4], *wanted)
        to_directions = [t if want else None for t, want in zip(found, wanted, strict=True)]
    return *[None] * 4, *to_directions, *[None] * (len(arguments) - _TENSORS)


def _jvp(ctx: Any, *tangents: Tensor | None) -> list[Tensor]:
    arguments, _ = saved_arguments(ctx)
    if any(tangent is not None for tangent in tangents[:4]):
        raise NotImplementedError("a second derivative of fastvae has no derivative: pass backend='reference', which is dense and has one")
    return list(_apply(*arguments[:4], *tangents[4:_TENSORS], *arguments[_TENSORS:]))


kernel_hvp_op = custom_op("kernel_hvp", SCHEMA, _evaluate, _fake, batched=_TENSORS)
_apply = differentiable("KernelHVP", "a second derivative of fastvae", _TENSORS, kernel_hvp_op, _evaluate, save_inputs, _backward, _jvp)


def kernel_hvp(name: str, *args: Any) -> list[Tensor | None]:
    """The results that are wanted, differentiable to the directions alone; arguments of `torch.ops.fastvae.kernel_hvp`.

    Args:
        name: what errors call the operation.
    """
    if not torch.is_grad_enabled() and not needs_dispatcher(*args[:_TENSORS]):
        results = _evaluate(*args)
    else:
        results = _apply(*(forbid_third_derivative(name, t) for t in args[:4]), *args[4:])
    return [t if want else None for t, want in zip(results, args[-4:], strict=True)]
