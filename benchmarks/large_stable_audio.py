"""`fastvae.recipes.stable_audio` of 16,384 latent frames of 64 channels, of which its own code stores differences, 64 GiB each.

    python -m benchmarks.large_stable_audio [--threads N]   appends two rows to benchmarks/results/large_stable_audio.jsonl, in minutes

Time, extra memory and error of the value with its gradient, on this CPU in float32, with both kernels. Errors are against sums in float64
that share no code with the library.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from benchmarks import rows
from benchmarks.machine import conditions
from benchmarks.measure import run_once
from fastvae.recipes import stable_audio

RESULTS = rows.RESULTS / "large_stable_audio.jsonl"
N, D, BLOCK = 16_384, 64, 1024

KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # k − 1 and k of the mean of squared differences
    "gaussian": lambda mean: torch.expm1(-mean / D),
    "rational_quadratic": lambda mean: sum(((1 + mean / (2 * b)).reciprocal() for b in (1e-4, 1e-3, 1e-2, 1e-1, 1)), 0 * mean) / 5,
}


def mean_kernel(a: torch.Tensor, b: torch.Tensor, kernel: Callable[[torch.Tensor], torch.Tensor]) -> float:
    return sum(float(kernel(torch.cdist(block, b).square() / D).sum()) for block in a.split(BLOCK)) / (len(a) * len(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    latents, noise = 1.1 * torch.randn(N, D, generator=generator) + 0.1, torch.randn(N, D, generator=generator)
    for name, kernel in KERNELS.items():
        stable_audio(latents[:600].requires_grad_(), noise[:600], kernel=name).backward()  # type: ignore[arg-type]
        x = latents.detach().requires_grad_()

        def step(x: torch.Tensor = x, name: str = name) -> torch.Tensor:
            value = stable_audio(x, noise, kernel=name)  # type: ignore[arg-type]
            value.backward()
            return value.detach()

        value, measured = run_once(step)
        assert x.grad is not None
        xd, yd = x.detach().double(), noise.double()
        exact = mean_kernel(xd, xd, kernel) + mean_kernel(yd, yd, kernel) - 2 * mean_kernel(xd, yd, kernel)
        # The exact gradient of a few rows, by autograd on those rows alone.
        checked = torch.arange(0, N, N // 8)
        part = xd[checked].requires_grad_()
        own, cross = (kernel((part[:, None] - other).square().sum(2) / D).sum() for other in (xd, yd))
        (expected,) = torch.autograd.grad(2 * (own / N**2 - cross / N**2), part)
        row = {
            "case": f"latent MMD of stable-audio-tools, {name}, {N} x {D} against {N} x {D}, value and gradient, float32",
            "kernel": name,
            "value": value.item(),
            "relative_error": abs(value.item() - exact) / exact,
            "gradient_relative_error": ((x.grad[checked].double() - expected).norm() / expected.norm()).item(),
            **measured,
            **conditions("cpu"),
        }
        rows.append(RESULTS, row)
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
