"""The benchmark suite itself: what it checks before it times, and what it says of a peer that is not there."""

import ast
import graphlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae
from benchmarks import (
    bench_reparameterize_kl,
    large_kernel_mean,
    large_two_sample_test,
    plot,
    providers,
    rows,
    run,
    small,
    table,
    tensor_core,
)
from benchmarks.comparison import Comparison
from benchmarks.machine import Ceilings
from benchmarks.measure import Time, interleaved, peak_extra_mib, run_once, summaries, summary
from fastvae import reference

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 3, generator=generator), 1.2 * torch.randn(40, 3, generator=generator)


@pytest.fixture(scope="module")
def exact(points):
    return providers.expected(*points, (2.0, 1.0))


def test_expected_is_the_reference(points, exact):
    x, y = (t.double() for t in points)
    x.requires_grad_()
    value = reference.mmd(x, y, bandwidth=(2.0, 1.0))
    value.backward()
    assert exact[0] == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(exact[1], x.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("compute", [providers.fused, providers.fused_to_normal, providers.matrix, providers.broadcast])
def test_providers_agree(points, exact, compute):
    provider = providers.Provider("tried", compute, prior=compute is providers.fused_to_normal)
    assert providers.verdict(provider, *points, (2.0, 1.0), exact) == "ok"


def test_a_wrong_provider_is_not_timed(points, exact):
    wrong_value = providers.Provider("wrong", lambda x, y, h: 1.01 * fastvae.mmd(x, y, bandwidth=h))
    wrong_gradient = providers.Provider("wrong", lambda x, y, h: fastvae.mmd(x, y, bandwidth=h) + 0.1 * (x - x.detach()).sum())
    fails = providers.Provider("fails", lambda x, y, h: x @ y)
    assert providers.verdict(wrong_value, *points, (2.0, 1.0), exact).startswith("wrong value")
    assert providers.verdict(wrong_gradient, *points, (2.0, 1.0), exact).startswith("wrong gradient")
    assert providers.verdict(fails, *points, (2.0, 1.0), exact).startswith("failed: RuntimeError")


def test_a_wrong_posterior_is_not_timed():
    def wrong(moments, eps):
        z, kl = bench_reparameterize_kl.fused_moments(moments, eps)
        return z, kl + 0.01 * moments[:, 5:].sum()

    compared = {"eager": providers.eager_reparameterize_kl_moments, "fastvae": bench_reparameterize_kl.fused_moments, "wrong": wrong}
    eager, ours, other = bench_reparameterize_kl.moments_rows(compared, (3, 8, 2, 5), "channels_last", 3, 0)
    assert (eager["status"], ours["status"], eager["over_eager"]) == ("ok", "ok", 1)
    assert ours["over_eager"] > 0
    assert other["status"].startswith("wrong KL")
    assert "median_ms" not in other


def test_the_largest_samples_are_held_to_their_population(monkeypatch):
    monkeypatch.setattr(run, "CHECKED_ROWS", 50)
    x, y = providers.samples(4000, 3, "cpu")
    h = (1.5, 1.0)
    fused = providers.Provider("fused", providers.fused)
    assert run.verdict_by_part(fused, x, y, h) == "ok"
    forgets_rows = providers.Provider("wrong", lambda x, y, h: fastvae.mmd(x[:1000], y[:2000] + (len(x) > 50) * 0.1, bandwidth=h))
    assert run.verdict_by_part(forgets_rows, x, y, h).startswith("wrong value")


@pytest.mark.parametrize("split", [tensor_core.BF16, tensor_core.TF32])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_tensor_core_that_truncates_nothing_is_a_float32_sum(split, fresh):
    """Of small integers, whose sums no step has to cut."""
    generator = np.random.default_rng(0)
    a, b = generator.integers(-9, 9, (2, 3, 200)).astype(np.float32), generator.integers(-9, 9, (2, 200, 4)).astype(np.float32)
    np.testing.assert_array_equal(split.sums(a, b, fresh), a @ b)


def test_a_tensor_core_truncates_toward_zero():
    """A term is cut two bits after the last of the sum, which is then cut to float32."""
    one, last = np.ones((1, 1), np.float32), np.float32(2.0**-23)

    def add(*terms):
        a = np.array([terms], np.float32)
        return tensor_core.multiply_add(a, np.ones_like(a.T), one, 16).item()

    assert add(0.75 * last) == add(0.24 * last, 0.24 * last, 0.24 * last, 0.24 * last) == add(*[0.124 * last] * 16) == 1
    assert add(*[0.25 * last] * 4) == 1 + last
    assert -tensor_core.multiply_add(one, -0.75 * last * one, -one, 16).item() == 1


@pytest.mark.parametrize("dim", [16, 64])
def test_tiles_that_start_from_zero_keep_the_gradients_digits(dim):
    kept, fresh = (tensor_core.mmd_gradient(8192, dim, fresh) for fresh in tensor_core.SUMS.values())
    assert fresh < 5e-6 < 1e-5 < kept
    assert 10 * tensor_core.witness(8192, dim, True) < tensor_core.witness(8192, dim, False)


def test_the_large_two_sample_test_checks_the_permutations_that_were_drawn():
    x, y = providers.samples(50, 2, "cpu")
    result = fastvae.two_sample_test(x, y, bandwidth=1.5, permutations=20, seed=3)
    expected = large_two_sample_test.exact_statistics(torch.cat([x, y]).double(), 1.5, large_two_sample_test.first_splits(50, 4, 3))
    torch.testing.assert_close(torch.cat([torch.tensor([result.statistic]), result.null[:4]]), expected, rtol=1e-4, atol=1e-6)


def test_rows_of_approximations_and_of_a_kernel_mean(monkeypatch):
    monkeypatch.setattr(large_two_sample_test, "PERMUTATIONS", 20)
    found = large_two_sample_test.approximations(600)
    assert [row["case"].split("(")[0] for row in found] == [f"two_sample_test by {name}" for name in ("RandomFeatures", "NystromFeatures")]
    assert all(row["error_in_null_deviations"] < 3 for row in found)
    assert large_kernel_mean.measure(300, 200, 5, 1)["gradient_difference"] < 1e-5


@pytest.mark.parametrize("variant", ["500 permutations", "agg"])
def test_p_values_are_held_to_eager_code_before_a_test_is_timed(variant):
    """On samples whose p-value is far from 0 and 1, so that half of it is an error."""
    name = f"two_sample_test, {variant}"
    operation = small.operations()[name]
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(40, 2, generator=generator) for _ in range(2)]
    assert small.operation_verdict(name, operation, samples) == "ok"
    right = operation.functions["fastvae"]

    def wrong(x, y):
        result = right(x, y)
        p_value = result.statistic if variant == "agg" else result.p_value
        return result._replace(**{"statistic" if variant == "agg" else "p_value": p_value / 2})

    halved = operation._replace(functions=operation.functions | {"fastvae": wrong})
    assert small.operation_verdict(name, halved, samples).startswith("wrong p-value")


