"""How the two numbers that an encoder returns for each latent dimension give a Gaussian."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ScaleKind = Literal["logvar", "log_std", "std", "variance", "softplus"]


# Below it log softplus(s) is s in float64 too. In float32 softplus(s) loses digits below −87 and is 0 below −104.
LINEAR = -40.0


class Parametrisation(NamedTuple):
    """How an encoder's μ and s give the mean and the standard deviation of a Gaussian.

    First μ and s are bounded, by `bounds` or by `soft_clamp`, not both. Then s gives σ, with o = `offset`:

        "logvar" σ² = exp(s) + o,   "log_std" σ = exp(s) + o,   "std" σ = s + o,   "variance" σ² = s + o,   "softplus" σ = softplus(s) + o
    """

    scale: ScaleKind = "logvar"
    offset: float = 0.0
    bounds: tuple[float, float] | None = None  # of s
    soft_clamp: float | None = None  # c in c·tanh(μ/c) and c·tanh(s/c)

    @property
    def is_logvar(self) -> bool:
        """Whether a bounded s is log σ² and μ has no bounds."""
        return self.scale == "logvar" and not self.offset and self.soft_clamp is None

    def bounded(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """μ and s within their bounds."""
        if self.soft_clamp is not None:
            c = self.soft_clamp
            return c * (mu / c).tanh(), c * (s / c).tanh()
        return mu, s if self.bounds is None else s.clamp(*self.bounds)

    def unbounded_gradients(self, grad_mu: Tensor, grad_s: Tensor, mu: Tensor, s: Tensor, unbounded_s: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients to the arguments of `bounded` from those to its results μ and s."""
        if self.soft_clamp is not None:
            return grad_mu * (1 - (mu / self.soft_clamp).square()), grad_s * (1 - (s / self.soft_clamp).square())
        if self.bounds is None:
            return grad_mu, grad_s
        # A value at a bound has its gradient, as in torch.clamp, and so has nan.
        return grad_mu, grad_s.masked_fill((unbounded_s < self.bounds[0]) | (unbounded_s > self.bounds[1]), 0)

    def spread(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """σ and log σ² of a bounded s."""
        if self.scale == "logvar" and not self.offset:
            return (0.5 * s).exp(), s
        if self.scale == "log_std" and not self.offset:
            return s.exp(), 2 * s
        if self.scale in ("logvar", "variance"):
            var = (s.exp() if self.scale == "logvar" else s) + self.offset
            return var.sqrt(), var.log()
        std = (s.exp() if self.scale == "log_std" else F.softplus(s) if self.scale == "softplus" else s) + self.offset
        if self.scale == "softplus" and not self.offset:
            return std, 2 * torch.where(s < LINEAR, s, std.clamp(min=torch.finfo(std.dtype).tiny).log())
        return std, 2 * std.log()

    def relative(self, mu: Tensor, s: Tensor, std: Tensor, prior_mu: Tensor, prior_s: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        """(μ − μ₀)/σ₀ and σ/σ₀ of bounded s and s₀, also where both σ underflow."""
        tiny = torch.finfo(prior_std.dtype).tiny
        normal = prior_std.clamp(min=tiny)
        t, ratio = (mu - prior_mu) / normal, std / normal
        if self.offset or self.scale in ("std", "variance"):
            return t, ratio
        # Only there, as the rounding of a large difference is a factor of its exponential.
        return t, torch.where(prior_std < tiny, ((0.5 if self.scale == "logvar" else 1.0) * (s - prior_s)).exp(), ratio)

    def slope(self, s: Tensor, std: Tensor) -> Tensor | float:
        """The derivative of log σ to a bounded s."""
        if self.scale == "variance":
            return 0.5 / std.square()
        if self.scale == "std":
            return 1 / std
        if self.scale == "softplus":
            # As F.softplus, which is s above 20.
            slope = torch.where(s > 20, 1, s.sigmoid()) / std
            return slope if self.offset else torch.where(s < LINEAR, 1, slope)
        factor = 0.5 if self.scale == "logvar" else 1.0
        # exp(s)/(exp(s) + o), without overflow
        return factor * (s - math.log(self.offset)).sigmoid() if self.offset else factor
