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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE, EVENT_SCHEMA, KINDS, TIMESTAMP, validate_labels
from hf_ehr.sources._synthetic_process import (
    DAY,
    DISCHARGES,
    MAX_VISITS,
    Codes,
    Draws,
    Latents,
    Timeline,
    calibrate,
    choice,
    draw_latents,
    draw_timeline,
    emit_codes,
    log_odds,
    rank_codes,
    repeat_after,
    sigmoid,
)
from hf_ehr.sources._synthetic_worlds import DRUGS, ROW, SyntheticConfig, World, WorldName, draw_world

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
_EPOCH = 25_567 * DAY  # seconds from 1900-01-01, where the timeline starts, to 1970-01-01
_ADMISSIONS = ("Visit/inpatient", "Visit/emergency", "Visit/outpatient")
_STATICS = {
    "Sex": ("F", "M"),
    "Race": ("White", "Black", "Asian", "Other"),
    "Ethnicity": ("NotHispanic", "Hispanic"),
    "Language": ("English", "Spanish", "Other"),
    "Insurance": ("Private", "Medicare", "Medicaid"),
    "MaritalStatus": ("Married", "Single", "Widowed", "Divorced"),
}
_MEASUREMENTS = (  # code, condition; (chance, mean, sd) where it is coded; the same for patients without it
    ("LOINC/4548-4", "type_2_diabetes", (0.4, 7.6, 1.1), (0.03, 5.4, 0.35)),  # HbA1c, %
    ("LOINC/30934-9", "heart_failure", (0.4, 900.0, 250.0), (0.02, 60.0, 18.0)),  # BNP, pg/mL
)
_OTHER_CODES = (
    *_ADMISSIONS,
    *(f"Discharge/{name}" for name in DISCHARGES),
    *(f"{name}/{value}" for name, values in _STATICS.items() for value in values),
    *(row[0] for row in _MEASUREMENTS),
    BIRTH_CODE,
    DEATH_CODE,
)
_OTHER = {code: index for index, code in enumerate(_OTHER_CODES)}


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
        arrays = {
            "subject_id": pa.array(subject),
            "time": time,
            "code": _spell(code, self._strings),
            "numeric_value": pa.array(value, mask=np.isnan(value)),
            "text_value": pa.nulls(len(order), pa.string()),
            "visit_id": pa.array(subject * 100 + visit, mask=visit < 0),
            "stay_id": pa.nulls(len(order), pa.int64()),
            "kind": _spell(kind, pa.array(KINDS)),
            "position": pa.array(position.astype(np.int32), mask=(position == 0) | (second == 0)),
            "available_at": time,
        }
        return pa.table(arrays, schema=EVENT_SCHEMA)


