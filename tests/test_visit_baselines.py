"""The baselines of MedM-PLM on prepared visits: what each reads, learns and leaves (papers.md §2, rows 44-49)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoProcessor, BertConfig, BertModel

from hf_ehr import EhrCodeTokenizer, GBertForPreTraining, MedBertConfig, MedBertForMaskedLM, MedMPLMProcessor
from hf_ehr.cli.main import main
from hf_ehr.metrics import auroc
from hf_ehr.recommendation_baselines import AskedVisits
from hf_ehr.training._visit_models import VISIT_BASELINES, new_visit_baseline
from hf_ehr.training.visit_baselines import VisitBaselineArguments, finetune_visit_baseline
from hf_ehr.training.visits import (
    asked_visits,
    fit_visit_processor,
    label_names,
    labelled_visits,
    predict_visits,
    pretrain_visits,
)
from hf_ehr.visit_collators import VisitCollator
from tests.test_visit_training import DRUGS, OPTIONS, settings, write

RECOMMENDERS = ("rnn", "gbert", "medbert", "note", "note+gbert", "note+medbert")
READMISSION = ("gbert", "medbert", "note", "note+gbert", "note+medbert", "cnn")
SMALL = {"preset": "tiny", "min_patients": 2, "note_max_length": 16, "note_vocab_size": 60}


def options(task: str, baseline: str = "rnn", **fields) -> VisitBaselineArguments:
    return VisitBaselineArguments(task, baseline, **(SMALL | fields))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("visits") / "data")


@pytest.fixture(scope="module")
def processor(data):
    train = data.splits()["train"]
    return fit_visit_processor(data.data, train, min_patients=2, note_max_length=16, note_vocab_size=60)


def model_of(kind: str, task: str, processor, data, seed: int = 0, **fields):
    arguments = options(task, kind, **fields)
    names = label_names(data, arguments, processor, data.splits()["train"])
    return new_visit_baseline(kind, arguments, names, processor, seed).eval()


# A visit is scored by what was known before it


@pytest.fixture(scope="module")
def recommenders(data, processor):
    return {kind: model_of(kind, "medication_recommendation", processor, data) for kind in RECOMMENDERS}


@pytest.fixture(scope="module")
def histories(data, processor):
    arguments = options("medication_recommendation")
    return labelled_visits(data, arguments, processor, DRUGS, data.splits(), "test").select(range(6))


def perturbed(row: dict, asked: int, rng: np.random.Generator, processor) -> dict:
    """The row with everything else that visit `asked` must not know: its drugs and note, and all of later visits."""
    sizes = {
        "diagnosis_ids": len(processor.diagnosis_tokenizer), "medication_ids": len(processor.medication_tokenizer),
        "note_input_ids": len(processor.note_tokenizer),
    }  # fmt: skip
    other = {name: [list(ids) for ids in row[name]] for name in sizes} | {
        name: row[name] for name in ("subject_id", "visit_ids", "asked", "label_ids")
    }
    for name, size in sizes.items():
        for visit in range(asked + (name == "diagnosis_ids"), len(row["visit_ids"])):
            other[name][visit] = rng.integers(5, size, rng.integers(0, 6)).tolist()
    return other


@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), row=st.integers(0, 5), asked=st.integers(1, 2))
def test_nothing_of_the_asked_visit_but_its_diagnoses_and_nothing_later_is_read(
    recommenders, histories, processor, seed, row, asked
):
    plain = histories[row]
    other = perturbed(plain, asked, np.random.default_rng(seed), processor)
    for kind, model in recommenders.items():
        collate = VisitCollator.of(model.config, num_labels=len(DRUGS))
        with torch.no_grad():
            before, after = (model(**collate([one])).logits[0, asked] for one in (plain, other))
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0, msg=kind)
    tables = [histories.from_list([one], features=histories.features) for one in (plain, other)]
    sizes = (len(processor.diagnosis_tokenizer), len(processor.medication_tokenizer))
    found = [AskedVisits.of(table, *sizes) for table in tables]
    place = int(np.flatnonzero(plain["asked"]).tolist().index(asked))
    for name in ("features", "previous"):
        before, after = (getattr(one, name)[[place]].toarray() for one in found)
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("kind", RECOMMENDERS)
def test_what_it_does_read_it_reads(recommenders, histories, processor, kind):
    """Beside the test above: an earlier visit, and (of codes) the asked visit's diagnoses, change the scores."""
    model, row = recommenders[kind], histories[0]
    collate = VisitCollator.of(model.config, num_labels=len(DRUGS))
    changes = {"diagnosis_ids": [0, 2], "medication_ids": [0]} if kind != "note" else {}
    changes |= {"note_input_ids": [0]} if kind.startswith("note") else {}
    for name, visits in changes.items():
        for visit in visits:
            other = row | {name: [[5, 6, 7, 8] if n == visit else ids for n, ids in enumerate(row[name])]}
            with torch.no_grad():
                before, after = (model(**collate([one])).logits[0, 2] for one in (row, other))
            assert (before - after).abs().max() > 1e-5, (name, visit)


