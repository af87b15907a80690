"""`two_sample_test` of 20,000 × 32 against 20,000 × 32 points with 500 permutations, where others run out of memory (alibi-detect#597).

    python -m benchmarks.large_two_sample_test      appends a row to benchmarks/results/large_two_sample_test.jsonl, in two minutes
    ... --approximate    to approximate_two_sample_test.jsonl, for 100,000 × 32 by random features and by the Nyström approximation

Time and extra memory on this CPU in float32. The statistic and those of the first permutations are checked against sums in float64 that
share no code with the test; the statistics of approximations are compared with the exact statistic.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

import fastvae
from benchmarks import rows
from benchmarks.machine import conditions
from benchmarks.measure import run_once
from fastvae import two_sample

RESULTS = rows.RESULTS / "large_two_sample_test.jsonl"
APPROXIMATIONS = rows.RESULTS / "approximate_two_sample_test.jsonl"
N, D, PERMUTATIONS, SEED = 20_000, 32, 500, 1
CHECKED = 3


def first_splits(n: int, count: int, seed: int) -> torch.Tensor:
    """(2n, 1 + count): the observed split, and the first permutations that `two_sample_test` draws from the seed."""
    number = torch.empty(1, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
    observed = torch.arange(2 * n)[:, None] < n
    return torch.cat([observed, two_sample._subsets(count, 2 * n, n, np.random.PCG64(number.numpy())).T], 1)


def exact_statistics(z: torch.Tensor, h: float, splits: torch.Tensor) -> torch.Tensor:
    """Unbiased MMD² in float64 of each split, a column of `splits` (2N, C): True for the rows of x."""
    n = z.shape[0] // 2
    x = splits.double()
    sums = []
    for start in range(0, len(z), 1024):
        block = slice(start, start + 1024)
        k = torch.exp(torch.cdist(z[block], z).square_().mul_(-0.5 / h**2))
        k[torch.arange(len(k)), torch.arange(start, start + len(k))] = 0
        to_x, to_all = k @ x, k.sum(1, keepdim=True)
        own, rest = x[block], 1 - x[block]
        sums.append(torch.stack([(own * to_x).sum(0), (rest * to_x).sum(0), (rest * (to_all - to_x)).sum(0)]))
    xx, xy, yy = torch.stack(sums).sum(0)
    return (xx + yy) / (n * (n - 1)) - 2 * xy / n**2


def approximations(n: int = 5 * N) -> list[dict[str, object]]:
    """Rows of tests in time linear in n, whose error is that of the kernel and not of the arithmetic."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, D, generator=generator), torch.randn(n, D, generator=generator) + 0.005
    h = fastvae.median_bandwidth(x[:4096], y[:4096]).item()
    exact = fastvae.mmd(x, y, bandwidth=h, estimator="unbiased").item()
    found: list[dict[str, object]] = []
    for method in (fastvae.RandomFeatures(512), fastvae.NystromFeatures(512)):
        fastvae.two_sample_test(x[:600], y[:600], permutations=10, method=method)

        def test(method: object = method) -> fastvae.TwoSampleTest:
            return fastvae.two_sample_test(x, y, bandwidth=h, permutations=PERMUTATIONS, seed=SEED, method=method)  # type: ignore[arg-type]

        result, measured = run_once(test)
        row = {
            "case": f"two_sample_test by {method}, {n} x {D} against {n} x {D}, {PERMUTATIONS} permutations, float32",
            "p_value": result.p_value,
            "statistic": result.statistic,
            "exact_statistic": exact,
            "error_in_null_deviations": (abs(result.statistic - exact) / result.null.std()).item(),
            **measured,
            **conditions("cpu"),
        }
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--approximate", action="store_true", help="rows of approximations for larger samples")
    if parser.parse_args().approximate:
        for row in approximations():
            rows.append(APPROXIMATIONS, row)
            print(json.dumps(row, indent=1))
        return
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator) + 0.01
    fastvae.two_sample_test(x[:600], y[:600], permutations=10)
    h, of_median = run_once(lambda: fastvae.median_bandwidth(x, y).item())
    result, measured = run_once(lambda: fastvae.two_sample_test(x, y, permutations=PERMUTATIONS, seed=SEED, progress=True))
    expected = exact_statistics(torch.cat([x, y]).double(), h, first_splits(N, CHECKED, SEED))
    actual = torch.cat([torch.tensor([result.statistic]), result.null[:CHECKED]])
    row = {
        "case": f"two_sample_test, {N} x {D} against {N} x {D}, {PERMUTATIONS} permutations, float32",
        "p_value": result.p_value,
        "statistic": result.statistic,
        "error_in_null_deviations": ((actual - expected).abs().max() / result.null.std()).item(),
        "median_bandwidth_seconds": of_median["seconds"],
        **measured,
        **conditions("cpu"),
    }
    rows.append(RESULTS, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
