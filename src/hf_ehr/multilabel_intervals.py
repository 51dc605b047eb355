"""Bootstrap intervals over documents for the figures of ``multilabel.py``, and for paired differences of two models.

A resample is a vector of document weights, as in ``intervals.py``. Every figure is computed for all resamples at once,
by matrix products of true codes × documents with documents × resamples; nothing is sorted again. Meant for sets of
some hundred or thousand documents: larger ones have narrow intervals, and this holds all scores at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from hf_ehr._scores import Array
from hf_ehr.intervals import Interval, percentile_interval, resamples
from hf_ehr.multilabel import KS, document_precision, precision_at_k
from hf_ehr.multilabel_predictions import MultilabelPredictions

Draws = MultilabelPredictions | Sequence[MultilabelPredictions]
"""One set of predictions, or one a seed."""
CHUNK = 8_000_000
"""Elements of a matrix that is held at a time."""


def multilabel_intervals(
    predictions: Draws,
    *,
    threshold: Any = None,
    rival: Draws | None = None,
    rival_threshold: Any = None,
    documents: ArrayLike | None = None,
    ks: Sequence[int] = KS,
    metrics: Sequence[str] | None = None,
    groups: Mapping[str, ArrayLike] | None = None,
    out_of_scope: ArrayLike | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile intervals of the figures of :func:`hf_ehr.multilabel.multilabel_scores`, or of differences.

    Of several draws (seeds) the figures are averaged, and draws are resampled beside the documents, as in
    :func:`hf_ehr.intervals.crossed_bootstrap`.

    Args:
        predictions: What was predicted: of one model, or of its draws, all on the same documents.
        threshold: One, or one a label; adds F1 and exact match. With draws: a list of one such threshold a draw.
        rival: Another model on the same documents and labels, in the same order; every figure then is
            ``predictions`` minus ``rival``, both scored on the same resampled documents and draws. As many draws, or
            one, which stands in all of them.
        rival_threshold: Of the rival; must be given where ``threshold`` is.
        documents: Cluster of each document (its patient), ``(documents,)``; each is its own by default.
        ks: Cut-offs of P@k.
        metrics: Figures to compute; all by default.
        groups: Name → labels, boolean ``(labels,)``: adds ``auroc_macro (name)`` over these labels alone.
        out_of_scope: True codes of each document that are no label, ``(documents,)``: adds ``map_all_codes`` and, with
            ``threshold``, ``recall_all_codes`` and ``f1_all_codes``, in which each of them counts as missed: never
            ranked, and never assigned.
        n_resamples: Number of resamples.
        seed: Of the resampling.
        level: Coverage.

    Raises:
        ValueError: There are no documents, the draws or the rival were scored on others, numbers of draws do not fit,
            a threshold is missing, or a metric is not known.
    """
    ours = _draws(predictions)
    if not ours or not ours[0].n_documents:
        raise ValueError("`predictions` must hold a document, got none. Call `add` with a batch first.")
    models = [(ours, _thresholds(threshold, predictions))]
    if rival is not None:
        if (threshold is None) != (rival_threshold is None):
            raise ValueError("`threshold` and `rival_threshold` must be given together.")
        models.append((_draws(rival), _thresholds(rival_threshold, rival)))
    counts = [len(draws) for draws, _ in models]
    n_draws, n = max(counts), ours[0].n_documents
    if not set(counts) <= {1, n_draws}:
        raise ValueError(f"`predictions` and `rival` must have as many draws, or one, got {counts}.")
    _check_same(ours[0], [one for draws, _ in models for one in draws])
    members = np.arange(n) if documents is None else np.unique(np.asarray(documents), return_inverse=True)[1]
    weights, drawn = zip(*resamples(members, n_draws, n_resamples, seed), strict=True)
    every = np.stack([np.ones(n), *weights])  # the documents as they are come first
    options = (tuple(ks), metrics, groups or {}, out_of_scope)
    figures = [
        [figures_of(one, limit, every, *options) for one, limit in zip(draws, limits, strict=True)]
        for draws, limits in models
    ]
    shares = np.stack([np.ones(n_draws), *drawn]).T / n_draws
    return {name: _interval(name, figures, shares, level) for name in figures[0][0]}


