"""MIMIC-III and MIMIC-IV → EVENTS: a hand-made hospital, its bad rows, and the counts of the demos."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from datetime import datetime

import ibis
import pyarrow as pa
import pytest

from hf_ehr.records import assemble
from hf_ehr.schema import EhrDataError, validate_events
from hf_ehr.sources.engine import Engine, Source
from hf_ehr.sources.mimic3 import mimic3
from hf_ehr.sources.mimic4 import mimic4
from hf_ehr.tasks import get_task
from hf_ehr.tasks.icu import RESPIRATORY_FAILURE_ITEMS, SHOCK_ITEMS

from .tables import MIMIC3, MIMIC4, write_tables


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.connect(threads=2)


def events_of(source: Source, name: str | None = None) -> list[dict]:
    extracts = [extract for extract in source.extracts if name in (None, extract.name)]
    assert extracts
    return [row for extract in extracts for row in validate_events(extract.events.to_pyarrow()).to_pylist()]


def rejected_of(source: Source) -> list[tuple]:
    found = ibis.union(*[table for extract in source.extracts for table in extract.rejected]).to_pyarrow()
    return sorted((tuple(row.values()) for row in found.to_pylist()), key=str)


def named(rows: list[dict], **fields) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


@pytest.fixture(scope="module")
def hospital(engine, tmp_path_factory) -> Source:
    return mimic3(engine, write_tables(tmp_path_factory.mktemp("mimic3"), MIMIC3), measurements=True)


def test_every_bad_row_of_the_hospital_is_rejected_with_its_reason(hospital):
    orphan = "names an admission of this patient that is missing or was rejected"
    assert rejected_of(hospital) == sorted(
        [
            ("ADMISSIONS.csv", 4, "admittime,dischtime", "2150-02-02 10:00:00,2150-02-01 10:00:00",
             "negative stay: `dischtime` is before `admittime`"),
            ("ADMISSIONS.csv", 5, "hadm_id", "11", "repeats the key (hadm_id) of another row"),
            ("CHARTEVENTS.csv", 2, "error", "1", "marked as error"),
            ("DIAGNOSES_ICD.csv", 10, "hadm_id,seq_num,icd9_code", "20,1,25000",
             "repeats the key (hadm_id, seq_num, icd9_code) of another row"),
            ("DIAGNOSES_ICD.csv", 5, "icd9_code", None, "`icd9_code` is missing"),
            ("DIAGNOSES_ICD.csv", 6, "icd9_code", "NOCODE", "no ICD9CM code"),
            ("DIAGNOSES_ICD.csv", 7, "hadm_id", "30", orphan),
            ("DIAGNOSES_ICD.csv", 8, "hadm_id", "10", orphan),
            ("ICUSTAYS.csv", 2, "intime,outtime", "2160-02-02 00:00:00,2160-02-01 00:00:00",
             "negative stay: `outtime` is before `intime`"),
            ("INPUTEVENTS_MV.csv", 1, "statusdescription", "Rewritten", "cancelled or rewritten: never given"),
            ("INPUTEVENTS_MV.csv", 4, "starttime", None, "`starttime` is missing"),
            ("NOTEEVENTS.csv", 3, "iserror", "1", "marked as error"),
            ("PATIENTS.csv", 4, "gender", "X", "unknown `gender`: must be F or M"),
            ("PATIENTS.csv", 5, "dob", "not a date", "`dob` is no readable timestamp"),
            ("PRESCRIPTIONS.csv", 3, "startdate", None, "`startdate` is missing"),
            ("PRESCRIPTIONS.csv", 4, "ndc,drug", "0,", "neither `ndc` nor `drug` names a medication"),
            ("PROCEDUREEVENTS_MV.csv", 2, "statusdescription", "FinishedRunning",
             "cancelled or rewritten: never given"),
        ],
        key=str,
    )  # fmt: skip


def test_every_input_row_is_an_event_or_a_rejected_row(hospital):
    rejected = Counter(row[0] for row in rejected_of(hospital))
    for table in (
        "DIAGNOSES_ICD", "PROCEDURES_ICD", "PRESCRIPTIONS", "NOTEEVENTS", "LABEVENTS", "CHARTEVENTS",
        "PROCEDUREEVENTS_MV", "INPUTEVENTS_MV",
    ):  # fmt: skip
        rows = 3 if table == "NOTEEVENTS" else MIMIC3[table].count("\n") - 1
        assert len(events_of(hospital, table.lower())) + rejected[f"{table}.csv"] == rows


def test_diagnoses_are_dotted_ordered_and_known_only_after_discharge(hospital, engine, tmp_path):
    rows = named(events_of(hospital, "diagnoses_icd"), visit_id=11)
    assert sorted((row["position"], row["code"]) for row in rows) == [
        (1, "ICD9CM/E850.0"), (2, "ICD9CM/428.0"), (3, "ICD9CM/V49.83"),
    ]  # fmt: skip
    assert {(row["time"], row["available_at"]) for row in rows} == {(datetime(2150, 1, 15, 12),) * 2}
    (short,) = named(events_of(hospital, "diagnoses_icd"), visit_id=10)
    assert short["code"] == "ICD9CM/401"
    (procedure,) = events_of(hospital, "procedures_icd")
    assert (procedure["code"], procedure["available_at"]) == ("ICD9Proc/39.95", datetime(2150, 1, 15, 12))
    lagged = mimic3(engine, write_tables(tmp_path, MIMIC3), billing_lag_days=1.5)
    (procedure,) = events_of(lagged, "procedures_icd")
    assert procedure["available_at"] == datetime(2150, 1, 17)


def test_admissions_say_kind_plan_and_disposition(hospital):
    rows = events_of(hospital, "admissions")
    planned = {row["visit_id"]: row["numeric_value"] for row in named(rows, kind="admission")}
    assert planned == {10: 0.0, 11: 1.0, 20: 0.0}
    assert {row["code"] for row in named(rows, kind="admission")} == {"Visit/inpatient"}
    codes = {row["visit_id"]: (row["code"], row["text_value"]) for row in named(rows, kind="discharge")}
    assert codes == {
        10: ("Discharge/facility", "SNF"), 11: ("Discharge/home", "HOME"), 20: ("Discharge/died", "DEAD/EXPIRED"),
    }  # fmt: skip


def test_demographics_are_those_of_the_first_admission(hospital):
    statics = {row["code"] for row in named(events_of(hospital, "admissions"), kind="static", subject_id=1)}
    assert statics == {"Insurance/Medicare", "MaritalStatus/SINGLE"}  # language and race were unknown then


def test_a_lab_is_measured_in_the_stay_that_holds_its_time(engine, tmp_path):
    stays = """SUBJECT_ID,HADM_ID,ICUSTAY_ID,FIRST_CAREUNIT,LAST_CAREUNIT,INTIME,OUTTIME
