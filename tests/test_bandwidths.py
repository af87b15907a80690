"""Rules for the bandwidth against all pairs in numpy."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import bandwidths, mean_bandwidth, median_bandwidth, reference
from tests.cases import DEVICE, needs_cpu, needs_triton


def squared_distances(z):
    z = z.double().cpu().numpy()
    return np.square(z[:, None] - z[None]).sum(-1)


def rows(n, d=3, dtype=torch.float32, offset=0.0, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, dtype=torch.float64, generator=generator) + offset).to(DEVICE, dtype)


def lower_median(values):
    return np.sort(values.reshape(-1))[(values.size - 1) // 2]


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize(("n", "m"), [(3, 1), (4, 0), (5, 0), (17, 25), (30, 13), (1100, 30)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rules_are_those_of_all_pairs(n, m, self_pairs, offset, dtype):
    if dtype == torch.bfloat16 and offset:
        pytest.skip("bfloat16 holds few numbers there")
    x, y = rows(n, offset=offset, dtype=dtype), rows(m, offset=offset, dtype=dtype, seed=6) if m else None
    d2 = squared_distances(x if y is None else torch.cat([x, y]))
    entries = d2 if self_pairs else d2[np.triu_indices(n + m, 1)]
    median, mean = median_bandwidth(x, y, self_pairs=self_pairs), mean_bandwidth(x, y, self_pairs=self_pairs)
    assert median.dtype == mean.dtype == torch.float64
    assert median.item() == pytest.approx((0.5 * lower_median(entries)) ** 0.5, rel=1e-9)
    assert mean.item() == pytest.approx((0.5 * entries.mean()) ** 0.5, rel=1e-9)


def test_median_of_alibi_detect():
    """`sigma_median` of its PyTorch backend on the pooled sample: an entry of all n² sorted ones, the zeros of the diagonal first."""
    for n in (4, 5, 6, 7):
        z = rows(n)
        index = n + (n * n - n) // 2 - 1
        expected = (0.5 * np.sort(squared_distances(z).reshape(-1))[index]) ** 0.5
        assert median_bandwidth(z[:2], z[2:]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("far", [1e5, 1e8, 1e12, 1e18])
@pytest.mark.parametrize("rows_far", [1, 5, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_median_with_rows_far_from_the_others(far, rows_far, dtype):
    """Also where the far rows are near each other, and their pairs count."""
    z = rows(600, dtype=dtype)
    z[torch.randperm(600)[:rows_far]] += far
    expected = (0.5 * lower_median(squared_distances(z)[np.triu_indices(600, 1)])) ** 0.5
    assert median_bandwidth(z).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("capacity", [200_000, 2000])
@pytest.mark.parametrize("values", ["continuous", "few", "two clusters"])
def test_selection_in_little_memory(monkeypatch, capacity, values):
    """Whatever the random pairs say, the median is exact: a bracket that holds too much is narrowed, one that misses is widened."""
    monkeypatch.setattr(bandwidths, "CAPACITY", capacity)
    monkeypatch.setattr(bandwidths, "_MAX_PAIRS_KEPT", 1000)
    monkeypatch.setattr(bandwidths, "_MAX_SAMPLES", 400)
    z = rows(1200, 2)
    if values == "few":
        z = (2 * z).round()
    elif values == "two clusters":
        z[:849] += 1e4
    expected = (0.5 * lower_median(squared_distances(z)[np.triu_indices(1200, 1)])) ** 0.5
    assert median_bandwidth(z).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("wrong", [(0.0, 1e-3), (1e3, 1e4)])
def test_a_missed_bracket_is_widened(monkeypatch, wrong):
    monkeypatch.setattr(bandwidths, "_MAX_PAIRS_KEPT", 1000)
    brackets = iter([wrong])
    original = bandwidths._bracket
    monkeypatch.setattr(bandwidths, "_bracket", lambda *args: next(brackets, None) or original(*args))
    z = rows(100)
    expected = (0.5 * lower_median(squared_distances(z)[np.triu_indices(100, 1)])) ** 0.5
    assert median_bandwidth(z).item() == pytest.approx(expected, rel=1e-9)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("values", ["continuous", "few", "two clusters", "batch", "bfloat16", "equal"])
def test_selection_on_a_gpu(values):
    """Any rank, to the last bit, as a GPU rounds a product and a sum once: squared differences of so few features are those of numpy."""
    z = {
        "continuous": lambda: rows(150, 2)[None],
        "few": lambda: (2 * rows(70, 2)).round()[None],
        "two clusters": lambda: torch.cat([rows(50, 1), rows(30, 1) + 1e18])[None],
        "batch": lambda: rows(3 * 65, 2).reshape(3, 65, 2),
        "bfloat16": lambda: rows(64, 2, dtype=torch.bfloat16)[None],
        "equal": lambda: rows(1, 2).expand(9, 2)[None],
    }[values]()
    ordered = np.sort(np.concatenate([squared_distances(item)[np.triu_indices(z.shape[1], 1)] for item in z]))
    for rank in (0, 1, len(ordered) // 3, (len(ordered) - 1) // 2, len(ordered) - 1):
        assert bandwidths._select_on_gpu(z, rank).item() == pytest.approx(ordered[rank], rel=2**-51, abs=0)
    assert bandwidths._select_on_gpu(z, -1).item() == 0
    for bad in (torch.nan, torch.inf):
        assert bandwidths._select_on_gpu(torch.cat([z, torch.full_like(z[:, :1], bad)], 1), 0).isnan()


# Beside what reads a value, which a fake tensor does not have: without a deterministic algorithm, or waiting for sizes.
NOT_ON_A_GPU = {"kthvalue", "median", "histc", "bincount", "put_", "nonzero", "masked_select", "unique_dim", "_unique2"}


class OnGPU(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.removeprefix("aten::") not in NOT_ON_A_GPU
        return func(*args, **(kwargs or {}))


@needs_triton
def test_selection_on_a_gpu_waits_for_nothing(monkeypatch):
    from fastvae.kernels import ranked_squared_distance

    monkeypatch.setattr(ranked_squared_distance, "histogram", lambda *_: None)
    with FakeTensorMode(), OnGPU():
        bandwidths._select_on_gpu(torch.empty(2, 9, 3), 5)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU to wait for")
@pytest.mark.parametrize("options", [{}, {"self_pairs": True}, {"pairs": 100}])
def test_rules_do_not_wait_for_a_gpu(options):
    x, y = rows(700), rows(300, seed=6)
    expected = median_bandwidth(x.cpu(), y.cpu(), **{k: v for k, v in options.items() if k != "pairs"}).item()
    torch.cuda.set_sync_debug_mode("error")
    torch.use_deterministic_algorithms(True)
    try:
        h = median_bandwidth(x, y, **options)
        mean_bandwidth(x, y)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    assert h.item() == pytest.approx(expected, rel=0.3 if "pairs" in options else 1e-12)


@needs_cpu
def test_no_array_of_all_pairs(monkeypatch):
    """What a sweep keeps is bounded, as is each of its tiles."""
    monkeypatch.setattr(bandwidths, "CAPACITY", 5000)
    monkeypatch.setattr(bandwidths, "_MAX_PAIRS_KEPT", 5000)
    monkeypatch.setattr(bandwidths, "_TILE", 64)
    kept, original = [], bandwidths._sweep
    monkeypatch.setattr(bandwidths, "_sweep", lambda *args: kept.append(original(*args)) or kept[-1])
    median_bandwidth(rows(600))
    assert max(len(values) for _, _, values in kept) <= 5000
    assert max(tile.numel() for tile in bandwidths._squared_distances(rows(600)[None].double())) <= 64 * 64


def test_random_pairs():
    x, y = rows(400), rows(300, seed=6)
    generator = torch.Generator(DEVICE)
    estimates = [median_bandwidth(x, y, pairs=20_000, generator=generator.manual_seed(seed)).item() for seed in (1, 1, 2)]
    assert estimates[0] == estimates[1] != estimates[2]
    assert estimates == pytest.approx([median_bandwidth(x, y).item()] * 3, rel=0.02)
    assert median_bandwidth(x[:2], pairs=50).item() == pytest.approx(median_bandwidth(x[:2]).item())


@pytest.mark.filterwarnings("ignore:. of shape .* is treated as a batch")
def test_batch_dimensions_are_taken_together():
    x, y = rows(12).reshape(2, 2, 3, 3), rows(8, seed=6).reshape(2, 2, 2, 3)
    pairs = [squared_distances(torch.cat([a, b]))[np.triu_indices(5, 1)] for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
    assert median_bandwidth(x, y).item() == pytest.approx((0.5 * lower_median(np.concatenate(pairs))) ** 0.5)
    assert mean_bandwidth(x, y).item() == pytest.approx((0.5 * np.concatenate(pairs).mean()) ** 0.5)
    h = median_bandwidth(x, y)
    torch.testing.assert_close(fastvae.mmd(x, y, bandwidth="median"), fastvae.mmd(x, y, bandwidth=h))


RULES = {"median": median_bandwidth, "mean": mean_bandwidth}


@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_by_name(rule, kernel):
    x, y, v = rows(20, dtype=torch.float64), rows(15, dtype=torch.float64, seed=6), rows(15, 2, dtype=torch.float64, seed=7)
    h, options = RULES[rule](x, y), {"kernel": kernel}
    x.requires_grad_()

    def equal(named, given):
        torch.testing.assert_close(named, given)
        for actual, expected in zip(*(torch.autograd.grad(t.sum(), x) for t in (named, given)), strict=True):
            torch.testing.assert_close(actual, expected)

    for estimator in ("biased", "unbiased"):
        equal(
            fastvae.mmd(x, y, bandwidth=rule, estimator=estimator, **options),
            reference.mmd(x, y, bandwidth=h, estimator=estimator, **options),
        )
    equal(fastvae.MMDLoss(rule, **options)(x, y), reference.mmd(x, y, bandwidth=h, **options))
    equal(fastvae.kernel_matmul(x, y, v, bandwidth=rule, **options), reference.kernel_matmul(x, y, v, bandwidth=h, **options))
    equal(fastvae.witness(x[:3], x, y, bandwidth=rule, **options), fastvae.witness(x[:3], x, y, bandwidth=h, **options))
    labels = torch.arange(20, device=DEVICE) % 3
    own = RULES[rule](x)
    equal(
        fastvae.group_mmd(x, labels, bandwidth=rule, **options).values,
        fastvae.group_mmd(x, labels, bandwidth=own, **options).values,
    )
    assert not own.requires_grad


def test_the_loss_takes_the_rule_anew_in_each_call():
    x, y = rows(20), rows(20, seed=6)
    loss = fastvae.MMDLoss("median")
    torch.testing.assert_close(loss(x, y), loss(10 * x, 10 * y))
    torch.testing.assert_close(loss(10 * x, 10 * y), fastvae.mmd(10 * x, 10 * y, bandwidth=median_bandwidth(10 * x, 10 * y)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_transforms(rule):
    x, y = rows(12), rows(9, seed=6)

    def loss(x):
        return fastvae.mmd(x, y, bandwidth=rule)

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastvae.ranked_squared_distance.default, (rows(9)[None], 7))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(rule, bad):
    x, y = rows(9), rows(5, seed=6)
    x[3, 1] = bad
    assert RULES[rule](x, y).isnan()
    assert fastvae.mmd(x, y, bandwidth=rule).isnan()


@pytest.mark.parametrize("pairs", [None, 100])
def test_duplicates(pairs):
    z = rows(1).expand(40, 3).clone() + 1e3
    z[:5] += rows(5)
    if DEVICE != "cpu":
        assert median_bandwidth(z, pairs=pairs).isnan()
        return
    with pytest.raises(ValueError, match=r"^the median distance between rows must be greater than 0 to be a bandwidth, got 0"):
        median_bandwidth(z, pairs=pairs)
    with pytest.raises(ValueError, match=r"median distance"):
        median_bandwidth(rows(2), self_pairs=True)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: median_bandwidth(rows(1)), ValueError, "x must have at least two rows, got 1"),
        (lambda: mean_bandwidth(rows(1)), ValueError, "x must have at least two rows, got 1"),
        (lambda: median_bandwidth(rows(3), rows(3, 2)), ValueError, "x and y must have the same number of features"),
        (lambda: mean_bandwidth(rows(3), rows(3).double()), TypeError, "x and y must have the same dtype"),
        (lambda: median_bandwidth(rows(3), pairs=0), ValueError, "pairs must be at least 1, got 0"),
        (lambda: median_bandwidth(rows(3), pairs=1e6), TypeError, "pairs must be an integer, got float"),
        (lambda: median_bandwidth([1.0]), TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("kind", ["normal", "far", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("items", "n", "dim"), [(1, 2, 8), (3, 17, 16), (1, 200, 2), (1, 200, 40), (2, 150, 9)])
def test_every_rank_of_few_rows_is_exact(items, n, dim, dtype, kind):
    z = torch.randn(items, n, dim, generator=torch.Generator().manual_seed(n))
    z = {"normal": z, "far": 1e-3 * z + 1000, "rounded": z.round()}[kind].to(dtype)
    exact = torch.cat([torch.pdist(rows) for rows in z.double()]).square().sort().values
    for rank in {0, len(exact) // 20, (len(exact) - 1) // 2, len(exact) - 1}:
        torch.testing.assert_close(bandwidths._select(z, rank), exact[rank], rtol=1e-12, atol=0)
