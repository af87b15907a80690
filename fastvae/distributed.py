"""The rows of all ranks of a process group, for losses of the global batch whose gradients need no communication.

Each rank takes the gradient of the global loss to its own rows. Data parallelism averages the ranks' gradients where it should sum them, so
that each is multiplied by the number of ranks first: the averaged gradient is then that of one process with the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvae import checks

Module = TypeVar("Module", bound="GroupModule")
DTYPES = (*checks.FLOAT_DTYPES, torch.int64)
REFUSED = -1
SCHEMA = "(str name, Tensor[] tensors, str group, str estimator) -> (Tensor[], SymInt)"


def is_initialized() -> bool:
    """Whether this process is in a process group; false also of a PyTorch that is built without them."""
    return dist.is_available() and dist.is_initialized()


def gather_rows(name: str, tensors: Sequence[Tensor], group: dist.ProcessGroup, estimator: str = "biased") -> tuple[list[Tensor], int]:
    """Of one or two tensors (n_r, …) the rows of all ranks r, (Σ n_r, …), without gradient, and where this rank's begin.

    Ranks may differ in n_r. Where they differ in anything else, or have too few rows for `estimator`, each of them raises the same error.
    """
    rows, start = torch.ops.fastvae.gather_rows(name, [t.detach() for t in tensors], group.group_name, estimator)
    return list(rows), start


class Heard:
    """Around a rank's own checks before it gathers: where they raise, the ranks that gather raise too, and none waits for it."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and checks.is_process_group(self.group):
            _exchange([REFUSED] + [0] * 4, cast(dist.ProcessGroup, self.group))


def gather(name: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather_rows`, whose gradient to x is that of the loss to these rows times the number of ranks.

    Any loss of the result is the loss of the global batch, the same on each rank, though each rank does all of its work.
    """
    (rows,), _ = torch.ops.fastvae.gather_rows(name, [x], group.group_name, "biased")
    return cast(Tensor, rows)


def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' shares, whose gradient is that of this rank's share times the number of ranks."""
    return cast(Tensor, _SumShares.apply(share, group))  # type: ignore[no-untyped-call]


def global_mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over the first dimension of x, taken over all ranks, whose gradient is that to these rows times the number of ranks."""
    sums = x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).reshape(-1)
    total = sum_shares(torch.cat([sums, sums.new_full((1,), x.shape[0])]), group)
    return (total[:-1] / total[-1].detach()).reshape(x.shape[1:]).to(x.dtype)


class GroupModule(nn.Module):
    """A module with a process group, which its copies share."""

    process_group: dist.ProcessGroup | None

    def __deepcopy__(self: Module, memo: dict[int, Any]) -> Module:
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


# An op, as the rows of other ranks are numbers that a compiler cannot know.
@torch.library.custom_op("fastvae::gather_rows", mutates_args=(), schema=SCHEMA)
def _gather_op(name: str, tensors: Sequence[Tensor], group: str, estimator: str) -> tuple[list[Tensor], int]:
    process_group = _named(group)
    own = [(t.shape[1] if t.ndim > 1 else 0, DTYPES.index(t.dtype)) for t in tensors] + [(REFUSED, REFUSED)] * (2 - len(tensors))
    shares = _exchange([tensors[0].shape[0], *own[0], *own[1]], process_group)
    checks.same_on_ranks(name, [[(f, DTYPES[d]) for f, d in (share[1:3], share[3:5]) if f >= 0] for share in shares])
    counts = [share[0] for share in shares]
    rows = [_gathered(t, counts, process_group) for t in tensors]
    checks.enough_rows(name, rows[0], estimator)
    return rows, sum(counts[: dist.get_rank(process_group)])


@_gather_op.register_fake
def _fake(name: str, tensors: Sequence[Tensor], group: str, estimator: str) -> tuple[list[Tensor], int]:
    context = torch.library.get_ctx()
    rows = context.new_dynamic_size(min=1 if estimator == "biased" else 2)
    return [t.new_empty(rows, *t.shape[1:]) for t in tensors], cast(int, context.new_dynamic_size())


def _keep_place(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], int]) -> None:
    ctx.place = output[1], [t.shape[0] for t in inputs[1]]
    ctx.world = dist.get_world_size(_named(inputs[2]))


def _backward(ctx: Any, grads: list[Tensor], _: None) -> tuple[None, list[Tensor], None, None]:
    start, rows = ctx.place
    return None, [grad.narrow(0, start, n) * ctx.world for grad, n in zip(grads, rows, strict=True)], None, None


_gather_op.register_autograd(_backward, setup_context=_keep_place)


def _named(group: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d
    return cast(dist.ProcessGroup, resolve._resolve_process_group(group))


def _exchange(own: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """What each rank tells the others before it gathers: its rows, and of two tensors features and dtype.

    A group whose only backend is NCCL waits for the GPU here, once, as no array has a size before; one with Gloo for the CPU does not.
    """
    on_gpu = dist.get_backend(group) == "nccl"
    told = torch.tensor(own, device="cpu", pin_memory=on_gpu).to("cuda" if on_gpu else "cpu", non_blocking=True)
    shares = _all_gather(told[None], dist.get_world_size(group), group).tolist()
    if own[0] != REFUSED:
        checks.none_refused([rank for rank, share in enumerate(shares) if share[0] == REFUSED])
    return shares


def _gathered(t: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, as many as `counts` says; padded on their way where these differ, as collectives want one shape."""
    most = max(counts)
    if min(counts) == most:
        return _all_gather(t.contiguous(), len(counts), group)
    padded = t.new_empty(most, *t.shape[1:])
    padded[: t.shape[0]] = t
    parts = _all_gather(padded, len(counts), group).reshape(len(counts), *padded.shape)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def _all_gather(t: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """The rows of equally many on each rank, written to where they stay."""
    rows = t.new_empty(ranks * t.shape[0], *t.shape[1:])
    # Its name in PyTorch before 2.13.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(rows, t, group=group)
    return rows


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.world = dist.get_world_size(group)
        total = share.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.world, None
