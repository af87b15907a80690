"""Trains an MMD-VAE on scikit-learn's digits in a loop of your own: python examples/train_mmd_vae.py

Needs scikit-learn, which `pip install ".[train]"` brings. Takes a few seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastvae


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lambda_", type=float, default=100.0, help="weight of the MMD²")
    args = parser.parse_args()
    torch.manual_seed(0)

    x = torch.from_numpy(load_digits().data / 16).float()  # (1797, 64), in [0, 1]
    loader = DataLoader(TensorDataset(x), batch_size=128, shuffle=True, drop_last=True)

    model = fastvae.VAE.mlp(64, latent_dim=8, hidden=(256,), likelihood="bernoulli")
    objective = fastvae.VAEObjective.mmd_vae(args.lambda_)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for epoch in range(args.epochs):
        for (batch,) in loader:
            terms = objective(model(batch), batch)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {terms.loss:.2f}, reconstruction {terms.reconstruction:.2f}, MMD² {terms.mmd:.4f}")

    with torch.no_grad():
        z = model(x).z
        distance = fastvae.mmd_to_normal(z, bandwidth=8**0.5, estimator="unbiased").item()
    print(f"MMD² between all codes and N(0, I): {distance:.5f}")
    print(f"standard deviations of the codes: {z.std(0).min():.2f} to {z.std(0).max():.2f}")
    return terms.loss.item()


if __name__ == "__main__":
    main()
