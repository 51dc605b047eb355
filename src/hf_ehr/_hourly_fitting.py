"""The passes over the shards that fit hourly features: what there is, where bins lie, which features stay."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from ._hourly_stays import Records, StayWindows, Windows, windows_of
from ._hourly_summary import LONGEST_CATEGORY, HourlySummary, quantiles, round_bits
from .models.feature_extraction_hourly import HourlyFeatureExtractor
from .models.hourly_grid import HourlyGrid
from .schema import STATIC_FIELDS

CUT = (0.005, 0.995)  # continuous values beyond these quantiles count as them
DIGITS = 4  # significant ones of an edge: it can be read, and a measured value that is one stays below it
Inputs: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_STATISTICS = ("min", "max", "mean")


@dataclass(frozen=True)
class Fit:
    """The records and options of a fit.

    Attributes:
        records: RECORDS, read once a pass.
        windows: Windows on the stays.
        subject_ids: The training patients.
        state: What the extractor keeps of the options.
        ranges: Valid range by variable.
        as_text: Variables whose numbers are categories.
    """

    records: Records
    windows: Windows | None
    subject_ids: np.ndarray
    state: dict[str, Any]
    ranges: Mapping[str, list[float]]
    as_text: Collection[str]

    def shards(self, extractor: HourlyFeatureExtractor, title: str) -> Iterator[tuple[StayWindows, Inputs]]:
        """Each shard with the arguments of `encode_column`."""
        for shard in windows_of(self.records, self.windows, self.state["n_hours"], self.subject_ids, title):
            yield shard, inputs(shard, extractor)


def inputs(shard: StayWindows, extractor: HourlyFeatureExtractor) -> Inputs:
    """Arguments of `encode_column`, up to the hours of the stays."""
    variable, category = extractor.lookup(shard.names, shard.name_codes, shard.value, shard.texts, shard.text_codes)
    return shard.window, shard.hour, variable, shard.value, category, shard.stay_hours


def choose_variables(fit: Fit, summary: HourlySummary, static: Collection[str]) -> list[dict[str, Any]]:
    """The variables of enough stays, without edges."""
    enough = _enough(fit, summary, fit.state["variable_threshold"])
    categories = _categories(summary.categories, enough)
    numeric = summary.variables.filter(
        _enough(fit, summary, fit.state["variable_threshold"], "number_") & ~pl.col("name").is_in(list(fit.as_text))
    )
    per_hour = dict(zip(numeric["name"], (numeric["numbers"] / summary.hours).to_list(), strict=True))
    return [
        _source(fit, name)
        | {
            "numeric": {"frequent": per_hour[name] >= fit.state["frequent_per_hour"], "edges": {}, "scale": None}
            if name in per_hour
            else None,
            "category": {"categories": categories[name], "edges": {}} if name in categories else None,
        }
        for name in sorted({*per_hour, *categories} - set(static))
    ]


def choose_fields(
    fit: Fit, summary: HourlySummary, demographics: Collection[str], static: Collection[str]
) -> list[dict[str, Any]]:
    """The fields of the demographics, without edges.

    Raises:
        ValueError: A field is neither `age` nor a static field of a patient, or a static variable was not measured.
    """
    unknown = set(demographics) - {"age", *STATIC_FIELDS.values()}
    if unknown:
        raise ValueError(
            f"`demographics` must be of age, {', '.join(STATIC_FIELDS.values())}, got {', '.join(sorted(unknown))}."
        )
    unmeasured = set(static) - set(summary.variables.filter((pl.col("numbers") + pl.col("texts")) > 0)["name"])
    if unmeasured:
        raise ValueError(f"`static` must name measured variables, got {', '.join(sorted(unmeasured))}.")
    enough = _enough(fit, summary, fit.state["min_prevalence"], above=False)
    measured = set(summary.variables.filter(pl.col("numbers") > 0)["name"])
    fields = []
    for is_static, names, numeric, counted in (
        (False, demographics, {"age"}, summary.fields),
        (True, static, measured, summary.categories),
    ):
        categories = _categories(counted, enough)
        for name in names:
            own = None if name in numeric else categories.get(name, [])
            kind = {"static": is_static, "categories": own, "edges": [], "scale": None}
            fields.append(_source(fit, name) | kind)
    return fields


def _source(fit: Fit, name: str) -> dict[str, Any]:
    return {"name": name, "valid_range": fit.ranges.get(name), "as_text": name in fit.as_text}


def _enough(fit: Fit, summary: HourlySummary, share: float, prefix: str = "", *, above: bool = True) -> pl.Expr:
    stays = pl.col(f"{prefix}stays")
    often = stays > share * summary.stays if above else stays >= share * summary.stays
    return often & (pl.col(f"{prefix}patients") >= fit.state["min_patients"])


def _categories(counted: pl.DataFrame, enough: pl.Expr) -> dict[str, list[str]]:
    """Name → its texts that are frequent enough, sorted."""
    kept = counted.filter(enough & (pl.col("text").str.len_chars() <= LONGEST_CATEGORY)).sort("name", "text")
    grouped = kept.group_by("name", maintain_order=True).agg("text")
    return dict(zip(grouped["name"], grouped["text"].to_list(), strict=True))


def fit_bins(fit: Fit, variables: list[dict[str, Any]], fields: list[dict[str, Any]], num_bins: int) -> None:
    """Writes the edges, or the scales, into ``variables`` and ``fields``: the second pass."""
    extractor = HourlyFeatureExtractor(variables, fields, **fit.state)
    given: list[list[np.ndarray]] = [[] for _ in fields]
    counts = pl.DataFrame(schema={"key": pl.UInt64, "count": pl.Int64})
    for shard, arguments in fit.shards(extractor, "Finding bins"):
        taken, _ = extractor.usable(*arguments)
        values = extractor.demographic_values(taken, shard.fields, len(shard.stay_hours))
        for own, more in zip(given, values, strict=True):
            own.append(more[shard.stay_hours > 0])
        parts = [_count_grid(extractor, grid) for grid in extractor.grids(taken, shard.stay_hours)]
        counts = pl.concat([counts, *parts]).group_by("key").sum()
    continuous = fit.state["form"] == "continuous"
    _write(extractor, variables, counts, num_bins, continuous)
    for field, own in zip(fields, given, strict=True):
        if field["categories"] is None:
            known = np.concatenate(own)
            numbers, sizes = np.unique(round_bits(known[np.isfinite(known)]), return_counts=True)
            field.update(_bins_or_scale(numbers, sizes, num_bins, continuous))


def _columns(extractor: HourlyFeatureExtractor) -> list[tuple[int, str]]:
    """(series, statistic) of the matrices of numbers of a grid, in one order."""
    recipe = extractor.recipe
    names = [(number, name) for name in _STATISTICS for number in range(len(recipe.frequent))]
    names += [(number, "last") for number in range(len(recipe.numeric))]
    return names + [(number, "since") for number in range(len(recipe.series))]


def _count_grid(extractor: HourlyFeatureExtractor, grid: HourlyGrid) -> pl.DataFrame:
    """``key``, the column in the upper and the bits of the number in the lower half, and ``count``."""
    numbers = np.concatenate([*grid.spread, grid.last[:, : len(extractor.recipe.numeric)], grid.since], axis=1)
    column = np.broadcast_to(np.arange(numbers.shape[1], dtype=np.uint64) << np.uint64(32), numbers.shape)
    known = ~np.isnan(numbers)
    keys = column[known] | (round_bits(numbers[known]) + np.float32(0)).view(np.uint32)  # -0 is 0
    return pl.DataFrame({"key": keys}).group_by("key").agg(pl.len().cast(pl.Int64).alias("count"))


def _write(
    extractor: HourlyFeatureExtractor,
    variables: list[dict[str, Any]],
    counts: pl.DataFrame,
    num_bins: int,
    continuous: bool,
) -> None:
    keys, sizes = counts["key"].to_numpy(), counts["count"].to_numpy()
    column, numbers = (keys >> np.uint64(32)).astype(np.int64), keys.astype(np.uint32).view(np.float32)
    order = np.lexsort((numbers, column))
    column, numbers, sizes = column[order], numbers[order], sizes[order]
    for place, (number, statistic) in enumerate(_columns(extractor)):
        own = slice(*np.searchsorted(column, [place, place + 1]))
        series = extractor.recipe.series[number]
        part = variables[series.variable]["numeric" if series.categories is None else "category"]
        if not continuous:
            part["edges"][statistic] = bin_edges(numbers[own], sizes[own], num_bins)
        elif statistic == "last":
            part["scale"] = _scale(numbers[own], sizes[own])


def _bins_or_scale(numbers: np.ndarray, counts: np.ndarray, num_bins: int, continuous: bool) -> dict[str, Any]:
    if continuous:
        return {"scale": _scale(numbers, counts)}
    return {"edges": bin_edges(numbers, counts, num_bins)}


def bin_edges(numbers: np.ndarray, counts: np.ndarray, num_bins: int) -> list[float]:
    """Inner edges of bins of equal size, ascending and distinct; the outermost bins have no end.

    Where more values than a bin's share are equal, edges coincide and are merged. Where all coincide with the largest
    value, the next smaller one is the edge, so that two different values always come apart (FIDDLE keeps one bin).
    """
    if len(numbers) < 2:
        return []
    shares = np.arange(1, num_bins) / num_bins
    edges = {_readable(edge) for edge in quantiles(numbers, counts, shares)}
    inner = sorted(edge for edge in edges if edge < _readable(numbers[-1]))
    return inner or [_readable(numbers[-2])]


def _readable(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _scale(numbers: np.ndarray, counts: np.ndarray) -> list[float]:
    """Bounds, mean and standard deviation of the numbers between the bounds."""
    if not len(numbers):
        return [0.0, 0.0, 0.0, 1.0]
    low, high = quantiles(numbers, counts, CUT)
    inside = np.clip(numbers.astype(np.float64), low, high)
    center = np.average(inside, weights=counts)
    deviation = np.sqrt(np.average((inside - center) ** 2, weights=counts))
    return [float(low), float(high), float(center), float(deviation) or 1.0]


def choose_features(fit: Fit, variables: list[dict[str, Any]]) -> list[int]:
    """Numbers of the features that pass the filters: the third pass.

    Two binary features are equal, or opposite, in every hour (their correlation is ±1) where the hours they are on in
    have the same sum of random numbers, or the remaining ones have: two sums of 30 bits per hour, so that a mistake
    has a probability of 2⁻⁶⁰ a pair.
    """
    extractor = HourlyFeatureExtractor(variables, **fit.state)
    size = len(extractor.recipe.names)
    draw = np.random.default_rng(0)
    stays, somewhere, everywhere = 0, np.zeros(size, np.int64), np.zeros(size, np.int64)
    sums, total = np.zeros((2, size), np.int64), np.zeros((2, 1), np.int64)
    for shard, arguments in fit.shards(extractor, "Choosing features"):
        taken, _ = extractor.usable(*arguments)
        for hours, ids, counts in extractor.encoded_blocks(taken, shard.stay_hours):
            hours = hours[hours > 0]
            of_stay = np.repeat(np.arange(len(hours)), hours)
            random = draw.integers(0, 2**30, (2, len(counts)))
            row = np.repeat(np.arange(len(counts)), counts)
            sums += [np.bincount(ids, weights, size).astype(np.int64) for weights in random[:, row]]
            total += random.sum(axis=1, keepdims=True)
            found = np.bincount(of_stay[row] * size + ids, minlength=len(hours) * size).reshape(-1, size)
            somewhere += np.count_nonzero(found, axis=0)
            everywhere += np.count_nonzero(found == hours[:, None], axis=0)
            stays += len(hours)
    return _filter(fit, extractor.recipe.is_binary, somewhere / stays, 1 - everywhere / stays, sums, total)


def _filter(
    fit: Fit, is_binary: np.ndarray, on: np.ndarray, off: np.ndarray, sums: np.ndarray, total: np.ndarray
) -> list[int]:
    """Features by the shares of stays in which they are on, and off, in an hour."""
    threshold = fit.state["constant_threshold"]
    varied = (on > threshold) & (~is_binary | (off > threshold)) & (on >= fit.state["min_prevalence"])
    seen: set[tuple[int, ...]] = set()
    kept = []
    for number in np.flatnonzero(varied).tolist():
        if is_binary[number]:
            own, opposite = tuple(sums[:, number].tolist()), tuple((total[:, 0] - sums[:, number]).tolist())
            if own in seen or opposite in seen:
                continue
            seen.add(own)
        kept.append(number)
    return kept
