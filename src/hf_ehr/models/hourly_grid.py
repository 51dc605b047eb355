"""Measurements of stays on the grid of their hours, by array operations; no row of the input is visited alone.

Rows of the grid are the hours of some stays, one stay after the other; columns are the series of an extractor.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

STATISTICS = ("min", "max", "mean", "last", "present", "since")
"""What an hour tells about a series, in the order of the features."""
NUM_SPREAD = 3  # min, max, mean: of frequent series only


class Measurements(NamedTuple):
    """Measurements by stay and hour, (measurements,) each."""

    stay: np.ndarray
    hour: np.ndarray
    variable: np.ndarray
    value: np.ndarray
    category: np.ndarray


class HourlyColumn(NamedTuple):
    """Many stays, one after the other.

    Attributes:
        stay_hours: Hours of each stay, (stays,) int32.
        feature_ids: Features that are not 0, hour after hour, (entries,) int32.
        feature_counts: Entries of each hour, (hours of all stays,) int16.
        feature_values: Values of `feature_ids`, (entries,) float32; None in binned form, where all are 1.
        demographics: (stays, num_demographics) float32.
        ignored: Measurements left out, by reason.
    """

    stay_hours: np.ndarray
    feature_ids: np.ndarray
    feature_counts: np.ndarray
    feature_values: np.ndarray | None
    demographics: np.ndarray
    ignored: dict[str, int]

    def rows(self) -> dict[str, list[Any]]:
        """The parts as lists with an entry per stay."""
        hours = np.cumsum(self.stay_hours)[:-1]
        entries = np.append(0, np.cumsum(self.feature_counts, dtype=np.int64))[hours]
        rows: dict[str, list[Any]] = {
            "stay_hours": self.stay_hours.tolist(),
            "feature_ids": np.split(self.feature_ids, entries)[: len(self.stay_hours)],
            "feature_counts": np.split(self.feature_counts, hours)[: len(self.stay_hours)],
        }
        if self.feature_values is not None:
            rows["feature_values"] = np.split(self.feature_values, entries)[: len(self.stay_hours)]
        return rows | {"demographics": list(self.demographics)}


class HourlyGrid(NamedTuple):
    """What each hour tells of each series; NaN where it tells nothing.

    Attributes:
        spread: Smallest, largest and mean value of the hour, (3, hours, frequent series) float32; in an hour without
            a measurement all three are the value carried forward.
        last: Last value of the hour, else the value carried forward, (hours, series) float32.
        present: Whether the hour has a measurement, (hours, series) bool.
        since: Hours since the last measurement, 0 in an hour that has one, (hours, series) float32.
    """

    spread: np.ndarray
    last: np.ndarray
    present: np.ndarray
    since: np.ndarray

    @classmethod
    def of(
        cls,
        row: np.ndarray,
        series: np.ndarray,
        value: np.ndarray,
        first_row: np.ndarray,
        num_frequent: int,
        filled: np.ndarray,
    ) -> "HourlyGrid":
        """The grid of some measurements; the past alone decides an hour.

        Args:
            row: (measurements,) int, row of each, the earlier of two in an hour first.
            series: (measurements,) int, column of each.
            value: (measurements,) finite numbers.
            first_row: (hours,) int, the first row of the stay that an hour belongs to.
            num_frequent: The first so many series have `spread`.
            filled: (series,) bool, whether the last value is carried forward.
        """
        shape = (len(first_row), len(filled))
        cell = row.astype(np.int64) * shape[1] + series
        order = np.argsort(cell, kind="stable")
        cell, value = cell[order], value[order]
        starts = np.flatnonzero(np.append(True, cell[1:] != cell[:-1])) if len(cell) else np.empty(0, np.int64)
        ends = np.append(starts[1:], len(cell))[: len(starts)]
        where = cell[starts]
        raw = _scatter(where, value[ends - 1], shape)
        present = np.zeros(shape, bool)
        present.ravel()[where] = True
        rows = np.arange(shape[0], dtype=np.int32)[:, None]
        source = np.maximum.accumulate(np.where(present, rows, np.int32(-1)), axis=0)
        known = source >= first_row[:, None]  # else the last measurement is of a stay before
        carried = np.take_along_axis(raw, np.maximum(source, 0), axis=0)
        carried[~known] = np.nan
        since = np.where(known, rows - source, np.nan).astype(np.float32)
        spread = _spread(where, starts, ends, value, shape, carried[:, :num_frequent], present[:, :num_frequent])
        return cls(spread, np.where(filled | present, carried, np.nan).astype(np.float32), present, since)


def _spread(
    where: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    value: np.ndarray,
    shape: tuple[int, int],
    carried: np.ndarray,
    present: np.ndarray,
) -> np.ndarray:
    """(3, hours, frequent series): smallest, largest, mean."""
    frequent = carried.shape[1]
    if not (frequent and len(starts)):
        return np.repeat(carried[None], NUM_SPREAD, axis=0)
    values = (
        np.minimum.reduceat(value, starts),
        np.maximum.reduceat(value, starts),
        np.add.reduceat(value, starts, dtype=np.float64) / (ends - starts),
    )
    return np.stack([np.where(present, _scatter(where, part, shape)[:, :frequent], carried) for part in values])


def _scatter(where: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(hours, series) float32 with ``values`` at the cells ``where`` and NaN elsewhere."""
    grid = np.full(shape[0] * shape[1], np.nan, np.float32)
    grid[where] = values
    return grid.reshape(shape)


def bin_numbers(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Bin of each value: 0 up to the first edge, 1 above it up to the second, …; an edge belongs to the bin below it.

    Args:
        values: (…, columns) float32.
        edges: (columns, most edges) float32, ascending, infinite behind the last.

    Returns:
        (…, columns) int32, of no meaning where a value is NaN.
    """
    bins = np.zeros(values.shape, np.int32)
    for edge in edges.T:
        bins += values > edge
    return bins


def stack_edges(edges: Sequence[Sequence[float]]) -> np.ndarray:
    """(columns, most edges) float32, filled with infinity."""
    stacked = np.full((len(edges), max(map(len, edges), default=0)), np.inf, np.float32)
    for row, own in zip(stacked, edges, strict=True):
        row[: len(own)] = own
    return stacked


def bin_names(edges: Sequence[float]) -> list[str]:
    """What is said of a value in each bin: ``<= 72``, ``in (72, 86]``, ``> 86``; ``known`` where there is one bin."""
    if not edges:
        return ["known"]
    texts = [f"{edge:.6g}" for edge in edges]
    between = [f"in ({low}, {high}]" for low, high in pairwise(texts)]
    return [f"<= {texts[0]}", *between, f"> {texts[-1]}"]
