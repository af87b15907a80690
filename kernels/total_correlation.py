"""Log densities under a batch of posteriors on a GPU: formulas (1), (4) and (5) of `fastvae.reference.total_correlation`.

Forward and backward are prepare, two sweeps and finish, with no copy to or from the host. A sweep's operands are transposed, dimensions
first, and in units of log 2: with u = (z − μ)·k and k = √(½·log₂e)/σ an exponent is c − u². A program owns rows (or posteriors) and sweeps
posteriors (or rows), which are axis 0 of its tiles: each thread owns columns of a tile and sums them without an exchange. No atomics, a
fixed order, the same bits every time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae import kernel_sums
from fastvae.kernels.config import DensityConfig, column_splits, density_config, device_limits
from fastvae.kernels.launch import integer_key, launch, tensor_key
from fastvae.kernels.prepare import load_numbers
from fastvae.reference.total_correlation import LARGEST_ROOT

LOG2_E = tl.constexpr(kernel_sums.LOG2_E)
HALF_LOG2_2PI = tl.constexpr(0.5 * math.log2(2 * math.pi))
# u² = ½·log₂e·(z − μ)²/σ²
KAPPA2 = 0.5 * kernel_sums.LOG2_E
_KAPPA = tl.constexpr(KAPPA2**0.5)
_KAPPA2 = tl.constexpr(KAPPA2)
_UNIT = tl.constexpr(1 / KAPPA2)
_LARGEST_ROOT, _LARGEST_ROOT_DOUBLE = (tl.constexpr(LARGEST_ROOT[dtype]) for dtype in (torch.float32, torch.float64))

# A sum of densities over this has lost nothing to underflow.
LEAST_SUM = {torch.float32: 2.0**-60, torch.float64: 2.0**-500}

# The highest density of so many posteriors is what exponents leave out: of all, a program would read them all.
_BOUND_ROWS = tl.constexpr(128)


@triton.jit(
    do_not_specialize=[
        "z_stride", "z_step", "mu_stride", "mu_step", "logvar_stride", "logvar_step", "rows", "columns", "N", "M", "D", "BLOCKED_D",
        "given",
    ]
)  # fmt: skip
def prepare_kernel(
    z_in_ptr,  # (N, D), a row every `z_stride` elements, a dimension every `z_step`
    mu_in_ptr,  # (M, D)
    logvar_in_ptr,
    joint_in_ptr,  # (N,), log q(z_i)
    marginal_in_ptr,  # (N, D), log q(z_id)
    grad_0_ptr,  # gradients of the three terms, or of log q(z_i) and log q(z_id)
    grad_1_ptr,
    grad_2_ptr,
    z_ptr,  # (D, rows), here and below with zeros for padding, but where another number is named
    mu_ptr,  # (D, columns)
    k_ptr,
    c_ptr,  # −∞
    c_sum_ptr,  # (columns,), −∞
    joint_ptr,  # (rows,), +∞, of a pair's exponent
    marginal_ptr,  # (D, rows), +∞
    a_ptr,  # (rows,), the gradient to log q(z_i)
    b_ptr,  # (D, rows), the gradient to log q(z_id)
    weight_ptr,  # (2,)
    constant_ptr,  # (D + 1,), float64, what the exponents of a dimension leave out of log2 of a density, and the joint ones
    part_ptr,  # (programs, 3), float64: 0, or nan if a number is not finite; Σ log2 q(z_i|n_i); Σ log2 p(z_i)
    numbers,  # log2 of the weights of i and of i + 1 over that of the others, and that: each as three of float32
    z_stride,
    z_step,
    mu_stride,
    mu_step,
    logvar_stride,
    logvar_step,
    rows,
    columns,
    N,
    M,
    D,
    BLOCKED_D,  # D with its padding
    given,  # bits of the terms that have a gradient
    GRADIENT: tl.constexpr,
    TERMS: tl.constexpr,  # gradients are those of the three terms
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The operands of a block of rows and of posteriors; forward their shares of (4), backward the gradients of (1) from those of (4)."""
    # where
    start_n = tl.program_id(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row = offs_n.to(tl.int64)[:, None]
    first = tl.arange(0, _BOUND_ROWS)
    mask_z = offs_n < N
    mask_mu = offs_n < M
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    own, following, other = load_numbers(numbers, 3, False)
    if TERMS:
        information, correlation, divergence = load_gradients(grad_0_ptr, grad_1_ptr, grad_2_ptr, given, N)

    c_sum = tl.zeros([BLOCK_N], dtype=tl.float64)
    bounds = tl.zeros([], dtype=tl.float64)
    not_finite = tl.zeros([BLOCK_N], dtype=tl.float64)
    conditional = tl.zeros([BLOCK_N], dtype=tl.float64)
    prior = tl.zeros([BLOCK_N], dtype=tl.float64)
    for start_d in range(0, BLOCKED_D, BLOCK_D):
        # load
        offs_d = start_d + tl.arange(0, BLOCK_D)
        column = offs_d.to(tl.int64)[None, :]
        mask_d = (offs_d < D)[None, :]
        in_z = mask_z[:, None] & mask_d
        in_mu = mask_mu[:, None] & mask_d
        z = tl.load(z_in_ptr + row * z_stride + column * z_step, mask=in_z, other=0.0).to(dtype)
        mu = tl.load(mu_in_ptr + row * mu_stride + column * mu_step, mask=in_mu, other=0.0).to(dtype)
        logvar = tl.load(logvar_in_ptr + row * logvar_stride + column * logvar_step, mask=in_mu, other=0.0).to(dtype)
        in_first = (first < M)[:, None] & mask_d
        some = tl.load(logvar_in_ptr + first.to(tl.int64)[:, None] * logvar_stride + column * logvar_step, mask=in_first, other=0.0)
        bound = tl.max(tl.where(in_first, some.to(dtype) * (-0.5 * LOG2_E), float("-inf")), 0)
        bound = tl.where(offs_d < D, bound, 0.0)

        # compute
        c = logvar * (-0.5 * LOG2_E)
        k = tl.where(in_mu, tl.exp2(tl.minimum(c, _LARGEST_ROOT_DOUBLE if dtype == tl.float64 else _LARGEST_ROOT)) * _KAPPA, 0.0)
        relative = c - bound[None, :]
        c_sum += tl.sum(tl.where(mask_d, relative, 0.0), 1).to(tl.float64)
        bounds += tl.sum(bound.to(tl.float64))
        constant = bound.to(tl.float64) + (other - HALF_LOG2_2PI)

        # store
        out = column * rows + row
        blocked = (offs_d < BLOCKED_D)[None, :]
        mask_row = (offs_n < rows)[:, None] & blocked
        tl.store(z_ptr + out, z, mask=mask_row)
        if GRADIENT:
            marginal = tl.load(marginal_in_ptr + row * D + column, mask=in_z, other=0.0).to(tl.float64)
            marginal = (marginal * LOG2_E - constant[None, :]).to(dtype)
            tl.store(marginal_ptr + out, tl.where(in_z, marginal, float("inf")), mask=mask_row)
            if TERMS:
                b = tl.where(in_z, divergence - correlation, 0.0).to(dtype)
            else:
                b = tl.load(grad_1_ptr + row * D + column, mask=in_z, other=0.0).to(dtype)
            tl.store(b_ptr + out, b, mask=mask_row)
        else:
            both = in_z & in_mu
            u = (z - mu) * k
            conditional += tl.sum(tl.where(both, c - u * u - HALF_LOG2_2PI, 0.0), 1).to(tl.float64)
            prior += tl.sum(tl.where(both, z * z * -_KAPPA2 - HALF_LOG2_2PI, 0.0), 1).to(tl.float64)
            not_finite += tl.sum(z * 0.0 + mu * 0.0 + logvar * 0.0, 1).to(tl.float64)
            if start_n == 0:
                tl.store(constant_ptr + offs_d, constant, mask=offs_d < BLOCKED_D)
        out = column * columns + row
        mask_column = (offs_n < columns)[:, None] & blocked
        tl.store(mu_ptr + out, mu, mask=mask_column)
        tl.store(k_ptr + out, k, mask=mask_column)
        tl.store(c_ptr + out, tl.where(in_mu, relative, float("-inf")), mask=mask_column)

    tl.store(c_sum_ptr + offs_n, tl.where(mask_mu, c_sum, float("-inf")).to(dtype), mask=offs_n < columns)
    joint_constant = bounds + (other - D.to(tl.float64) * HALF_LOG2_2PI)
    if GRADIENT:
        joint = tl.load(joint_in_ptr + offs_n, mask=mask_z, other=0.0).to(tl.float64)
        joint = (joint * LOG2_E - joint_constant).to(dtype)
        tl.store(joint_ptr + offs_n, tl.where(mask_z, joint, float("inf")), mask=offs_n < rows)
        if TERMS:
            a = tl.where(mask_z, correlation - information, 0.0).to(dtype)
        else:
            a = tl.load(grad_0_ptr + offs_n, mask=mask_z, other=0.0).to(dtype)
        tl.store(a_ptr + offs_n, a, mask=offs_n < rows)
    else:
        part_ptr += tl.program_id(0) * 3
        tl.store(part_ptr, tl.sum(not_finite))
        tl.store(part_ptr + 1, tl.sum(conditional))
        tl.store(part_ptr + 2, tl.sum(prior))
        if start_n == 0:
            tl.store(constant_ptr + BLOCKED_D, joint_constant)
    if start_n == 0:
        tl.store(weight_ptr, own.to(dtype))
        tl.store(weight_ptr + 1, following.to(dtype))


@triton.jit
def load_gradients(grad_0_ptr, grad_1_ptr, grad_2_ptr, given, N):
    """Of the three terms, which are means over N rows."""
    information = tl.load(grad_0_ptr, mask=(given & 1) != 0, other=0.0).to(tl.float64)
    correlation = tl.load(grad_1_ptr, mask=(given & 2) != 0, other=0.0).to(tl.float64)
    divergence = tl.load(grad_2_ptr, mask=(given & 4) != 0, other=0.0).to(tl.float64)
    n = N.to(tl.float64)
    return information / n, correlation / n, divergence / n


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
    sum_ptr,  # (D, blocks), float64, sums of those over a block of rows
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
    if (tl.min(tl.where(offs_n < N, total, 1.0)) < LEAST_SUM) | (tl.max(total) == float("inf")):
        # Far from every posterior, or near one that is far sharper than those that `c` is relative to: relative to the nearest one.
        reference += float("-inf")
        for start_m in range(0, columns, BLOCK_M):
            exponent = _marginal_exponent(z, mu_ptr, k_ptr, c_ptr, start_m, offs_n, M, offset, own, following, STRATIFIED, BLOCK_M)
            reference = tl.maximum(reference, tl.max(exponent, 0))
        total = tl.zeros([BLOCK_N], dtype=z.dtype)
        for start_m in range(0, columns, BLOCK_M):
            exponent = _marginal_exponent(z, mu_ptr, k_ptr, c_ptr, start_m, offs_n, M, offset, own, following, STRATIFIED, BLOCK_M)
            total += tl.sum(tl.exp2(exponent - reference[None, :]), 0)

    # store
    marginal = tl.log2(total) + reference
    tl.store(marginal_ptr + d * rows + offs_n, marginal)
    tl.store(sum_ptr + d * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(offs_n < N, marginal, 0.0).to(tl.float64)))


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
            pull += tl.where(offs_d[:, None] == d, tl.sum(g * u * k[:, None], 0)[None, :], 0.0)
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
            # In this order, as u² is past the range of float32 for a pair far apart, whose G is zero.
            stretch += tl.where(here, (UNIT * tl.sum(g * u * u, 0) - tl.sum(g, 0))[None, :], 0.0)
            row += rows
            column += columns

    # store
    out = (split * BLOCKED_D + start_d) * columns + (offs_d[:, None].to(tl.int64) * columns + offs_n[None, :])
    tl.store(pull_ptr + out, pull)
    tl.store(stretch_ptr + out, stretch)


