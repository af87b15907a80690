"""What the kernels over pairs of rows share: products in every precision, φ and φ' of every family, and the operands of a sample.

Rows come in scaled so that the product with the norms added, u_i·u_j − ½‖u_i‖² − ½‖u_j‖² = −½‖u_i − u_j‖², is what φ takes of the widest
bandwidth: −t_0·log₂e for RBF, −t_0/α for the rational quadratic, −(d·log₂e/h_0)² for Laplace unless that vanishes, −d² in units of the
data's own for energy. Of a polynomial it is u_i·u_j = t_0.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastvae.kernel_sums import EXPONENT_ERROR, LOG2_E
from fastvae.radial import RBF, Energy, Kernel, Laplace, Polynomial, RationalQuadratic

# How products are taken. The last takes no product for the exponent: it sums squares of differences, feature by feature.
IEEE = tl.constexpr(0)
TF32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
SPLIT = tl.constexpr(3)
SPLIT_TF32 = tl.constexpr(4)
DIFFERENCES = tl.constexpr(5)
PRECISION = {"ieee": IEEE.value, "high": TF32.value, "medium": BF16.value, "highest": SPLIT.value}

# The constexpr FAMILY; from POLYNOMIAL on its degree is added.
GAUSSIAN = tl.constexpr(0)
QUADRATIC = tl.constexpr(1)
QUADRATIC_HALF = tl.constexpr(2)
QUADRATIC_ONE = tl.constexpr(3)
LAPLACE = tl.constexpr(4)
ENERGY = tl.constexpr(5)
QUADRATIC_STEEP = tl.constexpr(6)
POLYNOMIAL = tl.constexpr(16)

# Largest α of (1 − t)^−α by the fast logarithm of 1 − t rounded: their errors, 2⁻²¹ and 2⁻²⁴, are then together one of 6e-6 in the value.
_FAST_ALPHA = 16.0

_LOG2_E = tl.constexpr(LOG2_E)

# Bandwidths whose 3 coefficients each a thread keeps in registers; more are read again for each tile.
MAX_HOISTED = tl.constexpr(6)

# Steepest γ·‖x‖² at which products of float32 keep the gradient to 1e-4 (to 5e-6 in IEEE mode), as benchmarks/accuracy.py shows: two
# bfloat16 parts place a point to 2⁻¹⁷ of its norm, two tf32 parts to 2⁻²².
_LIMIT = {SPLIT.value: 12.0, SPLIT_TF32.value: 256.0, IEEE.value: 64.0}

# Rounding of ‖u_i − u_j‖² by products, relative to the largest ‖u‖², of points as the products see them: nearer pairs count as coincident
# where φ is a function of the root.
_ROUNDING = 2.0**-20
_ROUNDING_DOUBLE = 2.0**-49

# A function of the root takes differences where more than this share of pairs is so near, relative to the rounding, that it turns their
# direction by 1e-3, or by 1e-7 in float64.
_NEAR, _NEAR_DOUBLE, NEAR_SHARE = 2.0**10, 2.0**24, tl.constexpr(2.0**-8)

# Three bits of the constexpr SQUARINGS are the squarings of one bandwidth.
_SQUARING_BITS = 3

# Triton's interpreter keeps bfloat16 as bits, which its dot would multiply.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Neither the interpreter nor AMD's library has the fast logarithm.
_PLAIN_LOG = tl.constexpr(_INTERPRETED.value or torch.version.hip is not None)


@triton.jit
def dot(a_hi, a_lo, b_hi, b_lo, acc, MODE: tl.constexpr):
    """a @ b + acc; in a split mode a = a_hi + a_lo, b = b_hi + b_lo, without the product of the two low parts."""
    if _INTERPRETED and (MODE == BF16 or MODE == SPLIT):  # noqa: SIM109, Triton has no `in`
        a_hi, a_lo, b_hi, b_lo = a_hi.to(tl.float32), a_lo.to(tl.float32), b_hi.to(tl.float32), b_lo.to(tl.float32)
    if MODE == SPLIT:
        acc = tl.dot(a_lo, b_hi, acc)
        acc = tl.dot(a_hi, b_lo, acc)
        return tl.dot(a_hi, b_hi, acc)
    elif MODE == SPLIT_TF32:
        acc = tl.dot(a_lo, b_hi, acc, input_precision="tf32")
        acc = tl.dot(a_hi, b_lo, acc, input_precision="tf32")
        return tl.dot(a_hi, b_hi, acc, input_precision="tf32")
    elif MODE == BF16:
        return tl.dot(a_hi, b_hi, acc)
    elif MODE == TF32:
        return tl.dot(a_hi, b_hi, acc, input_precision="tf32")
    else:
        return tl.dot(a_hi, b_hi, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def split(w, MODE: tl.constexpr):
    """w as the two operands that `dot` takes in this mode."""
    if MODE == SPLIT:
        # Truncated, not rounded: a rounding whose result is read back takes the unit that the exponentials need.
        hi = (w.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return hi.to(tl.bfloat16), (w - hi).to(tl.bfloat16)
    elif MODE == SPLIT_TF32:
        hi = (w.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        return hi, w - hi
    elif MODE == BF16:
        hi = w.to(tl.bfloat16)
        return hi, hi
    else:
        return w, w


@triton.jit
def load_parts(hi_ptrs, lo_ptrs, MODE: tl.constexpr):
    """Both parts in a split mode, one twice in others."""
    hi = tl.load(hi_ptrs)
    lo = hi
    if MODE == SPLIT or MODE == SPLIT_TF32:  # noqa: SIM109
        lo = tl.load(lo_ptrs)
    return hi, lo


@triton.jit
def load_table(table_ptr, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr):
    """Ratios, weights and slopes as scalars: those needed, loaded once where they are few enough to stay in registers."""
    table = ()
    if BANDWIDTHS > 1 and BANDWIDTHS <= MAX_HOISTED:
        for n in tl.static_range(3 * BANDWIDTHS):
            if (n < BANDWIDTHS and (n == 0 or (SQUARINGS >> (3 * n)) & 7 != 0)) or (n >= 2 * BANDWIDTHS and not GRADIENT):
                table += (0.0,)
            else:
                table += (tl.load(table_ptr + n),)
    return table


@triton.jit
def load_parameters(table_ptr, FAMILY: tl.constexpr, BANDWIDTHS: tl.constexpr, MODE: tl.constexpr):
    """What the family has for parameters, behind the table: α, where a pair counts as coincident, or coefficients."""
    parameters = ()
    if FAMILY == QUADRATIC or FAMILY == QUADRATIC_STEEP:  # noqa: SIM109
        parameters += (tl.load(table_ptr + 3 * BANDWIDTHS),)
    elif FAMILY == LAPLACE or FAMILY == ENERGY:  # noqa: SIM109
        least = tl.load(table_ptr + 3 * BANDWIDTHS)
        # Not times zero: of rows far apart it may be infinite.
        parameters += (tl.zeros_like(least) if MODE == DIFFERENCES else least,)
    elif FAMILY > POLYNOMIAL:
        for n in tl.static_range(FAMILY - POLYNOMIAL):
            parameters += (tl.load(table_ptr + (3 * BANDWIDTHS + n)),)
    return parameters


@triton.jit
def _entry(table, table_ptr, n: tl.constexpr, BANDWIDTHS: tl.constexpr):
    if BANDWIDTHS <= MAX_HOISTED:
        return table[n]
    else:
        return tl.load(table_ptr + n)


@triton.jit
def _gaussian(
    exponent, table, table_ptr, value_shift, slope_shift, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr
):
    power = tl.exp2(exponent)
    if BANDWIDTHS == 1:
        value = power - value_shift
        return value, value
    else:
        value = power * _entry(table, table_ptr, BANDWIDTHS, BANDWIDTHS) - value_shift
        slope = value
        if GRADIENT:
            slope = power * _entry(table, table_ptr, 2 * BANDWIDTHS, BANDWIDTHS) - slope_shift
        for b in tl.static_range(1, BANDWIDTHS):
            if (SQUARINGS >> (3 * b)) & 7 == 0:
                power = tl.exp2(exponent * _entry(table, table_ptr, b, BANDWIDTHS))
            else:
                for _ in tl.static_range((SQUARINGS >> (3 * b)) & 7):
                    power = power * power
            value += power * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
            if GRADIENT:
                slope += power * _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
        return value, slope


@triton.jit
def _log2_of_one_minus(t, FAMILY: tl.constexpr):
    """log₂(1 − t) for t ≤ 0."""
    if t.dtype == tl.float64:
        return tl.log2(1.0 - t)
    elif FAMILY == QUADRATIC_STEEP:
        # Not −∞, as of a padded column, from which nothing can be subtracted; a nan passes.
        t = tl.where(t < -1e30, -1e30, t)
        base = 1.0 - t
        return tl.log2(base) + ((1.0 - base) - t) * _LOG2_E / base
    elif _PLAIN_LOG:
        return tl.log2(1.0 - t)
    else:
        # The compiler's own is exact for denormal numbers too, for thirty instructions.
        return libdevice.fast_log2f(1.0 - t)


@triton.jit
def _phi(t, parameters, FAMILY: tl.constexpr, GRADIENT: tl.constexpr):
    """φ, without φ(0) where it is a polynomial, and ∓φ' up to a factor of the family, of t as the module's docstring scales it."""
    value = t
    slope = t
    if FAMILY == QUADRATIC_ONE:
        root = tl.rsqrt(1.0 - t)
        value = root * root
        slope = value * value
    elif FAMILY == QUADRATIC_HALF:
        value = tl.rsqrt(1.0 - t)
        slope = value * value * value
    elif FAMILY == QUADRATIC or FAMILY == QUADRATIC_STEEP:  # noqa: SIM109
        log = _log2_of_one_minus(t, FAMILY)
        value = tl.exp2(-parameters[0] * log)
        if GRADIENT:
            slope = tl.exp2((-1.0 - parameters[0]) * log)
    elif FAMILY == LAPLACE:
        value = tl.exp2(t)
        slope = value
    else:
        value = t * parameters[0]
        slope = 0.0 * t + parameters[0] * (FAMILY - POLYNOMIAL)
        for n in tl.static_range(1, FAMILY - POLYNOMIAL):
            value = (value + parameters[n]) * t
            if GRADIENT:
                slope = slope * t + parameters[n] * (FAMILY - POLYNOMIAL - n)
    return value, slope


@triton.jit
def _inverse_root(exponent, parameters):
    """1/√−exponent, and 0 for a pair that counts as coincident. A comparison with nan is false: nan stays nan."""
    return tl.where(exponent >= parameters[0], 0.0, tl.rsqrt(-exponent))


@triton.jit
def radial(
    exponent, table, table_ptr, parameters, value_shift, slope_shift,
    FAMILY: tl.constexpr, GRADIENT: tl.constexpr, BANDWIDTHS: tl.constexpr, SQUARINGS: tl.constexpr,
):  # fmt: skip
    """Σ_b a_b·k_b and Σ_b a_b·(γ_b/γ_0)·s_b, each less its shift; k_0 − shift and s_0 for one bandwidth.

    The second lacks a factor of the family, which is part of GRADIENT_SCALE in the plan.
    """
    if FAMILY == GAUSSIAN:
        return _gaussian(exponent, table, table_ptr, value_shift, slope_shift, GRADIENT, BANDWIDTHS, SQUARINGS)
    elif FAMILY == ENERGY:
        inverse_root = _inverse_root(exponent, parameters)
        return exponent * inverse_root, inverse_root
    else:
        t = exponent
        if FAMILY == LAPLACE:
            inverse_root = _inverse_root(exponent, parameters)
            t = exponent * inverse_root
        value, slope = _phi(t, parameters, FAMILY, GRADIENT)
        if BANDWIDTHS > 1:
            value = value * _entry(table, table_ptr, BANDWIDTHS, BANDWIDTHS)
            if GRADIENT:
                slope = slope * _entry(table, table_ptr, 2 * BANDWIDTHS, BANDWIDTHS)
            for b in tl.static_range(1, BANDWIDTHS):
                k, s = _phi(t * _entry(table, table_ptr, b, BANDWIDTHS), parameters, FAMILY, GRADIENT)
                value += k * _entry(table, table_ptr, BANDWIDTHS + b, BANDWIDTHS)
                if GRADIENT:
                    slope += s * _entry(table, table_ptr, 2 * BANDWIDTHS + b, BANDWIDTHS)
        if FAMILY == LAPLACE:
            slope = slope * inverse_root
        if FAMILY < POLYNOMIAL:
            value = value - value_shift
        return value, slope


@triton.jit
def _bandwidth(group, b: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """The b-th bandwidth of a group; the last one again where there are no more."""
    return tl.minimum(group * (TERMS // 2) + b, BANDWIDTHS - 1)


@triton.jit
def term_number(group, t: tl.constexpr, FAMILY: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """Of the t-th of a group among all `bandwidth_terms`."""
    if FAMILY == ENERGY or FAMILY >= POLYNOMIAL:
        return t
    else:
        return 2 * _bandwidth(group, t // 2, TERMS, BANDWIDTHS) + t % 2


@triton.jit
def load_group(table_ptr, group, FAMILY: tl.constexpr, TERMS: tl.constexpr, BANDWIDTHS: tl.constexpr, TABLE: tl.constexpr):
    """Ratio and shift of each bandwidth of a group."""
    table = ()
    if FAMILY != ENERGY and FAMILY < POLYNOMIAL:
        for b in tl.static_range(TERMS // 2):
            entry_ptr = table_ptr + _bandwidth(group, b, TERMS, BANDWIDTHS)
            table += (tl.load(entry_ptr) if BANDWIDTHS > 1 else 1.0, tl.load(entry_ptr + (TABLE - BANDWIDTHS)))
    return table


@triton.jit
def bandwidth_terms(exponent, table, parameters, FAMILY: tl.constexpr, TERMS: tl.constexpr):
    """What derivatives to bandwidths and weights are sums of: k_b − shift and t·s_b of each of a group, t as `_phi` takes it of the widest.

    Of energy the k_0 that all others are multiples of, of a polynomial the powers of t_0 from the first on.
    """
    terms = ()
    if FAMILY == ENERGY:
        terms += (exponent * _inverse_root(exponent, parameters),)
    elif FAMILY >= POLYNOMIAL:
        power = exponent
        for _ in tl.static_range(TERMS):
            terms += (power,)
            power = power * exponent
    else:
        t = exponent
        if FAMILY == LAPLACE:
            t = exponent * _inverse_root(exponent, parameters)
        # Of a padded column t is infinite, and s zero.
        finite = tl.where(t == float("-inf"), 0.0, t)
        for b in tl.static_range(TERMS // 2):
            if FAMILY == GAUSSIAN:
                k = tl.exp2(t * table[2 * b])
                s = k
            else:
                k, s = _phi(t * table[2 * b], parameters, FAMILY, True)
            terms += (k - table[2 * b + 1], finite * s)
    return terms


@triton.jit
def row_sums(tile):
    """Sums over columns 8 apart, which one thread of a matrix unit's tile holds: no exchange between threads, few registers."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8]), 1)


