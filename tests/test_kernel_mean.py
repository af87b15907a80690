"""`KernelMean`: the fit against dense float64 formulas, MMD² to it on every backend, streams of batches and files."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import KernelMean
from fastvae.kernel_mean import _DrawnRows
from fastvae.radial import Polynomial, RationalQuadratic
from fastvae.reference.kernel_mean import nystrom
from fastvae.reference.mmd import kernel_matrix
from tests.cases import DEVICE, evaluate, needs_triton

RIDGE = 1e-6


def rows(n, shift=0.0, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, features, generator=generator, dtype=torch.float64) + shift).to(DEVICE)


POOL, X, LANDMARKS = rows(150), rows(30, 0.3, seed=1), rows(12, seed=2)

KERNELS = {
    "rbf": {"bandwidth": 1.5},
    "wide": {"bandwidth": 300.0},
    "narrow": {"bandwidth": 0.3},
    "two": {"bandwidth": [0.8, 2.0], "bandwidth_weights": [0.5, 2.0]},
    "imq": {"kernel": "imq", "bandwidth": 2.0},
    "laplace": {"kernel": "laplace", "bandwidth": 2.0},
    "polynomial": {"kernel": Polynomial(2, 0.5), "bandwidth": 1.0},
}
each_kernel = pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)


def value_and_gradient(function, x, *args, **options):
    x = x.detach().requires_grad_()
    value = function(x, *args, **options)
    return value.detach(), *torch.autograd.grad(value, x)


def dense(x, mean, estimator="biased", x_weights=None):
    """In float64, the kernel and weights of `mean` on its own points."""
    x = x.double()
    h, a = (torch.tensor(numbers, dtype=torch.float64, device=x.device) for numbers in (mean.bandwidth, mean.bandwidth_weights))
    z = mean.points.double()
    p = torch.full_like(x[:, 0], 1 / len(x)) if x_weights is None else x_weights.double()
    alpha = torch.full_like(z[:, 0], 1 / len(z)) if mean.weights is None else mean.weights
    own = p[:, None] * kernel_matrix(x, x, h, a, mean.kernel) * p
    within = own.sum() if estimator == "biased" else (own.sum() - own.trace()) / (1 - p.square().sum())
    return within - 2 * p @ kernel_matrix(x, z, h, a, mean.kernel) @ alpha + mean.norm


@pytest.mark.parametrize("options", [*KERNELS.values(), {"kernel": "energy", "bandwidth": 1.0}], ids=[*KERNELS, "energy"])
def test_all_rows_are_the_sample_itself(options):
    mean = KernelMean.fit(POOL, method="all", **options)
    expected = value_and_gradient(fastvae.mmd, X, POOL, **options)
    for actual, exact in zip(value_and_gradient(fastvae.mmd, X, mean), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12 * float(mean.norm.abs().clamp(min=1)))
    assert mean.error == 0


@each_kernel
def test_fit_is_the_dense_formula(options):
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, **options)
    # The mean of the diagonal of K is 1 for a radial kernel of weight 1.
    h, a = (torch.tensor(numbers, dtype=torch.float64, device=DEVICE) for numbers in (mean.bandwidth, mean.bandwidth_weights))
    ridge = RIDGE * float(kernel_matrix(LANDMARKS, LANDMARKS, h, a, mean.kernel).diagonal().mean())
    exact = nystrom(LANDMARKS, POOL, ridge, **options)
    torch.testing.assert_close(mean.norm, exact.norm, rtol=1e-12, atol=1e-12)
    # Weights of a wide kernel are ill-conditioned, the embedding is not.
    torch.testing.assert_close(mean.weights, exact.weights, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean.error, exact.error, rtol=1e-6, atol=1e-13)
    points = rows(7, seed=3)
    torch.testing.assert_close(mean(points), kernel_matrix(points, LANDMARKS, h, a, mean.kernel) @ exact.weights, rtol=1e-9, atol=1e-11)


def is_dense(mean, x, backend, value_tolerance, gradient_tolerance, **options):
    expected = value_and_gradient(dense, x.double(), mean, **options)
    actual = value_and_gradient(fastvae.mmd, x, mean, backend=backend, **options)
    alone = fastvae.mmd(x.detach(), mean, backend=backend, **options)
    scale = float(mean.norm.abs().clamp(max=1))
    for value in (actual[0], alone):
        torch.testing.assert_close(value.double(), expected[0], rtol=value_tolerance, atol=0.1 * value_tolerance * scale)
    size = float(expected[1].abs().max())
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=gradient_tolerance, atol=gradient_tolerance * size)
    assert actual[1].dtype == x.dtype


@each_kernel
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mmd_is_the_dense_formula(options, estimator, weighted):
    p = (torch.arange(30, device=DEVICE) % 4 + 1.0).double()
    more = {"estimator": estimator, "x_weights": p / p.sum() if weighted else None}
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, **options)
    is_dense(mean, X, None, 1e-9, 1e-11, **more)
    is_dense(mean, X, "reference", 1e-9, 1e-11, **more)


@each_kernel
def test_float32_keeps_its_digits(options):
    """For a wide kernel k is near one, and MMD² is 1e-5: float32 sums of k would leave two digits."""
    mean = KernelMean.fit(POOL.float(), landmarks=LANDMARKS.float(), **options)
    assert mean.points.dtype == torch.float32
    is_dense(mean, X.float(), None, 1e-5, 1e-5)
    is_dense(mean, X.bfloat16(), None, 1e-5, 2**-7)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_far_from_the_origin_with_duplicates_and_few_rows(shift):
    pool = (POOL + shift)[torch.arange(150, device=DEVICE) % 40]
    for landmarks, x in ((pool[:9].clone(), X + shift), (pool[:1], X[:1] + shift), (pool[:50], pool[:2])):
        mean = KernelMean.fit(pool, landmarks=landmarks, bandwidth=1.5)
        is_dense(mean, x, None, 1e-7, 1e-6)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize(
    ("name", "estimator", "weighted"),
    [
        ("rbf", "biased", False),
        ("wide", "unbiased", True),
        ("two", "biased", True),
        ("laplace", "unbiased", False),
        ("polynomial", "biased", True),
    ],
)
def test_triton(name, estimator, weighted):
    p = torch.rand(30, dtype=torch.float64, device=DEVICE)
    more = {"estimator": estimator, "x_weights": p / p.sum() if weighted else None}
    is_dense(KernelMean.fit(POOL, landmarks=LANDMARKS, **KERNELS[name]), X, "triton", 1e-9, 1e-10, **more)
    is_dense(KernelMean.fit(POOL, method="all", **KERNELS[name]), X, "triton", 1e-9, 1e-10, **more)


def test_gradcheck():
    x = X[:5].clone().requires_grad_()
    for landmarks in (LANDMARKS, LANDMARKS[:1]):
        mean = KernelMean.fit(POOL, landmarks=landmarks, bandwidth=[1.0, 2.0])
        for estimator in ("biased", "unbiased"):
            assert torch.autograd.gradcheck(lambda x, m=mean, e=estimator: fastvae.mmd(x, m, estimator=e), x)
            assert torch.autograd.gradgradcheck(lambda x, m=mean, e=estimator: fastvae.mmd(x, m, estimator=e), x)


@pytest.mark.slow
def test_opcheck():
    norm = torch.ones((), dtype=torch.float64)
    arguments = (X.cpu()[:5].clone().requires_grad_(), LANDMARKS.cpu(), None, torch.full((12,), 1 / 12, dtype=torch.float64))
    arguments += (*[None] * 4, 0, 0, norm, None, None, [1.0, 2.0], [0.5, 1.0], "rbf", [], False, "", "", "", True, False, False)
    torch.library.opcheck(torch.ops.fastvae.mmd.default, arguments)


def test_transforms():
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5)
    batch = torch.stack([X, 2 * X, X - 1])
    torch.testing.assert_close(torch.vmap(lambda x: fastvae.mmd(x, mean))(batch), torch.stack([dense(x, mean) for x in batch]))
    gradients = torch.stack([value_and_gradient(dense, x, mean)[1] for x in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda x: fastvae.mmd(x, mean)))(batch), gradients)


@pytest.mark.slow
def test_compile():
    mean = KernelMean.fit(POOL.float(), landmarks=LANDMARKS.float(), bandwidth=[1.0, 2.0])
    x = X.float()
    for loss in (lambda x: fastvae.mmd(x, mean, estimator="unbiased"), lambda x: fastvae.recipes.irdm([x, 2 * x], [mean, mean])):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, e in zip(value_and_gradient(compiled, x), value_and_gradient(loss, x), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_k_means():
    """More landmarks approximate better, and as many as rows exactly."""
    pytest.importorskip("sklearn")
    errors = [float(KernelMean.fit(POOL, landmarks=n, bandwidth=2.0, seed=0).error) for n in (2, 8, 32)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    exact = KernelMean.fit(POOL, landmarks=1000, bandwidth=1.0, ridge=1e-12)
    assert abs(exact.error) < 1e-11
    torch.testing.assert_close(fastvae.mmd(X, exact), fastvae.mmd(X, POOL), rtol=1e-7, atol=0)
    first, second = (KernelMean.fit(POOL, landmarks=5, seed=1).points for _ in range(2))
    assert torch.equal(first, second)
    # Fewer distinct rows than landmarks
    assert KernelMean.fit(POOL[torch.arange(90) % 3], landmarks=8, bandwidth=1.0).error < 1e-5


def test_error_bounds_the_difference_to_all_rows():
    for h in (0.7, 1.5, 5.0):
        mean = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=h, ridge=1e-10)
        exact, root = fastvae.mmd(X, POOL, bandwidth=h), mean.error.sqrt()
        difference = (fastvae.mmd(X, mean) - exact).abs()
        own = dense(X, KernelMean(POOL[:1], 0 * POOL[:1, 0], norm=0.0, bandwidth=h)).sqrt()
        assert difference <= 2 * root * own
        assert difference <= 2 * root * exact.sqrt() + 2 * mean.error
        assert difference > 0


def test_a_rule_for_the_bandwidth():
    expected = fastvae.median_bandwidth(POOL)
    for method in ("nystrom", "all"):
        mean = KernelMean.fit(POOL, landmarks=LANDMARKS, method=method)
        torch.testing.assert_close(torch.tensor(mean.bandwidth, dtype=torch.float64), expected.reshape(1).cpu())


@pytest.mark.slow
def test_norm_of_some_rows():
    """Unbiased: the mean over draws is the norm of all rows."""
    exact = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5).norm
    some = torch.stack([KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5, norm_rows=40, seed=n).norm for n in range(100)])
    assert (some.mean() - exact).abs() < 3 * some.std() / 10
    assert 0 < some.std() < 0.03 * exact
    assert KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5, norm_rows=None).norm == pytest.approx(float(exact), rel=1e-12)


def same(a, b):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-10, atol=1e-13)
    assert (a.kernel, a.bandwidth, a.bandwidth_weights) == (b.kernel, b.bandwidth, b.bandwidth_weights)


STREAMS = {
    "list": lambda: list(POOL.split(40)),
    "generator": lambda: (part for part in POOL.split(7)),
    "loader": lambda: DataLoader(TensorDataset(POOL), batch_size=64),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stream_is_the_sample_of_all_its_rows(stream):
    for options in (
        {"landmarks": LANDMARKS, "bandwidth": 1.5},
        {"landmarks": LANDMARKS, "bandwidth": "mean"},
        {"landmarks": 9, "bandwidth": "median"},
        {"landmarks": LANDMARKS, "bandwidth": 1.5, "norm_rows": 20},
        {"method": "all", "bandwidth": 1.5},
    ):
        same(KernelMean.fit(stream(), seed=3, **options), KernelMean.fit(POOL, seed=3, **options))


def test_a_long_stream_is_drawn_from_evenly():
    """Every row is kept with the same probability: 20 of 100 rows, 400 times."""
    numbers = torch.arange(100.0, dtype=torch.float64)[:, None]
    counts = torch.zeros(100)
    for seed in range(400):
        drawn = _DrawnRows(np.random.default_rng(seed), 20)
        for part in numbers.split(9):
            drawn.add(part)
        counts[drawn.rows()[:, 0].long()] += 1
    assert len(drawn.rows()) == 20
    assert (counts - 80).abs().max() < 5 * 8


@pytest.mark.parametrize("kernel", ["laplace", RationalQuadratic(0.5)])
def test_file(kernel, tmp_path):
    pytest.importorskip("safetensors")
    for mean in (
        KernelMean.fit(POOL.float(), landmarks=LANDMARKS.float(), kernel=kernel, bandwidth=[1.0, 2.0], bandwidth_weights=[0.5, 1.0]),
        KernelMean.fit(POOL, method="all", kernel=kernel, bandwidth=0.1),
    ):
        mean.save(tmp_path / "mean.safetensors")
        loaded = KernelMean.load(tmp_path / "mean.safetensors").to(DEVICE)
        same(mean, loaded)
        assert loaded.state_dict().keys() == mean.state_dict().keys()
        assert torch.equal(fastvae.mmd(X.to(mean.points), loaded), fastvae.mmd(X.to(mean.points), mean))


def test_another_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    other = tmp_path / "other.safetensors"
    safetensors.save_file({"a": torch.zeros(2)}, str(other))
    with pytest.raises(ValueError, match=r"must be a file that KernelMean\.save wrote, got a file of another kind"):
        KernelMean.load(other)
    other.write_text("text")
    with pytest.raises(ValueError, match=r"must be a file that KernelMean\.save wrote, got another file"):
        KernelMean.load(other)
    with pytest.raises(FileNotFoundError):
        KernelMean.load(tmp_path / "none")


@pytest.mark.parametrize(("package", "module"), [("scikit-learn", "sklearn"), ("safetensors", "safetensors")])
def test_without_a_package(package, module, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.0)
    with pytest.raises(ImportError, match=rf"{package} must be installed for KernelMean\.\w+: pip install 'fastvae-mmd\[landmarks\]'"):
        KernelMean.fit(POOL, landmarks=5) if module == "sklearn" else mean.save(tmp_path / "mean")


def test_module():
    """Its buffers move and load with a model, and keep their dtype."""
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5)
    model = nn.Sequential(nn.Linear(4, 4).double(), mean).half()
    assert {t.dtype for t in mean.buffers()} == {torch.float64}
    assert model[0].weight.dtype == torch.float16
    assert not list(mean.parameters())
    other = KernelMean.fit(POOL + 1, landmarks=LANDMARKS + 1, bandwidth=1.5)
    other.load_state_dict(mean.state_dict())
    same(other, mean)
    same(copy.deepcopy(mean), mean)
    assert model.to("meta")[1].points.is_meta
    assert "12 points, 4 features" in repr(other)
    assert fastvae.MMDLoss()(X, other) == fastvae.mmd(X, other)


@pytest.mark.parametrize(
    "options",
    [{"kernel": "laplace"}, {"bandwidth": 1.6}, {"bandwidth_weights": [2.0]}, {"kernel": RationalQuadratic(2.0)}],
    ids=str,
)
def test_a_state_of_another_kernel(options):
    """Refused before anything is loaded, also within a model."""
    mean = nn.Sequential(KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5, kernel=RationalQuadratic(3.0)))
    other = nn.Sequential(KernelMean.fit(POOL, landmarks=LANDMARKS, **{"bandwidth": 1.5, "kernel": RationalQuadratic(3.0), **options}))
    before = fastvae.mmd(X, mean[0])
    with pytest.raises(ValueError, match=r"the state must be of a KernelMean of kernel 'rational_quadratic' with parameters \[3\.0\]"):
        mean.load_state_dict(other.state_dict())
    assert fastvae.mmd(X, mean[0]) == before
    mean.load_state_dict(copy.deepcopy(mean.state_dict()))


def test_the_error_is_that_of_all_rows_when_it_is_estimated_from_some():
    x, pool = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (50, 3000))
    exact = KernelMean.fit(pool, landmarks=x, bandwidth=3.0, norm_rows=None).error
    for seed in range(5):
        error = KernelMean.fit(pool, landmarks=x, bandwidth=3.0, norm_rows=500, seed=seed).error
        assert 0.5 * exact < error < 2 * exact + 1 / 500


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_not_negative(seed):
    """Of a pool in float32, whose norm has rounding errors, and of one whose norm is estimated from a few rows."""
    pool = POOL.float()
    assert KernelMean.fit(pool, landmarks=pool, bandwidth=1.0 + seed, ridge=1e-10).error >= 0
    assert KernelMean.fit(pool, landmarks=pool, bandwidth=1.0, norm_rows=3, seed=seed).error >= 0


@pytest.mark.parametrize("kernel", ["laplace", "energy"])
@pytest.mark.parametrize("far", [0.0, 100.0])
def test_float32_rows_close_to_each_other(kernel, far):
    """Distances of such rows are differences, which float32 rounds relative to the rows' distance from the origin."""
    x, pool = (X + far).float(), (POOL + far).float()
    x[0], x[3] = pool[3] + 0.02, x[4] + 0.01
    mean = KernelMean.fit(pool, kernel=kernel, bandwidth=0.7, method="all")
    exact = KernelMean(pool.double(), norm=mean.norm, kernel=kernel, bandwidth=0.7)
    (value, gradient), expected = evaluate(fastvae.mmd, x, y=mean), evaluate(fastvae.mmd, x.double(), y=exact, backend="reference")
    assert value.item() == pytest.approx(expected[0].item(), rel=5e-6)
    assert (gradient.double() - expected[1]).norm() < 1e-7 * expected[1].norm()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.7])], ids=["equal", "weights"])
