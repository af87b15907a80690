"""MMD between 19 groups by `group_mmd`, by an `mmd` for each of the 171 pairs of groups, and by one `mmd` over as many pairs of rows.

    python -m benchmarks.bench_quadratic_form       appends rows to benchmarks/results/quadratic_form_<device>.jsonl
    pytest benchmarks/bench_quadratic_form.py --benchmark-only     as microbenchmarks

The last one ("pooled") is of half of the rows against the other half, and shows what one pass over the pairs costs. Value and
gradient of `group_mmd` are checked against float64 before they are timed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastvae
from benchmarks.comparison import Comparison

GROUPS = 19


def group_by_group(z: Tensor, labels: Tensor, h: float) -> Tensor:
    """What users write: an `mmd` for each pair of groups."""
    members = [z[labels == g] for g in range(GROUPS)]
    values = [fastvae.mmd(members[g], members[k], bandwidth=h) for g in range(GROUPS) for k in range(g)]
    return torch.stack(values).mean()


def one_sweep(z: Tensor, labels: Tensor, h: float) -> Tensor:
    return fastvae.group_mmd(z, labels, num_groups=GROUPS, bandwidth=h).mean()


def pooled(z: Tensor, labels: Tensor, h: float) -> Tensor:
    return fastvae.mmd(z[: len(z) // 2], z[len(z) // 2 :], bandwidth=h)


def arguments(n: int, d: int) -> tuple[list[Tensor], list[Tensor | float]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(GROUPS, (n,), generator=generator)
    return [torch.randn(n, d, generator=generator) + 0.1 * labels[:, None]], [labels, d**0.5]


COMPARISON = Comparison(
    "quadratic_form",
    providers={"group_mmd": one_sweep, "mmd of each pair": group_by_group, "mmd, pooled": pooled},
    exact={"group_mmd": group_by_group},
    arguments=arguments,
    columns=("n", "dim"),
    sizes=[(8192, 16), (8192, 64), (20_000, 16), (20_000, 64)],
    microbenchmarks=2,
    constants={"groups": GROUPS},
    rounds=15,
    checked_rows=2000,
    tolerance=1e-4,
)
test_group_mmd = COMPARISON.microbenchmark()
main = partial(COMPARISON.main, __doc__)

if __name__ == "__main__":
    main()
