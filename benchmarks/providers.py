"""MMD² by `fastvae` and by what its users would write or install instead, with the samples and the check of values that all share."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae import reference

# Bytes of one array beyond which code that holds several is not run: of N×M×D arrays, and on a CPU of N×M arrays.
BROADCAST_LIMIT = 64 << 20
MATRIX_LIMIT = 1 << 30
# Ten times the largest error of eager float32 at the sizes of the benchmarks.
TOLERANCE = 1e-3
# x ~ N(SHIFT, SCALE²·I), y ~ N(0, I).
SCALE, SHIFT = 0.9, 0.1
# Times √D: five bandwidths, each with half the h² of the next.
BANDWIDTH_SCALES = (0.5, 0.5**0.5, 1.0, 2**0.5, 2.0)

Bandwidths = tuple[float, ...]
MMD = Callable[[Tensor, Tensor, Bandwidths], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute the biased MMD² with weight 1 for each bandwidth.

    Attributes:
        missing: why it cannot run here, or None.
        prior: whether it takes y ~ N(0, I) in closed form. Its value then differs from that of a sample.
        note: what a reader of its rows has to know.
        array: shape of the largest arrays that it holds, "N×M" or "N×M×D".
        limit: the provider is refused if one such array takes more bytes; None for no limit.
    """

    name: str
    compute: MMD
    missing: str | None = None
    prior: bool = False
    note: str = ""
    array: str = "N×M"
    limit: int | None = None

    def refuses(self, n: int, dim: int) -> str | None:
        """Why it is not run on N = M rows, or None."""
        size = 4 * n * n * (dim if self.array == "N×M×D" else 1)
        if self.missing is None and self.limit is not None and size > self.limit:
            return f"not run: one of its {self.array} arrays takes {size / 2**30:.1f} GiB"
        return self.missing


