"""The plain tables of coded notes: NOTES, LABELS, SPANS, and SEGMENTS made from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from hf_ehr.schema import TIMESTAMP, check_schema

NOTE_TABLE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("visit_id", pa.int64()),
        pa.field("time", TIMESTAMP),
        pa.field("category", pa.string()),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""One row per note. Only ``note_id``, ``subject_id`` and ``text`` are needed; the others may be left out."""

LABEL_TABLE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("provenance", pa.string(), nullable=False),
    ]
)
"""One row per note and code. ``provenance`` is ``native`` (coded for this note) or ``imputed`` (carried over)."""

EVIDENCE_KINDS = ("term", "synonym", "abbreviation", "misspelling", "sign", "annotated")
"""Kinds of a span that supports its code; ``annotated`` is a human's, who did not say which."""
DISTRACTOR_KINDS = ("negated", "family", "ruled_out", "historical", "sibling")
"""Kinds of a span that names a code which the note must not get for it."""

SPAN_TABLE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
    ]
)
"""Character spans ``[start, end)`` of the note's original text."""

SEGMENT_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),  # 0, 1, ... within the note
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("starts", pa.list_(pa.int32()), nullable=False),  # characters of the original text
        pa.field("ends", pa.list_(pa.int32()), nullable=False),
    ]
)
"""One row per window of tokens. ``starts`` and ``ends`` are as long as ``input_ids``, -1 at special tokens."""

Notes: TypeAlias = pa.Table | Iterable[str | Path]
"""NOTES in memory, or the paths of Parquet shards."""


def check_notes(notes: pa.Table) -> pa.Table:
    """NOTES in the contract's columns; optional ones that are missing are filled with nulls.

    Raises:
        EhrDataError: ``note_id``, ``subject_id`` or ``text`` is missing, null, or of another type.
    """
    check_schema(notes.slice(0, 0), pa.schema([f for f in NOTE_TABLE_SCHEMA if not f.nullable]), "NOTES")
    for optional in NOTE_TABLE_SCHEMA:
        if optional.nullable and optional.name not in notes.column_names:
            notes = notes.append_column(optional, pa.nulls(notes.num_rows, optional.type))
    return check_schema(notes, NOTE_TABLE_SCHEMA, "NOTES")


def check_note_labels(labels: pa.Table) -> pa.Table:
    """LABELS of notes in the contract's columns; without ``provenance`` all are ``native``.

    Raises:
        EhrDataError: ``note_id`` or ``code`` is missing, null, or of another type.
    """
    if "provenance" not in labels.column_names:
        labels = labels.append_column("provenance", pa.repeat("native", labels.num_rows))
    return check_schema(labels, LABEL_TABLE_SCHEMA, "LABELS")


def note_tables(notes: Notes) -> Iterator[pa.Table]:
    """NOTES shard by shard."""
    for part in [notes] if isinstance(notes, pa.Table) else notes:
        yield check_notes(part if isinstance(part, pa.Table) else pq.read_table(part))
