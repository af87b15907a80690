"""Microbenchmarks of MMD: pytest benchmarks/bench_mmd.py --benchmark-only. The value is checked before it is timed."""

import pytest
import torch

from benchmarks.measure import DEVICE, synchronize
from benchmarks.providers import bandwidths_of, fused, matrix


@pytest.mark.parametrize("provider", [fused, matrix], ids=["fastvae", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize("bandwidths", [1, 5])
@pytest.mark.parametrize(("n", "d"), [(2048, 2), (2048, 16), (2048, 64), (2048, 256)])
def test_mmd(benchmark, provider, gradient, bandwidths, n, d):
    h = bandwidths_of(d, bandwidths)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=generator).to(DEVICE), 1.1 * torch.randn(n, d, generator=generator).to(DEVICE)
    assert provider(x, y, h).item() == pytest.approx(matrix(x.double(), y.double(), h).item(), rel=1e-3)
    x.requires_grad_(gradient)

    def step():
        value = provider(x, y, h)
        if gradient:
            x.grad = None
            value.backward()
        synchronize(DEVICE)

    benchmark(step)
