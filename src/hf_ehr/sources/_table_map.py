"""The column map of the source ``table``: read, checked and turned into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_ehr.schema import DISPOSITIONS, VISIT_KINDS, EhrDataError

MAPS = Path(__file__).parent / "maps"
CODE_KINDS = ("diagnosis", "procedure", "medication")
DIRECTIVES = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "S": 2}
"""What a ``date_format`` may hold after ``%``, with the number of digits."""
INTEGER = r"^-?(0|[1-9][0-9]{0,17})([.]0*)?$"
"""An integer id; leading zeros make it text, or two ids would become one."""


@dataclass(frozen=True)
class Recoded:
    """A column and what its values mean; values that are not listed are left to the reader of the map."""

    column: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Codes:
    """One entry of ``codes``. ``wide``: a visit's codes are side by side; ``absent``: the columns are flags."""

    kind: str
    columns: tuple[str, ...]
    wide: bool
    vocabulary: str | Recoded | None
    prefixes: Mapping[str, str]
    absent: tuple[str, ...] | None


@dataclass(frozen=True)
class File:
    """One entry of ``files``."""

    path: str
    subject: str
    visit: str | None
    start: str | None
    end: str | None
    order: str | None
    length_of_stay: str | None
    age: str | None
    codes: tuple[Codes, ...]
    static: Mapping[str, Recoded]
    discharge: Recoded | None
    visit_kind: str | Recoded
    planned: Recoded | None
    position: tuple[str, ...]
    null_values: tuple[str, ...]
    delimiter: str | None
    date_format: str | None

    @property
    def makes_visits(self) -> bool:
        """Whether its rows say when a visit was; otherwise they belong to visits of another file."""
        return bool(self.start or self.end or self.order)

    @property
    def row_per_visit(self) -> bool:
        """Whether a visit may have one row only."""
        return self.visit is not None and all(codes.wide for codes in self.codes)


@dataclass(frozen=True)
class Label:
    """One entry of ``labels``: true where the visit's ``column`` is one of ``positive``, at its ``at``."""

    name: str
    column: str
    positive: tuple[str, ...]
    at: str


@dataclass(frozen=True)
class TableMap:
    """A whole column map."""

    files: tuple[File, ...]
    labels: tuple[Label, ...]