def _spell(index: np.ndarray, strings: pa.Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(index.astype(np.int32), strings).cast(pa.string())


def _add_person(rows: _Rows, draws: Draws, latents: Latents, time: Timeline) -> None:
    everyone = np.arange(draws.size)
    uniform = draws.uniform("static", len(_STATICS))
    old = time.age >= 65
    chosen = {
        "Sex": (draws.uniform("sex", 1)[:, 0] > sigmoid(0.1 + 0.6 * latents.z[:, 1])).astype(np.int64),
        "Race": choice(uniform[:, 1], 0.68, 0.17, 0.06),
        "Ethnicity": choice(uniform[:, 2], 0.85),
        "Language": choice(uniform[:, 3], 0.88, 0.08),
        "Insurance": np.where(old, choice(uniform[:, 4], 0.1, 0.85), choice(uniform[:, 4], 0.7, 0.05)),
        "MaritalStatus": np.where(old, choice(uniform[:, 5], 0.5, 0.1, 0.25), choice(uniform[:, 5], 0.5, 0.35, 0.02)),
    }
    for number, (name, values) in enumerate(_STATICS.items()):
        rows.add("static", everyone, rows.other(f"{name}/{values[0]}") + chosen[name], 0, position=number)
    rows.add("birth", everyone, rows.other(BIRTH_CODE), time.birth)
    dead = np.flatnonzero(time.death)
    rows.add("death", dead, rows.other(DEATH_CODE), time.death[dead])


def _add_visits(rows: _Rows, time: Timeline) -> None:
    patient, visit = np.nonzero(time.exists)
    at = (patient, visit)
    rows.add(
        "admission", patient, rows.other(_ADMISSIONS[0]) + time.kind[at], time.start[at], visit, value=time.planned[at]
    )
    rows.add(
        "discharge", patient, rows.other(f"Discharge/{DISCHARGES[0]}") + time.disposition[at], time.end[at], visit
    )


def _add_treatment(rows: _Rows, draws: Draws, world: World, latents: Latents, time: Timeline, codes: Codes) -> None:
    """Drugs, and tests of diabetes and heart failure, in a part of the visits where the condition is coded."""
    for number, (_, name) in enumerate(DRUGS):
        patient, visit = np.nonzero(_coded(codes, ROW[name], time))
        given = draws.at("drug", patient, number * MAX_VISITS + visit) < 0.5
        patient, visit = patient[given], visit[given]
        second = time.start[patient, visit] + 60 * (number + 1)
        rows.add("medication", patient, world.diagnoses + number, second, visit, position=number + 1)
    uniform = draws.uniform("test", len(_MEASUREMENTS) * MAX_VISITS).reshape(draws.size, -1, MAX_VISITS)
    noise = draws.normal("test_value", len(_MEASUREMENTS) * MAX_VISITS).reshape(uniform.shape)
    for number, (code, name, (chance, mean, sd), (background, healthy, spread)) in enumerate(_MEASUREMENTS):
        ill = latents.present[:, [ROW[name]]]
        tested = uniform[:, number] < np.where(ill, chance * _coded(codes, ROW[name], time), background)
        patient, visit = np.nonzero(tested & time.exists)
        second = time.start[patient, visit] + 900 + 60 * number
        value = np.where(ill, mean + sd * noise[:, number], healthy + spread * noise[:, number])[patient, visit]
        rows.add("measurement", patient, rows.other(code), second, visit, value=value)


def _coded(codes: Codes, condition: int, time: Timeline) -> np.ndarray:
    """``(N, 16)`` visits where the condition has a code."""
    mask = np.zeros(time.exists.shape, bool)
    hit = codes.condition == condition
    mask[codes.patient[hit], codes.visit[hit]] = True
    return mask


def _generate(config: SyntheticConfig, subjects: np.ndarray) -> tuple[pa.Table, pa.Table]:
    world, (burden, intercept) = draw_world(config), calibrate(config)
    draws = Draws(config, subjects)
    latents = draw_latents(config, world, draws, burden)
    time = draw_timeline(draws, latents)
    known = emit_codes(config, world, draws, latents)
    probability = sigmoid(intercept + log_odds(world, latents, known))
    codes, position = rank_codes(world, draws, latents, repeat_after(draws, latents, time, known))
    rows = _Rows(world, subjects)
    _add_person(rows, draws, latents, time)
    _add_visits(rows, time)
    rows.add("diagnosis", codes.patient, codes.code, time.end[codes.patient, codes.visit], codes.visit, position)
    _add_treatment(rows, draws, world, latents, time, codes)
    label = draws.uniform("label", 1)[:, 0] < probability
    prediction = time.end[np.arange(draws.size), latents.visits - 1]
    return rows.table(), _truth(subjects, prediction, label, probability, latents)


def _truth(
    subjects: np.ndarray, prediction: np.ndarray, label: np.ndarray, probability: np.ndarray, latents: Latents
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
    values = truth.select(["subject_id", "prediction_time", "label"]).rename_columns(
        ["subject_id", "prediction_time", "boolean_value"]
    )
    return validate_labels(values)


def shuffle_codes(events: pa.Table, seed: int) -> pa.Table:
    """The placebo: codes of a kind change places across all patients of ``events``.

    Code frequencies, visits, positions and the number of codes of every patient stay; which codes occur together does
    not. Diagnoses, procedures and medications are shuffled each among themselves.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(events.num_rows)
    for kind in ("diagnosis", "procedure", "medication"):
        rows = np.flatnonzero(pc.equal(events["kind"], kind))
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
