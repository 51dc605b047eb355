"""The sources of prepared notes, part by part: synthetic worlds, CodiEsp, and plain tables."""

from __future__ import annotations

import csv as csv_rows
import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from hf_ehr.schema import EhrDataError, check_schema

from .folder import STORED_NOTE_SCHEMA
from .tables import LABEL_TABLE_SCHEMA, SPAN_TABLE_SCHEMA, check_note_labels, check_notes

NOTES_PER_PART = 1 << 12
BYTES_PER_SHARD = 1 << 27
"""Of text, aimed at by the default number of shards."""
BYTES_PER_SYNTHETIC_PATIENT = 8_000
_SUFFIXES = (".parquet", ".csv", ".csv.gz")
_CSV_BLOCK = 1 << 26  # a note must fit into a block


class NoteTables(NamedTuple):
    """Some notes, labels and spans, in no order; a label may come in another part than its note."""

    notes: pa.Table = STORED_NOTE_SCHEMA.empty_table()
    labels: pa.Table = LABEL_TABLE_SCHEMA.empty_table()
    spans: pa.Table = SPAN_TABLE_SCHEMA.empty_table()


@dataclass
class RawNotes:
    """A source.

    Attributes:
        parts: Its tables, read once.
        shards: Number of shards to write.
        total: Number of parts, where it is known.
        language: Of the texts, where it is known.
        time_axis: As in ``DatasetInfo``.
        warnings: What a reader of the data should know.
    """

    parts: Iterable[NoteTables]
    shards: int
    total: int | None = None
    language: str | None = None
    time_axis: str = "calendar"
    warnings: list[str] = field(default_factory=list)


def raw_notes(source: str, input_dir: Path | None, shards: int | None, options: dict[str, Any]) -> RawNotes:
    """Opens a source; see :func:`hf_ehr.notes.prepare_notes`."""
    reader = {"synthetic": _synthetic, "codiesp": _codiesp, "table": _tables}[source]
    return reader(input_dir, shards, **options)


def _synthetic(input_dir: Path | None, shards: int | None, **options: Any) -> RawNotes:
    from hf_ehr.sources.synthetic_notes import SyntheticNotesConfig, generate_notes

    known = [one.name for one in fields(SyntheticNotesConfig)]
    _check_options("synthetic", options, known)
    if input_dir is not None:
        raise ValueError(f"`input_dir` must be None for `synthetic`, got {input_dir}: nothing is read.")
    config = SyntheticNotesConfig(**options)
    count = shards or max(1, round(config.patients * BYTES_PER_SYNTHETIC_PATIENT / BYTES_PER_SHARD))
    worlds = (generate_notes(config, index, count) for index in range(count))
    parts = (NoteTables(_stored(one.notes), one.labels, one.spans) for one in worlds)
    return RawNotes(parts, count, count, "en")


def _codiesp(input_dir: Path | None, shards: int | None, **options: Any) -> RawNotes:
    _check_options("codiesp", options, ["language"])
    language = options.get("language", "es")
    raw = RawNotes((), shards or 1, 3, language, "order")
    raw.parts = _codiesp_parts(_given(input_dir), language, raw.warnings)
    return raw


def _codiesp_parts(path: Path, language: Any, warnings: list[str]) -> Iterator[NoteTables]:
    """Train, dev as test, and the uncoded background; a corpus without background is warned of."""
    from hf_ehr.sources.codiesp import read_codiesp

    splits: tuple[tuple[Any, str], ...] = (("train", "train"), ("dev", "test"), ("background", "unlabelled"))
    for part, split in splits:
        try:
            corpus = read_codiesp(path, part, language=language)
        except EhrDataError:
            if part != "background":
                raise
            warnings.append("No background part: there are no uncoded notes.")
            return
        if corpus.mismatched:
            warnings.append(f"{corpus.mismatched} annotations of {part} quote something else than the text there.")
        notes = corpus.notes.append_column("split", pa.repeat(split, corpus.notes.num_rows))
        yield NoteTables(_stored(notes), corpus.labels, corpus.spans)


def _tables(input_dir: Path | None, shards: int | None, **options: Any) -> RawNotes:
    _check_options("table", options, ["notes", "labels", "spans", "language"])
    files = {name: _files(input_dir, name, options.get(name)) for name in ("notes", "labels", "spans")}
    size = sum(path.stat().st_size * (1 if path.suffix == ".csv" else 3) for path in files["notes"])
    warnings = [] if files["spans"] else ["No spans: nothing to score evidence against."]
    count = shards or max(1, round(size / BYTES_PER_SHARD))
    return RawNotes(_table_parts(files), count, None, options.get("language"), warnings=warnings)


