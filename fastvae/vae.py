"""Encoders, decoders and the VAE that joins them, as plain nn.Modules."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastvae import autoencoder_kl, checks
from fastvae.functional import draw_noise, reparameterize_kl
from fastvae.objectives import Bernoulli, Gaussian, Laplace, Likelihood, VAEOutput, log_importance_weights
from fastvae.preparation import Standardise

WEIGHTS = ("model.safetensors", "model.pt")
# The name of the preparation in a state_dict.
PREPARATION = "preparation._extra_state"
LikelihoodName = Literal["gaussian", "bernoulli", "laplace"]
LIKELIHOODS: dict[str, type[Likelihood]] = {"gaussian": Gaussian, "bernoulli": Bernoulli, "laplace": Laplace}
Posterior = Literal["gaussian", "deterministic"]
ARCHITECTURES = ("mlp", "conv", "autoencoder_kl")


class VAE(nn.Module):
    """An encoder q(z|x), a decoder p(x|z) and the prior N(0, I) over z.

    Args:
        encoder: Any module. For posterior="gaussian" it returns (N, 2·latent_dim), the means followed by the log-variances, or the pair
            (mu, logvar). For "deterministic" it returns (N, latent_dim). For latents (C, H, W) it returns (N, 2·C, H, W), or (N, C, H, W).
        decoder: Any module that maps (N, latent_dim) or (N, C, H, W) to the likelihood's parameters: means ("gaussian", "laplace") or
            logits ("bernoulli").
        latent_dim: D, the number of latent dimensions, or (C, H, W), the shape of a latent. Of a shape the first size, the channels, and
            the number of sizes are checked: fully convolutional networks take pictures of other sizes. `sample` draws this shape.
        likelihood: "gaussian" (sigma 1), "bernoulli", "laplace" (scale 1), or a `Likelihood` such as `Gaussian(0.1)` or
            `Gaussian(learned=True)`.
        posterior: "gaussian" or "deterministic".
        logvar_bounds: (low, high), soft bounds of logvar. The encoder's value v becomes c + r·tanh((v − c)/r), where c is the middle of the
            bounds and r half their distance. The derivative is 1 in the middle and falls to 0 towards the bounds. None: no bounds.
        preparation: `Standardise(mean, scale)` or `Standardise.of(x)`, to transform x before the encoder and the likelihood see it. All
            methods still take and return data in their own units.

    Attributes:
        latent_dim: D, the number of latent dimensions: C·H·W for latents (C, H, W).
        latent_shape: (D,), or (C, H, W).

    Raises:
        ValueError: An unknown option, bounds that are not in order, or an encoder whose result has the wrong shape.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_dim: int | Sequence[int],
        likelihood: LikelihoodName | Likelihood = "gaussian",
        posterior: Posterior = "gaussian",
        logvar_bounds: tuple[float, float] | None = None,
        preparation: Standardise | None = None,
    ) -> None:
        super().__init__()
        checks.option("posterior", posterior, get_args(Posterior))
        self.logvar_bounds = None if logvar_bounds is None else checks.ordered("logvar_bounds", logvar_bounds)
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = _latent_shape(latent_dim)
        self.latent_dim = math.prod(self.latent_shape)
        if not isinstance(likelihood, Likelihood):
            checks.option("likelihood", likelihood, LIKELIHOODS)
            likelihood = LIKELIHOODS[likelihood]()
        self.likelihood = likelihood
        self.posterior = posterior
        self.preparation = preparation
        # The arguments of `mlp`, `conv` or `autoencoder_kl`, for `save_pretrained`. Of other networks only the weights are known.
        self.networks: dict[str, Any] | None = None
        # Gives `sample` its device and dtype, for any decoder.
        self.register_buffer("origin", torch.zeros(self.latent_dim), persistent=False)
        self.origin: Tensor

    @classmethod
    def mlp(
        cls,
        shape: int | Sequence[int],
        *,
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        likelihood: LikelihoodName | Likelihood = "gaussian",
        posterior: Posterior = "gaussian",
        logvar_bounds: tuple[float, float] | None = None,
        preparation: Standardise | None = None,
    ) -> VAE:
        """A VAE of two mirrored perceptrons. `likelihood` and the arguments after it are those of `VAE`.

        Args:
            shape: The shape of one sample: a number of features, or (C, H, W).
            latent_dim: The number of latent dimensions.
            hidden: The widths of the encoder's hidden layers; the decoder has them in reverse.
        """
        vae = cls(
            mlp_encoder(shape, hidden, latent_dim, posterior=posterior),
            mlp_decoder(latent_dim, hidden[::-1], shape),
            latent_dim=latent_dim,
            likelihood=likelihood,
            posterior=posterior,
            logvar_bounds=logvar_bounds,
            preparation=preparation,
        )
        vae.networks = {"architecture": "mlp", "shape": list(_shape(shape)), "hidden": list(hidden)}
        return vae

    @classmethod
    def conv(
        cls,
        shape: Sequence[int],
        *,
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        likelihood: LikelihoodName | Likelihood = "gaussian",
        posterior: Posterior = "gaussian",
        logvar_bounds: tuple[float, float] | None = None,
        preparation: Standardise | None = None,
    ) -> VAE:
        """A VAE of two mirrored convolutional networks. `likelihood` and the arguments after it are those of `VAE`.

        Args:
            shape: The shape of one image, (C, H, W) with H, W ≥ 2^len(channels).
            latent_dim: The number of latent dimensions.
            channels: The channels of the encoder's convolutions, each of which halves H and W; the decoder has them in reverse.
            hidden: The width of the hidden layer between convolutions and code.
        """
        vae = cls(
            conv_encoder(shape, channels, latent_dim, hidden=hidden, posterior=posterior),
            conv_decoder(latent_dim, channels[::-1], shape, hidden=hidden),
            latent_dim=latent_dim,
            likelihood=likelihood,
            posterior=posterior,
            logvar_bounds=logvar_bounds,
            preparation=preparation,
        )
        vae.networks = {"architecture": "conv", "shape": list(_shape(shape)), "channels": list(channels), "hidden": hidden}
        return vae

    @classmethod
    def autoencoder_kl(
        cls,
        shape: Sequence[int],
        *,
        latent_channels: int = 4,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        likelihood: LikelihoodName | Likelihood = "gaussian",
        posterior: Posterior = "gaussian",
        logvar_bounds: tuple[float, float] | None = (-30.0, 20.0),
        preparation: Standardise | None = None,
    ) -> VAE:
        """A VAE of two residual convolutional networks with latents (latent_channels, H/f, W/f), f = 2^(len(channels) − 1).

        The networks are those of latent diffusion's AutoencoderKL without attention: residual blocks of GroupNorm, SiLU and 3×3
        convolutions, a strided convolution between two resolutions, and in the decoder a nearest-neighbour upsampling and a convolution.
        Unlike latent diffusion's, that convolution changes the number of channels, and no GroupNorm and SiLU precede the last convolution
        of each network. Pixels between 0 and 1 become −1 to 1 inside the networks. They take pictures of any size that f divides.
        `likelihood` and the arguments after it are those of `VAE`; latent diffusion has the loss `VAEObjective.beta_vae(1e-6)`, the
        likelihood "laplace", and hard bounds of logvar where these are soft.

        Args:
            shape: The shape of one picture, (C, H, W), with H and W multiples of f.
            latent_channels: The number of channels of the latents.
            channels: The number of channels at each resolution, the highest first. Three give f = 4, four give f = 8.
            blocks: The number of residual blocks at each resolution, in the encoder and in the decoder; 2 more follow the lowest one.

        Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", appendix G.
        """
        latent = autoencoder_kl.latent_shape(shape, latent_channels, channels, blocks)
        vae = cls(
            autoencoder_kl.encoder(shape[0], channels, _code_width(latent_channels, posterior), blocks=blocks),
            autoencoder_kl.decoder(latent_channels, channels[::-1], shape[0], blocks=blocks),
            latent_dim=latent,
            likelihood=likelihood,
            posterior=posterior,
            logvar_bounds=logvar_bounds,
            preparation=preparation,
        )
        sizes = {"latent_channels": latent_channels, "channels": list(channels), "blocks": blocks}
        vae.networks = {"architecture": "autoencoder_kl", "shape": list(_shape(shape)), **sizes}
        return vae

    def forward(
        self,
        x: Tensor,
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        samples: int = 1,
        prepared: bool = False,
    ) -> VAEOutput:
        """Encodes x, draws z and decodes it.

        Args:
            x: (N, …), as the encoder takes it.
            eps: The noise of z = mu + exp(½·logvar)·eps, in the shape of mu, or (N, samples, …) if samples > 1. Drawn by default.
            generator: The source of eps, PyTorch's global one by default.
            samples: K, the number of codes of each x. A deterministic posterior has one.
            prepared: Whether x, here and in the objective, has already been through `preparation`.

        Raises:
            ValueError: More than one sample of a deterministic posterior.
        """
        mu, logvar = self.encode(x, prepared=prepared)
        preparation = None if prepared else self.preparation
        if checks.integer("samples", samples, at_least=1) == 1:
            if logvar is None:
                return VAEOutput(self.decode(mu), mu, mu, None, None, self.likelihood, preparation)
            z, kl = reparameterize_kl(mu, logvar, eps=eps, generator=generator, kl_dims="all")
            return VAEOutput(self.decode(z), z, mu, logvar, kl, self.likelihood, preparation, eps)
        if logvar is None:
            raise ValueError(f"samples must be 1 for a deterministic posterior, which has a single code, got {samples}")
        means = _repeated(mu, samples)
        eps = draw_noise(means, generator) if eps is None else eps
        z, kl = reparameterize_kl(means, _repeated(logvar, samples), eps=eps, kl_dims=range(2, means.ndim))
        z = z.flatten(0, 1)
        return VAEOutput(self.decode(z), z, mu, logvar, kl[:, 0], self.likelihood, preparation, eps.flatten(0, 1))

    def encode(self, x: Tensor, *, prepared: bool = False) -> tuple[Tensor, Tensor | None]:
        """(mu, logvar), each (N, latent_dim) or (N, C, H, W); logvar is None for a deterministic posterior. `prepared` as in `forward`."""
        checks.flag("prepared", prepared)
        code = self.encoder(x if prepared else self._prepared(x))
        if self.posterior == "deterministic":
            _check_code("a deterministic encoder's result", code, self.latent_shape)
            return code, None
        if isinstance(code, Tensor):
            _check_code("encoder's result", code, (2 * self.latent_shape[0], *self.latent_shape[1:]))
            mu, logvar = code.chunk(2, dim=1)
        elif isinstance(code, (tuple, list)) and len(code) == 2:
            mu, logvar = code
            _check_code("encoder's mu", mu, self.latent_shape)
            _check_code("encoder's logvar", logvar, self.latent_shape)
        else:
            raise TypeError(f"encoder must return a tensor or the pair (mu, logvar), got {type(code).__name__}")
        return mu, self._bounded(logvar)

    def _prepared(self, x: Tensor) -> Tensor:
        return x if self.preparation is None else self.preparation(x, self.origin.dtype)

    def _bounded(self, logvar: Tensor) -> Tensor:
        if self.logvar_bounds is None:
            return logvar
        low, high = self.logvar_bounds
        middle, radius = (low + high) / 2, (high - low) / 2
        return middle + radius * ((logvar - middle) / radius).tanh()

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters for codes z, (N, latent_dim) or (N, C, H, W), as the decoder returns them."""
        reconstruction: Tensor = self.decoder(z)
        return reconstruction

    def expected(self, z: Tensor) -> Tensor:
        """E[x|z] for codes z, (N, latent_dim) or (N, C, H, W), in the units of the data; float64 with a `preparation`."""
        x = self.likelihood.mean(self.decode(z))
        return x if self.preparation is None else self.preparation.inverse(x)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, with the options, and the weights to `folder`.

        The weights go to model.safetensors if the package safetensors is installed, else to model.pt, which
        `torch.load(file, weights_only=True)` reads. Of networks other than those of `mlp`, `conv` and `autoencoder_kl`, and of a likelihood
        other than `Gaussian`, `Bernoulli` and `Laplace`, only the names of the classes are saved: `from_pretrained` needs such modules as
        arguments.

        Raises:
            ValueError: The encoder or decoder that `mlp`, `conv` or `autoencoder_kl` made was replaced.
        """
        self._check_networks()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        prepare, state = self.preparation, self.state_dict()
        config = {
            "networks": self.networks or {"encoder": _class_path(self.encoder), "decoder": _class_path(self.decoder)},
            "latent_dim": self.latent_dim if len(self.latent_shape) == 1 else self.latent_shape,
            "likelihood": _likelihood_options(self.likelihood),
            "posterior": self.posterior,
            "logvar_bounds": self.logvar_bounds,
            "preparation": prepare and {"mean": prepare.mean.tolist(), "scale": prepare.scale.tolist()},
        }
        state.pop(PREPARATION, None)
        weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        for name in WEIGHTS:
            (folder / name).unlink(missing_ok=True)  # an earlier call may have written the other file
        if importlib.util.find_spec("safetensors"):
            from safetensors.torch import save_file  # type: ignore[import-not-found, unused-ignore]

            save_file(weights, folder / WEIGHTS[0])
        else:
            torch.save(weights, folder / WEIGHTS[1])
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def _check_networks(self) -> None:
        if self.networks is None:
            return
        with torch.device("meta"):
            made = _made(VAE, self.networks, {"latent_dim": self.latent_dim, "posterior": self.posterior})
        for name in ("encoder", "decoder"):
            own, other = (getattr(vae, name) for vae in (self, made))
            if str(own) != str(other) or [type(module) for module in own.modules()] != [type(module) for module in other.modules()]:
                raise ValueError(
                    f"{name} must be the one that VAE.{self.networks['architecture']} made, got another: "
                    "set vae.networks = None to save the weights alone"
                )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
    ) -> VAE:
        """Loads a VAE that `save_pretrained` or `fastvae export` wrote, on the CPU, in evaluation mode. Untrusted files are safe to load.

        Args:
            folder: A folder with config.json and model.safetensors or model.pt.
            encoder: A module like the one that was saved, which receives the weights. Needed unless `mlp`, `conv` or `autoencoder_kl` made
                it.
            decoder: Likewise.
            likelihood: A likelihood like the one that was saved. Needed unless it is a `Gaussian`, `Bernoulli` or `Laplace`.

        Raises:
            FileNotFoundError: The files are missing.
            ImportError: The weights need the package safetensors.
            ValueError: The files are not those of a VAE, or the weights do not fit it.
        """
        folder = Path(folder)
        weights = _weights(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            networks = config.pop("networks")
            if config["preparation"] is not None:
                config["preparation"] = Standardise(**config["preparation"])
                weights[PREPARATION] = config["preparation"].get_extra_state()
            with torch.device("meta"):  # allocates nothing, however large a network the file names
                config["likelihood"] = likelihood or _likelihood_of(config["likelihood"])
                known = networks.get("architecture") in ARCHITECTURES
                if known:
                    vae = _made(cls, networks, config)
            if not known:
                if encoder is None or decoder is None:
                    raise ValueError(f"encoder and decoder must be given for custom networks, {networks}, got none")
                vae = cls(encoder, decoder, **config)
            vae.load_state_dict(weights, assign=True)
        except (OSError, RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"folder must hold the config.json and weights of a VAE, got others in {str(folder)!r} ({error})") from error
        dtype = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
        vae.origin = torch.zeros(vae.latent_dim, dtype=dtype)
        return vae.eval()

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, *, samples: int = 500, chunk: int = 50, generator: torch.Generator | None = None, prepared: bool = False
    ) -> Tensor:
        """An estimate of log p(x) in nats, shape (N,), by importance sampling: log 1/K·Σ_k p(x|z_k)·p(z_k)/q(z_k|x) with z_k ~ q(z|x).

        On average it lies below log p(x) and approaches it as K grows; K = 1 is the ELBO. It has no gradient. The density is that of x as
        given: in the units of the data, or standardised if x is `prepared`.

        Args:
            x: (N, …), as the encoder takes it.
            samples: K, the number of codes of each x.
            chunk: The number of codes of each x to process at a time, for memory O(N·chunk·features) at any K.
            generator: The source of the codes' noise, PyTorch's global one by default.
            prepared: Whether x has already been through `preparation`.

        Raises:
            ValueError: A deterministic posterior, or samples or chunk below 1.

        Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders".
        """
        checks.integer("chunk", chunk, at_least=1)
        checks.flag("prepared", prepared)
        volume = 0.0 if prepared or self.preparation is None else self.preparation.scale.log().sum().item()
        x = x if prepared else self._prepared(x)
        mu, logvar = self.encode(x, prepared=True)
        if logvar is None:
            raise ValueError("posterior must be 'gaussian' for a likelihood of x, got 'deterministic'")
        total = None
        left = checks.integer("samples", samples, at_least=1)
        while left:
            k = min(chunk, left)
            left -= k
            eps = draw_noise(_repeated(mu, k), generator)
            z, _ = reparameterize_kl(_repeated(mu, k), _repeated(logvar, k), eps=eps, kl_dims=range(2, mu.ndim + 1))
            log_prob = self.likelihood.log_prob(self.decode(z.flatten(0, 1)), x.repeat_interleave(k, 0)).reshape(-1, k)
            part = log_importance_weights(log_prob, z, logvar, eps).logsumexp(1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total - (math.log(samples) + volume)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] at the posterior's mean z = mu, in the units of the data."""
        return self.expected(self.encode(x)[0])

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """E[x|z] for n codes z drawn from N(0, I), in the units of the data."""
        n = checks.integer("n", n, at_least=1)
        z = torch.randn(n, *self.latent_shape, dtype=self.origin.dtype, device=self.origin.device, generator=generator)
        return self.expected(z)


