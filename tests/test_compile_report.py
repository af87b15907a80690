"""The kernels compiled for GPUs that are not here: no spill in a loop, no tile that does not fit, no instruction more than committed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from benchmarks import compile_report as report  # noqa: E402

# A few instructions of a loop's frame move between equal compilations of other triton releases, not of one.
RISE = 0.01


@pytest.fixture(scope="module")
def committed():
    return report.load()


def test_committed_rows_are_of_these_configurations(committed):
    rows = {(variant, arch): row for (_, variant, arch), row in committed.items()}
    for architecture in report.ARCHITECTURES:
        for variant in report.variants(architecture):
            row = rows[variant.name, f"sm_{architecture}"]
            assert row["config"] == dataclasses.asdict(report.config_of(variant, architecture)), variant


# Instructions that save and restore registers around the inner loop, once for each block of rows: at D 128 and 256 of one bandwidth, where
# tiles without them take twice the time (benchmarks/results/gpu.jsonl).
AROUND_THE_LOOP = 64


def assert_fits(key, row):
    assert row["spills"] == 0, key
    assert row["spill_instructions"] <= (AROUND_THE_LOOP if row["kernel"] == "mmd.sweep_kernel" else 0), key
    assert row["shared_bytes"] <= row["shared_limit"], key


def test_committed_rows_neither_spill_nor_overflow(committed):
    for key, row in committed.items():
        assert_fits(key, row)


@pytest.mark.slow
def test_compiled_anew(committed, tmp_path):
    """In a process of its own: here the kernels belong to Triton's interpreter."""
    output = tmp_path / "rows.jsonl"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--quick", "--output", str(output)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=env)
    rows = report.load(output)
    assert rows
    for key, row in rows.items():
        assert_fits(key, row)
        if row["triton"] == committed[key]["triton"]:
            assert row["instructions"] <= committed[key]["instructions"] + RISE, key


_FOR_AMD = """
import torch
torch.version.hip = "6.4"  # what tells PyTorch's build for AMD from others
from triton.backends.compiler import GPUTarget
from benchmarks import compile_report as report, sass
from fastvae.radial import RationalQuadratic

class Compiled(Exception):
    pass

def compile_for_amd(fn, types, constants, architecture, aligned=()):
    raise Compiled(sass.compile_for(GPUTarget("hip", "gfx942", 64), fn, types, constants, aligned).metadata.shared)

report.compile_kernel = compile_for_amd
for variant in (
    report.Sweep("highest", 16, False, False),
    report.Sweep("highest", 64, True, True, kernel=RationalQuadratic(2.3)),
    report.Differences("fp32", 16, True, 5),
    report.Matmul("forward", "highest", 64, 64),
    report.Rows("backward", "bf16", 64, True),
    report.Density("rows", "fp32", 16, False),
):
    try:
        report.row(variant, 80)
    except Compiled as compiled:
        assert compiled.args[0] <= 64 << 10, variant
    else:
        raise AssertionError(variant)
"""


@pytest.mark.slow
def test_compiles_for_an_amd_gpu():
    """The MI300 (gfx942), with the configurations of sm_80, which are those of an unknown GPU: within its 64 KiB of shared memory."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", _FOR_AMD], check=True, cwd=Path(__file__).parents[1], env=env)
