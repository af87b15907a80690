import gzip
import io
import pickle
import struct
import sys
import urllib.error
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae.training import data as data_module
from fastvae.training.data import NO_LABEL, ImageData, Images, Split, read_idx


def write_idx(file, array, code=0x08):
    raw = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return file


def images(n, shape=(5, 4), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.fixture
def idx_folder(tmp_path):
    for name, n in (("train", 30), ("t10k", 10)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images(n, seed=n))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "folder", "auto"])
def test_idx_folder(idx_folder, name):
    data = ImageData(name, path=str(idx_folder), validation=0.1, batch_size=8)
    assert data.shape == [1, 5, 4]
    assert [len(data.splits[split].images) for split in ("train", "val", "test")] == [27, 3, 10]
    seen = torch.cat([data.splits["train"].images, data.splits["val"].images])[:, 0]
    expected = torch.from_numpy(images(30, seed=30))
    assert sorted(seen.sum((1, 2)).tolist()) == sorted(expected.sum((1, 2)).tolist())
    for split, source in (("train", expected), ("test", torch.from_numpy(images(10, seed=10)))):
        for image, label in zip(*data.splits[split], strict=True):
            assert any(torch.equal(image[0], other) and int(label) == i % 10 for i, other in enumerate(source))


def test_batches_are_scaled_and_whole(idx_folder):
    data = ImageData(path=str(idx_folder), validation=0, batch_size=8)
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(x) for x, _ in batches] == [8, 8, 8, 6]
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32
    assert 0 <= x.min().item() < 0.1 < 0.9 < x.max().item() <= 1


def test_no_batch_of_one_image(idx_folder):
    for batch_size in range(2, 12):
        data = ImageData(path=str(idx_folder), validation=1 / 3, batch_size=batch_size)
        data.setup()
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            assert min(len(x) for x, _ in loader) > 1
        assert sum(len(x) for x, _ in data.test_dataloader()) == 10


def test_no_validation_on_one_image(idx_folder):
    for validation, n in ((0.04, 0), (0.06, 2)):
        data = ImageData(path=str(idx_folder), validation=validation)
        data.setup()
        assert (len(data.splits["val"].images), data.train_size) == (n, 30 - n)


def test_a_seed_fixes_the_batches(idx_folder):
    def order(seed):
        data = ImageData(path=str(idx_folder), seed=seed, binarisation="dynamic")
        data.setup()
        return torch.cat([x for x, _ in data.train_dataloader()])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_dynamic_binarisation(idx_folder):
    data = ImageData(path=str(idx_folder), binarisation="dynamic", batch_size=30, validation=0)
    data.setup()
    loader = data.train_dataloader()
    draws = torch.stack([x[labels.argsort(stable=True)] for x, labels in (next(iter(loader)) for _ in range(2))])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    test = [torch.cat([x for x, _ in data.test_dataloader()]) for _ in range(2)]
    assert torch.equal(*test)
    assert set(test[0].unique().tolist()) == {0.0, 1.0}
    grey = Images(Split(torch.full((4000, 1, 1, 1), 0.3), torch.zeros(4000)), binarise=0)
    first, second = (grey.__getitems__(range(4000))[0] for _ in range(2))
    assert first.mean().item() == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(first, second)


def test_a_large_batch_is_one_indexing():
    split = Split(torch.zeros(20_000, 1, 2, 2, dtype=torch.uint8), torch.zeros(20_000))
    x, labels = Images(split).__getitems__(list(range(8192)))
    assert x.shape == (8192, 1, 2, 2)
    assert labels.shape == (8192,)


@pytest.mark.parametrize(("name", "shape", "n"), [("digits", [1, 8, 8], 1797), ("mnist_5k", [1, 28, 28], 5000)])
def test_data_that_comes_with_a_dependency(name, shape, n):
    data = ImageData(name)
    assert data.shape == shape
    assert sum(len(split.images) for split in data.splits.values()) == n
    x, labels = next(iter(data.train_dataloader()))
    assert 0 <= x.min().item() < 0.1 < 0.9 < x.max().item() <= 1
    assert set(labels.tolist()) == set(range(10))


def test_no_test_share_tests_on_the_training_images():
    data = ImageData("digits", validation=0, test=0)
    data.setup()
    assert len(data.splits["train"].images) == len(data.splits["test"].images) == 1797
    assert data.val_dataloader() == []


def test_npz_and_npy(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=images(12, (4, 4, 3)), y_train=np.arange(12), x_test=images(4, (4, 4, 3)), y_test=np.arange(4))
    data = ImageData(path=str(tmp_path), validation=0)
    assert data.shape == [3, 4, 4]
    assert len(data.splits["test"].images) == 4
    folder = tmp_path / "npy"
    folder.mkdir()
    for part in range(2):
        np.save(folder / f"part{part}.npy", images(6, (16,), seed=part).astype(np.float64) / 255)
    data = ImageData(path=str(folder), validation=0, test=0)
    assert data.shape == [1, 4, 4]
    assert len(data.splits["train"].images) == 12
    assert set(data.splits["train"].labels.tolist()) == {NO_LABEL}


@pytest.mark.parametrize(
    ("array", "shape"), [(images(2, (7,)), [1, 1, 7]), (images(2, (3, 6, 5)), [3, 6, 5]), (images(2, (6, 5, 1)), [1, 6, 5])]
)
def test_layouts(tmp_path, array, shape):
    np.save(tmp_path / "images.npy", array)
    assert ImageData(path=str(tmp_path), validation=0, test=0).shape == shape


def test_idx_of_other_types(tmp_path):
    values = np.linspace(0, 1, 24, dtype=">f4").reshape(2, 3, 4)
    np.testing.assert_array_equal(read_idx(write_idx(tmp_path / "a.idx", values, 0x0D)), values)


