"""What MMD² has beside sums over pairs of rows: pairs of a row with itself, expectations over N(0, I), and what both add to gradients.

The shifts of `fastvae.kernel_sums.KernelSum` cancel between the sums of MMD², as the weights of each sample sum to one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.kernel_sums import KernelSum, Numbers, as_vector, rbf_normal_mean_exponent, rbf_normal_self_exponent
from fastvae.radial import Polynomial


class Sample(NamedTuple):
    """One sample in the accumulation dtype, or some rows of one, and its part in MMD². All but `share` may have a batch dimension.

    Attributes:
        z: the rows, (N, D).
        weights: (N,), or None for equal ones.
        whole, whole_weights: the sample that z are rows of.
        others: its rows before and after z, their weights, and for equal weights their share in it.
        share: of z in the whole, for equal weights; else 1.
        row_weights: p_i, (N, 1), or one for all.
        sum_of_squares: Σ p_i² over z, (1,).
        scale: 1/(1 − Σ p_i²) over the whole, of formula (2) of `fastvae.reference.mmd`, or 1.
        gradient: whether the gradient to z is wanted.
    """

    z: Tensor
    weights: Tensor | None
    whole: Tensor
    whole_weights: Tensor | None
    others: list[tuple[Tensor, Tensor | None, float]]
    share: float
    row_weights: float | Tensor
    sum_of_squares: float | Tensor
    scale: float | Tensor
    gradient: bool

    @staticmethod
    def of(
        z: Tensor, weights: Tensor | None, whole: Tensor | None, whole_weights: Tensor | None, start: int, unbiased: bool, gradient: bool
    ) -> Sample:
        """z, from row `start` of the whole on if that is given; weights of z and of the whole that each sum to one over the whole."""
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
        """p_i in float64, (N, 1). A number is filled in, as its copy to a GPU would wait and can't be captured in a CUDA graph."""
        if isinstance(self.row_weights, Tensor):
            return self.row_weights.double()
        return self.z.new_full((*self.z.shape[:-1], 1), self.row_weights, dtype=torch.float64)


def diagonal(sample: Sample, kernel: KernelSum, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ_i p_i²·(k_b(z_i, z_i) − shift·φ(0)) and the same of ∂k_b/∂log h_b, (bandwidths,); the gradient is added to `gradient`."""
    if kernel.kernel.radial:
        value = sample.sum_of_squares * kernel.kernel.value_at_zero * (1 - kernel.shifts)
        return value, torch.zeros_like(value)
    assert isinstance(kernel.kernel, Polynomial)
    t = sample.z.square().sum(-1, keepdim=True, dtype=torch.float64) * kernel.gamma
    weights, slope = sample.exact_row_weights().square(), kernel.kernel.slope(t)
    if gradient is not None:
        gradient += (2 * weights * (slope @ (kernel.weights * kernel.gamma))[..., None]).to(gradient.dtype) * sample.z
    value = kernel.kernel.phi(t) - kernel.kernel.value_at_zero * kernel.shifts[..., None, :]
    return (weights * value).sum(-2), (-2 * weights * t * slope).sum(-2)


def prior(sample: Sample, kernel: KernelSum, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """−2·Σ_i p_i·(E_y k_b(x_i, y) − shift) + E k_b(y, y') − shift and its derivative to log h_b, (bandwidths,), y ~ N(0, I).

    The gradient to x is added to `gradient`. Source: Rustamov 2019.
    """
    x, p, h = sample.z, sample.exact_row_weights(), kernel.bandwidth
    h2, dim = h.square(), x.shape[-1]
    cross, within = rbf_normal_mean_exponent(x.double(), h), rbf_normal_self_exponent(dim, h)
    # The rows' share in the constant.
    share = p.sum(-2)
    value = share * _shifted_exp(within, kernel.shifts) - 2 * (p * _shifted_exp(cross, kernel.shifts[..., None, :])).sum(-2)
    cross, within = cross.exp(), within.exp()
    if gradient is not None:
        gradient += x * (2 * p * (cross @ (kernel.weights / (h2 + 1)))[..., None]).to(x.dtype)
    # d/d(log h) of the two exponents
    cross_slope = dim / (h2 + 1) + x.double().square().sum(-1, keepdim=True) * h2 / (h2 + 1).square()
    within_slope = 2 * dim / (h2 + 2)
    return value, share * within * within_slope - 2 * (p * cross * cross_slope).sum(-2)


def _shifted_exp(exponent: Tensor, shifts: Tensor) -> Tensor:
    return torch.where(shifts > 0, exponent.expm1(), exponent.exp())


def bandwidth_gradients(
    samples: list[Sample], kernel: KernelSum, bandwidth: Numbers, unbiased: bool, values: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients to the bandwidths and to their weights, in the order of `bandwidth`.

    From sums over the pairs of each k_b − shift·φ(0) and of each ∂k_b/∂log h_b, widest first; one sample stands against N(0, I).
    """
    forms = [] if unbiased else [diagonal(sample, kernel, None) for sample in samples]
    if len(samples) == 1:
        forms.append(prior(samples[0], kernel, None))
    for value, slope in forms:
        values, slopes = values + value, slopes + slope
    order = as_vector(bandwidth, values.device).argsort(descending=True)
    grad_h, grad_a = kernel.weights / kernel.bandwidth * slopes, values
    return torch.empty_like(grad_h).index_copy_(-1, order, grad_h), torch.empty_like(grad_a).index_copy_(-1, order, grad_a)
