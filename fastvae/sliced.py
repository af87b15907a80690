"""Losses of slices of a sample, its projections on random directions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.cpu.sigreg import Points
from fastvae.devices import float64_on_cpu, lacks_float64
from fastvae.dispatch import accumulation_dtype, needs_dispatcher
from fastvae.distributed import of_first_rank, propagate_errors, sum_shares
from fastvae.ops.common import without_autocast
from fastvae.ops.sigreg import characteristic_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@float64_on_cpu
def sigreg(
    z: Tensor,
    *,
    directions: Tensor | None = None,
    num_slices: int = 1024,
    num_points: int = 17,
    t_max: float = 3.0,
    t_min: float = 0.0,
    scale_by_n: bool = True,
    generator: torch.Generator | None = None,
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """SIGReg, the sketched isotropic Gaussian regularisation of LeJEPA: how far the slices of a sample are from N(0, 1).

        loss = N·mean_k ∫ φ(t)·[(mean_n cos(t·p_nk) − φ(t))² + (mean_n sin(t·p_nk))²] dt,   p = z·directions,  φ(t) = exp(−t²/2)

    The integral over [−t_max, t_max] is a sum by the trapezoidal rule. Extra memory is O(N·D + K·num_points): no array of N×K numbers is
    stored. Differentiable once, with respect to z; the backward pass computes the projections again. Far from the origin the angles t·p are
    large, and float32 loses digits, here as in the formula: for rows 1,000 from it the value's relative error is about 1e-6 to 1e-5 and
    the gradient's 1e-4.

    Args:
        z: (N, D), floating point. Batch dimensions before these, (V, N, D), are samples of their own, such as the views of LeJEPA: all are
            projected on the same directions and the result is their mean. For one sample of all views, pass z.flatten(0, -2).
        directions: (D, K), which get no gradient. Each column must have length 1, as slices of other lengths are not near N(0, 1): divide
            by `directions.norm(dim=0)`. It is not checked. None draws them anew in each call: K normal vectors, divided by their lengths.
        num_slices: K, if directions are drawn.
        num_points: Points of the trapezoidal rule from t_min to t_max, 2 or more.
        t_max: The upper end of the integral.
        t_min: 0, where twice the integral over [0, t_max] is taken, as in LeJEPA, or -t_max, as in eb_jepa. The same integral: 17 points
            from 0 are 33 from -t_max.
        scale_by_n: Whether the factor N is included, as in LeJEPA; False for eb_jepa.
        generator: For the directions. It may be on another device than z.
        precision: As in `mmd`, for the projections and the gradient.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense, differentiable any number of times) forces one.
        process_group: A group of `torch.distributed` whose ranks each hold some rows of z, not necessarily equally many. The result is that
            of all rows, the same on each rank; N is the number of all rows. All ranks take the directions of the first rank, drawn or
            given. They exchange the sums over their rows, 2·K·num_points numbers for each sample. The gradient is that of the global loss
            times the number of ranks: averaged over the ranks, as data parallelism does, it is the gradient of one process with all rows.
            Not for backend="reference". None: this process alone.

    Returns:
        The loss, a scalar; float64 for float64 inputs, else float32. nan if an input holds a nan or an infinity.

    Raises:
        TypeError: z or directions is not a floating-point tensor, or an option has a wrong type.
        ValueError: A shape, device or option breaks a rule above, or directions require grad.

    Source: Balestriero and LeCun 2025, "LeJEPA: provable and scalable self-supervised learning without the heuristics", section 4;
    github.com/rbalestr-lab/lejepa and github.com/facebookresearch/eb_jepa.
    """
    with propagate_errors(process_group):
        checks.sample_of_slices("z", z)
        dtype = accumulation_dtype(z.dtype)
        checks.usable_backend(backend, z.device)
        checks.option("precision", precision, checks.PRECISIONS)
        checks.flag("scale_by_n", scale_by_n)
        num_points, t_max, t_min = checks.quadrature(num_points, t_max, t_min)
        if process_group is not None:
            checks.process_group(process_group)
            checks.not_dense(backend)
        if directions is None:
            directions = _draw_directions(z, checks.integer("num_slices", num_slices, at_least=1), generator)
        else:
            checks.directions(directions, z)
            directions = directions.to(dtype)
    if process_group is not None:
        directions = of_first_rank(directions, (z.shape[:-2].numel(), num_points), process_group)
    with without_autocast(z.device):
        if backend == "reference":
            options = {"num_points": num_points, "t_max": t_max, "t_min": t_min, "scale_by_n": scale_by_n}
            return reference.sigreg(z.to(dtype), directions, **options)  # type: ignore[arg-type]
        points = _points(num_points, t_max, t_min)
        # Not a view: a compiled backward pass refuses its derivatives to the inputs of a graph alone, and takes others for zero.
        sums = characteristic_sums(z, directions, points.base, points.steps, points.odd, precision or "", backend or "")
        n: int | Tensor = z.shape[-2]
        if process_group is not None:
            total = sum_shares(torch.cat([sums.flatten(), sums.new_full((1,), z.shape[-2])]), process_group)
            sums, n = total[:-1].view_as(sums), total[-1].detach()
        # A tensor made while a CUDA graph is captured has no value before a replay.
        fresh = needs_dispatcher(z) or (z.is_cuda and torch.cuda.is_current_stream_capturing())
        target, weights = (_quadrature if fresh else _cached_quadrature)(num_points, t_max, t_min, z.device)
        loss = ((sums / n - target).square() * weights).sum() / (sums.shape[3] * sums.shape[4])
        return (loss * n if scale_by_n else loss).to(dtype)


def _points(num_points: int, t_max: float, t_min: float) -> Points:
    """The positive points of the trapezoidal rule; at t = 0 the integrand is zero."""
    spacing = (t_max - t_min) / (num_points - 1)
    if t_min < 0 and num_points % 2 == 0:
        return Points(spacing / 2, num_points // 2, True)
    return Points(spacing, (_count(num_points, t_min) + 1) // 2, False)


def _count(num_points: int, t_min: float) -> int:
    return num_points // 2 if t_min < 0 else num_points - 1


def _quadrature(num_points: int, t_max: float, t_min: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the means are compared with, (steps, chains, 2, 1, 1), and the weights of the squared errors at both signs of t, (steps, chains,
    1, 1, 1), in float64."""
    points, count = _points(num_points, t_max, t_min), _count(num_points, t_min)
    t = points.values(device)
    phi = (-0.5 * t * t).exp()
    # Half as much at the ends of the interval. With an odd number of points to pair, one lies behind its end and has no weight.
    index = torch.arange(t.numel(), device=device).view_as(t)
    share = (index < count - 1).double() + (index < count)
    weights = (t_max - t_min) / (num_points - 1) * share * phi
    return torch.stack([phi, torch.zeros_like(phi)], 2)[..., None, None], weights[..., None, None, None]


@functools.lru_cache(maxsize=64)
def _cached_quadrature(*args: Any) -> tuple[Tensor, Tensor]:
    """Not inference tensors, as later calls may need a gradient."""
    with torch.inference_mode(False):
        return _quadrature(*args)


def _draw_directions(z: Tensor, num_slices: int, generator: torch.Generator | None) -> Tensor:
    """(D, K), columns of unit length, on the device of z."""
    checks.generator(generator)
    device = z.device if generator is None else generator.device
    dtype = torch.float32 if lacks_float64(device) else accumulation_dtype(z.dtype)
    size = z.shape[-1], num_slices
    # A compiler takes no symbolic size together with a generator, be it None.
    if generator is None:
        directions = torch.randn(size, dtype=dtype, device=device)
    else:
        directions = torch.randn(size, dtype=dtype, device=device, generator=generator)
    lengths: Tensor = directions.norm(dim=0)
    return (directions / lengths).to(z.device, accumulation_dtype(z.dtype))
