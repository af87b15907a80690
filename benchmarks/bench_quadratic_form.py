"""MMD between 19 groups: python -m benchmarks.bench_quadratic_form appends rows to benchmarks/results/quadratic_form_cpu.jsonl (or _cuda).

`group_mmd` against an MMD for each of the 171 pairs of groups, and against one MMD over as many pairs of rows ("pooled": half of the rows
against the other), which says what a sweep costs. The value is checked before it is timed. As microbenchmarks: pytest benchmarks
--benchmark-only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial

import pytest
import torch
from torch import Tensor

import fastvae
from benchmarks.measure import commit, interleaved, machine, peak_extra_mib, summary
from benchmarks.rows import RESULTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = 19
SIZES = [(8192, 16), (8192, 64), (20_000, 16), (20_000, 64)]


def group_by_group(z: Tensor, labels: Tensor, h: float) -> Tensor:
    """What users write: an MMD for each pair of groups."""
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


def problem(n: int, d: int) -> tuple[Tensor, Tensor, float]:
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
    z, labels, h = problem(n, d)
    z.requires_grad_(gradient)

    def run():
        step(PROVIDERS[provider], z, labels, h)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of one case; three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = {"device": machine(DEVICE), "threads": args.threads, "torch": torch.__version__, "commit": commit()}
    common["date"] = datetime.now(timezone.utc).date().isoformat()
    for n, d in SIZES:
        z, labels, h = problem(n, d)
        for direction in ("forward", "forward+backward"):
            leaf = z.detach().requires_grad_(direction != "forward")
            steps = {name: partial(step, provider, leaf, labels, h) for name, provider in PROVIDERS.items()}
            memory = {name: peak_extra_mib(run, DEVICE) for name, run in steps.items()}
            times = interleaved(steps, DEVICE, args.rounds, args.seconds)
            for name in PROVIDERS:
                row = {"benchmark": "quadratic_form", "direction": direction, "n": n, "dim": d, "groups": GROUPS, "dtype": "float32"}
                row |= {"provider": name} | summary(times[name], DEVICE) | {"extra_mib": memory[name]} | common
                with (RESULTS / f"quadratic_form_{DEVICE}.jsonl").open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(
                    json.dumps({key: row[key] for key in ("provider", "direction", "n", "dim", "processor_ms", "extra_mib") if key in row})
                )


if __name__ == "__main__":
    main()
