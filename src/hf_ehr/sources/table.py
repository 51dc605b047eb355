"""Any long or wide CSV, TSV or Parquet → EVENTS, told by a column map what its columns are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_ehr.schema import BIRTH_CODE, VISIT_KINDS, EhrDataError
from hf_ehr.sources._codes import ICD_SHAPES, dotted, has_icd_shape, joined
from hf_ehr.sources._table_cells import (
    FILE,
    Rule,
    as_age,
    as_date,
    as_float,
    as_integer,
    index_in,
    nth,
    one_per_row,
    rank_in,
    recoded,
    seconds,
    sort_keys,
    split,
    union,
    vocabulary_and_code,
)
from hf_ehr.sources._table_map import INTEGER, Codes, File, Label, Recoded, TableMap, load_map
from hf_ehr.sources.engine import Column, Engine, Extract, Source, as_events, as_labels

if TYPE_CHECKING:
    import ibis.expr.types as ir

GRAVITY = ("unknown", "home", "facility", "transfer", "against_advice", "hospice", "died")
"""Of several dispositions in the rows of a visit the last one in this order counts."""

_DAY = 86_400
_YEAR = 365.25 * _DAY


class _Rows(NamedTuple):
    """The valid rows of one entry of ``files``, with the rejected ones."""

    file: File
    table: ir.Table
    rejected: ir.Table


def table(engine: Engine, input_dir: str | Path, *, columns: str | Mapping[str, Any]) -> Source:
    """Reads tables by a column map.

    A map has ``files``, each ``{path: glob, subject, visit?, start|time?, end?, order?, length_of_stay?, age?, codes,
    static, discharge, visit_kind, planned, position, null_values, delimiter, date_format}``, and ``labels``, each
    ``{name, column, positive: [...], at: end}``; ``maps/`` holds two to start from. Codes are a code per row
    (``{kind, column, vocabulary}``), side by side (``{kind, columns, vocabulary}``; their order is the priority) or
    flags (with ``absent: ["No"]``; the code is ``VOCABULARY/column``). A vocabulary is a name, ``{column, values}`` or
    ``{prefix: {ICD9_: ICD9CM}}``; undotted ICD codes get their dot.

    - Rows of the same ``visit`` are one visit, from the earliest start to the latest end; without ``visit`` those of a
      subject with the same end date are. Without ``end`` a visit ends ``length_of_stay`` days after its start.
    - Codes are timed and available at the end of their visit. ``position`` sorts the codes of a visit by columns,
      numbers before text, ``-column`` downwards, missing values last.
    - ``order`` stands in for dates: a patient's visits start whole numbers of steps after 1970-01-01, a step being
      longer than any stay, and the time axis is ``order``.
    - Ids that are not all integers are replaced by their rank (from 1) among the sorted distinct ids.
    - The birth is the start of the first visit with a known ``age`` minus that age (bands such as ``[70-80)`` count as
      their middle). A static value is that of the first visit that has one.
    - A visit stays when a code of it is rejected: the other codes and its dates are sound.

    Args:
        engine: The engine.
        input_dir: Folder of the files, or the one file.
        columns: The map, the path of a YAML file with it, or the name of one that comes with the package.

    Raises:
        EhrDataError: The map breaks a rule, or a file or a column that it names is missing.
    """
    plan = load_map(columns)
    entries = [_read(engine, file, plan.labels, Path(input_dir)) for file in plan.files]
    entries, warnings = _number_ids(entries)
    visits = _visits(entries, plan)
    ordered = any(file.order for file in plan.files)
    if ordered:
        warnings.append("intervals between visits are unknown: times say only in which order a patient's visits were.")
    makers = [entry.rejected for entry in entries if entry.file.makes_visits]
    extracts = [Extract("visits", _visit_events(visits, entries), makers)]
    for number, entry in enumerate(entries):
        extracts += _code_extracts(entry, number, visits)
        if not entry.file.makes_visits:
            extracts.append(_static_extract(entry, number))
    labels = {label.name: _labels(visits, number, label) for number, label in enumerate(plan.labels)}
    return Source("table", extracts, "order" if ordered else "calendar", warnings, labels)


# Rows


def _read(engine: Engine, file: File, labels: Sequence[Label], input_dir: Path) -> _Rows:
    """Scans the files of an entry as one table with the parsed columns ``_subject, _visit, _start, …``."""
    import ibis

    paths = [input_dir] if input_dir.is_file() else sorted(input_dir.glob(file.path))
    if not paths:
        raise EhrDataError(f"No file in {input_dir} matches `{file.path}`. Check `input_dir`, or `path` in the map.")
    asked = _asked(file, labels if file.makes_visits else ())
    scans = [
        engine.scan(path, asked, delimiter=file.delimiter, null_values=file.null_values).__dict__ | {"path": path}
        for path in paths
    ]
    tables = [scan["table"].mutate(**{FILE: ibis.literal(scan["path"].name)}) for scan in scans]
    rejected = [scan["rejected"] for scan in scans]
    rows = _parsed(union(tables), file, labels if file.makes_visits else ())
    rows, broken = split(rows, _row_rules(rows, file))
    rejected.append(broken)
    if file.row_per_visit:
        rows = rows.mutate(_repeat=rank_in(rows, ["_subject", "_visit"], [rows[name] for name in asked]))
        reason = f"repeats the visit (`{file.subject}`, `{file.visit}`) of another row"
        rows, broken = split(rows, [Rule(rows["_repeat"] > 0, str(file.visit), rows["_visit"], reason)])
        rejected.append(broken)
    return _Rows(file, rows, union(rejected))


def _asked(file: File, labels: Sequence[Label]) -> dict[str, Column]:
    """The columns to scan; required are those without which a row has no place."""
    items = [*file.static.values(), file.discharge, file.planned, file.visit_kind]
    texts = [item.column for item in items if isinstance(item, Recoded)]
    for codes in file.codes:
        texts += [*codes.columns, *([codes.vocabulary.column] if isinstance(codes.vocabulary, Recoded) else [])]
    texts += [name.removeprefix("-") for name in file.position] + [label.column for label in labels]
    asked = {name: Column() for name in [*texts, *filter(None, [file.age])]}
    required = [file.subject, file.visit, file.start, file.end, file.order, file.length_of_stay]
    return asked | {name: Column(required=True) for name in required if name}


def _parsed(rows: ir.Table, file: File, labels: Sequence[Label]) -> ir.Table:
    import ibis

    cells: dict[str, Any] = {"_subject": rows[file.subject]}
    if file.visit:
        cells["_visit"] = rows[file.visit]
    start, end = (as_date(rows[name], file.date_format) if name else None for name in (file.start, file.end))
    if start is not None or end is not None:
        cells["_start"] = start if start is not None else end
        cells["_end"] = end if end is not None else start
    if file.order:
        cells["_order"] = as_integer(rows[file.order])
    if file.length_of_stay:
        cells["_stay"] = as_float(rows[file.length_of_stay])
    if start is not None and file.length_of_stay:
        cells["_end"] = start + seconds(cells["_stay"] * _DAY)
    if file.age:
        cells["_age"] = as_age(rows[file.age])
    for name, item in file.static.items():
        cells[f"_static_{name}"] = recoded(rows, item, keep=True)
    for number, label in enumerate(labels):
        cells[f"_label_{number}"] = rows[label.column].isin(list(label.positive)).cast("int8")
    kind = file.visit_kind
    named = ibis.literal(kind) if isinstance(kind, str) else recoded(rows, kind)
    cells["_kind"] = index_in(named, VISIT_KINDS, "unknown")
    for name, meaning in (("planned", file.planned), ("discharge", file.discharge)):
        cells[f"_{name}_text"] = rows[meaning.column] if meaning else ibis.null("string")
    cells["_planned"] = recoded(rows, file.planned).cast("int64") if file.planned else ibis.null("int64")
    place = recoded(rows, file.discharge) if file.discharge else ibis.null("string")
    cells["_discharge"] = index_in(place, GRAVITY, "unknown")
    return rows.mutate(**cells)


def _row_rules(rows: ir.Table, file: File) -> list[Rule]:
    parsed = {"_start": file.start, "_end": file.end, "_order": file.order, "_stay": file.length_of_stay,
              "_age": file.age}  # fmt: skip
    words = {"_start": "date", "_end": "date", "_order": "integer", "_stay": "number", "_age": "number or age band"}
    rules = [
        Rule(rows[cell].isnull() & rows[name].notnull(), name, rows[name], f"`{name}` is no readable {words[cell]}")
        for cell, name in parsed.items()
        if name
    ]
    if file.length_of_stay:
        name = file.length_of_stay
        rules.append(Rule(rows["_stay"] < 0, name, rows[name], f"negative stay: `{name}` is below 0"))
    if file.start and file.end:
        reason = f"negative stay: `{file.end}` is before `{file.start}`"
        value = rows[file.start] + "," + rows[file.end]
        rules.append(Rule(rows["_end"] < rows["_start"], f"{file.start},{file.end}", value, reason))
    return rules


# Ids


def _number_ids(entries: list[_Rows]) -> tuple[list[_Rows], list[str]]:
    """Adds ``subject_id`` and ``visit_id`` as integers, with a warning for ids that had to be renumbered."""
    tables = [entry.table for entry in entries]
    warnings = []
    for text, name in (("_subject", "subject_id"), ("_visit", "visit_id")):
        holders = [number for number, rows in enumerate(tables) if text in rows.columns]
        if not holders:
            continue
        ids = union([tables[number].select(text) for number in holders]).distinct()
        if len(ids.filter(~ids[text].re_search(INTEGER)).limit(1).to_pyarrow()):
            ids = ids.mutate(**{name: rank_in(ids, [], [ids[text]]) + 1})
            warnings.append(f"`{name}` was renumbered: the ids are text, so each is its rank among the sorted ids.")
            numbered = [tables[number].join(ids, text) for number in holders]
        else:
            numbered = [tables[number].mutate(**{name: as_integer(tables[number][text])}) for number in holders]
        for number, rows in zip(holders, numbered, strict=True):
            tables[number] = rows
    pairs = zip(entries, tables, strict=True)
    return [entry._replace(table=_with_visit(entry.file, rows)) for entry, rows in pairs], warnings


def _with_visit(file: File, rows: ir.Table) -> ir.Table:
    """Without ids the visits of a subject are told apart by the day they end, counted from 1970."""
    if file.visit or not file.makes_visits:
        return rows
    return rows.mutate(visit_id=(rows["_end"].date().cast("timestamp").epoch_seconds() / _DAY).floor().cast("int64"))


# Visits


def _visits(entries: list[_Rows], plan: TableMap) -> ir.Table:
    """One row per (subject_id, visit_id): start, end, and what its rows say of it."""
    import ibis

    statics = sorted({f"_static_{name}" for file in plan.files if file.makes_visits for name in file.static})
    labels = [f"_label_{number}" for number in range(len(plan.labels))]
    types = {"_start": "timestamp(6)", "_end": "timestamp(6)", "_order": "int64", "_stay": "float64"}
    types |= {"_age": "float64", "_kind": "int64", "_planned": "int64", "_planned_text": "string"}
    types |= {"_discharge": "int64", "_discharge_text": "string"}
    types |= dict.fromkeys(statics, "string") | dict.fromkeys(labels, "int8")
    parts = []
    for rows in (entry.table for entry in entries if entry.file.makes_visits):
        cells = {
            name: rows[name].cast(kind) if name in rows.columns else ibis.null(kind) for name, kind in types.items()
        }
        parts.append(rows.select("subject_id", "visit_id", **cells))
    rows = union(parts)
    latest = {"_end", "_stay", "_discharge", *labels}
    merged = {name: rows[name].max() if name in latest else rows[name].min() for name in types}
    visits = rows.group_by("subject_id", "visit_id").agg(**merged)
    if any(file.order for file in plan.files):
        visits = _on_order_axis(visits)
    return visits.rename(start="_start", end="_end")


def _on_order_axis(visits: ir.Table) -> ir.Table:
    """Start and end by the rank of a patient's visits, a step longer than the longest stay apart."""
    import ibis

    longest = visits["_stay"].max().ceil().cast("int64").to_pyarrow().as_py()
    step = 1 if longest is None else longest + 1
    rank = rank_in(visits, ["subject_id"], [visits["_order"], visits["visit_id"]])
    start = ibis.timestamp("1970-01-01 00:00:00") + seconds(rank * step * _DAY)
    visits = visits.mutate(_start=start)
    return visits.mutate(_end=visits["_start"] + seconds(visits["_stay"].fill_null(0.0) * _DAY))


