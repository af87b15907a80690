"""Training objectives of variational autoencoders and their likelihoods."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae import checks
from fastvae.distributed import GroupModule, gather, global_mean
from fastvae.functional import gaussian_kl, mmd, mmd_to_normal, total_correlation
from fastvae.ops.common import without_autocast
from fastvae.preparation import Standardise
from fastvae.radial import Kernel
from fastvae.reference.total_correlation import precision_root

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DipKind = Literal["i", "ii"]
MMDRows = Literal["sample", "location"]
BoundGradient = Literal["reparameterised", "doubly"]
# The authors' scales s of C = 2·D·s in the WAE's inverse multiquadric kernels.
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Likelihood(nn.Module):
    """p(x|z) over the features of a sample, given the decoder's result. Subclass it for a custom likelihood."""

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over the features of each sample, shape (N,)."""
        raise NotImplementedError

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """The mean of `log_prob` over the samples, for likelihoods with a faster way to compute it."""
        return self.log_prob(reconstruction, x).mean(0)

    def mean(self, reconstruction: Tensor) -> Tensor:
        """E[x|z], in the units of the data and the shape of `reconstruction`."""
        raise NotImplementedError


class Gaussian(Likelihood):
    """N(reconstruction, sigma²·I): log p = −‖x−x̂‖²/(2·sigma²) − D·log(sigma) − ½·D·log(2π).

    Args:
        sigma: The standard deviation of the noise in the units of the data, > 0.
        learned: Train one sigma for all features. It starts from `sigma` and stays at or above `least_sigma`.
        optimal: Use the sigma that maximises the likelihood of each training batch: sigma² is the mean of (x−x̂)² over its samples and
            features, but at least `least_sigma`². Sigma is constant in the gradient of x̂, as the likelihood is flat in sigma at its
            maximum. Evaluation uses a running mean of sigma² over the training batches with momentum 0.1, which starts from `sigma`².
        least_sigma: A lower bound of the learned or optimal sigma, so that a perfect reconstruction has a finite likelihood.

    Raises:
        ValueError: A sigma that is not positive, one that is both learned and optimal, or a learned one that starts below `least_sigma`.

    Source of the optimal sigma: Rybkin, Daniilidis and Levine 2021, "Simple and effective VAE training with calibrated decoders".
    """

    def __init__(self, sigma: float = 1.0, *, learned: bool = False, optimal: bool = False, least_sigma: float = math.exp(-6)) -> None:
        super().__init__()
        checks.flag("learned", learned)
        checks.flag("optimal", optimal)
        if learned and optimal:
            raise ValueError("optimal must be False if learned is True, got True: choose one")
        log_sigma = math.log(checks.real("sigma", sigma, above=0))
        self.least_variance = checks.real("least_sigma", least_sigma, above=0) ** 2
        if learned and sigma < least_sigma:
            raise ValueError(f"sigma must be at least least_sigma, {least_sigma:g}, if it is learned, got {sigma:g}: pass least_sigma")
        self.optimal = optimal
        self.log_sigma: Tensor | float = nn.Parameter(torch.tensor(log_sigma)) if learned else log_sigma
        if optimal:
            self.register_buffer("running_variance", torch.tensor(math.exp(2 * log_sigma)))
            self.running_variance: Tensor

    @property
    def sigma(self) -> float:
        if self.optimal:
            return math.sqrt(max(self.running_variance.item(), self.least_variance))
        if isinstance(self.log_sigma, Tensor):
            return math.exp(max(self.log_sigma.item(), 0.5 * math.log(self.least_variance)))
        return math.exp(self.log_sigma)

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        reconstruction, x = _flat(reconstruction, x)
        squares = (x - reconstruction).square()
        return self._from_squares(squares.sum(1), squares, x.shape[1])

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if getattr(self.log_prob, "__func__", None) is not Gaussian.log_prob:
            return super().mean_log_prob(reconstruction, x)
        reconstruction, x = _flat(reconstruction, x)
        mean = F.mse_loss(reconstruction, x)
        return self._from_squares(mean * x.shape[1], mean, x.shape[1])

    def _from_squares(self, sums: Tensor, squares: Tensor, features: int) -> Tensor:
        """log p from the sums of (x−x̂)² over the features, and from numbers whose mean is the variance."""
        log_sigma = self._optimal_log_sigma(squares) if self.optimal else self._bounded_log_sigma()
        precision = (-2 * log_sigma).exp() if isinstance(log_sigma, Tensor) else math.exp(-2 * log_sigma)
        return -0.5 * sums * precision - features * (log_sigma + 0.5 * math.log(2 * math.pi))

    def _bounded_log_sigma(self) -> Tensor | float:
        if not isinstance(self.log_sigma, Tensor):
            return self.log_sigma
        least = 0.5 * math.log(self.least_variance)
        if self.training and not torch._C._are_functorch_transforms_active():
            # Below the bound there is no gradient, so the parameter could not come back. Written through `data`, as an in-place change
            # would break the backward pass of a loss that was computed before.
            self.log_sigma.data.clamp_(min=least)
        return self.log_sigma.clamp_min(least)

    def _optimal_log_sigma(self, squares: Tensor) -> Tensor:
        if self.training:
            variance = squares.detach().mean()
            # A single batch that is not finite would spoil the running mean for good.
            update = torch.where(variance.isfinite(), variance.to(self.running_variance.dtype), self.running_variance)
            self.running_variance.lerp_(update, 0.1)
        else:
            variance = self.running_variance
        return 0.5 * variance.clamp_min(self.least_variance).log()

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, learned={isinstance(self.log_sigma, Tensor)}, optimal={self.optimal}"


class Laplace(Likelihood):
    """Independent Laplace noise, the L1 loss: log p = −Σ|x−x̂|/scale − D·log(2·scale). The reconstruction is its median and mean.

    Args:
        scale: The mean size |x−x̂| of the noise in the units of the data, > 0.

    Raises:
        ValueError: A scale that is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = checks.real("scale", scale, above=0)

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        reconstruction, x = _flat(reconstruction, x)
        return -(x - reconstruction).abs().sum(1) / self.scale - x.shape[1] * math.log(2 * self.scale)

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if getattr(self.log_prob, "__func__", None) is not Laplace.log_prob:
            return super().mean_log_prob(reconstruction, x)
        reconstruction, x = _flat(reconstruction, x)
        return -x.shape[1] * (F.l1_loss(reconstruction, x) / self.scale + math.log(2 * self.scale))

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class Bernoulli(Likelihood):
    """Independent Bernoulli features. The reconstruction holds their logits: log p = −binary cross-entropy, for any x in [0, 1].

    Raises:
        ValueError: Values outside [0, 1] in the first x that can be read without waiting for a GPU or breaking a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checked = False

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        self._check(x)
        reconstruction, x = _flat(reconstruction, x)
        return -F.binary_cross_entropy_with_logits(reconstruction, x, reduction="none").sum(1)

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if getattr(self.log_prob, "__func__", None) is not Bernoulli.log_prob:
            return super().mean_log_prob(reconstruction, x)
        self._check(x)
        reconstruction, x = _flat(reconstruction, x)
        return F.binary_cross_entropy_with_logits(reconstruction, x, reduction="sum") / -len(x)

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction.sigmoid()

    def _check(self, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and not self._checked:
            self._checked = checks.unit_interval("x", x, "pass pixels / 255, or use a Gaussian likelihood")


def _flat(reconstruction: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if reconstruction.shape[:1] != x.shape[:1] or reconstruction.numel() != x.numel():
        raise ValueError(f"x must have as many features as the reconstruction, got {tuple(x.shape)} and {tuple(reconstruction.shape)}")
    # In float32 at least: half precision is too coarse for a sum over the features of an image.
    dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, x.dtype), torch.float32)
    return reconstruction.flatten(1).to(dtype), x.flatten(1).to(dtype)


class VAEOutput(NamedTuple):
    """The result of a VAE for N samples and D latent dimensions: everything that an objective needs but x.

    With K codes for each x, `z`, `eps` and `reconstruction` have N·K rows, those of one x next to each other. Where (N, D) stands below,
    latents with channels, height and width have (N, C, H, W).

    Attributes:
        reconstruction: (N, …), the likelihood's parameters as the decoder returns them: means for `Gaussian`, logits for `Bernoulli`.
        z: (N, D), the codes; equal to mu for a deterministic posterior.
        mu: (N, D), the posterior's means.
        logvar: (N, D), its log-variances; None for a deterministic posterior.
        kl: (N,), KL(q(z|x) ‖ N(0, I)) in nats, the sum over all latent dimensions; None for a deterministic posterior.
        likelihood: p(x|z).
        preparation: The transform that the objective applies to x, if any.
        eps: (N, D), the noise of z = mu + exp(½·logvar)·eps, or None. Recovering it from z loses digits for a narrow posterior.
    """

    reconstruction: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor | None
    kl: Tensor | None
    likelihood: Likelihood
    preparation: Standardise | None = None
    eps: Tensor | None = None


class ObjectiveTerms(NamedTuple):
    """The loss and its terms, batch means, scalars. A term that is not in the loss is detached, or None if it was not computed.

    Attributes:
        loss: The loss, in nats.
        reconstruction: −log p(x|z), in nats.
        kl: The KL divergence in nats, also where a capacity or free bits replace it in the loss.
        mmd: MMD², without a unit.
        total_correlation: The total correlation, in nats.
        dip: The DIP penalty, weighted.
        summands: The weighted terms of the loss by name; the loss is their sum.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor | None
    mmd: Tensor | None
    total_correlation: Tensor | None = None
    dip: Tensor | None = None
    summands: dict[str, Tensor] = {}  # noqa: RUF012


