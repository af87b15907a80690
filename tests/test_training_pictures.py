"""Pictures: each pixel as it is, nothing cut off, nothing over the data."""

import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from fastvae.training import pictures
from fastvae.training.callbacks import Pictures
from fastvae.training.data import NO_LABEL, ImageData
from fastvae.training.module import ImageVAE

LONG = "A title of more words than the pictures below it are wide, and of as many more again as it takes to be sure of that"


def images(n, channels, height, width):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def read(file):
    return matplotlib.image.imread(file)[..., :3]


def is_whole(picture):
    """Nothing is cut off where the outermost pixels are white."""
    return all((edge == 1).all() for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (64, 64), (72, 72), (73, 73), (100, 40), (256, 256)])
def test_a_pixel_is_a_square_of_its_colour(tmp_path, channels, size):
    x = images(5, channels, *size)
    pictures.grid(x, tmp_path / "grid.png", "Samples", columns=2)
    factor = max(1, 64 // max(size))
    height, width = (side * factor for side in size)
    gap = pictures.GAP
    drawn = read(tmp_path / "grid.png")[-pictures.MARGIN - 3 * height - 2 * gap : -pictures.MARGIN, pictures.MARGIN :]
    for i, image in enumerate(x):
        top, left = i // 2 * (height + gap), i % 2 * (width + gap)
        squares = drawn[top : top + height, left : left + width].reshape(size[0], factor, size[1], factor, 3)
        expected = image.expand(3, -1, -1).permute(1, 2, 0).numpy()[:, None, :, None]
        np.testing.assert_allclose(squares, np.broadcast_to(expected, squares.shape), atol=1 / 255)


def test_large_images_shrink_by_averages():
    stripes = (torch.arange(1200) % 2).float().expand(1, 1, 600, 1200)
    drawn = pictures.sheet(stripes, 1)
    assert drawn.shape == (128, 256, 3)
    assert abs(drawn / 255 - 0.5).max() < 0.15


def test_a_picture_of_thousands_of_rows(tmp_path):
    pictures.grid(images(3000, 1, 16, 16), tmp_path / "grid.png", "Traversal", columns=1)
    assert 3000 < len(read(tmp_path / "grid.png")) < 2**16


def test_a_reconstruction_is_to_the_right_of_its_original(tmp_path):
    x, x_hat = torch.zeros(3, 1, 64, 64), torch.ones(3, 1, 64, 64)
    pictures.reconstructions(x, x_hat, tmp_path / "pairs.png")
    line = read(tmp_path / "pairs.png")[-pictures.MARGIN - 32, pictures.MARGIN :, 0]
    changes = np.flatnonzero(np.diff(line[: 6 * 64 + 3 * pictures.GAP + 2 * pictures.GAP_OF_PAIRS]) != 0) + 1
    left = np.cumsum([64, pictures.GAP, 64, pictures.GAP_OF_PAIRS] * 2 + [64, pictures.GAP])
    np.testing.assert_array_equal(changes, left)
    assert line[0] == 0
    assert line[left[1]] == 1


@pytest.mark.parametrize("n", [1, 2, 7])
def test_titles_and_labels_are_whole(tmp_path, n):
    file = tmp_path / "grid.png"
    pictures.grid(
        images(3 * n, 1, 8, 8), file, LONG, columns=3, row_labels=[f"dimension {i}" for i in range(n)], column_labels=["−3", "0", "3"]
    )
    picture = read(file)
    assert is_whole(picture)
    for row in range(n):
        bottom = pictures.MARGIN + (n - row) * (64 + pictures.GAP) - pictures.GAP
        assert picture[-bottom : 64 - bottom or None, :60].min() < 0.5, "a row without its label"
    left = np.flatnonzero(picture[-pictures.MARGIN - 1, :, 0] < 1)[0]
    top = pictures.MARGIN + n * (64 + pictures.GAP) - pictures.GAP
    for column in range(3):
        middle = left + column * (64 + pictures.GAP) + 32
        assert picture[-top - 15 : -top, middle - 5 : middle + 5].min() < 0.5, "a column without its label"
    pictures.reconstructions(images(n, 1, 8, 8), images(n, 1, 8, 8), file)
    assert is_whole(read(file))


def axes_with(z, labels):
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)[0]
    pictures.latent_plane(axes, z, labels)
    figure.draw_without_rendering()
    return axes


