"""Product of a kernel matrix with an array.

    out_i = Σ_j k(x_i, y_j)·v_j                                                                                     (1)

It is the kernel mean embedding of a sample with weights v, evaluated at x. With v = [1/N; −1/M] over two samples it is the witness function
of their MMD. The gradients, from the upstream g:

    v_j: Σ_i k(x_i, y_j)·g_i        x_i: Σ_j (g_i·v_j)·∂k(x_i, y_j)/∂x_i        y_j: Σ_i (g_i·v_j)·∂k(x_i, y_j)/∂y_j     (2)

Source: Gretton et al. 2012, "A kernel two-sample test", section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvae import checks
from fastvae.radial import Kernel
from fastvae.reference.mmd import bandwidths, kernel_matrix


def kernel_matmul(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
) -> Tensor:
    """Dense K(x, y)·v for x (N, D), y (M, D) and v (M,) or (M, C), shape (N,) or (N, C). Memory O(N·M·D)."""
    return kernel_matrix(x, y, *bandwidths(x, bandwidth, bandwidth_weights), kernel) @ v
