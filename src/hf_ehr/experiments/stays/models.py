"""The models of a report of stays: made, trained and read in one way, whatever their family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainingArguments

from hf_ehr.experiments.stays.materials import Features
from hf_ehr.experiments.stays.spec import ADMISSION, GATES, MEDHMP, NOTE, StayRow, StaySpec
from hf_ehr.models.configuration_ehrfusion import EhrFusionConfig
from hf_ehr.models.configuration_ehrseries import EhrSeriesConfig
from hf_ehr.models.configuration_medhmp import MedHMPConfig
from hf_ehr.models.modeling_ehrfusion import EhrFusionForSequenceClassification
from hf_ehr.models.modeling_ehrseries import EhrSeriesForSequenceClassification
from hf_ehr.models.modeling_medhmp import (
    MedHMPForAdmissionClassification,
    MedHMPForStayClassification,
)
from hf_ehr.models.modeling_medhmp_transfer import load_hourly_encoder, load_stage
from hf_ehr.stay_collators import AdmissionCollator, StayCollator
from hf_ehr.training.finetuning import fit_best_epoch, positive, set_probe
from hf_ehr.training.stays import StayPretrainArguments, outputs_of, stay_config

if TYPE_CHECKING:
    import datasets

    from hf_ehr.experiments.stays.cells import StayBench, StayCell

Collate = Callable[[Any], dict[str, torch.Tensor]]


def collator(features: Features, spec: StaySpec) -> Collate:
    """What makes batches at the level of the report."""
    if spec.level != ADMISSION:
        return StayCollator()
    config = MedHMPConfig.from_pretrained(features.blank(spec.pretraining))
    return AdmissionCollator.for_model(config, [])  # notes are vectors


def new_model(bench: StayBench, cell: StayCell, seed: int) -> Any:
    """A classifier of two classes for a cell, on pre-trained weights where its row has them; its head is random.

    Args:
        bench: Where checkpoints lie.
        cell: The cell.
        seed: Of the pre-training.
    """
    if cell.row.model == MEDHMP:
        return _admission_model(bench, cell, seed) if bench.spec.level == ADMISSION else _stay_model(bench, cell, seed)
    if cell.row.model in (*GATES, NOTE):
        return _gate(bench, cell)
    return _series(bench, cell, seed)


def checkpoint(bench: StayBench, cell: StayCell, seed: int) -> Path:
    """Where the weights lie that a row starts from."""
    spec, row, features = bench.spec, cell.row, bench.features(cell)
    if row.pretrained_on in (None, cell.data.name):
        return stage_folder(features, spec, row, seed)
    source = bench.cohort(spec.data(str(row.pretrained_on))).features(row)
    return features.moved(stage_folder(source, spec, row, seed), row.init)


def stage_folder(features: Features, spec: StaySpec, row: StayRow, seed: int) -> Path:
    """Where the last stage of pre-training of a row lies."""
    stages = spec.pretraining
    return features.stage2(stages, row, seed) if row.needs_admissions else features.stage1(stages, seed)


def fit(
    model: Any, train: datasets.Dataset, validation: datasets.Dataset, collate: Collate,
    training: TrainingArguments, patience: int | None,
) -> None:  # fmt: skip
    """Trains in place and keeps the epoch that ranks validation patients best, the start included."""
    fit_best_epoch(
        model, train.with_format("numpy"), validation.with_format("numpy"), collate,
        lambda tuned: probabilities(tuned, validation, collate), training, patience=patience,
    )  # fmt: skip


def set_head(model: Any, train: datasets.Dataset, validation: datasets.Dataset, collate: Collate) -> None:
    """Sets the classifier to a regression on the frozen states, its penalty chosen on validation."""
    states, held = (outputs_of(model, part, collate, "pooler_output") for part in (train, validation))
    set_probe(model.classifier, states, np.asarray(train["labels"]), held, np.asarray(validation["labels"]))


def probabilities(model: Any, examples: datasets.Dataset, collate: Collate) -> np.ndarray:
    """Probability of the outcome, (examples,), in the order of `examples`."""
    return positive(outputs_of(model, examples, collate, "logits"))


def _stay_model(bench: StayBench, cell: StayCell, seed: int) -> MedHMPForStayClassification:
    if cell.row.init == "none":
        return MedHMPForStayClassification(_shape(bench, cell, num_labels=2))
    fields = {"num_labels": 2} | cell.row.model_options
    return MedHMPForStayClassification.from_pretrained(checkpoint(bench, cell, seed), **fields)


def _admission_model(bench: StayBench, cell: StayCell, seed: int) -> MedHMPForAdmissionClassification:
    stages, row, features = bench.spec.pretraining, cell.row, bench.features(cell)
    fields = {"num_labels": 2} | row.model_options
    if row.needs_admissions:
        return MedHMPForAdmissionClassification.from_pretrained(features.stage2(stages, row, seed), **fields)
    model = MedHMPForAdmissionClassification(MedHMPConfig.from_pretrained(features.blank(stages), **fields))
    if row.init == "s":
        load_stage(model, features.stage1(stages, seed))
    return model


def _shape(bench: StayBench, cell: StayCell, **fields: Any) -> MedHMPConfig:
    """MedHMP's configuration with the sizes of the cell's features."""
    given = bench.spec.pretraining.part("stays", "options")
    options = given.get("model_options", {}) | cell.row.model_options | fields
    arguments = StayPretrainArguments(preset=given.get("preset", "base"), model_options=json.dumps(options))
    return stay_config(arguments, bench.features(cell).extractor())


def _series(bench: StayBench, cell: StayCell, seed: int) -> EhrSeriesForSequenceClassification:
    row, extractor = cell.row, bench.features(cell).extractor()
    fields: dict[str, Any] = {"architecture": row.model, "num_labels": 2, "medhmp_encoder": row.medhmp_encoder}
    fields |= {name: getattr(extractor, name) for name in ("num_hourly_features", "num_demographics", "n_hours")}
    fields |= _known(EhrSeriesConfig, bench.spec.series)
    if row.medhmp_encoder:
        fields["hidden_size"] = _shape(bench, cell).hidden_size
    if row.second_channel:
        named = [f"{name}" for name in row.second_channel]
        fields["second_channel"] = [
            index for index, name in enumerate(extractor.feature_names) if any(part in name for part in named)
        ]
    model = EhrSeriesForSequenceClassification(EhrSeriesConfig(**(fields | row.model_options)))
    if row.init != "none":
        load_hourly_encoder(model, checkpoint(bench, cell, seed))
    return model


def _gate(bench: StayBench, cell: StayCell) -> EhrFusionForSequenceClassification:
    features = bench.features(cell)
    extractor, blank = features.extractor(), MedHMPConfig.from_pretrained(features.blank(bench.spec.pretraining))
    fields: dict[str, Any] = {"num_labels": 2, "note_size": blank.note_size}
    fields |= {name: getattr(extractor, name) for name in ("num_hourly_features", "num_demographics", "n_hours")}
    fields |= _known(EhrFusionConfig, bench.spec.series) | cell.row.model_options
    if cell.row.model == NOTE:
        return EhrFusionForSequenceClassification(EhrFusionConfig(main="note", series_encoder=None, **fields))
    return EhrFusionForSequenceClassification(EhrFusionConfig.yang_wu(cell.row.model, **fields))


def _known(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that a configuration has."""
    return {name: value for name, value in fields.items() if hasattr(kind, name)}