@triton.jit
def column_exponent(
    row_hi, row_lo, row_half, row_hi_ptrs, row_lo_ptrs, col_hi_ptr, col_lo_ptr, col_half_ptr, start_m,
    FAMILY: tl.constexpr, MODE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The exponent of a block of rows against the columns from `start_m` on, and the last features of these that it has loaded."""
    # where
    offs_m = start_m + tl.arange(0, BLOCK_M)
    local_m = tl.arange(0, BLOCK_M)[:, None] * D
    start = tl.cast(start_m, tl.int64) * D
    col_hi_ptrs = col_hi_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])
    col_lo_ptrs = col_lo_ptr + start + (local_m + tl.arange(0, BLOCK_K)[None, :])

    # load and multiply; the norms come first, so that the products add to them for nothing
    if FAMILY < POLYNOMIAL:
        exponent = row_half[:, None] + tl.load(col_half_ptr + offs_m)[None, :]
    else:
        exponent = tl.zeros([row_half.shape[0], BLOCK_M], dtype=row_half.dtype)
    if D == BLOCK_K:
        col_hi, col_lo = load_parts(col_hi_ptrs, col_lo_ptrs, MODE)
        exponent = dot(row_hi, row_lo, tl.trans(col_hi), tl.trans(col_lo), exponent, MODE)
        return exponent, col_hi, col_lo
    else:
        for start_k in range(0, D, BLOCK_K):
            left_hi, left_lo = load_parts(row_hi_ptrs + start_k, row_lo_ptrs + start_k, MODE)
            right_hi, right_lo = load_parts(col_hi_ptrs + start_k, col_lo_ptrs + start_k, MODE)
            exponent = dot(left_hi, left_lo, tl.trans(right_hi), tl.trans(right_lo), exponent, MODE)
        return exponent, row_hi, row_lo


@triton.jit
def difference_exponent(row_ptr, col_ptr, offs_n, start_m, scale, FAMILY: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """The exponent of a radial kernel from u_j − u_i itself, feature by feature; rows as they came, whose differences round least."""
    row_ptrs = row_ptr + offs_n.to(tl.int64) * D
    col_ptrs = col_ptr + (start_m + tl.arange(0, BLOCK_M)).to(tl.int64) * D
    exponent = tl.zeros([offs_n.shape[0], BLOCK_M], dtype=scale.dtype)
    for k in range(D):
        difference = (tl.load(row_ptrs + k)[:, None] - tl.load(col_ptrs + k)[None, :]) * scale
        exponent -= difference * difference
    if FAMILY == LAPLACE:
        # An infinite distance times its inverse is nan.
        exponent = tl.maximum(exponent, -1e308 if exponent.dtype == tl.float64 else -3e38)
    return 0.5 * exponent


@triton.jit
def column_parts(col_hi, col_lo, col_hi_ptr, col_lo_ptr, start_m, d_out, MODE: tl.constexpr, D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Block `d_out` of the features of the columns: those at hand where they are all there are."""
    if D > BLOCK_K or D > BLOCK_D:
        offs_out = tl.arange(0, BLOCK_M)[:, None] * D + (d_out * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        start = tl.cast(start_m, tl.int64) * D
        col_hi, col_lo = load_parts(col_hi_ptr + start + offs_out, col_lo_ptr + start + offs_out, MODE)
    return col_hi, col_lo


def pack_squarings(squarings: tuple[int, ...]) -> int:
    """The constexpr SQUARINGS."""
    return sum(n << (_SQUARING_BITS * b) for b, n in enumerate(squarings))


def family_of(kernel: Kernel) -> int:
    """The constexpr FAMILY."""
    if isinstance(kernel, RBF):
        return GAUSSIAN.value
    if isinstance(kernel, RationalQuadratic):
        alpha = float(kernel.alpha)
        return {1.0: QUADRATIC_ONE, 0.5: QUADRATIC_HALF}.get(alpha, QUADRATIC if alpha <= _FAST_ALPHA else QUADRATIC_STEEP).value
    if isinstance(kernel, Laplace):
        return LAPLACE.value
    if isinstance(kernel, Energy):
        return ENERGY.value
    assert isinstance(kernel, Polynomial), f"{kernel.name} has no tile"
    return POLYNOMIAL.value + int(kernel.degree)


def products_of(mode: int, dtype: torch.dtype) -> str:
    """What `config` calls the products of this mode."""
    names = {SPLIT_TF32.value: "tf32x3"} | {value: name for name, value in PRECISION.items()}
    return "float64" if dtype == torch.float64 else names[mode]


def modes_of(kernel: Kernel, precision: str, self_pairs: bool = False) -> tuple[int, ...]:
    """How the products of each pass are taken."""
    if precision == "highest" and (kernel.takes_distance or self_pairs):
        # The root of what two bfloat16 parts leave of a small distance is too large, and so is their pull of a row on itself.
        return (SPLIT_TF32.value,)
    if precision == "highest" and kernel.radial:
        return (SPLIT.value, SPLIT_TF32.value)
    return (PRECISION[precision],)


def limits_of(kernel: Kernel, modes: tuple[int, ...], dtype: torch.dtype) -> list[float]:
    """The steepest γ·‖x‖² for the products of each pass."""
    if isinstance(kernel, Energy):
        return [math.inf for _ in modes]
    exact = EXPONENT_ERROR[dtype] / torch.finfo(dtype).eps
    return [exact if dtype == torch.float64 else _LIMIT.get(mode, exact) for mode in modes]


def rounding_of(double: bool) -> float:
    """Of ‖u_i − u_j‖² by products, relative to the largest ‖u‖²."""
    return _ROUNDING_DOUBLE if double else _ROUNDING


def near_of(double: bool) -> float:
    """Squared distance of a near pair, relative to the largest ‖z−c‖²."""
    return 2 * (_NEAR_DOUBLE if double else _NEAR) * rounding_of(double)


def padding_of(kernel: Kernel) -> float:
    """Half of a padded column, with which it counts as zero."""
    return {LAPLACE.value: -1e30, ENERGY.value: 3e38}.get(family_of(kernel), -math.inf if kernel.radial else 0.0)


def term_count(kernel: Kernel, bandwidths: int) -> int:
    """How many `bandwidth_terms` there are."""
    if isinstance(kernel, Polynomial):
        return int(kernel.degree)
    return 1 if isinstance(kernel, Energy) else 2 * bandwidths


def parameter_count(kernel: Kernel) -> int:
    """Entries of the table behind those of the bandwidths."""
    return int(kernel.degree) if isinstance(kernel, Polynomial) else int(kernel.takes_distance or isinstance(kernel, RationalQuadratic))
