"""The custom ops of K(x, y)·v and their derivatives. Formulas (1) and (2) of `fastvae.reference.kernel_matmul`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import kernel_matmul as cpu
from fastvae.cpu.small import SmallKernelMatmul
from fastvae.dispatch import accumulation_dtype, in_forward_mode, needs_dispatcher, runs_on_triton, zero_if_finite
from fastvae.kernel_sums import KernelSum, stable_mean
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    autograd_function,
    bandwidth_gradient,
    custom_op,
    differentiable,
    forbid_bandwidth_derivative,
    leaves,
    matmul_precision,
    needs_grad,
    no_forward_mode,
    refuse_bandwidth_tangents,
    save_inputs,
    saved_arguments,
    without_autocast,
    without_grad,
)
from fastvae.ops.kernel_hvp import kernel_hvp, kernel_hvp_op

SCHEMA = f"Tensor x, Tensor y, Tensor v, {KERNEL_SCHEMA}, str precision, str backend"


class Problem(NamedTuple):
    """The arguments of the forward op."""

    x: Tensor
    y: Tensor
    v: Tensor
    kernel: KernelArguments
    precision: str
    backend: str

    @staticmethod
    def of(x: Tensor, y: Tensor, v: Tensor, *others: Any) -> Problem:
        """From the arguments of the op, in the order of its schema."""
        return Problem(x, y, v, KernelArguments(*others[:-2]), *others[-2:])

    def streamed(self, subtract_constant: bool) -> tuple[KernelSum, Tensor, Tensor, Tensor, Tensor]:
        """For the streaming path: the sum of kernels; x, y and v in the accumulation dtype; the centre of x and y."""
        dtype = accumulation_dtype(self.x.dtype)
        x, y, v = (t.to(dtype) for t in (self.x, self.y, self.v))
        radial = self.kernel.unpack()[0].radial
        centre = 0.5 * stable_mean(x) + 0.5 * stable_mean(y) if radial else torch.zeros_like(x[0])
        distance = None
        if subtract_constant:
            distance = torch.stack([(z - centre).square().sum(1, dtype=torch.float64).mean() for z in (x, y)]).sum()
        return self.kernel.sum(x.shape[1], x.device, distance), x, y, v, centre

    def small(self) -> SmallKernelMatmul | None:
        """For few rows on the CPU, otherwise None."""
        dtype = accumulation_dtype(self.x.dtype)
        kernel, bandwidth, weights = self.kernel.unpack()
        return SmallKernelMatmul.of(kernel, self.x.to(dtype), self.y.to(dtype), bandwidth, weights)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _evaluate(*args: Any) -> Tensor:
    """K(x, y)·v (N, C) in the accumulation dtype."""
    problem = Problem.of(*args)
    with without_autocast(problem.x.device):
        if runs_on_triton(problem.backend, problem.x):
            import fastvae.kernels.kernel_matmul as kernels

            arguments = problem.kernel.numbers(problem.x), *problem[:3], matmul_precision(problem.precision)
            return cast(Tensor, kernels.kernel_matmul(*arguments))
        if (small := problem.small()) is not None:
            return small.matmul(problem.v.to(accumulation_dtype(problem.v.dtype)))
        kernel, x, y, v, centre = problem.streamed(subtract_constant=True)
        out = cpu.kernel_matmul(kernel, x, y, v, centre)
        # A row far from all others gets zero for any v: it would not show numbers that are not finite.
        return (out + v.sum(0, dtype=torch.float64) * kernel.value_constant + zero_if_finite(x, y, v)).to(x.dtype).contiguous()


def _gradients(grad: Tensor, *args: Any) -> Gradients:
    """The gradients to x, y and v in the accumulation dtype, and to the single bandwidth in float64. One not asked for is empty."""
    problem, wanted = Problem.of(*args[:-4]), args[-4:]
    x_grad, y_grad, v_grad, bandwidth_grad = wanted
    flags = x_grad or bandwidth_grad, y_grad or bandwidth_grad, v_grad
    with without_autocast(problem.x.device):
        if runs_on_triton(problem.backend, problem.x):
            import fastvae.kernels.kernel_matmul as kernels

            arguments = problem.kernel.numbers(problem.x), *problem[:3], grad, *flags, matmul_precision(problem.precision)
            return _wanted(problem, kernels.kernel_matmul_backward(*arguments), wanted)
        if not bandwidth_grad and (small := problem.small()) is not None:
            dtype = accumulation_dtype(problem.v.dtype)
            # x and y are finite here.
            grad = grad.to(dtype) + zero_if_finite(problem.v).to(dtype)
            return _wanted(problem, small.gradients(problem.v.to(dtype), grad, x_grad, y_grad), wanted)
        kernel, x, y, v, centre = problem.streamed(subtract_constant=False)
        grad = grad.to(x.dtype) + zero_if_finite(x, y, v).to(x.dtype)
        *row_gradients, grad_v = cpu.kernel_matmul_backward(kernel, x, y, v, grad, centre, *flags)
        # ∂k/∂x is −2γ times the summand of a row gradient. In two factors, as γ itself may be out of the range of float32.
        root = kernel.gamma[0].sqrt().to(x.dtype)
        gradients = [None if g is None else (g * root).mul_(-2 * root).contiguous() for g in row_gradients]
        return _wanted(problem, [*gradients, grad_v], wanted)


def _fake(*args: Any) -> Tensor:
    problem = Problem.of(*args)
    return problem.x.new_empty((problem.x.shape[0], problem.v.shape[1]), dtype=accumulation_dtype(problem.x.dtype))


def _backward_fake(grad: Tensor, *args: Any) -> Gradients:
    problem, wanted = Problem.of(*args[:-4]), args[-4:]
    dtype = accumulation_dtype(problem.x.dtype)
    x, y, v = (t.new_empty(t.shape if want else (0,), dtype=dtype) for t, want in zip(problem[:3], wanted, strict=False))
    return x, y, v, problem.x.new_empty(1 if wanted[3] else 0, dtype=torch.float64)


def _wanted(problem: Problem, grads: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> Gradients:
    empty = problem.x.new_empty(0, dtype=accumulation_dtype(problem.x.dtype))
    grad_bandwidth = empty.new_empty(0, dtype=torch.float64)
    if wanted[3]:
        grad_bandwidth = bandwidth_gradient(problem.kernel, problem[:2], grads)
    found = (empty.new_empty(0) if g is None or not want else g for g, want in zip(grads, wanted, strict=False))
    return cast(Gradients, (*found, grad_bandwidth))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs, output)
    # Otherwise a constant bandwidth has a tangent of zeros.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    (arguments, _), wanted = saved_arguments(ctx), ctx.needs_input_grad[:4]
    if grad is None:
        return (None,) * len(arguments)
    if needs_grad(grad, *arguments[:5]) or in_forward_mode():
        *found, to_bandwidth = _DifferentiableBackward.apply(grad, *leaves(_numbers_forbidden(arguments)), *wanted)
        found.append(forbid_bandwidth_derivative("kernel_matmul", to_bandwidth) if wanted[3] else to_bandwidth)
    else:
        gradients_of = kernel_matmul_backward_op if needs_dispatcher(grad, *arguments[:3]) else _gradients
        found = without_grad(gradients_of, grad, *arguments, *wanted)
    grads = (t.to(source) if want else None for t, source, want in zip(found, arguments, wanted, strict=False))
    return *grads, *[None] * (len(arguments) - 4)


def _numbers_forbidden(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of the forward op, whose derivatives with respect to bandwidths and their weights raise."""
    numbers = (t if t is None else forbid_bandwidth_derivative("kernel_matmul", t) for t in arguments[3:5])
    return [*arguments[:3], *numbers, *arguments[5:]]


