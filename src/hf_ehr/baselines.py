"""Baselines without a neural network: the rows that every table carries beside a model.

Each is ``fit_predict(train, validation, test, *, vocab_size, seed) -> Predictions`` over EXAMPLES with 0/1 ``labels``.
It is fitted on ``train``, its few settings are chosen by AUROC on ``validation``, and ``test`` is only predicted: its
labels are never read. Matrices come from flat Arrow buffers, without a loop over patients or codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr._scores import Array
from hf_ehr.metrics import auroc, undefined_reason

if TYPE_CHECKING:
    import datasets
    import scipy.sparse as sp

    Examples: TypeAlias = datasets.Dataset | pa.Table

INVERSE_PENALTIES = tuple(float(10.0**exponent) for exponent in np.arange(-4, 1.5, 0.5))
"""Candidates for scikit-learn's ``C``, strongest penalty first: of equally good ones the simplest model wins."""

MIN_SAMPLES_LEAF = (1, 3, 10)
LIGHTGBM_SETTINGS = tuple({"num_leaves": leaves, "min_data_in_leaf": rows} for leaves in (7, 31) for rows in (5, 20))
LIGHTGBM_ROUNDS = 500
LIGHTGBM_PATIENCE = 50
ROWS_PER_THREAD_POOL = 10_000
"""Below this many training rows trees get one thread: the rest would spend their time waiting for each other."""


class Predictions(NamedTuple):
    """Probability of the positive class, ``(n,)`` float64 for each split, in the order of its rows."""

    validation: Array
    test: Array


def count_matrix(dataset: Examples, vocab_size: int, *, binary: bool = False) -> sp.csr_matrix:
    """How often each code occurs in each example.

    Args:
        dataset: EXAMPLES; ``input_ids`` is read.
        vocab_size: Number of columns.
        binary: Whether to hold 1 for every code that occurs (multi-hot) instead of its count.

    Returns:
        ``(examples, vocab_size)`` float32 in canonical CSR form.

    Raises:
        ValueError: An id lies outside the vocabulary.
    """
    import scipy.sparse as sp

    ids, offsets = _ragged(dataset, "input_ids")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"`input_ids` must lie in [0, {vocab_size}), got [{ids.min()}, {ids.max()}]. "
            "Pass the size of the tokenizer that made the examples as `vocab_size`."
        )
    # A copy: summing duplicates sorts in place, and the ids are the dataset's own read-only buffer.
    ones, shape = np.ones(len(ids), np.float32), (len(offsets) - 1, vocab_size)
    counts = sp.csr_matrix((ones, ids.copy(), offsets), shape=shape)
    counts.sum_duplicates()
    if binary:
        counts.data[:] = 1
    return counts


def age_sex_matrix(dataset: Examples) -> Array:
    """Age (centred at 50, in units of 20 years), age unknown, female, male: ``(examples, 4)`` float64."""
    sex = _column(dataset, "sex")
    return np.column_stack([_age(dataset), sex == 1, sex == 2])


def prevalence(train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int) -> Predictions:
    """The training prevalence for everybody."""
    rate = float(labels_to_fit(train, "train").mean())
    return Predictions(np.full(validation.num_rows, rate), np.full(test.num_rows, rate))


def age_sex_lr(train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int) -> Predictions:
    """L2 logistic regression on age and sex."""
    return _logistic(train, validation, test, age_sex_matrix)


def bag_of_codes_lr(
    train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int
) -> Predictions:
    """L2 logistic regression on the multi-hot of codes (the L2-LR of Med-BERT, here with a tuned penalty)."""
    return _logistic(train, validation, test, lambda split: count_matrix(split, vocab_size, binary=True))


def index_leak_lr(train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int) -> Predictions:
    """L2 logistic regression on number of visits, history length and age, and on nothing that was diagnosed.

    Well above .5 it says that cases and controls were indexed differently: a model can then score by recognising the
    end of a record.
    """
    return _logistic(train, validation, test, _history_matrix)


def random_forest(train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int) -> Predictions:
    """Random forest of 300 trees on the multi-hot of codes; the smallest leaf is tuned.

    Raises:
        ValueError: A split lacks a class.
    """
    from sklearn.ensemble import RandomForestClassifier

    splits = _splits(train, validation, test, lambda split: count_matrix(split, vocab_size, binary=True))
    threads = 1 if len(splits.y) < ROWS_PER_THREAD_POOL else -1  # -1: all cores
    models = (
        RandomForestClassifier(n_estimators=300, min_samples_leaf=leaf, random_state=seed, n_jobs=threads)
        .fit(splits.x, splits.y)
        .set_params(n_jobs=1)  # several threads would add the votes in another order each time
        for leaf in MIN_SAMPLES_LEAF
    )
    return best_on_validation(splits, map(positive_probability, models))