@pytest.mark.parametrize("classes", [2, 10, 20])
def test_the_legend_is_beside_the_codes_and_tells_the_classes_apart(classes):
    labels = torch.arange(400) % classes
    axes = axes_with(torch.randn(400, 5), labels)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [str(k) for k in range(classes)]
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert len({tuple(handle.get_facecolor()[0]) for handle in legend.legend_handles}) == classes


def test_a_hundred_classes_are_named_where_they_lie():
    labels = 3 * (torch.arange(1000) % 100)
    axes = axes_with(torch.randn(1000, 5), labels)
    assert axes.get_legend() is None
    assert {text.get_text() for text in axes.texts} == {str(3 * k) for k in range(100)}
    assert len(np.unique(axes.collections[0].get_facecolors(), axis=0)) == 100
    assert [text.get_text() for text in axes.figure.axes[-1].get_yticklabels()][::5] == ["0", "297"]


@pytest.mark.parametrize(
    ("d", "classes", "scale"), [(1, 1, 0.0), (2, 17, 1.0), (64, 100, 1.0), (1, 2000, 1.0), (2, 100, 1e4), (3, 20, 0.0)]
)
def test_latent_pictures_of_all_kinds(tmp_path, d, classes, scale):
    z = scale * torch.randn(2000, d, generator=torch.Generator().manual_seed(0))
    pictures.latent(z, torch.arange(2000) % classes + NO_LABEL, tmp_path / "latent.png")
    assert is_whole(read(tmp_path / "latent.png"))


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_loss_curves_of_few_epochs(tmp_path, epochs):
    history = [{"epoch": k, "train/loss": 3.0 - k, "val/loss": 4.0 - k, "train/kl": 1.0} for k in range(epochs)]
    pictures.loss_curves(history, tmp_path / "loss.png")
    assert is_whole(read(tmp_path / "loss.png"))
    axes = Figure().subplots()
    axes.plot(range(epochs), range(epochs), marker=pictures.marker(epochs))
    pictures.whole_numbers(axes)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) and 0 <= tick < epochs for tick in ticks)


def test_no_curves_without_epochs(tmp_path):
    pictures.loss_curves([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated", "ignore:The .*_dataloader. does not have many workers"
)
def test_a_fit_draws_a_standardised_table_as_the_network_has_it(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(1e6, [1.0, 1e3, 1e6], (200, 3)))
    data = ImageData("table", str(tmp_path / "x.npy"), standardise=True)
    module = ImageVAE(data.shape, latent_dim=2, hidden=(8,), diagnostics_size=0)
    drawn = []
    monkeypatch.setattr(pictures, "table_reconstructions", lambda x, x_hat, file: drawn.append((x, x_hat)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=1, callbacks=[Pictures()], accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet).fit(
        module, datamodule=data
    )
    [(x, x_hat)] = drawn
    raw = data.splits["val"].images
    assert torch.equal(x, data.preparation(raw))
    expected = data.preparation(module.vae.reconstruct(raw).detach(), torch.float64)
    assert torch.allclose(x_hat.double(), expected, atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(40, 60), (90, 60), (2, 60)])
def test_wide_codes_have_the_axes_of_an_svd(monkeypatch, n, d):
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = pictures._principal(z)
    monkeypatch.setattr(pictures, "WIDE", 50)
    found = pictures._principal(z)
    # Of two codes the second axis is any: they lie on one line.
    found, expected = ((t - t.mean(0))[:, : min(2, n - 1)] for t in (found, expected))
    torch.testing.assert_close(found * (found[0] * expected[0]).sign(), expected)
    assert pictures._principal(torch.zeros(4, d)).isfinite().all()
