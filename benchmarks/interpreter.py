"""TF32 products in Triton's interpreter, which otherwise takes them in float32."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@functools.cache
def emulate_tf32() -> None:
    """Makes TF32 products drop the last 13 bits of float32 operands, as tensor cores do."""
    exact = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *options: Any) -> Any:
        if input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(_truncated(t.data), t.dtype) for t in (a, b))
        return exact(self, a, b, d, input_precision, *options)

    InterpreterBuilder.create_dot = create_dot


def _truncated(values: np.ndarray) -> np.ndarray:
    return (values.view(np.int32) & ~0x1FFF).view(np.float32) if values.dtype == np.float32 else values
