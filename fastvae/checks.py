"""Checks of public arguments. Each error names the argument, the rule, what was received and, where there is one, the way out."""

from __future__ import annotations

import functools
import importlib.util
import math
import numbers
import operator
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fastvae.devices import lacks_float64
from fastvae.kernel_sums import Numbers, filled, rounding_of_sum
from fastvae.parametrisation import Parametrisation, ScaleKind
from fastvae.radial import KERNEL_NAMES, RBF, Kernel, Linear, Sum, terms_of

RadialKernelName = Literal["rbf", "gaussian", "imq", "rational_quadratic", "laplace", "matern32", "matern52", "energy", "riesz"]
KernelName = Literal[RadialKernelName, "polynomial"]
# A kernel, or several that are added.
AnyKernel = KernelName | Kernel | Sequence[KernelName | Kernel]
# Those with three derivatives at distance zero.
SteinKernelName = Literal["rbf", "gaussian", "imq", "rational_quadratic"]
Backend = Literal["cpu", "triton", "reference"]
AnyBackend = Literal["cpu", "triton", "reference", "inductor"]
Estimator = Literal["biased", "unbiased"]
MMDEstimator = Literal["biased", "unbiased", "linear"]
DensityEstimator = Literal["minibatch_weighted", "minibatch_stratified"]
BandwidthRule = Literal["median", "mean"]
Precision = Literal["highest", "high", "medium", "ieee"]
Normalization = Literal["rows", "columns", "both"]
# Dimensions of a tensor; "all" is all but the first.
Dims = int | Sequence[int] | Literal["all"]

BACKENDS = (None, *get_args(Backend))
ALL_BACKENDS = (None, *get_args(AnyBackend))
ESTIMATORS = get_args(Estimator)
STEIN_KERNELS = get_args(SteinKernelName)
MMD_ESTIMATORS = get_args(MMDEstimator)
DENSITY_ESTIMATORS = get_args(DensityEstimator)
BANDWIDTH_RULES = get_args(BandwidthRule)
NORMALIZATIONS = get_args(Normalization)
PRECISIONS = (None, *get_args(Precision))
# The kernel matrix of so many landmarks takes 8 GiB, and its factor as much again.
MOST_LANDMARKS = 1 << 15
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def option(name: str, value: object, known: Iterable[object]) -> None:
    known = tuple(known)
    # An array or a tensor has no single truth value of ==.
    if not isinstance(value, (str, bool, type(None))) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {received(value)}")


