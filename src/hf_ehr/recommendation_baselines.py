"""Baselines of medication recommendation without a neural network: the rows that every table carries beside a model.

Each is ``fit_predict(train, validation, test, *, seed) -> RecommendationPredictions`` over :class:`AskedVisits`, the
visits that the models score. It is fitted on ``train``, its few settings are
chosen on ``validation``, and ``test`` is only predicted: its drugs are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from scipy import sparse
from tqdm.auto import tqdm

from hf_ehr._scores import Array
from hf_ehr.baselines import arrow_column, lightgbm_counts
from hf_ehr.note_baselines import INVERSE_PENALTIES, RegressionSettings, map_within_notes, one_vs_rest_scores

if TYPE_CHECKING:
    import datasets

    Examples: TypeAlias = datasets.Dataset | pa.Table

MAX_LABELS = 200
"""Drugs that LightGBM is fitted for, the most frequent ones: each costs some seconds. MedM-PLM has 155."""


class RecommendationPredictions(NamedTuple):
    """Probabilities of all drugs, ``(visits, drugs)`` float32 for each split, in the order of its asked visits."""

    validation: Array
    test: Array


@dataclass(frozen=True, eq=False)
class AskedVisits:
    """What is known at each visit that is asked about, and what it then was given.

    Attributes:
        features: 0/1, ``(visits, features)``: diagnoses and drugs of all earlier visits, and the visit's diagnoses.
        drugs: 0/1, ``(visits, drugs)``: what is predicted.
        previous: 0/1, ``(visits, drugs)``: drugs of the visit before.
        patients: Patient of each visit, ``(visits,)``.
    """

    features: sparse.csr_array
    drugs: sparse.csr_array
    previous: sparse.csr_array
    patients: Array

    @classmethod
    def of(
        cls, examples: Examples, diagnosis_vocab_size: int, medication_vocab_size: int, num_special_tokens: int = 5
    ) -> AskedVisits:
        """The asked visits of patients.

        Args:
            examples: Rows of :func:`hf_ehr.visit_datasets.build_visit_examples` on medication recommendation:
                ``subject_id``, and for each visit, oldest first, ``diagnosis_ids``, ``medication_ids``, whether it is
                ``asked`` about, and ``label_ids``, its drugs (ids without special tokens).
            diagnosis_vocab_size: Ids of diagnoses, special tokens included.
            medication_vocab_size: Ids of medications, special tokens included.
            num_special_tokens: First ids of both, which are no codes and not read.

        Returns:
            The asked visits row by row; never the first of a row, which the models do not score either.

        Raises:
            ValueError: An id lies outside of its vocabulary, or the columns have other visits.
        """
        special = num_special_tokens
        diagnoses, visits = codes_of_visits(examples, "diagnosis_ids", diagnosis_vocab_size, special)
        drugs, *others = codes_of_visits(examples, "medication_ids", medication_vocab_size, special)
        targets, labelled = codes_of_visits(examples, "label_ids", medication_vocab_size - special, 0)
        flags = _one_chunk(arrow_column(examples, "asked"))
        others += [labelled, flags.value_lengths().to_numpy()]
        if not all(np.array_equal(visits, same) for same in others):
            raise ValueError(
                "`diagnosis_ids`, `medication_ids`, `asked` and `label_ids` must have the same visits, got others. "
                "Give an empty list where a visit has none."
            )
        row = np.repeat(np.arange(len(visits)), visits)
        number = np.arange(len(row)) - (np.cumsum(visits) - visits)[row]
        asked = np.flatnonzero((number > 0) & flags.flatten().to_numpy(zero_copy_only=False))
        earlier = _rows_before(asked, number[asked], len(row))
        history = (earlier @ sparse.hstack([diagnoses, drugs], format="csr") > 0).astype(np.float32)
        return cls(
            features=sparse.csr_array(sparse.hstack([history, diagnoses[asked]], format="csr")),
            drugs=targets[asked],
            previous=drugs[asked - 1],
            patients=arrow_column(examples, "subject_id").to_numpy()[row[asked]],
        )


def codes_of_visits(examples: Examples, name: str, size: int, special: int) -> tuple[sparse.csr_array, Array]:
    """Codes of all visits, 0/1 (visits, codes), and the number of visits of each row, (rows,).

    Args:
        examples: Rows with lists of ids for each visit.
        name: Their column.
        size: Ids of the vocabulary.
        special: First ids, which are no codes and not read.

    Raises:
        ValueError: An id lies outside of the vocabulary.
    """
    lists = _one_chunk(arrow_column(examples, name))
    sets = lists.flatten()
    ids, offsets = sets.flatten().to_numpy(), np.concatenate([[0], np.cumsum(sets.value_lengths().to_numpy())])
    if len(ids) and not (ids.min() >= 0 and ids.max() < size):
        raise ValueError(
            f"`{name}` must lie in [0, {size}), got [{ids.min()}, {ids.max()}]. Pass the sizes of the tokenizers that "
            "made the examples."
        )
    code = ids >= special
    kept = np.concatenate([[0], np.cumsum(code)])[offsets]
    values = np.ones(int(code.sum()), np.float32)
    matrix = sparse.csr_array((values, ids[code].astype(np.int64) - special, kept), shape=(len(sets), size - special))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix, lists.value_lengths().to_numpy()


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


def _rows_before(rows: Array, count: Array, total: int) -> sparse.csr_array:
    """0/1, ``(rows, total)``: for each row the ``count`` rows right before it."""
    ends = np.cumsum(count)
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count) + np.repeat(rows - count, count)
    return sparse.csr_array(
        (np.ones(len(place), np.float32), place, np.concatenate([[0], ends])), shape=(len(rows), total)
    )


def repeat_last_visit(
    train: AskedVisits, validation: AskedVisits, test: AskedVisits, *, seed: int = 0
) -> RecommendationPredictions:
    """The drugs of the visit before, with probability 1 ("Nearest")."""
    return RecommendationPredictions(*(split.previous.toarray().astype(np.float32) for split in (validation, test)))


def popularity(
    train: AskedVisits, validation: AskedVisits, test: AskedVisits, *, seed: int = 0
) -> RecommendationPredictions:
    """The share of training visits with a drug, for every visit alike."""
    share = _shares(train)
    return RecommendationPredictions(*(np.tile(share, (split.drugs.shape[0], 1)) for split in (validation, test)))


def logistic_regression(
    train: AskedVisits,
    validation: AskedVisits,
    test: AskedVisits,
    *,
    seed: int = 0,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> RecommendationPredictions:
    """One L2 logistic regression a drug. One that all or no training visits have is not fitted: 1 or 0 for everybody.

    Args:
        train: Fitted on.
        validation: ``C`` is chosen here, one for all drugs, by the mean average precision within visits.
        test: Predicted.
        seed: Not used: nothing here is random.
        inverse_penalties: Candidates for ``C``.

    Raises:
        ValueError: There is no training visit.
    """
    _check(train)
    others = sparse.vstack([validation.features, test.features], format="csr")
    x, cut = train.features.astype(np.float64), validation.drugs.shape[0]
    best: tuple[float, Array] | None = None
    with tqdm(total=len(inverse_penalties) * train.drugs.shape[1], desc="Fitting drugs", unit="drug") as progress:
        for c in inverse_penalties:
            scores = one_vs_rest_scores(x, others, train.drugs, RegressionSettings("l2", float(c)), progress.update)
            quality = round(map_within_notes(scores[:cut], validation.drugs), 12)
            if best is None or quality > best[0]:
                best = quality, scores
    if best is None:
        raise ValueError("`inverse_penalties` must hold a candidate, got none.")
    return RecommendationPredictions(best[1][:cut], best[1][cut:])


def lightgbm(
    train: AskedVisits, validation: AskedVisits, test: AskedVisits, *, seed: int = 0, max_labels: int = MAX_LABELS
) -> RecommendationPredictions:
    """LightGBM for each drug, with the settings of :func:`hf_ehr.baselines.lightgbm_counts`.

    A drug that all or no visits of training or validation have, or that is not among the ``max_labels`` most frequent
    ones, gets its share of the training visits.

    Raises:
        ImportError: LightGBM is not installed.
        ValueError: There is no training visit.
    """
    splits = (train, validation, test)
    rows = [as_examples(split.features) for split in splits]
    share = _shares(train)
    scores = [np.tile(share, (split.drugs.shape[0], 1)) for split in splits[1:]]
    count = [np.asarray(split.drugs.sum(axis=0)).ravel() for split in splits[:2]]
    mixed = [(n > 0) & (n < split.drugs.shape[0]) for n, split in zip(count, splits[:2], strict=True)]
    frequent = np.argsort(-count[0], kind="stable")
    chosen = frequent[(mixed[0] & mixed[1])[frequent]][:max_labels]
    for drug in tqdm(chosen.tolist(), desc="Fitting drugs", unit="drug"):
        labelled = [
            table.append_column("labels", pa.array(split.drugs[:, [drug]].toarray().ravel().astype(np.int64)))
            for table, split in zip(rows, splits, strict=True)
        ]
        found = lightgbm_counts(*labelled, vocab_size=train.features.shape[1], seed=seed)
        for table, values in zip(scores, found, strict=True):
            table[:, drug] = values
    return RecommendationPredictions(*scores)


def _shares(train: AskedVisits) -> Array:
    _check(train)
    return (np.asarray(train.drugs.sum(axis=0)).ravel() / train.drugs.shape[0]).astype(np.float32)


def _check(train: AskedVisits) -> None:
    if not train.drugs.shape[0]:
        raise ValueError("`train` must hold a visit that is asked about, got none. Patients need two visits.")


def as_examples(features: sparse.csr_array) -> pa.Table:
    """Rows of features as EXAMPLES of :mod:`hf_ehr.baselines`."""
    lists = pa.ListArray.from_arrays(pa.array(features.indptr, pa.int32()), pa.array(features.indices, pa.int32()))
    return pa.table({"input_ids": lists})


RECOMMENDATION_BASELINES: dict[str, Callable[..., RecommendationPredictions]] = {
    "Repeat last visit": repeat_last_visit,
    "Popularity": popularity,
    "L2 LR": logistic_regression,
    "LightGBM": lightgbm,
}
"""The baselines by their name in tables."""

__all__ = [
    "RECOMMENDATION_BASELINES",
    "AskedVisits",
    "RecommendationPredictions",
    "lightgbm",
    "logistic_regression",
    "popularity",
    "repeat_last_visit",
]
