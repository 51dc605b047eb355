"""Codes of the training split → :class:`EhrCodeTokenizer`.

A vocabulary is data about patients. It is fitted on the training patients only (rule L5), a code enters by itself only
when enough patients have it, and what is stored are the codes and a fingerprint of the split, never an id or a count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .models.code_hierarchy import ancestors, parent
from .models.tokenization_ehr import EhrCodeTokenizer
from .schema import CODE_KINDS, EhrDataError, shard_paths
from .tasks.audit import fingerprint

Records: TypeAlias = pa.Table | str | Path | Iterable[str | Path]
"""RECORDS in memory, a prepared folder, or the paths of Parquet shards."""

MIN_PATIENTS = 11
"""Cells of fewer than 11 patients are not published (the rule of CMS for its data)."""


@dataclass
class Coverage:
    """How the code occurrences of some patients meet a vocabulary, as shares of ``occurrences``.

    Attributes:
        occurrences: Number of code occurrences.
        exact: Share that has an id of its own.
        backed_off: Share that takes the id of an ancestor.
        unknown: Share that becomes ``[UNK]`` (or is dropped, where the vocabulary has none).
    """

    occurrences: int
    exact: float
    backed_off: float
    unknown: float


def count_codes(
    records: Records, *, subject_ids: Any | None = None, kinds: Sequence[str] = ("diagnoses",)
) -> pl.DataFrame:
    """Counts codes, shard by shard.

    Args:
        records: RECORDS; a patient lives in one shard.
        subject_ids: Count these patients only; ``None`` counts all.
        kinds: Which code lists of a visit to count, of ``diagnoses``, ``procedures``, ``medications``.

    Returns:
        ``code``, ``occurrences`` (visits that list the code), ``patients`` (distinct patients with it), sorted by
        falling occurrences, then code.

    Raises:
        ValueError: ``kinds`` is empty or names no code list.
    """
    total = pl.DataFrame(schema={"code": pl.String, "occurrences": pl.Int64, "patients": pl.Int64})
    for pairs in _patient_codes(records, subject_ids, kinds, "Counting codes"):
        shard = pairs.group_by("code").agg(
            pl.col("occurrences").sum().cast(pl.Int64), pl.len().cast(pl.Int64).alias("patients")
        )
        total = pl.concat([total, shard]).group_by("code").sum()
    return total.sort(["occurrences", "code"], descending=[True, False])


def fit_tokenizer(
    records: Records,
    *,
    subject_ids: Any,
    kinds: Sequence[str] = ("diagnoses",),
    min_count: int = 1,
    min_patients: int = MIN_PATIENTS,
    max_size: int | None = None,
    code_exact: bool = False,
    visit_separators: bool = False,
    ages: bool = False,
    days: bool = False,
) -> EhrCodeTokenizer:
    """Fits the vocabulary on the training patients.

    A code below ``min_count`` or ``min_patients`` does not enter; its patients and occurrences go to its parent, which
    enters when the union reaches both bounds, and so on up to the ICD category. A code whose whole chain stays too
    rare becomes ``[UNK]``. Ids follow falling occurrences (those gathered from descendants included), then the code.

    Args:
        records: RECORDS in memory, a prepared folder, or paths of Parquet shards.
        subject_ids: The training patients, no others: whatever is fitted is fitted on the training split.
        kinds: The code lists of a visit that make a history, in this order.
        min_count: Fewest occurrences of a code.
        min_patients: Fewest distinct patients of a code; 11 keeps small groups out of a published vocabulary.
        max_size: Keep only this many codes (special tokens not counted); what is cut backs off when encoding.
        code_exact: Med-BERT's own ids, see :meth:`EhrCodeTokenizer.from_codes`.
        visit_separators: BEHRT's ``[CLS]`` before a history and ``[SEP]`` after each visit.
        ages: BEHRT's age of the patient at each code.
        days: The days from the first visit to that of each code, for models that read intervals (HiTANet).

    Returns:
        The tokenizer. Its ``init_kwargs`` hold the options and ``fitted_on``, the fingerprint of the
        patients that :func:`hf_ehr.tasks.audit.check_fitted_on` compares.

    Raises:
        ValueError: A bound is below 1, ``subject_ids`` is empty, or ``kinds`` names no code list.
        EhrDataError: No code of these patients reaches the bounds.
    """
    for name, value in {"min_count": min_count, "min_patients": min_patients, "max_size": max_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    subject_ids = _subject_ids(subject_ids)
    if isinstance(records, Iterator):
        records = list(records)  # read twice
    counts = count_codes(records, subject_ids=subject_ids, kinds=kinds)
    enough = (pl.col("occurrences") >= min_count) & (pl.col("patients") >= min_patients)
    rare = counts.filter(~enough)["code"]
    pairs = pl.concat(_patient_codes(records, subject_ids, kinds, "Gathering rare codes", only=rare))
    entered = _back_off(counts.filter(enough).drop("patients"), pairs, enough)
    if entered.is_empty():
        raise EhrDataError(
            f"No code of the {len(subject_ids)} patients in `subject_ids` reaches `min_count`={min_count} and "
            f"`min_patients`={min_patients}. Check that the ids belong to these records, or lower the bounds."
        )
    codes = entered.sort(["occurrences", "code"], descending=[True, False])["code"].to_list()
    return EhrCodeTokenizer.from_codes(
        codes[:max_size],
        code_exact=code_exact,
        visit_separators=visit_separators,
        ages=ages,
        days=days,
        kinds=list(kinds),
        min_count=min_count,
        min_patients=min_patients,
        max_size=max_size,
        fitted_on=fingerprint(subject_ids),
    )


def coverage(tokenizer: EhrCodeTokenizer, records: Records, subject_ids: Any | None = None) -> Coverage:
    """How much of some patients' codes a vocabulary knows, over the code lists the tokenizer reads.

    Raises:
        EhrDataError: The patients have no codes.
    """
    counts = count_codes(records, subject_ids=subject_ids, kinds=tokenizer.kinds)
    if counts.is_empty():
        raise EhrDataError(f"The records hold no {' or '.join(tokenizer.kinds)} of these patients: nothing to cover.")
    ids = tokenizer.codes_to_ids(counts["code"])
    exact = counts["code"].is_in(list(tokenizer.get_vocab())).to_numpy()
    known = (ids >= 0) & (ids != (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id))
    weights = counts["occurrences"].to_numpy()
    share = [float(weights[which].sum() / weights.sum()) for which in (exact, known & ~exact, ~known)]
    return Coverage(int(weights.sum()), *share)


def _back_off(entered: pl.DataFrame, pairs: pl.DataFrame, enough: pl.Expr) -> pl.DataFrame:
    """Moves rare codes to their parents, deepest level first, until they are frequent or out of ancestors.

    Args:
        entered: ``code``, ``occurrences`` of the codes that enter by themselves.
        pairs: ``subject_id``, ``code``, ``occurrences`` of the rare ones.
        enough: The rule over ``occurrences`` and ``patients``.

    Returns:
        ``code``, ``occurrences`` of all that enter.
    """
    while not pairs.is_empty():
        counts = pairs.group_by("code").agg(
            pl.col("occurrences").sum(), pl.col("subject_id").n_unique().alias("patients")
        )
        depth = np.asarray([len(ancestors(code)) for code in counts["code"]])
        level = counts.filter(depth == depth.max())
        enters = level.filter(enough | pl.col("code").is_in(entered["code"].implode()))
        entered = pl.concat([entered, enters.drop("patients")]).group_by("code").sum()
        rest = level.join(enters, on="code", how="anti")["code"]
        pairs = (
            pairs.join(enters, on="code", how="anti")
            .with_columns(pl.col("code").replace(rest, [parent(code) for code in rest]))
            .drop_nulls("code")
        )
    return entered


def _patient_codes(
    records: Records, subject_ids: Any | None, kinds: Sequence[str], title: str, only: pl.Series | None = None
) -> Iterator[pl.DataFrame]:
    """``subject_id``, ``code``, ``occurrences`` of one shard after the other, of the codes in ``only`` if given."""
    _check_kinds(kinds)
    wanted = None if subject_ids is None else pa.array(_subject_ids(subject_ids))
    for table in _tables(records, kinds, title):
        if wanted is not None:
            table = table.filter(pc.is_in(table["subject_id"], value_set=wanted))
        rows = pl.concat([_flatten(table, kind) for kind in kinds])
        if only is not None:
            rows = rows.filter(pl.col("code").is_in(only.implode()))
        yield rows.group_by("subject_id", "code").agg(pl.len().cast(pl.Int64).alias("occurrences"))


def _tables(records: Records, kinds: Sequence[str], title: str) -> Iterator[pa.Table]:
    """The shards of ``records``, read with the needed columns only."""
    if isinstance(records, pa.Table):
        yield records
        return
    paths = shard_paths(records, "records") if isinstance(records, str | Path) else list(records)
    columns = ["subject_id", *(f"visits.list.element.{kind}" for kind in kinds)]
    for path in tqdm(paths, desc=title, unit="shard", disable=len(paths) < 2):
        yield pq.ParquetFile(path).read(
            columns=columns
        )  # unlike `read_table`, it reads single fields of nested columns


def _flatten(table: pa.Table, kind: str) -> pl.DataFrame:
    """One row per code of ``kind``: ``subject_id``, ``code``."""
    visits = table["visits"]
    codes = pc.struct_field(pc.list_flatten(visits), kind)
    visit_of_code, patient_of_visit = pc.list_parent_indices(codes), pc.list_parent_indices(visits)
    subjects = table["subject_id"].take(patient_of_visit).take(visit_of_code)
    return pl.DataFrame(pa.table({"subject_id": subjects, "code": pc.list_flatten(codes)}))


def _check_kinds(kinds: Sequence[str]) -> None:
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(CODE_KINDS):
        raise ValueError(f"`kinds` must be a list of {', '.join(CODE_KINDS)}, got {kinds!r}.")


def _subject_ids(subject_ids: Collection[int] | Any) -> np.ndarray:
    """Sorted distinct ids, int64."""
    values = np.unique(np.asarray(subject_ids if hasattr(subject_ids, "__array__") else list(subject_ids)))
    if not values.size:
        raise ValueError("`subject_ids` must name the patients of the training split, got none.")
    if values.dtype.kind not in "iu":
        raise ValueError(f"`subject_ids` must be integers, got {values.dtype}.")
    return values.astype(np.int64)


__all__ = ["MIN_PATIENTS", "Coverage", "count_codes", "coverage", "fit_tokenizer"]
