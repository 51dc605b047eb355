"""From prepared admissions to a classifier: what is learned in stage 2, what it is learned on, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoProcessor, BertConfig, BertModel, TrainingArguments

from hf_ehr import EhrCodeTokenizer, MedHMPForAdmissionPreTraining, MedHMPForStayClassification
from hf_ehr.metrics import auroc
from hf_ehr.models.processing_medhmp import MedHMPProcessor
from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name, shard_paths
from hf_ehr.tasks.audit import LeakageError
from hf_ehr.training.admissions import (
    HIDDEN_SHARE,
    STAGE2_RECIPE,
    AdmissionFinetuneArguments,
    AdmissionPretrainArguments,
    admission_processor,
    finetune_admissions,
    frozen_notes,
    labelled_admissions,
    new_admission_classifier,
    new_admission_model,
    predict_admissions,
    pretrain_admissions,
)
from hf_ehr.training.stays import StayArguments, StayFinetuneArguments, StayPretrainArguments, pretrain_stays
from hf_ehr.training.stays import finetune_stays as tune_stays
from tests.builders import day, patient, records, visit

FEATURES = json.dumps({"min_patients": 2, "form": "continuous", "demographics": ["age", "sex"], "n_hours": 8})
TINY = json.dumps({"hidden_size": 16, "demographics_hidden_size": 8, "intermediate_size": 16})
STAGE1 = StayPretrainArguments("tiny", TINY, feature_options=FEATURES)
STAGE2 = AdmissionPretrainArguments("tiny", TINY, feature_options=FEATURES, min_patients=2, chunk_size=32)
TASK = "readmitted"
LEARNING = {"num_train_epochs": 20, "learning_rate": 2e-2}
WORDS = ("stable", "weak", "alert", "confused")
STAYS = "medhmp.stay_encoder."


def settings(folder, **options) -> TrainingArguments:
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 64, "learning_rate": 5e-3, "num_train_epochs": 1, "use_cpu": True}
    return TrainingArguments(str(folder), **(quiet | sizes | options))


def with_options(options, **fields):
    """Stage 2 with further fields of the configuration."""
    return replace(options, model_options=json.dumps(json.loads(options.model_options) | fields))


ALONE = with_options(STAGE2, masked_code_weight=0, hidden_dropout_prob=0)
"""The contrastive loss alone, without dropout: nothing is drawn."""
TWO_RANKS = Path(__file__).parent / "scripts" / "stage2.py"


def write(folder, change=()):
    """200 patients of four groups, which decide codes, drugs, heart rate, note, and the outcome."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for subject in range(1, 201):
        group = int(rng.integers(4))
        hours = np.sort(rng.uniform(0, 7, 5))
        values = 60 + 20 * group + rng.normal(0, 3, 5) + 300 * (subject in change)
        measured = [
            {"hour": float(hour), "name": "X/HR", "value": float(value), "text": None}
            for hour, value in zip(hours, values, strict=True)
        ]
        fields = {
            "diagnoses": [f"ICD10CM/{'ABCD'[group]}0{n}" for n in rng.permutation(6)[:4]],
            "medications": [f"ATC/{'ABCD'[group]}0{n}" for n in rng.permutation(6)[:4]],
            "stays": [{"stay_id": subject, "start": day(1), "end": day(1.5), "measurements": measured}],
            "notes": [{"time": day(1.2), "category": "Nursing", "text": f"patient {WORDS[group]}"}],
        }
        rows.append(patient(subject, [visit(0, 8, **fields)], sex="F"))
        outcome = (group >= 2) != (rng.random() < 0.05)
        labels.append({"subject_id": subject, "prediction_time": day(8), "boolean_value": outcome})
        labels.append({"subject_id": subject, "prediction_time": day(1.25), "boolean_value": outcome})
    (folder / "records").mkdir(parents=True)
    (folder / "labels").mkdir()
    for shard in range(2):
        part = records(*(row for row in rows if row["subject_id"] % 2 == shard))
        pq.write_table(part, folder / "records" / shard_name(shard, 2))
    for name, asked in ((TASK, labels[::2]), ("early", labels[1::2])):
        table = pa.Table.from_pylist(asked, schema=LABEL_SCHEMA)
        pq.write_table(table, folder / "labels" / f"{name}.parquet")
    DatasetInfo("made", {}, 2, "calendar").save(folder)
    return StayArguments(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("admissions") / "data")


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    pretrain_stays(data, STAGE1, settings(folder, num_train_epochs=2))
    return folder


