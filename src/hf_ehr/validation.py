"""Whether a prepared folder, or raw MEDS data, keeps the contracts: every break with file, rule and next step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_ehr.schema import (
    CODE_KINDS,
    RECORD_SCHEMA,
    DatasetInfo,
    EhrDataError,
    check_schema,
    shard_name,
    shard_paths,
    validate_events,
    validate_labels,
)
from hf_ehr.sources.meds import COLUMNS as MEDS_COLUMNS
from hf_ehr.sources.meds import map_codes

_WHOLE = "Prepare the folder again."
_TYPES: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "subject_id": ("a whole number", pa.types.is_integer),
    "time": ("a timestamp", lambda kind: pa.types.is_timestamp(kind) or pa.types.is_date(kind)),
    "code": ("text", lambda kind: _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)),
    "numeric_value": ("a number", lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind)),
    "text_value": ("text", lambda kind: _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)),
}


@dataclass
class Validation:
    """What was read, and what is wrong with it.

    Attributes:
        kind: ``prepared`` or ``meds``.
        counts: What was read, e.g. patients, events, labels.
        problems: One sentence each: file, field, rule, next step. Never an id, a time or a text of a patient.
        remarks: What a reader should know, and what is no break of a rule.
    """

    kind: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def count(self, name: str, number: int) -> None:
        """Adds to a count."""
        self.counts[name] = self.counts.get(name, 0) + number


def validate(path: str | Path) -> Validation:
    """Checks a prepared folder (``dataset.json``) or raw MEDS data (a Parquet file, or a folder of them).

    Of a prepared folder: the contracts of EVENTS, RECORDS and LABELS; that a patient is in one shard and that shard is
    ``subject_id % shards``; visits by start, measurements by hour, codes of a visit distinct and each with its time.
    Of MEDS: its columns and their types, rows without subject or code, the order of each subject's rows, and how
    many codes the reader knows. Memory is that of a shard.

    Raises:
        EhrDataError: There is nothing to check.
    """
    path = Path(path)
    if not path.exists():
        raise EhrDataError(f"{path} must be a prepared folder or MEDS data, and does not exist. Check its name.")
    if (path / "dataset.json").is_file():
        return _prepared(path)
    if (path / "records").is_dir():
        raise EhrDataError(f"{path} lacks `dataset.json`: its preparation did not finish. Run `hf-ehr prepare` again.")
    return _meds(path)


def _prepared(path: Path) -> Validation:
    found, info = Validation("prepared"), DatasetInfo.load(path)
    found.remarks += [f"source {info.source}, time axis {info.time_axis}", *info.warnings]
    if (path / "notes").is_dir() and not (path / "records").is_dir():
        from hf_ehr.notes.folder import NoteFolder

        found.count("notes", sum(table.num_rows for table in NoteFolder.open(path).notes()))
        return found
    subjects = np.empty(0, np.int64)
    for arrow, check in (("events", _event_shard), ("records", _record_shard)):
        try:
            paths = shard_paths(path, arrow)
        except EhrDataError as error:
            found.problems.append(str(error))
            continue
        wanted = [shard_name(place, info.shards) for place in range(info.shards)]
        if missing := sorted(set(wanted) - {shard.name for shard in paths}):
            found.problems.append(f"{arrow}/ lacks {len(missing)} of {info.shards} shards ({missing[0]}). {_WHOLE}")
        for shard in tqdm(paths, desc=f"Checking {arrow}", unit="shard", disable=len(paths) < 2):
            table = _read(shard, found)
            if table is not None:
                ids = _collected(check(table), f"{arrow}/{shard.name}", found)
                _check_shard(ids, shard, info.shards, found)
                found.count(arrow if arrow == "events" else "patients", table.num_rows)
                if arrow == "records":
                    subjects = np.append(subjects, ids)
    for file in sorted((path / "labels").glob("*.parquet")):
        _check_labels(file, np.unique(subjects), found)
    return found


def _read(path: Path, found: Validation) -> pa.Table | None:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid):
        found.problems.append(f"{path.parent.name}/{path.name} must be a whole Parquet file, and is none. {_WHOLE}")
        return None


def _collected(problems: Iterator[str | np.ndarray], name: str, found: Validation) -> np.ndarray:
    """Takes what a check yields: sentences, and in the end the ids of the patients."""
    ids = np.empty(0, np.int64)
    for item in problems:
        if isinstance(item, str):
            found.problems.append(f"{name}: {item}")
        else:
            ids = item
    return ids


def _event_shard(table: pa.Table) -> Iterator[str | np.ndarray]:
    try:
        events = validate_events(table)
    except EhrDataError as error:
        yield str(error)
        return
    yield pc.unique(events["subject_id"]).to_numpy()


def _record_shard(table: pa.Table) -> Iterator[str | np.ndarray]:
    try:
        records = check_schema(table, RECORD_SCHEMA, "RECORDS")
    except EhrDataError as error:
        yield str(error)
        return
    frame = pl.DataFrame(records)
    if frame["subject_id"].n_unique() < len(frame):
        yield f"`subject_id` must be distinct, {len(frame) - frame['subject_id'].n_unique()} rows repeat one. {_WHOLE}"
    visits = frame.select("visits").with_row_index("row").explode("visits").drop_nulls("visits").unnest("visits")
    starts = visits.filter(pl.col("start").is_not_null())
    unsorted = starts.select((pl.col("start").diff() < pl.duration()).over("row").sum()).item()
    if unsorted:
        yield f"`visits` must be sorted by `start`, {unsorted} begin before the one before them. {_WHOLE}"
    for kind in CODE_KINDS:
        codes = pl.col(kind)
        repeated = visits.filter(codes.list.n_unique() < codes.list.len()).height
        uneven = visits.filter(codes.list.len() != pl.col(f"{kind}_at").list.len()).height
        if repeated:
            yield f"`{kind}` of a visit must be distinct, {repeated} visits repeat a code. {_WHOLE}"
        if uneven:
            yield f"`{kind}_at` must hold a time for each of `{kind}`, in {uneven} visits it does not. {_WHOLE}"
    yield from _unsorted_stays(visits)
    yield frame["subject_id"].to_numpy()


def _unsorted_stays(visits: pl.DataFrame) -> Iterator[str]:
    stays = visits.select("stays").explode("stays").drop_nulls().unnest("stays")
    hours = pl.col("measurements").list.eval(pl.element().struct.field("hour"))
    late = stays.select(hours.list.diff().list.min().alias("least")).filter(pl.col("least") < 0).height
    if late:
        yield f"`measurements` of a stay must be sorted by `hour`, those of {late} stays are not. {_WHOLE}"


def _check_shard(ids: np.ndarray, shard: Path, shards: int, found: Validation) -> None:
    place = int(shard.name.split("-")[1])
    strangers = int((ids % shards != place).sum())
    if strangers:
        found.problems.append(
            f"{shard.parent.name}/{shard.name} must hold patients with `subject_id % {shards}` = {place}, {strangers} "
            f"belong elsewhere. {_WHOLE}"
        )


def _check_labels(path: Path, subjects: np.ndarray, found: Validation) -> None:
    name = f"labels/{path.name}"
    try:
        labels = validate_labels(pq.read_table(path))
    except (EhrDataError, OSError, pa.ArrowInvalid) as error:
        rule = str(error) if isinstance(error, EhrDataError) else "must be a whole Parquet file, and is none"
        found.problems.append(f"{name}: {rule} Make the labels again (`hf_ehr.tasks.label_dataset`).")
        return
    found.count("labels", labels.num_rows)
    strangers = int((~np.isin(labels["subject_id"].to_numpy(), subjects)).sum())
    if strangers:
        found.remarks.append(f"{name}: {strangers} labels are of patients without a record, and are not used")


# MEDS


def _meds(path: Path) -> Validation:
    found = Validation("meds")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.parquet") if "metadata" not in p.parts)
    if not files or files[0].suffix != ".parquet":
        raise EhrDataError(f"{path} must be a prepared folder, or hold Parquet files of MEDS; found none. Check it.")
    owners: list[np.ndarray] = []
    codes: set[str] = set()
    for file in tqdm(files, desc="Checking MEDS", unit="file", disable=len(files) < 2):
        name = file.name if path.is_file() else str(file.relative_to(path))
        table = _read(file, found)
        if table is None:
            continue
        columns = _meds_columns(table, name, found)
        if columns is None:
            continue
        found.count("events", table.num_rows)
        ids = _check_meds_rows(columns, name, found)
        found.count("patients", len(ids))
        owners.append(ids)
        codes |= set(pc.unique(columns["code"].cast(pa.string())).drop_null().to_pylist())
    everyone = np.concatenate(owners) if owners else np.empty(0, np.int64)
    split = len(everyone) - len(np.unique(everyone))
    if split:
        found.problems.append(
            f"{split} subjects are in more than one file; MEDS keeps a subject in one. Write whole subjects per file."
        )
    unknown = map_codes(codes)["_known"].null_count
    if unknown:
        found.remarks.append(f"{unknown} of {len(codes)} distinct codes have no known spelling: `MEDS/…` measurements")
    return found


def _meds_columns(table: pa.Table, name: str, found: Validation) -> dict[str, pa.ChunkedArray] | None:
    """The columns of MEDS by our names; None where one that it requires is missing."""
    folded = {column.strip().lower(): column for column in table.column_names}
    columns = {}
    for ours, (aliases, column) in MEDS_COLUMNS.items():
        there = next((folded[alias] for alias in aliases if alias in folded), None)
        if there is None and not column.optional:
            given = ", ".join(table.column_names)
            found.problems.append(f"{name} lacks the column `{ours}`, which MEDS requires. Columns found: {given}.")
            return None
        if there is None:
            continue
        columns[ours] = table[there]
        rule, holds = _TYPES.get(ours, ("", lambda kind: True))
        if not holds(table[there].type):
            found.problems.append(f"{name}: `{there}` must be {rule}, got {table[there].type}. Cast the column.")
            return None
    return columns


def _check_meds_rows(columns: dict[str, pa.ChunkedArray], name: str, found: Validation) -> np.ndarray:
    """Nulls and order; the subjects of the file."""
    for required in ("subject_id", "code"):
        empty = columns[required].null_count
        if empty:
            found.problems.append(f"{name}: `{required}` must not be null; {empty} rows are. Remove or complete them.")
    rows = pl.DataFrame({key: columns[key] for key in ("subject_id", "time")}).drop_nulls("subject_id")
    runs = rows["subject_id"].rle_id().n_unique() if len(rows) else 0
    subjects = rows["subject_id"].unique()
    if runs > len(subjects):
        found.problems.append(
            f"{name}: rows of a subject must lie together, and do not. Sort by `subject_id`, `time`."
        )
    else:
        early = rows.select((pl.col("time").diff() < pl.duration()).over("subject_id").sum()).item()
        if early:
            found.problems.append(f"{name}: `time` must not fall within a subject; {early} rows do. Sort the file.")
    return subjects.cast(pl.Int64).to_numpy()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
