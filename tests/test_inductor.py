"""backend="inductor": the same numbers from loops that `torch.compile` makes."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastvae
from fastvae.cpu import inductor, small, tiles
from tests.cases import DEVICE, STREAMING_CASES, TOLERANCE, Case, assert_close, evaluate, expected, peak_bytes, problems

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.skipif(not COMPILER or DEVICE != "cpu", reason="needs a C++ compiler and data on a CPU"),
]

LADDER = (1.0, 2**0.5, 2.0)
# Each loop takes seconds to compile: what `test_mmd` does not tell apart is left out, and all have three features and one ladder.
NAMES = [
    "one bandwidth",
    "one row each",
    "one row against many",
    "one feature",
    "one past a tile",
    "ladder by squaring",
    "from narrow to wide",
    "weighted bandwidths",
    "one weighted bandwidth",
    "sample weights, ladder, unbiased",
    "narrow",
    "wide",
    "far from the origin",
    "one bandwidth, float64",
    "from narrow to wide, float64",
    "several tiles",
    "several tiles, unbiased ladder",
    "several tiles, wide",
]


def of_few_loops(case: Case) -> Case:
    if len(case.bandwidth) == 5:
        case = replace(case, bandwidth=LADDER, bandwidth_weights=case.bandwidth_weights and case.bandwidth_weights[-3:])
    return replace(case, d=3) if case.d == 5 else case


CASES = [of_few_loops(case) for case in STREAMING_CASES if case.name in NAMES]
CASES += [Case("ladder of many features", d=17, bandwidth=tuple(1.5 * h for h in LADDER), weighted=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Of a few rows, so that a few rows are many blocks."""
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(small, "_PAIRS", 0)
    monkeypatch.setattr(inductor, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(inductor, "_ROWS", 48)
    monkeypatch.setattr(inductor, "_COLUMNS", 40)
    monkeypatch.setattr(inductor, "_TILE", 24)


def loops() -> int:
    """How many loops the inductor backend has compiled."""
    return sum(function.cache_info().currsize for function in (inductor._of_points, inductor._of_exponents))


def test_every_name_is_a_case():
    assert len(CASES) == len(NAMES) + 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("case", "name"), problems(CASES))
def test_inductor(case, name):
    function = getattr(fastvae, name)
    points = case.points() if name == "mmd" else case.points()[:1]
    weights = {k: w for k, w in case.weights(case.accumulation_dtype).items() if name == "mmd" or k == "x_weights"}
    options = {**case.options, **weights, "backend": "inductor"}
    rows = min(case.n, case.m), sum(map(abs, case.bandwidth_weights or (1.0,) * len(case.bandwidth)))
    reference_values = expected(case, name, *points)
    assert_close(evaluate(function, *points, **options), reference_values, TOLERANCE[case.dtype], *rows)
    assert_close([function(*points, **options)], reference_values[:1], TOLERANCE[case.dtype], *rows)


def test_exponentials():
    t = -20 * torch.rand(1 << 22, dtype=torch.float64).float()
    exact = t.double().exp2()
    error = (inductor._exp2_(t.clone()).double() - exact) / exact
    assert error.abs().max() < 9e-8
    # A mean that is not zero would not cancel between samples of one law.
    assert error.mean().abs() < 2e-10
    exact = t.double().expm1()
    assert ((inductor._expm1_(t).double() - exact) / exact).abs().max() < 3e-7


def test_no_power_is_denormal():
    power = inductor._exp2_(torch.linspace(-300, 0, 1001))
    for _ in range(3):
        assert power.min() >= 2.0**-100
        assert power[-1] == 1
        power = inductor._square_(power)


@pytest.mark.parametrize(("d", "bound"), [(3, 3e-5), (17, 1e-5)])
def test_samples_of_one_law(d, bound):
    """MMD² of about 2e-4, the rest of sums of about one."""
    x, y = torch.randn(9000, d), torch.randn(9000, d)
    bandwidth = [d**0.5 * h for h in LADDER]
    exact = fastvae.mmd(x.double(), y.double(), bandwidth=bandwidth, backend="cpu")
    assert fastvae.mmd(x, y, bandwidth=bandwidth, backend="inductor").double() == pytest.approx(float(exact), rel=bound)


