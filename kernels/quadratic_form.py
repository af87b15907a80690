"""Quadratic forms of a kernel matrix on a GPU, by K·v without its diagonal: (1) and (2) of `fastvae.reference.quadratic_form`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.kernels.kernel_matmul import Product
from fastvae.kernels.launch import on_device
from fastvae.radial import KernelSum


@on_device
def quadratic_form(
    kernel: KernelSum,
    z: Tensor,
    v: Tensor,
    centre: Tensor,
    upstream: Tensor | None,
    values: bool,
    diagonal: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    """S (C, C), or its diagonal (C,), in float64, of z (N, D) and v (N, C), and with an upstream (C, C) the pull on z (N, D).

    k stands for k − shift·φ(0). The pull is that of `fastvae.radial.Sweep` with w_j·W_ij replaced by (v_i·B·v_jᵀ)·W_ij.
    """
    product = Product(kernel, [z], centre, precision, v.shape[1])
    a, factor = product.points(z), product.factor(v)
    total = z.new_zeros(v.shape[1] if diagonal else v.shape[1:] * 2, dtype=torch.float64)
    if values:
        out = product.matmul(a, a, factor, within=True)[: z.shape[0], : v.shape[1]].double()
        total = (v * out).sum(0) if diagonal else v.double().T @ out
    if upstream is None:
        return total, None
    coefficients = v @ (upstream + upstream.T).to(v.dtype)
    return total, product.pull(a, a, product.factor(coefficients), factor, within=True)
