"""Metrics as numpy functions, the ``compute_metrics`` of a stock ``Trainer``, thin ``evaluate.Metric`` wrappers.

Every binary metric has the signature ``metric(y, p, sample_weight=None) -> float`` so that the bootstraps of
``intervals.py`` can weight patients instead of copying rows. Where a metric is undefined because a class is absent it
is NaN, never 0 and never an exception: one rare label must not stop a table. ``undefined_reason`` names the cause.
Malformed input (shapes, NaN, a probability outside [0, 1]) raises ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import (
    Array,
    check_scores,
    cumulative_counts,
    equal_mass_bins,
    intercept_shift,
    recalibrate,
    sigmoid,
    softmax,
)

ECE_BINS = 15


class Calibration(NamedTuple):
    """Logistic recalibration of ``p``: a calibrated model has intercept 0, slope 1, in-the-large 0.

    Attributes:
        intercept: Of the logistic regression of ``y`` on ``logit p``.
        slope: Of the same regression; below 1 means predictions too extreme.
        in_the_large: Intercept with the slope fixed at 1; above 0 means risk is underestimated.
    """

    intercept: float
    slope: float
    in_the_large: float


class Confusion(NamedTuple):
    """Weighted counts at a threshold."""

    tp: float
    fp: float
    fn: float
    tn: float


def undefined_reason(y: ArrayLike) -> str | None:
    """Why ranking metrics of ``y`` are NaN: ``"no positives"``, ``"no negatives"``, or None where they are defined."""
    labels = np.asarray(y)
    if not (labels == 1).any():
        return "no positives"
    return None if (labels == 0).any() else "no negatives"


def auroc(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Area under the ROC curve; a tie between a positive and a negative counts one half.

    Args:
        y: Labels 0/1, ``(n,)``.
        p: Scores, ``(n,)``; only their order matters.
        sample_weight: Row weights, ``(n,)``.

    Returns:
        The area, NaN where a class is absent.

    Raises:
        ValueError: Shapes differ, a label is not 0/1, or a score is not finite.
    """
    y, p, weight = check_scores(y, p, sample_weight)
    positives, negatives = cumulative_counts(y, p, weight, descending=False)
    if not positives[-1] or not negatives[-1]:
        return float("nan")
    below = np.concatenate([[0.0], negatives[:-1]]) + np.diff(negatives, prepend=0.0) / 2
    return float(np.diff(positives, prepend=0.0) @ below / (positives[-1] * negatives[-1]))