def load_map(columns: str | Mapping[str, Any]) -> TableMap:
    """Reads a column map.

    Args:
        columns: The map itself, the path of a YAML file with it, or the name of one that the package ships.

    Raises:
        EhrDataError: There is no such map, or it has an unknown key, lacks one or holds a value that breaks a rule.
    """
    if not isinstance(columns, str):
        return _table_map(columns)
    shipped = sorted(path.stem for path in MAPS.glob("*.yaml"))
    path = MAPS / f"{columns}.yaml" if columns in shipped else Path(columns)
    if not path.is_file():
        raise EhrDataError(
            f"`columns` must be a column map, the path of a YAML file or one of {', '.join(shipped)}, got {columns!r}."
        )
    try:
        return _table_map(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise EhrDataError(f"{path} is no YAML: {str(error).splitlines()[0]}. Correct the file.") from None


def _table_map(plain: Any) -> TableMap:
    _keys(plain, "columns", required=("files",), optional=("labels",))
    files = tuple(_file(entry, f"files[{i}]") for i, entry in enumerate(_list(plain["files"], "files")))
    labels = tuple(_label(entry, f"labels[{i}]") for i, entry in enumerate(_list(plain.get("labels", []), "labels")))
    makers = [file for file in files if file.makes_visits]
    if not makers:
        raise EhrDataError("`files` must say when a visit was: give one entry `start`, `end`, `time` or `order`.")
    if len({bool(file.order) for file in makers}) > 1:
        raise EhrDataError("`files` must have dates in all entries with visits or `order` in all. Split the map.")
    if len({bool(file.visit) for file in makers}) > 1:
        raise EhrDataError("`visit` must be in all entries with dates or in none. Add it, or split the map.")
    if not makers[0].visit and any(file.visit for file in files):
        raise EhrDataError("`visit` must also be in the entry with the dates, or its visits cannot be found.")
    names = [label.name for label in labels]
    if len(set(names)) < len(names):
        raise EhrDataError(f"`labels` must have different names, got {', '.join(names)}.")
    return TableMap(files, labels)


def _file(plain: Any, where: str) -> File:
    columns = ("visit", "start", "time", "end", "order", "length_of_stay", "age")
    others = ("codes", "static", "discharge", "visit_kind", "planned", "position", "null_values", "delimiter")
    _keys(plain, where, required=("path", "subject"), optional=(*columns, *others, "date_format"))
    if "start" in plain and "time" in plain:
        raise EhrDataError(f"`{where}` must have `start` or `time`, not both. Drop one.")
    named = {name: _text(plain[name], f"{where}.{name}") if name in plain else None for name in columns}
    time = named.pop("time")
    named["start"] = named["start"] or time
    kind = plain.get("visit_kind", "unknown")
    file = File(
        path=_text(plain["path"], f"{where}.path"),
        subject=_text(plain["subject"], f"{where}.subject"),
        codes=tuple(
            _codes(entry, f"{where}.codes[{i}]")
            for i, entry in enumerate(_list(plain.get("codes", []), f"{where}.codes"))
        ),
        static={
            name: _recoded(entry, f"{where}.static.{name}")
            for name, entry in _mapping(plain.get("static", {}), f"{where}.static").items()
        },
        discharge=_recoded(plain["discharge"], f"{where}.discharge", DISPOSITIONS) if "discharge" in plain else None,
        visit_kind=(
            _choice(kind, f"{where}.visit_kind", VISIT_KINDS)
            if isinstance(kind, str)
            else _recoded(kind, f"{where}.visit_kind", VISIT_KINDS)
        ),
        planned=_recoded(plain["planned"], f"{where}.planned", (0, 1, None)) if "planned" in plain else None,
        position=_texts(plain.get("position", []), f"{where}.position"),
        null_values=_texts(plain.get("null_values", []), f"{where}.null_values"),
        delimiter=_text(plain["delimiter"], f"{where}.delimiter") if "delimiter" in plain else None,
        date_format=_date_format(plain["date_format"], f"{where}.date_format") if "date_format" in plain else None,
        **named,
    )
    _check_file(file, where)
    return file


def _check_file(file: File, where: str) -> None:
    if file.order and (file.start or file.end):
        raise EhrDataError(f"`{where}` must have dates or `order`, not both. Drop `order` where there are dates.")
    if file.order and not file.visit:
        raise EhrDataError(f"`{where}` must name `visit` beside `order`: nothing else tells visits apart.")
    if file.length_of_stay and not (file.start or file.order):
        raise EhrDataError(f"`{where}.length_of_stay` must come with `start` or `order`. Drop it.")
    if file.length_of_stay and file.end:
        raise EhrDataError(f"`{where}` must have `end` or `length_of_stay`, not both. Drop one.")
    of_visits = {"codes": file.codes, "age": file.age, "discharge": file.discharge, "planned": file.planned}
    if not file.makes_visits:
        if file.codes and not file.visit:
            raise EhrDataError(f"`{where}` must name `visit`, a date or `order`, or its codes have no place in time.")
        stray = [name for name, value in of_visits.items() if value and name != "codes"]
        if stray:
            raise EhrDataError(f"`{where}.{stray[0]}` must be in an entry with dates or `order`. Move it there.")


def _codes(plain: Any, where: str) -> Codes:
    _keys(plain, where, required=("kind",), optional=("column", "columns", "vocabulary", "absent"))
    if ("column" in plain) == ("columns" in plain):
        raise EhrDataError(f"`{where}` must have `column` (a code per row) or `columns` (codes side by side).")
    wide = "columns" in plain
    columns = _texts(plain["columns"], f"{where}.columns") if wide else (_text(plain["column"], f"{where}.column"),)
    if not columns:
        raise EhrDataError(f"`{where}.columns` must name at least one column, got none.")
    if "absent" in plain and not (wide and isinstance(plain.get("vocabulary"), str)):
        raise EhrDataError(f"`{where}.absent` must come with `columns` and a fixed `vocabulary`.")
    vocabulary, prefixes = _vocabulary(plain.get("vocabulary"), f"{where}.vocabulary")
    return Codes(
        kind=_choice(plain["kind"], f"{where}.kind", CODE_KINDS),
        columns=columns,
        wide=wide,
        vocabulary=vocabulary,
        prefixes=prefixes,
        absent=_texts(plain["absent"], f"{where}.absent") if "absent" in plain else None,
    )


def _vocabulary(plain: Any, where: str) -> tuple[str | Recoded | None, dict[str, str]]:
    """(a fixed vocabulary or the column that says it, prefix of a code → vocabulary)."""
    if isinstance(plain, str) and plain:
        return plain, {}
    if isinstance(plain, Mapping) and set(plain) == {"prefix"}:
        table = _mapping(plain["prefix"], f"{where}.prefix")
        if table:
            return None, {key: _text(name, f"{where}.prefix.{key}") for key, name in table.items()}
    if isinstance(plain, Mapping) and set(plain) == {"column", "values"}:
        recoded = _recoded(plain, where)
        if recoded.values:
            return recoded, {}
    raise EhrDataError(
        f"`{where}` must be a name such as ICD9CM, {{column, values: {{raw: vocabulary}}}} or "
        f"{{prefix: {{ICD9_: ICD9CM}}}}, got {plain!r}."
    )


def _label(plain: Any, where: str) -> Label:
    _keys(plain, where, required=("name", "column", "positive"), optional=("at",))
    return Label(
        name=_text(plain["name"], f"{where}.name"),
        column=_text(plain["column"], f"{where}.column"),
        positive=_texts(plain["positive"], f"{where}.positive"),
        at=_choice(plain.get("at", "end"), f"{where}.at", ("start", "end")),
    )


def _recoded(plain: Any, where: str, allowed: Sequence[Any] | None = None) -> Recoded:
    if isinstance(plain, str):
        plain = {"column": plain}
    _keys(plain, where, required=("column",), optional=("values",))
    values = _mapping(plain.get("values", {}), f"{where}.values")
    for key, value in values.items():
        if allowed is not None:
            _choice(value, f"{where}.values.{key}", allowed)
    return Recoded(_text(plain["column"], f"{where}.column"), values)


def _keys(plain: Any, where: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    _mapping(plain, where)
    unknown = sorted(set(map(str, plain)) - set(required) - set(optional))
    if unknown:
        raise EhrDataError(
            f"`{where}` has the unknown key `{unknown[0]}`; known are {', '.join(required + optional)}. Correct it."
        )
    missing = [name for name in required if name not in plain]
    if missing:
        raise EhrDataError(f"`{where}` lacks the key `{missing[0]}`. Add it to the map.")


def _mapping(plain: Any, where: str) -> dict[str, Any]:
    if not isinstance(plain, Mapping):
        raise EhrDataError(f"`{where}` must be a mapping, got {plain!r}.")
    return {_raw(key, where): value for key, value in plain.items()}


def _list(plain: Any, where: str) -> list[Any]:
    if not isinstance(plain, list | tuple):
        raise EhrDataError(f"`{where}` must be a list, got {plain!r}.")
    return list(plain)


def _texts(plain: Any, where: str) -> tuple[str, ...]:
    return tuple(_raw(value, where) for value in _list(plain, where))


def _text(plain: Any, where: str) -> str:
    if not isinstance(plain, str) or not plain:
        raise EhrDataError(f"`{where}` must be a text, got {plain!r}.")
    return plain


def _raw(value: Any, where: str) -> str:
    """A raw value as text; YAML reads an unquoted No as false, which the file never holds."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise EhrDataError(f"`{where}` must hold texts or numbers, got {value!r}. Quote the value in the map.")


def _choice(value: Any, where: str, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise EhrDataError(f"`{where}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
    return value


def _date_format(plain: Any, where: str) -> str:
    text = _text(plain, where)
    found = [part[:1] for part in text.split("%")[1:]]
    if not {"Y", "m", "d"} <= set(found) or not set(found) <= set(DIRECTIVES) or len(set(found)) < len(found):
        known = " ".join(f"%{name}" for name in DIRECTIVES)
        raise EhrDataError(f"`{where}` must be made of {known}, each once, with at least %Y %m %d, got {plain!r}.")
    return text
