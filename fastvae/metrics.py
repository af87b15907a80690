"""Distances between two sets of embeddings as torchmetrics metrics, which collect batches and synchronise over processes.

The embeddings are the user's: no network is inside. Not imported by `import fastvae`; it needs torchmetrics, which Lightning brings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae import checks, recipes
from fastvae.ops.common import accumulation_dtype
from fastvae.radial import Polynomial

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError("fastvae.metrics must have torchmetrics: pip install torchmetrics, or pip install 'fastvae-mmd[train]'") from error

__all__ = ["CMMD", "KernelInceptionDistance"]


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
        checks.option("reset_real_features", reset_real_features, (True, False))
        checks.option("backend", backend, checks.BACKENDS)
        self.reset_real_features = reset_real_features
        self.backend = backend
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")
        # A MetricCollection keeps one state for metrics whose states are alike, and compares lists as far as the shorter one goes.
        # This tells apart metrics that hold other numbers of embeddings, or keep others at a reset.
        self.add_state("counts", torch.tensor([0, 0, reset_real_features]), dist_reduce_fx="sum")

    def forward(self, embeddings: Tensor, real: bool) -> None:
        """`update`: a batch is of one kind and has no distance of its own."""
        self.update(embeddings, real)

    def update(self, embeddings: Tensor, real: bool) -> None:
        """Add a batch of embeddings (N, D), of real data or not."""
        checks.points("embeddings", embeddings)
        checks.option("real", real, (True, False))
        for features in (self.real_features, self.fake_features):
            if isinstance(features, list) and features:
                checks.same_features("embeddings", embeddings, "the embeddings so far", features[0])
                checks.same_dtype("embeddings", embeddings, "the embeddings so far", features[0])
        name = "real_features" if real else "fake_features"
        own = getattr(self, name)
        assert isinstance(own, list)
        # New ones: a MetricCollection hands the old ones to other metrics as well.
        setattr(self, name, [*own, embeddings.detach()])
        self.counts = self.counts.clone()
        self.counts[int(real)] += len(embeddings)

    def reset(self) -> None:
        """Forget all embeddings, or, unless `reset_real_features`, those that are not of real data."""
        real, counts = self.real_features, self.counts.clone()
        self.real_features, self.fake_features = [], []
        super().reset()
        if not self.reset_real_features:
            self.real_features = real
            self.counts[1] = counts[1]

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        sets = [dim_zero_cat(f) if len(f) else None for f in (self.real_features, self.fake_features)]
        for name, features in zip(("real", "not real"), sets, strict=True):
            if features is None:
                raise ValueError(f"embeddings that are {name} must be given before compute(): update(embeddings, real={name == 'real'})")
        real, fake = sets
        assert real is not None
        assert fake is not None
        return real, fake


class CMMD(_EmbeddingMetric):
    """CMMD of embeddings, such as CLIP's, streaming: `fastvae.recipes.cmmd` of all batches.

        scale·V of exp(−d²/(2·sigma²)), embeddings divided by their L2 norms unless `normalize=False`

        metric = CMMD()
        metric.update(embeddings_of_photographs, real=True)
        metric.update(embeddings_of_samples, real=False)
        metric.compute()

    Memory grows with the embeddings, not with their square. It sums in float64, whatever the embeddings are: of near copies, u and
    u + 0.001·noise, float32 has not one digit.

    Args:
        sigma, scale, normalize: as above.
        reset_real_features: whether `reset()` forgets the real embeddings too.
        backend: as in `fastvae.mmd`.
        **kwargs: of `torchmetrics.Metric`.

    `update(embeddings, real)` takes (N, D), floating point, `compute()` returns a scalar.

    Source: Jayasumana et al. 2024, "Rethinking FID: towards a better evaluation metric for image generation".
    """

    def __init__(
        self,
        sigma: float = 10.0,
        scale: float = 1000.0,
        *,
        normalize: bool = True,
        reset_real_features: bool = True,
        backend: checks.Backend | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(reset_real_features=reset_real_features, backend=backend, **kwargs)
        self.sigma = checks.real("sigma", sigma, above=0)
        self.scale = checks.real("scale", scale)
        self.normalize = normalize

    @torch.no_grad()
    def compute(self) -> Tensor:
        """CMMD of all embeddings so far."""
        real, fake = self._embeddings()
        dtype = accumulation_dtype(real.dtype)
        fine = dtype if real.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        return recipes.cmmd(
            real.to(fine), fake.to(fine), sigma=self.sigma, scale=self.scale, normalize=self.normalize, backend=self.backend
        ).to(dtype)


class KernelInceptionDistance(_EmbeddingMetric):
    """The kernel inception distance of embeddings, streaming: `fastvae.recipes.kid` of all batches.

        U of (gamma·x·y + coef)^degree, gamma = 1/D by default: mean and standard deviation over subsets

    With `subsets=None` all rows at once, exactly, and nan for the standard deviation: the value that the mean over subsets estimates. With
    a `seed` every `compute()` draws the same subsets; without, the global generator does, as in torchmetrics, whose numbers these are.
    It is off by some 1e-8 of a value of the kernel where the features are float32.

    Args:
        subsets, subset_size, degree, gamma, coef: as above.
        seed: of the subsets.
        reset_real_features: whether `reset()` forgets the real embeddings too.
        precision, backend: as in `fastvae.mmd`.
        **kwargs: of `torchmetrics.Metric`.

    `update(embeddings, real)` takes (N, D), floating point, `compute()` returns `fastvae.recipes.KID(mean, std)`.

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
        """(mean, standard deviation) of all embeddings so far."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return recipes.kid(
            *self._embeddings(),
            subsets=self.subsets,
            subset_size=self.subset_size,
            degree=self.degree,
            gamma=self.gamma,
            coef=self.coef,
            generator=generator,
            precision=self.precision,
            backend=self.backend,
        )