def test_one_point(weights, weighted):
    mean = KernelMean(LANDMARKS[:1], weights, norm=0.3, bandwidth=1.5, kernel="laplace")
    p = torch.linspace(1, 2, len(X), dtype=X.dtype, device=DEVICE) if weighted else None
    p = p if p is None else p / p.sum()
    # A row of x twice, so that the tiles take it.
    x = torch.cat([X[:-1], X[:1]])
    actual = fastvae.mmd(x, mean, estimator="unbiased", x_weights=p)
    torch.testing.assert_close(actual, dense(x, mean, "unbiased", p))


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"weights must have one number for each of the 150 points, got shape \(150, 2\)"):
        KernelMean(POOL, POOL[:, :2], norm=1.0, bandwidth=1.0)
    with pytest.raises(ValueError, match=r"norm must be a single number, got shape \(2,\)"):
        KernelMean(POOL, norm=torch.ones(2), bandwidth=1.0)


@pytest.mark.parametrize("weights", [[1.0, -0.5], [-1.0, -2.0], torch.tensor([1.0, -0.5])], ids=str)
def test_negative_weights_of_bandwidths(weights):
    with pytest.raises(ValueError, match="bandwidth_weights must be at least 0 for the Nyström approximation, got -"):
        KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=[1.0, 2.0], bandwidth_weights=weights)
    assert KernelMean.fit(POOL, method="all", bandwidth=[1.0, 2.0], bandwidth_weights=weights).error == 0