def samples(n: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (SCALE * torch.randn(n, dim, generator=generator) + SHIFT).to(device)
    return x, torch.randn(n, dim, generator=generator).to(device)


def bandwidths_of(dim: int, count: int) -> Bandwidths:
    """One bandwidth or five, around √D."""
    return tuple(dim**0.5 * scale for scale in (BANDWIDTH_SCALES if count == 5 else (1.0,)))


def fused(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    return fastvae.mmd(x, y, bandwidth=bandwidths)


def inductor(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    return fastvae.mmd(x, y, bandwidth=bandwidths, backend="inductor")


def fused_to_normal(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    return fastvae.mmd_to_normal(x, bandwidth=bandwidths)


def matrix(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    """What users write: N×M arrays from matrix products."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean() for h in bandwidths]).sum()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def compiled_matrix(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    return _compiled()(x, y, bandwidths)


@functools.cache
def _compiled() -> MMD:
    return torch.compile(matrix, dynamic=False)


def broadcast(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    """What most tutorials write: N×M×D differences."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = (a[:, None, :] - b[None, :, :]).square().sum(2)
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean() for h in bandwidths]).sum()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def keops(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    from pykeops.torch import LazyTensor

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)
        kernel: Any = sum((squared * (-0.5 / h**2)).exp() for h in bandwidths)
        return kernel.sum(dim=1).sum() / (len(a) * len(b))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


@dataclass
class GeomLoss:
    """Its loss is ½·MMD² with one bandwidth. Its online backend is KeOps."""

    losses: dict[float, Any]

    def __call__(self, x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
        from geomloss import SamplesLoss

        for h in bandwidths:
            self.losses.setdefault(h, SamplesLoss("gaussian", blur=h, backend="online"))
        return 2 * torch.stack([self.losses[h](x, y) for h in bandwidths]).sum()


def _missing(*modules: str) -> str | None:
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"missing: {', '.join(absent)} not installed" if absent else None


def providers(device: str) -> list[Provider]:
    flags = f"built with CXXFLAGS='{os.environ.get('CXXFLAGS', '')}'" if device == "cpu" else ""
    keops_missing = _missing("pykeops")
    geomloss_missing = _missing("geomloss", "pykeops")
    limit = MATRIX_LIMIT if device == "cpu" else None
    return [
        Provider("fastvae", fused, note="Triton" if device == "cuda" else "CPU path"),
        Provider("fastvae, inductor", inductor, None if device == "cpu" else "a backend of the CPU", note="CPU path, loops compiled"),
        Provider("fastvae, closed-form prior", fused_to_normal, prior=True),
        Provider("eager", matrix, note="matrix products, N×M", limit=limit),
        Provider("torch.compile", compiled_matrix, note="of eager", limit=limit),
        Provider("KeOps", keops, keops_missing, note=flags),
        Provider("geomloss", GeomLoss({}), geomloss_missing, note=f"online {flags}".strip()),
        Provider("N×M×D", broadcast, note="broadcast differences", array="N×M×D", limit=BROADCAST_LIMIT),
    ]


def eager_kernel_matmul(x: Tensor, y: Tensor, v: Tensor, h: float) -> Tensor:
    """What users write for K(x, y)·v: an N×M array."""
    return torch.exp(torch.cdist(x, y).square() / (-2 * h * h)) @ v


def eager_reparameterize_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What users write for z and the KL divergence of each row."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)
    return z, -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


def eager_reparameterize_kl_moments(moments: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z and the KL of each sample from moments (B, 2C, H, W), in the operations of diffusers' `DiagonalGaussianDistribution`."""
    mean, logvar = torch.chunk(moments, 2, dim=1)
    logvar = torch.clamp(logvar, -30.0, 20.0)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    return mean + std * eps, 0.5 * torch.sum(torch.pow(mean, 2) + var - 1.0 - logvar, dim=[1, 2, 3])


def expected(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> tuple[float, Tensor]:
    """MMD² and its gradient to x in float64, a block of rows at a time."""
    x, y = x.detach().double(), y.detach().double()

    def mean_kernel(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
        """Mean of the kernel over all pairs, and minus its gradient to a, with b held fixed."""
        totals, gradients = [], []
        squares = b.square().sum(1)
        for rows in a.split(256):
            squared = rows.square().sum(1)[:, None] + squares[None, :] - 2 * rows @ b.T
            kernels = [torch.exp(squared / (-2 * h * h)) for h in bandwidths]
            scaled = torch.stack([k / h**2 for k, h in zip(kernels, bandwidths, strict=True)]).sum(0)
            totals.append(math.fsum(float(k.sum()) for k in kernels))
            gradients.append(scaled.sum(1)[:, None] * rows - scaled @ b)
        return math.fsum(totals) / (len(a) * len(b)), torch.cat(gradients) / (len(a) * len(b))

    within_x, gradient_within = mean_kernel(x, x)
    within_y, _ = mean_kernel(y, y)
    across, gradient_across = mean_kernel(x, y)
    return within_x + within_y - 2 * across, 2 * (gradient_across - gradient_within)


def verdict(provider: Provider, x: Tensor, y: Tensor, h: Bandwidths, exact: tuple[float, Tensor]) -> str:
    """The status of a row: "ok", or what is wrong with the value or the gradient."""
    try:
        leaf = x.clone().requires_grad_()
        value = provider.compute(leaf, y, h)
        value.backward()
    except Exception as error:
        return failure(error)
    if provider.prior:
        value = fastvae.mmd_to_normal(x[:1024], bandwidth=h)
        return verdict_of_value(float(value), float(reference.mmd_to_normal(x[:1024].double(), bandwidth=h)))
    exact_value, exact_grad = exact
    wrong = float((leaf.grad.double() - exact_grad).norm() / exact_grad.norm())  # type: ignore[union-attr]
    status = verdict_of_value(value.item(), exact_value)
    return status if status != "ok" or wrong <= TOLERANCE else f"wrong gradient: relative error {wrong:.1e}"


def verdict_of_value(value: float, exact: float) -> str:
    wrong = abs(value - exact) / abs(exact)
    return "ok" if wrong <= TOLERANCE else f"wrong value: relative error {wrong:.1e}"


def failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
