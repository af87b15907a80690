"""The custom ops of the kernel Stein discrepancy to N(0, I) and its derivatives. Formulas of `fastvae.reference.ksd_to_normal`.

The first op returns the value and the gradient from one sweep over the pairs; backward only scales the gradient. The second returns the
Hessian times a direction, from another sweep, of which second derivatives are made.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae.cpu import ksd_to_normal as cpu
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton
from fastvae.kernel_sums import read
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    custom_op,
    differentiable,
    forbid_derivative,
    forbid_second_derivative,
    loop_over_batch,
    matmul_precision,
    needs_grad,
    without_autocast,
)

SCHEMA = (
    f"(Tensor z, Tensor? all_z, {KERNEL_SCHEMA}, SymInt start, bool unbiased, str precision, str backend, bool z_grad) -> (Tensor, Tensor)"
)
HVP_SCHEMA = (
    f"(Tensor z, Tensor direction, Tensor? all_z, Tensor? all_direction, {KERNEL_SCHEMA}, SymInt start, bool unbiased, str precision, "
    "str backend) -> Tensor"
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


def _hessian_product(z: Tensor, direction: Tensor, all_z: Tensor | None, all_direction: Tensor | None, *others: Any) -> Tensor:
    """The Hessian of KSD² times a direction (..., N, D), in the accumulation dtype; rows of z of that of all rows."""
    problem = Problem.of(z, all_z, *others, False)
    with without_autocast(z.device):
        return (_hessian_on_triton if runs_on_triton(problem.backend, z) else _hessian_on_cpu)(problem, direction, all_direction)


def _hessian_on_triton(problem: Problem, direction: Tensor, all_direction: Tensor | None) -> Tensor:
    import fastvae.kernels.ksd_to_normal as kernels

    z, whole, numbers = problem.z, problem.z if problem.all_z is None else problem.all_z, problem.kernel.numbers(problem.z)
    arguments = numbers, problem.unbiased, matmul_precision(problem.precision)
    whole_direction = direction if all_direction is None else all_direction
    return cast(Tensor, kernels.hessian_product(whole, whole_direction, problem.start, z.shape[-2], *arguments))


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


class _Leaf(list[Any]):
    """A list that is one argument for `torch.vmap`, which takes other lists apart and fails to do the same to the tangents of a `jvp`."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    z, all_z, bandwidth, weights, *options = inputs
    ctx.options, ctx.is_share = options[:-1], all_z is not None
    ctx.save_for_backward(z if ctx.needs_input_grad[0] else None, output[1], bandwidth, weights)
    if _forward_mode():
        ctx.save_for_forward(z, output[1], bandwidth, weights)