def test_autocast():
    mean = KernelMean.fit(POOL.float(), landmarks=LANDMARKS.float(), bandwidth=1.5, seed=0)
    p = torch.full((30,), 1 / 30, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for backend in (None, "reference"):
            for weights in (None, p):
                found = fastvae.mmd(X.float(), mean, backend=backend, x_weights=weights)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.double(), dense(X, mean), rtol=1e-5, atol=0)
        assert fastvae.mmd(X.bfloat16(), mean).dtype == torch.float32
        fitted = KernelMean.fit(POOL.float(), landmarks=LANDMARKS.float(), bandwidth=1.5, seed=0)
        test = fastvae.two_sample_test(X.float(), POOL.float(), method=fastvae.RandomFeatures(20), permutations=20, seed=1)
    same(mean, fitted)
    assert (
        test.statistic
        == fastvae.two_sample_test(X.float(), POOL.float(), method=fastvae.RandomFeatures(20), permutations=20, seed=1).statistic
    )


def test_own_weights():
    """Those of another program: any sum, and a norm of its own."""
    mean = KernelMean(LANDMARKS.float(), torch.linspace(-0.4, 0.9, 12, device=DEVICE), norm=0.7, bandwidth=torch.tensor([1.0, 2.0]))
    assert abs(float(mean.weights.sum()) - 1) > 1
    assert mean.error.isnan()
    is_dense(mean, X.float(), None, 1e-5, 1e-5)
    is_dense(mean, X, None, 1e-10, 1e-10)


