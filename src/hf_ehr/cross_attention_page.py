"""One self-contained HTML page of a visit: its codes and its note show what they look at in each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_ehr._pages import write_page
from hf_ehr.attention_maps import Weights, bare_code
from hf_ehr.attention_page import SCALE
from hf_ehr.cross_attention_maps import CrossAttentionView, KindAttention


def cross_attention_page(
    view: CrossAttentionView, path: str | Path, *, title: str = "Codes and note of one visit"
) -> None:
    """Writes a page that opens in any browser and loads nothing: no network, no fonts, no other files.

    Pointing at the codes of a kind together, or at one code, colours the tokens of the note by the weights they get;
    pointing at the note or at a token colours the codes. The strongest are listed. Weights that the model itself used
    are told from those that were asked for a single code or token. The file holds the visit's codes and note and must
    be kept like the record itself.

    Args:
        view: The visit, from :func:`hf_ehr.cross_attention_maps.cross_attention_of`.
        path: The file to write.
        title: Heading of the page.
    """
    write_page("cross_attention_page.html", path, title=title, data=_page_data(view))


def _page_data(view: CrossAttentionView) -> dict[str, Any]:
    """What the page's script reads; maps are flat lists, row after row, in units of 1 / ``SCALE``."""
    read = len(view.tokens)
    counts = [f"{len(kind.codes)} {kind.together.removeprefix('all ')}" for kind in view.kinds]
    size = ", ".join([f"{read} tokens", *counts])
    if read < view.note_tokens:
        size += f". The model read the first {read} of the note's {view.note_tokens} tokens"
    return {"size": f"{size}.", "scale": SCALE, "pieces": _pieces(view), "kinds": [_kind(kind) for kind in view.kinds]}


def _kind(kind: KindAttention) -> dict[str, Any]:
    return {
        "together": kind.together,
        "codes": [
            {"code": code, "label": bare_code(code), "name": name}
            for code, name in zip(kind.codes, kind.descriptions, strict=True)
        ],
        # Row 0 is the model's own.
        "textLooks": _whole(kind.text_looks),
        "codesLook": None if kind.codes_look is None else _whole(kind.codes_look),
    }


def _whole(weights: Weights) -> list[int]:
    return np.rint(weights * SCALE).astype(int).ravel().tolist()


def _pieces(view: CrossAttentionView) -> list[tuple[str, int]]:
    """The note in pieces, each with the number of its token; -1 lies between tokens, -2 behind what was read.

    A token without a place in the text, special or of a tokenizer that knows no places, stands for itself.
    """
    spans = view.spans or [(0, 0)] * len(view.tokens)
    pieces, at = [], 0
    for number, ((start, end), token) in enumerate(zip(spans, view.tokens, strict=True)):
        if start == end:
            pieces += [(" ", -1), (token, number), (" ", -1)]
            continue
        start = max(start, at)  # tokens of a byte each of one character share it
        if start > at:
            pieces.append((view.text[at:start], -1))
        pieces.append((view.text[start:end] or "·", number))
        at = max(at, end)
    if view.spans:
        pieces.append((view.text[at:], -2))
    return [piece for piece in pieces if piece[0]]
