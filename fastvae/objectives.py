"""Training objectives of variational autoencoders, and the likelihoods that they are made of.

The loss is the mean over the batch of

    −log p(x|z) + kl_weight·KL(q(z|x) ‖ N(0, I))   +   mmd_weight·MMD²(q(z), N(0, I))   +   tc_weight·TC   +   DIP      (1)

where the KL may stand for one of

    capacity    mean_i |KL_i − C|                                                                                       (2)
    free bits   Σ_g max(λ, mean_i Σ_{d∈g} KL_id), over groups g of latent dimensions                                    (3)

and, with S the covariance over the batch of mu (DIP-VAE-I), or of mu plus the batch's mean of diag(exp(logvar)) (DIP-VAE-II),

    DIP = lambda_od·Σ_{i≠j} S_ij² + lambda_d·Σ_i (S_ii − 1)²                                                            (4)

TC is the total correlation of q(z), estimated from the batch (`fastvae.total_correlation`): as the KL holds it once, β-TC-VAE is
tc_weight = β − 1. The importance-weighted bound is a loss of its own, over K codes z_k ~ q(z|x) of each sample:

    −log 1/K·Σ_k w_k,   w_k = p(x|z_k)·p(z_k)/q(z_k|x)                                                                  (5)

Sources: Zhao, Song and Ermon 2019, "InfoVAE: balancing learning and inference in variational autoencoders", with the MMD as divergence;
Burgess et al. 2018, "Understanding disentangling in β-VAE" (2); Kingma et al. 2016, "Improved variational inference with inverse
autoregressive flow", appendix C.8 (3); Kumar, Sattigeri and Balakrishnan 2018, "Variational inference of disentangled latent concepts from
unlabeled observations" (4); Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders" (5).
"""

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
from fastvae.functional import mmd, mmd_to_normal, reparameterize_kl, total_correlation
from fastvae.ops.common import without_autocast
from fastvae.preparation import Standardise
from fastvae.radial import Kernel
from fastvae.reference.total_correlation import precision_root

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DipKind = Literal["i", "ii"]
BoundGradient = Literal["reparameterised", "doubly"]
# The scales of the kernels of the WAE's authors, of C = 2·D.
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Likelihood(nn.Module):
    """p(x|z) over the features of a sample, given what the decoder returns. Subclass it for a likelihood of your own."""

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over the features of each sample, shape (N,)."""
        raise NotImplementedError

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """The mean of `log_prob` over the samples, which a likelihood may know a shorter way to."""
        return self.log_prob(reconstruction, x).mean(0)

    def mean(self, reconstruction: Tensor) -> Tensor:
        """E[x|z], in the units of the data and the shape of `reconstruction`."""
        raise NotImplementedError


class Gaussian(Likelihood):
    """N(reconstruction, sigma²·I): log p = −‖x−x̂‖²/(2·sigma²) − D·log(sigma) − ½·D·log(2π).

    Args:
        sigma: the noise's standard deviation in the units of the data, > 0.
        learned: train one sigma for all features, starting from `sigma`, down to `least_sigma`.
        optimal: take the sigma that maximises the likelihood of each training batch, sigma² = mean of (x−x̂)² over its samples and
            features, but at least `least_sigma`². The gradient with respect to x̂ is that at this sigma held fixed, as the likelihood is
            flat in sigma at its maximum. Evaluation takes a running mean over the training batches, which starts from `sigma` and of
            which each batch is a tenth.
        least_sigma: bounds the learned or optimal sigma from below, so that a perfect reconstruction has a finite likelihood.

    Raises:
        ValueError: a sigma that is not positive, one that is both learned and optimal, or a learned one that starts under `least_sigma`.

    Source of the optimal sigma: Rybkin, Daniilidis and Levine 2021, "Simple and effective VAE training with calibrated decoders".
    """

    def __init__(self, sigma: float = 1.0, *, learned: bool = False, optimal: bool = False, least_sigma: float = math.exp(-6)) -> None:
        super().__init__()
        if learned and optimal:
            raise ValueError("learned and optimal must not both be true, as each finds sigma in its own way")
        log_sigma = math.log(checks.real("sigma", sigma, above=0))
        self.least_variance = checks.real("least_sigma", least_sigma, above=0) ** 2
        if learned and sigma < least_sigma:
            raise ValueError(f"sigma must be at least least_sigma, {least_sigma:g}, where it is learned, got {sigma:g}: pass least_sigma")
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
        return self._of_squares(squares.sum(1), squares, x.shape[1])

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if getattr(self.log_prob, "__func__", None) is not Gaussian.log_prob:
            return super().mean_log_prob(reconstruction, x)
        reconstruction, x = _flat(reconstruction, x)
        mean = F.mse_loss(reconstruction, x)
        return self._of_squares(mean * x.shape[1], mean, x.shape[1])

    def _of_squares(self, sums: Tensor, squares: Tensor, features: int) -> Tensor:
        """From sums of squares over the features, and numbers whose mean is the variance."""
        log_sigma = self._optimal_log_sigma(squares) if self.optimal else self._bounded_log_sigma()
        precision = (-2 * log_sigma).exp() if isinstance(log_sigma, Tensor) else math.exp(-2 * log_sigma)
        return -0.5 * sums * precision - features * (log_sigma + 0.5 * math.log(2 * math.pi))

    def _bounded_log_sigma(self) -> Tensor | float:
        if not isinstance(self.log_sigma, Tensor):
            return self.log_sigma
        least = 0.5 * math.log(self.least_variance)
        if self.training and not torch._C._are_functorch_transforms_active():
            # Under the bound there is no gradient: left there the parameter could not come back. By `data`, as a step may take more than
            # one loss before its backward pass, to which a parameter that was written to is lost.
            self.log_sigma.data.clamp_(min=least)
        return self.log_sigma.clamp_min(least)

    def _optimal_log_sigma(self, squares: Tensor) -> Tensor:
        if self.training:
            variance = squares.detach().mean()
            # One batch that is not finite would stay in the running mean for ever.
            update = torch.where(variance.isfinite(), variance.to(self.running_variance.dtype), self.running_variance)
            self.running_variance.lerp_(update, 0.1)
        else:
            variance = self.running_variance
        return 0.5 * variance.clamp_min(self.least_variance).log()

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, learned={isinstance(self.log_sigma, Tensor)}, optimal={self.optimal}"


class Bernoulli(Likelihood):
    """Independent Bernoulli features whose logits are the reconstruction: log p = −binary cross-entropy, for x in [0, 1], greys allowed.

    Raises:
        ValueError: values outside [0, 1] in the first x that can be read without waiting for a GPU or breaking a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._looked = False

    def log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        self._look(x)
        reconstruction, x = _flat(reconstruction, x)
        return -F.binary_cross_entropy_with_logits(reconstruction, x, reduction="none").sum(1)

    def mean_log_prob(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if getattr(self.log_prob, "__func__", None) is not Bernoulli.log_prob:
            return super().mean_log_prob(reconstruction, x)
        self._look(x)
        reconstruction, x = _flat(reconstruction, x)
        return F.binary_cross_entropy_with_logits(reconstruction, x, reduction="sum") / -len(x)

    def mean(self, reconstruction: Tensor) -> Tensor:
        return reconstruction.sigmoid()

    def _look(self, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and not self._looked:
            self._looked = checks.unit_interval("x", x, "pixels / 255, say, or a Gaussian likelihood")


def _flat(reconstruction: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if reconstruction.shape[:1] != x.shape[:1] or reconstruction.numel() != x.numel():
        raise ValueError(f"x must have the features of the reconstruction, got shapes {tuple(x.shape)} and {tuple(reconstruction.shape)}")
    # A sum over the features of an image is past what float16 and bfloat16 hold.
    dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, x.dtype), torch.float32)
    return reconstruction.flatten(1).to(dtype), x.flatten(1).to(dtype)


class VAEOutput(NamedTuple):
    """What a VAE returns for N samples and D latent dimensions, and all that an objective reads.

    `reconstruction` (N, …) holds the likelihood's parameters as the decoder returns them: means for `Gaussian`, logits for `Bernoulli`.
    `z` and `mu` have shape (N, D). A deterministic posterior has z = mu and neither `logvar` (N, D) nor `kl` (N,). With K samples of z,
    `z` and `reconstruction` have N·K rows, those of one x together. `preparation` is what an objective prepares x by, if
    anything. `eps`, of the shape of `z`, is the noise of z = mu + exp(½·logvar)·eps where the model has it: a narrow posterior's z has
    lost it to rounding.
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
    """Batch means, scalars in nats (`mmd` is MMD², without unit). A term outside the loss is detached, or None if it was not computed.

    `kl` is the KL divergence itself, also where a capacity or free bits stand for it in the loss; `dip` is (4) as the loss has it.
    `summands` holds by its name each weighted term that has a part in the loss: they add up to it.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor | None
    mmd: Tensor | None
    total_correlation: Tensor | None = None
    dip: Tensor | None = None
    summands: dict[str, Tensor] = {}  # noqa: RUF012


class VAEObjective(GroupModule):
    """Equation (1) of this module: `objective(model(x), x).loss.backward()`.

    With an RBF kernel the prior's part of the MMD is in closed form, so no prior sample is drawn; with another, one of the batch's size is.

    Args:
        kl_weight: ≥ 0.
        mmd_weight: ≥ 0. MMD² is at most 2 while the other terms are sums over features: weights of 10 (tens of features) to 1000
            (images) are usual.
        kernel: of the MMD: "rbf" or "gaussian", "imq", "rational_quadratic", "laplace", "energy" or "polynomial", whose formulas
            `fastvae.mmd` has, or a `fastvae.Kernel` of `fastvae.radial`.
        bandwidth: the kernel's h, or several. None takes √D: two independent codes from the prior lie at ‖z−z'‖² = 2D on
            average, where exp(−d²/(2h²)) = 1/e and the kernel tells distances apart at any D. For "imq" None takes √(2·D·s) for the seven
            scales s from 0.1 to 10 of Tolstikhin et al. 2018.
        estimator: "unbiased" or "biased". The biased one counts each code's kernel with itself, which a large weight and a small batch turn
            into a pull of every code to the origin.
        capacity: C in nats, ≥ 0, for (2) in the place of the KL.
        free_bits: λ in nats a group, ≥ 0, for (3) in the place of the KL: a group whose mean KL over the batch is under λ has no gradient.
        free_bits_group: latent dimensions a group, neighbours in the code. 1 is a floor for each dimension, D one for their sum.
        tc_weight: ≥ 0, of the total correlation.
        dataset_size: samples in the training set, for the total correlation.
        tc_estimator: "minibatch_weighted" or "minibatch_stratified".
        dip_weights: (lambda_od, lambda_d) of (4), each ≥ 0.
        dip_kind: "i" or "ii".

    Attributes:
        process_group: of `torch.distributed`, None at first. Set it, and every term is that of the batches of all its ranks together, the
            same on each rank: with data parallelism the model then trains as one process with the whole batch does. Batches may differ in
            size. `VAEModule` sets it in a run of several processes.

    Raises:
        ValueError: a negative weight (training would maximise that divergence), a bandwidth that is not positive, an unknown estimator or
            kind, a capacity together with free bits.
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
        capacity: float | None = None,
        free_bits: float = 0.0,
        free_bits_group: int = 1,
        tc_weight: float = 0.0,
        dataset_size: int | None = None,
        tc_estimator: checks.DensityEstimator = "minibatch_weighted",
        dip_weights: tuple[float, float] = (0.0, 0.0),
        dip_kind: DipKind = "i",
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
        self.capacity: float | Tensor | None = None if capacity is None else checks.real("capacity", capacity, at_least=0)
        self.free_bits = checks.real("free_bits", free_bits, at_least=0)
        self.free_bits_group = checks.integer("free_bits_group", free_bits_group, at_least=1)
        if capacity is not None and free_bits:
            raise ValueError(f"capacity must be None where free_bits are given, as each stands for the KL, got {capacity:g}")
        self.tc_weight: float | Tensor = checks.real("tc_weight", tc_weight, at_least=0)
        if tc_weight and dataset_size is None:
            raise ValueError("dataset_size must be given for the total correlation, got None")
        self.dataset_size = None if dataset_size is None else checks.integer("dataset_size", dataset_size, at_least=1)
        checks.option("tc_estimator", tc_estimator, checks.DENSITY_ESTIMATORS)
        self.tc_estimator = tc_estimator
        self.dip_weights = tuple(checks.real(name, w, at_least=0) for name, w in zip(("lambda_od", "lambda_d"), dip_weights, strict=True))
        checks.option("dip_kind", dip_kind, get_args(DipKind))
        self.dip_kind = dip_kind
        self.process_group: ProcessGroup | None = None

    def set(
        self,
        *,
        kl_weight: float | None = None,
        mmd_weight: float | None = None,
        tc_weight: float | None = None,
        capacity: float | None = None,
    ) -> None:
        """Sets a weight or the capacity between two steps, as a schedule does; each ≥ 0, None leaves it as it is.

        From the first call on that weight is a tensor, which later calls fill: a compiled step is not compiled anew, and a captured one
        sees the new number. Its term is then computed at a weight of 0 too. The tensor moves with the objective (`objective.to(device)`).
        """
        for name, value in {"kl_weight": kl_weight, "mmd_weight": mmd_weight, "tc_weight": tc_weight, "capacity": capacity}.items():
            if value is None:
                continue
            value = checks.real(name, value, at_least=0)
            current = getattr(self, name)
            if current is None:
                raise ValueError(f"{name} must be given to the objective before it is set, got None")
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
        cls, lambda_: float, *, bandwidth: float | Sequence[float] | Tensor | None = None, estimator: checks.Estimator = "unbiased"
    ) -> VAEObjective:
        """InfoVAE with alpha = 1: no KL, `lambda_` times the MMD²."""
        return cls.info_vae(1.0, lambda_, bandwidth=bandwidth, estimator=estimator)

    @classmethod
    def wae_mmd(
        cls,
        lambda_: float,
        *,
        kernel: checks.KernelName | Kernel = "rbf",
        bandwidth: float | Sequence[float] | Tensor | None = None,
        estimator: checks.Estimator = "unbiased",
    ) -> VAEObjective:
        """The Wasserstein autoencoder's loss, for posterior="deterministic". Source: Tolstikhin et al. 2018, who take kernel="imq"."""
        lambda_ = checks.real("lambda_", lambda_, at_least=0)
        return cls(kl_weight=0.0, mmd_weight=lambda_, kernel=kernel, bandwidth=bandwidth, estimator=estimator)

    @classmethod
    def beta_tc_vae(cls, beta: float, dataset_size: int, *, estimator: checks.DensityEstimator = "minibatch_weighted") -> VAEObjective:
        """The negative ELBO with `beta` ≥ 1 times the total correlation within the KL. Source: Chen et al. 2018, with α = γ = 1."""
        tc_weight = checks.real("beta", beta, at_least=1) - 1
        return cls(tc_weight=tc_weight, dataset_size=dataset_size, tc_estimator=estimator)

    @classmethod
    def capacity_vae(cls, gamma: float, capacity: float) -> VAEObjective:
        """(2) with weight `gamma`, ≥ 0: each sample's KL is held at `capacity` nats, which a schedule raises. Source: Burgess et al."""
        return cls(kl_weight=checks.real("gamma", gamma, at_least=0), capacity=capacity)

    @classmethod
    def dip_vae(cls, lambda_od: float, lambda_d: float | None = None, *, kind: DipKind = "i") -> VAEObjective:
        """The negative ELBO plus (4). `lambda_d` is 10·lambda_od (kind "i") or lambda_od ("ii") by default. Source: Kumar et al. 2018."""
        checks.option("kind", kind, get_args(DipKind))
        lambda_od = checks.real("lambda_od", lambda_od, at_least=0)
        return cls(dip_weights=(lambda_od, (10 if kind == "i" else 1) * lambda_od if lambda_d is None else lambda_d), dip_kind=kind)

    @classmethod
    def iwae(cls, samples: int, *, gradient: BoundGradient = "reparameterised") -> ImportanceWeighted:
        """The importance-weighted bound (5): `ImportanceWeighted(samples, gradient=gradient)`. Source: Burda et al. 2016."""
        return ImportanceWeighted(samples, gradient=gradient)

    def forward(self, output: VAEOutput, x: Tensor, *, all_terms: bool = False, prior: Tensor | None = None) -> ObjectiveTerms:
        """The loss of N samples and its terms.

        Args:
            output: what the VAE returned.
            x: the targets, shape (N, …) with as many features as the reconstruction, in the units that the model was given them in.
            all_terms: compute an MMD of weight zero too, for logging.
            prior: the draws from N(0, I) that stand for the prior where the kernel has no closed form, shape (M, D); (N, D) by default.

        Raises:
            ValueError: a KL weight on a deterministic posterior; N = 1 with the unbiased estimator.
        """
        x = _prepared(output, x)
        if self.process_group is None and isinstance(output.likelihood, Likelihood):
            reconstruction = -output.likelihood.mean_log_prob(output.reconstruction, x)
        else:
            reconstruction = -self._mean(output.likelihood.log_prob(output.reconstruction, x))
        summands = {"reconstruction": reconstruction}
        kl = None if output.kl is None else self._mean(output.kl)
        distance = tc = dip = None
        if _counts(self.kl_weight):
            if output.kl is None or kl is None:
                raise ValueError(f"kl_weight must be 0 for a deterministic posterior, which has no KL, got {float(self.kl_weight):g}")
            penalty = kl if self.capacity is None and not self.free_bits else self._kl_penalty(output, output.kl)
            summands["kl"] = _weighted(self.kl_weight, penalty)
        elif kl is not None:
            kl = kl.detach()
        if _counts(self.mmd_weight):
            distance = self._mmd(output.z, prior)
            summands["mmd"] = _weighted(self.mmd_weight, distance)
        elif all_terms and (len(output.z) > 1 or self.estimator == "biased"):
            distance = self._mmd(output.z.detach(), prior)
        if _counts(self.tc_weight):
            tc = self._total_correlation(output)
            summands["total_correlation"] = _weighted(self.tc_weight, tc)
        if any(self.dip_weights):
            dip = summands["dip"] = self._dip(output)
        loss = functools.reduce(torch.add, summands.values())
        return ObjectiveTerms(loss, reconstruction, kl, distance, tc, dip, summands)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the samples of all processes, as the first dimension of x."""
        return x.mean(0) if self.process_group is None else global_mean(x, self.process_group)

    def _whole(self, x: Tensor) -> Tensor:
        """The rows of all processes."""
        return x if self.process_group is None else gather("the codes", x, self.process_group)

    def _kl_penalty(self, output: VAEOutput, kl: Tensor) -> Tensor:
        if self.capacity is not None:
            return self._mean((kl - _weight(self.capacity, kl)).abs())
        assert output.logvar is not None
        d = output.mu.shape[1]
        if d % self.free_bits_group:
            raise ValueError(f"free_bits_group must divide the number of latent dimensions, {d}, got {self.free_bits_group}")
        _, per_dimension = reparameterize_kl(output.mu, output.logvar, eps=torch.zeros_like(output.mu), per_dimension=True)
        return self._mean(per_dimension).reshape(-1, self.free_bits_group).sum(1).clamp_min(self.free_bits).sum()

    def _mmd(self, z: Tensor, prior: Tensor | None = None) -> Tensor:
        if self.estimator == "unbiased" and len(z) == 1 and self.process_group is None:
            raise ValueError(
                "a batch must have at least two samples for the unbiased MMD, got one: a DataLoader's drop_last=True leaves such a last "
                "batch out, and estimator='biased' takes it"
            )
        bandwidth = self.bandwidth
        if bandwidth is None:
            d = z.shape[1]
            bandwidth = [math.sqrt(2 * d * s) for s in IMQ_SCALES] if self.kernel.name == "imq" else math.sqrt(d)
        if self.kernel.name == "rbf":
            return mmd_to_normal(z, bandwidth=bandwidth, estimator=self.estimator, process_group=self.process_group)
        prior = torch.randn_like(z) if prior is None else prior
        group = self.process_group
        return mmd(z, prior, bandwidth=bandwidth, kernel=self.kernel, estimator=self.estimator, process_group=group)

    def _total_correlation(self, output: VAEOutput) -> Tensor:
        if output.logvar is None:
            raise ValueError("tc_weight must be 0 for a deterministic posterior, which has no density, got a weight")
        codes = [output.z, output.mu, output.logvar]
        if self.process_group is not None:
            for name, t in (("mu", output.mu), ("logvar", output.logvar)):
                checks.same_shape("z", output.z, name, t)
                checks.same_kind("z", output.z, name, t)
            # Together, so that a compiler sees that they have as many rows.
            codes = list(self._whole(torch.cat(codes, 1)).chunk(3, 1))
        # A batch for evaluation may be larger than the training set; written as a sum, as a compiler sees that one is not less than rows.
        rows = codes[0].shape[0]
        size = rows + torch.sym_max((self.dataset_size or 0) - rows, 0)  # type: ignore[no-untyped-call]
        return total_correlation(*codes, dataset_size=size, estimator=self.tc_estimator).total_correlation

    def _dip(self, output: VAEOutput) -> Tensor:
        # A covariance in bfloat16 would not see a variance of one.
        with without_autocast(output.mu.device):
            mu = self._whole(output.mu.to(torch.promote_types(output.mu.dtype, torch.float32)))
            centred = mu - mu.mean(0)
            covariance = centred.T @ centred / len(mu)
            if self.dip_kind == "ii":
                if output.logvar is None:
                    raise ValueError("dip_kind must be 'i' for a deterministic posterior, which has no variance, got 'ii'")
                covariance = covariance + self._mean(output.logvar.to(mu.dtype).exp()).diag()
            diagonal = covariance.diagonal()
            lambda_od, lambda_d = self.dip_weights
            return lambda_od * (covariance - diagonal.diag()).square().sum() + lambda_d * (diagonal - 1).square().sum()

    def extra_repr(self) -> str:
        options = {
            "capacity": None if self.capacity is None else float(self.capacity),
            "free_bits": self.free_bits,
            "tc_weight": float(self.tc_weight),
            "kernel": None if self.kernel.name == "rbf" else self.kernel.name,
            "dip_weights": self.dip_weights if any(self.dip_weights) else None,
        }
        return (
            f"kl_weight={float(self.kl_weight):g}, mmd_weight={float(self.mmd_weight):g}, bandwidth={self.bandwidth}, "
            f"estimator={self.estimator!r}" + "".join(f", {name}={value}" for name, value in options.items() if value)
        )


class ImportanceWeighted(VAEObjective):
    """The importance-weighted bound (5), for `output = model(x, samples=objective.samples)`.

    Args:
        samples: K ≥ 1 codes a sample; K = 1 is the ELBO with a sampled KL.
        gradient: "reparameterised", whose signal-to-noise for the encoder falls as 1/√K; or "doubly", the encoder's gradient
            reparameterised a second time: Σ_k w̃_k²·∂log w_k/∂z_k·∂z_k/∂φ with w̃ the normalised weights, unbiased as well, its
            signal-to-noise rises as √K. The decoder's gradient is the same in both.

    Sources: Burda, Grosse and Salakhutdinov 2016; Tucker et al. 2019, "Doubly reparameterized gradient estimators for Monte Carlo
    objectives" (DReG).
    """

    def __init__(self, samples: int, *, gradient: BoundGradient = "reparameterised") -> None:
        super().__init__()
        self.samples = checks.integer("samples", samples, at_least=1)
        checks.option("gradient", gradient, get_args(BoundGradient))
        self.gradient = gradient

    def forward(self, output: VAEOutput, x: Tensor, *, all_terms: bool = False, prior: Tensor | None = None) -> ObjectiveTerms:
        """The negative bound of N samples, as `loss`, beside the terms of one code each, detached.

        Raises:
            ValueError: a deterministic posterior, or an output with another number of codes a sample.
        """
        mu, logvar, z = output.mu, output.logvar, output.z
        if logvar is None or output.kl is None:
            raise ValueError("posterior must be 'gaussian' for the importance-weighted bound, got a deterministic one")
        if len(z) != len(mu) * self.samples:
            raise ValueError(f"output must hold samples={self.samples} codes a sample, got {len(z)} codes for {len(mu)} samples")
        x = _prepared(output, x).repeat_interleave(self.samples, 0)
        log_likelihood = output.likelihood.log_prob(output.reconstruction, x)
        doubly = self.gradient == "doubly"
        # As they are summed.
        dtype = torch.promote_types(z.dtype, torch.float32)
        mu, logvar = ((t.detach() if doubly else t).to(dtype) for t in (mu, logvar))
        codes = z.to(dtype).reshape(len(mu), self.samples, -1)
        if output.eps is None:
            eps = (codes - mu.unsqueeze(1)) * precision_root(logvar).unsqueeze(1)
        else:
            eps = output.eps.to(dtype).reshape(codes.shape)
            if doubly:
                # Its value, with the gradient of (z − μ)/σ to z.
                eps = eps + (codes - codes.detach()) * precision_root(logvar).unsqueeze(1)
        log_w = log_importance_weights(log_likelihood.reshape(len(mu), -1), codes, logvar, eps)
        loss = math.log(self.samples) - self._mean(log_w.logsumexp(1))
        if doubly and z.requires_grad:
            share = log_w.detach().softmax(1).reshape(-1, 1)
            # The decoder has its gradient with weights w̃_k before this, the encoder gets w̃_k² after it.
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
        z, eps: z_k and (z_k − mu)/exp(½·logvar), each (N, K, D).
        logvar: (N, D).
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, logvar, eps = z.to(dtype), logvar.to(dtype).unsqueeze(1), eps.to(dtype)
    return log_likelihood + 0.5 * (eps.square() + logvar - z.square()).sum(2).to(log_likelihood.dtype)


def _prepared(output: VAEOutput, x: Tensor) -> Tensor:
    return x if output.preparation is None else output.preparation(x, output.reconstruction.dtype)


def _counts(weight: float | Tensor) -> bool:
    """Whether its term is computed: not at a constant zero."""
    return isinstance(weight, Tensor) or weight != 0


def _weighted(weight: float | Tensor, term: Tensor) -> Tensor:
    return term if isinstance(weight, float) and weight == 1 else _weight(weight, term) * term


def _weight(weight: float | Tensor, term: Tensor) -> float | Tensor:
    return weight.to(term.device) if isinstance(weight, Tensor) else weight
