"""The custom op and the autograd.Function of MMD²: formulas (1) to (3) of `fastvae.reference.mmd`, around one sweep of a backend.

The op returns the value and the gradients that the call asks for, all from one sweep; the loss is a scalar, so that backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import compiled
from fastvae.cpu import mmd as cpu
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    accumulation_dtype,
    forbid_second_derivative,
    kernel_numbers,
    matmul_precision,
    needs_grad,
    rounding_of_sum,
    unit_weights,
)
from fastvae.radial import (
    KernelNumbers,
    KernelSum,
    Polynomial,
    Sweep,
    middle,
    rbf_normal_mean_exponent,
    rbf_normal_self_exponent,
    read,
)

SCHEMA = (
    "(Tensor x, Tensor? y, Tensor? x_weights, Tensor? y_weights, Tensor? all_x, Tensor? all_y, Tensor? all_x_weights, "
    f"Tensor? all_y_weights, SymInt x_start, SymInt y_start, {KERNEL_SCHEMA}, "
    "bool unbiased, str precision, str backend, bool x_grad, bool y_grad, bool bandwidth_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class Problem(NamedTuple):
    """The arguments of the op, in the order of its schema. Points and weights may have one leading batch dimension.

    With `all_x` and `all_y`, x and y are rows of them from `x_start` and `y_start` on: the value is then these rows' share in MMD² of the
    whole samples, and the gradients are those of all of it.
    """

    x: Tensor
    y: Tensor | None
    x_weights: Tensor | None
    y_weights: Tensor | None
    all_x: Tensor | None
    all_y: Tensor | None
    all_x_weights: Tensor | None
    all_y_weights: Tensor | None
    x_start: int
    y_start: int
    bandwidth: Tensor | None
    bandwidth_weights: Tensor | None
    bandwidth_numbers: list[float]
    weight_numbers: list[float]
    kernel: str
    kernel_parameters: list[float]
    unbiased: bool
    precision: str
    backend: str
    x_grad: bool
    y_grad: bool
    bandwidth_grad: bool


Result = tuple[Tensor, Tensor, Tensor, Tensor]

# Elements of a padded sample of all problems of one launch, 64 MiB in float32, of which a sweep has about ten copies: four thousand
# problems of up to 128 rows and 32 features, which fill any GPU.
_PADDED = 1 << 24


@torch.library.custom_op("fastvae::mmd", mutates_args=(), schema=SCHEMA)
def mmd_op(*args: Any) -> Result:
    """(MMD², its gradients to x, to y and to the one bandwidth) in the accumulation dtype, the last in float64; y = None is N(0, I).

    A gradient not asked for is empty."""
    problem = Problem(*args)
    if problem.backend == "triton":
        return _triton(*args)
    return _evaluate(compiled.Sweep if problem.backend == "inductor" else cpu.Sweep, problem)


def _triton(*args: Any) -> Result:
    problem = Problem(*args)
    precision = matmul_precision(problem.precision)
    with torch.autocast(problem.x.device.type, enabled=False):
        batched = problem.x.ndim == 3
        if not batched:
            problem = _of_tensors(problem, itemgetter(None))
        step = _problems_at_once(problem)
        singles = (itemgetter(slice(n, n + step)) for n in range(0, problem.x.shape[0], step))
        return _joined([_triton_batch(_of_tensors(problem, single), precision) for single in singles], batched)


def _triton_batch(problem: Problem, precision: str) -> Result:
    """Of B problems, each tensor with a batch dimension."""
    from fastvae.kernels import mmd as kernels

    device, (family, h, a) = problem.x.device, kernel_numbers(problem)
    prior = problem.y is None
    dtype = accumulation_dtype(problem.x.dtype)

    def sample(z: Tensor, weights: Tensor | None, whole: Tensor | None, whole_weights: Tensor | None, start: int, grad: bool) -> Any:
        entire, p = (z, weights) if whole is None else (whole, whole_weights)
        tolerance = 0.0 if p is None else max(rounding_of_sum(p.dtype), rounding_of_sum(dtype))
        p = None if p is None else p.to(dtype).contiguous()
        return kernels.Sample(entire.contiguous(), p, tolerance, start, z.shape[1], grad or problem.bandwidth_grad)

    x = sample(problem.x, problem.x_weights, problem.all_x, problem.all_x_weights, problem.x_start, problem.x_grad)
    y = None
    if problem.y is not None:
        y = sample(problem.y, problem.y_weights, problem.all_y, problem.all_y_weights, problem.y_start, problem.y_grad)
    # With a gradient to the bandwidth the closed form comes after the pairs, whose derivative Euler's theorem gives.
    closed_form = prior and not problem.bandwidth_grad
    numbers = KernelNumbers.of(family, h, a, problem.x.shape[2], closed_form, device)
    value, grad_x, grad_y, centre, shift = kernels.mmd(x, y, numbers, problem.unbiased, closed_form, precision)
    grad_bandwidth = value.new_empty(0, dtype=torch.float64)
    if problem.bandwidth_grad:
        own = [(problem.x, grad_x)] if problem.y is None else [(problem.x, grad_x), (problem.y, grad_y)]
        grad_bandwidth = -sum(((z.to(dtype) - centre[:, None]).double() * g).sum((1, 2)) for z, g in own) / read(h)[0]
        if prior:
            of_x = problem.x, problem.x_weights, problem.all_x, problem.all_x_weights, problem.x_start
            kernel = KernelSum.of(family, h, a, x.points.shape[2], device, None)
            kernel = replace(kernel, shifts=shift[:, None])
            more, gradient, bandwidth_gradient = _prior(_Sample.of(*of_x, problem.unbiased, True), kernel)
            value, grad_x = (value + more).to(dtype), grad_x + gradient
            grad_bandwidth = grad_bandwidth + bandwidth_gradient
    wanted = (grad_x if problem.x_grad else None), (grad_y if problem.y_grad else None)
    grad_x, grad_y = (value.new_empty(0) if grad is None else grad for grad in wanted)
    return value, grad_x, grad_y, grad_bandwidth


def _joined(parts: list[Result], batched: bool) -> Result:
    results = parts[0] if len(parts) == 1 else cast(Result, tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return results if batched else cast(Result, tuple(t[0] if t.numel() else t for t in results))


mmd_op.register_kernel("cuda")(_triton)


@mmd_op.register_fake
def _fake(*args: Any) -> Result:
    problem = Problem(*args)
    x, y, dtype = problem.x, problem.y, accumulation_dtype(problem.x.dtype)
    batch = x.shape[:-2]
    grad_x = x.new_empty(x.shape if problem.x_grad else (0,), dtype=dtype)
    grad_y = x.new_empty(y.shape if problem.y_grad and y is not None else (0,), dtype=dtype)
    grad_bandwidth = x.new_empty(batch if problem.bandwidth_grad else (0,), dtype=torch.float64)
    return x.new_empty(batch, dtype=dtype), grad_x, grad_y, grad_bandwidth


@mmd_op.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Result, tuple[int | None, ...]]:
    """A batch dimension of the op itself, in the place of one more of `torch.vmap`."""
    problem = Problem(*args)
    if any(isinstance(dim, int) for dim in in_dims[4:]):
        raise NotImplementedError("torch.vmap of fastvae.mmd must be over x, y or their weights, got a batch of another argument")
    tensors, batched = [], problem.x.ndim - (in_dims[0] is not None) == 3
    for t, dim in zip(problem[:4], in_dims[:4], strict=True):
        t = t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        tensors.append(t.flatten(0, 1) if t is not None and batched else t)
    results = mmd_op(*tensors, *args[4:])
    if batched:
        results = tuple(t.unflatten(0, (info.batch_size, -1)) if t.numel() else t for t in results)
    return cast(Result, tuple(results)), tuple(0 if t.numel() else None for t in results)


def _evaluate(make_sweep: Callable[..., Sweep], problem: Problem) -> Result:
    with torch.autocast(problem.x.device.type, enabled=False):
        if problem.bandwidth_grad and problem.x.dtype != torch.float64:
            # The derivative to a bandwidth sums gradients times distances, among which an outlier's drown the others in float32.
            exact = problem._replace(x=problem.x.double(), y=None if problem.y is None else problem.y.double())
            *doubles, grad_bandwidth = _evaluate(make_sweep, exact)
            value, grad_x, grad_y = (t.to(accumulation_dtype(problem.x.dtype)) for t in doubles)
            return value, grad_x, grad_y, grad_bandwidth
        batched = problem.x.ndim == 3
        if not batched:
            problem = _of_tensors(problem, itemgetter(None))
        # One problem at a time, whose tiles stay in cache.
        singles = (itemgetter(slice(n, n + 1)) for n in range(problem.x.shape[0]))
        return _joined([_evaluate_batch(make_sweep, _of_tensors(problem, single)) for single in singles], batched)


def _problems_at_once(problem: Problem) -> int:
    """Of a batch as many as one launch takes: kernels pad each to whole tiles, which small ones are far from."""
    rows = max(t.shape[1] for t in problem[:2] if isinstance(t, Tensor))
    return max(1, _PADDED // ((rows + -rows % 128) * (problem.x.shape[2] + -problem.x.shape[2] % 16)))


def _of_tensors(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with a function of each tensor that may have a batch dimension."""
    tensors: dict[str, Any] = {
        name: function(t) for name, t in problem._asdict().items() if isinstance(t, Tensor) and not name.startswith("bandwidth")
    }
    return problem._replace(**tensors)


