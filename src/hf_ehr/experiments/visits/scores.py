"""Figures of what the cells of a report of visits say, on the visits as they are and on resampled patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from hf_ehr.code_thresholds import tune_thresholds
from hf_ehr.entity_tags import Entity
from hf_ehr.experiments.visits.spec import ADMISSION, CODING, ENTITIES, PRIMARY, RECOMMENDATION
from hf_ehr.intervals import ResampledDraws, resamples
from hf_ehr.metrics import auroc, average_precision, best_f1_threshold
from hf_ehr.multilabel import label_scores, macro_scores, micro_scores
from hf_ehr.multilabel_intervals import figures_of
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.named_entities import EntityCounts, weighted_figures
from hf_ehr.recommendation import OF_ALL_CELLS, weighted_metrics

SHOWN: dict[str, dict[str, str]] = {
    RECOMMENDATION: {
        "average_precision_samples": "PR-AUC", "f1_samples": "F1", "jaccard_samples": "Jaccard",
        "auroc_samples": "AUROC", "accuracy": "accuracy", "new_drug_jaccard_micro": "Jaccard, new drugs",
    },
    ADMISSION: {"auroc": "AUROC", "average_precision": "average precision", "f1": "F1"},
    CODING: {
        "map": "MAP", "f1_micro": "micro-F1", "jaccard_micro": "micro-Jaccard", "auroc_micro": "micro-AUROC",
        "average_precision_micro": "micro-PR-AUC",
    },
    ENTITIES: {"f1": "strict F1", "precision": "precision", "recall": "recall", "f1_macro": "F1, mean over types"},
}  # fmt: skip
"""Figures of each setting and their names in tables; the first is the one that is compared."""
_AT_ONCE = 256  # resamples


class Asked(NamedTuple):
    """What is asked of the patients of a split, in the order of a cell's predictions.

    Attributes:
        truth: (rows,) or (rows, labels) 0/1; of entities those of each note.
        patients: (rows,).
        previous: (rows, labels) drugs of the visit before; None where no drugs are asked for.
    """

    truth: Any
    patients: np.ndarray
    previous: np.ndarray | None


class Said(NamedTuple):
    """What one draw of a row says of the test visits, and the threshold that validation visits chose."""

    values: Any
    threshold: float | None = None


def said_by(setting: str, validation: Asked | None, cell: Any) -> Said:
    """What a cell says, with the threshold of the best F1 over all cells of validation visits.

    Args:
        setting: What is asked.
        validation: What is true of validation visits; None where entities are named, which have no threshold.
        cell: Its arrays.
    """
    if validation is None:
        return Said(entities_from(cell))
    p, truth = np.asarray(cell["validation"], float), validation.truth
    if setting == ADMISSION:
        return Said(cell["test"], float(best_f1_threshold(truth, p)))
    return Said(cell["test"], float(tune_thresholds(MultilabelPredictions.of(p, truth)).common))


def figures(setting: str, asked: Asked, said: Said, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures in which rows count as often as ``weights`` (resamples, rows) say.

    Args:
        setting: What is asked.
        asked: Of the test visits.
        said: Of one draw.
        weights: How often.

    Returns:
        Name → (resamples,); those of :func:`figures_of_all_cells` are left out.
    """
    if setting == ENTITIES:
        return weighted_figures(EntityCounts.of(asked.truth, said.values), weights)
    p, threshold = np.asarray(said.values, float), 0.5 if said.threshold is None else said.threshold
    if setting == ADMISSION:
        return _yes_or_no(asked.truth, p, threshold, weights)
    if setting == RECOMMENDATION:
        return weighted_metrics(asked.truth, p, threshold, asked.previous, None, None, weights)
    predictions = MultilabelPredictions.of(p, asked.truth)
    found = figures_of(predictions, threshold, weights, metrics=("map", "f1_micro"))
    return found | {"jaccard_micro": found["f1_micro"] / (2 - found["f1_micro"])}


