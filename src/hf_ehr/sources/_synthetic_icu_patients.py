"""One block of synthetic patients: who they are, what they have, their visits and stays in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_ehr.sources._synthetic_icu_course import Course, run_course
from hf_ehr.sources._synthetic_icu_variables import LOADINGS, SPREAD
from hf_ehr.sources._synthetic_icu_world import (
    ACUTE,
    CHRONIC,
    CONDITIONS,
    FACTORS,
    READMISSION,
    RISKS,
    TARGETS,
    Streams,
    SyntheticIcuConfig,
)
from hf_ehr.sources._synthetic_process import DAY, DISCHARGES, INPATIENT, OUTPATIENT, choice, sigmoid

MAX_VISITS = 8
HOUR = 3_600
YEAR = 365.25 * DAY
SEEN_SEVERITY = 0.85
"""Share of the factors in severity; the rest shows in no variable."""
SECOND_STAY = 0.10
NEVER = MAX_VISITS
_READMISSION_INTERCEPT = -2.75
_NAMES = [row.name for row in CONDITIONS]
_SINGLE = np.array([0.6, 0.5, 0.4, 0.5]) / np.sqrt(1.02)  # what the four factors weigh in severity


@dataclass
class People:
    """``(N,)`` each; ``onset (N, targets + chronic)`` is the visit from which a condition is there, else ``NEVER``."""

    age: np.ndarray  # years at the first visit
    male: np.ndarray
    frailty: np.ndarray
    onset: np.ndarray
    visits: np.ndarray


@dataclass
class Severity:
    """Of every visit: ``severity (N, V)``, ``factors (N, V, 4)``, ``deviation (N, V, variables)`` from set-points."""

    severity: np.ndarray
    factors: np.ndarray
    deviation: np.ndarray


@dataclass
class Visits:
    """``(N, V)``; times in seconds since 1900.

    Attributes:
        exists: Whether the visit takes place.
        kind: Inpatient or outpatient.
        planned: Whether it was.
        start, end: Times.
        died: In the visit.
        disposition: Index into ``DISCHARGES``.
        acute: ``(N, V, acute conditions)``.
        readmission: P(unplanned readmission within 30 days | severity, conditions) of a survivor who comes back.
        readmitted: Whether the next visit is one.
        birth: ``(N,)``.
    """

    exists: np.ndarray
    kind: np.ndarray
    planned: np.ndarray
    start: np.ndarray
    end: np.ndarray
    died: np.ndarray
    disposition: np.ndarray
    acute: np.ndarray
    readmission: np.ndarray
    readmitted: np.ndarray
    birth: np.ndarray


@dataclass
class Stays:
    """R stays by patient, visit and number; what they have in common with ``Course`` is described there.

    Attributes:
        patient, visit, number: ``(R,)`` row of the patient, number of the visit, 0 or 1 within the visit.
        start: ``(R,)`` seconds since 1900.
        unit: ``(R,)`` index of the type of unit.
    """

    patient: np.ndarray
    visit: np.ndarray
    number: np.ndarray
    start: np.ndarray
    hours: np.ndarray
    died: np.ndarray
    state: np.ndarray  # (R, hours)
    onset: dict[str, np.ndarray]
    death: np.ndarray
    risk: dict[tuple[str, int], np.ndarray]
    unit: np.ndarray

    @property
    def end(self) -> np.ndarray:
        """Seconds since 1900."""
        return self.start + (self.hours * HOUR).astype(np.int64)


def draw_people(streams: Streams) -> People:
    """Demographics, chronic conditions and how often each patient comes."""
    age = (63 + 16 * streams.normal("age", 1)[:, 0]).clip(18.5, 92)
    latent = streams.normal("chronic_latent", 3)
    visits = 1 + np.searchsorted(
        np.cumsum([0.12, 0.17, 0.2, 0.18, 0.13, 0.1, 0.06]), streams.uniform("visits", 1)[:, 0]
    )
    older = (age - 63) / 16
    uniform = streams.uniform("chronic", len(TARGETS) + len(CHRONIC))
    present = np.zeros(uniform.shape, bool)
    for row, condition in enumerate(CHRONIC, len(TARGETS)):
        # a loading on one of three latents each, and on age
        logit = _logit(condition.prevalence) + 0.7 * latent[:, row % 3] + 0.35 * older
        present[:, row] = uniform[:, row] < sigmoid(logit)
    for row, target in enumerate(TARGETS):
        logit = np.full(streams.size, _logit(target.prevalence) - 0.5)
        for name, weight in RISKS[target.name].items():
            cause = _NAMES.index(name)
            logit += weight * (present[:, cause] - CONDITIONS[cause].prevalence)
        present[:, row] = uniform[:, row] < sigmoid(logit)
    return People(
        age=age,
        male=streams.uniform("person", 1)[:, 0] < 0.55,
        frailty=streams.normal("frailty", 1)[:, 0],
        onset=_onsets(streams, present, visits),
        visits=visits,
    )


def _logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


def _onsets(streams: Streams, present: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Most chronic conditions are there at the first visit; a target starts behind it where there is a later one."""
    uniform = streams.uniform("onset", present.shape[1])
    targets = len(TARGETS)
    late = np.floor((uniform - 0.8).clip(min=0) * 5 * visits[:, None]).astype(np.int64)
    behind = 1 + np.floor((uniform[:, :targets] - 0.2) / 0.8 * (visits[:, None] - 1)).astype(np.int64)
    late[:, :targets] = np.where((uniform[:, :targets] < 0.2) | (visits[:, None] == 1), 0, behind)
    return np.where(present, late, NEVER)


