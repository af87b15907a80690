"""The networks of latent diffusion's AutoencoderKL, from pictures to latents with channels, height and width and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from fastvae import checks

# A file to load names the numbers of blocks and levels: one with millions of them must not fill the memory.
MOST_BLOCKS = MOST_LEVELS = 16


class ResidualBlock(nn.Module):
    """x + f(x), where f is twice GroupNorm, SiLU and a 3×3 convolution, 0 at first: (N, C_in, H, W) → (N, C_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        first, last = _conv(channels_in, channels_out), _conv(channels_out, channels_out)
        nn.init.zeros_(last.weight)
        self.residual = nn.Sequential(_norm(channels_in), nn.SiLU(), first, _norm(channels_out), nn.SiLU(), last)
        self.shortcut = nn.Identity() if channels_in == channels_out else _conv(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.residual(x)
        return y


class Affine(nn.Module):
    """scale·x + offset, two constants."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.offset

    def extra_repr(self) -> str:
        return f"{self.scale:g}, {self.offset:g}"


def encoder(channels_in: int, channels: Sequence[int], channels_out: int, *, blocks: int) -> nn.Sequential:
    """(N, channels_in, H, W) → (N, channels_out, H/f, W/f) with f = 2^(len(channels) − 1)."""
    layers: list[nn.Module] = [Affine(2.0, -1.0), _conv(channels_in, channels[0])]
    for level, (before, width) in enumerate(itertools.pairwise([channels[0], *channels])):
        if level:
            layers.append(_conv(before, before, stride=2))
        layers += _blocks(before, width, blocks)
    # A group norm here, or at the decoder's end, would take brightness and contrast away from each picture.
    return nn.Sequential(*layers, *_blocks(channels[-1], channels[-1], 2), _conv(channels[-1], channels_out))


def decoder(channels_in: int, channels: Sequence[int], channels_out: int, *, blocks: int) -> nn.Sequential:
    """(N, channels_in, H, W) → (N, channels_out, f·H, f·W) with f = 2^(len(channels) − 1)."""
    layers: list[nn.Module] = [_conv(channels_in, channels[0]), *_blocks(channels[0], channels[0], 2)]
    for level, (before, width) in enumerate(itertools.pairwise([channels[0], *channels])):
        if level:
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), _conv(before, width)]
        layers += _blocks(width, width, blocks)
    return nn.Sequential(*layers, _conv(channels[-1], channels_out), Affine(0.5, 0.5))


def latent_shape(shape: Sequence[int], latent_channels: int, channels: Sequence[int], blocks: int) -> tuple[int, int, int]:
    """The shape of the latent of a picture, after checks of all sizes of the networks."""
    checks.sizes("shape", shape)
    checks.sizes("channels", channels)
    checks.integer("latent_channels", latent_channels, at_least=1)
    if checks.integer("blocks", blocks, at_least=1) > MOST_BLOCKS:
        raise ValueError(f"blocks must be at most {MOST_BLOCKS}, got {blocks}")
    if not 0 < len(channels) <= MOST_LEVELS:
        raise ValueError(f"channels must hold 1 to {MOST_LEVELS} numbers, got {len(channels)}")
    factor = 2 ** (len(channels) - 1)
    if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"shape must be (C, H, W) with H and W multiples of {factor} for {len(channels)} numbers of channels, got {tuple(shape)}"
        )
    return latent_channels, shape[1] // factor, shape[2] // factor


def _conv(channels_in: int, channels_out: int, size: int = 3, *, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, size, stride=stride, padding=size // 2)
    # PyTorch's own initial weights let a signal fade by √3 in each layer.
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _norm(channels: int) -> nn.GroupNorm:
    # At most the 32 groups of latent diffusion, and at least four channels in each.
    most = 1 << max(channels // 4, 1).bit_length() - 1
    return nn.GroupNorm(math.gcd(32, channels, most), channels, eps=1e-6)


def _blocks(channels_in: int, channels_out: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(before, after) for before, after in itertools.pairwise([channels_in, *[channels_out] * count])]
