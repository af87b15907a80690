"""Reparameterise + KL on every backend against formulas in numpy and the dense reference in float64."""

import mmap
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae import reference
from fastvae.cpu import memory
from fastvae.cpu import reparameterize_kl as small
from fastvae.cpu.memory import new_empty
from fastvae.kernels.config import RowConfig
from fastvae.ops.reparameterize_kl import Options, apply_reparameterize_kl
from tests.cases import DEVICE, needs_cpu, needs_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BACKENDS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
SHAPES = [(1, 1), (1, 7), (7, 5), (130, 33), (3, 3000), (2, 3, 4)]
# Some roundings of a term; the output's own rounding for bfloat16 and float16.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tensors(shape, dtype, count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(count)]


if triton is not None:
    from fastvae.kernels.reparameterize_kl import normal, normal_pair

    @triton.jit
    def _fill_normal(out_ptr, seed, first_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(out_ptr + offs, normal(seed, first_n, 0, BLOCK_N, BLOCK_D))

    @triton.jit
    def _fill_pairs(words_ptr, out_ptr, COUNT: tl.constexpr):
        offs = tl.arange(0, COUNT)
        words = tl.load(words_ptr + offs).to(tl.uint32)
        first, second = normal_pair(words, words)
        tl.store(out_ptr + offs, first * first + second * second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_lie_in_memory_as_small_ones(dtype):
    like = torch.empty(1, dtype=dtype)
    large = new_empty(like, (1 << 21, 3), (3, 1), torch.float32)
    assert large.shape == (1 << 21, 3)
    assert large.dtype == torch.float32
    assert large.fill_(2).sum() == 6 << 21
    assert new_empty(like, (2, 3), (3, 1)).dtype == dtype


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for huge pages")
def test_large_results_are_huge_pages_where_the_system_has_them(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: asked.append(call))
    small, large = new_empty(torch.empty(1), (1 << 20,), (1,), torch.int8), new_empty(torch.empty(1), (2 << 20,), (1,))
    assert small.numel() == 1 << 20
    ((address, length, advice),) = asked
    assert address % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert large.data_ptr() <= address < large.data_ptr() + mmap.PAGESIZE
    assert 0 <= large.data_ptr() + (8 << 20) - (address + length) < mmap.PAGESIZE
    assert advice == mmap.MADV_HUGEPAGE


def test_reference_is_the_formula():
    mu, logvar, eps = tensors((6, 4), torch.float64)
    z, kl = reference.reparameterize_kl(mu, logvar, eps=eps)
    m, lv, e = (t.cpu().numpy() for t in (mu, logvar, eps))
    np.testing.assert_allclose(z.cpu().numpy(), m + np.sqrt(np.exp(lv)) * e, rtol=1e-13)
    np.testing.assert_allclose(kl.cpu().numpy(), -0.5 * (1 + lv - m * m - np.exp(lv)).sum(1), rtol=1e-12)


def test_reference_kl_is_that_of_torch_distributions():
    mu, logvar, _ = tensors((6, 4), torch.float64)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    _, kl = reference.reparameterize_kl(mu, logvar, kl_dims=())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, prior))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, per_dimension):
    mu, logvar, eps, dz = tensors(shape, dtype, 4)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    dkl = tensors(shape if per_dimension else shape[:-1], accumulation, 5)[-1]

    def run(function, to, **options):
        m, lv = (t.to(to).detach().requires_grad_() for t in (mu, logvar))
        z, kl = function(m, lv, eps=eps.to(to), kl_dims=() if per_dimension else -1, **options)
        upstream = (dz.to(z.dtype), dkl.to(kl.dtype))
        return z, kl, *torch.autograd.grad((z, kl), (m, lv), upstream)

    actual = run(fastvae.reparameterize_kl, dtype, backend=backend)
    exact = run(reference.reparameterize_kl, torch.float64)
    assert [t.dtype for t in actual] == [dtype, accumulation, dtype, dtype]
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= TOLERANCE[dtype] * (e.norm() + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_contiguous(backend):
    mu, logvar, eps = (t.T for t in tensors((5, 70), torch.float32))
    logvar = logvar[:, :1].expand_as(logvar)
    for a, e in zip(
        fastvae.reparameterize_kl(mu, logvar, eps=eps, backend=backend), reference.reparameterize_kl(mu, logvar, eps=eps), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 6, 20, 32])
