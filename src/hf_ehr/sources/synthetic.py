"""Synthetic cohort → EVENTS, with the truth behind them: latents, oracle probability, outcome.

The process: z ∈ R⁵ → K conditions, P(c) = σ(L·z + b), some of which progress to others at a later visit → each present
condition emits codes from its own M synonyms at visits from its onset on, next to a few noise codes → the outcome
depends on ten conditions and on severity, which also sets the length of stay. Age and sex are readings of z, so they
tell a little of everything. Every random number is a function of (seed, world, subject_id, purpose): a patient is the
same in any shard.

In the plain worlds severity has a log odds of .25 per sd and polysemy, order and principal position have none; ``C+``
switches these on (``SyntheticConfig``). ICD-9-CM and ICD-10-CM codes are mixed regardless of the date.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.schema import BIRTH_CODE, CODE_KINDS, DEATH_CODE, EVENT_SCHEMA, KINDS, LABEL_SCHEMA, TIMESTAMP
from hf_ehr.sources._synthetic_worlds import (
    DRUGS,
    NOISE_PER_PATIENT,
    ORDER_PAIRS,
    OUTCOME_ROWS,
    PARENT_LOG_ODDS,
    PROGRESSION,
    ROW,
    SyntheticConfig,
    World,
    WorldName,
    draw_world,
)

__all__ = [
    "TASK", "TRUTH_SCHEMA", "SyntheticConfig", "WorldName", "code_table", "generate_shard", "labels", "shuffle_codes",
]  # fmt: skip

TASK = "synthetic_outcome"
TRUTH_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("prediction_time", TIMESTAMP, nullable=False),  # end of the last visit before the outcome
        pa.field("label", pa.bool_(), nullable=False),
        pa.field("oracle_probability", pa.float64(), nullable=False),  # P(label | latents)
        pa.field("z", pa.list_(pa.float32()), nullable=False),
        pa.field("conditions", pa.list_(pa.int32()), nullable=False),  # rows of the present conditions, ascending
        pa.field("onsets", pa.list_(pa.int32()), nullable=False),  # number of the visit where each of them starts
        pa.field("severity", pa.float32(), nullable=False),
        pa.field("los_latent", pa.float32(), nullable=False),  # severity, or a factor of its own in the control
    ]
)

_CHUNK = 4_096  # patients at a time: bounds memory, and the arrays stay in cache
_MAX_VISITS = 16
_DAY = 86_400
_EPOCH = 25_567 * _DAY  # seconds from 1900-01-01, the clock used here, to 1970-01-01
_ADMISSIONS = ("Visit/inpatient", "Visit/emergency", "Visit/outpatient")
_INPATIENT, _EMERGENCY, _OUTPATIENT = range(3)
_DISCHARGES = ("home", "facility", "transfer", "hospice", "against_advice", "died")
_STATICS = {
    "Sex": ("F", "M"),
    "Race": ("White", "Black", "Asian", "Other"),
    "Ethnicity": ("NotHispanic", "Hispanic"),
    "Language": ("English", "Spanish", "Other"),
    "Insurance": ("Private", "Medicare", "Medicaid"),
    "MaritalStatus": ("Married", "Single", "Widowed", "Divorced"),
}
_MEASUREMENTS = (  # code, condition, chance per code of it, mean and sd with the condition, chance per visit, without
    ("LOINC/4548-4", "type_2_diabetes", 0.4, (7.6, 1.1), 0.03, (5.4, 0.35)),  # HbA1c, %
    ("LOINC/30934-9", "heart_failure", 0.4, (900.0, 250.0), 0.02, (60.0, 18.0)),  # BNP, pg/mL
)
_OTHER_CODES = (
    *_ADMISSIONS,
    *(f"Discharge/{name}" for name in _DISCHARGES),
    *(f"{name}/{value}" for name, values in _STATICS.items() for value in values),
    *(row[0] for row in _MEASUREMENTS),
    BIRTH_CODE,
    DEATH_CODE,
)
_OTHER = {code: index for index, code in enumerate(_OTHER_CODES)}

Stream = Literal[
    "z", "condition", "onset", "visits", "severity", "los", "label", "count", "synonym", "visit", "shared", "noise",
    "noise_code", "noise_visit", "repeat", "position", "promote", "drug", "test", "test_value", "background",
    "background_value", "follow_up", "kind", "readmit", "gap", "stay", "planned", "disposition", "calendar", "age",
    "sex", "static", "death", "death_time",
]  # fmt: skip
_STREAMS = {name: np.uint64(index << 40) for index, name in enumerate(Stream.__args__)}  # type: ignore[attr-defined]
_WORLDS = {name: index for index, name in enumerate(WorldName.__args__)}  # type: ignore[attr-defined]
_WEYL = np.uint64(0x9E3779B97F4A7C15)


class _Draws:
    """Counter-based random numbers of the given patients (SplitMix64: Steele, Lea & Flood 2014)."""

    def __init__(self, config: SyntheticConfig, subjects: np.ndarray, purpose: int = 0) -> None:
        words = np.array([config.seed, _WORLDS[config.world], purpose], np.uint64)
        key = np.zeros(1, np.uint64)
        for word in words:
            key = _mix(key + _WEYL + word)
        self.size = len(subjects)
        self._keys = _mix(key + subjects.astype(np.uint64) * _WEYL)

    def uniform(self, stream: Stream, count: int) -> np.ndarray:
        """``(patients, count)`` in (0, 1)."""
        counters = (_STREAMS[stream] + np.arange(count, dtype=np.uint64)) * _WEYL
        return _to_unit(_mix(self._keys[:, None] + counters))

    def at(self, stream: Stream, patient: np.ndarray, index: np.ndarray) -> np.ndarray:
        """``(events,)`` in (0, 1): number ``index`` of the stream of each event's patient."""
        return _to_unit(_mix(self._keys[patient] + (_STREAMS[stream] + index.astype(np.uint64)) * _WEYL))

    def normal(self, stream: Stream, count: int) -> np.ndarray:
        """``(patients, count)`` standard normal."""
        return _normal(self.uniform(stream, 2 * count))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _to_unit(bits: np.ndarray) -> np.ndarray:
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Box–Muller: 2n uniforms in the last axis → n normals."""
    half = uniform.shape[-1] // 2
    return np.sqrt(-2 * np.log(uniform[..., :half])) * np.cos(2 * np.pi * uniform[..., half:])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _poisson(uniform: np.ndarray, rate: float) -> np.ndarray:
    terms = np.concatenate([[1.0], np.cumprod(rate / np.arange(1, 64))])
    return np.searchsorted(np.exp(-rate) * terms.cumsum(), uniform).clip(max=63)


def _choice(uniform: np.ndarray, *probabilities: float) -> np.ndarray:
    """Index of a category; the last one takes what is left."""
    return np.searchsorted(np.cumsum(probabilities), uniform)


@dataclass
class _Latents:
    """``z (N, 5)``, ``present`` and ``onset (N, K)``, number of ``visits (N,)`` before the prediction time, …"""

    z: np.ndarray
    present: np.ndarray
    onset: np.ndarray
    visits: np.ndarray
    severity: np.ndarray
    los: np.ndarray


@dataclass
class _Codes:
    """Diagnoses, one entry each: patient (row), visit number, index into ``World.codes``, condition (-1: noise)."""

    patient: np.ndarray
    visit: np.ndarray
    code: np.ndarray
    condition: np.ndarray

    def take(self, rows: np.ndarray) -> _Codes:
        return _Codes(self.patient[rows], self.visit[rows], self.code[rows], self.condition[rows])

    def extend(self, other: _Codes) -> _Codes:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("patient", "visit", "code", "condition"))
        return _Codes(*(np.concatenate(pair) for pair in pairs))


def _draw_latents(config: SyntheticConfig, world: World, draws: _Draws, burden: tuple[float, float]) -> _Latents:
    z = draws.normal("z", 5)
    logit = z @ world.loadings.T + world.bias
    uniform = draws.uniform("condition", config.conditions)
    present = uniform < _sigmoid(logit)
    for child in dict.fromkeys(child for _, child in PROGRESSION):
        parents = [parent for parent, other in PROGRESSION if other == child]
        push = (present[:, parents] - world.prevalence[parents]).sum(1) * PARENT_LOG_ODDS
        present[:, child] = uniform[:, child] < _sigmoid(logit[:, child] + push)
    mean, deviation = burden
    own = draws.normal("severity", 1)[:, 0]
    severity = 0.6 * (present @ world.burden - mean) / deviation + 0.8 * own
    los = draws.normal("los", 1)[:, 0] if config.los_independent else severity
    onset, visits = _draw_onsets(draws, present)
    return _Latents(z, present, onset, visits, severity, los)


def _draw_onsets(draws: _Draws, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Visit of each condition's onset, a child's behind those of its present ancestors, and the number of visits."""
    before, behind, earliest = (np.zeros(present.shape, np.int64) for _ in range(3))
    for parent, child in PROGRESSION:
        before[:, child] = np.maximum(before[:, child], before[:, parent] + present[:, parent])
    for parent, child in reversed(PROGRESSION):
        behind[:, parent] = np.maximum(behind[:, parent], behind[:, child] + present[:, child])
    needed = ((before + behind + 1) * present).max(1)  # the longest progression wants one visit a step
    visits = np.maximum(2 + _poisson(draws.uniform("visits", 1)[:, 0], 2.5), needed).clip(max=_MAX_VISITS - 1)
    uniform = draws.uniform("onset", present.shape[1])
    latest = visits[:, None] - behind
    onset = (uniform * latest).astype(np.int64)
    for parent, child in PROGRESSION:
        after = np.where(present[:, parent], onset[:, parent] + 1, earliest[:, parent])
        first = earliest[:, child] = np.maximum(earliest[:, child], after)
        onset[:, child] = first + (uniform[:, child] * (latest[:, child] - first)).astype(np.int64)
    return onset, visits


