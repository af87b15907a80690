"""The custom ops of vᵀKv and of the MMD² between groups, and their derivatives. Formulas of `fastvae.reference.quadratic_form`.

On a CPU the forward sweep of a differentiable MMD² between groups also computes the gradient of the sum over the given pairs. If the
upstream is uniform over these pairs, backward only scales that gradient; otherwise it sweeps once more. On a GPU it always sweeps, as the
comparison would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.cpu import quadratic_form as cpu
from fastvae.cpu import small
from fastvae.cpu.closed_forms import diagonal_hessian_product
from fastvae.dispatch import accumulation_dtype, in_forward_mode, needs_dispatcher, runs_on_triton, zero_if_finite
from fastvae.kernel_sums import stable_mean
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    autograd_function,
    custom_op,
    differentiable,
    direction_of_all_ranks,
    leaves,
    matmul_precision,
    needs_grad,
    no_forward_mode,
    refuse_tangents,
    save_arguments,
    save_inputs,
    saved_arguments,
    without_autocast,
    without_grad,
)
from fastvae.ops.kernel_hvp import kernel_hvp, kernel_hvp_op
from fastvae.ops.kernel_matmul import kernel_matmul_backward_op, kernel_matmul_op
from fastvae.reference.quadratic_form import GroupWeights, pair_upstreams, pair_values, pairs_with_self

SCHEMA = f"Tensor z, Tensor v, {KERNEL_SCHEMA}, str precision, str backend"
WEIGHTS = "Tensor total, Tensor products, Tensor members, bool unbiased, Tensor? given"


class Problem(NamedTuple):
    """The arguments that describe K and v."""

    z: Tensor
    v: Tensor
    kernel: KernelArguments
    precision: str
    backend: str

    @staticmethod
    def of(z: Tensor, v: Tensor, *others: Any) -> Problem:
        """From the first arguments of an op, in the order of its schema."""
        return Problem(z, v, KernelArguments(*others[:-2]), *others[-2:])

    def own_slopes(self) -> Tensor:
        """The derivative of k(z_i, z_i) to ‖z_i‖², for a kernel of x·y, (N,) in float64."""
        (family, h, a), z = self.kernel.vectors(self.z.device), self.z.double()
        gamma = family.gamma(h, z.shape[1])
        return (family.derivatives(z.square().sum(1, keepdim=True) * gamma)[0] * gamma) @ a


# The arguments of each op that describe K and v.
_ARGUMENTS = len(Problem._fields) - 1 + len(KernelArguments._fields)


def _quadratic_form(*args: Any) -> Tensor:
    """S (C, C) or its diagonal (C,), float64."""
    *problem, diagonal = args
    return _evaluate(Problem.of(*problem), None, diagonal=diagonal)[0]


def _quadratic_form_gradient(*args: Any) -> Tensor:
    """The gradient to z from the upstream (C, C)."""
    *problem, upstream = args
    return _evaluate(Problem.of(*problem), upstream, values=False)[1]


def _group_mmd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MMD² (G, G), which groups and which pairs are valid, and if `gradient` that of the sum over the given pairs, otherwise empty."""
    problem, groups, gradient = Problem.of(*args[:_ARGUMENTS]), GroupArguments(*args[_ARGUMENTS:-1]), args[-1]
    if runs_on_triton(problem.backend, problem.z):
        return _triton_group_mmd(problem, groups)
    weights, dtype = groups.weights(), accumulation_dtype(problem.z.dtype)
    to_sums = pair_upstreams(groups.counts(weights.pairs), weights) if gradient else None
    sums, grad_z = _evaluate(problem, to_sums)
    values = pair_values(sums, pairs_with_self(problem.z, problem.v, *problem.kernel.unpack()), weights).to(dtype)
    gradient_of_sum = sums.new_empty(0, dtype=dtype) if to_sums is None else _add_pairs_with_self(problem, grad_z, to_sums, groups.unbiased)
    return values, weights.valid, weights.pairs, gradient_of_sum


