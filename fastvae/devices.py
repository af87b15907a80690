"""Devices without float64, such as Apple's GPUs (MPS). Sums over pairs need float64 and run on the CPU there."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

P = ParamSpec("P")
R = TypeVar("R")

WITHOUT_FLOAT64 = ("mps",)


def lacks_float64(device: torch.device) -> bool:
    return device.type in WITHOUT_FLOAT64


def float64_on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that needs float64: if its first tensor's device has none, it runs on the CPU and returns float32 results."""

    @functools.wraps(function)
    def anywhere(*args: P.args, **kwargs: P.kwargs) -> R:
        # A fast path, as reading a device's type takes longer. Not for the compiler, which would put is_cpu into its graph.
        if args and isinstance(args[0], Tensor) and not torch.compiler.is_compiling() and (args[0].is_cpu or args[0].is_cuda):
            return function(*args, **kwargs)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None or not lacks_float64(first.device):
            return function(*args, **kwargs)
        device = first.device
        warnings.warn(f"{function.__name__} runs on the CPU, as {device.type} has no float64", stacklevel=2)
        own_args, own_kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        result: R = tree_map_only(Tensor, lambda t: _sent(t, device), function(*own_args, **own_kwargs))
        return result

    return anywhere


def _sent(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device, torch.float32 if t.dtype == torch.float64 else t.dtype)
