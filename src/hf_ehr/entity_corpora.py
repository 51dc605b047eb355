"""Corpora of named entities that users hold under an agreement of their own → NOTES and ENTITIES."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
from tqdm.auto import tqdm

from .entity_datasets import ENTITY_TABLE_SCHEMA
from .schema import EhrDataError

_CONCEPT = re.compile(r'c="(?P<text>.*)" (\d+):(\d+) (\d+):(\d+)\|\|t="(\w+)"')
_TOKEN = re.compile(r"\S+")


def read_i2b2_2010(texts: str | Path, concepts: str | Path) -> tuple[pa.Table, pa.Table]:
    r"""The 2010 i2b2/VA challenge: ``problem``, ``test`` and ``treatment`` in discharge summaries and progress notes.

    A line ``c="chest pain" 12:3 12:4||t="problem"`` names the fourth and fifth token of the twelfth line. The files do
    not say whose a note is: every note counts as a patient of its own.

    Args:
        texts: Folder of ``NAME.txt``.
        concepts: Folder of ``NAME.con``, one for each text.

    Returns:
        NOTES (``note_id`` is NAME, in the order of the names) and ENTITIES, characters of the texts.

    Raises:
        EhrDataError: There is no text, a text has no concepts file, or a line is not of that form or does not name
            what stands there.
    """
    files = sorted(Path(texts).glob("*.txt"))
    if not files:
        raise EhrDataError(f"`texts` must hold .txt files, got none in {texts}. Unpack the challenge's archives.")
    notes, entities = [], []
    for number, file in enumerate(tqdm(files, desc="Reading notes", unit="note", disable=len(files) < 64)):
        given = Path(concepts) / f"{file.stem}.con"
        if not given.is_file():
            raise EhrDataError(f"`concepts` must hold {given.name} beside the others. Leave its text out, or add it.")
        text = file.read_text(encoding="utf-8-sig")
        notes.append({"note_id": file.stem, "subject_id": number, "text": text})
        places = _tokens(text)
        for line, concept in enumerate(given.read_text(encoding="utf-8-sig").splitlines(), 1):
            if concept.strip():
                entities.append((file.stem, *_entity(concept.strip(), text, places, f"{given.name}, line {line}")))
    schema = pa.schema({"note_id": pa.string(), "subject_id": pa.int64(), "text": pa.string()})
    columns = zip(*entities, strict=True) if entities else [()] * len(ENTITY_TABLE_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ENTITY_TABLE_SCHEMA, strict=True)]
    return pa.Table.from_pylist(notes, schema=schema), pa.table(arrays, schema=ENTITY_TABLE_SCHEMA)


def _tokens(text: str) -> list[list[tuple[int, int]]]:
    """Characters of the tokens of each line."""
    found, start = [], 0
    for line in text.split("\n"):
        found.append([(start + match.start(), start + match.end()) for match in _TOKEN.finditer(line)])
        start += len(line) + 1
    return found


def _entity(concept: str, text: str, places: list[list[tuple[int, int]]], where: str) -> tuple[int, int, str]:
    """Characters and type of a line of concepts."""
    match = _CONCEPT.fullmatch(concept)
    if match is None:
        raise EhrDataError(f'{where} must be like c="…" 12:3 12:4||t="problem". Check the file.')
    first_line, first, last_line, last = (int(match[group]) for group in range(2, 6))
    try:
        start, end = places[first_line - 1][first][0], places[last_line - 1][last][1]
    except IndexError:
        start, end = 0, 0
    if " ".join(text[start:end].lower().split()) != " ".join(match["text"].lower().split()):
        raise EhrDataError(f"{where} must name the tokens that stand in the text, lines from 1 and tokens from 0.")
    return start, end, match[6]


__all__ = ["read_i2b2_2010"]