def test_imports_have_no_circle():
    """Those within functions too."""
    folder = ROOT / "benchmarks"
    imported = {}
    for path in folder.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks":
                names |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
        imported[path.stem] = names
    assert imported["run"] >= {"machine", "measure", "providers"}
    # Raises CycleError, which names the circle.
    order = list(graphlib.TopologicalSorter(imported).static_order())
    assert set(order) == set(imported)


def test_the_readme_names_every_module():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    modules = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith(("__", "bench_"))]
    assert [name for name in modules if f"`{name}" not in text] == []


@pytest.mark.slow
def test_commands_have_help():
    """In one other process, as some choose Triton's interpreter."""
    texts = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    commands = sorted(name for name, text in texts.items() if ("def main()" in text and "ArgumentParser" in text) or "\nmain = " in text)
    assert {"bench_sigreg", "gpu", "host_time", "run", "small"} <= set(commands)
    code = """import contextlib, importlib, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main()
        print("no help")"""
    text = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "no help" not in text
    for name in commands:
        assert f"python -m benchmarks.{name}" in text


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    missing = {p.name: p.missing for p in providers.providers("cpu")}
    assert missing["KeOps"] == "missing: pykeops not installed"
    assert missing["geomloss"] == "missing: geomloss, pykeops not installed"
    assert missing["fastvae"] is None


