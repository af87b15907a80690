"""The kernel functions. Each family is one class, which holds the mathematics that every backend shares.

A radial kernel is φ(t) with t = γ·‖x−y‖² and γ = 1/(2h²). The polynomial kernel is φ(t) with t = γ·x·y and γ = 1/(D·h²).
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
    """One family of kernels. The fields of a subclass are its parameters; bandwidths are given separately.

    Attributes:
        name: the value of `kernel=` in the public functions.
        radial: t is a multiple of ‖x−y‖², not of x·y.
        is_exponential: φ(t) = exp(−t), so that φ(2t) = φ(t)² and −φ' = φ.
        takes_distance: φ is a function of the distance √t, in which a small error of a small t becomes a large one.
        unbounded_slope: φ' goes to infinity as t goes to 0.
        homogeneous: φ(c·t) is a multiple of φ(t), so that a bandwidth only multiplies φ by a number.
        positive: φ is positive everywhere, and `log_phi` is its logarithm in closed form.
    """

    name: ClassVar[str]
    radial: ClassVar[bool] = True
    is_exponential: ClassVar[bool] = False
    takes_distance: ClassVar[bool] = False
    unbounded_slope: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False
    positive: ClassVar[bool] = False

    @property
    def value_at_zero(self) -> float:
        """φ(0), which is subtracted from each k where k is close to it."""
        return 1.0

    def phi(self, t: Tensor) -> Tensor:
        """φ(t), elementwise."""
        raise NotImplementedError(f"{self.name} must define phi")

    def log_phi(self, t: Tensor) -> Tensor:
        """log φ(t), elementwise, finite where φ(t) underflows."""
        raise NotImplementedError(f"{self.name} must define log_phi")

    def dphi(self, t: Tensor) -> Tensor:
        """φ'(t), elementwise. Only kernels of x·y need it."""
        raise NotImplementedError(f"{self.name} must define dphi")

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """φ'(t) and φ''(t), elementwise. Only kernel Stein discrepancies need them."""
        raise NotImplementedError(f"{self.name} must define derivatives")

    def gamma(self, bandwidth: Tensor, dim: int) -> Tensor:
        """γ of bandwidths h for rows of `dim` features."""
        return (0.5 if self.radial else 1 / dim) / bandwidth.square()

    def canonical(self) -> tuple[Kernel, float]:
        """An equal kernel that the backends implement, and the factor from h to its bandwidth."""
        return self, 1.0

    @property
    def parameters(self) -> list[float]:
        return [float(getattr(self, field.name)) for field in fields(self)]

    def triton_parameters(self, bandwidth: Tensor, weights: Tensor) -> list[Tensor]:
        """The family's numbers among the arguments of a Triton kernel, from bandwidths and weights (B,), widest first."""
        return []


