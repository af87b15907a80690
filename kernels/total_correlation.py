"""Log densities under a batch of posteriors on a GPU: formulas (1) and (5) of `fastvae.reference.total_correlation`.

Operands are transposed, dimensions first, and in units of log 2: with u = (z − μ)·k and k = √(½·log₂e)/σ an exponent is c − u² ≤ 0.
A program owns rows (or posteriors) and sweeps posteriors (or rows), which are axis 0 of its tiles: each thread owns columns of a tile and
sums them without an exchange. No atomics, a fixed order, the same bits every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.config import DensityConfig, column_splits, density_config, device_limits
from fastvae.kernels.launch import on_device
from fastvae.radial import LOG2_E

HALF_LOG2_2PI = 0.5 * math.log2(2 * math.pi)
# u² = ½·log₂e·(z − μ)²/σ²
KAPPA2 = 0.5 * LOG2_E

# A sum of densities over this has lost nothing to underflow.
LEAST_SUM = {torch.float32: 2.0**-60, torch.float64: 2.0**-500}


@triton.jit
def _relative_weight(posterior, row, M, offset, own, following):
    """log2 of w_ij over that of a pair with j > i + 1: formula (3)."""
    owner = row + offset
    after = tl.where(owner == M - 1, 0, owner + 1)
    return tl.where(posterior == owner, own, tl.where(posterior == after, following, 0.0))


@triton.jit
def _joint_exponent(row_ptrs, column_mu_ptrs, column_k_ptrs, joint, row_stride, column_stride, D, ROWS_FIRST: tl.constexpr):
    """`joint` less Σ_d u²; rows are axis 0 of the tile if ROWS_FIRST, else axis 1."""
    for _ in range(D):
        z = tl.load(row_ptrs)
        mu = tl.load(column_mu_ptrs)
        k = tl.load(column_k_ptrs)
        if ROWS_FIRST:
            u = (z[:, None] - mu[None, :]) * k[None, :]
        else:
            u = (z[None, :] - mu[:, None]) * k[:, None]
        joint -= u * u
        row_ptrs += row_stride
        column_mu_ptrs += column_stride
        column_k_ptrs += column_stride
    return joint


@triton.jit
def _marginal_exponent(
    z, mu_ptr, k_ptr, c_ptr, start_m, offs_n, M, offset, own, following, STRATIFIED: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Exponents of one dimension, (posteriors, rows)."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mu = tl.load(mu_ptr + offs_m)
    k = tl.load(k_ptr + offs_m)
    c = tl.load(c_ptr + offs_m)
    u = (z[None, :] - mu[:, None]) * k[:, None]
    exponent = c[:, None] - u * u
    if STRATIFIED:
        exponent += _relative_weight(offs_m[:, None], offs_n[None, :], M, offset, own, following)
    return exponent


@triton.jit(do_not_specialize=["N", "M", "offset"])
def marginal_kernel(
    z_ptr,  # (D, rows), rows with their padding
    mu_ptr,  # (D, columns), posteriors with theirs
    k_ptr,
    c_ptr,  # (D, columns), −inf in the padding
    marginal_ptr,  # (D, rows), log2 Σ_j exp2(exponent)
    weight_ptr,  # (2,), log2 of the weights of i and of i + 1 over that of the others
    rows,
    columns,
    N,  # rows without padding
    M,
    offset,  # row i is drawn from posterior offset + i
    LEAST_SUM: tl.constexpr,
    STRATIFIED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """log q(z_id) of a block of rows in one dimension, formula (1)."""
    # where
    d = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mu_ptr += d * columns
    k_ptr += d * columns
    c_ptr += d * columns

    # load
    z = tl.load(z_ptr + d * rows + offs_n)
    own = tl.load(weight_ptr)
    following = tl.load(weight_ptr + 1)

    # compute
    total = tl.zeros([BLOCK_N], dtype=z.dtype)
    reference = tl.zeros([BLOCK_N], dtype=z.dtype)
    for start_m in range(0, columns, BLOCK_M):
        exponent = _marginal_exponent(z, mu_ptr, k_ptr, c_ptr, start_m, offs_n, M, offset, own, following, STRATIFIED, BLOCK_M)
        total += tl.sum(tl.exp2(exponent), 0)
    if tl.min(tl.where(offs_n < N, total, 1.0)) < LEAST_SUM:
        # Far from every posterior: relative to the nearest one.
        reference += float("-inf")
        for start_m in range(0, columns, BLOCK_M):
            exponent = _marginal_exponent(z, mu_ptr, k_ptr, c_ptr, start_m, offs_n, M, offset, own, following, STRATIFIED, BLOCK_M)
            reference = tl.maximum(reference, tl.max(exponent, 0))
        total = tl.zeros([BLOCK_N], dtype=z.dtype)
        for start_m in range(0, columns, BLOCK_M):
            exponent = _marginal_exponent(z, mu_ptr, k_ptr, c_ptr, start_m, offs_n, M, offset, own, following, STRATIFIED, BLOCK_M)
            total += tl.sum(tl.exp2(exponent - reference[None, :]), 0)

    # store
    tl.store(marginal_ptr + d * rows + offs_n, tl.log2(total) + reference)


@triton.jit(do_not_specialize=["M", "offset"])
def joint_kernel(
    z_ptr,
    mu_ptr,
    k_ptr,
    c_sum_ptr,  # (columns,), Σ_d c
    joint_ptr,  # (SPLITS, rows), log2 Σ_j exp2(joint exponent) over a share of the posteriors
    weight_ptr,
    rows,
    columns,
    M,
    offset,
    D,
    LOWEST: tl.constexpr,  # finite number
    STRATIFIED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """log q(z_i) of a block of rows, formula (1); program 1 is the share of the posteriors."""
    # where
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    # load
    own = tl.load(weight_ptr)
    following = tl.load(weight_ptr + 1)

    # compute
    total = tl.zeros([BLOCK_N], dtype=own.dtype)
    most = tl.full([BLOCK_N], LOWEST, dtype=own.dtype)
    share = tl.cdiv(tl.cdiv(columns, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    for start_m in range(split * share, tl.minimum((split + 1) * share, columns), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        joint = tl.load(c_sum_ptr + offs_m)[:, None] + tl.zeros([BLOCK_M, BLOCK_N], dtype=own.dtype)
        joint = _joint_exponent(z_ptr + offs_n, mu_ptr + offs_m, k_ptr + offs_m, joint, rows, columns, D, False)
        if STRATIFIED:
            joint += _relative_weight(offs_m[:, None], offs_n[None, :], M, offset, own, following)
        nearer = tl.maximum(most, tl.max(joint, 0))
        total = total * tl.exp2(most - nearer) + tl.sum(tl.exp2(joint - nearer[None, :]), 0)
        most = nearer

    # store
    tl.store(joint_ptr + split.to(tl.int64) * rows + offs_n, tl.log2(total) + most)


@triton.jit(do_not_specialize=["M", "offset"])
def rows_kernel(
    z_ptr,
    mu_ptr,
    k_ptr,
    c_ptr,
    c_sum_ptr,
    joint_ptr,  # (rows,), +inf in the padding, as the next
    marginal_ptr,  # (D, rows)
    a_ptr,  # (rows,), the gradient to log q(z_i)
    b_ptr,  # (D, rows), the gradient to log q(z_id)
    pull_ptr,  # (SPLITS, D, rows), Σ_j G·u·k
    weight_ptr,
    rows,
    columns,
    M,
    offset,
    D,
    BLOCKED_D,  # D with its padding
    STRATIFIED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz of a block of rows in a block of dimensions, formula (5); program 2 is the share of the posteriors."""
    # where
    start_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)

    # load
    own = tl.load(weight_ptr)
    following = tl.load(weight_ptr + 1)
    joint_row = tl.load(joint_ptr + offs_n)
    a = tl.load(a_ptr + offs_n)

    # compute
    pull = tl.zeros([BLOCK_D, BLOCK_N], dtype=own.dtype)
    share = tl.cdiv(tl.cdiv(columns, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    for start_m in range(split * share, tl.minimum((split + 1) * share, columns), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        pair = tl.load(c_sum_ptr + offs_m)[:, None] - joint_row[None, :]
        pair = _joint_exponent(z_ptr + offs_n, mu_ptr + offs_m, k_ptr + offs_m, pair, rows, columns, D, False)
        if STRATIFIED:
            pair += _relative_weight(offs_m[:, None], offs_n[None, :], M, offset, own, following)
        pair = tl.exp2(pair) * a[None, :]
        row = start_d * rows
        column = start_d * columns
        for d in range(BLOCK_D):
            z = tl.load(z_ptr + row + offs_n)
            marginal = tl.load(marginal_ptr + row + offs_n)
            b = tl.load(b_ptr + row + offs_n)
            mu = tl.load(mu_ptr + column + offs_m)
            k = tl.load(k_ptr + column + offs_m)
            c = tl.load(c_ptr + column + offs_m)
            u = (z[None, :] - mu[:, None]) * k[:, None]
            exponent = (c[:, None] - marginal[None, :]) - u * u
            if STRATIFIED:
                exponent += _relative_weight(offs_m[:, None], offs_n[None, :], M, offset, own, following)
            g = pair + b[None, :] * tl.exp2(exponent)
            pull += tl.where(offs_d[:, None] == d, tl.sum(g * (u * k[:, None]), 0)[None, :], 0.0)
            row += rows
            column += columns

    # store
    out_ptr = pull_ptr + (split * BLOCKED_D + start_d) * rows
    tl.store(out_ptr + (offs_d[:, None].to(tl.int64) * rows + offs_n[None, :]), pull)


@triton.jit(do_not_specialize=["M", "offset"])
def columns_kernel(
    z_ptr,
    mu_ptr,
    k_ptr,
    c_ptr,
    c_sum_ptr,
    joint_ptr,
    marginal_ptr,
    a_ptr,
    b_ptr,
    pull_ptr,  # (SPLITS, D, columns), Σ_i G·u
    stretch_ptr,  # (SPLITS, D, columns), Σ_i G·(UNIT·u² − 1)
    weight_ptr,
    rows,
    columns,
    M,
    offset,
    D,
    BLOCKED_D,
    UNIT: tl.constexpr,
    STRATIFIED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # posteriors that a program owns
    BLOCK_M: tl.constexpr,  # rows of a tile
    BLOCK_D: tl.constexpr,
):
    """dμ and dlogvar of a block of posteriors in a block of dimensions, formula (5); program 2 is the share of the rows."""
    # where
    start_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)

    # load
    own = tl.load(weight_ptr)
    following = tl.load(weight_ptr + 1)
    c_sum = tl.load(c_sum_ptr + offs_n)

    # compute
    pull = tl.zeros([BLOCK_D, BLOCK_N], dtype=own.dtype)
    stretch = tl.zeros([BLOCK_D, BLOCK_N], dtype=own.dtype)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    for start_m in range(split * share, tl.minimum((split + 1) * share, rows), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        pair = c_sum[None, :] - tl.load(joint_ptr + offs_m)[:, None]
        pair = _joint_exponent(z_ptr + offs_m, mu_ptr + offs_n, k_ptr + offs_n, pair, rows, columns, D, True)
        if STRATIFIED:
            pair += _relative_weight(offs_n[None, :], offs_m[:, None], M, offset, own, following)
        pair = tl.exp2(pair) * tl.load(a_ptr + offs_m)[:, None]
        row = start_d * rows
        column = start_d * columns
        for d in range(BLOCK_D):
            z = tl.load(z_ptr + row + offs_m)
            marginal = tl.load(marginal_ptr + row + offs_m)
            b = tl.load(b_ptr + row + offs_m)
            mu = tl.load(mu_ptr + column + offs_n)
            k = tl.load(k_ptr + column + offs_n)
            c = tl.load(c_ptr + column + offs_n)
            u = (z[:, None] - mu[None, :]) * k[None, :]
            exponent = (c[None, :] - marginal[:, None]) - u * u
            if STRATIFIED:
                exponent += _relative_weight(offs_n[None, :], offs_m[:, None], M, offset, own, following)
            g = pair + b[:, None] * tl.exp2(exponent)
            here = offs_d[:, None] == d
            pull += tl.where(here, tl.sum(g * u, 0)[None, :], 0.0)
            stretch += tl.where(here, tl.sum(g * (UNIT * (u * u) - 1), 0)[None, :], 0.0)
            row += rows
            column += columns

    # store
    out = (split * BLOCKED_D + start_d) * columns + (offs_d[:, None].to(tl.int64) * columns + offs_n[None, :])
    tl.store(pull_ptr + out, pull)
    tl.store(stretch_ptr + out, stretch)


@dataclass
class _Operands:
    """Transposed, padded to whole blocks: rows and posteriors to block_n, dimensions to block_d."""

    z: Tensor  # (D, rows)
    mu: Tensor  # (D, columns)
    k: Tensor
    c: Tensor
    c_sum: Tensor  # (columns,)
    bound: Tensor  # (D,), log2 of the highest density, which c lacks
    weights: Tensor  # (2,)
    other: float  # log2 of the weight of the pairs that have none in `weights`
    stratified: bool
    n: int
    m: int
    dim: int
    offset: int
    config: DensityConfig
    multiprocessors: int

    @staticmethod
    def of(z: Tensor, mu: Tensor, logvar: Tensor, weights: Any, offset: int, gradient: bool) -> _Operands:
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        (n, dim), m = z.shape, mu.shape[0]
        device = device_limits(z.device)
        stratified = weights.own != weights.other
        config = density_config(dim, dtype == torch.float64, gradient, stratified, device.architecture)

        def pad(t: Tensor, value: float) -> Tensor:
            blocks = (0, -t.shape[1] % config.block_n, 0, -dim % config.block_d)
            return torch.nn.functional.pad(t, blocks, value=value).contiguous()

        z, mu, logvar = (t.T.to(dtype) for t in (z, mu, logvar))
        k = (logvar * (-0.5 * LOG2_E)).exp2() * KAPPA2**0.5
        c = logvar * (-0.5 * LOG2_E)
        bound = c.amax(1)
        c = c - bound[:, None]
        c_sum = torch.nn.functional.pad(c.sum(0), (0, -m % config.block_n), value=-math.inf)
        # Filled and not copied: a copy to a GPU would wait for it.
        relative = torch.empty(2, dtype=dtype, device=z.device)
        for entry, w in zip(relative, (weights.own, weights.next), strict=True):
            entry.fill_((w - weights.other) * LOG2_E)
        return _Operands(
            pad(z, 0.0), pad(mu, 0.0), pad(k, 0.0), pad(c, -math.inf), c_sum, bound, relative, weights.other * LOG2_E,
            stratified, n, m, dim, offset, config, device.multiprocessors,
        )  # fmt: skip

    def constants(self) -> tuple[Tensor, Tensor]:
        """What a log density lacks in units of log 2, joint () and by dimension (D, 1), in float64."""
        bound = self.bound.double()
        return bound.sum() + (self.other - self.dim * HALF_LOG2_2PI), bound[:, None] + (self.other - HALF_LOG2_2PI)

    def splits(self, programs: int, swept: int) -> int:
        return column_splits(programs, swept // self.config.block_m, self.multiprocessors)


@on_device
def forward(z: Tensor, mu: Tensor, logvar: Tensor, weights: Any, offset: int) -> tuple[Tensor, Tensor]:
    """log q(z_i) (N,) and log q(z_id) (N, D) of z (N, D) under posteriors (M, D); row i is drawn from posterior offset + i."""
    x = _Operands.of(z, mu, logvar, weights, offset, gradient=False)
    config, rows, columns = x.config, x.z.shape[1], x.mu.shape[1]
    blocks = rows // config.block_n
    marginals = x.z.new_empty(x.dim, rows)
    launch = {"STRATIFIED": x.stratified, **config.launch()}
    del launch["BLOCK_D"]
    marginal_kernel[(blocks, x.dim)](
        x.z, x.mu, x.k, x.c, marginals, x.weights, rows, columns, x.n, x.m, offset, LEAST_SUM=LEAST_SUM[x.z.dtype], **launch
    )
    splits = x.splits(blocks, columns)
    joint = x.z.new_empty(splits, rows)
    joint_kernel[(blocks, splits)](
        x.z, x.mu, x.k, x.c_sum, joint, x.weights, rows, columns, x.m, offset, x.dim, LOWEST=torch.finfo(x.z.dtype).min, **launch
    )
    joint_constant, constants = x.constants()
    log_joint = torch.logsumexp(joint[:, : x.n].double() / LOG2_E, 0) + joint_constant / LOG2_E
    log_marginals = (marginals[:, : x.n].double() + constants) / LOG2_E
    return log_joint.to(x.z.dtype), log_marginals.T.to(x.z.dtype).contiguous()


@on_device
def backward(
    grad_joint: Tensor,
    grad_marginals: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    weights: Any,
    offset: int,
    z_grad: bool,
    posterior_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz (N, D), dμ and dlogvar (M, D) in the dtype of the sweep, from the gradients of what `forward` returned and its values."""
    x = _Operands.of(z, mu, logvar, weights, offset, gradient=True)
    config, dtype = x.config, x.z.dtype
    (blocked_dim, rows), columns = x.z.shape, x.mu.shape[1]
    joint_constant, constants = x.constants()
    row_padding, dim_padding = rows - x.n, blocked_dim - x.dim
    joint2 = torch.nn.functional.pad((joint.double() * LOG2_E - joint_constant).to(dtype), (0, row_padding), value=math.inf)
    marginals2 = (marginals.T.double() * LOG2_E - constants).to(dtype)
    marginals2 = torch.nn.functional.pad(marginals2, (0, row_padding, 0, dim_padding), value=math.inf).contiguous()
    a = torch.nn.functional.pad(grad_joint.to(dtype), (0, row_padding))
    b = torch.nn.functional.pad(grad_marginals.T.to(dtype), (0, row_padding, 0, dim_padding)).contiguous()
    operands = (x.z, x.mu, x.k, x.c, x.c_sum, joint2, marginals2, a, b)
    sizes = (x.weights, rows, columns, x.m, offset, x.dim, blocked_dim)
    launch = {"STRATIFIED": x.stratified, **config.launch()}
    grad_z = grad_mu = grad_logvar = None
    if z_grad:
        blocks = (rows // config.block_n, blocked_dim // config.block_d)
        splits = x.splits(blocks[0] * blocks[1], columns)
        pull = x.z.new_empty(splits, blocked_dim, rows)
        rows_kernel[(*blocks, splits)](*operands, pull, *sizes, **launch)
        grad_z = (pull.sum(0)[: x.dim, : x.n] * (-1 / KAPPA2)).T.contiguous()
    if posterior_grad:
        blocks = (columns // config.block_n, blocked_dim // config.block_d)
        splits = x.splits(blocks[0] * blocks[1], rows)
        pull = x.z.new_empty(splits, blocked_dim, columns)
        stretch = torch.empty_like(pull)
        columns_kernel[(*blocks, splits)](*operands, pull, stretch, *sizes, UNIT=1 / KAPPA2, **launch)
        grad_mu = ((pull.sum(0) * x.k)[: x.dim, : x.m] * (1 / KAPPA2)).T.contiguous()
        grad_logvar = (stretch.sum(0)[: x.dim, : x.m] * 0.5).T.contiguous()
    return grad_z, grad_mu, grad_logvar