def test_halves_of_an_encoders_result(backend, dim):
    code = tensors((300, 2 * dim), torch.float32)[0].requires_grad_()
    _, _, eps, dz = tensors((300, dim), torch.float32, 4)
    results = []
    for function in (partial(fastvae.reparameterize_kl, backend=backend), reference.reparameterize_kl):
        z, kl = function(*code.chunk(2, dim=1), eps=eps)
        results.append((z, kl, *torch.autograd.grad((z * dz).sum() + kl.sum(), code)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_dimension", [False, True])
def test_gradcheck(backend, per_dimension):
    mu, logvar, eps = tensors((3, 4), torch.float64)

    def function(mu, logvar):
        return fastvae.reparameterize_kl(mu, logvar, eps=eps, kl_dims=() if per_dimension else -1, backend=backend)

    inputs = (mu.requires_grad_(), logvar.requires_grad_())
    fast = backend == "triton"
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_noise_under_a_large_mean_keeps_its_gradient(backend):
    """z − μ would be rounding here: the gradient to logvar has to come from ε itself."""
    mu, logvar = torch.full((4, 3), 100.0, device=DEVICE), torch.full((4, 3), -20.0, device=DEVICE)
    eps = torch.ones_like(mu)
    logvar.requires_grad_()
    z, _ = fastvae.reparameterize_kl(mu, logvar, eps=eps, backend=backend)
    (grad,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5 * np.exp(-10.0)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("interpreter_warnings")
def test_a_value_that_is_not_finite_gives_nan(backend):
    mu, logvar, eps = tensors((4, 3), torch.float32)
    for source in (mu, logvar):
        original = source[1, 2].item()
        source[1, 2] = float("nan")
        z, kl = fastvae.reparameterize_kl(mu, logvar, eps=eps, backend=backend)
        assert z[1, 2].isnan()
        assert kl.isnan().tolist() == [False, True, False, False]
        source[1, 2] = original


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("scale", ["logvar", "log_std", "softplus"])
@pytest.mark.usefixtures("interpreter_warnings")
def test_gaussians_whose_deviations_underflow(scale, backend):
    """σ/σ₀ is the exponential of a difference, and a distance of 0 is 0 also over σ₀ = 0."""
    (mu,) = tensors((4, 3), torch.float32, 1)
    s = torch.full_like(mu, -300.0)
    inputs = [t.clone().requires_grad_() for t in (mu, s, mu, s + torch.linspace(0, 2, 12, device=DEVICE).view(4, 3))]
    kl = fastvae.gaussian_kl(*inputs, scale=scale, backend=backend)
    exact = fastvae.gaussian_kl(*(t.detach().double().requires_grad_() for t in inputs), scale=scale, backend="reference")
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-5)
    ratio2 = ((1 if scale == "logvar" else 2) * (inputs[1] - inputs[3]).detach().double()).exp()
    slope = (ratio2 - 1) * (0.5 if scale == "logvar" else 1)
    for grad, expected in zip(torch.autograd.grad(kl.sum(), inputs), (0 * slope, slope, 0 * slope, -slope), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.usefixtures("interpreter_warnings")
def test_softplus_that_underflows(backend):
    """The KL is −s up to a constant, as log softplus(s) is s."""
    s = torch.tensor([[-30.0, -80.0, -95.0], [-104.0, -120.0, -1e4]], device=DEVICE, requires_grad=True)
    kl = fastvae.gaussian_kl(torch.zeros_like(s), s, kl_dims=(), scale="softplus", backend=backend)
    torch.testing.assert_close(kl, -0.5 - s.detach())
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), s)[0], -torch.ones_like(s))