def _backward(ctx: Any, grad_value: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # Unpacked once: activation checkpointing allows no more.
    z, gradient, *bandwidths = ctx.saved_tensors
    grad_z = None
    if grad_value is not None and z is not None:
        if not gradient.numel():
            raise RuntimeError("fastvae::ksd_to_normal was called without the gradient that backward needs: call fastvae.ksd_to_normal")
        if ctx.is_share:
            grad_z = _scaled(grad_value, forbid_second_derivative("ksd_to_normal", gradient, z), z)
        else:
            grad_z = _gradient(grad_value, gradient, z, bandwidths, ctx.options)
    return grad_z, *[None] * (len(ctx.options) + 4)


def _jvp(ctx: Any, z_tangent: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
    if ctx.is_share:
        raise NotImplementedError("ksd_to_normal of a process group has no derivative in forward mode: use reverse mode")
    if z_tangent is None:
        return None, None
    z, gradient, *bandwidths = ctx.saved_tensors
    if not torch._C._are_functorch_transforms_active():
        # A backward pass of this would see the tangent of z. Transforms of `torch.func` hide it.
        with forward_ad._set_fwd_grad_enabled(True):
            z = _primal(z)
    gradient = _gradient(gradient.new_ones(gradient.shape[:-2]), gradient, z, bandwidths, ctx.options)
    with forward_ad._set_fwd_grad_enabled(True):
        return (gradient.to(accumulation_dtype(z.dtype)) * z_tangent).sum((-2, -1)), None


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _primals(ctx: Any) -> list[Any]:
    """What was saved for a `jvp`, without the tangents of its own level; those of other levels stay.

    PyTorch switches forward mode off for all levels there, so that it has to be switched on.
    """
    return [None if t is None else _primal(t) for t in ctx.saved_tensors]


def _primal(t: Tensor) -> Tensor:
    return cast(Tensor, forward_ad.unpack_dual(t).primal)  # type: ignore[no-untyped-call]


def _vmap(function: Any, tensors: int, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule of a Function whose first arguments take any batch dimensions, and the next two, the bandwidths, take none."""
    if in_dims[tensors] is not None or in_dims[tensors + 1] is not None:
        return loop_over_batch(function.apply, info.batch_size, in_dims, args)
    pairs = zip(args[:tensors], in_dims, strict=False)
    batched = (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs)
    return function.apply(*batched, *args[tensors:]), 0


def _scaled(grad_value: Tensor, gradient: Tensor, z: Tensor) -> Tensor:
    """The gradient to z from that to the value (...)."""
    return (gradient * grad_value[..., None, None]).to(z.dtype)


def _gradient(grad_value: Tensor, gradient: Tensor, z: Tensor, bandwidths: list[Tensor | None], options: list[Any]) -> Tensor:
    """`_scaled`, differentiable. `options` are the arguments of the op after `bandwidths`, from `bandwidth_numbers` to `backend`."""
    if not torch.is_grad_enabled() and not _forward_mode():
        return _scaled(grad_value, gradient, z)
    return cast(Tensor, _Gradient.apply(grad_value, gradient, z, *bandwidths, *options))  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    """`_scaled`, of which `gradient` counts as a function of z."""

    @staticmethod
    def forward(grad_value: Tensor, gradient: Tensor, z: Tensor, *others: Any) -> Tensor:
        return _scaled(grad_value, gradient, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_value, gradient, z, *bandwidths = ctx.saved_tensors
        (direction,), to_value, to_z = grads, None, None
        if direction is not None and ctx.needs_input_grad[0]:
            one = torch.ones_like(grad_value)
            to_value = (_gradient(one, gradient, z, bandwidths, ctx.options).to(grad_value.dtype) * direction).sum((-2, -1))
        if direction is not None and ctx.needs_input_grad[2]:
            to_z = _scaled(grad_value, _directed(z, direction, bandwidths, ctx.options), z)
        return to_value, None, to_z, *[None] * (len(ctx.options) + 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        value_tangent, _, z_tangent, *_ = tangents
        tangent = None
        with forward_ad._set_fwd_grad_enabled(True):
            grad_value, gradient, z, *bandwidths = _primals(ctx)
            if value_tangent is not None:
                tangent = _gradient(value_tangent, gradient, z, bandwidths, ctx.options)
            if z_tangent is not None:
                part = _scaled(grad_value, _directed(z, z_tangent, bandwidths, ctx.options), z)
                tangent = part if tangent is None else tangent + part
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_Gradient, 3, info, in_dims, args)


_NO_THIRD_DERIVATIVE = "ksd_to_normal has no third derivative: pass backend='reference', which is dense and has one"


def _directed(z: Tensor, direction: Tensor, bandwidths: list[Tensor | None], options: list[Any]) -> Tensor:
    """The Hessian times a direction, differentiable to that alone."""
    z = forbid_derivative(_NO_THIRD_DERIVATIVE, z)
    return cast(Tensor, _HessianProduct.apply(z, direction, *bandwidths, *options))  # type: ignore[no-untyped-call]


class _HessianProduct(torch.autograd.Function):
    """`torch.ops.fastvae.ksd_to_normal_hvp` of (..., N, D), for z that `forbid_derivative` has returned."""

    @staticmethod
    def forward(z: Tensor, direction: Tensor, *others: Any) -> Tensor:
        rows, directions = (t.flatten(0, -3) if t.ndim > 3 else t for t in (z, direction))
        return cast(Tensor, hvp_op(rows, directions, None, None, *others)).reshape(z.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        z, direction, bandwidth, weights, *ctx.options = inputs
        ctx.dtype = direction.dtype
        ctx.save_for_backward(z, bandwidth, weights)
        ctx.save_for_forward(z, bandwidth, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, *bandwidths = ctx.saved_tensors
        # The Hessian is symmetric.
        to_direction = None if grads[0] is None else _directed(z, grads[0], bandwidths, ctx.options).to(ctx.dtype)
        return None, to_direction, *[None] * (len(ctx.options) + 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        if tangents[0] is not None:
            raise NotImplementedError(_NO_THIRD_DERIVATIVE)
        if tangents[1] is None:
            return None
        with forward_ad._set_fwd_grad_enabled(True):
            z, *bandwidths = _primals(ctx)
            return _directed(z, tangents[1], bandwidths, ctx.options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_HessianProduct, 2, info, in_dims, args)


ksd_op = custom_op("ksd_to_normal", SCHEMA, _evaluate, _fake)
hvp_op = custom_op("ksd_to_normal_hvp", HVP_SCHEMA, _hessian_product, _fake_hessian_product)
_apply = differentiable("KSDToNormal", "ksd_to_normal", 2, ksd_op, _evaluate, _setup_context, _backward, _jvp)


def apply_ksd_to_normal(
    z: Tensor, all_z: Tensor | None, kernel: KernelArguments, start: int, unbiased: bool, precision: str, backend: str
) -> Tensor:
    """KSD², differentiable to z."""
    forward_mode = _forward_mode()
    options = start, unbiased, precision, backend, needs_grad(z) or forward_mode
    # A Function takes as long as a small problem.
    if not options[-1] and not needs_dispatcher(z, all_z):
        return _evaluate_problem(Problem(z, all_z, kernel, *options))[0]
    arguments = (_Leaf(argument) if forward_mode and isinstance(argument, list) else argument for argument in kernel)
    return cast(Tensor, _apply(z, all_z, *arguments, *options)[0])
