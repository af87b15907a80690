"""A device without float64, as Apple's GPUs are: its tensors are on the CPU, and none of them can be of float64."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

NAME = "fakemps"
_LIBRARY = torch.library.Library("_", "IMPL")


class DeviceTensor(Tensor):
    """Says that it is on the device, and holds a tensor of the CPU, on which every operation is made."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{NAME} has no float64")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=torch.device(NAME, 0), **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_cpu(func, args, kwargs or {})


def _on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inputs = {id(t.held): t for t in args if isinstance(t, DeviceTensor)}
    held_args, held_kwargs = (tree_map_only(DeviceTensor, lambda t: t.held, part) for part in (args, kwargs))
    results = func(*held_args, **held_kwargs)
    if device is not None and torch.device(device).type == "cpu":
        return results
    # What is done in place gives back what it was done to.
    return tree_map_only(Tensor, lambda t: inputs[id(t)] if id(t) in inputs else DeviceTensor(t), results)


@functools.cache
def device() -> torch.device:
    """The device, which this process has from now on."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    _LIBRARY.fallback(lambda func, *args, **kwargs: _on_cpu(func, args, kwargs), "PrivateUse1")
    return torch.device(NAME, 0)