def _emit_codes(config: SyntheticConfig, world: World, draws: _Draws, latents: _Latents) -> _Codes:
    """The diagnoses before the prediction time, without repeats within a visit."""
    rows = config.conditions
    counts = (_poisson(draws.uniform("count", rows), world.rate) * latents.present).ravel()
    cell = np.repeat(np.arange(len(counts)), counts)
    ordinal = np.arange(len(cell)) - np.repeat(counts.cumsum() - counts, counts)
    patient, condition = np.divmod(cell, rows)
    index = condition * 64 + ordinal
    synonym = draws.at("synonym", patient, index) + condition
    code = np.searchsorted(world.synonym.ravel(), synonym).clip(max=rows * config.synonyms - 1)
    if config.polysemy:
        shared = world.shared[condition]
        code = np.where((shared >= 0) & (draws.at("shared", patient, index) < config.polysemy), shared, code)
    onset, visits = latents.onset.ravel()[cell], latents.visits[patient]
    later = onset + (draws.at("visit", patient, index) * (visits - onset)).astype(np.int64)
    codes = _Codes(patient, np.where(ordinal == 0, onset, later), code, condition)
    return _without_repeats(codes.extend(_emit_noise(config, world, draws, latents)))


def _emit_noise(config: SyntheticConfig, world: World, draws: _Draws, latents: _Latents) -> _Codes:
    counts = _poisson(draws.uniform("noise", 1)[:, 0], NOISE_PER_PATIENT)
    patient = np.repeat(np.arange(draws.size), counts)
    ordinal = np.arange(len(patient)) - np.repeat(counts.cumsum() - counts, counts)
    code = np.searchsorted(world.noise, draws.at("noise_code", patient, ordinal)) + config.conditions * config.synonyms
    visit = (draws.at("noise_visit", patient, ordinal) * latents.visits[patient]).astype(np.int64)
    return _Codes(patient, visit, code, np.full(len(patient), -1))