# Training and the folder


@pytest.mark.parametrize("kind", ["rnn", "note+medbert"])
def test_a_baseline_learns_its_drugs_and_its_folder_is_enough(data, tmp_path, kind):
    arguments = options("medication_recommendation", kind)
    run = settings(
        tmp_path, num_train_epochs=12 if kind == "rnn" else 5, learning_rate=3e-2 if kind == "rnn" else 1e-2
    )
    folder = finetune_visit_baseline(data, arguments, run)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is MedMPLMProcessor
    assert (processor.note_tokenizer is None) == (kind == "rnn")
    assert set(model.config.thresholds) == set(DRUGS)
    names = list(model.config.id2label.values())
    examples = labelled_visits(data, arguments, processor, names, data.splits(), "test")
    truth, p = asked_visits(examples, len(names)).truth, predict_visits(model, examples)
    assert auroc(truth.ravel(), p.ravel()) > 0.9
    assert finetune_visit_baseline(data, arguments, run) == folder  # finished: not trained again


@pytest.mark.parametrize("kind", ["cnn", "gbert"])
def test_readmission_is_predicted_from_what_the_baseline_reads(data, tmp_path, kind):
    """Whoever is tired is readmitted, and only the note says who is tired."""
    arguments = options("readmission_30d", kind)
    folder = finetune_visit_baseline(data, arguments, settings(tmp_path, num_train_epochs=3))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    examples = labelled_visits(data, arguments, processor, ["no", "readmission_30d"], data.splits(), "test")
    truth, p = np.asarray(examples["labels"]), predict_visits(model, examples)
    assert p.shape == truth.shape
    assert (auroc(truth, p) > 0.9) == (kind == "cnn")
    assert 0 < model.config.thresholds["readmission_30d"] < 1
    alone = [predict_visits(model.double(), examples.select([row]))[0] for row in range(4)]
    np.testing.assert_allclose(alone, predict_visits(model, examples)[:4], atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in VISIT_BASELINES if kind != "rnn"])
def test_diagnoses_are_not_read_where_they_are_coded(data, processor, kind):
    model = model_of(kind, "icd_coding_top3", processor, data)
    assert model.num_labels == 3
    arguments = options("icd_coding_top3", kind)
    names = label_names(data, arguments, processor, data.splits()["train"])
    examples = labelled_visits(data, arguments, processor, names, data.splits(), "validation")
    assert "diagnosis_ids" not in examples.column_names
    p = predict_visits(model, examples)
    assert p.shape == (len(examples), 3)
    assert np.isfinite(p).all()
    assert not [name for name, _ in model.named_parameters() if "diagnosis" in name]


# Trained encoders


