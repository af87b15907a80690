"""The command `fastvae`: fit and test on Lightning's own command line, and compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run `fastvae` with the arguments given, or those of the process. A bad argument, file or number ends in one sentence on stderr."""
    try:
        from fastvae.training.command import run
    except ModuleNotFoundError as error:
        sys.exit(f'error: the command needs the package {error.name}, which is not installed: pip install "fastvae-mmd[train]"')
    sys.exit(run(list(sys.argv[1:] if args is None else args)))
