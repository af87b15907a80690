"""A loss computed in several ways, with and without its gradient: as a command that appends rows, and as a microbenchmark of pytest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.machine import conditions
from benchmarks.measure import DEVICE, summaries, synchronize
from benchmarks.rows import RESULTS, append

Provider = Callable[..., Tensor]


@dataclass(frozen=True)
class Comparison:
    """The loss, its providers and its sizes.

    Attributes:
        benchmark: the name in the rows.
        providers: each computes the loss from the arguments that `arguments` makes.
        exact: for each provider that is checked the formula that is evaluated in float64.
        arguments: the tensors that get a gradient and the other arguments, on the CPU, of a size.
        columns: the names of the numbers of a size in the rows, the number of rows first.
        sizes: those of the command.
        microbenchmarks: the first of these that pytest times.
        file: rows go to <file>_<device>.jsonl; `benchmark` by default.
        constants: other columns of each row.
        rounds: the most rounds, by default.
        checked_rows: values are checked with so many rows at most.
        tolerance: the largest relative error of a value; that of a gradient is 1e-4.
        largest_dense: with more rows the first provider alone runs, once, with its gradient.
        gradient_error: of a size above `largest_dense`, from the tensors, the other arguments and the gradient of the first tensor.
    """

    benchmark: str
    providers: dict[str, Provider]
    exact: dict[str, Provider]
    arguments: Callable[..., tuple[list[Tensor], list[Any]]]
    columns: tuple[str, ...]
    sizes: list[tuple[int, ...]]
    microbenchmarks: int | None = None
    file: str | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    rounds: int = 10
    checked_rows: int = 512
    tolerance: float = 1e-5
    largest_dense: int = sys.maxsize
    gradient_error: Callable[..., float] | None = None

    def status(self, provider: str, size: tuple[int, ...]) -> str:
        """ "ok", or what is wrong with the value or the gradient."""
        if provider not in self.exact:
            return "ok"
        leaves, others = self._on_device((min(size[0], self.checked_rows), *size[1:]), True)
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        exact, exact_grads = step(self.exact[provider], doubles, [_double(value) for value in others])
        value, grads = step(self.providers[provider], leaves, others)
        if not abs(value.double() - exact).item() <= self.tolerance * abs(exact).item():
            return f"wrong value: {value.item()} for {exact.item()}"
        errors = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(grads, exact_grads, strict=True)]
        return "ok" if all(error < 1e-4 for error in errors) else f"wrong gradient: {max(errors):.1e}"

    def microbenchmark(self) -> Callable[..., None]:
        """The test function that pytest times."""

        @pytest.mark.parametrize("provider", list(self.providers))
        @pytest.mark.parametrize("gradient", [False, True], ids=["value", "value and gradient"])
        @pytest.mark.parametrize("size", self.sizes[: self.microbenchmarks], ids=str)
        def test(benchmark: Any, provider: str, gradient: bool, size: tuple[int, ...]) -> None:
            assert self.status(provider, size) == "ok"
            leaves, others = self._on_device(size, gradient)

            def run() -> None:
                step(self.providers[provider], leaves, others)
                synchronize(DEVICE)

            benchmark(run)

        return test

    def main(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        form = "×".join(self.columns)
        parser.add_argument("--sizes", nargs="+", help=f"{form}, as {'x'.join(map(str, self.sizes[0]))}; by default those of the rows")
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--seconds", type=float, default=20.0, help="of one case; it has three rounds at least")
        parser.add_argument("--threads", type=int, default=1)
        args = parser.parse_args()
        torch.set_num_threads(args.threads)
        common = conditions(DEVICE)
        for size in [tuple(map(int, size.split("x"))) for size in args.sizes] if args.sizes else self.sizes:
            for row in self.rows(size, args.rounds, args.seconds):
                print(json.dumps(row), flush=True)
                append(RESULTS / f"{self.file or self.benchmark}_{DEVICE}.jsonl", row | common)

    def rows(self, size: tuple[int, ...], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
        """A row for each provider, with and without the gradient."""
        alone = size[0] > self.largest_dense
        names = list(self.providers)[: 1 if alone else None]
        status = {name: self.status(name, size) for name in names}
        for direction in ("forward", "forward+backward")[alone:]:
            leaves, others = self._on_device(size, direction != "forward")
            steps = {name: partial(step, self.providers[name], leaves, others) for name in names if status[name] == "ok"}
            found = summaries(steps, DEVICE, 1 if alone else rounds, seconds, memory=True)
            for name in names:
                row = {"benchmark": self.benchmark, "direction": direction, **dict(zip(self.columns, size, strict=True))}
                row |= {**self.constants, "dtype": "float32", "provider": name, "status": status[name], **found.get(name, {})}
                if alone and self.gradient_error is not None:
                    gradient = step(self.providers[name], leaves, others)[1][0]
                    row["gradient_relative_error"] = self.gradient_error(leaves, others, gradient)
                yield row

    def _on_device(self, size: tuple[int, ...], gradient: bool) -> tuple[list[Tensor], list[Any]]:
        leaves, others = self.arguments(*size)
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in others]
        return [t.to(DEVICE).requires_grad_(gradient) for t in leaves], moved


def step(provider: Provider, leaves: list[Tensor], others: list[Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value, and the gradients if they are wanted."""
    value = provider(*leaves, *others)
    return value.detach(), torch.autograd.grad(value, leaves) if leaves[0].requires_grad else ()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
