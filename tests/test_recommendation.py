"""Metrics of medication recommendation, against hand computations and scikit-learn."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as reference

from hf_ehr.recommendation import ddi_matrix, recommendation_intervals, recommendation_metrics
from hf_ehr.schema import EhrDataError

# Four drugs; at .5: {a, b} for {a, c}; {} for {}; {d} for {}; {a, b, d} for {a, b, d}.
TRUTH = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
SCORES = np.array([[0.9, 0.8, 0.4, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.6], [0.9, 0.5, 0.2, 0.7]])
BEFORE = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
DDI = np.zeros((4, 4), bool)
DDI[0, 1] = DDI[1, 0] = DDI[0, 2] = DDI[2, 0] = True


def test_set_figures_by_hand_with_empty_sets():
    found = recommendation_metrics(TRUTH, SCORES, threshold=0.5)
    assert found["jaccard_samples"] == pytest.approx((1 / 3 + 1 + 0 + 1) / 4)
    assert found["f1_samples"] == pytest.approx((2 / 4 + 1 + 0 + 1) / 4)
    assert found["f1_micro"] == pytest.approx(2 * 4 / (6 + 5))
    assert found["accuracy"] == pytest.approx((2 + 4 + 3 + 4) / 16)
    assert (found["number_of_drugs"], found["number_of_drugs_truth"]) == (6 / 4, 5 / 4)
    assert found["number_of_drugs_error"] == 1 / 4
    assert found["visits"] == 4


def test_two_empty_sets_agree_and_an_empty_one_against_a_full_one_does_not():
    nothing = np.zeros((1, 3))
    assert recommendation_metrics(nothing, nothing)["jaccard_samples"] == 1
    assert recommendation_metrics(np.eye(3)[:1], nothing)["jaccard_samples"] == 0
    assert recommendation_metrics(nothing, np.eye(3)[:1])["f1_samples"] == 0


def test_a_visit_without_both_classes_takes_no_part_in_its_ranking():
    """Average precision of the first visit: ranks 1 and 3; of the last 1. AUROC: 3 of 4 pairs, and all."""
    found = recommendation_metrics(TRUTH, SCORES)
    assert found["average_precision_samples"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert found["auroc_samples"] == pytest.approx((3 / 4 + 1) / 2)
    everything = recommendation_metrics(np.ones((1, 3)), np.full((1, 3), 0.5))
    assert everything["average_precision_samples"] == 1
    assert np.isnan(everything["auroc_samples"])
    nothing = recommendation_metrics(np.zeros((2, 3)), np.full((2, 3), 0.2))
    assert np.isnan(nothing["average_precision_samples"])
    assert np.isnan(nothing["auroc_micro"])
    assert nothing["labels_dropped"] == 3


def random_visits(seed: int = 0, visits: int = 60, drugs: int = 9):
    rng = np.random.default_rng(seed)
    y = (rng.random((visits, drugs)) < 0.3).astype(int)
    y[0], y[1] = 0, 1
    # Few distinct scores, so that there are ties.
    return y, rng.integers(0, 8, (visits, drugs)) / 8, (rng.random((visits, drugs)) < 0.3).astype(int)


def test_figures_equal_scikit_learn_with_ties():
    y, p, _ = random_visits()
    found, flagged = recommendation_metrics(y, p, threshold=0.4), p >= 0.4
    ranked = [(a, b) for a, b in zip(y, p, strict=True) if a.sum() > 0]
    both = [(a, b) for a, b in ranked if a.sum() < len(a)]
    average_precision, auroc = reference.average_precision_score, reference.roc_auc_score
    assert len(both) < len(ranked) < len(y)
    expected = {
        "average_precision_samples": np.mean([average_precision(*pair) for pair in ranked]),
        "auroc_samples": np.mean([auroc(*pair) for pair in both]),
        "f1_samples": reference.f1_score(y, flagged, average="samples", zero_division=1),
        "f1_micro": reference.f1_score(y, flagged, average="micro"),
        "f1_macro": reference.f1_score(y, flagged, average="macro"),
        "jaccard_samples": reference.jaccard_score(y, flagged, average="samples", zero_division=1),
        "auroc_micro": auroc(y.ravel(), p.ravel()),
        "auroc_macro": auroc(y, p, average="macro"),
        "average_precision_micro": average_precision(y.ravel(), p.ravel()),
        "average_precision_macro": average_precision(y, p, average="macro"),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_the_rate_of_interactions_stands_beside_that_of_the_truth():
    """Pairs proposed: ab | none | none | ab, ad, bd; of the truth: ac | ab, ad, bd. Two of each four interact."""
    found = recommendation_metrics(TRUTH, SCORES, threshold=0.5, ddi=DDI)
    assert (found["ddi_rate"], found["ddi_rate_truth"]) == (2 / 4, 2 / 4)
    safer = recommendation_metrics(TRUTH, SCORES, threshold=0.65, ddi=DDI)  # ab | | | ad
    assert safer["ddi_rate"] == 1 / 2
    silent = recommendation_metrics(TRUTH, SCORES, threshold=0.95, ddi=DDI)
    assert np.isnan(silent["ddi_rate"])  # no pair, no rate: not a safe list
    assert silent["ddi_rate_truth"] == 2 / 4


def test_new_drugs_are_those_that_the_visit_before_had_not():
    """New drugs: {c} against {b}; {} against {}; {} against {}; {a, b, d} against the same."""
    found = recommendation_metrics(TRUTH, SCORES, threshold=0.5, previous=BEFORE)
    assert found["new_drug_jaccard"] == (0 + 1) / 2
    assert found["visits_with_new_drugs"] == 2
    assert found["new_drug_jaccard_micro"] == 3 / 5
    needless = recommendation_metrics(TRUTH, np.maximum(SCORES, 0.5), threshold=0.5, previous=BEFORE)
    assert needless["new_drug_jaccard_micro"] == 4 / (3 + 3 + 3 + 4)


def test_repeating_the_last_visit_finds_no_new_drug():
    y, _, previous = random_visits()
    found = recommendation_metrics(y, previous.astype(float), previous=previous)
    assert found["new_drug_jaccard"] == 0
    assert found["jaccard_samples"] > 0


def test_one_threshold_a_drug():
    limits = np.array([0.95, 0.5, 0.3, 0.5])
    found = recommendation_metrics(TRUTH, SCORES, threshold=limits)  # {b, c} {c} {c, d} {b, d}
    assert found["number_of_drugs"] == 7 / 4
    assert found["jaccard_samples"] == pytest.approx((1 / 3 + 0 + 0 + 2 / 3) / 4)


# Intervals


def test_the_figures_of_the_intervals_are_those_of_the_metrics():
    y, p, previous = random_visits(visits=20)
    names = ("auroc_micro", "average_precision_micro", "auroc_macro", "average_precision_macro", "f1_macro")
    ddi = np.zeros((9, 9), bool)
    ddi[2, 4] = ddi[4, 2] = True
    options = {"threshold": 0.4, "previous": previous, "ddi": ddi}
    expected = recommendation_metrics(y, p, **options)
    found = recommendation_intervals(y, p, np.arange(20), n_resamples=5, **options)
    found |= recommendation_intervals(y, p, np.arange(20), n_resamples=5, metrics=names, **options)
    assert set(expected) - set(found) == {"labels_evaluated", "labels_dropped", "visits", "visits_with_new_drugs"}
    assert {name: one.value for name, one in found.items()} == pytest.approx({name: expected[name] for name in found})
    assert all(one.low <= one.high for one in found.values())


def test_a_resample_scores_whole_patients_copied_as_often_as_drawn():
    y, p, previous = random_visits(visits=12)
    patients = np.repeat(np.arange(4), 3)
    found = recommendation_intervals(
        y, p, patients, previous=previous, metrics=["jaccard_samples", "new_drug_jaccard", "f1_macro"], n_resamples=50
    )
    rng, values = np.random.default_rng(0), []
    for _ in range(50):
        rows = np.concatenate([np.flatnonzero(patients == one) for one in rng.integers(4, size=4)])
        values.append(recommendation_metrics(y[rows], p[rows], previous=previous[rows]))
    for name, interval in found.items():
        low, high = np.nanquantile([one[name] for one in values], [0.025, 0.975])
        assert (interval.low, interval.high) == pytest.approx((low, high))


def test_a_model_does_not_differ_from_itself_and_does_from_a_worse_one():
    y, p, _ = random_visits(visits=80)
    better = np.clip(0.5 * p + 0.5 * y, 0, 1)
    patients = np.arange(80) // 2
    same = recommendation_intervals(y, p, patients, rival=p, n_resamples=100)["jaccard_samples"]
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    gain = recommendation_intervals(y, better, patients, rival=p, threshold=0.5, n_resamples=100)["jaccard_samples"]
    assert gain.low > 0
    assert gain.p_value == pytest.approx(2 / 101)


# The table of pairs, and what is refused


@pytest.mark.parametrize("kind", ["table", "csv", "parquet"])
def test_pairs_in_either_order_and_beside_others_make_a_symmetric_matrix(kind, tmp_path):
    table = pa.table({"a": ["ATC/B", "ATC/X", "ATC/C"], "b": ["ATC/A", "ATC/A", "ATC/B"], "level": ["1", "2", "3"]})
    source = table
    if kind == "csv":
        source = tmp_path / "pairs.csv"
        source.write_text("a,b,level\nATC/B,ATC/A,1\nATC/X,ATC/A,2\nATC/C,ATC/B,3\n")
    if kind == "parquet":
        source = tmp_path / "pairs.parquet"
        pq.write_table(table, source)
    expected = [[False, True, False], [True, False, True], [False, True, False]]
    assert ddi_matrix(source, ["ATC/A", "ATC/B", "ATC/C"]).tolist() == expected


def test_numeric_codes_of_a_csv_stay_text(tmp_path):
    (tmp_path / "pairs.csv").write_text("a,b\n007,042\n")
    assert ddi_matrix(tmp_path / "pairs.csv", ["007", "042"]).sum() == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": ["A"]}, "two columns"),
        ({"a": [1], "b": [2]}, "two columns"),
        ({"a": ["A"], "b": ["A"]}, "itself"),
        ({"a": ["X"], "b": ["Y"]}, "got none"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table, message):
    with pytest.raises(EhrDataError, match=message):
        ddi_matrix(pa.table(table), ["A", "B"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"p": SCORES + 1}, r"\[0, 1\]"),
        ({"y": TRUTH[:2]}, "must both be"),
        ({"previous": BEFORE[:2]}, "previous"),
        ({"previous": BEFORE + 1}, "previous"),
        ({"ddi": np.ones((4, 4))}, "ddi"),
        ({"ddi": np.triu(DDI)}, "ddi"),
        ({"y": TRUTH[:0], "p": SCORES[:0]}, "a visit"),
        ({"threshold": [0.5, 0.5]}, "threshold"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        recommendation_metrics(**({"y": TRUTH, "p": SCORES} | fields))


def test_intervals_refuse_unknown_figures_and_other_numbers_of_patients():
    with pytest.raises(ValueError, match="metrics"):
        recommendation_intervals(TRUTH, SCORES, range(4), metrics=["ddi_rate"])
    with pytest.raises(ValueError, match="patients"):
        recommendation_intervals(TRUTH, SCORES, range(3))
