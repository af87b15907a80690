"""Log densities under a batch of posteriors on a GPU: formulas (1), (4) and (5) of `fastvae.reference.total_correlation`.

Forward and backward each prepare operands, sweep over all pairs and finish; nothing is copied to or from the host. Operands are stored
dimensions first, and logarithms are to base 2: with u = (z − μ)·k and k = √(½·log₂e)/σ, a pair's exponent in one dimension is c − u². A
program owns rows (or posteriors) and sweeps over posteriors (or rows), which are axis 0 of its tiles. Each thread owns columns of a tile
and sums them without exchanging data. There are no atomics and sums have a fixed order, so results are the same bit for bit every time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae import kernel_sums
from fastvae.kernels.config import DensityConfig, column_splits, density_config, device_limits
from fastvae.kernels.launch import integer_key, launch, tensor_key
from fastvae.kernels.reductions import add_shares, share_of, total
from fastvae.kernels.sums import load_numbers
from fastvae.reference.total_correlation import LARGEST_ROOT, LogWeights

LOG2_E = tl.constexpr(kernel_sums.LOG2_E)
HALF_LOG2_2PI = tl.constexpr(0.5 * math.log2(2 * math.pi))
# u² = KAPPA2·(z − μ)²/σ²
KAPPA2 = 0.5 * kernel_sums.LOG2_E
_KAPPA = tl.constexpr(KAPPA2**0.5)
_KAPPA2 = tl.constexpr(KAPPA2)
_INVERSE_KAPPA2 = tl.constexpr(1 / KAPPA2)
_LARGEST_ROOT, _LARGEST_ROOT_DOUBLE = (tl.constexpr(LARGEST_ROOT[dtype]) for dtype in (torch.float32, torch.float64))

# A sum of densities above this has lost nothing to underflow.
LEAST_SUM = {torch.float32: 2.0**-60, torch.float64: 2.0**-500}

# Exponents are relative to the highest density at the means of so many posteriors: a program cannot read them all.
_PEAK_POSTERIORS = tl.constexpr(128)

# Tuples hold pointers in a kernel and tensors on the host. In shapes `rows`, `columns` and `dims` are N, M and D with their padding.


class PerInput(NamedTuple):
    """One each for z, μ and logvar: inputs, their strides, sums for their gradients or these; None where not wanted."""

    z: Any
    mu: Any
    logvar: Any


class Terms(NamedTuple):
    """The three terms of (4), scalars, or gradients to them, of which None is zero."""

    information_ptr: Any
    correlation_ptr: Any
    divergence_ptr: Any


class Upstream(NamedTuple):
    """What backward gets besides the inputs: densities, and the gradients to them or to the terms."""

    joint_ptr: Any  # (N,), log q(z_i)
    marginal_ptr: Any  # (N, D), log q(z_id)
    terms: Terms | None
    a_ptr: Any  # (N,), gradient to log q(z_i), or None
    b_ptr: Any  # (N, D), gradient to log q(z_id), or None


class DensityOperands(NamedTuple):
    """What the sweeps read; those from `joint_ptr` to `b_ptr` in backward only. Padding is 0 where no other number is named."""

    z_ptr: Any  # (dims, rows)
    mu_ptr: Any  # (dims, columns)
    k_ptr: Any  # (dims, columns)
    c_ptr: Any  # (dims, columns), log2 of 1/σ relative to the highest of the first posteriors; −∞ in the padding
    c_sum_ptr: Any  # (columns,), Σ_d c; −∞ in the padding
    joint_ptr: Any  # (rows,), log2 q(z_i) relative to its constant; +∞ in the padding
    marginal_ptr: Any  # (dims, rows), log2 q(z_id) relative to its constant; +∞ in the padding
    a_ptr: Any  # (rows,)
    b_ptr: Any  # (dims, rows)
    weight_ptr: Any  # (2,), log2 of the weights of posteriors i and i + 1 relative to that of all others


class ForwardSums(NamedTuple):
    """What the kernels of forward leave to the last one."""

    constant_ptr: Any  # (dims + 1,), float64, log2 of a density less its exponent: of each dimension, then of all together
    part_ptr: Any  # (programs, 3), float64: 0, or nan if a number is not finite; Σ log2 q(z_i|n_i); Σ log2 p(z_i)
    marginal_ptr: Any  # (D, rows), log2 q(z_id) relative to its constant
    marginal_sum_ptr: Any  # (D, blocks), float64, sums of those over a block of rows
    joint_ptr: Any  # (splits, rows), log2 q(z_i) relative to its constant, over a share of the posteriors


@triton.jit(do_not_specialize=["rows", "columns", "N", "M", "D", "DIMS"])
def prepare_kernel(
    inputs: PerInput,  # z (N, D), μ and logvar (M, D)
    strides: PerInput,  # of rows and dimensions
    upstream: Upstream,  # None in forward
    operands: DensityOperands,
    sums: ForwardSums,  # None in backward
    numbers,  # `LogWeights` as own − other, next − other and other in log2, each as three of float32
    rows,
    columns,
    N,
    M,
    D,
    DIMS,  # D with its padding
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The operands of a block of rows and of posteriors; forward also adds up their part of (4)."""
    # where
    start_n = tl.program_id(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    row = offs_n.to(tl.int64)[:, None]
    mask_z = offs_n < N
    mask_mu = offs_n < M
    dtype: tl.constexpr = operands.z_ptr.dtype.element_ty
    own, following, other = load_numbers(numbers, 3, False)
    if sums is None:  # noqa: SIM102, a tuple that is None has no field
        if upstream.a_ptr is None:
            information, correlation, divergence = _term_gradients(upstream.terms, N)

    c_sum = tl.zeros([BLOCK_N], dtype=tl.float64)
    peak_sum = tl.zeros([], dtype=tl.float64)
    not_finite = tl.zeros([BLOCK_N], dtype=tl.float64)
    conditional = tl.zeros([BLOCK_N], dtype=tl.float64)
    prior = tl.zeros([BLOCK_N], dtype=tl.float64)
    for start_d in range(0, DIMS, BLOCK_D):
        # load
        offs_d = start_d + tl.arange(0, BLOCK_D)
        dim = offs_d.to(tl.int64)[None, :]
        mask_d = (offs_d < D)[None, :]
        in_z = mask_z[:, None] & mask_d
        in_mu = mask_mu[:, None] & mask_d
        z = tl.load(inputs.z + row * strides.z[0] + dim * strides.z[1], mask=in_z, other=0.0).to(dtype)
        mu = tl.load(inputs.mu + row * strides.mu[0] + dim * strides.mu[1], mask=in_mu, other=0.0).to(dtype)
        logvar = tl.load(inputs.logvar + row * strides.logvar[0] + dim * strides.logvar[1], mask=in_mu, other=0.0).to(dtype)

        # compute
        peak = _peak(inputs.logvar, strides, offs_d, M, D, dtype)
        log_root = logvar * (-0.5 * LOG2_E)
        largest: tl.constexpr = _LARGEST_ROOT_DOUBLE if dtype == tl.float64 else _LARGEST_ROOT
        k = tl.where(in_mu, tl.exp2(tl.minimum(log_root, largest)) * _KAPPA, 0.0)
        c = log_root - peak[None, :]
        c_sum += tl.sum(tl.where(mask_d, c, 0.0), 1).to(tl.float64)
        peak_sum += tl.sum(peak.to(tl.float64))
        constant = peak.to(tl.float64) + (other - HALF_LOG2_2PI)
        if sums is not None:
            both = in_z & in_mu
            u = (z - mu) * k
            conditional += tl.sum(tl.where(both, log_root - u * u - HALF_LOG2_2PI, 0.0), 1).to(tl.float64)
            prior += tl.sum(tl.where(both, z * z * -_KAPPA2 - HALF_LOG2_2PI, 0.0), 1).to(tl.float64)
            not_finite += tl.sum(z * 0.0 + mu * 0.0 + logvar * 0.0, 1).to(tl.float64)

        # store
        in_dims = (offs_d < DIMS)[None, :]
        mask_row = (offs_n < rows)[:, None] & in_dims
        out = dim * rows + row
        tl.store(operands.z_ptr + out, z, mask=mask_row)
        if sums is None:
            marginal = tl.load(upstream.marginal_ptr + row * D + dim, mask=in_z, other=0.0).to(tl.float64)
            marginal = (marginal * LOG2_E - constant[None, :]).to(dtype)
            tl.store(operands.marginal_ptr + out, tl.where(in_z, marginal, float("inf")), mask=mask_row)
            if upstream.a_ptr is not None:
                b = tl.load(upstream.b_ptr + row * D + dim, mask=in_z, other=0.0)
            else:
                b = tl.where(in_z, divergence - correlation, 0.0)
            tl.store(operands.b_ptr + out, b.to(dtype), mask=mask_row)
        elif start_n == 0:
            tl.store(sums.constant_ptr + offs_d, constant, mask=offs_d < DIMS)
        out = dim * columns + row
        mask_column = (offs_n < columns)[:, None] & in_dims
        tl.store(operands.mu_ptr + out, mu, mask=mask_column)
        tl.store(operands.k_ptr + out, k, mask=mask_column)
        tl.store(operands.c_ptr + out, tl.where(in_mu, c, float("-inf")), mask=mask_column)

    tl.store(operands.c_sum_ptr + offs_n, tl.where(mask_mu, c_sum, float("-inf")).to(dtype), mask=offs_n < columns)
    joint_constant = peak_sum + (other - D.to(tl.float64) * HALF_LOG2_2PI)
    if sums is None:
        joint = tl.load(upstream.joint_ptr + offs_n, mask=mask_z, other=0.0).to(tl.float64)
        joint = (joint * LOG2_E - joint_constant).to(dtype)
        tl.store(operands.joint_ptr + offs_n, tl.where(mask_z, joint, float("inf")), mask=offs_n < rows)
        if upstream.a_ptr is not None:
            a = tl.load(upstream.a_ptr + offs_n, mask=mask_z, other=0.0)
        else:
            a = tl.where(mask_z, correlation - information, 0.0)
        tl.store(operands.a_ptr + offs_n, a.to(dtype), mask=offs_n < rows)
    else:
        part_ptr = sums.part_ptr + tl.program_id(0) * 3
        tl.store(part_ptr, tl.sum(not_finite))
        tl.store(part_ptr + 1, tl.sum(conditional))
        tl.store(part_ptr + 2, tl.sum(prior))
        if start_n == 0:
            tl.store(sums.constant_ptr + DIMS, joint_constant)
    if start_n == 0:
        tl.store(operands.weight_ptr, own.to(dtype))
        tl.store(operands.weight_ptr + 1, following.to(dtype))


@triton.jit
def _peak(logvar_ptr, strides: PerInput, offs_d, M, D, dtype: tl.constexpr):
    """The highest log2 of 1/σ of the first posteriors in each dimension; 0 in the padding."""
    first = tl.arange(0, _PEAK_POSTERIORS)
    mask = (first < M)[:, None] & (offs_d < D)[None, :]
    offs = first.to(tl.int64)[:, None] * strides.logvar[0] + offs_d.to(tl.int64)[None, :] * strides.logvar[1]
    logvar = tl.load(logvar_ptr + offs, mask=mask, other=0.0).to(dtype)
    peak = tl.max(tl.where(mask, logvar * (-0.5 * LOG2_E), float("-inf")), 0)
    return tl.where(offs_d < D, peak, 0.0)


@triton.jit
def _term_gradients(terms: Terms, N):
    """Gradients of one row to the three terms, which are means over N rows."""
    return _mean_gradient(terms.information_ptr, N), _mean_gradient(terms.correlation_ptr, N), _mean_gradient(terms.divergence_ptr, N)


@triton.jit
def _mean_gradient(grad_ptr, N):
    if grad_ptr is None:
        return tl.zeros([], dtype=tl.float64)
    else:
        return tl.load(grad_ptr).to(tl.float64) / N.to(tl.float64)


@triton.jit
def _relative_weight(offs_n, offs_m, M, offset, own, following, ROWS_FIRST: tl.constexpr):
    """log2 of w_ij relative to that of a pair with j ≠ i and j ≠ i + 1: formula (3)."""
    posterior = _over_posteriors(offs_m, ROWS_FIRST)
    owner = _over_rows(offs_n, ROWS_FIRST) + offset
    after = tl.where(owner == M - 1, 0, owner + 1)
    return tl.where(posterior == owner, own, tl.where(posterior == after, following, 0.0))


@triton.jit
def _over_rows(values, ROWS_FIRST: tl.constexpr):
    """One value for each row of a tile, whose axis 0 are rows if ROWS_FIRST, else posteriors."""
    return values[:, None] if ROWS_FIRST else values[None, :]


@triton.jit
def _over_posteriors(values, ROWS_FIRST: tl.constexpr):
    """One value for each posterior of a tile."""
    return values[None, :] if ROWS_FIRST else values[:, None]


@triton.jit
def _scaled_difference(z, mu, k, ROWS_FIRST: tl.constexpr):
    """u of each pair of a tile."""
    return (_over_rows(z, ROWS_FIRST) - _over_posteriors(mu, ROWS_FIRST)) * _over_posteriors(k, ROWS_FIRST)


@triton.jit
def _subtract_squares(exponent, operands: DensityOperands, offs_n, offs_m, rows, columns, D, ROWS_FIRST: tl.constexpr):
    """exponent − Σ_d u² of each pair of a tile."""
    z_ptrs = operands.z_ptr + offs_n
    mu_ptrs = operands.mu_ptr + offs_m
    k_ptrs = operands.k_ptr + offs_m
    for _ in range(D):
        u = _scaled_difference(tl.load(z_ptrs), tl.load(mu_ptrs), tl.load(k_ptrs), ROWS_FIRST)
        exponent -= u * u
        z_ptrs += rows
        mu_ptrs += columns
        k_ptrs += columns
    return exponent


@triton.jit
def _marginal_exponent(
    operands: DensityOperands, z, d, start_m, offs_n, columns, M, offset, own, following, STRATIFIED: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The exponents of one dimension, (posteriors, rows)."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mu = tl.load(operands.mu_ptr + d * columns + offs_m)
    k = tl.load(operands.k_ptr + d * columns + offs_m)
    c = tl.load(operands.c_ptr + d * columns + offs_m)
    u = _scaled_difference(z, mu, k, False)
    exponent = _over_posteriors(c, False) - u * u
    if STRATIFIED:
        exponent += _relative_weight(offs_n, offs_m, M, offset, own, following, False)
    return exponent


@triton.jit(do_not_specialize=["N", "M", "offset"])
def marginal_kernel(
    operands: DensityOperands,
    sums: ForwardSums,
    rows,
    columns,
    N,
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

    # load
    z = tl.load(operands.z_ptr + d * rows + offs_n)
    own = tl.load(operands.weight_ptr)
    following = tl.load(operands.weight_ptr + 1)

    # compute
    density = tl.zeros([BLOCK_N], dtype=z.dtype)
    highest = tl.zeros([BLOCK_N], dtype=z.dtype)
    for start_m in range(0, columns, BLOCK_M):
        exponent = _marginal_exponent(operands, z, d, start_m, offs_n, columns, M, offset, own, following, STRATIFIED, BLOCK_M)
        density += tl.sum(tl.exp2(exponent), 0)
    if (tl.min(tl.where(offs_n < N, density, 1.0)) < LEAST_SUM) | (tl.max(density) == float("inf")):
        # Rows far from every posterior, or near one far sharper than the first ones: sum relative to each row's highest exponent.
        highest += float("-inf")
        for start_m in range(0, columns, BLOCK_M):
            exponent = _marginal_exponent(operands, z, d, start_m, offs_n, columns, M, offset, own, following, STRATIFIED, BLOCK_M)
            highest = tl.maximum(highest, tl.max(exponent, 0))
        density = tl.zeros([BLOCK_N], dtype=z.dtype)
        for start_m in range(0, columns, BLOCK_M):
            exponent = _marginal_exponent(operands, z, d, start_m, offs_n, columns, M, offset, own, following, STRATIFIED, BLOCK_M)
            density += tl.sum(tl.exp2(exponent - highest[None, :]), 0)

    # store
    marginal = tl.log2(density) + highest
    tl.store(sums.marginal_ptr + d * rows + offs_n, marginal)
    marginal_sum = tl.sum(tl.where(offs_n < N, marginal, 0.0).to(tl.float64))
    tl.store(sums.marginal_sum_ptr + d * tl.num_programs(0) + tl.program_id(0), marginal_sum)


@triton.jit(do_not_specialize=["M", "offset"])
def joint_kernel(
    operands: DensityOperands,
    sums: ForwardSums,
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
    share = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    # load
    own = tl.load(operands.weight_ptr)
    following = tl.load(operands.weight_ptr + 1)

    # compute
    density = tl.zeros([BLOCK_N], dtype=own.dtype)
    highest = tl.full([BLOCK_N], LOWEST, dtype=own.dtype)
    first, last = share_of(columns, share, tl.num_programs(1), BLOCK_M)
    for start_m in range(first, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        exponent = tl.load(operands.c_sum_ptr + offs_m)[:, None] + tl.zeros([BLOCK_M, BLOCK_N], dtype=own.dtype)
        exponent = _subtract_squares(exponent, operands, offs_n, offs_m, rows, columns, D, False)
        if STRATIFIED:
            exponent += _relative_weight(offs_n, offs_m, M, offset, own, following, False)
        higher = tl.maximum(highest, tl.max(exponent, 0))
        density = density * tl.exp2(highest - higher) + tl.sum(tl.exp2(exponent - higher[None, :]), 0)
        highest = higher

    # store
    tl.store(sums.joint_ptr + share.to(tl.int64) * rows + offs_n, tl.log2(density) + highest)


@triton.jit(do_not_specialize=["M", "offset"])
def gradient_kernel(
    operands: DensityOperands,
    sums: PerInput,  # those that it adds up: Σ_j G·u·k (splits, dims, rows), or Σ_i G·u and Σ_i G·(u²/KAPPA2 − 1) (splits, dims, columns)
    rows,
    columns,
    M,
    offset,
    D,
    DIMS,
    OF_ROWS: tl.constexpr,  # owns rows, else posteriors
    STRATIFIED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows or posteriors that a program owns
    BLOCK_M: tl.constexpr,  # posteriors or rows of a tile
    BLOCK_D: tl.constexpr,
):
    """Sums of (5) of a block of rows or posteriors in a block of dimensions; program 2 is the share of the others."""
    # where
    start_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    share = tl.program_id(2)
    owned = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    ROWS_FIRST: tl.constexpr = not OF_ROWS

    # load
    own = tl.load(operands.weight_ptr)
    following = tl.load(operands.weight_ptr + 1)
    if OF_ROWS:
        joint = tl.load(operands.joint_ptr + owned)
        a = tl.load(operands.a_ptr + owned)
    else:
        c_sum = tl.load(operands.c_sum_ptr + owned)

    # compute
    location = tl.zeros([BLOCK_D, BLOCK_N], dtype=own.dtype)
    scale = tl.zeros([BLOCK_D, BLOCK_N], dtype=own.dtype)
    first, last = share_of(columns if OF_ROWS else rows, share, tl.num_programs(2), BLOCK_M)
    for start in range(first, last, BLOCK_M):
        swept = start + tl.arange(0, BLOCK_M)
        if OF_ROWS:
            offs_n, offs_m = owned, swept
            pair = tl.load(operands.c_sum_ptr + swept)[:, None] - joint[None, :]
        else:
            offs_n, offs_m = swept, owned
            pair = c_sum[None, :] - tl.load(operands.joint_ptr + swept)[:, None]
        pair = _subtract_squares(pair, operands, offs_n, offs_m, rows, columns, D, ROWS_FIRST)
        if STRATIFIED:
            pair += _relative_weight(offs_n, offs_m, M, offset, own, following, ROWS_FIRST)
        pair = tl.exp2(pair) * (a[None, :] if OF_ROWS else tl.load(operands.a_ptr + swept)[:, None])
        row = start_d * rows
        column = start_d * columns
        for d in range(BLOCK_D):
            z = tl.load(operands.z_ptr + row + offs_n)
            marginal = tl.load(operands.marginal_ptr + row + offs_n)
            b = tl.load(operands.b_ptr + row + offs_n)
            mu = tl.load(operands.mu_ptr + column + offs_m)
            k = tl.load(operands.k_ptr + column + offs_m)
            c = tl.load(operands.c_ptr + column + offs_m)
            u = _scaled_difference(z, mu, k, ROWS_FIRST)
            exponent = (_over_posteriors(c, ROWS_FIRST) - _over_rows(marginal, ROWS_FIRST)) - u * u
            if STRATIFIED:
                exponent += _relative_weight(offs_n, offs_m, M, offset, own, following, ROWS_FIRST)
            g = pair + _over_rows(b, ROWS_FIRST) * tl.exp2(exponent)
            here = offs_d[:, None] == d
            if OF_ROWS:
                location += tl.where(here, tl.sum(g * u * k[:, None], 0)[None, :], 0.0)
            else:
                location += tl.where(here, tl.sum(g * u, 0)[None, :], 0.0)
                # g·u first: for distant pairs g is 0 and u² is past the range of float32.
                scale += tl.where(here, (tl.sum(g * u * u, 0) * _INVERSE_KAPPA2 - tl.sum(g, 0))[None, :], 0.0)
            row += rows
            column += columns

    # store
    width = rows if OF_ROWS else columns
    out = (share * DIMS + start_d) * width + (offs_d[:, None].to(tl.int64) * width + owned[None, :])
    if OF_ROWS:
        tl.store(sums.z + out, location)
    else:
        tl.store(sums.mu + out, location)
        tl.store(sums.logvar + out, scale)


@triton.jit(do_not_specialize=["rows", "N", "D", "DIMS", "parts", "blocks", "splits"])
def finish_kernel(
    sums: ForwardSums,
    joint_ptr,  # (N,), log q(z_i)
    marginal_ptr,  # (N, D), log q(z_id)
    terms: Terms,
    rows,
    N,
    D,
    DIMS,
    parts,
    blocks,
    splits,
    BLOCK_R: tl.constexpr,  # numbers of a step of a sum
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program 0 takes the terms of (4), in float64; each other the densities (1) of a block of rows. Both in nats."""
    dtype: tl.constexpr = joint_ptr.dtype.element_ty
    not_finite = total(sums.part_ptr, parts, 3, BLOCK_R)
    joint_constant = tl.load(sums.constant_ptr + DIMS)
    if tl.program_id(0) == 0:
        joints = tl.zeros([BLOCK_R], dtype=tl.float64)
        for start_n in range(0, N, BLOCK_R):
            offs_n = start_n + tl.arange(0, BLOCK_R)
            joints += tl.where(offs_n < N, _joint(sums.joint_ptr, offs_n, rows, splits), 0.0)
        n = N.to(tl.float64)
        joint = tl.sum(joints) / n + joint_constant
        marginal = total(sums.marginal_sum_ptr, D * blocks, 1, BLOCK_R) / n + total(sums.constant_ptr, D, 1, BLOCK_R)
        conditional = total(sums.part_ptr + 1, parts, 3, BLOCK_R) / n
        prior = total(sums.part_ptr + 2, parts, 3, BLOCK_R) / n
        tl.store(terms.information_ptr, ((conditional - joint) / LOG2_E + not_finite).to(dtype))
        tl.store(terms.correlation_ptr, ((joint - marginal) / LOG2_E + not_finite).to(dtype))
        tl.store(terms.divergence_ptr, ((marginal - prior) / LOG2_E + not_finite).to(dtype))
        return
    # where
    offs_n = (tl.program_id(0) - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = offs_n.to(tl.int64)[None, :]
    mask_n = offs_n < N

    # load, compute, store
    joint = (_joint(sums.joint_ptr, offs_n, rows, splits) + joint_constant) / LOG2_E + not_finite
    tl.store(joint_ptr + offs_n, joint.to(dtype), mask=mask_n)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        dim = offs_d.to(tl.int64)[:, None]
        mask = (offs_d < D)[:, None] & mask_n[None, :]
        marginal = tl.load(sums.marginal_ptr + dim * rows + row, mask=mask, other=0.0).to(tl.float64)
        constant = tl.load(sums.constant_ptr + offs_d, mask=offs_d < D, other=0.0)
        marginal = (marginal + constant[:, None]) / LOG2_E + not_finite
        tl.store(marginal_ptr + row * D + dim, marginal.to(dtype), mask=mask)


@triton.jit
def _joint(joint_ptr, offs_n, rows, splits):
    """log2 of the sum over all shares of the posteriors, float64."""
    mask = offs_n < rows
    highest = tl.load(joint_ptr + offs_n, mask=mask, other=0.0).to(tl.float64)
    for split in range(1, splits):
        highest = tl.maximum(highest, tl.load(joint_ptr + tl.cast(split, tl.int64) * rows + offs_n, mask=mask, other=0.0).to(tl.float64))
    density = tl.zeros_like(highest)
    for split in range(0, splits):
        density += tl.exp2(tl.load(joint_ptr + tl.cast(split, tl.int64) * rows + offs_n, mask=mask, other=0.0).to(tl.float64) - highest)
    return tl.log2(density) + highest


@triton.jit(do_not_specialize=["rows", "columns", "N", "M", "D", "DIMS"])
def gradient_finish_kernel(
    operands: DensityOperands,
    sums: PerInput,  # of `gradient_kernel`
    terms: Terms,  # gradients to the terms, None if those to the densities were given
    grads: PerInput,  # z (N, D), μ and logvar (M, D)
    rows,
    columns,
    N,
    M,
    D,
    DIMS,
    splits,  # of the sums of z, and of those of μ and logvar
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(5) of a block of rows and of posteriors in a block of dimensions, and with it what (4) takes of z, μ and logvar directly."""
    # where
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = offs_n.to(tl.int64)[None, :]
    dim = offs_d.to(tl.int64)[:, None]
    mask_d = (offs_d < D)[:, None]
    mask_z = mask_d & (offs_n < N)[None, :]
    mask_mu = mask_d & (offs_n < M)[None, :]
    dtype: tl.constexpr = operands.z_ptr.dtype.element_ty
    out = row * D + dim

    # load: q(z_i|n_i) counts as a pair of weight `information`
    z = tl.load(operands.z_ptr + dim * rows + row, mask=mask_z, other=0.0)
    k = tl.load(operands.k_ptr + dim * columns + row, mask=mask_mu, other=0.0)
    u = tl.zeros_like(z)
    information = tl.zeros([], dtype=dtype)
    divergence = tl.zeros([], dtype=dtype)
    if TERMS:
        u = (z - tl.load(operands.mu_ptr + dim * columns + row, mask=mask_mu, other=0.0)) * k
        information, _, divergence = _term_gradients(terms, N)
        information = information.to(dtype)
        divergence = divergence.to(dtype)

    # compute, store
    if grads.z is not None:
        part = tl.cast(DIMS, tl.int64) * rows
        location = add_shares(information * (u * k), sums.z + dim * rows + row, part, splits[0], mask_z)
        grad_z = divergence * z - location * _INVERSE_KAPPA2
        tl.store(grads.z + out, grad_z.to(grads.z.dtype.element_ty), mask=mask_z)
    if grads.mu is not None:
        source = dim * columns + row
        part = tl.cast(DIMS, tl.int64) * columns
        location = add_shares(information * u, sums.mu + source, part, splits[1], mask_mu)
        scale = add_shares(information * ((u * u) * _INVERSE_KAPPA2 - 1), sums.logvar + source, part, splits[1], mask_mu)
        tl.store(grads.mu + out, (location * k * _INVERSE_KAPPA2).to(grads.mu.dtype.element_ty), mask=mask_mu)
        tl.store(grads.logvar + out, (0.5 * scale).to(grads.logvar.dtype.element_ty), mask=mask_mu)


# Rows of a program around the sweeps; every block of a sweep holds whole ones.
_ROW_BLOCK = 64


@functools.lru_cache(maxsize=64)
def _numbers(weights: LogWeights) -> tuple[float, ...]:
    """`numbers` of `prepare_kernel`."""
    logs = weights.own - weights.other, weights.next - weights.other, weights.other
    return tuple(part for weight in logs for part in kernel_sums.float32_parts(weight * kernel_sums.LOG2_E))


@dataclass(frozen=True, eq=False)
class _Problem:
    """Inputs, and the sizes of their operands: rows and posteriors are padded to block_n, dimensions to block_d."""

    inputs: PerInput
    weights: LogWeights
    offset: int
    dtype: torch.dtype
    config: DensityConfig
    rows: int
    columns: int
    dim: int
    padded_dim: int
    key: Hashable

    @staticmethod
    def of(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, offset: int, gradient: bool) -> _Problem:
        (n, dim), m = z.shape, mu.shape[0]
        in_float64 = z.dtype == torch.float64
        stratified = weights.own != weights.other
        config = density_config(dim, in_float64, gradient, stratified, device_limits(z.device).architecture)
        rows, columns, padded_dim = (
            size + -size % block for size, block in ((n, config.block_n), (m, config.block_n), (dim, config.block_d))
        )
        sizes = rows, columns, offset, *z.stride(), *mu.stride(), *logvar.stride()
        key = config, stratified, tensor_key(z, mu, logvar), integer_key(dim, padded_dim), tuple(size >= 1 << 31 for size in sizes)
        dtype = torch.float64 if in_float64 else torch.float32
        return _Problem(PerInput(z, mu, logvar), weights, offset, dtype, config, rows, columns, dim, padded_dim, key)

    @property
    def n(self) -> int:
        return self.inputs.z.shape[0]

    @property
    def m(self) -> int:
        return self.inputs.mu.shape[0]

    @property
    def programs(self) -> int:
        """Programs of a kernel before the sweeps."""
        return max(self.rows, self.columns) // _ROW_BLOCK

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.inputs.z.device)

    def splits(self, programs: int, swept: int) -> int:
        """Into how many shares `programs` programs cut what they sweep over."""
        return column_splits(programs, swept // self.config.block_m, device_limits(self.inputs.z.device).multiprocessors)

    def launch(self, fn: Any, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], **constants: Any) -> None:
        launch(fn, (self.key, key, *constants.values()), self.inputs.z.device, grid, args, lambda: constants)

    def block_constants(self, **constants: Any) -> dict[str, Any]:
        """Constants of a kernel before or after the sweeps."""
        return {"BLOCK_N": _ROW_BLOCK, "BLOCK_D": min(16, triton.next_power_of_2(self.dim)), "num_warps": 4} | constants

    def sweep_constants(self, *without: str, **constants: Any) -> dict[str, Any]:
        """Constants of a sweep."""
        return constants | {"STRATIFIED": self.weights.own != self.weights.other} | self.config.launch(*without)

    def prepare(self, upstream: Upstream | None, sums: ForwardSums | None, key: Hashable = ()) -> DensityOperands:
        n, m, d, backward = self.rows, self.columns, self.padded_dim, upstream is not None
        sizes = [d * n, d * m, d * m, d * m, m, *(size * backward for size in (n, d * n, n, d * n)), 2]
        operands = DensityOperands(*self.empty(sum(sizes)).split(sizes))
        strides = PerInput(*(t.stride() for t in self.inputs))
        self.launch(
            prepare_kernel, (key, backward), (self.programs, 1, 1),
            (self.inputs, strides, upstream, operands, sums, _numbers(self.weights), n, m, self.n, self.m, self.dim, d),
            **self.block_constants(num_warps=8),
        )  # fmt: skip
        return operands


def forward(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The terms of (4), log q(z_i) (N,) and log q(z_id) (N, D) of z (N, D) under posteriors (M, D).

    Row i is drawn from posterior offset + i. The terms are right for offset 0 and N = M. All are nan if an input is not finite.
    """
    x = _Problem.of(z, mu, logvar, weights, offset, gradient=False)
    blocks, splits = x.rows // x.config.block_n, x.splits(x.rows // x.config.block_n, x.columns)
    # Kernels are compiled for pointers to multiples of 16 bytes.
    sizes = 3 * x.programs, x.dim + 1 + (x.dim + 1) % 2, x.dim * blocks
    parts, constants, marginal_sums = x.empty(sum(sizes), dtype=torch.float64).split(sizes)
    sums = ForwardSums(constants, parts, x.empty(x.dim, x.rows), marginal_sums, x.empty(splits, x.rows))
    operands = x.prepare(None, sums)
    x.launch(
        marginal_kernel, (), (blocks, x.dim, 1), (operands, sums, x.rows, x.columns, x.n, x.m, offset),
        **x.sweep_constants("BLOCK_D", LEAST_SUM=LEAST_SUM[x.dtype]),
    )  # fmt: skip
    x.launch(
        joint_kernel, (), (blocks, splits, 1), (operands, sums, x.rows, x.columns, x.m, offset, x.dim),
        **x.sweep_constants("BLOCK_D", LOWEST=torch.finfo(x.dtype).min),
    )  # fmt: skip
    joint, marginals, terms = x.empty(x.n), x.empty(x.n, x.dim), Terms(*(x.empty() for _ in range(3)))
    x.launch(
        finish_kernel, (), (1 + triton.cdiv(x.n, _ROW_BLOCK), 1, 1),
        (sums, joint, marginals, terms, x.rows, x.n, x.dim, x.padded_dim, x.programs, blocks, splits),
        **x.block_constants(BLOCK_R=1024),
    )  # fmt: skip
    return *terms, joint, marginals


def backward(
    grads: Sequence[Tensor | None], z: Tensor, mu: Tensor, logvar: Tensor, joint: Tensor, marginals: Tensor, weights: LogWeights,
    offset: int, z_grad: bool, posterior_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients to z (N, D), μ and logvar (M, D) that are wanted, in the dtype of z.

    Args:
        grads: the gradients to the three terms of (4), None for zero, or to log q(z_i) (N,) and log q(z_id) (N, D).
        joint, marginals: of `forward`.
    """
    x = _Problem.of(z, mu, logvar, weights, offset, gradient=True)
    upstream = [None if grad is None else grad.contiguous() for grad in grads]
    terms, (a, b) = (Terms(*upstream), (None, None)) if len(grads) == 3 else (None, upstream)
    densities = joint.contiguous(), marginals.contiguous()
    key = terms is None, tuple(None if t is None else tensor_key(t) for t in (*densities, *upstream))
    operands = x.prepare(Upstream(*densities, terms, a, b), None, key)

    def grid_of(owned: int, swept: int) -> tuple[int, int, int]:
        blocks = owned // x.config.block_n, x.padded_dim // x.config.block_d
        return *blocks, x.splits(blocks[0] * blocks[1], swept)

    sizes = x.rows, x.columns, x.m, offset, x.dim, x.padded_dim
    sums, grad = PerInput(None, None, None), PerInput(None, None, None)
    row_splits = column_splits = 0
    if z_grad:
        grid = grid_of(x.rows, x.columns)
        row_splits, grad = grid[2], grad._replace(z=x.empty(x.n, x.dim, dtype=z.dtype))
        sums = sums._replace(z=x.empty(row_splits, x.padded_dim, x.rows))
        x.launch(gradient_kernel, (), grid, (operands, sums, *sizes), **x.sweep_constants(OF_ROWS=True))
    if posterior_grad:
        grid = grid_of(x.columns, x.rows)
        column_splits = grid[2]
        of_posteriors = PerInput(None, *(x.empty(column_splits, x.padded_dim, x.columns) for _ in range(2)))
        x.launch(gradient_kernel, (), grid, (operands, of_posteriors, *sizes), **x.sweep_constants(OF_ROWS=False))
        sums = of_posteriors._replace(z=sums.z)
        grad = PerInput(grad.z, *(x.empty(x.m, x.dim, dtype=z.dtype) for _ in range(2)))
    constants = x.block_constants(TERMS=terms is not None)
    x.launch(
        gradient_finish_kernel, (key, z_grad, posterior_grad), (x.programs, triton.cdiv(x.dim, constants["BLOCK_D"]), 1),
        (operands, sums, terms, grad, x.rows, x.columns, x.n, x.m, x.dim, x.padded_dim, (row_splits, column_splits)),
        **constants,
    )  # fmt: skip
    return tuple(grad)
