"""What rows without a network read: statistics of stays, or what the examples of admissions hold, as a matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from scipy import sparse

from hf_ehr.schema import EhrDataError, atomic_path
from hf_ehr.stay_baselines import StaySummaries, stay_summaries

if TYPE_CHECKING:
    import datasets

    from hf_ehr.experiments.stays.materials import StayCohort

LISTS = ("diagnosis_ids", "medication_ids")
ARRAYS = ("subject_id", "stay_id", "labels", "matrix")
FEWEST_ADMISSIONS = 5
"""A code gets a column when at least this many training admissions have it."""


def make_summaries(cohort: StayCohort, task: str, path: Path) -> None:
    """Summarises the stays of all splits of a task; the columns are those of the training stays.

    Args:
        cohort: The patients.
        task: The task.
        path: File to write; see :func:`load_summaries`.
    """
    names: list[str] | None = None
    parts: dict[str, StaySummaries] = {}
    for split in ("train", "validation", "test"):
        given: dict[str, Any] = {"labels": cohort.labels(task, split), "subject_ids": cohort.splits[split]}
        parts[split] = stay_summaries(cohort.place(split).data, names=names, **given)
        names = parts[split].names
    save_summaries(parts, path)


def save_summaries(parts: dict[str, StaySummaries], path: Path) -> None:
    """Writes the splits of one task as one file that is whole or not there."""
    arrays = {f"{split}.{name}": getattr(part, name) for split, part in parts.items() for name in ARRAYS}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, names=np.array(parts["train"].names), **arrays)


def load_summaries(path: Path, examples: dict[str, datasets.Dataset]) -> dict[str, StaySummaries]:
    """The summaries of what each split's examples are of, in their order.

    Raises:
        EhrDataError: They were made of other stays.
    """
    found = {}
    with np.load(path) as file:
        names = file["names"].tolist()
        arrays = {key: file[key] for key in file.files if key != "names"}
    for split, part in examples.items():
        ours = StaySummaries(names=names, fields={}, **{name: arrays[f"{split}.{name}"] for name in ARRAYS})
        found[split] = taken(ours, np.asarray(part["stay_id"]), np.asarray(part["subject_id"]))
    return found


def taken(summaries: StaySummaries, ids: np.ndarray, subjects: np.ndarray) -> StaySummaries:
    """The rows of some stays of some patients, in their order.

    Raises:
        EhrDataError: A stay is not there, or is there for several labels.
    """
    order = np.argsort(summaries.stay_id, kind="stable")
    known = summaries.stay_id[order]
    places = np.searchsorted(known, ids).clip(max=max(len(known) - 1, 0))
    rows = order[places]
    if len(np.unique(known)) < len(known) or (known[places] != ids).any():
        raise EhrDataError("Each stay must be asked about once, and be summarised. Take a task that asks once a stay.")
    if (summaries.subject_id[rows] != subjects).any():
        raise EhrDataError("`stay_id` must be of one patient only, and is not. Give every stay an id of its own.")
    return replace(summaries, **{name: getattr(summaries, name)[rows] for name in ARRAYS})


def admission_summaries(examples: dict[str, datasets.Dataset], num_features: int) -> dict[str, StaySummaries]:
    """Summarises what the examples of admissions hold: shares of hours, demographics, codes and vectors of notes.

    Args:
        examples: Split → examples of :func:`hf_ehr.admission_datasets.build_admission_examples`.
        num_features: Features of an hour.

    Returns:
        Split → summaries, a row an example; ``stay_id`` holds the visit.
    """
    chosen = {name: _common(examples["train"], name) for name in LISTS}
    return {split: _admissions(part, num_features, chosen) for split, part in examples.items()}


def _admissions(examples: datasets.Dataset, num_features: int, chosen: dict[str, np.ndarray]) -> StaySummaries:
    table = examples.with_format("arrow")[:]
    rows, hours = np.arange(len(table)), _lengths(table["feature_counts"])
    entries, features = np.repeat(rows, _lengths(table["feature_ids"])), _flat(table["feature_ids"])
    shares = _counts(entries, features, (len(rows), num_features)) / np.maximum(hours, 1)[:, None]
    columns = {f"feature {index}": values for index, values in enumerate(shares.T)} | {"hours": hours}
    columns |= {f"demographic {index}": values for index, values in enumerate(_last_demographics(table).T)}
    for name, ids in chosen.items():
        owners, codes = np.repeat(rows, _lengths(table[name])), _flat(table[name])
        there = _counts(owners, codes, (len(rows), max(ids.max(initial=0), codes.max(initial=0)) + 1)) > 0
        columns |= {f"{name} = {index}": there[:, index] for index in ids}
    if "note_vector" in table.column_names:
        columns |= {f"note {index}": values for index, values in enumerate(_vectors(table["note_vector"]).T)}
    subject, visit, labels = (table[name].to_numpy() for name in ("subject_id", "visit_id", "labels"))
    matrix = np.stack(list(columns.values()), axis=1).astype(np.float32)
    return StaySummaries(subject, visit, labels, matrix, list(columns), fields={})


def _last_demographics(table: Any) -> np.ndarray:
    """Demographics of the last stay of each admission, (admissions, size), NaN for one without stays."""
    stays, flat = _lengths(table["stay_hours"]), _flat(table["demographics"])
    found = np.full((len(stays), len(flat) // max(stays.sum(), 1)), np.nan)
    each = flat.reshape(stays.sum(), found.shape[1])
    found[stays > 0] = each[np.cumsum(stays)[stays > 0] - 1]
    return found


def _vectors(column: Any) -> np.ndarray:
    """Lists that are full or empty → (rows, size), NaN where empty."""
    lengths = _lengths(column)
    found = np.full((len(lengths), int(lengths.max(initial=0))), np.nan, np.float32)
    found[lengths > 0] = _flat(column).reshape(-1, found.shape[1])
    return found


def _common(examples: datasets.Dataset, name: str) -> np.ndarray:
    """Ids of the codes of enough training admissions."""
    column = examples.with_format("arrow")[:][name]
    owners, codes = np.repeat(np.arange(len(column)), _lengths(column)), _flat(column)
    counts = (_counts(owners, codes, (len(column), int(codes.max(initial=0)) + 1)) > 0).sum(axis=0)
    return np.flatnonzero(counts >= FEWEST_ADMISSIONS)


def _counts(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape).toarray()


def _flat(column: Any) -> np.ndarray:
    return np.asarray(pc.list_flatten(column))


def _lengths(column: Any) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()
