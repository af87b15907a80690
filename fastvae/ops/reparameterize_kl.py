"""The custom ops of reparameterise + KL and their derivatives. Formulas (1) to (4) of `fastvae.reference.reparameterize_kl`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae import reference
from fastvae.cpu import reparameterize_kl as cpu
from fastvae.cpu.inductor import fused
from fastvae.cpu.memory import new_empty
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton
from fastvae.layouts import Layout, Rows
from fastvae.ops.common import autograd_function, custom_op, differentiable, needs_grad
from fastvae.parametrisation import Parametrisation

_TENSORS = "Tensor mu, Tensor? s, Tensor? noise, Tensor? prior_mu, Tensor? prior_s"
_OPTIONS = "int dim, int[] kl_dims, str scale, float offset, float[] bounds, float soft_clamp, str backend"
FORWARD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = f"(Tensor grad_z, Tensor grad_kl, {_TENSORS}, {_OPTIONS}, bool prior_grad) -> (Tensor, Tensor, Tensor, Tensor)"

_LOGVAR = Parametrisation()
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
# Of the options.
_NO_GRADIENT = (None,) * 7


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
        if self.scale == "logvar" and not self.offset and not self.soft_clamp and not self.bounds:
            return _LOGVAR
        bounds = (self.bounds[0], self.bounds[1]) if len(self.bounds) else None
        return Parametrisation(cast(Any, self.scale), self.offset, bounds, self.soft_clamp or None)

    def halves(self, mu: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """μ and s."""
        return cast("tuple[Tensor, Tensor]", mu.chunk(2, self.dim)) if s is None else (mu, s)


class _Plan:
    """How the backends see the arrays of a call."""

    def __init__(self, layout: Layout, strides: tuple[int, ...], copy: bool = False) -> None:
        self.layout = layout  # of μ, s, z and the gradients to μ and s
        self.strides = strides  # of the gradients to the op's `mu` and `s`
        self.copy = copy  # whether `mu` has gaps such that its halves are not (B, R, D), as the Triton kernels take them
        self._known: dict[tuple[int, ...], tuple[int, int]] = {}

    @staticmethod
    def of(mu: Tensor, s: Tensor | None, options: Options) -> _Plan:
        plan = _plan if torch.compiler.is_compiling() or any(type(size) is not int for size in mu.shape) else _cached_plan
        return plan(mu.shape, mu.stride(), None if s is None else s.stride(), options.dim, tuple(options.kl_dims))

    def rows(self, t: Tensor, output: bool = False) -> Rows:
        """t for the Triton kernels; a copy of an input whose features are not contiguous."""
        strides = t.stride()
        known = self._known.get(strides)
        if known is not None:
            return Rows(t, *known)
        view = self.layout.view(t)
        is_view = view.data_ptr() == t.data_ptr() and (view.stride(2) == 1 or view.shape[2] == 1)
        if output and not is_view:
            raise RuntimeError(f"a result of strides {strides} must be written in place, got a copy for the layout {self.layout}")
        if not is_view:
            return Rows.of(view.contiguous())
        rows = Rows.of(view)
        if len(self._known) < 64:
            self._known[strides] = rows[1:]
        return rows


def _plan(shape: tuple[int, ...], strides: tuple[int, ...], s_strides: tuple[int, ...] | None, dim: int, kl_dims: tuple[int, ...]) -> _Plan:
    if s_strides is not None:
        layout = Layout.of(shape, (strides, s_strides), kl_dims)
        return _Plan(layout, layout.strides)
    dense, half = Layout.of(shape, (strides,), ()).strides, (*shape[:dim], shape[dim] // 2, *shape[dim + 1 :])
    # The order is that of the gradient, which is written in place.
    layout = Layout.of(half, (dense, strides), kl_dims)
    return _Plan(layout, dense) if layout.views else _Plan(Layout.of(half, (dense,), kl_dims), dense, copy=True)


# A compiler's symbols cannot be hashed.
_cached_plan = functools.lru_cache(maxsize=256)(_plan)


def _inputs(tensors: Tensors, options: Options) -> cpu.Inputs:
    mu, s, noise, prior_mu, prior_s = tensors
    prior = () if prior_mu is None else options.halves(prior_mu, prior_s)
    first, second = options.halves(mu, s)
    return cpu.Inputs(first, second, noise, *prior)


def _rows(tensors: Tensors, options: Options, plan: _Plan) -> cpu.Inputs:
    """The inputs for the Triton kernels."""
    if plan.copy:
        tensors = tensors._replace(mu=new_empty(tensors.mu, tensors.mu.shape, plan.strides).copy_(tensors.mu))
    rows = [None if t is None else plan.rows(t) if t.is_floating_point() else Rows(t, 0, 0) for t in _inputs(tensors, options)]
    return cpu.Inputs(*cast(Any, rows))


def _refuse_seed(tensors: Tensors) -> None:
    if tensors.noise is not None and not tensors.noise.is_floating_point():
        raise NotImplementedError(
            "a seed is for the Triton kernels only: pass the noise itself, which a CPU keeps faster than it draws it twice"
        )


def _evaluate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """z, in the memory format of μ and empty without noise, and KL in the accumulation dtype."""
    mu = arguments[0]
    if runs_on_triton(arguments[-1], mu) or not cpu.is_block(mu):
        return _op_evaluate(*arguments)
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:])
    _refuse_seed(tensors)
    return cpu.forward_block(_inputs(tensors, options), options.parametrisation, options.kl_dims, accumulation_dtype(mu.dtype))


def _op_evaluate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`_evaluate` with the memory formats of `_fake`."""
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:])
    plan = _Plan.of(tensors.mu, tensors.s, options)
    layout = plan.layout
    z, kl = _outputs(tensors, layout)
    out = None if tensors.noise is None else z
    if not runs_on_triton(options.backend, tensors.mu):
        _refuse_seed(tensors)
        cpu.forward(_inputs(tensors, options), options.parametrisation, tuple(options.kl_dims), layout.order, out, kl)
        return z, kl
    import fastvae.kernels.reparameterize_kl as kernels

    each = new_empty(tensors.mu, layout.shape, layout.strides, kl.dtype) if layout.late_dims else kl
    kernels.forward(
        layout, _rows(tensors, options, plan), options.parametrisation, None if out is None else plan.rows(out, output=True), each
    )
    return z, torch.sum(each, layout.late_dims, out=kl) if layout.late_dims else kl


