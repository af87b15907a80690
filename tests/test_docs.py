"""README, docs/ and examples/: sizes, links, tables, and every block of code."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from benchmarks import table
from fastvae.cli import main
from fastvae.training.command import COMMANDS, command_parser
from fastvae.version import __version__

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page for page in (*table.pages(), ROOT / "CONTRIBUTING.md")}
# Commands of a run's files that are run here, on a run of three batches; of the others the arguments alone are looked at.
RUN = ("sample", "traverse", "test", "report")


def test_readme_is_short_and_shows_its_plot_first():
    text = PAGES["README.md"].read_bytes()
    assert len(text) <= 9000
    lines = text.decode().splitlines()
    assert next(n for n, line in enumerate(lines, 1) if line.startswith("![")) <= 40
    assert {"make train", "make test"} <= {line.split("#")[0].strip() for line in lines}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_tables_are_those_of_the_rows():
    found = set()
    for page in table.pages():
        text = page.read_text(encoding="utf-8")
        assert table.rendered(text) == text, f"{page.name} is out of date: python -m benchmarks.table"
        found |= {match[2] for match in table.MARKED.finditer(text)}
    assert found == table.TABLES.keys()


def test_a_table_out_of_date_is_seen():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.rendered(text.replace("105 ms", "104 ms")) != text.replace("105 ms", "104 ms")


def headings(text):
    names = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).strip().replace(" ", "-") for name in names}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if line := re.fullmatch(r"L(\d+)", anchor):
            assert int(line[1]) <= len(target.read_text(encoding="utf-8").splitlines()), link
        elif anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), link


def test_claims_of_the_readme_follow_from_the_rows():
    cpu = table.readme_cpu(8192)
    ours, eager = (table.gpu_row(65536, 16, name) for name in ("fastvae", "eager"))
    small, eager_small = (table.gpu_row(512, 16, name + table.GRAPH) for name in ("fastvae", "eager"))
    accuracy = table.rows_of("gpu", stage="accuracy", device=table.GPU, n=65536, d=16, precision="highest")[-1]
    times = {name: row["processor_ms"] / cpu["fastvae"]["processor_ms"] for name, row in cpu.items() if row["status"] == "ok"}
    assert min(times["geomloss"], times["KeOps"]) == times["geomloss"]
    claims = {
        f"{times['eager']:.0f} times as fast as eager PyTorch, {times['torch.compile']:.0f} times as fast as `torch.compile`": cpu[
            "fastvae"
        ],
        f"{times['geomloss']:.0f} times as fast as geomloss": cpu["fastvae"],
        f"in {cpu['fastvae']['extra_mib']:.0f} MiB instead of {cpu['eager']['extra_mib'] / 1024:.0f} GiB": cpu["fastvae"],
        f"With huge pages the factor is {times['eager, huge pages']:.0f}.": cpu["fastvae"],
        f"{eager['median_ms'] / ours['median_ms']:.0f} times as fast as eager PyTorch**": ours,
        f"in {ours['peak_mib']:.0f} MiB instead of {eager['peak_mib'] / 1024:.0f} GiB": ours,
        "a quarter of eager's time": small,
        f"against float64 is {accuracy['gradient']:.1e}".replace("e-0", "e-"): accuracy,
    }
    audio = table.rows_of("large_stable_audio", kernel="gaussian", threads=1)[-1]
    claims[f"{audio['seconds']:.1f} s and {audio['extra_mib']} MiB on one CPU thread"] = audio
    assert 1 / 4.5 < small["median_ms"] / eager_small["median_ms"] < 1 / 3.5
    bullets = [
        " ".join(text.split()) for text in re.findall(r"^- .*(?:\n  .*)*", PAGES["README.md"].read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for claim, row in claims.items():
        [bullet] = [text for text in bullets if claim in text]
        linked = re.findall(r"benchmarks/results/(\w+\.jsonl)#L(\d+)", bullet)
        lines = [(ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8").splitlines()[int(line) - 1] for file, line in linked]
        assert row in map(json.loads, lines), claim


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands of the pages name, and one small run."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "FOLDER").mkdir()
    np.save(folder / "FOLDER" / "images.npy", np.zeros((40, 8, 8), np.uint8))
    for name in ("FILE", "TABLE"):
        (folder / f"{name}.csv").write_text("a,b\n" + "1,2\n3,4\n" * 20, encoding="utf-8")
    (folder / "mine.py").write_text(
        "from torch import nn\n\nclass Encoder(nn.Linear):\n    def __init__(self): super().__init__(64, 12)\n\n"
        "class Decoder(nn.Linear):\n    def __init__(self): super().__init__(6, 64)\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def call(place, monkeypatch, capfd):
    """Runs `fastvae` in this process, where the commands of the pages find what they name."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))

    def run(*args):
        with pytest.raises(SystemExit) as end:
            main(args)
        out, err = capfd.readouterr()
        assert not end.value.code, f"fastvae {shlex.join(args)}\n{out}{err}"

    if not (place / "runs").exists():
        run("fit", "--data.name", "digits", "--name", "one", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3")
    return run


def check_line(line, place, call):
    """One line of a shell block: that there is what it names; a command of fastvae is parsed, or run if it is quick."""
    program, *args = shlex.split(line, comments=True) or [""]
    if program == "fastvae":
        command = args[0]
        paths = {"FOLDER": str(place / "FOLDER"), "FILE": str(place / "FILE.csv"), "TABLE.csv": str(place / "TABLE.csv")}
        args = [paths.get(arg, str(ROOT / arg) if arg.startswith("configs/") and (ROOT / arg).exists() else arg) for arg in args]
        args = ["runs/one/version_0" if arg == "RUN" else arg for arg in args]
        if command == "fit":
            call(*args, "--print_config")
        elif command in RUN:
            call(*args)
        else:
            assert command in COMMANDS
            command_parser(command).parse_args(args[1:])
    elif program == "python":
        assert importlib.util.find_spec(args[args.index("-m") + 1]) is not None
    elif program == "make":
        assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert program in ("", "pip"), f"no check for {program!r}"


def after_the_swap(example):
    """A block of coming-from.md without the call of another library, which need not be installed."""
    if "# before" not in example.parsed:
        return PythonEvaluator()(example)
    _, mark, code = example.parsed.partition("# after\n")
    assert mark
    example.namespace.pop("result", None)
    exec(code, example.namespace)
    assert torch.as_tensor(example.namespace["result"]).isfinite().all(), example.parsed
    return None


@pytest.mark.filterwarnings("ignore")  # the command's and Lightning's own
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "docs/training.md")) for name in PAGES])
def test_blocks_of_code_run(name, place, call):
    swaps = name == "docs/coming-from.md"
    python = CodeBlockParser("python", after_the_swap) if swaps else PythonCodeBlockParser()

    def shell(example):
        for line in example.parsed.splitlines():
            check_line(line, place, call)

    document = Sybil(parsers=[python, CodeBlockParser("sh", shell)], pattern="*.md").parse(PAGES[name])
    blocks = list(document)
    languages = re.findall(r"^```(\w*)\n.*?^```$", document.text, re.MULTILINE | re.DOTALL)
    hidden = len(re.findall(r"^<!--+ invisible-code-block", document.text, re.MULTILINE))
    assert len(blocks) == len(languages) + hidden, "a block that nothing runs"
    assert not swaps or sum(block.parsed.startswith("# before") for block in blocks) >= 15
    for block in blocks:
        block.evaluate()


