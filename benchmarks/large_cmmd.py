"""`fastvae.recipes.cmmd` of two sets of 30,000 embeddings of 768 features, the size at which the authors of CMMD use it.

    python -m benchmarks.large_cmmd     appends a row to benchmarks/results/large_cmmd.jsonl, in ten minutes

Time, extra memory and error on this CPU in float32, and the error of the authors' formula in float32. Errors are against a sum in float64
that shares no code with the library.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks import rows
from benchmarks.machine import conditions
from benchmarks.measure import run_once
from fastvae.recipes import cmmd

RESULTS = rows.RESULTS / "large_cmmd.jsonl"
N, D, BLOCK = 30_000, 768, 1000


def embeddings(shift: float, spread: float, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors in a cone, like CLIP's: two of them have a cosine of about ½."""
    centre = torch.zeros(D)
    centre[0], centre[1] = 1, shift
    z = centre + spread * torch.randn(N, D, generator=generator) / D**0.5
    return z / z.norm(dim=1, keepdim=True)


def exact(x: torch.Tensor, y: torch.Tensor) -> float:
    """CMMD in float64, summed as k − 1."""
    x, y = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x, y))

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(float(torch.expm1((block @ b.T - 1) / 100).sum()) for block in a.split(BLOCK)) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def usual(x: torch.Tensor, y: torch.Tensor) -> float:
    """The authors' formula in float32, a block of rows at a time; means of the blocks' means are float32 too."""

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a2, b2 = a.square().sum(1), b.square().sum(1)
        blocks = zip(a.split(BLOCK), a2.split(BLOCK), strict=True)
        return torch.stack([torch.exp(-(-2 * block @ b.T + norms[:, None] + b2) / 200).mean() for block, norms in blocks]).mean()

    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    generator = torch.Generator().manual_seed(0)
    x, y = embeddings(0.0, 1.0, generator), embeddings(0.33, 1.02, generator)
    cmmd(x[:600], y[:600])
    value, measured = run_once(lambda: float(cmmd(x, y)))
    expected = exact(x, y)
    row = {
        "case": f"CMMD, {N} x {D} against {N} x {D}, float32",
        "value": value,
        "relative_error": abs(value - expected) / expected,
        "usual_float32_relative_error": abs(usual(x, y) - expected) / expected,
        **measured,
        **conditions("cpu"),
    }
    rows.append(RESULTS, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