def figures_of_all_cells(setting: str, asked: Asked, said: Said) -> dict[str, np.ndarray]:
    """Micro and macro figures of recommendation and coding, of the rows as they are.

    Returns:
        Name → (1,); nothing in the other settings, whose figures :func:`figures` has.
    """
    if setting in (ENTITIES, ADMISSION):
        return {}
    predictions = MultilabelPredictions.of(np.asarray(said.values, float), asked.truth)
    labels = label_scores(predictions, 0.5 if said.threshold is None else said.threshold)
    found = micro_scores(predictions) | macro_scores(labels)
    return {name: np.array([found[name]]) for name in OF_ALL_CELLS}


def primary_of(setting: str, asked: Asked, values: Any) -> float:
    """The figure that learning rates are compared by."""
    found = figures(setting, asked, Said(values), np.ones((1, len(asked.patients))))
    return float(found[PRIMARY[setting]][0])


def resampled(
    setting: str, asked: Asked, draws: Sequence[Said], n_draws: int, n_resamples: int, seed: int = 0
) -> dict[str, ResampledDraws]:
    """The figures of the draws of a row, on the data and on resampled patients × draws.

    Rows of one place share their resamples, so that any two are compared (:class:`ResampledDraws`). Figures that
    rank all cells at once have no intervals.

    Args:
        setting: What is asked.
        asked: Of the test visits.
        draws: What each draw says; one stands in all ``n_draws``.
        n_draws: Draws of the rows that it is compared with.
        n_resamples: Number of resamples.
        seed: Of the resampling.
    """
    members = np.unique(asked.patients, return_inverse=True)[1]
    once = np.ones((1, len(members)))
    plain = [figures(setting, asked, one, once) | figures_of_all_cells(setting, asked, one) for one in draws]
    parts: list[list[dict[str, np.ndarray]]] = []
    counts = []
    for weights, drawn in _chunks(members, n_draws, n_resamples, seed):
        parts.append([figures(setting, asked, one, weights) for one in draws])
        counts.append(drawn)
    every = np.concatenate(counts)
    found = {}
    for name in plain[0]:
        values = np.array([one[name][0] for one in plain])
        again = np.full((n_resamples, len(draws)), np.nan)
        if name in parts[0][0]:
            again = np.concatenate([np.stack([one[name] for one in part], axis=1) for part in parts])
        found[name] = ResampledDraws(np.broadcast_to(values, n_draws), np.broadcast_to(again, every.shape), every)
    return found


def _chunks(members: np.ndarray, n_draws: int, n_resamples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights of rows and of draws, some resamples at a time."""
    drawn = resamples(members, n_draws, n_resamples, seed)
    while some := list(islice(drawn, _AT_ONCE)):
        weights, counts = zip(*some, strict=True)
        yield np.stack(weights), np.stack(counts)


def _yes_or_no(truth: np.ndarray, p: np.ndarray, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(p, kind="stable")
    y, scores, weights = np.asarray(truth, float)[order], p[order], weights[:, order]
    flagged = (scores >= threshold).astype(float)
    hits, either = weights @ (y * flagged), weights @ (y + flagged)
    return {
        "auroc": np.array([auroc(y, scores, weight) for weight in weights]),
        "average_precision": np.array([average_precision(y, scores, weight) for weight in weights]),
        "f1": np.divide(2 * hits, either, out=np.full(len(weights), np.nan), where=either > 0),
    }


def entity_arrays(entities: list[list[Entity]]) -> dict[str, np.ndarray]:
    """The entities of notes as arrays; see :func:`entities_from`."""
    rows = [(note, *one) for note, found in enumerate(entities) for one in found]
    columns: list[Any] = list(zip(*rows, strict=True)) or [[], [], [], []]
    numbers = {
        name: np.array(column, np.int64) for name, column in zip(("note", "start", "end"), columns, strict=False)
    }
    return numbers | {"type": np.array(columns[3], str), "notes": np.array(len(entities))}


def entities_from(cell: Any) -> list[list[Entity]]:
    """The entities of each note out of the arrays of a cell."""
    found: list[list[Entity]] = [[] for _ in range(int(cell["notes"]))]
    rows = zip(*(cell[name].tolist() for name in ("note", "start", "end", "type")), strict=True)
    for note, start, end, kind in rows:
        found[note].append(Entity(start, end, kind))
    return found
