"""The events of a shard as flat arrays, each placed in its visit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.schema import CODE_KINDS, KINDS, STATIC_FIELDS

DAY_VISIT_BASE = 1_000_000
"""``visit_id = -(epoch day + DAY_VISIT_BASE)`` of the visits made for events without one."""

KIND = {name: number for number, name in enumerate(KINDS)}
CODE_KIND_NUMBERS = [KIND[name.removesuffix("s") if name != "diagnoses" else "diagnosis"] for name in CODE_KINDS]
DAY = 86_400_000_000
NULL = np.iinfo(np.int64).min
_LAST = np.iinfo(np.int32).max


@dataclass
class Codes:
    """The distinct codes of a shard, sorted."""

    names: pa.Array
    tails: pa.Array  # what follows the slash
    fields: np.ndarray  # row in STATIC_FIELDS of what precedes it, -1 if none

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> tuple[Codes, np.ndarray]:
        """(the codes, row of each event's code)."""
        index, names = _encode(column)
        order = pc.array_sort_indices(names)
        rank = np.empty(len(names), np.int32)
        rank[order.to_numpy()] = np.arange(len(names), dtype=np.int32)
        names = names.take(order)
        heads = pc.replace_substring_regex(names, "/.*", "")
        fields = pc.fill_null(pc.index_in(heads, value_set=pa.array(list(STATIC_FIELDS))), -1).to_numpy()
        return cls(names, pc.replace_substring_regex(names, "^[^/]*/", ""), fields), rank[index]


@dataclass
class Events:
    """The columns of a block as flat arrays, one entry per event. Times are microseconds, ``NULL`` where null."""

    subject: np.ndarray
    time: np.ndarray
    kind: np.ndarray  # number in KINDS
    code: np.ndarray  # row of `codes`
    codes: Codes
    visit: np.ndarray  # visit id, made up from the day where the event has none, NULL where it belongs to no visit
    own_visit: np.ndarray  # whether the event came with a visit id
    stay: np.ndarray
    position: np.ndarray
    available: np.ndarray
    timed: bool  # whether any event says when it was available
    shard: pa.Table

    @classmethod
    def of(cls, shard: pa.Table, codes: Codes, code: np.ndarray) -> Events:
        kind, kinds = _encode(shard["kind"])
        numbers = pc.fill_null(pc.index_in(kinds, value_set=pa.array(KINDS)), -1).to_numpy(zero_copy_only=False)
        events = cls(
            subject=integers(shard["subject_id"]),
            time=integers(shard["time"]),
            kind=numbers.astype(np.int8)[kind],
            code=code,
            codes=codes,
            visit=integers(shard["visit_id"]),
            own_visit=_valid(shard["visit_id"]),
            stay=integers(shard["stay_id"]),
            position=integers(shard["position"], null=_LAST),
            available=integers(shard["available_at"]),
            timed=shard["available_at"].null_count < shard.num_rows,
            shard=shard,
        )
        events._place_in_visits()
        return events

    def _place_in_visits(self) -> None:
        if self.own_visit.all():
            return
        _visits_of_stays(self)
        daily = ~self.own_visit & np.isin(self.kind, [*CODE_KIND_NUMBERS, KIND["note"]])
        if daily.any():
            self.visit = np.where(daily, -(self.time // DAY + DAY_VISIT_BASE), self.visit)

    def text(self, rows: np.ndarray) -> pa.Array:
        return _plain(self.shard["text_value"].take(pa.array(rows)), pa.string())

    def value(self, rows: np.ndarray) -> pa.Array:
        return _plain(self.shard["numeric_value"].take(pa.array(rows)), pa.float32())


def _visits_of_stays(events: Events) -> None:
    """Gives events of a stay that lack a visit the visit of the stay's other events."""
    homeless = np.flatnonzero(~events.own_visit & (events.stay != NULL))
    if not len(homeless):
        return
    known = np.flatnonzero(events.own_visit & (events.stay != NULL))
    pairs = np.stack([events.subject[known], events.stay[known]], 1)
    pairs, where = np.unique(pairs, axis=0, return_index=True)
    both = np.concatenate([pairs, np.stack([events.subject[homeless], events.stay[homeless]], 1)])
    _, number = np.unique(both, axis=0, return_inverse=True)
    number = number.reshape(-1)
    visit = np.full(number.max() + 1, NULL)
    visit[number[: len(pairs)]] = events.visit[known[where]]
    events.visit = events.visit.copy()
    events.visit[homeless] = visit[number[len(pairs) :]]
    events.own_visit = events.own_visit | (events.visit != NULL)


def _encode(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(row of the dictionary per entry, dictionary of strings)."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    return array.indices.to_numpy(), array.dictionary.cast(pa.string())


def integers(column: pa.ChunkedArray, null: int = int(NULL)) -> np.ndarray:
    if column.null_count == len(column):
        return np.broadcast_to(np.int64(null), len(column))  # takes no memory
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
    return (pc.fill_null(column, null) if column.null_count else column).to_numpy()


def _valid(column: pa.ChunkedArray) -> np.ndarray:
    return np.ones(len(column), bool) if not column.null_count else pc.is_valid(column).to_numpy()


def _plain(column: pa.ChunkedArray | pa.Array, dtype: pa.DataType) -> pa.Array:
    column = column.cast(dtype)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
