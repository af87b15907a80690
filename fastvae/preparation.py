"""What data are prepared by before a network sees them, and what it returns is brought back by: part of the model, and kept with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 4096


class Standardise(nn.Module):
    """(x − mean)/scale, feature by feature, in float64.

    Args:
        mean, scale: of one sample's shape, finite, scale > 0. They are constants: in float64 on the CPU whatever the module is moved or
            cast to, so that neither bfloat16 nor a device without float64 costs them a digit.

    Raises:
        ValueError: numbers that are not finite, a scale that is not positive, shapes that differ.
    """

    def __init__(self, mean: Any, scale: Any) -> None:
        super().__init__()
        self.mean, self.scale = (torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone() for values in (mean, scale))
        if self.mean.shape != self.scale.shape:
            raise ValueError(f"mean and scale must have one shape, got {tuple(self.mean.shape)} and {tuple(self.scale.shape)}")
        if not (self.mean.isfinite().all() and self.scale.isfinite().all() and (self.scale > 0).all()):
            raise ValueError("mean and scale must be finite, and scale positive, got others")

    @classmethod
    def of(cls, x: Tensor) -> Standardise:
        """By the mean and the standard deviation of samples x (N, …), of any real dtype. A constant feature has scale 1."""
        if not len(x):
            raise ValueError("x must have at least one sample, got none")
        # Of the distances from one sample, which are exactly 0 where a feature is constant; a block at a time, not all in float64.
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
        """x (N, …) in the units of the network."""
        values, mean, scale = self._promoting(x)
        return ((values - mean) / scale).to(x.device, dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """x (N, …) back in the units of the data, in float64 where the device has it: a date's digits are past float32."""
        values, mean, scale = self._promoting(x)
        return values * scale + mean

    def _promoting(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[x.ndim - self.mean.ndim :] != self.mean.shape:
            raise ValueError(f"x must have samples of shape {tuple(self.mean.shape)}, got shape {tuple(x.shape)}")
        if x.device.type == "mps":  # which has no float64
            x = x.cpu()
        # What x is of is promoted, not cast: so that an exported program takes any dtype.
        return x, self.mean[None].to(x.device), self.scale[None].to(x.device)

    def get_extra_state(self) -> Tensor:
        return torch.stack([self.mean, self.scale])

    def set_extra_state(self, state: Tensor) -> None:
        loaded = Standardise(*state)
        self.mean, self.scale = loaded.mean, loaded.scale

    def extra_repr(self) -> str:
        return f"features={self.mean.numel()}"
