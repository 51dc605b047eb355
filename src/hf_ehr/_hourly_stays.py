"""Stays of RECORDS as flat columns, and windows on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .schema import STATIC_FIELDS, EhrDataError, shard_paths
from .vocabulary import Records

Windows: TypeAlias = pa.Table | pl.DataFrame
"""``stay_id`` and, each optional, ``start_hour`` (0) and ``end_hour`` (none), hours since the start of the stay."""

_HOUR = 3_600_000_000  # microseconds
_YEAR = 365.25 * 24  # hours


@dataclass
class StayWindows:
    """The windows of a shard: what was measured in each, hours counted from its start.

    Attributes:
        table: One row per window: ``subject_id``, ``visit_id``, ``stay_id``, ``start_hour``, ``end_hour``.
        stay_hours: Hours of each window, (windows,) int32.
        fields: ``age`` at the start of the window and the static fields of the patient, by name, (windows,) each.
        window: Number of the window of each measurement, (measurements,) int64.
        hour: Hours since its start, float64; negative where the record's hour is, or is missing.
        names: Distinct codes.
        name_codes: (measurements,) index into ``names``.
        value: (measurements,) float32: NaN where there is no number, infinite where it is NaN or infinite.
        texts: Distinct texts.
        text_codes: (measurements,) index into ``texts``, -1 where there is none.
        outside: Measurements that lie outside the window, or behind the end of the stay.
    """

    table: pa.Table
    stay_hours: np.ndarray
    fields: dict[str, np.ndarray]
    window: np.ndarray
    hour: np.ndarray
    names: list[str]
    name_codes: np.ndarray
    value: np.ndarray
    texts: list[str]
    text_codes: np.ndarray
    outside: int


def windows_of(
    records: Records, windows: Windows | None, n_hours: int, subject_ids: Any | None, title: str
) -> Iterator[StayWindows]:
    """The windows of one shard after the other.

    Args:
        records: RECORDS; a patient lives in one shard.
        windows: Which stays, from which hour to which; None takes every stay from its start.
        n_hours: Longest window in hours.
        subject_ids: Only the stays of these patients; None takes all.
        title: What the progress bar says.

    Raises:
        EhrDataError: `windows` has no `stay_id`, or a window ends before it starts.
    """
    wanted = None if windows is None else _check_windows(windows)
    subjects = None if subject_ids is None else pa.array(np.unique(np.asarray(list(subject_ids), np.int64)))
    for table in _tables(records, title):
        if subjects is not None:
            table = table.filter(pc.is_in(table["subject_id"], value_set=subjects))
        yield _cut(table.combine_chunks(), wanted, n_hours)


def _tables(records: Records, title: str) -> Iterator[pa.Table]:
    if isinstance(records, pa.Table):
        yield records
        return
    paths = shard_paths(records, "records") if isinstance(records, str | Path) else list(records)
    columns = ["subject_id", "birth_time", *STATIC_FIELDS.values()]
    columns += [f"visits.list.element.{name}" for name in ("visit_id", "stays")]
    for path in tqdm(paths, desc=title, unit="shard", disable=len(paths) < 2):
        yield pq.ParquetFile(path).read(columns=columns)


def _check_windows(windows: Windows) -> pl.DataFrame:
    frame = windows if isinstance(windows, pl.DataFrame) else pl.DataFrame(windows)
    if "stay_id" not in frame.columns:
        raise EhrDataError(f"`windows` must have the column `stay_id`, got {', '.join(frame.columns) or 'none'}.")
    for name, default in {"start_hour": 0.0, "end_hour": np.inf}.items():
        given = pl.col(name).cast(pl.Float64).fill_null(default) if name in frame.columns else pl.lit(default)
        frame = frame.with_columns(given.alias(name))
    frame = frame.select(pl.col("stay_id").cast(pl.Int64), "start_hour", "end_hour")
    wrong = frame.filter(~((pl.col("start_hour") >= 0) & (pl.col("end_hour") >= pl.col("start_hour")))).height
    if wrong:
        raise EhrDataError(
            f"`end_hour` must not be before `start_hour`, nor that below 0; {wrong} windows break this. Correct them."
        )
    return frame


def _cut(table: pa.Table, windows: pl.DataFrame | None, n_hours: int) -> StayWindows:
    stays, measured = _stays(table)
    if windows is None:
        stays = stays.with_columns(start_hour=pl.lit(0.0), end_hour=pl.lit(float(n_hours)))
    else:
        stays = windows.join(stays, on="stay_id", how="inner", maintain_order="left")
    stays = stays.with_columns(end_hour=pl.min_horizontal("end_hour", pl.col("start_hour") + n_hours))
    window, rows = _gather(measured, stays["stay"].to_numpy())
    inner = pc.list_flatten(measured)
    hour = pc.fill_null(pc.struct_field(inner, "hour"), np.nan).to_numpy()[rows]
    # Hours of records are float32: so is what they are compared with.
    start, end, duration = (
        stays[name].to_numpy().astype(np.float32) for name in ("start_hour", "end_hour", "duration")
    )
    limit = np.minimum(end, np.nextafter(duration, np.float32(np.inf)))  # what is measured at the end belongs to it
    inside = (hour >= start[window]) & (hour < limit[window])
    broken = ~(hour >= 0)
    kept = np.flatnonzero(inside | broken)
    since = np.where(broken, -1.0, hour.astype(np.float64) - start[window])
    # A stay without an end, of which no time is asked, is known until its last measurement.
    open_end = np.isinf(duration) & (windows is None)
    length = np.where(open_end, 0, np.minimum(end, duration) - start)
    columns = ("subject_id", "visit_id", "stay_id", "start_hour", "end_hour")
    return StayWindows(
        table=stays.select(columns).to_arrow(),
        stay_hours=_hours(window[inside], since[inside], length),
        fields=_fields(table, stays),
        window=window[kept],
        hour=since[kept],
        outside=len(rows) - len(kept),
        **_readings(inner.take(pa.array(rows[kept]))),
    )


def _stays(table: pa.Table) -> tuple[pl.DataFrame, pa.Array]:
    """One row per stay, and their measurements."""
    visits = table["visits"].combine_chunks()
    inner = pc.list_flatten(visits)
    lists = pc.struct_field(inner, "stays")
    stays, visit = pc.list_flatten(lists), pc.list_parent_indices(lists)
    patient = pc.list_parent_indices(visits).take(visit)
    columns = pa.table(
        {
            "subject_id": table["subject_id"].combine_chunks().take(patient),
            "visit_id": pc.struct_field(inner, "visit_id").take(visit),
            "stay_id": pc.struct_field(stays, "stay_id"),
            "patient": patient,
            "begin": pc.struct_field(stays, "start").cast(pa.int64()),
            "finish": pc.struct_field(stays, "end").cast(pa.int64()),
            "birth": table["birth_time"].combine_chunks().cast(pa.int64()).take(patient),
        }
    )
    frame = pl.DataFrame(columns).with_columns(
        duration=((pl.col("finish") - pl.col("begin")) / _HOUR).fill_null(np.inf),
        age=((pl.col("begin") - pl.col("birth")) / _HOUR).fill_null(np.nan),
        stay=pl.int_range(pl.len()),
    )
    return frame, pc.struct_field(stays, "measurements")


def _gather(lists: pa.Array, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Window and row of each measurement of some stays, row by row of ``stays``."""
    sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    first = np.cumsum(sizes) - sizes
    window = np.repeat(np.arange(len(stays)), sizes[stays])
    within = np.arange(len(window)) - np.repeat(np.cumsum(sizes[stays]) - sizes[stays], sizes[stays])
    return window, first[stays][window] + within


