"""The relational engine of the sources: one Ibis expression, run by DuckDB in process or by Spark.

A file is read as text and every declared column is parsed here, so that both engines agree on what a number or a date
is and no row is dropped without a trace: what cannot be parsed ends in ``Scan.rejected`` with file, row and reason.
"""

from __future__ import annotations

import csv
import gzip
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from hf_ehr.schema import EVENT_SCHEMA, LABEL_SCHEMA, EhrDataError

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import pyarrow as pa

ColumnType = Literal["int64", "float64", "string", "timestamp", "date"]
SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
ROW = "_row"
"""Name of the row number (1 is the first data row, null on Spark) that every scanned table carries."""

_INTEGER = r"^[+-]?[0-9]{1,18}([.]0*)?$"
_FLOAT = r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$"
_TIMESTAMP = (
    r"^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([ T][0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(Z|[+-][0-9]{2}(:[0-9]{2})?)?)?$"
)
_TEXT = "_text_"
_CLOCK = r"^[0-9]+-[0-9]+-[0-9]+([ T][0-9:.]+)?"
_COMPACT_DATE = r"^[0-9]{8}$"


@dataclass(frozen=True)
class Column:
    """What a source asks of one column.

    Attributes:
        type: Integers may carry a zero fraction (``12.0``); timestamps and dates are ISO 8601, with or without
            separators (``2020-01-31``, ``20200131``, ``2020-01-31 10:00:00``); a zone in a text is dropped, the
            times are those of the data's own clock.
        required: A row where it is null is rejected.
        optional: The file may lack the column, which then reads as nulls.
    """

    type: ColumnType = "string"
    required: bool = False
    optional: bool = False


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
        time_axis: ``calendar``, ``shifted`` or ``order``, see ``schema.DatasetInfo``.
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
            temp_directory: Where it spills.

        Raises:
            ImportError: ``spark`` was asked for without the extra.
            ValueError: There is no engine of this name.
        """
        spill = str(temp_directory or tempfile.gettempdir())
        if name == "duckdb":
            import ibis

            settings = {"memory_limit": memory_limit, "temp_directory": spill, "preserve_insertion_order": False}
            return cls(ibis.duckdb.connect(**settings, **({"threads": threads} if threads else {})), name)
        if name == "spark":
            return cls(_connect_spark(memory_limit, threads, spill), name)
        raise ValueError(f"`engine` must be 'duckdb' or 'spark', got {name!r}.")

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
        (of those the first in the order of their content is kept, so that both engines keep the same one).

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
        raw = self._read(path, delimiter, header)
        names = _match_columns(raw, columns, path, header)
        with readable(path):
            if not allow_empty and not len(raw.limit(1).to_pyarrow()):
                raise EhrDataError(
                    f"{path} has no rows. Export the table again, or leave the file out if it is optional."
                )
        return _check_rows(self._number(raw), names, columns, tuple(key), tuple(null_values), path.name)

    def _read(self, path: Path, delimiter: str | None, header: bool) -> ir.Table:
        check_gzip(path)
        with readable(path):
            if path.is_dir() or path.suffix == ".parquet":
                return self.con.read_parquet(_parquet_files(path))
            delimiter = delimiter or ("\t" if ".tsv" in path.suffixes else ",")
            names = _first_line(path, delimiter, header)
            if self.name == "duckdb":
                options: dict[str, Any] = {"auto_detect": False, "header": header, "delim": delimiter}
                options["columns"] = dict.fromkeys(names, "VARCHAR")
            else:
                options = {"inferSchema": False, "header": header, "sep": delimiter}
                options |= {"multiLine": True, "mode": "FAILFAST"}
            return self.con.read_csv(str(path), quote='"', escape='"', **options)

    def _number(self, raw: ir.Table) -> ir.Table:
        import ibis

        # DuckDB's unordered row_number follows the file and costs nothing where no one looks at it; Spark has none.
        row = ibis.row_number() + 1 if self.name == "duckdb" else ibis.null("int64")
        return raw.mutate(**{ROW: row.cast("int64")})


def _connect_spark(memory_limit: str, threads: int | None, spill: str) -> Any:
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
    session = SparkSession.builder.config(conf=conf).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return ibis.pyspark.connect(session)


@overload
def find_table(input_dir: Path, name: str, *, folders: Sequence[str] = ("",)) -> Path: ...
@overload
def find_table(input_dir: Path, name: str, *, folders: Sequence[str] = ("",), required: bool) -> Path | None: ...
def find_table(input_dir: Path, name: str, *, folders: Sequence[str] = ("",), required: bool = True) -> Path | None:
    """The file of table ``name`` in ``input_dir`` or its subfolders ``folders``: any case, CSV, TSV or Parquet.

    Raises:
        EhrDataError: A required table is not there.
    """
    wanted = [f"{name}{suffix}".lower() for suffix in SUFFIXES] + [name.lower()]
    for folder in folders:
        directory = Path(input_dir) / folder
        if not directory.is_dir():
            continue
        found = {path.name.lower(): path for path in sorted(directory.iterdir())}
        for path in filter(None, map(found.get, wanted)):
            if path.is_file() or any(path.rglob("*.parquet")):
                return path
    if required:
        places = " or ".join(str(Path(input_dir) / folder) for folder in folders)
        raise EhrDataError(
            f"Table `{name}` is missing: looked in {places} for {', '.join(name + suffix for suffix in SUFFIXES)} "
            "(any case). Check `input_dir`."
        )
    return None


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


def check_gzip(path: Path) -> None:
    """Decompresses a gzip file without keeping it: a truncated one must not pass for a shorter table.

    Raises:
        EhrDataError: The file ends early or is damaged.
    """
    if path.suffix != ".gz":
        return
    try:
        with gzip.open(path) as stream:
            while stream.read(1 << 22):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise EhrDataError(
            f"{path} is a truncated or damaged gzip file ({error}). Copy or download it again."
        ) from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an engine's error about ``path`` into ours, without the line of patient data that engines quote."""
    try:
        yield
    except EhrDataError:
        raise
    except Exception as error:
        raise EhrDataError(f"{path} cannot be read: {_without_data(str(error))}") from None