def _without_repeats(codes: _Codes) -> _Codes:
    key = ((codes.patient * _MAX_VISITS + codes.visit) << 16) | codes.code
    return codes.take(np.unique(key, return_index=True)[1])


def _log_odds(config: SyntheticConfig, world: World, latents: _Latents, codes: _Codes) -> np.ndarray:
    """``(N,)`` log odds of the outcome but for the intercept."""
    if config.world == "null":
        seen = np.unique(codes.patient << 16 | codes.code)
        return np.bincount(seen >> 16, world.code_weights[seen & 0xFFFF], len(latents.visits))
    odds = latents.present @ world.weights + (config.severity + config.principal) * latents.severity
    for first, second in ORDER_PAIRS if config.order else ():
        both = latents.present[:, first] & latents.present[:, second]
        odds += config.order * both * np.sign(latents.onset[:, second] - latents.onset[:, first])
    return odds


@lru_cache(maxsize=16)
def _calibrate(config: SyntheticConfig) -> tuple[tuple[float, float], float]:
    """(mean and sd of the burden behind severity, intercept of the outcome), from patients drawn for this alone."""
    if config.world == "site_b":  # another population under the same law
        return _calibrate(replace(config, world="C"))
    world, draws = draw_world(config), _Draws(config, np.arange(16_384), purpose=1)
    burden = _draw_latents(config, world, draws, (0.0, 1.0)).present @ world.burden
    scale = (float(burden.mean()), float(burden.std()))
    latents = _draw_latents(config, world, draws, scale)
    odds = _log_odds(config, world, latents, _emit_codes(config, world, draws, latents))
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _sigmoid(odds + middle).mean() > config.prevalence else (middle, high)
    return scale, middle


