"""From prepared visits to pre-trained models and classifiers of three tasks (papers.md §2, rows 34, 37-39, 42)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

from hf_ehr import GBertConfig, GBertModel, MedMPLMConfig, MedMPLMModel, MedMPLMProcessor
from hf_ehr.metrics import auroc
from hf_ehr.recommendation import recommendation_metrics
from hf_ehr.schema import DatasetInfo, EhrDataError, shard_name
from hf_ehr.tasks.audit import LeakageError
from hf_ehr.training._visit_fitting import maskings
from hf_ehr.training._visit_models import new_visit_classifier
from hf_ehr.training.visits import (
    VisitArguments,
    VisitFinetuneArguments,
    VisitPretrainArguments,
    asked_visits,
    finetune_visits,
    fit_visit_processor,
    held_out_visits,
    label_names,
    labelled_visits,
    new_visit_model,
    predict_visits,
    pretrain_visits,
    take_code_encoder,
    visit_processor,
)
from hf_ehr.visit_collators import VisitCollator
from hf_ehr.visit_datasets import build_visit_examples
from tests.builders import day, patient, records, visit

DIAGNOSES = [f"ICD10CM/{letter}1{digit}" for letter in "ABCD" for digit in range(3)]
DRUGS = ["ATC/A01A", "ATC/B01A", "ATC/C01A", "ATC/D01A", "ATC/N02B"]
OPTIONS = VisitPretrainArguments(preset="tiny", min_patients=2, note_max_length=16, note_vocab_size=60)


def settings(folder, **options) -> TrainingArguments:
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "num_train_epochs": 2, "use_cpu": True}
    return TrainingArguments(str(folder), **(quiet | sizes | options))


def write(folder, change=(), patients=100):
    """Patients of three visits: a disease has its codes and its drug, pain of the earlier note another drug.

    Those of `change` have other codes and words. A patient who is tired at the end is readmitted.
    """
    rng = np.random.default_rng(0)
    rows = []
    for subject in range(1, patients + 1):
        visits, start, pain = [], 0.0, False
        for number in range(3):
            disease, tired = int(rng.integers(4)), bool(rng.random() < 0.4)
            codes = [DIAGNOSES[3 * disease + place] for place in rng.permutation(3)[:2]]
            drugs = [DRUGS[disease], *([DRUGS[4]] if pain else [])]
            pain = bool(rng.random() < 0.5)
            words = f"{'severe pain' if pain else 'feels fine'} and {'tired' if tired else 'awake'}"
            if subject in change:
                codes, drugs, words = DIAGNOSES[:1], DRUGS[:1], "nothing new"
            end = start + 3
            written = {"time": day(end), "category": "Discharge summary", "text": words}
            fields = {"diagnoses": codes, "medications": drugs, "notes": [written], "visit_id": 10 * subject + number}
            visits.append(visit(start, end, **fields))
            start = end + (10 if tired else 90)
        rows.append(patient(subject, visits))
    (folder / "records").mkdir(parents=True)
    for shard in range(2):
        part = records(*(row for row in rows if row["subject_id"] % 2 == shard))
        pq.write_table(part, folder / "records" / shard_name(shard, 2))
    DatasetInfo("made", {}, 2, "calendar").save(folder)
    return VisitArguments(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("visits") / "data")


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, pretrain_visits(data, OPTIONS, settings(folder))


@pytest.fixture(scope="module")
def recommender(data, pretrained, tmp_path_factory):
    options = VisitFinetuneArguments("medication_recommendation", str(pretrained[0]))
    return options, finetune_visits(data, options, settings(tmp_path_factory.mktemp("drugs"), num_train_epochs=8))


def test_pretraining_reports_every_source_of_codes(pretrained):
    kinds = ("diagnosis", "medication")
    names = {f"{kind}_from_{source}" for kind in kinds for source in (*kinds, "note")}
    assert set(pretrained[1]) == names | {f"{kind}_by_frequency" for kind in kinds} | {"loss"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["visit_bce", "masked_ce"])
def test_codes_are_predicted_from_codes_and_from_notes(data, tmp_path, loss):
    options = replace(OPTIONS, model_options=json.dumps({"pretraining_loss": loss}))
    figures = pretrain_visits(data, options, settings(tmp_path, num_train_epochs=20))
    # A disease has three codes, of which two are there, and one drug.
    assert figures["diagnosis_from_diagnosis"] > 2 * figures["diagnosis_by_frequency"]
    assert figures["medication_from_diagnosis"] > figures["medication_by_frequency"] + 0.2
    assert figures["diagnosis_from_note"] > 1.5 * figures["diagnosis_by_frequency"]


@pytest.mark.slow
def test_pretraining_overfits_64_visits(tmp_path):
    small = write(tmp_path / "data", patients=32)
    options = replace(OPTIONS, min_patients=1)
    processor = fit_visit_processor(small.data, small.splits()["train"], min_patients=1, note_max_length=16)
    visits = build_visit_examples(small.data, processor, subject_ids=small.splits()["train"]).select(range(64))
    model = new_visit_model(options, processor, seed=0)
    collate = VisitCollator.of(model.config, masking=maskings(processor, 0))
    Trainer(
        model,
        settings(tmp_path, num_train_epochs=180, learning_rate=3e-3, remove_unused_columns=False),
        collate,
        train_dataset=visits,
    ).train()
    figures = held_out_visits(model, visits, processor)
    # Not drugs from drugs: of the one or two of a visit one is always chosen, and nothing else of the set tells it.
    for name in ("diagnosis_from_diagnosis", "diagnosis_from_note", "medication_from_diagnosis"):
        assert figures[name] > 0.9, name


@pytest.mark.slow
def test_test_patients_leave_no_trace(data, tmp_path):
    changes = {"same": (), "test": data.splits()["test"], "train": data.splits()["train"][:5]}
    weights = {}
    for name, subjects in changes.items():
        folder = write(tmp_path / f"{name}-data", change=set(map(int, subjects)))
        pretrain_visits(folder, OPTIONS, settings(tmp_path / name, num_train_epochs=1))
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    for name, equal in (("test", True), ("train", False)):
        assert all(torch.equal(value, weights[name][key]) for key, value in weights["same"].items()) == equal


def test_a_recommender_finds_the_drugs_of_test_visits_and_its_folder_is_enough(data, recommender):
    options, folder = recommender
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is MedMPLMProcessor
    assert type(model).__name__ == "MedMPLMForMedicationRecommendation"
    splits = data.splits()
    names = label_names(data, options, processor, splits["train"])
    assert sorted(names) == sorted(DRUGS)
    assert list(model.config.id2label.values()) == names
    examples = labelled_visits(data, options, processor, names, splits, "test")
    asked = asked_visits(examples, len(names))
    p = predict_visits(model, examples)
    assert p.shape == asked.truth.shape == (2 * len(splits["test"]), 5)
    (threshold,) = set(model.config.thresholds.values())
    figures = recommendation_metrics(asked.truth, p, threshold=threshold, previous=asked.previous)
    assert figures["average_precision_samples"] > 0.9
    assert figures["jaccard_samples"] > 0.6
    assert not (folder / "examples").exists()


def test_a_row_of_all_visits_and_a_row_a_label_are_scored_alike(data, recommender):
    options, folder = recommender
    model, processor = AutoModelForSequenceClassification.from_pretrained(folder), visit_processor(options)
    names = label_names(data, options, processor, data.splits()["train"])
    arguments = (options, processor, names, data.splits(), "test")
    together = labelled_visits(data, *arguments)
    alone = labelled_visits(replace(data, max_visits=2), *arguments)
    assert len(alone) > len(together)
    pairs = {
        (s, v): row for s, v, row in zip(*asked_visits(together, 5)[:2], predict_visits(model, together), strict=True)
    }
    # Rows of two visits hold less of the history, but of second visits all of it.
    for subject, number, row in zip(*asked_visits(alone, 5)[:2], predict_visits(model, alone), strict=True):
        if number % 10 == 1:
            np.testing.assert_allclose(row, pairs[subject, number], atol=1e-5)


def test_readmission_is_predicted_and_a_batch_of_one_equals_a_batch_of_many(data, pretrained, tmp_path):
    options = VisitFinetuneArguments("readmission_30d", str(pretrained[0]))
    folder = finetune_visits(data, options, settings(tmp_path / "model", learning_rate=3e-3, num_train_epochs=6))
    model, processor = AutoModelForSequenceClassification.from_pretrained(folder), visit_processor(options)
    assert type(model).__name__ == "MedMPLMForReadmission"
    splits = data.splits()
    examples = labelled_visits(data, options, processor, ["no", "readmission_30d"], splits, "test")
    assert set(examples["subject_id"]) <= set(splits["test"].tolist())
    truth, p = np.asarray(examples["labels"]), predict_visits(model, examples)
    assert auroc(truth, p) > 0.8
    assert 0 < model.config.thresholds["readmission_30d"] < 1
    p = predict_visits(model.double(), examples)  # logits of a regression on few rows are large: doubles
    single = [predict_visits(model, examples.select([row]))[0] for row in range(8)]
    np.testing.assert_allclose(single, p[:8], atol=1e-5)


def test_codes_are_assigned_from_text_and_drugs(data, pretrained, tmp_path):
    options = VisitFinetuneArguments("icd_coding_top5", str(pretrained[0]))
    folder = finetune_visits(data, options, settings(tmp_path / "model", num_train_epochs=8))
    model, processor = AutoModelForSequenceClassification.from_pretrained(folder), visit_processor(options)
    assert type(model).__name__ == "MedMPLMForICDCoding"
    splits = data.splits()
    names = label_names(data, options, processor, splits["train"])
    assert len(names) == 5
    assert set(names) <= set(DIAGNOSES)
    examples = labelled_visits(data, options, processor, names, splits, "test")
    assert "diagnosis_ids" not in examples.column_names
    asked, p = asked_visits(examples, 5), predict_visits(model, examples)
    assert p.shape == asked.truth.shape
    assert auroc(asked.truth.ravel(), p.ravel()) > 0.85
    assert set(model.config.thresholds) == set(names)


def test_codes_that_are_coded_are_the_frequent_ones_of_training_patients(data, pretrained):
    processor = MedMPLMProcessor.from_pretrained(pretrained[0])
    options = VisitFinetuneArguments("icd_coding_top3", str(pretrained[0]))
    counts: dict[str, int] = {}
    train = set(data.splits()["train"].tolist())
    for shard in range(2):
        for row in pq.read_table(f"{data.data}/records/{shard_name(shard, 2)}").to_pylist():
            for one in row["visits"] if row["subject_id"] in train else []:
                counts |= {code: counts.get(code, 0) + 1 for code in one["diagnoses"]}
    wanted = sorted(counts, key=lambda code: (-counts[code], code))[:3]
    assert label_names(data, options, processor, data.splits()["train"]) == wanted
    with pytest.raises(EhrDataError, match="at least 11 training patients"):
        label_names(data, options, processor, data.splits()["train"][:10])


def test_gbert_takes_every_tensor_of_the_code_encoder(data, pretrained, tmp_path):
    options = VisitFinetuneArguments("medication_recommendation", str(pretrained[0]), architecture="gbert")
    source = load_file(pretrained[0] / "model.safetensors")
    config = MedMPLMConfig.from_pretrained(pretrained[0]).code_config
    gbert = GBertModel(GBertConfig.from_dict(config.to_dict()))
    take_code_encoder(gbert, str(pretrained[0]))
    prefix = "medmplm.code_encoder."
    theirs = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
    assert len(theirs) > 10
    weights = gbert.state_dict()
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
    folder = finetune_visits(data, options, settings(tmp_path / "model", num_train_epochs=1))
    assert (
        type(AutoModelForSequenceClassification.from_pretrained(folder)).__name__ == "GBertForMedicationRecommendation"
    )
    assert AutoProcessor.from_pretrained(folder).note_tokenizer is None


def test_a_code_encoder_that_does_not_fit_is_refused(pretrained, tmp_path):
    config = MedMPLMConfig.from_pretrained(pretrained[0]).code_config
    wide = GBertModel(GBertConfig.from_dict(config.to_dict() | {"intermediate_size": 64}))
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(ValueError, match="0 are missing and 6 differ"):
        take_code_encoder(wide, str(pretrained[0]))
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())
    coder = MedMPLMModel(MedMPLMConfig.from_pretrained(pretrained[0]), add_diagnoses=False)
    coder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are missing"):
        take_code_encoder(GBertModel(GBertConfig.from_dict(config.to_dict())), str(tmp_path))


def test_subsets_are_nested_and_runs_are_told_apart(data, recommender, tmp_path):
    options, folder = recommender
    processor = visit_processor(options)
    few, more = (
        set(labelled_visits(data, part, processor, DRUGS, data.splits(), "train")["subject_id"])
        for part in (replace(options, train_patients=10), replace(options, train_patients=30))
    )
    assert len(few) == 10
    assert few < more
    finished = (folder / "model.safetensors").stat().st_mtime_ns
    assert finetune_visits(data, options, settings(folder, num_train_epochs=8)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == finished
    with pytest.raises(EhrDataError, match="another"):
        finetune_visits(data, replace(options, draw=1), settings(folder, num_train_epochs=8))
    with pytest.raises(LeakageError):
        finetune_visits(replace(data, split_seed=1), options, settings(tmp_path))


def test_an_untrained_classifier_has_other_weights(data, pretrained):
    options = VisitFinetuneArguments("readmission_30d", str(pretrained[0]))
    known, fresh = (new_visit_classifier(replace(options, untrained=u), ["no", "yes"], 0) for u in (False, True))
    source = load_file(pretrained[0] / "model.safetensors")
    name = "medmplm.code_encoder.encoder.layers.0.attention.qkv.weight"
    assert torch.equal(known.state_dict()[name], source[name])
    assert not torch.equal(fresh.state_dict()[name], source[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gbert", "task": "readmission_30d"}, "G-BERT recommends medications"),
        ({"architecture": "rnn"}, "`architecture` must be one of medmplm, gbert"),
    ],
)
def test_options_without_a_meaning_are_refused(data, pretrained, tmp_path, change, message):
    options = VisitFinetuneArguments("medication_recommendation", str(pretrained[0]))
    with pytest.raises(ValueError, match=message):
        finetune_visits(data, replace(options, **change), settings(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "gbert", "model_options": '{"code_config": {}}'},
            r"fields of GBertConfig, got \['code_config'\]",
        ),
        ({"model_options": '{"code_config": {"hidden_seize": 8}}'}, r"`code_config` must be fields of GBertConfig"),
        ({"model_options": '{"note_config": {"hidden_seize": 8}}'}, r"`note_config` must be fields of BertConfig"),
        (
            {"model_options": '{"note_config": {"model_type": "distilbert", "dimm": 8}}'},
            r"`note_config` must be fields of DistilBertConfig, got \['dimm'\]",
        ),
        (
            {"model_options": '{"note_config": {"model_type": "brt"}}'},
            "`model_type` of `note_config` must be one that Transformers has, got 'brt'",
        ),
        ({"model_options": '{"note_config": 8}'}, "`note_config` must be a JSON object, got 8"),
        ({"model_options": '{"note_poling": "mean"}'}, r"fields of MedMPLMConfig, got \['note_poling'\]"),
        ({"model_options": "[]"}, "`model_options` must be a JSON object"),
    ],
)
def test_a_field_that_no_configuration_has_is_refused(data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain_visits(data, replace(OPTIONS, **change), settings(tmp_path))


def test_gbert_is_pretrained_without_notes(data, tmp_path):
    figures = pretrain_visits(data, replace(OPTIONS, architecture="gbert"), settings(tmp_path, num_train_epochs=1))
    assert "diagnosis_from_medication" in figures
    assert "diagnosis_from_note" not in figures
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ehr_gbert"
