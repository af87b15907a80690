"""Feature maps ψ with k(x, y) ≈ ψ(x)·ψ(y), for samples of 10⁵ rows and more: sums over pairs become sums over rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae import checks
from fastvae.dispatch import accumulation_dtype
from fastvae.kernel_sums import stable_mean
from fastvae.radial import Kernel, Laplace, Matern32, Matern52, RationalQuadratic, terms_of

# Numbers of a block of features, 32 MiB in float32.
_BLOCK = 1 << 23
# Added to the diagonal of the kernel matrix of landmarks, relative to its mean.
_RIDGE = 1e-8

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class RandomFeatures:
    """Random Fourier features, an approximation of a radial kernel by `count` random frequencies ω.

        k(x, y) ≈ mean over ω of cos(ω·(x − y)),   ω ~ the spectral density of k

    The approximation is unbiased, with a standard deviation of at most √(Σ a_b²/count) for each pair of rows, a_b the weight of bandwidth
    b: 1/√count for one bandwidth. MMD² is the mean over ω of the squared distance between the characteristic functions of two samples, so
    for one bandwidth its standard error is the standard deviation of these over ω divided by √count: about 1/√count of MMD² itself,
    √(2/count) where k is wide, and more where few ω see the difference.

    Kernels: "rbf", "imq", "rational_quadratic", "laplace", "matern32", "matern52" and sums of these, with weights of at least 0.

    Args:
        count: The number of frequencies, each of which has a cosine and a sine, for each bandwidth and each kernel of a sum.

    Source: Rahimi and Recht 2007, "Random features for large-scale kernel machines"; Rasmussen and Williams 2006, "Gaussian processes for
    machine learning", equation 4.15, for Matérn kernels.
    """

    count: int = 1024

    def __post_init__(self) -> None:
        checks.integer("count", self.count, at_least=1)

    def _of(self, z: Tensor, family: Kernel, h: Numbers, a: Numbers, generator: torch.Generator | None) -> FeatureMap:
        """The map of rows z (N, D), from random numbers of a CPU generator."""
        waves, dtype, centre = self._waves(z.shape[1], family, h, a, generator), accumulation_dtype(z.dtype), stable_mean(z)
        waves = Waves(waves.frequencies.to(z.device, dtype), waves.scales.to(z.device, dtype))
        # A large phase would lose its digits.
        return FeatureMap(lambda rows: waves((rows - centre).to(dtype)), 2 * len(waves.scales), z)

    def _waves(self, dim: int, family: Kernel, h: Numbers, a: Numbers, generator: torch.Generator | None) -> Waves:
        """The map itself for rows of `dim` features, on the CPU and in float64."""
        checks.random_features(family, a)
        frequencies, scales = [], []
        for weight, given, scale in terms_of(family):
            kernel, factor = given.canonical()
            for width, share in zip(h, a, strict=True):
                normal = _normal(dim * self.count, generator).view(dim, self.count) / (factor * scale * width)
                if isinstance(kernel, RationalQuadratic):
                    # A mixture of RBF kernels: 1/h² has a gamma distribution.
                    normal *= self._gamma(kernel.alpha, generator).sqrt()
                elif isinstance(kernel, Laplace):
                    # Its spectral density is that of a multivariate Cauchy distribution.
                    normal /= _normal(self.count, generator).abs()
                elif isinstance(kernel, (Matern32, Matern52)):
                    # Student's distribution of 2ν degrees of freedom; Laplace is ν = ½.
                    normal /= self._gamma(1.5 if isinstance(kernel, Matern32) else 2.5, generator).sqrt()
                frequencies.append(normal)
                scales.append(weight * share)
        factors = torch.tensor(scales, dtype=torch.float64, device="cpu").div(self.count).sqrt()
        return Waves(torch.cat(frequencies, 1), factors.repeat_interleave(self.count))

    def _gamma(self, shape: float, generator: torch.Generator | None) -> Tensor:
        """Numbers with a gamma distribution of mean 1."""
        shapes = torch.full((self.count,), float(shape), dtype=torch.float64, device="cpu")
        return torch._standard_gamma(shapes, generator=generator).div(shape)


@dataclass(frozen=True)
class Waves:
    """ψ(x) = scale·[cos(ω·x), sin(ω·x)] for each frequency, for rows x of their dtype on any device."""

    frequencies: Tensor  # (D, count)
    scales: Tensor  # (count,)

    def __call__(self, x: Tensor) -> Tensor:
        omega = self.frequencies.to(x.device)
        phase = x @ omega
        return torch.cat([phase.cos(), phase.sin_()], 1) * self.scales.to(omega).repeat(2)


@dataclass(frozen=True)
class NystromFeatures:
    """The Nyström approximation of a kernel by `landmarks` random rows z of the data.

        k(x, y) ≈ k(x, z) (K_zz + ridge·I)⁻¹ k(z, y)

    It is never larger than k for x = y, and exact on the landmarks. Its error falls with the part of the trace of K that the largest
    `landmarks` eigenvalues do not hold: fast for smooth kernels and few features, slowly for many unrelated ones.

    Args:
        landmarks: The number of rows, all of them if there are fewer.

    Source: Williams and Seeger 2001, "Using the Nyström method to speed up kernel machines".
    """

    landmarks: int = 512

    def __post_init__(self) -> None:
        checks.integer("landmarks", self.landmarks, at_least=1)

    def _of(self, z: Tensor, family: Kernel, h: Numbers, a: Numbers, generator: torch.Generator | None) -> FeatureMap:
        """A map with landmarks from the rows of z (N, D), by random numbers of a CPU generator."""
        checks.positive_definite_kernel(family, a)
        order = torch.randperm(len(z), generator=generator, device="cpu")[: self.landmarks]
        points = z[order.to(z.device)].double()
        k = kernel_matrix(points, points, family, h, a)
        k += _RIDGE * k.diagonal().mean() * torch.eye(len(k), dtype=k.dtype, device=k.device)
        factor, failed = torch.linalg.cholesky_ex(k)
        factor = torch.where(failed == 0, factor, torch.nan)  # rows that are not finite

        def features(rows: Tensor) -> Tensor:
            psi: Tensor = torch.linalg.solve_triangular(factor, kernel_matrix(points, rows.double(), family, h, a), upper=False)
            return psi.T

        return FeatureMap(features, len(points), z)


class FeatureMap:
    """ψ, and sums over pairs of rows z (N, D) of the kernel ψ(x)·ψ(y), block of rows by block of rows."""

    def __init__(self, features: Callable[[Tensor], Tensor], size: int, z: Tensor) -> None:
        self.features, self.size, self.z = features, size, z

    def blocks(self, progress: Callable[[float], None] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Rows of z and their ψ, (rows, size)."""
        step = max(1, _BLOCK // max(self.size, self.z.shape[1]))
        for start in range(0, len(self.z), step):
            rows = slice(start, min(start + step, len(self.z)))
            yield rows, self.features(self.z[rows])
            if progress is not None:
                progress(rows.stop / len(self.z))

    def form(self, v: Tensor, progress: Callable[[float], None] | None = None) -> Tensor:
        """Σ_{i≠j} v_i·k(z_i, z_j)·v_j of each column of v (N, C), float64."""
        total = torch.zeros(self.size, v.shape[1], dtype=torch.float64, device=v.device)
        own = torch.zeros(v.shape[1], dtype=torch.float64, device=v.device)
        squares: list[Tensor] = []
        for rows, psi in self.blocks(progress):
            part = v[rows].to(psi)
            total += psi.T @ part
            squares.append(psi.square().sum(1).double())
            own += squares[-1] @ part.square().double()
        self.squares = torch.cat(squares)
        form: Tensor = total.square().sum(0) - own
        return form

    @functools.cached_property
    def squares(self) -> Tensor:
        """k(z_i, z_i), (N,), float64. `form` finds them on its way."""
        return torch.cat([psi.square().sum(1).double() for _, psi in self.blocks()])

    def row_sums(self) -> Tensor:
        """Σ_j k(z_i, z_j), (N,), float64."""
        total = torch.stack([psi.sum(0, dtype=torch.float64) for _, psi in self.blocks()]).sum(0)
        return torch.cat([psi.double() @ total for _, psi in self.blocks()])


def _normal(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=generator, device="cpu")


def kernel_matrix(x: Tensor, y: Tensor, family: Kernel, h: Numbers, a: Numbers) -> Tensor:
    """K(x, y) of float64 rows, (N, M), by matrix products."""
    if family.radial:
        centre = x.mean(0)
        x, y, same = x - centre, y - centre, x is y
        t = torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1), x, y.T, alpha=-2).clamp_(min=0)
        t = t.fill_diagonal_(0) if same else t
    else:
        t = x @ y.T
    k = torch.zeros_like(t)
    for gamma, weight in zip(family.gamma(torch.tensor(h, dtype=torch.float64, device="cpu"), x.shape[1]).tolist(), a, strict=True):
        k += weight * family.phi(gamma * t)
    return k