@dataclass
class _Timeline:
    """``(N, 16)`` visits, the last of which may lie behind the prediction time; seconds since 1900."""

    exists: np.ndarray
    start: np.ndarray
    end: np.ndarray
    kind: np.ndarray
    planned: np.ndarray
    disposition: np.ndarray
    birth: np.ndarray
    death: np.ndarray  # (N,), 0 for the living
    age: np.ndarray


def _draw_timeline(draws: _Draws, latents: _Latents) -> _Timeline:
    shape = (draws.size, _MAX_VISITS)
    number, visits = np.arange(_MAX_VISITS), latents.visits
    follow_up = draws.uniform("follow_up", 1)[:, 0] < 0.5
    exists = number < (visits + follow_up)[:, None]
    age = (52 + 14 * (0.4 * latents.z[:, 0] + 0.92 * draws.normal("age", 1)[:, 0])).clip(18, 92)
    dies = draws.uniform("death", 1)[:, 0] < _sigmoid(-3.2 + 0.6 * latents.severity + (age - 52) / 30)
    dies_inside = dies & follow_up  # so that no one dies before the prediction time
    kind = _choice(draws.uniform("kind", _MAX_VISITS), 0.30, 0.12)
    kind[np.arange(draws.size)[dies_inside], visits[dies_inside]] = _INPATIENT
    readmit = draws.uniform("readmit", _MAX_VISITS) < _sigmoid(-1.75 + 0.5 * latents.los)[:, None]
    readmit[:, 0] = False
    for visit in range(1, _MAX_VISITS):
        readmit[:, visit] &= kind[:, visit - 1] == _INPATIENT
        kind[readmit[:, visit], visit] = _INPATIENT
    gap = draws.uniform("gap", _MAX_VISITS)
    days = np.where(readmit, 2 + 27 * gap, 31 - 200 * np.log(gap))
    length = _draw_lengths(draws, kind, latents.los)
    wait, length = (days * _DAY).astype(np.int64), (length * _DAY).astype(np.int64)
    first = ((110 + 8 * draws.uniform("calendar", 1)) * 365.25 * _DAY).astype(np.int64)  # 2010 to 2017
    wait[:, 0] = 0
    end = first + np.cumsum(wait + length, axis=1)
    planned = (
        np.where(kind == _INPATIENT, draws.uniform("planned", _MAX_VISITS) < 0.35, kind == _OUTPATIENT) & ~readmit
    )
    last = end[np.arange(draws.size), visits + follow_up - 1]
    after = (_DAY * (1 - 120 * np.log(draws.uniform("death_time", 1)[:, 0]))).astype(np.int64)
    death = np.where(dies, last + np.where(dies_inside, 0, after), 0)
    disposition = _choice(draws.uniform("disposition", _MAX_VISITS), 0.82, 0.12, 0.03, 0.01)
    disposition[kind != _INPATIENT] = 0
    disposition[np.arange(draws.size)[dies_inside], visits[dies_inside]] = _DISCHARGES.index("died")
    birth = first[:, 0] - (age * 365.25 * _DAY).astype(np.int64)
    assert exists.shape == shape
    return _Timeline(exists, end - length, end, kind, planned, disposition, birth, death, age)


def _draw_lengths(draws: _Draws, kind: np.ndarray, los: np.ndarray) -> np.ndarray:
    """Days of each visit: log-normal around 3 days for inpatients, hours for the others."""
    noise = draws.normal("stay", _MAX_VISITS)
    inpatient = np.exp(np.log(3.0) + 0.4 * los[:, None] + 0.5 * noise).clip(0.5, 120)
    return np.select([kind == _INPATIENT, kind == _EMERGENCY], [inpatient, 0.25 * np.exp(0.4 * noise)], 0.06)


