"""Sums of kernels over bandwidths: as tensors, as numbers on the host, and as arguments of a GPU kernel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.radial import Kernel, Sum, Term

# Bandwidths or their weights: numbers, or a float64 vector.
Numbers = Tensor | Sequence[float]

LOG2_E = math.log2(math.e)

# The error allowed in the exponent of a pair. ‖x‖² + ‖y‖² − 2x·y is wrong by about eps·‖x‖². Where that is more, distances are computed
# in another way.
EXPONENT_ERROR = {torch.float32: 6e-5, torch.float64: 1e-11}

# Where the mean exponent γ·d² is below this, k is close to one, and sums of k − 1, computed by expm1, are more accurate than sums of k.
# Above it both are as accurate, and exp2 is four times faster than expm1.
SHIFT_BELOW = 0.2

# k_b is computed as a square of k_{b−1} only where log₂ of the ratio of their γ is an integer to this accuracy.
_POWER_OF_TWO = 1e-12
# Each squaring doubles the relative error, so that a chain ends after seven. Seven also fits the three bits of a Triton kernel's argument.
_MOST_SQUARINGS = 7


def rounding_of_sum(dtype: torch.dtype) -> float:
    """How far from one the sum of normalised weights of this dtype may be."""
    # Half precision: each weight is rounded by half an eps. Otherwise the sum that they were divided by is rounded too.
    return (1 if dtype in (torch.bfloat16, torch.float16) else 16) * torch.finfo(dtype).eps


def stable_mean(z: Tensor) -> Tensor:
    """The mean over the rows of (..., N, D), from their differences to the first row; exact where all rows are equal."""
    # Scaled by a power of two, so that the sum does not overflow.
    scale, first = 0.5 ** z.shape[-2].bit_length(), z[..., 0, :]
    return first + (z * scale).sub_((first * scale)[..., None, :]).sum(-2) / (z.shape[-2] * scale)


def is_nearly_constant(kernel: Kernel, t: Any) -> Any:
    """Whether k is so close to φ(0), for pairs whose mean t this is, that sums are taken of k − φ(0)."""
    steep = kernel.steepness * t
    return ((2 * steep) ** 0.5 if kernel.takes_distance else steep) < SHIFT_BELOW


def rbf_normal_mean_exponent(x: Tensor, bandwidth: Tensor) -> Tensor:
    """log E_y exp(−‖x_i−y‖²/(2h_b²)) for y ~ N(0, I), shape (N, B): −½·(D·log(1 + 1/h²) + ‖x_i‖²/(h² + 1)). Source: Rustamov 2019."""
    h2 = bandwidth.square()
    return -0.5 * (x.shape[-1] * (1 / h2).log1p() + x.square().sum(-1, keepdim=True) / (h2 + 1))


def rbf_normal_self_exponent(dim: int, bandwidth: Tensor) -> Tensor:
    """log E exp(−‖y−y'‖²/(2h_b²)) for y, y' ~ N(0, I) in `dim` dimensions, shape (B,): −½·D·log(1 + 2/h²). Source: Rustamov 2019."""
    return -0.5 * dim * (2 / bandwidth.square()).log1p()


@dataclass(frozen=True)
class KernelSum:
    """Σ_b a_b·k_b with k_b = φ(t_b), as tensors on the device of the data, float64, widest bandwidth first."""

    kernel: Kernel  # φ
    bandwidth: Tensor  # h_b, shape (B,)
    weights: Tensor  # a_b, shape (B,)
    gamma: Tensor  # γ_b, shape (B,); nan where h_b is not positive
    subtract_constant: Tensor  # 1 where sums are of k_b − φ(0), 0 where they are of k_b, shape (..., B); the ones come first
    squarings: tuple[int, ...]  # how many times k_{b−1} is squared to give k_b; 0 where k_b is evaluated on its own

    @staticmethod
    def of(
        kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, dim: int, device: torch.device, mean_squared_distance: Tensor | None
    ) -> KernelSum:
        """For rows of `dim` features. Without their mean squared distance (...) no constant is subtracted."""
        bandwidth, bandwidth_weights = read(bandwidth), read(bandwidth_weights)
        squarings = (0,) * len(bandwidth) if isinstance(bandwidth, Tensor) else _squarings(kernel, bandwidth)
        h, order = as_vector(bandwidth, device).sort(descending=True)
        gamma = torch.where(h > 0, kernel.gamma(h, dim), math.nan)
        subtract_constant = torch.zeros_like(gamma)
        if mean_squared_distance is not None:
            t = gamma * mean_squared_distance[..., None]
            # A polynomial without its constant takes no more work than with it.
            subtract_constant = is_nearly_constant(kernel, t).to(torch.float64) if kernel.radial else torch.ones_like(t)
        return KernelSum(kernel, h, as_vector(bandwidth_weights, device)[order], gamma, subtract_constant, squarings)

    @property
    def ratios(self) -> Tensor:
        """γ_b/γ_0, shape (B,), ascending from 1."""
        return self.gamma / self.gamma[0]

    @property
    def value_constant(self) -> Tensor:
        """Σ_b a_b·φ(0) over the bandwidths whose constant is subtracted: what each pair's sum lacks, shape (...)."""
        return self.kernel.value_at_zero * (self.weights @ self.subtract_constant)

    @property
    def slope_subtracts_constant(self) -> Tensor:
        """1 where −φ'(0) = 1 is subtracted from each pair's −φ'(t_b), shape (..., B): of an RBF kernel −φ' = φ."""
        return self.subtract_constant if self.kernel.is_exponential else torch.zeros_like(self.subtract_constant)


@dataclass(frozen=True)
class KernelNumbers:
    """Σ_b a_b·k_b as a Triton kernel takes it: as numbers among its arguments, or as a tensor where the bandwidths are on the device."""

    kernel: Kernel  # φ; of a sum one term for each kernel and bandwidth, whose weight and scale are in the arguments
    count: int  # of bandwidths, in a sum of each term's
    squarings: tuple[int, ...]  # as in `KernelSum`
    # h_b, a_b, the parameters of the kernel and, against N(0, I), log E k(y, y'), log E k(0, y) and 1/(h_b² + 1) for each bandwidth, widest
    # first; of a sum term by term. Each number is given as three float32 that sum to it, or all of them as a float64 tensor.
    arguments: tuple[float, ...] | Tensor

    @property
    def numbers(self) -> int:
        return self.arguments.numel() if isinstance(self.arguments, Tensor) else len(self.arguments) // 3

    @staticmethod
    def of(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, dim: int, prior: bool, device: torch.device) -> KernelNumbers:
        h, a = read(bandwidth), read(bandwidth_weights)
        expanded, count = _expanded(kernel, len(h))
        if not isinstance(h, Tensor) and not isinstance(a, Tensor):
            squarings, numbers, parts = _kernel_numbers(kernel, h, a, dim, prior)
            return KernelNumbers(expanded, count, squarings, parts or as_vector(numbers, device))
        on_device = _numbers(kernel, as_vector(h, device), as_vector(a, device), dim, prior)
        return KernelNumbers(expanded, count, (0,) * count, on_device)


def _ordered(kernel: Sum) -> list[Term]:
    """The terms, with those that are zero at zero last: others are larger than they, before their constant is subtracted."""
    return sorted(kernel.terms, key=lambda term: term.kernel.homogeneous)


@functools.lru_cache(maxsize=256)
def _expanded(kernel: Kernel, count: int) -> tuple[Kernel, int]:
    """The kernel that Triton compiles, and of how many bandwidths: a sum of one kernel is that kernel."""
    if not isinstance(kernel, Sum):
        return kernel, count
    kernels = [term.kernel for term in _ordered(kernel) for _ in range(count)]
    if len(set(kernels)) == 1:
        return kernels[0], len(kernels)
    return Sum(tuple(Term(1.0, one, 1.0) for one in kernels)), len(kernels)


def read(numbers: Numbers) -> tuple[float, ...] | Tensor:
    """As numbers, unless they are on a device: the host would have to wait for it."""
    if isinstance(numbers, Tensor):
        return tuple(numbers.tolist()) if numbers.device.type == "cpu" else numbers
    return tuple(numbers)


def as_vector(numbers: Numbers, device: torch.device) -> Tensor:
    """As a vector on `device`. On a GPU it is filled: a copy would wait, and cannot be captured in a CUDA graph."""
    if isinstance(numbers, Tensor):
        return numbers.to(device)
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=torch.float64, device=device)
    return filled(numbers, device)


