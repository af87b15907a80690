"""The custom ops and the autograd.Functions of vᵀKv and of the MMD² between groups: formulas of `fastvae.reference.quadratic_form`.

The forward sweep of a differentiable MMD² between groups also takes the gradient of the sum over the given pairs. Backward scales it where
the upstream is a multiple of that, and sweeps once more where it is not; on a GPU, where comparing the two would wait for it, always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae import checks
from fastvae.cpu import quadratic_form as cpu
from fastvae.cpu import small
from fastvae.kernel_sums import KernelNumbers, KernelSum, as_vector, stable_mean
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    accumulation_dtype,
    compiled_op,
    forbid_second_derivative,
    kernel_numbers,
    matmul_precision,
    needs_grad,
    no_forward_mode,
    vmap_by_loop,
    without_autocast,
    without_grad,
    zero_if_finite,
)
from fastvae.radial import Polynomial
from fastvae.reference.quadratic_form import GroupWeights, pair_upstreams, pair_values, pairs_with_self

ARGUMENTS = f"Tensor z, Tensor v, {KERNEL_SCHEMA}, str precision, str backend"
WEIGHTS = "Tensor total, Tensor products, Tensor members, bool unbiased, Tensor? given"


class Problem(NamedTuple):
    """The arguments that describe K and v, in the order of the schemas."""

    z: Tensor
    v: Tensor
    bandwidth: Tensor | None
    bandwidth_weights: Tensor | None
    bandwidth_numbers: list[float]
    weight_numbers: list[float]
    kernel: str
    kernel_parameters: list[float]
    precision: str
    backend: str


_OPTIONS = len(Problem._fields)


@torch.library.custom_op("fastvae::quadratic_form", mutates_args=(), schema=f"({ARGUMENTS}, bool diagonal) -> Tensor")
def quadratic_form_op(*args: Any) -> Tensor:
    """S (C, C) or its diagonal (C,), float64."""
    *problem, diagonal = args
    return _evaluate(Problem(*problem), None, diagonal=diagonal)[0]


@torch.library.custom_op("fastvae::quadratic_form_backward", mutates_args=(), schema=f"({ARGUMENTS}, Tensor upstream) -> Tensor")
def quadratic_form_backward_op(*args: Any) -> Tensor:
    """The gradient to z from the upstream (C, C)."""
    *problem, upstream = args
    return _evaluate(Problem(*problem), upstream, values=False)[1]


@torch.library.custom_op(
    "fastvae::group_mmd", mutates_args=(), schema=f"({ARGUMENTS}, {WEIGHTS}, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)
def group_mmd_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MMD² (G, G), which groups are valid, which pairs, and if `gradient` the gradient of the sum over the given pairs, else empty."""
    return _group_mmd(*args)


def _group_mmd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, groups, gradient = Problem(*args[:_OPTIONS]), GroupProblem(*args[_OPTIONS:-1]), args[-1]
    if problem.backend == "triton" or problem.z.device.type == "cuda":
        return _triton_group_mmd(problem, groups)
    weights, dtype = groups.weights(), accumulation_dtype(problem.z.dtype)
    to_sums = pair_upstreams(groups.counts(weights.pairs), weights) if gradient else None
    sums, pull = _evaluate(problem, to_sums)
    values = pair_values(sums, pairs_with_self(problem.z, problem.v, *kernel_numbers(problem)), weights).to(dtype)
    gradient_of_sum = sums.new_empty(0, dtype=dtype) if to_sums is None else _with_own(problem, pull, to_sums, groups.unbiased)
    return values, weights.valid, weights.pairs, gradient_of_sum


@torch.library.custom_op(
    "fastvae::group_mmd_backward", mutates_args=(), schema=f"({ARGUMENTS}, {WEIGHTS}, Tensor upstream, Tensor expected_grad) -> Tensor"
)
def group_mmd_backward_op(*args: Any) -> Tensor:
    """The gradient to z from the upstream (G, G), by that of the sum over the given pairs if this is not empty."""
    return _group_mmd_gradient(*args)


