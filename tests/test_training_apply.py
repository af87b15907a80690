import copy
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import _common
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from fastvae.cli import main
from fastvae.training import apply, pictures
from fastvae.training.checkpoints import AtomicCheckpointIO
from fastvae.training.data import NO_LABEL, ImageData
from fastvae.training.module import ImageVAE
from fastvae.vae import VAE


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A run's checkpoint and configuration, in the current folder."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)

    def make(shape=(1, 8, 8), data="{name: digits, batch_size: 100, test: 0.1, seed: 1}", columns=(), **options):
        torch.manual_seed(0)
        module = ImageVAE(list(shape), latent_dim=3, hidden=[8], **options)
        module.columns = tuple(columns)
        trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", plugins=[AtomicCheckpointIO()])
        trainer.strategy.connect(module)
        folder = tmp_path / "runs" / "a" / "version_0"
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
        (folder / "config.yaml").write_text(f"data: {data}\n")
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


@torch.no_grad()
def test_a_file_of_ones_own_is_taken_whole_and_in_its_order(runs, tmp_path):
    vae = runs()
    x = torch.rand(200, 1, 8, 8)
    np.save("test_new.npy", x)
    apply.encode(path="test_new.npy")
    apply.reconstruct(path="test_new.npy", output="x_hat.npy")
    with np.load("codes.npz") as codes:
        np.testing.assert_allclose(codes["mu"], vae.encode(x)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.load("x_hat.npy"), vae.reconstruct(x), rtol=1e-4, atol=1e-6)
    apply.traverse(path="test_new.npy", image=199, steps=2, output="sheet.npy")
    for name in ("b/1", "a/2"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), len(name) + int(name[-1]), np.uint8)).save(tmp_path / "pictures" / f"{name}.png")
    apply.encode(path="pictures", output="codes.csv")
    table = pd.read_csv("codes.csv")
    assert table["row"].tolist() == ["a/2.png", "b/1.png"]
    assert table["label"].tolist() == ["a", "b"]
    expected = vae.encode(torch.stack([torch.full((1, 8, 8), value / 255) for value in (5, 4)]))
    np.testing.assert_allclose(table[[f"mu_{d}" for d in range(3)]], expected[0], rtol=1e-4, atol=1e-6)
    apply.encode(path="pictures/a/2.png", output="one.npz")
    with np.load("one.npz") as codes:
        np.testing.assert_allclose(codes["mu"], expected[0][:1], rtol=1e-4, atol=1e-6)
        assert codes["rows"].tolist() == ["2.png"]