def _evaluate_batch(make_sweep: Callable[..., Sweep], problem: Problem) -> Result:
    """Of B problems, each tensor with a batch dimension."""
    unbiased, bandwidth_grad = problem.unbiased, problem.bandwidth_grad
    family, h, a = kernel_numbers(problem)
    x_part = problem.x, problem.x_weights, problem.all_x, problem.all_x_weights, problem.x_start
    samples = [_Sample.of(*x_part, unbiased, problem.x_grad or bandwidth_grad)]
    if problem.y is not None:
        y_part = problem.y, problem.y_weights, problem.all_y, problem.all_y_weights, problem.y_start
        samples.append(_Sample.of(*y_part, unbiased, problem.y_grad or bandwidth_grad))
    mean = torch.stack([middle(sample.whole) for sample in samples]).mean(0)
    # MMD² of a radial kernel does not change when both samples move; float32 is useless far from the origin.
    centre = mean if family.radial else torch.zeros_like(mean)
    origin = mean if problem.y is not None else torch.zeros_like(mean)
    distances = [(sample.whole - origin[:, None]).square().sum(2, dtype=torch.float64).mean(1) for sample in samples]
    spread = torch.stack(distances).sum(0)
    dim = mean.shape[1]
    kernel = KernelSum.of(family, h, a, dim, mean.device, spread if problem.y is not None else spread + dim)

    sweep = make_sweep(kernel, [sample.whole for sample in samples], centre, any(sample.gradient for sample in samples))
    points = [sweep.points(sample.z, sample.weights, sample.gradient) for sample in samples]
    value = 0 * mean.sum(1, dtype=torch.float64)
    minus_one = torch.full_like(value, -1)
    for sample, rows in zip(samples, points, strict=True):
        value = value + sample.scale * sample.share**2 * sweep.within(rows, sample.scale * sample.share)
        for other, weights, share in sample.others:
            across = sweep.across(rows, sweep.points(other, weights, False), sample.scale * share)
            value = value + sample.scale * sample.share * share * across
    if problem.all_x is not None and len(samples) == 2:
        # The rows of each against the whole of the other, for a gradient that takes nothing from elsewhere.
        whole = [sweep.points(sample.whole, sample.whole_weights, False) for sample in samples]
        value = value - 2 * samples[0].share * sweep.across(points[0], whole[1], minus_one)
        if samples[1].gradient:
            sweep.across(points[1], whole[0], minus_one)
    elif len(samples) == 2:
        value = value - 2 * sweep.across(points[0], points[1], minus_one)
    gradients: list[Tensor | None] = [
        _gradient(sample, sweep.pull(rows), kernel) if sample.gradient else None for sample, rows in zip(samples, points, strict=True)
    ]
    if not unbiased:
        for sample, gradient in zip(samples, gradients, strict=True):
            value = value + _diagonal(sample, kernel, gradient)
    grad_bandwidth = mean.new_empty(0, dtype=torch.float64)
    if bandwidth_grad:
        # k does not change when the points, seen from the centre, and h grow together: Euler's theorem gives the derivative to h.
        moved = [((s.z - centre[:, None]).double() * g).sum((1, 2)) for s, g in zip(samples, gradients, strict=True) if g is not None]
        grad_bandwidth = -torch.stack(moved).sum(0) / kernel.bandwidth
    if problem.y is None:
        prior, prior_gradient, prior_bandwidth_gradient = _prior(samples[0], kernel)
        value, gradients[0] = value + prior, None if gradients[0] is None else gradients[0] + prior_gradient
        grad_bandwidth = grad_bandwidth + prior_bandwidth_gradient if bandwidth_grad else grad_bandwidth
    wanted = [g if want and g is not None else mean.new_empty(0) for g, want in zip([*gradients, None][:2], problem[-3:-1], strict=True)]
    return value.to(mean.dtype), wanted[0], wanted[1], grad_bandwidth


