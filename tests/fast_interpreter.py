"""Triton's interpreter without what costs most of its time: patching `triton.language` for each call of a function, and describing shapes.

Results stay the same to the bit. Only releases that this has been tried with are changed.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

TRIED = ("3.7.",)


@functools.cache
def speed_up() -> None:
    if triton.__version__.startswith(TRIED):
        _patch_once_a_launch()
        _describe_shapes_once()


class _Launch:
    """What the interpreter replaces in `tl` and `tl.core`, from a list made once; functions that a kernel calls find it done."""

    def __init__(self) -> None:
        self.changes: list[tuple[Any, str, Any, Any]] = []  # owner, name, before, after
        self.active = False

    def begin(self) -> _Launch:
        for owner, name, _, after in self.changes:
            setattr(owner, name, after)
        self.active = True
        return self

    def restore(self) -> None:
        self.active = False
        for owner, name, before, _ in reversed(self.changes):
            if before is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _patch_once_a_launch() -> None:
    patch, launch = interpreter._patch_lang, _Launch()

    def begin(function: Any) -> _Launch | None:
        if launch.active:
            return None
        if not launch.changes:
            # Of both modules, whichever of them the function names.
            both = type(begin)(begin.__code__, {"tl": tl, "core": tl.core}, closure=begin.__closure__)
            scope = patch(both)
            changes = [(owner, name, before, inspect.getattr_static(owner, name)) for owner, name, before in scope._changes]
            # Some are patched twice: as they were before the first time, and as they are after the last.
            launch.changes += {(id(owner), name): change for change in reversed(changes) for owner, name, *_ in [change]}.values()
            scope.restore()
        return launch.begin()

    interpreter._patch_lang = begin


def _describe_shapes_once() -> None:
    original, numpy_types = interpreter._get_np_dtype, {}

    def get_numpy_type(dtype: Any) -> Any:
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = original(dtype)
        return numpy_types[dtype.name]

    @functools.cache
    def of_block(*sizes: int) -> tuple[Any, int, str]:
        described = tl.block_type(tl.int8, list(sizes), described=False)
        return described.shape, described.numel, str(described.shape)

    @functools.cache
    def of_tensor(*sizes: int) -> tuple[Any, Any]:
        return tl.constexpr(math.prod(sizes)), tl.core.tuple([tl.constexpr(size) for size in sizes])

    init = tl.block_type.__init__

    def init_block_type(self: Any, element_ty: Any, shape: Any, described: bool = True) -> None:
        if not described or not isinstance(shape, (list, tl.core.tuple)):
            return init(self, element_ty, shape)
        self.element_ty = element_ty
        self.shape, self.numel, name = of_block(*(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        self.name = f"<{name}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensor(*type.shape.values) if type.is_block() else of_tensor()

    interpreter._get_np_dtype = get_numpy_type
    tl.block_type.__init__ = init_block_type
    tl.tensor.__init__ = init_tensor
