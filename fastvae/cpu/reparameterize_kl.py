"""Reparameterise + KL in blocks of rows that fit the cache. Formulas (1) to (3) of `fastvae.reference.reparameterize_kl`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastvae.cpu.memory import new_empty
from fastvae.dispatch import accumulation_dtype, needs_dispatcher
from fastvae.kernel_sums import LOG2_E

# Elements of a block for each thread. With half as many, more calls cost more than the cache saves: 5 % of the time with one thread, 20 %
# with two.
BLOCK = 131_072

# Up to this many elements PyTorch's own derivatives take less time in a training step than an autograd.Function.
_SMALL = 8_192

with torch.inference_mode(False):
    _MINUS_ONE = torch.tensor(-1.0, device="cpu")


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


def differentiable(mu: Tensor, logvar: Tensor, eps: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    """`forward`, in operations that PyTorch differentiates."""
    std = (0.5 * logvar).exp()
    twice_kl = torch.addcmul(_MINUS_ONE, std, std).addcmul(mu, mu) - logvar
    kl = 0.5 * twice_kl if per_dimension else torch.mv(twice_kl, _halves(mu.shape[1], mu.dtype))
    return torch.addcmul(mu, std, eps), kl


def forward(mu: Tensor, logvar: Tensor, eps: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    """z (N, D) and KL (N,), or per dimension (N, D), from μ, logvar and ε (N, D)."""
    dtype = accumulation_dtype(mu.dtype)
    halves = None if per_dimension else _halves(mu.shape[1], dtype)
    if (count := _blocks(mu)) <= 1:
        if mu.dtype == dtype:
            return _forward(mu, logvar, eps, halves)
        z, kl = _forward(mu.to(dtype), logvar.to(dtype), eps.to(dtype), halves)
        return z.to(mu.dtype), kl
    z = new_empty(mu, mu.shape)
    kl = new_empty(mu, mu.shape if per_dimension else mu.shape[:1], dtype)
    scratch = None
    for m, lv, e, *out in zip(*(t.chunk(count) for t in (mu, logvar, eps, z, kl)), strict=True):
        if scratch is None or len(scratch) != len(m):
            scratch = m.new_empty(m.shape, dtype=dtype)
        _forward(m.to(dtype), lv.to(dtype), e.to(dtype), halves, scratch, *out)
    return z, kl


def _forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor,
    halves: Tensor | None,
    scratch: Tensor | None = None,
    z: Tensor | None = None,
    kl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    std = _std(logvar, scratch)
    z = torch.addcmul(mu, std, eps, out=z)
    twice_kl = torch.addcmul(_MINUS_ONE, std, std, out=scratch).addcmul_(mu, mu).sub_(logvar)
    # For short rows the product is faster than a sum.
    return z, torch.mul(twice_kl, 0.5, out=kl) if halves is None else torch.mv(twice_kl, halves, out=kl)


def backward(grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    """dμ and dlogvar (N, D) from dz (N, D) and dKL (N,), or per dimension (N, D)."""
    dtype = accumulation_dtype(mu.dtype)
    columns = grad_kl if per_dimension else grad_kl[:, None]
    if (count := _blocks(mu)) <= 1:
        if mu.dtype == dtype:
            return _backward(grad_z, columns, mu, logvar, eps)
        grad_mu, grad_logvar = _backward(grad_z.to(dtype), columns.to(dtype), mu.to(dtype), logvar.to(dtype), eps.to(dtype))
        return grad_mu.to(mu.dtype), grad_logvar.to(mu.dtype)
    grad_mu, grad_logvar = new_empty(mu, mu.shape), new_empty(mu, mu.shape)
    scratch = None
    for dz, dkl, m, lv, e, *out in zip(*(t.chunk(count) for t in (grad_z, columns, mu, logvar, eps, grad_mu, grad_logvar)), strict=True):
        if scratch is None or len(scratch) != len(m):
            scratch = m.new_empty(m.shape, dtype=dtype)
        _backward(dz.to(dtype), dkl.to(dtype), m.to(dtype), lv.to(dtype), e.to(dtype), scratch, *out)
    return grad_mu, grad_logvar


def _backward(
    dz: Tensor,
    dkl: Tensor,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor,
    scratch: Tensor | None = None,
    grad_mu: Tensor | None = None,
    grad_logvar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_mu = torch.addcmul(dz, dkl, mu, out=grad_mu)
    std = _std(logvar, scratch)
    # dlogvar = ½·σ·(dz·ε + dKL·σ) − ½·dKL. If the result has another dtype, dz was converted, and its copy may be overwritten.
    out = grad_logvar if grad_logvar is None or grad_logvar.dtype == dz.dtype else dz
    term = torch.mul(dz, eps, out=out).addcmul_(dkl, std)
    return grad_mu, torch.addcmul(-0.5 * dkl, std, term, value=0.5, out=term if grad_logvar is None else grad_logvar)


def _std(logvar: Tensor, out: Tensor | None) -> Tensor:
    # exp2 takes a quarter to half the time of exp.
    return torch.mul(logvar, 0.5 * LOG2_E, out=out).exp2_()


@functools.lru_cache(maxsize=64)
def _halves(size: int, dtype: torch.dtype) -> Tensor:
    # Usable for gradients later, even if `torch.inference_mode` is on now.
    with torch.inference_mode(False):
        return torch.full((size,), 0.5, dtype=dtype, device="cpu")


def _blocks(mu: Tensor) -> int:
    return -(-mu.numel() // (BLOCK * torch.get_num_threads()))
