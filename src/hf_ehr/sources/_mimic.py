"""What MIMIC-III and MIMIC-IV have in common: admissions, coded tables and notes as EVENTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE
from hf_ehr.sources._codes import has_icd_shape, icd
from hf_ehr.sources.engine import Column, Engine, Extract, as_events, find_table, reject

if TYPE_CHECKING:
    import ibis.expr.types as ir

UNKNOWN_VALUES = (
    "?", "UNKNOWN", "UNKNOWN (DEFAULT)", "UNKNOWN/NOT SPECIFIED", "UNABLE TO OBTAIN", "PATIENT DECLINED TO ANSWER",
)  # fmt: skip
"""Wordings of demographic columns that say nothing: no event is made of them."""

DISPOSITIONS = {
    "home": ("HOME", "HOME HEALTH CARE", "HOME WITH HOME IV PROVIDR", "ASSISTED LIVING"),
    "facility": (
        "SNF", "SNF-MEDICAID ONLY CERTIF", "SKILLED NURSING FACILITY", "ICF", "REHAB", "REHAB/DISTINCT PART HOSP",
        "LONG TERM CARE HOSPITAL", "CHRONIC/LONG TERM ACUTE CARE", "DISCH-TRAN TO PSYCH HOSP", "PSYCH FACILITY",
        "OTHER FACILITY", "HEALTHCARE FACILITY",
    ),
    "transfer": ("SHORT TERM HOSPITAL", "ACUTE HOSPITAL", "DISC-TRAN CANCER/CHLDRN H", "DISC-TRAN TO FEDERAL HC"),
    "hospice": ("HOSPICE", "HOSPICE-HOME", "HOSPICE-MEDICAL FACILITY"),
    "against_advice": ("LEFT AGAINST MEDICAL ADVI", "AGAINST ADVICE"),
    "died": ("DEAD/EXPIRED", "DIED"),
}  # fmt: skip
"""Disposition of the contract → the wordings of DISCHARGE_LOCATION; anything else is ``unknown``."""

PLANNED = {
    1: ("ELECTIVE", "SURGICAL SAME DAY ADMISSION"),
    0: ("EMERGENCY", "URGENT", "EW EMER.", "DIRECT EMER.", "EU OBSERVATION", "OBSERVATION ADMIT"),
}
"""Whether an ADMISSION_TYPE is planned. Unknown: NEWBORN, and the observation types that a clinic can book (DIRECT and
AMBULATORY OBSERVATION)."""

VISIT_KINDS = {
    "emergency": ("EU OBSERVATION",),
    "outpatient": ("DIRECT OBSERVATION", "AMBULATORY OBSERVATION"),
}
"""ADMISSION_TYPEs that are no inpatient admission: an observation stay is outpatient care in US billing, the ``EU``
one is spent in the emergency department. OBSERVATION ADMIT ended in an admission, so it is inpatient."""

ICD10PCS_SHAPE = "^[0-9A-HJ-NP-Z]{7}$"


def dotted(code: ir.StringValue, vocabulary: str) -> ir.StringValue:
    """``4280`` → ``ICD9CM/428.0``, ``E8500`` → ``ICD9CM/E850.0``, ``3995`` → ``ICD9Proc/39.95``; null if malformed."""
    import ibis

    code = icd(vocabulary, code.upper())
    good = code.re_search(ICD10PCS_SHAPE) if vocabulary == "ICD10PCS" else has_icd_shape(vocabulary, code)
    return f"{vocabulary}/" + ibis.ifelse(good, code, ibis.null("string"))


def read_admissions(engine: Engine, path: Path, race: str) -> tuple[ir.Table, list[ir.Table]]:
    """(valid admissions, rejected rows); the column ``race`` of the file is called ``race``."""
    columns = {
        "subject_id": Column("int64", required=True),
        "hadm_id": Column("int64", required=True),
        "admittime": Column("timestamp", required=True),
        "dischtime": Column("timestamp", required=True),
        "deathtime": Column("timestamp"),
        "admission_type": Column(),
        "discharge_location": Column(),
        "insurance": Column(),
        "language": Column(),
        "marital_status": Column(),
        race: Column(),
        "hospital_expire_flag": Column("int64"),
    }
    scan = engine.scan(path, columns, key=["hadm_id"])
    reason = "negative stay: `dischtime` is before `admittime`"
    negative = scan.table["dischtime"] < scan.table["admittime"]
    visits, rejected = reject(scan.table, negative, file=path.name, column="admittime,dischtime", reason=reason)
    return visits if race == "race" else visits.rename(race=race), [scan.rejected, rejected]


def visit_extract(visits: ir.Table, rejected: list[ir.Table]) -> Extract:
    """Admission and discharge of every visit, and the demographics of each patient's first one."""
    import ibis

    kind = visits["admission_type"].cases(*_pairs(VISIT_KINDS), else_="inpatient")
    admitted = as_events(
        visits,
        subject_id=visits["subject_id"],
        time=visits["admittime"],
        code="Visit/" + kind,
        numeric_value=visits["admission_type"].cases(*_pairs(PLANNED)),
        text_value=visits["admission_type"],
        visit_id=visits["hadm_id"],
        kind="admission",
    )
    died = (visits["hospital_expire_flag"] == 1) | visits["deathtime"].notnull()
    place = visits["discharge_location"].upper().cases(*_pairs(DISPOSITIONS), else_="unknown")
    discharged = as_events(
        visits,
        subject_id=visits["subject_id"],
        time=visits["dischtime"],
        code="Discharge/" + ibis.ifelse(died.fill_null(False), "died", place),
        text_value=visits["discharge_location"],
        visit_id=visits["hadm_id"],
        kind="discharge",
    )
    return Extract("admissions", ibis.union(admitted, discharged, *_demographics(visits)), rejected)


