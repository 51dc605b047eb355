"""From prepared stays to a classifier: what is learned, what is kept beside it, and what it never sees."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, TrainingArguments

from hf_ehr.hourly import fit_hourly_features
from hf_ehr.metrics import auroc
from hf_ehr.models.feature_extraction_hourly import HourlyFeatureExtractor
from hf_ehr.schema import DatasetInfo, EhrDataError, shard_name
from hf_ehr.tasks.audit import LeakageError
from hf_ehr.training.stays import (
    StayArguments,
    StayFinetuneArguments,
    StayPretrainArguments,
    finetune_stays,
    labelled_stays,
    predict_stays,
    pretrain_stays,
)
from tests.builders import day, patient, records, visit

TASK = "icu_mortality_t24"
FEATURES = {"min_patients": 2, "form": "continuous", "demographics": ["age", "sex"], "n_hours": 24}
OPTIONS = StayPretrainArguments("tiny", feature_options=json.dumps(FEATURES))


def settings(folder, **options) -> TrainingArguments:
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 32, "learning_rate": 5e-3, "num_train_epochs": 15, "use_cpu": True}
    return TrainingArguments(str(folder), **(quiet | sizes | options))


def write(folder, change=()):
    """200 patients whose heart rate rises where they die; those of `change` have other values."""
    rng = np.random.default_rng(0)
    rows = []
    for subject in range(1, 201):
        dies = rng.random() < 0.4
        hours = np.sort(rng.uniform(0, 23, 12))
        values = 80 + (1.5 if dies else 0.0) * hours + rng.normal(0, 3, 12) + 300 * (subject in change)
        measured = [
            {"hour": float(hour), "name": "X/HR", "value": float(value), "text": None}
            for hour, value in zip(hours, values, strict=True)
        ]
        stay = {"stay_id": subject, "start": day(1), "end": day(3), "measurements": measured}
        fields = {"discharged_to": "died" if dies else "home"}
        rows.append(
            patient(
                subject, [visit(0, 8, stays=[stay], **fields)], sex="F", death_time=day(8) if dies else None
            )
        )  # fmt: skip
    (folder / "records").mkdir(parents=True)
    for shard in range(2):
        part = records(*(row for row in rows if row["subject_id"] % 2 == shard))
        pq.write_table(part, folder / "records" / shard_name(shard, 2))
    DatasetInfo("made", {}, 2, "calendar").save(folder)
    return StayArguments(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stays") / "data")


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return folder, pretrain_stays(data, OPTIONS, settings(folder, num_train_epochs=40))


@pytest.fixture(scope="module")
def classifier(data, encoder, tmp_path_factory):
    options = StayFinetuneArguments(TASK, str(encoder[0]))
    return finetune_stays(data, options, settings(tmp_path_factory.mktemp("classifier")))


def test_hours_are_reconstructed_better_than_by_their_mean(encoder):
    figures = encoder[1]
    assert figures["reconstruction_loss"] < 0.7 * figures["mean_loss"]


def test_hiding_the_only_variable_of_nearly_all_stays_leaves_little_to_learn_from(data, encoder, tmp_path):
    options = replace(OPTIONS, hidden_variables=0.95)
    hidden = pretrain_stays(data, options, settings(tmp_path, num_train_epochs=40))
    seen = encoder[1]
    assert hidden["mean_loss"] == seen["mean_loss"]
    assert hidden["reconstruction_loss"] > 1.3 * seen["reconstruction_loss"]


def test_a_classifier_ranks_test_stays_and_its_folder_is_enough(data, classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    extractor = AutoFeatureExtractor.from_pretrained(classifier)
    assert isinstance(extractor, HourlyFeatureExtractor)
    options = StayFinetuneArguments(TASK, str(classifier))
    examples = labelled_stays(data, options, extractor, data.splits(), "test")
    truth = np.asarray(examples["labels"])
    assert 0 < truth.sum() < len(truth)
    assert auroc(truth, predict_stays(model, examples)) > 0.9
    assert 0 < model.config.thresholds[TASK] < 1
    assert not (classifier / "examples").exists()


def test_test_patients_leave_no_trace(data, encoder, tmp_path):
    changed = write(tmp_path / "data", change=set(data.splits()["test"].tolist()))
    pretrain_stays(changed, OPTIONS, settings(tmp_path / "encoder", num_train_epochs=40))
    one, other = (load_file(folder / "model.safetensors") for folder in (encoder[0], tmp_path / "encoder"))
    assert all((one[name] == other[name]).all() for name in one)
    again = write(tmp_path / "other", change=set(data.splits()["train"].tolist()[:5]))
    pretrain_stays(again, OPTIONS, settings(tmp_path / "again", num_train_epochs=40))
    other = load_file(tmp_path / "again" / "model.safetensors")
    assert any((one[name] != other[name]).any() for name in one)


def test_features_of_other_patients_are_refused(data, encoder, tmp_path):
    ids = data.splits()["validation"]
    fit_hourly_features(data.data, subject_ids=ids, **FEATURES).save_pretrained(tmp_path / "features")
    with pytest.raises(LeakageError, match="L5"):
        pretrain_stays(data, StayPretrainArguments("tiny", features=str(tmp_path / "features")), settings(tmp_path))
    moved = StayArguments(data.data, split_seed=1)
    with pytest.raises(LeakageError):
        finetune_stays(moved, StayFinetuneArguments(TASK, str(encoder[0])), settings(tmp_path / "classifier"))


def test_subsets_are_nested_and_a_finished_folder_is_another_runs_no_more(data, encoder, classifier, tmp_path):
    extractor = HourlyFeatureExtractor.from_pretrained(encoder[0])
    few, more = (
        set(
            labelled_stays(
                data, StayFinetuneArguments(TASK, str(encoder[0]), train_patients=count), extractor, data.splits(),
                "train",
            )["subject_id"]
        )
        for count in (10, 30)
    )  # fmt: skip
    assert len(few) == 10
    assert few < more
    with pytest.raises(EhrDataError, match="another"):
        finetune_stays(data, StayFinetuneArguments(TASK, str(encoder[0]), draw=1), settings(classifier))
    with pytest.raises(ValueError, match="`hidden_variables` must be at least 0 and below 1"):
        pretrain_stays(data, replace(OPTIONS, hidden_variables=1.0), settings(tmp_path))
    with pytest.raises(ValueError, match="`preset` must be one of base, paper, tiny, got 'huge'"):
        pretrain_stays(data, replace(OPTIONS, preset="huge"), settings(tmp_path))
