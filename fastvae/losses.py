"""MMD and SIGReg as nn.Modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae import checks
from fastvae.distributed import GroupModule
from fastvae.functional import mmd, mmd_to_normal
from fastvae.sliced import sigreg

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MMDLoss(GroupModule):
    """MMD² between two samples, or between a sample and N(0, I), as a loss.

    `MMDLoss(bandwidth=2.0)(x, y)` is `fastvae.mmd(x, y, bandwidth=2.0)`, and `MMDLoss(bandwidth=2.0)(x)` is
    `fastvae.mmd_to_normal(x, bandwidth=2.0)`, with the same arguments, shapes and errors. A rule such as bandwidth="median" is applied
    in each call.
    """

    def __init__(
        self,
        bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = 1.0,
        *,
        bandwidth_weights: Sequence[float] | Tensor | None = None,
        kernel: checks.AnyKernel = "rbf",
        estimator: checks.MMDEstimator = "biased",
        precision: checks.Precision | None = None,
        backend: checks.AnyBackend | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.mmd_options(kernel, estimator, precision, backend, bandwidth, bandwidth_weights)
        self.bandwidth = bandwidth
        self.bandwidth_weights = bandwidth_weights
        self.kernel = kernel
        self.estimator = estimator
        self.precision = precision
        self.backend = backend
        self.process_group = process_group

    def forward(self, x: Tensor, y: Tensor | None = None, *, x_weights: Tensor | None = None, y_weights: Tensor | None = None) -> Tensor:
        """The loss, shape (...), between x (..., N, D) and y (..., M, D), or between x and N(0, I) if y is None."""
        names = ("bandwidth", "bandwidth_weights", "kernel", "estimator", "precision", "backend", "process_group")
        options = {name: getattr(self, name) for name in names}
        if y is None:
            if y_weights is not None:
                raise ValueError("y_weights must be None if y is None, got weights")
            return mmd_to_normal(x, x_weights=x_weights, **options)
        return mmd(x, y, x_weights=x_weights, y_weights=y_weights, **options)

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth}, kernel={self.kernel!r}, estimator={self.estimator!r}{self._group()}"


class SIGReg(GroupModule):
    """SIGReg of LeJEPA as a loss, with new directions in each call.

    `SIGReg(256)(z)` is `fastvae.sigreg(z, num_slices=256)`, with the same arguments, shapes and errors.
    """

    def __init__(
        self,
        num_slices: int = 1024,
        *,
        num_points: int = 17,
        t_max: float = 3.0,
        t_min: float = 0.0,
        scale_by_n: bool = True,
        precision: checks.Precision | None = None,
        backend: checks.Backend | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.integer("num_slices", num_slices, at_least=1)
        checks.quadrature(num_points, t_max, t_min)
        checks.flag("scale_by_n", scale_by_n)
        checks.option("precision", precision, checks.PRECISIONS)
        checks.option("backend", backend, checks.BACKENDS)
        self.num_slices = num_slices
        self.num_points = num_points
        self.t_max = t_max
        self.t_min = t_min
        self.scale_by_n = scale_by_n
        self.precision = precision
        self.backend = backend
        self.process_group = process_group

    def forward(self, z: Tensor, *, directions: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The loss of z (..., N, D), a scalar, on these directions (D, K) or on new ones, drawn by `generator`."""
        names = ("num_slices", "num_points", "t_max", "t_min", "scale_by_n", "precision", "backend", "process_group")
        options = {name: getattr(self, name) for name in names}
        return sigreg(z, directions=directions, generator=generator, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.num_slices}, num_points={self.num_points}, t_max={self.t_max}, t_min={self.t_min}, "
            f"scale_by_n={self.scale_by_n}{self._group()}"
        )
