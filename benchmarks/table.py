"""Tables of README.md and docs/, drawn from the committed rows.

python -m benchmarks.table            rewrites every table that stands between "<!-- table: NAME -->" and "<!-- end of table -->"
python -m benchmarks.table --check    changes nothing; ends with 1 and names the pages that are out of date
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import HUGE_PAGES, RESULTS, load, machine_of, machines, milliseconds, read

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GPU = "NVIDIA H200"
GRAPH = ", CUDA graph"
_DIRECTION = {"forward": "forward", "forward+backward": "forward and backward"}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """The page with its tables as the rows have them now."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def rows_of(name: str, **fields: Any) -> list[Row]:
    """The rows of results/NAME.jsonl that have these fields, oldest first."""
    rows = (row for row in _read(RESULTS / f"{name}.jsonl") if row.get("tests") != "failed")
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


_read = functools.cache(read)


def gpu_row(
    n: int, d: int, provider: str, *, operation: str = "mmd", direction: str = "forward+backward", stage: str = "speed"
) -> Row | None:
    """The H200's row of this case from its newest run: the first there, as later stages time some providers once more."""
    found = rows_of("gpu", device=GPU, n=n, d=d, provider=provider, operation=operation, direction=direction, stage=stage, status="ok")
    return next((row for row in found if row["commit"] == found[-1]["commit"]), None)


def duration(ms: float) -> str:
    """Three digits, in ms or, from 1,000 ms on, in s."""
    return f"{_digits(ms)} ms" if ms < 999.5 else f"{_digits(ms / 1000)} s"


def memory(mib: float) -> str:
    return f"{_digits(mib, 2 if mib < 10 else 3)} MiB" if mib < 1000 else f"{_digits(mib / 1024, 2)} GiB"


def _digits(number: float, digits: int = 3) -> str:
    text = f"{number:.{digits}g}"
    return f"{number:.0f}" if "e" in text else text


# CPU


def tables(
    n: int | None = None, machine: str = "", threads: int | None = None, benchmarks: Sequence[str] = ("mmd", "reparameterize_kl")
) -> str:
    """All tables, or those of devices with `machine` in their name or of so many threads, and of `mmd` only the rows of one N."""
    return "\n\n".join(text for name in benchmarks for text in _tables(name, n if name == "mmd" else None, machine, threads))


def _tables(benchmark: str, n: int | None, machine: str, threads: int | None) -> list[str]:
    rows = [row for row in load(benchmark) if n in (None, row["n"]) and machine in row["device"] and threads in (None, row["threads"])]
    texts = []
    for found_on, suffix in itertools.product(machines(rows), ("", HUGE_PAGES)):
        here = [row for row in rows if machine_of(row) == found_on and row["provider"].endswith(HUGE_PAGES) == bool(suffix)]
        if not here:
            continue
        providers = sorted(
            dict.fromkeys(row["provider"].removesuffix(suffix) for row in here), key=lambda name: not name.startswith("fastvae")
        )
        cases: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in here:
            case = (row["direction"], row["n"], row["dim"], row.get("bandwidths", 0))
            cases.setdefault(case, {})[row["provider"].removesuffix(suffix)] = row
        lines = []
        for (direction, n, dim, bandwidths), found in sorted(cases.items(), key=lambda case: case[0]):
            cells = [_DIRECTION[direction], f"{n:,}", str(dim), *([str(bandwidths)] if benchmark == "mmd" else [])]
            lines.append([*cells, *(_cell(found.get(name), found.get("fastvae")) for name in providers)])
        head = ["", "N", "D", *(["bandwidths"] if benchmark == "mmd" else []), *providers]
        text = f"{_title(benchmark, here, suffix)}\n\n{markdown(head, lines)}"
        if not suffix:
            text += "\n\n" + "\n".join(f"- {name}: {why}" for name, why in _reasons(here).items())
        texts.append(text.rstrip())
    return texts


