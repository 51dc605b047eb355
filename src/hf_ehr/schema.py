"""The contracts of the road: EVENTS → RECORDS → LABELS, named once, checked at the boundary, trusted inside.

Times are naive, microsecond timestamps in the data's own clock. A code is ``VOCABULARY/CODE`` with OMOP vocabulary ids
and dotted ICD (``ICD10CM/E11.9``, ``ICD9CM/428.0``, ``ICD9Proc/39.95``, ``ATC/A10BA02``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TIMESTAMP = pa.timestamp("us")

KINDS = (
    "static", "birth", "admission", "diagnosis", "procedure", "medication", "measurement", "note", "discharge",
    "death",
)  # fmt: skip
VISIT_KINDS = ("inpatient", "emergency", "outpatient", "unknown")
DISPOSITIONS = ("home", "facility", "transfer", "hospice", "against_advice", "died", "unknown")
CODE_KINDS = ("diagnoses", "procedures", "medications")
"""The code lists of a visit; the event kind is the singular of the name."""

BIRTH_CODE = "MEDS_BIRTH"
DEATH_CODE = "MEDS_DEATH"
STATIC_FIELDS = {
    "Sex": "sex",
    "Race": "race",
    "Ethnicity": "ethnicity",
    "Language": "language",
    "Insurance": "insurance",
    "MaritalStatus": "marital_status",
}
"""Vocabulary of a ``static`` event → field of the RECORD (``Sex/F`` → ``sex="F"``)."""

EVENT_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("time", TIMESTAMP),  # null for `static`
        pa.field("code", pa.string(), nullable=False),
        pa.field("numeric_value", pa.float32()),  # admission: 1 planned, 0 unplanned, null unknown
        pa.field("text_value", pa.string()),  # note: the text; admission/discharge: the source's own wording
        pa.field("visit_id", pa.int64()),
        pa.field("stay_id", pa.int64()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("position", pa.int32()),  # priority within the visit and kind, principal first
        pa.field("available_at", TIMESTAMP),  # when a clinician could have known it; null → see records.assemble
    ]
)
"""MEDS columns first, then ours. One row per event, shards of whole patients."""

MEASUREMENT = pa.struct(
    [
        pa.field("hour", pa.float32()),  # relative to the stay's start
        pa.field("name", pa.string()),
        pa.field("value", pa.float32()),
        pa.field("text", pa.string()),
    ]
)
STAY = pa.struct(
    [
        pa.field("stay_id", pa.int64()),
        pa.field("start", TIMESTAMP),
        pa.field("end", TIMESTAMP),
        pa.field("measurements", pa.list_(MEASUREMENT)),
    ]
)
NOTE = pa.struct([pa.field("time", TIMESTAMP), pa.field("category", pa.string()), pa.field("text", pa.string())])
VISIT = pa.struct(
    [
        pa.field("visit_id", pa.int64()),
        pa.field("start", TIMESTAMP),
        pa.field("end", TIMESTAMP),
        pa.field("kind", pa.string()),
        pa.field("planned", pa.bool_()),
        pa.field("discharged_to", pa.string()),
        *(pa.field(kind, pa.list_(pa.string())) for kind in CODE_KINDS),
        *(pa.field(f"{kind}_at", pa.list_(TIMESTAMP)) for kind in CODE_KINDS),  # available_at, code by code
        pa.field("notes", pa.list_(NOTE)),
        pa.field("stays", pa.list_(STAY)),
    ]
)
RECORD_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("birth_time", TIMESTAMP),
        pa.field("death_time", TIMESTAMP),
        *(pa.field(name, pa.string()) for name in STATIC_FIELDS.values()),
        pa.field("visits", pa.list_(VISIT), nullable=False),
    ]
)
"""One row per patient: visits by start, codes in priority order without duplicates, measurements by hour."""

LABEL_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("prediction_time", TIMESTAMP, nullable=False),
        pa.field("boolean_value", pa.bool_()),
        pa.field("integer_value", pa.int64()),
        pa.field("float_value", pa.float64()),
        pa.field("categorical_value", pa.string()),
        pa.field("codes", pa.list_(pa.string())),
    ]
)
"""The MEDS label schema plus ``codes`` for multi-label tasks; exactly one value column is set in a row."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64()),  # 1 is the first data row; null where the engine cannot number rows
        pa.field("column", pa.string()),
        pa.field("value", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""``rejected.parquet``: every input row that did not become an event, with the rule it broke."""


class EhrDataError(ValueError):
    """Input that breaks a contract: the message names the field, the rule, the value and the next step."""


@dataclass
class DatasetInfo:
    """``dataset.json`` of a prepared folder: where it came from and what it holds.

    Attributes:
        source: Name of the source, e.g. ``mimic3``.
        options: The options it was read with.
        shards: Number of shards, ``subject_id % shards`` decides where a patient lives.
        time_axis: ``calendar`` (true dates), ``shifted`` (dates moved per patient: no calendar comparison between
            patients, rule L12), ``visit`` (true within a visit only: the distance of a patient's visits is made up,
            and so may be their order) or ``order`` (only the order of visits is known: intervals are meaningless).
        summary: Patients, visits, events and codes, date range, rejected rows by reason.
        warnings: What a reader of the data should know, e.g. a table the source did without.
    """

    source: str
    options: dict = field(default_factory=dict)
    shards: int = 1
    time_axis: str = "calendar"
    summary: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def save(self, directory: str | Path) -> None:
        """Writes ``dataset.json``; its presence says that the folder is whole."""
        with atomic_path(Path(directory) / "dataset.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> DatasetInfo:
        """Reads ``dataset.json``.

        Raises:
            EhrDataError: The folder has none, so its preparation did not finish.
        """
        path = Path(directory) / "dataset.json"
        if not path.is_file():
            raise EhrDataError(
                f"{path} is missing: `{directory}` is no prepared data set, or its preparation did not finish. "
                "Run `hf-ehr prepare SOURCE --input DIR --output DIR` (it resumes where it stopped)."
            )
        return cls(**json.loads(path.read_text()))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path`` and renames it on success: half-written is never mistaken for whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """``atomic_path`` for a folder: yields an empty one and renames it on success; the folder must not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        yield whole
        whole.replace(path)


def write_parquet(table: pa.Table, path: str | Path) -> None:
    """Writes ``table`` to ``path`` in one step (temporary name, then rename)."""
    with atomic_path(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def shard_paths(directory: str | Path, arrow: str) -> list[Path]:
    """The Parquet shards of ``arrow`` (``events`` or ``records``) in a prepared folder, in order.

    Raises:
        EhrDataError: There are none.
    """
    paths = sorted((Path(directory) / arrow).glob("shard-*.parquet"))
    if not paths:
        raise EhrDataError(
            f"No `{arrow}` shards in {directory}. Run `hf-ehr prepare SOURCE --output {directory}` first."
        )
    return paths


def shard_name(index: int, shards: int) -> str:
    """``shard-00003-of-00016.parquet``."""
    return f"shard-{index:05d}-of-{shards:05d}.parquet"


def check_schema(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """``table`` with exactly the columns of ``schema``, cast where that loses nothing.

    Raises:
        EhrDataError: A column is missing, has another type, or holds a null where none is allowed.
    """
    columns = []
    for expected in schema:
        if expected.name not in table.column_names:
            raise EhrDataError(
                f"{name} lacks the column `{expected.name}` ({expected.type}). Columns found: {table.column_names}."
            )
        column = table[expected.name]
        if column.type != expected.type:
            given, column = column, _cast(column, expected.type)
            if column is None:
                raise EhrDataError(
                    f"{name} column `{expected.name}` must be {expected.type}, got {given.type}; row "
                    f"{_first_uncastable(given, expected.type)} cannot be converted. Correct it or cast the column."
                )
        if not expected.nullable and column.null_count:
            raise EhrDataError(f"{name} column `{expected.name}` must not be null; {column.null_count} rows are.")
        columns.append(column)
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    """``column`` as ``kind``, or None: the library's error quotes a patient's value, so it does not leave here."""
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _first_uncastable(column: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Number of the first row that is no ``kind``; 0 where none is."""
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        whole = _cast(column.slice(low, middle - low), kind) is not None
        low, high = (middle, high) if whole else (low, middle)
    return low


def validate_events(events: pa.Table) -> pa.Table:
    """Checks EVENTS and returns them in the contract's column order and types.

    Raises:
        EhrDataError: With the column, the rule and the number of the first offending row.
    """
    events = check_schema(events, EVENT_SCHEMA, "EVENTS")
    _check_rows(events, pc.is_in(events["kind"], pa.array(KINDS)), "kind", f"must be one of {', '.join(KINDS)}")
    timed = pc.or_(pc.equal(events["kind"], "static"), pc.is_valid(events["time"]))
    _check_rows(events, timed, "time", "must be set for every kind but `static`")
    named = pc.or_(
        pc.match_substring_regex(events["code"], r"^[^/\s]+/\S+"),
        pc.is_in(events["code"], pa.array([BIRTH_CODE, DEATH_CODE])),
    )
    _check_rows(events, named, "code", "must be VOCABULARY/CODE")
    return events


def validate_labels(labels: pa.Table) -> pa.Table:
    """Checks LABELS; columns a label file leaves out are filled with nulls (files that ACES writes are read as is).

    Raises:
        EhrDataError: A row has no value, or a required column is missing.
    """
    for optional in LABEL_SCHEMA:
        if optional.nullable and optional.name not in labels.column_names:
            labels = labels.append_column(optional, pa.nulls(labels.num_rows, optional.type))
    labels = check_schema(labels, LABEL_SCHEMA, "LABELS")
    has_value = pc.is_valid(labels["codes"])
    for name in ("boolean_value", "integer_value", "float_value", "categorical_value"):
        has_value = pc.or_(has_value, pc.is_valid(labels[name]))
    _check_rows(labels, has_value, "boolean_value", "or another value column must be set")
    return labels


def _check_rows(table: pa.Table, valid: pa.ChunkedArray, column: str, rule: str) -> None:
    """Raises for the first row where ``valid`` is not true. Its number is named: a value may be a patient's."""
    bad = pc.indices_nonzero(pc.invert(pc.fill_null(valid, False)))
    if len(bad):
        row = bad[0].as_py()
        raise EhrDataError(
            f"Column `{column}` {rule}; row {row} breaks this ({len(bad)} rows in all). Correct them in the source."
        )
