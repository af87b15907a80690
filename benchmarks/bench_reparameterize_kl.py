"""z and KL. Of moments by `reparameterize_kl_moments`, by diffusers' formula in eager code, and by the same compiled.

    python -m benchmarks.bench_reparameterize_kl    appends rows to benchmarks/results/moments_<device>.jsonl
    pytest benchmarks/bench_reparameterize_kl.py --benchmark-only     as microbenchmarks; `reparameterize_kl` too

Moments are contiguous and channels_last; a step is forward and backward. `over_eager` and `memory_over_eager` are ratios to eager code. z,
KL and gradient are checked against float64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
from benchmarks.machine import conditions
from benchmarks.measure import DEVICE, Steps, summaries, synchronize
from benchmarks.providers import eager_reparameterize_kl_moments, failure
from benchmarks.rows import RESULTS, append
from fastvae import reference

Moments = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

SHAPES = [(64, 8, 32, 32), (8, 8, 128, 128)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Tens of roundings of float32.
TOLERANCE = 3e-6


def fused_moments(moments: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    return fastvae.reparameterize_kl_moments(moments, eps=eps, logvar_bounds=(-30.0, 20.0))


def loops_of_moments(moments: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    return fastvae.reparameterize_kl_moments(moments, eps=eps, logvar_bounds=(-30.0, 20.0), backend="inductor")


def moments_providers() -> dict[str, Moments]:
    inductor = {"fastvae, inductor": loops_of_moments} if DEVICE == "cpu" else {}
    return {
        "fastvae": fused_moments,
        **inductor,
        "fastvae, torch.compile": torch.compile(fused_moments, dynamic=False),
        "eager": eager_reparameterize_kl_moments,
        "torch.compile": torch.compile(eager_reparameterize_kl_moments, dynamic=False),
    }


def moments_batch(shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments, ε, dz and dKL."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(shape, generator=generator)
    eps, dz = (torch.randn(shape[0], shape[1] // 2, *shape[2:], generator=generator) for _ in range(2))
    tensors = [t.to(DEVICE, memory_format=LAYOUTS[layout]) for t in (moments, eps, dz)]
    return *tensors, torch.full(shape[:1], 1e-6 / shape[0], device=DEVICE)


def moments_step(provider: Moments, moments: Tensor, eps: Tensor, dz: Tensor, dkl: Tensor) -> tuple[Tensor, ...]:
    z, kl = provider(moments, eps)
    return z, kl, *torch.autograd.grad((z, kl), moments, (dz, dkl))


def moments_verdict(provider: Moments, batch: tuple[Tensor, ...]) -> str:
    """The status of a row."""
    moments, *others = batch
    exact = moments_step(eager_reparameterize_kl_moments, moments.double().requires_grad_(), *(t.double() for t in others))
    try:
        found = moments_step(provider, moments.clone(memory_format=torch.preserve_format).requires_grad_(), *others)
    except Exception as error:
        return failure(error)
    for name, ours, right in zip(("z", "KL", "gradient"), found, exact, strict=True):
        wrong = ((ours.double() - right).norm() / right.norm()).item()
        if not wrong <= TOLERANCE:
            return f"wrong {name}: relative error {wrong:.1e}"
    return "ok"


def moments_rows(
    providers: dict[str, Moments], shape: tuple[int, ...], layout: str, rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    batch = moments_batch(shape, layout)
    status = {name: moments_verdict(provider, batch) for name, provider in providers.items()}
    leaf = batch[0].requires_grad_()
    steps: Steps = {name: partial(moments_step, provider, leaf, *batch[1:]) for name, provider in providers.items() if status[name] == "ok"}
    found = summaries(steps, DEVICE, rounds, seconds, warm_up=3, memory=True)
    eager = found["eager"]
    time = "processor_ms" if DEVICE == "cpu" else "median_ms"
    for name in providers:
        row = {"benchmark": "moments", "direction": "forward+backward", "shape": shape, "layout": layout, "dtype": "float32"}
        row |= {"provider": name, "status": status[name]}
        if name in found:
            row |= found[name] | {"over_eager": round(found[name][time] / eager[time], 3)}
            if eager["extra_mib"]:
                row["memory_over_eager"] = round(found[name]["extra_mib"] / eager["extra_mib"], 3)
        yield row


@pytest.mark.parametrize("provider", [fastvae.reparameterize_kl, reference.reparameterize_kl], ids=["fastvae", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d"), [(4096, 64), (65_536, 64), (16_384, 512)])
def test_reparameterize_kl(benchmark, provider, gradient, n, d):
    generator = torch.Generator().manual_seed(0)
    mu, logvar, eps, dz = (torch.randn(n, d, generator=generator).to(DEVICE) for _ in range(4))
    exact = reference.reparameterize_kl(mu.double(), logvar.double(), eps=eps.double())
    for actual, expected in zip(provider(mu, logvar, eps=eps), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    dkl = dz[:, 0].contiguous()
    mu.requires_grad_(gradient)
    logvar.requires_grad_(gradient)

    def step():
        z, kl = provider(mu, logvar, eps=eps)
        if gradient:
            torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl))
        synchronize(DEVICE)

    benchmark(step)


@pytest.mark.parametrize("provider", [fused_moments, eager_reparameterize_kl_moments], ids=["fastvae", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reparameterize_kl_moments(benchmark, provider, layout, shape):
    batch = moments_batch(shape, layout)
    assert moments_verdict(provider, batch) == "ok"
    leaf = batch[0].requires_grad_()

    def step():
        moments_step(provider, leaf, *batch[1:])
        synchronize(DEVICE)

    benchmark(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES], help="B×2C×H×W, as 64x8x32x32")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one case; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    common = conditions(DEVICE)
    for shape in args.shapes:
        for layout in LAYOUTS:
            # After a few shapes torch.compile silently falls back to eager.
            torch.compiler.reset()
            for row in moments_rows(moments_providers(), tuple(map(int, shape.split("x"))), layout, args.rounds, args.seconds):
                print(json.dumps(row), flush=True)
                append(args.output / f"moments_{DEVICE}.jsonl", row | common)


if __name__ == "__main__":
    main()
