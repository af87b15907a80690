"""Radial kernels k(x, y) = φ(‖x−y‖²) and what is known of them in closed form."""

from __future__ import annotations

from torch import Tensor

KERNELS = ("rbf",)


def rbf(squared_distance: Tensor, bandwidth: Tensor, bandwidth_weights: Tensor) -> Tensor:
    """φ(d²) = Σ_b a_b·exp(−d²/(2h_b²)).

    Args:
        squared_distance: d², any shape.
        bandwidth: h_b, shape (B,), a length in the units of the data.
        bandwidth_weights: a_b, shape (B,).
    """
    exponent = squared_distance.unsqueeze(-1) / (-2 * bandwidth.square())
    return (bandwidth_weights * exponent.exp()).sum(-1)


def rbf_normal_mean(x: Tensor, bandwidth: Tensor, bandwidth_weights: Tensor) -> Tensor:
    """E_y k(x_i, y) for y ~ N(0, I): Σ_b a_b·(h²/(h²+1))^{D/2}·exp(−‖x_i‖²/(2(h²+1))), shape (N,).

    Source: Rustamov 2019, "Closed-form expressions for maximum mean discrepancy with applications to Wasserstein auto-encoders".
    """
    h2 = bandwidth.square()
    exponent = -0.5 * (x.shape[-1] * (1 / h2).log1p() + x.square().sum(-1, keepdim=True) / (h2 + 1))
    return (bandwidth_weights * exponent.exp()).sum(-1)


def rbf_normal_self_mean(dim: int, bandwidth: Tensor, bandwidth_weights: Tensor) -> Tensor:
    """E_{y,y'} k(y, y') for independent y, y' ~ N(0, I) in `dim` dimensions: Σ_b a_b·(h²/(h²+2))^{dim/2}, a scalar. Source: Rustamov 2019."""
    return (bandwidth_weights * (-0.5 * dim * (2 / bandwidth.square()).log1p()).exp()).sum()
