"""The closed forms in MMD²: pairs of a row with itself and expectations over N(0, I), with their gradients.

The constants that `fastvae.kernel_sums.KernelSum` subtracts cancel between the sums of MMD², as the weights of each sample sum to one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.kernel_sums import KernelSum, Numbers, as_vector, rbf_normal_mean_exponent, rbf_normal_self_exponent
from fastvae.radial import Kernel


class Sample(NamedTuple):
    """One sample in the accumulation dtype, or some rows of one, and its role in MMD². All but `share` may have a batch dimension."""

    z: Tensor  # (N, D)
    weights: Tensor | None  # (N,); None for equal ones
    whole: Tensor  # the sample that z are rows of
    whole_weights: Tensor | None
    others: list[tuple[Tensor, Tensor | None, float]]  # its rows before and after z, their weights and, if these are equal, their share
    share: float  # of z in the whole if weights are equal, otherwise 1
    row_weights: float | Tensor  # p_i, (N, 1), or one number for all rows
    sum_of_squares: float | Tensor  # Σ p_i² over z, (1,)
    scale: float | Tensor  # 1/(1 − Σ p_i²) over the whole, as in formula (2) of `fastvae.reference.mmd`, or 1
    gradient: bool  # whether the gradient to z is wanted

    @staticmethod
    def of(
        z: Tensor, weights: Tensor | None, whole: Tensor | None, whole_weights: Tensor | None, start: int, unbiased: bool, gradient: bool
    ) -> Sample:
        """z begins at row `start` of the whole, if that is given. The weights of the whole sum to one; z has those of its rows."""
        others: list[tuple[Tensor, Tensor | None, float]] = []
        if whole is None:
            whole, whole_weights = z, weights
        else:
            for rows in (slice(0, start), slice(start + z.shape[-2], whole.shape[-2])):
                if rows.start < rows.stop and whole_weights is None:
                    others.append((whole[..., rows, :], None, (rows.stop - rows.start) / whole.shape[-2]))
                elif rows.start < rows.stop and whole_weights is not None:
                    others.append((whole[..., rows, :], whole_weights[..., rows], 1.0))
        if weights is None or whole_weights is None:
            n, total = z.shape[-2], whole.shape[-2]
            scale = 1 / (1 - 1 / total) if unbiased else 1.0
            return Sample(z, None, whole, None, others, n / total, 1 / total, n / total**2, scale, gradient)
        squares = weights.double().square().sum(-1, keepdim=True)
        scales = 1 / (1 - whole_weights.double().square().sum(-1)) if unbiased else 1.0
        return Sample(z, weights, whole, whole_weights, others, 1.0, weights[..., None], squares, scales, gradient)

    def exact_row_weights(self) -> Tensor:
        """p_i in float64, (N, 1). A number is filled in: a copy to a GPU would wait, and cannot be captured in a CUDA graph."""
        if isinstance(self.row_weights, Tensor):
            return self.row_weights.double()
        return self.z.new_full((*self.z.shape[:-1], 1), self.row_weights, dtype=torch.float64)


def diagonal(sample: Sample, kernel: KernelSum, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ_i p_i²·k_b(z_i, z_i), with φ(0) subtracted where `kernel` says so, and Σ_i p_i²·∂k_b/∂log h_b, both (B,).

    The gradient to z is added to `gradient`.
    """
    if kernel.kernel.radial:
        value = sample.sum_of_squares * kernel.kernel.value_at_zero * (1 - kernel.subtract_constant)
        return value, torch.zeros_like(value)
    t = sample.z.square().sum(-1, keepdim=True, dtype=torch.float64) * kernel.gamma
    weights, dphi = sample.exact_row_weights().square(), kernel.kernel.derivatives(t)[0]
    if gradient is not None:
        gradient += (2 * weights * (dphi @ (kernel.weights * kernel.gamma))[..., None]).to(gradient.dtype) * sample.z
    value = kernel.kernel.phi(t) - kernel.kernel.value_at_zero * kernel.subtract_constant[..., None, :]
    return (weights * value).sum(-2), (-2 * weights * t * dphi).sum(-2)