def _hours(window: np.ndarray, since: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Hours that each window has: as many as its length and its last measurement need."""
    hours = np.ceil(np.maximum(length, 0)).astype(np.int32)
    np.maximum.at(hours, window, np.floor(since).astype(np.int32) + 1)
    return hours


def _fields(table: pa.Table, stays: pl.DataFrame) -> dict[str, np.ndarray]:
    """Age in years at the start of the window, and the static fields."""
    patient = pa.array(stays["patient"].to_numpy())
    fields = {"age": ((stays["age"] + stays["start_hour"]) / _YEAR).to_numpy()}
    for name in STATIC_FIELDS.values():
        fields[name] = table[name].take(patient).to_numpy()
    return fields


def _readings(measurements: pa.Array) -> dict[str, Any]:
    """Names, values and texts, each distinct string once."""
    names = pc.struct_field(measurements, "name").dictionary_encode()
    texts = pc.struct_field(measurements, "text").dictionary_encode()
    value = pc.struct_field(measurements, "value")
    broken = pc.and_(pc.is_nan(value), pc.is_null(texts)).fill_null(False).to_numpy(zero_copy_only=False)
    numbers = pc.fill_null(value, np.nan).to_numpy(zero_copy_only=False)
    return {
        "names": names.dictionary.to_pylist(),
        "name_codes": pc.fill_null(names.indices, -1).to_numpy(zero_copy_only=False),
        "value": np.where(broken, np.float32(np.inf), numbers),
        "texts": texts.dictionary.to_pylist(),
        "text_codes": pc.fill_null(texts.indices, -1).to_numpy(zero_copy_only=False),
    }
