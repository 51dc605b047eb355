"""PhysioNet/CinC Challenge 2012 (Silva et al., Computing in Cardiology 2012;39:245-248) → EVENTS.

Each record is the first 48 hours of an adult's intensive care stay: one patient, one visit and one stay, all three
with the number of the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE, EhrDataError
from hf_ehr.sources._measurements import birth_from_age, measurement_events, placed
from hf_ehr.sources._parse import as_value
from hf_ehr.sources._record_files import LINE, gather_lines, is_archive
from hf_ehr.sources._table_cells import FILE, Rule, nth, split, union
from hf_ehr.sources.engine import ROW, Column, Engine, Extract, Source, as_events

if TYPE_CHECKING:
    import ibis.expr.types as ir

ChallengeSet = Literal["a", "b", "c"]

VARIABLES = (
    "ALP", "ALT", "AST", "Albumin", "BUN", "Bilirubin", "Cholesterol", "Creatinine", "DiasABP", "FiO2", "GCS",
    "Glucose", "HCO3", "HCT", "HR", "K", "Lactate", "MAP", "MechVent", "Mg", "NIDiasABP", "NIMAP", "NISysABP", "Na",
    "PaCO2", "PaO2", "Platelets", "RespRate", "SaO2", "SysABP", "Temp", "TroponinI", "TroponinT", "Urine", "WBC", "pH",
)  # fmt: skip
"""The 36 time series."""
UNITS = ("Coronary Care Unit", "Cardiac Surgery Recovery Unit", "Medical ICU", "Surgical ICU")
"""ICUType 1 … 4."""
SCORES = ("SAPS-I", "SOFA", "Length_of_stay")

_DESCRIPTORS = {"Age": (0, 130), "Gender": (0, 1), "ICUType": (1, len(UNITS))}
_START = "2000-01-01"
_LEAST_DAYS = 2  # the challenge has only stays of at least 48 hours
_DAY = 86_400


def physionet2012(engine: Engine, input_dir: Path, *, part: ChallengeSet | None = None) -> Source:
    """Reads the sets ``set-a``, ``set-b``, ``set-c``: folders of ``RecordID.txt`` or archives of them, as they are.

    - Every stay starts on 2000-01-01 00:00: the data has no dates. ``Age`` gives the birth, ``Gender`` the sex.
    - ``Height``, ``Weight`` and ``ICUType`` are measurements of hour 0 (``CINC2012/Height``, …), as the 36 variables
      are of theirs; ``ICUType`` is text, a category. The set is the wording of the visit's admission.
    - -1 means missing. It, and values that are impossible (``_measurements.POSSIBLE``), go to the rejected rows and
      are not repaired. An unknown variable is kept under its name, with a warning that counts it.
    - Outcomes are facts of the discharge: the visit ends on the day that ``Length_of_stay`` says (at its last second),
      with the disposition of ``In-hospital_death``; ``Survival`` times the death. ``SAPS-I``, ``SOFA`` and
      ``Length_of_stay`` are events of the visit at discharge and outside of the stay, so that they are in EVENTS for
      a baseline and never among a stay's measurements.
    - An unknown ``Length_of_stay``, or one below the two days that every stay lasted at least, counts as two days; so
      does a ``Survival`` below them of who died in hospital (26 of set A), whose records go on until hour 48.
      When the patient left the unit is not in the data: the stay ends with the visit.
    - A record without an outcome has no discharge, so tasks on the discharge leave it out.

    Args:
        engine: The engine.
        input_dir: Folder of the sets and of ``Outcomes-a.txt``, …; or a single set.
        part: The one set to read; all that are there by default. Train on one and test on another with one prepared
            folder each.

    Raises:
        ValueError: There is no such part.
        EhrDataError: The set is not there, or a file is empty, damaged or has another header.
    """
    if part is not None and part not in get_args(ChallengeSet):
        raise ValueError(f"`part` must be one of {', '.join(get_args(ChallengeSet))}, got {part!r}.")
    holders = _holders(Path(input_dir), part)
    lines, records, rejected = _lines(engine, holders)
    folder = Path(input_dir) if Path(input_dir).is_dir() else Path(input_dir).parent
    outcomes, bad_outcomes, warnings = _outcomes(engine, folder, part, records)
    records = _described(records, lines).left_join(outcomes, LINE.record).drop(f"{LINE.record}_right")
    events, impossible = measurement_events(_measured(lines), "CINC2012", column="Value", missing="-1")
    extracts = [
        Extract("records", _record_events(records)),
        Extract("outcomes", _outcome_events(records), bad_outcomes),
        Extract("measurements", events.union(_unit_events(records)), [rejected, impossible]),
    ]
    return Source("physionet2012", extracts, "shifted", warnings + _unknown_variables(lines))


def _holders(input_dir: Path, part: ChallengeSet | None) -> list[Path]:
    """The folder or, without one, the archive of each set; ``input_dir`` itself where it holds none."""
    if input_dir.is_file():
        return [input_dir]
    found = []
    for letter in get_args(ChallengeSet) if part is None else (part,):
        folder = input_dir / f"set-{letter}"
        archives = [path for path in sorted(input_dir.glob(f"set-{letter}.*")) if is_archive(path)]
        found += [folder] if folder.is_dir() else archives[:1]
    if not found and part is not None:
        raise EhrDataError(f"`input_dir` must hold set-{part} (a folder or an archive), and {input_dir} does not.")
    return found or [input_dir]


def _lines(engine: Engine, holders: list[Path]) -> tuple[ir.Table, ir.Table, ir.Table]:
    """(valid lines, every record with its set, rejected lines)."""
    path = gather_lines(engine, holders, r"([0-9]+)\.txt", ",")
    columns = {name: Column() for name in ("Time", "Parameter", "Value", FILE, LINE.group)}
    columns |= {name: Column("int64") for name in (LINE.record, LINE.number, LINE.fields)}
    table = engine.scan(path, columns | {LINE.repeated: Column()}).table
    table = table.mutate(**{ROW: table[LINE.number]})
    records = table.filter(table[LINE.repeated] == "false").select(LINE.record, LINE.group).distinct()
    # A record without any measurement is one line of nulls.
    table = table.filter(table["Time"].notnull() | table["Parameter"].notnull())
    shaped = table["Time"].re_search("^[0-9]{1,4}:[0-5][0-9]$").fill_null(False)
    other = (table["Parameter"] == "RecordID") & (table["Value"] != table[LINE.record].cast("string"))
    described = table["Parameter"].isin(list(_DESCRIPTORS))
    rules = [
        Rule(table[LINE.repeated] == "true", "RecordID", table[FILE], "repeats the record of another file"),
        Rule(table[LINE.fields] != 3, "Value", table["Value"], "the line must have 3 fields"),
        Rule(~shaped, "Time", table["Time"], "`Time` must be HH:MM since the start of the stay"),
        Rule(table["Parameter"].isnull(), "Parameter", table["Parameter"], "`Parameter` is missing"),
        Rule(table["Value"].isnull(), "Value", table["Value"], "`Value` is missing"),
        Rule(other, "Value", table["Value"], "`RecordID` is not that of the file's name"),
        Rule(described & (table["Value"] == "-1"), "Value", table["Value"], "missing: -1"),
        *(_descriptor_rule(table, name, low, high) for name, (low, high) in _DESCRIPTORS.items()),
    ]
    good, rejected = split(table, rules)
    return good, records, rejected


def _descriptor_rule(table: ir.Table, name: str, low: int, high: int) -> Rule:
    number = as_value(table["Value"], table["Value"], "float64")
    wrong = (table["Parameter"] == name) & ~number.between(low, high).fill_null(False)
    return Rule(wrong, "Value", table["Value"], f"impossible value: `{name}` must be {low} to {high}")


def _described(records: ir.Table, lines: ir.Table) -> ir.Table:
    """Records with the columns ``start, age, sex, unit``."""
    import ibis

    rows = lines.filter(lines["Parameter"].isin(list(_DESCRIPTORS)))
    number = as_value(rows["Value"], rows["Value"], "float64")
    said = {name: ibis.ifelse(rows["Parameter"] == name, number, ibis.null("float64")) for name in _DESCRIPTORS}
    described = rows.group_by(LINE.record).agg(
        age=said["Age"].max(), sex=said["Gender"].max(), unit=said["ICUType"].max()
    )
    joined = records.left_join(described, LINE.record).drop(f"{LINE.record}_right")
    return joined.mutate(
        start=ibis.timestamp(f"{_START} 00:00:00"),
        sex=ibis.cases((joined["sex"] == 0, "F"), (joined["sex"] == 1, "M")),
        unit=nth(joined["unit"] - 1, UNITS),
    )


def _measured(lines: ir.Table) -> ir.Table:
    """Lines of measurements with their patient, visit, stay and time."""
    import ibis

    rows = lines.filter(lines["Parameter"].notin(["RecordID", *_DESCRIPTORS]))
    minutes = rows["Time"].re_extract("^([0-9]+):", 1).cast("int64") * 60 + rows["Time"].right(2).cast("int64")
    number = rows[LINE.record]
    return rows.select(
        FILE,
        ROW,
        subject_id=number,
        visit_id=number,
        stay_id=number,
        _time=ibis.timestamp(f"{_START} 00:00:00") + (minutes * 60).as_interval("s"),
        _name=rows["Parameter"],
        _text=rows["Value"],
    )


def _unit_events(records: ir.Table) -> ir.Table:
    known = records.filter(records["unit"].notnull())
    known = known.mutate(subject_id=known[LINE.record], visit_id=known[LINE.record], stay_id=known[LINE.record])
    return placed(known.mutate(_time=known["start"]), code="CINC2012/ICUType", text_value=known["unit"])


def _unknown_variables(lines: ir.Table) -> list[str]:
    unknown = lines.filter(lines["Parameter"].notin([*VARIABLES, *_DESCRIPTORS, "RecordID", "Height", "Weight"]))
    counts = unknown.group_by("Parameter").agg(count=unknown.count()).order_by("Parameter").to_pyarrow().to_pylist()
    return [f"{row['count']:,} values of the unknown variable {row['Parameter']} are kept." for row in counts]


# Outcomes


def _outcomes(
    engine: Engine, folder: Path, part: ChallengeSet | None, records: ir.Table
) -> tuple[ir.Table, list[ir.Table], list[str]]:
    """(``_record, died, days, survival`` and the scores, -1 as null; rejected rows; warnings)."""
    import ibis

    columns = {"RecordID": Column("int64", required=True), "In-hospital_death": Column("int64", required=True)}
    columns |= {name: Column("int64", optional=True) for name in (*SCORES, "Survival")}
    paths = [folder / f"Outcomes-{letter}.txt" for letter in (get_args(ChallengeSet) if part is None else (part,))]
    scans = [engine.scan(path, columns, key=["RecordID"]) for path in paths if path.is_file()]
    names = [path.name for path in paths if path.is_file()]
    tables = [scan.table.mutate(**{FILE: ibis.literal(name)}) for scan, name in zip(scans, names, strict=True)]
    if not tables:
        types = {LINE.record: "int64", "died": "boolean", "days": "int64", "survival": "int64"}
        types |= dict.fromkeys(SCORES, "int64")
        nothing = records.select(**{name: ibis.null(kind) for name, kind in types.items()}).limit(0)
        return nothing, [], ["Outcomes are not there: no discharge, death or score."]
    known = records.select(LINE.record, _known=True)
    rows = union(tables)
    rows = rows.left_join(known, rows["RecordID"] == known[LINE.record])
    death, number = rows["In-hospital_death"], rows["RecordID"]
    rows, rejected = split(
        rows,
        [
            Rule(rows["_known"].isnull(), "RecordID", number, "names a record that is not there"),
            Rule(death.notin([0, 1]), "In-hospital_death", death, "`In-hospital_death` must be 0 or 1"),
        ],
    )
    outcomes = rows.select(
        FILE,
        ROW,
        LINE.record,
        died=rows["In-hospital_death"] == 1,
        days=rows["Length_of_stay"].nullif(-1),
        survival=rows["Survival"].nullif(-1),
        **{name: rows[name].nullif(-1) for name in SCORES},
    )
    contradicts = ~outcomes["died"] & (outcomes["survival"] <= _at_least_two(outcomes["days"]))
    kept = outcomes.mutate(
        survival=ibis.ifelse(contradicts.fill_null(False), ibis.null("int64"), outcomes["survival"])
    )
    reason = "`Survival` is within the stay that the patient survived: no death is made of it"
    _, contradicted = split(outcomes, [Rule(contradicts, "Survival", outcomes["survival"], reason)])
    unknown = int(outcomes.filter(outcomes["days"].isnull()).count().to_pyarrow().as_py())
    warnings = [f"Length_of_stay is unknown of {unknown:,} records: two days, the least."] if unknown else []
    return kept.drop(FILE, ROW), [*(scan.rejected for scan in scans), rejected, contradicted], warnings


def _record_events(records: ir.Table) -> ir.Table:
    """Admission to hospital and unit, birth and sex of every record."""
    import ibis

    sexed, aged = (records.filter(records[name].notnull()) for name in ("sex", "age"))
    number = records[LINE.record]
    admitted = as_events(
        records, subject_id=number, time=records["start"], code="Visit/inpatient", text_value=records[LINE.group],
        visit_id=number, kind="admission",
    )  # fmt: skip
    entered = as_events(
        records, subject_id=number, time=records["start"], code="Stay/icu", text_value=records["unit"],
        visit_id=number, stay_id=number, kind="admission",
    )  # fmt: skip
    birth = birth_from_age(aged["start"], aged["age"])
    return ibis.union(
        admitted,
        entered,
        as_events(aged, subject_id=aged[LINE.record], time=birth, code=BIRTH_CODE, kind="birth"),
        as_events(sexed, subject_id=sexed[LINE.record], code="Sex/" + sexed["sex"], kind="static"),
    )


def _outcome_events(records: ir.Table) -> ir.Table:
    """End of the stay, of the visit and of the life, and the scores."""
    import ibis

    records = records.mutate(end=_end_of_day(records["start"], _at_least_two(records["days"])))
    known = records.filter(records["died"].notnull())
    gone = known.mutate(code=ibis.ifelse(known["died"], "Discharge/died", "Discharge/unknown"))
    dead = known.filter(known["died"] | known["survival"].notnull())
    survived = _end_of_day(dead["start"], _at_least_two(dead["survival"]))
    in_hospital = ibis.ifelse(dead["survival"].isnull(), dead["end"], ibis.least(survived, dead["end"]))
    time = ibis.ifelse(dead["died"], in_hospital, survived)
    left = records.select(subject_id=LINE.record, time="end", code=ibis.literal("Stay/icu"), stay_id=LINE.record)
    events = [
        as_events(
            left, subject_id=left["subject_id"], time=left["time"], code=left["code"], visit_id=left["stay_id"],
            stay_id=left["stay_id"], kind="discharge",
        ),
        as_events(
            gone, subject_id=gone[LINE.record], time=gone["end"], code=gone["code"], visit_id=gone[LINE.record],
            kind="discharge",
        ),
        as_events(dead, subject_id=dead[LINE.record], time=time, code=DEATH_CODE, kind="death"),
    ]  # fmt: skip
    for name in SCORES:
        scored = known.filter(known[name].notnull())
        events.append(
            as_events(
                scored, subject_id=scored[LINE.record], time=scored["end"], code=f"CINC2012/{name}",
                numeric_value=scored[name], visit_id=scored[LINE.record], kind="measurement",
                available_at=scored["end"],
            )
        )  # fmt: skip
    return ibis.union(*events)


def _at_least_two(days: ir.IntegerValue) -> ir.IntegerValue:
    """``days``; the least that every record lasted where it is unknown or less."""
    import ibis

    return ibis.greatest(days.fill_null(_LEAST_DAYS), _LEAST_DAYS)


def _end_of_day(start: ir.TimestampValue, days: ir.IntegerValue) -> ir.TimestampValue:
    """The last second of the day that is ``days`` after ``start``: a fact known by its day only."""
    return start + (days.cast("int64") * _DAY + _DAY - 1).as_interval("s")
