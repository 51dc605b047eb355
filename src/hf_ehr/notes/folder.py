"""A prepared folder of coded notes: NOTES, LABELS and SPANS in shards of whole patients, and what the codes are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_ehr.schema import DatasetInfo, EhrDataError, shard_name

from .tables import NOTE_TABLE_SCHEMA

OFFICIAL_SPLITS = ("train", "test", "unlabelled")
STORED_NOTE_SCHEMA = NOTE_TABLE_SCHEMA.append(pa.field("split", pa.string()))
"""NOTES of a folder: ``split`` is that of the source (``OFFICIAL_SPLITS``), null in all notes where it has none."""

CODE_TABLE_SCHEMA = pa.schema(
    [
        pa.field("code", pa.string(), nullable=False),
        pa.field("description", pa.string()),  # null where no list knows the code
        pa.field("documents", pa.int64(), nullable=False),
        pa.field("status", pa.string()),  # as ontology.code_status
    ]
)
"""One row per code of the LABELS, most frequent first."""


@dataclass(frozen=True)
class NoteFolder:
    """A whole folder that :func:`hf_ehr.notes.prepare_notes` wrote; nothing is read before it is asked for.

    Attributes:
        path: ``notes/``, ``labels/``, ``spans/`` by shard (``subject_id % shards``), ``codes.parquet``,
            ``dataset.json``.
        info: Source, options, counts, what was left out and why, warnings.
    """

    path: Path
    info: DatasetInfo

    @classmethod
    def open(cls, path: str | Path) -> NoteFolder:
        """Opens a folder.

        Raises:
            EhrDataError: It is none, or not whole.
        """
        path = Path(path)
        hint = "Name the output of `hf-ehr prepare-notes`."
        if not (path / "dataset.json").is_file():
            raise EhrDataError(f"{path} must hold `dataset.json` of prepared notes, and does not. {hint}")
        info = DatasetInfo.load(path)
        names = [
            f"{table}/{shard_name(i, info.shards)}"
            for table in ("notes", "labels", "spans")
            for i in range(info.shards)
        ]
        missing = [name for name in (*names, "codes.parquet") if not (path / name).is_file()]
        if missing:
            raise EhrDataError(
                f"{path} must hold prepared notes; {len(missing)} files lack, first {missing[0]}. {hint}"
            )
        return cls(path, info)

    def notes(self, note_ids: Any = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """NOTES (``STORED_NOTE_SCHEMA``) shard by shard, all ``info.shards`` of them, by patient, time and note.

        Args:
            note_ids: Notes to keep; ``None`` keeps all, ids that are not there are passed over.
            columns: Columns to read; ``None`` reads all.
        """
        wanted = None if note_ids is None else id_array(note_ids)
        read = None if columns is None else list(dict.fromkeys([*columns, "note_id"]))
        for index in range(self.info.shards):
            table = self._read("notes", index, read)
            if wanted is not None:
                table = table.filter(pc.is_in(table["note_id"], value_set=wanted))
            yield table if columns is None else table.select(list(columns))

    def labels(self, shard: int | None = None) -> pa.Table:
        """LABELS by note and code, of all notes or of one shard."""
        return self._table("labels", shard)

    def spans(self, shard: int | None = None) -> pa.Table:
        """SPANS by note and place, of all notes or of one shard."""
        return self._table("spans", shard)

    def codes(self) -> pa.Table:
        """The codes of the LABELS (``CODE_TABLE_SCHEMA``), most frequent first."""
        return pq.read_table(self.path / "codes.parquet")

    def _table(self, name: str, shard: int | None) -> pa.Table:
        shards = range(self.info.shards) if shard is None else [shard]
        return pa.concat_tables([self._read(name, index) for index in shards])

    def _read(self, name: str, index: int, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(self.path / name / shard_name(index, self.info.shards), columns=columns)


def id_array(note_ids: Any) -> pa.Array:
    """Note ids of any kind (a list, a set, numpy, Arrow) as an array of strings."""
    if isinstance(note_ids, pa.ChunkedArray):
        note_ids = note_ids.combine_chunks()
    return note_ids if isinstance(note_ids, pa.Array) else pa.array(list(note_ids), pa.string())
