"""The keys by which `fastvae.kernels.launch.launch` finds a compiled kernel: they tell apart all that Triton compiles apart."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import fastvae
from fastvae.radial import KERNELS, RationalQuadratic
from tests.fake_cuda import fake_cuda, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

MODULES = (
    "prepare",
    "mmd",
    "kernel_matmul",
    "quadratic_form",
    "sigreg",
    "total_correlation",
    "reparameterize_kl",
    "ranked_squared_distance",
)
SIZES = [(1, 1), (5, 2), (7, 1), (8, 16), (20, 17), (33, 100), (64, 7), (300, 64)]  # features and columns


def compiled_apart(arg):
    """What Triton compiles apart of an argument."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple(map(compiled_apart, arg))
    return type(arg) if isinstance(arg, (bool, float, type(None))) else ("integer", -(2**31) <= arg < 2**31)


def integers(fn, args):
    """Of the integers that `fn` is compiled apart for."""
    apart = {param.name for param in fn.params if not param.is_constexpr and not param.do_not_specialize}
    named = zip(fn.arg_names, args, strict=False)
    return tuple((name, arg == 1, arg % 16 == 0) for name, arg in named if name in apart and type(arg) is int)


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime.jit import JITFunction

    known, described = {}, []

    def launch(fn, key, device, grid, args, constants):
        compiled = JITFunction(fn.fn, **getattr(fn, "kwargs", {})) if not isinstance(fn, JITFunction) else fn
        found = (
            tuple(sorted(constants().items())), tuple(map(compiled_apart, args)), integers(compiled, args)
        )  # fmt: skip
        described.append(fn.fn.__name__)
        if fn.fn.__name__ == "factors_kernel":
            # Which of both it reads is known when it runs: one name is of one type.
            assert args[0].dtype == args[1].dtype
        assert known.setdefault((fn.fn.__name__, device, key), found) == found, f"{fn.fn.__name__}: one key of two kernels"

    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(f"fastvae.kernels.{name}"), "launch", launch)
    return described