@pytest.mark.parametrize("bandwidth", [0.05, (0.03, 0.06)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_narrow_bandwidths_in_the_precision_of_the_samples(bandwidth, offset, monkeypatch):
    """Of products the plain path wants float64."""
    asked, make = [], inductor._of_points
    monkeypatch.setattr(inductor, "_of_points", lambda *args: asked.append(args) or make(*args))
    x, y = offset + torch.randn(1500, 3), offset + torch.randn(1400, 3) / 2
    options = {"bandwidth": bandwidth, "estimator": "unbiased"}
    exact, exact_x, exact_y = evaluate(fastvae.mmd, x.double(), y.double(), **options, backend="cpu")
    value, grad_x, grad_y = evaluate(fastvae.mmd, x, y, **options, backend="inductor")
    assert value.double() == pytest.approx(float(exact), rel=1e-5)
    assert {args[-1] for args in asked} == {torch.float32}
    for gradient, expected_gradient in ((grad_x, exact_x), (grad_y, exact_y)):
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_a_narrow_bandwidth_is_that_of_the_prior():
    """Rounded to float32 it would be another one, and MMD² wrong by 2e-5 of itself."""
    x = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0))
    options = {"bandwidth": 0.05, "estimator": "unbiased"}
    exact = fastvae.mmd_to_normal(x.double(), **options, backend="cpu")
    assert fastvae.mmd_to_normal(x, **options, backend="inductor").double() == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(("scale", "h"), [(1e-18, 1e-20), (1e20, 3e18), (1e28, 1e26)])
def test_units(scale, h):
    x, y = torch.randn(1100, 3), torch.randn(1100, 3)
    values = [fastvae.mmd(scale * x, scale * y, bandwidth=h, backend=backend) for backend in ("inductor", "cpu")]
    torch.testing.assert_close(*values)


def test_outlier_to_a_wide_bandwidth():
    """It makes products of float32 too coarse, while the rest has k near one, of which MMD² is a small difference."""
    x, y = torch.randn(2000, 3), torch.randn(2000, 3)
    x[3, 0] = 900
    exact = fastvae.mmd(x.double(), y.double(), bandwidth=10.0, backend="cpu")
    assert fastvae.mmd(x, y, bandwidth=10.0, backend="inductor").double() == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("outlier", [1e3, 1e9, 1e15, 1e30])
def test_outlier(outlier):
    x, y = torch.randn(1100, 3), torch.randn(1100, 3)
    x[7, 1] = outlier
    results = [evaluate(fastvae.mmd, x, y, bandwidth=LADDER, backend=backend) for backend in ("inductor", "cpu")]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_gradient_to_y_alone_is_that_of_both():
    x, y = torch.randn(100, 3), torch.randn(90, 3)
    _, _, both = evaluate(fastvae.mmd, x, y, backend="inductor")
    _, alone = evaluate(lambda y: fastvae.mmd(x, y, backend="inductor"), y)
    torch.testing.assert_close(alone, both)


@pytest.mark.usefixtures("small_blocks")
def test_gradcheck():
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (40, 37))
    h = torch.tensor([1.0, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h, backend="inductor"), (x, y, h), fast_mode=True)


