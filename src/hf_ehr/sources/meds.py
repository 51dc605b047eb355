"""MEDS, the Medical Event Data Standard (Arnrich et al., ICLR 2024 workshop TS4H), versions 0.3 and 0.4 → EVENTS.

A data set is recognised by its columns, not by its version. MEDS leaves the spelling of codes to whoever made the data
set: ``CODE_RULES`` says which spellings are understood, and what becomes of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from hf_ehr.models import code_hierarchy
from hf_ehr.schema import BIRTH_CODE, DEATH_CODE, DISPOSITIONS, KINDS, VISIT_KINDS, EhrDataError
from hf_ehr.sources import _mimic
from hf_ehr.sources._rules import Rule, split_by_rules
from hf_ehr.sources.engine import ROW, Column, Engine, Extract, Source, as_events, readable

if TYPE_CHECKING:
    import ibis.expr.types as ir

COLUMNS = {
    "subject_id": (("subject_id", "patient_id"), Column("int64", required=True)),
    "time": (("time", "timestamp"), Column("timestamp")),
    "code": (("code",), Column(required=True)),
    "numeric_value": (("numeric_value",), Column("float64", optional=True)),
    "text_value": (("text_value",), Column(optional=True)),
    "visit_id": (("visit_id", "hadm_id"), Column("int64", optional=True)),
    "stay_id": (("stay_id", "icustay_id"), Column("int64", optional=True)),
    "kind": (("kind",), Column(optional=True)),
    "position": (("position",), Column("int64", optional=True)),
    "available_at": (("available_at",), Column("timestamp", optional=True)),
}
"""Our column → (its names in the files, the first one there is read; what is asked of it)."""


class CodeRule(NamedTuple):
    """Codes that match ``pattern`` (the whole code, any case) are of ``kind``.

    The group of the pattern is the code in ``vocabulary``. Without a group the whole code is kept, without a
    vocabulary nothing is left of it but its kind.
    """

    pattern: str
    kind: str
    vocabulary: str


CODE_RULES = (
    CodeRule(r"MEDS_BIRTH(?://.*)?", "birth", ""),
    CodeRule(r"MEDS_DEATH(?://.*)?", "death", ""),
    # ADMISSION//type//location: what a type means is said in `_mimic.PLANNED` and `_mimic.VISIT_KINDS`.
    CodeRule(r"(?:HOSPITAL_)?ADMISSION(?://(.*))?", "admission", "Visit"),
    CodeRule(rf"Visit/({'|'.join(VISIT_KINDS)})", "admission", "Visit"),
    CodeRule(r"(?:HOSPITAL_)?DISCHARGE(?://(.*))?", "discharge", "Discharge"),
    CodeRule(rf"Discharge/({'|'.join(DISPOSITIONS)})", "discharge", "Discharge"),
    CodeRule(r"ICU_ADMISSION(?://(.*))?", "admission", "Stay"),
    CodeRule(r"ICU_DISCHARGE(?://(.*))?", "discharge", "Stay"),
    # In MIMIC these lie within, or just before, the visit they lead to: they open and close none of their own.
    CodeRule(r"(?:ED_REGISTRATION|ED_OUT|TRANSFER_TO)(?://.*)?", "measurement", "MEDS"),
    CodeRule(r"(?:GENDER|SEX)//?(.+)", "static", "Sex"),
    CodeRule(r"RACE//?(.+)", "static", "Race"),
    CodeRule(r"ETHNICITY//?(.+)", "static", "Ethnicity"),
    CodeRule(r"LANGUAGE//?(.+)", "static", "Language"),
    CodeRule(r"INSURANCE//?(.+)", "static", "Insurance"),
    CodeRule(r"MARITAL_?STATUS//?(.+)", "static", "MaritalStatus"),
    CodeRule(r"(?:DIAGNOSIS//ICD//9//|(?:DIAGNOSIS//)?ICD9CM//?)(.+)", "diagnosis", "ICD9CM"),
    CodeRule(r"(?:DIAGNOSIS//ICD//10//|(?:DIAGNOSIS//)?ICD10CM//?)(.+)", "diagnosis", "ICD10CM"),
    CodeRule(r"(?:PROCEDURE//ICD//9//|(?:PROCEDURE//)?ICD9Proc//?)(.+)", "procedure", "ICD9Proc"),
    CodeRule(r"(?:PROCEDURE//ICD//10//|(?:PROCEDURE//)?ICD10PCS//?)(.+)", "procedure", "ICD10PCS"),
    CodeRule(r"PROCEDURE//SNOMED//(.+)", "procedure", "SNOMED"),
    CodeRule(r"(?:DIAGNOSIS//)?SNOMED//?(.+)", "diagnosis", "SNOMED"),  # most are conditions; the code cannot tell
    CodeRule(r"(?:PROCEDURE//)?CPT4//?(.+)", "procedure", "CPT4"),
    CodeRule(r"(?:PROCEDURE//)?HCPCS//?(.+)", "procedure", "HCPCS"),
    CodeRule(r"MEDICATION//STOP//.+", "measurement", "MEDS"),  # the end of an order is no second medication
    CodeRule(r"(?:MEDICATION//(?:START//)?)?RxNorm//?(.+)", "medication", "RxNorm"),
    CodeRule(r"(?:MEDICATION//(?:START//)?)?NDC//?(.+)", "medication", "NDC"),
    CodeRule(r"(?:MEDICATION//(?:START//)?)?ATC//?(.+)", "medication", "ATC"),
    CodeRule(r"(?:MEDICATION//(?:START//)?|DRUG/)(.+)", "medication", "DRUG"),
    CodeRule(r"(?:LAB//)?LOINC//?(.+)", "measurement", "LOINC"),
    CodeRule(r"LAB//?(.+)", "measurement", "LAB"),
    CodeRule(r"MIMIC_ITEM/(.+)", "measurement", "MIMIC_ITEM"),
    CodeRule(r"NOTE//?(.+)", "note", "Note"),
)
"""The first rule that matches counts. An ICD code that has not the shape of its vocabulary matches none."""

_RULES = [(re.compile(rule.pattern, re.IGNORECASE | re.DOTALL), rule) for rule in CODE_RULES]
_CONTRACT_CODE = rf"^([^/ \t\r\n]+/[^ \t\r\n]+|{BIRTH_CODE}|{DEATH_CODE})$"
_MAPPED = pa.schema([(name, pa.string()) for name in ("_raw", "_kind", "_code", "_value", "_text", "_known")])
_VISITS_PER_SUBJECT = 100_000
_LARGEST_SUBJECT = 90_000_000_000_000  # times _VISITS_PER_SUBJECT still fits 64 bits


def meds(engine: Engine, input_dir: str | Path, *, billing_lag_days: float = 0.0, shifted: bool = False) -> Source:
    """Reads ``data/**/*.parquet`` of a MEDS data set, ``events/`` of a prepared folder, or any folder of such files.

    - Columns ``subject_id, time, code``, and where they are there ``numeric_value``, ``text_value`` and the extra ones
      of EVENTS, which are taken as they are: a row with a ``kind`` keeps its code. ``COLUMNS`` lists other names.
    - Codes by ``CODE_RULES``. Any other becomes the measurement ``MEDS/…`` (white space is ``_``, slashes are ``:``)
      and is counted in the warnings; without a time it is ``static``, which is what MEDS says of such rows.
    - Visits: ``visit_id`` or ``hadm_id``. Where the files have neither, the events from an admission to its discharge,
      both moments included, get ``subject_id * 100000 + number of the visit`` (ids beyond 9e13 enter by their
      remainder). An event at the moment where a visit ends and the next begins belongs to the next. An admission
      without a discharge of its own holds only what happened at its moment. Birth and death are in no visit.
    - Without ``available_at``, diagnoses and procedures with a visit are billing codes (leakage rule L3): known at its
      discharge (its last event where there is none) plus ``billing_lag_days``. All else is known at its own time.
    - An ICU admission or discharge without ``stay_id`` or ``icustay_id`` is a measurement: it must not bound a visit.

    The distinct codes are read at once, the rest when the events are written.

    Args:
        engine: The engine.
        input_dir: Folder, or a single Parquet file.
        billing_lag_days: Days from discharge until billing codes exist.
        shifted: Whether the dates were moved patient by patient, as in MIMIC.

    Raises:
        EhrDataError: There is no Parquet file, a required column is missing, or there are no rows.
    """
    folder = Path(input_dir)
    scans = [_scan(engine, path) for path in _event_paths(folder)]
    tables, rejected, found = zip(*scans, strict=True)
    present = set().union(*found)
    with readable(folder):
        table, unknown = _map_codes(_union(tables))
    table, broken = split_by_rules(table, _row_rules(), folder.name)
    if "visit_id" not in present:
        table = _derive_visits(table)
    if "available_at" not in present:
        table = _billed(table, billing_lag_days)
    events = as_events(table, **{name: table[name] for name in COLUMNS})
    warnings = []
    if unknown:
        warnings.append(f"{unknown:,} distinct codes match no rule of `CODE_RULES`: kept as `MEDS/…` measurements.")
    if "visit_id" not in present:
        warnings.append("No column `visit_id` or `hadm_id`: visits were made from admissions and discharges.")
    return Source(
        "meds", [Extract("events", events, [*rejected, broken])], "shifted" if shifted else "calendar", warnings
    )


def _event_paths(folder: Path) -> list[Path]:
    """What is to be scanned: one folder, unless ``metadata`` lies among the files."""
    if folder.is_file():
        return [folder]
    for name in ("data", "events"):
        if _has_parquet(folder / name):
            return [folder / name]
    children = [child for child in sorted(folder.glob("*")) if not child.name.startswith(".") and _has_parquet(child)]
    kept = [child for child in children if child.name != "metadata"]
    if not kept:
        raise EhrDataError(f"{folder} must hold Parquet files, in `data/` or below; found none. Check `input_dir`.")
    return [folder] if kept == children else kept


def _has_parquet(path: Path) -> bool:
    return path.suffix == ".parquet" if path.is_file() else any(path.rglob("*.parquet"))


def _scan(engine: Engine, path: Path) -> tuple[ir.Table, ir.Table, set[str]]:
    """(rows in our column names, rejected rows, our columns that the files have)."""
    first = path if path.is_file() else min(path.rglob("*.parquet"))
    with readable(first):
        names = pq.read_schema(first).names
    folded = {name.strip().lower() for name in names}
    chosen = {}
    for ours, (aliases, column) in COLUMNS.items():
        chosen[ours] = next((alias for alias in aliases if alias in folded), None)
        if chosen[ours] is None and not column.optional:
            raise EhrDataError(
                f"{path} lacks the column `{ours}`"
                + "".join(f" (or `{alias}`)" for alias in aliases[1:])
                + f", which MEDS requires. Columns found: {', '.join(names)}."
            )
    scan = engine.scan(path, {chosen[ours] or ours: column for ours, (_, column) in COLUMNS.items()})
    table = scan.table.select(ROW, **{ours: scan.table[name or ours] for ours, name in chosen.items()})
    return table, scan.rejected, {ours for ours, name in chosen.items() if name}


def _union(tables: Iterable[ir.Table]) -> ir.Table:
    return reduce(lambda one, other: one.union(other), tables)


# Codes


def map_codes(codes: Iterable[str]) -> pa.Table:
    """The contract's kind, code, number and text of each distinct code, by ``CODE_RULES``; all columns are text."""
    rows = [_map_code(code) for code in codes]
    columns = zip(*rows, strict=True) if rows else [[] for _ in _MAPPED]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=_MAPPED)


