"""Metrics of multi-label code assignment (ICD coding), all from one :class:`MultilabelPredictions`.

Names and definitions follow Mullenbach et al. (2018, CAML) and Edin et al. (2023), which differ in macro-F1: both are
here. Compact predictions give the ranking metrics up to a bound that is reported beside them as ``*_error_bound``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from hf_ehr._scores import Array, sigmoid
from hf_ehr.code_groups import BAND_EDGES, band_groups, category_of_each, chapter_groups, vocabulary_groups
from hf_ehr.multilabel_predictions import Cells, Confusion, MultilabelPredictions, ScoreCounts

KS = (5, 8, 15)
"""Cut-offs of P@k and R@k that papers print."""


def ranking_scores(counts: ScoreCounts) -> tuple[float, float]:
    """AUROC (a tie counts one half) and average precision; NaN where a class is absent."""
    hits, misses = np.cumsum(counts.positives), np.cumsum(counts.negatives)
    if not len(hits) or not hits[-1] or not misses[-1]:
        return float("nan"), float("nan")
    below = misses[-1] - misses + counts.negatives / 2
    area = counts.positives @ below / (float(hits[-1]) * float(misses[-1]))
    return float(area), float(counts.positives @ (hits / (hits + misses)) / hits[-1])


def ranking_error_bounds(counts: ScoreCounts) -> tuple[float, float]:
    """How far AUROC and average precision can move when tied cells are put in some order.

    AUROC: half of the tied pairs. Average precision: from all negatives of a tie first to all its positives first.
    """
    positives, negatives = counts.positives, counts.negatives
    hits, misses = np.cumsum(positives), np.cumsum(negatives)
    if not len(hits) or not hits[-1] or not misses[-1]:
        return float("nan"), float("nan")
    area = positives.astype(float) @ negatives / 2 / (float(hits[-1]) * float(misses[-1]))
    earlier = hits - positives
    best = hits / np.maximum(hits + misses - negatives, 1)
    worst = (earlier + 1) / (earlier + 1 + misses)
    return float(area), float(positives @ np.where(positives > 0, best - worst, 0) / hits[-1])


@dataclass(frozen=True, eq=False)
class LabelScores:
    """Figures of every label, ``(labels,)`` each; NaN where undefined.

    Attributes:
        positives: Documents that carry it.
        evaluated: It has positives and negatives.
        auroc: Area under its ROC curve.
        average_precision: Of its ranking of the documents.
        auroc_error_bound: What ties can do to the area.
        average_precision_error_bound: The same of the average precision.
        confusion: Counts at the thresholds, where some were given.
    """

    positives: Array
    evaluated: Array
    auroc: Array
    average_precision: Array
    auroc_error_bound: Array
    average_precision_error_bound: Array
    confusion: Confusion | None = None

    @property
    def f1(self) -> Array:
        """F1 of every label at its threshold; NaN for one without positives.

        Raises:
            ValueError: No thresholds were given.
        """
        if self.confusion is None:
            raise ValueError("`thresholds` must be given to `label_scores` for an F1, got None.")
        return _ratio(2 * self.confusion.hits, self.confusion.predicted + self.confusion.present, self.positives > 0)


def label_scores(predictions: MultilabelPredictions, thresholds: ArrayLike | None = None) -> LabelScores:
    """Figures of every label: for histograms (BERT-XML Fig. 2), tables of codes (Table 4) and groups of codes.

    Args:
        predictions: What was predicted.
        thresholds: One, or one a label.
    """
    rows = [
        (counts.positives.sum(), counts.negatives.sum(), *ranking_scores(counts), *ranking_error_bounds(counts))
        for counts in predictions.label_counts()
    ]
    positives, negatives, area, precision, area_bound, precision_bound = np.array(rows, dtype=np.float64).T
    return LabelScores(
        positives=positives.astype(np.int64),
        evaluated=(positives > 0) & (negatives > 0),
        auroc=area,
        average_precision=precision,
        auroc_error_bound=area_bound,
        average_precision_error_bound=precision_bound,
        confusion=None if thresholds is None else predictions.confusion(thresholds)[0],
    )


def macro_scores(scores: LabelScores, members: ArrayLike | None = None, *, bounds: bool = False) -> dict[str, float]:
    """Averages over labels, each counting the same.

    A label without positives or without negatives has no AUROC: it is left out and counted in ``labels_dropped``
    (scored as 0 it would lower the mean, as 1 raise it).

    Args:
        scores: Of :func:`label_scores`.
        members: Labels that take part, boolean ``(labels,)``; all by default.
        bounds: Add what ties can do to the two ranking metrics.

    Returns:
        ``auroc_macro``, ``average_precision_macro``, the counts of labels and of positives and, with thresholds,
        ``f1_macro`` (mean F1 of the labels that occur), ``f1_macro_caml`` (F1 of macro-precision and macro-recall over
        *all* members, as CAML and most papers after it print; 0/0 counts as 0) and ``f1_micro`` over the members.
    """
    chosen = np.ones(len(scores.positives), bool) if members is None else np.asarray(members, bool)
    kept = chosen & scores.evaluated
    averaged = ["auroc", "average_precision"]
    averaged += [f"{name}_error_bound" for name in averaged] if bounds else []
    result = {
        "labels_evaluated": float(kept.sum()),
        "labels_dropped": float(chosen.sum() - kept.sum()),
        "positives": float(scores.positives[chosen].sum()),
    }
    for name in averaged:
        short, _, rest = name.partition("_error")
        key = f"{short}_macro_error{rest}" if rest else f"{name}_macro"
        result[key] = _mean(getattr(scores, name)[kept])
    if scores.confusion is None:
        return result
    hits, predicted, present = (count[chosen] for count in scores.confusion)
    precision, recall = _mean(_ratio(hits, predicted, fill=0.0)), _mean(_ratio(hits, present, fill=0.0))
    return result | {
        "f1_micro": float(_ratio(2 * hits.sum(), predicted.sum() + present.sum())),
        "f1_macro": _mean(scores.f1[chosen & (scores.positives > 0)]),
        "f1_macro_caml": 2 * precision * recall / (precision + recall) if hits.any() else 0.0,
    }


def micro_scores(predictions: MultilabelPredictions) -> dict[str, float]:
    """AUROC and average precision over all cells pooled, with bounds where predictions are compact."""
    counts = predictions.pooled_counts()
    area, precision = ranking_scores(counts)
    result = {"auroc_micro": area, "average_precision_micro": precision}
    if predictions.compact:
        area, precision = ranking_error_bounds(counts)
        result |= {"auroc_micro_error_bound": area, "average_precision_micro_error_bound": precision}
    return result


def precision_at_k(cells: Cells, n_documents: int, k: ArrayLike) -> Array:
    """P@k of every document, ``(documents,)``: true codes among the ``k`` highest scores, divided by ``k``.

    Scores tied at the cut count as if put in random order, so that the order of the labels lends no score.

    Args:
        cells: Of the predictions.
        n_documents: Number of documents.
        k: One number, or one a document (the number of its codes gives R-precision).
    """
    cut = np.broadcast_to(k, n_documents)
    chance = np.clip((cut[cells.documents] - cells.above) / (cells.through - cells.above), 0, 1)
    return _ratio(np.bincount(cells.documents, chance, n_documents), cut)


def document_precision(cells: Cells, n_documents: int) -> Array:
    """Average precision of every document's ranking of the labels, ``(documents,)``; NaN without codes."""
    order = np.lexsort((cells.through, cells.documents))
    documents, through = cells.documents[order], cells.through[order]
    present = np.bincount(documents, minlength=n_documents)
    last = np.append((np.diff(documents) != 0) | (np.diff(through) != 0), True)[: len(documents)]
    place = np.flatnonzero(last)[np.cumsum(last) - last]  # the last cell of the same document and score
    hits = place + 1 - (np.cumsum(present) - present)[documents]
    return _ratio(np.bincount(documents, hits / through, n_documents), present)


