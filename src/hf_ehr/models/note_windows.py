"""How a long note is cut into windows of tokens that do not overlap, with the places of the tokens in its text."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np


class WindowFrame(NamedTuple):
    """What a window is made of.

    Attributes:
        before: Ids that the tokenizer puts before a text, int64.
        after: Ids behind it.
        room: Tokens of the text that fit between them.
    """

    before: np.ndarray
    after: np.ndarray
    room: int


class TextTokens(NamedTuple):
    """Tokens of texts end to end, without special ones.

    Attributes:
        counts: (texts,) int64, tokens of each.
        ids: (tokens,) int32.
        starts: (tokens,) int32, first character in its text.
        ends: (tokens,) int32, the character behind the last.
    """

    counts: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Windows(NamedTuple):
    """Windows end to end, those of a text one after the other.

    Attributes:
        texts: (windows,) the text of each.
        segments: (windows,) 0, 1, … within the text.
        borders: (windows + 1,) where each begins among the tokens.
        ids: (tokens,) int32, special tokens included.
        starts: (tokens,) int32, as in [`TextTokens`]; -1 at special tokens.
        ends: (tokens,) int32; -1 at special tokens.
    """

    texts: np.ndarray
    segments: np.ndarray
    borders: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def window_frame(tokenizer: Any, max_length: int) -> WindowFrame:
    """What a tokenizer puts around the text of a window, and how much of it fits.

    Args:
        tokenizer: Any fast tokenizer.
        max_length: Tokens of a window, special ones included.

    Raises:
        ValueError: The tokenizer is not a fast one, or leaves no room in `max_length`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"`tokenizer` must be a fast one (it keeps offsets), got {type(tokenizer).__name__}.")
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, special = np.array(encoded["input_ids"]), np.array(encoded["special_tokens_mask"], bool)
    own = np.flatnonzero(~special)
    before, after = ids[: own[0]], ids[own[-1] + 1 :]
    room = max_length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"`max_length` must exceed the {len(before) + len(after)} special tokens of a window, got {max_length}."
        )
    return WindowFrame(before, after, room)


def text_tokens(texts: Sequence[str], tokenizer: Any) -> TextTokens:
    """The tokens of texts with their places."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    counts = np.array([len(ids) for ids in encoded["input_ids"]], np.int64)
    ids = np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32, counts.sum())
    pairs = chain.from_iterable(chain.from_iterable(encoded["offset_mapping"]))
    starts, ends = np.fromiter(pairs, np.int32, 2 * counts.sum()).reshape(-1, 2).T
    return TextTokens(counts, ids, starts, ends)


def cut_windows(tokens: TextTokens, frame: WindowFrame) -> Windows:
    """Every window is `before`, up to `room` tokens, `after`; a text without tokens has one window."""
    before, after, room = frame
    counts = np.maximum(1, -(-tokens.counts // room))
    text = np.repeat(np.arange(len(counts)), counts)
    segment = np.arange(len(text)) - np.repeat(counts.cumsum() - counts, counts)
    held = np.minimum(room, tokens.counts[text] - segment * room)  # special tokens not counted
    borders = np.concatenate([[0], (held + len(before) + len(after)).cumsum()])
    place = np.arange(held.sum()) + np.repeat(borders[:-1] + len(before) - (held.cumsum() - held), held)
    ids, starts, ends = (np.full(borders[-1], -1, np.int32) for _ in range(3))
    ids[borders[:-1, None] + np.arange(len(before))] = before
    ids[borders[1:, None] - np.arange(len(after), 0, -1)] = after
    ids[place], starts[place], ends[place] = tokens.ids, tokens.starts, tokens.ends
    return Windows(text, segment, borders, ids, starts, ends)
