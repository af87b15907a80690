"""`KernelMean`, the mean embedding of a large fixed sample, and MMD² to it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastvae import checks, reference
from fastvae.bandwidths import resolve
from fastvae.cpu.pairs import Landmarks, ToMean
from fastvae.devices import lacks_float64
from fastvae.dispatch import accumulation_dtype
from fastvae.distributed import gather_rows, propagate_errors, sum_shares
from fastvae.features import kernel_matrix
from fastvae.kernel_sums import Numbers
from fastvae.ops.common import kernel_arguments, unit_weights
from fastvae.ops.kernel_matmul import apply_kernel_matmul
from fastvae.ops.log_kernel_density import few_rows_of, of_few_rows
from fastvae.ops.mmd import apply_mmd
from fastvae.ops.quadratic_form import quadratic_form_diagonal
from fastvae.radial import Kernel, kernel_of
from fastvae.reference.quadratic_form import pairs_with_self
from fastvae.version import __version__

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Random rows of which a rule takes the bandwidth.
_ROWS_OF_A_RULE = 4096
# Numbers of the pool that are taken to float64 at once, 128 MiB.
_NUMBERS_AT_ONCE = 1 << 24
_FORMAT = "fastvae.KernelMean"


class KernelMean(nn.Module):
    """The mean embedding of a large fixed sample, Σ_m α_m·k(z_m, ·), to which `fastvae.mmd(x, kernel_mean)` measures MMD².

        reference = KernelMean.fit(embeddings, landmarks=4096, bandwidth=h)  # once, from 10⁵ to 10⁶ rows
        loss = fastvae.mmd(x, reference)  # in each step, in time O(N·(N + landmarks)·D)

    The module has no parameters. Its buffers move with a model that holds it and are in its `state_dict`; `half()` and other casts leave
    their dtypes as they are. The `state_dict` also names the kernel and its bandwidths: `load_state_dict` into a module with others is an
    error. `load` makes the module from a file that `save` wrote.

    Args:
        points: z, (M, D), floating point; kept in float64 if they are float64, else in float32.
        weights: α, (M,), of any sum; 1/M each by default.
        norm: The squared norm of the embedding, mean k(r, r') over the pairs of the fixed sample; a constant in MMD².
        bandwidth: h, as in `fastvae.mmd`, but not a rule and without a gradient.
        bandwidth_weights: a_b, one for each bandwidth; 1 each by default.
        kernel: As in `fastvae.mmd`; a sum only of functions of the distance.
        error: The squared distance to the embedding that this one approximates, see `fit`; nan if it is not known.

    Attributes:
        points, weights, norm, error: As above; `weights`, `norm` and `error` in float64. `weights` is None for equal weights.
            What a CPU prepares of the points is kept until they change. A change in place that PyTorch does not count, by `points.data` or
            by an array that shares their memory, is not noticed: assign the points anew.
        kernel, bandwidth, bandwidth_weights: The kernel as a `fastvae.Kernel` and tuples of numbers.

    Raises:
        TypeError: points or weights are not floating-point tensors, or a number is not one.
        ValueError: A shape, bandwidth, weight or option breaks a rule above.
    """

    points: Tensor
    weights: Tensor | None
    norm: Tensor
    error: Tensor
    # The points, their version and address, and what was prepared of them.
    _prepared: tuple[Tensor, tuple[int, int], Landmarks] | None = None

    def __init__(
        self,
        points: Tensor,
        weights: Tensor | None = None,
        *,
        norm: float | Tensor,
        bandwidth: float | Sequence[float] | Tensor,
        bandwidth_weights: Sequence[float] | Tensor | None = None,
        kernel: checks.KernelName | Kernel = "rbf",
        error: float | Tensor = float("nan"),
    ) -> None:
        super().__init__()
        checks.points("points", points)
        if weights is not None:
            checks.one_weight_a_point(weights, points)
            weights = weights.detach().reshape(-1).to(points.device, torch.float64, copy=True)
        self.kernel = checks.kernel(kernel)
        checks.one_sweep(self.kernel)
        checks.no_rule(bandwidth, "for a KernelMean that is not fitted")
        self.bandwidth, self.bandwidth_weights = map(_numbers, checks.bandwidths(bandwidth, bandwidth_weights, None))
        self.register_buffer("points", points.detach().to(accumulation_dtype(points.dtype), copy=True))
        self.register_buffer("weights", weights)
        for name, value in (("norm", norm), ("error", error)):
            if not isinstance(value, Tensor):
                checks.number(name, value)
                value = torch.full((), value, dtype=torch.float64, device=points.device)
            checks.one_number(name, value)
            self.register_buffer(name, value.detach().to(points.device, torch.float64, copy=True).reshape(()))

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        pool: Tensor | Iterable[Any],
        *,
        landmarks: int | Tensor = 4096,
        bandwidth: float | checks.BandwidthRule | Sequence[float] | Tensor = "median",
        bandwidth_weights: Sequence[float] | Tensor | None = None,
        kernel: checks.KernelName | Kernel = "rbf",
        method: Literal["nystrom", "all"] = "nystrom",
        ridge: float = 1e-6,
        norm_rows: int | None = 100_000,
        kmeans_rows: int = 200_000,
        kmeans_iterations: int = 20,
        seed: int | torch.Generator | None = None,
    ) -> KernelMean:
        """Compresses a sample r of any size into `landmarks` weighted points, in memory O(landmarks² + the rows that are drawn).

            μ_m = mean_j k(z_m, r_j),   α = (K_zz + ridge·I)⁻¹ μ,   norm = mean_ij k(r_i, r_j)

        The attribute `error` is ‖Σ_m α_m·k(z_m, ·) − μ‖² in the space of the kernel: MMD² between the sample and its compression. The
        difference between `mmd(x, kernel_mean)` and `mmd(x, r)` is at most 2·√error·√(mean k(x, x')), and for ridge → 0 at most
        2·√error·MMD(x, r) + 2·error, besides the error of an estimated `norm`. All but `norm` is computed in float64.

        Args:
            pool: r, (R, D), floating point. Or batches (n, D) of it, for a pool that does not fit in memory: an iterable that is iterated
                twice, such as a list or a DataLoader; a batch that is a tuple or a list stands for its first element. A generator, which
                is iterated once, is enough if landmarks are points and bandwidth is no rule, and for a pool of no more rows than are drawn.
            landmarks: The number of landmarks z, the centres of k-means by scikit-learn of `kmeans_rows` random rows, at most 2¹⁵; or the
                landmarks themselves, (M, D). Their kernel matrix takes 8·M² bytes, and its factor as many again. With no more rows than
                `landmarks`, all rows are landmarks.
            bandwidth: h, as in `fastvae.mmd`, but without a gradient. A rule is applied to 4,096 random rows.
            bandwidth_weights: a_b, one for each bandwidth; 1 each by default.
            kernel: As in `fastvae.mmd`, but "energy", which has no mean embedding, only with method="all".
            method: "nystrom"; or "all" to keep all rows with equal weights, for the value of `mmd(x, r)` itself without the pairs of r.
            ridge: λ relative to the mean of k(z, z), which is 1 for most kernels.
            norm_rows: How many random rows `norm` and `error` are estimated from; None for all rows. With fewer rows than the pool has, the
                part of the norm that landmarks can represent is still that of the whole pool, and the rest is estimated: in `norm` from
                pairs i ≠ j, without bias, and in `error` from all pairs, which are too large by mean k(r, r)/norm_rows at most on average.
            kmeans_rows: The most random rows that k-means takes.
            kmeans_iterations: The most iterations of k-means.
            seed: An integer, or a generator on the CPU. None: PyTorch's global generator.

        Returns:
            A `KernelMean` on the device of the pool.

        Raises:
            ImportError: scikit-learn is not installed, and landmarks are not given.
            TypeError: As in `fastvae.mmd`.
            ValueError: As in `fastvae.mmd`; also a pool with a nan or an infinity, or that can be iterated only once where it must be
                twice, or a ridge that is too small.

        Source: Chatalic, Schreuder, Rosasco and Rudi 2022, "Nyström kernel mean embeddings"; iRDM (arXiv 2607.02375) for the choices.
        """
        checks.option("method", method, ("nystrom", "all"))
        family = checks.kernel(kernel)
        checks.one_sweep(family)
        h, a = checks.bandwidths(bandwidth, bandwidth_weights, None)
        rule = bandwidth if isinstance(bandwidth, str) else None
        given = landmarks if isinstance(landmarks, Tensor) else None
        count = 0
        if given is None:
            count = checks.integer("landmarks", landmarks, at_least=1) if method == "all" else checks.landmarks(landmarks)
        else:
            checks.points("landmarks", given)
            checks.landmarks(len(given))
        if method == "nystrom":
            checks.positive_definite_kernel(family, _numbers(a))
        checks.real("ridge", ridge, above=0)
        sizes = [checks.integer("kmeans_rows", kmeans_rows, at_least=1) if method == "nystrom" and given is None else 1]
        sizes += [_ROWS_OF_A_RULE] * (rule is not None)
        sizes += [] if norm_rows is None else [checks.integer("norm_rows", norm_rows, at_least=2)]
        checks.integer("kmeans_iterations", kmeans_iterations, at_least=1)
        key = torch.empty(1, dtype=torch.int64, device="cpu").random_(generator=checks.seed(seed))
        source = np.random.Generator(np.random.PCG64(int(key)))
        batches, once = _batches(pool)

        # Drawn in a pass of its own, or in the pass that takes the means.
        drawn = _DrawnRows(source, None if norm_rows is None else max(sizes))
        first_pass = method == "all" or given is None or rule is not None
        if first_pass:
            kept = []
            for batch in batches():
                drawn.add(batch)
                kept += [batch] * (method == "all")
            if rule is not None:
                h = resolve(rule, drawn.rows()[:_ROWS_OF_A_RULE])
        h, a = _numbers(h), _numbers(a)
        options: Any = {"bandwidth": h, "bandwidth_weights": a, "kernel": family}
        arguments = (*kernel_arguments(family, h, a), "", "")
        if method == "all":
            own, across = _pair_means(drawn.rows()[:norm_rows], family, h, a)
            norm = across + (own - across) / drawn.seen
            return cls(torch.cat(kept), norm=norm, error=0.0, **options)
        if first_pass and once:
            rows = drawn.rows()
            checks.iterated_twice(drawn.seen, len(rows))
            parts: Iterable[Tensor] = [rows]
        else:
            parts = batches()
        points = _kmeans(drawn.rows()[:kmeans_rows], count, kmeans_iterations, source) if given is None else given.detach()
        total: Any = 0.0
        seen = 0
        for batch in parts:
            if seen == 0:
                checks.same_features("pool", batch, "landmarks", points)
                points = points.to(batch.device, accumulation_dtype(batch.dtype))
                z = points.double()
            if not first_pass:
                drawn.add(batch)
            total = total + _sums_over(batch, z, arguments)
            seen += len(batch)
        mu, k = total / seen, kernel_matrix(z, z, family, h, a)
        factor, failed = torch.linalg.cholesky_ex(k + ridge * k.diagonal().mean() * torch.eye(len(k), dtype=k.dtype, device=k.device))
        checks.positive_definite(not failed, ridge)
        alpha = torch.cholesky_solve(mu[:, None], factor)[:, 0]
        rows = drawn.rows()[:norm_rows]
        n, (own, across) = len(rows), _pair_means(rows, family, h, a)
        norm = across + (own - across) / seen
        rest = norm - alpha @ mu
        if n < seen:
            # μᵀ·(K_zz + λI)⁻¹·μ is that of the whole pool, so that only what it lacks of the norm has the error of an estimate.
            mu_rows = _sums_over(rows, z, arguments) / n
            represented = mu_rows @ torch.cholesky_solve(mu_rows[:, None], factor)[:, 0]
            some = kernel_matrix(z, rows[:_ROWS_OF_A_RULE].double(), family, h, a)
            own_represented = (some * torch.cholesky_solve(some, factor)).sum() / some.shape[1]
            across_represented = (n * represented - own_represented) / (n - 1)
            norm = norm + alpha @ mu - (across_represented + (own_represented - across_represented) / seen)
            rest = across + (own - across) / n - represented
        # Below 0 by rounding alone.
        error = (rest - alpha @ mu + alpha @ k @ alpha).clamp(min=0)
        return cls(points, alpha, norm=norm, error=error, **options)

    def forward(self, x: Tensor) -> Tensor:
        """The embedding at x (N, D), Σ_m α_m·k(z_m, x_i), shape (N,): a density up to a factor if k is one."""
        checks.points("x", x)
        checks.same_features("x", x, "the KernelMean", self.points)
        checks.same_device("x", x, "the KernelMean", self.points)
        x, z = _common(x, self)
        weights = z.new_full((len(z),), 1 / len(z)) if self.weights is None else self.weights.to(z.dtype)
        values: Tensor = apply_kernel_matmul(x, z, weights[:, None], *self._arguments(), "", "")
        return values[:, 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the embedding to a safetensors file, which `load` reads.

        Raises:
            ImportError: safetensors is not installed.
        """
        checks.installed("safetensors", "safetensors", "KernelMean.save", "landmarks")
        from safetensors.torch import save_file

        metadata = {"format": _FORMAT, "version": __version__, "kernel": self.kernel.name}
        for name in ("bandwidth", "bandwidth_weights"):
            metadata[name] = json.dumps(getattr(self, name))
        metadata["parameters"] = json.dumps(self.kernel.parameters)
        save_file({name: t.cpu().contiguous() for name, t in self.named_buffers()}, os.fspath(path), metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> KernelMean:
        """The embedding in a file that `save` wrote, on the CPU.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: There is no such file.
            ValueError: It is another file.
        """
        checks.installed("safetensors", "safetensors", "KernelMean.load", "landmarks")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "pt") as file:
                metadata = file.metadata() or {}
                checks.file_format(path, metadata.get("format"), _FORMAT)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            numbers: Any = {name: json.loads(metadata[name]) for name in ("bandwidth", "bandwidth_weights")}
            return KernelMean(**tensors, kernel=kernel_of(metadata["kernel"], json.loads(metadata["parameters"])), **numbers)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a file that KernelMean.save wrote, got another file ({error})") from error

    def get_extra_state(self) -> Tensor:
        """The kernel and its bandwidths as text, in a tensor, since files of safetensors hold no others."""
        kernel = [self.kernel.name, self.kernel.parameters, self.bandwidth, self.bandwidth_weights]
        return torch.tensor(list(json.dumps(kernel).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `load_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if isinstance(state, Tensor):
            checks.state_of_kernel(*(json.loads(bytes(t.tolist())) for t in (self.get_extra_state(), state)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        widths = ", ".join(f"{h:.4g}" for h in self.bandwidth)
        rows, features = self.points.shape
        return f"{rows} points, {features} features, kernel={self.kernel}, bandwidth=[{widths}], error={self.error.item():.3g}"

    def _arguments(self) -> Any:
        return kernel_arguments(self.kernel, self.bandwidth, self.bandwidth_weights)

    def _landmarks(self, dtype: torch.dtype) -> Landmarks:
        """The points in `dtype`, prepared once for the steps of a training."""
        points, found = self.points, self._prepared
        # An assignment to `points.data` changes the address alone.
        state = None if points.is_inference() else (points._version, points.data_ptr())
        if found is not None and found[0] is points and found[1] == state and found[2].z.dtype == dtype:
            return found[2]
        prepared = Landmarks.of(points.detach().to(dtype))
        if state is not None and not prepared.z.is_inference():
            self._prepared = points, state, prepared
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # To another device only: weights of lower precision would be other weights. A device without float64 is sent the rows of x instead.
        device = function(torch.empty(0, device=self.points.device)).device
        self._prepared = None
        return super()._apply(lambda t: t if lacks_float64(device) else t.to(device), recurse)  # type: ignore[no-untyped-call]


def mmd_to_mean(
    x: Tensor,
    mean: KernelMean,
    x_weights: Tensor | None,
    estimator: Any,
    precision: checks.Precision | None,
    backend: checks.AnyBackend | None,
    process_group: ProcessGroup | None,
) -> Tensor:
    """`fastvae.mmd` of x (N, D) and a fixed embedding. Formula (1) of `fastvae.reference.kernel_mean`."""
    with propagate_errors(process_group):
        checks.points("x", x)
        checks.same_features("x", x, "the KernelMean", mean.points)
        checks.same_device("x", x, "the KernelMean", mean.points)
        checks.kernel_options(mean.kernel, precision, backend, x.device, checks.ALL_BACKENDS)
        checks.option("estimator", estimator, checks.ESTIMATORS)
        if x_weights is not None:
            checks.sample_weights("x_weights", x_weights, "x", x, estimator)
        if process_group is not None:
            checks.distributed(x, estimator, backend, process_group)
        x, z = _common(x, mean)
    whole, whole_weights, start = x, x_weights, 0
    if process_group is not None:
        (whole, *others), start = gather_rows("x", [x] if x_weights is None else [x, x_weights], process_group, estimator)
        whole_weights = others[0] if others else None
    checks.enough_rows("x", whole, estimator)
    if whole_weights is not None:
        checks.sum_of_weights("x_weights", whole_weights, estimator)
    if backend == "reference":
        options: Any = {"bandwidth": mean.bandwidth, "bandwidth_weights": mean.bandwidth_weights, "kernel": mean.kernel}
        weights = None if mean.weights is None else mean.weights.to(x.dtype)
        p = None if x_weights is None else x_weights.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return reference.mmd_to_mean(x, z, weights, mean.norm.to(x.dtype), estimator=estimator, x_weights=p, **options)
    gathered = [None] * 4 if process_group is None else [whole, None, whole_weights, None]
    options = estimator == "unbiased", precision or "", backend or "", "" if process_group is None else process_group.group_name

    def streaming(x: Tensor, z: Tensor, weights: Tensor | None) -> Tensor:
        return _to_mean_by_ops(mean, [x, z, x_weights, weights, *gathered, start, 0, mean.norm], options)

    if process_group is None and x_weights is None and (few := few_rows_of(mean.kernel, mean.bandwidth, mean.bandwidth_weights, backend)):
        to_mean = ToMean(few, mean.norm, estimator == "unbiased", mean._landmarks)
        value = of_few_rows(to_mean, x, z, mean.weights, streaming)
        if value is not None:
            return value
    value = streaming(x, z, mean.weights)
    return value if process_group is None else sum_shares(value, process_group)


def _to_mean_by_ops(mean: KernelMean, rows: list[Any], options: tuple[bool, str, str, str]) -> Tensor:
    """MMD² to the embedding, or the share of some rows in it. `rows` are those of `apply_mmd`, with the weights of the embedding."""
    x, z, x_weights, weights, all_x = rows[:5]
    # The sweep takes weights that sum to one, so that the constants it subtracts from a kernel cancel. What they lack is given to the first
    # point, and taken back as a sum over x alone.
    rest = None
    if weights is not None:
        rest = 1 - weights.sum()
        weights = torch.cat([weights[:1] + rest, weights[1:]])
    value: Tensor = apply_mmd([*rows[:3], weights, *rows[4:]], mean._arguments(), *options)
    if rest is None:
        return value
    factor = (2 * rest).to(z.dtype).reshape(1, 1)
    at_first: Tensor = apply_kernel_matmul(x, z[:1], factor, *mean._arguments(), options[1], options[2].replace("inductor", "cpu"))
    if x_weights is None:
        return value + at_first.sum() / len(x if all_x is None else all_x)
    of_rows: Tensor = unit_weights(x_weights, rows[6], x.dtype) * at_first[:, 0]
    return value + of_rows.sum()


def _common(x: Tensor, mean: KernelMean) -> tuple[Tensor, Tensor]:
    """x and the points in one dtype."""
    dtype = torch.promote_types(x.dtype, mean.points.dtype)
    return x.to(dtype), mean.points.to(dtype)


def _batches(pool: Any) -> tuple[Callable[[], Iterator[Tensor]], bool]:
    """A function that iterates over the batches, checked and where float64 is, and whether it can be called only once."""
    if isinstance(pool, Tensor):
        checks.points("pool", pool)
        parts: Iterable[Any] = [pool]
    else:
        checks.iterable("pool", pool)
        parts = pool

    def batches() -> Iterator[Tensor]:
        first = None
        for batch in parts:
            batch = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
            checks.points("pool" if batch is pool else "a batch of pool", batch)
            batch = batch.detach().cpu() if lacks_float64(batch.device) else batch.detach()
            checks.finite("pool", batch)
            if first is not None:
                checks.same_features("a batch of pool", batch, "the one before", first)
                checks.same_kind("a batch of pool", batch, "the one before", first)
            first = batch[:1]
            yield batch
        checks.has_batches("pool", first)

    return batches, iter(parts) is parts


class _DrawnRows:
    """Up to `size` rows of a stream, all of them if it is None, in random order: each set of rows is as probable as any other."""

    def __init__(self, source: np.random.Generator, size: int | None) -> None:
        self.source, self.size, self.seen, self.sorted = source, size, 0, True
        self.keys: list[Tensor] = []
        self.parts: list[Tensor] = []

    def add(self, batch: Tensor) -> None:
        self.seen += len(batch)
        self.sorted = False
        self.keys.append(torch.from_numpy(self.source.random(len(batch))).to(batch.device))
        self.parts.append(batch)
        if self.size is not None and sum(map(len, self.parts)) > 2 * self.size:
            self.rows()

    def rows(self) -> Tensor:
        """Those with the smallest keys, the smallest first."""
        if not self.sorted:
            keys, order = torch.cat(self.keys).sort()
            rows = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
            self.keys, self.parts, self.sorted = [keys[: self.size]], [rows[order[: self.size]]], True
        return self.parts[0]


def _numbers(numbers: Numbers) -> tuple[float, ...]:
    return tuple(numbers.detach().cpu().tolist() if isinstance(numbers, Tensor) else numbers)


def _sums_over(rows: Tensor, z: Tensor, arguments: Any) -> Tensor:
    """Σ_j k(z_m, r_j), float64."""
    step = max(1, _NUMBERS_AT_ONCE // rows.shape[1])
    parts = (rows[start : start + step].double() for start in range(0, len(rows), step))
    return torch.stack([apply_kernel_matmul(z, part, torch.ones_like(part[:, :1]), *arguments)[:, 0] for part in parts]).sum(0)


def _pair_means(z: Tensor, family: Kernel, h: Numbers, a: Numbers) -> tuple[Tensor, Tensor]:
    """The mean of k(z_i, z_i), and that of k(z_i, z_j) over i ≠ j, float64."""
    n, ones = len(z), z.new_ones(len(z), 1, dtype=accumulation_dtype(z.dtype))
    own = torch.as_tensor(pairs_with_self(z, ones, family, h, a), dtype=torch.float64, device=z.device).reshape(())
    own = own if family.radial else own / n
    if n == 1:
        return own, own
    return own, quadratic_form_diagonal(z, ones, *kernel_arguments(family, h, a), "", "")[0] / (n * (n - 1))


def _kmeans(rows: Tensor, count: int, iterations: int, source: np.random.Generator) -> Tensor:
    """The centres of `count` clusters, or the rows if there are no more than these."""
    if len(rows) <= count:
        return rows
    checks.installed("sklearn", "scikit-learn", "KernelMean.fit", "landmarks", "or pass landmarks as points")
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    data = rows.to("cpu", accumulation_dtype(rows.dtype)).numpy()
    state = int(source.integers(2**31))
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: some centres repeat, which the ridge allows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres = KMeans(count, init="random", n_init=1, max_iter=iterations, tol=0, random_state=state).fit(data).cluster_centers_
    return torch.from_numpy(centres).to(rows.device, accumulation_dtype(rows.dtype))
