"""Commands that use a trained checkpoint: samples, reconstructions, codes, traversals, and exported files that need no fastvae."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from fastvae import checks
from fastvae.training import pictures
from fastvae.training.checkpoints import checkpoint_file, read_checkpoint
from fastvae.training.configs import read_yaml, restrict
from fastvae.training.data import NO_LABEL, ImageData, Source, Split, chunks, scaled
from fastvae.training.metrics import WIDE
from fastvae.training.module import ImageVAE
from fastvae.vae import VAE

SHOWN = 32
# The most rows of a traversal of wide codes.
TRAVERSED = 32


@torch.no_grad()
def sample(ckpt_path: str = "last", n: int = 64, output: str = "samples.png", seed: int = 0, runs: str = "runs") -> None:
    """Decode draws from the prior N(0, I).

    Args:
        ckpt_path: A checkpoint; 'last' for the newest one of all runs, or 'best' for the best one of that run.
        n: The number of samples.
        output: A .png picture, or a .npy array.
        seed: The seed of the random draws.
        runs: The folder of all runs.
    """
    module = load(ckpt_path, runs)
    x = module.vae.sample(checks.integer("n", n, at_least=1), generator=torch.Generator().manual_seed(seed))
    # A custom decoder may return flat rows.
    x = x.reshape(-1, *module.hparams["shape"])
    if not _saved_as_array(x, output):
        pictures.grid(_images(x), Path(output), "Samples: decoded draws from the prior N(0, I)")
    _print_path(output)


@torch.no_grad()
def reconstruct(
    ckpt_path: str = "last", path: str | None = None, n: int | None = None, output: str = "reconstructions.png", runs: str = "runs"
) -> None:
    """Reconstruct the test data of a run, or all data in a path: encode them and decode the means of their codes.

    The columns of a table are matched by name, if they have names; reconstructions have them in the order of the training table.

    Args:
        ckpt_path: A checkpoint; 'last' for the newest one of all runs, or 'best' for the best one of that run.
        path: A folder or file of data, used whole and in order; the run's own test data by default.
        n: The number of samples; by default all of them in an array or a table, and 32 images in a picture.
        output: A .png picture of originals and reconstructions, or a .npy array of reconstructions.
        runs: The folder of all runs.
    """
    _suffix(output, ".png", ".npy")
    module = load(ckpt_path, runs)
    x, _ = test_data(module, ckpt_path, path, runs, n).splits["train"]
    if n is None and x.ndim == 4 and output.endswith(".png"):
        x = x[:SHOWN]
    x_hat = torch.cat([module.vae.reconstruct(part) for part in chunks(x)])
    if not _saved_as_array(x_hat, output):
        if x.ndim == 4:
            images = "Held-out images" if path is None else "Images"
            pictures.reconstructions(x, x_hat.reshape(x.shape), Path(output), images=images)
        else:
            pictures.table_reconstructions(x, x_hat.reshape(x.shape), Path(output))
    _print_path(output)


@torch.no_grad()
def encode(ckpt_path: str = "last", path: str | None = None, n: int | None = None, output: str = "codes.npz", runs: str = "runs") -> None:
    """Encode the test data of a run, or all data in a path: mu and logvar of shape (N, latent_dim), with labels and names.

    Latents of autoencoder_kl keep their shape (N, C, H, W) in a .npz file, and are flattened to (N, C·H·W) in the others. A .npz file also
    holds labels (N,), -1 for none; the classes' names, if there are any; and rows (N,), the name of each sample: a
    picture's file, a table's first column if that has no name, else the index in the data (test data are shuffled). A .csv file has one row
    for each sample; so has a .h5ad file, whose X is mu.

    Args:
        ckpt_path: A checkpoint; 'last' for the newest one of all runs, or 'best' for the best one of that run.
        path: A folder or file of data, used whole and in order; the run's own test data by default.
        n: The number of samples; all by default.
        output: A .npz, .csv or, if the package anndata is installed, .h5ad file.
        runs: The folder of all runs.
    """
    _suffix(output, ".npz", ".csv", ".h5ad")
    if output.endswith(".h5ad") and not importlib.util.find_spec("anndata"):
        raise ValueError("anndata must be installed for output in .h5ad: pip install 'fastvae-mmd[tables]', or use .npz or .csv")
    module = load(ckpt_path, runs)
    source = test_data(module, ckpt_path, path, runs, n)
    x, labels = source.splits["train"]
    codes = [module.vae.encode(part) for part in chunks(x)]
    arrays = {"mu": torch.cat([mu for mu, _ in codes]).numpy()}
    logvars = [logvar for _, logvar in codes if logvar is not None]
    if logvars:
        arrays["logvar"] = torch.cat(logvars).numpy()
    if output.endswith(".npz"):
        arrays |= {"labels": labels.numpy(), "rows": np.array(source.rows["train"])}
        if source.classes:
            arrays["classes"] = np.array(source.classes)
        np.savez(output, **arrays)  # type: ignore[arg-type]
    else:
        _save_table({name: values.reshape(len(values), -1) for name, values in arrays.items()}, source, output)
    _print_path(output)


def _save_table(codes: dict[str, np.ndarray[Any, Any]], source: Source, output: str) -> None:
    import pandas as pd

    labels = source.splits["train"].labels.tolist()
    rows = pd.Index(source.rows["train"], name="row")
    observations = pd.DataFrame(index=rows)
    if any(label != NO_LABEL for label in labels):
        observations["label"] = ["" if label == NO_LABEL else source.classes[label] if source.classes else str(label) for label in labels]
    if output.endswith(".h5ad"):
        from anndata import AnnData

        layers = {name: values for name, values in codes.items() if name != "mu"}
        AnnData(codes["mu"], obs=observations, var=pd.DataFrame(index=_names("mu", codes["mu"])), layers=layers).write_h5ad(output)
        return
    frames = [pd.DataFrame(values, index=rows, columns=_names(name, values)) for name, values in codes.items()]
    pd.concat([observations, *frames], axis=1).to_csv(output)


def _names(name: str, values: np.ndarray[Any, Any]) -> list[str]:
    return [f"{name}_{d}" for d in range(values.shape[1])]


@torch.no_grad()
def traverse(
    ckpt_path: str = "last",
    path: str | None = None,
    image: int = 0,
    reach: float = 3.0,
    steps: int = 11,
    output: str = "traversal.png",
    runs: str = "runs",
) -> None:
    """Vary one latent dimension of a code at a time and decode: a row for each dimension, the most informative first.

    Of more than 256 latent dimensions only the 32 most informative ones have a row.

    Args:
        ckpt_path: A checkpoint; 'last' for the newest one of all runs, or 'best' for the best one of that run.
        path: A folder or file of data, used whole and in order; the run's own test data by default.
        image: The index of the sample whose code is varied, from 0.
        reach: Each latent dimension goes from -reach to reach.
        steps: The number of values of each latent dimension, each a column of the picture.
        output: A .png picture, or a .npy array of shape (rows, steps, ...).
        runs: The folder of all runs.
    """
    module = load(ckpt_path, runs)
    vae = module.vae
    x, _ = test_data(module, ckpt_path, path, runs, None).splits["train"]
    if not 0 <= image < len(x):
        raise ValueError(f"image must be an index from 0 to {len(x) - 1}, got {image}")
    mu = torch.cat([vae.encode(part)[0].flatten(1) for part in chunks(x[:10_000])])
    order = mu.var(0, correction=0).argsort(descending=True)
    order = order[:TRAVERSED] if len(order) > WIDE else order
    code = vae.encode(x[image : image + 1])[0]
    shape, code = code.shape[1:], code.flatten(1)
    values = torch.linspace(-checks.real("reach", reach, above=0), reach, checks.integer("steps", steps, at_least=2))
    z = code.repeat(len(order), len(values), 1)
    for row, d in enumerate(order):
        z[row, :, d] = values
    decoded = torch.cat([vae.expected(part) for part in chunks(z.reshape(-1, *shape), x)]).reshape(-1, *x.shape[1:])
    if not _saved_as_array(decoded.reshape(*z.shape[:2], *x.shape[1:]), output):
        pictures.grid(
            _images(decoded),
            Path(output),
            f"One dimension of the code at a time, from −{reach:g} to {reach:g}",
            columns=len(values),
            row_labels=[f"z{_index(d, shape)}" for d in order.tolist()],
            column_labels=[f"{round(value, 2) + 0.0:g}".replace("-", "−") for value in values.tolist()],
        )
    _print_path(output)


def export(ckpt_path: str = "last", output: str = "export", runs: str = "runs") -> None:
    """Export a model: encoder.pt2 and decoder.pt2 by torch.export, for any batch size, and the files that `VAE.from_pretrained` reads.

    encoder.pt2 maps x (N, *shape) to mu and logvar (only mu if the posterior is deterministic), and decoder.pt2 maps z, of the shape of mu,
    to E[x|z], both in the units of the data. Load them with `torch.export.load(file).module()`. config.json holds the options, and the mean
    and scale of a standardised table. The weights are in model.safetensors if the package safetensors is installed, else in model.pt.

    Args:
        ckpt_path: A checkpoint; 'last' for the newest one of all runs, or 'best' for the best one of that run.
        output: The folder for the files.
        runs: The folder of all runs.
    """
    module = load(ckpt_path, runs)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    for name, part, example in (
        ("encoder", _Encoder(module.vae), torch.rand(2, *module.hparams["shape"])),
        ("decoder", _Decoder(module.vae), torch.zeros(2, *module.vae.latent_shape)),
    ):
        program = torch.export.export(part.eval(), (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / f"{name}.pt2")
    module.vae.save_pretrained(folder)
    _print_path(output)


class _Encoder(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mu, logvar = self.vae.encode(x)
        return mu if logvar is None else (mu, logvar)


class _Decoder(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.expected(z)


def load(ckpt_path: str, runs: str) -> ImageVAE:
    """The module of a checkpoint, on the CPU, in evaluation mode."""
    file = checkpoint_file(ckpt_path, Path(runs, "*"))
    saved = read_checkpoint(file)
    sys.stdout.write(f"Checkpoint: {file}\n")
    # `load_from_checkpoint` is unsafe: it calls the function that the file names as "_instantiator".
    try:
        options = {name: value for name, value in saved.get("hyper_parameters", {}).items() if not name.startswith("_")}
        with torch.device("meta"):  # allocates nothing, however large a model the file names
            _module(options).on_load_checkpoint(saved)
        module = _module(options)
        module.on_load_checkpoint(saved)
        module.load_state_dict(saved["state_dict"])
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"ckpt_path must be a checkpoint of this model, got {ckpt_path!r} ({error})") from error
    return module.eval()


def _module(options: dict[str, Any]) -> ImageVAE:
    """The module. Custom networks are made by the classes that the checkpoint names, if `--trust` allows their packages."""
    own: dict[str, Any] = {"optimizer": None, "lr_scheduler": None}
    for article, name in (("an", "encoder"), ("a", "decoder")):
        if options.get(name) is not None:
            restrict()  # for callers other than the command
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_argument("--network", type=nn.Module)
            try:
                own[name] = parser.instantiate(parser.parse_object({"network": options[name]})).network
            except jsonargparse.ArgumentError as error:
                denied = re.search(r"Importing '(.*?)' is not allowed", str(error))
                why = f"--trust PACKAGE allows {denied[1]}" if denied else " ".join(str(error).split())
                raise ValueError(f"ckpt_path must name {article} {name} that can be made, got {options[name]}: {why}") from error
    return ImageVAE(**options | own)


def test_data(module: ImageVAE, ckpt_path: str, path: str | None, runs: str, n: int | None) -> Source:
    """The first n samples (all if None) of the run's test data, or of all data in a path, in their own units, as the split "train"."""
    config = checkpoint_file(ckpt_path, Path(runs, "*")).parent.parent / "config.yaml"
    try:
        options = read_yaml(config.read_text(encoding="utf-8"))["data"]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        if path is None:
            raise ValueError(f"path must be given if the run has no config.yaml, got none and no {str(config)!r}") from error
        options = {}
    if path is not None:
        options |= {"path": path}
        if options.get("name") in ("mnist_5k", "digits"):
            options["name"] = "auto"
    shape = module.hparams["shape"]
    if isinstance(options, dict) and len(shape) == 1:
        options |= {"name": "table", "standardise": module.vae.preparation is not None}
    elif options == {"path": path} and shape[1] == shape[2]:
        options["image_size"] = shape[1]
    try:
        data = ImageData(**options)
    except TypeError as error:
        raise ValueError(f"{str(config)!r} must hold options of data, got others ({error})") from error
    if path is not None:
        source = data.whole()
    else:
        data.setup()
        source = Source({"train": data.splits["test"]}, data.classes, {"train": data.test_rows}, data.columns)
    source = source.by_columns(module.columns)
    images, labels = source.splits["train"]
    if images.shape[1:] != tuple(shape):
        raise ValueError(f"data must have the shape that the model was trained on, {tuple(shape)}, got {tuple(images.shape[1:])}")
    n = len(images) if n is None else checks.integer("n", n, at_least=1)
    rows = {name: names[:n] for name, names in source.rows.items()}
    return source._replace(splits={"train": Split(scaled(images[:n]), labels[:n])}, rows=rows)


def _images(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ValueError(f"output must be a .npy file for data other than images, got a picture for shape {tuple(x.shape[1:])}")
    return x


def _index(d: int, shape: Sequence[int]) -> str:
    """The name of latent dimension d: its number, or its channel, row and column."""
    return str(d) if len(shape) == 1 else ",".join(map(str, np.unravel_index(d, shape)))


def _saved_as_array(x: Tensor, output: str) -> bool:
    """Writes x if `output` is a .npy file, and returns whether it is one. The caller draws pictures."""
    _suffix(output, ".png", ".npy")
    if output.endswith(".npy"):
        np.save(output, x.numpy())
    return output.endswith(".npy")


def _suffix(output: str, *known: str) -> None:
    if not output.endswith(known):
        raise ValueError(f"output must end in {' or '.join(known)}, got {output!r}")


def _print_path(output: str) -> None:
    sys.stdout.write(f"Written: {Path(output).resolve()}\n")
