"""MMD² between a sample and a fixed mean embedding.

With points z (M, D), weights α (M,) of any sum, the squared norm c of the embedding that they approximate, and sample weights p (N,):

    MMD² = Σ_ij p_i p_j k(x_i, x_j) − 2·Σ_i p_i Σ_m α_m k(x_i, z_m) + c                                             (1)

The unbiased estimator changes the first sum alone, as formula (2) of `fastvae.reference.mmd` does. The Nyström approximation of the mean
embedding μ of rows r (R, D), with the ridge λ:

    μ_m = mean_j k(z_m, r_j),   α = (K_zz + λ·I)⁻¹ μ,   c = mean_ij k(r_i, r_j)                                      (2)
    ‖Σ_m α_m k(z_m, ·) − μ‖² = c − 2·Σ_m α_m μ_m + αᵀ K_zz α                                                        (3)

Source: Chatalic, Schreuder, Rosasco and Rudi 2022, "Nyström kernel mean embeddings".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import checks
from fastvae.radial import Kernel
from fastvae.reference.mmd import _weights, _within, bandwidths, kernel_matrix


def mmd_to_mean(
    x: Tensor,
    points: Tensor,
    weights: Tensor | None,
    norm: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    estimator: checks.Estimator = "biased",
    x_weights: Tensor | None = None,
) -> Tensor:
    """Dense (1), a scalar, for x (N, D). Arguments as in `fastvae.mmd` and `fastvae.KernelMean`; memory O(N·(N + M)·D)."""
    h, a = bandwidths(x, bandwidth, bandwidth_weights)
    p, alpha = _weights(x, x_weights), _weights(points, weights)
    cross = p @ kernel_matrix(x, points, h, a, kernel) @ alpha
    return _within(x, p, h, a, kernel, estimator) - 2 * cross + norm


class Nystrom(NamedTuple):
    """α, c and the squared error (3)."""

    weights: Tensor
    norm: Tensor
    error: Tensor


def nystrom(
    points: Tensor,
    pool: Tensor,
    ridge: float,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
) -> Nystrom:
    """Dense (2) and (3), for points (M, D) and the pool (R, D)."""
    h, a = bandwidths(points, bandwidth, bandwidth_weights)
    k, mu = kernel_matrix(points, points, h, a, kernel), kernel_matrix(points, pool, h, a, kernel).mean(1)
    alpha = torch.linalg.solve(k + ridge * torch.eye(len(points), dtype=k.dtype, device=k.device), mu)
    norm = kernel_matrix(pool, pool, h, a, kernel).mean()
    return Nystrom(alpha, norm, norm - 2 * alpha @ mu + alpha @ k @ alpha)
