"""Sums of kernels over bandwidths: as tensors, as numbers on the host, and as arguments of a GPU kernel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvae.radial import RBF, Kernel, Polynomial, RationalQuadratic

# Bandwidths, or their weights: numbers, or a vector of float64.
Numbers = Tensor | Sequence[float]

LOG2_E = math.log2(math.e)

# Error allowed in the exponent of a pair. ‖x‖² + ‖y‖² − 2x·y is off by about eps·‖x‖²: where that is more, a sweep computes distances
# in another way.
EXPONENT_ERROR = {torch.float32: 6e-5, torch.float64: 1e-11}

# A bandwidth whose mean exponent γ·d² is under this has k near one: sums of k − 1, by expm1, are then more exact than sums of k. Above it
# they are as good, and exp2 is four times faster than expm1.
SHIFT_BELOW = 0.2

# k_b is a square of k_{b−1} only where the ratio of their γ is two to rounding.
_POWER_OF_TWO = 1e-12
# Each squaring doubles the relative error: a chain of them starts anew after seven, which also fit the three bits of a kernel's argument.
_MOST_SQUARINGS = 7


def rounding_of_sum(dtype: torch.dtype) -> float:
    """By how much weights of this dtype that sum to one may miss it."""
    # Of few digits each weight is rounded to half an eps; of many, the sums that they were divided by have roundings too.
    return (1 if dtype in (torch.bfloat16, torch.float16) else 16) * torch.finfo(dtype).eps


def stable_mean(z: Tensor) -> Tensor:
    """The mean over the rows of (…, N, D), from their differences to the first: that of equal rows is exact."""
    # Times a power of two, as the sum of numbers near the largest of their dtype is none.
    scale, first = 0.5 ** z.shape[-2].bit_length(), z[..., 0, :]
    return first + (z * scale).sub_((first * scale)[..., None, :]).sum(-2) / (z.shape[-2] * scale)


def rbf_normal_mean_exponent(x: Tensor, bandwidth: Tensor) -> Tensor:
    """log E_y exp(−‖x_i−y‖²/(2h_b²)) for y ~ N(0, I), shape (N, B): −½·(D·log(1 + 1/h²) + ‖x_i‖²/(h² + 1)). Source: Rustamov 2019."""
    h2 = bandwidth.square()
    return -0.5 * (x.shape[-1] * (1 / h2).log1p() + x.square().sum(-1, keepdim=True) / (h2 + 1))


def rbf_normal_self_exponent(dim: int, bandwidth: Tensor) -> Tensor:
    """log E exp(−‖y−y'‖²/(2h_b²)) for y, y' ~ N(0, I) in `dim` dimensions, shape (B,): −½·D·log(1 + 2/h²). Source: Rustamov 2019."""
    return -0.5 * dim * (2 / bandwidth.square()).log1p()


@dataclass(frozen=True)
class KernelSum:
    """Σ_b a_b·k_b with k_b = φ(t_b), as tensors on the device of the data, float64, widest bandwidth first.

    Attributes:
        kernel: φ.
        bandwidth: h_b, shape (B,).
        weights: a_b, shape (B,).
        gamma: γ_b, shape (B,); nan where h_b is not positive.
        shifts: 1 where sums of k_b − φ(0) are taken in place of sums of k_b, else 0, shape (..., B). The ones come first.
        squarings: for each bandwidth how many squarings lead from k_{b−1} to k_b; 0 where it is evaluated on its own.
    """

    kernel: Kernel
    bandwidth: Tensor
    weights: Tensor
    gamma: Tensor
    shifts: Tensor
    squarings: tuple[int, ...]

    @staticmethod
    def of(
        kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, dim: int, device: torch.device, mean_squared_distance: Tensor | None
    ) -> KernelSum:
        """For rows of `dim` features; without their mean squared distance (...) nothing is shifted."""
        bandwidth, bandwidth_weights = read(bandwidth), read(bandwidth_weights)
        squarings = (0,) * len(bandwidth)
        if isinstance(kernel, RBF) and not isinstance(bandwidth, Tensor):
            squarings = _squarings(sorted(bandwidth, reverse=True))
        h, order = as_vector(bandwidth, device).sort(descending=True)
        gamma = torch.where(h > 0, kernel.gamma(h, dim), math.nan)
        shifts = torch.zeros_like(gamma)
        if mean_squared_distance is not None and kernel.radial:
            t = gamma * mean_squared_distance[..., None]
            shifts = (((2 * t).sqrt() if kernel.takes_distance else t) < SHIFT_BELOW).to(torch.float64)
        elif mean_squared_distance is not None:
            # A polynomial without its constant takes no more work than with it.
            shifts = torch.ones_like(gamma * mean_squared_distance[..., None])
        return KernelSum(kernel, h, as_vector(bandwidth_weights, device)[order], gamma, shifts, squarings)

    @property
    def ratios(self) -> Tensor:
        """γ_b/γ_0, shape (B,), ascending from 1."""
        return self.gamma / self.gamma[0]

    @property
    def slope_shifts(self) -> Tensor:
        """1 where a sweep leaves 1 out of each pair's −φ'(t_b), which is the k_b of an RBF kernel, shape (..., B)."""
        return self.shifts if isinstance(self.kernel, RBF) else torch.zeros_like(self.shifts)


@dataclass(frozen=True)
class KernelNumbers:
    """Σ_b a_b·k_b as a GPU kernel takes it: as numbers among its arguments, or as a tensor where the bandwidths are on the device.

    Attributes:
        kernel: φ.
        count: bandwidths.
        squarings: as of `KernelSum`.
        arguments: h_b, a_b, parameters of the kernel, and against N(0, I) log E k(y, y'), log E k(0, y) and 1/(h_b² + 1) of each bandwidth,
            widest first: each number as three of float32 that sum to it, or a float64 tensor.
    """

    kernel: Kernel
    count: int
    squarings: tuple[int, ...]
    arguments: tuple[float, ...] | Tensor

    @property
    def numbers(self) -> int:
        return self.arguments.numel() if isinstance(self.arguments, Tensor) else len(self.arguments) // 3

    @staticmethod
    def of(kernel: Kernel, bandwidth: Numbers, bandwidth_weights: Numbers, dim: int, prior: bool, device: torch.device) -> KernelNumbers:
        h, a = read(bandwidth), read(bandwidth_weights)
        if not isinstance(h, Tensor) and not isinstance(a, Tensor):
            squarings, numbers, parts = _kernel_numbers(kernel, h, a, dim, prior)
            return KernelNumbers(kernel, len(h), squarings, parts or as_vector(numbers, device))
        on_device = _numbers(kernel, as_vector(h, device), as_vector(a, device), dim, prior)
        return KernelNumbers(kernel, len(h), (0,) * len(h), on_device)


def read(numbers: Numbers) -> tuple[float, ...] | Tensor:
    """As numbers, unless they are on a device that the host would have to wait for."""
    if isinstance(numbers, Tensor):
        return tuple(numbers.tolist()) if numbers.device.type == "cpu" else numbers
    return tuple(numbers)


def as_vector(numbers: Numbers, device: torch.device) -> Tensor:
    """As a vector on `device`, on a GPU by fills: a copy would wait, and can't be captured in a CUDA graph."""
    if isinstance(numbers, Tensor):
        return numbers.to(device)
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=torch.float64, device=device)
    return filled(numbers, device)


def filled(numbers: Sequence[float], device: torch.device | None) -> Tensor:
    """As a vector on `device`, of numbers that are not looked at: a compiler may not know them yet."""
    return torch.cat([torch.full((1,), number, dtype=torch.float64, device=device) for number in numbers])


def _numbers(kernel: Kernel, bandwidth: Tensor, bandwidth_weights: Tensor, dim: int, prior: bool) -> Tensor:
    """`KernelNumbers.arguments` as a tensor."""
    h, order = bandwidth.sort(descending=True)
    a, h2 = bandwidth_weights[order], h.square()
    numbers = [h, a]
    if isinstance(kernel, RationalQuadratic):
        numbers.append(torch.full_like(h[:1], float(kernel.alpha)))
    if isinstance(kernel, Polynomial):
        numbers += [c * (a * (h[0] / h) ** (2 * n)).sum().reshape(1) for n, c in [*kernel.powers, (0, kernel.value_at_zero)]]
    if prior:
        numbers += [rbf_normal_self_exponent(dim, h), -0.5 * dim * (1 / h2).log1p(), 1 / (h2 + 1)]
    return torch.cat(numbers)


@functools.lru_cache(maxsize=256)
def _kernel_numbers(
    kernel: Kernel, bandwidth: tuple[float, ...], weights: tuple[float, ...], dim: int, prior: bool
) -> tuple[tuple[int, ...], list[float], tuple[float, ...]]:
    """Squarings, numbers, and their parts as arguments of a GPU kernel: none where they are too many or no float32."""
    h, a = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (bandwidth, weights))
    numbers = _numbers(kernel, h, a, dim, prior).tolist()
    squarings = _squarings(sorted(bandwidth, reverse=True)) if isinstance(kernel, RBF) else (0,) * len(bandwidth)
    fit = len(numbers) <= _MOST_ARGUMENTS and all(number == 0 or 1e-30 <= abs(number) <= 1e38 for number in numbers)
    return squarings, numbers, tuple(part for number in numbers for part in float32_parts(number)) if fit else ()


