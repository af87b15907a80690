"""The Triton kernels of reparameterise + KL: every layout, parametrisation and prior against the dense reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.parametrisation import Parametrisation
from tests.cases import DEVICE, needs_triton
from tests.test_reparameterize_kl import philox_normal

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastvae.kernels import reparameterize_kl as kernels
from fastvae.kernels.config import RowConfig, row_config

pytestmark = [needs_triton, pytest.mark.interpreter]

# Some roundings of a term.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-8}


def channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


def with_gaps(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


class Case(NamedTuple):
    shape: tuple[int, ...]  # of the moments
    options: Mapping[str, Any] = MappingProxyType({})
    dim: int = 1
    kl_dims: Any = "all"
    lay_out: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
    prior: tuple[int, ...] | None = None  # its shape
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)


CASES = {
    "rows": Case((5, 12)),
    "rows, KL of each dimension": Case((5, 14), kl_dims=()),
    "rows, KL of the batch": Case((70, 6), kl_dims=0),
    "rows with gaps": Case((5, 12), lay_out=with_gaps),
    "sequences": Case((2, 3, 10), dim=2, kl_dims=(1, 2)),
    "sequences, KL of each element": Case((2, 3, 10), dim=2, kl_dims=-1, lay_out=with_gaps),
    "transposed sequences": Case((2, 6, 5), kl_dims=1, lay_out=transposed),
    "images": Case((3, 8, 4, 4), {"logvar_bounds": (-0.5, 0.7)}, dtypes=(*TOLERANCE,)),
    "images of several tiles": Case((2, 8, 32, 41), {"logvar_bounds": (-30.0, 20.0)}),
    "channels_last": Case((3, 8, 4, 4), {"logvar_bounds": (-2.0, -0.5)}, lay_out=channels_last, dtypes=(*TOLERANCE,)),
    "channels_last of several tiles": Case((2, 8, 30, 36), {"logvar_bounds": (-30.0, 20.0)}, lay_out=channels_last),
    "channels_last, KL of each pixel": Case((2, 8, 3, 3), kl_dims=1, lay_out=channels_last),
    "channels_last, KL of each channel": Case((2, 12, 5, 3), kl_dims=(2, 3), lay_out=channels_last),
    "one latent dimension": Case((5, 2), prior=(5, 2)),
    "one channel of tokens": Case((3, 4, 2), dim=2, prior=(2,)),
    "one channel, channels_last": Case((3, 2, 4, 4), lay_out=channels_last),
    "audio": Case((2, 16, 50), {"scale": "softplus", "scale_offset": 1e-4}, kl_dims=1),
    "audio, several tiles": Case((2, 300, 40), {"scale": "softplus", "scale_offset": 1e-4}, kl_dims=1, dtypes=(torch.float64,)),
    "video": Case((2, 8, 2, 3, 4)),
    "long rows": Case((2, 10_000), {"scale": "log_std"}),
    "an order of dimensions that is not (B, R, D)": Case((2, 3, 8, 4), kl_dims=(1, 3), dim=2, dtypes=(torch.float64,)),
    "variance and a prior": Case((5, 12), {"scale": "variance", "scale_offset": 5.0}, prior=(5, 12)),
    "a prior for all rows": Case((5, 12), {"scale": "logvar", "scale_offset": 1e-4}, prior=(12,)),
    "a prior for all images": Case((2, 8, 3, 4), {"scale": "std", "scale_offset": 5.0}, prior=(1, 8, 3, 4), lay_out=channels_last),
    "a prior for each channel": Case((2, 8, 3, 4), {"soft_clamp": 0.3}, prior=(8, 1, 1)),
    "soft clamp and a prior": Case(
        (2, 8, 3, 4), {"scale": "log_std", "scale_offset": 0.01, "soft_clamp": 1.5}, kl_dims=(), prior=(8, 3, 4)
    ),
    "a prior, several tiles": Case((1, 8, 24, 32), {"logvar_bounds": (-1.0, 1.0)}, lay_out=channels_last, prior=(8, 24, 32)),
}


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def evaluate(case: Case, backend: str, dtype: torch.dtype, to: torch.dtype) -> list[Tensor]:
    """z, KL, and the gradients to the moments and the prior's, of numbers in `dtype` computed in `to`."""
    half = [size // 2 if dim == case.dim else size for dim, size in enumerate(case.shape)]
    moments, prior, eps, dz = (t.to(dtype).to(to) for t in drawn(case.shape, case.prior or (), tuple(half), tuple(half)))
    moments = case.lay_out(moments).requires_grad_()
    options = case.options | {"prior": prior.requires_grad_() if case.prior else None}
    z, kl = fastvae.reparameterize_kl_moments(moments, dim=case.dim, eps=eps, kl_dims=case.kl_dims, backend=backend, **options)
    dkl = drawn(tuple(kl.shape))[0].to(dtype).to(kl.dtype)
    inputs = [moments, prior] if case.prior else [moments]
    return [z, kl, *torch.autograd.grad((z, kl), inputs, (dz, dkl))]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case = CASES[name]
    for dtype in case.dtypes:
        actual, exact = evaluate(case, "triton", dtype, dtype), evaluate(case, "reference", dtype, torch.float64)
        for a, e in zip(actual, exact, strict=True):
            assert a.shape == e.shape
            assert (a.double() - e).norm() <= TOLERANCE[dtype] * (e.norm() + 1), dtype
        assert actual[2].stride() == torch.empty_like(case.lay_out(drawn(case.shape)[0])).stride()


@pytest.mark.parametrize("tile", [(2, 8), (16, 4)], ids=str)
def test_results_do_not_depend_on_the_tiles(tile, monkeypatch):
    for name in ("channels_last", "audio", "sequences", "soft clamp and a prior"):
        expected = evaluate(CASES[name], "triton", torch.float64, torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "row_config", lambda sizes, itemsize, vector, *_: RowConfig(*tile, vector, 4))
            kernels.plan_of.cache_clear()
            actual = evaluate(CASES[name], "triton", torch.float64, torch.float64)
        kernels.plan_of.cache_clear()
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("prior", [False, True])
def test_kl_alone(prior):
    halves = drawn((3, 4, 5), (3, 4, 5), (5,), (5,))[: 4 if prior else 2]
    inputs = [t.requires_grad_() for t in halves]
    kl = fastvae.gaussian_kl(*inputs, kl_dims=(0, 2), scale="softplus", backend="triton")
    pair = (inputs[2], inputs[3]) if prior else None
    expected = reference.gaussian_kl(*inputs[:2], kl_dims=(0, 2), parametrisation=Parametrisation("softplus"), prior=pair)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    upstream = drawn((4,))[0]
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(torch.autograd.grad(kl, inputs, upstream), expected_gradients, rtol=1e-12, atol=1e-12)


def test_upstream_gradients_of_any_strides():
    """Such as that of a mean, which is one number in memory, and one in another memory format."""
    case = CASES["channels_last"]
    moments, eps = drawn(case.shape, (3, 4, 4, 4))
    results = []
    for backend in ("triton", "reference"):
        leaf = channels_last(moments).requires_grad_()
        each, _ = fastvae.reparameterize_kl_moments(leaf, eps=eps, backend=backend)
        _, kl = fastvae.reparameterize_kl_moments(leaf, eps=eps, kl_dims=(), backend=backend)
        results.append(torch.autograd.grad(each.mean() + kl.mean() + (each * eps).sum(), leaf))
        each, _ = fastvae.reparameterize_kl_moments(leaf, eps=eps, backend=backend)
        results[-1] += torch.autograd.grad(each.mean(), leaf)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("interpreter_warnings")
@pytest.mark.parametrize("name", ["channels_last", "audio", "a prior for all rows", "soft clamp and a prior", "variance and a prior"])
def test_nan_stays_visible(name):
    case = CASES[name]
    moments = drawn(case.shape)[0]
    half = case.shape[1] // 2
    for place in (0, half):
        broken = case.lay_out(moments.index_fill(0, torch.tensor([0], device=DEVICE), 1.0))
        broken[(1, place, *(0 for _ in case.shape[2:]))] = torch.nan
        leaf = broken.requires_grad_()
        prior = drawn(case.prior)[0] if case.prior else None
        z, kl = fastvae.reparameterize_kl_moments(
            leaf, eps=torch.ones_like(broken[:, :half]), kl_dims=case.kl_dims, prior=prior, backend="triton", **case.options
        )
        assert z.isnan().nonzero().tolist() == [[1, *(0 for _ in case.shape[1:])]]
        assert kl.isnan().sum() == 1
        (grad,) = torch.autograd.grad(z.sum() + kl.sum(), leaf)
        assert grad[(1, place, *(0 for _ in case.shape[2:]))].isnan()


def test_a_value_at_a_bound_has_its_gradient():
    s = torch.tensor([[-3.0, -2.0, -1.0, 0.5, 1.0]], device=DEVICE, requires_grad=True)
    kl = fastvae.gaussian_kl(torch.zeros_like(s), s, logvar_bounds=(-2.0, 0.5), backend="triton")
    (grad,) = torch.autograd.grad(kl.sum(), s)
    assert (grad != 0).tolist() == [[False, True, True, True, False]]


@triton.jit
def _functions(x_ptr, out_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, kernels.tanh(x))
    tl.store(out_ptr + COUNT + offs, kernels.softplus(x))
    tl.store(out_ptr + 2 * COUNT + offs, kernels.sigmoid(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_accurate_at_every_size(dtype):
    ends = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 20.0, 20.5, 1e4, -1e4], dtype=torch.float64)
    sizes = torch.logspace(-12, 1.9, 252, dtype=torch.float64)
    x = torch.cat([sizes, -sizes, ends]).to(dtype)
    out = torch.empty(3, len(x), dtype=dtype, device=DEVICE)
    _functions[(1,)](x.to(DEVICE), out, COUNT=len(x))
    exact = torch.stack([x.double().tanh(), torch.nn.functional.softplus(x.double(), threshold=40), x.double().sigmoid()])
    # An exponential of x has the rounding of x as a relative error, and softplus above 20 is x, as PyTorch's.
    eps = torch.finfo(dtype).eps
    bound = torch.stack([4 * eps + 0 * x, (4 + x.abs()) * eps + 3e-9 * (x > 20), (4 + x.abs()) * eps])
    error = (out.cpu().double() - exact).abs()
    assert (error <= bound.double() * exact.abs() + torch.finfo(dtype).tiny)[:, : len(x) - 8].all()
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["rows", "channels_last", "audio", "sequences, KL of each element", "long rows", "a prior for all rows"])
def test_backward_makes_the_noise_of_forward_from_the_seed(name):
    case = CASES[name]
    moments = case.lay_out(drawn(case.shape)[0]).requires_grad_()

    def sample(eps=None):
        options = case.options | {"kl_dims": case.kl_dims, "dim": case.dim, "backend": "triton"}
        generator = None if eps is not None else torch.Generator(DEVICE).manual_seed(5)
        return fastvae.reparameterize_kl_moments(moments, eps=eps, generator=generator, **options)

    z, kl = sample()
    standard = kl_free_noise(case, moments)
    torch.testing.assert_close((z, kl), sample(standard), rtol=1e-12, atol=1e-12)
    dz = drawn(tuple(z.shape))[0]
    torch.testing.assert_close(
        torch.autograd.grad(z, moments, dz), torch.autograd.grad(sample(standard)[0], moments, dz), rtol=1e-12, atol=0
    )


