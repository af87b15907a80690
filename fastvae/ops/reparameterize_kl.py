"""The custom ops of reparameterise + KL and their derivatives. Formulas (1) to (4) of `fastvae.reference.reparameterize_kl`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae import reference
from fastvae.cpu import reparameterize_kl as cpu
from fastvae.cpu.memory import new_empty
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton
from fastvae.layouts import Layout
from fastvae.ops.common import autograd_function, custom_op, differentiable, needs_grad
from fastvae.parametrisation import Parametrisation

_TENSORS = "Tensor mu, Tensor? s, Tensor? noise, Tensor? prior_mu, Tensor? prior_s"
_OPTIONS = "int dim, int[] kl_dims, str scale, float offset, float[] bounds, float soft_clamp, str backend"
FORWARD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = f"(Tensor grad_z, Tensor grad_kl, {_TENSORS}, {_OPTIONS}, bool prior_grad) -> (Tensor, Tensor, Tensor, Tensor)"

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Tensors(NamedTuple):
    """The arguments of the op that are tensors."""

    mu: Tensor  # if s is None, μ and s one after the other along `dim`
    s: Tensor | None
    noise: Tensor | None  # ε; None if z is not wanted; or a seed, int64 (1,), from which the Triton kernels generate ε, in both passes
    prior_mu: Tensor | None  # None for N(0, I)
    prior_s: Tensor | None  # like s

    def parameters(self) -> list[Tensor | None]:
        return [self.mu, self.s, self.prior_mu, self.prior_s]


class Options(NamedTuple):
    """The other arguments of the op."""

    dim: int = 0
    kl_dims: tuple[int, ...] = (1,)
    scale: str = "logvar"
    offset: float = 0.0
    bounds: tuple[float, ...] = ()  # empty for none
    soft_clamp: float = 0.0  # 0 for none
    backend: str = ""

    @property
    def parametrisation(self) -> Parametrisation:
        bounds = (self.bounds[0], self.bounds[1]) if len(self.bounds) else None
        return Parametrisation(cast(Any, self.scale), self.offset, bounds, self.soft_clamp or None)

    def halves(self, mu: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """μ and s."""
        return cast("tuple[Tensor, Tensor]", mu.chunk(2, self.dim)) if s is None else (mu, s)


class _Arranged(NamedTuple):
    """A call as the backends see it: arrays (B, R, D)."""

    inputs: cpu.Inputs
    parametrisation: Parametrisation
    layout: Layout
    backend: Any  # the module

    @staticmethod
    def of(tensors: Tensors, options: Options) -> _Arranged:
        mu, s, noise, prior_mu, prior_s = tensors
        layout = _layout(mu, s, options)
        if not layout.views and s is None:
            # No halves of an array with such gaps are (B, R, D).
            return _Arranged.of(tensors._replace(mu=new_empty(mu, mu.shape, _gradient_strides(mu, s, options)).copy_(mu)), options)
        posterior = [layout.view(half) for half in options.halves(mu, s)]
        prior = [None, None] if prior_mu is None else [layout.view(half) for half in options.halves(prior_mu, prior_s)]
        eps = noise if noise is None or not noise.is_floating_point() else layout.view(noise)
        return _Arranged(cpu.Inputs(posterior[0], posterior[1], eps, *prior), options.parametrisation, layout, _backend(tensors, options))


def _layout(mu: Tensor, s: Tensor | None, options: Options) -> Layout:
    """The layout of μ, s and z, and of the gradients."""
    halves = options.halves(mu, s)
    strides = [halves[0].stride(), halves[1].stride()] if s is not None else [mu.stride(), _gradient_strides(mu, s, options)]
    return Layout.of(halves[0].shape, strides, options.kl_dims)


def _gradient_strides(mu: Tensor, s: Tensor | None, options: Options) -> tuple[int, ...]:
    return _layout(mu, s, options).strides if s is not None else Layout.of(mu.shape, [mu.stride()], ()).strides


def _backend(tensors: Tensors, options: Options) -> Any:
    if runs_on_triton(options.backend, tensors.mu):
        import fastvae.kernels.reparameterize_kl as kernels

        return kernels
    if tensors.noise is not None and not tensors.noise.is_floating_point():
        raise NotImplementedError(
            "a seed is for the Triton kernels only: pass the noise itself, which a CPU keeps faster than it draws it twice"
        )
    return cpu


def _evaluate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """z, in the memory format of μ and empty without noise, and KL in the accumulation dtype."""
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:])
    inputs, parametrisation, layout, backend = _Arranged.of(tensors, options)
    z, kl = _outputs(tensors, layout)
    backend.forward(
        inputs,
        parametrisation,
        None if tensors.noise is None else layout.view(z),
        layout.view(kl) if layout.late_dims else layout.view_sums(kl),
    )
    return z, kl.sum(layout.late_dims) if layout.late_dims else kl


def _outputs(tensors: Tensors, layout: Layout) -> tuple[Tensor, Tensor]:
    mu, kl_dtype = tensors.mu, accumulation_dtype(tensors.mu.dtype)
    z = mu.new_empty(0) if tensors.noise is None else new_empty(mu, layout.shape, layout.strides)
    if layout.late_dims:
        return z, new_empty(mu, layout.shape, layout.strides, kl_dtype)
    return z, new_empty(mu, layout.sums_shape, layout.sums_strides, kl_dtype)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:])
    layout = _layout(tensors.mu, tensors.s, options)
    z, kl = _outputs(tensors, layout)
    return z, kl.sum(layout.late_dims) if layout.late_dims else kl


def _gradients(grad_z: Tensor, grad_kl: Tensor, *arguments: Any) -> Gradients:
    """The gradients to `mu`, `s`, `prior_mu` and `prior_s`, empty for None, and for a prior that needs none."""
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:-1])
    inputs, parametrisation, layout, backend = _Arranged.of(tensors, options)
    grads = _gradient_outputs(tensors, options, arguments[-1])
    out: list[Tensor | None] = []
    for grad_mu, grad_s, s in ((*grads[:2], tensors.s), (*grads[2:], tensors.prior_s)):
        halves = options.halves(grad_mu, None if s is None else grad_s) if len(grad_mu) else (None, None)
        out += [None if half is None else layout.view(half) for half in halves]
    dz = None if tensors.noise is None else layout.view(grad_z)
    backend.backward(dz, layout.view_sums(grad_kl), inputs, parametrisation, out)
    return grads


def _gradient_outputs(tensors: Tensors, options: Options, prior_grad: bool) -> Gradients:
    strides = _gradient_strides(tensors.mu, tensors.s, options)
    wanted = [t if n < 2 or prior_grad else None for n, t in enumerate(tensors.parameters())]
    grads = (tensors.mu.new_empty(0) if t is None else new_empty(tensors.mu, t.shape, strides) for t in wanted)
    return cast(Gradients, tuple(grads))


def _fake_gradients(grad_z: Tensor, grad_kl: Tensor, *arguments: Any) -> Gradients:
    return _gradient_outputs(Tensors(*arguments[:5]), Options(*arguments[5:-1]), arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The noise and not z: the difference z − μ has lost the digits of σ·ε below the rounding of μ, which in bfloat16 are many.
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    tensors, prior_grad = Tensors(*ctx.saved_tensors), any(ctx.needs_input_grad[3:5])
    arguments = grad_z, grad_kl, *tensors, *ctx.options, prior_grad
    if needs_grad(*arguments[:7]):
        grads = _DifferentiableBackward.apply(*arguments)
    else:
        grads = backward_op(*arguments) if needs_dispatcher(*arguments[:7]) else _gradients(*arguments)
    mu, s, prior_mu, prior_s = (grad if needed else None for grad, needed in zip(grads, _needed(tensors, prior_grad), strict=True))
    return mu, s, None, prior_mu, prior_s, *(None for _ in ctx.options)


def _needed(tensors: Tensors, prior_grad: bool) -> list[bool]:
    return [t is not None and (n < 2 or prior_grad) for n, t in enumerate(tensors.parameters())]


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    *ctx.options, ctx.prior_grad = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The derivative of the gradients, in plain PyTorch, as second derivatives are rare."""
    grad_z, grad_kl, *saved = ctx.saved_tensors
    tensors, options = Tensors(*saved), Options(*ctx.options)
    tensors = tensors._replace(noise=epsilon(tensors, options))
    parameters = tensors.parameters()
    given = [n for n, t in enumerate(parameters) if t is not None]

    def values(*own: Tensor) -> tuple[Tensor, Tensor]:
        named = {("mu", "s", "prior_mu", "prior_s")[n]: t for n, t in zip(given, own, strict=True)}
        return formula(tensors._replace(**named), options)

    def gradients(grad_z: Tensor, grad_kl: Tensor, *own: Tensor) -> Any:
        return torch.func.vjp(values, *own)[1]((grad_z, grad_kl))

    own = [t for t in parameters if t is not None]
    upstream = tuple(cotangents[n] if n < 2 or ctx.prior_grad else torch.zeros_like(t) for n, t in zip(given, own, strict=True))
    to_z, to_kl, *to_own = torch.func.vjp(gradients, grad_z, grad_kl, *own)[1](upstream)
    found = dict(zip(given, to_own, strict=True))
    return to_z, to_kl, found.get(0), found.get(1), None, found.get(2), found.get(3), *(None for _ in ctx.options), None


