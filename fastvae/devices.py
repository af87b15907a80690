"""Devices that have no float64, as Apple's GPUs (MPS): sums over pairs need it, and are taken on the CPU."""

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
    """`function`, which takes float64: on the CPU, where the device of its first argument has none; results come back, as float32."""

    @functools.wraps(function)
    def anywhere(*args: P.args, **kwargs: P.kwargs) -> R:
        # A device's type takes longer to read than all else here, but the compiler would put these into its graph.
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
