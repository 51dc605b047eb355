"""Figures of what the cells of a report of visits say, on the visits as they are and on resampled patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_ehr.code_thresholds import tune_thresholds
from hf_ehr.experiments.visits.cells import Asked
from hf_ehr.experiments.visits.spec import ADMISSION, CODING, ENTITIES, PRIMARY, RECOMMENDATION
from hf_ehr.intervals import ResampledDraws, resamples
from hf_ehr.metrics import auroc, average_precision, best_f1_threshold
from hf_ehr.multilabel_intervals import figures_of
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.named_entities import EntityCounts, _figures
from hf_ehr.recommendation import _weighted

SHOWN: dict[str, dict[str, str]] = {
    RECOMMENDATION: {
        "average_precision_samples": "PR-AUC", "f1_samples": "F1", "jaccard_samples": "Jaccard",
        "auroc_samples": "AUROC", "accuracy": "accuracy", "new_drug_jaccard_micro": "Jaccard, new drugs",
    },
    ADMISSION: {"auroc": "AUROC", "average_precision": "average precision", "f1": "F1"},
    CODING: {
        "average_precision_micro": "micro-PR-AUC", "auroc_micro": "micro-AUROC", "f1_micro": "micro-F1",
        "jaccard_micro": "micro-Jaccard", "map": "MAP",
    },
    ENTITIES: {"f1": "strict F1", "precision": "precision", "recall": "recall", "f1_macro": "F1, mean over types"},
}  # fmt: skip
"""Figures of each setting and their names in tables; the first is the one that is compared."""
_AT_ONCE = 256  # resamples


class Said(NamedTuple):
    """What one draw of a row says of the test visits, and the threshold that validation visits chose."""

    values: Any
    threshold: float | None = None


def thresholded(setting: str, validation: Asked | None, cell: Any) -> Said:
    """What a cell says, with the threshold of the best F1 over all cells of validation visits."""
    if setting == ENTITIES or validation is None:
        raise ValueError("`setting` must have a threshold.")
    p, truth = np.asarray(cell["validation"], float), validation.truth
    if setting == ADMISSION:
        return Said(cell["test"], float(best_f1_threshold(truth, p)))
    return Said(cell["test"], float(tune_thresholds(MultilabelPredictions.of(p, truth)).common))


def figures(setting: str, asked: Asked, said: Said, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures in which rows count as often as ``weights`` (resamples, rows) say.

    Returns:
        Name → (resamples,); the names of :data:`SHOWN`, of recommendation and entities further ones.
    """
    if setting == ENTITIES:
        return _figures(EntityCounts.of(asked.truth, said.values), weights)
    if setting == RECOMMENDATION:
        p, threshold = np.asarray(said.values, float), said.threshold or 0.5
        return _weighted(asked.truth, p, threshold, asked.previous, None, None, weights)
    if setting == ADMISSION:
        return _yes_or_no(asked.truth, np.asarray(said.values, float), said.threshold or 0.5, weights)
    predictions = MultilabelPredictions.of(said.values, asked.truth)
    names = [name for name in SHOWN[CODING] if name != "jaccard_micro"]
    found = figures_of(predictions, said.threshold or 0.5, weights, metrics=names)
    return found | {"jaccard_micro": found["f1_micro"] / (2 - found["f1_micro"])}


def primary_of(setting: str, asked: Asked, values: Any) -> float:
    """The figure that learning rates are compared by."""
    found = figures(setting, asked, Said(values), np.ones((1, len(asked.patients))))
    return float(found[PRIMARY[setting]][0])


def resampled(
    setting: str, asked: Asked, draws: Sequence[Said], n_draws: int, n_resamples: int, seed: int = 0
) -> dict[str, ResampledDraws]:
    """The figures of the draws of a row, on the data and on resampled patients × draws.

    Rows of one place share their resamples, so that any two are compared (:class:`ResampledDraws`).

    Args:
        setting: What is asked.
        asked: Of the test visits.
        draws: What each draw says; one stands in all ``n_draws``.
        n_draws: Draws of the rows that it is compared with.
        n_resamples: Number of resamples.
        seed: Of the resampling.
    """
    members = np.unique(asked.patients, return_inverse=True)[1]
    parts: list[dict[str, np.ndarray]] = []
    counts = []
    for weights, drawn in _chunks(members, n_draws, n_resamples, seed):
        of_draws = [figures(setting, asked, one, weights) for one in draws]
        parts.append({name: np.stack([found[name] for found in of_draws], axis=1) for name in of_draws[0]})
        counts.append(drawn)
    drawn = np.concatenate(counts)[1:]
    found = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        found[name] = ResampledDraws(
            np.broadcast_to(values[0], n_draws), np.broadcast_to(values[1:], drawn.shape), drawn
        )
    return found


def _chunks(members: np.ndarray, n_draws: int, n_resamples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights of rows and draws, the data as they are first, some resamples at a time."""
    weights, drawn = [np.ones(len(members))], [np.ones(n_draws)]
    for weight, draws in resamples(members, n_draws, n_resamples, seed):
        weights.append(weight)
        drawn.append(draws)
        if len(weights) == _AT_ONCE:
            yield np.stack(weights), np.stack(drawn)
            weights, drawn = [], []
    if weights:
        yield np.stack(weights), np.stack(drawn)


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
