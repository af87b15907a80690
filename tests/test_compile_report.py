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


def compile_by(code):
    """Run in a process of its own, as the interpreter of this one cannot compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], env=env)


_AROUND_THE_SWEEP = """
from benchmarks.sass import compile_kernel
from fastvae.kernels import kernel_matmul, mmd, pairs, prepare, quadratic_form

SPLIT, SPLIT_TF32, NONE = pairs.SPLIT.value, pairs.SPLIT_TF32.value, -1
FLOATS = {"limit_0", "limit_1", "cross_x", "cross_y", "padding", "rounding", "x_tolerance", "y_tolerance"}
FLOAT64 = {"plan_ptr", "term_ptr", "own_ptr", "statistic_ptr", "sum_ptr", "near_ptr", "poison_ptr", "total_ptr"}
FLOATS |= {"factor_high", "factor_middle", "factor_low"}
FLOAT64 |= {"upstream_ptr", "form_ptr", "products_ptr", "members_ptr", "out_ptr"}

compiled = []
# family, parameters, bandwidths, samples, weights of x and of y, float64, numbers in a tensor, own term, modes
for family, parameters, count, samples, x_weighted, y_weighted, double, on_device, own, first, second in (
    (pairs.GAUSSIAN.value, 0, 1, 2, False, False, False, False, 0, SPLIT, SPLIT_TF32),
    (pairs.GAUSSIAN.value, 0, 5, 2, True, False, False, True, 0, SPLIT, SPLIT_TF32),
    (pairs.GAUSSIAN.value, 0, 2, 1, True, False, True, False, 1, pairs.IEEE.value, NONE),
    (pairs.GAUSSIAN.value, 0, 1, 2, False, False, True, False, 0, pairs.IEEE.value, NONE),
    (pairs.QUADRATIC.value, 1, 2, 2, False, True, False, False, 0, pairs.TF32.value, NONE),
    (pairs.LAPLACE.value, 1, 2, 2, True, True, False, False, 0, SPLIT_TF32, NONE),
    (pairs.ENERGY.value, 1, 1, 2, False, False, False, False, 0, pairs.BF16.value, NONE),
    (pairs.POLYNOMIAL.value + 3, 3, 2, 2, True, True, False, False, 2, SPLIT, NONE),
):
    numbers = 2 * count + parameters + (3 * count if own == 1 else 0) + (family > 16)
    bandwidths = 1 if family in (pairs.ENERGY.value, pairs.POLYNOMIAL.value + 3) else count
    constants = {
        "SAMPLES": samples, "CHUNKS": 64, "FEATURES": 60, "D": 64, "BLOCK_N": 64, "BLOCK_D": 32, "RADIAL": family < 16,
        "SUMS": family == 0,
        "X_WEIGHTED": x_weighted, "Y_WEIGHTED": y_weighted, "WEIGHTED": x_weighted or y_weighted, "NUMBERS": numbers,
        "ON_DEVICE": on_device,
        "FAMILY": family, "KERNELS": count, "BANDWIDTHS": bandwidths, "TABLE": 4 * bandwidths + parameters, "OWN": own, "MODE_0": first,
        "MODE_1": second, "NEAR_BLOCKS": 16 * (family in (4, 5)), "NEAR": 2.0**-9, "UNBIASED": x_weighted, "PLAN_SIZE": prepare.PLAN,
        "CROSS": samples == 2,
        "GRADIENT": True, "TERMS": 2, "BLOCK_R": 1024,
        "NORMAL": own == 1, "COLUMNS": 5, "C": 16, "BLOCK_C": 16, "WITHIN": samples == 1, "MODE": first,
        "FORM": not x_weighted, "SIZE": 10, "DIAGONAL": not x_weighted, "BLOCK": 32,
    }
    for kernel, warps in (
        (prepare.statistics_kernel, 4), (prepare.near_pairs_kernel, 4), (prepare.operands_kernel, 8), (mmd.finish_kernel, 8),
        (kernel_matmul.factors_kernel, 8), (kernel_matmul.matmul_finish_kernel, 4), (kernel_matmul.gradient_finish_kernel, 4),
        (quadratic_form.form_kernel, 4), (quadratic_form.pair_values_kernel, 4), (quadratic_form.pair_upstreams_kernel, 4),
    ):
        scalar = "*fp64" if double else "*fp32"
        types = {name: scalar if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name.islower()}
        types |= {name: "*fp64" if name in FLOAT64 else "fp32" for name in types if name in FLOAT64 | FLOATS}
        if not double:
            types |= {name: "*bf16" for name in types if "16_ptr" in name}
        if "numbers" in types:
            types["numbers"] = "*fp64" if on_device else ("fp32",) * (3 * numbers)
        if not x_weighted and kernel is not kernel_matmul.matmul_finish_kernel:
            # Labels of groups, as columns of booleans.
            types |= {name: "*i1" for name in types if name in ("g_ptr", "v_ptr", "valid_ptr", "pairs_ptr")}
        own_constants = {name: value for name, value in constants.items() if name in kernel.arg_names} | {"num_warps": warps}
        if kernel in (prepare.near_pairs_kernel, quadratic_form.form_kernel):
            own_constants["BLOCK_N"] = 16
        # Not every kernel depends on all of these.
        if (case := (kernel, types, own_constants)) in compiled:
            continue
        compiled.append(case)
        binary = compile_kernel(kernel, types, own_constants, 90)
        assert binary.stack == binary.local == 0, (kernel, family, binary.registers)
