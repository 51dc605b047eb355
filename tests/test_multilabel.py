"""Metrics of code assignment against scikit-learn, against numbers by hand, and against their known traps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn import metrics as sk

from hf_ehr.code_thresholds import (
    routing_scores,
    threshold_for,
    tune_auto_code,
    tune_thresholds,
)
from hf_ehr.intervals import crossed_bootstrap
from hf_ehr.metrics import best_f1_threshold, multilabel_metrics
from hf_ehr.models.code_decisions import DECISIONS, NEVER, decide
from hf_ehr.multilabel import (
    assignment_scores,
    document_precision,
    document_scores,
    hierarchical_scores,
    label_scores,
    macro_scores,
    micro_scores,
    multilabel_scores,
    precision_at_k,
    trainer_code_metrics,
)
from hf_ehr.multilabel_intervals import figures_of, multilabel_intervals
from hf_ehr.multilabel_predictions import MultilabelPredictions, compressed, decompressed

# Three documents, four labels; the last label never occurs.
SCORES = np.array([[0.9, 0.8, 0.3, 0.1], [0.7, 0.2, 0.6, 0.4], [0.1, 0.6, 0.4, 0.2]])
TARGETS = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]])


def held(scores, targets, *, compact=False, batch=None):
    predictions = MultilabelPredictions(np.shape(scores)[1], compact=compact)
    for start in range(0, len(scores), batch or max(len(scores), 1)):
        rows = slice(start, start + (batch or len(scores)))
        predictions.add(scores[rows], targets[rows])
    return predictions


def drawn(seed=0, documents=60, labels=12, levels=None, dtype=np.float32):
    """Scores that know something of the targets, labels from common to absent; few levels make ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(documents, labels)) - np.linspace(0, 5, labels)
    targets = (rng.random((documents, labels)) < 1 / (1 + np.exp(-logits))).astype(int)
    scores = 1 / (1 + np.exp(-(logits + rng.normal(size=logits.shape))))
    return (scores if levels is None else np.round(scores * levels) / levels).astype(dtype), targets


@st.composite
def scored_documents(draw):
    levels = draw(st.sampled_from([None, 2, 7]))
    return drawn(draw(st.integers(0, 10_000)), draw(st.integers(1, 40)), draw(st.integers(1, 9)), levels)


@settings(max_examples=60, deadline=None)
@given(scored_documents(), st.integers(1, 15))
def test_figures_equal_scikit_learn_however_the_batches_fall(data, batch):
    scores, targets = data
    predictions = held(scores, targets, batch=batch)
    if 0 < targets.sum() < targets.size:
        micro = micro_scores(predictions)
        assert micro["auroc_micro"] == pytest.approx(sk.roc_auc_score(targets.ravel(), scores.ravel()), abs=1e-9)
        expected = sk.average_precision_score(targets.ravel(), scores.ravel())
        assert micro["average_precision_micro"] == pytest.approx(expected, abs=1e-9)
    labels = label_scores(predictions, 0.5)
    for label in range(targets.shape[1]):
        y, p = targets[:, label], scores[:, label]
        assert labels.evaluated[label] == (0 < y.sum() < len(y))
        if labels.evaluated[label]:
            assert labels.auroc[label] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-9)
            assert labels.average_precision[label] == pytest.approx(sk.average_precision_score(y, p), abs=1e-9)
            assert labels.f1[label] == pytest.approx(sk.f1_score(y, p >= 0.5), abs=1e-9)
    flagged = scores >= 0.5
    macro, assigned = macro_scores(labels), assignment_scores(predictions.confusion(0.5)[1])
    if targets.any() or flagged.any():
        expected = sk.f1_score(targets.ravel(), flagged.ravel(), zero_division=0)
        assert macro["f1_micro"] == pytest.approx(expected, abs=1e-9)
    assert assigned["exact_match"] == pytest.approx((targets == flagged).all(axis=1).mean(), abs=1e-9)
    if targets.shape[1] > 1:
        expected = sk.f1_score(targets, flagged, average="samples", zero_division=1)
        assert assigned["f1_samples"] == pytest.approx(expected, abs=1e-9)
        expected = sk.jaccard_score(targets, flagged, average="samples", zero_division=1)
        assert assigned["jaccard_samples"] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(scored_documents(), st.integers(1, 15))
