"""Microbenchmarks of MMD: pytest benchmarks --benchmark-only. The value is checked before it is timed."""

import pytest
import torch

import fastvae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2048, 2), (2048, 16), (2048, 64), (2048, 256)]
LADDER = (0.5, 0.5**0.5, 1.0, 2**0.5, 2.0)


def matrix_mmd(x, y, bandwidths):
    """The usual code: one matrix product, an N×M array for each bandwidth."""
    z = torch.cat([x, y])
    norms = z.square().sum(1)
    d2 = (norms[:, None] + norms[None, :] - 2 * z @ z.T).clamp_min(0)
    k, n = sum(torch.exp(d2 / (-2 * h * h)) for h in bandwidths), len(x)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


def fused_mmd(x, y, bandwidths):
    return fastvae.mmd(x, y, bandwidth=bandwidths)


@pytest.mark.parametrize("provider", [fused_mmd, matrix_mmd], ids=["fastvae", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize("bandwidths", [1, 5])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_mmd(benchmark, provider, gradient, bandwidths, n, d):
    scales = (1.0,) if bandwidths == 1 else LADDER
    h = tuple(scale * d**0.5 for scale in scales)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=generator).to(DEVICE), 1.1 * torch.randn(n, d, generator=generator).to(DEVICE)
    exact = matrix_mmd(x.double(), y.double(), h).item()
    assert provider(x, y, h).item() == pytest.approx(exact, rel=1e-3)
    x.requires_grad_(gradient)

    def step():
        value = provider(x, y, h)
        if gradient:
            x.grad = None
            value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