@pytest.fixture(scope="module")
def stage2(data, stage1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage2")
    options = replace(STAGE2, stays=str(stage1))
    return folder, pretrain_admissions(data, options, settings(folder, **LEARNING))


@pytest.fixture(scope="module")
def classifier(data, stage2, tmp_path_factory):
    options = AdmissionFinetuneArguments(TASK, str(stage2[0]))
    return finetune_admissions(data, options, settings(tmp_path_factory.mktemp("classifier"), num_train_epochs=5))


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=12, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    EhrCodeTokenizer.from_codes(["patient", *WORDS]).save_pretrained(folder)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_hidden_codes_and_matching_modalities_are_found_better_than_by_guessing(stage2):
    figures = stage2[1]
    assert figures["masked_code_loss"] < 0.85 * figures["frequency_loss"]
    assert figures["recall_at_10"] > 1.5 * figures["frequency_recall_at_10"]
    assert figures["contrastive_accuracy"] > 2 * figures["contrastive_chance"]


def test_every_tensor_of_the_stay_encoder_is_carried_from_stage_1_to_stage_2(data, stage1, stage2, tmp_path):
    still = settings(tmp_path, learning_rate=0.0)
    pretrain_admissions(data, replace(STAGE2, stays=str(stage1)), still)
    earlier, carried, learned = weights(stage1), weights(tmp_path), weights(stage2[0])
    names = [name for name in carried if name.startswith(STAYS)]
    assert set(names) == {name for name in earlier if name.startswith(STAYS)}
    assert len(names) > 15
    assert all(torch.equal(earlier[name], carried[name]) for name in names)
    assert any(not torch.equal(earlier[name], learned[name]) for name in names)  # which stage 2 trains further


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"hidden_size": 32}, "of the model's shape"), ({"num_attention_heads": 2}, "in num_attention_heads"),
     ({"use_ffn": False}, "in use_ffn")], ids=["size", "heads", "ffn"],
)  # fmt: skip
def test_a_stay_encoder_that_cannot_be_carried_whole_is_refused(data, stage1, tmp_path, fields, message):
    options = with_options(replace(STAGE2, stays=str(stage1)), **fields)
    with pytest.raises(ValueError, match=message):
        pretrain_admissions(data, options, settings(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_the_memory_of_a_chunk_changes_nothing(data, tmp_path):
    """The contrastive loss, whose negatives lie in all chunks; hidden codes are drawn chunk by chunk."""
    for size in (24, 64):
        pretrain_admissions(data, replace(ALONE, chunk_size=size), settings(tmp_path / str(size)))
    one, other = weights(tmp_path / "24"), weights(tmp_path / "64")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("off", "figure", "untouched"),
    [("masked_code_weight", "recall_at_10", "diagnosis_head"), ("contrastive_weight", "contrastive_accuracy", None)],
)
def test_a_weight_of_0_takes_a_loss_away(data, stage2, tmp_path, off, figure, untouched):
    options = with_options(STAGE2, **{off: 0})
    figures = pretrain_admissions(data, options, settings(tmp_path))
    assert figure in stage2[1]
    assert figure not in figures
    assert len(figures) > 1
    if untouched is not None:
        processor = admission_processor(data, options, data.splits()["train"])
        start = new_admission_model(options, processor, 42).state_dict()
        found = weights(tmp_path)
        assert all(torch.equal(found[name], start[name]) for name in found if name.startswith(untouched))
        assert any(not torch.equal(found[name], start[name]) for name in found)


def test_a_classifier_ranks_test_admissions_and_its_folder_is_enough(data, classifier):
    model, processor = (
        AutoModelForSequenceClassification.from_pretrained(classifier),
        AutoProcessor.from_pretrained(classifier),
    )
    assert isinstance(processor, MedHMPProcessor)
    options = AdmissionFinetuneArguments(TASK, str(classifier))
    examples = labelled_admissions(data, options, processor, data.splits(), "test")
    truth, scores = np.asarray(examples["labels"]), predict_admissions(model, examples)
    assert 0 < truth.sum() < len(truth)
    assert auroc(truth, scores) > 0.85
    assert 0 < model.config.thresholds[TASK] < 1
    assert model.config.id2label[1] == TASK
    assert not (classifier / "examples").exists()
    assert sorted(examples["subject_id"]) == sorted(data.splits()["test"].tolist())


def test_a_raw_admission_has_the_probability_of_its_example(data, classifier):
    model, processor = (
        AutoModelForSequenceClassification.from_pretrained(classifier),
        AutoProcessor.from_pretrained(classifier),
    )
    options = AdmissionFinetuneArguments(TASK, str(classifier))
    examples = labelled_admissions(data, options, processor, data.splits(), "test").select(range(4))
    people = pa.concat_tables(pq.read_table(path) for path in shard_paths(data.data, "records"))
    rows = {row["subject_id"]: row for row in people.to_pylist()}
    raw = []
    for subject in examples["subject_id"]:
        person = rows[subject]
        seen = person["visits"][0]
        (stay,) = seen["stays"]
        age = (stay["start"] - person["birth_time"]).days / 365.25
        one = {"hours": 12, "measurements": stay["measurements"], "demographics": {"age": age, "sex": person["sex"]}}
        raw.append({"stays": [one], "diagnoses": seen["diagnoses"], "medications": seen["medications"]})
    with torch.no_grad():
        scores = model(**processor(raw)).logits.softmax(dim=1)[:, 1]
    np.testing.assert_allclose(scores.numpy(), predict_admissions(model, examples), atol=1e-5)


@pytest.mark.slow
def test_test_patients_leave_no_trace(data, tmp_path):
    pretrain_admissions(data, STAGE2, settings(tmp_path / "one"))
    changed = write(tmp_path / "data", change=set(data.splits()["test"].tolist()))
    pretrain_admissions(changed, STAGE2, settings(tmp_path / "changed"))
    again = write(tmp_path / "other", change=set(data.splits()["train"].tolist()[:5]))
    pretrain_admissions(again, STAGE2, settings(tmp_path / "again"))
    one, same, other = (weights(tmp_path / name) for name in ("one", "changed", "again"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_another_split_is_refused(data, stage1, stage2, tmp_path):
    moved = StayArguments(data.data, split_seed=1)
    with pytest.raises(LeakageError):
        finetune_admissions(moved, AdmissionFinetuneArguments(TASK, str(stage2[0])), settings(tmp_path / "a"))
    with pytest.raises(LeakageError):
        pretrain_admissions(moved, replace(STAGE2, stays=str(stage1)), settings(tmp_path / "b"))


def test_a_stay_classifier_starts_from_the_stay_encoder_of_stage_2(data, stage2, tmp_path):
    options = StayFinetuneArguments("early", str(stage2[0]), linear_probe=False)
    folder = tune_stays(data, options, settings(tmp_path, learning_rate=0.0))
    tuned, source = weights(folder), weights(stage2[0])
    names = [name for name in tuned if name.startswith(STAYS)]
    assert len(names) > 15
    assert all(torch.equal(tuned[name], source[name]) for name in names)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(folder), MedHMPForStayClassification)


def test_a_frozen_text_encoder_is_kept_as_it_was_and_its_vectors_are_those_of_the_tokens(data, text_encoder, tmp_path):
    options = replace(STAGE2, note_encoder=str(text_encoder), note_max_length=8)
    pretrain_admissions(data, options, settings(tmp_path))
    model = MedHMPForAdmissionPreTraining.from_pretrained(tmp_path)
    original = BertModel.from_pretrained(text_encoder).state_dict()
    found = model.medhmp.note_encoder.state_dict()
    assert found
    assert all(torch.equal(value, original[name]) for name, value in found.items())
    processor = MedHMPProcessor.from_pretrained(tmp_path)
    assert processor.note_tokenizer.model_max_length == 8
    tuning = AdmissionFinetuneArguments(TASK, str(tmp_path))
    classifier = new_admission_classifier(tuning, 0).eval()
    tokens, vectors = (
        labelled_admissions(data, tuning, processor, data.splits(), "validation", note_vectors=made)
        for made in (None, frozen_notes(classifier, processor))
    )
    assert "note_input_ids" in tokens.column_names
    assert "note_vector" in vectors.column_names
    np.testing.assert_allclose(
        predict_admissions(classifier, tokens), predict_admissions(classifier, vectors), atol=1e-5
    )
    bare = tokens.remove_columns("note_input_ids")
    assert np.abs(predict_admissions(classifier, bare) - predict_admissions(classifier, tokens)).max() > 1e-3


@pytest.mark.slow
def test_an_untrained_model_keeps_its_text_encoder_and_nothing_else(data, text_encoder, tmp_path):
    options = replace(STAGE2, note_encoder=str(text_encoder), note_max_length=8)
    pretrain_admissions(data, options, settings(tmp_path))
    tuning = AdmissionFinetuneArguments(TASK, str(tmp_path))
    trained, fresh = (
        new_admission_classifier(replace(tuning, untrained=untrained), 0).state_dict() for untrained in (False, True)
    )
    kept = {name for name in trained if torch.equal(trained[name], fresh[name])}
    assert {name for name in trained if ".note_encoder." in name} <= kept
    assert not [
        name for name in kept if name.endswith("weight") and ".note_encoder." not in name and "norm" not in name
    ]


def test_a_finished_run_is_not_run_again_and_another_is_refused(data, stage1, stage2):
    options = replace(STAGE2, stays=str(stage1))
    made = (stage2[0] / "model.safetensors").stat().st_mtime_ns
    assert pretrain_admissions(data, options, settings(stage2[0], **LEARNING)) == stage2[1]
    assert (stage2[0] / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(EhrDataError, match="another"):
        pretrain_admissions(data, replace(options, min_patients=3), settings(stage2[0], **LEARNING))


@pytest.mark.parametrize(
    ("fields", "training", "message"),
    [
        ({"chunk_size": 0}, {}, "`chunk_size` must be at least 1"),
        ({"stays": "a", "features": "b"}, {}, "`features` must be left out"),
        ({"hidden_variables": 0.5}, {}, "`hidden_variables` must be 0 in stage 2"),
        ({}, {"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` must be 1"),
        ({"preset": "huge"}, {}, "`preset` must be one of base, paper, tiny"),
    ],
    ids=["chunk", "features", "variables", "accumulation", "preset"],
)
def test_options_that_cannot_be_are_refused(data, tmp_path, fields, training, message):
    with pytest.raises(ValueError, match=message):
        pretrain_admissions(data, replace(STAGE2, **fields), settings(tmp_path, **training))


def test_a_note_longer_than_the_text_encoder_reads_is_refused(data, text_encoder, tmp_path):
    with pytest.raises(ValueError, match="at most the text encoder's 16, got 512"):
        pretrain_admissions(data, replace(STAGE2, note_encoder=str(text_encoder)), settings(tmp_path))


CRASHING = """
import sys
from dataclasses import replace
from tests.test_admission_training import STAGE2, StayArguments, pretrain_admissions, settings
output, options = sys.argv[2], {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 12}
pretrain_admissions(StayArguments(sys.argv[1]), STAGE2, settings(output, **options))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(data, tmp_path):
    """Masks, dropout and the order of admissions included."""
    saving = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 12}
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING, data.data, str(tmp_path / "killed")], cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json"))
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    for name in ("killed", "whole"):
        pretrain_admissions(data, STAGE2, settings(tmp_path / name, **saving))
    resumed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert not list((tmp_path / "killed").glob("checkpoint-*"))


@pytest.mark.slow
def test_two_ranks_with_half_a_batch_each_take_the_steps_of_one(data, tmp_path):
    """Without dropout and hidden codes, of which each rank draws its own: every admission is the others' negative."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(TWO_RANKS)]
    done = subprocess.run(
        [*command, data.data, str(tmp_path / "two")], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pretrain_admissions(data, ALONE, settings(tmp_path / "one", max_steps=2, optim="sgd"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-3, msg=name)
    assert json.loads((tmp_path / "two" / "pretraining.json").read_text())["held_out"]


def test_the_recipe_is_the_papers():
    assert STAGE2_RECIPE == {
        "learning_rate": 2e-5, "per_device_train_batch_size": 4096, "num_train_epochs": 300, "weight_decay": 1e-8
    }  # fmt: skip
    assert HIDDEN_SHARE == 0.15
    config = MedHMPForAdmissionPreTraining.config_class()
    assert (config.contrastive_weight, config.contrastive_temperature) == (0.1, 0.1)
