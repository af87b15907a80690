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
            row = rows.get((variant.name, f"sm_{architecture}"))
            assert row is not None, f"{variant.name} on sm_{architecture} has no row: python -m benchmarks.compile_report"
            assert row["config"] == dataclasses.asdict(report.config_of(variant, architecture)), variant


# Instructions that save and restore registers around the inner loop, once for each block of rows: at D 128 and 256 of one bandwidth, where
# tiles without them take twice the time (benchmarks/results/gpu.jsonl); and five of the Hessians of a batch.
AROUND_THE_LOOP = 64
MAY_SPILL_AROUND_IT = "mmd.sweep_kernel", "ksd_to_normal.ksd_kernel", "ksd_to_normal.hessian_kernel", "kernel_hvp.points_kernel"


def assert_fits(key, row):
    assert row["spills"] == 0, key
    assert row["spill_instructions"] <= (AROUND_THE_LOOP if row["kernel"] in MAY_SPILL_AROUND_IT else 0), key
    assert row["shared_bytes"] <= row["shared_limit"], key


def test_committed_rows_neither_spill_nor_overflow(committed):
    for key, row in committed.items():
        assert_fits(key, row)


def run_python(*args):
    """In a process of its own: here the kernels belong to Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, *args], check=True, cwd=Path(__file__).parents[1], env=env)


@pytest.mark.slow
def test_compiled_anew(committed, tmp_path):
    output = tmp_path / "rows.jsonl"
    run_python("-m", "benchmarks.compile_report", "--quick", "--output", str(output))
    rows = report.load(output)
    assert rows
    for key, row in rows.items():
        assert_fits(key, row)
        if row["triton"] == committed[key]["triton"]:
            assert row["instructions"] <= committed[key]["instructions"] + RISE, key


_AROUND_THE_SWEEP = """
from benchmarks.compile_report import SUMS
from benchmarks.sass import argument_types, compile_kernel
from fastvae.kernels import kernel_matmul, ksd_to_normal, mmd, plan, prepare, quadratic_form
from fastvae.kernels.families import NORMAL_PRIOR, POLYNOMIAL_DIAGONAL, family_of
from fastvae.kernels.products import BF16, BF16X3, IEEE, TF32, TF32X3
from fastvae.radial import IMQ, KERNELS, RBF, Energy, Laplace, Polynomial, RationalQuadratic

NONE, NO_CLOSED_FORM = -1, 0
KNOWN = RBF, IMQ, RationalQuadratic, Laplace, Energy, Polynomial
# Of the others one for each set of what these kernels do for a family; numbers such as its scale are constants to them.
NEW = {family_of(new)._replace(number=0, scale=1.0, neg_dphi_factor=1.0): new for new in KERNELS.values() if type(new) not in KNOWN}
FLOAT64 = {"plan_ptr", "sum_ptr", "not_finite_ptr", "total_ptr", "upstream_ptr", "form_ptr", "products_ptr", "members_ptr", "out_ptr"}

compiled = []

def assert_fits(kernel, types, constants, *of):
    case = kernel, types, {name: constants[name] for name in kernel.arg_names if name in constants} | {"num_warps": constants["num_warps"]}
    # Not every kernel depends on all of these.
    if case in compiled:
        return
    compiled.append(case)
    binary = compile_kernel(*case, 90)
    assert binary.stack == 0, (kernel, of, binary.registers)

def integers(of):
    return of(*["i32"] * len(of._fields))

