"""Quadratic forms of a kernel matrix without its diagonal.

    S_cd = Σ_{i≠j} v_ic·k(z_i, z_j)·v_jd                                                                           (1)

With the weights of groups of rows as the columns of v, S holds every sum that the MMD of each pair of groups is made of; with columns of
signs, its diagonal holds the permuted statistics of a two-sample test. Its gradient from the upstream A, with B = A + Aᵀ:

    z_i: Σ_{j≠i} (v_i·B·v_jᵀ)·∂k(z_i, z_j)/∂z_i                                                                    (2)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.radial import Kernel
from fastvae.reference.mmd import bandwidths, kernel_matrix


def quadratic_form(
    z: Tensor,
    v: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: str | Kernel = "rbf",
    diagonal: bool = False,
) -> Tensor:
    """Dense S of z (N, D) and v (N, C), shape (C, C), or its diagonal, shape (C,). Memory O(N²·D)."""
    k = kernel_matrix(z, z, *bandwidths(z, bandwidth, bandwidth_weights), kernel)
    k = k * (1 - torch.eye(z.shape[0], dtype=z.dtype, device=z.device))
    return (v * (k @ v)).sum(0) if diagonal else v.T @ k @ v
