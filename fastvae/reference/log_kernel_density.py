"""Logarithms of sums of a kernel, and products with a kernel matrix that is normalised by them.

With l_ij = log Σ_b a_b·k_b(x_i, y_j), from the logarithm of φ in closed form:

    log density     log p(x_i) = log Σ_j w_j·exp(l_ij)                                                              (1)
    normalised      out_i = Σ_j P_ij·v_j,   P_ij = exp(l_ij − r_i − c_j)                                            (2)

with R_i = log Σ_j exp(l_ij) and C_j = log Σ_i exp(l_ij): r = R, c = 0 makes the rows of P sum to one ("rows"), r = 0, c = C its columns
("columns"), and r = R/2, c = C/2 makes P the root of the product of these two ("both"). The gradient of (2) to l, from the upstream g:

    l_ij: P_ij·g_i·v_j − ρ·exp(l_ij − R_i)·(g_i·out_i) − κ·exp(l_ij − C_j)·(v_j·Σ_i P_ij·g_i)                       (3)

with ρ, κ = 1, 0 for "rows", 0, 1 for "columns" and ½, ½ for "both". For an RBF kernel the gradient of (1) to x_i is (m_i − x_i)/h², with
m_i the mean of the rows of y under the weights w_j·exp(l_ij − log p(x_i)): a step of mean shift is x + h²·∇ log p(x).

Source: Silverman 1986, "Density estimation", section 4.2; Fukunaga and Hostetler 1975, "The estimation of the gradient of a density
function"; Tsai et al. 2019, "Transformer dissection: an unified understanding for transformer's attention via the lens of kernel", for (2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae import checks
from fastvae.radial import KERNEL_NAMES, Kernel
from fastvae.reference.mmd import bandwidths


def log_kernel_density(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    y_weights: Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    normalized: bool = False,
) -> Tensor:
    """Dense (1) for x (..., N, D) and y (..., M, D), shape (..., N). Arguments as in `fastvae.log_kernel_density`; memory O(N·M·D)."""
    h, a = bandwidths(x, bandwidth, bandwidth_weights)
    log_k = log_kernel_matrix(x, y, h, a, kernel, log_constant(h, x.shape[-1]) if normalized else 0.0)
    if y_weights is None:
        return log_k.logsumexp(-1) - math.log(y.shape[-2])
    return weighted_logsumexp(log_k, y_weights[..., None, :])


def normalized_matmul(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    *,
    normalize: checks.Normalization,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
) -> Tensor:
    """Dense (2) for x (..., N, D), y (..., M, D) and v (..., M, C), shape (..., N, C). Memory O(N·M·D)."""
    h, a = bandwidths(x, bandwidth, bandwidth_weights)
    log_k = log_kernel_matrix(x, y, h, a, kernel)
    if normalize == "both":
        return (log_k - 0.5 * log_k.logsumexp(-1, keepdim=True) - 0.5 * log_k.logsumexp(-2, keepdim=True)).exp() @ v
    return log_k.softmax(-1 if normalize == "rows" else -2) @ v


def log_constant(h: Tensor, dim: int) -> Tensor:
    """log of (2πh²)^(−D/2), by which an RBF kernel is a density."""
    return -0.5 * dim * (math.log(2 * math.pi) + 2 * h.log())


def weighted_logsumexp(values: Tensor, weights: Tensor) -> Tensor:
    """log Σ w·exp(value) over the last dimension, nan if a weight is negative. Unlike by values + log w, a weight of 0 has a gradient."""
    weights = torch.where(weights < 0, torch.nan, weights)
    with torch.no_grad():
        largest = (values + weights.log()).amax(-1, keepdim=True)
        largest = torch.where(largest.isfinite(), largest, 0)
        most = 0.99 * math.log(torch.finfo(values.dtype).max)
    # Only where the weight is zero may a value be larger than the rest by so much that its exponential overflows.
    terms = (values - largest).clamp(max=most).exp() * weights
    return terms.sum(-1).log() + largest[..., 0]


def log_kernel_matrix(
    x: Tensor, y: Tensor, h: Tensor, weights: Tensor, kernel: str | Kernel, log_constants: Tensor | float = 0.0
) -> Tensor:
    """l of each pair, shape (..., N, M), with a factor for each bandwidth."""
    kernel = KERNEL_NAMES[kernel] if isinstance(kernel, str) else kernel
    pairs = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return weighted_logsumexp(kernel.log_phi(pairs[..., None] * kernel.gamma(h, x.shape[-1])) + log_constants, weights)
