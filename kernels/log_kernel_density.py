"""Logarithms of sums of a kernel on a GPU, and sums normalised by them: formulas (1) to (3) of `fastvae.reference.log_kernel_density`.

Rows are prepared and products taken as in `fastvae.kernels.kernel_matmul`, with a bias of each row and each column in the exponent. A
program of `log_sum_kernel` sums powers of two relative to the highest exponent that it has met in each row.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import KernelNumbers
from fastvae.kernels.config import column_splits, device_limits
from fastvae.kernels.kernel_matmul import Product
from fastvae.kernels.launch import launch
from fastvae.kernels.plan import PRECISION_PASS, SCALE
from fastvae.kernels.prepare import Operands, as_product, from_row
from fastvae.kernels.products import load_block, tile_exponent
from fastvae.kernels.reductions import share_of
from fastvae.kernels.sums import evaluate_log2, load_parameters

# Finite, so that −∞ can be subtracted.
_LOWEST, _LOWEST_DOUBLE = (tl.constexpr(torch.finfo(dtype).min) for dtype in (torch.float32, torch.float64))


@triton.jit(do_not_specialize=["first_row", "first_column", "columns"])
def log_sum_kernel(
    operands: Operands,
    bias_ptr,  # (rows,), to base 2, +∞ in the padding
    plan_ptr,
    table_ptr,
    out_ptr,  # (splits, N), log₂ Σ_j k·2^−bias_j
    first_row,  # of the operands
    first_column,
    columns,  # with their padding
    SPEC: tl.constexpr,  # `fastvae.kernels.kernel_matmul.MatmulSpec`
):
    """log₂ of the sums of a block of rows over a share of the columns; program 1 is the share."""
    if tl.load(plan_ptr + PRECISION_PASS) != SPEC.PRECISION_PASS:
        return
    # where
    FAMILY: tl.constexpr = SPEC.FAMILY
    BLOCK_N: tl.constexpr = SPEC.BLOCK_N
    BLOCK_M: tl.constexpr = SPEC.BLOCK_M
    operands = as_product(operands, SPEC.PRODUCT)
    first_row, first_column = tl.multiple_of(first_row, BLOCK_N), tl.multiple_of(first_column, BLOCK_M)
    x, y = from_row(operands, tl.cast(first_row, tl.int64), SPEC.D), from_row(operands, tl.cast(first_column, tl.int64), SPEC.D)
    start_n = tl.program_id(0) * BLOCK_N
    share = tl.program_id(1)

    # load
    rows = load_block(x, start_n, SPEC.PRODUCT, SPEC.D, BLOCK_N, SPEC.BLOCK_K)
    dtype: tl.constexpr = rows.neg_half_norm2.dtype
    scale = tl.load(plan_ptr + SCALE).to(dtype)
    parameters = load_parameters(table_ptr, FAMILY, SPEC.BANDWIDTHS, SPEC.PRODUCT)

    # compute
    lowest: tl.constexpr = _LOWEST_DOUBLE if dtype == tl.float64 else _LOWEST
    highest = tl.full([BLOCK_N], lowest, dtype=dtype)
    sums = tl.zeros([BLOCK_N], dtype=dtype)
    first, last = share_of(columns, share, tl.num_programs(1), BLOCK_M)
    for start_m in range(first, last, BLOCK_M):
        exponent, _, _ = tile_exponent(rows, y, start_m, scale, FAMILY, SPEC.PRODUCT, SPEC.D, BLOCK_M, SPEC.BLOCK_K)
        value, _ = evaluate_log2(exponent, parameters, FAMILY)
        value -= tl.load(bias_ptr + first_column + start_m + tl.arange(0, BLOCK_M))[None, :]
        higher = tl.maximum(highest, tl.max(value, 1))
        # A maximum may hide a nan, which the difference then shows.
        sums = sums * tl.exp2(highest - higher) + tl.sum(tl.exp2(value - higher[:, None]), 1)
        highest = higher

    # store
    padded_n = tl.num_programs(0) * BLOCK_N
    tl.store(out_ptr + tl.cast(share, tl.int64) * padded_n + start_n + tl.arange(0, BLOCK_N), tl.log2(sums) + highest)


class Sweeps:
    """As `fastvae.cpu.log_kernel_density.Streaming`, for one bandwidth of weight 1."""

    def __init__(self, kernel: KernelNumbers, x: Tensor, y: Tensor, precision: str) -> None:
        self.x, self.y = x, y
        self._product = functools.cache(lambda columns: Product(kernel, [x, y], columns, precision, biased=True))

    def log2_sums(self, bias: Tensor | None, transposed: bool = False) -> Tensor:
        product = self._product(1)
        biases = product.biases(*((bias, None) if transposed else (None, bias)))
        parts = ((0, product.first_y), (product.first_y, product.rows - product.first_y))
        (first_row, n), (first_column, m) = parts[::-1] if transposed else parts
        configs, (plan, table, _) = product.choice.configs[False], product.prepared.tables
        splits = column_splits(n // configs[0].block_n, m // configs[0].block_m, device_limits(product.device).multiprocessors)
        out = torch.empty((splits, n), dtype=product.dtype, device=product.device)
        for number, config in enumerate(configs):
            launch(
                log_sum_kernel, (product.prepared.key, number), product.device, (n // config.block_n, splits, 1),
                (product.prepared.operands, biases, plan, table, out, first_row, first_column, m),
                functools.partial(product.sweep_constants, number, config, False, gradient=False, biased=True),
            )  # fmt: skip
        out = out[:, : product.sizes[1] if transposed else product.sizes[0]]
        if splits == 1:
            return out[0]
        highest = out.amax(0).clamp_(min=torch.finfo(out.dtype).min)
        return (out - highest).exp2_().sum(0).log2_().add_(highest)

    def matmul(self, v: Tensor, row: Tensor, column: Tensor, transposed: bool = False) -> Tensor:
        product = self._product(v.shape[1])
        return product.matmul(product.factors(v), product.dtype, transposed=transposed, biases=product.biases(row, column))

    def gradients(
        self, v: Tensor, grad: Tensor, row: Tensor, column: Tensor, x_grad: bool, y_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        product = self._product(v.shape[1])
        grads = product.gradients(product.factors(grad, v), x=x_grad, y=y_grad, biases=product.biases(row, column))
        return grads[0], grads[1]
