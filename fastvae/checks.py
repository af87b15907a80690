"""Every check of a public argument and every sentence of an error: the argument, the rule, what was received."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def option(name: str, value: object, known: Iterable[object]) -> None:
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def points(name: str, x: object) -> None:
    """A floating tensor of shape (rows ≥ 1, features ≥ 1)."""
    floating_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (rows, features), got {tuple(x.shape)}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(x.shape)}")


def floating_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have dtype float64, float32, bfloat16 or float16, got {x.dtype}")


def same_kind(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """The same dtype on the same device."""
    if a.device != b.device:
        raise ValueError(f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {a.dtype} and {b.dtype}")


def same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def same_features(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name_a} and {name_b} must have the same number of features, got shapes {tuple(a.shape)} and {tuple(b.shape)}")


def number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """A real, finite number, returned as float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value:g}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {value:g}")
    return value


def integer(name: str, value: Any, *, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def bandwidths(bandwidth: object, weights: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bandwidths h_b and their weights a_b as float64 vectors of one length.

    Numbers are checked here. A tensor stays on its device, its values unread: the operations turn a value that is not positive into nan.
    """
    h = _vector("bandwidth", bandwidth, device, positive=True)
    if h.numel() == 0:
        raise ValueError("bandwidth must hold at least one value, got none")
    if weights is None:
        return h, torch.ones_like(h)
    a = _vector("bandwidth_weights", weights, device, positive=False)
    if a.shape != h.shape:
        raise ValueError(f"bandwidth_weights must have one value for each bandwidth, got {a.numel()} for {h.numel()}")
    return h, a


def _vector(name: str, value: object, device: torch.device, *, positive: bool) -> Tensor:
    if isinstance(value, Tensor):
        floating_tensor(name, value)
        if value.ndim > 1:
            raise ValueError(f"{name} must be a scalar or a vector, got shape {tuple(value.shape)}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad, as it is taken as a constant: pass {name}.detach()")
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"{name} must be on {device} or on the CPU, got {value.device}")
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            value_list = value.detach().reshape(-1).tolist()
            for v in value_list:
                number(name, v, above=0) if positive else number(name, v)
        return value.detach().reshape(-1).to(torch.float64)
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    numbers = [number(name, v, above=0) if positive else number(name, v) for v in values]
    return torch.tensor(numbers, dtype=torch.float64)


def sample_weights(name: str, weights: object, x_name: str, x: Tensor) -> None:
    """One constant, finite weight a row, summing to one."""
    floating_tensor(name, weights)
    assert isinstance(weights, Tensor)
    if weights.shape != x.shape[:1]:
        raise ValueError(f"{name} must have one value for each row of {x_name}, shape ({x.shape[0]},), got {tuple(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"{name} and {x_name} must be on the same device, got {weights.device} and {x.device}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad, as they are taken as constants: pass {name}.detach()")
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        total = float(weights.detach().double().sum())
        # The rounding of n weights of `eps` each: a sum further off is not rounding.
        tolerance = 16 * torch.finfo(weights.dtype).eps
        if not abs(total - 1) <= tolerance:
            raise ValueError(f"{name} must sum to one, got a sum of {total:.9g}: divide by {name}.sum()")


def enough_rows(name: str, x: Tensor, estimator: str) -> None:
    if estimator == "unbiased" and x.shape[0] < 2:
        raise ValueError(f"{name} must have at least two rows for estimator='unbiased', got {x.shape[0]}: use estimator='biased'")