def average_precision(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Average precision, Σ (R_k − R_{k−1}) P_k over distinct scores from the highest.

    Never the trapezoid under the precision-recall curve: a constant score has AP = prevalence, yet a trapezoid of
    about one half.

    Returns:
        The average precision, NaN without positives.

    Raises:
        ValueError: As ``auroc``.
    """
    y, p, weight = check_scores(y, p, sample_weight)
    positives, negatives = cumulative_counts(y, p, weight, descending=True)
    if not positives[-1]:
        return float("nan")
    flagged = positives + negatives
    precision = np.divide(positives, flagged, out=np.zeros_like(positives), where=flagged > 0)
    return float(np.diff(positives, prepend=0.0) @ precision / positives[-1])


def brier(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Brier score, the mean of (p − y)²; lower is better.

    Raises:
        ValueError: As ``auroc``, or a value of ``p`` lies outside [0, 1].
    """
    y, p, weight = check_scores(y, p, sample_weight, probability=True)
    return float(weight @ (p - y) ** 2 / weight.sum())


def brier_skill(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Brier skill, 1 − Brier / Brier of these rows' own prevalence; NaN where a class is absent.

    Raises:
        ValueError: As ``brier``.
    """
    y, p, weight = check_scores(y, p, sample_weight, probability=True)
    prevalence = float(weight @ y / weight.sum())
    reference = prevalence * (1 - prevalence)
    return 1 - brier(y, p, weight) / reference if reference > 0 else float("nan")


def calibration_intercept_slope(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None) -> Calibration:
    """Unpenalised logistic regression of ``y`` on ``logit p`` (Cox 1958), and calibration-in-the-large.

    ``p`` is clipped to [1e-7, 1 − 1e-7] before the logit.

    Returns:
        The three numbers; all NaN where a class is absent, intercept and slope NaN where the regression has no finite
        solution (constant ``p``, or ``p`` that separates the classes).

    Raises:
        ValueError: As ``brier``.
    """
    y, p, weight = check_scores(y, p, sample_weight, probability=True)
    kept = weight > 0
    y, p, weight = y[kept], np.clip(p[kept], 1e-7, 1 - 1e-7), weight[kept]
    if undefined_reason(y):
        return Calibration(float("nan"), float("nan"), float("nan"))
    logit = np.log(p) - np.log1p(-p)
    return Calibration(*recalibrate(y, logit, weight), intercept_shift(y, logit, weight))


def calibration_slope(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """The slope of ``calibration_intercept_slope``."""
    return calibration_intercept_slope(y, p, sample_weight).slope


def ece(y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None = None, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error over equal-mass bins: Σ (bin weight / all) · |mean p − mean y|.

    Raises:
        ValueError: As ``brier``.
    """
    y, p, weight = check_scores(y, p, sample_weight, probability=True)
    gaps = np.bincount(equal_mass_bins(p, bins, weight), weight * (p - y), bins)
    return float(np.abs(gaps).sum() / weight.sum())


def best_f1_threshold(y_validation: ArrayLike, p_validation: ArrayLike) -> float:
    """The threshold with the highest F1 on validation rows; a row is positive where ``p >= threshold``.

    It lies halfway to the next lower score, so that rounding on another machine flips no row. Of equally good
    thresholds the highest is taken.

    Raises:
        ValueError: As ``auroc``, or there are no positives to tune on.
    """
    y, p, weight = check_scores(y_validation, p_validation, None)
    if not y.any():
        raise ValueError("`y_validation` must hold a positive, got none. Tune on a larger validation split.")
    positives, negatives = cumulative_counts(y, p, weight, descending=True)
    f1 = 2 * positives / (positives + negatives + positives[-1])
    scores, best = np.unique(p)[::-1], int(np.argmax(f1))
    return float(scores[best : best + 2].mean())


def confusion_at(y: ArrayLike, p: ArrayLike, threshold: float, sample_weight: ArrayLike | None = None) -> Confusion:
    """Weighted true/false positives and negatives with ``p >= threshold`` as positive.

    Raises:
        ValueError: As ``auroc``.
    """
    y, p, weight = check_scores(y, p, sample_weight)
    flagged = p >= threshold
    tp, fp = float(weight @ (y * flagged)), float(weight @ ((1 - y) * flagged))
    positives = float(weight @ y)
    return Confusion(tp, fp, positives - tp, float(weight.sum()) - positives - fp)


def f1_at(y: ArrayLike, p: ArrayLike, threshold: float, sample_weight: ArrayLike | None = None) -> float:
    """F1 at a threshold; 0 where nothing is predicted, NaN without positives."""
    tp, fp, fn, _ = confusion_at(y, p, threshold, sample_weight)
    return 2 * tp / (2 * tp + fp + fn) if tp + fn else float("nan")


def cohen_kappa_at(y: ArrayLike, p: ArrayLike, threshold: float, sample_weight: ArrayLike | None = None) -> float:
    """Cohen's κ between label and prediction at a threshold; NaN where chance agreement is already complete."""
    tp, fp, fn, tn = confusion_at(y, p, threshold, sample_weight)
    n = tp + fp + fn + tn
    chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / n**2
    return ((tp + tn) / n - chance) / (1 - chance) if chance < 1 else float("nan")


def event1(y: ArrayLike, p: ArrayLike, threshold: float, sample_weight: ArrayLike | None = None) -> float:
    """Event 1 of the PhysioNet/CinC Challenge 2012 (Silva et al. 2012): min(sensitivity, positive predictivity).

    0 where nothing is predicted, NaN without positives.
    """
    tp, fp, fn, _ = confusion_at(y, p, threshold, sample_weight)
    return tp / (tp + max(fp, fn)) if tp + fn else float("nan")


def net_benefit(y: ArrayLike, p: ArrayLike, threshold: float, sample_weight: ArrayLike | None = None) -> float:
    """Net benefit of acting on ``p >= threshold``: TP/n − FP/n · t/(1 − t) (Vickers & Elkin 2006).

    Raises:
        ValueError: As ``auroc``, or the threshold does not lie in (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must be in (0, 1), got {threshold}.")
    tp, fp, fn, tn = confusion_at(y, p, threshold, sample_weight)
    return (tp - fp * threshold / (1 - threshold)) / (tp + fp + fn + tn)


def binary_metrics(y: ArrayLike, p: ArrayLike, *, threshold: float | None = None) -> dict[str, float]:
    """All binary metrics of one set of predictions.

    Args:
        y: Labels 0/1, ``(n,)``.
        p: Probabilities, ``(n,)``.
        threshold: Decision threshold tuned on validation; adds F1, κ, precision and recall.

    Raises:
        ValueError: As ``brier``.
    """
    calibration = calibration_intercept_slope(y, p)
    scores = {name: metric(y, p) for name, metric in BINARY_METRICS.items()}
    scores |= {
        "calibration_intercept": calibration.intercept,
        "calibration_slope": calibration.slope,
        "calibration_in_the_large": calibration.in_the_large,
        "prevalence": float(np.mean(np.asarray(y))),
        "n": float(np.size(y)),
        "positives": float(np.sum(np.asarray(y))),
    }
    if threshold is None:
        return scores
    tp, fp, fn, _ = confusion_at(y, p, threshold)
    return scores | {
        "f1": f1_at(y, p, threshold),
        "cohen_kappa": cohen_kappa_at(y, p, threshold),
        "precision": tp / (tp + fp) if tp + fp else float("nan"),
        "recall": tp / (tp + fn) if tp + fn else float("nan"),
    }


def multilabel_metrics(y: ArrayLike, p: ArrayLike, *, threshold: ArrayLike | None = None) -> dict[str, float]:
    """Micro and macro AUROC and average precision, with a guard for absent labels.

    A label without positives or without negatives has no AUROC: the macro means leave it out and count it in
    ``labels_dropped`` (scored as 0 it would lower the mean, as 1 raise it). The micro scores pool every cell.

    Args:
        y: Labels 0/1, ``(n, labels)``.
        p: Probabilities, ``(n, labels)``.
        threshold: One threshold or one a label; adds ``f1_micro``, ``f1_macro`` (mean of the F1 of the labels that
            occur) and ``f1_macro_caml`` (F1 of macro-precision and macro-recall over all labels, as printed by
            CAML, Mullenbach et al. 2018, and most papers after it).

    Raises:
        ValueError: Shapes differ or are not two-dimensional, or as ``brier``.
    """
    y, p = np.asarray(y), np.asarray(p)
    if y.ndim != 2 or y.shape != p.shape:
        raise ValueError(f"`y` and `p` must both be (n, labels), got {y.shape} and {p.shape}.")
    check_scores(y.ravel(), p.ravel(), None, probability=True)
    evaluated = np.flatnonzero((y == 1).any(axis=0) & (y == 0).any(axis=0))
    scores = {"labels_evaluated": float(len(evaluated)), "labels_dropped": float(y.shape[1] - len(evaluated))}
    for name, metric in (("auroc", auroc), ("average_precision", average_precision)):
        scores[f"{name}_micro"] = metric(y.ravel(), p.ravel())
        per_label = [metric(y[:, label], p[:, label]) for label in evaluated]
        scores[f"{name}_macro"] = float(np.mean(per_label)) if per_label else float("nan")
    return scores if threshold is None else scores | _multilabel_f1(y.astype(bool), p >= np.asarray(threshold))


def multiclass_metrics(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """Accuracy and one-versus-rest macro AUROC over the classes that occur.

    Args:
        y: Class numbers, ``(n,)``.
        p: Probabilities, ``(n, classes)``.

    Raises:
        ValueError: Shapes differ, or a class number has no column.
    """
    y, p = np.asarray(y), np.asarray(p)
    if p.ndim != 2 or y.shape != p.shape[:1]:
        raise ValueError(f"`y` must be (n,) and `p` (n, classes), got {y.shape} and {p.shape}.")
    if not np.isin(y, np.arange(p.shape[1])).all():
        raise ValueError(f"`y` must hold class numbers in [0, {p.shape[1]}), got {np.unique(y)}.")
    one_hot = multilabel_metrics(np.eye(p.shape[1])[y.astype(np.int64)], p)
    kept = ("auroc_macro", "labels_evaluated", "labels_dropped")
    return {"accuracy": float(np.mean(p.argmax(axis=1) == y))} | {name: one_hot[name] for name in kept}


def trainer_metrics(problem_type: str) -> Callable[[Any], dict[str, float]]:
    """``compute_metrics`` for a stock ``Trainer``.

    Args:
        problem_type: The config's: ``single_label_classification`` (two logits, or one, are scored as binary) or
            ``multi_label_classification``.

    Returns:
        A function from ``EvalPrediction`` (logits, labels) to metrics; of a tuple of outputs the first is taken.

    Raises:
        ValueError: Another problem type.
    """
    if problem_type not in ("single_label_classification", "multi_label_classification"):
        raise ValueError(
            f"`problem_type` must be single_label_classification or multi_label_classification, got {problem_type!r}."
        )

    def compute_metrics(prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
        labels = np.asarray(prediction.label_ids)
        if problem_type == "multi_label_classification":
            return multilabel_metrics(labels, sigmoid(logits))
        if logits.ndim == 1 or logits.shape[1] == 1:
            return binary_metrics(labels.ravel(), sigmoid(logits.ravel()))
        if logits.shape[1] == 2:
            return binary_metrics(labels, softmax(logits)[:, 1])
        return multiclass_metrics(labels, softmax(logits))

    return compute_metrics


def _multilabel_f1(y: Array, flagged: Array) -> dict[str, float]:
    """Micro-F1 and both macro-F1 of boolean ``(n, labels)``; a ratio 0/0 counts as 0."""
    tp, predicted, present = (y & flagged).sum(axis=0), flagged.sum(axis=0), y.sum(axis=0)
    f1 = 2 * tp / np.maximum(predicted + present, 1)
    precision, recall = np.mean(tp / np.maximum(predicted, 1)), np.mean(tp / np.maximum(present, 1))
    return {
        "f1_micro": float(2 * tp.sum() / max(predicted.sum() + present.sum(), 1)),
        "f1_macro": float(f1[present > 0].mean()) if present.any() else float("nan"),
        "f1_macro_caml": float(2 * precision * recall / (precision + recall)) if tp.any() else 0.0,
    }


BINARY_METRICS: dict[str, Callable[..., float]] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "brier": brier,
    "brier_skill": brier_skill,
    "ece": ece,
}
"""The threshold-free metrics by the name they have in tables."""


def as_evaluate_metric(name: str, *, keep_in_memory: bool = True) -> Any:
    """One of ``BINARY_METRICS`` as an ``evaluate.Metric``, e.g. for ``evaluate.combine``.

    Args:
        name: A key of ``BINARY_METRICS``; ``compute(references=labels, predictions=probabilities)`` returns it.
        keep_in_memory: ``evaluate`` otherwise writes the predictions, which are patient data, under ``~/.cache``.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in BINARY_METRICS:
        raise ValueError(f"`name` must be one of {', '.join(BINARY_METRICS)}, got {name!r}.")
    import datasets
    import evaluate  # seconds to import: only who asks for it pays

    class BinaryMetric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            )
            metric = BINARY_METRICS[name]
            return evaluate.MetricInfo(
                description=metric.__doc__, citation="", inputs_description=metric.__doc__, features=features
            )

        def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
            return {name: BINARY_METRICS[name](references, predictions)}

    BinaryMetric.__name__ = name
    return BinaryMetric(keep_in_memory=keep_in_memory)