def draw_severity(config: SyntheticIcuConfig, streams: Streams, people: People) -> Severity:
    """Factors, deviations of the variables and severity of each visit, independent of age and sex."""
    shape = (streams.size, MAX_VISITS)
    unit = LOADINGS / np.sqrt((LOADINGS**2).sum(1, keepdims=True)).clip(min=1e-9)
    own = streams.normal("deviation", MAX_VISITS * len(LOADINGS)).reshape(*shape, -1)
    if config.low_rank:
        factors = streams.normal("factors", MAX_VISITS * len(FACTORS)).reshape(*shape, -1)
        deviation = np.sqrt(SPREAD) * np.einsum("nvk,jk->nvj", factors, unit) + np.sqrt(1 - SPREAD) * own
    else:
        # sums over variables that share nothing, with the orthonormal weights that are nearest to the loadings
        left, _, right = np.linalg.svd(LOADINGS / np.sqrt((LOADINGS**2).sum(0)), full_matrices=False)
        factors = np.einsum("nvj,jk->nvk", own, left @ right)
        deviation = own
    rest = streams.normal("severity", MAX_VISITS)
    return Severity(_severity(factors, people, rest), factors, deviation)


def blind_copy(config: SyntheticIcuConfig, streams: Streams, people: People, severity: Severity) -> Severity:
    """What codes, drugs and notes follow: the severity itself or, not aligned, a copy that is independent of it."""
    if config.aligned:
        return severity
    factors = streams.normal("blind_factors", MAX_VISITS * len(FACTORS)).reshape(severity.factors.shape)
    rest = streams.normal("blind_severity", MAX_VISITS)
    return Severity(_severity(factors, None, rest), factors, severity.deviation)


def _severity(factors: np.ndarray, people: People | None, rest: np.ndarray) -> np.ndarray:
    """``(N, V)`` standard normal: the factors, the patient's frailty and chance."""
    if people is not None:
        rest = np.sqrt(0.5) * people.frailty[:, None] + np.sqrt(0.5) * rest
    seen = np.einsum("nvk,k->nv", factors, _SINGLE)
    return SEEN_SEVERITY * seen + np.sqrt(1 - SEEN_SEVERITY**2) * rest


