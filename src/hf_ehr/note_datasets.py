"""Prepared notes × tokenizer → examples: one row per note for coding, one row per window for pre-training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ._example_writer import ExampleWriter
from ._histories import total_before
from ._note_pairs import Template, Windows, pretraining_rows, tokens_of
from .datasets import split_patients
from .notes.cleaning import CleaningName
from .notes.corpus import segment_notes
from .notes.folder import NoteFolder, id_array
from .notes.labels import label_ids
from .schema import EhrDataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CHARACTERS_PER_CHUNK = 1 << 24
"""Text that is tokenised, and whose windows exchange their halves, at a time."""
_CHARACTERS_OF_A_NOTE = 1 << 13  # what a note costs beside its own
_OFFICIAL_TRAIN = {"train": 0.8, "validation": 0.2}


def split_notes(folder: NoteFolder, seed: int = 0) -> dict[str, pa.Array]:
    """Splits notes by patient: no patient is in two splits.

    Where the source has splits of its own, ``test`` is its test part and its train part is cut 80:20 into ``train``
    and ``validation``; otherwise the shares are 7:1:2. Both go by :func:`hf_ehr.datasets.split_patients`, so a
    patient's place depends on its id and the seed alone. A patient with notes in several official parts belongs to
    the first of test, train, unlabelled; its notes in the others are in no split, and counted in a warning.

    Args:
        folder: Prepared notes.
        seed: Another seed gives another split.

    Returns:
        Note ids of ``train``, ``validation``, ``test``, and of ``unlabelled`` where the source has such notes; in the
        order of the folder.
    """
    notes = pa.concat_tables(folder.notes(columns=["note_id", "subject_id", "split"]))
    subjects = notes["subject_id"].to_numpy()
    official = notes["split"].null_count < notes.num_rows
    part = notes["split"].to_numpy() if official else np.full(len(subjects), "train", object)
    if not official:
        patients = split_patients(subjects, seed=seed)
    else:
        patients = {"test": np.unique(subjects[part == "test"])}
        train = np.setdiff1d(subjects[part == "train"], patients["test"])
        patients |= split_patients(train, seed=seed, fractions=_OFFICIAL_TRAIN)
        others = np.concatenate(list(patients.values()))
        patients["unlabelled"] = np.setdiff1d(subjects[part == "unlabelled"], others)
    kept = {name: np.isin(subjects, ids) for name, ids in patients.items()}
    if official:
        kept = {name: mask & (part == ("train" if name == "validation" else name)) for name, mask in kept.items()}
        left_out = len(subjects) - sum(int(mask.sum()) for mask in kept.values())
        if left_out:
            logger.warning("%d notes are left out: their patients have notes in another official part.", left_out)
    order = [name for name in ("train", "validation", "test", "unlabelled") if name in kept]
    ids = notes["note_id"].combine_chunks()
    return {name: ids.filter(pa.array(kept[name])) for name in order if name != "unlabelled" or kept[name].any()}


def build_coding_examples(
    folder: NoteFolder,
    tokenizer: PreTrainedTokenizerFast,
    codes: Sequence[str],
    *,
    note_ids: Any,
    max_length: int = 512,
    max_segments: int | None = None,
    cleaning: CleaningName = "none",
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """One example per note: all its windows, and the ids of its codes. Notes without a code in scope stay.

    Args:
        folder: Prepared notes.
        tokenizer: Any fast tokenizer.
        codes: The codes in scope; the position is the label id. Ones that no note has are fine.
        note_ids: Notes to take, e.g. one split.
        max_length: Tokens of a window, special ones included (:func:`hf_ehr.notes.segment_notes`).
        max_segments: Windows of a note that are kept, the first ones; ``None`` keeps all. How many notes were cut is
            logged and in ``dataset.info.description``.
        cleaning: An option of :func:`hf_ehr.notes.clean`; leave it out for a tokenizer that cleans itself.
        cache_dir: Folder for the Arrow files that the result is memory-mapped from. ``None`` keeps it in memory.

    Returns:
        Columns ``note_id``, ``subject_id``, ``input_ids`` (the windows one after the other, with their special
        tokens), ``segment_lengths`` (tokens of each window), ``labels`` (ascending label ids, maybe none).

    Raises:
        ValueError: ``codes`` repeats a code, ``max_segments`` is below 1, or :func:`hf_ehr.notes.segment_notes`
            refuses the tokenizer, the length or the cleaning.
        EhrDataError: A note of ``note_ids`` is not in the folder, or none is given.
    """
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"`max_segments` must be at least 1, got {max_segments}. Leave it out to keep all windows.")
    counts: Counter[str] = Counter()
    writer = ExampleWriter(_coding_features(), None if cache_dir is None else Path(cache_dir))
    for shard, notes in _shards(folder, note_ids):
        labels = label_ids(notes, folder.labels(shard), codes)
        writer.add(
            _coding_rows(chunk, chunk_labels, tokenizer, max_length, max_segments, cleaning, counts)
            for chunk, chunk_labels in _chunks(notes, labels)
        )
    if counts["cut"]:
        logger.warning("%d of %d notes were cut to %d windows.", counts["cut"], counts["notes"], max_segments)
    cut = "" if max_segments is None else f"; cut to {max_segments} windows: {counts['cut']}"
    return writer.finish(f"{counts['notes']} notes{cut}.")


def build_pretraining_examples(
    folder: NoteFolder,
    tokenizer: PreTrainedTokenizerFast,
    *,
    note_ids: Any,
    max_length: int = 512,
    next_sentence: bool = True,
    seed: int = 0,
    cleaning: CleaningName = "none",
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """One example per window of a note; under ``next_sentence`` it is a pair of halves (BERT-XML, §3.3).

    The paper does not say how pairs are made. Here a window is cut in two at the start of a sentence or line nearest
    to a uniform place (a line break, a full stop, question or exclamation mark before white space, or one of their
    Chinese forms; a window without one is cut between any two tokens). With probability ½ the second half is replaced
    by the end of a window of another patient, from the start of one of its sentences on: neither where a half starts
    or ends nor its length may tell its kind. Of 256 such windows one is taken that ends as the own one does (where
    its note ends, or in its midst) and whose part is the longest that is no longer than the half that it replaces. A
    window without a sentence start gets a part of just that length. No token of a true pair is cut off.

    Left out and counted: windows without a token, or of fewer than two under ``next_sentence``.

    Args:
        folder: Prepared notes.
        tokenizer: Any fast tokenizer; pairs are laid out as its template says.
        note_ids: Notes to take: training (and uncoded) ones, never those of validation or test patients.
        max_length: Most tokens of an example, special ones included.
        next_sentence: Whether to make pairs.
        seed: Seed of the cuts and of the choice of pairs.
        cleaning: As in :func:`build_coding_examples`.
        cache_dir: As in :func:`build_coding_examples`.

    Returns:
        Columns ``input_ids``, ``token_type_ids`` and, under ``next_sentence``, ``next_sentence_label``: 0 where the
        second half continues the first, 1 where it is of another patient.

    Raises:
        ValueError: As in :func:`build_coding_examples`.
        EhrDataError: A note of ``note_ids`` is not in the folder, or no example is left.
    """
    template = Template.of(tokenizer, pair=next_sentence)
    room = max_length - template.specials
    if room < 1 + next_sentence:
        raise ValueError(
            f"`max_length` must leave room for {1 + next_sentence} tokens beside {template.specials} special ones, "
            f"got {max_length}."
        )
    counts: Counter[str] = Counter()
    writer = ExampleWriter(_pretraining_features(next_sentence), None if cache_dir is None else Path(cache_dir))
    for shard, notes in _shards(folder, note_ids):
        writer.add(
            pretraining_rows(Windows.of(chunk, tokenizer, room, cleaning), template, [seed, shard, number], counts)
            for number, (chunk, _) in enumerate(_chunks(notes))
        )
    built = counts.pop("examples")
    left_out = ", ".join(f"{count} × {reason}" for reason, count in counts.items() if count) or "none"
    if not built:
        raise EhrDataError(f"No example is left ({left_out}). Check `note_ids` and `max_length`.")
    return writer.finish(f"{built} examples; left out: {left_out}.")


def _shards(folder: NoteFolder, note_ids: Any) -> Iterator[tuple[int, pa.Table]]:
    """Number and NOTES of each shard that holds some of ``note_ids``."""
    wanted = pc.unique(id_array(note_ids))
    if not len(wanted):
        raise EhrDataError("`note_ids` must name at least one note, got none. Check the split.")
    there = pa.concat_tables(folder.notes(columns=["note_id"]))["note_id"].combine_chunks()
    missing = pc.index_in(wanted, value_set=there).null_count
    if missing:
        raise EhrDataError(f"`note_ids` must be notes of {folder.path}; {missing} of {len(wanted)} are not.")
    shards = folder.info.shards
    tables = tqdm(folder.notes(wanted), total=shards, desc="Building examples", unit="shard", disable=shards < 2)
    for shard, notes in enumerate(tables):
        if notes.num_rows:
            yield shard, notes


def _chunks(notes: pa.Table, labels: pa.ListArray | None = None) -> Iterator[tuple[pa.Table, pa.ListArray | None]]:
    """NOTES of a shard, and their labels, in nearly equal parts of about ``CHARACTERS_PER_CHUNK``."""
    ends = np.cumsum(pc.utf8_length(notes["text"]).to_numpy() + np.int64(_CHARACTERS_OF_A_NOTE))
    parts = -(-int(ends[-1]) // CHARACTERS_PER_CHUNK)
    bounds = np.searchsorted(ends, np.arange(parts + 1) * (ends[-1] / parts))
    bounds[-1] = notes.num_rows
    for first, last in pairwise(np.unique(bounds).tolist()):
        yield notes.slice(first, last - first), None if labels is None else labels.slice(first, last - first)


# Coding


def _coding_features() -> datasets.Features:
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    names = {"note_id": Value("string"), "subject_id": Value("int64")}
    return Features({**names, "input_ids": ids, "segment_lengths": ids, "labels": ids})


def _coding_rows(
    notes: pa.Table,
    labels: pa.ListArray | None,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    max_segments: int | None,
    cleaning: CleaningName,
    counts: Counter[str],
) -> pa.Table:
    """The examples of a chunk of notes."""
    segments = segment_notes(notes, tokenizer, max_length=max_length, cleaning=cleaning)
    number = segments["segment"].to_numpy()
    if max_segments is not None:
        counts["cut"] += int((number == max_segments).sum())
        segments = segments.filter(pa.array(number < max_segments))
        number = segments["segment"].to_numpy()
    counts["notes"] += notes.num_rows
    windows, tokens, _ = tokens_of(segments)
    bounds = np.append(np.flatnonzero(number == 0), len(number))  # the windows of each note
    return pa.table(
        {
            "note_id": notes["note_id"],
            "subject_id": notes["subject_id"],
            "input_ids": _lists(total_before(windows)[bounds], tokens),
            "segment_lengths": _lists(bounds, windows),
            "labels": labels,
        }
    )


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


# Pre-training


def _pretraining_features(next_sentence: bool) -> datasets.Features:
    from datasets import Features, List, Value

    label = {"next_sentence_label": Value("int64")} if next_sentence else {}
    return Features({"input_ids": List(Value("int32")), "token_type_ids": List(Value("int8")), **label})
