"""The rivals of a model of visits: what they are fitted on (codes, words, age, sex), and what they predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from . import baselines
from .metrics import undefined_reason
from .recommendation_baselines import (
    RECOMMENDATION_BASELINES,
    AskedVisits,
    RecommendationPredictions,
    as_examples,
    codes_of_visits,
    lightgbm,
    logistic_regression,
    popularity,
)
from .schema import EhrDataError, shard_paths
from .subgroups import age_bands

if TYPE_CHECKING:
    import datasets

    from .models.processing_medmplm import MedMPLMProcessor

ADMISSION_RIVALS = ("Prevalence", "Age + sex LR", "Bag-of-codes LR", "LightGBM on counts")
CODING_RIVALS = {"Popularity": popularity, "L2 LR": logistic_regression, "LightGBM": lightgbm}
_YEAR = 365.25 * 24 * 3600
_SPECIAL = 5  # special tokens come first in the vocabularies of codes


def demographics(data: str, subject_ids: np.ndarray, visit_ids: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """Age in years at the start of visits, NaN where unknown, and sex, None where unknown.

    Args:
        data: Prepared folder.
        subject_ids: (visits,).
        visit_ids: (visits,), -1 for a visit without an id.
    """
    columns = ["subject_id", "birth_time", "sex", *(f"visits.list.element.{name}" for name in ("visit_id", "start"))]
    parts = []
    for path in shard_paths(data, "records"):
        visits = pl.DataFrame(pq.ParquetFile(path).read(columns=columns)).explode("visits").drop_nulls("visits")
        visits = visits.unnest("visits").with_columns(pl.col("visit_id").fill_null(-1))
        parts.append(visits.filter(pl.col("subject_id").is_in(pl.Series(np.unique(subject_ids)).implode())))
    age = (pl.col("start") - pl.col("birth_time")).dt.total_seconds() / _YEAR
    known = pl.concat(parts).with_columns(age=age.cast(pl.Float64)).unique(["subject_id", "visit_id"], keep="first")
    asked = pl.DataFrame({"subject_id": np.asarray(subject_ids), "visit_id": np.asarray(visit_ids)})
    found = asked.join(known, on=["subject_id", "visit_id"], how="left", maintain_order="left")
    return found["age"].fill_null(float("nan")).to_numpy(), found["sex"].to_list()


def groups_of(age: np.ndarray, sex: Sequence[str | None]) -> dict[str, Sequence[str | None]]:
    """Name → group of each row, for subgroups."""
    return {"sex": sex, "age": age_bands(age)}


def visit_features(examples: datasets.Dataset, processor: MedMPLMProcessor) -> sparse.csr_array:
    """What rows of one visit each hold of codes and words, 0/1 (rows, features)."""
    sizes = {f"{name}_ids": (len(tokenizer), _SPECIAL) for name, tokenizer in processor.code_tokenizers.items()}
    if processor.note_tokenizer is not None:
        sizes["note_input_ids"] = (len(processor.note_tokenizer), 0)
    parts = [
        codes_of_visits(examples, name, *size)[0] for name, size in sizes.items() if name in examples.column_names
    ]
    return sparse.csr_array(sparse.hstack(parts, format="csr"))


def admission_rivals(
    parts: Mapping[str, datasets.Dataset], data: str, processor: MedMPLMProcessor, seed: int
) -> dict[str, baselines.Predictions]:
    """Row → validation and test probabilities of yes-or-no baselines.

    Args:
        parts: `train`, `validation` and `test` examples; labels of the last are not read.
        data: Prepared folder.
        processor: Made the examples.
        seed: Of LightGBM.

    Raises:
        EhrDataError: All training or all validation rows have one answer.
    """
    tables = []
    for name, part in parts.items():
        labels = np.asarray(part["labels"])
        reason = None if name == "test" else undefined_reason(labels)
        if reason:
            raise EhrDataError(
                f"The {name} visits must have both answers, got {len(labels)} with {reason}: no rival can be fitted. "
                "Take another `split_seed`, or more patients."
            )
        features = visit_features(part, processor)
        subjects, visits = np.asarray(part["subject_id"]), np.array([row[-1] for row in part["visit_ids"]])
        age, sex = demographics(data, subjects, visits)
        coded = pa.array([{"F": 1, "M": 2}.get(value or "", 0) for value in sex])
        table = as_examples(features).append_column("labels", pa.array(labels))
        tables.append(table.append_column("age", pa.array(age)).append_column("sex", coded))
    size = features.shape[1]
    return {name: baselines.BASELINES[name](*tables, vocab_size=size, seed=seed) for name in ADMISSION_RIVALS}


def recommendation_rivals(
    parts: Mapping[str, datasets.Dataset], processor: MedMPLMProcessor, seed: int
) -> dict[str, RecommendationPredictions]:
    """Row → validation and test probabilities of all drugs; arguments as above."""
    sizes = [len(tokenizer) for tokenizer in processor.code_tokenizers.values()]
    splits = [AskedVisits.of(part, *sizes) for part in parts.values()]
    splits[-1] = replace(splits[-1], drugs=sparse.csr_array(splits[-1].drugs.shape, dtype=np.float32))
    return {name: fit(*splits, seed=seed) for name, fit in RECOMMENDATION_BASELINES.items()}


def coding_rivals(
    parts: Mapping[str, datasets.Dataset], truth: Mapping[str, np.ndarray], processor: MedMPLMProcessor, seed: int
) -> dict[str, RecommendationPredictions]:
    """Row → validation and test probabilities of all codes; `truth` of the test is not read."""
    splits = []
    for name, part in parts.items():
        codes: Any = np.zeros_like(truth[name]) if name == "test" else truth[name]
        matrix = sparse.csr_array(codes.astype(np.float32))
        nothing = sparse.csr_array(matrix.shape, dtype=np.float32)
        splits.append(AskedVisits(visit_features(part, processor), matrix, nothing, np.asarray(part["subject_id"])))
    return {name: fit(*splits, seed=seed) for name, fit in CODING_RIVALS.items()}
