"""What the materials of every kind of report share: splits, silent training, and text encoders of their notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainingArguments

from hf_ehr.notes import prepare_notes
from hf_ehr.notes.tables import LABEL_TABLE_SCHEMA, NOTE_TABLE_SCHEMA
from hf_ehr.schema import atomic_folder, shard_paths, write_parquet
from hf_ehr.training import NoteArguments, NotePretrainArguments, pretrain_notes

SPLITS = ("train", "validation", "test")
SILENT: dict[str, Any] = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def train_note_encoder(data: str | Path, train: np.ndarray, split_seed: int, folder: Path, stage: dict) -> None:
    """Trains a small text encoder on the notes of the training patients, and on nobody else's.

    Args:
        data: Prepared folder.
        train: Its training patients.
        split_seed: Of the split that they come from.
        folder: Where to; the notes are kept beside it.
        stage: ``options`` of ``NotePretrainArguments`` and ``training``, fields of ``TrainingArguments``.
    """
    tables = folder.parent / "tables"
    if not tables.is_dir():
        with atomic_folder(tables) as temporary:
            found = notes_of(data, train)
            named = pa.array(["train"] * len(found))  # none is a test note: a fifth checks the encoder
            write_parquet(found.append_column("split", named), temporary / "notes.parquet")
            write_parquet(LABEL_TABLE_SCHEMA.empty_table(), temporary / "labels.parquet")
    notes = prepare_notes("table", tables, folder.parent / "notes", min_characters=1)
    training = TrainingArguments(output_dir=str(folder), **(SILENT | stage.get("training", {})))
    options = NotePretrainArguments(**json_fields(stage.get("options", {})))
    # Patients are cut by the seed alone: under that of the cohort all of its training patients would train again.
    pretrain_notes(NoteArguments(data=str(notes.path), split_seed=split_seed + 1), options, training)


def notes_of(data: str | Path, subject_ids: np.ndarray) -> pa.Table:
    """NOTES of some patients of a prepared folder."""
    element = "visits.list.element."
    columns = ["subject_id", f"{element}visit_id", f"{element}notes"]
    wanted, parts = pl.Series(np.asarray(subject_ids, np.int64)).implode(), []
    for path in shard_paths(data, "records"):
        frame = pl.DataFrame(pq.ParquetFile(path).read(columns=columns))
        frame = frame.filter(pl.col("subject_id").is_in(wanted)).explode("visits").drop_nulls("visits")
        frame = frame.unnest("visits").explode("notes").drop_nulls("notes").unnest("notes").drop_nulls("text")
        parts.append(frame)
    notes = pl.concat(parts).with_row_index("note_id").with_columns(pl.col("note_id").cast(pl.String))
    return notes.select(NOTE_TABLE_SCHEMA.names).to_arrow().cast(NOTE_TABLE_SCHEMA)


def json_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of arguments that take mappings as JSON."""
    return given | {name: json.dumps(value) for name, value in given.items() if isinstance(value, dict)}
