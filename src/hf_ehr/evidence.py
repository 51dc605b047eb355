"""Where in a note the evidence of a code stands: spans from token weights, how good they are, and what to beat.

Attention alone is no evidence. Scores of spans therefore stand beside those of random spans, of the note's beginning
and of a match of the code's description, and below the ceiling that the tokens of the model allow. Offsets count
characters of the note as Python does (code points). Plausibility compares words of the text, not tokens, so that
models with different tokenizers can be compared and text that a model never read counts as missed.

Sources: DeYoung et al. (2020, ERASER) for comprehensiveness and sufficiency, Cheng et al. (2023, MDACE) and Edin
et al. (2024) for their use on codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array
from hf_ehr.models.evidence_spans import Span, real_tokens, top_spans

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the tokens that are taken away or kept (ERASER)."""
_WORD = re.compile(r"\w+|[^\w\s]")
STOP_WORDS = frozenset({
    "a", "an", "and", "at", "by", "due", "elsewhere", "for", "from", "in", "into", "nec", "nos", "not", "of", "on",
    "or", "other", "specified", "the", "to", "type", "unspecified", "with", "without",
})  # fmt: skip
"""Words of descriptions that say nothing about a finding."""


class Plausibility(NamedTuple):
    """Agreement of spans with the true ones in words; all NaN where there is no true span.

    Attributes:
        precision: Share of the marked words that are true; NaN where nothing is marked.
        recall: Share of the true words that are marked.
        f1: Of the two.
        iou: Words in both over words in either.
        spans_found: Share of the true spans of which at least one word is marked.
    """

    precision: float
    recall: float
    f1: float
    iou: float
    spans_found: float


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What masking does to the probability of a code.

    Attributes:
        comprehensiveness: Mean fall when the heaviest tokens are masked; higher is better.
        sufficiency: Mean fall when all others are masked; lower is better.
        probability: Of the whole note.
        masked: Probability without the heaviest tokens, one a fraction.
        kept: Probability with them alone, one a fraction.
    """

    comprehensiveness: float
    sufficiency: float
    probability: float
    masked: Array
    kept: Array


def plausibility(spans: Iterable[Sequence[float]], truth: Iterable[Sequence[float]], text: str) -> Plausibility:
    """How well spans agree with the true ones.

    Args:
        spans: What was marked; start and end first.
        truth: What an expert (or the generator of a synthetic note) marked; start and end first.
        text: The note.
    """
    words, true_spans = word_spans(text), _bounds(truth)
    true, marked = _touched(words, true_spans), _touched(words, _bounds(spans))
    found = [bool(marked[_touched(words, span[None])].any()) for span in true_spans]
    return _agreement(int((true & marked).sum()), int(marked.sum()), int(true.sum()), found)


def plausibility_ceiling(truth: Iterable[Sequence[float]], offsets: ArrayLike, text: str) -> Plausibility:
    """The best plausibility that any choice among the tokens of a model can have.

    It is below 1 where true words were never read (truncation). Exact for tokens that lie within one word, as those of
    word-level and sub-word tokenizers do; for others an upper bound.

    Args:
        truth: The true spans.
        offsets: Of the tokens that the model read, ``(tokens, 2)``.
        text: The note.
    """
    words, true_spans = word_spans(text), _bounds(truth)
    true, read = _touched(words, true_spans), _touched(words, np.asarray(offsets))
    found = [bool(read[_touched(words, span[None])].any()) for span in true_spans]
    reached = int((true & read).sum())
    return _agreement(reached, reached, int(true.sum()), found)


def tune_relative_threshold(
    examples: Sequence[tuple[ArrayLike, ArrayLike, Sequence[Sequence[float]], str]],
    *,
    candidates: Sequence[float] = tuple(np.linspace(0.05, 0.95, 19).round(2)),
    k: int | None = None,
) -> float:
    """The relative threshold with the highest mean F1 on validation; of equally good ones the highest.

    Args:
        examples: Weights, offsets, true spans and text of validation (note, code) pairs.
        candidates: Thresholds to try.
        k: As in :func:`top_spans`.

    Raises:
        ValueError: No example has a true span.
    """
    marked = [example for example in examples if len(example[2])]
    if not marked:
        raise ValueError("`examples` must hold one with a true span, got none. Keep the default threshold.")

    def mean_f1(threshold: float) -> float:
        return float(
            np.mean(
                [
                    plausibility(top_spans(w, o, relative_threshold=threshold, k=k), truth, text).f1
                    for w, o, truth, text in marked
                ]
            )
        )

    return max(candidates, key=lambda threshold: (mean_f1(threshold), threshold))


def faithfulness(
    score: Callable[[list[str]], ArrayLike],
    text: str,
    weights: ArrayLike,
    offsets: ArrayLike,
    *,
    fractions: Sequence[float] = FRACTIONS,
    mask: str = " ",
) -> Faithfulness:
    """Comprehensiveness and sufficiency of token weights for one code, averaged over ``fractions`` (ERASER's AOPC).

    Masked text is unlike any note, so compare with what random weights get, never with 0.

    Args:
        score: The probabilities of the code for a list of texts, ``(texts,)``; called once.
        text: The note.
        weights: Of the tokens, ``(tokens,)``; tied ones are taken from the front.
        offsets: Start and end of every token, ``(tokens, 2)``.
        fractions: Shares of the tokens, in (0, 1]; at least one token is taken.
        mask: What a run of masked tokens becomes.

    Raises:
        ValueError: As :func:`top_spans`, a fraction is out of range, or there is no token in the text.
    """
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"`fractions` must lie in (0, 1], got {list(fractions)}.")
    values, places = real_tokens(weights, offsets)
    if not len(values):
        raise ValueError("`offsets` must hold a token of the text, got none. An empty note has no evidence.")
    order = np.argsort(-values, kind="stable")
    cuts = [max(1, round(fraction * len(values))) for fraction in fractions]
    without = [masked_text(text, places[order[:cut]], mask) for cut in cuts]
    alone = [masked_text(text, places[order[cut:]], mask) for cut in cuts]
    probability, *rest = np.asarray(score([text, *without, *alone]), dtype=np.float64)
    masked, kept = np.array(rest[: len(cuts)]), np.array(rest[len(cuts) :])
    return Faithfulness(
        float(np.mean(probability - masked)), float(np.mean(probability - kept)), float(probability), masked, kept
    )


def masked_text(text: str, places: ArrayLike, mask: str = " ") -> str:
    """The note with the characters of ``places``, ``(spans, 2)``, replaced, each run of them by one ``mask``."""
    hidden = _covered(len(text), _bounds(np.asarray(places)))
    edges = np.flatnonzero(np.diff(hidden, prepend=False, append=False))
    parts, seen = [], 0
    for start, end in edges.reshape(-1, 2):
        parts += [text[seen:start], mask]
        seen = end
    return "".join([*parts, text[seen:]])


def random_spans(text: str, like: Iterable[Sequence[float]], rng: np.random.Generator) -> list[Span]:
    """As many spans as ``like`` has, each of as many words, anywhere in the note; they may overlap.

    Args:
        text: The note.
        like: The spans of the method that this baseline stands beside; only their lengths are used.
        rng: Source of the places.
    """
    words = word_spans(text)
    spans = []
    for bounds in _bounds(like):
        length = int(_touched(words, bounds[None]).sum())
        if length:
            first = int(rng.integers(len(words) - length + 1))
            spans.append(Span(int(words[first, 0]), int(words[first + length - 1, 1])))
    return spans


def first_words(text: str, count: int) -> list[Span]:
    """The first ``count`` words of the note as one span: what a model that knows only positions would mark."""
    words = word_spans(text)[: max(count, 0)]
    return [Span(int(words[0, 0]), int(words[-1, 1]))] if len(words) else []


def string_match(text: str, description: str, *, min_share: float = 0.5, k: int | None = 5) -> list[Span]:
    """Places of the note that hold the words of a code's description, without regard to case.

    A span is a run of words of the description, other words allowed between only if they are stop words; it weighs the
    share of the description's content words that it holds.

    Args:
        text: The note.
        description: Of the code.
        min_share: Smallest weight of a span.
        k: Spans to return, all with None.

    Returns:
        Spans by falling weight; none where the description has no content word.
    """
    content = {word.group().casefold() for word in re.finditer(r"\w+", description)} - STOP_WORDS
    runs: list[list[tuple[int, int, str]]] = [[]]
    for word in _WORD.finditer(text):
        plain = word.group().casefold()
        if plain in content:
            runs[-1].append((*word.span(), plain))
        elif plain not in STOP_WORDS and runs[-1]:
            runs.append([])
    spans = [Span(run[0][0], run[-1][1], len({plain for *_, plain in run}) / len(content)) for run in runs if run]
    kept = [span for span in spans if span.weight >= min_share]
    return sorted(kept, key=lambda span: (-span.weight, span.start))[:k]


def word_spans(text: str) -> Array:
    """Start and end of the words and punctuation marks, ``(words, 2)``."""
    return np.array([word.span() for word in _WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)


def _bounds(spans: Iterable[Sequence[float]]) -> Array:
    """Start and end of spans, ``(spans, 2)``."""
    return np.array([tuple(span)[:2] for span in spans], dtype=np.int64).reshape(-1, 2)


def _covered(length: int, bounds: Array) -> Array:
    """Which of ``length`` characters lie in a span, boolean."""
    depth = np.zeros(length + 1, np.int64)
    bounds = np.clip(bounds, 0, length)
    np.add.at(depth, bounds[:, 0], 1)
    np.add.at(depth, bounds[:, 1], -1)
    return np.cumsum(depth)[:-1] > 0


def _touched(words: Array, bounds: Array) -> Array:
    """Which words share a character with a span, boolean ``(words,)``."""
    if not len(words):
        return np.zeros(0, bool)
    before = np.append(0, np.cumsum(_covered(int(words[-1, 1]), bounds)))
    return before[words[:, 1]] > before[words[:, 0]]


def _agreement(both: int, marked: int, true: int, found: Sequence[bool]) -> Plausibility:
    if not found:
        return Plausibility(*[float("nan")] * 5)
    precision = both / marked if marked else float("nan")
    recall = both / true if true else 0.0
    f1 = 2 * both / (marked + true) if true else 0.0
    iou = both / (marked + true - both) if true else 0.0
    return Plausibility(precision, recall, f1, iou, float(np.mean(found)))
