"""Reparameterise + KL in blocks that fit the cache. Formulas (1) to (4) of `fastvae.reference.reparameterize_kl`.

Arrays are (B, R, D) as in `fastvae.layouts`, the KL and its gradient with size 1 where it is summed over.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastvae.dispatch import needs_dispatcher
from fastvae.kernel_sums import LOG2_E
from fastvae.parametrisation import Parametrisation

# Elements of a block for each thread. With half as many, more calls cost more than the cache saves: 5 % of the time with one thread, 20 %
# with two.
BLOCK = 131_072

# Up to this many elements PyTorch's own derivatives take less time in a training step than an autograd.Function.
_SMALL = 8_192

# Rows up to this length are summed by a product with a vector, which is faster; longer ones by a sum, which rounds less.
_SHORT = 1024

with torch.inference_mode(False):
    _MINUS_ONE = torch.tensor(-1.0, device="cpu")


Block = tuple[slice, slice, slice]


class Inputs(NamedTuple):
    """μ, s, ε if z is wanted, and μ₀ and s₀ if there is a prior other than N(0, I)."""

    mu: Tensor
    s: Tensor
    eps: Tensor | None = None
    prior_mu: Tensor | None = None
    prior_s: Tensor | None = None


def is_small(mu: Tensor, logvar: Tensor) -> bool:
    """Whether `differentiable` takes these: few float32 numbers, with no transform or mode of PyTorch active."""
    return (
        type(mu) is type(logvar) is Tensor
        # First, as the compiler adds a guard for each attribute of a tensor that is read.
        and not needs_dispatcher(mu)
        and mu.dtype is logvar.dtype is torch.float32
        and mu.ndim == 2
        and mu.shape == logvar.shape
        and 0 < mu.numel() <= _SMALL
        and mu.is_cpu
        and logvar.is_cpu
    )


def differentiable(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z (N, D) and KL (N,) from μ, log σ² and ε (N, D), in operations that PyTorch differentiates."""
    std = (0.5 * logvar).exp()
    twice_kl = torch.addcmul(_MINUS_ONE, std, std).addcmul(mu, mu) - logvar
    return torch.addcmul(mu, std, eps), torch.mv(twice_kl, _halves(mu.shape[1], mu.dtype))


def forward(inputs: Inputs, parametrisation: Parametrisation, z: Tensor | None, kl: Tensor) -> None:
    """Fills z, unless it is None, and KL."""
    plain = _is_plain(inputs, parametrisation)
    scratch = None
    for block in _blocks(inputs.mu.shape):
        own = _part(inputs, block, kl.dtype)
        out = None if z is None else z[block]
        if plain:
            if scratch is None or scratch.shape != own.mu.shape:
                scratch = own.mu.new_empty(own.mu.shape)
            twice_kl = _plain_forward(own, parametrisation, scratch, out)
        else:
            twice_kl = _forward(own, parametrisation, out)
        _add_sums(twice_kl, kl, block, inputs.mu.shape)


def _plain_forward(inputs: Inputs, parametrisation: Parametrisation, scratch: Tensor, z: Tensor | None) -> Tensor:
    mu, logvar = parametrisation.bounded(inputs.mu, inputs.s)
    std = _std(logvar, scratch)
    if z is not None and inputs.eps is not None:
        torch.addcmul(mu, std, inputs.eps, out=z)
    return torch.addcmul(_MINUS_ONE, std, std, out=scratch).addcmul_(mu, mu).sub_(logvar)


def _forward(inputs: Inputs, parametrisation: Parametrisation, z: Tensor | None) -> Tensor:
    mu, s = parametrisation.bounded(inputs.mu, inputs.s)
    std, logvar = parametrisation.spread(s)
    if z is not None and inputs.eps is not None:
        torch.addcmul(mu, std, inputs.eps, out=z)
    if inputs.prior_mu is not None and inputs.prior_s is not None:
        prior_mu, prior_s = parametrisation.bounded(inputs.prior_mu, inputs.prior_s)
        prior_std, prior_logvar = parametrisation.spread(prior_s)
        mu, std, logvar = (mu - prior_mu) / prior_std, std / prior_std, logvar - prior_logvar
    return torch.addcmul(_MINUS_ONE, std, std).addcmul_(mu, mu).sub_(logvar)


def backward(
    grad_z: Tensor | None, grad_kl: Tensor, inputs: Inputs, parametrisation: Parametrisation, grads: Sequence[Tensor | None]
) -> None:
    """Fills the gradients to μ, s, μ₀ and s₀ from those to z and KL; the last two may be None."""
    plain = _is_plain(inputs, parametrisation)
    scratch = None
    for block in _blocks(inputs.mu.shape):
        own = _part(inputs, block, grad_kl.dtype)
        dz = None if grad_z is None else grad_z[block].to(grad_kl.dtype)
        dkl = grad_kl[_of_sums(grad_kl, block)]
        out = [None if grad is None else grad[block] for grad in grads]
        if plain:
            if scratch is None or scratch.shape != own.mu.shape:
                scratch = own.mu.new_empty(own.mu.shape)
            _plain_backward(dz, dkl, own, parametrisation, scratch, cast(Tensor, out[0]), cast(Tensor, out[1]))
        else:
            for grad, result in zip(out, _backward(dz, dkl, own, parametrisation), strict=True):
                if grad is not None and result is not None:
                    grad.copy_(result)


