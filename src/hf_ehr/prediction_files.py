"""Predictions as the files that the tools around MEDS read: the labels, and what was predicted for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_ehr.schema import EhrDataError, validate_labels, write_parquet

LABEL_COLUMNS = ("subject_id", "prediction_time", "boolean_value")


def prediction_table(labels: pa.Table, probabilities: Any, *, threshold: float | None = None) -> pa.Table:
    """LABELS with ``predicted_boolean_probability`` and ``predicted_boolean_value``, as meds-evaluation has them.

    Args:
        labels: LABELS with ``boolean_value``.
        probabilities: Of the positive answer, one a label and in their order, (labels,).
        threshold: From where on the answer is positive; null values are written without one.

    Raises:
        EhrDataError: A label has no boolean value.
        ValueError: The probabilities are of another number, or are none.
    """
    labels = validate_labels(labels)
    values = np.asarray(probabilities, np.float32)
    if values.shape != (labels.num_rows,) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"`probabilities` must be {labels.num_rows} numbers in [0, 1], one a label, got an array {values.shape}."
        )
    if labels["boolean_value"].null_count:
        raise EhrDataError("`labels` must have a `boolean_value` in every row. Other questions have no such file.")
    decided = pa.nulls(len(values), pa.bool_()) if threshold is None else pa.array(values >= threshold)
    return (
        labels.select(LABEL_COLUMNS)
        .append_column("predicted_boolean_value", decided)
        .append_column("predicted_boolean_probability", pa.array(values))
    )


def write_predictions(
    labels: pa.Table, probabilities: Any, path: str | Path, *, threshold: float | None = None
) -> None:
    """Writes :func:`prediction_table` as Parquet. The file is about patients: keep it as you keep the labels."""
    write_parquet(prediction_table(labels, probabilities, threshold=threshold), path)
