"""How the GPU evaluates a sum of kernels: what the host chooses, and the entries of the plan that follows from the data on the device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton.language as tl

from fastvae.kernel_sums import EXPONENT_ERROR
from fastvae.kernels.families import Family, family_of
from fastvae.kernels.products import BF16X3, DIFFERENCES, IEEE, PRODUCT_OF_PRECISION, TF32X3
from fastvae.kernels.sums import pack_squarings
from fastvae.radial import Kernel, Matern32, Matern52, RationalQuadratic, Riesz, Sum, terms_of

# Entries of the plan of a problem, float64. A pair of entries is that of x, then that of y.
PRECISION_PASS = tl.constexpr(0)  # the number of the pass that runs
SCALE = tl.constexpr(1)  # of the rows
VALUE_CONSTANT, SLOPE_CONSTANT = tl.constexpr(2), tl.constexpr(3)  # subtracted from the value and the slope of each pair
OWN_VALUE, OTHER_VALUE = tl.constexpr(4), tl.constexpr(6)  # factors of a row's sum over its own and over the other sample
OWN_GRADIENT, OTHER_GRADIENT = tl.constexpr(8), tl.constexpr(10)  # the same of its gradient
GRADIENT_SCALE = tl.constexpr(12)  # from sums over scaled rows to a gradient, without the row's weight
SLOPE_CONSTANT_GRADIENT = tl.constexpr(13)  # from SLOPE_CONSTANT's part of the sums over rows to its gradient
UNBIASED_SCALE = tl.constexpr(14)  # 1/(1 − Σp²), or 1
DIAGONAL = tl.constexpr(16)  # k(z, z) without the subtracted constant
PRIOR = tl.constexpr(17)  # E k(y, y') without the subtracted constant
VALUE_SCALE = tl.constexpr(18)  # factor of the sums of kernels
CONSTANT = tl.constexpr(19)  # what a pair of the sums lacks of the kernel, times VALUE_SCALE
TOTAL = tl.constexpr(20)  # sum of the weights as they were given, or the number of rows
PLAN = tl.constexpr(22)

# Largest γ·‖x‖² for which products of float32 keep the gradient to 1e-4 (IEEE: to 5e-6), as benchmarks/accuracy.py shows: two bfloat16
# parts place a point to 2⁻¹⁷ of its norm, two tf32 parts to 2⁻²².
_LIMIT = {BF16X3.value: 12.0, TF32X3.value: 256.0, IEEE.value: 64.0}

# Rounding error of ‖u_i − u_j‖² by products, relative to the largest ‖u‖²: a function of the distance takes closer pairs for identical.
ROUNDING, ROUNDING_DOUBLE = tl.constexpr(2.0**-20), tl.constexpr(2.0**-49)

# A pair is near if rounding turns the direction of its distance by more than 1e-3, or 1e-7 in float64: the squared distance relative to
# ROUNDING. An unbounded slope takes differences where more than this share of the pairs is near.
_NEAR, _NEAR_DOUBLE, NEAR_SHARE = 2.0**10, 2.0**24, tl.constexpr(2.0**-8)


MANY_REGISTERS = (RationalQuadratic, Matern32, Matern52, Sum)


@dataclass(frozen=True, eq=False)
class DeviceKernelPlan:
    """How the GPU evaluates a sum of kernels. It follows from the kernels, the dtype and the precision alone."""

    kernel: Kernel
    family: Family
    bandwidths: int
    squarings: int
    precision_passes: tuple[int, ...]  # the constexpr PRODUCT of each pass; the pass runs whose number is the plan's PRECISION_PASS
    limits: tuple[float, float]  # the largest γ·‖z−c‖² of the first two passes
    table: int  # entries of the table of a problem

    @property
    def powers(self) -> bool:
        """Whether φ is a power of 1 + t, has a polynomial factor or is a sum, which takes more registers than an exponential."""
        return isinstance(self.kernel, MANY_REGISTERS)

    @property
    def constants(self) -> dict[str, object]:
        return {"FAMILY": self.family, "BANDWIDTHS": self.bandwidths, "SQUARINGS": self.squarings}


@functools.lru_cache(maxsize=256)
def device_kernel_plan(
    kernel: Kernel, count: int, squarings: tuple[int, ...], dtype: torch.dtype, precision: str, self_pairs: bool = False
) -> DeviceKernelPlan:
    """The plan of `count` bandwidths. `self_pairs` says that some pairs may be of a row with itself."""
    family = family_of(kernel)
    products = precision_products(family, "ieee" if dtype == torch.float64 else precision, self_pairs)
    # Below r = 1 the value too is steep at distance zero: from differences only.
    by_differences = any(isinstance(term.kernel, Riesz) and term.kernel.r < 1 for term in terms_of(kernel))
    limits = [*(0.0 if by_differences else _limit(family, product, dtype) / kernel.steepness for product in products), math.inf]
    # A sum of homogeneous or polynomial kernels is evaluated as one of them.
    bandwidths = count if family.radial and not family.homogeneous else 1
    return DeviceKernelPlan(
        kernel=kernel,
        family=family,
        bandwidths=bandwidths,
        squarings=pack_squarings(squarings),
        precision_passes=(*products, DIFFERENCES.value) if family.radial else products,
        limits=(limits[0], limits[1]),
        table=table_size(family, bandwidths),
    )


def table_size(family: Family, bandwidths: int) -> int:
    """Ratio, weight, slope and constant of each bandwidth, the least exponent of an identical pair, and parameters."""
    return 4 * bandwidths + family.takes_distance + family.parameters


def precision_products(family: Family, precision: str, self_pairs: bool = False) -> tuple[int, ...]:
    """The products of each pass, from the fastest on."""
    if precision == "highest" and (family.takes_distance or self_pairs):
        # With bfloat16 parts the root of a small distance is too large, and so is the gradient of a row's pair with itself.
        return (TF32X3.value,)
    if precision == "highest" and family.radial:
        return (BF16X3.value, TF32X3.value)
    return (PRODUCT_OF_PRECISION[precision],)


def _limit(family: Family, product: int, dtype: torch.dtype) -> float:
    """The largest γ·‖z−c‖² for these products."""
    if family.homogeneous:
        return math.inf
    exact = EXPONENT_ERROR[dtype] / torch.finfo(dtype).eps
    return exact if dtype == torch.float64 else _LIMIT.get(product, exact)


def near_distance(double: bool) -> float:
    """Squared distance of a near pair, relative to the largest ‖z−c‖²."""
    return 2 * (_NEAR_DOUBLE * ROUNDING_DOUBLE.value if double else _NEAR * ROUNDING.value)
