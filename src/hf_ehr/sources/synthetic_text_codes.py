"""Synthetic visits of codes and notes → EVENTS, with the truth behind them: worlds for what MedM-PLM claims.

A visit has three factors. The shared one, s, shows in codes and in text, in both with noise; c is in codes alone (how
many of four chronic conditions are coded), t in text alone (how many of duration, dose, smoking and adherence are
unfavourable). The log odds of a readmission within 30 days are ``b + .6 s + .5 c + .5 t + ct·c·t``. Which of two drugs
a coded condition gets depends on the type of disease, which notes alone name; the drug of the visit before is often
given again. With ``ct=0`` the log odds of outcome and drugs are sums over codes and text, so that putting both side by
side says all that there is to say; with ``ct`` above 0 it does not.

Every diagnosis is of its visit's end, every drug of its start, and a note of its end. TRUTH has a row for each visit.
Every random number is a function of (seed, subject_id, purpose): a patient is the same in any shard, and worlds that
differ in ``ct`` have the same factors, diagnoses and notes. Everything said is made up: no sentence is medicine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hf_ehr.schema import BIRTH_CODE, EVENT_SCHEMA, KINDS, TIMESTAMP
from hf_ehr.sources._synthetic_process import DAY, sigmoid
from hf_ehr.sources._synthetic_text_codes_notes import write_notes
from hf_ehr.sources._synthetic_text_codes_world import (
    ACUTE,
    CODED,
    CONDITIONS,
    DRUGS,
    EDGES,
    LASTING,
    LEVELS,
    MARKERS,
    MAX_VISITS,
    NOISE_PER_VISIT,
    OTHER_DRUGS,
    READING_NOISE,
    Streams,
    SyntheticTextCodesConfig,
    code_book,
    intercept,
)

__all__ = ["DRUGS", "TRUTH_SCHEMA", "SyntheticTextCodesConfig", "generate_shard", "text_code_table"]

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("visit_id", pa.int64(), nullable=False),
        pa.field("prediction_time", TIMESTAMP, nullable=False),  # the visit's end
        pa.field("label", pa.bool_()),  # readmission within 30 days; null for the last visit, which nothing follows
        pa.field("oracle_probability", pa.float64(), nullable=False),  # of it, P(label | s, c, t)
        pa.field("s", pa.float64(), nullable=False),
        pa.field("code_reading", pa.int8(), nullable=False),  # what codes tell of s, -2 … 2
        pa.field("text_reading", pa.int8(), nullable=False),
        pa.field("c", pa.int8(), nullable=False),  # -2 … 2
        pa.field("t", pa.int8(), nullable=False),
        pa.field("early_type", pa.bool_(), nullable=False),
        pa.field("medication_probabilities", pa.list_(pa.float64()), nullable=False),  # of each of ``DRUGS``
    ]
)
"""One row per visit, by patient and time."""

_CHUNK = 2_048  # patients at a time: bounds memory
_START = 12_784 * DAY  # 2005-01-01
_NO_TIME = np.iinfo(np.int64).min
_NOTE = "Note/Discharge summary"
_OTHER = ("Sex/F", "Sex/M", BIRTH_CODE, "Visit/inpatient", "Discharge/home", _NOTE)

# Log odds of a drug: without anything; of its condition coded or not; of having been given at the visit before; of
# the type that it is for, or the other; and what the type means where the condition is coded, per unit of `ct`.
_BASE, _INDICATED, _CONTINUED, _SUITED, _SUITED_WHERE_INDICATED = -2.0, 1.5, 1.0, 0.3, 1.5
_OTHER_BASE, _OTHER_CONTINUED = -2.0, 2.5


def generate_shard(config: SyntheticTextCodesConfig, index: int, shards: int) -> tuple[pa.Table, pa.Table]:
    """EVENTS and TRUTH of the patients with ``subject_id % shards == index``.

    Every shard is made from nothing but the configuration, and a patient's rows are the same for any ``shards``.

    Args:
        config: Size, seed and weights.
        index: Number of the shard.
        shards: How many there are; memory is that of one shard.

    Returns:
        EVENTS (``schema.EVENT_SCHEMA``, by subject and time) and ``TRUTH_SCHEMA``.

    Raises:
        ValueError: ``index`` is not among 0 … shards - 1.
    """
    if not 0 <= index < shards:
        raise ValueError(f"`index` must be between 0 and {shards - 1} (`shards` - 1), got {index}.")
    first, size = index or shards, _CHUNK * shards  # ids start at 1
    chunks = [
        _generate(config, np.arange(start, min(start + size, config.patients + 1), shards))
        for start in range(first, config.patients + 1, size)
    ]
    events = pa.concat_tables([EVENT_SCHEMA.empty_table(), *(events for events, _ in chunks)])
    return events, pa.concat_tables([TRUTH_SCHEMA.empty_table(), *(truth for _, truth in chunks)])


def text_code_table(config: SyntheticTextCodesConfig) -> pa.Table:
    """The truth about diagnosis codes: ``code``, and ``role``: ``marker``, ``comorbidity``, ``acute`` or ``noise``."""
    book = code_book(config.synonyms)
    sizes = (len(MARKERS), len(CONDITIONS) - len(MARKERS), len(ACUTE), 1)
    roles = np.repeat(["marker", "comorbidity", "acute", "noise"], sizes)
    return pa.table({"code": pa.array(book.codes), "role": pa.array(roles[book.group].tolist())})


class _Factors(NamedTuple):
    """``(N, V)`` each: what is behind a visit. ``coded (N, V, 8)`` and ``findings (N, V, 4)`` make up c and t."""

    exists: np.ndarray
    s: np.ndarray
    code_reading: np.ndarray  # 0 … 4
    text_reading: np.ndarray
    coded: np.ndarray
    findings: np.ndarray
    early: np.ndarray  # (N,)

    @property
    def c(self) -> np.ndarray:
        return self.coded[..., : len(MARKERS)].sum(axis=-1) + LEVELS[0]

    @property
    def t(self) -> np.ndarray:
        return self.findings.sum(axis=-1) + LEVELS[0]


class _Times(NamedTuple):
    """``(N, V)`` seconds since 1970 and whether a visit is planned, and the patient's birth."""

    start: np.ndarray
    end: np.ndarray
    planned: np.ndarray
    birth: np.ndarray


