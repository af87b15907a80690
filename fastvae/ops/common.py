"""What the operations share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor

from fastvae.checks import requires_grad
from fastvae.kernel_sums import Numbers, rounding_of_sum
from fastvae.radial import Kernel, kernel_of

# How the schema of an op describes a kernel: bandwidths and weights either as a tensor or as numbers, which are no tensors of a graph.
KERNEL_SCHEMA = (
    "Tensor? bandwidth, Tensor? bandwidth_weights, float[] bandwidth_numbers, float[] weight_numbers, str kernel, float[] kernel_parameters"
)


class KernelArguments(Protocol):
    """The arguments of `KERNEL_SCHEMA`, among those of an op."""

    @property
    def bandwidth(self) -> Tensor | None: ...
    @property
    def bandwidth_weights(self) -> Tensor | None: ...
    @property
    def bandwidth_numbers(self) -> list[float]: ...
    @property
    def weight_numbers(self) -> list[float]: ...
    @property
    def kernel(self) -> str: ...
    @property
    def kernel_parameters(self) -> list[float]: ...


def kernel_arguments(kernel: Kernel, bandwidth: Numbers, weights: Numbers) -> tuple[Any, ...]:
    """The arguments of `KERNEL_SCHEMA`."""
    kernel, factor = kernel.canonical()
    if isinstance(bandwidth, Tensor):
        h, h_numbers = factor * bandwidth, []
    else:
        h, h_numbers = None, [factor * number for number in bandwidth]
    a, a_numbers = (weights, []) if isinstance(weights, Tensor) else (None, list(weights))
    return h, a, h_numbers, a_numbers, kernel.name, kernel.parameters


def kernel_numbers(problem: KernelArguments) -> tuple[Kernel, Numbers, Numbers]:
    """The kernel, its bandwidths and their weights."""
    h: Numbers = problem.bandwidth_numbers if problem.bandwidth is None else problem.bandwidth
    a: Numbers = problem.weight_numbers if problem.bandwidth_weights is None else problem.bandwidth_weights
    return kernel_of(problem.kernel, problem.kernel_parameters), h, a


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else NO_CONTEXT


def unit_weights(weights: Tensor, whole: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weights` (..., N), rows of `whole` if that is given, over their sum, which is near one; nan where it is not."""
    # In float64 first, as weights of fewer digits sum to one only roughly.
    total = (weights if whole is None else whole).double().sum(-1, keepdim=True)
    total = torch.where((total - 1).abs() <= rounding_of_sum(weights.dtype), total, torch.nan)
    return (weights.double() / total).to(dtype)


def zero_if_finite(*tensors: Tensor) -> Tensor:
    """0 in float64, or else nan: a density or a kernel of an infinite distance is zero, which a sum would not show."""
    # Not of their sum, which numbers near the largest of their dtype have none of.
    return (torch.stack([end for t in tensors for end in t.detach().aminmax()]).double() * 0).sum()


def matmul_precision(precision: str) -> str:
    """`precision`, or where it is empty what PyTorch's own switch says of float32 products on a GPU."""
    if precision:
        return precision
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Of PyTorch where its newer switch was used, and says something else than the older one.
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def without_grad(function: Any, *args: Any) -> Any:
    """A gradient of its own: PyTorch can't differentiate a custom op within a transform of `torch.func`."""
    if not torch.is_grad_enabled():
        return function(*args)
    with torch.no_grad():
        return function(*args)


def vmap_by_loop(op: Any) -> None:
    """Lets `torch.vmap` call a custom op once for each item of a batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(op, info.batch_size, in_dims, args)

    op.register_vmap(rule)


def loop_over_batch(op: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The results of an op, stacked, and the dimension of the batch in each; an empty one, of a gradient not asked for, has none."""
    items = [op(*(t.select(dim, n) if isinstance(dim, int) else t for t, dim in zip(args, in_dims, strict=True))) for n in range(size)]
    if isinstance(items[0], Tensor):
        return torch.stack(items), 0
    results = tuple(torch.stack(parts) if parts[0].numel() else parts[0] for parts in zip(*items, strict=True))
    return results, tuple(0 if parts.numel() else None for parts in items[0])


def _differentiates() -> bool:
    """Whether a transform of `torch.func` at work takes derivatives."""
    derivatives = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(transform.key() in derivatives for transform in torch._C._functorch.get_interpreter_stack() or ())


# For the compiler a constant: what torch.compiler.assume_constant_result sets, which would import the compiler here.
_differentiates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compiled_op(name: str, op: Any, *args: Any) -> Any:
    """What the compiler traces of an operation."""
    # PyTorch has no derivatives by torch.func of a custom op in a graph. Without fullgraph=True this makes it call the function as it is.
    if _differentiates():
        raise NotImplementedError(
            f"{name} within torch.func.grad or another derivative of torch.func must not be compiled with fullgraph=True: without it the "
            "function runs uncompiled, or compile a function that calls torch.autograd.grad or backward"
        )
    return op(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None and requires_grad(t):
            return torch.is_grad_enabled()
    return False


def no_forward_mode(name: str) -> Any:
    """The `jvp` of a Function that has none."""

    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"{name} has no derivative in forward mode, which torch.func.jvp, jacfwd and hessian take: use torch.func.grad or jacrev, "
            "or pass backend='reference', which is dense and has it"
        )

    return staticmethod(jvp)


class _ForbidSecondDerivative(torch.autograd.Function):
    generate_vmap_rule = True
    jvp = no_forward_mode("a gradient of fastvae")

    @staticmethod
    def forward(name: str, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{ctx.name} has no second derivative: pass backend='reference', which has, in O(N·M·D) memory")


def forbid_second_derivative(name: str, grad: Tensor, *inputs: Tensor | None) -> Tensor:
    """`grad`, whose own derivative to `inputs` raises; without this a double backward would take it for a constant."""
    if not torch.is_grad_enabled():
        return grad
    return cast(Tensor, _ForbidSecondDerivative.apply(name, grad, *inputs))  # type: ignore[no-untyped-call]
