"""The table of an evaluation: one row a model, intervals over patients, paired differences against a named row."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array
from hf_ehr.intervals import Interval, Metric, crossed_bootstrap, holm, verdict
from hf_ehr.metrics import auroc, average_precision, brier, calibration_slope, ece, f1_at, undefined_reason
from hf_ehr.schema import atomic_path

MANDATORY_ROWS = ("Prevalence", "Age + sex LR", "Bag-of-codes LR", "LightGBM on counts")
"""Without these and an untrained model a weak architecture looks like a strong effect of pre-training."""

FEW_POSITIVES = 50
HEADINGS = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "brier": "Brier",
    "f1": "F1",
    "calibration_slope": "Calibration slope",
    "ece": "ECE",
}
# No bootstrap interval: a resample repeats rows, which adds to the ECE, and refits of the slope take most of the time.
POINT_METRICS: dict[str, Metric] = {"calibration_slope": calibration_slope, "ece": ece}


@dataclass(frozen=True)
class Result:
    """One row of a table.

    Attributes:
        model: Its name.
        metrics: Name → figure on the test rows, averaged over the draws; a metric without an interval has NaN ends.
        n: Test rows.
        positives: Positive test rows.
        patients: Patients they belong to.
        n_train: Labelled patients it was fitted on.
        draws: Label draws or seeds that were averaged.
        reference: The row that ``difference`` is taken against.
        difference: AUROC of this row minus that of the reference, paired by patient and draw; None for the reference.
        undefined: Why ranking metrics are NaN, e.g. ``no positives``.
    """

    model: str
    metrics: dict[str, Interval]
    n: int
    positives: int
    patients: int
    n_train: int | None = None
    draws: int = 1
    reference: str | None = None
    difference: Interval | None = None
    undefined: str | None = None


def evaluate_rows(
    predictions: Mapping[str, ArrayLike],
    y: ArrayLike,
    patients: ArrayLike,
    *,
    reference: str,
    thresholds: Mapping[str, float | Sequence[float]] | None = None,
    n_train: int | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[Result]:
    """Scores every model on one test set.

    Args:
        predictions: Model → probabilities, ``(n,)``, or ``(draws, n)`` for several label draws or seeds. Draw ``i`` of
            all models must rest on the same training sample; a model with one draw stands in all of them.
        y: Test labels 0/1, ``(n,)``.
        patients: Patient of each row, ``(n,)``.
        reference: The model that differences are taken against.
        thresholds: Model → threshold tuned on validation, or one a draw; models without one get no F1.
        n_train: Labelled patients the models were fitted on.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        ValueError: ``reference`` or a name in ``thresholds`` is not among the predictions, or shapes differ.
    """
    unknown = {reference, *(thresholds or {})} - set(predictions)
    if unknown:
        raise ValueError(f"`reference` and `thresholds` must name models out of {list(predictions)}, got {unknown}.")
    scores = {name: np.atleast_2d(np.asarray(p, dtype=np.float64)) for name, p in predictions.items()}
    draws = max(len(p) for p in scores.values())
    counts = {name: len(p) for name, p in scores.items()}
    if not set(counts.values()) <= {1, draws}:
        raise ValueError(f"`predictions` must have one draw or the same number of draws each, got {counts}.")
    labels = np.asarray(y)
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}

    def row(name: str) -> Result:
        metrics = _figures(labels, scores[name], patients, (thresholds or {}).get(name), options)
        difference = None
        if name != reference:
            own, rival = np.broadcast_arrays(scores[name], scores[reference])
            difference = crossed_bootstrap(auroc, labels, own, rival, patients, **options)
        return Result(
            model=name,
            metrics=metrics,
            n=len(labels),
            positives=int(labels.sum()),
            patients=len(np.unique(np.asarray(patients))),
            n_train=n_train,
            draws=len(scores[name]),
            reference=None if name == reference else reference,
            difference=difference,
            undefined=undefined_reason(labels),
        )

    return [row(name) for name in scores]


def write_table(rows: Sequence[Result], path_stem: str | Path, title: str, notes: Sequence[str] = ()) -> list[Path]:
    """Writes ``<path_stem>.csv``, ``.md`` and ``.json``.

    P-values of the differences are adjusted over the whole table (Holm). Rows that a table must have and has not, and
    test sets too small for a claim, are named in the notes.

    Args:
        rows: Of one or several calls of ``evaluate_rows``.
        path_stem: Path without a suffix.
        title: Names data set, split and task.
        notes: What a reader must know to read the figures.

    Returns:
        The three paths.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one result, got none. Pass the results of `evaluate_rows`.")
    adjusted = holm([row.difference.p_value if row.difference else None for row in rows])
    records = [flat_record(row, p) for row, p in zip(rows, adjusted, strict=True)]
    notes = [*notes, *_warnings(rows)]
    contents = {
        "csv": csv_text(records),
        "md": markdown_table(rows, records, title, notes),
        "json": json.dumps(
            finite({"title": title, "notes": notes, "rows": [asdict(row) for row in rows]}), indent=2, allow_nan=False
        ),
    }
    paths = [Path(f"{path_stem}.{suffix}") for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(content.rstrip("\n") + "\n", encoding="utf-8")
    return paths


def _figures(
    y: Array, p: Array, patients: ArrayLike, threshold: float | Sequence[float] | None, options: dict[str, Any]
) -> dict[str, Interval]:
    """Metrics of one model over its draws ``(draws, n)``."""
    metrics = {
        name: crossed_bootstrap(metric, y, p, None, patients, **options)
        for name, metric in (("auroc", auroc), ("average_precision", average_precision), ("brier", brier))
    }
    if threshold is not None:
        # Each draw has a threshold of its own: scores are measured from it, so that one cut at 0 serves all.
        margin = p - np.reshape(threshold, (-1, 1))
        metrics["f1"] = crossed_bootstrap(_f1_at_zero, y, margin, None, patients, **options)
    for name, metric in POINT_METRICS.items():
        value = float(np.mean([metric(y, draw, np.ones(len(y))) for draw in p]))
        metrics[name] = Interval(value, float("nan"), float("nan"))
    return metrics


def _f1_at_zero(y: Array, margin: Array, weight: Array) -> float:
    return f1_at(y, margin, 0.0, weight)


def _warnings(rows: Sequence[Result]) -> list[str]:
    models = {row.model for row in rows}
    missing = [name for name in MANDATORY_ROWS if name not in models]
    if not any(name.startswith("Untrained ") for name in models):
        missing.append("an untrained model")
    warnings = [f"This table lacks rows it should have: {', '.join(missing)}."] if missing else []
    if min(row.positives for row in rows) < FEW_POSITIVES:
        warnings.append(
            f"Fewer than {FEW_POSITIVES} positive test rows: these figures prove nothing about any model. They show "
            "that the tables pass through the whole road."
        )
    return warnings


def flat_record(row: Result, p_adjusted: float) -> dict[str, Any]:
    """A flat row of the CSV file; what is undefined is empty."""
    record: dict[str, Any] = {
        "model": row.model, "n_train": row.n_train, "draws": row.draws, "patients": row.patients, "n": row.n,
        "positives": row.positives, "prevalence": row.positives / row.n,
    }  # fmt: skip
    for name in HEADINGS:
        record |= _ends(name, row.metrics.get(name))
    record |= {"reference": row.reference, **_ends("auroc_difference", row.difference)}
    record["p_value"] = row.difference.p_value if row.difference else None
    record["p_adjusted"] = p_adjusted
    record["verdict"] = _verdict(row, p_adjusted)
    return dict(finite(record))


def _verdict(row: Result, p_adjusted: float) -> str | None:
    """With few positives resampling cannot show how far a figure may be off, so nothing is concluded from it."""
    if row.difference is None:
        return None
    return verdict(row.difference, p_adjusted=p_adjusted) if row.positives >= FEW_POSITIVES else "no difference shown"


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    value, low, high = (interval.value, interval.low, interval.high) if interval else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """Flat records with the same keys as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def markdown_table(rows: Sequence[Result], records: Sequence[dict[str, Any]], title: str, notes: Sequence[str]) -> str:
    """Rows and their flat records as one table, with the notes below it."""
    shown = [name for name in HEADINGS if any(name in row.metrics for row in rows)]
    header = ["Model", "Labelled", "Draws", "Test rows (positive)", *(HEADINGS[name] for name in shown), "Δ AUROC"]
    lines = [f"# {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row, record in zip(rows, records, strict=True):
        labelled = "–" if row.n_train is None else f"{row.n_train:,}"
        tested = f"{row.n:,} ({row.positives:,} = {row.positives / row.n:.1%})"
        figures = [_cell(row.metrics.get(name), row.undefined) for name in shown]
        cells = [row.model, labelled, str(row.draws), tested, *figures, _difference_cell(row, record["verdict"])]
        lines.append(f"| {' | '.join(cells)} |")
    level = next(iter(rows[0].metrics.values())).level
    definitions = (
        f"Brackets: {level:.0%} bootstrap intervals, patients resampled with all their rows (and draws, where there "
        "are several). AP is average precision, F1 is taken at a threshold tuned on validation, ECE over 15 bins of "
        "equal mass. Δ AUROC is paired by patient; it counts as a difference when its interval excludes 0, it is at "
        "least 0.01, and its p-value stays below 5 % after Holm's correction over the table."
    )
    return "\n".join([*lines, "", definitions, "", *(f"- {note}" for note in notes)])


def _cell(interval: Interval | None, undefined: str | None) -> str:
    if interval is None:
        return "–"
    return f"– ({undefined})" if math.isnan(interval.value) and undefined else str(interval)


def _difference_cell(row: Result, outcome: str | None) -> str:
    if row.difference is None:
        return "reference"
    if math.isnan(row.difference.value):
        return _cell(row.difference, row.undefined)
    return f"{row.difference.value:+.3f} ({row.difference.low:+.3f} to {row.difference.high:+.3f}): {outcome}"


def finite(value: Any) -> Any:
    """``value`` with None for NaN, as JSON and CSV have it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
