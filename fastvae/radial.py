"""The kernel functions: φ of each family, as a function of one number t of a pair.

A radial kernel is φ(t) of t = γ·‖x−y‖² with γ = 1/(2h²); the polynomial kernel is φ(t) of t = γ·x·y with γ = 1/(D·h²).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """φ of one family of kernels, which lacks only its bandwidths; the fields of a subclass are its parameters.

    Attributes:
        name: what `kernel=` of the public functions calls it.
        radial: t is a multiple of ‖x−y‖², not of x·y.
        value_at_zero: φ(0), the constant that sums of k near it leave out.
        takes_distance: φ is a function of √t, in which a small error of a small t is a large one.
        unbounded_slope: φ' goes to infinity as t goes to 0.
    """

    name: ClassVar[str]
    radial: ClassVar[bool] = True
    takes_distance: ClassVar[bool] = False
    unbounded_slope: ClassVar[bool] = False

    @property
    def value_at_zero(self) -> float:
        return 1.0

    def phi(self, t: Tensor) -> Tensor:
        """φ(t), elementwise."""
        raise NotImplementedError

    def gamma(self, bandwidth: Tensor, dim: int) -> Tensor:
        """γ of bandwidths h for rows of `dim` features."""
        return (0.5 if self.radial else 1 / dim) / bandwidth.square()

    def canonical(self) -> tuple[Kernel, float]:
        """A kernel that the backends know, and the factor that takes h to its bandwidth."""
        return self, 1.0

    @property
    def parameters(self) -> list[float]:
        return [float(getattr(self, field.name)) for field in fields(self)]


def _parameter(name: str, value: Any, rule: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _root(t: Tensor) -> Tensor:
    """√t, and its derivatives 0 at 0."""
    zero = t <= 0
    return torch.where(zero, 0, torch.where(zero, 1, t).sqrt())


@dataclass(frozen=True)
class RBF(Kernel):
    """exp(−d²/(2h²)), the Gaussian kernel."""

    name = "rbf"

    def phi(self, t: Tensor) -> Tensor:
        return (-t).exp()


@dataclass(frozen=True)
class RationalQuadratic(Kernel):
    """(1 + d²/(2αh²))^−α, a mixture of RBF kernels.

    Source: Rasmussen and Williams 2006, "Gaussian processes for machine learning", equation 4.19.
    """

    alpha: float = 1.0
    name = "rational_quadratic"

    def __post_init__(self) -> None:
        # Beyond it is an RBF kernel but for what its evaluation rounds.
        _parameter("alpha", self.alpha, "greater than 0 and at most 1000", lambda alpha: 0 < alpha <= 1000)

    def phi(self, t: Tensor) -> Tensor:
        return (1 + t / self.alpha) ** -self.alpha


@dataclass(frozen=True)
class IMQ(Kernel):
    """h²/(h² + d²), the inverse multiquadric of Wasserstein autoencoders, C = h². Source: Tolstikhin et al. 2018, section 4."""

    name = "imq"

    def phi(self, t: Tensor) -> Tensor:
        return 1 / (1 + 2 * t)

    def canonical(self) -> tuple[Kernel, float]:
        return RationalQuadratic(1.0), 0.5**0.5


@dataclass(frozen=True)
class Laplace(Kernel):
    """exp(−d/h) of the Euclidean distance d. Its gradient at d = 0, where it has none, is taken as 0."""

    name = "laplace"
    takes_distance = True
    unbounded_slope = True

    def phi(self, t: Tensor) -> Tensor:
        return (-_root(2 * t)).exp()


@dataclass(frozen=True)
class Energy(Kernel):
    """−d/h, with which MMD² at h = 1 is the energy distance. Its gradient at d = 0, where it has none, is taken as 0.

    Source: Sejdinovic et al. 2013, "Equivalence of distance-based and RKHS-based statistics in hypothesis testing".
    """

    name = "energy"
    takes_distance = True
    unbounded_slope = True

    @property
    def value_at_zero(self) -> float:
        return 0.0

    def phi(self, t: Tensor) -> Tensor:
        return -_root(2 * t)


@dataclass(frozen=True)
class Polynomial(Kernel):
    """(x·y/(D·h²) + coef0)^degree; by default that of the kernel inception distance. Source: Bińkowski et al. 2018, section 4.

    It has no bound: with data of size 30 its value is of the order of 10⁸ and its gradient past 65,504, which in float16 is inf or nan.
    """

    degree: int = 3
    coef0: float = 1.0
    name = "polynomial"
    radial = False

    def __post_init__(self) -> None:
        _parameter("degree", self.degree, "a whole number from 1 to 8", lambda degree: degree in range(1, 9))
        _parameter("coef0", self.coef0, "at least 0", lambda coef0: coef0 >= 0)

    @property
    def value_at_zero(self) -> float:
        return float(self.coef0) ** int(self.degree)

    @property
    def powers(self) -> list[tuple[int, float]]:
        """(n, c_n) of φ(t) − φ(0) = Σ_n c_n·t^n, from the highest power to the first."""
        degree = int(self.degree)
        return [(n, math.comb(degree, n) * float(self.coef0) ** (degree - n)) for n in range(degree, 0, -1)]

    @property
    def coefficients(self) -> list[float]:
        """The c_n alone."""
        return [c for _, c in self.powers]

    def phi(self, t: Tensor) -> Tensor:
        return (t + self.coef0) ** int(self.degree)

    def slope(self, t: Tensor) -> Tensor:
        """φ'(t)."""
        return self.degree * (t + self.coef0) ** (int(self.degree) - 1)


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (RBF(), IMQ(), RationalQuadratic(), Laplace(), Energy(), Polynomial())}
# What a caller may name them.
KERNEL_NAMES: dict[str, Kernel] = {**KERNELS, "gaussian": KERNELS["rbf"]}


def kernel_of(name: str, parameters: Sequence[float]) -> Kernel:
    """The kernel whose `name` and `parameters` these are."""
    # One without parameters is itself, which caches find faster than an equal one.
    return type(KERNELS[name])(*parameters) if parameters else KERNELS[name]