def _repeat_after(draws: _Draws, latents: _Latents, time: _Timeline, codes: _Codes) -> _Codes:
    """A quarter of the known codes again at the visit behind the prediction time: nothing new is learnt there."""
    follow_up = time.exists[np.arange(draws.size), latents.visits]
    counter = (codes.visit << 16) | codes.code
    again = codes.take(np.flatnonzero(follow_up[codes.patient] & (draws.at("repeat", codes.patient, counter) < 0.25)))
    again.visit = latents.visits[again.patient]
    return codes.extend(_without_repeats(again))


def _rank_codes(config: SyntheticConfig, draws: _Draws, latents: _Latents, codes: _Codes) -> tuple[_Codes, np.ndarray]:
    """The codes sorted by visit and priority, and their positions within the visit from 1 on."""
    counter = (codes.visit << 16) | codes.code
    priority = draws.at("position", codes.patient, counter) * 0.5 + 0.5
    if config.principal:
        outcome = np.isin(codes.condition, OUTCOME_ROWS)
        severe = _sigmoid(4 * config.principal * latents.severity)[codes.patient]
        priority[outcome & (draws.at("promote", codes.patient, counter) < severe)] -= 0.5
    visit = codes.patient * _MAX_VISITS + codes.visit
    order = np.argsort((visit << 32) | (priority * 2**32).astype(np.int64))
    visit = visit[order]
    is_first = np.diff(visit, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(is_first, np.arange(len(visit)), 0))
    return codes.take(order), np.arange(len(visit)) - start + 1


class _Rows:
    """Collects events by column and turns them into one sorted Arrow table."""

    def __init__(self, world: World, subjects: np.ndarray) -> None:
        self._subjects = subjects
        self._strings = pa.array([*world.codes, *_OTHER_CODES])
        self._other = len(world.codes)
        self._parts: list[tuple[np.ndarray, ...]] = []

    def other(self, code: str) -> int:
        """Index of a code that is no diagnosis and no drug."""
        return self._other + _OTHER[code]

    def add(
        self,
        kind: str,
        patient: np.ndarray,
        code: np.ndarray | int,
        second: np.ndarray | int,
        visit: np.ndarray | int = -1,
        position: np.ndarray | int = 0,
        value: np.ndarray | float = np.nan,
    ) -> None:
        """Adds one event for each entry of ``patient``; visit -1, position 0, value NaN and second 0 become nulls."""
        columns = (patient, second, KINDS.index(kind), position, code, visit, np.asarray(value, np.float32))
        self._parts.append(tuple(np.broadcast_to(column, patient.shape) for column in columns))

    def table(self) -> pa.Table:
        """EVENTS by subject, time (statics first), kind and position."""
        columns = [np.concatenate(part) for part in zip(*self._parts, strict=True)]
        patient, second, kind, position = columns[:4]
        order = np.argsort((((patient << 33 | second) << 4 | kind) << 12) | position)
        patient, second, kind, position, code, visit, value = (column[order] for column in columns)
        time = pa.array((second - _EPOCH) * 1_000_000, TIMESTAMP, mask=second == 0)
        subject = self._subjects[patient]
        kinds = pa.DictionaryArray.from_arrays(kind.astype(np.int8), pa.array(KINDS)).cast(pa.string())
        arrays = {
            "subject_id": pa.array(subject),
            "time": time,
            "code": self._strings.take(pa.array(code)),
            "numeric_value": pa.array(value, mask=np.isnan(value)),
            "text_value": pa.nulls(len(order), pa.string()),
            "visit_id": pa.array(subject * 100 + visit, mask=visit < 0),
            "stay_id": pa.nulls(len(order), pa.int64()),
            "kind": kinds,
            "position": pa.array(position.astype(np.int32), mask=(position == 0) | (second == 0)),
            "available_at": time,
        }
        return pa.table(arrays, schema=EVENT_SCHEMA)


