"""The kernel two-sample test: p-values of MMD², with all permutations in one sweep over the pairs of rows."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae import checks, reference
from fastvae.bandwidths import median_bandwidth, pooled, ranked_squared_distance, resolve
from fastvae.devices import float64_on_cpu
from fastvae.dispatch import accumulation_dtype
from fastvae.features import FeatureMap, NystromFeatures, RandomFeatures
from fastvae.kernel_sums import Numbers, as_vector
from fastvae.ops.common import kernel_arguments, without_autocast
from fastvae.ops.kernel_matmul import apply_kernel_matmul
from fastvae.ops.quadratic_form import quadratic_form_diagonal
from fastvae.radial import RBF, Kernel, Laplace, RationalQuadratic
from fastvae.reference.mmd import bandwidths

# Steps of MMDAgg's bisection.
_BISECTIONS = 50
# The default bandwidths of MMD-FUSE and MMDAgg.
_FUSE_BANDWIDTHS = 10
_AGG_POWERS = range(-3, 4)
# Random rows of which a rule takes the bandwidth, for an approximation.
_ROWS_OF_A_RULE = 4096
# Random numbers in one draw: more would need fresh memory for each draw, which takes longer than the draw. And the fewest permutations in
# one draw: with fewer, the part of a row of v is shorter than a cache line.
_NUMBERS_PER_DRAW, _MIN_PERMUTATIONS_PER_DRAW = 1 << 13, 16
# Statistics closer than these multiples of the dtype's eps count as equal: times the spread of all statistics, plus times their size.
_TIED_SPREAD, _TIED_SIZE = 256, 8


class KernelTest(NamedTuple):
    """One kernel of a two-sample test.

    Attributes:
        kernel: The kernel.
        bandwidth: Its bandwidths h_b, shape (B,).
        statistic: MMD² with this kernel.
        p_value: The p-value of a test with this kernel alone.
    """

    kernel: Kernel
    bandwidth: Tensor
    statistic: float
    p_value: float

    def __repr__(self) -> str:
        widths = ", ".join(f"{h:.4g}" for h in self.bandwidth.tolist())
        return f"KernelTest({self.kernel}, bandwidth=[{widths}], statistic={self.statistic:.4g}, p_value={self.p_value:.4g})"


class TwoSampleTest(NamedTuple):
    """The result of `two_sample_test`.

    Attributes:
        statistic: MMD² of x and y. With aggregate="fuse" the soft maximum of the normalised MMD² of all kernels; with "agg" the smallest
            p-value of any kernel, where smaller is more extreme.
        p_value: (1 + the number of `null` at least as extreme as `statistic`)/(1 + the number of `null`); nan if an input is not finite.
        reject: Whether the test at the given level rejects that x and y have the same distribution.
        null: The statistic of each permutation, float64, shape (permutations,), or (2·permutations,) with aggregate="agg".
        kernels: The statistic and p-value of each kernel.
    """

    statistic: float
    p_value: float
    reject: bool
    null: Tensor
    kernels: tuple[KernelTest, ...]

    def __repr__(self) -> str:
        of = repr(self.kernels[0].kernel) if len(self.kernels) == 1 else f"{len(self.kernels)} kernels"
        return (
            f"TwoSampleTest(statistic={self.statistic:.4g}, p_value={self.p_value:.4g}, reject={self.reject}, "
            f"null={len(self.null)} permutations, {of})"
        )


@float64_on_cpu
def two_sample_test(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor | None = None,
    bandwidth_weights: Sequence[float] | Tensor | None = None,
    kernel: checks.KernelName | Kernel | Sequence[checks.KernelName | Kernel] = "rbf",
    estimator: checks.Estimator = "unbiased",
    permutations: int = 500,
    method: Literal["permutation", "wild_bootstrap"] | RandomFeatures | NystromFeatures = "permutation",
    aggregate: Literal["fuse", "agg"] | None = None,
    level: float = 0.05,
    seed: int | torch.Generator | None = None,
    progress: bool | Callable[[float], None] = False,
    precision: checks.Precision | None = None,
    backend: checks.Backend | None = None,
) -> TwoSampleTest:
    """Tests whether two samples have the same distribution, by permutations of MMD², in memory O((N + M)·(D + permutations)).

    Each permutation is a column of a matrix of signs, and one sweep over the pairs of rows computes the statistics of all of them. The
    level is exact for any sample sizes: under the null hypothesis, p_value ≤ level with probability at most `level`. Statistics that differ
    from the observed one by no more than rounding count as equal to it. The time grows with (N + M)²: from 10⁵ rows on pass
    `method=RandomFeatures(512)`, whose time is linear.

    Args:
        x: (N, D), floating point.
        y: (M, D), same dtype and device as x.
        bandwidth: h, as in `fastvae.mmd`, but without a gradient; "median" by default. With `aggregate` each number is a separate kernel,
            and the default is the collection of the method.
        bandwidth_weights: One for each bandwidth; 1 each by default. Not with `aggregate`.
        kernel: As in `fastvae.mmd`. With `aggregate` one kernel or several, each combined with every bandwidth.
        estimator: "unbiased" or "biased". For N = M the choice changes only the statistic. With `aggregate`, "unbiased".
        permutations: B, the number of permutations; the smallest possible p-value is 1/(1 + B).
        method: "permutation" of all rows; or, for N = M, "wild_bootstrap": each x_i and y_i swap places with probability ½. The unbiased
            statistic of the wild bootstrap leaves out the pairs of x_i and y_i, as in lemma 6 of Gretton et al. 2012; that of `mmd` does
            not. For samples of 10⁵ rows and more, permutations of an approximation, `fastvae.RandomFeatures(count)` or
            `fastvae.NystromFeatures(landmarks)`, in time linear in the number of rows. `statistic` is then that of the approximate kernel,
            with an error that their docstrings state. The level stays exact; the power is that of the approximate kernel. A rule for the
            bandwidth takes 4,096 random rows.
        aggregate: None for a test with one kernel; "fuse" or "agg" for one test with a set of kernels, in a sweep or two for each kernel
            and bandwidth. "fuse" is MMD-FUSE: (1/λ)·log mean exp(λ·MMD²/√(mean k²)) over the kernels, λ = √(n(n − 1)) and n = min(N, M),
            for "rbf", "imq", "rational_quadratic" and "laplace". Its default bandwidths are 10, evenly spaced from half the 5 % quantile to
            twice the 95 % quantile of the pooled distances. "agg" is MMDAgg: the smallest p-value of the kernels. It rejects at a level
            corrected by bisection, with B permutations for the quantiles and B more for the correction (B1 and B2 of the paper; B3 = 50).
            `p_value`, the rank of the smallest p-value among all 2B, is exact too; near the level the two may disagree. Its default
            bandwidths are 2^l·median_bandwidth(x, y), l = −3 … 3.
        level: The level of `reject`.
        seed: An integer, or a generator on the CPU. The same seed draws the same permutations on every device. None: PyTorch's global
            generator.
        progress: True for a progress bar on stderr (by tqdm if it is installed), or a function that is called with the fraction done.
        precision: As in `fastvae.mmd`.
        backend: None chooses by device; "cpu", "triton" or "reference" (dense) forces one.

    Returns:
        `TwoSampleTest(statistic, p_value, reject, null, kernels)`.

    Raises:
        TypeError: As in `fastvae.mmd`.
        ValueError: As in `fastvae.mmd`; also N ≠ M with method="wild_bootstrap", a kernel that the features do not approximate, or an
            option that breaks a rule above.

    Source: Gretton et al. 2012, "A kernel two-sample test"; Phipson and Smyth 2010 for the p-value; Chwialkowski et al. 2014, "A wild
    bootstrap for degenerate kernel tests"; Biggs, Schrab and Gretton 2023, "MMD-FUSE: learning and combining kernels for two-sample testing
    without data splitting"; Schrab et al. 2023, "MMD aggregated two-sample test"; Choi and Kim 2025 (arXiv 2502.20755) for random features;
    Chatalic et al. 2025 (arXiv 2502.13570) for the Nyström approximation.
    """
    checks.samples(x, y)
    checks.option("estimator", estimator, checks.ESTIMATORS)
    features = method if isinstance(method, (RandomFeatures, NystromFeatures)) else None
    if features is None:
        checks.method_of_test(method)
    else:
        checks.without_features(features, aggregate, backend, precision)
    checks.option("aggregate", aggregate, (None, "fuse", "agg"))
    checks.option("precision", precision, checks.PRECISIONS)
    checks.usable_backend(backend, x.device)
    for name, points in (("x", x), ("y", y)):
        if aggregate is None:
            checks.enough_rows(name, points, estimator)
        else:
            checks.two_rows(name, points)
    if method == "wild_bootstrap":
        checks.same_rows("x", x, "y", y, "method='wild_bootstrap'")
    count = checks.integer("permutations", permutations, at_least=1)
    checks.fraction("level", level)
    checks.progress(progress)
    generator = checks.seed(seed)
    families = checks.kernels(kernel, aggregate)
    for family in families:
        checks.one_sweep(family)
    if aggregate is not None:
        checks.aggregated(aggregate, estimator, bandwidth_weights, families)
    data = _Samples(torch.cat([x, y]).detach(), x.shape[0], estimator, method == "wild_bootstrap", precision or "", backend or "")
    if aggregate is None:
        h, a = checks.bandwidths("median" if bandwidth is None else bandwidth, bandwidth_weights, x.device)
        if bandwidth is None or isinstance(bandwidth, str):
            h = resolve(bandwidth or "median", x, y) if features is None else resolve(bandwidth or "median", _some_rows(data.z, generator))
        h, a = _constant(h), _constant(a)
        members = [(families[0], h, a)]
    else:
        members = [(family, h, torch.ones_like(h)) for family in families for h in _collection(aggregate, bandwidth, x, y).reshape(-1, 1)]
    v = data.columns(2 * count if aggregate == "agg" else count, generator)
    if features is not None:
        # After the permutations, which are then those of the exact test.
        ((family, h, a),) = members
        data = data._replace(map=features._of(data.z, family, tuple(h.tolist()), tuple(a.tolist()), generator))
    values, ties = [], []
    with torch.no_grad(), without_autocast(x.device), _reporting(progress) as report:
        for n, (family, h, a) in enumerate(members):
            part = None if report is None else _part_of(report, n, len(members))
            value, tied = data.statistics(v, family, h, a, part)
            values.append(value)
            ties.append(tied)
            if part is not None:
                part(1.0)
        if aggregate == "fuse":
            fused, tie = data.fuse(torch.stack(values), torch.stack(ties), members)
            values.append(fused)
            ties.append(tie)
        null_values, tied = torch.stack(values), torch.stack(ties)
        # The only values that are read from a GPU.
        numbers = torch.stack([null_values[:, 0], _p_values(null_values, tied)], 1).tolist()
    each = tuple(KernelTest(family, h, *own) for (family, h, _), own in zip(members, numbers, strict=False))
    if aggregate == "agg":
        return _agg(null_values, tied, each, count, level)
    statistic, p_value = numbers[-1]
    return TwoSampleTest(statistic, p_value, p_value <= level, null_values[-1, 1:], each)


class _Samples(NamedTuple):
    """Both samples and the options of their statistics; x is the first `n` rows of z."""

    z: Tensor
    n: int
    estimator: str
    swaps: bool
    precision: str
    backend: str
    map: FeatureMap | None = None  # of an approximation of the kernel

    @property
    def m(self) -> int:
        return self.z.shape[0] - self.n

    @property
    def signs(self) -> tuple[int, int]:
        """The weights of a row of x and a row of y: 1/N and −1/M times a number that makes them integers, so that sums are exact."""
        divisor = math.gcd(self.n, self.m)
        return self.m // divisor, -self.n // divisor

    def columns(self, count: int, generator: torch.Generator | None) -> Tensor:
        """v (N + M, 2 + count), so that vᵀKv is a multiple of MMD²: observed, permuted, and a last column of ones for the sum of all pairs.

        For a wild bootstrap only the rows of x, (N, 1 + count): those of y have the opposite sign.
        """
        n, rows, (of_x, of_y) = self.n, self.n + self.m, self.signs
        # On the CPU, whatever the default device, as the generator is there. numpy draws in half of PyTorch's time.
        source = np.random.PCG64(torch.empty(1, dtype=torch.int64, device="cpu").random_(generator=generator).numpy())
        dtype = accumulation_dtype(self.z.dtype)
        if self.swaps:
            bits = np.unpackbits(source.random_raw(-(-count * n // 64)).view(np.uint8))[: count * n].reshape(n, count)
            signs = torch.ones(n, 1 + count, dtype=dtype, device="cpu")
            signs[:, 1:].sub_(torch.from_numpy(bits), alpha=2)
            return signs.to(self.z.device)
        v = torch.empty(rows, 2 + count, dtype=dtype, device="cpu")
        v[:n, 0], v[n:, 0], v[:, -1] = of_x, of_y, 1
        per_draw = max(_NUMBERS_PER_DRAW // rows, _MIN_PERMUTATIONS_PER_DRAW)
        for start in range(1, 1 + count, per_draw):
            part = v[:, start : min(start + per_draw, 1 + count)]
            part.copy_(_subsets(part.shape[1], rows, n, source).T)
        v[:, 1:-1].mul_(of_x - of_y).add_(of_y)
        return v.to(self.z.device)

    def statistics(
        self, v: Tensor, family: Kernel, h: Tensor, a: Tensor, progress: Callable[[float], None] | None
    ) -> tuple[Tensor, Tensor]:
        """MMD² of each of the `columns` but that of ones, float64, and how far apart rounding may set equal statistics."""
        n, m, scale = self.n, self.m, self.n * self.signs[0]
        form = self.form(v, family, h, a, progress)
        total = form[-1]
        form = (form if self.swaps else form[:-1]) / scale**2
        diagonal = self.diagonal(family, h, a)
        # The weights w are 1/n and −1/m, so w² = 1/(nm) + (1/n − 1/m)·w.
        biased = form + diagonal.mean() * (1 / n + 1 / m)
        w = None if n == m else v[:, :-1].double() / scale
        if w is not None and diagonal.ndim:
            biased = biased + (1 / n - 1 / m) * (w.T @ diagonal)
        if self.estimator == "biased":
            value = biased
        elif self.swaps:
            paired = _pointwise(family, h, a, self.z[:n], self.z[n:]).sum()
            value = (form * n * n + 2 * paired) / (n * (n - 1))
        else:
            # Sums S over i ≠ j: x_all = S_xx + S_xy, total − x_all = S_yy + S_xy, form = S_xx/n² + S_yy/m² − 2·S_xy/(nm).
            of_xx, of_yy = 1 / (n**2 * (n - 1)), 1 / (m**2 * (m - 1))
            of_xy = (of_xx + of_yy) / (1 / n + 1 / m) ** 2
            value = form * (1 + of_xy) + total * (of_yy - of_xy / m**2)
            if w is not None:
                row_sums = self.row_sums(family, h, a) - diagonal
                # `total` is more accurate than the sum of the row sums.
                row_sums = row_sums + (total - row_sums.sum()) / len(row_sums)
                x_all = (w.T @ row_sums + total / m) / (1 / n + 1 / m)
                value = value + x_all * (of_xx - of_yy - of_xy * (1 / n**2 - 1 / m**2))
        low, high = value.aminmax()
        spread, size = high - low, torch.minimum(form.abs().max(), biased.abs().max())
        return value, torch.finfo(v.dtype).eps * (_TIED_SPREAD * spread + _TIED_SIZE * size)

    def form(self, v: Tensor, family: Kernel, h: Tensor, a: Tensor, progress: Callable[[float], None] | None = None) -> Tensor:
        """Σ_{i≠j} v_i·k(z_i, z_j)·v_j of each column, float64. v with half of the rows means [v, −v]."""
        if self.map is not None:
            return self.map.form(v, progress)
        if self.backend == "reference":
            z = self.z.to(v)
            v = v if len(v) == len(z) else torch.cat([v, -v])
            return reference.quadratic_form(z, v, bandwidth=h, bandwidth_weights=a, kernel=family, diagonal=True).double()
        arguments = (*kernel_arguments(family, h, a), self.precision, self.backend)
        return quadratic_form_diagonal(self.z, v, *arguments, progress=progress)

    def diagonal(self, family: Kernel, h: Tensor, a: Tensor) -> Tensor:
        """k(z_i, z_i), float64; a scalar if it is the same for all rows."""
        if self.map is not None:
            return self.map.squares
        return family.value_at_zero * a.sum() if family.radial else _pointwise(family, h, a, self.z, self.z)

    def row_sums(self, family: Kernel, h: Tensor, a: Tensor) -> Tensor:
        """Σ_j k(z_i, z_j), float64."""
        if self.map is not None:
            return self.map.row_sums()
        z = self.z.to(accumulation_dtype(self.z.dtype))
        if self.backend == "reference":
            ones = torch.ones_like(z[:, :1])
            sums = reference.kernel_matmul(z, z, ones, bandwidth=h, bandwidth_weights=a, kernel=family)
        else:
            arguments = (*kernel_arguments(family, h, a), self.precision, self.backend)
            sums = apply_kernel_matmul(z, z, torch.ones_like(z[:, :1]), *arguments)
        return sums[:, 0].double()

    def fuse(self, values: Tensor, ties: Tensor, members: list[tuple[Kernel, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(1/λ)·log mean_k exp(λ·MMD²_k/√N_k) with N_k = Σ_{i≠j} k²/(n(n − 1)) and λ = √(n(n − 1)), n the smaller sample size."""
        pairs = min(self.n, self.m) * (min(self.n, self.m) - 1)
        ones = torch.ones_like(self.z[:, :1], dtype=accumulation_dtype(self.z.dtype))
        norms = []
        for family, h, a in members:
            square, factor = squared(family)
            norms.append((self.form(ones, square, factor * h, a) / pairs).sqrt())
        norm = torch.stack(norms)
        scale = pairs**0.5
        fused = ((scale * values / norm).logsumexp(0) - math.log(len(members))) / scale
        return fused, (ties / norm[:, 0]).max()


