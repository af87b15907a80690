"""The custom ops of reparameterise + KL and their derivatives. Formulas (1) to (3) of `fastvae.reference.reparameterize_kl`.

`noise` is ε (N, D), or a seed, an int64 of shape (1,), from which the Triton kernels generate ε, and again in the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastvae.cpu import reparameterize_kl as cpu
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton
from fastvae.ops.common import autograd_function, custom_op, differentiable, needs_grad

FORWARD_SCHEMA = "(Tensor mu, Tensor logvar, Tensor noise, bool per_dimension, str backend) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor noise, bool per_dimension, str backend) -> (Tensor, Tensor)"
)


def _evaluate(mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str) -> tuple[Tensor, Tensor]:
    """z (N, D), and KL (N,) or per dimension (N, D) in the accumulation dtype."""
    if not runs_on_triton(backend, mu):
        _refuse_seed(noise)
        return cpu.forward(mu, logvar, noise, per_dimension)
    import fastvae.kernels.reparameterize_kl as kernels

    z, kl = _outputs(mu, per_dimension)
    kernels.forward(_rows(mu), _rows(logvar), noise.contiguous(), z, kl)
    return z, kl


def _outputs(mu: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape if per_dimension else mu.shape[:1], dtype=accumulation_dtype(mu.dtype))


def _gradient_outputs(mu: Tensor) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def _gradients(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """dμ and dlogvar (N, D)."""
    if not runs_on_triton(backend, mu):
        _refuse_seed(noise)
        return cpu.backward(grad_z, grad_kl, mu, logvar, noise, per_dimension)
    import fastvae.kernels.reparameterize_kl as kernels

    grads = _gradient_outputs(mu)
    kernels.backward(grad_z.contiguous(), grad_kl.contiguous(), _rows(mu), _rows(logvar), noise.contiguous(), *grads)
    return grads


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows. A view of half of an encoder's result is not copied."""
    return x if x.stride(1) == 1 else x.contiguous()


def _refuse_seed(noise: Tensor) -> None:
    if not noise.is_floating_point():
        raise NotImplementedError(
            "a seed is for the Triton kernels only: pass the noise itself, which a CPU keeps faster than it draws it twice"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The noise and not z: the difference z − μ has lost the digits of σ·ε below the rounding of μ, which in bfloat16 are many.
    mu, logvar, noise, ctx.per_dimension, ctx.backend = inputs
    ctx.save_for_backward(mu, logvar, noise)


def _backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    args = (grad_z, grad_kl, *ctx.saved_tensors, ctx.per_dimension, ctx.backend)
    if needs_grad(*args[:4]):
        grads = _DifferentiableBackward.apply(*args)
    else:
        grads = backward_op(*args) if needs_dispatcher(*args[:5]) else _gradients(*args)
    return *grads, None, None, None


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.per_dimension, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, grad_grad_mu: Tensor, grad_grad_logvar: Tensor) -> tuple[Tensor | None, ...]:
    """The derivative of formula (3), in plain PyTorch, as second derivatives are rare."""
    dz, dkl, mu, logvar, noise = ctx.saved_tensors
    eps = epsilon(noise, mu, ctx.backend)
    var, half_noise = logvar.exp(), 0.5 * eps * (0.5 * logvar).exp()
    u, v = grad_grad_mu, grad_grad_logvar
    column = dkl if ctx.per_dimension else dkl[:, None]
    to_dkl = u * mu + 0.5 * v * (var - 1)
    to_logvar = 0.5 * v * (dz * half_noise + column * var)
    return (
        (u + v * half_noise).to(dz.dtype),
        (to_dkl if ctx.per_dimension else to_dkl.sum(1)).to(dkl.dtype),
        (u * column).to(mu.dtype),
        to_logvar.to(mu.dtype),
        None,
        None,
        None,
    )


def epsilon(noise: Tensor, mu: Tensor, backend: str) -> Tensor:
    """ε, also if `noise` is its seed."""
    if noise.is_floating_point():
        return noise
    zeros = torch.zeros_like(mu, dtype=accumulation_dtype(mu.dtype))
    return cast(Tensor, forward_op(zeros, zeros, noise, False, backend)[0])  # z where μ = 0 and σ = 1


forward_op = custom_op(
    "reparameterize_kl", FORWARD_SCHEMA, _evaluate, lambda mu, logvar, noise, per_dimension, backend: _outputs(mu, per_dimension)
)
backward_op = custom_op("reparameterize_kl_backward", BACKWARD_SCHEMA, _gradients, lambda grad_z, grad_kl, mu, *_: _gradient_outputs(mu))
_DifferentiableBackward = autograd_function("ReparameterizeKLBackward", "reparameterize_kl", backward_op, _setup_double, _double_backward)
# (z, KL), differentiable; arguments of `torch.ops.fastvae.reparameterize_kl`.
apply_reparameterize_kl = differentiable("ReparameterizeKL", "reparameterize_kl", 3, forward_op, _evaluate, _setup_context, _backward)