def mlp_encoder(shape: int | Sequence[int], hidden: Sequence[int], latent_dim: int, *, posterior: Posterior = "gaussian") -> nn.Sequential:
    """(N, *shape) or (N, features) → (N, 2·latent_dim), or (N, latent_dim) for posterior="deterministic". ReLU between layers."""
    checks.sizes("hidden", hidden)
    widths = [math.prod(_shape(shape)), *hidden, _code_width(latent_dim, posterior)]
    return nn.Sequential(nn.Flatten(), *_perceptron(widths))


def mlp_decoder(latent_dim: int, hidden: Sequence[int], shape: int | Sequence[int]) -> nn.Sequential:
    """(N, latent_dim) → (N, *shape)."""
    checks.sizes("hidden", hidden)
    shape = _shape(shape)
    return nn.Sequential(*_perceptron([latent_dim, *hidden, math.prod(shape)]), nn.Unflatten(1, shape))


def conv_encoder(
    shape: Sequence[int], channels: Sequence[int], latent_dim: int, *, hidden: int = 256, posterior: Posterior = "gaussian"
) -> nn.Sequential:
    """(N, C, H, W) → (N, 2·latent_dim), or (N, latent_dim) for posterior="deterministic". Each of `channels` halves H and W."""
    sizes = _conv_sizes(shape, channels)
    layers: list[nn.Module] = []
    for c_in, c_out in zip([shape[0], *channels], channels, strict=False):
        layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.ReLU()]
    flat = channels[-1] * math.prod(sizes[-1])
    return nn.Sequential(*layers, nn.Flatten(), *_perceptron([flat, hidden, _code_width(latent_dim, posterior)]))


