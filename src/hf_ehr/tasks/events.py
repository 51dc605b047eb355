"""RECORDS as flat arrays, and the moments at which predicates hold. No loop over patients or codes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.schema import CODE_KINDS, EhrDataError
from hf_ehr.tasks.definition import ANY_EVENT, CodeKind, Predicate

MISSING = np.iinfo(np.int64).min
HOUR = 3_600_000_000
DAY = 24 * HOUR
LISTS = dict(zip(("diagnosis", "procedure", "medication"), CODE_KINDS, strict=True))


@dataclass(frozen=True)
class Events:
    """The moments of a predicate, one per (patient, time, visit) and in that order.

    Attributes:
        patient: (events,) int64, row of the patient in RECORDS.
        time: (events,) int64, µs since the epoch.
        visit: (events,) int64, ordinal of the visit in the table, -1 outside visits.
        known: (events,) int64, µs: when it could first be known.
    """

    patient: np.ndarray
    time: np.ndarray
    visit: np.ndarray
    known: np.ndarray

    @classmethod
    def sorted(cls, patient: np.ndarray, time: np.ndarray, visit: np.ndarray, known: np.ndarray) -> Events:
        """Drops moments without a time, sorts the others and keeps the earliest known of equal ones."""
        order = np.lexsort((known, visit, time, patient))
        order = order[time[order] != MISSING]
        columns = [column[order] for column in (patient, time, visit)]
        new = np.ones(len(order), dtype=bool)
        new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        return cls(patient[order][new], time[order][new], visit[order][new], known[order][new])

    def where(self, mask: np.ndarray) -> Events:
        """The moments that `mask` keeps, (events,) bool."""
        return Events(self.patient[mask], self.time[mask], self.visit[mask], self.known[mask])


class Timeline:
    """Counts and finds moments within groups (patients or visits) by binary search.

    Times are replaced by their rank among the distinct times, so that group and time fit one sortable key.
    """

    def __init__(self, group: np.ndarray, time: np.ndarray) -> None:
        self._times, rank = np.unique(time, return_inverse=True)
        self._width = len(self._times) + 1
        self._keys = np.sort(group * self._width + rank)

    def _before(self, group: np.ndarray, time: np.ndarray, side: str) -> np.ndarray:
        """Position in the sorted keys of the first moment of `group` at (``left``) or after (``right``) `time`."""
        rank = np.searchsorted(self._times, time, side=side)  # type: ignore[call-overload]
        return np.searchsorted(self._keys, group * self._width + rank, side="left")

    def count(self, group: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Moments of `group` in the closed interval [start, end], (queries,) int64."""
        return np.maximum(0, self._before(group, end, "right") - self._before(group, start, "left"))

    def next(self, group: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Time of the first moment of `group` at or after `time`, MISSING where there is none."""
        return self._at(group, self._before(group, time, "left"))

    def previous(self, group: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Time of the last moment of `group` at or before `time`, MISSING where there is none."""
        return self._at(group, self._before(group, time, "right") - 1)

    def _at(self, group: np.ndarray, position: np.ndarray) -> np.ndarray:
        found = (position >= 0) & (position < len(self._keys))
        keys = np.full(len(position), -1, dtype=np.int64)
        keys[found] = self._keys[position[found]]
        found = keys // self._width == group
        times = np.full(len(position), MISSING, dtype=np.int64)
        times[found] = self._times[keys[found] % self._width]
        return times


@dataclass(frozen=True)
class Codes:
    """The codes of one kind, flat.

    Attributes:
        visit: (codes,) int64, ordinal of the visit.
        time: (codes,) int64, µs.
        known: (codes,) int64, µs.
        index: (codes,) int64, into `names`.
        names: The distinct codes.
        principal: (codes,) bool, first of its visit's list.
        value: (codes,) float64, NaN where there is none.
    """

    visit: np.ndarray
    time: np.ndarray
    known: np.ndarray
    index: np.ndarray
    names: pa.Array
    principal: np.ndarray
    value: np.ndarray

    def matches(self, patterns: tuple[str, ...]) -> np.ndarray:
        """(names,) bool: which distinct codes one of `patterns` describes."""
        if not patterns or not len(self.names):
            return np.zeros(len(self.names), dtype=bool)
        regex = "|".join(f"(?:{code_regex(pattern)})" for pattern in patterns)
        return pc.match_substring_regex(self.names, regex).to_numpy(zero_copy_only=False)


class History:
    """Flat views of a RECORDS table, made on first use.

    Args:
        records: RECORDS, or as much of it as the task reads.
    """

    def __init__(self, records: pa.Table) -> None:
        self.subject_id = records["subject_id"].to_numpy()
        self.birth = micros(records["birth_time"])
        self.death = micros(records["death_time"])
        lists = _one_chunk(records["visits"])
        self._visits = pc.list_flatten(lists)
        self.patient = _numpy(pc.list_parent_indices(lists))
        self.start = micros(self.field("start"))
        self.end = micros(self.field("end"))

    def field(self, name: str) -> pa.Array:
        """A field of every visit, (visits,)."""
        return pc.struct_field(self._visits, name)

    @cached_property
    def kinds(self) -> np.ndarray:
        """(visits,) object, the kinds of the visits."""
        return self.field("kind").to_numpy(zero_copy_only=False)

    def stays(self, edge: str) -> tuple[np.ndarray, np.ndarray]:
        """Times at which intensive care stays ``start`` or ``end``, µs, and ordinals of their visits, (stays,)."""
        lists = self.field("stays")
        return micros(pc.struct_field(pc.list_flatten(lists), edge)), _numpy(pc.list_parent_indices(lists))

    @cached_property
    def _codes(self) -> dict[str, Codes]:
        return {}

    def codes(self, kind: str) -> Codes:
        """The codes of `kind`, read once."""
        if kind not in self._codes:
            self._codes[kind] = self._measurements() if kind == "measurement" else self._listed(LISTS[kind])
        return self._codes[kind]

    def _listed(self, name: str) -> Codes:
        lists, at = self.field(name), self.field(f"{name}_at")
        visit, known = _numpy(pc.list_parent_indices(lists)), micros(pc.list_flatten(at))
        if len(visit) != len(known):
            raise EhrDataError(
                f"`{name}_at` must have one time for each of `{name}`, got {len(known)} for {len(visit)}."
            )
        first = np.ones(len(visit), dtype=bool)
        first[1:] = visit[1:] != visit[:-1]
        index, names = _encode(pc.list_flatten(lists))
        # A code whose availability nobody recorded is known at the end of its visit, never earlier.
        known = np.where(known == MISSING, self.end[visit], known)
        return Codes(visit, self.start[visit], known, index, names, first, np.full(len(visit), np.nan))

    def _measurements(self) -> Codes:
        lists = self.field("stays")
        stays, visit_of_stay = pc.list_flatten(lists), _numpy(pc.list_parent_indices(lists))
        inner = pc.struct_field(stays, "measurements")
        rows, stay = pc.list_flatten(inner), _numpy(pc.list_parent_indices(inner))
        hour = pc.struct_field(rows, "hour").cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False)
        start = micros(pc.struct_field(stays, "start"))[stay]
        time = np.where(start == MISSING, MISSING, start + np.round(hour * HOUR).astype(np.int64))
        index, names = _encode(pc.struct_field(rows, "name"))
        value = pc.struct_field(rows, "value").cast(pa.float64()).to_numpy(zero_copy_only=False)
        return Codes(visit_of_stay[stay], time, time, index, names, np.zeros(len(stay), dtype=bool), value)


