"""Training objectives of variational autoencoders, and the likelihoods that they are made of.

The loss is the mean over the batch of

    −log p(x|z) + kl_weight·KL(q(z|x) ‖ N(0, I))   +   mmd_weight·MMD²(q(z), N(0, I))                                   (1)

Source: Zhao, Song and Ermon 2019, "InfoVAE: balancing learning and inference in variational autoencoders", with the MMD as divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae import checks
from fastvae.functional import mmd_to_normal


class Likelihood(nn.Module):
    """p(x|z) over the features of a sample, given what the decoder returns. Subclass it for a likelihood of your own."""

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over the features of each sample, shape (N,)."""
        raise NotImplementedError

    def mean(self, reconstruction: Tensor) -> Tensor:
        """E[x|z], in the units of the data and the shape of `reconstruction`."""
        raise NotImplementedError


class Gaussian(Likelihood):
    """N(reconstruction, sigma²·I): log p = −‖x−x̂‖²/(2·sigma²) − D·log(sigma) − ½·D·log(2π).

    Args:
        sigma: the noise's standard deviation in the units of the data, > 0.
        learned: train one sigma for all features, starting from `sigma`.
    """

    def __init__(self, sigma: float = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        log_sigma = math.log(checks.real("sigma", sigma, above=0))
        self.log_sigma: Tensor | float = nn.Parameter(torch.tensor(log_sigma)) if learned else log_sigma

    @property
    def sigma(self) -> float:
        return math.exp(self.log_sigma.item() if isinstance(self.log_sigma, Tensor) else self.log_sigma)

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        reconstruction, x = _flat(reconstruction, x)
        precision = (-2 * self.log_sigma).exp() if isinstance(self.log_sigma, Tensor) else math.exp(-2 * self.log_sigma)
        return -0.5 * (x - reconstruction).square().sum(1) * precision - x.shape[1] * (self.log_sigma + 0.5 * math.log(2 * math.pi))

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, learned={isinstance(self.log_sigma, Tensor)}"


class Bernoulli(Likelihood):
    """Independent Bernoulli features whose logits are the reconstruction: log p = −binary cross-entropy, for x in [0, 1], greys allowed."""

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        reconstruction, x = _flat(reconstruction, x)
        return -F.binary_cross_entropy_with_logits(reconstruction, x, reduction="none").sum(1)

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction.sigmoid()


def _flat(reconstruction: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if reconstruction.shape[:1] != x.shape[:1] or reconstruction.numel() != x.numel():
        raise ValueError(f"x must have the features of the reconstruction, got shapes {tuple(x.shape)} and {tuple(reconstruction.shape)}")
    # A sum over the features of an image is past what float16 and bfloat16 hold.
    dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, x.dtype), torch.float32)
    return reconstruction.flatten(1).to(dtype), x.flatten(1).to(dtype)


class VAEOutput(NamedTuple):
    """What a VAE returns for N samples and D latent dimensions, and all that an objective reads.

    `reconstruction` (N, …) holds the likelihood's parameters as the decoder returns them: means for `Gaussian`, logits for `Bernoulli`.
    `z` and `mu` have shape (N, D). A deterministic posterior has z = mu and neither `logvar` (N, D) nor `kl` (N,).
    """

    reconstruction: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor | None
    kl: Tensor | None
    likelihood: Likelihood