def broken(tmp_path, kind):
    whole = write_idx(tmp_path / "train-images-idx3-ubyte", images(4))
    raw = whole.read_bytes()
    whole.unlink()
    if kind == "truncated idx":
        whole.write_bytes(raw[:-3])
    elif kind == "longer idx":
        whole.write_bytes(raw + b"x")
    elif kind == "header cut off":
        whole.write_bytes(raw[:9])
    elif kind == "not idx":
        whole.write_bytes(b"<html>not found</html>")
    elif kind == "empty file":
        whole.write_bytes(b"")
    elif kind == "truncated gzip":
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw)[:-12])
    elif kind == "not gzip":
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
    elif kind == "truncated npz":
        np.savez(tmp_path / "a.npz", x=images(4))
        (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    elif kind == "truncated npy":
        np.save(tmp_path / "a.npy", images(4))
        (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-30])
    elif kind == "pickle":
        np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    elif kind == "bare pickle":
        (tmp_path / "a.npy").write_bytes(pickle.dumps([1, 2]))
    elif kind == "single value":
        np.save(tmp_path / "a.npy", np.float32(1))
    elif kind == "integers":
        np.save(tmp_path / "a.npy", images(4).astype(np.int64))
    elif kind == "range":
        np.save(tmp_path / "a.npy", images(4).astype(np.float32))
    elif kind == "nan":
        np.save(tmp_path / "a.npy", np.full((4, 5, 5), np.nan))
    elif kind == "labels":
        np.savez(tmp_path / "a.npz", x=images(4), y=np.arange(3))
    elif kind == "two shapes":
        np.savez(tmp_path / "a.npz", x_train=images(4), x_test=images(4, (6, 6)))
    elif kind == "two shapes in one set":
        np.savez(tmp_path / "a.npz", x1=images(4), x2=images(4, (6, 6)))
    elif kind == "five dimensions":
        np.save(tmp_path / "a.npy", images(4, (2, 2, 2, 2)))
    elif kind == "labels in between":
        np.savez(tmp_path / "a.npz", x=images(4), y=np.arange(4) / 2)
    elif kind == "labels of nan":
        np.savez(tmp_path / "a.npz", x=images(4), y=np.full(4, np.nan))
    elif kind == "images of text":
        np.savez(tmp_path / "a.npz", x=np.array([list("abcd")] * 2))
    elif kind == "labels of another set":
        np.savez(tmp_path / "a.npz", x_train=images(4), y_test=np.arange(4))
    elif kind == "no training images":
        np.savez(tmp_path / "a.npz", x_val=images(4), x_test=images(4))
    elif kind == "idx of no dimension":
        whole.write_bytes(b"\0\0\x08\0\x01")
    elif kind == "no images":
        np.save(tmp_path / "y.npy", np.arange(3))


