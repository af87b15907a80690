"""Measures of the information in the codes and of the distance between their marginal q(z) and the prior N(0, I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.devices import float64_on_cpu
from fastvae.functional import gaussian_kl, mmd_to_normal, total_correlation
from fastvae.kernel_sums import rbf_normal_mean_exponent, rbf_normal_self_exponent

# Codes with more latent dimensions are wide: pictures of them show a part of the dimensions, and their measures take fewer codes.
WIDE = 256
# Pairs of wide codes times latent dimensions, measured in a few seconds on one core: those of the 2,000 codes of an epoch at D = 256.
MOST_PAIRS = 2000**2 * WIDE
# Columns of a correlation matrix computed at a time.
COLUMNS = 1024


@float64_on_cpu
def information(mu: Tensor, logvar: Tensor, z: Tensor) -> tuple[float, float]:
    """I(x; z) and KL(q(z) ‖ Π_d q(z_d)) in nats, estimated from one code z_i ~ q(z|x_i) of each of N samples.

        I = 1/N·Σ_i [log q(z_i|x_i) − log q(z_i)],   q(z) = 1/N·Σ_j q(z|x_j)                                            (1)

    The estimate of I is at most log N: near that limit more samples would give a larger value. Too few samples also bias the second value,
    usually upwards. Computed in float64, which keeps the digits of narrow posteriors' densities.

    Args:
        mu: The means of the Gaussian posteriors, (N, D).
        logvar: Their log-variances, (N, D).
        z: The codes, (N, D).

    Source: Hoffman and Johnson 2016, "ELBO surgery"; Chen et al. 2018.
    """
    n, d = z.shape
    terms = total_correlation(z.detach().double(), mu.detach().double(), logvar.detach().double(), dataset_size=n)
    # The weights of each of the 1 + D densities sum to 1/N instead of 1.
    return float(terms.mutual_information) - math.log(n), float(terms.total_correlation) - (d - 1) * math.log(n)


@float64_on_cpu
def active_units(mu: Tensor, *, threshold: float = 0.01) -> int:
    """The number of latent dimensions whose mean varies with x: Var_x(mu_d) > threshold. Source: Burda, Grosse and Salakhutdinov 2016."""
    return int((mu.detach().double().var(0, correction=0) > threshold).sum())


@float64_on_cpu
def collapsed_units(mu: Tensor, logvar: Tensor, *, epsilon: float = 0.01, delta: float = 0.01) -> int:
    """The number of latent dimensions whose posterior is the prior: KL(q(z_d|x) ‖ N(0, 1)) < epsilon for all but a share `delta` of the x.

    Unlike `active_units` this takes the variance into account. Source: Lucas et al. 2019, "Don't blame the ELBO!", definition 1.
    """
    return int(((_kl(mu, logvar) < epsilon).double().mean(0) >= 1 - delta).sum())


@float64_on_cpu
def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """mean_i KL(q(z_d|x_i) ‖ N(0, 1)) in nats, shape (D,), of posteriors (N, D)."""
    return _kl(mu, logvar).mean(0)


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return gaussian_kl(mu.detach().double(), logvar.detach().double(), kl_dims=())


@float64_on_cpu
def marginal_summary(z: Tensor) -> dict[str, float]:
    """Differences between q(z) and N(0, I), from codes z (N, D).

    `mean` and `correlation` are the largest absolute values, 0 for the prior. `std_min` and `std_max` are 1 for the prior. `mmd` is the
    unbiased MMD² with bandwidth √D, which may be slightly negative.
    """
    z = z.detach().double()
    std = z.std(0, correction=0)
    centred = (z - z.mean(0)) / std.clamp_min(torch.finfo(z.dtype).tiny)
    return {
        "mean": float(z.mean(0).abs().max()),
        "std_min": float(std.min()),
        "std_max": float(std.max()),
        "correlation": float(torch.stack([_largest_correlation(centred, k) for k in range(0, z.shape[1], COLUMNS)]).max()),
        "mmd": float(mmd_to_normal(z.float(), bandwidth=math.sqrt(z.shape[1]), estimator="unbiased")),
    }


def _largest_correlation(centred: Tensor, start: int) -> Tensor:
    """The largest |correlation| of `COLUMNS` columns with others; all columns at a time would need memory O(D²)."""
    correlation = centred[:, start : start + COLUMNS].T @ centred / centred.shape[0]
    correlation.diagonal(start).zero_()
    return correlation.abs().max()


@float64_on_cpu
def mmd_terms(z: Tensor, *, bandwidth: float | None = None) -> dict[str, float]:
    """The three terms of the unbiased MMD² between codes z (N ≥ 2, D) and N(0, I), and the standardised MMD².

        mmd = within − 2·cross + prior,   within = mean_{i≠j} k(z_i, z_j), cross = mean_i E_y k(z_i, y), prior = E_yy' k(y, y')

    `standardised` is mmd divided by its standard deviation for N independent draws from the prior,

        √(2/(N(N−1))·E_yy' h(y, y')²),   h(y, y') = k(y, y') − E_y k(y, y') − E_y' k(y, y') + prior                      (2)

    so it can be compared between batch sizes, numbers of dimensions and bandwidths. For the prior it has mean 0 and variance 1; otherwise
    it grows with N. For the prior it is distributed as a weighted sum of χ², not normally: values of 3 or 4 are not rare.

    Args:
        z: The codes, (N, D).
        bandwidth: The bandwidth of the RBF kernel, √D by default.

    Source: Gretton et al. 2012, "A kernel two-sample test", section 5 and appendix B; the Gaussian integrals of Rustamov 2019.
    """
    n, d = z.shape
    z = z.detach().double()
    h = torch.tensor([math.sqrt(d) if bandwidth is None else bandwidth], dtype=z.dtype, device=z.device)
    mmd = float(mmd_to_normal(z, bandwidth=h, estimator="unbiased"))
    cross, prior = float(rbf_normal_mean_exponent(z, h).exp().mean()), float(rbf_normal_self_exponent(d, h).exp())
    # E k² is the integral of the prior's term at bandwidth h/√2; E_y (E_y' k)² is that of the square of a Gaussian.
    h2 = float(h) ** 2
    square = float(rbf_normal_self_exponent(d, h / math.sqrt(2)).exp())
    mean_square = math.exp(d * math.log(h2 / (h2 + 1)) + 0.5 * d * math.log((h2 + 1) / (h2 + 3)))
    variance = square - 2 * mean_square + prior**2
    return {
        "within": mmd + 2 * cross - prior,
        "cross": cross,
        "prior": prior,
        "standardised": mmd / math.sqrt(2 / (n * (n - 1)) * variance),
    }


@float64_on_cpu
def code_summary(mu: Tensor, logvar: Tensor | None, z: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """All measures of this module for posteriors (N, D) and one code z (N, D) of each: scalars, and vectors (D,).

    Measures that need logvar are left out if it is None (deterministic posterior), and those that need two codes if N is 1. With more than
    `WIDE` latent dimensions only the first √(`MOST_PAIRS`/D) codes are measured, as the time grows with N²·D.
    """
    if mu.shape[1] > WIDE:
        most = max(2, math.isqrt(MOST_PAIRS // mu.shape[1]))
        mu, logvar, z = mu[:most], None if logvar is None else logvar[:most], z[:most]
    scalars: dict[str, float] = {"evaluation_size": len(mu), "active_units": active_units(mu)}
    vectors = {"mu_variance": mu.detach().double().var(0, correction=0)}
    if logvar is not None:
        mutual_information, correlation = information(mu, logvar, z)
        scalars |= {
            "mutual_information": mutual_information,
            "total_correlation": correlation,
            "collapsed_units": collapsed_units(mu, logvar),
            "logvar_min": float(logvar.min()),
            "logvar_max": float(logvar.max()),
        }
        vectors["kl_dimension"] = kl_per_dimension(mu, logvar)
    if len(z) > 1:
        scalars |= {f"marginal_{name}": value for name, value in marginal_summary(z).items()}
        scalars |= {f"mmd_{name}": value for name, value in mmd_terms(z).items()}
    return scalars, vectors
