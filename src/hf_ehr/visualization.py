"""Figures of an evaluation (label efficiency, calibration, decisions, subgroups) as PNG files without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array, check_scores, equal_mass_bins
from hf_ehr.decision_curves import THRESHOLDS, Band, net_benefit_band
from hf_ehr.intervals import Interval
from hf_ehr.schema import atomic_path
from hf_ehr.subgroups import FIGURES, Subgroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The palette of Okabe & Ito (2008), safe for the colour-blind, without its yellow, which vanishes on white."""
MARKERS = "osD^vPX*"
DPI = 150


def label_efficiency_curve(
    results: Mapping[str, Mapping[int, Interval]],
    path: str | Path,
    *,
    metric: str = "AUROC",
    title: str = "Label efficiency",
) -> None:
    """Draws ``metric`` against the number of labelled patients, with intervals.

    Args:
        results: Model → number of labelled patients → figure; models appear in the legend in this order.
        path: The PNG to write.
        metric: Name on the y axis.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    sizes = sorted({size for curve in results.values() for size in curve})
    if not sizes:
        raise ValueError("`results` must hold at least one figure, got none.")
    with saved_figure(path, (8.0, 4.5)) as figure:
        axes = figure.subplots()
        spread = 0.12 * min(np.diff(np.log(sizes)), default=1.0)
        for index, (name, curve) in enumerate(results.items()):
            _draw_curve(axes, name, curve, index, spread * (index / max(len(results) - 1, 1) - 0.5))
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.set(xlabel="Labelled patients", ylabel=metric, title=title)
        decorate_axes(axes)
        legend_beside(axes)


def forest_plot(
    results: Mapping[str, Mapping[str, Interval]], path: str | Path, *, metric: str = "AUROC", title: str = ""
) -> None:
    """Draws every row of a table as a point with its interval, one panel a column.

    Args:
        results: Row → column → figure; rows appear from the top in this order.
        path: The PNG to write.
        metric: Name on the x axes.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    if not columns:
        raise ValueError("`results` must hold at least one figure, got none.")
    with saved_figure(path, (2.0 + 3.2 * len(columns), 1.2 + 0.3 * len(results))) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
        for axes, column in zip(panels, columns, strict=True):
            for place, row in enumerate(results.values()):
                if column in row:
                    _draw_interval(axes, row[column], place)
            axes.set(xlabel=metric)
            axes.set_title(column, fontsize=9)
            decorate_axes(axes)
        panels[0].set_yticks(range(len(results)), list(results))
        panels[0].invert_yaxis()
        figure.suptitle(title)
        figure.tight_layout()