def test_the_density_of_a_mean_whose_deviation_underflows():
    posterior = fastvae.DiagonalGaussianDistribution(torch.tensor([[1.5, -300.0]], device=DEVICE), logvar_bounds=None)
    torch.testing.assert_close(posterior.nll(posterior.mean).item(), 0.5 * (np.log(2 * np.pi) - 300.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_comes_from_the_generator(backend):
    mu, logvar, _ = tensors((50, 20), torch.float32)

    def draw(seed=None):
        generator = None if seed is None else torch.Generator(DEVICE).manual_seed(seed)
        return fastvae.reparameterize_kl(mu, logvar, generator=generator, backend=backend)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    noise = (first - mu) * (-0.5 * logvar).exp()
    assert abs(noise.mean().item()) < 0.1
    assert abs(noise.std().item() - 1) < 0.1


def seeded(shape, seed=5, dtype=torch.float32):
    """ε, which is z where μ = 0 and σ = 1."""
    zeros = torch.zeros(shape, dtype=dtype, device=DEVICE)
    return fastvae.reparameterize_kl(zeros, zeros, generator=torch.Generator(DEVICE).manual_seed(seed), backend="triton")[0].cpu()


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of counters (…, 4) under a key (2,)."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = (int(k) for k in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=-1)


def philox_normal(seed, first_row, n, d):
    rows, quads = np.meshgrid(first_row + np.arange(n), np.arange(-(-d // 4)), indexing="ij")
    words = philox(np.stack([quads, rows % 2**32, rows >> 32, 0 * rows], axis=-1), (seed % 2**32, seed >> 32))
    x, y = words[..., 0::2].astype(np.float64), words[..., 1::2]
    length = np.sqrt(-2 * np.log((x.astype(np.float32).astype(np.float64) + 0.5) / 2**32)) * np.where(y & np.uint64(1), -1, 1)
    angle = np.pi * ((y >> np.uint64(9)).astype(np.float64) / 2**23 - 0.5)
    pairs = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1)
    return torch.from_numpy(pairs.reshape(n, -1)[:, :d])


def test_philox_is_the_published_one():
    assert philox([0, 0, 0, 0], (0, 0)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (70, 20), (3, 3000)], ids=str)
def test_noise_of_the_kernels_is_a_function_of_seed_row_and_column(shape):
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5)).item()
    torch.testing.assert_close(seeded(shape).double(), philox_normal(seed, 0, *shape), rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.interpreter
def test_noise_does_not_depend_on_the_blocks(monkeypatch):
    from fastvae.kernels import reparameterize_kl as kernels

    expected = seeded((5, 13))
    for block_n, block_d in ((1, 4), (2, 8), (64, 64)):
        monkeypatch.setattr(kernels, "row_config", lambda *_, n=block_n, d=block_d: RowConfig(n, d, 1, 4))
        kernels.plan_of.cache_clear()
        assert torch.equal(seeded((5, 13)), expected)
    kernels.plan_of.cache_clear()


@needs_triton
@pytest.mark.interpreter
def test_noise_of_rows_beyond_32_bits():
    out, first = torch.empty(4, 8, device=DEVICE), 2**32 - 4
    for start in (first, first + 4):
        _fill_normal[(1,)](out, 7, start, BLOCK_N=4, BLOCK_D=8)
        torch.testing.assert_close(out.cpu().double(), philox_normal(7, start, 4, 8), rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.interpreter
def test_noise_of_the_rarest_words():
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 200, 2**32 - 128, 2**32 - 1], device=DEVICE)
    squares = torch.empty(8, device=DEVICE)
    _fill_pairs[(1,)](words, squares, COUNT=8)
    exact = -2 * torch.log(((words.cpu().float().double() + 0.5) / 2**32).clamp(max=1))
    torch.testing.assert_close(squares.cpu().double(), exact, rtol=1e-5, atol=1e-8)


@needs_triton
@pytest.mark.interpreter
def test_noise_of_the_kernels_is_normal():
    count = 1 << 16
    noise = seeded((count // 64, 64)).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(noise.pow(power).mean().item() - moment) < 5 * (variance / count) ** 0.5
    uniform, bins = torch.special.ndtr(noise.flatten()), 200
    chi2 = ((torch.histc(uniform, bins, 0, 1) - count / bins).square() / (count / bins)).sum().item()
    assert abs(chi2 - (bins - 1)) < 5 * (2 * bins) ** 0.5
    assert 3.9 < noise.abs().max().item() < 6.8
    # Neighbours in a row, in a quadruple, and rows; and the squares, which Box and Muller's pairs could share.
    for values in (noise, noise.square() - 1):
        for a, b in (
            (values[:, :-1], values[:, 1:]),
            (values[:, ::2], values[:, 1::2]),
            (values[:-1], values[1:]),
            (values, seeded(noise.shape, 6)),
        ):
            assert abs((a * b).mean().item()) < 5 * ((values.var() * b.var()).item() / a.numel()) ** 0.5
    # float32 holds fewer numbers than this, but no block and no row comes twice.
    assert noise.unique().numel() > 0.98 * count
    for block in (noise, noise.reshape(-1, 4)):
        assert block.unique(dim=0).shape == block.shape


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_noise_is_the_same_in_every_precision(dtype):
    rtol = 2**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(seeded((5, 6), dtype=dtype).double(), seeded((5, 6)).double(), rtol=rtol, atol=1e-6)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(6, 5), (3, 3000)], ids=str)
def test_backward_makes_the_noise_of_forward_from_the_seed(shape):
    mu, logvar, dz = (t.requires_grad_() for t in tensors(shape, torch.float64))
    z, _ = fastvae.reparameterize_kl(mu, logvar, backend="triton")
    assert sorted(t.numel() for t in z.grad_fn.saved_tensors if t is not None) == [1, mu.numel(), mu.numel()]
    grad_mu, grad_logvar = torch.autograd.grad(z, (mu, logvar), dz)
    torch.testing.assert_close(grad_mu, dz)
    torch.testing.assert_close(grad_logvar, 0.5 * dz * (z - mu))


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("per_dimension", [False, True])
def test_gradcheck_of_a_seed(per_dimension):
    mu, logvar, _ = tensors((3, 5), torch.float64)

    def function(mu, logvar):
        generator = torch.Generator(DEVICE).manual_seed(5)
        return fastvae.reparameterize_kl(mu, logvar, generator=generator, kl_dims=() if per_dimension else -1, backend="triton")

    inputs = (mu.requires_grad_(), logvar.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_captured_step_draws_anew_at_every_replay():
    mu, logvar, _ = (t.requires_grad_() for t in tensors((64, 20), torch.float32))

    def step():
        z, kl = fastvae.reparameterize_kl(mu, logvar)
        return z, *torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _, grad_logvar = step()
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(z.clone())
        torch.testing.assert_close(grad_logvar, 0.5 * (z - mu) + 0.5 * (logvar.exp() - 1), rtol=1e-4, atol=1e-5)
    assert not torch.equal(*draws)


@pytest.mark.parametrize("per_dimension", [False, True])
def test_opcheck(per_dimension):
    mu, logvar, eps = tensors((3, 4), torch.float64)
    mu.requires_grad_()
    logvar.requires_grad_()
    options = Options(kl_dims=() if per_dimension else (1,))
    torch.library.opcheck(torch.ops.fastvae.reparameterize_kl.default, (mu, logvar, eps, None, None, *options))
    grad_kl = (mu if per_dimension else mu[:, 0]).detach().clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.fastvae.reparameterize_kl_backward.default, (eps, grad_kl, mu, logvar, eps, None, None, *options, False)
    )


@needs_triton
@pytest.mark.interpreter
def test_opcheck_of_a_seed():
    mu, logvar, dz = (t.requires_grad_() for t in tensors((3, 4), torch.float64))
    seed = torch.tensor([2**40 + 3], device=DEVICE)
    torch.library.opcheck(torch.ops.fastvae.reparameterize_kl.default, (mu, logvar, seed, None, None, *Options(backend="triton")))
    grad_kl = mu[:, 0].detach().clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.fastvae.reparameterize_kl_backward.default, (dz, grad_kl, mu, logvar, seed, None, None, *Options(backend="triton"), False)
    )


