"""The public functions: check, canonicalise, apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.radial import KERNELS

BACKENDS = ("cpu", "triton", "reference")
ESTIMATORS = ("biased", "unbiased")
PRECISIONS = ("highest", "high", "medium", "ieee")


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
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    raise NotImplementedError


def mmd_to_normal(
    x: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: str = "rbf",
    estimator: str = "biased",
    x_weights: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    return reference.mmd_to_normal(x, bandwidth=bandwidth, estimator=estimator)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    per_dimension: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return reference.reparameterize_kl(mu, logvar, eps=eps, generator=generator, per_dimension=per_dimension)