def filled(numbers: Sequence[float], device: torch.device | None) -> Tensor:
    """As a vector on `device`. The numbers are not read, as a compiler may not know them yet."""
    return torch.cat([torch.full((1,), number, dtype=torch.float64, device=device) for number in numbers])


def _numbers(kernel: Kernel, bandwidth: Tensor, bandwidth_weights: Tensor, dim: int, prior: bool) -> Tensor:
    """`KernelNumbers.arguments` as a tensor."""
    h, a = bandwidth, bandwidth_weights
    expanded, _ = _expanded(kernel, len(h))
    if isinstance(kernel, Sum):
        h = torch.cat([scale * h for _, _, scale in _ordered(kernel)])
        a = torch.cat([weight * a for weight, _, _ in _ordered(kernel)])
    if isinstance(expanded, Sum):
        one = h.new_ones(1)
        return torch.cat([h, a, *(number for term in expanded.terms for number in term.kernel.triton_parameters(one, one))])
    h, order = h.sort(descending=True)
    a, h2 = a[order], h.square()
    numbers = [h, a, *expanded.triton_parameters(h, a)]
    if prior:
        numbers += [rbf_normal_self_exponent(dim, h), -0.5 * dim * (1 / h2).log1p(), 1 / (h2 + 1)]
    return torch.cat(numbers)


