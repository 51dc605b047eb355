"""The relational engine: what is a value, what is rejected and why, what stops with an error."""

from __future__ import annotations

import gzip
from datetime import date, datetime
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ehr.schema import EVENT_SCHEMA, REJECTED_SCHEMA, EhrDataError, validate_events
from hf_ehr.sources._files import readable
from hf_ehr.sources.engine import Column, Engine, Scan, as_events, find_table, reject

COLUMNS = {
    "id": Column("int64", required=True),
    "size": Column("float64"),
    "seen": Column("timestamp"),
    "born": Column("date"),
    "note": Column(),
    "extra": Column("timestamp", optional=True),
}
HEADER = "NOTE,Id,SIZE,seen,Born\n"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.connect(threads=2)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rows(scan: Scan) -> list[dict]:
    return sorted(scan.table.to_pyarrow().to_pylist(), key=lambda row: row["_row"])


def rejected(scan: Scan) -> list[tuple]:
    table = scan.rejected.to_pyarrow()
    assert table.schema.names == REJECTED_SCHEMA.names
    return sorted((tuple(row.values()) for row in table.to_pylist()), key=str)


def test_values_of_every_type_are_parsed(engine, tmp_path):
    path = write(
        tmp_path / "t.csv",
        HEADER
        + '"a, ""b""\nc",12.0,.5,2020-01-31 10:00:30,20200131\n'
        + "  x  ,-3,1e3,2020-01-31T10:00:00+02:00,2020-01-31 11:00:00\n"
        + ",7,,2020-1-5,\n",
    )
    scan = engine.scan(path, COLUMNS)
    assert rejected(scan) == []
    first, second, third = rows(scan)
    assert first == {
        "_row": 1, "id": 12, "size": 0.5, "seen": datetime(2020, 1, 31, 10, 0, 30), "born": date(2020, 1, 31),
        "note": 'a, "b"\nc', "extra": None,
    }  # fmt: skip
    assert (second["id"], second["size"], second["note"]) == (-3, 1000.0, "x")
    assert (second["seen"], second["born"]) == (datetime(2020, 1, 31, 10), date(2020, 1, 31))  # the local clock
    assert (third["note"], third["size"], third["seen"]) == (None, None, datetime(2020, 1, 5))


@pytest.mark.parametrize(
    ("line", "column", "value", "reason"),
    [
        ("n,,1,,", "id", None, "`id` is missing"),
        ("n, ,1,,", "id", None, "`id` is missing"),
        ("n,1.5,1,,", "id", "1.5", "`id` is no readable int64"),
        ("n,x,1,,", "id", "x", "`id` is no readable int64"),
        ("n,1,inf,,", "size", "inf", "`size` is no readable float64"),
        ("n,1,1_0,,", "size", "1_0", "`size` is no readable float64"),
        ("n,1,1,2020-02-30,", "seen", "2020-02-30", "`seen` is no readable timestamp"),
        ("n,1,1,01/02/2020,", "seen", "01/02/2020", "`seen` is no readable timestamp"),
        ("n,1,1,2020-01-01 25:00,", "seen", "2020-01-01 25:00", "`seen` is no readable timestamp"),
        ("n,1,1,,20201301", "born", "20201301", "`born` is no readable date"),
    ],
)
def test_a_row_with_a_bad_value_is_rejected_with_its_place_and_reason(engine, tmp_path, line, column, value, reason):
    path = write(tmp_path / "t.csv", f"{HEADER}n,5,1,,\n{line}\nn,6,1,,\n")
    scan = engine.scan(path, COLUMNS)
    assert [row["id"] for row in rows(scan)] == [5, 6]
    assert rejected(scan) == [("t.csv", 2, column, value, reason)]


def test_of_a_repeated_key_one_row_is_kept_whatever_the_order_of_the_file(engine, tmp_path):
    lines = ["b,1,2,,\n", "a,1,2,,\n", "c,2,2,,\n", "c,2,2,,\n"]
    kept = []
    for name, order in (("t", lines), ("u", lines[::-1])):
        scan = engine.scan(write(tmp_path / f"{name}.csv", HEADER + "".join(order)), COLUMNS, key=["id"])
        kept.append(sorted((row["id"], row["note"]) for row in rows(scan)))
        assert {row[2:] for row in rejected(scan)} == {
            ("id", "1", "repeats the key (id) of another row"), ("id", "2", "repeats the key (id) of another row"),
        }  # fmt: skip
    assert kept == [[(1, "a"), (2, "c")]] * 2


def test_null_values_and_missing_headers_are_options(engine, tmp_path):
    path = write(tmp_path / "t.tsv", "1\t?\n2\tx\n")
    scan = engine.scan(path, {"id": Column("int64"), "note": Column()}, header=False, null_values=["?"])
    assert [(row["id"], row["note"]) for row in rows(scan)] == [(1, None), (2, "x")]


def test_row_numbers_hold_in_a_large_file_read_in_parallel(engine, tmp_path):
    size = 300_000
    path = write(tmp_path / "t.csv", "id\n" + "".join(f"{number}\n" for number in range(1, size + 1)))
    scan = engine.scan(path, {"id": Column("int64")})
    assert scan.table.filter(scan.table["_row"] == scan.table["id"]).count().execute() == size


