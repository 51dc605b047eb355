"""Records → examples of admissions: one visit with its stays, codes and note, as far as known when it is asked about.

records ─ labels ─▶ visits and times ─┬─ stays that had begun ─ hours up to then ─┐
                                      ├─ codes available by then ─ two tokenizers ─┼─▶ datasets.Dataset
                                      └─ notes written by then ─ tokens, or vectors ┘
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ._example_writer import ExampleWriter
from ._histories import NEVER, History, offsets_of, one_chunk, ragged_indices, total_before
from .hourly import hourly_examples
from .schema import EhrDataError, shard_paths
from .stay_datasets import HOUR

if TYPE_CHECKING:
    import datasets

    from .models.processing_medhmp import MedHMPProcessor

logger = logging.getLogger(__name__)

NOTE_SEPARATOR = "\n\n"
NoteVectors = Callable[[list[str]], np.ndarray]
"""Texts → their vectors, (texts, note_size) float32."""
_VISIT = "visits.list.element."
_STAY = "stays.list.element."
_NOTE = "notes.list.element."


def build_admission_examples(
    data: str | Path,
    processor: MedHMPProcessor,
    *,
    labels: pa.Table | None = None,
    subject_ids: Any = None,
    note_vectors: NoteVectors | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """One example per label, or per inpatient visit that holds anything where there are no labels.

    A label belongs to the inpatient visit that was running at its prediction time, its end included; of several to the
    one that began last before it. Known at that time are: of the visit's stays that had begun the hours before it;
    the codes whose ``diagnoses_at`` or ``medications_at`` is not after it; and the notes written by then, the last one
    of each category, the newest first, so that what is cut off a long text is the oldest. What there is none of is an
    empty list. Other visits are not read.

    Args:
        data: Prepared folder.
        processor: Features and tokenizers, fitted on the training patients.
        labels: LABELS with ``boolean_value``. Without: all that the visits hold, for pre-training.
        subject_ids: Patients to take, e.g. a split; all by default.
        note_vectors: Makes the vectors of texts, which then stand in place of tokens: for a frozen text encoder, that
            reads each text once. Texts of one shard at a time; equal ones are given once.
        cache_dir: Folder for the Arrow files; in memory without.

    Returns:
        Columns ``subject_id``, ``visit_id``, ``stay_hours`` (one a stay), ``feature_ids``, ``feature_counts``,
        ``demographics``, in continuous form ``feature_values``, each of all stays one after the other;
        ``diagnosis_ids``, ``medication_ids``; ``note_vector`` or, from a processor with a tokenizer of notes,
        ``note_input_ids``; with labels ``labels`` (int64).

    Raises:
        EhrDataError: No example is left, a label has no boolean value, or a stay's id is not its own.
    """
    wanted = None if subject_ids is None else pl.Series("subject_id", np.unique(np.asarray(subject_ids, np.int64)))
    asked = None if labels is None else _asked(labels, wanted)
    builder = _Builder(processor, note_vectors, asked, wanted)
    writer = ExampleWriter(builder.features(), None if cache_dir is None else Path(cache_dir))
    for path in tqdm(shard_paths(data, "records"), desc="Building examples", unit="shard"):
        writer.add(builder.rows(path))
    return writer.finish(builder.report())


def admission_windows(visits: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """The visit in which each label is asked.

    Args:
        visits: ``subject_id``, ``visit_id``, ``start``, ``end``, and columns of the caller's own.
        asked: ``subject_id``, ``prediction_time``, ``labels``.

    Returns:
        The columns of both, a row a label that is asked within a visit: the visit that began last before the
        prediction time; one that begins at that very moment only where there is no other.
    """
    found = asked.with_row_index("label").join(visits, on="subject_id")
    running = (pl.col("start") <= pl.col("prediction_time")) & (
        pl.col("end").is_null() | (pl.col("prediction_time") <= pl.col("end"))
    )
    found = found.filter(running).with_columns(begun=pl.col("start") < pl.col("prediction_time"))
    found = found.sort("label", "begun", "start", "visit_id")
    return found.unique("label", keep="last", maintain_order=True).drop("label", "begun")


def _asked(labels: pa.Table, wanted: pl.Series | None) -> pl.DataFrame:
    frame = pl.DataFrame(labels.select(["subject_id", "prediction_time", "boolean_value"]))
    frame = frame if wanted is None else frame.filter(pl.col("subject_id").is_in(wanted.implode()))
    if frame["boolean_value"].null_count():
        raise EhrDataError(
            "`labels` must have a `boolean_value` in every row. Admissions are asked yes-or-no questions."
        )
    return frame.select("subject_id", "prediction_time", labels=pl.col("boolean_value").cast(pl.Int64))


@dataclass
class _Builder:
    """Turns shards of RECORDS into tables of examples and counts what is left out."""

    processor: MedHMPProcessor
    note_vectors: NoteVectors | None
    asked: pl.DataFrame | None
    wanted: pl.Series | None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def note_column(self) -> str | None:
        """The column that notes are in."""
        if self.note_vectors is not None:
            return "note_vector"
        return None if self.processor.note_tokenizer is None else "note_input_ids"

    def features(self) -> datasets.Features:
        """The columns of the examples."""
        from datasets import Features, List, Value

        lists = {"stay_hours": "int32", "feature_ids": "int32", "feature_counts": "int16", "demographics": "float32"}
        lists |= {"feature_values": "float32"} if self.processor.feature_extractor.form == "continuous" else {}
        lists |= {f"{name}_ids": "int32" for name in self.processor.code_tokenizers}
        if self.note_column is not None:
            lists[self.note_column] = "float32" if self.note_vectors is not None else "int32"
        columns: dict[str, Any] = {name: Value("int64") for name in ("subject_id", "visit_id")}
        columns |= {name: List(Value(kind)) for name, kind in lists.items()}
        return Features({**columns, **({} if self.asked is None else {"labels": Value("int64")})})

    def rows(self, path: Path) -> Iterator[pa.Table]:
        """The examples of one shard."""
        table = self._read(path)
        examples = self._examples(table)
        if not len(examples):
            return
        columns: dict[str, Any] = {name: examples[name].to_arrow() for name in ("subject_id", "visit_id")}
        columns |= self._codes(table, examples) | self._stays(path, table, examples) | self._notes(table, examples)
        if self.asked is not None:
            columns["labels"] = examples["labels"].to_arrow()
        made = pa.table(columns).select(self.features().arrow_schema.names)
        if self.asked is None:
            made = made.filter(pa.array(_holds_anything(made, self.note_column)))
        self.counts["examples"] += made.num_rows
        if made.num_rows:
            yield made

    def report(self) -> str:
        """What was built and left out, in words.

        Raises:
            EhrDataError: No example is left.
        """
        counts = self.counts
        if not counts["examples"]:
            raise EhrDataError(
                f"No example is left of {counts['labels']:,} labels ({counts['outside']:,} asked outside of an "
                "inpatient visit). Check that the records hold inpatient visits with codes, stays or notes, and the "
                "split."
            )
        if counts["outside"]:
            logger.warning("%d labels are asked outside of any inpatient visit: left out.", counts["outside"])
        return f"{counts['examples']} admissions; {counts['ignored']} measurements ignored."

    def _read(self, path: Path) -> pa.Table:
        names = ["visit_id", "start", "end", "kind"]
        for tokenizer in self.processor.code_tokenizers.values():
            names += [f"{kind}{suffix}" for kind in tokenizer.kinds for suffix in ("", "_at")]
        names += [f"{_STAY}{name}" for name in ("stay_id", "start")]
        if self.note_column is not None:
            names += [f"{_NOTE}{name}" for name in ("time", "category", "text")]
        table = pq.ParquetFile(path).read(
            columns=["subject_id", *(f"{_VISIT}{name}" for name in dict.fromkeys(names))]
        )
        return table.combine_chunks()

    def _examples(self, table: pa.Table) -> pl.DataFrame:
        """``subject_id``, ``visit_id``, ``visit`` (row among all visits of the shard), ``time`` (microseconds)."""
        visits = _inner(one_chunk(table, "visits"), "patient", "visit_id", "start", "end", "kind")
        subjects = table["subject_id"].to_numpy()[visits["patient"].to_numpy()]
        visits = visits.with_columns(subject_id=subjects).with_row_index("visit").drop("patient")
        if self.wanted is not None:
            visits = visits.filter(pl.col("subject_id").is_in(self.wanted.implode()))
        here = visits["subject_id"].unique()
        visits = visits.filter(pl.col("kind") == "inpatient")
        if self.asked is None:
            return visits.with_columns(time=pl.lit(NEVER))
        asked = self.asked.filter(pl.col("subject_id").is_in(here.implode()))
        found = admission_windows(visits, asked)
        self.counts["labels"] += len(asked)
        self.counts["outside"] += len(asked) - len(found)
        return found.with_columns(time=pl.col("prediction_time").dt.timestamp("us"))

    def _codes(self, table: pa.Table, examples: pl.DataFrame) -> dict[str, pa.Array]:
        visit, times = examples["visit"].to_numpy(), examples["time"].to_numpy()
        columns = {}
        for name, tokenizer in self.processor.code_tokenizers.items():
            history = History.of(table, tokenizer.kinds)
            counts = np.diff(history.code_offsets)[visit]
            codes = ragged_indices(history.code_offsets[visit], counts)
            known = history.available[codes] <= np.repeat(times, counts)
            lengths = np.bincount(np.repeat(np.arange(len(visit)), counts)[known], minlength=len(visit))
            shown = history.codes.take(pa.array(codes[known]))
            encoded = tokenizer.encode_column(shown, lengths, np.ones(len(visit), np.int64), max_length=None)
            columns[f"{name}_ids"] = _lists(encoded.offsets, encoded.input_ids)
        return columns

    def _stays(self, path: Path, table: pa.Table, examples: pl.DataFrame) -> dict[str, pa.Array]:
        """The hours of the stays that had begun, and how many stays each example has."""
        stays = _begun_stays(table, examples)
        extractor = self.processor.feature_extractor
        made = hourly_examples([path], extractor, stays, subject_ids=examples["subject_id"].unique())
        self.counts["ignored"] += made.ignored.total()
        # Rows come back in the order of the windows.
        if not made.table["stay_id"].equals(pa.chunked_array([stays["stay_id"].to_arrow()])):
            raise EhrDataError("`stay_id` must be of one stay only, and is not. Give every stay an id of its own.")
        bounds = total_before(np.bincount(stays["example"].to_numpy(), minlength=len(examples)))
        columns = {"stay_hours": _lists(bounds, made.table["stay_hours"].to_numpy())}
        for name in ("feature_ids", "feature_counts", "feature_values", "demographics"):
            if name in made.table.column_names:
                lists = made.table[name].combine_chunks()
                columns[name] = _lists(offsets_of(lists)[bounds], lists.flatten())
        return columns

    def _notes(self, table: pa.Table, examples: pl.DataFrame) -> dict[str, pa.Array]:
        """The notes of each example, as vectors or as tokens."""
        if self.note_column is None:
            return {}
        texts = _texts(table, examples)
        distinct = texts["text"].unique(maintain_order=True)
        made = [] if distinct.is_empty() else (self.note_vectors or self.processor.note_ids)(distinct.to_list())
        kind = pa.float32() if self.note_vectors is not None else pa.int32()
        if len(made) != len(distinct):
            raise ValueError(f"`note_vectors` must give a row for each of {len(distinct)} texts, got {len(made)}.")
        found = pl.DataFrame({"text": distinct, "note": pl.from_arrow(_rows(made, kind))})
        notes = pl.DataFrame({"example": pl.int_range(len(examples), eager=True)})
        notes = notes.join(texts.join(found, on="text"), on="example", how="left", maintain_order="left")
        lists = notes["note"].to_arrow().cast(pa.large_list(kind))
        return {self.note_column: _lists(offsets_of(lists), lists.flatten())}


def _begun_stays(table: pa.Table, examples: pl.DataFrame) -> pl.DataFrame:
    """``example``, ``stay_id`` and ``end_hour`` of the stays that had begun, in the order of examples and time."""
    stays = _inner(_of_visits(table, "stays"), "visit", "stay_id", "start")
    shown = examples.select("visit", "time").with_row_index("example").join(stays, on="visit")
    shown = shown.with_columns(pl.col("start").dt.timestamp("us"))
    shown = shown.filter(pl.col("start") <= pl.col("time")).sort("example", "start", "stay_id")
    hours = (pl.col("time") - pl.col("start")) / HOUR
    hours = pl.when(pl.col("time") == NEVER).then(None).otherwise(hours)
    return shown.select(pl.col("example").cast(pl.Int64), "stay_id", end_hour=hours.cast(pl.Float64))


def _texts(table: pa.Table, examples: pl.DataFrame) -> pl.DataFrame:
    """``example`` and ``text`` of the examples with a note: the last of each category, the newest first."""
    notes = _inner(_of_visits(table, "notes"), "visit", "time", "category", "text")
    shown = examples.select("visit", limit="time").with_row_index("example").join(notes, on="visit")
    shown = shown.with_columns(pl.col("time").dt.timestamp("us").fill_null(NEVER), pl.col("category").fill_null(""))
    shown = shown.filter(
        (pl.col("time") <= pl.col("limit")) & (pl.col("text").str.strip_chars().str.len_bytes() > 0)
    ).sort("example", "time", "category", "text", descending=[False, True, False, False])
    shown = shown.unique(["example", "category"], keep="first", maintain_order=True)
    joined = shown.group_by("example", maintain_order=True).agg(pl.col("text").str.join(NOTE_SEPARATOR))
    return joined.with_columns(pl.col("example").cast(pl.Int64))


def _of_visits(table: pa.Table, name: str) -> pa.Array:
    """A list column of all visits of a shard."""
    return pc.struct_field(one_chunk(table, "visits").flatten(), name)


def _inner(lists: pa.Array, owner: str, *names: str) -> pl.DataFrame:
    """The structs of a list column as rows, with the number of the list that each is in."""
    inner = lists.flatten()
    columns = {name: pc.struct_field(inner, name) for name in names}
    return pl.DataFrame(pa.table({owner: pc.list_parent_indices(lists).cast(pa.uint32()), **columns}))


def _holds_anything(made: pa.Table, note_column: str | None) -> np.ndarray:
    """(examples,) bool: there is a code, an hour of a stay, or a note."""
    names = ["diagnosis_ids", "medication_ids", "feature_counts", *([] if note_column is None else [note_column])]
    return np.any([np.diff(offsets_of(made[name].combine_chunks())) > 0 for name in names], axis=0)


def _rows(made: Any, kind: pa.DataType) -> pa.Array:
    """Lists of numbers, or a matrix, as an Arrow array."""
    lengths = np.array([len(row) for row in made], np.int64)
    flat = np.concatenate([np.empty(0, kind.to_pandas_dtype()), *made])
    return pa.LargeListArray.from_arrays(pa.array(total_before(lengths)), pa.array(flat).cast(kind))


def _lists(offsets: np.ndarray, values: Any) -> pa.Array:
    """The lists of a shard; 64-bit offsets where 32 bits are too few."""
    values = values if isinstance(values, pa.Array) else pa.array(values)
    if offsets[-1] > np.iinfo(np.int32).max:
        return pa.LargeListArray.from_arrays(pa.array(offsets), values)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


__all__ = ["NOTE_SEPARATOR", "NoteVectors", "admission_windows", "build_admission_examples"]
