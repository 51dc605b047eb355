"""Measurements of intensive care stays → hourly features (the FIDDLE recipe), fitted on the training patients.

The rivals' complaint is memory (300 GB). Here shards are read one after the other, values are counted instead of kept,
and the grid of hours exists for a block of stays at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from ._hourly_fitting import Fit, choose_features, choose_fields, choose_variables, fit_bins, inputs
from ._hourly_stays import Records, Windows, windows_of
from ._hourly_summary import HourlySummary, format_hourly_summary, summarise_measurements
from .models.feature_extraction_hourly import HourlyFeatureExtractor
from .schema import EhrDataError
from .tasks.audit import fingerprint
from .vocabulary import MIN_PATIENTS


class HourlyExamples(NamedTuple):
    """Features of stays, as rows.

    Attributes:
        table: ``subject_id``, ``visit_id``, ``stay_id``, ``start_hour``, ``end_hour``, then what the extractor makes:
            ``stay_hours`` (int32), ``feature_ids`` (list of int32), ``feature_counts`` (list of int16, one per hour),
            ``feature_values`` (list of float32; continuous form) and ``demographics`` (list of float32).
        ignored: Measurements that were left out, by reason.
    """

    table: pa.Table
    ignored: Counter[str]


def hourly_examples(
    records: Records,
    extractor: HourlyFeatureExtractor,
    windows: Windows | None = None,
    *,
    subject_ids: Any | None = None,
) -> HourlyExamples:
    """Features of many stays at once.

    Args:
        records: RECORDS in memory, a prepared folder, or paths of Parquet shards; the result holds all of them, so
            that a large folder is better read a shard at a time.
        extractor: From :func:`fit_hourly_features`.
        windows: ``stay_id``, ``start_hour`` (0) and ``end_hour``, hours since the start of the stay; a stay may have
            several. None takes every stay from its start. Nothing measured at ``end_hour`` or later is read, and
            nothing beyond the extractor's ``n_hours``.
        subject_ids: Only the stays of these patients.

    Returns:
        One row per window whose stay is in the records, in the order of ``windows`` within a shard. A window has as
        many hours as the stay lasts within it (without an end: until its last measurement), the last one begun
        included; a stay without hours has empty lists.

    Raises:
        EhrDataError: `windows` has no ``stay_id``, or a window ends before it starts.
    """
    tables: list[pa.Table] = []
    ignored: Counter[str] = Counter()
    for shard in windows_of(records, windows, extractor.n_hours, subject_ids, "Hourly features"):
        column = extractor.encode_column(*inputs(shard, extractor), demographics=shard.fields)
        hours = np.append(0, np.cumsum(column.stay_hours, dtype=np.int64))
        entries = np.append(0, np.cumsum(column.feature_counts, dtype=np.int64))[hours]
        rows = {
            "stay_hours": pa.array(column.stay_hours),
            "feature_ids": _lists(entries, column.feature_ids),
            "feature_counts": _lists(hours, column.feature_counts),
        }
        if column.feature_values is not None:
            rows["feature_values"] = _lists(entries, column.feature_values)
        size = column.demographics.shape[1]
        rows["demographics"] = _lists(np.arange(len(hours)) * size, column.demographics.ravel())
        table = shard.table
        for name, values in rows.items():
            table = table.append_column(name, values)
        tables.append(table)
        ignored.update(column.ignored | {"outside the hours of the stay": shard.outside})
    return HourlyExamples(pa.concat_tables(tables), ignored)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    if offsets[-1] > np.iinfo(np.int32).max:
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def fit_hourly_features(
    records: Records,
    *,
    subject_ids: Any,
    windows: Windows | None = None,
    n_hours: int = 48,
    form: Literal["binned", "continuous"] = "binned",
    demographics: Sequence[str] = ("age", "sex", "race"),
    static: Sequence[str] = (),
    as_text: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    valid_ranges: Mapping[str, tuple[float, float]] | None = None,
    variable_threshold: float = 0.001,
    constant_threshold: float = 0.001,
    min_prevalence: float = 0.05,
    min_patients: int = MIN_PATIENTS,
    frequent_per_hour: float = 1.0,
    num_bins: int = 5,
    fill_infrequent: bool = True,
) -> HourlyFeatureExtractor:
    """Fits the hourly features on the training patients, in three passes over the shards.

    1. Measurements are counted (:func:`summarise_measurements`): variables of too few stays go, and it is decided
       which have numbers, which have categories, and which are frequent.
    2. The values of the hours, carried forward, are counted; their quantiles are the edges of the bins, equal ones
       merged. They are exact up to 16 significant bits of a value.
    3. Features are counted by stay and filtered: the near-constant, those of too few stays, and of those that are
       equal, or opposite, in every hour all but the first.

    Args:
        records: RECORDS in memory, a prepared folder, or paths of Parquet shards (read three times).
        subject_ids: The training patients, no others: whatever is fitted is fitted on the training split.
        windows: ``stay_id``, ``start_hour``, ``end_hour``; None takes every stay from its start.
        n_hours: Longest window in hours.
        form: ``binned``, FIDDLE's one-hot features, or ``continuous``, standardised values.
        demographics: ``age`` (at the start of the window) and static fields of the patient (``sex``, ``race``, …).
        static: Variables among the measurements whose first value goes to the demographics, e.g. a height.
        as_text: Variables whose numbers are categories, e.g. the type of a unit.
        rename: Code → name of the variable. The other arguments take the names.
        valid_ranges: Name of a variable → smallest and largest possible value; others count as missing.
        variable_threshold: FIDDLE's θ₁: variables and categories must be met in more than this share of stays.
        constant_threshold: FIDDLE's θ₂: a feature must be on somewhere, and must be off somewhere, in more than this
            share of stays.
        min_prevalence: MedHMP's further filter: a feature must be on somewhere in at least this share of stays. A
            category of a demographic field below it is ``other``.
        min_patients: Fewest patients of a variable or category; 11 keeps small groups out of what is published.
        frequent_per_hour: FIDDLE's θ_freq: numbers per hour from which a variable has minimum, maximum and mean.
        num_bins: Bins of a number; FIDDLE has quintiles.
        fill_infrequent: Carry forward infrequent variables and categories too, with presence and hours since; False is
            FIDDLE, which does so for frequent ones only.

    Returns:
        The extractor, with the thresholds and the fingerprint of the patients (``fitted_on``).

    Raises:
        ValueError: A threshold is out of range, ``subject_ids`` is empty, or a demographic field is unknown.
        EhrDataError: No stay of these patients has an hour, or no variable passes the filters.
    """
    thresholds = {
        "variable_threshold": variable_threshold,
        "constant_threshold": constant_threshold,
        "min_prevalence": min_prevalence,
    }
    _check(thresholds, {"min_patients": min_patients, "num_bins": num_bins, "n_hours": n_hours})
    subjects = np.unique(np.asarray(list(subject_ids), np.int64))
    if not len(subjects):
        raise ValueError("`subject_ids` must name the patients of the training split, got none.")
    if isinstance(records, Iterator):
        records = list(records)  # read three times
    ranges = {name: [float(low), float(high)] for name, (low, high) in (valid_ranges or {}).items()}
    summary = summarise_measurements(
        records,
        subject_ids=subjects,
        windows=windows,
        n_hours=n_hours,
        rename=rename,
        valid_ranges=valid_ranges,
        as_text=as_text,
    )
    if not summary.hours:
        raise EhrDataError(
            f"No stay of the {len(subjects)} patients in `subject_ids` has an hour. Check that the ids belong to "
            "these records, and that they were prepared with stays and measurements."
        )
    state: dict[str, Any] = thresholds | {"n_hours": n_hours, "form": form, "fill_infrequent": fill_infrequent}
    state |= {"rename": dict(rename or {}), "min_patients": min_patients, "frequent_per_hour": frequent_per_hour}
    fit = Fit(records, windows, subjects, state | {"fitted_on": fingerprint(subjects)}, ranges, frozenset(as_text))
    variables = choose_variables(fit, summary, static)
    fields = choose_fields(fit, summary, demographics, static)
    if not variables:
        raise EhrDataError(
            f"No variable of the {summary.stays} stays passes `variable_threshold`={variable_threshold} and "
            f"`min_patients`={min_patients}. Lower them, or see what `summarise_measurements` counts."
        )
    fit_bins(fit, variables, fields, num_bins)
    return HourlyFeatureExtractor(variables, fields, choose_features(fit, variables), **fit.state)


def _check(shares: Mapping[str, float], sizes: Mapping[str, int]) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"`{name}` must be a share of stays from 0 to below 1, got {share}.")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


__all__ = [
    "HourlyExamples",
    "HourlySummary",
    "fit_hourly_features",
    "format_hourly_summary",
    "hourly_examples",
    "summarise_measurements",
]
