"""EVENTS → RECORDS: one nested row per patient, built from the flat columns of a shard.

The rows are never visited one by one: one sort on a packed key brings the events of a visit together, run boundaries
become list offsets and the values are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.schema import (
    CODE_KINDS,
    DISPOSITIONS,
    EVENT_SCHEMA,
    KINDS,
    MEASUREMENT,
    NOTE,
    RECORD_SCHEMA,
    STATIC_FIELDS,
    STAY,
    TIMESTAMP,
    VISIT,
    VISIT_KINDS,
)

DAY_VISIT_BASE = 1_000_000
"""``visit_id = -(epoch day + DAY_VISIT_BASE)`` of the visits made for events without one."""

BLOCK = 1_000_000
"""Rows assembled at a time: large enough for whole-array steps, small enough for their memory to be used again."""

_KIND = {name: number for number, name in enumerate(KINDS)}
_CODE_KINDS = [_KIND[name.removesuffix("s") if name != "diagnoses" else "diagnosis"] for name in CODE_KINDS]
_DAY = 86_400_000_000
_HOUR = 3_600_000_000
_NULL = np.iinfo(np.int64).min
_LAST = np.iinfo(np.int32).max


def assemble(shard: pa.Table) -> pa.Table:
    """Nested records of a shard of whole patients.

    - Visits: events with a ``visit_id``; codes and notes without one are grouped by calendar day (kind ``unknown``,
      from the first to the last event of the day). Start and end are the admission and the discharge, where there are
      none the first and the last event. Sorted by start.
    - Codes: by position, then time; a null position comes last. Of a code repeated within a visit the occurrence that
      was available first is kept: what is visible at a time t never depends on what became available after t.
    - ``available_at`` that is null: the end of the visit for a diagnosis or procedure with a ``visit_id``, else the
      time of the event.
    - Stays and measurements outside a visit stay in EVENTS only.

    Args:
        shard: EVENTS, in any order; ``code`` and ``kind`` may be dictionary-encoded, which is the fast way. A nullable
            column may be left out: it counts as null.

    Returns:
        RECORDS (``schema.RECORD_SCHEMA``), sorted by ``subject_id``.
    """
    absent = [field for field in EVENT_SCHEMA if field.nullable and field.name not in shard.column_names]
    for field in absent:
        shard = shard.append_column(field, pa.nulls(shard.num_rows, field.type))
    order = sort_order([_integers(shard["subject_id"])])
    if order is not None:
        shard = shard.unify_dictionaries().combine_chunks().take(pa.array(order))
    codes, code = _Codes.of(shard["code"])
    edges = _block_edges(_integers(shard["subject_id"]))
    blocks = [_assemble_block(shard.slice(a, b - a), codes, code[a:b]) for a, b in pairwise(edges)]
    return pa.concat_tables([RECORD_SCHEMA.empty_table(), *blocks])


def _block_edges(subject: np.ndarray) -> list[int]:
    """Row numbers that cut a shard sorted by subject into blocks of whole patients."""
    wanted = range(BLOCK, len(subject), BLOCK)
    return sorted({0, len(subject), *(int(np.searchsorted(subject, subject[row])) for row in wanted)})


def _assemble_block(shard: pa.Table, codes: _Codes, code: np.ndarray) -> pa.Table:
    events = _Events.of(shard, codes, code)
    rows, visits = _group_visits(events)
    nested = pa.StructArray.from_arrays(_visit_columns(events, rows, visits), fields=list(VISIT))
    subjects = events.subject[_changes(events.subject)]
    offsets = np.append(np.searchsorted(visits.subject, subjects), len(visits.subject))
    fields = {
        "subject_id": pa.array(subjects),
        "birth_time": _first_time(events, subjects, "birth"),
        "death_time": _first_time(events, subjects, "death"),
        **_statics(events, subjects),
        "visits": _lists(offsets, nested, VISIT),
    }
    return pa.table([fields[name] for name in RECORD_SCHEMA.names], schema=RECORD_SCHEMA)


def assemble_partition(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """``assemble`` for Spark's ``mapInArrow``: each partition must hold whole patients."""
    parts = list(batches)
    if parts:
        yield from assemble(pa.Table.from_batches(parts)).to_batches()