def lightgbm_counts(
    train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int
) -> Predictions:
    """LightGBM on counts of codes; number of trees by early stopping, leaves and their size from four settings.

    Raises:
        ImportError: LightGBM is not installed.
        ValueError: A split lacks a class.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError(
            "`lightgbm_counts` needs LightGBM. Do `pip install 'transformers-ehr[baselines]'`."
        ) from error
    splits = _splits(train, validation, test, lambda split: count_matrix(split, vocab_size))
    fixed = {"objective": "binary", "metric": "auc", "learning_rate": 0.05, "seed": seed, "verbosity": -1}
    # Many rare codes, few rows: trees on random thirds of the codes did better than on all of them.
    fixed |= {"feature_fraction": 0.3, "deterministic": True, "force_col_wise": True}
    fixed["num_threads"] = 1 if len(splits.y) < ROWS_PER_THREAD_POOL else 0  # 0: all cores

    def fit(setting: dict[str, int]) -> Callable[[Any], Array]:
        held_out = lightgbm.Dataset(splits.x_validation, splits.y_validation)
        model = lightgbm.train(
            fixed | setting,
            lightgbm.Dataset(splits.x, splits.y),
            LIGHTGBM_ROUNDS,
            valid_sets=[held_out],
            callbacks=[lightgbm.early_stopping(LIGHTGBM_PATIENCE, verbose=False)],
        )
        return lambda x: np.asarray(model.predict(x))

    return best_on_validation(splits, map(fit, LIGHTGBM_SETTINGS))


def ppmi_svd_lr(
    train: Examples, validation: Examples, test: Examples, *, vocab_size: int, seed: int, embeddings: Array
) -> Predictions:
    """L2 logistic regression on the mean embedding of an example's distinct codes.

    Args:
        train: EXAMPLES to fit on.
        validation: EXAMPLES to tune the penalty on.
        test: EXAMPLES to predict.
        vocab_size: Number of rows of ``embeddings``.
        seed: Not used: nothing here is random.
        embeddings: ``(vocab_size, dim)``, e.g. of ``ppmi_svd_embeddings`` on unlabelled training patients.

    Raises:
        ValueError: The table has another number of rows, or a split lacks a class.
    """
    if len(embeddings) != vocab_size:
        raise ValueError(f"`embeddings` must have {vocab_size} rows, one a code, got {len(embeddings)}.")

    def mean_embedding(split: Examples) -> Array:
        codes = count_matrix(split, vocab_size, binary=True)
        return np.asarray(codes @ embeddings / np.maximum(codes.sum(axis=1), 1), dtype=np.float64)

    return _logistic(train, validation, test, mean_embedding)


def ppmi_matrix(dataset: Examples, vocab_size: int) -> sp.csr_matrix:
    """Positive pointwise mutual information of codes within one example.

    With #(i, j) examples that hold both codes (i ≠ j), #(i) = Σ_j #(i, j) and N = Σ_ij #(i, j):
    max(0, log #(i, j) N / (#(i) #(j))) (Levy & Goldberg 2014, eq. 9).

    Returns:
        ``(vocab_size, vocab_size)`` float64, symmetric, zero diagonal.
    """
    codes = count_matrix(dataset, vocab_size, binary=True)
    return positive_pmi(codes.T @ codes)


def positive_pmi(together: sp.csr_matrix) -> sp.csr_matrix:
    """:func:`ppmi_matrix` of the counts ``together``, (codes, codes) and symmetric; their diagonal is not read."""
    import scipy.sparse as sp

    pairs = together.tocoo()
    off_diagonal = pairs.row != pairs.col
    row, column, count = pairs.row[off_diagonal], pairs.col[off_diagonal], pairs.data[off_diagonal].astype(np.float64)
    occurrences = np.bincount(row, count, pairs.shape[0])
    information = np.log(count * count.sum()) - np.log(occurrences[row] * occurrences[column])
    positive = information > 0
    return sp.csr_matrix((information[positive], (row[positive], column[positive])), shape=pairs.shape)


def ppmi_svd_embeddings(dataset: Examples, vocab_size: int, dim: int = 60, seed: int = 0) -> Array:
    """Static code embeddings: U √Σ of the truncated SVD of the PPMI matrix (Levy, Goldberg & Dagan 2015, eq. 6).

    Args:
        dataset: EXAMPLES of unlabelled training patients, one a patient.
        vocab_size: Number of codes.
        dim: Size of an embedding.
        seed: Of the SVD's start vector.

    Returns:
        ``(vocab_size, dim)`` float32; zeros for codes that never meet another one.

    Raises:
        ValueError: ``dim`` is not below ``vocab_size``.
    """
    return truncated_svd(ppmi_matrix(dataset, vocab_size), dim, seed)


def truncated_svd(matrix: sp.csr_matrix, dim: int, seed: int) -> Array:
    """U √Σ of the ``dim`` largest singular values of a square matrix, (rows, dim) float32.

    Raises:
        ValueError: ``dim`` is not below the number of rows.
    """
    from scipy.sparse.linalg import svds

    size = matrix.shape[0]
    if not 0 < dim < size:
        raise ValueError(f"`dim` must lie in [1, {size}), below the size of the vocabulary, got {dim}.")
    if not matrix.nnz:
        return np.zeros((size, dim), np.float32)  # ARPACK takes no matrix of zeros
    left, singular, _ = svds(matrix, k=dim, v0=np.random.default_rng(seed).uniform(0.5, 1, size))
    order = np.argsort(-singular)
    left, singular = left[:, order], singular[order]
    # An SVD leaves the sign of each direction open: the largest entry is made positive.
    left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(dim)])
    left[np.diff(matrix.indptr) == 0] = 0  # else the rounding error of a code that meets no other
    return np.asarray(left * np.sqrt(singular), dtype=np.float32)


BASELINES: dict[str, Callable[..., Predictions]] = {
    "Prevalence": prevalence,
    "Age + sex LR": age_sex_lr,
    "Index-leak LR": index_leak_lr,
    "Bag-of-codes LR": bag_of_codes_lr,
    "Random forest": random_forest,
    "LightGBM on counts": lightgbm_counts,
}
"""The baselines that need nothing but EXAMPLES, by their name in tables; ``ppmi_svd_lr`` also takes ``embeddings``."""


class FeatureSplits(NamedTuple):
    """Features and labels of the three splits; the test split has no labels here."""

    x: Any
    y: Array
    x_validation: Any
    y_validation: Array
    x_test: Any


def _splits(
    train: Examples, validation: Examples, test: Examples, features: Callable[[Examples], Any]
) -> FeatureSplits:
    return FeatureSplits(
        features(train),
        labels_to_fit(train, "train"),
        features(validation),
        labels_to_fit(validation, "validation"),
        features(test),
    )


def _logistic(
    train: Examples, validation: Examples, test: Examples, features: Callable[[Examples], Any]
) -> Predictions:
    """L2 logistic regression with the penalty of the highest validation AUROC; dense features are standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    splits = _splits(train, validation, test, features)
    scaling = [StandardScaler()] if isinstance(splits.x, np.ndarray) else []
    models = (
        make_pipeline(*scaling, LogisticRegression(C=penalty, max_iter=5000)).fit(splits.x, splits.y)
        for penalty in INVERSE_PENALTIES
    )
    return best_on_validation(splits, map(positive_probability, models))


def best_on_validation(splits: FeatureSplits, models: Iterable[Callable[[Any], Array]]) -> Predictions:
    """Predictions of the candidate with the highest validation AUROC, the first of equals."""
    candidates = [(model, model(splits.x_validation)) for model in models]
    best, on_validation = max(candidates, key=lambda candidate: round(auroc(splits.y_validation, candidate[1]), 12))
    return Predictions(on_validation, best(splits.x_test))


def positive_probability(classifier: Any) -> Callable[[Any], Array]:
    """What a fitted classifier of scikit-learn's kind gives rows of features: the probability of yes."""
    return lambda x: classifier.predict_proba(x)[:, 1]


def labels_to_fit(dataset: Examples, split: str) -> Array:
    """Labels of a split that something is fitted or tuned on.

    Raises:
        ValueError: They are not 0/1, or a class is absent.
    """
    labels = _column(dataset, "labels")
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"`labels` of `{split}` must be 0 or 1. These baselines are for binary tasks.")
    if reason := undefined_reason(labels):
        raise ValueError(f"`{split}` must hold both classes, got {len(labels)} rows with {reason}. Enlarge the split.")
    return labels.astype(np.int64)


