"""Log densities under a batch of posteriors, tile by tile. Formulas (1) and (5) of `fastvae.reference.total_correlation`.

A tile is some rows of z against some posteriors in all dimensions, so that one pass over it gives the density of each dimension and their
joint density. The exponents are computed from differences z − μ: matrix products would multiply rounding errors by (z/σ)².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvae.dispatch import accumulation_dtype
from fastvae.kernel_sums import LOG2_E
from fastvae.reference.total_correlation import HALF_LOG_2PI, LARGEST_ROOT, LogWeights, precision_root

# Elements of a tile for each thread: with half as many one thread takes 1.1 times as long, two threads 1.3 times. Posteriors are its
# contiguous axis, along which PyTorch's inner loops run; with fewer than 64 their overhead shows. The number of rows follows.
BLOCK = 262_144
MOST_COLUMNS, FEWEST_COLUMNS = 512, 64

# A density below 2 to the power of the first number is set to zero, as denormal numbers are ten times slower. That changes no sum of
# densities above 2 to the power of the second number.
RANGE = {torch.float32: (-100.0, -40.0), torch.float64: (-1000.0, -500.0)}

# If the density at a row is below 2 to this power, the row is so far from all posteriors that float32 rounds its exponents by 1e-3. Its
# tile is then computed in float64.
FAR = -8192.0


def forward(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, offset: int) -> tuple[Tensor, Tensor]:
    """log q(z_i) (N,) and log q(z_id) (N, D) for z (N, D) under posteriors (M, D); row i is drawn from posterior offset + i."""
    sweep = _CPUSweep(z, mu, logvar, weights, offset)
    joint = sweep.z.new_empty(z.shape[0])
    marginals = torch.empty_like(sweep.z)
    for rows in sweep.row_tiles():
        joint[rows], marginals[:, rows] = sweep.log_density(rows)
        if sweep.is_far(joint[rows], marginals[:, rows]):
            joint[rows], marginals[:, rows] = sweep.in_float64().log_density(rows)
    return sweep.to_nats(joint, marginals)


def backward(
    upstream: Sequence[Tensor],
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    weights: LogWeights,
    offset: int,
    z_grad: bool,
    posterior_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz (N, D), dμ and dlogvar (M, D) in the dtype of the sweep, from the results of `forward` and the upstream gradients to them."""
    sweep = _CPUSweep(z, mu, logvar, weights, offset)
    joint, marginals = sweep.from_nats(joint, marginals)
    a, b = upstream[0].to(sweep.dtype), upstream[1].T.to(sweep.dtype)
    dz = torch.zeros_like(sweep.z)
    # Σ_i of G, G·u and G·u².
    moments = [torch.zeros_like(sweep.mu) for _ in range(3 * posterior_grad)]
    for rows in sweep.row_tiles():
        tiles, density, reference = sweep, joint[rows], marginals[:, rows]
        if sweep.is_far(density, reference):
            tiles = sweep.in_float64()
            density, reference = tiles.log_density(rows)
        scale = b[:, rows].to(tiles.dtype)
        underflows = bool(reference.min() < tiles.least_sum)
        if not underflows:
            scale = scale * (-reference).exp2()
        for columns in tiles.column_tiles():
            u, exponent = tiles.tile(rows, columns)
            pairs, _ = tiles.weigh(exponent, rows, columns)
            pairs = tiles.exp2_(pairs.sub_(density[:, None])).mul_(a[rows, None])
            if underflows:
                exponent.sub_(reference[:, :, None])
            g = torch.addcmul(pairs, tiles.exp2_(exponent), scale[:, :, None], out=exponent)
            if posterior_grad:
                moments[0][:, columns].add_(g.sum(1))
            g.mul_(u)
            if z_grad:
                # In this order the product takes a tenth of the time of g times a column.
                _add_product(dz[:, None, rows], tiles.root[:, None, columns], g.mT)
            if posterior_grad:
                moments[1][:, columns].add_(g.sum(1))
                moments[2][:, columns].add_(g.mul_(u).sum(1))
    grad_z = dz.mul_(-sweep.precision_scale).T.contiguous() if z_grad else None
    if not posterior_grad:
        return grad_z, None, None
    grad_mu = moments[1].mul_(sweep.root).mul_(sweep.precision_scale).T.contiguous()
    grad_logvar = moments[2].sub_(moments[0], alpha=1 / sweep.precision_scale).mul_(0.5 * sweep.precision_scale).T.contiguous()
    return grad_z, grad_mu, grad_logvar


