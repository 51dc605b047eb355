"""Baselines for coding notes: against scikit-learn, on planted words, and what no label may do to them (row 64)."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hf_ehr import evidence, note_baselines
from hf_ehr.multilabel import document_scores
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.note_baselines import (
    CodedTexts,
    bow_logistic_regression,
    frequency,
    string_match,
    tfidf_logistic_regression,
)
from hf_ehr.notes.labels import label_ids
from hf_ehr.sources.codiesp import read_codiesp

WORDS = ["anaemia", "fever", "stroke", "asthma", "fracture"]
NEVER, ALWAYS = 5, 6


def planted(notes: int, seed: int) -> CodedTexts:
    """Notes with the words of their labels among others; label 5 is on none of them, label 6 on all."""
    rng = np.random.default_rng(seed)
    labels = rng.random((notes, 5)) < np.array([0.5, 0.3, 0.3, 0.2, 0.2])
    texts = []
    for row in labels:
        own = [word for word, there in zip(WORDS, row, strict=True) if there]
        texts.append(" ".join(rng.permutation(own + [f"w{n}" for n in rng.integers(0, 60, 15)])))
    extra = np.column_stack([labels, np.zeros(notes, bool), np.ones(notes, bool)])
    return CodedTexts.of(texts, sparse.csr_array(extra), 7)


@pytest.fixture(scope="module")
def splits() -> tuple[CodedTexts, CodedTexts, CodedTexts]:
    return planted(150, 1), planted(60, 2), planted(60, 3)


def mean_average_precision(scores, split: CodedTexts) -> float:
    predictions = MultilabelPredictions(split.labels.shape[1])
    predictions.add(scores, split.labels)
    return document_scores(predictions)["map"]


LEARNERS = {
    "bow": bow_logistic_regression,
    "bow-l1": lambda *splits: bow_logistic_regression(*splits, penalty="l1"),
    "bow-l2": lambda *splits: bow_logistic_regression(*splits, penalty="l2"),
    "tfidf": tfidf_logistic_regression,
    "tfidf-balanced": lambda *splits: tfidf_logistic_regression(*splits, class_weight="balanced"),
    "frequency": frequency,
}
every_learner = pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())


# The data


def test_labels_may_be_a_matrix_lists_or_arrow_lists():
    lists = [[2, 0], [], [1]]
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    chunked = pa.chunked_array([pa.array(lists[:1]), pa.array(lists[1:], pa.list_(pa.int64()))])
    for labels in (lists, pa.array(lists), chunked, sparse.csr_matrix(np.array(expected) * 1.0)):
        assert CodedTexts.of(["a", "b", "c"], labels, 3).labels.toarray().tolist() == expected


def test_a_label_listed_twice_counts_once():
    assert CodedTexts.of(["a"], [[1, 1]], 2).labels.toarray().tolist() == [[0, 1]]


@pytest.mark.parametrize(("labels", "message"), [
    ([[3]], "Label ids"), ([[-1]], "Label ids"), ([[0], [1]], "a row for each of the 1 texts"),
    (sparse.csr_array(np.ones((1, 2))), "3 columns"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        CodedTexts.of(["a"], labels, 3)
    with pytest.raises(ValueError, match="0 and 1"):
        CodedTexts(["a"], sparse.csr_array([[2, 0]]))


# What all share


@every_learner
def test_scores_are_a_table_between_0_and_1_and_degenerate_labels_are_certain(learner, splits):
    predictions = learner(*splits)
    for scores, split in zip(predictions, splits[1:], strict=True):
        assert scores.dtype == np.float32
        assert scores.shape == (len(split.texts), 7)
        assert scores.min() >= 0
        assert scores.max() <= 1
        assert (scores[:, NEVER] == 0).all()
        assert (scores[:, ALWAYS] == 1).all()


@every_learner
def test_the_labels_of_the_test_notes_are_never_read(learner, splits):
    train, validation, test = splits
    hidden = CodedTexts(test.texts, sparse.csr_array(test.labels.shape, dtype=np.int8))
    for first, second in zip(learner(*splits), learner(train, validation, hidden), strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "frequency"])
def test_words_that_give_a_label_away_are_found(name, splits):
    floor = mean_average_precision(frequency(*splits).test, splits[2])
    assert mean_average_precision(LEARNERS[name](*splits).test, splits[2]) > max(0.95, floor + 0.1)


def test_frequency_is_the_training_share_for_everybody(splits):
    share = splits[0].labels.toarray().mean(axis=0)
    for scores in frequency(*splits):
        np.testing.assert_allclose(scores, np.broadcast_to(share, scores.shape), rtol=1e-6)


@every_learner
def test_splits_of_different_labels_or_no_training_notes_are_refused(learner, splits):
    train, validation, _ = splits
    with pytest.raises(ValueError, match="same labels"):
        learner(train, validation, CodedTexts.of(["a"], [[0]], 3))
    with pytest.raises(ValueError, match="must hold a note"):
        learner(CodedTexts.of([], [], 7), validation, validation)


# The fits, against scikit-learn one label at a time


@pytest.mark.parametrize("dense_gain", [0, 10**9], ids=["sparse", "reduced"])
@pytest.mark.parametrize("weight_budget", [1, 10**9], ids=["one-by-one", "all-at-once"])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_all_labels_at_once_equal_scikit_learn_label_by_label(
    splits, monkeypatch, dense_gain, weight_budget, class_weight
):
    monkeypatch.setattr(note_baselines, "DENSE_GAIN", dense_gain)
    monkeypatch.setattr(note_baselines, "WEIGHT_BUDGET", weight_budget)
    train, validation, test = splits
    options = {"class_weight": class_weight, "inverse_penalties": (3.0,)}
    scores = tfidf_logistic_regression(train, validation, test, **options).test
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w+\b")
    x, x_test = words.fit_transform(train.texts), words.transform(test.texts)
    for label in range(5):
        model = LogisticRegression(C=3.0, tol=1e-8, max_iter=5000, class_weight=class_weight)
        expected = model.fit(x, train.labels[:, [label]].toarray()[:, 0]).predict_proba(x_test)[:, 1]
        np.testing.assert_allclose(scores[:, label], expected, atol=2e-3)


def test_no_penalty_and_l1_are_what_they_say():
    """A word against a coin: ten notes with it of which eight have the label, ten without of which two have."""
    texts = ["fever"] * 10 + ["rash"] * 10
    train = CodedTexts.of(texts, [[0]] * 8 + [[]] * 2 + [[0]] * 2 + [[]] * 8, 1)
    free = bow_logistic_regression(train, train, train).test[[0, 10], 0]
    np.testing.assert_allclose(free, [0.8, 0.2], atol=1e-3)
    for penalty in ("l1", "l2"):
        options = {"penalty": penalty, "inverse_penalties": (0.01,)}
        np.testing.assert_allclose(bow_logistic_regression(train, train, train, **options).test[:, 0], 0.5, atol=0.03)
    # Both sides alike: logits ±d/2 at the price d. The slope is 10 (s - 0.8) + 1, with s the score of the upper side.
    lasso = bow_logistic_regression(train, train, train, penalty="l1", inverse_penalties=(1.0,)).test[[0, 10], 0]
    np.testing.assert_allclose(lasso, [0.7, 0.3], atol=1e-3)


def test_the_penalty_is_the_best_on_validation_and_of_equals_the_strongest(splits):
    train, validation, test = splits
    grid = (1e-4, 1.0, 100.0)
    each = {c: tfidf_logistic_regression(*splits, inverse_penalties=(c,)) for c in grid}
    reached = {c: round(mean_average_precision(each[c].validation, validation), 12) for c in grid}
    chosen = max(grid, key=lambda c: reached[c])
    assert np.array_equal(tfidf_logistic_regression(*splits, inverse_penalties=grid).test, each[chosen].test)
    nothing = CodedTexts(validation.texts, sparse.csr_array(validation.labels.shape, dtype=np.int8))
    kept = tfidf_logistic_regression(train, nothing, test, inverse_penalties=grid)
    assert np.array_equal(kept.test, each[grid[0]].test)
    with pytest.raises(ValueError, match="inverse_penalties"):
        tfidf_logistic_regression(*splits, inverse_penalties=())


def test_only_the_most_frequent_words_are_counted(splits):
    few = bow_logistic_regression(*splits, max_features=3).test
    assert mean_average_precision(few, splits[2]) < mean_average_precision(
        bow_logistic_regression(*splits).test, splits[2]
    )


# Descriptions


TEXTS = ["Acute renal failure, and fever.", "Renal disease. Later: acute failure", "", "FEVER of unknown origin"]
NAMES = ["Acute renal failure", "Fever, unspecified", None, "the of", "Chronic kidney disease"]


@pytest.mark.parametrize("min_share", [0.3, 0.5, 1.0])
def test_string_match_is_that_of_evidence_for_every_pair(min_share):
    scores = string_match(TEXTS, NAMES, min_share=min_share)
    for row, text in enumerate(TEXTS):
        for column, name in enumerate(NAMES):
            spans = evidence.string_match(text, name or "", min_share=min_share, k=1)
            assert scores[row, column] == pytest.approx(spans[0].weight if spans else 0), (text, name)


def test_string_match_by_hand():
    scores = string_match(TEXTS, NAMES)
    expected = [[1, 1, 0, 0, 0], [2 / 3, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert not string_match(TEXTS, [None, ""]).any()


# Real notes


def test_words_beat_frequency_on_real_case_reports(real_data):
    (archive,) = real_data("codiesp").glob("*.tar.xz")
    train, dev = read_codiesp(archive, "train"), read_codiesp(archive, "dev")
    counts = pc.value_counts(train.labels["code"])
    codes = [row["values"] for row in counts.to_pylist() if row["counts"] >= 25]
    parts = [
        CodedTexts.of(notes["text"].to_pylist(), label_ids(notes, labels, codes), len(codes))
        for notes, labels in (
            (train.notes[:350], train.labels), (train.notes[350:], train.labels), (dev.notes, dev.labels)
        )
    ]  # fmt: skip
    words = mean_average_precision(tfidf_logistic_regression(*parts).test, parts[2])
    assert words > mean_average_precision(frequency(*parts).test, parts[2]) + 0.1
