"""The two-sample test against a permutation test in numpy, and its level and power by simulation."""

import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import KernelTest, TwoSampleTest, reference, two_sample
from fastvae.radial import KERNELS, Laplace, Polynomial, RationalQuadratic
from tests.cases import DEVICE, Copies, needs_triton

pytestmark = pytest.mark.usefixtures("interpreter_warnings")

BACKENDS = [None, "reference"]
TRITON = [needs_triton, pytest.mark.interpreter]
FAMILIES = [*KERNELS, RationalQuadratic(0.5), Polynomial(2, 0.5)]


def samples(n, m, d=3, shift=0.5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, dtype=torch.float64, generator=generator), torch.randn(m, d, dtype=torch.float64, generator=generator)
    return x.to(DEVICE, dtype), (y + shift).to(DEVICE, dtype)


def gram(z, bandwidth, kernel):
    """The kernel matrix of the dense reference, which has tests of its own."""
    eye = torch.eye(len(z), dtype=torch.float64, device=DEVICE)
    return reference.kernel_matmul(z.double(), z.double(), eye, bandwidth=bandwidth, kernel=kernel).cpu().numpy()


def mmd_of_split(k, in_x, estimator):
    xx, yy, xy = k[np.ix_(in_x, in_x)], k[np.ix_(~in_x, ~in_x)], k[np.ix_(in_x, ~in_x)]
    if estimator == "biased":
        return xx.mean() + yy.mean() - 2 * xy.mean()
    n, m = len(xx), len(yy)
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()


def splits(n, m, permutations, seed):
    """The permutations that the seed stands for, the observed split first."""
    data = two_sample._Samples(torch.empty(n + m, 1), n, "unbiased", False, "", "")
    return list((data.columns(permutations, torch.Generator().manual_seed(seed))[:, :-1] > 0).T.numpy())


def p_value(values):
    return (1 + np.sum(values[1:] >= values[0] - 1e-9 * np.ptp(values))) / len(values)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize(("n", "m"), [(17, 17), (23, 12), (2, 2), (2, 5)])
@pytest.mark.parametrize(
    ("kernel", "backend"),
    [*itertools.product(FAMILIES, BACKENDS), *(pytest.param(kernel, "triton", marks=TRITON) for kernel in ("rbf", "polynomial"))],
    ids=str,
)
def test_permutations_of_every_kernel(kernel, backend, n, m, estimator):
    x, y = samples(n, m)
    bandwidth = (0.9, 2.1)
    result = fastvae.two_sample_test(
        x, y, kernel=kernel, bandwidth=bandwidth, estimator=estimator, permutations=60, seed=4, backend=backend
    )
    k = gram(torch.cat([x, y]), bandwidth, kernel)
    expected = np.array([mmd_of_split(k, in_x, estimator) for in_x in splits(n, m, 60, 4)])
    np.testing.assert_allclose(result.statistic, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.null.cpu().numpy(), expected[1:], rtol=1e-9, atol=1e-12)
    assert result.p_value == p_value(expected)
    assert result.reject == (result.p_value <= 0.05)
    expected_mmd = fastvae.mmd(x, y, kernel=kernel, bandwidth=bandwidth, estimator=estimator).item()
    assert result.statistic == pytest.approx(expected_mmd, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_wild_bootstrap_of_every_kernel(kernel, estimator):
    n = 14
    x, y = samples(n, n)
    result = fastvae.two_sample_test(
        x, y, kernel=kernel, bandwidth=1.3, estimator=estimator, permutations=40, seed=4, method="wild_bootstrap"
    )
    k = gram(torch.cat([x, y]), 1.3, kernel)
    h = k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]
    data = two_sample._Samples(torch.empty(2 * n, 1, dtype=torch.float64), n, estimator, True, "", "")
    signs = data.columns(40, torch.Generator().manual_seed(4)).T.numpy()
    assert (signs[0] == 1).all()
    if estimator == "biased":
        expected = np.array([s @ h @ s / n**2 for s in signs])
    else:
        expected = np.array([(s @ h @ s - np.trace(h)) / (n * (n - 1)) for s in signs])
    np.testing.assert_allclose([result.statistic, *result.null.cpu()], expected, rtol=1e-9, atol=1e-12)
    assert result.p_value == p_value(expected)