def _group_mmd_gradient(*args: Any) -> Tensor:
    """The gradient to z from the upstream (G, G). `expected_grad` is that of the sum over the given pairs, or empty."""
    problem, groups, (upstream, expected_grad) = Problem.of(*args[:_ARGUMENTS]), GroupArguments(*args[_ARGUMENTS:-2]), args[-2:]
    if runs_on_triton(problem.backend, problem.z):
        return _triton_group_mmd_backward(problem, groups, upstream)
    weights = groups.weights()
    if expected_grad.numel():
        # Only the sum of a pair and its opposite matters.
        found, expected = (t + t.T for t in (upstream.double().where(weights.pairs, 0), groups.counts(weights.pairs)))
        ratio = found.sum() / expected.sum()
        if torch.allclose(found, ratio * expected, rtol=32 * torch.finfo(expected_grad.dtype).eps, atol=0):
            return cast(Tensor, ratio * expected_grad)
    to_sums = pair_upstreams(upstream, weights)
    return _add_pairs_with_self(problem, _evaluate(problem, to_sums, values=False)[1], to_sums, groups.unbiased)


def _fake(*args: Any) -> Tensor:
    v, diagonal = args[1], args[-1]
    return cast(Tensor, v.new_empty(v.shape[1:] if diagonal else v.shape[1:] * 2, dtype=torch.float64))


def _group_mmd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (z, v), dtype = args[:2], accumulation_dtype(args[0].dtype)
    size = v.shape[1]
    valid, pairs = (v.new_empty(shape, dtype=torch.bool) for shape in ((size,), (size, size)))
    return z.new_empty((size, size), dtype=dtype), valid, pairs, z.new_empty(z.shape if args[-1] else (0,), dtype=dtype)


def _backward_fake(*args: Any) -> Tensor:
    return cast(Tensor, args[0].new_empty(args[0].shape, dtype=accumulation_dtype(args[0].dtype)))


class GroupArguments(NamedTuple):
    """The arguments of `group_mmd_op` after those of `Problem`, which describe the groups."""

    total: Tensor
    products: Tensor
    members: Tensor
    unbiased: bool
    given: Tensor | None  # pairs of groups (P, 2), whose sum is likely to be differentiated; all if None

    def weights(self) -> GroupWeights:
        return GroupWeights.of(self.total, self.products, self.members, self.unbiased)

    def counts(self, pairs: Tensor) -> Tensor:
        """(G, G), how often each of the valid `pairs` is given."""
        counts = pairs.double()
        if self.given is None:
            return counts
        return torch.zeros_like(counts).index_put_(self.given.unbind(1), counts.new_ones(1), accumulate=True) * counts


def _triton(problem: Problem, upstream: Tensor | None = None, diagonal: bool = False) -> Tensor:
    """Parts that sum to S, or its diagonal, or from an upstream the gradient to z."""
    import fastvae.kernels.quadratic_form as kernels

    with without_autocast(problem.z.device):
        arguments = problem.kernel.numbers(problem.z), problem.z, problem.v
        precision = matmul_precision(problem.precision)
        if upstream is not None:
            return cast(Tensor, kernels.quadratic_form_backward(*arguments, upstream, precision))
        form = kernels.quadratic_form_diagonal if diagonal else kernels.quadratic_form
        return cast(Tensor, form(*arguments, precision))


