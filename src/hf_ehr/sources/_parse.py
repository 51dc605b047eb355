"""Text → values, as Ibis expressions that mean the same on DuckDB and on Spark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    import ibis.expr.types as ir

ColumnType = Literal["int64", "float64", "string", "timestamp", "date"]

_INTEGER = r"^[+-]?[0-9]{1,18}([.]0*)?$"
_FLOAT = r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$"
_CLOCK = r"^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([ T][0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?)?"
_ZONE = r"(Z|[+-][0-9]{2}(:[0-9]{2})?)$"
_COMPACT_DATE = r"^[0-9]{8}$"
_LARGEST = 3.4e38  # what the 32 bits of `numeric_value` hold; engines differ on, or stop at, anything beyond


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


def as_text(raw: ir.Column, null_values: tuple[str, ...]) -> ir.StringValue:
    """Trimmed; null where it is blank or one of ``null_values``."""
    text = cast("ir.StringValue", raw.cast("string")).strip().nullif("")
    for null in null_values:
        text = text.nullif(null)
    return text


def as_value(raw: ir.Column, text: ir.StringValue, dtype: ColumnType) -> ir.Value:
    """``raw``, whose text is ``text``, as ``dtype``; null where it cannot be parsed."""
    import ibis

    if raw.type().is_floating() and dtype == "int64":  # pandas writes integers with nulls as floats
        return ibis.ifelse(raw == raw.floor(), raw, ibis.null("float64")).cast("int64")
    if raw.type().is_numeric() and dtype in ("int64", "float64"):
        return _finite(raw.cast(dtype)) if dtype == "float64" else raw.cast(dtype)
    if raw.type().is_temporal() and dtype in ("timestamp", "date"):
        return raw.cast("timestamp").cast(dtype)
    if dtype == "string":
        return text
    if dtype == "int64":
        good = ibis.ifelse(text.re_search(_INTEGER), text, ibis.null("string"))
        return ibis.ifelse(good.contains("."), good.re_replace("[.]0*$", ""), good).try_cast("int64")
    if dtype == "float64":
        return _finite(ibis.ifelse(text.re_search(_FLOAT), text, ibis.null("string")).try_cast("float64"))
    dashed = text.substr(0, 4) + "-" + text.substr(4, 2) + "-" + text.substr(6, 2)
    iso = ibis.cases(
        (text.re_search(_CLOCK + "$"), text),
        (text.re_search(_COMPACT_DATE), dashed),
        (text.re_search(_CLOCK + _ZONE), text.re_extract(_CLOCK, 0)),
    )
    return iso.try_cast("timestamp").cast(dtype)


def _finite(number: ir.NumericValue) -> ir.NumericValue:
    """Null where ``number`` is NaN, infinite or beyond ``_LARGEST``."""
    import ibis

    return ibis.ifelse(number.abs() <= _LARGEST, number, ibis.null("float64"))
