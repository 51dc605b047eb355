"""All the features that fitted variables make, by number: one-hot bins, or standardised values."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .hourly_grid import STATISTICS, HourlyGrid, bin_names, bin_numbers, stack_edges

MIN, MAX, MEAN, LAST, PRESENT, SINCE = range(len(STATISTICS))
SPREAD = (MIN, MAX, MEAN)


class Series(NamedTuple):
    """A column of the grid: the numbers of a variable, or its texts.

    Attributes:
        variable: Number of the variable.
        label: How its features are called.
        categories: Texts by number; None for numbers.
        frequent: Whether hours have minimum, maximum and mean.
        filled: Whether values are carried forward.
        edges: Borders of the bins, by statistic.
        scale: The fields of a `Scale`; None in binned form, and for texts.
    """

    variable: int
    label: str
    categories: list[str] | None
    frequent: bool
    filled: bool
    edges: Mapping[str, Sequence[float]]
    scale: Sequence[float] | None


def series_of(variables: Sequence[Mapping[str, Any]], fill_infrequent: bool) -> list[Series]:
    """The columns of the grid: frequent numbers, other numbers, texts."""
    found = []
    for number, variable in enumerate(variables):
        numeric, category = variable["numeric"], variable["category"]
        if numeric:
            frequent = numeric["frequent"]
            found.append(
                Series(
                    number,
                    variable["name"],
                    None,
                    frequent,
                    frequent or fill_infrequent,
                    numeric["edges"],
                    numeric["scale"],
                )
            )
        if category:
            label = f"{variable['name']} text" if numeric else variable["name"]
            found.append(
                Series(number, label, category["categories"], False, fill_infrequent, category["edges"], None)
            )
    return sorted(found, key=lambda series: (series.categories is not None, not series.frequent))


class HourlyRecipe:
    """Numbers the features of some variables and computes them for blocks of hours.

    Attributes:
        series: Columns of the grid.
        numeric: Those of numbers, which come first.
        frequent: Those with minimum, maximum and mean, which come first among them; none in continuous form.
        names: Every feature in words.
        is_binary: (features,) bool, whether a feature is 0 or 1.
        variables: (features,) int64, the number of the variable that each is of.
    """

    def __init__(self, variables: Sequence[Mapping[str, Any]], form: str, n_hours: int, fill_infrequent: bool) -> None:
        self.continuous = form == "continuous"
        self.n_hours = n_hours
        self.series = series_of(variables, fill_infrequent)
        self.numeric = [series for series in self.series if series.categories is None]
        self.frequent = [] if self.continuous else [series for series in self.numeric if series.frequent]
        self.filled = np.array([series.filled for series in self.series], bool)
        self.names: list[str] = []
        binary: list[bool] = []
        owners: list[int] = []
        self.base = np.full((len(self.series), len(STATISTICS)), -1, np.int32)
        for row, series in zip(self.base, self.series, strict=True):
            for statistic, (names, whether) in self._features(series).items():
                row[statistic] = len(self.names)
                self.names += names
                binary += [whether] * len(names)
                owners += [series.variable] * len(names)
        self.is_binary = np.array(binary, bool)
        self.variables = np.array(owners, np.int64)
        self._edges = {
            statistic: stack_edges([series.edges.get(STATISTICS[statistic], ()) for series in self._with(statistic)])
            for statistic in (*SPREAD, LAST, SINCE)
        }
        scales = [series.scale or (-np.inf, np.inf, 0.0, 1.0) for series in self.numeric]
        self._scale = np.array(scales, np.float32).reshape(-1, 4).T

    def _with(self, statistic: int) -> list[Series]:
        """The series that may have a statistic."""
        return self.frequent if statistic in SPREAD else self.numeric if statistic == LAST else self.series

    def _features(self, series: Series) -> dict[int, tuple[list[str], bool]]:
        """Names of the features by statistic, and whether they are binary."""
        label, found = series.label, {}
        if series.frequent and not self.continuous:
            for statistic in SPREAD:
                found[statistic] = (self._bins(series, statistic, f"{label} {STATISTICS[statistic]}"), True)
        if series.categories is not None:
            found[LAST] = ([f"{label} = {text}" for text in series.categories], True)
        elif self.continuous:
            found[LAST] = ([f"{label} value"], False)
        else:
            found[LAST] = (self._bins(series, LAST, f"{label} last"), True)
        if series.filled:
            found[PRESENT] = ([f"{label} present"], True)
            title = f"{label} hours since last"
            found[SINCE] = ([title], False) if self.continuous else (self._bins(series, SINCE, title), True)
        return found

    @staticmethod
    def _bins(series: Series, statistic: int, title: str) -> list[str]:
        return [f"{title} {text}" for text in bin_names(series.edges.get(STATISTICS[statistic], ()))]

    def grid(self, row: np.ndarray, series: np.ndarray, value: np.ndarray, first_row: np.ndarray) -> HourlyGrid:
        """The grid of some measurements, as :meth:`HourlyGrid.of` describes it."""
        return HourlyGrid.of(row, series, value, first_row, len(self.frequent), self.filled)

    def encode(
        self, row: np.ndarray, series: np.ndarray, value: np.ndarray, first_row: np.ndarray, renumber: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features of some hours that are not 0.

        Args:
            row: As in :meth:`HourlyGrid.of`.
            series: As there.
            value: As there; of a text the number of its category.
            first_row: As there.
            renumber: (features + 1,) int32, number to give each feature, -1 to leave it out; the last is -1.

        Returns:
            Their numbers, ascending within an hour where `renumber` ascends, (entries,) int32; entries of each hour,
            (hours,) int16; their values, (entries,) float32, empty in binned form.
        """
        grid = self.grid(row, series, value, first_row)
        numbers = np.full((*grid.last.shape, len(STATISTICS)), -1, np.int32)
        for statistic in SPREAD:
            self._place(numbers, statistic, grid.spread[statistic])
        self._place(numbers, LAST, grid.last)
        self._place(numbers, PRESENT, np.where(grid.present, np.float32(1), np.float32(np.nan)))
        self._place(numbers, SINCE, grid.since)
        numbers = renumber[numbers]
        there = numbers >= 0
        values = np.empty(0, np.float32)
        if self.continuous:
            dense = self._values(grid)
            there &= dense != 0
            values = dense[there]
        return numbers[there], np.count_nonzero(there, axis=(1, 2)).astype(np.int16), values

    def _place(self, numbers: np.ndarray, statistic: int, values: np.ndarray) -> None:
        """Writes the number of the feature that each value turns on."""
        columns = values.shape[1]
        base = self.base[:columns, statistic]
        bins = np.zeros(values.shape, np.int32)
        if not self.continuous and statistic != PRESENT:
            edges = self._edges[statistic]
            bins[:, : len(edges)] = bin_numbers(values[:, : len(edges)], edges)
        if statistic == LAST:
            texts = slice(len(self.numeric), None)
            bins[:, texts] = np.nan_to_num(values[:, texts])
        numbers[:, :columns, statistic] = np.where(np.isnan(values) | (base < 0), -1, base + bins)

    def _values(self, grid: HourlyGrid) -> np.ndarray:
        """(hours, series, statistics) float32: the values of the continuous form; 1 for what is one-hot."""
        values = np.ones((*grid.last.shape, len(STATISTICS)), np.float32)
        low, high, center, deviation = self._scale
        numeric = len(self.numeric)
        values[:, :numeric, LAST] = (np.clip(grid.last[:, :numeric], low, high) - center) / deviation
        values[:, :, SINCE] = grid.since / self.n_hours
        return values
