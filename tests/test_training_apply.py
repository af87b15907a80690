import json
import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from matplotlib.image import imread

from fastvae.training import apply
from fastvae.training.checkpoints import AtomicCheckpointIO
from fastvae.training.data import ImageData
from fastvae.training.module import ImageVAE


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A run's checkpoint and configuration, in the current folder."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)

    def make(**options):
        torch.manual_seed(0)
        module = ImageVAE([1, 8, 8], latent_dim=3, hidden=[8], **options)
        trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", plugins=[AtomicCheckpointIO()])
        trainer.strategy.connect(module)
        folder = tmp_path / "runs" / "a" / "version_0"
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
        (folder / "config.yaml").write_text("data: {name: digits, batch_size: 100, test: 0.1, seed: 1}\n")
        return module.vae.eval()

    return make


def test_sample(runs, tmp_path):
    vae = runs()
    apply.sample(n=9)
    assert imread(tmp_path / "samples.png").std() > 0.01
    apply.sample(n=9, output="x.npy", seed=4)
    with torch.no_grad():
        expected = vae.sample(9, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5)


def test_reconstruct_and_encode(runs, tmp_path):
    vae = runs()
    data = ImageData("digits", test=0.1, seed=1)
    data.setup()
    x, labels = apply.scaled(data.splits["test"].images), data.splits["test"].labels
    apply.reconstruct(n=5)
    assert imread(tmp_path / "reconstructions.png").std() > 0.01
    apply.reconstruct(n=5, output="x.npy")
    np.testing.assert_allclose(np.load("x.npy"), vae.reconstruct(x[:5]).detach(), rtol=1e-5)
    apply.encode()
    with np.load("codes.npz", allow_pickle=False) as file:
        codes = dict(file)
    mu, logvar = vae.encode(x)
    assert codes["mu"].shape == (180, 3)
    np.testing.assert_allclose(codes["mu"], mu.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(codes["logvar"], logvar.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(codes["labels"], labels)
    np.save("mine.npy", np.random.default_rng(0).random((6, 8, 8)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.npy").rename(tmp_path / "mine" / "mine.npy")
    apply.encode(path="mine", output="mine.npz", n=1)
    with np.load("mine.npz") as mine:
        assert mine["mu"].shape == (1, 3)


def test_traverse_moves_one_dimension_at_a_time(runs, tmp_path, monkeypatch):
    vae = runs()
    grid, labels = apply.pictures.grid, {}
    monkeypatch.setattr(apply.pictures, "grid", lambda *args, **options: (labels.update(options), grid(*args, **options)))
    apply.traverse(steps=5, reach=2.0)
    assert imread(tmp_path / "traversal.png").std() > 0.01
    apply.traverse(image=3, steps=5, reach=2.0, output="x.npy")
    sheet = np.load("x.npy")
    assert sheet.shape == (3, 5, 1, 8, 8)
    data = ImageData("digits", test=0.1, seed=1)
    data.setup()
    x = apply.scaled(data.splits["test"].images)
    mu = vae.encode(x)[0].detach()
    most = int(mu.var(0).argmax())
    assert labels["row_labels"] == [f"z{d}" for d in mu.var(0).argsort(descending=True)]
    assert labels["column_labels"] == ["−2", "−1", "0", "1", "2"]
    code = mu[3:4].repeat(5, 1)
    code[:, most] = torch.linspace(-2, 2, 5)
    np.testing.assert_allclose(sheet[0], vae.likelihood.mean(vae.decode(code)).detach(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"architecture": "conv", "channels": [4, 8]}, {"objective": "wae_mmd"}])
def test_export_needs_no_fastvae(runs, tmp_path, options):
    vae = runs(**options)
    apply.export(output="out")
    x, z = torch.rand(7, 1, 8, 8), torch.randn(5, 3)
    encoder, decoder = (torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    code, (mu, logvar) = encoder(x), vae.encode(x)
    torch.testing.assert_close(code if logvar is None else code[0], mu)
    if logvar is not None:
        torch.testing.assert_close(code[1], logvar)
    torch.testing.assert_close(decoder(z), vae.likelihood.mean(vae.decode(z)))
    saved = json.loads((tmp_path / "out" / "options.json").read_text())
    assert saved["latent_dim"] == 3
    weights = list((tmp_path / "out").glob("model.*"))
    assert len(weights) == 1
    if weights[0].suffix == ".pt":
        state = torch.load(weights[0], weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(weights[0])
    copy = ImageVAE([1, 8, 8], **{"latent_dim": 3, "hidden": [8], **options}).vae
    copy.load_state_dict(state)
    torch.testing.assert_close(copy.encode(x)[0], mu)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: apply.sample(output="x.jpg"), "output must end in .png or .npy, got 'x.jpg'"),
        (lambda: apply.sample(n=0), "n must be at least 1, got 0"),
        (lambda: apply.encode(output="x.npy"), "output must end in .npz, got 'x.npy'"),
        (lambda: apply.traverse(image=180), "image must be from 0 to 179, the number of the test data, got 180"),
        (lambda: apply.traverse(steps=1), "steps must be at least 2, got 1"),
        (lambda: apply.sample(ckpt_path="absent.ckpt"), "ckpt_path must be 'last' or a whole checkpoint's file, got 'absent.ckpt'"),
    ],
)
def test_error_sentences(runs, call, sentence):
    runs()
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_run_without_its_configuration(runs, tmp_path):
    runs()
    (tmp_path / "runs" / "a" / "version_0" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"path must be given where the run has no config.yaml"):
        apply.reconstruct()
