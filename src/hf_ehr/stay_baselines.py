"""Baselines of intensive care stays without a neural network: seven statistics a variable, age and categories.

records ─ labels ─▶ windows (stay, prediction time) ─▶ first, last, mean, … of every variable ─▶ matrix ─▶ LR, LightGBM

The hours are those that a model of stays sees, cut at the prediction time in one place (``_hourly_stays.windows_of``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from tqdm.auto import tqdm

from hf_ehr._hourly_stays import StayWindows, windows_of
from hf_ehr._hourly_summary import LONGEST_CATEGORY
from hf_ehr._scores import Array
from hf_ehr.baselines import (
    INVERSE_PENALTIES,
    LIGHTGBM_PATIENCE,
    LIGHTGBM_ROUNDS,
    LIGHTGBM_SETTINGS,
    ROWS_PER_THREAD_POOL,
    Predictions,
    _best,
    _labels,
    _positive_class,
    _Splits,
)
from hf_ehr.schema import EhrDataError, shard_paths
from hf_ehr.stay_datasets import _asked, _stays, _subjects, stay_windows

STATISTICS = ("first", "last", "mean", "min", "max", "std", "count")
"""The seven. No slope: ``first`` and ``last`` say where a variable goes, ``std`` how restless it is meanwhile. All are
defined for a single measurement (its ``std`` is 0), where a slope is not."""
FEWEST_STAYS = 5
LEAST_SHARE = 0.01
"""A variable or category gets columns when at least this many stays, and this share of them, have it."""
NO_LIMIT = 1_000_000
"""Hours: the prediction time alone ends a window."""


@dataclass(frozen=True, eq=False)
class StaySummaries:
    """Stays as rows of numbers.

    Attributes:
        subject_id: Patient of each row, (rows,) int64.
        stay_id: Its stay, (rows,) int64.
        labels: 0 or 1, (rows,) int64.
        matrix: (rows, names) float32, NaN where nothing was measured; counts and categories are 0 there.
        names: Of the columns: ``age``, ``sex = F``, ``CINC2012/ICUType = Medical ICU``, ``mean of CINC2012/HR``.
        fields: ``age`` and the static fields of the patient, and each variable with categories by its last text,
            (rows,) each, NaN or None where unknown. For subgroups: no baseline reads them.
    """

    subject_id: Array
    stay_id: Array
    labels: Array
    matrix: Array
    names: list[str]
    fields: dict[str, Array]

    def columns(self, names: Sequence[str]) -> Array:
        """The matrix with other columns, (rows, names) float32; one that is not here is as if never measured."""
        place = {name: index for index, name in enumerate(self.names)}
        found = np.array([place.get(name, -1) for name in names], np.int64)
        empty = np.array([_empty(name) for name in names], np.float32)
        return np.where(found >= 0, self.matrix[:, found], empty).astype(np.float32)


def stay_summaries(
    data: str | Path, *, labels: pa.Table, subject_ids: Any = None, names: Sequence[str] | None = None
) -> StaySummaries:
    """Summarises the hours of stays up to the prediction time, a shard at a time.

    Args:
        data: Prepared folder.
        labels: LABELS with ``boolean_value``, asked within a stay.
        subject_ids: Patients to take, e.g. a split; all by default.
        names: Columns to make, those of the training rows; left out, they are chosen on these rows: variables and
            categories of at least ``FEWEST_STAYS`` stays and ``LEAST_SHARE`` of them.

    Returns:
        One row per label that is asked within a stay, in the order of the shards.

    Raises:
        EhrDataError: No label is asked within a stay, or a label has no boolean value.
    """
    wanted = None if subject_ids is None else pl.Series("subject_id", np.unique(np.asarray(subject_ids, np.int64)))
    asked, parts = _asked(labels, wanted), []
    for path in tqdm(shard_paths(data, "records"), desc="Summarising stays", unit="shard"):
        here = asked.filter(pl.col("subject_id").is_in(_subjects(path).implode()))
        windows = stay_windows(_stays(path), here)
        if len(windows):
            windows = windows.with_row_index("row")
            parts.append(summarised(path, windows, here["subject_id"]))
    if not parts:
        raise EhrDataError(
            f"No stay is left of {len(asked):,} labels. Check that the records hold intensive care stays, and the "
            "split."
        )
    return _assembled(parts, names)


class Summarised(NamedTuple):
    """Rows of a shard in long form.

    Attributes:
        rows: ``subject_id``, ``stay_id``, ``labels``, ``age`` and the static fields.
        numbers: ``row``, ``name`` and the seven statistics.
        texts: ``row``, ``name``, ``text``: the last one of each variable with categories.
    """

    rows: pl.DataFrame
    numbers: pl.DataFrame
    texts: pl.DataFrame


def summarised(path: Path, windows: pl.DataFrame, subjects: pl.Series) -> Summarised:
    """The rows of one shard.

    Args:
        path: The shard.
        windows: ``row`` (from 0), ``stay_id``, ``end_hour`` and ``labels``. A row may have several stays, then with
            ``since``: hours from the start of the row to that of the stay.
        subjects: Whom they belong to.

    Raises:
        EhrDataError: Two stays have one id.
    """
    (cut,) = windows_of([path], windows.select("stay_id", "end_hour"), NO_LIMIT, subjects.unique(), "")
    if cut.table["stay_id"].to_pylist() != windows["stay_id"].to_list():
        raise EhrDataError("`stay_id` must be of one stay only, and is not. Give every stay an id of its own.")
    fields = {name: pl.Series(values.tolist(), dtype=_kind(name)) for name, values in cut.fields.items()}
    rows = pl.DataFrame(cut.table.select(["subject_id", "stay_id"])).with_columns(windows["row"], windows["labels"])
    rows = rows.with_columns(**fields).unique("row", keep="first", maintain_order=True).drop("row")
    return Summarised(rows, *_statistics(cut, windows))


def _kind(name: str) -> Any:
    return pl.Float64 if name == "age" else pl.String


def _statistics(cut: StayWindows, windows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(``row, name`` and the seven statistics, ``row, name, text``)."""
    since = windows["since"].to_numpy()[cut.window] if "since" in windows.columns else 0.0
    measured = pl.DataFrame(
        {
            "row": windows["row"].to_numpy()[cut.window].astype(np.int64),
            "name": cut.name_codes.astype(np.int64),
            "hour": np.where(cut.hour < 0, np.nan, cut.hour + since),
            "value": cut.value.astype(np.float64),
            "text": cut.text_codes.astype(np.int64),
        }
    ).filter(pl.col("hour").is_finite() & (pl.col("name") >= 0))
    by = ["row", "name"]
    measured = measured.sort(*by, "hour", maintain_order=True)
    value = pl.col("value")
    statistics = {name: getattr(value, name)() for name in ("first", "last", "mean", "min", "max")}
    statistics |= {"std": value.std(ddof=0), "count": pl.len().cast(pl.Float64)}
    numbers = measured.filter(value.is_finite()).group_by(*by, maintain_order=True).agg(**statistics)
    texts = measured.filter(value.is_nan() & (pl.col("text") >= 0)).group_by(*by, maintain_order=True)
    names, words = (pl.Series(values, dtype=pl.String) for values in (cut.names, cut.texts))
    last = texts.agg(pl.col("text").last()).with_columns(pl.col("text").map_batches(words.gather, pl.String))
    last = last.filter(pl.col("text").str.len_chars() <= LONGEST_CATEGORY)
    named = pl.col("name").map_batches(names.gather, pl.String)
    return numbers.with_columns(named), last.with_columns(named)


