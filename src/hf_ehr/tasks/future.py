"""The knowable part of a record at its prediction time, and the same record with another future (for the audit).

Written patient by patient in plain Python on purpose: it is the rule itself, the yardstick for the fast code that
makes examples. For samples, not for data sets.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from hf_ehr.schema import CODE_KINDS, DISPOSITIONS, RECORD_SCHEMA, VISIT_KINDS

_JUNK = {"diagnoses": "ICD10CM/I50.9", "procedures": "ICD9Proc/39.95", "medications": "ATC/C03CA01"}


def truncate_future(records: pa.Table, labels: pa.Table) -> pa.Table:
    """RECORDS as far as they were known at the prediction time of each patient's label (inclusive).

    A visit that began later is gone. One in progress has no end and no discharge; its codes, notes, stays and
    measurements are there as far as they were available. A later death is unknown. Patients without a label stay as
    they are.

    Args:
        records: RECORDS.
        labels: LABELS, at most one per patient.

    Raises:
        ValueError: A patient has several labels.
    """
    now = _prediction_times(labels)
    rows = [_known_at(row, now[row["subject_id"]]) if row["subject_id"] in now else row for row in records.to_pylist()]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def scramble_future(records: pa.Table, labels: pa.Table, seed: int) -> pa.Table:
    """RECORDS whose labelled patients keep what was known and get an invented future: visits, codes, notes,
    measurements, discharge, death.

    Args:
        records: RECORDS.
        labels: LABELS, at most one per patient.
        seed: Of the invention.
    """
    now = _prediction_times(labels)
    rows = []
    for row in truncate_future(records, labels).to_pylist():
        if row["subject_id"] in now:
            _invent(row, now[row["subject_id"]], random.Random(f"{seed}:{row['subject_id']}"))
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def _prediction_times(labels: pa.Table) -> dict[int, datetime]:
    subjects = labels["subject_id"].to_pylist()
    if len(set(subjects)) != len(subjects):
        raise ValueError("`labels` must hold one label per patient. Loop over audit.rounds(labels).")
    return dict(zip(subjects, labels["prediction_time"].to_pylist(), strict=True))


def _known_at(row: dict[str, Any], now: datetime) -> dict[str, Any]:
    death = row["death_time"]
    visits = [_visit_at(visit, now) for visit in row["visits"] if visit["start"] is not None and visit["start"] <= now]
    return row | {"visits": visits, "death_time": death if death is not None and death <= now else None}


def _visit_at(visit: dict[str, Any], now: datetime) -> dict[str, Any]:
    over = visit["end"] is not None and visit["end"] <= now
    known = visit | ({} if over else {"end": None, "discharged_to": None})
    for kind in CODE_KINDS:
        pairs = zip(visit[kind] or [], visit[f"{kind}_at"] or [], strict=True)
        kept = [(code, at) for code, at in pairs if (over if at is None else at <= now)]
        known |= {kind: [code for code, _ in kept], f"{kind}_at": [at for _, at in kept]}
    known["notes"] = [note for note in visit["notes"] or [] if note["time"] is not None and note["time"] <= now]
    known["stays"] = [_stay_at(stay, now) for stay in visit["stays"] or [] if stay["start"] and stay["start"] <= now]
    return known


def _stay_at(stay: dict[str, Any], now: datetime) -> dict[str, Any]:
    hours = (now - stay["start"]) / timedelta(hours=1)
    kept = [m for m in stay["measurements"] or [] if m["hour"] is not None and m["hour"] <= hours]
    over = stay["end"] is not None and stay["end"] <= now
    return stay | {"measurements": kept, "end": stay["end"] if over else None}


def _invent(row: dict[str, Any], now: datetime, draw: random.Random) -> None:
    """Changes everything about `row` that lies after `now`, in place."""
    for visit in row["visits"]:
        if visit["end"] is None:
            _go_on(visit, now, draw)
        elif draw.random() < 0.5:  # a bill that comes late
            _append_codes(visit, _later(now, draw), draw)
    for _ in range(draw.randint(0, 3)):
        row["visits"].append(_new_visit(_later(now, draw), draw))
    row["visits"].sort(key=lambda visit: visit["start"])
    if row["death_time"] is None and draw.random() < 0.5:
        row["death_time"] = _later(now, draw)


def _go_on(visit: dict[str, Any], now: datetime, draw: random.Random) -> None:
    visit["end"] = _later(now, draw)
    visit["discharged_to"] = draw.choice(DISPOSITIONS)
    visit["notes"].append({"time": visit["end"], "category": "Discharge summary", "text": f"later {draw.random()}"})
    _append_codes(visit, visit["end"], draw)
    for stay in visit["stays"]:
        later = _later(now, draw)
        stay["end"] = later if stay["end"] is None else stay["end"]
        hour = (later - stay["start"]) / timedelta(hours=1)
        stay["measurements"].append({"hour": hour, "name": "LOINC/30934-9", "value": draw.random(), "text": None})


def _append_codes(visit: dict[str, Any], at: datetime, draw: random.Random) -> None:
    """A code that becomes known later may well be the principal one."""
    for kind, code in _JUNK.items():
        position = draw.randint(0, len(visit[kind]))
        visit[kind].insert(position, f"{code[:-1]}{draw.randint(0, 9)}")
        visit[f"{kind}_at"].insert(position, at)


def _new_visit(start: datetime, draw: random.Random) -> dict[str, Any]:
    end = start + timedelta(days=draw.choice([0, 1, 5, 8, 20]))
    visit = {
        "visit_id": -draw.randint(1, 10**6),
        "start": start,
        "end": end,
        "planned": draw.choice([None, True, False]),
    }
    visit |= {"kind": draw.choice(VISIT_KINDS), "discharged_to": draw.choice(DISPOSITIONS), "stays": []}
    visit |= {"notes": [{"time": end, "category": "Nursing", "text": f"later {draw.random()}"}]}
    for kind in CODE_KINDS:
        visit |= {kind: [], f"{kind}_at": []}
    _append_codes(visit, end, draw)
    return visit


def _later(now: datetime, draw: random.Random) -> datetime:
    return now + timedelta(seconds=1) + timedelta(hours=draw.choice([0, 1, 24, 200, 700, 2000, 9000]) * draw.random())
