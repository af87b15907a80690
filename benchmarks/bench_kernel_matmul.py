"""Microbenchmarks of K(x, y)·v: pytest benchmarks --benchmark-only. The value is checked before it is timed."""

import pytest
import torch

import fastvae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matrix_product(x, y, v, h):
    """The usual code, which keeps the N×M array."""
    return torch.exp(torch.cdist(x, y).square() / (-2 * h * h)) @ v


def fused_product(x, y, v, h):
    return fastvae.kernel_matmul(x, y, v, bandwidth=h)


@pytest.mark.parametrize("provider", [fused_product, matrix_product], ids=["fastvae", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d", "c"), [(4096, 3, 1), (4096, 16, 16), (4096, 64, 64)])
def test_kernel_matmul(benchmark, provider, gradient, n, d, c):
    generator = torch.Generator().manual_seed(0)
    x, y, v = (torch.randn(n, features, generator=generator).to(DEVICE) for features in (d, d, c))
    h = d**0.5
    torch.testing.assert_close(provider(x, y, v, h), matrix_product(x.double(), y.double(), v.double(), h).float(), rtol=1e-3, atol=1e-2)
    x.requires_grad_(gradient)

    def step():
        value = provider(x, y, v, h).square().mean()
        if gradient:
            x.grad = None
            value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
