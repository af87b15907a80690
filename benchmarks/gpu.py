"""Test, then measure, on a GPU, from a checkout that need not be installed.

    python -m benchmarks.gpu                     all stages in ten minutes, the most telling first
    python -m benchmarks.gpu --stage speed       one of tests, accuracy and speed
    python -m benchmarks.gpu --dry-run           every stage to its end in Triton's interpreter: none of its rows is a result

Rows are written as they come, to gpu.jsonl in --output (benchmarks/results by default). A failed test ends the script before it measures;
where the time is not enough for all tests it goes on and says so. Steps of one size are timed in turn, directly and as CUDA graphs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

DRY = "--dry-run" in sys.argv
if DRY:
    # Chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastvae  # noqa: E402
from benchmarks.measure import commit, interleaved, machine, peak_extra_mib, summary  # noqa: E402
from benchmarks.providers import matrix, versions  # noqa: E402

ROOT = Path(__file__).parents[1]
OPERATIONS = ("mmd", "reparameterize_kl", "kernel_matmul", "quadratic_form", "total_correlation")
DEVICE = "cpu" if DRY else "cuda"
BACKEND = "triton" if DRY else None
# Shares of the time until a stage ends.
STAGES = {"tests": 0.4, "accuracy": 0.5, "speed": 1.0}
# What `timeout` of coreutils exits with.
TIMEOUT = 124

Row = dict[str, Any]
Step = Callable[[], Any]


def mmd(x: Tensor, y: Tensor, h: float, precision: str | None = None) -> Tensor:
    return fastvae.mmd(x, y, bandwidth=h, precision=precision, backend=BACKEND)


def to_normal(x: Tensor, y: Tensor, h: float) -> Tensor:
    return fastvae.mmd_to_normal(x, bandwidth=h, backend=BACKEND)


def eager(x: Tensor, y: Tensor, h: float) -> Tensor:
    return matrix(x, y, (h,))


def plain_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu), (0.5 * (mu * mu + logvar.exp() - 1 - logvar)).sum(1)


def tests(seconds: float) -> int:
    """The exit status of the operations' tests, on all cores where pytest-xdist is there, as they mostly compile."""
    files = [f"tests/test_{operation}.py" for operation in OPERATIONS]
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # The options of pyproject.toml name plugins and warnings of the development environment.
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-o", "addopts=", "-o", "filterwarnings=", *parallel, *files]
    if DRY:
        command += ["-k", "launches_of_a_step"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return TIMEOUT


def exact(x: Tensor, y: Tensor, h: float, part: int) -> tuple[float, Tensor]:
    """MMD² over all rows and its gradient to the first `part` rows of x, in float64 and in chunks of rows."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return squared.mul_(-0.5 / h**2).exp_()

    def total(a: Tensor, b: Tensor) -> float:
        return sum(kernel(rows, b).sum().item() for rows in a.split(max(1, 2**26 // len(b))))

    value = total(x, x) / n**2 + total(y, y) / m**2 - 2 * total(x, y) / (n * m)
    grad = torch.zeros_like(x[:part])
    for other, weight in ((x, 2 / n**2), (y, -2 / (n * m))):
        k = kernel(x[:part], other)
        grad -= weight / h**2 * (k.sum(1)[:, None] * x[:part] - k @ other)
    return value, grad


def accuracy() -> Iterator[Row]:
    """The error of each precision at sizes that no other check reaches."""
    for n in (64,) if DRY else (4096, 65_536, 262_144):
        generator = torch.Generator().manual_seed(0)
        x, y = (0.9 * torch.randn(n, 16, generator=generator) + 0.1).to(DEVICE), torch.randn(n, 16, generator=generator).to(DEVICE)
        value, grad = exact(x, y, 4.0, 64)
        for precision in ("highest", "high", "medium", "ieee"):
            leaf = x.clone().requires_grad_()
            actual = mmd(leaf, y, 4.0, precision)
            actual.backward()
            error = (leaf.grad[:64].double() - grad).norm() / grad.norm()  # type: ignore[index]
            yield {"n": n, "d": 16, "precision": precision, "value": abs(actual.item() - value) / abs(value), "gradient": error.item()}


def with_gradient(function: Callable[..., Any], *inputs: Tensor, grads: tuple[Tensor, ...] | None = None) -> Step:
    leaves = [t.clone().requires_grad_() for t in inputs]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        outputs = function(*leaves)
        torch.autograd.backward(outputs, grads)

    return step


def graphs(steps: dict[str, Step]) -> dict[str, Step]:
    """A replay of each step that can be captured."""
    found: dict[str, Step] = {}
    for name, step in steps.items() if DEVICE == "cuda" else ():
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            found[f"{name}, CUDA graph"] = graph.replay
        except Exception as error:  # noqa: PERF203
            print(f"no CUDA graph of {name}: {error}", flush=True)
            torch.cuda.synchronize()
    return found


def timed(steps: dict[str, Step], memory: bool = False, **of: Any) -> Iterator[Row]:
    """A row for each step, those that fail with the reason."""
    alive: dict[str, Step] = {}
    for name, step in steps.items():
        try:
            step(), step()
            alive[name] = step
        except Exception as error:  # noqa: PERF203
            yield {**of, "provider": name, "status": f"{type(error).__name__}: {str(error)[:120]}"}
    peaks = {name: peak_extra_mib(step, DEVICE) for name, step in alive.items()} if memory else {}
    alive |= {} if memory else graphs(alive)
    for name, times in interleaved(alive, DEVICE, 3 if DRY else 30, 2.0).items():
        yield {**of, "provider": name, "status": "ok", **summary(times, DEVICE), **({"peak_mib": peaks[name]} if name in peaks else {})}


def points(n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, device=DEVICE), torch.randn(n, d, device=DEVICE)


def speed() -> Iterator[Row]:
    """Sizes that people train with, then the large ones; then the other operations."""
    compiled_sizes = () if DRY else ((128, 16), (1024, 64))
    for n, d in (
        ((20, 3),) if DRY else ((128, 16), (1024, 64), (32, 16), (4096, 64), (512, 16), (256, 64), (2048, 16), (64, 16), (16_384, 64))
    ):
        x, y = points(n, d)
        h = d**0.5
        functions = {"fastvae": mmd, "fastvae, closed-form prior": to_normal, "eager": eager}
        if (n, d) in compiled_sizes:
            functions["torch.compile"] = torch.compile(eager, dynamic=False)
        steps = {name: with_gradient(lambda x, f=f, y=y, h=h: f(x, y, h), x) for name, f in functions.items()}
        yield from timed(steps, operation="mmd", direction="forward+backward", n=n, d=d)
    for n, d in ((30, 3),) if DRY else ((65_536, 64), (65_536, 16), (65_536, 256), (65_536, 128), (65_536, 2), (262_144, 16)):
        x, y = points(n, d)
        steps = {"fastvae": with_gradient(lambda x, y=y, d=d: mmd(x, y, d**0.5), x)}
        yield from timed(steps, memory=True, operation="mmd", direction="forward+backward", n=n, d=d)
        yield from timed({"fastvae": lambda x=x, y=y, d=d: mmd(x, y, d**0.5)}, operation="mmd", direction="forward", n=n, d=d)
    n, d = (40, 3) if DRY else (1_000_000, 16)
    x, y = points(n, d)
    yield from timed({"fastvae": lambda: mmd(x, y, 4.0)}, memory=True, operation="mmd", direction="forward", n=n, d=d)
    for n, d in ((20, 3),) if DRY else ((512, 20), (65_536, 64), (262_144, 256)):
        mu, logvar = points(n, d)
        grads = torch.randn(n, d, device=DEVICE), torch.randn(n, device=DEVICE)
        functions = {"fastvae": lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, backend=BACKEND), "eager": plain_kl}
        if not DRY:
            functions["torch.compile"] = torch.compile(plain_kl, dynamic=False)
        steps = {name: with_gradient(f, mu, logvar, grads=grads) for name, f in functions.items()}
        target = torch.empty_like(mu)
        steps["copy of one array"] = lambda target=target, mu=mu: target.copy_(mu)
        yield from timed(steps, operation="reparameterize_kl", direction="forward+backward", n=n, d=d)
    n, d = (20, 3) if DRY else (16_384, 32)
    z, mu = points(n, d)
    function = lambda z, mu: sum(fastvae.total_correlation(z, mu, 0.1 * mu, dataset_size=60_000, backend=BACKEND))  # noqa: E731
    yield from timed({"fastvae": with_gradient(function, z, mu)}, operation="total_correlation", direction="forward+backward", n=n, d=d)
    labels = torch.randint(19 if n > 100 else 3, (n,), device=DEVICE)
    function = lambda z: fastvae.group_mmd(z, labels, num_groups=19, bandwidth=d**0.5, backend=BACKEND).mean()  # noqa: E731
    yield from timed({"fastvae": with_gradient(function, z)}, operation="group_mmd", direction="forward+backward", n=n, d=d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages; what one leaves is the next's")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where gpu.jsonl is")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device: try it with --dry-run, and on a CPU run python -m benchmarks.run")
    start = time.monotonic()
    common = {"device": machine(DEVICE), "commit": commit(), "date": datetime.now(timezone.utc).date().isoformat(), **versions()}
    # Nothing that a dry run prints is a result.
    path = Path(os.devnull) if DRY and args.output == ROOT / "benchmarks" / "results" else args.output / "gpu.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for stage, share in STAGES.items():
        if args.stage not in (stage, "all"):
            continue
        seconds = 60 * args.minutes * (share if args.stage == "all" else 1) - (time.monotonic() - start)
        print(f"== {stage}, at most {seconds:.0f} s", flush=True)
        if stage == "tests":
            code = tests(max(10.0, seconds))
            if code == TIMEOUT:
                print("the tests were not finished: run them whole with python -m pytest", flush=True)
            elif code:
                sys.exit(f"the tests ended with {code}: nothing is measured")
            continue
        end = time.monotonic() + seconds
        with path.open("a") as file:
            for row in {"accuracy": accuracy, "speed": speed}[stage]():
                line = json.dumps({"stage": stage, **row, **common})
                file.write(line + "\n")
                file.flush()
                print(line, flush=True)
                if time.monotonic() > end:
                    print(f"{stage} was cut at its share of the time", flush=True)
                    break
    print("end", flush=True)


if __name__ == "__main__":
    main()