# kernel, bandwidths, samples, weights of x and of y, float64, numbers in a tensor, closed form, products of the first passes
for function, count, samples, x_weighted, y_weighted, double, on_device, closed_form, first, second in (
    (RBF(), 1, 2, False, False, False, False, NO_CLOSED_FORM, BF16X3.value, TF32X3.value),
    (RBF(), 5, 2, True, False, False, True, NO_CLOSED_FORM, BF16X3.value, TF32X3.value),
    (RBF(), 2, 1, True, False, True, False, NORMAL_PRIOR.value, IEEE.value, NONE),
    (RBF(), 1, 2, False, False, True, False, NO_CLOSED_FORM, IEEE.value, NONE),
    (RationalQuadratic(2.3), 2, 2, False, True, False, False, NO_CLOSED_FORM, TF32.value, NONE),
    (Laplace(), 2, 2, True, True, False, False, NO_CLOSED_FORM, TF32X3.value, NONE),
    (Energy(), 1, 2, False, False, False, False, NO_CLOSED_FORM, BF16.value, NONE),
    (Polynomial(), 2, 2, True, True, False, False, POLYNOMIAL_DIAGONAL.value, BF16X3.value, NONE),
    *((function, len(function.terms), 2, True, False, False, False, NO_CLOSED_FORM, TF32X3.value, NONE) for function in SUMS[:1]),
    *((new, 2, 2, False, False, False, False, NO_CLOSED_FORM, TF32X3.value, NONE) for new in NEW.values()),
):
    family = family_of(function)
    normal = closed_form == NORMAL_PRIOR.value
    numbers = 2 * count + family.parameters + (3 * count if normal else 0) + (not family.radial)
    bandwidths = count if family.radial and not family.homogeneous else 1
    scalar = "*fp64" if double else "*fp32"
    number_types = "*fp64" if on_device else ("fp32",) * (3 * numbers)
    constants = {
        "SPEC": prepare.SampleSpec(samples, 64, normal, x_weighted, y_weighted, 60, 64, 64, 32),
        "SUM": prepare.SumSpec(family, count, bandwidths, plan.table_size(family, bandwidths), numbers, on_device, closed_form, first,
                               second, (12.0, 256.0)),
        "RADIAL": family.radial, "SUMS": function == RBF(), "UNBIASED": x_weighted, "NEAR": 2.0**-9, "BLOCK_N": 16,
        "NEAR_BLOCKS": 16 * family.takes_distance, "GRADIENT": True, "TERMS": 2, "BLOCK_R": 1024,
    }
    both = prepare.Samples(scalar, scalar, scalar, scalar, "i32", "i32")
    statistics = prepare.Statistics(scalar, "*fp64", "*fp64")
    operands = prepare.Operands(*[scalar] * 4, "i32", "i32")
    tables, part_sums = prepare.PlanTables("*fp64", scalar, "*fp64"), mmd.PartSums(scalar, scalar, scalar, "i32")
    swept, factors = integers(prepare.SweptRows), prepare.Factors("fp32", "fp32", "fp32", "fp32")
    common = {"samples": both, "statistics": statistics, "numbers": number_types, "operands": operands, "tables": tables, "swept": swept}
    assert_fits(prepare.statistics_kernel, {"samples": both, "statistics": statistics}, constants | {"num_warps": 4}, function)
    assert_fits(prepare.near_pairs_kernel, {"samples": both, "statistic_ptr": "*fp64", "near_ptr": "*fp64"}, constants | {"num_warps": 4})
    assert_fits(prepare.operands_kernel, common | {"near_ptr": "*fp64", "factors": factors}, constants | {"num_warps": 8}, function)
    results = mmd.Results(scalar, "*fp64", scalar, scalar)
    finish = common | {"part_sums": part_sums, "results": results, "sizes": integers(mmd.Sizes)}
    assert_fits(mmd.finish_kernel, finish, constants | {"num_warps": 8}, function)
    if isinstance(function, (RBF, RationalQuadratic)):
        stein = {"z_ptr": scalar, "stein": ksd_to_normal.Stein(scalar, scalar), "n": "i32", "rows": "i32", "numbers": number_types}
        assert_fits(ksd_to_normal.stein_kernel, stein, constants | {"num_warps": 8}, function)
        del stein["rows"]
        stein |= {name: common[name] for name in ("operands", "tables", "swept")} | {"value_ptr": scalar, "gradient_ptr": scalar}
        stein["part_sums"] = ksd_to_normal.PartSums(*[scalar] * 4, "i32", "i32")
        assert_fits(ksd_to_normal.ksd_finish_kernel, stein, constants | {"num_warps": 8}, function)
        directed = {name: common[name] for name in ("numbers", "operands", "tables")} | {"directions": operands, "n": "i32"}
        directed |= {"z_ptr": scalar, "direction_ptr": scalar}
        curvature = {"curvature": ksd_to_normal.Curvature(*[scalar] * 3), "rows": "i32"}
        assert_fits(ksd_to_normal.direction_kernel, directed | curvature, constants | {"num_warps": 8}, function)
        directed |= {"swept": swept, "out_ptr": scalar, "part_sums": ksd_to_normal.HessianSums(*[scalar] * 6, "i32", "i32")}
        assert_fits(ksd_to_normal.hessian_finish_kernel, directed, constants | {"num_warps": 8}, function)

    constants = {
        "CHUNKS": 64, "FEATURES": 60, "D": 64, "BLOCK_N": 64, "BLOCK_D": 32, "RADIAL": family.radial, "COLUMNS": 5, "C": 16, "BLOCK_C": 16,
        "WITHIN": samples == 1, "PRODUCT": first, "FORM": not x_weighted, "SIZE": 10, "DIAGONAL": not x_weighted, "BLOCK": 32,
        "OWN": closed_form, "UNBIASED": x_weighted, "BIASED": x_weighted,
    }
    for kernel, warps in (
        (kernel_matmul.factors_kernel, 8), (kernel_matmul.matmul_finish_kernel, 4), (kernel_matmul.gradient_finish_kernel, 4),
        (quadratic_form.form_kernel, 4), (quadratic_form.pair_values_kernel, 4), (quadratic_form.pair_upstreams_kernel, 4),
    ):
        def pick(name):
            if not x_weighted and kernel is not kernel_matmul.matmul_finish_kernel and name in ("g_ptr", "v_ptr", "valid_ptr", "pairs_ptr"):
                # Labels of groups, as columns of booleans.
                return "*i1"
            return "*fp64" if name in FLOAT64 else scalar if name.endswith("_ptr") else "i32"

        types = argument_types(kernel, pick)
        if "numbers" in types:
            types["numbers"] = number_types
        if kernel is kernel_matmul.factors_kernel and x_weighted:
            types["upstream_ptr"] = None
        if kernel is quadratic_form.pair_values_kernel:
            types |= {"factor": ("fp32",) * 3} | ({} if closed_form else {"own_ptr": None})
        block = {"BLOCK_N": 16} if kernel is quadratic_form.form_kernel else {}
        assert_fits(kernel, types, constants | block | {"num_warps": warps}, function)