def test_trained_encoders_are_taken_over(data, processor, tmp_path):
    pretrain_visits(data, replace(OPTIONS, architecture="gbert"), settings(tmp_path / "gbert", num_train_epochs=1))
    source = GBertForPreTraining.from_pretrained(tmp_path / "gbert")
    model = model_of("gbert", "readmission_30d", processor, data, code_encoder=str(tmp_path / "gbert"))
    for name, value in source.gbert.state_dict().items():
        assert torch.equal(model.state_dict()[f"model.code_encoder.{name}"], value), name
    known = EhrCodeTokenizer.from_codes(["ATC/A01A", "ICD10CM/A10"])
    medbert = MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=len(known)))
    medbert.save_pretrained(tmp_path / "medbert")
    known.save_pretrained(tmp_path / "medbert")
    model = model_of("medbert", "readmission_30d", processor, data, code_encoder=str(tmp_path / "medbert"))
    weights = model.model.code_encoder.medbert.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in medbert.base_model.state_dict().items())
    words = processor.diagnosis_tokenizer
    of = dict(zip(words.convert_ids_to_tokens(range(len(words))), model.config.diagnosis_map, strict=True))
    assert of["ICD10CM/A10"] == known.convert_tokens_to_ids("ICD10CM/A10")
    assert of["ICD10CM/B10"] == known.unk_token_id


def test_the_vocabularies_and_the_text_encoder_of_a_medm_plm_are_read(data, tmp_path):
    words = fit_visit_processor(
        data.data, data.splits()["train"], min_patients=2, note_max_length=16, note_vocab_size=60
    ).note_tokenizer
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = BertModel(BertConfig(vocab_size=len(words), **sizes))
    text.save_pretrained(tmp_path / "text")
    words.save_pretrained(tmp_path / "text")
    pretraining = replace(OPTIONS, note_encoder=str(tmp_path / "text"))
    pretrain_visits(data, pretraining, settings(tmp_path / "model", max_steps=2))
    folder = str(tmp_path / "model")
    arguments = options("readmission_30d", "note+gbert", model=folder, code_encoder=folder)
    processor = MedMPLMProcessor.from_pretrained(folder)
    model = new_visit_baseline("note+gbert", arguments, ["no", "yes"], processor, 0)
    wanted = text.state_dict()
    assert all(torch.equal(wanted[n], v) for n, v in model.model.note_encoder.state_dict().items())
    source = load_file(f"{folder}/model.safetensors")
    name = "encoder.layers.0.attention.qkv.weight"
    assert torch.equal(model.model.code_encoder.state_dict()[name], source[f"medmplm.code_encoder.{name}"])
    other = EhrCodeTokenizer.from_codes(["ICD10CM/A10"], kinds=["diagnoses"])
    fewer = MedMPLMProcessor(other, processor.medication_tokenizer, processor.note_tokenizer)
    with pytest.raises(ValueError, match="vocabularies of the model"):
        new_visit_baseline("note+gbert", arguments, ["no", "yes"], fewer, 0)


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("rnn", "readmission_30d", "`baseline` must be one of gbert, medbert, note, note"),
        ("cnn", "medication_recommendation", "`baseline` must be one of rnn, gbert"),
        ("note", "readmission_30d", "reads notes"),
    ],
)
def test_what_a_baseline_cannot_do_is_refused(processor, kind, task, message):
    codes = MedMPLMProcessor(*processor.code_tokenizers.values())
    with pytest.raises(ValueError, match=message):
        new_visit_baseline(kind, options(task, kind), ["no", "yes"], codes, 0)
    with pytest.raises(ValueError, match="`baseline` must be one of"):
        options(task, "lstm")


@pytest.mark.parametrize("model", ["visitrnn", "ehrconcat", "ehrtext", "ehrtagger"])
def test_every_baseline_has_a_page_of_help(model, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", model, "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert f"hf-ehr finetune {model}" in page
    assert ("--encoder" if model == "ehrtagger" else "--baseline") in page
