"""CMMD of two sets of 30,000 embeddings of 768 features, the size at which its authors use it, on this CPU in float32.

Run: python -m benchmarks.large_cmmd. Time, extra memory and error of `fastvae.recipes.cmmd`, and the error of the usual formula in float32,
both against a sum in float64 that shares no code with the library. The row goes to benchmarks/results/large_cmmd.jsonl; the check takes ten
minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.large_mmd import peak_bytes
from fastvae.recipes import cmmd

RESULTS = Path(__file__).parent / "results" / "large_cmmd.jsonl"
N, D, BLOCK = 30_000, 768, 1000


def embeddings(shift: float, spread: float, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors in a cone, as those of CLIP are: two of them have a cosine of about a half."""
    centre = torch.zeros(D)
    centre[0], centre[1] = 1, shift
    z = centre + spread * torch.randn(N, D, generator=generator) / D**0.5
    return z / z.norm(dim=1, keepdim=True)


def exact(x: torch.Tensor, y: torch.Tensor) -> float:
    """CMMD in float64, as sums of k − 1."""
    x, y = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x, y))

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(float(torch.expm1((rows @ b.T - 1) / 100).sum()) for rows in a.split(BLOCK)) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def usual(x: torch.Tensor, y: torch.Tensor) -> float:
    """The authors' formula in float32, a block of rows at a time; the mean of each block's means in float32 too."""

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a2, b2 = a.square().sum(1), b.square().sum(1)
        rows = zip(a.split(BLOCK), a2.split(BLOCK), strict=True)
        return torch.stack([torch.exp(-(-2 * r @ b.T + r2[:, None] + b2) / 200).mean() for r, r2 in rows]).mean()

    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    generator = torch.Generator().manual_seed(0)
    x, y = embeddings(0.0, 1.0, generator), embeddings(0.33, 1.02, generator)
    cmmd(x[:600], y[:600])
    before, start = peak_bytes(), time.perf_counter()
    value = float(cmmd(x, y))
    seconds, extra = time.perf_counter() - start, peak_bytes() - before
    expected = exact(x, y)
    row = {
        "case": f"CMMD, {N} x {D} against {N} x {D}, float32",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "value": value,
        "relative_error": abs(value - expected) / expected,
        "usual_float32_relative_error": abs(usual(x, y) - expected) / expected,
        "seconds": round(seconds, 2),
        "extra_mib": round(extra / 2**20),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