@dataclass
class _Codes:
    """The distinct codes of a shard, sorted."""

    names: pa.Array
    tails: pa.Array  # what follows the slash
    fields: np.ndarray  # row in STATIC_FIELDS of what precedes it, -1 if none

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> tuple[_Codes, np.ndarray]:
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
class _Events:
    """The columns of a block as flat arrays, one entry per event. Times are microseconds, ``_NULL`` where null."""

    subject: np.ndarray
    time: np.ndarray
    kind: np.ndarray  # number in KINDS
    code: np.ndarray  # row of `codes`
    codes: _Codes
    visit: np.ndarray  # visit id, made up from the day where the event has none, _NULL where it belongs to no visit
    own_visit: np.ndarray  # whether the event came with a visit id
    stay: np.ndarray
    position: np.ndarray
    available: np.ndarray
    timed: bool  # whether any event says when it was available
    shard: pa.Table

    @classmethod
    def of(cls, shard: pa.Table, codes: _Codes, code: np.ndarray) -> _Events:
        kind, kinds = _encode(shard["kind"])
        numbers = pc.fill_null(pc.index_in(kinds, value_set=pa.array(KINDS)), -1).to_numpy(zero_copy_only=False)
        events = cls(
            subject=_integers(shard["subject_id"]),
            time=_integers(shard["time"]),
            kind=numbers.astype(np.int8)[kind],
            code=code,
            codes=codes,
            visit=_integers(shard["visit_id"]),
            own_visit=_valid(shard["visit_id"]),
            stay=_integers(shard["stay_id"]),
            position=_integers(shard["position"], null=_LAST),
            available=_integers(shard["available_at"]),
            timed=shard["available_at"].null_count < shard.num_rows,
            shard=shard,
        )
        events._place_in_visits()
        return events

    def _place_in_visits(self) -> None:
        if self.own_visit.all():
            return
        _visits_of_stays(self)
        daily = ~self.own_visit & np.isin(self.kind, [*_CODE_KINDS, _KIND["note"]])
        if daily.any():
            self.visit = np.where(daily, -(self.time // _DAY + DAY_VISIT_BASE), self.visit)

    def text(self, rows: np.ndarray) -> pa.Array:
        return _plain(self.shard["text_value"].take(pa.array(rows)), pa.string())

    def value(self, rows: np.ndarray) -> pa.Array:
        return _plain(self.shard["numeric_value"].take(pa.array(rows)), pa.float32())


@dataclass
class _Visits:
    """One entry per visit, sorted by (subject, start, visit id)."""

    subject: np.ndarray
    visit: np.ndarray
    start: np.ndarray
    end: np.ndarray
    admission: np.ndarray  # the event that opens it, -1 if none
    discharge: np.ndarray  # the event that closes it, -1 if none


@dataclass
class _Rows:
    """The events of all visits in visit order: event number, visit number and kind of each."""

    event: np.ndarray
    visit: np.ndarray
    kind: np.ndarray

    def of_kind(self, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """(event numbers, visit numbers) of one kind."""
        chosen = self.kind == kind
        return (self.event, self.visit) if chosen.all() else (self.event[chosen], self.visit[chosen])


def _group_visits(events: _Events) -> tuple[_Rows, _Visits]:
    """Brings the events of a visit together, in the order (kind, position, time, code), and sorts the visits."""
    placed = (events.kind > _KIND["birth"]) & (events.kind != _KIND["death"]) & (events.visit != _NULL)
    chosen = None if placed.all() else np.flatnonzero(placed)
    pick = (lambda column: column) if chosen is None else (lambda column: column[chosen])
    subject, visit, kind = pick(events.subject), pick(events.visit), pick(events.kind)
    descending = not events.own_visit.any()  # days count backwards, so that they come out in order of time
    keys = [
        subject,
        -visit if descending else visit,
        kind,
        pick(events.position),
        pick(events.time),
        pick(events.code),
    ]
    order = sort_order(keys)
    if order is not None:
        subject, visit, kind = subject[order], visit[order], kind[order]
    event = _through(chosen, order, len(subject))
    first = np.flatnonzero(_changes(subject, visit))
    rows = _Rows(event, np.repeat(np.arange(len(first)), np.diff(np.append(first, len(subject)))), kind)
    return _sort_visits(rows, _bounds(events, rows, first, subject, visit), first)


def _through(chosen: np.ndarray | None, order: np.ndarray | None, size: int) -> np.ndarray:
    if order is None:
        return np.arange(size) if chosen is None else chosen
    return order if chosen is None else chosen[order]


def _changes(*columns: np.ndarray) -> np.ndarray:
    """True at the first row of every run of equal values."""
    changed = np.ones(len(columns[0]), bool)
    if len(changed):
        np.not_equal(columns[0][1:], columns[0][:-1], out=changed[1:])
        for column in columns[1:]:
            changed[1:] |= column[1:] != column[:-1]
    return changed


def _bounds(events: _Events, rows: _Rows, first: np.ndarray, subject: np.ndarray, visit: np.ndarray) -> _Visits:
    time = events.time[rows.event]
    visits = _Visits(
        subject=subject[first],
        visit=visit[first],
        start=np.minimum.reduceat(time, first) if len(first) else time,
        end=np.maximum.reduceat(time, first) if len(first) else time,
        admission=np.full(len(first), -1),
        discharge=np.full(len(first), -1),
    )
    for name, event_of, last in (("admission", visits.admission, False), ("discharge", visits.discharge, True)):
        event, number = rows.of_kind(_KIND[name])
        whole = events.stay[event] == _NULL
        event, number = event[whole], number[whole]
        order = np.argsort(events.time[event], kind="stable")
        order = order if last else order[::-1]  # of several the assignment keeps the last
        event_of[number[order]] = event[order]
    opened, closed = visits.admission >= 0, visits.discharge >= 0
    visits.start[opened] = events.time[visits.admission[opened]]
    visits.end[closed] = events.time[visits.discharge[closed]]
    np.maximum(visits.start, visits.end, out=visits.end)
    return visits


def _sort_visits(rows: _Rows, visits: _Visits, first: np.ndarray) -> tuple[_Rows, _Visits]:
    order = sort_order([visits.subject, visits.start, visits.visit])
    if order is None:
        return rows, visits
    sizes = np.diff(np.append(first, len(rows.event)))[order]
    ends = np.cumsum(sizes)
    gather = np.arange(len(rows.event)) + np.repeat(first[order] - (ends - sizes), sizes)
    moved = _Rows(rows.event[gather], np.repeat(np.arange(len(order)), sizes), rows.kind[gather])
    return moved, _Visits(**{name: column[order] for name, column in vars(visits).items()})


def _visit_columns(events: _Events, rows: _Rows, visits: _Visits) -> list[pa.Array]:
    """The columns of the struct ``schema.VISIT``."""
    columns = {
        "visit_id": pa.array(visits.visit),
        "start": _timestamps(visits.start),
        "end": _timestamps(visits.end),
        "kind": pc.fill_null(_suffixes(events, visits.admission, VISIT_KINDS), "unknown"),
        "planned": pc.equal(_optional(events.value, visits.admission, pa.float32()), 1.0),
        "discharged_to": _suffixes(events, visits.discharge, DISPOSITIONS),
        "notes": _notes(events, rows, len(visits.visit)),
        "stays": _stays(events, rows, len(visits.visit)),
    }
    for name, kind in zip(CODE_KINDS, _CODE_KINDS, strict=True):
        event, number = rows.of_kind(kind)
        available = _availability(events, event, number, visits, late=kind != _KIND["medication"])
        kept = _first_available(events, event, number, available)
        if kept is not None:
            event, number, available = event[kept], number[kept], available[kept]
        offsets = _offsets(number, len(visits.visit))
        codes = events.codes.names.take(pa.array(events.code[event]))
        columns[name] = _lists(offsets, codes, pa.string())
        columns[f"{name}_at"] = _lists(offsets, _timestamps(available), TIMESTAMP)
    return [columns[field.name] for field in VISIT]


def _availability(events: _Events, event: np.ndarray, number: np.ndarray, visits: _Visits, late: bool) -> np.ndarray:
    """When each code could be known; ``late`` codes are billing codes, known when the visit ends."""
    if late and events.own_visit.all():
        default = visits.end[number]
    else:
        billed = events.own_visit[event] if late else np.zeros(len(event), bool)
        default = np.where(billed, visits.end[number], events.time[event])
    if not events.timed:
        return default
    available = events.available[event]
    return np.where(available == _NULL, default, available)


def _first_available(
    events: _Events, event: np.ndarray, number: np.ndarray, available: np.ndarray
) -> np.ndarray | None:
    """Mask of the events to keep of codes repeated within a visit; None where none repeats."""
    code = events.code[event]
    order = sort_order([number, code])
    rows = np.arange(len(code)) if order is None else order
    new = _changes(number[rows], code[rows])
    if new.all():
        return None
    repeated = ~(new & np.append(new[1:], True))
    rows, run = rows[repeated], np.cumsum(new[repeated])
    rows = rows[np.lexsort([rows, available[rows], run])]  # rows ascend by position and time
    kept = np.ones(len(event), bool)
    kept[rows[~_changes(run)]] = False
    return kept


def _notes(events: _Events, rows: _Rows, visits: int) -> pa.Array:
    event, number = rows.of_kind(_KIND["note"])
    order = np.lexsort([events.code[event], events.time[event], number])
    event, number = event[order], number[order]
    category = events.codes.tails.take(pa.array(events.code[event]))
    columns = [_timestamps(events.time[event]), category, events.text(event)]
    return _lists(_offsets(number, visits), pa.StructArray.from_arrays(columns, fields=list(NOTE)), NOTE)


def _stays(events: _Events, rows: _Rows, visits: int) -> pa.Array:
    """Stays of every visit by start, with their measurements by hour."""
    chosen = np.flatnonzero((events.stay != _NULL)[rows.event])
    event, number, kind = rows.event[chosen], rows.visit[chosen], rows.kind[chosen]
    order = np.lexsort([events.code[event], events.time[event], events.stay[event], number])
    event, number, kind = event[order], number[order], kind[order]
    first = np.flatnonzero(_changes(number, events.stay[event]))
    time = events.time[event]
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(event))))
    start = time[first]
    end = np.maximum.reduceat(time, first) if len(first) else start.copy()
    opens, closes = kind == _KIND["admission"], kind == _KIND["discharge"]
    start[group[opens][::-1]] = time[opens][::-1]  # of several the earliest opens and the latest closes
    end[group[closes]] = time[closes]
    measured = kind == _KIND["measurement"]
    measurements = _measurements(events, event[measured], group[measured], start)
    stays = pa.StructArray.from_arrays(
        [pa.array(events.stay[event[first]]), _timestamps(start), _timestamps(end), measurements], fields=list(STAY)
    )
    order = np.lexsort([events.stay[event[first]], start, number[first]])
    return _lists(_offsets(number[first], visits), stays.take(pa.array(order)), STAY)