def test_ranking_within_documents_equals_scikit_learn_and_brute_force(data, batch):
    scores, targets = data
    predictions = held(scores, targets, batch=batch)
    precision = document_precision(predictions.cells, len(targets))
    at_3 = precision_at_k(predictions.cells, len(targets), 3)
    rng = np.random.default_rng(0)
    for document, (y, p) in enumerate(zip(targets, scores, strict=True)):
        if not y.any():
            assert math.isnan(precision[document])
            assert at_3[document] == 0
            continue
        assert precision[document] == pytest.approx(sk.average_precision_score(y, p), abs=1e-9)
        # Ties in random order: the mean over many shuffles.
        orders = [np.lexsort((rng.random(len(p)), -p))[:3] for _ in range(400)]
        assert at_3[document] == pytest.approx(np.mean([y[order].sum() / 3 for order in orders]), abs=0.12)


def test_every_figure_of_a_small_example_by_hand():
    found = multilabel_scores(held(SCORES, TARGETS), thresholds=0.5, ks=(1, 2))
    # flagged: A B | A C | B; hits: A | A | B
    assert found["f1_micro"] == pytest.approx(2 * 3 / (5 + 5))
    # F1 of A 1, of B 2/3, of C 0 (D does not occur); CAML takes P = (1 + 1/2 + 0 + 0)/4, R = (1 + 1 + 0 + 0)/4
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3) / 3)
    assert found["f1_macro_caml"] == pytest.approx(2 * 0.375 * 0.5 / 0.875)
    # best label of each: A hit, A hit, B hit; best two: A B, A C, B C
    assert found["precision_at_1"] == 1
    assert found["precision_at_2"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert found["recall_at_2"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["r_precision"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 + 1) / 3)
    assert found["exact_match"] == 0
    assert found["jaccard_samples"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    # A ranks its documents .9 .7 | .1, B .6 against .8 and .2, C .3 and .4 against .6
    assert found["auroc_macro"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["labels_dropped"] == 1
    assert found["documents"] == 3


def test_small_sets_agree_with_the_metrics_of_any_multi_label_task():
    scores, targets = drawn(3)
    expected = multilabel_metrics(targets, scores, threshold=0.4)
    found = multilabel_scores(held(scores, targets), thresholds=0.4)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_targets_may_be_sparse_or_dense_and_scores_of_any_float():
    scores, targets = drawn(1, dtype=np.float16)
    expected = multilabel_scores(held(scores, targets), thresholds=0.5)
    for form in (sparse.csr_matrix, sparse.coo_array, lambda dense: dense.astype(bool), lambda dense: dense * 1.0):
        assert multilabel_scores(held(scores, form(targets)), thresholds=0.5) == expected
    assert multilabel_scores(held(scores.astype(np.float64), targets), thresholds=0.5) == expected


def test_a_constant_ranking_earns_no_precision_from_the_order_of_the_labels():
    targets = np.zeros((10, 20), int)
    targets[:, :4] = 1  # the commonest labels stand first, as in most vocabularies
    found = document_scores(held(np.full((10, 20), 0.3), targets), ks=(5,))
    assert found["precision_at_5"] == pytest.approx(4 / 20)
    assert found["r_precision"] == pytest.approx(4 / 20)
    assert found["map"] == pytest.approx(4 / 20)


def test_documents_and_labels_without_codes_are_counted_and_change_no_mean():
    scores, targets = drawn(2)
    before = multilabel_scores(held(scores, targets))
    empty = multilabel_scores(held(np.r_[scores, scores[:5]], np.r_[targets, 0 * targets[:5]]))
    uncoded = before["documents_without_codes"] + 5
    assert (empty["documents_without_codes"], empty["map"]) == (uncoded, before["map"])
    assert empty["recall_at_5"] == before["recall_at_5"]
    assert empty["r_precision"] == before["r_precision"]
    assert empty["precision_at_5"] == pytest.approx(before["precision_at_5"] * 60 / 65)
    absent = multilabel_scores(held(np.c_[scores, scores[:, :2]], np.c_[targets, 0 * targets[:, :2]]))
    assert absent["auroc_macro"] == before["auroc_macro"]
    assert absent["labels_dropped"] == before["labels_dropped"] + 2


def test_no_code_at_all_is_nan_and_no_document_is_refused():
    scores, targets = drawn(2)
    found = multilabel_scores(held(scores, 0 * targets), thresholds=0.5)
    assert all(math.isnan(found[name]) for name in ("auroc_micro", "auroc_macro", "map", "f1_macro", "r_precision"))
    assert found["precision_at_5"] == 0
    with pytest.raises(ValueError, match="must hold a document"):
        multilabel_scores(MultilabelPredictions(3))
    with pytest.raises(ValueError, match="larger validation split"):
        tune_thresholds(held(scores, 0 * targets))


def test_before_the_first_batch_there_are_no_cells():
    empty = MultilabelPredictions(3)
    assert [len(part) for part in empty.cells] == [0, 0, 0, 0]
    assert empty.targets().shape == empty.dense().shape == (0, 3)


def test_one_label_is_enough():
    scores, targets = np.array([[0.9], [0.2], [0.4]]), np.array([[1], [0], [1]])
    found = multilabel_scores(held(scores, targets), thresholds=0.3)
    assert (found["auroc_macro"], found["f1_micro"], found["map"], found["r_precision"]) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.full((2, 3), 0.5), np.zeros((2, 4)), r"\(documents, 3\), got \(2, 3\) and \(2, 4\)"),
        (np.full((2, 4), 0.5), np.zeros((2, 4)), r"\(documents, 3\), got \(2, 4\)"),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), "finite.*sigmoid"),
        (np.full((2, 3), 1.5), np.zeros((2, 3)), "sigmoid"),
        (np.full((2, 3), 0.5), np.full((2, 3), 2), "0 and 1 only, got 2"),
        (np.full((2, 3), 0.5), sparse.csr_array(np.full((2, 3), -1)), "0 and 1 only, got -1"),
    ],
    ids=["targets of another shape", "scores of another shape", "nan", "logits", "counts", "sparse counts"],
)
def test_malformed_batches_are_refused(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        MultilabelPredictions(3).add(scores, targets)


# Compact


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30))
def test_compact_codes_keep_the_order_and_lie_close_below(values):
    scores = np.sort(np.array(values, np.float32))
    codes = compressed(scores)
    assert (np.diff(codes.astype(int)) >= 0).all()
    floor = decompressed(codes)
    assert (floor <= scores).all()
    # Below the smallest normal number the step is absolute.
    assert (scores - floor <= np.minimum(scores, 1 - scores) / 256 + 2.0**-133).all()
    assert (compressed(floor) == codes).all()


