"""PhysioNet/CinC Challenge 2019, early prediction of sepsis (Reyna et al., Crit Care Med 2020;48:210-217) → EVENTS.

Each record is the hours of an intensive care stay: one patient, one visit and one stay, all three with its number.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_ehr.schema import BIRTH_CODE
from hf_ehr.sources._measurements import POSSIBLE, birth_from_age, measurement_events, melt, placed
from hf_ehr.sources._parse import as_value
from hf_ehr.sources._record_files import LINE, gather_lines, is_archive
from hf_ehr.sources._table_cells import FILE, Rule, seconds, split
from hf_ehr.sources.engine import ROW, Column, Engine, Extract, Source, as_events, find_table

if TYPE_CHECKING:
    import ibis.expr.types as ir

VITALS = ("HR", "O2Sat", "Temp", "SBP", "MAP", "DBP", "Resp", "EtCO2")
LABS = (
    "BaseExcess", "HCO3", "FiO2", "pH", "PaCO2", "SaO2", "AST", "BUN", "Alkalinephos", "Calcium", "Chloride",
    "Creatinine", "Bilirubin_direct", "Glucose", "Lactate", "Magnesium", "Phosphate", "Potassium", "Bilirubin_total",
    "TroponinI", "Hct", "Hgb", "PTT", "WBC", "Fibrinogen", "Platelets",
)  # fmt: skip
WARNING_HOURS = 6
"""``SepsisLabel`` turns 1 this many hours before the onset."""

_SET_B = 100_000  # p000001 … are of set A, p100001 … of set B
_DEMOGRAPHICS = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime")
_START = "2000-01-01 00:00:00"
_HOUR = 3_600


def physionet2019(engine: Engine, input_dir: Path) -> Source:
    """Reads ``pNNNNNN.psv`` files, one a patient, or the table ``patients`` of all of them with a column ``patient``.

    - The unit admits every patient at 2000-01-01 00:00 (the data has no dates), the hospital ``HospAdmTime`` hours
      before. The row ``ICULOS`` = k is hour k - 1 of the stay; the last one ends it at hour k. Nothing says how or
      when the patient left the hospital, so there is no discharge.
    - The 8 vitals and 26 labs are measurements ``CINC2019/HR``, …; ``HospAdmTime`` and, as text, ``Unit`` (MICU for
      ``Unit1``, SICU for ``Unit2``) are measurements of hour 0. ``Age`` gives the birth, ``Gender`` the sex (1 is M).
    - Set A (numbers below 100,000) is of the hospital of MIMIC: a warning counts its patients, who may be in both.
    - ``SepsisLabel`` becomes one event, the diagnosis ``CINC2019/Sepsis`` at the onset, known from then on: 6 hours
      after the first labelled hour. Where the first row is labelled already, the onset may be any time until 6 hours
      later: the event is at the first row and known at that latest time, and says so in its text.

    Args:
        engine: The engine.
        input_dir: Folder of the files, of their folders or archives, or of the table; or the one archive or table.

    Raises:
        EhrDataError: There are no such files, or one is empty, damaged or has another header.
    """
    rows, records, rejected = _rows(engine, Path(input_dir))
    stays = _stays(rows, records)
    placed_rows = rows.mutate(
        subject_id=rows[LINE.record], visit_id=rows[LINE.record], stay_id=rows[LINE.record], _time=_at(rows["_hour"])
    )
    place = (FILE, ROW, "subject_id", "visit_id", "stay_id", "_time")
    cells = melt(placed_rows.select(*place, *VITALS, *LABS), [*VITALS, *LABS])
    measured, impossible = measurement_events(cells, "CINC2019")
    extracts = [
        Extract("stays", _stay_events(stays), [rejected]),
        Extract("measurements", measured, [impossible]),
        Extract("sepsis", _sepsis_events(stays)),
    ]
    return Source("physionet2019", extracts, "shifted", _shared_hospital(records))


def _shared_hospital(records: ir.Table) -> list[str]:
    count = int(records.filter(records[LINE.record] < _SET_B).count().to_pyarrow().as_py())
    warning = f"{count:,} patients are of set A, from the hospital of MIMIC: never train on one and test on the other."
    return [warning] if count else []


def _rows(engine: Engine, input_dir: Path) -> tuple[ir.Table, ir.Table, ir.Table]:
    """(hourly rows with ``_hour``, every record, rejected rows); all cells but the hour are text."""
    import ibis

    folder = input_dir if input_dir.is_dir() else input_dir.parent
    one = find_table(folder, "patients", required=False) if input_dir.is_dir() else input_dir
    cells = {name: Column(optional=True) for name in (*VITALS, *LABS, *_DEMOGRAPHICS, "SepsisLabel")}
    cells |= {"ICULOS": Column()}
    if one is not None and one.name.endswith((".parquet", ".csv", ".csv.gz")):
        scan = engine.scan(one, {"patient": Column("int64", required=True)} | cells, null_values=("NaN", "nan"))
        mark = {FILE: ibis.literal(one.name), LINE.repeated: ibis.literal("false"), LINE.record: scan.table["patient"]}
        table, rejected = scan.table.mutate(**mark), [scan.rejected]
    else:
        holders = [input_dir] if input_dir.is_file() else _holders(input_dir)
        path = gather_lines(engine, holders, r"p?([0-9]+)\.psv", "|")
        marks = {name: Column() for name in (FILE, LINE.repeated)}
        marks |= {name: Column("int64") for name in (LINE.record, LINE.number)}
        table, rejected = engine.scan(path, marks | cells, null_values=("NaN", "nan")).table, []
        table = table.mutate(**{ROW: table[LINE.number]})
    table = table.mutate(_hour=as_value(table["ICULOS"], table["ICULOS"], "int64") - 1)
    records = table.filter(table[LINE.repeated] == "false").select(LINE.record).distinct()
    rows, bad = split(table, _rules(table))
    rejected.append(bad)
    again = ibis.row_number().over(ibis.window(group_by=[LINE.record, "_hour"], order_by=[FILE, ROW]))
    rows = rows.mutate(_again=again)
    rows, bad = split(rows, [Rule(rows["_again"] > 0, "ICULOS", rows["ICULOS"], "repeats the hour of another row")])
    return rows, records, ibis.union(*rejected, bad)


def _holders(folder: Path) -> list[Path]:
    return [folder, *(path for path in sorted(folder.iterdir()) if is_archive(path))]


def _rules(table: ir.Table) -> list[Rule]:
    number = {name: as_value(table[name], table[name], "float64") for name in (*_DEMOGRAPHICS, "SepsisLabel")}
    given = {name: table[name].notnull() for name in number}
    rules = [
        Rule(table[LINE.repeated] == "true", "patient", table[FILE], "repeats the record of another file"),
        # A file without rows is one line of nulls.
        Rule(table["_hour"].isnull() | (table["_hour"] < 0), "ICULOS", table["ICULOS"], "`ICULOS` must be 1, 2, …"),
    ]
    for name, (low, high) in {"Age": POSSIBLE["Age"], "HospAdmTime": POSSIBLE["HospAdmTime"]}.items():
        wrong = given[name] & ~number[name].between(low, high).fill_null(False)
        rules.append(Rule(wrong, name, table[name], f"impossible value: `{name}` must be {low:g} to {high:g}"))
    for name in ("Gender", "Unit1", "Unit2", "SepsisLabel"):
        wrong = given[name] & number[name].notin([0, 1]).fill_null(True)
        rules.append(Rule(wrong, name, table[name], f"`{name}` must be 0 or 1"))
    return rules


def _stays(rows: ir.Table, records: ir.Table) -> ir.Table:
    """One row per record: what its hours say of it, ``_labelled`` the first labelled hour."""
    import ibis

    value = {name: as_value(rows[name], rows[name], "float64") for name in (*_DEMOGRAPHICS, "SepsisLabel")}
    said = rows.group_by(LINE.record).agg(
        age=value["Age"].max(),
        gender=value["Gender"].max(),
        micu=value["Unit1"].max(),
        sicu=value["Unit2"].max(),
        before=value["HospAdmTime"].min(),
        first=rows["_hour"].min(),
        last=rows["_hour"].max(),
        labelled=ibis.ifelse(value["SepsisLabel"] == 1, rows["_hour"], ibis.null("int64")).min(),
    )
    stays = records.left_join(said, LINE.record).drop(f"{LINE.record}_right")
    stays = stays.mutate(subject_id=stays[LINE.record], visit_id=stays[LINE.record], stay_id=stays[LINE.record])
    return stays.mutate(
        start=ibis.timestamp(_START),
        unit=ibis.cases((stays["micu"] == 1, "MICU"), (stays["sicu"] == 1, "SICU")),
        sex=ibis.cases((stays["gender"] == 1, "M"), (stays["gender"] == 0, "F")),
    )


def _at(hour: ir.NumericValue) -> ir.TimestampValue:
    import ibis

    return ibis.timestamp(_START) + seconds(hour * _HOUR)


def _stay_events(stays: ir.Table) -> ir.Table:
    import ibis

    def known(name: str) -> ir.Table:
        return stays.filter(stays[name].notnull())

    ended, aged, sexed, housed, sent = (known(name) for name in ("last", "age", "sex", "unit", "before"))
    subject = stays["subject_id"]
    admitted = stays["start"] + seconds(stays["before"].fill_null(0.0) * _HOUR)
    return ibis.union(
        as_events(
            stays, subject_id=subject, time=admitted, code="Visit/inpatient", visit_id=subject, kind="admission"
        ),
        as_events(
            stays, subject_id=subject, time=stays["start"], code="Stay/icu", text_value=stays["unit"],
            visit_id=subject, stay_id=subject, kind="admission",
        ),
        as_events(
            ended, subject_id=ended["subject_id"], time=_at(ended["last"] + 1), code="Stay/icu",
            visit_id=ended["subject_id"], stay_id=ended["subject_id"], kind="discharge",
        ),
        as_events(
            aged, subject_id=aged["subject_id"], time=birth_from_age(aged["start"], aged["age"]), code=BIRTH_CODE,
            kind="birth",
        ),
        as_events(sexed, subject_id=sexed["subject_id"], code="Sex/" + sexed["sex"], kind="static"),
        placed(housed.mutate(_time=housed["start"]), code="CINC2019/Unit", text_value=housed["unit"]),
        placed(sent.mutate(_time=sent["start"]), code="CINC2019/HospAdmTime", numeric_value=sent["before"]),
    )  # fmt: skip


def _sepsis_events(stays: ir.Table) -> ir.Table:
    import ibis

    septic = stays.filter(stays["labelled"].notnull())
    before = septic["labelled"] == septic["first"]
    latest = _at(septic["labelled"] + WARNING_HOURS)
    return as_events(
        septic,
        subject_id=septic["subject_id"],
        time=ibis.ifelse(before, _at(septic["labelled"]), latest),
        code="CINC2019/Sepsis",
        text_value=ibis.ifelse(before, "onset unknown: labelled from the first row", ibis.null("string")),
        visit_id=septic["visit_id"],
        kind="diagnosis",
        available_at=latest,
    )
