"""The KL divergence of β-TC-VAE's objective in its three terms, with the densities of the aggregate posterior estimated from a batch.

With ℓ_ijd = log N(z_id; μ_jd, exp(logvar_jd)), N samples z_i and posteriors j of a data set of K examples, z_i drawn from posterior i:

    log q(z_i) = log Σ_j w_ij·exp(Σ_d ℓ_ijd),   log q(z_id) = log Σ_j w_ij·exp(ℓ_ijd)                                (1)

    minibatch weighted      w_ij = 1/(N·K)                                                                           (2)
    minibatch stratified    w_ii = 1/K,  w_ij = (K − N + 1)/(K·(N − 1)) for j = i + 1 (0 after the last),
                            w_ij = 1/(N − 1) for all other j                                                         (3)

    mutual information  I(z; n) = mean_i (log q(z_i|n_i) − log q(z_i)),   log q(z_i|n_i) = Σ_d ℓ_iid
    total correlation           = mean_i (log q(z_i) − Σ_d log q(z_id))
    dimension-wise KL           = mean_i (Σ_d log q(z_id) − log p(z_i)),  p = N(0, I)                                (4)

The sum of the three is mean_i (log q(z_i|n_i) − log p(z_i)), the KL divergence to the prior estimated from the same samples.

(3) is unbiased for q(z) where the other N − 1 examples are drawn without replacement: each has an expected density
A = Σ_{j≠i} q(z|j)/(K − 1), and ((N − 2)/(N − 1) + (K − N + 1)/(K·(N − 1)))·A = (K − 1)/K·A, to which the example itself adds q(z|i)/K.
(2) underestimates q(z), as its weights sum to 1/K and not to one. Some implementations write w_ii and w_i,i+1 through a flat view of the
weight matrix with the stride of its rows, which puts them into the first two columns; here they are where (3) has them.

Backward, from the upstream a_i to log q(z_i) and b_id to log q(z_id):

    G_ijd = a_i·w_ij·exp(Σ_d ℓ_ijd)/q(z_i) + b_id·w_ij·exp(ℓ_ijd)/q(z_id)
    dz_id = −Σ_j G_ijd·(z_id − μ_jd)/σ²_jd,   dμ_jd = Σ_i G_ijd·(z_id − μ_jd)/σ²_jd,
    dlogvar_jd = ½·Σ_i G_ijd·((z_id − μ_jd)²/σ²_jd − 1)                                                              (5)

Source: Chen, Li, Grosse and Duvenaud 2018, "Isolating sources of disentanglement in variational autoencoders", section 4 and appendix C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import checks

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# log2 of the largest 1/σ. A difference of two codes times it is finite, and a smaller σ is below the rounding of every μ but 0.
LARGEST_ROOT = {torch.float64: 900.0, torch.float32: 100.0}


class KLDecomposition(NamedTuple):
    """The terms of (4), scalars in nats.

    Attributes:
        mutual_information: index-code mutual information.
        total_correlation: of the aggregate posterior's dimensions.
        dimensionwise_kl: of each dimension's aggregate posterior to N(0, 1), summed over dimensions.
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimensionwise_kl: Tensor


class LogWeights(NamedTuple):
    """log w_ij of (2) or (3) for j = i, for j = i + 1 and for all other j."""

    own: float
    next: float
    other: float


def log_weights(rows: int, dataset_size: int, stratified: bool) -> LogWeights:
    """The log weights for a batch of `rows` posteriors."""
    if not stratified:
        return LogWeights(*[-math.log(rows) - math.log(dataset_size)] * 3)
    own, other = -math.log(dataset_size), -math.log(rows - 1)
    return LogWeights(own, math.log(dataset_size - rows + 1) + own + other, other)


def total_correlation(
    z: Tensor, mu: Tensor, logvar: Tensor, *, dataset_size: int, estimator: checks.DensityEstimator = "minibatch_weighted"
) -> KLDecomposition:
    """Dense (4) from z, μ and logvar (N, D). Arguments as in `fastvae.total_correlation`; memory O(N²·D)."""
    n = z.shape[0]
    log_density = gaussian_log_density(z[:, None, :], mu[None, :, :], logvar[None, :, :])
    own, following, other = log_weights(n, dataset_size, estimator == "minibatch_stratified")
    log_w = z.new_full((n, n), other)
    i = torch.arange(n, device=z.device)
    log_w[i, (i + 1) % n] = following
    log_w[i, i] = own
    log_q = torch.logsumexp(log_w + log_density.sum(2), 1)
    log_q_dims = torch.logsumexp(log_w[:, :, None] + log_density, 1)
    return decompose(z, mu, logvar, log_q, log_q_dims)


def gaussian_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; μ, exp(logvar)), elementwise."""
    return -0.5 * (((z - mu) * precision_root(logvar)).square() + logvar) - HALF_LOG_2PI


def precision_root(logvar: Tensor) -> Tensor:
    """1/σ, clamped to a finite number: for z = μ, 0 times infinity would be nan."""
    return (logvar * -0.5).clamp(max=LARGEST_ROOT[logvar.dtype] * math.log(2)).exp()


def decompose(z: Tensor, mu: Tensor, logvar: Tensor, log_q: Tensor, log_q_dims: Tensor) -> KLDecomposition:
    """(4) from z, μ and logvar (N, D), log q(z_i) (N,) and log q(z_id) (N, D)."""
    log_conditional = gaussian_log_density(z, mu, logvar).sum(1)
    log_marginals = log_q_dims.sum(1)
    log_prior = (-0.5 * z.square() - HALF_LOG_2PI).sum(1)
    return KLDecomposition((log_conditional - log_q).mean(), (log_q - log_marginals).mean(), (log_marginals - log_prior).mean())