def _triton_group_mmd(problem: Problem, groups: GroupArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import fastvae.kernels.quadratic_form as kernels

    own = pairs_with_self(problem.z, problem.v, *problem.kernel.unpack())
    if isinstance(own, Tensor) and own.ndim == 0:
        own = own * groups.weights().products
    dtype = accumulation_dtype(problem.z.dtype)
    return *kernels.pair_values(_triton(problem), own, *groups[:4], dtype), problem.z.new_empty(0, dtype=dtype)


def _triton_group_mmd_backward(problem: Problem, groups: GroupArguments, upstream: Tensor) -> Tensor:
    import fastvae.kernels.quadratic_form as kernels

    to_sums = kernels.pair_upstreams(upstream, *groups[:4])
    return _add_pairs_with_self(problem, _triton(problem, to_sums), to_sums, groups.unbiased)


def _evaluate(
    problem: Problem,
    upstream: Tensor | None,
    values: bool = True,
    diagonal: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    if runs_on_triton(problem.backend, problem.z):
        empty = problem.z.new_empty(0)
        if not values:
            return empty, _triton(problem, upstream)
        found = _triton(problem, None, diagonal)
        return found if diagonal else found.sum(0), empty
    with without_autocast(problem.z.device):
        dtype = accumulation_dtype(problem.z.dtype)
        z, v = problem.z.to(dtype), problem.v.to(dtype)
        family, bandwidth, weights = problem.kernel.unpack()
        if not diagonal and (result := small.quadratic_form(family, z, v, bandwidth, weights, upstream)) is not None:
            return result[0], z.new_empty(0) if result[1] is None else result[1]
        centre = stable_mean(z) if family.radial else torch.zeros_like(z[0])
        kernel = problem.kernel.sum(z.shape[1], z.device, 2 * (z - centre).square().sum(1, dtype=torch.float64).mean())
        total, row_gradient = cpu.quadratic_form(kernel, z, v, centre, upstream, values, diagonal, progress)
        zero = zero_if_finite(z)
        total = total + cpu.pair_weights(v, diagonal) * kernel.value_constant + zero
        if upstream is None or row_gradient is None:
            return total, z.new_empty(0)
        if slope_constant := float((kernel.weights * kernel.ratios) @ kernel.slope_subtracts_constant):
            coefficients = v @ (upstream + upstream.T).to(dtype)
            z = z - centre
            of_constant = (coefficients @ v.sum(0))[:, None] * z - coefficients @ (v.T @ z)
            row_gradient = row_gradient + slope_constant * of_constant
        # In two factors, as γ itself may be out of the range of float32.
        root = (zero + kernel.gamma[0]).sqrt().to(dtype)
        return total, (row_gradient * root).mul_(-2 * root).contiguous()


def _add_pairs_with_self(problem: Problem, gradient: Tensor, to_sums: Tensor, unbiased: bool) -> Tensor:
    """Adds to the gradient to z through S that through O, from the upstream of S."""
    if problem.kernel.unpack()[0].radial:
        return gradient
    weights = _own_weights(problem, to_sums, unbiased)
    return gradient + (2 * (problem.own_slopes() * weights)[:, None] * problem.z.double()).to(gradient.dtype)


def _own_weights(problem: Problem, to_sums: Tensor, unbiased: bool) -> Tensor:
    """How much k(z_i, z_i) counts in O times its upstream, (N,)."""
    # Only the biased estimator contains the diagonal of O.
    to_own = to_sums - torch.diag(to_sums.diagonal()) if unbiased else to_sums
    v = problem.v.double()
    return ((v @ to_own) * v).sum(1)


def _own_hessian_product(problem: Problem, to_sums: Tensor, unbiased: bool, direction: Tensor) -> Tensor | float:
    """The Hessian of O times its upstream, times a direction."""
    kernel = problem.kernel.vectors(problem.z.device)
    if kernel[0].radial:
        return 0.0
    return diagonal_hessian_product(problem.z, _own_weights(problem, to_sums, unbiased)[:, None], *kernel, direction)


def quadratic_form_diagonal(*args: Any, progress: Callable[[float], None] | None = None) -> Tensor:
    """The diagonal of S, not differentiable. v of half as many rows as z stands for [v, −v].

    `progress` is called with the fraction done, on a CPU only.
    """
    problem = Problem.of(*args)
    with torch.no_grad():
        if problem.backend != "triton" and problem.z.device.type == "cpu" and (result := _small_diagonal(problem)) is not None:
            return result
        if len(problem.v) != len(problem.z):
            problem = problem._replace(v=torch.cat([problem.v, -problem.v]))
        return _evaluate(problem, None, diagonal=True, progress=progress)[0]


def _small_diagonal(problem: Problem) -> Tensor | None:
    """From one array of all pairs; None where `small.kernel_matrix` returns None."""
    with without_autocast(problem.z.device):
        dtype = accumulation_dtype(problem.z.dtype)
        if (found := small.kernel_matrix(*problem.kernel.unpack(), problem.z.to(dtype))) is None:
            return None
        k, constant = found
        v, n = problem.v.to(dtype), len(problem.v)
        if halved := n != len(k):
            k = (k[:n, :n] + k[n:, n:]).sub_(k[:n, n:]).sub_(k[n:, :n])
        form = (k.to(dtype) @ v).mul_(v).sum(0).double()
        if constant:
            # Of [v, −v] the sum is zero.
            form += constant * (-2 * v.square().sum(0, dtype=torch.float64) if halved else cpu.pair_weights(v, True))
        return form


def _quadratic_form_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (*arguments, diagonal), _ = saved_arguments(ctx)
    gradient = _form_gradient(torch.diag(grad) if diagonal else grad, arguments)
    return (gradient.to(arguments[0].dtype), *[None] * _ARGUMENTS)


def _form_gradient(upstream: Tensor, arguments: Sequence[Any]) -> Tensor:
    """The gradient of S to z from its upstream (C, C), differentiable to both where that is wanted."""
    if needs_grad(upstream, arguments[0]) or in_forward_mode():
        return cast(Tensor, _FormGradient.apply(*leaves(arguments), upstream))
    return cast(Tensor, without_grad(quadratic_form_backward_op, *arguments, upstream))


def _double_backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
    (*arguments, upstream), _ = saved_arguments(ctx)
    to_z, to_upstream = _hessian_product(arguments, upstream, direction, ctx.needs_input_grad[0], ctx.needs_input_grad[-1])
    return to_z, *[None] * (len(arguments) - 1), to_upstream


def _double_jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
    (*arguments, upstream), _ = saved_arguments(ctx)
    to_z = torch.zeros_like(arguments[0]) if tangents[0] is None else tangents[0]
    gradient = cast(Tensor, _hessian_product(arguments, upstream, to_z, True, False)[0]).to(accumulation_dtype(to_z.dtype))
    return gradient if tangents[-1] is None else gradient + _form_gradient(tangents[-1], arguments)


def _hessian_product(
    arguments: Sequence[Any], upstream: Tensor, direction: Tensor, z_grad: bool, upstream_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of Σ_i direction_i·gradient_i to z and to the upstream of `_form_gradient`."""
    problem, dtype = Problem.of(*arguments), accumulation_dtype(arguments[0].dtype)
    v = problem.v.to(dtype)
    # Formula (2) is the gradient of Σ_{i≠j} ½·(v_i·B·v_jᵀ)·k(z_i, z_j).
    with without_autocast(v.device):
        u = v @ (0.5 * (upstream + upstream.T)).to(dtype)
    given = problem.z, None, u, v, direction.to(dtype), None, None, None
    found = kernel_hvp("group_mmd", *given, *problem.kernel, problem.precision, problem.backend, z_grad, False, upstream_grad, False)
    to_z, _, to_u, _ = found
    with without_autocast(v.device):
        to_upstream = None if to_u is None else (v.T @ to_u).to(upstream.dtype)
    return None if to_z is None else to_z.to(problem.z.dtype), to_upstream


def _group_mmd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Only the values have a gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    save_arguments(ctx, inputs, output[3:])


def _group_mmd_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    nothing = [None] * (_ARGUMENTS + len(GroupArguments._fields))
    if grad is None:
        return (None, *nothing)
    arguments, (expected_grad,) = saved_arguments(ctx)
    z, groups = arguments[0], GroupArguments(*arguments[_ARGUMENTS:-1])
    if needs_grad(z, grad) or in_forward_mode():
        gradient = _gradient_through_sums(pair_upstreams(grad, groups.weights()), arguments)
    elif expected_grad is not None and expected_grad.numel() and groups.given is None and not any(grad.stride()):
        # The upstream is one number for all pairs, as that of their sum or mean is.
        gradient = grad[0, 0] * expected_grad
    else:
        backward = group_mmd_backward_op if needs_dispatcher(z, grad) else _group_mmd_gradient
        gradient = without_grad(backward, *arguments[:-1], grad, expected_grad)
    return (gradient.to(z.dtype), *nothing)


def _gradient_through_sums(to_sums: Tensor, arguments: Sequence[Any]) -> Tensor:
    """The gradient of MMD² between groups to z, from that to S, differentiable to both. `arguments` are those of `group_mmd_op`."""
    problem, unbiased = arguments[:_ARGUMENTS], GroupArguments(*arguments[_ARGUMENTS:-1]).unbiased
    return _add_pairs_with_self(Problem.of(*problem), _form_gradient(to_sums, problem), to_sums, unbiased)


def _group_mmd_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    for argument, tangent in zip(("groups", "bandwidth", "bandwidth_weights"), tangents[1:], strict=False):
        refuse_tangents("group_mmd", argument, tangent)
    arguments, _ = saved_arguments(ctx)
    values = _GroupTangent.apply(tangents[0], *leaves(arguments))  # type: ignore[no-untyped-call]
    return values, None, None, None


class _SharedForm(torch.autograd.Function):
    """The share in S of some rows of all, whose upstream gives the gradient of S to them. See `apply_shared_form`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, all_z: Tensor, others: Tensor, group: str, *options: Any) -> Tensor:
        save_arguments(ctx, (z, v, all_z, others, group, *options), ())
        form = quadratic_form_op if needs_dispatcher(z) else _quadratic_form
        # For a wide bandwidth k is near 1, and float32 sums of k cancel badly; the sweep over own pairs sums k − 1 instead.
        wide = torch.float64 if z.device.type == "cpu" else accumulation_dtype(z.dtype)
        product = kernel_matmul_op(z.to(wide), all_z.to(wide), others.to(wide), *options)
        across = v.double().T @ product.double()
        # Both ranks count their common pairs, which are halves of S.
        return cast(Tensor, form(z, v, *options, False) + 0.5 * (across + across.T))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z, v, all_z, others, group, *options), _ = saved_arguments(ctx)
        gradient = _form_gradient(grads[0], [z, v, *options])
        factors = v.double() @ (grads[0] + grads[0].T)
        across: Any = _AcrossGradient.apply(z, factors.to(gradient.dtype), all_z, others, group, *options)  # type: ignore[no-untyped-call]
        return (gradient + across).to(z.dtype), *[None] * (len(options) + 4)


class _AcrossGradient(torch.autograd.Function):
    """Σ_j (u_i·v_j)·∂k(z_i, z_j)/∂z_i over the rows j of other ranks, differentiable to z and u."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor, all_z: Tensor, others: Tensor, group: str, *options: Any) -> Tensor:
        save_arguments(ctx, (z, u, all_z, others, group, *options), ())
        wide = accumulation_dtype(z.dtype)
        return cast(
            Tensor, kernel_matmul_backward_op(u, z.to(wide), all_z.to(wide), others.to(wide), *options, True, False, False, False)[0]
        )

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        (z, u, all_z, others, group, *options), _ = saved_arguments(ctx)
        (direction,), dtype = directions, accumulation_dtype(z.dtype)
        everywhere = direction_of_all_ranks("z", direction, group)
        rows = z.to(dtype), all_z.to(dtype), u, others.to(dtype)
        # Each rank's gradient moves with its own rows and with those of the others.
        to_z = kernel_hvp("group_mmd", *rows, direction, everywhere, None, None, *options, True, False, False, False)[0]
        to_u = kernel_hvp("group_mmd", *rows, direction, None, None, None, *options, False, False, True, False)[2]
        return to_z, to_u, *[None] * (len(options) + 3)


def apply_shared_form(z: Tensor, v: Tensor, all_z: Tensor, others: Tensor, group: str, *options: Any) -> Tensor:
    """The share of the rows z in S (C, C) of all rows, float64; its gradient is that of the whole S.

    Args:
        others: (M, C), the v of all rows, 0 for those of z.
        group: the name of the process group whose ranks hold the other rows.
        options: those of `Problem`.
    """
    return cast(Tensor, _SharedForm.apply(z, v, all_z, others, group, *options))  # type: ignore[no-untyped-call]


class _GroupTangent(torch.autograd.Function):
    """The directional derivative of MMD² between groups along the tangent of z, its first argument."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tangent: Tensor, *arguments: Any) -> Tensor:
        problem, groups = Problem.of(*arguments[:_ARGUMENTS]), GroupArguments(*arguments[_ARGUMENTS:-1])
        dtype = accumulation_dtype(problem.z.dtype)
        v, direction = problem.v.to(dtype), tangent.to(dtype)
        given = problem.z, None, v, v, direction, None, None, None
        found = kernel_hvp_op(*given, *problem.kernel, problem.precision, problem.backend, False, False, True, False)
        own: Tensor | float = 0.0
        if not problem.kernel.unpack()[0].radial:
            columns = problem.v.double()
            own = columns.T @ (columns * (2 * problem.own_slopes() * (problem.z.double() * direction).sum(1))[:, None])
        return pair_values(v.double().T @ found[2].double(), own, groups.weights()).to(dtype)

    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tangent, *arguments), _ = saved_arguments(ctx)
        problem, groups = arguments[:_ARGUMENTS], GroupArguments(*arguments[_ARGUMENTS:-1])
        to_sums = pair_upstreams(grad, groups.weights())
        gradient = _gradient_through_sums(to_sums, arguments)
        to_z = None
        if ctx.needs_input_grad[1]:
            to_z = cast(Tensor, _hessian_product(problem, to_sums, tangent, True, False)[0])
            to_z = to_z + _own_hessian_product(Problem.of(*problem), to_sums, groups.unbiased, tangent)
        return gradient.to(tangent.dtype), to_z, *[None] * (len(arguments) - 1)

    jvp = no_forward_mode("a derivative of group_mmd in forward mode")


