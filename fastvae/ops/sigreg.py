"""The custom op of SIGReg: the sums over rows of which the loss is made, and their gradient. Formulas (1) and (3) of
`fastvae.reference.sigreg`.

Backward needs the inputs only, and computes the projections and their sines a second time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastvae.cpu import sigreg as cpu
from fastvae.cpu.sigreg import Points
from fastvae.dispatch import needs_dispatcher, runs_on_triton
from fastvae.ops.common import custom_op, differentiable, forbid_second_derivative, matmul_precision, without_autocast, without_grad

SCHEMA = "(Tensor z, Tensor directions, float base, SymInt steps, bool odd, str precision, str backend) -> Tensor"
BACKWARD_SCHEMA = "(Tensor grad, Tensor z, Tensor directions, float base, SymInt steps, bool odd, str precision, str backend) -> Tensor"


def _sums(z: Tensor, directions: Tensor, base: float, steps: int, odd: bool, precision: str, backend: str) -> Tensor:
    """Sums over n of cos(t·p_nk) and sin(t·p_nk), (steps, chains, 2, B, K) in float64, for B samples z (..., N, D) and directions (D, K).

    t is base·(1, 3, 5, …), one chain, if `odd`, else base·(1, 2, 3, …), of which the second chain has the even multiples.
    """
    points, z = Points(base, steps, odd), _with_one_batch_dimension(z)
    if runs_on_triton(backend, z):
        import fastvae.kernels.sigreg as kernels

        return cast(Tensor, kernels.forward(z, directions, points, matmul_precision(precision)))
    with without_autocast(z.device):
        return cpu.forward(z, directions, points)


def _with_one_batch_dimension(z: Tensor) -> Tensor:
    return z if z.ndim == 3 else z.reshape(-1, *z.shape[-2:])


def _fake_sums(z: Tensor, directions: Tensor, base: float, steps: int, odd: bool, *_: Any) -> Tensor:
    return z.new_empty((steps, 1 if odd else 2, 2, z.shape[:-2].numel(), directions.shape[1]), dtype=torch.float64)


def _gradient(grad: Tensor, z: Tensor, directions: Tensor, base: float, steps: int, odd: bool, precision: str, backend: str) -> Tensor:
    points, samples = Points(base, steps, odd), _with_one_batch_dimension(z)
    if runs_on_triton(backend, z):
        import fastvae.kernels.sigreg as kernels

        return cast(Tensor, kernels.backward(grad, samples, directions, points, matmul_precision(precision))).view(z.shape)
    with without_autocast(z.device):
        return cpu.backward(grad, samples, directions, points).to(z.dtype).view(z.shape)


def _fake_gradient(grad: Tensor, z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, directions, *ctx.options = inputs
    ctx.save_for_backward(z, directions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, directions = ctx.saved_tensors
    op = backward_op if needs_dispatcher(grad, z, directions) else _gradient
    dz = forbid_second_derivative("sigreg", without_grad(op, grad, z, directions, *ctx.options), grad, z)
    return dz, *[None] * 6


sums_op = custom_op("sigreg", SCHEMA, _sums, _fake_sums)
backward_op = custom_op("sigreg_backward", BACKWARD_SCHEMA, _gradient, _fake_gradient)
_apply = differentiable("SIGReg", "sigreg", 2, sums_op, _sums, _setup_context, _backward)


def characteristic_sums(*args: Any) -> Tensor:
    """The sums, differentiable with respect to z. Arguments of `torch.ops.fastvae.sigreg`."""
    return cast(Tensor, _apply(*args))
