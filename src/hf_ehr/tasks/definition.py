"""The words of the task language: predicates, windows, rules, outcome. Data only, nothing is computed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from hf_ehr.schema import DISPOSITIONS, STATIC_FIELDS, VISIT_KINDS

T = TypeVar("T")

CodeKind = Literal["diagnosis", "procedure", "medication", "measurement"]
EventKind = Literal["admission", "discharge", "stay", "stay_end", "death", "birth", "any"]
Scope = Literal["patient", "visit", "other_visits"]
Clock = Literal["time", "known"]
Confirmation = Literal["ever", "so_far", "visit"]
DeathRule = Literal["exclude", "composite", "ignore"]

ANY_EVENT = "_ANY_EVENT"
"""Reserved predicate name (as in ACES): an admission, a discharge, a death or a birth."""


@dataclass(frozen=True)
class Predicate:
    """What to look for; it holds at moments, at most one per visit and time.

    A code holds at the start of its visit (the date of the encounter) and is *known* when its ``*_at`` says so.
    Admissions are visit starts, discharges visit ends; `stay` and `stay_end` are those of intensive care stays within
    a visit. A predicate is a `kind`, or `codes` (which a kind of code may narrow), or `any_of` others.

    Attributes:
        kind: ``admission``, ``discharge``, ``stay``, ``stay_end``, ``death``, ``birth``, ``any`` (all of them but
            stays), or a kind of code.
        codes: Patterns ``VOCABULARY/CODE``; ``*`` any run, ``?`` one character, ``[0-9]`` a class; case does not
            matter. A pattern that opens with ``^`` is a regular expression (RE2).
        except_codes: Patterns to leave out of `codes`.
        principal: Only the first code of the visit's list.
        when_known: Holds when the code became known instead: of an onset that a source gives the hour of.
        value_min: Smallest value of a measurement, inclusive unless `value_min_inclusive` is off.
        value_max: Largest value of a measurement, inclusive unless `value_max_inclusive` is off.
        value_min_inclusive: See `value_min`.
        value_max_inclusive: See `value_max`.
        visit_kinds: Only in these kinds of visit.
        discharged_to: Only discharges to these places.
        unplanned: Only admissions that are not known to be planned; an unknown one counts as unplanned.
        longer_than_days: Only discharges that end a visit of strictly more days.
        min_age: Only at this age or older, in completed years; an unknown birth never qualifies.
        below_age: Only below this age, in completed years; an unknown birth never qualifies.
        any_of: Names of earlier predicates; holds wherever one of them does.
        confirmed_by: Names of earlier predicates that must back this one.
        at_least: How many of `confirmed_by` must be there (k of n).
        confirmed: Where the backing may lie: ``ever`` in the patient's record, ``so_far`` known no later than the
            predicate itself, or in the same ``visit``.
    """

    kind: CodeKind | EventKind | None = None
    codes: tuple[str, ...] = ()
    except_codes: tuple[str, ...] = ()
    principal: bool = False
    when_known: bool = False
    value_min: float | None = None
    value_max: float | None = None
    value_min_inclusive: bool = True
    value_max_inclusive: bool = True
    visit_kinds: tuple[str, ...] = ()
    discharged_to: tuple[str, ...] = ()
    unplanned: bool = False
    longer_than_days: float | None = None
    min_age: int | None = None
    below_age: int | None = None
    any_of: tuple[str, ...] = ()
    confirmed_by: tuple[str, ...] = ()
    at_least: int = 1
    confirmed: Confirmation = "ever"

    def __post_init__(self) -> None:
        kinds = (*get_args(CodeKind), *get_args(EventKind))
        _check(self.kind is None or self.kind in kinds, "kind", f"one of {', '.join(kinds)}", self.kind)
        _check(bool(self.kind or self.codes or self.any_of), "kind", "given, or `codes`, or `any_of`", None)
        _check(not (self.any_of and (self.kind or self.codes)), "any_of", "alone, no `kind`, no `codes`", self.any_of)
        _check(not (self.codes and self.kind in get_args(EventKind)), "codes", "left out for this `kind`", self.codes)
        _check(self.at_least <= max(1, len(self.confirmed_by)), "at_least", "at most len(confirmed_by)", self.at_least)
        _check_choice("confirmed", self.confirmed, Confirmation)
        for pattern in (*self.codes, *self.except_codes):
            _check("/" in pattern or pattern.startswith("^"), "codes", "VOCABULARY/CODE patterns", pattern)
        _check_subset("visit_kinds", self.visit_kinds, VISIT_KINDS)
        _check_subset("discharged_to", self.discharged_to, DISPOSITIONS)
        self._refuse_ignored()

    def _refuse_ignored(self) -> None:
        """An option that this kind of predicate cannot heed is a mistake of the author."""
        coded = bool(self.codes) or self.kind in get_args(CodeKind)
        valued = self.value_min is not None or self.value_max is not None
        needs = {
            "except_codes": (self.except_codes, bool(self.codes)),
            "principal": (self.principal, coded and self.kind != "measurement"),
            "when_known": (self.when_known, coded and self.kind != "measurement"),
            "value_min/value_max": (valued, self.kind == "measurement"),
            "value_min_inclusive": (not self.value_min_inclusive, self.value_min is not None),
            "value_max_inclusive": (not self.value_max_inclusive, self.value_max is not None),
            "discharged_to": (self.discharged_to, self.kind == "discharge"),
            "longer_than_days": (self.longer_than_days is not None, self.kind == "discharge"),
            "unplanned": (self.unplanned, self.kind == "admission"),
            "visit_kinds": (self.visit_kinds, coded or self.kind in ("admission", "discharge", "stay", "stay_end")),
            "confirmed": (self.confirmed != "ever", bool(self.confirmed_by)),
        }
        for name, (given, heeded) in needs.items():
            _check(heeded or not given, name, "left out: this predicate would ignore it", "a value")

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the predicates this one is made from."""
        return (*self.any_of, *self.confirmed_by)


