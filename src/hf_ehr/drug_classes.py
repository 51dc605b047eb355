"""Medications of a prepared folder → ATC classes, through a table that the user has.

ATC's licence forbids shipping it, and so no table comes with the package. One of two columns, ``code`` and ``atc``, as
CSV or Parquet is read; a code may have several classes, each then counts. Codes that are in ATC already are taken as
they are. What the table does not know is left out and reported: a target that nobody can name is none.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ._histories import offsets_of, total_before
from .models.code_hierarchy import is_valid
from .schema import RECORD_SCHEMA, VISIT, DatasetInfo, EhrDataError, atomic_folder, shard_paths, write_parquet

LEVEL_CHARACTERS = {1: 1, 2: 3, 3: 4, 4: 5, 5: 7}
"""Length of an ATC code by its level. MedM-PLM and G-BERT cut at the third (``C07A``), SafeDrug at the fourth."""
NDC_PARTS = (5, 4, 2)


@dataclass(frozen=True)
class DrugClasses:
    """Which ATC classes a drug code has.

    Attributes:
        table: ``code`` (``NDC/00002143380``) and ``atc`` (``ATC/C07AB02``), distinct pairs.
        level: ATC level that classes are cut to; coarser ones stay as they are.
    """

    table: pl.DataFrame
    level: int

    @classmethod
    def read(cls, path: str | Path, *, level: int = 3, vocabulary: str = "NDC") -> DrugClasses:
        """Reads a CSV or Parquet table of ``code`` and ``atc``.

        Args:
            path: The table; other columns are not read. Rows without a class are skipped.
            level: 1 to 5.
            vocabulary: Of codes that do not name theirs. NDC become 11 digits, as the sources write them: hyphenated
                ones part by part, others with zeros in front.

        Raises:
            EhrDataError: There is no such file, a column is missing, a class is no ATC code, or there is none at all.
            ValueError: The level is not known.
        """
        if level not in LEVEL_CHARACTERS:
            raise ValueError(f"`level` must be one of {', '.join(map(str, LEVEL_CHARACTERS))}, got {level}.")
        frame = _read(Path(path)).select(pl.col("code").str.strip_chars(), pl.col("atc").str.strip_chars())
        frame = frame.with_row_index("row", offset=1).filter((pl.col("code") != "") & (pl.col("atc") != ""))
        frame = frame.with_columns(
            atc="ATC/" + pl.col("atc").str.to_uppercase().str.strip_prefix("ATC/"), code=_named("code", vocabulary)
        )
        valid = np.fromiter((is_valid(code) for code in frame["atc"]), bool, len(frame))
        if not valid.all() or frame.is_empty():
            row = frame.filter(~valid)["row"].head(1).to_list()
            found = f"row {row[0]} is none" if row else "the table has no row"
            raise EhrDataError(f"`atc` must hold ATC codes (C07AB02), {found}. Correct {path}.")
        return cls(frame.select("code", "atc").unique(maintain_order=True), level)

    def classes(self, codes: pl.DataFrame) -> pl.DataFrame:
        """The classes of codes, one row each, in the order of the rows and then of the table.

        Args:
            codes: ``code`` and columns of the caller's own.

        Returns:
            The same rows with ``atc``; null where a code has none.
        """
        known = codes.join(self.table, on="code", how="left", maintain_order="left_right")
        own = pl.when(pl.col("code").str.starts_with("ATC/")).then(pl.col("code")).otherwise(pl.col("atc"))
        return known.with_columns(atc=own.str.slice(0, len("ATC/") + LEVEL_CHARACTERS[self.level]))


@dataclass(frozen=True)
class MappedDrugs:
    """What became of the medications of a folder, in occurrences.

    Attributes:
        occurrences: Medications of all visits.
        mapped: Those that have a class.
        unmapped: Those that have none, by vocabulary.
    """

    occurrences: int
    mapped: int
    unmapped: dict[str, int]

    def __str__(self) -> str:
        missing = ", ".join(f"{count:,} {name}" for name, count in self.unmapped.items()) or "none"
        share = self.mapped / max(self.occurrences, 1)
        return f"{self.mapped:,} of {self.occurrences:,} medications have a class ({share:.1%}); without: {missing}."


def map_drugs(data: str | Path, output: str | Path, classes: DrugClasses) -> MappedDrugs:
    """Writes a prepared folder whose medications are ATC classes; all else is as it was, its split included.

    Of classes that meet in a visit the one that was known first stays, as of codes that occur twice. Events keep the
    source's codes. Label files are left behind: they may speak of the old codes.

    Args:
        data: Prepared folder.
        output: Folder to write; it must not exist, and appears when it is whole.
        classes: What maps.

    Raises:
        EhrDataError: The input is not prepared, the output exists, or no medication has a class.
    """
    data, output = Path(data), Path(output)
    if output.exists():
        raise EhrDataError(f"`output` must not exist, and {output} does. Choose another folder, or remove it.")
    info, counts = DatasetInfo.load(data), Counter[str]()
    with atomic_folder(output) as folder:
        for path in tqdm(shard_paths(data, "records"), desc="Mapping drugs", unit="shard"):
            mapped = map_records(pq.read_table(path, schema=RECORD_SCHEMA), classes, counts)
            write_parquet(mapped, folder / "records" / path.name)
        occurrences, found = counts.pop("occurrences", 0), counts.pop("mapped", 0)
        if occurrences and not found:
            raise EhrDataError(
                f"No medication of {data} has a class; their vocabularies are {', '.join(counts)}. Check the column "
                "`code` of the table: it must be VOCABULARY/CODE, or `vocabulary` must name the vocabulary."
            )
        report = MappedDrugs(occurrences, found, dict(counts.most_common()))
        _take_along(data, folder)
        options = {**info.options, "drug_classes": {"level": classes.level}}
        warnings = [*info.warnings, f"Medications are ATC classes of level {classes.level}: {report}"]
        replace(info, options=options, warnings=warnings).save(folder)
    return report


def map_records(records: pa.Table, classes: DrugClasses, counts: Counter[str]) -> pa.Table:
    """RECORDS with ATC classes for medications; adds to ``counts``: occurrences, mapped, and vocabularies without."""
    visits = records["visits"].combine_chunks()
    fields = visits.flatten()
    lists, times = (pc.struct_field(fields, name) for name in ("medications", "medications_at"))
    visit = np.repeat(np.arange(len(lists)), np.diff(offsets_of(lists)))
    flat = pl.DataFrame({"visit": visit, "code": pl.from_arrow(lists.flatten()), "at": pl.from_arrow(times.flatten())})
    found = classes.classes(flat.with_row_index("place"))
    unknown = found.filter(pl.col("atc").is_null())
    names = unknown.select(pl.col("code").str.split("/").list.first())["code"].value_counts(sort=True)
    counts.update(occurrences=len(flat), mapped=len(flat) - len(unknown), **dict(names.iter_rows()))
    found = found.drop_nulls("atc").sort("visit", pl.col("at").fill_null(_LAST), "place", maintain_order=True)
    found = found.unique(["visit", "atc"], keep="first", maintain_order=True)
    found = found.sort("visit", "place", maintain_order=True)
    offsets = total_before(np.bincount(found["visit"].to_numpy(), minlength=len(lists)))
    columns = {field.name: pc.struct_field(fields, field.name) for field in VISIT}
    for name, values in (("medications", found["atc"]), ("medications_at", found["at"])):
        kind = VISIT.field(name).type.value_type
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.to_arrow().cast(kind))
    nested = pa.StructArray.from_arrays(list(columns.values()), fields=list(VISIT))
    rows = pa.ListArray.from_arrays(pa.array(offsets_of(visits), pa.int32()), nested)
    return records.set_column(records.column_names.index("visits"), RECORD_SCHEMA.field("visits"), rows)


_LAST: Any = pl.datetime(9999, 1, 1, time_unit="us")


def _take_along(data: Path, folder: Path) -> None:
    """Events as links, which cost nothing, and the salt of the split, so that both folders tell the same patients."""
    for path in (data / "events").glob("*.parquet"):
        (folder / "events").mkdir(exist_ok=True)
        try:
            os.link(path, folder / "events" / path.name)
        except OSError:  # another disk
            shutil.copy2(path, folder / "events" / path.name)
    for name in ("split_salt", "rejected.parquet"):
        if (data / name).is_file():
            shutil.copy2(data / name, folder / name)


def _read(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise EhrDataError(f"`table` must be a CSV or Parquet file of `code` and `atc`, and {path} is none.")
    frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
    missing = [name for name in ("code", "atc") if name not in frame.columns]
    if missing:
        raise EhrDataError(f"{path} must have the columns `code` and `atc`, got {frame.columns}. Rename them.")
    return frame.select(pl.col("code", "atc").cast(pl.String).fill_null(""))


def _named(column: str, vocabulary: str) -> pl.Expr:
    """Codes as VOCABULARY/CODE; NDC as 11 digits."""
    code = pl.col(column)
    code = pl.when(code.str.contains("/")).then(code).otherwise(vocabulary + "/" + code)
    digits = code.str.strip_prefix("NDC/")
    parts = [
        digits.str.split("-").list.get(place, null_on_oob=True).str.zfill(width)
        for place, width in enumerate(NDC_PARTS)
    ]
    hyphenated = digits.str.contains(r"^\d+-\d+-\d+$")
    whole = pl.when(hyphenated).then(pl.concat_str(parts)).otherwise(digits.str.zfill(sum(NDC_PARTS)))
    return pl.when(code.str.contains(r"^NDC/[\d-]+$")).then("NDC/" + whole).otherwise(code)


__all__ = ["LEVEL_CHARACTERS", "DrugClasses", "MappedDrugs", "map_drugs", "map_records"]
