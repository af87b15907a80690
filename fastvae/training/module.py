"""The LightningModules: any VAE with any objective, and the image VAE of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fastvae.objectives import Bernoulli, Gaussian, ObjectiveTerms, VAEObjective, VAEOutput
from fastvae.training.metrics import active_units, collapsed_units, marginal_summary, mutual_information
from fastvae.vae import VAE

Batch = tuple[Tensor, Tensor]


class VAEModule(LightningModule):
    """Trains `vae` on `objective` with Adam, and measures its codes in `test`.

    Batches are pairs (x, labels); the labels are not used. `test` reports the loss's terms and, over the first `evaluation_size`
    samples, the mutual information I(x; z) (at most the logarithm of their number), active and collapsed units, and how far the
    marginal q(z) is from N(0, I).
    """

    def __init__(self, vae: VAE, objective: VAEObjective, *, lr: float = 1e-3, evaluation_size: int = 10_000) -> None:
        super().__init__()
        if vae.posterior == "deterministic" and objective.kl_weight:
            raise ValueError(f"kl_weight must be 0 for a deterministic posterior, which has no KL, got {objective.kl_weight:g}")
        self.vae = vae
        self.objective = objective
        self.lr = lr
        self.evaluation_size = evaluation_size
        self.observed: dict[str, Tensor] = {}
        self._codes: list[VAEOutput] = []

    def forward(self, x: Tensor) -> VAEOutput:
        output: VAEOutput = self.vae(x)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch[0]
        output = self(x)
        terms = self.objective(output, x)
        self.observed = _named_tensors(x, output, terms)
        self.log("train/loss", terms.loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(x))
        self._log_terms("train", terms, len(x))
        loss: Tensor = terms.loss
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.observed = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x = batch[0]
        terms = self.objective(self(x), x, all_terms=True)
        self.log("val/loss", terms.loss, prog_bar=True, batch_size=len(x), sync_dist=True)
        self._log_terms("val", terms, len(x))

    def on_test_epoch_start(self) -> None:
        self._codes = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        x = batch[0]
        output = self(x)
        terms = self.objective(output, x, all_terms=True)
        self.log("test/loss", terms.loss, batch_size=len(x), sync_dist=True)
        self._log_terms("test", terms, len(x))
        if sum(len(codes.z) for codes in self._codes) < self.evaluation_size:
            self._codes.append(output._replace(reconstruction=output.z))

    def on_test_epoch_end(self) -> None:
        mu, z = (torch.cat([getattr(codes, name) for codes in self._codes])[: self.evaluation_size] for name in ("mu", "z"))
        metrics: dict[str, float] = {"evaluation_size": len(mu), "active_units": active_units(mu)}
        logvars = [codes.logvar for codes in self._codes if codes.logvar is not None]
        if logvars:
            logvar = torch.cat(logvars)[: self.evaluation_size]
            metrics["mutual_information"] = mutual_information(mu, logvar)
            metrics["collapsed_units"] = collapsed_units(mu, logvar)
        if len(z) > 1:
            metrics |= {f"marginal_{name}": value for name, value in marginal_summary(z).items()}
        self.log_dict({f"test/{name}": float(value) for name, value in metrics.items()}, sync_dist=True)
        self._codes = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, saved = self.state_dict(), checkpoint["state_dict"]
        for name in sorted(own.keys() | saved.keys()):
            shapes = [tuple(state[name].shape) if name in state else "absent" for state in (own, saved)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"ckpt_path must be a checkpoint of this model, got {name} {shapes[1]} in it and {shapes[0]} in the model")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def _log_terms(self, stage: str, terms: ObjectiveTerms, batch_size: int) -> None:
        named = {f"{stage}/{name}": value for name, value in terms._asdict().items() if name != "loss" and value is not None}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=batch_size, sync_dist=stage != "train")


class ImageVAE(VAEModule):
    """A VAE for images of one shape.

    Args:
        shape: of one image, (C, H, W).
        architecture: mlp or conv.
        latent_dim: The number of latent dimensions.
        hidden: The widths of the perceptron's hidden layers (mlp; conv uses the first).
        channels: The channels of each convolution, each of which halves the image.
        likelihood: bernoulli (pixels in [0, 1]) or gaussian.
        sigma: The Gaussian likelihood's standard deviation, or where it starts if it is learned.
        learn_sigma: Train sigma.
        posterior: gaussian, deterministic (without a KL), or auto: deterministic for wae_mmd, else gaussian.
        objective: vae, beta_vae, info_vae, mmd_vae or wae_mmd.
        beta: The KL's weight in beta_vae.
        alpha: InfoVAE's alpha: the KL has the weight 1 - alpha.
        lambda_: InfoVAE's lambda: the MMD has the weight alpha + lambda - 1 in info_vae, lambda in mmd_vae and wae_mmd.
        bandwidth: The RBF kernel's bandwidth; sqrt(latent_dim) if it is not given.
        estimator: unbiased or biased, of the MMD.
        lr: Adam's learning rate.
        evaluation_size: The most test images that the mutual information and the other measures of the codes are taken over.
    """

    def __init__(
        self,
        shape: Sequence[int],
        architecture: Literal["mlp", "conv"] = "mlp",
        latent_dim: int = 6,
        hidden: Sequence[int] = (400,),
        channels: Sequence[int] = (32, 64),
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        sigma: float = 1.0,
        learn_sigma: bool = False,
        posterior: Literal["auto", "gaussian", "deterministic"] = "auto",
        objective: Literal["vae", "beta_vae", "info_vae", "mmd_vae", "wae_mmd"] = "mmd_vae",
        beta: float = 1.0,
        alpha: float = 0.0,
        lambda_: float = 1000.0,
        bandwidth: float | None = None,
        estimator: Literal["unbiased", "biased"] = "unbiased",
        lr: float = 1e-3,
        evaluation_size: int = 10_000,
    ) -> None:
        if posterior == "auto":
            posterior = "deterministic" if objective == "wae_mmd" else "gaussian"
        noise = Bernoulli() if likelihood == "bernoulli" else Gaussian(sigma, learned=learn_sigma)
        vae = (
            VAE.mlp(shape, latent_dim=latent_dim, hidden=hidden, likelihood=noise, posterior=posterior)
            if architecture == "mlp"
            else VAE.conv(shape, latent_dim=latent_dim, channels=channels, hidden=hidden[0], likelihood=noise, posterior=posterior)
        )
        terms = {
            "vae": lambda: VAEObjective.vae(),
            "beta_vae": lambda: VAEObjective.beta_vae(beta),
            "info_vae": lambda: VAEObjective.info_vae(alpha, lambda_, bandwidth=bandwidth, estimator=estimator),
            "mmd_vae": lambda: VAEObjective.mmd_vae(lambda_, bandwidth=bandwidth, estimator=estimator),
            "wae_mmd": lambda: VAEObjective.wae_mmd(lambda_, bandwidth=bandwidth, estimator=estimator),
        }
        super().__init__(vae, terms[objective](), lr=lr, evaluation_size=evaluation_size)
        self.save_hyperparameters()


def _named_tensors(x: Tensor, output: VAEOutput, terms: ObjectiveTerms) -> dict[str, Tensor]:
    """In the order of the computation, so that the first non-finite one is where it began."""
    named = {
        "x": x,
        "mu": output.mu,
        "logvar": output.logvar,
        "z": output.z,
        "reconstruction": output.reconstruction,
        "kl": output.kl,
        "the reconstruction term": terms.reconstruction,
        "the mmd term": terms.mmd,
        "loss": terms.loss,
    }
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
