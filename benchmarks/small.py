"""Small problems on one CPU thread, where a loss must not take longer than the lines of eager code that it replaces.

    python -m benchmarks.small                      `mmd` with N = M from 32 to 2,048, two batches of problems, and the other operations
    python -m benchmarks.small --n 32 64 --dims 16 --bandwidths 1 --batches --operations --seconds 1
    python -m benchmarks.small --n --batches --operations two_sample_test
    python -m benchmarks.small --n --batches --operations ksd_to_normal log_kernel_density "kernel_matmul," sigreg "mmd,"
    python -m benchmarks.small --imports 10         the time that `import fastvae` adds to `import torch`; rows in import.jsonl

All providers of a case run in one process, in turn. `over_eager` is the ratio of the median processor time to eager's. Eager code is dense:
the reference of `total_correlation` and `group_mmd`, and a kernel matrix for each bandwidth of `two_sample_test`. Values are checked
against float64 before they are timed. Rows are appended to benchmarks/results/small.jsonl.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from benchmarks import eager
from benchmarks.bench_sigreg import eager as eager_sigreg
from benchmarks.machine import conditions
from benchmarks.measure import Steps, Time, summaries, summary
from benchmarks.providers import (
    TOLERANCE,
    Bandwidths,
    Provider,
    bandwidths_of,
    eager_kernel_matmul,
    eager_reparameterize_kl,
    expected,
    providers,
    samples,
    verdict,
    verdict_of_value,
)
from benchmarks.rows import RESULTS, append
from fastvae.radial import RBF, Laplace
from fastvae.two_sample import TwoSampleTest

NAMES = ("fastvae", "fastvae, closed-form prior", "eager", "torch.compile", "KeOps", "geomloss")
# Which of x and y require a gradient: an encoder's sample alone, or both.
DIRECTIONS = {"forward+backward": (True, False), "forward+backward to both": (True, True)}
BATCHES = ((256, 4, 4096), (1024, 32, 16))


def batched_matrix(x: Tensor, y: Tensor, bandwidths: Bandwidths) -> Tensor:
    """`benchmarks.providers.matrix` with batched products."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        norms = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
        squared = torch.baddbmm(norms, a, b.mT, alpha=-2)
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean((1, 2)) for h in bandwidths]).sum(0)

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def batch_providers() -> list[Provider]:
    """Providers that return the mean of MMD² over the batch."""

    def mean_of(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y, h: compute(x, y, h).mean()

    return [
        Provider("fastvae", mean_of(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h))),
        Provider("fastvae, closed-form prior", mean_of(lambda x, y, h: fastvae.mmd_to_normal(x, bandwidth=h)), prior=True),
        Provider("eager", mean_of(batched_matrix), note="batched products, B×N×M"),
        Provider("torch.compile", torch.compile(mean_of(batched_matrix), dynamic=False), note="of eager"),
    ]


def batch_verdict(provider: Provider, x: Tensor, y: Tensor, h: Bandwidths) -> str:
    if provider.prior:
        exact = fastvae.reference.mmd_to_normal(x.double(), bandwidth=h).mean()
    else:
        exact = fastvae.reference.mmd(x[:1].double(), y[:1].double(), bandwidth=h).mean()
        x, y = x[:1], y[:1]
    return verdict_of_value(float(provider.compute(x, y, h)), float(exact))


def step(function: Callable[..., Any], inputs: Sequence[Any], leaves: list[Tensor]) -> None:
    """Runs the function, and takes the gradient of the sum of its results to the leaves, if there are any."""
    result = function(*inputs)
    if not leaves:
        return
    results = list(result) if isinstance(result, tuple) else [result]
    torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])


def rows(
    args: argparse.Namespace, case: dict[str, Any], chosen: list[Provider], x: Tensor, y: Tensor, check: Any
) -> Iterator[dict[str, Any]]:
    h = bandwidths_of(x.shape[-1], case["bandwidths"])
    status = {p.name: p.missing or check(p, x, y, h) for p in chosen}
    for direction, wanted in DIRECTIONS.items():
        points = [t.clone().requires_grad_(grad) for t, grad in zip((x, y), wanted, strict=True)]
        leaves = [t for t in points if t.requires_grad]
        steps: Steps = {
            p.name: partial(step, p.compute, (*points, h), leaves[:1] if p.prior else leaves) for p in chosen if status[p.name] == "ok"
        }
        for row in timed_rows(args, {"operation": "mmd", "direction": direction, **case}, status, steps):
            yield row | {"note": next(p.note for p in chosen if p.name == row["provider"])}


