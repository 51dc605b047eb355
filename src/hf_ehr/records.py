"""EVENTS → RECORDS: one nested row per patient, built from the flat columns of a shard.

The rows are never visited one by one: one sort on a packed key brings the events of a visit together, run boundaries
become list offsets and the values are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr._event_columns import CODE_KIND_NUMBERS, KIND, NULL, Codes, Events, integers
from hf_ehr._sorting import changes, sort_order
from hf_ehr.schema import (
    CODE_KINDS,
    DISPOSITIONS,
    EVENT_SCHEMA,
    MEASUREMENT,
    NOTE,
    RECORD_SCHEMA,
    STATIC_FIELDS,
    STAY,
    TIMESTAMP,
    VISIT,
    VISIT_KINDS,
)

BLOCK = 1_000_000
"""Rows assembled at a time: large enough for whole-array steps, small enough for their memory to be used again."""

_HOUR = 3_600_000_000


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
    order = sort_order([integers(shard["subject_id"])])
    if order is not None:
        shard = shard.unify_dictionaries().combine_chunks().take(pa.array(order))
    codes, code = Codes.of(shard["code"])
    edges = _block_edges(integers(shard["subject_id"]))
    blocks = [_assemble_block(shard.slice(a, b - a), codes, code[a:b]) for a, b in pairwise(edges)]
    return pa.concat_tables([RECORD_SCHEMA.empty_table(), *blocks])


def _block_edges(subject: np.ndarray) -> list[int]:
    """Row numbers that cut a shard sorted by subject into blocks of whole patients."""
    wanted = range(BLOCK, len(subject), BLOCK)
    return sorted({0, len(subject), *(int(np.searchsorted(subject, subject[row])) for row in wanted)})


def _assemble_block(shard: pa.Table, codes: Codes, code: np.ndarray) -> pa.Table:
    events = Events.of(shard, codes, code)
    rows, visits = _group_visits(events)
    nested = pa.StructArray.from_arrays(_visit_columns(events, rows, visits), fields=list(VISIT))
    subjects = _subjects(events)
    offsets = np.append(np.searchsorted(visits.subject, subjects), len(visits.subject))
    fields = {
        "subject_id": pa.array(subjects),
        "birth_time": _first_time(events, subjects, "birth"),
        "death_time": _first_time(events, subjects, "death"),
        **_statics(events, subjects),
        "visits": _lists(offsets, nested, VISIT),
    }
    return pa.table([fields[name] for name in RECORD_SCHEMA.names], schema=RECORD_SCHEMA)


def _subjects(events: Events) -> np.ndarray:
    """Patients with a visit, a static field, a birth or a death."""
    first = np.flatnonzero(changes(events.subject))
    counted = (events.visit != NULL) | (events.kind <= KIND["birth"]) | (events.kind == KIND["death"])
    return events.subject[first][np.logical_or.reduceat(counted, first)] if len(first) else events.subject


def assemble_partition(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """``assemble`` for Spark's ``mapInArrow``: each partition must hold whole patients."""
    parts = list(batches)
    if parts:
        yield from assemble(pa.Table.from_batches(parts)).to_batches()


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


def _group_visits(events: Events) -> tuple[_Rows, _Visits]:
    """Brings the events of a visit together, in the order (kind, position, time, code), and sorts the visits."""
    placed = (events.kind > KIND["birth"]) & (events.kind != KIND["death"]) & (events.visit != NULL)
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
    first = np.flatnonzero(changes(subject, visit))
    rows = _Rows(event, np.repeat(np.arange(len(first)), np.diff(np.append(first, len(subject)))), kind)
    return _sort_visits(rows, _bounds(events, rows, first, subject, visit), first)


def _through(chosen: np.ndarray | None, order: np.ndarray | None, size: int) -> np.ndarray:
    if order is None:
        return np.arange(size) if chosen is None else chosen
    return order if chosen is None else chosen[order]


def _bounds(events: Events, rows: _Rows, first: np.ndarray, subject: np.ndarray, visit: np.ndarray) -> _Visits:
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
        event, number = rows.of_kind(KIND[name])
        whole = events.stay[event] == NULL
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


def _visit_columns(events: Events, rows: _Rows, visits: _Visits) -> list[pa.Array]:
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
    for name, kind in zip(CODE_KINDS, CODE_KIND_NUMBERS, strict=True):
        event, number = rows.of_kind(kind)
        available = _availability(events, event, number, visits, late=kind != KIND["medication"])
        kept = _first_available(events, event, number, available)
        if kept is not None:
            event, number, available = event[kept], number[kept], available[kept]
        offsets = _offsets(number, len(visits.visit))
        codes = events.codes.names.take(pa.array(events.code[event]))
        columns[name] = _lists(offsets, codes, pa.string())
        columns[f"{name}_at"] = _lists(offsets, _timestamps(available), TIMESTAMP)
    return [columns[field.name] for field in VISIT]