def predicate_events(
    history: History, predicates: Mapping[str, Predicate], present: frozenset[str]
) -> dict[str, Events]:
    """The moments of every predicate, by name, in the order of their definition.

    Args:
        history: The patients.
        predicates: The definitions; one that uses another comes after it.
        present: Confirming predicates whose kind of data exists; a confirmation none of whose predicates is in it is
            not applied (the cohort flow says so).
    """
    found = {ANY_EVENT: _base(history, Predicate(kind="any"), {})}
    for name, predicate in predicates.items():
        events = _base(history, predicate, found)
        events = events.where(_of_age(history, predicate, events))
        if present.intersection(predicate.confirmed_by):
            events = events.where(_confirmed(predicate, events, found))
        found[name] = events
    return found


def confirming_data(history: History, predicates: Mapping[str, Predicate]) -> frozenset[str]:
    """Names of the confirming predicates that the data could have satisfied at all.

    A pattern could when its vocabulary occurs among the codes of its kind; a measurement, a wildcard vocabulary or a
    regular expression only when the pattern itself occurs.
    """
    names = {name for predicate in predicates.values() for name in predicate.confirmed_by}
    return frozenset(name for name in names if _could_hold(history, predicates, name))


def unreadable_share(history: History, predicate: Predicate) -> float:
    """Share of the codes of the predicate's kind that are bare numbers of a vocabulary it does not name (e.g. NDC)."""
    vocabularies = {pattern.partition("/")[0] for pattern in predicate.codes}
    numbers = total = 0
    for kind in code_kinds(predicate):
        codes = history.codes(kind)
        named = codes.matches(tuple(f"{vocabulary}/*" for vocabulary in vocabularies if vocabulary != "*"))
        opaque = codes.matches((r"^[^/]+/[0-9-]+$",)) & ~named
        numbers += int(np.sum(opaque[codes.index])) if len(opaque) else 0
        total += len(codes.index)
    return numbers / total if total else 0.0


