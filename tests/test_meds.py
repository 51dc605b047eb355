"""MEDS of either version becomes events: codes by one table of rules, visits, availability, rejected rows."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hf_ehr.prepare import prepare
from hf_ehr.records import assemble
from hf_ehr.schema import EVENT_SCHEMA, EhrDataError, shard_paths, validate_events
from hf_ehr.sources.engine import Engine, Source
from hf_ehr.sources.meds import map_codes, meds
from hf_ehr.tasks.labels import label_dataset


def at(day: int, hour: int = 0, month: int = 1) -> datetime:
    return datetime(2020, month, day, hour)


BORN = datetime(1950, 5, 6)
ROWS = [  # subject, time, code, number, text, admission
    (1, None, "GENDER//F", None, None, None),
    (1, None, "RACE//BLACK/AFRICAN AMERICAN", None, None, None),
    (1, BORN, "MEDS_BIRTH", None, None, None),
    (1, at(1, 8), "HOSPITAL_ADMISSION//EW EMER.//EMERGENCY ROOM", None, None, 7),
    (1, at(2), "LAB//50912//mg/dL", 1.5, None, 7),
    (1, at(2, 6), "MEDICATION//START//Insulin  human", None, None, 7),
    (1, at(3), "DIAGNOSIS//ICD//9//4280", None, None, 7),
    (1, at(3), "PROCEDURE//ICD//9//3995", None, None, 7),
    (1, at(5, 9), "HOSPITAL_DISCHARGE//HOME", None, None, 7),
    (1, at(10, 8), "ADMISSION", None, None, 8),
    (1, at(11), "DIAGNOSIS//ICD//10//E119", None, None, 8),
    (1, at(12), "DISCHARGE", None, None, 8),
    (1, at(20), "ICD10CM/I10", None, None, None),
    (1, at(1, month=3), "MEDS_DEATH", None, None, None),
    (2, at(4), "LOINC/4548-4", 7.0, "high", None),
]
SEVEN, EIGHT = at(5, 9), at(12)  # discharges
# subject, time, code, number, text, visit, kind, available
EXPECTED = [
    (1, None, "Sex/F", None, None, None, "static", None),
    (1, None, "Race/BLACK:AFRICAN_AMERICAN", None, None, None, "static", None),
    (1, BORN, "MEDS_BIRTH", None, None, None, "birth", BORN),
    (1, at(1, 8), "Visit/inpatient", 0.0, "EW EMER.//EMERGENCY ROOM", 7, "admission", at(1, 8)),
    (1, at(2), "LAB/50912:mg:dL", 1.5, None, 7, "measurement", at(2)),
    (1, at(2, 6), "DRUG/INSULIN_HUMAN", None, None, 7, "medication", at(2, 6)),
    (1, at(3), "ICD9CM/428.0", None, None, 7, "diagnosis", SEVEN),
    (1, at(3), "ICD9Proc/39.95", None, None, 7, "procedure", SEVEN),
    (1, SEVEN, "Discharge/home", None, "HOME", 7, "discharge", SEVEN),
    (1, at(10, 8), "Visit/inpatient", None, None, 8, "admission", at(10, 8)),
    (1, at(11), "ICD10CM/E11.9", None, None, 8, "diagnosis", EIGHT),
    (1, EIGHT, "Discharge/unknown", None, None, 8, "discharge", EIGHT),
    (1, at(20), "ICD10CM/I10", None, None, None, "diagnosis", at(20)),
    (1, at(1, month=3), "MEDS_DEATH", None, None, None, "death", at(1, month=3)),
    (2, at(4), "LOINC/4548-4", 7.0, "high", None, "measurement", at(4)),
]
NO_VISITS = ("subject_id", "time", "code", "numeric_value", "text_value", None)
NAMES = ("subject_id", "time", "code", "numeric_value", "text_value", "visit_id", "kind", "available_at")


def write_meds(folder, rows, *, names=("subject_id", "time", "code", "numeric_value", "text_value", "hadm_id")):
    """Writes rows as ``data/train/0.parquet`` next to a ``metadata`` folder; a column named None is left out."""
    types = [pa.int64(), pa.timestamp("us"), pa.string(), pa.float32(), pa.string(), pa.int64()]
    columns = {
        name: pa.array([row[place] for row in rows], dtype)
        for place, (name, dtype) in enumerate(zip(names, types, strict=True))
        if name
    }
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "metadata").mkdir()
    pq.write_table(pa.table(columns), folder / "data" / "train" / "0.parquet")
    pq.write_table(pa.table({"code": ["x"], "description": ["y"]}), folder / "metadata" / "codes.parquet")
    return folder


def rows_without_visits(*rows):
    return [(subject, time, code, None, None, None) for subject, time, code in rows]


def read(folder, engine="duckdb", **options) -> Source:
    return meds(Engine.connect(engine), folder, **options)


def events_of(source: Source) -> list[tuple]:
    table = validate_events(source.extracts[0].events.to_pyarrow())
    return [tuple(row[name] for name in NAMES) for row in table.to_pylist()]


def visits_of(source: Source) -> dict[tuple, int | None]:
    """(subject, time, code) → visit."""
    return {row[:3]: row[5] for row in events_of(source)}


def reasons_of(source: Source) -> Counter:
    rejected = [row for table in source.extracts[0].rejected for row in table.to_pyarrow().to_pylist()]
    return Counter((row["column"], row["value"], row["reason"]) for row in rejected)


def as_set(rows):
    assert len(set(rows)) == len(rows)
    return set(rows)


def test_meds_becomes_the_hand_written_events(tmp_path):
    source = read(write_meds(tmp_path, ROWS))
    assert as_set(events_of(source)) == as_set(EXPECTED)
    assert not reasons_of(source)
    assert source.warnings == []


@pytest.mark.slow
def test_spark_gives_the_same_events(tmp_path):
    pytest.importorskip("pyspark")
    assert as_set(events_of(read(write_meds(tmp_path / "a", ROWS), "spark"))) == as_set(EXPECTED)
    bare = [(*row[:5], None) for row in ROWS]
    folder = write_meds(tmp_path / "b", bare, names=NO_VISITS)
    assert as_set(events_of(read(folder, "spark"))) == as_set(events_of(read(folder)))


def test_older_names_of_columns_and_a_missing_text_value_are_understood(tmp_path):
    names = ("patient_id", "timestamp", "code", "numeric_value", None, "hadm_id")
    source = read(write_meds(tmp_path, ROWS, names=names))
    expected = [row if row[0] == 1 else (*row[:4], None, *row[5:]) for row in EXPECTED]
    assert as_set(events_of(source)) == as_set(expected)


def test_files_directly_in_the_folder_are_read_and_metadata_is_not(tmp_path):
    folder = write_meds(tmp_path, ROWS)
    (folder / "data" / "train").rename(folder / "train")
    (folder / "data").rmdir()
    assert as_set(events_of(read(folder))) == as_set(EXPECTED)
    assert as_set(events_of(read(folder / "train" / "0.parquet"))) == as_set(EXPECTED)


def test_records_have_the_visits_and_a_day_for_codes_without_one(tmp_path):
    events = read(write_meds(tmp_path, ROWS)).extracts[0].events.to_pyarrow()
    (first,) = assemble(events.cast(EVENT_SCHEMA)).to_pylist()
    assert (first["sex"], first["race"]) == ("F", "BLACK:AFRICAN_AMERICAN")
    assert (first["birth_time"], first["death_time"]) == (BORN, at(1, month=3))
    assert [(row["start"], row["end"], row["diagnoses"], row["diagnoses_at"]) for row in first["visits"]] == [
        (at(1, 8), SEVEN, ["ICD9CM/428.0"], [SEVEN]),
        (at(10, 8), EIGHT, ["ICD10CM/E11.9"], [EIGHT]),
        (at(20), at(20), ["ICD10CM/I10"], [at(20)]),
    ]
    assert [row["discharged_to"] for row in first["visits"]] == ["home", "unknown", None]
    assert [row["planned"] for row in first["visits"]] == [False, None, None]


def test_billing_codes_wait_for_the_lag(tmp_path):
    available = {row[2]: row[7] for row in events_of(read(write_meds(tmp_path, ROWS), billing_lag_days=1.5))}
    assert available["ICD9CM/428.0"] == available["ICD9Proc/39.95"] == at(6, 21)
    assert available["ICD10CM/I10"] == at(20)
    assert available["DRUG/INSULIN_HUMAN"] == at(2, 6)


def test_a_billing_code_of_a_visit_without_discharge_waits_for_its_last_event(tmp_path):
    rows = [
        (1, at(1), "ADMISSION", None, None, 5),
        (1, at(2), "ICD10CM/I10", None, None, 5),
        (1, at(4), "LAB//1", None, None, 5),
        (1, at(5), "LAB//1", None, None, 6),
    ]
    assert {row[2]: row[7] for row in events_of(read(write_meds(tmp_path, rows)))}["ICD10CM/I10"] == at(4)


def test_each_spelling_of_a_code_has_one_kind_and_one_code():
    expected = {
        "ICD10CM//E119": ("diagnosis", "ICD10CM/E11.9"),
        "ICD10CM/E11.9": ("diagnosis", "ICD10CM/E11.9"),
        "icd10cm/e11.9": ("diagnosis", "ICD10CM/E11.9"),
        "DIAGNOSIS//ICD//9//E8500": ("diagnosis", "ICD9CM/E850.0"),
        "PROCEDURE//ICD//10//0016070": ("procedure", "ICD10PCS/0016070"),
        "ICD9Proc/39.95": ("procedure", "ICD9Proc/39.95"),
        "SNOMED/44054006": ("diagnosis", "SNOMED/44054006"),
        "RxNorm/860975": ("medication", "RxNorm/860975"),
        "NDC/00002821501": ("medication", "NDC/00002821501"),
        "MEDICATION//NDC//00002821501": ("medication", "NDC/00002821501"),
        "ATC/A10BA02": ("medication", "ATC/A10BA02"),
        "MEDICATION//STOP//Insulin": ("measurement", "MEDS/MEDICATION:STOP:Insulin"),
        "LOINC/4548-4": ("measurement", "LOINC/4548-4"),
        "ED_REGISTRATION": ("measurement", "MEDS/ED_REGISTRATION"),
        "ICU_ADMISSION//MICU": ("admission", "Stay/icu"),
        "ICU_DISCHARGE//MICU": ("discharge", "Stay/icu"),
        "HOSPITAL_ADMISSION//EU OBSERVATION//ER": ("admission", "Visit/emergency"),
        "HOSPITAL_DISCHARGE//DIED": ("discharge", "Discharge/died"),
        "Visit/outpatient": ("admission", "Visit/outpatient"),
        "Discharge/facility": ("discharge", "Discharge/facility"),
        "Sex/Female": ("static", "Sex/F"),
        "MARITAL_STATUS//MARRIED": ("static", "MaritalStatus/MARRIED"),
        "MEDS_DEATH//HOSPITAL": ("death", "MEDS_DEATH"),
    }
    table = map_codes(expected)
    found = {row["_raw"]: (row["_kind"], row["_code"]) for row in table.to_pylist()}
    assert found == expected
    assert table["_known"].null_count == 0


def test_unknown_codes_become_measurements_and_are_counted(tmp_path):
    rows = rows_without_visits(
        (1, at(1), "DRG//APR//197 x/y"),
        (1, at(2), "DRG//APR//197 x/y"),
        (1, at(3), "DIAGNOSIS//ICD//9//NOCODE"),
        (1, None, "EYE COLOR//BLUE"),
    )
    source = read(write_meds(tmp_path, rows))
    assert Counter((row[6], row[2]) for row in events_of(source)) == {
        ("measurement", "MEDS/DRG:APR:197_x:y"): 2,
        ("measurement", "MEDS/DIAGNOSIS:ICD:9:NOCODE"): 1,
        ("static", "MEDS/EYE_COLOR:BLUE"): 1,
    }
    assert any(warning.startswith("3 distinct codes") for warning in source.warnings)


def test_visits_are_made_from_admissions_and_discharges(tmp_path):
    rows = rows_without_visits(
        (3, None, "GENDER//M"),
        (3, at(1), "LAB//before"),
        (3, at(2), "ADMISSION"),
        (3, at(2), "LAB//first"),
        (3, at(3), "LAB//within"),
        (3, at(4), "LAB//last"),
        (3, at(4), "DISCHARGE"),
        (3, at(5), "LAB//between"),
        (3, at(5, 1), "DISCHARGE"),
        (3, at(6), "ADMISSION"),
        (3, at(7), "DISCHARGE"),
        (3, at(7), "LAB//moved"),
        (3, at(7), "ADMISSION"),
        (3, at(8), "MEDS_DEATH"),
        (3, at(9), "DISCHARGE"),
        (3, at(10), "ADMISSION"),
        (3, at(10), "DISCHARGE"),
        (3, at(12), "ADMISSION"),
        (3, at(13), "LAB//open"),
        (4, at(3), "LAB//other"),
        (4, at(4), "ADMISSION"),
    )
    source = read(write_meds(tmp_path, rows, names=NO_VISITS))
    visits = visits_of(source)
    expected = {
        (3, None, "Sex/M"): None,
        (3, at(1), "LAB/before"): None,
        (3, at(2), "Visit/inpatient"): 300001,
        (3, at(2), "LAB/first"): 300001,
        (3, at(3), "LAB/within"): 300001,
        (3, at(4), "LAB/last"): 300001,
        (3, at(4), "Discharge/unknown"): 300001,
        (3, at(5), "LAB/between"): None,
        (3, at(6), "Visit/inpatient"): 300002,
        (3, at(7), "Discharge/unknown"): 300002,
        (3, at(7), "LAB/moved"): 300003,
        (3, at(7), "Visit/inpatient"): 300003,
        (3, at(8), "MEDS_DEATH"): None,
        (3, at(9), "Discharge/unknown"): 300003,
        (3, at(10), "Visit/inpatient"): 300004,
        (3, at(10), "Discharge/unknown"): 300004,
        (3, at(5, 1), "Discharge/unknown"): None,
        (3, at(12), "Visit/inpatient"): 300005,
        (3, at(13), "LAB/open"): None,
        (4, at(3), "LAB/other"): None,
        (4, at(4), "Visit/inpatient"): 400001,
    }
    assert visits == expected
    assert "visits were made" in " ".join(source.warnings)


def test_one_admission_in_two_spellings_is_one_visit_and_large_ids_do_not_overflow(tmp_path):
    subject = 2**62
    rows = rows_without_visits(
        (subject, at(1), "ADMISSION"),
        (subject, at(1), "HOSPITAL_ADMISSION//URGENT"),
        (subject, at(2), "DISCHARGE"),
        (subject, at(3), "ADMISSION"),
    )
    source = read(write_meds(tmp_path, rows, names=NO_VISITS))
    visits = Counter(row[5] for row in events_of(source))
    assert sorted(visits.values()) == [1, 3]
    assert {visit % 100_000 for visit in visits} == {1, 2}


def test_an_icu_stay_without_id_does_not_bound_a_visit(tmp_path):
    rows = [
        (1, at(1), "ADMISSION", None, None, 5),
        (1, at(2), "ICU_ADMISSION//MICU", None, None, 5),
        (1, at(9), "DISCHARGE", None, None, 5),
    ]
    folder = write_meds(tmp_path, rows)
    assert [row[6] for row in events_of(read(folder)) if row[2] == "Stay/icu"] == ["measurement"]
    path = folder / "data" / "train" / "0.parquet"
    pq.write_table(pq.read_table(path).append_column("icustay_id", pa.array([None, 44, None], pa.int64())), path)
    table = read(folder).extracts[0].events.to_pyarrow()
    stay = table.filter(pc.equal(table["code"], "Stay/icu")).to_pylist()
    assert [(row["kind"], row["stay_id"], row["text_value"]) for row in stay] == [("admission", 44, "MICU")]


def test_rows_that_cannot_be_events_are_rejected_with_the_rule(tmp_path):
    rows = [
        *ROWS,
        (None, at(1), "LAB//1", None, None, None),
        (1, None, "LAB//2", None, None, None),
        (1, None, "MEDS_BIRTH", None, None, None),
        (1, at(1), "  ", None, None, None),
        (1, at(1), None, None, None, None),
    ]
    source = read(write_meds(tmp_path, rows))
    assert as_set(events_of(source)) == as_set(EXPECTED)
    timeless = "`time` is missing, and the code is not static"
    assert reasons_of(source) == {
        ("subject_id", None, "`subject_id` is missing"): 1,
        ("code", "LAB/2", timeless): 1,
        ("code", "MEDS_BIRTH", timeless): 1,
        ("code", None, "`code` is missing"): 2,
    }


def test_a_kind_that_is_none_of_ours_is_rejected(tmp_path):
    folder = write_meds(tmp_path, ROWS[-1:])
    path = folder / "data" / "train" / "0.parquet"
    pq.write_table(pq.read_table(path).append_column("kind", pa.array(["lab"])), path)
    ((column, value, reason),) = reasons_of(read(folder))
    assert (column, value) == ("kind", "lab")
    assert reason.startswith("`kind` must be one of")


@pytest.mark.parametrize(("place", "name"), [(0, "subject_id"), (1, "time"), (2, "code")])
def test_a_missing_column_is_named_with_those_found(tmp_path, place, name):
    names = ["subject_id", "time", "code", "numeric_value", "text_value", "hadm_id"]
    names[place] = "other"
    with pytest.raises(EhrDataError, match=rf"`{name}`.*Columns found: .*other"):
        read(write_meds(tmp_path, ROWS, names=names))


def test_a_folder_without_events_is_an_error(tmp_path):
    with pytest.raises(EhrDataError, match="must hold Parquet files"):
        read(tmp_path)
    write_meds(tmp_path, [])
    with pytest.raises(EhrDataError, match="no rows"):
        read(tmp_path)
    (tmp_path / "data" / "train" / "0.parquet").unlink()
    with pytest.raises(EhrDataError, match="must hold Parquet files"):
        read(tmp_path)


def whole(folder, part: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in shard_paths(folder, part))


def test_our_own_events_come_back_unchanged(tmp_path):
    options = {"patients": 60, "seed": 3}
    prepare("synthetic", None, tmp_path / "one", options=options, shards=2, workers=1, progress=False)
    info = prepare("meds", tmp_path / "one", tmp_path / "two", shards=2, workers=1, progress=False)
    assert info.warnings == []
    assert info.summary["rejected"] == {}
    assert whole(tmp_path / "two", "events").equals(whole(tmp_path / "one", "events"))
    assert whole(tmp_path / "two", "records").equals(whole(tmp_path / "one", "records"))


def test_readmission_is_labelled_on_a_converted_folder(tmp_path):
    rows = [row for row in ROWS if row[2] != "MEDS_DEATH"]
    rows += [(1, at(1, month=12), "LAB//1", None, None, None), (1, at(2, month=12), "ICD10CM/I10", None, None, None)]
    prepare("meds", write_meds(tmp_path / "raw", rows), tmp_path / "out", shards=1, workers=1, progress=False)
    labels = pq.read_table(label_dataset("readmission_30d", tmp_path / "out", progress=False)).to_pylist()
    assert [(row["subject_id"], row["boolean_value"]) for row in labels] == [(1, True), (1, False)]
    assert [row["prediction_time"].date() for row in labels] == [SEVEN.date(), EIGHT.date()]
