"""From a definition to labels: candidates, windows, rules, outcome, censoring. Vectorised over a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hf_ehr.schema import LABEL_SCHEMA, TIMESTAMP, EhrDataError
from hf_ehr.tasks.definition import ANY_EVENT, Rule, Scope
from hf_ehr.tasks.events import Events, History, Timeline
from hf_ehr.tasks.windows import AFTER_ALL, BEFORE_ALL, Span, bounds_behind, resolve_windows

if TYPE_CHECKING:
    from hf_ehr.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Candidates:
    """Those who are asked: one row per patient and trigger, before any rule. No outcome is known here.

    Attributes:
        patient: (candidates,) int64, row in RECORDS.
        visit: (candidates,) int64, ordinal of the trigger's visit, -1 for none.
        trigger: (candidates,) int64, µs.
        known: (candidates,) int64, µs, when the trigger could be known.
        is_case: (candidates,) bool, the index is the event itself (only `event_or_last` sets it apart).
    """

    patient: np.ndarray
    visit: np.ndarray
    trigger: np.ndarray
    known: np.ndarray
    is_case: np.ndarray


class CohortFlow:
    """Who is still in, and how many each reason excluded, in the order the reasons were given."""

    def __init__(self, candidates: int) -> None:
        self.kept = np.ones(candidates, dtype=bool)
        self.excluded: dict[str, int] = {}

    def drop(self, reason: str, broken: np.ndarray) -> None:
        """Excludes those of `broken`, (candidates,) bool, who are still in."""
        self.excluded[reason] = int(np.sum(self.kept & broken))
        self.kept &= ~broken


def label_records(spec: TaskSpec, history: History, events: Mapping[str, Events]) -> tuple[pa.Table, dict[str, int]]:
    """LABELS and the excluded by reason; see `TaskSpec.label`."""
    asked = find_candidates(spec, events)
    spans = _resolve(spec, list(spec.windows), asked, events)
    flow = CohortFlow(len(asked.trigger))
    for name in _bounded_by_events(spec):
        flow.drop(f"{name}_not_bounded", ~spans[name].exists)
    times, target = _prediction_times(spec, spans), spans[spec.outcome.window]
    if spec.design == "prospective":
        flow.drop("trigger_not_yet_known", asked.known > times + spec.asked_after)
    for rule in spec.rules:
        flow.drop(rule.reason, _breaks(rule, asked, spans[rule.window], events[rule.predicate]))
    _check_target(spec, target.first[flow.kept], times[flow.kept])
    positive = _count(asked, target, events[spec.outcome.predicate], spec.outcome.scope) > 0
    if spec.censoring.death != "ignore":
        death = history.death[asked.patient]
        died = ~positive & (death > times) & (death <= target.last)
        if spec.censoring.death == "composite":
            positive |= died
        else:
            flow.drop("died_without_outcome", died)
    if spec.censoring.follow_up:
        rest = Span(target.end, target.end, target.last + 1, np.full(len(times), AFTER_ALL))
        flow.drop("not_followed_up", ~positive & (_count(asked, rest, events[ANY_EVENT], "patient") == 0))
    subject = history.subject_id[asked.patient]
    return _label_table(subject[flow.kept], times[flow.kept], positive[flow.kept]), flow.excluded


def prediction_points(spec: TaskSpec, history: History, events: Mapping[str, Events]) -> pa.Table:
    """`subject_id` and `prediction_time` of every candidate; resolves no window but that of the prediction time."""
    asked = find_candidates(spec, events)
    window = spec.prediction.partition(".")[0]
    spans = _resolve(spec, [window], asked, events)
    times = _prediction_times(spec, spans)
    exists = spans[window].exists & ((asked.known <= times + spec.asked_after) | (spec.design != "prospective"))
    subject = history.subject_id[asked.patient[exists]]
    return pa.table({"subject_id": subject, "prediction_time": pa.array(times[exists]).cast(TIMESTAMP)})


def find_candidates(spec: TaskSpec, events: Mapping[str, Events]) -> Candidates:
    """The triggers that the task's index selects, by patient."""
    triggers = events[spec.trigger]
    if spec.index in ("first", "event_or_last"):
        triggers = triggers.where(_first_of_patient(triggers.patient))
    if spec.index == "last":
        triggers = triggers.where(_last_of_patient(triggers.patient))
    is_case = np.ones(len(triggers.time), dtype=bool)
    if spec.fallback is None:
        return Candidates(triggers.patient, triggers.visit, triggers.time, triggers.known, is_case)
    others = events[spec.fallback]
    others = others.where(_last_of_patient(others.patient) & ~np.isin(others.patient, triggers.patient))
    patient = np.concatenate([triggers.patient, others.patient])
    visit = np.concatenate([triggers.visit, others.visit])
    time = np.concatenate([triggers.time, others.time])
    known = np.concatenate([triggers.known, others.known])
    is_case = np.concatenate([is_case, np.zeros(len(others.time), dtype=bool)])
    order = np.argsort(patient, kind="stable")
    return Candidates(patient[order], visit[order], time[order], known[order], is_case[order])


