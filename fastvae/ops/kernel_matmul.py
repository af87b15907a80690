"""The custom ops and the autograd.Function of K(x, y)·v: formulas (1) and (2) of `fastvae.reference.kernel_matmul`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import kernel_matmul as cpu
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    accumulation_dtype,
    forbid_second_derivative,
    kernel_numbers,
    matmul_precision,
    zero_if_finite,
)
from fastvae.radial import KernelSum, middle

ARGUMENTS = f"Tensor x, Tensor y, Tensor v, {KERNEL_SCHEMA}, str precision, str backend"


class Problem(NamedTuple):
    """The arguments of the forward op, in the order of its schema."""

    x: Tensor
    y: Tensor
    v: Tensor
    bandwidth: Tensor | None
    bandwidth_weights: Tensor | None
    bandwidth_numbers: list[float]
    weight_numbers: list[float]
    kernel: str
    kernel_parameters: list[float]
    precision: str
    backend: str

    def plan(self, shifted: bool) -> tuple[KernelSum, Tensor, Tensor, Tensor, Tensor]:
        """The kernel, x, y and v in the accumulation dtype, and the point to see x and y from."""
        dtype = accumulation_dtype(self.x.dtype)
        x, y, v = (t.to(dtype) for t in (self.x, self.y, self.v))
        family, bandwidth, weights = kernel_numbers(self)
        centre = 0.5 * (middle(x) + middle(y)) if family.radial else torch.zeros_like(x[0])
        distance = None
        if shifted:
            distance = torch.stack([(z - centre).square().sum(1, dtype=torch.float64).mean() for z in (x, y)]).sum()
        kernel = KernelSum.of(family, bandwidth, weights, x.shape[1], x.device, distance)
        return kernel, x, y, v, centre


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastvae::kernel_matmul", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def kernel_matmul_op(*args: Any) -> Tensor:
    """K(x, y)·v (N, C) in the accumulation dtype."""
    return _forward(Problem(*args))


@torch.library.custom_op(
    "fastvae::kernel_matmul_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {ARGUMENTS}, bool x_grad, bool y_grad, bool v_grad, bool bandwidth_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
def kernel_matmul_backward_op(grad: Tensor, *args: Any) -> Gradients:
    """The gradients to x, y and v in the accumulation dtype, and to the one bandwidth in float64. One not asked for is empty."""
    return _backward_sweep(grad, Problem(*args[:-4]), *args[-4:])


def _cuda_forward(*args: Any) -> Tensor:
    return _forward(Problem(*args)._replace(backend="triton"))


def _cuda_backward(grad: Tensor, *args: Any) -> Gradients:
    return _backward_sweep(grad, Problem(*args[:-4])._replace(backend="triton"), *args[-4:])


kernel_matmul_op.register_kernel("cuda")(_cuda_forward)
kernel_matmul_backward_op.register_kernel("cuda")(_cuda_backward)


@kernel_matmul_op.register_fake
def _fake(*args: Any) -> Tensor:
    problem = Problem(*args)
    return problem.x.new_empty((problem.x.shape[0], problem.v.shape[1]), dtype=accumulation_dtype(problem.x.dtype))


@kernel_matmul_backward_op.register_fake
def _backward_fake(grad: Tensor, *args: Any) -> Gradients:
    problem, wanted = Problem(*args[:-4]), args[-4:]
    dtype = accumulation_dtype(problem.x.dtype)
    x, y, v = (t.new_empty(t.shape if want else (0,), dtype=dtype) for t, want in zip(problem[:3], wanted, strict=False))
    return x, y, v, problem.x.new_empty(1 if wanted[3] else 0, dtype=torch.float64)


def _forward(problem: Problem) -> Tensor:
    with torch.autocast(problem.x.device.type, enabled=False):
        kernel, x, y, v, centre = problem.plan(shifted=True)
        if problem.backend == "triton":
            from fastvae.kernels import kernel_matmul as kernels

            precision = matmul_precision(problem.precision)
            out = kernels.kernel_matmul(kernel, x, y, v, centre, precision)
        else:
            out = cpu.kernel_matmul(kernel, x, y, v, centre)
        # A row that no v reaches would not show that it is not finite.
        # What the shifts leave out of each k, in closed form.
        left_out = v.sum(0, dtype=torch.float64) * kernel.kernel.at_zero * (kernel.weights @ kernel.shifts)
        return cast(Tensor, (out + left_out + zero_if_finite(x, y, v)).to(x.dtype).contiguous())


def _backward_sweep(grad: Tensor, problem: Problem, x_grad: bool, y_grad: bool, v_grad: bool, bandwidth_grad: bool) -> Gradients:
    with torch.autocast(problem.x.device.type, enabled=False):
        kernel, x, y, v, centre = problem.plan(shifted=False)
        grad = grad.to(x.dtype) + zero_if_finite(x, y, v).to(x.dtype)
        arguments = (kernel, x, y, v, grad, centre, x_grad or bandwidth_grad, y_grad or bandwidth_grad, v_grad)
        if problem.backend == "triton":
            from fastvae.kernels import kernel_matmul as kernels

            precision = matmul_precision(problem.precision)
            pulls = kernels.kernel_matmul_backward(*arguments, precision)
        else:
            pulls = cpu.kernel_matmul_backward(*arguments)
        # ∂k/∂x is −2γ times what the pull sums.
        scale = -2 * kernel.gamma[0]
        gradients = [None if pull is None else (pull * scale.to(pull.dtype)).contiguous() for pull in pulls[:2]]
        grad_bandwidth = x.new_empty(0, dtype=torch.float64)
        if bandwidth_grad:
            # As in `fastvae.ops.mmd`, by Euler's theorem.
            radial = [((z - centre).double() * g).sum() for z, g in zip((x, y), gradients, strict=True) if g is not None]
            grad_bandwidth = -torch.stack(radial).sum() / kernel.bandwidth[:1]
        wanted = zip((*gradients, pulls[2]), (x_grad, y_grad, v_grad), strict=True)
        grad_x, grad_y, grad_v = (x.new_empty(0) if g is None or not want else g for g, want in wanted)
        return grad_x, grad_y, grad_v, grad_bandwidth


def apply_kernel_matmul(*args: Any) -> Tensor:
    """K(x, y)·v, differentiable; arguments of `torch.ops.fastvae.kernel_matmul`."""
    if torch.compiler.is_compiling():
        return cast(Tensor, kernel_matmul_op(*args))
    return cast(Tensor, KernelMatmul.apply(*args))  # type: ignore[no-untyped-call]


class KernelMatmul(torch.autograd.Function):
    """K(x, y)·v. Arguments of `torch.ops.fastvae.kernel_matmul`."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return cast(Tensor, kernel_matmul_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sources = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    gradients = kernel_matmul_backward_op(grad, *sources, *ctx.options, *wanted)
    grads: list[Tensor | None] = [None] * len(Problem._fields)
    for n, want in enumerate(wanted):
        if want:
            grads[n] = forbid_second_derivative("kernel_matmul", gradients[n].to(sources[n]), grad, *sources[:4])
    return tuple(grads)


kernel_matmul_op.register_autograd(_backward, setup_context=_setup_context)
