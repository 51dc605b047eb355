"""The tables of code assignment: rows on one test set, with intervals, by frequency and chapter, and what is decided.

Every row brings its scores on validation and on test notes, one set a seed. Thresholds are tuned here, on validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse

from hf_ehr._scores import Array
from hf_ehr.code_groups import BAND_EDGES, band_groups, chapter_groups
from hf_ehr.code_thresholds import routing_scores, tune_auto_code, tune_thresholds
from hf_ehr.intervals import Interval, holm, verdict
from hf_ehr.models.code_decisions import DECISIONS
from hf_ehr.multilabel import (
    assignment_scores,
    category_scores,
    document_scores,
    label_scores,
    macro_scores,
    micro_scores,
)
from hf_ehr.multilabel_intervals import figures_of, multilabel_intervals
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.reports import FEW_POSITIVES

HEADINGS = {
    "auroc_micro": "AUROC micro",
    "auroc_macro": "AUROC macro",
    "average_precision_micro": "AP micro",
    "average_precision_macro": "AP macro",
    "f1_micro": "F1 micro",
    "f1_macro": "F1 macro",
    "map": "MAP",
    "map_all_codes": "MAP, all codes",
    "precision_at_5": "P@5",
    "precision_at_8": "P@8",
    "recall_all_codes": "Recall, all codes",
    "f1_all_codes": "F1, all codes",
}
AUTO_CODE_PRECISION = 0.9
"""Precision on validation notes from which on a code is assigned without review."""
COLLAPSED = 1e-4
"""Scores that differ by less over notes, or over codes, say nothing."""
DEFINITIONS = (
    "Brackets: 95 % bootstrap intervals over test patients with all their notes, crossed with seeds where there are "
    "several. F1 is taken at one threshold a row and seed, tuned on validation for micro-F1; macro AUROC and AP are "
    "means over the codes that have positives and negatives in the test notes, macro F1 over those that have "
    "positives. A resample has fewer such codes, and repeats their notes: where most codes are on one or two test "
    "notes, macro intervals may lie beside the figure, and only the paired Δ is to be trusted. Δ is paired by "
    "patient and seed; it counts as a difference when its interval excludes 0, it is at least 0.01, and its p-value "
    "stays below 5 % after Holm's correction over all comparisons of the table."
)


@dataclass(frozen=True, eq=False)
class CodingTest:
    """What all rows of a table are scored on.

    Attributes:
        name: Of the data set.
        codes: Labels in the order of the scores.
        descriptions: Of the codes, None where there is none.
        train_counts: Training notes of each label, ``(labels,)``.
        patients: Patient of each test note, ``(notes,)``.
        out_of_scope: True codes of each test note that are no label, ``(notes,)``.
        band_edges: As in :func:`hf_ehr.code_groups.band_groups`.
        groups: Further groups of labels, name → boolean ``(labels,)``.
        notes: What a reader must know about the data.
        imputed: Which true codes were carried over from other notes, 0/1 ``(notes, labels)``; None: none were.
    """

    name: str
    codes: Sequence[str]
    descriptions: Sequence[str | None]
    train_counts: Array
    patients: Array
    out_of_scope: Array
    band_edges: Sequence[int] = BAND_EDGES
    groups: Mapping[str, Array] = field(default_factory=dict)
    notes: Sequence[str] = ()
    imputed: sparse.csr_array | None = None

    def bands(self) -> dict[str, Array]:
        """Labels of each band of training notes, from rare to frequent; empty bands are left out."""
        return band_groups(self.train_counts, self.band_edges)

    def chapters(self) -> dict[str, Array]:
        """Labels of each chapter, in the order of the codes' names."""
        return chapter_groups(self.codes)

    def all_groups(self) -> dict[str, Array]:
        """Bands, chapters and the further ones."""
        return self.bands() | self.chapters() | dict(self.groups)


