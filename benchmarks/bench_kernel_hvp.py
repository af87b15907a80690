"""A Hessian-vector product of MMD² beside its value and gradient, by fastvae, eager PyTorch and KeOps.

    python -m benchmarks.bench_kernel_hvp       appends rows to benchmarks/results/kernel_hvp_<device>.jsonl
    pytest benchmarks/bench_kernel_hvp.py --benchmark-only     as microbenchmarks

"value and gradient" is that to x. "product" is the Hessian with respect to x times a direction, of a gradient that create_graph=True has
made; "all" is torch.autograd.functional.vhp, which does both. Each product is checked against float64 before it is timed. Arrays of all
pairs that would not fit into 16 GiB are not made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.machine import conditions
from benchmarks.measure import DEVICE, summaries, synchronize
from benchmarks.providers import MMD, fused, keops, matrix
from benchmarks.rows import RESULTS, append

SIZES = [(32, 16), (128, 16), (512, 64), (2048, 64), (8192, 64)]
# As many arrays of all pairs a double backward of the dense formula holds at its peak.
DENSE_ARRAYS, DENSE_LIMIT = 32, 16 << 30


def samples(n: int, dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, dim, generator=generator).to(DEVICE) for _ in range(3))


def product(compute: MMD, x: Tensor, y: Tensor, direction: Tensor) -> Tensor:
    """The Hessian of MMD² with respect to x times the direction."""
    bandwidths = (x.shape[1] ** 0.5,)
    return torch.autograd.functional.vhp(lambda x: compute(x, y, bandwidths), x, direction)[1]


def steps(compute: MMD, x: Tensor, y: Tensor, direction: Tensor) -> dict[str, Callable[[], Any]]:
    leaf, bandwidths = x.clone().requires_grad_(), (x.shape[1] ** 0.5,)
    (gradient,) = torch.autograd.grad(compute(leaf, y, bandwidths), leaf, create_graph=True)
    return {
        "value and gradient": lambda: torch.autograd.grad(compute(leaf, y, bandwidths), leaf),
        "product": lambda: torch.autograd.grad(gradient, leaf, direction, retain_graph=True),
        "all": lambda: product(compute, x, y, direction),
    }


def compared(n: int) -> dict[str, MMD]:
    found = {"fastvae": fused}
    if 4 * n * n * DENSE_ARRAYS <= DENSE_LIMIT:
        found["eager"] = matrix
    if importlib.util.find_spec("pykeops") is not None:
        found["KeOps"] = keops
    return found


def status(compute: MMD, dim: int) -> str:
    """ "ok", or what is wrong with the product."""
    given = samples(300, dim)
    exact = product(matrix, *(t.double() for t in given))
    error = ((product(compute, *given).double() - exact).abs().max() / exact.abs().max()).item()
    return "ok" if error < 1e-4 else f"wrong product: {error:.1e}"


@pytest.mark.parametrize("quantity", ["value and gradient", "product", "all"])
@pytest.mark.parametrize("provider", ["fastvae", "eager"])
@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
def test_product(benchmark: Any, size: tuple[int, int], provider: str, quantity: str) -> None:
    compute = compared(size[0])[provider]
    assert status(compute, size[1]) == "ok"
    step = steps(compute, *samples(*size))[quantity]
    benchmark(lambda: (step(), synchronize(DEVICE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="N×D, as 2048x64; by default those of the rows")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one size; it has three rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = conditions(DEVICE)
    for n, dim in [tuple(map(int, size.split("x"))) for size in args.sizes] if args.sizes else SIZES:
        found = compared(n)
        said = {name: status(compute, dim) for name, compute in found.items()}
        cases = {
            (name, quantity): step
            for name, compute in found.items()
            if said[name] == "ok"
            for quantity, step in steps(compute, *samples(n, dim)).items()
        }
        measured = summaries(cases, DEVICE, args.rounds, args.seconds, memory=True)
        for (name, quantity), summary in measured.items():
            row = {"benchmark": "kernel_hvp", "quantity": quantity, "n": n, "dim": dim, "dtype": "float32", "provider": name}
            row |= {"status": said[name], **summary}
            print(json.dumps(row), flush=True)
            append(RESULTS / f"kernel_hvp_{DEVICE}.jsonl", row | common)


if __name__ == "__main__":
    main()
