"""Arithmetic on histories that lie one after the other: visits of given lengths, patients of given visits."""

import warnings

import numpy as np

MAX_VISITS = 999  # Med-BERT's visit table has 1,000 rows and row 0 is padding


def check_lengths(
    codes: int, visit_lengths: np.ndarray, patient_lengths: np.ndarray, max_length: int | None, least: int
) -> None:
    """Raises a ``ValueError`` where lengths do not add up or ``max_length`` is below ``least``."""
    if visit_lengths.sum() != codes:
        raise ValueError(f"`visit_lengths` must add up to the {codes} codes, got {visit_lengths.sum()}.")
    if patient_lengths.sum() != len(visit_lengths):
        raise ValueError(
            f"`patient_lengths` must add up to the {len(visit_lengths)} visits, got {patient_lengths.sum()}."
        )
    if max_length is not None and max_length < least:
        raise ValueError(f"`max_length` must be at least {least} or None, got {max_length}.")


def total_before(values: np.ndarray) -> np.ndarray:
    """Exclusive running total with the grand total behind it, (values + 1,) int64."""
    return np.append(0, np.cumsum(values, dtype=np.int64))


def ranks(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … within each run of the given lengths, (sum of lengths,) int64."""
    return np.arange(lengths.sum()) - np.repeat(total_before(lengths)[:-1], lengths)


def first_in_visit(ids: np.ndarray, visit: np.ndarray) -> np.ndarray:
    """Which codes have no equal before them in their visit; ``ids`` and the ascending ``visit`` are (codes,)."""
    first = np.ones(len(ids), bool)
    if not len(ids):
        return first
    base = int(ids.max()) + 2  # ids start at -1
    keys = visit * base + ids
    ordered = np.sort(keys, kind="stable")  # fast here, for the visits are in order already
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):  # a few visits, so only their codes are sorted a second time, with positions
        affected = np.zeros(int(visit[-1]) + 1, bool)
        affected[(repeated + 1) // base] = True
        positions = np.flatnonzero(affected[visit])
        first[positions] = False
        first[positions[np.unique(keys[positions], return_index=True)[1]]] = True
    return first


def tokens_kept(visit_lengths: np.ndarray, patient_lengths: np.ndarray, max_length: int | None) -> np.ndarray:
    """How many tokens each visit keeps, (visits,) int64: the rules of truncation."""
    ends = np.cumsum(patient_lengths)

    def from_here_on(values: np.ndarray) -> np.ndarray:
        """Sum of ``values`` over this and the patient's later visits."""
        before = total_before(values)
        return np.repeat(before[ends], patient_lengths) - before[:-1]

    newness = from_here_on(visit_lengths > 0)  # 1 for the newest visit that has any
    recent = newness <= MAX_VISITS
    fits = np.ones(len(visit_lengths), bool) if max_length is None else from_here_on(visit_lengths) <= max_length
    if (fits & ~recent).any():
        warnings.warn(f"Histories of more than {MAX_VISITS} visits keep only the last {MAX_VISITS}.", stacklevel=3)
    kept = np.where(fits & recent, visit_lengths, 0)
    if max_length is not None:
        kept = np.where(newness == 1, np.minimum(visit_lengths, max_length), kept)
    return kept


def day_ids(starts: np.ndarray | None, patient_lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """1 + the days from the patient's first visit to each, by the calendar; 0 where unknown, (visits,) int32.

    Args:
        starts: (visits,) datetime64, NaT where unknown.
        patient_lengths: Visits of each patient, (patients,).
        counts: Tokens of each visit, (visits,); a visit without any is no first visit, and has 0.
    """
    ids = np.zeros(len(counts), np.int32)
    if starts is None:
        return ids
    known = np.flatnonzero((counts > 0) & ~np.isnat(starts))
    owners = np.repeat(np.arange(len(patient_lengths)), patient_lengths)[known]
    days = starts[known].astype("M8[D]").astype(np.int64)
    first = np.searchsorted(owners, owners)
    ids[known] = 1 + np.maximum(days - days[first], 0)
    return ids


def age_ids(births: np.ndarray | None, starts: np.ndarray | None, patient_lengths: np.ndarray) -> np.ndarray:
    """1 + the age in whole years at the start of each visit, 0 where unknown or before birth, (visits,) int32."""
    ids = np.zeros(patient_lengths.sum(), np.int32)
    if births is None or starts is None:
        return ids
    births = np.repeat(births, patient_lengths)
    known = ~np.isnat(births) & ~np.isnat(starts)
    births, starts = births[known], starts[known]
    born, now = births.astype("M8[M]"), starts.astype("M8[M]")
    months = (now - born).astype(np.int64) - (starts - now < births - born)  # the month under way is not over
    ids[known] = np.maximum(months // 12 + 1, 0)
    return ids
