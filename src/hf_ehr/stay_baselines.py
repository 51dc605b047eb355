"""Baselines of intensive care stays and admissions without a neural network, on summaries of what was measured.

records ─ labels ─▶ summaries (``_stay_summaries``) ─▶ L2 logistic regression, LightGBM
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from hf_ehr._scores import Array
from hf_ehr._stay_summaries import STATISTICS, UNIT_TYPES, StaySummaries, admission_summaries, stay_summaries
from hf_ehr.baselines import (
    INVERSE_PENALTIES,
    LIGHTGBM_PATIENCE,
    LIGHTGBM_ROUNDS,
    LIGHTGBM_SETTINGS,
    ROWS_PER_THREAD_POOL,
    FeatureSplits,
    Predictions,
    best_on_validation,
    labels_to_fit,
    positive_probability,
)


def summaries_lr(train: StaySummaries, validation: StaySummaries, test: StaySummaries, *, seed: int) -> Predictions:
    """L2 logistic regression, its penalty of the highest validation AUROC; ``seed`` is not used: nothing is random.

    Values are imputed by the training median, standardised, and cut at ``OUTLIER`` deviations; every pattern of
    missing columns that the training rows have gets a flag (the seven statistics of a variable share one).

    Raises:
        ValueError: A split lacks a class.
    """
    from sklearn.linear_model import LogisticRegression

    splits = _dense(train, validation, test, _linear_features(train.matrix))
    models = (LogisticRegression(C=penalty, max_iter=5000).fit(splits.x, splits.y) for penalty in INVERSE_PENALTIES)
    return best_on_validation(splits, map(positive_probability, models))


OUTLIER = 5.0
"""Deviations: one laboratory value of a hundred times the usual must not decide over a linear score."""


def _linear_features(train: Array) -> Callable[[Array], Array]:
    """What a linear model reads, with medians, deviations and flags of the training matrix."""
    missing = np.isnan(train)
    middle = np.nanmedian(np.where(missing.all(axis=0), 0, train), axis=0)
    filled = np.where(missing, middle, train).astype(np.float64)
    mean, scale = filled.mean(axis=0), filled.std(axis=0)
    scale[scale < 1e-6 * np.maximum(np.abs(mean), 1)] = np.inf  # a constant says nothing
    _, flags = np.unique(missing, axis=1, return_index=True)
    flags = flags[missing[:, flags].any(axis=0) & ~missing[:, flags].all(axis=0)]

    def features(matrix: Array) -> Array:
        unknown = np.isnan(matrix)
        scaled = np.clip((np.where(unknown, middle, matrix) - mean) / scale, -OUTLIER, OUTLIER)
        return np.concatenate([scaled, unknown[:, flags]], axis=1)

    return features


def summaries_lightgbm(
    train: StaySummaries, validation: StaySummaries, test: StaySummaries, *, seed: int
) -> Predictions:
    """LightGBM; number of trees by early stopping, leaves and their size from four settings. It reads NaN as missing.

    Raises:
        ImportError: LightGBM is not installed.
        ValueError: A split lacks a class.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError(
            "`summaries_lightgbm` needs LightGBM. Do `pip install 'transformers-ehr[baselines]'`."
        ) from error
    splits = _dense(train, validation, test, lambda matrix: matrix)
    fixed = {"objective": "binary", "metric": "auc", "learning_rate": 0.05, "seed": seed, "verbosity": -1}
    # Seven columns say nearly the same: trees on random thirds of them differ.
    fixed |= {"feature_fraction": 0.3, "deterministic": True, "force_col_wise": True}
    fixed["num_threads"] = 1 if len(splits.y) < ROWS_PER_THREAD_POOL else 0  # 0: all cores

    def fit(setting: dict[str, int]) -> Callable[[Any], Array]:
        rows = lightgbm.Dataset(splits.x, splits.y)
        held_out = lightgbm.Dataset(splits.x_validation, splits.y_validation, reference=rows)
        stop = lightgbm.early_stopping(LIGHTGBM_PATIENCE, verbose=False)
        model = lightgbm.train(fixed | setting, rows, LIGHTGBM_ROUNDS, valid_sets=[held_out], callbacks=[stop])
        return lambda x: np.asarray(model.predict(x))

    return best_on_validation(splits, map(fit, LIGHTGBM_SETTINGS))


STAY_BASELINES: dict[str, Callable[..., Predictions]] = {
    "L2 LR on summaries": summaries_lr,
    "LightGBM on summaries": summaries_lightgbm,
}
"""Each is ``fit_predict(train, validation, test, *, seed) -> Predictions`` over :class:`StaySummaries`, by its name in
tables; the columns are those of ``train``, and labels of ``test`` are never read."""


def _dense(
    train: StaySummaries, validation: StaySummaries, test: StaySummaries, features: Callable[[Array], Array]
) -> FeatureSplits:
    x, x_validation, x_test = (features(split.columns(train.names)) for split in (train, validation, test))
    y, y_validation = (
        labels_to_fit(pa.table({"labels": split.labels}), name)
        for split, name in ((train, "train"), (validation, "validation"))
    )
    return FeatureSplits(x, y, x_validation, y_validation, x_test)


__all__ = [
    "STATISTICS",
    "STAY_BASELINES",
    "UNIT_TYPES",
    "StaySummaries",
    "admission_summaries",
    "stay_summaries",
    "summaries_lightgbm",
    "summaries_lr",
]
