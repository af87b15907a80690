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

_compiled: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}
# A parameter that changes at each step makes new keys for old kernels.
_MOST = 4096


def launch(
    fn: Any, key: Hashable, device: torch.device, grid: tuple[int, int, int], args: Sequence[Any], constants: Callable[[], dict[str, Any]]
) -> None:
    """fn[grid](*args, **constants()) on `device`.

    `args` come before the constexprs in the signature of `fn`. `key` tells apart all that Triton compiles apart on one device: the
    constants, the types of the arguments, which pointers are multiples of 16 bytes, and the `integer_key` of what `fn` specialises on.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(fn, key, device, grid, args, constants)
        return
    key = fn, device, key
    known = _compiled.get(key)
    if known is not None:
        kernel, rest = known
        kernel[grid](*args, *rest)
        return
    named = constants()
    kernel = fn[grid](*args, **named)
    # Not the interpreter's; on an AMD GPU Triton compiles large tensors apart too.
    if isinstance(kernel, CompiledKernel) and torch.version.hip is None:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = kernel, tuple(named[name] for name in fn.arg_names[len(args) :])


def tensor_key(*tensors: Tensor) -> Hashable:
    """What Triton compiles apart of tensors."""
    return tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)


def integer_key(*numbers: int) -> Hashable:
    """What Triton compiles apart of integers."""
    return tuple((n == 1, n % 16 == 0, n >= 1 << 31) for n in numbers)
