"""`ksd_to_normal` against the formula in plain PyTorch, and against `mmd_to_normal`, the other discrepancy to N(0, I).

    python -m benchmarks.bench_ksd_to_normal       appends rows to benchmarks/results/ksd_<device>.jsonl
    pytest benchmarks/bench_ksd_to_normal.py --benchmark-only     as microbenchmarks

Values and gradients of the Stein discrepancy are checked against float64 before they are timed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastvae
from benchmarks.comparison import Comparison
from fastvae import reference


def eager_imq(z: Tensor, h: float) -> Tensor:
    """What users write, from the products of rows, with h²/(h² + d²) for the kernel."""
    products = z @ z.T
    squares = products.diagonal()
    d2 = squares[:, None] + squares - 2 * products
    k = 1 / (1 + d2 / h**2)
    return (products * k - 2 / h**2 * (d2 - z.shape[1]) * k**2 - 8 / h**4 * d2 * k**3).mean()


def arguments(n: int, d: int) -> tuple[list[Tensor], list[float]]:
    return [torch.randn(n, d, generator=torch.Generator().manual_seed(0))], [d**0.5]


def exact(z: Tensor, h: float, kernel: str) -> Tensor:
    return reference.ksd_to_normal(z, bandwidth=h, kernel=kernel)


COMPARISON = Comparison(
    "ksd_to_normal",
    providers={
        "ksd_to_normal, imq": lambda z, h: fastvae.ksd_to_normal(z, bandwidth=h),
        "ksd_to_normal, rbf": lambda z, h: fastvae.ksd_to_normal(z, bandwidth=h, kernel="rbf"),
        "mmd_to_normal, rbf": lambda z, h: fastvae.mmd_to_normal(z, bandwidth=h),
        "eager, imq": eager_imq,
    },
    exact={name: partial(exact, kernel=name[-3:]) for name in ("ksd_to_normal, imq", "ksd_to_normal, rbf", "eager, imq")},
    arguments=arguments,
    columns=("n", "dim"),
    sizes=[(32, 64), (128, 64), (512, 64), (2048, 64)],
    file="ksd",
    rounds=200,
    tolerance=1e-4,
)
test_ksd_to_normal = COMPARISON.microbenchmark()
main = partial(COMPARISON.main, __doc__)

if __name__ == "__main__":
    main()
