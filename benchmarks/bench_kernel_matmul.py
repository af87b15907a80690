"""Microbenchmarks of K(x, y)·v: pytest benchmarks/bench_kernel_matmul.py --benchmark-only. The value is checked before it is timed."""

import pytest
import torch

import fastvae
from benchmarks.measure import DEVICE, synchronize
from benchmarks.providers import eager_kernel_matmul


def fused_product(x, y, v, h):
    return fastvae.kernel_matmul(x, y, v, bandwidth=h)


@pytest.mark.parametrize("provider", [fused_product, eager_kernel_matmul], ids=["fastvae", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d", "c"), [(4096, 3, 1), (4096, 16, 16), (4096, 64, 64)])
def test_kernel_matmul(benchmark, provider, gradient, n, d, c):
    generator = torch.Generator().manual_seed(0)
    x, y, v = (torch.randn(n, features, generator=generator).to(DEVICE) for features in (d, d, c))
    h = d**0.5
    exact = eager_kernel_matmul(x.double(), y.double(), v.double(), h)
    torch.testing.assert_close(provider(x, y, v, h), exact.float(), rtol=1e-3, atol=1e-2)
    x.requires_grad_(gradient)

    def step():
        value = provider(x, y, v, h).square().mean()
        if gradient:
            x.grad = None
            value.backward()
        synchronize(DEVICE)

    benchmark(step)
