"""Random Fourier features and the Nyström approximation: the kernels that they approximate, and two-sample tests and metrics with them."""

import math
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

import fastvae
from fastvae import NystromFeatures, RandomFeatures, two_sample_test
from fastvae.metrics import CMMD, MMD
from fastvae.radial import RBF, Energy, Laplace, Matern32, Polynomial, RationalQuadratic, terms_of
from fastvae.reference.mmd import kernel_matrix
from tests.cases import DEVICE
from tests.ranks import run_on_ranks


def rows(n, seed, scale=1.0, shift=0.0, features=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, features, generator=generator, dtype=torch.float64) + shift).to(DEVICE, dtype)


X, Y = rows(60, 1), rows(45, 2, 1.2, 0.4)
WIDTHS, WEIGHTS = (0.8, 2.0), (1.0, 0.5)
RADIAL = ["rbf", "laplace", "imq", "rational_quadratic", "matern32", "matern52", RationalQuadratic(0.5), RationalQuadratic(3.0)]
SUMS = [RBF().scaled(2), 1 * RBF(), RBF() + 0.5 * Matern32().scaled(0.7), 2 * Laplace().scaled(1.5)]


@pytest.mark.parametrize("kernel", [*RADIAL, *SUMS], ids=str)
def test_random_features_approximate_the_kernel(kernel):
    """Each pair to five standard deviations of the mean over frequencies."""
    family, count = fastvae.checks.kernel(kernel), 40_000
    waves = RandomFeatures(count)._waves(3, family, WIDTHS, WEIGHTS, torch.Generator().manual_seed(0))
    x, y = X[:9].cpu(), Y[:8].cpu()
    exact = kernel_matrix(x, y, torch.tensor(WIDTHS, dtype=x.dtype), torch.tensor(WEIGHTS, dtype=x.dtype), family)
    squares = sum(weight**2 for weight, _, _ in terms_of(family)) * sum(a * a for a in WEIGHTS)
    assert (waves(x) @ waves(y).T - exact).abs().max() < 5 * math.sqrt(squares / count)
    torch.testing.assert_close(waves(x).square().sum(1), torch.full_like(x[:, 0], family.value_at_zero * sum(WEIGHTS)))


@pytest.mark.parametrize("kernel", ["rbf", "laplace", Polynomial(2, 0.5)], ids=str)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("sizes", [(60, 45), (45, 45)])
def test_landmarks_that_are_all_rows_are_the_exact_test(kernel, estimator, sizes):
    options = {"kernel": kernel, "bandwidth": WIDTHS, "bandwidth_weights": WEIGHTS, "estimator": estimator, "permutations": 60, "seed": 3}
    x, y = X[: sizes[0]], Y[: sizes[1]]
    exact = two_sample_test(x, y, **options)
    actual = two_sample_test(x, y, method=NystromFeatures(1000), **options)
    assert actual.statistic == pytest.approx(exact.statistic, rel=1e-5)
    torch.testing.assert_close(actual.null, exact.null, rtol=1e-5, atol=1e-6 * exact.null.abs().max().item())
    assert actual.p_value == exact.p_value


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [RandomFeatures(30), NystromFeatures(12)], ids=str)
def test_statistics_are_those_of_the_approximate_kernel(method, dtype, estimator):
    """The observed one from the dense matrix of the kernel ψ(x)·ψ(y); blocks of rows change nothing."""
    x, y = X.to(dtype) + 100, Y.to(dtype) + 100
    options = {"bandwidth": 1.5, "estimator": estimator, "permutations": 20, "method": method}
    found = two_sample_test(x, y, seed=1, **options)
    generator = torch.Generator().manual_seed(1)
    torch.empty(1, dtype=torch.int64).random_(generator=generator)
    z = torch.cat([x, y])
    psi = method._of(z, fastvae.checks.kernel("rbf"), (1.5,), (1.0,), generator).features(z).double()
    k, n, m = psi @ psi.T, len(x), len(y)
    xx, yy = k[:n, :n], k[n:, n:]
    if estimator == "unbiased":
        within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    else:
        within = xx.mean() + yy.mean()
    exact = float(within - 2 * k[:n, n:].mean())
    assert found.statistic == pytest.approx(
        exact, rel=1e-9 if dtype == torch.float64 else 1e-3, abs=1e-6 if dtype != torch.float64 else 1e-12
    )


def test_blocks(monkeypatch):
    from fastvae import features

    options = {"permutations": 20, "seed": 1, "estimator": "unbiased"}
    for method in (RandomFeatures(30), NystromFeatures(12)):
        done = []
        whole = two_sample_test(X, Y, method=method, **options)
        with monkeypatch.context() as patch:
            patch.setattr(features, "_BLOCK", 7 * 60)
            parts = two_sample_test(X, Y, method=method, progress=done.append, **options)
        torch.testing.assert_close(parts.null, whole.null)
        assert done == sorted(done)
        assert done[-1] == 1


