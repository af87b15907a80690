"""Reparameterise + KL of arrays in any memory format, with sums over any dimensions, against the dense reference in float64."""

import itertools

import pytest
import torch

import fastvae
from fastvae.cpu import reparameterize_kl as cpu
from fastvae.layouts import Layout
from fastvae.ops.reparameterize_kl import Options
from tests.cases import needs_cpu

SHAPES = [((4, 6), 1), ((3, 6, 5), 1), ((3, 5, 6), 2), ((3, 4, 2, 3), 1), ((2, 4, 3, 2, 3), 1), ((4, 3, 2), 0), ((1, 2, 1, 1), 1)]
OPTIONS = [
    {},
    {"logvar_bounds": (-0.5, 0.7)},
    {"scale": "logvar", "scale_offset": 1e-4},
    {"scale": "log_std", "scale_offset": 1e-2, "soft_clamp": 1.0},
    {"scale": "log_std"},
    {"scale": "softplus", "scale_offset": 1e-4},
]
# s is positive.
POSITIVE = [{"scale": "std", "scale_offset": 0.1}, {"scale": "variance"}]


def memory_formats(shape):
    dense = torch.randn(shape, dtype=torch.float64)
    yield dense
    if len(shape) in (4, 5):
        yield dense.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    yield torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape))[::-1])
    yield torch.randn([2 * size for size in shape], dtype=torch.float64)[tuple(slice(None, None, 2) for _ in shape)]
    yield dense[:1].expand(shape)


def kl_dims(ndim):
    return ["all", (), -1, 1, 0, tuple(range(ndim)), (0, ndim - 1)]