def _add_person(rows: _Rows, draws: _Draws, latents: _Latents, time: _Timeline) -> None:
    everyone = np.arange(draws.size)
    uniform = draws.uniform("static", len(_STATICS))
    old = time.age >= 65
    chosen = {
        "Sex": (draws.uniform("sex", 1)[:, 0] > _sigmoid(0.1 + 0.6 * latents.z[:, 1])).astype(np.int64),
        "Race": _choice(uniform[:, 1], 0.68, 0.17, 0.06),
        "Ethnicity": _choice(uniform[:, 2], 0.85),
        "Language": _choice(uniform[:, 3], 0.88, 0.08),
        "Insurance": np.where(old, _choice(uniform[:, 4], 0.1, 0.85), _choice(uniform[:, 4], 0.7, 0.05)),
        "MaritalStatus": np.where(
            old, _choice(uniform[:, 5], 0.5, 0.1, 0.25), _choice(uniform[:, 5], 0.5, 0.35, 0.02)
        ),
    }
    for number, (name, values) in enumerate(_STATICS.items()):
        rows.add("static", everyone, rows.other(f"{name}/{values[0]}") + chosen[name], 0, position=number)
    rows.add("birth", everyone, rows.other(BIRTH_CODE), time.birth)
    dead = np.flatnonzero(time.death)
    rows.add("death", dead, rows.other(DEATH_CODE), time.death[dead])


def _add_visits(rows: _Rows, time: _Timeline) -> None:
    patient, visit = np.nonzero(time.exists)
    at = (patient, visit)
    rows.add(
        "admission", patient, rows.other(_ADMISSIONS[0]) + time.kind[at], time.start[at], visit, value=time.planned[at]
    )
    rows.add(
        "discharge", patient, rows.other(f"Discharge/{_DISCHARGES[0]}") + time.disposition[at], time.end[at], visit
    )


def _add_treatment(
    rows: _Rows, draws: _Draws, world: World, latents: _Latents, time: _Timeline, codes: _Codes
) -> None:
    """Drugs, and tests of diabetes and heart failure, in a part of the visits where the condition is coded."""
    counter = (codes.visit << 16) | codes.code
    for number, (_, name) in enumerate(DRUGS):
        hit = np.flatnonzero(codes.condition == ROW[name])
        hit = hit[draws.at("drug", codes.patient[hit], counter[hit] * len(DRUGS) + number) < 0.4]
        patient, visit = _distinct_visits(codes.patient[hit], codes.visit[hit])
        second = time.start[patient, visit] + 60 * (number + 1)
        rows.add("medication", patient, world.diagnoses + number, second, visit, position=number + 1)
    for number, (code, name, chance, (mean, sd), background, (healthy, spread)) in enumerate(_MEASUREMENTS):
        hit = np.flatnonzero(codes.condition == ROW[name])
        hit = hit[draws.at("test", codes.patient[hit], counter[hit]) < chance]
        ill, visit = _distinct_visits(codes.patient[hit], codes.visit[hit])
        flat = (number * 2) * _MAX_VISITS + visit
        noise = _normal(np.stack([draws.at("test_value", ill, flat + i * _MAX_VISITS) for i in (0, 1)], -1))[:, 0]
        rows.add("measurement", ill, rows.other(code), time.start[ill, visit] + 900, visit, value=mean + sd * noise)
        tested = draws.uniform("background", _MAX_VISITS * 2)[:, number * _MAX_VISITS :][:, :_MAX_VISITS] < background
        well, visit = np.nonzero(tested & time.exists & ~latents.present[:, [ROW[name]]])
        noise = draws.normal("background_value", _MAX_VISITS * 2)[well, number * _MAX_VISITS + visit]
        value = healthy + spread * noise
        rows.add("measurement", well, rows.other(code), time.start[well, visit] + 900, visit, value=value)


def _distinct_visits(patient: np.ndarray, visit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.unique(patient * _MAX_VISITS + visit), _MAX_VISITS)


def _generate(config: SyntheticConfig, subjects: np.ndarray) -> tuple[pa.Table, pa.Table]:
    world, (burden, intercept) = draw_world(config), _calibrate(config)
    draws = _Draws(config, subjects)
    latents = _draw_latents(config, world, draws, burden)
    time = _draw_timeline(draws, latents)
    known = _emit_codes(config, world, draws, latents)
    probability = _sigmoid(intercept + _log_odds(config, world, latents, known))
    codes, position = _rank_codes(config, draws, latents, _repeat_after(draws, latents, time, known))
    rows = _Rows(world, subjects)
    _add_person(rows, draws, latents, time)
    _add_visits(rows, time)
    rows.add("diagnosis", codes.patient, codes.code, time.end[codes.patient, codes.visit], codes.visit, position)
    _add_treatment(rows, draws, world, latents, time, codes)
    label = draws.uniform("label", 1)[:, 0] < probability
    prediction = time.end[np.arange(draws.size), latents.visits - 1]
    return rows.table(), _truth(subjects, prediction, label, probability, latents)


