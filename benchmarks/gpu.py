"""Test, then measure, on a GPU, from a checkout that need not be installed.

    python -m benchmarks.gpu                     all stages in ten minutes, the most telling first
    python -m benchmarks.gpu --stage speed       one of tests, accuracy, host, training and speed
    python -m benchmarks.gpu --dry-run           every stage to its end in Triton's interpreter: none of its rows is a result

Rows are written case by case, to gpu.jsonl in the folder --output (benchmarks/results by default; of a dry run nowhere). A failed test ends
the script before it measures; where the time is not enough for all tests it goes on and says so. Steps of one size are timed in turn,
directly and as CUDA graphs. What is timed is in benchmarks/gpu_steps.py.
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

DRY = "--dry-run" in sys.argv
if DRY:
    # Chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.gpu_steps import DEVICE, Row, host, mmd, speed, training  # noqa: E402
from benchmarks.measure import commit, machine  # noqa: E402
from benchmarks.providers import version, versions  # noqa: E402

ROOT = Path(__file__).parents[1]
OPERATIONS = ("mmd", "reparameterize_kl", "kernel_matmul", "quadratic_form", "total_correlation")
# Shares of the time until a stage ends.
STAGES = {"tests": 0.35, "accuracy": 0.42, "host": 0.44, "training": 0.52, "speed": 1.0}
# What `timeout` of coreutils exits with.
TIMEOUT = 124


def tests(seconds: float) -> int:
    """The exit status of the operations' tests, on all cores where pytest-xdist is there, as they mostly compile."""
    files = [f"tests/test_{operation}.py" for operation in OPERATIONS]
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # The options of pyproject.toml name plugins and warnings of the development environment.
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-o", "addopts=", "-o", "filterwarnings=", *parallel, *files]
    if DRY:
        command += ["-k", "triton_half"]
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


def accuracy() -> Iterator[list[Row]]:
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
            value_error = abs(actual.item() - value) / abs(value)
            yield [{"n": n, "d": 16, "precision": precision, "value": value_error, "gradient": error.item()}]


ROWS: dict[str, Callable[[], Iterator[list[Row]]]] = {"accuracy": accuracy, "host": host, "training": training, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages; what one leaves is the next's")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of gpu.jsonl")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device: try it with --dry-run, and on a CPU run python -m benchmarks.run")
    start = time.monotonic()
    common = {"device": machine(DEVICE), "commit": commit(), "date": datetime.now(timezone.utc).date().isoformat()}
    common |= versions() | {"jax": version("jax")}
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
            for rows in ROWS[stage]():
                lines = "".join(json.dumps({"stage": stage, **row, **common}) + "\n" for row in rows)
                file.write(lines)
                file.flush()
                print(lines, end="", flush=True)
                if time.monotonic() > end:
                    print(f"{stage} was cut at its share of the time", flush=True)
                    break
    print("end", flush=True)


if __name__ == "__main__":
    main()