def test_compact_ends_and_one_half_are_exact():
    ends = np.array([0, 0.5, 1], np.float32)
    assert (decompressed(compressed(ends)) == ends).all()
    assert compressed(np.float32(0.5)) > compressed(np.nextafter(np.float32(0.5), np.float32(0)))


@pytest.mark.parametrize("seed", range(5))
def test_compact_figures_stay_within_their_stated_bounds(seed):
    scores, targets = drawn(seed, documents=400, labels=30)
    scores = (0.4 + scores / 50).astype(np.float32)  # crowded: many share a code
    exact, compact = held(scores, targets), held(scores, targets, compact=True, batch=64)
    wanted, found = multilabel_scores(exact, thresholds=0.5), multilabel_scores(compact, thresholds=0.5)
    for name in ("auroc_micro", "average_precision_micro", "auroc_macro", "average_precision_macro"):
        error, bound = abs(found[name] - wanted[name]), found[f"{name}_error_bound"]
        assert 0 < error <= bound < 0.2
    same = set(wanted) - {name for name in wanted if "auroc" in name or "average_precision" in name}
    assert len(same) >= 15
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}


def test_decisions_at_thresholds_tuned_on_compact_predictions_are_those_of_the_scores():
    scores, targets = drawn(5, documents=300)
    compact = held(scores, targets, compact=True)
    for threshold in (tune_thresholds(compact).common, tune_thresholds(compact).per_label, 0.5, NEVER):
        flagged = np.concatenate([part for _, part in compact.flagged(threshold)])
        assert (flagged == (scores >= threshold)).all()


