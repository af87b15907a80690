"""The public functions: check, canonicalise, apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.ops.common import accumulation_dtype
from fastvae.ops.mmd import apply_mmd
from fastvae.ops.reparameterize_kl import apply_reparameterize_kl


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: str = "rbf",
    estimator: str = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy between two samples, in memory O((N + M)·D).

        MMD² = mean k(x, x') + mean k(y, y') − 2·mean k(x, y),   k(x, y) = Σ_b a_b·exp(−‖x − y‖²/(2h_b²))

    Differentiable once, with respect to x and y; the gradient is computed in the same sweep as the value, and only if an input requires it.

    Args:
        x: (N, D), floating point.
        y: (M, D), same dtype and device as x.
        bandwidth: h, a length in the units of the data (not h², γ or 2h²); a number, a sequence or a tensor. A constant: no gradient.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default.
        kernel: "rbf".
        estimator: "biased" (V-statistic, means over all pairs) or "unbiased" (U-statistic: without the pairs i = j).
        x_weights: (N,), summing to one; 1/N each by default. A constant: no gradient.
        y_weights: (M,), likewise.
        precision: of the products on a GPU; None follows `torch.get_float32_matmul_precision()`. "highest": as good as float32,
            "high": tf32, "medium": bfloat16, "ieee": float32 multiply-adds. float64 stays float64; the CPU keeps the input's precision.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable more than once) forces one.

    Returns:
        A scalar, float64 for float64 inputs, else float32. nan if an input holds a nan or an infinity.

    Raises:
        TypeError: x or y is not a floating-point tensor, or their dtypes differ.
        ValueError: a shape, device, bandwidth, weight or option that the rules above exclude; estimator="unbiased" with one row.

    Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6.
    """
    checks.points("x", x)
    checks.points("y", y)
    checks.same_features("x", x, "y", y)
    x, y = _autocast(x), _autocast(y)
    checks.same_kind("x", x, "y", y)
    return _mmd(x, y, bandwidth, bandwidth_weights, kernel, estimator, x_weights, y_weights, precision, backend)


def mmd_to_normal(
    x: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: str = "rbf",
    estimator: str = "biased",
    x_weights: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy between a sample and N(0, I), the expectations over N(0, I) in closed form.

        MMD² = mean k(x, x') − 2·mean_i Σ_b a_b·(h²/(h²+1))^{D/2}·exp(−‖x_i‖²/(2(h²+1))) + Σ_b a_b·(h²/(h²+2))^{D/2}

    No sample of the prior is drawn: less noise, and less than half the work of `mmd(x, torch.randn_like(x))`.

    Args:
        x: (N, D), floating point.
        bandwidth, bandwidth_weights, kernel, x_weights, precision, backend: as in `mmd`.
        estimator: "biased" or "unbiased" for the mean over pairs of x.

    Returns:
        A scalar, as in `mmd`.

    Raises:
        TypeError, ValueError: as `mmd`.

    Source: Rustamov 2019, "Closed-form expressions for maximum mean discrepancy with applications to Wasserstein auto-encoders".
    """
    checks.points("x", x)
    return _mmd(_autocast(x), None, bandwidth, bandwidth_weights, kernel, estimator, x_weights, None, precision, backend)


def _mmd(
    x: Tensor,
    y: Tensor | None,
    bandwidth: float | Sequence[float] | Tensor,
    bandwidth_weights: Sequence[float] | Tensor | None,
    kernel: str,
    estimator: str,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    precision: str | None,
    backend: str | None,
) -> Tensor:
    checks.mmd_options(kernel=kernel, estimator=estimator, precision=precision, backend=backend)
    checks.backend_device(backend, x.device)
    h, a = checks.bandwidths(bandwidth, bandwidth_weights, x.device)
    for name, points, weights in (("x", x, x_weights), ("y", y, y_weights)):
        if points is not None:
            checks.enough_rows(name, points, estimator)
        if points is not None and weights is not None:
            checks.sample_weights(f"{name}_weights", weights, name, points)
            checks.enough_weights(f"{name}_weights", weights, estimator)
    if backend == "reference":
        dtype = accumulation_dtype(x.dtype)
        x = x.to(dtype)
        y, x_weights, y_weights = (None if t is None else t.to(dtype) for t in (y, x_weights, y_weights))
        with torch.autocast(x.device.type, enabled=False):
            if y is None:
                return reference.mmd_to_normal(x, bandwidth=h, bandwidth_weights=a, estimator=estimator, x_weights=x_weights)
            return reference.mmd(x, y, bandwidth=h, bandwidth_weights=a, estimator=estimator, x_weights=x_weights, y_weights=y_weights)
    return apply_mmd(x, y, x_weights, y_weights, h, a, estimator == "unbiased", precision or "", backend or "")


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    per_dimension: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample of N(μ, σ²) by the reparameterisation trick, and its KL divergence to N(0, I), in one pass; backward in one pass.

        z = μ + exp(½·logvar)·ε,   KL_i = ½·Σ_d (μ² + exp(logvar) − 1 − logvar)   in nats

    Args:
        mu: μ, (..., D), floating point.
        logvar: log σ², same shape, dtype and device as mu.
        eps: ε, same shape, dtype and device as mu. A constant: no gradient. Drawn from N(0, I) by default.
        generator: where ε is drawn from; not together with eps.
        per_dimension: return the summands of KL instead of their sum.
        backend: None chooses by device; "cpu", "triton" or "reference" forces one.

    Returns:
        z (..., D) in the dtype of mu, and KL (...), or (..., D) if per_dimension, in float64 for float64 inputs, else in float32.

    Raises:
        TypeError: mu, logvar or eps is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, both eps and generator are given, or an option is unknown.

    Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 2.4 and appendix B.
    """
    checks.rows("mu", mu)
    checks.floating_tensor("logvar", logvar)
    mu, logvar, eps = _autocast(mu), _autocast(logvar), eps if eps is None else _autocast(eps)
    checks.same_shape("mu", mu, "logvar", logvar)
    checks.same_kind("mu", mu, "logvar", logvar)
    checks.option("backend", backend, checks.BACKENDS)
    checks.backend_device(backend, mu.device)
    if eps is not None:
        checks.noise(eps, generator, mu)
    elif generator is None:
        eps = torch.randn_like(mu)
    else:
        eps = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    if backend == "reference":
        dtype = accumulation_dtype(mu.dtype)
        z, kl = reference.reparameterize_kl(mu.to(dtype), logvar.to(dtype), eps=eps.to(dtype), per_dimension=per_dimension)
        return z.to(mu.dtype), kl
    matrices = (t.reshape(-1, mu.shape[-1]) for t in (mu, logvar, eps))
    z, kl = apply_reparameterize_kl(*matrices, per_dimension, backend or "")
    return z.reshape(mu.shape), kl.reshape(mu.shape if per_dimension else mu.shape[:-1])


def _autocast(x: Tensor) -> Tensor:
    """x, or under autocast x in float32, as autocast does for the losses of PyTorch."""
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        return x.float()
    return x
