"""The custom ops and the autograd.Function of reparameterise + KL: formulas (1) to (3) of `fastvae.reference.reparameterize_kl`.

`noise` is ε (N, D), or a seed, an int64 of shape (1,), from which the Triton kernels make ε, in the backward pass again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastvae import checks
from fastvae.cpu import reparameterize_kl as cpu
from fastvae.ops.common import accumulation_dtype, compiled_op, needs_grad, no_forward_mode, vmap_by_loop

FORWARD_SCHEMA = "(Tensor mu, Tensor logvar, Tensor noise, bool per_dimension, str backend) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor noise, bool per_dimension, str backend) -> (Tensor, Tensor)"
)


@torch.library.custom_op("fastvae::reparameterize_kl", mutates_args=(), schema=FORWARD_SCHEMA)
def forward_op(mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str) -> tuple[Tensor, Tensor]:
    """z (N, D) and KL in the accumulation dtype, (N,) or per dimension (N, D)."""
    return _forward(mu, logvar, noise, per_dimension, backend)


def _forward(mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str) -> tuple[Tensor, Tensor]:
    if backend != "triton" and mu.device.type != "cuda":
        _refuse_seed(noise)
        return cpu.forward(mu, logvar, noise, per_dimension)
    from fastvae.kernels import reparameterize_kl as kernels

    z, kl = _outputs(mu, per_dimension)
    kernels.forward(_rows(mu), _rows(logvar), noise.contiguous(), z, kl)
    return z, kl


@forward_op.register_fake
def _fake_forward(mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _outputs(mu, per_dimension)


def _outputs(mu: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape if per_dimension else mu.shape[:1], dtype=accumulation_dtype(mu.dtype))


@torch.library.custom_op("fastvae::reparameterize_kl_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def backward_op(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """dμ and dlogvar (N, D)."""
    return _gradients(grad_z, grad_kl, mu, logvar, noise, per_dimension, backend)


def _gradients(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend != "triton" and mu.device.type != "cuda":
        _refuse_seed(noise)
        return cpu.backward(grad_z, grad_kl, mu, logvar, noise, per_dimension)
    from fastvae.kernels import reparameterize_kl as kernels

    grads = mu.new_empty(mu.shape), mu.new_empty(mu.shape)
    kernels.backward(grad_z.contiguous(), grad_kl.contiguous(), _rows(mu), _rows(logvar), noise.contiguous(), *grads)
    return grads


@backward_op.register_fake
def _fake_backward(
    grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor, per_dimension: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def _rows(x: Tensor) -> Tensor:
    """x as the kernels take it: half of an encoder's result, which is a view, is not copied."""
    return x if x.stride(1) == 1 else x.contiguous()


def _refuse_seed(noise: Tensor) -> None:
    if not noise.is_floating_point():
        raise NotImplementedError("a seed is for the Triton kernels: pass the noise itself, which on a CPU is faster kept than made twice")


def apply_reparameterize_kl(*args: Any) -> tuple[Tensor, Tensor]:
    """(z, KL), differentiable; arguments of `torch.ops.fastvae.reparameterize_kl`."""
    # Outside of the compiler always by way of the Function, which refuses forward-mode derivatives: the op would drop them.
    if torch.compiler.is_compiling():
        return cast("tuple[Tensor, Tensor]", compiled_op("reparameterize_kl", forward_op, *args))
    function = ReparameterizeKL if checks.needs_dispatcher(*args[:3]) else _PlainReparameterizeKL
    return cast("tuple[Tensor, Tensor]", function.apply(*args))  # type: ignore[no-untyped-call]


class ReparameterizeKL(torch.autograd.Function):
    """(z, KL); arguments of `torch.ops.fastvae.reparameterize_kl`."""

    generate_vmap_rule = True
    jvp = no_forward_mode("reparameterize_kl")

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", forward_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


class _PlainReparameterizeKL(torch.autograd.Function):
    """`ReparameterizeKL` without `setup_context` and the dispatcher, which take as long as a small problem."""

    jvp = ReparameterizeKL.jvp

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        _setup_context(ctx, args, ())
        return _forward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The noise and not z: z − μ loses what σ·ε has below the rounding of μ, in bfloat16 a good part of it.
    mu, logvar, noise, ctx.per_dimension, ctx.backend = inputs
    ctx.save_for_backward(mu, logvar, noise)


def _backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    args = (grad_z, grad_kl, *ctx.saved_tensors, ctx.per_dimension, ctx.backend)
    if needs_grad(*args[:4]):
        grads = ReparameterizeKLBackward.apply(*args)  # type: ignore[no-untyped-call]
    else:
        grads = backward_op(*args) if checks.needs_dispatcher(*args[:5]) else _gradients(*args)
    return *grads, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


class ReparameterizeKLBackward(torch.autograd.Function):
    """(dμ, dlogvar), itself differentiable; arguments of `torch.ops.fastvae.reparameterize_kl_backward`."""

    generate_vmap_rule = True
    jvp = ReparameterizeKL.jvp

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", backward_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_double(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _double_backward(ctx, *grads)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.per_dimension, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, grad_grad_mu: Tensor, grad_grad_logvar: Tensor) -> tuple[Tensor | None, ...]:
    """The derivative of formula (3), in plain PyTorch: second derivatives are rare, and so may cost what they do elsewhere."""
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
    """ε, also where `noise` is its seed."""
    if noise.is_floating_point():
        return noise
    zeros = torch.zeros_like(mu, dtype=accumulation_dtype(mu.dtype))
    return cast(Tensor, forward_op(zeros, zeros, noise, False, backend)[0])  # z where μ = 0 and σ = 1


backward_op.register_autograd(_double_backward, setup_context=_setup_double)
for op in (forward_op, backward_op):
    vmap_by_loop(op)
