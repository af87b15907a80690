"""The loss of drifting models, which `fastvae.recipes` exports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastvae import checks
from fastvae.dispatch import accumulation_dtype
from fastvae.ops.common import (
    forbid_second_derivative,
    gradient_to,
    loop_over_batch,
    needs_grad,
    no_forward_mode,
    scaled,
    without_autocast,
    without_grad,
)

# Numbers of the rows of the problems that a CPU takes together, which then fit its second-level cache.
_NUMBERS_AT_ONCE = 1 << 18
# Lower bounds of the published code: of squared distances, of both scales, of a², and of the mean square of a field.
_LEAST_SQUARE, _LEAST_SCALE, _LEAST_PRODUCT, _LEAST_MEAN = 1e-8, 1e-3, 1e-6, 1e-8
_SELF = 100.0


def drifting(
    generated: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    generated_weights: float | Tensor | None = None,
    positives_weights: float | Tensor | None = None,
    negatives_weights: float | Tensor | None = None,
    temperatures: float | Sequence[float] = (0.02, 0.05, 0.2),
) -> Tensor:
    """The loss of drifting models for each class: how far the field of attraction and repulsion moves the generated rows.

        loss = mean (ĝ − stop(ĝ + F))²,   F = Σ_R F_R/√mean F_R²,   F_R,i = Σ_j c_ij·(t̂_j − ĝ_i)
        a_ij = w_j·√max(softmax_j(l)·softmax_i(l), 1e-6),   l_ij = −(d_ij/s + 100·[same row])/R
        c_ij = a_ij·Σ a_i over the generated rows and the negatives, for a positive j;   −a_ij·Σ a_i over the positives, for the others

    with the rows t of [generated, negatives, positives], d = ‖g_i − t_j‖ and s the weighted mean of all d of the batch; ĝ and t̂ are divided
    by s/√S, S the number of features. Only `generated` gets a gradient, once: s and F are constants, as in the original. The gradient is
    −2·F over the scale. With many features, loss and mean F_R² are computed from products of rows, without the fields.

    Its quirks: s and mean F_R² are those of the whole batch, so that a class depends on the others. √mean F_R² divides each field, so that
    the loss does not go to 0 as the samples approach each other. For classifier-free guidance with weight w the authors give each of C_n
    unconditional negatives the weight (w − 1)·(C_g − 1)/C_n.

    Args:
        generated: (..., C_g, S), floating point; every problem is a class.
        positives: (..., C_p, S), same batch dimensions, dtype and device.
        negatives: (..., C_n, S), likewise; none by default.
        generated_weights: (..., C_g), w of each row, or a number for all; 1 by default. The same for positives_weights and
            negatives_weights.
        temperatures: R, a number or several, each above 0.

    Returns:
        The loss of each class, shape (...); float64 for float64 inputs, else float32.

    Raises:
        TypeError: An input is not a floating-point tensor, or dtypes differ.
        ValueError: A shape, device or temperature breaks a rule above, negatives_weights are given without negatives, or all weights sum
            to 0, which is not checked on a GPU.

    Source: github.com/lambertae/drifting, torch/drift_loss.py; Deng et al. 2026, "Generative modeling via drifting".
    """
    samples, weights = [("generated", generated), ("positives", positives)], [generated_weights, positives_weights]
    if negatives is not None:
        samples.insert(1, ("negatives", negatives))
        weights.insert(1, negatives_weights)
    elif negatives_weights is not None:
        raise ValueError("negatives_weights needs negatives")
    for name, z in samples:
        checks.rows(name, z)
        checks.same_features("generated", generated, name, z)
        checks.same_kind("generated", generated, name, z)
        if z.shape[:-2] != generated.shape[:-2]:
            raise ValueError(f"{name} must have the batch dimensions of generated, {tuple(generated.shape[:-2])}, got {tuple(z.shape)}")
    row_weights = []
    for (name, z), w in zip(samples, weights, strict=True):
        if isinstance(w, Tensor):
            checks.row_weights(f"{name}_weights", w, name, z)
        else:
            w = z.new_full(z.shape[:-1], 1.0 if w is None else checks.real(f"{name}_weights", w))
        row_weights.append(w)
    radii = tuple(checks.positive_numbers("temperatures", temperatures))
    dtype, batch = accumulation_dtype(generated.dtype), generated.shape[:-2]
    with without_autocast(generated.device):
        parts = [z.to(dtype) if z.ndim == 3 else z.to(dtype).reshape(-1, *z.shape[-2:]) for _, z in samples]
        w = torch.cat([w.to(dtype).reshape(z.shape[:-1]) for z, w in zip(parts, row_weights, strict=True)], 1)
        checks.nonzero_sum("the weights of all rows", w)
        others = [z.detach() for z in parts[1:]]
        if torch.compiler.is_compiling() and not needs_grad(parts[0]):
            # The compiler cannot trace a Function of a variable number of tensors without a gradient.
            return _loss_and_gradient(radii, w.detach(), [parts[0], *others])[0].reshape(batch)
        function: Any = _Drifting if torch.compiler.is_compiling() else _EagerDrifting
        return cast(Tensor, function.apply(radii, w.detach(), parts[0], *others)[0].reshape(batch))


class _Drifting(torch.autograd.Function):
    @staticmethod
    def forward(temperatures: tuple[float, ...], weights: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return _loss_and_gradient(temperatures, weights, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        found, *parts = ctx.saved_tensors
        if grad is None:
            return (None,) * (2 + len(parts))
        if _forms_fields(parts):
            gradient = gradient_to(parts[0], found, grad)
        else:
            with without_autocast(grad.device):
                gradient = without_grad(_field, scaled(found, grad), parts)
        gradient = forbid_second_derivative("drifting", gradient, grad, parts[0], has_reference=False)
        return None, None, gradient, *[None] * (len(parts) - 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        # One item at a time, as the scales of an item are means over its classes alone.
        return loop_over_batch(_EagerDrifting.apply, info.batch_size, in_dims, args)


class _EagerDrifting(_Drifting):
    """Not for the compiler, which cannot trace a Function with a `jvp`."""

    jvp = no_forward_mode("drifting", has_reference=False)


def _chunks(parts: Sequence[Tensor]) -> list[slice]:
    """Problems that are taken together: all of them on a GPU, and for the compiler, which would unroll the loop."""
    count, numbers = len(parts[0]), sum(z[0].numel() for z in parts)
    if not parts[0].is_cpu or torch.compiler.is_compiling():
        return [slice(0, count)]
    step = max(1, _NUMBERS_AT_ONCE // numbers)
    return [slice(start, start + step) for start in range(0, count, step)]


def _centred(parts: Sequence[Tensor], chunk: slice) -> Tensor:
    """The rows of some problems, less the first of each."""
    first = parts[0][chunk, :1]
    return torch.cat([z[chunk] - first for z in parts], 1)


def _forms_fields(parts: Sequence[Tensor]) -> bool:
    """Whether fields take fewer multiply-adds than products of all rows: with as many generated rows as others, up to 2 features a row."""
    return parts[0].shape[2] < 2 * sum(z.shape[1] for z in parts)


def _loss_and_gradient(temperatures: tuple[float, ...], weights: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss (B,) and its gradient; without fields E (B, C_g, rows), of which E·t is the gradient."""
    (count, own, features), rows = parts[0].shape, weights.shape[1]
    first_positive, chunks = rows - parts[-1].shape[1], _chunks(parts)
    forms_fields = _forms_fields(parts)
    products = weights.new_empty(count, own if forms_fields else rows, rows)
    norms = weights.new_empty(count, rows)
    for chunk in chunks:
        z = _centred(parts, chunk)
        out = products[chunk]
        norms[chunk] = torch.linalg.vecdot(z, z)
        out[:, :own] = z[:, :own] @ z.mT
        if not forms_fields:
            out[:, own:, :own] = out[:, :own, own:].mT
            out[:, own:, own:] = z[:, own:] @ z[:, own:].mT
    distances = torch.add(norms[:, :own, None], products[:, :own], alpha=-2).add_(norms[:, None])
    distances.diagonal(dim1=1, dim2=2).zero_()
    distances = distances.clamp_(min=_LEAST_SQUARE).sqrt_()
    # Each row counts as often as it has a distance.
    scale = (distances.sum(1) * weights).sum() / (own * weights.sum())
    input_scale = (scale / math.sqrt(features)).clamp(min=_LEAST_SCALE)
    distances = distances.div_(scale.clamp(min=_LEAST_SCALE))
    distances.diagonal(dim1=1, dim2=2).add_(_SELF)
    # c of each temperature, or c·t
    terms = weights.new_empty(count, len(temperatures), own, features if forms_fields else rows)
    inner = weights.new_empty(count, len(temperatures), len(temperatures))
    for chunk in chunks:
        of_chunk, w = terms[chunk], weights[chunk, None]
        targets = _centred(parts, chunk) if forms_fields else None
        for n, temperature in enumerate(temperatures):
            logits = distances[chunk] * (-1 / temperature)
            a = logits.softmax(2).mul_(logits.softmax(1))
            a.clamp_(min=_LEAST_PRODUCT).sqrt_().mul_(w)
            repelled, attracted = a[..., :first_positive], a[..., first_positive:]
            of_positives, of_others = attracted.sum(2, keepdim=True), repelled.sum(2, keepdim=True)
            # They sum to zero over j, so that Σ_j c_ij·(t_j − g_i) is c·t.
            repelled.mul_(-of_positives)
            attracted.mul_(of_others)
            of_chunk[:, n] = a if targets is None else a @ targets
        # ⟨F_R, F_R'⟩, from the fields or from the products of rows.
        flat = of_chunk.flatten(2)
        others = flat if forms_fields else (of_chunk.flatten(1, 2) @ products[chunk]).view_as(of_chunk).flatten(2)
        inner[chunk] = flat @ others.mT
    numbers = own * features
    inner = inner / input_scale.square()
    factors = (inner.diagonal(dim1=1, dim2=2).sum(0) / (count * numbers)).clamp(min=_LEAST_MEAN).rsqrt()
    loss = (inner * factors[:, None] * factors).sum((1, 2)) / numbers
    combined = (-2 / numbers / input_scale.square()) * factors
    return loss, torch.einsum("bnij,n->bij", terms, combined)


def _field(coefficients: Tensor, parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([coefficients[chunk] @ _centred(parts, chunk) for chunk in _chunks(parts)])