@dataclass(frozen=True)
class Window:
    """A stretch of a patient's time around the trigger. It has no access to codes, outcomes or labels.

    Attributes:
        start: Where it opens; null is the start of the record. ``ANCHOR``, ``ANCHOR + 30d``, ``ANCHOR - 12h``,
            ``ANCHOR @ 23:59`` (that minute of the anchor's day, never before the anchor), ``ANCHOR -> PREDICATE``
            (next), ``ANCHOR <- PREDICATE`` (previous); ANCHOR is ``trigger``, ``start``, ``end``, ``WINDOW.start`` or
            ``WINDOW.end``.
        end: Where it closes, in the same words; null is the end of the record.
        start_inclusive: Whether the moment `start` belongs to it.
        end_inclusive: Whether the moment `end` belongs to it.
    """

    start: str | None
    end: str | None
    start_inclusive: bool = True
    end_inclusive: bool = True


@dataclass(frozen=True)
class Rule:
    """Who stays: those with `min` to `max` moments of `predicate` in `window`.

    Attributes:
        reason: Name of the exclusion in the cohort flow.
        window: Name of a window.
        predicate: Name of a predicate.
        min: Fewest moments.
        max: Most moments.
        scope: Count in the ``patient``'s record, in the ``visit`` of the trigger, or in its ``other_visits``.
        clock: Count by the moments' own ``time``, or by when they were ``known``.
        cases_only: Only candidates whose index is the event itself (case-control designs).
    """

    reason: str
    window: str
    predicate: str
    min: int | None = None
    max: int | None = None
    scope: Scope = "patient"
    clock: Clock = "time"
    cases_only: bool = False

    def __post_init__(self) -> None:
        _check(self.min is not None or self.max is not None, f"rules[{self.reason}]", "given a `min` or a `max`", None)
        _check_choice("scope", self.scope, Scope)
        _check_choice("clock", self.clock, Clock)


@dataclass(frozen=True)
class Outcome:
    """The label: true when `predicate` holds at least once in `window`, within `scope`."""

    window: str
    predicate: str
    scope: Scope = "patient"

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, Scope)


@dataclass(frozen=True)
class Censoring:
    """What becomes of candidates without the outcome whose target window was not observed to its end.

    Attributes:
        death: Death in the target window without the outcome is a competing event: ``exclude`` it, count it as the
            outcome (``composite``), or ``ignore`` it.
        follow_up: Candidates without the outcome need an event after the target window; those without are excluded.
    """

    death: DeathRule = "ignore"
    follow_up: bool = False

    def __post_init__(self) -> None:
        _check_choice("censoring.death", self.death, DeathRule)


@dataclass(frozen=True)
class Matching:
    """How many controls each case of a case-control task keeps, and in what they are alike.

    Attributes:
        ratio: Most controls a case.
        fields: Fields of RECORDS that must be equal; an unknown value equals unknown ones.
        age_years: Ages at the prediction time must lie in the same band of so many years; None: any age.
    """

    ratio: int = 3
    fields: tuple[str, ...] = ("sex", "race")
    age_years: int | None = 5

    def __post_init__(self) -> None:
        _check(self.ratio >= 1, "matching.ratio", "at least 1", self.ratio)
        _check(self.age_years is None or self.age_years >= 1, "matching.age_years", "at least 1", self.age_years)
        _check_subset("matching.fields", self.fields, STATIC_FIELDS.values())


def to_plain(value: Any) -> Any:
    """Nested dataclasses as the mappings, lists and scalars of YAML; fields at their default are left out."""
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return {name: to_plain(item) for name, item in given.items()}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], mapping: Any, where: str) -> T:
    """A dataclass of the language from what YAML gave.

    Raises:
        ValueError: `mapping` is none, names an unknown field, or lacks a required one.
    """
    _check(isinstance(mapping, Mapping), where, "a mapping", mapping)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    _check_subset(where, mapping, known)
    missing = [name for name, f in known.items() if f.default is MISSING and name not in mapping]
    _check(not missing, where, f"given {', '.join(missing)}", dict(mapping))
    return cls(**{name: tuple(item) if isinstance(item, list) else item for name, item in mapping.items()})


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def _check_choice(name: str, value: str, choices: Any) -> None:
    _check(value in get_args(choices), name, f"one of {', '.join(get_args(choices))}", value)


def _check_subset(name: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    unknown = sorted(set(values) - set(allowed))
    _check(not unknown, name, f"made of {', '.join(allowed)}", unknown)
