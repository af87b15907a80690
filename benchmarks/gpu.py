"""Tests and measurements on one NVIDIA GPU.

    python -m benchmarks.gpu                     all stages in ten minutes, the most important cases first
    python -m benchmarks.gpu --stage speed       one stage: tests, accuracy, host, training or speed
    python -m benchmarks.gpu --dry-run           all stages without a GPU, with tiny samples in Triton's interpreter; no row is a result

The package need not be installed. If a test fails, nothing is measured; if there is no time for all tests, the script says so and goes on.
Rows are appended to gpu.jsonl in --output, case by case; a dry run writes none by default. Steps of one size are timed in turn, both
directly and as CUDA graphs; they are defined in benchmarks/gpu_steps.py.
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
from pathlib import Path

DRY = "--dry-run" in sys.argv
if DRY:
    # Chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from benchmarks.gpu_steps import DEVICE, Row, host, mmd, speed, training  # noqa: E402
from benchmarks.machine import conditions  # noqa: E402
from benchmarks.providers import expected, samples  # noqa: E402
from benchmarks.rows import RESULTS, append  # noqa: E402

ROOT = Path(__file__).parents[1]
OPERATIONS = ("mmd", "reparameterize_kl", "kernel_matmul", "quadratic_form", "total_correlation")
# The share of the time after which a stage ends.
STAGES = {"tests": 0.35, "accuracy": 0.42, "host": 0.44, "training": 0.52, "speed": 1.0}
# Exit status of tests that took too long, as that of the command `timeout`.
TIMEOUT = 124


def tests(seconds: float) -> int:
    """The exit status of the operations' tests, which run on all cores if pytest-xdist is installed: they mostly compile."""
    files = [f"tests/test_{operation}.py" for operation in OPERATIONS]
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # The options in pyproject.toml need plugins and packages that may not be installed.
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-o", "addopts=", "-o", "filterwarnings=", *parallel, *files]
    if DRY:
        command += ["-k", "triton_half"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return TIMEOUT


def accuracy() -> Iterator[list[Row]]:
    """The error of each precision at sizes beyond those of the tests."""
    for n in (64,) if DRY else (4096, 65_536, 262_144):
        x, y = samples(n, 16, DEVICE)
        value, grad = expected(x, y, (4.0,))
        for precision in ("highest", "high", "medium", "ieee"):
            leaf = x.clone().requires_grad_()
            actual = mmd(leaf, y, 4.0, precision)
            actual.backward()
            error = (leaf.grad.double() - grad).norm() / grad.norm()  # type: ignore[union-attr]
            value_error = abs(actual.item() - value) / abs(value)
            yield [{"n": n, "d": 16, "precision": precision, "value": value_error, "gradient": error.item()}]


ROWS: dict[str, Callable[[], Iterator[list[Row]]]] = {"accuracy": accuracy, "host": host, "training": training, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages; time that one leaves is the next one's")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of gpu.jsonl")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device: try it with --dry-run, and on a CPU run python -m benchmarks.run")
    start = time.monotonic()
    common = conditions(DEVICE, "jax")
    path = Path(os.devnull) if DRY and args.output == RESULTS else args.output / "gpu.jsonl"
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
        for found in ROWS[stage]():
            rows = [{"stage": stage, **row, **common} for row in found]
            append(path, *rows)
            print(*map(json.dumps, rows), sep="\n", flush=True)
            if time.monotonic() > end:
                print(f"{stage} was cut at its share of the time", flush=True)
                break
    print("end", flush=True)


if __name__ == "__main__":
    main()