def test_the_cpu_path_refuses_a_seed():
    x = torch.zeros(3, 4)
    with pytest.raises(NotImplementedError, match="a seed is for the Triton kernels"):
        torch.ops.fastvae.reparameterize_kl(x, x, torch.tensor([1]), None, None, *Options())


def test_a_compiler_for_the_cpu_gets_the_formulas_and_no_operation():
    graphs = []
    compiled = torch.compile(fastvae.reparameterize_kl, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    compiled(*(torch.randn(4, 3) for _ in range(2)))
    assert not any("fastvae" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("backend", [None, pytest.param("cpu", marks=pytest.mark.skipif(DEVICE != "cpu", reason="of tensors on a CPU"))])
def test_compiles_whole(backend):
    def loss(mu, logvar, eps):
        z, kl = fastvae.reparameterize_kl(2 * mu, logvar, eps=eps, backend=backend)
        return z.sin().sum() + kl.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        mu, logvar, eps = tensors((rows, 3), torch.float32)
        results = []
        for function in (compiled, loss):
            m = mu.clone().requires_grad_()
            value = function(m, logvar, eps)
            results.append((value.detach(), *torch.autograd.grad(value, m)))
        torch.testing.assert_close(results[0], results[1])


def _draw_and_apply(mu, logvar):
    """What the public function does on a GPU; its check for the interpreter is not for the compiler."""
    seed = torch.randint(2**63 - 1, (1,), device=mu.device, generator=None)
    return apply_reparameterize_kl(mu, logvar, seed, None, None, *Options(backend="triton"))


@pytest.mark.parametrize(
    "function", [fastvae.reparameterize_kl, pytest.param(_draw_and_apply, marks=[needs_triton, pytest.mark.interpreter])]
)
def test_compiles_whole_with_its_own_noise(function):
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        mu, logvar, _ = (t.requires_grad_() for t in tensors((rows, 3), torch.float32))
        z, kl = compiled(mu, logvar)
        torch.testing.assert_close(kl, reference.reparameterize_kl(mu, logvar)[1])
        (grad,) = torch.autograd.grad(z.sum(), logvar)
        torch.testing.assert_close(grad, 0.5 * (z - mu))


def test_functional_gradient():
    mu, logvar, eps = tensors((4, 3), torch.float32)
    grad = torch.func.grad(lambda mu: fastvae.reparameterize_kl(mu, logvar, eps=eps)[1].sum())(mu)
    torch.testing.assert_close(grad, mu)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_gradient_with_its_own_noise(backend):
    mu, logvar, _ = tensors((4, 3), torch.float32)

    def loss(logvar):
        z, _ = fastvae.reparameterize_kl(mu, logvar, backend=backend)
        return z.sum(), z

    grad, z = torch.func.grad(loss, has_aux=True)(logvar)
    torch.testing.assert_close(grad, 0.5 * (z - mu))


@pytest.mark.parametrize("per_dimension", [False, True])
def test_few_rows_on_a_cpu(per_dimension):
    """PyTorch's own derivatives: the same numbers as the operation's, from the same state of the generator."""
    mu, logvar = torch.randn(40, 6), torch.randn(40, 6)

    def result(**options):
        inputs = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        z, kl = fastvae.reparameterize_kl(
            *inputs, generator=torch.Generator().manual_seed(3), kl_dims=() if per_dimension else -1, **options
        )
        loss = (z * torch.linspace(-1, 1, 6)).sum() + kl.square().sum()
        return z.detach(), kl.detach(), *torch.autograd.grad(loss, inputs)

    assert small.is_small(mu, logvar, None)
    for few, many in zip(result(), result(backend="cpu"), strict=True):
        torch.testing.assert_close(few, many)


def test_what_is_small():
    mu = torch.randn(4, 3)
    assert small.is_small(mu, mu, mu)
    assert small.is_small(mu, None, None)
    for other in (mu.double(), mu.to("meta"), torch.randn(4, 3, dtype=torch.bfloat16)):
        assert not small.is_small(mu, other, None)
        assert not small.is_small(mu, mu, other)
        assert not small.is_small(other, other, None)
    for other in (mu[:0], torch.randn(4096, 3)):
        assert not small.is_small(other, other, None)
    assert not small.is_small(torch.randn(8192, 3), None, None)
    with FakeTensorMode():
        assert not small.is_small(torch.randn(4, 3), torch.randn(4, 3), None)


def test_small_in_inference_mode_first():
    """What is kept for the next call is fit for gradients."""
    with torch.inference_mode():
        fastvae.reparameterize_kl(torch.randn(8, 11), torch.randn(8, 11))
    mu = torch.randn(8, 11, requires_grad=True)
    z, kl = fastvae.reparameterize_kl(mu, torch.randn(8, 11))
    (z.sum() + kl.sum()).backward()
    assert mu.grad.isfinite().all()


def test_the_compiler_does_not_see_what_is_small():
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda mu: fastvae.reparameterize_kl(mu, mu)[1], backend=counter, dynamic=True, fullgraph=True)
    for rows in (64, 300, 5000):
        compiled(torch.randn(rows, 20))
    assert counter.frame_count == 1
