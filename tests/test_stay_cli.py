"""The road from intensive care stays to a table with rivals, as a person types it."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification

from hf_ehr.cli.main import main
from hf_ehr.cli.stay_commands import task_level
from hf_ehr.metrics import auroc
from hf_ehr.schema import DatasetInfo, shard_name
from hf_ehr.training.stays import StayArguments, StayFinetuneArguments, labelled_stays, predict_stays
from tests.builders import day, patient, records, visit

TASK = "icu_mortality_t24"
QUIET = ["--report_to", "none", "--logging_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true",
         "--use_cpu", "true"]  # fmt: skip
FEATURES = json.dumps({"demographics": ["age", "sex"], "static": ["CINC2012/ICUType"]})
UNITS = ("Medical ICU", "Surgical ICU")


def write(folder, first, patients, seed):
    """Patients whose heart rate rises where they die; a name that must never leave the prepared folder."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject in range(first, first + patients):
        dies, hours = rng.random() < 0.4, np.sort(rng.uniform(0, 23, 8))
        values = 80 + (1.5 if dies else 0.0) * hours + rng.normal(0, 6, 8)
        measured = [{"hour": 0.0, "name": "CINC2012/ICUType", "value": None, "text": UNITS[subject % 2]}]
        measured += [
            {"hour": float(hour), "name": "CINC2012/HR", "value": float(value), "text": None}
            for hour, value in zip(hours, values, strict=True)
        ]
        later = ["CINC2012/HR", "ICU/ventilation", "ICU/vasopressor"] if dies else ["CINC2012/HR"]
        measured += [{"hour": 30.0, "name": name, "value": 100.0 + 50 * dies, "text": None} for name in later]
        stay = {"stay_id": 7_000_000 + subject, "start": day(1), "end": day(3), "measurements": measured}
        fields = {"discharged_to": "died" if dies else "home", "diagnoses": ["ICD10CM/I10"] if dies else []}
        rows.append(
            patient(
                subject, [visit(0, 8, stays=[stay], **fields)], sex="FM"[subject % 3 > 0],
                death_time=day(8) if dies else None,
            )
        )  # fmt: skip
    (folder / "records").mkdir(parents=True)
    for shard in range(2):
        part = records(*(row for row in rows if row["subject_id"] % 2 == shard))
        pq.write_table(part, folder / "records" / shard_name(shard, 2))
    DatasetInfo("made", {}, 2, "calendar").save(folder)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Every command of the road, run once."""
    folder = tmp_path_factory.mktemp("road")
    commands = [
        ["fit-hourly", "--data", "data", "--output", "features", "--n_hours", "24", "--form", "continuous",
         "--min_patients", "2", "--options", FEATURES],
        ["pretrain", "medhmp", "--stage", "1", "--data", "data", "--features", "features", "--output_dir", "encoder",
         "--preset", "tiny", "--max_steps", "8", *QUIET],
        ["finetune", "medhmp", "--data", "data", "--model", "encoder", "--task", TASK, "--output_dir", "classifier",
         "--num_train_epochs", "2", *QUIET],
        ["evaluate", "--model", "classifier", "--output", "evaluation"],
        ["evaluate", "--model", "classifier", "--output", "external", "--data", "other"],
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(folder / "data", 1, 220, 0)
        write(folder / "other", 1001, 150, 1)
        assert [main([*words, "--debug"]) for words in commands] == [0] * len(commands)
    return folder


def test_the_road_ends_in_a_classifier_that_opens_alone(road):
    model = AutoModelForSequenceClassification.from_pretrained(road / "classifier")
    assert 0 < model.config.thresholds[TASK] < 1
    assert AutoFeatureExtractor.from_pretrained(road / "classifier").n_hours == 24


@pytest.mark.parametrize("task", ["arf_onset_after_t24", "shock_onset_after_t24_gap4"])
def test_respiratory_failure_and_shock_are_fine_tuned_like_death(road, task, monkeypatch):
    monkeypatch.chdir(road)
    words = ["finetune", "medhmp", "--data", "data", "--model", "encoder", "--task", task, "--output_dir", task]
    assert main([*words, "--num_train_epochs", "1", *QUIET, "--debug"]) == 0
    data = StayArguments("data")
    model = AutoModelForSequenceClassification.from_pretrained(road / task)
    extractor = AutoFeatureExtractor.from_pretrained(road / task)
    held = labelled_stays(data, StayFinetuneArguments(task, task), extractor, data.splits(), "test")
    assert set(model.config.thresholds) == {task}
    assert auroc(held["labels"][:], predict_stays(model, held)) > 0.8


def test_the_table_has_the_rivals_and_the_figures_are_drawn(road):
    table = json.loads((road / "evaluation" / "table.json").read_text())
    rows = {row["model"]: row for row in table["rows"]}
    assert list(rows) == [
        "Prevalence", "Age + sex LR", "L2 LR on summaries", "LightGBM on summaries", "Untrained MedHMP", "MedHMP",
    ]  # fmt: skip
    for name in ("L2 LR on summaries", "LightGBM on summaries", "MedHMP"):
        assert rows[name]["metrics"]["auroc"]["value"] > 0.8
    assert rows["Prevalence"]["metrics"]["auroc"]["value"] == 0.5
    assert set(table["event1"]) == set(rows)
    splits = StayArguments(str(road / "data")).splits()
    assert (rows["MedHMP"]["n"], rows["MedHMP"]["n_train"]) == (len(splits["test"]), len(splits["train"]))
    text = (road / "evaluation" / "table.md").read_text()
    assert "## Event 1" in text
    assert "lacks rows" not in text
    assert "unit: Medical ICU" in text
    for name in ("calibration.png", "decisions.png"):
        assert (road / "evaluation" / name).read_bytes().startswith(b"\x89PNG")


def test_another_folder_is_tested_on_whole_at_the_same_threshold(road):
    table = json.loads((road / "external" / "table.json").read_text())
    rows = {row["model"]: row for row in table["rows"]}
    assert rows["MedHMP"]["n"] == 150
    assert rows["MedHMP"]["n_train"] == len(StayArguments(str(road / "data")).splits()["train"])
    assert rows["LightGBM on summaries"]["metrics"]["auroc"]["value"] > 0.8
    assert "all labelled stays" in table["title"]
    groups = list(csv.DictReader((road / "external" / "subgroups.csv").open()))
    assert {(group["field"], group["group"]) for group in groups} >= {("sex", "F"), ("unit", "Surgical ICU")}
    shown = {group["group"]: bool(group["auroc"]) for group in groups}
    assert shown["all"]
    assert not shown["F"]  # fewer than 50 positives


def test_patients_that_trained_the_classifier_are_no_external_test(road, tmp_path, capsys):
    write(tmp_path / "again", 1, 60, 2)
    words = ["evaluate", "--model", str(road / "classifier"), "--output", str(tmp_path / "out"), "--data"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(road)
        assert main([*words, str(tmp_path / "again")]) == 2
    assert "L1" in capsys.readouterr().err


def test_the_card_says_what_it_is_and_no_folder_but_the_prepared_one_holds_patients(road):
    card = (road / "classifier" / "README.md").read_text()
    assert "not a medical device" in card
    assert "| LightGBM on summaries |" in card
    for name in ("features", "encoder", "classifier", "evaluation", "external"):
        files = [path for path in (road / name).rglob("*") if path.is_file()]
        assert files
        texts = (path.read_bytes() for path in files if path.suffix in (".json", ".md", ".csv"))
        assert not any(re.search(rb"(?<![0-9.])7000[0-9]{3}(?![0-9])", text) for text in texts)  # the ids of stays
        assert not list((road / name).rglob("examples"))


@pytest.mark.parametrize(
    ("task", "level"),
    [("icu_mortality_t48", "stay"), ("arf_onset_after_t12_gap6", "stay"), ("readmission_30d", "admission")],
)
def test_a_task_says_what_it_is_asked_of(task, level):
    assert task_level(task) == level


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "medhmp", "--stage", "3"], "`stage` must be one of 1, 2, got '3'"),
        (["fit-hourly", "--data", "x", "--output", "y", "--options", "{"], "`options` must be a JSON"),
        (["finetune", "medhmp", "--data", "x", "--model", "y", "--task", "mine", "--output_dir", "z"],
         "give `--level stay` or `--level admission`"),
        (["finetune", "medhmp", "--data", "x", "--model", "y", "--task", "readmission_30d", "--output_dir", "z",
          "--level", "ward"], "`level` must be one of stay, admission, got 'ward'"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_each_stage_has_a_page_of_its_own(capsys):
    pages = []
    for stage in ("1", "2"):
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", "medhmp", f"--stage={stage}", "--help"])
        assert stop.value.code == 0
        pages.append(capsys.readouterr().out)
        assert f"example: hf-ehr pretrain medhmp --stage {stage}" in " ".join(pages[-1].split())
    assert "--stays" not in pages[0]
    assert "--stays" in pages[1]
