"""Metrics against scikit-learn, against numbers computed by hand, and against their known traps."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from hf_ehr.metrics import (
    as_evaluate_metric,
    auroc,
    average_precision,
    best_f1_threshold,
    binary_metrics,
    brier,
    brier_skill,
    calibration_intercept_slope,
    cohen_kappa_at,
    ece,
    event1,
    f1_at,
    multiclass_metrics,
    multilabel_metrics,
    net_benefit,
    trainer_metrics,
    undefined_reason,
)

Y = np.array([0, 0, 1, 1])
P = np.array([0.1, 0.4, 0.35, 0.8])


@st.composite
def scored_rows(draw):
    """Labels of both classes, probabilities with many ties, weights with some zeros."""
    n = draw(st.integers(4, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    p = rng.integers(0, draw(st.integers(1, 30)) + 1, n) / 31
    weight = rng.integers(0, 4, n).astype(float)
    weight[:2] += 1
    return y, p, weight


@settings(max_examples=80, deadline=None)
@given(scored_rows())
def test_metrics_equal_scikit_learn_with_ties_and_weights(rows):
    y, p, weight = rows
    assert auroc(y, p, weight) == pytest.approx(sk.roc_auc_score(y, p, sample_weight=weight), abs=1e-9)
    expected = sk.average_precision_score(y, p, sample_weight=weight)
    assert average_precision(y, p, weight) == pytest.approx(expected, abs=1e-9)
    assert brier(y, p, weight) == pytest.approx(sk.brier_score_loss(y, p, sample_weight=weight), abs=1e-9)
    flagged = p >= 0.5
    assert f1_at(y, p, 0.5, weight) == pytest.approx(sk.f1_score(y, flagged, sample_weight=weight), abs=1e-9)
    if 0 < weight @ flagged < weight.sum():
        expected = sk.cohen_kappa_score(y, flagged, sample_weight=weight)
        assert cohen_kappa_at(y, p, 0.5, weight) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(scored_rows())
def test_a_whole_number_weight_is_the_same_as_repeating_the_row(rows):
    y, p, weight = rows
    repeats = weight.astype(int)
    for metric in (auroc, average_precision, brier, brier_skill, ece):
        repeated = metric(np.repeat(y, repeats), np.repeat(p, repeats))
        assert metric(y, p, weight) == pytest.approx(repeated, abs=1e-9)


def test_small_example_by_hand():
    # positives .35 and .8 against negatives .1 and .4: three of four pairs are in order
    assert auroc(Y, P) == 0.75
    # from the top: .8 hit (P=1), .4 miss, .35 hit (P=2/3); each hit adds recall one half
    assert average_precision(Y, P) == pytest.approx((1 + 2 / 3) / 2)
    assert brier(Y, P) == pytest.approx((0.01 + 0.16 + 0.4225 + 0.04) / 4)
    assert brier_skill(Y, P) == pytest.approx(1 - 0.158125 / 0.25)


def test_a_constant_score_has_average_precision_equal_to_prevalence_not_the_trapezoid():
    y = np.zeros(1000, dtype=int)
    y[:47] = 1
    constant = np.full(1000, 0.3)
    precision, recall, _ = sk.precision_recall_curve(y, constant)
    assert sk.auc(recall, precision) > 0.52
    assert average_precision(y, constant) == pytest.approx(0.047)
    assert auroc(y, constant) == 0.5


def test_an_absent_class_gives_nan_and_a_reason():
    p = np.array([0.2, 0.7])
    assert math.isnan(auroc([1, 1], p))
    assert math.isnan(auroc([0, 0], p))
    assert math.isnan(average_precision([0, 0], p))
    assert math.isnan(brier_skill([0, 0], p))
    assert math.isnan(f1_at([0, 0], p, 0.5))
    assert all(map(math.isnan, calibration_intercept_slope([1, 1], p)))
    assert brier([0, 0], p) == pytest.approx((0.04 + 0.49) / 2)
    assert undefined_reason([0, 0]) == "no positives"
    assert undefined_reason([1, 1]) == "no negatives"
    assert undefined_reason([0, 1]) is None


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([0, 1], [0.1, np.nan], "`p` must be finite, got 1"),
        ([0, 1], [0.1], "one length"),
        ([], [], "not empty"),
        ([[0, 1]], [[0.1, 0.2]], "one-dimensional"),
        ([0, 2], [0.1, 0.2], "`y` must hold 0 and 1 only, got 2"),
        ([0, 1], [-0.1, 1.5], r"\[0, 1\], got \[-0.1, 1.5\].*sigmoid"),
    ],
)
def test_malformed_input_is_refused(y, p, message):
    with pytest.raises(ValueError, match=message):
        brier(y, p)


def test_ranking_metrics_accept_logits_and_weights_must_make_sense():
    assert auroc(Y, P * 100 - 50) == 0.75
    for weight in ([-1, 1, 1, 1], [0, 0, 0, 0], [1, 1, np.nan, 1]):
        with pytest.raises(ValueError, match="`sample_weight` must be"):
            auroc(Y, P, weight)


def test_expected_calibration_error_by_hand():
    y = np.array([0, 1, 0, 1, 1, 1])
    p = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.8])
    # three bins of two rows: |.15 − .5|, |.45 − .5|, |.75 − 1|, each with weight 1/3
    assert ece(y, p, bins=3) == pytest.approx((0.35 + 0.05 + 0.25) / 3)
    # one weight of three moves rows together: total 8, bins start at masses 0, 8/3, 16/3
    weight = np.array([3, 1, 1, 1, 1, 1])
    # masses before each row: 0, 3, 4, 5, 6, 7 → bins 0, 1, 1, 1, 2, 2
    gaps = abs(3 * 0.1), abs(0.2 - 1 + 0.3 - 0 + 0.6 - 1), abs(0.7 - 1 + 0.8 - 1)
    assert ece(y, p, weight, bins=3) == pytest.approx(sum(gaps) / 8)


def test_expected_calibration_error_of_a_constant_does_not_depend_on_row_order():
    y = np.array([1] * 15 + [0] * 85)
    assert ece(y, np.full(100, 0.15)) == pytest.approx(0, abs=1e-12)
    assert ece(y, np.full(100, 0.25)) == pytest.approx(0.10)


def test_calibration_recovers_a_planted_distortion():
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 1.5, 60_000)
    y = (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(int)
    perfect = calibration_intercept_slope(y, 1 / (1 + np.exp(-logit)))
    np.testing.assert_allclose(perfect, (0, 1, 0), atol=0.04)
    # predictions with logit 2·logit + 1 are recalibrated by −.5 + .5·(2·logit + 1)
    distorted = calibration_intercept_slope(y, 1 / (1 + np.exp(-(2 * logit + 1))))
    assert distorted.intercept == pytest.approx(-0.5, abs=0.04)
    assert distorted.slope == pytest.approx(0.5, abs=0.02)
    shifted = calibration_intercept_slope(y, 1 / (1 + np.exp(-(logit + 1))))
    assert shifted.in_the_large == pytest.approx(-1, abs=0.04)


def test_calibration_solves_the_score_equations():
    rng = np.random.default_rng(1)
    p = rng.uniform(0.05, 0.95, 300)
    y = (rng.random(300) < p**2).astype(int)
    weight = rng.integers(0, 3, 300).astype(float)
    result = calibration_intercept_slope(y, p, weight)
    logit = np.log(p / (1 - p))
    fitted = 1 / (1 + np.exp(-(result.intercept + result.slope * logit)))
    assert weight @ (y - fitted) == pytest.approx(0, abs=1e-6)
    assert (weight * logit) @ (y - fitted) == pytest.approx(0, abs=1e-6)
    assert weight @ (y - 1 / (1 + np.exp(-(logit + result.in_the_large)))) == pytest.approx(0, abs=1e-6)


def test_calibration_without_a_finite_solution_is_nan():
    separated = calibration_intercept_slope([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert math.isnan(separated.intercept)
    assert math.isnan(separated.slope)
    constant = calibration_intercept_slope([0, 0, 0, 1], [0.5] * 4)
    assert math.isnan(constant.slope)
    assert constant.in_the_large == pytest.approx(math.log(1 / 3))
    certain = calibration_intercept_slope([0, 1, 0, 1], [0.0, 0.0, 1.0, 1.0])
    assert np.isfinite(certain).all()


def test_best_f1_threshold_finds_the_best_cut_on_validation():
    y, p = [1, 0, 1, 0, 0], [0.9, 0.8, 0.7, 0.2, 0.1]
    # flagged top 1: 2/3; top 2: 1/2; top 3: 4/5; top 4: 2/3; all: 4/7 → between .7 and .2
    assert best_f1_threshold(y, p) == pytest.approx(0.45)
    assert f1_at(y, p, best_f1_threshold(y, p)) == pytest.approx(0.8)
    assert best_f1_threshold([1, 1], [0.4, 0.4]) == 0.4
    with pytest.raises(ValueError, match="`y_validation` must hold a positive"):
        best_f1_threshold([0, 0], [0.1, 0.2])


@settings(max_examples=40, deadline=None)
@given(scored_rows())
def test_no_threshold_beats_the_best_one(rows):
    y, p, _ = rows
    best = f1_at(y, p, best_f1_threshold(y, p))
    assert best >= max(f1_at(y, p, t) for t in np.unique(p)) - 1e-12


def test_event_1_and_net_benefit_by_hand():
    y, p = [1, 1, 1, 0, 0, 0, 0, 0], [0.9, 0.6, 0.2, 0.8, 0.7, 0.1, 0.1, 0.1]
    # flagged at .5: two of three positives, two of five negatives
    assert event1(y, p, 0.5) == pytest.approx(min(2 / 3, 2 / 4))
    assert event1(y, p, 0.85) == pytest.approx(min(1 / 3, 1 / 1))
    assert event1(y, p, 0.95) == 0
    assert math.isnan(event1([0, 0], [0.9, 0.1], 0.5))
    assert net_benefit(y, p, 0.5) == pytest.approx(2 / 8 - 2 / 8)
    assert net_benefit(y, p, 0.15) == pytest.approx(3 / 8 - 2 / 8 * 0.15 / 0.85)
    weight = [1, 1, 2, 3, 1, 1, 1, 1]
    assert event1(y, p, 0.5, weight) == pytest.approx(2 / 6)
    assert net_benefit(y, p, 0.5, weight) == pytest.approx((2 - 4) / 11)
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\)"):
            net_benefit(y, p, wrong)


@settings(max_examples=30, deadline=None)
@given(scored_rows(), st.floats(0.05, 0.95))
def test_event_1_is_the_smaller_of_recall_and_precision(rows, threshold):
    y, p, weight = rows
    flagged = (p >= threshold).astype(int)
    if (weight * y).sum():
        recall = sk.recall_score(y, flagged, sample_weight=weight)
        precision = sk.precision_score(y, flagged, sample_weight=weight, zero_division=0)
        assert event1(y, p, threshold, weight) == pytest.approx(min(recall, precision), abs=1e-9)


def test_binary_metrics_name_everything_once():
    scores = binary_metrics(Y, P, threshold=0.38)
    assert scores["n"] == 4
    assert scores["positives"] == 2
    assert scores["prevalence"] == 0.5
    # flagged: .4 (wrong) and .8 (right)
    assert scores["precision"] == scores["recall"] == scores["f1"] == 0.5
    assert scores["cohen_kappa"] == 0
    assert "f1" not in binary_metrics(Y, P)
    assert all(isinstance(value, float) for value in scores.values())


def test_absent_labels_are_dropped_from_macro_means_and_counted():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (40, 5))
    y[:, 1], y[:, 3] = 0, 1
    p = rng.random((40, 5))
    scores = multilabel_metrics(y, p)
    assert scores["labels_evaluated"] == 3
    assert scores["labels_dropped"] == 2
    present = [0, 2, 4]
    assert scores["auroc_macro"] == pytest.approx(sk.roc_auc_score(y[:, present], p[:, present]), abs=1e-9)
    expected = sk.average_precision_score(y[:, present], p[:, present])
    assert scores["average_precision_macro"] == pytest.approx(expected, abs=1e-9)
    assert scores["auroc_micro"] == pytest.approx(sk.roc_auc_score(y.ravel(), p.ravel()), abs=1e-9)
    only_absent = multilabel_metrics(y[:, [1]], p[:, [1]])
    assert math.isnan(only_absent["auroc_macro"])
    with pytest.raises(ValueError, match=r"\(n, labels\), got \(40, 5\) and \(40, 4\)"):
        multilabel_metrics(y, p[:, :4])


def test_both_macro_f1_definitions_on_three_rows_and_four_labels():
    y = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]])
    p = np.array([[0.9, 0.8, 0.1, 0.1], [0.9, 0.9, 0.1, 0.7], [0.1, 0.2, 0.3, 0.2]])
    scores = multilabel_metrics(y, p, threshold=0.5)
    # label: tp, flagged, present = (2, 2, 2), (1, 2, 2), (0, 0, 1), (0, 1, 0); F1 = 1, 1/2, 0, –
    assert scores["f1_macro"] == pytest.approx(1.5 / 3)
    # macro precision (1 + 1/2 + 0 + 0)/4 = 3/8, macro recall the same
    assert scores["f1_macro_caml"] == pytest.approx(3 / 8)
    assert scores["f1_micro"] == pytest.approx(2 * 3 / (5 + 5))
    flagged = (p >= 0.5).astype(int)
    assert scores["f1_macro"] == pytest.approx(sk.f1_score(y, flagged, average="macro", labels=[0, 1, 2]))


def test_multiclass_metrics_leave_out_a_class_that_does_not_occur():
    y = np.array([0, 1, 1, 0])
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1], [0.4, 0.5, 0.1]])
    scores = multiclass_metrics(y, p)
    assert scores["accuracy"] == 0.5
    assert scores["labels_dropped"] == 1
    # class 0: pairs (.7,.3) (.7,.5) (.4,.3) (.4,.5): 3 of 4; class 1: (.6,.2) (.6,.5) (.4,.2) (.4,.5): 3 of 4
    assert scores["auroc_macro"] == 0.75
    with pytest.raises(ValueError, match="class numbers"):
        multiclass_metrics([0, 3], p[:2])


def test_trainer_metrics_turn_logits_into_probabilities():
    logits = np.array([[0.0, -2.0], [0.0, -0.4], [0.0, -0.6], [0.0, 1.4]])
    expected = 1 / (1 + np.exp(-logits[:, 1]))
    two = SimpleNamespace(predictions=(logits.astype(np.float16), "hidden states"), label_ids=Y)
    one = SimpleNamespace(predictions=logits[:, 1:], label_ids=Y[:, None])
    metric = trainer_metrics("single_label_classification")
    assert metric(one)["brier"] == pytest.approx(brier(Y, expected), abs=1e-12)
    assert metric(two)["brier"] == pytest.approx(brier(Y, expected), abs=1e-3)
    many = SimpleNamespace(predictions=np.array([[5.0, 1, 0], [0, 800, 0], [1, 0, 3]]), label_ids=np.array([0, 1, 2]))
    assert metric(many)["accuracy"] == 1
    multi = SimpleNamespace(predictions=np.array([[2.0, -900.0], [-1.0, 900.0]]), label_ids=np.array([[1, 0], [0, 1]]))
    assert trainer_metrics("multi_label_classification")(multi)["auroc_macro"] == 1
    with pytest.raises(ValueError, match="`problem_type` must be"):
        trainer_metrics("regression")


def test_evaluate_metrics_agree_combine_and_leave_no_predictions_on_disk(tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    metric = as_evaluate_metric("auroc")
    metric.add_batch(references=Y[:2], predictions=P[:2])
    metric.add_batch(references=Y[2:], predictions=P[2:])
    assert metric.compute() == {"auroc": 0.75}
    both = evaluate.combine([as_evaluate_metric("auroc"), as_evaluate_metric("brier")])
    assert both.compute(references=Y, predictions=P) == {"auroc": 0.75, "brier": pytest.approx(0.158125)}
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]
    with pytest.raises(ValueError, match="`name` must be one of auroc"):
        as_evaluate_metric("accuracy")
