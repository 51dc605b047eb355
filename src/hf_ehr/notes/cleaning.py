"""Cleaning of note text as named options; every character of the result knows where it came from.

Nothing is cleaned by default: raw text with enough tokens beats lower-cased, digit-stripped text (Edin et al. 2023 and
the discussion of their code).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

CleaningName = Literal["none", "bert_xml", "caml", "edin", "clinicalbert"]
Step: TypeAlias = tuple[str, str] | None
"""Pattern and constant replacement, or ``None``: lower case."""

_DIGIT_WORDS = ((r"(?<!\S)\d+(?!\S)", ""), (" +", " "))
_TRIM = (r"\A\s+|\s+\Z", "")
STEPS: dict[str, tuple[Step, ...]] = {
    "none": (),
    # Figures 1 and 3 of Zhang, Liu & Razavian (2020) show lower-case words and `n` for each digit.
    "bert_xml": (None, (r"\d", "n")),
    # Mullenbach et al. (2018): the words of \w+ that are no numbers. Numerals such as `²` stay here.
    "caml": ((r"\W+", " "), *_DIGIT_WORDS, _TRIM, None),
    # Edin et al. (2023). Their pattern needs white space on both sides and leaves a number at either end of the note;
    # here it goes too. Letters with accents become spaces, as there: meant for English.
    "edin": (None, (r"[^a-z0-9]+", " "), *_DIGIT_WORDS, _TRIM),
    # Huang, Altosaar & Ranganath (2019), used by MedM-PLM. Two faults are left out: theirs also cuts decimals
    # (`98.6` → `6`) and finds `dr.` inside of words (`hydr.`).
    "clinicalbert": (
        (r"[\r\n]", " "),
        None,
        (r"\[\*\*[\s\S]*?\*\*\]", ""),
        (r"(?<![\d.])\d+\.(?!\d)", ""),
        (r"\bdr\.", "doctor"),
        (r"\bm\.d\.", "md"),
        (r"admission date:|discharge date:", ""),
        (r"--|__|==", ""),
        _TRIM,
    ),
}
"""The steps of each option, in patterns that Python and the ``tokenizers`` library read alike."""


@dataclass(frozen=True)
class CleanedText:
    """A cleaned note and the way back.

    Attributes:
        text: The cleaned text, n characters.
        starts: ``(n,)`` int: where in the original text the source of each character starts,
        ends: ``(n,)`` int: and where it ends, exclusive. A character put in for a match has the match's span.
        original_length: Characters of the original text.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray
    original_length: int

    def to_original(self, starts: Any, ends: Any) -> tuple[np.ndarray, np.ndarray]:
        """Spans ``[start, end)`` of the cleaned text as spans of the original; an empty span stays empty.

        Args:
            starts: ``(k,)`` first characters, in 0 … n.
            ends: ``(k,)`` ends, not below ``starts``.

        Returns:
            Two ``(k,)`` int arrays.
        """
        starts, ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
        first = np.append(self.starts, self.original_length)[starts]
        last = np.append(self.ends, self.original_length)[ends - 1]
        return first, np.where(ends > starts, last, first)


def clean(texts: Iterable[str], cleaning: CleaningName = "none") -> list[str]:
    """Cleans texts where offsets are not needed; equals ``clean_with_offsets(text, cleaning).text``.

    Args:
        texts: The notes.
        cleaning: ``none``; ``bert_xml`` (lower case, digits → ``n``); ``caml`` (lower-case words that are no numbers);
            ``edin`` (the same, ASCII letters and digits only); ``clinicalbert`` (de-identification marks, list
            numbers, titles, date headers and dashes).

    Raises:
        ValueError: ``cleaning`` is none of these.

    Example:
        >>> clean(["Seen by Dr. [**Name**] on 3/4"], "bert_xml")
        ['seen by dr. [**name**] on n/n']
    """
    texts = list(texts)
    for step in steps(cleaning):
        if step is None:
            texts = [text.lower() for text in texts]
        else:
            pattern, replacement = _compiled(step[0]), step[1]
            texts = [pattern.sub(replacement, text) for text in texts]
    return texts


def clean_with_offsets(text: str, cleaning: CleaningName = "none") -> CleanedText:
    """Cleans one text and keeps for each character where it came from.

    Raises:
        ValueError: ``cleaning`` is not one of the options of :func:`clean`.

    Example:
        >>> cleaned = clean_with_offsets("BP 120/80, A&O", "caml")
        >>> cleaned.text, [int(end[0]) for end in cleaned.to_original([3], [6])]
        ('bp a o', [11, 14])
    """
    starts = np.arange(len(text))
    length, ends = len(text), starts + 1
    for step in steps(cleaning):
        text, starts, ends = _lower(text, starts, ends) if step is None else _substitute(text, starts, ends, *step)
    return CleanedText(text, starts, ends, length)


def steps(cleaning: str) -> tuple[Step, ...]:
    """The steps of an option.

    Raises:
        ValueError: There is no such option.
    """
    if cleaning not in STEPS:
        raise ValueError(f"`cleaning` must be one of {', '.join(get_args(CleaningName))}, got {cleaning!r}.")
    return STEPS[cleaning]


_compiled = cache(re.compile)


def _substitute(
    text: str, starts: np.ndarray, ends: np.ndarray, pattern: str, replacement: str
) -> tuple[str, np.ndarray, np.ndarray]:
    """``re.sub`` for matches that are never empty, on the text and its offsets."""
    matches = np.array([match.span() for match in _compiled(pattern).finditer(text)], np.int64).reshape(-1, 2)
    if not len(matches):
        return text, starts, ends
    first, last = matches.T
    edges = np.bincount(first, minlength=len(text) + 1) - np.bincount(last, minlength=len(text) + 1)
    kept = edges[:-1].cumsum() == 0
    removed_before = (last - first).cumsum() - (last - first)
    places = np.repeat(first - removed_before, len(replacement))
    new_starts = np.insert(starts[kept], places, np.repeat(starts[first], len(replacement)))
    new_ends = np.insert(ends[kept], places, np.repeat(ends[last - 1], len(replacement)))
    return _compiled(pattern).sub(replacement, text), new_starts, new_ends


def _lower(text: str, starts: np.ndarray, ends: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """Lower case; a few letters become two characters (``İ``), which share their source."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower, starts, ends
    lengths = [len(character.lower()) for character in text]
    return lower, np.repeat(starts, lengths), np.repeat(ends, lengths)
