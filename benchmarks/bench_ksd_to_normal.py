"""`ksd_to_normal` against the formula in plain PyTorch, and against `mmd_to_normal`, the other discrepancy to N(0, I).

    python -m benchmarks.bench_ksd_to_normal       appends rows to benchmarks/results/ksd_<device>.jsonl
    pytest benchmarks/bench_ksd_to_normal.py --benchmark-only     as microbenchmarks

Values are checked against float64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastvae
from benchmarks.machine import conditions
from benchmarks.measure import DEVICE, summaries, synchronize
from benchmarks.rows import RESULTS, append
from fastvae import reference

SIZES = [(32, 64), (128, 64), (512, 64), (2048, 64)]


def eager_imq(z: Tensor, h: float) -> Tensor:
    """What users write, from the products of rows, with h²/(h² + d²) for the kernel."""
    products = z @ z.T
    squares = products.diagonal()
    d2 = squares[:, None] + squares - 2 * products
    k = 1 / (1 + d2 / h**2)
    return (products * k - 2 / h**2 * (d2 - z.shape[1]) * k**2 - 8 / h**4 * d2 * k**3).mean()


PROVIDERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "ksd_to_normal, imq": lambda z, h: fastvae.ksd_to_normal(z, bandwidth=h),
    "ksd_to_normal, rbf": lambda z, h: fastvae.ksd_to_normal(z, bandwidth=h, kernel="rbf"),
    "mmd_to_normal, rbf": lambda z, h: fastvae.mmd_to_normal(z, bandwidth=h),
    "eager, imq": eager_imq,
}


def inputs(n: int, d: int) -> tuple[Tensor, float]:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    h = d**0.5
    for name in ("ksd_to_normal, imq", "ksd_to_normal, rbf", "eager, imq"):
        few = z[:512]
        exact = reference.ksd_to_normal(few.double(), bandwidth=h, kernel=name[-3:]).item()
        assert PROVIDERS[name](few, h).item() == pytest.approx(exact, rel=1e-4), name
    return z, h


def step(provider: Callable[[Tensor, float], Tensor], z: Tensor, h: float) -> None:
    value = provider(z, h)
    if z.requires_grad:
        torch.autograd.grad(value, z)


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_ksd_to_normal(benchmark, provider, gradient, n, d):
    z, h = inputs(n, d)
    z.requires_grad_(gradient)

    def run():
        step(PROVIDERS[provider], z, h)
        synchronize(DEVICE)

    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one case; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = conditions(DEVICE)
    for n, d in SIZES:
        z, h = inputs(n, d)
        for direction in ("forward", "forward+backward"):
            leaf = z.detach().requires_grad_(direction != "forward")
            steps = {name: partial(step, provider, leaf, h) for name, provider in PROVIDERS.items()}
            for name, found in summaries(steps, DEVICE, args.rounds, args.seconds, memory=True).items():
                row = {"benchmark": "ksd_to_normal", "direction": direction, "n": n, "dim": d, "dtype": "float32"}
                row |= {"provider": name, **found}
                print(json.dumps(row), flush=True)
                append(RESULTS / f"ksd_{DEVICE}.jsonl", row | common)


if __name__ == "__main__":
    main()
