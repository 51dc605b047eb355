"""Which visits stand in which row, and as of when they are seen.

A slot is a place of a row: a visit, the moment at which it is looked at, and whether it is the visit that is asked
about and of which drugs and notes must not be seen (``own``). Columns of slots: ``row``, ``visit`` (its number among
all visits of the shard, which are sorted by patient and start), ``time`` (µs), ``own``, ``label`` (the label that is
asked there, null for none); sorted by row and visit.
"""

from __future__ import annotations

import polars as pl

from ._histories import NEVER

_OPEN = pl.lit(NEVER)


def every_visit(visits: pl.DataFrame) -> pl.DataFrame:
    """Slots of one row a visit, seen as it was in the end."""
    slots = visits.select("visit").with_row_index("row")
    return slots.with_columns(time=_OPEN, own=pl.lit(False), label=pl.lit(None, pl.Int64))


def admission_slots(visits: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """Slots of one row a label: the visit in which it is asked.

    Args:
        visits: ``visit``, ``subject_id``, ``start``, ``closed`` (µs; when the visit, or its chart, was closed) and
            ``inpatient``.
        asked: ``label``, ``subject_id``, ``time`` (µs).

    Returns:
        Slots of the labels asked within a visit. Of several visits it is the one that closes at that very moment, else
        the one that began last before it, inpatient ones first.
    """
    found = asked.join(visits, on="subject_id").filter(
        (pl.col("start") <= pl.col("time")) & (pl.col("time") <= pl.col("closed"))
    )
    begun, closes = pl.col("start") < pl.col("time"), pl.col("closed") == pl.col("time")
    found = found.with_columns(closes=closes, begun=begun).sort(
        "label", "closes", "begun", "inpatient", "start", "visit"
    )
    found = found.unique("label", keep="last", maintain_order=True)
    return found.select("visit", "time", "label", own=pl.lit(False)).sort("visit", "time").with_row_index("row")


def recommendation_slots(visits: pl.DataFrame, asked: pl.DataFrame, max_visits: int) -> pl.DataFrame:
    """Slots of the labels asked at the start of a visit: the visits before it, oldest first, then the visit itself.

    Labels of a patient share a row, in which every visit stands once, where each of them sees there exactly what it
    would see alone: nothing became known of a visit after the next one began, and the row holds at most ``max_visits``
    visits. Every other label has a row of its own.

    Args:
        visits: ``visit``, ``subject_id``, ``start``, ``settled`` (µs, when the last of its codes and notes became
            known), ``coded`` (whether it has a code) and ``holds`` (a code or a note).
        asked: ``label``, ``subject_id``, ``time``.
        max_visits: See above; rows of single labels may still hold more.

    Returns:
        Slots of the labels whose time is the start of a visit.
    """
    starts = visits.select("subject_id", "visit", time="start").unique(["subject_id", "time"], keep="last")
    asked = asked.join(starts, on=["subject_id", "time"]).unique("visit", keep="first", maintain_order=True)
    places = visits.sort("visit").with_columns(
        next=pl.col("start").shift(-1).over("subject_id"),
        rank=(pl.col("holds").cast(pl.Int64).cum_sum() - pl.col("holds")).over("subject_id") + 1,
    )
    last = asked.group_by("subject_id").agg(last=pl.col("time").max())
    unsettled = (pl.col("settled") > pl.col("next")) | (pl.col("start") == pl.col("next"))
    tangled = places.join(last, on="subject_id").filter((pl.col("start") < pl.col("last")) & unsettled)
    alone = pl.col("subject_id").is_in(tangled["subject_id"].unique().implode()) | (pl.col("rank") > max_visits)
    alone |= ~pl.col("coded")  # it would stand in the history of others, where a visit without codes may not
    asked = asked.join(places.select("visit", "rank", "coded"), on="visit").with_columns(alone=alone)
    asked = asked.with_columns(group=pl.when("alone").then("label"))
    rows = asked.sort("visit").group_by("subject_id", "group", maintain_order=True).last().sort("visit")
    rows = rows.select("subject_id", "group", "time", target="visit").with_row_index("row")
    slots = rows.join(visits.select("subject_id", "visit", "start"), on="subject_id")
    slots = slots.filter((pl.col("start") < pl.col("time")) | (pl.col("visit") == pl.col("target")))
    slots = slots.join(asked.select("group", "visit", "label"), on=["group", "visit"], how="left", nulls_equal=True)
    own = pl.col("visit") == pl.col("target")
    return slots.select("row", "visit", "time", "label", own=own).sort("row", "visit")