def figures_of(
    predictions: MultilabelPredictions,
    threshold: ArrayLike | None,
    weights: Array,
    ks: Sequence[int] = KS,
    metrics: Sequence[str] | None = None,
    groups: Mapping[str, ArrayLike] | None = None,
    out_of_scope: ArrayLike | None = None,
) -> dict[str, Array]:
    """Figures in which documents count as often as ``weights`` say.

    Args:
        predictions: Of one draw.
        threshold: As in :func:`multilabel_intervals`, of this draw; as the rest.
        weights: ``(resamples, documents)``.
        ks: Cut-offs.
        metrics: Figures to compute.
        groups: Groups of labels.
        out_of_scope: Codes that are no label.

    Returns:
        Name → ``(resamples,)``, NaN where undefined.

    Raises:
        ValueError: A metric is not known.
    """
    by_label = ["auroc_macro", *(f"auroc_macro ({name})" for name in groups or {}), "average_precision_macro"]
    parts: list[tuple[list[str], Callable[[], dict[str, Array]]]] = [
        (["auroc_micro", "average_precision_micro"], lambda: _micro(predictions, weights)),
        (by_label, lambda: _macro(predictions, weights, groups or {})),
        ([*(f"precision_at_{k}" for k in ks), "r_precision", "map"], lambda: _ranked(predictions, weights, ks)),
    ]
    if out_of_scope is not None:
        parts.append((["map_all_codes"], lambda: {"map_all_codes": _map_all(predictions, weights, out_of_scope)}))
    if threshold is not None:
        names = ["f1_micro", "f1_macro", "exact_match"]
        names += [] if out_of_scope is None else ["recall_all_codes", "f1_all_codes"]
        parts.append((names, lambda: _at(predictions, threshold, weights, out_of_scope)))
    known = [name for names, _ in parts for name in names]
    wanted = known if metrics is None else list(metrics)
    if set(wanted) - set(known):
        raise ValueError(f"`metrics` must be among {', '.join(known)}, got {sorted(set(wanted) - set(known))}.")
    found = {name: v for names, part in parts if set(names) & set(wanted) for name, v in part().items()}
    return {name: found[name] for name in wanted}


def _draws(predictions: Draws) -> list[MultilabelPredictions]:
    return [predictions] if isinstance(predictions, MultilabelPredictions) else list(predictions)


def _thresholds(threshold: Any, predictions: Draws) -> list[Any]:
    """One a draw."""
    count = len(_draws(predictions))
    if threshold is None or isinstance(predictions, MultilabelPredictions):
        return [threshold] * count
    if np.ndim(threshold) == 0 or len(threshold) != count:
        raise ValueError(f"`threshold` must be a list of one threshold for each of the {count} draws.")
    return list(threshold)


def _check_same(first: MultilabelPredictions, others: Sequence[MultilabelPredictions]) -> None:
    targets = first.targets()
    for other in others:
        if other is not first and (
            (other.n_documents, other.n_labels) != targets.shape or (other.targets() != targets).nnz
        ):
            raise ValueError("`rival` and all draws must hold the same documents with the same codes in one order.")


def _interval(name: str, models: list[list[dict[str, Array]]], shares: Array, level: float) -> Interval:
    """The figure over the draws in each resample, the first of which is the data; ``shares`` (draws, resamples)."""
    averages = []
    for draws in models:
        values = np.broadcast_to(np.stack([figures[name] for figures in draws]), shares.shape)
        averages.append(np.where(shares > 0, shares * values, 0).sum(axis=0))
    figure = averages[0] - averages[1] if len(averages) == 2 else averages[0]
    return percentile_interval(float(figure[0]), figure[1:], level, difference=len(averages) == 2)


def _mean(values: Array, weights: Array) -> Array:
    """Over the documents where ``values`` (documents,) is defined."""
    defined = ~np.isnan(values)
    return _ratio(weights @ np.nan_to_num(values), weights @ defined)


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _ranked(predictions: MultilabelPredictions, weights: Array, ks: Sequence[int]) -> dict[str, Array]:
    """Means of what ranks the labels within a document."""
    cells, n = predictions.cells, predictions.n_documents
    present = np.bincount(cells.documents, minlength=n)
    figures = {f"precision_at_{k}": _mean(precision_at_k(cells, n, k), weights) for k in ks}
    figures["r_precision"] = _mean(precision_at_k(cells, n, present), weights)
    return figures | {"map": _mean(document_precision(cells, n), weights)}


def _map_all(predictions: MultilabelPredictions, weights: Array, out_of_scope: ArrayLike) -> Array:
    """MAP over all codes of a document: one that is no label is never found, and adds 0 to the sum."""
    cells, n = predictions.cells, predictions.n_documents
    present = np.bincount(cells.documents, minlength=n)
    found = np.nan_to_num(document_precision(cells, n)) * present
    return _mean(_ratio(found, present + np.asarray(out_of_scope)), weights)


