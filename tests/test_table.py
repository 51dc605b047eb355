"""The source ``table``: the shipped maps, the forms of codes, ids, ages, rejected rows and broken maps."""

from datetime import datetime, timedelta

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hf_ehr.prepare import prepare
from hf_ehr.schema import DatasetInfo, EhrDataError, shard_paths

# A golden file in the format of Med-BERT's preprocessing.
MEDBERT = """\
patient_id\tvadate\tvddate\tdiag\tpoa\tdiagnosis_priority\tthird_party_ind
7\t2015-03-01\t2015-03-09\tICD10_E119\t1\t2\t0
7\t2015-03-02\t2015-03-09\tICD10_I10\t1\t1\t1
7\t2015-03-02\t2015-03-09\tICD9_4280\t1\t10\t0
7\t2015-03-02\t2015-03-09\tICD10_N17.9\t0\t1\t0
7\t2015-03-02\t2015-03-09\tICD10_E11.9\t0\t3\t1
7\t2014-01-01\t2014-01-08\tICD9_150.6\tN\t1\t0
7\t2014-01-01\t2014-01-08\tICD10_C50\tY\t9\t0
7\t2016-05-05\t2016-05-01\tICD10_C50\t1\t1\t0
3\t2016-05-05\t2016-05-05\tICD8_123\t1\t1\t0
3\t2016-05-05\t2016-05-05\tICD10_J18.9\t1\t2\t0
3\t\t2016-06-05\tICD10_J18.9\t1\t2\t0
3\t2016-02-30\t2016-06-05\tICD10_J18.9\t1\t2\t0
"""