def _title(benchmark: str, rows: list[Row], suffix: str) -> str:
    row = rows[-1]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "pykeops", "geomloss") if row[name] != "not installed")
    on_cpu = any("processor_ms" in r for r in rows)
    unit = "processor time" if on_cpu and row["threads"] == 1 else "time"
    dates = " to ".join(sorted({min(r["date"] for r in rows), max(r["date"] for r in rows)}))
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}, " if on_cpu else ""
    return f"`{benchmark}`{suffix}, float32, {row['device']}, {threads}median {unit} in ms (times `fastvae`'s), {versions}, {dates}:"


def _cell(row: Row | None, ours: Row | None) -> str:
    time = None if row is None else milliseconds(row)
    base = None if ours is None else milliseconds(ours)
    if time is None or row is None:
        return "–"
    ratio = "" if base is None or row is ours else f" ({time / base:.1f}×)"
    return f"{time:.3g}{ratio}" if time < 1000 else f"{time:.0f}{ratio}"


def _reasons(rows: list[Row]) -> dict[str, str]:
    """What a reader has to know of a provider: how it was built, and why a cell is empty."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for text in (row["note"], "" if row["status"] == "ok" else row["status"].split(":")[0]):
            if text and text not in reasons.setdefault(row["provider"], []):
                reasons[row["provider"]].append(text)
    return {name: "; ".join(texts) for name, texts in reasons.items() if texts}


def small() -> str:
    """Shares of eager's time, smallest to largest over D, from each case's newest row."""
    columns = {"`mmd`": ("fastvae", 1), "`mmd`, five bandwidths": ("fastvae", 5), "`mmd_to_normal`": ("fastvae, closed-form prior", 1)}
    columns["`torch.compile` of eager"] = ("torch.compile", 1)
    rows = rows_of("small", operation="mmd", direction="forward+backward", batch=1, status="ok")
    lines = []
    for n in (32, 64, 128, 256, 512, 1024):
        cells = [f"{n:,}"]
        for provider, bandwidths in columns.values():
            here = [row for row in rows if (row["n"], row["provider"], row["bandwidths"]) == (n, provider, bandwidths)]
            shares = {row["dim"]: row["over_eager"] for row in here}.values()
            cells.append(f"{min(shares):.2f} to {max(shares):.2f}")
        lines.append(cells)
    return markdown(["N = M", *columns], lines)


def moments() -> str:
    """Processor time and extra memory of a step, from the newest row of each case."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows_of("moments_cpu", threads=1, status="ok"):
        found.setdefault((*row["shape"], row["layout"]), {})[row["provider"]] = row
    names = ("fastvae", "fastvae, inductor", "fastvae, torch.compile", "eager", "torch.compile")
    lines = [
        [
            " × ".join(map(str, shape)),
            layout,
            *(f"{duration(rows[name]['processor_ms'])}, {memory(rows[name]['extra_mib'])}" for name in names),
        ]
        for (*shape, layout), rows in found.items()
    ]
    return markdown(["moments", "layout", *names], lines)


def large() -> str:
    cases = (
        ("`mmd`, 7,207 × 79 against 93,070 × 79, value", "large_mmd", "value_", "relative_error", ""),
        ("the same with both gradients", "large_mmd", "value_and_gradients_", "gradient_relative_error", " (gradient)"),
        (
            "`mmd`, 5,120 × 768 to a `KernelMean` of 4,096 points, with gradient",
            "large_kernel_mean",
            "kernel_mean_",
            "gradient_difference",
            " (gradient, to the usual float32); {over_mmd:.2f} of `mmd`'s time, {over_usual:.2f} of the usual code's",
        ),
        (
            "`two_sample_test`, 20,000 × 32 each, 500 permutations",
            "large_two_sample_test",
            "",
            "error_in_null_deviations",
            " null deviations",
        ),
        *(
            (
                f"the same by `{method}`, 100,000 × 32 each",
                f"approximate_two_sample_test of {method.partition('(')[0]}",
                "",
                "error_in_null_deviations",
                " null deviations",
            )
            for method in ("RandomFeatures(512)", "NystromFeatures(512)")
        ),
        ("`recipes.cmmd`, 30,000 × 768 against 30,000 × 768", "large_cmmd", "", "relative_error", "; the usual float32: {usual:.0e}"),
        (
            "`recipes.stable_audio`, rational quadratic, 16,384 × 64 each, with gradient",
            "large_stable_audio",
            "",
            "gradient_relative_error",
            " (gradient)",
        ),
        ("`total_correlation`, 16,384 × 32, with gradient", "total_correlation_cpu", "", "gradient_relative_error", " (gradient)"),
    )
    lines = []
    for title, name, prefix, error, words in cases:
        name, _, part = name.partition(" of ")
        row = [row for row in rows_of(name) if part in row.get("case", "")][-1]
        seconds = row.get(f"{prefix}seconds", row.get("processor_ms", 0) / 1000)
        text = f"{row[error]:.0e}{words.format(usual=row.get('usual_float32_relative_error'), **row)}"
        script = name.replace("total_correlation_cpu", "bench_total_correlation").replace("approximate", "large")
        lines.append([title, memory(row[f"{prefix}extra_mib"]), f"{seconds:.2g} s", text, f"`{script}`, {row['date']}"])
    return markdown(["", "extra memory", "time", "relative error", "script and date"], lines)