@pytest.mark.parametrize("bandwidth", [0.3, 2.0, 100.0])
@pytest.mark.parametrize(("n", "m"), [(600, 600), (700, 500)])
def test_float32_orders_permutations_as_float64_does(n, m, bandwidth):
    x, y = samples(n, m, shift=0.05, dtype=torch.float32)
    options = {"bandwidth": bandwidth, "permutations": 100, "seed": 1}
    actual, exact = fastvae.two_sample_test(x, y, **options), fastvae.two_sample_test(x.double(), y.double(), **options)
    assert (actual.null - exact.null).abs().max() < 1e-4 * exact.null.std()
    assert actual.p_value == exact.p_value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (2, 4)])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_equal_splits_tie(n, m, estimator, bandwidth, dtype):
    """Most extreme of all splits of a tiny sample, the observed one is drawn again with the probability of any other."""
    x, y = samples(n, m, shift=8.0, dtype=dtype)
    result = fastvae.two_sample_test(x, y, bandwidth=bandwidth, estimator=estimator, permutations=300, seed=3)
    rows = splits(n, m, 300, 3)
    same = sum((in_x == rows[0]).all() or (n == m and (in_x != rows[0]).all()) for in_x in rows[1:])
    assert same > 10
    assert result.p_value >= (1 + same) / 301
    if bandwidth != 0.1:
        k = gram(torch.cat([x, y]), bandwidth, "rbf")
        assert result.p_value == p_value(np.array([mmd_of_split(k, in_x, estimator) for in_x in rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aggregate", [None, "agg"])
def test_splits_of_duplicates_tie(aggregate, dtype):
    x = samples(1, 1, dtype=dtype)[0].expand(9, 3)
    result = fastvae.two_sample_test(x, x[:7], bandwidth=0.7, permutations=40, aggregate=aggregate, seed=0)
    assert result.p_value == 1
    assert not result.reject
    # Rows twice over: exchanging one copy for the other changes nothing.
    x, y = samples(4, 4, shift=5.0, dtype=dtype)
    x, y = x.repeat(2, 1), y.repeat(2, 1)
    result = fastvae.two_sample_test(x, y, permutations=2000, aggregate=aggregate, seed=0)
    rows = splits(8, 8, len(result.null), 0)
    same = sum(
        sorted((np.arange(16) % 4 + 4 * (np.arange(16) >= 8))[in_x]) in ([0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7])
        for in_x in rows
    )
    assert result.p_value >= same / (1 + len(result.null))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (50, 70)])
@pytest.mark.parametrize("kernel", ["rbf", "laplace"])
def test_splits_that_only_rounding_tells_apart_tie(kernel, n, m, dtype):
    """Of two points the statistic knows only how often each is in x; a sum in another order is another number."""
    points = torch.tensor([[0.1, 0.7, 0.3], [0.9, 0.2, 0.6]], dtype=dtype, device=DEVICE)
    index = torch.arange(n + m, device=DEVICE) % 7 < 3
    index[: n // 4] = True
    z = points[index.long()]
    result = fastvae.two_sample_test(z[:n], z[n:], kernel=kernel, bandwidth=0.7, permutations=300, seed=2)
    k = gram(z, 0.7, kernel)
    values = np.array([mmd_of_split(k, in_x, "unbiased") for in_x in splits(n, m, 300, 2)])
    assert result.p_value == p_value(values)
    assert len(np.unique(values.round(9))) < 30


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads one by one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sweeps(monkeypatch):
    """The operations, whose CPU implementations read numbers, give others."""
    monkeypatch.setattr(two_sample._Samples, "form", lambda self, v, *_: v.double().square().sum(0))
    monkeypatch.setattr(two_sample._Samples, "row_sums", lambda self, *_: self.z.double().square().sum(1))


@pytest.mark.usefixtures("no_sweeps")
@pytest.mark.parametrize("options", [{"bandwidth": 1.0}, {"bandwidth": (0.5, 1.0, 2.0), "aggregate": "fuse"}])
def test_what_is_read_of_a_gpu_is_read_at_once(options):
    with Reads() as reads:
        fastvae.two_sample_test(*samples(9, 9), permutations=5, **options)
    assert reads.count == 0


@pytest.mark.usefixtures("no_sweeps")
@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_statistics_copy_no_numbers_to_a_device(kernel, estimator):
    z, v = torch.empty(9, 2, device="meta"), torch.empty(9, 4, device="meta")
    data = two_sample._Samples(z, 4, estimator, False, "", "")
    h = torch.ones(2, dtype=torch.float64, device="cpu")
    with Copies() as copies:
        values, ties = data.statistics(v, KERNELS[kernel], h, h, None)
        two_sample._p_values(values[None], ties[None])
    assert not copies.found


def test_median_is_the_default():
    x, y = samples(20, 15)
    h = fastvae.median_bandwidth(x, y)
    results = [fastvae.two_sample_test(x, y, seed=0, bandwidth=b, permutations=20) for b in (None, "median", h)]
    assert results[0].p_value == results[1].p_value == results[2].p_value
    torch.testing.assert_close(results[0].null, results[2].null)
    assert results[0].kernels[0].bandwidth.item() == h.item()
    mean = fastvae.two_sample_test(x, y, bandwidth="mean", permutations=5)
    assert mean.kernels[0].bandwidth.item() == fastvae.mean_bandwidth(x, y).item()


def test_seed():
    x, y = samples(20, 15)
    tests = [fastvae.two_sample_test(x, y, seed=seed, permutations=30).null for seed in (7, torch.Generator().manual_seed(7), 8)]
    assert torch.equal(tests[0], tests[1])
    assert not torch.equal(tests[0], tests[2])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fastvae.two_sample_test(x, y, seed=7, permutations=30)
    assert torch.equal(state, torch.get_rng_state())
    one = fastvae.two_sample_test(x, y, permutations=30).null
    torch.manual_seed(5)
    assert torch.equal(one, fastvae.two_sample_test(x, y, permutations=30).null)


def columns(n, m, count, swaps=False):
    data = two_sample._Samples(torch.empty(n + m, 1, device=DEVICE), n, "unbiased", swaps, "", "")
    return data.columns(count, torch.Generator().manual_seed(0)).cpu()


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 1), (1, 3)])
def test_every_split_is_as_likely(n, m):
    drawn = columns(n, m, 6000)[:, 1:-1]
    _, counts = (drawn > 0).unique(dim=1, return_counts=True)
    assert len(counts) == math.comb(n + m, n)
    # Five standard deviations.
    torch.testing.assert_close(counts.double(), torch.full((len(counts),), 6000 / len(counts)).double(), rtol=0, atol=5 * 6000**0.5 / 2)


