"""The custom op and the autograd.Function of MMD²: formulas (1) to (3) of `fastvae.reference.mmd`, around one sweep of a backend.

The op returns the value and the gradients that the call asks for, all from one sweep; the loss is a scalar, so that backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.checks import sum_to_one
from fastvae.cpu import mmd as cpu
from fastvae.ops.common import accumulation_dtype, forbid_second_derivative, needs_grad
from fastvae.radial import PairSums, Radial, rbf_normal_mean_exponent, rbf_normal_self_exponent

SCHEMA = (
    "(Tensor x, Tensor? y, Tensor? x_weights, Tensor? y_weights, Tensor bandwidth, Tensor bandwidth_weights, "
    "bool unbiased, str precision, str backend, bool x_grad, bool y_grad) -> (Tensor, Tensor, Tensor)"
)


class Problem(NamedTuple):
    """The arguments of the op, in the order of its schema."""

    x: Tensor
    y: Tensor | None
    x_weights: Tensor | None
    y_weights: Tensor | None
    bandwidth: Tensor
    bandwidth_weights: Tensor
    unbiased: bool
    precision: str
    backend: str
    x_grad: bool
    y_grad: bool


Result = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("fastvae::mmd", mutates_args=(), schema=SCHEMA)
def mmd_op(*args: Any) -> Result:
    """(MMD², its gradient to x, its gradient to y) in the accumulation dtype; y = None is N(0, I). A gradient not asked for is empty."""
    problem = Problem(*args)
    return _triton(*args) if problem.backend == "triton" else _evaluate(cpu.pair_sums, problem)


def _triton(*args: Any) -> Result:
    from fastvae.kernels import mmd as kernels

    problem = Problem(*args)
    precision = problem.precision or torch.get_float32_matmul_precision()
    return _evaluate(partial(kernels.pair_sums, precision=precision), problem)


mmd_op.register_kernel("cuda")(_triton)


@mmd_op.register_fake
def _fake(*args: Any) -> Result:
    problem = Problem(*args)
    x, y, dtype = problem.x, problem.y, accumulation_dtype(problem.x.dtype)
    grad_x = x.new_empty(x.shape if problem.x_grad else (0,), dtype=dtype)
    grad_y = x.new_empty(y.shape if problem.y_grad and y is not None else (0,), dtype=dtype)
    return x.new_empty((), dtype=dtype), grad_x, grad_y


def _evaluate(pair_sums: Callable[..., PairSums], problem: Problem) -> Result:
    x, y, x_weights, y_weights, bandwidth, bandwidth_weights, unbiased, *_, x_grad, y_grad = problem
    with torch.autocast(x.device.type, enabled=False):
        dtype = accumulation_dtype(x.dtype)
        x = x.to(dtype)
        y = None if y is None else y.to(dtype)
        # MMD² does not change when both samples move; float32 is useless far from the origin.
        if y is None:
            centre = x.mean(0)
            mean_squared_distance = (x.square().sum(1, dtype=torch.float64) + x.shape[1]).mean()
        else:
            centre = 0.5 * (x.mean(0) + y.mean(0))
            mean_squared_distance = torch.stack([(z - centre).square().sum(1, dtype=torch.float64).mean() for z in (x, y)]).sum()
        kernel = Radial.of(bandwidth, bandwidth_weights, mean_squared_distance)
        p, q = (None if w is None else w.to(dtype) for w in (x_weights, y_weights))
        x_square, y_square = _sum_of_squares(x, p), 0.0 if y is None else _sum_of_squares(y, q)
        x_scale, y_scale = (1 / (1 - square) if unbiased else 1.0 for square in (x_square, y_square))
        sums = pair_sums(x, p, y, q, centre, kernel, x_scale, y_scale, x_grad, y_grad)

        value = x_scale * sums.within_x + y_scale * sums.within_y - 2 * sums.across
        if not unbiased:
            # The pairs i = j, exactly; the shifts cancel between the terms, as the weights of each sum to one.
            value = value + (x_square + y_square) * (kernel.weights @ (1 - kernel.shifts))
        grad_x = _gradient(x, p, sums.x_pull, kernel)
        grad_y = x.new_empty(0) if y is None else _gradient(y, q, sums.y_pull, kernel)
        if y is None:
            value = value + _prior_terms(x, p, kernel)
            if x_grad:
                grad_x += _prior_gradient(x, p, kernel)
        # One row alone has no pair that would show that it is not finite.
        value = value + 0 * centre.sum()
        for weights in (x_weights, y_weights):
            value = value if weights is None else torch.where(sum_to_one(weights), value, torch.nan)
        return value.to(dtype), grad_x, grad_y


def _sum_of_squares(x: Tensor, weights: Tensor | None) -> float | Tensor:
    return 1 / x.shape[0] if weights is None else weights.double().square().sum()


def _row_weights(x: Tensor, weights: Tensor | None) -> float | Tensor:
    return 1 / x.shape[0] if weights is None else weights[:, None]


def _gradient(z: Tensor, weights: Tensor | None, pull: Tensor | None, kernel: Radial) -> Tensor:
    """2·w_i·Σ_j 2·w_j·φ'(d²_ij)·(z_i − z_j) with φ' = −Σ_b a_b·γ_b·k_b, from the pull of a sweep."""
    if pull is None:
        return z.new_empty(0)
    # In two factors: γ itself may be past the range of float32.
    scale = kernel.gamma[0].sqrt()
    return ((pull * scale.to(z.dtype)) * (_row_weights(z, weights) * (-4 * scale).to(z.dtype))).contiguous()


def _prior_terms(x: Tensor, p: Tensor | None, kernel: Radial) -> Tensor:
    """−2·Σ_i p_i·(E_y k(x_i, y) − shift) + E k(y, y') − shift."""
    cross = _shifted_exp(rbf_normal_mean_exponent(x, kernel.bandwidth), kernel.shifts) @ kernel.weights
    mean_cross = cross.mean() if p is None else p.double() @ cross
    return _shifted_exp(rbf_normal_self_exponent(x.shape[1], kernel.bandwidth), kernel.shifts) @ kernel.weights - 2 * mean_cross


def _shifted_exp(exponent: Tensor, shifts: Tensor) -> Tensor:
    return torch.where(shifts > 0, exponent.expm1(), exponent.exp())


def _prior_gradient(x: Tensor, p: Tensor | None, kernel: Radial) -> Tensor:
    slope = rbf_normal_mean_exponent(x, kernel.bandwidth).exp() @ (kernel.weights / (kernel.bandwidth.square() + 1))
    return x * (2 * slope[:, None].to(x.dtype) * _row_weights(x, p))


def apply_mmd(*args: Any) -> Tensor:
    """MMD², differentiable; arguments of `torch.ops.fastvae.mmd` without the last two, which say what gradients are wanted."""
    x, y = args[:2]
    flags = (needs_grad(x), needs_grad(y))
    # Outside of the compiler always by way of the Function, which refuses forward-mode derivatives: the op would drop them.
    if not any(flags) and torch.compiler.is_compiling():
        return cast(Tensor, mmd_op(*args, *flags)[0])
    return cast(Tensor, MMD.apply(*args, *flags)[0])  # type: ignore[no-untyped-call]


class MMD(torch.autograd.Function):
    """(MMD², gradient to x, gradient to y); only the first is differentiable. Arguments of `torch.ops.fastvae.mmd`."""

    @staticmethod
    def forward(*args: Any) -> Result:
        return cast(Result, mmd_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        _, grad_x, grad_y = output
        ctx.mark_non_differentiable(grad_x, grad_y)
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    # The inputs are not needed but to refuse their second derivative: one that needs no gradient may change in place meanwhile.
    x, y = (t if needed else None for t, needed in zip(inputs[:2], ctx.needs_input_grad[:2], strict=True))
    ctx.save_for_backward(x, y, *output[1:])


def _backward(ctx: Any, grad_value: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *saved = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * len(Problem._fields)
    for n, (source, grad) in enumerate(zip((x, y), saved, strict=True)):
        if ctx.needs_input_grad[n]:
            if grad.shape != source.shape:
                raise RuntimeError("fastvae::mmd was called without the gradient that backward needs: call fastvae.mmd, which asks for it")
            grad = forbid_second_derivative("mmd", grad, x, y)
            grads[n] = (grad_value * grad).to(source.dtype)
    return tuple(grads)


mmd_op.register_autograd(_backward, setup_context=_setup_context)
