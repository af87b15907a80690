"""What users write for the operations with a kernel matrix, in plain PyTorch: every option that `benchmarks.small` times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Distances = Callable[[Tensor, Tensor], Tensor]


def by_products(x: Tensor, y: Tensor) -> Tensor:
    """‖x − y‖², (..., N, M)."""
    return x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT


def by_cdist(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square()


def log_kernel(name: str, x: Tensor, y: Tensor, h: float, squared: Distances) -> Tensor:
    if name == "laplace":
        return torch.cdist(x, y) / -h
    d2 = squared(x, y)
    return d2 / (-2 * h * h) if name == "rbf" else -torch.log1p(d2 / h**2)


def kernel(name: str, x: Tensor, y: Tensor, h: float, squared: Distances) -> Tensor:
    if name in ("rbf", "imq"):
        d2 = squared(x, y)
        return torch.exp(d2 / (-2 * h * h)) if name == "rbf" else 1 / (1 + d2 / h**2)
    distance = torch.cdist(x, y)
    if name == "laplace":
        return torch.exp(distance / -h)
    if name == "energy":
        return distance / -h
    if name == "riesz":
        return -((distance / h) ** 1.5)
    if name == "rbf + laplace":
        return torch.exp(distance.square() / (-2 * h * h)) + 0.5 * torch.exp(distance / (-2 * h))
    u = distance * ((3 if name == "matern32" else 5) ** 0.5 / h)
    return (1 + u if name == "matern32" else 1 + u + u * u / 3) * torch.exp(-u)


def mmd(name: str, x: Tensor, y: Tensor, h: float, squared: Distances = by_products) -> Tensor:
    return kernel(name, x, x, h, squared).mean() + kernel(name, y, y, h, squared).mean() - 2 * kernel(name, x, y, h, squared).mean()


def mmd_to_mean(x: Tensor, points: Tensor, weights: Tensor, norm: float, h: float, squared: Distances = by_products) -> Tensor:
    return kernel("rbf", x, x, h, squared).mean() - 2 * (kernel("rbf", x, points, h, squared) @ weights).mean() + norm


def log_density(
    name: str, x: Tensor, y: Tensor, h: Sequence[float], weights: Tensor | None = None, squared: Distances = by_products
) -> Tensor:
    if len(h) > 1:
        d2 = squared(x, y)
        return torch.stack([(d2 / (-2 * width**2)).logsumexp(-1) for width in h]).logsumexp(0) - math.log(y.shape[-2])
    logs = log_kernel(name, x, y, h[0], squared)
    return logs.logsumexp(-1) - math.log(y.shape[-2]) if weights is None else (logs + weights.log()).logsumexp(-1)


def product(name: str, x: Tensor, y: Tensor, v: Tensor, h: float, normalize: str | None, squared: Distances = by_products) -> Tensor:
    if normalize is None:
        return kernel(name, x, y, h, squared) @ v
    logs = log_kernel(name, x, y, h, squared)
    if normalize == "both":
        return (logs.softmax(-1) * logs.softmax(-2)).sqrt() @ v
    return logs.softmax(-1 if normalize == "rows" else -2) @ v


def ksd_to_normal(name: str, z: Tensor, h: Sequence[float], unbiased: bool = False) -> Tensor:
    products = z @ z.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    d2 = squares[..., :, None] + squares[..., None, :] - 2 * products
    parts = []
    for width in h:
        if name == "imq":
            k = 1 / (1 + d2 / width**2)
            parts.append(products * k - 2 / width**2 * (d2 - z.shape[-1]) * k**2 - 8 / width**4 * d2 * k**3)
        else:
            parts.append(torch.exp(d2 / (-2 * width**2)) * (products - (d2 - z.shape[-1]) / width**2 - d2 / width**4))
    u = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    if not unbiased:
        return u.mean((-2, -1))
    n = z.shape[-2]
    return (u.sum((-2, -1)) - u.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))
