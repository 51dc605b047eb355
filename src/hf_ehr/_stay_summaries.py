"""Intensive care stays, and admissions, as rows of numbers: seven statistics a variable, age, categories, codes.

records ─ labels ─▶ windows (stay, prediction time) ─▶ first, last, mean, … of every variable ─▶ matrix

The hours are those that a model of stays sees, cut at the prediction time in one place (``_hourly_stays.windows_of``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_ehr._hourly_stays import StayWindows, windows_of
from hf_ehr._hourly_summary import LONGEST_CATEGORY
from hf_ehr._scores import Array
from hf_ehr.admission_datasets import admission_windows
from hf_ehr.schema import CODE_KINDS, STATIC_FIELDS, EhrDataError, shard_paths
from hf_ehr.stay_datasets import HOUR, asked_times, stay_windows, stays_of_shard, subjects_of_shard

STATISTICS = ("first", "last", "mean", "min", "max", "std", "count")
"""The seven. No slope: ``first`` and ``last`` say where a variable goes, ``std`` how restless it is meanwhile. All are
defined for a single measurement (its ``std`` is 0), where a slope is not."""
FEWEST_STAYS = 5
LEAST_SHARE = 0.01
"""A variable or category gets columns when at least this many stays, and this share of them, have it."""
UNIT_TYPES = ("CINC2012/ICUType",)
"""Variables that say in which unit a stay is."""
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

    def in_order(self, ids: Array, labels: Array) -> StaySummaries:
        """The rows of some or all examples, in their order.

        An admission is asked about once for each of its stays: of equal id and label the first row is that of the
        first example, and so on.

        Args:
            ids: `stay_id` (of an admission its `visit_id`) of each example.
            labels: Label of each.

        Raises:
            EhrDataError: An example has no row, or of equal id and label there are more or fewer rows than examples.
        """
        asked, ours = _numbered(ids, labels), _numbered(self.stay_id, self.labels)
        found = asked.join(ours, on=["id", "label", "place", "size"], how="left", maintain_order="left")
        if found["row_right"].null_count():
            raise EhrDataError(f"Summaries must be of the {len(ids)} examples, and are not. Label the data again.")
        rows = found["row_right"].to_numpy()
        parts = {name: getattr(self, name)[rows] for name in ("subject_id", "stay_id", "labels", "matrix")}
        return replace(self, fields={name: values[rows] for name, values in self.fields.items()}, **parts)


def _numbered(ids: Array, labels: Array) -> pl.DataFrame:
    """``row``, ``id``, ``label``, its ``place`` among the rows of equal id and label, and their number, ``size``."""
    frame, group = pl.DataFrame({"id": ids, "label": labels}).cast(pl.Int64).with_row_index("row"), ["id", "label"]
    return frame.with_columns(place=pl.int_range(pl.len()).over(group), size=pl.len().over(group))


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
    asked, parts = asked_times(labels, wanted), []
    for path in tqdm(shard_paths(data, "records"), desc="Summarising stays", unit="shard"):
        here = asked.filter(pl.col("subject_id").is_in(subjects_of_shard(path).implode()))
        windows = stay_windows(stays_of_shard(path), here)
        if len(windows):
            windows = windows.with_row_index("row")
            parts.append(_summarised(path, windows, here["subject_id"]))
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
    codes: pl.DataFrame
    """``row``, ``name``, ``text``: the codes of an admission, of which a row may have many."""


NO_CODES = pl.DataFrame(schema={"row": pl.Int64, "name": pl.String, "text": pl.String})


def _summarised(path: Path, windows: pl.DataFrame, subjects: pl.Series) -> Summarised:
    """The stays of one shard, from ``row`` (from 0), ``stay_id``, ``end_hour`` and ``labels``."""
    cut = _cut(path, windows, subjects)
    fields = {
        name: pl.Series(values.tolist(), dtype=pl.Float64 if name == "age" else pl.String)
        for name, values in cut.fields.items()
    }
    rows = pl.DataFrame(cut.table.select(["subject_id", "stay_id"])).with_columns(windows["labels"], **fields)
    return Summarised(rows, *_statistics(cut, windows), NO_CODES)


def _cut(path: Path, windows: pl.DataFrame, subjects: pl.Series) -> StayWindows:
    """What was measured within the windows of some stays.

    Raises:
        EhrDataError: Two stays have one id.
    """
    (cut,) = windows_of([path], windows.select("stay_id", "end_hour"), NO_LIMIT, subjects.unique(), "")
    if cut.table["stay_id"].to_pylist() != windows["stay_id"].to_list():
        raise EhrDataError("`stay_id` must be of one stay only, and is not. Give every stay an id of its own.")
    return cut


def admission_summaries(
    data: str | Path, *, labels: pa.Table, subject_ids: Any = None, names: Sequence[str] | None = None
) -> StaySummaries:
    """Summarises admissions as far as they are known at the prediction time, a shard at a time.

    The seven statistics are over the hours of all stays that had begun; codes are there or not, by their ``*_at``.

    Args:
        data: Prepared folder.
        labels: LABELS with ``boolean_value``, asked within an inpatient visit.
        subject_ids: Patients to take, e.g. a split; all by default.
        names: Columns to make, as in :func:`stay_summaries`.

    Returns:
        One row per label that is asked within a visit (:func:`hf_ehr.admission_datasets.admission_windows`), in the
        order of the shards. ``stay_id`` holds the visit's id, age is that at its start.

    Raises:
        EhrDataError: No label is asked within an inpatient visit, or a label has no boolean value.
    """
    wanted = None if subject_ids is None else pl.Series("subject_id", np.unique(np.asarray(subject_ids, np.int64)))
    asked, parts = asked_times(labels, wanted), []
    for path in tqdm(shard_paths(data, "records"), desc="Summarising admissions", unit="shard"):
        visits = pl.DataFrame(pq.ParquetFile(path).read(columns=_ADMISSION_COLUMNS)).explode("visits")
        visits = visits.drop_nulls("visits").unnest("visits").filter(pl.col("kind") == "inpatient")
        here = asked.filter(pl.col("subject_id").is_in(visits["subject_id"].implode()))
        found = admission_windows(visits, here).with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
        if len(found):
            parts.append(_admissions(path, found))
    if not parts:
        raise EhrDataError(
            f"No admission is left of {len(asked):,} labels. Check that the records hold inpatient visits, and the "
            "split."
        )
    return _assembled(parts, names)


_YEAR = 365.25 * 24 * HOUR  # microseconds
_ADMISSION_COLUMNS = ["subject_id", "birth_time", *STATIC_FIELDS.values()]
_ADMISSION_COLUMNS += [f"visits.list.element.{name}" for name in ("visit_id", "start", "end", "kind")]
_ADMISSION_COLUMNS += [f"visits.list.element.{name}{end}" for name in CODE_KINDS for end in ("", "_at")]
_ADMISSION_COLUMNS += [f"visits.list.element.stays.list.element.{name}" for name in ("stay_id", "start")]


def _admissions(path: Path, found: pl.DataFrame) -> Summarised:
    """The admissions of one shard: a row of ``found`` is a visit, its patient, prediction time and label."""
    age = (pl.col("start") - pl.col("birth_time")).dt.total_microseconds() / _YEAR
    rows = found.select(
        "subject_id", "labels", *STATIC_FIELDS.values(), stay_id="visit_id", age=age.fill_null(float("nan"))
    )
    begun = found.select("row", "prediction_time", "stays", visit="start").explode("stays").drop_nulls("stays")
    begun = begun.unnest("stays").filter(pl.col("start") <= pl.col("prediction_time")).sort("row", "start", "stay_id")
    windows = begun.with_columns(
        end_hour=(pl.col("prediction_time") - pl.col("start")).dt.total_microseconds() / HOUR,
        since=(pl.col("start") - pl.col("visit")).dt.total_microseconds() / HOUR,
    )
    codes = [
        found.select("row", "prediction_time", text=kind, at=f"{kind}_at")
        .explode("text", "at")
        .drop_nulls()
        .filter(pl.col("at") <= pl.col("prediction_time"))
        .select("row", pl.lit(kind).alias("name"), "text")
        for kind in CODE_KINDS
    ]
    return Summarised(rows, *_statistics(_cut(path, windows, found["subject_id"]), windows), pl.concat(codes).unique())


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
    numbers, texts, codes = (
        pl.concat([frame.with_columns(pl.col("row") + start) for frame, start in zip(frames, first[:-1], strict=True)])
        for frames in zip(*(part[1:] for part in parts), strict=True)
    )
    statics = [name for name in rows.columns if rows[name].dtype == pl.String]
    given = rows.select(statics).with_row_index("row").unpivot(index="row", variable_name="name", value_name="text")
    known = pl.concat([given.with_columns(pl.col("row").cast(pl.Int64)), texts, codes]).drop_nulls("text")
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