@torch.no_grad()
def test_latents_with_locations(runs, tmp_path, monkeypatch):
    vae = runs(architecture="autoencoder_kl", latent_channels=2, channels=[4, 4], likelihood="laplace")
    x = torch.rand(6, 1, 8, 8)
    np.save("x.npy", x)
    mu, logvar = vae.encode(x)
    apply.encode(path="x.npy")
    with np.load("codes.npz") as codes:
        np.testing.assert_allclose(codes["mu"], mu, rtol=1e-4, atol=1e-6)
    apply.encode(path="x.npy", output="codes.csv")
    table = pd.read_csv("codes.csv", index_col="row")
    np.testing.assert_allclose(table[[f"logvar_{d}" for d in range(32)]], logvar.flatten(1), rtol=1e-4, atol=1e-6)
    apply.reconstruct(path="x.npy", output="x_hat.npy")
    np.testing.assert_allclose(np.load("x_hat.npy"), vae.reconstruct(x), rtol=1e-4, atol=1e-6)
    apply.sample(n=3, output="samples.npy")
    assert np.load("samples.npy").shape == (3, 1, 8, 8)
    apply.export()
    decode = torch.export.load("export/decoder.pt2").module()
    torch.testing.assert_close(decode(mu), vae.expected(mu))
    torch.testing.assert_close(VAE.from_pretrained("export").encode(x), (mu, logvar))
    labels = []
    monkeypatch.setattr(pictures, "grid", lambda *_, row_labels, **__: labels.extend(row_labels))
    apply.traverse(path="x.npy", image=4, steps=3)
    apply.traverse(path="x.npy", image=4, steps=3, output="traversal.npy")
    order = mu.flatten(1).var(0, correction=0).argsort(descending=True).tolist()
    assert labels[0] == "z" + ",".join(str(int(k)) for k in np.unravel_index(order[0], (2, 4, 4)))
    z = mu[4].clone()
    z.view(-1)[order[1]] = 3
    sheet = np.load("traversal.npy")
    assert sheet.shape == (32, 3, 1, 8, 8)
    np.testing.assert_allclose(sheet[1, 2], vae.expected(z[None])[0], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(apply, "WIDE", 31)
    monkeypatch.setattr(apply, "TRAVERSED", 5)
    apply.traverse(path="x.npy", steps=2, output="traversal.npy")
    assert len(np.load("traversal.npy")) == 5


def a_table(file, n=50, between=","):
    x = np.random.default_rng(0).normal(size=(n, 4))
    rows = [between.join(map(str, [f"cell {k}", "xy"[k % 2], *row])) for k, row in enumerate(x)]
    file.write_text("\n".join([between.join(["", "label", *"abcd"]), *rows]) + "\n")
    return torch.from_numpy(x).float()


@torch.no_grad()
def test_a_table_of_ones_own(runs, tmp_path):
    vae = runs([4], "{name: table, validation: 0.2, test: 0.2}", likelihood="gaussian")
    x = a_table(tmp_path / "new.tsv", between="\t")
    mu, logvar = vae.encode(x)
    apply.encode(path="new.tsv", output="codes.csv")
    table = pd.read_csv("codes.csv")
    assert table.columns.tolist() == ["row", "label", *(f"{name}_{d}" for name in ("mu", "logvar") for d in range(3))]
    assert table["row"].tolist() == [f"cell {k}" for k in range(50)]
    assert table["label"].tolist() == ["x", "y"] * 25
    np.testing.assert_allclose(table.iloc[:, 2:], torch.cat([mu, logvar], dim=1), rtol=1e-4, atol=1e-6)
    apply.encode(path="new.tsv", n=7)
    with np.load("codes.npz", allow_pickle=False) as codes:
        assert codes["classes"][codes["labels"]].tolist() == ["x", "y", "x", "y", "x", "y", "x"]
        assert codes["rows"].tolist() == [f"cell {k}" for k in range(7)]
    np.save("bare.npy", x)
    apply.encode(path="bare.npy", output="codes.csv", n=3)
    assert pd.read_csv("codes.csv").iloc[:, :2].columns.tolist() == ["row", "mu_0"]
    assert pd.read_csv("codes.csv")["row"].tolist() == [0, 1, 2]
    apply.reconstruct(path="new.tsv")
    assert imread(tmp_path / "reconstructions.png").std() > 0.01
    apply.reconstruct(path="new.tsv", output="x_hat.npy")
    np.testing.assert_allclose(np.load("x_hat.npy"), vae.reconstruct(x), rtol=1e-4, atol=1e-6)


def columns_as(file, names):
    x = a_table(file)
    pd.read_csv(file)[names].to_csv(file, index=False)
    return x


@torch.no_grad()
def test_columns_are_taken_by_their_names(runs, tmp_path):
    vae = runs([4], "{name: table, path: new.csv, test: 0}", columns="abcd", likelihood="gaussian")
    x = columns_as(tmp_path / "new.csv", ["d", "label", "b", "c", "a"])
    for options in ({"path": "new.csv"}, {}):
        apply.encode(**options)
        with np.load("codes.npz") as codes:
            rows = codes["rows"].astype(int)
            assert sorted(rows) == list(range(50))
            np.testing.assert_allclose(codes["mu"], vae.encode(x[rows])[0], rtol=1e-4, atol=1e-6)
    apply.reconstruct(path="new.csv", output="x_hat.npy")
    np.testing.assert_allclose(np.load("x_hat.npy"), vae.reconstruct(x), rtol=1e-4, atol=1e-6)
    np.save("bare.npy", x)
    apply.encode(path="bare.npy")
    with np.load("codes.npz") as codes:
        np.testing.assert_allclose(codes["mu"], vae.encode(x)[0], rtol=1e-4, atol=1e-6)
    columns_as(tmp_path / "new.csv", ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"the columns that the model was trained on, by name, got data without 'd'$"):
        apply.encode(path="new.csv")
    pd.DataFrame(x.numpy(), columns=list("abxy")).to_csv("new.csv", index=False)
    with pytest.raises(ValueError, match=r"got data without 'c', 'd' and with 'x', 'y'$"):
        apply.encode(path="new.csv")
    runs([4], "{name: table}", columns=[1, 2], likelihood="gaussian")
    with pytest.raises(ValueError, match="ckpt_path must be a checkpoint of this model, got columns whose names are not text"):
        apply.encode(path="new.csv")
    runs([4], "{name: table}", columns="aabc", likelihood="gaussian")
    (tmp_path / "new.csv").write_text("a,b,a,c\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"got data with another order of columns that share a name, 'a'$"):
        apply.encode(path="new.csv")


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("standardise", [False, True])
def test_a_run_that_goes_on_takes_columns_by_their_names(tmp_path, standardise):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    columns_as(tmp_path / "a.csv", list("abcd"))
    columns_as(tmp_path / "b.csv", list("cdab"))

    def fit(name, epochs, **options):
        torch.manual_seed(0)
        module = ImageVAE([4], latent_dim=2, hidden=[8])
        data = ImageData("table", path=str(tmp_path / name), standardise=standardise, test=0)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, plugins=[AtomicCheckpointIO()], **quiet)
        trainer.fit(module, datamodule=data, **options)
        trainer.save_checkpoint(tmp_path / f"{name}.{epochs}.ckpt")
        return module

    fit("a.csv", 1)
    expected, found = (fit(name, 2, ckpt_path=str(tmp_path / "a.csv.1.ckpt")) for name in ("a.csv", "b.csv"))
    assert found.columns == tuple("abcd")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)
    columns_as(tmp_path / "b.csv", list("abc"))
    with pytest.raises(ValueError, match="got data without 'd'"):
        fit("b.csv", 3, ckpt_path=str(tmp_path / "a.csv.1.ckpt"))