@functools.lru_cache(maxsize=256)
def _kernel_numbers(
    kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, prior: bool
) -> tuple[tuple[int, ...], list[float], tuple[float, ...]]:
    """The squarings, the numbers, and their float32 parts as arguments; no parts where there are too many or float32 cannot hold them."""
    h, a = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (bandwidth, weights))
    numbers = _numbers(kernel, h, a, dim, prior).tolist()
    fit = len(numbers) <= _MOST_ARGUMENTS and all(number == 0 or 1e-30 <= abs(number) <= 1e38 for number in numbers)
    expanded, count = _expanded(kernel, len(bandwidth))
    squarings = (0,) * count if isinstance(expanded, Sum) else _squarings(expanded, numbers[:count])
    return squarings, numbers, tuple(part for number in numbers for part in float32_parts(number)) if fit else ()


# The most numbers that a Triton kernel takes as arguments.
_MOST_ARGUMENTS = 64


def float32_parts(number: float) -> tuple[float, float, float]:
    """Three float32 that sum to a float64."""
    high = float(np.float32(number))
    middle = float(np.float32(number - high))
    return high, middle, float(np.float32(number - high - middle))


def _squarings(kernel: Kernel, bandwidth: Sequence[float]) -> tuple[int, ...]:
    if not kernel.is_exponential:
        return (0,) * len(bandwidth)
    powers, chain = [0], 0
    for wide, narrow in itertools.pairwise(sorted(bandwidth, reverse=True)):
        power = 2 * math.log2(wide / narrow) if narrow > 0 else math.nan
        near = round(power) if math.isfinite(power) else 0
        chain = chain + near if near >= 1 and abs(power - near) < _POWER_OF_TWO and chain + near <= _MOST_SQUARINGS else 0
        powers.append(near if chain else 0)
    return tuple(powers)


@dataclass(frozen=True)
class HostKernelSum:
    """`KernelSum` of one problem as Python numbers. The attributes are those of `KernelSum`, with `gamma` that of the widest bandwidth."""

    kernel: Kernel
    gamma: float
    ratios: tuple[float, ...]
    weights: tuple[float, ...]
    squarings: tuple[int, ...]
    subtract_constant: tuple[int, ...]
    slope_constant: float  # Σ a_b·γ_b/γ_0 over the bandwidths of which −φ'(0) is subtracted from the slope

    @staticmethod
    def of(kernel: KernelSum) -> HostKernelSum:
        gammas, weights, subtracted = kernel.gamma.tolist(), kernel.weights.tolist(), kernel.subtract_constant.flatten().tolist()
        ratios = [gamma / gammas[0] for gamma in gammas]
        slope_subtracted = kernel.slope_subtracts_constant.flatten().tolist()
        return HostKernelSum(
            kernel=kernel.kernel,
            gamma=gammas[0],
            ratios=tuple(ratios),
            weights=tuple(weights),
            squarings=kernel.squarings,
            subtract_constant=tuple(map(int, subtracted)),
            slope_constant=math.fsum(a * r * s for a, r, s in zip(weights, ratios, slope_subtracted, strict=True)),
        )
