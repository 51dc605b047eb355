"""Notes with named entities × tokenizer → one example per note, with the tags of its words.

Words are those of :func:`hf_ehr.entity_tags.words_of`. A word's tag stands at its first token; the other tokens,
and special ones, have none. A note is cut into windows of tokens, none of which is left out, so every word that the
tokenizer does not swallow has one tag and one prediction, wherever the borders between windows fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from ._example_writer import ExampleWriter
from .entity_tags import Entity, entities_of_tags, tags_of_entities, words_of
from .notes.cleaning import CleaningName
from .notes.corpus import segment_notes
from .notes.tables import check_notes
from .schema import EhrDataError, check_schema

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

ENTITY_TABLE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("type", pa.string(), nullable=False),
    ]
)
"""One row per entity: characters ``[start, end)`` of the note's original text."""

_NOTES_AT_ONCE = 256
_COLUMNS = ("input_ids", "segment_lengths", "word_mask", "labels", "word_starts", "word_ends")


def tag_names(types: Iterable[str]) -> list[str]:
    """The IOB2 tags of some types of entities; the place of a tag is its id.

    >>> tag_names(["test", "problem"])
    ['O', 'B-problem', 'I-problem', 'B-test', 'I-test']
    """
    return ["O", *(f"{part}-{kind}" for kind in sorted(set(types)) for part in "BI")]


def entities_of_spans(spans: pa.Table) -> pa.Table:
    """ENTITIES of the SPANS of notes with known evidence: a sign is a drug, ``treatment``; others are a ``problem``.

    Also what is negated, or of a relative, names a problem, as the guidelines of i2b2-2010 have it.
    """
    types = np.where(spans["kind"].to_numpy() == "sign", "treatment", "problem")
    columns = [spans["note_id"], spans["start"], spans["end"], pa.array(types, pa.string())]
    return pa.table(columns, schema=ENTITY_TABLE_SCHEMA)


def entities_by_note(notes: pa.Table, entities: pa.Table) -> list[list[Entity]]:
    """The ENTITIES of each of the NOTES, in their order.

    Raises:
        EhrDataError: An entity is of no note, or does not lie in its text.
    """
    table = check_schema(entities, ENTITY_TABLE_SCHEMA, "ENTITIES")
    places = {note_id: place for place, note_id in enumerate(notes["note_id"].to_pylist())}
    sizes = [len(text) for text in notes["text"].to_pylist()]
    found: list[list[Entity]] = [[] for _ in sizes]
    rows = zip(*(table[name].to_pylist() for name in ENTITY_TABLE_SCHEMA.names), strict=True)
    for note_id, start, end, kind in rows:
        place = places.get(note_id)
        if place is None or not 0 <= start < end <= sizes[place]:
            raise EhrDataError(
                "`entities` must lie in the text of a note of `notes`, got one that does not. Give characters of the "
                "original text, [start, end), and all notes."
            )
        found[place].append(Entity(start, end, kind))
    return found