def test_compact_predictions_of_many_labels_take_two_bytes_a_score():
    rng = np.random.default_rng(0)
    predictions = MultilabelPredictions(9000, compact=True)
    for _ in range(3):
        predictions.add(rng.random((32, 9000), np.float32), sparse.random_array((32, 9000), density=1e-3) > 0)
    assert sum(chunk.nbytes for chunk in predictions._chunks) == 96 * 9000 * 2
    assert sum(array.nbytes for array in predictions.cells) < 96 * 9000 * 2 / 20


# Groups and hierarchy


def test_a_wrong_sibling_counts_below_its_ancestor_by_hand():
    # A0 A1 A2 below A, B0 below B. Document 1: true A0 A1, predicted A2 (a sibling); 2: true B0, predicted A0.
    targets = np.array([[1, 1, 0, 0], [0, 0, 0, 1]])
    flagged = np.array([[0, 0, 1, 0], [1, 0, 0, 0]])
    found = hierarchical_scores(held(flagged * 1.0, targets), [["A"], ["A"], ["A"], ["B"]], 0.5)
    # counts: document 1 A min(1, 2) = 1 of 1 claimed and 2 true; document 2 A 0 of 1, B 0 of 0 claimed and 1 true
    assert found["precision_counts"] == pytest.approx(1 / 2)
    assert found["recall_counts"] == pytest.approx(1 / 3)
    assert found["f1_counts"] == pytest.approx(2 / 5)
    # sets: document 1 A; document 2 A claimed, B true
    assert (found["precision_sets"], found["recall_sets"], found["f1_sets"]) == (0.5, 0.5, 0.5)
    assert macro_scores(label_scores(held(flagged * 1.0, targets), 0.5))["f1_micro"] == 0


def test_with_each_label_its_own_ancestor_the_hierarchy_is_flat():
    scores, targets = drawn(6)
    predictions = held(scores, targets, batch=7)
    found = hierarchical_scores(predictions, [[str(label)] for label in range(12)], 0.3)
    flat = macro_scores(label_scores(predictions, 0.3))["f1_micro"]
    assert found["f1_counts"] == found["f1_sets"] == pytest.approx(flat)


# Thresholds


def test_the_common_threshold_has_the_best_micro_f1_of_all():
    scores, targets = drawn(7)
    tuned = tune_thresholds(held(scores, targets), min_positives=20)
    assert tuned.common == best_f1_threshold(targets.ravel(), scores.ravel())
    best = max(sk.f1_score(targets.ravel(), scores.ravel() >= cut) for cut in np.unique(scores))
    assert sk.f1_score(targets.ravel(), scores.ravel() >= tuned.common) == best


def test_labels_with_few_positives_fall_back_to_the_common_threshold():
    scores, targets = drawn(8)
    enough = int(np.sort(targets.sum(axis=0))[8])  # what one label just has
    tuned = tune_thresholds(held(scores, targets), min_positives=enough)
    assert (tuned.tuned == (targets.sum(axis=0) >= enough)).all()
    assert 0 < tuned.tuned.sum() < 12
    assert (tuned.per_label[~tuned.tuned] == tuned.common).all()
    for label in np.flatnonzero(tuned.tuned):
        assert tuned.per_label[label] == best_f1_threshold(targets[:, label], scores[:, label])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("label", [None, 1])
def test_a_threshold_for_a_precision_assigns_the_most_codes_that_reach_it(compact, label):
    scores, targets = drawn(9, documents=300)
    point = threshold_for(held(scores, targets, compact=compact), precision=0.8, label=label, n_resamples=200)
    p, y = (scores, targets) if label is None else (scores[:, label], targets[:, label])
    flagged = p >= point.threshold
    assert point.assigned == flagged.sum()
    assert point.per_document == pytest.approx(flagged.sum() / 300)
    assert point.precision.value == pytest.approx(y[flagged].mean())
    assert point.precision.value >= 0.8
    assert point.coverage.value == pytest.approx(y[flagged].sum() / y.sum())
    assert point.precision.low < point.precision.value < point.precision.high
    lower = [y[p >= cut].mean() for cut in np.unique(p[~flagged])]
    assert compact or max(lower) < 0.8


