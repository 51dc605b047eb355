"""What an evaluation of visits rests on and writes: rivals, whose patients, which labels, tables, cards."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from hf_ehr import MedMPLMProcessor
from hf_ehr._visit_rivals import admission_rivals, demographics
from hf_ehr._visit_tables import SetComparison, score_sets, write_set_table
from hf_ehr.cli.main import main
from hf_ehr.multilabel import micro_scores
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.recommendation import recommendation_metrics
from hf_ehr.recommendation_baselines import RECOMMENDATION_BASELINES
from hf_ehr.schema import DatasetInfo, shard_name
from hf_ehr.training.visit_baselines import VisitBaselineArguments
from hf_ehr.training.visits import (
    asked_visits,
    fit_visit_processor,
    labelled_visits,
    predict_visits,
    without_answers,
)
from hf_ehr.visit_evaluation import drug_notes
from tests.builders import patient, records, visit
from tests.test_visit_training import DRUGS, write

QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--logging_strategy", "no", "--save_strategy",
         "no", "--learning_rate", "1e-2", "--per_device_train_batch_size", "16"]  # fmt: skip
SMALL = ["--preset", "tiny", "--min_patients", "2", "--note_max_length", "16", "--note_vocab_size", "60"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("visits") / "data")


def trained(data, folder, model: str, task: str, *words: str) -> str:
    command = ["finetune", model, "--data", data.data, "--task", task, "--output_dir", str(folder), *SMALL, *QUIET]
    assert main([*command, "--num_train_epochs", "2", *words]) == 0
    return str(folder)


def rows_of(folder) -> dict:
    return {row["model"]: row for row in json.loads((folder / "table.json").read_text())["rows"]}


# Recommendation


@pytest.fixture(scope="module")
def recommended(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rnn")
    model = trained(data, folder / "model", "visitrnn", "medication_recommendation")
    pairs = folder / "pairs.csv"
    pairs.write_text(f"a,b\n{DRUGS[0]},{DRUGS[4]}\n")
    words = ["evaluate", "--model", model, "--output", str(folder / "evaluation"), "--ddi", str(pairs)]
    assert main([*words, "--debug"]) == 0
    return folder


def test_the_table_holds_the_rivals_and_the_figures_of_the_test_visits(data, recommended):
    rows = rows_of(recommended / "evaluation")
    assert list(rows) == [*RECOMMENDATION_BASELINES, "RNN"]
    model = AutoModelForSequenceClassification.from_pretrained(recommended / "model")
    options = VisitBaselineArguments("medication_recommendation", model=str(recommended / "model"))
    processor = MedMPLMProcessor.from_pretrained(recommended / "model")
    names = [model.config.id2label[place] for place in range(5)]
    examples = labelled_visits(data, options, processor, names, data.splits(), "test")
    asked, p = asked_visits(examples, 5), predict_visits(model, examples)
    ddi = np.zeros((5, 5))
    first, second = names.index(DRUGS[0]), names.index(DRUGS[4])
    ddi[first, second] = ddi[second, first] = 1
    cut = [model.config.thresholds[name] for name in names]
    expected = recommendation_metrics(asked.truth, p, threshold=cut, previous=asked.previous, ddi=ddi)
    figures = rows["RNN"]["metrics"]
    for name in ("jaccard_samples", "f1_micro", "ddi_rate", "new_drug_jaccard", "number_of_drugs", "auroc_macro"):
        value = figures[name]["value"]
        assert (value is None and np.isnan(expected[name])) or value == pytest.approx(expected[name]), name
    assert rows["RNN"]["n"] == 2 * len(data.splits()["test"])
    assert rows["RNN"]["patients"] == len(data.splits()["test"])
    repeated = rows["Repeat last visit"]["metrics"]["jaccard_samples"]["value"]
    own = recommendation_metrics(asked.truth, asked.previous.astype(float), threshold=0.5)["jaccard_samples"]
    assert repeated == pytest.approx(own)
    table = (recommended / "evaluation" / "table.md").read_text()
    assert f"that were given is {expected['ddi_rate_truth']:.3f}" in table


def test_what_is_written_is_whole_and_says_that_few_patients_prove_nothing(data, recommended):
    written = {path.name for path in (recommended / "evaluation").iterdir()}
    assert written == {"table.md", "table.csv", "table.json", "subgroups.csv", "calibration.png"}
    text = (recommended / "evaluation" / "table.md").read_text()
    assert "prove nothing" in text
    groups = list(csv.DictReader((recommended / "evaluation" / "subgroups.csv").open()))
    assert sum(int(one["visits"]) for one in groups if one["field"] == "sex") == 2 * len(data.splits()["test"])
    assert all(row["verdicts"].get(name, "") in ("", "no difference shown") for row in rows_of(
        recommended / "evaluation").values() for name in row["verdicts"])  # fmt: skip
    card = (recommended / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "not a medical device" in card
    assert "Repeat last visit" in card
    stored = json.loads((recommended / "model" / "evaluation.json").read_text())
    assert stored["test_patients"] == len(data.splits()["test"])
    assert {"Jaccard", "AP micro", "DDI rate"} <= {one["name"] for one in stored["metrics"]}


# Yes-or-no tasks and coding


def test_readmission_stands_beside_what_reads_the_same(data, tmp_path):
    model = trained(data, tmp_path / "model", "ehrconcat", "readmission_30d", "--baseline", "note")
    assert main(["evaluate", "--model", model, "--output", str(tmp_path / "evaluation"), "--debug"]) == 0
    rows = rows_of(tmp_path / "evaluation")
    assert list(rows) == ["Prevalence", "Age + sex LR", "Bag-of-codes LR", "LightGBM on counts", "Note alone"]
    # Whoever is tired is readmitted, and the note says so: to the rivals too.
    assert rows["Bag-of-codes LR"]["metrics"]["auroc"]["value"] > 0.95
    assert rows["Prevalence"]["metrics"]["auroc"]["value"] == 0.5
    text = (tmp_path / "evaluation" / "table.md").read_text()
    assert "the words of the note as well" in text
    assert "## Subgroups (Note alone)" in text
    with pytest.raises(ValueError, match="recommends no drugs"):
        main(["evaluate", "--model", model, "--output", str(tmp_path / "x"), "--ddi", "pairs.csv", "--debug"])


def test_codes_are_evaluated_and_another_preparation_is_refused(data, tmp_path):
    model = trained(data, tmp_path / "model", "ehrtext", "icd_coding_top3")
    assert main(["evaluate", "--model", model, "--output", str(tmp_path / "evaluation"), "--debug"]) == 0
    rows = rows_of(tmp_path / "evaluation")
    assert list(rows) == ["Popularity", "L2 LR", "LightGBM", "CNN"]
    assert 0 <= rows["CNN"]["metrics"]["auroc_micro"]["value"] <= 1
    assert set(rows["L2 LR"]["differences"]) == {"f1_micro", "average_precision_micro"}
    write(tmp_path / "other")
    words = ["evaluate", "--model", model, "--data", str(tmp_path / "other"), "--output", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="another preparation"):
        main([*words, "--debug"])


def test_a_medm_plm_has_its_untrained_twin(data, tmp_path):
    few = [*QUIET, "--max_steps", "2"]
    words = ["pretrain", "medmplm", "--data", data.data, "--output_dir", str(tmp_path / "start"), *SMALL, *few]
    assert main(words) == 0
    task = ["--model", str(tmp_path / "start"), "--task", "medication_recommendation", "--num_train_epochs", "1"]
    words = ["finetune", "medmplm", "--data", data.data, "--output_dir", str(tmp_path / "model"), *task, *QUIET]
    assert main(words) == 0
    words = ["evaluate", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "evaluation")]
    assert main([*words, "--debug"]) == 0
    assert list(rows_of(tmp_path / "evaluation"))[-2:] == ["Untrained MedM-PLM", "MedM-PLM"]
    assert "independent implementation" in (tmp_path / "model" / "README.md").read_text()


# No answer of a test patient is seen


def test_rivals_and_models_do_not_see_the_answers_of_the_test(data):
    train = data.splits()["train"]
    processor = fit_visit_processor(data.data, train, min_patients=2, note_max_length=16, note_vocab_size=60)
    options = VisitBaselineArguments("readmission_30d", "note")
    parts = {
        name: labelled_visits(data, options, processor, ["no", "yes"], data.splits(), name)
        for name in ("train", "validation", "test")
    }
    flipped = parts | {"test": without_answers(parts["test"])}
    assert set(flipped["test"]["labels"]) == {0} != set(parts["test"]["labels"])
    found = [admission_rivals(one, data.data, processor, 0) for one in (parts, flipped)]
    for name, p in found[0].items():
        np.testing.assert_array_equal(p.test, found[1][name].test)
    options = VisitBaselineArguments("medication_recommendation", "rnn")
    drugs = labelled_visits(data, options, processor, DRUGS, data.splits(), "test")
    blind = asked_visits(without_answers(drugs), 5)
    assert not blind.truth.any()
    np.testing.assert_array_equal(blind.visit_ids, asked_visits(drugs, 5).visit_ids)


def test_age_and_sex_are_those_at_the_start_of_the_visit(tmp_path):
    visits = [visit(0, 1, visit_id=10), visit(365.25, 366, visit_id=11)]
    (tmp_path / "records").mkdir()
    rows = [patient(1, visits, sex="F"), patient(2, [visit(0, 1, visit_id=20)], birth_time=None)]
    pq.write_table(records(*rows), tmp_path / "records" / shard_name(0, 1))
    DatasetInfo("made", {}, 1, "calendar").save(tmp_path)
    age, sex = demographics(str(tmp_path), np.array([1, 2, 1, 1]), np.array([11, 20, 10, 99]))
    np.testing.assert_allclose(age, [61, np.nan, 60, np.nan], atol=1e-3)
    assert sex == ["F", None, "F", None]


# Tables by hand


def made_up(patients: int) -> SetComparison:
    """Two visits a patient; the model is right on 3 of 4 cells, the rival gives the same to everybody."""
    rng = np.random.default_rng(0)
    truth = (rng.random((2 * patients, 6)) < 0.4).astype(np.int8)
    noise = rng.random(truth.shape) < 0.15
    test = {"Popularity": np.tile(truth.mean(axis=0), (len(truth), 1)), "Model": np.abs(truth - noise) * 0.8 + 0.1}
    groups = {"sex": ["F" if n % 3 else "M" for n in range(2 * patients)]}
    return SetComparison(
        "recommendation", test, {"Popularity": 0.3, "Model": 0.5}, truth, np.zeros_like(truth),
        np.repeat(np.arange(patients) + 987_000_000, 2), 10, groups,
    )  # fmt: skip


def test_a_clear_difference_is_shown_and_with_few_patients_none():
    rows = score_sets(made_up(60), "Model")
    assert rows[0].verdicts == {"jaccard_samples": "lower", "average_precision_samples": "lower"}
    assert not rows[1].differences
    difference = rows[0].differences["jaccard_samples"].value
    values = [row.metrics["jaccard_samples"].value for row in rows]
    assert difference == pytest.approx(values[0] - values[1])
    assert set(score_sets(made_up(20), "Model")[0].verdicts.values()) == {"no difference shown"}


def test_files_name_no_patient_and_groups_of_few_have_no_figures(tmp_path):
    comparison = made_up(60)
    table, _ = write_set_table(comparison, "Model", tmp_path, "made up", [])
    assert not any(b"98700" in path.read_bytes() for path in tmp_path.iterdir())
    groups = {one["group"]: one for one in csv.DictReader((tmp_path / "subgroups.csv").open())}
    assert groups["M"]["jaccard_samples"] == ""
    part = np.flatnonzero(np.array(comparison.groups["sex"]) == "F")
    own = recommendation_metrics(comparison.truth[part], comparison.test["Model"][part], threshold=0.5)
    assert float(groups["F"]["jaccard_samples"]) == pytest.approx(own["jaccard_samples"])
    micro = micro_scores(MultilabelPredictions.of(comparison.test["Model"], comparison.truth))
    assert f"{micro['average_precision_micro']:.3f}" in table.read_text()


def test_drugs_in_the_sources_own_codes_are_pointed_out():
    assert drug_notes(["ATC/A10B", "ATC/C07A"]) == []
    (note,) = drug_notes(["ATC/A10B", "NDC/00002143380", "LOCAL/1"])
    assert note.startswith("2 of the 3 drugs are not in ATC")
