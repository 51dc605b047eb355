"""Figures of groups and net benefit: the numbers by hand, patients as the unit, and what is not shown."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from hf_ehr.decision_curves import net_benefit_band
from hf_ehr.intervals import patient_bootstrap
from hf_ehr.metrics import auroc, average_precision, calibration_intercept_slope, net_benefit
from hf_ehr.subgroups import FIGURES, age_bands, subgroup_lines, subgroups, write_subgroups


def drawn(n=600, seed=0):
    rng = np.random.default_rng(seed)
    logit = rng.normal(-0.5, 1.2, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    sex = np.where(rng.random(n) < 0.5, "F", "M").astype(object)
    return y, 1 / (1 + np.exp(-logit)), sex


def test_a_group_has_the_figures_of_its_own_rows():
    y, p, sex = drawn()
    found = {row.title: row for row in subgroups(y, p, np.arange(len(y)), {"sex": sex}, 0.4, n_resamples=25)}
    assert list(found) == ["all", "sex: F", "sex: M"]
    for title, rows in {"all": np.ones(len(y), bool), "sex: F": sex == "F"}.items():
        own_y, own_p = y[rows], p[rows]
        flagged = own_p >= 0.4
        calibration = calibration_intercept_slope(own_y, own_p)
        expected = {
            "auroc": auroc(own_y, own_p), "average_precision": average_precision(own_y, own_p),
            "calibration_intercept": calibration.intercept, "calibration_slope": calibration.slope,
            "fnr": (~flagged)[own_y == 1].mean(), "fpr": flagged[own_y == 0].mean(), "ppv": own_y[flagged].mean(),
        }  # fmt: skip
        assert {name: figure.value for name, figure in found[title].figures.items()} == pytest.approx(expected)
        assert (found[title].n, found[title].positives) == (rows.sum(), own_y.sum())
        assert all(figure.low < figure.value < figure.high for figure in found[title].figures.values())


def test_the_intervals_resample_patients_with_all_their_rows():
    y, p, _ = drawn(300)
    y, p, patients = np.repeat(y, 4), np.repeat(p, 4), np.repeat(np.arange(300), 4)
    (row,) = subgroups(y, p, patients, {}, 0.4, n_resamples=60, seed=3)
    expected = patient_bootstrap(auroc, y, p, patients, n_resamples=60, seed=3)
    assert row.figures["auroc"].low == pytest.approx(expected.low)
    assert row.figures["auroc"].high == pytest.approx(expected.high)


@pytest.mark.parametrize(("positives", "negatives", "shown"), [(49, 200, False), (50, 200, True), (200, 49, False)])
def test_a_group_of_too_few_positives_or_negatives_has_no_figures(positives, negatives, shown, tmp_path):
    y = np.repeat([1, 0], [positives, negatives])
    p = np.clip(np.linspace(0.9, 0.1, len(y)) + np.random.default_rng(0).normal(0, 0.05, len(y)), 0, 1)
    rows = subgroups(y, p, np.arange(len(y)), {}, 0.5, n_resamples=20)
    assert bool(rows[0].figures) == shown
    assert rows[0].positives == (None if positives < 50 else positives)
    line = next(line for line in subgroup_lines(rows) if line.startswith("| all"))
    assert ("| – |" in line) != shown
    assert ("< 50" in line) == (positives < 50)
    write_subgroups(rows, tmp_path / "groups.csv")
    (record,) = csv.DictReader((tmp_path / "groups.csv").open())
    assert bool(record["ppv_low"]) == shown
    assert record["positives"] == ("" if positives < 50 else str(positives))


def test_who_is_of_no_known_group_is_a_group():
    y, p, sex = drawn(400)
    sex[:150] = None
    rows = subgroups(y, p, np.arange(len(y)), {"sex": sex}, 0.4, n_resamples=10)
    assert [row.group for row in rows] == ["all", "F", "M", "unknown"]
    assert sum(row.n for row in rows[1:]) == rows[0].n
    with pytest.raises(ValueError, match="`fields` must have a value per row, got 399 of `sex`"):
        subgroups(y, p, np.arange(len(y)), {"sex": sex[1:]}, 0.4)


def test_age_bands_go_by_completed_years_and_sort_by_age():
    bands = age_bands([44.99, 45, 64.5, 65, 79.9, 80, 101, np.nan])
    assert bands == ["0 to 44", "45 to 64", "45 to 64", "65 to 79", "65 to 79", "80 and over", "80 and over", None]
    known = [band for band in bands if band]
    assert known == sorted(known)


def test_the_band_of_net_benefit_is_the_metric_at_every_threshold():
    y, p, _ = drawn(500)
    cuts = [0.05, 0.2, 0.5]
    band = net_benefit_band(y, p, np.arange(500), cuts, n_resamples=100)
    np.testing.assert_allclose(band.value, [net_benefit(y, p, cut) for cut in cuts])
    alone = patient_bootstrap(lambda y, p, w: net_benefit(y, p, 0.2, w), y, p, np.arange(500), n_resamples=100)
    assert (band.low[1], band.high[1]) == pytest.approx((alone.low, alone.high))
    everybody = net_benefit_band(y, np.ones(500), np.arange(500), cuts, n_resamples=10).value
    np.testing.assert_allclose(everybody, [y.mean() - (1 - y.mean()) * cut / (1 - cut) for cut in cuts])
    assert set(FIGURES) >= {"fnr", "fpr", "ppv"}
    for wrong in ([0.0, 0.5], [0.5, 1.0], []):
        with pytest.raises(ValueError, match="`thresholds` must lie in"):
            net_benefit_band(y, p, np.arange(500), wrong)