def _assembled(parts: Sequence[Summarised], names: Sequence[str] | None) -> StaySummaries:
    """The shards one after the other, as a matrix."""
    first = np.cumsum([0, *(len(part.rows) for part in parts)])
    rows = pl.concat([part.rows for part in parts])
    numbers, texts = (
        pl.concat([frame.with_columns(pl.col("row") + start) for frame, start in zip(frames, first[:-1], strict=True)])
        for frames in zip(*(part[1:] for part in parts), strict=True)
    )
    statics = [name for name in rows.columns if rows[name].dtype == pl.String]
    given = rows.select(statics).with_row_index("row").unpivot(index="row", variable_name="name", value_name="text")
    known = pl.concat([given.with_columns(pl.col("row").cast(pl.Int64)), texts]).drop_nulls("text")
    categories = known.select("row", name=pl.format("{} = {}", "name", "text"))
    names = _chosen(numbers, categories, len(rows)) if names is None else list(names)
    fields = {name: rows[name].to_numpy() for name in ("age", *statics)}
    for (name,), own in texts.group_by("name", maintain_order=True):
        fields[name] = np.full(len(rows), None, object)
        fields[name][own["row"].to_numpy()] = own["text"].to_numpy()
    return StaySummaries(
        subject_id=rows["subject_id"].to_numpy(),
        stay_id=rows["stay_id"].to_numpy(),
        labels=rows["labels"].to_numpy(),
        matrix=_matrix(rows["age"].to_numpy(), numbers, categories, names),
        names=names,
        fields=fields,
    )


