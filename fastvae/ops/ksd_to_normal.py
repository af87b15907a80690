"""The custom op of the kernel Stein discrepancy to N(0, I) and its derivative. Formulas of `fastvae.reference.ksd_to_normal`.

The op returns the value and the gradient from one sweep over the pairs; backward only scales the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import ksd_to_normal as cpu
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton
from fastvae.kernel_sums import read
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    custom_op,
    differentiable,
    forbid_second_derivative,
    matmul_precision,
    needs_grad,
    without_autocast,
)

SCHEMA = (
    f"(Tensor z, Tensor? all_z, {KERNEL_SCHEMA}, SymInt start, bool unbiased, str precision, str backend, bool z_grad) -> (Tensor, Tensor)"
)

Result = tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """The arguments of the op. z may have one batch dimension; with `all_z` it is the rows of that from `start` on.

    The value is then the share of these rows in that of all rows, and the gradient is that of the whole.
    """

    z: Tensor
    all_z: Tensor | None
    kernel: KernelArguments
    start: int
    unbiased: bool
    precision: str
    backend: str
    z_grad: bool

    @staticmethod
    def of(z: Tensor, all_z: Tensor | None, *others: Any) -> Problem:
        """From the arguments of the op, in the order of its schema."""
        return Problem(z, all_z, KernelArguments(*others[:-5]), *others[-5:])


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
    arguments = numbers, problem.unbiased, matmul_precision(problem.precision)
    return cast(cpu.Result, kernels.ksd_to_normal(whole, problem.start, z.shape[-2], problem.z_grad, *arguments))


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)
    # z only to refuse its second derivative.
    ctx.save_for_backward(inputs[0] if ctx.needs_input_grad[0] else None, output[1])


def _backward(ctx: Any, grad_value: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    others = [None] * (ctx.arguments - 1)
    # Unpacked once: activation checkpointing allows no more.
    z, gradient = ctx.saved_tensors
    if grad_value is None or z is None:
        return (None, *others)
    if not gradient.numel():
        raise RuntimeError("fastvae::ksd_to_normal was called without the gradient that backward needs: call fastvae.ksd_to_normal")
    gradient = forbid_second_derivative("ksd_to_normal", gradient, z)
    return ((gradient * (grad_value[:, None, None] if grad_value.ndim else grad_value)).to(z.dtype), *others)


ksd_op = custom_op("ksd_to_normal", SCHEMA, _evaluate, _fake)
_apply = differentiable("KSDToNormal", "ksd_to_normal", 2, ksd_op, _evaluate, _setup_context, _backward)


def apply_ksd_to_normal(
    z: Tensor, all_z: Tensor | None, kernel: KernelArguments, start: int, unbiased: bool, precision: str, backend: str
) -> Tensor:
    """KSD², differentiable to z."""
    options = start, unbiased, precision, backend, needs_grad(z)
    # A Function takes as long as a small problem. One is needed to refuse derivatives in forward mode.
    if not options[-1] and not needs_dispatcher(z, all_z) and torch.autograd.forward_ad._current_level < 0:
        return _evaluate_problem(Problem(z, all_z, kernel, *options))[0]
    return cast(Tensor, _apply(z, all_z, *kernel, *options)[0])
