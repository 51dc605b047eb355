"""What the measurements of some stays look like, variable by variable, before anything is fitted on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from ._hourly_stays import Records, StayWindows, Windows, windows_of

LONGEST_CATEGORY = 50
"""Characters of a text that may be a category; longer ones are prose."""

QUANTILES = (0.01, 0.5, 0.99)
_FEWEST = 0.01  # share of the values on the smaller side of a gap that is reported
_DISTINCT = 5  # values on each side
_WIDE = 2.0  # width of a gap, in spreads of the wider side
_NUMBER, _TEXT, _OUT_OF_RANGE = range(3)
_COUNTED = {"stays": "window", "patients": "subject"}
_WHOSE = [pl.col(one).n_unique().cast(pl.Int64).alias(many) for many, one in _COUNTED.items()]


@dataclass
class HourlySummary:
    """Counts over the windows of some stays.

    Attributes:
        stays: Windows with at least one hour.
        hours: Their hours.
        variables: By ``name``: ``numbers``, ``texts`` (measurements), ``stays`` and ``patients`` with any,
            ``number_stays``, ``number_patients``, ``out_of_range`` (left out by a valid range), the quantiles ``p1``,
            ``p50``, ``p99``, and ``two_ranges``: in words, between which values a wide gap lies, or null.
        values: ``name``, ``value`` (at 16 significant bits), ``count``.
        categories: ``name``, ``text``, ``stays``, ``patients``.
        fields: The same for the static fields of patients.
        ignored: Measurements that count nowhere, by reason.
    """

    stays: int
    hours: int
    variables: pl.DataFrame
    values: pl.DataFrame
    categories: pl.DataFrame
    fields: pl.DataFrame
    ignored: dict[str, int]


def summarise_measurements(
    records: Records,
    *,
    subject_ids: Any | None = None,
    windows: Windows | None = None,
    n_hours: int = 48,
    rename: Mapping[str, str] | None = None,
    valid_ranges: Mapping[str, tuple[float, float]] | None = None,
    as_text: Collection[str] = (),
) -> HourlySummary:
    """Counts the measurements of stays, shard by shard.

    Args:
        records: RECORDS in memory, a prepared folder, or paths of Parquet shards.
        subject_ids: Only these patients; None takes all.
        windows: ``stay_id``, ``start_hour``, ``end_hour``; None takes every stay from its start.
        n_hours: Longest window in hours.
        rename: Code → name of the variable.
        valid_ranges: Name of a variable → smallest and largest possible value.
        as_text: Variables whose numbers are categories.

    Returns:
        The summary; :func:`format_hourly_summary` prints it. Nothing in it is repaired: a variable that may mix two
        units is named, and what to do about it is the reader's decision.
    """
    total: dict[str, Any] = {}
    for shard in windows_of(records, windows, n_hours, subject_ids, "Counting measurements"):
        part = _count(shard, dict(rename or {}), dict(valid_ranges or {}), frozenset(as_text))
        total = {name: _add(total[name], one) for name, one in part.items()} if total else part
    numbers = total.pop("values").sort("name", "value")
    variables = total["variables"].join(_describe(numbers), on="name", how="left", maintain_order="left")
    return HourlySummary(**total | {"variables": variables.sort("name"), "values": numbers})


def _add(total: Any, part: Any) -> Any:
    """Counts of two parts; patients and windows are each in one of them."""
    if not isinstance(total, pl.DataFrame):
        return total + part
    keys = [name for name, kind in total.schema.items() if not kind.is_integer()]
    return pl.concat([total, part]).group_by(keys).sum()


def _count(
    shard: StayWindows, rename: Mapping[str, str], ranges: Mapping[str, tuple[float, float]], as_text: frozenset[str]
) -> dict[str, Any]:
    rows, names, texts, ignored = _rows(shard, rename, ranges, as_text)
    is_number = pl.col("kind") == _NUMBER
    valid = pl.col("kind") != _OUT_OF_RANGE
    counts = {"numbers": is_number.sum(), "texts": (pl.col("kind") == _TEXT).sum(), "out_of_range": (~valid).sum()}
    counts |= {"stays": pl.col("window").filter(valid).n_unique(), "number_stays": _distinct_of("window", is_number)}
    counts |= {"patients": _distinct_of("subject", valid), "number_patients": _distinct_of("subject", is_number)}
    by_text = rows.filter(pl.col("kind") == _TEXT).group_by("variable", "text").agg(*_WHOSE)
    by_value = rows.filter(is_number).group_by("variable", "value").agg(pl.len().cast(pl.Int64).alias("count"))
    by_variable = rows.group_by("variable").agg(*(count.cast(pl.Int64).alias(key) for key, count in counts.items()))
    return {
        "stays": int(np.count_nonzero(shard.stay_hours)),
        "hours": int(shard.stay_hours.sum()),
        "variables": by_variable.select(_strings(by_variable["variable"], "name", names), *counts),
        "values": by_value.select(_strings(by_value["variable"], "name", names), "value", "count"),
        "categories": by_text.select(
            _strings(by_text["variable"], "name", names), _strings(by_text["text"], "text", texts), "stays", "patients"
        ),
        "fields": _fields(shard),
        "ignored": ignored,
    }


def _strings(numbers: pl.Series, name: str, strings: list[str]) -> pl.Series:
    return pl.Series(name, strings, dtype=pl.String).gather(numbers)


def _distinct_of(column: str, rows: pl.Expr) -> pl.Expr:
    return pl.col(column).filter(rows).n_unique()


def _rows(
    shard: StayWindows, rename: Mapping[str, str], ranges: Mapping[str, tuple[float, float]], as_text: frozenset[str]
) -> tuple[pl.DataFrame, list[str], list[str], Counter[str]]:
    """The measurements that say something: ``variable``, ``kind``, ``window``, ``subject``, ``value``, ``text``."""
    names = list(dict.fromkeys(rename.get(name, name) for name in shard.names))
    number_of = {name: number for number, name in enumerate(names)}
    variable = np.array([number_of[rename.get(name, name)] for name in shard.names] + [-1])[shard.name_codes]
    value, text = round_bits(shard.value), shard.text_codes.astype(np.int64)
    categorical = np.array([name in as_text for name in names] + [False])[variable]
    written = categorical & (text < 0) & np.isfinite(value)
    distinct, codes = np.unique(shard.value[written], return_inverse=True)
    text[written] = len(shard.texts) + codes
    is_text = (text >= 0) & (categorical | np.isnan(value))
    limits = np.array([ranges.get(name, (-np.inf, np.inf)) for name in names] + [(-np.inf, np.inf)], np.float32)
    low, high = limits[variable].T
    outside = ~is_text & np.isfinite(value) & ((shard.value < low) | (shard.value > high))
    kind = np.where(is_text, _TEXT, np.where(outside, _OUT_OF_RANGE, _NUMBER))
    reasons = {
        "no name": variable < 0,
        "no hour, or a negative one": ~(shard.hour >= 0),
        "NaN or infinite value": ~is_text & np.isinf(value),
        "no value": ~is_text & np.isnan(value),
    }
    left = np.ones(len(variable), bool)
    ignored = Counter({"outside the window": shard.outside})
    for reason, broken in reasons.items():
        ignored[reason] = int(np.count_nonzero(left & broken))
        left &= ~broken
    subject = shard.table["subject_id"].to_numpy()[shard.window]
    columns = {"variable": variable, "kind": kind, "window": shard.window, "subject": subject}
    frame = pl.DataFrame(columns | {"value": value, "text": text}).filter(pl.Series(left))
    return frame, names, [*shard.texts, *(f"{number:g}" for number in distinct)], ignored


def _fields(shard: StayWindows) -> pl.DataFrame:
    """How often each value of each static field occurs."""
    subject = shard.table["subject_id"].to_numpy()
    parts = [
        pl.DataFrame({"text": pl.Series(values.tolist(), dtype=pl.String), "subject": subject})
        .drop_nulls("text")
        .group_by("text")
        .agg(pl.len().cast(pl.Int64).alias("stays"), pl.col("subject").n_unique().cast(pl.Int64).alias("patients"))
        .select(pl.lit(name).alias("name"), "text", "stays", "patients")
        for name, values in shard.fields.items()
        if name != "age"
    ]
    return pl.concat(parts)


def round_bits(values: np.ndarray) -> np.ndarray:
    """float32 numbers at 16 significant bits: few enough to be counted, whole numbers up to 65,536 are exact."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def quantiles(values: np.ndarray, counts: np.ndarray, shares: ArrayLike) -> np.ndarray:
    """Quantiles of counted values, between neighbours linear as numpy's: values ascend, (shares,) float64."""
    ends = np.cumsum(counts)
    place = np.asarray(shares) * (ends[-1] - 1)
    below, above = (values[np.searchsorted(ends, edge(place), side="right")] for edge in (np.floor, np.ceil))
    return below + (place - np.floor(place)) * (above.astype(np.float64) - below)


