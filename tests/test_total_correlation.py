"""The terms of β-TC-VAE on every backend against the dense reference in float64, and the reference against the definitions."""

import itertools
import math

import pytest
import torch

import fastvae
from fastvae import reference
from fastvae.reference.total_correlation import log_weights
from tests.cases import DEVICE, needs_cpu, needs_triton, peak_bytes

pytestmark = pytest.mark.usefixtures("interpreter_warnings")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
ESTIMATORS = ["minibatch_weighted", "minibatch_stratified"]
TERMS = (1.0, 3.0, -0.7)
SHAPES = [(2, 1), (7, 3), (20, 11), (130, 5), (20, 33)]
# Roundings of eps a term: a log density is a sum over D terms of some nats each, and the weight of a pair in a gradient is as good as the
# exponent of its joint density.
ROUNDINGS = 32


def batch(n, d, dtype=torch.float64, spread=1.0, logvar=-2.0):
    """z drawn from N(μ, σ²) with σ around exp(½·logvar)."""
    generator = torch.Generator().manual_seed(4)
    mu, lv, eps = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(3))
    mu, lv = spread * mu, lv + logvar
    return [t.to(DEVICE, dtype) for t in (mu + (0.5 * lv).exp() * eps, mu, lv)]


def evaluate(function, inputs, dataset_size=1000, weights=TERMS, **options):
    """The three terms, and the gradients of their weighted sum."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    terms = function(*inputs, dataset_size=dataset_size, **options)
    loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return [t.detach() for t in terms], torch.autograd.grad(loss, inputs)


def exactly(inputs, **options):
    return evaluate(reference.total_correlation, [t.double() for t in inputs], **options)


def assert_close(actual, exact, dim, dtype):
    rounding = ROUNDINGS * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = sum(term.abs().item() for term in exact[0]) + dim
    for a, e in zip(actual[0], exact[0], strict=True):
        assert a.shape == ()
        assert abs(a.double() - e).item() <= rounding * size, f"{a.item()} is not {e.item()}"
    own = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
    for a, e in zip(actual[1], exact[1], strict=True):
        error, norm = (a.double() - e).norm().item(), e.norm().item()
        assert error <= (rounding * size + own) * norm, f"gradient off by {error:.1e} of {norm:.1e}"


def test_reference_is_the_papers_minibatch_weighted_estimate():
    z, mu, logvar = (t.cpu() for t in batch(6, 3))
    posterior, prior = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    pairs = posterior.log_prob(z[:, None, :])
    log_q = torch.logsumexp(pairs.sum(2), 1) - math.log(6 * 50)
    log_marginals = (torch.logsumexp(pairs, 1) - math.log(6 * 50)).sum(1)
    log_own, log_prior = posterior.log_prob(z).sum(1), prior.log_prob(z).sum(1)
    terms = reference.total_correlation(z, mu, logvar, dataset_size=50)
    expected = [(log_own - log_q).mean(), (log_q - log_marginals).mean(), (log_marginals - log_prior).mean()]
    for term, e in zip(terms, expected, strict=True):
        torch.testing.assert_close(term, e)
    torch.testing.assert_close(terms.mutual_information, expected[0])
    torch.testing.assert_close(terms.total_correlation, expected[1])
    torch.testing.assert_close(terms.dimensionwise_kl, expected[2])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_terms_sum_to_the_sampled_kl(estimator):
    z, mu, logvar = batch(40, 3)
    own = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    terms = fastvae.total_correlation(z, mu, logvar, dataset_size=100, estimator=estimator)
    torch.testing.assert_close(sum(terms), (own - prior).mean())


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_stratified_is_unbiased(rows):
    """The mean over all batches that hold example 0 first, of an estimate of q(z) at one z, is q(z) of the whole data set."""
    examples = 5
    density = torch.rand(examples, dtype=torch.float64)
    own, following, other = (math.exp(w) for w in log_weights(rows, examples, stratified=True))
    weights = torch.tensor([own, following, *[other] * (rows - 2)], dtype=torch.float64)
    batches = [(0, *rest) for rest in itertools.permutations(range(1, examples), rows - 1)]
    estimates = torch.stack([weights @ density[list(b)] for b in batches])
    torch.testing.assert_close(estimates.mean(), density.mean())


def test_stratified_reference_has_its_weights_on_the_diagonals():
    """Two dimensions of equal parameters, so that each sample's density under each posterior is known."""
    n, size = 4, 20
    z, mu, logvar = batch(n, 1)
    density = torch.distributions.Normal(mu.T, (0.5 * logvar).exp().T).log_prob(z).exp()
    own, following, other = (math.exp(w) for w in log_weights(n, size, stratified=True))
    assert own == pytest.approx(1 / 20)
    assert following == pytest.approx((20 - 3) / (20 * 3))
    assert other == pytest.approx(1 / 3)
    w = torch.full((n, n), other, dtype=torch.float64, device=z.device)
    for i in range(n):
        w[i, (i + 1) % n], w[i, i] = following, own
    terms = reference.total_correlation(z, mu, logvar, dataset_size=size, estimator="minibatch_stratified")
    log_q = (w * density).sum(1).log()
    torch.testing.assert_close(terms.mutual_information, (density.diagonal().log() - log_q).mean())
    torch.testing.assert_close(terms.total_correlation, torch.zeros_like(log_q[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, estimator):
    if backend == "triton" and not torch.cuda.is_available():
        wanted = {torch.float64: [(2, 1), (7, 3), (20, 11)], torch.float32: [(7, 3), (130, 5), (20, 33)]}
        if shape not in wanted.get(dtype, [(7, 3)]):
            pytest.skip("the interpreter is slow")
    inputs = batch(*shape, dtype)
    actual = evaluate(fastvae.total_correlation, inputs, estimator=estimator, backend=backend)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in actual[0]] == [accumulation] * 3
    assert [t.dtype for t in actual[1]] == [dtype] * 3
    assert_close(actual, exactly(inputs, estimator=estimator), shape[1], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row(backend):
    inputs = batch(1, 4)
    actual = evaluate(fastvae.total_correlation, inputs, dataset_size=1, backend=backend)
    assert_close(actual, exactly(inputs, dataset_size=1), 4, torch.float64)
    assert actual[0][0].item() == pytest.approx(0)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(1100, 3), (600, 40), (150, 300), (1030, 1)], ids=str)