def _map_code(raw: str) -> tuple[str | None, ...]:
    for pattern, rule in _RULES:
        match = pattern.fullmatch(raw)
        if match is None:
            continue
        value = text = None
        if rule.vocabulary == "":
            code: str | None = BIRTH_CODE if rule.kind == "birth" else DEATH_CODE
        elif not pattern.groups:
            code = f"{rule.vocabulary}/{_safe(raw)}"
        elif rule.vocabulary == "Visit":
            code, value, text = _admission(match[1] or "")
        elif rule.vocabulary == "Discharge":
            code, text = _discharge(match[1] or "")
        elif rule.vocabulary == "Stay":
            code, text = "Stay/icu", match[1]
        else:
            code = _spell(rule.vocabulary, match[1].strip())
        if code is not None:
            return raw, rule.kind, code, value, text, "1"
    return raw, "measurement", f"MEDS/{_safe(raw)}", None, None, None


def _safe(code: str) -> str:
    return re.sub(r"/+", ":", re.sub(r"\s+", "_", code.strip()))


def _spell(vocabulary: str, code: str) -> str | None:
    """``VOCABULARY/CODE``, None for an ICD code that is none."""
    if vocabulary.startswith("ICD"):
        code = code.upper()
        if vocabulary == "ICD10PCS":
            return f"ICD10PCS/{code}" if re.search(_mimic.ICD10PCS_SHAPE, code) else None
        named = f"{vocabulary}/{code_hierarchy.dotted(vocabulary, code)}"
        return named if code_hierarchy.is_valid(named) else None
    if vocabulary == "Sex" and code.upper() in ("F", "M", "FEMALE", "MALE"):
        code = code[0].upper()
    return f"{vocabulary}/{_safe(code.upper() if vocabulary == 'DRUG' else code)}"