def _measurements(events: _Events, event: np.ndarray, stay: np.ndarray, start: np.ndarray) -> pa.Array:
    hour = ((events.time[event] - start[stay]) / _HOUR).astype(np.float32)
    names = events.codes.names.take(pa.array(events.code[event]))
    columns = [pa.array(hour), names, events.value(event), events.text(event)]
    values = pa.StructArray.from_arrays(columns, fields=list(MEASUREMENT))
    return _lists(_offsets(stay, len(start)), values, MEASUREMENT)


def _visits_of_stays(events: _Events) -> None:
    """Gives events of a stay that lack a visit the visit of the stay's other events."""
    homeless = np.flatnonzero(~events.own_visit & (events.stay != _NULL))
    if not len(homeless):
        return
    known = np.flatnonzero(events.own_visit & (events.stay != _NULL))
    pairs = np.stack([events.subject[known], events.stay[known]], 1)
    pairs, where = np.unique(pairs, axis=0, return_index=True)
    both = np.concatenate([pairs, np.stack([events.subject[homeless], events.stay[homeless]], 1)])
    _, number = np.unique(both, axis=0, return_inverse=True)
    number = number.reshape(-1)
    visit = np.full(number.max() + 1, _NULL)
    visit[number[: len(pairs)]] = events.visit[known[where]]
    events.visit = events.visit.copy()
    events.visit[homeless] = visit[number[len(pairs) :]]
    events.own_visit = events.own_visit | (events.visit != _NULL)