def received(value: object) -> str:
    """What a sentence says of a value: itself if it is short, else its type."""
    return repr(value) if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def kernel(value: object) -> Kernel:
    """The kernel of this name, or the kernel itself."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("kernel must hold at least one kernel, got none")
        return functools.reduce(operator.add, map(kernel, value))
    if isinstance(value, Kernel):
        for term in terms_of(value):
            if type(term.kernel) not in (Linear, *map(type, KERNEL_NAMES.values())):
                name = type(term.kernel).__name__
                raise ValueError(f"kernel must be one of the classes of fastvae.radial, which the backends know, got {name}")
        # 1 * RBF() is RBF().
        return value.terms[0].kernel if isinstance(value, Sum) and value.terms == terms_of(value.terms[0].kernel) else value
    if not isinstance(value, str):
        raise TypeError(f"kernel must be a name or a fastvae.radial.Kernel, got {type(value).__name__}")
    option("kernel", value, KERNEL_NAMES)
    return KERNEL_NAMES[value]


def one_sweep(family: Kernel) -> None:
    """A kernel that one sweep evaluates: no kernel of x·y in a sum."""
    if not family.radial and isinstance(family, (Sum, Linear)):
        raise ValueError(
            f"kernel must hold functions of the distance alone, got {family.name!r}: mmd and kernel_matmul of two samples take it"
        )


def kernels(value: object, aggregate: str | None) -> list[Kernel]:
    """One kernel, or one or several if `aggregate` is given."""
    if isinstance(value, (str, Kernel)) or not isinstance(value, Sequence):
        return [kernel(value)]
    if aggregate is None:
        raise ValueError(f"kernel must be a single kernel with aggregate=None, got {len(value)}: pass aggregate='fuse' or 'agg'")
    if len(value) == 0:
        raise ValueError("kernel must hold at least one kernel, got none")
    return [kernel(one) for one in value]


def aggregated(aggregate: str, estimator: str, bandwidth_weights: object, families: Sequence[Kernel]) -> None:
    """The options that a test with a set of kernels accepts."""
    if estimator != "unbiased":
        raise ValueError(f"estimator must be 'unbiased' with aggregate={aggregate!r}, got {estimator!r}")
    if bandwidth_weights is not None:
        rule = f"bandwidth_weights must be None with aggregate={aggregate!r}, where each bandwidth is a separate kernel"
        raise ValueError(f"{rule}, got {bandwidth_weights!r}")
    for family in families:
        if aggregate == "fuse":
            option("kernel with aggregate='fuse'", family.name, ("rbf", "imq", "rational_quadratic", "laplace"))


def kernel_options(
    value: object, precision: str | None, backend: str | None, device: torch.device | None, backends: tuple[str | None, ...] = BACKENDS
) -> Kernel:
    """Checks the options of the computation on `device` (any device if None) and returns the kernel."""
    option("precision", precision, PRECISIONS)
    usable_backend(backend, device, backends)
    return kernel(value)


def positive_kernel(family: Kernel, needed_for: str) -> None:
    """A kernel whose logarithm has a closed form."""
    if not family.positive:
        known = ", ".join(repr(name) for name, other in KERNEL_NAMES.items() if other.positive)
        raise ValueError(f"kernel must be one of {known}, for {needed_for}, got {family.name!r}")


def row_weights(name: str, weights: object, x_name: str, x: Tensor) -> None:
    """One weight for each row of x, of the same kind."""
    weights = floating_tensor(name, weights)
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"{name} must have one value for each row of {x_name}, shape {tuple(x.shape[:-1])}, got {tuple(weights.shape)}")
    same_kind(x_name, x, name, weights)


def one_weight_a_point(weights: object, points: Tensor) -> None:
    """Of a `KernelMean`: weights of any dtype and sum."""
    shape = tuple(floating_tensor("weights", weights).shape)
    if shape not in ((len(points),), (len(points), 1)):
        raise ValueError(f"weights must have one number for each of the {len(points)} points, got shape {shape}")


def mmd_options(
    value: AnyKernel,
    estimator: MMDEstimator,
    precision: Precision | None,
    backend: AnyBackend | None,
    bandwidth: float | BandwidthRule | Sequence[float] | Tensor,
    bandwidth_weights: Sequence[float] | Tensor | None,
    device: torch.device | None = None,
    to_normal: bool = False,
) -> tuple[Kernel, Numbers, Numbers]:
    """The kernel, the bandwidths and their weights of an MMD between samples, or `to_normal`, on `device` (any device if None)."""
    family = kernel_options(value, precision, backend, device, ALL_BACKENDS)
    option("estimator", estimator, ESTIMATORS if to_normal else MMD_ESTIMATORS)
    if to_normal:
        closed_form(family, bandwidth)
    return family, *bandwidths(bandwidth, bandwidth_weights, device)


def closed_form(family: Kernel, bandwidth: object) -> None:
    """A kernel whose expectations over N(0, I) have a closed form, and a bandwidth that is not a rule."""
    if not isinstance(family, RBF):
        raise ValueError(
            f"kernel must be 'rbf' for the closed form against N(0, I), got {family.name!r}: "
            "pass a sample of the prior, mmd(x, torch.randn_like(x), ...)"
        )
    if isinstance(bandwidth, str):
        bandwidth_rule(bandwidth)
        raise ValueError(
            f"bandwidth must be a number or several for the closed form against N(0, I), got {bandwidth!r}: "
            f"pass fastvae.{bandwidth}_bandwidth(x), or a sample of the prior, mmd(x, torch.randn_like(x), ...)"
        )


def stein_options(
    value: object,
    estimator: str,
    precision: str | None,
    backend: str | None,
    bandwidth: object,
    bandwidth_weights: object,
    device: torch.device | None = None,
) -> tuple[Kernel, Numbers, Numbers]:
    """The kernel, the constant bandwidths and their weights of a kernel Stein discrepancy on `device` (any device if None)."""
    family = kernel_options(value, precision, backend, device)
    if family.name not in STEIN_KERNELS:
        *first, last = map(repr, STEIN_KERNELS)
        rule = f"kernel must be {', '.join(first)} or {last} for a Stein discrepancy, which takes derivatives at distance zero"
        raise ValueError(f"{rule}, got {family.name!r}")
    option("estimator", estimator, ESTIMATORS)
    if isinstance(bandwidth, str):
        bandwidth_rule(bandwidth)
        raise ValueError(f"bandwidth must be a number or several, got {bandwidth!r}: pass fastvae.{bandwidth}_bandwidth(z)")
    h, a = bandwidths(bandwidth, bandwidth_weights, device)
    constant("bandwidth", h)
    constant("bandwidth_weights", a)
    if not isinstance(h, Tensor) or _readable(h):
        for number in h:
            if not 1e-8 <= number <= 1e8:
                raise ValueError(f"bandwidth must be between 1e-8 and 1e8 for a Stein discrepancy, got {float(number):g}")
    return family, h, a


def outputs_of_groups(name: str, x: object) -> Tensor:
    """A floating-point tensor (groups, rows, ...), as (groups, rows, features)."""
    x = floating_tensor(name, x)
    if x.ndim < 3:
        raise ValueError(f"{name} must have shape (groups, rows, ...), got {tuple(x.shape)}")
    _not_empty(name, x)
    return x.flatten(2)


def one_for_each_group(name: str, value: object, x: Tensor, above: float | None = None) -> None:
    """A floating-point vector with a number for each group of x (groups, rows, ...), finite and above a bound where it can be read."""
    value = floating_tensor(name, value)
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} must have one value for each group of x, shape {tuple(x.shape[:1])}, got {tuple(value.shape)}")
    same_device("x", x, name, value)
    for bound in value.detach().aminmax() if _readable(value) else ():
        real(name, bound.item(), above=above)


def points(name: str, x: object, *, batched: bool = False) -> None:
    """A floating-point tensor of shape (rows ≥ 1, features ≥ 1), with any batch dimensions before these if `batched`."""
    x = floating_tensor(name, x)
    if x.ndim < 2 or (x.ndim > 2 and not batched):
        raise ValueError(f"{name} must have shape {'(..., rows, features)' if batched else '(rows, features)'}, got {tuple(x.shape)}")
    _not_empty(name, x)
    if x.ndim > 3:
        rows, features = x.shape[-2:]
        _warn_of_images(
            f"{name} of shape {tuple(x.shape)} is treated as a batch of {x.shape[:-2].numel()} samples, each with {rows} rows and "
            f"{features} features: pass {name}.flatten(1) if it is one sample of images, or {name}.flatten(0, -3) if it is a batch"
        )


def sample_of_slices(name: str, z: object) -> None:
    """Rows (rows ≥ 1, features ≥ 1) after any batch dimensions."""
    z = floating_tensor(name, z)
    if z.ndim < 2:
        raise ValueError(f"{name} must have shape (..., rows, features), got {tuple(z.shape)}")
    _not_empty(name, z)


def views(name: str, z: object) -> None:
    """(views, rows, features)."""
    z = floating_tensor(name, z)
    if z.ndim != 3:
        raise ValueError(f"{name} must have shape (views, rows, features), got {tuple(z.shape)}")


def directions(value: object, z: Tensor) -> None:
    """The columns of a matrix with as many rows as z has features."""
    value = floating_tensor("directions", value)
    if value.ndim != 2 or value.shape[0] != z.shape[-1] or value.shape[1] == 0:
        raise ValueError(f"directions must have shape ({z.shape[-1]}, slices), one row for each feature of z, got {tuple(value.shape)}")
    if value.device != z.device:
        raise ValueError(f"directions must be on the device of z, {z.device}, got {value.device}")
    constant("directions", value)


def quadrature(num_points: Any, t_max: Any, t_min: Any) -> tuple[int, float, float]:
    """The points of an integral of an even function from 0 or from −t_max to t_max."""
    num_points = integer("num_points", num_points, at_least=2)
    t_max, t_min = real("t_max", t_max, above=0), real("t_min", t_min)
    if t_min not in (0, -t_max):
        raise ValueError(f"t_min must be 0 or -t_max, here {-t_max!r}, got {t_min!r}")
    return num_points, t_max, t_min


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {received(value)}")


def generator(value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}")


def samples(x: Tensor, *others: Tensor, batched: bool = False) -> None:
    """A sample x of rows, or x and y with the same features, batch dimensions, dtype and device."""
    points("x", x, batched=batched)
    for y in others:
        points("y", y, batched=batched)
        same_features("x", x, "y", y)
        if x.shape[:-2] != y.shape[:-2]:
            raise ValueError(f"x and y must have the same batch dimensions, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        same_kind("x", x, "y", y)


def _not_empty(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(x.shape)}")


def images(mu: Tensor) -> None:
    """Warns of a mu with several batch dimensions: its KL is summed over the last dimension alone."""
    if mu.ndim > 3:
        _warn_of_images(
            f"mu of shape {tuple(mu.shape)} has a KL of shape {tuple(mu.shape[:-1])}, summed over its last dimension alone: pass "
            "kl_dims='all' for one KL an image, or kl_dims=(-1,) for one KL a row"
        )


def _warn_of_images(sentence: str) -> None:
    if not torch.compiler.is_compiling():
        # Points at the caller's line, through all frames of fastvae and PyTorch.
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("fastvae.", "torch.")):
            level, frame = level + 1, frame.f_back
        warnings.warn(sentence, stacklevel=level)


def floating_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have dtype float64, float32, bfloat16 or float16, got {x.dtype}")
    return x


def same_kind(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """The same dtype and device."""
    same_device(name_a, a, name_b, b)
    same_dtype(name_a, a, name_b, b)


def same_device(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}")


def same_dtype(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {a.dtype} and {b.dtype}")


def same_shape_and_kind(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    same_kind(name_a, a, name_b, b)


def same_features(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{name_a} and {name_b} must have the same number of features, got shapes {tuple(a.shape)} and {tuple(b.shape)}")


def same_rows(name_a: str, a: Tensor, name_b: str, b: Tensor, why: str) -> None:
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"{name_a} and {name_b} must have the same number of rows for {why}, got {a.shape[-2]} and {b.shape[-2]}")


def real(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """A finite real number, as a float."""
    if type(value) is float:
        number = value
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    else:
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {number}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {number:g}")
    if at_least is not None and not number >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {number:g}")
    return number


def numbers_of(name: str, values: Any, *, above: float | None = None) -> list[float]:
    """A number, or a sequence, array or tensor of them, as a list."""
    if isinstance(values, Tensor):
        values = values.detach()
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.reshape(-1).tolist()
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    if not values:
        raise ValueError(f"{name} must hold at least one value, got none")
    return [real(f"every one of {name}", value, above=above) for value in values]


def positive_numbers(name: str, values: Any) -> list[float]:
    return numbers_of(name, values, above=0)


def number(name: str, value: object) -> None:
    """A real number, nan included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def one_number(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(f"{name} must be a single number, got shape {tuple(value.shape)}")


def integer(name: str, value: Any, *, at_least: int) -> int:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def fraction(name: str, value: Any, *, or_zero: bool = False) -> float:
    number = real(name, value, at_least=0) if or_zero else real(name, value, above=0)
    if number >= 1:
        raise ValueError(f"{name} must be less than 1, got {number:g}")
    return number


def seed(value: Any) -> torch.Generator | None:
    """A CPU generator with this seed, the generator itself, or None for PyTorch's global one."""
    if isinstance(value, torch.Generator):
        if value.device.type != "cpu":
            raise ValueError(f"seed must be an integer or a torch.Generator on the CPU, got one on {value.device}")
        return value
    return None if value is None else torch.Generator().manual_seed(integer("seed", value, at_least=0))


def progress(value: object) -> None:
    if not isinstance(value, bool) and not callable(value):
        raise TypeError(f"progress must be True, False or a function that takes the fraction done, got {type(value).__name__}")


def sizes(name: str, values: object) -> None:
    """A sequence of integers of at least one."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of integers, got {type(values).__name__}")
    for value in values:
        integer(f"every size of {name}", value, at_least=1)


def bandwidth_rule(value: str) -> None:
    if value not in BANDWIDTH_RULES:
        raise ValueError(f"bandwidth must be a number, several, or one of {', '.join(map(repr, BANDWIDTH_RULES))}, got {value!r}")


def positive_distance(rule: str, distance: Tensor) -> Tensor:
    """The bandwidth that a rule found. A bandwidth of zero is an error, or nan where reading it would wait for a GPU."""
    if not _readable(distance):
        return torch.where(distance == 0, torch.nan, distance)
    if distance == 0:
        raise ValueError(
            f"the {rule} distance between rows must be greater than 0 to be a bandwidth, got 0, as most rows are duplicates: pass a number"
        )
    return distance


def positive_quantile(distance: Tensor) -> None:
    if distance == 0:
        raise ValueError(
            "the 5 % quantile of the distances between rows must be greater than 0 for aggregate='fuse', got 0, as many rows are "
            "duplicates: pass bandwidths"
        )


def bandwidths(bandwidth: object, weights: object, device: torch.device | None) -> tuple[Numbers, Numbers]:
    """The bandwidths h_b and as many weights a_b, as numbers or float64 vectors, for data on `device` (any device if None).

    Numbers are checked here. A tensor on a GPU is not read: the operations turn a value that is not positive into nan. The name of a rule
    gives nan, which the caller replaces by the bandwidth that the rule finds.
    """
    if isinstance(bandwidth, str):
        bandwidth_rule(bandwidth)
        return [math.nan], bandwidths(1.0, weights, device)[1]
    h = bandwidth_vector("bandwidth", bandwidth, device)
    if weights is None:
        return h, [1.0] * len(h)
    a = _vector("bandwidth_weights", weights, device, positive=False)
    if len(a) != len(h):
        raise ValueError(f"bandwidth_weights must have one value for each bandwidth, got {len(a)} for {len(h)}")
    return h, a


def bandwidth_vector(name: str, value: object, device: torch.device | None) -> Numbers:
    """Bandwidths that are not the name of a rule, as in `bandwidths`."""
    h = _vector(name, value, device, positive=True)
    if len(h) == 0:
        raise ValueError(f"{name} must hold at least one value, got none")
    return h


def problem_bandwidths(h: Tensor, value: object, x: Tensor) -> Tensor:
    """One bandwidth for each problem of the batch x (..., N, D), for a kernel of the distance. One that cannot be read may become nan."""
    if not kernel(value).radial:
        raise ValueError(f"kernel must be a function of the distance for a bandwidth for each problem, got {kernel(value).name!r}")
    floating_tensor("bandwidth", h)
    if h.shape != (*x.shape[:-2], 1):
        shape = (*x.shape[:-2], 1) if x.ndim > 2 else "(1,)"
        raise ValueError(
            "bandwidth must be a scalar, a vector of bandwidths for all problems, or one bandwidth for each problem, "
            f"shape {shape} here, got shape {tuple(h.shape)}"
        )
    if h.device not in (x.device, torch.device("cpu")):
        raise ValueError(f"bandwidth must be on {x.device} or on the CPU, got {h.device}")
    if not _readable(h):
        return torch.where(h > 0, h, torch.nan)
    for bound in h.detach().aminmax():
        _bandwidth_numbers("bandwidth", [bound.item()], True)
    return h


def _vector(name: str, value: object, device: torch.device | None, *, positive: bool) -> Numbers:
    if isinstance(value, Tensor):
        floating_tensor(name, value)
        if value.ndim > 1:
            raise ValueError(f"{name} must be a scalar or a vector, got shape {tuple(value.shape)}")
        if device is not None and value.device not in (device, torch.device("cpu")):
            raise ValueError(f"{name} must be on {device} or on the CPU, got {value.device}")
        if _readable(value):
            _bandwidth_numbers(name, value.detach().reshape(-1).tolist(), positive)
        return (value.cpu() if lacks_float64(value.device) else value).reshape(-1).to(torch.float64)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    single = isinstance(value, (float, int, str)) or not isinstance(value, Sequence)
    values = [value] if single else list(cast("Sequence[object]", value))
    found = _bandwidth_numbers(name, values, positive)
    if torch.compiler.is_compiling() and not _are_fixed(found):
        # As arguments of an operation, numbers that change would be compiled again at each change.
        return filled(found, device)
    return found


def _are_fixed(numbers: Sequence[float]) -> bool:
    """Whether the compiler treats the numbers as constants, not as symbols."""
    # Imported here, as it imports sympy, which the compiler has already imported.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(number != 0) for number in numbers)


def _bandwidth_numbers(name: str, values: Sequence[object], positive: bool) -> list[float]:
    numbers = [real(name, value, above=0 if positive else None) for value in values]
    if not positive:
        return numbers
    for number in numbers:
        if not 1e-30 <= number <= 1e30:
            raise ValueError(f"{name} must be between 1e-30 and 1e30, so that its powers do not overflow, got {number:g}")
    if len(numbers) > 1 and max(numbers) > 1e15 * min(numbers) * (1 + 1e-6):
        raise ValueError(f"{name} must hold values within a factor of 1e15 of one another, got {min(numbers):g} and {max(numbers):g}")
    return numbers


def is_process_group(group: object) -> bool:
    return torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)


def same_on_ranks(name: str, kinds: Sequence[Sequence[tuple[int, torch.dtype]]]) -> None:
    """The same features and dtypes, of x and of its weights if it has any, on each rank."""
    if any(own != kinds[0] for own in kinds):
        shapes = [" and ".join(f"(rows{f', {features}' if features else ''}) of {dtype}" for features, dtype in own) for own in kinds]
        received = ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(f"{name} must have the same features and dtype, and weights or none, on all ranks of the group, got {received}")


def same_slices_on_ranks(sizes: Sequence[Sequence[int]]) -> None:
    """The same numbers of samples, features, slices and points, and dtype, on each rank."""
    if any(own != sizes[0] for own in sizes):
        names = "samples", "features", "slices", "points"
        received = "; ".join(
            ", ".join(f"{size} {name}" for size, name in zip(own, names, strict=False)) + f" of {FLOAT_DTYPES[own[4]]} on rank {rank}"
            for rank, own in enumerate(sizes)
        )
        raise ValueError(f"z must have the same batch dimensions, features, slices, points and dtype on all ranks, got {received}")


def no_rank_failed(ranks: Sequence[int]) -> None:
    if ranks:
        several = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        raise ValueError(f"the arguments must be valid on all ranks of process_group, got an error on {several}: see the message there")


def process_group(group: object) -> None:
    """A group of `torch.distributed` that contains this process."""
    if not is_process_group(group):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup that this process is in, got {type(group).__name__}")


def distributed(x: Tensor, estimator: str, backend: str | None, group: object, name: str = "x") -> None:
    """The arguments that a process group can be combined with."""
    process_group(group)
    if x.ndim > 2:
        raise ValueError(f"{name} must have shape (rows, features) with a process_group, got {tuple(x.shape)}")
    not_dense(backend)
    if estimator == "linear":
        raise ValueError(f"process_group must be None for estimator={estimator!r}, got a process group")


def not_dense(backend: str | None) -> None:
    if backend == "reference":
        raise ValueError(f"process_group must be None for backend={backend!r}, got a process group")


def own_kernel(bandwidth: object, bandwidth_weights: object, kernel: object, y_weights: object) -> None:
    """The arguments of `mmd` that a KernelMean brings with it, at their defaults."""
    given = {"bandwidth": bandwidth, "bandwidth_weights": bandwidth_weights, "kernel": kernel, "y_weights": y_weights}
    defaults = {"bandwidth": 1.0, "kernel": "rbf"}
    for name, value in given.items():
        if value is not defaults.get(name) and not (type(value) is float and value == 1.0):
            raise ValueError(f"{name} must be left out where y is a KernelMean, which has its own, got {value!r}")


def random_features(family: Kernel, weights: Sequence[float], otherwise: str = "use NystromFeatures or all pairs") -> None:
    """A kernel with a spectral density, and a sum of such with weights that are not negative."""
    for weight, part, _ in terms_of(family):
        if not part.radial or part.homogeneous:
            names = ", ".join(repr(name) for name, kernel in KERNEL_NAMES.items() if kernel.radial and not kernel.homogeneous)
            raise ValueError(f"kernel must be one of {names}, or a sum of these, for random features, got {family.name!r}: {otherwise}")
        if weight < 0:
            raise ValueError(f"the weight of a kernel must be at least 0 for random features, got {weight:g}")
    _positive_weights(weights, "random features")


def _positive_weights(weights: Sequence[float], needed_for: str) -> None:
    if min(weights) < 0:
        raise ValueError(f"bandwidth_weights must be at least 0 for {needed_for}, got {min(weights):g}")


def method_of_test(value: object) -> None:
    """How a two-sample test draws its null distribution, where it is not by features."""
    names = ("permutation", "wild_bootstrap")
    if not isinstance(value, str) or value not in names:
        got = value.__name__ if isinstance(value, type) else received(value)
        raise ValueError(f"method must be {', '.join(map(repr, names))}, RandomFeatures(count) or NystromFeatures(landmarks), got {got}")


def known_options(caller: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{caller} has no argument {name!r}: it takes {', '.join(known)}")


def landmarks(value: Any) -> int:
    count = integer("landmarks", value, at_least=1)
    if count > MOST_LANDMARKS:
        gib = 8 * count**2 / 2**30
        raise ValueError(
            f"landmarks must be at most {MOST_LANDMARKS}, got {count}, whose kernel matrix takes {gib:.0f} GiB: use fewer or method='all'"
        )
    return count


def without_features(features: object, aggregate: object, backend: object, precision: object) -> None:
    """Options that features do not go with."""
    for name, value in (("aggregate", aggregate), ("backend", backend), ("precision", precision)):
        if value is not None:
            raise ValueError(f"{name} must be None for method={features!r}, got {value!r}")


def positive_definite_kernel(family: Kernel, weights: Sequence[float]) -> None:
    terms = terms_of(family)
    if any(part.homogeneous or weight < 0 for weight, part, _ in terms) or not any(weight for weight, _, _ in terms):
        raise ValueError(f"kernel must be positive definite for the Nyström approximation, got {family.name!r}: use all rows")
    _positive_weights(weights, "the Nyström approximation")
    if not max(weights):
        raise ValueError("bandwidth_weights must hold a number greater than 0 for the Nyström approximation, got zeros")


def positive_definite(holds: bool, ridge: float) -> None:
    if not holds:
        raise ValueError(f"ridge must make the kernel matrix of the landmarks positive definite, got {ridge:g}: pass a larger one")


def instance(name: str, value: object, kind: type, more: str = "") -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}{more}, got {type(value).__name__}")


def no_rule(bandwidth: object, why: str) -> None:
    if isinstance(bandwidth, str):
        raise ValueError(f"bandwidth must be a number or several {why}, got {bandwidth!r}")


def as_many(name: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{name} must hold one {what} for each x, {expected}, got {found}")


def iterable(name: str, value: object) -> None:
    if isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a torch.Tensor, got ndarray: torch.from_numpy({name})")
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a torch.Tensor or an iterable of tensors, got {type(value).__name__}")


def has_batches(name: str, first: object) -> None:
    if first is None:
        raise ValueError(f"{name} must hold at least one batch, got none")


def iterated_twice(seen: int, kept: int) -> None:
    if seen > kept:
        raise ValueError(
            f"pool must be iterable twice, as a list or a DataLoader is, if it has more rows than are drawn, {kept}, got an iterator over "
            f"{seen} rows: pass landmarks as points and a number for the bandwidth"
        )


def finite(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got a nan or an infinity")


def installed(module: str, package: str, caller: str, extra: str, otherwise: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        way = f" {otherwise}" if otherwise else ""
        raise ImportError(f"{package} must be installed for {caller}: pip install 'fastvae-mmd[{extra}]'{',' * bool(way)}{way}")


def file_format(path: object, found: object, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{path} must be a file that {expected.partition('.')[2]}.save wrote, got {found or 'a file of another kind'}")


def state_of_kernel(own: Sequence[Any], given: Sequence[Any]) -> None:
    """The name, parameters, bandwidths and weights of the kernel of a KernelMean and of a state that it loads."""
    if own != given:
        expected, received = (
            f"kernel {name!r} with parameters {parameters}, bandwidths {h} and weights {a}" for name, parameters, h, a in (own, given)
        )
        raise ValueError(f"the state must be of a KernelMean of {expected}, got one of {received}: use KernelMean.load")


def known_groups(num_groups: int | None) -> None:
    if num_groups is None:
        raise ValueError("num_groups must be given with a process_group, as a rank may lack some groups, got None")


def sample_weights(name: str, weights: object, x_name: str, x: Tensor, estimator: str) -> None:
    """One weight for each row, without gradient."""
    if estimator == "linear":
        raise ValueError(f"{name} must be None for estimator='linear', got weights")
    weights = floating_tensor(name, weights)
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"{name} must have one value for each row of {x_name}, shape {tuple(x.shape[:-1])}, got {tuple(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"{name} and {x_name} must be on the same device, got {weights.device} and {x.device}")
    constant(name, weights)


def sum_of_weights(name: str, weights: Tensor, estimator: str = "biased") -> None:
    """Finite weights that sum to one, two or more of them nonzero if `estimator` is "unbiased".

    Where reading them would wait for a GPU or break a graph, the operation returns nan instead.
    """
    if not _readable(weights):
        return
    for total in weights.detach().double().sum(-1).reshape(-1).tolist():
        if not abs(total - 1) <= rounding_of_sum(weights.dtype):
            raise ValueError(f"{name} must sum to one, got a sum of {total:.9g}: divide by {name}.sum(-1, keepdim=True)")
    if estimator == "unbiased" and int((weights != 0).sum(-1).min()) < 2:
        raise ValueError(f"{name} must have at least two nonzero values for estimator='unbiased', got one: use estimator='biased'")


def nonzero_sum(name: str, weights: Tensor) -> None:
    """Weights of any sum but 0, unless reading them would wait for a GPU or break a graph."""
    if _readable(weights) and weights.sum() == 0:
        raise ValueError(f"{name} must have a sum other than 0, got 0")


def enough_rows(name: str, x: Tensor, estimator: str) -> None:
    if estimator != "biased" and x.shape[-2] < 2:
        raise ValueError(f"{name} must have at least two rows for estimator={estimator!r}, got {x.shape[-2]}: use estimator='biased'")


def two_embeddings(count: int) -> None:
    if count < 2:
        raise ValueError(f"embeddings of each kind must be at least two for estimator='unbiased', got {count}: use estimator='biased'")


def two_rows(name: str, x: Tensor) -> None:
    if x.shape[-2] < 2:
        raise ValueError(f"{name} must have at least two rows, got {x.shape[-2]}")


def usable_backend(backend: str | None, device: torch.device | None, known: tuple[str | None, ...] = BACKENDS) -> None:
    """A known backend that works on this device, unless it is None, and is installed."""
    option("backend", backend, known)
    if device is None:
        return
    if backend in ("cpu", "inductor") and device.type != "cpu":
        raise ValueError(f"backend={backend!r} must have tensors on the CPU, got {device}")
    if backend == "triton" and device.type != "cuda" and not triton_interpreter():
        raise ValueError(
            f"backend='triton' must have tensors on a CUDA device, got {device}: set TRITON_INTERPRET=1 before Python starts to run there"
        )
    if device.type == "cuda" and backend in (None, "triton") and not _HAS_TRITON:
        raise RuntimeError("Triton must be installed for tensors on a CUDA device: pip install triton, or pass backend='reference'")


# Found at import, as the compiler cannot trace find_spec.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_interpreter() -> bool:
    """Whether Triton kernels run on CPU tensors in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _HAS_TRITON


def rows(name: str, x: object) -> None:
    """A floating-point tensor of shape (..., features ≥ 1), not empty."""
    x = floating_tensor(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (..., features), two dimensions or more, got {tuple(x.shape)}")
    _not_empty(name, x)


def columns(name: str, v: object, y_name: str, y: Tensor) -> None:
    """A floating-point vector or matrix with as many rows as y."""
    v = floating_tensor(name, v)
    if y.ndim > 2:
        if v.ndim != y.ndim or v.shape[:-1] != y.shape[:-1] or v.numel() == 0:
            shape = ", ".join(map(str, y.shape[:-1]))
            raise ValueError(f"{name} must have shape ({shape}, columns), the rows of {y_name}, got {tuple(v.shape)}")
        return
    if v.ndim not in (1, 2) or v.shape[0] != y.shape[0] or v.numel() == 0:
        raise ValueError(f"{name} must have shape ({y.shape[0]},) or ({y.shape[0]}, columns), the rows of {y_name}, got {tuple(v.shape)}")


def constant(name: str, value: Numbers) -> None:
    if requires_grad(value) and torch.is_grad_enabled():
        raise ValueError(f"{name} must be constant, got a tensor that requires grad: pass {name}.detach()")


def requires_grad(value: object) -> bool:
    if not isinstance(value, Tensor) or value.requires_grad or torch.compiler.is_compiling():
        return isinstance(value, Tensor) and value.requires_grad
    # Inside torch.vmap a tensor does not show that it requires grad outside.
    return torch._C._functorch.is_functorch_wrapped_tensor(value) and requires_grad(torch._C._functorch.get_unwrapped(value))


def groups(value: object, num_groups: object, z: Tensor) -> int:
    """Checks labels (N,) or weights (N, G) of the rows of z, and returns G."""
    if not isinstance(value, Tensor):
        raise TypeError(f"groups must be a torch.Tensor, got {type(value).__name__}")
    if value.device != z.device:
        raise ValueError(f"groups and z must be on the same device, got {value.device} and {z.device}")
    soft = value.is_floating_point()
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"groups must hold integers or floating-point weights, got {value.dtype}")
    if value.shape[:1] != z.shape[:1] or value.ndim != (2 if soft else 1) or value.numel() == 0:
        shape = f"({z.shape[0]}, groups)" if soft else f"({z.shape[0]},)"
        raise ValueError(f"groups must have shape {shape}, one row for each row of z, got {tuple(value.shape)}")
    if num_groups is not None:
        integer("num_groups", num_groups, at_least=1)
    if soft:
        constant("groups", value)
        if num_groups is not None and num_groups != value.shape[1]:
            raise ValueError(f"num_groups must be the number of columns of groups, {value.shape[1]}, got {num_groups}")
        if _readable(value) and not bool((value >= 0).all()):
            raise ValueError(f"groups must hold weights of at least 0, got {value.min().item():g}")
        return value.shape[1]
    if num_groups is None and (torch.compiler.is_compiling() or _is_batched(value)):
        raise ValueError("num_groups must be given inside torch.compile and torch.vmap, got None")
    if num_groups is not None and not _readable(value):
        assert isinstance(num_groups, int)
        return num_groups
    # In int64, as PyTorch cannot compare unsigned integers of more than 8 bits.
    low, high = (int(end) for end in value.long().aminmax())
    size = high + 1 if num_groups is None else num_groups
    assert isinstance(size, int)
    if low < 0 or high >= size:
        raise ValueError(f"groups must hold integers from 0 to {size - 1}, got {low if low < 0 else high}")
    return size


def pairs(value: Any, num_groups: int) -> Tensor:
    """Pairs of groups as an integer tensor (P, 2)."""
    try:
        index = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"pairs must be pairs of integers, got {received(value)}") from None
    whole = index.dtype != torch.bool and not index.is_floating_point() and not index.is_complex()
    if index.ndim != 2 or index.shape[1] != 2 or index.numel() == 0 or not whole:
        raise ValueError(f"pairs must be pairs of integers, shape (P, 2), got shape {tuple(index.shape)} of {index.dtype}")
    index = index.long()
    if _readable(index) and not bool(((index >= 0) & (index < num_groups)).all()):
        wrong = index[((index < 0) | (index >= num_groups)).any(1)]
        raise ValueError(f"pairs must hold groups from 0 to {num_groups - 1}, got {tuple(wrong[0].tolist())}")
    return index


