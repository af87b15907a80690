"""Sums of kernels over bandwidths, Σ_b a_b·k_b, evaluated on a tile of pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae import kernel_sums
from fastvae.kernels.families import (
    GAUSSIAN,
    MATERN_32,
    MATERN_52,
    MIXED,
    Family,
    family_of,
    inverse_distance,
    log2_phi,
    phi,
    second_derivative,
)
from fastvae.kernels.products import DIFFERENCES
from fastvae.radial import Kernel, Polynomial, RationalQuadratic, Riesz

_SHIFT_BELOW = tl.constexpr(kernel_sums.SHIFT_BELOW)

# Bandwidths whose three coefficients each a thread keeps in registers. More are read again for each tile.
MOST_IN_REGISTERS = tl.constexpr(6)

# Bits of one bandwidth in the constexpr SQUARINGS.
_SQUARING_BITS = 3


def pack_squarings(squarings: tuple[int, ...]) -> int:
    """The constexpr SQUARINGS: how many squarings lead from each bandwidth's power to that of the next."""
    return sum(n << (_SQUARING_BITS * b) for b, n in enumerate(squarings))


@triton.jit
def load_numbers(numbers, COUNT: tl.constexpr, ON_DEVICE: tl.constexpr):
    """`fastvae.kernel_sums.KernelNumbers` in float64, from a tensor or from three float32 that sum to each."""
    values = ()
    for n in tl.static_range(COUNT):
        if ON_DEVICE:
            values += (tl.load(numbers + n),)
        else:
            high, middle, low = numbers[3 * n], numbers[3 * n + 1], numbers[3 * n + 2]
            values += (tl.cast(high, tl.float64) + tl.cast(middle, tl.float64) + tl.cast(low, tl.float64),)
    return values


@triton.jit
def gammas_of(values, FAMILY: tl.constexpr, KERNELS: tl.constexpr, FEATURES: tl.constexpr):
    """γ of each bandwidth, nan where the bandwidth is not positive."""
    gammas = ()
    for b in tl.static_range(KERNELS):
        h2 = values[b] * values[b]
        gamma = 0.5 / h2 if FAMILY.radial else 1.0 / (FEATURES * h2)
        gammas += (tl.where(values[b] > 0, gamma, float("nan")),)
    return gammas


@triton.jit
def _subtracted_constant(t, FAMILY: tl.constexpr, b: tl.constexpr):
    PART: tl.constexpr = FAMILY.parts[b] if FAMILY.number == MIXED else FAMILY
    if PART.takes_distance:
        t = tl.sqrt(2.0 * t)
    # φ(0) of a homogeneous kernel is 0.
    return tl.where(t < (0.0 if PART.homogeneous else _SHIFT_BELOW), 1.0, 0.0).to(tl.float64)


