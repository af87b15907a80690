"""Sketched isotropic Gaussian regularisation (SIGReg), which pushes a sample towards N(0, I) slice by slice.

With projections p_nk = z_n·a_k on K unit vectors a_k and the characteristic function φ(t) = exp(−t²/2) of N(0, 1):

    C_k(t) = mean_n cos(t·p_nk),   S_k(t) = mean_n sin(t·p_nk)                                                        (1)
    loss   = N·mean_k ∫ φ(t)·[(C_k(t) − φ(t))² + S_k(t)²] dt                                                          (2)

The integral over [−t_max, t_max] is taken by the trapezoidal rule. The integrand is even in t, so that twice the integral over [0, t_max]
is the same. The term of t = 0 is zero.

Backward, with the gradients c_k(t) and s_k(t) to the sums N·C_k(t) and N·S_k(t):

    dp_nk = Σ_t t·[s_k(t)·cos(t·p_nk) − c_k(t)·sin(t·p_nk)],   dz_n = Σ_k dp_nk·a_k                                   (3)

Without truncation (2) is √(2π)·N times MMD² (biased, Gaussian kernel of bandwidth 1) between each slice and N(0, 1).

Source: Balestriero and LeCun 2025, "LeJEPA: provable and scalable self-supervised learning without the heuristics" (arXiv 2511.08544),
section 4; Epps and Pulley 1983, "A test for normality based on the empirical characteristic function".
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigreg(
    z: Tensor, directions: Tensor, *, num_points: int = 17, t_max: float = 3.0, t_min: float = 0.0, scale_by_n: bool = True
) -> Tensor:
    """Formula (2), the mean over batch dimensions, a scalar, in O(B·N·K·num_points) memory.

    Args:
        z: (..., N, D).
        directions: a, (D, K), columns of unit length.
        num_points: points of the trapezoidal rule from `t_min` to `t_max`.
        t_min: 0, where the integral is doubled, or −t_max.
        scale_by_n: whether the factor N is included.
    """
    t = torch.linspace(t_min, t_max, num_points, dtype=z.dtype, device=z.device)
    phi = (-0.5 * t * t).exp()
    angles = (z @ directions)[..., None] * t
    errors = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    integrals = torch.trapezoid(phi * errors, t, dim=-1)
    factor = (2 if t_min == 0 else 1) * (z.shape[-2] if scale_by_n else 1)
    return factor * integrals.mean()
