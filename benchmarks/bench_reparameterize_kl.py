"""Microbenchmarks of z and KL: pytest benchmarks/bench_reparameterize_kl.py --benchmark-only. The value is checked before it is timed."""

import pytest
import torch

import fastvae
from benchmarks.measure import DEVICE, synchronize
from fastvae import reference


@pytest.mark.parametrize("provider", [fastvae.reparameterize_kl, reference.reparameterize_kl], ids=["fastvae", "eager"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d"), [(4096, 64), (65_536, 64), (16_384, 512)])
def test_reparameterize_kl(benchmark, provider, gradient, n, d):
    generator = torch.Generator().manual_seed(0)
    mu, logvar, eps, dz = (torch.randn(n, d, generator=generator).to(DEVICE) for _ in range(4))
    exact = reference.reparameterize_kl(mu.double(), logvar.double(), eps=eps.double())
    for actual, expected in zip(provider(mu, logvar, eps=eps), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    dkl = dz[:, 0].contiguous()
    mu.requires_grad_(gradient)
    logvar.requires_grad_(gradient)

    def step():
        z, kl = provider(mu, logvar, eps=eps)
        if gradient:
            torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl))
        synchronize(DEVICE)

    benchmark(step)
