"""Sets of drugs or codes that models propose for visits: figures with intervals, differences, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import Interval, holm, resamples_for, verdict
from .multilabel_intervals import multilabel_intervals
from .multilabel_predictions import MultilabelPredictions
from .recommendation import recommendation_intervals, recommendation_metrics
from .reports import csv_text, finite
from .schema import atomic_path

FEWEST = 50
"""Patients that a table needs for a conclusion, and a subgroup for figures."""
HEADINGS = {
    "recommendation": {
        "jaccard_samples": "Jaccard",
        "f1_samples": "F1",
        "average_precision_samples": "AP",
        "new_drug_jaccard": "Jaccard of new drugs",
        "f1_micro": "F1 micro",
        "average_precision_micro": "AP micro",
        "auroc_micro": "AUROC micro",
        "average_precision_macro": "AP macro",
        "auroc_macro": "AUROC macro",
        "number_of_drugs": "Drugs",
        "number_of_drugs_error": "Error in drugs",
        "ddi_rate": "DDI rate",
    },
    "coding": {
        "f1_micro": "F1 micro",
        "f1_macro": "F1 macro",
        "average_precision_micro": "AP micro",
        "auroc_micro": "AUROC micro",
        "average_precision_macro": "AP macro",
        "auroc_macro": "AUROC macro",
        "map": "MAP",
    },
}
COMPARED = {
    "recommendation": ("jaccard_samples", "average_precision_samples"),
    "coding": ("f1_micro", "average_precision_micro"),
}
"""What differences are taken of; their p-values are one family."""
MEANING = {
    "recommendation": (
        "Jaccard, F1 and AP are means over visits (AP is what papers call PR-AUC), new drugs those that the visit "
        "before had not; micro figures pool all visits and drugs, macro figures are means over drugs that occur. "
        "Error in drugs is the mean absolute difference to the number of true ones."
    ),
    "coding": (
        "Micro figures pool all visits and codes, macro figures are means over codes that occur, MAP is the mean "
        "average precision of a visit's codes."
    ),
}


@dataclass
class SetComparison:
    """Probabilities of every row of a table, with what is needed to judge them.

    Attributes:
        setting: ``recommendation`` or ``coding``.
        test: Row → (visits, labels).
        thresholds: Row → one, or one a label, tuned on validation.
        truth: (visits, labels) 0/1.
        previous: Drugs of the visit before, likewise.
        patients: (visits,).
        train_size: Training visits that were asked about.
        groups: Name → group of each visit, None where unknown.
        ddi: Which drugs interact, (labels, labels); None where that is not known.
    """

    setting: str
    test: dict[str, np.ndarray]
    thresholds: dict[str, Any]
    truth: np.ndarray
    previous: np.ndarray
    patients: np.ndarray
    train_size: int
    groups: Mapping[str, Sequence[str | None]]
    ddi: np.ndarray | None = None

    def headings(self) -> dict[str, str]:
        """Name → heading of the figures."""
        known = HEADINGS[self.setting]
        return {name: title for name, title in known.items() if name != "ddi_rate" or self.ddi is not None}

    def part(self, rows: np.ndarray) -> SetComparison:
        """The same of some of the visits, without groups."""
        test = {name: p[rows] for name, p in self.test.items()}
        parts = (self.truth[rows], self.previous[rows], self.patients[rows])
        return SetComparison(self.setting, test, self.thresholds, *parts, self.train_size, {}, self.ddi)

    def intervals(
        self, name: str, metrics: Sequence[str], rival: str | None = None, n_resamples: int = 1000
    ) -> dict[str, Interval]:
        """Figures of a row with intervals over patients, or of its difference to another row."""
        cut, other = self.thresholds[name], None if rival is None else self.thresholds[rival]
        if self.setting == "recommendation":
            return recommendation_intervals(
                self.truth, self.test[name], self.patients, threshold=cut, previous=self.previous, ddi=self.ddi,
                rival=None if rival is None else self.test[rival], rival_threshold=other, metrics=metrics,
                n_resamples=n_resamples,
            )  # fmt: skip
        ours, *theirs = (MultilabelPredictions.of(self.test[one], self.truth) for one in (name, rival) if one)
        return multilabel_intervals(
            ours, threshold=cut, rival=theirs[0] if theirs else None, rival_threshold=other, documents=self.patients,
            metrics=metrics, n_resamples=n_resamples,
        )  # fmt: skip


@dataclass
class SetResult:
    """One row of a table.

    Attributes:
        model: Its name.
        metrics: Name → figure on the test visits.
        differences: Name → this row minus the reference; empty for the reference.
        verdicts: Name → what follows from the difference.
    """

    model: str
    metrics: dict[str, Interval]
    differences: dict[str, Interval] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


def score_sets(comparison: SetComparison, reference: str) -> list[SetResult]:
    """Every row with its figures and its differences to the reference, judged as one family (Holm)."""
    compared = COMPARED[comparison.setting]
    n_resamples = resamples_for((len(comparison.test) - 1) * len(compared))
    results = []
    for name in comparison.test:
        row = SetResult(name, comparison.intervals(name, list(comparison.headings())))
        if name != reference:
            row.differences = comparison.intervals(name, compared, reference, n_resamples)
        results.append(row)
    family = [(row, name) for row in results for name in row.differences]
    adjusted = holm([row.differences[name].p_value for row, name in family])
    enough = len(np.unique(comparison.patients)) >= FEWEST
    for (row, name), p_value in zip(family, adjusted, strict=True):
        shown = verdict(row.differences[name], p_adjusted=p_value) if enough else "no difference shown"
        row.verdicts[name] = shown
    return results


def write_set_table(
    comparison: SetComparison, reference: str, output: Path, title: str, notes: list[str]
) -> tuple[Path, list[SetResult]]:
    """Writes `table.{md,csv,json}` and `subgroups.csv` into `output`; returns the Markdown and its rows."""
    results, headings = score_sets(comparison, reference), comparison.headings()
    patients = len(np.unique(comparison.patients))
    if patients < FEWEST:
        notes.append(f"Fewer than {FEWEST} test patients: these figures prove nothing about any model.")
    lines = [f"# {title}", "", *_figure_lines(results, headings), "", _explained(comparison), ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", f"## Differences to {reference}", "", *_difference_lines(results, comparison.setting)]
    groups = _group_records(comparison, reference)
    lines += ["", f"## Subgroups ({reference})", "", *_group_lines(groups, comparison.setting)]
    counts = {"n": len(comparison.truth), "patients": patients, "n_train": comparison.train_size}
    rows: list[dict[str, Any]] = [{**asdict(row), **counts} for row in results]
    content = finite({"title": title, "notes": notes, "setting": comparison.setting, "rows": rows})
    contents = {
        "table.md": "\n".join(lines) + "\n",
        "table.json": json.dumps(content, indent=2, allow_nan=False) + "\n",
        "table.csv": csv_text([_record(row, headings, comparison, counts) for row in results]),
        "subgroups.csv": csv_text(groups),
    }
    for name, text in contents.items():
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return output / "table.md", results


def _figure_lines(results: Sequence[SetResult], headings: Mapping[str, str]) -> list[str]:
    lines = [f"| Model | {' | '.join(headings.values())} |", f"|{'---|' * (1 + len(headings))}"]
    for row in results:
        cells = [str(row.metrics[name]) if name in row.metrics else "–" for name in headings]
        lines.append(f"| {' | '.join([row.model, *cells])} |")
    return lines


def _explained(comparison: SetComparison) -> str:
    visits, patients = len(comparison.truth), len(np.unique(comparison.patients))
    text = (
        f"{visits:,} test visits of {patients:,} patients with {comparison.truth.sum(axis=1).mean():.2f} true labels "
        "on average. Brackets: 95% bootstrap intervals, patients resampled with all their visits. "
        f"{MEANING[comparison.setting]}"
    )
    if comparison.ddi is not None:
        anyone = next(iter(comparison.test.values()))
        rate = recommendation_metrics(comparison.truth, anyone, ddi=comparison.ddi)["ddi_rate_truth"]
        text += (
            f" The DDI rate of the drugs that were given is {rate:.3f}: one below it is not a safer list by itself."
        )
    return text


def _difference_lines(results: Sequence[SetResult], setting: str) -> list[str]:
    names = COMPARED[setting]
    titles = [f"Δ {HEADINGS[setting][name]}" for name in names]
    lines = [f"| Model | {' | '.join(titles)} |", f"|{'---|' * (1 + len(names))}"]
    for row in results:
        if row.differences:
            cells = [f"{_signed(row.differences[name])}: {row.verdicts[name]}" for name in names]
            lines.append(f"| {' | '.join([row.model, *cells])} |")
    return [
        *lines, "",
        "This row minus the reference, paired by patient. It counts as a difference when its interval excludes 0, it "
        "is at least 0.01, and its p-value stays below 5 % after Holm's correction over the table.",
    ]  # fmt: skip


def _signed(one: Interval) -> str:
    return "–" if np.isnan(one.value) else f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def _group_records(comparison: SetComparison, reference: str) -> list[dict[str, Any]]:
    """Each group with its size and, where it has patients enough, the figures of the reference."""
    records = []
    groups = {"all": ["all"] * len(comparison.truth), **comparison.groups}
    for name, values in groups.items():
        own = np.array(["unknown" if value is None else str(value) for value in values], object)
        for group in sorted(set(own), key=lambda value: (value == "unknown", value)):
            rows = np.flatnonzero(own == group)
            patients = len(np.unique(comparison.patients[rows]))
            record: dict[str, Any] = {"field": name, "group": group, "visits": len(rows), "patients": patients}
            found = {}
            if patients >= FEWEST:
                found = comparison.part(rows).intervals(reference, COMPARED[comparison.setting])
            for metric in COMPARED[comparison.setting]:
                record |= _ends(metric, found.get(metric))
            records.append(dict(finite(record)))
    return records


def _group_lines(records: Sequence[Mapping[str, Any]], setting: str) -> list[str]:
    names = COMPARED[setting]
    titles = [HEADINGS[setting][name] for name in names]
    lines = [f"| Group | Visits | Patients | {' | '.join(titles)} |", f"|{'---|' * (3 + len(names))}"]
    for one in records:
        title = one["group"] if one["field"] == "all" else f"{one['field']}: {one['group']}"
        cells = [
            "–" if one[name] is None else f"{one[name]:.3f} ({one[f'{name}_low']:.3f} to {one[f'{name}_high']:.3f})"
            for name in names
        ]
        lines.append(f"| {' | '.join([title, str(one['visits']), str(one['patients']), *cells])} |")
    return [*lines, "", f"Groups of fewer than {FEWEST} patients have no figures."]


def _record(
    row: SetResult, headings: Mapping[str, str], comparison: SetComparison, counts: Mapping[str, int]
) -> dict[str, Any]:
    record: dict[str, Any] = {"model": row.model, **counts}
    for name in headings:
        record |= _ends(name, row.metrics.get(name))
    for name in COMPARED[comparison.setting]:
        record |= _ends(f"{name}_difference", row.differences.get(name))
        record[f"{name}_verdict"] = row.verdicts.get(name)
    return dict(finite(record))


def _ends(name: str, one: Interval | None) -> dict[str, float | None]:
    values = (None, None, None) if one is None else (one.value, one.low, one.high)
    return {name: values[0], f"{name}_low": values[1], f"{name}_high": values[2]}