@pytest.mark.usefixtures("small_blocks")
def test_batches_nan_and_half():
    x, y = torch.randn(3, 40, 3), torch.randn(3, 30, 3)
    torch.testing.assert_close(fastvae.mmd(x, y, backend="inductor"), fastvae.mmd(x, y, backend="cpu"))
    x[1, 5] = torch.nan
    assert fastvae.mmd(x, y, backend="inductor").isnan().tolist() == [False, True, False]
    x = torch.randn(600, 3, dtype=torch.bfloat16)
    torch.testing.assert_close(fastvae.mmd(x, 2 * x, backend="inductor"), fastvae.mmd(x, 2 * x, backend="cpu"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("d", [3, 17])
def test_other_sizes_and_bandwidths_are_not_compiled_anew(d):
    def step(n, h):
        return evaluate(fastvae.mmd, torch.randn(n, d), torch.randn(n + 7, d), bandwidth=(h, 2**0.5 * h, 2 * h), backend="inductor")

    step(70, 1.0)
    before = loops()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, h in ((70, 1.3), (64, 1.0), (101, 0.7), (600, 0.9)):
            step(n, h)
    assert loops() == before


def test_any_number_of_threads():
    """The compiler keeps so many versions of a function, one for each number of threads, and fails at the next."""
    x, y, threads = torch.randn(1100, 3), torch.randn(1100, 3), torch.get_num_threads()
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                torch.testing.assert_close(fastvae.mmd(x, y, backend="inductor"), fastvae.mmd(x, y, backend="cpu"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "options",
    [{"kernel": "imq"}, {"bandwidth": (1.0, 1.5)}, {"bandwidth": (1.0,), "rows": 1000}],
    ids=["another kernel", "bandwidths that are no squares", "few rows"],
)
def test_what_loops_do_not_make_faster_is_the_plain_path(options):
    options = dict(options)
    rows = options.pop("rows", 1100)
    x, y, before = torch.randn(rows, 2), torch.randn(rows, 2), loops()
    value = fastvae.mmd(x, y, **options, backend="inductor")
    assert value == fastvae.mmd(x, y, **options, backend="cpu")
    assert loops() == before


@pytest.mark.parametrize(
    "off",
    [
        lambda: torch._dynamo.config.patch(disable=True),
        *(partial(torch.compiler.set_stance, s) for s in ("force_eager", "eager_on_recompile")),
    ],
    ids=["disable", "force_eager", "eager_on_recompile"],
)
def test_switched_off_it_is_the_plain_path(off):
    x, y = torch.randn(1100, 3), torch.randn(1100, 3)
    before = fastvae.mmd(x, y, backend="inductor")
    with off():
        assert fastvae.mmd(x, y, backend="inductor") == fastvae.mmd(x, y, backend="cpu") != before


def test_within_a_compiled_function():
    def loss(x, y):
        return 2 * fastvae.MMDLoss(bandwidth=LADDER, backend="inductor")(x, y)

    x, y = torch.randn(70, 3), torch.randn(50, 3)
    for a, e in zip(evaluate(torch.compile(loss, fullgraph=True), x, y), evaluate(loss, x, y), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("d", "rungs"), [(3, 3), (8, 7), (17, 3)])
def test_memory_is_that_of_a_tile(d, rungs):
    """In loops that are not fused a block of 3000 × 1000 would be stored."""
    x, y = torch.randn(6000, d), torch.randn(6000, d)

    def peak(backend):
        def step(x, y):
            return fastvae.mmd(x, y, bandwidth=[2 ** (0.5 * n) for n in range(rungs)], backend=backend)

        evaluate(step, x, y)
        return peak_bytes(step, [x, y])

    assert peak("inductor") < min(12 << 20, peak("cpu") + (8 << 20))


def test_no_compiler_is_an_error_that_says_so():
    x = torch.randn(1100, 3)
    options = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(options), pytest.raises(RuntimeError, match="backend='inductor' must have a C\\+\\+ compiler"):
        fastvae.mmd(x, x + 1, bandwidth=(1.0, 4.0), backend="inductor")


def test_operations_without_it_name_those_they_have():
    with pytest.raises(ValueError, match="backend must be one of None, 'cpu', 'triton', 'reference', got 'inductor'"):
        fastvae.kernel_matmul(torch.randn(5, 2), torch.randn(4, 2), torch.randn(4, 1), backend="inductor")


def test_tensors_must_be_on_the_cpu():
    with pytest.raises(ValueError, match="backend='inductor' must have tensors on the CPU, got meta"):
        fastvae.mmd(torch.randn(5, 2, device="meta"), torch.randn(4, 2, device="meta"), backend="inductor")


# The compiler hides this warning, unless it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_posteriors():
    moments, eps, prior = torch.randn(3, 4, 5, 6), torch.randn(3, 2, 5, 6), torch.randn(4, 1, 1)
    results = []
    for backend in ("inductor", "reference"):
        own = moments.clone().requires_grad_(), prior.clone().requires_grad_()
        z, kl = fastvae.reparameterize_kl_moments(own[0], eps=eps, prior=own[1], logvar_bounds=(-1.0, 1.0), backend=backend)
        results.append((z, kl, *torch.autograd.grad(z.sin().sum() + kl.square().sum(), own)))
    torch.testing.assert_close(*results)
