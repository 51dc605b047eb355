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

CANDIDATES = 64
"""Windows of other patients among which the second half of a random pair is sought."""


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
        breaks: Ascending places in ``tokens`` where a sentence or line starts.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    subjects: np.ndarray
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
        return cls(ids[own], offsets, notes["subject_id"].to_numpy()[note], breaks)

    def take(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First token, number of tokens and patient of some windows."""
        return self.offsets[:-1][keep], np.diff(self.offsets)[keep], self.subjects[keep]


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
    starts, lengths, subjects = windows.take(keep)
    if not pairs:
        return pa.table(template.lay_out(windows.tokens, [starts], [lengths]))
    generator = np.random.Generator(np.random.PCG64DXSM(list(seed)))
    first = _cuts(starts, lengths, windows.breaks, generator)
    second_start, second, random = _second_halves(starts + first, lengths - first, subjects, generator)
    columns = template.lay_out(windows.tokens, [starts, second_start], [first, second])
    return pa.table({**columns, "next_sentence_label": random.astype(np.int64)})


def _cuts(starts: np.ndarray, lengths: np.ndarray, breaks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Tokens of the first half of each window: up to the break nearest to a uniform place, or to that place."""
    place = starts + 1 + (generator.random(len(starts)) * (lengths - 1)).astype(np.int64)
    far = np.iinfo(np.int64).max // 2
    at = np.searchsorted(breaks, place)
    left, right = np.append(-far, breaks)[at], np.append(breaks, far)[at]
    left = np.where(left > starts, left, -far)
    right = np.where(right < starts + lengths, right, far)
    nearest = np.where(place - left <= right - place, left, right)
    return np.where(np.abs(nearest) < far, nearest, place) - starts


def _second_halves(
    starts: np.ndarray, lengths: np.ndarray, subjects: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and whether it is another patient's, of the second half that each window gets."""
    windows = len(starts)
    block = np.append(np.flatnonzero(np.diff(subjects, prepend=subjects[:1] - 1)), windows)
    own = np.repeat(np.arange(len(block) - 1), np.diff(block))
    own_first, own_size = block[own], np.diff(block)[own]
    random = (generator.random(windows) < 0.5) & (own_size < windows)
    draw = generator.random((int(random.sum()), CANDIDATES))
    donor = (draw * (windows - own_size[random])[:, None]).astype(np.int64)
    donor += (donor >= own_first[random][:, None]) * own_size[random][:, None]
    wanted, offered = lengths[random][:, None], lengths[donor]
    # The shortest that is long enough comes first, then the others from the longest on.
    best = np.where(offered >= wanted, offered - wanted, lengths.max(initial=0) + wanted - offered).argmin(axis=1)
    donor = donor[np.arange(len(donor)), best]
    second_start, second = starts.copy(), lengths.copy()
    second_start[random] = starts[donor]
    second[random] = np.minimum(lengths[random], lengths[donor])
    return second_start, second, random