def _admission(wording: str) -> tuple[str, str | None, str | None]:
    """(code, whether planned, the source's wording) of ``type//location``, or of one of ``VISIT_KINDS``."""
    kind = wording.split("//")[0].strip()
    if kind in VISIT_KINDS:
        return f"Visit/{kind}", None, None
    visit = _meaning(_mimic.VISIT_KINDS, kind) or "inpatient"
    planned = _meaning(_mimic.PLANNED, kind)
    return f"Visit/{visit}", None if planned is None else str(planned), wording or None


def _discharge(wording: str) -> tuple[str, str | None]:
    place = wording.split("//")[0].strip()
    if place in DISPOSITIONS:
        return f"Discharge/{place}", None
    return f"Discharge/{_meaning(_mimic.DISPOSITIONS, place) or 'unknown'}", wording or None


def _meaning(wordings: dict, wording: str):
    return next((meaning for meaning, group in wordings.items() if wording.upper() in group), None)


def _map_codes(table: ir.Table) -> tuple[ir.Table, int]:
    """Gives every row its kind and code; also the number of distinct codes that no rule knows."""
    import ibis

    table = table.mutate(_own=table["kind"].notnull() & table["code"].re_search(_CONTRACT_CODE))
    foreign = table.filter(~table["_own"]).select("code").distinct().to_pyarrow()["code"].to_pylist()
    mapped = map_codes(foreign)
    # Blank for null on the way in: Spark takes its tables through pandas, where a null text becomes "NaN".
    filled = pa.table({name: mapped[name].fill_null("") for name in mapped.column_names})
    table = table.left_join(ibis.memtable(filled), [("code", "_raw")])
    table = table.mutate(**{name: table[name].nullif("") for name in ("_value", "_text", "_known")})
    timeless = table["time"].isnull() & table["_known"].isnull()
    homeless = (table["_code"] == "Stay/icu") & table["stay_id"].isnull()
    kind = ibis.cases((timeless, "static"), (homeless, "measurement"), else_=table["_kind"])
    kind = ibis.coalesce(table["kind"], kind)
    fixed = (kind == "static") & ~table["_own"]
    table = table.mutate(
        kind=kind,
        code=ibis.ifelse(table["_own"], table["code"], table["_code"]),
        time=ibis.ifelse(fixed, ibis.null("timestamp"), table["time"]),
        numeric_value=ibis.coalesce(table["numeric_value"], table["_value"].cast("float64")),
        text_value=ibis.coalesce(table["text_value"], table["_text"]),
    )
    return table.select(ROW, *COLUMNS), mapped["_known"].null_count


