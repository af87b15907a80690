"""Shared by all operations: the arguments that describe a kernel, devices and precision, autograd.Functions and rules for transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastvae.checks import requires_grad
from fastvae.dispatch import in_forward_mode, needs_dispatcher
from fastvae.distributed import NO_DERIVATIVE_OF_A_PRODUCT
from fastvae.kernel_sums import KernelNumbers, KernelSum, Numbers, as_vector, rounding_of_sum
from fastvae.radial import Kernel, kernel_of

R = TypeVar("R")

# A kernel in the schema of an op. Bandwidths and weights are a tensor, or numbers, which are not part of a graph.
KERNEL_SCHEMA = (
    "Tensor? bandwidth, Tensor? bandwidth_weights, float[] bandwidth_numbers, float[] weight_numbers, str kernel, float[] kernel_parameters"
)


class KernelArguments(NamedTuple):
    """The arguments of `KERNEL_SCHEMA`, in its order."""

    bandwidth: Tensor | None
    bandwidth_weights: Tensor | None
    bandwidth_numbers: list[float]
    weight_numbers: list[float]
    name: str
    parameters: list[float]

    def unpack(self) -> tuple[Kernel, Numbers, Numbers]:
        """The kernel, its bandwidths and their weights."""
        h: Numbers = self.bandwidth_numbers if self.bandwidth is None else self.bandwidth
        a: Numbers = self.weight_numbers if self.bandwidth_weights is None else self.bandwidth_weights
        return kernel_of(self.name, self.parameters), h, a

    def vectors(self, device: torch.device) -> tuple[Kernel, Tensor, Tensor]:
        """The kernel, and its bandwidths and their weights as float64 vectors."""
        kernel, h, a = self.unpack()
        return kernel, as_vector(h, device).double(), as_vector(a, device).double()

    def sum(self, dim: int, device: torch.device, mean_squared_distance: Tensor | None) -> KernelSum:
        """For the CPU, see `KernelSum.of`."""
        return KernelSum.of(*self.unpack(), dim, device, mean_squared_distance)

    def numbers(self, x: Tensor, prior: bool = False) -> KernelNumbers:
        """For the Triton kernels, with rows x (..., N, D)."""
        return KernelNumbers.of(*self.unpack(), x.shape[-1], prior, x.device)


def kernel_arguments(kernel: Kernel, bandwidth: Numbers, weights: Numbers) -> KernelArguments:
    kernel, factor = kernel.canonical()
    h, h_numbers = (factor * bandwidth, []) if isinstance(bandwidth, Tensor) else (None, [factor * number for number in bandwidth])
    a, a_numbers = (weights, []) if isinstance(weights, Tensor) else (None, list(weights))
    return KernelArguments(h, a, h_numbers, a_numbers, kernel.name, kernel.parameters)


def cached_options(function: Callable[..., R]) -> Callable[..., R]:
    """Decorates a function that checks bandwidths, their weights, the backend and other options, and returns what follows from them.

    In a small training step these checks take as long as some of the sums, so their results are cached for numbers.
    """
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(bandwidth: Any, weights: Any, backend: Any, *options: Any) -> R:
        if backend is None and not torch.compiler.is_compiling() and _are_floats(bandwidth) and (weights is None or _are_floats(weights)):
            h, a = (tuple(numbers) if type(numbers) is list else numbers for numbers in (bandwidth, weights))
            try:
                return cached(h, a, backend, *options)
            except TypeError:
                pass  # An option cannot be hashed or is wrong: the checks below say which.
        return function(bandwidth, weights, backend, *options)

    return call


def _are_floats(value: object) -> bool:
    # Not integers and booleans, which are equal to floats but are checked in another way.
    return type(value) is float or (type(value) in (list, tuple) and all(type(number) is float for number in cast("list[object]", value)))


def bandwidth_gradient(kernel: KernelArguments, samples: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient to the first bandwidth, (1,) in float64, of a function of x/h and y/h, from its gradients to both.

    By Euler's theorem. Their rounding errors are multiplied by distances to a centre: the median is close to most rows even if a few are
    far. It is taken from a sort, as PyTorch has no deterministic median on a GPU.
    """
    family, bandwidth, _ = kernel.unpack()
    rows = torch.cat(list(samples), -2)
    centre = rows.sort(-2).values[..., rows.shape[-2] // 2, None, :].double() if family.radial else 0.0
    radial = [((z.double() - centre) * g).sum() for z, g in zip(samples, grads, strict=False) if g is not None]
    return -torch.stack(radial).sum() / as_vector(bandwidth, rows.device)[:1]


NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else NO_CONTEXT


def unit_weights(weights: Tensor, whole: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weights` (..., N) divided by their sum, or by that of `whole` if they are some rows of it; nan where the sum is not near one."""
    # In float64, as weights of lower precision sum to one only roughly.
    total = (weights if whole is None else whole).double().sum(-1, keepdim=True)
    total = torch.where((total - 1).abs() <= rounding_of_sum(weights.dtype), total, torch.nan)
    return (weights.double() / total).to(dtype)


def matmul_precision(precision: str) -> str:
    """`precision`, or if it is empty PyTorch's own setting for float32 products on a GPU."""
    if precision:
        return precision
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # PyTorch raises this where its newer setting was used and contradicts the older one.
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


# The most elements of a padded sample of all problems in one launch, 64 MiB in float32, of which a sweep has about ten copies. That is four
# thousand problems of up to 128 rows and 32 features, enough to fill any GPU.
_MOST_PADDED = 1 << 24


def problems_in_a_launch(rows: int, features: int) -> int:
    """As many problems of a batch as one launch takes. Each is padded to whole tiles, which is much for a small one."""
    return max(1, _MOST_PADDED // ((rows + -rows % 128) * (features + -features % 16)))


def without_grad(function: Any, *args: Any) -> Any:
    """Calls `function` without gradients: PyTorch cannot differentiate a custom op within a transform of `torch.func`."""
    if not torch.is_grad_enabled():
        return function(*args)
    with torch.no_grad():
        return function(*args)


def custom_op(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], batched: int = 0) -> Any:
    """`torch.ops.fastvae.<name>`, which `torch.vmap` calls once for each item of a batch.

    Args:
        batched: how many of its first arguments may have a batch dimension, which then takes that of `torch.vmap`.
    """
    op = torch.library.custom_op(f"fastvae::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    loop = lambda info, in_dims, *args: loop_over_batch(op, info.batch_size, in_dims, args)  # noqa: E731
    op.register_vmap(fold_into_batch(op, batched) if batched else loop)
    return op


def loop_over_batch(op: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The stacked results of an op, and the batch dimension of each; an empty result, a gradient not asked for, has none."""
    items = [op(*(t.select(dim, n) if isinstance(dim, int) else t for t, dim in zip(args, in_dims, strict=True))) for n in range(size)]
    if isinstance(items[0], Tensor):
        return torch.stack(items), 0
    results = tuple(torch.stack(parts) if parts[0].numel() else parts[0] for parts in zip(*items, strict=True))
    return results, tuple(0 if parts.numel() else None for parts in items[0])


def fold_into_batch(op: Any, tensors: int) -> Callable[..., Any]:
    """The rule of `torch.vmap` for an op whose first tensors may have a batch dimension of their own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(isinstance(dim, int) for dim in in_dims[tensors:]):
            return loop_over_batch(op, info.batch_size, in_dims, args)
        has_batch = args[0].ndim - (in_dims[0] is not None) == 3
        folded = []
        for t, dim in zip(args[:tensors], in_dims[:tensors], strict=True):
            t = t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            folded.append(t.flatten(0, 1) if t is not None and has_batch else t)
        results = op(*folded, *args[tensors:])
        single = isinstance(results, Tensor)
        parts = (results,) if single else results
        if has_batch:
            parts = tuple(t.unflatten(0, (info.batch_size, -1)) if t.numel() else t for t in parts)
        dims = tuple(0 if t.numel() else None for t in parts)
        return (parts[0], dims[0]) if single else (parts, dims)

    return rule


def _differentiates() -> bool:
    """Whether an active transform of `torch.func` takes derivatives."""
    derivatives = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(transform.key() in derivatives for transform in torch._C._functorch.get_interpreter_stack() or ())


# The compiler takes the result for a constant. torch.compiler.assume_constant_result sets this too, but imports the compiler.
_differentiates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compiled_op(name: str, op: Any, *args: Any) -> Any:
    """Calls the op for the compiler."""
    # PyTorch cannot take derivatives of torch.func of a custom op in a graph. Without fullgraph=True it then calls the function uncompiled.
    # Of dual numbers outside of torch.func, the op would drop the tangents.
    if _differentiates() or in_forward_mode():
        raise NotImplementedError(
            f"{name} within torch.func.grad or another derivative of torch.func must not be compiled with fullgraph=True: without it the "
            "function runs uncompiled; for a first derivative compile a function that calls torch.autograd.grad or backward"
        )
    return op(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None and requires_grad(t):
            return torch.is_grad_enabled()
    return False


class _Primals:
    """The context of a `jvp`, whose saved tensors lack their tangents. A backward pass of the result would differentiate these too."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        unpack: Any = torch.autograd.forward_ad.unpack_dual
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            self.saved_tensors = tuple(t if t is None else unpack(t).primal for t in ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def forward_mode(name: str, jvp: Callable[..., Any]) -> Any:
    """The `jvp` of an autograd.Function. Within another forward mode it raises, as PyTorch would take all of its results for constants."""

    def checked(ctx: Any, *tangents: Any) -> Any:
        forward = torch._C._functorch.TransformType.Jvp
        transforms = torch._C._functorch.get_interpreter_stack() or ()
        if sum(transform.key() == forward for transform in transforms) > 1:
            raise NotImplementedError(
                f"{name} has no derivative in forward mode of one in forward mode: take one of the two in reverse mode, as in "
                "torch.func.jacfwd(torch.func.jacrev(f)) or torch.func.hessian(f)"
            )
        # Transforms of torch.func hide the tangents.
        return jvp(ctx if transforms else _Primals(ctx), *tangents)

    return staticmethod(checked)


def no_forward_mode(name: str, has_reference: bool = True) -> Any:
    """The `jvp` of an autograd.Function without one: it raises."""
    message = f"{name} has no derivative in forward mode, which torch.func.jvp, jacfwd and hessian take: use torch.func.grad or jacrev"

    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(message + (", or call it with backend='reference', which is dense and has one" if has_reference else ""))

    return staticmethod(jvp)


def autograd_function(title: str, name: str, op: Any, setup_context: Any, backward: Any, jvp: Any = None) -> Any:
    """The autograd.Function of a custom op, for transforms of `torch.func`; `backward` is registered for the compiler too.

    Args:
        title: its class name.
        name: what errors call the operation.
        jvp: its derivative in forward mode, if it has one.
    """
    op.register_autograd(backward, setup_context=setup_context)
    methods = {"forward": op, "setup_context": setup_context, "backward": backward}
    statics = {key: staticmethod(method) for key, method in methods.items()}
    statics["jvp"] = forward_mode(name, jvp) if jvp else no_forward_mode(name)
    return type(title, (torch.autograd.Function,), {"generate_vmap_rule": True, **statics})


def differentiable(
    title: str, name: str, tensors: int, op: Any, evaluate: Any, setup_context: Any, backward: Any, jvp: Any = None
) -> Callable[..., Any]:
    """A function that calls an operation such that autograd, `torch.func` and the compiler can differentiate it.

    All three use the same `setup_context` and `backward`. Where nothing needs the custom op `op`, `evaluate` is called in its place: the
    dispatcher and PyTorch's own call of `setup_context` take as long as a small problem. The first `tensors` arguments may be subclasses of
    Tensor.
    """
    dispatched = autograd_function(title, name, op, setup_context, backward, jvp)

    def forward(ctx: Any, *args: Any) -> Any:
        result = evaluate(*args)
        setup_context(ctx, args, result)
        return result

    methods = {"jvp": dispatched.jvp, "forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type(f"Eager{title}", (torch.autograd.Function,), methods)

    def apply(*args: Any) -> Any:
        # Outside of the compiler by way of a Function, which refuses derivatives in forward mode: the op would drop them.
        if torch.compiler.is_compiling():
            return compiled_op(name, op, *args)
        return dispatched.apply(*leaves(args)) if needs_dispatcher(*args[:tensors]) else eager.apply(*args)

    return apply


class _Leaf(list[float]):
    """A list that transforms of `torch.func` take for one argument. They mistake the place of a tangent behind a list."""


def leaves(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of an autograd.Function, with lists as leaves."""
    return [_Leaf(argument) if type(argument) is list else argument for argument in arguments]


def save_arguments(ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> None:
    """Saves the arguments of an operation, and results of it, for a backward pass and for forward mode."""
    tensors = [t if isinstance(t, Tensor) else None for t in arguments]
    ctx.others = [argument if t is None else None for t, argument in zip(tensors, arguments, strict=True)]
    ctx.save_for_backward(*tensors, *results)
    ctx.save_for_forward(*tensors, *results)


def saved_arguments(ctx: Any) -> tuple[list[Any], tuple[Tensor | None, ...]]:
    """The arguments and the results of `save_arguments`."""
    # Unpacked once: activation checkpointing allows no more.
    tensors, count = ctx.saved_tensors, len(ctx.others)
    return [other if t is None else t for t, other in zip(tensors[:count], ctx.others, strict=True)], tensors[count:]


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The `setup_context` of an operation whose derivatives need its inputs alone. Of several results, one without an upstream has None."""
    ctx.set_materialize_grads(isinstance(output, Tensor))
    save_arguments(ctx, inputs, ())


def dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor | None:
    """Σ left·right over samples, rows and features, for each problem of a batch; None if there are no pairs."""
    products = [(t * other).sum((-2, -1)) for t, other in zip(left, right, strict=True) if t is not None and other is not None]
    return torch.stack(products).sum(0) if products else None


def scaled(rows: Tensor | None, factor: Tensor) -> Tensor | None:
    """Rows (..., N, D) times a factor for each problem (...)."""
    return rows if rows is None else rows * (factor[..., None, None] if factor.ndim else factor)


def gradient_to(rows: Tensor, gradient: Tensor, grad_value: Tensor) -> Tensor:
    """`scaled` in the dtype of the rows that it is the gradient to."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return cast(Tensor, gradient_to_op(rows, gradient, grad_value))
    return _gradient_to(rows, gradient, grad_value)


def _gradient_to(rows: Tensor, gradient: Tensor, grad_value: Tensor) -> Tensor:
    return cast(Tensor, scaled(gradient, grad_value)).to(rows.dtype)


# Where PyTorch compiles a backward pass, it refuses its derivatives to what the pass takes, and takes all others for zero.
gradient_to_op = custom_op(
    "gradient_to", "(Tensor rows, Tensor gradient, Tensor grad_value) -> Tensor", _gradient_to, lambda rows, *_: rows.new_empty(rows.shape)
)


class _ForbidDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, t: Tensor, *inputs: Tensor | None) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(ctx.message)


def forbid_derivative(message: str, t: Tensor, *inputs: Tensor | None) -> Tensor:
    """`t`, whose derivative with respect to itself and to `inputs` raises: otherwise autograd would take it for a constant."""
    if not torch.is_grad_enabled() and not in_forward_mode():
        return t
    return cast(Tensor, _ForbidDerivative.apply(message, t, *inputs))  # type: ignore[no-untyped-call]


def forbid_second_derivative(name: str, grad: Tensor, *inputs: Tensor | None, has_reference: bool = True) -> Tensor:
    """`grad`, which depends on `inputs`."""
    message = f"{name} has no second derivative" + (
        ": call it with backend='reference', which is dense and has one" if has_reference else ""
    )
    return forbid_derivative(message, grad, *inputs)


def forbid_third_derivative(name: str, t: Tensor | None, *inputs: Tensor | None) -> Tensor | None:
    """What a second derivative depends on besides its direction, in which it is linear."""
    if t is None:
        return None
    return forbid_derivative(f"{name} has no third derivative: call it with backend='reference', which is dense and has one", t, *inputs)


def gradients_function(
    name: str, samples: int, hessian_product: Callable[..., Sequence[Tensor | None]], refuse: Callable[..., None]
) -> Any:
    """An autograd.Function of the gradients of a scalar to its first arguments, as functions of that of the value and of these.

    Its arguments are the gradient of the value; the gradients for one of 1, None where they are not wanted; and those of the scalar.

    Args:
        name: what errors call the scalar.
        samples: how many gradients there are.
        hessian_product: from the arguments of the scalar and a direction of each sample, None for 0.
        refuse: raises if one of the other arguments has a tangent; takes the tangents of all.
    """

    def forward(grad_value: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found, rows = inputs[:samples], inputs[samples]
        return tuple(grad_value.new_empty(0) if grad is None else _gradient_to(rows, grad, grad_value) for grad in found)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        save_arguments(ctx, inputs[1 + samples :], inputs[: 1 + samples])

    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments, (grad_value, *gradients) = saved_arguments(ctx)
        # The Hessian is symmetric: its product with the upstream is the gradient.
        to_rows = hessian_product(arguments, *(scaled(t, cast(Tensor, grad_value)) for t in directions))
        to_value = None
        if ctx.needs_input_grad[0]:
            to_value = dot([forbid_third_derivative(name, gradient, *arguments[:samples]) for gradient in gradients], directions)
        return to_value, *[None] * samples, *to_rows, *[None] * (len(arguments) - samples)

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        refuse(tangents[1 + samples :])
        arguments, (grad_value, *gradients) = saved_arguments(ctx)
        seconds = hessian_product(arguments, *tangents[1 + samples : 1 + 2 * samples])
        results = []
        for gradient, second in zip(gradients, seconds, strict=True):
            parts = scaled(second, cast(Tensor, grad_value)), None if tangents[0] is None else scaled(gradient, tangents[0])
            given = [part for part in parts if part is not None]
            # Not None, which vmap takes for the result before it.
            like = cast(Tensor, grad_value).new_empty(0) if gradient is None else gradient.to(arguments[0].dtype)
            results.append(torch.stack(given).sum(0).to(like) if gradient is not None and given else torch.zeros_like(like))
        return tuple(results)

    methods: dict[str, Callable[..., Any]] = {"forward": forward, "setup_context": setup_context, "backward": backward}
    statics: dict[str, Any] = {key: staticmethod(method) for key, method in methods.items()}
    return type("Gradients", (torch.autograd.Function,), {"generate_vmap_rule": True, "jvp": forward_mode(name, jvp), **statics})


def direction_of_all_ranks(name: str, direction: Tensor, group: str) -> Tensor:
    """The rows of a direction from all ranks of a process group."""
    (rows,), _ = torch.ops.fastvae.gather_rows(name, [direction.detach()], group, "biased")
    return forbid_derivative(NO_DERIVATIVE_OF_A_PRODUCT, rows, direction)


_BANDWIDTHS = (
    "with respect to bandwidths and their weights: detach them, or divide the samples by one bandwidth, as in x / h and y / h, or "
    "call it with backend='reference', which is dense and has one"
)


def forbid_bandwidth_derivative(name: str, t: Tensor, *inputs: Tensor | None) -> Tensor:
    """Bandwidths or weights of them on which a gradient depends, or the gradient to these, which depends on `inputs`."""
    return forbid_derivative(f"{name} has no second derivative {_BANDWIDTHS}", t, *inputs)


def refuse_tangents(name: str, argument: str, *tangents: Tensor | None) -> None:
    if any(tangent is not None for tangent in tangents):
        raise NotImplementedError(f"{name} has no derivative with respect to {argument}, which must be constant: pass {argument}.detach()")


def refuse_bandwidth_tangents(name: str, *tangents: Tensor | None) -> None:
    if any(tangent is not None for tangent in tangents):
        raise NotImplementedError(f"{name} has no derivative in forward mode {_BANDWIDTHS}")


def wanted_gradients(
    name: str, found: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor, sources: Sequence[Tensor | None], arguments: int
) -> tuple[Tensor | None, ...]:
    """What `backward` returns for so many arguments: the gradients found of the first ones, in the dtype of these, without derivatives."""
    grads: list[Tensor | None] = [None] * arguments
    for n, want in enumerate(wanted):
        if want:
            grads[n] = forbid_second_derivative(name, found[n].to(cast(Tensor, sources[n])), grad, *sources)
    return tuple(grads)