def formula(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """The reference in the op's dtypes: computed in the accumulation dtype, z in the dtype of μ. The noise is ε or None."""
    mu, s, eps, prior_mu, prior_s = tensors
    dtype = accumulation_dtype(mu.dtype)
    posterior = [half.to(dtype) for half in options.halves(mu, s)]
    prior = None if prior_mu is None else tuple(half.to(dtype) for half in options.halves(prior_mu, prior_s))
    arguments: Any = {"kl_dims": options.kl_dims, "parametrisation": options.parametrisation, "prior": prior}
    if eps is None:
        return mu.new_empty(0), reference.gaussian_kl(posterior[0], posterior[1], **arguments)
    z, kl = reference.reparameterize_kl(posterior[0], posterior[1], eps=eps.to(dtype), **arguments)
    return z.to(mu.dtype), kl


def epsilon(tensors: Tensors, options: Options) -> Tensor | None:
    """ε, also if `noise` is its seed."""
    mu, s, noise, _, _ = tensors
    if noise is None or noise.is_floating_point():
        return noise
    zeros = [None if t is None else torch.zeros_like(t, dtype=accumulation_dtype(t.dtype)) for t in (mu, s)]
    # z where μ = 0 and σ = 1
    return cast(Tensor, forward_op(*zeros, noise, None, None, *Options(options.dim, options.kl_dims, backend=options.backend))[0])


forward_op = custom_op("reparameterize_kl", FORWARD_SCHEMA, _evaluate, _fake)
backward_op = custom_op("reparameterize_kl_backward", BACKWARD_SCHEMA, _gradients, _fake_gradients)
_DifferentiableBackward = autograd_function("ReparameterizeKLBackward", "reparameterize_kl", backward_op, _setup_double, _double_backward)
# (z, KL), differentiable; arguments of `torch.ops.fastvae.reparameterize_kl`.
apply_reparameterize_kl = differentiable("ReparameterizeKL", "reparameterize_kl", 5, forward_op, _evaluate, _setup_context, _backward)
