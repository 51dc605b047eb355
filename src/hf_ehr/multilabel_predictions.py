"""The scores and true codes of many documents, batch by batch: 50,000 notes × 9,000 labels take 0.9 GB.

Scores are kept as they come (exact) or, with ``compact=True``, in 16 bits each: the upper bits of the float32 of ``p``
below one half, of ``1 − p`` above. A kept score is at most min(p, 1 − p) / 256 below the true one, so the compact form
ties neighbours and never swaps them. What the ties can do to ranking metrics can be told afterwards
(:func:`hf_ehr.multilabel.ranking_error_bounds`); ranks within a document are taken before anything is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from hf_ehr._scores import Array

LABEL_BLOCK = 256
"""Labels whose columns are gathered at once: 25 MB of compact scores of 50,000 documents."""
HALF_BITS, TOP_CODE = 15, 0xFFFF


class ScoreCounts(NamedTuple):
    """Cells at each distinct score, from the highest, ``(distinct,)`` each.

    Attributes:
        cuts: The threshold that flags this score and all higher ones.
        positives: Cells that carry the label.
        negatives: Cells that do not.
    """

    cuts: Array
    positives: Array
    negatives: Array


class Cells(NamedTuple):
    """The (document, label) cells of the true codes, by document, ``(cells,)`` each.

    Attributes:
        documents: Number of the document, from 0.
        labels: Number of the label.
        above: Labels with a higher score in this document.
        through: Labels with this score or a higher one, itself included.
    """

    documents: Array
    labels: Array
    above: Array
    through: Array


class Confusion(NamedTuple):
    """Counts at a threshold: of each label ``(labels,)`` or of each document ``(documents,)``."""

    hits: Array
    predicted: Array
    present: Array


class MultilabelPredictions:
    """Scores and true codes of a set of documents.

    Args:
        n_labels: Labels a document can have.
        compact: Keep scores in 16 bits (see the module), for sets that would not fit otherwise.
    """

    def __init__(self, n_labels: int, *, compact: bool = False):
        if n_labels < 1:
            raise ValueError(f"`n_labels` must be at least 1, got {n_labels}.")
        self.n_labels, self.compact, self.n_documents = n_labels, compact, 0
        self._chunks: list[Array] = []
        self._cells: list[Cells] = []

    @classmethod
    def of(cls, scores: ArrayLike, targets: Any) -> MultilabelPredictions:
        """Documents that are there at once; arguments as in :meth:`add`."""
        predictions = cls(np.shape(scores)[1])
        predictions.add(scores, targets)
        return predictions

    def add(self, scores: ArrayLike, targets: Any) -> None:
        """Takes a batch of documents.

        Args:
            scores: Probabilities, ``(documents, labels)``, of any float type.
            targets: 0/1, ``(documents, labels)``: an array or a scipy sparse matrix. A document may have no code.

        Raises:
            ValueError: Shapes differ, a score is not in [0, 1], or a target is not 0/1.
        """
        values = np.asarray(scores)
        if values.ndim != 2 or values.shape[1] != self.n_labels or values.shape != np.shape(targets):
            raise ValueError(
                f"`scores` and `targets` must both be (documents, {self.n_labels}), "
                f"got {values.shape} and {np.shape(targets)}."
            )
        if values.dtype.kind != "f":
            values = values.astype(np.float64)
        # NaN fails both comparisons.
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("`scores` must be finite and lie in [0, 1]. Pass logits through a sigmoid.")
        documents, labels = _true_cells(targets)
        above, through = _ranks(values, documents, labels)
        self._cells.append(Cells(documents + self.n_documents, labels, above, through))
        self._chunks.append(compressed(values) if self.compact else values.copy())
        self.n_documents += len(values)

    @property
    def cells(self) -> Cells:
        """The cells of the true codes, by document and, within it, by label."""
        columns = ([cells[place] for cells in self._cells] for place in range(len(Cells._fields)))
        return Cells(*(np.concatenate([np.empty(0, np.int64), *parts]) for parts in columns))

    def targets(self) -> sparse.csr_array:
        """The true codes, 0/1, ``(documents, labels)``."""
        documents, labels, *_ = self.cells
        shape = (self.n_documents, self.n_labels)
        return sparse.csr_array((np.ones(len(labels), np.int64), (documents, labels)), shape=shape)

    def label_counts(self) -> Iterator[ScoreCounts]:
        """The counts of each label in turn."""
        targets = self.targets().tocsc()
        for start in range(0, self.n_labels, LABEL_BLOCK):
            stop = min(start + LABEL_BLOCK, self.n_labels)
            block = np.ascontiguousarray(np.concatenate([chunk[:, start:stop] for chunk in self._chunks]).T)
            for label, column in enumerate(block, start):
                yield self._counts(column, targets.indices[targets.indptr[label] : targets.indptr[label + 1]])

    def counts_of(self, label: int) -> ScoreCounts:
        """The counts of one label."""
        documents, labels, *_ = self.cells
        return self._counts(np.concatenate([chunk[:, label] for chunk in self._chunks]), documents[labels == label])

    def pooled_counts(self) -> ScoreCounts:
        """The counts over all cells, as the micro averages take them."""
        documents, labels, *_ = self.cells
        if not self.compact:
            return self._counts(np.concatenate(self._chunks).ravel(), documents * self.n_labels + labels)
        everything = sum(np.bincount(chunk.ravel(), minlength=TOP_CODE + 1) for chunk in self._chunks)
        positives = sum(
            np.bincount(chunk[cells.documents - first, cells.labels], minlength=TOP_CODE + 1)
            for chunk, cells, first in zip(self._chunks, self._cells, self._firsts(), strict=True)
        )
        return _code_counts(np.asarray(everything), np.asarray(positives))

    def flagged(self, threshold: ArrayLike) -> Iterator[tuple[slice, Array]]:
        """Rows and ``score >= threshold``, ``(rows, labels)``, of each batch in turn.

        Args:
            threshold: One, or one a label ``(labels,)``.

        Raises:
            ValueError: The shape is another.
        """
        limit = np.asarray(threshold, dtype=np.float64)
        if limit.shape not in ((), (self.n_labels,)):
            raise ValueError(f"`threshold` must be one number or ({self.n_labels},), got {limit.shape}.")
        if self.compact:
            limit = np.where(limit > 1, TOP_CODE + 1, compressed(np.clip(limit, 0, 1)).astype(np.int64))
        for first, chunk in zip(self._firsts(), self._chunks, strict=True):
            yield slice(first, first + len(chunk)), chunk >= limit

    def confusion(self, threshold: ArrayLike) -> tuple[Confusion, Confusion]:
        """Counts of each label and of each document at ``threshold`` (one, or one a label)."""
        targets = self.targets()
        labels, documents = np.zeros((2, self.n_labels), np.int64), np.zeros((2, self.n_documents), np.int64)
        for rows, flagged in self.flagged(threshold):
            hits = targets[rows].multiply(flagged)
            labels += hits.sum(axis=0), flagged.sum(axis=0)
            documents[:, rows] = hits.sum(axis=1), flagged.sum(axis=1)
        of_labels = Confusion(labels[0], labels[1], targets.sum(axis=0))
        return of_labels, Confusion(documents[0], documents[1], targets.sum(axis=1))

    def dense(self) -> Array:
        """The scores as kept, ``(documents, labels)``; of compact ones the lower end of what they can have been."""
        scores = np.concatenate([np.empty((0, self.n_labels), self._dtype), *self._chunks])
        return decompressed(scores) if self.compact else scores

    @property
    def _dtype(self) -> Any:
        return self._chunks[0].dtype if self._chunks else np.float32

    def _firsts(self) -> Array:
        """Number of the first document of each batch."""
        return np.cumsum([0, *map(len, self._chunks)])[:-1]

    def _counts(self, scores: Array, positive: Array) -> ScoreCounts:
        """Counts of cells ``(n,)`` of which those at ``positive`` carry the label."""
        if self.compact:
            everything = np.bincount(scores, minlength=TOP_CODE + 1)
            return _code_counts(everything, np.bincount(scores[positive], minlength=TOP_CODE + 1))
        values, place = np.unique(scores, return_inverse=True)
        positives, everything = np.bincount(place[positive], minlength=len(values)), np.bincount(place)
        values = values.astype(np.float64)[::-1]
        # Halfway to the next lower score, so that rounding on another machine flips no cell.
        cuts = np.append((values[:-1] + values[1:]) / 2, values[-1])
        return ScoreCounts(cuts, positives[::-1], (everything - positives)[::-1])


def compressed(scores: ArrayLike) -> Array:
    """Probabilities as uint16 codes of the same order; equal codes are at most min(p, 1 − p) / 256 apart.

    A code begins at its lowest score: ``p >= t`` is ``code(p) >= code(t)`` for every ``t`` that
    :func:`decompressed` returns.
    """
    values = np.asarray(scores, dtype=np.float32)
    low = values.view(np.uint32) >> HALF_BITS
    high = TOP_CODE - ((np.maximum(1 - values, 0).view(np.uint32) + (1 << HALF_BITS) - 1) >> HALF_BITS)
    return np.where(values < 0.5, low, high).astype(np.uint16)


def decompressed(codes: ArrayLike) -> Array:
    """The lowest score of each code, float32."""
    values = np.asarray(codes, dtype=np.uint32)
    below = (values << HALF_BITS).view(np.float32)
    above = 1 - ((TOP_CODE - values) << HALF_BITS).view(np.float32)
    return np.where(values <= TOP_CODE // 2, below, above)


def _code_counts(everything: Array, positives: Array) -> ScoreCounts:
    """Counts of the codes that occur, from the counts of all codes."""
    used = np.flatnonzero(everything)[::-1]
    return ScoreCounts(decompressed(used), positives[used], everything[used] - positives[used])


def _true_cells(targets: Any) -> tuple[Array, Array]:
    """Rows and columns of the ones, by row and then by column."""
    if sparse.issparse(targets):
        matrix = sparse.csr_array(targets)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        values = matrix.data
        documents, labels = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.indices
    else:
        matrix = np.asarray(targets)
        documents, labels = np.nonzero(matrix)
        values = matrix[documents, labels]
    if not (values == 1).all():
        raise ValueError(f"`targets` must hold 0 and 1 only, got {values[values != 1][0]}.")
    return documents.astype(np.int64), labels.astype(np.int64)


def _ranks(scores: Array, documents: Array, labels: Array) -> tuple[Array, Array]:
    """For each cell the labels of its document with a higher score, and with its score or a higher one."""
    n_labels = scores.shape[1]
    flat, wanted = np.sort(scores, axis=1).ravel(), scores[documents, labels]
    first = documents * n_labels
    below = _first_place(flat, first, first + n_labels, lambda values: values < wanted)
    through = _first_place(flat, first, first + n_labels, lambda values: values <= wanted)
    return first + n_labels - through, first + n_labels - below


def _first_place(flat: Array, low: Array, high: Array, before: Callable[[Array], Array]) -> Array:
    """Binary search in many sorted stretches ``[low, high)`` of ``flat`` at once: the first place not ``before``."""
    while (low < high).any():
        open_, middle = low < high, (low + high) // 2
        right = before(flat[np.minimum(middle, len(flat) - 1)])
        low, high = np.where(open_ & right, middle + 1, low), np.where(open_ & ~right, middle, high)
    return low