def _truth(
    subjects: np.ndarray, prediction: np.ndarray, label: np.ndarray, probability: np.ndarray, latents: _Latents
) -> pa.Table:
    patient, condition = np.nonzero(latents.present)
    offsets = np.concatenate([[0], latents.present.sum(1).cumsum()]).astype(np.int32)
    z = latents.z.astype(np.float32)
    columns = {
        "subject_id": subjects,
        "prediction_time": pa.array((prediction - _EPOCH) * 1_000_000, TIMESTAMP),
        "label": label,
        "oracle_probability": probability,
        "z": pa.ListArray.from_arrays(np.arange(0, z.size + 1, z.shape[1], dtype=np.int32), z.ravel()),
        "conditions": pa.ListArray.from_arrays(offsets, condition.astype(np.int32)),
        "onsets": pa.ListArray.from_arrays(offsets, latents.onset[patient, condition].astype(np.int32)),
        "severity": latents.severity.astype(np.float32),
        "los_latent": latents.los.astype(np.float32),
    }
    return pa.table(columns, schema=TRUTH_SCHEMA)


def generate_shard(config: SyntheticConfig, index: int, shards: int) -> tuple[pa.Table, pa.Table]:
    """EVENTS and TRUTH of the patients with ``subject_id % shards == index``.

    Every shard is made from nothing but the configuration, and a patient's rows are the same for any ``shards``.

    Args:
        config: World, size and seed.
        index: Number of the shard.
        shards: How many there are; memory is that of one shard.

    Returns:
        EVENTS (``schema.EVENT_SCHEMA``, by subject and time) and one row of ``TRUTH_SCHEMA`` for each patient.

    Raises:
        ValueError: ``index`` is not among 0 … shards - 1.
    """
    if not 0 <= index < shards:
        raise ValueError(f"`index` must be between 0 and {shards - 1} (`shards` - 1), got {index}.")
    first = index or shards  # ids start at 1
    size = _CHUNK * shards
    chunks = [
        _generate(config, np.arange(start, min(start + size, config.patients + 1), shards))
        for start in range(first, config.patients + 1, size)
    ]
    if not chunks:
        return EVENT_SCHEMA.empty_table(), TRUTH_SCHEMA.empty_table()
    return pa.concat_tables(events for events, _ in chunks), pa.concat_tables(truth for _, truth in chunks)


def labels(truth: pa.Table) -> pa.Table:
    """LABELS of the task ``synthetic_outcome`` (``schema.LABEL_SCHEMA``).

    Every code that bears on the label is available at its ``prediction_time``, the end of the patient's last visit
    before the outcome; codes of a later visit only repeat known ones.
    """
    columns = {"subject_id": "subject_id", "prediction_time": "prediction_time", "boolean_value": "label"}
    return pa.table(
        [
            truth[columns[field.name]] if field.name in columns else pa.nulls(truth.num_rows, field.type)
            for field in LABEL_SCHEMA
        ],
        schema=LABEL_SCHEMA,
    )


def shuffle_codes(events: pa.Table, seed: int) -> pa.Table:
    """The placebo: codes of a kind change places across all patients of ``events``.

    Code frequencies, visits, positions and the number of codes of every patient stay; which codes occur together does
    not. Diagnoses, procedures and medications are shuffled each among themselves.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(events.num_rows)
    for name in CODE_KINDS:
        rows = np.flatnonzero(pc.equal(events["kind"], name.removesuffix("s").replace("diagnose", "diagnosis")))
        order[rows] = rng.permutation(rows)
    return events.set_column(
        events.schema.get_field_index("code"), EVENT_SCHEMA.field("code"), events["code"].take(pa.array(order))
    )


def code_table(config: SyntheticConfig) -> pa.Table:
    """The truth about diagnosis codes: ``code``, ``condition`` (row, null for noise and shared codes), ``name``."""
    world = draw_world(config)
    owner = np.repeat(np.arange(config.conditions), config.synonyms)
    codes = world.codes[: world.diagnoses]
    nothing = [None] * (len(codes) - len(owner))
    names = [world.names[row] for row in owner]
    return pa.table(
        {
            "code": pa.array(codes),
            "condition": pa.array([*owner.tolist(), *nothing], pa.int32()),
            "name": pa.array([*names, *nothing], pa.string()),
        }
    )