def _row_rules() -> list[Rule]:
    def timeless(table: ir.Table) -> ir.BooleanValue:
        return table["time"].isnull() & (table["kind"] != "static")

    return [
        Rule(lambda table: table["kind"].notin(list(KINDS)), "kind", f"`kind` must be one of {', '.join(KINDS)}"),
        Rule(timeless, "code", "`time` is missing, and the code is not static"),
    ]


# Visits


def _derive_visits(table: ir.Table) -> ir.Table:
    """Sets ``visit_id`` by the admissions and discharges of each subject."""
    import ibis

    in_visits = table["kind"].notin(["static", "birth", "death"])
    bounds = in_visits & table["kind"].isin(["admission", "discharge"]) & table["stay_id"].isnull()
    outside = table.filter(~in_visits)
    markers = _number_markers(table.filter(bounds))
    others = table.filter(in_visits & ~bounds).mutate(_number=ibis.null("int64"), _rank=ibis.literal(1, "int64"))
    visits = (
        markers.filter(markers["_number"].notnull())
        .group_by("subject_id", "_number")
        .agg(
            _start=lambda rows: rows["time"].min(),
            _end=lambda rows: rows["time"].max(where=rows["kind"] == "discharge"),
        )
    )
    # Admissions come before the other events of their moment, so the largest number so far is that of the last one.
    both = _union([markers.select(others.columns), others])
    so_far = ibis.cumulative_window(group_by="subject_id", order_by=["time", "_rank"])
    last = both["_number"].max().over(so_far)
    both = both.mutate(_number=ibis.ifelse(both["_rank"] == 0, both["_number"], last))
    both = both.left_join(visits, ["subject_id", "_number"], rname="{name}_visit")
    inside = both["time"] <= ibis.coalesce(both["_end"], both["_start"])
    subject = both["subject_id"].abs() % _LARGEST_SUBJECT
    identity = ibis.ifelse(inside, subject * _VISITS_PER_SUBJECT + both["_number"], ibis.null("int64"))
    return both.mutate(visit_id=identity).select(table.columns).union(outside)


