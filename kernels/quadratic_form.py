"""Quadratic forms of a kernel matrix and the MMD² between groups on a GPU: formulas of `fastvae.reference.quadratic_form`.

Sums of K·v without its diagonal, and their gradient, are those of `fastvae.kernels.kernel_matmul`. Kernels here multiply them with v to S,
and take the values of pairs of groups from S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers, float32_parts
from fastvae.kernels import few_pairs
from fastvae.kernels.kernel_matmul import FactorSums, Product, ValueSums, sum_of_columns, sum_of_shares
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.plan import CONSTANT, VALUE_SCALE
from fastvae.kernels.prepare import ROW_BLOCK
from fastvae.kernels.reductions import add_shares, share_of, total
from fastvae.kernels.sums import load_numbers


class Groups(NamedTuple):
    """SIZE groups: total weights t (SIZE,), products P (SIZE, SIZE) or the diagonal of P (SIZE,), and numbers of members (SIZE,)."""

    total_ptr: Any
    products_ptr: Any
    members_ptr: Any


class BlockOfGroups(NamedTuple):
    """Whether each group is valid, its t, P_gg and the divisor of its w: see `fastvae.reference.quadratic_form.GroupWeights`."""

    valid: Any
    total: Any
    squares: Any
    norm: Any


@triton.jit(do_not_specialize=["n"])
def form_kernel(
    sums: ValueSums,
    v_ptr,  # (n, COLUMNS)
    factors: FactorSums,
    plan_ptr,
    form_ptr,  # (programs, COLUMNS, COLUMNS), float64
    n,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(1) of a share of the rows i, in a block of S."""
    # where
    program = tl.program_id(0)
    left = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    right = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = share_of(n, program, tl.num_programs(0), BLOCK_N)

    # load and compute
    v_sum = sum_of_columns(factors.sum_ptr, right, CHUNKS, C, BLOCK_C)
    value_scale, constant = tl.load(plan_ptr + VALUE_SCALE), tl.load(plan_ptr + CONSTANT)
    # A sum for each row of a block: the compiler fails on float64 products on tensor cores of numbers that were one byte wide.
    form = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_C], dtype=tl.float64)
    for start_n in range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        v_ptrs = v_ptr + offs_n.to(tl.int64)[:, None] * COLUMNS
        mask_n = (offs_n < n)[:, None]
        mask = mask_n & (right < COLUMNS)[None, :]
        paired = v_sum[None, :] - tl.load(v_ptrs + right[None, :], mask=mask, other=0.0).to(tl.float64)
        out = sum_of_shares(sums, offs_n, right, mask, C, BLOCK_N, BLOCK_C) * value_scale + paired * constant
        weights = tl.load(v_ptrs + left[None, :], mask=mask_n & (left < COLUMNS)[None, :], other=0.0).to(tl.float64)
        form += weights[:, :, None] * out[:, None, :]

    # store
    offs = (program.to(tl.int64) * COLUMNS + left)[:, None] * COLUMNS + right[None, :]
    form = tl.sum(form, 0) + total(factors.not_finite_ptr, factors.blocks, 1, 1024)
    tl.store(form_ptr + offs, form, mask=(left < COLUMNS)[:, None] & (right < COLUMNS)[None, :])


@triton.jit
def _load_groups(groups: Groups, offs, SIZE: tl.constexpr, DIAGONAL: tl.constexpr, UNBIASED: tl.constexpr):
    mask = offs < SIZE
    valid = tl.load(groups.members_ptr + offs, mask=mask, other=0) >= 2
    sums = tl.where(valid, tl.load(groups.total_ptr + offs, mask=mask, other=1.0), 1.0)
    squares = tl.load(groups.products_ptr + (offs if DIAGONAL else offs * (SIZE + 1)), mask=mask, other=0.0)
    norm = tl.where(valid, sums * sums - squares, 1.0) if UNBIASED else sums * sums
    return BlockOfGroups(valid, sums, squares, norm)