def _visit_events(visits: ir.Table, entries: list[_Rows]) -> ir.Table:
    """Admission and discharge of every visit; birth and static values of every patient."""
    import ibis

    admitted = as_events(
        visits,
        subject_id=visits["subject_id"],
        time=visits["start"],
        code="Visit/" + nth(visits["_kind"], VISIT_KINDS),
        numeric_value=visits["_planned"],
        text_value=visits["_planned_text"],
        visit_id=visits["visit_id"],
        kind="admission",
    )
    discharged = as_events(
        visits,
        subject_id=visits["subject_id"],
        time=visits["end"],
        code="Discharge/" + nth(visits["_discharge"], GRAVITY),
        text_value=visits["_discharge_text"],
        visit_id=visits["visit_id"],
        kind="discharge",
    )
    parts = [admitted, discharged]
    if any(entry.file.age for entry in entries):
        aged = _first_known(visits, "_age")
        birth = aged["start"] - seconds(aged["_age"] * _YEAR)
        parts.append(as_events(aged, subject_id=aged["subject_id"], time=birth, code=BIRTH_CODE, kind="birth"))
    for name in (name for name in visits.columns if name.startswith("_static_")):
        known = _first_known(visits, name)
        parts.append(_static(known, name))
    return ibis.union(*parts)


