"""Hourly features of intensive care stays by the recipe of FIDDLE: what was fitted, and its use on new stays.

Tang et al., "Democratizing EHR analyses with FIDDLE", JAMIA 2020; MedHMP (Wang et al., EMNLP 2023) adds a filter by
prevalence. Fitting is :func:`hf_ehr.hourly.fit_hourly_features`; this file needs numpy and transformers alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from transformers import BatchFeature, FeatureExtractionMixin

from .hourly_grid import HourlyColumn, HourlyGrid, Measurements
from .hourly_recipe import HourlyRecipe
from .stay_demographics import (
    NO_TEXT,
    UNKNOWN_CATEGORY,
    demographic_names,
    given_values,
    stack_demographics,
)

CELLS = 500_000  # of the grid at a time: the memory of a call does not grow with the number of stays
FORMS = ("binned", "continuous")
IGNORED = (
    "unknown variable",
    "no hour, or a negative one",
    "outside the hours of the stay",
    "NaN or infinite value",
    "outside the valid range",
    "text without a category",
    "number where categories were fitted",
    "no value",
)
"""Why a measurement is left out; the first that holds is counted."""


class HourlyFeatureExtractor(FeatureExtractionMixin):
    """Turns the measurements of stays into features by hour, and what is known at their start into a vector.

    Per variable and hour, in binned form (every feature is 0 or 1):

    - the last value, carried forward within the stay, in the quantile bins of the training stays (a category: one
      feature each); minimum, maximum and mean of the hour too where the variable is frequent;
    - `present`, whether the hour has a measurement, and the bin of the hours since the last one.

    In continuous form the last value is standardised (an unmeasured variable is 0, the training mean), and the hours
    since the last measurement are divided by `n_hours`.

    Deviations from FIDDLE's code: a value outside the training range falls into the outermost bin, not into none;
    hours since a measurement that never was are no feature, not 0; of several categories in an hour the last one
    counts; numbers and texts of a variable are two series.

    Args:
        variables: One mapping each: `name`; `valid_range`, two numbers or None; `as_text`, whether numbers are
            categories; `numeric` (`frequent`, `edges` by statistic, `scale`) or None; `category` (`categories`,
            `edges`) or None.
        demographics: One mapping each: `name`; `static`, whether it is a variable among the measurements;
            `valid_range`; `as_text`; `categories`, else `scale`, else `edges`.
        kept: Numbers of the features that passed the filters, among all the recipe makes; None keeps them all.
        n_hours: Longest stay in hours.
        form: `binned` or `continuous`.
        fill_infrequent: Whether infrequent variables are carried forward and have `present` and hours since too.
            FIDDLE does this for frequent numeric variables only.
        rename: Code → name of the variable; other codes are their own names. Two sources that share names share
            features.
        fitted_on: Fingerprint of the training patients, for :func:`hf_ehr.tasks.audit.check_fitted_on`.
        **kwargs: Kept as they are (the thresholds of the fit).

    Raises:
        ValueError: `form` is no form, `n_hours` is below 1, a name occurs twice, or `kept` names no feature.
    """

    model_input_names = ["stay_hours", "feature_ids", "feature_counts", "feature_values", "demographics"]  # noqa: RUF012 - as in the base

    def __init__(
        self,
        variables: Sequence[Mapping[str, Any]] = (),
        demographics: Sequence[Mapping[str, Any]] = (),
        kept: Sequence[int] | None = None,
        n_hours: int = 48,
        form: Literal["binned", "continuous"] = "binned",
        fill_infrequent: bool = True,
        rename: Mapping[str, str] | None = None,
        fitted_on: str | None = None,
        **kwargs,
    ):
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
        if n_hours < 1:
            raise ValueError(f"`n_hours` must be at least 1, got {n_hours}.")
        super().__init__(**kwargs)
        self.variables = [dict(variable) for variable in variables]
        self.demographics = [dict(field) for field in demographics]
        self.n_hours = n_hours
        self.form = form
        self.fill_infrequent = fill_infrequent
        self.rename = dict(rename or {})
        self.fitted_on = fitted_on
        names = [source["name"] for source in self._sources]
        if len(set(names)) < len(names):
            raise ValueError("`variables` and static `demographics` must have distinct names, some occur twice.")
        raw = len(self.recipe.names)
        self.kept = list(range(raw) if kept is None else kept)
        if self.kept and not 0 <= min(self.kept) <= max(self.kept) < raw:
            raise ValueError(
                f"`kept` must number features from 0 to {raw - 1}, got {min(self.kept)} to {max(self.kept)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fitted state, without what is derived from it."""
        derived = [name for name, value in vars(type(self)).items() if isinstance(value, cached_property)]
        for name in derived:
            self.__dict__.pop(name, None)
        return super().to_dict()

    @cached_property
    def feature_names(self) -> list[str]:
        """What each hourly feature means, e.g. ``HR mean in (72, 86]``."""
        return [self.recipe.names[number] for number in self.kept]

    @cached_property
    def demographic_names(self) -> list[str]:
        """What each entry of the demographics means."""
        return [name for field in self.demographics for name in demographic_names(field)]

    @property
    def num_hourly_features(self) -> int:
        """Features of an hour, as the configurations of models name them."""
        return len(self.kept)

    @property
    def num_demographics(self) -> int:
        """Length of the demographics."""
        return len(self.demographic_names)

    def __call__(
        self,
        stay: Sequence[int],
        hour: Sequence[float],
        name: Sequence[str],
        value: Sequence[float | None],
        text: Sequence[str | None] | None = None,
        *,
        stay_hours: Sequence[int],
        demographics: Mapping[str, Sequence[Any]] | None = None,
    ) -> BatchFeature:
        """Features of one or several stays from their measurements, in any order.

        Measurements that cannot be used are ignored; :meth:`encode_column` counts them.

        Args:
            stay: (measurements,) number of the stay of each, from 0.
            hour: (measurements,) hours since the start of the window.
            name: (measurements,) codes or names of variables.
            value: (measurements,) numbers, None or NaN where there is none.
            text: (measurements,) texts, None where there is none; used where there is no number.
            stay_hours: (stays,) hours of each stay, at most `n_hours`; what is measured later is not read.
            demographics: (stays,) values of each field that is not static, numbers or texts; what is left out is
                unknown.

        Returns:
            `stay_hours`, `feature_ids`, `feature_counts`, `feature_values` (continuous form) and `demographics`, each
            a list with an entry per stay.

        Raises:
            ValueError: The parts of a measurement are of different numbers, a stay or its hours are out of range, or
                `demographics` has another length.
        """
        names, name_codes = _distinct(name)
        texts, text_codes = _distinct([None] * len(name) if text is None else text)
        values = np.array([np.nan if number is None else number for number in value], np.float32)
        if len(values) != len(name) or len(text_codes) != len(name):
            raise ValueError(f"`name`, `value` and `text` must be of one length, got {len(name)} and {len(values)}.")
        variable, category = self.lookup(names, name_codes, values, texts, text_codes)
        column = self.encode_column(stay, hour, variable, values, category, stay_hours, demographics)
        return BatchFeature(column.rows())

    def lookup(
        self,
        names: Sequence[str],
        name_codes: np.ndarray,
        values: np.ndarray,
        texts: Sequence[str],
        text_codes: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of variables and categories, from strings that are given once each.

        Args:
            names: Distinct codes or names.
            name_codes: (measurements,) index into `names`, -1 where there is none.
            values: (measurements,) numbers, NaN where there is none.
            texts: Distinct texts.
            text_codes: (measurements,) index into `texts`, -1 where there is none.

        Returns:
            `variable`, (measurements,) int32, -1 where unknown, and `category`, (measurements,) int32, as
            :func:`category_ids` numbers them within the variable.
        """
        index = {source["name"]: number for number, source in enumerate(self._sources)}
        numbers = [index.get(self.rename.get(name, name), -1) for name in names]
        variable = np.array([*numbers, -1], np.int32)[name_codes]
        category = np.full(len(variable), NO_TEXT, np.int32)
        as_text = np.array([source["as_text"] for source in self._sources] + [False], bool)[variable]
        written = np.flatnonzero((text_codes >= 0) & (variable >= 0) & (as_text | np.isnan(values)))
        category[written] = self._categories(variable[written], text_codes[written], texts)
        numbered = np.flatnonzero((text_codes < 0) & as_text & np.isfinite(values))
        distinct, codes = np.unique(values[numbered], return_inverse=True)
        category[numbered] = self._categories(variable[numbered], codes, [f"{number:g}" for number in distinct])
        return variable, category

    def _categories(self, variable: np.ndarray, codes: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Category of each (variable, text), looked up once for each pair that occurs."""
        pairs, inverse = np.unique(variable.astype(np.int64) * max(1, len(texts)) + codes, return_inverse=True)
        known = [
            {text: number for number, text in enumerate(_categories_of(source) or ())} for source in self._sources
        ]
        found = [known[pair // len(texts)].get(texts[pair % len(texts)], UNKNOWN_CATEGORY) for pair in pairs.tolist()]
        return np.array(found, np.int32)[inverse]

    def encode_column(
        self,
        stay: ArrayLike,
        hour: ArrayLike,
        variable: np.ndarray,
        value: np.ndarray,
        category: np.ndarray,
        stay_hours: ArrayLike,
        demographics: Mapping[str, Any] | None = None,
    ) -> HourlyColumn:
        """Features of many stays at once; memory beyond the result is that of a block of stays.

        Args:
            stay: (measurements,) as in the call.
            hour: (measurements,) as in the call.
            variable: (measurements,) from :meth:`lookup`.
            value: (measurements,) float32, NaN where there is no number.
            category: (measurements,) from :meth:`lookup`.
            stay_hours: (stays,) as in the call.
            demographics: As in the call.

        Raises:
            ValueError: As the call.
        """
        stay, length = np.asarray(stay, np.int64), np.asarray(stay_hours, np.int32)
        taken, ignored = self.usable(stay, np.asarray(hour, np.float64), variable, value, category, length)
        statics = self.demographic_values(taken, demographics or {}, len(length))
        encoded = [(np.empty(0, np.int32), np.empty(0, np.int16), np.empty(0, np.float32))]
        encoded += [self.recipe.encode(*block, self._renumber) for _, block in self._blocks(taken, length)]
        ids, counts, values = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        return HourlyColumn(
            stay_hours=length,
            feature_ids=ids,
            feature_counts=counts,
            feature_values=values if self.form == "continuous" else None,
            demographics=stack_demographics(self.demographics, statics, len(length)),
            ignored=ignored,
        )

    def usable(
        self,
        stay: np.ndarray,
        hour: np.ndarray,
        variable: np.ndarray,
        value: np.ndarray,
        category: np.ndarray,
        stay_hours: np.ndarray,
    ) -> tuple[Measurements, dict[str, int]]:
        """The measurements that count, by stay and hour, and how many do not, by reason; as :meth:`encode_column`."""
        self._check(stay, hour, variable, stay_hours)
        none = [-np.inf, np.inf]
        ranges = np.array([source["valid_range"] or none for source in self._sources] + [none], np.float64)
        with_numbers = np.array([_takes_numbers(source) for source in self._sources] + [False])
        numeric = np.isfinite(value) & with_numbers[variable]
        low, high = ranges[variable].T
        reasons = (
            variable < 0,
            ~(hour >= 0),
            hour >= stay_hours[stay],
            np.isinf(value) & (category < 0),
            numeric & ((value < low) | (value > high)),
            ~numeric & (category == UNKNOWN_CATEGORY) & (variable < len(self.variables)),  # else it is `other`
            np.isfinite(value) & ~numeric & (category == NO_TEXT),
            ~numeric & (category == NO_TEXT),
        )
        left = np.ones(len(hour), bool)
        ignored = {}
        for reason, broken in zip(IGNORED, reasons, strict=True):
            ignored[reason] = int(np.count_nonzero(left & broken))
            left &= ~broken
        rows = np.flatnonzero(left)
        rows = rows[np.lexsort((hour[rows], stay[rows]))]
        return Measurements(stay[rows], hour[rows], variable[rows], value[rows], category[rows]), ignored

    def grids(self, taken: Measurements, stay_hours: np.ndarray) -> Iterator[HourlyGrid]:
        """What hourly features are made of, block by block of stays, for fitting."""
        for _, block in self._blocks(taken, stay_hours):
            yield self.recipe.grid(*block)

    def encoded_blocks(
        self, taken: Measurements, stay_hours: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Hours of the stays of a block, features that are not 0, and how many each hour has, for fitting."""
        for hours, block in self._blocks(taken, stay_hours):
            ids, counts, _ = self.recipe.encode(*block, self._renumber)
            yield hours, ids, counts

    def demographic_values(self, taken: Measurements, given: Mapping[str, Any], stays: int) -> list[np.ndarray]:
        """Values of each field, (stays,), as `stack_demographics` takes them; of a static variable the first."""
        found = []
        number = len(self.variables)
        for field in self.demographics:
            if not field["static"]:
                found.append(given_values(field, given.get(field["name"]), stays))
                continue
            one_hot = field["categories"] is not None
            rows = np.flatnonzero(taken.variable == number)[::-1]  # of several assignments the last one stays
            values = np.full(stays, NO_TEXT if one_hot else np.nan, np.float32)
            values[taken.stay[rows]] = (taken.category if one_hot else taken.value)[rows]
            found.append(values)
            number += 1
        return found

    def _check(self, stay: np.ndarray, hour: np.ndarray, variable: np.ndarray, stay_hours: np.ndarray) -> None:
        if not len(stay) == len(hour) == len(variable):
            raise ValueError(
                f"`stay`, `hour` and `name` must be of one length, got {len(stay)}, {len(hour)} and {len(variable)}."
            )
        if len(stay) and not 0 <= stay.min() <= stay.max() < len(stay_hours):
            raise ValueError(
                f"`stay` must be from 0 to {len(stay_hours) - 1}, the last of `stay_hours`, got {stay.min()} to "
                f"{stay.max()}."
            )
        if len(stay_hours) and not 0 <= stay_hours.min() <= stay_hours.max() <= self.n_hours:
            raise ValueError(
                f"`stay_hours` must be from 0 to `n_hours`={self.n_hours}, got {stay_hours.min()} to "
                f"{stay_hours.max()}. Cut the stays."
            )

    def _blocks(
        self, taken: Measurements, stay_hours: np.ndarray
    ) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
        """Hours of the stays, and arguments of :meth:`HourlyRecipe.grid`, of one block of stays after the other."""
        of_number = np.full(len(self._sources) + 1, -1, np.int64)  # column of the grid, -1 for a static variable
        of_text = of_number.copy()
        for number, column in enumerate(self.recipe.series):
            (of_number if column.categories is None else of_text)[column.variable] = number
        written = taken.category >= 0
        series = np.where(written, of_text[taken.variable], of_number[taken.variable])
        value = np.where(written, taken.category, taken.value).astype(np.float32)
        first = np.append(0, np.cumsum(stay_hours, dtype=np.int64))
        row = first[taken.stay] + np.floor(taken.hour).astype(np.int64)
        rows = max(1, CELLS // max(1, len(self.recipe.series)))
        cuts = np.searchsorted(first, np.arange(0, first[-1], rows))
        for start, end in pairwise(np.unique([0, *cuts, len(stay_hours)]).tolist()):
            begin, stop = np.searchsorted(taken.stay, [start, end])
            inside = begin + np.flatnonzero(series[begin:stop] >= 0)
            hours = stay_hours[start:end]
            first_row = np.repeat(first[start:end] - first[start], hours)
            yield hours, (row[inside] - first[start], series[inside], value[inside], first_row)

    @cached_property
    def _sources(self) -> list[dict[str, Any]]:
        """What measurements are looked up in: the variables, then the static fields."""
        return [*self.variables, *(field for field in self.demographics if field["static"])]

    @cached_property
    def recipe(self) -> HourlyRecipe:
        """All features that the variables make, before the filters."""
        return HourlyRecipe(self.variables, self.form, self.n_hours, self.fill_infrequent)

    @cached_property
    def _renumber(self) -> np.ndarray:
        """Feature of the recipe → feature that was kept, -1 for the others; the last entry is for no feature."""
        numbers = np.full(len(self.recipe.names) + 1, -1, np.int32)
        numbers[self.kept] = np.arange(len(self.kept))
        return numbers


def _categories_of(source: Mapping[str, Any]) -> list[str] | None:
    """The categories of a variable or of a static field, None where it has none."""
    return source["category"]["categories"] if source.get("category") else source.get("categories")


def _takes_numbers(source: Mapping[str, Any]) -> bool:
    return bool(source["numeric"]) if "numeric" in source else source["categories"] is None


def _distinct(strings: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """Distinct strings, and the number of each among them; -1 for None."""
    seen: dict[str, int] = {}
    codes = [-1 if text is None else seen.setdefault(text, len(seen)) for text in strings]
    return list(seen), np.array(codes, np.int64)


HourlyFeatureExtractor.register_for_auto_class()
