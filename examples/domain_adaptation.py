"""Aligns the features of two domains with a sum of RBF kernels: python examples/domain_adaptation.py

A classifier is trained on labelled source data; its features of source and of unlabelled target data are drawn together by MMD².
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae


def domain(n: int, turn: float, shift: float) -> tuple[Tensor, Tensor]:
    """Two classes in the plane, turned by an angle and moved."""
    labels = torch.arange(n) % 2
    x = 0.5 * torch.randn(n, 2) + torch.stack([4.0 * labels - 2.0, torch.zeros(n)], 1)
    angle = torch.tensor(turn)
    rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return x @ rotation.T + shift, labels


def train(weight: float, steps: int) -> float:
    """The accuracy on the target domain."""
    torch.manual_seed(0)
    (source, labels), (target, hidden_labels) = domain(512, 0.0, 0.0), domain(512, 0.9, 1.5)
    features = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 8))
    head = nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(steps):
        a, b = features(source), features(target)
        loss = F.cross_entropy(head(a), labels) + weight * fastvae.mmd(a, b, bandwidth=(0.5, 1.0, 2.0, 4.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (head(features(target)).argmax(1) == hidden_labels).float().mean().item()


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    found = {name: train(weight, args.steps) for name, weight in (("source only", 0.0), ("with MMD²", 1.0))}
    for name, accuracy in found.items():
        print(f"{name}: accuracy {accuracy:.2f} on the target domain")
    return found


if __name__ == "__main__":
    main()
