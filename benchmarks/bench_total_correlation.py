"""The terms of β-TC-VAE, by `total_correlation` and by eager code.

    python -m benchmarks.bench_total_correlation    appends rows to benchmarks/results/total_correlation_<device>.jsonl
    pytest benchmarks/bench_total_correlation.py --benchmark-only     as microbenchmarks

Eager code holds N×N×D arrays. At 16,384 × 32, where one of them takes 32 GiB, `fastvae` runs alone. Value and gradient are checked against
float64 before they are timed.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import fastvae
from benchmarks.comparison import Comparison

DATASET_SIZE = 60_000
BETA = 6.0
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


def arguments(n: int, d: int) -> tuple[list[Tensor], list[Tensor]]:
    """Codes as a trained VAE has: posteriors about a third as wide as the prior."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar, eps = (torch.randn(n, d, generator=generator) for _ in range(3))
    logvar = 0.5 * logvar - 2
    return [mu + (0.5 * logvar).exp() * eps, mu, logvar], []


def gradient_error(inputs: list[Tensor], _: list[Tensor], grad_z: Tensor) -> float:
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


PROVIDERS = {"fastvae": fused, "eager": eager}
COMPARISON = Comparison(
    "total_correlation",
    providers=PROVIDERS,
    exact=dict.fromkeys(PROVIDERS, eager),
    arguments=arguments,
    columns=("n", "dim"),
    sizes=[(1024, 10), (1024, 32), (2048, 10), (2048, 32), (4096, 10), (4096, 32), (16_384, 32)],
    microbenchmarks=3,
    largest_dense=4096,
    gradient_error=gradient_error,
)
test_total_correlation = COMPARISON.microbenchmark()
main = partial(COMPARISON.main, __doc__)

if __name__ == "__main__":
    main()
