"""What a call runs on, and in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def runs_on_triton(backend: str, x: Tensor) -> bool:
    return backend == "triton" or x.is_cuda


def needs_dispatcher(first: Tensor, *others: Tensor | None) -> bool:
    """Whether PyTorch's dispatcher, 25 µs of a call, has to do more than choose between CPU and CUDA.

    It has for the compiler, a transform of `torch.func`, forward mode, a mode of dispatch, or a subclass of Tensor.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode() or in_forward_mode():
        return True
    for t in (first, *others):
        if t is not None and (type(t) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_legacy_batchedtensor(t)):
            return True
    return not (first.is_cpu or first.is_cuda)


def in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_if_finite(*tensors: Tensor) -> Tensor:
    """0 in float64 if all numbers are finite, otherwise nan. A kernel or a density at an infinite distance is zero, which hides it."""
    # From the smallest and the largest number, as a sum may overflow.
    return (torch.stack([end for t in tensors for end in t.detach().aminmax()]).double() * 0).sum()
