"""Codes of raw tables as ``VOCABULARY/CODE``, written as Ibis expressions that run on both engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ibis.expr.types as ir

ICD_SHAPES = {
    "ICD9CM": "^([0-9]{3}|V[0-9]{2}|E[0-9]{3})([.][0-9]{1,2})?$",
    "ICD9Proc": "^[0-9]{2}([.][0-9]{1,2})?$",
    "ICD10CM": "^[A-Z]([0-9][0-9A-Z]|[A-Z][0-9])([.][0-9A-Z]{1,4})?$",
}
"""What a dotted code of these vocabularies looks like (the shapes of ``models.code_hierarchy``, for SQL engines)."""

_SPACE = "[ \t\r\n]+"


def icd(vocabulary: str, code: ir.StringValue) -> ir.StringValue:
    """``code`` in capitals with the dot of its vocabulary and the leading zeros that a spreadsheet took away.

    ``4280`` → ``428.0``, ``8`` → ``008``, ``8.45`` → ``008.45``, ``e8120`` → ``E812.0``. Codes of a vocabulary that is
    not ICD come back unchanged.
    """
    import ibis

    if vocabulary not in ICD_SHAPES:
        return code
    length = 2 if vocabulary == "ICD9Proc" else 3
    text = code.upper()
    if vocabulary != "ICD10CM":
        # Only a whole category can be this short, so its zeros are known to be missing.
        whole = text.re_extract("^([0-9]+)([.]|$)", 1)
        text = ibis.ifelse((whole.length() > 0) & (whole.length() < length), _zeros(length, whole) + text, text)
    bare = text.replace(".", "")
    size: Any = length
    if vocabulary == "ICD9CM":
        size = ibis.ifelse(bare.startswith("E"), length + 1, length)
    return ibis.ifelse(bare.length() > size, bare.substr(0, size) + "." + bare.substr(size), bare)


def has_icd_shape(vocabulary: str, code: ir.StringValue) -> ir.BooleanValue:
    """Whether a dotted ``code`` can be one of ``vocabulary``; true where the vocabulary's shape is not known."""
    import ibis

    return code.re_search(ICD_SHAPES[vocabulary]) if vocabulary in ICD_SHAPES else ibis.literal(True)


def dotted(vocabulary: ir.StringValue, code: ir.StringValue) -> ir.StringValue:
    """:func:`icd` for a column of vocabularies."""
    import ibis

    return ibis.cases(*[(vocabulary == name, icd(name, code)) for name in ICD_SHAPES], else_=code)


def joined(vocabulary: ir.StringValue | str, code: ir.StringValue) -> ir.StringValue:
    """``VOCABULARY/CODE`` without white space (a run of it becomes ``_``); null where the code is."""
    import ibis

    name = ibis.literal(vocabulary) if isinstance(vocabulary, str) else vocabulary
    return name.re_replace(_SPACE, "_").replace("/", "_") + "/" + code.strip().re_replace(_SPACE, "_")


def lookup(value: ir.Value, mapping: Mapping[Any, str]) -> ir.StringValue:
    """``mapping[value]``, null for a value that is not in it."""
    import ibis

    if not mapping:
        return ibis.null("string")
    return ibis.cases(*[(value == key, name) for key, name in mapping.items()])


def _zeros(length: int, digits: ir.StringValue) -> ir.StringValue:
    import ibis

    return ibis.literal("0").repeat(length - digits.length())
