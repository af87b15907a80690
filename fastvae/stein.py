"""Kernel Stein discrepancies: the public function. It checks its arguments, brings them into one form and applies the operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.devices import float64_on_cpu
from fastvae.dispatch import accumulation_dtype, zero_if_finite
from fastvae.distributed import gather_rows, propagate_errors, sum_shares
from fastvae.functional import _autocast
from fastvae.ops.common import KernelArguments, cached_options, kernel_arguments
from fastvae.ops.ksd_to_normal import apply_ksd_to_normal
from fastvae.radial import Kernel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@float64_on_cpu
def ksd_to_normal(
    z: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.SteinKernelName | Kernel = "imq",
    estimator: checks.Estimator = "biased",
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Squared kernel Stein discrepancy of a sample to N(0, I), in memory O(N·D).

        KSD² = mean of u(z_i, z_j),   u(x, y) = (x·y)·k + 2·(d² − D)·k' − 4·d²·k''

    with d = ‖x − y‖ and k' and k'' derivatives to d² of k = Σ_b a_b·k_b. The mean of u over N(0, I) is zero, so that no sample of N(0, I)
    is needed, for any smooth radial kernel: `mmd_to_normal` has the RBF kernel only. Differentiable twice with respect to z, and in forward
    mode. The gradient is computed together with the value, in one sweep over the pairs of rows; a product with the Hessian takes one more.

    Args:
        z: (..., N, D), floating point.
        bandwidth: h, a length in the units of the data, as a number, a sequence or a tensor. Each lies between 1e-8 and 1e8. It gets no
            gradient.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default. They get no gradient.
        kernel: "imq" h²/(h² + d²), "rbf" (or "gaussian") exp(−d²/2h²) or "rational_quadratic" 1/(1 + d²/2h²). Or one of
            `fastvae.radial`, with other parameters: RationalQuadratic(0.5) is (1 + d²/h²)^−½. The inverse multiquadric of the literature on
            Stein's method, (c² + d²)^−½, is that with bandwidth=c and bandwidth_weights=[1/c].
        estimator: "biased" (V-statistic, the mean over all pairs) or "unbiased" (U-statistic, over the pairs i ≠ j).
        precision: As in `mmd`.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one.
        process_group: As in `mmd`.

    Returns:
        KSD², shape (...), a scalar without batch dimensions; float64 for float64 inputs, else float32. nan if an input holds a nan or an
        infinity.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: A shape, device, bandwidth, weight, kernel or option breaks a rule above, or z has one row and estimator is "unbiased".

    Source: Liu et al. 2016, "A kernelized Stein discrepancy for goodness-of-fit tests", theorem 3.6; Gorham and Mackey 2017, "Measuring
    sample quality with kernels", section 3.
    """
    with propagate_errors(process_group):
        checks.points("z", z, batched=True)
        z = _autocast(z)
        family, h, a, arguments = _options(bandwidth, bandwidth_weights, backend, kernel, estimator, precision, z.device)
        if process_group is not None:
            checks.distributed(z, estimator, backend, process_group, "z")
    whole, start = None, 0
    if process_group is not None:
        (whole,), start = gather_rows("z", [z], process_group, estimator)
    checks.enough_rows("z", z if whole is None else whole, estimator)
    if backend == "reference":
        rows = z.to(accumulation_dtype(z.dtype))
        with torch.autocast(rows.device.type, enabled=False):
            value = reference.ksd_to_normal(rows, bandwidth=h, bandwidth_weights=a, kernel=family, estimator=estimator)
            return value + zero_if_finite(rows).to(rows.dtype)
    batch = z.shape[:-2]
    rows = z.flatten(0, -3) if len(batch) > 1 else z
    group = "" if process_group is None else process_group.group_name
    value = apply_ksd_to_normal(rows, whole, arguments, start, estimator == "unbiased", precision or "", backend or "", group)
    if process_group is not None:
        return sum_shares(value, process_group)
    return value.reshape(batch) if len(batch) > 1 else value


@cached_options
def _options(
    bandwidth: Any, weights: Any, backend: Any, kernel: Any, estimator: Any, precision: Any, device: Any
) -> tuple[Any, Any, Any, KernelArguments]:
    """The kernel, its bandwidths and their weights, and the same as arguments of an operation."""
    checked = checks.stein_options(kernel, estimator, precision, backend, bandwidth, weights, device)
    return *checked, kernel_arguments(*checked)
