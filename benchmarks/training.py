"""Training steps on a CPU, in a plain loop: python -m benchmarks.training; in `fastvae fit`: python -m benchmarks.training --fit

A perceptron 784-400-20 and Adam, on one thread; `fastvae.VAE` with `VAEObjective` against hand-written PyTorch, each as it is and compiled.
Of each batch size all providers once a round, in one process; medians of the processor's time, and their ratio to that of the hand-written
VAE, whose loss has no MMD. Rows are appended to benchmarks/results/training_steps.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from benchmarks.measure import commit, interleaved, machine, summary
from benchmarks.providers import matrix, version, versions
from benchmarks.rows import RESULTS

Loss = Callable[[nn.Module, Tensor], Tensor]
BATCHES = (64, 128, 512, 4096)


class PlainVAE(nn.Module):
    """The perceptron 784-400-20 of PyTorch's example."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), z, mu, logvar


def plain_vae(model: nn.Module, x: Tensor) -> Tensor:
    logits, _, mu, logvar = model(x)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)


def plain_mmd_vae(model: nn.Module, x: Tensor) -> Tensor:
    logits, z, _, _ = model(x)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x) + 1000 * matrix(z, torch.randn_like(z), (20**0.5,))


def training_step(model: nn.Module, loss: Loss, x: Tensor) -> Callable[[], None]:
    """A step of Adam on a batch that lies on the device."""
    model = model.to(x.device)
    on_gpu = x.device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), fused=on_gpu, capturable=on_gpu)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, x).backward()
        optimizer.step()

    return step


def loss_of(objective: fastvae.VAEObjective) -> Loss:
    return lambda model, x: objective(model(x), x).loss


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    losses: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
        "eager": (PlainVAE, plain_vae),
        "eager with an MMD": (PlainVAE, plain_mmd_vae),
    }

    def model() -> nn.Module:
        return fastvae.VAE.mlp(784, latent_dim=20, likelihood="bernoulli")

    for name, objective in (("vae()", fastvae.VAEObjective.vae()), ("mmd_vae(1000)", fastvae.VAEObjective.mmd_vae(1000))):
        losses[f"fastvae, {name}"] = model, loss_of(objective)
    for n in BATCHES:
        x = torch.rand(n, 784)
        steps: dict[str, Callable[[], object]] = {name: training_step(make(), loss, x) for name, (make, loss) in losses.items()}
        for name, (make, loss) in losses.items():
            torch.compiler.reset()
            steps[f"{name}, torch.compile"] = training_step(make(), torch.compile(loss, dynamic=False), x)
        interleaved(steps, "cpu", 10, seconds)
        times = {name: summary(taken, "cpu") for name, taken in interleaved(steps, "cpu", 1000, seconds).items()}
        for name, found in times.items():
            ratio = round(found["processor_ms"] / times["eager"]["processor_ms"], 3)
            yield {"benchmark": "training", "batch": n, "provider": name, **found, "over_eager": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of one batch size; three rounds at least")
    parser.add_argument("--fit", action="store_true", help="what `benchmarks.fit` measures instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    date = datetime.now(timezone.utc).date().isoformat()
    common = {"device": machine("cpu"), "threads": 1, **versions(), "commit": commit(), "date": date}
    if args.fit:
        from benchmarks import fit

        common["pythae"] = version("pythae")
    for row in fit.rows(args.seconds) if args.fit else rows(args.seconds):
        ratio = row.get("over_eager", row.get("over_plain"))
        print(f"{row['batch']:5} {row['provider']:40} {row.get('processor_ms', 0):9.3f} ms, {ratio} of the first", flush=True)
        with (RESULTS / "training_steps.jsonl").open("a") as file:
            file.write(json.dumps(row | common) + "\n")


if __name__ == "__main__":
    main()
