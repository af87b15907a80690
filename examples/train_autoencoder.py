"""Trains latent diffusion's kind of autoencoder on tiles of two photographs: python examples/train_autoencoder.py

Needs scikit-learn, which `pip install ".[train]"` brings. Takes a minute or two on a CPU. With --folder it writes the tiles as files
instead, for `fastvae fit --config autoencoder_kl --data.path FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import fastvae


def main() -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lambda_", type=float, help="weight of the MMD² of the latents' locations, in place of 1e-6 times the KL")
    parser.add_argument("--folder", type=Path, help="write the tiles there, and do not train")
    args = parser.parse_args()
    torch.manual_seed(0)

    pictures = torch.stack([torch.tensor(picture) for picture in load_sample_images().images])  # (2, 427, 640, 3), uint8
    tiles = pictures.unfold(1, 64, 64).unfold(2, 64, 64).flatten(0, 2)  # (120, 3, 64, 64)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        for k, tile in enumerate(tiles):
            Image.fromarray(tile.permute(1, 2, 0).numpy()).save(args.folder / f"{k:03d}.png")
        print(f"fastvae fit --config autoencoder_kl --data.path {args.folder}")
        return 0.0, 0.0
    held_out, x = (tiles[torch.randperm(len(tiles))] / 255).split([12, 108])

    model = fastvae.VAE.autoencoder_kl((3, 64, 64), latent_channels=8, channels=(16, 32, 64), likelihood="laplace")
    objective = fastvae.VAEObjective.beta_vae(1e-6)
    if args.lambda_ is not None:
        objective = fastvae.VAEObjective.mmd_vae(args.lambda_, mmd_rows="location")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.8, 0.95))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps + 1)
    errors = []
    for step in range(args.steps + 1):
        if step in (0, args.steps) or step % 100 == 0:
            with torch.no_grad():
                errors.append((model.reconstruct(held_out) - held_out).abs().mean().item())
            print(f"step {step}: mean absolute error {errors[-1]:.4f} of held-out tiles")
        batch = x[torch.randint(len(x), (4,))]
        loss = objective(model(batch), batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return errors[0], errors[-1]


if __name__ == "__main__":
    main()