def _availability(events: Events, event: np.ndarray, number: np.ndarray, visits: _Visits, late: bool) -> np.ndarray:
    """When each code could be known; ``late`` codes are billing codes, known when the visit ends."""
    if late and events.own_visit.all():
        default = visits.end[number]
    else:
        billed = events.own_visit[event] if late else np.zeros(len(event), bool)
        default = np.where(billed, visits.end[number], events.time[event])
    if not events.timed:
        return default
    available = events.available[event]
    return np.where(available == NULL, default, available)


def _first_available(
    events: Events, event: np.ndarray, number: np.ndarray, available: np.ndarray
) -> np.ndarray | None:
    """Mask of the events to keep of codes repeated within a visit; None where none repeats."""
    code = events.code[event]
    order = sort_order([number, code])
    rows = np.arange(len(code)) if order is None else order
    new = changes(number[rows], code[rows])
    if new.all():
        return None
    repeated = ~(new & np.append(new[1:], True))
    rows, run = rows[repeated], np.cumsum(new[repeated])
    rows = rows[np.lexsort([rows, available[rows], run])]  # rows ascend by position and time
    kept = np.ones(len(event), bool)
    kept[rows[~changes(run)]] = False
    return kept


def _notes(events: Events, rows: _Rows, visits: int) -> pa.Array:
    event, number = rows.of_kind(KIND["note"])
    order = np.lexsort([events.code[event], events.time[event], number])
    event, number = event[order], number[order]
    category = events.codes.tails.take(pa.array(events.code[event]))
    columns = [_timestamps(events.time[event]), category, events.text(event)]
    return _lists(_offsets(number, visits), pa.StructArray.from_arrays(columns, fields=list(NOTE)), NOTE)


def _stays(events: Events, rows: _Rows, visits: int) -> pa.Array:
    """Stays of every visit by start, with their measurements by hour."""
    chosen = np.flatnonzero((events.stay != NULL)[rows.event])
    event, number, kind = rows.event[chosen], rows.visit[chosen], rows.kind[chosen]
    order = np.lexsort([events.code[event], events.time[event], events.stay[event], number])
    event, number, kind = event[order], number[order], kind[order]
    first = np.flatnonzero(changes(number, events.stay[event]))
    time = events.time[event]
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(event))))
    start = time[first]
    end = np.maximum.reduceat(time, first) if len(first) else start.copy()
    opens, closes = kind == KIND["admission"], kind == KIND["discharge"]
    start[group[opens][::-1]] = time[opens][::-1]  # of several the earliest opens and the latest closes
    end[group[closes]] = time[closes]
    measured = kind == KIND["measurement"]
    measurements = _measurements(events, event[measured], group[measured], start)
    stays = pa.StructArray.from_arrays(
        [pa.array(events.stay[event[first]]), _timestamps(start), _timestamps(end), measurements], fields=list(STAY)
    )
    order = np.lexsort([events.stay[event[first]], start, number[first]])
    return _lists(_offsets(number[first], visits), stays.take(pa.array(order)), STAY)


def _measurements(events: Events, event: np.ndarray, stay: np.ndarray, start: np.ndarray) -> pa.Array:
    hour = ((events.time[event] - start[stay]) / _HOUR).astype(np.float32)
    names = events.codes.names.take(pa.array(events.code[event]))
    columns = [pa.array(hour), names, events.value(event), events.text(event)]
    values = pa.StructArray.from_arrays(columns, fields=list(MEASUREMENT))
    return _lists(_offsets(stay, len(start)), values, MEASUREMENT)


def _statics(events: Events, subjects: np.ndarray) -> dict[str, pa.Array]:
    """The demographic fields; of several values of a field the first in alphabetical order counts."""
    rows = np.flatnonzero(events.kind == KIND["static"])
    result = {}
    for number, name in enumerate(STATIC_FIELDS.values()):
        mine = rows[events.codes.fields[events.code[rows]] == number]
        mine = mine[np.lexsort([events.code[mine], events.subject[mine]])]
        mine = mine[changes(events.subject[mine])]
        code = np.full(len(subjects), -1)
        code[np.searchsorted(subjects, events.subject[mine])] = events.code[mine]
        result[name] = events.codes.tails.take(pa.array(code, mask=code < 0))
    return result


def _first_time(events: Events, subjects: np.ndarray, kind: str) -> pa.Array:
    rows = np.flatnonzero(events.kind == KIND[kind])
    time = np.full(len(subjects), np.iinfo(np.int64).max)
    np.minimum.at(time, np.searchsorted(subjects, events.subject[rows]), events.time[rows])
    return pa.array(time, mask=time == np.iinfo(np.int64).max).cast(TIMESTAMP)


def _suffixes(events: Events, event: np.ndarray, allowed: tuple[str, ...]) -> pa.Array:
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


def _timestamps(time: np.ndarray) -> pa.Array:
    return pa.array(time).view(TIMESTAMP)


def _offsets(number: np.ndarray, groups: int) -> np.ndarray:
    """List offsets of rows that are sorted by ``number``."""
    return np.append(0, np.cumsum(np.bincount(number, minlength=groups)))


def _lists(offsets: np.ndarray, values: pa.Array, dtype: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, type=pa.list_(dtype))
