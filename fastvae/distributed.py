"""The rows of all ranks of a process group, for losses of the global batch whose gradients need no communication.

Each rank takes the gradient of the global loss to its own rows. Data parallelism averages the ranks' gradients where it should sum them, so
that each is multiplied by the number of ranks first: the averaged gradient is then that of one process with the whole batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather_rows(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """The rows of x (n_r, …) of all ranks r, (Σ n_r, …), without gradient, and where this rank's begin. Ranks may differ in n_r."""
    x = x.detach().contiguous()
    world = dist.get_world_size(group)
    sizes = [torch.empty(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([x.shape[0]], device=x.device), group=group)
    rows = [int(size) for size in sizes]
    # Collectives want one shape on all ranks.
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    rank = dist.get_rank(group)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)]), sum(rows[:rank])


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather_rows`, whose gradient to x is that of the loss to these rows times the number of ranks.

    Any loss of the result is the loss of the global batch, the same on each rank, though each rank does all of its work.
    """
    return cast(Tensor, _Gather.apply(x, group))  # type: ignore[no-untyped-call]


def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' shares, whose gradient is that of this rank's share times the number of ranks."""
    return cast(Tensor, _SumShares.apply(share, group))  # type: ignore[no-untyped-call]


def global_mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over the first dimension of x, taken over all ranks, whose gradient is that to these rows times the number of ranks."""
    rows = x.new_tensor([x.shape[0]])
    total = sum_shares(torch.cat([x.sum(0).reshape(-1), rows]), group)
    return (total[:-1] / total[-1].detach()).reshape(x.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows, start = gather_rows(x, group)
        ctx.rows, ctx.world = slice(start, start + x.shape[0]), dist.get_world_size(group)
        return cast(Tensor, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.rows] * ctx.world, None


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
