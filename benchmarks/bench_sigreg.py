"""SIGReg, by `sigreg` and by the formula that users write.

    python -m benchmarks.bench_sigreg    appends rows to benchmarks/results/sigreg_<device>.jsonl
    pytest benchmarks/bench_sigreg.py --benchmark-only     as microbenchmarks

Directions are given, so that both project on the same. Value and gradient are checked against float64 before they are timed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastvae
from benchmarks.comparison import Comparison


def eager(z: Tensor, directions: Tensor) -> Tensor:
    """LeJEPA's minimal example, on one device."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype, device=z.device)
    phi = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * 3 / 16)
    weights[0] = weights[-1] = 3 / 16
    angles = (z @ directions).unsqueeze(-1) * t
    error = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return ((error @ (weights * phi)) * z.shape[-2]).mean()


def fused(z: Tensor, directions: Tensor) -> Tensor:
    return fastvae.sigreg(z, directions=directions)


def arguments(n: int, d: int, slices: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    z, directions = 1.1 * torch.randn(n, d, generator=generator) + 0.1, torch.randn(d, slices, generator=generator)
    return [z], [directions / directions.norm(dim=0)]


PROVIDERS = {"fastvae": fused, "eager": eager}
COMPARISON = Comparison(
    "sigreg",
    providers=PROVIDERS,
    exact=dict.fromkeys(PROVIDERS, eager),
    arguments=arguments,
    columns=("n", "dim", "slices"),
    sizes=[(32, 64, 256), (32, 64, 1024), (128, 64, 256), (128, 64, 1024), (2048, 64, 1024)],
    checked_rows=2048,
)
test_sigreg = COMPARISON.microbenchmark()
main = partial(COMPARISON.main, __doc__)

if __name__ == "__main__":
    main()