def _statics(events: _Events, subjects: np.ndarray) -> dict[str, pa.Array]:
    """The demographic fields; of several values of a field the first in alphabetical order counts."""
    rows = np.flatnonzero(events.kind == _KIND["static"])
    result = {}
    for number, name in enumerate(STATIC_FIELDS.values()):
        mine = rows[events.codes.fields[events.code[rows]] == number]
        mine = mine[np.lexsort([events.code[mine], events.subject[mine]])]
        mine = mine[_changes(events.subject[mine])]
        code = np.full(len(subjects), -1)
        code[np.searchsorted(subjects, events.subject[mine])] = events.code[mine]
        result[name] = events.codes.tails.take(pa.array(code, mask=code < 0))
    return result


def _first_time(events: _Events, subjects: np.ndarray, kind: str) -> pa.Array:
    rows = np.flatnonzero(events.kind == _KIND[kind])
    time = np.full(len(subjects), np.iinfo(np.int64).max)
    np.minimum.at(time, np.searchsorted(subjects, events.subject[rows]), events.time[rows])
    return pa.array(time, mask=time == np.iinfo(np.int64).max).cast(TIMESTAMP)


def _suffixes(events: _Events, event: np.ndarray, allowed: tuple[str, ...]) -> pa.Array:
    """What follows the slash in each event's code, ``unknown`` if not ``allowed``, null where there is no event."""
    there = event >= 0
    distinct, index = np.unique(events.code[event[there]], return_inverse=True)
    tails = events.codes.tails.take(pa.array(distinct))
    tails = pc.if_else(pc.is_in(tails, value_set=pa.array(allowed)), tails, "unknown")
    rows = np.full(len(event), -1)
    rows[there] = index
    return tails.take(pa.array(rows, mask=~there))


