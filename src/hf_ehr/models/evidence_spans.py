"""Spans of a note from the weights of its tokens; offsets count characters as Python does (code points)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RELATIVE_THRESHOLD = 0.5


class Span(NamedTuple):
    """Characters `[start, end)` of a note and how much they weigh."""

    start: int
    end: int
    weight: float = 1.0


def top_spans(
    weights: ArrayLike,
    offsets: ArrayLike,
    *,
    relative_threshold: float = RELATIVE_THRESHOLD,
    k: int | None = 5,
    max_gap: int = 1,
) -> list[Span]:
    """The spans of a note that weigh most.

    Tokens of at least `relative_threshold` times the largest weight are taken, those at most `max_gap` characters
    apart joined. A span weighs as much as its tokens together.

    Args:
        weights: Of the tokens, (tokens,): label attention, attention × gradient, …; only positive ones count.
        offsets: Start and end of every token in the note, (tokens, 2); equal for special tokens and padding.
        relative_threshold: In (0, 1]; tune it on validation with `hf_ehr.evidence.tune_relative_threshold`.
        k: Spans to return, all with None.
        max_gap: Characters between tokens of one span; 1 joins words across a space.

    Returns:
        Spans by falling weight; none where no weight is positive.

    Raises:
        ValueError: Shapes do not fit, a weight is not finite, or an argument is out of range.
    """
    if not 0 < relative_threshold <= 1 or (k is not None and k < 1):
        raise ValueError(
            f"`relative_threshold` must lie in (0, 1] and `k` be at least 1, got {relative_threshold} and {k}."
        )
    values, places = real_tokens(weights, offsets)
    heaviest = values.max(initial=0.0)
    taken = (values >= relative_threshold * heaviest) & (values > 0)
    spans = _joined(values[taken], places[taken], max_gap)
    return sorted(spans, key=lambda span: (-span.weight, span.start))[:k]


def real_tokens(weights: ArrayLike, offsets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Weights (tokens,) and offsets (tokens, 2) of the tokens that have text, in the order of the text.

    Raises:
        ValueError: Shapes do not fit, or a weight is not finite.
    """
    values, places = np.asarray(weights, dtype=np.float64), np.asarray(offsets, dtype=np.int64)
    if values.ndim != 1 or places.shape != (*values.shape, 2):
        raise ValueError(
            f"`weights` must be (tokens,) and `offsets` (tokens, 2), got {values.shape} and {places.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"`weights` must be finite, got {int((~np.isfinite(values)).sum())} that are not.")
    real = np.flatnonzero(places[:, 1] > places[:, 0])
    real = real[np.argsort(places[real, 0], kind="stable")]
    return values[real], places[real]


def _joined(values: np.ndarray, places: np.ndarray, max_gap: int) -> list[Span]:
    """Tokens in order of the text, joined where at most `max_gap` characters lie between."""
    if not len(values):
        return []
    reach = np.maximum.accumulate(places[:, 1])
    first = np.flatnonzero(np.append(True, places[1:, 0] > reach[:-1] + max_gap))
    last = np.append(first[1:], len(values)) - 1
    totals = np.add.reduceat(values, first)
    return [
        Span(int(places[start, 0]), int(reach[end]), float(total))
        for start, end, total in zip(first, last, totals, strict=True)
    ]
