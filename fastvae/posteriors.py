"""Gaussian posteriors as objects, with the methods of diffusers' class."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from fastvae import checks
from fastvae.dispatch import accumulation_dtype
from fastvae.functional import Posterior, gaussian_kl
from fastvae.parametrisation import ScaleKind

LOGVAR_BOUNDS = (-30.0, 20.0)


class DiagonalGaussianDistribution:
    """N(μ, σ²) with a diagonal covariance, from an encoder's result that holds μ and log σ² one after the other along a dimension.

    It has the attributes and methods of the class of this name in diffusers and in latent diffusion, and gives the same numbers and
    gradients. Nothing is computed before it is asked for. `sample_and_kl` is faster than `sample` and `kl`.

    Args:
        parameters: The means, followed along `dim` by as many log-variances, such as (B, 2·C, H, W).
        deterministic: Take σ = 0: a sample is the mean, and `kl` and `nll` are tensor([0.]).
        dim: The dimension of both halves.
        logvar_bounds: (low, high), to which the log-variances are clamped; None for no bounds. By default (−30, 20), but none for another
            scale or with a soft clamp.
        scale: What the second half is, as in `fastvae.reparameterize_kl`, and so are scale_offset and soft_clamp.
        scale_offset: o ≥ 0.
        soft_clamp: c > 0.

    Attributes:
        parameters: As given.
        deterministic: As given.
        mean: μ, in the shape of one half.
        logvar: log σ², clamped; of the encoder's σ if the distribution is deterministic.
        std: σ.
        var: σ².

    Raises:
        TypeError: The parameters are not a floating-point tensor.
        ValueError: An odd size of `dim`, or an option that breaks a rule above.

    Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models".
    """

    def __init__(
        self,
        parameters: Tensor,
        deterministic: bool = False,
        *,
        dim: int = 1,
        logvar_bounds: tuple[float, float] | None = LOGVAR_BOUNDS,
        scale: ScaleKind = "logvar",
        scale_offset: float = 0.0,
        soft_clamp: float | None = None,
    ) -> None:
        checks.moments("parameters", parameters, dim)
        if logvar_bounds is LOGVAR_BOUNDS and (scale != "logvar" or soft_clamp is not None):
            logvar_bounds = None
        self._parametrisation = checks.parametrisation(scale, scale_offset, logvar_bounds, soft_clamp)
        self.parameters = parameters
        self.deterministic = deterministic
        self._dim = dim % parameters.ndim

    @functools.cached_property
    def _halves(self) -> tuple[Tensor, Tensor]:
        """μ and s within their bounds."""
        mu, s = self.parameters.chunk(2, self._dim)
        return self._parametrisation.bounded(mu, s)

    @functools.cached_property
    def _spread(self) -> tuple[Tensor, Tensor]:
        return self._parametrisation.spread(self._halves[1])

    @property
    def mean(self) -> Tensor:
        return self._halves[0]

    @property
    def logvar(self) -> Tensor:
        return self._halves[1] if self._parametrisation.is_logvar else self._spread[1]

    @functools.cached_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self._spread[0]

    @functools.cached_property
    def var(self) -> Tensor:
        if self.deterministic:
            return self.std
        return self.logvar.exp() if self._parametrisation.is_logvar else self.std.square()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """μ + σ·ε, in the shape of one half."""
        return self.mean if self.deterministic else self.mean + self.std * self._noise(generator)

    def sample_and_kl(self, generator: torch.Generator | None = None, *, kl_dims: checks.Dims = "all") -> tuple[Tensor, Tensor]:
        """`sample(generator)` and `kl()` in one pass, with one array for the gradient.

        A GPU draws ε inside its kernel, other numbers than those of `sample`, unless `generator` is on the CPU.
        """
        if self.deterministic:
            return self.mean, self.kl()
        on_cpu = generator is not None and generator.device.type == "cpu"
        eps = self._noise(generator) if on_cpu else None
        return self._posterior(None, kl_dims).sample_and_kl(eps, None if on_cpu else generator)

    def mode(self) -> Tensor:
        """μ."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None, *, kl_dims: checks.Dims = "all") -> Tensor:
        """KL(self ‖ other), or KL(self ‖ N(0, I)) if other is None, in nats, summed over `kl_dims` as in `fastvae.reparameterize_kl`."""
        if self.deterministic:
            return self.parameters.new_zeros(1, dtype=torch.float32)
        if other is None:
            return self._posterior(None, kl_dims).kl()
        if not isinstance(other, DiagonalGaussianDistribution):
            raise TypeError(f"other must be a DiagonalGaussianDistribution, got {type(other).__name__}")
        if (other._parametrisation, other._dim, other.deterministic) == (self._parametrisation, self._dim, False):
            return self._posterior(other.parameters, kl_dims).kl()
        return gaussian_kl(self.mean, self.std, other.mean, other.std, scale="std", kl_dims=kl_dims)

    def nll(self, sample: Tensor, dims: checks.Dims = "all") -> Tensor:
        """−log N(sample; μ, σ²) in nats, summed over `dims`, of a sample in the shape of one half."""
        if self.deterministic:
            return self.parameters.new_zeros(1, dtype=torch.float32)
        checks.floating_tensor("sample", sample)
        if sample.shape != self.mean.shape:
            raise ValueError(f"sample must have the shape of the mean, {tuple(self.mean.shape)}, got {tuple(sample.shape)}")
        over = checks.dims("dims", dims, self.mean.ndim)
        dtype = accumulation_dtype(self.mean.dtype)
        squares = (sample.to(dtype) - self.mean.to(dtype)).square()
        nll = 0.5 * (math.log(2 * math.pi) + self.logvar + squares / self.var.to(dtype))
        return nll.sum(over) if over else nll

    def _posterior(self, prior: Tensor | None, kl_dims: checks.Dims) -> Posterior:
        return Posterior.of(self.parameters, None, prior, self._dim, kl_dims, self._parametrisation, None)

    def _noise(self, generator: torch.Generator | None) -> Tensor:
        """ε, drawn where the generator is."""
        device = self.parameters.device if generator is None else generator.device
        return torch.randn(self.mean.shape, dtype=self.parameters.dtype, device=device, generator=generator).to(self.parameters.device)


# For torch.distributions.kl_divergence.
register_kl(DiagonalGaussianDistribution, DiagonalGaussianDistribution)(lambda p, q: p.kl(q))  # type: ignore[no-untyped-call]
