"""Squared maximum mean discrepancy.

With k the kernel and sample weights p (N,), q (M,), each summing to one (1/N and 1/M unless given):

    biased    MMD² = Σ_ij p_i p_j k(x_i, x_j) + Σ_ij q_i q_j k(y_i, y_j) − 2·Σ_ij p_i q_j k(x_i, y_j)              (1)
    unbiased  the first two sums over i ≠ j only, divided by 1 − Σ_i p_i² and 1 − Σ_i q_i²                          (2)
              (for equal weights: Σ_{i≠j} k / (N(N−1)), the usual U-statistic)

Against the standard normal, with both expectations over the prior in closed form (`fastvae.kernel_sums`):

    MMD² = Σ_ij p_i p_j k(x_i, x_j) − 2·Σ_i p_i E_y k(x_i, y) + E_{y,y'} k(y, y')                                   (3)

The linear-time estimator, over ⌊N/2⌋ pairs of neighbours, unbiased and in O(N·D):

    linear    MMD² = mean_i k(x_2i, x_2i+1) + k(y_2i, y_2i+1) − k(x_2i, y_2i+1) − k(x_2i+1, y_2i)                   (4)

Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6, and lemma 14 for (4); Rustamov 2019 for (3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastvae import checks
from fastvae.kernel_sums import as_vector, rbf_normal_mean_exponent, rbf_normal_self_exponent
from fastvae.radial import KERNEL_NAMES, Kernel, Sum


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    estimator: checks.MMDEstimator = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    """Dense MMD² between the rows of x (..., N, D) and y (..., M, D), shape (...). Arguments as in `fastvae.mmd`; memory O(N·M·D)."""
    h, a = bandwidths(x, bandwidth, bandwidth_weights)
    if estimator == "linear":
        return _linear(x, y, h, a, kernel)
    p, q = _weights(x, x_weights), _weights(y, y_weights)
    cross = _form(p, kernel_matrix(x, y, h, a, kernel), q)
    return _within(x, p, h, a, kernel, estimator) + _within(y, q, h, a, kernel, estimator) - 2 * cross


def mmd_to_normal(
    x: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    estimator: checks.Estimator = "biased",
    x_weights: Tensor | None = None,
) -> Tensor:
    """Dense MMD² between the rows of x (..., N, D) and N(0, I), shape (...). Arguments as in `fastvae.mmd_to_normal`; memory O(N²·D)."""
    h, a = bandwidths(x, bandwidth, bandwidth_weights)
    p = _weights(x, x_weights)
    cross = (p * (rbf_normal_mean_exponent(x, h).exp() @ a)).sum(-1)
    return _within(x, p, h, a, kernel, estimator) - 2 * cross + rbf_normal_self_exponent(x.shape[-1], h).exp() @ a


def bandwidths(x: Tensor, bandwidth: float | Sequence[float] | Tensor, weights: Sequence[float] | Tensor | None) -> tuple[Tensor, Tensor]:
    """h_b and a_b, each (B,), in the dtype of x."""
    h = _vector(x, bandwidth)
    return h, torch.ones_like(h) if weights is None else _vector(x, weights)


def _vector(x: Tensor, values: float | Sequence[float] | Tensor) -> Tensor:
    """In the dtype and on the device of x. On a GPU constants are filled in, as the host would wait for a copy."""
    if x.device.type != "cpu" and not (isinstance(values, Tensor) and (values.device == x.device or _is_traced(values))):
        if isinstance(values, (Tensor, np.ndarray)):
            values = values.reshape(-1).tolist()
        numbers = values if isinstance(values, Sequence) else [values]
        return as_vector(numbers, x.device).to(x.dtype)
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1)


def _is_traced(t: Tensor) -> bool:
    """Whether operations on t are recorded, for a gradient or a graph."""
    return t.requires_grad or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(t)


def kernel_matrix(x: Tensor, y: Tensor, h: Tensor, a: Tensor, kernel: str | Kernel) -> Tensor:
    """Σ_b a_b·k_b(x_i, y_j), shape (..., N, M), for x (..., N, D) and y (..., M, D)."""
    kernel = KERNEL_NAMES[kernel] if isinstance(kernel, str) else kernel
    if isinstance(kernel, Sum):
        return torch.stack([weight * kernel_matrix(x, y, scale * h, a, term) for weight, term, scale in kernel.terms]).sum(0)
    x, y = x[..., :, None, :], y[..., None, :, :]
    pairs = (x - y).square().sum(-1) if kernel.radial else (x * y).sum(-1)
    return kernel.phi(pairs[..., None] * kernel.gamma(h, x.shape[-1])) @ a


def _weights(x: Tensor, weights: Tensor | None) -> Tensor:
    return x.new_full(x.shape[:-1], 1 / x.shape[-2]) if weights is None else weights


def _form(p: Tensor, k: Tensor, q: Tensor) -> Tensor:
    return (p[..., :, None] * k * q[..., None, :]).sum((-2, -1))


def _within(x: Tensor, p: Tensor, h: Tensor, a: Tensor, kernel: str | Kernel, estimator: str) -> Tensor:
    k = kernel_matrix(x, x, h, a, kernel)
    if estimator == "biased":
        return _form(p, k, p)
    off_diagonal = k * (1 - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device))
    return _form(p, off_diagonal, p) / (1 - p.square().sum(-1))


def _linear(x: Tensor, y: Tensor, h: Tensor, a: Tensor, kernel: str | Kernel) -> Tensor:
    rows = x.shape[-2] // 2 * 2
    even, odd = ((x[..., start:rows:2, None, :], y[..., start:rows:2, None, :]) for start in (0, 1))
    pairs = [(even[0], odd[0], 1), (even[1], odd[1], 1), (even[0], odd[1], -1), (odd[0], even[1], -1)]
    mean = sum((sign * kernel_matrix(u, v, h, a, kernel) for u, v, sign in pairs), start=x.new_zeros(())).mean((-3, -2, -1))
    # nan if a row is not finite: a kernel that vanishes at infinity would hide it, and an odd last row is in no pair.
    return mean * (1 + (0 * x).sum((-2, -1)) + (0 * y).sum((-2, -1)))
