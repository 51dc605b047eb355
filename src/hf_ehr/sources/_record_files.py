"""One small text file per record, in folders or archives → one Parquet of their lines, which an engine can scan."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hf_ehr.schema import EhrDataError, atomic_path
from hf_ehr.sources._files import readable
from hf_ehr.sources._table_cells import FILE
from hf_ehr.sources.engine import Engine

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_BATCH = 8_000_000
"""Characters of text split into lines at a time."""


class Line(NamedTuple):
    """Names of the columns that every line carries beside those of its file."""

    record: str = "_record"  # number in the file's name
    group: str = "_group"  # folder or archive that the file came from
    number: str = "_line"  # 1 is the first below the header
    fields: str = "_fields"  # how many fields it has
    repeated: str = "_repeated"  # whether an earlier file has the same record


LINE = Line()


def is_archive(path: Path) -> bool:
    """Whether the name is that of a tar archive."""
    return path.name.endswith(ARCHIVES)


def gather_lines(engine: Engine, holders: Sequence[Path], pattern: str, delimiter: str) -> Path:
    """The lines of all record files as text, in a Parquet file in the engine's folder.

    A file without lines below its header gives one line of nulls, so that no record is lost. Memory is that of a few
    megabytes of text. Done once for the same files: a resumed preparation finds the Parquet again.

    Args:
        engine: The engine whose folder keeps the Parquet.
        holders: Folders (with their subfolders) and tar archives.
        pattern: Regular expression of the files' names; its first group is the record's number.
        delimiter: What separates the fields.

    Returns:
        Path of a Parquet with the columns of the files' common header (text), those of ``LINE`` and ``_file``.

    Raises:
        EhrDataError: No file matches, an archive is damaged, or a file is empty or has another header than the others.
    """
    # A folder's own size and time change with the files in it, not with their text: those are looked at one by one.
    paths = [path for holder in holders for path in (sorted(holder.rglob("*")) if holder.is_dir() else [holder])]
    asked = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    name = hashlib.sha256(repr((asked, pattern, delimiter)).encode()).hexdigest()[:16]
    folder = engine.folder if isinstance(engine.folder, Path) else Path(engine.folder.name)
    kept = folder / f"records-{name}.parquet"
    if not kept.exists():
        with atomic_path(kept) as temporary:
            _write(temporary, _frames(holders, re.compile(pattern), delimiter), holders, pattern)
    return kept


def _write(path: Path, frames: Iterable[pa.Table], holders: Sequence[Path], pattern: str) -> None:
    writer = None
    for table in frames:
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is None:
        places = ", ".join(map(str, holders)) or "it"
        raise EhrDataError(f"`input_dir` must hold files named like `{pattern}`; {places} has none.")
    writer.close()


def _frames(holders: Sequence[Path], pattern: re.Pattern, delimiter: str) -> Iterator[pa.Table]:
    header: str | None = None
    seen: set[int] = set()
    batch: list[tuple] = []
    for group, name, text in _texts(holders, pattern):
        first, _, body = text.lstrip("\ufeff").replace("\r", "").partition("\n")
        header = header or first.strip()
        if not header or first.strip() != header:
            raise EhrDataError(
                f"{name} must begin with the header of the other files, got "
                f"{'an empty file' if not text.strip() else 'another first line'}. Copy or download it again."
            )
        record = int(pattern.fullmatch(Path(name).name)[1])  # type: ignore[index]
        batch.append((name, group, record, record in seen, body.strip("\n")))
        seen.add(record)
        if sum(len(row[-1]) for row in batch[-1000:]) > _BATCH or len(batch) >= 1000:
            yield _lines(batch, header.split(delimiter), delimiter)
            batch = []
    if batch and header:
        yield _lines(batch, header.split(delimiter), delimiter)


def _texts(holders: Sequence[Path], pattern: re.Pattern) -> Iterator[tuple[str, str, str]]:
    """(name of the holder, name of the file in it, its text) of every file that matches."""
    for holder in holders:
        if holder.is_dir():
            for path in sorted(holder.rglob("*")):
                if path.is_file() and pattern.fullmatch(path.name):
                    yield holder.name, str(path.relative_to(holder.parent)), path.read_text(errors="replace")
            continue
        with readable(holder), tarfile.open(holder) as archive:
            for member in archive:
                if member.isfile() and pattern.fullmatch(Path(member.name).name):
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    yield holder.name.split(".")[0], member.name, content.decode(errors="replace")


def _lines(batch: list[tuple], header: list[str], delimiter: str) -> pa.Table:
    """One row per line that is not blank, split into the fields of the header."""
    schema = {FILE: pl.String, LINE.group: pl.String, LINE.record: pl.Int64, LINE.repeated: pl.Boolean}
    frame = pl.DataFrame(batch, schema=schema | {"text": pl.String}, orient="row")
    frame = frame.with_columns(pl.col("text").str.split("\n"))
    frame = frame.with_columns(pl.int_ranges(1, pl.col("text").list.len() + 1).alias(LINE.number))
    frame = frame.explode("text", LINE.number)
    frame = frame.filter((pl.col("text").str.strip_chars() != "") | (pl.col(LINE.number) == 1))
    fields = pl.col("text").str.split_exact(delimiter, len(header) - 1).struct.rename_fields(header)
    count = pl.col("text").str.count_matches(delimiter, literal=True).cast(pl.Int64) + 1
    table = frame.with_columns(fields.alias("cells"), count.alias(LINE.fields)).drop("text").unnest("cells").to_arrow()
    return table.cast(pa.schema([(name, _plain(table.schema.field(name).type)) for name in table.column_names]))


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind
