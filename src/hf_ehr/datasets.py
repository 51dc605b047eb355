"""RECORDS × LABELS × tokenizer → EXAMPLES: a memory-mapped ``datasets.Dataset`` with equal-length integer lists.

Nothing that could not be known at the prediction time enters an example: a code is visible if and only if its
``<kind>_at`` and the start of its visit are not after the prediction time; a visit without a visible code is not
counted. Ends of visits, discharge fields and death are not read, except for the pre-training label.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ._example_writer import ExampleWriter
from ._histories import (
    NEVER,
    History,
    datetimes,
    distinct_codes,
    microseconds,
    offsets_of,
    one_chunk,
    ragged_indices,
    record_batches,
    total_before,
)
from .schema import CODE_KINDS, DatasetInfo, EhrDataError, shard_paths, validate_labels

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

STREAMS = ("input_ids", "visit_ids", "serial_ids")
OPTIONAL_STREAMS = {"age_ids": "ages", "day_ids": "days"}
"""Streams that examples have beside the others, and the option of their tokenizer that adds each."""
SEXES = ("F", "M")
"""Sex in an example is 1 + the place in this tuple, 0 when unknown or other."""

MICROSECONDS_PER_DAY = 86_400_000_000
DAYS_PER_YEAR = 365.25
CODES_PER_CHUNK = 1 << 22
"""Codes expanded at a time, so that many prediction times of one patient do not multiply the memory of a shard."""


def split_patients(
    subject_ids: Any, *, seed: int = 0, fractions: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """Splits by patient. The split of a patient depends on its id and the seed alone, never on who else is there.

    Args:
        subject_ids: Patients in any order, repeats allowed, (rows,) int64.
        seed: Another seed gives another split.
        fractions: Share of each split, adding up to 1. Default: Med-BERT's 7:1:2.

    Returns:
        The sorted, distinct ids of each split, int64. The splits are disjoint and hold every patient.

    Raises:
        ValueError: The fractions are negative or do not add up to 1.
    """
    shares = dict(fractions or {"train": 0.7, "validation": 0.1, "test": 0.2})
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1):
        raise ValueError(f"`fractions` must be non-negative and add up to 1, got {shares}. Change one of them.")
    ids = np.unique(np.asarray(subject_ids, np.int64))
    place = np.searchsorted(np.cumsum(list(shares.values()))[:-1], _uniform(ids, seed), side="right")
    return {name: ids[place == index] for index, name in enumerate(shares)}


def prolonged_stay(records: pa.Table | pa.RecordBatch, days: float = 7) -> np.ndarray:
    """Med-BERT's second pre-training label: 1 where any visit lasted longer than ``days``, strictly (7 → 0, 8 → 1).

    The whole history counts and so do outpatient visits (0 days), as in the paper. A visit without an end counts as
    short. The same rule as the task ``prolonged_stay`` of :mod:`hf_ehr.tasks.library`.

    Returns:
        (patients,) int64 of 0 and 1.
    """
    visits = one_chunk(records, "visits")
    fields = visits.flatten()
    start, end = (microseconds(pc.struct_field(fields, name)) for name in ("start", "end"))
    known = (start != NEVER) & (end != NEVER)
    long = np.zeros(len(start), bool)
    long[known] = end[known] - start[known] > days * MICROSECONDS_PER_DAY
    return (np.diff(total_before(long)[offsets_of(visits)]) > 0).astype(np.int64)


def build_examples(
    records: str | Path | pa.Table,
    tokenizer: Any,
    labels: pa.Table | None = None,
    *,
    kinds: Sequence[str] = ("diagnoses",),
    max_length: int = 512,
    subject_ids: Any = None,
    min_unique_codes: int = 0,
    label_names: Sequence[str] | None = None,
    drop_long: bool = False,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """One example per label row, or per patient (the whole history) when there are no labels.

    Left out and counted in a warning: examples without a visible code, labels of patients without a record, and what
    ``min_unique_codes`` and ``drop_long`` ask for. The counts are also in ``dataset.info.description``.

    Args:
        records: RECORDS, or a prepared folder that is read shard by shard.
        tokenizer: Encodes codes in bulk (:meth:`EhrCodeTokenizer.encode_column`).
        labels: LABELS. ``None`` builds pre-training examples.
        kinds: Code lists of a visit, in the order in which their codes follow each other within it.
        max_length: Most codes of an example, separators included; older visits go first.
        subject_ids: Patients to keep, e.g. one split. ``None`` keeps all.
        min_unique_codes: Fewest distinct visible codes; Med-BERT pre-trains on patients with at least 3.
        label_names: The classes of ``categorical_value`` labels, or the codes of multi-label ones, in the order of
            their indices. Take them from the training split.
        drop_long: Whether examples longer than ``max_length`` are left out (Med-BERT's pre-training code) instead of
            being cut.
        cache_dir: Folder for the Arrow files that the result is memory-mapped from. ``None`` keeps it in memory.

    Returns:
        Columns ``subject_id``, ``prediction_time`` (null without labels), the lists ``input_ids``, ``visit_ids``,
        ``serial_ids`` (int32) and, if the tokenizer has ``ages`` or ``days``, ``age_ids`` and ``day_ids``; ``length``,
        ``age`` (years at the prediction time, NaN when unknown), ``sex`` (0 unknown, 1 F, 2 M) and ``labels`` (class
        index, float for ``float_value``, or 0/1 per label name) or, without labels, ``prolonged_stay_labels``
        (:func:`prolonged_stay`).

    Raises:
        EhrDataError: The labels mix value columns, a class is not among ``label_names``, the tokenizer has ``days``
            and the folder knows no time between visits, or no example is left.
        ValueError: An option has no meaning for these labels.
    """
    unknown = set(kinds) - set(CODE_KINDS)
    if unknown or not kinds:
        raise ValueError(f"`kinds` must name code lists out of {CODE_KINDS}, got {tuple(kinds)}.")
    axis = DatasetInfo.load(records).time_axis if tokenizer.days and not isinstance(records, pa.Table) else None
    if axis in ("order", "visit"):
        raise EhrDataError(
            f"`tokenizer` must have `days=False` for {records}, got True: time between its visits is not known "
            f"(time_axis: {axis}), and days between them would be made up. Fit a tokenizer without days, and take a "
            "model that reads none (all but HiTANet)."
        )
    kept = None if subject_ids is None else np.unique(np.asarray(subject_ids, np.int64))
    builder = _Builder(
        tokenizer,
        tuple(kinds),
        max_length,
        min_unique_codes,
        drop_long,
        kept,
        _Labels.parse(labels, label_names, kept),
    )
    writer = ExampleWriter(_features(builder.labels, builder.streams), None if cache_dir is None else Path(cache_dir))
    parts = [records] if isinstance(records, pa.Table) else shard_paths(records, "records")
    for part in tqdm(parts, desc="Building examples", unit="shard", disable=len(parts) < 2):
        writer.add(table for batch in record_batches(part, kinds) for table in builder.examples(batch))
    return writer.finish(builder.report())


@dataclass
class _Labels:
    """LABELS sorted by patient, for look-up by record."""

    table: pa.Table
    column: str
    names: list[str] | None
    subject_ids: np.ndarray
    times: np.ndarray
    used: int = 0

    @classmethod
    def parse(cls, labels: pa.Table | None, names: Sequence[str] | None, kept: np.ndarray | None) -> _Labels | None:
        if labels is None:
            if names is not None:
                raise ValueError("`label_names` must be None without `labels`: there is nothing to name.")
            return None
        labels = validate_labels(labels)
        if kept is not None:
            labels = labels.filter(pa.array(np.isin(labels["subject_id"].to_numpy(), kept)))
        column = _value_column(labels)
        if (names is None) == (column in ("categorical_value", "codes")):
            rule = "name the classes or codes of" if names is None else "be None for"
            raise ValueError(f"`label_names` must {rule} labels in `{column}`. Take them from the training split.")
        labels = labels.take(np.argsort(labels["subject_id"].to_numpy(), kind="stable"))
        times = labels["prediction_time"].cast(pa.int64()).to_numpy()
        return cls(labels, column, None if names is None else list(names), labels["subject_id"].to_numpy(), times)

    def rows_of(self, subject_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Record row and label row of every example, each (examples,), for the records of ``subject_ids``."""
        first, last = (np.searchsorted(self.subject_ids, subject_ids, side=side) for side in ("left", "right"))
        counts = last - first
        self.used += int(counts.sum())
        return np.repeat(np.arange(len(subject_ids)), counts), ragged_indices(first, counts)

    def values(self, rows: np.ndarray) -> pa.Array:
        """The label column of an example table."""
        column = self.table[self.column].take(rows).combine_chunks()
        if self.names is None:
            return column.cast(pa.float32() if self.column == "float_value" else pa.int64())
        if self.column == "categorical_value":
            return self._class_ids(column)
        hits = np.zeros((len(rows), len(self.names)), np.float32)
        found = pc.fill_null(pc.index_in(column.flatten(), pa.array(self.names)), -1).to_numpy()
        row = np.repeat(np.arange(len(rows)), np.diff(offsets_of(column)))
        hits[row[found >= 0], found[found >= 0]] = 1
        return pa.FixedSizeListArray.from_arrays(hits.ravel(), len(self.names))

    def _class_ids(self, column: pa.Array) -> pa.Array:
        ids = pc.index_in(column, pa.array(self.names))
        if ids.null_count:
            missing = pc.unique(column.filter(ids.is_null())).to_pylist()
            raise EhrDataError(
                f"`categorical_value` must be one of `label_names` {self.names}, got {missing}. Name all classes."
            )
        return ids.cast(pa.int64())


@dataclass
class _Builder:
    """Turns batches of RECORDS into tables of examples and counts what is left out."""

    tokenizer: Any
    kinds: tuple[str, ...]
    max_length: int
    min_unique_codes: int
    drop_long: bool
    kept: np.ndarray | None
    labels: _Labels | None
    counts: Counter = field(default_factory=Counter)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams of an example."""
        added = (name for name, option in OPTIONAL_STREAMS.items() if getattr(self.tokenizer, option))
        return (*STREAMS, *added)

    def examples(self, batch: pa.RecordBatch) -> Iterator[pa.Table]:
        """Example tables of one batch of records, each of about ``CODES_PER_CHUNK`` codes."""
        history = History.of(batch, self.kinds)
        subject_ids = batch["subject_id"].to_numpy()
        if self.labels is not None:
            rows, label_rows = self.labels.rows_of(subject_ids)
        else:
            kept = np.ones(len(subject_ids), bool) if self.kept is None else np.isin(subject_ids, self.kept)
            rows = label_rows = np.flatnonzero(kept)
        codes = np.diff(history.code_offsets[history.visit_offsets])[rows]
        chunk = np.cumsum(codes) // CODES_PER_CHUNK
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(chunk)) + 1):
            table = self._table(batch, history, rows[part], label_rows[part])
            if table.num_rows:
                yield table

    def _table(self, batch: pa.RecordBatch, history: History, rows: np.ndarray, label_rows: np.ndarray) -> pa.Table:
        times = np.full(len(rows), NEVER) if self.labels is None else self.labels.times[label_rows]
        *histories, visit_starts = history.visible(rows, times)
        options: dict[str, Any] = {"max_length": None if self.drop_long else self.max_length}
        if len(self.streams) > len(STREAMS):
            births = microseconds(batch["birth_time"])[rows]
            options |= {"birth_times": datetimes(births), "visit_starts": datetimes(visit_starts)}
        encoded = self.tokenizer.encode_column(*histories, **options)
        lengths = np.diff(encoded.offsets)
        unique = distinct_codes(*histories) if self.min_unique_codes > 1 else lengths
        keep = self._keep(lengths, unique)
        tokens = np.repeat(keep, lengths)
        offsets = pa.array(total_before(lengths[keep]).astype(np.int32))
        rows, label_rows, times = rows[keep], label_rows[keep], times[keep]
        patients = batch.select(["subject_id", "birth_time", "sex"]).take(pa.array(rows))
        columns = {
            "subject_id": patients["subject_id"],
            "prediction_time": pa.array(times, mask=times == NEVER).cast(pa.timestamp("us")),
            **{
                name: pa.ListArray.from_arrays(offsets, pa.array(getattr(encoded, name)[tokens]))
                for name in self.streams
            },
            "length": pa.array(lengths[keep].astype(np.int32)),
            "age": pa.array(_years(microseconds(patients["birth_time"]), times)),
            "sex": pc.fill_null(pc.add(pc.index_in(patients["sex"], pa.array(SEXES)), 1), 0).cast(pa.int8()),
        }
        if self.labels is None:
            columns["prolonged_stay_labels"] = pa.array(prolonged_stay(batch)[rows])
        else:
            columns["labels"] = self.labels.values(label_rows)
        self.counts["examples"] += len(rows)
        return pa.table(columns)

    def _keep(self, lengths: np.ndarray, unique: np.ndarray) -> np.ndarray:
        """Which examples stay, (examples,) bool; every other one is counted under its first reason."""
        keep = np.ones(len(lengths), bool)
        for reason, failed in (
            ("no visible code", lengths == 0),
            (f"fewer than {self.min_unique_codes} distinct codes", unique < self.min_unique_codes),
            (f"longer than {self.max_length} codes", lengths > self.max_length),
        ):
            self.counts[reason] += int((keep & failed).sum())
            keep &= ~failed
        return keep

    def report(self) -> str:
        """What was built and left out, in words.

        Raises:
            EhrDataError: No example is left.
        """
        if self.labels is not None:
            self.counts["label of a patient without a record"] = len(self.labels.times) - self.labels.used
        built = self.counts.pop("examples", 0)
        left_out = ", ".join(f"{count} × {reason}" for reason, count in self.counts.items() if count)
        if not built:
            raise EhrDataError(
                f"No example is left ({left_out or 'no patient was selected'}). Check that `labels` and `subject_ids` "
                "belong to these records and that the codes are available before the prediction time."
            )
        if left_out:
            logger.warning("Examples left out of %d: %s.", built + sum(self.counts.values()), left_out)
        return f"{built} examples; left out: {left_out or 'none'}."


def _features(labels: _Labels | None, streams: Sequence[str]) -> datasets.Features:
    """The columns of EXAMPLES."""
    from datasets import ClassLabel, Features, List, Value

    label: Any = Value("float32" if labels is not None and labels.column == "float_value" else "int64")
    if labels is not None and labels.names is not None:
        multi_label = labels.column == "codes"
        label = List(Value("float32"), length=len(labels.names)) if multi_label else ClassLabel(names=labels.names)
    return Features(
        {
            "subject_id": Value("int64"),
            "prediction_time": Value("timestamp[us]"),
            **{name: List(Value("int32")) for name in streams},
            "length": Value("int32"),
            "age": Value("float32"),
            "sex": Value("int8"),
            "prolonged_stay_labels" if labels is None else "labels": label,
        }
    )


def _value_column(labels: pa.Table) -> str:
    """The one value column that the labels are in."""
    names = ("boolean_value", "integer_value", "float_value", "categorical_value", "codes")
    used = [name for name in names if labels[name].null_count < labels.num_rows]
    if len(used) != 1 or labels[used[0]].null_count:
        raise EhrDataError(
            f"LABELS must all be in one value column, got {used or 'no rows'}. Build one task at a time."
        )
    return used[0]


def _years(birth: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Age in years, float32, NaN without a birth or a prediction time."""
    known = (birth != NEVER) & (times != NEVER)
    age = np.full(len(birth), np.nan, np.float32)
    age[known] = (times[known] - birth[known]) / (MICROSECONDS_PER_DAY * DAYS_PER_YEAR)
    return age


def _uniform(ids: np.ndarray, seed: int) -> np.ndarray:
    """A hash of (seed, id) in [0, 1): the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), twice."""
    mixed = _mix(ids.astype(np.uint64) + _mix(np.full(1, seed, np.int64).astype(np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