def test_several_tiles(shape, estimator):
    for dtype in (torch.float64, torch.float32):
        inputs = batch(*shape, dtype)
        actual = evaluate(fastvae.total_correlation, inputs, dataset_size=5000, estimator=estimator, backend="cpu")
        assert_close(actual, exactly(inputs, dataset_size=5000, estimator=estimator), shape[1], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dataset_of_one_batch(backend, estimator):
    inputs = batch(20, 3)
    actual = evaluate(fastvae.total_correlation, inputs, dataset_size=20, estimator=estimator, backend=backend)
    assert_close(actual, exactly(inputs, dataset_size=20, estimator=estimator), 3, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("spread", "logvar"), [(1.0, -14.0), (100.0, -4.0), (1e4, 0.0), (0.01, 3.0)])
def test_posteriors_narrow_wide_and_far_apart(backend, dtype, spread, logvar):
    """σ of a thousandth of |z|: a square expanded into products would be off by a million roundings."""
    inputs = batch(70, 5, dtype, spread, logvar)
    actual = evaluate(fastvae.total_correlation, inputs, backend=backend)
    assert_close(actual, exactly(inputs), 5, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_precisions_that_are_no_float32(backend, dtype):
    """1/σ² overflows from logvar −88 on and 1/σ from −177 on, but not the density at z = μ, which is all that rounding leaves."""
    z = torch.tensor([[0.5], [-1.0]], device=DEVICE, dtype=dtype)
    terms = fastvae.total_correlation(z, z, torch.full_like(z, -89), dataset_size=100, backend=backend)
    assert [term.item() for term in terms] == pytest.approx([5.298317366548036, 0, 39.51418263345196], abs=2e-5)
    for logvar in (-40.0, -89.0, -190.0, -3000.0):
        inputs = batch(20, 3, dtype, logvar=logvar)
        for estimator in ESTIMATORS:
            actual = evaluate(fastvae.total_correlation, inputs, estimator=estimator, backend=backend)
            assert_close(actual, exactly(inputs, estimator=estimator), 3 - logvar, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_samples_far_from_every_posterior(backend, dtype, estimator):
    """Densities under the least number of float32, some rows' and some dimensions' only."""
    z, mu, logvar = batch(70, 5, dtype)
    z[3:50, 1] += 60
    z[12] -= 300
    actual = evaluate(fastvae.total_correlation, (z, mu, logvar), estimator=estimator, backend=backend)
    assert_close(actual, exactly((z, mu, logvar), estimator=estimator), 5, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_later_posterior_so_sharp_that_densities_overflow(backend, dtype):
    """In units of the highest density of the first block of posteriors, which a sweep on a GPU leaves out."""
    z, mu, logvar = batch(130, 2, dtype)
    logvar[:, 1] = 100
    logvar[129, 1] = -80
    z[129] = mu[129]
    actual = evaluate(fastvae.total_correlation, (z, mu, logvar), backend=backend)
    exact = exactly((z, mu, logvar))
    for a, e in zip(actual[0], exact[0], strict=True):
        assert a.item() == pytest.approx(e.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_posterior_far_sharper_than_the_others(backend):
    z, mu, logvar = batch(70, 5, torch.float32)
    logvar[7] = -80
    z[7] = mu[7]
    actual = evaluate(fastvae.total_correlation, (z, mu, logvar), backend=backend)
    exact = exactly((z, mu, logvar))
    for a, e in zip(actual[0], exact[0], strict=True):
        assert a.item() == pytest.approx(e.item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in actual[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    z, mu, logvar = batch(33, 6, torch.float32)
    z, mu, logvar = z.T.contiguous().T, torch.stack([mu, -mu], 2)[:, :, 0], logvar[:1].expand_as(logvar)
    assert_close(evaluate(fastvae.total_correlation, (z, mu, logvar), backend=backend), exactly((z, mu, logvar)), 6, torch.float32)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["z", "mu", "logvar"])
def test_a_value_that_is_not_finite_gives_nan(backend, value, where):
    inputs = batch(9, 3, torch.float32)
    inputs[where][4, 1] = value
    terms, grads = evaluate(fastvae.total_correlation, inputs, backend=backend)
    assert all(term.isnan() for term in terms)
    assert backend == "reference" or all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(backend, estimator):
    inputs = [t.requires_grad_() for t in batch(4, 2)]

    def function(*inputs):
        return tuple(fastvae.total_correlation(*inputs, dataset_size=9, estimator=estimator, backend=backend))

    # The interpreter is slow: along one random direction.
    slow = backend == "triton"
    assert torch.autograd.gradcheck(function, inputs, fast_mode=slow, check_undefined_grad=not slow)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_gradients(backend, wanted):
    inputs = batch(20, 3)
    for n in wanted:
        inputs[n].requires_grad_()
    terms = fastvae.total_correlation(*inputs, dataset_size=30, backend=backend)
    found = torch.autograd.grad(sum(w * t for w, t in zip(TERMS, terms, strict=True)), [inputs[n] for n in wanted])
    _, every = exactly([t.detach() for t in inputs], dataset_size=30)
    for n, grad in zip(wanted, found, strict=True):
        torch.testing.assert_close(grad, every[n])


@needs_cpu
def test_only_the_wanted_work(monkeypatch):
    from fastvae.ops import total_correlation as op

    asked = []
    original = op.cpu.backward
    monkeypatch.setattr(op.cpu, "backward", lambda *args: asked.append(args[-2:]) or original(*args))
    z, mu, logvar = batch(5, 2)
    fastvae.total_correlation(z, mu, logvar, dataset_size=9, backend="cpu")
    for wanted in ([z], [mu], [z, mu, logvar]):
        for t in (z, mu, logvar):
            t.requires_grad_(any(t is w for w in wanted))
        fastvae.total_correlation(z, mu, logvar, dataset_size=9, backend="cpu").total_correlation.backward()
    assert asked == [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stratified", [False, True])
def test_a_share_of_the_batch_against_all_of_it(backend, stratified):
    """As under data parallelism: densities of the rows, and gradients to all posteriors that sum over the shares."""
    inputs = [t.requires_grad_() for t in batch(23, 3)]

    def densities(rows, offset):
        z, mu, logvar = inputs
        joint, marginals = torch.ops.fastvae.total_correlation(z[rows], mu, logvar, 40, offset, stratified, backend)
        return joint, marginals, torch.autograd.grad(joint.sum() + marginals.square().sum(), inputs)

    whole = densities(slice(0, 23), 0)
    shares = [densities(slice(0, 9), 0), densities(slice(9, 23), 9)]
    for n in range(2):
        torch.testing.assert_close(torch.cat([share[n] for share in shares]), whole[n])
    for a, b, e in zip(shares[0][2], shares[1][2], whole[2], strict=True):
        torch.testing.assert_close(a + b, e)


def test_second_derivative():
    inputs = [t.requires_grad_() for t in batch(5, 2)]
    terms = fastvae.total_correlation(*inputs, dataset_size=9)
    grads = torch.autograd.grad(terms.total_correlation, inputs, create_graph=True)
    for grad, source in itertools.product(grads, inputs):
        with pytest.raises(NotImplementedError, match="total_correlation has no second derivative: call it with backend='reference'"):
            torch.autograd.grad(grad.sum(), source, retain_graph=True)

    def dense(*inputs):
        return tuple(fastvae.total_correlation(*inputs, dataset_size=9, backend="reference"))

    assert torch.autograd.gradgradcheck(dense, inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of PyTorch's own, on the first forward-mode call
def test_forward_mode_is_refused_and_not_zero():
    z, mu, logvar = batch(5, 3)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda z: fastvae.total_correlation(z, mu, logvar, dataset_size=9).total_correlation, (z,), (torch.ones_like(z),))


@pytest.mark.parametrize("stratified", [False, True])
def test_opcheck(stratified):
    inputs = [t.requires_grad_() for t in batch(5, 2)]
    torch.library.opcheck(torch.ops.fastvae.total_correlation.default, (*inputs, 9, 0, stratified, ""))
    z, mu, logvar = (t.detach() for t in inputs)
    joint, marginals = torch.ops.fastvae.total_correlation(z, mu, logvar, 9, 0, stratified, "")
    args = (joint, marginals, z, mu, logvar, joint, marginals, 9, 0, stratified, "")
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.fastvae.total_correlation_backward.default, (*args, *flags))


def test_compiles_whole_and_once_for_all_sizes():
    compilations = []

    def backend(module, inputs):
        compilations.append(module)
        return module.forward

    def loss(z, mu, logvar):
        terms = fastvae.total_correlation(2 * z, mu, logvar, dataset_size=1000, estimator="minibatch_stratified")
        return sum(weight * term for weight, term in zip(TERMS, terms, strict=True))

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (10, 23, 600):
        inputs = [t.requires_grad_() for t in batch(rows, 4)]
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    assert len(compilations) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradient(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(fastvae.total_correlation, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (9, 12):
        inputs = batch(rows, 4)
        actual, expected = (evaluate(function, inputs) for function in (compiled, fastvae.total_correlation))
        torch.testing.assert_close(actual, expected)


def test_functional_gradient():
    z, mu, logvar = batch(9, 4)
    _, (expected, *_) = evaluate(fastvae.total_correlation, (z, mu, logvar), dataset_size=20, weights=(0.0, 1.0, 0.0))
    actual = torch.func.grad(lambda z: fastvae.total_correlation(z, mu, logvar, dataset_size=20).total_correlation)(z)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_computes_in_float32(backend):
    z, mu, logvar = (t.cpu() for t in batch(20, 4, torch.float32))
    exact = fastvae.total_correlation(z, mu, logvar, dataset_size=50, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastvae.total_correlation(z, mu, logvar, dataset_size=50, backend=backend) == exact
        mixed = fastvae.total_correlation(z, mu.bfloat16(), logvar.bfloat16(), dataset_size=50, backend=backend)
    assert mixed == fastvae.total_correlation(z, mu.bfloat16().float(), logvar.bfloat16().float(), dataset_size=50, backend=backend)


def test_same_bits_every_time():
    inputs = batch(700, 20, torch.float32)
    first, second = (evaluate(fastvae.total_correlation, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


def test_gradients_are_contiguous():
    """As the fake says: the compiler builds on it."""
    z, mu, logvar = (t.T.contiguous().T for t in batch(20, 3))
    joint, marginals = torch.ops.fastvae.total_correlation(z, mu, logvar, 30, 0, False, "")
    assert marginals.is_contiguous()
    grads = torch.ops.fastvae.total_correlation_backward(joint, marginals, z, mu, logvar, joint, marginals, 30, 0, False, "", True, True)
    assert all(grad.is_contiguous() for grad in grads)


@needs_cpu
def test_memory_grows_with_n_and_not_with_its_square():
    """Peak bytes of tensors that a step allocates, counted by the profiler at two sizes; of N×N×D the second would take 256 MiB."""

    def peak(n):
        return peak_bytes(
            lambda *inputs: sum(fastvae.total_correlation(*inputs, dataset_size=10_000, backend="cpu")), batch(n, 4, torch.float32)
        )

    small, large = peak(1024), peak(4096)
    assert large < 6 << 20
    assert large - small < 40 * 4 * 3072 * 4
