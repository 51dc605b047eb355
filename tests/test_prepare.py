"""The driver: whole or not there, restartable after a kill, the same folder from the same input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hf_ehr import prepare as driver
from hf_ehr._shards import sort_events
from hf_ehr.prepare import SourceName, format_summary, prepare, source_function
from hf_ehr.records import assemble
from hf_ehr.schema import EVENT_SCHEMA, KINDS, RECORD_SCHEMA, DatasetInfo, EhrDataError, shard_paths, validate_events
from hf_ehr.sources._generated import GENERATED
from hf_ehr.sources.engine import Engine, Source, as_labels
from hf_ehr.sources.mimic3 import mimic3

from .tables import MIMIC3, write_tables

PATIENTS = 400
CUT = """
import sys
from hf_ehr.prepare import prepare
if __name__ == "__main__":
    source, input_dir, output, shards = sys.argv[1:5]
    options = {"patients": int(sys.argv[5])} if source == "synthetic" else None
    prepare(source, input_dir or None, output, shards=int(shards), workers=1, progress=False, options=options)
"""


FEW = {name: MIMIC3[name] for name in ("PATIENTS", "ADMISSIONS", "DIAGNOSES_ICD")}


@pytest.fixture
def hospital(tmp_path) -> Path:
    return write_tables(tmp_path / "raw", FEW)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The whole hospital in two shards."""
    folder = tmp_path_factory.mktemp("prepared")
    raw = write_tables(folder / "raw", MIMIC3)
    prepare("mimic3", raw, folder / "out", shards=2, workers=1, progress=False)
    return folder / "out"


