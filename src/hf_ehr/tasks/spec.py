"""`TaskSpec`: who is asked what, and when. RECORDS → LABELS, with the reason for everyone left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import yaml

from hf_ehr.tasks.cohort import label_records, prediction_points
from hf_ehr.tasks.definition import (
    ANY_EVENT,
    Censoring,
    Matching,
    Outcome,
    Predicate,
    Rule,
    Window,
    from_plain,
    to_plain,
)
from hf_ehr.tasks.events import History, confirming_data, predicate_events
from hf_ehr.tasks.windows import Bound, bounds_behind, parse_bound

Design = Literal["prospective", "case_control", "retrospective"]
Index = Literal["every", "first", "last", "event_or_last"]
Unit = Literal["patient", "visit"]


@dataclass(frozen=True)
class TaskSpec:
    """A prediction task as data: everything that decides a label, in one place.

    A model may see what was available no later than ``prediction_time``. That is the last moment of the input: where a
    window excludes its end, the prediction time lies 1 µs before it (the resolution of our times).

    Attributes:
        name: Snake-case name; the label file is called after it.
        description: What is predicted, for whom, and where the definition comes from.
        predicates: What to look for; a predicate that uses another comes after it.
        trigger: Name of the predicate whose moments make candidates.
        windows: Stretches of time around the trigger.
        outcome: The label.
        rules: Who stays, in the order of the cohort flow: a candidate counts for the first rule it breaks.
        unit: One label per ``patient``, or one per ``visit``.
        design: ``prospective``; ``case_control``, whose index depends on the outcome (leakage rule L9); or
            ``retrospective``, whose outcome lies within the input (pre-training labels).
        index: Which triggers: ``every``, ``first``, ``last``, or ``event_or_last``: the first one, and for patients
            who have none the last moment of `fallback`.
        fallback: See `index`.
        prediction: ``WINDOW.end`` or ``WINDOW.start``: the prediction time.
        censoring: What becomes of candidates without the outcome who were not observed.
        matching: Which controls are kept, in case-control designs: `label_dataset` draws them from the whole data set.
        expected_prevalence: Lowest and highest share of positives that is believable.
        leaks: What a model must not be given, in words.

    Raises:
        ValueError: A name is unknown, an option would be ignored, or a prospective task could see its outcome.
    """

    name: str
    description: str
    predicates: Mapping[str, Predicate]
    trigger: str
    windows: Mapping[str, Window]
    outcome: Outcome
    rules: tuple[Rule, ...] = ()
    unit: Unit = "visit"
    design: Design = "prospective"
    index: Index = "every"
    fallback: str | None = None
    prediction: str = "input.end"
    censoring: Censoring = field(default=Censoring())
    matching: Matching | None = None
    expected_prevalence: tuple[float, float] | None = None
    leaks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(re.fullmatch(r"\w+", self.name) is not None, "name", "letters, digits and _", self.name)
        for name, choices in (("unit", Unit), ("design", Design), ("index", Index)):
            value = getattr(self, name)
            _require(value in get_args(choices), name, f"one of {', '.join(get_args(choices))}", value)
        self._check_names()
        self._check_index()
        if self.design == "prospective":
            self._check_prospective()

    def _check_names(self) -> None:
        known: list[str] = [ANY_EVENT]
        for name, predicate in self.predicates.items():
            _require(set(predicate.uses) <= set(known), f"predicates.{name}", f"made of {known}", list(predicate.uses))
            known.append(name)
        named = [
            self.trigger,
            self.outcome.predicate,
            *(rule.predicate for rule in self.rules),
            *self.boundary_predicates,
        ]
        for name in [*named, *([self.fallback] if self.fallback else [])]:
            _require(name in known, "predicate", f"one of {', '.join(known)}", name)
        _require(
            self.prediction.partition(".")[2] in ("start", "end"), "prediction", "WINDOW.start/.end", self.prediction
        )
        for window in [self.outcome.window, self.prediction.partition(".")[0], *(rule.window for rule in self.rules)]:
            _require(window in self.windows, "window", f"one of {', '.join(self.windows)}", window)
        reasons = [rule.reason for rule in self.rules]
        _require(len(set(reasons)) == len(reasons), "rules", "given different reasons", reasons)
        for name in self.windows:
            bounds_behind(self.windows, f"{name}.start")
            bounds_behind(self.windows, f"{name}.end")

    def _check_index(self) -> None:
        controls = self.index == "event_or_last"
        _require(
            controls == (self.design == "case_control"), "index", "event_or_last in case_control only", self.index
        )
        _require(controls == (self.fallback is not None), "fallback", "given with event_or_last only", self.fallback)
        _require(controls or not any(rule.cases_only for rule in self.rules), "cases_only", "case_control only", True)
        _require(controls or self.matching is None, "matching", "given in case_control only", self.matching)
        _require(self.unit == "visit" or self.index != "every", "unit", "visit where every trigger counts", self.unit)
        finite = self.windows[self.outcome.window].end is not None
        _require(
            finite or self.censoring == Censoring(), "censoring", "left out: the target never ends", self.censoring
        )

    def _check_prospective(self) -> None:
        """The index and the input may follow from the past only (L4)."""
        _require(self.index != "last", "index", "every or first: `last` looks into the future", self.index)
        for reference, bound in bounds_behind(self.windows, self.prediction):
            _require(bound is not None, self.prediction, "a moment the trigger decides, not the record's end", None)
            later = bound is not None and bound.predicate is not None and bound.forward
            _require(not later, reference, "decided by the past, `->` looks ahead", bound and bound.predicate)
        for name in self._behind(self.trigger):
            confirmed = self.predicates[name].confirmed if self.predicates[name].confirmed_by else "so_far"
            _require(
                confirmed == "so_far", f"predicates.{name}.confirmed", "so_far: it decides the trigger", confirmed
            )

    def _behind(self, name: str) -> list[str]:
        """`name` and the predicates it is made from, at any depth."""
        if name == ANY_EVENT:
            return []
        return [name, *(deeper for part in self.predicates[name].uses for deeper in self._behind(part))]

    @property
    def _bounds(self) -> list[Bound]:
        texts = [text for window in self.windows.values() for text in (window.start, window.end)]
        return [parse_bound(text) for text in texts if text is not None]

    @property
    def boundary_predicates(self) -> list[str]:
        """Names of the predicates that bound a window."""
        return [bound.predicate for bound in self._bounds if bound.predicate is not None]

    @property
    def asked_after(self) -> int:
        """µs from the prediction time to the moment of asking: 1 where the input stops just before it, else 0."""
        name, _, side = self.prediction.partition(".")
        window = self.windows[name]
        return int(not window.end_inclusive) if side == "end" else int(window.start_inclusive)

    @property
    def uses_intervals(self) -> bool:
        """Whether a duration, a time of day, an age or a length of stay decides anything."""
        aged = (p.min_age is not None or p.below_age is not None for p in self.predicates.values())
        stays = (p.longer_than_days is not None for p in self.predicates.values())
        return any(bound.offset or bound.clock is not None for bound in self._bounds) or any(aged) or any(stays)

    @property
    def compares_visits(self) -> bool:
        """Whether when something happened outside of the trigger's visit decides anything.

        Rules on births and earlier deaths do not count: these are of no visit. Nor does the whole record, which has no
        before and after.
        """
        rules = [rule for rule in self.rules if not self._is_of_no_visit(rule.predicate)]
        asked = [(rule.scope, rule.window) for rule in rules] + [(self.outcome.scope, self.outcome.window)]
        beyond = any(scope != "visit" and self.windows[window] != Window(None, None) for scope, window in asked)
        backed = any(p.confirmed_by and p.confirmed == "so_far" for p in self.predicates.values())
        earlier = any(bound and bound.offset < 0 for _, bound in bounds_behind(self.windows, self.prediction))
        return beyond or backed or earlier or self.censoring != Censoring()

    def _is_of_no_visit(self, name: str) -> bool:
        if name == ANY_EVENT:
            return False
        predicate = self.predicates[name]
        parts = predicate.any_of
        return all(map(self._is_of_no_visit, parts)) if parts else predicate.kind in ("birth", "death")

    def label(self, records: pa.Table, *, present: frozenset[str] | None = None) -> tuple[pa.Table, dict[str, int]]:
        """The labels of these patients, and who was left out.

        Args:
            records: RECORDS.
            present: Names of the confirming predicates whose data exist in the whole data set; by default those of
                `records`.

        Returns:
            LABELS sorted by patient and time, and how many candidates each reason excluded, in the order they were
            asked (zeros included): candidates = labels + excluded.

        Raises:
            EhrDataError: The outcome's window of a candidate opens before its prediction time.
        """
        history = History(records)
        present = confirming_data(history, self.predicates) if present is None else present
        return label_records(self, history, predicate_events(history, self.predicates, present))

    def prediction_points(self, records: pa.Table) -> pa.Table:
        """When every candidate is asked, before any rule: `subject_id`, `prediction_time`. Sees no outcome window."""
        history = History(records)
        present = confirming_data(history, self.predicates)
        return prediction_points(self, history, predicate_events(history, self.predicates, present))

    def confirming_data(self, records: pa.Table) -> frozenset[str]:
        """Names of the confirming predicates whose kind of data `records` hold."""
        return confirming_data(History(records), self.predicates)

    def warnings(self, present: frozenset[str]) -> list[str]:
        """What a reader of the labels should know, given the confirming data that exist."""
        notes = []
        if self.design == "case_control":
            notes.append(
                "index-leak (L9): cases are asked at the event, controls at their last encounter, so their histories "
                "differ by design. Report the baseline of audit.index_leak_features, and no absolute risk."
            )
        if self.design == "retrospective":
            notes.append("The outcome lies within the input: a pre-training label, no prediction.")
        for name, predicate in self.predicates.items():
            absent = [part for part in predicate.confirmed_by if part not in present]
            if absent and len(absent) == len(predicate.confirmed_by):
                notes.append(f"`{name}` was not confirmed: the data hold none of {', '.join(absent)}.")
            elif absent:
                notes.append(f"`{name}` was confirmed without {', '.join(absent)}: not in the data.")
        return notes

    def to_yaml(self) -> str:
        """The definition as YAML; `from_yaml` gives an equal one."""
        return yaml.safe_dump(to_plain(self), sort_keys=False, allow_unicode=True, width=110)

    @classmethod
    def from_yaml(cls, source: str | Path) -> TaskSpec:
        """Reads a definition.

        Args:
            source: The path of a YAML file, or YAML text.

        Raises:
            ValueError: The text is no YAML mapping, or a field is unknown, missing or wrong.
        """
        text = source
        if isinstance(source, Path) or "\n" not in source:
            if not Path(source).is_file():
                raise ValueError(f"`source` must be YAML text or an existing file, got {str(source)!r}.")
            text = Path(source).read_text()
        try:
            plain = yaml.safe_load(str(text))
        except yaml.YAMLError as error:
            raise ValueError(f"A task definition must be YAML: {error}") from error
        return from_plain(cls, _with_parts(plain), "task")


def _with_parts(plain: Any) -> Any:
    """The nested parts of a definition as their dataclasses."""
    if not isinstance(plain, dict):
        return plain
    made = dict(plain)
    if isinstance(plain.get("predicates"), dict):
        parts = plain["predicates"].items()
        made["predicates"] = {name: from_plain(Predicate, part, f"predicates.{name}") for name, part in parts}
    if isinstance(plain.get("windows"), dict):
        made["windows"] = {
            name: from_plain(Window, part, f"windows.{name}") for name, part in plain["windows"].items()
        }
    if "outcome" in plain:
        made["outcome"] = from_plain(Outcome, plain["outcome"], "outcome")
    if "censoring" in plain:
        made["censoring"] = from_plain(Censoring, plain["censoring"], "censoring")
    if plain.get("matching") is not None:
        made["matching"] = from_plain(Matching, plain["matching"], "matching")
    if isinstance(plain.get("rules"), list):
        made["rules"] = [from_plain(Rule, item, f"rules[{number}]") for number, item in enumerate(plain["rules"])]
    return made


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
