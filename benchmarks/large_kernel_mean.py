"""MMD² with its gradient of 5,120 × 768 generated rows to a `KernelMean` of 4,096 landmarks, the sizes of iRDM.

    python -m benchmarks.large_kernel_mean      appends a row to benchmarks/results/large_kernel_mean.jsonl, in two minutes

Processor time of one thread in float32, beside that of `mmd` to as many rows and of the usual formula, which stores both kernel matrices.
All three run in turn; their values and gradients are compared before.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastvae
from benchmarks import rows
from benchmarks.machine import conditions
from benchmarks.measure import peak_extra_mib

RESULTS = rows.RESULTS / "large_kernel_mean.jsonl"
N, M, D, ROUNDS = 5120, 4096, 768, 5


def usual(x: Tensor, mean: fastvae.KernelMean) -> Tensor:
    gamma, z = 0.5 / mean.bandwidth[0] ** 2, mean.points
    assert mean.weights is not None

    def gram(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-gamma * (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0))

    return gram(x, x).mean() - 2 * (gram(x, z) @ mean.weights.to(x)).mean() + mean.norm.to(x)


def measure(n: int = N, m: int = M, d: int = D, rounds: int = ROUNDS) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(n, d, generator=generator) + 0.05, torch.randn(m, d, generator=generator)
    weights = (1 + torch.randn(m, generator=generator)) / m
    mean = fastvae.KernelMean(z, weights, norm=0.6, bandwidth=math.sqrt(2 * d))
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "kernel_mean": lambda x: fastvae.mmd(x, mean),
        "mmd": lambda x: fastvae.mmd(x, z, bandwidth=mean.bandwidth),
        "usual": lambda x: usual(x, mean),
    }

    def run(name: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        value = calls[name](leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    (value, gradient), (other, expected) = run("kernel_mean"), run("usual")
    torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    error = float((gradient - expected).abs().max() / expected.abs().max())
    assert error < 1e-3, error
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls:
            start = time.process_time()
            run(name)
            times[name].append(time.process_time() - start)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "case": f"mmd of {n} x {d} to a KernelMean of {m} points, value and gradient, float32",
        "gradient_difference": error,
        **{f"{name}_seconds": round(found, 4) for name, found in seconds.items()},
        "over_mmd": round(seconds["kernel_mean"] / seconds["mmd"], 3),
        "over_usual": round(seconds["kernel_mean"] / seconds["usual"], 3),
        **{f"{name}_extra_mib": peak_extra_mib(lambda name=name: run(name), "cpu") for name in ("kernel_mean", "usual")},  # type: ignore[misc]
        **conditions("cpu"),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    row = measure()
    rows.append(RESULTS, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