@torch.no_grad()
def test_codes_as_anndata(runs, tmp_path, monkeypatch):
    anndata = pytest.importorskip("anndata")
    vae = runs([4], "{name: table}", likelihood="gaussian")
    x = a_table(tmp_path / "new.csv")
    apply.encode(path="new.csv", output="codes.h5ad")
    codes = anndata.read_h5ad("codes.h5ad")
    np.testing.assert_allclose(codes.X, vae.encode(x)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(codes.layers["logvar"], vae.encode(x)[1], rtol=1e-4, atol=1e-6)
    assert codes.obs_names.tolist() == [f"cell {k}" for k in range(50)]
    assert codes.obs["label"].tolist() == ["x", "y"] * 25
    assert codes.var_names.tolist() == ["mu_0", "mu_1", "mu_2"]


def test_names_of_classes_are_in_the_legend():
    axes = Figure().add_subplot()
    pictures.latent_plane(axes, torch.randn(6, 2), torch.tensor([0, 1, NO_LABEL] * 2), ("cat", "dog"))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "cat", "dog"]


def test_anndata_that_is_not_installed_is_named(runs, monkeypatch):
    runs()
    monkeypatch.setattr(apply.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"anndata must be installed for output in .h5ad: pip install"):
        apply.encode(output="codes.h5ad")


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
    loaded = VAE.from_pretrained("out")
    torch.testing.assert_close(loaded.encode(x)[0], mu)


def law(n, seed=0):
    """One factor behind a date, a tiny and a large number, and a constant."""
    rng = np.random.default_rng(seed)
    t = rng.normal(size=(n, 1)) + 0.1 * rng.normal(size=(n, 3))
    return np.concatenate([np.array([2459000.5, -5e-6, 1e4]) + np.array([0.3, 2e-6, -3e3]) * t, np.full((n, 1), 0.1)], axis=1)


def by_hand(layers, x):
    for k, layer in enumerate(layers):
        x = (np.maximum(x, 0) if k else x) @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    return x


