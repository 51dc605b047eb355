"""One model on parts of a test set (sex, age band, unit): how it ranks, how it is calibrated, whom it misses.

Every figure has an interval over patients. A group with too few positives or negatives is listed without figures: what
would be read off them is chance.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array, recalibrate
from hf_ehr.intervals import Interval, percentile_interval, resamples
from hf_ehr.metrics import auroc, average_precision, calibration_intercept_slope, confusion_at
from hf_ehr.schema import atomic_path

FEWEST = 50
"""Positives, and negatives, that a group needs."""
CALIBRATION_RESAMPLES = 200
"""A regression for each: they take most of the time, and their intervals are wide."""
AGE_BANDS = (45, 65, 80)
FIGURES = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "calibration_intercept": "Calibration intercept",
    "calibration_slope": "Calibration slope",
    "fnr": "FNR",
    "fpr": "FPR",
    "ppv": "PPV",
}
"""Name → heading. FNR, FPR and PPV are those of the decision threshold."""


@dataclass(frozen=True)
class Subgroup:
    """One part of the test rows.

    Attributes:
        field: What the parts differ in; ``all`` for the whole.
        group: Its value.
        n: Rows.
        positives: Positive rows; None where there are fewer than ``FEWEST``.
        figures: By the names of ``FIGURES``; empty where positives or negatives are fewer than ``FEWEST``.
    """

    field: str
    group: str
    n: int
    positives: int | None
    figures: dict[str, Interval]

    @property
    def title(self) -> str:
        """``sex: F``."""
        return self.field if self.field == "all" else f"{self.field}: {self.group}"


def subgroups(
    y: ArrayLike,
    p: ArrayLike,
    patients: ArrayLike,
    fields: Mapping[str, Sequence[str | None] | Array],
    threshold: float,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[Subgroup]:
    """The whole and then the parts by each field.

    Args:
        y: Labels 0/1, (n,).
        p: Probabilities, (n,).
        patients: Patient of each row, (n,).
        fields: Name → value of each row, None where unknown (a group of its own, ``unknown``).
        threshold: Decision threshold, tuned on validation; ``p >= threshold`` is positive.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the bootstrap.

    Raises:
        ValueError: Lengths differ, or as ``metrics.brier``.
    """
    labels, scores, ids = np.asarray(y), np.asarray(p, np.float64), np.asarray(patients)
    groups: dict[str, Array] = {"all": np.full(len(labels), "all", object)}
    for name, values in fields.items():
        if len(values) != len(labels):
            raise ValueError(f"`fields` must have a value per row, got {len(values)} of `{name}` for {len(labels)}.")
        groups[name] = np.array(["unknown" if value is None else str(value) for value in values], object)
    rows = []
    for name, own in groups.items():
        for group in sorted(set(own), key=lambda value: (value == "unknown", value)):
            part = own == group
            positives, n = int(labels[part].sum()), int(part.sum())
            shown = min(positives, n - positives) >= FEWEST
            figures = _figures(labels[part], scores[part], ids[part], threshold, n_resamples, seed) if shown else {}
            rows.append(Subgroup(name, group, n, positives if positives >= FEWEST else None, figures))
    return rows


def age_bands(age: ArrayLike) -> list[str | None]:
    """``0 to 44``, ``45 to 64``, ``65 to 79`` or ``80 and over``, by completed years; None where age is NaN."""
    names = [f"{low} to {high - 1}" for low, high in pairwise((0, *AGE_BANDS))]
    names.append(f"{AGE_BANDS[-1]} and over")
    years = np.asarray(age, np.float64)
    bands = np.searchsorted(AGE_BANDS, years, side="right")
    return [None if np.isnan(year) else names[band] for year, band in zip(years, bands, strict=True)]


def subgroup_lines(rows: Sequence[Subgroup]) -> list[str]:
    """A Markdown table and what its headings mean."""
    header = ["Group", "Rows", "Positive", *FIGURES.values()]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        counts = [f"{row.n:,}", f"< {FEWEST}" if row.positives is None else f"{row.positives:,}"]
        figures = [str(row.figures[name]) if row.figures else "–" for name in FIGURES]
        lines.append(f"| {' | '.join([row.title, *counts, *figures])} |")
    meaning = (
        "FNR is the share of positives that are missed, FPR that of negatives that are flagged, PPV that of flagged "
        "rows that are positive, at the threshold tuned on validation. A calibrated model has intercept 0, slope 1. "
        f"Groups of fewer than {FEWEST} positives or negatives have no figures."
    )
    return [*lines, "", meaning]


def write_subgroups(rows: Sequence[Subgroup], path: Path) -> None:
    """Writes the groups as CSV; what is not known is empty."""
    buffer = io.StringIO()
    columns = ["field", "group", "n", "positives"]
    columns += [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        record: dict[str, Any] = {"field": row.field, "group": row.group, "n": row.n, "positives": row.positives}
        for name, figure in row.figures.items():
            ends = {"": figure.value, "_low": figure.low, "_high": figure.high}
            record |= {f"{name}{end}": None if np.isnan(value) else value for end, value in ends.items()}
        writer.writerow(record)
    with atomic_path(path) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")


def _figures(
    y: Array, p: Array, patients: Array, threshold: float, n_resamples: int, seed: int
) -> dict[str, Interval]:
    order = np.argsort(p, kind="stable")  # ranking metrics sort again: quick, once it is done
    y, p, members = y[order], p[order], np.unique(patients[order], return_inverse=True)[1]
    logit = np.log(np.clip(p, 1e-7, 1 - 1e-7)) - np.log1p(-np.clip(p, 1e-7, 1 - 1e-7))
    whole = calibration_intercept_slope(y, p)
    value = {"calibration_intercept": whole.intercept, "calibration_slope": whole.slope}
    value |= _cheap(y, p, threshold, np.ones(len(y)))
    drawn: dict[str, list[float]] = {name: [] for name in FIGURES}
    for place, (weight, _) in enumerate(resamples(members, 1, n_resamples, seed)):
        figures = _cheap(y, p, threshold, weight)
        if place < CALIBRATION_RESAMPLES:
            kept = weight > 0
            both = len(set(y[kept])) == 2
            intercept, slope = recalibrate(y[kept], logit[kept], weight[kept]) if both else (np.nan, np.nan)
            figures |= {"calibration_intercept": intercept, "calibration_slope": slope}
        for name, figure in figures.items():
            drawn[name].append(figure)
    return {name: percentile_interval(value[name], np.array(drawn[name]), 0.95, difference=False) for name in FIGURES}


def _cheap(y: Array, p: Array, threshold: float, weight: Array) -> dict[str, float]:
    tp, fp, fn, tn = confusion_at(y, p, threshold, weight)
    return {
        "auroc": auroc(y, p, weight),
        "average_precision": average_precision(y, p, weight),
        "fnr": fn / (tp + fn) if tp + fn else float("nan"),
        "fpr": fp / (fp + tn) if fp + tn else float("nan"),
        "ppv": tp / (tp + fp) if tp + fp else float("nan"),
    }