def _pairs(wordings: Mapping) -> list[tuple]:
    return [(wording, meaning) for meaning, group in wordings.items() for wording in group]


def _demographics(visits: ir.Table) -> list[ir.Table]:
    import ibis

    order = ibis.window(group_by="subject_id", order_by=["admittime", "hadm_id"])
    first = visits.mutate(_visit=ibis.row_number().over(order)).filter(lambda table: table["_visit"] == 0)
    vocabularies = {
        "Race": "race",
        "Language": "language",
        "Insurance": "insurance",
        "MaritalStatus": "marital_status",
    }
    events = []
    for vocabulary, column in vocabularies.items():
        known = first.filter(first[column].notnull() & first[column].upper().notin(UNKNOWN_VALUES))
        code = f"{vocabulary}/" + known[column]
        events.append(as_events(known, subject_id=known["subject_id"], code=code, kind="static"))
    return events


def patient_extract(
    patients: ir.Table, visits: ir.Table, file: str, rejected: list[ir.Table], oldest: int | None = None
) -> Extract:
    """Sex, birth and death of every patient.

    The death is timed by the admission it happened in; a death known by its date only counts from the end of that day.

    Args:
        patients: Columns ``subject_id, gender, birth, dod``, one row per patient.
        visits: Valid admissions.
        file: Name of the patients' file, for rejected rows.
        rejected: Rows of it rejected before.
        oldest: Where the age at the first admission is over 150 years (MIMIC-III moves the birth of patients older
            than 89 by centuries), it is set to this.
    """
    import ibis

    sex = patients["gender"].upper().substr(0, 1)
    patients, unknown = reject(
        patients, patients["gender"].notnull() & sex.notin(["F", "M"]), file=file, column="gender",
        reason="unknown `gender`: must be F or M",
    )  # fmt: skip
    seen = visits.group_by("subject_id").agg(first=visits["admittime"].min(), deathtime=visits["deathtime"].min())
    table = patients.left_join(seen, "subject_id").drop("subject_id_right")
    birth = table["birth"]
    if oldest is not None:
        age_150 = table["first"] - ibis.interval(days=round(150 * 365.25))
        shifted = table["first"] - ibis.interval(days=round(oldest * 365.25))
        birth = ibis.ifelse((birth < age_150).fill_null(False), shifted, birth)
    table = table.mutate(
        birth=birth, death=ibis.coalesce(table["deathtime"], end_of_day(table["dod"])), sex=table["gender"].upper()
    )
    sexed, born, dead = (table.filter(table[name].notnull()) for name in ("sex", "birth", "death"))
    events = ibis.union(
        as_events(sexed, subject_id=sexed["subject_id"], code="Sex/" + sexed["sex"].substr(0, 1), kind="static"),
        as_events(born, subject_id=born["subject_id"], time=born["birth"], code=BIRTH_CODE, kind="birth"),
        as_events(dead, subject_id=dead["subject_id"], time=dead["death"], code=DEATH_CODE, kind="death"),
    )
    return Extract("patients", events, [*rejected, unknown])