def unit_interval(name: str, x: Tensor, way: str) -> bool:
    """Whether x could be read. nan passes, and makes the loss nan."""
    if torch._C._are_functorch_transforms_active() or not _readable(x) or not x.numel():
        return False
    low, high = (bound.item() for bound in x.detach().aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1] for a Bernoulli likelihood, got values from {low:g} to {high:g}: {way}")
    return True


def _readable(t: Tensor) -> bool:
    """Whether reading the values neither waits for a GPU nor breaks a graph."""
    return not torch.compiler.is_compiling() and t.is_cpu and not _is_batched(t)


def _is_batched(t: Tensor) -> bool:
    """Whether t is batched by `torch.vmap`, also inside another transform."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def noise(eps: Tensor, generator: torch.Generator | None, mu: Tensor, name: str = "mu") -> None:
    if generator is not None:
        raise ValueError("generator must be None where eps is given, got both: pass one of them")
    floating_tensor("eps", eps)
    same_shape_and_kind(name, mu, "eps", eps)
    constant("eps", eps)


def moments(name: str, x: object, dim: object) -> None:
    """A floating-point tensor whose two halves along `dim` are the parameters of Gaussians."""
    x = floating_tensor(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have two dimensions or more, got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    size = x.shape[dimension("dim", dim, x.ndim)]
    if size % 2:
        raise ValueError(f"{name} must have an even size along dim={dim}, means followed by as many scales, got {size}")


def dimension(name: str, value: Any, ndim: int) -> int:
    """A dimension of a tensor, from 0."""
    dim = integer(name, value, at_least=-ndim)
    if dim >= ndim:
        raise ValueError(f"{name} must be less than the number of dimensions, {ndim}, got {dim}")
    return dim % ndim


def dims(name: str, value: Dims, ndim: int) -> tuple[int, ...]:
    """Several dimensions of a tensor, from 0, in order."""
    if isinstance(value, str) and value == "all":
        return tuple(range(1, ndim))
    if isinstance(value, numbers.Integral):
        return (dimension(name, value, ndim),)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be an integer, a sequence of integers or 'all', got {received(value)}")
    found = tuple(sorted(dimension(f"each of {name}", dim, ndim) for dim in value))
    if len(set(found)) != len(found):
        raise ValueError(f"{name} must name each dimension once, got {tuple(value)}")
    return found


def parametrisation(scale: Any, offset: Any, bounds: Any, soft_clamp: Any) -> Parametrisation:
    # For a few numbers the checks take as long as the sums, so their results are cached.
    if not torch.compiler.is_compiling():
        try:
            return _cached_parametrisation(scale, offset, bounds, soft_clamp)
        except TypeError:
            pass  # An option cannot be hashed or is wrong: the checks say which.
    return _parametrisation(scale, offset, bounds, soft_clamp)


def _parametrisation(scale: Any, offset: Any, bounds: Any, soft_clamp: Any) -> Parametrisation:
    if not isinstance(scale, str):
        raise TypeError(f"scale must be a name, got {type(scale).__name__}")
    option("scale", scale, get_args(ScaleKind))
    offset = real("scale_offset", offset, at_least=0)
    clamp = None if soft_clamp is None else real("soft_clamp", soft_clamp, above=0)
    if bounds is not None:
        bounds = ordered("logvar_bounds", bounds)
        if max(-bounds[0], bounds[1]) > 1e30:
            raise ValueError(f"logvar_bounds must lie between -1e30 and 1e30, got ({bounds[0]:g}, {bounds[1]:g})")
        if scale != "logvar":
            raise ValueError(f"logvar_bounds must be None for scale={scale!r}, got {bounds}")
        if clamp is not None:
            raise ValueError(f"soft_clamp must be None if logvar_bounds is given, got {clamp}")
    return Parametrisation(cast(ScaleKind, scale), offset, bounds, clamp)


_cached_parametrisation = functools.lru_cache(maxsize=256, typed=True)(_parametrisation)


def ordered(name: str, value: Any) -> tuple[float, float]:
    """(low, high), two numbers in order."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be (low, high), got {received(value)}")
    low, high = (real(f"each of {name}", bound) for bound in value)
    if not low < high:
        raise ValueError(f"{name} must be (low, high) with low < high, got ({low:g}, {high:g})")
    return low, high


