"""What the cells of a coding report are made of, each made once: notes, labels in scope, tokenizers, encoders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse
from transformers import AutoTokenizer, TrainingArguments

from hf_ehr import ontology
from hf_ehr.experiments.coding.spec import CodingData, CodingRow, CodingSpec
from hf_ehr.experiments.spec import digest, expanded
from hf_ehr.notes import NoteFolder, imputed_cells, prepare_notes
from hf_ehr.notes.folder import CODE_TABLE_SCHEMA
from hf_ehr.notes.tables import LABEL_TABLE_SCHEMA, SPAN_TABLE_SCHEMA
from hf_ehr.ontology import nearest_name
from hf_ehr.schema import atomic_folder, atomic_path, shard_name, shard_paths, write_parquet
from hf_ehr.training import VOCABULARIES, NoteArguments, NotePretrainArguments, codes_in_scope, pretrain_notes
from hf_ehr.version import __version__

SPLITS = ("train", "validation", "test")
PRETRAINING_FILE = "pretraining.json"


@dataclass(frozen=True, eq=False)
class Scope:
    """The labels of a data set and who has them.

    Attributes:
        codes: Label names; the position is the label id.
        descriptions: English names of the codes, None where there is none.
        note_ids: Split → its notes, in the order in which everything scores them.
        subjects: Split → patient of each note.
        truth: Split → 0/1, ``(notes, labels)``.
        out_of_scope: Split → codes of each note that are no label.
        never_seen: Split → those of them that no training note has.
        imputed: Split → true cells whose code was carried over from another note, 0/1, ``(notes, labels)``.
    """

    codes: list[str]
    descriptions: list[str | None]
    note_ids: dict[str, list[str]]
    subjects: dict[str, np.ndarray]
    truth: dict[str, sparse.csr_array]
    out_of_scope: dict[str, np.ndarray]
    never_seen: dict[str, np.ndarray]
    imputed: dict[str, sparse.csr_array]

    @property
    def train_counts(self) -> np.ndarray:
        """Training notes of each label."""
        return np.asarray(self.truth["train"].sum(axis=0)).ravel()


class CodedNotes:
    """A data set of a report in its work folder.

    Args:
        data: What it is.
        tokenizer: Options of the tokenizer.
        work: Folder that everything is kept in.
    """

    def __init__(self, data: CodingData, tokenizer: dict[str, Any], work: Path):
        self.data, self.options = data, tokenizer
        source = digest(data.source, data.input, data.options, data.folder, __version__)
        self.key = digest(source, data.level, data.more_than, data.min_patients, tokenizer)
        self.folder = work / "notes" / source  # of all levels: texts, tokenizers and encoders are the same
        self.tokenizer_folder = self.folder / "tokenizers" / digest(tokenizer)
        self.full = Path(data.folder) if data.folder is not None else self.folder / "full"
        place = self.full if data.level == "full" else self.folder / data.level
        self.arguments = NoteArguments(data=str(place))

    def make(self) -> None:
        """Prepares the notes, maps their codes, and fits the tokenizer on the training patients."""
        if not self.full.is_dir():
            path = None if self.data.input is None else expanded(self.data.input, self.data.name)
            options = json.loads(json.dumps(self.data.options))
            prepare_notes(cast(Any, self.data.source), path, self.full, options=options)
        if not Path(self.arguments.data).is_dir():
            write_categories(NoteFolder.open(self.full), Path(self.arguments.data))
        if not self.tokenizer_folder.is_dir():
            self._fit_tokenizer()

    def tokenizer(self) -> Any:
        """The tokenizer fitted on the training patients."""
        return AutoTokenizer.from_pretrained(self.tokenizer_folder)

    @cached_property
    def scope(self) -> Scope:
        """The labels and their truth."""
        codes = codes_in_scope(self.arguments, self.data.more_than, self.data.min_patients)
        found = {split: self._split(split, codes) for split in SPLITS}
        seen = set(self._labels_of("train")["code"].to_list())
        return Scope(
            codes=codes,
            descriptions=nearest_name(codes),
            note_ids={split: part[0] for split, part in found.items()},
            subjects={split: part[1] for split, part in found.items()},
            truth={split: part[2] for split, part in found.items()},
            out_of_scope={split: self._missing(split, part[0], codes) for split, part in found.items()},
            never_seen={split: self._missing(split, part[0], seen) for split, part in found.items()},
            imputed={
                split: imputed_cells(self.arguments.folder.labels(), part[0], codes) for split, part in found.items()
            },
        )

    def texts(self, split: str) -> list[str]:
        """Texts of a split, in the order of ``Scope.note_ids``."""
        tables = self.arguments.folder.notes(self.arguments.splits[split], ["note_id", "text"])
        return [text for table in tables for text in table["text"].to_pylist()]

    def _fit_tokenizer(self) -> None:
        options = NotePretrainArguments(**self.options)
        tokenizer = VOCABULARIES[options.vocabulary](
            shard_paths(self.arguments.data, "notes"), subject_ids=self.arguments.subjects("train", "unlabelled"),
            vocab_size=options.vocab_size, min_patients=options.min_patients,
        )  # fmt: skip
        with atomic_folder(self.tokenizer_folder) as temporary:
            tokenizer.save_pretrained(temporary)

    def _split(self, split: str, codes: list[str]) -> tuple[list[str], np.ndarray, sparse.csr_array]:
        tables = self.arguments.folder.notes(self.arguments.splits[split], ["note_id", "subject_id"])
        notes = pl.DataFrame(pa.concat_tables(tables)).with_row_index("row")
        labels = self._labels_of(split).join(notes, on="note_id")
        labels = labels.join(pl.DataFrame({"code": codes}).with_row_index("label"), on="code")
        places = labels["row"].to_numpy(), labels["label"].to_numpy()
        truth = sparse.csr_array((np.ones(len(labels), np.int8), places), (len(notes), len(codes)))
        return notes["note_id"].to_list(), notes["subject_id"].to_numpy(), truth

    def _labels_of(self, split: str) -> pl.DataFrame:
        labels = pl.DataFrame(self.arguments.folder.labels().select(["note_id", "code"]))
        kept = pl.DataFrame({"note_id": self.arguments.splits[split]})
        return labels.join(kept, on="note_id", how="semi").unique()

    def _missing(self, split: str, note_ids: list[str], known: Any) -> np.ndarray:
        """Codes of each note that are not among ``known``."""
        others = self._labels_of(split).filter(~pl.col("code").is_in(list(known)))
        counts = others.group_by("note_id").agg(pl.len().cast(pl.Int64))
        notes = pl.DataFrame({"note_id": note_ids}, schema={"note_id": pl.String})
        return notes.join(counts, on="note_id", how="left", maintain_order="left")["len"].fill_null(0).to_numpy()


def write_categories(source: NoteFolder, output: Path) -> None:
    """A prepared folder whose codes are three-character categories; a code that has none keeps its name."""
    distinct = source.codes()["code"].to_pylist()
    names = dict(zip(distinct, ontology.category(distinct), strict=True))
    above = {code: name or code for code, name in names.items()}

    def mapped(table: pa.Table, schema: pa.Schema) -> pa.Table:
        frame = pl.DataFrame(table).with_columns(pl.col("code").replace(above))
        return frame.to_arrow().cast(schema)

    with atomic_folder(output) as folder:
        counts = []
        for index in range(source.info.shards):
            name = shard_name(index, source.info.shards)
            for table in ("notes", "spans"):
                (folder / table).mkdir(exist_ok=True)
            notes = pq.read_table(source.path / "notes" / name)
            write_parquet(notes, folder / "notes" / name)
            write_parquet(mapped(source.spans(index), SPAN_TABLE_SCHEMA), folder / "spans" / name)
            labels = pl.DataFrame(mapped(source.labels(index), LABEL_TABLE_SCHEMA))
            labels = labels.sort("note_id", "code", "provenance", descending=[False, False, True])
            labels = labels.unique(["note_id", "code"], keep="first", maintain_order=True)
            (folder / "labels").mkdir(exist_ok=True)
            write_parquet(labels.to_arrow().cast(LABEL_TABLE_SCHEMA), folder / "labels" / name)
            counts.append(labels.group_by("code").len("documents"))
        codes = pl.concat(counts).group_by("code").sum().sort(["documents", "code"], descending=[True, False])
        listed = codes["code"].to_list()
        columns = {
            "code": listed, "description": ontology.describe(listed),
            "documents": codes["documents"].cast(pl.Int64).to_list(), "status": [None] * len(listed),
        }  # fmt: skip
        write_parquet(pa.table(columns, schema=CODE_TABLE_SCHEMA), folder / "codes.parquet")
        source.info.save(folder)


def checkpoint_folder(notes: CodedNotes, spec: CodingSpec, row: CodingRow, seed: int) -> Path:
    """Where the encoder lies that a row starts from, pre-trained with one seed."""
    return notes.folder / "pretrained" / f"{digest(*checkpoint_settings(notes, spec, row))}-{seed}"


def checkpoint_settings(notes: CodedNotes, spec: CodingSpec, row: CodingRow) -> list[Any]:
    """Everything that determines an encoder, beside its seed."""
    shape = None if row.size is None else spec.encoders[row.size]
    encoder = None if row.encoder is None else expanded(row.encoder, row.name, "encoder")
    return [notes.options, shape, encoder, row.max_length, spec.pretraining.options, spec.pretraining.training]


def make_checkpoint(notes: CodedNotes, spec: CodingSpec, row: CodingRow, seed: int) -> None:
    """Pre-trains an encoder on the training notes, or takes an off-the-shelf one further."""
    options = dict(spec.pretraining.options)
    if row.encoder is None:
        shape = dict(spec.encoders[str(row.size)])
        options |= {"preset": shape.pop("preset", "tiny"), "tokenizer": str(notes.tokenizer_folder)}
        options["model_options"] = json.dumps(shape)
    else:
        options["encoder"] = expanded(row.encoder, row.name, "encoder")
    settings: dict[str, Any] = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    folder = checkpoint_folder(notes, spec, row, seed)
    training = TrainingArguments(output_dir=str(folder), seed=seed, **(settings | spec.pretraining.training))
    data = NoteArguments(data=str(notes.full), max_length=row.max_length)
    pretrain_notes(data, NotePretrainArguments(**options), training)


def save_scores(path: Path, **arrays: Any) -> None:
    """Writes arrays as one file that is whole or not there."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
