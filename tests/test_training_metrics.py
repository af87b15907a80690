import math

import numpy as np
import pytest
import torch

from fastvae import mmd_to_normal
from fastvae.training import metrics
from fastvae.training.metrics import (
    active_units,
    code_summary,
    collapsed_units,
    information,
    kl_per_dimension,
    marginal_summary,
    mmd_terms,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mutual_information(mu, logvar):
    eps = torch.randn(mu.shape, dtype=torch.float64, generator=generator(1))
    return information(mu, logvar, mu + (logvar.double() / 2).exp() * eps)[0]


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_mutual_information_of_a_gaussian_channel(dims, sigma):
    """x ~ N(0, I) and z = x + sigma·noise share ½·D·log(1 + 1/sigma²) nats."""
    mu = torch.randn(6000, dims, generator=generator())
    logvar = torch.full_like(mu, 2 * math.log(sigma))
    expected = 0.5 * dims * math.log1p(1 / sigma**2)
    assert mutual_information(mu, logvar) == pytest.approx(expected, rel=0.05, abs=0.02)


def test_mutual_information_is_the_sum_over_all_pairs():
    mu, logvar = torch.randn(2, 40, 3, generator=generator(), dtype=torch.float64)
    eps = torch.randn(40, 3, generator=generator(1), dtype=torch.float64)
    m, v, z = mu.numpy(), np.exp(logvar.numpy()), (mu + (logvar / 2).exp() * eps).numpy()
    density = np.array(
        [[np.prod(np.exp(-((z[i] - m[j]) ** 2) / (2 * v[j])) / np.sqrt(2 * np.pi * v[j])) for j in range(40)] for i in range(40)]
    )
    expected = np.mean(np.log(np.diag(density)) - np.log(density.mean(1)))
    assert mutual_information(mu, logvar) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("logvar", [-20.0, -60.0])
def test_codes_that_tell_every_sample_apart_reach_log_n(logvar):
    mu = torch.randn(500, 4, generator=generator())
    assert mutual_information(mu, torch.full_like(mu, logvar)) == pytest.approx(math.log(500), rel=1e-9)


@pytest.mark.parametrize("logvar", [-10.0, -30.0, -40.0, -60.0, -120.0])
def test_the_same_x_twice_is_one_thing_to_tell(logvar):
    mu = torch.tensor([[0.5, -1.0], [1.0, 2.0]]).repeat(50, 1)
    narrow = torch.full_like(mu, logvar)
    assert mutual_information(mu, narrow) == pytest.approx(math.log(2), rel=1e-9)
    assert information(mu, narrow, mu) == pytest.approx((math.log(2), math.log(2)), rel=1e-9)


def test_a_posterior_that_ignores_x_has_none():
    mu = torch.zeros(500, 4)
    assert mutual_information(mu, mu) == pytest.approx(0, abs=1e-12)
    assert active_units(mu) == 0
    assert collapsed_units(mu, mu) == 4


def test_units_are_counted_one_by_one():
    x = torch.randn(4000, 1, generator=generator())
    mu = x * torch.tensor([1.0, 0.11, 0.09, 0.0])
    logvar = torch.zeros(4000, 4)
    logvar[:2000, 3] = -2.0
    assert active_units(mu) == 2
    # The second's KL is 0.006·x², within 0.01 only for |x| < 1.3; the third's 0.004·x² for |x| < 1.6; the last's variance moves with x.
    assert collapsed_units(mu, logvar) == 0
    assert collapsed_units(mu, logvar, epsilon=0.2) == 2


def test_marginal_summary_of_the_prior_and_away_from_it():
    z = torch.randn(5000, 4, generator=generator())
    prior = marginal_summary(z)
    assert prior["mean"] < 0.06
    assert 0.96 < prior["std_min"] < prior["std_max"] < 1.04
    assert prior["correlation"] < 0.06
    assert abs(prior["mmd"]) < 1e-3
    away = marginal_summary(torch.stack([2 * z[:, 0], z[:, 1] + 1, z[:, 1], 0.5 * z[:, 3]], dim=1))
    assert away["mean"] == pytest.approx(1, abs=0.06)
    assert away["std_min"] == pytest.approx(0.5, abs=0.04)
    assert away["std_max"] == pytest.approx(2, abs=0.1)
    assert away["correlation"] == pytest.approx(1, abs=1e-6)
    assert away["mmd"] > 10 * abs(prior["mmd"])


def test_kl_of_each_dimension():
    mu, logvar = torch.randn(2, 40, 3, generator=generator(), dtype=torch.float64)
    m, v = mu.numpy(), logvar.numpy()
    np.testing.assert_allclose(kl_per_dimension(mu, logvar), 0.5 * (m**2 + np.exp(v) - 1 - v).mean(0))


@pytest.mark.parametrize("h", [None, 0.7])
def test_the_three_terms_of_the_mmd(h):
    z = torch.randn(60, 3, generator=generator()) + 0.3
    terms = mmd_terms(z, bandwidth=h)
    h = math.sqrt(3) if h is None else h
    k = torch.exp(-torch.cdist(z, z).square() / (2 * h * h))
    assert terms["within"] == pytest.approx((k.sum() - k.trace()).item() / (60 * 59), rel=1e-5)
    y, other = torch.randn(2, 200_000, 3, generator=generator(1))
    prior = torch.exp(-(y - other).square().sum(1) / (2 * h * h)).mean().item()
    cross = torch.exp(-torch.cdist(z, y[:20_000]).square() / (2 * h * h)).mean().item()
    assert terms["prior"] == pytest.approx(prior, rel=0.01)
    assert terms["cross"] == pytest.approx(cross, rel=0.01)
    mmd = mmd_to_normal(z, bandwidth=h, estimator="unbiased").item()
    assert terms["within"] - 2 * terms["cross"] + terms["prior"] == pytest.approx(mmd, abs=1e-6)


@pytest.mark.parametrize(("n", "d", "h"), [(50, 2, None), (200, 2, 0.5), (50, 64, None), (200, 1000, None)])
def test_the_standardised_mmd_has_variance_one_at_the_prior(n, d, h):
    g = generator()
    values = np.array([mmd_terms(torch.randn(n, d, generator=g), bandwidth=h)["standardised"] for _ in range(400)])
    assert abs(values.mean()) < 4 / 20
    assert values.std() == pytest.approx(1, abs=0.2)
    assert mmd_terms(torch.randn(n, d, generator=g) * 1.5, bandwidth=h)["standardised"] > 4


def test_code_summary_leaves_out_what_is_not_there():
    mu, logvar = torch.randn(2, 30, 4, generator=generator())
    scalars, vectors = code_summary(mu, logvar, mu)
    assert scalars["logvar_min"] == logvar.min()
    assert scalars["logvar_max"] == logvar.max()
    assert {name: tuple(vector.shape) for name, vector in vectors.items()} == {"mu_variance": (4,), "kl_dimension": (4,)}
    scalars, vectors = code_summary(mu, None, mu)
    assert "mutual_information" not in scalars
    assert set(vectors) == {"mu_variance"}
    scalars, _ = code_summary(mu[:1], logvar[:1], mu[:1])
    assert "mmd_standardised" not in scalars
    assert all(math.isfinite(value) for value in scalars.values())


def test_wide_codes_are_measured_within_seconds(monkeypatch):
    monkeypatch.setattr(metrics, "WIDE", 8)
    monkeypatch.setattr(metrics, "MOST_PAIRS", 900 * 9 + 1)
    mu, logvar = torch.randn(2, 50, 9, generator=generator())
    scalars, vectors = code_summary(mu, logvar, mu)
    assert scalars["evaluation_size"] == 30
    expected, _ = code_summary(mu[:30], logvar[:30], mu[:30])
    assert scalars == expected
    assert len(vectors["kl_dimension"]) == 9
    assert code_summary(mu[:, :8], None, mu[:, :8])[0]["evaluation_size"] == 50
    monkeypatch.setattr(metrics, "COLUMNS", 4)
    assert marginal_summary(mu)["correlation"] == pytest.approx(np.abs(np.corrcoef(mu.T) - np.eye(9)).max())


def test_total_correlation_of_a_gaussian():
    """Codes N(0, S) with correlation r in two dimensions share −½·log(1 − r²) nats."""
    r, n = 0.8, 4000
    noise = torch.randn(2, n, 2, generator=generator(), dtype=torch.float64)
    root = torch.linalg.cholesky(torch.tensor([[1, r], [r, 1]], dtype=torch.float64) - 0.09 * torch.eye(2))
    mu = noise[0] @ root.T
    logvar = torch.full_like(mu, math.log(0.09))
    measured = information(mu, logvar, mu + 0.3 * noise[1])[1]
    assert measured == pytest.approx(-0.5 * math.log(1 - r**2), abs=0.05)
    alone = noise[0] * math.sqrt(0.91)
    assert information(alone, logvar, alone + 0.3 * noise[1])[1] == pytest.approx(0, abs=0.05)