def broadcast(name_a: str, a: Tensor, name_b: str, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in the shape that they are broadcast to."""
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{name_a} and {name_b} must have shapes that can be broadcast, got {shapes}") from None
    return a.expand(shape), b.expand(shape)


def pair(name_a: str, a: Tensor | None, name_b: str, b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both tensors, or None if none is given."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        missing, given = (name_a, name_b) if a is None else (name_b, name_a)
        raise ValueError(f"{missing} must be given if {given} is, got None")
    return a, b


def prior(value: Any, mu: Tensor, s: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """The parameters of a prior in the form of those of the posterior, moments if `s` is None; their shapes can be broadcast."""
    if s is None:
        parts: Sequence[Any] = (value,)
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        parts = value
    else:
        raise TypeError(f"prior must be a pair of tensors, (mu, logvar), got {type(value).__name__}")
    for part in parts:
        shape = tuple(floating_tensor("prior", part).shape)
        same_kind("prior", part, "the posterior", mu)
        sizes = list(mu.shape)[mu.ndim - len(shape) :]
        fits = len(shape) <= mu.ndim and all(own in (1, size) for own, size in zip(shape, sizes, strict=True))
        if s is None and fits:
            # One number cannot be both a mean and a scale.
            fits = len(shape) >= mu.ndim - dim and shape[dim - mu.ndim] == mu.shape[dim]
        if not fits:
            raise ValueError(
                f"prior must have the shape of the posterior's parameters, {tuple(mu.shape)}, or one that is broadcast to it, got {shape}"
            )
    return parts[0], parts[1] if len(parts) == 2 else None


def dataset_size(value: Any, z: Tensor, estimator: str) -> None:
    """At least as many examples as the batch z has rows."""
    integer("dataset_size", value, at_least=1)
    rows = z.shape[0]
    if value < rows:
        raise ValueError(f"dataset_size must be at least the number of rows of z, {rows}, got {value}")
    if estimator == "minibatch_stratified" and rows < 2:
        raise ValueError(f"z must have at least two rows for estimator={estimator!r}, got {rows}: use estimator='minibatch_weighted'")


def kl_of_deterministic(kl_weight: float | Tensor) -> NoReturn:
    raise ValueError(f"kl_weight must be 0 for a deterministic posterior, which has no KL, got {float(kl_weight):g}")
