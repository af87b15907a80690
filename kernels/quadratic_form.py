"""Quadratic forms of a kernel matrix on a GPU, by K·v without its diagonal: (1) and (2) of `fastvae.reference.quadratic_form`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.kernels.kernel_matmul import Product
from fastvae.radial import KernelNumbers


def quadratic_form(
    kernel: KernelNumbers, z: Tensor, v: Tensor, upstream: Tensor | None, values: bool, diagonal: bool, precision: str
) -> tuple[Tensor, Tensor | None]:
    """S (C, C), or its diagonal (C,), in float64, of z (N, D) and v (N, C), and from an upstream (C, C) the gradient to z (N, D)."""
    product, v = Product(kernel, [z], v.shape[1], precision), v.contiguous()
    total = z.new_empty(0, dtype=torch.float64)
    if values:
        out = product.matmul(product.factors(v), torch.float64, within=v)
        total = (v * out).sum(0) if diagonal else v.double().T @ out
    if upstream is None:
        return total, None
    # In float64, whose products PyTorch's switch for float32 leaves alone.
    coefficients = v.double() @ (upstream + upstream.T).double()
    return total, product.gradients(product.factors(coefficients, v), x=True, y=False, within=True)[0]