"""


_AROUND_THE_DENSITIES = """
from benchmarks.sass import compile_kernel
from fastvae.kernels import total_correlation as kernels

FLOAT64 = {"constant_ptr", "part_ptr", "sum_ptr"}
INPUTS = {"z_in_ptr", "mu_in_ptr", "logvar_in_ptr", "grad_z_ptr", "grad_mu_ptr", "grad_logvar_ptr"}

def assert_fits(fn, dtype, scalar, **constants):
    types = {name: scalar if name.endswith("_ptr") else "i32" for name in fn.arg_names if name.islower() or name in ("N", "M", "D")}
    types |= {name: "*fp64" if name in FLOAT64 else dtype for name in types if name in FLOAT64 | INPUTS}
    types |= {"BLOCKED_D": "i32"} | {name: ("fp32",) * 9 for name in types if name == "numbers"}
    if fn is kernels.finish_kernel:
        types |= {name: scalar for name in ("joint_in_ptr", "marginal_in_ptr")}
    binary = compile_kernel(fn, types, {"BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 4} | constants, 90)
    assert binary.stack == binary.local == 0, (fn, dtype, constants, binary.registers)

for dtype, scalar in (("*fp32", "*fp32"), ("*bf16", "*fp32"), ("*fp64", "*fp64")):
    for gradient, terms in ((False, False), (True, False), (True, True)):
        assert_fits(kernels.prepare_kernel, dtype, scalar, GRADIENT=gradient, TERMS=terms, num_warps=8)
    assert_fits(kernels.finish_kernel, dtype, scalar, BLOCK_R=1024)
    for z, posterior, terms in ((True, True, True), (True, False, False), (False, True, True)):
        assert_fits(kernels.gradients_kernel, dtype, scalar, Z_GRAD=z, POSTERIOR_GRAD=posterior, TERMS=terms)
"""


_OF_FEW_PAIRS = """
from benchmarks.sass import compile_kernel
from fastvae.kernels import few_pairs, pairs

def assert_fits(fn, family, count, columns, scalar, given, on_device, blocks, **flags):
    numbers = 2 * count + (family != pairs.GAUSSIAN.value)
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in fn.arg_names if name.islower()}
    types |= {"numbers": "*fp64" if on_device else ("fp32",) * (3 * numbers), "x_ptr": scalar, "y_ptr": scalar}
    types |= {name: given for name in types if name in ("g_ptr", "v_ptr")}
    types |= {name: "*fp64" for name in types if name == "upstream_ptr" or (name == "out_ptr" and flags["WITHIN"])}
    constants = {
        "NUMBERS": numbers, "ON_DEVICE": on_device, "FAMILY": family, "BANDWIDTHS": count, "SQUARINGS": 0, "BLOCK_N": few_pairs._BLOCK_N,
        "BLOCK_M": few_pairs._BLOCK_M, "BLOCK_C": columns, "UNROLL": few_pairs._UNROLL, "BLOCK_D": few_pairs._BLOCK_D, "BLOCKS": blocks,
        "num_warps": 8,
    }
    binary = compile_kernel(fn, types, constants | flags, 90)
    # A few outside of the loops.
    assert binary.local <= 16, (fn, family, count, columns, scalar, given, flags, binary.registers, binary.local)

for family, count, columns, scalar, given, on_device, blocks in (
    (pairs.GAUSSIAN.value, 1, 16, "*fp32", "*fp32", False, 2),
    (pairs.GAUSSIAN.value, 1, 16, "*fp32", "*i1", False, 8),
    (pairs.GAUSSIAN.value, 6, 32, "*bf16", "*fp32", True, 8),
    (pairs.QUADRATIC.value, 6, 32, "*fp32", "*i1", False, 8),
    (pairs.QUADRATIC_ONE.value, 2, 16, "*fp32", "*fp32", False, 1),
):
    for within, form in ((False, False), (True, False), (True, True)):
        assert_fits(few_pairs.matmul_kernel, family, count, columns, scalar, given, on_device, blocks, WITHIN=within, FORM=form)
    for form in (False, True):
        assert_fits(few_pairs.gradient_kernel, family, count, columns, scalar, given, on_device, blocks, FORM=form)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [_AROUND_THE_SWEEP, _AROUND_THE_DENSITIES, _OF_FEW_PAIRS], ids=["mmd", "total_correlation", "few_pairs"])
