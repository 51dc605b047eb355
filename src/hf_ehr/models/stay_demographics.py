"""What is known of a patient when a stay begins, as one vector of fixed length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .hourly_grid import bin_names, bin_numbers, stack_edges

NO_TEXT = -2
"""Category of something that says nothing."""
UNKNOWN_CATEGORY = -1
"""Category of a text that was not met often enough in training."""


def category_ids(categories: Sequence[str], texts: Sequence[Any]) -> np.ndarray:
    """Number of each text among the categories, (texts,) int32; `NO_TEXT` for None, `UNKNOWN_CATEGORY` for others."""
    known = {text: number for number, text in enumerate(categories)} | {None: NO_TEXT}
    return np.fromiter((known.get(text, UNKNOWN_CATEGORY) for text in texts), np.int32, len(texts))


def demographic_names(field: Mapping[str, Any]) -> list[str]:
    """The columns of a field: ``sex = F``, ``sex other``, ``sex unknown``; ``age <= 60``, …, ``age unknown``."""
    name = field["name"]
    if field["categories"] is not None:
        return [*(f"{name} = {text}" for text in field["categories"]), f"{name} other", f"{name} unknown"]
    if field["scale"] is not None:
        return [name, f"{name} unknown"]
    return [*(f"{name} {text}" for text in bin_names(field["edges"])), f"{name} unknown"]


def demographic_columns(field: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    """The columns of a field for some stays.

    Args:
        field: An entry of the extractor's `demographics`.
        values: (stays,), numbers (NaN where unknown), or what :func:`category_ids` gives.

    Returns:
        (stays, columns) float32: one-hot, or the standardised number (0 where unknown) and whether it is unknown.
    """
    if field["categories"] is not None:
        last = len(field["categories"])
        return _one_hot(np.where(values == NO_TEXT, last + 1, np.where(values < 0, last, values)), last + 2)
    unknown = ~np.isfinite(values)
    if field["scale"] is not None:
        low, high, center, deviation = field["scale"]
        scaled = (np.clip(values, low, high) - center) / deviation
        return np.stack([np.where(unknown, 0, scaled), unknown], axis=1).astype(np.float32)
    bins = bin_numbers(np.asarray(values, np.float32)[:, None], stack_edges([field["edges"]]))[:, 0]
    last = len(field["edges"]) + 1
    return _one_hot(np.where(unknown, last, bins), last + 1)


def stack_demographics(fields: Sequence[Mapping[str, Any]], values: Sequence[np.ndarray], stays: int) -> np.ndarray:
    """(stays, columns of all fields) float32."""
    columns = [demographic_columns(field, own) for field, own in zip(fields, values, strict=True)]
    return np.concatenate([np.empty((stays, 0), np.float32), *columns], axis=1)


def given_values(field: Mapping[str, Any], values: Sequence[Any] | None, stays: int) -> np.ndarray:
    """Values of a field that a caller gives, as numbers or numbers of categories."""
    values = [None] * stays if values is None else list(values)
    if len(values) != stays:
        raise ValueError(f"`demographics` must have a value per stay, got {len(values)} of `{field['name']}`.")
    if field["categories"] is not None:
        return category_ids(field["categories"], values)
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _one_hot(number: np.ndarray, columns: int) -> np.ndarray:
    return (number[:, None] == np.arange(columns)).astype(np.float32)