quadratic_form_op = custom_op("quadratic_form", f"({SCHEMA}, bool diagonal) -> Tensor", _quadratic_form, _fake)
quadratic_form_backward_op = custom_op(
    "quadratic_form_backward", f"({SCHEMA}, Tensor upstream) -> Tensor", _quadratic_form_gradient, _backward_fake
)
group_mmd_op = custom_op(
    "group_mmd", f"({SCHEMA}, {WEIGHTS}, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)", _group_mmd, _group_mmd_fake
)
group_mmd_backward_op = custom_op(
    "group_mmd_backward", f"({SCHEMA}, {WEIGHTS}, Tensor upstream, Tensor expected_grad) -> Tensor", _group_mmd_gradient, _backward_fake
)
_FormGradient = autograd_function(
    "QuadraticFormBackward", "group_mmd", quadratic_form_backward_op, save_inputs, _double_backward, _double_jvp
)
quadratic_form_op.register_autograd(_quadratic_form_backward, setup_context=save_inputs)
_apply = differentiable("GroupMMD", "group_mmd", 2, group_mmd_op, _group_mmd, _group_mmd_setup, _group_mmd_backward, _group_mmd_jvp)


def apply_group_mmd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² between groups, differentiable to z, and which groups and pairs are valid; arguments of `Problem` and `GroupArguments`."""
    problem = Problem.of(*args[:_ARGUMENTS])
    # On a GPU the upstream is not compared, so that this gradient would be of no use.
    gradient = problem.z.device.type == "cpu" and problem.backend != "triton" and needs_grad(problem.z)
    values, valid, pairs, _ = _apply(*args, gradient)
    return values, valid, pairs
