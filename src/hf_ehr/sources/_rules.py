"""Several rules on the rows of a table, checked in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hf_ehr.sources.engine import ROW, reject

if TYPE_CHECKING:
    import ibis.expr.types as ir


class Rule(NamedTuple):
    """A rule that a row may break: where it is broken, the column to report and the rule in words."""

    broken: Callable[[ir.Table], ir.BooleanValue]
    column: str
    reason: str


def split_by_rules(table: ir.Table, rules: Sequence[Rule], file: str) -> tuple[ir.Table, ir.Table]:
    """:func:`engine.reject` by the first of several rules that a row breaks: (rows that keep all, rejected rows).

    One pass whatever the number of rules, where a chain of ``reject`` reads the file once for each.
    """
    import ibis

    if len(rules) == 1:
        return reject(table, rules[0].broken(table), file=file, column=rules[0].column, reason=rules[0].reason)
    numbered = [(rule.broken(table).fill_null(False), number) for number, rule in enumerate(rules)]
    table = table.mutate(_rule=ibis.cases(*numbered, else_=-1))
    bad = table.filter(table["_rule"] >= 0)
    hits = [bad["_rule"] == number for number in range(len(rules))]
    rejected = bad.select(
        file=ibis.literal(file),
        row=bad[ROW],
        column=ibis.cases(*[(hit, rule.column) for hit, rule in zip(hits, rules, strict=True)]),
        value=ibis.cases(*[(hit, bad[rule.column].cast("string")) for hit, rule in zip(hits, rules, strict=True)]),
        reason=ibis.cases(*[(hit, rule.reason) for hit, rule in zip(hits, rules, strict=True)]),
    )
    return table.filter(table["_rule"] < 0).drop("_rule"), rejected
