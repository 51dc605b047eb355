"""Bootstrap intervals over patients, for one model, for a paired difference, and over repeated draws.

All rows of a patient enter a resample together: rows of one patient resemble each other, and resampling rows would
call a figure more certain than it is. A resample is a vector of row weights (how often the patient was drawn), so a
metric is any ``metric(y, p, sample_weight) -> float`` of ``metrics.py`` and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array

Metric = Callable[[Array, Array, Array], float]

NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Interval:
    """A figure and its percentile bootstrap interval.

    Attributes:
        value: On the data as they are; NaN where undefined.
        low: Lower end.
        high: Upper end.
        level: Coverage aimed at, e.g. .95.
        resamples: Resamples the interval rests on.
        skipped: Resamples left out because the metric was undefined in them (one class only).
        p_value: Differences only: two-sided bootstrap p of "no difference", at least 2 / (resamples + 1).
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    resamples: int = 0
    skipped: int = 0
    p_value: float | None = None

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        if np.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def patient_bootstrap(
    metric: Metric,
    y: ArrayLike,
    p: ArrayLike,
    patients: ArrayLike,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of ``metric``, patients drawn with replacement.

    Args:
        metric: ``metric(y, p, sample_weight)``.
        y: Labels, ``(n,)``.
        p: Predictions, ``(n,)``.
        patients: Patient of each row, ``(n,)``, any hashable dtype.
        n_resamples: Number of resamples.
        seed: Of the resampling; the same seed draws the same patients for every model.
        level: Coverage.

    Raises:
        ValueError: Shapes differ, or an argument is out of range.
    """
    return crossed_bootstrap(
        metric, y, np.asarray(p)[None], None, patients, n_resamples=n_resamples, seed=seed, level=level
    )


def paired_bootstrap(
    metric: Metric,
    y: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike,
    patients: ArrayLike,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of ``metric(a) − metric(b)``, both scored on the same resampled patients.

    Raises:
        ValueError: As ``patient_bootstrap``.
    """
    a, b = np.asarray(p_a)[None], np.asarray(p_b)[None]
    return crossed_bootstrap(metric, y, a, b, patients, n_resamples=n_resamples, seed=seed, level=level)


def crossed_bootstrap(
    metric: Metric,
    y: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike | None,
    patients: ArrayLike,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval over two random factors, patients × draws (label draws or training seeds), averaged over the draws.

    Each resample draws patients and, independently, rows of ``p_a`` and ``p_b`` (the same rows for both), as in the
    pigeonhole bootstrap of Owen (2007): the interval covers a new test set and a new draw. With one draw it is the
    patient bootstrap.

    Args:
        metric: ``metric(y, p, sample_weight)``.
        y: Labels of the one test set, ``(n,)``.
        p_a: Predictions, ``(draws, n)``.
        p_b: Predictions of the rival, ``(draws, n)``, draw by draw on the same training sample; None for the level of
            ``p_a`` itself.
        patients: Patient of each row, ``(n,)``.
        n_resamples: Number of resamples.
        seed: Of the resampling.
        level: Coverage.

    Raises:
        ValueError: Shapes differ, or an argument is out of range.
    """
    if p_b is not None and np.shape(p_a) != np.shape(p_b):
        raise ValueError(f"`p_a` and `p_b` must have one shape, got {np.shape(p_a)} and {np.shape(p_b)}.")
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    ours, *theirs = (ResampledDraws.of(metric, y, p, patients, **options) for p in (p_a, p_b) if p is not None)
    return ours.interval(*theirs, level=level)


@dataclass(frozen=True, eq=False)
class ResampledDraws:
    """A metric of each draw of one model, on the data and on resampled patients.

    Models of one test set share their resamples when seed, number of resamples and of draws are the same, so that any
    two of them are compared without scoring them again.

    Attributes:
        values: On the data as they are, ``(draws,)``.
        resampled: On each resample, ``(resamples, draws)``; 0 where ``counts`` is.
        counts: How often each draw stands in each resample, ``(resamples, draws)``.
    """

    values: Array
    resampled: Array
    counts: Array

    @classmethod
    def of(
        cls,
        metric: Metric,
        y: ArrayLike,
        p: ArrayLike,
        patients: ArrayLike,
        *,
        n_draws: int | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> ResampledDraws:
        """Scores a model on all resamples.

        Args:
            metric: ``metric(y, p, sample_weight)``.
            y: Labels, ``(n,)``.
            p: Predictions, ``(draws, n)``.
            patients: Patient of each row, ``(n,)``.
            n_draws: Draws of the models it is compared with: one draw then stands in all of them.
            n_resamples: Number of resamples.
            seed: Of the resampling.

        Raises:
            ValueError: Shapes differ, or an argument is out of range.
        """
        labels, draws, members = _checked(y, p, patients, n_resamples)
        models, wanted = _sorted_draws(metric, labels, draws), n_draws or len(draws)
        if len(draws) not in (1, wanted):
            raise ValueError(f"`p` must have one draw or `n_draws` ({wanted}), got {len(draws)}.")
        resampled, counts = np.zeros((n_resamples, len(draws))), np.empty((n_resamples, wanted))
        for place, (weight, drawn) in enumerate(resamples(members, wanted, n_resamples, seed)):
            counts[place] = drawn
            for draw in np.flatnonzero(drawn) if len(draws) > 1 else (0,):
                resampled[place, draw] = models[draw](weight)
        values = np.array([model(np.ones(len(labels))) for model in models])
        return cls(np.broadcast_to(values, wanted), np.broadcast_to(resampled, counts.shape), counts)

    def interval(self, rival: ResampledDraws | None = None, *, level: float = 0.95) -> Interval:
        """The percentile interval of the mean over the draws, or of the difference to a rival.

        Raises:
            ValueError: The rival was resampled otherwise, or ``level`` is out of range.
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must be in (0, 1), got {level}.")
        if rival is not None and not np.array_equal(self.counts, rival.counts):
            raise ValueError("`rival` must rest on the same resamples: give both the same seed, number and draws.")
        values = self.values if rival is None else self.values - rival.values
        resampled = self.resampled if rival is None else self.resampled - rival.resampled
        figures = (resampled * self.counts).sum(axis=1) / self.counts.sum(axis=1)
        return percentile_interval(float(values.mean()), figures, level, difference=rival is not None)


def resamples_for(comparisons: int, level: float = 0.95) -> int:
    """Resamples that a table of so many comparisons needs, at least 1,000.

    A bootstrap p-value is at least ``2 / (resamples + 1)``, and Holm's method multiplies it by the comparisons: with
    too few resamples no difference could ever be shown, however clear. With these it falls to half of what is needed.
    """
    return max(1000, math.ceil(4 * comparisons / (1 - level)))


def resamples(members: Array, n_draws: int, n_resamples: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """How often each row and each draw stands in each resample.

    Args:
        members: Number of each row's patient, from 0, ``(n,)``.
        n_draws: Draws that are resampled beside the patients; one is always itself.
        n_resamples: Number of resamples.
        seed: Of the resampling.

    Yields:
        Weights of the rows ``(n,)`` float64, and of the draws ``(n_draws,)``.
    """
    rng, n_patients = np.random.default_rng(seed), int(members.max()) + 1
    for _ in range(n_resamples):
        weight = np.bincount(rng.integers(n_patients, size=n_patients), minlength=n_patients)[members]
        draws = np.bincount(rng.integers(n_draws, size=n_draws), minlength=n_draws) if n_draws > 1 else np.ones(1)
        yield weight.astype(np.float64), draws


def holm(p_values: Sequence[float | None]) -> list[float]:
    """P-values of one table adjusted for its family of comparisons (Holm 1979); None becomes NaN and is not counted.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = [int(i) for i in np.argsort(p) if not np.isnan(p[i])]
    adjusted = p.copy()
    steps = [min(1.0, (len(order) - rank) * p[i]) for rank, i in enumerate(order)]
    adjusted[order] = np.maximum.accumulate(steps) if steps else []
    return [float(value) for value in adjusted]


def verdict(difference: Interval, minimum: float = 0.01, p_adjusted: float | None = None) -> str:
    """``higher``, ``lower`` or ``no difference shown``.

    A difference counts when its interval excludes 0, it is at least ``minimum`` large and, in a table of several
    comparisons, its adjusted p-value stays below 1 − level.
    """
    excludes_zero = difference.low > 0 or difference.high < 0
    significant = p_adjusted is None or p_adjusted < 1 - difference.level
    if not (excludes_zero and significant and abs(difference.value) >= minimum):
        return NO_DIFFERENCE
    return "higher" if difference.value > 0 else "lower"


def _checked(y: ArrayLike, p: ArrayLike, patients: ArrayLike, n_resamples: int) -> tuple[Array, Array, Array]:
    """Arrays as float64 and the patients renumbered from 0."""
    labels, draws, ids = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64), np.asarray(patients)
    if draws.ndim != 2 or not draws.size or draws.shape[1:] != labels.shape or ids.shape != labels.shape:
        raise ValueError(
            "`p` must hold one prediction for each of the rows of `y` and `patients`, "
            f"got shapes {draws.shape[1:]}, {labels.shape} and {ids.shape}."
        )
    if n_resamples < 1:
        raise ValueError(f"`n_resamples` must be >= 1, got {n_resamples}.")
    return labels, draws, np.unique(ids, return_inverse=True)[1]


def _sorted_draws(metric: Metric, y: Array, draws: Array) -> list[Callable[[Array], float]]:
    """For each draw the metric as a function of row weights; rows are sorted once, so the metric's sort is linear."""

    def scorer(p: Array) -> Callable[[Array], float]:
        order = np.argsort(p, kind="stable")
        y_sorted, p_sorted = y[order], p[order]
        return lambda weight: metric(y_sorted, p_sorted, weight[order])

    return [scorer(p) for p in draws]


def percentile_interval(value: float, resampled: Array, level: float, *, difference: bool) -> Interval:
    """The percentile interval of the resamples in which the metric was defined.

    Args:
        value: On the data as they are.
        resampled: The metric in each resample, NaN where undefined, ``(resamples,)``.
        level: Coverage.
        difference: Whether a p-value of "no difference" belongs to it.
    """
    defined = resampled[~np.isnan(resampled)]
    skipped = len(resampled) - len(defined)
    if not len(defined) or np.isnan(value):
        return Interval(value, float("nan"), float("nan"), level, 0, skipped)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    p_value = None
    if difference:
        tail = int(min((defined <= 0).sum(), (defined >= 0).sum()))
        p_value = min(1.0, 2 * (tail + 1) / (len(defined) + 1))
    return Interval(value, float(low), float(high), level, len(defined), skipped, p_value)