def kl_free_noise(case: Case, moments: Tensor) -> Tensor:
    """The ε of seed 5, from z where μ = 0 and log σ² = 0."""
    zeros = torch.zeros_like(moments) if moments.is_contiguous() else moments.detach().clone().zero_()
    if case.lay_out is with_gaps:
        zeros = with_gaps(torch.zeros_like(moments))
    generator = torch.Generator(DEVICE).manual_seed(5)
    return fastvae.reparameterize_kl_moments(zeros, dim=case.dim, generator=generator, kl_dims=case.kl_dims, backend="triton")[0]


def test_noise_is_a_function_of_seed_row_and_column_in_every_layout():
    """Row b·R + r of an image's pixels, or of a picture's channels."""
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5)).item()
    for name, rows in (("channels_last", lambda z: z.permute(0, 2, 3, 1).reshape(-1, 4)), ("audio", lambda z: z.reshape(-1, 50))):
        case = CASES[name]
        noise = rows(kl_free_noise(case, case.lay_out(torch.zeros(case.shape, device=DEVICE)))).cpu()
        torch.testing.assert_close(noise.double(), philox_normal(seed, 0, *noise.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kl_dims", [-1, ()], ids=str)
def test_gradcheck_of_a_seed_in_rows_with_gaps(kl_dims):
    """The second derivative takes ε from the seed by a call of its own."""
    code = drawn((3, 8))[0].requires_grad_()

    def function(code):
        generator = torch.Generator(DEVICE).manual_seed(5)
        return fastvae.reparameterize_kl(*code.chunk(2, 1), generator=generator, kl_dims=kl_dims, scale="softplus", backend="triton")

    assert torch.autograd.gradcheck(function, code, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, code, fast_mode=True)


def test_halves_of_small_alignment_move_in_vectors():
    """s of four bfloat16 channels starts at 8 bytes: vectors of 4, where Triton alone would load single numbers."""
    moments = channels_last(torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16, device=DEVICE))
    plans = []
    original = kernels.plan_of

    def plan_of(call):
        plans.append(original(call))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "plan_of", plan_of)
        fastvae.reparameterize_kl_moments(moments, backend="triton")
    assert [plan.config.vector for plan in plans] == [4]


