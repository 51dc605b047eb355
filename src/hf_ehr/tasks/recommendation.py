"""The tasks whose answer is a list of codes: medications of a visit, and the codes that a visit is billed with.

``medication_recommendation`` is the retrospective task of the field (GAMENet, G-BERT, MedM-PLM): asked at the start of
each visit from a patient's second on, with the diagnoses of that visit allowed although they are coded at its end.
Nothing else of the visit may be seen. ``icd_coding`` is asked when the chart is closed, and everything in it but
the codes themselves may be seen. Which codes are labels is decided later, from training patients alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_ehr.schema import LABEL_SCHEMA, EhrDataError, atomic_path, shard_paths

MEDICATION_RECOMMENDATION = "medication_recommendation"
ICD_CODING = "icd_coding"
CODED_KINDS = ("diagnoses", "procedures")
"""What is coded: CAML's 50 most frequent codes are of both."""
DEFINITIONS = {
    MEDICATION_RECOMMENDATION: "Medications of each visit that has diagnoses and medications, from a patient's second "
    "such visit on, asked at its start; of several that start together the last. Its diagnoses may be seen, which are "
    "coded later: a retrospective task.",
    ICD_CODING: "Diagnoses and procedures of each visit that has an end and any of them, asked when the last note is "
    "written, not before the visit ends.",
}
"""What each task asks, in words."""
_VISIT = "visits.list.element."
_Labels = Callable[[pl.DataFrame, Counter[str]], pl.DataFrame]


def label_codes(task: str, directory: str | Path, *, progress: bool = True) -> Path:
    """Labels every visit of a prepared folder; memory is that of a shard.

    Writes ``labels/<task>.parquet`` (LABELS with ``codes``) and, last, ``labels/<task>.json`` with the flow.

    Args:
        task: ``medication_recommendation`` or ``icd_coding``.
        directory: Prepared folder.
        progress: Whether to show a progress bar.

    Returns:
        The path of the Parquet file.

    Raises:
        EhrDataError: The folder is not prepared, or no visit is asked about.
        ValueError: There is no such task.
    """
    readers: dict[str, tuple[_Labels, Sequence[str]]] = {
        MEDICATION_RECOMMENDATION: (_medications, ("start", "diagnoses", "medications")),
        ICD_CODING: (_coded, ("end", *CODED_KINDS, "notes.list.element.time")),
    }
    if task not in readers:
        raise ValueError(f"`task` must be one of {', '.join(readers)}, got {task!r}.")
    read, columns = readers[task]
    target, excluded, tables = Path(directory) / "labels" / f"{task}.parquet", Counter[str](), []
    for path in tqdm(shard_paths(directory, "records"), desc=f"Labelling {task}", unit="shard", disable=not progress):
        records = pq.ParquetFile(path).read(columns=["subject_id", *(f"{_VISIT}{name}" for name in columns)])
        visits = pl.DataFrame(records).explode("visits").drop_nulls("visits").unnest("visits")
        tables.append(_as_labels(read(visits.with_row_index("visit"), excluded)))
    labels = pa.concat_tables(tables)
    if not labels.num_rows:
        raise EhrDataError(f"`{task}` asks about no visit of {directory}: {dict(excluded)}. {DEFINITIONS[task]}")
    target.with_suffix(".json").unlink(missing_ok=True)
    with atomic_path(target) as temporary:
        pq.write_table(labels, temporary, compression="zstd")
    with atomic_path(target.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(_report(task, labels, excluded), indent=2) + "\n")
    return target


def _medications(visits: pl.DataFrame, excluded: Counter[str]) -> pl.DataFrame:
    """``subject_id``, ``prediction_time``, ``codes`` of the visits asked about; given by patient and start."""
    held = {kind: pl.col(kind).list.len().fill_null(0) > 0 for kind in ("diagnoses", "medications")}
    excluded["no_diagnosis"] += len(visits.filter(~held["diagnoses"]))
    excluded["no_medication"] += len(visits.filter(held["diagnoses"] & ~held["medications"]))
    whole = visits.filter(held["diagnoses"] & held["medications"] & pl.col("start").is_not_null())
    asked = whole.unique(["subject_id", "start"], keep="last", maintain_order=True)
    excluded["starts_with_another_visit"] += len(whole) - len(asked)
    later = asked.filter(pl.col("start") > pl.col("start").min().over("subject_id"))
    excluded["first_of_the_patient"] += len(asked) - len(later)
    return later.select("subject_id", prediction_time="start", codes="medications")


def _coded(visits: pl.DataFrame, excluded: Counter[str]) -> pl.DataFrame:
    codes = pl.concat_list([pl.col(kind).fill_null([]) for kind in CODED_KINDS])
    visits = visits.with_columns(codes=codes.list.unique(maintain_order=True))
    excluded["no_code"] += len(visits.filter(pl.col("codes").list.len() == 0))
    visits = visits.filter(pl.col("codes").list.len() > 0)
    asked = visits.drop_nulls("end")
    excluded["no_end"] += len(visits) - len(asked)
    times = pl.col("notes").list.eval(pl.element().struct.field("time")).list.max()
    asked = asked.with_columns(prediction_time=pl.max_horizontal("end", times))
    single = asked.unique(["subject_id", "prediction_time"], keep="last", maintain_order=True)
    excluded["closes_with_another_visit"] += len(asked) - len(single)
    return single.select("subject_id", "prediction_time", "codes")


def _as_labels(found: pl.DataFrame) -> pa.Table:
    found = found.sort("subject_id", "prediction_time")
    given = {name: found[name].to_arrow().cast(LABEL_SCHEMA.field(name).type) for name in found.columns}
    rows = [given.get(field.name, pa.nulls(len(found), field.type)) for field in LABEL_SCHEMA]
    return pa.table(rows, schema=LABEL_SCHEMA)


def _report(task: str, labels: pa.Table, excluded: Counter[str]) -> dict:
    lengths = np.diff(labels["codes"].combine_chunks().offsets.to_numpy())
    codes = pl.Series("code", pl.from_arrow(labels["codes"].combine_chunks().flatten()))
    warnings = []
    if task == MEDICATION_RECOMMENDATION:
        unmapped = (~codes.str.starts_with("ATC/")).sum() / max(len(codes), 1)
        if unmapped:
            warnings.append(
                f"{unmapped:.1%} of the medications are not in ATC. Map them with `hf-ehr map-drugs`, or read the "
                "results as those of the source's own codes."
            )
    return {
        "task": task,
        "candidates": labels.num_rows + excluded.total(),
        "excluded": dict(excluded),
        "labels": labels.num_rows,
        "patients": len(labels["subject_id"].unique()),
        "codes_per_label": float(lengths.mean()),
        "warnings": warnings,
        "definition": DEFINITIONS[task],
    }


__all__ = ["CODED_KINDS", "DEFINITIONS", "ICD_CODING", "MEDICATION_RECOMMENDATION", "label_codes"]
