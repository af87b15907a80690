"""Quadratic forms of a kernel matrix and the MMD² between groups on a GPU: formulas of `fastvae.reference.quadratic_form`.

Sums of K·v without its diagonal, and their gradient, are those of `fastvae.kernels.kernel_matmul`; kernels here take their products with v,
and from S the values of pairs of groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers, float32_parts
from fastvae.kernels import few_pairs
from fastvae.kernels.kernel_matmul import Product, poison_of, sum_of_columns, sum_of_shares
from fastvae.kernels.launch import launch, tensor_key
from fastvae.kernels.prepare import CONSTANT, ROW_BLOCK, UNIT


@triton.jit(do_not_specialize=["n", "rows", "splits", "poisons"])
def form_kernel(
    sums_ptr,  # (SPLITS, rows, C), of `matmul_kernel`
    v_ptr,  # (n, COLUMNS)
    total_ptr,  # (CHUNKS, C), of `factors_kernel`
    poison_ptr,
    plan_ptr,
    form_ptr,  # (programs, COLUMNS, COLUMNS), float64
    n,
    rows,
    splits,
    poisons,
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
    share = tl.cdiv(tl.cdiv(n, BLOCK_N), tl.num_programs(0)) * BLOCK_N
    first = program * share

    # load and compute
    total = sum_of_columns(total_ptr, right, CHUNKS, C, BLOCK_C)
    unit, constant = tl.load(plan_ptr + UNIT), tl.load(plan_ptr + CONSTANT)
    # A sum for each place in a block of rows: the compiler fails on products of float64 on tensor cores of numbers that were of one byte.
    form = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_C], dtype=tl.float64)
    for start_n in range(first, tl.minimum(first + share, n), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        v_ptrs = v_ptr + offs_n.to(tl.int64)[:, None] * COLUMNS
        mask_n = (offs_n < n)[:, None]
        mask = mask_n & (right < COLUMNS)[None, :]
        paired = total[None, :] - tl.load(v_ptrs + right[None, :], mask=mask, other=0.0).to(tl.float64)
        out = sum_of_shares(sums_ptr, offs_n, right, mask, rows, splits, C, BLOCK_N, BLOCK_C) * unit + paired * constant
        weights = tl.load(v_ptrs + left[None, :], mask=mask_n & (left < COLUMNS)[None, :], other=0.0).to(tl.float64)
        form += weights[:, :, None] * out[:, None, :]

    # store
    offs = (program.to(tl.int64) * COLUMNS + left)[:, None] * COLUMNS + right[None, :]
    tl.store(
        form_ptr + offs, tl.sum(form, 0) + poison_of(poison_ptr, poisons, 1024), mask=(left < COLUMNS)[:, None] & (right < COLUMNS)[None, :]
    )


@triton.jit
def _load_groups(total_ptr, products_ptr, members_ptr, offs, SIZE: tl.constexpr, DIAGONAL: tl.constexpr, UNBIASED: tl.constexpr):
    """Of groups whether they are valid, t, P_gg and what w is divided by, as of `fastvae.reference.quadratic_form.GroupWeights`."""
    mask = offs < SIZE
    valid = tl.load(members_ptr + offs, mask=mask, other=0) >= 2
    total = tl.where(valid, tl.load(total_ptr + offs, mask=mask, other=1.0), 1.0)
    squares = tl.load(products_ptr + (offs if DIAGONAL else offs * (SIZE + 1)), mask=mask, other=0.0)
    norm = tl.where(valid, total * total - squares, 1.0) if UNBIASED else total * total
    return valid, total, squares, norm


@triton.jit
def _sum_of_programs(form_ptr, offs, mask, programs, SIZE: tl.constexpr):
    total = tl.load(form_ptr + offs, mask=mask, other=0.0)
    for program in range(1, programs):
        total += tl.load(form_ptr + tl.cast(program, tl.int64) * (SIZE * SIZE) + offs, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["programs"])
def pair_values_kernel(
    form_ptr,  # (programs, SIZE, SIZE), of `form_kernel`
    own_ptr,  # (SIZE, SIZE), O
    total_ptr,  # (SIZE,), t
    products_ptr,  # P, (SIZE, SIZE), or if DIAGONAL its diagonal (SIZE,)
    members_ptr,  # (SIZE,)
    values_ptr,  # (SIZE, SIZE)
    valid_ptr,  # (SIZE,)
    pairs_ptr,  # (SIZE, SIZE)
    programs,
    factor_high,  # three float32, whose sum times P is O if not OWN
    factor_middle,
    factor_low,
    SIZE: tl.constexpr,
    OWN: tl.constexpr,
    DIAGONAL: tl.constexpr,
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
    factor = tl.cast(factor_high, tl.float64) + tl.cast(factor_middle, tl.float64) + tl.cast(factor_low, tl.float64)
    valid_g, total_g, squares_g, norm_g = _load_groups(total_ptr, products_ptr, members_ptr, g, SIZE, DIAGONAL, UNBIASED)
    valid_h, total_h, squares_h, norm_h = _load_groups(total_ptr, products_ptr, members_ptr, h, SIZE, DIAGONAL, UNBIASED)
    within_g = _sum_of_programs(form_ptr, g * (SIZE + 1), g < SIZE, programs, SIZE)
    within_h = _sum_of_programs(form_ptr, h * (SIZE + 1), h < SIZE, programs, SIZE)
    across = _sum_of_programs(form_ptr, offs, mask, programs, SIZE) + _sum_of_programs(form_ptr, opposite, mask, programs, SIZE)
    if OWN:
        across += tl.load(own_ptr + offs, mask=mask, other=0.0) + tl.load(own_ptr + opposite, mask=mask, other=0.0)
        if not UNBIASED:
            within_g += tl.load(own_ptr + g * (SIZE + 1), mask=g < SIZE, other=0.0)
            within_h += tl.load(own_ptr + h * (SIZE + 1), mask=h < SIZE, other=0.0)
    else:
        if not DIAGONAL:
            across += 2 * factor * tl.load(products_ptr + offs, mask=mask, other=0.0)
        if not UNBIASED:
            within_g += factor * squares_g
            within_h += factor * squares_h
    pairs = valid_g[:, None] & valid_h[None, :] & (g[:, None] != h[None, :])
    values = (within_g / norm_g)[:, None] + (within_h / norm_h)[None, :] - across / (total_g[:, None] * total_h[None, :])

    # store
    tl.store(values_ptr + offs, tl.where(pairs, values, 0.0).to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(pairs_ptr + offs, pairs, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(valid_ptr + g, valid_g, mask=g < SIZE)


@triton.jit(do_not_specialize=["stride_g", "stride_h"])
def pair_upstreams_kernel(
    upstream_ptr,  # (SIZE, SIZE)
    total_ptr,
    products_ptr,
    members_ptr,
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
    valid_g, total_g, _, norm_g = _load_groups(total_ptr, products_ptr, members_ptr, g, SIZE, DIAGONAL, UNBIASED)
    within = tl.zeros([BLOCK], dtype=tl.float64)
    # Twice, as a diagonal entry is of the sum over its row.
    for last in tl.static_range(2):
        for start in range(0, SIZE, BLOCK):
            h = start + tl.arange(0, BLOCK)
            valid_h, total_h, _, _ = _load_groups(total_ptr, products_ptr, members_ptr, h, SIZE, DIAGONAL, UNBIASED)
            pairs = valid_g[:, None] & valid_h[None, :] & (g[:, None] != h[None, :])
            both = tl.load(upstream_ptr + g[:, None] * stride_g + h[None, :] * stride_h, mask=pairs, other=0.0).to(tl.float64)
            both += tl.load(upstream_ptr + h[None, :] * stride_g + g[:, None] * stride_h, mask=pairs, other=0.0).to(tl.float64)
            if last == 0:
                within += tl.sum(both, 1)
            else:
                out = tl.where(g[:, None] == h[None, :], (within / norm_g)[:, None], -both / (total_g[:, None] * total_h[None, :]))
                mask = (g < SIZE)[:, None] & (h < SIZE)[None, :]
                tl.store(out_ptr + g[:, None] * SIZE + h[None, :], out, mask=mask)


def quadratic_form(kernel: KernelNumbers, z: Tensor, v: Tensor, precision: str) -> Tensor:
    """S of z (N, D) and v (N, C) as parts (P, C, C) that sum to it, float64."""
    if (few := few_pairs.evaluation_of_few(kernel, z, z, v.shape[1])) is not None:
        return few_pairs.quadratic_form(few, kernel, z, v)
    v = v.contiguous()
    product, (n, columns) = Product(kernel, [z], v.shape[1], precision), v.shape
    factors = product.factors(v)
    sums, rows, splits = product.sweep(factors, within=True)
    c, chunks = product.choice.columns, factors.sums.shape[1]
    # No more numbers than v has.
    programs, blocks = min(_PROGRAMS, triton.cdiv(n, max(c, ROW_BLOCK))), c // _FORM_BLOCK
    form = torch.empty((programs, columns, columns), dtype=torch.float64, device=z.device)
    launch(
        form_kernel, (product.operands.key, columns, chunks, tensor_key(v)), z.device, (programs, blocks, blocks),
        (sums, v, factors.sums, factors.poison, product.operands.plan, form, n, rows, splits, factors.poison.numel()),
        lambda: {"CHUNKS": chunks, "COLUMNS": columns, "C": c, "BLOCK_N": _FORM_BLOCK, "BLOCK_C": _FORM_BLOCK},
    )  # fmt: skip
    return form


def quadratic_form_diagonal(kernel: KernelNumbers, z: Tensor, v: Tensor, precision: str) -> Tensor:
    """The diagonal of S, (C,), float64."""
    if (few := few_pairs.evaluation_of_few(kernel, z, z, v.shape[1])) is not None:
        return (v * few_pairs.matmul(few, kernel, z, z, v, torch.float64, within=True)).sum(0)
    product, v = Product(kernel, [z], v.shape[1], precision), v.contiguous()
    return (v * product.matmul(product.factors(v), torch.float64, within=v)).sum(0)


def quadratic_form_backward(kernel: KernelNumbers, z: Tensor, v: Tensor, upstream: Tensor, precision: str) -> Tensor:
    """The gradient to z (N, D), from the upstream (C, C)."""
    upstream = upstream.double().contiguous()
    if (few := few_pairs.evaluation_of_few(kernel, z, z, v.shape[1])) is not None:
        return few_pairs.gradient(few, kernel, z, z, v, v, upstream)
    product, v = Product(kernel, [z], v.shape[1], precision), v.contiguous()
    factors = product.factors(v, v, upstream=upstream)
    (gradient, _) = product.gradients(factors, x=True, y=False, within=True)
    assert gradient is not None
    return gradient


def pair_values(
    form: Tensor, own: Tensor | float, total: Tensor, products: Tensor, members: Tensor, unbiased: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² (G, G) from the parts of S and from O, (G, G) or a multiple of P; which groups are valid, and which pairs."""
    size, diagonal, given = total.shape[0], products.ndim == 1, isinstance(own, Tensor)
    values = torch.empty((size, size), dtype=dtype, device=form.device)
    valid, pairs = (torch.empty(shape, dtype=torch.bool, device=form.device) for shape in ((size,), (size, size)))
    tensors = form, own.contiguous() if isinstance(own, Tensor) else form, total, products, members, values, valid, pairs
    factor = (0.0, 0.0, 0.0) if isinstance(own, Tensor) else float32_parts(own)
    launch(
        pair_values_kernel, (size, given, diagonal, unbiased, tensor_key(*tensors)), form.device, (*[triton.cdiv(size, _BLOCK)] * 2, 1),
        (*tensors, form.shape[0], *factor),
        lambda: {"SIZE": size, "OWN": given, "DIAGONAL": diagonal, "UNBIASED": unbiased, "BLOCK": _BLOCK},
    )  # fmt: skip
    return values, valid, pairs


def pair_upstreams(upstream: Tensor, total: Tensor, products: Tensor, members: Tensor, unbiased: bool) -> Tensor:
    """The gradient of MMD² to S, (G, G), float64, from the upstream (G, G)."""
    size, diagonal = total.shape[0], products.ndim == 1
    tensors = upstream, total, products, members, torch.empty((size, size), dtype=torch.float64, device=upstream.device)
    launch(
        pair_upstreams_kernel, (size, diagonal, unbiased, tensor_key(*tensors)), upstream.device, (triton.cdiv(size, _BLOCK), 1, 1),
        (*tensors, *upstream.stride()),
        lambda: {"SIZE": size, "DIAGONAL": diagonal, "UNBIASED": unbiased, "BLOCK": _BLOCK},
    )  # fmt: skip
    return tensors[-1]


# Programs that take the rows of a form, the rows and columns of a step, and groups of a block of pairs.
_PROGRAMS = 64
_FORM_BLOCK = 16
_BLOCK = 32