def _day(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _prepare(tmp_path, files: dict[str, str], columns) -> DatasetInfo:
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    options = {"columns": columns}
    return prepare("table", folder, tmp_path / "out", workers=1, shards=1, progress=False, options=options)


def _records(tmp_path) -> dict[int, dict]:
    rows = [row for path in shard_paths(tmp_path / "out", "records") for row in pq.read_table(path).to_pylist()]
    return {row["subject_id"]: row for row in rows}


def _rejected(tmp_path) -> set[tuple]:
    rows = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    return {(row["file"], row["row"], row["column"], row["value"], row["reason"]) for row in rows}


def _map(**changes) -> dict:
    """The map of a wide file ``visits.csv`` with dates."""
    entry = {"path": "visits.csv", "subject": "person", "visit": "encounter", "start": "begin", "end": "finish"}
    return {"files": [entry | changes]}


def test_the_medbert_table_becomes_the_records_written_by_hand(tmp_path):
    info = _prepare(tmp_path, {"data_file.tsv": MEDBERT}, "medbert")
    records = _records(tmp_path)
    assert info.time_axis == "calendar"
    assert sorted(records) == [3, 7]
    first, second = records[7]["visits"]
    assert (first["start"], first["end"]) == (_day("2014-01-01"), _day("2014-01-08"))
    assert first["diagnoses"] == ["ICD10CM/C50", "ICD9CM/150.6"]  # present on admission first, then the priority
    assert (second["start"], second["end"]) == (_day("2015-03-01"), _day("2015-03-09"))  # the earliest admission
    # Present on admission: priorities 2 and 10 before the billing phase (10 is not before 2), then the billed one;
    # N17.9 was not. E11.9 stays where it came first.
    assert second["diagnoses"] == ["ICD10CM/E11.9", "ICD9CM/428.0", "ICD10CM/I10", "ICD10CM/N17.9"]
    assert second["diagnoses_at"] == [_day("2015-03-09")] * 4
    assert [(visit["end"] - visit["start"]).days for visit in (first, second)] == [7, 8]
    assert [visit["diagnoses"] for visit in records[3]["visits"]] == [["ICD10CM/J18.9"]]
    assert _rejected(tmp_path) == {
        ("data_file.tsv", 8, "vadate,vddate", "2016-05-05,2016-05-01", "negative stay: `vddate` is before `vadate`"),
        ("data_file.tsv", 9, "diag", "ICD8_123", "unknown vocabulary: the map names none for this row"),
        ("data_file.tsv", 11, "vadate", None, "`vadate` is missing"),
        ("data_file.tsv", 12, "vadate", "2016-02-30", "`vadate` is no readable date"),
    }


def test_wide_and_flag_codes_by_hand(tmp_path):
    text = """\
person,encounter,begin,finish,d1,d2,p1,insulin,metformin,age,sex,how,out
1,10,2020-01-01,2020-01-03,4280,250.00,3995,Up,No,[70-80),Female,3,1
1,11,2020-02-01,2020-02-02,?,V270,?,No,?,[70-80),Female,9,77
1,11,2020-02-01,2020-02-02,?,V271,?,No,?,[70-80),Female,9,99
2,12,2020-02-01,2020-02-02,NOPE,8,?,No,Steady,40,Other,1,11
2,13,2020-02-09,2020-02-02,8,8,?,No,Steady,40,Other,1,11
2,14,2020-03-01,2020-03-02,8,8,?,No,No,forty,Other,1,11
"""
    codes = [
        {"kind": "diagnosis", "columns": ["d1", "d2"], "vocabulary": "ICD9CM"},
        {"kind": "procedure", "columns": ["p1"], "vocabulary": "ICD9Proc"},
        {"kind": "medication", "columns": ["insulin", "metformin"], "vocabulary": "DRUG", "absent": ["No"]},
    ]
    columns = _map(
        codes=codes,
        age="age",
        null_values=["?"],
        visit_kind="inpatient",
        planned={"column": "how", "values": {1: 0, 3: 1}},
        discharge={"column": "out", "values": {1: "home", 11: "died"}},
        static={"Sex": {"column": "sex", "values": {"Female": "F", "Other": None}}},
    )
    _prepare(tmp_path, {"visits.csv": text}, columns)
    records = _records(tmp_path)
    one, two = records[1], records[2]
    first, second = one["visits"]
    assert (one["sex"], two["sex"]) == ("F", None)
    assert one["birth_time"] == _day("2020-01-01") - timedelta(days=75 * 365.25)
    assert two["birth_time"] == _day("2020-02-01") - timedelta(days=40 * 365.25)
    assert (first["visit_id"], first["kind"], first["planned"], first["discharged_to"]) == (
        10,
        "inpatient",
        True,
        "home",
    )
    assert (second["planned"], second["discharged_to"]) == (None, "unknown")
    assert first["diagnoses"] == ["ICD9CM/428.0", "ICD9CM/250.00"]
    assert first["procedures"] == ["ICD9Proc/39.95"]
    assert first["medications"] == ["DRUG/insulin"]
    assert first["medications_at"] == [_day("2020-01-03")]
    assert second["diagnoses"] == ["ICD9CM/V27.0"]
    assert second["medications"] == []
    assert [visit["diagnoses"] for visit in two["visits"]] == [["ICD9CM/008"]]
    assert two["visits"][0]["medications"] == ["DRUG/metformin"]
    assert two["visits"][0]["planned"] is False
    assert _rejected(tmp_path) == {
        ("visits.csv", 3, "encounter", "11", "repeats the visit (`person`, `encounter`) of another row"),
        ("visits.csv", 4, "d1", "NOPE", "`d1` is no code of its vocabulary"),
        ("visits.csv", 5, "begin,finish", "2020-02-09,2020-02-02", "negative stay: `finish` is before `begin`"),
        ("visits.csv", 6, "age", "forty", "`age` is no readable number or age band"),
    }


def test_text_ids_become_ranks_and_codes_of_a_second_file_find_their_visit(tmp_path):
    visits = "person,encounter,begin,finish\nbob,e9,01/02/2020,03/02/2020\namy,e10,02/02/2020,02/02/2020\n"
    codes = "person,encounter,system,code\nbob,e9,10,I10\nbob,e9,11,I10\namy,e9,10,I10\nbob,e9,10,E119\n"
    coded = {"kind": "diagnosis", "column": "code", "vocabulary": {"column": "system", "values": {10: "ICD10CM"}}}
    columns = _map(date_format="%d/%m/%Y")
    columns["files"].append({"path": "codes.csv", "subject": "person", "visit": "encounter", "codes": [coded]})
    info = _prepare(tmp_path, {"visits.csv": visits, "codes.csv": codes}, columns)
    assert sum("renumbered" in warning for warning in info.warnings) == 2
    records = _records(tmp_path)  # amy < bob, e10 < e9
    (amy,), (bob,) = records[1]["visits"], records[2]["visits"]
    assert (amy["visit_id"], amy["diagnoses"]) == (1, [])
    assert (bob["visit_id"], bob["start"], bob["end"]) == (2, _day("2020-02-01"), _day("2020-02-03"))
    assert sorted(bob["diagnoses"]) == ["ICD10CM/E11.9", "ICD10CM/I10"]
    assert {(row, column, value) for _, row, column, value, _ in _rejected(tmp_path)} == {
        (2, "code", "I10"),
        (3, "encounter", "e9"),
    }


def test_order_stands_in_for_dates(tmp_path):
    text = "person,encounter,nth,days,again\n1,a,30,2,NO\n1,b,4,9.5,<30\n2,c,1,1,\n2,d,x,1,NO\n2,e,5,-1,NO\n"
    entry = {"path": "visits.csv", "subject": "person", "visit": "encounter", "order": "nth", "length_of_stay": "days"}
    label = {"name": "again", "column": "again", "positive": ["<30"]}
    info = _prepare(tmp_path, {"visits.csv": text}, {"files": [entry], "labels": [label]})
    assert info.time_axis == "order"
    assert any("intervals" in warning for warning in info.warnings)
    early, late = _records(tmp_path)[1]["visits"]
    assert (early["start"], early["end"]) == (_day("1970-01-01"), _day("1970-01-10T12:00"))
    assert (late["start"], late["end"]) == (_day("1970-01-12"), _day("1970-01-14"))  # a step is ceil(9.5) + 1 days
    labels = pq.read_table(tmp_path / "out" / "labels" / "again.parquet").to_pylist()
    found = {(row["subject_id"], row["prediction_time"], row["boolean_value"]) for row in labels}
    assert found == {(1, early["end"], True), (1, late["end"], False)}
    assert {(row, column) for _, row, column, _, _ in _rejected(tmp_path)} == {(4, "nth"), (5, "days")}


def test_integer_ids_are_kept_and_leading_zeros_are_text(tmp_path):
    text = "person,encounter,begin,finish\n{},5,2020-01-01,2020-01-02\n12,6,2020-01-01,2020-01-02\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert not _prepare(tmp_path / "a", {"visits.csv": text.format(900)}, _map()).warnings
    assert sorted(_records(tmp_path / "a")) == [12, 900]
    assert len(_prepare(tmp_path / "b", {"visits.csv": text.format("0012")}, _map()).warnings) == 1
    assert sorted(_records(tmp_path / "b")) == [1, 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (_map(ordre="x"), r"unknown key `ordre`"),
        ({"files": [{"path": "visits.csv"}]}, r"lacks the key `subject`"),
        (_map(start="never"), r"lacks the column `never`"),
        (_map(path="nothing*.csv"), r"matches `nothing\*\.csv`"),
        (_map(order="n"), r"dates or `order`, not both"),
        (_map(discharge={"column": "out", "values": {1: "heaven"}}), r"values\.1` must be one of .*'heaven'"),
        (_map(date_format="%d.%b.%Y"), r"date_format` must be made of"),
        (_map(codes=[{"kind": "diagnosis", "columns": ["d"], "vocabulary": "X", "absent": [False]}]), r"Quote"),
        (_map(codes=[{"kind": "diagnosis", "column": "d"}]), r"vocabulary` must be a name"),
        ("no_such_map", r"diabetes130, medbert, got 'no_such_map'"),
    ],
)  # fmt: skip
def test_a_broken_map_is_named(tmp_path, columns, message):
    text = "person,encounter,begin,finish,out\n1,5,2020-01-01,2020-01-02,1\n"
    with pytest.raises(EhrDataError, match=message):
        _prepare(tmp_path, {"visits.csv": text}, columns)