def _optional(values, event: np.ndarray, dtype: pa.DataType) -> pa.Array:
    """``values(rows)`` with nulls where ``event`` is -1."""
    there = event >= 0
    number = np.cumsum(there) - 1
    return values(event[there]).take(pa.array(number, mask=~there)) if there.any() else pa.nulls(len(event), dtype)


def sort_order(keys: Sequence[np.ndarray]) -> np.ndarray | None:
    """Order that sorts rows by integer ``keys``, the first one first; None if they are in order already.

    As many bits of the keys as fit are packed into a 64-bit word in front of the row number, so that one plain sort of
    words, several times faster than an argsort, yields the order. Rows that are still tied go through further rounds
    with the bits that are left.
    """
    if _in_order(keys):
        return None
    bits = [(key, *_span(key)) for key in keys]
    order: np.ndarray | None = None
    places: np.ndarray | None = None  # where in the order rows are still tied; None for everywhere
    rank = np.zeros(len(keys[0]), np.uint64)
    while len(rank) and bits:
        index_bits = len(rank).bit_length()
        room = 64 - index_bits - int(rank[-1]).bit_length()
        word, bits = _pack(rank, bits, room, None if order is None else order[places])
        word <<= np.uint64(index_bits)
        word |= np.arange(len(word), dtype=np.uint64)
        word.sort()
        index = (word & np.uint64((1 << index_bits) - 1)).view(np.int64)
        if order is None or places is None:
            order = index
        else:
            order[places] = order[places[index]]
        if bits:
            new = _changes(word >> np.uint64(index_bits))
            tied = np.flatnonzero(~(new & np.append(new[1:], True)))
            places = tied if places is None else places[tied]
            rank = (np.cumsum(new[tied]) - 1).astype(np.uint64)
    return order


def _in_order(keys: Sequence[np.ndarray]) -> bool:
    equal = np.ones(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        if (equal & (key[1:] < key[:-1])).any():
            return False
        equal &= key[1:] == key[:-1]
    return True


def _span(key: np.ndarray) -> tuple[int, int]:
    """(lowest value, number of bits of what is above it)."""
    return int(key.min()), (int(key.max()) - int(key.min())).bit_length()


def _pack(
    rank: np.ndarray, bits: list[tuple[np.ndarray, int, int]], room: int, rows: np.ndarray | None
) -> tuple[np.ndarray, list[tuple[np.ndarray, int, int]]]:
    """``rank`` followed by up to ``room`` bits of the keys: (words, what is left as (key, lowest value, bits))."""
    word, left = rank.copy(), list(bits)
    while left and room:
        key, low, size = left.pop(0)
        taken = min(size, room)
        if taken:
            value = (key if rows is None else key[rows]).astype(np.int64).view(np.uint64)
            value -= np.uint64(low % 2**64)
            if taken < size or size < key.itemsize * 8:  # the bits above were used up in a round before
                value &= np.uint64(2**size - 1)
            value >>= np.uint64(size - taken)
            word <<= np.uint64(taken)
            word |= value
        room -= taken
        if taken < size:
            left.insert(0, (key, low, size - taken))
    return word, left


def _encode(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(row of the dictionary per entry, dictionary of strings)."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    return array.indices.to_numpy(), array.dictionary.cast(pa.string())


def _integers(column: pa.ChunkedArray, null: int = int(_NULL)) -> np.ndarray:
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


def _timestamps(time: np.ndarray) -> pa.Array:
    return pa.array(time).view(TIMESTAMP)


def _offsets(number: np.ndarray, groups: int) -> np.ndarray:
    """List offsets of rows that are sorted by ``number``."""
    return np.append(0, np.cumsum(np.bincount(number, minlength=groups)))


def _lists(offsets: np.ndarray, values: pa.Array, dtype: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, type=pa.list_(dtype))