def timed_rows(args: argparse.Namespace, case: dict[str, Any], status: dict[str, str], steps: Steps) -> Iterator[dict[str, Any]]:
    """A row for each provider in `status`."""
    found = summaries(steps, "cpu", args.rounds, args.seconds, warm_up=10)
    for name in status:
        row = {"benchmark": "small", **case, "dtype": "float32", "provider": name, "status": status[name]}
        if name in found:
            row |= found[name] | {"over_eager": round(found[name]["processor_ms"] / found["eager"]["processor_ms"], 3)}
        yield row


def codes(n: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(n, dim, generator=generator) for _ in range(2))
    return mu, 0.3 * logvar


def observed_signs(n: int) -> Tensor:
    """1 for a row of x and −1 for one of y, shape (2n,)."""
    return torch.cat([torch.ones(n), -torch.ones(n)])


def permuted_one_by_one(n: int, count: int) -> Tensor:
    """Permuted signs, shape (2n, count)."""
    v = observed_signs(n)
    return torch.stack([v[torch.randperm(2 * n)] for _ in range(count)], 1)


def permuted_by_sorting(n: int, count: int) -> Tensor:
    return observed_signs(n)[torch.rand(count, 2 * n).argsort(1)].T


def random_signs(n: int, count: int) -> Tensor:
    """Signs of a wild bootstrap, shape (n, count)."""
    return 2.0 * torch.randint(2, (n, count)) - 1


