"""`hf-ehr doctor` says what is there and what is missing; `hf-ehr validate` finds what breaks a contract."""

from __future__ import annotations

from datetime import timedelta
from importlib import metadata

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_ehr import doctor
from hf_ehr.cli.main import main
from hf_ehr.prepare import prepare
from hf_ehr.schema import EhrDataError
from hf_ehr.validation import validate
from tests.builders import day

WORLD = {"world": "C", "patients": 60, "conditions": 18, "synonyms": 2, "noise_codes": 2}


# What is installed


def named(part: str) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine() if finding.part == part}


def test_versions_devices_and_backends_are_those_of_this_machine(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert metadata.version("transformers") in printed
    assert f"{torch.get_num_threads()} threads" in printed
    for name in ("Machine", "Packages", "Devices", "Attention", "sdpa", "eager", "flex_attention", "torch"):
        assert name in printed
    assert len([name for name in named("Devices") if name.startswith("cuda:")]) == torch.cuda.device_count()


def test_a_missing_or_outdated_requirement_comes_with_the_line_that_installs_it(monkeypatch, capsys):
    lines = ["torch>=2.6", "transformers>=99", "no-such-package>=1", 'lightgbm>=4.5; extra == "baselines"']
    lines += ['no-such-plot>=3; extra == "viz"', 'no-such-tool; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    packages, extras = named("Packages"), named("Extras")
    assert (packages["torch"].fix, packages["torch"].needed) == (None, False)
    assert packages["transformers"].fix == 'pip install "transformers>=99"'
    assert metadata.version("transformers") in packages["transformers"].state
    assert packages["no-such-package"] == doctor.Finding(
        "Packages", "no-such-package", "missing", 'pip install "no-such-package>=1"', needed=True
    )
    assert "no-such-plot" in extras["viz"].state
    assert extras["viz"].fix == 'pip install "transformers-ehr[viz]"'
    assert extras["baselines"].fix is None
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert "transformers, no-such-package must be repaired. Run: pip install" in error
    assert "no-such-tool" not in error


def test_a_namesake_that_overwrites_the_package_is_named(monkeypatch):
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "hf-ehr" else version(name))
    found = named("Packages")["hf-ehr"]
    assert found.needed
    assert found.fix.startswith("pip uninstall hf-ehr")


# Prepared folders


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("synthetic", None, folder, shards=2, workers=1, options=WORLD)
    return folder


@pytest.fixture
def copy(prepared, tmp_path):
    """A folder of one's own, to be broken."""
    for path in prepared.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(prepared)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def records_of(folder, change):
    """Rewrites the first shard of RECORDS through a change of its rows."""
    path = sorted((folder / "records").glob("*.parquet"))[0]
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_prepared_folder_is_whole(prepared, capsys):
    assert main(["validate", str(prepared)]) == 0
    printed = capsys.readouterr().out
    assert "prepared folder" in printed
    assert "60 patients" in printed
    assert "Nothing breaks the contracts." in printed
    assert validate(prepared).problems == []


def reverse_visits(rows):
    next(row for row in rows if len(row["visits"]) > 1)["visits"].reverse()


def repeat_code(rows):
    visit = rows[0]["visits"][0]
    visit["diagnoses"] = visit["diagnoses"][:1] * 2
    visit["diagnoses_at"] = visit["diagnoses_at"][:1] * 2


def lose_time(rows):
    visit = rows[0]["visits"][0]
    visit["diagnoses_at"] = visit["diagnoses_at"][:-1]


def move_patient(rows):
    rows[0]["subject_id"] += 1


def repeat_patient(rows):
    rows.append(rows[0])


def shuffle_hours(rows):
    hours = [{"hour": hour, "name": "HR", "value": 1.0, "text": None} for hour in (3.0, 1.0)]
    start = rows[0]["visits"][0]["start"]
    rows[0]["visits"][0]["stays"] = [{"stay_id": 1, "start": start, "end": start, "measurements": hours}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reverse_visits, "`visits` must be sorted by `start`, 1 begin before"),
        (repeat_code, "`diagnoses` of a visit must be distinct, 1 visits"),
        (lose_time, "`diagnoses_at` must hold a time for each of `diagnoses`, in 1 visits"),
        (move_patient, "must hold patients with `subject_id % 2` = 0, 1 belong elsewhere"),
        (repeat_patient, "`subject_id` must be distinct, 1 rows repeat one"),
        (shuffle_hours, "`measurements` of a stay must be sorted by `hour`, those of 1 stays are not"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_rule_of_records_is_checked(copy, change, message):
    records_of(copy, change)
    (problem,) = validate(copy).problems
    assert message in problem
    assert "records/shard-00000-of-00002.parquet" in problem


def test_broken_events_lost_shards_and_bad_labels_are_all_named_at_once(copy, capsys):
    events = sorted((copy / "events").glob("*.parquet"))
    table = pq.read_table(events[0])
    kinds = pa.array(["visit", *table["kind"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("kind"), "kind", kinds), events[0])
    sorted((copy / "records").glob("*.parquet"))[1].unlink()
    (copy / "labels").mkdir(exist_ok=True)
    label = {"subject_id": 10**9, "prediction_time": day(0)}
    pl.DataFrame([label | {"boolean_value": None}]).write_parquet(copy / "labels" / "empty.parquet")
    lost = pq.read_table(events[1])["subject_id"][0].as_py()  # its events are there, its record is not
    pl.DataFrame([label | {"subject_id": lost, "boolean_value": True}]).write_parquet(
        copy / "labels" / "other.parquet"
    )
    (copy / "labels" / "torn.parquet").write_bytes(b"PAR1")
    found = validate(copy)
    problems = "\n".join(found.problems)
    assert "Column `kind` must be one of" in problems
    assert "records/ lacks 1 of 2 shards (shard-00001-of-00002.parquet)" in problems
    assert "labels/empty.parquet: Column `boolean_value`" in problems
    assert "labels/torn.parquet: must be a whole Parquet file" in problems
    assert len(found.problems) == 4
    assert "labels/other.parquet: 1 labels are of patients without a record, and are not used" in found.remarks
    assert main(["validate", str(copy)]) == 2
    printed = capsys.readouterr()
    assert "4 problems. Correct what the lines above name." in printed.err
    assert printed.out.count("  problem: ") == 4


def test_a_folder_that_was_not_finished_and_one_that_is_none_are_told_apart(copy, tmp_path_factory):
    (copy / "dataset.json").unlink()
    with pytest.raises(EhrDataError, match="did not finish"):
        validate(copy)
    with pytest.raises(EhrDataError, match="found none"):
        validate(tmp_path_factory.mktemp("empty"))
    with pytest.raises(EhrDataError, match="does not exist"):
        validate(copy / "nowhere")


# MEDS

EVENTS = {
    "subject_id": [1, 1, 1, 2, 2],
    "time": [None, day(0), day(1), day(0), day(2)],
    "code": ["GENDER//F", "DIAGNOSIS//ICD//10//I10", "LAB//50912", "LOCAL_THING", "MEDS_DEATH"],
    "numeric_value": [None, None, 1.5, None, None],
}


def meds(path, **changes):
    frame = pl.DataFrame(EVENTS | changes)
    (path / "data" / "train").mkdir(parents=True)
    (path / "metadata").mkdir()
    frame.write_parquet(path / "data" / "train" / "0.parquet")
    pl.DataFrame({"code": ["x"]}).write_parquet(path / "metadata" / "codes.parquet")
    return path


def test_meds_data_are_read_and_unknown_spellings_are_a_remark(tmp_path):
    found = validate(meds(tmp_path))
    assert (found.kind, found.counts, found.problems) == ("meds", {"events": 5, "patients": 2}, [])
    assert found.remarks == ["1 of 5 distinct codes have no known spelling: `MEDS/…` measurements"]
    assert validate(tmp_path / "data" / "train" / "0.parquet").counts == found.counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject_id": ["a", "a", "a", "b", "b"]}, "`subject_id` must be a whole number, got"),
        ({"time": ["2020"] * 5}, "`time` must be a timestamp, got"),
        ({"code": ["I10", None, "I10", "I10", None]}, "`code` must not be null; 2 rows are"),
        ({"subject_id": [1, 2, 1, 2, 1]}, "rows of a subject must lie together"),
        (
            {"time": [None, day(1), day(0), day(2), day(2) - timedelta(hours=1)]},
            "`time` must not fall within a subject; 2",
        ),
        ({"numeric_value": ["x"] * 5}, "`numeric_value` must be a number, got"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_breaks_meds_is_named_with_its_field_and_rule(tmp_path, changes, message):
    (problem,) = validate(meds(tmp_path, **changes)).problems
    assert message in problem
    assert problem.startswith("data/train/0.parquet")


def test_missing_columns_and_subjects_in_two_files_are_named(tmp_path):
    meds(tmp_path)
    pl.DataFrame(EVENTS).write_parquet(tmp_path / "data" / "train" / "1.parquet")
    pl.DataFrame(EVENTS).drop("code").write_parquet(tmp_path / "data" / "train" / "2.parquet")
    lacking, split = validate(tmp_path).problems
    assert "2.parquet lacks the column `code`, which MEDS requires" in lacking
    assert "2 subjects are in more than one file" in split