def _without_data(message: str) -> str:
    line = re.search(r"Line: (\d+)", message)
    if line:
        rules = [
            text for text in message.splitlines() if text.startswith(("Expected", "Value with", "Invalid unicode"))
        ]
        return f"line {line.group(1)}: {rules[0] if rules else 'it does not fit the header.'}"
    return message.splitlines()[0][:200] if message else "unknown error."


def _first_line(path: Path, delimiter: str, header: bool) -> list[str]:
    """The column names of a CSV file, ``column0``, … without a header."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
        names = next(csv.reader(stream, delimiter=delimiter), [])
    if not names:
        raise EhrDataError(f"{path} is empty. Export the table again.")
    if not header:
        return [f"column{number}" for number in range(len(names))]
    folded = [name.strip().lower() for name in names]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    if twice:
        raise EhrDataError(f"{path} has the column `{twice[0]}` more than once. Rename or drop one.")
    return names


def _parquet_files(path: Path) -> list[str]:
    files = sorted(str(part) for part in path.rglob("*.parquet")) if path.is_dir() else [str(path)]
    if not files:
        raise EhrDataError(f"{path} holds no Parquet file.")
    return files


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


def _check_rows(
    raw: ir.Table,
    names: Mapping[str, str | None],
    columns: Mapping[str, Column],
    key: tuple[str, ...],
    null_values: tuple[str, ...],
    file: str,
) -> Scan:
    """Parses the declared columns and splits the rows by the first rule they break."""
    import ibis

    cells: dict[str, Any] = {ROW: raw[ROW]}
    for name, column in columns.items():
        source = names[name]
        if source is None:
            cells[name] = ibis.null(column.type)
        else:
            cells[_TEXT + name], cells[name] = _parse(raw[source], column.type, null_values)
    parsed = raw.select(**cells)
    rules: list[tuple[ir.BooleanValue, str, str]] = []
    for name, column in columns.items():
        if column.required:
            rules.append((parsed[_TEXT + name].isnull(), name, f"`{name}` is missing"))
        if column.type != "string" and names[name] is not None:
            unreadable = parsed[name].isnull() & parsed[_TEXT + name].notnull()
            rules.append((unreadable, name, f"`{name}` is no readable {column.type}"))
    valid, rejected = _first_broken(parsed, rules, file)
    valid = valid.select(ROW, *columns)
    if key:
        valid, repeats = _unique(valid, columns, key, file)
        rejected = rejected.union(repeats)
    return Scan(valid, rejected)


def _first_broken(
    parsed: ir.Table, rules: list[tuple[ir.BooleanValue, str, str]], file: str
) -> tuple[ir.Table, ir.Table]:
    """Splits by the first of several (condition, column, reason) in one pass over the file."""
    import ibis

    if not rules:
        return reject(parsed, ibis.literal(False), file=file, column=ROW, reason="")
    numbered = [(condition, number) for number, (condition, *_) in enumerate(rules)]
    parsed = parsed.mutate(_rule=ibis.cases(*numbered, else_=-1))
    bad = parsed.filter(parsed["_rule"] >= 0)
    hits = [bad["_rule"] == number for number in range(len(rules))]
    rejected = bad.select(
        file=ibis.literal(file),
        row=bad[ROW],
        column=ibis.cases(*[(hit, name) for hit, (_, name, _) in zip(hits, rules, strict=True)]),
        value=ibis.cases(*[(hit, bad[_TEXT + name]) for hit, (_, name, _) in zip(hits, rules, strict=True)]),
        reason=ibis.cases(*[(hit, reason) for hit, (_, _, reason) in zip(hits, rules, strict=True)]),
    )
    return parsed.filter(parsed["_rule"] < 0), rejected


def _unique(
    table: ir.Table, columns: Mapping[str, Column], key: tuple[str, ...], file: str
) -> tuple[ir.Table, ir.Table]:
    import ibis

    order = ibis.window(group_by=list(key), order_by=[table[name] for name in columns if name not in key])
    ranked = table.mutate(_repeat=ibis.row_number().over(order))
    reason = f"repeats the key ({', '.join(key)}) of another row"
    kept, repeats = reject(ranked, ranked["_repeat"] > 0, file=file, column=",".join(key), reason=reason)
    return kept.select(ROW, *columns), repeats


def _parse(raw: ir.Column, dtype: ColumnType, null_values: tuple[str, ...]) -> tuple[ir.StringValue, ir.Value]:
    """(the trimmed text or null, its value or null where it cannot be parsed)."""
    import ibis

    if raw.type().is_floating() and dtype == "int64":  # pandas writes integers with nulls as floats
        whole = ibis.ifelse(raw == raw.floor(), raw, ibis.null("float64"))
        return raw.cast("string"), whole.cast("int64")
    if raw.type().is_numeric() and dtype in ("int64", "float64"):
        return raw.cast("string"), raw.cast(dtype)
    if raw.type().is_temporal() and dtype in ("timestamp", "date"):
        return raw.cast("string"), raw.cast("timestamp").cast(dtype)
    text = cast("ir.StringValue", raw.cast("string")).strip()
    text = text.nullif("")
    for null in null_values:
        text = text.nullif(null)
    if dtype == "string":
        return text, text
    if dtype == "int64":
        good = ibis.ifelse(text.re_search(_INTEGER), text, ibis.null("string"))
        return text, good.re_replace("[.]0*$", "").try_cast("int64")
    if dtype == "float64":
        return text, ibis.ifelse(text.re_search(_FLOAT), text, ibis.null("string")).try_cast("float64")
    dashed = text.substr(0, 4) + "-" + text.substr(4, 2) + "-" + text.substr(6, 2)
    clock = text.re_extract(_CLOCK, 0)
    iso = ibis.cases((text.re_search(_COMPACT_DATE), dashed), (text.re_search(_TIMESTAMP), clock))
    return text, iso.try_cast("timestamp").cast(dtype)
