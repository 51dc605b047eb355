"""Strict scores of named entities with intervals over documents, and a dictionary to beat.

An entity counts as found where start, end and type are all right ("strict", as i2b2-2010's exact match and seqeval's
strict mode).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr._scores import Array
from hf_ehr.entity_tags import Entity, words_of
from hf_ehr.intervals import Interval, percentile_interval, resamples


class EntityCounts(NamedTuple):
    """Entities of each document and type, ``(documents, types)`` each.

    Attributes:
        types: Names of the columns.
        hits: In both.
        predicted: Predicted ones.
        present: True ones.
    """

    types: tuple[str, ...]
    hits: Array
    predicted: Array
    present: Array

    @classmethod
    def of(cls, true: Sequence[Iterable[Entity]], predicted: Sequence[Iterable[Entity]]) -> EntityCounts:
        """Counts what was found; an entity that is named twice counts once.

        Raises:
            ValueError: The documents differ in number, or there is none.
        """
        if len(true) != len(predicted) or not len(true):
            raise ValueError(
                f"`true` and `predicted` must hold the same documents, at least one, got {len(true)} and "
                f"{len(predicted)}."
            )
        sets = [[{Entity(*one) for one in document} for document in side] for side in (true, predicted)]
        types = tuple(sorted({entity.type for side in sets for document in side for entity in document}))
        both = [ours & theirs for ours, theirs in zip(*sets, strict=True)]
        return cls(types, _counted(both, types), _counted(sets[1], types), _counted(sets[0], types))


def _counted(documents: Sequence[set[Entity]], types: Sequence[str]) -> Array:
    counts = [Counter(entity.type for entity in document) for document in documents]
    return np.array([[count[kind] for kind in types] for count in counts], np.int64).reshape(len(counts), len(types))


def entity_scores(true: Sequence[Iterable[Entity]], predicted: Sequence[Iterable[Entity]]) -> dict[str, float]:
    """Strict precision, recall and F1 of entities, of all together (micro), of each type, and the mean over types.

    Args:
        true: Of each document.
        predicted: Of the same documents, in the same order.

    Returns:
        ``precision``, ``recall``, ``f1``, the same followed by `` (type)``, ``f1_macro`` over the types that occur,
        and the number of ``entities``. A ratio 0/0 is NaN; an F1 is NaN only where nothing is true or predicted.

    Raises:
        ValueError: As :meth:`EntityCounts.of`.
    """
    counts = EntityCounts.of(true, predicted)
    figures = weighted_figures(counts, np.ones((1, len(counts.hits))))
    found = {name: float(values[0]) for name, values in figures.items()}
    return found | {"entities": float(counts.present.sum())}


def entity_intervals(
    true: Sequence[Iterable[Entity]],
    predicted: Sequence[Iterable[Entity]],
    *,
    rival: Sequence[Iterable[Entity]] | None = None,
    clusters: ArrayLike | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals over documents of the figures of :func:`entity_scores`.

    Args:
        true: Of each document.
        predicted: As there.
        rival: Of another model; the figures then are ``predicted`` minus ``rival`` on the same resampled documents.
        clusters: Of each document, e.g. its patient; each is its own by default.
        n_resamples: Number of resamples.
        seed: Of the resampling.
        level: Coverage.

    Raises:
        ValueError: As :meth:`EntityCounts.of`, or ``clusters`` differ in number.
    """
    models = [EntityCounts.of(true, side) for side in (predicted, rival) if side is not None]
    members = np.unique(np.arange(len(true)) if clusters is None else np.asarray(clusters), return_inverse=True)[1]
    if len(members) != len(true):
        raise ValueError(f"`clusters` must name one a document ({len(true)}), got {len(members)}.")
    drawn = (weight for weight, _ in resamples(members, 1, n_resamples, seed))
    weights = np.stack([np.ones(len(true)), *drawn])
    found = [weighted_figures(counts, weights) for counts in models]
    intervals = {}
    for name in found[0]:
        if all(name in figures for figures in found):
            figure = found[0][name] - found[1][name] if rival is not None else found[0][name]
            intervals[name] = percentile_interval(float(figure[0]), figure[1:], level, difference=rival is not None)
    return intervals