def second_derivatives() -> str:
    providers, quantities = ("fastvae", "eager", "KeOps"), ("value and gradient", "product", "all")
    newest = {(row["n"], row["dim"], row["provider"], row["quantity"]): row for row in rows_of("kernel_hvp_cpu", status="ok")}
    lines = []
    for n, dim in dict.fromkeys(key[:2] for key in newest):
        for provider in providers:
            rows = [newest.get((n, dim, provider, quantity)) for quantity in quantities]
            times = [duration(row["median_ms"]) if row else "–" for row in rows]
            lines.append([f"{n:,}", str(dim), provider, *times, memory(rows[2]["extra_mib"]) if rows[2] else "–"])
    return markdown(["N = M", "D", "", "value and gradient", "product with the Hessian", "both", "extra memory of both"], lines)


# GPU


def gpu_mmd() -> str:
    names = [name + suffix for suffix in ("", GRAPH) for name in ("fastvae", "eager", "torch.compile")]
    sizes = ((32, 16), (128, 16), (512, 16), (512, 64), (1024, 16), (4096, 16), (4096, 64))
    lines = [[f"{n:,}", str(d), *(_ms(gpu_row(n, d, name)) for name in names)] for n, d in sizes]
    return markdown(["N = M", "D", *(name.replace(GRAPH, ", graph") for name in names)], lines)


def gpu_large() -> str:
    names = ("fastvae", "fastvae, closed-form prior", "eager", "eager, checkpointed")
    lines = [
        [f"{n:,}", str(d), *(_time_and_memory(gpu_row(n, d, name)) for name in names)] for n, d in ((65536, 16), (65536, 64), (1000000, 16))
    ]
    return markdown(["N = M", "D", "fastvae", "closed-form prior", "eager", "eager in checkpointed blocks"], lines)


def gpu_peers() -> str:
    names = ("fastvae", "KeOps", "geomloss", "JAX")
    lines = [[f"{n:,}", "16", *(_ms(gpu_row(n, 16, name, stage="peers")) for name in names)] for n in (4096, 65536)]
    return markdown(["N = M", "D", *names], lines)


def gpu_operations() -> str:
    """`kernel_matmul` and `group_mmd` have two kernels; the faster one in a cell is the one that the library takes there."""
    cases = [("kernel_matmul", "`kernel_matmul`, v (N, 16)", n, 16) for n in (32, 128, 1024, 4096, 65536)]
    cases += [("group_mmd", "`group_mmd`, 16 groups", n, 16) for n in (128, 4096, 65536)]
    cases += [("total_correlation", "`total_correlation`", n, 16) for n in (128, 4096, 65536)]
    cases += [("reparameterize_kl", "`reparameterize_kl`", *shape) for shape in ((128, 20), (4096, 64), (262144, 256))]
    lines = []
    for operation, title, n, d in cases:
        cells = [title, f"{n:,}", str(d)]
        for provider in ("fastvae", "eager", "fastvae" + GRAPH, "eager" + GRAPH):
            names = [provider, *(provider.replace("fastvae", f"fastvae, {kernel}") for kernel in ("few pairs", "sweeps"))]
            rows = [gpu_row(n, d, name, operation=operation, stage=stage) for stage in ("speed", "few pairs") for name in names]
            found = [row for row in rows if row]
            newest = [row for row in found if row["date"] == max(row["date"] for row in found)]
            cells.append(_ms(min(newest, key=lambda row: row["median_ms"], default=None)))
        lines.append(cells)
    return markdown(["operation", "N", "D", "fastvae", "eager", "fastvae, graph", "eager, graph"], lines)