def _group_mmd_gradient(*args: Any) -> Tensor:
    problem, groups, (upstream, expected_grad) = Problem(*args[:_OPTIONS]), GroupProblem(*args[_OPTIONS:-2]), args[-2:]
    if problem.backend == "triton" or problem.z.device.type == "cuda":
        return _triton_group_mmd_backward(problem, groups, upstream)
    weights = groups.weights()
    if expected_grad.numel():
        # Of a pair and its opposite only the sum counts.
        found, expected = (t + t.T for t in (upstream.double().where(weights.pairs, 0), groups.counts(weights.pairs)))
        ratio = found.sum() / expected.sum()
        if torch.allclose(found, ratio * expected, rtol=32 * torch.finfo(expected_grad.dtype).eps, atol=0):
            return cast(Tensor, ratio * expected_grad)
    to_sums = pair_upstreams(upstream, weights)
    return _with_own(problem, _evaluate(problem, to_sums, values=False)[1], to_sums, groups.unbiased)


@quadratic_form_op.register_fake
def _fake(*args: Any) -> Tensor:
    v, diagonal = args[1], args[-1]
    return cast(Tensor, v.new_empty(v.shape[1:] if diagonal else v.shape[1:] * 2, dtype=torch.float64))


@group_mmd_op.register_fake
def _group_mmd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (z, v), dtype = args[:2], accumulation_dtype(args[0].dtype)
    size = v.shape[1]
    valid, pairs = (v.new_empty(shape, dtype=torch.bool) for shape in ((size,), (size, size)))
    return z.new_empty((size, size), dtype=dtype), valid, pairs, z.new_empty(z.shape if args[-1] else (0,), dtype=dtype)


@quadratic_form_backward_op.register_fake
@group_mmd_backward_op.register_fake
def _backward_fake(*args: Any) -> Tensor:
    return cast(Tensor, args[0].new_empty(args[0].shape, dtype=accumulation_dtype(args[0].dtype)))


class GroupProblem(NamedTuple):
    """The arguments of `group_mmd_op` after those of `Problem`."""

    total: Tensor
    products: Tensor
    members: Tensor
    unbiased: bool
    given: Tensor | None  # pairs of groups (P, 2), whose sum is to be expected; all if None

    def weights(self) -> GroupWeights:
        return GroupWeights.of(self.total, self.products, self.members, self.unbiased)

    def counts(self, pairs: Tensor) -> Tensor:
        """(G, G), how often each of the valid `pairs` is given."""
        counts = pairs.double()
        if self.given is None:
            return counts
        return torch.zeros_like(counts).index_put_(self.given.unbind(1), counts.new_ones(1), accumulate=True) * counts


def _triton(problem: Problem, upstream: Tensor | None = None, diagonal: bool = False) -> Tensor:
    """S as parts that sum to it, its diagonal, or from an upstream the gradient to z."""
    from fastvae.kernels import quadratic_form as kernels

    with without_autocast(problem.z.device):
        numbers = KernelNumbers.of(*kernel_numbers(problem), problem.z.shape[1], False, problem.z.device)
        arguments, precision = (numbers, problem.z, problem.v), matmul_precision(problem.precision)
        if upstream is not None:
            return cast(Tensor, kernels.quadratic_form_backward(*arguments, upstream, precision))
        form = kernels.quadratic_form_diagonal if diagonal else kernels.quadratic_form
        return cast(Tensor, form(*arguments, precision))


