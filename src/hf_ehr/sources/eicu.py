"""eICU-CRD 2.0 (Pollard et al., Sci Data 2018;5:180178, doi 10.1038/sdata.2018.178) → EVENTS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE
from hf_ehr.sources import _eicu_tables as tables
from hf_ehr.sources._codes import joined
from hf_ehr.sources._measurements import birth_from_age
from hf_ehr.sources._rules import Rule, split_by_rules
from hf_ehr.sources.engine import Column, Engine, Extract, Source, as_events, find_table

if TYPE_CHECKING:
    import ibis.expr.types as ir

Vocabulary = Literal["ICD9CM", "ICD10CM"]

FOLDERS = ("", "tables")
OPTIONAL_TABLES = {
    "diagnosis": "diagnoses",
    "medication": "medications",
    "admissiondrug": "drugs taken before the admission",
    "treatment": "treatments",
    "note": "notes",
    "pasthistory": "past history",
    "lab": "laboratory measurements",
    "vitalperiodic": "bedside measurements",
    "vitalaperiodic": "blood pressures and cardiac output",
}
DISPOSITIONS = {
    "home": ("Home",),
    "facility": ("Skilled Nursing Facility", "Rehabilitation", "Nursing Home"),
    "transfer": ("Other Hospital",),
    "died": ("Death",),
}
"""Disposition of the contract → wordings of hospitaldischargelocation; anything else is ``unknown``."""

_OLDEST = 90  # what "> 89" stands for
_SITE = 1_000_000  # uniquepid 002-12243 → 2,012,243: at most six digits follow the hyphen


def eicu(
    engine: Engine,
    input_dir: Path,
    *,
    measurements: bool = True,
    icd: Vocabulary | None = None,
    yaib: str | None = None,
) -> Source:
    """Reads ``patient`` and whichever of the optional tables are there.

    - A patient is a ``uniquepid`` (002-12243 → 2012243), a visit a ``patienthealthsystemstayid``, a stay a
      ``patientunitstayid``. All offsets are minutes since the unit's admission, so times within a visit are true to
      the minute; stays are placed by ``hospitaladmitoffset``.
    - The data says only in which year a visit ended. A patient's visits are put in the order of that year, within it
      one that ended by death last, then by age, then by id: at least a year apart, from 1 January of the first year
      on. Their distance is made up, and so is the order within a year; a warning counts them, and the time axis
      ``visit`` keeps tasks that compare visits away.
    - Ages are whole years; ``> 89`` counts as 90. Ethnicity becomes ``Race/…``.
    - A diagnosis is known when it was charted, first those of priority Primary, then Major, then Other. Its field can
      name the same disease in ICD-9 and ICD-10; a code that fits both shapes (V62.84) is ICD-9.
    - A drug is ``EICU_HICL/drughiclseqno``, else ``DRUG/NAME``; cancelled orders are rejected. A treatment is a
      procedure ``EICU_TREATMENT/…``. A note is one choice of a pick list.
    - Measurements are ``EICU/`` and the laboratory's name or the column's, also ``admissionheight`` and
      ``admissionweight`` at hour 0; of the YAIB grid ``YAIB/`` and the column's name.

    Args:
        engine: The engine.
        input_dir: Folder of the tables, or of a folder ``tables`` with them.
        measurements: Whether to read ``lab``, ``vitalPeriodic`` and ``vitalAperiodic``.
        icd: The one vocabulary of diagnoses to keep; both by default.
        yaib: Folder, in ``input_dir`` or absolute, of an hourly grid of YAIB (``dyn.parquet``); its ``sta`` repeats
            ``patient``, its ``outc`` is a label.

    Raises:
        ValueError: There is no such vocabulary.
        EhrDataError: A required table or column is missing, or a file is empty or damaged.
    """
    if icd is not None and icd not in get_args(Vocabulary):
        raise ValueError(f"`icd` must be one of {', '.join(get_args(Vocabulary))}, got {icd!r}.")
    path = find_table(input_dir, "patient", folders=FOLDERS)
    stays, rejected = _stays(engine, path)
    stays = _placed(stays)
    paths = {name: find_table(input_dir, name, folders=FOLDERS, required=False) for name in OPTIONAL_TABLES}
    warnings = _order_warnings(stays)
    warnings += [f"{name} is not there: no {OPTIONAL_TABLES[name]}." for name, found in paths.items() if found is None]
    body, impossible = _body(stays, path)
    extracts = [Extract("patient", _patient_events(stays).union(body), [*rejected, impossible])]
    readers = {
        "diagnosis": lambda *where: tables.diagnoses(*where, icd=icd),
        "medication": tables.medications,
        "admissiondrug": tables.admission_drugs,
        "treatment": tables.treatments,
        "note": tables.notes,
        "pasthistory": tables.past_history,
    }
    if measurements:
        readers |= {"lab": tables.labs, "vitalperiodic": tables.vitals, "vitalaperiodic": tables.blood_pressures}
    for name, read in readers.items():
        found = paths[name]
        if found is not None:
            extracts.append(read(engine, found, stays))
    if yaib is not None:
        extracts.append(tables.yaib_grid(engine, Path(input_dir) / yaib / "dyn.parquet", stays))
    return Source("eicu", extracts, "visit", warnings)


def _stays(engine: Engine, path: Path) -> tuple[ir.Table, list[ir.Table]]:
    """(valid unit stays with ``subject_id, visit_id, stay_id``, rejected rows)."""
    integers = ("unitvisitnumber", "hospitaldischargeyear", "hospitaldischargeoffset", "unitdischargeoffset")
    texts = (
        "gender", "age", "ethnicity", "hospitaladmitsource", "hospitaldischargelocation", "hospitaldischargestatus",
        "unittype", "unitstaytype", "unitdischargestatus", "unitdischargelocation", "admissionheight",
        "admissionweight",
    )  # fmt: skip
    required = {name: Column("int64", required=True) for name in ("patientunitstayid", "patienthealthsystemstayid")}
    columns = required | {"hospitaladmitoffset": Column("int64", required=True), "uniquepid": Column(required=True)}
    columns |= {name: Column("int64") for name in integers} | {name: Column() for name in texts}
    scan = engine.scan(path, columns, key=["patientunitstayid"])
    named = scan.table["uniquepid"].re_search("^[0-9]{1,3}-[0-9]{1,6}$")
    stays, rejected = split_by_rules(
        scan.table,
        [
            Rule(lambda _: ~named, "uniquepid", "`uniquepid` must be a site and a number (002-12243)"),
            Rule(
                lambda table: table["unitdischargeoffset"] < 0,
                "unitdischargeoffset",
                "negative stay: `unitdischargeoffset` is below 0",
            ),
        ],
        path.name,
    )
    pieces = stays["uniquepid"].split("-")
    subject = pieces[0].cast("int64") * _SITE + pieces[1].cast("int64")
    stays = stays.mutate(subject_id=subject, visit_id=stays["patienthealthsystemstayid"])
    return stays.mutate(stay_id=stays["patientunitstayid"]), [scan.rejected, rejected]


def _placed(stays: ir.Table) -> ir.Table:
    """Unit stays with ``start, end, visit_start, visit_end, years`` (age) and ``died``, in hospital or unit."""
    import ibis

    years = ibis.ifelse(stays["age"].startswith(">"), str(_OLDEST), stays["age"]).try_cast("float64")
    died = (stays["hospitaldischargestatus"] == "Expired") | (stays["unitdischargestatus"] == "Expired")
    entered = -stays["hospitaladmitoffset"]  # minutes since the hospital's admission
    stays = stays.mutate(years=years, died=died.fill_null(False), entered=entered)
    visits = stays.group_by("subject_id", "visit_id").agg(
        first=ibis.least(stays["entered"].min(), 0),
        left=(stays["entered"] + stays["hospitaldischargeoffset"]).max(),
        last=(stays["entered"] + stays["unitdischargeoffset"].fill_null(0)).max(),
        year=stays["hospitaldischargeyear"].min(),
        aged=stays["years"].min(),
        dead=stays["died"].max(),
    )
    span = ibis.greatest(visits["left"].fill_null(visits["last"]), visits["last"]) - visits["first"]
    longest = span.max().to_pyarrow().as_py() or 0
    step = max(366, longest // 1440 + 1)
    order = ibis.window(
        group_by="subject_id", order_by=[visits["year"], visits["dead"], visits["aged"], visits["visit_id"]]
    )
    whole = ibis.window(group_by="subject_id")
    year = visits["year"].min().over(whole).fill_null(2014).cast("string")
    rank = ibis.row_number().over(order).cast("int64")
    visits = visits.mutate(
        visit_start=(year + "-01-01").try_cast("timestamp") + (rank * step * 86_400).as_interval("s")
    )
    visits = visits.mutate(visit_end=visits["visit_start"] + tables.minutes(visits["left"] - visits["first"]))
    visits = visits.mutate(visit_died=visits["dead"]).drop("dead", "aged", "last", "left")
    stays = stays.join(visits, ["subject_id", "visit_id"], rname="_right_{name}")
    start = stays["visit_start"] + tables.minutes(stays["entered"] - stays["first"])
    stays = stays.mutate(start=start)
    return stays.mutate(end=stays["start"] + tables.minutes(stays["unitdischargeoffset"]))


def _order_warnings(stays: ir.Table) -> list[str]:
    visits = stays.select("subject_id", "visit_id", "year").distinct()
    years = visits.group_by("subject_id", "year").agg(count=visits.count())
    patients = years.filter(years["count"] > 1)["subject_id"].nunique().to_pyarrow().as_py()
    several = visits.group_by("subject_id").agg(count=visits.count())
    count = several.filter(several["count"] > 1).count().to_pyarrow().as_py()
    if not count:
        return []
    return [
        f"{count:,} patients have several hospital visits, whose distance is unknown: no readmission task. Of "
        f"{patients:,} the order is unknown too (visits of the same year): use only the visit that is asked about."
    ]


def _patient_events(stays: ir.Table) -> ir.Table:
    """Edges of visits and stays, demographics and death."""
    import ibis

    order = ibis.window(group_by=["subject_id", "visit_id"], order_by=["start", "stay_id"])
    ranked = stays.mutate(_rank=ibis.row_number().over(order))
    visits = ranked.filter(ranked["_rank"] == 0)
    by_patient = ibis.window(group_by="subject_id", order_by=["visit_start", "visit_id"])
    ordered = visits.mutate(_visit=ibis.row_number().over(by_patient))
    first = ordered.filter(ordered["_visit"] == 0)
    events = [*_visit_events(visits), *_stay_events(stays)]
    aged = first.filter(first["years"].notnull())
    born = birth_from_age(aged["visit_start"], aged["years"])
    events.append(as_events(aged, subject_id=aged["subject_id"], time=born, code=BIRTH_CODE, kind="birth"))
    sexed = first.filter(first["gender"].isin(["Male", "Female"]))
    sex = "Sex/" + sexed["gender"].substr(0, 1)
    events.append(as_events(sexed, subject_id=sexed["subject_id"], code=sex, kind="static"))
    known = first.filter(first["ethnicity"].notnull() & (first["ethnicity"] != "Other/Unknown"))
    race = joined("Race", known["ethnicity"])
    events.append(as_events(known, subject_id=known["subject_id"], code=race, kind="static"))
    return ibis.union(*events)


def _visit_events(visits: ir.Table) -> list[ir.Table]:
    import ibis

    place = {"subject_id": visits["subject_id"], "visit_id": visits["visit_id"]}
    admitted = as_events(
        visits, **place, time=visits["visit_start"], code="Visit/inpatient", text_value=visits["hospitaladmitsource"],
        kind="admission",
    )  # fmt: skip
    left = visits.filter(visits["visit_end"].notnull())
    pairs = [(wording, meaning) for meaning, wordings in DISPOSITIONS.items() for wording in wordings]
    place_of = left["hospitaldischargelocation"].cases(*pairs, else_="unknown")
    discharged = as_events(
        left, subject_id=left["subject_id"], time=left["visit_end"],
        code="Discharge/" + ibis.ifelse(left["visit_died"], "died", place_of),
        text_value=left["hospitaldischargelocation"], visit_id=left["visit_id"], kind="discharge",
    )  # fmt: skip
    return [admitted, discharged]


def _stay_events(stays: ir.Table) -> list[ir.Table]:
    """Admission to and discharge from the unit, and deaths."""
    import ibis

    code = ibis.ifelse(stays["unitstaytype"] == "stepdown/other", "Stay/stepdown", "Stay/icu")
    stays = stays.mutate(_code=code.fill_null("Stay/icu"))
    ended = stays.filter(stays["end"].notnull())
    edges = [
        as_events(
            table, subject_id=table["subject_id"], time=table[time], code=table["_code"], text_value=table[text],
            visit_id=table["visit_id"], stay_id=table["stay_id"], kind=kind,
        )
        for table, time, text, kind in (
            (stays, "start", "unittype", "admission"),
            (ended, "end", "unitdischargelocation", "discharge"),
        )
    ]  # fmt: skip
    time = ibis.ifelse((stays["unitdischargestatus"] == "Expired").fill_null(False), stays["end"], stays["visit_end"])
    dead = stays.mutate(_time=time).filter(stays["died"] & time.notnull())
    return [*edges, as_events(dead, subject_id=dead["subject_id"], time=dead["_time"], code=DEATH_CODE, kind="death")]


def _body(stays: ir.Table, path: Path) -> tuple[ir.Table, ir.Table]:
    """(events, rejected cells) of height and weight at hour 0."""
    rows = stays.mutate(_time=stays["start"])
    return tables.long_events(rows, ("admissionheight", "admissionweight"), path, "EICU")