def terms_backward(
    upstream: Sequence[Tensor | None],
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    weights: LogWeights,
    offset: int,
    z_grad: bool,
    posterior_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `backward`, from the gradients to the three terms of (4), None for zero."""
    information, correlation, divergence = (joint.new_zeros(()) if grad is None else grad / z.shape[0] for grad in upstream)
    to_densities = (correlation - information).expand_as(joint), (divergence - correlation).expand_as(marginals)
    grad_z, grad_mu, grad_logvar = backward(to_densities, z, mu, logvar, joint, marginals, weights, offset, z_grad, posterior_grad)
    # The gradients through log q(z_i|n_i) and log p(z_i).
    z, mu, logvar = (t.to(joint.dtype) for t in (z, mu, logvar))
    root = precision_root(logvar)
    u = (z - mu) * root
    to_u = u * information
    to_mu = root.mul_(to_u)
    if grad_z is not None:
        grad_z.add_(divergence * z).sub_(to_mu)
    if grad_mu is not None and grad_logvar is not None:
        grad_mu.add_(to_mu)
        grad_logvar.add_(torch.addcmul(-information, u, to_u), alpha=0.5)
    return grad_z, grad_mu, grad_logvar


class _CPUSweep:
    """Transposed operands, dimensions first. Exponents are to base 2 and relative to `bound`: log_norm − u² ≤ 0 with u = (z − μ)·root.

    u² and not (z − μ)²/σ², as 1/σ² leaves the range of float32 while σ is still significant beside μ.
    """

    # The root is √(½·log₂e)/σ, so that 1/σ² is its square times this.
    precision_scale = 2 / LOG2_E

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, offset: int) -> None:
        self.dtype = accumulation_dtype(z.dtype)
        self.weights, self.offset = weights, offset
        self._inputs = z, mu, logvar
        self._in_float64: _CPUSweep | None = None
        self.z, self.mu, logvar = (t.T.to(self.dtype).contiguous() for t in (z, mu, logvar))
        log_norm = logvar * (-0.5 * LOG2_E)
        self.root = log_norm.clamp(max=LARGEST_ROOT[self.dtype]).exp2_().mul_((0.5 * LOG2_E) ** 0.5)
        self.bound = log_norm.amax(1, keepdim=True)
        self.log_norm = log_norm.sub_(self.bound)
        self.least, self.least_sum = RANGE[self.dtype]
        dim, self.n = self.z.shape
        self.m = self.mu.shape[1]
        block = BLOCK * torch.get_num_threads()
        self.columns = min(self.m, max(FEWEST_COLUMNS, min(MOST_COLUMNS, block // (16 * dim))))
        self.rows = min(self.n, max(1, block // (self.columns * dim)))
        self.buffers = [self.z.new_empty(dim * self.rows * self.columns) for _ in range(2)]

    def is_far(self, joint: Tensor, marginals: Tensor) -> bool:
        # A comparison with nan is false.
        return self.dtype == torch.float32 and (float(joint.amin()) < FAR or float(marginals.amin()) < FAR)

    def in_float64(self) -> _CPUSweep:
        """The same sweep in float64."""
        if self._in_float64 is None:
            z, mu, logvar = (t.double() for t in self._inputs)
            self._in_float64 = _CPUSweep(z, mu, logvar, self.weights, self.offset)
        return self._in_float64

    def row_tiles(self) -> Iterator[slice]:
        return _tiles(self.n, self.rows)

    def column_tiles(self) -> Iterator[slice]:
        return _tiles(self.m, self.columns)

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """u and the exponents without weights, (D, rows, columns)."""
        z, mu = self.z[:, rows, None], self.mu[:, None, columns]
        shape = (z.shape[0], z.shape[1], mu.shape[2])
        u, exponent = (buffer[: math.prod(shape)].view(shape) for buffer in self.buffers)
        torch.sub(z, mu, out=u).mul_(self.root[:, None, columns])
        return u, torch.addcmul(self.log_norm[:, None, columns], u, u, value=-1, out=exponent)

    def exp2_(self, exponent: Tensor) -> Tensor:
        return torch.threshold_(exponent, self.least, -math.inf).exp2_()

    def weigh(self, exponent: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The joint exponents of a tile (rows, columns), and its exponents, both with log w_ij relative to that of pairs with j > i + 1."""
        joint = exponent.sum(0)
        own, following, other = self.weights
        first, last = self.offset + rows.start, self.offset + rows.stop
        wraps = last >= self.m and columns.start == 0
        if own == other or not (wraps or (columns.start <= last and first < columns.stop)):
            return joint, exponent
        i = torch.arange(first, last, device=joint.device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=joint.device)
        relative = torch.zeros_like(joint)
        relative.masked_fill_(j == (i + 1) % self.m, (following - other) * LOG2_E).masked_fill_(j == i, (own - other) * LOG2_E)
        return joint.add_(relative), exponent.add_(relative)

    def log_density(self, rows: slice) -> tuple[Tensor, Tensor]:
        """log2 of the joint densities (rows,) and of the densities of each dimension (D, rows)."""
        total, joint = self.density(rows, None)
        reference = torch.zeros_like(total)
        if total.min() < 2**self.least_sum:
            reference = self.maximum(rows)
            total, _ = self.density(rows, reference)
        return joint, total.log2_().add_(reference)

    def density(self, rows: slice, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ_j exp2(exponent − reference) for each dimension (D, rows), and log2 Σ_j exp2(joint exponent) (rows,)."""
        total: Tensor | None = None
        joint_most: Tensor | None = None
        joint_total: Tensor | None = None
        for columns in self.column_tiles():
            _, exponent = self.tile(rows, columns)
            joint, exponent = self.weigh(exponent, rows, columns)
            most = joint.amax(1).clamp_(min=torch.finfo(self.dtype).min)
            if joint_most is not None:
                most = torch.maximum(joint_most, most)
            part = self.exp2_(joint.sub_(most[:, None])).sum(1)
            if joint_total is not None and joint_most is not None:
                part.add_(joint_total.mul_((joint_most - most).exp2_()))
            joint_most, joint_total = most, part
            if reference is not None:
                exponent.sub_(reference[:, :, None])
            part = self.exp2_(exponent).sum(2)
            total = part if total is None else total.add_(part)
        assert total is not None
        assert joint_most is not None
        assert joint_total is not None
        return total, joint_total.log2_().add_(joint_most)

    def maximum(self, rows: slice) -> Tensor:
        """max_j of the exponents (D, rows)."""
        most = self.z.new_full((self.z.shape[0], rows.stop - rows.start), torch.finfo(self.dtype).min)
        for columns in self.column_tiles():
            _, exponent = self.weigh(self.tile(rows, columns)[1], rows, columns)
            most = torch.maximum(most, exponent.amax(2))
        return most

    def to_nats(self, joint: Tensor, marginals: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the constants, and converts (N,) and (D, N) from base 2 to nats, (N,) and (N, D)."""
        joint_constant, constants = self._constants()
        return ((joint + joint_constant) / LOG2_E).to(self.dtype), ((marginals + constants) / LOG2_E).T.to(self.dtype).contiguous()

    def from_nats(self, joint: Tensor, marginals: Tensor) -> tuple[Tensor, Tensor]:
        joint_constant, constants = self._constants()
        return (joint.double() * LOG2_E - joint_constant).to(self.dtype), (marginals.T.double() * LOG2_E - constants).to(self.dtype)

    def _constants(self) -> tuple[Tensor, Tensor]:
        bound = self.bound.double()
        dim = bound.shape[0]
        weight = self.weights.other * LOG2_E
        return bound.sum() - dim * HALF_LOG_2PI * LOG2_E + weight, bound - HALF_LOG_2PI * LOG2_E + weight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the product may be of higher precision."""
    if b.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def _tiles(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
