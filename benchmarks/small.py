"""Small problems on a CPU, where a loss must not take longer than the lines that it replaces.

    python -m benchmarks.small                      one thread: `mmd` of N = M from 32 to 2,048, two batches of problems, other operations
    python -m benchmarks.small --n 32 64 --dims 16 --bandwidths 1 --batches --operations --seconds 1
    python -m benchmarks.small --n --batches --operations two_sample_test
    python -m benchmarks.small --imports 10         what `import fastvae` adds to `import torch`; rows in import.jsonl

Of each case all providers once a round, in one process; medians of the processor's time, and their ratio to eager's, which is the
dense reference of `total_correlation` and `group_mmd`, and of `two_sample_test` one kernel matrix and a permutation at a time. Values
are checked against float64 first. Rows are appended to benchmarks/results/small.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae
from benchmarks.measure import Time, commit, interleaved, machine, summary
from benchmarks.providers import Provider, expected, providers, versions
from benchmarks.rows import RESULTS
from benchmarks.run import bandwidths_of, samples, verdict

NAMES = ("fastvae", "fastvae, closed-form prior", "eager", "torch.compile", "KeOps", "geomloss")
# What requires grad: an encoder's sample against one of the prior, or both.
DIRECTIONS = {"forward+backward": (True, False), "forward+backward to both": (True, True)}
BATCHES = ((256, 4, 4096), (1024, 32, 16))


def batched_matrix(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """`benchmarks.providers.matrix` of a batch, in batched products."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        norms = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
        squared = torch.baddbmm(norms, a, b.mT, alpha=-2)
        return torch.stack([torch.exp(squared / (-2 * h * h)).mean((1, 2)) for h in bandwidths]).sum(0)

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def batch_providers() -> list[Provider]:
    """Each returns the mean over the batch."""

    def mean_of(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y, h: compute(x, y, h).mean()

    return [
        Provider("fastvae", mean_of(lambda x, y, h: fastvae.mmd(x, y, bandwidth=h))),
        Provider("fastvae, closed-form prior", mean_of(lambda x, y, h: fastvae.mmd_to_normal(x, bandwidth=h)), prior=True),
        Provider("eager", mean_of(batched_matrix), note="batched products, B×N×M"),
        Provider("torch.compile", torch.compile(mean_of(batched_matrix), dynamic=False), note="of eager"),
    ]


def batch_verdict(provider: Provider, x: Tensor, y: Tensor, h: tuple[float, ...]) -> str:
    if provider.prior:
        exact = fastvae.reference.mmd_to_normal(x.double(), bandwidth=h).mean()
    else:
        exact = fastvae.reference.mmd(x[:1].double(), y[:1].double(), bandwidth=h).mean()
        x, y = x[:1], y[:1]
    wrong = abs(float(provider.compute(x, y, h)) / float(exact) - 1)
    return "ok" if wrong <= 1e-3 else f"wrong value: relative error {wrong:.1e}"


def step(compute: Callable[..., Tensor], x: Tensor, y: Tensor, h: tuple[float, ...], leaves: list[Tensor]) -> None:
    value = compute(x, y, h)
    torch.autograd.grad(value, leaves, allow_unused=True)


def rows(
    args: argparse.Namespace, case: dict[str, Any], listed: list[Provider], x: Tensor, y: Tensor, check: Any
) -> Iterator[dict[str, Any]]:
    h = bandwidths_of(x.shape[-1], case["bandwidths"])
    status = {p.name: p.missing or check(p, x, y, h) for p in listed}
    for direction, wanted in DIRECTIONS.items():
        points = [t.clone().requires_grad_(grad) for t, grad in zip((x, y), wanted, strict=True)]
        leaves = [t for t in points if t.requires_grad]
        steps: dict[str, Callable[[], object]] = {
            p.name: partial(step, p.compute, *points, h, leaves[:1] if p.prior else leaves) for p in listed if status[p.name] == "ok"
        }
        interleaved(steps, "cpu", 10, args.seconds)
        times = interleaved(steps, "cpu", args.rounds, args.seconds)
        found = {name: summary(taken, "cpu") for name, taken in times.items()}
        for p in listed:
            row = {
                "benchmark": "small",
                "operation": "mmd",
                "direction": direction,
                **case,
                "dtype": "float32",
                "provider": p.name,
                "status": status[p.name],
            }
            if p.name in found:
                row |= found[p.name] | {"over_eager": round(found[p.name]["processor_ms"] / found["eager"]["processor_ms"], 3)}
            yield row | {"note": p.note}


def code(n: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(n, dim, generator=generator) for _ in range(2))
    return mu, 0.3 * logvar


def eager_reparameterize_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    std = torch.exp(0.5 * logvar)
    return mu + std * torch.randn_like(std), -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), 1)