def _describe(numbers: pl.DataFrame) -> pl.DataFrame:
    """``name``, quantiles and ``two_ranges`` of every variable with numbers."""
    rows = []
    for (name,), own in numbers.group_by("name", maintain_order=True):
        values, counts = own["value"].to_numpy(), own["count"].to_numpy()
        rows.append((name, *quantiles(values, counts, QUANTILES).tolist(), two_ranges(values, counts)))
    kinds = {"name": pl.String, "p1": pl.Float64, "p50": pl.Float64, "p99": pl.Float64, "two_ranges": pl.String}
    return pl.DataFrame(rows, schema=kinds, orient="row")


def two_ranges(values: np.ndarray, counts: np.ndarray) -> str | None:
    """Says between which values a gap lies that is wide beside what is on both sides of it, on either scale.

    A gap counts where each side holds at least 1 % of the values, of five or more different ones, and where it is
    twice as wide as the middle 90 % of the wider side: two units of one quantity look like this.
    """
    if len(values) < 2 * _DISTINCT:
        return None
    share = np.cumsum(counts)[:-1] / counts.sum()
    allowed = (share >= _FEWEST) & (share <= 1 - _FEWEST)
    allowed[: _DISTINCT - 1] = allowed[len(allowed) - _DISTINCT + 1 :] = False
    for scaled in (values.astype(np.float64), np.log(values) if values[0] > 0 else None):
        if scaled is None or not allowed.any():
            continue
        cut = int(np.argmax(np.where(allowed, np.diff(scaled), -np.inf))) + 1
        sides = [quantiles(scaled[part], counts[part], (0.05, 0.95)) for part in (slice(cut), slice(cut, None))]
        if scaled[cut] - scaled[cut - 1] > _WIDE * max(high - low for low, high in sides):
            return f"{values[cut - 1]:.3g} and {values[cut]:.3g}"
    return None


