"""Who computes MMD², and how: the library and what its users would write or install instead. Each returns the same number."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastvae

# The usual snippet holds several arrays of N×M×D; beyond this many bytes in one of them it is not run.
BROADCAST_LIMIT = 64 << 20
# The same of N×M arrays in a CPU's memory, of which eager code holds several.
MATRIX_LIMIT = 1 << 30

MMD = Callable[[Tensor, Tensor, tuple[float, ...]], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute the biased MMD² with unit weight for each bandwidth.

    Attributes:
        missing: why it can't run here, or None.
        prior: whether it takes y ~ N(0, I) in closed form, so that its value is another than that of a sample.
        note: what a reader of its row has to know.
        limit: bytes of an N×M array beyond which it is not run, or None.
    """

    name: str
    compute: MMD
    missing: str | None = None
    prior: bool = False
    note: str = ""
    limit: int | None = None

    def refuses(self, n: int, dim: int) -> str | None:
        if self.missing is None and self.compute is broadcast and 4 * n * n * dim > BROADCAST_LIMIT:
            return f"not run: one of its N×M×D arrays takes {4 * n * n * dim / 2**30:.1f} GiB"
        if self.limit is not None and 4 * n * n > self.limit:
            return f"not run: one of its N×M arrays takes {4 * n * n / 2**30:.1f} GiB"
        return self.missing


def fused(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    return fastvae.mmd(x, y, bandwidth=bandwidths)


def inductor(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    return fastvae.mmd(x, y, bandwidth=bandwidths, backend="inductor")


def fused_to_normal(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    return fastvae.mmd_to_normal(x, bandwidth=bandwidths)


def matrix(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Three N×M arrays from matrix products."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean() for h in bandwidths]).sum()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def compiled_matrix(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    return _compiled()(x, y, bandwidths)


@functools.cache
def _compiled() -> MMD:
    return torch.compile(matrix, dynamic=False)


def broadcast(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """The snippet of most tutorials: N×M×D differences."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = (a[:, None, :] - b[None, :, :]).square().sum(2)
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean() for h in bandwidths]).sum()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def keops(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    from pykeops.torch import LazyTensor

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)
        kernel: Any = sum((squared * (-0.5 / h**2)).exp() for h in bandwidths)
        return kernel.sum(dim=1).sum() / (len(a) * len(b))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


@dataclass
class GeomLoss:
    """Its loss is ½·MMD² for one bandwidth; its online backend is KeOps."""

    losses: dict[float, Any]

    def __call__(self, x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
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
        Provider("N×M×D", broadcast, note="broadcast differences"),
    ]


def expected(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> tuple[float, Tensor]:
    """MMD² and its gradient to x in float64, block by block."""
    x, y = x.detach().double(), y.detach().double()

    def sweep(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
        total, pulls = [], []
        squares = b.square().sum(1)
        for rows in a.split(256):
            squared = rows.square().sum(1)[:, None] + squares[None, :] - 2 * rows @ b.T
            kernels = [torch.exp(squared / (-2 * h * h)) for h in bandwidths]
            slope = torch.stack([k.sum(1) / h**2 for k, h in zip(kernels, bandwidths, strict=True)]).sum(0)
            moments = torch.stack([k @ b / h**2 for k, h in zip(kernels, bandwidths, strict=True)]).sum(0)
            total.append(math.fsum(float(k.sum()) for k in kernels))
            pulls.append(slope[:, None] * rows - moments)
        return math.fsum(total) / (len(a) * len(b)), torch.cat(pulls) / (len(a) * len(b))

    within_x, pull_x = sweep(x, x)
    within_y, _ = sweep(y, y)
    across, pull_y = sweep(x, y)
    return within_x + within_y - 2 * across, 2 * (pull_y - pull_x)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "triton", "pykeops", "geomloss")}
