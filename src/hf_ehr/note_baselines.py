"""Baselines without a neural network for coding notes: the rows that every table of ICD coding carries beside a model.

Each takes ``(train, validation, test)`` of texts with their labels and returns the scores of all labels for validation
and test. It is fitted on ``train``, its few settings are chosen on ``validation``, and ``test`` is only predicted: its
labels are never read. A label that no training note carries gets the score 0, one that all carry gets 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse
from tqdm.auto import tqdm

from hf_ehr import evidence
from hf_ehr._histories import offsets_of
from hf_ehr._scores import Array, sigmoid
from hf_ehr.multilabel import document_precision
from hf_ehr.multilabel_predictions import MultilabelPredictions

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import CountVectorizer

INVERSE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Candidates for scikit-learn's ``C``, strongest penalty first: of equally good ones the simplest model wins."""
WORDS = 20_000
"""Words of the bag by default, as many as BERT-XML's vocabulary has."""
UNPENALISED_STEPS = 100
"""Of the unpenalised fit, scikit-learn's default: where a label is separable nothing else ends it."""
WEIGHT_BUDGET = 1 << 21
"""Weights of the labels that are fitted at once: some 400 MB with the memory of L-BFGS."""
DENSE_GAIN = 4
"""How much faster than a sparse number a dense one is multiplied."""


class CodePredictions(NamedTuple):
    """Scores of all labels in [0, 1], ``(notes, labels)`` float32 for each split, in the order of its notes."""

    validation: Array
    test: Array


@dataclass(frozen=True, eq=False)
class CodedTexts:
    """Notes with their labels.

    Attributes:
        texts: One a note.
        labels: 0/1, ``(notes, labels)``.
    """

    texts: Sequence[str]
    labels: sparse.csr_array

    def __post_init__(self):
        if self.labels.ndim != 2 or self.labels.shape[0] != len(self.texts):
            raise ValueError(
                f"`labels` must be (notes, labels) with a row for each of the {len(self.texts)} texts, got "
                f"{self.labels.shape}."
            )
        if self.labels.nnz and not (self.labels.data == 1).all():
            raise ValueError("`labels` must hold 0 and 1 only. Build them with `CodedTexts.of`.")

    @classmethod
    def of(
        cls, texts: Iterable[str], labels: Any | pa.ListArray | Sequence[Sequence[int]], n_labels: int
    ) -> CodedTexts:
        """Notes whose labels are a scipy matrix, or lists of label ids (those of :func:`hf_ehr.notes.label_ids`).

        Raises:
            ValueError: A label id lies outside [0, n_labels), or rows and texts differ in number.
        """
        if sparse.issparse(labels):
            matrix = sparse.csr_array(labels)
            matrix.eliminate_zeros()
        else:
            lists = (
                labels if isinstance(labels, pa.Array | pa.ChunkedArray) else pa.array(labels, pa.list_(pa.int64()))
            )
            lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
            ids, offsets = pc.list_flatten(lists).to_numpy().astype(np.int64), offsets_of(lists)
            if len(ids) and not (ids.min() >= 0 and ids.max() < n_labels):
                raise ValueError(f"Label ids must lie in [0, {n_labels}), got [{ids.min()}, {ids.max()}].")
            matrix = sparse.csr_array((np.ones(len(ids), np.int8), ids, offsets), shape=(len(lists), n_labels))
            matrix.sum_duplicates()
        if matrix.shape[1] != n_labels:
            raise ValueError(f"`labels` must have {n_labels} columns, got {matrix.shape[1]}.")
        matrix.data = np.ones(matrix.nnz, np.int8)
        return cls(list(texts), matrix)


def frequency(train: CodedTexts, validation: CodedTexts, test: CodedTexts) -> CodePredictions:
    """The share of training notes that carry a label, for every note alike.

    Raises:
        ValueError: There is no training note, or the splits have different labels.
    """
    _check(train, validation, test)
    share = (np.bincount(train.labels.indices, minlength=train.labels.shape[1]) / len(train.texts)).astype(np.float32)
    return CodePredictions(*(np.tile(share, (len(split.texts), 1)) for split in (validation, test)))


