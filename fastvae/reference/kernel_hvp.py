"""Second derivatives of sums over pairs of rows.

The products with a kernel matrix, the quadratic forms of one, their gradients and those of MMD² are derivatives of

    S = Σ_ij (u_i·v_j)·k(x_i, y_j)                                                                                  (1)

A derivative of such a gradient is the Hessian of S times a direction (ẋ, ẏ, u̇, v̇). With k = φ(t), t = γ·‖x − y‖²,

    c_ij = u_i·v_j      e_ij = u_i·v̇_j + u̇_i·v_j      s_ij = (x_i − y_j)·(ẋ_i − ẏ_j)
    P_ij = 2γφ'·c_ij    Q_ij = 4γ²φ''·s_ij·c_ij + 2γφ'·e_ij                                                         (2)

    x_i: ẋ_i·Σ_j P_ij + x_i·Σ_j Q_ij − Σ_j P_ij·ẏ_j − Σ_j Q_ij·y_j          u_i: Σ_j 2γφ'·s_ij·v_j + k_ij·v̇_j
    y_j: ẏ_j·Σ_i P_ij + y_j·Σ_i Q_ij − Σ_i P_ij·ẋ_i − Σ_i Q_ij·x_i          v_j: Σ_i 2γφ'·s_ij·u_i + k_ij·u̇_i        (3)

For a kernel of t = γ·x·y, with s_ij = ẋ_i·y_j + x_i·ẏ_j, P = γφ'·c and Q = γ²φ''·s·c + γφ'·e,

    x_i: Σ_j P_ij·ẏ_j + Q_ij·y_j     y_j: Σ_i P_ij·ẋ_i + Q_ij·x_i     u_i: Σ_j γφ'·s_ij·v_j + k_ij·v̇_j     v_j: likewise   (4)

At identical rows φ' and φ'' count as 0 where they are infinite, so that both derivatives of a kernel of the distance are 0 there.

One sample against itself, y = None, is x in both places, without the pairs i = i. c is symmetric, v̇ = 0, of e the symmetric half counts,
½·(u̇_i·v_j + v_i·u̇_j), and the result to x is the derivative through both places, twice the sum (3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastvae import checks
from fastvae.radial import Kernel
from fastvae.reference.mmd import bandwidths, kernel_matrix

Directions = Sequence["Tensor | None"]


def kernel_hvp(
    x: Tensor,
    y: Tensor | None,
    u: Tensor,
    v: Tensor,
    directions: Directions,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
) -> list[Tensor]:
    """The dense product with the Hessian of (1), by two automatic derivatives: to x (N, D), y (M, D), u (N, C) and v (M, C).

    `directions` are those of x, y, u and v, None for 0. Without y the result has one place for x and none for y. Memory O(N·M·D).
    """
    numbers = bandwidths(x, bandwidth, bandwidth_weights)

    def form(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        k = kernel_matrix(x, y, *numbers, kernel)
        if same:
            k = k * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
        return (u * (k @ v)).sum()

    same = y is None
    tangents = [torch.zeros_like(t) if dot is None else dot for t, dot in zip((x, y, u, v), directions, strict=True) if t is not None]
    if y is None:
        return list(_derivative(lambda x, u, v: form(x, x, u, v), (x, u, v), tangents))
    return list(_derivative(form, (x, y, u, v), tangents))


def _derivative(form: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    gradient: Any = torch.func.grad(form, argnums=tuple(range(len(primals))))
    return cast("tuple[Tensor, ...]", torch.func.jvp(gradient, primals, tuple(tangents))[1])
