"""Codes of notes: which are predicted, and which are carried over from a patient's other notes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from hf_ehr.ontology import chronic
from hf_ehr.schema import EhrDataError

from .folder import id_array
from .tables import LABEL_TABLE_SCHEMA, check_note_labels, check_notes

ImputationMode = Literal["none", "paper", "as_of"]


def frequent_codes(labels: pa.Table, *, note_ids: Any, more_than: int = 1_000) -> list[str]:
    """The codes of more than ``more_than`` training notes, most frequent first (BERT-XML: > 1,000, 2,292 codes).

    Args:
        labels: LABELS of notes.
        note_ids: The training notes, no others.
        more_than: A code of exactly this many notes is left out.

    Raises:
        EhrDataError: No code is that frequent.
    """
    labels = check_note_labels(labels)
    train = labels.filter(pc.is_in(labels["note_id"], value_set=id_array(note_ids)))
    counts = pl.DataFrame(train.select(["note_id", "code"])).unique().group_by("code").len()
    kept = counts.filter(pl.col("len") > more_than).sort(["len", "code"], descending=[True, False])
    if kept.is_empty():
        most = max(counts["len"], default=0)
        if not most:
            raise EhrDataError("LABELS must hold codes of the training notes, and hold none. Give the notes' codes.")
        raise EhrDataError(f"`more_than` must be below {most}, the notes of the most frequent code; got {more_than}.")
    return kept["code"].to_list()


def keep_codes(labels: pa.Table, codes: Collection[str]) -> pa.Table:
    """The LABELS whose code is in scope. Notes are not touched: one without codes in scope is an all-zero example."""
    labels = check_note_labels(labels)
    return labels.filter(pc.is_in(labels["code"], value_set=id_array(codes)))


def imputed_cells(labels: pa.Table, note_ids: Any, codes: Sequence[str]) -> sparse.csr_array:
    """Which of the true codes of notes were carried over alone, and not coded for the note (L10).

    Args:
        labels: LABELS; a code that a note has both ways is native.
        note_ids: The notes, one row each.
        codes: The codes in scope, one column each.

    Returns:
        0/1, ``(notes, codes)``.
    """
    given = pl.DataFrame(check_note_labels(labels).select(LABEL_TABLE_SCHEMA.names))
    carried = given.group_by("note_id", "code").agg((pl.col("provenance") == "imputed").all()).filter("provenance")
    rows = pl.DataFrame({"note_id": pl.Series(list(note_ids), dtype=pl.String)}).with_row_index("row")
    columns = pl.DataFrame({"code": pl.Series(list(codes), dtype=pl.String)}).with_row_index("column")
    cells = carried.join(rows, on="note_id").join(columns, on="code")
    places = cells["row"].to_numpy(), cells["column"].to_numpy()
    return sparse.csr_array((np.ones(len(cells), np.int8), places), (len(rows), len(columns)))


def label_ids(notes: pa.Table, labels: pa.Table, codes: Sequence[str]) -> pa.ListArray:
    """For every note the positions of its codes in ``codes``, ascending; an empty list where it has none in scope.

    Args:
        notes: NOTES, one list per row.
        labels: LABELS; codes out of scope and labels of other notes are passed over.
        codes: The codes in scope; the position is the label id.

    Returns:
        ``(notes,)`` lists of int32.

    Raises:
        ValueError: A code is listed twice.
        EhrDataError: A ``note_id`` occurs twice.
    """
    if len(set(codes)) < len(codes):
        raise ValueError("`codes` must not repeat a code: the position of a code is its label id.")
    note_ids = check_notes(notes)["note_id"].combine_chunks()
    if pc.count_distinct(note_ids).as_py() < len(note_ids):
        raise EhrDataError("NOTES column `note_id` must name each note once, and one occurs twice. Remove copies.")
    labels = check_note_labels(labels)
    note = pc.index_in(labels["note_id"], value_set=note_ids)
    code = pc.index_in(labels["code"], value_set=id_array(codes))
    known = pc.and_(pc.is_valid(note), pc.is_valid(code))
    row, label = (column.filter(known).to_numpy().astype(np.int64) for column in (note, code))
    row, label = np.divmod(np.unique(row * len(codes) + label), max(1, len(codes)))
    offsets = np.concatenate([[0], np.bincount(row, minlength=len(note_ids)).cumsum()])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(label, pa.int32()))


def impute_chronic_codes(
    labels: pa.Table,
    notes: pa.Table,
    *,
    mode: ImputationMode = "none",
    chronic_codes: Collection[str] | None = None,
) -> pa.Table:
    """Carries a chronic code that a patient has at two encounters over to the patient's other notes (BERT-XML, §3.1).

    An encounter is a ``visit_id``, or a note by itself where it has none. Only native labels are counted. ``paper``
    puts the code on all notes since the first encounter, so the label of an early note hangs on a later visit (rule
    L10): a retrospective coding label, never a prognostic one. ``as_of`` uses what was known: it puts the code on the
    notes behind the start of the second encounter.

    Args:
        labels: LABELS of notes.
        notes: NOTES with ``time``.
        mode: ``none`` returns ``labels`` as they are.
        chronic_codes: Codes to carry over; by default those that AHRQ's indicator calls chronic.

    Returns:
        LABELS: those given, then the new ones with ``provenance`` ``imputed``, sorted by note and code. Score the two
        kinds apart: an imputed code may have no evidence in its note.

    Raises:
        ValueError: ``mode`` is none of the three.
        EhrDataError: A note has no ``time``, or a label names a note that is not there.
    """
    if mode not in get_args(ImputationMode):
        raise ValueError(f"`mode` must be one of {', '.join(get_args(ImputationMode))}, got {mode!r}.")
    labels = check_note_labels(labels)
    if mode == "none":
        return labels
    notes = check_notes(notes)
    if notes["time"].null_count:
        raise EhrDataError(
            f"NOTES column `time` must be set to impute chronic codes; {notes['time'].null_count} notes have none."
        )
    if not pc.all(pc.is_in(labels["note_id"], value_set=notes["note_id"].combine_chunks()), min_count=0).as_py():
        raise EhrDataError("LABELS column `note_id` must name notes of NOTES, and some do not. Give all the notes.")
    timeline = pl.DataFrame(notes.select(["note_id", "subject_id", "visit_id", "time"]))
    given = pl.DataFrame(labels)
    carried = _carried_since(given, timeline, mode, chronic_codes)
    reached = pl.col("time") >= pl.col("since") if mode == "paper" else pl.col("time") > pl.col("since")
    new = (
        timeline.join(carried, on="subject_id")
        .filter(reached)
        .join(given, on=["note_id", "code"], how="anti")
        .select("note_id", "code", pl.lit("imputed").alias("provenance"))
        .sort("note_id", "code")
    )
    return pl.concat([given, new]).to_arrow().cast(LABEL_TABLE_SCHEMA)


def _carried_since(
    labels: pl.DataFrame, timeline: pl.DataFrame, mode: str, chronic_codes: Collection[str] | None
) -> pl.DataFrame:
    """``subject_id``, ``code``, ``since``: start of the first (``paper``) or second encounter."""
    native = labels.filter(pl.col("provenance") == "native")
    distinct = native["code"].unique().sort().to_list()
    wanted = set(chronic_codes) if chronic_codes is not None else _chronic(distinct)
    seen = native.filter(pl.col("code").is_in(list(wanted))).join(timeline, on="note_id")
    encounter = pl.coalesce(pl.col("visit_id").cast(pl.String), pl.concat_str(pl.lit("note "), pl.col("note_id")))
    starts = seen.group_by("subject_id", "code", encounter.alias("encounter")).agg(pl.col("time").min())
    return (
        starts.group_by("subject_id", "code")
        .agg(pl.col("time").sort(), pl.len())
        .filter(pl.col("len") >= 2)
        .select("subject_id", "code", pl.col("time").list.get(0 if mode == "paper" else 1).alias("since"))
    )


def _chronic(codes: Sequence[str]) -> set[str]:
    """Those of ``codes`` that AHRQ's indicator calls chronic; unknown ones are not."""
    return {code for code, flag in zip(codes, chronic(codes), strict=True) if flag}