class ObjectiveTerms(NamedTuple):
    """Batch means, scalars in nats (`mmd` is MMD², without unit). A term outside the loss is detached, or None if it was not computed."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor | None
    mmd: Tensor | None


class VAEObjective(nn.Module):
    """Equation (1) of this module: `objective(model(x), x).loss.backward()`.

    The prior's part of the MMD is in closed form, so no prior sample is drawn.

    Args:
        kl_weight: ≥ 0.
        mmd_weight: ≥ 0. MMD² is at most 2 while the other terms are sums over features: weights of 10 (tens of features) to 1000
            (images) are usual.
        bandwidth: the RBF kernel's h, or several. None takes √D: two independent codes from the prior lie at ‖z−z'‖² = 2D on
            average, where exp(−d²/(2h²)) = 1/e and the kernel tells distances apart at any D.
        estimator: "unbiased" or "biased". The biased one counts each code's kernel with itself, which a large weight and a small batch turn
            into a pull of every code to the origin.

    Raises:
        ValueError: a negative weight (training would maximise that divergence), a bandwidth that is not positive, an unknown estimator.
    """

    def __init__(
        self,
        *,
        kl_weight: float = 1.0,
        mmd_weight: float = 0.0,
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: str = "unbiased",
    ) -> None:
        super().__init__()
        self.kl_weight = checks.real("kl_weight", kl_weight, at_least=0)
        self.mmd_weight = checks.real("mmd_weight", mmd_weight, at_least=0)
        checks.option("estimator", estimator, checks.ESTIMATORS)
        if bandwidth is not None:
            checks.bandwidths(bandwidth, None, None)
        self.bandwidth = bandwidth
        self.estimator = estimator

    @classmethod
    def vae(cls) -> VAEObjective:
        """The negative ELBO. Source: Kingma and Welling 2014."""
        return cls()

    @classmethod
    def beta_vae(cls, beta: float) -> VAEObjective:
        """The negative ELBO with `beta` times the KL. Source: Higgins et al. 2017."""
        return cls(kl_weight=checks.real("beta", beta, at_least=0))

    @classmethod
    def info_vae(
        cls,
        alpha: float,
        lambda_: float,
        *,
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: str = "unbiased",
    ) -> VAEObjective:
        """InfoVAE: kl_weight 1−alpha and mmd_weight alpha+lambda_−1, both ≥ 0. Source: Zhao, Song and Ermon 2019."""
        # Rounded, as −1.8 + 2.8 − 1 is not quite zero.
        kl_weight = round(1 - checks.real("alpha", alpha), 12)
        mmd_weight = round(alpha + checks.real("lambda_", lambda_) - 1, 12)
        if kl_weight < 0:
            raise ValueError(
                f"alpha must be at most 1, as the KL's weight 1 - alpha would be negative and training maximise it, got {alpha:g}"
            )
        if mmd_weight < 0:
            raise ValueError(
                "alpha + lambda_ - 1 must be at least 0, as a negative weight makes training maximise the MMD, "
                f"got {mmd_weight:g} from alpha={alpha:g} and lambda_={lambda_:g}"
            )
        return cls(kl_weight=kl_weight, mmd_weight=mmd_weight, bandwidth=bandwidth, estimator=estimator)

    @classmethod
    def mmd_vae(
        cls, lambda_: float, *, bandwidth: float | Sequence[float] | Tensor | None = None, estimator: str = "unbiased"
    ) -> VAEObjective:
        """InfoVAE with alpha = 1: no KL, `lambda_` times the MMD²."""
        return cls.info_vae(1.0, lambda_, bandwidth=bandwidth, estimator=estimator)

    @classmethod
    def wae_mmd(
        cls, lambda_: float, *, bandwidth: float | Sequence[float] | Tensor | None = None, estimator: str = "unbiased"
    ) -> VAEObjective:
        """The Wasserstein autoencoder's loss, for posterior="deterministic". Source: Tolstikhin et al. 2018, with an RBF kernel."""
        return cls(kl_weight=0.0, mmd_weight=checks.real("lambda_", lambda_, at_least=0), bandwidth=bandwidth, estimator=estimator)

    def forward(self, output: VAEOutput, x: Tensor, *, all_terms: bool = False) -> ObjectiveTerms:
        """The loss of N samples and its terms.

        Args:
            output: what the VAE returned.
            x: the targets, shape (N, …) with as many features as the reconstruction.
            all_terms: compute an MMD of weight zero too, for logging.

        Raises:
            ValueError: a KL weight on a deterministic posterior; N = 1 with the unbiased estimator.
        """
        reconstruction = -output.likelihood.log_prob(output.reconstruction, x).mean()
        loss, kl, mmd = reconstruction, None, None
        if output.kl is not None:
            kl = output.kl.mean()
        if self.kl_weight:
            if kl is None:
                raise ValueError(f"kl_weight must be 0 for a deterministic posterior, which has no KL, got {self.kl_weight:g}")
            loss = loss + self.kl_weight * kl
        elif kl is not None:
            kl = kl.detach()
        if self.mmd_weight:
            mmd = self._mmd(output.z)
            loss = loss + self.mmd_weight * mmd
        elif all_terms and (len(output.z) > 1 or self.estimator == "biased"):
            mmd = self._mmd(output.z.detach())
        return ObjectiveTerms(loss, reconstruction, kl, mmd)

    def _mmd(self, z: Tensor) -> Tensor:
        bandwidth = math.sqrt(z.shape[1]) if self.bandwidth is None else self.bandwidth
        return mmd_to_normal(z, bandwidth=bandwidth, estimator=self.estimator)

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight:g}, mmd_weight={self.mmd_weight:g}, bandwidth={self.bandwidth}, estimator={self.estimator!r}"
