"""Launches that find their compiled kernel by a key of the caller's, without a look at every argument.

Triton's own launcher binds, classifies and hashes each argument and compares every global constant of a kernel, at each call: for a small
sample that takes longer than all else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

_compiled: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}
# A parameter that changes at each step makes new keys for old kernels.
_MOST = 4096
# CUDA takes so many programs along the second and the third dimension of a grid, and 2³¹ − 1 along the first.
_MOST_PROGRAMS = 65_535
# Neither 1 nor multiples of 16.
_PLAIN_INTEGER, _PLAIN_LONG = 17, (1 << 40) + 17


def launch(
    fn: Any, key: Hashable, device: torch.device, grid: tuple[int, int, int], args: Sequence[Any], constants: Callable[[], dict[str, Any]]
) -> None:
    """fn[grid](*args, **constants()) on `device`, compiled once for each `key`.

    Args:
        key: distinguishes all that Triton compiles apart on one device: the constants, the types of the arguments, which pointers are
            multiples of 16 bytes, and the `integer_key` of integers that `fn` specialises on. Integers in tuples are not specialised.
        args: the arguments before the constexprs in the signature of `fn`. A NamedTuple may hold tensors, integers and floats.
        constants: the constexprs and the compiler's options, by name. Called only when the kernel is not compiled yet.
    """
    if grid[1] > _MOST_PROGRAMS or grid[2] > _MOST_PROGRAMS:
        size = max(grid[1:])
        raise ValueError(
            f"{fn.fn.__name__} must have at most {_MOST_PROGRAMS} blocks of rows, features, columns or problems, got {size}: pass fewer"
        )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(fn, key, device, grid, args, constants)
        return
    # Not `fn` itself, whose hash is that of its source.
    key = fn.fn, device, key
    known = _compiled.get(key)
    if known is not None:
        kernel, rest = known
        kernel[grid](*args, *rest)
        return
    named = constants()
    rest = tuple(named[name] for name in fn.arg_names[len(args) :])
    if isinstance(fn, JITFunction):
        kernel = fn.warmup(*map(_without_specialisation, args), grid=grid, **named)
        kernel[grid](*args, *rest)
    else:
        kernel = fn[grid](*args, **named)
    # Not the interpreter's; on an AMD GPU Triton compiles large tensors apart too.
    if isinstance(kernel, CompiledKernel) and torch.version.hip is None:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = kernel, rest


def _without_specialisation(arg: Any) -> Any:
    """The argument to compile with. Triton specialises every integer in a tuple, whatever `do_not_specialize` says: 1 and multiples of 16
    would be compiled apart. An integer that is neither stands for all of its type."""
    if not isinstance(arg, tuple):
        return arg
    values = [
        (_PLAIN_INTEGER if -(1 << 31) <= value < 1 << 31 else _PLAIN_LONG) if type(value) is int else _without_specialisation(value)
        for value in arg
    ]
    return type(arg)(*values) if hasattr(arg, "_fields") else tuple(values)


def tensor_key(*tensors: Tensor) -> Hashable:
    """What Triton compiles apart of tensors."""
    return tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)


def integer_key(*numbers: int) -> Hashable:
    """What Triton compiles apart of integers."""
    return tuple((n == 1, n % 16 == 0, n >= 1 << 31) for n in numbers)
