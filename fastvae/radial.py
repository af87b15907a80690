"""The kernel functions. Each family is one class, which holds the mathematics that every backend shares.

A radial kernel is φ(t) with t = γ·‖x−y‖² and γ = 1/(2h²). The polynomial kernel is φ(t) with t = γ·x·y and γ = 1/(D·h²).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """One family of kernels. The fields of a subclass are its parameters; bandwidths are given separately.

    Attributes:
        name: the value of `kernel=` in the public functions.
        radial: t is a multiple of ‖x−y‖², not of x·y.
        is_exponential: φ(t) = exp(−t), so that φ(2t) = φ(t)² and −φ' = φ.
        takes_distance: φ is a function of the distance √t with a slope at 0: φ' goes to infinity as t goes to 0, and a small error of a
            small t becomes a large one.
        homogeneous: φ(c·t) is a multiple of φ(t), so that a bandwidth only multiplies φ by a number.
        positive: φ is positive everywhere, and `log_phi` is its logarithm in closed form.
    """

    name: ClassVar[str]
    radial: ClassVar[bool] = True
    is_exponential: ClassVar[bool] = False
    takes_distance: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False
    positive: ClassVar[bool] = False

    @property
    def value_at_zero(self) -> float:
        """φ(0), which is subtracted from each k where k is close to it."""
        return 1.0

    @property
    def slope_takes_distance(self) -> bool:
        """Whether φ' is a function of the distance with a slope at 0, or infinite there."""
        return self.takes_distance

    @property
    def steepness(self) -> float:
        """The largest −φ'(t) of a bounded slope: by what factor an error of t becomes one of k."""
        return 1.0

    def phi(self, t: Tensor) -> Tensor:
        """φ(t), elementwise."""
        raise NotImplementedError(f"{self.name} must define phi")

    def log_phi(self, t: Tensor) -> Tensor:
        """log φ(t), elementwise, finite where φ(t) underflows."""
        raise NotImplementedError(f"{self.name} must define log_phi")

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """φ'(t) and φ''(t), elementwise; 0 at t = 0 where they are infinite."""
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

    def __add__(self, other: Any) -> Sum:
        return Sum(terms_of(self) + terms_of(other)) if isinstance(other, Kernel) else NotImplemented

    def __radd__(self, other: Any) -> Kernel:
        # sum([RBF(), Laplace()]) begins with 0.
        return self if type(other) is int and other == 0 else NotImplemented

    def __mul__(self, weight: Any) -> Sum:
        _check_parameter("the weight of a kernel", weight, "a finite number")
        terms = tuple(term._replace(weight=weight * term.weight) for term in terms_of(self))
        for term in terms:
            _check_parameter("the product of the weights of a kernel", term.weight, "a finite number")
        return Sum(terms)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> Sum:
        return self * (1 / number) if isinstance(number, numbers.Real) and number else NotImplemented

    def __neg__(self) -> Sum:
        return self * -1.0

    def __sub__(self, other: Any) -> Sum:
        return self + -other if isinstance(other, Kernel) else NotImplemented

    def scaled(self, factor: float) -> Sum:
        """This kernel with bandwidth `factor`·h: RBF() + Laplace().scaled(2) is exp(−d²/(2h²)) + exp(−d/(2h))."""
        _check_parameter("factor", factor, "between 1e-6 and 1e6", lambda factor: 1e-6 <= factor <= 1e6)
        terms = tuple(term._replace(scale=factor * term.scale) for term in terms_of(self))
        for term in terms:
            _check_parameter("the product of factors", term.scale, "between 1e-6 and 1e6", lambda factor: 1e-6 <= factor <= 1e6)
        return Sum(terms)

    def triton_parameters(self, bandwidth: Tensor, weights: Tensor) -> list[Tensor]:
        """The family's numbers among the arguments of a Triton kernel, from bandwidths and weights (B,), widest first."""
        return []


class Term(NamedTuple):
    """A kernel in a sum: weight·k with bandwidth scale·h."""

    weight: float
    kernel: Kernel
    scale: float


def terms_of(kernel: Kernel) -> tuple[Term, ...]:
    """The kernels that this one is a sum of."""
    return kernel.terms if isinstance(kernel, Sum) else (Term(1.0, kernel, 1.0),)


def _check_parameter(name: str, value: Any, rule: str, holds: Any = lambda value: True) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(float(value)) < math.inf or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _root(t: Tensor) -> Tensor:
    """√t, with derivative 0 at 0."""
    zero = t <= 0
    return torch.where(zero, 0, torch.where(zero, 1, t).sqrt())


def _inverse_root(t: Tensor) -> Tensor:
    """1/√t, and 0 at 0."""
    zero = t <= 0
    return torch.where(zero, 0, torch.where(zero, 1, t).rsqrt())