def test_kernels_around_the_sweep_compile_without_spills(code):
    """The interpreter takes what the compiler refuses, such as a name of two types."""
    compile_by(code)


_FOR_AMD = """
import torch
torch.version.hip = "6.4"  # what tells PyTorch's build for AMD from others
from triton.backends.compiler import GPUTarget
from benchmarks import compile_report as report, sass
from fastvae.radial import (RationalQuadratic)

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
    compile_by(_FOR_AMD)


_HISTOGRAM = """
from benchmarks.sass import compile_kernel
from fastvae.kernels import ranked_squared_distance as kernels

types = {"z_ptr": "*fp64", "known_ptr": "*i64", "counts_ptr": "*i64", "N": "i32", "blocks": "i32", "D": "i32", "shift": "i32"}
for architecture in (80, 90, 120):
    constants = {"BITS": kernels.BITS, "BLOCK": kernels.BLOCK, "num_warps": kernels.WARPS}
    binary = compile_kernel(kernels.histogram_kernel, types, constants, architecture)
    assert binary.stack == binary.local == 0, (architecture, binary.registers)
"""


@pytest.mark.slow
def test_the_histogram_of_distances_compiles_without_spills():
    compile_by(_HISTOGRAM)


_LOGARITHMS = """
from triton.backends.compiler import GPUTarget
from benchmarks import compile_report as report, sass
from fastvae.radial import (RationalQuadratic)

class Compiled(Exception):
    pass

def compile_to_ptx(fn, types, constants, architecture, aligned=()):
    raise Compiled(sass.compile_for(GPUTarget("cuda", architecture, 32), fn, types, constants, aligned).asm["ptx"])

report.compile_kernel = compile_to_ptx
for alpha, fast in ((2.0, True), (100.0, False)):
    try:
        report.row(report.Sweep("highest", 16, True, True, kernel=RationalQuadratic(alpha)), 90)
    except Compiled as compiled:
        assert ("lg2.approx" in compiled.args[0]) == fast, alpha
    else:
        raise AssertionError(alpha)
"""


@pytest.mark.slow
def test_a_large_alpha_does_not_multiply_the_error_of_the_fast_logarithm():
    compile_by(_LOGARITHMS)
