"""The error of MMD² and its gradient in every precision against float64, over dimensions, bandwidths and distances from the origin.

    python -m benchmarks.accuracy [--dim D ...] [--modes MODE ...]      rows in benchmarks/results/accuracy.jsonl
    python -m benchmarks.accuracy --tensor-core                         rows in benchmarks/results/accuracy_tensor_core.jsonl

Without a GPU the kernels run in Triton's interpreter, with TF32 operands cut as tensor cores cut them; it takes an hour. Rows replace those
of the same dimensions and modes.

--tensor-core predicts, in half a minute, the error of long sums in a tensor core's accumulator by the model of benchmarks/tensor_core.py.
Its rows replace all of that file.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.interpreter import emulate_tf32

    emulate_tf32()

import numpy as np  # noqa: E402, the interpreter must be chosen before Triton is imported

import fastvae  # noqa: E402
from benchmarks import tensor_core  # noqa: E402
from benchmarks.machine import commit  # noqa: E402
from benchmarks.rows import RESULTS  # noqa: E402
from fastvae import reference  # noqa: E402

PATH = RESULTS / "accuracy.jsonl"
MODES = ("cpu", "inductor", "highest", "ieee", "high", "medium")
DIMENSIONS = (2, 16, 64, 256, 1024)


def errors(mode: str, x: torch.Tensor, y: torch.Tensor, bandwidth: float) -> tuple[float, float]:
    """Relative errors of the biased MMD² and, in norm, of its gradient to x."""

    def run(function, x, y, **options):
        x = x.clone().requires_grad_()
        value = function(x, y, bandwidth=bandwidth, **options)
        return value.detach().double().cpu(), torch.autograd.grad(value, x)[0].double().cpu()

    on_cpu = mode in ("cpu", "inductor")
    options = {"backend": mode} if on_cpu else {"backend": "triton", "precision": mode}
    device = "cpu" if on_cpu else DEVICE
    value, grad = run(fastvae.mmd, x.to(device), y.to(device), **options)
    exact_value, exact_grad = run(reference.mmd, x.double(), y.double())
    # If the bandwidth is far below all distances, the exact gradient underflows to about zero.
    grad_error = (grad - exact_grad).norm() / exact_grad.norm() if exact_grad.norm() > 1e-20 else grad.norm()
    return ((value - exact_value).abs() / exact_value.abs()).item(), grad_error.item()


def rows_of(mode: str, dim: int) -> int:
    """One tile of the CPU path, or two where its loops are compiled and features are few; fewer rows in the interpreter, which is slow."""
    if mode in ("cpu", "inductor"):
        return 1024 if mode == "inductor" and dim < 64 else 512
    return 128 if dim < 64 else 64 if dim == 64 else 32


def samples(n: int, dim: int, squared_bandwidth: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(n, dim) + offset, 1.1 * torch.randn(n - n // 8, dim) + offset + 0.2
    # Some pairs are near, for the small bandwidths.
    y[: n // 4] = x[: n // 4] + 0.5 * (squared_bandwidth / dim) ** 0.5 * torch.randn(n // 4, dim)
    return x, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", choices=DIMENSIONS, default=DIMENSIONS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tensor-core", action="store_true")
    args = parser.parse_args()
    if args.tensor_core:
        with (RESULTS / "accuracy_tensor_core.jsonl").open("w") as file:
            for row in tensor_core.errors():
                line = json.dumps(row | {"commit": commit()})
                print(line, flush=True)
                file.write(line + "\n")
        return
    np.seterr(over="ignore", invalid="ignore")
    rows = []
    for dim in args.dim:
        for squared_bandwidth in (0.1, 1.0, float(dim)):
            for offset in (0.0, 1000.0):
                for mode in args.modes:
                    n = rows_of(mode, dim)
                    value, grad = errors(mode, *samples(n, dim, squared_bandwidth, offset), squared_bandwidth**0.5)
                    row = {"mode": mode, "d": dim, "bandwidth2": squared_bandwidth, "offset": offset, "value": value, "gradient": grad}
                    rows.append(row | {"n": n, "device": DEVICE, "torch": torch.__version__})
                    print(f"{dim:5d} h² {squared_bandwidth:7g} offset {offset:5g} {mode:8s} {value:8.1e} {grad:8.1e}", flush=True)
    if PATH.exists():
        known = map(json.loads, PATH.read_text().splitlines())
        rows += [row for row in known if row["d"] not in args.dim or row["mode"] not in args.modes]
    rows.sort(key=lambda row: (row["d"], row["bandwidth2"], row["offset"], MODES.index(row["mode"])))
    PATH.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
