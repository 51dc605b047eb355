"""Small synthetic cohorts and what their tables say, for the tests of the generator."""

from __future__ import annotations

from functools import cache

import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

from hf_ehr.sources.synthetic import SyntheticConfig, code_table, generate_shard

PATIENTS = 8_000
WORLDS = ("A", "C", "C+", "null", "site_b")


@cache
def cohort(config: SyntheticConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """EVENTS and TRUTH as polars frames."""
    events, truth = generate_shard(config, 0, 1)
    return pl.from_arrow(events), pl.from_arrow(truth)


def make(world: str = "C", **options) -> tuple[pl.DataFrame, pl.DataFrame]:
    return cohort(SyntheticConfig(world=world, **{"patients": PATIENTS, **options}))


def present(truth: pl.DataFrame, conditions: int = 40) -> np.ndarray:
    """``(patients, conditions)`` 0/1."""
    rows = truth.with_row_index("row").select("row", "conditions").explode("conditions").drop_nulls()
    matrix = np.zeros((len(truth), conditions))
    matrix[rows["row"], rows["conditions"]] = 1
    return matrix


def onsets(truth: pl.DataFrame, conditions: int = 40) -> np.ndarray:
    """``(patients, conditions)`` number of the visit, NaN where the condition is absent."""
    rows = (
        truth.with_row_index("row").select("row", "conditions", "onsets").explode("conditions", "onsets").drop_nulls()
    )
    matrix = np.full((len(truth), conditions), np.nan)
    matrix[rows["row"], rows["conditions"]] = rows["onsets"]
    return matrix


def diagnoses(events: pl.DataFrame, truth: pl.DataFrame, config: SyntheticConfig) -> pl.DataFrame:
    """Diagnosis events with the condition behind the code and whether they were known at the prediction time."""
    codes = pl.from_arrow(code_table(config))
    return (
        events.filter(pl.col("kind") == "diagnosis")
        .join(codes, on="code", how="left", maintain_order="left")
        .join(truth.select("subject_id", "prediction_time"), on="subject_id", maintain_order="left")
        .with_columns(known=pl.col("available_at") <= pl.col("prediction_time"))
    )


def stays(events: pl.DataFrame) -> pl.DataFrame:
    """One row per visit with its start, end, kind and disposition."""
    start = events.filter(pl.col("kind") == "admission")
    end = events.filter(pl.col("kind") == "discharge").select("visit_id", end="time", disposition="code")
    return (
        start.select("subject_id", "visit_id", start="time", visit="code", planned="numeric_value")
        .join(end, on="visit_id")
        .sort("subject_id", "start")
        .with_columns(days=(pl.col("end") - pl.col("start")).dt.total_seconds() / 86_400)
    )


def auroc(truth: pl.DataFrame, score: np.ndarray) -> float:
    return float(roc_auc_score(truth["label"], score))


# --- the same patient however the work is cut
