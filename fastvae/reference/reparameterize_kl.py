"""The reparameterisation trick and the Kullback-Leibler divergence between two diagonal Gaussians.

`fastvae.parametrisation` says how μ and σ follow from an encoder's numbers. N(μ₀, σ₀²) is the prior, N(0, 1) by default.

    z = μ + σ·ε                                                                                                      (1)
    KL = ½·(t² + r² − 1) − log r   summed over dimensions,   t = (μ − μ₀)/σ₀,  r = σ/σ₀                              (2)

Backward, from the upstream dz and dKL:

    dμ = dz + dKL·t/σ₀,         ds = (dz·ε·σ + dKL·(r² − 1))·d log σ/ds                                              (3)
    dμ₀ = −dKL·t/σ₀,            ds₀ = dKL·(1 − t² − r²)·d log σ₀/ds₀                                                 (4)

For s = log σ² and the prior N(0, I) this is z = μ + exp(½·s)·ε, KL = ½·(μ² + exp(s) − 1 − s), and d log σ/ds = ½.

Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 2.4 and appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.parametrisation import Parametrisation

_LOGVAR = Parametrisation()


def reparameterize_kl(
    mu: Tensor,
    s: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    kl_dims: int | Sequence[int] = -1,
    parametrisation: Parametrisation = _LOGVAR,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """z and KL, summed over `kl_dims`, from μ and s (...). `prior` holds μ₀ and s₀, which are broadcast."""
    if eps is None:
        eps = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    mu, s = parametrisation.bounded(mu, s)
    std, logvar = parametrisation.spread(s)
    return mu + std * eps, _kl(mu, s, std, logvar, kl_dims, parametrisation, prior)


def gaussian_kl(
    mu: Tensor,
    s: Tensor,
    *,
    kl_dims: int | Sequence[int] = -1,
    parametrisation: Parametrisation = _LOGVAR,
    prior: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The KL of `reparameterize_kl`."""
    mu, s = parametrisation.bounded(mu, s)
    return _kl(mu, s, *parametrisation.spread(s), kl_dims, parametrisation, prior)


def _kl(
    mu: Tensor,
    s: Tensor,
    std: Tensor,
    logvar: Tensor,
    kl_dims: int | Sequence[int],
    parametrisation: Parametrisation,
    prior: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if prior is not None:
        prior_mu, prior_s = parametrisation.bounded(*prior)
        prior_std, prior_logvar = parametrisation.spread(prior_s)
        mu, std = parametrisation.relative(mu, s, std, prior_mu, prior_s, prior_std)
        logvar = logvar - prior_logvar
    kl = 0.5 * (mu.square() + std.square() - 1 - logvar)
    # A sum over no dimension would be one over all.
    return kl.sum(kl_dims) if isinstance(kl_dims, int) else kl.sum(tuple(kl_dims)) if kl_dims else kl
