"""From probabilities of codes to decisions: thresholds tuned on validation, and what to do with a code.

Nothing here may see the test set: a threshold tuned on it flatters every figure taken at it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array
from hf_ehr.intervals import Interval, patient_bootstrap
from hf_ehr.models.code_decisions import DECISIONS, NEVER
from hf_ehr.multilabel_predictions import MultilabelPredictions, ScoreCounts

MIN_POSITIVES = 20
"""Validation positives below which a label's own threshold would be noise."""


@dataclass(frozen=True, eq=False)
class CodeThresholds:
    """Thresholds tuned on validation; a code is predicted where ``p >= threshold``.

    Attributes:
        common: One for all labels, with the highest micro-F1: the setting in which papers compare.
        per_label: One a label, ``(labels,)``: the highest F1 of the label, ``common`` where it has too few positives.
        tuned: Which labels have one of their own, boolean ``(labels,)``.
    """

    common: float
    per_label: Array
    tuned: Array


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold delivers on the predictions it was chosen on.

    Attributes:
        threshold: A code is assigned where ``p >= threshold``; ``NEVER`` where the target is out of reach.
        precision: Share of the assigned codes that are true, with its interval over documents.
        coverage: Share of the true codes that are assigned, with its interval.
        assigned: Number of assigned codes.
        per_document: Assigned codes of an average document.
    """

    threshold: float
    precision: Interval
    coverage: Interval
    assigned: int
    per_document: float


def tune_thresholds(predictions: MultilabelPredictions, *, min_positives: int = MIN_POSITIVES) -> CodeThresholds:
    """Thresholds with the highest F1 on validation; of equally good ones the highest.

    Args:
        predictions: Of the validation documents.
        min_positives: Positives that a label needs for a threshold of its own.

    Raises:
        ValueError: There are no true codes to tune on, or ``min_positives`` is below 1.
    """
    if min_positives < 1:
        raise ValueError(f"`min_positives` must be at least 1, got {min_positives}.")
    common = _best_cut(_pooled(predictions))
    per_label, tuned = np.full(predictions.n_labels, common), np.zeros(predictions.n_labels, bool)
    for label, counts in enumerate(predictions.label_counts()):
        if counts.positives.sum() >= min_positives:
            per_label[label], tuned[label] = _best_cut(counts), True
    return CodeThresholds(common, per_label, tuned)


def threshold_for(
    predictions: MultilabelPredictions,
    *,
    precision: float,
    label: int | None = None,
    documents: ArrayLike | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> OperatingPoint:
    """The threshold that assigns the most codes at a wanted precision.

    The threshold is the lowest at which precision on these predictions is at least ``precision``, and is chosen on
    them: the interval says how far precision may lie off for a threshold fixed beforehand, so look at its lower end.

    Args:
        predictions: Of the validation documents.
        precision: Wanted share of true codes among the assigned ones, in (0, 1].
        label: Number of one label; all labels together by default.
        documents: Cluster of each document (its patient), ``(documents,)``; each is its own by default.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.
        level: Of the intervals.

    Raises:
        ValueError: ``precision`` or ``label`` is out of range, or there are no true codes.
    """
    _check_precision(precision)
    if label is not None and not 0 <= label < predictions.n_labels:
        raise ValueError(f"`label` must lie in [0, {predictions.n_labels}), got {label}.")
    counts = _pooled(predictions) if label is None else predictions.counts_of(label)
    threshold = _precise_cut(counts, precision)
    limit = np.full(predictions.n_labels, NEVER)
    limit[slice(None) if label is None else label] = threshold
    per_document = predictions.confusion(limit)[1]
    present = per_document.present if label is None else predictions.targets()[:, [label]].toarray()[:, 0]
    clusters = np.arange(predictions.n_documents) if documents is None else np.asarray(documents)

    def share(whole: Array) -> Interval:
        return _share(per_document.hits, whole, clusters, n_resamples=n_resamples, seed=seed, level=level)

    total = int(per_document.predicted.sum())
    mean = total / predictions.n_documents
    return OperatingPoint(threshold, share(per_document.predicted), share(present), total, mean)


def tune_auto_code(
    predictions: MultilabelPredictions, review: ArrayLike, *, precision: float, min_positives: int = MIN_POSITIVES
) -> Array:
    """From which probability on a label needs no review: never below its review threshold.

    A label with enough positives has one of its own: the lowest, of those from its review threshold on, at which its
    precision on these predictions is at least ``precision``. The others share the lowest at which the precision of
    all labels pooled is, or their review threshold where that is higher. ``NEVER`` where no threshold reaches it.

    Args:
        predictions: Of the validation documents.
        review: The thresholds from which on a code is reviewed, one or one a label.
        precision: Wanted share of true codes among the assigned ones, in (0, 1].
        min_positives: Positives that a label needs for a threshold of its own.

    Returns:
        ``(labels,)``.

    Raises:
        ValueError: ``precision`` is out of range, or there are no true codes.
    """
    _check_precision(precision)
    lower = np.broadcast_to(np.asarray(review, np.float64), predictions.n_labels)
    auto = np.maximum(_precise_cut(_pooled(predictions), precision), lower)
    for label, counts in enumerate(predictions.label_counts()):
        if counts.positives.sum() >= min_positives:
            auto[label] = _precise_cut(counts, precision, lower[label])
    return auto


def routing_scores(
    predictions: MultilabelPredictions, *, review: ArrayLike, auto_code: ArrayLike
) -> dict[str, dict[str, float]]:
    """What each decision gets: codes of an average document, precision, and share of all true codes.

    Args:
        predictions: Of documents that no threshold was tuned on.
        review: As in :func:`hf_ehr.models.code_decisions.decide`.
        auto_code: As in :func:`hf_ehr.models.code_decisions.decide`.
    """
    lower = np.minimum(np.broadcast_to(review, predictions.n_labels), auto_code)
    everything = np.full(predictions.n_labels, predictions.n_documents)
    flags = [predictions.confusion(limit)[0] for limit in (lower, auto_code)]
    present = flags[0].present
    hits = [present, flags[0].hits, flags[1].hits, np.zeros_like(present)]
    cells = [everything, flags[0].predicted, flags[1].predicted, np.zeros_like(present)]
    table = {}
    for place, decision in enumerate(DECISIONS):
        taken = float((cells[place] - cells[place + 1]).sum())
        true = float((hits[place] - hits[place + 1]).sum())
        table[decision] = {
            "per_document": taken / predictions.n_documents,
            "precision": true / taken if taken else float("nan"),
            "share_of_codes": true / present.sum() if present.any() else float("nan"),
        }
    return table


def _pooled(predictions: MultilabelPredictions) -> ScoreCounts:
    if not len(predictions.cells.labels):
        raise ValueError("`predictions` must hold a true code to tune on, got none. Use a larger validation split.")
    return predictions.pooled_counts()


def _check_precision(precision: float) -> None:
    if not 0 < precision <= 1:
        raise ValueError(f"`precision` must lie in (0, 1], got {precision}.")


def _precise_cut(counts: ScoreCounts, precision: float, at_least: float = 0.0) -> float:
    """The lowest cut, from ``at_least`` on, with a precision of at least ``precision``; ``NEVER`` if there is none."""
    hits, assigned = np.cumsum(counts.positives), np.cumsum(counts.positives + counts.negatives)
    reached = np.flatnonzero((hits >= precision * assigned) & (counts.cuts >= at_least))
    return float(counts.cuts[reached[-1]]) if len(reached) else NEVER


def _best_cut(counts: ScoreCounts) -> float:
    """The cut with the highest F1."""
    hits, misses = np.cumsum(counts.positives), np.cumsum(counts.negatives)
    return float(counts.cuts[np.argmax(2 * hits / (hits + misses + hits[-1]))])


def _share(part: Array, whole: Array, clusters: Array, *, n_resamples: int, seed: int, level: float) -> Interval:
    """``Σ part / Σ whole`` over documents, with its interval; rows of the bootstrap are documents."""

    def ratio(part: Array, whole: Array, weight: Array) -> float:
        total = weight @ whole
        return float(weight @ part / total) if total else float("nan")

    return patient_bootstrap(ratio, part, whole, clusters, n_resamples=n_resamples, seed=seed, level=level)
