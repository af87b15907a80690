"""The terms of β-TC-VAE, by `total_correlation` and by eager code.

    python -m benchmarks.bench_total_correlation    appends rows to benchmarks/results/total_correlation_<device>.jsonl
    pytest benchmarks/bench_total_correlation.py --benchmark-only     as microbenchmarks

Eager code holds N×N×D arrays. At 16,384 × 32, where one of them takes 32 GiB, `fastvae` runs alone. Value and gradient are checked against
float64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastvae
from benchmarks.machine import conditions
from benchmarks.measure import DEVICE, summaries, synchronize
from benchmarks.rows import RESULTS, append

DATASET_SIZE = 60_000
BETA = 6.0
SIZES = [(1024, 10), (1024, 32), (2048, 10), (2048, 32), (4096, 10), (4096, 32), (16_384, 32)]
# With more rows fastvae runs alone, and once.
LARGEST_DENSE = 4096
# Rows whose gradient is checked where the dense formula does not fit.
CHECKED_ROWS = 8


def eager(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """What users write: log densities of all pairs in all dimensions."""
    n = z.shape[0]

    def log_density(x: Tensor, m: Tensor, lv: Tensor) -> Tensor:
        return -0.5 * ((x - m).square() * torch.exp(-lv) + lv + math.log(2 * math.pi))

    pairs = log_density(z[:, None], mu[None], logvar[None])
    log_weight = -math.log(n * DATASET_SIZE)
    log_q = torch.logsumexp(pairs.sum(2), 1) + log_weight
    log_marginals = (torch.logsumexp(pairs, 1) + log_weight).sum(1)
    log_conditional = log_density(z, mu, logvar).sum(1)
    log_prior = log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    return (log_conditional - log_q + BETA * (log_q - log_marginals) + log_marginals - log_prior).mean()


def fused(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    terms = fastvae.total_correlation(z, mu, logvar, dataset_size=DATASET_SIZE)
    return terms.mutual_information + BETA * terms.total_correlation + terms.dimensionwise_kl


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"fastvae": fused, "eager": eager}


def batch(n: int, d: int) -> list[Tensor]:
    """Codes as a trained VAE has: posteriors about a third as wide as the prior."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar, eps = (torch.randn(n, d, generator=generator) for _ in range(3))
    logvar = 0.5 * logvar - 2
    return [t.to(DEVICE) for t in (mu + (0.5 * logvar).exp() * eps, mu, logvar)]


def step(provider: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = provider(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs) if inputs[0].requires_grad else ()


def check(provider: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> str:
    """The status of a row, from 512 rows, against the dense formula in float64."""
    leaves = [t[:512].detach().clone().requires_grad_() for t in inputs]
    exact = step(eager, [t.detach().double().requires_grad_() for t in leaves])
    value, grads = step(provider, leaves)
    if abs(value.double() - exact[0]).item() > 1e-5 * abs(exact[0]).item():
        return f"wrong value: {value.item()} for {exact[0].item()}"
    errors = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(grads, exact[1], strict=True)]
    return "ok" if max(errors) < 1e-4 else f"wrong gradient: {max(errors):.1e}"


def gradient_error(inputs: list[Tensor], grad_z: Tensor) -> float:
    """Relative error of dz in a few rows, for which the dense formula in float64 needs only these rows of the arrays."""
    z, mu, logvar = (t.detach().double() for t in inputs)
    rows = torch.arange(0, z.shape[0], z.shape[0] // CHECKED_ROWS, device=z.device)
    part = z[rows].requires_grad_()

    def log_density(x: Tensor, m: Tensor, lv: Tensor) -> Tensor:
        return -0.5 * ((x - m).square() * torch.exp(-lv) + lv)

    pairs = log_density(part[:, None], mu, logvar)
    log_q, log_marginals = torch.logsumexp(pairs.sum(2), 1), torch.logsumexp(pairs, 1).sum(1)
    log_conditional = log_density(part, mu[rows], logvar[rows]).sum(1)
    loss = log_conditional - log_q + BETA * (log_q - log_marginals) + log_marginals + 0.5 * part.square().sum(1)
    (exact,) = torch.autograd.grad(loss.sum() / z.shape[0], part)
    return ((grad_z[rows].double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d"), SIZES[:3])
def test_total_correlation(benchmark, provider, gradient, n, d):
    inputs = batch(n, d)
    assert check(PROVIDERS[provider], inputs) == "ok"
    inputs = [t.requires_grad_(gradient) for t in inputs]

    def run():
        step(PROVIDERS[provider], inputs)
        synchronize(DEVICE)

    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one case; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", help="N×D, as 4096x32; by default those of the committed rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = conditions(DEVICE)
    sizes = SIZES if args.sizes is None else [tuple(map(int, size.split("x"))) for size in args.sizes]
    for n, d in sizes:
        names = ["fastvae"] if n > LARGEST_DENSE else list(PROVIDERS)
        inputs = batch(n, d)
        status = {name: check(PROVIDERS[name], inputs) for name in names}
        for direction in ("forward", "forward+backward"):
            if n > LARGEST_DENSE and direction == "forward":
                continue
            leaves = [t.detach().requires_grad_(direction != "forward") for t in inputs]
            steps = {name: partial(step, PROVIDERS[name], leaves) for name in names if status[name] == "ok"}
            found = summaries(steps, DEVICE, 1 if n > LARGEST_DENSE else args.rounds, args.seconds, memory=True)
            for name in names:
                row = {"benchmark": "total_correlation", "direction": direction, "n": n, "dim": d, "dtype": "float32"}
                row |= {"provider": name, "status": status[name], **found.get(name, {})}
                if n > LARGEST_DENSE:
                    row["gradient_relative_error"] = gradient_error(leaves, step(PROVIDERS[name], leaves)[1][0])
                print(json.dumps(row), flush=True)
                append(RESULTS / f"total_correlation_{DEVICE}.jsonl", row | common)


if __name__ == "__main__":
    main()
