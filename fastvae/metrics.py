"""Distances between two sets of embeddings as torchmetrics metrics, which collect batches and synchronise over processes.

They take embeddings and contain no network. `import fastvae` does not import this module, as it needs torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import checks, recipes
from fastvae.dispatch import accumulation_dtype
from fastvae.features import RandomFeatures, Waves
from fastvae.functional import mmd
from fastvae.radial import Kernel, Polynomial, terms_of

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError("torchmetrics must be installed for fastvae.metrics: pip install 'fastvae-mmd[train]'") from error

__all__ = ["CMMD", "MMD", "KernelInceptionDistance"]


# Rows whose features are held at once.
_ROWS_AT_ONCE = 4096


class _EmbeddingMetric(Metric):
    """Two growing sets of embeddings."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    real_features: list[Tensor] | Tensor
    fake_features: list[Tensor] | Tensor
    counts: Tensor

    def __init__(self, *, reset_real_features: bool = True, backend: checks.Backend | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        checks.flag("reset_real_features", reset_real_features)
        checks.option("backend", backend, checks.BACKENDS)
        self.reset_real_features = reset_real_features
        self.backend = backend
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")
        # A MetricCollection shares one state between metrics whose states are equal, but compares only as many elements of lists as the
        # shorter one has. This state tells metrics apart that hold different numbers of embeddings or keep others at a reset.
        self.add_state("counts", torch.tensor([0, 0, reset_real_features]), dist_reduce_fx="sum")

    def forward(self, embeddings: Tensor, real: bool) -> None:
        """The same as `update`. A single batch has no distance to return."""
        self.update(embeddings, real)

    def update(self, embeddings: Tensor, real: bool) -> None:
        """Adds a batch of embeddings (N, D), floating point, of real data (`real=True`) or of generated data."""
        checks.points("embeddings", embeddings)
        checks.flag("real", real)
        for features in (self.real_features, self.fake_features):
            if isinstance(features, list) and features:
                checks.same_features("embeddings", embeddings, "the embeddings so far", features[0])
                checks.same_dtype("embeddings", embeddings, "the embeddings so far", features[0])
        name = "real_features" if real else "fake_features"
        own = getattr(self, name)
        assert isinstance(own, list)
        # New lists and tensors, as a MetricCollection shares the old ones with other metrics.
        setattr(self, name, [*own, embeddings.detach()])
        self.counts = self.counts.clone()
        self.counts[int(real)] += len(embeddings)

    def reset(self) -> None:
        """Forgets all embeddings, or only those of generated data if `reset_real_features` is False."""
        real, counts = self.real_features, self.counts.clone()
        self.real_features, self.fake_features = [], []
        super().reset()
        if not self.reset_real_features:
            self.real_features = real
            self.counts[1] = counts[1]

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        for name, features in (("real", self.real_features), ("not real", self.fake_features)):
            if not len(features):
                raise ValueError(f"embeddings that are {name} must be given before compute(): update(embeddings, real={name == 'real'})")
        return dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features)


