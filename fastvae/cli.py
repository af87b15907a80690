"""The entry point of the command `fastvae`, which answers simple calls without importing Lightning."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvae.version import __version__

FILE_COMMANDS = ("compare", "report", "sample", "reconstruct", "encode", "traverse", "export")


def main(args: Sequence[str] | None = None) -> None:
    """Runs `fastvae` with these arguments, or those of the process. A wrong argument, file or number gives one sentence on stderr."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        sys.stdout.write(f"fastvae {__version__}\n")
        return
    if wrong := misspelt(given):
        sys.stderr.write(f"error: {wrong} (see --help)\n")
        sys.exit(2)
    try:
        from fastvae.training.command import run
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        sys.exit(f'error: the package {error.name} must be installed for this command: pip install "fastvae-mmd[train]"')
    sys.exit(run(given))


def misspelt(args: list[str]) -> str | None:
    """An error sentence for an unknown command, or an unknown flag of data, model or trainer, found without importing Lightning."""
    commands = ("fit", "test", *FILE_COMMANDS)
    if not args or args[0].startswith("-"):
        return None
    if args[0] not in commands:
        return f"the command must be one of {', '.join(commands)}, got {args[0]!r}"
    training, lightning = Path(__file__).parent / "training", importlib.util.find_spec("lightning")
    sources = {"data": (training / "data.py", "ImageData"), "model": (training / "module.py", "ImageVAE")}
    for folder in (lightning.submodule_search_locations or ()) if lightning else ():
        sources["trainer"] = (Path(folder, "pytorch", "trainer", "trainer.py"), "Trainer")
    for arg in args[1:]:
        group, *option = arg.partition("=")[0].removeprefix("--").split(".")
        if option and arg.startswith("--") and group in sources and args[0] not in FILE_COMMANDS:
            known, name = _options(*sources[group]), option[0].removesuffix("+")
            if known and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f", did you mean --{group}.{near[0]}?" if near else ""
                return f"unrecognized arguments: {arg.partition('=')[0]}{hint}"
    return None


def _options(file: Path, name: str) -> list[str]:
    """The arguments of a class's constructor, found by parsing its file."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except OSError:
        return []
    found = [inner for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name for inner in node.body]
    inits = [inner.args for inner in found if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
    return [argument.arg for init in inits for argument in (*init.args, *init.kwonlyargs) if argument.arg != "self"]
