"""Drugs become ATC classes through a table; what it does not know is counted (papers.md §2, row 27)."""

from __future__ import annotations

import polars as pl
import pyarrow.parquet as pq
import pytest

from hf_ehr.drug_classes import DrugClasses, map_drugs
from hf_ehr.schema import RECORD_SCHEMA, DatasetInfo, EhrDataError, shard_name
from hf_ehr.training.visits import VisitArguments
from tests.builders import day, patient, records, visit

TABLE = """code,atc,name
00002143380,C07AB02,a
00002143380,A10BA02,a
54868-123-5,B01AA03,b
RXNORM/6809,A10BA02,c
7,,d
2143381,ATC/C07AB03,e
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table.csv").write_text(TABLE)
    return tmp_path / "table.csv"


def folder(path, *patients):
    (path / "records").mkdir(parents=True)
    (path / "events").mkdir()
    for shard in range(2):
        rows = [row for row in patients if row["subject_id"] % 2 == shard]
        pq.write_table(records(*rows), path / "records" / shard_name(shard, 2))
        pq.write_table(records(), path / "events" / shard_name(shard, 2))
    DatasetInfo("made", {"a": 1}, 2).save(path)
    return path


def medications(path, subject: int) -> list[tuple[list[str], list]]:
    rows = pq.read_table(path / "records" / shard_name(subject % 2, 2)).to_pylist()
    (row,) = [row for row in rows if row["subject_id"] == subject]
    return [(one["medications"], one["medications_at"]) for one in row["visits"]]


def test_drugs_become_their_classes_at_the_level(table, tmp_path):
    given = ["NDC/00002143380", "ATC/N02BE01", "NDC/54868012305", "NDC/99999999999", "DRUG/water", "RXNORM/6809"]
    data = folder(tmp_path / "data", patient(1, [visit(0, 2, medications=given), visit(3, 4)]), patient(2, []))
    report = map_drugs(data, tmp_path / "atc", DrugClasses.read(table, level=3))
    assert medications(tmp_path / "atc", 1) == [
        (["ATC/C07A", "ATC/A10B", "ATC/N02B", "ATC/B01A"], [day(2)] * 4), ([], [])
    ]  # fmt: skip
    assert (report.occurrences, report.mapped, report.unmapped) == (6, 4, {"NDC": 1, "DRUG": 1})
    assert "4 of 6 medications have a class (66.7%); without: 1 NDC, 1 DRUG." in str(report)
    info = DatasetInfo.load(tmp_path / "atc")
    assert info.options == {"a": 1, "drug_classes": {"level": 3}}
    assert str(report) in info.warnings[-1]
    assert pq.read_table(tmp_path / "atc" / "records" / shard_name(0, 2)).schema.equals(RECORD_SCHEMA)
    assert len(list((tmp_path / "atc" / "events").iterdir())) == 2


def test_of_equal_classes_the_one_that_was_known_first_stays(table, tmp_path):
    given = ["NDC/00002143380", "NDC/00002143381", "ATC/C07AB07"]
    times = [day(3), day(1), None]
    data = folder(tmp_path / "data", patient(1, [visit(0, 2, medications=given, medications_at=times)]))
    map_drugs(data, tmp_path / "third", DrugClasses.read(table, level=3))
    assert medications(tmp_path / "third", 1) == [(["ATC/A10B", "ATC/C07A"], [day(3), day(1)])]
    map_drugs(data, tmp_path / "fifth", DrugClasses.read(table, level=5))
    codes = ["ATC/C07AB02", "ATC/A10BA02", "ATC/C07AB03", "ATC/C07AB07"]
    assert medications(tmp_path / "fifth", 1) == [(codes, [day(3), day(3), day(1), None])]


def test_everything_else_and_the_split_stay_as_they_are(table, tmp_path):
    made = patient(1, [visit(0, 2, diagnoses=["ICD10CM/A00"], medications=["ATC/A10BA"])], sex="F")
    data = folder(tmp_path / "data", made, patient(2, [visit(0, 1)]))
    before = VisitArguments(str(data))
    manifest = before.manifest(before.splits())
    map_drugs(data, tmp_path / "atc", DrugClasses.read(table))
    after = VisitArguments(str(tmp_path / "atc"))
    assert after.manifest(after.splits()) == manifest
    (one, other) = (
        pq.read_table(path / "records" / shard_name(1, 2)).to_pylist() for path in (data, tmp_path / "atc")
    )
    one[0]["visits"][0]["medications"] = ["ATC/A10B"]
    assert one == other


def test_a_parquet_table_reads_like_a_csv(table, tmp_path):
    pl.read_csv(table, infer_schema=False).write_parquet(tmp_path / "table.parquet")
    one, other = (DrugClasses.read(path, level=4) for path in (table, tmp_path / "table.parquet"))
    assert one.table.equals(other.table)
    assert one.table["code"].to_list() == [
        "NDC/00002143380", "NDC/00002143380", "NDC/54868012305", "RXNORM/6809", "NDC/00002143381"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code,class\n1,C07\n", "must have the columns `code` and `atc`"),
        ("code,atc\n1,C07\n2,heart\n", "row 2 is none"),
        ("code,atc\n1,\n", "the table has no row"),
    ],
)
def test_a_table_without_classes_is_refused(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(EhrDataError, match=message):
        DrugClasses.read(tmp_path / "table.csv")


def test_a_folder_that_cannot_be_mapped_is_refused(table, tmp_path):
    data = folder(tmp_path / "data", patient(1, [visit(0, 2, medications=["GSN/1"])]))
    with pytest.raises(EhrDataError, match=r"No medication of .* has a class; their vocabularies are GSN"):
        map_drugs(data, tmp_path / "atc", DrugClasses.read(table))
    assert not (tmp_path / "atc").exists()
    with pytest.raises(EhrDataError, match="`output` must not exist"):
        map_drugs(data, data, DrugClasses.read(table))
    with pytest.raises(ValueError, match="`level` must be one of 1, 2, 3, 4, 5, got 6"):
        DrugClasses.read(table, level=6)
    with pytest.raises(EhrDataError, match="must be a CSV or Parquet file"):
        DrugClasses.read(tmp_path / "none.csv")