class _MMDMetric(_EmbeddingMetric):
    """MMD² of two growing sets of embeddings, or of sums of their random features."""

    feature_sums: Tensor

    def __init__(
        self,
        bandwidth: float | checks.BandwidthRule | Sequence[float],
        bandwidth_weights: Sequence[float] | None = None,
        kernel: checks.KernelName | Kernel = "rbf",
        estimator: checks.Estimator = "biased",
        *,
        features: RandomFeatures | None,
        seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        checks.option("estimator", estimator, checks.ESTIMATORS)
        checks.integer("seed", seed, at_least=0)
        self.family, self.estimator = checks.kernel(kernel), estimator
        self.numbers = checks.bandwidths(bandwidth, bandwidth_weights, None)
        self.features, self.seed = features, seed
        self.waves: Waves | None = None
        if features is not None:
            checks.instance("features", features, RandomFeatures)
            checks.no_rule(bandwidth, "with features")
            checks.random_features(self.family, tuple(self.numbers[1]), "leave features out")
            # In the place of the embeddings.
            sums = torch.zeros(2, 2 * features.count * len(terms_of(self.family)) * len(self.numbers[0]), dtype=torch.float64)
            self.add_state("feature_sums", sums, dist_reduce_fx="sum")

    def prepared(self, embeddings: Tensor) -> Tensor:
        """The rows that are compared."""
        return embeddings

    @torch.no_grad()
    def update(self, embeddings: Tensor, real: bool) -> None:
        """Adds a batch of embeddings (N, D), floating point, of real data (`real=True`) or of generated data."""
        if self.features is None:
            super().update(embeddings, real)
            return
        checks.points("embeddings", embeddings)
        checks.flag("real", real)
        if self.waves is None or (embeddings.shape[1] != len(self.waves.frequencies) and not self.counts[:2].any()):
            h, a = (tuple(numbers) for numbers in self.numbers)
            generator = torch.Generator("cpu").manual_seed(self.seed)
            self.waves = self.features._waves(embeddings.shape[1], self.family, h, a, generator)
        checks.same_features("embeddings", embeddings, "the embeddings so far", self.waves.frequencies.T)
        self.counts, self.feature_sums = self.counts.clone(), self.feature_sums.clone()
        for start in range(0, len(embeddings), _ROWS_AT_ONCE):
            rows = self.prepared(embeddings[start : start + _ROWS_AT_ONCE].double())
            self.counts[int(real)] += len(rows)
            self.feature_sums[int(real)] += self.waves(rows).sum(0)

    def reset(self) -> None:
        """Forgets all embeddings, or only those of generated data if `reset_real_features` is False."""
        real = None if self.features is None or self.reset_real_features else self.feature_sums[1]
        super().reset()
        if real is not None:
            self.feature_sums[1] = real

    def _of_features(self) -> Tensor:
        """MMD² of the features so far."""
        for real in (True, False):
            if not self.counts[int(real)]:
                kind = "real" if real else "not real"
                raise ValueError(f"embeddings that are {kind} must be given before compute(): update(embeddings, real={real})")
        counts = self.counts[:2].double()
        value = (self.feature_sums / counts[:, None]).diff(dim=0).square().sum()
        if self.estimator == "unbiased":
            checks.two_embeddings(int(counts.min()))
            squares = self.feature_sums.square().sum(1)
            value = (
                value
                + (
                    (squares - counts * self.family.value_at_zero * sum(self.numbers[1])) / (counts * (counts - 1))
                    - squares / counts.square()
                ).sum()
            )
        return value.float()


class MMD(_MMDMetric):
    """MMD² of embeddings: `fastvae.mmd` of all batches, or an approximation in memory that does not grow.

        metric = MMD(bandwidth=8.0)
        metric.update(embeddings_of_photographs, real=True)
        metric.update(embeddings_of_samples, real=False)
        metric.compute()

    Args:
        bandwidth: h, as in `fastvae.mmd`, but without a gradient.
        bandwidth_weights: As in `fastvae.mmd`.
        kernel: As in `fastvae.mmd`.
        estimator: "biased" or "unbiased".
        features: None for all pairs. `fastvae.RandomFeatures(count)` keeps a sum of features in the place of the embeddings and takes time
            linear in their number; its docstring states the error. The bandwidth is then no rule.
        seed: Of the frequencies, which all processes draw alike, and which a metric keeps when it is reset.
        reset_real_features: Whether `reset()` also forgets the real embeddings.
        backend: As in `fastvae.mmd`. Not for features, which need a device with float64.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6; Rahimi and Recht 2007 for features.
    """

    def __init__(
        self,
        bandwidth: float | checks.BandwidthRule | Sequence[float] = 1.0,
        *,
        bandwidth_weights: Sequence[float] | None = None,
        kernel: checks.KernelName | Kernel = "rbf",
        estimator: checks.Estimator = "biased",
        features: RandomFeatures | None = None,
        seed: int = 0,
        reset_real_features: bool = True,
        backend: checks.Backend | None = None,
        **kwargs: Any,
    ) -> None:
        options: Any = {"features": features, "seed": seed, "reset_real_features": reset_real_features, "backend": backend, **kwargs}
        super().__init__(bandwidth, bandwidth_weights, kernel, estimator, **options)
        self.bandwidth, self.bandwidth_weights = bandwidth, bandwidth_weights

    @torch.no_grad()
    def compute(self) -> Tensor:
        """MMD² of all embeddings so far, a scalar."""
        if self.features is not None:
            return self._of_features()
        names = ("bandwidth", "bandwidth_weights", "estimator", "backend")
        return mmd(*self._embeddings(), kernel=self.family, **{name: getattr(self, name) for name in names})


class CMMD(_MMDMetric):
    """CMMD of embeddings such as CLIP's: `fastvae.recipes.cmmd` of all batches.

        scale·V of exp(−d²/(2·sigma²)), embeddings divided by their L2 norms unless `normalize=False`

        metric = CMMD()
        metric.update(embeddings_of_photographs, real=True)
        metric.update(embeddings_of_samples, real=False)
        metric.compute()

    Memory grows linearly with the number of embeddings, unless `features` are given. The sums are in float64 for any dtype of the
    embeddings, as float32 would leave no correct digit for near copies such as u and u + 0.001·noise.

    Args:
        sigma: The bandwidth.
        scale: A factor of the result.
        normalize: Whether to divide embeddings by their L2 norms.
        features: As in `MMD`. With sigma = 10 the kernel is wide, and the standard error is about √(2/count) of CMMD: 3 % for 2,048
            frequencies.
        seed: As in `MMD`.
        reset_real_features: Whether `reset()` also forgets the real embeddings.
        backend: As in `fastvae.mmd`.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Source: Jayasumana et al. 2024, "Rethinking FID: towards a better evaluation metric for image generation".
    """

    def __init__(
        self,
        sigma: float = 10.0,
        scale: float = 1000.0,
        *,
        normalize: bool = True,
        features: RandomFeatures | None = None,
        seed: int = 0,
        reset_real_features: bool = True,
        backend: checks.Backend | None = None,
        **kwargs: Any,
    ) -> None:
        self.sigma = checks.real("sigma", sigma, above=0)
        super().__init__(sigma, features=features, seed=seed, reset_real_features=reset_real_features, backend=backend, **kwargs)
        self.scale = checks.real("scale", scale)
        checks.flag("normalize", normalize)
        self.normalize = normalize

    def prepared(self, embeddings: Tensor) -> Tensor:
        """Divided by their norms, if that is wanted."""
        return torch.nn.functional.normalize(embeddings, dim=1) if self.normalize else embeddings

    @torch.no_grad()
    def compute(self) -> Tensor:
        """CMMD of all embeddings so far, a scalar."""
        if self.features is not None:
            return self.scale * self._of_features()
        real, fake = self._embeddings()
        dtype = accumulation_dtype(real.dtype)
        if real.device.type != "mps":  # Apple's GPUs have no float64
            real, fake = real.double(), fake.double()
        return recipes.cmmd(real, fake, sigma=self.sigma, scale=self.scale, normalize=self.normalize, backend=self.backend).to(dtype)


class KernelInceptionDistance(_EmbeddingMetric):
    """The kernel inception distance of embeddings: `fastvae.recipes.kid` of all batches.

        U of (gamma·x·y + coef)^degree, gamma = 1/D by default: mean and standard deviation over subsets

    The numbers are those of torchmetrics. With float32 features the error is about 1e-8 times a value of the kernel.

    Args:
        subsets: The number of subsets. None: all rows at once, the exact value that subsets only estimate; the standard deviation is nan.
        subset_size: The number of embeddings of each kind in a subset.
        degree: The degree of the kernel.
        gamma: The factor of x·y in the kernel; 1/D by default.
        coef: The constant in the kernel.
        seed: If given, every `compute()` draws the same subsets. By default they come from the global generator, as in torchmetrics.
        reset_real_features: Whether `reset()` also forgets the real embeddings.
        precision: As in `fastvae.mmd`.
        backend: As in `fastvae.mmd`.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", section 4.
    """

    def __init__(
        self,
        subsets: int | None = 100,
        subset_size: int = 1000,
        *,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        seed: int | None = None,
        reset_real_features: bool = True,
        precision: checks.Precision | None = None,
        backend: checks.Backend | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(reset_real_features=reset_real_features, backend=backend, **kwargs)
        checks.option("precision", precision, checks.PRECISIONS)
        if subsets is not None:
            checks.integer("subsets", subsets, at_least=1)
        checks.integer("subset_size", subset_size, at_least=2)
        Polynomial(degree, coef)
        if gamma is not None:
            checks.real("gamma", gamma, above=0)
        if seed is not None:
            checks.integer("seed", seed, at_least=0)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.degree, self.gamma, self.coef, self.precision = degree, gamma, coef, precision

    @torch.no_grad()
    def compute(self) -> recipes.KID:
        """`fastvae.recipes.KID(mean, std)` of all embeddings so far."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        names = ("subsets", "subset_size", "degree", "gamma", "coef", "precision", "backend")
        return recipes.kid(*self._embeddings(), generator=generator, **{name: getattr(self, name) for name in names})