def _outputs(tensors: Tensors, layout: Layout) -> tuple[Tensor, Tensor]:
    mu = tensors.mu
    z = mu.new_empty(0) if tensors.noise is None else new_empty(mu, layout.shape, layout.strides)
    return z, new_empty(mu, layout.sums_shape, layout.sums_strides, accumulation_dtype(mu.dtype))


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:])
    return _outputs(tensors, _Plan.of(tensors.mu, tensors.s, options).layout)


def _gradients(grad_z: Tensor, grad_kl: Tensor, *arguments: Any, as_op: bool = False) -> list[Tensor | None]:
    """The gradients to `mu`, `s`, `prior_mu` and `prior_s`; None for one that is None, and for a prior that needs none."""
    tensors, options = Tensors(*arguments[:5]), Options(*arguments[5:-1])
    dz = None if tensors.noise is None else grad_z
    triton, parametrisation = runs_on_triton(options.backend, tensors.mu), options.parametrisation
    pairs = tensors.s is not None and tensors.prior_mu is None
    if not triton and pairs and not as_op and tensors.mu.dtype == grad_kl.dtype and cpu.is_block(tensors.mu):
        return cpu.backward_block(dz, grad_kl, _inputs(tensors, options), parametrisation, options.kl_dims)
    plan = _Plan.of(tensors.mu, tensors.s, options)
    layout = plan.layout
    grads = _gradient_outputs(tensors, plan, arguments[-1])
    out: list[Tensor | None] = [*options.halves(cast(Tensor, grads[0]), grads[1])]
    out += [None, None] if grads[2] is None else options.halves(grads[2], grads[3])
    if not triton:
        cpu.backward(dz, grad_kl, _inputs(tensors, options), parametrisation, tuple(options.kl_dims), layout.order, out)
        return grads
    import fastvae.kernels.reparameterize_kl as kernels

    rows = [None if half is None else plan.rows(half, output=True) for half in out]
    inputs = _rows(tensors, options, plan)
    kernels.backward(layout, None if dz is None else plan.rows(dz), layout.view_sums(grad_kl), inputs, parametrisation, rows)
    return grads


