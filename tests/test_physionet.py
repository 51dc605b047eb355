"""The stays of the PhysioNet challenges of 2012 and 2019 → EVENTS: made records, bad rows, real counts."""

from __future__ import annotations

import tarfile
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ehr.prepare import prepare
from hf_ehr.records import assemble
from hf_ehr.schema import EhrDataError, validate_events
from hf_ehr.sources._measurements import measurement_events
from hf_ehr.sources.engine import Engine, Source
from hf_ehr.sources.physionet2012 import physionet2012
from hf_ehr.sources.physionet2019 import LABS, VITALS, physionet2019

START = datetime(2000, 1, 1)

RECORD_1 = """Time,Parameter,Value
00:00,RecordID,1
00:00,Age,54
00:00,Gender,0
00:00,Height,-1
00:00,ICUType,4
00:00,Weight,80.5
00:07,HR,73
00:07,Temp,35.1
01:30,pH,735
02:00,HR,NaN
02:00,HR,inf
02:00,Kryptonite,3
47:59,Urine,900
48:00,MechVent,1
x,HR,80
"""
RECORD_2 = """Time,Parameter,Value
00:00,RecordID,2
00:00,Age,-1
00:00,Gender,2
00:00,ICUType,5
-1:00,HR,80
03:00,,80
04:00,HR,
05:00,HR
06:00,HR,90
"""
RECORD_3 = "Time,Parameter,Value\n"
RECORD_4 = "Time,Parameter,Value\n00:00,RecordID,9\n"
OUTCOMES = """RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death
1,6,1,5,3,1
2,-1,-1,-1,-1,0
2,7,7,7,-1,1
3,9,2,4,2,0
8,1,1,9,-1,0
4,3,3,4,-1,7
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.connect(threads=2)


def write_records(folder: Path, records: dict[int | str, str], name: str = "set-a") -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for record, text in records.items():
        (folder / name / f"{record}.{'psv' if 'HR|' in text else 'txt'}").write_text(text)
    return folder


def events_of(source: Source) -> pa.Table:
    return validate_events(pa.concat_tables([extract.events.to_pyarrow() for extract in source.extracts]))


def rejected_of(source: Source) -> list[tuple]:
    found = ibis.union(*[table for extract in source.extracts for table in extract.rejected]).to_pyarrow()
    return sorted((tuple(row.values()) for row in found.to_pylist()), key=str)


def named(events: pa.Table, **fields) -> list[dict]:
    return [row for row in events.to_pylist() if all(row[name] == value for name, value in fields.items())]


# 2012


def write_sets_of_2012(folder: Path) -> Path:
    """Sets A and B with one of everything that can go wrong."""
    write_records(folder, {1: RECORD_1, 2: RECORD_2, 3: RECORD_3, 4: RECORD_4, "README": "read me"})
    (folder / "Outcomes-a.txt").write_text(OUTCOMES)
    return write_records(
        folder, {7: RECORD_1.replace("RecordID,1", "RecordID,7"), 2: RECORD_3 + "00:00,HR,1\n"}, "set-b"
    )


@pytest.fixture(scope="module")
def source_2012(engine, tmp_path_factory) -> Source:
    return physionet2012(engine, write_sets_of_2012(tmp_path_factory.mktemp("2012")))


@pytest.fixture(scope="module")
def events_2012(source_2012) -> pa.Table:
    return events_of(source_2012)


def test_every_bad_line_is_rejected_with_its_file_line_and_reason(source_2012):
    clock = "`Time` must be HH:MM since the start of the stay"
    of_record_1 = [
        (4, "-1", "missing: -1"),
        (9, "735", "impossible value: `pH` must be 6 to 8.5"),
        (10, "NaN", "the value is no readable number"),
        (11, "inf", "the value is no readable number"),
    ]
    expected = [(f"set-{a}/{b}.txt", row, "Value", *rest) for a, b in ("a1", "b7") for row, *rest in of_record_1]
    expected += [(f"set-{a}/{b}.txt", 15, "Time", "x", clock) for a, b in ("a1", "b7")]
    expected += [
        ("set-a/2.txt", 2, "Value", "-1", "missing: -1"),
        ("set-a/2.txt", 3, "Value", "2", "impossible value: `Gender` must be 0 to 1"),
        ("set-a/2.txt", 4, "Value", "5", "impossible value: `ICUType` must be 1 to 4"),
        ("set-a/2.txt", 5, "Time", "-1:00", clock),
        ("set-a/2.txt", 6, "Parameter", None, "`Parameter` is missing"),
        ("set-a/2.txt", 7, "Value", None, "`Value` is missing"),
        ("set-a/2.txt", 8, "Value", None, "the line must have 3 fields"),
        ("set-b/2.txt", 1, "RecordID", "set-b/2.txt", "repeats the record of another file"),
        ("set-a/4.txt", 1, "Value", "9", "`RecordID` is not that of the file's name"),
        ("Outcomes-a.txt", 3, "RecordID", "2", "repeats the key (RecordID) of another row"),
        ("Outcomes-a.txt", 4, "Survival", "2",
         "`Survival` is within the stay that the patient survived: no death is made of it"),
        ("Outcomes-a.txt", 5, "RecordID", "8", "names a record that is not there"),
        ("Outcomes-a.txt", 6, "In-hospital_death", "7", "`In-hospital_death` must be 0 or 1"),
    ]  # fmt: skip
    assert rejected_of(source_2012) == sorted(expected, key=str)


def test_a_record_is_one_patient_with_one_visit_and_one_stay(events_2012):
    records = assemble(events_2012).to_pylist()
    assert [row["subject_id"] for row in records] == [1, 2, 3, 4, 7]
    for row in records:
        (visit,) = row["visits"]
        (stay,) = visit["stays"]
        assert (visit["visit_id"], stay["stay_id"], visit["kind"]) == (*(row["subject_id"],) * 2, "inpatient")
        assert visit["start"] == stay["start"] == START
        assert stay["end"] - stay["start"] > timedelta(hours=48)
    of_set = {row["visit_id"]: row["text_value"] for row in named(events_2012, code="Visit/inpatient")}
    assert of_set == {1: "set-a", 2: "set-a", 3: "set-a", 4: "set-a", 7: "set-b"}


def test_measurements_stand_at_their_minute_and_descriptors_at_hour_0(events_2012):
    stay = assemble(events_2012).to_pylist()[0]["visits"][0]["stays"][0]
    found = {(row["name"].split("/")[1], round(row["hour"] * 60)): row["value"] for row in stay["measurements"]}
    assert found == {
        ("Weight", 0): 80.5, ("ICUType", 0): None, ("HR", 7): 73.0, ("Temp", 7): pytest.approx(35.1),
        ("Kryptonite", 120): 3.0, ("Urine", 2879): 900.0, ("MechVent", 2880): 1.0,
    }  # fmt: skip
    assert [row["text"] for row in stay["measurements"] if row["text"]] == ["Surgical ICU"]


def test_unknown_variables_are_kept_and_counted(source_2012):
    assert "2 values of the unknown variable Kryptonite are kept." in source_2012.warnings


def test_age_and_sex_of_a_record_and_of_one_without(events_2012):
    first, second = assemble(events_2012).to_pylist()[:2]
    age = (START - first["birth_time"]).days / 365.25
    assert (int(age), first["sex"]) == (54, "F")
    assert (second["birth_time"], second["sex"]) == (None, None)


def test_outcomes_end_visit_and_life_on_their_day(events_2012, source_2012):
    day = timedelta(days=1)
    last = day - timedelta(seconds=1)
    ends = {
        row["visit_id"]: (row["code"], row["time"] - START)
        for row in named(events_2012, kind="discharge", stay_id=None)
    }
    assert ends == {
        1: ("Discharge/died", 5 * day + last),
        2: ("Discharge/unknown", 2 * day + last),  # Length_of_stay unknown: the two days that every stay lasted
        3: ("Discharge/unknown", 4 * day + last),
    }  # fmt: skip
    deaths = {row["subject_id"]: row["time"] - START for row in named(events_2012, kind="death")}
    assert deaths == {1: 3 * day + last}
    assert "Length_of_stay is unknown of 1 records: two days, the least." in source_2012.warnings


def test_who_died_in_hospital_lived_for_the_two_days_that_every_record_lasts(engine, tmp_path):
    folder = write_records(tmp_path, {number: RECORD_4.replace("9", str(number)) for number in (1, 2, 3)})
    # Died on day 1, survived a stay of unknown length and died on day 1, died without a day.
    outcomes = ["1,6,1,5,1,1", "2,6,1,-1,1,0", "3,6,1,1,-1,1"]
    (folder / "Outcomes-a.txt").write_text("\n".join([OUTCOMES.partition("\n")[0], *outcomes, ""]))
    source = physionet2012(engine, folder)
    deaths = {row["subject_id"]: row["time"] - START for row in named(events_of(source), kind="death")}
    assert deaths == {1: timedelta(days=3, seconds=-1), 3: timedelta(days=3, seconds=-1)}
    assert [row[:4] for row in rejected_of(source)] == [("Outcomes-a.txt", 2, "Survival", "1")]


def test_scores_are_facts_of_the_discharge_that_no_stay_holds(events_2012):
    scores = [row for row in events_2012.to_pylist() if row["code"] in ("CINC2012/SAPS-I", "CINC2012/SOFA")]
    assert {(row["subject_id"], row["numeric_value"]) for row in scores} == {(1, 6.0), (1, 1.0), (3, 9.0), (3, 2.0)}
    ends = {row["visit_id"]: row["time"] for row in named(events_2012, kind="discharge", stay_id=None)}
    assert all(row["time"] == row["available_at"] == ends[row["visit_id"]] for row in scores)
    held = {
        m["name"]
        for row in assemble(events_2012).to_pylist()
        for v in row["visits"]
        for s in v["stays"]
        for m in s["measurements"]
    }
    assert not {name for name in held if "SAPS" in name or "SOFA" in name or "Length" in name}


def test_an_archive_gives_what_its_folder_gives(engine, events_2012, tmp_path):
    folder = write_records(tmp_path / "plain", {1: RECORD_1, 5: RECORD_2.replace("RecordID,2", "RecordID,5")})
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "set-a.tar.xz", "w:xz") as archive:
        archive.add(folder / "set-a", "set-a")
    plain, unpacked = (physionet2012(engine, path) for path in (folder, packed))
    assert sorted(map(str, events_of(unpacked).to_pylist())) == sorted(map(str, events_of(plain).to_pylist()))
    assert rejected_of(unpacked) == rejected_of(plain)
    assert plain.warnings[0] == "Outcomes are not there: no discharge, death or score."


def test_a_part_is_read_alone(engine, tmp_path):
    folder = write_records(tmp_path, {1: RECORD_1})
    write_records(folder, {7: RECORD_1.replace("RecordID,1", "RecordID,7")}, "set-b")
    assert set(events_of(physionet2012(engine, folder, part="b"))["subject_id"].to_pylist()) == {7}
    with pytest.raises(EhrDataError, match="must hold set-c"):
        physionet2012(engine, folder, part="c")
    with pytest.raises(ValueError, match="`part` must be one of a, b, c, got 'd'"):
        physionet2012(engine, folder, part="d")


@pytest.mark.parametrize(("text", "message"), [("", "an empty file"), ("Time,Value\n00:00,3\n", "another first line")])
def test_a_file_without_the_header_of_the_others_is_named(engine, tmp_path, text, message):
    folder = write_records(tmp_path, {1: RECORD_1, 2: text})
    with pytest.raises(EhrDataError, match=f"set-a/2.txt must begin .* got {message}"):
        physionet2012(engine, folder)


def test_damaged_or_missing_input_is_an_error_that_says_so(engine, tmp_path):
    (tmp_path / "set-a.tar.xz").write_bytes(b"no archive")
    with pytest.raises(EhrDataError, match=r"set-a\.tar\.xz cannot be read"):
        physionet2012(engine, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EhrDataError, match="must hold files named like"):
        physionet2012(engine, tmp_path / "empty")


def test_a_prepared_folder_of_records(tmp_path):
    write_records(tmp_path / "raw", {1: RECORD_1, 2: RECORD_2})
    (tmp_path / "raw" / "Outcomes-a.txt").write_text("".join(OUTCOMES.splitlines(keepends=True)[:3]))
    info = prepare(
        "physionet2012", tmp_path / "raw", tmp_path / "out", shards=1, workers=1, progress=False, options={"part": "a"}
    )
    assert (info.summary["patients"], info.summary["visits"], info.time_axis) == (2, 2, "shifted")
    assert info.options == {"part": "a"}
    # Counts of rejected rows name no record.
    assert info.summary["rejected"]["set-a: `Time` must be HH:MM since the start of the stay"] == 2
    assert {key.split(":")[0] for key in info.summary["rejected"]} == {"set-a"}


# 2019

HEADER = "|".join([*VITALS, *LABS, "Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS", "SepsisLabel"])


def psv(*rows: dict) -> str:
    """A record: cells by name, NaN where not given; age and so on are filled in."""
    common = {"Age": "61.5", "Gender": "1", "Unit1": "0", "Unit2": "1", "HospAdmTime": "-2.5", "SepsisLabel": "0"}
    lines = ["|".join((common | row).get(name, "NaN") for name in HEADER.split("|")) for row in rows]
    return "\n".join([HEADER, *lines]) + "\n"


def write_sets_of_2019(folder: Path) -> Path:
    """Sets A and B with one of everything that can go wrong."""
    late = [{"ICULOS": str(k), "SepsisLabel": str(int(k >= 5)), "HR": str(80 + k)} for k in range(1, 9)]
    early = [{"ICULOS": str(k), "SepsisLabel": "1"} for k in (1, 2)]
    unit = {"Unit1": "1", "Unit2": "0", "Gender": "0", "HospAdmTime": "NaN", "Age": "40"}
    bad = [
        unit | {"ICULOS": "1", "HR": "70", "FiO2": "4000"},
        unit | {"ICULOS": "2", "HR": "71", "SepsisLabel": "2"},
        unit | {"ICULOS": "0", "HR": "72"},
        unit | {"ICULOS": "NaN"},
        unit | {"ICULOS": "1", "HR": "74"},
        unit | {"ICULOS": "3", "HR": "inf"},
        unit | {"ICULOS": "4", "HospAdmTime": "5"},
    ]
    write_records(folder, {"p000001": psv(*late), "p000002": psv(*early)}, "training_setA")
    return write_records(folder, {"p100003": psv(*bad), "p100004": psv()}, "training_setB")


@pytest.fixture(scope="module")
def source_2019(engine, tmp_path_factory) -> Source:
    return physionet2019(engine, write_sets_of_2019(tmp_path_factory.mktemp("2019")))


@pytest.fixture(scope="module")
def events_2019(source_2019) -> pa.Table:
    return events_of(source_2019)


def test_sepsis_is_one_event_six_hours_after_the_label_begins(events_2019):
    rows = {row["subject_id"]: row for row in named(events_2019, code="CINC2019/Sepsis")}
    assert set(rows) == {1, 2}
    hour = timedelta(hours=1)
    assert rows[1]["time"] == rows[1]["available_at"] == START + (5 - 1 + 6) * hour
    assert rows[1]["text_value"] is None
    # Labelled from the first row: the onset may have been any time until six hours later.
    assert (rows[2]["time"], rows[2]["available_at"]) == (START, START + 6 * hour)
    assert rows[2]["text_value"] == "onset unknown: labelled from the first row"


def test_the_patients_of_the_hospital_of_mimic_are_counted(engine, source_2019, tmp_path):
    assert source_2019.warnings == [
        "2 patients are of set A, from the hospital of MIMIC: never train on one and test on the other."
    ]
    of_set_b = write_records(tmp_path, {"p100001": psv({"ICULOS": "1", "HR": "80.5"})}, "training_setB")
    assert physionet2019(engine, of_set_b).warnings == []


def test_nothing_before_the_onset_tells_of_the_label(events_2019):
    before = [row for row in named(events_2019, subject_id=1) if row["kind"] == "measurement"]
    assert "SepsisLabel" not in {row["code"].split("/")[1] for row in before}
    (visit,) = assemble(events_2019).to_pylist()[0]["visits"]
    assert visit["diagnoses_at"] == [START + timedelta(hours=10)]


def test_the_row_of_iculos_k_is_hour_k_minus_1(events_2019):
    (visit,) = assemble(events_2019).to_pylist()[0]["visits"]
    (stay,) = visit["stays"]
    rates = [(row["hour"], row["value"]) for row in stay["measurements"] if row["name"] == "CINC2019/HR"]
    assert rates == [(float(k - 1), 80.0 + k) for k in range(1, 9)]
    assert (visit["start"] - stay["start"], stay["end"] - stay["start"]) == (timedelta(hours=-2.5), timedelta(hours=8))
    at_0 = {row["name"]: (row["value"], row["text"]) for row in stay["measurements"] if row["hour"] == 0}
    assert at_0 == {
        "CINC2019/HR": (81.0, None), "CINC2019/Unit": (None, "SICU"), "CINC2019/HospAdmTime": (-2.5, None),
    }  # fmt: skip


def test_demographics_of_2019(events_2019):
    rows = {row["subject_id"]: row for row in assemble(events_2019).to_pylist()}
    ages = {key: (START - row["birth_time"]).days / 365.25 for key, row in rows.items() if row["birth_time"]}
    assert (ages[1], int(ages[100003])) == (pytest.approx(61.5, abs=0.01), 40)
    assert {key: row["sex"] for key, row in rows.items()} == {1: "M", 2: "M", 100003: "F", 100004: None}
    assert rows[100004]["visits"][0]["stays"][0]["measurements"] == []


def test_bad_rows_and_cells_of_2019_are_rejected(source_2019):
    file = "training_setB/p100003.psv"
    found = [(row[0].partition("/")[2], *row[1:]) for row in rejected_of(source_2019)]  # without the input folder
    assert sorted((row for row in found if row[0] == file), key=str) == sorted(
        [
            (file, 1, "FiO2", "4000", "impossible value: `FiO2` must be 0.2 to 1"),
            (file, 2, "SepsisLabel", "2", "`SepsisLabel` must be 0 or 1"),
            (file, 3, "ICULOS", "0", "`ICULOS` must be 1, 2, …"),
            (file, 4, "ICULOS", None, "`ICULOS` must be 1, 2, …"),
            (file, 5, "ICULOS", "1", "repeats the hour of another row"),
            (file, 6, "HR", "inf", "the value is no readable number"),
            (file, 7, "HospAdmTime", "5", "impossible value: `HospAdmTime` must be -100000 to 0"),
        ],
        key=str,
    )


def test_one_table_of_all_patients_gives_what_their_files_give(engine, tmp_path):
    rows = [{"ICULOS": "1", "HR": "80.5"}, {"ICULOS": "2", "SepsisLabel": "1", "pH": "7.25"}]
    files = physionet2019(engine, write_records(tmp_path / "files", {"p000001": psv(*rows)}, "training"))
    lines = [line.split("|") for line in psv(*rows).splitlines()]
    table = pa.table({name: [float(line[i]) for line in lines[1:]] for i, name in enumerate(lines[0])})
    (tmp_path / "one").mkdir()
    pq.write_table(table.append_column("patient", pa.array([1, 1])), tmp_path / "one" / "patients.parquet")
    one = physionet2019(engine, tmp_path / "one")
    assert sorted(map(str, events_of(one).to_pylist())) == sorted(map(str, events_of(files).to_pylist()))


# What a value can be


def test_slips_of_the_unit_or_the_decimal_point_are_reported_and_what_can_be_stays(engine):
    impossible = {
        "Temp": "98.6",  # Fahrenheit
        "temp": "3.66", "pH": "735", "ph": "0.74",
        "FiO2": "40",  # percent, where it is a fraction
        "fio2": "0.4",  # a fraction, where it is percent
        "Height": "1.75",  # metres
        "admissionheight": "1750", "Weight": "0.08", "SaO2": "104", "O2Sat": "-1", "GCS": "2", "HR": "800",
        "Na": "14", "K": "42", "HCT": "0.4",  # a fraction, where it is percent
        "Hgb": "130",  # g/L, where it is g/dL
        "Glucose": "0", "SysABP": "1200", "MechVent": "2", "Urine": "-5", "Creatinine": "-0.1", "PaCO2": "400",
        "PaO2": "0.9", "HospAdmTime": "0.1", "WBC": "1e39", "AST": "-1e999",
    }  # fmt: skip
    possible = {
        "Temp": "45", "temp": "20", "pH": "6", "ph": "8.5", "FiO2": "0.2", "fio2": "100", "Height": "250",
        "admissionheight": "50", "Weight": "1", "SaO2": "100", "O2Sat": "0", "GCS": "3", "HR": "0", "Na": "250",
        "K": "0.5", "HCT": "80", "Hgb": "30", "Glucose": "3000", "SysABP": "350", "MechVent": "1", "Urine": "20000",
        "Creatinine": "0", "PaCO2": "250", "PaO2": "800", "HospAdmTime": "0", "Platelets": "3e38", "BaseExcess": "-12",
        "be": "-12", "cvp": "-3", "st1": "-0.5",
    }  # fmt: skip
    rows = [*impossible.items(), *possible.items()]
    names, texts = zip(*rows, strict=True)
    numbers = pa.array(range(len(rows)), pa.int64())
    table = {"_file": ["made"] * len(rows), "_row": numbers, "subject_id": numbers, "visit_id": numbers}
    table |= {"stay_id": numbers, "_time": [START] * len(rows), "_name": names, "_text": texts}
    events, rejected = (engine.con.to_pyarrow(t) for t in measurement_events(ibis.memtable(pa.table(table)), "X"))
    kept = {row["code"].removeprefix("X/"): row["numeric_value"] for row in events.to_pylist()}
    assert kept == {name: pytest.approx(float(text)) for name, text in possible.items()}
    assert {(row["column"], row["value"]) for row in rejected.to_pylist()} == set(impossible.items())


# Real data


@pytest.mark.slow
def test_the_sets_of_2012_have_the_published_stays_and_deaths(engine, real_data, tmp_path):
    for part, deaths in (("a", 554), ("b", 568)):
        source = physionet2012(engine, real_data("physionet2012"), part=part)
        stays, outcomes = (events_of_extract(source, name) for name in ("records", "outcomes"))
        assert Counter(stays["code"].to_pylist())["Stay/icu"] == 4000
        assert Counter(outcomes["code"].to_pylist())["Discharge/died"] == deaths


@pytest.mark.slow
def test_the_patients_of_2019_with_sepsis_are_counted(engine, real_data):
    source = physionet2019(engine, real_data("physionet2019_setB"))
    assert events_of_extract(source, "sepsis").num_rows == 915
    assert Counter(events_of_extract(source, "stays")["code"].to_pylist())["Visit/inpatient"] == 16_003


def events_of_extract(source: Source, name: str) -> pa.Table:
    (extract,) = (extract for extract in source.extracts if extract.name == name)
    return validate_events(extract.events.to_pyarrow())
