"""Limits on configurations, which may be untrusted, as they are shared with checkpoints and can name classes to import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import jsonargparse.typing
import torch
import yaml  # type: ignore[import-untyped]

# Packages of callbacks, loggers, strategies and their arguments. Denied are the command-line interfaces, which run what they are given, and
# LambdaCallback, which calls any function by its name.
KNOWN = ("fastvae", "lightning", "torch.nn", "torch.optim", "torch.distributed.fsdp", "torch.float16", "torch.bfloat16", "torch.float32")
DENIED = (
    "*",
    "lightning.fabric.cli",
    "lightning.pytorch.cli",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.callbacks.lambda_function",
)
# The longest of fastvae/configs has forty values, four deep.
MOST_VALUES, DEEPEST = 10_000, 32
PACKAGED = Path(__file__).parents[1] / "configs"
_jsonargparse_yaml = jsonargparse.get_loader("yaml")


def restrict(trusted: Sequence[str] = ()) -> None:
    """Lets configurations name only classes of fastvae, Lightning, PyTorch and these packages, and limits the size of their YAML."""
    jsonargparse.set_parsing_settings(
        import_path_denylist=list(DENIED), import_path_allowlist=[*KNOWN, *trusted], instantiate_subclass_spec_in_any=False
    )
    jsonargparse.set_loader("yaml", read_yaml, (yaml.YAMLError,))
    # Writes the defaults of Lightning's callbacks, some of which are subclasses of str, so that they can be read again.
    jsonargparse.set_dumper("yaml", lambda data: str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)))
    jsonargparse.typing.register_type(torch.device, fail_already_registered=False)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    pass


_Dumper.add_multi_representer(str, lambda dumper, value: dumper.represent_str(str.__str__(value)))


def with_packaged(args: Sequence[str]) -> list[str]:
    """Arguments of the command, where `--config mnist_vae` becomes the path of that configuration in the package."""
    found: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if found and found[-1] in ("--config", "-c"):
            arg = _packaged(arg)
        elif flag == "--config" and equals:
            arg = f"--config={_packaged(value)}"
        found.append(arg)
    return found


def _packaged(path: str) -> str:
    """The file at `path` if there is one, else the packaged one of that name: `NAME`, `NAME.yaml` or `configs/NAME.yaml`."""
    folder, name = os.path.split(path)
    file = PACKAGED / f"{name.removesuffix('.yaml')}.yaml"
    return str(file) if folder in ("", "configs") and not os.path.isfile(path) and os.path.isfile(file) else path


def check_config(path: str) -> dict[str, Any]:
    """The options in a configuration file, or in YAML text in braces.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, is not YAML or holds no named options; the message gives the line.
    """
    file = Path(path)
    spelt_out = path.lstrip().startswith("{")
    if not spelt_out and not file.is_file():
        names = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
        raise FileNotFoundError(f"config must be a file of YAML or one of {names}, got {path!r}, which is not there")
    try:
        options = read_yaml(path if spelt_out else file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"config must be a file of YAML, got {path!r}, which is not text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"config must be a file of YAML, got {path!r}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config must be a file of YAML, got {path!r}: {error}") from error
    if not isinstance(options, dict):
        found = f"the empty file {path!r}" if options in (None, "") else f"{type(options).__name__} in {path!r}"
        raise ValueError(f"config must hold options such as 'model: {{latent_dim: 6}}', got {found}")
    for name in ("model", "data", "trainer"):
        if not isinstance(options.get(name, {}), dict):
            raise ValueError(f"{name} must hold options such as '{name}: {{…}}', got {options[name]!r} in {path!r}")
    return options


def read_yaml(text: str) -> Any:
    """The plain values in YAML text, as jsonargparse reads it.

    Raises:
        yaml.YAMLError: The text is not YAML, has a Python tag, or holds too many values or too deep ones.
    """
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # unlike loading, parsing does not recurse
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"its values must be nested at most {DEEPEST} deep, got more")
    value = _jsonargparse_yaml(text)
    # Aliases count in full, as jsonargparse copies what they stand for.
    values, left = 0, [value]
    while left:
        values += 1
        if values > MOST_VALUES:
            raise yaml.YAMLError(f"it must hold at most {MOST_VALUES:,} values, including those of its aliases, got more")
        inner = left.pop()
        left += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
    return value
