"""A model in numpy of how a tensor core rounds long sums. Triton's interpreter rounds to nearest and cannot show it.

Products of the operands are exact. The products of one step and the accumulator are aligned to the largest exponent among them, truncated
two bits after float32's last bit, added, and rounded toward zero. All else is float64, so the errors come from the operands and sums alone.

Sources: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021;
Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance",
International Journal of High Performance Computing Applications 36(4), 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Columns in a tile of most kernels on Hopper.
TILE = 64
EXTRA_BITS = 2
# Where the sum over all columns is kept, and whether each tile is summed from zero.
SUMS = {"in the accumulator": False, "in float32, of tiles from zero": True}


def multiply_add(a: Array, b: Array, acc: Array, step: int) -> Array:
    """a @ b + acc of shapes (…, N, K) and (…, K, C), `step` of the K products at a time."""
    a, b = a.astype(np.float64)[..., :, None, :], np.swapaxes(b.astype(np.float64), -1, -2)[..., None, :, :]
    for start in range(0, a.shape[-1], step):
        terms = np.concatenate([a[..., start : start + step] * b[..., start : start + step], acc[..., None].astype(np.float64)], -1)
        # The last bit of a float32 below 2ᵉ is worth 2ᵉ⁻²⁴.
        unit = np.ldexp(1.0, np.frexp(np.abs(terms).max(-1))[1] - 24 - EXTRA_BITS)[..., None]
        acc = _toward_zero(np.trunc(terms / unit).sum(-1) * unit[..., 0])
    return acc


def _toward_zero(values: Array) -> Array:
    nearest = values.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)


@dataclass(frozen=True)
class Split:
    """A float32 product as three of a narrower type, as `fastvae.kernels.products.dot` takes it.

    Attributes:
        dropped: how many bits of float32 the type lacks.
        step: products that Hopper adds at a time, 32 bytes of each operand.
    """

    dropped: int
    step: int

    def truncated(self, w: Array) -> Array:
        return (w.view(np.int32) & np.int32(-1 << self.dropped)).view(np.float32)

    def rounded(self, w: Array) -> Array:
        return self.truncated((w.view(np.int32) + np.int32(1 << self.dropped - 1)).view(np.float32))

    def sums(self, weights: Array, columns: Array, fresh: bool) -> Array:
        """weights @ columns, (…, N, M) by (…, M, C), in one accumulator, or if `fresh` each tile from zero and added in float32."""
        weights, columns = weights.astype(np.float32), columns.astype(np.float32)
        w_hi, c_hi = self.truncated(weights), self.rounded(columns)
        # Tensor cores truncate float32 operands to TF32.
        w_lo = self.truncated(weights - w_hi) if self is TF32 else self.rounded(weights - w_hi)
        c_lo = self.rounded(columns - c_hi)
        total = np.zeros((*weights.shape[:-1], columns.shape[-1]), np.float32)
        for start in range(0, weights.shape[-1], TILE):
            tile = slice(start, start + TILE)
            acc = np.zeros_like(total) if fresh else total
            for w, c in ((w_lo, c_hi), (w_hi, c_lo), (w_hi, c_hi)):
                acc = multiply_add(w[..., tile], c[..., tile, :], acc, self.step)
            total = total + acc if fresh else acc
        return total


BF16, TF32 = Split(16, 16), Split(13, 8)


def kernel(x: Array, y: Array, h: float) -> Array:
    squared = np.square(x).sum(-1)[..., :, None] + np.square(y).sum(-1)[..., None, :] - 2 * x @ np.swapaxes(y, -1, -2)
    return np.exp(np.maximum(squared, 0) / (-2 * h * h))


def mmd_gradient(columns: int, dim: int, fresh: bool, rows: int = 8) -> float:
    """Relative error of the gradient of MMD² to `rows` rows of x; both samples have `columns` points."""
    generator = np.random.default_rng(0)
    x, y = 0.9 * generator.standard_normal((columns, dim)) + 0.1, generator.standard_normal((columns, dim))
    samples = np.stack([x, y]) - (x.mean(0) + y.mean(0)) / 2
    own = samples[0, :rows]
    k = kernel(own, samples, dim**0.5)
    k[0, np.arange(rows), np.arange(rows)] = 0

    def gradient(moments: Array) -> Array:
        row_gradient = k.sum(-1)[..., None] * own - moments
        return row_gradient[0] - row_gradient[1]

    return _error(gradient(BF16.sums(k, samples, fresh).astype(np.float64)), gradient(k @ samples))


def witness(columns: int, dim: int, fresh: bool, rows: int = 16) -> float:
    """Relative error of K·v, where v is 1 for one half of the columns and −1 for the other."""
    generator = np.random.default_rng(0)
    z, points = generator.standard_normal((columns, dim)), generator.standard_normal((rows, dim))
    v = np.repeat([1.0, -1.0], columns // 2)[:, None]
    z[columns // 2 :] += 0.1
    k = kernel(points, z, dim**0.5)
    return _error(TF32.sums(k, v, fresh), k @ v)


def _error(actual: Array, exact: Array) -> float:
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def errors(sizes: tuple[int, ...] = (65_536, 262_144)) -> Iterator[dict[str, Any]]:
    """Rows of errors with sums kept in the accumulator, and with tiles summed from zero, as in the kernels."""
    for n in sizes:
        for sums, fresh in SUMS.items():
            common = {"mode": "highest", "offset": 0.0, "n": n, "sums": sums, "device": "model of a tensor core", "numpy": np.__version__}
            for dim in (16, 64):
                yield {"operation": "mmd", "d": dim, "bandwidth2": float(dim), "gradient": mmd_gradient(n, dim, fresh)} | common
            yield {"operation": "kernel_matmul", "d": 16, "bandwidth2": 16.0, "value": witness(n, 16, fresh)} | common