def _table_parts(files: dict[str, list[Path]]) -> Iterator[NoteTables]:
    for path in files["notes"]:
        for table in _batches(path, STORED_NOTE_SCHEMA):
            yield NoteTables(notes=_stored(table))
    for path in files["labels"]:
        for table in _batches(path, LABEL_TABLE_SCHEMA):
            yield NoteTables(labels=check_note_labels(table))
    for path in files["spans"]:
        for table in _batches(path, SPAN_TABLE_SCHEMA):
            yield NoteTables(spans=check_schema(table, SPAN_TABLE_SCHEMA, "SPANS"))


def _files(input_dir: Path | None, name: str, given: Any) -> list[Path]:
    """The files of a table; only SPANS may have none."""
    if given is not None:
        candidates = [Path(given) if input_dir is None else input_dir / given]
    elif input_dir is None and name == "spans":
        candidates = []
    else:
        candidates = [_given(input_dir) / f"{name}{suffix}" for suffix in ("", *_SUFFIXES)]
    place = next((path for path in candidates if path.exists()), None)
    if place is None and (given is not None or name != "spans"):
        raise EhrDataError(
            f"`{name}` must be a file or folder, and {candidates[-1]} does not exist. Name it in `options`."
        )
    if place is None or place.is_file():
        return [] if place is None else [place]
    return sorted(path for path in place.iterdir() if path.name.endswith(_SUFFIXES))


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The columns of ``schema`` that a file has, some rows at a time.

    A quote that is never closed makes the rest of a CSV file one text: with line breaks in texts it is no fault that
    can be told from a long note, unless the number of columns then is wrong.
    """
    if path.name.endswith(".parquet"):
        file = pq.ParquetFile(path)
        columns: list[str] | None = [name for name in file.schema_arrow.names if name in schema.names]
        if not {one.name for one in schema if not one.nullable and one.name != "provenance"} <= set(columns or ()):
            columns = None  # the check that names what lacks also says what is there
        yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(NOTES_PER_PART, columns=columns))
        return
    try:
        with csv.open_csv(
            path,
            csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False),  # one thread numbers the rows
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(column_types=schema),
        ) as reader:
            yield from (pa.Table.from_batches([batch]) for batch in reader)
    except pa.ArrowInvalid as error:
        message = str(error)
    else:
        return
    # Outside of the handler: the library's message quotes the row, and no traceback may carry it along.
    raise EhrDataError(f"{path.name} must be UTF-8 CSV as described: {_fault(message, path, schema)}")


def _fault(message: str, path: Path, schema: pa.Schema) -> str:
    """Row, column and rule of a message of Arrow's, without the text of the row."""
    row = re.search(r"\bRow #(\d+)", message)
    place = f"row {row[1]} (the header is row 1)" if row else "a row"
    counts = re.search(r"Expected (\d+) columns, got (\d+)", message)
    if counts:
        return f"{place} has {counts[2]} values under {counts[1]} names. Quote texts that hold a comma."
    number = re.search(r"^In CSV column #(\d+)", message)
    if number:
        name = _header(path)[int(number[1])]
        kind = schema.field(name).type if name in schema.names else "text"
        return f"{place} holds something else than {kind} in column `{name}`. Correct the value or the encoding."
    return "it is empty, a text lacks its closing quote, or a row exceeds 64 MiB. Export it again."


def _header(path: Path) -> list[str]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as stream:
        return next(csv_rows.reader(stream))


def _stored(notes: pa.Table) -> pa.Table:
    """NOTES with ``split``, null where the source says nothing."""
    checked = check_notes(notes)
    split = notes["split"].cast(pa.string()) if "split" in notes.column_names else pa.nulls(len(notes), pa.string())
    stated = pc.if_else(pc.equal(split, ""), pa.scalar(None, pa.string()), split)
    return checked.append_column(STORED_NOTE_SCHEMA.field("split"), stated)


def _given(input_dir: Path | None) -> Path:
    if input_dir is None:
        raise ValueError("`input_dir` must be the folder or file of the source, got None.")
    return input_dir


def _check_options(source: str, options: dict[str, Any], known: list[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"`options` of `{source}` must be among {', '.join(known)}, got {', '.join(unknown)}.")