def end_of_day(time: ir.Value) -> ir.Value:
    """The last second of the day: a fact known by its date only was not there at midnight."""
    import ibis

    return time.date().cast("timestamp") + ibis.interval(seconds=86_399)


def of_visits(table: ir.Table, visits: ir.Table, file: str, *, required: bool = True) -> tuple[ir.Table, ir.Table]:
    """Adds ``dischtime`` of the row's admission: (rows, rejected rows that name an admission which is not there)."""
    known = visits.select("subject_id", "hadm_id", "dischtime", _known=True)
    joined = table.left_join(known, ["subject_id", "hadm_id"])
    orphan = joined["_known"].isnull() if required else joined["_known"].isnull() & joined["hadm_id"].notnull()
    reason = "names an admission of this patient that is missing or was rejected"
    return reject(joined, orphan, file=file, column="hadm_id", reason=reason)


def coded_extract(
    engine: Engine,
    path: Path,
    visits: ir.Table,
    *,
    kind: str,
    code: str,
    vocabularies: Mapping[int, str],
    billing_lag_days: float,
) -> Extract:
    """Events of DIAGNOSES_ICD or PROCEDURES_ICD: billing codes, which exist only after discharge (leakage rule L3).

    Args:
        engine: The engine.
        path: The file.
        visits: Valid admissions.
        kind: ``diagnosis`` or ``procedure``.
        code: Name of the column with the undotted code.
        vocabularies: ``icd_version`` → vocabulary; a single one where the file has no such column.
        billing_lag_days: Days from discharge until the codes are there.
    """
    import ibis

    versioned = len(vocabularies) > 1
    identity = {"subject_id": Column("int64", required=True), "hadm_id": Column("int64", required=True)}
    columns = identity | {"seq_num": Column("int64"), code: Column(required=True)}
    columns |= {"icd_version": Column("int64", required=True)} if versioned else {}
    columns |= {"chartdate": Column("timestamp", optional=True)} if kind == "procedure" else {}
    version = ["icd_version"] if versioned else []
    scan = engine.scan(path, columns, key=["hadm_id", "seq_num", code, *version])
    table, rejected = scan.table, [scan.rejected]
    if versioned:
        reason = f"unknown code system: `icd_version` must be one of {', '.join(map(str, vocabularies))}"
        unknown = table["icd_version"].notin(list(vocabularies))
        table, bad = reject(table, unknown, file=path.name, column="icd_version", reason=reason)
        branches = [(table["icd_version"] == key, dotted(table[code], name)) for key, name in vocabularies.items()]
        table = table.mutate(_code=ibis.cases(*branches))
        rejected.append(bad)
    else:
        table = table.mutate(_code=dotted(table[code], next(iter(vocabularies.values()))))
    reason = f"no {' or '.join(vocabularies.values())} code"
    table, bad = reject(table, table["_code"].isnull(), file=path.name, column=code, reason=reason)
    table, orphans = of_visits(table, visits, path.name)
    time = ibis.coalesce(table["chartdate"], table["dischtime"]) if kind == "procedure" else table["dischtime"]
    events = as_events(
        table,
        subject_id=table["subject_id"],
        time=time,
        code=table["_code"],
        visit_id=table["hadm_id"],
        kind=kind,
        position=table["seq_num"],
        available_at=table["dischtime"] + ibis.interval(seconds=round(billing_lag_days * 86_400)),
    )
    return Extract(path.name.split(".")[0].lower(), events, [*rejected, bad, orphans])