def document_scores(predictions: MultilabelPredictions, *, ks: Sequence[int] = KS) -> dict[str, float]:
    """Means over documents of what ranks the labels within one.

    Returns:
        ``precision_at_k`` over all documents (one without codes scores 0), ``recall_at_k``, ``r_precision`` and
        ``map`` over those with codes, and ``documents_without_codes``.

    Raises:
        ValueError: A ``k`` is below 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"`ks` must be at least 1, got {list(ks)}.")
    cells, n = predictions.cells, predictions.n_documents
    present = np.bincount(cells.documents, minlength=n)
    coded = present > 0
    result = {"documents": float(n), "documents_without_codes": float(n - coded.sum())}
    for k in ks:
        precision = precision_at_k(cells, n, k)
        result[f"precision_at_{k}"] = _mean(precision)
        result[f"recall_at_{k}"] = _mean(k * precision[coded] / present[coded])
    result["r_precision"] = _mean(precision_at_k(cells, n, present)[coded])
    result["map"] = _mean(document_precision(cells, n)[coded])
    return result


def assignment_scores(documents: Confusion) -> dict[str, float]:
    """Means over documents at a threshold: ``exact_match``, ``f1_samples`` and ``jaccard_samples``.

    Nothing predicted where nothing is true counts as 1.

    Args:
        documents: The second part of :meth:`MultilabelPredictions.confusion`.
    """
    hits, both = documents.hits, documents.predicted + documents.present
    return {
        "exact_match": _mean(2 * hits == both),
        "f1_samples": _mean(_ratio(2 * hits, both, fill=1.0)),
        "jaccard_samples": _mean(_ratio(hits, both - hits, fill=1.0)),
    }


def hierarchical_scores(
    predictions: MultilabelPredictions, ancestors: Sequence[Sequence[str]], threshold: ArrayLike
) -> dict[str, float]:
    """Agreement above the leaves: a wrong sibling is a smaller error than a wrong chapter.

    ``*_counts`` compares how many codes fall below each ancestor (CoPHE, Falis et al. 2021: TP = min, FP and FN the
    surplus of either side), ``*_sets`` only whether any does. Micro over the ancestors of all documents.

    Args:
        predictions: What was predicted.
        ancestors: What lies above each label, e.g. its three-character category; empty for a label that is left out.
        threshold: One, or one a label.

    Raises:
        ValueError: There is not one list a label.
    """
    if len(ancestors) != predictions.n_labels:
        raise ValueError(f"`ancestors` must hold one list a label ({predictions.n_labels}), got {len(ancestors)}.")
    climb, targets = _membership(ancestors), predictions.targets()
    totals = np.zeros((2, 3))
    for rows, flagged in predictions.flagged(threshold):
        predicted, present = sparse.csr_array(flagged.astype(np.int64)) @ climb, targets[rows] @ climb
        totals[0] += predicted.minimum(present).sum(), predicted.sum(), present.sum()
        totals[1] += (predicted > 0).multiply(present > 0).sum(), predicted.nnz, present.nnz
    result = {}
    for kind, (hits, claimed, true) in zip(("counts", "sets"), totals, strict=True):
        result[f"precision_{kind}"] = float(_ratio(hits, claimed))
        result[f"recall_{kind}"] = float(_ratio(hits, true))
        result[f"f1_{kind}"] = float(_ratio(2 * hits, claimed + true))
    return result


def category_scores(
    predictions: MultilabelPredictions, codes: Sequence[str], threshold: ArrayLike
) -> dict[str, float]:
    """:func:`hierarchical_scores` on three-character categories, as ``category_*``; nothing where no code has one."""
    above = category_of_each(codes)
    found = hierarchical_scores(predictions, above, threshold) if any(above) else {}
    return {f"category_{name}": value for name, value in found.items()}


def multilabel_scores(
    predictions: MultilabelPredictions,
    *,
    thresholds: ArrayLike | None = None,
    ks: Sequence[int] = KS,
    codes: Sequence[str] | None = None,
    train_counts: ArrayLike | None = None,
    band_edges: Sequence[int] = BAND_EDGES,
) -> dict[str, float]:
    """Every figure of a table of ICD coding, flat: micro, macro, within documents and, with thresholds, F1.

    Args:
        predictions: What was predicted.
        thresholds: One, or one a label, tuned on validation (:mod:`hf_ehr.code_thresholds`).
        ks: Cut-offs of precision and recall.
        codes: Codes of the labels, ``ICD10CM/E11.9``: adds the figures of :func:`macro_scores` for each chapter and
            vocabulary, and :func:`category_scores` with thresholds.
        train_counts: Training documents of each label, ``(labels,)``: adds them for each band.
        band_edges: Upper ends of the bands.

    Returns:
        Figures by name; those of a group as ``auroc_macro (≤10 training notes)``.

    Raises:
        ValueError: There are no documents, or there is not one code or count a label.
    """
    if not predictions.n_documents:
        raise ValueError("`predictions` must hold a document, got none. Call `add` with a batch first.")
    groups: dict[str, Array] = {}
    for name, values in (("codes", codes), ("train_counts", train_counts)):
        if values is not None and len(np.asarray(values)) != predictions.n_labels:
            raise ValueError(
                f"`{name}` must name one a label ({predictions.n_labels}), got {len(np.asarray(values))}."
            )
    if train_counts is not None:
        groups |= band_groups(train_counts, band_edges)
    if codes is not None:
        groups |= chapter_groups(codes) | vocabulary_groups(codes)
    labels = label_scores(predictions, thresholds)
    result = micro_scores(predictions) | macro_scores(labels, bounds=predictions.compact)
    result |= document_scores(predictions, ks=ks)
    for group, members in groups.items():
        result |= {f"{name} ({group})": value for name, value in macro_scores(labels, members).items()}
    if thresholds is None:
        return result
    found = {} if codes is None else category_scores(predictions, codes, thresholds)
    return result | assignment_scores(predictions.confusion(thresholds)[1]) | found


def trainer_code_metrics(
    n_labels: int, *, threshold: ArrayLike = 0.5, compact: bool = False, figures: Sequence[str] | None = None
) -> Callable[..., dict[str, float]]:
    """``compute_metrics`` for a ``Trainer`` with ``batch_eval_metrics=True``, which then never holds all logits.

    Args:
        n_labels: Labels of the model.
        threshold: For F1 during training; one, or one a label.
        compact: As in :class:`MultilabelPredictions`.
        figures: Names of :func:`multilabel_scores` to log; all by default.
    """
    held = MultilabelPredictions(n_labels, compact=compact)

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        nonlocal held
        outputs = prediction.predictions
        logits = _as_numpy(outputs[0] if isinstance(outputs, tuple) else outputs)
        held.add(sigmoid(logits).astype(np.float32), _as_numpy(prediction.label_ids))
        if not compute_result:
            return {}
        scored, held = held, MultilabelPredictions(n_labels, compact=compact)
        scores = multilabel_scores(scored, thresholds=threshold)
        return scores if figures is None else {name: scores[name] for name in figures}

    return compute_metrics


def _as_numpy(values: Any) -> Array:
    """Arrays as they are, tensors of any precision and device as float32."""
    return values.detach().float().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _membership(ancestors: Sequence[Sequence[str]]) -> sparse.csr_array:
    """0/1, ``(labels, ancestors)``."""
    names = {name: place for place, name in enumerate(dict.fromkeys(name for above in ancestors for name in above))}
    columns = [names[name] for above in ancestors for name in dict.fromkeys(above)]
    ends = np.cumsum([0, *(len(dict.fromkeys(above)) for above in ancestors)])
    return sparse.csr_array((np.ones(len(columns), np.int64), columns, ends), shape=(len(ancestors), len(names)))


def _ratio(part: Any, whole: Any, defined: Any = True, *, fill: float = float("nan")) -> Array:
    """``part / whole``, and ``fill`` where ``whole`` is 0 or the ratio is not ``defined``."""
    whole = np.asarray(whole, dtype=np.float64)
    usable = (whole != 0) & defined
    return np.divide(part, whole, out=np.full(whole.shape, fill), where=usable)


def _mean(values: Array) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
