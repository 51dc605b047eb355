"""Records with intensive care stays → examples: one stay, seen up to the moment at which it is asked about.

records ─ labels ─▶ windows (stay, end hour) ─ extractor ─▶ hours, demographics, labels ─▶ datasets.Dataset
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ._example_writer import ExampleWriter
from .hourly import hourly_examples
from .models.feature_extraction_hourly import HourlyFeatureExtractor
from .schema import EhrDataError, shard_paths

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

HOUR = 3_600_000_000
"""Microseconds."""
_STAYS = "visits.list.element.stays.list.element."
_STAY_COLUMNS = ["subject_id", *(f"{_STAYS}{name}" for name in ("stay_id", "start", "end"))]


def build_stay_examples(
    data: str | Path,
    extractor: HourlyFeatureExtractor,
    *,
    labels: pa.Table | None = None,
    subject_ids: Any = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """One example per label, or per stay where there are no labels.

    Args:
        data: Prepared folder.
        extractor: Hourly features, fitted on the training patients (:func:`hf_ehr.hourly.fit_hourly_features`).
        labels: LABELS with ``boolean_value``, asked within a stay: the hours from its start to the prediction time are
            seen. Without: every stay from its start, for pre-training.
        subject_ids: Patients to take, e.g. a split; all by default.
        cache_dir: Folder for the Arrow files; in memory without.

    Returns:
        Columns ``subject_id``, ``stay_id``, ``stay_hours``, ``feature_ids``, ``feature_counts``, ``demographics``, in
        continuous form ``feature_values``, and with labels ``labels`` (int64).

    Raises:
        EhrDataError: No example is left, a label has no boolean value, or two stays of one id are asked about.
    """
    wanted = None if subject_ids is None else pl.Series("subject_id", np.unique(np.asarray(subject_ids, np.int64)))
    asked = None if labels is None else asked_times(labels, wanted)
    continuous = extractor.form == "continuous"
    writer = ExampleWriter(_features(continuous, labels is not None), None if cache_dir is None else Path(cache_dir))
    counts: Counter[str] = Counter()
    for path in tqdm(shard_paths(data, "records"), desc="Building examples", unit="shard"):
        writer.add(_rows(path, extractor, asked, wanted, counts))
    if not counts["examples"]:
        raise EhrDataError(
            f"No example is left of {counts['labels']:,} labels ({counts['outside']:,} asked outside of a stay). "
            "Check that the records hold intensive care stays, and the split."
        )
    if counts["outside"]:
        logger.warning("%d labels are asked outside of any stay: left out.", counts["outside"])
    return writer.finish(f"{counts['examples']} stays; {counts['ignored']} measurements ignored.")


def stay_windows(stays: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """The stay in which each label is asked, and its hour.

    Args:
        stays: ``subject_id``, ``stay_id``, ``start``, ``end``.
        asked: ``subject_id``, ``prediction_time``, ``labels``.

    Returns:
        ``stay_id``, ``end_hour`` and ``labels``: the stay that began last among those that were running.
    """
    found = asked.with_row_index("label").join(stays, on="subject_id")
    running = (pl.col("start") <= pl.col("prediction_time")) & (
        pl.col("end").is_null() | (pl.col("prediction_time") <= pl.col("end"))
    )
    found = found.filter(running).sort("label", "start", "stay_id")
    found = found.unique("label", keep="last", maintain_order=True)
    hours = (pl.col("prediction_time") - pl.col("start")).dt.total_microseconds() / HOUR
    return found.select("stay_id", "labels", end_hour=hours)


def asked_times(labels: pa.Table, wanted: pl.Series | None) -> pl.DataFrame:
    """Who is asked when, of the wanted patients or of all.

    Raises:
        EhrDataError: A label has no answer.
    """
    frame = pl.DataFrame(labels.select(["subject_id", "prediction_time", "boolean_value"]))
    frame = frame if wanted is None else frame.filter(pl.col("subject_id").is_in(wanted.implode()))
    if frame["boolean_value"].null_count():
        raise EhrDataError("`labels` must have a `boolean_value` in every row. Stays are asked yes-or-no questions.")
    return frame.select("subject_id", "prediction_time", labels=pl.col("boolean_value").cast(pl.Int64))


def _rows(
    path: Path,
    extractor: HourlyFeatureExtractor,
    asked: pl.DataFrame | None,
    wanted: pl.Series | None,
    counts: Counter[str],
) -> Iterator[pa.Table]:
    stays = stays_of_shard(path)
    stays = stays if wanted is None else stays.filter(pl.col("subject_id").is_in(wanted.implode()))
    windows = None
    if asked is not None:
        here = asked.filter(pl.col("subject_id").is_in(subjects_of_shard(path).implode()))
        windows = stay_windows(stays, here)
        counts["labels"] += len(here)
        counts["outside"] += len(here) - len(windows)
    if not len(stays) or (windows is not None and not len(windows)):
        return
    made = hourly_examples([path], extractor, windows, subject_ids=stays["subject_id"].unique())
    table = made.table
    if windows is not None:
        # Rows come back in the order of the windows.
        if table["stay_id"].to_pylist() != windows["stay_id"].to_list():
            raise EhrDataError("`stay_id` must be of one stay only, and is not. Give every stay an id of its own.")
        table = table.append_column("labels", windows["labels"].to_arrow())
    counts["examples"] += table.num_rows
    counts["ignored"] += made.ignored.total()
    names = ["subject_id", "stay_id", "stay_hours", "feature_ids", "feature_counts", "demographics"]
    names += [name for name in ("feature_values", "labels") if name in table.column_names]
    yield table.select(names)


def subjects_of_shard(path: Path) -> pl.Series:
    """``subject_id`` of every patient of a shard."""
    return pl.Series("subject_id", pq.ParquetFile(path).read(columns=["subject_id"])["subject_id"])


def stays_of_shard(path: Path) -> pl.DataFrame:
    """``subject_id``, ``stay_id``, ``start`` and ``end`` of every stay of a shard."""
    frame = pl.DataFrame(pq.ParquetFile(path).read(columns=_STAY_COLUMNS))
    frame = frame.explode("visits").drop_nulls("visits").unnest("visits").explode("stays").drop_nulls("stays")
    return frame.unnest("stays").select("subject_id", "stay_id", "start", "end")


def _features(continuous: bool, labelled: bool) -> datasets.Features:
    from datasets import Features, List, Value

    columns = {"subject_id": Value("int64"), "stay_id": Value("int64"), "stay_hours": Value("int32")}
    lists = {"feature_ids": "int32", "feature_counts": "int16", "demographics": "float32"}
    lists |= {"feature_values": "float32"} if continuous else {}
    columns |= {name: List(Value(kind)) for name, kind in lists.items()}
    return Features({**columns, **({"labels": Value("int64")} if labelled else {})})
