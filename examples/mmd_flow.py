"""Moves particles onto two moons by the gradient of MMD², and by Newton steps: python examples/mmd_flow.py --out flow.png

A Newton step p solves (H + λ·I)·p = −g by conjugate gradients, which need products of the Hessian H with vectors and not H. They stop at
negative curvature. Takes seconds on a CPU. The picture needs matplotlib, which `pip install ".[train]"` brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae

BANDWIDTH = 0.5


class Flow(NamedTuple):
    name: str
    x: Tensor
    history: list[tuple[int, float]]  # after each step the sweeps over all pairs of rows so far, and MMD²
    negative: int  # steps that met negative curvature


def two_moons(n: int) -> Tensor:
    angle, first = torch.pi * torch.rand(n, 1), torch.arange(n)[:, None] % 2 == 0
    upper = torch.cat([angle.cos(), angle.sin()], 1)
    return torch.where(first, upper, torch.tensor([1.0, 0.5]) - upper) + 0.05 * torch.randn(n, 2)


def conjugate_gradients(product: Callable[[Tensor], Tensor], g: Tensor, damping: float, tolerance: float) -> tuple[Tensor, int, bool]:
    """A p for which (product + damping·I)·p is roughly −g; the number of products; whether the curvature was found to be negative."""
    p, residual = torch.zeros_like(g), -g
    direction, before = residual, residual.square().sum()
    for n in range(1, 51):
        image = product(direction) + damping * direction
        curvature = (direction * image).sum()
        if curvature <= 0:
            return p if n > 1 else -g / damping, n, True
        length = before / curvature
        p, residual = p + length * direction, residual - length * image
        after = residual.square().sum()
        if after < tolerance**2 * g.square().sum():
            break
        direction, before = residual + after / before * direction, after
    return p, n, False


def flow(name: str, x: Tensor, y: Tensor, steps: int, sweeps: int, newton: bool) -> Flow:
    """Steps from x to y. The damping λ, or 1/λ as the length of a gradient step, follows from how well a quadratic model predicts MMD²."""
    damping, negative, history = 1.0, 0, []

    def differentiated(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = len(x) * fastvae.mmd(x, y, bandwidth=BANDWIDTH)  # times N: the gradient of one particle does not depend on N
        return x, loss.detach(), torch.autograd.grad(loss, x, create_graph=newton)[0]

    def product(graph: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return torch.autograd.grad(graph, x, v, retain_graph=True)[0]

    x, loss, graph = differentiated(x)
    first, used = graph.detach().norm(), 1
    while len(history) < steps and used < sweeps:
        g, bent = graph.detach(), False
        p = -g / damping
        if newton:
            tolerance = min(0.5, (g.norm() / first).sqrt().item())
            p, products, bent = conjugate_gradients(partial(product, graph, x), g, damping, tolerance)
            used, negative = used + products, negative + bent
        moved, new_loss, new_graph = differentiated(x + p)
        used += 1
        if loss - new_loss > -0.25 * (g * p).sum() / 2:  # the model predicts −½·g·p
            x, loss, graph = moved, new_loss, new_graph
            damping = damping if bent else damping / 2
        else:
            damping *= 4
        history.append((used, loss.item() / len(x)))
    return Flow(name, x.detach(), history, negative)


def draw(start: Tensor, y: Tensor, flows: list[Flow], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), layout="constrained", dpi=100)
    axes = figure.subplots(1, 4)
    titles = ["start"] + [f"{found.name}: {found.history[-1][0]} sweeps" for found in flows]
    for ax, x, title in zip(axes, [start, *(found.x for found in flows)], titles, strict=False):
        ax.scatter(*y.T, s=2, color="0.8")
        ax.scatter(*x.T, s=6, color="C0")
        ax.set(title=title, xlim=(-1.4, 2.4), ylim=(-0.9, 1.4), xticks=[], yticks=[], aspect="equal")
    for found in flows:
        axes[3].loglog(*zip(*found.history, strict=True), label=found.name)
    axes[3].set(title="MMD²", xlabel="sweeps over all pairs")
    axes[3].legend()
    figure.savefig(path)


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="particles")
    parser.add_argument("--steps", type=int, default=12, help="Newton steps")
    parser.add_argument("--out", type=Path, help="write a picture there")
    args = parser.parse_args()
    torch.manual_seed(0)

    y = two_moons(4 * args.n).double()
    start = torch.tensor([0.5, 0.25]) + 0.3 * torch.randn(args.n, 2, dtype=y.dtype)
    newton = flow("Newton", start, y, args.steps, 10**9, newton=True)
    gradient = flow("gradient", start, y, 10**9, newton.history[-1][0], newton=False)  # as many sweeps
    fresh = fastvae.mmd(two_moons(args.n).double(), y, bandwidth=BANDWIDTH).item()

    print(f"{'':10}{'steps':>8}{'sweeps':>8}{'MMD²':>12}")
    for found in (gradient, newton):
        print(f"{found.name:10}{len(found.history):8}{found.history[-1][0]:8}{found.history[-1][1]:12.2e}")
    same = gradient.history[min(args.steps, len(gradient.history)) - 1]
    print(f"The gradient flow after as many steps as Newton: {same[1]:.2e}. Fresh points of the two moons: {fresh:.2e}.")
    print(f"Newton's conjugate gradients met negative curvature in {newton.negative} of {args.steps} steps.")
    if args.out:
        draw(start, y, [gradient, newton], args.out)
    return {
        "start": fastvae.mmd(start, y, bandwidth=BANDWIDTH).item(),
        "gradient": gradient.history[-1][1],
        "newton": newton.history[-1][1],
    }


if __name__ == "__main__":
    main()
