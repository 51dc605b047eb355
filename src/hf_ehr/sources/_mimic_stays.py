"""The intensive care stays of MIMIC-III and MIMIC-IV and what was measured in them, as EVENTS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_ehr.sources._mimic import of_visits
from hf_ehr.sources.engine import Column, Engine, Extract, as_events, reject

if TYPE_CHECKING:
    import ibis.expr.types as ir


def read_stays(engine: Engine, path: Path, visits: ir.Table, stay: str) -> tuple[ir.Table, list[ir.Table]]:
    """(valid rows of ICUSTAYS, rejected rows); ``stay`` names the column with the id, ``stay_id`` in the result."""
    columns = {
        "subject_id": Column("int64", required=True),
        "hadm_id": Column("int64", required=True),
        stay: Column("int64", required=True),
        "intime": Column("timestamp", required=True),
        "outtime": Column("timestamp"),
        "first_careunit": Column(optional=True),
        "last_careunit": Column(optional=True),
    }
    scan = engine.scan(path, columns, key=[stay])
    reason = "negative stay: `outtime` is before `intime`"
    negative = scan.table["outtime"] < scan.table["intime"]
    table, bad = reject(scan.table, negative, file=path.name, column="intime,outtime", reason=reason)
    table, orphans = of_visits(table, visits, path.name)
    return table if stay == "stay_id" else table.rename(stay_id=stay), [scan.rejected, bad, orphans]


def stay_extract(table: ir.Table, rejected: list[ir.Table]) -> Extract:
    """Events of the stays of :func:`read_stays`: admission to and discharge from the unit."""
    ended = table.filter(table["outtime"].notnull())
    edges = [
        as_events(
            edge,
            subject_id=edge["subject_id"],
            time=edge[time],
            code="Stay/icu",
            text_value=edge[unit],
            visit_id=edge["hadm_id"],
            stay_id=edge["stay_id"],
            kind=kind,
        )
        for edge, time, unit, kind in (
            (table, "intime", "first_careunit", "admission"),
            (ended, "outtime", "last_careunit", "discharge"),
        )
    ]
    return Extract("icustays", edges[0].union(edges[1]), rejected)


def _without_overlap(stays: ir.Table) -> ir.Table:
    """``_patient, _enter, _leave, _visit, _in`` (the stay); a stay ends when the patient's next one begins."""
    import ibis

    order = ibis.window(group_by="subject_id", order_by=["intime", "stay_id"])
    following = stays["intime"].lead().over(order)
    leave = ibis.coalesce(stays["outtime"], stays["dischtime"])
    leave = ibis.ifelse((following < leave).fill_null(False), following, leave)
    return stays.select(_patient="subject_id", _enter="intime", _leave=leave, _visit="hadm_id", _in="stay_id")


def _in_stays(table: ir.Table, stays: ir.Table | None, stay: str | None, time: str) -> ir.Table:
    """Adds ``_stay``: the stay that a row names, else the one that holds its ``time``, whose admission it then has."""
    import ibis

    table = table.mutate(_stay=table[stay] if stay else ibis.null("int64"))
    if stays is None:
        return table
    spans = _without_overlap(stays)
    inside = [
        table["subject_id"] == spans["_patient"],
        table[time] >= spans["_enter"],
        table[time] < spans["_leave"],
    ]
    table = table.left_join(spans, inside)
    same = table["hadm_id"].isnull() | (table["hadm_id"] == table["_visit"])
    found = ibis.ifelse(same, table["_in"], ibis.null("int64"))
    return table.mutate(
        _stay=ibis.coalesce(table["_stay"], found), hadm_id=ibis.coalesce(table["hadm_id"], table["_visit"])
    )