@pytest.mark.slow
def test_a_standardised_table_in_its_own_units(tmp_path, monkeypatch):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    train, new = law(1000), law(200, seed=1) + 3 * law(1000).std(0)  # which a mean of its own would bring back to 0
    np.save("train.npy", train)
    np.save("new.npy", new)
    table = ["--data.name", "table", "--data.path", "train.npy", "--data.standardise", "true", "--data.test", "0", "--data.validation", "0"]
    model = [
        "--model.latent_dim",
        "2",
        "--model.hidden",
        "[32]",
        "--model.lambda_",
        "10",
        "--model.optimal_sigma",
        "true",
        "--model.lr",
        "3e-3",
    ]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *table, *model, "--data.batch_size", "100", "--trainer.max_epochs", "60", *quiet])
    assert end.value.code == 0
    vae = apply.load("last", "runs").vae
    encoder, decoder = ([layer for layer in part if isinstance(layer, torch.nn.Linear)] for part in (vae.encoder, vae.decoder))
    mean, std = train.mean(0), train.std(0)
    std[3] = 1
    codes = by_hand(encoder, (new - mean) / std)
    results = by_hand(decoder, codes[:, :2]) * std + mean

    # The rows of `new` are told apart by their own reconstructions, whatever their order is.
    apply.encode(path="new.npy", output="codes.npz")
    with np.load("codes.npz") as file:
        mu, logvar = file["mu"], file["logvar"]
    taken = [int(np.abs(codes[:, :2] - row).sum(1).argmin()) for row in mu]
    assert len(set(taken)) == len(mu) > 30
    np.testing.assert_allclose(mu, codes[taken, :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logvar, codes[taken, 2:], rtol=1e-4, atol=1e-4)

    apply.reconstruct(path="new.npy", n=len(mu), output="x.npy")
    np.testing.assert_allclose((np.load("x.npy") - mean) / std, (results[taken] - mean) / std, atol=1e-4)

    apply.sample(n=2000, output="s.npy")
    samples = np.load("s.npy")
    assert samples.dtype == np.float64
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).double().numpy()
    np.testing.assert_allclose((samples - mean) / std, by_hand(decoder, z), atol=1e-4)
    assert np.abs((samples.mean(0) - mean) / std).max() < 0.3
    assert (np.abs(samples.std(0) / std - 1)[:3] < 0.3).all()
    assert np.abs(np.corrcoef(samples[:, :3].T)).min() > 0.98

    apply.traverse(path="new.npy", image=7, steps=5, output="t.npy")
    moved = np.load("t.npy")
    assert moved.shape == (2, 5, 4)
    for d, row in enumerate(np.argsort(-codes[taken, :2].var(0))):
        z = np.repeat(codes[taken[7]][None, :2], 5, 0)
        z[:, row] = np.linspace(-3, 3, 5)
        np.testing.assert_allclose((moved[d] - mean) / std, by_hand(decoder, z), atol=1e-4)

    apply.export(output="out")
    encode, decode = (torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    encode(torch.from_numpy(new).float())
    for part, exported in zip(encode(torch.from_numpy(new)), (codes[:, :2], codes[:, 2:]), strict=True):
        np.testing.assert_allclose(part.detach(), exported, rtol=1e-4, atol=1e-4)
    decoded = decode(torch.from_numpy(codes[:, :2]).float()).detach().numpy()
    np.testing.assert_allclose((decoded - mean) / std, (results - mean) / std, atol=1e-4)
    loaded = VAE.from_pretrained("out")
    np.testing.assert_allclose((loaded.reconstruct(torch.from_numpy(new)).detach().numpy() - mean) / std, (results - mean) / std, atol=1e-4)


OWN = """
from torch import nn

class Encoder(nn.Sequential):
    def __init__(self, width: int = 8):
        super().__init__(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))

class Decoder(nn.Linear):
    def __init__(self):
        super().__init__(2, 4)
"""


@pytest.mark.slow
def test_networks_optimiser_and_schedule_by_class_path(tmp_path, monkeypatch, capfd):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_networks.py").write_text(OWN)
    np.save("x.npy", law(200))

    settings = _common.parsing_settings

    def call(*args, code=0):
        # What one call trusts stays trusted in its process.
        monkeypatch.setattr(_common, "parsing_settings", copy.deepcopy(settings))
        with pytest.raises(SystemExit) as end:
            main(args)
        out, err = capfd.readouterr()
        assert end.value.code == code, out + err
        return err

    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    fit = ["fit", "--data.name", "table", "--data.path", "x.npy", "--data.standardise", "true", "--model.latent_dim", "2", *quiet]
    own = ["--model.encoder", "own_networks.Encoder", "--model.encoder.width", "16", "--model.decoder", "own_networks.Decoder"]
    rate = ["--model.optimizer", "SGD", "--model.optimizer.momentum", "0.9", "--model.lr", "1e-4", "--model.lr_scheduler", "StepLR"]
    rate += ["--model.lr_scheduler.step_size", "1", "--model.lr_scheduler.gamma", "0.5"]
    refused = "a configuration may name classes of fastvae, Lightning and PyTorch, got own_networks.Encoder: --trust PACKAGE"
    assert refused in call(*fit, *own, code=2)
    call(*fit, *own, *rate, "--trust", "own_networks", "--trainer.max_epochs", "3")
    saved = torch.load("runs/mmd_vae/version_0/checkpoints/last.ckpt", weights_only=True)
    [group] = saved["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["lr"]) == (0.9, pytest.approx(1e-4 / 8))
    for command in (["encode"], ["reconstruct", "--output", "x_hat.npy"], ["sample", "--output", "s.npy"], ["export"]):
        assert "--trust PACKAGE allows own_networks.Encoder" in call(*command, code=1)
        call(*command, "--trust", "own_networks")
    from own_networks import Decoder, Encoder

    with pytest.raises(ValueError, match="encoder and decoder must be given"):
        VAE.from_pretrained("export")
    loaded = VAE.from_pretrained("export", encoder=Encoder(16), decoder=Decoder())
    assert torch.equal(loaded.encoder[0].weight, saved["state_dict"]["vae.encoder.0.weight"])
    call("test", "--trust", "own_networks", "--trainer.accelerator", "cpu")
    call("fit", "--ckpt_path", "last", "--trust", "own_networks", "--trainer.max_epochs", "4", *quiet)
    assert "Option 'lr' is not accepted" in call(*fit, *rate, "--model.optimizer.lr", "3", code=2)  # --model.lr is
    call(*fit, "--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "--data.validation", "0", "--trainer.max_epochs", "2")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: apply.sample(output="x.jpg"), "output must end in .png or .npy, got 'x.jpg'"),
        (lambda: apply.sample(n=0), "n must be at least 1, got 0"),
        (lambda: apply.encode(output="x.npy"), "output must end in .npz or .csv or .h5ad, got 'x.npy'"),
        (lambda: apply.traverse(image=180), "image must be an index from 0 to 179, got 180"),
        (lambda: apply.traverse(steps=1), "steps must be at least 2, got 1"),
        (
            lambda: apply.sample(ckpt_path="absent.ckpt"),
            "ckpt_path must be 'last', 'best' or the file of a complete checkpoint, got 'absent.ckpt'",
        ),
    ],
)
def test_error_sentences(runs, call, sentence):
    runs()
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_run_without_its_configuration(runs, tmp_path):
    runs()
    (tmp_path / "runs" / "a" / "version_0" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"path must be given if the run has no config.yaml"):
        apply.reconstruct()
    (tmp_path / "mine").mkdir()
    for k in range(4):
        Image.fromarray(np.full((40, 60), 60 * k, np.uint8)).save(tmp_path / "mine" / f"{k}.png")
    apply.reconstruct(path="mine", output="x.npy")  # cut and scaled to what the model takes
    assert np.load("x.npy").shape[1:] == (1, 8, 8)


def test_rows_of_a_decoder_of_ones_own_are_drawn_as_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = SimpleNamespace(sample=lambda n, generator: torch.rand(n, 64))
    monkeypatch.setattr(apply, "load", lambda *args: SimpleNamespace(vae=vae, hparams={"shape": [1, 8, 8]}))
    apply.sample(n=4)
    assert imread(tmp_path / "samples.png").std() > 0.01
    apply.sample(n=4, output="s.npy")
    assert np.load("s.npy").shape == (4, 1, 8, 8)
