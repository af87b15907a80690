"""The dense reference against formulas written down independently in numpy, and against closed forms."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from fastvae import checks, reference
from fastvae.radial import KERNEL_NAMES, KERNELS, Polynomial, RationalQuadratic, Riesz
from tests.cases import Copies


def numpy_mmd(x, y, bandwidths, weights, unbiased):
    def mean_kernel(a, b, drop_diagonal):
        total = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if drop_diagonal and i == j:
                    continue
                total += sum(
                    w * math.exp(-float(np.sum((a[i] - b[j]) ** 2)) / (2 * h * h)) for h, w in zip(bandwidths, weights, strict=True)
                )
        return total / (len(a) * (len(b) - 1) if drop_diagonal else len(a) * len(b))

    return mean_kernel(x, x, unbiased) + mean_kernel(y, y, unbiased) - 2 * mean_kernel(x, y, False)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(("bandwidths", "weights"), [((1.3,), None), ((0.5, 2.0, 7.0), None), ((0.5, 2.0), (0.2, 3.0))])
def test_mmd_is_the_double_sum(estimator, bandwidths, weights):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5
    value = reference.mmd(torch.tensor(x), torch.tensor(y), bandwidth=bandwidths, bandwidth_weights=weights, estimator=estimator)
    assert value.item() == pytest.approx(numpy_mmd(x, y, bandwidths, weights or (1,) * len(bandwidths), estimator == "unbiased"), rel=1e-12)


def test_sample_weights_are_multiplicities():
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    repeated = torch.cat([x, x[:1], x[:1]])
    weights = torch.tensor([3, 1, 1, 1], dtype=torch.float64) / 6
    torch.testing.assert_close(reference.mmd(x, y, x_weights=weights), reference.mmd(repeated, y))


def test_unbiased_weights_reduce_to_the_u_statistic():
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    equal = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(reference.mmd(x, y, estimator="unbiased", x_weights=equal), reference.mmd(x, y, estimator="unbiased"))


def test_closed_form_prior_by_quadrature():
    """One dimension: both expectations over N(0, 1) by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    x, h = np.array([-1.2, 0.3, 2.0]), 0.8
    k = np.exp(-((x[:, None] - nodes[None]) ** 2) / (2 * h * h))
    within = np.exp(-((x[:, None] - x[None]) ** 2) / (2 * h * h)).mean()
    prior = weights @ np.exp(-((nodes[:, None] - nodes[None]) ** 2) / (2 * h * h)) @ weights
    expected = within - 2 * (k @ weights).mean() + prior
    assert reference.mmd_to_normal(torch.tensor(x)[:, None], bandwidth=h).item() == pytest.approx(expected, rel=1e-10)


def test_closed_form_prior_is_the_limit_of_samples():
    x = torch.randn(40, 3, dtype=torch.float64) * 0.5 + 0.4
    y = torch.randn(4000, 3, dtype=torch.float64)
    sampled = reference.mmd(x, y, bandwidth=1.5).item()
    assert reference.mmd_to_normal(x, bandwidth=1.5).item() == pytest.approx(sampled, abs=3e-3)


def test_two_gaussians_have_the_known_mmd():
    """E over N(0, 1) and N(μ, 1) of the RBF kernel: both are Gaussian integrals of variance h² + 2."""
    mu, h = 0.7, 1.1
    x, y = torch.randn(3000, 1, dtype=torch.float64), torch.randn(3000, 1, dtype=torch.float64) + mu
    same = math.sqrt(h * h / (h * h + 2))
    expected = 2 * same * (1 - math.exp(-mu * mu / (2 * (h * h + 2))))
    assert reference.mmd(x, y, bandwidth=h, estimator="unbiased").item() == pytest.approx(expected, abs=0.02)


def matern52(u):
    return (1 + u + u * u / 3) * math.exp(-u)


# Each kernel of h in numpy, of one x and one y.
FORMULAS = {
    "imq": lambda x, y, h: h * h / (h * h + np.sum((x - y) ** 2)),
    "rational_quadratic": lambda x, y, h: 1 / (1 + np.sum((x - y) ** 2) / (2 * h * h)),
    "laplace": lambda x, y, h: math.exp(-np.linalg.norm(x - y) / h),
    "matern32": lambda x, y, h: (1 + math.sqrt(3) * np.linalg.norm(x - y) / h) * math.exp(-math.sqrt(3) * np.linalg.norm(x - y) / h),
    "matern52": lambda x, y, h: matern52(math.sqrt(5) * np.linalg.norm(x - y) / h),
    "energy": lambda x, y, h: -np.linalg.norm(x - y) / h,
    "riesz": lambda x, y, h: -((np.linalg.norm(x - y) / h) ** 1.5),
    "polynomial": lambda x, y, h: (x @ y / (len(x) * h * h) + 1) ** 3,
    Riesz(0.5): lambda x, y, h: -((np.linalg.norm(x - y) / h) ** 0.5),
    RationalQuadratic(0.5): lambda x, y, h: 1 / math.sqrt(1 + np.sum((x - y) ** 2) / (h * h)),
    Polynomial(degree=2, coef0=0.5): lambda x, y, h: (x @ y / (len(x) * h * h) + 0.5) ** 2,
}