def _first_known(visits: ir.Table, name: str) -> ir.Table:
    """Each patient's first visit with a value of ``name``."""
    known = visits.filter(visits[name].notnull())
    known = known.mutate(_visit=rank_in(known, ["subject_id"], [known["start"], known["visit_id"]]))
    return known.filter(known["_visit"] == 0)


def _static(rows: ir.Table, name: str) -> ir.Table:
    code = joined(name.removeprefix("_static_"), rows[name])
    return as_events(rows, subject_id=rows["subject_id"], code=code, kind="static")


def _static_extract(entry: _Rows, number: int) -> Extract:
    """The static values of a file without visits, and the rows rejected from it."""
    parts = [as_events(entry.table.limit(0), code="", kind="static")]
    for name in (f"_static_{name}" for name in entry.file.static):
        rows = entry.table.filter(entry.table[name].notnull())
        parts.append(_static(rows.select("subject_id", name).distinct(), name))
    return Extract(f"file-{number}", union(parts), [entry.rejected])


def _labels(visits: ir.Table, number: int, label: Label) -> ir.Table:
    """One row for every visit whose column says something."""
    known = visits.filter(visits[f"_label_{number}"].notnull())
    positive = known[f"_label_{number}"] == 1
    return as_labels(known, subject_id=known["subject_id"], prediction_time=known[label.at], boolean_value=positive)