def test_weights_are_not_changed():
    """The columns of signs, which the next kernel would take."""
    for dtype in (torch.float32, torch.float64):
        z = X.to(dtype)
        v = torch.randint(-3, 4, (60, 5), device=DEVICE).to(dtype)
        before = v.clone()
        RandomFeatures(8)._of(z, fastvae.checks.kernel("rbf"), (1.0,), (1.0,), None).form(v)
        assert torch.equal(v, before)


@pytest.mark.slow
@pytest.mark.parametrize("method", [RandomFeatures(20), NystromFeatures(8)], ids=str)
def test_level_and_power(method):
    """At 5 % as many rejections of equal distributions as chance allows; of others about as many as by the exact test."""
    options = {"permutations": 39, "level": 0.05}
    rejected = sum(two_sample_test(rows(30, 2 * n), rows(20, 2 * n + 1), method=method, seed=n, **options).reject for n in range(400))
    assert abs(rejected - 20) < 4 * math.sqrt(400 * 0.05 * 0.95)
    pairs = [(rows(50, 2 * n), rows(50, 2 * n + 1, shift=0.45)) for n in range(100)]
    found, exact = (
        sum(two_sample_test(x, y, seed=n, **options, **more).reject for n, (x, y) in enumerate(pairs)) for more in ({"method": method}, {})
    )
    assert exact > 60
    assert found > 0.8 * exact


def test_a_rule_takes_some_rows(monkeypatch):
    from fastvae import two_sample

    monkeypatch.setattr(two_sample, "_ROWS_OF_A_RULE", 20)
    found = two_sample_test(X, Y, method=RandomFeatures(10), permutations=10, seed=0).kernels[0].bandwidth
    exact = fastvae.median_bandwidth(X, Y)
    assert found != exact
    assert found.item() == pytest.approx(exact.item(), rel=0.5)


def test_a_nan_is_no_p_value():
    x = X.clone()
    x[3, 1] = torch.nan
    for method in (RandomFeatures(10), NystromFeatures(100)):
        assert math.isnan(two_sample_test(x, Y, method=method, bandwidth=1.0, permutations=10).p_value)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"kernel": "polynomial"},
            ValueError,
            "'matern52', 'gaussian', or a sum of these, for random features, got 'polynomial': use NystromFeatures or all pairs",
        ),
        (
            {"kernel": "energy"},
            ValueError,
            "'matern52', 'gaussian', or a sum of these, for random features, got 'energy': use NystromFeatures or all pairs",
        ),
        ({"kernel": "energy", "method": NystromFeatures()}, ValueError, "kernel must be positive definite for the Nyström approximation"),
        ({"bandwidth": [1.0], "bandwidth_weights": [-1.0]}, ValueError, "bandwidth_weights must be at least 0 for random features, got -1"),
        (
            {"bandwidth_weights": [-1.0], "method": NystromFeatures()},
            ValueError,
            "bandwidth_weights must be at least 0 for the Nyström approximation, got -1",
        ),
        (
            {"bandwidth_weights": [0.0], "method": NystromFeatures()},
            ValueError,
            "bandwidth_weights must hold a number greater than 0 for the Nyström approximation, got zeros",
        ),
        ({"kernel": -1 * RBF()}, ValueError, "the weight of a kernel must be at least 0 for random features, got -1"),
        ({"kernel": 0 * RBF(), "method": NystromFeatures()}, ValueError, "kernel must be positive definite for the Nyström approximation"),
        ({"aggregate": "fuse"}, ValueError, r"aggregate must be None for method=RandomFeatures\(count=8\), got 'fuse'"),
        ({"backend": "cpu"}, ValueError, r"backend must be None for method=RandomFeatures\(count=8\), got 'cpu'"),
        ({"method": "random_features"}, ValueError, r"RandomFeatures\(count\) or NystromFeatures\(landmarks\), got 'random_features'"),
    ],
)
def test_errors(options, error, sentence):
    with pytest.raises(error, match=sentence):
        two_sample_test(X, Y, **{"method": RandomFeatures(8), **options})


def test_errors_of_numbers():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        RandomFeatures(0)
    with pytest.raises(TypeError, match="landmarks must be an integer, got float"):
        NystromFeatures(1.5)


def feed(metric, real, fake, batch=16):
    for part in real.split(batch):
        metric.update(part, real=True)
    for part in fake.split(batch):
        metric.update(part, real=False)
    return metric


def only_real(metric):
    metric.update(X.cpu(), real=True)
    return metric


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_mmd_metric(estimator):
    options = {"bandwidth": WIDTHS, "bandwidth_weights": WEIGHTS, "estimator": estimator, "kernel": "laplace"}
    metric = feed(MMD(**options), X, Y)
    torch.testing.assert_close(metric.compute(), fastvae.mmd(X, Y, **options))
    torch.testing.assert_close(feed(MMD("median"), X, Y).compute(), fastvae.mmd(X, Y, bandwidth="median"))
    found = feed(MMD(**options, features=RandomFeatures(20_000)).to(DEVICE), X, Y)
    torch.testing.assert_close(found.compute().double(), fastvae.mmd(X, Y, **options), rtol=0.1, atol=1e-3)
    assert not found.real_features
    assert not found.fake_features