def weighted_figures(counts: EntityCounts, weights: Array) -> dict[str, Array]:
    """Name → (resamples,), documents counting as often as ``weights`` (resamples, documents) say."""
    hits, predicted, present = (weights @ part for part in counts[1:])
    found = _three(hits.sum(axis=1), predicted.sum(axis=1), present.sum(axis=1), "")
    for column, kind in enumerate(counts.types):
        found |= _three(hits[:, column], predicted[:, column], present[:, column], f" ({kind})")
    occurs = present > 0
    f1 = np.where(occurs, _ratio(2 * hits, predicted + present), 0.0)
    return found | {"f1_macro": _ratio(f1.sum(axis=1), occurs.sum(axis=1))}


def _three(hits: Array, predicted: Array, present: Array, suffix: str) -> dict[str, Array]:
    return {
        f"precision{suffix}": _ratio(hits, predicted),
        f"recall{suffix}": _ratio(hits, present),
        f"f1{suffix}": _ratio(2 * hits, predicted + present),
    }


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


class DictionaryMatcher:
    """Entities of the training notes, found again by their words: what a tagger has to beat.

    At each word the longest known series of words is taken, and reading goes on behind it; case and white space do not
    matter. Known is what was an entity in at least ``min_share`` of the places at which the training notes, read in
    this way, have it; its type is the one that it had most often.
    """

    def __init__(self, known: dict[tuple[str, ...], str]):
        self.known = known
        self.longest = max(map(len, known), default=0)

    @classmethod
    def fit(
        cls, texts: Sequence[str], entities: Sequence[Iterable[Entity]], *, min_share: float = 0.5
    ) -> DictionaryMatcher:
        """Learns from notes and their entities, in characters.

        Raises:
            ValueError: Texts and entities differ in number.
        """
        if len(texts) != len(entities):
            raise ValueError(f"`entities` must hold a list for each of the {len(texts)} texts, got {len(entities)}.")
        types: dict[tuple[str, ...], Counter[str]] = {}
        for text, given in zip(texts, entities, strict=True):
            spans = words_of(text)
            for entity in given:
                key = tuple(_folded(text, (one for one in spans if one[0] < entity.end and one[1] > entity.start)))
                if key:
                    types.setdefault(key, Counter())[entity.type] += 1
        everything = cls({key: count.most_common(1)[0][0] for key, count in types.items()})
        seen: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            words = _folded(text, words_of(text))
            seen.update(tuple(words[first:last]) for first, last in everything._read(words))
        return cls(
            {key: kind for key, kind in everything.known.items() if types[key].total() >= min_share * seen[key]}
        )

    def predict(self, texts: Sequence[str]) -> list[list[Entity]]:
        """The entities of notes, in characters."""
        return [self._predicted(text) for text in texts]

    def _predicted(self, text: str) -> list[Entity]:
        spans = words_of(text)
        words = _folded(text, spans)
        return [
            Entity(spans[first][0], spans[last - 1][1], self.known[tuple(words[first:last])])
            for first, last in self._read(words)
        ]

    def _read(self, words: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Known series of words [first, last), from left to right, the longest at each place."""
        place = 0
        while place < len(words):
            sizes = range(min(self.longest, len(words) - place), 0, -1)
            size = next((n for n in sizes if tuple(words[place : place + n]) in self.known), 0)
            if size:
                yield place, place + size
            place += size or 1


def _folded(text: str, spans: Iterable[tuple[int, int]]) -> list[str]:
    """Words without regard to case."""
    return [text[first:last].casefold() for first, last in spans]


__all__ = [
    "DictionaryMatcher",
    "EntityCounts",
    "entity_intervals",
    "entity_scores",
]
