"""What rows without a network read: statistics of stays or of admissions, and vectors of their notes, as a matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_ehr.experiments.stays.spec import ADMISSION
from hf_ehr.schema import atomic_path
from hf_ehr.stay_baselines import StaySummaries, admission_summaries, stay_summaries

if TYPE_CHECKING:
    import datasets

    from hf_ehr.experiments.stays.materials import StayCohort

ARRAYS = ("subject_id", "stay_id", "labels", "matrix")


def make_summaries(cohort: StayCohort, level: str, task: str, path: Path) -> None:
    """Summarises the stays or admissions of all splits of a task; the columns are those of the training rows.

    Args:
        cohort: The patients.
        level: Of the report.
        task: The task.
        path: File to write; see :func:`load_summaries`.
    """
    summarise = admission_summaries if level == ADMISSION else stay_summaries
    names: list[str] | None = None
    parts: dict[str, StaySummaries] = {}
    for split in ("train", "validation", "test"):
        given: dict[str, Any] = {"labels": cohort.labels(task, split), "subject_ids": cohort.splits[split]}
        parts[split] = summarise(cohort.place(split).data, names=names, **given)
        names = parts[split].names
    save_summaries(parts, path)


def save_summaries(parts: dict[str, StaySummaries], path: Path) -> None:
    """Writes the splits of one task as one file that is whole or not there."""
    arrays = {f"{split}.{name}": getattr(part, name) for split, part in parts.items() for name in ARRAYS}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, names=np.array(parts["train"].names), **arrays)


def load_summaries(path: Path, examples: dict[str, datasets.Dataset]) -> dict[str, StaySummaries]:
    """The summaries of what each split's examples are of, in their order, beside the vectors of their notes.

    Raises:
        EhrDataError: They were made of others.
    """
    found = {}
    with np.load(path) as file:
        names = file["names"].tolist()
        arrays = {key: file[key] for key in file.files if key != "names"}
    for split, part in examples.items():
        ours = StaySummaries(names=names, fields={}, **{name: arrays[f"{split}.{name}"] for name in ARRAYS})
        key = "stay_id" if "stay_id" in part.column_names else "visit_id"
        ours = ours.in_order(np.asarray(part[key]), np.asarray(part["labels"]))
        found[split] = with_notes(ours, part) if "note_vector" in part.column_names else ours
    return found


def with_notes(summaries: StaySummaries, examples: datasets.Dataset) -> StaySummaries:
    """The same rows with a column for each number of their `note_vector`, NaN where there is no note."""
    vectors = [np.asarray(vector, np.float32) for vector in examples["note_vector"]]
    size = max(map(len, vectors))
    matrix = np.stack([vector if len(vector) else np.full(size, np.nan, np.float32) for vector in vectors])
    names = summaries.names + [f"note {index}" for index in range(size)]
    return replace(summaries, matrix=np.concatenate([summaries.matrix, matrix], axis=1), names=names)
