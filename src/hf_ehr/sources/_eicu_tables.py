"""The tables of eICU that hang on a unit stay, each as an extract; ``stays`` has the stays' ids and ``start``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from hf_ehr.schema import EhrDataError
from hf_ehr.sources._codes import has_icd_shape, joined
from hf_ehr.sources._measurements import measurement_events, melt, placed
from hf_ehr.sources._rules import Rule, split_by_rules
from hf_ehr.sources._table_cells import FILE
from hf_ehr.sources.engine import Column, Engine, Extract, as_events, reject

if TYPE_CHECKING:
    import ibis.expr.types as ir

PERIODIC = (
    "temperature", "sao2", "heartrate", "respiration", "cvp", "etco2", "systemicsystolic", "systemicdiastolic",
    "systemicmean", "pasystolic", "padiastolic", "pamean", "st1", "st2", "st3", "icp",
)  # fmt: skip
APERIODIC = (
    "noninvasivesystolic", "noninvasivediastolic", "noninvasivemean", "paop", "cardiacoutput", "cardiacinput", "svr",
    "svri", "pvr", "pvri",
)  # fmt: skip
PRIORITIES = ("Primary", "Major", "Other")

_TICKS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def minutes(number: ir.IntegerValue) -> ir.Value:
    """A number of minutes as an interval."""
    return (number.cast("int64") * 60).as_interval("s")


def _of_stays(
    engine: Engine, path: Path, stays: ir.Table, columns: Mapping[str, Column], *, stay: str = "patientunitstayid"
) -> tuple[ir.Table, list[ir.Table]]:
    """(rows with ``subject_id, visit_id, stay_id, start`` of their stay, rejected rows)."""
    scan = engine.scan(path, {stay: Column("int64", required=True), **columns}, allow_empty=True)
    known = stays.select("subject_id", "visit_id", "start", _unit="stay_id")
    rows = scan.table.left_join(known, scan.table[stay] == known["_unit"])
    reason = "names a unit stay that is missing or was rejected"
    rows, orphans = reject(rows, rows["_unit"].isnull(), file=path.name, column=stay, reason=reason)
    return rows.mutate(stay_id=rows["_unit"]), [scan.rejected, orphans]


def _events(rows: ir.Table, kind: str, code: ir.Value, offset: str, known: str | None = None, **more) -> ir.Table:
    """EVENTS of a visit at ``offset``, known then or at the later of the two offsets."""
    import ibis

    later = rows[offset] if known is None else ibis.greatest(rows[offset], rows[known].fill_null(rows[offset]))
    return as_events(
        rows,
        subject_id=rows["subject_id"],
        time=rows["start"] + minutes(rows[offset]),
        code=code,
        visit_id=rows["visit_id"],
        kind=kind,
        available_at=rows["start"] + minutes(later),
        **more,
    )


def diagnoses(engine: Engine, path: Path, stays: ir.Table, *, icd: str | None) -> Extract:
    """Events of ``diagnosis``: every code of its field ``icd9code`` ("414.00, I25.10")."""
    import ibis

    columns = {"diagnosisoffset": Column("int64", required=True), "icd9code": Column(required=True)}
    rows, rejected = _of_stays(engine, path, stays, columns | {"diagnosispriority": Column(optional=True)})
    rows = rows.mutate(_piece=rows["icd9code"].split(",").unnest())
    rows = rows.mutate(_piece=rows["_piece"].strip().upper())
    shapes = [(has_icd_shape(name, rows["_piece"]), name) for name in ("ICD9CM", "ICD10CM")]
    rows = rows.mutate(_vocabulary=ibis.cases(*shapes))
    reason = "no ICD9CM or ICD10CM code"
    rows, bad = reject(rows, rows["_vocabulary"].isnull(), file=path.name, column="_piece", reason=reason)
    bad = bad.mutate(column=ibis.literal("icd9code"))
    rows = rows if icd is None else rows.filter(rows["_vocabulary"] == icd)
    position = rows["diagnosispriority"].cases(*[(name, rank) for rank, name in enumerate(PRIORITIES, 1)])
    code = rows["_vocabulary"] + "/" + rows["_piece"]
    return Extract(
        "diagnosis", _events(rows, "diagnosis", code, "diagnosisoffset", position=position), [*rejected, bad]
    )


def _drug_code(rows: ir.Table) -> ir.StringValue:
    import ibis

    number = ibis.ifelse(rows["drughiclseqno"] > 0, rows["drughiclseqno"], ibis.null("int64"))
    return ibis.coalesce("EICU_HICL/" + number.cast("string"), joined("DRUG", rows["drugname"].upper()))


_DRUG = {"drugname": Column(), "drughiclseqno": Column("int64")}
_NAMELESS = Rule(
    lambda table: table["_code"].isnull(), "drugname", "neither `drughiclseqno` nor `drugname` names a medication"
)


def medications(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``medication``: orders at their start, known from the later of start and order on."""
    columns = {"drugstartoffset": Column("int64", required=True), "drugorderoffset": Column("int64"), **_DRUG}
    rows, rejected = _of_stays(engine, path, stays, columns | {"drugordercancelled": Column(optional=True)})
    cancelled = Rule(
        lambda table: table["drugordercancelled"] == "Yes", "drugordercancelled", "the order was cancelled"
    )
    rows, bad = split_by_rules(rows.mutate(_code=_drug_code(rows)), [cancelled, _NAMELESS], path.name)
    events = _events(rows, "medication", rows["_code"], "drugstartoffset", "drugorderoffset")
    return Extract("medication", events, [*rejected, bad])


