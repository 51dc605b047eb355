"""Which notes are read, and how a long one is cut into windows of tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .cleaning import CleaningName, clean_with_offsets, steps
from .tables import SEGMENT_SCHEMA, check_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH = 256  # notes that are tokenised at a time: their offsets are Python objects


@dataclass(frozen=True)
class FilteredNotes:
    """What :func:`filter_notes` kept, and how many it did not.

    Attributes:
        notes: The notes that stay.
        too_short: Notes left out for their length.
        excluded: Category → notes left out for it; the empty name stands for notes without one.
    """

    notes: pa.Table
    too_short: int
    excluded: dict[str, int]


def filter_notes(
    notes: pa.Table,
    *,
    min_characters: int = 50,
    categories: Collection[str] | None = None,
    exclude_categories: Collection[str] = (),
) -> FilteredNotes:
    """Leaves out notes that are too short or of an unwanted type (BERT-XML: Zhang, Liu & Razavian 2020, §3.1).

    Types are compared without regard to case and surrounding spaces. BERT-XML excludes erroneous, student-generated
    and miscellaneous notes; what these are called differs from hospital to hospital, so none is excluded by default.

    Args:
        notes: NOTES.
        min_characters: Shortest note that stays, white space at both ends not counted.
        categories: Keep these types only; ``None`` keeps all.
        exclude_categories: Types to leave out.

    Raises:
        ValueError: ``min_characters`` is negative, or a type is both kept and excluded.
        EhrDataError: ``notes`` breaks the contract.
    """
    if min_characters < 0:
        raise ValueError(f"`min_characters` must not be negative, got {min_characters}.")
    wanted = None if categories is None else {name.strip().lower() for name in categories}
    unwanted = {name.strip().lower() for name in exclude_categories}
    if wanted and wanted & unwanted:
        raise ValueError(f"`categories` and `exclude_categories` must differ; both have {sorted(wanted & unwanted)}.")
    notes = check_notes(notes)
    category = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(notes["category"], "")))
    of_type = pc.invert(pc.is_in(category, pa.array(sorted(unwanted), pa.string())))
    if wanted is not None:
        of_type = pc.and_(of_type, pc.is_in(category, pa.array(sorted(wanted), pa.string())))
    long_enough = pc.greater_equal(pc.utf8_length(pc.utf8_trim_whitespace(notes["text"])), min_characters)
    counts = pc.value_counts(category.filter(pc.invert(of_type))).to_pylist()
    return FilteredNotes(
        notes=notes.filter(pc.and_(of_type, long_enough)),
        too_short=pc.sum(pc.and_not(of_type, long_enough), min_count=0).as_py(),
        excluded={row["values"]: row["counts"] for row in counts},
    )


def segment_notes(
    notes: pa.Table, tokenizer: PreTrainedTokenizerFast, *, max_length: int = 512, cleaning: CleaningName = "none"
) -> pa.Table:
    """Cuts notes into windows of tokens that do not overlap (BERT-XML, §3.1); nothing is left out.

    A note of k tokens gives ``ceil(k / (max_length - s))`` windows, where s is the number of special tokens that the
    tokenizer puts around each; an empty note gives one window of special tokens only.

    Args:
        notes: NOTES.
        tokenizer: Any fast tokenizer.
        max_length: Tokens of a window, special ones included.
        cleaning: An option of :func:`hf_ehr.notes.clean`, applied before the tokenizer; the offsets are those of the
            original text all the same.

    Returns:
        SEGMENTS (``SEGMENT_SCHEMA``): rows in the order of ``notes``, the windows of a note one after the other.

    Raises:
        ValueError: The tokenizer is not a fast one, already cleans text itself, or leaves no room in ``max_length``.
        EhrDataError: ``notes`` breaks the contract.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"`tokenizer` must be a fast one (it keeps offsets), got {type(tokenizer).__name__}.")
    own = tokenizer.init_kwargs.get("cleaning", "none")
    if steps(cleaning) and own != "none":
        raise ValueError(f"`cleaning` must be none: the tokenizer itself cleans ({own}). Leave it out.")
    before, after = _special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"`max_length` must exceed the {len(before) + len(after)} special tokens of a window, got {max_length}."
        )
    notes = check_notes(notes)
    batches = notes.select(["note_id", "text"]).to_batches(max_chunksize=_BATCH)
    progress = tqdm(batches, desc="Segmenting", unit="batch", disable=len(batches) < 4)
    parts = [
        _windows(batch["note_id"], *_tokens(batch, tokenizer, cleaning), before, after, room) for batch in progress
    ]
    return pa.concat_tables(parts) if parts else SEGMENT_SCHEMA.empty_table()


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """The ids that the tokenizer puts before and behind a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, special = np.array(encoded["input_ids"]), np.array(encoded["special_tokens_mask"], bool)
    own = np.flatnonzero(~special)
    return ids[: own[0]], ids[own[-1] + 1 :]


def _tokens(
    batch: pa.RecordBatch, tokenizer: PreTrainedTokenizerFast, cleaning: CleaningName
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(notes,)`` token counts, then ``(tokens,)`` ids and original offsets of the whole batch."""
    texts = batch["text"].to_pylist()
    cleaned = [clean_with_offsets(text, cleaning) for text in texts] if steps(cleaning) else None
    encoded = tokenizer(
        [one.text for one in cleaned] if cleaned else texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    counts = np.array([len(ids) for ids in encoded["input_ids"]], np.int64)
    ids = np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32, counts.sum())
    pairs = chain.from_iterable(chain.from_iterable(encoded["offset_mapping"]))
    starts, ends = np.fromiter(pairs, np.int32, 2 * counts.sum()).reshape(-1, 2).T
    if cleaned:
        cuts = counts.cumsum()[:-1]
        spans = zip(cleaned, np.split(starts, cuts), np.split(ends, cuts), strict=True)
        originals = [one.to_original(first, last) for one, first, last in spans]
        starts, ends = (np.concatenate(part) for part in zip(*originals, strict=True))
    return counts, ids, starts, ends


def _windows(
    note_ids: pa.Array,
    counts: np.ndarray,
    ids: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    room: int,
) -> pa.Table:
    """SEGMENTS of a batch: every window is ``before``, up to ``room`` tokens, ``after``."""
    windows = np.maximum(1, -(-counts // room))
    note = np.repeat(np.arange(len(counts)), windows)
    segment = np.arange(len(note)) - np.repeat(windows.cumsum() - windows, windows)
    held = np.minimum(room, counts[note] - segment * room)  # tokens of each window, special ones not counted
    offsets = np.concatenate([[0], (held + len(before) + len(after)).cumsum()])
    place = np.arange(held.sum()) + np.repeat(offsets[:-1] + len(before) - (held.cumsum() - held), held)
    columns = []
    for values, fill in ((ids, None), (starts, -1), (ends, -1)):
        flat = np.full(offsets[-1], -1, np.int32)
        if fill is None:
            flat[offsets[:-1, None] + np.arange(len(before))] = before
            flat[offsets[1:, None] - np.arange(len(after), 0, -1)] = after
        flat[place] = values
        columns.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat)))
    return pa.table([note_ids.take(pa.array(note)), pa.array(segment, pa.int32()), *columns], schema=SEGMENT_SCHEMA)
