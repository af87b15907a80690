"""Reads tables of numbers from text files (CSV or TSV, gzip or not) and Parquet files, with pandas."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
CHUNK = 2**20
MOST_LISTED = 5
# pandas' names of columns without a name, such as the index in the files that it writes.
UNNAMED = re.compile(r"(unnamed: \d+(\.\d+)*)?", re.IGNORECASE)
# Cells that mean a missing number: one in the first row does not make it a header.
MISSING = ("", "na", "n/a", "null", "none", "missing", "?", "-", "--", ".")


class Table(NamedTuple):
    """values (N, F) in float64; labels (N,), numbers (nan for none) or text; and the names of rows and columns, if there are any."""

    values: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any] | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def size(file: Path, at_most: int) -> int:
    """The size of a file in bytes, decompressed; if it is more than `at_most`, any larger number."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        metadata = read_metadata(file)
        return int(metadata.num_rows) * int(metadata.num_columns) * np.dtype(np.float64).itemsize
    if file.suffix != ".gz":
        return file.stat().st_size
    total = 0
    with open_bytes(file) as stream:
        while total <= at_most and (chunk := stream.read(CHUNK)):
            total += len(chunk)
    return total


def read(file: Path) -> Table:
    """The table in a file. A column "label" holds labels, and leading columns without a name hold the names of the rows.

    Raises:
        ValueError: A cell is not a number (the message gives its row and column), or the file is of another format.
    """
    import pandas as pd

    try:
        frame, names = _parquet(file) if file.suffix == ".parquet" else _text(file)
    except UnicodeError as error:
        raise ValueError("its text must be UTF-8, or UTF-16 with a byte order mark") from error
    n_unnamed = _n_unnamed(names)
    lower = [name.lower() for name in names]
    label = lower.index("label") if "label" in lower else None
    columns = [at for at in range(n_unnamed, frame.shape[1]) if at != label]
    if frame.empty or not columns:
        raise ValueError("no rows or no columns of numbers")
    try:
        values = frame.iloc[:, columns].to_numpy(np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(_first_text(frame, columns, names)) from error
    index = frame.iloc[:, 0] if n_unnamed else None if isinstance(frame.index, pd.RangeIndex) else frame.index
    labels = None if label is None else _labels(frame.iloc[:, label])
    return Table(
        values,
        labels,
        () if index is None else tuple(str(name).strip() for name in index),
        tuple(names[at] for at in columns) if names else (),
    )


def _n_unnamed(names: list[str]) -> int:
    return next((at for at, name in enumerate(names) if not UNNAMED.fullmatch(name)), 0)


def places(columns: tuple[str, ...], wanted: tuple[str, ...]) -> list[int] | None:
    """The indices of the wanted columns, or None if nothing has to move: the order is right, or table or model have no names.

    Raises:
        ValueError: The names differ, or they are in another order and some name occurs twice.
    """
    if not columns or not wanted or columns == wanted:
        return None
    missing, others = Counter(wanted) - Counter(columns), Counter(columns) - Counter(wanted)
    differences = [f"{what} {_listed(names)}" for what, names in (("without", missing), ("with", others)) if names]
    if not differences and len(set(wanted)) < len(wanted):
        differences = [f"with another order of columns that share a name, {_listed(Counter(wanted) - Counter(set(wanted)))}"]
    if differences:
        raise ValueError(f"data must have the columns that the model was trained on, by name, got data {' and '.join(differences)}")
    return [columns.index(name) for name in wanted]


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(map(repr, first[:MOST_LISTED])) + (f" and {len(first) - MOST_LISTED} others" if len(first) > MOST_LISTED else "")


def _labels(column: pd.Series[Any]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = column.to_numpy()
    if values.dtype.kind in "iuf":
        return values
    text = np.where(column.isna(), "", np.char.strip(values.astype(str)))
    return np.array([float(cell or "nan") for cell in text]) if all(not cell or is_number(cell) for cell in text) else text


def _first_text(frame: pd.DataFrame, columns: list[int], names: list[str]) -> str:
    for at in columns:
        for row, cell in enumerate(frame.iloc[:, at]):
            if not is_number(cell):
                column = f"column {names[at]!r}" if names else f"column {at + 1}"
                return f"{cell!r} in row {row + 1}, {column}: only a column named label may hold text"
    return "columns of another kind"


def _parquet(file: Path) -> tuple[pd.DataFrame, list[str]]:
    from pyarrow.parquet import ParquetFile

    frame: pd.DataFrame = ParquetFile(file).read().to_pandas()
    return frame, [str(name) for name in frame.columns]


def _text(file: Path) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    names, layout = _layout(file)
    dtypes = dict.fromkeys(range(_n_unnamed(names)), str)  # as numbers, names of rows would lose leading zeros
    with open_bytes(file) as stream:
        frame = pd.read_csv(stream, **layout, header=None, dtype=dtypes, na_filter=False, low_memory=False, skipinitialspace=True)
    if names and len(names) != frame.shape[1]:
        raise ValueError(f"{len(names)} names in its first row and {frame.shape[1]} columns below")
    return frame, names


def open_bytes(file: Path) -> IO[bytes]:
    """The file, decompressed if its name ends in .gz."""
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _layout(file: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a text file's columns, none without a header, and the options with which pandas reads the rows below."""
    with open_bytes(file) as stream:
        mark = stream.read(2)
    encoding = "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # utf-8-sig is UTF-8 with or without a byte order mark
    with open_bytes(file) as stream, io.TextIOWrapper(stream, encoding) as text:
        lines = list(itertools.islice(((number, line) for number, line in enumerate(text) if line.strip()), 2))
    if not lines:
        raise ValueError("it is empty")
    delimiter = next((mark for mark in "\t;" if mark in lines[0][1]), ",")
    decimal = "," if delimiter == ";" and "," in lines[-1][1] else "."
    rows = [[cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))] for _, line in lines]
    first, second = rows[0], rows[1] if len(rows) > 1 else []
    header = _is_header(first, second, decimal)
    _warn_of_guess(file, first, second, header)
    options = {"encoding": encoding, "sep": delimiter, "decimal": decimal, "skiprows": lines[0][0] + header}
    if not header:
        return [], options
    first[0] = first[0].lstrip("# ")  # numpy's savetxt starts a header with "# "
    # R writes no name above the names of the rows.
    return ["", *first] if len(second) == len(first) + 1 else first, options


def _is_header(first: list[str], second: list[str], decimal: str) -> bool:
    """Whether the first row is a header: it has a name above a number, the name "label", or pandas' default names 0, 1, 2, …

    A row of numbers and a class, or of numbers of which some are missing, is not a header.
    """
    below = second[1:] if len(second) == len(first) + 1 else second or ["0"] * len(first)
    for cell, under in zip(first, below, strict=False):
        if cell.lower() not in MISSING and not is_number(cell, decimal) and (cell.lower() == "label" or is_number(under, decimal)):
            return True
    counted = first[1:] if first[0] == "" else first
    return len(first) > 2 and counted == [str(k) for k in range(len(counted))]


def _warn_of_guess(file: Path, first: list[str], second: list[str], header: bool) -> None:
    """Warns of a first row of numbers that count up, such as 2019, 2020, … (names or data?), unless the second row continues it."""
    if not all(cell.isdecimal() for cell in first):
        return
    numbers = [int(cell) for cell in first]
    step = numbers[-1] - numbers[-2] if len(numbers) > 1 else 0
    counts = step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)) and (step == 1 or len(numbers) > 2)
    continues = second == [str(number + step * len(numbers)) for number in numbers]
    if header or (counts and second and not continues):
        shown = ", ".join(first[:3]) + (", …" if len(first) > 3 else "")
        taken, other = ("names", "is data, put a row of names before it") if header else ("data", "holds names, start them with a letter")
        warn(f"the first row of {file}, {shown}, is read as {taken}: if it {other}")


@rank_zero_only
def warn(sentence: str) -> None:
    """Writes a warning to stderr, in the first process only."""
    sys.stderr.write(f"warning: {sentence}\n")


def is_number(cell: Any, decimal: str = ".") -> bool:
    try:
        float(cell.replace(decimal, ".") if isinstance(cell, str) else cell)
    except (ValueError, TypeError):
        return False
    return True
