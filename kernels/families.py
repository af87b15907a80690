"""The families of kernels on the GPU. What differs between them in a kernel is here.

A family is one record, `Family`, and one branch of `phi`. `phi` takes t', a multiple of the t of `fastvae.radial`:

- −scale·t for a function of t: the exponent −½‖u_i − u_j‖² of rows u that are scaled by √(2·scale·γ);
- −scale·√(2t) for a function of the distance: −√(½‖u_i − u_j‖²) of rows that are scaled by √(4·scale²·γ);
- t = u_i·u_j for a polynomial, whose rows are scaled by √γ.

A sum of unlike kernels has one part for each kernel and bandwidth. Its rows are scaled by √(2γ_0). The plan's table has the factors from
−½‖u_i − u_j‖², or from its root, to the t' of each part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastvae import kernel_sums
from fastvae.kernels.products import INTERPRETED
from fastvae.radial import RBF, Kernel, Laplace, Matern32, Matern52, Polynomial, RationalQuadratic, Riesz, Sum

LOG2_E = tl.constexpr(kernel_sums.LOG2_E)

# `Family.number`: which branch of `phi`. The rational quadratic has one for α = 1, for α = ½ and for a large α.
GAUSSIAN = tl.constexpr(0)
RATIONAL_QUADRATIC = tl.constexpr(1)
RATIONAL_QUADRATIC_HALF = tl.constexpr(2)
RATIONAL_QUADRATIC_ONE = tl.constexpr(3)
RATIONAL_QUADRATIC_LARGE = tl.constexpr(4)
LAPLACE = tl.constexpr(5)
ENERGY = tl.constexpr(6)
POLYNOMIAL = tl.constexpr(7)
MATERN_32 = tl.constexpr(8)
MATERN_52 = tl.constexpr(9)
RIESZ = tl.constexpr(10)
MIXED = tl.constexpr(11)


class Family(NamedTuple):
    """What a kernel knows of a family when it is compiled: the constexpr FAMILY."""

    number: int  # the branch of `phi`
    scale: float  # of t, see the module's docstring; the rational quadratic's is 1/α, or 1 where α is in the table
    parameters: int = 0  # how many numbers `phi` takes besides t', such as α or coefficients
    first_parameter: int = 0  # where they start among those of all parts of a sum
    neg_dphi_factor: float = 1.0  # −φ'(t) is this times the second result of `phi`, and times √(2t)⁻¹·scale⁻¹ if `takes_distance`
    padding: float = -float("inf")  # −½‖u‖² of a padded column, with which its k is zero and not nan
    radial: bool = True  # t is a multiple of ‖x−y‖², not of x·y
    takes_distance: bool = False  # φ is a function of √t with a slope at 0; pairs closer than rounding error count as identical
    homogeneous: bool = False  # φ(c·t) is a multiple of φ(t), so that a sum over bandwidths is a multiple of one of its kernels
    parts: tuple[Family, ...] = ()  # of a sum, one for each kernel and bandwidth


# Largest α for which the fast logarithm of 1 − t is used, rounded: with their errors of 2⁻²¹ and 2⁻²⁴ the value's is then 6e-6.
_LARGEST_FAST_ALPHA = 16.0


def family_of(kernel: Kernel) -> Family:
    """The constexpr FAMILY."""
    kernel, _ = kernel.canonical()
    if type(kernel) is RBF:
        return Family(GAUSSIAN.value, scale=LOG2_E.value)
    if type(kernel) is RationalQuadratic:
        return _rational_quadratic(float(kernel.alpha))
    if type(kernel) is Laplace:
        return Family(
            LAPLACE.value,
            scale=LOG2_E.value,
            neg_dphi_factor=LOG2_E.value,
            padding=-1e30,
            takes_distance=True,
        )
    if type(kernel) in (Matern32, Matern52):
        # φ' at 0 is −steepness; t' = −u², with u = √(2ν)·d/h times log₂e.
        number, two_nu = (MATERN_32, 3) if type(kernel) is Matern32 else (MATERN_52, 5)
        return Family(number.value, scale=2 * two_nu * LOG2_E.value**2, neg_dphi_factor=kernel.steepness, padding=-1e30)
    if type(kernel) is Riesz:
        # A positive exponent is that of an identical pair.
        number, parameters = (ENERGY, 0) if kernel.r == 1 else (RIESZ, 1)
        return Family(number.value, 1.0, parameters, padding=3e38, takes_distance=True, homogeneous=True)
    if type(kernel) is Polynomial:
        return Family(POLYNOMIAL.value, scale=1.0, parameters=int(kernel.degree), padding=0.0, radial=False)
    if type(kernel) is Sum:
        parts, parameters = [], 0
        for term in kernel.terms:
            part = family_of(term.kernel)
            parts.append(part._replace(first_parameter=parameters))
            parameters += part.parameters
        takes_distance = any(part.takes_distance for part in parts)
        return Family(MIXED.value, scale=1.0, parameters=parameters, takes_distance=takes_distance, parts=tuple(parts))
    raise NotImplementedError(f"{type(kernel).__name__} has no Triton implementation: add it to kernels/families.py")


def _rational_quadratic(alpha: float) -> Family:
    if alpha in (0.5, 1.0):
        number = RATIONAL_QUADRATIC_HALF if alpha == 0.5 else RATIONAL_QUADRATIC_ONE
        return Family(number.value, scale=1 / alpha, parameters=1)
    number = RATIONAL_QUADRATIC if alpha <= _LARGEST_FAST_ALPHA else RATIONAL_QUADRATIC_LARGE
    return Family(number.value, scale=1.0, parameters=1)


# Neither the interpreter nor AMD's library has the fast logarithm.
_PLAIN_LOG = tl.constexpr(INTERPRETED.value or torch.version.hip is not None)


@triton.jit
def _log2(t):
    if t.dtype == tl.float64 or _PLAIN_LOG:
        return tl.log2(t)
    else:
        # The compiler's own is exact for denormal numbers too, for thirty instructions.
        return libdevice.fast_log2f(t)


@triton.jit
def _log2_of_one_minus(t, FAMILY: tl.constexpr):
    """log₂(1 − t) for t ≤ 0."""
    if t.dtype == tl.float64:
        return tl.log2(1.0 - t)
    elif FAMILY.number == RATIONAL_QUADRATIC_LARGE:
        # Not −∞, as of a padded column, from which nothing can be subtracted; a nan passes.
        t = tl.where(t < -1e30, -1e30, t)
        base = 1.0 - t
        return tl.log2(base) + ((1.0 - base) - t) * LOG2_E / base
    else:
        return _log2(1.0 - t)


@triton.jit
def phi(t, parameters, FAMILY: tl.constexpr, GRADIENT: tl.constexpr):
    """φ, without φ(0) if it is a polynomial; and −φ' up to the factors of `Family.neg_dphi_factor` (φ' of a polynomial)."""
    PARAMETERS: tl.constexpr = FAMILY.parameters
    FIRST: tl.constexpr = FAMILY.first_parameter
    value = t
    neg_dphi = t
    if FAMILY.number == GAUSSIAN or FAMILY.number == LAPLACE:
        value = tl.exp2(t)
        neg_dphi = value
    elif FAMILY.number == RATIONAL_QUADRATIC_ONE:
        root = tl.rsqrt(1.0 - t)
        value = root * root
        neg_dphi = value * value
    elif FAMILY.number == RATIONAL_QUADRATIC_HALF:
        value = tl.rsqrt(1.0 - t)
        neg_dphi = value * value * value
    elif FAMILY.number == RATIONAL_QUADRATIC or FAMILY.number == RATIONAL_QUADRATIC_LARGE:
        log = _log2_of_one_minus(t, FAMILY)
        value = tl.exp2(-parameters[FIRST] * log)
        if GRADIENT:
            neg_dphi = tl.exp2((-1.0 - parameters[FIRST]) * log)
    elif FAMILY.number == MATERN_32 or FAMILY.number == MATERN_52:
        # Rounding may make t' of near rows positive. A comparison with nan is false: nan stays nan.
        root = tl.sqrt(tl.where(t > 0.0, 0.0, -t))
        power = tl.exp2(-root)
        u = root * (1.0 / LOG2_E)
        if FAMILY.number == MATERN_32:
            neg_dphi = power
            value = power + power * u
        else:
            neg_dphi = power + power * u
            value = neg_dphi + power * u * u * (1.0 / 3.0)
    elif FAMILY.number == ENERGY:
        neg_dphi = tl.zeros_like(t) + 1.0
    elif FAMILY.number == RIESZ:
        # t' is 0 for a pair that counts as identical.
        r = parameters[FIRST]
        log = _log2(tl.where(t == 0.0, 1.0, -t))
        value = tl.where(t == 0.0, 0.0, -tl.exp2(r * log))
        if GRADIENT:
            neg_dphi = tl.where(t == 0.0, 0.0, r * tl.exp2((r - 1.0) * log))
    elif FAMILY.number == POLYNOMIAL:
        value = t * parameters[0]
        neg_dphi = 0.0 * t + parameters[0] * PARAMETERS
        for n in tl.static_range(1, PARAMETERS):
            value = (value + parameters[n]) * t
            if GRADIENT:
                neg_dphi = neg_dphi * t + parameters[n] * (PARAMETERS - n)
    else:
        tl.static_assert(False, "phi has no branch for this family")
    return value, neg_dphi


@triton.jit
def second_derivative(t, neg_dphi, parameters, FAMILY: tl.constexpr):
    """The derivative to t' of the second result of `phi`, from t' and that result; of a Matérn kernel 0 at t' = 0."""
    PARAMETERS: tl.constexpr = FAMILY.parameters
    FIRST: tl.constexpr = FAMILY.first_parameter
    derivative = tl.zeros_like(t)
    if FAMILY.number == GAUSSIAN or FAMILY.number == LAPLACE:
        derivative = neg_dphi * (1.0 / LOG2_E)
    elif FAMILY.number == RATIONAL_QUADRATIC_ONE or FAMILY.number == RATIONAL_QUADRATIC_HALF:
        root = tl.rsqrt(1.0 - t)
        derivative = neg_dphi * (root * root) * (2.0 if FAMILY.number == RATIONAL_QUADRATIC_ONE else 1.5)
    elif FAMILY.number == RATIONAL_QUADRATIC or FAMILY.number == RATIONAL_QUADRATIC_LARGE:
        derivative = neg_dphi * (parameters[FIRST] + 1.0) / (1.0 - t)
    elif FAMILY.number == MATERN_32:
        # A comparison with nan is false: nan stays nan.
        derivative = neg_dphi * tl.where(t >= 0.0, 0.0, tl.rsqrt(-t)) * (0.5 / LOG2_E)
    elif FAMILY.number == MATERN_52:
        derivative = tl.exp2(-tl.sqrt(tl.where(t > 0.0, 0.0, -t))) * (0.5 / (LOG2_E * LOG2_E))
    elif FAMILY.number == RIESZ:
        derivative = tl.where(t == 0.0, 0.0, neg_dphi * (parameters[FIRST] - 1.0) / t)
    elif FAMILY.number == POLYNOMIAL:
        for n in tl.static_range(PARAMETERS - 1):
            derivative = derivative * t + parameters[n] * ((PARAMETERS - n) * (PARAMETERS - n - 1))
    else:
        tl.static_assert(FAMILY.number == ENERGY, "second_derivative has no branch for this family")
    return derivative