EXAMPLES = {
    "train_mmd_vae": "--epochs 2",
    "two_sample_test": "--n 400",
    "domain_adaptation": "--steps 60",
    "train_autoencoder": "--steps 25",
    "mmd_flow": "--n 50 --steps 8",
    "gradient_penalty": "--steps 15 --batch 64",
}
# Those that draw a picture.
DRAWING = ("mmd_flow", "gradient_penalty")


def test_each_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize(("example", "options"), EXAMPLES.items())
def test_examples_run(example, options, monkeypatch, capsys, tmp_path):
    path, picture = ROOT / "examples" / f"{example}.py", tmp_path / "picture.png"
    assert len(path.read_text(encoding="utf-8").splitlines()) < (140 if example in DRAWING else 60)
    drawing = ["--out", str(picture)] if example in DRAWING else []
    monkeypatch.setattr(sys, "argv", [str(path), *options.split(), *drawing])
    found = runpy.run_path(str(path))["main"]()
    assert capsys.readouterr().out
    assert picture.exists() == bool(drawing)
    if example == "two_sample_test":
        assert found["shifted"] < 0.05 < found["same"]
    elif example == "domain_adaptation":
        assert found["with MMD²"] > found["source only"]
    elif example == "train_autoencoder":
        assert found[1] < 0.9 * found[0]
    elif example == "mmd_flow":
        assert 2 * found["newton"] < found["gradient"] < 0.01 * found["start"]
    elif example == "gradient_penalty":
        assert all(rows[-1].mmd < 0.5 * rows[0].mmd for rows in found.values())
    else:
        assert 0 < found < 45


@pytest.mark.slow
def test_the_example_of_a_gradient_penalty_trains(monkeypatch, capsys):
    """The penalty holds the mean slope near 1, where it goes to hundreds without one, and MMD² to held-out points falls further."""
    path = ROOT / "examples" / "gradient_penalty.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "100", "--batch", "96"])
    without, held = (rows for rows in runpy.run_path(str(path))["main"]().values())
    assert held[0].slope < 0.5
    assert all(0.5 < row.slope < 1.2 for row in held[-10:])
    assert all(row.slope > 10 for row in without[-10:])
    late, late_without = (sum(row.mmd for row in rows[-10:]) / 10 for rows in (held, without))
    assert late < 0.1 * held[0].mmd
    assert late < 0.7 * late_without


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fastvae.mmd" in (tmp_path / "api" / "losses.html").read_text(encoding="utf-8")
