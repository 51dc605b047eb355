"""One self-contained HTML page of a patient's timeline, on which a code shows what it attends to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hf_ehr._pages import write_page
from hf_ehr.attention_maps import AttentionView, Weights, bare_code, layer_mean, rollout

SCALE = 10_000
"""Weights are written as whole ten-thousandths: half of what full precision takes, and finer than the page shows."""
MAX_CODES = 256
"""Codes of a page: six layers of six heads over 256 codes are some 8 MB."""


def attention_page(view: AttentionView, path: str | Path, *, title: str = "Attention over one patient") -> None:
    """Writes a page that opens in any browser and loads nothing: no network, no fonts, no other files.

    Visits run from left to right with their dates, where the view has them. Pointing at a code, or moving to it with
    the arrow keys, colours all codes by the weight it gives them and lists the strongest. Layer, head, mean of heads
    and rollout (:func:`hf_ehr.attention_maps.rollout`) can be chosen. The file holds the patient's codes and dates
    and must be kept like the record itself.

    A history of more than 256 codes is shown from its newest 256, and the page says so.

    Args:
        view: The patient, from :func:`hf_ehr.attention_maps.attention_of`.
        path: The file to write.
        title: Heading of the page.
    """
    write_page("attention_page.html", path, title=title, data=_page_data(view))


def _page_data(view: AttentionView) -> dict[str, Any]:
    """What the page's script reads; attention maps are flat lists, row after row, in units of 1 / ``SCALE``."""
    total, shown = len(view.codes), min(len(view.codes), MAX_CODES)
    layers, heads = view.attention.shape[:2]
    numbers = view.visit_numbers[-shown:].tolist()
    names = (view.descriptions or [None] * total)[-shown:]
    size = f"{total} codes in {view.visit_numbers[-1]} visits, {layers} layers of {heads} heads"
    if shown < total:
        size += f". Shown are the newest {shown} codes; what older ones receive counts among the other codes"
    return {
        "size": f"{size}.",
        "total": total,
        "scale": SCALE,
        "visits": _visits(view, numbers[0]),
        "codes": [
            {"code": code, "label": bare_code(code), "visit": number - numbers[0], "name": name}
            for code, number, name in zip(view.codes[-shown:], numbers, names, strict=True)
        ],
        # Map 0 of a layer is the mean of its heads, map h head h.
        "layers": [
            [_whole(mean, shown), *(_whole(weights, shown) for weights in layer)]
            for mean, layer in zip(layer_mean(view), view.attention, strict=True)
        ],
        "rollout": _whole(rollout(view), shown),
    }


def _visits(view: AttentionView, first: int) -> list[dict[str, Any]]:
    """Label, day and distance of the visits from number ``first`` on."""
    last = int(view.visit_numbers[-1])
    days = list(view.visit_dates or [None] * last)[:last]
    gaps = [None, *((b - a).days if a and b else None for a, b in pairwise(days))]
    visits = []
    for number in range(first, last + 1):
        day, gap = days[number - 1], gaps[number - 1]
        when = [] if day is None else [day.isoformat()]
        if gap is not None and number > first:
            when.append(f"{gap} day{'' if gap == 1 else 's'} later")
        visits.append({"label": f"Visit {number}", "when": when})
    return visits


def _whole(weights: Weights, shown: int) -> list[int]:
    """The newest ``shown`` rows and columns, flat, in units of 1 / ``SCALE``."""
    return np.rint(weights[-shown:, -shown:] * SCALE).astype(int).ravel().tolist()