def _chunks(cells: int, weights: Array) -> Iterator[slice]:
    """Stretches of true codes whose matrices are small."""
    step = max(1, CHUNK // max(weights.shape))
    return (slice(start, start + step) for start in range(0, cells, step))


def _micro(predictions: MultilabelPredictions, weights: Array) -> dict[str, Array]:
    """Of all cells pooled: each true code against the cells of each document."""
    documents, labels, *_ = predictions.cells
    scores, single = predictions.dense(), weights.T.astype(np.float32)
    own, everything = scores[documents, labels], np.sort(scores, axis=1)
    true = [np.sort(part) for part in np.split(own, np.searchsorted(documents, np.arange(1, len(scores))))]
    area = precision = np.zeros(len(weights))
    for rows in _chunks(len(own), weights):
        below, through = (_places(everything, own[rows], side) for side in ("left", "right"))
        true_above = _places(true, own[rows], "left")
        mine = weights.T[documents[rows]]
        area = area + (mine * ((below + through) / 2 @ single)).sum(axis=0)
        at_least = (predictions.n_labels - below) @ single
        true_at_least = (np.array([len(part) for part in true], np.float32) - true_above) @ single
        precision = precision + (mine * true_at_least / np.maximum(at_least, 1)).sum(axis=0)
    positive = weights @ np.bincount(documents, minlength=len(scores))
    negative = weights.sum(axis=1) * predictions.n_labels - positive
    # Pairs of true codes, and of each with itself, are half of positive² whatever their order.
    auroc = _ratio(area - positive**2 / 2, positive * negative)
    return {
        "auroc_micro": auroc,
        "average_precision_micro": np.where(negative > 0, _ratio(precision, positive), np.nan),
    }


def _places(ordered: Any, values: Array, side: Any) -> Array:
    """How many scores of each document lie below ``values``, from the right: are no higher; (values, documents)."""
    return np.stack([np.searchsorted(part, values, side) for part in ordered], axis=1).astype(np.float32)


def _macro(predictions: MultilabelPredictions, weights: Array, groups: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Means over the labels that have positives and negatives in the resample: a true code against all documents."""
    documents, labels, *_ = predictions.cells
    targets, columns, single = predictions.targets(), predictions.dense().T.copy(), weights.T.astype(np.float32)
    carries = targets.toarray().T.astype(bool)
    shape = (predictions.n_labels, len(weights))
    areas, precisions = np.zeros(shape), np.zeros(shape)
    for rows in _chunks(len(labels), weights):
        own, of_label = columns[labels[rows], documents[rows]][:, None], columns[labels[rows]]
        at_least = of_label >= own
        below = (~at_least + 0.5 * (of_label == own)).astype(np.float32) @ single
        true = (at_least & carries[labels[rows]]).astype(np.float32) @ single
        mine = weights.T[documents[rows]]
        count = len(mine)
        to_label = sparse.csr_array((np.ones(count), (labels[rows], np.arange(count))), (shape[0], count))
        areas += to_label @ (mine * below)
        precisions += to_label @ (mine * true / np.maximum(at_least.astype(np.float32) @ single, 1))
    positive = targets.T @ weights.T
    negative = weights.sum(axis=1) - positive
    kept = (positive > 0) & (negative > 0)
    area, precision = _ratio(areas - positive**2 / 2, positive * negative), _ratio(precisions, positive)

    def mean(values: Array, members: Any = slice(None)) -> Array:
        return _ratio(np.where(kept, values, 0)[members].sum(axis=0), kept[members].sum(axis=0))

    grouped = {f"auroc_macro ({name})": mean(area, np.asarray(members, bool)) for name, members in groups.items()}
    return {"auroc_macro": mean(area), **grouped, "average_precision_macro": mean(precision)}


def _at(
    predictions: MultilabelPredictions, threshold: ArrayLike, weights: Array, out_of_scope: ArrayLike | None
) -> dict[str, Array]:
    """F1 and exact match at a threshold."""
    targets = predictions.targets()
    flagged = sparse.vstack([sparse.csr_array(part.astype(np.int64)) for _, part in predictions.flagged(threshold)])
    hits, both = (matrix.T @ weights.T for matrix in (targets.multiply(flagged).tocsr(), targets + flagged))
    occurs = targets.T @ weights.T > 0
    f1 = np.where(occurs, _ratio(2 * hits, both), 0)
    of_documents = predictions.confusion(threshold)[1]
    found, claimed, present = (weights @ count for count in of_documents)
    exact = 2 * of_documents.hits == of_documents.predicted + of_documents.present
    figures = {
        "f1_micro": _ratio(2 * found, claimed + present),
        "f1_macro": _ratio(f1.sum(axis=0), occurs.sum(axis=0)),
        "exact_match": _mean(exact.astype(float), weights),
    }
    if out_of_scope is None:
        return figures
    true = present + weights @ np.asarray(out_of_scope)
    return figures | {"recall_all_codes": _ratio(found, true), "f1_all_codes": _ratio(2 * found, claimed + true)}
