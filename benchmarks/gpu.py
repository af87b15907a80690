"""Test, then benchmark, on a GPU and within ten minutes: python -m benchmarks.gpu, from a checkout that need not be installed.

The tests of the kernels run first, on all cores where pytest-xdist is there, as they mostly compile. A failure ends the script: no number
without them. Where half of the time is not enough for them it goes on and says so; each value is held to float64 again before it is timed.
Then come the sweep of `benchmarks.run`, its table, and the accuracy of each precision.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
OPERATIONS = ("mmd", "reparameterize_kl", "kernel_matmul", "quadratic_form", "total_correlation")
# What `timeout` of coreutils exits with.
TIMEOUT = 124


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="for all; what the tests leave is the sweep's")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device: on a CPU run python -m benchmarks.run")
    deadline = time.monotonic() + 60 * args.minutes
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}

    def run(*command: str, share: float = 1.0) -> int:
        seconds = max(10.0, share * (deadline - time.monotonic()))
        print(f"$ {' '.join(command)}   (at most {seconds:.0f} s)", flush=True)
        try:
            return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"stopped after {seconds:.0f} s", flush=True)
            return TIMEOUT

    # The options of pyproject.toml name plugins and warnings of the development environment.
    tests = [str(ROOT / "tests" / f"test_{operation}.py") for operation in OPERATIONS]
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    code = run("-m", "pytest", "-q", "-x", "-o", "addopts=", "-o", "filterwarnings=", *parallel, *tests, share=0.5)
    if code == TIMEOUT:
        print("the tests were not finished, and none had failed: run them whole with python -m pytest", flush=True)
    elif code:
        sys.exit(f"the tests ended with {code}: nothing is measured")
    run("-m", "benchmarks.run", "--output", args.output, "--seconds", "2")
    if args.output == str(ROOT / "benchmarks" / "results"):
        run("-m", "benchmarks.table")
        run("-m", "benchmarks.accuracy")


if __name__ == "__main__":
    main()