@triton.jit(do_not_specialize=["programs"])
def pair_values_kernel(
    form_ptr,  # (programs, SIZE, SIZE), of `form_kernel`
    own_ptr,  # O (SIZE, SIZE), or None if it is a multiple of P
    factor,  # that multiple, as three of float32
    groups: Groups,
    values_ptr,  # (SIZE, SIZE)
    valid_ptr,  # (SIZE,)
    pairs_ptr,  # (SIZE, SIZE)
    programs,
    SIZE: tl.constexpr,
    DIAGONAL: tl.constexpr,  # only the diagonal of P is given
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(3) of a block of pairs."""
    # where
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (g < SIZE)[:, None] & (h < SIZE)[None, :]
    offs, opposite = g[:, None] * SIZE + h[None, :], h[None, :] * SIZE + g[:, None]

    # load and compute
    multiple = load_numbers(factor, 1, False)[0]
    left = _load_groups(groups, g, SIZE, DIAGONAL, UNBIASED)
    right = _load_groups(groups, h, SIZE, DIAGONAL, UNBIASED)
    zeros, matrix = tl.zeros([BLOCK], dtype=tl.float64), SIZE * SIZE
    within_left = add_shares(zeros, form_ptr + g * (SIZE + 1), matrix, programs, g < SIZE)
    within_right = add_shares(zeros, form_ptr + h * (SIZE + 1), matrix, programs, h < SIZE)
    across = add_shares(tl.zeros([BLOCK, BLOCK], dtype=tl.float64), form_ptr + offs, matrix, programs, mask)
    across += add_shares(tl.zeros([BLOCK, BLOCK], dtype=tl.float64), form_ptr + opposite, matrix, programs, mask)
    if own_ptr is not None:
        across += tl.load(own_ptr + offs, mask=mask, other=0.0) + tl.load(own_ptr + opposite, mask=mask, other=0.0)
        if not UNBIASED:
            within_left += tl.load(own_ptr + g * (SIZE + 1), mask=g < SIZE, other=0.0)
            within_right += tl.load(own_ptr + h * (SIZE + 1), mask=h < SIZE, other=0.0)
    else:
        if not DIAGONAL:
            across += 2 * multiple * tl.load(groups.products_ptr + offs, mask=mask, other=0.0)
        if not UNBIASED:
            within_left += multiple * left.squares
            within_right += multiple * right.squares
    pairs = left.valid[:, None] & right.valid[None, :] & (g[:, None] != h[None, :])
    values = (within_left / left.norm)[:, None] + (within_right / right.norm)[None, :]
    values -= across / (left.total[:, None] * right.total[None, :])

    # store
    tl.store(values_ptr + offs, tl.where(pairs, values, 0.0).to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(pairs_ptr + offs, pairs, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(valid_ptr + g, left.valid, mask=g < SIZE)


@triton.jit(do_not_specialize=["stride_g", "stride_h"])
def pair_upstreams_kernel(
    upstream_ptr,  # (SIZE, SIZE)
    groups: Groups,
    out_ptr,  # (SIZE, SIZE), float64
    stride_g,
    stride_h,
    SIZE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of (3) to a block of rows of S."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = _load_groups(groups, g, SIZE, DIAGONAL, UNBIASED)
    within = tl.zeros([BLOCK], dtype=tl.float64)
    # The first turn sums rows, the second writes them: the diagonal holds the sum over a row.
    for last in tl.static_range(2):
        for start in range(0, SIZE, BLOCK):
            h = start + tl.arange(0, BLOCK)
            right = _load_groups(groups, h, SIZE, DIAGONAL, UNBIASED)
            pairs = left.valid[:, None] & right.valid[None, :] & (g[:, None] != h[None, :])
            both = tl.load(upstream_ptr + g[:, None] * stride_g + h[None, :] * stride_h, mask=pairs, other=0.0).to(tl.float64)
            both += tl.load(upstream_ptr + h[None, :] * stride_g + g[:, None] * stride_h, mask=pairs, other=0.0).to(tl.float64)
            if last == 0:
                within += tl.sum(both, 1)
            else:
                across = -both / (left.total[:, None] * right.total[None, :])
                out = tl.where(g[:, None] == h[None, :], (within / left.norm)[:, None], across)
                mask = (g < SIZE)[:, None] & (h < SIZE)[None, :]
                tl.store(out_ptr + g[:, None] * SIZE + h[None, :], out, mask=mask)


def quadratic_form(kernel: KernelNumbers, z: Tensor, v: Tensor, precision: str) -> Tensor:
    """S of z (N, D) and v (N, C) as parts (P, C, C) that sum to it, float64."""
    if (few := few_pairs.plan_if_few(kernel, z, z, v.shape[1])) is not None:
        return few_pairs.quadratic_form(few, kernel, z, v)
    v = v.contiguous()
    product, (n, columns) = Product(kernel, [z], v.shape[1], precision), v.shape
    factors = product.factors(v)
    sums = product.sweep(factors, within=True)
    c, chunks = product.choice.columns, factors.chunks
    # The parts hold no more numbers than v.
    programs, blocks = min(_PROGRAMS, triton.cdiv(n, max(c, ROW_BLOCK))), c // _FORM_BLOCK
    form = torch.empty((programs, columns, columns), dtype=torch.float64, device=z.device)
    launch(
        form_kernel, (product.prepared.key, columns, chunks, tensor_key(v)), z.device, (programs, blocks, blocks),
        (sums, v, factors.sums, product.prepared.tables.plan_ptr, form, n),
        lambda: {"CHUNKS": chunks, "COLUMNS": columns, "C": c, "BLOCK_N": _FORM_BLOCK, "BLOCK_C": _FORM_BLOCK},
    )  # fmt: skip
    return form


def quadratic_form_diagonal(kernel: KernelNumbers, z: Tensor, v: Tensor, precision: str) -> Tensor:
    """The diagonal of S, (C,), float64."""
    if (few := few_pairs.plan_if_few(kernel, z, z, v.shape[1])) is not None:
        return (v * few_pairs.matmul(few, kernel, z, z, v, torch.float64, within=True)).sum(0)
    product, v = Product(kernel, [z], v.shape[1], precision), v.contiguous()
    return (v * product.matmul(product.factors(v), torch.float64, within=v)).sum(0)


def quadratic_form_backward(kernel: KernelNumbers, z: Tensor, v: Tensor, upstream: Tensor, precision: str) -> Tensor:
    """The gradient to z (N, D), from the upstream (C, C)."""
    upstream = upstream.double().contiguous()
    if (few := few_pairs.plan_if_few(kernel, z, z, v.shape[1])) is not None:
        return few_pairs.gradient(few, kernel, z, z, v, v, upstream)
    product, v = Product(kernel, [z], v.shape[1], precision), v.contiguous()
    factors = product.factors(v, v, upstream=upstream)
    (gradient, _) = product.gradients(factors, x=True, y=False, within=True)
    assert gradient is not None
    return gradient


def pair_values(
    form: Tensor, own: Tensor | float, total: Tensor, products: Tensor, members: Tensor, unbiased: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² (G, G) from the parts of S and from O, (G, G) or a multiple of P; which groups are valid (G,), and which pairs (G, G)."""
    size, diagonal = total.shape[0], products.ndim == 1
    values = torch.empty((size, size), dtype=dtype, device=form.device)
    valid, pairs = (torch.empty(shape, dtype=torch.bool, device=form.device) for shape in ((size,), (size, size)))
    matrix, factor = (own.contiguous(), (0.0, 0.0, 0.0)) if isinstance(own, Tensor) else (None, float32_parts(own))
    groups = Groups(total, products, members)
    key = None if matrix is None else tensor_key(matrix), tensor_key(form, *groups, values, valid, pairs)
    launch(
        pair_values_kernel, (size, diagonal, unbiased, key), form.device, (*[triton.cdiv(size, _BLOCK)] * 2, 1),
        (form, matrix, factor, groups, values, valid, pairs, form.shape[0]),
        lambda: {"SIZE": size, "DIAGONAL": diagonal, "UNBIASED": unbiased, "BLOCK": _BLOCK},
    )  # fmt: skip
    return values, valid, pairs


def pair_upstreams(upstream: Tensor, total: Tensor, products: Tensor, members: Tensor, unbiased: bool) -> Tensor:
    """The gradient of MMD² to S, (G, G), float64, from the upstream (G, G)."""
    size, diagonal, groups = total.shape[0], products.ndim == 1, Groups(total, products, members)
    out = torch.empty((size, size), dtype=torch.float64, device=upstream.device)
    launch(
        pair_upstreams_kernel, (size, diagonal, unbiased, tensor_key(upstream, *groups, out)), upstream.device,
        (triton.cdiv(size, _BLOCK), 1, 1), (upstream, groups, out, *upstream.stride()),
        lambda: {"SIZE": size, "DIAGONAL": diagonal, "UNBIASED": unbiased, "BLOCK": _BLOCK},
    )  # fmt: skip
    return out


# Most programs that share the rows of a form, the rows and columns of a step, and the groups of a block of pairs.
_PROGRAMS = 64
_FORM_BLOCK = 16
_BLOCK = 32
