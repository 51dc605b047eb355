"""Which notes are read, and how a long one is cut into windows of tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from hf_ehr.models.note_windows import TextTokens, Windows, cut_windows, text_tokens, window_frame

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
    frame = window_frame(tokenizer, max_length)
    own = tokenizer.init_kwargs.get("cleaning", "none")
    if steps(cleaning) and own != "none":
        raise ValueError(f"`cleaning` must be none: the tokenizer itself cleans ({own}). Leave it out.")
    notes = check_notes(notes)
    batches = notes.select(["note_id", "text"]).to_batches(max_chunksize=_BATCH)
    progress = tqdm(batches, desc="Segmenting", unit="batch", disable=len(batches) < 4)
    parts = [
        _table(batch["note_id"], cut_windows(_tokens(batch["text"].to_pylist(), tokenizer, cleaning), frame))
        for batch in progress
    ]
    return pa.concat_tables(parts) if parts else SEGMENT_SCHEMA.empty_table()


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerFast, cleaning: CleaningName) -> TextTokens:
    """Tokens of cleaned texts with their places in the original ones."""
    if not steps(cleaning):
        return text_tokens(texts, tokenizer)
    cleaned = [clean_with_offsets(text, cleaning) for text in texts]
    tokens = text_tokens([one.text for one in cleaned], tokenizer)
    cuts = tokens.counts.cumsum()[:-1]
    spans = zip(cleaned, np.split(tokens.starts, cuts), np.split(tokens.ends, cuts), strict=True)
    originals = [one.to_original(first, last) for one, first, last in spans]
    starts, ends = (np.concatenate(part) for part in zip(*originals, strict=True))
    return tokens._replace(starts=starts, ends=ends)


def _table(note_ids: pa.Array, windows: Windows) -> pa.Table:
    """SEGMENTS of the windows of a batch."""
    borders = pa.array(windows.borders, pa.int32())
    lists = [pa.ListArray.from_arrays(borders, pa.array(one)) for one in (windows.ids, windows.starts, windows.ends)]
    columns = [note_ids.take(pa.array(windows.texts)), pa.array(windows.segments, pa.int32()), *lists]
    return pa.table(columns, schema=SEGMENT_SCHEMA)