def _some_rows(z: Tensor, generator: torch.Generator | None) -> Tensor:
    """Those that a rule takes."""
    if len(z) <= _ROWS_OF_A_RULE:
        return z
    return z[torch.randperm(len(z), generator=generator, device="cpu")[:_ROWS_OF_A_RULE].to(z.device)]


def _subsets(count: int, rows: int, size: int, source: np.random.PCG64) -> Tensor:
    """Random sets of `size` rows as booleans (count, rows): the rows with the smallest keys. Row numbers in the last bits break ties."""
    keys = source.random_raw(count * rows).reshape(count, rows)
    keys &= np.uint64(2**64 - 2 ** rows.bit_length())
    keys |= np.arange(rows, dtype=np.uint64)
    return torch.from_numpy(keys <= np.partition(keys, size - 1, axis=1)[:, size - 1 : size])


def squared(kernel: Kernel) -> tuple[Kernel, float]:
    """k² as a kernel, and the factor between h and its bandwidth."""
    kernel, factor = kernel.canonical()
    if isinstance(kernel, RBF):
        return kernel, factor * 0.5**0.5
    if isinstance(kernel, RationalQuadratic):
        return RationalQuadratic(2 * kernel.alpha), factor * 0.5**0.5
    assert isinstance(kernel, Laplace)
    return kernel, factor * 0.5


