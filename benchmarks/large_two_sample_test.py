"""A two-sample test at the size where others run out of memory (alibi-detect#597): 20,000 × 32 against 20,000 × 32, 500 permutations.

Run: python -m benchmarks.large_two_sample_test. On this CPU in float32, progress shown: time, extra memory, and the statistic and the first
permutations against sums in float64 that share no code with the test. The row goes to benchmarks/results/large_two_sample_test.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastvae
from benchmarks.large_mmd import peak_bytes

RESULTS = Path(__file__).parent / "results" / "large_two_sample_test.jsonl"
N, D, PERMUTATIONS, SEED = 20_000, 32, 500, 1
CHECKED = 3


def exact_statistics(z: torch.Tensor, h: float, splits: torch.Tensor) -> torch.Tensor:
    """Unbiased MMD² in float64 of splits (2N, C), True where a row counts as one of x."""
    n = z.shape[0] // 2
    x = splits.double()
    sums = []
    for start in range(0, len(z), 1024):
        rows = slice(start, start + 1024)
        k = torch.exp(torch.cdist(z[rows], z).square_().mul_(-0.5 / h**2))
        k[torch.arange(len(k)), torch.arange(start, start + len(k))] = 0
        to_x, to_all = k @ x, k.sum(1, keepdim=True)
        sums.append(torch.stack([(x[rows] * to_x).sum(0), ((1 - x[rows]) * to_x).sum(0), ((1 - x[rows]) * (to_all - to_x)).sum(0)]))
    xx, xy, yy = torch.stack(sums).sum(0)
    return (xx + yy) / (n * (n - 1)) - 2 * xy / n**2


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator) + 0.01
    fastvae.two_sample_test(x[:600], y[:600], permutations=10)
    before, start = peak_bytes(), time.perf_counter()
    h = fastvae.median_bandwidth(x, y).item()
    median_seconds = time.perf_counter() - start
    start = time.perf_counter()
    result = fastvae.two_sample_test(x, y, permutations=PERMUTATIONS, seed=SEED, progress=True)
    seconds = time.perf_counter() - start
    extra = peak_bytes() - before
    generator = torch.Generator().manual_seed(SEED)
    splits = torch.zeros(2 * N, 1 + CHECKED, dtype=torch.bool)
    splits[:N, 0] = True
    for c in range(1, 1 + CHECKED):
        splits[torch.randperm(2 * N, generator=generator)[:N], c] = True
    expected = exact_statistics(torch.cat([x, y]).double(), h, splits)
    actual = torch.cat([torch.tensor([result.statistic]), result.null[:CHECKED]])
    row = {
        "case": f"two_sample_test, {N} x {D} against {N} x {D}, {PERMUTATIONS} permutations, float32",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "p_value": result.p_value,
        "statistic": result.statistic,
        "error_in_null_deviations": ((actual - expected).abs().max() / result.null.std()).item(),
        "median_bandwidth_seconds": round(median_seconds, 2),
        "seconds": round(seconds, 2),
        "extra_mib": round(extra / 2**20),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
