"""Bootstrap intervals over documents for the figures of ``multilabel.py``, and for paired differences of two models.

A resample is a vector of document weights, as in ``intervals.py``; every figure is written as a function of it. Meant
for sets of some hundred or thousand documents: larger ones have narrow intervals, and this holds all scores at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from hf_ehr._scores import Array
from hf_ehr.intervals import Interval, crossed_bootstrap
from hf_ehr.metrics import auroc, average_precision
from hf_ehr.multilabel import KS, document_precision, precision_at_k
from hf_ehr.multilabel_predictions import MultilabelPredictions

Figure = Callable[[Array], float]
"""From document weights, ``(documents,)``, to a metric."""

MAX_PAIRS = 200_000_000
"""Pairs of a true code and a document that are compared for the macro ranking metrics; 2.4 GB."""


def multilabel_intervals(
    predictions: MultilabelPredictions,
    *,
    threshold: ArrayLike | None = None,
    rival: MultilabelPredictions | None = None,
    rival_threshold: ArrayLike | None = None,
    documents: ArrayLike | None = None,
    ks: Sequence[int] = KS,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile intervals of the figures of :func:`hf_ehr.multilabel.multilabel_scores`, or of differences.

    Args:
        predictions: What was predicted.
        threshold: One, or one a label; adds F1 and exact match.
        rival: Another model on the same documents and labels, in the same order; every figure then is
            ``predictions`` minus ``rival``, both scored on the same resampled documents.
        rival_threshold: Of the rival; must be given where ``threshold`` is.
        documents: Cluster of each document (its patient), ``(documents,)``; each is its own by default.
        ks: Cut-offs of P@k.
        n_resamples: Number of resamples.
        seed: Of the resampling.
        level: Coverage.

    Raises:
        ValueError: There are no documents, the rival was scored on others, a threshold is missing, or the set is too
            large.
    """
    n = predictions.n_documents
    if not n:
        raise ValueError("`predictions` must hold a document, got none. Call `add` with a batch first.")
    models = [_figures(predictions, threshold, ks)]
    if rival is not None:
        if (rival.targets() != predictions.targets()).nnz if rival.n_documents == n else True:
            raise ValueError("`rival` must hold the same documents with the same codes in the same order.")
        if (threshold is None) != (rival_threshold is None):
            raise ValueError("`threshold` and `rival_threshold` must be given together.")
        models.append(_figures(rival, rival_threshold, ks))
    clusters = np.arange(n) if documents is None else np.asarray(documents)
    # The bootstrap hands its predictions to the metric: here they only say which model is meant.
    which = [np.full((1, n), place) for place in range(len(models))]

    def interval(name: str) -> Interval:
        def figure(rows: Array, model: Array, weight: Array) -> float:
            return models[int(model[0])][name](weight)

        b = which[1] if rival is not None else None
        options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed, "level": level}
        return crossed_bootstrap(figure, np.arange(n), which[0], b, clusters, **options)

    return {name: interval(name) for name in models[0]}


def _figures(predictions: MultilabelPredictions, threshold: ArrayLike | None, ks: Sequence[int]) -> dict[str, Figure]:
    cells, n = predictions.cells, predictions.n_documents
    present = np.bincount(cells.documents, minlength=n)
    r_precision = precision_at_k(cells, n, present)
    figures = _micro(predictions) | _macro(predictions)
    figures |= {f"precision_at_{k}": _weighted_mean(precision_at_k(cells, n, k)) for k in ks}
    figures |= {"r_precision": _weighted_mean(r_precision), "map": _weighted_mean(document_precision(cells, n))}
    return figures if threshold is None else figures | _at(predictions, threshold)


def _weighted_mean(values: Array) -> Figure:
    """Over the documents where ``values`` is defined."""
    defined, filled = ~np.isnan(values), np.nan_to_num(values)

    def mean(weight: Array) -> float:
        total = weight @ defined
        return float(weight @ filled / total) if total else float("nan")

    return mean


def _micro(predictions: MultilabelPredictions) -> dict[str, Figure]:
    """Of all cells pooled, sorted once."""
    scores = predictions.dense().astype(np.float64).ravel()
    order = np.argsort(scores, kind="stable")
    y, p = predictions.targets().toarray().ravel()[order], scores[order]
    document = order // predictions.n_labels
    return {
        "auroc_micro": lambda weight: auroc(y, p, weight[document]),
        "average_precision_micro": lambda weight: average_precision(y, p, weight[document]),
    }


def _macro(predictions: MultilabelPredictions) -> dict[str, Figure]:
    """Means over the labels that have positives and negatives in the resample.

    Every true code is compared with all documents once; a resample then is one matrix product.
    """
    documents, labels, *_ = predictions.cells
    if len(labels) * predictions.n_documents > MAX_PAIRS:
        raise ValueError(
            f"`predictions` must hold at most {MAX_PAIRS:,} pairs of a true code and a document, got "
            f"{len(labels) * predictions.n_documents:,}. Take a sample of the documents."
        )
    scores, targets = predictions.dense().T, predictions.targets().toarray().T.astype(bool)
    own, carries = scores[labels, documents][:, None], targets[labels]
    at_least = (scores[labels] >= own).astype(np.float32)
    true_at_least = at_least * carries
    ahead = ((scores[labels] < own) + 0.5 * (scores[labels] == own)).astype(np.float32) * ~carries

    def mean(part: Array, weight: Array) -> float:
        """Of the labels' weighted means of ``part``, ``(true codes,)``."""
        positive = np.bincount(labels, weight[documents], predictions.n_labels)
        kept = (positive > 0) & (positive < weight.sum())
        total = np.bincount(labels, weight[documents] * part, predictions.n_labels)
        return float(np.mean(total[kept] / positive[kept])) if kept.any() else float("nan")

    def area(weight: Array) -> float:
        negative = weight.sum() - targets @ weight
        return mean(ahead @ weight.astype(np.float32) / np.maximum(negative[labels], 1), weight)

    def precision(weight: Array) -> float:
        single = weight.astype(np.float32)
        return mean(true_at_least @ single / np.maximum(at_least @ single, 1), weight)

    return {"auroc_macro": area, "average_precision_macro": precision}


def _at(predictions: MultilabelPredictions, threshold: ArrayLike) -> dict[str, Figure]:
    """F1 and exact match at a threshold."""
    targets = predictions.targets()
    flagged = sparse.vstack([sparse.csr_array(part.astype(np.int64)) for _, part in predictions.flagged(threshold)])
    hits, both = targets.multiply(flagged).tocsr(), targets + flagged
    per_document = predictions.confusion(threshold)[1]
    document_hits, document_both = per_document.hits, per_document.predicted + per_document.present
    exact = 2 * document_hits == document_both

    def micro(weight: Array) -> float:
        total = weight @ document_both
        return float(2 * (weight @ document_hits) / total) if total else float("nan")

    def macro(weight: Array) -> float:
        occurs = weight @ targets > 0
        f1 = 2 * (weight @ hits)[occurs] / (weight @ both)[occurs]
        return float(f1.mean()) if occurs.any() else float("nan")

    return {"f1_micro": micro, "f1_macro": macro, "exact_match": _weighted_mean(exact.astype(float))}