class _Sample(NamedTuple):
    """One sample of each of B problems in the accumulation dtype, or some rows z of one, and its part in MMD²."""

    z: Tensor
    weights: Tensor | None
    whole: Tensor
    whole_weights: Tensor | None
    others: list[tuple[Tensor, Tensor | None, float]]  # the whole's rows before and after z, and for equal weights their share in it
    share: float  # of z in the whole, for equal weights; the factor from a mean over z to its part of the mean over the whole
    row_weights: float | Tensor  # p_i, (B, N, 1) or one for all
    sum_of_squares: float | Tensor  # Σ p_i² over z, (B,) or one for all
    scale: Tensor  # 1/(1 − Σ p_i²) of formula (2), or 1, (B,)
    gradient: bool

    @staticmethod
    def of(
        z: Tensor, weights: Tensor | None, whole: Tensor | None, whole_weights: Tensor | None, start: int, unbiased: bool, gradient: bool
    ) -> _Sample:
        dtype = accumulation_dtype(z.dtype)
        z, given_whole = z.to(dtype), whole_weights
        if weights is not None:
            whole_weights = None if whole is None or whole_weights is None else unit_weights(whole_weights, None, dtype)
            weights = unit_weights(weights, given_whole, dtype)
        others: list[tuple[Tensor, Tensor | None, float]] = []
        if whole is None:
            whole, whole_weights = z, weights
        else:
            whole = whole.to(dtype)
            for rows in (slice(0, start), slice(start + z.shape[1], whole.shape[1])):
                if rows.start < rows.stop:
                    share = (rows.stop - rows.start) / whole.shape[1]
                    part = (whole[:, rows], None, share) if whole_weights is None else (whole[:, rows], whole_weights[:, rows], 1.0)
                    others.append(part)
        scale = z.new_ones(z.shape[:1], dtype=torch.float64)
        if weights is None or whole_weights is None:
            n, total = z.shape[1], whole.shape[1]
            if unbiased:
                scale = scale / (1 - 1 / total)
            return _Sample(z, None, whole, None, others, n / total, 1 / total, n / total**2, scale, gradient)
        if unbiased:
            scale = scale / (1 - whole_weights.double().square().sum(1))
        own_square = weights.double().square().sum(1)
        return _Sample(z, weights, whole, whole_weights, others, 1.0, weights[..., None], own_square, scale, gradient)