@dataclass(frozen=True, eq=False)
class CodedRow:
    """Scores of one row.

    Attributes:
        name: As it appears in the table.
        validation: Of the validation notes, one a seed.
        test: Of the test notes, one a seed.
        seconds: Of fitting and scoring, mean over the seeds.
        epochs: Epochs to 90 % of the best validation figure, one a seed; empty where nothing is trained in epochs.
        trained: Whether a run of it can collapse: what is the same for every note by design has not.
    """

    name: str
    validation: Sequence[MultilabelPredictions]
    test: Sequence[MultilabelPredictions]
    seconds: float = math.nan
    epochs: Sequence[int] = ()
    trained: bool = True

    def thresholds(self) -> list[float]:
        """The threshold of each seed, with the best micro-F1 on validation."""
        return [tune_thresholds(draw).common for draw in self.validation]


@dataclass(frozen=True, eq=False)
class CodingResult:
    """All figures of one row on one data set.

    Attributes:
        data: Name of the data set.
        row: Name of the row.
        draws: Seeds.
        figures: Metric → figure with its interval, averaged over the seeds.
        sd: Metric → standard deviation over the seeds, NaN for one seed.
        points: Figures without an interval: CAML's macro-F1, labels dropped, agreement on categories, and more.
        routing: Decision → codes of an average note, precision, share of the true codes.
        auroc: Of each label, mean over the seeds, ``(labels,)``.
        average_precision: Likewise.
        positives: Test notes of each label.
        collapsed: Seeds of a trained row whose scores do not depend on the note or on the code, or that assign nearly
            everything.
        epochs: As in :class:`CodedRow`.
        seconds: As in :class:`CodedRow`.
    """

    data: str
    row: str
    draws: int
    figures: dict[str, Interval]
    sd: dict[str, float]
    points: dict[str, float]
    routing: dict[str, dict[str, float]]
    auroc: Array
    average_precision: Array
    positives: Array
    collapsed: int
    epochs: Sequence[int]
    seconds: float


@dataclass(frozen=True)
class CodingDifference:
    """One comparison of two rows by one metric."""

    data: str
    row: str
    reference: str
    metric: str
    difference: Interval
    positives: int
    p_adjusted: float = math.nan
    verdict: str = ""


def score_row(test: CodingTest, row: CodedRow, *, n_resamples: int = 1000, seed: int = 0) -> CodingResult:
    """Scores one row.

    Args:
        test: What it is scored on.
        row: Its scores.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: Scores and notes or labels differ in number, or validation holds no true code to tune on.
    """
    if row.test[0].n_documents != len(test.patients) or row.test[0].n_labels != len(test.codes):
        shape = (row.test[0].n_documents, row.test[0].n_labels)
        raise ValueError(f"`row.test` must be ({len(test.patients)}, {len(test.codes)}) scores, got {shape}.")
    limits, groups, names = row.thresholds(), test.all_groups(), _metrics(test)
    names += [f"auroc_macro ({name})" for name in groups]
    shared: dict[str, Any] = {"metrics": names, "groups": groups, "out_of_scope": test.out_of_scope}
    options = shared | {"documents": test.patients, "n_resamples": n_resamples, "seed": seed}
    every = np.ones((1, len(test.patients)))
    alone = [figures_of(one, limit, every, **shared) for one, limit in zip(row.test, limits, strict=True)]
    labels = [label_scores(one, limit) for one, limit in zip(row.test, limits, strict=True)]
    areas, precisions = (np.stack([getattr(one, name) for one in labels]) for name in ("auroc", "average_precision"))
    points = [_points(test, *draw) for draw in zip(row.test, limits, labels, strict=True)]
    routed = [_routing(*draw) for draw in zip(row.validation, row.test, limits, strict=True)]
    return CodingResult(
        data=test.name, row=row.name, draws=len(row.test),
        figures=multilabel_intervals(list(row.test), threshold=limits, **options),
        sd={name: _sd([float(one[name][0]) for one in alone]) for name in names},
        points=_average(points),
        routing={decision: _average([one[decision] for one in routed]) for decision in DECISIONS},
        auroc=areas.mean(axis=0), average_precision=precisions.mean(axis=0), positives=labels[0].positives,
        collapsed=sum(row.trained and is_collapsed(*draw) for draw in zip(row.test, limits, strict=True)),
        epochs=row.epochs, seconds=row.seconds,
    )  # fmt: skip


