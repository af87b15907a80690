"""The custom ops of the kernel Stein discrepancy to N(0, I) and its derivatives. Formulas of `fastvae.reference.ksd_to_normal`.

The first op returns the value and the gradient from one sweep over the pairs; backward only scales the gradient. The second returns the
Hessian times a direction, from another sweep, of which second derivatives are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import ksd_to_normal as cpu
from fastvae.dispatch import accumulation_dtype, in_forward_mode, needs_dispatcher, runs_on_triton
from fastvae.kernel_sums import read
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    custom_op,
    differentiable,
    direction_of_all_ranks,
    dot,
    forbid_third_derivative,
    gradient_to,
    gradients_function,
    leaves,
    matmul_precision,
    needs_grad,
    problems_in_a_launch,
    refuse_tangents,
    save_arguments,
    save_inputs,
    saved_arguments,
    without_autocast,
)

SCHEMA = (
    f"(Tensor z, Tensor? all_z, {KERNEL_SCHEMA}, SymInt start, bool unbiased, str precision, str backend, str group, bool z_grad) "
    "-> (Tensor, Tensor)"
)
HVP_SCHEMA = (
    f"(Tensor z, Tensor direction, Tensor? all_z, Tensor? all_direction, {KERNEL_SCHEMA}, SymInt start, bool unbiased, str precision, "
    "str backend) -> Tensor"
)

Result = tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """The arguments of the op. z may have one batch dimension; with `all_z` it is the rows of that from `start` on.

    The value is then the share of these rows in that of all rows, and the gradient is that of the whole. `group` names the process group
    whose ranks hold the other rows.
    """

    z: Tensor
    all_z: Tensor | None
    kernel: KernelArguments
    start: int
    unbiased: bool
    precision: str
    backend: str
    group: str
    z_grad: bool

    @staticmethod
    def of(z: Tensor, all_z: Tensor | None, *others: Any) -> Problem:
        """From the arguments of the op, in the order of its schema."""
        return Problem(z, all_z, KernelArguments(*others[:-6]), *others[-6:])


def _evaluate(*args: Any) -> Result:
    """KSD² (...) and its gradient (..., N, D) in the accumulation dtype, empty if it is not asked for."""
    value, gradient = _evaluate_problem(Problem.of(*args))
    return value, value.new_empty(0) if gradient is None else gradient


def _evaluate_problem(problem: Problem) -> cpu.Result:
    with without_autocast(problem.z.device):
        return (_on_triton if runs_on_triton(problem.backend, problem.z) else _on_cpu)(problem)


def _on_triton(problem: Problem) -> cpu.Result:
    import fastvae.kernels.ksd_to_normal as kernels

    z, whole, numbers = problem.z, problem.z if problem.all_z is None else problem.all_z, problem.kernel.numbers(problem.z)
    arguments = problem.start, z.shape[-2], problem.z_grad, numbers, problem.unbiased, matmul_precision(problem.precision)
    found: list[cpu.Result] = [kernels.ksd_to_normal(part, *arguments) for part in _launches(whole)]
    gradients = [gradient for _, gradient in found if gradient is not None]
    return _joined([value for value, _ in found]), _joined(gradients) if gradients else None


def _launches(rows: Tensor) -> Sequence[Tensor]:
    """The problems of a batch that one launch takes together, or the only one."""
    return [rows] if rows.ndim == 2 else torch.split(rows, problems_in_a_launch(*rows.shape[1:]))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on_cpu(problem: Problem) -> cpu.Result:
    dtype = accumulation_dtype(problem.z.dtype)
    z = problem.z.to(dtype)
    if z.ndim == 2:
        value, gradient = _of_one(problem, z)
        return value.to(dtype), gradient
    parts: list[cpu.Result] = []
    for some in torch.split(z, max(1, cpu.problems_at_once(z.shape[-2]))):
        if (few := _of_few_rows(problem, some)) is not None:
            parts.append(few)
            continue
        # One problem at a time, whose tiles stay in cache.
        for one in some:
            value, gradient = _of_one(problem, one)
            parts.append((value[None], None if gradient is None else gradient[None]))
    gradients = [gradient for _, gradient in parts if gradient is not None]
    return torch.cat([value for value, _ in parts]).to(dtype), torch.cat(gradients) if gradients else None


def _of_few_rows(problem: Problem, z: Tensor) -> cpu.Result | None:
    if problem.all_z is not None or not cpu.problems_at_once(z.shape[-2]):
        return None
    kernel, bandwidth, weights = problem.kernel.unpack()
    h, a = (cast("tuple[float, ...]", read(numbers)) for numbers in (bandwidth, weights))
    arguments = kernel, h, a, z, problem.unbiased, problem.z_grad
    return cpu.near_origin(*arguments) or cpu.few_rows(*arguments)


def _of_one(problem: Problem, z: Tensor) -> cpu.Result:
    if (few := _of_few_rows(problem, z)) is not None:
        return few
    others: list[Tensor] = []
    if problem.all_z is not None:
        parts = problem.all_z[: problem.start], problem.all_z[problem.start + z.shape[0] :]
        others = [rows.to(z.dtype) for rows in parts if len(rows)]
    return cpu.ksd_to_normal(problem.kernel.sum(z.shape[-1], z.device, None), z, others, problem.unbiased, problem.z_grad)


def _fake(*args: Any) -> Result:
    problem = Problem.of(*args)
    z, dtype = problem.z, accumulation_dtype(problem.z.dtype)
    return z.new_empty(z.shape[:-2], dtype=dtype), z.new_empty(z.shape if problem.z_grad else (0,), dtype=dtype)


def _hessian_product(z: Tensor, direction: Tensor, all_z: Tensor | None, all_direction: Tensor | None, *others: Any) -> Tensor:
    """The Hessian of KSD² times a direction (..., N, D), in the accumulation dtype; rows of z of that of all rows."""
    problem = Problem.of(z, all_z, *others, "", False)
    with without_autocast(z.device):
        return (_hessian_on_triton if runs_on_triton(problem.backend, z) else _hessian_on_cpu)(problem, direction, all_direction)


def _hessian_on_triton(problem: Problem, direction: Tensor, all_direction: Tensor | None) -> Tensor:
    import fastvae.kernels.ksd_to_normal as kernels

    z, whole, numbers = problem.z, problem.z if problem.all_z is None else problem.all_z, problem.kernel.numbers(problem.z)
    arguments = problem.start, z.shape[-2], numbers, problem.unbiased, matmul_precision(problem.precision)
    parts = zip(_launches(whole), _launches(direction if all_direction is None else all_direction), strict=True)
    return _joined([kernels.hessian_product(*part, *arguments) for part in parts])


def _hessian_on_cpu(problem: Problem, direction: Tensor, all_direction: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(problem.z.dtype)
    z, direction = problem.z.to(dtype), direction.to(dtype)
    if z.ndim == 2:
        return _hessian_of_one(problem, z, direction, all_direction)
    parts: list[Tensor] = []
    size = max(1, cpu.problems_at_once(z.shape[-2]))
    for some, directions in zip(torch.split(z, size), torch.split(direction, size), strict=True):
        few = _hessian_of_few_rows(problem, some, directions)
        # One problem at a time, whose tiles stay in cache.
        singles = (_hessian_of_one(problem, *one, None)[None] for one in zip(some, directions, strict=True))
        parts += singles if few is None else [few]
    return torch.cat(parts)


def _hessian_of_few_rows(problem: Problem, z: Tensor, direction: Tensor) -> Tensor | None:
    if problem.all_z is not None or not cpu.problems_at_once(z.shape[-2]):
        return None
    kernel, bandwidth, weights = problem.kernel.unpack()
    h, a = (cast("tuple[float, ...]", read(numbers)) for numbers in (bandwidth, weights))
    return cpu.hessian_product_of_few_rows(kernel, h, a, z, direction, problem.unbiased)


def _hessian_of_one(problem: Problem, z: Tensor, direction: Tensor, all_direction: Tensor | None) -> Tensor:
    if (few := _hessian_of_few_rows(problem, z, direction)) is not None:
        return few
    others: list[tuple[Tensor, Tensor]] = []
    if problem.all_z is not None and all_direction is not None:
        parts = slice(problem.start), slice(problem.start + z.shape[0], None)
        pairs = ((problem.all_z[rows], all_direction[rows]) for rows in parts)
        others = [(rows.to(z.dtype), directions.to(z.dtype)) for rows, directions in pairs if len(rows)]
    return cpu.hessian_product(problem.kernel.sum(z.shape[-1], z.device, None), z, direction, others, problem.unbiased)


def _fake_hessian_product(z: Tensor, *others: Any) -> Tensor:
    return z.new_empty(z.shape, dtype=accumulation_dtype(z.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save_arguments(ctx, inputs, output[1:])


def _backward(ctx: Any, grad_value: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    arguments, (gradient,) = saved_arguments(ctx)
    grad_z = None
    if grad_value is not None and ctx.needs_input_grad[0]:
        grad_z = _gradient(grad_value, cast(Tensor, gradient), arguments[:-1])
    return grad_z, *[None] * (len(arguments) - 1)


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
    _refuse_tangents(tangents)
    arguments, (gradient,) = saved_arguments(ctx)
    z = arguments[0]
    one = z.new_ones(z.shape[:-2], dtype=accumulation_dtype(z.dtype))
    return dot([_gradient(one, cast(Tensor, gradient), arguments[:-1])], tangents[:1]), None


def _gradient(grad_value: Tensor, gradient: Tensor, arguments: Sequence[Any]) -> Tensor:
    """The gradient to z, from that of the value alone."""
    if not gradient.numel():
        raise RuntimeError("fastvae::ksd_to_normal was called without the gradient that backward needs: call fastvae.ksd_to_normal")
    if torch.is_grad_enabled() or in_forward_mode():
        return cast(Tensor, _Gradient.apply(grad_value, gradient, *leaves(arguments))[0])
    return gradient_to(arguments[0], gradient, grad_value)


def _directed(arguments: Sequence[Any], direction: Tensor | None) -> list[Tensor | None]:
    """The Hessian of KSD² times a direction, differentiable to that alone, in the dtype of z.

    `arguments` are those of the op but the last.
    """
    if direction is None:
        return [None]
    z, all_z, *options, group = arguments
    direction = direction.to(accumulation_dtype(z.dtype))
    everywhere = None if all_z is None else direction_of_all_ranks("z", direction, group)
    rows = forbid_third_derivative("ksd_to_normal", z)
    return [_apply_hessian(rows, direction, all_z, everywhere, *options).to(z.dtype)]


def _refuse_tangents(tangents: Sequence[Tensor | None]) -> None:
    """Of all arguments but z."""
    for argument, tangent in zip(("bandwidth", "bandwidth_weights"), tangents[2:], strict=False):
        refuse_tangents("ksd_to_normal", argument, tangent)


# The gradient to z.
_Gradient = gradients_function("ksd_to_normal", 1, _directed, _refuse_tangents)


def _hessian_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (z, _, *others), _ = saved_arguments(ctx)
    return None, _apply_hessian(z, grad, *others), *[None] * len(others)


def _hessian_jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
    (z, direction, *others), _ = saved_arguments(ctx)
    return cast(Tensor, _apply_hessian(z, torch.zeros_like(direction) if tangents[1] is None else tangents[1], *others))


ksd_op = custom_op("ksd_to_normal", SCHEMA, _evaluate, _fake)
hvp_op = custom_op("ksd_to_normal_hvp", HVP_SCHEMA, _hessian_product, _fake_hessian_product, batched=2)
_apply = differentiable("KSDToNormal", "ksd_to_normal", 2, ksd_op, _evaluate, _setup_context, _backward, _jvp)
_apply_hessian = differentiable(
    "KSDToNormalHVP", "a second derivative of ksd_to_normal", 4, hvp_op, _hessian_product, save_inputs, _hessian_backward, _hessian_jvp
)


def apply_ksd_to_normal(
    z: Tensor, all_z: Tensor | None, kernel: KernelArguments, start: int, unbiased: bool, precision: str, backend: str, group: str
) -> Tensor:
    """KSD², differentiable to z twice."""
    options = start, unbiased, precision, backend, group, needs_grad(z) or in_forward_mode()
    # A Function takes as long as a small problem.
    if not options[-1] and not needs_dispatcher(z, all_z):
        return _evaluate_problem(Problem(z, all_z, kernel, *options))[0]
    return cast(Tensor, _apply(z, all_z, *kernel, *options)[0])
