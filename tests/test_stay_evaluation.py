"""What an evaluation of stays rests on: whose patients, which threshold, what is written and what is not."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from hf_ehr.cli.main import main
from hf_ehr.intervals import patient_bootstrap
from hf_ehr.metrics import event1
from hf_ehr.schema import EVENT_SCHEMA, LABEL_SCHEMA, DatasetInfo, shard_name
from hf_ehr.stay_evaluation import (
    REFERENCE,
    STAY_BASELINES,
    StayComparison,
    _same_preparation,
    _strangers,
    event1_scores,
    stay_units,
    write_results,
)
from hf_ehr.tasks.audit import LeakageError
from hf_ehr.training import SPLITS_FILE
from hf_ehr.training.stays import StayArguments
from tests.builders import day, patient, records, visit


def prepared(folder, subjects, source="made"):
    rows = [patient(subject, [visit(0, 8)]) for subject in subjects]
    (folder / "records").mkdir(parents=True)
    pq.write_table(records(*rows), folder / "records" / shard_name(0, 1))
    DatasetInfo(source, {}, 1, "calendar").save(folder)
    return StayArguments(str(folder))


def test_an_external_test_set_holds_all_its_patients_and_none_that_were_trained_on(tmp_path):
    data = prepared(tmp_path / "data", range(1, 41))
    other = prepared(tmp_path / "other", range(100, 131))
    assert sorted(_strangers(data, other)) == list(range(100, 131))
    trained = data.splits()["train"][:2].tolist()
    with pytest.raises(LeakageError, match="2 patients of `test` were in `train`"):
        _strangers(data, prepared(tmp_path / "overlap", [*range(200, 220), *trained]))
    held_out = data.splits()["test"].tolist()
    assert sorted(_strangers(data, prepared(tmp_path / "held", held_out))) == sorted(held_out)


def test_ids_of_another_hospital_are_other_people_but_not_where_both_share_patients(tmp_path):
    data = prepared(tmp_path / "data", range(1, 41), "physionet2012")
    assert len(_strangers(data, prepared(tmp_path / "eicu", range(1, 41), "eicu"))) == 40
    with pytest.raises(LeakageError, match="share people"):
        _strangers(data, prepared(tmp_path / "mimic", range(1000, 1041), "mimic3"))


def test_a_moved_folder_is_the_same_data_and_another_one_is_not(tmp_path):
    data = prepared(tmp_path / "data", range(1, 41))
    (tmp_path / "model").mkdir()
    data.manifest(data.splits()).save(tmp_path / "model" / SPLITS_FILE)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert _same_preparation(StayArguments(str(tmp_path / "moved")), str(tmp_path / "model"))
    again = prepared(tmp_path / "again", range(1, 41))
    assert not _same_preparation(again, str(tmp_path / "model"))


def made_up(n=400, seed=0) -> StayComparison:
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, 1.5, n)
    truth = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    names = ["Prevalence", "Age + sex LR", *STAY_BASELINES, "Untrained MedHMP", REFERENCE]
    test = {name: 1 / (1 + np.exp(-(logit + rng.normal(0, spread, n)))) for spread, name in enumerate(reversed(names))}
    groups = {"sex": np.where(np.arange(n) % 3 > 0, "F", "M").astype(object), "age": [None] * n}
    return StayComparison(test, dict.fromkeys(names, 0.4), truth, 987_000_000 + np.arange(n) // 2, 1000, groups)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    comparison = made_up()
    return comparison, folder, write_results(comparison, folder, "made up: test stays", ["A note."])


def test_event_1_is_at_the_stored_threshold_with_an_interval_over_patients(written):
    comparison, folder, _ = written
    found = event1_scores(comparison)[REFERENCE]
    expected = patient_bootstrap(
        lambda y, p, w: event1(y, p, 0.4, w), comparison.truth, comparison.test[REFERENCE], comparison.patients
    )
    assert found == expected
    assert found.low < found.value < found.high
    flagged = comparison.test[REFERENCE] >= 0.4
    hits = (flagged & (comparison.truth == 1)).sum()
    assert found.value == pytest.approx(min(hits / comparison.truth.sum(), hits / flagged.sum()))
    stored = json.loads((folder / "table.json").read_text())["event1"][REFERENCE]
    assert stored["value"] == found.value


def test_what_is_written_says_the_same_and_names_no_patient(written):
    comparison, folder, table = written
    names = {path.name for path in folder.iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "subgroups.csv", "subgroups.png", "calibration.png",
                     "decisions.png"}  # fmt: skip
    patient = re.compile(rb"(?<![0-9.])98700[0-9]{4}(?![0-9])")
    assert not any(patient.search((folder / name).read_bytes()) for name in names)
    rows = {row["model"]: row for row in csv.DictReader((folder / "table.csv").open())}
    assert list(rows) == list(comparison.test)
    assert rows[REFERENCE]["auroc"][:5] in table.read_text()
    groups = {row["group"]: row for row in csv.DictReader((folder / "subgroups.csv").open())}
    assert int(groups["F"]["n"]) + int(groups["M"]["n"]) == int(groups["all"]["n"]) == 400
    positives = comparison.truth[comparison.groups["sex"] == "M"].sum()
    assert groups["M"]["positives"] == ("" if positives < 50 else str(positives))


def test_few_positives_are_said_to_prove_nothing(tmp_path):
    table = write_results(made_up(60), tmp_path, "few", [])
    assert "prove nothing" in table.read_text()
    assert not (tmp_path / "subgroups.png").exists()


def test_a_stay_is_of_the_unit_that_its_first_admission_names_and_small_units_have_no_name(tmp_path):
    edges = [(20, "admission", "Step-down"), (10, "admission", "MICU"), (5, "measurement", "left arm")]
    rows = [
        {"subject_id": stay // 2, "time": day(hour), "code": "Stay/icu", "stay_id": stay, "kind": kind,
         "text_value": "Burns" if stay >= 30 and kind == "admission" else text}
        for stay in range(52) for hour, kind, text in edges if stay != 7
    ]  # fmt: skip
    rows += [{"subject_id": 3, "time": day(1), "code": "Stay/icu", "stay_id": 7, "kind": "admission"}]
    (tmp_path / "events").mkdir()
    for shard, part in enumerate((rows[:39], rows[39:])):
        columns = {name: [row.get(name) for row in part] for name in EVENT_SCHEMA.names}
        pq.write_table(pa.table(columns, schema=EVENT_SCHEMA), tmp_path / "events" / shard_name(shard, 2))
    stays = np.array([40, 7, *range(30), 99])
    found = stay_units(tmp_path, stays // 2, stays).tolist()
    expected = {7: None, 40: "other", 99: None}
    assert found == [expected.get(stay, "MICU") for stay in stays.tolist()]
    every = np.arange(30, 52)
    assert stay_units(tmp_path, every // 2, every).tolist() == ["Burns"] * 22  # eleven patients
    assert stay_units(tmp_path, every[2:] // 2, every[2:]).tolist() == ["other"] * 20


def admissions(folder):
    """200 admissions of which those with a code, or with a rising heart rate, come back."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for subject in range(1, 201):
        returns, hours = rng.random() < 0.4, np.sort(rng.uniform(0, 23, 6))
        values = 80 + (1.5 if returns else 0.0) * hours + rng.normal(0, 6, 6)
        measured = [
            {"hour": float(hour), "name": "X/HR", "value": float(value), "text": None}
            for hour, value in zip(hours, values, strict=True)
        ]
        stay = {"stay_id": subject, "start": day(1), "end": day(2), "measurements": measured}
        codes = [f"ICD10CM/I{10 + number}" for number in rng.integers(0, 5, 2)]
        codes += ["ICD10CM/E11.9"] * bool(rng.random() < (0.9 if returns else 0.1))
        made = visit(0, 8, stays=[stay] if subject % 4 else [], diagnoses=codes, medications=["ATC/A10BA02"])
        rows.append(patient(subject, [made], sex="FM"[subject % 2]))
        labels.append({"subject_id": subject, "prediction_time": day(8), "boolean_value": returns})
    (folder / "records").mkdir(parents=True)
    pq.write_table(records(*rows), folder / "records" / shard_name(0, 1))
    (folder / "labels").mkdir()
    pq.write_table(pa.Table.from_pylist(labels, schema=LABEL_SCHEMA), folder / "labels" / "returns.parquet")
    DatasetInfo("made", {}, 1, "calendar").save(folder)