def test_cmmd_of_features():
    """The errors of the docstring: √(2/count), for 30 seeds."""
    real, fake = rows(80, 3, features=24), rows(70, 4, 1.0, 0.2, features=24)
    exact = feed(CMMD(), real, fake).compute().double()
    errors = torch.stack([feed(CMMD(features=RandomFeatures(256), seed=n).to(DEVICE), real, fake).compute() / exact - 1 for n in range(30)])
    assert 0.4 < errors.square().mean().sqrt() / math.sqrt(2 / 256) < 1.6
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(30)


def test_a_metric_of_features_resets_copies_and_shares():
    metric = feed(MMD(2.0, features=RandomFeatures(50), reset_real_features=False).to(DEVICE), X, Y)
    value = metric.compute()
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == value
    metric.reset()
    assert metric.counts.tolist()[:2] == [0, 60]
    for part in Y.split(20):
        metric.update(part, real=False)
    torch.testing.assert_close(metric.compute(), value)
    own = {"a": MMD(2.0, features=RandomFeatures(50), seed=1), "b": MMD(1.0, features=RandomFeatures(50), seed=1), "c": MMD(2.0)}
    several = feed(MetricCollection(own).to(DEVICE), X, Y).compute()
    alone = {name: feed(type(m)(m.bandwidth, features=m.features, seed=m.seed).to(DEVICE), X, Y).compute() for name, m in own.items()}
    for name, expected in alone.items():
        torch.testing.assert_close(several[name], expected)


def test_a_metric_of_features_takes_others_after_a_reset():
    metric = feed(MMD(2.0, features=RandomFeatures(50), seed=1), X.cpu(), Y.cpu())
    value = metric.compute()
    metric.reset()
    feed(metric, X.cpu()[:, :2], Y.cpu()[:, :2])
    torch.testing.assert_close(
        metric.compute(), feed(MMD(2.0, features=RandomFeatures(50), seed=1), X.cpu()[:, :2], Y.cpu()[:, :2]).compute()
    )
    metric.reset()
    assert feed(metric, X.cpu(), Y.cpu()).compute() == value


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_metric_of_a_sum(estimator):
    options = {"bandwidth": WIDTHS, "bandwidth_weights": WEIGHTS, "estimator": estimator, "kernel": 2 * RBF() + 0.5 * Laplace().scaled(2)}
    found = feed(MMD(**options, features=RandomFeatures(20_000)).to(DEVICE), X, Y)
    torch.testing.assert_close(found.compute().double(), fastvae.mmd(X, Y, **options), rtol=0.1, atol=1e-3)


def test_errors_of_metrics():
    for make, error, sentence in (
        (
            lambda: MMD("median", features=RandomFeatures(5)),
            ValueError,
            "bandwidth must be a number or several with features, got 'median'",
        ),
        (lambda: only_real(MMD(features=RandomFeatures(5))).compute(), ValueError, "embeddings that are not real must be given"),
        (lambda: MMD(features=5), TypeError, "features must be a RandomFeatures, got int"),
        (lambda: MMD(estimator="linear"), ValueError, "estimator must be one of 'biased', 'unbiased', got 'linear'"),
        (lambda: feed(MMD(estimator="unbiased", features=RandomFeatures(5)), X[:1].cpu(), Y.cpu()).compute(), ValueError, "at least two"),
        (lambda: feed(MMD(features=RandomFeatures(5)), X.cpu(), Y[:, :2].cpu()), ValueError, "must have the same number of features"),
        (
            lambda: MMD(features=RandomFeatures(5), kernel=Polynomial(2)),
            ValueError,
            "for random features, got 'polynomial': leave features out",
        ),
        (lambda: MMD(features=RandomFeatures(5), kernel=RBF() + Energy()), ValueError, "for random features, got 'sum:rbf"),
        (lambda: MMD(bandwidth_weights=[-1.0], features=RandomFeatures(5)), ValueError, "must be at least 0 for random features, got -1"),
    ):
        with pytest.raises(error, match=sentence):
            make()


def on_ranks(rank, world):
    alone = feed(MMD(2.0, features=RandomFeatures(40)), X.cpu(), Y.cpu())
    shared = feed(MMD(2.0, features=RandomFeatures(40)), X.cpu()[rank::world], Y.cpu()[rank::world])
    torch.testing.assert_close(shared.compute(), alone.compute())


@pytest.mark.slow
def test_a_metric_of_features_on_several_processes(tmp_path):
    run_on_ranks([on_ranks], 2, tmp_path)


def test_blocks_of_a_sample():
    """The block estimator, for samples of different sizes: a batch of unbiased MMD², as the documentation has it."""
    blocks = 5
    value = fastvae.mmd(X.view(blocks, -1, 3), Y.view(blocks, -1, 3), estimator="unbiased").mean()
    each = [fastvae.mmd(x, y, estimator="unbiased") for x, y in zip(X.chunk(blocks), Y.chunk(blocks), strict=True)]
    torch.testing.assert_close(value, torch.stack(each).mean())
