"""Logarithms of kernel density estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.bandwidths import resolve
from fastvae.cpu.pairs import Density
from fastvae.devices import float64_on_cpu
from fastvae.dispatch import accumulation_dtype, zero_if_finite
from fastvae.functional import _autocast
from fastvae.kernel_sums import LOG2_E, Numbers, as_vector
from fastvae.ops.common import cached_options, kernel_arguments, without_autocast
from fastvae.ops.log_kernel_density import apply_log_kernel_density, few_rows_of, of_few_rows
from fastvae.radial import Kernel
from fastvae.reference.log_kernel_density import log_constant, weighted_logsumexp


@float64_on_cpu
def log_kernel_density(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    y_weights: Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    normalized: bool = False,
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
) -> Tensor:
    """The logarithm of a kernel density estimate of y at each row of x, in memory O((N + M)·D).

        log p(x_i) = log Σ_j w_j·k(x_i, y_j),   k = Σ_b a_b·k_b of bandwidth h_b

    It is finite also where every k underflows. Differentiable once, with respect to x, y, y_weights, the bandwidths and their weights. Its
    gradient to x_i is the score of the estimate at x_i if rows are summed: for one RBF kernel, x + h²·score is a step of mean shift. Each
    bandwidth takes a sweep over all pairs.

    Args:
        x: (..., N, D), floating point.
        y: (..., M, D), same batch dimensions, dtype and device as x.
        bandwidth: h, as in `mmd`.
        bandwidth_weights: a_b, at least 0, one for each bandwidth; 1 each by default. A tensor may require grad.
        y_weights: w, (..., M), at least 0, same dtype and device as y, of any sum; 1/M each by default. One below 0 makes the result nan.
        kernel: "rbf", "imq", "rational_quadratic", "laplace", "matern32" or "matern52", or a `fastvae.Kernel` of these. "energy", "riesz"
            and "polynomial" have no logarithm.
        normalized: Multiply each k_b by (2πh_b²)^(−D/2), with which the RBF kernel is a density. Only for "rbf".
        precision: As in `mmd`.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one.

    Returns:
        log p, shape (..., N); float64 for float64 inputs, else float32. A problem with a nan or an infinity has nan in all rows.

    Raises:
        TypeError: x, y or y_weights is not a floating-point tensor, or their dtypes differ.
        ValueError: A shape, device, bandwidth or option breaks a rule above.

    Source: Silverman 1986, "Density estimation for statistics and data analysis", section 4.2.
    """
    checks.flag("normalized", normalized)
    x, y = _autocast(x), _autocast(y)
    checks.samples(x, y, batched=True)
    if y_weights is not None:
        y_weights = _autocast(y_weights)
        checks.row_weights("y_weights", y_weights, "y", y)
    dim = x.shape[-1] if normalized else None
    family, h, a, few = _options(bandwidth, bandwidth_weights, backend, kernel, dim, precision, x.device)
    if few is not None and x.ndim < 4:
        density = of_few_rows(few, x, y, y_weights)
        if density is not None:
            return density
    if isinstance(bandwidth, str):
        h = resolve(bandwidth, x, y)
    dtype, dim = accumulation_dtype(x.dtype), x.shape[-1]
    if backend == "reference":
        x, y = x.to(dtype), y.to(dtype)
        w = None if y_weights is None else y_weights.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            density = reference.log_kernel_density(
                x, y, bandwidth=h, bandwidth_weights=a, y_weights=w, kernel=family, normalized=normalized
            )
            return density + zero_if_finite(x, y, *([] if w is None else [w])).to(dtype)
    batch, (n, m) = x.shape[:-2], (x.shape[-2], y.shape[-2])
    flat: Any = (x, y, y_weights)
    if len(batch) > 1:
        flat = x.flatten(0, -3), y.flatten(0, -3), None if y_weights is None else y_weights.flatten(0, -2)

    def of_one(h: Numbers) -> Any:
        return apply_log_kernel_density(*flat, *kernel_arguments(family, h, [1.0]), precision or "", backend or "")

    parts = torch.stack([of_one(h[b : b + 1]) for b in range(len(h))], -1)
    with without_autocast(x.device):
        parts, factors = parts / LOG2_E, as_vector(a, x.device)
        if y_weights is None:
            parts = parts - math.log(m)
        if normalized:
            parts = parts + log_constant(as_vector(h, x.device), dim).to(dtype)
        density = parts[..., 0] + factors.log().to(dtype) if len(h) == 1 else weighted_logsumexp(parts, factors.to(dtype))
    return density.reshape(*batch, n)


@cached_options
def _options(
    bandwidth: Any, weights: Any, backend: Any, kernel: Any, normalized_dim: int | None, precision: Any, device: Any
) -> tuple[Kernel, Numbers, Numbers, Density | None]:
    """The kernel, its bandwidths and their weights, and the density of few rows."""
    family = checks.kernel_options(kernel, precision, backend, device)
    checks.positive_kernel(family, "log_kernel_density")
    if normalized_dim is not None:
        checks.option("kernel with normalized=True", family.name, ("rbf",))
    h, a = checks.bandwidths(bandwidth, weights, device)
    numbers = few_rows_of(family, h, a, backend, normalized_dim)
    return family, h, a, None if numbers is None else Density(numbers)
