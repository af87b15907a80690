"""Gathers rows or sums of all ranks of a process group, for losses of the global batch whose gradients need no communication.

Each rank computes the gradient of the global loss with respect to its own rows. These gradients should be summed, but data parallelism
averages them. Each is therefore multiplied by the number of ranks: the average is then the gradient of one process with the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvae import checks
from fastvae.dispatch import in_forward_mode

Module = TypeVar("Module", bound="GroupModule")
DTYPES = (*checks.FLOAT_DTYPES, torch.int64)
FAILED = -1
SCHEMA = "(str name, Tensor[] tensors, str group, str estimator) -> (Tensor[], SymInt)"


def is_initialized() -> bool:
    """Whether this process is in a process group; False if PyTorch is built without them."""
    return dist.is_available() and dist.is_initialized()


def gather_rows(name: str, tensors: Sequence[Tensor], group: dist.ProcessGroup, estimator: str = "biased") -> tuple[list[Tensor], int]:
    """The rows of all ranks r, (Σ n_r, …), of one or two tensors (n_r, …), without gradient, and the index of this rank's first row.

    Ranks may differ in n_r. If they differ in anything else, or have too few rows for `estimator`, all ranks raise the same error.
    """
    _refuse_transforms()
    rows, start = torch.ops.fastvae.gather_rows(name, [t.detach() for t in tensors], group.group_name, estimator)
    return list(rows), start


class propagate_errors:
    """A context for a rank's own checks before it gathers: if they raise, the other ranks raise too, instead of waiting for this one."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and checks.is_process_group(self.group):
            _exchange([FAILED] + [0] * 4, cast(dist.ProcessGroup, self.group))


