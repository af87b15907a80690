"""Reparameterise + KL on a GPU, row-wise: formulas (1) to (3) of `fastvae.reference.reparameterize_kl`, each array moved once.

The noise is read, or made from a seed wherever it is needed and then never stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernel_sums import LOG2_E
from fastvae.kernels.config import RowConfig, row_config
from fastvae.kernels.launch import integer_key, launch, tensor_key

# σ = exp2(_HALF_LOG2_E·logvar); exp takes three instructions more.
_HALF_LOG2_E = tl.constexpr(0.5 * LOG2_E)


class Gradients(NamedTuple):
    """Contiguous: the gradients to z (N, D) and to KL, (N,) or (N, D), and those to μ and logvar (N, D)."""

    z_ptr: Any
    kl_ptr: Any
    mu_ptr: Any
    logvar_ptr: Any


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    mu_ptr,  # (N, D), features contiguous
    logvar_ptr,  # (N, D), likewise
    noise_ptr,  # (N, D), contiguous, as are all others; (1,) if SEEDED
    z_ptr,
    kl_ptr,  # (N,), or (N, D) if PER_DIMENSION
    D,  # in units of VECTOR elements, as the strides, so that the compiler knows them to be multiples
    stride_mu,
    stride_logvar,
    N,
    SEEDED: tl.constexpr,
    PER_DIMENSION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # where: 64 bits for the first row of a block, 32 within the block
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - first_n
    D *= VECTOR
    stride_mu *= VECTOR
    stride_logvar *= VECTOR
    mu_ptr += first_n * stride_mu
    logvar_ptr += first_n * stride_logvar
    z_ptr += first_n * D
    kl_ptr += first_n * (D if PER_DIMENSION else 1)
    dtype: tl.constexpr = kl_ptr.dtype.element_ty
    twice_kl_row = tl.zeros([BLOCK_N], dtype=dtype)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        offs = offs_n[:, None] * D + offs_d[None, :]

        # load
        mu = tl.load(mu_ptr + offs_n[:, None].to(tl.int64) * stride_mu + offs_d[None, :], mask=mask, other=0.0).to(dtype)
        logvar = tl.load(logvar_ptr + offs_n[:, None].to(tl.int64) * stride_logvar + offs_d[None, :], mask=mask, other=0.0).to(dtype)
        if SEEDED:
            eps = normal(tl.load(noise_ptr), first_n, start_d, BLOCK_N, BLOCK_D)
        else:
            eps = tl.load(noise_ptr + first_n * D + offs, mask=mask, other=0.0)

        # compute
        std = tl.exp2(logvar * _HALF_LOG2_E)
        z = mu + std * eps.to(dtype)
        twice_kl = mu * mu + (std * std - 1) - logvar

        # store; a padded element has μ = logvar = 0 and so a KL of zero
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
        if PER_DIMENSION:
            tl.store(kl_ptr + offs, 0.5 * twice_kl, mask=mask)
        else:
            twice_kl_row += tl.sum(twice_kl, 1)
    if not PER_DIMENSION:
        tl.store(kl_ptr + offs_n, 0.5 * twice_kl_row, mask=mask_n)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    grads: Gradients,
    mu_ptr,
    logvar_ptr,
    noise_ptr,
    D,
    stride_mu,
    stride_logvar,
    N,
    SEEDED: tl.constexpr,
    PER_DIMENSION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # where
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    start_d = tl.program_id(1) * BLOCK_D
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - first_n
    D *= VECTOR
    stride_mu *= VECTOR
    stride_logvar *= VECTOR
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    offs = offs_n[:, None] * D + offs_d[None, :]
    grad_z_ptr = grads.z_ptr + first_n * D
    mu_ptr += first_n * stride_mu
    logvar_ptr += first_n * stride_logvar
    grad_mu_ptr = grads.mu_ptr + first_n * D
    grad_logvar_ptr = grads.logvar_ptr + first_n * D
    grad_kl_ptr = grads.kl_ptr + first_n * (D if PER_DIMENSION else 1)
    dtype: tl.constexpr = grad_kl_ptr.dtype.element_ty

    # load
    dz = tl.load(grad_z_ptr + offs, mask=mask, other=0.0).to(dtype)
    mu = tl.load(mu_ptr + offs_n[:, None].to(tl.int64) * stride_mu + offs_d[None, :], mask=mask, other=0.0).to(dtype)
    logvar = tl.load(logvar_ptr + offs_n[:, None].to(tl.int64) * stride_logvar + offs_d[None, :], mask=mask, other=0.0).to(dtype)
    if SEEDED:
        eps = normal(tl.load(noise_ptr), first_n, start_d, BLOCK_N, BLOCK_D)
    else:
        eps = tl.load(noise_ptr + first_n * D + offs, mask=mask, other=0.0)
    if PER_DIMENSION:
        dkl = tl.load(grad_kl_ptr + offs, mask=mask, other=0.0)
    else:
        dkl = tl.load(grad_kl_ptr + offs_n, mask=mask_n, other=0.0)[:, None]

    # compute
    std = tl.exp2(logvar * _HALF_LOG2_E)
    grad_mu = dz + dkl * mu
    grad_logvar = 0.5 * (dz * eps.to(dtype) * std + dkl * (std * std - 1))

    # store
    tl.store(grad_mu_ptr + offs, grad_mu.to(grad_mu_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_logvar_ptr + offs, grad_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normal(seed, first_n, start_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """ε of a block. Columns 4q to 4q + 3 of row n come from Philox's counter (q, n), so that they do not depend on the blocks."""
    quad = start_d // 4 + tl.arange(0, BLOCK_D // 4)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    row = first_n + tl.arange(0, BLOCK_N)[:, None] + tl.zeros_like(quad)
    x0, x1, x2, x3 = tl.philox(seed, quad, row.to(tl.int32), (row >> 32).to(tl.int32), tl.zeros_like(quad))
    e0, e1 = normal_pair(x0, x1)
    e2, e3 = normal_pair(x2, x3)
    return tl.join(tl.join(e0, e2), tl.join(e1, e3)).reshape([BLOCK_N, BLOCK_D])


