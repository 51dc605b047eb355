"""Baselines: matrices against naive loops, PPMI by hand, tuning that never sees the test labels."""

import math
import sys
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_ehr.baselines import (
    BASELINES,
    age_sex_matrix,
    bag_of_codes_lr,
    count_matrix,
    index_leak_lr,
    lightgbm_counts,
    ppmi_matrix,
    ppmi_svd_embeddings,
    ppmi_svd_lr,
    prevalence,
    random_forest,
)
from hf_ehr.metrics import auroc

VOCAB = 40


def examples(histories, labels=None, age=None, sex=None, visit_ids=None):
    """EXAMPLES as an Arrow table; one visit per code unless ``visit_ids`` says otherwise."""
    n = len(histories)
    columns = {
        "subject_id": pa.array(range(n), pa.int64()),
        "input_ids": pa.array(histories, pa.list_(pa.int32())),
        "visit_ids": pa.array(visit_ids or [list(range(len(h))) for h in histories], pa.list_(pa.int32())),
        "length": pa.array([len(h) for h in histories], pa.int32()),
        "age": pa.array([60.0] * n if age is None else age, pa.float32()),
        "sex": pa.array([1] * n if sex is None else sex, pa.int8()),
        "labels": pa.array([0] * n if labels is None else labels, pa.int64()),
    }
    return pa.table(columns)