def bow_logistic_regression(
    train: CodedTexts,
    validation: CodedTexts,
    test: CodedTexts,
    *,
    penalty: Literal["l1", "l2"] | None = None,
    max_features: int = WORDS,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> CodePredictions:
    """One logistic regression a label on counts of words, BERT-XML's first baseline (section 4.2).

    Args:
        train: Fitted on.
        validation: ``C`` is chosen here, by the mean average precision within notes; with ``penalty`` only.
        test: Predicted; its labels are not read.
        penalty: None is the paper's ("vanilla"). Most labels are separable then, and the scores are those of
            ``UNPENALISED_STEPS`` steps of L-BFGS from 0.
        max_features: The most frequent words of the training notes.
        inverse_penalties: Candidates for ``C``.

    Raises:
        ValueError: As :func:`frequency`, or the training notes have no word.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    counts = CountVectorizer(max_features=max_features, dtype=np.float64)
    if penalty is None:
        return _best(train, validation, test, counts, [RegressionSettings(None)])
    return _best(train, validation, test, counts, [RegressionSettings(penalty, float(c)) for c in inverse_penalties])


def tfidf_logistic_regression(
    train: CodedTexts,
    validation: CodedTexts,
    test: CodedTexts,
    *,
    class_weight: Literal["balanced"] | None = None,
    min_df: int = 2,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> CodePredictions:
    """One L2 logistic regression a label on TF-IDF of words and pairs of words: hard to beat on a few hundred notes.

    Args:
        train: Fitted on.
        validation: ``C`` is chosen here, one for all labels, by the mean average precision within notes.
        test: Predicted; its labels are not read.
        class_weight: ``balanced`` weighs the classes of a label alike; its scores are no probabilities then.
        min_df: Training notes that a word or pair must occur in.
        inverse_penalties: Candidates for ``C``.

    Raises:
        ValueError: As :func:`bow_logistic_regression`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=min_df, token_pattern=r"(?u)\b\w+\b")
    return _best(
        train, validation, test, words, [RegressionSettings("l2", float(c), class_weight) for c in inverse_penalties]
    )


def string_match(texts: Sequence[str], descriptions: Sequence[str | None], *, min_share: float = 0.5) -> Array:
    """How much of each code's description a note holds in one place, by :func:`hf_ehr.evidence.string_match`.

    Nothing is fitted, so codes that no training note carries can be found.

    Args:
        texts: Of the notes.
        descriptions: Of the codes, in the language of the notes; None or one without a content word gets 0.
        min_share: Smallest share that counts.

    Returns:
        The share of the description's content words, ``(notes, codes)`` float32; 0 where it is below ``min_share``.
    """
    names = [name or "" for name in descriptions]
    scores = np.zeros((len(texts), len(names)), np.float32)
    # Only where enough of the words occur anywhere can enough of them stand together.
    for note, code in tqdm(list(_candidates(texts, names, min_share)), desc="Matching descriptions", unit="pair"):
        spans = evidence.string_match(texts[note], names[code], min_share=min_share, k=1)
        scores[note, code] = spans[0].weight if spans else 0
    return scores


def _candidates(texts: Sequence[str], names: Sequence[str], min_share: float) -> Iterator[tuple[int, int]]:
    """Pairs of a note and a description of which it holds at least ``min_share`` of the content words."""
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(
        binary=True, token_pattern=r"\w+", preprocessor=str.casefold, stop_words=sorted(evidence.STOP_WORDS)
    )
    try:
        described = words.fit_transform(names).astype(np.int32)
    except ValueError:  # an empty vocabulary
        return
    shared = (words.transform(texts).astype(np.int32) @ described.T).tocoo()
    enough = shared.data >= min_share * described.sum(axis=1).A1[shared.col]
    yield from zip(shared.row[enough].tolist(), shared.col[enough].tolist(), strict=True)


def _check(train: CodedTexts, validation: CodedTexts, test: CodedTexts) -> None:
    if not len(train.texts):
        raise ValueError("`train` must hold a note, got none.")
    sizes = [split.labels.shape[1] for split in (train, validation, test)]
    if len(set(sizes)) > 1:
        raise ValueError(f"`train`, `validation` and `test` must have the same labels, got {sizes} of them.")


class RegressionSettings(NamedTuple):
    """How labels are fitted: ``C`` as in scikit-learn."""

    penalty: Literal["l1", "l2"] | None
    c: float = 1.0
    class_weight: Literal["balanced"] | None = None


def _best(
    train: CodedTexts,
    validation: CodedTexts,
    test: CodedTexts,
    words: CountVectorizer,
    candidates: Sequence[RegressionSettings],
) -> CodePredictions:
    """Predictions of the settings with the highest mean average precision on validation, the first of equals."""
    _check(train, validation, test)
    if not candidates:
        raise ValueError("`inverse_penalties` must hold a candidate, got none.")
    x = words.fit_transform(train.texts)
    others = sparse.vstack([words.transform(split.texts) for split in (validation, test)], format="csr")
    reduced = _reduced(x, others)
    found = []
    with tqdm(total=len(candidates) * train.labels.shape[1], desc="Fitting labels", unit="label") as progress:
        for settings in candidates:
            features = (x, others) if settings.penalty == "l1" else reduced
            scores = one_vs_rest_scores(*features, train.labels, settings, progress.update)
            predictions = CodePredictions(scores[: len(validation.texts)], scores[len(validation.texts) :])
            if len(candidates) == 1:
                return predictions
            found.append((map_within_notes(predictions.validation, validation.labels), predictions))
            found = [max(found, key=lambda candidate: round(candidate[0], 12))]  # a table of scores may be large
    return found[0][1]


