"""Quadratic forms of a kernel matrix without its diagonal.

    S_cd = Σ_{i≠j} v_ic·k(z_i, z_j)·v_jd                                                                           (1)

Its gradient from the upstream A, with B = A + Aᵀ:

    z_i: Σ_{j≠i} (v_i·B·v_jᵀ)·∂k(z_i, z_j)/∂z_i                                                                    (2)

If the columns of v are signs, its diagonal holds the permuted statistics of a two-sample test. If they are the weights of groups of rows,
it holds the sums for the MMD of each pair of groups, with O_gh = Σ_i v_ig·k(z_i, z_i)·v_ih, P = vᵀv and t_g = Σ_i v_ig:

    MMD²_gh = w_g + w_h − c_gh − c_hg,   c_gh = (S + O)_gh/(t_g·t_h),   w_g = c_gg, unbiased S_gg/(t_g² − P_gg)     (3)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import checks
from fastvae.kernel_sums import Numbers, as_vector
from fastvae.radial import Kernel
from fastvae.reference.mmd import bandwidths, kernel_matrix


def quadratic_form(
    z: Tensor,
    v: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    diagonal: bool = False,
) -> Tensor:
    """Dense S for z (N, D) and v (N, C), shape (C, C), or its diagonal, shape (C,). Memory O(N²·D)."""
    k = kernel_matrix(z, z, *bandwidths(z, bandwidth, bandwidth_weights), kernel)
    k = k * (1 - torch.eye(z.shape[0], dtype=z.dtype, device=z.device))
    return (v * (k @ v)).sum(0) if diagonal else v.T @ k @ v


class GroupWeights(NamedTuple):
    """The numbers that formula (3) takes from the weights of G groups. They have no gradient."""

    products: Tensor  # P, (G, G)
    valid: Tensor  # which groups have at least two members, (G,)
    pairs: Tensor  # which pairs consist of two different valid groups, (G, G)
    across: Tensor  # the divisor of c, (G, G), 1 for groups that are not valid
    within: Tensor  # that of w, (G,), likewise
    unbiased: bool  # whether w leaves out the pairs of a row with itself

    @staticmethod
    def of(total: Tensor, products: Tensor, members: Tensor, unbiased: bool) -> GroupWeights:
        """From t (G,), P (G, G), or its diagonal (G,) if all else is 0, and the number of rows whose weight is not 0 (G,)."""
        valid = members >= 2
        total, products = total.where(valid, 1), torch.diag(products) if products.ndim == 1 else products
        across = total[:, None] * total
        within = (across - products).diagonal().where(valid, 1) if unbiased else across.diagonal()
        pairs = (valid[:, None] & valid).fill_diagonal_(False)
        return GroupWeights(products, valid, pairs, across, within, unbiased)


def pairs_with_self(z: Tensor, v: Tensor, kernel: Kernel, bandwidth: Numbers, weights: Numbers) -> Tensor | float:
    """O (G, G) of formula (3) in float64, or the factor if it is a multiple of P."""
    if kernel.radial:
        return kernel.value_at_zero * (weights.to(z.device).sum() if isinstance(weights, Tensor) else sum(weights))
    z, v = z.double(), v.double()
    t = z.square().sum(1, keepdim=True) * kernel.gamma(as_vector(bandwidth, z.device), z.shape[1])
    return v.T @ (v * (kernel.phi(t) @ as_vector(weights, z.device))[:, None])


def pair_values(sums: Tensor, own: Tensor | float, weights: GroupWeights) -> Tensor:
    """MMD² (G, G), formula (3), in float64, from S (G, G) and O as from `pairs_with_self`; 0 where a group is not valid."""
    if not isinstance(own, Tensor) or own.ndim == 0:
        own = own * weights.products
    across = (sums + own) / weights.across
    within = sums.diagonal() / weights.within if weights.unbiased else across.diagonal()
    return torch.where(weights.pairs, within[:, None] + within - across - across.T, 0)


def pair_upstreams(upstream: Tensor, weights: GroupWeights) -> Tensor:
    """The gradient of `pair_values` to S, from its upstream (G, G). It is that to O too, whose diagonal has none if unbiased."""
    both = upstream.double().where(weights.pairs, 0)
    both = both + both.T
    return torch.diag(both.sum(0) / weights.within) - both / weights.across