def _triton_group_mmd(problem: Problem, groups: GroupProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastvae.kernels import quadratic_form as kernels

    own = pairs_with_self(problem.z, problem.v, *kernel_numbers(problem))
    if isinstance(own, Tensor) and own.ndim == 0:
        own = own * groups.weights().products
    dtype = accumulation_dtype(problem.z.dtype)
    return *kernels.pair_values(_triton(problem), own, *groups[:4], dtype), problem.z.new_empty(0, dtype=dtype)


def _triton_group_mmd_backward(problem: Problem, groups: GroupProblem, upstream: Tensor) -> Tensor:
    from fastvae.kernels import quadratic_form as kernels

    to_sums = kernels.pair_upstreams(upstream, *groups[:4])
    return _with_own(problem, _triton(problem, to_sums), to_sums, groups.unbiased)


def _evaluate(
    problem: Problem,
    upstream: Tensor | None,
    values: bool = True,
    diagonal: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    if problem.backend == "triton" or problem.z.device.type == "cuda":
        empty = problem.z.new_empty(0)
        if not values:
            return empty, _triton(problem, upstream)
        found = _triton(problem, None, diagonal)
        return found if diagonal else found.sum(0), empty
    with without_autocast(problem.z.device):
        dtype = accumulation_dtype(problem.z.dtype)
        z, v = problem.z.to(dtype), problem.v.to(dtype)
        family, bandwidth, weights = kernel_numbers(problem)
        if not diagonal and (result := small.quadratic_form(family, z, v, bandwidth, weights, upstream)) is not None:
            return result[0], z.new_empty(0) if result[1] is None else result[1]
        centre = stable_mean(z) if family.radial else torch.zeros_like(z[0])
        distance = 2 * (z - centre).square().sum(1, dtype=torch.float64).mean()
        kernel = KernelSum.of(family, bandwidth, weights, z.shape[1], z.device, distance)
        total, pull = cpu.quadratic_form(kernel, z, v, centre, upstream, values, diagonal, progress)
        zero = zero_if_finite(z)
        # What the shifts leave out of each pair, in closed form.
        exact = v.double()
        column_sums = exact.sum(0)
        if diagonal:
            pairs = column_sums.square() - exact.square().sum(0)
        else:
            pairs = column_sums[:, None] * column_sums - exact.T @ exact
        total = total + pairs * family.value_at_zero * (kernel.weights @ kernel.shifts) + zero
        if upstream is None or pull is None:
            return total, z.new_empty(0)
        if slope_shift := float((kernel.weights * kernel.ratios) @ kernel.slope_shifts):
            coefficients = v @ (upstream + upstream.T).to(dtype)
            z = z - centre
            left_out = (coefficients @ v.sum(0))[:, None] * z - coefficients @ (v.T @ z)
            pull = pull + slope_shift * left_out
        # In two factors: γ itself may be past the range of float32.
        root = (zero + kernel.gamma[0]).sqrt().to(dtype)
        return total, (pull * root).mul_(-2 * root).contiguous()


def _with_own(problem: Problem, gradient: Tensor, to_sums: Tensor, unbiased: bool) -> Tensor:
    """The gradient to z through S, and with it that through O, from the upstream of S."""
    if problem.kernel != Polynomial.name:
        return gradient
    family, h, a = kernel_numbers(problem)
    assert isinstance(family, Polynomial)
    # The diagonal of O is for the biased estimator alone.
    to_own = to_sums - torch.diag(to_sums.diagonal()) if unbiased else to_sums
    z, v = problem.z.double(), problem.v.double()
    gamma = family.gamma(as_vector(h, z.device), z.shape[1])
    slopes = (family.slope(z.square().sum(1, keepdim=True) * gamma) * gamma) @ as_vector(a, z.device)
    return gradient + (2 * (slopes * ((v @ to_own) * v).sum(1))[:, None] * z).to(gradient.dtype)


def quadratic_form_diagonal(*args: Any, progress: Callable[[float], None] | None = None) -> Tensor:
    """The diagonal of S, not differentiable, where v of half the rows of z stands for [v, −v].

    `progress` is called with the fraction done, on a CPU only.
    """
    problem = Problem(*args)
    with torch.no_grad():
        if problem.backend != "triton" and problem.z.device.type == "cpu" and (result := _small_diagonal(problem)) is not None:
            return result
        if len(problem.v) != len(problem.z):
            problem = problem._replace(v=torch.cat([problem.v, -problem.v]))
        return _evaluate(problem, None, diagonal=True, progress=progress)[0]


def _small_diagonal(problem: Problem) -> Tensor | None:
    """From one array of all pairs; None as of `small.kernel_matrix`."""
    with without_autocast(problem.z.device):
        dtype = accumulation_dtype(problem.z.dtype)
        if (found := small.kernel_matrix(*kernel_numbers(problem), problem.z.to(dtype))) is None:
            return None
        k, shift = found
        v, n = problem.v.to(dtype), len(problem.v)
        if halved := n != len(k):
            k = (k[:n, :n] + k[n:, n:]).sub_(k[:n, n:]).sub_(k[n:, :n])
        form = (k.to(dtype) @ v).mul_(v).sum(0).double()
        if shift:
            squares = v.square().sum(0, dtype=torch.float64)
            form += shift * (-2 * squares if halved else v.sum(0, dtype=torch.float64).square() - squares)
        return form


def _quadratic_form_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    *ctx.options, ctx.diagonal = inputs[4:]


def _quadratic_form_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, *tensors = ctx.saved_tensors
    gradient = without_grad(quadratic_form_backward_op, z, *tensors, *ctx.options, torch.diag(grad) if ctx.diagonal else grad)
    gradient = forbid_second_derivative("quadratic_form", gradient.to(z.dtype), grad, z)
    return (gradient, *[None] * _OPTIONS)


def apply_group_mmd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² between groups, differentiable to z, which groups are valid, and which pairs; arguments of `Problem` and `GroupProblem`."""
    problem = Problem(*args[:_OPTIONS])
    # On a GPU the gradient of another upstream than that of the sum would be a sweep too many.
    gradient = problem.z.device.type == "cpu" and problem.backend != "triton" and needs_grad(problem.z)
    if torch.compiler.is_compiling():
        values, valid, pairs, _ = compiled_op("group_mmd", group_mmd_op, *args, gradient)
        return values, valid, pairs
    function: Any = GroupMMD if checks.needs_dispatcher(*args[:2]) else _PlainGroupMMD
    values, valid, pairs, _ = function.apply(*args, gradient)
    return values, valid, pairs


class GroupMMD(torch.autograd.Function):
    """MMD² between groups. Arguments of `torch.ops.fastvae.group_mmd`."""

    generate_vmap_rule = True
    jvp = no_forward_mode("group_mmd")

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", group_mmd_op(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _group_mmd_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _group_mmd_backward(ctx, *grads)


class _PlainGroupMMD(torch.autograd.Function):
    """`GroupMMD` without `setup_context` and the dispatcher."""

    jvp = GroupMMD.jvp

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = _group_mmd(*args)
        _group_mmd_setup(ctx, args, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _group_mmd_backward(ctx, *grads)


def _group_mmd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Of which there are none but that of the values.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    *weights, ctx.unbiased, given, _ = inputs[_OPTIONS:]
    ctx.save_for_backward(*inputs[:4], *weights, given, output[3])
    ctx.options = inputs[4:_OPTIONS]


def _group_mmd_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    nothing = [None] * (_OPTIONS + len(GroupProblem._fields))
    if grad is None:
        return (None, *nothing)
    z, *tensors, given, expected_grad = ctx.saved_tensors
    if expected_grad.numel() and given is None and not any(grad.stride()):
        # One number for all pairs, as of their sum or mean.
        gradient = grad[0, 0] * expected_grad
    else:
        backward = group_mmd_backward_op if checks.needs_dispatcher(z, grad) else _group_mmd_gradient
        gradient = without_grad(backward, z, *tensors[:3], *ctx.options, *tensors[3:], ctx.unbiased, given, grad, expected_grad)
    gradient = forbid_second_derivative("group_mmd", gradient.to(z.dtype), grad, z)
    return (gradient, *nothing)


for op in (quadratic_form_op, quadratic_form_backward_op, group_mmd_op, group_mmd_backward_op):
    vmap_by_loop(op)
quadratic_form_op.register_autograd(_quadratic_form_backward, setup_context=_quadratic_form_setup)
group_mmd_op.register_autograd(_group_mmd_backward, setup_context=_group_mmd_setup)