@triton.jit
def normal_pair(x, y):
    """The Box–Muller transform of two random words: x gives a length of up to 6.8, y an angle in half a turn and a sign.

    The polynomials are accurate to 1e-6. tl.log takes three times the instructions, and tl.cos, which reduces any argument, ten times.
    """
    u = (x.to(tl.float32) * 2.0**-32 + 2.0**-33).to(tl.int32, bitcast=True)
    # −2·ln u = halvings·2·ln 2 − 2·ln(1 − r/2)
    halvings = (126 - (u >> 23)).to(tl.float32)
    r = 2 - ((u & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    series = 1.0000008 + r * (0.24991871 + r * (0.084602987 + r * (0.023987969 + r * (0.031595609 + r * (-0.018962292 + r * 0.015149004)))))
    # Rounded up to u = 1, the largest words would have a square just below zero.
    length = tl.sqrt(tl.maximum(halvings * 1.3862944 + r * series, 0.0))
    length = tl.where((y & 1) == 1, -length, length)
    turn = ((y >> 9) | 0x3F800000).to(tl.float32, bitcast=True) * 2 - 3
    q = turn * turn
    cos = 1.0 + q * (-1.2336982 + q * (0.25365067 + q * (-0.020810515 + q * 0.00085813447)))
    sin = turn * (1.5707951 + q * (-0.64592572 + q * (0.079500007 - q * 0.0043705859)))
    return length * cos, length * sin


def forward(inputs: Any, parametrisation: Any, z: Tensor | None, kl: Tensor) -> None:
    """Fill z and kl, as in `fastvae.cpu.reparameterize_kl`."""
    mu, logvar, noise = _rows(inputs, parametrisation, kl)
    n, d = mu.shape
    config = row_config(d, mu.element_size(), mu.stride(0), logvar.stride(0))
    per_dimension = kl.shape[2] == d
    _launch(forward_kernel, (triton.cdiv(n, config.block_n), 1, 1), config, (mu, logvar, noise, z, kl), mu, logvar, noise, per_dimension)


def backward(grad_z: Tensor | None, grad_kl: Tensor, inputs: Any, parametrisation: Any, grads: list[Tensor | None]) -> None:
    """Fill the gradients to μ and s, as in `fastvae.cpu.reparameterize_kl`."""
    mu, logvar, noise = _rows(inputs, parametrisation, grad_kl)
    n, d = mu.shape
    config = row_config(d, mu.element_size(), mu.stride(0), logvar.stride(0))
    grid = triton.cdiv(n, config.block_n), triton.cdiv(d, config.block_d), 1
    arguments = (Gradients(grad_z.contiguous(), grad_kl.contiguous(), *grads[:2]), mu, logvar, noise)
    _launch(backward_kernel, grid, config, arguments, mu, logvar, noise, grad_kl.shape[2] == d)


def _rows(inputs: Any, parametrisation: Any, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mu, s, noise, prior_mu, _ = inputs
    if mu.shape[0] > 1 or prior_mu is not None or noise is None or parametrisation != type(parametrisation)() or kl.shape[1] != mu.shape[1]:
        raise NotImplementedError("on a GPU this form of reparameterize_kl is not written yet")
    rows = [t[0] if t.stride(2) == 1 else t[0].contiguous() for t in (mu, s)]
    return *rows, noise[0].contiguous() if noise.is_floating_point() else noise


def _launch(
    fn: Any, grid: tuple[int, int, int], config: RowConfig, arguments: tuple[Tensor | Gradients, ...], mu: Tensor, logvar: Tensor,
    noise: Tensor, per_dimension: bool,
) -> None:  # fmt: skip
    units = mu.shape[1] // config.vector, mu.stride(0) // config.vector, logvar.stride(0) // config.vector
    tensors = [t for argument in arguments for t in (argument if isinstance(argument, tuple) else (argument,))]
    key = config, per_dimension, tensor_key(*tensors), integer_key(*units), mu.shape[0] >= 1 << 31
    launch(
        fn, key, mu.device, grid, (*arguments, *units, mu.shape[0]),
        lambda: {"SEEDED": not noise.is_floating_point(), "PER_DIMENSION": per_dimension, **config.launch()},
    )  # fmt: skip