def code_regex(pattern: str) -> str:
    """The regular expression of a code pattern: ``ICD9CM/250.?0`` → ``(?i)^ICD9CM/250\\..0$``."""
    if pattern.startswith("^"):
        return pattern
    parts = re.split(r"(\*|\?|\[[^\]]+\])", pattern)
    wild = {"*": ".*", "?": "."}
    return "(?i)^" + "".join(wild.get(p, p if p.startswith("[") else re.escape(p)) for p in parts) + "$"


def micros(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Timestamps as int64 µs, MISSING for null."""
    return _numpy(_one_chunk(column).cast(pa.timestamp("us")).cast(pa.int64()).fill_null(MISSING))


def _could_hold(history: History, predicates: Mapping[str, Predicate], name: str) -> bool:
    predicate = predicates[name]
    if predicate.any_of:
        return any(_could_hold(history, predicates, part) for part in predicate.any_of)
    for kind in code_kinds(predicate):
        codes = history.codes(kind)
        vocabularies = tuple(_whole_vocabulary(pattern, kind) for pattern in predicate.codes)
        if len(codes.names) and (not predicate.codes or codes.matches(vocabularies).any()):
            return True
    return predicate.kind is not None and predicate.kind not in get_args(CodeKind)


def _whole_vocabulary(pattern: str, kind: str) -> str:
    vocabulary = pattern.partition("/")[0]
    exact = kind == "measurement" or any(mark in vocabulary for mark in "^*?[")
    return pattern if exact else f"{vocabulary}/*"


def code_kinds(predicate: Predicate) -> tuple[str, ...]:
    """The kinds of code a predicate looks at by itself."""
    if predicate.kind is None:
        return get_args(CodeKind) if predicate.codes else ()
    return (predicate.kind,) if predicate.kind in get_args(CodeKind) else ()


def _base(history: History, predicate: Predicate, found: Mapping[str, Events]) -> Events:
    """The moments before age and confirmation are asked for."""
    if predicate.any_of:
        return _union([found[name] for name in predicate.any_of])
    kinds = code_kinds(predicate)
    parts = [_coded(history, predicate, kind) for kind in kinds] if kinds else list(_plain(history, predicate))
    return _union(parts)


def _coded(history: History, predicate: Predicate, kind: str) -> Events:
    codes = history.codes(kind)
    wanted = codes.matches(predicate.codes) if predicate.codes else np.ones(len(codes.names), dtype=bool)
    wanted &= ~codes.matches(predicate.except_codes)
    keep = wanted[codes.index] if len(wanted) else np.zeros(len(codes.index), dtype=bool)
    if predicate.principal:
        keep &= codes.principal
    if predicate.value_min is not None:
        above = np.greater_equal if predicate.value_min_inclusive else np.greater
        keep &= above(codes.value, predicate.value_min)
    if predicate.value_max is not None:
        below = np.less_equal if predicate.value_max_inclusive else np.less
        keep &= below(codes.value, predicate.value_max)
    if predicate.visit_kinds:
        keep &= np.isin(history.kinds, predicate.visit_kinds)[codes.visit]
    visit, known = codes.visit[keep], codes.known[keep]
    return Events.sorted(history.patient[visit], known if predicate.when_known else codes.time[keep], visit, known)


def _plain(history: History, predicate: Predicate) -> Iterator[Events]:
    """Admissions, discharges, deaths and births, which ``any`` is all of; and stays."""
    kind, visits = predicate.kind, np.arange(len(history.patient))
    keep = np.ones(len(visits), dtype=bool)
    if predicate.visit_kinds:
        keep &= np.isin(history.kinds, predicate.visit_kinds)
    if predicate.discharged_to:
        keep &= _is_in(history.field("discharged_to"), predicate.discharged_to)
    if predicate.unplanned:
        keep &= ~history.field("planned").fill_null(False).to_numpy(zero_copy_only=False).astype(bool)
    if predicate.longer_than_days is not None:
        known = (history.start != MISSING) & (history.end != MISSING)
        keep &= known & (np.where(known, history.end - history.start, 0) > predicate.longer_than_days * DAY)
    for name, times in (("admission", history.start), ("discharge", history.end)):
        if kind in (name, "any"):
            yield Events.sorted(history.patient[keep], times[keep], visits[keep], times[keep])
    if kind in ("stay", "stay_end"):
        times, visit = history.stays("start" if kind == "stay" else "end")
        chosen = keep[visit]
        yield Events.sorted(history.patient[visit][chosen], times[chosen], visit[chosen], times[chosen])
    for name, times in (("death", history.death), ("birth", history.birth)):
        if kind in (name, "any"):
            patients = np.arange(len(times))
            yield Events.sorted(patients, times, np.full(len(times), -1), times)


def _of_age(history: History, predicate: Predicate, events: Events) -> np.ndarray:
    """(events,) bool: whether the patient has the age asked for, in completed years."""
    keep = np.ones(len(events.time), dtype=bool)
    birth = history.birth[events.patient]
    if predicate.min_age is not None:
        keep &= (birth != MISSING) & (events.time >= birthday(birth, predicate.min_age))
    if predicate.below_age is not None:
        keep &= (birth != MISSING) & (events.time < birthday(birth, predicate.below_age))
    return keep


def birthday(birth: np.ndarray, years: int) -> np.ndarray:
    """The moment `years` after `birth` by the calendar, µs; 29 February falls on 1 March."""
    moment = np.where(birth == MISSING, 0, birth).astype("datetime64[us]")
    month = moment.astype("datetime64[M]")
    return ((month + 12 * years).astype("datetime64[us]") + (moment - month.astype("datetime64[us]"))).astype(np.int64)


def _confirmed(predicate: Predicate, events: Events, found: Mapping[str, Events]) -> np.ndarray:
    """(events,) bool: at least k of the confirming predicates back the event."""
    earliest = np.full(len(events.time), MISSING + 1)
    latest = events.known if predicate.confirmed == "so_far" else np.full(len(events.time), np.iinfo(np.int64).max)
    by_visit = predicate.confirmed == "visit"
    group = events.visit if by_visit else events.patient
    backing = np.zeros(len(events.time), dtype=np.int64)
    for name in predicate.confirmed_by:
        evidence = found[name]
        timeline = Timeline(evidence.visit if by_visit else evidence.patient, evidence.known)
        backing += timeline.count(group, earliest, latest) > 0
    return backing >= predicate.at_least


def _union(parts: list[Events]) -> Events:
    columns = ([getattr(part, name) for part in parts] for name in ("patient", "time", "visit", "known"))
    return Events.sorted(*(np.concatenate(column) for column in columns))


def _encode(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Strings as (index, distinct values); a null becomes the empty string, which no pattern describes."""
    encoded = values.fill_null("").dictionary_encode()
    return _numpy(encoded.indices), encoded.dictionary


def _is_in(column: pa.Array, values: tuple[str, ...]) -> np.ndarray:
    return pc.is_in(column, pa.array(values, pa.string())).to_numpy(zero_copy_only=False)


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.int64)


def _one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