def test_the_snippet_of_differences_is_refused_where_it_takes_too_much():
    found = {p.name: p for p in providers.providers("cpu")}
    assert found["N×M×D"].refuses(512, 16) is None
    assert found["N×M×D"].refuses(8192, 64) == "not run: one of its N×M×D arrays takes 16.0 GiB"
    assert found["eager"].refuses(16_384, 64) is found["fastvae"].refuses(1_000_000, 64) is None
    assert found["eager"].refuses(32_768, 64) == "not run: one of its N×M arrays takes 4.0 GiB"


def test_a_comparison_checks_each_provider_and_runs_the_first_alone_where_the_others_do_not_fit():
    def right(x, factor):
        return factor * x.square().sum()

    comparison = Comparison(
        "squares",
        providers={"right": right, "value": lambda x, f: 1.01 * right(x, f), "gradient": lambda x, f: right(x, f) + (x - x.detach()).sum()},
        exact=dict.fromkeys(("right", "value", "gradient"), right),
        arguments=lambda n, d: ([torch.ones(n, d)], [2.0]),
        columns=("n", "dim"),
        sizes=[(4, 3)],
        largest_dense=10,
        gradient_error=lambda leaves, others, grad: (grad - 4).abs().max().item(),
    )
    rows = list(comparison.rows((4, 3), 3, 60))
    assert [(row["direction"], row["provider"], row["status"].split(":")[0], "median_ms" in row) for row in rows] == [
        (direction, provider, status, provider == "right")
        for direction in ("forward", "forward+backward")
        for provider, status in (("right", "ok"), ("value", "wrong value"), ("gradient", "wrong gradient"))
    ]
    (row,) = comparison.rows((11, 3), 3, 60)
    assert (row["direction"], row["provider"], row["rounds"], row["gradient_relative_error"]) == ("forward+backward", "right", 1, 0)


def test_measures():
    times = interleaved({"a": lambda: None, "b": lambda: None}, "cpu", rounds=4, seconds=60)
    assert [len(values) for values in times.values()] == [4, 4]
    found = summary([Time(1e-3 * n, 2e-3 * n) for n in range(1, 12)], "cpu")
    assert found == {"median_ms": 6, "p20_ms": 3, "p80_ms": 9, "processor_ms": 12, "rounds": 11}
    extra = peak_extra_mib(lambda: torch.ones(1 << 23), "cpu")
    assert extra is None or extra == pytest.approx(32, abs=4)
    assert {name: row["rounds"] for name, row in summaries({"a": lambda: None}, "cpu", 5, 60, warm_up=2).items()} == {"a": 5}
    value, found = run_once(lambda: torch.ones(1 << 23).sum().item())
    assert (value, set(found)) == (1 << 23, {"seconds", "extra_mib"})
    assert found["extra_mib"] is None or found["extra_mib"] == pytest.approx(32, abs=4)


def test_the_floor_adds_units_on_a_cpu_and_overlaps_them_on_a_gpu():
    ceilings = Ceilings(multiply_adds=1e9, exponentials=1e9, copied=1e9)
    assert run.floor_ms(1000, 3, "forward", "cpu", ceilings) == pytest.approx(8)
    assert run.floor_ms(1000, 3, "forward", "cuda", ceilings) == pytest.approx(6)
    assert run.floor_ms(1000, 3, "forward+backward", "cuda", ceilings) == pytest.approx(12)