def format_hourly_summary(summary: HourlySummary) -> str:
    """The summary as text: a line per variable, then what deserves a look."""
    stays = max(1, summary.stays)
    lines = [f"{summary.stays} stays, {summary.hours} hours, {summary.variables.height} variables"]
    lines += [f"  ignored, {reason}: {count}" for reason, count in sorted(summary.ignored.items()) if count]
    lines += [f"{'variable':32} {'stays':>7} {'per hour':>9} {'texts':>8} {'1 %':>9} {'median':>9} {'99 %':>9}"]
    for row in summary.variables.iter_rows(named=True):
        shown = ["-" if row[name] is None else f"{row[name]:.4g}" for name in ("p1", "p50", "p99")]
        per_hour = row["numbers"] / max(1, summary.hours)
        lines.append(
            f"{row['name']:32} {row['stays'] / stays:7.1%} {per_hour:9.3f} {row['texts']:8} "
            + " ".join(f"{text:>9}" for text in shown)
        )
    for row in summary.variables.iter_rows(named=True):
        if row["out_of_range"]:
            lines.append(f"{row['name']}: {row['out_of_range']} values outside the valid range count as missing")
        if row["two_ranges"]:
            lines.append(
                f"{row['name']}: no value between {row['two_ranges']}, many on both sides. Two units? Convert one, "
                "or give a valid range."
            )
    return "\n".join(lines)
