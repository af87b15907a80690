"""The layout of the repository: an operation has one name in every layer, and a module imports only from its own layer or lower ones."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastvae"
OPERATIONS = sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if path.stem not in ("__init__", "common", "mmd_problem"))

# In the order of the table in CONTRIBUTING.md: a module imports from its own row and from the rows above it.
LAYERS = [
    ["version", "radial", "kernel_sums", "parametrisation", "layouts"],
    ["kernels"],
    ["devices", "dispatch", "checks", "reference", "bandwidths", "distributed", "linear"],
    ["cpu"],
    ["ops"],
    ["densities", "features", "kernel_mean", "functional", "sliced", "stein", "two_sample"],
    ["preparation", "posteriors", "losses", "objectives", "schedules", "drifting", "recipes", "metrics"],
    ["autoencoder_kl", "vae"],
    ["training"],
    ["cli"],
    ["__main__"],
]


def test_there_are_operations():
    assert {"mmd", "reparameterize_kl"} <= set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_one_name_in_every_layer(operation):
    for path in (
        ROOT / "kernels" / f"{operation}.py",
        PACKAGE / "reference" / f"{operation}.py",
        PACKAGE / "cpu" / f"{operation}.py",
        ROOT / "tests" / f"test_{operation}.py",
        ROOT / "benchmarks" / f"bench_{operation}.py",
    ):
        assert path.is_file(), f"{operation} must have {path.relative_to(ROOT)}"


def test_kernels_are_joined_without_a_link():
    assert [path.name for path in (PACKAGE / "kernels").glob("*.py")] == ["__init__.py"]
    assert not any(path.is_symlink() for path in (PACKAGE, *PACKAGE.rglob("*")))
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_function_has_more_than_14_parameters():
    """`ImageVAE` takes the options of the command."""
    found = [
        f"{path.name}: {node.name}"
        for path in (*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) > 14
    ]
    assert found == ["module.py: __init__"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [node.module] if node.module != "fastvae" else [f"fastvae.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer(name):
    for level, names in enumerate(LAYERS):
        if name in names:
            return level
    raise AssertionError(f"fastvae.{name} must have a place in LAYERS")


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path):
            package, _, other = name.partition(".")
            other = other.split(".")[0]
            if package == "fastvae" and ((PACKAGE / f"{other}.py").exists() or (PACKAGE / other).is_dir()):
                assert layer(other) <= layer(own), f"{path.relative_to(ROOT)} must not import {name}"


def test_triton_is_imported_only_by_the_kernels():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.resolve() != (ROOT / "kernels").resolve():
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


def test_imports_without_what_is_optional():
    blocked = ["triton", "lightning", "matplotlib", "sklearn", "mlxtend", "sympy"]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import fastvae, torch;"
        "print(fastvae.mmd(torch.zeros(2, 1), torch.ones(2, 1)).item())"
    )
    result = subprocess.run([sys.executable, "-c", code, *blocked], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0


def test_a_family_is_a_constant_of_its_own_in_kernels():
    """Triton 3.6 does not take the attribute of a tuple as a constexpr argument."""
    for path in (ROOT / "kernels").glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(r"(SPEC|SUM)\.FAMILY[,)]", line), f"{path.name}:{number}"