def test_documents_of_one_patient_widen_the_interval():
    scores, targets = drawn(10, documents=40)
    predictions = held(np.repeat(scores, 8, axis=0), np.repeat(targets, 8, axis=0))
    apart = threshold_for(predictions, precision=0.7, n_resamples=300).precision
    together = threshold_for(predictions, precision=0.7, n_resamples=300, documents=np.arange(320) // 8).precision
    assert together.value == apart.value
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_a_precision_out_of_reach_assigns_nothing():
    scores, targets = np.array([[0.9, 0.2], [0.8, 0.1]]), np.array([[0, 1], [0, 0]])
    point = threshold_for(held(scores, targets), precision=0.9, n_resamples=20)
    assert (point.threshold, point.assigned, point.coverage.value) == (NEVER, 0, 0)
    assert math.isnan(point.precision.value)
    for bad in (0, 1.1):
        with pytest.raises(ValueError, match="precision"):
            threshold_for(held(scores, targets), precision=bad)
    with pytest.raises(ValueError, match=r"`label` must lie in \[0, 2\), got 2"):
        threshold_for(held(scores, targets), precision=0.5, label=2)


def test_codes_need_no_review_from_their_own_precise_threshold_on_and_never_below_review():
    # Columns: four positives on top; a negative above all positives; one positive; four positives, a negative between.
    scores = np.array(
        [[0.9, 0.7, 0.1, 0.9], [0.8, 0.6, 0.8, 0.8], [0.7, 0.5, 0.1, 0.7], [0.6, 0.4, 0.1, 0.6], [0.2, 0.95, 0.3, 0.3]]
    )
    targets = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]])
    found = tune_auto_code(held(scores, targets), [0.3, 0.3, 0.85, 0.3], precision=0.9, min_positives=4)
    # Own thresholds: below .6 but above .2; out of reach (4 of 5 at best); ≥ .75, where precision is still 1. Pooled:
    # .95 is wrong, then .9 .9 .8 .8 .8 are right (5 of 6), .7 ×3 holds one wrong (7 of 9), .6 ×3 makes 10 of 12.
    assert found.tolist() == [pytest.approx(0.4), NEVER, NEVER, pytest.approx(0.75)]
    loose = tune_auto_code(held(scores, targets), [0.3, 0.3, 0.85, 0.3], precision=0.75, min_positives=4)
    assert loose[2] == 0.85  # what all codes share lies below, and review comes first
    lower = tune_auto_code(held(scores, targets), 0.1, precision=0.75, min_positives=4)
    assert lower[2] == threshold_for(held(scores, targets), precision=0.75, n_resamples=1).threshold < 0.85
    strict = tune_auto_code(held(scores, targets), [0.85, 0.0, 0.0, 0.85], precision=0.75, min_positives=4)
    assert strict[[0, 3]].tolist() == [pytest.approx(0.85)] * 2  # a label's own cut is at least its review threshold
    for bad in (0, 1.1):
        with pytest.raises(ValueError, match="precision"):
            tune_auto_code(held(scores, targets), 0.5, precision=bad)


def test_three_decisions_by_hand():
    decided = decide([[0.2, 0.5, 0.95], [0.5, 0.3, 0.9]], review=[0.4, 0.4, 0.4], auto_code=[0.9, 0.5, 0.9])
    assert [[DECISIONS[place] for place in row] for row in decided] == [
        ["ignore", "auto-code", "auto-code"],
        ["review", "ignore", "auto-code"],
    ]
    crossed = decide([0.3, 0.5], review=0.4, auto_code=0.2)
    assert [DECISIONS[place] for place in crossed] == ["auto-code", "auto-code"]


def test_what_is_routed_where_adds_up_and_matches_the_decisions():
    scores, targets = drawn(11)
    auto = np.linspace(0.3, 0.9, 12)
    table = routing_scores(held(scores, targets), review=0.4, auto_code=auto)
    decided = decide(scores, review=0.4, auto_code=auto)
    for place, name in enumerate(DECISIONS):
        assert table[name]["per_document"] == pytest.approx((decided == place).sum() / 60)
        assert table[name]["precision"] == pytest.approx(targets[decided == place].mean())
        assert table[name]["share_of_codes"] == pytest.approx(targets[decided == place].sum() / targets.sum())
    assert sum(row["per_document"] for row in table.values()) == pytest.approx(12)


