"""Compares the ELBO with MMD-VAE on data where the ELBO collapses: scikit-learn's digits with a Gaussian decoder of sigma 1."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.objectives import VAEObjective
from fastvae.training import pictures
from fastvae.training.data import ImageData, new_folder, scaled
from fastvae.training.metrics import active_units, information, marginal_summary
from fastvae.vae import VAE


def compare(
    epochs: int = 100, lambda_: float = 10.0, latent_dim: int = 10, batch_size: int = 128, seed: int = 0, runs: str = "runs"
) -> None:
    """Show on scikit-learn's digits that codes collapse with the ELBO and do not with MMD-VAE.

    Both are trained and measured on all 1,797 images. The result is a table, printed and in table.txt, and compare.png.

    Args:
        epochs: The number of epochs of each training.
        lambda_: The weight of the MMD.
        latent_dim: The number of latent dimensions.
        batch_size: The number of images in a batch.
        seed: The seed of the weights, the order of the batches and the noise.
        runs: The folder of all runs: the files go to RUNS/compare/version_K.
    """
    data = ImageData("digits", batch_size=batch_size, validation=0, test=0, seed=seed)
    data.setup()
    images, labels = data.splits["train"]
    x = scaled(images)
    columns: dict[str, dict[str, str]] = {}
    codes: dict[str, tuple[VAE, Tensor]] = {}
    for name, objective in (("ELBO", VAEObjective.vae()), ("MMD-VAE", VAEObjective.mmd_vae(lambda_))):
        seed_everything(seed, verbose=False)
        vae = VAE.mlp(x.shape[1:], latent_dim=latent_dim, hidden=(256,), likelihood="gaussian")
        train(vae, objective, data, epochs)
        columns[name], z = measure(vae, objective, x)
        codes[name] = (vae, z)
    folder = new_folder(Path(runs, "compare"))
    draw(x, labels, codes, folder / "compare.png")
    titles = columns["ELBO"]
    width = max(map(len, titles))
    lines = [" " * width + "".join(f"{name:>24}" for name in columns)]
    lines += [f"{title:<{width}}" + "".join(f"{column[title]:>24}" for column in columns.values()) for title in titles]
    lines.append(f"(mutual information is at most log {len(x)} = {torch.tensor(len(x)).log():.2f})")
    (folder / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + f"\nPicture and table: {folder.resolve()}\n")


def train(vae: VAE, objective: VAEObjective, data: ImageData, epochs: int) -> None:
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    loader = data.train_dataloader()
    for _ in range(epochs):
        for x, _ in loader:
            loss = objective(vae(x), x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def measure(vae: VAE, objective: VAEObjective, x: Tensor) -> tuple[dict[str, str], Tensor]:
    """The column of the table, and the codes z."""
    output = vae(x)
    assert output.logvar is not None
    terms, marginal = objective(output, x), marginal_summary(output.z)
    return {
        "-log p(x|z), nats": f"{terms.reconstruction:.2f}",
        "KL(q(z|x) || p(z)), nats": f"{terms.kl:.3f}",
        "mutual information I(x; z), nats": f"{information(output.mu, output.logvar, output.z)[0]:.3f}",
        "active units": f"{active_units(output.mu)} of {vae.latent_dim}",
        "marginal q(z): smallest and largest std": f"{marginal['std_min']:.2f} to {marginal['std_max']:.2f}",
        "marginal q(z): MMD^2 to N(0, I)": f"{marginal['mmd']:.5f}",
    }, output.z


@torch.no_grad()
def draw(x: Tensor, labels: Tensor, codes: dict[str, tuple[VAE, Tensor]], file: Path) -> None:
    figure = Figure(figsize=(15, 4.4 * len(codes)), layout="constrained")
    rows = figure.subplots(len(codes), 3)
    for axes, (name, (vae, z)) in zip(rows, codes.items(), strict=True):
        pairs = pictures.pairs(x[:32], vae.reconstruct(x[:32]))
        pictures.show(axes[0], pictures.sheet(pairs, 8, paired=True), f"{name}: images and reconstructions")
        samples = vae.sample(64, generator=torch.Generator().manual_seed(0))
        pictures.show(axes[1], pictures.sheet(samples, 8), "Samples from the prior")
        pictures.latent_plane(axes[2], z, labels)
    figure.savefig(file, dpi=100)
