"""The custom ops and the autograd.Function of vᵀKv: formulas (1) and (2) of `fastvae.reference.quadratic_form`.

The forward sweep of a differentiable form also takes the gradient for the upstream that the caller expects. Backward scales it where the
upstream is a multiple of that, and sweeps once more where it is not; on a GPU, where comparing the two would wait for it, always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import quadratic_form as cpu
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    accumulation_dtype,
    forbid_second_derivative,
    kernel_numbers,
    matmul_precision,
    needs_grad,
    without_autocast,
)
from fastvae.radial import KernelNumbers, KernelSum, middle

ARGUMENTS = f"Tensor z, Tensor v, {KERNEL_SCHEMA}, str precision, str backend"


class Problem(NamedTuple):
    """The arguments that describe K and v, in the order of the schemas."""

    z: Tensor
    v: Tensor
    bandwidth: Tensor | None
    bandwidth_weights: Tensor | None
    bandwidth_numbers: list[float]
    weight_numbers: list[float]
    kernel: str
    kernel_parameters: list[float]
    precision: str
    backend: str


@torch.library.custom_op(
    "fastvae::quadratic_form", mutates_args=(), schema=f"({ARGUMENTS}, bool diagonal, Tensor? expected) -> (Tensor, Tensor)"
)
def quadratic_form_op(*args: Any) -> tuple[Tensor, Tensor]:
    """S (C, C) or its diagonal (C,), float64, and the gradient to z from the expected upstream (C, C), empty without one."""
    *problem, diagonal, expected = args
    return _evaluate(Problem(*problem), expected, diagonal=diagonal)


@torch.library.custom_op(
    "fastvae::quadratic_form_backward",
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor upstream, Tensor? expected, Tensor expected_grad) -> Tensor",
)
def quadratic_form_backward_op(*args: Any) -> Tensor:
    """The gradient to z from the upstream (C, C)."""
    *problem, upstream, expected, expected_grad = args
    if expected is not None and expected_grad.numel() and upstream.device.type == "cpu":
        largest = expected.abs().argmax()
        ratio = upstream.reshape(-1)[largest] / expected.reshape(-1)[largest]
        rounding = 32 * torch.finfo(expected_grad.dtype).eps
        if torch.allclose(upstream, ratio * expected, rtol=rounding, atol=0):
            return cast(Tensor, (ratio * expected_grad).to(expected_grad.dtype))
    return _evaluate(Problem(*problem), upstream, values=False)[1]


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    *problem, diagonal, _ = args
    return _triton(Problem(*problem), None, True, diagonal)


def _cuda_backward(*args: Any) -> Tensor:
    *problem, upstream, _, _ = args
    return _triton(Problem(*problem), upstream, False, False)[1]


quadratic_form_op.register_kernel("cuda")(_cuda)
quadratic_form_backward_op.register_kernel("cuda")(_cuda_backward)


@quadratic_form_op.register_fake
def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    *problem, diagonal, expected = args
    z, v = problem[:2]
    shape = v.shape[1:] if diagonal else (v.shape[1], v.shape[1])
    gradient = expected is not None and z.device.type == "cpu"
    return z.new_empty(shape, dtype=torch.float64), z.new_empty(z.shape if gradient else (0,), dtype=accumulation_dtype(z.dtype))


@quadratic_form_backward_op.register_fake
def _backward_fake(*args: Any) -> Tensor:
    return cast(Tensor, args[0].new_empty(args[0].shape, dtype=accumulation_dtype(args[0].dtype)))


def _triton(problem: Problem, upstream: Tensor | None, values: bool, diagonal: bool) -> tuple[Tensor, Tensor]:
    from fastvae.kernels import quadratic_form as kernels

    z, dtype = problem.z, accumulation_dtype(problem.z.dtype)
    with without_autocast(z.device):
        numbers = KernelNumbers.of(*kernel_numbers(problem), z.shape[1], False, z.device)
        precision = matmul_precision(problem.precision)
        total, gradient = kernels.quadratic_form(numbers, z, problem.v.to(dtype), upstream, values, diagonal, precision)
        return total, z.new_empty(0, dtype=dtype) if gradient is None else gradient


def _evaluate(
    problem: Problem,
    upstream: Tensor | None,
    values: bool = True,
    diagonal: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    if problem.backend == "triton":
        return _triton(problem, upstream, values, diagonal)
    with without_autocast(problem.z.device):
        dtype = accumulation_dtype(problem.z.dtype)
        z, v = problem.z.to(dtype), problem.v.to(dtype)
        family, bandwidth, weights = kernel_numbers(problem)
        centre = middle(z) if family.radial else torch.zeros_like(z[0])
        distance = 2 * (z - centre).square().sum(1, dtype=torch.float64).mean()
        kernel = KernelSum.of(family, bandwidth, weights, z.shape[1], z.device, distance)
        total, pull = cpu.quadratic_form(kernel, z, v, centre, upstream, values, diagonal, progress)
        # What the shifts leave out of each pair, in closed form.
        exact = v.double()
        column_sums = exact.sum(0)
        if diagonal:
            pairs = column_sums.square() - exact.square().sum(0)
        else:
            pairs = column_sums[:, None] * column_sums - exact.T @ exact
        total = total + pairs * family.at_zero * (kernel.weights @ kernel.shifts) + 0 * centre.sum()
        if upstream is None or pull is None:
            return total, z.new_empty(0)
        coefficients = v @ (upstream + upstream.T).to(dtype)
        z = z - centre
        slope_shift = (kernel.weights * kernel.ratios) @ kernel.slope_shifts
        left_out = (coefficients @ v.sum(0))[:, None] * z - coefficients @ (v.T @ z)
        pull = pull + slope_shift.to(dtype) * left_out
        return total, (pull * (-2 * kernel.gamma[0]).to(dtype)).contiguous()


def apply_quadratic_form(*args: Any, diagonal: bool = False, expected: Tensor | None = None) -> Tensor:
    """S, differentiable to z; arguments of `Problem`, and the upstream to expect, known up to a factor."""
    expected = 0.5 * (expected + expected.T) if expected is not None and needs_grad(args[0]) else None
    if torch.compiler.is_compiling():
        return cast(Tensor, quadratic_form_op(*args, diagonal, expected)[0])
    return cast(Tensor, QuadraticForm.apply(*args, diagonal, expected)[0])  # type: ignore[no-untyped-call]


def quadratic_form_values(*args: Any, diagonal: bool = False, progress: Callable[[float], None] | None = None) -> Tensor:
    """S, not differentiable; `progress` is called with the fraction done, on a CPU only."""
    problem = Problem(*args)
    backend = "triton" if problem.z.device.type == "cuda" else problem.backend
    with torch.no_grad():
        return _evaluate(problem._replace(backend=backend), None, diagonal=diagonal, progress=progress)[0]


class QuadraticForm(torch.autograd.Function):
    """S and the gradient for the expected upstream. Arguments of `torch.ops.fastvae.quadratic_form`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", quadratic_form_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], inputs[-1], output[1])
    *ctx.options, ctx.diagonal, _ = inputs[4:]


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, expected, expected_grad = ctx.saved_tensors
    upstream = torch.diag(grad) if ctx.diagonal else 0.5 * (grad + grad.T)
    gradient = quadratic_form_backward_op(*tensors, *ctx.options, upstream, expected, expected_grad)
    gradient = forbid_second_derivative("quadratic_form", gradient.to(tensors[0].dtype), grad, tensors[0])
    return (gradient, *[None] * (len(Problem._fields) + 1))


quadratic_form_op.register_autograd(_backward, setup_context=_setup_context)
