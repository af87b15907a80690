"""SIGReg, by `sigreg` and by the formula that users write.

    python -m benchmarks.bench_sigreg    appends rows to benchmarks/results/sigreg_<device>.jsonl
    pytest benchmarks/bench_sigreg.py --benchmark-only     as microbenchmarks

Directions are given, so that both project on the same. Value and gradient are checked against float64 before they are timed.
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

# N, D and the number of slices.
SIZES = [(32, 64, 256), (32, 64, 1024), (128, 64, 256), (128, 64, 1024), (2048, 64, 1024)]


def eager(z: Tensor, directions: Tensor) -> Tensor:
    """LeJEPA's minimal example, on one device."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype, device=z.device)
    phi = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * 3 / 16)
    weights[0] = weights[-1] = 3 / 16
    angles = (z @ directions).unsqueeze(-1) * t
    error = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return ((error @ (weights * phi)) * z.shape[-2]).mean()


def fused(z: Tensor, directions: Tensor) -> Tensor:
    return fastvae.sigreg(z, directions=directions)


Provider = Callable[[Tensor, Tensor], Tensor]
PROVIDERS: dict[str, Provider] = {"fastvae": fused, "eager": eager}


def batch(n: int, d: int, slices: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, directions = 1.1 * torch.randn(n, d, generator=generator) + 0.1, torch.randn(d, slices, generator=generator)
    return z.to(DEVICE), (directions / directions.norm(dim=0)).to(DEVICE)


def step(provider: Provider, z: Tensor, directions: Tensor) -> tuple[Tensor, ...]:
    value = provider(z, directions)
    return (value.detach(), *torch.autograd.grad(value, z)) if z.requires_grad else (value,)


def check(provider: Provider, z: Tensor, directions: Tensor) -> str:
    """The status of a row, against the formula in float64."""
    value, grad = step(provider, z.clone().requires_grad_(), directions)
    exact, exact_grad = step(eager, z.double().requires_grad_(), directions.double())
    if abs(value.double() - exact).item() > 1e-5 * exact.item():
        return f"wrong value: {value.item()} for {exact.item()}"
    error = ((grad.double() - exact_grad).norm() / exact_grad.norm()).item()
    return "ok" if error < 1e-4 else f"wrong gradient: {error:.1e}"


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sigreg(benchmark, provider, gradient, size):
    z, directions = batch(*size)
    assert check(PROVIDERS[provider], z, directions) == "ok"
    z.requires_grad_(gradient)

    def run():
        step(PROVIDERS[provider], z, directions)
        synchronize(DEVICE)

    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one case; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = conditions(DEVICE)
    for n, d, slices in SIZES:
        z, directions = batch(n, d, slices)
        status = {name: check(provider, z, directions) for name, provider in PROVIDERS.items()}
        for direction in ("forward", "forward+backward"):
            leaf = z.clone().requires_grad_(direction != "forward")
            steps = {name: partial(step, PROVIDERS[name], leaf, directions) for name in PROVIDERS if status[name] == "ok"}
            found = summaries(steps, DEVICE, args.rounds, args.seconds, memory=True)
            for name in PROVIDERS:
                row = {"benchmark": "sigreg", "direction": direction, "n": n, "dim": d, "slices": slices, "dtype": "float32"}
                row |= {"provider": name, "status": status[name], **found.get(name, {})}
                print(json.dumps(row), flush=True)
                append(RESULTS / f"sigreg_{DEVICE}.jsonl", row | common)


if __name__ == "__main__":
    main()
