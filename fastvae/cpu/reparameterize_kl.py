"""Reparameterise + KL in blocks of rows that stay in cache: formulas (1) to (3) of `fastvae.reference.reparameterize_kl`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.ops.common import accumulation_dtype
from fastvae.radial import LOG2_E

# Elements of a block: its five float32 operands fit a 1 MiB second-level cache, and two threads each get a full share of the block.
BLOCK = 65_536


def forward(mu: Tensor, logvar: Tensor, eps: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    """z (N, D) and KL (N,), or (N, D) per dimension, from μ, logvar and ε (N, D)."""
    dtype = accumulation_dtype(mu.dtype)
    z = mu.new_empty(mu.shape)
    kl = mu.new_empty(mu.shape if per_dimension else mu.shape[:1], dtype=dtype)
    for rows in _blocks(mu):
        m, lv, e = (t[rows].to(dtype) for t in (mu, logvar, eps))
        term = _std(lv)
        z[rows] = torch.addcmul(m, term, e)
        term.mul_(term).addcmul_(m, m).sub_(lv).sub_(1).mul_(0.5)
        kl[rows] = term if per_dimension else term.sum(1)
    return z, kl


def backward(grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, per_dimension: bool) -> tuple[Tensor, Tensor]:
    """dμ and dlogvar (N, D) from dz (N, D) and dKL (N,), or (N, D) per dimension."""
    dtype = accumulation_dtype(mu.dtype)
    grad_mu, grad_logvar = mu.new_empty(mu.shape), mu.new_empty(mu.shape)
    for rows in _blocks(mu):
        dz, dkl, m, lv, e = (t[rows].to(dtype) for t in (grad_z, grad_kl, mu, logvar, eps))
        if not per_dimension:
            dkl = dkl[:, None]
        grad_mu[rows] = torch.addcmul(dz, dkl, m)
        std = _std(lv)
        term = (std * std).sub_(1).mul_(dkl)
        grad_logvar[rows] = term.addcmul_(std.mul_(e), dz).mul_(0.5)
    return grad_mu, grad_logvar


def _blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _std(logvar: Tensor) -> Tensor:
    """exp(½·logvar), by the faster exp2."""
    return (logvar * (0.5 * LOG2_E)).exp2_()
