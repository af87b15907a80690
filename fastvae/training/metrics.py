"""How much the codes tell about the data, and how near their marginal q(z) is to the prior N(0, I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.functional import mmd_to_normal, reparameterize_kl

CHUNK = 1024


def mutual_information(mu: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None, chunk: int = CHUNK) -> float:
    """I(x; z) in nats under the aggregated posterior q(z) = 1/N·Σ_j q(z|x_j) of N samples.

        I = 1/N·Σ_i [log q(z_i|x_i) − log(1/N·Σ_j q(z_i|x_j))],   z_i ~ q(z|x_i)                                        (1)

    It is at most log N: where it comes near that, more samples would give more. In float64, by matrix products over `chunk` rows at a
    time: memory O(chunk·N).

    Args:
        mu, logvar: of the Gaussian posteriors, shape (N, D).

    Source: Hoffman and Johnson 2016, "ELBO surgery".
    """
    n, _ = mu.shape
    mu, logvar = mu.detach().double(), logvar.detach().double()
    eps = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    z = mu + (0.5 * logvar).exp() * eps
    # −2·log q(z_i|x_j), without the constant D·log 2π, is [z², z]·[1/σ², −2μ/σ²]ᵀ + Σ(μ²/σ² + logvar).
    # At a small σ that cancels where z_i is near mu_j, which is at i = j: the own pairs come from eps.
    precision = (-logvar).exp()
    right = torch.cat([precision, -2 * mu * precision], dim=1).T
    column = (mu.square() * precision + logvar).sum(1)
    own = (eps.square() + logvar).sum(1)
    total = 0.0
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        energy = torch.cat([z[rows].square(), z[rows]], dim=1) @ right + column
        energy[torch.arange(rows.stop - start, device=mu.device), torch.arange(start, rows.stop, device=mu.device)] = own[rows]
        log_marginal = torch.logsumexp(-0.5 * energy, dim=1) - math.log(n)
        total += float((-0.5 * own[rows] - log_marginal).sum())
    return total / n


def active_units(mu: Tensor, *, threshold: float = 0.01) -> int:
    """The latent dimensions whose posterior mean moves with x: Var_x(mu_d) > threshold. Source: Burda, Grosse and Salakhutdinov 2016."""
    return int((mu.detach().double().var(0, correction=0) > threshold).sum())


def collapsed_units(mu: Tensor, logvar: Tensor, *, epsilon: float = 0.01, delta: float = 0.01) -> int:
    """The latent dimensions whose posterior is the prior: KL(q(z_d|x) ‖ N(0, 1)) < epsilon for all but a share `delta` of the x.

    Unlike `active_units` it also sees a variance that moves with x. Source: Lucas et al. 2019, "Don't blame the ELBO!", definition 1.
    """
    mu, logvar = mu.detach().double(), logvar.detach().double()
    _, kl = reparameterize_kl(mu, logvar, eps=torch.zeros_like(mu), per_dimension=True)
    return int(((kl < epsilon).double().mean(0) >= 1 - delta).sum())


def marginal_summary(z: Tensor) -> dict[str, float]:
    """How far q(z) is from N(0, I), from codes z (N, D).

    `mean` and `correlation` are the largest absolute ones, 0 at the prior; `std_min` and `std_max` are 1 there; `mmd` is the unbiased
    MMD² with bandwidth √D, so it may be slightly negative.
    """
    z = z.detach().double()
    std = z.std(0, correction=0)
    centred = (z - z.mean(0)) / std.clamp_min(torch.finfo(z.dtype).tiny)
    correlation = centred.T @ centred / z.shape[0]
    return {
        "mean": float(z.mean(0).abs().max()),
        "std_min": float(std.min()),
        "std_max": float(std.max()),
        "correlation": float((correlation - torch.diag(correlation.diagonal())).abs().max()),
        "mmd": float(mmd_to_normal(z.float(), bandwidth=math.sqrt(z.shape[1]), estimator="unbiased")),
    }