# The c_n of 1 − φ = u²·Σ_n c_n·(−u)^n with u = √(2ν)·d/h, to rounding for small u, where the formulas of φ and φ' lose digits.
MATERN_32 = tuple(1 / (math.factorial(n) * (n + 2)) for n in range(9))
MATERN_52 = tuple((1 - n) / (3 * math.factorial(n) * (n + 2)) for n in range(9))
_NEAR_ZERO = 0.1


def _log_near_zero(u: Tensor, u_squared: Tensor, coefficients: tuple[float, ...], log: Tensor) -> Tensor:
    """`log`, or for small u the logarithm of 1 less the series, whose derivative to u² is right down to u = 0."""
    near = u < _NEAR_ZERO
    u, u_squared = torch.where(near, u, 0), torch.where(near, u_squared, 0)
    return torch.where(near, (-u_squared * _series(u, coefficients)).log1p(), log)


def _series(u: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Σ_n c_n·(−u)^n"""
    total = torch.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = coefficient - u * total
    return total


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
        power = (-t).exp()
        return -power, power


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
    positive = True

    def phi(self, t: Tensor) -> Tensor:
        return (-_root(2 * t)).exp()

    def log_phi(self, t: Tensor) -> Tensor:
        return -_root(2 * t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse_root(2 * t)
        slope = self.phi(t) * inverse
        return -slope, slope * (inverse + inverse.square())


@dataclass(frozen=True)
class Matern32(Kernel):
    """(1 + √3·d/h)·exp(−√3·d/h), between Laplace and RBF: once differentiable.

    Source: Rasmussen and Williams 2006, "Gaussian processes for machine learning", equation 4.17.
    """

    name = "matern32"
    positive = True

    @property
    def slope_takes_distance(self) -> bool:
        return True

    @property
    def steepness(self) -> float:
        return 3.0

    def phi(self, t: Tensor) -> Tensor:
        u = _root(6 * t)
        return torch.where(u < _NEAR_ZERO, 1 - 6 * t * _series(u, MATERN_32), (1 + u) * (-u).exp())

    def log_phi(self, t: Tensor) -> Tensor:
        u = _root(6 * t)
        return _log_near_zero(u, 6 * t, MATERN_32, u.log1p() - u)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        power = (-_root(6 * t)).exp()
        return -3 * power, 9 * power * _inverse_root(6 * t)


@dataclass(frozen=True)
class Matern52(Kernel):
    """(1 + √5·d/h + 5d²/(3h²))·exp(−√5·d/h), twice differentiable.

    Source: Rasmussen and Williams 2006, "Gaussian processes for machine learning", equation 4.17.
    """

    name = "matern52"
    positive = True

    @property
    def steepness(self) -> float:
        return 5 / 3

    def phi(self, t: Tensor) -> Tensor:
        u = _root(10 * t)
        return torch.where(u < _NEAR_ZERO, 1 - 10 * t * _series(u, MATERN_52), (1 + u + u * u / 3) * (-u).exp())

    def log_phi(self, t: Tensor) -> Tensor:
        u = _root(10 * t)
        return _log_near_zero(u, 10 * t, MATERN_52, (u + u * u / 3).log1p() - u)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = _root(10 * t)
        power = (-u).exp()
        return -5 / 3 * (1 + u) * power, 25 / 3 * power


@dataclass(frozen=True)
class Energy(Kernel):
    """−d/h; with h = 1, MMD² is the energy distance. It has no gradient at d = 0; 0 is returned there.

    Source: Sejdinovic et al. 2013, "Equivalence of distance-based and RKHS-based statistics in hypothesis testing".
    """

    name = "energy"
    takes_distance = True
    homogeneous = True

    @property
    def value_at_zero(self) -> float:
        return 0.0

    def phi(self, t: Tensor) -> Tensor:
        return -_root(2 * t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return Riesz(1.0).derivatives(t)

    def canonical(self) -> tuple[Kernel, float]:
        return Riesz(1.0), 1.0


@dataclass(frozen=True)
class Riesz(Kernel):
    """−(d/h)^r with 0 < r < 2; r = 1 is `Energy`. Up to r = 1 it has no gradient at d = 0; 0 is returned there.

    Source: Sejdinovic et al. 2013, as above; Hertrich et al. 2024, "Generative sliced MMD flows with Riesz kernels".
    """

    r: float = 1.5
    name = "riesz"
    takes_distance = True
    homogeneous = True

    def __post_init__(self) -> None:
        _check_parameter("r", self.r, "greater than 0 and less than 2", lambda r: 0 < r < 2)

    @property
    def value_at_zero(self) -> float:
        return 0.0

    def phi(self, t: Tensor) -> Tensor:
        zero = t <= 0
        return torch.where(zero, 0, -(torch.where(zero, 1, 2 * t) ** (0.5 * self.r)))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse_root(2 * t)
        # 0 at 0, where the power is infinite.
        slope = self.r * inverse ** (2 - self.r)
        return -slope, (2 - self.r) * slope * inverse.square()

    def triton_parameters(self, bandwidth: Tensor, weights: Tensor) -> list[Tensor]:
        return [] if self.r == 1 else [torch.full_like(bandwidth[:1], float(self.r))]


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

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        degree, base = int(self.degree), t + self.coef0
        return degree * base ** (degree - 1), degree * (degree - 1) * base ** max(degree - 2, 0)

    def triton_parameters(self, bandwidth: Tensor, weights: Tensor) -> list[Tensor]:
        coefficients = [*self.powers, (0, self.value_at_zero)]
        return [c * (weights * (bandwidth[0] / bandwidth) ** (2 * n)).sum().reshape(1) for n, c in coefficients]


@dataclass(frozen=True)
class Linear(Kernel):
    """x·y/h², whose MMD² is the squared distance of the means over h². It is evaluated in closed form, without a sweep over pairs."""

    name = "linear"
    radial = False

    @property
    def value_at_zero(self) -> float:
        return 0.0

    def phi(self, t: Tensor) -> Tensor:
        return t

    def gamma(self, bandwidth: Tensor, dim: int) -> Tensor:
        return 1 / bandwidth.square()


@dataclass(frozen=True)
class Sum(Kernel):
    """Σ_f weight_f·k_f of bandwidth scale_f·h, made by `RBF() + 0.5 * Laplace().scaled(2)`.

    Its radial kernels take one sweep together, a polynomial its own, the linear kernel none.
    """

    terms: tuple[Term, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return "sum:" + "+".join(term.kernel.name for term in self.terms)

    @property
    def parameters(self) -> list[float]:
        return [float(number) for weight, kernel, scale in self.terms for number in (weight, scale, *kernel.parameters)]

    @staticmethod
    def of_parameters(name: str, parameters: Sequence[float]) -> Sum:
        """The sum with this `name` and these `parameters`."""
        terms, numbers = [], iter(parameters)
        for part in name.removeprefix("sum:").split("+"):
            weight, scale = next(numbers), next(numbers)
            terms.append(Term(weight, kernel_of(part, [next(numbers) for _ in fields(KERNELS[part])]), scale))
        return Sum(tuple(terms))

    @property
    def radial(self) -> bool:  # type: ignore[override]
        return all(term.kernel.radial for term in self.terms)

    @property
    def takes_distance(self) -> bool:  # type: ignore[override]
        return any(term.kernel.takes_distance for term in self.terms)

    @property
    def slope_takes_distance(self) -> bool:
        return any(term.kernel.slope_takes_distance for term in self.terms)

    @property
    def value_at_zero(self) -> float:
        return math.fsum(term.weight * term.kernel.value_at_zero for term in self.terms)

    @property
    def steepness(self) -> float:
        return max(term.kernel.steepness / term.scale**2 for term in self.terms)

    def phi(self, t: Tensor) -> Tensor:
        return torch.stack([weight * kernel.phi(t / scale**2) for weight, kernel, scale in self.terms]).sum(0)

    def canonical(self) -> tuple[Kernel, float]:
        terms = []
        for weight, kernel, scale in self.terms:
            kernel, factor = kernel.canonical()
            terms.append(Term(weight, kernel, factor * scale))
        return Sum(tuple(terms)), 1.0


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (RBF(), IMQ(), RationalQuadratic(), Laplace(), Matern32(), Matern52(), Energy(), Riesz(), Polynomial())
}
# Every name that the public functions accept.
KERNEL_NAMES: dict[str, Kernel] = {**KERNELS, "gaussian": KERNELS["rbf"]}


def separate_terms(kernel: Kernel, bandwidth_grad: bool = False) -> list[Term]:
    """The terms that take a sweep each: all radial ones together, unless `bandwidth_grad`. None if one sweep takes the kernel."""
    if not isinstance(kernel, (Sum, Linear)) or (kernel.radial and not bandwidth_grad):
        return []
    terms = terms_of(kernel)
    together = () if bandwidth_grad else tuple(term for term in terms if term.kernel.radial)
    return [*([Term(1.0, Sum(together), 1.0)] if together else []), *(term for term in terms if term not in together)]


def kernel_of(name: str, parameters: Sequence[float]) -> Kernel:
    """The kernel with this name and these parameters."""
    if name.startswith("sum:"):
        return Sum.of_parameters(name, parameters)
    # The default object itself, not an equal one: caches find it faster.
    return type(KERNELS[name])(*parameters) if parameters else KERNELS[name]
