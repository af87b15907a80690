"""The kernel x·y, whose sums have closed forms in O(N·D): no sweep over pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.kernel_sums import stable_mean


def linear_mmd(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, unbiased: bool) -> Tensor:
    """MMD² of k = x·y, shape (...), float64: ‖Σ p_i·x_i − Σ q_j·y_j‖², without the pairs i = j if `unbiased`.

    x is (..., N, D) and y (..., M, D); weights (..., N) sum to one. Formulas (1) and (2) of `fastvae.reference.mmd`.
    """
    x, y = x.double(), y.double()
    if x_weights is None and y_weights is None:
        # MMD² does not change when both samples are shifted; with unequal weights the unbiased estimate does.
        centre = stable_mean(x.detach())[..., None, :]
        x, y = x - centre, y - centre
    difference, sign = torch.zeros_like(x[..., 0, :]), 1
    value = difference[..., 0]
    for z, weights in ((x, x_weights), (y, y_weights)):
        p = z.new_full(z.shape[:-1], 1 / z.shape[-2]) if weights is None else weights.double()
        mean, squares = (p[..., None] * z).sum(-2), p.square().sum(-1)
        difference, sign = difference + sign * mean, -sign
        if unbiased:
            own = (p.square() * z.square().sum(-1)).sum(-1)
            value = value + (squares * mean.square().sum(-1) - own) / (1 - squares)
    return difference.square().sum(-1) + value
