"""K(x, y)·v and its gradient on a GPU: formulas (1) and (2) of `fastvae.reference.kernel_matmul`, tile by tile, without K.

A block of rows goes over all columns, as in `fastvae.kernels.mmd`. Forward keeps Σ_j k_ij·v_j; the gradient to the rows is a sweep in which
the weight of a pair, w_j there, is g_i·v_j, a product of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.config import MatmulConfig, column_splits, device_limits, difference_products, matmul_config
from fastvae.kernels.launch import on_device
from fastvae.kernels.pairs import (
    DIFFERENCES,
    POLYNOMIAL,
    Evaluation,
    Operands,
    column_exponent,
    column_parts,
    difference_exponent,
    dot,
    load_parameters,
    load_parts,
    load_table,
    parts,
    products_of,
    radial,
    row_sums,
    split,
)
from fastvae.radial import KernelSum, RationalQuadratic


@triton.jit
def matmul_kernel(
    row_hi_ptr,  # (N, D), scaled rows, in a split mode with their low parts; in DIFFERENCES mode rows as they came
    row_lo_ptr,
    row_half_ptr,  # (N,), −½‖u‖², or 0 for a polynomial
    col_hi_ptr,  # (M, D)
    col_lo_ptr,
    col_half_ptr,  # (M,), of a padded column what makes its k 0
    v_hi_ptr,  # (M, C), 0 in the padding
    v_lo_ptr,
    table_ptr,
    shift_ptr,
    scale_ptr,  # (1,), of the scaled rows
    route_ptr,
    out_ptr,  # (SPLITS, N, C), Σ_j (k − shift)·v_j
    M,  # columns with their padding
    ROUTE: tl.constexpr,
    WITHIN: tl.constexpr,  # rows and columns are the same sample, whose diagonal is left out
    MODE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # features of a step of the exponent's product
    BLOCK_C: tl.constexpr,  # columns of v of a program
):
    """A block of rows of K·v over a share of the columns of K; program 1 is the block of columns of v, program 2 the share."""
    if tl.load(route_ptr) != ROUTE:
        return
    # where
    start_n = tl.program_id(0) * BLOCK_N
    part = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + offs_c[None, :]

    # load
    row_half = tl.load(row_half_ptr + offs_n)
    row_hi_ptrs = row_hi_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_lo_ptrs = row_lo_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, MODE)
    value_shift = tl.load(shift_ptr)
    scale = tl.load(scale_ptr)
    table = load_table(table_ptr, False, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, MODE)

    # compute
    out = tl.zeros([BLOCK_N, BLOCK_C], dtype=row_half.dtype)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    first = part * share
    last = tl.minimum(first + share, M)
    for start_m in range(first, last, BLOCK_M):
        if MODE == DIFFERENCES:
            exponent = difference_exponent(row_hi_ptr, col_hi_ptr, offs_n, start_m, scale, D, BLOCK_M)
        else:
            exponent, _, _ = column_exponent(
                row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, col_hi_ptr, col_lo_ptr, col_half_ptr, start_m,
                FAMILY, MODE, D, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        value, _ = radial(exponent, table, table_ptr, parameters, value_shift, 0.0, FAMILY, False, BANDWIDTHS, SQUARINGS)
        if WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            value = tl.where(offs_n[:, None] != offs_m[None, :], value, 0.0)
        start = tl.cast(start_m, tl.int64) * C
        v_hi, v_lo = load_parts(v_hi_ptr + start + local_v, v_lo_ptr + start + local_v, MODE)
        value_hi, value_lo = split(value, MODE)
        # From zero for each tile: a tensor core's accumulator truncates.
        out += dot(value_hi, value_lo, v_hi, v_lo, tl.zeros_like(out), MODE)

    # store
    out_start = (tl.cast(part, tl.int64) * rows + start_n) * C
    tl.store(out_ptr + out_start + (tl.arange(0, BLOCK_N)[:, None] * C + offs_c[None, :]), out)


@triton.jit
def gradient_kernel(
    row_hi_ptr,  # as in `matmul_kernel`
    row_lo_ptr,
    row_half_ptr,
    col_hi_ptr,
    col_lo_ptr,
    col_half_ptr,
    g_hi_ptr,  # (N, C)
    g_lo_ptr,
    v_hi_ptr,  # (M, C), 0 in the padding
    v_lo_ptr,
    table_ptr,
    shift_ptr,
    scale_ptr,
    route_ptr,
    slope_ptr,  # (SPLITS, N), Σ_j (g_i·v_j)·(W − shift)
    moments_ptr,  # (SPLITS, N, D), Σ_j (g_i·v_j)·(W − shift)·u_j, in DIFFERENCES mode of u_j − u_i
    M,
    ROUTE: tl.constexpr,
    WITHIN: tl.constexpr,
    MODE: tl.constexpr,
    FAMILY: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    SQUARINGS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # features of a block of moments
    BLOCK_C: tl.constexpr,  # columns of v of a step of the product with g
):
    """The pull on a block of rows from a share of the columns; program 1 is the block of moments, program 2 the share."""
    if tl.load(route_ptr) != ROUTE:
        return
    # where
    start_n = tl.program_id(0) * BLOCK_N
    d_out = tl.program_id(1)
    part = tl.program_id(2)
    rows = tl.num_programs(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = d_out * BLOCK_D + tl.arange(0, BLOCK_D)
    row_start = tl.cast(start_n, tl.int64) * D
    local_n = tl.arange(0, BLOCK_N)[:, None] * D
    g_ptrs = tl.cast(start_n, tl.int64) * C + (tl.arange(0, BLOCK_N)[:, None] * C + tl.arange(0, BLOCK_C)[None, :])
    local_v = tl.arange(0, BLOCK_M)[:, None] * C + tl.arange(0, BLOCK_C)[None, :]

    # load
    row_half = tl.load(row_half_ptr + offs_n)
    row_hi_ptrs = row_hi_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_lo_ptrs = row_lo_ptr + row_start + (local_n + tl.arange(0, BLOCK_K)[None, :])
    row_hi, row_lo = load_parts(row_hi_ptrs, row_lo_ptrs, MODE)
    g_hi, g_lo = load_parts(g_hi_ptr + g_ptrs, g_lo_ptr + g_ptrs, MODE)
    value_shift = tl.load(shift_ptr)
    slope_shift = tl.load(shift_ptr + 1)
    scale = tl.load(scale_ptr)
    table = load_table(table_ptr, True, BANDWIDTHS, SQUARINGS)
    parameters = load_parameters(table_ptr, FAMILY, BANDWIDTHS, MODE)
    if MODE == DIFFERENCES:
        row_out = tl.load(row_hi_ptr + row_start + (local_n + offs_d[None, :]))

    # compute
    slope_acc = tl.zeros([BLOCK_N, 8], dtype=row_half.dtype)
    moments = tl.zeros([BLOCK_N, BLOCK_D], dtype=row_half.dtype)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(2)) * BLOCK_M
    first = part * share
    last = tl.minimum(first + share, M)
    for start_m in range(first, last, BLOCK_M):
        if MODE == DIFFERENCES:
            exponent = difference_exponent(row_hi_ptr, col_hi_ptr, offs_n, start_m, scale, D, BLOCK_M)
        else:
            exponent, col_hi, col_lo = column_exponent(
                row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, col_hi_ptr, col_lo_ptr, col_half_ptr, start_m,
                FAMILY, MODE, D, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        _, slope = radial(exponent, table, table_ptr, parameters, value_shift, slope_shift, FAMILY, True, BANDWIDTHS, SQUARINGS)
        coefficient = tl.zeros([BLOCK_N, BLOCK_M], dtype=row_half.dtype)
        start = tl.cast(start_m, tl.int64) * C
        if C == BLOCK_C:
            v_hi, v_lo = load_parts(v_hi_ptr + start + local_v, v_lo_ptr + start + local_v, MODE)
            coefficient = dot(g_hi, g_lo, tl.trans(v_hi), tl.trans(v_lo), coefficient, MODE)
        else:
            for start_c in range(0, C, BLOCK_C):
                left_hi, left_lo = load_parts(g_hi_ptr + g_ptrs + start_c, g_lo_ptr + g_ptrs + start_c, MODE)
                v_hi, v_lo = load_parts(v_hi_ptr + start + local_v + start_c, v_lo_ptr + start + local_v + start_c, MODE)
                coefficient = dot(left_hi, left_lo, tl.trans(v_hi), tl.trans(v_lo), coefficient, MODE)
        slope = slope * coefficient
        if WITHIN:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            slope = tl.where(offs_n[:, None] != offs_m[None, :], slope, 0.0)
        if MODE == DIFFERENCES:
            col = tl.load(col_hi_ptr + tl.cast(start_m, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]))
            moments += tl.sum(slope[:, :, None] * ((col[None, :, :] - row_out[:, None, :]) * scale), 1)
        else:
            if FAMILY < POLYNOMIAL:
                slope_acc += row_sums(slope)
            col_hi, col_lo = column_parts(col_hi, col_lo, col_hi_ptr, col_lo_ptr, start_m, d_out, MODE, D, BLOCK_M, BLOCK_K, BLOCK_D)
            slope_hi, slope_lo = split(slope, MODE)
            moments += dot(slope_hi, slope_lo, col_hi, col_lo, tl.zeros_like(moments), MODE)

    # store
    if d_out == 0:
        tl.store(slope_ptr + tl.cast(part, tl.int64) * rows + offs_n, tl.sum(slope_acc, 1))
    tl.store(moments_ptr + (tl.cast(part, tl.int64) * rows * D + row_start) + (local_n + offs_d[None, :]), moments)


@dataclass
class _Factor:
    """v or g, padded, as the products read it."""

    exact: Tensor  # (N, C)
    hi: Tensor
    lo: Tensor

    @staticmethod
    def of(v: Tensor, mode: int, rows: int, columns: int) -> _Factor:
        v = torch.nn.functional.pad(v, (0, columns - v.shape[1], 0, rows - v.shape[0])).contiguous()
        return _Factor(v, *parts(v, mode))


class Product:
    """Sums over the columns of K of `kernel` on `samples`."""

    def __init__(self, kernel: KernelSum, samples: Sequence[Tensor], centre: Tensor, precision: str, columns: int) -> None:
        dtype, dim = samples[0].dtype, samples[0].shape[1]
        self.evaluation = Evaluation.of(kernel, samples, centre, precision, self_pairs=True)
        self.device = device_limits(centre.device)
        self.scale = self.evaluation.scale.to(dtype)
        (self.mode,) = self.evaluation.modes
        products, powers = products_of(self.mode, dtype), isinstance(kernel.kernel, RationalQuadratic)
        bandwidths, architecture = self.evaluation.bandwidths, self.device.architecture
        self.configs = {
            gradient: matmul_config(dim, columns, products, gradient, bandwidths, architecture, powers) for gradient in (False, True)
        }
        self.difference_configs = {
            gradient: matmul_config(dim, columns, difference_products(dtype.itemsize), gradient, bandwidths, architecture)
            for gradient in (False, True)
        }
        self.features = max(config.padded(dim, config.block_k, config.block_d) for config in self._all())
        self.columns = max(config.padded(columns, config.block_c) for config in self._all())

    def _all(self) -> list[MatmulConfig]:
        return [*self.configs.values(), *self.difference_configs.values()]

    def points(self, z: Tensor) -> Operands:
        (operands,) = Operands.of(z, self.evaluation, [self.mode], self._rows(z), self.features)
        return operands

    def factor(self, v: Tensor) -> _Factor:
        return _Factor.of(v, self.mode, self._rows(v), self.columns)

    def _rows(self, z: Tensor) -> int:
        return z.shape[0] + -z.shape[0] % max(max(config.block_n, config.block_m) for config in self._all())

    def matmul(self, a: Operands, b: Operands, v: _Factor, within: bool = False) -> Tensor:
        """Σ_j (k(a_i, b_j) − shift)·v_j, padded, of which (i, i) are left out if `within`."""
        (n, d), m = a.points.shape, b.points.shape[0]
        config = self.configs[False]
        blocks = (n // config.block_n, self.columns // config.block_c)
        splits = column_splits(blocks[0] * blocks[1], m // config.block_m, self.device.multiprocessors)
        out = a.points.new_empty(splits, n, self.columns)
        for number, config in self._passes(False):
            rows, columns, factor = self._operands(number, a, b, v)
            matmul_kernel[(n // config.block_n, self.columns // config.block_c, splits)](
                *rows, *columns, *factor, *self._plan(), out, m, ROUTE=number, WITHIN=within, D=d, C=self.columns,
                **self._constants(number), **config.launch(moments=False),
            )  # fmt: skip
        return out.sum(0) * self._unit(self.evaluation.value_unit)

    def pull(self, a: Operands, b: Operands, g: _Factor, v: _Factor, within: bool = False) -> Tensor:
        """The pull of b on a with g_i·v_j in place of w_j, (N, D)."""
        (n, d), m = a.points.shape, b.points.shape[0]
        config = self.configs[True]
        blocks = (n // config.block_n, d // config.block_d)
        splits = column_splits(blocks[0] * blocks[1], m // config.block_m, self.device.multiprocessors)
        slope, moments = a.points.new_empty(splits, n), a.points.new_empty(splits, n, d)
        for number, config in self._passes(True):
            rows, columns, factor = self._operands(number, a, b, v)
            upstream = (g.exact, g.exact) if number else (g.hi, g.lo)
            gradient_kernel[(n // config.block_n, d // config.block_d, splits)](
                *rows, *columns, *upstream, *factor, *self._plan(), slope, moments, m, ROUTE=number, WITHIN=within, D=d, C=self.columns,
                **self._constants(number), **config.launch(moments=True),
            )  # fmt: skip
        return self.evaluation.pull(moments.sum(0), slope.sum(0), [a])

    def _passes(self, gradient: bool) -> list[tuple[int, MatmulConfig]]:
        passes = [(0, self.configs[gradient])]
        return passes if self.evaluation.by_differences is None else [*passes, (1, self.difference_configs[gradient])]

    @staticmethod
    def _operands(number: int, a: Operands, b: Operands, v: _Factor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        if number:
            return (a.points, a.points, a.half), (b.points, b.points, b.half), (v.exact, v.exact)
        return (a.hi, a.lo, a.half), (b.hi, b.lo, b.half), (v.hi, v.lo)

    def _plan(self) -> tuple[Tensor, ...]:
        return self.evaluation.table, self.evaluation.shifts, self.scale, self.evaluation.route

    def _constants(self, number: int) -> dict[str, int]:
        return self.evaluation.constants | {"MODE": DIFFERENCES.value if number else self.mode}

    def _unit(self, unit: Tensor | float) -> Tensor | float:
        return unit.to(self.scale.dtype) if isinstance(unit, Tensor) else unit


@on_device
def kernel_matmul(kernel: KernelSum, x: Tensor, y: Tensor, v: Tensor, centre: Tensor, precision: str) -> Tensor:
    """Σ_j k(x_i, y_j)·v_j, shape (N, C), of x (N, D), y (M, D) and v (M, C)."""
    product = Product(kernel, [x, y], centre, precision, v.shape[1])
    out = product.matmul(product.points(x), product.points(y), product.factor(v))[: x.shape[0], : v.shape[1]]
    return (out + product.evaluation.constant * v.sum(0)).contiguous()


@on_device
def kernel_matmul_backward(
    kernel: KernelSum,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    grad: Tensor,
    centre: Tensor,
    x_grad: bool,
    y_grad: bool,
    v_grad: bool,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The pulls of `fastvae.radial.Sweep` on x and y with w_j·W_ij replaced by (grad_i·v_j)·W_ij, and Kᵀ·grad; those wanted."""
    product = Product(kernel, [x, y], centre, precision, v.shape[1])
    a, b, g, f = product.points(x), product.points(y), product.factor(grad), product.factor(v)
    out = None
    if v_grad:
        out = product.matmul(b, a, g)[: y.shape[0], : v.shape[1]]
        out = (out + product.evaluation.constant * grad.sum(0)).contiguous()
    return product.pull(a, b, g, f) if x_grad else None, product.pull(b, a, f, g) if y_grad else None, out
