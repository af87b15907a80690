"""LightningModules: `VAEModule` trains any VAE on any objective, `ImageVAE` is the model of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastvae import checks
from fastvae.distributed import is_initialized
from fastvae.objectives import Bernoulli, Gaussian, Laplace, Likelihood, MMDRows, ObjectiveTerms, VAEObjective, VAEOutput
from fastvae.preparation import Standardise
from fastvae.schedules import Kind as ScheduleKind
from fastvae.training.data import Batch, ImageData
from fastvae.training.metrics import WIDE, code_summary
from fastvae.training.schedule import Schedule
from fastvae.vae import PREPARATION as IN_VAE
from fastvae.vae import VAE

# Takes the parameters and the learning rate.
OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]

# Options that may be objects; on the command line they are the names of classes.
OBJECT_OPTIONS = ("encoder", "decoder", "optimizer", "lr_scheduler")
# The name of the preparation in a checkpoint.
PREPARATION = f"vae.{IN_VAE}"
# The name of the training table's columns in a checkpoint.
COLUMNS = "columns"


class VAEModule(LightningModule):
    """Trains a VAE on an objective, and measures its codes in validation and test.

    Batches are pairs (x, labels). x is in the units of the data, or already standardised if it comes from `ImageData`; the labels are not
    used. Losses are those of x after the VAE's `preparation`. Besides the terms of the loss, each validation (or without one, each epoch of
    training) logs the measures of `fastvae.training.metrics.code_summary`, over the first `diagnostics_size` codes (the last ones, in
    training); `test` logs them over the first `evaluation_size`.

    Args:
        vae: The model.
        objective: The loss.
        lr: The learning rate.
        optimizer: A function of the parameters and lr, such as `torch.optim.AdamW`; Adam by default.
        lr_scheduler: A function of the optimizer, such as `lambda optimizer: CosineAnnealingLR(optimizer, 100)`; a constant rate by
            default. `ReduceLROnPlateau` monitors the validation loss, or the training loss if there is no validation.
        lr_scheduler_interval: "epoch" or "step", after which the scheduler steps.
        evaluation_size: The number of codes measured in test.
        diagnostics_size: The number of codes measured in each epoch; 0 for none.
        nll_samples: The number of codes of each x for the importance-weighted −log p(x) that `test` logs as `nll`; 0 for none.
        gradient_norms_every: The number of steps between two logs of the gradient norm of each term of the loss; 0 for none. Takes a
            backward pass for each term and retains the graph, so it does not work with `compile`.
        compile: Compile the forward pass and the loss by `torch.compile(fullgraph=True, dynamic=True)`.
        channels_last: Use the channels_last memory format for images and convolutions.
    """

    def __init__(
        self,
        vae: VAE,
        objective: VAEObjective,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        evaluation_size: int = 10_000,
        diagnostics_size: int = 2000,
        nll_samples: int = 0,
        gradient_norms_every: int = 0,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        checks.flag("compile", compile)
        checks.flag("channels_last", channels_last)
        if vae.posterior == "deterministic" and objective.kl_weight:
            checks.kl_of_deterministic(objective.kl_weight)
        if compile and gradient_norms_every:
            raise ValueError(f"gradient_norms_every must be 0 if compile is true, got {gradient_norms_every}")
        self.channels_last = channels_last
        self.vae = vae.to(memory_format=torch.channels_last) if channels_last else vae  # type: ignore[call-overload]
        self.objective = objective
        self.lr = lr
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.evaluation_size = evaluation_size
        self.diagnostics_size = diagnostics_size
        self.nll_samples = nll_samples
        self.gradient_norms_every = gradient_norms_every
        self.observed: dict[str, Tensor] = {}
        self.columns: tuple[str, ...] = ()
        self._prepared = False
        self._codes: list[VAEOutput] = []
        self._train_terms: Callable[[Tensor], tuple[VAEOutput, ObjectiveTerms]] = (
            torch.compile(self._terms, fullgraph=True, dynamic=True) if compile else self._terms
        )

    def setup(self, stage: str) -> None:
        if is_initialized() and dist.get_world_size() > 1:
            self.objective.process_group = dist.group.WORLD
        if self.trainer.precision == "64-true":
            self.double()  # before Lightning does, so that a checkpoint's weights are not rounded to float32 first
        data = getattr(self.trainer, "datamodule", None)
        self._prepared = isinstance(data, ImageData)
        if isinstance(data, ImageData):
            self.columns = data.take_columns(self.columns)
            # Shared by model and data, so that a checkpoint that is loaded later sets its numbers for both.
            self.vae.preparation = data.prepare_by(self.vae.preparation)
            if isinstance(self.vae.likelihood, Bernoulli):
                for part in data.blocks():
                    checks.unit_interval("data", part, "model.likelihood gaussian takes any numbers")

    def teardown(self, stage: str) -> None:
        self.objective.process_group = None
        self._prepared = False

    def forward(self, x: Tensor) -> VAEOutput:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        options: dict[str, Any] = {"samples": self.objective.samples} if self.objective.samples > 1 else {}
        if self.vae.preparation is not None and self._prepared:
            options["prepared"] = True
        output: VAEOutput = self.vae(x, **options)
        return output

    def _terms(self, x: Tensor) -> tuple[VAEOutput, ObjectiveTerms]:
        output = self(x)
        return output, self.objective(output, x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch[0]
        output, terms = self._train_terms(x)
        self.observed = _named_tensors(x, output, terms)
        self._log_step("loss", terms.loss.detach(), len(x), shown=True)
        for name, value in _logged(terms).items():
            self._log_step(name, value, len(x))
        if self.gradient_norms_every and self.global_step % self.gradient_norms_every == 0:
            self._log_gradient_norms(terms)
        if self._measures_training():
            self._codes.append(_codes(output))
            while sum(len(codes.mu) for codes in self._codes[1:]) >= self.diagnostics_size:
                self._codes.pop(0)
        loss: Tensor = terms.loss
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.observed = {}

    def on_train_epoch_end(self) -> None:
        if self._measures_training():
            self._log_codes("train", self.diagnostics_size)

    def on_validation_epoch_start(self) -> None:
        self._codes = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step("val", batch, self.diagnostics_size)

    def on_validation_epoch_end(self) -> None:
        self._log_codes("val", self.diagnostics_size)

    def on_test_epoch_start(self) -> None:
        self._codes = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step("test", batch, self.evaluation_size)
        if self.nll_samples:
            x = batch[0]
            nll = -self.vae.log_likelihood(x, samples=self.nll_samples, prepared=self._prepared).mean()
            self.log("test/nll", nll, batch_size=len(x), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self._log_codes("test", self.evaluation_size)

    @torch.no_grad()
    def metric_names(self, x: Tensor) -> set[str]:
        """The names of all metrics that a run logs, found with a batch x of its shape. The random state is preserved."""
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            training = self.training
            output = self.eval()(x)
            terms = {stage: ["loss", *_logged(self.objective(output, x, all_terms=stage == "val"))] for stage in ("train", "val")}
            self.train(training)
            codes = _codes(output)
            scalars, per_dimension = code_summary(codes.mu, codes.logvar, codes.z) if self.diagnostics_size else ({}, {})
        each = [f"{name}_{d:03d}" for name, values in per_dimension.items() if len(values) <= WIDE for d in range(len(values))]
        measured = [*scalars, *each]
        terms["train" if self._measures_training() else "val"] += measured
        names = {f"{stage}/{name}" for stage in terms for name in terms[stage]} | {"train/loss_step", "train/loss_epoch"}
        return names if sum(self.trainer.num_val_batches) else {name for name in names if name.startswith("train/")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[COLUMNS] = list(self.columns)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        columns = checkpoint.get(COLUMNS, [])
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise ValueError("ckpt_path must be a checkpoint of this model, got columns whose names are not text")
        self.columns = tuple(columns)
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData):
            self.columns = data.take_columns(self.columns)
        saved = checkpoint["state_dict"]
        if PREPARATION in saved and self._trainer is None:
            self.vae.preparation = Standardise(*saved[PREPARATION])
        own = self.state_dict()
        if (PREPARATION in own) != (PREPARATION in saved):
            is_, must = (str(PREPARATION in state).lower() for state in (own, saved))
            raise ValueError(f"data.standardise must be {must}, as in ckpt_path, got {is_}")
        for name in sorted(own.keys() | saved.keys()):
            shapes = [tuple(state[name].shape) if name in state else "absent" for state in (own, saved)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"ckpt_path must be a checkpoint of this model, got {name} {shapes[1]} in it and {shapes[0]} in the model")

    def configure_optimizers(self) -> Any:
        optimizer = self._adam() if self.optimizer is None else self.optimizer(self.parameters(), self.lr)
        if self.lr_scheduler is None:
            return optimizer
        monitor = "val/loss" if self._trainer is not None and any(self.trainer.num_val_batches) else "train/loss"
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": self.lr_scheduler_interval, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _adam(self) -> torch.optim.Adam:
        # On a CPU the fused Adam takes a third of the time. Lightning cannot clip gradients with it in mixed precision.
        mixed = self._trainer is not None and "mixed" in self.trainer.precision
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=True if self.device.type == "cpu" and not mixed else None)

    def _evaluation_step(self, stage: str, batch: Batch, size: int) -> None:
        x = batch[0]
        output = self(x)
        terms = self.objective(output, x, all_terms=True)
        self.log(f"{stage}/loss", terms.loss, prog_bar=stage == "val", batch_size=len(x), sync_dist=True)
        self.log_dict({f"{stage}/{name}": value for name, value in _logged(terms).items()}, batch_size=len(x), sync_dist=True)
        if sum(len(codes.mu) for codes in self._codes) < size:
            self._codes.append(_codes(output))

    def _measures_training(self) -> bool:
        return self.diagnostics_size > 0 and not sum(self.trainer.num_val_batches)

    def _log_codes(self, stage: str, size: int) -> None:
        if self._codes and size:
            mu, z = (torch.cat([getattr(codes, name) for codes in self._codes])[:size] for name in ("mu", "z"))
            logvars = [codes.logvar for codes in self._codes if codes.logvar is not None]
            scalars, per_dimension = code_summary(mu, torch.cat(logvars)[:size] if logvars else None, z)
            for name, values in per_dimension.items():
                if stage != "test" and len(values) <= WIDE:  # else they would be too many scalars
                    scalars |= {f"{name}_{d:03d}": float(value) for d, value in enumerate(values)}
            self.log_dict({f"{stage}/{name}": float(value) for name, value in scalars.items()}, sync_dist=True)
        self._codes = []

    def _log_step(self, name: str, value: Tensor, batch_size: int, shown: bool = False) -> None:
        """`self.log` without its checks and copies, which take a twentieth of a small step for each name, where it would only add a number
        to the results of an epoch."""
        name = f"train/{name}"
        results, key = getattr(self._trainer, "_results", None), f"training_step.{name}"
        if results is None or key not in results or self.trainer._logger_connector.should_reset_tensors("training_step"):
            self.log(name, value, on_step=shown, on_epoch=True, prog_bar=shown, batch_size=batch_size)
        else:
            results.update_metrics(key, value, batch_size)

    def _log_gradient_norms(self, terms: ObjectiveTerms) -> None:
        parameters = [p for p in self.parameters() if p.requires_grad]
        for name, term in terms.summands.items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
            self.log(f"train/gradient_norm_{name}", norm, on_step=True, on_epoch=False)


class ImageVAE(VAEModule):
    """A VAE for images of one shape, or for rows of a table.

    Args:
        shape: The shape of one image, (C, H, W), or of one row, (features,).
        architecture: The networks: mlp (perceptrons), conv (convolutions, for images) or autoencoder_kl (the residual convolutions of
            latent diffusion, for images, whose latents have channels, height and width).
        latent_dim: The number of latent dimensions of mlp and conv.
        hidden: The widths of the hidden layers of mlp; conv uses the first.
        channels: The channels of each convolution of conv, each of which halves the image; or the channels of autoencoder_kl at each
            resolution, the highest first, so that three make the latents' height and width a quarter of the image's.
        latent_channels: The number of channels of the latents of autoencoder_kl.
        blocks: The number of residual blocks of autoencoder_kl at each resolution.
        likelihood: p(x|z): bernoulli (for values in [0, 1]), gaussian, laplace, or auto: gaussian for tables or with a learned or optimal
            sigma, else bernoulli.
        sigma: The standard deviation of the Gaussian likelihood, or its initial value if it is learned or optimal.
        learn_sigma: Train the sigma of the Gaussian likelihood.
        optimal_sigma: Use the sigma that maximises the Gaussian likelihood of each training batch.
        scale: The scale of the Laplace likelihood, its mean absolute deviation.
        posterior: q(z|x): gaussian, deterministic (without a KL), or auto: deterministic for wae_mmd, else gaussian.
        logvar_bounds: Soft bounds of the encoder's log-variance, two numbers; by default none, or -30 and 20 for autoencoder_kl.
        objective: The loss: vae, beta_vae, info_vae, mmd_vae, wae_mmd, beta_tc_vae, capacity_vae, dip_vae or iwae.
        beta: The weight of the KL in beta_vae, or of the total correlation in beta_tc_vae.
        alpha: InfoVAE's alpha: the weight of the KL is 1 - alpha.
        lambda_: InfoVAE's lambda: the weight of the MMD is alpha + lambda - 1 in info_vae, and lambda in mmd_vae and wae_mmd.
        kernel: The kernel of the MMD in wae_mmd. The other objectives use rbf, also called gaussian.
        bandwidth: The bandwidth of the kernel; by default sqrt(latent_dim), or for imq the seven of the WAE's authors.
        estimator: The estimator of the MMD, unbiased or biased.
        mmd_rows: What the MMD compares with the prior: each latent as a whole (sample), or the channels at each of its locations (location,
            whose default bandwidth is sqrt(latent_channels)).
        tc_estimator: The estimator of the total correlation in beta_tc_vae, minibatch_weighted or minibatch_stratified.
        dataset_size: The number of training images, for the total correlation.
        free_bits: The KL in nats below which a group of latent dimensions has no penalty, in vae and beta_vae.
        free_bits_group: The number of neighbouring latent dimensions in a group of free_bits.
        gamma: The weight of |KL - capacity| in capacity_vae.
        capacity: The target of each image's KL in capacity_vae, in nats.
        lambda_od: The weight of the off-diagonal covariances of the codes in dip_vae.
        lambda_d: The weight in dip_vae of (variance - 1)² of the codes; by default 10 lambda_od (dip_kind i) or lambda_od (ii).
        dip_kind: The covariance in dip_vae: of the posterior's means (i), or of the codes (ii).
        samples: The number of codes of each image in iwae.
        bound_gradient: The encoder's gradient in iwae: reparameterised, or doubly, which is less noisy for many samples.
        kl_schedule: The schedule of the KL's weight from 0 to its value: constant (at once), linear, cosine or cyclical.
        kl_schedule_steps: The number of training steps of kl_schedule.
        kl_schedule_cycles: The number of cycles of the cyclical kl_schedule.
        mmd_schedule: The schedule of the MMD's weight from 0 to its value: constant (at once), linear, cosine or cyclical.
        mmd_schedule_steps: The number of training steps of mmd_schedule.
        capacity_schedule: The schedule of the capacity in capacity_vae from 0: constant (at once), linear, cosine or cyclical.
        capacity_schedule_steps: The number of training steps of capacity_schedule.
        encoder: Your own class of the encoder, such as my_package.Encoder, from images to 2 latent_dim numbers.
        decoder: Your own class of the decoder, from codes to the parameters of the likelihood.
        lr: The learning rate.
        optimizer: The class of the optimizer, such as torch.optim.AdamW; Adam by default.
        lr_scheduler: The class of a learning rate scheduler, such as torch.optim.lr_scheduler.CosineAnnealingLR.
        lr_scheduler_interval: epoch or step, after which the scheduler steps.
        evaluation_size: The largest number of test images over which the codes are measured.
        diagnostics_size: The largest number of validation images over which the codes are measured in each epoch; 0 for none.
        nll_samples: The number of codes of each image for the importance-weighted -log p(x) that test reports; 0 for none.
        gradient_norms_every: The number of steps between two logs of the gradient norm of each term; 0 for none.
        compile: Compile the training step as one graph.
        channels_last: Use PyTorch's channels_last memory format, with which some processors convolve faster.
    """

    def __init__(
        self,
        shape: Sequence[int],
        architecture: Literal["mlp", "conv", "autoencoder_kl"] = "mlp",
        latent_dim: int = 6,
        hidden: Sequence[int] = (400,),
        channels: Sequence[int] = (32, 64),
        latent_channels: int = 4,
        blocks: int = 1,
        likelihood: Literal["auto", "bernoulli", "gaussian", "laplace"] = "auto",
        sigma: float = 1.0,
        learn_sigma: bool = False,
        optimal_sigma: bool = False,
        scale: float = 1.0,
        posterior: Literal["auto", "gaussian", "deterministic"] = "auto",
        logvar_bounds: tuple[float, float] | None = None,
        objective: Literal[
            "vae", "beta_vae", "info_vae", "mmd_vae", "wae_mmd", "beta_tc_vae", "capacity_vae", "dip_vae", "iwae"
        ] = "mmd_vae",
        beta: float = 1.0,
        alpha: float = 0.0,
        lambda_: float = 1000.0,
        kernel: checks.RadialKernelName = "rbf",
        bandwidth: float | None = None,
        estimator: Literal["unbiased", "biased"] = "unbiased",
        mmd_rows: MMDRows = "sample",
        tc_estimator: Literal["minibatch_weighted", "minibatch_stratified"] = "minibatch_weighted",
        dataset_size: int | None = None,
        free_bits: float = 0.0,
        free_bits_group: int = 1,
        gamma: float = 100.0,
        capacity: float = 25.0,
        lambda_od: float = 10.0,
        lambda_d: float | None = None,
        dip_kind: Literal["i", "ii"] = "i",
        samples: int = 10,
        bound_gradient: Literal["reparameterised", "doubly"] = "reparameterised",
        kl_schedule: ScheduleKind = "constant",
        kl_schedule_steps: int = 10_000,
        kl_schedule_cycles: int = 4,
        mmd_schedule: ScheduleKind = "constant",
        mmd_schedule_steps: int = 10_000,
        capacity_schedule: ScheduleKind = "linear",
        capacity_schedule_steps: int = 10_000,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        evaluation_size: int = 10_000,
        diagnostics_size: int = 2000,
        nll_samples: int = 0,
        gradient_norms_every: int = 0,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        if posterior == "auto":
            posterior = "deterministic" if objective == "wae_mmd" else "gaussian"
        if likelihood == "auto":
            likelihood = "gaussian" if len(shape) == 1 or learn_sigma or optimal_sigma else "bernoulli"
        if likelihood != "gaussian" and (learn_sigma or optimal_sigma):
            raise ValueError(f"model.learn_sigma and model.optimal_sigma must be false for model.likelihood {likelihood}, got true")
        noise: Likelihood
        if likelihood == "gaussian":
            noise = Gaussian(sigma, learned=learn_sigma, optimal=optimal_sigma)
        else:
            noise = Laplace(scale) if likelihood == "laplace" else Bernoulli()
        options: dict[str, Any] = {"likelihood": noise, "posterior": posterior}
        if logvar_bounds is not None:
            options["logvar_bounds"] = logvar_bounds
        if architecture == "mlp":
            vae = VAE.mlp(shape, latent_dim=latent_dim, hidden=hidden, **options)
        elif architecture == "conv":
            vae = VAE.conv(shape, latent_dim=latent_dim, channels=channels, hidden=hidden[0], **options)
        else:
            vae = VAE.autoencoder_kl(shape, latent_channels=latent_channels, channels=channels, blocks=blocks, **options)
        if encoder is not None or decoder is not None:
            vae.encoder, vae.decoder, vae.networks = encoder or vae.encoder, decoder or vae.decoder, None
        if objective == "beta_tc_vae" and dataset_size is None:
            raise ValueError("model.dataset_size must be given for model.objective beta_tc_vae, got none")
        if free_bits and objective not in ("vae", "beta_vae"):
            raise ValueError(f"model.free_bits must be 0 unless model.objective is vae or beta_vae, got {free_bits:g} for {objective}")
        mmd_options: dict[str, Any] = {"bandwidth": bandwidth, "estimator": estimator, "mmd_rows": mmd_rows}
        terms: dict[str, Callable[[], VAEObjective]] = {
            "vae": lambda: VAEObjective.vae(free_bits=free_bits, free_bits_group=free_bits_group),
            "beta_vae": lambda: VAEObjective.beta_vae(beta, free_bits=free_bits, free_bits_group=free_bits_group),
            "info_vae": lambda: VAEObjective.info_vae(alpha, lambda_, **mmd_options),
            "mmd_vae": lambda: VAEObjective.mmd_vae(lambda_, **mmd_options),
            "wae_mmd": lambda: VAEObjective.wae_mmd(lambda_, kernel=kernel, **mmd_options),
            "beta_tc_vae": lambda: VAEObjective.beta_tc_vae(beta, dataset_size or 1, estimator=tc_estimator),
            "capacity_vae": lambda: VAEObjective.capacity_vae(gamma, capacity),
            "dip_vae": lambda: VAEObjective.dip_vae(lambda_od, lambda_d, kind=dip_kind),
            "iwae": lambda: VAEObjective.iwae(samples, gradient=bound_gradient),
        }
        super().__init__(
            vae,
            terms[objective](),
            lr=lr,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            evaluation_size=evaluation_size,
            diagnostics_size=diagnostics_size,
            nll_samples=nll_samples,
            gradient_norms_every=gradient_norms_every,
            compile=compile,
            channels_last=channels_last,
        )
        self.save_hyperparameters(ignore=OBJECT_OPTIONS if _given_hyperparameters.get() is None else ())
        self._schedules = [
            Schedule("kl_weight", kl_schedule, kl_schedule_steps, cycles=kl_schedule_cycles),
            Schedule("mmd_weight", mmd_schedule, mmd_schedule_steps),
        ]
        if objective == "capacity_vae":
            self._schedules.append(Schedule("capacity", capacity_schedule, capacity_schedule_steps))

    def configure_callbacks(self) -> Sequence[Callback]:
        return [schedule for schedule in self._schedules if schedule.kind != "constant"]


def _logged(terms: ObjectiveTerms) -> dict[str, Tensor]:
    """The terms that are logged besides the loss, by name."""
    values = {
        "reconstruction": terms.reconstruction,
        "kl": terms.kl,
        "mmd": terms.mmd,
        "total_correlation_term": terms.total_correlation,
        "dip": terms.dip,
    }
    named = {name: value.detach() for name, value in values.items() if value is not None}
    return named if terms.kl is None else named | {"negative_elbo": named["reconstruction"] + named["kl"]}


def _codes(output: VAEOutput) -> VAEOutput:
    """The codes in an output, one row for each sample, in one dtype: under autocast z is float32 and mu is not."""
    mu = output.mu.detach().flatten(1).to(output.z.dtype)
    z = output.z.detach()[:: len(output.z) // len(mu)].flatten(1)
    logvar = None if output.logvar is None else output.logvar.detach().flatten(1).to(z.dtype)
    return output._replace(reconstruction=z, z=z, mu=mu, logvar=logvar, kl=None)


def _named_tensors(x: Tensor, output: VAEOutput, terms: ObjectiveTerms) -> dict[str, Tensor]:
    """The tensors of a step in the order of the computation: the first one that is not finite shows where it began."""
    named = {
        "x": x,
        "mu": output.mu,
        "logvar": output.logvar,
        "z": output.z,
        "reconstruction": output.reconstruction,
        "kl": output.kl,
        "the reconstruction term": terms.reconstruction,
        "the mmd term": terms.mmd,
        "the total correlation": terms.total_correlation,
        "the dip term": terms.dip,
        "loss": terms.loss,
    }
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
