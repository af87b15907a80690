"""The custom ops and the autograd.Function of β-TC-VAE's log densities: formulas (1) to (5) of `fastvae.reference.total_correlation`.

The op returns log q(z_i) and log q(z_id), which are also all that backward needs besides the inputs: it sweeps the pairs a second time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastvae.cpu import total_correlation as cpu
from fastvae.ops.common import accumulation_dtype, forbid_second_derivative, needs_grad, zero_if_finite
from fastvae.reference.total_correlation import log_weights

FORWARD_SCHEMA = (
    "(Tensor z, Tensor mu, Tensor logvar, SymInt dataset_size, SymInt offset, bool stratified, str backend) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_joint, Tensor grad_marginals, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginals, "
    "SymInt dataset_size, SymInt offset, bool stratified, str backend, bool z_grad, bool posterior_grad) -> (Tensor, Tensor, Tensor)"
)

Densities = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("fastvae::total_correlation", mutates_args=(), schema=FORWARD_SCHEMA)
def forward_op(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, offset: int, stratified: bool, backend: str) -> Densities:
    """log q(z_i) (N,) and log q(z_id) (N, D) in the accumulation dtype, of z (N, D) under posteriors (M, D).

    Row i of z is drawn from posterior offset + i, so that a share of a batch can be held against all of it.
    """
    if backend == "triton":
        return cast(Densities, _triton_forward(z, mu, logvar, dataset_size, offset, stratified, backend))
    return _forward(cpu, z, mu, logvar, dataset_size, offset, stratified)


@forward_op.register_kernel("cuda")
def _triton_forward(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, offset: int, stratified: bool, backend: str) -> Densities:
    from fastvae.kernels import total_correlation as kernels

    return _forward(kernels, z, mu, logvar, dataset_size, offset, stratified)


def _forward(module: Any, z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, offset: int, stratified: bool) -> Densities:
    with torch.autocast(z.device.type, enabled=False):
        joint, marginals = module.forward(z, mu, logvar, log_weights(mu.shape[0], dataset_size, stratified), offset)
        zero = zero_if_finite(z, mu, logvar).to(joint.dtype)
        return joint.add_(zero), marginals.add_(zero)


@forward_op.register_fake
def _fake_forward(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, offset: int, stratified: bool, backend: str) -> Densities:
    dtype = accumulation_dtype(z.dtype)
    return z.new_empty(z.shape[:1], dtype=dtype), z.new_empty(z.shape, dtype=dtype)


@torch.library.custom_op("fastvae::total_correlation_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def backward_op(*args: Any) -> Gradients:
    """dz (N, D), dμ and dlogvar (M, D), in the dtype of z; a gradient not asked for is empty."""
    if args[-3] == "triton":
        return cast(Gradients, _triton_backward(*args))
    return _backward_by(cpu, *args)


@backward_op.register_kernel("cuda")
def _triton_backward(*args: Any) -> Gradients:
    from fastvae.kernels import total_correlation as kernels

    return _backward_by(kernels, *args)


def _backward_by(module: Any, *args: Any) -> Gradients:
    *tensors, dataset_size, offset, stratified, _, z_grad, posterior_grad = args
    z, mu = tensors[2:4]
    with torch.autocast(z.device.type, enabled=False):
        grads = module.backward(*tensors, log_weights(mu.shape[0], dataset_size, stratified), offset, z_grad, posterior_grad)
        found = tuple(z.new_empty(0) if grad is None else grad.to(z.dtype) for grad in grads)
        return cast(Gradients, found)


@backward_op.register_fake
def _fake_backward(*args: Any) -> Gradients:
    z, mu, z_grad, posterior_grad = args[2], args[3], args[-2], args[-1]
    posterior = mu.shape if posterior_grad else (0,)
    return z.new_empty(z.shape if z_grad else (0,)), z.new_empty(posterior), z.new_empty(posterior)


def apply_total_correlation(*args: Any) -> Densities:
    """log q(z_i) and log q(z_id), differentiable; arguments of `torch.ops.fastvae.total_correlation`."""
    # Outside of the compiler always by way of the Function, which refuses forward-mode derivatives: the op would drop them.
    if not needs_grad(*args[:3]) and torch.compiler.is_compiling():
        return cast(Densities, forward_op(*args))
    return cast(Densities, TotalCorrelation.apply(*args))  # type: ignore[no-untyped-call]


class TotalCorrelation(torch.autograd.Function):
    """log q(z_i) and log q(z_id); arguments of `torch.ops.fastvae.total_correlation`."""

    @staticmethod
    def forward(*args: Any) -> Densities:
        return cast(Densities, forward_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Densities) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Densities) -> None:
    *tensors, ctx.dataset_size, ctx.offset, ctx.stratified, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_joint: Tensor, grad_marginals: Tensor) -> tuple[Tensor | None, ...]:
    z, mu, logvar, joint, marginals = ctx.saved_tensors
    z_grad, mu_grad, logvar_grad = ctx.needs_input_grad[:3]
    with torch.no_grad():
        grads = backward_op(
            grad_joint, grad_marginals, z, mu, logvar, joint, marginals,
            ctx.dataset_size, ctx.offset, ctx.stratified, ctx.backend, z_grad, mu_grad or logvar_grad,
        )  # fmt: skip
    found: list[Tensor | None] = []
    for grad, needed in zip(grads, (z_grad, mu_grad, logvar_grad), strict=True):
        sources = (grad_joint, grad_marginals, z, mu, logvar)
        found.append(forbid_second_derivative("total_correlation", grad, *sources) if needed else None)
    return *found, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
