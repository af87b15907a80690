"""MMD between 19 groups by `group_mmd`, by an `mmd` for each of the 171 pairs of groups, and by one `mmd` over as many pairs of rows.

    python -m benchmarks.bench_quadratic_form       appends rows to benchmarks/results/quadratic_form_<device>.jsonl
    pytest benchmarks/bench_quadratic_form.py --benchmark-only     as microbenchmarks

The last one ("pooled") is of half of the rows against the other half, and shows what one pass over the pairs costs. Values are checked
before they are timed.
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

GROUPS = 19
SIZES = [(8192, 16), (8192, 64), (20_000, 16), (20_000, 64)]


def group_by_group(z: Tensor, labels: Tensor, h: float) -> Tensor:
    """What users write: an `mmd` for each pair of groups."""
    members = [z[labels == g] for g in range(GROUPS)]
    values = [fastvae.mmd(members[g], members[k], bandwidth=h) for g in range(GROUPS) for k in range(g)]
    return torch.stack(values).mean()


def one_sweep(z: Tensor, labels: Tensor, h: float) -> Tensor:
    return fastvae.group_mmd(z, labels, num_groups=GROUPS, bandwidth=h).mean()


def pooled(z: Tensor, labels: Tensor, h: float) -> Tensor:
    return fastvae.mmd(z[: len(z) // 2], z[len(z) // 2 :], bandwidth=h)


PROVIDERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "group_mmd": one_sweep,
    "mmd of each pair": group_by_group,
    "mmd, pooled": pooled,
}


def inputs(n: int, d: int) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(GROUPS, (n,), generator=generator)
    z = torch.randn(n, d, generator=generator) + 0.1 * labels[:, None]
    z, labels = z.to(DEVICE), labels.to(DEVICE)
    exact = group_by_group(z[:2000].double(), labels[:2000], d**0.5).item()
    assert one_sweep(z[:2000], labels[:2000], d**0.5).item() == pytest.approx(exact, rel=1e-4)
    return z, labels, d**0.5


def step(provider: Callable[[Tensor, Tensor, float], Tensor], z: Tensor, labels: Tensor, h: float) -> None:
    value = provider(z, labels, h)
    if z.requires_grad:
        torch.autograd.grad(value, z)


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d"), SIZES[:2])
def test_group_mmd(benchmark, provider, gradient, n, d):
    z, labels, h = inputs(n, d)
    z.requires_grad_(gradient)

    def run():
        step(PROVIDERS[provider], z, labels, h)
        synchronize(DEVICE)

    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one case; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = conditions(DEVICE)
    for n, d in SIZES:
        z, labels, h = inputs(n, d)
        for direction in ("forward", "forward+backward"):
            leaf = z.detach().requires_grad_(direction != "forward")
            steps = {name: partial(step, provider, leaf, labels, h) for name, provider in PROVIDERS.items()}
            for name, found in summaries(steps, DEVICE, args.rounds, args.seconds, memory=True).items():
                row = {"benchmark": "quadratic_form", "direction": direction, "n": n, "dim": d, "groups": GROUPS, "dtype": "float32"}
                row |= {"provider": name, **found}
                print(json.dumps(row), flush=True)
                append(RESULTS / f"quadratic_form_{DEVICE}.jsonl", row | common)


if __name__ == "__main__":
    main()