def _generate(config: SyntheticTextCodesConfig, subjects: np.ndarray) -> tuple[pa.Table, pa.Table]:
    streams = Streams(config.seed, subjects)
    factors = _draw_factors(streams)
    odds = config.shared * factors.s + config.code * factors.c + config.text * factors.t
    odds += config.ct * factors.c * factors.t
    base = intercept(config.shared, config.code, config.text, config.ct, config.prevalence)
    probability = sigmoid(base + odds)
    readmitted = streams.uniform("readmitted", MAX_VISITS) < probability
    times = _draw_times(streams, readmitted)
    drug_probability, given = _prescribe(config, streams, factors)
    notes = write_notes(
        streams, factors.text_reading, factors.early, factors.findings, config.text_noise, factors.exists
    )
    events = _events(config, streams, factors, times, given, notes)
    return events, _truth(subjects, factors, times, readmitted, probability, drug_probability)


def _draw_factors(streams: Streams) -> _Factors:
    visits = 2 + (streams.uniform("visits", 1) * (MAX_VISITS - 1)).astype(np.int64)
    s = streams.normal("shared", MAX_VISITS)
    told = s[..., None] + READING_NOISE * streams.normal("reading", MAX_VISITS, 2)
    readings = np.searchsorted(EDGES, told)
    chronic = streams.uniform("chronic", 1, len(CONDITIONS)) < [condition.chronic for condition in CONDITIONS]
    coded = chronic & (streams.uniform("coded", MAX_VISITS, len(CONDITIONS)) < CODED)
    findings = streams.uniform("finding", MAX_VISITS, len(LASTING)) < 0.5
    findings = np.where(LASTING, findings[:, :1], findings)
    early = streams.uniform("type", 1)[:, 0] < 0.5
    exists = np.arange(MAX_VISITS) < visits
    return _Factors(exists, s, readings[..., 0], readings[..., 1], coded, findings, early)