@triton.jit
def log2_phi(t, parameters, FAMILY: tl.constexpr):
    """log₂ φ, finite where φ underflows, and −φ'/φ up to the factors of `Family.neg_dphi_factor`."""
    value = t
    ratio = tl.zeros_like(t) + 1.0
    if FAMILY.number == MATERN_32 or FAMILY.number == MATERN_52:
        # As in `phi`.
        root = tl.sqrt(tl.where(t > 0.0, 0.0, -t))
        u = root * (1.0 / LOG2_E)
        polynomial = 1.0 + u
        if FAMILY.number == MATERN_52:
            polynomial += u * u * (1.0 / 3.0)
            ratio += u
        value = _log2(polynomial) - root
        ratio /= polynomial
    elif FAMILY.number != GAUSSIAN and FAMILY.number != LAPLACE:
        value = -_log2_of_one_minus(t, FAMILY)
        ratio = 1.0 / (1.0 - t)
        if FAMILY.number == RATIONAL_QUADRATIC_HALF:
            value = 0.5 * value
        elif FAMILY.number == RATIONAL_QUADRATIC or FAMILY.number == RATIONAL_QUADRATIC_LARGE:
            value = parameters[0] * value
        else:
            tl.static_assert(FAMILY.number == RATIONAL_QUADRATIC_ONE, "log2_phi has no branch for this family")
    return value, ratio


