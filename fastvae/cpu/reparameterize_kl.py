"""Reparameterise + KL in blocks that fit the cache. Formulas (1) to (4) of `fastvae.reference.reparameterize_kl`.

Arrays have any one shape and any memory format; the KL is summed over `dims`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fastvae.dispatch import needs_dispatcher
from fastvae.kernel_sums import LOG2_E
from fastvae.parametrisation import Parametrisation

# Elements of a block for each thread. With half as many, more calls cost more than the cache saves: 5 % of the time with one thread, 20 %
# with two.
BLOCK = 131_072

# Up to this many elements of μ and log σ² PyTorch's own derivatives take less time in a training step than an autograd.Function.
_SMALL = 16_384

# Rows up to this length are summed by a product with a vector, which is faster; longer ones by a sum, which rounds less.
_SHORT = 1024

with torch.inference_mode(False):
    _MINUS_ONE, _MINUS_HALF = torch.tensor(-1.0, device="cpu"), torch.tensor(-0.5, device="cpu")


class Inputs(NamedTuple):
    """μ, s, ε if z is wanted, and μ₀ and s₀ if there is a prior other than N(0, I)."""

    mu: Tensor
    s: Tensor
    eps: Tensor | None = None
    prior_mu: Tensor | None = None
    prior_s: Tensor | None = None


def is_small(mu: Tensor, logvar: Tensor | None, eps: Tensor | None) -> bool:
    """Whether `differentiable` takes these: few float32 numbers, no transform or mode of PyTorch active. `mu` may hold log σ² too."""
    # First, as the compiler adds a guard for each attribute of a tensor that is read.
    if needs_dispatcher(mu) or not 0 < (mu.numel() if logvar is None else 2 * mu.numel()) <= _SMALL:
        return False
    return _is_plain_float32(mu) and (logvar is None or _is_plain_float32(logvar)) and (eps is None or _is_plain_float32(eps))


def _is_plain_float32(t: Tensor) -> bool:
    return type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu


def differentiable(
    mu: Tensor, logvar: Tensor, eps: Tensor, bounds: tuple[float, float] | None = None, dims: tuple[int, ...] = (1,)
) -> tuple[Tensor, Tensor]:
    """z and KL, summed over `dims`, in operations that PyTorch differentiates."""
    if bounds is not None:
        logvar = logvar.clamp(*bounds)
    log_std = 0.5 * logvar
    std = log_std.exp()
    kl = torch.addcmul(_MINUS_HALF, std, std, value=0.5).addcmul(mu, mu, value=0.5) - log_std
    if mu.ndim == 2 and dims == (1,):
        kl = torch.mv(kl, _filled(mu.shape[1], 1.0, mu.dtype))
    elif dims:
        kl = kl.sum(dims)
    return torch.addcmul(mu, std, eps), kl


def is_block(x: Tensor) -> bool:
    """Whether x is small enough for `forward_block` and `backward_block`."""
    return x.numel() <= BLOCK * torch.get_num_threads()


def forward_block(inputs: Inputs, parametrisation: Parametrisation, dims: tuple[int, ...], kl_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z, empty without ε, and KL, of one block."""
    dtype, inputs = inputs.mu.dtype, _to(inputs, kl_dtype)
    z, twice_kl = _forward(inputs, parametrisation, None, [])
    return inputs.mu.new_empty(0, dtype=dtype) if z is None else z.to(dtype), _half_of_sums(twice_kl, dims)


def forward(
    inputs: Inputs, parametrisation: Parametrisation, dims: tuple[int, ...], order: Sequence[int], z: Tensor | None, kl: Tensor
) -> None:
    """Fills z, unless it is None, and KL. `order` is that of the dimensions in memory."""
    scratch: list[Tensor] = []
    for first, sums, own_z, *own in _blocks(order, _unsummed(kl, dims), z, *inputs):
        twice_kl = _forward(_to(Inputs(*own), kl.dtype), parametrisation, own_z, scratch)[1]
        part = _half_of_sums(twice_kl, dims).view_as(sums)
        if first:
            sums.copy_(part)
        else:
            sums += part


def _unsummed(sums: Tensor, dims: tuple[int, ...]) -> Tensor:
    """With size 1 where `sums` were summed over."""
    for dim in dims:
        sums = sums.unsqueeze(dim)
    return sums


