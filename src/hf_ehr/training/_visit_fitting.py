"""Training and reading models of visits, whatever their family: batches, probabilities, thresholds, figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_ehr.code_thresholds import tune_thresholds
from hf_ehr.metrics import auroc, average_precision
from hf_ehr.models.any_encoder import evaluating
from hf_ehr.models.modeling_ehrtext import EhrTextForICDCoding
from hf_ehr.models.modeling_gbert import KINDS, code_targets
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.training._runs import (
    run_arguments,
    train_from_last_checkpoint,
)
from hf_ehr.training.finetuning import fit_best_epoch, positive, set_probe
from hf_ehr.visit_collators import CodeSetMasking, VisitCollator

if TYPE_CHECKING:
    import datasets

ROWS_AT_A_TIME = 16
HELD_OUT_VISITS = 2048
"""Validation visits that pre-training is judged on, the first ones."""
SOURCES = (*KINDS, "note")


class VisitTruth(NamedTuple):
    """The visits that are asked about, in the order of :func:`predict_visits`.

    Attributes:
        subject_ids: (visits,) int64.
        visit_ids: (visits,) int64.
        truth: (visits, labels) 0/1.
        previous: (visits, labels) 0/1, what the visit before had; all 0 where codes of visits are asked.
    """

    subject_ids: np.ndarray
    visit_ids: np.ndarray
    truth: np.ndarray
    previous: np.ndarray


def asked_visits(examples: datasets.Dataset, num_labels: int, num_special_tokens: int = 5) -> VisitTruth:
    """What is asked in examples of recommendation or coding.

    Args:
        examples: Of :func:`hf_ehr.visit_datasets.build_visit_examples`.
        num_labels: Labels of a visit.
        num_special_tokens: The first ids of medications, which are no labels.
    """
    recommends = "diagnosis_ids" in examples.column_names
    names = ["subject_id", "visit_ids", "asked", "label_ids", "medication_ids"]
    found: list[tuple[int, int, list, list]] = []
    for row in examples.select_columns(names):
        subject, visits, asked, labels, drugs = (row[name] for name in names)
        for place in np.flatnonzero(asked):
            before = [index - num_special_tokens for index in drugs[place - 1]] if recommends else []
            found.append((subject, visits[place], labels[place], [index for index in before if index >= 0]))
    truth, previous = (np.zeros((len(found), num_labels), np.int8) for _ in range(2))
    for number, (_, _, labels, before) in enumerate(found):
        truth[number, labels], previous[number, before] = 1, 1
    return VisitTruth(np.array([one[0] for one in found]), np.array([one[1] for one in found]), truth, previous)


def without_answers(examples: datasets.Dataset) -> datasets.Dataset:
    """The same rows, every answer 0 or none: which visits are asked about is still known."""
    empty = {
        "labels": lambda values: [0] * len(values),
        "label_ids": lambda values: [[[] for _ in visits] for visits in values],
    }
    for name in set(empty) & set(examples.column_names):
        kind, values = examples.features[name], empty[name](examples[name][:])
        examples = examples.remove_columns(name).add_column(name, values, feature=kind)
    return examples


class NoteAloneCollator(VisitCollator):
    """The notes of :class:`VisitCollator` under the names of models that read one text a row, as the CNN does."""

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        """Rows to ``labels`` (rows, num_labels) float32, ``input_ids`` and ``attention_mask`` (rows, tokens)."""
        batch = super().__call__(rows)
        labels = {"labels": batch["labels"].float().view(len(rows), -1)} if "labels" in batch else {}
        return labels | {"input_ids": batch["note_input_ids"], "attention_mask": batch["note_attention_mask"]}


def collator_of(model: Any, masking: Any = None) -> VisitCollator:
    """The collator of a model of visits."""
    if isinstance(model, EhrTextForICDCoding):
        return NoteAloneCollator(note_pad_token_id=model.config.pad_token_id or 0, num_labels=model.num_labels)
    return VisitCollator.of(model.config, masking=masking, num_labels=getattr(model, "num_labels", None))


def predict_visits(model: Any, examples: datasets.Dataset) -> np.ndarray:
    """Probabilities of what is asked, in the order of the examples.

    Args:
        model: A classifier that takes batches of :class:`~hf_ehr.visit_collators.VisitCollator`.
        examples: Of :func:`hf_ehr.visit_datasets.build_visit_examples`.

    Returns:
        Of yes-or-no labels the probability of yes, (examples,); else (asked visits, num_labels), the visits of a row
        in their order (:func:`asked_visits`).
    """
    found = []
    for outputs, batch in _outputs(model, examples):
        scores = outputs.logits.float().cpu()
        if "label_ids" not in examples.column_names:
            found.append(scores[:, 0].sigmoid().numpy() if model.num_labels == 1 else positive(scores.numpy()))
            continue
        asked = batch["labels"][..., 0] >= 0
        found.append(scores[asked].sigmoid().numpy())
    return np.concatenate(found)


def visit_states(model: Any, examples: datasets.Dataset) -> np.ndarray:
    """What the last layer of a classifier of admissions reads, (examples, features)."""
    return np.concatenate([outputs.pooler_output.float().cpu().numpy() for outputs, _ in _outputs(model, examples)])


def fit_visits(
    model: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    training: TrainingArguments,
    linear_probe: bool = True,
    patience: int | None = None,
) -> None:
    """Trains a classifier in place and keeps the epoch that ranks validation best.

    By AUROC where the question is yes or no, the state it came with being a candidate too (but for a CNN); where codes
    are asked by average precision over all cells. A run that was stopped goes on from its last checkpoint.

    Args:
        model: A classifier of visits.
        train: Of :func:`hf_ehr.visit_datasets.build_visit_examples`, with labels.
        validation: As `train`.
        training: Settings of the run.
        linear_probe: Whether a yes-or-no classifier starts from a regression on its frozen features.
        patience: Epochs without a better one after which to stop; None runs all.
    """
    collate = collator_of(model)
    yes_or_no = "label_ids" not in train.column_names
    if yes_or_no and model.num_labels == 2:
        if linear_probe:
            states, held = (visit_states(model, part) for part in (train, validation))
            set_probe(model.classifier, states, np.asarray(train["labels"]), held, np.asarray(validation["labels"]))
        fit_best_epoch(
            model, train, validation, collate, lambda tuned: predict_visits(tuned, validation), training,
            patience=patience,
        )  # fmt: skip
        return
    trainer = Trainer(
        model,
        run_arguments(
            training, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="auroc" if yes_or_no else "average_precision", greater_is_better=True,
            save_total_limit=1, remove_unused_columns=False,
        ),
        collate,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=_ranking,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )  # fmt: skip
    train_from_last_checkpoint(trainer)


def _ranking(prediction: Any) -> dict[str, float]:
    """Average precision and AUROC over the cells of all visits that are asked about."""
    scores, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    asked = labels[..., 0] >= 0
    cells = labels[asked].ravel(), scores[asked].ravel()
    return {"average_precision": average_precision(*cells), "auroc": auroc(*cells)}


def store_visit_thresholds(model: Any, truth: np.ndarray, p: np.ndarray, common: bool) -> None:
    """Writes decision thresholds, tuned on validation visits, into the configuration.

    Args:
        model: Its classifier.
        truth: (visits, labels) 0/1.
        p: (visits, labels).
        common: One threshold for all labels, with the best F1 over all cells, as papers of recommendation have it;
            else one a label where it has enough positives.
    """
    tuned = tune_thresholds(MultilabelPredictions.of(p, truth))
    values = np.full(p.shape[1], tuned.common) if common else tuned.per_label
    model.config.thresholds = {model.config.id2label[place]: float(value) for place, value in enumerate(values)}


def maskings(processor: MedMPLMProcessor, seed: int) -> dict[str, CodeSetMasking]:
    """The masking of each kind of codes."""
    tokenizers = processor.code_tokenizers.items()
    return {name: CodeSetMasking(tokenizer, seed=seed + place) for place, (name, tokenizer) in enumerate(tokenizers)}


def held_out_visits(model: Any, validation: datasets.Dataset, processor: MedMPLMProcessor) -> dict[str, float]:
    """How well hidden codes of validation visits are predicted, the same ones hidden at every call.

    Returns:
        `loss`; and for each kind of codes and each source `KIND_from_SOURCE`, the average precision over the cells
        that the model's loss counts, beside `KIND_by_frequency`, that of ranking codes by how frequent they are among
        these very visits. Where a kind or source is missing in all of them there is no figure.
    """
    part = validation.select(range(min(len(validation), HELD_OUT_VISITS)))
    cells: dict[str, list[_Cells]] = {}
    losses, sizes = [], []
    for outputs, batch in _outputs(model, part, masking=maskings(processor, seed=0)):
        sizes.append(len(batch["diagnosis_ids"]))
        losses.append(outputs.loss.item())
        for name, found in _cells(model.config, outputs, batch).items():
            cells.setdefault(name, []).append(found)
    figures = {"loss": float(np.average(losses, weights=sizes))}
    for name, parts in cells.items():
        y, counted, scores = (np.concatenate(values) for values in zip(*parts, strict=True))
        if (y & counted).any():
            figures[name] = average_precision(y[counted], scores[counted])
            guess = np.broadcast_to((y & counted).sum(axis=0) / np.maximum(counted.sum(axis=0), 1), y.shape)
            figures.setdefault(f"{name.partition('_')[0]}_by_frequency", average_precision(y[counted], guess[counted]))
    return figures


class _Cells(NamedTuple):
    """Visits × codes: what is true, what counts, and what the model says."""

    positives: np.ndarray
    counted: np.ndarray
    scores: np.ndarray


def _cells(config: Any, outputs: Any, batch: dict[str, torch.Tensor]) -> dict[str, _Cells]:
    """`KIND_from_SOURCE` of one batch, over the visits that have both."""
    codes = getattr(config, "code_config", None) or config
    given = [(batch[f"{kind}_ids"], batch[f"{kind}_labels"]) for kind in KINDS]
    there = [(ids != codes.pad_token_id).any(-1).flatten() for ids, _ in given]
    if "note_attention_mask" in batch:
        there.append(batch["note_attention_mask"].bool().any(-1).flatten())
    found = {}
    for kind, target in zip(KINDS, code_targets(codes, given, config.pretraining_loss), strict=True):
        scores = outputs[f"{kind}_logits"].float().cpu().flatten(0, -3)
        for place, source in enumerate(there):
            rows = target.there & source
            cells = (target.positives[rows], target.counted[rows], scores[rows, place])
            found[f"{kind}_from_{SOURCES[place]}"] = _Cells(*(values.numpy() for values in cells))
    return found


def _outputs(model: Any, examples: datasets.Dataset, masking: Any = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Outputs and inputs of each batch, in order; labels are given to models that are pre-trained alone."""
    collate = collator_of(model, masking)
    loader = DataLoader(examples, batch_size=ROWS_AT_A_TIME, collate_fn=collate)
    with evaluating(model), torch.no_grad():
        for batch in tqdm(loader, desc="Reading visits", unit="batch", disable=len(loader) < 32):
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            yield model(**inputs), batch