def _history_matrix(dataset: Examples) -> Array:
    """log(1 + visits), log(1 + codes), age, age unknown: ``(examples, 4)``."""
    visit_ids, offsets = _ragged(dataset, "visit_ids")
    starts = np.ones(len(visit_ids), dtype=np.int64)
    starts[1:] = visit_ids[1:] != visit_ids[:-1]
    starts[offsets[:-1][offsets[:-1] < len(visit_ids)]] = 1
    before = np.concatenate([[0], np.cumsum(starts)])
    visits = before[offsets[1:]] - before[offsets[:-1]]
    return np.column_stack([np.log1p(visits), np.log1p(_column(dataset, "length")), _age(dataset)])


def _age(dataset: Examples) -> Array:
    """Age (centred at 50, in units of 20 years, 0 where unknown) and a flag for unknown, ``(examples, 2)``."""
    age = _column(dataset, "age").astype(np.float64)
    unknown = np.isnan(age)
    return np.column_stack([np.where(unknown, 0.0, (age - 50) / 20), unknown])


def arrow_column(dataset: Examples, name: str) -> pa.ChunkedArray:
    """One column as Arrow, in the order of the rows (a ``Dataset`` may be a selection of its table)."""
    if isinstance(dataset, pa.Table):
        return dataset[name]
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def _column(dataset: Examples, name: str) -> Array:
    column = arrow_column(dataset, name)
    return np.asarray(column.to_numpy())


def _ragged(dataset: Examples, name: str) -> tuple[Array, Array]:
    """A list column as flat values and bounds ``(examples + 1,)``; a null list is empty."""
    lists = arrow_column(dataset, name)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return pc.list_flatten(lists).to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
