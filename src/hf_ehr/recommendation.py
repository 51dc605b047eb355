"""Metrics of medication recommendation: the drugs of a visit against those that a model proposes.

Papers print averages over visits (GAMENet, Shang et al. 2019; SafeDrug; MedM-PLM, Liu et al. 2022): these are the
``*_samples`` here, beside the micro and macro figures of :mod:`hf_ehr.multilabel`. A visit without drugs for which
none is proposed counts as 1 in Jaccard and F1; a visit for which a ranking is undefined takes no part in its average.
A rate of interactions is read beside that of the truth: a list without a pair of drugs is not a safer one, and has no
rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from hf_ehr._scores import Array
from hf_ehr.intervals import Interval, percentile_interval, resamples
from hf_ehr.multilabel import document_precision, label_scores, macro_scores, micro_scores
from hf_ehr.multilabel_intervals import figures_of
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.schema import EhrDataError

THRESHOLD = 0.3
"""MedM-PLM's; GAMENet and its successors have .5."""
OF_ALL_CELLS = ("auroc_micro", "average_precision_micro", "auroc_macro", "average_precision_macro", "f1_macro")
"""Figures that rank all cells at once: a pass over all cells for the data as they are, far more for each resample."""
_Parts = dict[str, tuple[Array, Array]]


def recommendation_metrics(
    y: ArrayLike,
    p: ArrayLike,
    *,
    threshold: ArrayLike = THRESHOLD,
    previous: ArrayLike | None = None,
    ddi: ArrayLike | None = None,
) -> dict[str, float]:
    """All figures of one set of recommendations.

    Args:
        y: Drugs of each visit, 0/1, ``(visits, drugs)``.
        p: Probabilities, ``(visits, drugs)``.
        threshold: A drug is proposed where ``p >= threshold``; one, or one a drug.
        previous: Drugs of the visit before each, 0/1, ``(visits, drugs)``; adds the figures on new drugs.
        ddi: Pairs of drugs that interact, ``(drugs, drugs)`` of :func:`ddi_matrix`; adds the rates of interactions.

    Returns:
        ``jaccard_samples``, ``f1_samples``, ``average_precision_samples`` (the papers' PR-AUC), ``auroc_samples`` and
        ``accuracy`` (cells on the same side of ½, MedM-PLM's) as means over visits; ``auroc``,
        ``average_precision`` and ``f1``, each ``_micro`` and ``_macro``, with ``labels_evaluated`` and
        ``labels_dropped`` (see :func:`hf_ehr.multilabel.macro_scores`); ``number_of_drugs`` proposed,
        ``number_of_drugs_truth`` and ``number_of_drugs_error``, the mean absolute difference; ``visits``. With
        ``ddi``: ``ddi_rate``, the share of all pairs proposed together that interact, and ``ddi_rate_truth``. With
        ``previous``: ``new_drug_jaccard``, of the drugs that the visit before had not, over the
        ``visits_with_new_drugs``; and ``new_drug_jaccard_micro``, over the pooled drugs of all visits, where a
        needless new drug always counts.

    Raises:
        ValueError: Shapes differ, something is not 0/1, a probability is not in [0, 1], or there is no visit.
    """
    predictions, parts = _parts(y, p, threshold, previous, ddi)
    scores = {name: _ratio(part.sum(), whole.sum()) for name, (part, whole) in parts.items()}
    scores |= micro_scores(predictions) | macro_scores(label_scores(predictions, threshold))
    for unwanted in ("positives", "f1_macro_caml"):
        scores.pop(unwanted)
    scores["visits"] = float(predictions.n_documents)
    if previous is not None:
        scores["visits_with_new_drugs"] = float(parts["new_drug_jaccard"][1].sum())
    return {name: float(value) for name, value in scores.items()}


