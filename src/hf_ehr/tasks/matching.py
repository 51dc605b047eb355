"""Matched controls of a case-control task, drawn from the whole data set."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.tasks.definition import Matching
from hf_ehr.tasks.events import MISSING, micros

YEAR = round(365.25 * 86_400_000_000)


def match_controls(
    labels: pa.Table, people: pa.Table, matching: Matching, *, seed: int = 0
) -> tuple[pa.Table, dict[str, int]]:
    """Keeps up to ``ratio`` controls a case that are alike in the fields asked for, each control once.

    Controls are drawn within groups of equal fields and age band. A group with too few gives all that it has; cases of
    a group without any are left out, for a model would tell them by their group.

    Args:
        labels: LABELS, one a patient.
        people: ``subject_id``, ``birth_time`` and the fields of these patients, in any order.
        matching: What alike means.
        seed: Of the draw. It does not depend on the order of the rows.

    Returns:
        The kept LABELS, and how many were left out for which reason.
    """
    order = pc.index_in(labels["subject_id"], value_set=people["subject_id"].combine_chunks()).to_numpy()
    group = _groups(people.take(pa.array(order)), labels, matching)
    case = labels["boolean_value"].to_numpy(zero_copy_only=False).astype(bool)
    cases, controls = (np.bincount(group[chosen], minlength=group.max(initial=-1) + 1) for chosen in (case, ~case))
    keep = case & (controls[group] > 0)
    # The patients' order decides nothing: numbers are drawn by sorted id.
    by_id = np.argsort(labels["subject_id"].to_numpy(), kind="stable")
    lot = np.empty(len(group))
    lot[by_id] = np.random.default_rng(seed).random(len(group))
    rows = np.flatnonzero(~case)
    rows = rows[np.lexsort((lot[rows], group[rows]))]
    first = np.searchsorted(group[rows], group[rows])
    keep[rows] = np.arange(len(rows)) - first < matching.ratio * cases[group[rows]]
    left_out = {
        "case_without_control": int((case & ~keep).sum()),
        "control_not_drawn": int((~case & ~keep).sum()),
    }
    return labels.filter(pa.array(keep)), left_out


def _groups(people: pa.Table, labels: pa.Table, matching: Matching) -> np.ndarray:
    """(labels,) int64: patients who are alike have the same number."""
    keys = [
        people[name].combine_chunks().fill_null("").dictionary_encode().indices.to_numpy() for name in matching.fields
    ]
    if matching.age_years is not None:
        birth, now = micros(people["birth_time"]), micros(labels["prediction_time"])
        keys.append(np.where(birth == MISSING, -1, (now - birth) // (matching.age_years * YEAR)))
    if not keys:
        return np.zeros(labels.num_rows, np.int64)
    return np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].ravel().astype(np.int64)