def cohort(n, seed):
    """Codes 5–9 raise the risk, 10–14 lower it, so do age and sex a little; the rest is noise."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(5, VOCAB, rng.integers(3, 12)).tolist() for _ in range(n)]
    age, sex = rng.uniform(30, 90, n).astype(np.float32), rng.integers(0, 3, n)
    risk = [sum((5 <= c < 10) - (10 <= c < 15) for c in h) for h in histories]
    logit = -1.5 + 1.5 * np.array(risk) + (age - 60) / 20 + (sex == 1)
    labels = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    age[rng.random(n) < 0.1] = np.nan
    return examples(histories, labels.tolist(), age, sex.tolist())


@pytest.fixture(scope="module")
def splits():
    return cohort(300, 0), cohort(200, 1), cohort(400, 2)


ALL = BASELINES | {"PPMI-SVD": partial(ppmi_svd_lr, embeddings=np.eye(VOCAB))}


def test_count_matrix_equals_a_loop_over_counters():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 20, rng.integers(0, 15)).tolist() for _ in range(50)]
    expected = np.zeros((50, 20))
    for row, history in enumerate(histories):
        for code, count in Counter(history).items():
            expected[row, code] = count
    counts = count_matrix(examples(histories), 20)
    np.testing.assert_array_equal(counts.toarray(), expected)
    np.testing.assert_array_equal(count_matrix(examples(histories), 20, binary=True).toarray(), expected > 0)
    assert counts.has_canonical_format
    assert counts.dtype == np.float32


def test_matrices_follow_slices_chunks_selections_and_shuffles():
    table = examples([[1, 2], [], [3, 3, 4], [5], [6, 1]], age=[40.0, 41, 42, 43, 44])
    rows = [3, 2, 0]
    expected = count_matrix(table, 8).toarray()[rows]
    dataset = datasets.Dataset(table).select([4, 3, 2, 0]).select([1, 2, 3])
    np.testing.assert_array_equal(count_matrix(dataset, 8).toarray(), expected)
    np.testing.assert_allclose(age_sex_matrix(dataset)[:, 0] * 20 + 50, [43, 42, 40])
    chunked = pa.concat_tables([table.slice(3, 1), table.slice(2, 1), table.slice(0, 1)])
    np.testing.assert_array_equal(count_matrix(chunked, 8).toarray(), expected)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"`input_ids` must lie in \[0, 5\), got \[1, 5\]"):
        count_matrix(examples([[1, 5]]), 5)


def test_unknown_age_and_sex_have_columns_of_their_own():
    table = examples([[1]] * 3, age=[70.0, float("nan"), 50.0], sex=[1, 2, 0])
    np.testing.assert_allclose(age_sex_matrix(table), [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("Prevalence", 0.5, 0.5),
        ("Age + sex LR", 0.55, 0.75),
        ("Index-leak LR", 0.5, 0.7),  # sees age
        ("Bag-of-codes LR", 0.72, 0.9),
        ("Random forest", 0.72, 0.9),
        ("LightGBM on counts", 0.72, 0.9),
        ("PPMI-SVD", 0.72, 0.9),
    ],
)
def test_a_baseline_finds_its_signal_repeats_itself_and_never_reads_the_test_labels(splits, name, low, high):
    train, validation, test = splits
    seen = ALL[name](train, validation, test, vocab_size=VOCAB, seed=3)
    blind = ALL[name](train, validation, test.drop_columns(["labels", "subject_id"]), vocab_size=VOCAB, seed=3)
    np.testing.assert_array_equal(seen.test, blind.test)
    np.testing.assert_array_equal(seen.validation, blind.validation)
    assert seen.validation.shape == (200,)
    assert seen.test.shape == (400,)
    assert 0 <= seen.test.min() <= seen.test.max() <= 1
    assert low <= auroc(test["labels"].to_numpy(), seen.test) <= high


def test_the_penalty_is_chosen_on_validation():
    train, validation, test = cohort(150, 4), cohort(200, 5), cohort(400, 6)
    # a validation split whose labels contradict the training split prefers the strongest shrinkage it is offered
    flipped = validation.set_column(
        validation.column_names.index("labels"), "labels", pa.array(1 - validation["labels"].to_numpy())
    )
    informed = bag_of_codes_lr(train, validation, test, vocab_size=VOCAB, seed=0).test
    misled = bag_of_codes_lr(train, flipped, test, vocab_size=VOCAB, seed=0).test
    assert auroc(test["labels"].to_numpy(), informed) > 0.75
    assert not np.allclose(informed, misled)


@pytest.mark.parametrize("baseline", [lightgbm_counts, random_forest])
def test_the_seed_decides_a_random_baseline_on_one_thread_and_on_many(splits, baseline, monkeypatch):
    few = [split.slice(0, 100) for split in splits]
    one, other = (baseline(*few, vocab_size=VOCAB, seed=seed).test for seed in (1, 2))
    monkeypatch.setattr("hf_ehr.baselines.ROWS_PER_THREAD_POOL", 0)
    np.testing.assert_array_equal(one, baseline(*few, vocab_size=VOCAB, seed=1).test)
    assert not np.array_equal(one, other)


def test_prevalence_is_that_of_the_training_split_and_empty_embeddings_know_nothing(splits):
    train, _, test = splits
    rate = train["labels"].to_numpy().mean()
    np.testing.assert_allclose(prevalence(*splits, vocab_size=VOCAB, seed=0).test, rate)
    blank = ppmi_svd_lr(*splits, vocab_size=VOCAB, seed=0, embeddings=np.zeros((VOCAB, 3))).test
    assert auroc(test["labels"].to_numpy(), blank) == 0.5


def test_the_index_leak_baseline_sees_the_number_of_visits_but_no_code():
    def leaky(n, seed):
        rng = np.random.default_rng(seed)
        visits = rng.integers(1, 7, n)
        histories = [[7] * 12 for _ in range(n)]
        visit_ids = [np.sort(np.arange(12) % v).tolist() for v in visits]
        return examples(histories, (visits >= 4).astype(int).tolist(), visit_ids=visit_ids)

    train, validation, test = leaky(200, 0), leaky(100, 1), leaky(200, 2)
    predicted = index_leak_lr(train, validation, test, vocab_size=VOCAB, seed=0).test
    assert auroc(test["labels"].to_numpy(), predicted) == 1
    # the same history under other codes gives the same prediction
    other = test.set_column(1, "input_ids", pa.array([[8] * 12] * 200, pa.list_(pa.int32())))
    np.testing.assert_array_equal(index_leak_lr(train, validation, other, vocab_size=VOCAB, seed=0).test, predicted)


def test_visits_are_counted_across_empty_rows_and_equal_neighbours():
    from hf_ehr.baselines import _history_matrix

    # the last visit of one row and the first of the next carry the same number
    table = examples([[1, 1], [], [1], [1, 1, 1], []], visit_ids=[[0, 1], [], [1], [1, 2, 2], []])
    np.testing.assert_allclose(np.expm1(_history_matrix(table)[:, 0]), [2, 0, 1, 2, 0])


def test_ppmi_of_three_patients_by_hand():
    # pairs: (0,1) twice, (0,2) once, repeats within a patient count once
    table = examples([[0, 1, 0], [1, 0], [2, 0], [3]])
    # #(0)=3, #(1)=2, #(2)=1, N=6: log 2·6/(3·2) = log 2, log 1·6/(3·1) = log 2; 1 and 2 never meet
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 0] = expected[0, 2] = expected[2, 0] = math.log(2)
    np.testing.assert_allclose(ppmi_matrix(table, 5).toarray(), expected, atol=1e-12)


def test_ppmi_keeps_only_pairs_seen_more_often_than_chance():
    # 0 is with everybody, 1 and 2 mostly with each other, 3 once with 1
    table = examples([[0, 1, 2]] * 8 + [[0, 3]] * 7 + [[0, 1, 3]])
    pmi = ppmi_matrix(table, 4).toarray()
    # #(0,1)=9, #(1)=9+8+1, #(0)=9+8+8, N=2·(9+8+8+8+1) from both triangles
    expected = math.log(9 * 68 / (25 * 18))
    assert pmi[0, 1] == pytest.approx(expected)
    assert pmi[1, 3] == 0  # 1·68 / (18·9) < 1
    np.testing.assert_array_equal(pmi, pmi.T)


def test_embeddings_place_codes_that_share_company_together_and_reproduce_the_matrix():
    rng = np.random.default_rng(0)
    histories = [rng.choice(np.arange(10) + 10 * (i % 2), 5, replace=False).tolist() for i in range(300)]
    table = examples(histories)
    embeddings = ppmi_svd_embeddings(table, 22, dim=3)
    assert embeddings.shape == (22, 3)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings[20:], 0)
    unit = embeddings[:20] / np.linalg.norm(embeddings[:20], axis=1, keepdims=True)
    similarity = unit @ unit.T
    same = np.equal.outer(np.arange(20) < 10, np.arange(20) < 10)
    assert similarity[same].min() > similarity[~same].max()
    # Σ of the SVD are the squared column norms of U √Σ
    singular = np.linalg.svd(ppmi_matrix(table, 22).toarray(), compute_uv=False)[:3]
    np.testing.assert_allclose((embeddings.astype(float) ** 2).sum(axis=0), singular, rtol=1e-5)
    np.testing.assert_array_equal(embeddings, ppmi_svd_embeddings(table, 22, dim=3))
    with pytest.raises(ValueError, match=r"`dim` must lie in \[1, 22\)"):
        ppmi_svd_embeddings(table, 22, dim=22)


def test_mean_embedding_averages_distinct_codes():
    # three copies of code 1 and one of code 2 weigh the same, so both classes look alike and nothing can be learnt
    table = examples([[1, 1, 1, 2], [1, 2, 2, 2]] * 20, [0, 1] * 20)
    predicted = ppmi_svd_lr(table, table, table, vocab_size=3, seed=0, embeddings=np.eye(3)).test
    np.testing.assert_allclose(predicted, 0.5, atol=1e-6)
    with pytest.raises(ValueError, match="`embeddings` must have 3 rows"):
        ppmi_svd_lr(table, table, table, vocab_size=3, seed=0, embeddings=np.eye(4))


def test_a_split_without_both_classes_is_refused_with_its_name(splits):
    train, validation, test = splits
    one_class = examples([[1]] * 5)
    with pytest.raises(ValueError, match="`validation` must hold both classes, got 5 rows with no positives"):
        bag_of_codes_lr(train, one_class, test, vocab_size=VOCAB, seed=0)
    with pytest.raises(ValueError, match="`labels` of `train` must be 0 or 1"):
        prevalence(examples([[1]], [2]), validation, test, vocab_size=VOCAB, seed=0)


def test_without_lightgbm_the_error_names_the_pip_line(splits, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers-ehr\[baselines\]'"):
        lightgbm_counts(*splits, vocab_size=VOCAB, seed=0)
