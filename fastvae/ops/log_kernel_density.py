"""The custom ops of log densities and of products normalised by them: formulas (1) to (3) of `fastvae.reference.log_kernel_density`.

Inside, biases and logarithms are to base 2. Every sweep is of one bandwidth, as Σ_b a_b·k_b has no logarithm in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvae.checks import requires_grad
from fastvae.cpu.log_kernel_density import Streaming
from fastvae.cpu.pairs import FewRows, few_rows
from fastvae.cpu.small import SmallLogKernel, has_few_pairs, problems_at_once
from fastvae.dispatch import accumulation_dtype, needs_dispatcher, runs_on_triton
from fastvae.kernel_sums import LOG2_E, KernelNumbers, KernelSum, Numbers, read, stable_mean
from fastvae.ops.common import (
    KERNEL_SCHEMA,
    KernelArguments,
    bandwidth_gradient,
    custom_op,
    differentiable,
    forbid_second_derivative,
    matmul_precision,
    wanted_gradients,
    without_autocast,
    without_grad,
)
from fastvae.radial import Kernel

DENSITY_SCHEMA = f"Tensor x, Tensor y, Tensor? y_weights, {KERNEL_SCHEMA}, str precision, str backend"
PRODUCT_SCHEMA = f"Tensor x, Tensor y, Tensor v, {KERNEL_SCHEMA}, str normalize, str precision, str backend"
# The shares of formula (3): of the logarithm of each row's and each column's sum in the biases.
SHARES = {"rows": (1.0, 0.0), "columns": (0.0, 1.0), "both": (0.5, 0.5)}


class Problem(NamedTuple):
    """Rows x (B, N, D) and y (B, M, D) of a batch of B problems, or x (N, D) and y (M, D) of one, and what their sums are of."""

    x: Tensor
    y: Tensor
    kernel: KernelArguments
    precision: str
    backend: str

    @staticmethod
    def of(x: Tensor, y: Tensor, *others: Any) -> Problem:
        """From the arguments of an op, in the order of its schema."""
        return Problem(x, y, KernelArguments(*others[:6]), *others[6:])

    def each(self, slope: bool, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """function(sweeps, *tensors) of each problem, or of several at once, with the sweeps of each bandwidth and a part of the batch."""
        if self.x.ndim == 2:
            batch = self._replace(x=self.x[None], y=self.y[None])
            return tuple(t[0] for t in batch.each(slope, function, *(None if t is None else t[None] for t in tensors)))
        parts: list[tuple[Tensor, ...]] = []
        x, y = (z.to(accumulation_dtype(z.dtype)) for z in (self.x, self.y))
        with without_autocast(x.device):
            at_once = 1 if runs_on_triton(self.backend, x) else max(1, problems_at_once(x.shape[1] + y.shape[1], x.shape[2]))
            for start in range(0, len(x), at_once):
                part = slice(start, min(start + at_once, len(x)))
                sweeps = self._several(x[part], y[part], slope) if part.stop - start > 1 else None
                if sweeps is not None:
                    parts.append(function(sweeps, *(None if t is None else t[part] for t in tensors)))
                    continue
                for n in range(start, part.stop):
                    of_one = (None if t is None else t[n] for t in tensors)
                    parts.append(tuple(t[None] for t in function(self._sweeps(x[n], y[n], slope), *of_one)))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def log2_weights(self, like: Tensor) -> list[Any]:
        """log₂ a_b of each bandwidth; nan where a_b is negative."""
        weights = read(self.kernel.unpack()[2])
        if isinstance(weights, Tensor):
            return list(weights.to(like).log2())
        return [math.log2(a) if a > 0 else -math.inf if a == 0 else math.nan for a in weights]

    def _bandwidths(self) -> list[Numbers]:
        h = read(self.kernel.unpack()[1])
        return [h[n : n + 1] for n in range(len(h))]

    def _several(self, x: Tensor, y: Tensor, slope: bool) -> list[SmallLogKernel] | None:
        family = self.kernel.unpack()[0]
        sweeps = [SmallLogKernel.of(family, x, y, h, slope) for h in self._bandwidths()]
        return None if None in sweeps else cast("list[SmallLogKernel]", sweeps)

    def _sweeps(self, x: Tensor, y: Tensor, slope: bool) -> list[Any]:
        family = self.kernel.unpack()[0]
        if runs_on_triton(self.backend, x):
            from fastvae.kernels.log_kernel_density import Sweeps

            numbers = [KernelNumbers.of(family, h, [1.0], x.shape[1], False, x.device) for h in self._bandwidths()]
            return [Sweeps(number, x, y, matmul_precision(self.precision)) for number in numbers]
        if (small := self._several(x, y, slope)) is not None:
            return small
        centre = 0.5 * stable_mean(x) + 0.5 * stable_mean(y)
        return [Streaming(KernelSum.of(family, h, [1.0], x.shape[1], x.device, None), x, y, centre) for h in self._bandwidths()]


def _poison(*tensors: Tensor | None) -> Tensor:
    """0 for each problem, (..., 1), or nan where a number of (..., rows, columns) is not finite: k = 0 at infinity would hide it."""
    return torch.stack([(t * 0).sum((-2, -1), dtype=torch.float64) for t in tensors if t is not None]).sum(0)[..., None]


def _column(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector[..., None]


def _density(*args: Any) -> Tensor:
    """log₂ Σ_j w_j·k(x_i, y_j), (B, N), in the accumulation dtype, without 1/M for weights of 1."""
    problem = Problem.of(*args[:2], *args[3:])

    def sums(sweeps: list[Any], x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor]:
        found = sweeps[0].log2_sums(None if w is None else -w.log2())
        return ((found + _poison(x, y, _column(w))).to(accumulation_dtype(x.dtype)),)

    return problem.each(False, sums, *args[:3])[0]


def _density_gradients(grad: Tensor, density: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """To x, y and the weights in the accumulation dtype, and to the bandwidth in float64. One not asked for is empty."""
    problem, wanted = Problem.of(*args[:2], *args[3:-4]), args[-4:]
    dtype = accumulation_dtype(args[0].dtype)

    def gradients(sweeps: list[Any], x: Tensor, y: Tensor, w: Tensor | None, grad: Tensor, density: Tensor) -> tuple[Tensor, ...]:
        row, column = density, density.new_zeros(y.shape[:-1])
        if isinstance(sweeps[0], Streaming) and sweeps[0].tiles.dtype != density.dtype:
            # Of tiles in float64: the rounding of a large logarithm to float32 would be a factor of the gradient.
            row = sweeps[0].log2_sums(None if w is None else -w.log2())
        g = LOG2_E * grad[..., None] + _poison(x, y, _column(w))[..., None].to(grad.dtype)
        found = [g.new_empty((*g.shape[:-2], 0))] * 3
        if wanted[0] or wanted[1] or wanted[3]:
            column_bias, flags = column if w is None else -w.log2(), (wanted[0] or wanted[3], wanted[1] or wanted[3])
            pair = sweeps[0].gradients(torch.ones_like(y[..., :1]), g, row, column_bias, *flags)
            found[:2] = (empty if t is None else t for t, empty in zip(pair, found, strict=False))
        if wanted[2]:
            # A row of weight 0 may be infinitely likelier than all others: in a row without an upstream gradient it still counts as 0.
            found[2] = sweeps[0].matmul(g, row.masked_fill(g[..., 0] == 0, math.inf), column, transposed=True)[..., 0]
        return tuple(t.to(dtype) for t in found)

    grads = problem.each(True, gradients, *args[:3], grad.to(dtype), density)
    bandwidth = bandwidth_gradient(problem.kernel, problem[:2], grads[:2]) if wanted[3] else grads[0].new_empty(0, dtype=torch.float64)
    return (*(t.contiguous() if want else t.new_empty(0) for t, want in zip(grads, wanted, strict=False)), bandwidth)


def _density_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


def _density_gradients_fake(grad: Tensor, density: Tensor, *args: Any) -> tuple[Tensor, ...]:
    shapes = [args[0].shape, args[1].shape, args[1].shape[:-1]]
    found = [density.new_empty(shape if want else (0,)) for shape, want in zip(shapes, args[-4:], strict=False)]
    return (*found, density.new_empty(1 if args[-1] else 0, dtype=torch.float64))


def _setup_density(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], output)
    ctx.options = inputs[5:]


def _density_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *sources, density = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    function = density_backward_op if needs_dispatcher(grad, *sources[:3]) else _density_gradients
    found = without_grad(function, grad, density, *sources, *ctx.options, *wanted)
    return wanted_gradients("log_kernel_density", found, wanted, grad, sources[:4], len(sources) + len(ctx.options))


def _product(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Formula (2), (B, N, C), and the biases r (B, N) and c (B, M) to base 2, in the accumulation dtype."""
    problem, (row_share, column_share) = Problem.of(*args[:2], *args[3:-3], *args[-2:]), SHARES[args[-3]]
    dtype = accumulation_dtype(args[0].dtype)

    def product(sweeps: list[Any], x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = problem.log2_weights(x)
        row, column = x.new_zeros(x.shape[:-1]), x.new_zeros(y.shape[:-1])
        if row_share:
            row = row_share * _log2_sum([s.log2_sums(None) + a for s, a in zip(sweeps, weights, strict=True)])
        if column_share:
            column = column_share * _log2_sum([s.log2_sums(None, transposed=True) + a for s, a in zip(sweeps, weights, strict=True)])
        out = torch.stack([s.matmul(v, row - a, column) for s, a in zip(sweeps, weights, strict=True)]).sum(0)
        return (out + _poison(x, y, v)[..., None]).to(dtype), row.double(), column.double()

    return cast("tuple[Tensor, Tensor, Tensor]", tuple(t.contiguous() for t in problem.each(False, product, *_cast(dtype, *args[:3]))))


def _cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


def _log2_sum(parts: list[Tensor]) -> Tensor:
    """log₂ Σ 2^part."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).mul_(1 / LOG2_E).logsumexp(0).mul_(LOG2_E)


def _product_gradients(grad: Tensor, out: Tensor, row: Tensor, column: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """To x, y and v in the accumulation dtype, by formula (3). One not asked for is empty."""
    problem, wanted = Problem.of(*args[:2], *args[3:-6], *args[-5:-3]), args[-3:]
    (row_share, column_share), dtype = SHARES[args[-6]], accumulation_dtype(args[0].dtype)

    def gradients(
        sweeps: list[Any], x: Tensor, y: Tensor, v: Tensor, g: Tensor, out: Tensor, row: Tensor, column: Tensor
    ) -> tuple[Tensor, ...]:
        weights = problem.log2_weights(x)
        g = g + _poison(x, y, v, g)[..., None].to(g.dtype)
        found = [g.new_empty((*g.shape[:-2], 0))] * 3
        if wanted[2] or column_share:
            found[2] = torch.stack([s.matmul(g, row - a, column, transposed=True) for s, a in zip(sweeps, weights, strict=True)]).sum(0)
        if wanted[0] or wanted[1]:
            terms = _terms(row_share, column_share, v, g, out, row, column, found[2])
            parts = [s.gradients(v, g, r - a, c, *wanted[:2]) for v, g, r, c in terms for s, a in zip(sweeps, weights, strict=True)]
            for n, part in enumerate(zip(*parts, strict=True)):
                if wanted[n]:
                    found[n] = torch.stack(part).sum(0)
        return tuple(t.to(dtype) for t in found)

    grads = problem.each(True, gradients, *_cast(dtype, *args[:3], grad), out, row, column)
    return tuple(t.contiguous() if want else t.new_empty(0) for t, want in zip(grads, wanted, strict=True))


Term = tuple[Tensor, Tensor, Tensor, Tensor]


def _terms(
    row_share: float, column_share: float, v: Tensor, g: Tensor, out: Tensor, row: Tensor, column: Tensor, grad_v: Tensor
) -> list[Term]:
    """(v, g, r, c) such that (3) is the sum over these of 2^(l − r_i − c_j)·(g_i·v_j)."""
    of_rows = -row_share * (g * out).sum(-1, keepdim=True)
    of_columns = -column_share * (v * grad_v.to(v.dtype)).sum(-1, keepdim=True) if column_share else None
    ones_i, ones_j = torch.ones_like(g[..., :1]), torch.ones_like(v[..., :1])
    if of_columns is None:
        return [(torch.cat([v, ones_j], -1), torch.cat([g, of_rows], -1), row, column)]
    if not row_share:
        return [(torch.cat([v, of_columns], -1), torch.cat([g, ones_i], -1), row, column)]
    return [
        (v, g, row, column),
        (ones_j, of_rows, row / row_share, torch.zeros_like(column)),
        (of_columns, ones_i, torch.zeros_like(row), column / column_share),
    ]


def _product_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, y, v = args[:3]
    dtype = accumulation_dtype(x.dtype)
    shapes = (*x.shape[:-1], v.shape[-1]), x.shape[:-1], y.shape[:-1]
    out, row, column = (x.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, (dtype, torch.float64, torch.float64), strict=True))
    return out, row, column


def _product_gradients_fake(grad: Tensor, out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(out.new_empty(t.shape if want else (0,)) for t, want in zip(args[2:5], args[-3:], strict=True))


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _product_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *sources, out, row, column = ctx.saved_tensors
    if grad is None:
        return (None,) * (len(sources) + len(ctx.options))
    wanted = ctx.needs_input_grad[:3]
    function = product_backward_op if needs_dispatcher(grad, *sources[:3]) else _product_gradients
    found = without_grad(function, grad, out, row, column, *sources, *ctx.options, *wanted)
    return wanted_gradients("kernel_matmul with normalize", found, wanted, grad, sources[:3], len(sources) + len(ctx.options))


density_op = custom_op("log_kernel_density", f"({DENSITY_SCHEMA}) -> Tensor", _density, _density_fake)
density_backward_op = custom_op(
    "log_kernel_density_backward",
    f"(Tensor grad, Tensor density, {DENSITY_SCHEMA}, bool x_grad, bool y_grad, bool weights_grad, bool bandwidth_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _density_gradients,
    _density_gradients_fake,
)
product_op = custom_op("normalized_matmul", f"({PRODUCT_SCHEMA}) -> (Tensor, Tensor, Tensor)", _product, _product_fake)
product_backward_op = custom_op(
    "normalized_matmul_backward",
    f"(Tensor grad, Tensor out, Tensor row, Tensor column, {PRODUCT_SCHEMA}, bool x_grad, bool y_grad, bool v_grad)"
    " -> (Tensor, Tensor, Tensor)",
    _product_gradients,
    _product_gradients_fake,
)
# Arguments of `torch.ops.fastvae.log_kernel_density` and `torch.ops.fastvae.normalized_matmul`.
apply_log_kernel_density = differentiable(
    "LogKernelDensity", "log_kernel_density", 3, density_op, _density, _setup_density, _density_backward
)
apply_normalized_matmul = differentiable(
    "NormalizedMatmul", "kernel_matmul with normalize", 3, product_op, _product, _setup_product, _product_backward
)


class _FewRows(torch.autograd.Function):
    """`Density`, `Product` or `ToMean`, where there is neither a transform of `torch.func` nor forward mode."""

    @staticmethod
    def forward(ctx: Any, function: Any, streaming: Any, x: Tensor, y: Tensor, third: Tensor | None) -> Tensor | None:
        if (found := function.evaluate(x, y, third, True)) is None:
            return None
        # x and y as given only for their second derivative.
        ctx.save_for_backward(x, y, third, *found[1:])
        ctx.function, ctx.streaming = function, streaming
        return cast(Tensor, found[0].to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: activation checkpointing allows no more.
        x, y, third, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() and ctx.streaming is not None:
            # Views, as one may depend on another.
            views = [t if t is None else t.view_as(t) for t in (x, y, third)]
            sources = [t for t, want in zip(views, wanted, strict=True) if want and t is not None]
            again = iter(torch.autograd.grad([ctx.streaming(*views)], sources, grads, create_graph=True))
            return None, None, *(next(again) if want else None for want in wanted)
        with without_autocast(x.device):
            found = without_grad(ctx.function.gradients, *grads, third, tensors, wanted)
        operation = ctx.function.operation
        return None, None, *(t if t is None else forbid_second_derivative(operation, t.to(x.dtype), *grads, x, y, third) for t in found)


def few_rows_of(kernel: Kernel, bandwidth: Numbers, weights: Numbers, backend: str | None, dim: int | None = None) -> FewRows | None:
    """For `Density` and `Product`. None where bandwidths or weights may get a gradient, or another backend is named.

    With `dim` each kernel is a density.
    """
    if torch.compiler.is_compiling() or backend in ("triton", "reference") or requires_grad(bandwidth) or requires_grad(weights):
        return None
    if any(isinstance(numbers, Tensor) and needs_dispatcher(numbers) for numbers in (bandwidth, weights)):
        return None
    kernel, factor = kernel.canonical()
    h, a = read(bandwidth), read(weights)
    if isinstance(h, Tensor) or isinstance(a, Tensor) or not kernel.radial:
        return None
    return few_rows(kernel, tuple(factor * number for number in h), a, dim)


def of_few_rows(
    function: Any, x: Tensor, y: Tensor, third: Tensor | None, streaming: Callable[[Tensor, Tensor, Any], Tensor] | None = None
) -> Tensor | None:
    """The result of a `Density`, a `Product` or a `ToMean`, in the dtype of x; None if it has to take an op.

    Of so few numbers the sums take less time than the arguments of the op.

    Args:
        streaming: the same by ops, twice differentiable; None if it is not.
    """
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or needs_dispatcher(x, y, third) or not has_few_pairs(x, y):
        return None
    if torch.is_autocast_enabled("cpu"):
        with without_autocast(x.device):
            return of_few_rows(function, x, y, third, streaming)
    wants = x.requires_grad or y.requires_grad or (third is not None and third.requires_grad)
    if wants and torch.is_grad_enabled():
        return cast("Tensor | None", _FewRows.apply(function, streaming, x, y, third))  # type: ignore[no-untyped-call]
    if (found := function.evaluate(x, y, third, False)) is None:
        return None
    return cast(Tensor, found[0] if found[0].dtype == x.dtype else found[0].to(x.dtype))