def _number_markers(markers: ir.Table) -> ir.Table:
    """Admissions and discharges with ``_number``, that of their visit from 1, null for a discharge of no visit.

    Of one moment the discharges come first. A discharge closes the admission just before it; where there is none, it
    is that of a visit without length and belongs to the admission of the same moment.
    """
    import ibis

    markers = markers.mutate(_opens=(markers["kind"] == "admission").cast("int64"))
    order = ibis.window(group_by="subject_id", order_by=["time", "_opens", "code", "text_value"])
    markers = markers.mutate(
        _before=markers["_opens"].lag().over(order),
        _before_time=markers["time"].lag().over(order),
        _after=markers["_opens"].lead().over(order),
        _after_time=markers["time"].lead().over(order),
    )
    # Two admissions of one moment, in two spellings, say the same.
    said = (markers["_before"] == 1) & (markers["_before_time"] == markers["time"])
    markers = markers.mutate(_new=ibis.ifelse(said.fill_null(False), 0, markers["_opens"]))
    running = ibis.cumulative_window(group_by="subject_id", order_by=["time", "_opens", "code", "text_value"])
    markers = markers.mutate(_count=markers["_new"].sum().over(running))
    no_length = (markers["_after"] == 1) & (markers["_after_time"] == markers["time"])
    number = ibis.cases(
        ((markers["_opens"] == 1) | (markers["_before"] == 1).fill_null(False), markers["_count"]),
        (no_length.fill_null(False), markers["_count"] + 1),
    )
    return markers.mutate(_number=number.cast("int64"), _rank=ibis.literal(0, "int64"))


def _billed(table: ir.Table, lag_days: float) -> ir.Table:
    """Sets ``available_at``: billing codes of a visit are there ``lag_days`` after its discharge, never before."""
    import ibis

    visits = table.filter(table["visit_id"].notnull() & table["time"].notnull())
    closes = (visits["kind"] == "discharge") & visits["stay_id"].isnull()
    ends = visits.group_by("subject_id", "visit_id").agg(
        _end=ibis.coalesce(visits["time"].max(where=closes), visits["time"].max())
    )
    joined = table.left_join(ends, ["subject_id", "visit_id"], rname="{name}_end")
    lag = ibis.interval(seconds=round(lag_days * 86_400))
    billed = joined["kind"].isin(["diagnosis", "procedure"]) & joined["_end"].notnull()
    time = ibis.ifelse(billed, ibis.greatest(joined["_end"] + lag, joined["time"]), joined["time"])
    return joined.mutate(available_at=time).select(table.columns)