def draw_acute(streams: Streams, severity: Severity) -> np.ndarray:
    """``(N, V, acute)`` the acute conditions of each visit, if it is an inpatient one."""
    shape = (*severity.severity.shape, len(ACUTE))
    weights = np.array([row.weights for row in ACUTE])
    bias = np.array([_logit(row.prevalence) for row in ACUTE]) * np.sqrt(1 + np.pi / 8 * (weights**2).sum(1))
    logit = np.einsum("nvk,ck->nvc", severity.factors, weights[:, :4]) + severity.severity[..., None] * weights[:, 4]
    return streams.uniform("acute", MAX_VISITS * len(ACUTE)).reshape(shape) < sigmoid(bias + logit)


def draw_visits(streams: Streams, people: People, severity: Severity, shown: Severity) -> tuple[Visits, Stays]:
    """The timeline: visits, their stays, deaths and readmissions.

    Args:
        streams: Random numbers.
        people: Who they are.
        severity: What decides how the stays go.
        shown: What decides the codes (:func:`blind_copy`).
    """
    number = np.arange(MAX_VISITS)
    acute = draw_acute(streams, shown)
    readmission = sigmoid(_readmission_odds(people, severity.severity, acute))
    kind, readmitted = _kinds(streams, readmission)
    inside = kind == INPATIENT
    back = np.roll(readmitted, 1, axis=1) & (number > 0)
    chance = streams.uniform("planned", 2 * MAX_VISITS)
    soon = (chance[:, :MAX_VISITS] < 0.05) & inside & ~back & (number > 0)
    planned = ((chance[:, MAX_VISITS:] < 0.25) | ~inside | soon) & ~back
    comes = number < people.visits[:, None]
    stays, length, died = _draw_stays(streams, severity, inside & comes, inside & comes & ~soon)
    exists = comes & (np.cumsum(died, 1) - died == 0)
    length = np.where(inside, length, HOUR * (1 + 3 * streams.uniform("length", MAX_VISITS)))
    wait = DAY * _gaps(streams, back, soon)
    wait[:, 0] = (103 + 8 * streams.uniform("calendar", 1)[:, 0]) * YEAR  # 2003 to 2010
    end = np.cumsum(wait + length, axis=1).astype(np.int64)
    alive = choice(streams.uniform("disposition", MAX_VISITS), 0.74, 0.18, 0.04, 0.02) * inside
    visits = Visits(
        exists=exists,
        kind=kind,
        planned=planned,
        start=end - length.astype(np.int64),
        end=end,
        died=died & exists,
        disposition=np.where(died, DISCHARGES.index("died"), alive),
        acute=acute & inside[..., None],
        readmission=readmission,
        readmitted=readmitted,
        birth=(wait[:, 0] - people.age * YEAR).astype(np.int64),
    )
    placed = _placed(stays, visits)
    last = placed.died
    visits.end[placed.patient[last], placed.visit[last]] = placed.end[last]  # to the second
    return visits, placed