def _half_of_sums(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """½·Σ t over `dims`."""
    if not dims:
        return t.mul_(0.5)
    if dims == tuple(range(dims[0], t.ndim)) and dims[0] > 0 and t.is_contiguous():
        rows = t if t.ndim == 2 else t.reshape(-1, t.shape[dims[0] :].numel())
        if rows.shape[1] <= _SHORT:
            sums = torch.mv(rows, _filled(rows.shape[1], 0.5, t.dtype))
            return sums if dims[0] == 1 else sums.reshape(t.shape[: dims[0]])
    return t.sum(dims).mul_(0.5)


def _forward(inputs: Inputs, parametrisation: Parametrisation, out: Tensor | None, scratch: list[Tensor]) -> tuple[Tensor | None, Tensor]:
    """z, if there is ε, and twice the summands of KL. `scratch` holds arrays to use again in the next block."""
    if _is_plain(inputs, parametrisation):
        mu, s, (logvar, std) = inputs.mu, inputs.s, _plain_spread(inputs.s, parametrisation, scratch)
    else:
        mu, s = parametrisation.bounded(inputs.mu, inputs.s)
        std, logvar = parametrisation.spread(s)
    z = None if inputs.eps is None else torch.addcmul(mu, std, inputs.eps, out=out)
    if inputs.prior_mu is None or inputs.prior_s is None:
        # σ of "std" may be an input.
        own = std if scratch else None
        return z, torch.addcmul(_MINUS_ONE, std, std, out=own).addcmul_(mu, mu).sub_(logvar)
    prior_mu, prior_s = parametrisation.bounded(inputs.prior_mu, inputs.prior_s)
    prior_std, prior_logvar = parametrisation.spread(prior_s)
    t, ratio = _relative(parametrisation, mu, s, std, prior_mu, prior_s, prior_std)
    return z, torch.addcmul(_MINUS_ONE, ratio, ratio).addcmul_(t, t).sub_(logvar - prior_logvar)


def _relative(
    parametrisation: Parametrisation, mu: Tensor, s: Tensor, std: Tensor, prior_mu: Tensor, prior_s: Tensor, prior_std: Tensor
) -> tuple[Tensor, Tensor]:
    """(μ − μ₀)/σ₀ and σ/σ₀. With `Parametrisation.relative` alone a KL would take half as long again."""
    if prior_std.amin() >= torch.finfo(prior_std.dtype).tiny:
        return (mu - prior_mu) / prior_std, std / prior_std
    return parametrisation.relative(mu, s, std, prior_mu, prior_s, prior_std)


def _plain_spread(s: Tensor, parametrisation: Parametrisation, scratch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """log σ² and σ, in memory that is used again."""
    if scratch and scratch[0].shape != s.shape:
        scratch.clear()
    std, logvar = scratch[0] if scratch else None, s
    if parametrisation.bounds is not None:
        logvar = torch.clamp(s, *parametrisation.bounds, out=scratch[1] if scratch else None)
    # exp2 takes a quarter to half the time of exp.
    std = torch.mul(logvar, 0.5 * LOG2_E, out=std).exp2_()
    scratch[:] = [std, logvar]
    return logvar, std


def backward(
    grad_z: Tensor | None,
    grad_kl: Tensor,
    inputs: Inputs,
    parametrisation: Parametrisation,
    dims: tuple[int, ...],
    order: Sequence[int],
    out: Sequence[Tensor | None],
) -> None:
    """Fills the gradients to μ, s, μ₀ and s₀ from those to z and KL; the last two may be None."""
    scratch: list[Tensor] = []
    for _, dkl, dz, *own in _blocks(order, _unsummed(grad_kl, dims), grad_z, *inputs, *out):
        grads = _gradients(dz, dkl, _to(Inputs(*own[:5]), dkl.dtype), parametrisation, own[5:], scratch)
        for grad, result in zip(own[5:], grads, strict=True):
            if grad is not None and result is not None and result is not grad:
                grad.copy_(result)


def backward_block(
    grad_z: Tensor | None, grad_kl: Tensor, inputs: Inputs, parametrisation: Parametrisation, dims: tuple[int, ...]
) -> list[Tensor | None]:
    """The gradients to μ, s, μ₀ and s₀, of one block."""
    return _gradients(grad_z, _unsummed(grad_kl, dims), inputs, parametrisation, (None, None, None, None), [])


def _gradients(
    dz: Tensor | None, dkl: Tensor, inputs: Inputs, parametrisation: Parametrisation, out: Sequence[Tensor | None], scratch: list[Tensor]
) -> list[Tensor | None]:
    if dz is not None and dz.dtype != dkl.dtype:
        dz = dz.to(dkl.dtype)
    if not _is_plain(inputs, parametrisation):
        return _general_gradients(dz, dkl, inputs, parametrisation)
    mu, eps = inputs.mu, inputs.eps
    own_mu, own_s = out[:2]
    _, std = _plain_spread(inputs.s, parametrisation, scratch)
    # ds = ½·σ·(dz·ε + dKL·σ) − ½·dKL
    if dz is None or eps is None:
        grad_mu = torch.mul(dkl, mu, out=own_mu)
        grad_s = torch.addcmul(-0.5 * dkl, dkl, std.square_(), value=0.5, out=own_s)
    else:
        grad_mu = torch.addcmul(dz, dkl, mu, out=own_mu)
        # If the result has another dtype, dz was converted, and its copy may be overwritten.
        term = torch.mul(dz, eps, out=own_s if own_s is None or own_s.dtype == dz.dtype else dz).addcmul_(dkl, std)
        grad_s = torch.addcmul(-0.5 * dkl, std, term, value=0.5, out=term if own_s is None else own_s)
    if parametrisation.bounds is not None:
        # A tenth of the time of a comparison and a mask.
        torch.ops.aten.hardtanh_backward.grad_input(grad_s, inputs.s, *_wider(parametrisation.bounds, dkl.dtype), grad_input=grad_s)
    return [grad_mu, grad_s, None, None]


def _general_gradients(dz: Tensor | None, dkl: Tensor, inputs: Inputs, parametrisation: Parametrisation) -> list[Tensor | None]:
    mu, s = parametrisation.bounded(inputs.mu, inputs.s)
    std, _ = parametrisation.spread(s)
    t, ratio = mu, std
    prior_grads: tuple[Tensor | None, Tensor | None] = None, None
    grad_t = dkl * t
    if inputs.prior_mu is not None and inputs.prior_s is not None:
        prior_mu, prior_s = parametrisation.bounded(inputs.prior_mu, inputs.prior_s)
        prior_std, _ = parametrisation.spread(prior_s)
        t, ratio = _relative(parametrisation, mu, s, std, prior_mu, prior_s, prior_std)
        grad_t = dkl * t / prior_std.clamp(min=torch.finfo(prior_std.dtype).tiny)
        prior_grad_s = dkl * (1 - t.square() - ratio.square()) * parametrisation.slope(prior_s, prior_std)
        prior_grads = parametrisation.unbounded_gradients(-grad_t, prior_grad_s, prior_mu, prior_s, inputs.prior_s)
    grad_log_std = dkl * (ratio.square() - 1)
    if dz is not None and inputs.eps is not None:
        grad_t, grad_log_std = dz + grad_t, torch.addcmul(grad_log_std, dz * inputs.eps, std)
    grads = parametrisation.unbounded_gradients(grad_t, grad_log_std * parametrisation.slope(s, std), mu, s, inputs.s)
    return [*grads, *prior_grads]


def _is_plain(inputs: Inputs, parametrisation: Parametrisation) -> bool:
    """Whether s is log σ² and the prior N(0, I), for which fewer passes are enough."""
    return inputs.prior_mu is None and parametrisation.is_logvar


def _to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    if inputs.mu.dtype == dtype:
        return inputs
    return Inputs(*(cast(Tensor, None if t is None else t.to(dtype)) for t in inputs))


def _blocks(order: Sequence[int], sums: Tensor, *arrays: Tensor | None, first: bool = True) -> Iterator[list[Any]]:
    """Blocks of up to BLOCK elements a thread, as equal as possible: whether a block is the first of its sums, these, and the arrays."""
    shape = next(t.shape for t in arrays if t is not None)
    most = BLOCK * torch.get_num_threads()
    if shape.numel() <= most or not order:
        yield [first, sums, *arrays]
        return
    dim, *inner = order
    size = shape[dim]
    pieces = -(-size // max(1, most * size // shape.numel()))
    step = -(-size // pieces)
    parts = ([t] * size if t is None or t.shape[dim] < size else torch.split(t, step, dim) for t in (sums, *arrays))
    for n, part in enumerate(zip(*parts, strict=False)):
        yield from _blocks(inner, *part, first=first and (n == 0 or sums.shape[dim] == size))


@functools.lru_cache(maxsize=64)
def _wider(bounds: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """Bounds one rounding apart from the given ones, as the gradient of hardtanh is 0 at the bounds and that of clamp is not."""
    number = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(number(bounds[0]), number(-np.inf))), float(np.nextafter(number(bounds[1]), number(np.inf)))


@functools.lru_cache(maxsize=64)
def _filled(size: int, value: float, dtype: torch.dtype) -> Tensor:
    # Usable for gradients later, even if `torch.inference_mode` is on now.
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")