1,11,7,MICU,SICU,2150-01-11 00:00:00,2150-01-12 12:00:00
1,11,8,MICU,SICU,2150-01-12 10:00:00,2150-01-13 00:00:00
"""
    labs = """SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUE,VALUENUM
1,11,1,2150-01-10 23:59:00,1,1
1,11,2,2150-01-11 00:00:00,1,1
1,,3,2150-01-12 09:59:00,1,1
1,11,4,2150-01-12 10:00:00,1,1
1,11,5,2150-01-13 00:00:00,1,1
1,10,6,2150-01-11 10:00:00,1,1
2,,7,2150-01-11 10:00:00,1,1
"""
    source = mimic3(engine, write_tables(tmp_path, MIMIC3, ICUSTAYS=stays, LABEVENTS=labs), measurements=True)
    rows = events_of(source, "labevents")
    found = {row["code"].split("/")[1]: row["stay_id"] for row in rows}
    # Stays that overlap: the earlier one ends where the next begins. 6 names another admission than the stay's.
    assert found == {"1": None, "2": 7, "3": 7, "4": 8, "5": None, "6": None, "7": None}
    # A row that names no admission is of the stay's, else RECORDS would not have it.
    assert {row["code"]: row["visit_id"] for row in named(rows, stay_id=7)} == {"MIMIC_ITEM/2": 11, "MIMIC_ITEM/3": 11}


def test_treatments_are_events_of_their_stay_that_tell_nothing_of_their_end(hospital):
    (ventilation,) = events_of(hospital, "procedureevents_mv")
    assert (ventilation["code"], ventilation["stay_id"], ventilation["visit_id"]) == ("MIMIC_ITEM/225792", 7, 11)
    assert (ventilation["numeric_value"], ventilation["text_value"]) == (1.0, None)  # not the 720 minutes
    assert ventilation["time"] == ventilation["available_at"] == datetime(2150, 1, 11, 20)
    infusions = {row["code"]: row for row in events_of(hospital, "inputevents_mv")}
    assert {code: (row["numeric_value"], row["text_value"], row["stay_id"], row["visit_id"])
            for code, row in infusions.items()} == {
        "MIMIC_ITEM/221906": (0.25, "mcg/kg/min", 7, 11), "MIMIC_ITEM/225158": (None, None, 7, 11),
    }  # fmt: skip


TREATMENTS = {
    "220339": ("chartevents", "arf"), "225792": ("procedureevents", "arf"), "225794": ("procedureevents", "arf"),
    "221906": ("inputevents", "shock"), "221289": ("inputevents", "shock"), "221662": ("inputevents", "shock"),
    "222315": ("inputevents", "shock"), "221749": ("inputevents", "shock"), "225158": ("inputevents", "none"),
}  # fmt: skip


def unit_of_treatments() -> dict[str, str]:
    """An adult a treatment, in a stay of four days with one heart rate; the treatment begins after 30 hours."""
    ids = range(1, len(TREATMENTS) + 1)
    tables = {
        "patients": ["subject_id,gender,dob,dod,anchor_age,anchor_year"],
        "admissions": [
            "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,discharge_location,insurance,language,"
            "marital_status,ethnicity,race,hospital_expire_flag"
        ],
        "diagnoses_icd": ["subject_id,hadm_id,seq_num,icd9_code,icd_code,icd_version", "1,10,1,4280,4280,9"],
        "icustays": ["subject_id,hadm_id,icustay_id,intime,outtime"],
        "chartevents": ["subject_id,hadm_id,icustay_id,itemid,charttime,value,valuenum"],
        "procedureevents": ["subject_id,hadm_id,icustay_id,itemid,starttime,statusdescription,rate,rateuom"],
        "inputevents": ["subject_id,hadm_id,icustay_id,itemid,starttime,statusdescription,rate,rateuom"],
    }
    tables["patients"] += [f"{i},F,2100-01-01,,50,2150" for i in ids]
    tables["admissions"] += [f"{i},{i}0,2150-01-10,2150-01-20,,URGENT,HOME,Other,,,,,0" for i in ids]
    tables["icustays"] += [f"{i},{i}0,{i}00,2150-01-11,2150-01-15" for i in ids]
    tables["chartevents"] += [f"{i},{i}0,{i}00,220045,2150-01-11 03:00:00,80,80" for i in ids]
    for i, (item, (table, _)) in zip(ids, TREATMENTS.items(), strict=True):
        cells = "5,5" if table == "chartevents" else "FinishedRunning,,"
        row = [f"{i},{i}0,{i}00", item, "2150-01-12 06:00:00", cells]
        tables[table].append(",".join(row))
    return {name: "\n".join([*lines, ""]) for name, lines in tables.items()}


@pytest.mark.parametrize("function", [mimic3, mimic4])
def test_each_item_of_the_tables_is_an_onset_of_its_task_and_of_no_other(engine, tmp_path, function):
    tables = unit_of_treatments()
    if function is mimic3:
        tables = {f"{k}_mv" if k in ("procedureevents", "inputevents") else k: v for k, v in tables.items()}
    else:
        tables = {k: v.replace("icustay_id", "stay_id") for k, v in tables.items()}
    source = function(engine, write_tables(tmp_path, tables), measurements=True)
    records = assemble(pa.concat_tables([validate_events(e.events.to_pyarrow()) for e in source.extracts]))
    for outcome in ("arf", "shock"):
        truth = [of == outcome for _, of in TREATMENTS.values()]
        labels, _ = get_task(f"{outcome}_onset_after_t12").label(records)
        assert labels["boolean_value"].to_pylist() == truth
        assert set(labels["prediction_time"].to_pylist()) == {datetime(2150, 1, 11, 12)}
        # Asked after 48 hours, who had an onset in the first 30 is left out.
        labels, excluded = get_task(f"{outcome}_onset_after_t48").label(records)
        assert labels["boolean_value"].to_pylist() == [False] * truth.count(False)
        assert excluded["onset_before"] == sum(truth)


def test_measurements_are_read_on_demand_only(engine, tmp_path):
    source = mimic3(engine, write_tables(tmp_path, MIMIC3))
    names = {extract.name for extract in source.extracts}
    assert {"labevents", "chartevents", "procedureevents_mv", "inputevents_mv"}.isdisjoint(names)


def test_missing_tables_are_an_error_or_a_warning(engine, tmp_path):
    with pytest.raises(EhrDataError, match="`DIAGNOSES_ICD` is missing"):
        mimic3(engine, write_tables(tmp_path / "a", MIMIC3, DIAGNOSES_ICD=None))
    folder = write_tables(tmp_path / "b", MIMIC3, PRESCRIPTIONS=None, NOTEEVENTS=MIMIC3["NOTEEVENTS"].split("\n")[0])
    source = mimic3(engine, folder)
    assert source.warnings == ["PRESCRIPTIONS is not there: no medications.", "NOTEEVENTS is empty: no notes."]


@pytest.mark.parametrize(
    ("table", "text", "message"),
    [
        ("PATIENTS", "SUBJECT_ID,GENDER,DOB\n1,F,2100-01-01\n", "PATIENTS.csv lacks the column `dod`"),
        ("ADMISSIONS", MIMIC3["ADMISSIONS"].split("\n")[0] + "\n", "ADMISSIONS.csv has no rows"),
    ],
)
def test_a_missing_column_and_an_empty_table_stop_with_their_names(engine, tmp_path, table, text, message):
    with pytest.raises(EhrDataError, match=message):
        mimic3(engine, write_tables(tmp_path, MIMIC3, **{table: text}))


def test_a_repeated_dimension_row_multiplies_nothing(engine, tmp_path):
    doubled = MIMIC3["ADMISSIONS"] + "".join(f"{line}\n" for line in MIMIC3["ADMISSIONS"].split("\n")[1:-1])
    plain = mimic3(engine, write_tables(tmp_path / "a", MIMIC3))
    twice = mimic3(engine, write_tables(tmp_path / "b", MIMIC3, ADMISSIONS=doubled))
    for name in ("diagnoses_icd", "prescriptions", "admissions", "icustays"):
        assert sorted(map(str, events_of(twice, name))) == sorted(map(str, events_of(plain, name)))


def test_the_hospital_of_mimic_iv(engine, tmp_path):
    source = mimic4(engine, write_tables(tmp_path, MIMIC4))
    rows = events_of(source)
    visits = {row["visit_id"]: (row["code"], row["numeric_value"]) for row in named(rows, kind="admission")}
    assert visits == {10: ("Visit/emergency", 0.0), 11: ("Visit/outpatient", None), 20: ("Visit/inpatient", 1.0)}
    ends = {row["visit_id"]: row["code"] for row in named(rows, kind="discharge")}
    assert ends == {10: "Discharge/unknown", 11: "Discharge/home", 20: "Discharge/hospice"}
    assert sorted(row["code"] for row in named(rows, kind="diagnosis")) == [
        "ICD10CM/E11.9", "ICD10CM/I10", "ICD9CM/428.0",
    ]  # fmt: skip
    procedures = {row["code"]: (row["time"], row["available_at"]) for row in named(rows, kind="procedure")}
    assert procedures == {
        "ICD9Proc/54.91": (datetime(2160, 2, 3), datetime(2160, 2, 9, 9, 30)),
        "ICD10PCS/06CN3ZZ": (datetime(2160, 2, 4), datetime(2160, 2, 9, 9, 30)),
    }
    (drug,) = named(rows, kind="medication")
    assert (drug["code"], drug["available_at"]) == ("DRUG/LORAZEPAM", datetime(2160, 2, 3, 14))
    births = {row["subject_id"]: row["time"] for row in named(rows, kind="birth")}
    assert births == {1: datetime(2090, 1, 1), 2: datetime(2069, 1, 1)}
    assert [row[2:] for row in rejected_of(source)] == [
        ("icd_version", "11", "unknown code system: `icd_version` must be one of 9, 10")
    ]
    assert "icustays is not there: no ICU stays." in source.warnings
    assert source.time_axis == "shifted"


def test_the_counts_of_the_mimic_iii_demo(engine, real_data):
    source = mimic3(engine, real_data("mimic3_demo"))
    counts = {extract.name: Counter(row["kind"] for row in events_of(source, extract.name))
              for extract in source.extracts}  # fmt: skip
    assert rejected_of(source) == []
    assert len({row["subject_id"] for row in events_of(source, "patients")}) == 100
    assert counts["admissions"]["admission"] == counts["admissions"]["discharge"] == 129
    assert counts["diagnoses_icd"] == {"diagnosis": 1761}
    assert counts["icustays"] == {"admission": 136, "discharge": 136}
    assert counts["prescriptions"] == {"medication": 10_398}
    assert len(named(events_of(source, "admissions"), code="Discharge/died")) == 40
    assert len({row["code"] for row in events_of(source, "diagnoses_icd")}) == 581
    assert source.warnings == ["NOTEEVENTS is empty: no notes."]
    ndc = [row for row in events_of(source, "prescriptions") if row["code"].startswith("NDC/")]
    assert len(ndc) / 10_398 == pytest.approx(0.86, abs=0.005)


@pytest.mark.slow
def test_the_treatments_of_the_mimic_iii_demo_are_of_its_stays(engine, real_data):
    folder = real_data("mimic3_demo")
    source = mimic3(engine, folder, measurements=True)
    given = {}
    for table in ("PROCEDUREEVENTS_MV", "INPUTEVENTS_MV"):
        with gzip.open(folder / f"{table}.csv.gz", "rt") as stream:
            rows = [row for row in csv.DictReader(stream) if row["cancelreason"] == "0"]
        rows = [row for row in rows if row["statusdescription"] != "Rewritten"]
        found = events_of(source, table.lower())
        assert len(found) == len(rows)
        assert {row["stay_id"] for row in found} == {int(row["icustay_id"]) for row in rows if row["icustay_id"]}
        given |= Counter(row["code"] for row in found)
    assert sum(given.get(code, 0) for code in RESPIRATORY_FAILURE_ITEMS) == 30
    assert sum(given.get(code, 0) for code in SHOCK_ITEMS) == 551 - 121  # 121 rows of them were rewritten


def test_the_counts_of_the_mimic_iv_demo(engine, real_data):
    source = mimic4(engine, real_data("mimic4_demo"))
    assert rejected_of(source) == []
    assert len(named(events_of(source, "admissions"), kind="admission")) == 275
    assert len(named(events_of(source, "admissions"), code="Discharge/died")) == 15
    vocabularies = Counter(row["code"].split("/")[0] for row in events_of(source, "diagnoses_icd"))
    assert vocabularies == {"ICD9CM": 2193, "ICD10CM": 2313}
    assert len(named(events_of(source, "icustays"), kind="admission")) == 140
    assert len(events_of(source, "prescriptions")) == 18_087
    assert "labevents is not there: no laboratory measurements." in source.warnings