def drug_extract(engine: Engine, path: Path, visits: ir.Table, *, start: str, dated: bool) -> Extract:
    """Events of PRESCRIPTIONS: ``NDC/…`` where there is one, else ``DRUG/NAME``.

    Args:
        engine: The engine.
        path: The file.
        visits: Valid admissions.
        start: Name of the column with the order's start.
        dated: Whether ``start`` is a date without a time: it then counts as known from the end of that day.
    """
    import ibis

    columns = {
        "subject_id": Column("int64", required=True),
        "hadm_id": Column("int64", required=True),
        start: Column("timestamp", required=True),
        "drug": Column(),
        "ndc": Column(),
    }
    scan = engine.scan(path, columns)
    digits = ibis.ifelse(scan.table["ndc"].re_search("^[0-9]{1,11}([.]0)?$"), scan.table["ndc"], ibis.null("string"))
    number = digits.re_replace("[.]0$", "")
    ndc = ibis.ifelse(number.re_search("[1-9]"), "NDC/" + number.lpad(11, "0"), ibis.null("string"))
    drug = "DRUG/" + scan.table["drug"].upper().re_replace("[ \t\r\n]+", "_")
    table = scan.table.mutate(_code=ibis.coalesce(ndc, drug))
    reason = "neither `ndc` nor `drug` names a medication"
    table, nameless = reject(table, table["_code"].isnull(), file=path.name, column="ndc,drug", reason=reason)
    table, orphans = of_visits(table, visits, path.name)
    events = as_events(
        table,
        subject_id=table["subject_id"],
        time=table[start],
        code=table["_code"],
        visit_id=table["hadm_id"],
        kind="medication",
        available_at=end_of_day(table[start]) if dated else table[start],
    )
    return Extract("prescriptions", events, [scan.rejected, nameless, orphans])


def note_extract(engine: Engine, path: Path, visits: ir.Table, category: str) -> Extract:
    """Events of notes; ``category`` names the column of their kind. A note without time is of the end of its day."""
    import ibis

    columns = {
        "subject_id": Column("int64", required=True),
        "hadm_id": Column("int64"),
        "chartdate": Column("timestamp", optional=True),
        "charttime": Column("timestamp"),
        "storetime": Column("timestamp", optional=True),
        category: Column(required=True),
        "iserror": Column("int64", optional=True),
        "text": Column(required=True),
    }
    scan = engine.scan(path, columns, allow_empty=True)
    wrong = scan.table["iserror"] == 1
    table, bad = reject(scan.table, wrong, file=path.name, column="iserror", reason="marked as error")
    table = table.mutate(_time=ibis.coalesce(table["charttime"], end_of_day(table["chartdate"])))
    reason = "`charttime` and `chartdate` are missing"
    table, timeless = reject(table, table["_time"].isnull(), file=path.name, column="charttime", reason=reason)
    table, orphans = of_visits(table, visits, path.name, required=False)
    events = as_events(
        table,
        subject_id=table["subject_id"],
        time=table["_time"],
        code="Note/" + table[category],
        text_value=table["text"],
        visit_id=table["hadm_id"],
        kind="note",
        available_at=ibis.greatest(table["_time"], ibis.coalesce(table["storetime"], table["_time"])),
    )
    return Extract(path.name.split(".")[0].lower(), events, [scan.rejected, bad, timeless, orphans])


def optional_tables(
    input_dir: Path, names: Mapping[str, str], folders: Sequence[str] = ("",)
) -> tuple[dict[str, Path], list[str]]:
    """(table → file, warnings for those that are not there); ``names`` says what each one holds."""
    paths = {name: find_table(input_dir, name, folders=folders, required=False) for name in names}
    warnings = [f"{name} is not there: no {names[name]}." for name, path in paths.items() if path is None]
    return {name: path for name, path in paths.items() if path is not None}, warnings