"""


_AROUND_THE_DENSITIES = """
from benchmarks.sass import argument_types, compile_kernel
from fastvae.kernels import total_correlation as kernels

FLOAT64 = {"constant_ptr", "part_ptr", "marginal_sum_ptr"}

def assert_fits(fn, dtype, scalar, z=True, posterior=True, terms=None, gradient=False, **constants):
    def pick(name):
        if name == "terms":
            return kernels.Terms(None, scalar, scalar if terms == "all" else None) if terms else None
        return "*fp64" if name in FLOAT64 else scalar if name.endswith("_ptr") else "i32"

    types = argument_types(fn, pick)
    if fn is kernels.prepare_kernel:
        types |= {"inputs": kernels.PerInput(*[dtype] * 3), "strides": kernels.PerInput(*[("i32", "i32")] * 3), "numbers": ("fp32",) * 9}
        types |= {"sums": None} if gradient else {"upstream": None}
        if terms:
            types["upstream"] = types["upstream"]._replace(a_ptr=None, b_ptr=None)
    if fn is kernels.gradient_finish_kernel:
        types |= {"grads": kernels.PerInput(dtype if z else None, *[dtype if posterior else None] * 2), "terms": pick("terms")}
        types |= {"sums": kernels.PerInput(scalar if z else None, *[scalar if posterior else None] * 2), "splits": ("i32", "i32")}
    binary = compile_kernel(fn, types, {"BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 4} | constants, 90)
    assert binary.stack == 0, (fn, dtype, constants, binary.registers)

for dtype, scalar in (("*fp32", "*fp32"), ("*bf16", "*fp32"), ("*fp64", "*fp64")):
    for gradient, terms in ((False, False), (True, False), (True, "all"), (True, "one")):
        assert_fits(kernels.prepare_kernel, dtype, scalar, terms=terms, gradient=gradient, num_warps=8)
    assert_fits(kernels.finish_kernel, dtype, scalar, BLOCK_R=1024)
    for z, posterior, terms in ((True, True, "all"), (True, False, False), (False, True, "one")):
        assert_fits(kernels.gradient_finish_kernel, dtype, scalar, z, posterior, terms, TERMS=bool(terms))
"""


_OF_FEW_PAIRS = """
from benchmarks.sass import argument_types, compile_kernel
from fastvae.kernels import few_pairs
from fastvae.kernels.families import family_of
from fastvae.radial import RBF, RationalQuadratic

def assert_fits(fn, kernel, count, columns, scalar, given, on_device, blocks, **flags):
    family = family_of(kernel)
    numbers = 2 * count + family.parameters
    types = argument_types(fn, lambda name: "*fp32" if name.endswith("_ptr") else "i32")
    types |= {"numbers": "*fp64" if on_device else ("fp32",) * (3 * numbers), "x_ptr": scalar, "y_ptr": scalar}
    types |= {name: given for name in types if name in ("g_ptr", "v_ptr")}
    types |= {name: "*fp64" for name in types if name == "out_ptr" and flags["WITHIN"]}
    types |= {name: "*fp64" if flags["FORM"] else None for name in types if name == "upstream_ptr"}
    constants = {"SPEC": few_pairs.KernelSpec(numbers, on_device, family, count, 0), "BLOCK_C": columns, "BLOCKS": blocks, "num_warps": 8}
    binary = compile_kernel(fn, types, constants | flags, 90)
    # A few outside of the loops.
    assert binary.stack == 0 or binary.local <= 16, (fn, kernel, count, columns, scalar, given, flags, binary.registers, binary.local)

for kernel, count, columns, scalar, given, on_device, blocks in (
    (RBF(), 1, 16, "*fp32", "*fp32", False, 2),
    (RBF(), 6, 32, "*bf16", "*fp32", True, 8),
    (RationalQuadratic(2.3), 6, 32, "*fp32", "*i1", False, 8),
    (RationalQuadratic(1.0), 2, 16, "*fp32", "*fp32", False, 1),
):
    for within, form in ((False, False), (True, False), (True, True)):
        assert_fits(few_pairs.matmul_kernel, kernel, count, columns, scalar, given, on_device, blocks, WITHIN=within, FORM=form)
    for form in (False, True):
        assert_fits(few_pairs.gradient_kernel, kernel, count, columns, scalar, given, on_device, blocks, FORM=form)
"""


_OF_POSTERIORS = """
from benchmarks.sass import compile_kernel
from fastvae.kernels import reparameterize_kl as kernels
from fastvae.parametrisation import Parametrisation

def assert_fits(b, r, d, dtype, noise, prior, gradients, sum_r, sum_d, parametrisation, integer="i32"):
    dense = (r * d * (b > 1), d)
    eps, mu0, grad0 = dense if noise == "eps" else None, dense if prior else None, dense if gradients else None
    sample, kl = dense if noise else None, None if sum_r or sum_d else dense
    scalar, itemsize = "*fp64" if dtype == "*fp64" else "*fp32", {"*fp64": 8, "*fp32": 4, "*bf16": 2}[dtype]
    array = kernels.Array(dtype, integer, integer)
    seed, each = kernels.Array("*i64", "i32", "i32"), kernels.Array(scalar, integer, integer)

    def types(strides):
        return [array if s is not None else None for s in strides]

    for kernel, others in ((kernels.forward_kernel, [sample, kl]), (kernels.backward_kernel, [sample, kl, dense, dense, grad0, grad0])):
        forward = kernel is kernels.forward_kernel
        strides = [dense, dense, eps, mu0, mu0, *others]
        call = kernels.Call((b, r, d), tuple(strides), itemsize, 16 // itemsize, parametrisation, noise == "seed", sum_r and forward,
                            sum_d or (sum_r and not forward), forward)
        plan = kernels.plan_of(call)
        own = types(strides)
        inputs = kernels.Inputs(*own[:2], seed if noise == "seed" else own[2], *own[3:5])
        signature = {"inputs": inputs, "sizes": kernels.Sizes(integer, integer, "i32", "i32")}
        signature |= {"z": own[5], "kl": each} if forward else {"grads": kernels.Gradients(own[5], each, *own[7:])}
        binary = compile_kernel(kernel, signature, {"SPEC": plan.spec, "num_warps": plan.config.num_warps}, 90)
        assert binary.stack == 0, (kernel, dtype, parametrisation, binary.registers)

assert_fits(1, 4096, 64, "*fp32", None, True, True, False, True, Parametrisation("logvar", 1e-4))
assert_fits(4, 300, 6, "*fp64", "eps", True, False, True, False, Parametrisation("variance", 1e-4))
assert_fits(4, 300, 100, "*bf16", "seed", True, True, False, False, Parametrisation("std", 0.0, None, 5.0), "i64")
assert_fits(1, 8, 65536, "*fp64", "seed", True, True, False, True, Parametrisation("log_std", 0.01, None, 5.0))
"""


_AROUND_KERNEL_HVP = """
from benchmarks.sass import argument_types, compile_kernel
from fastvae.kernels import kernel_hvp as kernels, prepare
from fastvae.kernels.products import BF16X3, IEEE, TF32, TF32X3

def assert_fits(kernel, scalar, given, constants):
    def pick(name):
        return "*fp64" if name in ("plan_ptr", "not_finite_ptr") else scalar if name.endswith("_ptr") else "i32"
    types = argument_types(kernel, pick)
    if kernel is kernels.store_kernel:
        types["given"] = kernels.Given(*(scalar if there else None for there in given), "i32", "i32")
    binary = compile_kernel(kernel, types, constants | {"num_warps": 4}, 90)
    assert binary.stack == 0, (kernel, scalar, constants, binary.registers)

for scalar, first, second in (("*fp32", BF16X3, TF32X3), ("*fp32", TF32X3, -1), ("*fp32", TF32, -1), ("*fp64", IEEE, -1)):
    products = {"FIRST_PRODUCT": first.value, "SECOND_PRODUCT": getattr(second, "value", second), "BLOCK_N": 64}
    for given in ((True, True), (True, False), (False, True)):
        for directions in (False, True):
            stored = {"DIRECTIONS": directions, "COLUMNS": 20, "C": 32, "BLOCK_C": 32}
            assert_fits(kernels.store_kernel, scalar, given, products | stored)
    for radial, within, row_dir in ((True, True, True), (True, False, False), (False, False, True)):
        of = {"RADIAL": radial, "WITHIN": within, "ROW_DIR": row_dir, "FEATURES": 20, "D": 32, "BLOCK_D": 32}
        assert_fits(kernels.points_finish_kernel, scalar, given, products | of)
    for columns in (1, 2):
        stored = {"DIRECTIONS": False, "COLUMNS": columns, "C": columns, "BLOCK_C": columns}
        assert_fits(kernels.store_kernel, scalar, (True, True), products | stored | {"FIRST_PRODUCT": IEEE.value, "SECOND_PRODUCT": -1})
        finished = {"COLUMNS": columns, "C": columns, "BLOCK_N": 64, "BLOCK_C": columns}
        assert_fits(kernels.factors_finish_kernel, scalar, given, finished)
    assert_fits(kernels.factors_finish_kernel, scalar, given, {"COLUMNS": 20, "C": 32, "BLOCK_N": 64, "BLOCK_C": 32})
"""


# The MI300 (gfx942), with the configurations of sm_80, which are those of an unknown GPU: within its 64 KiB of shared memory.
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


_HISTOGRAM = """
from benchmarks.sass import compile_kernel
from fastvae.kernels import ranked_squared_distance as kernels

types = {"z_ptr": "*fp64", "known_ptr": "*i64", "counts_ptr": "*i64", "N": "i32", "blocks": "i32", "D": "i32", "shift": "i32"}
for architecture in (80, 90, 120):
    constants = {"BITS": kernels.BITS, "BLOCK": kernels.BLOCK, "num_warps": kernels.WARPS}
    binary = compile_kernel(kernels.histogram_kernel, types, constants, architecture)
    assert binary.stack == 0, (architecture, binary.registers)
"""


# A large α would multiply the error of the fast logarithm.
_LOGARITHMS = """
from triton.backends.compiler import GPUTarget
from benchmarks import compile_report as report, sass
from fastvae.radial import RationalQuadratic

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


_FOR_NVIDIA = _AROUND_THE_SWEEP + _AROUND_KERNEL_HVP + _AROUND_THE_DENSITIES + _OF_FEW_PAIRS + _OF_POSTERIORS + _HISTOGRAM + _LOGARITHMS


@pytest.mark.slow
@pytest.mark.parametrize("code", [_FOR_NVIDIA, _FOR_AMD], ids=["NVIDIA", "AMD"])
def test_other_kernels_compile_without_spills(code):
    """The interpreter takes what the compiler refuses, such as a name of two types."""
    run_python("-c", code)