def test_every_swap_is_as_likely():
    drawn = columns(3, 3, 6000, swaps=True)[:, 1:]
    _, counts = drawn.unique(dim=1, return_counts=True)
    assert len(counts) == 8
    torch.testing.assert_close(counts.double(), torch.full((8,), 750.0).double(), rtol=0, atol=5 * 750**0.5)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (700, 500)])
def test_splits_have_the_sizes_of_the_samples(n, m):
    drawn = columns(n, m, 201)
    assert drawn.shape == (n + m, 203)
    assert ((drawn[:, :-1] > 0).sum(0) == n).all()
    assert len(drawn[:, :-1].unique(dim=1).T) == 202
    assert (drawn[:, -1] == 1).all()
    assert (drawn[:n, 0] > 0).all()
    assert (drawn[:, :-1].sum(0) == 0).all()


def rejections(seeds, shift, n=20, m=20, d=2, **options):
    """Shares of rejections and of p-values of at most 0.05; seeds of their own for the data and for the permutations."""
    data = [samples(n, m, d, shift, 200 + seed, torch.float32) for seed in range(seeds)]
    tests = [fastvae.two_sample_test(x, y, seed=10_000 + seed, **options) for seed, (x, y) in enumerate(data)]
    return np.mean([test.reject for test in tests]), np.mean([test.p_value <= 0.05 for test in tests])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"permutations": 199},
        {"permutations": 199, "m": 13},
        {"permutations": 199, "method": "wild_bootstrap"},
        {"permutations": 99, "kernel": "laplace", "estimator": "biased"},
        {"permutations": 199, "aggregate": "fuse", "kernel": ("laplace", "rbf"), "bandwidth": (0.5, 1.0, 2.0)},
        {"permutations": 199, "aggregate": "agg", "kernel": ("laplace", "rbf"), "bandwidth": (0.5, 1.0, 2.0)},
    ],
    ids=str,
)
def test_level(options):
    for rate in rejections(200, 0.0, **options):
        assert 0.03 <= rate <= 0.07


