"""Named entities as spans and as tags of words, in the scheme IOB2.

`B-x` begins an entity of type x, `I-x` goes on with one, and an `I-x` that goes on with nothing is no entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")


class Entity(NamedTuple):
    """Characters, or words, ``[start, end)`` of a document and what they name."""

    start: int
    end: int
    type: str


def words_of(text: str) -> list[tuple[int, int]]:
    """Words and punctuation marks of a text, the units that are tagged: characters ``[start, end)`` of each.

    >>> words_of("type 2 (mild)")
    [(0, 4), (5, 6), (7, 8), (8, 12), (12, 13)]
    """
    return [match.span() for match in _WORD.finditer(text)]


def entities_of_tags(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sequence of IOB2 tags, in words.

    >>> entities_of_tags(["B-problem", "I-problem", "O", "I-test", "B-test", "I-problem"])
    [Entity(start=0, end=2, type='problem'), Entity(start=4, end=5, type='test')]
    """
    found: list[Entity] = []
    inside = ""
    for place, tag in enumerate(tags):
        if tag.startswith("B-"):
            found.append(Entity(place, place + 1, tag[2:]))
            inside = tag[2:]
        elif inside and tag == f"I-{inside}":
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            inside = ""
    return found


def tags_of_entities(entities: Iterable[Entity], words: Sequence[tuple[int, int]]) -> list[str]:
    """IOB2 tags of words, from entities in characters; a word belongs to an entity if they share a character.

    Tags cannot say that entities lie in each other: of those that share a word the longest stays, of equally long ones
    the first.

    Args:
        entities: In characters, in any order.
        words: Characters of each word, ascending, of :func:`words_of`.
    """
    starts, ends = (np.array([word[side] for word in words], np.int64) for side in (0, 1))
    tags = ["O"] * len(words)
    for entity in sorted(entities, key=lambda one: (one.start - one.end, one.start)):
        first = int(np.searchsorted(ends, entity.start, side="right"))
        last = int(np.searchsorted(starts, entity.end, side="left"))
        if first < last and set(tags[first:last]) == {"O"}:
            tags[first:last] = [f"B-{entity.type}"] + [f"I-{entity.type}"] * (last - first - 1)
    return tags


__all__ = ["Entity", "entities_of_tags", "tags_of_entities", "words_of"]
