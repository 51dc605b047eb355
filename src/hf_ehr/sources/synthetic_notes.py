"""Synthetic notes whose evidence is known: NOTES, LABELS, SPANS, and the truth about every label.

A note has sections of sentences that mean nothing. Into it are put, at places uniform over its length, one to three
mentions of each of its codes (official term, synonym, abbreviation, misspelling, or a drug that only this code has)
and distractors that name other codes (negated, of a relative, ruled out, long past, a sibling for comparison). Some
positives have no mention. Codes and their descriptions are real ICD-10-CM, everything said about them is made up:
never take a sentence for medicine. Every draw is a function of (seed, subject_id): a patient is the same in any shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from hf_ehr.notes.tables import DISTRACTOR_KINDS, LABEL_TABLE_SCHEMA, NOTE_TABLE_SCHEMA, SPAN_TABLE_SCHEMA
from hf_ehr.schema import atomic_folder, shard_name, write_parquet
from hf_ehr.sources._synthetic_note_phrases import DISTRACTORS, MENTIONS, SECTIONS, SIGNS, words
from hf_ehr.sources._synthetic_note_worlds import (
    FORMS,
    MENTIONS_PER_CODE,
    NOTES_PER_PATIENT,
    NoteWorld,
    SyntheticNotesConfig,
    draw_note_world,
    missed_share,
)

__all__ = [
    "TRUTH_SCHEMA", "SyntheticNotes", "SyntheticNotesConfig", "code_table", "generate_notes", "missed_share",
    "write_notes",
]  # fmt: skip

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("mentions", pa.int32(), nullable=False),  # 0: the text says nothing about this label
        pa.field("first_word", pa.int32()),  # words and punctuation marks before the first mention; null without one
        pa.field("note_words", pa.int32(), nullable=False),  # words and punctuation marks of the note
    ]
)
"""One row per label, in the order of LABELS."""

_CATEGORIES = ("discharge summary", "progress note", "telephone encounter")
_DAY = np.timedelta64(1, "D")
_FIRST_DAY = np.datetime64("2015-01-01", "us")
_SHORTEST = 30  # words about nothing that the shortest note has


@dataclass(frozen=True)
class SyntheticNotes:
    """NOTES, LABELS and SPANS (:mod:`hf_ehr.notes.tables`) and their truth (``TRUTH_SCHEMA``)."""

    notes: pa.Table
    labels: pa.Table
    spans: pa.Table
    truth: pa.Table


def generate_notes(config: SyntheticNotesConfig, index: int = 0, shards: int = 1) -> SyntheticNotes:
    """The notes of the patients with ``subject_id % shards == index``.

    Args:
        config: Size, seed and strength of everything.
        index: Number of the shard.
        shards: How many there are; memory is that of one shard.

    Raises:
        ValueError: ``index`` is not among 0 … shards - 1.
    """
    if not 0 <= index < shards:
        raise ValueError(f"`index` must be between 0 and {shards - 1} (`shards` - 1), got {index}.")
    world = draw_note_world(config)
    rows = _Rows()
    for subject in range(index or shards, config.patients + 1, shards):
        _add_patient(rows, config, world, subject)
    return rows.tables()


def write_notes(config: SyntheticNotesConfig, directory: str | Path, shards: int = 1) -> Path:
    """Writes the whole world: ``notes/``, ``labels/``, ``spans/``, ``truth/`` by shard, and ``codes.parquet``.

    Returns:
        ``directory``, which appears when it is whole.

    Raises:
        FileExistsError: ``directory`` exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"`directory` must not exist yet, got {directory}. Choose another or remove it.")
    with atomic_folder(directory) as folder:
        for index in tqdm(range(shards), desc="Writing notes", unit="shard", disable=shards < 2):
            for name, table in vars(generate_notes(config, index, shards)).items():
                write_parquet(table, folder / name / shard_name(index, shards))
        write_parquet(code_table(config), folder / "codes.parquet")
    return directory


def code_table(config: SyntheticNotesConfig) -> pa.Table:
    """The truth about the codes.

    Returns:
        ``code``, ``description``, ``family`` (siblings share it), ``opaque`` (mentions share no word with the
        description), ``probability`` (that a note has it), ``expected_notes``, and what notes call it: ``term``,
        ``synonym``, ``abbreviation``, ``misspelling``, ``sign``.
    """
    world = draw_note_world(config)
    per_patient = sum(share * (count + 1) for count, share in enumerate(NOTES_PER_PATIENT))
    return pa.table(
        {
            "code": world.codes,
            "description": world.descriptions,
            "family": world.family,
            "opaque": world.opaque,
            "probability": world.probability,
            "expected_notes": world.probability * config.patients * per_patient,
            **dict(zip(FORMS, zip(*world.forms, strict=True), strict=True)),
        }
    )


class _Rows:
    """Collects the rows of the four tables."""

    def __init__(self) -> None:
        self.notes: list[tuple] = []
        self.labels: list[tuple] = []
        self.spans: list[tuple] = []
        self.truth: list[tuple] = []

    def tables(self) -> SyntheticNotes:
        schemas = (NOTE_TABLE_SCHEMA, LABEL_TABLE_SCHEMA, SPAN_TABLE_SCHEMA, TRUTH_SCHEMA)
        rows = (self.notes, self.labels, self.spans, self.truth)
        return SyntheticNotes(*(_table(part, schema) for part, schema in zip(rows, schemas, strict=True)))


def _table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)], schema=schema)