@pytest.mark.parametrize(
    ("sizes", "sums", "tiles", "block"),
    [
        ((1, 8, 65_536), (False, True), 256, (1, 2048)),  # few long rows fill the device
        ((1, 1000, 4096), (False, True), 1000, (1, 4096)),  # one launch
        ((1, 1000, 4097), (False, True), 3000, (1, 2048)),
        ((1, 65_536, 64), (False, True), 2048, (32, 64)),
        ((64, 1024, 4), (True, True), 64, (1024, 4)),
        ((16, 4096, 4), (True, True), 128, (512, 4)),
        ((16, 64, 1024), (True, False), 512, (64, 32)),
        ((16, 128, 1024), (True, False), 512, (128, 32)),
        ((4096, 1, 7), (False, True), 4096, (1, 8)),
    ],
    ids=str,
)
def test_tiles(sizes, sums, tiles, block):
    config = row_config(sizes, 4, 4, *sums)
    b, r, d = sizes
    assert (config.block_n, config.block_d) == block
    assert b * -(-r // config.block_n) * -(-d // config.block_d) == tiles
    assert config.block_n * config.block_d <= 512 * config.num_warps


def test_gradient_of_an_expanded_channel():
    moments = torch.randn(4, 1, 5, 3, dtype=torch.float64, device=DEVICE).mT.expand(-1, 2, -1, -1).requires_grad_()
    eps, found = torch.randn(4, 1, 3, 5, dtype=torch.float64, device=DEVICE), []
    for backend in ("triton", "reference"):
        z, kl = fastvae.reparameterize_kl_moments(moments, eps=eps, backend=backend)
        found.append(torch.autograd.grad(z.sum() + kl.sum(), moments)[0])
    torch.testing.assert_close(*found)
