"""Arrays in any memory format as rows of features, without a copy."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Sizes = tuple[int, ...]
_IN_ORDER = tuple(range(64))


class Rows(NamedTuple):
    """An array as (B, R, D) with contiguous features, for a kernel: the tensor, of any shape, and two strides, 0 for a size of 1."""

    tensor: Tensor
    stride_b: int
    stride_r: int

    @staticmethod
    def of(view: Tensor) -> Rows:
        """Of a tensor (B, R, D)."""
        (b, r, _), (stride_b, stride_r, _) = view.shape, view.stride()
        return Rows(view, stride_b if b > 1 else 0, stride_r if r > 1 else 0)


class Layout(NamedTuple):
    """How arrays of one shape are seen as (B, R, D), dimensions in the order of memory, and how sums over some dimensions are.

    For a batch of images with a sum for each this is (1, B, C·H·W), or (B, H·W, C) in the channels_last format.
    """

    shape: Sizes
    strides: Sizes  # of a dense array in this order
    order: Sizes  # the dimensions in the order of memory
    sizes: tuple[int, int, int]
    sums_shape: Sizes
    sums_strides: Sizes
    sums_order: Sizes
    sums_sizes: tuple[int, int, int]  # 1 for R, D or both, if they are summed over
    late_dims: Sizes  # dimensions to sum over afterwards: their place in memory is neither R nor D
    views: bool  # whether arrays with the given strides are (B, R, D) without a copy, as dense ones are

    @staticmethod
    def of(shape: Sizes, strides: Sequence[Sizes], dims: Sequence[int]) -> Layout:
        """The layout of arrays with these strides and their sums over `dims`. The first strides give the order."""
        if torch.compiler.is_compiling() or any(type(size) is not int for size in shape):
            return _layout(shape, tuple(strides), tuple(dims))  # a compiler's symbols cannot be hashed
        return _cached_layout(shape, tuple(strides), tuple(dims))

    def view(self, t: Tensor) -> Tensor:
        """t as (B, R, D)."""
        return t.reshape(self.sizes) if self.order == _IN_ORDER[: len(self.order)] else t.permute(self.order).reshape(self.sizes)

    def view_sums(self, t: Tensor) -> Tensor:
        """Sums as (B, R, D), where a dimension summed over has size 1."""
        if self.late_dims:
            for dim in self.late_dims:
                t = t.unsqueeze(dim)
            return self.view(t.expand(self.shape))
        in_order = self.sums_order == _IN_ORDER[: len(self.sums_order)]
        return (t if in_order else t.permute(self.sums_order)).reshape(self.sums_sizes)

    def rows_of_sums(self, t: Tensor) -> Rows:
        """Dense sums over no dimension, or over some that are summed later, for a kernel."""
        return Rows(t, self.sizes[1] * self.sizes[2] if self.sizes[0] > 1 else 0, self.sizes[2] if self.sizes[1] > 1 else 0)


def _layout(shape: Sizes, strides: tuple[Sizes, ...], dims: Sizes) -> Layout:
    order: Sequence[int] = range(len(shape))
    if all(stride != 0 or size == 1 for size, stride in zip(shape, strides[0], strict=True)):
        order = sorted(order, key=lambda dim: -strides[0][dim])
    groups = _groups(shape, strides, order, dims)
    late = len(groups) > 3 or (len(groups) == 3 and groups[0][1])
    if late:
        groups = _groups(shape, strides, order, ())
    views = len(groups) <= 3
    sizes = [size for size, _ in groups] if views else [_product(shape)]
    sums = [summed for _, summed in groups] if views else [False]
    sizes, sums = [1] * (3 - len(sizes)) + sizes, [sums[0] if sums else False] * (3 - len(sums)) + sums
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    kept_order = [dim for dim in order if dim not in dims]
    return Layout(
        shape,
        _dense_strides(shape, order),
        tuple(order),
        (sizes[0], sizes[1], sizes[2]),
        tuple(shape[dim] for dim in kept),
        tuple(stride for dim, stride in enumerate(_dense_strides(shape, kept_order)) if dim in kept),
        tuple(kept.index(dim) for dim in kept_order),
        (sizes[0], 1 if sums[1] else sizes[1], 1 if sums[2] else sizes[2]),
        dims if late else (),
        views,
    )


_cached_layout = functools.lru_cache(maxsize=256)(_layout)


def _groups(shape: Sizes, strides: tuple[Sizes, ...], order: Iterable[int], dims: Sizes) -> list[tuple[int, bool]]:
    """The sizes of neighbours in memory that are one dimension in each array, and whether they are summed over."""
    groups: list[tuple[int, bool]] = []
    inner: list[int] = []
    for dim in order:
        size, summed = shape[dim], dim in dims
        if size == 1:
            continue
        own = [array[dim] for array in strides]
        if groups and groups[-1][1] == summed and all(outer == size * stride for outer, stride in zip(inner, own, strict=True)):
            groups[-1] = groups[-1][0] * size, summed
        else:
            groups.append((size, summed))
        inner = own
    if inner and inner[0] != 1:
        groups.append((1, False))  # features are contiguous
    return groups


def _dense_strides(shape: Sizes, order: Iterable[int]) -> Sizes:
    """The strides of an array without gaps with its dimensions in this order in memory; 0 for other dimensions."""
    strides, size = [0] * len(shape), 1
    for dim in reversed(list(order)):
        strides[dim], size = size, size * shape[dim]
    return tuple(strides)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
