"""Log densities and drifting on a CPU against eager PyTorch, scikit-learn and KeOps: python -m benchmarks.bench_log_kernel_density.

All providers of a case run in one process, in turn, after their values are compared. Rows are appended to
benchmarks/results/log_kernel_density_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastvae
from benchmarks.machine import conditions
from benchmarks.measure import interleaved, summary
from benchmarks.rows import RESULTS, append
from fastvae import recipes

Provider = Callable[[Tensor, Tensor, float], Any]


def fused(x: Tensor, y: Tensor, h: float) -> Tensor:
    return fastvae.log_kernel_density(x, y, bandwidth=h)


def eager(x: Tensor, y: Tensor, h: float) -> Tensor:
    """What users write: an N×M array."""
    return (torch.cdist(x, y).square() / (-2 * h * h)).logsumexp(1) - math.log(len(y))


def scikit_learn(x: Tensor, y: Tensor, h: float) -> Tensor:
    from sklearn.neighbors import KernelDensity

    # Its tree is slower than all pairs in 16 dimensions. Its leaves are as large as y, so that it takes all pairs.
    estimate = KernelDensity(bandwidth=h, leaf_size=len(y)).fit(y.numpy())
    return torch.from_numpy(estimate.score_samples(x.numpy())) + 0.5 * x.shape[1] * math.log(2 * math.pi * h * h)


def keops(x: Tensor, y: Tensor, h: float) -> Tensor:
    from pykeops.torch import LazyTensor

    d2 = ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1)
    return (d2 / (-2 * h * h)).logsumexp(1)[:, 0] - math.log(len(y))


def plain_drifting(generated: Tensor, positives: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
    """The published formula, as `tests.test_drifting` has it."""
    from tests.test_drifting import formula

    ones = [z.new_ones(z.shape[:-1]) for z in (generated, positives)]
    return formula(generated, positives, negatives, *ones, weights)


def steps_of(n: int, dim: int, gradient: bool) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dim, generator=generator) for _ in range(2))
    h = 0.5 * dim**0.5
    providers: dict[str, Provider] = {"fastvae": fused, "eager": eager}
    if not gradient and n <= 8192:
        providers["scikit-learn"] = scikit_learn
    if importlib.util.find_spec("pykeops") is not None:
        providers["KeOps"] = keops
    exact = eager(x.double(), y.double(), h)
    for provider in providers.values():
        torch.testing.assert_close(provider(x, y, h).double(), exact, rtol=1e-4, atol=1e-4)

    def step(provider: Provider) -> Callable[[], object]:
        if not gradient:
            return lambda: provider(x, y, h)
        leaf = x.clone().requires_grad_()
        return lambda: torch.autograd.grad(provider(leaf, y, h).sum(), leaf)

    return {name: step(provider) for name, provider in providers.items()}


def drifting_steps() -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    generated, positives, negatives = (torch.randn(128, rows, 512, generator=generator) for rows in (64, 64, 32))
    weights, leaf = torch.full((128, 32), 1.5), generated.requires_grad_()
    losses = {
        "fastvae": lambda: recipes.drifting(leaf, positives, negatives, negatives_weights=weights),
        "eager": lambda: plain_drifting(leaf, positives, negatives, weights),
    }
    torch.testing.assert_close(losses["fastvae"](), losses["eager"](), rtol=1e-4, atol=0)

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss().mean(), leaf)

    return {name: step(loss) for name, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[32, 128, 2048, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [("log_kernel_density", n, dim, gradient) for n in args.n for dim in args.dims for gradient in (False, True)]
    for benchmark, n, dim, gradient in [*cases, ("drifting", 128 * 64, 512, True)]:
        steps = drifting_steps() if benchmark == "drifting" else steps_of(n, dim, gradient)
        times = interleaved(steps, "cpu", 200, args.seconds)
        for name, measured in times.items():
            row = {
                "benchmark": benchmark, "direction": "forward+backward" if gradient else "forward", "n": n, "dim": dim, "dtype": "float32",
                "provider": name, "status": "ok", **summary(measured, "cpu"), **conditions("cpu"),
            }  # fmt: skip
            print(row)
            append(RESULTS / "log_kernel_density_cpu.jsonl", row)


if __name__ == "__main__":
    main()
