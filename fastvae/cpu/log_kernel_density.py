"""Logarithms of sums of a kernel, and sums normalised by them, tile by tile: (1) to (3) of `fastvae.reference.log_kernel_density`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.cpu.kernel_matmul import product
from fastvae.cpu.tiles import LEAST_EXPONENT, TiledSample, Tiles
from fastvae.kernel_sums import KernelSum


class Streaming:
    """Sums of one bandwidth's k over the rows of x (N, D) and y (M, D), in the dtype of the tiles.

    Biases and logarithms are to base 2. `transposed` exchanges x and y, also for the result.
    """

    def __init__(self, kernel: KernelSum, x: Tensor, y: Tensor, centre: Tensor) -> None:
        self.tiles, self.x, self.y = Tiles(kernel, [x, y], centre), x, y

    def log2_sums(self, bias: Tensor | None, transposed: bool = False) -> Tensor:
        """log₂ Σ_j k(x_i, y_j)·2^−bias_j, shape (N,)."""
        tiles = self.tiles
        a, b = (tiles.prepare(z, None, False) for z in ((self.y, self.x) if transposed else (self.x, self.y)))
        bias = None if bias is None else bias.to(tiles.dtype)
        # A finite number, from which −∞ can be subtracted.
        least = torch.finfo(tiles.dtype).min
        highest = tiles.centre.new_full((len(a),), least, dtype=tiles.dtype)
        sums = torch.zeros_like(highest)
        for i in a.tiles:
            for j in b.tiles:
                value, _ = tiles.logarithms(a, i, b, j, slope=False)
                if bias is not None:
                    value.sub_(bias[j])
                higher = torch.maximum(highest[i], value.amax(1))
                value.sub_(higher[:, None]).clamp_(min=LEAST_EXPONENT[tiles.dtype]).exp2_()
                sums[i] = (highest[i] - higher).exp2_().mul_(sums[i]).add_(value.sum(1))
                highest[i] = higher
        return torch.where(highest == least, -torch.inf, sums.log2_().add_(highest))

    def matmul(self, v: Tensor, row: Tensor, column: Tensor, transposed: bool = False) -> Tensor:
        """Σ_j k(x_i, y_j)·2^(−row_i − column_j)·v_j, shape (N, C); `row` is that of x also if transposed."""
        a, b = self._prepare(row, column, False, False)
        return product(self.tiles, *((b, a) if transposed else (a, b)), v)

    def gradients(
        self, v: Tensor, grad: Tensor, row: Tensor, column: Tensor, x_grad: bool, y_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of Σ_ij 2^(−row_i − column_j)·(grad_i·v_j)·k(x_i, y_j) to x and y that are wanted, with constant biases."""
        tiles = self.tiles
        a, b = self._prepare(row, column, x_grad, y_grad)
        grad, v_t = grad.to(tiles.dtype), v.T.to(tiles.dtype).contiguous()
        for i in a.tiles:
            for j in b.tiles:
                _, slope = tiles.sums(a, i, b, j, slope=True)
                slope.mul_(tiles.product("coefficient", grad[i], v_t[:, j]))
                tiles.add_moments(slope, a, i, b, j, 1.0)
        # −2γ in two factors, as γ itself may be out of the range of float32.
        root = tiles.host_sum.gamma**0.5
        x, y = (None if z.moments is None else (tiles.row_gradient(z) * root).mul_(-2 * root) for z in (a, b))
        return x, y

    def _prepare(self, row: Tensor, column: Tensor, x_grad: bool, y_grad: bool) -> tuple[TiledSample, TiledSample]:
        tiles = self.tiles
        a, b = (tiles.prepare(z, z.new_ones(len(z)), wanted) for z, wanted in ((self.x, x_grad), (self.y, y_grad)))
        a.bias, b.bias = row.to(tiles.dtype), column.to(tiles.dtype)
        return a, b