class VAEObjective(GroupModule):
    """The loss of a VAE: `objective(model(x), x).loss.backward()`.

        mean over the batch of −log p(x|z) + kl_weight·KL(q(z|x) ‖ N(0, I)) + mmd_weight·MMD²(q(z), N(0, I)) + tc_weight·TC + DIP

    With an RBF kernel the MMD uses the closed form for the prior. Other kernels draw a sample of the prior, as large as the batch. TC is
    the total correlation of q(z), estimated from the batch. The KL contains it once, so that β-TC-VAE has tc_weight = β − 1. Latents may
    have channels, height and width, (N, C, H, W): the terms take them as D = C·H·W latent dimensions, but see `mmd_rows`.

    Args:
        kl_weight: The weight of the KL, ≥ 0.
        mmd_weight: The weight of the MMD², ≥ 0. MMD² is at most 2, while the other terms are sums over features: weights from 10 (tens of
            features) to 1000 (images) are usual.
        kernel: The kernel of the MMD, as in `fastvae.mmd`.
        mmd_rows: The rows of the MMD for latents (N, C, H, W). "sample": a row for each sample, (N, C·H·W). "location": a row for each
            location, (N·H·W, C), which brings the codes at all locations together to the prior. Codes (N, D) have one location.
        bandwidth: The kernel's h, or several. None gives √D, where D is the width of a row: two independent rows from the prior have
            ‖z−z'‖² = 2D on average, where exp(−d²/(2h²)) = 1/e, at any D. For "imq", None gives √(2·D·s) for the seven scales s from 0.1 to
            10 of Tolstikhin et al. 2018.
        estimator: "unbiased" or "biased". The biased estimator includes the kernel of each code with itself; with a large weight and a
            small batch this pulls all codes towards the origin.
        capacity: C in nats, ≥ 0; |KL − C| of each sample then replaces the KL. None: no capacity.
        free_bits: λ in nats, ≥ 0; max(λ, mean KL over the batch) of each group of latent dimensions then replaces the KL. 0: no free bits.
        free_bits_group: The number of neighbouring latent dimensions in a group. 1 is a floor for each dimension, D one for their sum,
            and H·W one for each channel of latents (N, C, H, W).
        tc_weight: The weight of the total correlation, ≥ 0.
        dataset_size: The number of samples in the training set, for the total correlation.
        tc_estimator: "minibatch_weighted" or "minibatch_stratified", as in `fastvae.total_correlation`.
        dip: (lambda_od, lambda_d, kind) of DIP = lambda_od·Σ_{i≠j} S_ij² + lambda_d·Σ_i (S_ii − 1)², both weights ≥ 0. S is the covariance
            of mu over the batch for kind "i"; for "ii" the mean of diag(exp(logvar)) is added.

    Attributes:
        process_group: A group of `torch.distributed`, None by default. If set, every term is that of the batches of all ranks together, the
            same on each rank. With data parallelism the model then trains as in one process with the whole batch. Batches may differ in
            size. `VAEModule` sets it in a run with several processes.

    Raises:
        ValueError: A negative weight (training would maximise that divergence), a bandwidth that is not positive, an unknown option, or a
            capacity together with free bits.

    Sources: Zhao, Song and Ermon 2019, "InfoVAE: balancing learning and inference in variational autoencoders", with the MMD as divergence;
    stable-audio-tools, Stability AI, for the MMD of locations;
    Burgess et al. 2018, "Understanding disentangling in β-VAE", for the capacity; Kingma et al. 2016, "Improved variational inference with
    inverse autoregressive flow", appendix C.8, for free bits; Kumar, Sattigeri and Balakrishnan 2018, "Variational inference of
    disentangled latent concepts from unlabeled observations", for DIP.
    """

    samples = 1

    def __init__(
        self,
        *,
        kl_weight: float = 1.0,
        mmd_weight: float = 0.0,
        kernel: checks.KernelName | Kernel = "rbf",
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: checks.Estimator = "unbiased",
        mmd_rows: MMDRows = "sample",
        capacity: float | None = None,
        free_bits: float = 0.0,
        free_bits_group: int = 1,
        tc_weight: float = 0.0,
        dataset_size: int | None = None,
        tc_estimator: checks.DensityEstimator = "minibatch_weighted",
        dip: tuple[float, float, DipKind] = (0.0, 0.0, "i"),
    ) -> None:
        super().__init__()
        self.kl_weight: float | Tensor = checks.real("kl_weight", kl_weight, at_least=0)
        self.mmd_weight: float | Tensor = checks.real("mmd_weight", mmd_weight, at_least=0)
        checks.option("estimator", estimator, checks.ESTIMATORS)
        if bandwidth is not None:
            checks.bandwidths(bandwidth, None, None)
        self.kernel = checks.kernel(kernel)
        self.bandwidth = bandwidth
        self.estimator = estimator
        checks.option("mmd_rows", mmd_rows, get_args(MMDRows))
        self.mmd_rows = mmd_rows
        self.capacity: float | Tensor | None = None if capacity is None else checks.real("capacity", capacity, at_least=0)
        self.free_bits = checks.real("free_bits", free_bits, at_least=0)
        self.free_bits_group = checks.integer("free_bits_group", free_bits_group, at_least=1)
        if capacity is not None and free_bits:
            raise ValueError(f"capacity must be None if free_bits are given, as each replaces the KL, got {capacity:g}")
        self.tc_weight: float | Tensor = checks.real("tc_weight", tc_weight, at_least=0)
        if tc_weight and dataset_size is None:
            raise ValueError("dataset_size must be given for the total correlation, got None")
        self.dataset_size = None if dataset_size is None else checks.integer("dataset_size", dataset_size, at_least=1)
        checks.option("tc_estimator", tc_estimator, checks.DENSITY_ESTIMATORS)
        self.tc_estimator = tc_estimator
        if not isinstance(dip, Sequence) or len(dip) != 3:
            raise ValueError(f"dip must be (lambda_od, lambda_d, kind), got {checks.received(dip)}")
        lambda_od, lambda_d, self.dip_kind = dip
        self.dip_weights = checks.real("lambda_od of dip", lambda_od, at_least=0), checks.real("lambda_d of dip", lambda_d, at_least=0)
        checks.option("the kind of dip", self.dip_kind, get_args(DipKind))
        self.process_group: ProcessGroup | None = None

    def set(
        self,
        *,
        kl_weight: float | None = None,
        mmd_weight: float | None = None,
        tc_weight: float | None = None,
        capacity: float | None = None,
    ) -> None:
        """Sets weights or the capacity between two steps, as a schedule does. Each is ≥ 0; None leaves it as it is.

        The first call turns the number into a tensor, which later calls fill, so that a compiled step is not compiled again and a captured
        one sees the new number. From then on its term is computed at a weight of 0 too. The tensor moves with `objective.to(device)`.
        """
        for name, value in {"kl_weight": kl_weight, "mmd_weight": mmd_weight, "tc_weight": tc_weight, "capacity": capacity}.items():
            if value is None:
                continue
            value = checks.real(name, value, at_least=0)
            current = getattr(self, name)
            if current is None:
                raise ValueError(f"{name} must be given to the constructor before it can be set, got None")
            if isinstance(current, Tensor):
                current.fill_(value)
            else:
                delattr(self, name)
                self.register_buffer(name, torch.tensor(value), persistent=False)

    @classmethod
    def vae(cls, *, free_bits: float = 0.0, free_bits_group: int = 1) -> VAEObjective:
        """The negative ELBO. Source: Kingma and Welling 2014."""
        return cls(free_bits=free_bits, free_bits_group=free_bits_group)

    @classmethod
    def beta_vae(cls, beta: float, *, free_bits: float = 0.0, free_bits_group: int = 1) -> VAEObjective:
        """The negative ELBO with `beta` times the KL. Source: Higgins et al. 2017."""
        return cls(kl_weight=checks.real("beta", beta, at_least=0), free_bits=free_bits, free_bits_group=free_bits_group)

    @classmethod
    def info_vae(
        cls,
        alpha: float,
        lambda_: float,
        *,
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: checks.Estimator = "unbiased",
        mmd_rows: MMDRows = "sample",
    ) -> VAEObjective:
        """InfoVAE: kl_weight 1−alpha and mmd_weight alpha+lambda_−1, both ≥ 0. Source: Zhao, Song and Ermon 2019."""
        # Rounded, as −1.8 + 2.8 − 1 is not exactly zero.
        kl_weight = round(1 - checks.real("alpha", alpha), 12)
        mmd_weight = round(alpha + checks.real("lambda_", lambda_) - 1, 12)
        if kl_weight < 0:
            raise ValueError(f"alpha must be at most 1, as a negative weight 1 - alpha makes training maximise the KL, got {alpha:g}")
        if mmd_weight < 0:
            raise ValueError(
                "alpha + lambda_ - 1 must be at least 0, as a negative weight makes training maximise the MMD, "
                f"got {mmd_weight:g} from alpha={alpha:g} and lambda_={lambda_:g}"
            )
        return cls(kl_weight=kl_weight, mmd_weight=mmd_weight, bandwidth=bandwidth, estimator=estimator, mmd_rows=mmd_rows)

    @classmethod
    def mmd_vae(
        cls,
        lambda_: float,
        *,
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: checks.Estimator = "unbiased",
        mmd_rows: MMDRows = "sample",
    ) -> VAEObjective:
        """InfoVAE with alpha = 1: no KL, `lambda_` times the MMD²."""
        lambda_ = checks.real("lambda_", lambda_, at_least=0)
        return cls.info_vae(1.0, lambda_, bandwidth=bandwidth, estimator=estimator, mmd_rows=mmd_rows)

    @classmethod
    def wae_mmd(
        cls,
        lambda_: float,
        *,
        kernel: checks.KernelName | Kernel = "rbf",
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: checks.Estimator = "unbiased",
        mmd_rows: MMDRows = "sample",
    ) -> VAEObjective:
        """The Wasserstein autoencoder's loss, for posterior="deterministic". Source: Tolstikhin et al. 2018, with kernel="imq"."""
        lambda_ = checks.real("lambda_", lambda_, at_least=0)
        return cls(kl_weight=0.0, mmd_weight=lambda_, kernel=kernel, bandwidth=bandwidth, estimator=estimator, mmd_rows=mmd_rows)

    @classmethod
    def beta_tc_vae(cls, beta: float, dataset_size: int, *, estimator: checks.DensityEstimator = "minibatch_weighted") -> VAEObjective:
        """The negative ELBO with `beta` ≥ 1 times the total correlation within the KL. Source: Chen et al. 2018, with α = γ = 1."""
        tc_weight = checks.real("beta", beta, at_least=1) - 1
        checks.option("estimator", estimator, checks.DENSITY_ESTIMATORS)
        return cls(tc_weight=tc_weight, dataset_size=dataset_size, tc_estimator=estimator)

    @classmethod
    def capacity_vae(cls, gamma: float, capacity: float) -> VAEObjective:
        """`gamma` ≥ 0 times |KL − `capacity`| of each sample; a schedule raises the capacity. Source: Burgess et al. 2018."""
        return cls(kl_weight=checks.real("gamma", gamma, at_least=0), capacity=capacity)

    @classmethod
    def dip_vae(cls, lambda_od: float, lambda_d: float | None = None, *, kind: DipKind = "i") -> VAEObjective:
        """The negative ELBO plus DIP. `lambda_d` is 10·lambda_od (kind "i") or lambda_od ("ii") by default. Source: Kumar et al. 2018."""
        checks.option("kind", kind, get_args(DipKind))
        lambda_od = checks.real("lambda_od", lambda_od, at_least=0)
        lambda_d = (10 if kind == "i" else 1) * lambda_od if lambda_d is None else checks.real("lambda_d", lambda_d, at_least=0)
        return cls(dip=(lambda_od, lambda_d, kind))

    @classmethod
    def iwae(cls, samples: int, *, gradient: BoundGradient = "reparameterised") -> ImportanceWeighted:
        """The importance-weighted bound: `ImportanceWeighted(samples, gradient=gradient)`. Source: Burda et al. 2016."""
        return ImportanceWeighted(samples, gradient=gradient)

    def forward(self, output: VAEOutput, x: Tensor, *, all_terms: bool = False, prior: Tensor | None = None) -> ObjectiveTerms:
        """The loss of N samples and its terms.

        Args:
            output: The result of the VAE.
            x: The targets, (N, …), with as many features as the reconstruction, as given to the VAE.
            all_terms: Also compute an MMD of weight zero, for logging.
            prior: (M, D) or (M, C, H, W), draws from N(0, I) for kernels without a closed form; N new draws by default.

        Raises:
            ValueError: A KL weight with a deterministic posterior, or an MMD of one row with the unbiased estimator.
        """
        checks.flag("all_terms", all_terms)
        x = _prepared(output, x)
        if self.process_group is None and isinstance(output.likelihood, Likelihood):
            reconstruction = -output.likelihood.mean_log_prob(output.reconstruction, x)
        else:
            reconstruction = -self._mean(output.likelihood.log_prob(output.reconstruction, x))
        summands = {"reconstruction": reconstruction}
        kl = None if output.kl is None else self._mean(output.kl)
        distance = tc = dip = None
        if _is_nonzero(self.kl_weight):
            if output.kl is None or kl is None:
                checks.kl_of_deterministic(self.kl_weight)
            penalty = kl if self.capacity is None and not self.free_bits else self._kl_penalty(output, output.kl)
            summands["kl"] = _weighted(self.kl_weight, penalty)
        elif kl is not None:
            kl = kl.detach()
        if _is_nonzero(self.mmd_weight):
            distance = self._mmd(output.z, prior)
            summands["mmd"] = _weighted(self.mmd_weight, distance)
        elif all_terms and (len(output.z) > 1 or self.estimator == "biased"):
            distance = self._mmd(output.z.detach(), prior)
        if _is_nonzero(self.tc_weight):
            tc = self._total_correlation(output)
            summands["total_correlation"] = _weighted(self.tc_weight, tc)
        if any(self.dip_weights):
            dip = summands["dip"] = self._dip(output)
        loss = functools.reduce(torch.add, summands.values())
        return ObjectiveTerms(loss, reconstruction, kl, distance, tc, dip, summands)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the first dimension of x, the samples, of all processes."""
        return x.mean(0) if self.process_group is None else global_mean(x, self.process_group)

    def _all_rows(self, x: Tensor) -> Tensor:
        """The rows of all processes."""
        return x if self.process_group is None else gather("the codes", x, self.process_group)

    def _kl_penalty(self, output: VAEOutput, kl: Tensor) -> Tensor:
        if self.capacity is not None:
            return self._mean((kl - _weight(self.capacity, kl)).abs())
        assert output.logvar is not None
        mu, logvar = output.mu.flatten(1), output.logvar.flatten(1)
        d = mu.shape[1]
        if d % self.free_bits_group:
            raise ValueError(f"free_bits_group must divide the number of latent dimensions, {d}, got {self.free_bits_group}")
        per_dimension = gaussian_kl(mu, logvar, kl_dims=())
        return self._mean(per_dimension).reshape(-1, self.free_bits_group).sum(1).clamp_min(self.free_bits).sum()

    def _rows(self, z: Tensor) -> Tensor:
        """The rows of the MMD of codes (N, D) or (N, C, H, W)."""
        if z.ndim == 2:
            return z
        return z.flatten(1) if self.mmd_rows == "sample" else z.movedim(1, -1).flatten(0, -2)

    def _mmd(self, z: Tensor, prior: Tensor | None = None) -> Tensor:
        z = self._rows(z)
        if self.estimator == "unbiased" and len(z) == 1 and self.process_group is None:
            raise ValueError(
                "a batch must have at least two samples for the unbiased MMD, got one: pass drop_last=True to the DataLoader, or use "
                "estimator='biased'"
            )
        bandwidth = self.bandwidth
        if bandwidth is None:
            d = z.shape[1]
            bandwidth = [math.sqrt(2 * d * s) for s in IMQ_SCALES] if self.kernel.name == "imq" else math.sqrt(d)
        if self.kernel.name == "rbf":
            return mmd_to_normal(z, bandwidth=bandwidth, estimator=self.estimator, process_group=self.process_group)
        prior = torch.randn_like(z) if prior is None else self._rows(prior)
        group = self.process_group
        return mmd(z, prior, bandwidth=bandwidth, kernel=self.kernel, estimator=self.estimator, process_group=group)

    def _total_correlation(self, output: VAEOutput) -> Tensor:
        if output.logvar is None:
            raise ValueError("tc_weight must be 0 for a deterministic posterior, which has no density, got a weight")
        codes = [output.z.flatten(1), output.mu.flatten(1), output.logvar.flatten(1)]
        if self.process_group is not None:
            for name, t in (("mu", output.mu), ("logvar", output.logvar)):
                checks.same_shape_and_kind("z", output.z, name, t)
            # Gathered together, so that a compiler sees that they have equally many rows.
            codes = list(self._all_rows(torch.cat(codes, 1)).chunk(3, 1))
        # A batch for evaluation may be larger than the training set. As a sum, so that a compiler sees that size ≥ rows.
        rows = codes[0].shape[0]
        size = rows + torch.sym_max((self.dataset_size or 0) - rows, 0)  # type: ignore[no-untyped-call]
        return total_correlation(*codes, dataset_size=size, estimator=self.tc_estimator).total_correlation

    def _dip(self, output: VAEOutput) -> Tensor:
        # A covariance in bfloat16 would be too coarse.
        with without_autocast(output.mu.device):
            mu = self._all_rows(output.mu.flatten(1).to(torch.promote_types(output.mu.dtype, torch.float32)))
            centred = mu - mu.mean(0)
            covariance = centred.T @ centred / len(mu)
            if self.dip_kind == "ii":
                if output.logvar is None:
                    raise ValueError("the kind of dip must be 'i' for a deterministic posterior, which has no variance, got 'ii'")
                covariance = covariance + self._mean(output.logvar.flatten(1).to(mu.dtype).exp()).diag()
            diagonal = covariance.diagonal()
            lambda_od, lambda_d = self.dip_weights
            return lambda_od * (covariance - diagonal.diag()).square().sum() + lambda_d * (diagonal - 1).square().sum()

    def extra_repr(self) -> str:
        options = {
            "capacity": None if self.capacity is None else float(self.capacity),
            "free_bits": self.free_bits,
            "tc_weight": float(self.tc_weight),
            "kernel": None if self.kernel.name == "rbf" else self.kernel.name,
            "mmd_rows": None if self.mmd_rows == "sample" else repr(self.mmd_rows),
            "dip_weights": self.dip_weights if any(self.dip_weights) else None,
        }
        return (
            f"kl_weight={float(self.kl_weight):g}, mmd_weight={float(self.mmd_weight):g}, bandwidth={self.bandwidth}, "
            f"estimator={self.estimator!r}" + "".join(f", {name}={value}" for name, value in options.items() if value) + self._group()
        )


class ImportanceWeighted(VAEObjective):
    """The importance-weighted bound as a loss, −log 1/K·Σ_k p(x|z_k)·p(z_k)/q(z_k|x), for `output = model(x, samples=K)`.

    Args:
        samples: K ≥ 1, the number of codes of each sample. K = 1 is the ELBO with a sampled KL.
        gradient: The encoder's gradient. "reparameterised": its signal-to-noise ratio falls as 1/√K. "doubly": reparameterised a second
            time, Σ_k w̃_k²·∂log w_k/∂z_k·∂z_k/∂φ with normalised weights w̃; also unbiased, with a ratio that grows as √K. The decoder's
            gradient is the same for both.

    Sources: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders"; Tucker et al. 2019, "Doubly reparameterized gradient
    estimators for Monte Carlo objectives" (DReG).
    """

    def __init__(self, samples: int, *, gradient: BoundGradient = "reparameterised") -> None:
        super().__init__()
        self.samples = checks.integer("samples", samples, at_least=1)
        checks.option("gradient", gradient, get_args(BoundGradient))
        self.gradient = gradient

    def forward(self, output: VAEOutput, x: Tensor, *, all_terms: bool = False, prior: Tensor | None = None) -> ObjectiveTerms:
        """The negative bound of N samples as `loss`, and the terms of single codes, detached.

        Args:
            output: The result of the VAE, with `samples` codes for each x.
            x: As in `VAEObjective`.
            all_terms: Also compute the MMD, for logging.
            prior: Not used.

        Raises:
            ValueError: A deterministic posterior, or an output with another number of codes for each sample.
        """
        checks.flag("all_terms", all_terms)
        mu, logvar, z = output.mu, output.logvar, output.z
        if logvar is None or output.kl is None:
            raise ValueError("posterior must be 'gaussian' for the importance-weighted bound, got a deterministic one")
        if len(z) != len(mu) * self.samples:
            raise ValueError(f"output must hold samples={self.samples} codes for each x, got {len(z)} codes for {len(mu)} x")
        x = _prepared(output, x).repeat_interleave(self.samples, 0)
        log_likelihood = output.likelihood.log_prob(output.reconstruction, x)
        doubly = self.gradient == "doubly"
        dtype = torch.promote_types(z.dtype, torch.float32)
        mu, logvar = ((t.detach() if doubly else t).flatten(1).to(dtype) for t in (mu, logvar))
        codes = z.to(dtype).reshape(len(mu), self.samples, -1)
        if output.eps is None:
            eps = (codes - mu.unsqueeze(1)) * precision_root(logvar).unsqueeze(1)
        else:
            eps = output.eps.to(dtype).reshape(codes.shape)
            if doubly:
                # The value of eps, with the gradient of (z − μ)/σ with respect to z.
                eps = eps + (codes - codes.detach()) * precision_root(logvar).unsqueeze(1)
        log_w = log_importance_weights(log_likelihood.reshape(len(mu), -1), codes, logvar, eps)
        loss = math.log(self.samples) - self._mean(log_w.logsumexp(1))
        if doubly and z.requires_grad:
            share = log_w.detach().softmax(1).reshape(-1, *[1] * (z.ndim - 1))
            # The decoder's gradient has the weights w̃_k; multiplied once more here, the encoder's has w̃_k².
            z.register_hook(lambda gradient: gradient * share.to(gradient.dtype))  # type: ignore[no-untyped-call]
        distance = self._mmd(z.detach()) if all_terms and len(z) > 1 else None
        means = self._mean(log_likelihood.detach()), self._mean(output.kl.detach())
        return ObjectiveTerms(loss, -means[0], means[1], distance, summands={"bound": loss})

    def extra_repr(self) -> str:
        return f"samples={self.samples}, gradient={self.gradient!r}"


def log_importance_weights(log_likelihood: Tensor, z: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """log w_k = log p(x|z_k) + log N(z_k; 0, I) − log N(z_k; mu, exp(logvar)), shape (N, K).

    Args:
        log_likelihood: log p(x|z_k), shape (N, K).
        z: z_k, (N, K, D) or (N, K, C, H, W).
        logvar: (N, D) or (N, C, H, W).
        eps: (z_k − mu)/exp(½·logvar), in the shape of z.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, logvar, eps = z.to(dtype), logvar.to(dtype).unsqueeze(1), eps.to(dtype)
    return log_likelihood + 0.5 * (eps.square() + logvar - z.square()).flatten(2).sum(2).to(log_likelihood.dtype)


def _prepared(output: VAEOutput, x: Tensor) -> Tensor:
    return x if output.preparation is None else output.preparation(x, output.reconstruction.dtype)


def _is_nonzero(weight: float | Tensor) -> bool:
    """Whether the weight's term is computed. A tensor may become nonzero, so its term always is."""
    return isinstance(weight, Tensor) or weight != 0


def _weighted(weight: float | Tensor, term: Tensor) -> Tensor:
    return term if isinstance(weight, float) and weight == 1 else _weight(weight, term) * term


def _weight(weight: float | Tensor, term: Tensor) -> float | Tensor:
    return weight.to(term.device) if isinstance(weight, Tensor) else weight
