"""CMMD and the kernel inception distance as metrics, against their formulas and against torchmetrics' own."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.image.kid import KernelInceptionDistance as TorchmetricsKID

from fastvae import RandomFeatures, recipes
from fastvae.metrics import CMMD, KernelInceptionDistance
from tests.cases import DEVICE, Copies
from tests.ranks import run_on_ranks


def embeddings(n=70, m=50, d=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    real = torch.randn(n, d, dtype=torch.float64, generator=generator) + 0.5
    fake = 1.1 * torch.randn(m, d, dtype=torch.float64, generator=generator) + 0.6
    return real.to(DEVICE, dtype), fake.to(DEVICE, dtype)


def feed(metric, real, fake, batch=16):
    for part in real.split(batch):
        metric.update(part, real=True)
    for part in fake.split(batch):
        metric.update(part, real=False)
    return metric


def dense_cmmd(x, y):
    x, y = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x, y))
    mean = [
        torch.exp(-(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200).mean() for a, b in ((x, x), (y, y), (x, y))
    ]
    return 1000 * (mean[0] + mean[1] - 2 * mean[2])


def test_cmmd_of_batches():
    real, fake = embeddings()
    torch.testing.assert_close(feed(CMMD(), real, fake).compute().double(), dense_cmmd(real, fake), rtol=1e-5, atol=0)


def test_cmmd_keeps_digits_that_float32_loses():
    real, fake = embeddings(400, 300, 64)
    exact = dense_cmmd(real, fake)
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (real, fake))

    def mean(a, b):
        return torch.exp(-(a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T) / 200).mean()

    plain = abs(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)) - exact) / exact
    error = abs(feed(CMMD(), real, fake).compute() - exact) / exact
    assert error < 1e-5
    assert plain > 10 * error


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("normalize", [True, False])
def test_cmmd_of_near_copies(noise, normalize):
    u, other = embeddings(100, 100, 768)
    copy = u + noise * other
    # Where the rows are not divided by their norms, sigma grows as they do.
    scale = 1 if normalize else u.norm(dim=1).mean().item()
    x, y = (t.double() / (t.double().norm(dim=1, keepdim=True) if normalize else scale) for t in (u, copy))
    k = [torch.expm1(-(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200) for a, b in ((x, x), (y, y), (x, y))]
    expected = 1000 * (k[0] + k[1] - k[2] - k[2].T).mean()
    value = feed(CMMD(10 * scale, normalize=normalize), u, copy).compute()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
@pytest.mark.parametrize("shift", [0, 3])
def test_kid_of_near_copies(noise, shift):
    u, other = embeddings(100, 100, 768)
    u = u + shift
    copy = u + noise * other
    x, y = u.double(), copy.double()
    own = [((t @ t.T / 768 + 1) ** 3) for t in (x, y)]
    expected = sum((k.sum() - k.trace()) / (100 * 99) for k in own) - 2 * ((x @ y.T / 768 + 1) ** 3).mean()
    largest = max(k.max().item() for k in own)
    value = feed(KernelInceptionDistance(subsets=None), u, copy).compute().mean
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7 * largest)


def test_kid_is_torchmetrics_kid_of_the_same_subsets():
    real, fake = (t.cpu() for t in embeddings(dtype=torch.float64))
    for options in ({}, {"degree": 2, "gamma": 0.2, "coef": 0.5}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
            theirs = TorchmetricsKID(feature=torch.nn.Identity(), subsets=5, subset_size=20, **options).set_dtype(torch.float64)
        ours = feed(KernelInceptionDistance(subsets=5, subset_size=20, **options), real, fake)
        feed(theirs, real, fake)
        torch.manual_seed(7)
        expected = theirs.compute()
        torch.manual_seed(7)
        torch.testing.assert_close(tuple(ours.compute()), expected)


def test_kid_seed_and_exact():
    real, fake = embeddings()
    metric = feed(KernelInceptionDistance(subsets=5, subset_size=20, seed=3), real, fake)
    first = metric.compute()
    torch.manual_seed(1)
    again = feed(KernelInceptionDistance(subsets=5, subset_size=20, seed=3), real, fake).compute()
    assert first == again
    exact = feed(KernelInceptionDistance(subsets=None), real, fake).compute()
    torch.testing.assert_close(exact.mean, recipes.kid(real, fake, subsets=None).mean)
    assert exact.std.isnan()


def test_embeddings_kept_on_another_device_are_not_copied_to_be_compared():
    metric = CMMD(backend="reference")
    metric.update(torch.ones(3, 2, device="cpu"), real=True)
    with Copies() as copies:
        metric.update(torch.empty(3, 2, device="meta"), real=True)
    assert not copies.found


def test_reset():
    real, fake = embeddings()
    metric = feed(CMMD(), real, fake)
    value = metric.compute()
    metric.reset()
    metric.update(fake, real=False)
    with pytest.raises(ValueError, match="embeddings that are real must be given"):
        metric.compute()
    metric.update(real, real=True)
    torch.testing.assert_close(metric.compute(), value)

    metric = feed(CMMD(reset_real_features=False), real, fake)
    metric.compute()
    metric.reset()
    metric.update(fake + 1, real=False)
    metric.reset()
    assert not metric.fake_features
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.compute(), value)


@pytest.mark.parametrize("reset_real_features", [True, False])
def test_a_call_adds_a_batch_once(reset_real_features):
    real, fake = embeddings()
    expected = recipes.kid(real, fake, subsets=None).mean
    metric = KernelInceptionDistance(subsets=None, reset_real_features=reset_real_features)
    for part in real.split(16):
        assert metric(part, real=True) is None
    for part in fake.split(16):
        assert metric(part, False) is None
    assert sum(map(len, metric.real_features)) == len(real)
    assert sum(map(len, metric.fake_features)) == len(fake)
    torch.testing.assert_close(metric.compute().mean, expected)


@pytest.mark.parametrize("call", [MetricCollection.update, MetricCollection.forward])
def test_a_collection_may_be_called(call):
    real, fake = embeddings()
    collection = MetricCollection({"cmmd": CMMD(), "kid": KernelInceptionDistance(subsets=None)})
    collection.update(real, real=True)
    for part in fake.split(16):
        call(collection, part, real=False)
    result = collection.compute()
    assert result["cmmd"] == feed(CMMD(), real, fake).compute()
    torch.testing.assert_close(result["kid"].mean, recipes.kid(real, fake, subsets=None).mean)


@pytest.mark.parametrize("first", ["cmmd", "kid"])
def test_a_collection_resets_each_as_it_is_set(first):
    real, fake = embeddings()
    metrics = {"cmmd": CMMD(reset_real_features=first != "cmmd"), "kid": KernelInceptionDistance(None, reset_real_features=first == "cmmd")}
    keeps = next(name for name, metric in metrics.items() if not metric.reset_real_features)
    collection = feed(MetricCollection(metrics), real, fake)
    before = collection.compute()[keeps]
    collection.reset()
    assert {name: sum(map(len, metric.real_features)) for name, metric in collection.items()} == {"cmmd": 0, "kid": 0, keeps: len(real)}
    collection.update(fake, real=False)
    torch.testing.assert_close(collection[keeps].compute(), before, equal_nan=True)


def test_a_collection_keeps_what_its_metrics_were_given_before():
    real, fake = embeddings()
    kid = KernelInceptionDistance(None, reset_real_features=False)
    kid.update(real, real=True)
    collection = MetricCollection({"cmmd": CMMD(reset_real_features=False), "kid": kid})
    collection.update(fake, real=False)
    torch.testing.assert_close(kid.compute().mean, recipes.kid(real, fake, subsets=None).mean)
    assert not collection["cmmd"].real_features


def test_collection_shares_the_embeddings():
    real, fake = embeddings()
    collection = MetricCollection({"cmmd": CMMD(), "kid": KernelInceptionDistance(subsets=None)})
    for _ in range(2):
        feed(collection, real, fake)
        result = collection.compute()
        assert set(result) == {"cmmd", "kid"}
        assert result["cmmd"] == feed(CMMD(), real, fake).compute()
        assert result["kid"].mean == feed(KernelInceptionDistance(subsets=None), real, fake).compute().mean
        collection.reset()


def test_a_metric_is_pickled_and_moved():
    real, fake = embeddings()
    metric = pickle.loads(pickle.dumps(feed(CMMD(), real, fake))).to("cpu")
    torch.testing.assert_close(metric.compute().cpu(), feed(CMMD(), real, fake).compute().cpu())


def share_of_rank(rank, world, folder):
    real, fake = (t.cpu() for t in embeddings())
    share = slice(0, 20) if rank == 0 else slice(20, None)
    collection = MetricCollection({"cmmd": CMMD(), "kid": KernelInceptionDistance(subsets=None, reset_real_features=False)})
    feed(collection, real[share], fake[share])
    result = collection.compute()
    torch.save((result["cmmd"], result["kid"].mean), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_have_the_distance_of_all_embeddings(tmp_path):
    run_on_ranks([share_of_rank], 2, tmp_path, tmp_path)
    real, fake = (t.cpu() for t in embeddings())
    expected = recipes.cmmd(real, fake), recipes.kid(real, fake, subsets=None).mean
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: CMMD(sigma=0), ValueError, "sigma must be greater than 0, got 0"),
        (lambda: CMMD(backend="cuda"), ValueError, "backend must be one of"),
        (lambda: KernelInceptionDistance(subsets=0), ValueError, "subsets must be at least 1, got 0"),
        (lambda: KernelInceptionDistance(degree=0), ValueError, "degree must be a whole number"),
        (lambda: CMMD().update(torch.zeros(3), real=True), ValueError, r"embeddings must have shape \(rows, features\), got \(3,\)"),
        (lambda: CMMD().update(torch.zeros(3, 2), real="yes"), TypeError, "real must be True or False, got 'yes'"),
        (lambda: feed(CMMD(), torch.ones(3, 2), torch.ones(3, 4)), ValueError, "must have the same number of features"),
        (lambda: feed(CMMD(), torch.ones(3, 2), torch.ones(3, 2).double()), TypeError, "must have the same dtype"),
        (
            lambda: feed(KernelInceptionDistance(), torch.ones(3, 2), torch.ones(3, 2)).compute(),
            ValueError,
            "must have at least subset_size = 1000 rows, got 3: pass subsets=None",
        ),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.slow
def test_without_torchmetrics():
    code = """if True:
        import sys; sys.modules["torchmetrics"] = None
        import fastvae
        try:
            import fastvae.metrics
        except ImportError as error:
            print(error)
    """
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert "torchmetrics must be installed for fastvae.metrics: pip install" in result.stdout, result.stderr


def test_cmmd_of_a_zero_embedding_is_finite():
    x = torch.randn(6, 4)
    x[0] = 0
    metric = CMMD(features=RandomFeatures(16))
    metric.update(x, True)
    metric.update(torch.randn(6, 4), False)
    assert metric.compute().isfinite()