def recommendation_intervals(
    y: ArrayLike,
    p: ArrayLike,
    patients: ArrayLike,
    *,
    threshold: ArrayLike = THRESHOLD,
    previous: ArrayLike | None = None,
    ddi: ArrayLike | None = None,
    rival: ArrayLike | None = None,
    rival_threshold: ArrayLike | None = None,
    metrics: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals over patients, or of differences to a rival on the same resampled patients.

    Args:
        y: As in :func:`recommendation_metrics`.
        p: As there.
        patients: Patient of each visit, ``(visits,)``.
        threshold: As there.
        previous: As there.
        ddi: As there.
        rival: Probabilities of another model for the same visits; the figures then are ``p`` minus ``rival``.
        rival_threshold: Of the rival; ``threshold`` when None.
        metrics: Figures to compute. By default all but ``auroc`` and ``average_precision``, micro and macro, and
            ``f1_macro``, which take long: name them.
        n_resamples: Number of resamples.
        seed: Of the resampling.
        level: Coverage.

    Raises:
        ValueError: As :func:`recommendation_metrics`, or a metric is not known.
    """
    members = np.unique(np.asarray(patients), return_inverse=True)[1]
    if members.shape != np.shape(y)[:1]:
        raise ValueError(f"`patients` must name one a visit ({np.shape(y)[0]}), got shape {np.shape(patients)}.")
    drawn = (weight for weight, _ in resamples(members, 1, n_resamples, seed))
    weights = np.stack([np.ones(len(members)), *drawn])
    models = [(p, threshold)]
    if rival is not None:
        models.append((rival, threshold if rival_threshold is None else rival_threshold))
    found = [weighted_metrics(y, scores, limit, previous, ddi, metrics, weights) for scores, limit in models]
    intervals = {}
    for name, values in found[0].items():
        figure = values if rival is None else values - found[1][name]
        intervals[name] = percentile_interval(float(figure[0]), figure[1:], level, difference=rival is not None)
    return intervals


def ddi_matrix(pairs: pa.Table | str | Path, drugs: Sequence[str]) -> Array:
    """Which drugs interact, from a table of pairs.

    Args:
        pairs: A table, or a Parquet or CSV file, whose first two columns name the two drugs of a pair as ``drugs`` do,
            in either order; other columns and other drugs are not read.
        drugs: Names of the labels, as in ``config.id2label``.

    Returns:
        ``(drugs, drugs)`` bool, symmetric.

    Raises:
        EhrDataError: The table has fewer than two columns of text, a drug interacts with itself, or no pair is one of
            ``drugs``: names of another vocabulary or another level would give a rate of 0.
    """
    table = pairs if isinstance(pairs, pa.Table) else _read(Path(pairs))
    if table.num_columns < 2 or any(not pa.types.is_string(column.type) for column in table.columns[:2]):
        raise EhrDataError(
            f"`pairs` must begin with two columns of drug names, got {table.schema.names[:3]}. Write codes as text."
        )
    places = {drug: number for number, drug in enumerate(drugs)}
    first, second = (np.array([places.get(name, -1) for name in column.to_pylist()]) for column in table.columns[:2])
    known = (first >= 0) & (second >= 0)
    if (first[known] == second[known]).any():
        raise EhrDataError("`pairs` must name two drugs a row, got a drug with itself. Remove such rows.")
    if not known.any():
        raise EhrDataError(
            f"`pairs` must hold a pair of the {len(drugs)} drugs that are predicted, got none in {len(known)} rows. "
            f"Name them as the labels are named, e.g. {drugs[0] if len(drugs) else 'ATC/C07A'}."
        )
    matrix = np.zeros((len(drugs), len(drugs)), bool)
    matrix[first[known], second[known]] = matrix[second[known], first[known]] = True
    return matrix


def _read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path)
    from pyarrow import csv

    names = csv.open_csv(path).schema.names
    return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())))


def _parts(
    y: ArrayLike, p: ArrayLike, threshold: ArrayLike, previous: ArrayLike | None, ddi: ArrayLike | None
) -> tuple[MultilabelPredictions, _Parts]:
    """What was predicted, and of each figure the two things of a visit whose sums over visits it is the ratio of."""
    predictions = MultilabelPredictions.of(p, y)
    if not predictions.n_documents:
        raise ValueError("`y` must hold a visit, got none. Patients with one visit are not asked about.")
    truth = predictions.targets().toarray().astype(bool)
    proposed = np.concatenate([flagged for _, flagged in predictions.flagged(threshold)])
    parts = _ranked(predictions) | _sets(truth, proposed)
    sides = (predictions.dense() >= 0.5) == truth
    parts["accuracy"] = sides.mean(axis=1), np.ones(len(truth))
    if ddi is not None:
        parts |= _interactions(truth, proposed, ddi)
    if previous is not None:
        parts |= _new_drugs(truth, proposed, previous)
    return predictions, parts


def _ranked(predictions: MultilabelPredictions) -> _Parts:
    """Average precision and AUROC of the ranking of the drugs of a visit."""
    cells, n, drugs = predictions.cells, predictions.n_documents, predictions.n_labels
    present = np.bincount(cells.documents, minlength=n).astype(float)
    # Drugs below each true one, half of those tied with it; pairs of two true ones then count 1 in either order.
    below = drugs - cells.through + (cells.through - cells.above - 1) / 2
    won = np.bincount(cells.documents, below, n) - present * (present - 1) / 2
    areas = np.full(n, np.nan)
    np.divide(won, present * (drugs - present), out=areas, where=(present > 0) & (present < drugs))
    precision = document_precision(cells, n)
    return {"average_precision_samples": _mean_of(precision), "auroc_samples": _mean_of(areas)}


def _sets(truth: Array, proposed: Array) -> _Parts:
    """Agreement of the sets, and their sizes."""
    hits, ours, theirs = (part.sum(axis=1).astype(float) for part in (truth & proposed, proposed, truth))
    ones, either = np.ones(len(truth)), ours + theirs - hits
    return {
        "jaccard_samples": (_or_one(hits, either), ones),
        "f1_samples": (_or_one(2 * hits, ours + theirs), ones),
        "f1_micro": (2 * hits, ours + theirs),
        "number_of_drugs": (ours, ones),
        "number_of_drugs_truth": (theirs, ones),
        "number_of_drugs_error": (np.abs(ours - theirs), ones),
    }


def _interactions(truth: Array, proposed: Array, ddi: ArrayLike) -> _Parts:
    """Pairs of drugs of a visit: those that interact, and all."""
    matrix = np.asarray(ddi).astype(float)
    drugs = truth.shape[1]
    if matrix.shape != (drugs, drugs) or (matrix != matrix.T).any() or matrix.diagonal().any():
        raise ValueError(
            f"`ddi` must be symmetric ({drugs}, {drugs}) with a diagonal of 0, got {matrix.shape}. Use `ddi_matrix`."
        )
    parts = {}
    for name, drugs_of in (("ddi_rate", proposed), ("ddi_rate_truth", truth)):
        sets = drugs_of.astype(float)
        size = sets.sum(axis=1)
        parts[name] = ((sets @ matrix) * sets).sum(axis=1) / 2, size * (size - 1) / 2
    return parts


def _new_drugs(truth: Array, proposed: Array, previous: ArrayLike) -> _Parts:
    """Drugs that the visit before had not."""
    before = np.asarray(previous)
    if before.shape != truth.shape or not np.isin(before, (0, 1)).all():
        raise ValueError(f"`previous` must be 0/1 of shape {truth.shape}, as `y`, got {before.shape}.")
    new, claimed = truth & (before == 0), proposed & (before == 0)
    hits, either = (new & claimed).sum(axis=1).astype(float), (new | claimed).sum(axis=1).astype(float)
    asked = new.any(axis=1).astype(float)
    return {"new_drug_jaccard": (_or_one(hits, either) * asked, asked), "new_drug_jaccard_micro": (hits, either)}


def weighted_metrics(
    y: ArrayLike,
    p: ArrayLike,
    threshold: ArrayLike,
    previous: ArrayLike | None,
    ddi: ArrayLike | None,
    metrics: Sequence[str] | None,
    weights: Array,
) -> dict[str, Array]:
    """Figures in which visits count as often as ``weights`` (resamples, visits) say."""
    predictions, parts = _parts(y, p, threshold, previous, ddi)
    wanted = list(parts) if metrics is None else list(metrics)
    unknown = [name for name in wanted if name not in parts and name not in OF_ALL_CELLS]
    if unknown:
        raise ValueError(f"`metrics` must be among {', '.join([*parts, *OF_ALL_CELLS])}, got {unknown}.")
    others = [name for name in wanted if name in OF_ALL_CELLS]
    found: dict[str, Any] = figures_of(predictions, threshold, weights, metrics=others) if others else {}
    for name in wanted:
        if name in parts:
            part, whole = parts[name]
            found[name] = _ratio(weights @ part, weights @ whole)
    return {name: found[name] for name in wanted}


def _mean_of(values: Array) -> tuple[Array, Array]:
    """The parts of a mean over the visits where ``values`` are defined."""
    return np.nan_to_num(values), (~np.isnan(values)).astype(float)


def _or_one(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.ones(len(whole)), where=whole > 0)


def _ratio(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


__all__ = ["THRESHOLD", "ddi_matrix", "recommendation_intervals", "recommendation_metrics"]
