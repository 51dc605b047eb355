"""Windows of notes → examples of masked-word and next-sentence pre-training. No loop over tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ._histories import offsets_of, ragged_indices, total_before
from .notes.cleaning import CleaningName
from .notes.corpus import segment_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CANDIDATES = 256
"""Windows of other patients among which the second half of a random pair is sought."""
_PAIRS = 1 << 13  # random pairs that are made at a time
_FAR = np.iinfo(np.int64).max // 2


def tokens_of(segments: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of each window, (windows,); ids and starts in the text of all of them, (tokens,)."""
    ids, starts = (segments[name].combine_chunks() for name in ("input_ids", "starts"))
    return np.diff(offsets_of(ids)), ids.flatten().to_numpy(), starts.flatten().to_numpy()


class Template(NamedTuple):
    """What a tokenizer puts around one text or two: special ids, and the token type of every piece.

    Attributes:
        ids: Special ids before, between and behind the texts.
        types: Token type of each piece in the order before, text, between, text, behind.
    """

    ids: list[np.ndarray]
    types: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, pair: bool) -> Template:
        texts = ["a"] * (1 + pair)
        encoded = tokenizer(*texts, return_token_type_ids=True, verbose=False)
        ids, types = np.array(encoded["input_ids"]), np.array(encoded["token_type_ids"])
        owner = np.array([-1 if text is None else text for text in encoded.sequence_ids(0)])
        bounds = [0]
        for text in range(len(texts)):
            places = np.flatnonzero(owner == text)
            bounds += [places[0], places[-1] + 1]
        bounds.append(len(ids))
        pieces = [slice(first, last) for first, last in pairwise(bounds)]
        # A piece without tokens has no type, and needs none.
        return cls([ids[piece] for piece in pieces[::2]], [int(types[piece][:1].sum()) for piece in pieces])

    @property
    def specials(self) -> int:
        """Special tokens of an example."""
        return sum(map(len, self.ids))

    def lay_out(
        self, tokens: np.ndarray, starts: list[np.ndarray], lengths: list[np.ndarray]
    ) -> dict[str, pa.ListArray]:
        """``input_ids`` and ``token_type_ids`` of examples whose texts are stretches of ``tokens``.

        Args:
            tokens: (tokens,) ids.
            starts: For each text where it starts in ``tokens``, (examples,).
            lengths: For each text its number of tokens, (examples,).
        """
        ones = np.ones(len(starts[0]), np.int64)
        first = total_before(np.array([len(tokens), *map(len, self.ids)]))[1:-1]
        places = [place * ones for place in first.tolist()]
        sizes = [len(special) * ones for special in self.ids]
        for text in reversed(range(len(starts))):
            places.insert(text + 1, starts[text])
            sizes.insert(text + 1, lengths[text])
        sizes_of = np.stack(sizes, axis=1)
        source = ragged_indices(np.stack(places, axis=1).ravel(), sizes_of.ravel())
        offsets = pa.array(total_before(sizes_of.sum(axis=1)), pa.int32())
        types = np.repeat(np.tile(np.array(self.types, np.int8), len(ones)), sizes_of.ravel())
        ids = np.concatenate([tokens, *self.ids]).astype(np.int32)[source]
        return {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "token_type_ids": pa.ListArray.from_arrays(offsets, pa.array(types)),
        }


