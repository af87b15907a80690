"""Radial kernels k(x, y) = φ(‖x−y‖²), how a sweep evaluates them, and what is known of them in closed form."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

KERNELS = ("rbf",)
LOG2_E = math.log2(math.e)

# Error allowed in the exponent of a pair. ‖x‖² + ‖y‖² − 2x·y is off by about eps·‖x‖²: where that is more, a sweep computes distances
# in another way.
EXPONENT_ERROR = {torch.float32: 6e-5, torch.float64: 1e-11}

# A bandwidth whose mean exponent γ·d² is under this has k near one: sums of k − 1, by expm1, are then more exact than sums of k. Above it
# they are as good, and exp2 is four times faster than expm1.
_SHIFT_BELOW = 0.2

# k_b is a square of k_{b−1} only where the ratio of their γ is two to rounding.
_POWER_OF_TWO = 1e-12
# Each squaring doubles the relative error: a chain of them starts anew after seven, which also fit the three bits of a kernel's argument.
_MOST_SQUARINGS = 7


def rbf(squared_distance: Tensor, bandwidth: Tensor, bandwidth_weights: Tensor) -> Tensor:
    """φ(d²) = Σ_b a_b·exp(−d²/(2h_b²)).

    Args:
        squared_distance: d², any shape.
        bandwidth: h_b, shape (B,), a length in the units of the data.
        bandwidth_weights: a_b, shape (B,).
    """
    exponent = squared_distance.unsqueeze(-1) / (-2 * bandwidth.square())
    return (bandwidth_weights * exponent.exp()).sum(-1)


def rbf_normal_mean_exponent(x: Tensor, bandwidth: Tensor) -> Tensor:
    """log E_y exp(−‖x_i−y‖²/(2h_b²)) for y ~ N(0, I), shape (N, B): −½·(D·log(1 + 1/h²) + ‖x_i‖²/(h² + 1)). Source: Rustamov 2019."""
    h2 = bandwidth.square()
    return -0.5 * (x.shape[-1] * (1 / h2).log1p() + x.square().sum(-1, keepdim=True) / (h2 + 1))


def rbf_normal_self_exponent(dim: int, bandwidth: Tensor) -> Tensor:
    """log E exp(−‖y−y'‖²/(2h_b²)) for y, y' ~ N(0, I) in `dim` dimensions, shape (B,): −½·D·log(1 + 2/h²). Source: Rustamov 2019."""
    return -0.5 * dim * (2 / bandwidth.square()).log1p()


@dataclass(frozen=True)
class Radial:
    """A sum of RBF kernels as tensors on the device of the data, float64, widest bandwidth first.

    Attributes:
        bandwidth: h_b, shape (B,).
        weights: a_b, shape (B,).
        gamma: 1/(2h_b²), shape (B,); nan where h_b is not positive.
        shifts: 1 where sums of k_b − 1 are taken in place of sums of k_b, else 0, shape (B,). The ones come first.
        squarings: how many squarings lead from k_{b−1} to k_b; 0 where an exponential of its own is taken.
    """

    bandwidth: Tensor
    weights: Tensor
    gamma: Tensor
    shifts: Tensor
    squarings: tuple[int, ...]

    @staticmethod
    def of(bandwidth: Tensor, bandwidth_weights: Tensor, mean_squared_distance: Tensor) -> Radial:
        device = mean_squared_distance.device
        squarings = (0,) * bandwidth.numel()
        if bandwidth.device.type == "cpu":
            squarings = _squarings(sorted(bandwidth.tolist(), reverse=True))
            bandwidth = _constant(tuple(bandwidth.tolist()), device)
        if bandwidth_weights.device.type == "cpu":
            bandwidth_weights = _constant(tuple(bandwidth_weights.tolist()), device)
        h, order = bandwidth.sort(descending=True)
        gamma = torch.where(h > 0, 0.5 / h.square(), math.nan)
        shifts = (gamma * mean_squared_distance < _SHIFT_BELOW).to(torch.float64)
        return Radial(h, bandwidth_weights[order], gamma, shifts, squarings)


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A copy to a GPU waits for it, and can't be captured in a CUDA graph: each set of numbers is copied once."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def _squarings(bandwidths: list[float]) -> tuple[int, ...]:
    powers, chain = [0], 0
    for wide, narrow in itertools.pairwise(bandwidths):
        power = 2 * math.log2(wide / narrow) if narrow > 0 else math.nan
        near = round(power) if math.isfinite(power) else 0
        chain = chain + near if near >= 1 and abs(power - near) < _POWER_OF_TWO and chain + near <= _MOST_SQUARINGS else 0
        powers.append(near if chain else 0)
    return tuple(powers)


@dataclass(frozen=True)
class RBFLadder:
    """`Radial` as numbers, for a sweep that the host steers.

    Attributes:
        gamma: γ_0 = 1/(2h_0²) of the widest bandwidth.
        ratios: γ_b/γ_0, ascending from 1.
        weights: a_b.
        squarings, shifts: as in `Radial`.
    """

    gamma: float
    ratios: tuple[float, ...]
    weights: tuple[float, ...]
    squarings: tuple[int, ...]
    shifts: tuple[int, ...]

    @staticmethod
    def of(kernel: Radial) -> RBFLadder:
        gammas = kernel.gamma.tolist()
        return RBFLadder(
            gamma=gammas[0],
            ratios=tuple(gamma / gammas[0] for gamma in gammas),
            weights=tuple(kernel.weights.tolist()),
            squarings=kernel.squarings,
            shifts=tuple(map(int, kernel.shifts.tolist())),
        )

    @property
    def shifted_slope(self) -> float:
        """Σ a_b·γ_b/γ_0 over the shifted bandwidths: what the gradient sums lack of a pair."""
        return math.fsum(a * r * s for a, r, s in zip(self.weights, self.ratios, self.shifts, strict=True))


@dataclass(frozen=True)
class PairSums:
    """What a sweep over all pairs of rows returns, in the terms of formula (1) of `fastvae.reference.mmd`; k stands for k − shift.

    Attributes:
        within_x: Σ_{i≠j} p_i p_j k(x_i, x_j), a float64 scalar.
        within_y: Σ_{i≠j} q_i q_j k(y_i, y_j), zero without a y.
        across: Σ_ij p_i q_j k(x_i, y_j), zero without a y.
        x_pull: (N, D), Σ_j w_j·W_ij·(x_i − z_j) over the rows z of x and y, with W = Σ_b a_b·(γ_b/γ_0)·k_b, w = x_scale·p on x and −q on y.
        y_pull: (M, D), likewise with w = −p on x and y_scale·q on y.
    """

    within_x: Tensor
    within_y: Tensor
    across: Tensor
    x_pull: Tensor | None
    y_pull: Tensor | None
