"""The public functions. Each checks its arguments, brings them into one form and applies an operation to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.bandwidths import resolve
from fastvae.cpu import reparameterize_kl as cpu
from fastvae.cpu.pairs import Product
from fastvae.devices import float64_on_cpu
from fastvae.dispatch import accumulation_dtype, in_forward_mode, runs_on_triton, zero_if_finite
from fastvae.distributed import gather, gather_rows, propagate_errors, sum_shares
from fastvae.kernel_mean import KernelMean, mmd_to_mean
from fastvae.kernel_sums import Numbers, as_vector
from fastvae.linear import linear_mmd
from fastvae.ops.common import KernelArguments, cached_options, kernel_arguments, needs_grad, unit_weights, without_autocast
from fastvae.ops.kernel_matmul import apply_kernel_matmul
from fastvae.ops.log_kernel_density import apply_normalized_matmul, few_rows_of, of_few_rows
from fastvae.ops.mmd import apply_mmd
from fastvae.ops.quadratic_form import apply_group_mmd, apply_shared_form
from fastvae.ops.reparameterize_kl import Options as PosteriorOptions
from fastvae.ops.reparameterize_kl import Tensors as PosteriorTensors
from fastvae.ops.reparameterize_kl import apply_reparameterize_kl, epsilon, formula, fused_formula
from fastvae.ops.total_correlation import apply_total_correlation
from fastvae.parametrisation import Parametrisation, ScaleKind
from fastvae.radial import Kernel, Linear, separate_terms
from fastvae.reference.quadratic_form import GroupWeights, pair_values, pairs_with_self
from fastvae.reference.total_correlation import KLDecomposition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@float64_on_cpu
def mmd(
    x: Tensor,
    y: Tensor | KernelMean,
    *,
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.AnyKernel = "rbf",
    estimator: checks.MMDEstimator = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    precision: checks.Precision | None = None,
    backend: checks.AnyBackend | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy between two samples, in memory O((N + M)·D).

        MMD² = mean k(x, x') + mean k(y, y') − 2·mean k(x, y),   k = Σ_b a_b·k_b of bandwidth h_b

    Differentiable twice with respect to x and y, and in forward mode; once, in reverse mode, with respect to the bandwidths and their
    weights. The gradients that an input requires are computed together with the value, in one sweep over the pairs of rows, and the Hessian
    times a direction in another one. A third derivative raises NotImplementedError.

    Args:
        x: (..., N, D), floating point. More than one batch dimension raises a warning, as images are often meant: x.flatten(1) makes one
            sample of them, and x.flatten(0, -3) makes one batch dimension.
        y: (..., M, D), same batch dimensions, dtype and device as x. Or a `KernelMean`, a fixed sample with its own kernel and bandwidths,
            which are then left out here; x is (N, D), and `estimator`, "biased" or "unbiased", is that of the pairs of x.
        bandwidth: h, a length in the units of the data (not h², γ or 2h²), as a number, a sequence or a tensor. A tensor may require grad.
            Each h lies between 1e-30 and 1e30; several lie within a factor of 1e15 of one another. Or the name of a rule: "median" for
            `fastvae.median_bandwidth(x, y)`, which takes the time of one more sweep (of three on a GPU), or "mean" for
            `fastvae.mean_bandwidth(x, y)`. A rule gives one constant for all batch dimensions. Or one bandwidth for each problem of a
            batch, a tensor (..., 1) with the batch dimensions of x, for kernels of ‖x − y‖: rows are divided by it, so the square of
            (x − y)/h must not overflow. Several for each problem are not supported.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default. A tensor may require grad.
        kernel: "rbf" (or "gaussian") exp(−d²/2h²), "imq" h²/(h²+d²), "rational_quadratic" 1/(1+d²/2h²), "laplace" exp(−d/h), "matern32" or
            "matern52" (1 + u)·exp(−u) of u = √3·d/h or (1 + u + u²/3)·exp(−u) of u = √5·d/h, "energy" −d/h, "riesz" −(d/h)^1.5
            or "polynomial" (x·y/(D·h²) + 1)³, with d = ‖x − y‖. Or a `fastvae.Kernel` from `fastvae.radial`, with other
            parameters, or a sum such as RBF() + 0.5 * Laplace().scaled(2), whose Laplace kernel has bandwidth 2h. A sequence is added up.
        estimator: "biased" (V-statistic, means over all pairs), "unbiased" (U-statistic, without the pairs i = j) or "linear" (for N = M,
            the mean over ⌊N/2⌋ pairs of neighbours, in O(N·D); differentiable any number of times).
        x_weights: (..., N), summing to one; 1/N each by default. They get no gradient. Not for estimator="linear".
        y_weights: (..., M), likewise.
        precision: How matrix products are computed on a GPU. "ieee": float32 multiply-adds. "highest": three products of bfloat16 parts,
            nearly as accurate as float32. "high": TF32, or "highest" where that is faster (on Hopper, for 2²⁶ pairs or more with a
            gradient). "medium": bfloat16. None follows PyTorch's setting, `torch.set_float32_matmul_precision` or
            `torch.backends.cuda.matmul.fp32_precision`. float64 inputs stay in float64. A CPU keeps the precision of the input, except
            where PyTorch's setting is "medium" and the processor multiplies bfloat16 matrices (AMX).
        backend: None chooses by device. "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one. "inductor"
            is "cpu" with loops made by `torch.compile`, for the RBF kernel and samples of 1,024 rows or more. It is faster for up to 8
            features, and for bandwidths whose h² differ by powers of two. It needs a C++ compiler, and compiles for some seconds at each
            new number of features, bandwidths or threads and at new ratios of bandwidths.
        process_group: A group of `torch.distributed` whose ranks each hold some rows of x and y, not necessarily equally many. The result
            is the MMD² of all rows, the same on each rank. Each rank sweeps its own rows against all rows. Its gradient is that of the
            global MMD² times the number of ranks and needs no communication: averaged over the ranks, as data parallelism does, it is the
            gradient of one process with all rows. So is a second derivative, for which the ranks exchange directions. x_weights and
            y_weights sum to one over all ranks. A wrong argument on one rank is an error on all of them. Not for batch dimensions,
            estimator="linear" or backend="reference". None: this process alone.

    Returns:
        MMD², shape (...), a scalar without batch dimensions; float64 for float64 inputs, else float32. nan if an input holds a nan or an
        infinity.

    Raises:
        TypeError: x or y is not a floating-point tensor, or their dtypes differ.
        ValueError: A shape, device, bandwidth, weight or option breaks a rule above, or a sample has one row and estimator is not
            "biased".

    Source: Gretton et al. 2012, "A kernel two-sample test", lemmas 6 and 14.
    """
    if isinstance(y, KernelMean):
        with propagate_errors(process_group):
            checks.own_kernel(bandwidth, bandwidth_weights, kernel, y_weights)
        return mmd_to_mean(_autocast(x), y, x_weights, estimator, precision, backend, process_group)
    return _mmd([x, y], [x_weights, y_weights], bandwidth, bandwidth_weights, kernel, estimator, precision, backend, process_group)


