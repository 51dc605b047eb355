"""Groups of labels that coders ask about: rare or frequent ones, chapters, diagnoses or procedures; and categories."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from hf_ehr import ontology
from hf_ehr._scores import Array

BAND_EDGES = (10, 50, 200, 1000)
"""Upper ends of the bands of training positives; the last band is open."""


def band_groups(train_counts: ArrayLike, edges: Sequence[int] = BAND_EDGES) -> dict[str, Array]:
    """Labels by their documents in training, from rare to frequent; empty bands are left out.

    BERT-XML's rare codes (Table 3) are the first band of ``edges=(1999,)``.

    Args:
        train_counts: Training documents of each label, ``(labels,)``.
        edges: Upper ends of the bands, which hold them.

    Returns:
        ``"≤10 training notes"``, ``"11–50 training notes"``, … → boolean ``(labels,)``.

    Raises:
        ValueError: The edges do not ascend.
    """
    if list(edges) != sorted(set(edges)) or not edges:
        raise ValueError(f"`edges` must ascend, got {list(edges)}.")
    middle = [f"{low + 1}–{high}" for low, high in pairwise(edges)]
    places = np.searchsorted(edges, np.asarray(train_counts))
    names = [f"{name} training notes" for name in (f"≤{edges[0]}", *middle, f">{edges[-1]}")]
    return {name: places == place for place, name in enumerate(names) if (places == place).any()}


def chapter_groups(codes: Sequence[str]) -> dict[str, Array]:
    """Labels of each chapter, in the order of the chapters' names; codes of no chapter are in none."""
    return _by_name([name or "" for name in ontology.chapter(codes)])


def vocabulary_groups(codes: Sequence[str]) -> dict[str, Array]:
    """Labels of each vocabulary where there are several: ``ICD10CM`` are diagnoses, ``ICD10PCS`` procedures."""
    groups = _by_name([code.partition("/")[0] for code in codes])
    return groups if len(groups) > 1 else {}


def category_of_each(codes: Sequence[str]) -> list[list[str]]:
    """The three-character category of each code in a list, empty where there is none."""
    return [[name] if name else [] for name in ontology.category(codes)]


def _by_name(names: Sequence[str]) -> dict[str, Array]:
    held = np.array(names)
    return {name: held == name for name in sorted(set(names) - {""})}
