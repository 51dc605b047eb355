"""OMOP tables become events: codes, visits, availability and a reason for every row that does not."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import ibis
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hf_ehr.models.code_hierarchy import is_valid
from hf_ehr.prepare import prepare
from hf_ehr.records import assemble
from hf_ehr.schema import EhrDataError, shard_paths, validate_events
from hf_ehr.sources._codes import has_icd_shape, icd
from hf_ehr.sources.engine import Engine, Source
from hf_ehr.sources.omop import omop

PERSON = """person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime,\
race_concept_id,ethnicity_concept_id,race_source_value
1,8507,1950,3,4,,8527,38003564,white
2,8532,1960,,,,0,0,Mixed race
3,0,1970,2,30,,8516,0,
4,8507,1970,1,1,1970-01-02 03:04:00,8515,38003563,
"""
VISIT = """visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,visit_end_date,\
visit_end_datetime,visit_source_value,discharge_to_concept_id
10,1,9201,2020-01-01,2020-01-01 10:00:00,2020-01-05,2020-01-05 12:00:00,EW EMER.,8536
11,1,9202,2020-02-01,2020-02-01 09:30:00,2020-02-01,,,
12,2,262,2020-03-01,,2020-03-04,,,8863
13,2,9201,2020-06-10,,2020-06-01,,,
14,4,42,2020-01-01,,2020-01-02,,,
14,4,42,2020-01-01,,2020-01-02,,,
15,9,9201,2020-01-01,,2020-01-02,,,
"""
CONDITION = """condition_occurrence_id,person_id,condition_concept_id,condition_start_date,condition_start_datetime,\
condition_type_concept_id,condition_status_concept_id,visit_occurrence_id,condition_source_value,condition_source_concept_id
1,1,201826,2020-01-01,,38000201,,10,diab,44832190
2,1,316139,2020-01-01,,38000200,,10,4280,0
3,1,0,2020-02-01,,,,11,local 7,0
4,1,0,2020-02-01,,,,11,,0
5,2,201826,2020-03-02,,,32902,12,not a code,0
6,2,316139,2020-03-01,,,,12,4019,0
7,2,316139,2020-06-10,,,,13,4019,0
8,2,316139,2020-03-01,,,,10,4019,0
9,8,316139,2020-03-01,,,,,4019,0
10,4,316139,yesterday,,,,,4019,0
11,4,5,2020-09-09,,,,,,0
"""
CONCEPT = """concept_id\tconcept_name\tdomain_id\tvocabulary_id\tconcept_class_id\tstandard_concept\tconcept_code
0\tNo matching concept\tMetadata\tNone\tUndefined\t\tNo matching concept
201826\tType 2 diabetes mellitus\tCondition\tSNOMED\tFinding\tS\t44054006
316139\tHeart failure\tCondition\tSNOMED\tFinding\tS\t84114007
316139\tHeart failure, again\tCondition\tSNOMED\tFinding\tS\t84114007
44832190\tDiabetes "type II"\tCondition\tICD9CM\t5-dig billing code\t\t250.00
7\tDischarge summary\tNote\tNote Class\tx\tS\tx y
"""


@pytest.fixture(scope="module")
def engine():
    return Engine.connect()


@pytest.fixture
def tables(tmp_path):
    """Writes tables as CSV files and gives the folder back."""

    def write(**texts: str):
        for name, text in texts.items():
            (tmp_path / f"{name}.csv").write_text(text)
        return tmp_path

    return write


def events_of(source: Source, name: str | None = None) -> list[dict]:
    """The checked events of one extract, or of all, as dictionaries."""
    rows = []
    for extract in source.extracts:
        if name in (None, extract.name):
            rows += validate_events(extract.events.to_pyarrow()).to_pylist()
    return rows


def rejected_of(source: Source) -> list[dict]:
    return [row for extract in source.extracts for table in extract.rejected for row in table.to_pyarrow().to_pylist()]


def reasons_of(source: Source) -> Counter:
    return Counter((row["file"], row["column"], row["reason"]) for row in rejected_of(source))


def codes_by_id(source: Source) -> list[tuple]:
    rows = events_of(source, "condition_occurrence")
    return sorted((row["subject_id"], row["visit_id"] or 0, row["position"], row["code"]) for row in rows)


def test_source_codes_come_before_standard_concepts_and_standard_concepts_before_concept_ids(engine, tables):
    folder = tables(person=PERSON, visit_occurrence=VISIT, condition_occurrence=CONDITION, concept=CONCEPT)
    source = omop(engine, folder, source_vocabulary="ICD9CM")
    assert codes_by_id(source) == [
        (1, 10, 1, "ICD9CM/428.0"),  # type 38000200 is the first position, 38000201 the second
        (1, 10, 2, "ICD9CM/250.00"),  # its source concept says so
        (1, 11, 1, "Source/local_7"),
        (2, 12, 1, "SNOMED/44054006"),  # "not a code" has no ICD-9 shape; primary by its status
        (2, 12, 2, "ICD9CM/401.9"),
        (4, 0, 1, "OMOP/5"),
    ]


def test_without_a_concept_table_and_a_source_vocabulary_codes_are_concept_ids(engine, tables):
    folder = tables(person=PERSON, visit_occurrence=VISIT, condition_occurrence=CONDITION)
    source = omop(engine, folder)
    assert [row[3] for row in codes_by_id(source)][:3] == ["OMOP/316139", "OMOP/201826", "Source/local_7"]
    assert any("`concept` is missing" in warning for warning in source.warnings)


@pytest.mark.parametrize(
    ("vocabulary", "raw", "expected"),
    [
        ("ICD9CM", ["4280", "428", "e8120", "V3001", "25002", "8", "41", "8.45"],
         ["428.0", "428", "E812.0", "V30.01", "250.02", "008", "041", "008.45"]),
        ("ICD9Proc", ["3995", "39.95", "4", "4.1"], ["39.95", "39.95", "04", "04.1"]),
        ("ICD10CM", ["e1165", "E11.65", "C50", "S52521A"], ["E11.65", "E11.65", "C50", "S52.521A"]),
        ("ATC", ["A10BA02"], ["A10BA02"]),
    ],
)  # fmt: skip
def test_icd_codes_get_their_dot_and_the_zeros_that_a_spreadsheet_took(engine, vocabulary, raw, expected):
    table = ibis.memtable({"row": list(range(len(raw))), "code": raw})
    done = table.select(
        "row", code=icd(vocabulary, table.code), fits=has_icd_shape(vocabulary, icd(vocabulary, table.code))
    )
    rows = engine.con.to_pyarrow(done.order_by("row")).to_pydict()
    assert rows["code"] == expected
    assert all(rows["fits"])
    assert all(vocabulary == "ATC" or is_valid(f"{vocabulary}/{code}") for code in rows["code"])


def test_every_row_is_an_event_or_rejected_with_its_reason(engine, tables):
    folder = tables(person=PERSON, visit_occurrence=VISIT, condition_occurrence=CONDITION, concept=CONCEPT)
    source = omop(engine, folder)
    visits, conditions = "visit_occurrence.csv", "condition_occurrence.csv"
    unborn = "is no date of birth: the person is kept without one"
    assert reasons_of(source) == {
        ("concept.csv", "concept_id", "repeats the key (concept_id) of another row"): 1,
        ("person.csv", "year_of_birth,month_of_birth,day_of_birth", unborn): 1,
        (visits, "visit_occurrence_id", "repeats the key (visit_occurrence_id) of another row"): 1,
        (visits, "visit_end_date", "negative stay: ends before it starts"): 1,
        (visits, "person_id", "is not in the table `person`"): 1,
        (conditions, "condition_concept_id", "unmapped: concept 0 and no source value"): 1,
        (conditions, "visit_occurrence_id", "its visit is missing or was rejected"): 1,
        (conditions, "visit_occurrence_id", "its visit belongs to another person"): 1,
        (conditions, "person_id", "is not in the table `person`"): 1,
        (conditions, "condition_start_date", "`condition_start_date` is no readable timestamp"): 1,
    }
    bad_date = next(row for row in rejected_of(source) if row["column"] == "condition_start_date")
    assert (bad_date["row"], bad_date["value"]) == (10, "yesterday")
    assert len(events_of(source, "condition_occurrence")) == 11 - 5


def test_diagnoses_are_known_at_the_end_of_their_visit_plus_the_lag_and_drugs_from_their_start(engine, tables):
    drugs = (
        "drug_exposure_id,person_id,drug_concept_id,drug_exposure_start_date,visit_occurrence_id\n"
        "1,1,1503297,2020-01-02,10\n"
    )
    folder = tables(person=PERSON, visit_occurrence=VISIT, condition_occurrence=CONDITION, drug_exposure=drugs)
    source = omop(engine, folder, billing_lag_days=1.5)
    known = {
        (row["subject_id"], row["visit_id"]): row["available_at"] for row in events_of(source, "condition_occurrence")
    }
    assert known[1, 10] == datetime(2020, 1, 7, 0)
    assert known[4, None] == datetime(2020, 9, 10, 12)
    assert events_of(source, "drug_exposure")[0]["available_at"] == datetime(2020, 1, 2)


def test_visits_have_kind_disposition_and_an_end_that_is_not_before_their_start(engine, tables):
    death = "person_id,death_date\n2,2020-03-04\n"
    folder = tables(person=PERSON, visit_occurrence=VISIT, condition_occurrence=CONDITION, death=death)
    source = omop(engine, folder)
    rows = {(row["visit_id"], row["kind"]): row for row in events_of(source, "visit_occurrence")}
    assert {key: row["code"] for key, row in rows.items()} == {
        (10, "admission"): "Visit/inpatient",
        (10, "discharge"): "Discharge/home",
        (11, "admission"): "Visit/outpatient",
        (11, "discharge"): "Discharge/unknown",
        (12, "admission"): "Visit/emergency",
        (12, "discharge"): "Discharge/died",  # the death of that day outweighs "skilled nursing facility"
        (14, "admission"): "Visit/unknown",
        (14, "discharge"): "Discharge/unknown",
    }
    assert rows[11, "discharge"]["time"] == datetime(2020, 2, 1, 9, 30)
    assert rows[10, "admission"]["text_value"] == "EW EMER."
    assert next(row["time"] for row in events_of(source, "death")) == datetime(2020, 3, 4, 23, 59, 59)


def test_persons_have_birth_sex_race_and_ethnicity(engine, tables):
    folder = tables(person=PERSON, condition_occurrence=CONDITION)
    records = assemble(omop(engine, folder).extracts[0].events.to_pyarrow()).to_pylist()
    assert [(row["sex"], row["race"], row["ethnicity"], row["birth_time"]) for row in records] == [
        ("M", "White", "Not_Hispanic", datetime(1950, 3, 4)),
        ("F", "Mixed_race", None, datetime(1960, 7, 1)),
        (None, "Black", None, None),
        ("M", "Asian", "Hispanic", datetime(1970, 1, 2, 3, 4)),
    ]


def test_measurements_and_notes_keep_value_text_and_class(engine, tables):
    measurement = (
        "measurement_id,person_id,measurement_concept_id,measurement_date,measurement_datetime,value_as_number\n"
        "1,1,3004249,2020-01-02,2020-01-02 08:00:00,120.5\n1,1,3004249,2020-01-02,2020-01-02 09:00:00,\n"
    )
    note = (
        "note_id,person_id,note_date,note_class_concept_id,note_title,note_text,visit_occurrence_id\n"
        '1,1,2020-01-03,7,,"Two\nlines, quoted",10\n2,1,2020-01-03,0,Nursing note,text,\n3,1,2020-01-03,7,x,,\n'
    )
    folder = tables(
        person=PERSON,
        visit_occurrence=VISIT,
        condition_occurrence=CONDITION,
        concept=CONCEPT,
        measurement=measurement,
        note=note,
    )
    source = omop(engine, folder)
    values = sorted((row["time"].hour, row["numeric_value"]) for row in events_of(source, "measurement"))
    assert values == [(8, 120.5), (9, None)]
    assert {(row["code"], row["text_value"]) for row in events_of(source, "note")} == {
        ("Note/Discharge_summary", "Two\nlines, quoted"),
        ("Note/Nursing_note", "text"),
    }
    assert reasons_of(source)["note.csv", "note_text", "`note_text` is missing"] == 1


def test_eras_are_used_only_where_the_occurrences_are_missing(engine, tables):
    era = "condition_era_id,person_id,condition_concept_id,condition_era_start_date\n1,1,5,2020-01-01\n"
    folder = tables(person=PERSON, condition_era=era)
    source = omop(engine, folder)
    assert [row["code"] for row in events_of(source, "condition_era")] == ["OMOP/5"]
    assert any("`condition_era` is used" in warning for warning in source.warnings)
    tables(condition_occurrence=CONDITION)
    assert "condition_era" not in [extract.name for extract in omop(engine, folder).extracts]


@pytest.mark.parametrize("width", [14, 16])
def test_files_without_a_header_are_read_in_the_order_of_their_version(engine, tables, tmp_path, width):
    end = [""] * (width - 14)
    row = ["1", "1", "4", "2020-01-02", "2020-01-02 10:00:00", *end, "5", "6", "7", "8", "10", "9", "3995", "11", "x"]
    (tmp_path / "procedure_occurrence.tsv").write_text("\t".join(row) + "\n")
    folder = tables(person=PERSON, visit_occurrence=VISIT)
    source = omop(engine, folder, source_vocabulary={"procedure_occurrence": "ICD9Proc"})
    (event,) = events_of(source, "procedure_occurrence")
    assert (event["code"], event["visit_id"], event["time"]) == ("ICD9Proc/39.95", 10, datetime(2020, 1, 2, 10))


def test_errors_name_the_file_the_column_and_the_next_step(engine, tables, tmp_path):
    with pytest.raises(EhrDataError, match=r"no table of codes.*condition_occurrence"):
        omop(engine, tables(person=PERSON))
    with pytest.raises(EhrDataError, match=r"condition_occurrence.csv lacks the column `condition_concept_id`"):
        omop(
            engine,
            tables(condition_occurrence="condition_occurrence_id,person_id,condition_start_date\n1,1,2\n"),
        )
    with pytest.raises(EhrDataError, match=r"condition_occurrence.csv has no rows"):
        omop(engine, tables(condition_occurrence=CONDITION.splitlines()[0] + "\n"))
    with pytest.raises(EhrDataError, match=r"no header and 3 columns; `condition_occurrence` .* has 16"):
        omop(engine, tables(condition_occurrence="1,2,3\n"))
    with pytest.raises(ValueError, match=r"`source_vocabulary` must name tables among .* got 'person'"):
        omop(engine, tmp_path, source_vocabulary={"person": "ICD9CM"})
    (tmp_path / "person.csv").unlink()
    with pytest.raises(EhrDataError, match="Table `person` is missing"):
        omop(engine, tables(condition_occurrence=CONDITION))


def test_the_synpuf_sample_converts_whole(engine, real_data):
    source = omop(engine, real_data("synpuf1k_omop"))
    conditions = events_of(source, "condition_era")
    unmapped = [row for row in rejected_of(source) if row["file"].startswith("condition_era")]
    assert len(conditions) + len(unmapped) == 99_855
    assert {row["reason"] for row in unmapped} == {"unmapped: concept 0 and no source value"}
    assert sum(row["kind"] == "birth" for row in events_of(source, "person")) == 1_000
    assert len(events_of(source, "death")) == 52


def test_the_synpuf_sample_becomes_records_of_one_visit_a_day(real_data, tmp_path):
    info = prepare("omop", real_data("synpuf1k_omop"), tmp_path, shards=2, workers=1, progress=False)
    records = pa.concat_tables([pq.read_table(path) for path in shard_paths(tmp_path, "records")])
    visits = records["visits"].combine_chunks().flatten()
    assert records.num_rows == info.summary["patients"] == 1_000
    days = [visits.field(name).cast(pa.date32()) for name in ("start", "end")]
    assert days[0] == days[1]
    assert pc.sum(pc.list_value_length(visits.field("medications"))).as_py() == 56_257
    assert info.summary["rejected"] == {"condition_era.tsv.gz: unmapped: concept 0 and no source value": 218}


@pytest.mark.slow
def test_spark_gives_the_same_events_and_rejected_rows(tables, engine):
    pytest.importorskip("pyspark")
    folder = tables(person=PERSON, visit_occurrence=VISIT, condition_occurrence=CONDITION, concept=CONCEPT)
    spark = Engine.connect("spark")
    sources = [omop(connection, folder, source_vocabulary="ICD9CM") for connection in (engine, spark)]
    here, there = ([frozenset(row.items()) for row in events_of(source)] for source in sources)
    assert Counter(here) == Counter(there)
    assert reasons_of(sources[0]) == reasons_of(sources[1])
