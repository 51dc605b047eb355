"""Cells of a mapped table as Ibis expressions that mean the same on DuckDB and on Spark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_ehr.sources._codes import lookup
from hf_ehr.sources._parse import as_value
from hf_ehr.sources._table_map import DIRECTIVES, INTEGER, Codes, Recoded
from hf_ehr.sources.engine import ROW

if TYPE_CHECKING:
    import ibis.expr.types as ir

FILE = "_file"
"""Name of the column with the name of the file that a row came from."""

_NUMBER = r"^[0-9]+([.][0-9]*)?$"
_BAND = r"^[\[(]?([0-9]+) *- *([0-9]+)[\])]?$"


class Rule(NamedTuple):
    """A rule on rows: where it is broken, the columns and the value to report, and the rule in words."""

    broken: ir.BooleanValue
    column: str
    value: ir.Value
    reason: str


def split(rows: ir.Table, rules: Sequence[Rule]) -> tuple[ir.Table, ir.Table]:
    """(rows that keep all rules, the others by the first one they break); the file's name comes from the row."""
    import ibis

    first = ibis.literal(-1)
    for number, rule in reversed(list(enumerate(rules))):
        first = ibis.ifelse(rule.broken.fill_null(False), number, first)
    values = [(first == number, rule.value.cast("string")) for number, rule in enumerate(rules)]
    text = ibis.cases(*values) if values else ibis.null("string")
    rows = rows.mutate(_rule=first.cast("int64"), _value=text)
    bad = rows.filter(rows["_rule"] >= 0)
    rejected = bad.select(
        file=bad[FILE],
        row=bad[ROW],
        column=nth(bad["_rule"], [rule.column for rule in rules]),
        value=bad["_value"],
        reason=nth(bad["_rule"], [rule.reason for rule in rules]),
    )
    return rows.filter(rows["_rule"] < 0).drop("_rule", "_value"), rejected


def one_per_row(rows: ir.Table, codes: Codes) -> ir.Table:
    """Rows with ``_raw``, the text of one code, and the column it came from (``_slot``, counted from 0)."""
    import ibis

    if not codes.wide:
        return rows.mutate(_raw=rows[codes.columns[0]], _slot=ibis.literal(0))
    cells = [
        ibis.struct({"slot": ibis.literal(slot, "int64"), "text": rows[name]})
        for slot, name in enumerate(codes.columns)
    ]
    long = rows.mutate(_cell=ibis.array(cells).unnest())
    long = long.mutate(_raw=long["_cell"]["text"], _slot=long["_cell"]["slot"]).drop("_cell")
    long = long.filter(long["_raw"].notnull())
    if codes.absent is None:
        return long
    present = long.filter(long["_raw"].notin(list(codes.absent))) if codes.absent else long
    return present.mutate(_raw=nth(present["_slot"], codes.columns))


def vocabulary_and_code(rows: ir.Table, codes: Codes) -> tuple[ir.StringValue, ir.StringValue]:
    import ibis

    raw = rows["_raw"]
    if isinstance(codes.vocabulary, str):
        return ibis.literal(codes.vocabulary), raw
    if isinstance(codes.vocabulary, Recoded):
        return lookup(rows[codes.vocabulary.column], codes.vocabulary.values), raw
    longest_first = sorted(codes.prefixes, key=len, reverse=True)
    vocabulary = ibis.cases(*[(raw.startswith(prefix), codes.prefixes[prefix]) for prefix in longest_first])
    code = ibis.cases(*[(raw.startswith(prefix), raw.substr(len(prefix))) for prefix in longest_first], else_=raw)
    return vocabulary, code


def sort_keys(rows: ir.Table, name: str) -> list[ir.Value]:
    """Numbers by value, then text; missing values last in either direction."""
    text = rows[name.removeprefix("-")].upper()
    keys = [as_float(text), text]
    return [(key.desc if name.startswith("-") else key.asc)(nulls_first=False) for key in keys]


def recoded(rows: ir.Table, item: Recoded, keep: bool = False) -> ir.Value:
    """What the column's values mean; a value that is not listed stays itself (``keep``) or is null."""
    import ibis

    column = rows[item.column]
    if not item.values:
        return column if keep else column.nullif(column)
    branches = [
        (column == raw, ibis.literal(None if new is None else str(new), "string")) for raw, new in item.values.items()
    ]
    return ibis.cases(*branches, else_=column if keep else None)


def as_integer(text: ir.StringValue) -> ir.IntegerValue:
    import ibis

    good = ibis.ifelse(text.re_search(INTEGER), text, ibis.null("string"))
    return good.re_replace("[.]0*$", "").try_cast("int64")


def as_float(text: ir.StringValue) -> ir.FloatingValue:
    import ibis

    return ibis.ifelse(text.re_search("^[+-]?[0-9]+([.][0-9]*)?$"), text, ibis.null("string")).try_cast("float64")


def as_age(text: ir.StringValue) -> ir.FloatingValue:
    import ibis

    low, high = (text.re_extract(_BAND, group).try_cast("float64") for group in (1, 2))
    number = ibis.ifelse(text.re_search(_NUMBER), text, ibis.null("string")).try_cast("float64")
    return ibis.ifelse(text.re_search(_BAND), (low + high) / 2, number)


def as_date(text: ir.StringValue, date_format: str | None) -> ir.TimestampValue:
    """ISO 8601, or what ``date_format`` says; null where unreadable."""
    if date_format is None:
        return as_value(text, text, "timestamp")
    parts = re.split("%(.)", date_format)
    order = parts[1::2]
    digits = [f"([0-9]{{{DIRECTIVES[name] if name == 'Y' else '1,2'}}})" for name in order]
    pattern = "^" + "".join(re.escape(gap) + group for gap, group in zip(parts[::2], [*digits, ""], strict=True)) + "$"
    found = {name: text.re_extract(pattern, order.index(name) + 1).lpad(2, "0") for name in order if name != "Y"}
    year = text.re_extract(pattern, order.index("Y") + 1)
    clock = [found.get(name, "00") for name in "HMS"]
    iso = year + "-" + found["m"] + "-" + found["d"] + " " + clock[0] + ":" + clock[1] + ":" + clock[2]
    return iso.try_cast("timestamp")


def union(tables: Sequence[ir.Table]) -> ir.Table:
    import ibis

    return ibis.union(*tables) if len(tables) > 1 else tables[0]


def rank_in(rows: ir.Table, group: Sequence[str], order: Sequence[Any]) -> ir.IntegerColumn:
    import ibis

    return ibis.row_number().over(ibis.window(group_by=list(group), order_by=list(order)))


def seconds(value: ir.Value) -> ir.Value:
    return value.round().cast("int64").as_interval("s")


def nth(number: ir.Value, names: Sequence[str]) -> ir.StringValue:
    """``names[number]``."""
    import ibis

    return ibis.cases(*[(number == index, name) for index, name in enumerate(names)]) if names else ibis.null("string")


def index_in(value: ir.Value, names: Sequence[str], other: str) -> ir.IntegerValue:
    import ibis

    return ibis.cases(
        *[(ibis.literal(name) == value, index) for index, name in enumerate(names)], else_=names.index(other)
    )