def prior(sample: Sample, kernel: KernelSum, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """−2·Σ_i p_i·E_y k_b(x_i, y) + E k_b(y, y') with y ~ N(0, I), and its derivative to log h_b, both (B,).

    φ(0) is subtracted from each expectation where `kernel` says so. The gradient to x is added to `gradient`. Source: Rustamov 2019.
    """
    x, p, h = sample.z, sample.exact_row_weights(), kernel.bandwidth
    h2, dim = h.square(), x.shape[-1]
    cross, within = rbf_normal_mean_exponent(x.double(), h), rbf_normal_self_exponent(dim, h)
    # The constant counts by the share of these rows in the whole.
    share, subtract = p.sum(-2), kernel.subtract_constant
    value = share * _exp_or_expm1(within, subtract) - 2 * (p * _exp_or_expm1(cross, subtract[..., None, :])).sum(-2)
    cross, within = cross.exp(), within.exp()
    if gradient is not None:
        gradient += x * (2 * p * (cross @ (kernel.weights / (h2 + 1)))[..., None]).to(x.dtype)
    # d/d(log h) of the two exponents
    cross_slope = dim / (h2 + 1) + x.double().square().sum(-1, keepdim=True) * h2 / (h2 + 1).square()
    within_slope = 2 * dim / (h2 + 2)
    return value, share * within * within_slope - 2 * (p * cross * cross_slope).sum(-2)


def _exp_or_expm1(exponent: Tensor, subtract_constant: Tensor) -> Tensor:
    return torch.where(subtract_constant > 0, exponent.expm1(), exponent.exp())


def diagonal_hessian_product(z: Tensor, weights: Tensor, kernel: Kernel, bandwidth: Tensor, a: Tensor, direction: Tensor) -> Tensor:
    """The Hessian of Σ_i w_i·k(z_i, z_i) times a direction (N, D), for a kernel of x·y and w (N, 1); these may have a batch dimension.

    Bandwidths and their weights a are (B,) in float64.
    """
    x, v = z.double(), direction.double()
    gamma = kernel.gamma(bandwidth, x.shape[-1])
    slope, curvature = kernel.derivatives(x.square().sum(-1, keepdim=True) * gamma)
    along = (x * v).sum(-1, keepdim=True)
    first, second = (slope * gamma) @ a, (curvature * gamma.square()) @ a
    return (weights.double() * (2 * first[..., None] * v + 4 * second[..., None] * along * x)).to(direction.dtype)


def normal_hessian_product(x: Tensor, p: Tensor, bandwidth: Tensor, a: Tensor, direction: Tensor) -> Tensor:
    """The Hessian of −2·Σ_i p_i·E_y k(x_i, y) with y ~ N(0, I) times a direction (N, D), with p (N, 1). Of the value of `prior`."""
    rows, v = x.double(), direction.double()
    steepness = 1 / (bandwidth.square() + 1)
    terms = rbf_normal_mean_exponent(rows, bandwidth).exp() * a * steepness
    along = (rows * v).sum(-1, keepdim=True)
    return (2 * p.double() * (terms.sum(-1, keepdim=True) * v - (terms @ steepness)[..., None] * along * rows)).to(direction.dtype)


def bandwidth_gradients(
    samples: list[Sample], kernel: KernelSum, bandwidth: Numbers, unbiased: bool, values: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients to the bandwidths and to their weights, in the order of `bandwidth`.

    `values` and `slopes` are the sums over pairs of each k_b, with φ(0) subtracted where `kernel` says so, and of each ∂k_b/∂log h_b,
    widest bandwidth first. A single sample is compared with N(0, I).
    """
    forms = [] if unbiased else [diagonal(sample, kernel, None) for sample in samples]
    if len(samples) == 1:
        forms.append(prior(samples[0], kernel, None))
    for value, slope in forms:
        values, slopes = values + value, slopes + slope
    order = as_vector(bandwidth, values.device).argsort(descending=True)
    grad_h, grad_a = kernel.weights / kernel.bandwidth * slopes, values
    return torch.empty_like(grad_h).index_copy_(-1, order, grad_h), torch.empty_like(grad_a).index_copy_(-1, order, grad_a)
