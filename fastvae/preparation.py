"""Transforms data before the network and its results back afterwards. The transform is part of the model and is saved with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 4096


class Standardise(nn.Module):
    """(x − mean)/scale, feature by feature, in float64.

    Mean and scale stay in float64 on the CPU, wherever the module is moved and whatever it is cast to, so that they lose no digits.

    Args:
        mean: The shape of one sample, finite. It gets no gradient.
        scale: Same shape, finite, greater than 0. It gets no gradient.

    Raises:
        ValueError: A number is not finite, a scale is not positive, or the shapes differ.
    """

    def __init__(self, mean: Any, scale: Any) -> None:
        super().__init__()
        self.mean, self.scale = (torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone() for values in (mean, scale))
        if self.mean.shape != self.scale.shape:
            raise ValueError(f"mean and scale must have the same shape, got {tuple(self.mean.shape)} and {tuple(self.scale.shape)}")
        if not (self.mean.isfinite().all() and self.scale.isfinite().all() and (self.scale > 0).all()):
            raise ValueError("mean and scale must be finite and scale greater than 0, got other numbers")

    @classmethod
    def of(cls, x: Tensor) -> Standardise:
        """The mean and standard deviation of samples x (N, …) of any real dtype. A constant feature gets scale 1."""
        if not len(x):
            raise ValueError("x must have at least one sample, got none")
        # Differences to the first sample are exactly 0 for a constant feature. In blocks, to save a float64 copy of x.
        first, parts = x[0].double(), torch.split(x, ROWS)
        mean, variance = torch.zeros_like(first), torch.zeros_like(first)
        for part in parts:
            mean += (part.double() - first).sum(0)
        mean /= len(x)
        for part in parts:
            variance += (part.double() - first - mean).square_().sum(0)
        variance /= len(x)
        return cls(first + mean, torch.where(variance > 0, variance.sqrt(), 1.0))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x (N, …), standardised, in `dtype`."""
        values, mean, scale = self._float64_operands(x)
        return ((values - mean) / scale).to(x.device, dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """x (N, …) in the units of the data, in float64, as float32 cannot hold the digits of, say, Julian dates."""
        values, mean, scale = self._float64_operands(x)
        return values * scale + mean

    def _float64_operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[x.ndim - self.mean.ndim :] != self.mean.shape:
            raise ValueError(f"x must have samples of shape {tuple(self.mean.shape)}, got shape {tuple(x.shape)}")
        if x.device.type == "mps":  # which has no float64
            x = x.cpu()
        # x is promoted by the arithmetic, not cast, so that an exported program takes any dtype.
        return x, self.mean[None].to(x.device), self.scale[None].to(x.device)

    def get_extra_state(self) -> Tensor:
        return torch.stack([self.mean, self.scale])

    def set_extra_state(self, state: Tensor) -> None:
        loaded = Standardise(*state)
        self.mean, self.scale = loaded.mean, loaded.scale

    def extra_repr(self) -> str:
        return f"features={self.mean.numel()}"