def _double_backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
    arguments, _ = saved_arguments(ctx)
    wanted = ctx.needs_input_grad
    given = [None if t is None or not t.numel() else t for t in directions[:3]]
    if all(t is None for t in given):
        return (None,) * len(arguments)
    # The upstream is u, and its gradient is that to u: the results of `kernel_hvp` are to x, y, u and v.
    found = _hessian_product(arguments, (given[0], given[1], None, given[2]), (wanted[1], wanted[2], wanted[0], wanted[3]))
    to_x, to_y, to_grad, to_v = found
    return to_grad, to_x, to_y, to_v, *[None] * (len(arguments) - 4)


def _hessian_product(arguments: Sequence[Any], directions: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """`kernel_hvp` of the arguments of the backward op."""
    grad, x, y, v, *options = arguments
    dtype = accumulation_dtype(x.dtype)
    given = (None if t is None else t.to(dtype) for t in directions)
    found = kernel_hvp("kernel_matmul", x, y, grad, v, *given, *options[:-4], *wanted)
    return [t if t is None else t.to(source.dtype) for t, source in zip(found, (x, y, grad, v), strict=True)]


def _double_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    refuse_bandwidth_tangents("kernel_matmul", *tangents[4:6])
    arguments, _ = saved_arguments(ctx)
    x, wanted = arguments[1], arguments[-4:-1]
    dtype = accumulation_dtype(x.dtype)
    to_grad, to_x, to_y, to_v = tangents[:4]
    found = _hessian_product(arguments, (to_x, to_y, to_grad, to_v), (wanted[0], wanted[1], False, wanted[2]))
    found = [found[0], found[1], found[3]]
    # Not None, which vmap takes for the result before it.
    rows = (x.new_empty(0, dtype=dtype) if t is None else t.to(dtype) for t in found)
    return *rows, x.new_zeros(int(arguments[-1]), dtype=torch.float64)


def _jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
    refuse_bandwidth_tangents("kernel_matmul", *tangents[3:5])
    x, y, v, *others = leaves(_numbers_forbidden(saved_arguments(ctx)[0]))
    given = [torch.zeros_like(t) if tangent is None else tangent for t, tangent in zip((x, y, v), tangents, strict=False)]
    return cast(Tensor, _Tangent.apply(x, y, v, *given, *others))  # type: ignore[no-untyped-call]


class _Tangent(torch.autograd.Function):
    """The directional derivative of K(x, y)·v along the tangents of x, y and v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        x, y, v, x_tangent, y_tangent, v_tangent, *options = args
        u = x.new_empty((x.shape[0], v.shape[1]), dtype=accumulation_dtype(x.dtype)).zero_()
        directions = x_tangent, y_tangent, None, v_tangent
        return cast(Tensor, kernel_hvp_op(x, y, u, v, *directions, *options, False, False, True, False)[2])

    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments, _ = saved_arguments(ctx)
        (x, y, v), tangents, options = arguments[:3], arguments[3:6], arguments[6:]
        wanted = ctx.needs_input_grad
        backward = grad, x, y, v, *options
        to_rows: list[Tensor | None] = [None] * 3
        if any(wanted[:3]):
            directions = tangents[0], tangents[1], None, tangents[2]
            to_x, to_y, _, to_v = _hessian_product([*backward, *wanted[:3], False], directions, (wanted[0], wanted[1], False, wanted[2]))
            to_rows = [to_x, to_y, to_v]
        to_tangents = _DifferentiableBackward.apply(*backward, *wanted[3:6], False)[:3]
        moved = (t.to(tangent) if want else None for t, tangent, want in zip(to_tangents, tangents, wanted[3:6], strict=True))
        return *to_rows, *moved, *[None] * len(options)

    jvp = no_forward_mode("a derivative of kernel_matmul in forward mode")


kernel_matmul_op = custom_op("kernel_matmul", f"({SCHEMA}) -> Tensor", _evaluate, _fake)
kernel_matmul_backward_op = custom_op(
    "kernel_matmul_backward",
    f"(Tensor grad, {SCHEMA}, bool x_grad, bool y_grad, bool v_grad, bool bandwidth_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _backward_fake,
)
_DifferentiableBackward = autograd_function(
    "KernelMatmulBackward", "kernel_matmul", kernel_matmul_backward_op, save_inputs, _double_backward, _double_jvp
)
# K(x, y)·v, differentiable twice; arguments of `torch.ops.fastvae.kernel_matmul`.
apply_kernel_matmul = differentiable("KernelMatmul", "kernel_matmul", 3, kernel_matmul_op, _evaluate, _setup_context, _backward, _jvp)
