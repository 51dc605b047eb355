"""The arrays under ``metrics.py``: checked input, counts over distinct scores, bins, logistic recalibration."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def check_scores(
    y: ArrayLike, p: ArrayLike, sample_weight: ArrayLike | None, *, probability: bool = False
) -> tuple[Array, Array, Array]:
    """Labels, scores and weights as float64 ``(n,)``.

    Raises:
        ValueError: Shapes differ, there are no rows, a label is not 0/1, a score is not finite or (``probability``)
            not in [0, 1], a weight is negative or not finite, or all weights are 0.
    """
    labels, scores = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    weight = np.ones(labels.shape) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if labels.ndim != 1 or not len(labels) or labels.shape != scores.shape or labels.shape != weight.shape:
        raise ValueError(
            "`y`, `p` and `sample_weight` must be one-dimensional, of one length and not empty, "
            f"got {labels.shape}, {scores.shape} and {weight.shape}."
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"`y` must hold 0 and 1 only, got {labels[(labels != 0) & (labels != 1)][0]}.")
    if not np.isfinite(scores).all():
        raise ValueError(f"`p` must be finite, got {np.sum(~np.isfinite(scores))} values that are not.")
    if probability and (scores.min() < 0 or scores.max() > 1):
        raise ValueError(
            f"`p` must lie in [0, 1], got [{scores.min():.4g}, {scores.max():.4g}]. Pass logits through a sigmoid."
        )
    if not (weight.min() >= 0 and 0 < weight.sum() < np.inf):
        raise ValueError("`sample_weight` must be finite, not negative and not all 0. Check the weights.")
    return labels, scores, weight


def cumulative_counts(y: Array, p: Array, weight: Array, *, descending: bool) -> tuple[Array, Array]:
    """Weight of the positives and of the negatives up to and including each distinct score, ``(distinct,)`` each."""
    # A stable sort is linear where the rows are sorted already, as the bootstraps see to.
    order = np.argsort(p, kind="stable")
    if descending:
        order = order[::-1]
    y, p, weight = y[order], p[order], weight[order]
    last = np.append(np.flatnonzero(p[1:] != p[:-1]), len(p) - 1)
    return np.cumsum(weight * y)[last], np.cumsum(weight * (1 - y))[last]


def equal_mass_bins(p: ArrayLike, bins: int, sample_weight: ArrayLike | None = None) -> Array:
    """The bin of every row when sorted ``p`` is cut into ``bins`` of equal weight; equal values share a bin.

    Returns:
        Integers in [0, bins), ``(n,)``, increasing with ``p``. A constant ``p`` fills one bin: the order of
        the rows never matters.
    """
    p = np.asarray(p, dtype=np.float64)
    values, value_of_row = np.unique(p, return_inverse=True)
    mass = np.bincount(value_of_row, None if sample_weight is None else np.asarray(sample_weight), len(values))
    until = np.cumsum(mass)
    return np.minimum((bins * (until - mass) / until[-1]).astype(np.int64), bins - 1)[value_of_row]


def recalibrate(y: Array, logit: Array, weight: Array) -> tuple[float, float]:
    """Intercept and slope of the unpenalised regression of ``y`` on ``logit``; NaN where they are not finite."""
    cases, controls = logit[y == 1], logit[y == 0]
    separated = cases.min() >= controls.max() or cases.max() <= controls.min()
    if separated or np.ptp(logit) == 0:
        return float("nan"), float("nan")
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=200)
    model.fit(logit[:, None], y, sample_weight=weight)
    return float(model.intercept_[0]), float(model.coef_[0, 0])


def intercept_shift(y: Array, logit: Array, weight: Array) -> float:
    """The ``a`` for which Σ sigmoid(logit + a) equals the number of positives."""
    from scipy.optimize import brentq

    target = float(weight @ y / weight.sum())

    def surplus(shift: float) -> float:
        return float(weight @ sigmoid(logit + shift) / weight.sum()) - target

    edge = np.log(target) - np.log1p(-target)
    return float(brentq(surplus, edge - logit.max() - 1, edge - logit.min() + 1, xtol=1e-12))


def sigmoid(logits: ArrayLike) -> Array:
    """Logistic function without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64)))


def softmax(logits: ArrayLike) -> Array:
    """Softmax over the last axis without overflow."""
    values = np.asarray(logits, dtype=np.float64)
    exponent = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)
