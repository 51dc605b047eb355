"""Taggers of named entities by the commands: spans, tables of entities, i2b2 files, encoders, evaluation."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertModel, TrainingArguments

from hf_ehr import GBertConfig, MedMPLMConfig, MedMPLMForPreTraining, MedMPLMProcessor
from hf_ehr.cli.main import main
from hf_ehr.entity_datasets import entities_by_note
from hf_ehr.entity_evaluation import write_entity_table
from hf_ehr.entity_tags import Entity
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.named_entities import entity_scores
from hf_ehr.notes import prepare_notes
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import LeakageError
from hf_ehr.training.entities import (
    EntityArguments,
    EntityTrainArguments,
    _window_f1,
    new_tagger,
    tag_notes,
    tagged_notes,
    tagger_tokenizer,
    train_tagger,
)

QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--logging_strategy", "no", "--save_strategy",
         "no"]  # fmt: skip


def settings(folder, **options) -> TrainingArguments:
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 8, "learning_rate": 2e-2, "num_train_epochs": 3, "use_cpu": True}
    return TrainingArguments(str(folder), **(quiet | sizes | options))


PROBLEMS = ("chest pain", "asthma", "fever", "back pain", "renal failure")
DRUGS = ("aspirin", "insulin", "heparin")


def write(folder, patients: int = 90):
    """Notes of one sentence each for a problem and a drug; where they stand is known."""
    rng = np.random.default_rng(0)
    notes, labels, spans = [], [], []
    for subject in range(patients):
        problem, drug = PROBLEMS[rng.integers(5)], DRUGS[rng.integers(3)]
        text = f"The patient came in because of {problem} in the morning. She was given {drug} and went home well."
        notes.append({"note_id": f"n{subject}", "subject_id": subject, "text": text})
        labels.append({"note_id": f"n{subject}", "code": "ICD10CM/R50.9"})
        for name, kind in ((problem, "term"), (drug, "sign")):
            start = text.index(name)
            span = {"start": start, "end": start + len(name), "kind": kind}
            spans.append({"note_id": f"n{subject}", "code": "ICD10CM/R50.9", **span})
    (folder / "raw").mkdir(parents=True)
    for name, rows in {"notes": notes, "labels": labels, "spans": spans}.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / "raw" / f"{name}.parquet")
    prepare_notes("table", folder / "raw", folder / "data", shards=1)
    return EntityArguments(str(folder / "data"), max_length=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    options = EntityTrainArguments(preset="tiny", min_patients=2)
    return options, train_tagger(data, options, settings(folder, num_train_epochs=4))


def test_a_tagger_of_words_finds_entities_of_patients_it_has_not_seen(data, trained):
    _, folder = trained
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    splits = data.splits()
    notes, entities = data.part(splits["test"])
    tags = [model.config.id2label[place] for place in range(model.num_labels)]
    assert tags == ["O", "B-problem", "I-problem", "B-treatment", "I-treatment"]
    examples = tagged_notes(data, splits["test"], tokenizer, tags).remove_columns("labels")
    scores = entity_scores(entities_by_note(notes, entities), tag_notes(model, examples, tokenizer))
    assert scores["f1"] > 0.9
    subjects = {name: set(data.part(ids)[0]["subject_id"].to_pylist()) for name, ids in splits.items()}
    assert not subjects["train"] & (subjects["test"] | subjects["validation"])
    assert not (folder / "examples").exists()


def test_an_evaluation_stands_beside_the_dictionary_and_its_card_opens(data, trained, tmp_path):
    _, folder = trained
    assert main(["evaluate", "--model", str(folder), "--output", str(tmp_path), "--debug"]) == 0
    content = json.loads((tmp_path / "table.json").read_text())
    rows = {row["model"]: row["metrics"] for row in content["rows"]}
    assert list(rows) == ["Dictionary", "BiLSTM-CRF"]
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    notes, entities = data.part(data.splits()["test"])
    tags = [model.config.id2label[place] for place in range(model.num_labels)]
    examples = tagged_notes(data, data.splits()["test"], tokenizer, tags)
    expected = entity_scores(entities_by_note(notes, entities), tag_notes(model, examples, tokenizer))
    for name in ("f1", "f1 (problem)", "recall (treatment)", "f1_macro"):
        assert rows["BiLSTM-CRF"][name]["value"] == pytest.approx(expected[name])
    assert "prove nothing" in (tmp_path / "table.md").read_text()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "named-entity-recognition" in card
    assert "max_length=16" in card
    with pytest.raises(ValueError, match="recommend no drugs"):
        main(["evaluate", "--model", str(folder), "--output", str(tmp_path), "--ddi", "x.csv", "--debug"])


def test_a_finished_run_is_not_repeated_and_another_does_not_take_its_folder(data, trained):
    options, folder = trained
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_tagger(data, options, settings(folder, num_train_epochs=4)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(EhrDataError, match="another"):
        train_tagger(data, options, settings(folder, num_train_epochs=5))


# Encoders


@pytest.fixture(scope="module")
def medmplm(data, tmp_path_factory):
    """A MedM-PLM whose text encoder reads the words of the training notes."""
    notes = data.part(data.splits()["train"])[0]
    words = tagger_tokenizer(notes, EntityTrainArguments(min_patients=2), 64)
    codes = [EhrCodeTokenizer.from_codes([code], kinds=[kind]) for kind, code in
             (("diagnoses", "ICD10CM/I10"), ("medications", "ATC/A10B"))]  # fmt: skip
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    note = {"model_type": "bert", "vocab_size": len(words), "max_position_embeddings": 64} | sizes
    tokens = [one.convert_ids_to_tokens(list(range(len(one)))) for one in codes]
    torch.manual_seed(1)
    config = MedMPLMConfig.tiny(note_config=note, code_config=GBertConfig.from_vocabularies(*tokens, hidden_size=32))
    folder = tmp_path_factory.mktemp("medmplm")
    MedMPLMForPreTraining(config).save_pretrained(folder)
    MedMPLMProcessor(*codes, words).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("freeze", [True, False])
def test_the_text_encoder_of_a_medm_plm_is_taken_and_left_alone_where_it_is_frozen(data, medmplm, tmp_path, freeze):
    words = ["finetune", "ehrtagger", "--data", data.data, "--encoder", str(medmplm), "--preset", "tiny",
             "--freeze_encoder", str(freeze), "--max_length", "16", "--max_steps", "2", "--learning_rate", "1e-2",
             "--output_dir", str(tmp_path), *QUIET]  # fmt: skip
    assert main([*words, "--debug"]) == 0
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    source = MedMPLMForPreTraining.from_pretrained(medmplm).medmplm.note_encoder.state_dict()
    own = model.model.note_encoder.state_dict()
    assert own.keys() <= source.keys()
    assert all(torch.equal(value, source[name]) for name, value in own.items()) == freeze
    assert model.config.freeze_note_encoder == freeze


def test_any_encoder_is_taken_and_one_that_reads_too_few_tokens_is_refused(data, medmplm, tmp_path):
    words = MedMPLMProcessor.from_pretrained(medmplm).note_tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes))
    bert.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    options = EntityTrainArguments(encoder=str(tmp_path), preset="tiny")
    tokenizer = tagger_tokenizer(data.part(data.splits()["train"])[0], options, 32)
    tags = ["O", "B-problem", "I-problem"]
    model = new_tagger(options, tokenizer, tags, 32, 0)
    own = model.model.note_encoder.state_dict()
    assert all(torch.equal(value, bert.state_dict()[name]) for name, value in own.items())
    with pytest.raises(ValueError, match="at most the text encoder's 32"):
        new_tagger(options, tokenizer, tags, 64, 0)


# Other corpora


def test_i2b2_files_are_read_and_split(tmp_path):
    for folder in ("texts", "concepts"):
        (tmp_path / folder).mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"n{number:02}.txt").write_text("has chest pain\non aspirin\n")
        lines = 'c="chest pain" 1:1 1:2||t="problem"\nc="aspirin" 2:1 2:1||t="treatment"\n'
        (tmp_path / "concepts" / f"n{number:02}.con").write_text(lines)
    data = EntityArguments(str(tmp_path / "texts"), str(tmp_path / "concepts"))
    splits = data.splits()
    assert sorted(note for part in splits.values() for note in part.to_pylist()) == [f"n{n:02}" for n in range(20)]
    assert data.manifest().source == "i2b2_2010"
    notes, entities = data.part(splits["test"])
    assert entities.num_rows == 2 * notes.num_rows
    assert not list((tmp_path / "texts").glob("*salt*"))


def test_a_table_of_entities_stands_in_for_spans(data, tmp_path):
    notes, _ = data.corpus
    first = notes.slice(0, 1)
    path = tmp_path / "entities.csv"
    path.write_text(f"type,note_id,start,end\ntest,{first['note_id'][0].as_py()},0,3\n")
    _, found = EntityArguments(data.data, str(path)).corpus
    assert found.to_pylist() == [{"note_id": first["note_id"][0].as_py(), "start": 0, "end": 3, "type": "test"}]
    path.write_text("note_id,start,end\nx,0,3\n")
    with pytest.raises(EhrDataError, match="lacks \\['type'\\]"):
        EntityArguments(data.data, str(path)).corpus  # noqa: B018 - it is read when asked for


def test_an_encoder_that_saw_the_patients_is_refused(data, medmplm, tmp_path):
    other = EntityArguments(data.data, split_seed=1, max_length=16)
    other.manifest().save(medmplm / "splits.json")
    try:
        with pytest.raises(LeakageError):
            train_tagger(data, EntityTrainArguments(encoder=str(medmplm)), settings(tmp_path))
    finally:
        (medmplm / "splits.json").unlink()


# By hand


def test_validation_f1_counts_entities_of_windows():
    """Two windows: one entity right, one cut short, one invented."""
    names = dict(enumerate(["O", "B-a", "I-a"]))
    labels = np.array([[-100, 1, 2, 0, -100], [-100, 1, 2, 0, 0]])
    tags = np.array([[-100, 1, 2, 0, -100], [-100, 1, 0, 0, 1]])
    assert _window_f1(labels, tags, names) == pytest.approx(2 * 1 / (3 + 2))
    assert _window_f1(labels, np.where(labels < 0, -100, 0), names) == 0.0


def test_a_table_says_by_type_what_was_found_and_judges_only_with_patients_enough(tmp_path):
    truth = [[Entity(0, 3, "a"), Entity(4, 6, "b")] for _ in range(60)]
    half = [given[:1] for given in truth]
    rows = {"Dictionary": half, "BiLSTM-CRF": truth}
    table, own = write_entity_table(rows, truth, np.arange(60), tmp_path, "made", [])
    assert own["f1"].value == 1
    text = table.read_text()
    assert "+0.333" in text  # 1 - 2/3
    assert ": higher." in text
    assert "| Dictionary (b) | 60 |" in text
    table, _ = write_entity_table(rows, truth, np.arange(60) // 2, tmp_path, "made", [])
    assert ": no difference shown." in table.read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntityTrainArguments(preset="huge"), "`preset` must be base or tiny"),
        (lambda: EntityTrainArguments(freeze_encoder=True), "`freeze_encoder` must be left out"),
    ],
)
def test_options_without_a_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_notes_without_entities_are_refused(tmp_path):
    notes = pa.table({"note_id": ["a", "b"], "subject_id": [1, 2], "text": ["no words " * 9, "other words " * 9]})
    labels = pa.table({"note_id": ["a"], "code": ["ICD10CM/I10"]})
    (tmp_path / "raw").mkdir()
    pq.write_table(notes, tmp_path / "raw" / "notes.parquet")
    pq.write_table(labels, tmp_path / "raw" / "labels.parquet")
    prepare_notes("table", tmp_path / "raw", tmp_path / "data", shards=1)
    with pytest.raises(EhrDataError, match="notes with spans"):
        EntityArguments(str(tmp_path / "data")).corpus  # noqa: B018 - it is read when asked for
