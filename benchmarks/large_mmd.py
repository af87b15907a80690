"""The size at which a user of the usual code ran out of 64 GB (jindongwang/transferlearning#358): 7,207 × 79 against 93,070 × 79 points.

Run: python -m benchmarks.large_mmd. Value, and value with gradients, on this CPU in float32: time, extra memory, error against a sum in
float64 that shares no code with the library. The row goes to benchmarks/results/large_mmd.jsonl; the check takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastvae

RESULTS = Path(__file__).parent / "results" / "large_mmd.jsonl"
N, M, D = 7207, 93_070, 79


def mean_kernel(a: torch.Tensor, b: torch.Tensor, h: float) -> float:
    rows = (torch.exp(torch.cdist(block, b).square_().mul_(-0.5 / h**2)).sum() for block in a.split(1024))
    return float(torch.stack(list(rows)).sum()) / (len(a) * len(b))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    y = 1.1 * torch.randn(M, D, generator=generator) + 0.1
    h = D**0.5
    fastvae.mmd(x[:600].requires_grad_(), y[:600], bandwidth=h).backward()
    x = x.detach()
    before, row = peak_bytes(), {}
    for name, gradient in (("value", False), ("value_and_gradients", True)):
        a, b = x.requires_grad_(gradient), y.requires_grad_(gradient)
        start = time.perf_counter()
        value = fastvae.mmd(a, b, bandwidth=h)
        if gradient:
            value.backward()
        row[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
        row[f"{name}_extra_mib"] = round((peak_bytes() - before) / 2**20)
    xd, yd = x.detach().double(), y.detach().double()
    exact = mean_kernel(xd, xd, h) + mean_kernel(yd, yd, h) - 2 * mean_kernel(xd, yd, h)
    # The gradient of a few rows in float64, by autograd on those rows alone.
    rows = torch.arange(0, N, N // 8)
    part = xd[rows].requires_grad_()
    to_x = torch.exp(torch.cdist(part, xd).square() * (-0.5 / h**2)).sum() / N**2
    to_y = torch.exp(torch.cdist(part, yd).square() * (-0.5 / h**2)).sum() / (N * M)
    (expected,) = torch.autograd.grad(2 * (to_x - to_y), part)
    error = (x.grad[rows].double() - expected).norm() / expected.norm()
    row = {
        "case": f"mmd, {N} x {D} against {M} x {D}, float32",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "value": value.item(),
        "relative_error": abs(value.item() - exact) / exact,
        "gradient_relative_error": error.item(),
        **row,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