def eager_two_sample_test(
    x: Tensor,
    y: Tensor,
    permuted: Callable[[int, int], Tensor],
    permutations: int = 500,
    bandwidth: float | None = None,
    method: str = "permutation",
    aggregate: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Statistic and p-value for N = M, dense; with "agg" the least p-value of the kernels, and whether the test rejects."""
    n, z = len(x), torch.cat([x, y])
    squared, distances = torch.cdist(z, z).square(), torch.pdist(z)
    if bandwidth is not None:
        h = [bandwidth]
    elif aggregate == "fuse":
        ordered = distances.sort().values
        h = torch.linspace(float(ordered[len(ordered) // 20]) / 2, 2 * float(ordered[len(ordered) * 19 // 20]), 10).tolist()
    else:
        median = float(distances.median()) / 2**0.5
        h = [median * 2.0**power for power in (range(-3, 4) if aggregate else (0,))]
    wild = method == "wild_bootstrap"
    count = 2 * permutations if aggregate == "agg" else permutations
    v = torch.cat([observed_signs(n)[: n if wild else 2 * n, None], permuted(n, count)], 1).to(z.dtype)
    found = []
    for width in h:
        k = torch.exp(squared / (-2 * width**2)).fill_diagonal_(0)
        if wild:
            pairs = (k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]).fill_diagonal_(0)
            values = ((pairs @ v) * v).sum(0) / (n * (n - 1))
        else:
            form, total = ((k @ v) * v).sum(0), k.sum()
            values = (total + form) / (2 * n * (n - 1)) - (total - form) / (2 * n * n)
        found.append(values / (k.square().sum() / (n * (n - 1))).sqrt() if aggregate == "fuse" else values)
    if aggregate == "fuse":
        scale = (n * (n - 1)) ** 0.5
        found = [(torch.stack(found) * scale).logsumexp(0) / scale - math.log(len(h)) / scale]
    if aggregate == "agg":
        return eager_agg(torch.stack(found), permutations)
    return found[0][0], (1 + (found[0][1:] >= found[0][0]).sum()) / (1 + permutations)


def eager_agg(values: Tensor, count: int, level: float = 0.05) -> tuple[Tensor, Tensor]:
    """The least p-value of the kernels, and whether the test rejects at the corrected level: Schrab et al. 2023, algorithm 1."""
    first, second = values[:, : count + 1].sort(1).values, values[:, count + 1 :]
    p_value = (values >= values[:, :1]).double().mean(1).min()

    def quantiles(u: float) -> Tensor:
        """Of order 1 − u/K, for each of the K kernels."""
        return first[:, max(math.ceil((count + 1) * (1 - u / len(values))) - 1, 0), None]

    low, high = 0.0, float(len(values))
    for _ in range(50):
        u = (low + high) / 2
        low, high = (u, high) if (second > quantiles(u)).any(0).double().mean() <= level else (low, u)
    return p_value, (values[:, :1] > quantiles(low)).any()


class Operation(NamedTuple):
    """An operation that is timed.

    Attributes:
        functions: "fastvae", "eager" and others, by provider.
        make_inputs: their arguments for N rows and D features.
        with_gradient: the indices of the arguments that require a gradient.
        sizes: (N, D) of each case.
        value_too: whether the value alone is timed besides value and gradient.
    """

    functions: dict[str, Callable[..., Any]]
    make_inputs: Callable[[int, int], tuple[Tensor, ...]]
    with_gradient: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    value_too: bool = False


def operations() -> dict[str, Operation]:
    """The operations besides `mmd`, by name."""

    def total_correlation(backend: str | None) -> Callable[..., Tensor]:
        return lambda z, mu, logvar: fastvae.total_correlation(z, mu, logvar, dataset_size=50_000, backend=backend).total_correlation

    def group_mmd(groups: int, backend: str | None) -> Callable[..., Tensor]:
        return lambda z: fastvae.group_mmd(
            z, torch.arange(len(z)) % groups, num_groups=groups, bandwidth=z.shape[1] ** 0.5, backend=backend
        ).mean()

    kernel_matmul = {
        "fastvae": lambda x, y, v: fastvae.kernel_matmul(x, y, v, bandwidth=x.shape[1] ** 0.5),
        "eager": lambda x, y, v: eager_kernel_matmul(x, y, v, x.shape[1] ** 0.5),
    }
    kernel_sizes = ((64, 16), (128, 16), (256, 16), (512, 16), (64, 64), (512, 64))
    found = {
        "reparameterize_kl": Operation(
            {"fastvae": fastvae.reparameterize_kl, "eager": eager_reparameterize_kl},
            codes,
            (0, 1),
            ((32, 2), (64, 16), (128, 20), (512, 16), (512, 64), (2048, 16), (4096, 64), (65536, 64)),
        ),
        "total_correlation": Operation(
            {"fastvae": total_correlation(None), "eager": total_correlation("reference")},
            lambda n, dim: (codes(n, dim)[0] + 0.1, *codes(n, dim)),
            (0, 1, 2),
            ((64, 10), (128, 10), (256, 10), (512, 10), (64, 32), (512, 32)),
        ),
        "kernel_matmul": Operation(kernel_matmul, lambda n, dim: (*codes(n, dim), torch.ones(n, 4)), (0,), ((32, 16), *kernel_sizes)),
    }
    test_sizes = tuple((n, dim) for n in (32, 64, 128, 256) for dim in (2, 16))
    variants: dict[str, dict[str, Any]] = {f"{count} permutations": {"permutations": count} for count in (500, 200)}
    variants |= {"given bandwidth": {"bandwidth": 4.0}, "wild_bootstrap": {"method": "wild_bootstrap"}}
    variants |= {aggregate: {"aggregate": aggregate} for aggregate in ("fuse", "agg")}
    for variant, options in variants.items():
        functions = {"fastvae": partial(fastvae.two_sample_test, **options)}
        for name, permuted in (("eager", permuted_one_by_one), ("eager, sorted", permuted_by_sorting)):
            functions[name] = partial(eager_two_sample_test, permuted=random_signs if "method" in options else permuted, **options)
        sizes = test_sizes if "permutations" in options or "bandwidth" in options else ((128, 16),)
        found[f"two_sample_test, {variant}"] = Operation(functions, lambda n, dim: samples(n, dim, "cpu"), (), sizes)
    for groups in (2, 10):
        both = {"fastvae": group_mmd(groups, None), "eager": group_mmd(groups, "reference")}
        found[f"group_mmd, {groups} groups"] = Operation(both, lambda n, dim: codes(n, dim)[:1], (0,), kernel_sizes)
    return found | kernel_operations()


# Problems of a batch, and points of a `KernelMean`.
BATCH, POINTS = 16, 128
KERNEL_SIZES = tuple((n, dim) for n in (32, 128, 512) for dim in (16, 64))
LADDER = (0.5, 1.0, 2.0)


def kernel_operations() -> dict[str, Operation]:
    """Options of operations with a kernel matrix. "eager" takes squared distances by products of rows."""
    found: dict[str, Operation] = {}

    def add(name: str, fused: Callable[..., Tensor], eager_code: Callable[..., Tensor], inputs: Any, cdist: bool = False) -> None:
        functions = {"fastvae": fused, "eager": eager_code}
        if cdist:
            functions["eager, cdist"] = partial(eager_code, squared=eager.by_cdist)
        found[name] = Operation(functions, inputs, (0,), KERNEL_SIZES, value_too=True)

    def rows(count: int, *more: int, batch: tuple[int, ...] = ()) -> Callable[[int, int], tuple[Tensor, ...]]:
        def make(n: int, dim: int) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(0)
            shapes = [(*batch, n, dim)] * count + [(*batch, n, columns) for columns in more]
            return tuple(torch.randn(shape, generator=generator) for shape in shapes)

        return make

    def weighted(n: int, dim: int) -> tuple[Tensor, ...]:
        return *rows(2)(n, dim), 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(1))

    def width(x: Tensor, scale: float = 0.5) -> float:
        return scale * float(x.shape[-1]) ** 0.5

    def widths(x: Tensor) -> tuple[float, ...]:
        return tuple(width(x, scale) for scale in LADDER)

    for name in ("imq", "rbf"):
        add(
            f"ksd_to_normal, {name}",
            lambda z, name=name, **more: fastvae.ksd_to_normal(z, kernel=name, bandwidth=width(z, 1.0), **more),
            lambda z, name=name: eager.ksd_to_normal(name, z, [width(z, 1.0)]),
            rows(1),
        )
    add(
        "ksd_to_normal, imq, unbiased",
        lambda z, **more: fastvae.ksd_to_normal(z, bandwidth=width(z, 1.0), estimator="unbiased", **more),
        lambda z: eager.ksd_to_normal("imq", z, [width(z, 1.0)], unbiased=True),
        rows(1),
    )
    add(
        "ksd_to_normal, imq, 3 bandwidths",
        lambda z, **more: fastvae.ksd_to_normal(z, bandwidth=widths(z), **more),
        lambda z: eager.ksd_to_normal("imq", z, widths(z)),
        rows(1),
    )
    add(
        "ksd_to_normal, imq, batch",
        lambda z, **more: fastvae.ksd_to_normal(z, bandwidth=width(z, 1.0), **more),
        lambda z: eager.ksd_to_normal("imq", z, [width(z, 1.0)]),
        rows(1, batch=(BATCH,)),
    )
    for name in ("rbf", "imq", "laplace"):
        add(
            f"log_kernel_density, {name}",
            lambda x, y, name=name, **more: fastvae.log_kernel_density(x, y, kernel=name, bandwidth=width(x), **more),
            lambda x, y, name=name, **more: eager.log_density(name, x, y, [width(x)], **more),
            rows(2),
            cdist=name != "laplace",
        )
    add(
        "log_kernel_density, rbf, weights",
        lambda x, y, w, **more: fastvae.log_kernel_density(x, y, y_weights=w, bandwidth=width(x), **more),
        lambda x, y, w, **more: eager.log_density("rbf", x, y, [width(x)], w, **more),
        weighted,
        cdist=True,
    )
    add(
        "log_kernel_density, rbf, 3 bandwidths",
        lambda x, y, **more: fastvae.log_kernel_density(x, y, bandwidth=widths(x), **more),
        lambda x, y, **more: eager.log_density("rbf", x, y, widths(x), **more),
        rows(2),
        cdist=True,
    )
    add(
        "log_kernel_density, rbf, batch",
        lambda x, y, **more: fastvae.log_kernel_density(x, y, bandwidth=width(x), **more),
        lambda x, y, **more: eager.log_density("rbf", x, y, [width(x)], **more),
        rows(2, batch=(BATCH,)),
        cdist=True,
    )
    for name in ("rbf", "imq", "laplace"):
        for normalize in (None, "rows", "columns", "both"):
            if name == "rbf" or normalize in (None, "both"):
                options: Any = {"kernel": name, "normalize": normalize}
                add(
                    f"kernel_matmul, {name}, normalize={normalize}",
                    lambda x, y, v, options=options, **more: fastvae.kernel_matmul(x, y, v, bandwidth=width(x), **options, **more),
                    lambda x, y, v, name=name, normalize=normalize, **more: eager.product(name, x, y, v, width(x), normalize, **more),
                    rows(2, 4),
                    cdist=name != "laplace",
                )
    add(
        "kernel_matmul, rbf, normalize=both, batch",
        lambda x, y, v, **more: fastvae.kernel_matmul(x, y, v, bandwidth=width(x), normalize="both", **more),
        lambda x, y, v, **more: eager.product("rbf", x, y, v, width(x), "both", **more),
        rows(2, 4, batch=(BATCH,)),
        cdist=True,
    )
    for slices in (256, 1024):

        def projected(n: int, dim: int, slices: int = slices) -> tuple[Tensor, ...]:
            directions = torch.randn(dim, slices, generator=torch.Generator().manual_seed(1))
            return *rows(1)(n, dim), directions / directions.norm(dim=0)

        add(
            f"sigreg, {slices} slices",
            lambda z, directions, **more: fastvae.sigreg(z, directions=directions, **more),
            eager_sigreg,
            projected,
        )

    @cache
    def mean_and_weights(dim: int, device: torch.device) -> tuple[fastvae.KernelMean, Tensor]:
        generator = torch.Generator().manual_seed(1)
        z, weights = torch.randn(POINTS, dim, generator=generator), torch.rand(POINTS, generator=generator) / (POINTS / 2)
        return fastvae.KernelMean(z, weights.double(), norm=0.7, bandwidth=dim**0.5).to(device), weights.to(device)

    def eager_mmd_to_mean(x: Tensor, **more: Any) -> Tensor:
        mean, weights = mean_and_weights(x.shape[1], x.device)
        return eager.mmd_to_mean(x, mean.points.to(x), weights.to(x), 0.7, width(x, 1.0), **more)

    add(
        "mmd, to a KernelMean",
        lambda x, **more: fastvae.mmd(x, mean_and_weights(x.shape[1], x.device)[0], **more),
        eager_mmd_to_mean,
        rows(1),
        cdist=True,
    )
    kernels: dict[str, Any] = {name: name for name in ("imq", "laplace", "matern32", "matern52", "energy", "riesz")}
    for name, family in (kernels | {"rbf + laplace": RBF() + 0.5 * Laplace().scaled(2)}).items():
        add(
            f"mmd, {name}",
            lambda x, y, family=family, **more: fastvae.mmd(x, y, kernel=family, bandwidth=width(x, 1.0), **more),
            lambda x, y, name=name, **more: eager.mmd(name, x, y, width(x, 1.0), **more),
            rows(2),
            cdist=name == "imq",
        )
    return found


def operation_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, operation in operations().items():
        if not name.startswith(tuple(args.operations)):
            continue
        for n, dim in operation.sizes:
            tensors = operation.make_inputs(n, dim)
            status = operation_verdict(name, operation, tensors)
            for with_gradient in ((), operation.with_gradient) if operation.value_too else (operation.with_gradient,):
                inputs = [t.clone().requires_grad_(k in with_gradient) for k, t in enumerate(tensors)]
                leaves = [inputs[k] for k in with_gradient]
                direction = "forward+backward" if leaves else "forward"
                batch = len(tensors[0]) if tensors[0].ndim > 2 else 1
                case = {"operation": name, "direction": direction, "batch": batch, "n": n, "m": n, "dim": dim, "bandwidths": 1}
                steps: Steps = {
                    provider: partial(step, function, inputs, leaves)
                    for provider, function in operation.functions.items()
                    if status == "ok"
                }
                yield from timed_rows(args, case, dict.fromkeys(operation.functions, status), steps)


def operation_verdict(name: str, operation: Operation, tensors: tuple[Tensor, ...]) -> str:
    """The status of a row: "ok" if `fastvae` agrees with eager code in float64 (in float32 where the same random numbers are needed)."""
    torch.manual_seed(0)
    found = operation.functions["fastvae"](*tensors)
    torch.manual_seed(0)
    exact = operation.functions["eager"](*(t if name == "reparameterize_kl" else t.double() for t in tensors))
    if name.endswith(", agg"):
        return p_value_verdict(found.statistic, float(exact[0]), len(found.null))
    ours, others = (torch.as_tensor(result[0] if isinstance(result, tuple) else result) for result in (found, exact))
    wrong = float((ours - others).norm() / others.norm())
    if not wrong <= TOLERANCE:
        return f"wrong value: relative error {wrong:.1e}"
    return p_value_verdict(found.p_value, float(exact[1]), len(found.null)) if isinstance(found, TwoSampleTest) else "ok"


def p_value_verdict(found: float, exact: float, permutations: int) -> str:
    """Whether p-values from independent sets of permutations differ by no more than five standard errors and one count."""
    mean = (found + exact) / 2
    allowed = 5 * math.sqrt(2 * mean * (1 - mean) / permutations) + 1 / permutations
    return "ok" if abs(found - exact) <= allowed else f"wrong p-value: {found:.4f} for {exact:.4f}"


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    chosen = [p for p in providers("cpu") if p.name in NAMES]
    for n in args.n:
        for dim in args.dims:
            for count in args.bandwidths:
                torch.compiler.reset()
                x, y = samples(n, dim, "cpu")
                case = {"batch": 1, "n": n, "m": n, "dim": dim, "bandwidths": count}
                exact = expected(x, y, bandwidths_of(dim, count))
                yield from rows(args, case, chosen, x, y, partial(verdict, exact=exact))
    for batch, n, dim in args.batches:
        for count in args.bandwidths:
            torch.compiler.reset()
            x, y = (t.reshape(batch, n, dim) for t in samples(batch * n, dim, "cpu"))
            case = {"batch": batch, "n": n, "m": n, "dim": dim, "bandwidths": count}
            yield from rows(args, case, batch_providers(), x, y, batch_verdict)
    yield from operation_rows(args)


# The last statement runs after `import torch`.
IMPORTS = {"torch": "import torch", "fastvae": "import fastvae", "fastvae after torch": "import fastvae"}


def import_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Time and number of loaded modules of each statement, in fresh processes, with compiled bytecode as in an installation."""
    program = """import sys, time, {first}
wall, processor, modules = time.perf_counter(), time.process_time(), len(sys.modules)
{statement}
print(time.perf_counter() - wall, time.process_time() - processor, len(sys.modules) - modules)"""
    found: dict[str, list[list[float]]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": folder, "PYTHONPATH": str(Path(__file__).parents[1])}
        for n in range(1 + rounds):
            for name, statement in IMPORTS.items():
                text = program.format(first="torch" if name.endswith("after torch") else "os", statement=statement)
                run = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
                # The first round writes the bytecode.
                if n:
                    found[name].append([float(number) for number in run.stdout.split()])
    for name, numbers in found.items():
        times = summary([Time(wall, processor) for wall, processor, _ in numbers], "cpu")
        yield {"benchmark": "import", "provider": name, "status": "ok"} | times | {"modules": int(numbers[0][2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="*", default=[32, 64, 128, 256, 512, 1024, 2048], help="N = M")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--bandwidths", type=int, nargs="+", choices=[1, 5], default=[1, 5])
    parser.add_argument("--batches", nargs="*", default=["x".join(map(str, shape)) for shape in BATCHES], help="B×N×D, as 1024x32x16")
    parser.add_argument("--operations", nargs="*", default=[""], help="beginnings of the names of other operations; all by default")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one case; it has three rounds at least")
    parser.add_argument("--imports", type=int, default=0, help="time only the imports, each in so many fresh processes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.batches = [tuple(map(int, shape.split("x"))) for shape in args.batches]
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common = conditions("cpu")
    if args.imports:
        for row in import_rows(args.imports):
            print(f"{row['provider']:20} {row['median_ms']:7.0f} ms, {row['modules']} modules", flush=True)
            append(args.output / "import.jsonl", row | common)
        return
    for row in cases(args):
        size = f"{row['batch']:4} × N {row['n']:4} D {row['dim']:4} bandwidths {row['bandwidths']}"
        time = f"{row['processor_ms']:9.3f} ms, {row['over_eager']:.2f} of eager" if "processor_ms" in row else row["status"]
        print(f"{row['operation']:41} {size} {row['direction']:24} {row['provider']:26} {time}", flush=True)
        append(args.output / "small.jsonl", row | common)


if __name__ == "__main__":
    main()
