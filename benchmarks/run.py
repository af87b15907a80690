"""`mmd` and `reparameterize_kl` against eager, compiled, KeOps and geomloss, over N, D and bandwidths.

    python -m benchmarks.run                        on this machine's GPU, or else on one thread of its CPU
    python -m benchmarks.run --n 8192 --dims 16 --bandwidths 1 --series --seconds 10

All providers of a case run in one process, in turn. Each one's value and gradient are checked against float64 before it is timed; if it is
wrong, missing or out of memory, its row says so. Rows are appended to benchmarks/results/mmd_<device>.jsonl and
reparameterize_kl_<device>.jsonl. KeOps is built with CXXFLAGS: on a CPU its default build is several times slower than one with
'-march=native -ffast-math'. With THP_MEM_ALLOC_ENABLE=1 PyTorch asks for huge pages, and providers are named "…, huge pages".
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae
from benchmarks.machine import Ceilings, conditions
from benchmarks.measure import DEVICE, summaries
from benchmarks.providers import (
    SCALE,
    SHIFT,
    Bandwidths,
    Provider,
    bandwidths_of,
    eager_reparameterize_kl,
    expected,
    failure,
    providers,
    samples,
    verdict,
)
from benchmarks.rows import HUGE_PAGES, RESULTS, append
from fastvae import reference

DIRECTIONS = ("forward", "forward+backward")
# Rows of the largest samples that are checked against float64.
CHECKED_ROWS = 8192
# Page faults take a third to two thirds of the time of an eager step.
SUFFIX = HUGE_PAGES * (os.environ.get("THP_MEM_ALLOC_ENABLE") == "1")


def step_of(provider: Provider, x: Tensor, y: Tensor, h: Bandwidths, direction: str) -> Callable[[], Tensor]:
    if direction == "forward":
        return lambda: provider.compute(x, y, h)
    leaf = x.clone().requires_grad_()

    def step() -> Tensor:
        leaf.grad = None
        value = provider.compute(leaf, y, h)
        value.backward()
        return value.detach()

    return step


def floor_ms(n: int, dim: int, direction: str, device: str, ceilings: Ceilings) -> float:
    """The least time at the measured rates, symmetric halves counted once. A GPU overlaps products and exponentials, a CPU does not."""
    pairs = 2 * n * n
    products = pairs * dim + (2 * n * n * dim if direction != "forward" else 0)
    times = (products / ceilings.multiply_adds, pairs / ceilings.exponentials)
    return 1e3 * (max(times) if device == "cuda" else sum(times))


def population(dim: int, h: Bandwidths) -> float:
    """MMD² of the distributions of `samples`: a difference ~ N(δ, v·I) has E k = (h²/(h²+v))^{D/2}·exp(−D·δ²/(2(h²+v)))."""

    def mean_kernel(variance: float, shift: float) -> float:
        return sum((b**2 / (b**2 + variance)) ** (dim / 2) * math.exp(-dim * shift**2 / (2 * (b**2 + variance))) for b in h)

    return mean_kernel(2 * SCALE**2, 0) + mean_kernel(2, 0) - 2 * mean_kernel(1 + SCALE**2, SHIFT)


def verdict_by_part(provider: Provider, x: Tensor, y: Tensor, h: Bandwidths) -> str:
    """`verdict` on the first rows, and whether the value over all rows is within 10 % of the population's: float64 would take minutes."""
    part = x[:CHECKED_ROWS], y[:CHECKED_ROWS]
    status = verdict(provider, *part, h, expected(*part, h))
    if status != "ok" or provider.prior:
        return status
    try:
        value = provider.compute(x, y, h).item()
    except Exception as error:
        return failure(error)
    wrong = abs(value / population(x.shape[1], h) - 1)
    return "ok" if wrong <= 0.1 else f"wrong value: {wrong:.1e} from the population's"


def cases(args: argparse.Namespace) -> list[tuple[int, int, int, tuple[str, ...]]]:
    """(N, D, bandwidths, directions): over N with one D, the largest, and over D and bandwidths with one N."""
    found = [(n, args.series_dim, 1, tuple(args.directions)) for n in args.series]
    found += [(n, dim, 1, DIRECTIONS[:1]) for n, dim in args.largest]
    return found + [(args.n, dim, count, DIRECTIONS[1:]) for dim in args.dims for count in args.bandwidths]


