"""The sweep: every provider on every case, in one process, interleaved.

    python -m benchmarks.run                        on this machine's GPU, or else its CPU, one thread
    python -m benchmarks.run --n 8192 --dims 16 --bandwidths 1 --series --seconds 10

A provider's value and gradient are checked against float64 before it is timed; one that is wrong, missing or out of memory has a row that
says so. Rows are appended to benchmarks/results/mmd_<device>.jsonl and reparameterize_kl_<device>.jsonl, plots and the table drawn from
them. CXXFLAGS is what KeOps is built with: its default build is several times slower on a CPU than '-march=native -ffast-math'. With
THP_MEM_ALLOC_ENABLE=1 PyTorch asks for huge pages, and the rows are of providers "…, huge pages".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastvae
from benchmarks.measure import Ceilings, commit, interleaved, machine, peak_extra_mib, summary
from benchmarks.providers import Provider, expected, providers, versions
from benchmarks.rows import HUGE_PAGES, RESULTS
from fastvae import reference

DIRECTIONS = ("forward", "forward+backward")
# Five, each half of the next in h², around the square root of the number of features.
LADDER = (0.5, 0.5**0.5, 1.0, 2**0.5, 2.0)
# The worst of eager float32 at these sizes is a tenth of it.
TOLERANCE = 1e-3
# x ~ N(SHIFT, SCALE²·I), y ~ N(0, I).
SCALE, SHIFT = 0.9, 0.1
# Rows of the largest samples that are held to float64.
PART = 8192


# A third to two thirds of the time of an eager step are page faults.
SUFFIX = HUGE_PAGES * (os.environ.get("THP_MEM_ALLOC_ENABLE") == "1")


def bandwidths_of(dim: int, count: int) -> tuple[float, ...]:
    return tuple(dim**0.5 * scale for scale in (LADDER if count == 5 else (1.0,)))


def step_of(provider: Provider, x: torch.Tensor, y: torch.Tensor, h: tuple[float, ...], direction: str) -> Callable[[], torch.Tensor]:
    if direction == "forward":
        return lambda: provider.compute(x, y, h)
    leaf = x.clone().requires_grad_()

    def step() -> torch.Tensor:
        leaf.grad = None
        value = provider.compute(leaf, y, h)
        value.backward()
        return value.detach()

    return step


def verdict(provider: Provider, x: torch.Tensor, y: torch.Tensor, h: tuple[float, ...], exact: tuple[float, torch.Tensor]) -> str:
    """ "ok", or what is wrong with the value or the gradient."""
    try:
        leaf = x.clone().requires_grad_()
        value = provider.compute(leaf, y, h)
        value.backward()
    except Exception as error:
        return _failure(error)
    if provider.prior:
        doubles = x[:1024].double()
        exact_value = float(reference.mmd_to_normal(doubles, bandwidth=h))
        value = fastvae.mmd_to_normal(x[:1024], bandwidth=h)
        wrong = abs(float(value) - exact_value) / exact_value
        return "ok" if wrong <= TOLERANCE else f"wrong value: relative error {wrong:.1e}"
    exact_value, exact_grad = exact
    for name, wrong in (
        ("value", abs(value.item() - exact_value) / abs(exact_value)),
        ("gradient", float((leaf.grad.double() - exact_grad).norm() / exact_grad.norm())),
    ):
        if not wrong <= TOLERANCE:
            return f"wrong {name}: relative error {wrong:.1e}"
    return "ok"


def _failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"


def floor_ms(n: int, dim: int, direction: str, device: str, ceilings: Ceilings) -> float:
    """The pairs that MMD² needs (symmetric halves counted once), at the measured rates: one unit on a CPU, the slower of two on a GPU."""
    pairs = 2 * n * n
    products = pairs * dim + (2 * n * n * dim if direction != "forward" else 0)
    times = (products / ceilings.multiply_adds, pairs / ceilings.exponentials)
    return 1e3 * (max(times) if device == "cuda" else sum(times))


def population(dim: int, h: tuple[float, ...]) -> float:
    """MMD² of the distributions that `samples` draws from: E k of a difference ~ N(δ, v·I) is (h²/(h²+v))^{D/2}·exp(−D·δ²/(2(h²+v)))."""

    def mean_kernel(variance: float, shift: float) -> float:
        return sum((b**2 / (b**2 + variance)) ** (dim / 2) * math.exp(-dim * shift**2 / (2 * (b**2 + variance))) for b in h)

    return mean_kernel(2 * SCALE**2, 0) + mean_kernel(2, 0) - 2 * mean_kernel(1 + SCALE**2, SHIFT)


def verdict_by_part(provider: Provider, x: torch.Tensor, y: torch.Tensor, h: tuple[float, ...]) -> str:
    """`verdict` of the first rows, and of all whether the value is that of the population to 10 %: float64 would take minutes."""
    part = x[:PART], y[:PART]
    status = verdict(provider, *part, h, expected(*part, h))
    if status != "ok" or provider.prior:
        return status
    try:
        value = provider.compute(x, y, h).item()
    except Exception as error:
        return _failure(error)
    wrong = abs(value / population(x.shape[1], h) - 1)
    return "ok" if wrong <= 0.1 else f"wrong value: {wrong:.1e} from the population's"


def samples(n: int, dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (SCALE * torch.randn(n, dim, generator=generator) + SHIFT).to(device)
    return x, torch.randn(n, dim, generator=generator).to(device)


def cases(args: argparse.Namespace) -> list[tuple[int, int, int, tuple[str, ...]]]:
    """(N, D, bandwidths, directions): the sizes at one D, the largest, and D and bandwidths at one N."""
    found = [(n, args.series_dim, 1, tuple(args.directions)) for n in args.series]
    found += [(n, dim, 1, DIRECTIONS[:1]) for n, dim in args.largest]
    return found + [(args.n, dim, count, DIRECTIONS[1:]) for dim in args.dims for count in args.bandwidths]


def mmd_rows(args: argparse.Namespace, device: str, ceilings: Ceilings, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    listed = [p for p in providers(device) if p.name in (args.providers or [p.name])]
    for n, dim, count, directions in cases(args):
        x, y = samples(n, dim, device)
        h = bandwidths_of(dim, count)
        # It stops compiling, and says nothing, after a few shapes.
        torch.compiler.reset()
        if (n, dim) in args.largest:
            status = {p.name: p.refuses(n, dim) or verdict_by_part(p, x, y, h) for p in listed}
        else:
            exact = expected(x, y, h)
            status = {p.name: p.refuses(n, dim) or verdict(p, x, y, h, exact) for p in listed}
        for direction in directions:
            case = {"benchmark": "mmd", "direction": direction, "n": n, "m": n, "dim": dim, "bandwidths": count, "dtype": "float32"}
            steps = {p.name: step_of(p, x, y, h, direction) for p in listed if status[p.name] == "ok"}
            memory = {name: peak_extra_mib(step, device) for name, step in steps.items()}
            times = interleaved(steps, device, args.rounds, args.seconds)
            for provider in listed:
                row = {**case, "provider": provider.name + SUFFIX, "status": status[provider.name], "note": provider.note}
                if provider.name in times:
                    row |= summary(times[provider.name], device)
                    row["pairs_per_second"] = round(3 * n * n / (1e-3 * row["median_ms"]))
                    row["extra_mib"] = memory[provider.name]
                    if count == 1 and not provider.prior:
                        row["fraction_of_ceiling"] = round(floor_ms(n, dim, direction, device, ceilings) / row["median_ms"], 4)
                yield row | common


def fused_reparameterize_kl(mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return fastvae.reparameterize_kl(mu, logvar, eps=eps)


def plain_reparameterize_kl(mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


def reparameterize_kl_rows(args: argparse.Namespace, device: str, ceilings: Ceilings, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    computed: dict[str, Any] = {
        "fastvae": fused_reparameterize_kl,
        "fastvae, torch.compile": torch.compile(fused_reparameterize_kl, dynamic=False),
        "eager": plain_reparameterize_kl,
        "torch.compile": torch.compile(plain_reparameterize_kl, dynamic=False),
    }
    for n, dim in args.row_shapes:
        generator = torch.Generator().manual_seed(0)
        mu, logvar, eps, dz = (torch.randn(n, dim, generator=generator).to(device) for _ in range(4))
        dkl = torch.full((n,), 1 / n, device=device)
        exact = reference.reparameterize_kl(mu[:64].double(), logvar[:64].double(), eps=eps[:64].double())
        status = {}
        for name, compute in computed.items():
            found = compute(mu, logvar, eps)
            close = all(torch.allclose(f[:64].double(), e, rtol=1e-4, atol=1e-4) for f, e in zip(found, exact, strict=True))
            status[name] = "ok" if close else "wrong value"
        for direction in DIRECTIONS:
            leaves = [t.clone().requires_grad_(direction != "forward") for t in (mu, logvar)]

            def step(compute: Any, leaves: list[torch.Tensor] = leaves, eps: Any = eps, grads: Any = (dz, dkl)) -> None:
                outputs = compute(*leaves, eps)
                if leaves[0].requires_grad:
                    torch.autograd.grad(outputs, leaves, grads)

            steps = {name: partial(step, compute) for name, compute in computed.items() if status[name] == "ok"}
            memory = {name: peak_extra_mib(step, device) for name, step in steps.items()}
            times = interleaved(steps, device, args.rounds, args.seconds)
            moved = 4 * n * dim * (4 if direction == "forward" else 4 + 7)
            for name in computed:
                row = {"benchmark": "reparameterize_kl", "direction": direction, "n": n, "dim": dim, "dtype": "float32"}
                row |= {"provider": name + SUFFIX, "status": status[name], "note": ""}
                if name in times:
                    row |= summary(times[name], device)
                    row["extra_mib"] = memory[name]
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = device == "cuda"
    parser.add_argument("--n", type=int, default=16384 if gpu else 4096, help="N = M at which D and bandwidths vary")
    parser.add_argument("--series", type=int, nargs="*", default=[65536, 16384, 4096] if gpu else [2048, 4096, 8192], help="N = M, D fixed")
    parser.add_argument("--series-dim", type=int, default=64)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="of the sizes --series")
    parser.add_argument("--dims", type=int, nargs="*", default=[2, 16, 64, 256])
    parser.add_argument("--bandwidths", type=int, nargs="+", choices=[1, 5], default=[1, 5])
    parser.add_argument("--largest", nargs="*", default=["1000000x16"] if gpu else [], help="N×D of which only the value is timed")
    rows_default = ["65536x64", "262144x64", "65536x512"] if gpu else ["4096x64", "65536x64", "16384x512"]
    parser.add_argument("--row-shapes", nargs="*", default=rows_default, help="N×D of reparameterize_kl, as 4096x64")
    parser.add_argument("--providers", nargs="+", help="of mmd, by name; all by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=4.0, help="for the rounds of one case; three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.row_shapes, args.largest = ([tuple(map(int, s.split("x"))) for s in shapes] for shapes in (args.row_shapes, args.largest))
    torch.set_num_threads(args.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    ceilings = Ceilings.measure(device)
    print("ceilings:", ", ".join(f"{value:.3g} {name}/s" for name, value in vars(ceilings).items()), flush=True)
    common = {
        "device": machine(device),
        "threads": args.threads,
        "ceilings": {name: float(f"{value:.4g}") for name, value in vars(ceilings).items()},
        **versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    args.output.mkdir(exist_ok=True)
    fractions = []
    for benchmark, run in (("reparameterize_kl", reparameterize_kl_rows), ("mmd", mmd_rows)):
        for row in run(args, device, ceilings, common):
            print(describe(row), flush=True)
            # Line by line, so that a run that is stopped keeps what it has measured.
            with (args.output / f"{benchmark}_{device}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if row["provider"] == "fastvae" and benchmark == "mmd" and "fraction_of_ceiling" in row:
                fractions.append(row["fraction_of_ceiling"])
    if fractions:
        print(f"fastvae.mmd reaches {statistics.median(fractions):.0%} of the measured ceiling in the median case")


if __name__ == "__main__":
    main()