def eager_kernel_matmul(x: Tensor, y: Tensor, v: Tensor, h: float) -> Tensor:
    return torch.exp(torch.cdist(x, y).square() / (-2 * h * h)) @ v


def one_by_one(n: int, count: int) -> Tensor:
    """Permuted signs, (2n, count)."""
    v = torch.cat([torch.ones(n), -torch.ones(n)])
    return torch.stack([v[torch.randperm(2 * n)] for _ in range(count)], 1)


def all_at_once(n: int, count: int) -> Tensor:
    v = torch.cat([torch.ones(n), -torch.ones(n)])
    return v[torch.rand(count, 2 * n).argsort(1)].T


def signs(n: int, count: int) -> Tensor:
    """Of a wild bootstrap, (n, count)."""
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
    """Statistic and p-value, dense, of N = M."""
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
    v = torch.cat([torch.cat([torch.ones(n), -torch.ones(n)])[: n if wild else 2 * n, None], permuted(n, count)], 1).to(z.dtype)
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
    """The least p-value of any kernel, and whether the test rejects at the corrected level: Schrab et al. 2023, algorithm 1."""
    first, second = values[:, : count + 1].sort(1).values, values[:, count + 1 :]
    p_value = (values >= values[:, :1]).double().mean(1).min()
    low, high = 0.0, float(len(values))
    for _ in range(50):
        u = (low + high) / 2
        quantiles = first[:, max(math.ceil((count + 1) * (1 - u / len(values))) - 1, 0), None]
        low, high = (u, high) if (second > quantiles).any(0).double().mean() <= level else (low, u)
    return p_value, (values[:, :1] > first[:, max(math.ceil((count + 1) * (1 - low / len(values))) - 1, 0), None]).any()


Operation = tuple[dict[str, Callable[..., Any]], Callable[[int, int], tuple[Tensor, ...]], tuple[int, ...], tuple[tuple[int, int], ...]]


def operations() -> dict[str, Operation]:
    """Providers, of which the first is ours, their arguments, which of these have a gradient, and sizes N × D."""

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
    few, more = ((64, 16), (128, 16), (256, 16), (512, 16)), ((64, 64), (512, 64))
    codes = ((32, 2), (64, 16), (128, 20), (512, 16), (512, 64), (2048, 16), (4096, 64), (65536, 64))
    found: dict[str, Operation] = {
        "reparameterize_kl": ({"fastvae": fastvae.reparameterize_kl, "eager": eager_reparameterize_kl}, code, (0, 1), codes),
        "total_correlation": (
            {"fastvae": total_correlation(None), "eager": total_correlation("reference")},
            lambda n, dim: (code(n, dim)[0] + 0.1, *code(n, dim)),
            (0, 1, 2),
            ((64, 10), (128, 10), (256, 10), (512, 10), (64, 32), (512, 32)),
        ),
        "kernel_matmul": (kernel_matmul, lambda n, dim: (*code(n, dim), torch.ones(n, 4)), (0,), ((32, 16), *few, *more)),
    }
    tests = [(n, dim) for n in (32, 64, 128, 256) for dim in (2, 16)]
    variants: dict[str, dict[str, Any]] = {f"{count} permutations": {"permutations": count} for count in (500, 200)}
    variants |= {"given bandwidth": {"bandwidth": 4.0}, "wild_bootstrap": {"method": "wild_bootstrap"}}
    variants |= {aggregate: {"aggregate": aggregate} for aggregate in ("fuse", "agg")}
    for variant, options in variants.items():
        functions = {"fastvae": partial(fastvae.two_sample_test, **options)}
        for name, permuted in (("eager", one_by_one), ("eager, sorted", all_at_once)):
            functions[name] = partial(eager_two_sample_test, permuted=signs if "method" in options else permuted, **options)
        sizes = tests if "permutations" in options or "bandwidth" in options else ((128, 16),)
        found[f"two_sample_test, {variant}"] = (functions, lambda n, dim: samples(n, dim, "cpu"), (), sizes)
    for groups in (2, 10):
        both = {"fastvae": group_mmd(groups, None), "eager": group_mmd(groups, "reference")}
        found[f"group_mmd, {groups} groups"] = (both, lambda n, dim: code(n, dim)[:1], (0,), (*few, *more))
    return found


