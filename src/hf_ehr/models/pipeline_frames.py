"""Frames of pandas or polars in and out of a pipeline; neither library is imported."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def is_frame(value: Any) -> bool:
    """Whether a value is a frame of pandas or polars."""
    return hasattr(value, "columns") and (hasattr(value, "to_dicts") or hasattr(value, "to_dict"))


def rows_of(frame: Any) -> list[dict[str, Any]]:
    """The rows of a frame as dicts of plain values."""
    return [plain(row) for row in (frame.to_dicts() if hasattr(frame, "to_dicts") else frame.to_dict("records"))]


def frame_of(rows: list[dict[str, Any]], like: Any) -> Any:
    """Rows as a frame of the kind of `like`."""
    # Polars looks at the first rows alone, and refuses what comes after rows of nothing but nulls or empty lists.
    options = {"infer_schema_length": None} if hasattr(like, "to_dicts") else {}
    return type(like)(rows, **options)


def plain(value: Any) -> Any:
    """Arrays of a frame's cells as lists, NaN as None."""
    if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