def _resolve(spec: TaskSpec, names: list[str], asked: Candidates, events: Mapping[str, Events]) -> dict[str, Span]:
    boundaries = {name: Timeline(events[name].patient, events[name].time) for name in spec.boundary_predicates}
    return resolve_windows(spec.windows, names, asked.patient, asked.trigger, boundaries)


def _bounded_by_events(spec: TaskSpec) -> list[str]:
    """Windows that may fail to exist, because a bound is an event."""

    def chain(name: str) -> list:
        return [bound for side in ("start", "end") for _, bound in bounds_behind(spec.windows, f"{name}.{side}")]

    return [name for name in spec.windows if any(bound and bound.predicate for bound in chain(name))]


def _prediction_times(spec: TaskSpec, spans: Mapping[str, Span]) -> np.ndarray:
    """The last moment of the input: up to a window's end, or just before its start."""
    name, _, side = spec.prediction.partition(".")
    return spans[name].last if side == "end" else spans[name].first - 1


def _check_target(spec: TaskSpec, first: np.ndarray, times: np.ndarray) -> None:
    early = int(np.sum(first <= times))
    if early and spec.design != "retrospective":
        raise EhrDataError(
            f"`{spec.outcome.window}` must open after the prediction time, {early} candidates of `{spec.name}` see "
            "part of their outcome (L4). Start it at the prediction time with `start_inclusive: false`, or later."
        )


def _breaks(rule: Rule, candidates: Candidates, span: Span, events: Events) -> np.ndarray:
    count = _count(candidates, span, events, rule.scope, known=rule.clock == "known")
    broken = np.zeros(len(count), dtype=bool)
    if rule.min is not None:
        broken |= count < rule.min
    if rule.max is not None:
        broken |= count > rule.max
    return broken & candidates.is_case if rule.cases_only else broken


def _count(asked: Candidates, span: Span, events: Events, scope: Scope, known: bool = False) -> np.ndarray:
    """(candidates,) int64: moments within the span and scope."""
    times = events.known if known else events.time
    first, last = np.maximum(span.first, BEFORE_ALL), span.last
    by_visit = Timeline(events.visit, times).count(asked.visit, first, last) * (asked.visit >= 0)
    if scope == "visit":
        return by_visit
    by_patient = Timeline(events.patient, times).count(asked.patient, first, last)
    return by_patient if scope == "patient" else by_patient - by_visit


def _label_table(subject: np.ndarray, times: np.ndarray, positive: np.ndarray) -> pa.Table:
    order = np.lexsort((times, subject))
    columns = {
        "subject_id": pa.array(subject[order]),
        "prediction_time": pa.array(times[order]).cast(TIMESTAMP),
        "boolean_value": pa.array(positive[order]),
    }
    return pa.table([columns.get(f.name, pa.nulls(len(order), f.type)) for f in LABEL_SCHEMA], schema=LABEL_SCHEMA)


def _first_of_patient(patient: np.ndarray) -> np.ndarray:
    first = np.ones(len(patient), dtype=bool)
    first[1:] = patient[1:] != patient[:-1]
    return first


def _last_of_patient(patient: np.ndarray) -> np.ndarray:
    return _first_of_patient(patient[::-1])[::-1]
