"""The custom ops and the autograd.Function of K(x, y)·v: formulas (1) and (2) of `fastvae.reference.kernel_matmul`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae import checks
from fastvae.cpu import kernel_matmul as cpu
from fastvae.cpu import small
from fastvae.kernel_sums import KernelNumbers, KernelSum, as_vector, stable_mean
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    accumulation_dtype,
    compiled_op,
    forbid_second_derivative,
    kernel_numbers,
    matmul_precision,
    no_forward_mode,
    vmap_by_loop,
    without_autocast,
    without_grad,
    zero_if_finite,
)

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
        """For the CPU: the kernel, x, y and v in the accumulation dtype, and the point to see x and y from."""
        dtype = accumulation_dtype(self.x.dtype)
        x, y, v = (t.to(dtype) for t in (self.x, self.y, self.v))
        family, bandwidth, weights = kernel_numbers(self)
        centre = 0.5 * stable_mean(x) + 0.5 * stable_mean(y) if family.radial else torch.zeros_like(x[0])
        distance = None
        if shifted:
            distance = torch.stack([(z - centre).square().sum(1, dtype=torch.float64).mean() for z in (x, y)]).sum()
        kernel = KernelSum.of(family, bandwidth, weights, x.shape[1], x.device, distance)
        return kernel, x, y, v, centre

    def rows(self) -> small.Rows | None:
        """For the CPU, if they are few."""
        dtype = accumulation_dtype(self.x.dtype)
        family, bandwidth, weights = kernel_numbers(self)
        return small.Rows.of(family, self.x.to(dtype), self.y.to(dtype), bandwidth, weights)

    def numbers(self) -> KernelNumbers:
        """For the kernels."""
        return KernelNumbers.of(*kernel_numbers(self), self.x.shape[1], False, self.x.device)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastvae::kernel_matmul", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def kernel_matmul_op(*args: Any) -> Tensor:
    """K(x, y)·v (N, C) in the accumulation dtype."""
    return _forward(*args)


def _forward(*args: Any) -> Tensor:
    problem = Problem(*args)
    if problem.backend == "triton" or problem.x.device.type == "cuda":
        return _triton(*args)
    with without_autocast(problem.x.device):
        if (rows := problem.rows()) is not None:
            return rows.matmul(problem.v.to(accumulation_dtype(problem.v.dtype)))
        kernel, x, y, v, centre = problem.plan(shifted=True)
        out = cpu.kernel_matmul(kernel, x, y, v, centre)
        # What the shifts leave out of each k, in closed form. A row that no v reaches would not show that it is not finite.
        left_out = v.sum(0, dtype=torch.float64) * kernel.kernel.value_at_zero * (kernel.weights @ kernel.shifts)
        return (out + left_out + zero_if_finite(x, y, v)).to(x.dtype).contiguous()


@torch.library.custom_op(
    "fastvae::kernel_matmul_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {ARGUMENTS}, bool x_grad, bool y_grad, bool v_grad, bool bandwidth_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
def kernel_matmul_backward_op(grad: Tensor, *args: Any) -> Gradients:
    """The gradients to x, y and v in the accumulation dtype, and to the one bandwidth in float64. One not asked for is empty."""
    return _gradients(grad, *args)


def _gradients(grad: Tensor, *args: Any) -> Gradients:
    problem, x_grad, y_grad, v_grad, bandwidth_grad = Problem(*args[:-4]), *args[-4:]
    if problem.backend == "triton" or problem.x.device.type == "cuda":
        return _triton_backward(grad, *args)
    with without_autocast(problem.x.device):
        if not bandwidth_grad and (rows := problem.rows()) is not None:
            dtype = accumulation_dtype(problem.v.dtype)
            # x and y are finite here.
            grad = grad.to(dtype) + zero_if_finite(problem.v).to(dtype)
            found = rows.gradients(problem.v.to(dtype), grad, x_grad, y_grad)
            return _wanted(problem, found, args[-4:])
        kernel, x, y, v, centre = problem.plan(shifted=False)
        grad = grad.to(x.dtype) + zero_if_finite(x, y, v).to(x.dtype)
        pulls = cpu.kernel_matmul_backward(kernel, x, y, v, grad, centre, x_grad or bandwidth_grad, y_grad or bandwidth_grad, v_grad)
        # ∂k/∂x is −2γ times what the pull sums, in two factors: γ itself may be past the range of float32.
        root = kernel.gamma[0].sqrt().to(x.dtype)
        gradients = [None if pull is None else (pull * root).mul_(-2 * root).contiguous() for pull in pulls[:2]]
        return _wanted(problem, [*gradients, pulls[2]], args[-4:])


def _triton(*args: Any) -> Tensor:
    from fastvae.kernels import kernel_matmul as kernels

    problem = Problem(*args)
    with without_autocast(problem.x.device):
        return cast(Tensor, kernels.kernel_matmul(problem.numbers(), problem.x, problem.y, problem.v, matmul_precision(problem.precision)))


def _triton_backward(grad: Tensor, *args: Any) -> Gradients:
    from fastvae.kernels import kernel_matmul as kernels

    problem, x_grad, y_grad, v_grad, bandwidth_grad = Problem(*args[:-4]), *args[-4:]
    flags = x_grad or bandwidth_grad, y_grad or bandwidth_grad, v_grad
    with without_autocast(problem.x.device):
        precision = matmul_precision(problem.precision)
        arguments = (problem.numbers(), problem.x, problem.y, problem.v, grad, *flags, precision)
        return _wanted(problem, kernels.kernel_matmul_backward(*arguments), args[-4:])


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


def _wanted(problem: Problem, grads: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> Gradients:
    empty = problem.x.new_empty(0, dtype=accumulation_dtype(problem.x.dtype))
    grad_bandwidth = empty.new_empty(0, dtype=torch.float64)
    if wanted[3]:
        # By Euler's theorem. What gradients are rounded by is multiplied with a distance: the median stays with most rows where a few are
        # far. Of a sort, as PyTorch has no deterministic median on a GPU.
        family, bandwidth, _ = kernel_numbers(problem)
        rows = problem.x.shape[0] + problem.y.shape[0]
        centre = torch.cat([problem.x, problem.y]).sort(0).values[rows // 2].double() if family.radial else 0.0
        radial = [((z.double() - centre) * g).sum() for z, g in zip((problem.x, problem.y), grads, strict=False) if g is not None]
        grad_bandwidth = -torch.stack(radial).sum() / as_vector(bandwidth, empty.device)[:1]
    found = (empty.new_empty(0) if g is None or not want else g for g, want in zip(grads, wanted, strict=False))
    return cast(Gradients, (*found, grad_bandwidth))


def apply_kernel_matmul(*args: Any) -> Tensor:
    """K(x, y)·v, differentiable; arguments of `torch.ops.fastvae.kernel_matmul`."""
    if torch.compiler.is_compiling():
        return cast(Tensor, compiled_op("kernel_matmul", kernel_matmul_op, *args))
    function = KernelMatmul if checks.needs_dispatcher(*args[:3]) else _PlainKernelMatmul
    return cast(Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


class KernelMatmul(torch.autograd.Function):
    """K(x, y)·v. Arguments of `torch.ops.fastvae.kernel_matmul`."""

    generate_vmap_rule = True
    jvp = no_forward_mode("kernel_matmul")

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return cast(Tensor, kernel_matmul_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


class _PlainKernelMatmul(torch.autograd.Function):
    """`KernelMatmul` without `setup_context` and the dispatcher."""

    jvp = KernelMatmul.jvp

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _setup_context(ctx, args, args[0])
        return _forward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sources = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    gradients_of = kernel_matmul_backward_op if checks.needs_dispatcher(grad, *sources[:3]) else _gradients
    gradients = without_grad(gradients_of, grad, *sources, *ctx.options, *wanted)
    grads: list[Tensor | None] = [None] * len(Problem._fields)
    for n, want in enumerate(wanted):
        if want:
            grads[n] = forbid_second_derivative("kernel_matmul", gradients[n].to(sources[n]), grad, *sources[:4])
    return tuple(grads)


for op in (kernel_matmul_op, kernel_matmul_backward_op):
    vmap_by_loop(op)
kernel_matmul_op.register_autograd(_backward, setup_context=_setup_context)