def gpu_training() -> str:
    names = [name + suffix for suffix in ("", GRAPH) for name in ("fastvae", "eager", "torch.compile")]
    lines = []
    for objective, n in itertools.product(("vae", "mmd_vae"), (128, 8192)):
        rows = {row["provider"]: row for row in rows_of("gpu", stage="training", objective=objective, n=n)}
        lines.append([f"`{objective}`", f"{n:,}", *(_ms(rows.get(name)) for name in names)])
    head = ["fastvae", "hand-written", "hand-written, compiled"]
    return markdown(["objective", "batch", *head, *(f"{name}, graph" for name in head)], lines)


def gpu_accuracy() -> str:
    newest = {(row["n"], row["precision"]): row for row in rows_of("gpu", stage="accuracy", d=16, operation=None)}
    modes = ("highest", "ieee", "high", "medium")
    lines = []
    for n in sorted({n for n, _ in newest}):
        here = [newest[n, mode] for mode in modes]
        lines.append([f"{n:,}", *(f"{row['value']:.0e} / {row['gradient']:.0e}" for row in here)])
    return markdown(["N = M", *(f'"{mode}"' for mode in modes)], lines)


def compile_report() -> str:
    variants = {
        'value, D 16, "highest"': "value highest D16 across bandwidths1",
        'value, D 16, five bandwidths, "highest"': "value highest D16 across bandwidths5",
        'value and gradient, D 64, "highest"': "value+gradient highest D64 across bandwidths1",
        'value and gradient, D 64, "high" (tf32)': "value+gradient high D64 across bandwidths1",
        'value and gradient, D 64, "medium" (bfloat16)': "value+gradient medium D64 across bandwidths1",
    }
    lines = []
    for title, variant in variants.items():
        row = rows_of("compile_report", kernel="mmd.sweep_kernel", arch="sm_90", variant=variant)[-1]
        lines.append([title, f"{row['instructions']:.1f}", str(row["registers"]), row["bound"], f"{row['predicted_ms']:.1f} ms"])
    return markdown(["kernel, Hopper (sm_90)", "instructions a pair", "registers", "bound by", "least time on an H200"], lines)


def _ms(row: Row | None) -> str:
    return "–" if row is None or "median_ms" not in row else _digits(row["median_ms"])


def _time_and_memory(row: Row | None) -> str:
    return "–" if row is None else f"{duration(row['median_ms'])}, {memory(row['peak_mib'])}"


# Accuracy and training


def accuracy(modes: Sequence[str] = ("highest", "ieee", "high", "medium", "cpu", "inductor"), *, all_bandwidths: bool = True) -> str:
    titles = {"cpu": "the CPU path", "inductor": 'the CPU path, `backend="inductor"`'}
    lines = []
    for mode in modes:
        rows = rows_of("accuracy", mode=mode)
        groups = [rows] * all_bandwidths + [[row for row in rows if row["bandwidth2"] == row["d"]]]
        worst = [f"{max(row[key] for row in group):.0e}" for group in groups for key in ("value", "gradient")]
        lines.append([titles.get(mode, f'"{mode}"'), *worst])
    head = ["value", "gradient"] * all_bandwidths + ["value, h² = D", "gradient, h² = D"]
    return markdown(["precision", *head], lines)