def _gradient(sample: _Sample, pull: Tensor, kernel: KernelSum) -> Tensor:
    """−4γ_0·w_i times the pull of a sweep."""
    # In two factors: γ itself may be past the range of float32.
    scale = kernel.gamma[0].sqrt()
    return pull.mul_(scale.to(pull.dtype)).mul_(sample.row_weights * (-4 * scale).to(pull.dtype)).contiguous()


def _diagonal(sample: _Sample, kernel: KernelSum, gradient: Tensor | None) -> float | Tensor:
    """Σ_i w_i²·(k(z_i, z_i) − shift·φ(0)), (B,), and its gradient added to `gradient`.

    The shifts cancel between the sums of MMD², as the weights of each sum to one.
    """
    if kernel.kernel.radial:
        return sample.sum_of_squares * kernel.kernel.at_zero * ((1 - kernel.shifts) @ kernel.weights)
    assert isinstance(kernel.kernel, Polynomial)
    t = sample.z.square().sum(2, keepdim=True, dtype=torch.float64) * kernel.gamma
    weights = _row_weights(sample).square()
    if gradient is not None:
        slope = kernel.kernel.slope(t) @ (kernel.weights * kernel.gamma)
        gradient += (2 * weights * slope[..., None]).to(gradient.dtype) * sample.z
    value = (kernel.kernel.phi(t) - kernel.kernel.at_zero * kernel.shifts[:, None]) @ kernel.weights
    return (weights * value[..., None]).sum((1, 2))