def compare_rows(
    test: CodingTest,
    row: CodedRow,
    reference: CodedRow,
    metrics: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[CodingDifference]:
    """``row`` minus ``reference`` by each metric, paired by patient and seed; p-values are not adjusted yet.

    Args:
        test: What both were scored on.
        row: Scores of the one.
        reference: Scores of the other, of as many seeds, or of one.
        metrics: Names of ``HEADINGS``, or ``auroc_macro (group)``; of a group that no label is in, none is returned.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    groups = test.all_groups()
    known = {*HEADINGS, *(f"auroc_macro ({name})" for name in groups)}
    found = multilabel_intervals(
        list(row.test), threshold=row.thresholds(), rival=list(reference.test),
        rival_threshold=reference.thresholds(), documents=test.patients, groups=groups,
        metrics=[name for name in metrics if name in known], out_of_scope=test.out_of_scope,
        n_resamples=n_resamples, seed=seed,
    )  # fmt: skip
    positives = len(row.test[0].cells.labels)
    return [
        CodingDifference(test.name, row.name, reference.name, name, interval, positives)
        for name, interval in found.items()
    ]


def adjusted(differences: Sequence[CodingDifference]) -> list[CodingDifference]:
    """The differences of a whole table with p-values adjusted for all of them (Holm), and what they show."""
    p_values = holm([one.difference.p_value for one in differences])
    return [
        CodingDifference(
            one.data, one.row, one.reference, one.metric, one.difference, one.positives, p,
            verdict(one.difference, p_adjusted=p) if one.positives >= FEW_POSITIVES
            else f"nothing concluded (fewer than {FEW_POSITIVES} true codes in the test notes)",
        )
        for one, p in zip(differences, p_values, strict=True)
    ]  # fmt: skip


def provenance_scores(test: CodingTest, predictions: MultilabelPredictions, threshold: float) -> dict[str, float]:
    """Codes that were coded for a note, and those carried over from other notes, apart (L10).

    Returns:
        Of either kind ``codes_``, ``recall_`` at the threshold, and ``average_precision_micro_``, for which the true
        codes of the other kind are left out; nothing where no code of the test notes was carried over.
    """
    if test.imputed is None or not test.imputed.nnz:
        return {}
    scores, true, carried = predictions.dense(), predictions.targets().toarray() > 0, test.imputed.toarray() > 0
    found = {}
    for name, kind, other in (
        ("native", true & ~carried, true & carried),
        ("imputed", true & carried, true & ~carried),
    ):
        kept = MultilabelPredictions(1)
        kept.add(scores[~other][:, None], kind[~other][:, None])
        found[f"codes_{name}"] = float(kind.sum())
        found[f"recall_{name}"] = float(np.mean(scores[kind] >= threshold)) if kind.any() else math.nan
        found[f"average_precision_micro_{name}"] = micro_scores(kept)["average_precision_micro"]
    return found


def is_collapsed(predictions: MultilabelPredictions, threshold: float) -> bool:
    """Whether scores do not depend on the note, or not on the code, or nearly all codes are assigned to all notes."""
    scores = predictions.dense().astype(np.float64)
    flat = min(float(np.ptp(scores, axis=axis).max()) for axis in (0, 1))
    return flat < COLLAPSED or float((scores >= threshold).mean()) > 0.99


def _metrics(test: CodingTest) -> list[str]:
    hidden = () if np.any(test.out_of_scope) else ("map_all_codes", "recall_all_codes", "f1_all_codes")
    return [name for name in HEADINGS if name not in hidden]


def _points(test: CodingTest, predictions: MultilabelPredictions, threshold: float, labels: Any) -> dict[str, float]:
    """Figures without an interval."""
    macro = macro_scores(labels)
    points = {name: macro[name] for name in ("f1_macro_caml", "labels_evaluated", "labels_dropped")}
    points |= provenance_scores(test, predictions, threshold)
    of_documents = predictions.confusion(threshold)[1]
    points |= document_scores(predictions, ks=(5, 8, 15)) | assignment_scores(of_documents)
    points |= category_scores(predictions, test.codes, threshold)
    return {"threshold": threshold} | {name: value for name, value in points.items() if name not in HEADINGS}


def _routing(validation: MultilabelPredictions, test: MultilabelPredictions, review: float) -> dict:
    auto = tune_auto_code(validation, review, precision=AUTO_CODE_PRECISION)
    return routing_scores(test, review=review, auto_code=auto)


def _average(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([record[name] for record in records])) for name in records[0]}


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