@pytest.fixture
def results(tmp_path, monkeypatch):
    common = {"benchmark": "mmd", "dtype": "float32", "device": "a CPU", "threads": 1, "note": "", "date": "2026-01-01", "bandwidths": 1}
    common |= {"torch": "2", "triton": "3", "pykeops": "not installed", "geomloss": "not installed", "direction": "forward+backward"}
    lines = []
    for n, dim in ((10, 2), (20, 2), (10, 4)):
        for provider, ms in (("fastvae", 99.0), ("fastvae", 2.0 * n), ("eager", 8.0 * n)):
            row = {
                "n": n,
                "m": n,
                "dim": dim,
                "provider": provider,
                "status": "ok",
                "processor_ms": ms,
                "median_ms": 2 * ms,
                "extra_mib": 1.0,
            }
            lines.append(common | row)
        lines.append(lines[-1] | {"threads": 2, "median_ms": 3.0 * n})
        lines.append(common | {"n": n, "m": n, "dim": dim, "provider": "KeOps", "status": "missing: pykeops not installed"})
    (tmp_path / "mmd_cpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(table, "load", lambda benchmark: rows.load(benchmark, tmp_path))
    monkeypatch.setattr(plot, "load", lambda benchmark: rows.load(benchmark, tmp_path))
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("results")
def test_table_takes_the_newest_rows_and_says_what_is_missing():
    text = table.tables()
    assert "| forward and backward | 10 | 2 | 1 | 20 | 80 (4.0×) | – |" in text
    assert "- KeOps: missing" in text
    one, two = text.split("`mmd`, float32, a CPU, ")[1:3]
    assert one.startswith("1 thread, median processor time")
    assert two.startswith("2 threads, median time")
    assert "| forward and backward | 10 | 2 | 1 | 30 |" in two


def test_plots_are_drawn_from_rows(results, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.main()
    monkeypatch.undo()
    for figure in figures[1:]:
        axes, legend = figure.axes[0], figure.axes[0].get_legend()
        ours = next(line for line in axes.lines if line.get_label() == "fastvae")
        assert ours.get_linewidth() == max(line.get_linewidth() for line in axes.lines)
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
        plot.plt.close(figure)
    assert len(figures) == 4
    kinds = ("overview", "time", "memory", "speed-up")
    assert {path.name for path in results.glob("*.png")} == {f"a-cpu-{kind}.png" for kind in kinds}


def test_the_plot_of_the_readme_can_be_read(tmp_path, monkeypatch):
    """Of the committed rows: each line has its name in the legend, whose names lie in the picture and on no other name."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    plot.main()
    monkeypatch.undo()
    overview = figures[0]
    overview.draw_without_rendering()
    names = overview.legends[0].get_texts()
    assert {text.get_text() for text in names} == {"fastvae", "eager PyTorch", "torch.compile", "KeOps", "geomloss"}
    for axes in overview.axes:
        assert len(axes.lines) >= len(names)
    boxes = [text.get_window_extent() for text in names] + [axes.get_tightbbox() for axes in overview.axes]
    assert all(overview.bbox.containsx(x) for box in boxes for x in box.intervalx)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for figure in figures:
        plot.plt.close(figure)


@pytest.mark.slow
def test_host_time_counts_the_launches_of_a_step():
    pytest.importorskip("triton")
    # In a process of its own, as it has to choose the interpreter.
    code = "from benchmarks.host_time import measure; import json; print(json.dumps(measure(rounds=5)))"
    row = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert row["launches"]["fastvae"] == 7
    assert row["fastvae"]["rounds"] == row["eager"]["rounds"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain loop, fused Adam", "Lightning alone", "fastvae fit"])
@pytest.mark.filterwarnings("ignore")  # the command's and Lightning's own
def test_each_way_to_train_is_timed_by_its_steps(variant, monkeypatch):
    fit = pytest.importorskip("benchmarks.fit")
    monkeypatch.setattr(fit, "STEPS", 3)
    monkeypatch.setattr(fit, "EPOCHS", 3)
    steps, whole = fit.epochs(fit.VARIANTS[variant], "mmd_vae")
    assert (len(steps), len(whole)) == (2, 1)
    assert all(time.processor > 0 for time in steps + whole)
