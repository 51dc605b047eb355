"""Hand-made records for tests: write what matters, the rest is filled in."""

from __future__ import annotations

from datetime import datetime, timedelta

import pyarrow as pa

from hf_ehr.schema import CODE_KINDS, RECORD_SCHEMA, STATIC_FIELDS

DAY_ZERO = datetime(2020, 1, 1)


def day(number: float) -> datetime:
    """Day ``number`` of the test calendar (day 0 is 2020-01-01)."""
    return DAY_ZERO + timedelta(days=number)


def visit(start: float, end: float | None = None, **fields) -> dict:
    """A visit from day ``start`` to day ``end``; codes become available at its end unless ``*_at`` says otherwise."""
    end = start if end is None else end
    row = {"visit_id": int(start * 10), "start": day(start), "end": day(end), "kind": "inpatient", "planned": None}
    row |= {"discharged_to": "home", "notes": [], "stays": []}
    for kind in CODE_KINDS:
        codes = list(fields.pop(kind, []))
        row[kind] = codes
        row[f"{kind}_at"] = fields.pop(f"{kind}_at", [day(end)] * len(codes))
    return row | fields


def patient(subject_id: int, visits: list[dict], **fields) -> dict:
    """A record; ``birth_time`` defaults to 60 years before day 0."""
    row = dict.fromkeys(STATIC_FIELDS.values()) | {"death_time": None, "birth_time": day(-60 * 365.25)}
    return row | fields | {"subject_id": subject_id, "visits": visits}


def records(*patients: dict) -> pa.Table:
    """RECORDS of the given patients."""
    return pa.Table.from_pylist(list(patients), schema=RECORD_SCHEMA)
