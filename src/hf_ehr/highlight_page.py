"""One self-contained HTML page of a note and its predicted codes; choosing a code marks its evidence in the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from hf_ehr._pages import write_page
from hf_ehr.models.code_decisions import DECISIONS
from hf_ehr.models.evidence_spans import Span


class PredictedCode(TypedDict):
    """A code as ``pipeline("icd-coding")`` returns it."""

    code: str
    description: NotRequired[str | None]
    probability: float
    decision: str
    """One of :data:`hf_ehr.models.code_decisions.DECISIONS`."""
    spans: Sequence[Span | Sequence[float] | Mapping[str, float]]
    """``start``, ``end``, ``weight`` each; offsets count characters of the note as Python does."""


def highlight_page(
    text: str, codes: Sequence[PredictedCode], path: str | Path, *, title: str = "Codes of a note"
) -> None:
    """Writes a page that opens in any browser and loads nothing: no network, no fonts, no other files.

    Codes are listed by falling probability. Choosing one, by click or with the arrow keys, marks its spans in the
    note, the heavier the stronger, and lists them with their weights; choosing a listed span brings it into view. The
    file holds the note and must be kept like the record itself.

    Args:
        text: The note.
        codes: What was predicted for it.
        path: The file to write.
        title: Heading of the page.

    Raises:
        ValueError: A span lies outside the note or has a weight that is negative or not finite, a probability is
            outside [0, 1], or a decision is unknown.
    """
    write_page("highlight_page.html", path, title=title, data=_page_data(text, codes))


def _page_data(text: str, codes: Sequence[PredictedCode]) -> dict[str, Any]:
    """What the page's script reads.

    The note is cut at every end of a span, so that the script handles pieces and never offsets, which JavaScript
    would count in UTF-16 units.
    """
    spans = [_checked(code, len(text)) for code in codes]
    cuts = sorted({0, len(text), *(end for found in spans for span in found for end in span[:2])})
    return {
        "pieces": [text[start:end] for start, end in pairwise(cuts)],
        "codes": [
            _entry(codes[place], spans[place], cuts, text)
            for place in sorted(range(len(codes)), key=lambda place: -codes[place]["probability"])
        ],
    }


def _entry(code: PredictedCode, spans: Sequence[Span], cuts: Sequence[int], text: str) -> dict[str, Any]:
    """One code; its spans by falling weight as [first piece, end piece, weight, shown text]."""
    ordered = sorted(spans, key=lambda span: (-span.weight, span.start))
    ends = np.searchsorted(cuts, [span[:2] for span in ordered]).reshape(-1, 2).tolist()
    return {
        "code": code["code"],
        "name": code.get("description"),
        "probability": float(code["probability"]),
        "decision": code["decision"],
        "spans": [
            [*pieces, span.weight, " ".join(text[span.start : span.end].split())]
            for pieces, span in zip(ends, ordered, strict=True)
        ],
    }


def _checked(code: PredictedCode, length: int) -> list[Span]:
    """The spans of a code, those without text left out.

    Raises:
        ValueError: As :func:`highlight_page`.
    """
    if code["decision"] not in DECISIONS:
        raise ValueError(f"`decision` must be one of {', '.join(DECISIONS)}, got {code['decision']!r}.")
    if not 0 <= code["probability"] <= 1:
        raise ValueError(
            f"`probability` must lie in [0, 1], got {code['probability']}. Pass logits through a sigmoid."
        )
    parts = [
        (span["start"], span["end"], span["weight"]) if isinstance(span, Mapping) else span for span in code["spans"]
    ]
    spans = [Span(int(start), int(end), float(weight)) for start, end, weight in parts]
    for start, end, weight in spans:
        if not 0 <= start <= end <= length:
            raise ValueError(f"`spans` must lie in [0, {length}], the note, got [{start}, {end}).")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"`spans` must have finite weights of at least 0, got {weight}.")
    return [span for span in spans if span.end > span.start]
