"""Synthetic intensive care → EVENTS, with the truth behind them: a world for what MedHMP claims.

Patients have chronic conditions, and 1 to 8 visits over the years; about half of the inpatient ones have one or two
stays in intensive care. A visit has a severity, made of four factors, and age and sex know nothing of either. It
decides how three hidden states (stable, deteriorating, recovering) follow each other, hour by hour, and with them the
hazards of ventilation, of a vasopressor and of death; it shows in 36 series, in diagnoses, drugs and notes.
Readmission depends on severity, chronic conditions and diagnoses. Every switch of :class:`SyntheticIcuConfig` takes
one of these links away, and nothing else.

TRUTH has one row for each question that a named task asks: ``icu_mortality_t48``, ``arf_onset_after_t4`` (12, 48),
``shock_onset_after_t4`` (12, 48) and ``readmission_30d``, with the probability that the process gives to it: for
stays, given the hidden state at the prediction time, solved backwards over the hours. No model can see that state, so
the oracle is a bound that stays out of reach. Every random number is a function of (seed, subject_id, purpose): a
patient is the same in any shard, and so is every draw that a switch leaves alone.

Values are made up: no sentence and no number here is medicine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE, EVENT_SCHEMA, KINDS, TIMESTAMP
from hf_ehr.sources._synthetic_icu_codes import Coded, draw_diagnoses, draw_drugs, present_conditions
from hf_ehr.sources._synthetic_icu_course import OBSERVED
from hf_ehr.sources._synthetic_icu_notes import CATEGORIES, Notes, write_notes
from hf_ehr.sources._synthetic_icu_patients import (
    DAY,
    HOUR,
    MAX_VISITS,
    People,
    Severity,
    Stays,
    Visits,
    blind_copy,
    draw_people,
    draw_severity,
    draw_visits,
)
from hf_ehr.sources._synthetic_icu_series import Measurements, body, measure, ventilator_hours
from hf_ehr.sources._synthetic_icu_variables import ICU_VARIABLES
from hf_ehr.sources._synthetic_icu_world import (
    FACTORS,
    SWITCHES,
    IcuWorld,
    Streams,
    SyntheticIcuConfig,
    draw_icu_world,
)
from hf_ehr.sources._synthetic_process import DISCHARGES, INPATIENT, choice
from hf_ehr.sources.physionet2012 import UNITS

__all__ = ["SWITCHES", "TRUTH_SCHEMA", "SyntheticIcuConfig", "generate_shard", "icu_code_table"]

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("prediction_time", TIMESTAMP, nullable=False),
        pa.field("label", pa.bool_(), nullable=False),
        pa.field("oracle_probability", pa.float64(), nullable=False),  # P(label | latents at the prediction time)
        pa.field("visit_id", pa.int64(), nullable=False),
        pa.field("stay_id", pa.int64()),  # null for readmission
        pa.field("state", pa.int8()),  # 0 stable, 1 deteriorating, 2 recovering; null for readmission
        pa.field("severity", pa.float32(), nullable=False),  # of the visit
        pa.field("factors", pa.list_(pa.float32()), nullable=False),  # of the visit: perfusion, respiration, …
    ]
)
"""One row per question of a task, by task, patient and time."""

_CHUNK = 512  # patients at a time: bounds memory
_EPOCH = 25_567 * DAY  # seconds from 1900-01-01, where the timeline starts, to 1970-01-01
_STATICS = {
    "Sex": ("F", "M"),
    "Race": ("White", "Black", "Asian", "Other"),
    "Insurance": ("Medicare", "Private", "Medicaid"),
    "MaritalStatus": ("Married", "Single", "Widowed", "Divorced"),
}
_VISITS = ("Visit/inpatient", "", "Visit/outpatient")
_TREATMENTS = {"arf": "ICU/ventilation", "shock": "ICU/vasopressor"}
_MEASURED = tuple(f"CINC2012/{variable.name}" for variable in ICU_VARIABLES)
_OTHER = (
    *_MEASURED, "CINC2012/MechVent", "CINC2012/Height", "CINC2012/Weight", "CINC2012/ICUType", *_TREATMENTS.values(),
    *_VISITS, "Stay/icu", *(f"Discharge/{name}" for name in DISCHARGES), *(f"Note/{name}" for name in CATEGORIES),
    *(f"{name}/{value}" for name, values in _STATICS.items() for value in values), BIRTH_CODE, DEATH_CODE,
)  # fmt: skip
_NUMBER = {code: number for number, code in enumerate(_OTHER)}


def generate_shard(config: SyntheticIcuConfig, index: int, shards: int) -> tuple[pa.Table, pa.Table]:
    """EVENTS and TRUTH of the patients with ``subject_id % shards == index``.

    Every shard is made from nothing but the configuration, and a patient's rows are the same for any ``shards``.

    Args:
        config: Size, seed and switches.
        index: Number of the shard.
        shards: How many there are; memory is that of one shard.

    Returns:
        EVENTS (``schema.EVENT_SCHEMA``, by subject and time) and ``TRUTH_SCHEMA``.

    Raises:
        ValueError: ``index`` is not among 0 … shards - 1.
    """
    if not 0 <= index < shards:
        raise ValueError(f"`index` must be between 0 and {shards - 1} (`shards` - 1), got {index}.")
    first = config.first_patient + (index - config.first_patient) % shards
    end, size = config.first_patient + config.patients, _CHUNK * shards
    chunks = [_generate(config, np.arange(start, min(start + size, end), shards)) for start in range(first, end, size)]
    events = pa.concat_tables([EVENT_SCHEMA.empty_table(), *(events for events, _ in chunks)])
    truth = pa.concat_tables([TRUTH_SCHEMA.empty_table(), *(truth for _, truth in chunks)])
    order = [("task", "ascending"), ("subject_id", "ascending"), ("prediction_time", "ascending")]
    return events, truth.sort_by(order)


def icu_code_table(config: SyntheticIcuConfig) -> pa.Table:
    """The truth about diagnosis codes: ``code`` and ``condition`` (its name, null for codes that mean nothing)."""
    world = draw_icu_world(config.synonyms)
    owners = [name for name, size in zip(world.names, np.diff(world.first), strict=True) for _ in range(size)]
    names = owners + [None] * (len(world.codes) - len(owners))
    return pa.table({"code": pa.array(world.codes), "condition": pa.array(names, pa.string())})


class _Course(NamedTuple):
    """What happens to a block of patients: who they are, what decides their stays, what the codes show, and when."""

    people: People
    severity: Severity
    shown: Severity
    visits: Visits
    stays: Stays


def _happen(config: SyntheticIcuConfig, streams: Streams) -> _Course:
    people = draw_people(streams)
    severity = draw_severity(config, streams, people)
    shown = blind_copy(config, streams, people, severity)
    return _Course(people, severity, shown, *draw_visits(streams, people, severity, shown))


def _generate(config: SyntheticIcuConfig, subjects: np.ndarray) -> tuple[pa.Table, pa.Table]:
    world, streams = draw_icu_world(config.synonyms), Streams(config.seed, subjects)
    course = _happen(config, streams)
    people, severity, shown, visits, stays = course
    present = present_conditions(people, visits)
    rows = _Rows(world, subjects)
    _add_people(rows, streams, people, visits)
    _add_visits(rows, visits)
    _add_codes(rows, world, draw_diagnoses(streams, world, people, visits, present), "diagnosis")
    _add_codes(rows, world, draw_drugs(streams, world, visits, present), "medication")
    _add_stays(rows, streams, people, stays)
    _add_measurements(rows, stays, measure(config, streams, people, severity, stays))
    if config.notes:
        _add_notes(rows, write_notes(streams, world, shown, visits, present))
    return rows.table(), _truth(subjects, course)


class _Rows:
    """Collects events by column and turns them into one sorted Arrow table."""

    def __init__(self, world: IcuWorld, subjects: np.ndarray) -> None:
        self._subjects = subjects
        self._strings = pa.array([*world.codes, *world.drugs, *_OTHER])
        self._other = len(world.codes) + len(world.drugs)
        self._texts: list[pa.Array] = [pa.array(UNITS)]
        self._parts: list[tuple[np.ndarray, ...]] = []

    def other(self, code: str) -> int:
        """Index of a code that is no diagnosis and no drug."""
        return self._other + _NUMBER[code]

    def texts(self, texts: pa.Array) -> np.ndarray:
        """Takes the texts in; their indices."""
        first = sum(map(len, self._texts))
        self._texts.append(texts)
        return first + np.arange(len(texts))

    def add(
        self,
        kind: str,
        patient: np.ndarray,
        code: np.ndarray | int,
        second: np.ndarray | int,
        visit: np.ndarray | int = -1,
        stay: np.ndarray | int = -1,
        position: np.ndarray | int = 0,
        value: np.ndarray | float = np.nan,
        text: np.ndarray | int = -1,
    ) -> None:
        """Adds one event for each entry of ``patient``; -1, position 0, value NaN and second 0 become nulls.

        ``visit`` and ``stay`` are numbers within the patient and the visit, ``text`` an index of :meth:`texts`.
        """
        columns = (
            patient,
            second,
            KINDS.index(kind),
            position,
            code,
            visit,
            stay,
            text,
            np.asarray(value, np.float32),
        )
        self._parts.append(tuple(np.broadcast_to(column, patient.shape) for column in columns))

    def table(self) -> pa.Table:
        """EVENTS by subject, time (statics first), kind and position."""
        columns = [np.concatenate(part) for part in zip(*self._parts, strict=True)]
        patient, second, kind, position = columns[:4]
        order = np.argsort(patient << 49 | second << 16 | kind << 12 | position, kind="stable")
        patient, second, kind, position, code, visit, stay, text, value = (column[order] for column in columns)
        time = pa.array((second - _EPOCH) * 1_000_000, TIMESTAMP, mask=second == 0)
        subject = self._subjects[patient]
        texts = pa.concat_arrays(self._texts)
        arrays = {
            "subject_id": pa.array(subject),
            "time": time,
            "code": _spell(code, self._strings),
            "numeric_value": pa.array(value, mask=np.isnan(value)),
            "text_value": texts.take(pa.array(text, mask=text < 0)),
            "visit_id": pa.array(visit_id(subject, visit), mask=visit < 0),
            "stay_id": pa.array(stay_id(subject, visit, stay), mask=stay < 0),
            "kind": _spell(kind, pa.array(KINDS)),
            "position": pa.array(position.astype(np.int32), mask=(position == 0) | (second == 0)),
            "available_at": time,
        }
        return pa.table(arrays, schema=EVENT_SCHEMA)


def visit_id(subject: np.ndarray, visit: np.ndarray) -> np.ndarray:
    """Ids of visits: the patient's, and the number of the visit in the last two digits."""
    return subject * 100 + visit