def mmd_rows(args: argparse.Namespace, device: str, ceilings: Ceilings, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    chosen = [p for p in providers(device) if p.name in (args.providers or [p.name])]
    for n, dim, count, directions in cases(args):
        x, y = samples(n, dim, device)
        h = bandwidths_of(dim, count)
        # After a few shapes torch.compile silently falls back to eager.
        torch.compiler.reset()
        if (n, dim) in args.largest:
            status = {p.name: p.refuses(n, dim) or verdict_by_part(p, x, y, h) for p in chosen}
        else:
            exact = expected(x, y, h)
            status = {p.name: p.refuses(n, dim) or verdict(p, x, y, h, exact) for p in chosen}
        for direction in directions:
            case = {"benchmark": "mmd", "direction": direction, "n": n, "m": n, "dim": dim, "bandwidths": count, "dtype": "float32"}
            steps = {p.name: step_of(p, x, y, h, direction) for p in chosen if status[p.name] == "ok"}
            found = summaries(steps, device, args.rounds, args.seconds, memory=True)
            for provider in chosen:
                row = {**case, "provider": provider.name + SUFFIX, "status": status[provider.name], "note": provider.note}
                if provider.name in found:
                    row |= found[provider.name]
                    row["pairs_per_second"] = round(3 * n * n / (1e-3 * row["median_ms"]))
                    if count == 1 and not provider.prior:
                        row["fraction_of_ceiling"] = round(floor_ms(n, dim, direction, device, ceilings) / row["median_ms"], 4)
                yield row | common


def fused_reparameterize_kl(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    return fastvae.reparameterize_kl(mu, logvar, eps=eps)


def reparameterize_kl_rows(args: argparse.Namespace, device: str, ceilings: Ceilings, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    computed: dict[str, Any] = {
        "fastvae": fused_reparameterize_kl,
        "fastvae, torch.compile": torch.compile(fused_reparameterize_kl, dynamic=False),
        "eager": eager_reparameterize_kl,
        "torch.compile": torch.compile(eager_reparameterize_kl, dynamic=False),
    }
    for n, dim in args.row_shapes:
        generator = torch.Generator().manual_seed(0)
        mu, logvar, eps, dz = (torch.randn(n, dim, generator=generator).to(device) for _ in range(4))
        dkl = torch.full((n,), 1 / n, device=device)
        exact = reference.reparameterize_kl(mu[:64].double(), logvar[:64].double(), eps=eps[:64].double())
        status = {}
        for name, compute in computed.items():
            outputs = compute(mu, logvar, eps)
            close = all(torch.allclose(t[:64].double(), e, rtol=1e-4, atol=1e-4) for t, e in zip(outputs, exact, strict=True))
            status[name] = "ok" if close else "wrong value"
        for direction in DIRECTIONS:
            leaves = [t.clone().requires_grad_(direction != "forward") for t in (mu, logvar)]

            def step(compute: Any, leaves: list[Tensor] = leaves, eps: Any = eps, grads: Any = (dz, dkl)) -> None:
                outputs = compute(*leaves, eps)
                if leaves[0].requires_grad:
                    torch.autograd.grad(outputs, leaves, grads)

            steps = {name: partial(step, compute) for name, compute in computed.items() if status[name] == "ok"}
            found = summaries(steps, device, args.rounds, args.seconds, memory=True)
            moved = 4 * n * dim * (4 if direction == "forward" else 4 + 7)
            for name in computed:
                row = {"benchmark": "reparameterize_kl", "direction": direction, "n": n, "dim": dim, "dtype": "float32"}
                row |= {"provider": name + SUFFIX, "status": status[name], "note": ""}
                if name in found:
                    row |= found[name]
                    row["fraction_of_ceiling"] = round(1e3 * moved / ceilings.copied / row["median_ms"], 4)
                yield row | common


def describe(row: dict[str, Any]) -> str:
    case = f"{row['benchmark']:18} {row['direction']:16} N {row['n']:6} D {row['dim']:4} bandwidths {row.get('bandwidths', '-')}"
    if "median_ms" not in row:
        return f"{case} {row['provider']:26} {row['status']}"
    fraction = f", {row['fraction_of_ceiling']:.0%} of the ceiling" if "fraction_of_ceiling" in row else ""
    memory = "" if row["extra_mib"] is None else f", {row['extra_mib']:.0f} MiB"
    return f"{case} {row['provider']:26} {row['median_ms']:10.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]{memory}{fraction}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = DEVICE == "cuda"
    parser.add_argument("--n", type=int, default=16384 if gpu else 4096, help="N = M of the cases over D and bandwidths")
    parser.add_argument(
        "--series", type=int, nargs="*", default=[65536, 16384, 4096] if gpu else [2048, 4096, 8192], help="N = M, with one D"
    )
    parser.add_argument("--series-dim", type=int, default=64, help="their D")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="of the cases --series")
    parser.add_argument("--dims", type=int, nargs="*", default=[2, 16, 64, 256])
    parser.add_argument("--bandwidths", type=int, nargs="+", choices=[1, 5], default=[1, 5])
    parser.add_argument("--largest", nargs="*", default=["1000000x16"] if gpu else [], help="N×D, whose value alone is timed")
    rows_default = ["65536x64", "262144x64", "65536x512"] if gpu else ["4096x64", "65536x64", "16384x512"]
    parser.add_argument("--row-shapes", nargs="*", default=rows_default, help="N×D of reparameterize_kl, as 4096x64")
    parser.add_argument("--providers", nargs="+", help="names of the providers of mmd; all by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one case; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.row_shapes, args.largest = ([tuple(map(int, s.split("x"))) for s in shapes] for shapes in (args.row_shapes, args.largest))
    torch.set_num_threads(args.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    ceilings = Ceilings.measure(DEVICE)
    print("ceilings:", ", ".join(f"{value:.3g} {name}/s" for name, value in vars(ceilings).items()), flush=True)
    common = {"ceilings": {name: float(f"{value:.4g}") for name, value in vars(ceilings).items()}, **conditions(DEVICE)}
    fractions = []
    for benchmark, run in (("reparameterize_kl", reparameterize_kl_rows), ("mmd", mmd_rows)):
        for row in run(args, DEVICE, ceilings, common):
            print(describe(row), flush=True)
            append(args.output / f"{benchmark}_{DEVICE}.jsonl", row)
            if row["provider"] == "fastvae" and benchmark == "mmd" and "fraction_of_ceiling" in row:
                fractions.append(row["fraction_of_ceiling"])
    if fractions:
        print(f"fastvae.mmd reaches {statistics.median(fractions):.0%} of the measured ceiling in the median case")


if __name__ == "__main__":
    main()