def _kinds(streams: Streams, readmission: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kind of each visit, whether the next one is an unplanned readmission within 30 days)."""
    kind = choice(streams.uniform("kind", MAX_VISITS), 0.72) * OUTPATIENT
    readmitted = streams.uniform("readmit", MAX_VISITS) < readmission
    for visit in range(MAX_VISITS):
        if visit:
            kind[readmitted[:, visit - 1], visit] = INPATIENT
        readmitted[:, visit] &= kind[:, visit] == INPATIENT
    return kind, readmitted


def _readmission_odds(people: People, severity: np.ndarray, acute: np.ndarray) -> np.ndarray:
    """``(N, V)`` log odds of an unplanned readmission within 30 days of the discharge from each visit."""
    weights = np.array([READMISSION.get(name, 0.0) for name in _NAMES])
    known = people.onset[:, None] <= np.arange(MAX_VISITS)[:, None]
    coded = np.einsum("nvc,c->nv", np.concatenate([known, acute], 2), weights)
    return _READMISSION_INTERCEPT + 0.6 * severity + 0.3 * (known.sum(2) - 3.2) / 1.9 + coded


def _gaps(streams: Streams, back: np.ndarray, soon: np.ndarray) -> np.ndarray:
    """Days between the end of the visit before and each visit.

    A planned visit within 30 days comes so late in them that the one behind it lies beyond.
    """
    uniform = streams.uniform("gap", MAX_VISITS)
    return np.select([back, soon], [1.5 + 27.5 * uniform, 29 + 0.8 * uniform], 31 - 170 * np.log(uniform))


def _draw_stays(
    streams: Streams, severity: Severity, inpatient: np.ndarray, eligible: np.ndarray
) -> tuple[Stays, np.ndarray, np.ndarray]:
    """(stays, their start counted from that of the visit; seconds of each inpatient visit; deaths in the visit)."""
    intensive = eligible & (streams.uniform("icu", MAX_VISITS) < 0.55)
    patient, visit = np.nonzero(intensive)
    ill, factors = severity.severity[patient, visit], severity.factors[patient, visit]
    ward = _ward_death(severity.severity)
    after = ward[patient, visit]
    second = run_course(streams, patient, 2 * visit + 1, ill, factors, after)
    # whoever leaves the first stay alive may come back to the unit, and may die there
    returning = SECOND_STAY * second.from_start + (1 - SECOND_STAY) * after
    first = run_course(streams, patient, 2 * visit, ill, factors, returning)
    returns = ~first.died & (streams.at("second_stay", patient, visit) < SECOND_STAY)
    wait = streams.uniform("wait", 2 * MAX_VISITS).reshape(*inpatient.shape, 2)[patient, visit]
    begin = np.stack([6 * wait[:, 0], 6 * wait[:, 0] + first.hours + 8 + 60 * wait[:, 1]], 1)
    stays = _both(patient, visit, first, second, returns, begin)
    stays.unit = choice(streams.at("unit", stays.patient, stays.visit), 0.15, 0.21, 0.36)
    last_end = np.where(returns, begin[:, 1] + second.hours, begin[:, 0] + first.hours)
    died_inside = np.where(returns, second.died, first.died)
    died = inpatient & (streams.uniform("ward_death", MAX_VISITS) < ward)
    died[patient, visit] = died_inside | died[patient, visit]
    noise = streams.normal("length", MAX_VISITS)
    hours = 24 * np.exp(np.log(2.6) + 0.35 * severity.severity + 0.5 * noise).clip(1.05, 60)
    hours[patient, visit] = last_end + np.where(died_inside, 0, hours[patient, visit])
    return stays, hours * HOUR, died


def _ward_death(severity: np.ndarray) -> np.ndarray:
    """P(death outside of the intensive care unit, in the visit)."""
    return 0.01 * np.exp(0.6 * severity.clip(-3, 3))


def _both(
    patient: np.ndarray, visit: np.ndarray, first: Course, second: Course, returns: np.ndarray, begin: np.ndarray
) -> Stays:
    """The first stays and those of the second ones that take place, by patient, visit and number."""
    keep = np.stack([np.ones(len(patient), bool), returns], 1).ravel()

    def join(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.stack([one, two], 1).reshape(-1, *one.shape[1:])[keep]

    return Stays(
        patient=join(patient, patient),
        visit=join(visit, visit),
        number=join(np.zeros_like(patient), np.ones_like(patient)),
        start=join(begin[:, 0], begin[:, 1]),
        hours=join(first.hours, second.hours),
        died=join(first.died, second.died),
        state=join(first.state, second.state),
        onset={name: join(first.onset[name], second.onset[name]) for name in first.onset},
        death=join(first.death, second.death),
        risk={name: join(first.risk[name], second.risk[name]) for name in first.risk},
        unit=np.zeros(keep.sum(), np.int64),
    )


def _placed(stays: Stays, visits: Visits) -> Stays:
    """The stays of visits that take place, with their start in time."""
    keep = visits.exists[stays.patient, stays.visit]
    taken: dict[str, Any] = {
        name: {key: part[keep] for key, part in value.items()} if isinstance(value, dict) else value[keep]
        for name, value in vars(stays).items()
    }
    kept = Stays(**taken)
    kept.start = visits.start[kept.patient, kept.visit] + (kept.start * HOUR).astype(np.int64)
    return kept