def _gradient_outputs(tensors: Tensors, plan: _Plan, prior_grad: bool) -> list[Tensor | None]:
    wanted = [t if n < 2 or prior_grad else None for n, t in enumerate(tensors.parameters())]
    return [None if t is None else new_empty(tensors.mu, t.shape, plan.strides) for t in wanted]


def _op_gradients(*arguments: Any) -> Gradients:
    """`_gradients` with an empty tensor for None."""
    return _without_none(_gradients(*arguments, as_op=True), arguments[0])


def _fake_gradients(grad_z: Tensor, grad_kl: Tensor, *arguments: Any) -> Gradients:
    tensors = Tensors(*arguments[:5])
    plan = _Plan.of(tensors.mu, tensors.s, Options(*arguments[5:-1]))
    return _without_none(_gradient_outputs(tensors, plan, arguments[-1]), grad_z)


def _without_none(grads: list[Tensor | None], like: Tensor) -> Gradients:
    return cast(Gradients, tuple(like.new_empty(0) if grad is None else grad for grad in grads))


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
    mu, s, prior_mu, prior_s = grads
    if not prior_grad:
        prior_mu = prior_s = None
    # An op returns an empty tensor for None.
    s, prior_s = None if tensors.s is None else s, None if tensors.prior_s is None else prior_s
    return mu, s, None, prior_mu, prior_s, *_NO_GRADIENT


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
    return to_z, to_kl, found.get(0), found.get(1), None, found.get(2), found.get(3), *_NO_GRADIENT, None


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


def fused_formula(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """`formula` as loops that the compiler makes."""
    key = options, tensors.mu.ndim, tensors.mu.dtype, tuple(t is None for t in tensors)
    return cast("tuple[Tensor, Tensor]", fused(formula, key, tensors, options))


def epsilon(tensors: Tensors, options: Options) -> Tensor | None:
    """ε, also if `noise` is its seed."""
    mu, s, noise, _, _ = tensors
    if noise is None or noise.is_floating_point():
        return noise
    zeros = [None if t is None else _zeros_in_the_place_of(t) for t in (mu, s)]
    # z where μ = 0 and σ = 1
    return cast(Tensor, forward_op(*zeros, noise, None, None, *Options(options.dim, options.kl_dims, backend=options.backend))[0])


def _zeros_in_the_place_of(t: Tensor) -> Tensor:
    """Zeros with the strides of t, on which the noise of a seed depends; those of torch.zeros_like have no gaps."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.new_zeros(last + 1, dtype=accumulation_dtype(t.dtype)).as_strided(t.shape, t.stride())


forward_op = custom_op("reparameterize_kl", FORWARD_SCHEMA, _op_evaluate, _fake)
backward_op = custom_op("reparameterize_kl_backward", BACKWARD_SCHEMA, _op_gradients, _fake_gradients)
_DifferentiableBackward = autograd_function("ReparameterizeKLBackward", "reparameterize_kl", backward_op, _setup_double, _double_backward)
# (z, KL), differentiable; arguments of `torch.ops.fastvae.reparameterize_kl`.
apply_reparameterize_kl = differentiable("ReparameterizeKL", "reparameterize_kl", 5, forward_op, _evaluate, _setup_context, _backward)
