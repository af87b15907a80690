"""Trains an MMD-GAN with a gradient penalty on two moons: python examples/gradient_penalty.py --out penalty.png

The critic maximises MMD² of its features. The penalty holds the slope of the witness function near 1 between real and generated points, and
its gradient needs a second derivative. Bińkowski et al. 2018, "Demystifying MMD GANs". Takes under a minute on a CPU. The picture needs
matplotlib, which `pip install ".[train]"` brings.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvae
from fastvae.radial import Linear, RationalQuadratic

KERNEL = [RationalQuadratic(0.1), RationalQuadratic(1.0), RationalQuadratic(10.0), 0.1 * Linear()]  # of recipes.mmd_gan_mix
NOISE = 4


class Row(NamedTuple):
    step: int
    mmd: float  # of held-out and generated points, with kernels of the points themselves
    slope: float  # mean ‖∇ witness‖ in the penalties since the row before


def two_moons(n: int) -> Tensor:
    angle, first = torch.pi * torch.rand(n, 1), torch.arange(n)[:, None] % 2 == 0
    upper = torch.cat([angle.cos(), angle.sin()], 1)
    return torch.where(first, upper, torch.tensor([1.0, 0.5]) - upper) + 0.05 * torch.randn(n, 2)


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def slopes(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """‖∇ witness(critic(x))‖ at a point x between each real and generated one, differentiable with respect to the critic."""
    x = torch.lerp(real, fake, torch.rand(len(real), 1)).requires_grad_()
    witness = fastvae.witness(critic(x), critic(real), critic(fake), kernel=KERNEL)
    (gradient,) = torch.autograd.grad(witness.sum(), x, create_graph=True)
    return gradient.norm(dim=1)


def distance(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return fastvae.mmd(critic(real), critic(fake), kernel=KERNEL, estimator="unbiased")


def train(weight: float, steps: int, batch: int) -> tuple[list[Row], Tensor]:
    """What happened, and generated points."""
    torch.manual_seed(0)
    generator, critic = mlp(NOISE, 64, 64, 2), mlp(2, 64, 64, 8)
    optimizers = [torch.optim.Adam(module.parameters(), lr=3e-3, betas=(0.5, 0.9)) for module in (generator, critic)]
    held_out, noise = two_moons(1000), torch.randn(1000, NOISE)
    rows, found = [], []
    for step in range(1, steps + 1):
        for _ in range(5):
            real, fake = two_moons(batch), generator(torch.randn(batch, NOISE)).detach()
            slope = slopes(critic, real, fake)
            loss = weight * (slope - 1).square().mean() - distance(critic, real, fake)
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
            found.append(slope.mean().item())
        if step == 1 or step % max(steps // 20, 1) == 0:
            with torch.no_grad():
                mmd = fastvae.mmd(held_out, generator(noise), bandwidth=(0.1, 0.3, 1.0), estimator="unbiased").item()
            rows.append(Row(step, mmd, sum(found) / len(found)))
            found = []
            print(f"weight {weight:g}, step {step}: MMD² {mmd:.4f} to held-out points, mean slope of the witness {rows[-1].slope:.2f}")
        loss = distance(critic, two_moons(batch), generator(torch.randn(batch, NOISE)))
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    return rows, generator(noise).detach()


def draw(runs: dict[str, tuple[list[Row], Tensor]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.7), layout="constrained", dpi=100)
    *scatters, distances, slope_axes = figure.subplots(1, 4)
    for colour, ax, (name, (rows, points)) in zip(("C1", "C0"), scatters, runs.items(), strict=True):
        ax.scatter(*two_moons(1000).T, s=2, color="0.8")
        ax.scatter(*points.T, s=2, color=colour)
        ax.set(title=name, xlim=(-1.6, 2.6), ylim=(-1.1, 1.6), xticks=[], yticks=[], aspect="equal")
        steps, mmd, slope = zip(*rows, strict=True)
        distances.semilogy(steps, mmd, color=colour, label=name)
        slope_axes.semilogy(steps, slope, color=colour, label=name)
    slope_axes.axhline(1.0, color="0.7", linestyle=":")
    distances.set(title="MMD² to held-out points", xlabel="step")
    slope_axes.set(title="mean slope of the witness", xlabel="step")
    distances.legend()
    figure.savefig(path)


def main() -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the generator")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--weight", type=float, default=10.0, help="of the penalty")
    parser.add_argument("--out", type=Path, help="write a picture there")
    args = parser.parse_args()
    runs = {name: train(weight, args.steps, args.batch) for name, weight in (("without penalty", 0.0), ("with penalty", args.weight))}
    if args.out:
        draw(runs, args.out)
    return {name: rows for name, (rows, _) in runs.items()}


if __name__ == "__main__":
    main()