# Trainer


def test_the_metrics_of_a_trainer_gather_batches_and_start_anew():
    torch = pytest.importorskip("torch")
    from transformers import EvalPrediction

    scores, targets = drawn(12)
    logits = np.log(scores) - np.log1p(-scores)
    compute = trainer_code_metrics(12, threshold=0.4)
    for _ in range(2):  # two evaluations
        for start in range(0, 60, 25):
            rows, last = slice(start, start + 25), start == 50
            batch = EvalPrediction(torch.tensor(logits[rows]), torch.tensor(targets[rows]))
            found = compute(batch, compute_result=last)
            assert bool(found) == last
        expected = multilabel_scores(held(scores, targets), thresholds=0.4)
        assert found == pytest.approx(expected, abs=1e-6)


# Intervals over documents


def repeated(weight, scores, targets):
    """The set in which every document stands as often as its weight says."""
    return held(np.repeat(scores, weight, axis=0), np.repeat(targets, weight, axis=0))


@pytest.mark.parametrize("levels", [None, 6])
def test_a_figure_of_weighted_documents_is_that_of_repeated_documents(levels):
    scores, targets = drawn(13, levels=levels)
    targets[:, 0] = 1  # no document is without it: it has no ranking
    weight = np.random.default_rng(0).integers(0, 3, len(scores))
    weights = np.stack([weight, np.ones_like(weight)]).astype(float)
    figures = figures_of(held(scores, targets, batch=17), 0.4, weights, (3, 8))
    assert len(figures) >= 11
    for place, counts in enumerate((weight, np.ones_like(weight))):
        expected = multilabel_scores(repeated(counts, scores, targets), thresholds=0.4, ks=(3, 8))
        for name, figure in figures.items():
            assert figure[place] == pytest.approx(expected[name], abs=1e-6), name


def test_true_codes_in_small_chunks_give_the_same_figures(monkeypatch):
    scores, targets = drawn(13, levels=6)
    weights = np.random.default_rng(0).integers(0, 3, (4, len(scores))).astype(float)
    whole = figures_of(held(scores, targets), 0.4, weights)
    monkeypatch.setattr("hf_ehr.multilabel_intervals.CHUNK", 7 * len(scores))
    parts = figures_of(held(scores, targets), 0.4, weights)
    for name, figure in whole.items():
        np.testing.assert_allclose(parts[name], figure, atol=1e-6, err_msg=name)