def operation_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, (functions, make, wanted, sizes) in operations().items():
        if not name.startswith(tuple(args.operations)):
            continue
        for n, dim in sizes:
            tensors = make(n, dim)
            torch.manual_seed(0)
            found = _first(functions["fastvae"](*tensors))
            torch.manual_seed(0)
            exact = _first(functions["eager"](*(t if name == "reparameterize_kl" else t.double() for t in tensors)))
            wrong = float((found - exact).norm() / exact.norm())
            # Of MMDAgg the statistic is a p-value, of other permutations.
            status = "ok" if wrong < (0.5 if name.endswith("agg") else 1e-3) else f"wrong value: relative error {wrong:.1e}"
            inputs = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
            leaves = [inputs[k] for k in wanted]
            steps: dict[str, Callable[[], object]] = {
                provider: partial(_step, function, inputs, leaves) for provider, function in functions.items() if status == "ok"
            }
            interleaved(steps, "cpu", 10, args.seconds)
            times = {key: summary(taken, "cpu") for key, taken in interleaved(steps, "cpu", args.rounds, args.seconds).items()}
            case = {"operation": name, "batch": 1, "n": n, "m": n, "dim": dim, "bandwidths": 1, "dtype": "float32"}
            for provider in functions:
                direction = "forward+backward" if leaves else "forward"
                row = {"benchmark": "small", "direction": direction, **case, "provider": provider, "status": status}
                if provider in times:
                    row |= times[provider] | {"over_eager": round(times[provider]["processor_ms"] / times["eager"]["processor_ms"], 3)}
                yield row


def _first(result: Any) -> Tensor:
    return torch.as_tensor(result[0] if isinstance(result, tuple) else result)


def _step(function: Callable[..., Any], inputs: list[Tensor], leaves: list[Tensor]) -> None:
    result = function(*inputs)
    if not leaves:
        return
    results = list(result) if isinstance(result, tuple) else [result]
    torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    listed = [p for p in providers("cpu") if p.name in NAMES]
    for n in args.n:
        for dim in args.dims:
            for count in args.bandwidths:
                torch.compiler.reset()
                x, y = samples(n, dim, "cpu")
                case = {"batch": 1, "n": n, "m": n, "dim": dim, "bandwidths": count}
                exact = expected(x, y, bandwidths_of(dim, count))
                yield from rows(args, case, listed, x, y, partial(verdict, exact=exact))
    for batch, n, dim in args.batches:
        for count in args.bandwidths:
            torch.compiler.reset()
            x, y = (t.reshape(batch, n, dim) for t in samples(batch * n, dim, "cpu"))
            case = {"batch": batch, "n": n, "m": n, "dim": dim, "bandwidths": count}
            yield from rows(args, case, batch_providers(), x, y, batch_verdict)
    yield from operation_rows(args)


IMPORTS = {"torch": "import torch", "fastvae": "import fastvae", "fastvae after torch": "import fastvae"}


def import_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Of the statement in fresh processes, in turn, with bytecode as an installation has it; and how many modules it loads."""
    code = """import sys, time, {first}
wall, processor, modules = time.perf_counter(), time.process_time(), len(sys.modules)
{statement}
print(time.perf_counter() - wall, time.process_time() - processor, len(sys.modules) - modules)"""
    found: dict[str, list[list[float]]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": folder, "PYTHONPATH": str(Path(__file__).parents[1])}
        for n in range(1 + rounds):
            for name, statement in IMPORTS.items():
                program = code.format(first="torch" if name.endswith("after torch") else "os", statement=statement)
                run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
                # The first writes the bytecode.
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
    parser.add_argument("--operations", nargs="*", default=[""], help="those besides mmd whose names begin so; all by default")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of one case; three rounds at least")
    parser.add_argument("--imports", type=int, default=0, help="only `import fastvae` and `import torch`, each in so many fresh processes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.batches = [tuple(map(int, shape.split("x"))) for shape in args.batches]
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    date = datetime.now(timezone.utc).date().isoformat()
    common = {"device": machine("cpu"), "threads": 1, **versions(), "commit": commit(), "date": date}
    args.output.mkdir(exist_ok=True)
    if args.imports:
        for row in import_rows(args.imports):
            print(f"{row['provider']:20} {row['median_ms']:7.0f} ms, {row['modules']} modules", flush=True)
            with (args.output / "import.jsonl").open("a") as file:
                file.write(json.dumps(row | common) + "\n")
        return
    for row in cases(args):
        case = (
            f"{row['operation']:20} {row['batch']:4} × N {row['n']:4} D {row['dim']:4} bandwidths {row['bandwidths']} {row['direction']:24}"
        )
        time = f"{row['processor_ms']:9.3f} ms, {row['over_eager']:.2f} of eager" if "processor_ms" in row else row["status"]
        print(f"{case} {row['provider']:26} {time}", flush=True)
        with (args.output / "small.jsonl").open("a") as file:
            file.write(json.dumps(row | common) + "\n")


if __name__ == "__main__":
    main()