SENTENCES = {
    "truncated idx": r"must have 96 bytes for shape \(4, 5, 4\), got 93: it is corrupt",
    "longer idx": r"must have 96 bytes for shape \(4, 5, 4\), got 97: it is corrupt",
    "header cut off": "must have .* bytes for shape .*, got 9: it is corrupt",
    "not idx": "must be an IDX file, got one that begins with 3c 68 74 6d",
    "empty file": "must be an IDX file, got one that begins with nothing",
    "truncated gzip": "must be a complete gzip file, got a corrupt one",
    "not gzip": "must be a complete gzip file, got a corrupt one",
    "truncated npz": "must be a complete .npz file of plain arrays, got a corrupt or pickled one",
    "truncated npy": "must be a complete .npy file of plain arrays, got a corrupt or pickled one",
    "pickle": "must be a complete .npy file of plain arrays, got a corrupt or pickled one",
    "bare pickle": "must be a complete .npy file of plain arrays, got a corrupt or pickled one",
    "single value": "must hold arrays of images or labels, got the single value a",
    "integers": r"images in a in .*a.npy must be uint8, uint16 or floating in \[0, 1\], got int64",
    "range": r"must lie in \[0, 1\], got values from",
    "nan": r"must lie in \[0, 1\], got values from nan",
    "labels": "must have one label for each image, got 3 labels for 4 images",
    "two shapes": r"must have the same shape, got \(1, 5, 4\) in a.x_train and \(1, 6, 6\) in a.x_test",
    "two shapes in one set": r"must have the same shape, got \(1, 5, 4\) in a.x1 and \(1, 6, 6\) in a.x2",
    "five dimensions": r"must have shape \(N, F\), .* got \(4, 2, 2, 2, 2\)",
    "labels in between": "labels in .* must be whole numbers, got others",
    "labels of nan": "labels in .* must be whole numbers, got others",
    "images of text": "must hold arrays of real numbers, got a.x of <U1",
    "labels of another set": "labels in .* must belong to a set with data, got only labels for test",
    "no training images": "data.path must hold training data, got only test and val sets",
    "idx of no dimension": "must be an IDX file, got one that begins with 00 00 08 00",
    "no images": "must hold images in IDX, .npy or .npz files or pictures, got none",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_a_broken_file_is_one_sentence(tmp_path, kind):
    broken(tmp_path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=SENTENCES[kind]) as error:
        ImageData(path=str(tmp_path)).setup()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "folder"}, "data.path must name a folder of images for data.name 'folder', got none"),
        ({"name": "digits", "path": "x"}, "data.path must not be given for data.name 'digits'"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"validation": 1.0}, "data.validation must be less than 1"),
        ({"test": -0.1}, "data.test must be at least 0, got -0.1"),
        ({"path": "nowhere/at/all"}, "data.path must be a folder or a file that exists, got 'nowhere/at/all'"),
    ],
)
def test_error_sentences(arguments, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        ImageData(**arguments).setup()


def test_an_empty_training_set(tmp_path):
    np.save(tmp_path / "a.npy", images(1))
    with pytest.raises(ValueError, match=r"data must leave at least two images to train on, got 0 of the 1 in .* with validation=0.9"):
        ImageData(path=str(tmp_path), validation=0.9, test=0).setup()


@pytest.mark.filterwarnings("ignore:A network error occurred")
def test_offline_download_is_one_sentence(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    # Below fetch_openml, which thus checks its own arguments.
    monkeypatch.setattr("sklearn.datasets._openml.urlopen", offline)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"data.name 'mnist' must be downloaded from OpenML, which failed .*no route.*--data.path"):
        ImageData("mnist").setup()


def test_download_is_split_as_the_data_set_is(monkeypatch):
    class Bunch:
        data = np.repeat(np.arange(70_000) >= 60_000, 4).reshape(70_000, 4).astype(np.float64)
        target = np.array(["3"] * 70_000, dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: Bunch)
    data = ImageData("mnist", validation=0)
    data.setup()
    assert len(data.splits["train"].images) == 60_000
    assert data.splits["train"].images.max() == 0
    assert data.splits["test"].images.min() == 1
    assert set(data.splits["test"].labels.tolist()) == {3}


def npy_header(shape, dtype="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def zip_bomb(file, claimed):
    """A member of `claimed` zero bytes, of which a thousandth are in the file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w", force_zip64=True) as member:
        header = npy_header((claimed // 4,))
        member.write(header)
        for _ in range(claimed // 2**20):
            member.write(bytes(2**20))


HOSTILE = {
    "gzip bomb": r"must hold at most 0.001 GB once decompressed, got 0.0167772 GB",
    "gzip bomb of a small header": r"must have 20 bytes for shape \(3,\), got 21: it is corrupt",
    "idx shape that overflows": r"must hold at most 0.001 GB once decompressed, got 1.84467e\+10 GB",
    "npy shape that overflows": r"must hold at most 0.001 GB once decompressed, got 7.3787e\+10 GB",
    "npy header that claims more": r"must be a complete .npy file .*4000 bytes of float32 in shape \(1000,\) in its header, 8 in the file",
    "npy header that claims less": r"must be a complete .npy file .*4 bytes of float32 .* 8 in the file",
    "npy negative shape": r"must be a complete .npy file of plain arrays",
    "npy of numbers without bytes": r"must be a complete .npy file of plain arrays",
    "npy shape beyond an int64": r"must be a complete .npy file of plain arrays",
    "npy header cut off": r"must be a complete .npy file of plain arrays",
    "npz of lzma flipped": r"must be a complete .npz file of plain arrays, got a corrupt or pickled one",
    "npz of several that are too large together": r"files in .* must hold at most 0.001 GB once decompressed",
    "npz bomb": r"must hold at most 0.001 GB once decompressed, got 0.00419443 GB",
    "npz of a pickle": r"must be a complete .npz file of plain arrays, got a corrupt or pickled one",
    "npz flipped": r"must be a complete .npz file of plain arrays, got a corrupt or pickled one",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_sentence(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_BYTES", 10**6)
    file = tmp_path / ("train-images-idx3-ubyte.gz" if "gzip" in kind else "train-images-idx3-ubyte" if "idx" in kind else f"a.{kind[:3]}")
    if kind == "gzip bomb":
        file.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**12, 2**6, 2**6) + bytes(2**24)))
    elif kind == "gzip bomb of a small header":
        file.write_bytes(gzip.compress(b"\0\0\x0c\x01" + struct.pack(">I", 3) + bytes(2**24)))
    elif kind == "idx shape that overflows":
        file.write_bytes(b"\0\0\x08\x02" + struct.pack(">2I", 2**32 - 1, 2**32 - 1) + bytes(10))
    elif kind == "npy shape that overflows":
        file.write_bytes(npy_header((2**32, 2**32)) + bytes(8))
    elif kind == "npy header that claims more":
        file.write_bytes(npy_header((1000,)) + bytes(8))
    elif kind == "npy header that claims less":
        file.write_bytes(npy_header((1,)) + bytes(8))
    elif kind == "npy negative shape":
        file.write_bytes(npy_header((-2, -1)) + bytes(8))
    elif kind == "npy of numbers without bytes":
        file.write_bytes(npy_header((10**15,), "<U0"))
    elif kind == "npy shape beyond an int64":
        file.write_bytes(npy_header((0, 2**70)))
    elif kind == "npy header cut off":
        file.write_bytes(npy_header((10,)).replace(b")", b" ") + bytes(40))
    elif kind == "npz of lzma flipped":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("x.npy", npy_header((100,)) + bytes(400))
        raw = bytearray(file.read_bytes())
        raw[60:70] = bytes(range(200, 210))
        file.write_bytes(raw)
    elif kind == "npz of several that are too large together":
        for name in "ab":
            np.savez_compressed(tmp_path / f"{name}.npz", x=np.zeros((600, 1000), np.uint8))
    elif kind == "npz bomb":
        zip_bomb(file, 2**22)
    elif kind == "npz of a pickle":
        np.savez(file, x=np.array([{"a": 1}], dtype=object))
    elif kind == "npz flipped":
        np.savez_compressed(file, x=images(40))
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    with pytest.raises(ValueError, match=HOSTILE[kind]) as error:
        ImageData(path=str(tmp_path)).setup()
    assert "\n" not in str(error.value)


def test_no_more_is_decompressed_than_the_header_tells(tmp_path, monkeypatch):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes(2**26)))
    read = []
    inner = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or inner(self, size))
    with pytest.raises(ValueError, match="must have 11 bytes"):
        read_idx(file)
    assert sum(read) <= 12
    assert min(read) >= 0


def dsprites(file, n=12, **others):
    x = (images(n, (6, 6)) > 127).astype(np.uint8)
    classes = np.zeros((n, 6), dtype=np.int64)
    classes[:, 1] = np.arange(n) % 3
    metadata = np.array({"author": "x"}, dtype=object)
    np.savez_compressed(file, **{"imgs": x, "latents_classes": classes, "latents_values": classes / 2, "metadata": metadata, **others})
    return x, classes


def test_dsprites_without_its_pickle(tmp_path):
    x, classes = dsprites(tmp_path / "dsprites.npz")
    data = ImageData("dsprites", path=str(tmp_path / "dsprites.npz"), validation=0, test=0)
    assert data.shape == [1, 6, 6]
    found = data.splits["train"]
    assert sorted(found.images.flatten(1).sum(1).tolist()) == sorted((x.astype(int).sum((1, 2)) * 255).tolist())
    assert sorted(found.labels.tolist()) == sorted(classes[:, 1].tolist())
    assert ImageData("dsprites", path=str(tmp_path), validation=0).shape == [1, 6, 6]
    np.savez(tmp_path / "dsprites.npz", imgs=x)
    with pytest.raises(ValueError, match=r"must hold dSprites' imgs \(N, H, W\) and latents_classes \(N, 6\), got \['imgs'\]"):
        ImageData("dsprites", path=str(tmp_path / "dsprites.npz")).setup()
    with pytest.raises(FileNotFoundError, match=r"data.path must name the .npz file of dSprites, got"):
        ImageData("dsprites", path=str(tmp_path / "absent.npz")).setup()


def write_pictures(folder, n=4, size=(20, 30), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(images(1, shape, seed=k)[0]).save(folder / f"{k}.png")


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_folder_of_pictures(tmp_path, mode, channels):
    write_pictures(tmp_path / "cats", mode=mode)
    write_pictures(tmp_path / "dogs", n=2, size=(50, 20), mode=mode)
    with pytest.raises(ValueError, match=r"must have the same size, got \(30, 20\) and \(20, 50\) in 0.png: set data.image_size"):
        ImageData(path=str(tmp_path)).setup()
    data = ImageData(path=str(tmp_path), image_size=16, validation=0, test=0)
    assert data.shape == [channels, 16, 16]
    assert data.splits["train"].images.dtype == torch.uint8
    assert sorted(data.splits["train"].labels.tolist()) == [0, 0, 0, 0, 1, 1]
    whole = tmp_path / "whole"
    write_pictures(whole / "train", mode=mode)
    write_pictures(whole / "test", n=3, mode=mode)
    data = ImageData(path=str(whole), validation=0)
    assert data.shape == [channels, 30, 20]
    assert len(data.splits["test"].images) == 3
    assert set(data.splits["train"].labels.tolist()) == {NO_LABEL}
    expected = images(1, (30, 20, 3) if channels == 3 else (30, 20), seed=0).reshape(30, 20, channels)
    found = data.splits["train"].images.permute(0, 2, 3, 1).numpy()
    assert any(np.array_equal(image, expected) for image in found)


GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOUR = np.stack([GREY, GREY + 1, GREY + 2], axis=-1)
DEEP = np.array([[0, 257, 300], [32768, 65535, 4095]], np.uint16)


def transparent(colours):
    """The first pixel is transparent, and black beneath."""
    alpha = np.full((*colours.shape[:2], 1), 255, np.uint8)
    alpha[0, 0] = colours[0, 0] = 0
    return np.concatenate([colours, alpha], axis=-1), np.where(alpha == 0, 255, colours)


def turned(image):
    exif = image.getexif()
    exif[0x112] = 6
    return image, {"exif": exif}


PICTURE_KINDS = {
    "grey": (Image.fromarray(GREY), "png", GREY),
    "black and white": (Image.fromarray(GREY > 100), "png", (GREY > 100) * 255),
    "black and white TIFF": (Image.fromarray(GREY > 100), "tif", (GREY > 100) * 255),
    "colours": (Image.fromarray(COLOUR), "tiff", COLOUR),
    "palette": (Image.fromarray(COLOUR).quantize(24), "png", COLOUR),
    "grey and alpha": (Image.fromarray(transparent(GREY[..., None].copy())[0]), "png", transparent(GREY[..., None].copy())[1]),
    "colours and alpha": (Image.fromarray(transparent(COLOUR.copy())[0]), "png", transparent(COLOUR.copy())[1]),
    "transparent grey of a palette": ((Image.fromarray(GREY), {"transparency": 10}), "png", np.where(GREY == 10, 255, GREY)),
    "CMYK": (Image.fromarray(COLOUR).convert("CMYK"), "tif", COLOUR),
    "16 bits": (Image.fromarray(DEEP), "png", DEEP / 257),
    "16 bits, one of them transparent": ((Image.fromarray(DEEP), {"transparency": 300}), "png", np.where(DEEP == 300, 65535, DEEP) / 257),
    "16 bits TIFF": (Image.fromarray(DEEP), "tif", DEEP / 257),
    "16 bits TIFF, the high byte first": (Image.fromarray(DEEP.astype(">u2")), "tif", DEEP / 257),
    "floats": (Image.fromarray(DEEP.astype(np.float32) / 65535), "tif", DEEP / 257),
    "turned": (turned(Image.fromarray(COLOUR)), "png", np.rot90(COLOUR, -1)),
    "turned, 16 bits": (turned(Image.fromarray(DEEP)), "png", np.rot90(DEEP, -1) / 257),
}


def whole_images(path, **options):
    """(N, H, W, C) in units of 1/255."""
    images = ImageData(path=str(path), **options).whole().splits["train"].images
    return data_module.scaled(images).permute(0, 2, 3, 1).double().numpy() * 255


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_a_picture_of_each_mode(tmp_path, kind):
    image, suffix, expected = PICTURE_KINDS[kind]
    image, options = image if isinstance(image, tuple) else (image, {})
    image.save(tmp_path / f"a.{suffix}", **options)
    found = whole_images(tmp_path)[0]
    np.testing.assert_allclose(found, expected.reshape(*expected.shape[:2], -1), atol=2e-5)
    assert whole_images(tmp_path / f"a.{suffix}", image_size=2).shape == (1, 2, 2, found.shape[2])


def test_pictures_of_several_modes_have_one(tmp_path):
    Image.fromarray(COLOUR[:2, :3]).save(tmp_path / "a.png")
    Image.fromarray(GREY[:2, :3]).save(tmp_path / "b.png")
    np.testing.assert_allclose(whole_images(tmp_path)[1], GREY[:2, :3, None].repeat(3, axis=2), atol=2e-5)
    assert ImageData(path=str(tmp_path)).whole().splits["train"].images.dtype == torch.uint8
    Image.fromarray(DEEP).save(tmp_path / "c.png")
    found = whole_images(tmp_path)
    np.testing.assert_allclose(found[0], COLOUR[:2, :3], atol=2e-5)
    np.testing.assert_allclose(found[2], (DEEP / 257)[..., None].repeat(3, axis=2), atol=2e-5)


@pytest.mark.parametrize(
    ("image", "options", "sentence"),
    [
        (Image.fromarray(DEEP.astype(np.int32)), {}, "a.tif must hold greys or colours of 8 or 16 bits, .* got mode I"),
        (Image.fromarray(DEEP.astype(np.float32)), {}, r"a.tif must have floats in \[0, 1\], got values from 0 to 65535"),
        (Image.fromarray(GREY), {"save_all": True, "append_images": [Image.fromarray(GREY)]}, "a.tif must hold one picture, got 2"),
    ],
)
def test_a_picture_that_is_refused(tmp_path, image, options, sentence):
    image.save(tmp_path / "a.tif", **options)
    with pytest.raises(ValueError, match=sentence):
        ImageData(path=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("array", "expected"), [(DEEP[None], DEEP / 257), (DEEP[None].astype(">u2"), DEEP / 257), (DEEP[None] > 300, (DEEP > 300) * 255)]
)
def test_arrays_of_16_bits_and_of_one(tmp_path, array, expected):
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_allclose(whole_images(tmp_path / "a.npy")[0, ..., 0], expected, atol=2e-5)


def test_arrays_keep_their_size(tmp_path):
    np.save(tmp_path / "a.npy", images(10))
    with pytest.raises(ValueError, match=r"data.image_size must not be given for arrays, whose size is fixed, got 8 for"):
        ImageData(path=str(tmp_path), image_size=8).setup()
    assert whole_images(tmp_path, image_size=8).shape == (10, 5, 4, 1)


def test_arrays_of_several_dtypes_have_one(tmp_path):
    np.savez(tmp_path / "a.npz", x1=DEEP[None], x2=GREY[None, :2, :3])
    np.testing.assert_allclose(whole_images(tmp_path)[..., 0], [DEEP / 257, GREY[:2, :3]], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, "test")
            for name in (
                "test",
                "x_test",
                "XTest",
                "imagesTest",
                "t10k-images-idx3-ubyte",
                "test_2",
                "x.test1",
                "My TEST",
                "Xtest",
                "ytest",
            )
        ),
        *((name, "train") for name in ("protest", "latest_news", "contest", "testimony", "attestation", "x", "x_train", "values")),
        *((name, "val") for name in ("val", "y_val", "valid", "x-validation")),
    ],
)
def test_a_word_of_a_name_tells_the_set(tmp_path, name, expected):
    np.savez(tmp_path / "a.npz", **{"a": images(20), name: images(4)})
    np.save(tmp_path / "protest_latest.npy", images(3))
    data = ImageData(path=str(tmp_path), test=0, validation=0)
    data.setup()
    expected_sizes = {"train": 23, "val": 0, expected: 27 if expected == "train" else 4}
    assert {which: len(data.splits[which].images) for which in expected_sizes} == expected_sizes


def sets_and_classes(path):
    data = ImageData(path=str(path), test=0, validation=0)
    data.setup()
    return {which: sorted(data.classes[k] if k != NO_LABEL else "" for k in split.labels.tolist()) for which, split in data.splits.items()}


def test_folders_are_sets_and_classes(tmp_path):
    for name in ("protest", "latest_news", "cats/test_tubes"):
        write_pictures(tmp_path / "words" / name, n=2)
    classes = ["cats/test_tubes"] * 2 + ["latest_news"] * 2 + ["protest"] * 2
    assert sets_and_classes(tmp_path / "words") == {"train": classes, "val": [], "test": classes}
    for which, n in (("train", 3), ("val", 2), ("test", 2)):
        for name in ("cats", "dogs"):
            write_pictures(tmp_path / "three" / which / name, n=n)
    assert sets_and_classes(tmp_path / "three") == {
        which: ["cats"] * n + ["dogs"] * n for which, n in (("train", 3), ("val", 2), ("test", 2))
    }
    for name in ("cats/train", "cats/test", "dogs/train", "dogs/test"):
        write_pictures(tmp_path / "inside" / name, n=2)
    each = ["cats", "cats", "dogs", "dogs"]
    assert sets_and_classes(tmp_path / "inside") == {"train": each, "val": [], "test": each}
    for name in ("valid", "invalid"):
        write_pictures(tmp_path / "quality" / name, n=2)
    quality = ["invalid", "invalid", "valid", "valid"]
    assert sets_and_classes(tmp_path / "quality") == {"train": quality, "val": [], "test": quality}


def test_a_set_of_one_image_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=images(5), x_test=images(1))
    data = ImageData(path=str(tmp_path))
    data.setup()
    with pytest.raises(ValueError, match=r"data must hold more than one image or row for test, got one in"):
        data.test_dataloader()
    np.savez(tmp_path / "a.npz", x=images(5))
    data = ImageData(path=str(tmp_path))
    data.setup()
    assert len(next(iter(data.test_dataloader()))[0]) == 2


def test_what_is_not_read_is_told(tmp_path, capsys):
    write_pictures(tmp_path, n=3)
    for hidden in ("._0.png", ".cache/1.png", "__MACOSX/1.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\0\5\x16\7")
    assert len(whole_images(tmp_path)) == 3
    assert capsys.readouterr().err == ""
    for name in ("a.gif", "b.GIF", "c.heic", "LICENSE"):
        (tmp_path / name).write_bytes(b"")
    assert len(whole_images(tmp_path)) == 3
    assert capsys.readouterr().err == f"warning: files in {tmp_path} that are not read as data: 2 .gif, 1 without a suffix, 1 .heic\n"
    np.save(tmp_path / "x.npy", images(2))
    assert len(whole_images(tmp_path)) == 2
    assert "3 .png" in capsys.readouterr().err
    for path in (tmp_path / "t.csv", tmp_path / "tables"):
        (tmp_path / "tables").mkdir(exist_ok=True)
        (path if path.suffix else path / "t.csv").write_text("a,b\n1,2\n")
        with pytest.raises(FileNotFoundError, match=r"must hold images .*, got none in .*: a table needs --data.name table"):
            ImageData(path=str(path)).setup()
    np.save(tmp_path / "tables" / "t.npy", np.full((3, 4), 7.5))
    with pytest.raises(
        ValueError, match=r"images in t in .*t.npy must lie in \[0, 1\], got values from 7.5 to 7.5: a table needs --data.n"
    ):
        ImageData(path=str(tmp_path / "tables")).setup()


def test_all_of_a_path_in_its_order(tmp_path):
    x = images(40)
    np.savez(tmp_path / "a.npz", x_test=x[:10], y_test=np.arange(10), x_train=x[10:30], y_train=np.arange(10, 30), x_val=x[30:])
    source = ImageData(path=str(tmp_path), seed=3).whole()
    assert torch.equal(source.splits["train"].images[:, 0], torch.from_numpy(x))
    assert source.splits["train"].labels.tolist() == [*range(30), *[NO_LABEL] * 10]
    for name in ("test/cats/b", "train/cats/a", "train/dogs/c"):
        write_pictures(tmp_path / "pictures" / name, n=2)
    source = ImageData(path=str(tmp_path / "pictures")).whole()
    names = [f"{name}/{k}.png" for name in ("test/cats/b", "train/cats/a", "train/dogs/c") for k in range(2)]
    assert source.rows == {"train": tuple(names)}
    assert source.classes == ("cats/a", "cats/b", "dogs/c")
    assert source.splits["train"].labels.tolist() == [1, 1, 0, 0, 2, 2]
    np.testing.assert_allclose(whole_images(tmp_path / "pictures")[5], images(1, (30, 20, 3), seed=1)[0], atol=2e-5)
    binary = [ImageData(path=str(tmp_path), binarisation="dynamic").whole().splits["train"].images for _ in range(2)]
    assert torch.equal(*binary)
    assert set(binary[0].unique().tolist()) == {0, 255}


def test_where_the_test_data_were(tmp_path):
    data = ImageData("digits", test=0.1, seed=1)
    data.setup()
    order = [int(row) for row in data.test_rows]
    assert len(set(order)) == 180
    assert torch.equal(data.splits["test"].images, data.whole().splits["train"].images[order])
    for name, n in (("train", 4), ("test", 6)):
        write_pictures(tmp_path / name, n=n)
    data = ImageData(path=str(tmp_path), seed=2)
    data.setup()
    assert sorted(data.test_rows) == [f"test/{k}.png" for k in range(6)]
    assert data.test_rows != tuple(sorted(data.test_rows))
    for row, image in zip(data.test_rows, data.splits["test"].images, strict=True):
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.asarray(Image.open(tmp_path / row)).copy()))


def test_pictures_that_are_none(tmp_path, monkeypatch):
    write_pictures(tmp_path, n=1)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0.png must be a complete picture, got a corrupt one"):
        ImageData(path=str(tmp_path)).setup()
    (tmp_path / "0.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"0.png must be a complete picture, got a corrupt one"):
        ImageData(path=str(tmp_path)).setup()

    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "0.png", "EPS")
    with pytest.raises(ValueError, match=r"0.png must be a complete picture, got a corrupt one \(cannot identify"):
        ImageData(path=str(tmp_path)).setup()

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">2I5B", 50_000, 50_000, 8, 0, 0, 0, 0)
    (tmp_path / "0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"0.png must be a picture of at most \d+ pixels, got a decompression bomb"):
        ImageData(path=str(tmp_path)).setup()
    write_pictures(tmp_path, n=4)
    monkeypatch.setattr(data_module, "MAX_BYTES", 4000)
    with pytest.raises(ValueError, match=r"pictures in .* must hold at most 4e-06 GB once decompressed"):
        ImageData(path=str(tmp_path)).setup()


def test_a_table(tmp_path):
    table = np.random.default_rng(0).normal(3, 5, (40, 6))
    table[:, 5] = 2
    np.save(tmp_path / "x.npy", table)
    data = ImageData("table", path=str(tmp_path / "x.npy"), validation=0.25, test=0.25, standardise=True)
    assert data.shape == [6]
    train, _ = Images(data.splits["train"], preparation=data.preparation).__getitems__(range(22))
    assert train.dtype == torch.float32
    torch.testing.assert_close(train.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(train[:, :5].std(0, correction=0), torch.ones(5))
    assert not train[:, 5].any()
    x, labels = next(iter(data.train_dataloader()))
    assert x.shape == (22, 6)
    assert set(labels.tolist()) == {NO_LABEL}
    plain = ImageData("table", path=str(tmp_path / "x.npy"), validation=0, test=0)
    plain.setup()
    torch.testing.assert_close(plain.splits["train"].images.sum(0).double(), torch.from_numpy(table.sum(0)))


@pytest.mark.parametrize("kind", ["npy", "csv"])
def test_a_column_of_dates_keeps_its_values(tmp_path, capfd, kind):
    rng = np.random.default_rng(0)
    table = np.stack([2459000.5 + rng.random(200), np.full(200, 0.1), rng.normal(size=200)], axis=1)
    file = tmp_path / f"x.{kind}"
    np.save(file, table) if kind == "npy" else np.savetxt(file, table, delimiter=",", fmt="%.17g")
    data = ImageData("table", path=str(file), validation=0, test=0, standardise=True)
    data.setup()
    x = data.splits["train"].images
    assert (x.dtype, len(x[:, 0].unique())) == (torch.float64, 200)
    prepared, _ = Images(data.splits["train"], preparation=data.preparation).__getitems__(range(200))
    by_hand = (x.numpy() - table.mean(0)) / table.std(0)
    np.testing.assert_allclose(prepared[:, ::2], by_hand[:, ::2], atol=1e-6)
    assert not prepared[:, 1].any()  # a constant in binary, though its mean over 200 rows is not
    assert "warning" not in capfd.readouterr().err
    ImageData("table", path=str(file)).setup()
    assert "float32 merges values of column 0 " in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8", np.int64, np.int32, np.uint8])
def test_a_table_is_read_in_its_own_precision(tmp_path, dtype):
    table = np.arange(60).reshape(20, 3).astype(dtype)
    if np.dtype(dtype).itemsize >= 4:
        table[:, 0] += np.dtype(dtype).type(2**24)
    np.save(tmp_path / "x.npy", table)
    data = ImageData("table", path=str(tmp_path / "x.npy"), validation=0, test=0, standardise=True)
    data.setup()
    assert sorted(data.splits["train"].images[:, 0].tolist()) == sorted(table[:, 0].astype(np.float64).tolist())


def test_a_table_in_csv_with_labels_and_a_test_set(tmp_path):
    rows = [f"{k},{k % 3},{0.5 * k}" for k in range(10)]
    (tmp_path / "train.csv").write_text("a,Label,b\n" + "\n".join(rows) + "\n")
    (tmp_path / "test.csv").write_text("a,label,b\n" + "\n".join(rows[:4]) + "\n")
    data = ImageData("table", path=str(tmp_path), validation=0)
    assert data.shape == [2]
    train, test = data.splits["train"], data.splits["test"]
    assert (len(train.images), len(test.images)) == (10, 4)
    torch.testing.assert_close(train.images[:, 0] / 2, train.images[:, 1])
    assert (train.images[:, 0] % 3).tolist() == train.labels.tolist()
    (tmp_path / "test.csv").unlink()
    (tmp_path / "train.csv").write_text("\n".join(rows))
    assert ImageData("table", path=str(tmp_path / "train.csv")).shape == [3]


TABLE = np.array([[0.5, -2, 2459000.5000001], [1e-3, 4, 2459000.75], [3, 0, 2459001.25]])


def lines(*rows, between=","):
    return "".join(between.join(map(str, row)) + "\n" for row in rows)


TEXTS = {
    "plain": lines(*TABLE),
    "a header": lines("abc", *TABLE),
    "a byte order mark": "\ufeff" + lines("abc", *TABLE),
    "a byte order mark, no header": "\ufeff" + lines(*TABLE),
    "pandas' index": lines(["", *"abc"], *([k, *row] for k, row in enumerate(TABLE))),
    "pandas' index, twice": lines(["Unnamed: 0.1", "Unnamed: 0", *"abc"], *([k, k, *row] for k, row in enumerate(TABLE))),
    "pandas' names": lines(range(3), *TABLE),
    "pandas' index and names": lines(["", 0, 1, 2], *([k, *row] for k, row in enumerate(TABLE))),
    "R's index": lines("abc", *([f'"{k}"', *row] for k, row in enumerate(TABLE))),
    "numpy's header": "# " + lines("abc", *TABLE),
    "years as names": lines(["a", 2019, 2020], *TABLE),
    "blank lines": "\n\n" + lines("abc", *TABLE) + "\n",
    "blanks": lines("abc", *TABLE, between=" , "),
    "quotes": lines(['"a, b"', '"c"', '"d"'], *TABLE),
    "semicolons": lines("abc", *TABLE, between=";"),
    "semicolons and decimal commas": lines("abc", *TABLE, between=";").replace(".", ","),
    "tabs": lines("abc", *TABLE, between="\t"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz"])
def test_a_table_in_text(tmp_path, kind, suffix):
    raw = TEXTS[kind].encode("utf-8")
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    split = data_module.read_table(tmp_path / f"a{suffix}").splits["train"]
    np.testing.assert_allclose(split.images, TABLE, rtol=1e-15)
    assert split.labels.tolist() == [NO_LABEL] * 3


@pytest.mark.parametrize(
    ("text", "n", "warning"),
    [
        ("0,1,2\n3,4,5\n6,7,8\n", 2, "0, 1, 2, is read as names: if it is data, put a row of names before it"),
        ("0,1,2,3\n5,1,1,1\n", 1, "0, 1, 2, …, is read as names: if it is data, put a row of names before it"),
        ("2019,2020\n1.5,2.5\n", 2, "2019, 2020, is read as data: if it holds names, start them with a letter"),
        ("2019,2020\n1,2\n", 2, "2019, 2020, is read as data: if it holds names, start them with a letter"),
        ("400;410;420\n0,1;0,2;0,4\n", 2, "400, 410, 420, is read as data: if it holds names, start them with a letter"),
        (",0,1,2\n0,3,4,5\n", 1, None),
        ("x2019,x2020\n1,2\n", 1, None),
        ("a,b,c\n0,1,2\n3,4,5\n", 2, None),
        ("1,2\n3,4\n", 2, None),
        ("2,3,5\n1,1,1\n", 2, None),
        ("2,9\n1,1\n", 2, None),
        ("2019\n2020\n", 2, None),
    ],
)
def test_a_guess_of_the_header_is_told(tmp_path, capfd, text, n, warning):
    file = tmp_path / "a.csv"
    file.write_text(text)
    assert len(data_module.read_table(file).splits["train"].images) == n
    assert capfd.readouterr().err == (f"warning: the first row of {file}, {warning}\n" if warning else "")


def test_a_table_in_excels_unicode_text(tmp_path):
    (tmp_path / "a.tsv").write_bytes(lines(["label", *"abc"], *(["ü", *row] for row in TABLE), between="\t").encode("utf-16"))
    source = data_module.read_table(tmp_path / "a.tsv")
    np.testing.assert_allclose(source.splits["train"].images, TABLE, rtol=1e-15)
    assert source.classes == ("ü",)


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ("350", (), [3, 5, 0]),
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        (["dog ", "", "NA"], ("NA", "dog"), [1, NO_LABEL, 0]),
        (["1.0", "", "2.0"], (), [1, NO_LABEL, 2]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff", "# "])
def test_labels_of_a_table(tmp_path, labels, classes, numbers, mark):
    rows = [[label, *row] for label, row in zip(labels, TABLE, strict=True)]
    (tmp_path / "a.csv").write_text(mark + lines(["Label", *"abc"], *rows), encoding="utf-8")
    source = data_module.read_table(tmp_path / "a.csv")
    assert source.classes == classes
    assert source.splits["train"].labels.tolist() == numbers
    np.testing.assert_allclose(source.splits["train"].images, TABLE, rtol=1e-15)


@pytest.mark.parametrize(("given", "told"), [(["1", "-1"], True), (["1", "-1.0"], True), (["1", ""], False), (["a", "-1"], False)])
def test_a_label_that_stands_for_none_is_told(tmp_path, capfd, given, told):
    (tmp_path / "a.csv").write_text(lines(["label", "x"], *zip(given, (1, 2), strict=True)))
    labels = data_module.read_table(tmp_path / "a.csv").splits["train"].labels.tolist()
    assert labels == ([1, 0] if "a" in given else [1, NO_LABEL])
    assert ("the label -1 in" in capfd.readouterr().err) == told


def test_names_of_classes_are_those_of_all_sets(tmp_path):
    for name, labels in (("train", "bca"), ("test", "dbb")):
        (tmp_path / f"{name}.csv").write_text(lines(["label", "x"], *zip(labels, range(3), strict=True)))
    np.savez(tmp_path / "more.npz", x_val=np.zeros((2, 1)), y_val=np.array(["a", "e"]))
    data = ImageData("table", path=str(tmp_path))
    data.setup()
    assert data.classes == ("a", "b", "c", "d", "e")
    assert [sorted(data.splits[which].labels.tolist()) for which in ("train", "val", "test")] == [[0, 1, 2], [0, 4], [1, 1, 3]]


def test_files_of_one_table_have_its_columns(tmp_path):
    for name, header in (("a", "xy"), ("b", "yx")):
        (tmp_path / f"{name}.csv").write_text(lines(header, [1, 2], [3, 4]))
    with pytest.raises(ValueError, match=r"b.csv must have the columns of the file before, got 'y' instead of 'x'"):
        ImageData("table", path=str(tmp_path)).setup()
    (tmp_path / "b.csv").write_text(lines([5, 6], [7, 8]))
    assert len(ImageData("table", path=str(tmp_path)).whole().splits["train"].images) == 4


def test_a_table_whole_with_the_names_of_its_rows(tmp_path):
    rows = [[f"cell {k}", "ab"[k % 2], k] for k in range(100)]
    (tmp_path / "a.csv").write_text(lines(["", "label", "x"], *rows))
    source = ImageData("table", path=str(tmp_path / "a.csv"), validation=0.2).whole()
    assert source.rows == {"train": tuple(row[0] for row in rows)}
    assert source.splits["train"].images.tolist() == [[k] for k in range(100)]
    assert source.splits["train"].labels.tolist() == [0, 1] * 50


@pytest.mark.parametrize("header", ["label,x", ",label,x", "Unnamed: 0,label,x", ",Unnamed: 0,label,x"])
def test_names_of_rows_keep_their_zeros(tmp_path, header):
    between = ",7,1,2" if header.startswith(",Unnamed") else ",1,2"
    (tmp_path / "a.csv").write_text("\n".join([header, *(name + between for name in ("000", "001 ", "1.0"))]))
    assert ImageData("table", path=str(tmp_path / "a.csv")).whole().rows["train"] == ("000", "001", "1.0")


def test_a_table_in_parquet(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(TABLE, columns=list("abc"), index=["u", "v", "w"]).assign(label=pd.Categorical(["y", "x", "y"]))
    frame.to_parquet(tmp_path / "a.parquet")
    source = data_module.read_table(tmp_path / "a.parquet")
    np.testing.assert_array_equal(source.splits["train"].images, TABLE)
    assert (source.classes, source.rows, source.splits["train"].labels.tolist()) == (("x", "y"), {"train": ("u", "v", "w")}, [1, 0, 1])
    for label, numbers, classes in ((["y", None, "x"], [1, NO_LABEL, 0], ("x", "y")), ([7, None, 0], [7, NO_LABEL, 0], ())):
        frame.assign(label=label).to_parquet(tmp_path / "a.parquet")
        source = data_module.read_table(tmp_path / "a.parquet")
        assert (source.splits["train"].labels.tolist(), source.classes) == (numbers, classes)
    frame.assign(a=["1", "x", "2"]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet must be a table of numbers, got another file \('x' in row 2, column 'a'"):
        data_module.read_table(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.parquet must be a table of numbers, got another file"):
        data_module.read_table(tmp_path / "a.parquet")


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pyarrow.* must be installed to read .*a.parquet: pip install 'fastvae-mmd\[tables\]'"):
        data_module.read_table(tmp_path / "a.parquet")


@pytest.mark.parametrize(("dtype", "kept"), [(">f4", "f4"), ("f8", "f8"), ("i4", "f8"), ("u1", "f4"), ("f2", "f4"), ("?", "f4")])
def test_a_table_is_read_in_its_precision_without_a_copy(tmp_path, dtype, kept):
    table = (TABLE % 200).astype(dtype)
    np.save(tmp_path / "a.npy", table)
    split = data_module.read_table(tmp_path / "a.npy").splits["train"]
    assert split.images.numpy().dtype == kept
    np.testing.assert_array_equal(split.images, table)
    assert isinstance(data_module._arrays(tmp_path / "a.npy")[0][1], np.memmap)
    data = ImageData("table", path=str(tmp_path / "a.npy"), validation=0, test=0)
    data.setup()
    assert data.splits["train"].images.dtype == torch.float32


def test_a_gzipped_table_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"1,2\n" * 10**6))
    monkeypatch.setattr(data_module, "MAX_BYTES", 10**6)
    with pytest.raises(ValueError, match=r"a.csv.gz must hold at most 0.001 GB once decompressed, got 0.00104858 GB"):
        ImageData("table", path=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "a,b\n1,2\n3\n", r"must be a table of numbers, got another file \('' in row 2, column 'b': only a column named label"),
        ("a.csv", "a,b\n1,2\n3,4,5\n", r"must be a table of numbers, got another file \(.*Expected 2 fields in line 3, saw 3\)"),
        ("a.csv", "a,b\n1,2,3,4\n", r"must be a table of numbers, got another file \(2 names in its first row and 4 columns below\)"),
        ("a.csv", "a,b\n1,x\n", r"must be a table of numbers, got another file \('x' in row 1, column 'b': only a column"),
        ("a.csv", "1,,3\n4,5,6\n", r"must be a table of numbers, got another file \('' in row 1, column 2: only a column"),
        ("a.csv", "1,NA,3\n4,5,6\n", r"must be a table of numbers, got another file \('NA' in row 1, column 2: only a column"),
        ("a.csv", "5.1,3.5,setosa\n4.9,3,setosa\n", r"must be a table of numbers, got another file \('setosa' in row 1, column 3"),
        ("a.csv", b"a,\xf6\n1,2\n", r"got another file \(its text must be UTF-8, or UTF-16 with a byte order mark\)"),
        ("a.csv", b"label,x\n" + b"a,2\n" * 9**5 + b"\xf6,2\n", r"\(its text must be UTF-8, or UTF-16 with a byte order mark\)"),
        ("a.tsv", b"\xff\xfe1\t\0", r"\(its text must be UTF-8, or UTF-16 with a byte order mark\)"),
        ("a.csv", "", r"must be a table of numbers, got another file \(it is empty\)"),
        ("a.csv", "a,b\n", "must be a table of numbers, got another file"),
        ("a.csv.gz", "a,b\n", r"a.csv.gz must be a table of numbers, got another file \(Not a gzipped file"),
        ("a.csv", "label\n1\n", "no rows or no columns of numbers"),
        ("a.csv", "a,label\n1,0.5\n2,1\n", "must be whole numbers, got others"),
        ("a.csv", "1,nan\n2,3\n", "a.csv must hold finite numbers, got nan in row 1, column 2"),
        ("a.csv", "1,1e39\n2,3\n", "must hold numbers in the range of float32, got larger ones: use data.standardise true"),
        ("a.csv", "1,2\n", "data must leave at least two rows to train on, got 1 of the 1 in"),
        ("a.txt", "1,2\n", "data.path must hold a matrix in a .npy, .npz, .csv, .* or .parquet file, got none"),
    ],
)
def test_a_broken_table_is_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        ImageData("table", path=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "table"}, "data.path must name a matrix for data.name 'table', got none"),
        ({"name": "dsprites"}, "data.path must name the .npz file of dSprites for data.name 'dsprites', got none"),
        ({"name": "table", "path": "x", "binarisation": "dynamic"}, "data.binarisation must be none for a table, got dynamic"),
        ({"image_size": 0}, "data.image_size must be at least 1, got 0"),
        ({"image_size": 8}, "data.image_size must not be given for data.name 'mnist_5k', whose size is fixed, got 8"),
        ({"name": "table", "path": "x", "image_size": 8}, "data.image_size must not be given for data.name 'table'"),
        ({"name": "digits", "standardise": True}, "data.standardise must be false for images"),
    ],
)
def test_error_sentences_of_further_data(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageData(**arguments).setup()


def whole_files():
    """(name, bytes, data.name) of one file of each kind."""
    x = images(6)
    header = b"\0\0\x08\x03" + struct.pack(">3I", *x.shape)
    yield "train-images-idx3-ubyte", header + x.tobytes(), "folder"
    yield "train-images-idx3-ubyte.gz", gzip.compress(header + x.tobytes()), "folder"
    table = b"a,b,label\n1,2,0\n3,4,1\n5,6,1\n7,8,0\n"
    yield "x.csv", table, "table"
    yield "x.csv", ("\ufeff" + table.decode().replace(",", ";")).encode("utf-16"), "table"
    yield "x.tsv.gz", gzip.compress(table), "table"
    stream = io.BytesIO()
    np.save(stream, x)
    array = stream.getvalue()
    yield "x.npy", array, "folder"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("x.npy", array)
        yield "x.npz", stream.getvalue(), "folder"
    colours, greys = images(1, (9, 7, 3))[0], images(1, (9, 14))[0].view(np.uint16)
    kinds = (("PNG", colours), ("JPEG", colours), ("BMP", colours), ("WEBP", colours), ("TIFF", colours), ("PNG", greys), ("TIFF", greys))
    for kind, array in kinds:
        pictures = []
        for options in ({}, {"exif": turned(Image.fromarray(array))[1]["exif"]}):
            stream = io.BytesIO()
            Image.fromarray(array).save(stream, kind, **options)
            pictures.append(stream.getvalue())
        yield "x.png", pictures[kind in ("PNG", "TIFF")], "folder"


def changed(raw, rng):
    """A few bytes overwritten, the end cut off, or a part taken out."""
    out, how = bytearray(raw), rng.integers(4)
    if how < 2:
        for at in rng.integers(len(out) if how else min(len(out), 140), size=rng.integers(1, 4)):
            out[at] = rng.choice([0, 255, 127, 128, ord("9"), ord("-"), out[at] ^ 1, rng.integers(256)])
        return bytes(out)
    first, last = sorted(rng.integers(len(out), size=2))
    return bytes(out[:first]) if how == 2 else bytes(out[:first] + out[last:])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "raw", "kind"), list(whole_files()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_changed_at_random_is_read_or_refused_in_a_sentence(tmp_path, monkeypatch, name, raw, kind):
    monkeypatch.setattr(data_module, "MAX_BYTES", 10**7)
    rng = np.random.default_rng(0)
    (tmp_path / name).write_bytes(raw)
    ImageData(kind, path=str(tmp_path)).whole()
    refused = 0
    for _ in range(300):
        (tmp_path / name).write_bytes(changed(raw, rng))
        try:
            ImageData(kind, path=str(tmp_path)).whole()
        except (ValueError, FileNotFoundError) as error:
            assert " must " in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > 30


def test_validation_draws_nothing_from_the_global_generator():
    data = ImageData("digits")
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("train", "test"), [("training_set", "test_set"), ("train-images", "TestData"), ("trainset", "testset")])
def test_folders_of_sets_by_other_names(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name / "cats").mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((4, 4), k, np.uint8)).save(tmp_path / name / "cats" / f"{k}.png")
    source = data_module.read_folder(tmp_path)
    assert {name: len(split.labels) for name, split in source.splits.items()} == {"train": 3, "test": 3}
    assert source.classes == ("cats",)
