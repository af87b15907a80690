"""Small problems on a CPU, where a loss must not take longer than the lines that it replaces.

    python -m benchmarks.small                      one thread, N = M from 32 to 1,024, and two batches of problems
    python -m benchmarks.small --n 32 64 --dims 16 --bandwidths 1 --seconds 1

Of each case all providers once a round, in one process; medians of the processor's time, and their ratio to eager's. Values and gradients
are checked against float64 first. Rows are appended to benchmarks/results/small.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae
from benchmarks.measure import commit, interleaved, machine, summary
from benchmarks.providers import Provider, expected, providers, versions
from benchmarks.rows import RESULTS
from benchmarks.run import bandwidths_of, samples, verdict

NAMES = ("fastvae", "fastvae, closed-form prior", "eager", "torch.compile", "KeOps", "geomloss")
# What requires grad: an encoder's sample against one of the prior, or both.
DIRECTIONS = {"forward+backward": (True, False), "forward+backward to both": (True, True)}
BATCHES = ((256, 4, 4096), (1024, 32, 16))


def batched_matrix(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """`benchmarks.providers.matrix` of a batch, in batched products."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        norms = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
        squared = torch.baddbmm(norms, a, b.mT, alpha=-2)
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean((1, 2)) for h in bandwidths]).sum(0)

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def batch_providers() -> list[Provider]:
    """Each returns the mean over the batch."""

    def mean_of(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y, h: compute(x, y, h).mean()

    return [
        Provider("fastvae", mean_of(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h))),
        Provider("fastvae, closed-form prior", mean_of(lambda x, y, h: fastvae.mmd_to_normal(x, bandwidth=h)), prior=True),
        Provider("eager", mean_of(batched_matrix), note="batched products, B×N×M"),
        Provider("torch.compile", torch.compile(mean_of(batched_matrix), dynamic=False), note="of eager"),
    ]


def batch_verdict(provider: Provider, x: Tensor, y: Tensor, h: tuple[float, ...]) -> str:
    if provider.prior:
        exact = fastvae.reference.mmd_to_normal(x.double(), bandwidth=h).mean()
    else:
        exact = fastvae.reference.mmd(x[:1].double(), y[:1].double(), bandwidth=h).mean()
        x, y = x[:1], y[:1]
    wrong = abs(float(provider.compute(x, y, h)) / float(exact) - 1)
    return "ok" if wrong <= 1e-3 else f"wrong value: relative error {wrong:.1e}"


def step(compute: Callable[..., Tensor], x: Tensor, y: Tensor, h: tuple[float, ...], leaves: list[Tensor]) -> None:
    value = compute(x, y, h)
    torch.autograd.grad(value, leaves, allow_unused=True)


def rows(
    args: argparse.Namespace, case: dict[str, Any], listed: list[Provider], x: Tensor, y: Tensor, check: Any
) -> Iterator[dict[str, Any]]:
    h = bandwidths_of(x.shape[-1], case["bandwidths"])
    status = {p.name: p.missing or check(p, x, y, h) for p in listed}
    for direction, wanted in DIRECTIONS.items():
        points = [t.clone().requires_grad_(grad) for t, grad in zip((x, y), wanted, strict=True)]
        leaves = [t for t in points if t.requires_grad]
        steps: dict[str, Callable[[], object]] = {
            p.name: partial(step, p.compute, *points, h, leaves[:1] if p.prior else leaves) for p in listed if status[p.name] == "ok"
        }
        interleaved(steps, "cpu", 10, args.seconds)
        times = interleaved(steps, "cpu", args.rounds, args.seconds)
        found = {name: summary(taken, "cpu") for name, taken in times.items()}
        for p in listed:
            row = {"benchmark": "small", "direction": direction, **case, "dtype": "float32", "provider": p.name, "status": status[p.name]}
            if p.name in found:
                row |= found[p.name] | {"over_eager": round(found[p.name]["processor_ms"] / found["eager"]["processor_ms"], 3)}
            yield row | {"note": p.note}


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    listed = [p for p in providers("cpu") if p.name in NAMES]
    for n in args.n:
        for dim in args.dims:
            for count in args.bandwidths:
                torch.compiler.reset()
                x, y = samples(n, dim, "cpu")
                case = {"batch": 1, "n": n, "m": n, "dim": dim, "bandwidths": count}
                exact = expected(x, y, bandwidths_of(dim, count))
                yield from rows(args, case, listed, x, y, partial(verdict, exact=exact))
    for batch, n, dim in args.batches:
        for count in args.bandwidths:
            torch.compiler.reset()
            x, y = (t.reshape(batch, n, dim) for t in samples(batch * n, dim, "cpu"))
            case = {"batch": batch, "n": n, "m": n, "dim": dim, "bandwidths": count}
            yield from rows(args, case, batch_providers(), x, y, batch_verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="*", default=[32, 64, 128, 256, 512, 1024, 2048], help="N = M")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--bandwidths", type=int, nargs="+", choices=[1, 5], default=[1, 5])
    parser.add_argument("--batches", nargs="*", default=["x".join(map(str, shape)) for shape in BATCHES], help="B×N×D, as 1024x32x16")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of one case; three rounds at least")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.batches = [tuple(map(int, shape.split("x"))) for shape in args.batches]
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    date = datetime.now(timezone.utc).date().isoformat()
    common = {"device": machine("cpu"), "threads": 1, **versions(), "commit": commit(), "date": date}
    args.output.mkdir(exist_ok=True)
    for row in cases(args):
        case = f"{row['batch']:4} × N {row['n']:4} D {row['dim']:4} bandwidths {row['bandwidths']} {row['direction']:24}"
        time = f"{row['processor_ms']:9.3f} ms, {row['over_eager']:.2f} of eager" if "processor_ms" in row else row["status"]
        print(f"{case} {row['provider']:26} {time}", flush=True)
        with (args.output / "small.jsonl").open("a") as file:
            file.write(json.dumps(row | common) + "\n")


if __name__ == "__main__":
    main()