def test_draws_are_averaged_and_resampled_beside_the_documents():
    (scores, targets), noise = drawn(16), np.random.default_rng(1)
    tables = [np.clip(scores + noise.normal(0, spread, scores.shape), 0, 1) for spread in (0.0, 0.3, 0.6)]
    draws, limits = [held(table, targets) for table in tables], [0.3, 0.4, 0.5]
    documents = np.arange(60) // 2
    options = {"documents": documents, "n_resamples": 40, "metrics": ("map", "f1_micro", "auroc_macro")}
    found = multilabel_intervals(draws, threshold=limits, **options)
    alone = [multilabel_scores(one, thresholds=limit) for one, limit in zip(draws, limits, strict=True)]
    assert list(found) == list(options["metrics"])
    for name, interval in found.items():
        assert interval.value == pytest.approx(np.mean([one[name] for one in alone]), abs=1e-6)
    # The same resamples of documents × draws as for any other metric.
    row = np.arange(60)

    def mean_precision(y, draw, weight):
        repeats = repeated(weight.astype(int), tables[int(draw[0])], targets)
        return multilabel_scores(repeats)["map"]

    which = np.repeat(np.arange(3), 60).reshape(3, 60)
    expected = crossed_bootstrap(mean_precision, row, which, None, documents, n_resamples=40)
    assert (found["map"].low, found["map"].high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    against = multilabel_intervals(draws, rival=draws[0], metrics=["map"], n_resamples=40)["map"]
    assert against.value == pytest.approx(np.mean([one["map"] for one in alone]) - alone[0]["map"])
    with pytest.raises(ValueError, match="as many draws"):
        multilabel_intervals(draws, rival=draws[:2])
    with pytest.raises(ValueError, match="one threshold for each of the 3 draws"):
        multilabel_intervals(draws, threshold=0.5)
    with pytest.raises(ValueError, match="`metrics` must be among"):
        multilabel_intervals(draws, metrics=["f1_micro"])


def test_codes_out_of_scope_count_as_missed():
    # flagged: A B | A C | B with 3 hits of 5 true codes; two more true codes are no label.
    found = multilabel_intervals(held(SCORES, TARGETS), threshold=0.5, out_of_scope=[0, 2, 0], n_resamples=5)
    assert found["recall_all_codes"].value == pytest.approx(3 / (5 + 2))
    assert found["f1_all_codes"].value == pytest.approx(2 * 3 / (5 + 5 + 2))
    assert found["f1_micro"].value == pytest.approx(2 * 3 / (5 + 5))


def test_codes_out_of_scope_are_never_found_in_the_ranking_of_a_document():
    # Ranked first, second | third, nothing true; the second has two codes beyond, the third only one beyond.
    scores = [[0.9, 0.8, 0.1], [0.6, 0.5, 0.4], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1]]
    targets = [[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    predictions = held(np.array(scores), np.array(targets))
    options = {"out_of_scope": [0, 2, 1, 0], "n_resamples": 300, "metrics": ["map", "map_all_codes"]}
    found = multilabel_intervals(predictions, **options)
    assert found["map"].value == pytest.approx((1 + 1 / 3) / 2)
    # Sums over the codes of a document, (1 + 1) / 2, (1/3 + 0 + 0) / 3 and 0 / 1; the last has no code at all.
    assert found["map_all_codes"].value == pytest.approx((1 + 1 / 9 + 0) / 3)
    assert 0 <= found["map_all_codes"].low < found["map_all_codes"].value < found["map_all_codes"].high <= 1
    none = multilabel_intervals(predictions, **(options | {"out_of_scope": np.zeros(4, int)}))
    assert none["map_all_codes"] == none["map"]


def test_a_group_of_labels_has_its_own_macro_area():
    # A ranks its documents .9 .7 | .1, B .6 against .8 and .2
    groups = {"two": [True, True, False, False], "none": [False, False, False, True]}
    found = multilabel_intervals(held(SCORES, TARGETS), groups=groups, n_resamples=5)
    assert found["auroc_macro (two)"].value == pytest.approx((1 + 1 / 2) / 2)
    assert math.isnan(found["auroc_macro (none)"].value)


def test_intervals_hold_the_figure_and_clusters_widen_them():
    scores, targets = drawn(14, documents=30)
    many = held(np.repeat(scores, 6, axis=0), np.repeat(targets, 6, axis=0))
    apart = multilabel_intervals(many, threshold=0.4, n_resamples=100)
    together = multilabel_intervals(many, threshold=0.4, n_resamples=100, documents=np.arange(180) // 6)
    found = multilabel_scores(many, thresholds=0.4)
    for name, interval in apart.items():
        assert interval.value == pytest.approx(found[name], abs=1e-6)
        assert interval.low <= interval.value <= interval.high or name == "exact_match"
    for name in ("f1_micro", "map", "average_precision_micro", "auroc_micro"):
        assert together[name].high - together[name].low > 1.6 * (apart[name].high - apart[name].low)


def test_a_paired_difference_sees_what_separate_intervals_do_not():
    scores, targets = drawn(15, documents=80)
    better = np.where(targets, scores * 0.9 + 0.1, scores * 0.97)
    ours, theirs = held(better, targets), held(scores, targets)
    differences = multilabel_intervals(ours, rival=theirs, threshold=0.4, rival_threshold=0.4, n_resamples=100)
    alone = [multilabel_intervals(model, n_resamples=100)["map"] for model in (ours, theirs)]
    difference = differences["map"]
    assert difference.value == pytest.approx(alone[0].value - alone[1].value)
    assert difference.low > 0
    assert alone[0].low < alone[1].high
    with pytest.raises(ValueError, match="same documents"):
        multilabel_intervals(ours, rival=held(scores, targets[::-1]))
    with pytest.raises(ValueError, match="given together"):
        multilabel_intervals(ours, rival=theirs, threshold=0.5)
