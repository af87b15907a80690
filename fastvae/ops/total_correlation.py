"""The custom ops of β-TC-VAE's terms and their derivatives. Formulas (1) to (5) of `fastvae.reference.total_correlation`.

Each op returns log q(z_i) and log q(z_id). Backward needs only these and the inputs, and sweeps over the pairs a second time.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastvae.cpu import total_correlation as cpu
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton, zero_if_finite
from fastvae.ops.common import custom_op, differentiable, forbid_second_derivative, without_autocast, without_grad
from fastvae.reference.total_correlation import KLDecomposition, decompose, log_weights

FORWARD_SCHEMA = (
    "(Tensor z, Tensor mu, Tensor logvar, SymInt dataset_size, SymInt offset, bool stratified, str backend) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_joint, Tensor grad_marginals, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginals, "
    "SymInt dataset_size, SymInt offset, bool stratified, str backend, bool z_grad, bool posterior_grad) -> (Tensor, Tensor, Tensor)"
)
TERMS_SCHEMA = (
    "(Tensor z, Tensor mu, Tensor logvar, SymInt dataset_size, bool stratified, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
TERMS_BACKWARD_SCHEMA = (
    "(Tensor? grad_mutual_information, Tensor? grad_total_correlation, Tensor? grad_dimensionwise_kl, Tensor z, Tensor mu, Tensor logvar, "
    "Tensor joint, Tensor marginals, SymInt dataset_size, bool stratified, str backend, bool z_grad, bool posterior_grad) "
    "-> (Tensor, Tensor, Tensor)"
)

Densities = tuple[Tensor, Tensor]
Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _densities(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, offset: int, stratified: bool, backend: str) -> Densities:
    """log q(z_i) (N,) and log q(z_id) (N, D) in the accumulation dtype, for z (N, D) under posteriors (M, D).

    Row i of z is drawn from posterior offset + i: z may be some rows of a batch.
    """
    if runs_on_triton(backend, z):
        import fastvae.kernels.total_correlation as kernels

        *_, joint, marginals = kernels.forward(z, mu, logvar, log_weights(mu.shape[0], dataset_size, stratified), offset)
        return joint, marginals
    with without_autocast(z.device):
        joint, marginals = cpu.forward(z, mu, logvar, log_weights(mu.shape[0], dataset_size, stratified), offset)
        zero = zero_if_finite(z, mu, logvar).to(joint.dtype)
        return joint.add_(zero), marginals.add_(zero)


def _fake_densities(z: Tensor, *_: Any) -> Densities:
    dtype = accumulation_dtype(z.dtype)
    return z.new_empty(z.shape[:1], dtype=dtype), z.new_empty(z.shape, dtype=dtype)


def _terms(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, stratified: bool, backend: str) -> Terms:
    """The terms of (4) for z, μ and logvar (N, D), and both densities, which are not differentiable here."""
    if runs_on_triton(backend, z):
        import fastvae.kernels.total_correlation as kernels

        return cast(Terms, kernels.forward(z, mu, logvar, log_weights(mu.shape[0], dataset_size, stratified), 0))
    joint, marginals = _densities(z, mu, logvar, dataset_size, 0, stratified, backend)
    with without_autocast(z.device):
        z, mu, logvar = (t.to(joint.dtype) for t in (z, mu, logvar))
        return *decompose(z, mu, logvar, joint, marginals), joint, marginals


def _fake_terms(z: Tensor, *_: Any) -> Terms:
    joint, marginals = _fake_densities(z)
    return joint.new_empty(()), joint.new_empty(()), joint.new_empty(()), joint, marginals


def _densities_gradients(*args: Any) -> Gradients:
    return _sweep_gradients(args[:2], *args[2:])


def _terms_gradients(*args: Any) -> Gradients:
    return _sweep_gradients(args[:3], *args[3:9], 0, *args[9:])


def _sweep_gradients(upstream: tuple[Tensor | None, ...], *args: Any) -> Gradients:
    """dz (N, D), dμ and dlogvar (M, D), in the dtype of z, from the gradients to both densities or to the three terms.

    A gradient not asked for is empty; that of a term is None if it has none.
    """
    z, mu, logvar, joint, marginals, dataset_size, offset, stratified, backend, *wanted = args
    arguments = upstream, z, mu, logvar, joint, marginals, log_weights(mu.shape[0], dataset_size, stratified), offset, *wanted
    if runs_on_triton(backend, z):
        import fastvae.kernels.total_correlation as kernels

        grads = kernels.backward(*arguments)
    else:
        backward: Any = cpu.backward if len(upstream) == 2 else cpu.terms_backward
        with without_autocast(z.device):
            grads = backward(*arguments)
    return cast(Gradients, tuple(z.new_empty(0) if grad is None else grad.to(z.dtype) for grad in grads))


def _fake_gradients(z: Tensor, mu: Tensor, z_grad: bool, posterior_grad: bool) -> Gradients:
    posterior = mu.shape if posterior_grad else (0,)
    return z.new_empty(z.shape if z_grad else (0,)), z.new_empty(posterior), z.new_empty(posterior)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Densities) -> None:
    *tensors, ctx.dataset_size, ctx.offset, ctx.stratified, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_joint: Tensor, grad_marginals: Tensor) -> tuple[Tensor | None, ...]:
    args = (grad_joint, grad_marginals), ctx, (ctx.dataset_size, ctx.offset, ctx.stratified, ctx.backend)
    return *_gradients(backward_op, *args), None, None, None, None


def _gradients(op: Any, upstream: tuple[Tensor | None, ...], ctx: Any, options: tuple[Any, ...]) -> list[Tensor | None]:
    z_grad, mu_grad, logvar_grad = ctx.needs_input_grad[:3]
    # Unpacked once: activation checkpointing allows no more.
    tensors = ctx.saved_tensors
    grads = without_grad(op, *upstream, *tensors, *options, z_grad, mu_grad or logvar_grad)
    sources = *upstream, *tensors[:3]
    return [
        forbid_second_derivative("total_correlation", grad, *sources) if needed else None
        for grad, needed in zip(grads, (z_grad, mu_grad, logvar_grad), strict=True)
    ]


def _plain_or_op(*args: Any) -> Gradients:
    return cast(Gradients, terms_backward_op(*args)) if needs_dispatcher(*args[3:8]) else _terms_gradients(*args)


def _setup_terms(ctx: Any, inputs: tuple[Any, ...], output: Terms) -> None:
    *tensors, ctx.dataset_size, ctx.stratified, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3:])


def _terms_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_gradients(_plain_or_op, grads[:3], ctx, (ctx.dataset_size, ctx.stratified, ctx.backend)), None, None, None


forward_op = custom_op("total_correlation", FORWARD_SCHEMA, _densities, _fake_densities)
backward_op = custom_op(
    "total_correlation_backward", BACKWARD_SCHEMA, _densities_gradients, lambda *args: _fake_gradients(*args[2:4], *args[-2:])
)
forward_op.register_autograd(_backward, setup_context=_setup_context)
terms_op = custom_op("kl_decomposition", TERMS_SCHEMA, _terms, _fake_terms)
terms_backward_op = custom_op(
    "kl_decomposition_backward", TERMS_BACKWARD_SCHEMA, _terms_gradients, lambda *args: _fake_gradients(*args[3:5], *args[-2:])
)
_apply = differentiable("TotalCorrelation", "total_correlation", 3, terms_op, _terms, _setup_terms, _terms_backward)


def apply_total_correlation(*args: Any) -> KLDecomposition:
    """The terms, differentiable. Arguments of `torch.ops.fastvae.kl_decomposition`."""
    return KLDecomposition(*_apply(*args)[:3])