def label_auroc_histogram(results: Mapping[str, ArrayLike], path: str | Path, *, title: str = "") -> None:
    """Draws how many labels have which AUROC (BERT-XML, Fig. 2), one panel a row.

    Args:
        results: Row → AUROC of every label; NaN, where undefined, is left out.
        path: The PNG to write.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    drawn = {name: np.asarray(values, float)[~np.isnan(values)] for name, values in results.items()}
    if not any(map(len, drawn.values())):
        raise ValueError("`results` must hold at least one defined figure, got none.")
    low = min(float(values.min()) for values in drawn.values() if len(values))
    bins = np.linspace(min(0.5, np.floor(low * 50) / 50), 1, 51)
    with saved_figure(path, (6.0, 0.8 + 1.6 * len(drawn))) as figure:
        panels = np.atleast_1d(figure.subplots(len(drawn), 1, sharex=True))
        for axes, (name, values) in zip(panels, drawn.items(), strict=True):
            axes.hist(values, bins=bins, color=COLORS[0])
            axes.set_title(f"{name} ({len(values)} labels)", fontsize=9)
            axes.set_ylabel("labels")
            decorate_axes(axes)
        panels[-1].set_xlabel("AUROC of a label")
        figure.suptitle(title)
        figure.tight_layout()


def calibration_plot(
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | Path,
    *,
    bins: int = 10,
    title: str = "Calibration",
) -> None:
    """Draws observed against predicted risk in equal-mass bins, and below it how often each risk is predicted.

    The axes end at the largest bin, bar or 99.5th percentile of a model.

    The bars are 95 % Wilson intervals of the rows of a bin, which take rows as independent: with several rows per
    patient they are too narrow.

    Args:
        predictions: Model → (labels 0/1 ``(n,)``, probabilities ``(n,)``).
        path: The PNG to write.
        bins: Number of bins, fewer where values are tied.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw, or as ``metrics.brier``.
    """
    if not predictions:
        raise ValueError("`predictions` must hold at least one model, got none.")
    checked = {name: check_scores(y, p, None, probability=True)[:2] for name, (y, p) in predictions.items()}
    with saved_figure(path, (7.5, 6.0)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        tops = [_draw_reliability(upper, name, y, p, bins, i) for i, (name, (y, p)) in enumerate(checked.items())]
        limit = min(1.0, 1.05 * max(tops))
        upper.plot([0, limit], [0, limit], color="0.5", linestyle="--", linewidth=1, label="Perfect", zorder=1)
        upper.set(xlim=(0, limit), ylim=(0, limit), ylabel="Observed fraction", title=title)
        for index, (_, p) in enumerate(checked.values()):
            share = np.full(len(p), 100 / len(p))
            edges = list(np.linspace(0, limit, 41))
            lower.hist(p, edges, weights=share, histtype="step", color=COLORS[index % len(COLORS)], linewidth=1.4)
        lower.set(xlabel="Predicted probability", ylabel="Rows (%)", yscale="log")
        lower.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        for axes in (upper, lower):
            decorate_axes(axes)
        legend_beside(upper)


def decision_curve(
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | Path,
    *,
    patients: ArrayLike | None = None,
    thresholds: ArrayLike = THRESHOLDS,
    n_resamples: int = 1000,
    title: str = "Decision curve",
) -> None:
    """Draws net benefit against the risk from which on one would act, beside treating everybody and nobody.

    Args:
        predictions: Model → (labels 0/1 ``(n,)``, probabilities ``(n,)``), of the same rows; a calibrated model only
            says at a threshold what it should.
        path: The PNG to write.
        patients: Patient of each row, for the bands (95 %, pointwise); rows are resampled without.
        thresholds: Where to look.
        n_resamples: Bootstrap resamples of the bands.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw, or as ``decision_curves.net_benefit_band``.
    """
    if not predictions:
        raise ValueError("`predictions` must hold at least one model, got none.")
    labels = np.asarray(next(iter(predictions.values()))[0])
    ids = np.arange(len(labels)) if patients is None else np.asarray(patients)
    curves = {"Treat all": (labels, np.ones(len(labels)))} | dict(predictions)
    bands = {name: net_benefit_band(y, p, ids, thresholds, n_resamples=n_resamples) for name, (y, p) in curves.items()}
    everybody = bands.pop("Treat all")
    with saved_figure(path, (8.0, 4.5)) as figure:
        axes, x = figure.subplots(), 100 * np.asarray(thresholds, np.float64)
        axes.plot(x, everybody.value, color="0.5", linestyle="--", linewidth=1.2, label="Treat all")
        axes.fill_between(x, everybody.low, everybody.high, color="0.5", alpha=0.12, linewidth=0)
        axes.axhline(0, color="0.3", linestyle=":", linewidth=1.2, label="Treat none")
        for index, (name, band) in enumerate(bands.items()):
            _draw_band(axes, name, x, band, index)
        top = max(float(band.high.max()) for band in [*bands.values(), everybody])
        axes.set(xlim=(x[0], x[-1]), ylim=(-0.25 * top, 1.05 * top), xlabel="Risk from which on one would act (%)")
        axes.set(ylabel="Net benefit (true positives per row)", title=title)
        decorate_axes(axes)
        legend_beside(axes)


def subgroup_plot(groups: Sequence[Subgroup], path: str | Path, *, title: str = "Subgroups") -> None:
    """Draws the figures of every group as points with intervals; a dashed line marks the whole test set.

    Args:
        groups: Of ``subgroups.subgroups``; one without figures has its name and its number of rows only.
        path: The PNG to write.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No group has figures.
    """
    if not any(group.figures for group in groups):
        raise ValueError("`groups` must hold at least one with figures, got none. Test on more stays.")
    with saved_figure(path, (2.5 + 2.1 * len(FIGURES), 1.2 + 0.32 * len(groups))) as figure:
        panels = figure.subplots(1, len(FIGURES), sharey=True)
        for axes, (name, heading) in zip(panels, FIGURES.items(), strict=True):
            for place, group in enumerate(groups):
                if group.figures:
                    _draw_interval(axes, group.figures[name], place)
                    if group.field == "all":
                        axes.axvline(group.figures[name].value, color="0.5", linestyle="--", linewidth=1, zorder=1)
            axes.set_title(heading, fontsize=9)
            decorate_axes(axes)
        labels = [f"{group.title} ({group.n:,}{'' if group.figures else ', too few'})" for group in groups]
        panels[0].set_yticks(range(len(groups)), labels)
        panels[0].set_ylim(len(groups) - 0.5, -0.5)
        figure.suptitle(title)
        figure.tight_layout()


def contribution_plot(
    contributions: Sequence[tuple[str, float]],
    path: str | Path,
    *,
    course: Sequence[float] = (),
    threshold: float | None = None,
    title: str = "",
) -> None:
    """Draws what raises and what lowers a risk as bars, and beside them the risk after each visit.

    Args:
        contributions: (part, change of the log-odds) of each, the greatest above. Two parts may have one name.
        path: The PNG to write.
        course: Probability after each visit; empty for none.
        threshold: From which on the model says yes: a dashed line.
        title: Above the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    if not contributions:
        raise ValueError("`contributions` must hold at least one part, got none. A patient needs two codes at least.")
    up, down = COLORS[1], COLORS[0]
    height = 1.3 + 0.3 * max(len(contributions), 6)
    with saved_figure(path, (8.5 if len(course) < 2 else 12.0, height)) as figure:
        panels = figure.subplots(1, 1 if len(course) < 2 else 2, width_ratios=None if len(course) < 2 else (3, 2))
        axes, *rest = np.atleast_1d(panels)
        names, changes = zip(*contributions, strict=True)
        axes.barh(range(len(changes)), changes, color=[up if change > 0 else down for change in changes], height=0.7)
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set_yticks(range(len(changes)), [_shortened(name) for name in names])
        axes.set_ylim(len(changes) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.set_xlabel("Change of the log-odds: left lowers, right raises the risk")
        decorate_axes(axes)
        for beside in rest:
            beside.plot(range(1, len(course) + 1), course, color=COLORS[6], marker="o", markersize=5)
            if threshold is not None:
                beside.axhline(threshold, color="0.5", linestyle="--", linewidth=1)
                beside.annotate("threshold", (1, threshold), xytext=(0, 3), textcoords="offset points", color="0.4")
            beside.set(xlabel="After visit", ylabel="Probability", ylim=(0, 1))
            beside.xaxis.get_major_locator().set_params(integer=True)
            decorate_axes(beside)
        figure.suptitle(title)
        figure.tight_layout()


def _shortened(name: str, most: int = 48) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def reliability(y: ArrayLike, p: ArrayLike, bins: int) -> tuple[Array, Array, Array]:
    """Mean prediction, positives and rows of each equal-mass bin that is not empty, ``(bins used,)`` each."""
    labels, scores, weight = check_scores(y, p, None, probability=True)
    members = equal_mass_bins(scores, bins)
    rows = np.bincount(members, weight, bins)
    used = rows > 0
    mean = np.bincount(members, scores, bins)[used] / rows[used]
    return mean, np.bincount(members, labels, bins)[used], rows[used]


def wilson_interval(positives: Array, rows: Array, z: float = 1.959964) -> tuple[Array, Array]:
    """Lower and upper end of Wilson's (1927) interval of a proportion; also sound at 0 and at all positives."""
    rate, spread = positives / rows, z * z / rows
    centre = (rate + spread / 2) / (1 + spread)
    half = np.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def style_of(index: int) -> dict[str, Any]:
    """Colour, marker and line of a model; those after the palette's end are dashed, with other markers."""
    turn, place = divmod(index, len(COLORS))
    return {
        "color": COLORS[place], "marker": MARKERS[(place + turn) % len(MARKERS)], "linestyle": "--" if turn else "-",
    }  # fmt: skip


def _draw_curve(axes: Axes, name: str, curve: Mapping[int, Interval], index: int, shift: float) -> None:
    """One model; ``shift`` (on the log axis) keeps the bars of several models apart."""
    sizes = sorted(curve)
    x = np.asarray(sizes) * np.exp(shift)
    value, low, high = (np.array([getattr(curve[size], end) for size in sizes]) for end in ("value", "low", "high"))
    axes.errorbar(
        x, value, np.maximum([value - low, high - value], 0), label=name, **style_of(index),
        markersize=5, linewidth=1.6, elinewidth=1.1, capsize=3,
    )  # fmt: skip


def _draw_band(axes: Axes, name: str, x: Array, band: Band, index: int) -> None:
    color = COLORS[index % len(COLORS)]
    axes.plot(x, band.value, color=color, linewidth=1.8, label=name, zorder=3)
    axes.fill_between(x, band.low, band.high, color=color, alpha=0.15, linewidth=0)


def _draw_interval(axes: Axes, figure: Interval, place: int) -> None:
    ends = [[max(figure.value - figure.low, 0)], [max(figure.high - figure.value, 0)]]
    axes.errorbar([figure.value], [place], xerr=ends, color=COLORS[0], marker="o", markersize=5, capsize=3)


def _draw_reliability(axes: Axes, name: str, y: Array, p: Array, bins: int, index: int) -> float:
    """One model; returns how far its points and bars reach."""
    mean, positives, rows = reliability(y, p, bins)
    rate = positives / rows
    low, high = wilson_interval(positives, rows)
    axes.errorbar(
        mean, rate, np.maximum([rate - low, high - rate], 0), label=name, **style_of(index),
        markersize=5, linewidth=1.4, elinewidth=1.1, capsize=3, zorder=2,
    )  # fmt: skip
    return float(max(high.max(), mean.max(), np.quantile(p, 0.995)))


def decorate_axes(axes: Axes) -> None:
    """A pale grid behind the data, and no frame above and to the right."""
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(axes: Axes) -> None:
    """A legend outside the axes, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, borderaxespad=0)


@contextmanager
def saved_figure(path: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure written to ``path`` on success. It has an Agg canvas and no pyplot, so nothing is left open."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib. Do `pip install 'transformers-ehr[viz]'`.") from error
    figure = Figure(figsize=size, dpi=DPI)
    FigureCanvasAgg(figure)
    yield figure
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
