"""The relational engine of the sources: one Ibis expression, run by DuckDB in process or by Spark.

A file is read as text and every declared column is parsed here, so that both engines agree on what a number or a date
is and no row is dropped without a trace: what cannot be parsed ends in ``Scan.rejected`` with file, row and reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_ehr.schema import EVENT_SCHEMA, LABEL_SCHEMA, EhrDataError
from hf_ehr.sources._files import SUFFIXES, check_gzip, find_table, first_line, parquet_files, readable
from hf_ehr.sources._parse import Column, as_text, as_value

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import pyarrow as pa

__all__ = [
    "ROW", "SUFFIXES", "Column", "Engine", "Extract", "Scan", "Source", "as_events", "as_labels", "check_gzip",
    "find_table", "readable", "reject",
]  # fmt: skip

ROW = "_row"
"""Name of the row number (1 is the first data row, null on Spark) that every scanned table carries."""

_TEXT = "_text_"
_VERDICT = ("_column", "_value", "_reason")


@dataclass
class Scan:
    """One file, read: every input row is in exactly one of the two tables.

    Attributes:
        table: The declared columns, typed, plus the row number ``_row``; valid rows only.
        rejected: The other rows, in the columns of ``schema.REJECTED_SCHEMA``.
    """

    table: ir.Table
    rejected: ir.Table


@dataclass
class Extract:
    """The events of one input table, with the rows of it that did not become events."""

    name: str
    events: ir.Table
    rejected: list[ir.Table] = field(default_factory=list)


@dataclass
class Source:
    """What a source function returns; nothing has been computed yet.

    Attributes:
        name: Name of the source, e.g. ``mimic3``.
        extracts: One for each input table.
        time_axis: ``calendar``, ``shifted``, ``visit`` or ``order``, see ``schema.DatasetInfo``.
        warnings: What a reader of the data should know.
        labels: Label sets that come with the data, each in the columns of ``schema.LABEL_SCHEMA``.
    """

    name: str
    extracts: list[Extract]
    time_axis: str
    warnings: list[str] = field(default_factory=list)
    labels: dict[str, ir.Table] = field(default_factory=dict)


@dataclass
class Engine:
    """An Ibis connection and the name of what runs it."""

    con: Any
    name: Literal["duckdb", "spark"]
    folder: tempfile.TemporaryDirectory | Path  # keeps the tables that were read
    owned: bool = True  # whether it was opened here

    @classmethod
    def connect(
        cls,
        name: Literal["duckdb", "spark"] = "duckdb",
        *,
        memory_limit: str = "2GB",
        threads: int | None = None,
        temp_directory: str | Path | None = None,
    ) -> Engine:
        """Opens an engine.

        Args:
            name: ``duckdb`` runs in this process. ``spark`` joins the running session or the one that ``spark-submit``
                describes, else starts a local one; needs the extra ``spark`` and Java 17.
            memory_limit: What the engine may hold before it spills to disk, e.g. ``2GB``.
            threads: Number of threads, all cores by default.
            temp_directory: Where it spills, and keeps each text file that it has parsed as Parquet: a later engine
                with the same folder does not parse it again. By default a folder that goes when the engine goes.

        Raises:
            ImportError: ``spark`` was asked for without the extra.
            ValueError: There is no engine of this name.
        """
        folder = tempfile.TemporaryDirectory(prefix="hf_ehr-") if temp_directory is None else Path(temp_directory)
        spill = str(folder.name if isinstance(folder, tempfile.TemporaryDirectory) else folder)
        if name == "duckdb":
            import ibis

            settings = {"memory_limit": memory_limit, "temp_directory": spill, "preserve_insertion_order": False}
            return cls(ibis.duckdb.connect(**settings, **({"threads": threads} if threads else {})), name, folder)
        if name == "spark":
            con, joined = _connect_spark(memory_limit, threads, spill if temp_directory else _spark_folder().name)
            return cls(con, name, folder, owned=not joined)
        raise ValueError(f"`engine` must be 'duckdb' or 'spark', got {name!r}.")

    def close(self) -> None:
        """Ends the connection, unless it joined a Spark session that somebody else runs."""
        if self.owned:
            self.con.disconnect()

    def scan(
        self,
        path: Path,
        columns: Mapping[str, Column],
        *,
        key: Sequence[str] = (),
        delimiter: str | None = None,
        header: bool = True,
        null_values: Sequence[str] = (),
        allow_empty: bool = False,
    ) -> Scan:
        """Reads the declared columns of a CSV or TSV file (plain or gzip), a Parquet file or a folder of them.

        Names are matched without regard to case. Text is trimmed, blank text is null. A row is rejected for a required
        value that is null, for any declared value that cannot be parsed, and for repeating the ``key`` of another row
        (of those the first in the order of their content is kept, so that both engines keep the same one). A text file
        is read and parsed once, here.

        Args:
            path: File or folder.
            columns: Name → what is asked of it; without a header the order gives the names.
            key: Columns that must identify a row.
            delimiter: Comma, or tab for ``.tsv``, by default.
            header: Whether the first line names the columns.
            null_values: Texts that mean null, e.g. ``?``.
            allow_empty: Whether a table without rows is fine.

        Raises:
            EhrDataError: The file cannot be read, lacks a column or has no rows.
        """
        with readable(path):
            if path.is_dir() or path.suffix == ".parquet":
                raw = self._read_parquet(path)
                parsed = self._parse(raw, _match_columns(raw, columns, path, header), columns, tuple(null_values))
            else:
                delimiter = delimiter or ("\t" if ".tsv" in path.suffixes else ",")
                parsed = self._parse_text(path, columns, delimiter, header, tuple(null_values))
            if not allow_empty and not len(parsed.limit(1).to_pyarrow()):
                raise EhrDataError(f"{path} has no rows. Export the table again, or leave out the file if it may be.")
        return _split(parsed, columns, tuple(key), path.name)

    def _parse_text(
        self, path: Path, columns: Mapping[str, Column], delimiter: str, header: bool, null_values: tuple[str, ...]
    ) -> ir.Table:
        """The parsed table of a text file, from the folder where it was kept if it was parsed before."""
        status = path.stat()
        asked = [
            str(path.resolve()),
            status.st_size,
            status.st_mtime_ns,
            dict(columns),
            delimiter,
            header,
            null_values,
        ]
        name = f"{path.name.split('.')[0]}-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.parquet"
        kept = Path(self.folder.name if isinstance(self.folder, tempfile.TemporaryDirectory) else self.folder) / name
        if not kept.exists():
            check_gzip(path)
            raw = self._read_text(path, first_line(path, delimiter, header), delimiter, header)
            matched = _match_columns(raw, columns, path, header)
            temporary = kept.with_name(f".{name}")
            if temporary.is_dir():
                shutil.rmtree(temporary)
            self.con.to_parquet(self._parse(raw, matched, columns, null_values), temporary)
            temporary.replace(kept)
        return self._read_parquet(kept)

    def _read_parquet(self, path: Path) -> ir.Table:
        files = parquet_files(path)
        if self.name == "duckdb":
            return self.con.read_parquet(files)
        return self.con.read_parquet(str(path), recursiveFileLookup=True, pathGlobFilter="*.parquet")

    def _read_text(self, path: Path, names: list[str], delimiter: str, header: bool) -> ir.Table:
        if self.name == "duckdb":
            options: dict[str, Any] = {"auto_detect": False, "header": header, "delim": delimiter}
            options["columns"] = dict.fromkeys(names, "VARCHAR")
        else:
            options = {"inferSchema": False, "header": header, "sep": delimiter, "multiLine": True, "mode": "FAILFAST"}
        return self.con.read_csv(str(path), quote='"', escape='"', **options)

    def _parse(
        self,
        raw: ir.Table,
        names: Mapping[str, str | None],
        columns: Mapping[str, Column],
        null_values: tuple[str, ...],
    ) -> ir.Table:
        """``_row``, the declared columns, and column, value and reason of the first rule that the row breaks."""
        import ibis

        # DuckDB's unordered row_number follows the file and costs nothing where no one looks at it; Spark has none.
        row = ibis.row_number() + 1 if self.name == "duckdb" else ibis.null("int64")
        texts = {_TEXT + name: as_text(raw[source], null_values) for name, source in names.items() if source}
        table = raw.mutate(**{ROW: row.cast("int64")}, **texts)
        values = {
            name: as_value(table[source], table[_TEXT + name], columns[name].type)
            if source
            else ibis.null(columns[name].type)
            for name, source in names.items()
        }
        table = table.select(ROW, *texts, **values)
        broken = [(name, *rule) for name in columns if names[name] for rule in _rules(table, name, columns[name])]
        if not broken:
            return table.select(ROW, *columns, **{name: ibis.null("string") for name in _VERDICT})
        return table.select(
            ROW,
            *columns,
            _column=ibis.cases(*[(condition, name) for name, condition, _ in broken]),
            _value=ibis.cases(*[(condition, table[_TEXT + name]) for name, condition, _ in broken]),
            _reason=ibis.cases(*[(condition, reason) for _, condition, reason in broken]),
        )


def _rules(table: ir.Table, name: str, column: Column) -> list[tuple[ir.BooleanValue, str]]:
    """(where it is broken, the rule in words) of every rule of a column."""
    rules = [(table[_TEXT + name].isnull(), f"`{name}` is missing")] if column.required else []
    if column.type != "string":
        unreadable = table[name].isnull() & table[_TEXT + name].notnull()
        rules.append((unreadable, f"`{name}` is no readable {column.type}"))
    return rules


def _split(parsed: ir.Table, columns: Mapping[str, Column], key: tuple[str, ...], file: str) -> Scan:
    import ibis

    bad = parsed.filter(parsed["_reason"].notnull())
    rejected = bad.select(
        file=ibis.literal(file), row=bad[ROW], column=bad["_column"], value=bad["_value"], reason=bad["_reason"]
    )
    valid = parsed.filter(parsed["_reason"].isnull()).select(ROW, *columns)
    if not key:
        return Scan(valid, rejected)
    valid, repeats = _unique(valid, columns, key, file)
    return Scan(valid, rejected.union(repeats))


def _unique(
    table: ir.Table, columns: Mapping[str, Column], key: tuple[str, ...], file: str
) -> tuple[ir.Table, ir.Table]:
    import ibis

    order = ibis.window(group_by=list(key), order_by=[table[name] for name in columns if name not in key])
    ranked = table.mutate(_repeat=ibis.row_number().over(order))
    reason = f"repeats the key ({', '.join(key)}) of another row"
    kept, repeats = reject(ranked, ranked["_repeat"] > 0, file=file, column=",".join(key), reason=reason)
    return kept.select(ROW, *columns), repeats


def _match_columns(raw: ir.Table, columns: Mapping[str, Column], path: Path, header: bool) -> dict[str, str | None]:
    """Declared name → name in the file, None for an optional column that is not there."""
    if not header:
        if len(raw.columns) < len(columns):
            raise EhrDataError(
                f"{path} must have {len(columns)} columns ({', '.join(columns)}), got {len(raw.columns)}."
            )
        return dict(zip(columns, raw.columns, strict=False))
    present = {name.strip().lstrip("\ufeff").lower(): name for name in raw.columns}
    missing = [name for name, column in columns.items() if name.lower() not in present and not column.optional]
    if missing:
        raise EhrDataError(f"{path} lacks the column `{missing[0]}`. Columns found: {', '.join(raw.columns)}.")
    return {name: present.get(name.lower()) for name in columns}


@cache
def _spark_folder() -> tempfile.TemporaryDirectory:
    """Where Spark spills by default, as long as this process lives: its session outlives the engine that began it."""
    return tempfile.TemporaryDirectory(prefix="hf_ehr-spark-")


def _connect_spark(memory_limit: str, threads: int | None, spill: str) -> tuple[Any, bool]:
    """(connection, whether the session was there before)."""
    import ibis

    try:
        from pyspark import SparkConf
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ImportError(
            "The Spark engine needs pyspark and Java 17: pip install 'transformers-ehr[spark]', "
            "or use the default engine 'duckdb'."
        ) from error
    conf = SparkConf()
    defaults = {
        "spark.app.name": "hf-ehr",
        "spark.master": f"local[{threads or '*'}]",
        "spark.driver.memory": memory_limit.lower().removesuffix("b"),
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.local.dir": spill,
        "spark.sql.shuffle.partitions": "8",
        "spark.sql.catalogImplementation": "in-memory",
        "spark.sql.warehouse.dir": str(Path(spill) / "spark-warehouse"),
    }
    if "spark.master" in dict(conf.getAll()):  # a cluster was chosen outside: only what the results depend on is ours
        defaults = {"spark.app.name": "hf-ehr"}
    for key, value in defaults.items():
        conf.setIfMissing(key, value)
    conf.set("spark.sql.session.timeZone", "UTC")
    conf.set("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else its workers run whatever `python3` is
    joined = SparkSession.getActiveSession() is not None
    session = SparkSession.builder.config(conf=conf).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return ibis.pyspark.connect(session), joined


def reject(
    table: ir.Table, broken: ir.BooleanValue, *, file: str, column: str, reason: str
) -> tuple[ir.Table, ir.Table]:
    """Splits a scanned table by a rule: (rows that keep it, rejected rows in ``schema.REJECTED_SCHEMA``).

    Args:
        table: A ``Scan.table`` or anything made of it that kept ``_row``.
        broken: Where the rule is broken; null counts as kept.
        file: Name of the input file.
        column: The column whose value is reported; several, joined by a comma, are reported joined by a comma.
        reason: The rule in words.
    """
    import ibis

    broken = broken.fill_null(False)
    value, *others = [table[name].cast("string") for name in column.split(",")]
    for other in others:
        value = value.fill_null("") + "," + other.fill_null("")
    rejected = table.filter(broken).select(
        file=ibis.literal(file), row=table[ROW], column=ibis.literal(column), value=value, reason=ibis.literal(reason)
    )
    return table.filter(~broken), rejected


def as_events(table: ir.Table, **columns: Any) -> ir.Table:
    """``table`` as EVENTS: a column of the schema that is not given is null."""
    return _as_schema(table, EVENT_SCHEMA, columns)


def as_labels(table: ir.Table, **columns: Any) -> ir.Table:
    """``table`` as LABELS: a column of the schema that is not given is null."""
    return _as_schema(table, LABEL_SCHEMA, columns)


def _as_schema(table: ir.Table, schema: pa.Schema, columns: dict[str, Any]) -> ir.Table:
    import ibis

    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"Columns must be among {schema.names}, got {sorted(unknown)}.")
    types = ibis.Schema.from_pyarrow(schema)
    selected = {
        name: (columns[name] if isinstance(columns.get(name), ibis.Expr) else ibis.literal(columns.get(name))).cast(
            dtype.copy(nullable=True)
        )
        for name, dtype in types.items()
    }
    return table.select(**selected)