@triton.jit
def subtracted_constants(spread, gammas, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """1 for each bandwidth of which k − φ(0) is summed, else 0. `spread` is the mean squared distance of two rows."""
    constants = ()
    for b in tl.static_range(KERNELS):
        constants += (_subtracted_constant(gammas[b] * spread, FAMILY, b),)
    return constants


@triton.jit
def load_table(table_ptr, FAMILY: tl.constexpr, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr):
    """Ratios, weights and slopes of the bandwidths as scalars, those that are needed, if they are few enough to stay in registers."""
    table = ()
    if BANDWIDTHS > 1 and BANDWIDTHS <= MOST_IN_REGISTERS:
        for n in tl.static_range(3 * BANDWIDTHS):
            if (n < BANDWIDTHS and ((n == 0 and FAMILY.number != MIXED) or (SQUARINGS >> (3 * n)) & 7 != 0)) or (
                n >= 2 * BANDWIDTHS and not GRADIENT
            ):
                table += (0.0,)
            else:
                table += (tl.load(table_ptr + n),)
    return table


@triton.jit
def load_parameters(table_ptr, FAMILY: tl.constexpr, BANDWIDTHS: tl.constexpr, PRODUCT: tl.constexpr):
    """The numbers behind the bandwidths in the table: the parameters of φ, then from which exponent on a pair counts as identical."""
    PARAMETERS: tl.constexpr = FAMILY.parameters
    parameters = ()
    for n in tl.static_range(PARAMETERS):
        parameters += (tl.load(table_ptr + (3 * BANDWIDTHS + n)),)
    if FAMILY.takes_distance:
        least = tl.load(table_ptr + (3 * BANDWIDTHS + PARAMETERS))
        # Not times zero: of rows far apart it may be infinite.
        parameters += (tl.zeros_like(least) if PRODUCT == DIFFERENCES else least,)
    return parameters


@triton.jit
def _entry(table, table_ptr, n: tl.constexpr, BANDWIDTHS: tl.constexpr):
    if BANDWIDTHS <= MOST_IN_REGISTERS:
        return table[n]
    else:
        return tl.load(table_ptr + n)


@triton.jit
def _evaluate_gaussians(
    exponent, table, table_ptr, value_constant, slope_constant, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr
):
    power = tl.exp2(exponent)
    if BANDWIDTHS == 1:
        value = power - value_constant
        return value, value
    else:
        value = power * _entry(table, table_ptr, BANDWIDTHS, BANDWIDTHS) - value_constant
        neg_dphi = value
        if GRADIENT:
            neg_dphi = power * _entry(table, table_ptr, 2 * BANDWIDTHS, BANDWIDTHS) - slope_constant
        for b in tl.static_range(1, BANDWIDTHS):
            if (SQUARINGS >> (3 * b)) & 7 == 0:
                power = tl.exp2(exponent * _entry(table, table_ptr, b, BANDWIDTHS))
            else:
                for _ in tl.static_range((SQUARINGS >> (3 * b)) & 7):
                    power = power * power
            value += power * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
            if GRADIENT:
                neg_dphi += power * _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
        return value, neg_dphi


@triton.jit
def _evaluate_part(exponent, neg_distance, inverse, ratio, parameters, b: tl.constexpr, FAMILY: tl.constexpr, GRADIENT: tl.constexpr):
    PART: tl.constexpr = FAMILY.parts[b]
    t = (neg_distance if PART.takes_distance else exponent) * ratio
    if PART.number == MATERN_32 or PART.number == MATERN_52:
        # An infinite distance times k = 0 is nan.
        t = tl.where(t < -1e30, -1e30, t)
    k, neg_dphi = phi(t, parameters, PART, GRADIENT)
    if PART.takes_distance:
        neg_dphi = neg_dphi * inverse
    return k, neg_dphi


@triton.jit
def _evaluate_parts(
    exponent, table, table_ptr, parameters, value_constant, FAMILY: tl.constexpr, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr
):
    PARAMETERS: tl.constexpr = FAMILY.parameters
    # A padded column, whose k and slope are 0. Some parts would be nan there, and others infinite.
    padded = exponent == float("-inf")
    exponent = tl.where(padded, -1e30, exponent)
    neg_dphi = tl.zeros_like(exponent)
    # Each k near its constant brings the sum closer to zero, where it is rounded less.
    value = neg_dphi - value_constant
    inverse = exponent
    if FAMILY.takes_distance:
        inverse = inverse_distance(exponent, parameters[PARAMETERS])
    neg_distance = exponent * inverse
    for b in tl.static_range(BANDWIDTHS):
        ratio = _entry(table, table_ptr, b, BANDWIDTHS)
        k, s = _evaluate_part(exponent, neg_distance, inverse, ratio, parameters, b, FAMILY, GRADIENT)
        value += k * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
        if GRADIENT:
            neg_dphi += s * _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
    return tl.where(padded, -value_constant, value), tl.where(padded, 0.0, neg_dphi)


@triton.jit
def evaluate_sum(
    exponent, table, table_ptr, parameters, value_constant, slope_constant,
    FAMILY: tl.constexpr, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr,
):  # fmt: skip
    """Σ_b a_b·k_b and Σ_b a_b·(γ_b/γ_0)·(−φ'(t_b)), each less its constant; k_0 − constant and −φ'(t_0) for one bandwidth.

    −φ' lacks its `neg_dphi_factor` and, if it is unbounded, is over √−exponent: the plan's GRADIENT_SCALE has the rest.
    """
    if FAMILY.number == GAUSSIAN:
        return _evaluate_gaussians(exponent, table, table_ptr, value_constant, slope_constant, GRADIENT, BANDWIDTHS, SQUARINGS)
    elif FAMILY.number == MIXED:
        return _evaluate_parts(exponent, table, table_ptr, parameters, value_constant, FAMILY, GRADIENT, BANDWIDTHS)
    else:
        PARAMETERS: tl.constexpr = FAMILY.parameters
        t = exponent
        if FAMILY.takes_distance:
            inverse = inverse_distance(exponent, parameters[PARAMETERS])
            t = exponent * inverse
        value, neg_dphi = phi(t, parameters, FAMILY, GRADIENT)
        if BANDWIDTHS > 1:
            value = value * _entry(table, table_ptr, BANDWIDTHS, BANDWIDTHS)
            if GRADIENT:
                neg_dphi = neg_dphi * _entry(table, table_ptr, 2 * BANDWIDTHS, BANDWIDTHS)
            for b in tl.static_range(1, BANDWIDTHS):
                k, s = phi(t * _entry(table, table_ptr, b, BANDWIDTHS), parameters, FAMILY, GRADIENT)
                value += k * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
                if GRADIENT:
                    neg_dphi += s * _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
        if FAMILY.takes_distance:
            neg_dphi = neg_dphi * inverse
        if FAMILY.radial and not FAMILY.homogeneous:
            value = value - value_constant
        return value, neg_dphi


# The largest inverse distance of which the square is finite with some room.
_MOST_INVERSE, _MOST_INVERSE_DOUBLE = tl.constexpr(1e18), tl.constexpr(1e150)


@triton.jit
def evaluate_change(exponent, change, table, table_ptr, parameters, FAMILY: tl.constexpr, OF_SLOPE: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """Value and slope of `evaluate_sum` without constants, and if OF_SLOPE by how much the slope changes as the exponent does by `change`.

    The table is one for the gradient, without squarings. Sums of unlike kernels are evaluated one kernel at a time.
    """
    tl.static_assert(FAMILY.number != MIXED, "evaluate_change takes one kernel")
    PARAMETERS: tl.constexpr = FAMILY.parameters
    t = exponent
    inverse = exponent
    if FAMILY.takes_distance:
        inverse = inverse_distance(exponent, parameters[PARAMETERS])
        t = exponent * inverse
    value, slope = phi(t, parameters, FAMILY, True)
    derivative = slope
    if OF_SLOPE:
        derivative = second_derivative(t, slope, parameters, FAMILY)
    if BANDWIDTHS > 1:
        first = _entry(table, table_ptr, 2 * BANDWIDTHS, BANDWIDTHS)
        value, slope, derivative = value * _entry(table, table_ptr, BANDWIDTHS, BANDWIDTHS), slope * first, derivative * first
        for b in tl.static_range(1, BANDWIDTHS):
            ratio = _entry(table, table_ptr, b, BANDWIDTHS)
            weight = _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
            k, s = phi(t * ratio, parameters, FAMILY, True)
            value += k * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
            slope += s * weight
            if OF_SLOPE:
                derivative += second_derivative(t * ratio, s, parameters, FAMILY) * (weight * ratio)
    if FAMILY.takes_distance:
        if OF_SLOPE:
            # Of Σ_b w_b·s_b(t'·ratio_b)/√−exponent, with t' = −√−exponent. Its third power may overflow where that of the change times it
            # does not.
            near = tl.minimum(inverse, _MOST_INVERSE_DOUBLE if exponent.dtype == tl.float64 else _MOST_INVERSE)
            derivative = (derivative + slope * near) * (0.5 * near) * (near * change)
        slope = slope * inverse
    elif OF_SLOPE:
        derivative = derivative * change
    return value, slope, derivative


@triton.jit
def evaluate_log2(exponent, parameters, FAMILY: tl.constexpr):
    """log₂ k of one bandwidth without its weight, and −φ'(t)/φ(t) as that of `evaluate_sum`."""
    PARAMETERS: tl.constexpr = FAMILY.parameters
    t = exponent
    if FAMILY.takes_distance:
        inverse = inverse_distance(exponent, parameters[PARAMETERS])
        t = exponent * inverse
    value, ratio = log2_phi(t, parameters, FAMILY)
    if FAMILY.takes_distance:
        ratio = ratio * inverse
    return value, ratio


def term_count(family: Family, bandwidths: int) -> int:
    """How many `bandwidth_terms` there are."""
    return (1 if family.homogeneous else 2 * bandwidths) if family.radial else family.parameters


@triton.jit
def _bandwidth(group, b: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """The b-th bandwidth of a group; the last one again where there are no more."""
    return tl.minimum(group * (TERMS // 2) + b, BANDWIDTHS - 1)


@triton.jit
def term_number(group, t: tl.constexpr, FAMILY: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """The number among all `bandwidth_terms` of the t-th of a group."""
    if FAMILY.homogeneous or not FAMILY.radial:
        return t
    else:
        return 2 * _bandwidth(group, t // 2, TERMS, BANDWIDTHS) + t % 2


@triton.jit
def load_group(table_ptr, group, FAMILY: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr, TABLE: tl.constexpr):
    """Ratio and subtracted constant of each bandwidth of a group."""
    table = ()
    if FAMILY.radial and not FAMILY.homogeneous:
        for b in tl.static_range(TERMS // 2):
            entry_ptr = table_ptr + _bandwidth(group, b, TERMS, BANDWIDTHS)
            table += (tl.load(entry_ptr) if BANDWIDTHS > 1 else 1.0, tl.load(entry_ptr + (TABLE - BANDWIDTHS)))
    return table


@triton.jit
def bandwidth_terms(exponent, table, parameters, FAMILY: tl.constexpr, TERMS: tl.constexpr):
    """The terms whose sums give the derivatives to bandwidths and weights: for each bandwidth of a group k_b less its constant, and t'·s_b.

    s_b is the second result of `phi`, t' the argument of the widest bandwidth. A homogeneous kernel has k_0 alone, of which all others are
    multiples; a polynomial has the powers of t_0 from the first on. Sums of unlike kernels take a sweep for each of them instead.
    """
    PARAMETERS: tl.constexpr = FAMILY.parameters
    terms = ()
    if not FAMILY.radial:
        power = exponent
        for _ in tl.static_range(TERMS):
            terms += (power,)
            power = power * exponent
    else:
        t = exponent
        if FAMILY.takes_distance:
            t = exponent * inverse_distance(exponent, parameters[PARAMETERS])
        if FAMILY.homogeneous:
            value, _ = phi(t, parameters, FAMILY, False)
            terms += (value,)
        else:
            # A padded column has t' = −∞ and s = 0.
            finite = tl.where(t == float("-inf"), 0.0, t)
            for b in tl.static_range(TERMS // 2):
                k, s = phi(t * table[2 * b], parameters, FAMILY, True)
                terms += (k - table[2 * b + 1], finite * s)
    return terms


def bandwidth_sums(kernel: Kernel, sums: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over pairs of each k_b and of each ∂k_b/∂log h_b = −2·t_b·φ'(t_b), (..., B), from those of `bandwidth_terms`.

    `ratios` is γ_b/γ_0, shape (B,). Where φ(0) is subtracted from k_b in `sums`, it is in the result too.
    """
    family = family_of(kernel)
    if isinstance(kernel, Polynomial):
        terms = [(n, c * sums[:, n - 1 : n] * ratios**n) for n, c in kernel.powers]
        return torch.stack([term for _, term in terms]).sum(0), torch.stack([-2 * n * term for n, term in terms]).sum(0)
    if isinstance(kernel, Riesz):
        values = sums * ratios ** (0.5 * kernel.r)
        return values, -kernel.r * values
    scale = 1 / kernel.alpha if isinstance(kernel, RationalQuadratic) else family.scale
    # t' is −scale·t, or −scale·√(2t) for a function of the distance.
    if family.takes_distance:
        factors = -family.neg_dphi_factor / scale**2 * ratios.sqrt()
    else:
        factors = -2 * family.neg_dphi_factor / scale * ratios
    return sums[:, ::2], factors * sums[:, 1::2]
