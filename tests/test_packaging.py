"""The wheel holds the package, its kernels and its configurations, and works outside the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    # Built from the source distribution, as `build` does by default: so that holds everything too.
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastvae"}
    modules = [path.relative_to(ROOT) for path in (ROOT / "fastvae").rglob("*.py")] + [
        Path("fastvae", path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")
    ]
    data = [path.relative_to(ROOT) for path in (ROOT / "fastvae" / "configs").glob("*.yaml")] + [Path("fastvae/py.typed")]
    assert sorted(name for name in names if name.startswith("fastvae/")) == sorted(path.as_posix() for path in modules + data)
    assert "fastvae/kernels/mmd.py" in names
    assert "fastvae/configs/mnist_vae.yaml" in names


@pytest.mark.slow
@pytest.mark.parametrize(("distribution", "hidden"), [("wheel", "triton"), ("sdist", "")])
def test_distributions_install_and_work_outside_the_checkout(wheel, tmp_path, distribution, hidden):
    """Installed by pip into a folder, without network and without what they depend on, which is there already."""
    file = wheel if distribution == "wheel" else next(wheel.parent.glob("*.tar.gz"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    result = subprocess.run([*pip, "--target", str(tmp_path / "site"), str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); hidden = {hidden!r};"
        "sys.modules.update({hidden: None} if hidden else {}); import fastvae, torch;"
        "assert fastvae.__file__.startswith(sys.argv[1]), fastvae.__file__;"
        "x = torch.randn(5, 2, requires_grad=True); fastvae.mmd_to_normal(x).backward(); print(fastvae.__version__)"
    )
    run = (
        [sys.executable, "-P", "-c", code, str(tmp_path / "site")]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code, str(tmp_path / "site")]
    )
    result = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.slow
def test_a_checkout_without_links_has_its_kernels(tmp_path):
    """As on Windows and from a zip file, where git leaves a text file in the place of a link."""
    pytest.importorskip("triton")
    for path in ("fastvae", "kernels"):
        shutil.copytree(ROOT / path, tmp_path / path, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for link in [path for path in tmp_path.rglob("*") if path.is_symlink()]:
        target = str(link.readlink())
        link.unlink()
        link.write_text(target)
    code = "from fastvae.kernels import mmd; from fastvae.kernels.config import sweep_config; print(mmd.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == (tmp_path / "kernels" / "mmd.py").resolve()


HEAVY = "torch._dynamo torch._inductor triton sympy lightning jsonargparse pandas scipy sklearn matplotlib torchmetrics fastvae.kernels"


@pytest.mark.slow
def test_import_loads_nothing_that_few_calls_need():
    code = "import sys, torch; before = set(sys.modules); import fastvae; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = result.stdout.split()
    assert "fastvae.functional" in loaded
    assert [name for name in loaded for heavy in HEAVY.split() if f"{name}.".startswith(f"{heavy}.")] == []
