"""Processes forked from one that has imported what they need, as importing takes longer than their runs."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
_MODULES = ["fastvae.training.command", "matplotlib.pyplot", "pytest", "sklearn.datasets", "tensorboardX"]
context.set_forkserver_preload([*_MODULES, "torch._dynamo", "torch.distributed.fsdp"])


class Process:
    """Runs `function(*args)` in `folder`; what it and the processes that it starts write as errors is kept."""

    def __init__(self, folder: Path, function: Any, *args: Any) -> None:
        self.errors, errors = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(str(folder), errors, function, args))
        self.process.start()
        errors.close()

    def end(self) -> tuple[int | None, str]:
        """(exit status, what was written), once all of these processes have come to their end."""
        parts = [b""]
        while select.select([self.errors], [], [], 300)[0] and (part := os.read(self.errors.fileno(), 1 << 16)):
            parts.append(part)
        self.process.join(300)
        self.errors.close()
        return self.process.exitcode, b"".join(parts).decode()


def _run(folder: str, errors: Any, function: Any, args: tuple[Any, ...]) -> None:
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    errors.close()
    function(*args)


def fit(at: str, event: str, *args: str) -> None:
    """`fastvae` with `args`, and at a step, "step3" or "step3 of rank 1", a signal by its number, or "full disk"."""
    import torch

    from fastvae.training import command

    at, _, rank = at.partition(" of rank ")

    class RandomState(command.RandomState):
        def on_train_batch_start(self, trainer: Any, *others: Any) -> None:
            super().on_train_batch_start(trainer, *others)
            if f"step{trainer.global_step}" == at and rank in ("", str(trainer.global_rank)):
                if event == "full disk":
                    Path.open = lambda path, *mode: open("/dev/full", *mode)  # noqa: SIM115
                else:
                    os.kill(os.getpid(), int(event))

    command.RandomState = RandomState
    # Drawn by other tests.
    command.Pictures.on_train_end = lambda *_: None
    code = command.run(list(args))
    assert not torch.distributed.is_initialized()
    sys.exit(code)


def fit_on_several(at: str, event: str, *args: str) -> None:
    """The same on processes that Lightning starts with the script and the arguments of the first: this file."""
    sys.modules["__main__"].__spec__ = None
    sys.argv = [__file__, at, event, *args]
    fit(at, event, *args)


def start(folder: Path, *args: str, at: str = "never", event: str | int = signal.SIGKILL, several: bool = False) -> Process:
    """`fastvae fit` with `args`."""
    return Process(folder, fit_on_several if several else fit, at, str(event if isinstance(event, str) else int(event)), "fit", *args)


if __name__ == "__main__":
    # In the place of the folder of this file.
    sys.path[0] = str(Path(__file__).parent.parent)
    fit(*sys.argv[1:])