def test_nan_stays_visible():
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5)
    x = X.clone()
    x[3, 2] = torch.nan
    assert fastvae.mmd(x, mean).isnan()


def test_kernels_of_products_are_refused_in_a_sum():
    pool = torch.randn(20, 3)
    kernel = fastvae.radial.RBF() + fastvae.radial.Polynomial(2, 1.0)
    with pytest.raises(ValueError, match="kernel must hold functions of the distance alone"):
        KernelMean(pool, norm=1.0, bandwidth=1.0, kernel=kernel)
    with pytest.raises(ValueError, match="kernel must hold functions of the distance alone"):
        KernelMean.fit(pool, method="all", bandwidth=1.0, kernel=fastvae.radial.Linear())
    with pytest.raises(ValueError, match="kernel must be positive definite"):
        KernelMean.fit(pool, landmarks=5, bandwidth=1.0, kernel=fastvae.radial.RBF() + fastvae.radial.Energy())


def test_it_keeps_its_own_numbers():
    points, weights = torch.randn(5, 3), torch.ones(5, dtype=torch.float64)
    mean = KernelMean(points, weights, norm=1.0, bandwidth=1.0)
    expected = mean.points.clone(), mean.weights.clone()
    points.zero_(), weights.zero_()
    torch.testing.assert_close((mean.points, mean.weights), expected, rtol=0, atol=0)


def test_points_that_change_are_prepared_anew():
    mean = KernelMean.fit(POOL, landmarks=LANDMARKS, bandwidth=1.5)

    def compare(mean):
        torch.testing.assert_close(fastvae.mmd(X, mean), dense(X, mean), rtol=1e-12, atol=1e-13)

    compare(mean)
    mean.points.mul_(1.5)
    compare(mean)
    other = copy.deepcopy(mean)
    other.points.add_(0.5)
    other.load_state_dict(mean.state_dict())
    compare(other)
    other.points = other.points + 0.25
    compare(other)
    other.points.data = other.points + 0.25
    compare(other)
    other.load_state_dict(mean.state_dict(), assign=True)
    compare(other)
    compare(other.to(DEVICE))
    assert set(mean.state_dict()) == {"points", "weights", "norm", "error", "_extra_state"}
    assert "_prepared" not in mean.__getstate__()