@triton.jit(do_not_specialize=["rows", "N", "D", "BLOCKED_D", "parts", "blocks", "splits"])
def finish_kernel(
    joint_in_ptr,  # (splits, rows), what `joint_kernel` stored
    marginal_in_ptr,  # (D, rows), what `marginal_kernel` did
    sum_ptr,
    constant_ptr,
    part_ptr,
    joint_ptr,  # (N,), log q(z_i)
    marginal_ptr,  # (N, D), log q(z_id)
    information_ptr,  # (), the terms of (4)
    correlation_ptr,
    divergence_ptr,
    rows,
    N,
    D,
    BLOCKED_D,
    parts,
    blocks,
    splits,
    BLOCK_R: tl.constexpr,  # numbers of a step of a sum
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(4) by program 0, in float64 and a fixed order; by each other (1) of a block of rows, in nats."""
    dtype: tl.constexpr = joint_ptr.dtype.element_ty
    not_finite = _sum_of_parts(part_ptr, parts, BLOCK_R)
    joint_constant = tl.load(constant_ptr + BLOCKED_D)
    if tl.program_id(0) == 0:
        joints = tl.zeros([BLOCK_R], dtype=tl.float64)
        for start_n in range(0, N, BLOCK_R):
            offs_n = start_n + tl.arange(0, BLOCK_R)
            joints += tl.where(offs_n < N, _joint(joint_in_ptr, offs_n, rows, splits), 0.0)
        marginals = tl.zeros([BLOCK_R], dtype=tl.float64)
        for start in range(0, D * blocks, BLOCK_R):
            offs = start + tl.arange(0, BLOCK_R)
            marginals += tl.load(sum_ptr + offs, mask=offs < D * blocks, other=0.0)
        constants = tl.zeros([BLOCK_R], dtype=tl.float64)
        for start in range(0, D, BLOCK_R):
            offs = start + tl.arange(0, BLOCK_R)
            constants += tl.load(constant_ptr + offs, mask=offs < D, other=0.0)
        n = N.to(tl.float64)
        joint = tl.sum(joints) / n + joint_constant
        marginal = tl.sum(marginals) / n + tl.sum(constants)
        conditional = _sum_of_parts(part_ptr + 1, parts, BLOCK_R) / n
        prior = _sum_of_parts(part_ptr + 2, parts, BLOCK_R) / n
        tl.store(information_ptr, ((conditional - joint) / LOG2_E + not_finite).to(dtype))
        tl.store(correlation_ptr, ((joint - marginal) / LOG2_E + not_finite).to(dtype))
        tl.store(divergence_ptr, ((marginal - prior) / LOG2_E + not_finite).to(dtype))
        return
    # where
    offs_n = (tl.program_id(0) - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = offs_n.to(tl.int64)[None, :]
    mask_n = offs_n < N

    # load, compute, store
    joint = (_joint(joint_in_ptr, offs_n, rows, splits) + joint_constant) / LOG2_E + not_finite
    tl.store(joint_ptr + offs_n, joint.to(dtype), mask=mask_n)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        column = offs_d.to(tl.int64)[:, None]
        mask = (offs_d < D)[:, None] & mask_n[None, :]
        marginal = tl.load(marginal_in_ptr + column * rows + row, mask=mask, other=0.0).to(tl.float64)
        constant = tl.load(constant_ptr + offs_d, mask=offs_d < D, other=0.0)
        marginal = (marginal + constant[:, None]) / LOG2_E + not_finite
        tl.store(marginal_ptr + row * D + column, marginal.to(dtype), mask=mask)


@triton.jit
def _sum_of_parts(part_ptr, parts, BLOCK_R: tl.constexpr):
    total = tl.zeros([BLOCK_R], dtype=tl.float64)
    for start in range(0, parts, BLOCK_R):
        offs = start + tl.arange(0, BLOCK_R)
        total += tl.load(part_ptr + offs * 3, mask=offs < parts, other=0.0)
    return tl.sum(total)


@triton.jit
def _joint(joint_ptr, offs_n, rows, splits):
    """log2 of the sum over all shares of the posteriors, float64."""
    mask = offs_n < rows
    most = tl.load(joint_ptr + offs_n, mask=mask, other=0.0).to(tl.float64)
    for split in range(1, splits):
        most = tl.maximum(most, tl.load(joint_ptr + tl.cast(split, tl.int64) * rows + offs_n, mask=mask, other=0.0).to(tl.float64))
    total = tl.zeros_like(most)
    for split in range(0, splits):
        total += tl.exp2(tl.load(joint_ptr + tl.cast(split, tl.int64) * rows + offs_n, mask=mask, other=0.0).to(tl.float64) - most)
    return tl.log2(total) + most


@triton.jit(do_not_specialize=["rows", "columns", "N", "M", "D", "BLOCKED_D", "row_splits", "column_splits", "given"])
def gradients_kernel(
    z_ptr,  # operands
    mu_ptr,
    k_ptr,
    z_pull_ptr,  # (row_splits, D, rows), what `rows_kernel` stored
    pull_ptr,  # (column_splits, D, columns), what `columns_kernel` did
    stretch_ptr,
    grad_0_ptr,  # as of `prepare_kernel`
    grad_1_ptr,
    grad_2_ptr,
    grad_z_ptr,  # (N, D)
    grad_mu_ptr,  # (M, D)
    grad_logvar_ptr,
    rows,
    columns,
    N,
    M,
    D,
    BLOCKED_D,
    row_splits,
    column_splits,
    given,
    Z_GRAD: tl.constexpr,
    POSTERIOR_GRAD: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(5) of a block of rows and of posteriors in a block of dimensions, to which (4) adds what it has of z, μ and logvar itself."""
    # where
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = offs_n.to(tl.int64)[None, :]
    column = offs_d.to(tl.int64)[:, None]
    mask_d = (offs_d < D)[:, None]
    mask_z = mask_d & (offs_n < N)[None, :]
    mask_mu = mask_d & (offs_n < M)[None, :]
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    out = row * D + column

    # load: q(z_i|n_i) pulls as a pair of weight `information`
    z = tl.load(z_ptr + column * rows + row, mask=mask_z, other=0.0)
    k = tl.load(k_ptr + column * columns + row, mask=mask_mu, other=0.0)
    u = tl.zeros_like(z)
    information = tl.zeros([], dtype=dtype)
    divergence = tl.zeros([], dtype=dtype)
    if TERMS:
        u = (z - tl.load(mu_ptr + column * columns + row, mask=mask_mu, other=0.0)) * k
        information, _, divergence = load_gradients(grad_0_ptr, grad_1_ptr, grad_2_ptr, given, N)
        information = information.to(dtype)
        divergence = divergence.to(dtype)

    # compute, store
    if Z_GRAD:
        pull = information * (u * k)
        for split in range(0, row_splits):
            pull += tl.load(z_pull_ptr + (tl.cast(split, tl.int64) * BLOCKED_D + column) * rows + row, mask=mask_z, other=0.0)
        tl.store(grad_z_ptr + out, (divergence * z - pull * _UNIT).to(grad_z_ptr.dtype.element_ty), mask=mask_z)
    if POSTERIOR_GRAD:
        pull = information * u
        stretch = information * ((u * u) * _UNIT - 1)
        for split in range(0, column_splits):
            part = (tl.cast(split, tl.int64) * BLOCKED_D + column) * columns + row
            pull += tl.load(pull_ptr + part, mask=mask_mu, other=0.0)
            stretch += tl.load(stretch_ptr + part, mask=mask_mu, other=0.0)
        tl.store(grad_mu_ptr + out, (pull * k * _UNIT).to(grad_mu_ptr.dtype.element_ty), mask=mask_mu)
        tl.store(grad_logvar_ptr + out, (0.5 * stretch).to(grad_logvar_ptr.dtype.element_ty), mask=mask_mu)


# Rows of a program around the sweeps; every block of a sweep holds whole ones.
_ROW_BLOCK = 64


@functools.lru_cache(maxsize=64)
def _numbers(weights: Any) -> tuple[float, ...]:
    """`numbers` of `prepare_kernel`."""
    logs = weights.own - weights.other, weights.next - weights.other, weights.other
    return tuple(part for weight in logs for part in kernel_sums.float32_parts(weight * kernel_sums.LOG2_E))


@dataclass(frozen=True, eq=False)
class _Problem:
    """Inputs, and the sizes of their operands: rows and posteriors are padded to block_n, dimensions to block_d."""

    inputs: tuple[Tensor, Tensor, Tensor]
    weights: Any
    offset: int
    dtype: torch.dtype
    config: DensityConfig
    rows: int
    columns: int
    dim: int
    blocked_dim: int
    key: Hashable

    @staticmethod
    def of(z: Tensor, mu: Tensor, logvar: Tensor, weights: Any, offset: int, gradient: bool) -> _Problem:
        (n, dim), m = z.shape, mu.shape[0]
        double = z.dtype == torch.float64
        stratified = weights.own != weights.other
        config = density_config(dim, double, gradient, stratified, device_limits(z.device).architecture)
        rows, columns, blocked_dim = (
            size + -size % block for size, block in ((n, config.block_n), (m, config.block_n), (dim, config.block_d))
        )
        sizes = rows, columns, offset, *z.stride(), *mu.stride(), *logvar.stride()
        key = config, stratified, tensor_key(z, mu, logvar), integer_key(dim, blocked_dim), tuple(size >= 1 << 31 for size in sizes)
        dtype = torch.float64 if double else torch.float32
        return _Problem((z, mu, logvar), weights, offset, dtype, config, rows, columns, dim, blocked_dim, key)

    @property
    def n(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def m(self) -> int:
        return self.inputs[1].shape[0]

    @property
    def programs(self) -> int:
        return max(self.rows, self.columns) // _ROW_BLOCK

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.inputs[0].device)

    def splits(self, programs: int, swept: int) -> int:
        return column_splits(programs, swept // self.config.block_m, device_limits(self.inputs[0].device).multiprocessors)

    def launch(self, fn: Any, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], **constants: Any) -> None:
        launch(fn, (self.key, key, *constants.values()), self.inputs[0].device, grid, args, lambda: constants)

    def around(self, **constants: Any) -> dict[str, Any]:
        """Constants of a kernel before or after the sweeps."""
        return {"BLOCK_N": _ROW_BLOCK, "BLOCK_D": min(16, triton.next_power_of_2(self.dim)), "num_warps": 4} | constants

    def sweep(self, *without: str, **constants: Any) -> dict[str, Any]:
        """Constants of a sweep."""
        stratified = self.weights.own != self.weights.other
        blocks = {name: value for name, value in self.config.launch().items() if name not in without}
        return constants | {"STRATIFIED": stratified} | blocks

    def prepare(
        self, upstream: tuple[Tensor, ...], given: int, constants: Tensor, parts: Tensor, key: Hashable, terms: bool
    ) -> list[Tensor]:
        """The operands and relative weights; `upstream` is log q(z_i), log q(z_id) and three gradients, or empty."""
        gradient = bool(upstream)
        n, m, d = self.rows, self.columns, self.blocked_dim
        sizes = [d * n, d * m, d * m, d * m, m, *(size * gradient for size in (n, d * n, n, d * n)), 2]
        operands = self.empty(sum(sizes)).split(sizes)
        strides = [stride for t in self.inputs for stride in t.stride()]
        self.launch(
            prepare_kernel, (key, gradient), (self.programs, 1, 1),
            (
                *self.inputs, *(upstream or [operands[0]] * 5), *operands, constants, parts, _numbers(self.weights), *strides,
                n, m, self.n, self.m, self.dim, d, given,
            ),
            **self.around(GRADIENT=gradient, TERMS=terms, num_warps=8),
        )  # fmt: skip
        return list(operands)


def forward(z: Tensor, mu: Tensor, logvar: Tensor, weights: Any, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The terms of (4), and log q(z_i) (N,) and log q(z_id) (N, D) of z (N, D) under posteriors (M, D).

    Row i is drawn from posterior offset + i; the terms are those of offset 0 and N = M. nan if an input is not finite.
    """
    x = _Problem.of(z, mu, logvar, weights, offset, gradient=False)
    blocks = x.rows // x.config.block_n
    # All but the last are multiples of 16 bytes, as a launch takes it for granted.
    sizes = 3 * x.programs, x.dim + 1 + (x.dim + 1) % 2, x.dim * blocks
    parts, constants, sums = x.empty(sum(sizes), dtype=torch.float64).split(sizes)
    zt, mut, k, c, c_sum, *_, relative = x.prepare((), 0, constants, parts, (), terms=False)
    marginals = x.empty(x.dim, x.rows)
    x.launch(
        marginal_kernel, (), (blocks, x.dim, 1),
        (zt, mut, k, c, marginals, sums, relative, x.rows, x.columns, x.n, x.m, offset),
        **x.sweep("BLOCK_D", LEAST_SUM=LEAST_SUM[x.dtype]),
    )  # fmt: skip
    splits = x.splits(blocks, x.columns)
    joint = x.empty(splits, x.rows)
    x.launch(
        joint_kernel, (), (blocks, splits, 1), (zt, mut, k, c_sum, joint, relative, x.rows, x.columns, x.m, offset, x.dim),
        **x.sweep("BLOCK_D", LOWEST=torch.finfo(x.dtype).min),
    )  # fmt: skip
    log_joint, log_marginals, terms = x.empty(x.n), x.empty(x.n, x.dim), [x.empty() for _ in range(3)]
    x.launch(
        finish_kernel, (), (1 + triton.cdiv(x.n, _ROW_BLOCK), 1, 1),
        (
            joint, marginals, sums, constants, parts, log_joint, log_marginals, *terms,
            x.rows, x.n, x.dim, x.blocked_dim, x.programs, blocks, splits,
        ),
        **x.around(BLOCK_R=1024),
    )  # fmt: skip
    return *terms, log_joint, log_marginals


def backward(
    grads: Sequence[Tensor | None],
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
    """dz (N, D), dμ and dlogvar (M, D) in the dtype of z, from the densities that `forward` returned and the gradients of its three terms,
    None for zero, or of the two densities."""
    x = _Problem.of(z, mu, logvar, weights, offset, gradient=True)
    config, terms = x.config, len(grads) == 3
    given = sum(1 << bit for bit, grad in enumerate(grads) if grad is not None)
    joint, marginals = joint.contiguous(), marginals.contiguous()
    upstream = [joint if grad is None else grad.contiguous() for grad in (*grads, None)[:3]]
    key = terms, tensor_key(joint, marginals, *upstream)
    *operands, relative = x.prepare((joint, marginals, *upstream), given, joint, joint, key, terms)
    zt, mut, k = operands[:3]
    sizes = relative, x.rows, x.columns, x.m, offset, x.dim, x.blocked_dim

    def grid_of(owned: int, swept: int) -> tuple[int, int, int]:
        blocks = owned // config.block_n, x.blocked_dim // config.block_d
        return *blocks, x.splits(blocks[0] * blocks[1], swept)

    z_pull = pull = stretch = zt
    grad_z = grad_mu = grad_logvar = zt
    row_splits = column_splits = 0
    if z_grad:
        grid = grid_of(x.rows, x.columns)
        row_splits, z_pull, grad_z = grid[2], x.empty(grid[2], x.blocked_dim, x.rows), x.empty(x.n, x.dim, dtype=z.dtype)
        x.launch(rows_kernel, (), grid, (*operands, z_pull, *sizes), **x.sweep())
    if posterior_grad:
        grid = grid_of(x.columns, x.rows)
        column_splits = grid[2]
        pull, stretch = (x.empty(column_splits, x.blocked_dim, x.columns) for _ in range(2))
        grad_mu, grad_logvar = (x.empty(x.m, x.dim, dtype=z.dtype) for _ in range(2))
        x.launch(columns_kernel, (), grid, (*operands, pull, stretch, *sizes), **x.sweep(UNIT=1 / KAPPA2))
    constants = x.around(Z_GRAD=z_grad, POSTERIOR_GRAD=posterior_grad, TERMS=terms)
    x.launch(
        gradients_kernel, (key, z_grad, posterior_grad), (x.programs, triton.cdiv(x.dim, constants["BLOCK_D"]), 1),
        (
            zt, mut, k, z_pull, pull, stretch, *upstream, grad_z, grad_mu, grad_logvar,
            x.rows, x.columns, x.n, x.m, x.dim, x.blocked_dim, row_splits, column_splits, given,
        ),
        **constants,
    )  # fmt: skip
    return grad_z if z_grad else None, grad_mu if posterior_grad else None, grad_logvar if posterior_grad else None
