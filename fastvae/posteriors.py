"""Gaussian posteriors as objects, with the methods of diffusers' class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from fastvae import checks
from fastvae.dispatch import accumulation_dtype
from fastvae.functional import Posterior, gaussian_kl
from fastvae.parametrisation import ScaleKind

LOGVAR_BOUNDS = (-30.0, 20.0)
Generators = torch.Generator | Sequence[torch.Generator] | None


class DiagonalGaussianDistribution:
    """N(μ, σ²) with a diagonal covariance, from an encoder's result that holds μ and log σ² one after the other along a dimension.

    It has the attributes and methods of the class of this name in diffusers and in latent diffusion, and gives the same numbers and
    gradients. In half precision `kl` and `nll` are float32, as their sums may overflow. Attributes are computed when they are read.
    `sample_and_kl` is faster than `sample` and `kl`.

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
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic must be a bool, got {type(deterministic).__name__}: parameters hold both halves")
        # An array is not compared: the checks say what is wrong with it.
        if isinstance(logvar_bounds, tuple) and logvar_bounds == LOGVAR_BOUNDS:
            plain = isinstance(scale, str) and scale == "logvar" and soft_clamp is None
            logvar_bounds = LOGVAR_BOUNDS if plain else None
        self._parametrisation = checks.parametrisation(scale, scale_offset, logvar_bounds, soft_clamp)
        self.parameters = parameters
        self.deterministic = deterministic
        self._dim = dim % parameters.ndim

    def _halves(self) -> tuple[Tensor, Tensor]:
        """μ and s within their bounds."""
        mu, s = self.parameters.chunk(2, self._dim)
        return self._parametrisation.bounded(mu, s)

    @property
    def mean(self) -> Tensor:
        return self._halves()[0]

    @property
    def logvar(self) -> Tensor:
        s = self._halves()[1]
        return s if self._parametrisation.is_logvar else self._parametrisation.spread(s)[1]

    @property
    def std(self) -> Tensor:
        s = self._halves()[1]
        return torch.zeros_like(s) if self.deterministic else self._parametrisation.spread(s)[0]

    @property
    def var(self) -> Tensor:
        return self.std.square() if self.deterministic or not self._parametrisation.is_logvar else self.logvar.exp()

    def sample(self, generator: Generators = None) -> Tensor:
        """μ + σ·ε, in the shape of one half. With a list of generators, one for each item of the first dimension."""
        return self.mean.clone() if self.deterministic else self.mean + self.std * self._noise(generator)

    def sample_and_kl(self, generator: Generators = None, *, kl_dims: checks.Dims = "all") -> tuple[Tensor, Tensor]:
        """`sample(generator)` and `kl()` in one pass, with one array for the gradient.

        A GPU draws ε inside its kernel, other numbers than those of `sample`, unless the generator is on the CPU.
        """
        if self.deterministic:
            return self.mean.clone(), self.kl()
        posterior = Posterior.of(self.parameters, None, None, self._dim, kl_dims, self._parametrisation, None)
        if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type == "cpu"):
            return posterior.sample_and_kl(self._noise(generator), None)
        return posterior.sample_and_kl(None, generator)

    def mode(self) -> Tensor:
        """μ."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None, *, kl_dims: checks.Dims = "all") -> Tensor:
        """KL(self ‖ other), or KL(self ‖ N(0, I)) if other is None, in nats, summed over `kl_dims` as in `fastvae.reparameterize_kl`."""
        if self.deterministic:
            return self.parameters.new_zeros(1, dtype=torch.float32)
        parameters, prior = self.parameters, None
        if other is not None:
            if not isinstance(other, DiagonalGaussianDistribution):
                kind = f"{type(other).__module__}.{type(other).__name__}"
                raise TypeError(f"other must be a fastvae.DiagonalGaussianDistribution, got {kind}")
            form = self._parametrisation, self._dim, self.parameters.ndim, False
            if (other._parametrisation, other._dim, other.parameters.ndim, other.deterministic) != form:
                return gaussian_kl(self.mean, self.std, other.mean, other.std, scale="std", kl_dims=kl_dims)
            parameters, prior = checks.broadcast("parameters of self", parameters, "those of other", other.parameters)
        return Posterior.of(parameters, None, prior, self._dim, kl_dims, self._parametrisation, None).kl()

    def nll(self, sample: Tensor, dims: checks.Dims = "all") -> Tensor:
        """−log N(sample; μ, σ²) in nats, summed over `dims`, of a sample in the shape of one half."""
        if self.deterministic:
            return self.parameters.new_zeros(1, dtype=torch.float32)
        checks.floating_tensor("sample", sample)
        dtype = accumulation_dtype(self.parameters.dtype)
        mean, s = self._parametrisation.bounded(*self.parameters.to(dtype).chunk(2, self._dim))
        std, logvar = self._parametrisation.spread(s)
        if sample.ndim != mean.ndim:
            raise ValueError(f"sample must have as many dimensions as the mean, {mean.ndim}, got {sample.ndim}")
        checks.broadcast("sample", sample, "the mean", mean)
        over = checks.dims("dims", dims, mean.ndim)
        # A sample equal to the mean has a density also where σ underflows.
        distance = (sample.to(dtype) - mean) / std.clamp(min=torch.finfo(dtype).tiny)
        nll = 0.5 * (math.log(2 * math.pi) + logvar + distance.square())
        return nll.sum(over) if over else nll

    def _noise(self, generator: Generators) -> Tensor:
        """ε, drawn where the generator is."""
        shape = torch.Size(size // 2 if dim == self._dim else size for dim, size in enumerate(self.parameters.shape))
        if isinstance(generator, Sequence) and len(generator) == 1:
            generator = generator[0]
        for own in generator if isinstance(generator, Sequence) else [generator]:
            if own is not None and not isinstance(own, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, got {type(own).__name__}")
        if isinstance(generator, Sequence) and len(generator) != shape[0]:
            raise ValueError(f"generator must be one for each of {shape[0]} items, got {len(generator)}")
        each: Any = [(generator, shape)] if not isinstance(generator, Sequence) else [(own, (1, *shape[1:])) for own in generator]
        dtype, device = self.parameters.dtype, self.parameters.device
        draws = [torch.randn(size, dtype=dtype, device=device if own is None else own.device, generator=own) for own, size in each]
        return (draws[0] if len(draws) == 1 else torch.cat(draws)).to(device)


# For torch.distributions.kl_divergence.
register_kl(DiagonalGaussianDistribution, DiagonalGaussianDistribution)(lambda p, q: p.kl(q))  # type: ignore[no-untyped-call]