def conv_decoder(latent_dim: int, channels: Sequence[int], shape: Sequence[int], *, hidden: int = 256) -> nn.Sequential:
    """(N, latent_dim) → (N, C, H, W). Each of `channels` doubles H and W."""
    sizes = _conv_sizes(shape, channels)[::-1]
    first = (channels[0], *sizes[0])
    layers: list[nn.Module] = [*_perceptron([latent_dim, hidden, math.prod(first)]), nn.Unflatten(1, first)]
    for c_in, c_out, size in zip(channels, [*channels[1:], shape[0]], sizes[1:], strict=True):
        odd = (size[0] % 2, size[1] % 2)
        layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, output_padding=odd)]
    return nn.Sequential(*layers)


def _perceptron(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        checks.integer("every width of hidden", width_out, at_least=1)
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return layers[:-1]


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(checks.integer("every size of shape", size, at_least=1) for size in (shape if isinstance(shape, Sequence) else [shape]))


def _conv_sizes(shape: Sequence[int], channels: Sequence[int]) -> list[tuple[int, int]]:
    checks.sizes("shape", shape)
    checks.sizes("channels", channels)
    depth = len(channels)
    if len(shape) != 3 or depth < 1 or min(shape[1:]) < 2**depth:
        raise ValueError(f"shape must be (C, H, W) with H, W ≥ {2**depth} for {depth} convolutions (at least one), got {tuple(shape)}")
    return [(shape[1] >> level, shape[2] >> level) for level in range(depth + 1)]


def _code_width(latent_dim: int, posterior: Posterior) -> int:
    checks.option("posterior", posterior, get_args(Posterior))
    checks.integer("latent_dim", latent_dim, at_least=1)
    return latent_dim if posterior == "deterministic" else 2 * latent_dim


def _latent_shape(latent_dim: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(latent_dim, Sequence) or isinstance(latent_dim, str):
        return (checks.integer("latent_dim", latent_dim, at_least=1),)
    checks.sizes("latent_dim", latent_dim)
    if not latent_dim:
        raise ValueError("latent_dim must be a number or a shape (C, H, W), got an empty one")
    return tuple(map(int, latent_dim))


def _repeated(t: Tensor, samples: int) -> Tensor:
    """(N, …) as (N, samples, …)."""
    return t.unsqueeze(1).expand(-1, samples, *t.shape[1:])


def _made(cls: type[VAE], networks: dict[str, Any], options: dict[str, Any]) -> VAE:
    """The VAE with these networks, which name the constructor and its own arguments."""
    networks = dict(networks)
    name, options = networks.pop("architecture"), dict(options)
    # The other arguments of autoencoder_kl give the shape of a latent.
    latent_dim = options.pop("latent_dim") if name == "autoencoder_kl" else None
    vae: VAE = getattr(cls, name)(**networks, **options)
    if latent_dim is not None and _latent_shape(latent_dim) not in (vae.latent_shape, (vae.latent_dim,)):
        raise ValueError(f"latent_dim must be {vae.latent_shape} for these networks, got {latent_dim}")
    return vae


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _likelihood_options(likelihood: Likelihood) -> dict[str, Any]:
    if type(likelihood) is Gaussian:
        least_sigma, learned = math.sqrt(likelihood.least_variance), isinstance(likelihood.log_sigma, Tensor)
        sigma = {"sigma": likelihood.sigma, "learned": learned, "optimal": likelihood.optimal, "least_sigma": least_sigma}
        return {"kind": "gaussian", **sigma}
    if type(likelihood) is Laplace:
        return {"kind": "laplace", "scale": likelihood.scale}
    return {"kind": "bernoulli" if type(likelihood) is Bernoulli else _class_path(likelihood)}


def _likelihood_of(options: dict[str, Any]) -> Likelihood:
    kind = options.pop("kind")
    if kind not in LIKELIHOODS:
        raise ValueError(f"likelihood must be given for a custom one, {kind}, got none")
    return LIKELIHOODS[kind](**options)


def _weights(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder must hold config.json and model.safetensors or model.pt, got none in {str(folder)!r}")
    if file.suffix == ".pt":
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} must hold tensors only, got another file ({error})") from error
        if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise ValueError(f"{file} must hold a dictionary of tensors, got other values")
        return weights
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError(f"safetensors must be installed to read {file}: pip install safetensors")
    from safetensors import SafetensorError  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import load_file  # type: ignore[import-not-found, unused-ignore]

    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise ValueError(f"{file} must hold tensors only, got another file ({error})") from error


def _check_code(name: str, code: object, shape: Sequence[int]) -> None:
    code = checks.floating_tensor(name, code)
    if code.ndim != 1 + len(shape) or code.shape[1] != shape[0]:
        sizes = {1: "", 3: ", H, W"}.get(len(shape), ", …")
        raise ValueError(f"{name} must have shape (N, {shape[0]}{sizes}), got {tuple(code.shape)}")