def linear_time_test(x, y, h):
    """Of neighbours, with the normal threshold: Gretton et al. 2012, lemma 14 and section 6."""
    x, y = x.double().cpu().numpy(), y.double().cpu().numpy()

    def k(a, b):
        return np.exp(-np.square(a - b).sum(1) / (2 * h**2))

    x1, x2, y1, y2 = x[0::2], x[1::2], y[0::2], y[1::2]
    values = k(x1, x2) + k(y1, y2) - k(x1, y2) - k(x2, y1)
    np.testing.assert_allclose(values.mean(), fastvae.mmd(*map(torch.tensor, (x, y)), bandwidth=h, estimator="linear"))
    return values.mean() / (values.std(ddof=1) / math.sqrt(len(values))) > 1.6449


@pytest.mark.slow
def test_power_is_above_that_of_the_linear_time_test():
    seeds, n, shift = 100, 40, 0.5
    linear = []
    for seed in range(seeds):
        x, y = samples(n, n, 2, shift, 200 + seed, torch.float32)
        linear.append(linear_time_test(x, y, fastvae.median_bandwidth(x, y).item()))
    power = rejections(seeds, shift, n, n, permutations=99)[0]
    assert 0.1 < np.mean(linear) < 0.5
    assert power > np.mean(linear) + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["fuse", "agg"])
