"""`mmd` of 7,207 × 79 against 93,070 × 79 points, a size at which eager code ran out of 64 GB (jindongwang/transferlearning#358).

    python -m benchmarks.large_mmd      appends a row to benchmarks/results/large_mmd.jsonl, in a few minutes

Time, extra memory and error of the value, and of the value with its gradients, on this CPU in float32. Errors are against sums in float64
that share no code with the library.
"""

from __future__ import annotations

import argparse
import json

import torch

import fastvae
from benchmarks import rows
from benchmarks.machine import conditions
from benchmarks.measure import run_once

RESULTS = rows.RESULTS / "large_mmd.jsonl"
N, M, D = 7207, 93_070, 79


def mean_kernel(a: torch.Tensor, b: torch.Tensor, h: float) -> float:
    sums = (torch.exp(torch.cdist(block, b).square_().mul_(-0.5 / h**2)).sum() for block in a.split(1024))
    return float(torch.stack(list(sums)).sum()) / (len(a) * len(b))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    y = 1.1 * torch.randn(M, D, generator=generator) + 0.1
    h = D**0.5
    fastvae.mmd(x[:600].requires_grad_(), y[:600], bandwidth=h).backward()
    x = x.detach()
    measured = {}
    for name, gradient in (("value", False), ("value_and_gradients", True)):
        a, b = x.requires_grad_(gradient), y.requires_grad_(gradient)

        def step(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            value = fastvae.mmd(a, b, bandwidth=h)
            if value.requires_grad:
                value.backward()
            return value.detach()

        value, found = run_once(step)
        measured |= {f"{name}_{field}": number for field, number in found.items()}
    xd, yd = x.detach().double(), y.detach().double()
    exact = mean_kernel(xd, xd, h) + mean_kernel(yd, yd, h) - 2 * mean_kernel(xd, yd, h)
    # The exact gradient of a few rows, by autograd on those rows alone.
    checked = torch.arange(0, N, N // 8)
    part = xd[checked].requires_grad_()
    to_x = torch.exp(torch.cdist(part, xd).square() * (-0.5 / h**2)).sum() / N**2
    to_y = torch.exp(torch.cdist(part, yd).square() * (-0.5 / h**2)).sum() / (N * M)
    (expected,) = torch.autograd.grad(2 * (to_x - to_y), part)
    error = (x.grad[checked].double() - expected).norm() / expected.norm()
    row = {
        "case": f"mmd, {N} x {D} against {M} x {D}, float32",
        "value": value.item(),
        "relative_error": abs(value.item() - exact) / exact,
        "gradient_relative_error": error.item(),
        **measured,
        **conditions("cpu"),
    }
    rows.append(RESULTS, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