def _plain_backward(
    dz: Tensor | None, dkl: Tensor, inputs: Inputs, parametrisation: Parametrisation, scratch: Tensor, grad_mu: Tensor, grad_s: Tensor
) -> None:
    mu, logvar = parametrisation.bounded(inputs.mu, inputs.s)
    std = _std(logvar, scratch)
    # ds = ½·σ·(dz·ε + dKL·σ) − ½·dKL
    if dz is None or inputs.eps is None:
        torch.mul(dkl, mu, out=grad_mu)
        torch.addcmul(-0.5 * dkl, dkl, std.square_(), value=0.5, out=grad_s)
    else:
        torch.addcmul(dz, dkl, mu, out=grad_mu)
        # If the result has another dtype, dz was converted, and its copy may be overwritten.
        term = torch.mul(dz, inputs.eps, out=grad_s if grad_s.dtype == dz.dtype else dz).addcmul_(dkl, std)
        torch.addcmul(-0.5 * dkl, std, term, value=0.5, out=grad_s)
    if parametrisation.bounds is not None:
        grad_s.masked_fill_(logvar != inputs.s, 0)


def _backward(dz: Tensor | None, dkl: Tensor, inputs: Inputs, parametrisation: Parametrisation) -> list[Tensor | None]:
    mu, s = parametrisation.bounded(inputs.mu, inputs.s)
    std, _ = parametrisation.spread(s)
    t, ratio = mu, std
    prior_grads: tuple[Tensor | None, Tensor | None] = None, None
    grad_t = dkl * t
    if inputs.prior_mu is not None and inputs.prior_s is not None:
        prior_mu, prior_s = parametrisation.bounded(inputs.prior_mu, inputs.prior_s)
        prior_std, _ = parametrisation.spread(prior_s)
        t, ratio = (mu - prior_mu) / prior_std, std / prior_std
        grad_t = dkl * t / prior_std
        prior_grad_s = dkl * (1 - t.square() - ratio.square()) * parametrisation.slope(prior_s, prior_std)
        prior_grads = parametrisation.unbounded_gradients(-grad_t, prior_grad_s, prior_mu, prior_s, inputs.prior_s)
    grad_log_std = dkl * (ratio.square() - 1)
    if dz is not None and inputs.eps is not None:
        grad_t, grad_log_std = dz + grad_t, torch.addcmul(grad_log_std, dz * inputs.eps, std)
    grads = parametrisation.unbounded_gradients(grad_t, grad_log_std * parametrisation.slope(s, std), mu, s, inputs.s)
    return [*grads, *prior_grads]


def _is_plain(inputs: Inputs, parametrisation: Parametrisation) -> bool:
    """Whether s is log σ² and the prior N(0, I), for which fewer passes over a block are enough."""
    return inputs.prior_mu is None and parametrisation._replace(bounds=None) == Parametrisation()


def _part(inputs: Inputs, block: Block, dtype: torch.dtype) -> Inputs:
    return Inputs(*(cast(Tensor, t if t is None else t[block].to(dtype)) for t in inputs))


def _blocks(sizes: Sequence[int]) -> Iterator[Block]:
    """Blocks of up to BLOCK elements a thread, as equal as possible."""
    b, r, d = sizes
    most = BLOCK * torch.get_num_threads()
    features = _steps(d, most)
    rows = _steps(r, max(1, most // d))
    batch = _steps(b, max(1, most // (r * d)))
    return ((i, j, k) for i in batch for j in rows for k in features)


def _steps(size: int, most: int) -> list[slice]:
    step = -(-size // -(-size // most))
    return [slice(start, start + step) for start in range(0, size, step)]


def _of_sums(sums: Tensor, block: Block) -> Block:
    """The place of a block in sums over R, D or both."""
    i, j, k = block
    return i, slice(None) if sums.shape[1] == 1 else j, slice(None) if sums.shape[2] == 1 else k


def _add_sums(twice_kl: Tensor, kl: Tensor, block: Block, sizes: Sequence[int]) -> None:
    """Adds the sums of half a block, which is contiguous, to the KL, or sets it if this is the first block."""
    out = kl[_of_sums(kl, block)]
    _, r, d = twice_kl.shape
    over_rows, over_features = kl.shape[1] != sizes[1], kl.shape[2] != sizes[2]
    if not over_rows and not over_features:
        torch.mul(twice_kl, 0.5, out=out)
        return
    if over_features:
        rows = twice_kl.reshape(-1, r * d if over_rows else d)
        short = rows.shape[1] <= _SHORT
        part = torch.mv(rows, _halves(rows.shape[1], rows.dtype)) if short else rows.sum(1).mul_(0.5)
    else:
        part = twice_kl.sum(1).mul_(0.5)
    first = (not over_rows or block[1].start == 0) and (not over_features or block[2].start == 0)
    if first:
        out.copy_(part.view_as(out))
    else:
        out += part.view_as(out)


def _std(logvar: Tensor, out: Tensor) -> Tensor:
    # exp2 takes a quarter to half the time of exp.
    return torch.mul(logvar, 0.5 * LOG2_E, out=out).exp2_()


@functools.lru_cache(maxsize=64)
def _halves(size: int, dtype: torch.dtype) -> Tensor:
    # Usable for gradients later, even if `torch.inference_mode` is on now.
    with torch.inference_mode(False):
        return torch.full((size,), 0.5, dtype=dtype, device="cpu")