def build_entity_examples(
    notes: pa.Table,
    tokenizer: PreTrainedTokenizerFast,
    tags: Sequence[str],
    *,
    entities: pa.Table | None = None,
    max_length: int = 512,
    cleaning: CleaningName = "none",
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """One example per note: all its windows, where its words begin, and their tags.

    Args:
        notes: NOTES; ``note_id``, ``subject_id`` and ``text`` are needed.
        tokenizer: Any fast tokenizer.
        tags: Names of the tags, as :func:`tag_names` makes them.
        entities: ENTITIES of the notes (``ENTITY_TABLE_SCHEMA``); without them there are no ``labels``.
        max_length: Tokens of a window, special ones included.
        cleaning: An option of :func:`hf_ehr.notes.clean`; entities are in characters of the original text all the
            same.
        cache_dir: Folder for the Arrow files that the result is memory-mapped from. ``None`` keeps it in memory.

    Returns:
        Columns ``note_id``, ``subject_id``, ``input_ids`` (the windows one after the other), ``segment_lengths``
        (tokens of each window), ``word_mask`` (1 at the first token of each word), ``labels`` (ids of tags at these,
        -100 elsewhere), ``word_starts`` and ``word_ends`` (characters of the words that have a token).

    Raises:
        ValueError: As :func:`hf_ehr.notes.segment_notes`.
        EhrDataError: As :func:`entities_by_note`, or a type of entity has no tag.
    """
    notes = check_notes(notes)
    by_note = None if entities is None else entities_by_note(notes, entities)
    ids = {tag: index for index, tag in enumerate(tags)}
    unknown = {one.type for given in by_note or () for one in given if f"B-{one.type}" not in ids}
    if unknown:
        raise EhrDataError(
            f"`tags` must have B- and I- of every type, got none of {sorted(unknown)}. Use `tag_names`."
        )
    writer = ExampleWriter(_features(by_note is not None), None if cache_dir is None else Path(cache_dir))
    for first in range(0, notes.num_rows, _NOTES_AT_ONCE):
        part = notes.slice(first, _NOTES_AT_ONCE)
        given = None if by_note is None else by_note[first : first + _NOTES_AT_ONCE]
        writer.add([_rows(part, given, tokenizer, ids, max_length, cleaning)])
    return writer.finish(f"{notes.num_rows} notes.")


def _features(labelled: bool) -> datasets.Features:
    from datasets import Features, List, Value

    names = {"note_id": Value("string"), "subject_id": Value("int64")}
    lists = [name for name in _COLUMNS if labelled or name != "labels"]
    return Features(names | {name: List(Value("int32")) for name in lists})


def _rows(
    notes: pa.Table,
    entities: list[list[Entity]] | None,
    tokenizer: PreTrainedTokenizerFast,
    ids: Mapping[str, int],
    max_length: int,
    cleaning: CleaningName,
) -> pa.Table:
    """The examples of some notes."""
    segments = segment_notes(notes, tokenizer, max_length=max_length, cleaning=cleaning)
    number = segments["segment"].to_numpy()
    bounds = np.append(np.flatnonzero(number == 0), len(number))
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for place, text in enumerate(notes["text"].to_pylist()):
        windows = segments.slice(bounds[place], bounds[place + 1] - bounds[place])
        tokens, starts, ends = (_flat(windows, name) for name in ("input_ids", "starts", "ends"))
        words = words_of(text)
        mask, owners = first_tokens(starts, ends, words)
        labels = np.full(len(tokens), -100)
        if entities is not None:
            tags = tags_of_entities(entities[place], words)
            labels[mask] = [ids[tags[owner]] for owner in owners]
        lengths = windows["input_ids"].combine_chunks().value_lengths().to_numpy()
        kept = np.array(words, np.int64).reshape(-1, 2)[owners]
        values = (tokens, lengths, mask.astype(np.int32), labels, kept[:, 0], kept[:, 1])
        for name, value in zip(_COLUMNS, values, strict=True):
            columns[name].append(value)
    if entities is None:
        del columns["labels"]
    lists = {name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}
    return pa.table({"note_id": notes["note_id"], "subject_id": notes["subject_id"], **lists})


def _flat(windows: pa.Table, name: str) -> np.ndarray:
    return windows[name].combine_chunks().flatten().to_numpy()


def first_tokens(
    starts: np.ndarray, ends: np.ndarray, words: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are the first of a word.

    Args:
        starts: First character of each token of a note, -1 of special ones, ``(tokens,)``.
        ends: The character behind each, ``(tokens,)``.
        words: Characters of each word, ascending.

    Returns:
        ``(tokens,)`` bool, and the number of the word of each of these, ascending. A word that shares its first token
        with the one before, or has none, is not among them.
    """
    if not len(words):
        return np.zeros(len(starts), bool), np.zeros(0, np.int64)
    word_starts, word_ends = np.array(words, np.int64).T
    # The first word that ends behind the token's start; a token may begin with the space before its word.
    owner = np.minimum(np.searchsorted(word_ends, starts, side="right"), len(words) - 1)
    inside = (starts >= 0) & (ends > word_starts[owner]) & (starts < word_ends[owner])
    place = np.flatnonzero(inside)
    new = np.append(True, np.diff(owner[place]) > 0)[: len(place)]
    first = np.zeros(len(starts), bool)
    first[place[new]] = True
    return first, owner[place[new]]


class EntityCollator:
    """Rows of :func:`build_entity_examples` → input of a tagger, windows padded.

    With the stock ``Trainer`` set ``remove_unused_columns=False``.

    Args:
        tokenizer: Gives the padding id.

    Raises:
        ValueError: The tokenizer has no padding token.
    """

    def __init__(self, tokenizer: Any):
        if tokenizer.pad_token_id is None:
            raise ValueError("`tokenizer` must have a padding token, got None. Set `pad_token`.")
        self.padding = {"input_ids": tokenizer.pad_token_id, "word_mask": 0, "labels": -100, "attention_mask": 0}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of lists or numpy arrays to a batch.

        Returns:
            ``input_ids``, ``attention_mask``, ``word_mask`` and, if the rows have any, ``labels``, (windows, length)
            int64; ``note_index`` (windows,) int64.

        Raises:
            ValueError: A row lacks a column.
        """
        names = [name for name in ("input_ids", "word_mask", "labels") if name != "labels" or name in rows[0]]
        if any(name not in row for row in rows for name in (*names, "segment_lengths")):
            raise ValueError(
                f"Each row must have {', '.join(names)} and segment_lengths, got {sorted(rows[0])}. Pass the rows of "
                "`build_entity_examples`, and to a `Trainer` `remove_unused_columns=False`."
            )
        sizes = [size for row in rows for size in np.asarray(row["segment_lengths"]).tolist()]
        flat = {
            name: torch.from_numpy(np.concatenate([np.asarray(row[name], np.int64) for row in rows])) for name in names
        }
        flat["attention_mask"] = torch.ones_like(flat["input_ids"])
        batch = {
            name: pad_sequence(values.split(sizes), batch_first=True, padding_value=self.padding[name])
            for name, values in flat.items()
        }
        counts = torch.tensor([len(row["segment_lengths"]) for row in rows])
        return batch | {"note_index": torch.arange(len(rows)).repeat_interleave(counts)}


def predicted_entities(model: Any, examples: Any, collator: EntityCollator, batch_size: int = 8) -> list[list[Entity]]:
    """The entities that a tagger finds in notes, in characters of the original text.

    Args:
        model: An ``EhrTaggerForTokenClassification``, whose ``config.id2label`` names the tags.
        examples: Of :func:`build_entity_examples`; labels are not read.
        collator: Of the same tokenizer.
        batch_size: Notes at a time.
    """
    from tqdm.auto import tqdm

    was_training = model.training
    model.eval()
    found = []
    for first in tqdm(range(0, len(examples), batch_size), desc="Tagging", unit="batch", disable=len(examples) < 64):
        rows = [examples[place] for place in range(first, min(first + batch_size, len(examples)))]
        batch = {name: value.to(model.device) for name, value in collator(rows).items() if name != "labels"}
        with torch.no_grad():
            tags = model(**batch).tags
        words = tags[tags >= 0].tolist()
        for row in rows:
            spans = list(zip(row["word_starts"], row["word_ends"], strict=True))
            names = [model.config.id2label[index] for index in words[: len(spans)]]
            del words[: len(spans)]
            found.append([Entity(spans[a][0], spans[b - 1][1], kind) for a, b, kind in entities_of_tags(names)])
    model.train(was_training)
    return found


__all__ = [
    "ENTITY_TABLE_SCHEMA",
    "EntityCollator",
    "build_entity_examples",
    "entities_by_note",
    "entities_of_spans",
    "first_tokens",
    "predicted_entities",
    "tag_names",
]