def _pointwise(family: Kernel, h: Tensor, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ_b a_b·k_b(x_i, y_i), float64, shape (N,)."""
    x, y = x.double(), y.double()
    h, a = bandwidths(x, h, a)
    t = ((x - y).square() if family.radial else x * y).sum(1)
    return family.phi(t[:, None] * family.gamma(h, x.shape[1])) @ a


def _constant(numbers: Numbers) -> Tensor:
    return numbers.detach().double() if isinstance(numbers, Tensor) else as_vector(numbers, torch.device("cpu"))


def _collection(aggregate: str, bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """The bandwidths of a test with a set of kernels, (B,)."""
    if bandwidth is not None:
        h, _ = checks.bandwidths(bandwidth, None, x.device)
        return resolve(bandwidth, x, y) if isinstance(bandwidth, str) else _constant(h)
    if aggregate == "agg":
        median = median_bandwidth(x, y)
        return torch.stack([median * 2.0**power for power in _AGG_POWERS])
    z = pooled(x, y)
    pairs = z.shape[1] * (z.shape[1] - 1) // 2
    low, high = (ranked_squared_distance(z, min(int(pairs * q), pairs - 1)).sqrt() for q in (0.05, 0.95))
    checks.positive_quantile(low)
    steps = torch.linspace(0, 1, _FUSE_BANDWIDTHS, dtype=torch.float64, device=x.device)
    return low / 2 + steps * (2 * high - low / 2)


def _p_values(values: Tensor, tied: Tensor) -> Tensor:
    """The p-value of the first value of each row among all values of the row."""
    extreme = (values >= values[:, :1] - tied[:, None]).sum(1)
    return torch.where(values.isfinite().all(1), extreme.double() / values.shape[1], torch.nan)


def _agg(values: Tensor, ties: Tensor, each: tuple[KernelTest, ...], count: int, level: float) -> TwoSampleTest:
    """MMDAgg from values (K, 1 + 2·count) of K kernels of weight 1/K: the smallest p-values, and the test at the corrected level."""
    # On the CPU, as each of these small steps would wait for a GPU.
    device, values, ties = values.device, values.cpu(), ties.cpu()
    if not bool(values.isfinite().all()):
        return TwoSampleTest(math.nan, math.nan, False, torch.full_like(values[0, 1:], math.nan, device=device), each)
    # For each value, how many values of its kernel are at least as large.
    ranks = values.shape[1] - torch.searchsorted(values.sort(1).values, values - ties[:, None])
    least = ranks.amin(0).double() / values.shape[1]
    p_value = int((least <= least[0]).sum()) / len(least)

    first, second = values[:, : count + 1].sort(1).values, values[:, count + 1 :]

    def rank(u: float) -> int:
        """The rank of the quantile of order 1 − u/K."""
        return max(math.ceil((count + 1) * (1 - u / len(values))) - 1, 0)

    @functools.cache  # most steps have the rank of an earlier one
    def exceeded(rank: int) -> float:
        return float((second > first[:, rank, None] + ties[:, None]).any(0).double().mean())

    low, high = 0.0, float(len(values))
    for _ in range(_BISECTIONS):
        u = (low + high) / 2
        if exceeded(rank(u)) <= level:
            low = u
        else:
            high = u
    reject = bool((values[:, 0] > first[:, rank(low)] + ties).any())
    return TwoSampleTest(float(least[0]), p_value, reject, least[1:].to(device), each)


@contextmanager
def _reporting(progress: bool | Callable[[float], None]) -> Iterator[Callable[[float], None] | None]:
    """The function to call with the fraction done, or None."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    try:
        bar_of = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield lambda done: _write(f"\rtwo_sample_test {done:4.0%}")
        _write("\n")
        return
    with bar_of(total=1.0, bar_format="two_sample_test {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:
        yield lambda done: bar.update(done - bar.n)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _part_of(report: Callable[[float], None], part: int, parts: int) -> Callable[[float], None]:
    return lambda done: report((part + done) / parts)
