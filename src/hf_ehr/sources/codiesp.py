"""CodiEsp (CLEF eHealth 2020, CC BY 4.0): case reports with ICD-10 codes and the text that supports them.

Codes are CIE-10-ES, the Spanish edition of ICD-10-CM and ICD-10-PCS. Some are no valid item: they are kept, as the
annotators wrote them, and listed with what is wrong. Source: Miranda-Escalada et al. (2020), CEUR-WS 2696.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa

from hf_ehr import ontology
from hf_ehr.models.code_hierarchy import dotted, undotted
from hf_ehr.notes.tables import LABEL_TABLE_SCHEMA, NOTE_TABLE_SCHEMA, SPAN_TABLE_SCHEMA, check_notes
from hf_ehr.schema import EhrDataError

Part = Literal["train", "dev", "background"]
Language = Literal["es", "en"]

_VOCABULARIES = {"DIAGNOSTICO": "ICD10CM", "PROCEDIMIENTO": "ICD10PCS"}
_FOLDERS = {"es": "text_files", "en": "text_files_en"}


@dataclass(frozen=True)
class CodiEsp:
    """One part of the corpus as plain tables.

    Attributes:
        notes: NOTES; ``subject_id`` stands for the article, whose cases must not be parted by a split.
        labels: LABELS, all ``native``.
        spans: SPANS of kind ``annotated``, in the Spanish text only; evidence in several pieces has a row for each.
        codes: ``code``, ``documents``, ``status``: ``valid`` (billable in ICD-10 2024), ``truncated`` (the beginning
            of a billable one: a category, or seven characters cut short) or ``unknown``. None is left out.
        mismatched: Annotations whose quoted evidence is not the text at their position (most by a closing dot).
    """

    notes: pa.Table
    labels: pa.Table
    spans: pa.Table
    codes: pa.Table
    mismatched: int


def read_codiesp(path: str | Path, part: Part, *, language: Language = "es") -> CodiEsp:
    """Reads a part of CodiEsp v4.

    Args:
        path: The archive (``.tar``, ``.tar.xz``, …), or the folder that holds ``train``, ``dev``, ``background``.
        part: ``background`` has no codes.
        language: ``es``, the original, or ``en``, its machine translation, which has the codes but no spans.

    Raises:
        ValueError: ``part`` or ``language`` is not known.
        EhrDataError: The part is missing, or a row has too few columns, no position, or one outside of its text.
    """
    for name, value, known in (("part", part, get_args(Part)), ("language", language, get_args(Language))):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    files = _read_files(Path(path), part, _FOLDERS[language])
    texts = {Path(name).stem: text for name, text in sorted(files.items()) if name.endswith(".txt")}
    if not texts:
        raise EhrDataError(f"`path` must hold `{part}/{_FOLDERS[language]}/*.txt`, and {path} does not.")
    notes = pa.table(
        {
            "note_id": list(texts),
            "subject_id": [_article(name) for name in texts],
            "category": ["case report"] * len(texts),
            "text": list(texts.values()),
        }
    )
    labels = [
        row for letter, kind in (("D", "DIAGNOSTICO"), ("P", "PROCEDIMIENTO")) for row in _labels(files, letter, kind)
    ]
    spans, mismatched = _spans(files, texts) if language == "es" else ([], 0)
    distinct = pl.DataFrame(labels, schema=["note_id", "code"], orient="row").unique(maintain_order=True)
    return CodiEsp(
        notes=check_notes(notes).cast(NOTE_TABLE_SCHEMA),
        labels=_label_table(distinct),
        spans=pa.Table.from_pylist(spans, schema=SPAN_TABLE_SCHEMA),
        codes=_code_report(distinct),
        mismatched=mismatched,
    )


def _read_files(path: Path, part: str, folder: str) -> dict[str, str]:
    """Name → text of the part's tables and of its notes in one language; line ends stay, positions count them."""
    files: dict[str, bytes] = {}
    if path.is_dir():
        for file in sorted([*path.rglob(f"{part}/*.tsv"), *path.rglob(f"{part}/{folder}/*.txt")]):
            files[file.name] = file.read_bytes()
    elif path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                parents = Path(member.name).parts[:-1]
                if member.isfile() and (parents[-1:] == (part,) or parents[-2:] == (part, folder)):
                    files[Path(member.name).name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    else:
        raise EhrDataError(f"`path` must be the CodiEsp archive or its folder; {path} does not exist.")
    return {name: content.decode("utf-8") for name, content in files.items()}


def _rows(files: dict[str, str], letter: str, columns: int) -> list[list[str]]:
    """The rows of the part's table ``*D.tsv``, ``*P.tsv`` or ``*X.tsv``; the background has none."""
    rows = []
    for name in (name for name in files if name.endswith(f"{letter}.tsv")):
        for number, line in enumerate(files[name].splitlines(), 1):
            row = line.split("\t")
            if line.strip() and len(row) != columns:
                raise EhrDataError(f"{name} row {number} must have {columns} columns, got {len(row)}.")
            if line.strip():
                rows.append(row)
    return rows


def _labels(files: dict[str, str], letter: str, kind: str) -> list[tuple[str, str]]:
    return [(note, _code(kind, code)) for note, code in _rows(files, letter, 2)]


def _spans(files: dict[str, str], texts: dict[str, str]) -> tuple[list[dict], int]:
    """Rows of SPANS, and how many annotations quote something else than the text at their position."""
    spans, mismatched = [], 0
    for number, (note, kind, code, quote, positions) in enumerate(_rows(files, "X", 5), 1):
        try:
            pieces = [tuple(map(int, piece.split())) for piece in positions.split(";")]
            held = all(0 <= start <= end <= len(texts[note]) for start, end in pieces)
            code = _code(kind, code)
        except (ValueError, KeyError):
            held = False
        if not held:
            raise EhrDataError(
                f"Annotation {number} must name a document, a kind and `start end` inside of it, got {positions!r}."
            )
        pieces = [piece for piece in pieces if piece[0] < piece[1]]  # the corpus has some empty ones
        mismatched += " ".join(texts[note][start:end] for start, end in pieces) != quote
        spans += [
            {"note_id": note, "code": code, "start": start, "end": end, "kind": "annotated"} for start, end in pieces
        ]
    return spans, mismatched


def _code(kind: str, code: str) -> str:
    vocabulary = _VOCABULARIES[kind]
    code = code.strip().upper()
    return f"{vocabulary}/{dotted(vocabulary, undotted(code)) if vocabulary == 'ICD10CM' else code}"


def _article(note_id: str) -> int:
    """A number for the article of ``S0004-…-1``: the same whatever else is read."""
    digest = hashlib.sha256(note_id.rpartition("-")[0].encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _label_table(distinct: pl.DataFrame) -> pa.Table:
    table = distinct.select(pl.col("note_id", "code").cast(pl.String), pl.lit("native").alias("provenance"))
    return table.to_arrow().cast(LABEL_TABLE_SCHEMA)


def _code_report(distinct: pl.DataFrame) -> pa.Table:
    counts = distinct.group_by("code").len("documents").sort(["documents", "code"], descending=[True, False])
    codes = counts["code"].cast(pl.String).to_list()
    return pa.table(
        {
            "code": pa.array(codes, pa.string()),
            "documents": pa.array(counts["documents"].to_numpy().astype(np.int64)),
            "status": pa.array(ontology.code_status(codes), pa.string()),
        }
    )