def gather(name: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks. The gradient of x is that of the loss with respect to its rows, times the number of ranks.

    Any loss of the result is the loss of the global batch, the same on each rank, but each rank does all of the work.
    """
    _refuse_transforms()
    (rows,), _ = torch.ops.fastvae.gather_rows(name, [x], group.group_name, "biased")
    return cast(Tensor, rows)


def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' shares. The gradient of this rank's share is multiplied by the number of ranks."""
    _refuse_transforms()
    return cast(Tensor, _SumShares.apply(share, group))  # type: ignore[no-untyped-call]


def global_mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over the first dimension of x and over all ranks. The gradient of x is multiplied by the number of ranks."""
    sums = x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).reshape(-1)
    total = sum_shares(torch.cat([sums, sums.new_full((1,), x.shape[0])]), group)
    return (total[:-1] / total[-1].detach()).reshape(x.shape[1:]).to(x.dtype)


def of_first_rank(directions: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """`directions` (D, K) of the first rank, without gradient, on each rank.

    If ranks differ in D, K, the dtype or the two `sizes`, the numbers of samples and of points, all raise the same error.
    """
    return cast(Tensor, torch.ops.fastvae.of_first_rank(directions, list(sizes), group.group_name))


class GroupModule(nn.Module):
    """A module with a process group. Deep copies share the group, which cannot be copied."""

    process_group: dist.ProcessGroup | None

    def __deepcopy__(self: Module, memo: dict[int, Any]) -> Module:
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _group(self) -> str:
        """The group for `extra_repr`."""
        return "" if self.process_group is None else f", process_group={self.process_group.group_name}"


# A custom op, as a compiler cannot trace collectives whose sizes other ranks decide.
@torch.library.custom_op("fastvae::gather_rows", mutates_args=(), schema=SCHEMA)
def _gather_op(name: str, tensors: Sequence[Tensor], group: str, estimator: str) -> tuple[list[Tensor], int]:
    process_group = _named(group)
    own = [(t.shape[1] if t.ndim > 1 else 0, DTYPES.index(t.dtype)) for t in tensors] + [(-1, -1)] * (2 - len(tensors))
    received = _exchange([tensors[0].shape[0], *own[0], *own[1]], process_group)
    checks.same_on_ranks(name, [[(f, DTYPES[d]) for f, d in (numbers[1:3], numbers[3:5]) if f >= 0] for numbers in received])
    counts = [numbers[0] for numbers in received]
    rows = [_gathered(t, counts, process_group) for t in tensors]
    checks.enough_rows(name, rows[0], estimator)
    return rows, sum(counts[: dist.get_rank(process_group)])


@_gather_op.register_fake
def _fake(name: str, tensors: Sequence[Tensor], group: str, estimator: str) -> tuple[list[Tensor], int]:
    context = torch.library.get_ctx()
    rows = context.new_dynamic_size(min=1 if estimator == "biased" else 2)
    return [t.new_empty(rows, *t.shape[1:]) for t in tensors], cast(int, context.new_dynamic_size())


def _save_own_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], int]) -> None:
    ctx.own_rows = output[1], [t.shape[0] for t in inputs[1]]
    ctx.group, ctx.twice = inputs[2], False


def _backward(ctx: Any, grads: list[Tensor], _: None) -> tuple[None, list[Tensor], None, None]:
    start, rows = ctx.own_rows
    group = _named(ctx.group)
    if ctx.twice:
        grads = [_sum_over_ranks(grad, group) for grad in grads]
    else:
        grads = [grad * dist.get_world_size(group) for grad in grads]
    ctx.twice = ctx.twice or torch.is_grad_enabled()
    return None, [grad.narrow(0, start, n) for grad, n in zip(grads, rows, strict=True)], None, None


_gather_op.register_autograd(_backward, setup_context=_save_own_rows)


@torch.library.custom_op("fastvae::of_first_rank", mutates_args=(), schema="(Tensor directions, SymInt[] sizes, str group) -> Tensor")
def _first_rank_op(directions: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    process_group = _named(group)
    samples, points = sizes
    own = [samples, *directions.shape, points, DTYPES.index(directions.dtype)]
    checks.same_slices_on_ranks(_exchange(own, process_group))
    first = directions.clone(memory_format=torch.contiguous_format)
    dist.broadcast(first, dist.get_global_rank(process_group, 0), group=process_group)
    return first


@_first_rank_op.register_fake
def _fake_first_rank(directions: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    return directions.new_empty(directions.shape)


def _named(group: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d
    return cast(dist.ProcessGroup, resolve._resolve_process_group(group))


def _exchange(own: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """The five numbers that each rank sends before it gathers: its rows or `FAILED`, then features and dtype of each of two tensors.

    A group with NCCL alone waits for the GPU here, once, as the sizes of the results depend on the numbers. A group with Gloo does not.
    """
    on_gpu = dist.get_backend(group) == "nccl"
    sent = torch.tensor(own, device="cpu", pin_memory=on_gpu).to("cuda" if on_gpu else "cpu", non_blocking=True)
    received = _all_gather(sent[None], dist.get_world_size(group), group).tolist()
    if own[0] != FAILED:
        checks.no_rank_failed([rank for rank, numbers in enumerate(received) if numbers[0] == FAILED])
    return received


def _gathered(t: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, `counts` of each. Where the counts differ, tensors are padded to one shape, as collectives require."""
    most = max(counts)
    if min(counts) == most:
        return _all_gather(t.contiguous(), len(counts), group)
    padded = t.new_empty(most, *t.shape[1:])
    padded[: t.shape[0]] = t
    parts = _all_gather(padded, len(counts), group).reshape(len(counts), *padded.shape)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def _all_gather(t: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, which have equally many each."""
    rows = t.new_empty(ranks * t.shape[0], *t.shape[1:])
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before PyTorch 2.13
    gather(rows, t, group=group)
    return rows


def _refuse_transforms() -> None:
    if not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or in_forward_mode()):
        raise NotImplementedError(
            "a loss of a process group must not be called within a transform of torch.func or in forward mode: call torch.autograd.grad or "
            "backward, twice for a second derivative"
        )


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.twice = group, False
        total = share.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.twice:
            return _sum_over_ranks(grads[0], ctx.group), None
        ctx.twice = torch.is_grad_enabled()
        return grads[0] * dist.get_world_size(ctx.group), None


NO_DERIVATIVE_OF_A_PRODUCT = (
    "a Hessian-vector product in a process group has no derivative, which torch.autograd.functional.hvp takes: use vhp or call "
    "torch.autograd.grad twice"
)


def _sum_over_ranks(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Where a gradient was differentiated, its loss need not be the same on each rank, so that the upstreams are added up."""
    total = grad.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    if not (torch.is_grad_enabled() and grad.requires_grad):
        return total
    return cast(Tensor, _Total.apply(grad, total, dist.get_world_size(group)))  # type: ignore[no-untyped-call]


class _Total(torch.autograd.Function):
    """The sum of all ranks' upstreams, in one more first derivative that is to be differentiated: these are then the same on each rank."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, total: Tensor, world: int) -> Tensor:
        ctx.save_for_backward(grad, total)
        ctx.world = world
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        own, total = (t.detach() for t in ctx.saved_tensors)
        if not total.any():
            # As the directions by which torch.autograd.functional.hvp differentiates.
            raise NotImplementedError(NO_DERIVATIVE_OF_A_PRODUCT)
        if not torch.allclose(total, own * ctx.world, rtol=1e-3, atol=1e-3 * float(total.abs().max())):
            raise NotImplementedError("a loss of a process group has no third derivative")
        return grads[0] * ctx.world, None, None