@pytest.mark.slow
def test_the_diabetes_file_is_read_whole(tmp_path, real_data):
    options = {"columns": "diabetes130"}
    folder = real_data("diabetes130")
    info = prepare("table", folder, tmp_path / "out", workers=1, shards=1, progress=False, options=options)
    assert info.summary["visits"] == 81_568
    assert info.summary["patients"] == 57_289
    assert info.summary["rejected"] == {}
    assert info.time_axis == "order"
    assert any("intervals" in warning for warning in info.warnings)
    labels = pq.read_table(tmp_path / "out" / "labels" / "readmission_30d.parquet")
    assert labels.num_rows == 81_568
    assert pc.mean(labels["boolean_value"]).as_py() == pytest.approx(0.112, abs=0.002)
    records = pq.read_table(shard_paths(tmp_path / "out", "records")[0])
    visits = pc.list_flatten(records["visits"]).combine_chunks()
    owners = records["subject_id"].take(pc.list_parent_indices(records["visits"]))
    ends = pc.binary_join_element_wise(owners.cast("string"), visits.field("end").cast("string"), " ")
    asked = pc.binary_join_element_wise(
        labels["subject_id"].cast("string"), labels["prediction_time"].cast("string"), " "
    )
    assert pc.all(pc.is_in(asked, value_set=ends.combine_chunks())).as_py()
    assert len(pc.unique(asked)) == 81_568
    days = pc.divide(
        pc.subtract(visits.field("end").cast("int64"), visits.field("start").cast("int64")), 86_400_000_000
    )
    assert pc.min_max(days).as_py() == {"min": 1, "max": 14}
