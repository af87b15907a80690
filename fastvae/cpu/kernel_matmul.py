"""K(x, y)·v and its gradients, tile by tile. Formulas (1) and (2) of `fastvae.reference.kernel_matmul`."""

from __future__ import annotations

from torch import Tensor

from fastvae.cpu.tiles import TiledSample, Tiles
from fastvae.kernel_sums import KernelSum


def kernel_matmul(kernel: KernelSum, x: Tensor, y: Tensor, v: Tensor, centre: Tensor) -> Tensor:
    """Σ_j k(x_i, y_j)·v_j, shape (N, C), for x (N, D), y (M, D) and v (M, C), in the dtype of the tiles.

    k lacks the constant that `kernel` subtracts.
    """
    tiles = Tiles(kernel, [x, y], centre)
    return product(tiles, tiles.prepare(x, None, False), tiles.prepare(y, None, False), v)


def product(tiles: Tiles, a: TiledSample, b: TiledSample, v: Tensor) -> Tensor:
    """Σ_j k(a_i, b_j)·v_j, (N, C), of two prepared samples and v (M, C)."""
    v_t = v.T.to(tiles.dtype).contiguous()
    out = v_t.new_zeros(v.shape[1], len(a))
    for i in a.tiles:
        for j in b.tiles:
            k, _ = tiles.sums(a, i, b, j, slope=False)
            tiles.add_product(out[:, i], v_t[:, j], k.T, 1.0)
    return out.T


def kernel_matmul_backward(
    kernel: KernelSum, x: Tensor, y: Tensor, v: Tensor, grad: Tensor, centre: Tensor, x_grad: bool, y_grad: bool, v_grad: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The row gradients of x and y, as `Tiles.row_gradient` with (grad_i·v_j)·W_ij for w_j·W_ij, and Kᵀ·grad; None if not wanted."""
    tiles = Tiles(kernel, [x, y], centre)
    a, b = (tiles.prepare(z, z.new_ones(z.shape[0]), wanted) for z, wanted in ((x, x_grad), (y, y_grad)))
    v, grad = v.to(tiles.dtype), grad.to(tiles.dtype)
    v_t, grad_t = v.T.contiguous(), grad.T.contiguous()
    out = v_t.new_zeros(v_t.shape) if v_grad else None
    for i in a.tiles:
        for j in b.tiles:
            k, slope = tiles.sums(a, i, b, j, slope=x_grad or y_grad)
            if out is not None:
                tiles.add_product(out[:, j], grad_t[:, i], k, 1.0)
            if x_grad or y_grad:
                slope.mul_(tiles.product("coefficient", grad[i], v_t[:, j]))
                tiles.add_moments(slope, a, i, b, j, 1.0)
    return (
        tiles.row_gradient(a) if x_grad else None,
        tiles.row_gradient(b) if y_grad else None,
        None if out is None else out.T.to(x.dtype).contiguous(),
    )
