"""The results table: what a row holds, what may be called a difference, and what a reader must be told."""

import csv
import json
import math

import numpy as np
import pytest

from hf_ehr.intervals import Interval, paired_bootstrap, patient_bootstrap
from hf_ehr.metrics import auroc, average_precision, ece, f1_at
from hf_ehr.reports import MANDATORY_ROWS, Result, evaluate_rows, write_table

N = 600


@pytest.fixture(scope="module")
def cohort():
    rng = np.random.default_rng(0)
    y = np.repeat(rng.random(N // 2) < 0.3, 2).astype(int)
    noise = rng.normal(size=(4, N))
    predictions = {
        "Prevalence": np.full(N, 0.3),
        "Age + sex LR": logistic(noise[0] + 0.2 * y),
        "Bag-of-codes LR": logistic(noise[1] + 0.6 * y),
        "Untrained Med-BERT": logistic(noise[2]),
        "Med-BERT": logistic(noise[3] + 2 * y),
    }
    return predictions, y, np.arange(N) // 2


def logistic(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def rows(cohort):
    return evaluate_rows(
        *cohort, reference="Bag-of-codes LR", thresholds={"Med-BERT": 0.6}, n_train=300, n_resamples=200
    )


def read(paths):
    table, markdown, data = paths
    with open(table, newline="") as file:
        return list(csv.DictReader(file)), markdown.read_text(), json.loads(data.read_text())


def test_rows_hold_patient_intervals_and_paired_differences(cohort, rows):
    predictions, y, patients = cohort
    row = {row.model: row for row in rows}["Med-BERT"]
    p = predictions["Med-BERT"]
    assert row.metrics["auroc"] == patient_bootstrap(auroc, y, p, patients, n_resamples=200)
    assert row.metrics["average_precision"] == patient_bootstrap(average_precision, y, p, patients, n_resamples=200)
    assert row.metrics["f1"].value == pytest.approx(f1_at(y, p, 0.6))
    assert row.metrics["ece"].value == pytest.approx(ece(y, p))
    expected = paired_bootstrap(auroc, y, p, predictions["Bag-of-codes LR"], patients, n_resamples=200)
    assert row.difference == expected
    assert (row.n, row.positives, row.patients, row.n_train, row.draws) == (N, int(y.sum()), N // 2, 300, 1)
    assert rows[2].difference is None
    assert "f1" not in rows[0].metrics


def test_the_csv_has_one_line_a_model_with_everything_a_number_needs(rows, tmp_path):
    lines, _, _ = read(write_table(rows, tmp_path / "table v1.0", "World C"))
    assert [line["model"] for line in lines] == [row.model for row in rows]
    by_model = {line["model"]: line for line in lines}
    best = by_model["Med-BERT"]
    assert float(best["auroc_low"]) < float(best["auroc"]) < float(best["auroc_high"])
    assert int(best["positives"]) / int(best["n"]) == pytest.approx(float(best["prevalence"]))
    assert best["verdict"] == "higher"
    assert best["reference"] == "Bag-of-codes LR"
    assert float(best["p_adjusted"]) >= float(best["p_value"])
    assert by_model["Prevalence"]["verdict"] == "lower"
    assert by_model["Prevalence"]["calibration_slope"] == ""
    assert by_model["Bag-of-codes LR"]["verdict"] == by_model["Bag-of-codes LR"]["auroc_difference"] == ""
    assert (tmp_path / "table v1.0.md").is_file()


def test_p_values_are_adjusted_over_the_whole_table(tmp_path):
    def row(model, p_value):
        return Result(model, {"auroc": Interval(0.7, 0.6, 0.8)}, 1000, 100, 1000, reference="Prevalence",
                      difference=Interval(0.05, 0.001, 0.09, p_value=p_value))  # fmt: skip

    alone, _, _ = read(write_table([row("a", 0.03)], tmp_path / "one", ""))
    assert alone[0]["verdict"] == "higher"
    lines, markdown, _ = read(write_table([row("a", 0.03), row("b", 0.001), row("c", 0.04)], tmp_path / "three", ""))
    assert [float(line["p_adjusted"]) for line in lines] == pytest.approx([0.06, 0.003, 0.06])
    assert [line["verdict"] for line in lines] == ["no difference shown", "higher", "no difference shown"]
    assert markdown.count("no difference shown") == 2


def test_markdown_shows_figures_counts_and_the_missing_rows(rows, tmp_path):
    _, markdown, data = read(write_table(rows, tmp_path / "table", "World C, seed 0", ["Synthetic patients."]))
    assert markdown.startswith("# World C, seed 0\n")
    row = {row.model: row for row in rows}["Med-BERT"]
    line = next(line for line in markdown.splitlines() if line.startswith("| Med-BERT"))
    assert str(row.metrics["auroc"]) in line
    assert f"{N} ({row.positives} = {row.positives / N:.1%})" in line
    assert line.endswith("higher |")
    assert "- Synthetic patients.\n" in markdown
    assert "lacks rows it should have: LightGBM on counts.\n" in markdown
    header, rule = markdown.splitlines()[2:4]
    assert {line.count("|") for line in markdown.splitlines() if line.startswith("|")} == {header.count("|")}
    assert rule.count("---") == header.count("|") - 1
    assert data["rows"][4]["metrics"]["auroc"]["value"] == row.metrics["auroc"].value
    assert data["rows"][0]["metrics"]["calibration_slope"]["value"] is None


def test_a_complete_table_of_a_large_test_set_gets_no_warning_and_a_small_one_does(tmp_path):
    def table(positives, names):
        rows = [Result(name, {"auroc": Interval(0.6, 0.5, 0.7)}, 1000, positives, 1000) for name in names]
        return read(write_table(rows, tmp_path / "table", "t"))[2]["notes"]

    complete = [*MANDATORY_ROWS, "Untrained Med-BERT", "Med-BERT"]
    assert table(50, complete) == []
    assert "49" not in "".join(table(49, complete))
    assert any("Fewer than 50 positive" in note for note in table(49, complete))
    assert table(50, ["Med-BERT"]) == [
        f"This table lacks rows it should have: {', '.join(MANDATORY_ROWS)}, an untrained model."
    ]


def test_a_test_set_without_positives_is_named_instead_of_failing(tmp_path):
    results = evaluate_rows(
        {"Prevalence": [0.1] * 8, "Med-BERT": np.linspace(0.1, 0.9, 8)}, np.zeros(8, int), np.arange(8),
        reference="Prevalence", n_resamples=10,
    )  # fmt: skip
    assert math.isnan(results[1].metrics["auroc"].value)
    assert results[1].undefined == "no positives"
    lines, markdown, _ = read(write_table(results, tmp_path / "table", "t"))
    assert markdown.count("– (no positives)") >= 4
    assert lines[1]["auroc"] == ""
    assert lines[1]["verdict"] == "no difference shown"


def test_several_draws_are_averaged_and_single_ones_stand_in_all_of_them(cohort):
    predictions, y, patients = cohort
    rng = np.random.default_rng(1)
    drawn = np.stack([logistic(rng.normal(size=N) + s * y) for s in (1, 2, 3)])
    results = evaluate_rows(
        {"Prevalence": predictions["Prevalence"], "Med-BERT": drawn}, y, patients,
        reference="Prevalence", thresholds={"Med-BERT": [0.5, 0.6, 0.7]}, n_resamples=50,
    )  # fmt: skip
    row = results[1]
    assert (results[0].draws, row.draws) == (1, 3)
    assert row.metrics["auroc"].value == pytest.approx(np.mean([auroc(y, p) for p in drawn]))
    assert row.difference.value == pytest.approx(row.metrics["auroc"].value - 0.5)
    cuts = zip(drawn, (0.5, 0.6, 0.7), strict=True)
    assert row.metrics["f1"].value == pytest.approx(np.mean([f1_at(y, p, cut) for p, cut in cuts]))


def test_names_and_shapes_are_checked(cohort):
    predictions, y, patients = cohort
    with pytest.raises(ValueError, match="`reference` and `thresholds` must name models"):
        evaluate_rows(predictions, y, patients, reference="Oracle")
    with pytest.raises(ValueError, match="one draw or the same number of draws each"):
        evaluate_rows({"a": np.ones((2, N)), "b": np.ones((3, N))}, y, patients, reference="a")
    with pytest.raises(ValueError, match="`rows` must hold at least one result"):
        write_table([], "nowhere", "t")


def test_a_handful_of_positives_concludes_nothing(tmp_path):
    """Ten rows, one positive: a perfect ranking is no evidence, whatever the resampled interval says."""
    y = np.array([1] + [0] * 9)
    p = {"Perfect": np.linspace(0.9, 0.1, 10), "Reversed": np.linspace(0.1, 0.9, 10)}
    rows = evaluate_rows(p, y, np.arange(10), reference="Perfect", n_resamples=50)
    table = write_table(rows, tmp_path / "table", "Few")[1].read_text()
    assert "no difference shown" in table
    assert "prove nothing" in table
    assert "lower" not in table