@dataclass(frozen=True)
class _Mention:
    """A sentence about a code: where it goes (0 … 1), around which words, and what they mean."""

    place: float
    sentence: str
    form: str
    code: int
    kind: str


def _add_patient(rows: _Rows, config: SyntheticNotesConfig, world: NoteWorld, subject: int) -> None:
    rng = np.random.default_rng([config.seed, 0xA117E5, subject])
    count = 1 + int(np.searchsorted(np.cumsum(NOTES_PER_PATIENT)[:-1], rng.random()))
    days = rng.integers(0, 2_000) + np.cumsum(rng.integers(20, 400, count))
    for number in range(count):
        note_id = f"{subject}-{number}"
        category = _CATEGORIES[rng.integers(len(_CATEGORIES))]
        positives = np.flatnonzero(rng.random(len(world.codes)) < world.probability)
        supported = positives[rng.random(len(positives)) >= config.unsupported]
        mentions = [*_draw_mentions(rng, world, supported), *_draw_distractors(rng, config, world, positives)]
        target = world.median_words * np.exp(config.length_sigma * rng.standard_normal())
        text, spans = _write(rng, world, sorted(mentions, key=lambda mention: mention.place), target)
        rows.notes.append(
            (note_id, subject, 100 * subject + number, _FIRST_DAY + int(days[number]) * _DAY, category, text)
        )
        rows.spans += [(note_id, world.codes[code], start, end, kind) for code, start, end, kind in spans]
        _add_labels(rows, world, note_id, text, positives, spans)


def _add_labels(
    rows: _Rows, world: NoteWorld, note_id: str, text: str, positives: np.ndarray, spans: list[tuple]
) -> None:
    """LABELS and truth of a note; a positive without a mention is ``imputed``."""
    length = len(words(text))
    for code in positives.tolist():
        starts = [start for owner, start, _, kind in spans if owner == code and kind not in DISTRACTOR_KINDS]
        first = len(words(text[: min(starts)])) if starts else None
        rows.labels.append((note_id, world.codes[code], "native" if starts else "imputed"))
        rows.truth.append((note_id, world.codes[code], len(starts), first, length))


def _draw_mentions(rng: np.random.Generator, world: NoteWorld, codes: np.ndarray) -> list[_Mention]:
    counts = 1 + np.searchsorted(np.cumsum(MENTIONS_PER_CODE)[:-1], rng.random(len(codes)))
    mentions = []
    for code in np.repeat(codes, counts).tolist():
        place, form = float(rng.random()), int(rng.integers(len(FORMS)))
        sentences = SIGNS if FORMS[form] == "sign" else MENTIONS[_section(place)]
        sentence = sentences[rng.integers(len(sentences))]
        mentions.append(_Mention(place, sentence, world.forms[code][form], code, FORMS[form]))
    return mentions


def _draw_distractors(
    rng: np.random.Generator, config: SyntheticNotesConfig, world: NoteWorld, positives: np.ndarray
) -> list[_Mention]:
    """Mentions of codes that the note does not have; siblings are those of its own codes."""
    absent = np.ones(len(world.codes))
    absent[positives] = 0
    weights = dict.fromkeys(DISTRACTOR_KINDS, absent * world.probability)
    weights["sibling"] = absent * np.isin(world.family, world.family[positives])
    mentions = []
    for kind in rng.choice(DISTRACTOR_KINDS, rng.poisson(config.distractors)).tolist():
        total = weights[kind].cumsum()
        if total[-1] == 0:
            continue
        code = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        sentence = DISTRACTORS[kind][rng.integers(len(DISTRACTORS[kind]))]
        form = world.forms[code][rng.integers(FORMS.index("sign"))]
        mentions.append(_Mention(float(rng.random()), sentence, form, code, kind))
    return mentions


def _section(place: float) -> str:
    return next(heading for heading, start in reversed(SECTIONS) if place >= start)


def _write(
    rng: np.random.Generator, world: NoteWorld, mentions: list[_Mention], target: float
) -> tuple[str, list[tuple[int, int, int, str]]]:
    """A note of about ``target`` words, and (code, start, end, kind) of each mention.

    Mentions stand at their share of the sentences about nothing, measured in words.
    """
    used = sum(len(words(mention.sentence)) + len(words(mention.form)) - 2 for mention in mentions)
    wanted = max(_SHORTEST, int(target) - used)
    drawn = rng.integers(len(world.fillers), size=wanted // int(world.filler_words.min()) + 1)
    ends = world.filler_words[drawn].cumsum()
    drawn = drawn[: 1 + np.searchsorted(ends, wanted)]
    ends = ends[: len(drawn)]
    items: list[tuple[float, str | _Mention]] = [
        (start, ("\n\n" if start else "") + heading + "\n") for heading, start in SECTIONS
    ]
    items = sorted([*items, *((mention.place, mention) for mention in mentions)], key=lambda item: item[0])
    cuts = np.searchsorted(ends, np.array([place for place, _ in items]) * ends[-1])
    text, spans = "", []
    for (_, item), begin, end in zip(items, [0, *cuts[:-1]], cuts, strict=True):
        text += "".join(f"{world.fillers[filler]} " for filler in drawn[begin:end])
        if isinstance(item, str):
            text += item
            continue
        start = len(text) + item.sentence.index("{}")
        spans.append((item.code, start, start + len(item.form), item.kind))
        text += item.sentence.replace("{}", item.form) + " "
    return text + "".join(f"{world.fillers[filler]} " for filler in drawn[cuts[-1] :]), spans
