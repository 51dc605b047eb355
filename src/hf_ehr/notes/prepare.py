"""Raw notes → a prepared folder: checked, filtered, in shards of whole patients.

Texts are streamed: memory is that of a shard, next to the ids of all notes, their labels and spans.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_ehr import ontology
from hf_ehr.schema import DatasetInfo, EhrDataError, atomic_folder, shard_name, write_parquet

from ._note_sources import NoteTables, RawNotes, raw_notes
from .corpus import filter_notes
from .folder import CODE_TABLE_SCHEMA, OFFICIAL_SPLITS, STORED_NOTE_SCHEMA, NoteFolder
from .labels import ImputationMode, impute_chronic_codes
from .tables import (
    DISTRACTOR_KINDS,
    EVIDENCE_KINDS,
    LABEL_TABLE_SCHEMA,
    SPAN_TABLE_SCHEMA,
)

NoteSourceName = Literal["synthetic", "codiesp", "table"]
_STAGING = ".staging"
_FIRST = ("test", "train", "unlabelled")
"""The official part that a patient belongs to: the first of these."""


def prepare_notes(
    source: NoteSourceName,
    input_dir: str | Path | None,
    output: str | Path,
    *,
    shards: int | None = None,
    min_characters: int = 50,
    exclude_categories: Collection[str] = (),
    imputation: ImputationMode = "none",
    options: dict[str, Any] | None = None,
) -> NoteFolder:
    """Checks and filters the notes of a source and writes them as a folder; one that is there is only opened.

    Chronic codes are imputed before notes are left out, so the codes of a short note count as seen. Codes that are no
    valid ICD-10 are kept and reported in ``codes.parquet``. An empty note is left out as too short, and kept under
    ``min_characters=0``; a note without text (null) is an error.

    Args:
        source: ``synthetic``, ``codiesp``, or ``table``: plain files ``notes``, ``labels`` and, if there are any,
            ``spans`` (:mod:`hf_ehr.notes.tables`) as ``.parquet``, ``.csv``, ``.csv.gz`` or folders of these. Notes
            may have a column ``split`` (``train``, ``test``, ``unlabelled``), for all notes or none.
        input_dir: The folder of the tables, or CodiEsp's archive or folder; None for ``synthetic``.
        output: The prepared folder. It appears when it is whole.
        shards: Number of shards, ``subject_id % shards`` decides where a patient lives; by the size of the input if
            None.
        min_characters: Shortest note that stays, as in :func:`hf_ehr.notes.filter_notes`.
        exclude_categories: Types of notes to leave out.
        imputation: ``none``, ``paper`` or ``as_of``, as in :func:`hf_ehr.notes.impute_chronic_codes`.
        options: ``synthetic``: fields of ``SyntheticNotesConfig``. ``codiesp``: ``language``. ``table``: ``notes``,
            ``labels``, ``spans`` (paths in place of those in ``input_dir``), ``language``.

    Returns:
        The folder, opened.

    Raises:
        ValueError: The source, an option or a setting is not known.
        EhrDataError: The input breaks a contract: a column or a text is missing, a ``note_id`` occurs twice, a label
            or span names a note that is not there, a span lies outside of its text; or ``output`` holds something
            else.
    """
    if source not in get_args(NoteSourceName):
        raise ValueError(f"`source` must be one of {', '.join(get_args(NoteSourceName))}, got {source!r}.")
    if imputation not in get_args(ImputationMode):
        raise ValueError(f"`imputation` must be one of {', '.join(get_args(ImputationMode))}, got {imputation!r}.")
    if shards is not None and shards < 1:
        raise ValueError(f"`shards` must be at least 1, got {shards}.")
    settings = {
        "min_characters": min_characters,
        "exclude_categories": sorted(exclude_categories),
        "imputation": imputation,
        "input": _input_digest(input_dir, options or {}),
        **{name: value if isinstance(value, int | float) else str(value) for name, value in (options or {}).items()},
    }
    output = Path(output)
    if output.is_dir() and any(output.iterdir()):
        return _existing(output, source, settings, shards)
    raw = raw_notes(source, None if input_dir is None else Path(input_dir), shards, options or {})
    with atomic_folder(output) as folder:
        job = _Preparation(raw, folder, min_characters, tuple(exclude_categories))
        job.stage()
        labels, spans = job.labels(imputation), job.spans()
        job.write(labels, spans)
        info = DatasetInfo(source, settings, raw.shards, raw.time_axis, job.summary(labels, spans), raw.warnings)
        info.save(folder)
    return NoteFolder.open(output)


def format_notes_summary(folder: NoteFolder) -> str:
    """What a folder holds and what was left out, in a few lines."""
    counts = folder.info.summary
    left_out = counts["left_out"]
    status = ", ".join(f"{number:,} {name}" for name, number in counts["codes_by_status"].items()) or "none"
    language = f" ({counts['language']})" if counts.get("language") else ""
    lines = [
        f"{folder.info.source}{language}: {counts['notes']:,} notes of {counts['patients']:,} patients",
        f"labels: {counts['labels']:,} ({counts['imputed_labels']:,} imputed) of {counts['codes']:,} codes; "
        f"{counts['notes_without_codes']:,} notes have none",
        f"codes: {status}",
        f"spans: {counts['spans']:,}",
        "left out: " + (", ".join(f"{number:,} {reason}" for reason, number in left_out.items()) or "nothing"),
        *(f"warning: {warning}" for warning in folder.info.warnings),
    ]
    return "\n".join(lines)


def _dotted(table: pa.Table) -> pa.Table:
    """The table with ICD codes written with their dot: E119 and E11.9 are one code."""
    codes = table["code"].combine_chunks().dictionary_encode()
    written = ontology.with_dots(codes.dictionary.to_pylist())
    place = table.column_names.index("code")
    return table.set_column(place, table.schema.field(place), pa.array(written, pa.string()).take(codes.indices))


def _input_digest(input_dir: str | Path | None, options: dict[str, Any]) -> str | None:
    """Tells input files apart by name and size, not by when they were copied; None where there are none."""
    given = [Path(str(place)) for place in (input_dir, *(options.get(name) for name in NoteTables._fields)) if place]
    files = [path for place in given for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    sizes = sorted((path.name, path.stat().st_size) for path in files)
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16] if sizes else None


def _existing(output: Path, source: str, settings: dict[str, Any], shards: int | None) -> NoteFolder:
    """The folder that is there, if it is the one asked for."""
    folder = NoteFolder.open(output)
    info = folder.info
    if settings["input"] is None:  # the raw files are gone, or never were
        settings = settings | {"input": info.options.get("input")}
    if (info.source, info.options) != (source, settings) or shards not in (None, info.shards):
        raise EhrDataError(
            f"`output` must not hold notes of other input or prepared in another way, and {output} does. Choose "
            "another or remove it."
        )
    return folder


@dataclass
class _Preparation:
    """The way of one source into ``folder``; ``index`` has a row for every note that came in."""

    raw: RawNotes
    folder: Path
    min_characters: int
    exclude_categories: tuple[str, ...]
    index: pl.DataFrame = field(default_factory=pl.DataFrame)
    tables: dict[str, list[pa.Table]] = field(default_factory=lambda: {"labels": [], "spans": []})
    left_out: Counter[str] = field(default_factory=Counter)

    def stage(self) -> None:
        """Reads the source once: texts go to one file per shard, ids, labels and spans stay in memory."""
        rows: list[pl.DataFrame] = []
        with _Stage(self.folder / _STAGING, self.raw.shards) as stage:
            for part in tqdm(self.raw.parts, desc="Reading notes", unit="part", total=self.raw.total):
                rows.append(self._add(part, stage))
                self.tables["labels"].append(part.labels)
                self.tables["spans"].append(part.spans)
        if not any(part.height for part in rows):
            raise EhrDataError("`notes` must hold at least one note, got none. Check the input.")
        self.index = pl.concat(rows)
        copies = self.index.height - self.index["note_id"].n_unique()
        if copies:
            raise EhrDataError(
                f"NOTES column `note_id` must name each note once, and {copies} rows repeat one. Remove copies."
            )
        splits = self.index["split"]
        if 0 < splits.null_count() < len(splits) or not splits.drop_nulls().is_in(OFFICIAL_SPLITS).all():
            raise EhrDataError(
                f"NOTES column `split` must be one of {', '.join(OFFICIAL_SPLITS)} in all notes, or in none; "
                f"{splits.null_count()} of {len(splits)} have none. Fill or drop the column."
            )

        self._warn_of_shared_patients()

    def _warn_of_shared_patients(self) -> None:
        """Patients in several official parts belong to the first of them; their other notes will be in no split."""
        part = pl.col("split").replace_strict(list(_FIRST), range(len(_FIRST)), return_dtype=pl.Int8, default=None)
        lost = self.index.with_columns(part=part).filter(pl.col("part") > pl.col("part").min().over("subject_id"))
        counts = dict(sorted(lost["split"].value_counts().iter_rows()))
        if counts:
            named = " and ".join(f"{count:,} {name} notes" for name, count in counts.items())
            self.raw.warnings.append(f"{named} will be in no split: their patients have notes in an earlier part.")

    def _add(self, part: NoteTables, stage: _Stage) -> pl.DataFrame:
        """Stages the notes that stay; returns the index of all."""
        notes = part.notes
        filtered = filter_notes(notes, min_characters=self.min_characters, exclude_categories=self.exclude_categories)
        self.left_out[f"notes of fewer than {self.min_characters} characters"] += filtered.too_short
        for category, number in filtered.excluded.items():
            self.left_out[f"notes of the type {category!r}"] += number
        stays = pc.is_in(notes["note_id"], value_set=filtered.notes["note_id"].combine_chunks())
        stage.add(notes.filter(stays))
        columns = notes.select(["note_id", "subject_id", "visit_id", "time", "split"])
        columns = columns.append_column("characters", pc.utf8_length(notes["text"])).append_column("stays", stays)
        return pl.DataFrame(columns)

    def labels(self, imputation: ImputationMode) -> pa.Table:
        """LABELS of the notes that stay, each once, native ones before imputed ones."""
        given = _dotted(pa.concat_tables([LABEL_TABLE_SCHEMA.empty_table(), *self.tables["labels"]]))
        self._check_known(given, "LABELS")
        if not _all(pc.match_substring_regex(given["code"], r"^[^/\s]+/\S+$")):
            raise EhrDataError("LABELS column `code` must be VOCABULARY/CODE, e.g. ICD10CM/E11.9, and some are not.")
        if not _all(pc.is_in(given["provenance"], value_set=pa.array(["native", "imputed"]))):
            raise EhrDataError("LABELS column `provenance` must be native or imputed, and some are not.")
        distinct = pl.DataFrame(given).sort("provenance", descending=True)
        distinct = distinct.unique(["note_id", "code"], keep="first")
        self.left_out["labels given twice"] += given.num_rows - distinct.height
        timeline = self.index.select("note_id", "subject_id", "visit_id", "time", text=pl.lit("")).to_arrow()
        complete = impute_chronic_codes(distinct.to_arrow(), timeline, mode=imputation)
        return self._of_kept_notes(complete, ["note_id", "code"], "labels")

    def spans(self) -> pa.Table:
        """SPANS of the notes that stay."""
        given = _dotted(pa.concat_tables([SPAN_TABLE_SCHEMA.empty_table(), *self.tables["spans"]]))
        self._check_known(given, "SPANS")
        kinds = EVIDENCE_KINDS + DISTRACTOR_KINDS
        if not _all(pc.is_in(given["kind"], value_set=pa.array(kinds))):
            raise EhrDataError(f"SPANS column `kind` must be one of {', '.join(kinds)}, and some are not.")
        placed = pl.DataFrame(given).join(self.index.select("note_id", "characters"), on="note_id", how="left")
        outside = placed.filter(
            (pl.col("start") < 0) | (pl.col("start") >= pl.col("end")) | (pl.col("end") > pl.col("characters"))
        )
        if outside.height:
            raise EhrDataError(
                f"SPANS columns `start` and `end` must satisfy 0 ≤ start < end ≤ characters of the note; "
                f"{outside.height} of {given.num_rows} spans do not. Count characters of the original text, not bytes."
            )
        return self._of_kept_notes(given, ["note_id", "start", "end", "code"], "spans")

    def _check_known(self, table: pa.Table, name: str) -> None:
        unknown = pl.DataFrame(table.select(["note_id"])).join(self.index, on="note_id", how="anti").height
        if unknown:
            raise EhrDataError(
                f"{name} column `note_id` must name notes that are there; {unknown} of {table.num_rows} rows do not. "
                "Give all the notes; short ones are left out here."
            )

    def _of_kept_notes(self, table: pa.Table, order: list[str], name: str) -> pa.Table:
        kept = self.index.filter("stays").select("note_id")
        rows = pl.DataFrame(table).join(kept, on="note_id", how="semi").sort(order)
        self.left_out[f"{name} of notes that were left out"] += table.num_rows - rows.height
        return rows.to_arrow()

    def write(self, labels: pa.Table, spans: pa.Table) -> None:
        """Writes the shards and ``codes.parquet``."""
        shard = self.index["subject_id"].to_numpy() % self.raw.shards
        shard_of = self.index.select("note_id", shard=pl.Series(shard))
        parts = {
            "labels": _by_shard(labels.cast(LABEL_TABLE_SCHEMA), shard_of, self.raw.shards),
            "spans": _by_shard(spans.cast(SPAN_TABLE_SCHEMA), shard_of, self.raw.shards),
        }
        shards = range(self.raw.shards)
        for index in tqdm(shards, desc="Writing notes", unit="shard", disable=self.raw.shards < 2):
            name = shard_name(index, self.raw.shards)
            write_parquet(_staged(self.folder / _STAGING, index), self.folder / "notes" / name)
            for table, of_shard in parts.items():
                write_parquet(of_shard[index], self.folder / table / name)
        write_parquet(_code_table(labels), self.folder / "codes.parquet")
        shutil.rmtree(self.folder / _STAGING)

    def summary(self, labels: pa.Table, spans: pa.Table) -> dict[str, Any]:
        """What ``dataset.json`` says about the content."""
        kept = self.index.filter("stays")
        codes = pl.DataFrame(pq.read_table(self.folder / "codes.parquet"))
        status = codes["status"].fill_null("of another vocabulary").value_counts(sort=True)
        return {
            "language": self.raw.language,
            "notes": kept.height,
            "patients": kept["subject_id"].n_unique(),
            "notes_without_codes": kept.height - pc.count_distinct(labels["note_id"]).as_py(),
            "labels": labels.num_rows,
            "imputed_labels": pc.sum(pc.equal(labels["provenance"], "imputed"), min_count=0).as_py(),
            "codes": codes.height,
            "codes_by_status": dict(status.iter_rows()),
            "spans": spans.num_rows,
            "left_out": {reason: number for reason, number in self.left_out.items() if number},
        }


class _Stage:
    """One Arrow stream per shard, written batch by batch."""

    def __init__(self, directory: Path, shards: int):
        self.directory, self.shards = directory, shards
        self.streams: dict[int, Any] = {}

    def __enter__(self) -> _Stage:
        self.directory.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()

    def add(self, notes: pa.Table) -> None:
        shard = notes["subject_id"].to_numpy() % self.shards
        for index in np.unique(shard).tolist():
            if index not in self.streams:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                path = self.directory / f"{index}.arrow"
                self.streams[index] = pa.ipc.new_stream(path, STORED_NOTE_SCHEMA, options=options)
            self.streams[index].write_table(notes.filter(pa.array(shard == index)))


def _all(holds: pa.ChunkedArray) -> bool:
    return pc.all(holds, min_count=0).as_py()


def _staged(directory: Path, index: int) -> pa.Table:
    """NOTES of a shard by patient, time and note; empty where no note came."""
    path = directory / f"{index}.arrow"
    if not path.is_file():
        return STORED_NOTE_SCHEMA.empty_table()
    with pa.ipc.open_stream(path) as stream:
        notes = stream.read_all()
    order = [("subject_id", "ascending"), ("time", "ascending"), ("note_id", "ascending")]
    return notes.take(pc.sort_indices(notes, sort_keys=order))


def _by_shard(table: pa.Table, shard_of: pl.DataFrame, shards: int) -> list[pa.Table]:
    """The rows of each shard, in the order of ``table``."""
    shard = pl.DataFrame(table.select(["note_id"])).join(shard_of, on="note_id", how="left", maintain_order="left")
    places = shard["shard"].to_numpy()
    order = np.argsort(places, kind="stable")
    bounds = np.searchsorted(places[order], np.arange(shards + 1))
    grouped = table.take(pa.array(order))
    return [grouped.slice(first, last - first) for first, last in pairwise(bounds.tolist())]


def _code_table(labels: pa.Table) -> pa.Table:
    counts = pl.DataFrame(labels).group_by("code").len("documents")
    counts = counts.sort(["documents", "code"], descending=[True, False])
    codes = counts["code"].to_list()
    columns = {
        "code": codes,
        "description": ontology.describe(codes),
        "documents": counts["documents"].to_list(),
        "status": ontology.code_status(codes),
    }
    return pa.table(columns, schema=CODE_TABLE_SCHEMA)
