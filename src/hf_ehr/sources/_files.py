"""The files of raw tables: finding them, their header, damage, and errors that quote no patient data."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from hf_ehr.schema import EhrDataError

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


@overload
def find_table(input_dir: Path, name: str, *, folders: Sequence[str] = ("",)) -> Path: ...
@overload
def find_table(input_dir: Path, name: str, *, folders: Sequence[str] = ("",), required: bool) -> Path | None: ...
def find_table(input_dir: Path, name: str, *, folders: Sequence[str] = ("",), required: bool = True) -> Path | None:
    """The file of table ``name`` in ``input_dir`` or its subfolders ``folders``: any case, CSV, TSV or Parquet.

    Raises:
        EhrDataError: A required table is not there.
    """
    wanted = [f"{name}{suffix}".lower() for suffix in SUFFIXES] + [name.lower()]
    for folder in folders:
        directory = Path(input_dir) / folder
        if not directory.is_dir():
            continue
        found = {path.name.lower(): path for path in sorted(directory.iterdir())}
        for path in filter(None, map(found.get, wanted)):
            if path.is_file() or any(path.rglob("*.parquet")):
                return path
    if required:
        places = " or ".join(str(Path(input_dir) / folder) for folder in folders)
        raise EhrDataError(
            f"Table `{name}` is missing: looked in {places} for {', '.join(name + suffix for suffix in SUFFIXES)} "
            "(any case). Check `input_dir`."
        )
    return None


def check_gzip(path: Path) -> None:
    """Decompresses a gzip file without keeping it: a truncated one must not pass for a shorter table.

    Raises:
        EhrDataError: The file ends early or is damaged.
    """
    if path.suffix != ".gz":
        return
    try:
        with gzip.open(path) as stream:
            while stream.read(1 << 22):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise EhrDataError(
            f"{path} is a truncated or damaged gzip file ({error}). Copy or download it again."
        ) from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an engine's error about ``path`` into ours, without the line of patient data that engines quote."""
    try:
        yield
    except EhrDataError:
        raise
    except Exception as error:
        raise EhrDataError(f"{path} cannot be read: {_without_data(str(error))}") from None


def _without_data(message: str) -> str:
    line = re.search(r"Line: (\d+)", message)
    if line:
        rules = [
            text for text in message.splitlines() if text.startswith(("Expected", "Value with", "Invalid unicode"))
        ]
        return f"line {line.group(1)}: {rules[0] if rules else 'it does not fit the header.'}"
    # Engines put the value that they could not convert in quotes.
    return re.split(r"['\"]", message.splitlines()[0])[0][:200].strip() if message else "unknown error."


def first_line(path: Path, delimiter: str, header: bool) -> list[str]:
    """The column names of a CSV file, ``column0``, … without a header."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
        names = next(csv.reader(stream, delimiter=delimiter), [])
    if not names:
        raise EhrDataError(f"{path} is empty. Export the table again.")
    if not header:
        return [f"column{number}" for number in range(len(names))]
    folded = [name.strip().lower() for name in names]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    if twice:
        raise EhrDataError(f"{path} has the column `{twice[0]}` more than once. Rename or drop one.")
    return names


def parquet_files(path: Path) -> list[str]:
    files = sorted(str(part) for part in path.rglob("*.parquet")) if path.is_dir() else [str(path)]
    if not files:
        raise EhrDataError(f"{path} holds no Parquet file.")
    return files
