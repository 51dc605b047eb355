"""`--dry-run`: it says what the run itself then does, leaves nothing, and knows what is there already."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification

from hf_ehr.cli.main import main
from hf_ehr.prepare import prepare

OPTIONS = {"world": "C", "patients": 120, "conditions": 18, "synonyms": 2, "noise_codes": 2}
RUN = ("--preset", "tiny", "--num_train_epochs", "3", "--learning_rate", "3e-3", "--report_to", "none")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry") / "data"
    prepare("synthetic", None, folder, options=OPTIONS, workers=1, progress=False)
    return folder


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_dry_run_tells_what_the_run_then_trains(data, tmp_path, capsys):
    model, classifier = tmp_path / "model", tmp_path / "classifier"
    words = ["pretrain", "medbert", "--data", str(data), "--output_dir", str(model), *RUN]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not everything(tmp_path)
    assert main(words) == 0
    trained = AutoModelForPreTraining.from_pretrained(model)
    assert f"{sum(one.numel() for one in trained.parameters()):,} parameters" in said
    finetune = ["finetune", "medbert", "--data", str(data), "--model", str(model), "--task", "synthetic_outcome"]
    finetune += ["--output_dir", str(classifier), "--num_train_epochs", "2", "--report_to", "none"]
    capsys.readouterr()
    assert main([*finetune, f"--output_dir={classifier}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert not classifier.exists()
    assert main(finetune) == 0
    found = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert f"{sum(one.numel() for one in found.parameters()):,} parameters" in said
    assert re.search(r"s a step: .* of training", said)


def test_it_knows_what_the_folder_holds(data, tmp_path, capsys):
    words = ["pretrain", "medbert", "--data", str(data), "--output_dir", str(tmp_path / "model"), *RUN]
    assert main(words) == 0
    before = everything(tmp_path)
    assert main([*words, "--dry-run"]) == 0
    assert "this very run, finished" in capsys.readouterr().out
    assert main([*words, "--seed", "7", "--dry-run"]) == 0
    assert "holds another run, and this one would be refused" in capsys.readouterr().out
    assert everything(tmp_path) == before


def test_a_run_that_was_stopped_would_go_on(data, tmp_path, capsys):
    words = ["pretrain", "medbert", "--data", str(data), "--output_dir", str(tmp_path / "model"), *RUN]
    assert main(words) == 0
    marker = tmp_path / "model" / "pretraining.json"
    digest = json.loads(marker.read_text())["run"]
    marker.unlink()
    checkpoint = tmp_path / "model" / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    assert main([*words, "--dry-run"]) == 0  # checkpoints of which nobody knows what they are
    assert "this one would be refused" in capsys.readouterr().out
    assert main(words) == 2
    (tmp_path / "model" / "run.json").write_text(json.dumps({"run": digest}))
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    assert f"It would go on from {checkpoint}." in capsys.readouterr().out


def test_a_dry_run_needs_a_folder_and_its_errors_are_those_of_the_run(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "medbert", "--data", str(data), *RUN, "--dry-run"]) == 2
    assert "`output_dir` must be given" in capsys.readouterr().err
    assert main(["pretrain", "medbert", "--data", "nowhere", "--output_dir", "model", *RUN, "--dry-run"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not everything(tmp_path)


def test_preparation_looks_at_the_input_and_writes_nothing(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "events.csv").write_text("patient,when,code\n1,2020-01-01,I10\n1,2020-03-01,E11.9\n")
    codes = {"kind": "diagnosis", "column": "code", "vocabulary": "ICD10CM"}
    columns = {"path": "events.csv", "subject": "patient", "time": "when", "codes": [codes]}
    words = ["prepare", "table", "--input", str(raw), "--output", str(tmp_path / "data")]
    words += ["--options", json.dumps({"columns": {"files": [columns]}})]
    before = everything(tmp_path)
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 file, " in said
    assert "tables: " in said
    assert everything(tmp_path) == before
    wrong = json.dumps({"columns": {"files": [columns | {"subject": "person"}]}})
    assert main([*words[:-1], wrong, "--dry-run"]) == 2
    assert "person" in capsys.readouterr().err
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    assert "It is there already, whole." in capsys.readouterr().out
    (raw / "events.csv").write_text("patient,when,code\n1,2020-01-01,I10\n")
    assert main([*words, "--dry-run"]) == 0
    assert "this one would be refused" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["medbert_table4", "bertxml_table2", "medhmp_table1", "medmplm_table3"])
def test_a_report_counts_its_jobs_and_what_is_done(name, tmp_path, capsys):
    from hf_ehr.experiments import _stages, load_spec

    work = tmp_path / "work"
    words = ["report", name, "--work", str(work), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    counts = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert {done for _, done in counts.values()} == {"0"}
    assert not everything(tmp_path)
    jobs = _stages(load_spec(name), work)["Cells"]
    assert counts["Cells"][0] == str(len(jobs))
    jobs[0].done.parent.mkdir(parents=True)
    jobs[0].done.touch()
    assert main([*words, "--draws", "1"]) == 0
    fewer = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert fewer["Cells"][1] == "1"
    assert int(fewer["Cells"][0]) < len(jobs)
