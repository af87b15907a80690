"""Matrix products of float32 by oneDNN, where they are faster than those of torch.mm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

# The product that PyTorch's compiler uses for linear layers. For tiles of 512² it is 1.4 to 2.3 times as fast as MKL's on an AMD EPYC 9005,
# with 4 to 786 features.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
# Each shape is compiled, in half a millisecond, and kept, in almost a MiB, so that shapes must be few. A call takes ten microseconds more
# than MKL's, which pays only from so many pairs and so many multiply-adds on.
LINEAR_MULTIPLE = 64
_LEAST_PAIRS = 1 << 17
_LEAST_MULTIPLY_ADDS = 600_000

Product = Callable[..., Any]


def onednn_product(dtype: torch.dtype) -> Product | None:
    """The product for numbers of `dtype`; None where it is missing or switched off."""
    return _LINEAR if dtype == torch.float32 and torch._C._get_mkldnn_enabled() else None


def is_faster_by_onednn(pairs: Sequence[int], features: int) -> bool:
    """Whether this holds for a product that has an array of `pairs` as its result or as a factor."""
    rows, columns = pairs
    few_shapes = rows % LINEAR_MULTIPLE == columns % LINEAR_MULTIPLE == 0
    return few_shapes and rows * columns >= _LEAST_PAIRS and rows * columns * features >= _LEAST_MULTIPLY_ADDS


def multiply(product: Product, left: Tensor, right: Tensor) -> Tensor:
    """left @ right."""
    # With a weight that is contiguous in neither order the product takes a thousand times as long.
    weight = right.T if right.is_contiguous() or right.T.is_contiguous() else right.T.contiguous()
    return cast(Tensor, product(left, weight, None, "none", [], ""))