@triton.jit
def squared_scale(gamma, values, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """The square of the scale of the rows."""
    if FAMILY.number == MIXED:
        return gamma * 2
    elif FAMILY.takes_distance:
        return gamma * (4 * FAMILY.scale * FAMILY.scale)
    elif FAMILY.number == RATIONAL_QUADRATIC or FAMILY.number == RATIONAL_QUADRATIC_LARGE:
        return gamma * 2 / values[2 * KERNELS]
    elif FAMILY.radial:
        return gamma * (2 * FAMILY.scale)
    else:
        return gamma


# Least ‖u‖² of the farthest row for a function of the distance, in float32 and float64: k is then φ(0), and squared distances are normal
# numbers.
_LEAST_NORM2, _LEAST_NORM2_DOUBLE = tl.constexpr(1e-24), tl.constexpr(1e-40)


@triton.jit
def representable_gamma(gamma, furthest, dtype: tl.constexpr, FAMILY: tl.constexpr):
    """The γ that a function of the distance is evaluated with; the plan corrects for the ratio of the two.

    A homogeneous kernel has the same shape at each γ, and any other is φ(0) less a multiple of the distance at all small ones.
    """
    # Scales of denormal numbers overflow float32.
    furthest = tl.maximum(furthest, 1e-70)
    if FAMILY.homogeneous:
        return 0.25 / furthest
    else:
        least = (_LEAST_NORM2_DOUBLE if dtype == tl.float64 else _LEAST_NORM2) / (furthest * (4 * FAMILY.scale * FAMILY.scale))
        # A comparison with nan is false: nan stays nan.
        return tl.where(gamma < least, least, gamma)


@triton.jit
def ratios_to(gamma, gammas, b: tl.constexpr, values, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """By what factor t', or φ of a homogeneous kernel, and −φ'(t)·γ of the b-th bandwidth exceed those of `gamma`.

    For a part of a sum: by what factor its t' exceeds −½‖u_i − u_j‖² or −√(½‖u_i − u_j‖²), and its −φ'(t)·γ the second result of `phi`.
    """
    ratio = gammas[b] / gamma
    slope_ratio = ratio
    if FAMILY.number == MIXED:
        PART: tl.constexpr = FAMILY.parts[b]
        if PART.takes_distance:
            slope_ratio = tl.sqrt(0.5 * ratio)
            ratio = tl.sqrt(2.0 * ratio) * PART.scale
        elif PART.number == RATIONAL_QUADRATIC or PART.number == RATIONAL_QUADRATIC_LARGE:
            ratio = ratio / values[2 * KERNELS + PART.first_parameter]
        else:
            slope_ratio = ratio * PART.neg_dphi_factor
            ratio = ratio * PART.scale
    elif FAMILY.takes_distance:
        ratio = tl.sqrt(ratio)
        if FAMILY.number == RIESZ:
            ratio = tl.exp2(values[2 * KERNELS] * tl.log2(ratio))
        slope_ratio = ratio
    return ratio, slope_ratio


@triton.jit
def inverse_distance(exponent, least):
    """1/√−exponent, and 0 from the exponent `least` on, that of an identical pair. A comparison with nan is false: nan stays nan."""
    return tl.where(exponent >= least, 0.0, tl.rsqrt(-exponent))


# Which closed form a row adds by itself.
NO_CLOSED_FORM, NORMAL_PRIOR, POLYNOMIAL_DIAGONAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def exp_minus_one_if(t, subtract_one):
    """exp(t), or exp(t) − 1 without cancellation."""
    power = tl.exp(t)
    # Kahan's quotient: (e^t − 1)·t/log(e^t) of the rounded power.
    log = tl.log(power)
    minus_one = tl.where(power == 1.0, t, (power - 1.0) * t / tl.where(log == 0.0, 1.0, log))
    minus_one = tl.where(power == 0.0, -1.0, minus_one)
    return tl.where(subtract_one, minus_one, power)


@triton.jit
def closed_form_term(norm2, p, constants, values, gammas, CLOSED_FORM: tl.constexpr, FAMILY: tl.constexpr, KERNELS: tl.constexpr):
    """What a row z with ‖z‖² = `norm2` and weight p adds to MMD² by itself, and s of its gradient s·z, in float64.

    Against N(0, I) it is −2·p·Σ_b a_b·E_y k_b(z, y), for a polynomial p²·(k(z, z) − k(0, 0)).
    """
    PARAMETERS: tl.constexpr = FAMILY.parameters
    value = tl.zeros_like(norm2)
    slope = tl.zeros_like(norm2)
    if CLOSED_FORM == NORMAL_PRIOR:
        for b in tl.static_range(KERNELS):
            weight = values[KERNELS + b]
            steepness = values[4 * KERNELS + b]
            exponent = values[3 * KERNELS + b] - 0.5 * steepness * norm2
            value -= weight * exp_minus_one_if(exponent, constants[b] > 0)
            slope += weight * steepness * tl.exp(exponent)
        value *= 2 * p
        slope *= 2 * p
    elif CLOSED_FORM == POLYNOMIAL_DIAGONAL:
        gamma = gammas[0]
        t = gamma * norm2
        for n in tl.static_range(PARAMETERS):
            slope = slope * t + value
            value = value * t + values[2 * KERNELS + n]
        # Horner's scheme of Σ c_n·t^n ends with the power 0, which this lacks.
        slope = slope * t + value
        value = value * t
        value *= p * p
        slope *= 2 * p * p * gamma
    return value, slope
