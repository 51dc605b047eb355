"""RECORDS as flat arrays, and what of them is visible at a prediction time. No loop over patients or codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .schema import EhrDataError

PATIENTS_PER_BATCH = 1 << 16
NEVER = np.iinfo(np.int64).max  # an unknown time: after every prediction time


class Visible(NamedTuple):
    """What is known about some patients at a time each; visits without a visible code are left out.

    Attributes:
        codes: (codes,), in the order patient, visit, kind, priority.
        visit_lengths: Codes of each visit, (visits,).
        patient_lengths: Visits of each example, (examples,).
        visit_starts: Microseconds, (visits,) int64, ``NEVER`` where unknown.
    """

    codes: pa.DictionaryArray
    visit_lengths: np.ndarray
    patient_lengths: np.ndarray
    visit_starts: np.ndarray


@dataclass
class History:
    """The codes of some patients as flat arrays, in the order patient, visit, kind, priority."""

    codes: pa.DictionaryArray
    available: np.ndarray
    code_offsets: np.ndarray
    visit_start: np.ndarray
    visit_offsets: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch, kinds: Sequence[str]) -> History:
        visits = one_chunk(batch, "visits")
        fields = visits.flatten()
        codes, times, owners = [], [], []
        for kind in kinds:
            lists, times_lists = (pc.struct_field(fields, name) for name in (kind, f"{kind}_at"))
            offsets = offsets_of(lists)
            if not np.array_equal(offsets, offsets_of(times_lists)):
                raise EhrDataError(f"RECORDS lists `{kind}` and `{kind}_at` must be equally long. Prepare them again.")
            codes.append(lists.flatten())
            times.append(microseconds(times_lists.flatten()))
            owners.append(np.repeat(np.arange(len(lists)), np.diff(offsets)))
        visit = np.concatenate(owners)
        order = np.argsort(visit, kind="stable") if len(kinds) > 1 else slice(None)
        flat = pc.dictionary_encode(pa.concat_arrays(codes))
        if flat.null_count:
            raise EhrDataError(f"RECORDS must hold no null code, got {flat.null_count}. Prepare them again.")
        return cls(
            _recoded(flat, flat.indices.to_numpy(zero_copy_only=False)[order]),
            np.concatenate(times)[order],
            total_before(np.bincount(visit, minlength=len(fields))),
            microseconds(pc.struct_field(fields, "start")),
            offsets_of(visits),
        )

    def visible(self, rows: np.ndarray, times: np.ndarray) -> Visible:
        """What is known about the patients ``rows`` at ``times``, both (examples,)."""
        visits_each = np.diff(self.visit_offsets)[rows]
        visit = ragged_indices(self.visit_offsets[rows], visits_each)
        codes_each = np.diff(self.code_offsets)[visit]
        code = ragged_indices(self.code_offsets[visit], codes_each)
        limit = np.repeat(times, visits_each)
        begun = self.visit_start[visit] <= limit
        seen = (self.available[code] <= np.repeat(limit, codes_each)) & np.repeat(begun, codes_each)
        owner = np.repeat(np.arange(len(visit)), codes_each)
        visit_lengths = np.bincount(owner[seen], minlength=len(visit))
        example = np.repeat(np.arange(len(rows)), visits_each)
        shown = visit_lengths > 0
        patient_lengths = np.bincount(example[shown], minlength=len(rows))
        codes = _recoded(self.codes, self.codes.indices.to_numpy(zero_copy_only=False)[code[seen]])
        return Visible(codes, visit_lengths[shown], patient_lengths, self.visit_start[visit[shown]])


def record_batches(part: pa.Table | Path, kinds: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """RECORDS in pieces; of a file only the columns that examples are made of are read."""
    if isinstance(part, pa.Table):
        yield from part.to_batches(max_chunksize=PATIENTS_PER_BATCH)
        return
    wanted = {"subject_id", "birth_time", "sex", "visits.start", "visits.end"}
    wanted |= {f"visits.{kind}{suffix}" for kind in kinds for suffix in ("", "_at")}
    file = pq.ParquetFile(part)
    paths = [file.schema.column(index).path for index in range(len(file.schema))]
    # Parquet writers name the levels of a list differently: `visits.list.element.start`, `visits.bag.array.start`.
    levels = {"list", "element", "item", "bag", "array"}
    columns = [path for path in paths if ".".join(name for name in path.split(".") if name not in levels) in wanted]
    yield from file.iter_batches(PATIENTS_PER_BATCH, columns=columns)


def distinct_codes(codes: pa.DictionaryArray, visit_lengths: np.ndarray, patient_lengths: np.ndarray) -> np.ndarray:
    """Number of distinct codes of every example, (examples,)."""
    visit_of = np.repeat(np.arange(len(patient_lengths)), patient_lengths)
    width = max(len(codes.dictionary), 1)
    pairs = np.repeat(visit_of, visit_lengths) * width + codes.indices.to_numpy(zero_copy_only=False)
    pairs = np.sort(
        pairs, kind="stable"
    )  # ten times as fast as numpy's unique here: the examples are in order already
    first = np.ones(len(pairs), bool)
    first[1:] = pairs[1:] != pairs[:-1]
    return np.bincount(pairs[first] // width, minlength=len(patient_lengths))


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``[*range(start, start + length), ...]`` of all pairs one after the other, (sum of lengths,) int64."""
    before = total_before(lengths)
    indices = np.arange(before[-1])
    indices += np.repeat(np.asarray(starts, np.int64) - before[:-1], lengths)
    return indices


def total_before(values: np.ndarray) -> np.ndarray:
    """Running total from 0, (values + 1,) int64."""
    return np.append(0, np.cumsum(values, dtype=np.int64))


def offsets_of(lists: pa.Array) -> np.ndarray:
    """Bounds of each list in ``lists.flatten()``, (lists + 1,) int64; a null is empty."""
    return total_before(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))


def one_chunk(records: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """A column as one array."""
    column = records[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _recoded(codes: pa.DictionaryArray, indices: np.ndarray) -> pa.DictionaryArray:
    """Other places of the same dictionary."""
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), codes.dictionary)


def datetimes(times: np.ndarray) -> np.ndarray:
    """Microseconds as datetime64, NaT where ``NEVER``."""
    return np.where(times == NEVER, np.iinfo(np.int64).min, times).view("M8[us]")


def microseconds(times: pa.Array) -> np.ndarray:
    """Timestamps as int64, ``NEVER`` where unknown."""
    return pc.fill_null(times.cast(pa.timestamp("us")).cast(pa.int64()), NEVER).to_numpy(zero_copy_only=False)