def admission_drugs(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``admissiondrug``: drugs taken before the admission, known when they were entered."""
    columns = {"drugoffset": Column("int64", required=True), "drugenteredoffset": Column("int64"), **_DRUG}
    rows, rejected = _of_stays(engine, path, stays, columns)
    rows, bad = split_by_rules(rows.mutate(_code=_drug_code(rows)), [_NAMELESS], path.name)
    events = _events(rows, "medication", rows["_code"], "drugoffset", "drugenteredoffset")
    return Extract("admissiondrug", events, [*rejected, bad])


def treatments(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``treatment``: procedures ``EICU_TREATMENT/…``."""
    columns = {"treatmentoffset": Column("int64", required=True), "treatmentstring": Column(required=True)}
    rows, rejected = _of_stays(engine, path, stays, columns)
    code = joined("EICU_TREATMENT", rows["treatmentstring"])
    return Extract("treatment", _events(rows, "procedure", code, "treatmentoffset"), rejected)


def notes(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``note``: what was picked, and what was filled in if that says more."""
    return _picked(engine, path, stays, "note", "noteoffset", "noteenteredoffset", "notevalue", "notetext")


def past_history(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``pastHistory`` as notes."""
    name = "pasthistory"
    return _picked(
        engine, path, stays, name, f"{name}offset", f"{name}enteredoffset", f"{name}value", f"{name}valuetext"
    )


def _picked(
    engine: Engine, path: Path, stays: ir.Table, name: str, offset: str, entered: str, value: str, text: str
) -> Extract:
    import ibis

    columns = {offset: Column("int64", required=True), entered: Column("int64"), value: Column(required=True)}
    rows, rejected = _of_stays(engine, path, stays, columns | {text: Column(), f"{name}type": Column(optional=True)})
    same = rows[text].isnull() | (_letters(rows[text]) == _letters(rows[value]))
    words = ibis.ifelse(same, rows[value], rows[value] + ": " + rows[text])
    category = rows[f"{name}type"].fill_null("Past History" if name == "pasthistory" else "Other")
    events = _events(rows, "note", joined("Note", category), offset, entered, text_value=words)
    return Extract(name, events, rejected)


def _letters(text: ir.StringValue) -> ir.StringValue:
    return text.lower().re_replace("[^a-z0-9]", "")


def labs(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``lab``: known from the revision on; a result without a number keeps its text."""
    import ibis

    columns = {"labresultoffset": Column("int64", required=True), "labname": Column(required=True)}
    columns |= {"labresultrevisedoffset": Column("int64", optional=True), "labresult": Column()}
    rows, rejected = _of_stays(engine, path, stays, columns | {"labresulttext": Column(optional=True)})
    nothing = rows["labresult"].isnull() & rows["labresulttext"].isnull()
    reason = "neither `labresult` nor `labresulttext` is given"
    rows, empty = reject(rows, nothing, file=path.name, column="labresult", reason=reason)
    known = ibis.greatest(rows["labresultoffset"], rows["labresultrevisedoffset"].fill_null(rows["labresultoffset"]))
    rows = rows.mutate(
        _time=rows["start"] + minutes(rows["labresultoffset"]),
        _available=rows["start"] + minutes(known),
        _name=rows["labname"],
        _text=rows["labresult"],
        **{FILE: ibis.literal(path.name)},
    )
    numbers, impossible = measurement_events(rows.filter(rows["_text"].notnull()), "EICU", column="labresult")
    worded = rows.filter(rows["_text"].isnull())
    words = placed(worded, code=joined("EICU", worded["_name"]), text_value=worded["labresulttext"])
    return Extract("lab", numbers.union(words), [*rejected, empty, impossible])


def vitals(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``vitalPeriodic``: five-minute medians of the monitor, ``EICU/heartrate``, …"""
    return _wide(engine, path, stays, "vitalperiodic", PERIODIC)


def blood_pressures(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of ``vitalAperiodic``: cuff pressures and cardiac output."""
    return _wide(engine, path, stays, "vitalaperiodic", APERIODIC)


def _wide(engine: Engine, path: Path, stays: ir.Table, name: str, variables: tuple[str, ...]) -> Extract:
    columns = {"observationoffset": Column("int64", required=True)}
    columns |= {variable: Column(optional=True) for variable in variables}
    rows, rejected = _of_stays(engine, path, stays, columns)
    rows = rows.mutate(_time=rows["start"] + minutes(rows["observationoffset"]))
    events, impossible = long_events(rows, variables, path, "EICU")
    return Extract(name, events, [*rejected, impossible])


def long_events(rows: ir.Table, variables: tuple[str, ...], path: Path, vocabulary: str) -> tuple[ir.Table, ir.Table]:
    """(events, rejected rows) of the columns ``variables`` of rows with the ids of their stay and ``_time``."""
    import ibis

    rows = rows.mutate(**{FILE: ibis.literal(path.name)})
    kept = rows.select(FILE, "_row", "subject_id", "visit_id", "stay_id", "_time", *variables)
    return measurement_events(melt(kept, variables), vocabulary)


def yaib_grid(engine: Engine, path: Path, stays: ir.Table) -> Extract:
    """Events of a YAIB hourly grid: ``stay_id``, ``time`` (a duration) and a column for each variable.

    Raises:
        EhrDataError: The file is missing, or ``time`` is no duration.
    """
    if not path.is_file():
        raise EhrDataError(f"`yaib` must be a folder with dyn.parquet, and {path} is not there.")
    schema = pq.read_schema(path)
    kind = schema.field("time").type if "time" in schema.names else None
    if kind is None or not pa.types.is_duration(kind):
        raise EhrDataError(f"{path} column `time` must be a duration since the unit's admission, got {kind}.")
    variables = tuple(name for name in schema.names if name not in ("stay_id", "time") and not name.startswith("__"))
    columns = {"time": Column("int64", required=True)} | {name: Column() for name in variables}
    rows, rejected = _of_stays(engine, path, stays, columns, stay="stay_id")
    rows = rows.mutate(_time=rows["start"] + (rows["time"] // _TICKS[kind.unit]).cast("int64").as_interval("s"))
    events, impossible = long_events(rows, variables, path, "YAIB")
    return Extract("yaib", events, [*rejected, impossible])