def test_a_set_of_kernels_finds_what_the_median_misses(aggregate):
    """A difference in scale of a small part of a bimodal sample, far below the median distance."""

    def rejected(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        centres = 20.0 * torch.randint(2, (2, 40, 1), generator=generator)
        x, y = centres + torch.randn(2, 40, 1, generator=generator) * torch.tensor([1.0, 0.2])[:, None, None]
        return fastvae.two_sample_test(x, y, permutations=99, seed=seed, **options).reject

    single = np.mean([rejected(seed) for seed in range(40)])
    aggregated = np.mean([rejected(seed, aggregate=aggregate, bandwidth=(0.3, 1.0, 10.0)) for seed in range(40)])
    assert aggregated > single + 0.3


def fuse_in_numpy(x, y, rows, kernels, bandwidths):
    """MMD-FUSE with λ = √(n(n−1)), n ≤ m: Biggs, Schrab and Gretton 2023, definition 1 and section 5."""
    z, n = torch.cat([x, y]), min(len(x), len(y))
    statistics = []
    for kernel in kernels:
        for h in bandwidths:
            k = gram(z, h, kernel)
            normaliser = (np.square(k).sum() - np.square(np.diag(k)).sum()) / (n * (n - 1))
            statistics.append([mmd_of_split(k, in_x, "unbiased") / np.sqrt(normaliser) for in_x in rows])
    lambda_ = np.sqrt(n * (n - 1))
    return np.log(np.mean(np.exp(lambda_ * np.array(statistics)), 0)) / lambda_


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize(("n", "m"), [(15, 15), (12, 19)])
def test_fuse(n, m, backend):
    x, y = samples(n, m)
    kernels, bandwidths = ("rbf", "laplace", "imq", RationalQuadratic(0.5)), (0.5, 1.0, 2.0)
    result = fastvae.two_sample_test(x, y, kernel=kernels, bandwidth=bandwidths, aggregate="fuse", permutations=50, seed=2, backend=backend)
    expected = fuse_in_numpy(x, y, splits(n, m, 50, 2), kernels, bandwidths)
    np.testing.assert_allclose([result.statistic, *result.null.cpu()], expected, rtol=1e-9)
    assert result.p_value == p_value(expected)
    assert [(k.kernel, k.bandwidth.item()) for k in result.kernels[:4]] == [
        (KERNELS["rbf"], 0.5),
        (KERNELS["rbf"], 1.0),
        (KERNELS["rbf"], 2.0),
        (Laplace(), 0.5),
    ]


def test_fuse_collection():
    x, y = samples(30, 25)
    distances = np.sort(torch.pdist(torch.cat([x, y])).cpu().numpy())
    result = fastvae.two_sample_test(x, y, aggregate="fuse", permutations=5)
    pairs = len(distances)
    expected = np.linspace(distances[int(0.05 * pairs)] / 2, distances[int(0.95 * pairs)] * 2, 10)
    np.testing.assert_allclose([k.bandwidth.item() for k in result.kernels], expected, rtol=1e-9)


def agg_in_numpy(values, count, level):
    """Whether MMDAgg rejects, for values (K, 1 + 2B) and weights 1/K: Schrab et al. 2023, equations 19 to 21, each u tried in turn."""
    first, second, weight = np.sort(values[:, : count + 1], 1), values[:, count + 1 :], 1 / len(values)

    def quantile(u):
        return first[:, max(math.ceil((count + 1) * (1 - u * weight)) - 1, 0), None]

    grid = np.linspace(0, 1 / weight, 2001)[:-1]
    u = max((u for u in grid if np.mean((second > quantile(u)).any(0)) <= level), default=0)
    return (values[:, :1] > quantile(u)).any()


@pytest.mark.parametrize("method", ["permutation", "wild_bootstrap"])
def test_agg(method):
    verdicts = []
    for seed in range(6):
        x, y = samples(15, 15, shift=0.6, seed=seed)
        options = {"permutations": 60, "seed": seed, "method": method, "level": 0.1}
        bandwidths = [2.0**power * fastvae.median_bandwidth(x, y).item() for power in range(-3, 4)]
        result = fastvae.two_sample_test(x, y, kernel=("rbf", "laplace"), aggregate="agg", **options)
        singles = [
            fastvae.two_sample_test(x, y, kernel=kernel, bandwidth=h, **options | {"permutations": 120})
            for kernel in ("rbf", "laplace")
            for h in bandwidths
        ]
        assert [k.p_value for k in result.kernels] == [single.p_value for single in singles]
        assert [k.statistic for k in result.kernels] == pytest.approx([single.statistic for single in singles])
        values = np.array([[single.statistic, *single.null] for single in singles])
        assert result.reject == agg_in_numpy(values, 60, 0.1)
        least = np.array([(row[:, None] <= row + 1e-9 * np.ptp(row)).mean(1) for row in values]).min(0)
        assert result.statistic == pytest.approx(least[0])
        assert result.p_value == (1 + np.sum(least[1:] <= least[0] + 1e-12)) / 121
        verdicts.append(result.reject)
    assert 0 < sum(verdicts) < 6


def test_progress_of_a_function():
    done = []
    x, y = samples(1100, 1000, dtype=torch.float32)
    fastvae.two_sample_test(x, y, permutations=3, progress=done.append, kernel=("rbf", "imq"), bandwidth=(1.0, 2.0), aggregate="agg")
    assert done == sorted(done)
    assert done[-1] == 1
    assert len(done) > 4


def test_progress_in_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fastvae.two_sample_test(*samples(9, 9), permutations=3, progress=True)
    captured = capsys.readouterr()
    assert captured.err.endswith("\rtwo_sample_test 100%\n")
    assert captured.out == ""


def test_progress_in_a_bar(monkeypatch):
    bars = []

    class Bar:
        n = 0.0

        def __init__(self, **options):
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, by):
            self.n += by

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=Bar))
    fastvae.two_sample_test(*samples(9, 9), permutations=3, progress=True)
    assert bars[0].n == pytest.approx(1)
    fastvae.two_sample_test(*samples(9, 9), permutations=3)
    assert len(bars) == 1


