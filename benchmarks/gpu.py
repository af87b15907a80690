"""Tests and measurements on one NVIDIA GPU.

    python -m benchmarks.gpu                     all stages in ten minutes, the most important cases first
    python -m benchmarks.gpu --stage speed       one stage: tests, accuracy, host, speed or training
    python -m benchmarks.gpu --dry-run           all stages without a GPU, with tiny samples in Triton's interpreter; no row is a result

The package need not be installed. The tests are all those of the Triton kernels. If one fails, its name is printed, each row says so in its
field "tests", the tables leave these rows out, and the script ends with 1. A case that fails is a row too, and the next one is tried, in a
new process if the device does not recover. Rows are appended to gpu.jsonl in --output, case by case; a dry run writes none by default.
Steps of one size are timed in turn, both directly and as CUDA graphs; they are defined in benchmarks/gpu_steps.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

DRY = "--dry-run" in sys.argv
if DRY:
    # Chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from benchmarks.gpu_steps import DEVICE, Case, Row, accuracy_of_operations, host, mmd, speed, training  # noqa: E402
from benchmarks.machine import conditions  # noqa: E402
from benchmarks.measure import synchronize  # noqa: E402
from benchmarks.providers import expected, samples  # noqa: E402
from benchmarks.rows import RESULTS, append, read  # noqa: E402

ROOT = Path(__file__).parents[1]
# The share of the time after which a stage ends.
STAGES = {"tests": 0.4, "accuracy": 0.5, "host": 0.52, "speed": 0.94, "training": 1.0}


def test_files() -> list[Path]:
    """Those with tests of the Triton kernels, first those of operations that have no row of a GPU yet."""
    measured = {row.get("operation") for row in read(RESULTS / "gpu.jsonl")}
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}
    found = [path for path, text in texts.items() if "mark.interpreter" in text or "mark.gpu" in text]
    return sorted(found, key=lambda path: path.stem.removeprefix("test_") in measured)


def tests(seconds: float) -> str:
    """ "passed", "failed", or "unfinished"; they run on all cores if pytest-xdist is installed, as they mostly compile."""
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # The options in pyproject.toml need plugins and packages that may not be installed.
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--continue-on-collection-errors"]
    command += ["-o", "addopts=", "-o", "filterwarnings=", "-m", "interpreter or gpu", *parallel, *map(str, test_files())]
    if parallel and importlib.util.find_spec("pytest_timeout"):
        # A kernel that does not end takes its worker with it, which pytest-xdist replaces.
        command += ["--timeout=150", "--timeout-method=thread"]
    if DRY:
        command += ["-k", "triton_half"]
    end = time.time() + seconds
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "TESTS_END": str(end)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            # After the end tests/conftest.py skips what is left, so that failures are printed.
            code = process.wait(seconds + 60)
        except subprocess.TimeoutExpired:
            return "unfinished"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return "failed" if code else "unfinished" if time.time() > end else "passed"


def accuracy_of_mmd(n: int) -> list[Row]:
    """The error of each precision at sizes beyond those of the tests."""
    x, y = samples(n, 16, DEVICE)
    value, grad = expected(x, y, (4.0,))
    rows = []
    for precision in ("highest", "high", "medium", "ieee"):
        leaf = x.clone().requires_grad_()
        actual = mmd(leaf, y, 4.0, precision)
        actual.backward()
        error = (leaf.grad.double() - grad).norm() / grad.norm()  # type: ignore[union-attr]
        value_error = abs(actual.item() - value) / abs(value)
        rows.append({"n": n, "d": 16, "precision": precision, "value": value_error, "gradient": error.item()})
    return rows


def accuracy() -> list[Case]:
    return accuracy_of_operations() + [Case(accuracy_of_mmd, (n,)) for n in ((64,) if DRY else (4096, 65_536, 262_144))]


CASES: dict[str, Callable[[], list[Case]]] = {"accuracy": accuracy, "host": host, "speed": speed, "training": training}


def measure(cases: list[Case], first: int, end: float, add: Callable[[list[Row]], None]) -> int | None:
    """Adds the rows of the cases from the first on; the number of the next case if the device does not recover from an error."""
    for number, case in enumerate(cases[first:], first):
        if time.monotonic() > end:
            print(f"cut at its share of the time: {number} of {len(cases)} cases were measured", flush=True)
            break
        try:
            add(case.rows())
        except Exception as error:
            add([case.failed(error)])
        try:
            synchronize(DEVICE)
        except RuntimeError:
            return number + 1
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages; time that one leaves is the next one's")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of gpu.jsonl")
    parser.add_argument("--commit", help="of the code, where it is a copy without its repository")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device: try it with --dry-run, and on a CPU run python -m benchmarks.run")
    start, outcome, resumed, first = args.resume or (time.monotonic(), "not run", "", 0)
    common = conditions(DEVICE, "jax")
    common["commit"] = args.commit or common["commit"]
    path = Path(os.devnull) if DRY and args.output == RESULTS else args.output / "gpu.jsonl"

    def add(stage: str, found: list[Row]) -> None:
        rows = [{"stage": stage, **row, "tests": outcome, **common} for row in found]
        append(path, *rows)
        print(*map(json.dumps, rows), sep="\n", flush=True)

    stages = [stage for stage in STAGES if args.stage in (stage, "all")]
    for stage in stages[stages.index(resumed) if resumed else 0 :]:
        seconds = 60 * args.minutes * (STAGES[stage] if args.stage == "all" else 1) - (time.monotonic() - start)
        print(f"== {stage}, at most {seconds:.0f} s", flush=True)
        if stage == "tests":
            outcome = tests(max(10.0, seconds))
            print(f"tests: {outcome}", flush=True)
            continue
        broken = measure(CASES[stage](), first if stage == resumed else 0, time.monotonic() + seconds, partial(add, stage))
        if broken is not None:
            resume = json.dumps([start, outcome, stage, broken])
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--resume", resume])
    print("end", flush=True)
    sys.exit(outcome == "failed")


if __name__ == "__main__":
    main()