def _draw_times(streams: Streams, readmitted: np.ndarray) -> _Times:
    """A readmission comes 2 to 29 days after the discharge, another visit after 31 days or more."""
    uniform = streams.uniform("gap", MAX_VISITS)
    gap = np.where(readmitted, 2 + 27 * uniform, 31 - 150 * np.log(uniform))
    gap = (gap[:, :-1] * DAY).astype(np.int64)
    length = ((1 + 9 * streams.uniform("stay", MAX_VISITS)) * DAY).astype(np.int64)
    first = _START + (streams.uniform("calendar", 1) * 6 * 365 * DAY).astype(np.int64)
    waited = np.concatenate([np.zeros_like(first), np.cumsum(gap + length[:, :-1], axis=1)], axis=1)
    start = first + waited
    after = np.concatenate([np.zeros_like(first, bool), readmitted[:, :-1]], axis=1)
    planned = ~after & (streams.uniform("planned", MAX_VISITS) < 0.3)
    age = (40 + 45 * streams.uniform("age", 1)[:, 0]) * 365.25 * DAY
    return _Times(start, start + length, planned, first[:, 0] - age.astype(np.int64))


def _prescribe(config: SyntheticTextCodesConfig, streams: Streams, factors: _Factors) -> tuple[np.ndarray, np.ndarray]:
    """``(N, V, drugs)`` probability of each drug given the visits before, and whether it is given."""
    uniform = streams.uniform("drug", MAX_VISITS, len(DRUGS))
    probability, given = np.zeros(uniform.shape), np.zeros(uniform.shape, bool)
    indicated = np.repeat(np.where(factors.coded, 1.0, -1.0), 2, axis=2)
    suited = np.where(factors.early[:, None], [-1.0, 1.0], [1.0, -1.0])
    suited = np.tile(suited, len(CONDITIONS))
    before = np.zeros(uniform.shape[::2])
    own = len(DRUGS) - len(OTHER_DRUGS)
    for visit in range(MAX_VISITS):
        x = indicated[:, visit]
        odds = _BASE + _INDICATED * x + _CONTINUED * before[:, :own] + _SUITED * suited
        odds += config.ct * _SUITED_WHERE_INDICATED * (x + 1) / 2 * suited
        other = _OTHER_BASE + _OTHER_CONTINUED * before[:, own:]
        probability[:, visit] = sigmoid(np.concatenate([odds, other], axis=1))
        given[:, visit] = uniform[:, visit] < probability[:, visit]
        before = given[:, visit].astype(float)
    return probability, given


def _diagnoses(config: SyntheticTextCodesConfig, streams: Streams, factors: _Factors) -> np.ndarray:
    """``(N, V, slots)`` index into the code book, -1 for none; the slots are in order of priority."""
    book = code_book(config.synonyms)
    acute = streams.uniform("acute", MAX_VISITS, len(ACUTE)).argsort(axis=2).argsort(axis=2)
    ill = acute < factors.code_reading[..., None]
    there = np.concatenate([factors.coded, ill], axis=2)
    size = np.diff(book.first)
    synonym = streams.uniform("synonym", MAX_VISITS, there.shape[2]) * size[:-1]
    code = np.where(there, book.first[:-2] + synonym.astype(np.int64), -1)
    # Each noise code of a visit is drawn from a part of its own, so that none comes twice.
    part = size[-1] // NOISE_PER_VISIT
    noise = (streams.uniform("noise", MAX_VISITS, NOISE_PER_VISIT) * part).astype(np.int64)
    code = np.concatenate([code, book.first[-2] + np.arange(NOISE_PER_VISIT) * part + noise], axis=2)
    order = np.where(code >= 0, streams.uniform("position", MAX_VISITS, code.shape[2]), 2.0).argsort(axis=2)
    return np.take_along_axis(code, order, axis=2)


class _Part(NamedTuple):
    """Events of one kind, one entry each: patient (row), code, second, and what else they have."""

    kind: str
    patient: np.ndarray
    code: np.ndarray | int
    second: np.ndarray | int
    visit: np.ndarray | int = -1
    position: np.ndarray | int = 0
    value: np.ndarray | float = np.nan
    note: np.ndarray | int = -1

    def columns(self) -> list[np.ndarray]:
        """Patient, number of the kind, and the other fields, each with an entry for every event."""
        fields = (self.patient, KINDS.index(self.kind), *self[2:])
        return [np.broadcast_to(field, self.patient.shape) for field in fields]