# Numbers that a kernel takes as arguments.
_MOST_ARGUMENTS = 64


def float32_parts(number: float) -> tuple[float, float, float]:
    """Three float32 that sum to a float64."""
    high = float(np.float32(number))
    middle = float(np.float32(number - high))
    return high, middle, float(np.float32(number - high - middle))


def _squarings(bandwidths: list[float]) -> tuple[int, ...]:
    powers, chain = [0], 0
    for wide, narrow in itertools.pairwise(bandwidths):
        power = 2 * math.log2(wide / narrow) if narrow > 0 else math.nan
        near = round(power) if math.isfinite(power) else 0
        chain = chain + near if near >= 1 and abs(power - near) < _POWER_OF_TWO and chain + near <= _MOST_SQUARINGS else 0
        powers.append(near if chain else 0)
    return tuple(powers)


@dataclass(frozen=True)
class HostKernelSum:
    """`KernelSum` of one problem as numbers, for a sweep that the host steers; the attributes are those of `KernelSum`, `gamma` that of
    the widest."""

    kernel: Kernel
    gamma: float
    ratios: tuple[float, ...]
    weights: tuple[float, ...]
    squarings: tuple[int, ...]
    shifts: tuple[int, ...]
    slope_shift: float  # Σ a_b·γ_b/γ_0 over the bandwidths whose slope is shifted

    @staticmethod
    def of(kernel: KernelSum) -> HostKernelSum:
        gammas, weights, shifts = kernel.gamma.tolist(), kernel.weights.tolist(), kernel.shifts.flatten().tolist()
        ratios = [gamma / gammas[0] for gamma in gammas]
        return HostKernelSum(
            kernel=kernel.kernel,
            gamma=gammas[0],
            ratios=tuple(ratios),
            weights=tuple(weights),
            squarings=kernel.squarings,
            shifts=tuple(map(int, shifts)),
            slope_shift=math.fsum(a * r * s for a, r, s in zip(weights, ratios, kernel.slope_shifts.flatten().tolist(), strict=True)),
        )