class Windows(NamedTuple):
    """Windows without special tokens, one after the other.

    Attributes:
        tokens: (tokens,) ids.
        offsets: (windows + 1,) borders of the windows.
        subjects: (windows,) patients, those of one patient side by side.
        goes_on: (windows,) whether the note has more tokens behind the window.
        breaks: Ascending places in ``tokens`` where a sentence or line starts.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    subjects: np.ndarray
    goes_on: np.ndarray
    breaks: np.ndarray

    @classmethod
    def of(cls, notes: pa.Table, tokenizer: PreTrainedTokenizerFast, room: int, cleaning: CleaningName) -> Windows:
        """The windows of at most ``room`` tokens of a chunk of notes."""
        single = Template.of(tokenizer, pair=False).specials
        segments = segment_notes(notes, tokenizer, max_length=room + single, cleaning=cleaning)
        lengths, ids, starts = tokens_of(segments)
        own = starts >= 0
        lengths = lengths - single
        note = np.cumsum(segments["segment"].to_numpy() == 0) - 1
        texts = notes["text"].combine_chunks()
        place = starts[own] + np.repeat(total_before(_characters(texts))[note], lengths)
        ends = total_before(_sentence_ends(texts))[place]
        offsets = total_before(lengths)
        breaks = np.flatnonzero(np.diff(ends, prepend=ends[:1]))
        goes_on = np.append(note[1:] == note[:-1], False)
        return cls(ids[own], offsets, notes["subject_id"].to_numpy()[note], goes_on, breaks)

    def bounds(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token of some windows, and the token behind their last."""
        return self.offsets[:-1][keep], self.offsets[1:][keep]

    def break_from(self, place: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The first break from ``place`` on and before ``end``, or a place that is far."""
        found = np.append(self.breaks, _FAR)[np.searchsorted(self.breaks, place)]
        return np.where(found < end, found, _FAR)


def _characters(texts: pa.StringArray) -> np.ndarray:
    return pc.utf8_length(texts).to_numpy()


def _sentence_ends(texts: pa.StringArray) -> np.ndarray:
    """Whether a sentence or line ends with each character of all texts together, (characters,) bool."""
    code_points = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le"), np.uint32)
    space = np.isin(code_points, _points(" \t\r\n\u00a0"))
    stop = np.isin(code_points, _points(".!?")) & np.append(space[1:], True)
    return stop | np.isin(code_points, _points("\r\n。！？"))


def _points(characters: str) -> list[int]:
    return [ord(character) for character in characters]


def pretraining_rows(windows: Windows, template: Template, seed: Sequence[int], counts: Counter[str]) -> pa.Table:
    """The examples of a chunk of notes: pairs if the template is one of pairs."""
    pairs = len(template.ids) == 3
    fewest = 2 if pairs else 1
    keep = np.diff(windows.offsets) >= fewest
    counts[f"window of fewer than {fewest} tokens"] += int((~keep).sum())
    counts["examples"] += int(keep.sum())
    starts, ends = windows.bounds(keep)
    if not pairs:
        return pa.table(template.lay_out(windows.tokens, [starts], [ends - starts]))
    generator = np.random.Generator(np.random.PCG64DXSM(list(seed)))
    cuts = _cuts(starts, ends, windows, generator)
    second, second_ends, random = _second_halves(windows, keep, cuts, generator)
    columns = template.lay_out(windows.tokens, [starts, second], [cuts - starts, second_ends - second])
    return pa.table({**columns, "next_sentence_label": random.astype(np.int64)})


def _cuts(starts: np.ndarray, ends: np.ndarray, windows: Windows, generator: np.random.Generator) -> np.ndarray:
    """Where the second half of each window starts: the break nearest to a uniform place, or that place."""
    place = starts + 1 + (generator.random(len(starts)) * (ends - starts - 1)).astype(np.int64)
    right = windows.break_from(place, ends)
    left = np.append(-_FAR, windows.breaks)[np.searchsorted(windows.breaks, place)]
    left = np.where(left > starts, left, -_FAR)
    nearest = np.where(place - left <= right - place, left, right)
    return np.where(np.abs(nearest) < _FAR, nearest, place)


def _second_halves(
    windows: Windows, keep: np.ndarray, cuts: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, end and whether it is another patient's, of the second half that each window gets."""
    starts, ends = windows.bounds(keep)
    subjects = windows.subjects[keep]
    block = np.append(np.flatnonzero(np.diff(subjects, prepend=subjects[:1] - 1)), len(subjects))
    own = np.repeat(np.arange(len(block) - 1), np.diff(block))
    own_first, own_size = block[own][:, None], np.diff(block)[own][:, None]
    random = (generator.random(len(starts)) < 0.5) & (own_size[:, 0] < len(starts))
    has_break = windows.break_from(starts + 1, ends) < _FAR
    goes_on, worst = windows.goes_on[keep], (ends - starts).max(initial=0)
    second, second_ends = cuts.copy(), ends.copy()
    pairs = np.flatnonzero(random)
    for rows in np.array_split(pairs, 1 + len(pairs) // _PAIRS):
        draw = generator.random((len(rows), CANDIDATES))
        donor = (draw * (len(starts) - own_size[rows])).astype(np.int64)
        donor += (donor >= own_first[rows]) * own_size[rows]
        wanted, end = (ends - cuts)[rows][:, None], ends[donor]
        exact = np.maximum(end - wanted, starts[donor] + 1)  # a true second half never starts where its window does
        at_break = windows.break_from(exact, end)
        # Both kinds start between any two tokens where the window has no break.
        missing = has_break[rows][:, None] & (at_break == _FAR)
        first = np.where(has_break[rows][:, None] & ~missing, at_break, exact)
        cost = wanted - (end - first) + worst * (goes_on[donor] != goes_on[rows][:, None]) + 2 * worst * missing
        best = np.arange(len(rows)), cost.argmin(axis=1)
        second[rows], second_ends[rows] = first[best], end[best]
    return second, second_ends, random
