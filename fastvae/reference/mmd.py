"""Squared maximum mean discrepancy.

With k the kernel and sample weights p (N,), q (M,), each summing to one (1/N and 1/M unless given):

    biased    MMD² = Σ_ij p_i p_j k(x_i, x_j) + Σ_ij q_i q_j k(y_i, y_j) − 2·Σ_ij p_i q_j k(x_i, y_j)              (1)
    unbiased  the first two sums over i ≠ j only, divided by 1 − Σ_i p_i² and 1 − Σ_i q_i²                          (2)
              (for equal weights: Σ_{i≠j} k / (N(N−1)), the usual U-statistic)

Against the standard normal, with both expectations over the prior in closed form (`fastvae.radial`):

    MMD² = Σ_ij p_i p_j k(x_i, x_j) − 2·Σ_i p_i E_y k(x_i, y) + E_{y,y'} k(y, y')                                   (3)

Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6; Rustamov 2019 for (3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.radial import rbf, rbf_normal_mean_exponent, rbf_normal_self_exponent


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: str = "rbf",
    estimator: str = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    """Dense MMD² between the rows of x (N, D) and y (M, D), a scalar. Arguments as in `fastvae.mmd`; memory O(N·M·D)."""
    h, a = _bandwidths(x, bandwidth, bandwidth_weights)
    p, q = _weights(x, x_weights), _weights(y, y_weights)
    cross = p @ _kernel_matrix(x, y, h, a) @ q
    return _within(x, p, h, a, estimator) + _within(y, q, h, a, estimator) - 2 * cross


def mmd_to_normal(
    x: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: str = "rbf",
    estimator: str = "biased",
    x_weights: Tensor | None = None,
) -> Tensor:
    """Dense MMD² between the rows of x (N, D) and N(0, I), a scalar. Arguments as in `fastvae.mmd_to_normal`; memory O(N²·D)."""
    h, a = _bandwidths(x, bandwidth, bandwidth_weights)
    p = _weights(x, x_weights)
    cross = p @ rbf_normal_mean_exponent(x, h).exp() @ a
    return _within(x, p, h, a, estimator) - 2 * cross + rbf_normal_self_exponent(x.shape[1], h).exp() @ a


def _bandwidths(x: Tensor, bandwidth: float | Sequence[float] | Tensor, weights: Sequence[float] | Tensor | None) -> tuple[Tensor, Tensor]:
    h = torch.as_tensor(bandwidth, dtype=x.dtype, device=x.device).reshape(-1)
    a = torch.ones_like(h) if weights is None else torch.as_tensor(weights, dtype=x.dtype, device=x.device)
    return h, a


def _weights(x: Tensor, weights: Tensor | None) -> Tensor:
    return x.new_full((x.shape[0],), 1 / x.shape[0]) if weights is None else weights


def _kernel_matrix(x: Tensor, y: Tensor, h: Tensor, a: Tensor) -> Tensor:
    return rbf((x[:, None, :] - y[None, :, :]).square().sum(-1), h, a)


def _within(x: Tensor, p: Tensor, h: Tensor, a: Tensor, estimator: str) -> Tensor:
    k = _kernel_matrix(x, x, h, a)
    if estimator == "biased":
        return p @ k @ p
    off_diagonal = k * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device))
    return p @ off_diagonal @ p / (1 - p.square().sum())