def _events(
    config: SyntheticTextCodesConfig,
    streams: Streams,
    factors: _Factors,
    times: _Times,
    given: np.ndarray,
    notes: pa.Array,
) -> pa.Table:
    """EVENTS by subject, time (statics first), kind and position."""
    strings = (*code_book(config.synonyms).codes, *DRUGS, *_OTHER)
    at = {code: number for number, code in enumerate(strings)}
    everyone = np.arange(len(streams.subjects))
    male = (streams.uniform("sex", 1)[:, 0] < 0.5).astype(np.int64)
    patient, visit = there = np.nonzero(factors.exists)
    start, end = times.start[there], times.end[there]
    codes = _diagnoses(config, streams, factors)[there]
    row, slot = np.nonzero(codes >= 0)
    taken, drug = np.nonzero(given[there])
    given_at = start[taken] + 60 * (drug + 1)
    number = np.arange(len(patient))
    parts = [
        _Part("static", everyone, at["Sex/F"] + male, _NO_TIME),
        _Part("birth", everyone, at[BIRTH_CODE], times.birth),
        _Part("admission", patient, at["Visit/inpatient"], start, visit, value=times.planned[there].astype(float)),
        _Part("medication", patient[taken], at[DRUGS[0]] + drug, given_at, visit[taken]),
        _Part("diagnosis", patient[row], codes[row, slot], end[row], visit[row], slot + 1),
        _Part("note", patient, at[_NOTE], end, visit, note=number),
        _Part("discharge", patient, at["Discharge/home"], end, visit),
    ]
    return _table(streams.subjects, strings, parts, notes)


def _table(subjects: np.ndarray, strings: tuple[str, ...], parts: list[_Part], notes: pa.Array) -> pa.Table:
    columns = [np.concatenate(column) for column in zip(*(part.columns() for part in parts), strict=True)]
    patient, kind, _, second, _, position = columns[:6]
    order = np.lexsort([position, kind, second, patient])
    patient, kind, code, second, visit, position, value, note = (column[order] for column in columns)
    timeless = second == _NO_TIME
    time = pa.array(np.where(timeless, 0, second) * 1_000_000, TIMESTAMP, mask=timeless)
    arrays = {
        "subject_id": pa.array(subjects[patient]),
        "time": time,
        "code": pa.array(strings).take(pa.array(code)),
        "numeric_value": pa.array(value.astype(np.float32), mask=np.isnan(value)),
        "text_value": notes.take(pa.array(note, mask=note < 0)),
        "visit_id": pa.array(subjects[patient] * 10 + visit, mask=visit < 0),
        "stay_id": pa.nulls(len(order), pa.int64()),
        "kind": pa.array(KINDS).take(pa.array(kind)),
        "position": pa.array(position.astype(np.int32), mask=position == 0),
        "available_at": time,
    }
    return pa.table(arrays, schema=EVENT_SCHEMA)


def _truth(
    subjects: np.ndarray,
    factors: _Factors,
    times: _Times,
    readmitted: np.ndarray,
    probability: np.ndarray,
    drug_probability: np.ndarray,
) -> pa.Table:
    patient, visit = there = np.nonzero(factors.exists)
    last = visit == factors.exists.sum(axis=1)[patient] - 1
    drugs = drug_probability[there]
    middle = -int(LEVELS[0])
    columns = {
        "subject_id": subjects[patient],
        "visit_id": subjects[patient] * 10 + visit,
        "prediction_time": pa.array(times.end[there] * 1_000_000, TIMESTAMP),
        "label": pa.array(readmitted[there], mask=last),
        "oracle_probability": probability[there],
        "s": factors.s[there],
        "code_reading": (factors.code_reading[there] - middle).astype(np.int8),
        "text_reading": (factors.text_reading[there] - middle).astype(np.int8),
        "c": factors.c[there].astype(np.int8),
        "t": factors.t[there].astype(np.int8),
        "early_type": factors.early[patient],
        "medication_probabilities": pa.ListArray.from_arrays(
            np.arange(0, drugs.size + 1, drugs.shape[1], dtype=np.int32), drugs.ravel()
        ),
    }
    return pa.table(columns, schema=TRUTH_SCHEMA)
