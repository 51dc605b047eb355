"""The visits of a shard of RECORDS as flat columns, and what of them is known in a slot (see ``_visit_slots``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ._histories import NEVER, History, one_chunk, ragged_indices

DAY = 86_400_000_000
LAST_SECOND = DAY - 1_000_000
"""Where in a day the sources put a note that has a date and no time, µs."""
_VISIT = "visits.list.element."


@dataclass(frozen=True)
class VisitReading:
    """How visits are read.

    Attributes:
        max_visits: Most visits of a row; older ones go first.
        note_category: Category of the note of a visit, its last one (``Discharge summary``; case does not matter).
            None: the last of each category, the newest first, so that what is cut off a long text is the oldest.
        notes_of_the_day: Whether notes of a visit that are known by date only count as written at a prediction time on
            that day. Sources put them at its end, and a discharge summary is often dated so; a note of that evening
            then is seen some hours early.
        target_text: Whether a visit whose medications are asked for shows its notes, which list them. For the paper's
            form of the model alone; its results are optimistic.
    """

    max_visits: int = 10
    note_category: str | None = None
    notes_of_the_day: bool = False
    target_text: bool = False

    def __post_init__(self) -> None:
        if self.max_visits < 2:
            raise ValueError(f"`max_visits` must be at least 2, a visit and one before it, got {self.max_visits}.")


@dataclass(frozen=True)
class Shard:
    """The visits of a shard, numbered in the order of patients and starts.

    Attributes:
        subject_ids: (visits,) int64.
        visit_ids: (visits,) int64, -1 where a visit has none.
        visits: ``visit`` (its number), ``subject_id``, ``start``, ``end``, ``closed`` (µs; ``closed`` is the end or
            the time of the last note, whichever is later) and ``inpatient``, of the patients that are wanted.
        histories: Codes by kind.
        notes: ``visit``, ``time`` (µs), and where they are read ``category`` and ``text``.
    """

    subject_ids: np.ndarray
    visit_ids: np.ndarray
    visits: pl.DataFrame
    histories: Mapping[str, History]
    notes: pl.DataFrame

    @classmethod
    def read(cls, path: Path, kinds: Mapping[str, tuple[str, ...]], texts: bool, kept: np.ndarray | None) -> Shard:
        """Reads the code lists ``kinds`` and, if wanted, the texts of notes."""
        names = ["visit_id", "start", "end", "kind", "notes.list.element.time"]
        names += [f"{kind}{suffix}" for lists in kinds.values() for kind in lists for suffix in ("", "_at")]
        names += ["notes.list.element.category", "notes.list.element.text"] if texts else []
        columns = ["subject_id", *(f"{_VISIT}{name}" for name in dict.fromkeys(names))]
        table = pq.ParquetFile(path).read(columns=columns).combine_chunks()
        lists = one_chunk(table, "visits")
        fields = lists.flatten()
        subject_ids = table["subject_id"].to_numpy()[pc.list_parent_indices(lists).to_numpy()]
        notes = _notes(pc.struct_field(fields, "notes"))
        visits = pl.DataFrame(
            {
                "visit": np.arange(len(fields)),
                "subject_id": subject_ids,
                "start": _micros(fields, "start").fill_null(NEVER),
                "end": _micros(fields, "end").fill_null(NEVER),
                "inpatient": pc.fill_null(pc.equal(pc.struct_field(fields, "kind"), "inpatient"), False).to_numpy(
                    zero_copy_only=False
                ),
            }
        )
        last = notes.group_by("visit").agg(pl.col("time").max())
        visits = visits.join(last, on="visit", how="left", maintain_order="left")
        visits = visits.with_columns(closed=pl.max_horizontal("end", "time")).drop("time")
        if kept is not None:
            visits = visits.filter(pl.Series(np.isin(subject_ids, kept)))
        return cls(
            subject_ids,
            pc.fill_null(pc.struct_field(fields, "visit_id"), -1).to_numpy(),
            visits,
            {name: History.of(table, lists) for name, lists in kinds.items()},
            notes,
        )

    def known_codes(self, kind: str, slots: pl.DataFrame) -> tuple[pa.DictionaryArray, np.ndarray]:
        """Codes seen in each slot and how many they are, (slots,): of an own visit all diagnoses and no medication."""
        history, visit = self.histories[kind], slots["visit"].to_numpy()
        counts = np.diff(history.code_offsets)[visit]
        codes = ragged_indices(history.code_offsets[visit], counts)
        time, own = (np.repeat(slots[name].to_numpy(), counts) for name in ("time", "own"))
        seen = np.where(own, kind == "diagnosis", history.available[codes] <= time)
        lengths = np.bincount(np.repeat(np.arange(len(visit)), counts)[seen], minlength=len(visit))
        return history.codes.take(pa.array(codes[seen])), lengths

    def known_notes(self, slots: pl.DataFrame, reading: VisitReading) -> pl.DataFrame:
        """``slot``, ``time``, ``category``, ``text``: the last note of each category, the newest first."""
        limits = slots.select("visit", "own", limit="time").with_row_index("slot")
        notes = limits.join(self.notes, on="visit")
        notes = notes.with_columns(pl.col("category").str.strip_chars().str.to_lowercase())
        known = pl.col("time") <= pl.col("limit")
        if reading.notes_of_the_day:
            day = pl.col("limit") - pl.col("limit") % DAY
            known |= (pl.col("time") == day + LAST_SECOND) & (pl.col("limit") != NEVER)
        known = pl.when("own").then(pl.lit(reading.target_text)).otherwise(known)
        known &= pl.col("text").str.strip_chars().str.len_bytes() > 0
        if reading.note_category is not None:
            known &= pl.col("category") == reading.note_category.strip().lower()
        order = {"slot": False, "time": True, "category": False, "text": False}
        notes = notes.filter(known).sort(list(order), descending=list(order.values()))
        return notes.unique(["slot", "category"], keep="first", maintain_order=True)

    def settled(self) -> pl.DataFrame:
        """``visits`` with three columns more, of all that a visit has.

        Returns:
            ``settled``, when the last of its codes and notes became known (before all time where it has none);
            ``coded``, whether it has a code; and ``holds``, whether it has a code or a note.
        """
        settled = np.full(len(self.visit_ids), np.iinfo(np.int64).min)
        coded = np.zeros(len(self.visit_ids), bool)
        for history in self.histories.values():
            owner = np.repeat(np.arange(len(coded)), np.diff(history.code_offsets))
            np.maximum.at(settled, owner, history.available)
            coded[owner] = True
        noted = self.notes["visit"].to_numpy()
        np.maximum.at(settled, noted, self.notes["time"].to_numpy())
        holds = coded.copy()
        holds[noted] = True
        visit = self.visits["visit"].to_numpy()
        return self.visits.with_columns(settled=settled[visit], coded=coded[visit], holds=holds[visit])


def _notes(lists: pa.Array) -> pl.DataFrame:
    """The notes of all visits; category and text where they were read."""
    inner = lists.flatten()
    texts = [name for name in ("category", "text") if inner.type.get_field_index(name) >= 0]
    columns: dict[str, Any] = {name: pc.fill_null(pc.struct_field(inner, name), "") for name in texts}
    owner = pc.list_parent_indices(lists).cast(pa.int64())
    frame: Any = pl.from_arrow(pa.table({"visit": owner, **columns}))
    return frame.with_columns(time=_micros(inner, "time").fill_null(NEVER))


def _micros(fields: pa.Array, name: str) -> pl.Series:
    times: Any = pl.from_arrow(pc.struct_field(fields, name).cast(pa.timestamp("us")).cast(pa.int64()))
    return times
