"""Microbenchmarks of the MMD between groups: pytest benchmarks --benchmark-only. Its measure is one MMD over as many pairs of rows."""

import pytest
import torch

import fastvae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = 19


def group_by_group(z, labels, h):
    """What users write: an MMD for each pair of groups."""
    members = [z[labels == g] for g in range(GROUPS)]
    values = [fastvae.mmd(members[g], members[k], bandwidth=h) for g in range(GROUPS) for k in range(g)]
    return torch.stack(values).mean()


def one_sweep(z, labels, h):
    return fastvae.group_mmd(z, labels, num_groups=GROUPS, bandwidth=h).mean()


def pooled(z, labels, h):
    return fastvae.mmd(z[: len(z) // 2], z[len(z) // 2 :], bandwidth=h)


@pytest.mark.parametrize("provider", [one_sweep, group_by_group, pooled])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
@pytest.mark.parametrize(("n", "d"), [(8192, 2), (8192, 16), (8192, 64), (20000, 64)])
def test_group_mmd(benchmark, provider, gradient, n, d):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator).to(DEVICE)
    labels = torch.randint(GROUPS, (n,), generator=generator).to(DEVICE)
    h = d**0.5
    assert one_sweep(z, labels, h).item() == pytest.approx(group_by_group(z.double(), labels, h).item(), rel=1e-4)
    z.requires_grad_(gradient)

    def step():
        value = provider(z, labels, h)
        if gradient:
            z.grad = None
            value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