def contents(folder: Path) -> dict[str, object]:
    """Everything in a prepared folder: tables by value, dataset.json without its fingerprint."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path)
        elif path.is_file():
            content = json.loads(path.read_text())
            content["summary"].pop("fingerprint")
            found[name] = content
    return found


def killed(arguments: list[str], ready) -> None:
    """Runs prepare in a process of its own and kills it (-9) as soon as ``ready()``."""
    process = subprocess.Popen([sys.executable, "-c", CUT, *arguments])
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "finished or failed before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_hospital_becomes_a_whole_folder(prepared):
    assert sorted(path.name for path in prepared.iterdir()) == [
        "dataset.json", "events", "records", "rejected.parquet",
    ]  # fmt: skip
    records = []
    pairs = zip(shard_paths(prepared, "events"), shard_paths(prepared, "records"), strict=True)
    for number, (path, record_path) in enumerate(pairs):
        events = pq.read_table(path)
        assert events.schema.equals(EVENT_SCHEMA)
        assert validate_events(events).equals(events)
        assert {subject % 2 for subject in events["subject_id"].to_pylist()} == {number}
        shard = pq.read_table(record_path)
        assert shard.equals(assemble(events))
        records += shard.to_pylist()
    by_id = {row["subject_id"]: row for row in records}
    assert sorted(by_id) == [1, 2, 3]
    assert by_id[1]["visits"][1]["diagnoses"] == ["ICD9CM/E850.0", "ICD9CM/428.0", "ICD9CM/V49.83"]
    assert [visit["visit_id"] for visit in by_id[1]["visits"]] == [10, 11]


def test_the_summary_says_what_the_folder_holds(prepared):
    info = DatasetInfo.load(prepared)
    summary = info.summary
    assert (summary["patients"], summary["visits"]) == (3, 3)
    assert summary["codes"] == 8  # five diagnoses, one procedure, two medications
    assert (summary["first_time"][:10], summary["last_time"][:10]) == ("2149-01-10", "2160-02-09")
    rejected = pq.read_table(prepared / "rejected.parquet")
    assert rejected.num_rows == sum(summary["rejected"].values()) == 13
    assert summary["rejected"]["DIAGNOSES_ICD.csv: no ICD9CM code"] == 1
    text = format_summary(info)
    for part in ("no ICD9CM code", "patients", "2149-01-10 to 2160-02-09", "mimic3"):
        assert part in text
    for warning in info.warnings:
        assert warning in text


def test_the_result_does_not_depend_on_shards_workers_or_the_order_of_the_files(hospital, tmp_path):
    one = prepare(mimic3, hospital, tmp_path / "one", shards=1, workers=1, progress=False)
    lines = MIMIC3["DIAGNOSES_ICD"].splitlines(keepends=True)
    write_tables(hospital, FEW, DIAGNOSES_ICD="".join([lines[0], *lines[:0:-1]]))
    three = prepare(mimic3, hospital, tmp_path / "three", shards=3, workers=2, progress=False)
    for arrow in ("events", "records"):
        tables = [
            pa.concat_tables(map(pq.read_table, shard_paths(tmp_path / name, arrow))) for name in ("one", "three")
        ]
        left, right = (sorted(map(str, table.to_pylist())) for table in tables)
        assert left == right
    for name in ("patients", "visits", "events", "codes", "distinct_codes", "first_time", "last_time", "rejected"):
        assert one.summary[name] == three.summary[name]


def test_a_killed_preparation_resumes_and_keeps_finished_shards(tmp_path):
    options = {"patients": PATIENTS}
    prepare("synthetic", None, tmp_path / "calm", shards=12, workers=1, progress=False, options=options)
    output = tmp_path / "cut"
    third = output / ".staging" / "summary-2.json"
    killed(["synthetic", "", str(output), "12", str(PATIENTS)], third.is_file)
    assert not (output / "dataset.json").exists()
    with pytest.raises(EhrDataError, match=r"did not finish"):
        DatasetInfo.load(output)
    done = {path: path.stat().st_mtime_ns for path in output.glob("*/shard-0000[012]-*")}
    assert len(done) == 9  # events, records and truth of three shards
    prepare("synthetic", None, output, shards=12, workers=1, progress=False, options=options)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert contents(output) == contents(tmp_path / "calm")


def test_a_preparation_killed_between_two_tables_resumes_to_the_same_folder(hospital, tmp_path):
    prepare("mimic3", hospital, tmp_path / "calm", shards=2, workers=1, progress=False)
    output = tmp_path / "cut"
    staged = output / ".staging" / "extract-patients"
    killed(["mimic3", str(hospital), str(output), "2"], staged.is_dir)
    assert staged.is_dir()
    assert not (output / ".staging" / "source.json").exists()
    part = next(staged.rglob("*.parquet"))
    stamps = []

    class Watched(list):
        """Looks at the staged file whenever the driver has gone through the extracts."""

        def __iter__(self):
            yield from super().__iter__()
            stamps.append((part.stat().st_ino, part.stat().st_mtime_ns))

    before = (part.stat().st_ino, part.stat().st_mtime_ns)

    def source(engine: Engine, input_dir: Path) -> Source:
        result = mimic3(engine, input_dir)
        return replace(result, extracts=Watched(result.extracts))

    source.__name__ = "mimic3"
    prepare(source, hospital, output, shards=2, workers=1, progress=False)
    assert len(stamps) >= 2
    assert set(stamps) == {before}
    assert contents(output) == contents(tmp_path / "calm")


def test_the_synthetic_icu_world_becomes_a_whole_folder_with_its_truth(tmp_path):
    info = prepare("synthetic_icu", None, tmp_path, shards=2, workers=1, progress=False, options={"patients": 12})
    assert (info.summary["patients"], info.time_axis) == (12, "calendar")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json", "events", "records", "rejected.parquet", "truth",
    ]  # fmt: skip
    truth = pa.concat_tables(map(pq.read_table, shard_paths(tmp_path, "truth")))
    assert {"subject_id", "task", "prediction_time"} <= set(truth.column_names)
    visits = pq.read_table(shard_paths(tmp_path, "records")[0])["visits"].to_pylist()
    assert any(stay["measurements"] for row in visits for visit in row for stay in visit["stays"])


def test_a_finished_folder_is_not_done_again(hospital, tmp_path):
    first = prepare(mimic3, hospital, tmp_path / "out", workers=1, progress=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(mimic3, hospital, tmp_path / "out", workers=1, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_a_folder_is_known_by_what_its_input_says_and_not_by_when_it_was_copied(hospital, tmp_path):
    table = hospital / "PATIENTS.csv"
    first = prepare(mimic3, hospital, tmp_path / "out", workers=1, progress=False)
    copied = tmp_path / "copy"
    shutil.copytree(hospital, copied)
    os.utime(copied / "PATIENTS.csv", (0, 0))
    assert prepare(mimic3, copied, tmp_path / "out", workers=1, progress=False) == first
    before = table.stat()
    table.write_text(table.read_text().replace(",F,", ",M,", 1))  # as long, and as old
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert table.stat().st_size == before.st_size
    with pytest.raises(EhrDataError, match="`overwrite`"):
        prepare(mimic3, hospital, tmp_path / "out", workers=1, progress=False)


@pytest.mark.parametrize("change", ["options", "shards", "input", "source"])
def test_a_folder_of_something_else_is_refused_and_overwritten_on_demand(hospital, tmp_path, change):
    arguments = {"workers": 1, "progress": False}
    prepare(mimic3, hospital, tmp_path / "out", shards=2, **arguments)
    source, shards = mimic3, 3 if change == "shards" else 2
    options = {"billing_lag_days": 1.0} if change == "options" else None
    if change == "input":
        (hospital / "PATIENTS.csv").write_text(MIMIC3["PATIENTS"] + "9,F,2100-01-01,\n")
    if change == "source":

        def source(engine: Engine, input_dir: Path) -> Source:
            return mimic3(engine, input_dir)

    with pytest.raises(EhrDataError, match="`overwrite`"):
        prepare(source, hospital, tmp_path / "out", shards=shards, options=options, **arguments)
    info = prepare(source, hospital, tmp_path / "out", shards=shards, options=options, overwrite=True, **arguments)
    fresh = prepare(source, hospital, tmp_path / "fresh", shards=shards, options=options, **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert info == fresh


def test_files_nobody_prepared_are_never_discarded_silently(hospital, tmp_path):
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "records" / "mine.txt").write_text("precious")
    with pytest.raises(EhrDataError, match="`overwrite`"):
        prepare(mimic3, hospital, tmp_path / "out", workers=1, progress=False)
    assert (tmp_path / "out" / "records" / "mine.txt").exists()


def test_the_output_may_lie_inside_the_input(hospital):
    output = hospital / "prepared"
    first = prepare(mimic3, hospital, output, workers=1, progress=False)
    assert prepare(mimic3, hospital, output, workers=1, progress=False) == first


def test_labels_of_the_source_are_written(hospital, tmp_path):
    def with_labels(engine: Engine, input_dir: Path) -> Source:
        source = mimic3(engine, input_dir)
        events = source.extracts[1].events
        chosen = events.filter(events["kind"] == "discharge")
        source.labels["left"] = as_labels(
            chosen, subject_id=chosen["subject_id"], prediction_time=chosen["time"], boolean_value=True
        )
        return source

    prepare(with_labels, hospital, tmp_path / "out", workers=1, progress=False)
    labels = pq.read_table(tmp_path / "out" / "labels" / "left.parquet")
    assert sorted(labels["subject_id"].to_pylist()) == [1, 1, 2]


def test_input_without_a_single_event_is_an_error(hospital, tmp_path):
    def nothing(engine: Engine, input_dir: Path) -> Source:
        source = mimic3(engine, input_dir)
        for extract in source.extracts:
            extract.events = extract.events.filter(extract.events["subject_id"] < 0)
        return source

    with pytest.raises(EhrDataError, match="No event came out of"):
        prepare(nothing, hospital, tmp_path / "out", workers=1, progress=False)
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("source", "input_dir", "shards", "message"),
    [
        ("mimic3", None, None, "`input_dir` must be an existing folder, got None"),
        ("mimic3", "/nowhere", None, "`input_dir` must be an existing folder, got /nowhere"),
        ("synthetic", ".", None, "leave out `input_dir`"),
        ("synthetic_icu", ".", None, "`synthetic_icu` reads nothing: leave out `input_dir`"),
        ("synthetic_text_codes", ".", None, "`synthetic_text_codes` reads nothing: leave out `input_dir`"),
        ("mimic5", ".", None, "`source` must be one of synthetic, synthetic_icu, synthetic_text_codes, mimic3"),
        ("synthetic", None, 0, "`shards` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(tmp_path, source, input_dir, shards, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, input_dir, tmp_path / "out", shards=shards, progress=False)
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("name", ["set-a.tar.xz", "SET-A.TGZ", "t.csv.gz", "t.parquet", "a.tar.bz2"])
def test_shards_are_as_many_as_the_compressed_bytes_ask_for(hospital, tmp_path, monkeypatch, name):
    for path in hospital.iterdir():
        path.unlink()
    (hospital / name).write_bytes(bytes(8_000))
    (hospital / "plain.txt").write_bytes(bytes(20_000))  # a fifth of it
    monkeypatch.setattr(driver, "EVENTS_PER_SHARD", 500)
    job = driver._job("mimic3", hospital, tmp_path / "out", "duckdb", None, {})
    assert job["shards"] == (8_000 + 20_000 / 5) / 8 / 500


def test_the_options_of_a_generated_world_are_checked_before_the_work(tmp_path):
    for source in GENERATED:
        with pytest.raises(ValueError, match="`patients` must be"):
            prepare(source, None, tmp_path / "out", progress=False, options={"patients": 0})
    assert not (tmp_path / "out").exists()
    job = driver._job("synthetic_text_codes", None, tmp_path, "duckdb", None, {"patients": 86_000})
    assert job["shards"] == 2
    job = driver._job("synthetic_icu", None, tmp_path, "duckdb", None, {"patients": 16_000})
    assert job["shards"] == 3


def test_every_named_source_has_a_function_of_its_name():
    names = [name for name in get_args(SourceName) if name not in GENERATED]
    assert len(names) == len(get_args(SourceName)) - len(GENERATED)
    assert [source_function(name).__name__ for name in names] == names


def test_events_are_sorted_by_subject_time_and_kind_with_nulls_first():
    rows = [
        (2, 5, "A/1", "diagnosis", 2), (2, 5, "A/2", "diagnosis", 1), (2, 5, "A/3", "admission", None),
        (2, None, "Sex/F", "static", None), (1, -3, "A/9", "diagnosis", None), (2, 5, "A/0", "diagnosis", None),
        (1, -3, "A/10", "diagnosis", None),
    ]  # fmt: skip
    table = pa.table(
        {"subject_id": [row[0] for row in rows], "time": pa.array([row[1] for row in rows], pa.timestamp("us")),
         "code": pa.array([row[2] for row in rows]).dictionary_encode(),
         "kind": pa.array([row[3] for row in rows]).dictionary_encode(),
         "position": pa.array([row[4] for row in rows], pa.int32())}
    )  # fmt: skip
    for field in EVENT_SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(rows), field.type))
    table = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    expected = sorted(rows, key=lambda row: (row[0], row[1] or -99, KINDS.index(row[3]), row[4] or 0, row[2]))
    assert sort_events(table)["code"].to_pylist() == [row[2] for row in expected]


@pytest.mark.parametrize("name", ["mimic3_demo", "mimic4_demo"])
def test_the_demos_convert_with_one_command(real_data, tmp_path, name):
    info = prepare(name.removesuffix("_demo"), real_data(name), tmp_path, workers=1, progress=False)
    assert info.summary["patients"] == 100
    assert info.summary["visits"] == {"mimic3_demo": 129, "mimic4_demo": 275}[name]
    assert info.summary["rejected"] == {}
    records = pq.read_table(shard_paths(tmp_path, "records")[0], schema=RECORD_SCHEMA)
    visits = pc.list_flatten(records["visits"]).combine_chunks()
    assert len(pc.list_flatten(visits.field("stays"))) == {"mimic3_demo": 136, "mimic4_demo": 140}[name]
    if name == "mimic3_demo":
        assert pc.sum(pc.equal(visits.field("discharged_to"), "died")).as_py() == 40
        # 1,761 rows; a code that is coded twice in an admission is one code of the record
        pairs = pq.read_table(shard_paths(tmp_path, "events")[0]).filter(pc.field("kind") == "diagnosis")
        distinct = pairs.group_by(["visit_id", "code"]).aggregate([]).num_rows
        assert pairs.num_rows == 1761
        assert len(pc.list_flatten(visits.field("diagnoses"))) == distinct