def is_as_reference(moments, dim, dims, prior, options):
    half = moments.chunk(2, dim)[0]
    eps = torch.randn_like(half)
    leaves = [t.detach().requires_grad_() for t in (moments, prior) if t is not None]
    results = []
    for backend in ("cpu", "reference"):
        own = dict(zip(("moments", "prior"), leaves, strict=False))
        z, kl = fastvae.reparameterize_kl_moments(**own, dim=dim, eps=eps, kl_dims=dims, backend=backend, **options)
        upstream = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).reshape(t.shape) for t in (z, kl)]
        results.append((z, kl, *torch.autograd.grad((z, kl), leaves, upstream)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if moments.ndim == 4 and moments.is_contiguous(memory_format=torch.channels_last):
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)


@needs_cpu
@pytest.mark.parametrize("block", [7, 40, cpu.BLOCK])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_every_layout(monkeypatch, shape, dim, block):
    monkeypatch.setattr(cpu, "BLOCK", block)
    torch.manual_seed(0)
    options = itertools.cycle(OPTIONS)
    for moments in memory_formats(shape):
        for dims in kl_dims(len(shape)):
            for prior in (None, torch.randn(shape, dtype=torch.float64), torch.randn(shape[1:], dtype=torch.float64)):
                if prior is None or prior.ndim == len(shape) or dim > 0:
                    is_as_reference(moments, dim, dims, prior, next(options))


@needs_cpu
@pytest.mark.parametrize("options", POSITIVE, ids=str)
def test_scales_of_positive_numbers(options):
    is_as_reference(torch.rand(5, 6, dtype=torch.float64) + 0.1, 1, "all", torch.rand(6, dtype=torch.float64) + 0.1, options)


def test_layouts_of_images():
    contiguous = torch.empty(2, 8, 4, 5)
    for moments, dims, sizes, sums in (
        (contiguous, (1, 2, 3), (1, 2, 80), (1, 2, 1)),
        (contiguous, (1,), (2, 4, 20), (2, 1, 20)),
        (contiguous, (), (1, 2, 80), (1, 2, 80)),
        (contiguous.to(memory_format=torch.channels_last), (1, 2, 3), (2, 20, 4), (2, 1, 1)),
        (contiguous.to(memory_format=torch.channels_last), (1,), (1, 40, 4), (1, 40, 1)),
    ):
        half = moments.chunk(2, 1)[0]
        layout = Layout.of(half.shape, [half.stride()], dims)
        assert (layout.sizes, layout.sums_sizes, layout.late_dims) == (sizes, sums, ())
        assert layout.view(half).data_ptr() == half.data_ptr()


@needs_cpu
@pytest.mark.parametrize("options", [*OPTIONS[1:4], {"scale": "softplus", "kl_dims": 1}], ids=str)
def test_gradcheck(options):
    moments, prior = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    eps = torch.randn(2, 2, 3, dtype=torch.float64)

    def function(moments, prior):
        return fastvae.reparameterize_kl_moments(moments, prior=prior, eps=eps, backend="cpu", **options)

    inputs = moments.requires_grad_(), prior.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    kl = function(*inputs)[1]
    torch.testing.assert_close(kl.detach(), gaussian_kl_of_moments(moments, prior.expand(4, 3), options).detach())


def gaussian_kl_of_moments(moments, prior, options):
    pairs = [*moments.chunk(2, 1), *prior.chunk(2, 0)]
    return fastvae.gaussian_kl(*pairs, **{"kl_dims": "all", **options}, backend="cpu")


@needs_cpu
def test_gradcheck_of_gaussian_kl():
    inputs = [torch.randn(3, 2, dtype=torch.float64).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *own: fastvae.gaussian_kl(*own, backend="cpu"), inputs)
    assert torch.autograd.gradgradcheck(lambda *own: fastvae.gaussian_kl(*own, backend="cpu"), inputs)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory_format", "kl_dims"), [(torch.contiguous_format, (1, 2, 3)), (torch.contiguous_format, (2,)), (torch.channels_last, (1,))]
)
def test_opcheck(memory_format, kl_dims):
    moments = torch.randn(2, 4, 3, 3, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    prior, eps = torch.randn_like(moments).requires_grad_(), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    options = Options(1, kl_dims, bounds=(-1.0, 1.0))
    op, backward = torch.ops.fastvae.reparameterize_kl.default, torch.ops.fastvae.reparameterize_kl_backward.default
    torch.library.opcheck(op, (moments, None, eps, prior, None, *options))
    torch.library.opcheck(op, (moments, None, None, None, None, *options))
    dz, dkl = (torch.randn_like(t) for t in op(moments, None, eps, prior, None, *options))
    torch.library.opcheck(backward, (dz, dkl, moments, None, eps, prior, None, *options, True))


def loss(moments, eps, prior):
    z, kl = fastvae.reparameterize_kl_moments(moments, eps=eps, prior=prior, logvar_bounds=(-1.0, 1.0))
    return z.sin().sum() + kl.square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_transforms_and_compiler(memory_format):
    moments = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=memory_format)
    eps, prior = torch.randn(3, 2, 5, 6, dtype=torch.float64), torch.randn(4, 1, 1, dtype=torch.float64)
    own = moments.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(own, eps, prior), own)
    torch.testing.assert_close(torch.func.grad(loss)(moments, eps, prior), expected)
    of_each = torch.vmap(lambda m, e: torch.func.grad(loss)(m[None], e[None], prior)[0])(moments, eps)
    torch.testing.assert_close(of_each, expected)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 2):
        own = moments[:rows].clone(memory_format=memory_format).requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(compiled(own, eps[:rows], prior), own)[0], expected[:rows])


def test_low_precision_and_autocast():
    moments, eps = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        own = moments.to(dtype).requires_grad_()
        z, kl = fastvae.reparameterize_kl_moments(own, eps=eps.to(dtype))
        exact = fastvae.reparameterize_kl_moments(own.double(), eps=eps.to(dtype).double())
        assert (z.dtype, kl.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(kl.double(), exact[1], rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad((z, kl), own, (z.detach(), kl.detach()))
        (exact_grad,) = torch.autograd.grad(exact, own, (z.double(), kl.double()))
        torch.testing.assert_close(grad, exact_grad, rtol=0.02, atol=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            assert fastvae.reparameterize_kl_moments(own, eps=eps.to(dtype))[0].dtype == torch.float32


def test_the_compiler_may_be_off():
    mu, logvar = torch.randn(3, 4), torch.randn(3, 4)
    with torch.compiler.set_stance("force_eager"):
        kl = fastvae.gaussian_kl(mu, logvar, backend="inductor")
    torch.testing.assert_close(kl, fastvae.gaussian_kl(mu, logvar))