def _chosen(numbers: pl.DataFrame, categories: pl.DataFrame, rows: int) -> list[str]:
    """Columns of what enough rows have, in the order of the alphabet."""
    fewest = max(FEWEST_STAYS, LEAST_SHARE * rows)

    def common(frame: pl.DataFrame) -> list[str]:
        counts = frame.group_by("name").agg(pl.col("row").n_unique())
        return sorted(counts.filter(pl.col("row") >= fewest)["name"])

    return [
        "age",
        *common(categories),
        *(f"{statistic} of {variable}" for variable in common(numbers) for statistic in STATISTICS),
    ]


def _matrix(age: Array, numbers: pl.DataFrame, categories: pl.DataFrame, names: Sequence[str]) -> Array:
    """(rows, names) float32."""
    place = {name: index for index, name in enumerate(names)}
    matrix = np.tile(np.array([_empty(name) for name in names], np.float32), (len(age), 1))
    if "age" in place:
        matrix[:, place["age"]] = age
    _fill(matrix, categories, "{}", place, np.ones(len(categories)))
    for statistic in STATISTICS:
        _fill(matrix, numbers, f"{statistic} of {{}}", place, numbers[statistic].to_numpy())
    return matrix


def _fill(matrix: Array, frame: pl.DataFrame, title: str, place: dict[str, int], values: Array) -> None:
    """Puts a value for each ``row`` and ``name`` of a frame into the column that the title of the name has, if any."""
    distinct = frame["name"].unique()
    columns = pl.Series([place.get(title.format(name), -1) for name in distinct], dtype=pl.Int64)
    column = frame["name"].replace_strict(distinct, columns, return_dtype=pl.Int64).to_numpy()
    kept = column >= 0
    matrix[frame["row"].to_numpy()[kept], column[kept]] = values[kept]


def _empty(name: str) -> float:
    """What a column holds where nothing was measured: a count and a category are 0, anything else is unknown."""
    return 0.0 if name.startswith("count of ") or " = " in name else float("nan")


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
    return _best(splits, map(_positive_class, models))


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

    return _best(splits, map(fit, LIGHTGBM_SETTINGS))


STAY_BASELINES: dict[str, Callable[..., Predictions]] = {
    "L2 LR on summaries": summaries_lr,
    "LightGBM on summaries": summaries_lightgbm,
}
"""Each is ``fit_predict(train, validation, test, *, seed) -> Predictions`` over :class:`StaySummaries`, by its name in
tables; the columns are those of ``train``, and labels of ``test`` are never read."""


def _dense(
    train: StaySummaries, validation: StaySummaries, test: StaySummaries, features: Callable[[Array], Array]
) -> _Splits:
    x, x_validation, x_test = (features(split.columns(train.names)) for split in (train, validation, test))
    y, y_validation = (
        _labels(pa.table({"labels": split.labels}), name)
        for split, name in ((train, "train"), (validation, "validation"))
    )
    return _Splits(x, y, x_validation, y_validation, x_test)