@pytest.mark.parametrize("aggregate", [None, "fuse", "agg"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(aggregate, bad):
    x, y = samples(9, 9)
    x[2, 1] = bad
    result = fastvae.two_sample_test(x, y, bandwidth=1.0, permutations=9, aggregate=aggregate)
    assert math.isnan(result.p_value)
    assert not result.reject
    assert math.isnan(fastvae.two_sample_test(x, y, permutations=9).p_value)


def test_half_precision_and_gradients_that_are_not_taken():
    x, y = samples(20, 20, dtype=torch.bfloat16)
    result = fastvae.two_sample_test(x.requires_grad_(), y, bandwidth=1.0, permutations=20, seed=0)
    exact = fastvae.two_sample_test(x.double(), y.double(), bandwidth=1.0, permutations=20, seed=0)
    assert result.null.dtype == torch.float64
    assert not result.null.requires_grad
    assert result.p_value == exact.p_value
    assert result.statistic == pytest.approx(exact.statistic, rel=1e-4)


X, Y = torch.zeros(4, 3), torch.ones(5, 3)


@pytest.mark.parametrize(
    ("points", "options", "error", "sentence"),
    [
        ((X[0], Y), {}, ValueError, "x must have shape (rows, features), got (3,)"),
        ((X[:1], Y), {}, ValueError, "x must have at least two rows for estimator='unbiased', got 1: use estimator='biased'"),
        ((X, Y[:1]), {"aggregate": "fuse"}, ValueError, "y must have at least two rows, got 1"),
        ((X, Y), {"estimator": "linear"}, ValueError, "estimator must be one of 'biased', 'unbiased', got 'linear'"),
        (
            (X, Y),
            {"method": "rff"},
            ValueError,
            "method must be 'permutation', 'wild_bootstrap', RandomFeatures(count) or NystromFeatures(landmarks), got 'rff'",
        ),
        (
            (X, Y),
            {"method": fastvae.RandomFeatures},
            ValueError,
            "method must be 'permutation', 'wild_bootstrap', RandomFeatures(count) or NystromFeatures(landmarks), got RandomFeatures",
        ),
        (
            (X, Y),
            {"method": "wild_bootstrap"},
            ValueError,
            "x and y must have the same number of rows for method='wild_bootstrap', got 4 and 5",
        ),
        ((X, Y), {"aggregate": "mean"}, ValueError, "aggregate must be one of None, 'fuse', 'agg', got 'mean'"),
        ((X, Y), {"permutations": 0}, ValueError, "permutations must be at least 1, got 0"),
        ((X, Y), {"permutations": 9.5}, TypeError, "permutations must be an integer, got float"),
        ((X, Y), {"level": 0}, ValueError, "level must be greater than 0, got 0"),
        ((X, Y), {"level": 1}, ValueError, "level must be less than 1, got 1"),
        ((X, Y), {"seed": 0.5}, TypeError, "seed must be an integer, got float"),
        ((X, Y), {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ((X, Y), {"progress": 1}, TypeError, "progress must be True, False or a function that takes the fraction done, got int"),
        (
            (X, Y),
            {"kernel": ["rbf"]},
            ValueError,
            "kernel must be a single kernel with aggregate=None, got 1: pass aggregate='fuse' or 'agg'",
        ),
        ((X, Y), {"kernel": [], "aggregate": "agg"}, ValueError, "kernel must hold at least one kernel, got none"),
        ((X, Y), {"kernel": 3}, TypeError, "kernel must be a name or a fastvae.radial.Kernel, got int"),
        (
            (X, Y),
            {"kernel": "energy", "aggregate": "fuse"},
            ValueError,
            "kernel with aggregate='fuse' must be one of 'rbf', 'imq', 'rational_quadratic', 'laplace', got 'energy'",
        ),
        (
            (X, Y),
            {"estimator": "biased", "aggregate": "agg"},
            ValueError,
            "estimator must be 'unbiased' with aggregate='agg', got 'biased'",
        ),
        (
            (X, Y),
            {"bandwidth_weights": [1.0], "aggregate": "agg"},
            ValueError,
            "bandwidth_weights must be None with aggregate='agg', where each bandwidth is a separate kernel, got [1.0]",
        ),
        ((X, Y), {"bandwidth": "scott"}, ValueError, "bandwidth must be a number, several, or one of 'median', 'mean', got 'scott'"),
        ((X, Y), {"bandwidth": "scott", "aggregate": "agg"}, ValueError, "bandwidth must be a number, several, or one of 'median'"),
        ((X, X), {}, ValueError, "the median distance between rows must be greater than 0 to be a bandwidth, got 0"),
        ((X, Y), {"aggregate": "fuse"}, ValueError, "the 5 % quantile of the distances between rows must be greater than 0"),
        ((X, Y), {"precision": "low"}, ValueError, "precision must be one of None, 'highest', 'high', 'medium', 'ieee', got 'low'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors(points, options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.two_sample_test(*points, **options)
    assert str(caught.value).startswith(sentence)


def test_the_committed_row():
    from benchmarks import large_two_sample_test as benchmark

    row = json.loads(benchmark.RESULTS.read_text().splitlines()[-1])
    assert row["extra_mib"] < 2048
    assert row["error_in_null_deviations"] < 1e-3


def test_the_benchmark_checks_against_numpy():
    from benchmarks.large_two_sample_test import exact_statistics

    x, y = samples(12, 12)
    z, rows = torch.cat([x, y]).cpu(), splits(12, 12, 3, 0)
    expected = [mmd_of_split(gram(z.to(DEVICE), 1.5, "rbf"), in_x, "unbiased") for in_x in rows]
    np.testing.assert_allclose(exact_statistics(z, 1.5, torch.tensor(np.array(rows)).T), expected)


def test_squares_of_kernels():
    d = torch.linspace(0.1, 5, 30, dtype=torch.float64)
    for kernel in ("rbf", "imq", "rational_quadratic", "laplace", RationalQuadratic(0.3)):
        kernel = KERNELS.get(kernel, kernel)
        h = torch.tensor(1.7, dtype=torch.float64)
        square, factor = two_sample.squared(kernel)
        torch.testing.assert_close(square.phi(square.gamma(factor * h, 1) * d**2), kernel.phi(kernel.gamma(h, 1) * d**2) ** 2)


def test_results_print_on_one_line():
    test = KernelTest(Laplace(), torch.tensor([0.5, 12345.678]), 0.0123456, 0.25)
    assert repr(test) == "KernelTest(Laplace(), bandwidth=[0.5, 1.235e+04], statistic=0.01235, p_value=0.25)"
    one = TwoSampleTest(0.0123456, 1 / 3, False, torch.zeros(500), (test,))
    assert repr(one) == "TwoSampleTest(statistic=0.01235, p_value=0.3333, reject=False, null=500 permutations, Laplace())"
    several = one._replace(kernels=(test, test), null=torch.zeros(1000))
    assert repr(several) == "TwoSampleTest(statistic=0.01235, p_value=0.3333, reject=False, null=1000 permutations, 2 kernels)"