def training_mnist() -> str:
    columns = [rows_of("training", case=case)[-1] for case in ("mnist_vae", "mnist_mmd_vae")]
    measures: dict[str, Callable[[Row], str]] = {
        "test loss, nats an image": lambda row: f"{row['loss']:.2f}",
        "−log p(x\\|z)": lambda row: f"{row['reconstruction']:.2f}",
        "KL": lambda row: f"{row['kl']:.2f}",
        "mutual information": lambda row: f"{row['mutual_information']:.3f}",
        "active units, of 20": lambda row: f"{row['active_units']:.0f}",
        "q(z): smallest to largest std": lambda row: f"{row['marginal_std_min']:.2f} to {row['marginal_std_max']:.2f}",
        "q(z): largest mean in size": lambda row: f"{row['marginal_mean']:.3f}",
        "q(z): MMD² to N(0, I)": lambda row: f"{row['marginal_mmd']:.4f}",
    }
    return markdown(["", "VAE", "MMD-VAE, λ = 1000"], [[name, *map(measure, columns)] for name, measure in measures.items()])


def training_digits() -> str:
    columns = rows_of("training", case="compare")[-2:]
    measures = {
        "−log p(x\\|z), nats": "reconstruction",
        "KL(q(z\\|x) ‖ N(0, I)), nats": "kl",
        "mutual information I(x; z), nats": "mutual_information",
        "active units": "active_units",
        "q(z): smallest to largest std": "marginal_std",
        "q(z): MMD² to N(0, I)": "marginal_mmd",
    }
    lines = [[name, *(row[key].replace("-", "−") for row in columns)] for name, key in measures.items()]
    return markdown(["", "ELBO", "MMD-VAE, λ = 10"], lines)


# README


def readme_speed() -> str:
    names = ("fastvae", "eager", "torch.compile", "geomloss", "KeOps")

    lines = []
    for n in (128, 1024, 8192, 32768):
        found = {name: row for name, row in readme_cpu(n).items() if row["status"] == "ok"}
        cells = [f"{duration(found[name]['processor_ms'])}, {memory(found[name]['extra_mib'])}" if name in found else "–" for name in names]
        lines.append(["EPYC, 1 thread", f"{n:,}", *cells])
    graph = [gpu_row(512, 16, name + GRAPH) for name in names]
    lines.append(["H200, CUDA graph", "512", *(f"{_ms(row)} ms" if row else "–" for row in graph)])
    ours = [_time_and_memory(gpu_row(65536, 16, name)) for name in ("fastvae", "eager")]
    peers = [gpu_row(65536, 16, name, stage="peers") for name in ("geomloss", "KeOps")]
    lines.append(["H200", "65,536", *ours, "–", *("–" if row is None else duration(row["median_ms"]) for row in peers)])
    lines.append(["H200", "1,000,000", _time_and_memory(gpu_row(1000000, 16, "fastvae")), "–", "–", "–", "–"])
    return markdown(["", "N", *names], lines)


def readme_cpu(n: int) -> dict[str, Row]:
    """The CPU's rows of the README by provider, the newest of each."""
    rows = rows_of("mmd_cpu", n=n, direction="forward+backward", dim=16, bandwidths=1, threads=1, device="AMD EPYC")
    return {row["provider"]: row for row in rows}


TABLES: dict[str, Callable[[], str]] = {
    "README speed": readme_speed,
    "README accuracy": lambda: accuracy(("highest", "high", "medium", "cpu"), all_bandwidths=False),
    "mmd on a CPU, one thread": lambda: tables(8192, "AMD", 1, ["mmd"]),
    "mmd on a CPU, two threads": lambda: tables(8192, "AMD", 2, ["mmd"]),
    "reparameterize_kl on a CPU": lambda: tables(None, "AMD", None, ["reparameterize_kl"]),
    "moments on a CPU": moments,
    "small batches": small,
    "large samples": large,
    "second derivatives": second_derivatives,
    "mmd on a GPU": gpu_mmd,
    "large samples on a GPU": gpu_large,
    "peers on a GPU": gpu_peers,
    "other operations on a GPU": gpu_operations,
    "training steps on a GPU": gpu_training,
    "accuracy on a GPU": gpu_accuracy,
    "accuracy": accuracy,
    "compile report": compile_report,
    "training on MNIST": training_mnist,
    "training on digits": training_digits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing and end with 1 if a page is out of date")
    args = parser.parse_args()
    stale = {page: new for page in pages() if (new := rendered(old := page.read_text(encoding="utf-8"))) != old}
    for page, new in stale.items():
        print(page.relative_to(ROOT))
        if not args.check:
            page.write_text(new, encoding="utf-8")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    main()
