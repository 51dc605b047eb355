"""Measurements of intensive care as EVENTS: wide rows made long, cells parsed, impossible values reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from hf_ehr.sources._codes import joined
from hf_ehr.sources._parse import as_value
from hf_ehr.sources._table_cells import FILE, seconds
from hf_ehr.sources.engine import ROW, as_events

if TYPE_CHECKING:
    import ibis.expr.types as ir

_PRESSURE = (0.0, 350.0)  # mmHg
POSSIBLE: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("Temp", "temperature", "temp"), (20.0, 45.0)),  # °C
    **dict.fromkeys(("HR", "heartrate", "hr"), (0.0, 350.0)),
    **dict.fromkeys(("RespRate", "Resp", "respiration", "resp"), (0.0, 150.0)),
    **dict.fromkeys(("SysABP", "DiasABP", "MAP", "NISysABP", "NIDiasABP", "NIMAP", "SBP", "DBP"), _PRESSURE),
    **dict.fromkeys(("systemicsystolic", "systemicdiastolic", "systemicmean", "sbp", "dbp", "map"), _PRESSURE),
    **dict.fromkeys(("noninvasivesystolic", "noninvasivediastolic", "noninvasivemean"), _PRESSURE),
    **dict.fromkeys(("SaO2", "O2Sat", "sao2", "o2sat"), (0.0, 100.0)),
    **dict.fromkeys(("pH", "ph"), (6.0, 8.5)),
    "FiO2": (0.2, 1.0),
    "fio2": (20.0, 100.0),  # YAIB gives percent
    "GCS": (3.0, 15.0),
    **dict.fromkeys(("PaCO2", "pco2", "EtCO2", "etco2"), (0.0, 250.0)),
    **dict.fromkeys(("PaO2", "po2"), (1.0, 800.0)),  # mmHg
    **dict.fromkeys(("Height", "admissionheight"), (50.0, 250.0)),  # cm
    **dict.fromkeys(("Weight", "admissionweight"), (1.0, 500.0)),  # kg
    "MechVent": (0.0, 1.0),
    "Urine": (0.0, 20_000.0),  # mL of one entry
    **dict.fromkeys(("HCT", "Hct"), (1.0, 80.0)),  # %
    "Hgb": (0.5, 30.0),
    **dict.fromkeys(("K", "Potassium"), (0.5, 30.0)),  # mmol/L
    "Na": (60.0, 250.0),
    "Glucose": (1.0, 3_000.0),  # mg/dL
    **dict.fromkeys(("Age", "age"), (0.0, 130.0)),
    "HospAdmTime": (-100_000.0, 0.0),  # hours; the hospital admits before the unit does
    "ICULOS": (1.0, 100_000.0),
}
"""What a value can be in a living person (or its device can show), by variable name; beyond it lies a slip of the
decimal point, of the unit or of the probe. Wide on purpose: unusual values stay, 0 mmHg too. A variable that is not
listed need only be 0 or more, unless it is among ``SIGNED``."""
SIGNED = ("BaseExcess", "be", "st1", "st2", "st3", "cvp", "icp", "pasystolic", "padiastolic", "pamean")

_YEAR = 365.25 * 86_400


def birth_from_age(start: ir.TimestampValue, age: ir.NumericValue) -> ir.TimestampValue:
    """The birth of a patient of this age at ``start``; a whole number of years counts as completed years.

    Half a year is then added, so that the completed years come out right however a year's length is counted.
    """
    import ibis

    return start - seconds(ibis.ifelse(age == age.floor(), age + 0.5, age) * _YEAR)


def melt(rows: ir.Table, names: Sequence[str]) -> ir.Table:
    """One row per cell that is not null: ``_name`` and ``_text`` in place of the columns ``names``, all text."""
    import ibis

    cells = [ibis.struct({"name": ibis.literal(name), "text": rows[name]}) for name in names]
    long = rows.mutate(_cell=ibis.array(cells).unnest()).drop(*names)
    long = long.mutate(_name=long["_cell"]["name"], _text=long["_cell"]["text"]).drop("_cell")
    return long.filter(long["_text"].notnull())


def measurement_events(
    rows: ir.Table, vocabulary: str, *, column: str | None = None, missing: str | None = None
) -> tuple[ir.Table, ir.Table]:
    """(events, rejected rows) of measurements as text.

    A value that is no finite number, or that is outside of ``POSSIBLE``, makes no event and is reported.

    Args:
        rows: ``subject_id, visit_id, stay_id, _time, _name, _text``, the file and the row; ``_available`` where values
            were known later than their time.
        vocabulary: What precedes the name in the code.
        column: Column of the file to report; ``_name`` for a wide file.
        missing: A text that means that nothing was measured.
    """
    import ibis

    rows = rows.mutate(_number=as_value(rows["_text"], rows["_text"], "float64")).left_join(_bounds(), "_name")
    number = rows["_number"]
    reasons: list[tuple] = [] if missing is None else [(rows["_text"] == missing, f"missing: {missing}")]
    reasons.append((number.isnull(), "the value is no readable number"))
    reasons.append((~number.between(rows["_low"], rows["_high"]), "impossible value: " + rows["_rule"]))
    unlisted = rows["_rule"].isnull() & rows["_name"].notin(SIGNED)
    reasons.append((unlisted & (number < 0), "impossible value: must not be negative"))
    rows = rows.mutate(_reason=ibis.cases(*reasons))
    bad, good = rows.filter(rows["_reason"].notnull()), rows.filter(rows["_reason"].isnull())
    rejected = bad.select(
        file=bad[FILE],
        row=bad[ROW],
        column=bad["_name"] if column is None else ibis.literal(column),
        value=bad["_text"],
        reason=bad["_reason"],
    )
    return placed(good, code=joined(vocabulary, good["_name"]), numeric_value=good["_number"]), rejected


def _bounds() -> ir.Table:
    """``POSSIBLE`` as a table."""
    import ibis

    rules = [f"`{name}` must be {low:,g} to {high:,g}" for name, (low, high) in POSSIBLE.items()]
    lows, highs = zip(*POSSIBLE.values(), strict=True)
    return ibis.memtable(pa.table({"_name": list(POSSIBLE), "_low": lows, "_high": highs, "_rule": rules}))


def placed(rows: ir.Table, **columns: ir.Value | str) -> ir.Table:
    """Measurement EVENTS of rows that name their patient, visit, stay and ``_time``."""
    later = {"available_at": rows["_available"]} if "_available" in rows.columns else {}
    place = {name: rows[name] for name in ("subject_id", "visit_id", "stay_id")}
    return as_events(rows, **place, time=rows["_time"], kind="measurement", **later, **columns)