def test_admissions_go_the_road_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    admissions(tmp_path / "data")
    quiet = ["--report_to", "none", "--logging_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true",
             "--use_cpu", "true"]  # fmt: skip
    features = json.dumps({"n_hours": 24, "min_patients": 2, "demographics": ["age", "sex"], "form": "continuous"})
    commands = [
        ["pretrain", "medhmp", "--stage", "2", "--data", "data", "--output_dir", "model", "--preset", "tiny",
         "--feature_options", features, "--min_patients", "2", "--max_steps", "2", "--chunk_size", "64",
         "--per_device_train_batch_size", "64", *quiet],
        ["finetune", "medhmp", "--data", "data", "--model", "model", "--task", "returns", "--level", "admission",
         "--output_dir", "classifier", "--num_train_epochs", "2", *quiet],
        ["evaluate", "--model", "classifier", "--output", "evaluation"],
    ]  # fmt: skip
    assert [main([*words, "--debug"]) for words in commands] == [0, 0, 0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(model).__name__ == "MedHMPForAdmissionClassification"
    table = json.loads((tmp_path / "evaluation" / "table.json").read_text())
    rows = {row["model"]: row for row in table["rows"]}
    assert "test admissions" in table["title"]
    assert rows["MedHMP"]["n"] == 40
    for name in STAY_BASELINES:
        assert rows[name]["metrics"]["auroc"]["value"] > 0.8