@float64_on_cpu
def mmd_to_normal(
    x: Tensor,
    *,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel = "rbf",
    estimator: checks.Estimator = "biased",
    x_weights: Tensor | None = None,
    precision: checks.Precision | None = None,
    backend: checks.AnyBackend | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy between a sample and N(0, I), with the expectations over N(0, I) in closed form.

        MMD² = mean k(x, x') − 2·mean_i Σ_b a_b·(h²/(h²+1))^{D/2}·exp(−‖x_i‖²/(2(h²+1))) + Σ_b a_b·(h²/(h²+2))^{D/2}

    No sample of the prior is drawn: less noise, and less than half the work of `mmd(x, torch.randn_like(x))`.

    Args:
        x: (..., N, D), floating point.
        bandwidth: h, as in `mmd`, but not a rule.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default. A tensor may require grad.
        kernel: "rbf", or "gaussian", its other name. Other kernels have no closed form here.
        estimator: "biased" or "unbiased", for the mean over pairs of x.
        x_weights: (..., N), summing to one; 1/N each by default. They get no gradient.
        precision: As in `mmd`.
        backend: As in `mmd`.
        process_group: As in `mmd`.

    Returns:
        MMD², shape (...), dtype as in `mmd`.

    Raises:
        TypeError: As in `mmd`.
        ValueError: As in `mmd`; also another kernel, or a rule for the bandwidth.

    Source: Rustamov 2019, "Closed-form expressions for maximum mean discrepancy with applications to Wasserstein auto-encoders".
    """
    return _mmd([x], [x_weights], bandwidth, bandwidth_weights, kernel, estimator, precision, backend, process_group)


def _mmd(
    samples: list[Tensor],
    weights: list[Tensor | None],
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor,
    bandwidth_weights: Sequence[float] | Tensor | None,
    kernel: checks.AnyKernel,
    estimator: checks.MMDEstimator,
    precision: checks.Precision | None,
    backend: checks.AnyBackend | None,
    process_group: ProcessGroup | None,
) -> Tensor:
    """MMD² between two samples, or between one and N(0, I)."""
    with propagate_errors(process_group):
        x, *others = samples = [_autocast(sample) for sample in samples]
        checks.samples(*samples, batched=True)
        if others and isinstance(bandwidth, Tensor) and bandwidth.ndim > 1:
            samples, bandwidth = _divided_by_bandwidth(samples, checks.problem_bandwidths(bandwidth, kernel, x)), 1.0
            x, *others = samples
        family, h, a, arguments = _options(bandwidth, bandwidth_weights, backend, kernel, estimator, precision, x.device, not others)
        for name, sample, p in zip("xy", samples, weights, strict=False):
            if p is not None:
                checks.sample_weights(f"{name}_weights", p, name, sample, estimator)
        if process_group is not None:
            checks.distributed(x, estimator, backend, process_group)
    # The samples of all ranks, and the first row of this rank in each.
    whole, whole_weights, starts = samples, weights, [0, 0]
    if process_group is not None:
        whole, whole_weights = [], []
        for n, (name, sample, p) in enumerate(zip("xy", samples, weights, strict=False)):
            (rows, *rows_weights), starts[n] = gather_rows(name, [sample] if p is None else [sample, p], process_group, estimator)
            whole.append(rows)
            whole_weights.append(rows_weights[0] if rows_weights else None)
    if isinstance(bandwidth, str):
        h = resolve(bandwidth, *whole)
        arguments = kernel_arguments(family, h, a)
    for name, sample, p in zip("xy", whole, whole_weights, strict=False):
        checks.enough_rows(name, sample, estimator)
        if p is not None:
            checks.sum_of_weights(f"{name}_weights", p, estimator)
    if backend == "reference" or estimator == "linear":
        return _dense_mmd(samples, weights, family, estimator, bandwidth=h, bandwidth_weights=a)
    batch = x.shape[:-2]
    if len(batch) > 1:
        samples, weights = [sample.flatten(0, -3) for sample in samples], [None if p is None else p.flatten(0, -2) for p in weights]
    unbiased = estimator == "unbiased"
    bandwidth_grad = checks.requires_grad(h) or checks.requires_grad(a)
    if terms := separate_terms(family, bandwidth_grad and runs_on_triton(backend or "", x)):
        parts = []
        for weight, part, scale in terms:
            if isinstance(part, Linear):
                (z, t), pq = samples, weights
                if process_group is not None:
                    z, t, pq = gather("x", z, process_group), gather("y", t, process_group), whole_weights
                p, q = (None if p is None else unit_weights(p, None, torch.float64) for p in pq)
                parts.append(weight * linear_mmd(z, t, p, q, unbiased) * _inverse_square(h, a, scale, x))
            else:
                parts.append(weight * _mmd(samples, weights, _scaled(h, scale), a, part, estimator, precision, backend, process_group))
        return torch.stack([part.double() for part in parts]).sum(0).to(accumulation_dtype(x.dtype)).reshape(batch)
    missing = [] if others else [None]
    gathered = [None] * 4 if process_group is None else [*whole, *missing, *whole_weights, *missing]
    value = apply_mmd(
        [*samples, *missing, *weights, *missing, *gathered, *starts, None],
        arguments,
        unbiased,
        precision or "",
        backend or "",
        "" if process_group is None else process_group.group_name,
    )
    if process_group is not None:
        return sum_shares(value, process_group)
    return value.reshape(batch) if len(batch) > 1 else value


@cached_options
def _options(
    bandwidth: Any, weights: Any, backend: Any, kernel: Any, estimator: Any, precision: Any, device: Any, to_normal: bool
) -> tuple[Kernel, Numbers, Numbers, KernelArguments]:
    """The kernel, its bandwidths and their weights, and the same as arguments of an operation."""
    checked = checks.mmd_options(kernel, estimator, precision, backend, bandwidth, weights, device, to_normal)
    return *checked, kernel_arguments(*checked)


def _scaled(h: Numbers, factor: float) -> Numbers:
    return factor * h if isinstance(h, Tensor) else [factor * number for number in h]


def _inverse_square(h: Numbers, a: Numbers, scale: float, x: Tensor) -> Tensor:
    """Σ_b a_b/(scale·h_b)², float64: the factor of x·y."""
    return (as_vector(a, x.device).double() / (scale * as_vector(h, x.device).double()).square()).sum()


def _divided_by_bandwidth(samples: list[Tensor], h: Tensor) -> list[Tensor]:
    """The rows of each problem, less one of them, divided by its bandwidth: MMD² of these with bandwidth 1 is that of the samples."""
    dtype = accumulation_dtype(samples[0].dtype)
    # Far from the origin, rows would lose digits. MMD² does not depend on the centre, so it needs no gradient. In the gradient to h,
    # rounding errors are multiplied by distances to the centre: the median is close to most rows, even where the first one is far.
    x = samples[0].detach().to(dtype)
    centre = x.sort(-2).values[..., x.shape[-2] // 2, None, :] if needs_grad(h) else x[..., :1, :]
    h = h.to(samples[0].device, dtype)[..., None]
    return [(sample.to(dtype) - centre) / h for sample in samples]


def _over_bandwidths(apply: Callable[[Numbers, Numbers], Tensor], h: Numbers, a: Numbers) -> Tensor:
    """`apply` of all bandwidths at once, or of one at a time if the bandwidths or their weights require grad."""
    if not torch.is_grad_enabled() or not (checks.requires_grad(h) or checks.requires_grad(a)):
        return apply(h, a)
    # The result is linear in the kernel, and the derivative with respect to one bandwidth comes with the gradient of the points.
    parts = torch.stack([apply(h[n : n + 1], [1.0]) for n in range(len(h))], -1)
    with without_autocast(parts.device):
        return parts @ as_vector(a, parts.device).to(parts)


def _dense_mmd(samples: list[Tensor], weights: list[Tensor | None], kernel: Kernel, estimator: Any, **options: Any) -> Tensor:
    dtype = accumulation_dtype(samples[0].dtype)
    rows = [sample.to(dtype) for sample in samples]
    options |= {f"{name}_weights": unit_weights(p, None, dtype) for name, p in zip("xy", weights, strict=False) if p is not None}
    with torch.autocast(rows[0].device.type, enabled=False):
        if len(rows) == 1:
            return reference.mmd_to_normal(*rows, estimator=estimator, **options)
        if estimator == "linear":
            checks.same_rows("x", rows[0], "y", rows[1], "estimator='linear'")
        value = reference.mmd(*rows, kernel=kernel, estimator=estimator, **options)
        if estimator == "linear":
            return value
        # The value of a polynomial may be infinite.
        return value + sum((0 * z.detach()).sum((-2, -1)) for z in rows)


@float64_on_cpu
def kernel_matmul(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    *,
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.AnyKernel = "rbf",
    normalize: checks.Normalization | None = None,
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
) -> Tensor:
    """K(x, y)·v, the product of a kernel matrix with an array, in memory O((N + M)·(D + C)).

        out_i = Σ_j k(x_i, y_j)·v_j

    This evaluates at x the mean embedding of y weighted by v. Differentiable twice with respect to x, y and v, and in forward mode, as
    `mmd` is; with `normalize` once, in reverse mode. Bandwidths and their weights have first derivatives in reverse mode, and gradients of
    B > 1 bandwidths take B sweeps.

    With `normalize`, K is divided by its sums over rows or columns, which are computed as logarithms: right also where every k underflows.
    With "rows" it is attention: for the RBF kernel `scaled_dot_product_attention(x, y, v)` with scale 1/h² and the bias −‖y_j‖²/(2h²).

    Args:
        x: (N, D), floating point, or (..., N, D).
        y: (M, D), or (..., M, D) with the same batch dimensions, same dtype and device as x. Without `normalize` a loop takes one problem
            of a batch after the other.
        v: (M,) or (M, C), or (..., M, C) with the same batch dimensions, same dtype and device as x.
        bandwidth: h, as in `mmd`.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default. A tensor may require grad.
        kernel: As in `mmd`.
        normalize: "rows" divides K by the sum of each of its rows, "columns" by that of each of its columns, "both" by the root of the
            product of these two. The kernel must then be "rbf", "imq", "rational_quadratic", "laplace", "matern32" or "matern52", the
            weights a_b at least 0, and the bandwidths and weights get no gradient.
        precision: As in `mmd`.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one.

    Returns:
        K·v, shape (N,) or (..., N, C); float64 for float64 inputs, else float32. An element is nan if a number that it depends on is nan or
        infinite.

    Raises:
        TypeError: An input is not a floating-point tensor, or their dtypes differ.
        ValueError: A shape, device, bandwidth or option breaks a rule above.

    Source: Gretton et al. 2012, "A kernel two-sample test", section 2.3.
    """
    x, y, v = _autocast(x), _autocast(y), _autocast(v)
    checks.samples(x, y, batched=True)
    checks.columns("v", v, "y", y)
    checks.same_kind("x", x, "v", v)
    family, h, a, product = _product_options(bandwidth, bandwidth_weights, backend, kernel, normalize, precision, x.device)
    batch, columns = x.shape[:-2], v if v.ndim > 1 else v[:, None]
    if product is not None and len(batch) < 2:
        streaming = None if normalize else lambda x, y, v: _kernel_matmul(x, y, v, family, h, a, precision, backend)
        out = of_few_rows(product, x, y, columns, streaming)
        if out is not None:
            return out if v.ndim > 1 else out[:, 0]
    if isinstance(bandwidth, str):
        h = resolve(bandwidth, x, y)
    options = (precision or "", backend or "")
    if backend == "reference":
        dtype = accumulation_dtype(x.dtype)
        x, y, columns = (t.to(dtype) for t in (x, y, columns))
        with torch.autocast(x.device.type, enabled=False):
            if normalize is None:
                out = reference.kernel_matmul(x, y, columns, bandwidth=h, bandwidth_weights=a, kernel=family)
            else:
                out = reference.normalized_matmul(x, y, columns, normalize=normalize, bandwidth=h, bandwidth_weights=a, kernel=family)
            out = out + zero_if_finite(x, y, columns).to(dtype)
    elif normalize is not None:
        flat = [t.flatten(0, -3) if len(batch) > 1 else t for t in (x, y, columns)]
        out = apply_normalized_matmul(*flat, *kernel_arguments(family, h, a), normalize, *options)[0]
        out = out.reshape(*batch, *out.shape[-2:])
    else:
        out = _kernel_matmul(x, y, columns, family, h, a, precision, backend)
    return out if v.ndim > 1 else out[:, 0]


@cached_options
def _product_options(
    bandwidth: Any, weights: Any, backend: Any, kernel: Any, normalize: Any, precision: Any, device: Any
) -> tuple[Kernel, Numbers, Numbers, Product | None]:
    """The kernel, its bandwidths and their weights, and the product of few rows."""
    family = checks.kernel_options(kernel, precision, backend, device)
    h, a = checks.bandwidths(bandwidth, weights, device)
    if normalize is not None:
        checks.option("normalize", normalize, checks.NORMALIZATIONS)
        checks.positive_kernel(family, "normalize")
        checks.constant("bandwidth", h)
        checks.constant("bandwidth_weights", a)
    few = few_rows_of(family, h, a, backend)
    # Without `normalize` a factor of K would not cancel.
    return family, h, a, None if few is None or (normalize is None and few.log_scale) else Product(few, normalize)


def _kernel_matmul(x: Tensor, y: Tensor, v: Tensor, family: Kernel, h: Numbers, a: Numbers, precision: Any, backend: Any) -> Tensor:
    """K(x, y)·v by ops, (..., N, C)."""
    if terms := separate_terms(family):
        parts = []
        for weight, part, scale in terms:
            if isinstance(part, Linear):
                x, y, v = (t.to(accumulation_dtype(t.dtype)) for t in (x, y, v))
                with without_autocast(x.device):
                    parts.append(weight * _inverse_square(h, a, scale, x).to(x.dtype) * (x @ (y.mT @ v)))
            else:
                parts.append(weight * _kernel_matmul(x, y, v, part, _scaled(h, scale), a, precision, backend))
        return torch.stack(parts).sum(0)
    if batch := x.shape[:-2]:
        problems = zip(*(t.flatten(0, -3).unbind() for t in (x, y, v)), strict=True)
        out = torch.stack([_kernel_matmul(z, t, columns, family, h, a, precision, backend) for z, t, columns in problems])
        return out.reshape(*batch, *out.shape[-2:])
    options = precision or "", backend or ""
    return _over_bandwidths(lambda h, a: apply_kernel_matmul(x, y, v, *kernel_arguments(family, h, a), *options), h, a)


@float64_on_cpu
def witness(
    points: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.AnyKernel = "rbf",
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
) -> Tensor:
    """The witness function of MMD, mean_j k(t, x_j) − mean_j k(t, y_j): positive at t where x is denser than y.

    Args:
        points: t, (T, D), floating point.
        x: (N, D), same dtype and device as points.
        y: (M, D), same dtype and device as points.
        bandwidth: h, as in `mmd`; a rule takes the rows of x and y.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default. A tensor may require grad.
        kernel: As in `mmd`.
        precision: As in `mmd`.
        backend: As in `kernel_matmul`.

    Returns:
        Shape (T,), differentiable as `kernel_matmul` is.

    Raises:
        TypeError: As in `kernel_matmul`.
        ValueError: As in `kernel_matmul`.

    Source: Gretton et al. 2012, "A kernel two-sample test", section 2.3.
    """
    checks.points("points", points)
    for name, t in (("x", x), ("y", y)):
        checks.points(name, t)
        checks.same_features("points", points, name, t)
        checks.same_kind("points", points, name, t)
    if isinstance(bandwidth, str):
        checks.bandwidth_rule(bandwidth)
        bandwidth = resolve(bandwidth, x, y)
    # The weights are integers, which cancel exactly: 1/N and 1/M are rounded. The accumulation dtype can represent them.
    points, x, y = (t.to(accumulation_dtype(t.dtype)) for t in (points, x, y))
    n, m = x.shape[0], y.shape[0]
    weights = torch.cat([x.new_full((n,), m), y.new_full((m,), -n)])
    options = {"bandwidth": bandwidth, "bandwidth_weights": bandwidth_weights, "kernel": kernel, "precision": precision}
    return kernel_matmul(points, torch.cat([x, y]), weights, backend=backend, **options) / (n * m)  # type: ignore[arg-type]


class GroupMMD(NamedTuple):
    """MMD² between groups, as returned by `group_mmd`.

    Attributes:
        values: (G, G) with a diagonal of zeros, or (P,) for P given pairs. 0, without gradient, where a group is not valid.
        valid: (G,), False for a group with fewer than two members, which is excluded.
        pairs: (G, G) or (P,), True where the two groups of a pair are valid and differ.
    """

    values: Tensor
    valid: Tensor
    pairs: Tensor

    def mean(self) -> Tensor:
        """The mean over all valid pairs, a scalar; 0 if there are none."""
        return self.values.sum() / self.pairs.sum().clamp(min=1)


@float64_on_cpu
def group_mmd(
    z: Tensor,
    groups: Tensor,
    *,
    num_groups: int | None = None,
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = 1.0,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.AnyKernel = "rbf",
    estimator: checks.Estimator = "biased",
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
    process_group: ProcessGroup | None = None,
) -> GroupMMD:
    """MMD² between all pairs of G groups of rows, in one sweep over all pairs of rows, in memory O(N·(D + G)).

    With weights as `groups`, and `pairs` of the same class in two domains, this is the local MMD (LMMD) of subdomain adaptation.
    Differentiable twice with respect to z, and in forward mode, as `mmd` is. On a CPU the gradient is computed together with the value if
    the loss is a multiple of the sum over all given pairs, as a mean is. Other losses, and all losses on a GPU, take a second sweep.

    Args:
        z: (N, D), floating point.
        groups: (N,), integers, the group of each row from 0 to G − 1; or (N, G), floating point, the weight of each row in each group, at
            least 0. Each column is divided by its sum.
        num_groups: G. By default the largest number in groups plus one; on a GPU the call then waits for it.
        pairs: (P, 2), the wanted pairs of groups; all by default.
        bandwidth: h, as in `mmd`, but without a gradient; a rule takes all rows of z together.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default. They get no gradient.
        kernel: As in `mmd`.
        estimator: "biased" or "unbiased".
        precision: As in `mmd`.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one.
        process_group: A group of `torch.distributed` whose ranks each hold some rows of z. The result is that of all rows, the same on each
            rank. Each rank sweeps its own rows against all rows, and again for the gradient. num_groups must be given. None: this process
            alone.

    Returns:
        `GroupMMD(values, valid, pairs)`. A group with fewer than two rows, or fewer than two rows of a nonzero weight, is excluded.

    Raises:
        TypeError: As in `mmd`.
        ValueError: As in `mmd`; also groups, num_groups or pairs that break a rule above.

    Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6; Zhu et al. 2021, "Deep subdomain adaptation network for image
    classification", for soft weights.
    """
    with propagate_errors(process_group):
        checks.points("z", z)
        z = _autocast(z)
        checks.option("estimator", estimator, checks.ESTIMATORS)
        family = checks.kernel_options(kernel, precision, backend, z.device)
        checks.one_sweep(family)
        h, a = checks.bandwidths(bandwidth, bandwidth_weights, z.device)
        checks.constant("bandwidth", h)
        checks.constant("bandwidth_weights", a)
        size = checks.groups(groups, num_groups, z)
        if process_group is not None:
            checks.process_group(process_group)
            checks.known_groups(num_groups)
        index = None if pairs is None else _on_device(checks.pairs(pairs, size), z.device)
    dtype = accumulation_dtype(z.dtype)
    # Weights are not detached, so that their tangents are refused.
    groups = groups if groups.is_floating_point() else groups.long()
    all_z, all_groups, start = z, groups, 0
    if process_group is not None:
        (all_z, all_groups), start = gather_rows("z", [z, groups], process_group)
    if isinstance(bandwidth, str):
        h = resolve(bandwidth, all_z)
    all_v, constants = _group_weights(all_groups, size, dtype)
    unbiased = estimator == "unbiased"
    v, arguments = all_v[start : start + z.shape[0]], (*kernel_arguments(family, h, a), precision or "", backend or "")
    if process_group is None and backend != "reference":
        values, valid, wanted = apply_group_mmd(z, v, *arguments, *constants, unbiased, index)
    else:
        if backend == "reference":
            sums = reference.quadratic_form(z.to(dtype), v.to(dtype), bandwidth=h, bandwidth_weights=a, kernel=family).double()
        if process_group is not None:
            place = torch.arange(all_z.shape[0], device=z.device)
            others = torch.where(((place < start) | (place >= start + z.shape[0]))[:, None], all_v, 0)
            sums = sum_shares(apply_shared_form(z, v, all_z, others, process_group.group_name, *arguments), process_group)
        own = pairs_with_self(z, v, family, h, a)
        if process_group is not None and isinstance(own, Tensor) and own.ndim:
            own = sum_shares(own, process_group)
        weights = GroupWeights.of(*constants, unbiased)
        values, valid, wanted = pair_values(sums, own, weights).to(dtype), weights.valid, weights.pairs
    if index is not None:
        values, wanted = (t[index[:, 0], index[:, 1]] for t in (values, wanted))
    return GroupMMD(values, valid, wanted)


def _group_weights(groups: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The columns of a quadratic form, of any scale, from labels (N,) or weights (N, G), and the arguments of `GroupWeights.of`."""
    if not groups.is_floating_point():
        v = groups[:, None] == torch.arange(size, device=groups.device)
        counts = v.sum(0, dtype=torch.float64)
        return v, (counts, counts, counts)
    weights = groups.double()
    members = (weights != 0).sum(0)
    # The rounded weights no longer sum to one, so the result is divided by the sums of the weights as rounded.
    v = torch.where(members >= 2, weights / weights.sum(0), 0).to(dtype)
    exact = v.double()
    return v, (exact.sum(0), exact.T @ exact, members)


def _on_device(pairs: Tensor, device: torch.device) -> Tensor:
    if pairs.device == device or torch.compiler.is_compiling():
        return pairs.to(device)
    return _constant_pairs(tuple(map(tuple, pairs.tolist())), device)


@functools.lru_cache(maxsize=256)
def _constant_pairs(pairs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The pairs as a tensor. Cached, as each copy to a GPU waits for it; not an inference tensor, as later calls may need a gradient."""
    with torch.inference_mode(False):
        return torch.tensor(pairs, device=device)


_DEFAULTS = (-1, "logvar", 0.0)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    kl_dims: checks.Dims = -1,
    scale: ScaleKind = "logvar",
    scale_offset: float = 0.0,
    logvar_bounds: tuple[float, float] | None = None,
    soft_clamp: float | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    backend: checks.AnyBackend | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample of N(μ, σ²) by the reparameterisation trick and its KL divergence to a prior, in one pass forward and one backward.

        z = μ + σ·ε,   KL = Σ ½·((μ − μ₀)²/σ₀² + σ²/σ₀² − 1 − log(σ²/σ₀²))   in nats

    Differentiable twice, with respect to mu, logvar and the prior.

    Args:
        mu: μ, (..., D), floating point.
        logvar: s, which gives σ as `scale` says; log σ² by default. Same shape, dtype and device as mu.
        eps: ε, same shape, dtype and device as mu. It gets no gradient. By default it is drawn from N(0, I). On a GPU the kernels draw it
            in float32, forward and backward, from a 64-bit seed (Philox); each call, and each replay of a CUDA graph, draws a new seed.
            Under `torch.vmap`, randomness="different" or "same" allows the draw.
        generator: The source of ε or of its seed, PyTorch's global one by default. Not together with eps. The same state gives the same z
            on the same kind of device; on a GPU it depends on the memory format too.
        kl_dims: The dimensions that the KL is summed over: one, several, () for none, or "all" for all but the first. The last by default,
            with a warning for four dimensions or more, as images are often meant.
        scale: What s is, with o = scale_offset. "logvar": σ² = exp(s) + o. "log_std": σ = exp(s) + o. "std": σ = s + o. "variance":
            σ² = s + o. "softplus": σ = softplus(s) + o. That σ is positive is not checked.
        scale_offset: o ≥ 0.
        logvar_bounds: (low, high), to which log σ² is clamped, for scale="logvar". Outside there is no gradient, as in `torch.clamp`.
        soft_clamp: c > 0 for c·tanh(μ/c) and c·tanh(s/c) in place of μ and s. Not together with logvar_bounds.
        prior: (mu, logvar) of the prior N(μ₀, σ₀²), which scale, scale_offset, logvar_bounds and soft_clamp apply to as well. Their shapes
            are broadcast to that of mu. N(0, I) by default.
        backend: None chooses by device. "cpu", "triton" or "reference" forces one. "inductor" is "cpu" in one loop each for the forward and
            the backward pass, made by `torch.compile`: faster for large latents, and differentiable once. It needs a C++ compiler, and
            compiles for some seconds at each new set of options.

    Returns:
        z, in the shape, dtype and memory format of mu; and the KL in nats, float64 for float64 inputs, else float32.

    Raises:
        TypeError: A tensor is not floating point, or dtypes differ.
        ValueError: Shapes or devices differ, both eps and generator are given, or an option breaks a rule above.

    Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 2.4 and appendix B.
    """
    if (
        type(kl_dims) is int
        and type(scale) is str
        and type(scale_offset) is float
        and (kl_dims, scale, scale_offset) == _DEFAULTS
        and (eps is None and backend is None and prior is None and logvar_bounds is None and soft_clamp is None)
        and isinstance(mu, Tensor)
        and isinstance(logvar, Tensor)
        and mu.ndim == 2
        and mu.shape == logvar.shape
        and cpu.is_small(mu, logvar, None)
    ):
        # The usual call, without the checks: for a few numbers they take a twentieth of a training step.
        return cpu.differentiable(mu, logvar, _noise(mu, generator, None))
    checks.rows("mu", mu)
    checks.floating_tensor("logvar", logvar)
    if type(kl_dims) is int and kl_dims == -1:
        checks.images(mu)
    parametrisation = checks.parametrisation(scale, scale_offset, logvar_bounds, soft_clamp)
    small = backend is None and prior is None and parametrisation.is_logvar and cpu.is_small(mu, logvar, eps)
    if small and mu.shape == logvar.shape:
        return _small(mu, logvar, eps, generator, parametrisation.bounds, checks.dims("kl_dims", kl_dims, mu.ndim), "mu")
    return Posterior.of(mu, logvar, prior, 0, kl_dims, parametrisation, backend).sample_and_kl(eps, generator)


def reparameterize_kl_moments(
    moments: Tensor,
    *,
    dim: int = 1,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    kl_dims: checks.Dims = "all",
    scale: ScaleKind = "logvar",
    scale_offset: float = 0.0,
    logvar_bounds: tuple[float, float] | None = None,
    soft_clamp: float | None = None,
    prior: Tensor | None = None,
    backend: checks.AnyBackend | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` of an encoder's result that holds μ and log σ² one after the other along a dimension.

    The result of latent-diffusion autoencoders is (B, 2·C, H, W), that of audio autoencoders (B, 2·C, T). The gradient is one array of this
    shape. No memory format is copied, such as channels_last.

    Args:
        moments: The means, followed along `dim` by as many numbers s, which give σ as `scale` says; log σ² by default. Floating point,
            two dimensions or more.
        dim: The dimension of both halves.
        eps: ε, in the shape of one half, else as in `reparameterize_kl`.
        generator: As in `reparameterize_kl`.
        kl_dims: As in `reparameterize_kl`, but "all" by default: one KL for each index of the first dimension.
        scale: As in `reparameterize_kl`, and so are scale_offset, logvar_bounds and soft_clamp. Autoencoders of latent diffusion have
            logvar_bounds=(-30, 20).
        scale_offset: o ≥ 0.
        logvar_bounds: (low, high).
        soft_clamp: c > 0.
        prior: The moments of the prior, broadcast to the shape of `moments`. N(0, I) by default.
        backend: As in `reparameterize_kl`.

    Returns:
        z, in the shape of one half and the dtype and memory format of moments; and the KL in nats, as in `reparameterize_kl`.

    Raises:
        TypeError: As in `reparameterize_kl`.
        ValueError: As in `reparameterize_kl`; also an odd size of `dim`.

    Source: Kingma and Welling 2014; Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models".
    """
    checks.moments("moments", moments, dim)
    dim %= moments.ndim
    parametrisation = checks.parametrisation(scale, scale_offset, logvar_bounds, soft_clamp)
    if backend is None and prior is None and parametrisation.is_logvar and cpu.is_small(moments, None, eps):
        mu, logvar = moments.chunk(2, dim)
        return _small(mu, logvar, eps, generator, parametrisation.bounds, checks.dims("kl_dims", kl_dims, mu.ndim), "half of moments")
    return Posterior.of(moments, None, prior, dim, kl_dims, parametrisation, backend).sample_and_kl(eps, generator)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    kl_dims: checks.Dims = -1,
    scale: ScaleKind = "logvar",
    scale_offset: float = 0.0,
    logvar_bounds: tuple[float, float] | None = None,
    soft_clamp: float | None = None,
    backend: checks.AnyBackend | None = None,
) -> Tensor:
    """The KL divergence KL(N(μ, σ²) ‖ N(μ₀, σ₀²)) between Gaussians with diagonal covariances, in one pass forward and one backward.

        KL = Σ ½·((μ − μ₀)²/σ₀² + σ²/σ₀² − 1 − log(σ²/σ₀²))

    It is the KL of `reparameterize_kl` with prior=(prior_mu, prior_logvar), without the sample.

    Args:
        mu: μ, (..., D), floating point.
        logvar: log σ², or what `scale` says; same shape, dtype and device as mu.
        prior_mu: μ₀, broadcast to the shape of mu. Both or none; N(0, I) by default.
        prior_logvar: log σ₀², or what `scale` says.
        kl_dims: As in `reparameterize_kl`.
        scale: As in `reparameterize_kl`, and so are scale_offset, logvar_bounds and soft_clamp.
        scale_offset: o ≥ 0.
        logvar_bounds: (low, high).
        soft_clamp: c > 0.
        backend: As in `reparameterize_kl`.

    Returns:
        The KL in nats, float64 for float64 inputs, else float32.

    Raises:
        TypeError: As in `reparameterize_kl`.
        ValueError: As in `reparameterize_kl`.

    Source: Kingma and Welling 2014, appendix B.
    """
    checks.rows("mu", mu)
    checks.floating_tensor("logvar", logvar)
    if type(kl_dims) is int and kl_dims == -1:
        checks.images(mu)
    prior = checks.pair("prior_mu", prior_mu, "prior_logvar", prior_logvar)
    parametrisation = checks.parametrisation(scale, scale_offset, logvar_bounds, soft_clamp)
    return Posterior.of(mu, logvar, prior, 0, kl_dims, parametrisation, backend).kl()


class Posterior(NamedTuple):
    """A Gaussian and its prior, checked, as `fastvae.ops.reparameterize_kl` takes them."""

    tensors: PosteriorTensors
    options: PosteriorOptions

    @staticmethod
    def of(
        mu: Tensor, s: Tensor | None, prior: Any, dim: int, kl_dims: checks.Dims, parametrisation: Parametrisation, backend: str | None
    ) -> Posterior:
        mu = _autocast(mu)
        if s is not None:
            s = _autocast(s)
            checks.same_shape_and_kind("mu", mu, "logvar", s)
        checks.usable_backend(backend, mu.device, checks.ALL_BACKENDS)
        prior_mu = prior_s = None
        if prior is not None:
            prior = tuple(map(_autocast, prior)) if isinstance(prior, (tuple, list)) else _autocast(prior)
            prior_mu, prior_s = (None if t is None else t.expand(mu.shape) for t in checks.prior(prior, mu, s, dim))
        dims = checks.dims("kl_dims", kl_dims, mu.ndim)
        scale, offset, bounds, soft_clamp = parametrisation
        options = PosteriorOptions(dim, dims, scale, offset, bounds or (), soft_clamp or 0.0, backend or "")
        return Posterior(PosteriorTensors(mu, s, None, prior_mu, prior_s), options)

    def sample_and_kl(self, eps: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        mu, s = self.tensors[:2]
        half = mu if s is not None else self.options.halves(mu.detach(), None)[0]
        if eps is None:
            return self._apply(_noise(half, generator, self.options.backend or None))
        eps = _autocast(eps)
        checks.noise(eps, generator, half, "mu" if s is not None else "half of moments")
        return self._apply(eps)

    def kl(self) -> Tensor:
        return self._apply(None)[1]

    def _apply(self, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        mu, s, _, *prior = self.tensors
        options, backend = self.options, self.options.backend
        # The plain formulas run on every device, in forward mode and under every transform of torch.func. The compiler fuses them on a CPU
        # with the code around them, which an operation would prevent.
        if torch.compiler.is_compiling():
            inlined = mu.device.type != "cuda"
        else:
            inlined = torch._C._are_functorch_transforms_active() or in_forward_mode() or not (mu.is_cpu or mu.is_cuda)
        if backend in ("cpu", "triton") or not (backend or inlined):
            return cast("tuple[Tensor, Tensor]", apply_reparameterize_kl(mu, s, noise, *prior, *options))
        tensors = PosteriorTensors(mu, s, noise, *prior)
        if backend == "inductor" and not inlined:
            return fused_formula(tensors, options)
        return formula(tensors._replace(noise=epsilon(tensors, options)), options)


def _small(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    bounds: tuple[float, float] | None,
    dims: tuple[int, ...],
    name: str,
) -> tuple[Tensor, Tensor]:
    if eps is None:
        eps = _noise(mu, generator, None)
    else:
        checks.noise(eps, generator, mu, name)
    return cpu.differentiable(mu, logvar, eps, bounds, dims)


def _noise(mu: Tensor, generator: torch.Generator | None, backend: str | None) -> Tensor:
    """ε as the operation takes it: a seed for the Triton kernels, which draw ε faster than they would read it; else ε itself."""
    checks.generator(generator)
    if backend == "triton" or (backend is None and mu.device.type == "cuda"):
        return torch.randint(2**63 - 1, (1,), device=mu.device, generator=generator)
    if generator is None:
        # The same numbers in every memory format, as with a generator.
        return torch.randn_like(mu, memory_format=torch.contiguous_format)
    return torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)


def draw_noise(mu: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """ε itself, as an argument of `reparameterize_kl`."""
    return _noise(_autocast(mu), generator, "cpu")


@float64_on_cpu
def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int,
    estimator: checks.DensityEstimator = "minibatch_weighted",
    backend: checks.Backend | None = None,
) -> KLDecomposition:
    """The KL divergence of a VAE split into the three terms of β-TC-VAE, estimated from the batch, in memory O(N·D).

        mutual information  mean_i (log q(z_i|n_i) − log q(z_i))
        total correlation   mean_i (log q(z_i) − Σ_d log q(z_id))
        dimension-wise KL   mean_i (Σ_d log q(z_id) − log p(z_i)),  p = N(0, I)

    They sum to the KL divergence as estimated from the samples z. β-TC-VAE replaces the KL divergence by α·mutual_information +
    β·total_correlation + γ·dimensionwise_kl, usually with α = γ = 1. Differentiable once, with respect to z, mu and logvar; the backward
    pass sweeps the pairs of the batch once more.

    Args:
        z: (N, D), floating point; row i is a sample of N(mu_i, exp(logvar_i)).
        mu: μ of the posteriors, same shape, dtype and device as z.
        logvar: log σ² of the posteriors, same shape, dtype and device as z.
        dataset_size: The number of examples in the data set that the batch is drawn from, N or more.
        estimator: "minibatch_weighted" has weights that sum to 1/dataset_size and so underestimates every density by a factor between N and
            dataset_size. It works well as a loss, but the total correlation is too large, and the dimension-wise KL too small, by about
            D·log(dataset_size). "minibatch_stratified" is unbiased for q(z) if the batch is drawn without replacement; it needs N ≥ 2.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one.

    Returns:
        `KLDecomposition(mutual_information, total_correlation, dimensionwise_kl)`, scalars in nats, float64 for float64 inputs, else
        float32. nan if an input holds a nan or an infinity.

    Raises:
        TypeError: z, mu or logvar is not a floating-point tensor, their dtypes differ, or dataset_size is not an integer.
        ValueError: Shapes or devices differ, dataset_size is less than N, N is 1 with estimator="minibatch_stratified", or an option is
            unknown.

    Source: Chen, Li, Grosse and Duvenaud 2018, "Isolating sources of disentanglement in variational autoencoders", section 4, appendix C.
    """
    checks.points("z", z)
    checks.floating_tensor("mu", mu)
    checks.floating_tensor("logvar", logvar)
    z, mu, logvar = _autocast(z), _autocast(mu), _autocast(logvar)
    for name, t in (("mu", mu), ("logvar", logvar)):
        checks.same_shape_and_kind("z", z, name, t)
    checks.option("estimator", estimator, checks.DENSITY_ESTIMATORS)
    checks.dataset_size(dataset_size, z, estimator)
    checks.usable_backend(backend, z.device)
    with torch.autocast(z.device.type, enabled=False):
        if backend == "reference":
            dtype = accumulation_dtype(z.dtype)
            inputs = [t.to(dtype) for t in (z, mu, logvar)]
            terms = reference.total_correlation(*inputs, dataset_size=dataset_size, estimator=estimator)
            zero = zero_if_finite(*inputs).to(dtype)
            return KLDecomposition(*(term + zero for term in terms))
        return apply_total_correlation(z, mu, logvar, dataset_size, estimator == "minibatch_stratified", backend or "")


def _autocast(x: Tensor) -> Tensor:
    """x, in float32 if autocast is on and x is half precision, as autocast does for PyTorch's losses."""
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        return x.float()
    return x
