"""`python -m benchmarks.gpu`, which has to work the first time on a GPU."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_steps, rows, table
from tests import conftest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["accuracy", "host", "speed", "training"])
def test_runs_to_its_end(stage, tmp_path):
    """In Triton's interpreter, with tiny samples."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--stage", stage, "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "end"
    found = rows.read(tmp_path / "gpu.jsonl")
    assert found
    peers = {"KeOps": "pykeops", "geomloss": "geomloss", "JAX": "jax"}
    absent = [name for name, module in peers.items() if importlib.util.find_spec(module) is None]
    failed = [row for row in found if row.get("status", "ok") != "ok"]
    assert all(row.get("provider") in absent and row["status"].startswith("ModuleNotFoundError") for row in failed), failed
    if stage == "accuracy":
        assert all(row["value"] < 1e-4 and row["gradient"] < 1e-3 for row in found if row["precision"] in ("highest", "ieee"))


def test_tables_leave_out_rows_of_failed_tests(monkeypatch):
    measured = [{"n": 1}, {"n": 2, "tests": "failed"}, {"n": 3, "tests": "passed"}]
    monkeypatch.setattr(table, "_read", lambda path: measured)
    assert [row["n"] for row in table.rows_of("gpu")] == [1, 3]


def test_the_tests_of_every_kernel_run():
    """On the GPU: a file without DEVICE has tensors on the CPU, or is for the interpreter alone."""
    found = {path.name: path.read_text() for path in gpu.test_files()}
    kernels = [f"test_{path.stem}.py" for path in (ROOT / "kernels").glob("*.py") if re.search(r"\ndef \w+_kernel\(", path.read_text())]
    assert len(kernels) > 8
    assert [name for name in kernels if (ROOT / "tests" / name).exists() and name not in found] == []
    assert {"test_few_rows.py", "test_kernel_hvp_kernels.py", "test_sigreg.py"} <= {*found}
    assert [name for name, text in found.items() if "DEVICE" not in text and not re.search(r"triton_interpreter|mark\.gpu", text)] == []


@pytest.mark.slow
def test_a_dry_run_finds_tests(monkeypatch):
    monkeypatch.setattr(gpu, "DRY", True)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)  # each process would collect all
    assert gpu.tests(300.0) == "passed"


def test_no_test_begins_after_the_end(monkeypatch):
    monkeypatch.setenv("TESTS_END", "0")
    with pytest.raises(pytest.skip.Exception, match="no time is left"):
        conftest.pytest_runtest_setup()


@pytest.mark.interpreter
def test_steps_have_one_gradient():
    x, y = gpu_steps.points(20, 3)
    functions = {"fastvae": gpu_steps.mmd, "eager": gpu_steps.eager_mmd, "checkpointed": gpu_steps.checkpointed_mmd}
    operations = ("kernel_matmul", "total_correlation", "group_mmd", "mmd of four rows", "mmd, Hessian product")
    for steps in (
        gpu_steps.mmd_steps(x, y, functions),
        *(gpu_steps.OPERATIONS[name][0](20, 3, torch.float32) for name in operations),
    ):
        results = {name: step() for name, step in steps.items()}
        for found in results.values():
            torch.testing.assert_close(found, results["eager"], rtol=1e-4, atol=1e-5)


def test_what_fails_is_a_row(monkeypatch):
    zero = "ZeroDivisionError: integer division or modulo by zero"
    broken, whole = gpu_steps.timed_rows({"broken": lambda: 1 // 0, "whole": lambda: None}, n=3)
    assert broken == {"n": 3, "provider": "broken", "status": zero}
    assert whole["status"] == "ok"
    found = []
    cases = [gpu_steps.Case(divmod, (1, 0)), *gpu_steps.cases(lambda n, d: [{"n": n, "d": d}], (3, 4), (5, 6))]
    assert gpu.measure(cases, 0, math.inf, found.extend) is None
    assert found == [{"case": "divmod", "arguments": (1, 0), "status": zero}, {"n": 3, "d": 4}, {"n": 5, "d": 6}]
    found.clear()
    assert gpu.measure(cases, 2, math.inf, found.extend) is gpu.measure(cases, 1, 0.0, found.extend) is None
    assert found == [{"n": 5, "d": 6}]

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "synchronize", lost)
    assert gpu.measure(cases, 1, math.inf, found.extend) == 2
