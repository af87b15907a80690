"""Training steps on one thread of a CPU.

    python -m benchmarks.training           `fastvae.VAE` with `VAEObjective` against hand-written PyTorch, eager and compiled
    python -m benchmarks.training --fit     the command `fastvae fit` against Lightning and plain loops (benchmarks/fit.py)

The model is a perceptron 784-400-20, the optimiser Adam. For each batch size all providers run in one process, in turn. `over_eager` is the
ratio of the median processor time to that of the hand-written VAE without an MMD. Rows are appended to
benchmarks/results/training_steps.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from benchmarks.machine import conditions
from benchmarks.measure import summaries
from benchmarks.providers import matrix
from benchmarks.rows import RESULTS, append

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
    """A step of Adam, with model and batch on the device of x."""
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
        times = summaries(steps, "cpu", 1000, seconds, warm_up=10)
        for name, found in times.items():
            ratio = round(found["processor_ms"] / times["eager"]["processor_ms"], 3)
            yield {"benchmark": "training", "batch": n, "provider": name, **found, "over_eager": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of one batch size; it has three rounds at least")
    parser.add_argument("--fit", action="store_true", help="the command `fastvae fit` against Lightning and plain loops instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.fit:
        from benchmarks import fit

        found, common = fit.rows(args.seconds), conditions("cpu", "pythae")
    else:
        found, common = rows(args.seconds), conditions("cpu")
    for row in found:
        ratio = row.get("over_eager", row.get("over_plain"))
        print(f"{row['batch']:5} {row['provider']:40} {row.get('processor_ms', 0):9.3f} ms, {ratio} of the first", flush=True)
        append(RESULTS / "training_steps.jsonl", row | common)


if __name__ == "__main__":
    main()