# Codes


def _code_extracts(entry: _Rows, number: int, visits: ir.Table) -> list[Extract]:
    extracts = []
    before: dict[str, int] = {}
    for index, codes in enumerate(entry.file.codes):
        events, rejected = _code_events(entry, codes, visits, before.get(codes.kind, 0))
        extracts.append(Extract(f"codes-{number}-{index}", events, [rejected]))
        before[codes.kind] = before.get(codes.kind, 0) + (len(codes.columns) if codes.wide else 1)
    return extracts


def _code_events(entry: _Rows, codes: Codes, visits: ir.Table, before: int) -> tuple[ir.Table, ir.Table]:
    """(events, rejected) of one entry of ``codes``; ``before`` counts the columns of its kind in earlier entries."""
    import ibis

    rows = one_per_row(entry.table, codes)
    known = visits.select("subject_id", "visit_id", "end", _known=True)
    rows = rows.left_join(known, ["subject_id", "visit_id"], rname="_right_{name}")
    vocabulary, code = vocabulary_and_code(rows, codes)
    rows = rows.mutate(_vocabulary=vocabulary, _code=code)
    rows = rows.mutate(_code=dotted(rows["_vocabulary"], rows["_code"]))
    rows, rejected = split(rows, _code_rules(rows, entry.file, codes))
    position: Any = None
    if codes.wide:
        position = rows["_slot"] + before + 1
    elif entry.file.position:
        keys = [key for name in entry.file.position for key in sort_keys(rows, name)]
        position = rank_in(rows, ["subject_id", "visit_id"], [*keys, rows["_code"]]) + before + 1
    if position is not None:
        rows = rows.mutate(_position=position)
    events = as_events(
        rows,
        subject_id=rows["subject_id"],
        time=rows["end"],
        code=joined(rows["_vocabulary"], rows["_code"]),
        visit_id=rows["visit_id"],
        kind=codes.kind,
        position=rows["_position"] if position is not None else ibis.null("int32"),
        available_at=rows["end"],
    )
    return events, rejected


def _code_rules(rows: ir.Table, file: File, codes: Codes) -> list[Rule]:
    raw, vocabulary = rows["_raw"], rows["_vocabulary"]
    shaped = [~((vocabulary == name) & ~has_icd_shape(name, rows["_code"])) for name in ICD_SHAPES]
    malformed = ~reduce(lambda one, other: one & other, shaped) | (rows["_code"] == "")
    absent = "names a visit of this subject that is missing or was rejected"
    rules = []
    for slot, name in enumerate(codes.columns):
        here = rows["_slot"] == slot
        rules += [
            Rule(here & raw.isnull(), name, raw, f"`{name}` is missing"),
            Rule(here & vocabulary.isnull(), name, raw, "unknown vocabulary: the map names none for this row"),
            Rule(here & malformed, name, raw, f"`{name}` is no code of its vocabulary"),
        ]
    if codes.absent is not None:
        rules = []
    if not file.makes_visits:
        rules.append(Rule(rows["_known"].isnull(), str(file.visit), rows["_visit"], absent))
    return rules
