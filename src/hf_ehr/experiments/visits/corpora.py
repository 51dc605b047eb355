"""Annotated notes as visits, so that MedM-PLM can be pre-trained on them, and their named entities.

Each note is a visit: its diagnoses are the note's codes, and what stands in the place of its drugs are the procedures
of the note (ICD-10-PCS) or, in synthetic notes, the drugs that it names as signs. Entities are the spans: of a sign a
``treatment``, of a procedure code a ``procedure``, of all others a ``problem``.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_ehr.entity_datasets import (
    ENTITY_TABLE_SCHEMA,
    build_entity_examples,
    entities_by_note,
    entities_of_spans,
    tag_names,
)
from hf_ehr.entity_tags import Entity
from hf_ehr.notes import NoteFolder, prepare_notes
from hf_ehr.schema import (
    CODE_KINDS,
    RECORD_SCHEMA,
    STATIC_FIELDS,
    DatasetInfo,
    EhrDataError,
    atomic_folder,
    shard_name,
    write_parquet,
)

if TYPE_CHECKING:
    import datasets

NOTES, ENTITIES = "corpus_notes.parquet", "corpus_entities.parquet"
PROCEDURE = "ICD10PCS/"
_FIRST = datetime(2000, 1, 1)  # of notes without a time


def make_corpus(source: str, path: str | None, options: dict[str, Any], folder: Path) -> None:
    """Writes the notes of a corpus as a prepared folder of visits, with NOTES and ENTITIES; one that is there stays.

    Args:
        source: Of ``hf-ehr prepare-notes``.
        path: Its file or folder.
        options: The source's own.
        folder: To write.

    Raises:
        EhrDataError: The corpus has no spans.
    """
    if folder.is_dir():
        return
    corpus = prepare_notes(cast(Any, source), path, folder.with_name("prepared-notes"), options=options)
    notes, spans = annotated_notes(pa.concat_tables(corpus.notes())), corpus.spans()
    if not spans.num_rows:
        raise EhrDataError(f"`corpus` must have spans, and {source!r} has none here. Choose another language or part.")
    with atomic_folder(folder) as temporary:
        _write_records(corpus, notes, spans, temporary)
        write_parquet(notes, temporary / NOTES)
        write_parquet(typed_entities(spans), temporary / ENTITIES)
        DatasetInfo(source, options, corpus.info.shards, "order").save(temporary)


def annotated_notes(notes: pa.Table) -> pa.Table:
    """Without notes that nobody read for entities: where none is marked there, one may be all the same."""
    return notes.filter(pc.fill_null(pc.not_equal(notes["split"], "unlabelled"), True))


def typed_entities(spans: pa.Table) -> pa.Table:
    """ENTITIES of SPANS; those of procedure codes are a type of their own."""
    entities = entities_of_spans(spans)
    procedures = pc.starts_with(spans["code"], PROCEDURE)
    types = pc.if_else(procedures, "procedure", entities["type"])
    return entities.set_column(3, ENTITY_TABLE_SCHEMA.field("type"), types)


def corpus_examples(
    folder: str, splits: dict[str, np.ndarray], tokenizer: Any, max_length: int
) -> tuple[list[str], dict[str, datasets.Dataset]]:
    """The names of the tags and the examples of each split, those of training and validation with their tags.

    Args:
        folder: Of :func:`make_corpus`.
        splits: Patients of each split; types of entities are those of the training notes and of validation.
        tokenizer: Of the text encoder.
        max_length: Tokens of a window.
    """
    entities = pq.read_table(Path(folder) / ENTITIES)
    notes = {split: corpus_notes(folder, subjects) for split, subjects in splits.items()}
    own = {
        split: entities.filter(pc.is_in(entities["note_id"], notes[split]["note_id"]))
        for split in ("train", "validation")
    }
    tags = tag_names(pa.concat_tables(own.values())["type"].to_pylist())
    return tags, {
        split: build_entity_examples(part, tokenizer, tags, entities=own.get(split), max_length=max_length)
        for split, part in notes.items()
    }


def corpus_notes(folder: str, subjects: np.ndarray) -> pa.Table:
    """NOTES of some patients."""
    notes = pq.read_table(Path(folder) / NOTES)
    return notes.filter(pc.is_in(notes["subject_id"], pa.array(subjects)))


def true_entities(folder: str, note_ids: list[str]) -> list[list[Entity]]:
    """The entities of notes, in characters, in the order of the notes; one that lies in another is left out.

    Tags cannot say that entities lie in each other, and every row is scored on the same ones.
    """
    notes, entities = pq.read_table(Path(folder) / NOTES), pq.read_table(Path(folder) / ENTITIES)
    notes = notes.take(pc.index_in(pa.array(note_ids), notes["note_id"]))
    return [
        _apart(found)
        for found in entities_by_note(notes, entities.filter(pc.is_in(entities["note_id"], notes["note_id"])))
    ]


def _apart(entities: list[Entity]) -> list[Entity]:
    kept: list[Entity] = []
    for one in sorted(set(entities), key=lambda one: (one.start - one.end, one.start)):
        if all(one.end <= other.start or other.end <= one.start for other in kept):
            kept.append(one)
    return sorted(kept)


def _write_records(corpus: NoteFolder, notes: pa.Table, spans: pa.Table, folder: Path) -> None:
    diagnoses, others = _codes(corpus, notes, spans)
    visits: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, note in enumerate(notes.to_pylist()):
        time = note["time"] or _FIRST + timedelta(days=number)
        codes = {"diagnoses": diagnoses[note["note_id"]], "medications": others[note["note_id"]]}
        visit: dict[str, Any] = {
            "visit_id": number, "start": time, "end": time, "kind": "unknown", "planned": None, "discharged_to": None,
            "notes": [{"time": time, "category": note["category"], "text": note["text"]}], "stays": [],
        }  # fmt: skip
        for kind in CODE_KINDS:
            visit |= {kind: codes.get(kind, []), f"{kind}_at": [time] * len(codes.get(kind, []))}
        visits[note["subject_id"]].append(visit)
    empty = dict.fromkeys(STATIC_FIELDS.values()) | {"birth_time": None, "death_time": None}
    shards = corpus.info.shards
    for shard in range(shards):
        rows = [
            empty | {"subject_id": subject, "visits": sorted(found, key=lambda one: one["start"])}
            for subject, found in sorted(visits.items())
            if subject % shards == shard
        ]
        (folder / "records").mkdir(exist_ok=True)
        write_parquet(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), folder / "records" / shard_name(shard, shards))


def _codes(corpus: NoteFolder, notes: pa.Table, spans: pa.Table) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Diagnoses of each note, and what stands in the place of its drugs."""
    diagnoses: dict[str, list[str]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    for row in corpus.labels().to_pylist():
        (others if row["code"].startswith(PROCEDURE) else diagnoses)[row["note_id"]].append(row["code"])
    texts = dict(zip(notes["note_id"].to_pylist(), notes["text"].to_pylist(), strict=True))
    for row in spans.filter(pc.equal(spans["kind"], "sign")).to_pylist():
        name = texts[row["note_id"]][row["start"] : row["end"]].casefold().replace(" ", "_")
        if f"Drug/{name}" not in others[row["note_id"]]:
            others[row["note_id"]].append(f"Drug/{name}")
    return diagnoses, others
