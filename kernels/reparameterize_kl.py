"""Reparameterise + KL on a GPU, row-wise: formulas (1) to (3) of `fastvae.reference.reparameterize_kl`, each array moved once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.config import row_config


@triton.jit
def forward_kernel(
    mu_ptr,  # (N, D), contiguous, as are all others
    logvar_ptr,
    eps_ptr,
    z_ptr,
    kl_ptr,  # (N,), or (N, D) if PER_DIMENSION
    N,
    D,
    PER_DIMENSION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # where
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dtype: tl.constexpr = kl_ptr.dtype.element_ty
    kl_row = tl.zeros([BLOCK_N], dtype=dtype)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        offs = offs_n[:, None].to(tl.int64) * D + offs_d[None, :]

        # load
        mu = tl.load(mu_ptr + offs, mask=mask, other=0.0).to(dtype)
        logvar = tl.load(logvar_ptr + offs, mask=mask, other=0.0).to(dtype)
        eps = tl.load(eps_ptr + offs, mask=mask, other=0.0).to(dtype)

        # compute
        std = tl.exp(0.5 * logvar)
        z = mu + std * eps
        kl = 0.5 * (mu * mu + std * std - 1 - logvar)

        # store; a padded element has μ = logvar = 0 and so a KL of zero
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
        if PER_DIMENSION:
            tl.store(kl_ptr + offs, kl, mask=mask)
        else:
            kl_row += tl.sum(kl, 1)
    if not PER_DIMENSION:
        tl.store(kl_ptr + offs_n, kl_row, mask=mask_n)


@triton.jit
def backward_kernel(
    grad_z_ptr,
    grad_kl_ptr,
    mu_ptr,
    logvar_ptr,
    eps_ptr,
    grad_mu_ptr,
    grad_logvar_ptr,
    N,
    D,
    PER_DIMENSION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # where
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    offs = offs_n[:, None].to(tl.int64) * D + offs_d[None, :]
    dtype: tl.constexpr = grad_kl_ptr.dtype.element_ty

    # load
    dz = tl.load(grad_z_ptr + offs, mask=mask, other=0.0).to(dtype)
    mu = tl.load(mu_ptr + offs, mask=mask, other=0.0).to(dtype)
    logvar = tl.load(logvar_ptr + offs, mask=mask, other=0.0).to(dtype)
    eps = tl.load(eps_ptr + offs, mask=mask, other=0.0).to(dtype)
    if PER_DIMENSION:
        dkl = tl.load(grad_kl_ptr + offs, mask=mask, other=0.0)
    else:
        dkl = tl.load(grad_kl_ptr + offs_n, mask=mask_n, other=0.0)[:, None]

    # compute
    std = tl.exp(0.5 * logvar)
    grad_mu = dz + dkl * mu
    grad_logvar = 0.5 * (dz * eps * std + dkl * (std * std - 1))

    # store
    tl.store(grad_mu_ptr + offs, grad_mu.to(grad_mu_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_logvar_ptr + offs, grad_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=mask)


def forward(mu: Tensor, logvar: Tensor, eps: Tensor, z: Tensor, kl: Tensor) -> None:
    """Fill z (N, D) and kl, (N,) or (N, D), from contiguous μ, logvar and ε (N, D)."""
    n, d = mu.shape
    config = row_config(d)
    forward_kernel[(triton.cdiv(n, config.block_n),)](
        mu, logvar, eps, z, kl, n, d, PER_DIMENSION=kl.ndim == 2, BLOCK_N=config.block_n, BLOCK_D=config.block_d, num_warps=config.num_warps
    )


def backward(grad_z: Tensor, grad_kl: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, grad_mu: Tensor, grad_logvar: Tensor) -> None:
    """Fill dμ and dlogvar (N, D) from contiguous dz (N, D), dKL, (N,) or (N, D), μ, logvar and ε (N, D)."""
    n, d = mu.shape
    config = row_config(d)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(d, config.block_d))
    backward_kernel[grid](
        grad_z, grad_kl, mu, logvar, eps, grad_mu, grad_logvar, n, d, PER_DIMENSION=grad_kl.ndim == 2,
        BLOCK_N=config.block_n, BLOCK_D=config.block_d, num_warps=config.num_warps,
    )  # fmt: skip
