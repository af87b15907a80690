"""The reparameterisation trick and the Kullback-Leibler divergence to N(0, I).

    z = μ + exp(½·logvar)·ε                                                                                          (1)
    KL_id = ½·(μ² + exp(logvar) − 1 − logvar),   KL_i = Σ_d KL_id                                                    (2)

Backward, from the upstream dz and dKL:

    dμ = dz + dKL·μ,   dlogvar = ½·dz·ε·exp(½·logvar) + ½·dKL·(exp(logvar) − 1)                                      (3)

Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 2.4 and appendix B.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    per_dimension: bool = False,
) -> tuple[Tensor, Tensor]:
    """(z, kl) from μ and logvar (..., D); arguments as in `fastvae.reparameterize_kl`."""
    if eps is None:
        eps = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    z = mu + (0.5 * logvar).exp() * eps
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
    return z, kl if per_dimension else kl.sum(-1)