def calls(dtype, d, c):
    n, m = 70, 33

    def rows(*shape):
        return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)

    def aside(*shape):
        """Rows that start at no multiple of 16 bytes."""
        return torch.empty(2 * shape[0] * shape[1] + 1, dtype=dtype, device="cuda")[1 : shape[0] * shape[1] + 1].view(shape)

    def image(*shape):
        """In the channels_last format."""
        return rows(*shape[:-3], *shape[-2:], shape[-3]).movedim(-1, -3)

    for kernel in (*KERNELS, RationalQuadratic(100.0)):
        yield lambda kernel=kernel: fastvae.mmd(rows(n, d), rows(m, d), kernel=kernel)
    for bandwidth, estimator in itertools.product(([1.0, 2.0], [1.0, 3.0, 5.0]), ("biased", "unbiased")):
        yield lambda h=bandwidth, e=estimator: fastvae.mmd(rows(n, d), rows(m, d), bandwidth=h, estimator=e)
    for precision in ("highest", "high", "medium", "ieee"):
        yield lambda p=precision: fastvae.mmd(rows(n, d), rows(m, d).detach(), precision=p)
        yield lambda p=precision: fastvae.kernel_matmul(rows(n, d), rows(m, d), rows(m, c), precision=p)
    yield lambda: fastvae.mmd(rows(n, d), rows(1000, d).detach())
    yield lambda: fastvae.mmd(aside(n, d), rows(m, d), x_weights=torch.empty(n, dtype=dtype, device="cuda"))
    yield lambda: fastvae.mmd(rows(3, n, d), rows(3, m, d)).sum()
    yield lambda: fastvae.mmd(rows(n, d), rows(m, d), bandwidth=torch.ones(2, device="cuda", requires_grad=True))
    yield lambda: fastvae.mmd_to_normal(rows(n, d), bandwidth=[1.0, 2.0])
    yield lambda: fastvae.kernel_matmul(rows(n, d), rows(m, d).detach(), aside(m, c), kernel="laplace")
    yield lambda: fastvae.group_mmd(rows(n, d), torch.empty(n, c, device="cuda")).mean()
    for estimator in ("biased", "unbiased"):
        yield lambda e=estimator: fastvae.group_mmd(rows(n, d), torch.zeros(n, dtype=int, device="cuda"), num_groups=c, estimator=e).mean()
    for estimator in ("minibatch_weighted", "minibatch_stratified"):
        yield lambda e=estimator: sum(fastvae.total_correlation(*(rows(n, d) for _ in range(3)), dataset_size=1000, estimator=e))
    for precision, points in (("highest", 9), ("high", 9), ("medium", 7), ("ieee", 7)):
        yield lambda p=precision, k=points: fastvae.sigreg(rows(n, d), num_slices=c, num_points=k, precision=p)
    yield lambda: fastvae.sigreg(aside(n, d), num_slices=c, num_points=10, t_min=-3.0, scale_by_n=False)
    yield lambda: sum(t.sum() for t in fastvae.reparameterize_kl(rows(n, d), rows(n, d)))
    yield lambda: sum(t.sum() for t in fastvae.reparameterize_kl(rows(n, d), aside(n, d), eps=rows(n, d).detach()))
    for prior, options in ((False, {}), (True, {"scale": "softplus", "soft_clamp": 2.0}), (True, {"logvar_bounds": (-30, 20)})):
        for dims in ("all", 1, ()):
            given = {"kl_dims": dims, "prior": image(2 * c, d, 2) if prior else None, **options}
            yield lambda given=given: sum(t.sum() for t in fastvae.reparameterize_kl_moments(image(3, 2 * c, d, 2), **given))
    yield lambda: fastvae.gaussian_kl(rows(n, d), aside(n, d)).sum()
    yield lambda: fastvae.gaussian_kl(rows(n, d), rows(n, d), rows(n, d), rows(n, d).detach(), kl_dims=()).sum()
    yield lambda: fastvae.median_bandwidth(rows(n, d).detach())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_key_is_of_one_kernel(dtype, launches):
    with fake_cuda():
        for d, c in SIZES:
            for call in calls(dtype, d, c):
                result = call()
                if result.requires_grad:
                    result.sum().backward()
    assert len(launches) > 1000


def test_one_key_of_two_kernels_is_seen(monkeypatch, launches):
    from fastvae.kernels import prepare

    monkeypatch.setattr(prepare, "tensor_key", lambda *tensors: ())
    with fake_cuda():
        fastvae.mmd(*(torch.empty(9, 2, device="cuda") for _ in range(2)))
        halves = [torch.empty(9, 2, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        with pytest.raises(AssertionError, match="one key of two kernels"):
            fastvae.mmd(*halves)


def test_integers_of_tuples_are_compiled_unspecialised():
    """Triton would compile 1 and multiples of 16 apart, which no key tells apart."""
    from fastvae.kernels.launch import _without_specialisation
    from fastvae.kernels.prepare import SweptRows

    t = torch.empty(3)
    rows, (x, numbers), n = (_without_specialisation(arg) for arg in (SweptRows(0, 1, 16, 1 << 31), (t, (0.5, 48)), 64))
    assert type(rows) is SweptRows
    assert x is t
    assert numbers[0] == 0.5
    assert n == 64
    for value in (*rows, numbers[1]):
        assert value != 1
        assert value % 16
    assert [value >= 1 << 31 for value in rows] == [False, False, False, True]


def test_a_grid_that_cuda_does_not_take_is_refused():
    """In a sentence, and not as an invalid argument of CUDA."""
    from fastvae.kernels.launch import launch
    from fastvae.kernels.total_correlation import marginal_kernel

    with pytest.raises(ValueError, match=r"^marginal_kernel must have at most 65535 blocks of rows, .* got 70000: pass fewer$"):
        launch(marginal_kernel, (), torch.device("cpu"), (1, 70_000, 1), (), dict)


def test_a_kernel_without_a_family_is_refused():
    from fastvae.kernels.families import family_of
    from fastvae.radial import Kernel

    with pytest.raises(NotImplementedError, match=r"Kernel has no Triton implementation: add it to kernels/families\.py"):
        family_of(Kernel())
