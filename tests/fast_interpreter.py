"""Triton's interpreter without what costs most of its time: patching `triton.language` for each call of a function, and describing types.

Results stay the same to the bit. Only releases that this has been tried with are changed.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

TRIED = ("3.7.",)


@functools.cache
def speed_up() -> None:
    if triton.__version__.startswith(TRIED):
        _patch_once_a_launch()
        _call_directly()
        _describe_types_once()
        _check_operands_once()


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


def _call_directly() -> None:
    """A builtin without the wrapper that only asks for the semantics, which the interpreter gives."""
    wrapper, patch = tl.load.__code__, interpreter._patch_attr

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is not wrapper:
            return patch(owner, name, member, builder, scope)
        function = member.__wrapped__

        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **options)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attribute

    floats, bits = [tl.float16, tl.bfloat16, tl.float32], (8, 16, 32)
    narrow = [tl.int1, *floats, *(tl.core.get_int_dtype(n, signed) for n in bits for signed in (True, False))]
    most = {dtype.name: interpreter._get_np_dtype(dtype).itemsize for dtype in narrow}
    check = interpreter.TensorHandle.__post_init__

    def init_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if data.itemsize > most.get(dtype.name, 8):
            check(self)

    interpreter.TensorHandle.__init__ = init_handle


def _describe_types_once() -> None:
    original, numpy_types = interpreter._get_np_dtype, {}

    def get_numpy_type(dtype: Any) -> Any:
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = original(dtype)
        return numpy_types[dtype.name]

    @functools.cache
    def of_block(*sizes: int) -> tuple[Any, ...]:
        described = tl.block_type(tl.int8, list(sizes), described=False)
        of_tensor = tl.constexpr(math.prod(sizes)), tl.core.tuple([tl.constexpr(size) for size in sizes])
        return described.shape, described.numel, str(described.shape), sizes, of_tensor

    init, unwrap, equal = tl.block_type.__init__, tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    of_scalar = tl.constexpr(1), tl.core.tuple([])

    def init_block_type(self: Any, element_ty: Any, shape: Any, described: bool = True) -> None:
        if not described or not isinstance(shape, (list, tl.core.tuple)):
            return init(self, element_ty, shape)
        self.element_ty = element_ty
        sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
        self.shape, self.numel, name, self.sizes, self.of_tensor = of_block(*sizes)
        self.name = f"<{name}, {element_ty}>"

    others: dict[tuple[str, Any], Any] = {}

    def with_element_type(self: Any, element_ty: Any) -> Any:
        key = element_ty.name, self.sizes
        if key not in others:
            others[key] = tl.block_type(element_ty, self.shape)
        return others[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type = handle, type
        if type.__class__ is tl.block_type:
            self.dtype = type.element_ty
            self.numel, self.shape = type.of_tensor
        else:
            self.dtype = type
            self.numel, self.shape = of_scalar

    plain = {int, float, bool, str, type(None), tl.tensor}

    def unwrapped(o: Any) -> Any:
        kind = o.__class__
        return o.value if kind is tl.constexpr else o if kind in plain else unwrap(o)

    def equal_types(self: Any, other: Any) -> bool:
        return self is other or (self.name == other.name if other.__class__ is tl.dtype else equal(self, other))

    to_ir = {kind: kind.to_ir for kind in (tl.block_type, tl.pointer_type)}
    for kind, convert in to_ir.items():
        # The interpreter would make the same type again.
        kind.to_ir = lambda self, builder, convert=convert: self if builder is interpreter.interpreter_builder else convert(self, builder)
    interpreter._get_np_dtype = get_numpy_type
    tl.block_type.__init__ = init_block_type
    tl.block_type.with_element_ty = with_element_type
    tl.tensor.__init__ = init_tensor
    tl.core._unwrap_if_constexpr = unwrapped
    tl.dtype.__eq__ = equal_types


def _check_operands_once() -> None:
    """What `TritonSemantic` makes of the types and shapes of two operands, without asking each pair of types again."""
    semantic, handle = interpreter.interpreter_semantic, interpreter.TensorHandle
    check, broadcast, cast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value, TritonSemantic.cast
    constant, sanitize = TritonSemantic.scalar_constant, TritonSemantic.binary_op_sanitize_overflow_impl
    # Two operands of one of the first need no conversion in any operation, and a number takes the type of one of the second.
    plain = {dtype.name for dtype in (tl.int1, tl.int32, tl.uint32, tl.int64, tl.uint64, tl.float32, tl.float64)}
    numbers = {tl.float32.name: (int, float), tl.float64.name: (int, float), tl.int32.name: (int,), tl.int64.name: (int,)}

    @functools.cache
    def common(a: str, b: str, division: bool) -> Any:
        return semantic.computation_type_impl(tl.dtype(a), False, tl.dtype(b), False, division)

    @functools.lru_cache(4096)
    def of_number(value: float, dtype: str, sizes: tuple[int, ...] | None) -> Any:
        one = constant(semantic, value, tl.dtype(dtype)).handle.data
        return one if sizes is None else np.full(sizes, one, dtype=one.dtype)

    broadcast_sizes = functools.cache(np.broadcast_shapes)

    def number(value: Any, like: Any) -> Any:
        sizes = getattr(like.type, "sizes", None)
        return tl.tensor(handle(of_number(value, like.dtype.name, sizes), like.dtype), like.type)

    def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
        if value.__class__ not in (int, float) or dtype.name not in numbers:
            return constant(self, value, dtype)
        return tl.tensor(handle(of_number(value, dtype.name, None), dtype), dtype)

    def check_operands(
        self: Any, lhs: Any, rhs: Any, lhs_ptr: bool = False, rhs_ptr: bool = False, arithmetic: bool = True, divides: bool = False
    ) -> Any:
        a, b = lhs.__class__ is tl.tensor, rhs.__class__ is tl.tensor
        if a and b and lhs.dtype.name in plain and rhs.dtype.name in plain:
            if lhs.dtype.name != rhs.dtype.name and arithmetic:
                dtype = common(lhs.dtype.name, rhs.dtype.name, divides)
                lhs, rhs = self.cast(lhs, dtype), self.cast(rhs, dtype)
            return self.broadcast_impl_value(lhs, rhs)
        if arithmetic and a and rhs.__class__ in numbers.get(lhs.dtype.name, ()) and abs(rhs) < 2**31:
            return lhs, number(rhs, lhs)
        if arithmetic and b and lhs.__class__ in numbers.get(rhs.dtype.name, ()) and abs(lhs) < 2**31:
            return number(lhs, rhs), rhs
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic, divides)

    def broadcast_operands(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = getattr(lhs.type, "sizes", None), getattr(rhs.type, "sizes", None)
        if a == b:
            return lhs, rhs
        if a is None or b is None or len(a) != len(b):
            return broadcast(self, lhs, rhs)
        sizes = broadcast_sizes(a, b)
        return tuple(t if own == sizes else broadcast_to(t, sizes) for t, own in ((lhs, a), (rhs, b)))

    def broadcast_to(t: Any, sizes: tuple[int, ...]) -> Any:
        return tl.tensor(handle(np.broadcast_to(t.handle.data, sizes), t.dtype), tl.block_type(t.dtype, list(sizes)))

    def cast_tensor(self: Any, input: Any, dst_ty: Any, *options: Any, **named: Any) -> Any:
        unchanged = input.dtype is dst_ty or (input.dtype.name == dst_ty.scalar.name and input.dtype.name in plain)
        return input if unchanged else cast(self, input, dst_ty, *options, **named)

    def sanitize_overflow(self: Any, *args: Any) -> None:
        # An assertion, which the interpreter computes and then leaves out.
        if self.builder.options.debug:
            sanitize(self, *args)

    TritonSemantic.binary_op_type_checking_impl = check_operands
    TritonSemantic.broadcast_impl_value = broadcast_operands
    TritonSemantic.cast = cast_tensor
    TritonSemantic.scalar_constant = scalar_constant
    TritonSemantic.binary_op_sanitize_overflow_impl = sanitize_overflow
