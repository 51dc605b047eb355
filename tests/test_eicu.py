"""eICU → EVENTS: a hand-made unit in the public schema, its bad rows, and the counts of the demo."""

# ruff: noqa: E501 - the tables are as wide as they are

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ehr.records import assemble
from hf_ehr.schema import EhrDataError, validate_events
from hf_ehr.sources.eicu import eicu
from hf_ehr.sources.engine import Engine, Source

from .tables import write_tables

PATIENT = """patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,wardid,apacheadmissiondx,admissionheight,hospitaladmittime24,hospitaladmitoffset,hospitaladmitsource,hospitaldischargeyear,hospitaldischargetime24,hospitaldischargeoffset,hospitaldischargelocation,hospitaldischargestatus,unittype,unitadmittime24,unitadmitsource,unitvisitnumber,unitstaytype,admissionweight,dischargeweight,unitdischargetime24,unitdischargeoffset,unitdischargelocation,unitdischargestatus,uniquepid
100,10,Male,61,Caucasian,68,103,x,177.8,23:48:00,-60,Emergency Department,2014,15:41:00,5700,Home,Alive,SICU,23:58:00,Operating Room,1,admit,91.7,93.1,22:47:00,1440,Floor,Alive,002-12243
101,10,Male,61,Caucasian,68,103,x,177.8,23:48:00,-3000,Emergency Department,2014,15:41:00,2760,Home,Alive,SICU,23:58:00,ICU,2,stepdown/other,,,22:47:00,0,Floor,Alive,002-12243
102,12,Male,62,Caucasian,68,103,x,17.7,23:48:00,-10,Floor,2015,15:41:00,900,Death,Expired,MICU,23:58:00,Floor,1,admit,91.7,93.1,22:47:00,800,Death,Expired,002-12243
103,11,Male,62,Caucasian,68,103,x,177.8,23:48:00,-10,Floor,2015,15:41:00,900,Skilled Nursing Facility,Alive,MICU,23:58:00,Floor,1,admit,91.7,93.1,22:47:00,,Floor,Alive,002-12243
200,20,,> 89,Other/Unknown,68,103,x,,23:48:00,30,,2014,15:41:00,,,,MICU,23:58:00,Floor,1,admit,,,22:47:00,600,Floor,Alive,003-5
300,30,Male,50,,68,103,x,,23:48:00,-1,,2014,15:41:00,10,,,MICU,23:58:00,Floor,1,admit,,,22:47:00,-5,Floor,Alive,003-6
301,31,Male,50,,68,103,x,,23:48:00,,,2014,15:41:00,10,,,MICU,23:58:00,Floor,1,admit,,,22:47:00,5,Floor,Alive,003-7
302,32,Male,50,,68,103,x,,23:48:00,-1,,2014,15:41:00,10,,,MICU,23:58:00,Floor,1,admit,,,22:47:00,5,Floor,Alive,nobody
100,10,Male,61,Caucasian,68,103,x,177.8,23:48:00,-60,Emergency Department,2014,15:41:00,5700,Home,Alive,SICU,23:58:00,Operating Room,1,admit,91.7,93.1,22:47:00,1440,Floor,Alive,002-12243
"""
TABLES = {
    "patient": PATIENT,
    "diagnosis": """diagnosisid,patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring,icd9code,diagnosispriority
1,100,False,90,cardiovascular|x,"414.00, I25.10",Major
2,100,False,30,infectious,"V62.84",Other
3,100,False,30,poisoning,"E980.2, T40.1X4A",Primary
4,100,False,30,nothing,,Other
5,100,False,30,wrong,"41x",Other
6,999,False,30,orphan,"401.9, I10",Other
""",
    "medication": """medicationid,patientunitstayid,drugorderoffset,drugstartoffset,drugivadmixture,drugordercancelled,drugname,drughiclseqno,dosage,routeadmin,frequency,loadingdose,prn,drugstopoffset,gtc
1,100,55,6,No,No,ONDANSETRON  HCL,33598,4 3,IV,Q12H PRN,,Yes,5383,65
2,100,-100,20,No,No,Heparin 5000 UNIT,,4 3,IV,,,Yes,5383,65
3,100,-100,20,No,Yes,Heparin,7,4 3,IV,,,Yes,5383,65
4,100,-100,20,No,No,,0,4 3,IV,,,Yes,5383,65
5,100,-100,,No,No,Heparin,7,4 3,IV,,,Yes,5383,65
""",
    "admissiondrug": """admissiondrugid,patientunitstayid,drugoffset,drugenteredoffset,drugnotetype,specialtytype,usertype,rxincluded,writtenineicu,drugname,drugdosage,drugunit,drugadmitfrequency,drughiclseqno
1,101,-20,44,Daily Progress,eCM Primary,THC Physician,False,True,NOVOLOG,0,,,20769
""",
    "treatment": """treatmentid,patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge
1,100,838,cardiovascular|arrhythmias|enoxaparin now,False
""",
    "note": """noteid,patientunitstayid,noteoffset,noteenteredoffset,notetype,notepath,notevalue,notetext
1,100,19,22,Comprehensive Progress,notes/x,System View,SystemView
2,100,30,25,Admission,notes/x,HR Highest,120
""",
    "pasthistory": """pasthistoryid,patientunitstayid,pasthistoryoffset,pasthistoryenteredoffset,pasthistorynotetype,pasthistorypath,pasthistoryvalue,pasthistoryvaluetext
1,100,8,13,Comprehensive Progress,notes/x,No Health Problems,NoHealthProblems
""",
    "lab": """labid,patientunitstayid,labresultoffset,labtypeid,labname,labresult,labresulttext,labmeasurenamesystem,labmeasurenameinterface,labresultrevisedoffset
1,100,90,1,total bilirubin,1.2000,1.2,mg/dL,mg/dL,100
2,100,90,1,urinary culture,,NEG,,,95
3,100,-30,4,pH,74.1,74.1,,,-20
4,100,90,1,sodium,,,mmol/L,mmol/L,100
""",
    "vitalPeriodic": """vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,etco2,systemicsystolic,systemicdiastolic,systemicmean,pasystolic,padiastolic,pamean,st1,st2,st3,icp
1,100,5,,97,80,18,-2,,120,60,80,,,,-0.5,,,
2,100,10,99.1,104,,,,,,,,,,,,,,
""",
    "vitalAperiodic": """vitalaperiodicid,patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,noninvasivemean,paop,cardiacoutput,cardiacinput,svr,svri,pvr,pvri
1,101,60,115,63,83,,,,,,,
""",
}
SUBJECT = 2_012_243
BIRTHDAY = datetime(2014, 1, 1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.connect(threads=2)


def write_unit(folder: Path) -> Path:
    """All tables, and an hourly grid in the folder ``grid``."""
    write_tables(folder, TABLES)
    (folder / "grid").mkdir()
    hours = pa.array([0, 3_600_000, 0], pa.duration("ms"))
    grid = {"stay_id": [100, 100, 777], "time": hours, "hr": [None, 81.5, 90.0], "crea": [1.5, None, 1.0]}
    pq.write_table(pa.table(grid), folder / "grid" / "dyn.parquet")
    return folder


@pytest.fixture(scope="module")
def source(engine, tmp_path_factory) -> Source:
    return eicu(engine, write_unit(tmp_path_factory.mktemp("eicu")), yaib="grid")


@pytest.fixture(scope="module")
def events(source) -> list[dict]:
    return validate_events(pa.concat_tables([extract.events.to_pyarrow() for extract in source.extracts])).to_pylist()


@pytest.fixture(scope="module")
def records(source) -> dict[int, dict]:
    table = pa.concat_tables([extract.events.to_pyarrow() for extract in source.extracts])
    return {row["subject_id"]: row for row in assemble(validate_events(table)).to_pylist()}


def named(rows: list[dict], **fields) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def test_every_bad_row_is_rejected_with_its_reason(source):
    found = ibis.union(*[table for extract in source.extracts for table in extract.rejected]).to_pyarrow()
    orphan = "names a unit stay that is missing or was rejected"
    expected = [
        ("patient.csv", 3, "admissionheight", "17.7", "impossible value: `admissionheight` must be 50 to 250"),
        ("patient.csv", 6, "unitdischargeoffset", "-5", "negative stay: `unitdischargeoffset` is below 0"),
        ("patient.csv", 7, "hospitaladmitoffset", None, "`hospitaladmitoffset` is missing"),
        ("patient.csv", 8, "uniquepid", "nobody", "`uniquepid` must be a site and a number (002-12243)"),
        ("patient.csv", 9, "patientunitstayid", "100", "repeats the key (patientunitstayid) of another row"),
        ("diagnosis.csv", 4, "icd9code", None, "`icd9code` is missing"),
        ("diagnosis.csv", 5, "icd9code", "41X", "no ICD9CM or ICD10CM code"),
        ("diagnosis.csv", 6, "patientunitstayid", "999", orphan),
        ("medication.csv", 3, "drugordercancelled", "Yes", "the order was cancelled"),
        ("medication.csv", 4, "drugname", None, "neither `drughiclseqno` nor `drugname` names a medication"),
        ("medication.csv", 5, "drugstartoffset", None, "`drugstartoffset` is missing"),
        ("lab.csv", 3, "labresult", "74.1", "impossible value: `pH` must be 6 to 8.5"),
        ("lab.csv", 4, "labresult", None, "neither `labresult` nor `labresulttext` is given"),
        ("vitalPeriodic.csv", 2, "temperature", "99.1", "impossible value: `temperature` must be 20 to 45"),
        ("vitalPeriodic.csv", 2, "sao2", "104", "impossible value: `sao2` must be 0 to 100"),
        ("dyn.parquet", 3, "stay_id", "777", orphan),
    ]
    assert sorted((tuple(row.values()) for row in found.to_pylist()), key=str) == sorted(expected, key=str)


def test_stays_of_a_visit_stand_where_their_offsets_say(records):
    first = records[SUBJECT]["visits"][0]
    assert (first["visit_id"], first["start"]) == (10, BIRTHDAY)
    minute = timedelta(minutes=1)
    spans = {s["stay_id"]: (s["start"] - first["start"], s["end"] - first["start"]) for s in first["stays"]}
    # The second has no length: a stay of zero hours is a stay.
    assert spans == {100: (60 * minute, 1500 * minute), 101: (3000 * minute, 3000 * minute)}
    assert first["end"] - first["start"] == 5760 * minute


def test_a_unit_that_admits_before_the_hospital_begins_the_visit(records):
    (visit,) = records[3_000_005]["visits"]
    (stay,) = visit["stays"]
    assert visit["start"] == stay["start"]
    assert visit["discharged_to"] is None  # nothing is known of the end


def test_visits_of_a_patient_are_in_the_order_of_their_years_and_death_is_last(records, source):
    visits = records[SUBJECT]["visits"]
    assert [visit["visit_id"] for visit in visits] == [10, 11, 12]
    assert [visit["discharged_to"] for visit in visits] == ["home", "facility", "died"]
    assert all(later["start"] - visit["start"] >= timedelta(days=366) for visit, later in pairwise(visits))
    assert records[SUBJECT]["death_time"] == visits[-1]["stays"][0]["end"]
    assert source.warnings[0].startswith("1 patients have several hospital visits")
    assert source.time_axis == "visit"


def test_demographics_of_the_first_visit(records):
    patient, old = records[SUBJECT], records[3_000_005]
    ages = [int((row["visits"][0]["start"] - row["birth_time"]).days / 365.25) for row in (patient, old)]
    assert ages == [61, 90]
    assert (patient["sex"], patient["race"], old["sex"], old["race"]) == ("M", "Caucasian", None, None)


def test_every_code_of_the_field_is_a_diagnosis_in_its_vocabulary(events, records):
    rows = named(events, kind="diagnosis")
    assert {(row["code"], row["position"]) for row in rows} == {
        ("ICD9CM/414.00", 2), ("ICD10CM/I25.10", 2), ("ICD9CM/V62.84", 3), ("ICD9CM/E980.2", 1), ("ICD10CM/T40.1X4A", 1),
    }  # fmt: skip
    start = records[SUBJECT]["visits"][0]["stays"][0]["start"]
    (row,) = named(rows, code="ICD10CM/I25.10")
    assert row["time"] == row["available_at"] == start + timedelta(minutes=90)


def test_one_vocabulary_of_diagnoses_can_be_kept(engine, tmp_path):
    source = eicu(
        engine, write_tables(tmp_path, {"patient": PATIENT, "diagnosis": TABLES["diagnosis"]}), icd="ICD10CM"
    )
    (extract,) = (extract for extract in source.extracts if extract.name == "diagnosis")
    assert set(extract.events.to_pyarrow()["code"].to_pylist()) == {"ICD10CM/I25.10", "ICD10CM/T40.1X4A"}
    with pytest.raises(ValueError, match="`icd` must be one of ICD9CM, ICD10CM, got 'ICD9'"):
        eicu(engine, tmp_path, icd="ICD9")


def test_drugs_are_numbers_or_names_known_from_order_and_start_on(events, records):
    visit = records[SUBJECT]["visits"][0]
    first, second = (stay["start"] for stay in visit["stays"])
    rows = {row["code"]: row for row in named(events, kind="medication")}
    assert set(rows) == {"EICU_HICL/33598", "DRUG/HEPARIN_5000_UNIT", "EICU_HICL/20769"}
    minute = timedelta(minutes=1)
    times = {code: (row["time"], row["available_at"]) for code, row in rows.items()}
    assert times["EICU_HICL/33598"] == (first + 6 * minute, first + 55 * minute)  # ordered after its start
    assert times["DRUG/HEPARIN_5000_UNIT"] == (first + 20 * minute, first + 20 * minute)
    assert times["EICU_HICL/20769"] == (second - 20 * minute, second + 44 * minute)


def test_treatments_and_picked_notes(events):
    (treatment,) = named(events, kind="procedure")
    assert treatment["code"] == "EICU_TREATMENT/cardiovascular|arrhythmias|enoxaparin_now"
    notes = {(row["code"], row["text_value"]) for row in named(events, kind="note")}
    assert notes == {
        ("Note/Comprehensive_Progress", "System View"), ("Note/Admission", "HR Highest: 120"),
        ("Note/Past_History", "No Health Problems"),
    }  # fmt: skip


def test_measurements_of_the_public_schema_are_hours_of_their_stay(records):
    stays = {stay["stay_id"]: stay for visit in records[SUBJECT]["visits"] for stay in visit["stays"]}
    found = {(row["name"], round(60 * row["hour"])): row["value"] for row in stays[100]["measurements"]}
    assert found == {
        ("EICU/admissionheight", 0): pytest.approx(177.8), ("EICU/admissionweight", 0): pytest.approx(91.7),
        ("EICU/total_bilirubin", 90): pytest.approx(1.2), ("EICU/urinary_culture", 90): None,
        ("EICU/sao2", 5): 97.0, ("EICU/heartrate", 5): 80.0, ("EICU/respiration", 5): 18.0, ("EICU/cvp", 5): -2.0,
        ("EICU/systemicsystolic", 5): 120.0, ("EICU/systemicdiastolic", 5): 60.0, ("EICU/systemicmean", 5): 80.0,
        ("EICU/st1", 5): -0.5, ("YAIB/hr", 60): 81.5, ("YAIB/crea", 0): 1.5,
    }  # fmt: skip
    assert [row["text"] for row in stays[100]["measurements"] if row["text"]] == ["NEG"]
    pressures = {row["name"]: row["value"] for row in stays[101]["measurements"] if round(60 * row["hour"]) == 60}
    assert pressures == {
        "EICU/noninvasivesystolic": 115.0, "EICU/noninvasivediastolic": 63.0, "EICU/noninvasivemean": 83.0,
    }  # fmt: skip


def test_a_lab_is_known_from_its_revision_on(events):
    (row,) = named(events, code="EICU/total_bilirubin")
    assert row["available_at"] - row["time"] == timedelta(minutes=10)


def test_missing_tables_are_warnings_and_a_missing_grid_an_error(engine, tmp_path):
    folder = write_tables(tmp_path, {"patient": PATIENT})
    warnings = eicu(engine, folder).warnings
    assert "lab is not there: no laboratory measurements." in warnings
    with pytest.raises(EhrDataError, match=r"`yaib` must be a folder with dyn\.parquet"):
        eicu(engine, folder, yaib="nowhere")


def test_a_grid_without_durations_is_refused(engine, tmp_path):
    folder = write_tables(tmp_path, {"patient": PATIENT})
    pq.write_table(pa.table({"stay_id": [100], "time": [3], "hr": [80.0]}), folder / "dyn.parquet")
    with pytest.raises(EhrDataError, match=r"column `time` must be a duration .* got int64"):
        eicu(engine, folder, yaib=".")


@pytest.mark.slow
def test_the_demo_has_its_stays_deaths_and_grid(engine, real_data):
    source = eicu(engine, real_data("eicu_demo"), yaib="yaib_hourly/los")
    by_name = {extract.name: validate_events(extract.events.to_pyarrow()) for extract in source.extracts}
    rows = by_name["patient"].to_pylist()
    assert len({row["stay_id"] for row in rows} - {None}) == 2012
    died = {row["visit_id"] for row in rows if row["code"] == "Discharge/died"}
    stays_of_dead = {row["stay_id"] for row in rows if row["visit_id"] in died and row["stay_id"] is not None}
    # 166 of hospital stays that ended in death; 5 of four more, with a death in the unit and a discharge alive beside it.
    assert len(stays_of_dead) == 166 + 5
    stay_ids = set(by_name["yaib"]["stay_id"].to_pylist())
    assert stay_ids <= {row["stay_id"] for row in rows}
    assert len(stay_ids) > 1_700
