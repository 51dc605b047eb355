"""The road from raw notes to a page with codes and evidence, as a person types it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from hf_ehr.cli.main import main
from hf_ehr.note_datasets import split_notes
from hf_ehr.notes import NoteFolder

WORLD = {"patients": 80, "codes": 12, "missed": 0.02, "codes_per_note": 3, "seed": 1}
QUIET = ["--report_to", "none", "--logging_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Every command of the road, run once."""
    folder = tmp_path_factory.mktemp("road")
    commands = [
        ["prepare-notes", "synthetic", "--output", "notes", "--options", json.dumps(WORLD)],
        ["fit-text-tokenizer", "--data", "notes", "--output", "tokenizer", "--vocabulary", "word", "--vocab_size",
         "500"],
        ["pretrain", "ehrbert", "--data", "notes", "--tokenizer", "tokenizer", "--output_dir", "encoder", "--preset",
         "tiny", "--max_length", "128", "--max_steps", "2", *QUIET],
        ["finetune", "ehrbert", "--data", "notes", "--model", "encoder", "--output_dir", "coder", "--max_length",
         "128", "--max_steps", "2", "--auto_code_precision", "0.5", *QUIET],
        ["evaluate-evidence", "--model", "coder", "--output", "evaluation", "--notes", "3"],
        ["highlight", "--model", "coder", "--note", "note.txt", "--output", "note.html"],
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "note.txt").write_text("Known asthma. Hip fracture on the left side, operated on Monday.")
        assert [main(words) for words in commands] == [0] * len(commands)
    return folder


def test_the_road_ends_in_a_coder_with_a_threshold_for_each_code(road):
    model = AutoModelForSequenceClassification.from_pretrained(road / "coder")
    codes = set(NoteFolder.open(road / "notes").codes()["code"].to_pylist())
    assert set(model.config.thresholds) == set(model.config.auto_code_thresholds) == set(model.config.label2id)
    assert set(model.config.label2id) <= codes


def test_no_folder_but_the_prepared_one_holds_notes(road):
    text = next(NoteFolder.open(road / "notes").notes())["text"][0].as_py()[:60].encode()
    for name in ("tokenizer", "encoder", "coder"):
        files = [path for path in (road / name).rglob("*") if path.is_file()]
        assert files
        assert not any(text in path.read_bytes() for path in files)
        assert not (road / name / "examples").exists()


def test_copies_across_splits_are_counted_aloud_and_named_in_the_prepared_folder(tmp_path, capsys):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{number}" for number in rng.integers(0, 3000, 60)) for _ in range(30)]
    texts += [*texts[:9], texts[9].upper(), "a note of its own " * 12]
    splits = ["train"] * 30 + ["test"] * 11
    raw = {"note_id": [f"n{i}" for i in range(41)], "subject_id": range(41), "split": splits, "text": texts}
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(raw), tmp_path / "raw" / "notes.parquet")
    labels = {"note_id": raw["note_id"], "code": ["ICD10CM/I10"] * 41}
    pq.write_table(pa.table(labels), tmp_path / "raw" / "labels.parquet")
    prepared = str(tmp_path / "prepared")
    assert main(["prepare-notes", "table", "--input", str(tmp_path / "raw"), "--output", prepared]) == 0
    train = set(split_notes(NoteFolder.open(prepared))["train"].to_pylist())
    copied = {(f"n{30 + i}", f"n{i}") for i in range(10) if f"n{i}" in train}  # the others are validation notes
    assert 0 < len(copied) < 10
    capsys.readouterr()
    assert main(["check-notes", "--data", prepared]) == 0
    said = capsys.readouterr().out
    assert f"test: 11 notes\n  {len(copied)} are nearly the same as a training note" in said
    assert "n30" not in said
    pairs = pq.read_table(tmp_path / "prepared" / "near_copies.parquet").to_pylist()
    assert {(pair["note_id"], pair["train_note_id"]) for pair in pairs} == copied


def test_evidence_stands_beside_what_needs_no_model(road):
    table = (road / "evaluation" / "evidence.md").read_text()
    assert all(row in table for row in ("label attention", "random", "string match", "ceiling"))


def test_the_page_holds_the_note_and_its_codes(road):
    page = (road / "note.html").read_text()
    assert all(word in page for word in ("Hip", "fracture", "operated"))  # the text is there in pieces
    model = AutoModelForSequenceClassification.from_pretrained(road / "coder")
    assert any(code in page for code in model.config.label2id)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare-notes", "--output", "x"], "SOURCE is missing"),
        (["prepare-notes", "csv", "--output", "x"], "`source` must be one of"),
        (["prepare-notes", "table", "--output", "x"], "`input_dir`"),
        (["fit-text-tokenizer", "--data", "nowhere", "--output", "x"], "must hold `dataset.json`"),
        (["fit-text-tokenizer", "--data", "nowhere", "--output", "x", "--vocabulary", "bpe"], "`vocabulary` must be"),
        (["pretrain", "ehrbert", "--data", "nowhere", "--output_dir", "x", "--report_to", "none"], "`dataset.json`"),
        (["finetune", "ehrbert", "--data", "x", "--model", "x", "--output_dir", "x", "--head", "y"], "`head` must be"),
        (
            ["finetune", "ehrbert", "--data", "x", "--model", "x", "--output_dir", "x", "--train_notes", "-5"],
            "`train_notes` must be at least 1",
        ),
        (
            ["finetune", "ehrbert", "--data", "x", "--model", "x", "--output_dir", "x", "--label_init", "y"],
            "`label_init` must be one of",
        ),
        (["evaluate-evidence", "--model", "nowhere", "--output", "x"], "coder.json is missing"),
        (["evaluate-coder", "--model", "nowhere", "--output", "x"], "coder.json is missing"),
        (["highlight", "--model", "nowhere", "--note", "nothing.txt", "--output", "x"], "`note` must be a text file"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_each_model_has_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "ehrbert", "--help"])
    assert stop.value.code == 0
    assert f"example: hf-ehr {command} ehrbert" in capsys.readouterr().out.replace("\n", " ")
