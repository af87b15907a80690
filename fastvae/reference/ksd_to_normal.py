"""Squared kernel Stein discrepancy to N(0, I).

The score of N(0, I) is −x. With a radial kernel k = φ(t), t = γ·d² and d² = ‖x − y‖², its Stein kernel for rows of D features is

    u(x, y) = (x·y)·φ + 2γ·(d² − D)·φ' − 4γ²·d²·φ'',   u(x, x) = ‖x‖²·φ(0) − 2γ·D·φ'(0)                            (1)

    biased    KSD² = mean of u(x_i, x_j) over all pairs                                                             (2)
    unbiased  KSD² = mean over i ≠ j                                                                                (3)

The expectation of u(x, y) over x ~ N(0, I) is 0 for every y: no sample of N(0, I) is needed, and no closed form of its mean embedding.

The gradient of u to x is φ·y + c·(x − y) with

    c = 2γ·((x·y)·φ' + 2φ' + 2γ·(d² − D)·φ'' − 4γ·φ'' − 4γ²·d²·φ''')                                                (4)

and the rows of the Hessian of Σ_ij u(x_i, x_j) times a direction a are

    2·Σ_j [φ·a_j + φ'·dt·x_j + P·(a_i − a_j) + Q·(x_i − x_j)],   2·φ(0)·a_i of the pair j = i                        (5)

    dt = 2γ·(x_i − x_j)·(a_i − a_j),   P = 2γ·u',   Q = 2γ·(φ'·(a_i·x_j + x_i·a_j) + u''·dt)

with u' = c/2γ and u'' the derivatives of u to t at constant x·y: u'' = (x·y)·φ'' + 4φ'' + 2t·φ''' − 2γ·((D + 4)·φ''' + 2t·φ'''').

Source: Liu et al. 2016, "A kernelized Stein discrepancy for goodness-of-fit tests", theorem 3.6; Gorham and Mackey 2017, "Measuring sample
quality with kernels", for heavy-tailed kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae import checks
from fastvae.radial import KERNEL_NAMES, Kernel
from fastvae.reference.mmd import bandwidths


def ksd_to_normal(
    z: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.SteinKernelName | Kernel = "imq",
    estimator: checks.Estimator = "biased",
) -> Tensor:
    """Dense KSD² of z (..., N, D), shape (...). Arguments as in `fastvae.ksd_to_normal`; memory O(N²·D)."""
    rows = z.shape[-2]
    u = stein_kernel(z, *bandwidths(z, bandwidth, bandwidth_weights), kernel)
    if estimator == "biased":
        return u.mean((-2, -1))
    return (u * (1 - torch.eye(rows, dtype=z.dtype, device=z.device))).sum((-2, -1)) / (rows * (rows - 1))


def stein_kernel(z: Tensor, h: Tensor, a: Tensor, kernel: str | Kernel) -> Tensor:
    """Σ_b a_b·u_b(z_i, z_j), formula (1), shape (..., N, N)."""
    kernel = KERNEL_NAMES[kernel] if isinstance(kernel, str) else kernel
    x, y, dim = z[..., :, None, :], z[..., None, :, :], z.shape[-1]
    gamma, d2 = kernel.gamma(h, dim), (x - y).square().sum(-1)[..., None]
    dphi, d2phi = kernel.derivatives(gamma * d2)
    u = (x * y).sum(-1)[..., None] * kernel.phi(gamma * d2) + 2 * gamma * (d2 - dim) * dphi - 4 * gamma.square() * d2 * d2phi
    return u @ a