def _check_parameter(name: str, value: Any, rule: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _root(t: Tensor) -> Tensor:
    """√t, with derivative 0 at 0."""
    zero = t <= 0
    return torch.where(zero, 0, torch.where(zero, 1, t).sqrt())


@dataclass(frozen=True)
class RBF(Kernel):
    """exp(−d²/(2h²)), the Gaussian kernel."""

    name = "rbf"
    is_exponential = True
    positive = True

    def phi(self, t: Tensor) -> Tensor:
        return (-t).exp()

    def log_phi(self, t: Tensor) -> Tensor:
        return -t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -(-t).exp(), (-t).exp()


@dataclass(frozen=True)
class RationalQuadratic(Kernel):
    """(1 + d²/(2αh²))^−α, a mixture of RBF kernels.

    Source: Rasmussen and Williams 2006, "Gaussian processes for machine learning", equation 4.19.
    """

    alpha: float = 1.0
    name = "rational_quadratic"
    positive = True

    def __post_init__(self) -> None:
        # A larger α differs from the RBF kernel by rounding alone.
        _check_parameter("alpha", self.alpha, "greater than 0 and at most 1000", lambda alpha: 0 < alpha <= 1000)

    def phi(self, t: Tensor) -> Tensor:
        return (1 + t / self.alpha) ** -self.alpha

    def log_phi(self, t: Tensor) -> Tensor:
        return -self.alpha * (t / self.alpha).log1p()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        base = 1 + t / self.alpha
        return -(base ** (-self.alpha - 1)), (1 + 1 / self.alpha) * base ** (-self.alpha - 2)

    def triton_parameters(self, bandwidth: Tensor, weights: Tensor) -> list[Tensor]:
        return [torch.full_like(bandwidth[:1], float(self.alpha))]


@dataclass(frozen=True)
class IMQ(Kernel):
    """h²/(h² + d²), the inverse multiquadric of Wasserstein autoencoders, C = h². Source: Tolstikhin et al. 2018, section 4."""

    name = "imq"
    positive = True

    def phi(self, t: Tensor) -> Tensor:
        return 1 / (1 + 2 * t)

    def log_phi(self, t: Tensor) -> Tensor:
        return -(2 * t).log1p()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -2 / (1 + 2 * t) ** 2, 8 / (1 + 2 * t) ** 3

    def canonical(self) -> tuple[Kernel, float]:
        return RationalQuadratic(1.0), 0.5**0.5


@dataclass(frozen=True)
class Laplace(Kernel):
    """exp(−d/h) of the Euclidean distance d. It has no gradient at d = 0; 0 is returned there."""

    name = "laplace"
    takes_distance = True
    unbounded_slope = True
    positive = True

    def phi(self, t: Tensor) -> Tensor:
        return (-_root(2 * t)).exp()

    def log_phi(self, t: Tensor) -> Tensor:
        return -_root(2 * t)


@dataclass(frozen=True)
class Energy(Kernel):
    """−d/h; with h = 1, MMD² is the energy distance. It has no gradient at d = 0; 0 is returned there.

    Source: Sejdinovic et al. 2013, "Equivalence of distance-based and RKHS-based statistics in hypothesis testing".
    """

    name = "energy"
    takes_distance = True
    unbounded_slope = True
    homogeneous = True

    @property
    def value_at_zero(self) -> float:
        return 0.0

    def phi(self, t: Tensor) -> Tensor:
        return -_root(2 * t)


@dataclass(frozen=True)
class Polynomial(Kernel):
    """(x·y/(D·h²) + coef0)^degree, by default the kernel of the kernel inception distance. Source: Bińkowski et al. 2018, section 4.

    It is unbounded: for entries of about 30 its value is about 10⁸, and its gradient exceeds 65,504, the largest number of float16.
    """

    degree: int = 3
    coef0: float = 1.0
    name = "polynomial"
    radial = False

    def __post_init__(self) -> None:
        _check_parameter("degree", self.degree, "a whole number from 1 to 8", lambda degree: degree in range(1, 9))
        _check_parameter("coef0", self.coef0, "at least 0", lambda coef0: coef0 >= 0)

    @property
    def value_at_zero(self) -> float:
        return float(self.coef0) ** int(self.degree)

    @property
    def powers(self) -> list[tuple[int, float]]:
        """The (n, c_n) of φ(t) − φ(0) = Σ_n c_n·t^n, highest power first."""
        degree = int(self.degree)
        return [(n, math.comb(degree, n) * float(self.coef0) ** (degree - n)) for n in range(degree, 0, -1)]

    def phi(self, t: Tensor) -> Tensor:
        return (t + self.coef0) ** int(self.degree)

    def dphi(self, t: Tensor) -> Tensor:
        return self.degree * (t + self.coef0) ** (int(self.degree) - 1)

    def triton_parameters(self, bandwidth: Tensor, weights: Tensor) -> list[Tensor]:
        coefficients = [*self.powers, (0, self.value_at_zero)]
        return [c * (weights * (bandwidth[0] / bandwidth) ** (2 * n)).sum().reshape(1) for n, c in coefficients]


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (RBF(), IMQ(), RationalQuadratic(), Laplace(), Energy(), Polynomial())}
# Every name that the public functions accept.
KERNEL_NAMES: dict[str, Kernel] = {**KERNELS, "gaussian": KERNELS["rbf"]}


def kernel_of(name: str, parameters: Sequence[float]) -> Kernel:
    """The kernel with this name and these parameters."""
    # The default object itself, not an equal one: caches find it faster.
    return type(KERNELS[name])(*parameters) if parameters else KERNELS[name]
