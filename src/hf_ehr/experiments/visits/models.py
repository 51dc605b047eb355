"""The networks of a report of visits: made, trained and read in one way, whatever their family."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from hf_ehr.experiments.visits.materials import VisitCohort
from hf_ehr.experiments.visits.spec import CNN, GBERT, MEDMPLM, RECOMMENDATION, TAGGER, VisitRow, setting_of
from hf_ehr.models.configuration_ehrtagger import EhrTaggerConfig
from hf_ehr.models.modeling_ehrtagger import EhrTaggerForTokenClassification
from hf_ehr.models.modeling_medmplm import MedMPLMModel
from hf_ehr.training import check_earlier_stage
from hf_ehr.training._visit_models import new_visit_baseline
from hf_ehr.training.entities import fit_tagger
from hf_ehr.training.visit_baselines import VisitBaselineArguments
from hf_ehr.training.visits import VisitFinetuneArguments, fit_visits, new_visit_classifier

if TYPE_CHECKING:
    import datasets

CONCAT_POOLING = "mean"
"""Vector of a note in all rows: the text encoder was trained to predict words, and has no vector of its own."""


def new_model(cohort: VisitCohort, row: VisitRow, task: str, seed: int, draw: int) -> Any:
    """The network of a row, on pre-trained weights where it has them; its head is random.

    Args:
        cohort: Where checkpoints lie.
        row: The row.
        task: What is asked.
        seed: Of the pre-training.
        draw: Of what is new.
    """
    names, folder = cohort.label_names(task), None
    if row.checkpoint is not None:
        folder = str(cohort.checkpoint(row, seed))
        check_earlier_stage(folder, cohort.arguments.manifest(cohort.splits))
    if row.model == TAGGER:
        return _tagger(cohort, row, names, folder, draw)
    if row.model == MEDMPLM or (row.model == GBERT and setting_of(task) == RECOMMENDATION):
        given: dict[str, Any] = {"architecture": row.model} | row.model_options
        return new_visit_classifier(VisitFinetuneArguments(task, str(folder), **given), names, draw)
    fields = dict(row.model_options)
    if row.model.startswith("note"):
        fields = {"note_pooling": CONCAT_POOLING} | fields
    options = VisitBaselineArguments(
        task, row.model, code_encoder=folder, model_options=json.dumps(fields),
        note_encoder=str(cohort.text_folder) if row.model.startswith("note") else None,
    )  # fmt: skip
    return new_visit_baseline(row.model, options, names, cohort.processor(), draw)


def read_columns(examples: datasets.Dataset, row: VisitRow) -> datasets.Dataset:
    """Without notes, where a row does not read them."""
    if row.model == MEDMPLM or row.reads_notes or "note_input_ids" not in examples.column_names:
        return examples
    return examples.remove_columns("note_input_ids")


def fit(
    model: Any, row: VisitRow, train: datasets.Dataset, validation: datasets.Dataset, tokenizer: Any,
    training: TrainingArguments, patience: int | None,
) -> None:  # fmt: skip
    """Trains in place and keeps the epoch that is best on validation."""
    if row.model == TAGGER:
        fit_tagger(model, train, validation, tokenizer, training, patience)
    else:
        fit_visits(model, train, validation, training, row.linear_probe and row.model != CNN, patience)


def _tagger(cohort: VisitCohort, row: VisitRow, tags: list[str], checkpoint: str | None, draw: int) -> Any:
    torch.manual_seed(draw)
    fields = {"id2label": dict(enumerate(tags)), "label2id": {tag: place for place, tag in enumerate(tags)}}
    fields |= row.model_options
    if row.init == "none":
        words = cohort.words()
        sizes: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
        return EhrTaggerForTokenClassification(EhrTaggerConfig(**(sizes | fields)))
    encoder: Any = str(cohort.text_folder)
    if checkpoint is not None:
        loaded: Any = MedMPLMModel.from_pretrained(checkpoint)
        encoder = loaded.note_encoder
    return EhrTaggerForTokenClassification.from_note_encoder(encoder, **fields)