@pytest.mark.parametrize("kernel", FORMULAS)
def test_kernels_are_their_formulas(kernel):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + 0.5

    def mean(a, b):
        return np.mean([[FORMULAS[kernel](u, v, 1.3) for v in b] for u in a])

    def linear(u, v, s, t):
        k = FORMULAS[kernel]
        return k(u, v, 1.3) + k(s, t, 1.3) - k(u, t, 1.3) - k(v, s, 1.3)

    tensors = torch.tensor(x), torch.tensor(y)
    biased = reference.mmd(*tensors, bandwidth=1.3, kernel=kernel).item()
    assert biased == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-10)
    neighbours = np.mean([linear(x[n], x[n + 1], y[n], y[n + 1]) for n in (0, 2, 4)])
    assert reference.mmd(*tensors, bandwidth=1.3, kernel=kernel, estimator="linear").item() == pytest.approx(neighbours, rel=1e-10)


def test_every_kernel_has_a_formula_and_a_name_for_type_checkers():
    assert {name for name in FORMULAS if isinstance(name, str)} | {"rbf"} == set(KERNELS)
    assert set(get_args(checks.KernelName)) == set(KERNEL_NAMES)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS.values() if kernel.radial], ids=repr)
def test_derivatives_at_distance_zero_are_their_limits(kernel):
    """φ' at t = 0, or 0 where it is unbounded; φ'' is finite, as rows at distance zero multiply it by zero."""
    t = torch.tensor([0.0, 1e-12], dtype=torch.float64, requires_grad=True)
    [slopes] = torch.autograd.grad(kernel.phi(t).sum(), t, create_graph=True)
    assert slopes[0].item() == pytest.approx(0 if kernel.takes_distance else slopes[1].item(), rel=1e-5)
    if slopes.requires_grad:
        [curvatures] = torch.autograd.grad(slopes.sum(), t)
        assert curvatures.isfinite().all()


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS.values() if kernel.positive], ids=repr)
def test_logarithms(kernel):
    """With the slope of log φ, also at distance zero; finite where φ underflows."""
    t = torch.tensor([0.0, 1e-12, 1e-4, 9e-4, 0.0017, 0.3, 4.0, 50.0], dtype=torch.float64, requires_grad=True)
    log = kernel.log_phi(t)
    torch.testing.assert_close(log.exp(), kernel.phi(t), rtol=1e-13, atol=0)
    slopes, expected = (torch.autograd.grad(value.sum(), t)[0] for value in (log, kernel.phi(t).log()))
    torch.testing.assert_close(slopes, expected, rtol=1e-10, atol=0)
    assert -math.inf < kernel.log_phi(torch.tensor(1e12, dtype=torch.float64)) < 0


@pytest.mark.parametrize("bandwidth", [1.3, (0.5, 2.0), np.array([0.5, 2.0]), torch.tensor([0.5, 2.0], dtype=torch.float64, device="cpu")])
def test_numbers_are_not_copied_to_a_device(bandwidth):
    x = torch.empty(6, 2, device="meta")
    options = {"bandwidth": bandwidth, "bandwidth_weights": None if isinstance(bandwidth, float) else torch.ones(2, device="cpu")}
    with Copies() as copies:
        for kernel in KERNELS:
            reference.mmd(x, x, kernel=kernel, **options)
            reference.mmd(x, x, kernel=kernel, estimator="linear", **options)
            reference.kernel_matmul(x, x, x, kernel=kernel, **options)
            reference.quadratic_form(x, x, kernel=kernel, **options)
        reference.mmd_to_normal(x, **options)
    assert not copies.found


def test_a_learned_bandwidth_has_its_gradient_on_another_device():
    h = torch.ones(2, device="cpu", requires_grad=True)
    assert reference.mmd(torch.empty(6, 2, device="meta"), torch.empty(4, 2, device="meta"), bandwidth=h).requires_grad
