"""Decision curves: the net benefit of acting on a model over a range of thresholds, with bands over patients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array, check_scores
from hf_ehr.intervals import resamples

THRESHOLDS = np.round(np.arange(0.02, 0.505, 0.01), 2)
"""From acting on nearly anybody (49 false alarms are worth one found) to acting on what is as likely as not."""


class Band(NamedTuple):
    """Net benefit at each threshold and the ends of its intervals, (thresholds,) each."""

    value: Array
    low: Array
    high: Array


def net_benefit_band(
    y: ArrayLike,
    p: ArrayLike,
    patients: ArrayLike,
    thresholds: ArrayLike = THRESHOLDS,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Band:
    """``metrics.net_benefit`` at every threshold, with pointwise percentile intervals, patients resampled.

    Treating everybody is ``p`` of ones, treating nobody has a net benefit of 0.

    Args:
        y: Labels 0/1, (n,).
        p: Probabilities, (n,).
        patients: Patient of each row, (n,).
        thresholds: Risks from which on one would act, in (0, 1).
        n_resamples: Bootstrap resamples; the same seed draws the same patients for every model.
        seed: Of the bootstrap.
        level: Coverage.

    Raises:
        ValueError: As ``metrics.brier``, or a threshold does not lie in (0, 1).
    """
    labels, scores, _ = check_scores(y, p, None, probability=True)
    cuts = np.asarray(thresholds, np.float64)
    if not len(cuts) or cuts.min() <= 0 or cuts.max() >= 1:
        raise ValueError("`thresholds` must lie in (0, 1), and do not. Choose risks that one would act on.")
    worth = np.where(labels[:, None] == 1, 1.0, -cuts / (1 - cuts)) * (scores[:, None] >= cuts)
    members = np.unique(np.asarray(patients), return_inverse=True)[1]
    drawn = np.array([weight @ worth / weight.sum() for weight, _ in resamples(members, 1, n_resamples, seed)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Band(worth.mean(axis=0), low, high)
