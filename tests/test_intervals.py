"""Properties of the bootstraps: what is resampled, how wide intervals are, what a difference may be called."""

import math
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hf_ehr.intervals import (
    Interval,
    ResampledDraws,
    crossed_bootstrap,
    holm,
    paired_bootstrap,
    patient_bootstrap,
    resamples_for,
    verdict,
)
from hf_ehr.metrics import auroc, brier, f1_at


def cohort(n_patients=400, rows=1, seed=0, signal=1.0):
    """Rows of one patient share label and score almost entirely: the planted clusters."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.random(n_patients) < 0.3, rows).astype(int)
    score = np.repeat(rng.normal(size=n_patients), rows) + signal * y + rng.normal(0, 0.1, n_patients * rows)
    return y, 1 / (1 + np.exp(-score)), np.repeat(np.arange(n_patients), rows)


def width(interval):
    return interval.high - interval.low


def test_resampling_patients_equals_copying_their_rows():
    y, p, patients = cohort(30, rows=3)
    interval = patient_bootstrap(auroc, y, p, patients, n_resamples=50, seed=3)
    rng = np.random.default_rng(3)
    copied = []
    for _ in range(50):
        rows = np.concatenate([np.flatnonzero(patients == i) for i in rng.integers(30, size=30)])
        copied.append(roc_auc_score(y[rows], p[rows]))
    assert interval.value == pytest.approx(roc_auc_score(y, p))
    np.testing.assert_allclose((interval.low, interval.high), np.quantile(copied, [0.025, 0.975]), atol=1e-12)


def test_patient_intervals_are_wider_than_row_intervals_on_clustered_rows():
    y, p, patients = cohort(200, rows=6)
    by_patient = patient_bootstrap(auroc, y, p, patients, n_resamples=300)
    by_row = patient_bootstrap(auroc, y, p, np.arange(len(y)), n_resamples=300)
    assert by_patient.value == by_row.value
    # six almost equal rows carry one row's information: the ratio nears √6 ≈ 2.4
    assert 1.8 < width(by_patient) / width(by_row) < 3.2


def test_intervals_do_not_depend_on_the_order_of_rows_or_the_type_of_the_ids():
    y, p, patients = cohort(60, rows=2)
    order = np.random.default_rng(5).permutation(len(y))
    names = np.array([f"patient-{i:03d}" for i in patients])
    one = patient_bootstrap(auroc, y, p, patients, n_resamples=60)
    other = patient_bootstrap(auroc, y[order], p[order], names[order], n_resamples=60)
    np.testing.assert_allclose((one.value, one.low, one.high), (other.value, other.low, other.high), atol=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth = 0.5 * (1 + math.erf(1 / 2))  # AUROC of N(1, 1) against N(0, 1) is Φ(1/√2)
    covered = {0.95: 0, 0.5: 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = (rng.random(300) < 0.3).astype(int)
        score = rng.normal(size=300) + y
        for level in covered:
            interval = patient_bootstrap(auroc, y, score, np.arange(300), n_resamples=80, seed=seed, level=level)
            covered[level] += interval.low <= truth <= interval.high
    assert covered[0.95] >= 51
    assert 18 <= covered[0.5] <= 42


def test_the_level_sets_the_width():
    y, p, patients = cohort()
    wide = patient_bootstrap(auroc, y, p, patients, n_resamples=400)
    narrow = patient_bootstrap(auroc, y, p, patients, n_resamples=400, level=0.5)
    assert width(narrow) < 0.5 * width(wide)
    assert narrow.level == 0.5


def test_resamples_with_one_class_are_skipped_and_counted():
    y = np.array([1] + [0] * 9)
    interval = patient_bootstrap(auroc, y, np.linspace(1, 0, 10), np.arange(10), n_resamples=400)
    # the only positive is missing from a resample with probability (1 − 1/10)^10 = .349
    assert 0.25 < interval.skipped / 400 < 0.45
    assert interval.resamples + interval.skipped == 400
    assert interval.low == interval.high == 1
    undefined = patient_bootstrap(auroc, np.zeros(10), np.linspace(0, 1, 10), np.arange(10), n_resamples=20)
    assert math.isnan(undefined.value)
    assert undefined.skipped == 20
    assert str(undefined) == "–"


def test_a_model_does_not_differ_from_itself_or_from_its_own_noise():
    y, p, patients = cohort()
    same = paired_bootstrap(auroc, y, p, p, patients, n_resamples=100)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert verdict(same) == "no difference shown"
    rng = np.random.default_rng(1)
    a, b = (rng.random(len(y)) for _ in range(2))
    assert verdict(paired_bootstrap(auroc, y, a, b, patients, n_resamples=300)) == "no difference shown"


def test_pairing_narrows_the_interval_of_a_difference_between_correlated_models():
    y, p, patients = cohort(600)
    logit = np.log(p / (1 - p))
    better = 1 / (1 + np.exp(-(logit + 0.3 * y)))
    paired = paired_bootstrap(auroc, y, better, p, patients, n_resamples=300)
    alone = patient_bootstrap(auroc, y, p, patients, n_resamples=300)
    assert width(paired) < 0.5 * width(alone)
    assert verdict(paired) == "higher"
    assert paired.p_value < 0.01
    flipped = paired_bootstrap(auroc, y, p, better, patients, n_resamples=300)
    assert verdict(flipped) == "lower"
    np.testing.assert_allclose((flipped.low, flipped.high), (-paired.high, -paired.low), atol=1e-12)


def test_a_crossed_bootstrap_of_one_draw_is_the_paired_one_and_draw_noise_widens_it():
    y, p, patients = cohort(1500)
    rng = np.random.default_rng(2)
    rival = np.full((1, len(y)), 0.5)
    single = crossed_bootstrap(auroc, y, p[None], rival, patients, n_resamples=100)
    assert single == paired_bootstrap(auroc, y, p, rival[0], patients, n_resamples=100)
    logit = np.log(p / (1 - p))
    noisy = np.stack([logit + s * rng.normal(size=len(y)) for s in (0, 0, 3, 6)])
    stable = np.stack([noisy.mean(axis=0)] * 4)
    rivals = np.repeat(rival, 4, axis=0)
    crossed = crossed_bootstrap(auroc, y, noisy, rivals, patients, n_resamples=200)
    fixed = crossed_bootstrap(auroc, y, stable, rivals, patients, n_resamples=200)
    assert crossed.value == pytest.approx(np.mean([auroc(y, row) for row in noisy]) - 0.5)
    assert width(crossed) > 1.5 * width(fixed)


def test_threshold_metrics_enter_through_partial():
    y, p, patients = cohort()
    interval = patient_bootstrap(partial(_f1, threshold=0.5), y, p, patients, n_resamples=100)
    assert interval.value == pytest.approx(f1_at(y, p, 0.5))
    assert interval.low < interval.value < interval.high


def _f1(y, p, weight, threshold):
    return f1_at(y, p, threshold, weight)


def test_a_difference_below_the_minimum_or_after_holm_is_not_claimed():
    tiny = Interval(0.005, 0.002, 0.008, p_value=0.002)
    assert verdict(tiny) == "no difference shown"
    assert verdict(tiny, minimum=0.001) == "higher"
    clear = Interval(0.03, 0.01, 0.05, p_value=0.02)
    assert verdict(clear) == "higher"
    assert verdict(clear, p_adjusted=0.06) == "no difference shown"
    assert verdict(Interval(0.03, -0.01, 0.07)) == "no difference shown"


def test_holm_leaves_out_what_was_not_tested():
    np.testing.assert_allclose(holm([0.04, None, 0.01, 0.6]), [0.08, float("nan"), 0.03, 0.6])
    assert holm([]) == []


def test_the_same_seed_gives_the_same_interval():
    y, p, patients = cohort(100)
    first, again, other = (patient_bootstrap(brier, y, p, patients, n_resamples=50, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_shapes_and_ranges_are_checked():
    y, p, patients = cohort(20)
    with pytest.raises(ValueError, match="one prediction for each"):
        patient_bootstrap(auroc, y, p[:-1], patients)
    with pytest.raises(ValueError, match="one prediction for each"):
        patient_bootstrap(auroc, y, p, patients[:-1])
    with pytest.raises(ValueError, match="one shape"):
        crossed_bootstrap(auroc, y, p[None], np.stack([p, p]), patients)
    with pytest.raises(ValueError, match="`n_resamples` must be >= 1"):
        patient_bootstrap(auroc, y, p, patients, n_resamples=0)


def test_a_clear_difference_survives_holm_however_many_comparisons_a_table_has():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    own, rival = y + rng.normal(size=400), rng.normal(size=400)  # no resample puts the rival before
    for comparisons in (1, 72, 500):
        n_resamples = resamples_for(comparisons)
        scored = [ResampledDraws.of(auroc, y, p[None], np.arange(400), n_resamples=n_resamples) for p in (own, rival)]
        p_value = scored[0].interval(scored[1]).p_value
        assert holm([p_value] * comparisons)[-1] < 0.05
    too_few = crossed_bootstrap(auroc, y, own[None], rival[None], np.arange(400), n_resamples=1000).p_value
    assert holm([too_few] * 72)[-1] > 0.05


def test_resampled_draws_are_compared_as_if_both_were_scored_together():
    rng = np.random.default_rng(1)
    y, patients = rng.integers(0, 2, 60), rng.integers(0, 25, 60)
    own, rival = rng.random((3, 60)), rng.random((1, 60))
    one, other = (ResampledDraws.of(auroc, y, p, patients, n_draws=3, n_resamples=50, seed=4) for p in (own, rival))
    expected = crossed_bootstrap(auroc, y, own, np.repeat(rival, 3, axis=0), patients, n_resamples=50, seed=4)
    assert one.interval(other) == expected
    assert one.interval() == crossed_bootstrap(auroc, y, own, None, patients, n_resamples=50, seed=4)
    with pytest.raises(ValueError, match="same resamples"):
        one.interval(ResampledDraws.of(auroc, y, rival, patients, n_draws=3, n_resamples=50, seed=5))
    with pytest.raises(ValueError, match=r"one draw or `n_draws` \(3\), got 2"):
        ResampledDraws.of(auroc, y, own[:2], patients, n_draws=3)
