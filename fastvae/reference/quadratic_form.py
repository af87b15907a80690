"""Quadratic forms of a kernel matrix without its diagonal.

    S_cd = Σ_{i≠j} v_ic·k(z_i, z_j)·v_jd                                                                           (1)

Its gradient from the upstream A, with B = A + Aᵀ:

    z_i: Σ_{j≠i} (v_i·B·v_jᵀ)·∂k(z_i, z_j)/∂z_i                                                                    (2)

With columns of signs, its diagonal holds the permuted statistics of a two-sample test. With the weights of groups of rows as the columns
of v it holds the sums of the MMD of each pair of groups, with O_gh = Σ_i v_ig·k(z_i, z_i)·v_ih, P = vᵀv and t_g = Σ_i v_ig:

    MMD²_gh = w_g + w_h − c_gh − c_hg,   c_gh = (S + O)_gh/(t_g·t_h),   w_g = c_gg, unbiased S_gg/(t_g² − P_gg)     (3)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.radial import Kernel, Numbers, as_vector
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


@dataclass(frozen=True, eq=False)
class GroupWeights:
    """What formula (3) takes of the weights of G groups: numbers alone, without gradient.

    Attributes:
        total: t, (G,).
        products: P, (G, G), or its diagonal (G,) where all else is 0.
        members: the number of rows whose weight is not 0, (G,).
        unbiased: whether w leaves the pairs of a row with itself out.
    """

    total: Tensor
    products: Tensor
    members: Tensor
    unbiased: bool

    @functools.cached_property
    def valid(self) -> Tensor:
        """(G,), of two members or more."""
        return self.members >= 2

    @functools.cached_property
    def pairs(self) -> Tensor:
        """(G, G), of two valid groups that differ."""
        return (self.valid[:, None] & self.valid).fill_diagonal_(False)

    @functools.cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """What c (G, G) and w (G,) are divided by, 1 for groups that are not valid."""
        total = self.total.where(self.valid, 1)
        within = total.square()
        if self.unbiased:
            squares = self.products if self.products.ndim == 1 else self.products.diagonal()
            within = (within - squares).where(self.valid, 1)
        return total[:, None] * total, within


def pairs_with_self(z: Tensor, v: Tensor, kernel: Kernel, bandwidth: Numbers, weights: Numbers) -> Tensor | float:
    """O (G, G) of formula (3) in float64, or if it is a multiple of P the factor."""
    if kernel.radial:
        return kernel.at_zero * (weights.to(z.device).sum() if isinstance(weights, Tensor) else sum(weights))
    z, v = z.double(), v.double()
    t = z.square().sum(1, keepdim=True) * kernel.gamma(as_vector(bandwidth, z.device), z.shape[1])
    return v.T @ (v * (kernel.phi(t) @ as_vector(weights, z.device))[:, None])


def pair_values(sums: Tensor, own: Tensor | float, weights: GroupWeights) -> Tensor:
    """MMD² (G, G), formula (3), from S and O, (G, G) or a multiple of P, in float64; 0 where a group is not valid."""
    across_norm, within_norm = weights.norms
    if not isinstance(own, Tensor) or own.ndim == 0:
        own = own * (torch.diag(weights.products) if weights.products.ndim == 1 else weights.products)
    across = (sums + own) / across_norm
    within = (sums if weights.unbiased else sums + own).diagonal() / within_norm
    return torch.where(weights.pairs, within[:, None] + within - across - across.T, 0)


def pair_upstreams(upstream: Tensor, weights: GroupWeights) -> tuple[Tensor, Tensor]:
    """The gradients of `pair_values` to S and O from its upstream (G, G)."""
    across_norm, within_norm = weights.norms
    both = torch.where(weights.pairs, upstream, 0).double()
    both = both + both.T
    across = both / -across_norm
    to_sums = across + torch.diag(both.sum(0) / within_norm)
    return to_sums, across if weights.unbiased else to_sums
