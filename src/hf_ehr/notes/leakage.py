"""Leakage rule L7 for notes: copies that stand in two splits, and sections that give an outcome or the codes away.

Copies are found by MinHash (Broder 1997): runs of words are hashed, the smallest hash of a note under each of many
hash functions is its signature, and two signatures agree in the share in which the two sets of runs overlap (Jaccard).
Memory is 512 bytes a note beside the shard that is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

WORDS = 5
"""Words of a run."""
HASHES = 128
BAND = 4
"""Hashes that must agree, in one of the 32 bands, for two notes to be compared: of pairs at 0.5 an
eighth is missed, at 0.8 one of ten millions."""
BUCKET = 100
"""Training notes of one band value that a note is compared with: a template that all share needs no more."""

TELLING_SECTIONS = {
    "discharge medications": r"(?im)^\W*(discharge medications?|medications? (on|at) discharge)\b",
    "discharge disposition": r"(?im)^\W*(discharge (disposition|condition|status)|disposition)\b\s*:?",
    "follow-up": r"(?im)^\W*(follow[- ]?up|discharge instructions)\b",
    "death": r"(?i)\b(patient (expired|died|has died)|pronounced dead|time of death|autopsy)\b",
    "final diagnoses": r"(?im)^\W*(discharge|final) diagnos[ie]s\b",
    "addendum": r"(?im)^\W*addendum\b",
    "billing codes": r"(?i)\bicd-?(9|10)(-cm)?\b|\bcpt code\b",
}
"""What gives a task away that is asked before it is written, as patterns (English)."""


@dataclass(frozen=True)
class NoteLeakage:
    """What was found.

    Attributes:
        notes: Split → notes looked at.
        copies: ``note_id``, ``train_note_id``, ``similarity``: the nearest training note of each held-out note, where
            it is near enough, by falling similarity. Ids are data about patients.
        copied: Split → notes that have one.
        too_short: Split → notes of fewer words than a run, which are not compared.
        sections: Split → pattern → notes that hold it.
    """

    notes: dict[str, int]
    copies: pa.Table
    copied: dict[str, int]
    too_short: dict[str, int]
    sections: dict[str, dict[str, int]]

    def summary(self) -> str:
        """Counts, without an id."""
        lines = []
        for name, notes in self.notes.items():
            lines.append(f"{name}: {notes:,} notes")
            if name in self.copied:
                lines.append(f"  {self.copied[name]:,} are nearly the same as a training note")
            if self.too_short[name]:
                lines.append(f"  {self.too_short[name]:,} of fewer than {WORDS} words were not compared")
            lines += [f"  {count:,} with {section}" for section, count in self.sections[name].items() if count]
        return "\n".join(lines)


def note_leakage(splits: dict[str, Iterable[pa.Table]], threshold: float = 0.8) -> NoteLeakage:
    """Looks for copies of training notes in the other splits, and for telling sections in all.

    Args:
        splits: ``train`` and others → NOTES, table by table.
        threshold: Overlap of the runs of five words from which on two notes count as the same.

    Raises:
        ValueError: ``train`` is missing, or the threshold is out of range.
    """
    if "train" not in splits:
        raise ValueError(f"`splits` must hold `train`, got {sorted(splits)}.")
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"`threshold` must lie in [0.5, 1], below which pairs are missed; got {threshold}.")
    signatures, sections, notes, too_short = {}, {}, {}, {}
    for name, tables in splits.items():
        ids, parts, found = [], [], dict.fromkeys(TELLING_SECTIONS, 0)
        for table in tables:
            ids += table["note_id"].to_pylist()
            parts.append(note_signatures(table["text"]))
            for section, pattern in TELLING_SECTIONS.items():
                found[section] += pc.sum(pc.match_substring_regex(table["text"], pattern)).as_py() or 0
        signature = np.concatenate([np.empty((0, HASHES), np.uint32), *parts])
        long_enough = (signature != _NOTHING).any(axis=1)
        sections[name], notes[name], too_short[name] = found, len(ids), int((~long_enough).sum())
        signatures[name] = np.array(ids, object)[long_enough], signature[long_enough]
    nearest = {
        name: _nearest(*signatures["train"], *signatures[name], threshold) for name in splits if name != "train"
    }
    schema = {"note_id": pl.String, "train_note_id": pl.String, "similarity": pl.Float64}
    copies = pl.concat([pl.DataFrame(schema=schema), *nearest.values()]).sort("similarity", descending=True)
    copied = {name: len(frame) for name, frame in nearest.items()}
    return NoteLeakage(notes, copies.to_arrow(), copied, too_short, sections)


_NOTHING = np.uint32(0xFFFFFFFF)
_RNG = np.random.default_rng(0)
_FACTORS = _RNG.integers(1, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADDENDS = _RNG.integers(0, 2**63, HASHES, dtype=np.uint64)


def note_signatures(texts: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Signature of each note, ``(notes, 128)`` uint32; all ones for one of fewer than five words.

    Words are compared without regard to case; what lies between them does not count.
    """
    words = pl.Series("words", texts).str.to_lowercase().str.extract_all(r"\w+")
    lengths = words.list.len().to_numpy().astype(np.int64)
    hashes = words.explode(empty_as_null=False).hash(seed=0).to_numpy()
    runs = np.zeros(max(len(hashes) - WORDS + 1, 0), np.uint64)
    for place in range(WORDS):  # a polynomial of the words, so that their order counts
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(runs)]
    counts = np.maximum(lengths - WORDS + 1, 0)
    starts = np.cumsum(lengths) - lengths
    own = np.repeat(starts, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    signatures = np.full((len(lengths), HASHES), _NOTHING)
    there = np.flatnonzero(counts)
    if len(there):
        borders = (np.cumsum(counts) - counts)[there]
        for column in range(HASHES):
            mixed = (runs[own] * _FACTORS[column] + _ADDENDS[column]) >> np.uint64(32)
            signatures[there, column] = np.minimum.reduceat(mixed, borders).astype(np.uint32)
    return signatures


def _nearest(train_ids, train, ids, signatures, threshold: float) -> pl.DataFrame:
    """The most similar training note of each note, where it is similar enough."""
    pairs = [np.empty((0, 2), np.int64)]
    for first in range(0, HASHES, BAND):
        left, right = (_band(part, first) for part in (signatures, train))
        right = right.group_by("band", maintain_order=True).head(BUCKET)
        pairs.append(left.join(right, on="band", suffix="_train").select("row", "row_train").to_numpy())
    row, other = np.unique(np.concatenate(pairs), axis=0).T
    similarity = np.empty(len(row))
    for part in np.array_split(np.arange(len(row)), max(1, len(row) // 100_000)):
        similarity[part] = (signatures[row[part]] == train[other[part]]).mean(axis=1)
    near = similarity >= threshold
    found = {"note_id": ids[row[near]], "train_note_id": train_ids[other[near]], "similarity": similarity[near]}
    frame = pl.DataFrame(found, schema={"note_id": pl.String, "train_note_id": pl.String, "similarity": pl.Float64})
    return frame.sort("similarity", descending=True).unique("note_id", keep="first", maintain_order=True)


def _band(signatures: np.ndarray, first: int) -> pl.DataFrame:
    columns = {f"hash{number}": signatures[:, first + number] for number in range(BAND)}
    frame = pl.DataFrame(columns).select(pl.struct(pl.all()).hash(seed=0).alias("band"))
    return frame.with_row_index("row")