def stay_id(subject: np.ndarray, visit: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """Ids of stays: the visit's, and the number of the stay in the last digit."""
    return visit_id(subject, visit) * 10 + stay


def _spell(index: np.ndarray, strings: pa.Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(index.astype(np.int32), strings).cast(pa.string())


def _add_people(rows: _Rows, streams: Streams, people: People, visits: Visits) -> None:
    everyone, uniform = np.arange(streams.size), streams.uniform("static", len(_STATICS))
    chosen = {
        "Sex": people.male.astype(np.int64),
        "Race": choice(uniform[:, 1], 0.7, 0.16, 0.06),
        "Insurance": choice(uniform[:, 2], 0.5, 0.35),
        "MaritalStatus": choice(uniform[:, 3], 0.5, 0.25, 0.15),
    }
    for number, (name, values) in enumerate(_STATICS.items()):
        rows.add("static", everyone, rows.other(f"{name}/{values[0]}") + chosen[name], 0, position=number)
    rows.add("birth", everyone, rows.other(BIRTH_CODE), visits.birth)
    dead, visit = np.nonzero(visits.died)
    rows.add("death", dead, rows.other(DEATH_CODE), visits.end[dead, visit])


def _add_visits(rows: _Rows, visits: Visits) -> None:
    patient, visit = at = np.nonzero(visits.exists)
    planned = visits.planned[at].astype(np.float32)
    rows.add("admission", patient, rows.other(_VISITS[0]) + visits.kind[at], visits.start[at], visit, value=planned)
    gone = rows.other(f"Discharge/{DISCHARGES[0]}") + visits.disposition[at]
    rows.add("discharge", patient, gone, visits.end[at], visit)


def _add_codes(rows: _Rows, world: IcuWorld, codes: Coded, kind: str) -> None:
    index = codes.code if kind == "diagnosis" else len(world.codes) + codes.code
    rows.add(kind, codes.patient, index, codes.second, codes.visit, position=codes.position)


def _add_stays(rows: _Rows, streams: Streams, people: People, stays: Stays) -> None:
    """Beginning and end, the unit, height and weight, and the treatments."""
    place = {"visit": stays.visit, "stay": stays.number}
    rows.add("admission", stays.patient, rows.other("Stay/icu"), stays.start, text=stays.unit, **place)
    rows.add("discharge", stays.patient, rows.other("Stay/icu"), stays.end, text=stays.unit, **place)
    rows.add("measurement", stays.patient, rows.other("CINC2012/ICUType"), stays.start, text=stays.unit, **place)
    for name, value in zip(("Height", "Weight"), body(streams, people, stays), strict=True):
        rows.add("measurement", stays.patient, rows.other(f"CINC2012/{name}"), stays.start, value=value, **place)
    for name, code in _TREATMENTS.items():
        row = np.flatnonzero(~np.isnan(stays.onset[name]))
        second = stays.start[row] + (stays.onset[name][row] * HOUR).astype(np.int64)
        _measured(rows, stays, row, rows.other(code), second, 1.0)
    row, second = ventilator_hours(stays)
    _measured(rows, stays, row, rows.other("CINC2012/MechVent"), second, 1.0)


def _add_measurements(rows: _Rows, stays: Stays, values: Measurements) -> None:
    _measured(rows, stays, values.stay, rows.other(_MEASURED[0]) + values.variable, values.second, values.value)


def _measured(
    rows: _Rows, stays: Stays, row: np.ndarray, code: np.ndarray | int, second: np.ndarray, value: np.ndarray | float
) -> None:
    rows.add("measurement", stays.patient[row], code, second, stays.visit[row], stays.number[row], value=value)


def _add_notes(rows: _Rows, notes: Notes) -> None:
    code = rows.other(f"Note/{CATEGORIES[0]}") + notes.category
    rows.add("note", notes.patient, code, notes.second, notes.visit, text=rows.texts(notes.text))


def _truth(subjects: np.ndarray, course: _Course) -> pa.Table:
    people, severity, _, visits, stays = course
    died = visits.died[stays.patient, stays.visit]
    parts = [_stay_truth("icu_mortality_t48", OBSERVED, died, stays.death, subjects, severity, stays)]
    for (name, hour), risk in stays.risk.items():
        onset = stays.onset[name]
        asked = np.where(onset <= hour, np.nan, risk)
        task = f"{name}_onset_after_t{hour}"
        parts.append(_stay_truth(task, hour, ~np.isnan(onset), asked, subjects, severity, stays))
    return pa.concat_tables([*parts, _readmission_truth(subjects, people, severity, visits)])


def _stay_truth(
    task: str, hour: int, label: np.ndarray, probability: np.ndarray, subjects: np.ndarray, severity: Severity,
    stays: Stays,
) -> pa.Table:  # fmt: skip
    """Rows of the stays that are asked: those that still run ``hour`` hours after their start, NaN left out."""
    row = np.flatnonzero((stays.hours > hour) & ~np.isnan(probability))
    patient, visit = stays.patient[row], stays.visit[row]
    ids = stay_id(subjects[patient], visit, stays.number[row])
    second = stays.start[row] + hour * HOUR
    state = pa.array(stays.state[row, hour].astype(np.int8))
    return _rows_of(
        task, subjects, severity, patient, visit, second, label[row], probability[row], pa.array(ids), state
    )


def _readmission_truth(subjects: np.ndarray, people: People, severity: Severity, visits: Visits) -> pa.Table:
    """Rows of the inpatient discharges that the task asks about: alive, on advice, home or to a facility, followed."""
    asked = visits.exists & (visits.kind == INPATIENT) & (np.arange(MAX_VISITS) + 1 < people.visits[:, None])
    left_out = ("transfer", "against_advice", "died")
    asked &= ~np.isin(visits.disposition, [DISCHARGES.index(name) for name in left_out])
    patient, visit = at = np.nonzero(asked)
    stay, state = pa.nulls(len(patient), pa.int64()), pa.nulls(len(patient), pa.int8())
    label, chance = visits.readmitted[at], visits.readmission[at]
    return _rows_of("readmission_30d", subjects, severity, patient, visit, visits.end[at], label, chance, stay, state)


def _rows_of(
    task: str, subjects: np.ndarray, severity: Severity, patient: np.ndarray, visit: np.ndarray, second: np.ndarray,
    label: np.ndarray, probability: np.ndarray, stay: pa.Array, state: pa.Array,
) -> pa.Table:  # fmt: skip
    factors = severity.factors[patient, visit].astype(np.float32)
    offsets = np.arange(len(patient) + 1, dtype=np.int32) * len(FACTORS)
    columns = {
        "subject_id": subjects[patient],
        "task": pa.array([task]).take(pa.array(np.zeros(len(patient), np.int64))),
        "prediction_time": pa.array((second - _EPOCH) * 1_000_000, TIMESTAMP),
        "label": label,
        "oracle_probability": probability,
        "visit_id": visit_id(subjects[patient], visit),
        "stay_id": stay,
        "state": state,
        "severity": severity.severity[patient, visit].astype(np.float32),
        "factors": pa.ListArray.from_arrays(pa.array(offsets), pa.array(factors.ravel())),
    }
    return pa.table(columns, schema=TRUTH_SCHEMA)