def _reduced(x: Any, others: Any) -> tuple[Any, Any]:
    """The same notes in as many dense features as there are training notes, where that is cheaper; an exact rotation.

    Weights under an L2 penalty, or reached from 0 by gradients, are sums of training notes: nothing outside of their
    span matters.
    """
    if x.shape[0] ** 2 > DENSE_GAIN * x.nnz:
        return x, others
    values, vectors = np.linalg.eigh((x @ x.T).toarray())
    kept = values > 1e-10 * values.max(initial=0.0)
    basis = vectors[:, kept] / np.sqrt(values[kept])
    return (x @ x.T) @ basis, (others @ x.T) @ basis


def map_within_notes(scores: Array, labels: sparse.csr_array) -> float:
    """MAP within notes over those with a label; -inf where there is none, so that the first candidate is kept."""
    predictions = MultilabelPredictions(labels.shape[1])
    predictions.add(scores, labels)
    found = document_precision(predictions.cells, predictions.n_documents)
    return float(np.nanmean(found)) if np.isfinite(found).any() else -np.inf


def one_vs_rest_scores(
    x: Any, others: Any, labels: sparse.csr_array, settings: RegressionSettings, done: Callable
) -> Array:
    """Scores of ``others``, (notes, labels) float32, of one logistic regression a label."""
    columns = labels.tocsc()
    counts = np.diff(columns.indptr)
    scores = np.zeros((others.shape[0], labels.shape[1]), np.float32)
    scores[:, counts == labels.shape[0]] = 1
    mixed = np.flatnonzero((counts > 0) & (counts < labels.shape[0]))
    done(labels.shape[1] - len(mixed))
    step = max(1, WEIGHT_BUDGET // (x.shape[1] + 1))
    for start in range(0, len(mixed), step):
        chosen = mixed[start : start + step]
        weights, intercepts = _fit(x, columns[:, chosen].toarray().astype(np.float64), settings)
        scores[:, chosen] = sigmoid(others @ weights + intercepts)
        done(len(chosen))
    return scores


def _fit(x: Any, truth: Array, settings: RegressionSettings) -> tuple[Array, Array]:
    """Weights (features, labels) and intercepts (labels,) of several labels at once.

    Minimises ``C Σ loss + penalty``, or ``Σ loss`` without one; the intercept is free. The labels share nothing but
    the step, and a product with many labels costs little more than one with a single label. Under L1 weights are the
    difference of two that are not negative, whose sum is the penalty.
    """
    from scipy.optimize import Bounds, minimize
    from scipy.special import expit, log_expit

    notes, labels = truth.shape
    signs, share = 2 * truth - 1, truth.mean(axis=0)
    balance = np.where(truth == 1, 0.5 / share, 0.5 / (1 - share)) if settings.class_weight else 1.0
    strength = 0.0 if settings.penalty is None else 1 / (settings.c * notes)
    lasso = settings.penalty == "l1"

    def loss(flat: Array) -> tuple[float, Array]:
        *parts, intercepts = np.split(flat.reshape(-1, labels), np.cumsum([x.shape[1]] * (1 + lasso)))
        weights = parts[0] - parts[1] if lasso else parts[0]
        logits = x @ weights + intercepts
        residual = balance * (expit(logits) - truth) / notes
        slope = x.T @ residual
        total = -(balance * log_expit(signs * logits)).sum() / notes
        total += strength * (sum(part.sum() for part in parts) if lasso else (weights**2).sum() / 2)
        slopes = [slope + strength, strength - slope] if lasso else [slope + strength * weights]
        return float(total), np.vstack([*slopes, residual.sum(axis=0)]).ravel()

    start = np.zeros(((1 + lasso) * x.shape[1] + 1, labels))
    bounds = Bounds(np.where(np.arange(len(start)) < len(start) - 1, 0, -np.inf).repeat(labels)) if lasso else None
    start[-1] = 0 if settings.class_weight else np.log(share / (1 - share))
    steps = UNPENALISED_STEPS if settings.penalty is None else 1000
    options = {"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-9, "gtol": 1e-8}
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    *parts, intercepts = np.split(found.x.reshape(-1, labels), np.cumsum([x.shape[1]] * (1 + lasso)))
    return (parts[0] - parts[1] if lasso else parts[0]), intercepts[0]


__all__ = [
    "CodePredictions",
    "CodedTexts",
    "bow_logistic_regression",
    "frequency",
    "string_match",
    "tfidf_logistic_regression",
]