def measurement_extract(
    engine: Engine, path: Path, visits: ir.Table, stays: ir.Table | None, stay: str | None
) -> Extract:
    """Events of LABEVENTS (no ``stay`` column) or CHARTEVENTS: ``MIMIC_ITEM/itemid``, number or else text.

    A row that names no stay is of the stay of its patient, and of its admission if it names one, in which its time
    lies: laboratory values are measurements of the stay too. The start of a stay is in it, the end is not.

    Args:
        engine: The engine.
        path: The file.
        visits: Valid admissions.
        stays: Valid stays of :func:`read_stays`, if there are any.
        stay: Name of the column with the stay's id, if the file has one.
    """
    import ibis

    columns = {
        "subject_id": Column("int64", required=True),
        "hadm_id": Column("int64"),
        "itemid": Column("int64", required=True),
        "charttime": Column("timestamp", required=True),
        "storetime": Column("timestamp", optional=True),
        "value": Column(),
        "valuenum": Column("float64"),
        "error": Column("int64", optional=True),
    }
    columns |= {stay: Column("int64")} if stay else {}
    scan = engine.scan(path, columns)
    table, wrong = reject(
        scan.table, scan.table["error"] == 1, file=path.name, column="error", reason="marked as error"
    )
    table, orphans = of_visits(table, visits, path.name, required=False)
    table = _in_stays(table, stays, stay, "charttime")
    events = as_events(
        table,
        subject_id=table["subject_id"],
        time=table["charttime"],
        code="MIMIC_ITEM/" + table["itemid"].cast("string"),
        numeric_value=table["valuenum"],
        text_value=ibis.ifelse(table["valuenum"].isnull(), table["value"], ibis.null("string")),
        visit_id=table["hadm_id"],
        stay_id=table["_stay"],
        kind="measurement",
        available_at=ibis.coalesce(table["storetime"], table["charttime"]),
    )
    return Extract(path.name.split(".")[0].lower(), events, [scan.rejected, wrong, orphans])


def treatment_extract(
    engine: Engine, path: Path, visits: ir.Table, stays: ir.Table | None, stay: str, *, infused: bool
) -> Extract:
    """Events of PROCEDUREEVENTS (ventilation, lines) or INPUTEVENTS (vasopressors, fluids): ``MIMIC_ITEM/itemid``.

    An event is the start of a procedure, with the value 1, or of an infusion or a change of it, with the rate as value
    and its unit as text. Durations, amounts and how it ended are left out: they are known only when it is over.

    Args:
        engine: The engine.
        path: The file, of MetaVision: the CareVue tables of MIMIC-III have other items.
        visits: Valid admissions.
        stays: Valid stays of :func:`read_stays`, if there are any.
        stay: Name of the column with the stay's id.
        infused: Whether the file has rates.
    """
    columns = {
        "subject_id": Column("int64", required=True),
        "hadm_id": Column("int64"),
        stay: Column("int64"),
        "itemid": Column("int64", required=True),
        "starttime": Column("timestamp", required=True),
        "cancelreason": Column("int64", optional=True),
        "statusdescription": Column(optional=True),
    }
    columns |= {"rate": Column("float64"), "rateuom": Column()} if infused else {}
    scan = engine.scan(path, columns)
    cancelled = (scan.table["cancelreason"] > 0).fill_null(False)
    never = cancelled | (scan.table["statusdescription"] == "Rewritten")
    table, wrong = reject(
        scan.table, never, file=path.name, column="statusdescription", reason="cancelled or rewritten: never given"
    )
    table, orphans = of_visits(table, visits, path.name, required=False)
    table = _in_stays(table, stays, stay, "starttime")
    events = as_events(
        table,
        subject_id=table["subject_id"],
        time=table["starttime"],
        code="MIMIC_ITEM/" + table["itemid"].cast("string"),
        visit_id=table["hadm_id"],
        stay_id=table["_stay"],
        kind="measurement",
        available_at=table["starttime"],
        numeric_value=table["rate"] if infused else 1.0,
        text_value=table["rateuom"] if infused else None,
    )
    return Extract(path.name.split(".")[0].lower(), events, [scan.rejected, wrong, orphans])