def _row_weights(sample: _Sample) -> Tensor:
    """(B, N, 1), in float64. A number is filled in, as its copy to a GPU would wait and can't be captured in a CUDA graph."""
    z, p = sample.z, sample.row_weights
    p = p.double() if isinstance(p, Tensor) else z.new_full((1, 1, 1), p, dtype=torch.float64)
    return p.expand(*z.shape[:2], 1)


def _prior(sample: _Sample, kernel: KernelSum) -> tuple[Tensor, Tensor, Tensor]:
    """−2·Σ_i p_i·(E_y k(x_i, y) − shift) + E k(y, y') − shift, (B,), and its gradients to x and to the one bandwidth."""
    x, p, h = sample.z, _row_weights(sample), kernel.bandwidth
    cross, within = rbf_normal_mean_exponent(x, h), rbf_normal_self_exponent(x.shape[2], h)
    # The rows' share in the constant.
    share = p.sum(1)
    value = (share * _shifted_exp(within, kernel.shifts) - 2 * (p * _shifted_exp(cross, kernel.shifts[:, None])).sum(1)) @ kernel.weights
    cross, within = cross.exp(), share * within.exp() * kernel.weights
    slope = cross @ (kernel.weights / (h.square() + 1))
    gradient = x * (2 * p * slope[..., None]).to(x.dtype)
    # d/dh of the two exponents
    cross_slope = x.shape[2] / (h * (h.square() + 1)) + x.double().square().sum(2, keepdim=True) * h / (h.square() + 1).square()
    within_slope = 2 * x.shape[2] / (h * (h.square() + 2))
    return value, gradient, (within * within_slope).sum(1) - 2 * (p * cross * cross_slope * kernel.weights).sum((1, 2))


def _shifted_exp(exponent: Tensor, shifts: Tensor) -> Tensor:
    return torch.where(shifts > 0, exponent.expm1(), exponent.exp())


# Where the arguments are that have a gradient, in the order of the op's gradients.
_DIFFERENTIABLE = tuple(Problem._fields.index(name) for name in ("x", "y", "bandwidth"))


def apply_mmd(*args: Any) -> Tensor:
    """MMD², differentiable; arguments of `torch.ops.fastvae.mmd` without the last three, which say what gradients are wanted."""
    flags = tuple(needs_grad(args[n]) for n in _DIFFERENTIABLE)
    # Outside of the compiler by way of the Function, which refuses forward-mode derivatives: the op would drop them.
    if torch.compiler.is_compiling():
        return cast(Tensor, mmd_op(*args, *flags)[0])
    return cast(Tensor, MMD.apply(*args, *flags)[0])  # type: ignore[no-untyped-call]


class MMD(torch.autograd.Function):
    """(MMD² and its gradients); only the first is differentiable. Arguments of `torch.ops.fastvae.mmd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Result:
        return cast(Result, mmd_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        ctx.mark_non_differentiable(*output[1:])
        # Else backward is handed zeros in their place, a launch each.
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    # The inputs are not needed but to refuse their second derivative: one that needs no gradient may change in place meanwhile.
    sources = (inputs[n] if ctx.needs_input_grad[n] else None for n in _DIFFERENTIABLE)
    ctx.save_for_backward(*sources, *output[1:])


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    # Unpacked once: activation checkpointing allows no more.
    tensors = ctx.saved_tensors
    sources, saved = tensors[:3], tensors[3:]
    grads: list[Tensor | None] = [None] * len(Problem._fields)
    if grad_value is None:
        return tuple(grads)
    for n, source, grad in zip(_DIFFERENTIABLE, sources, saved, strict=True):
        if not ctx.needs_input_grad[n]:
            continue
        if grad.numel() == 0:
            raise RuntimeError("fastvae::mmd was called without the gradient that backward needs: call fastvae.mmd, which asks for it")
        grad = forbid_second_derivative("mmd", grad, *sources)
        if source is sources[2]:
            # One bandwidth for all of a batch.
            grads[n] = (grad_value * grad).sum().reshape(source.shape).to(source)
        else:
            grads[n] = (grad_value[..., None, None] * grad).to(source.dtype)
    return tuple(grads)


mmd_op.register_autograd(_backward, setup_context=_setup_context)