@pytest.mark.parametrize("as_folder", [False, True])
def test_parquet_is_read_with_its_own_types(engine, tmp_path, as_folder):
    table = pa.table(
        {
            "ID": pa.array([1.0, 2.5, None]),
            "seen": pa.array([0, 0, 0], pa.timestamp("ns", "UTC")),
            "size": pa.array([1, 2, 3], pa.int8()),
            "born": pa.array(["2020-01-01"] * 3),
            "note": ["a", " ", "b"],
        }
    )
    path = tmp_path / "t.parquet"
    if as_folder:
        path.mkdir()
    pq.write_table(table, path / "part.parquet" if as_folder else path)
    scan = engine.scan(path, COLUMNS)
    (row,) = rows(scan)
    assert (row["id"], row["size"], row["seen"], row["born"]) == (1, 1.0, datetime(1970, 1, 1), date(2020, 1, 1))
    assert {entry[1:] for entry in rejected(scan)} == {
        (2, "id", "2.5", "`id` is no readable int64"), (3, "id", None, "`id` is missing"),
    }  # fmt: skip


SECRET = "4711-SECRET"


TRUNCATED = "t.csv.gz is a truncated or damaged gzip"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"id,note\n1,a\n2\n", "t.csv.*line 3"),
        ("t.csv", f"id,note\n1,{SECRET},x\n".encode(), "t.csv.*line 2"),
        ("t.csv", f'id,note\n1,"{SECRET}\n'.encode(), "t.csv.*line 2"),
        ("t.csv", b"id,text\n1,a\n", "t.csv lacks the column `note`. Columns found: id, text"),
        ("t.csv", b"id,note\n", "t.csv has no rows"),
        ("t.csv", b"", "t.csv is empty"),
        ("t.csv", b"id,note,ID\n1,a,2\n", "t.csv has the column `id` more than once"),
        ("t.csv.gz", gzip.compress(f"id,note\n1,{SECRET}\n".encode(), mtime=0)[:-9], TRUNCATED),
        (
            "t.csv.gz",
            gzip.compress(b"id,note\n" + b"1,a\n" * 2_000_000, mtime=0)[:-9],
            "t.csv.gz is a truncated or damaged gzip",
        ),
        ("t.csv.gz", b"id,note\n1,a\n", TRUNCATED),
        ("t.parquet", b"PAR1", "t.parquet cannot be read"),
    ],
)
def test_a_broken_file_stops_with_its_name_and_never_its_content(engine, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EhrDataError, match=message) as error:
        engine.scan(tmp_path / name, {"id": Column("int64"), "note": Column()}).table.to_pyarrow()
    assert SECRET not in str(error.value)


def test_an_empty_table_is_fine_where_the_source_says_so(engine, tmp_path):
    scan = engine.scan(write(tmp_path / "t.csv", "id,note\n"), {"id": Column("int64")}, allow_empty=True)
    assert rows(scan) == rejected(scan) == []


def test_tables_are_found_in_any_case_and_any_of_the_formats(tmp_path):
    (tmp_path / "hosp").mkdir()
    for name in ("Patients.CSV.gz", "hosp/admissions.tsv", "hosp/notes.parquet"):
        write(tmp_path / name, "")
    for name, found in (("PATIENTS", "Patients.CSV.gz"), ("admissions", "hosp/admissions.tsv")):
        assert find_table(tmp_path, name, folders=("", "hosp")) == tmp_path / found
    assert find_table(tmp_path, "labevents", folders=("hosp",), required=False) is None
    with pytest.raises(EhrDataError, match=r"`labevents` is missing.*labevents.csv, labevents.csv.gz"):
        find_table(tmp_path, "labevents")


def test_reject_loses_no_row_and_null_conditions_keep_it(engine, tmp_path):
    path = write(tmp_path / "t.csv", "id,note\n1,a\n2,\n3,b\n")
    table = engine.scan(path, {"id": Column("int64"), "note": Column()}).table
    kept, out = reject(table, table["note"] == "b", file="t.csv", column="id,note", reason="is b")
    assert sorted(kept["id"].to_pyarrow().to_pylist()) == [1, 2]
    assert [tuple(row.values()) for row in out.to_pyarrow().to_pylist()] == [("t.csv", 3, "id,note", "3,b", "is b")]


def test_events_have_the_columns_of_the_contract_and_no_others(engine, tmp_path):
    table = engine.scan(write(tmp_path / "t.csv", "id\n1\n"), {"id": Column("int64")}).table
    events = as_events(table, subject_id=table["id"], code=ibis.literal("A/") + "1", kind="diagnosis").to_pyarrow()
    assert events.schema.types == EVENT_SCHEMA.types
    assert events.to_pylist()[0] | {"code": "A/1", "kind": "diagnosis", "time": None} == events.to_pylist()[0]
    with pytest.raises(ValueError, match="hadm_id"):
        as_events(table, hadm_id=table["id"])


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"`engine` must be 'duckdb' or 'spark', got 'pandas'"):
        Engine.connect("pandas")


def test_an_engines_message_is_cut_before_the_value_that_it_quotes():
    message = f"Conversion Error: Could not convert string '{SECRET}' to INT64"
    with pytest.raises(EhrDataError, match=r"Could not convert string$") as error, readable(Path("t.csv")):
        raise RuntimeError(message)
    assert SECRET not in str(error.value)


def test_a_row_that_breaks_a_rule_is_numbered_and_not_shown():
    event = {"subject_id": 1, "code": SECRET, "kind": "death", "time": datetime(2020, 1, 1)}
    with pytest.raises(EhrDataError, match=r"`code` must be VOCABULARY/CODE; row 0") as error:
        validate_events(pa.Table.from_pylist([event], schema=EVENT_SCHEMA))
    assert SECRET not in str(error.value)
