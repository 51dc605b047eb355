"""Reports of intensive care stays: what a cell sees, what is made once, and what the tables and curves say."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_ehr.experiments import ReportArguments, load_spec, report
from hf_ehr.experiments.cells import oracle_auroc
from hf_ehr.experiments.spec import SPECS, patients_at
from hf_ehr.experiments.stays import StayBench, StaySpec
from hf_ehr.experiments.stays.cells import StayCell
from hf_ehr.experiments.stays.convergence import figures_of
from hf_ehr.experiments.stays.materials import admission_arguments, make_stage1
from hf_ehr.experiments.stays.models import new_model, probabilities
from hf_ehr.experiments.stays.spec import GATES, OBJECTIVES, SERIES, StayRow
from hf_ehr.experiments.stays.stages import stages
from hf_ehr.experiments.stays.summaries import load_summaries, with_notes
from hf_ehr.experiments.stays.tables import write_stays
from hf_ehr.experiments.tables import collect_from
from hf_ehr.intervals import crossed_bootstrap, holm
from hf_ehr.metrics import auroc
from hf_ehr.schema import DatasetInfo, EhrDataError, shard_name
from hf_ehr.stay_baselines import StaySummaries
from tests.builders import day, patient, records, visit

TASK = "icu_mortality_t24"
SMALL = """
kind: stays
title: Small
datasets:
  - name: made
    folder: FOLDER/inside
    test: {folder: FOLDER/outside}
    features: &features {min_patients: 2, form: continuous, demographics: [age, sex], n_hours: 24}
  - {name: elsewhere, folder: FOLDER/outside, tasks: [], features: *features}
tasks: [icu_mortality_t24]
sizes: ["25%"]
draws: 2
validation_patients: 30
test_patients: 60
pretraining:
  seeds: 1
  stays:
    options: {preset: tiny, model_options: {hidden_size: 8, demographics_hidden_size: 4, intermediate_size: 8}}
    training: {num_train_epochs: 2, learning_rate: 5.0e-3, per_device_train_batch_size: 64}
finetuning: {num_train_epochs: 1, per_device_train_batch_size: 32, per_device_eval_batch_size: 512}
series: {hidden_size: 8, projection_size: 8, num_filters: 4, num_attention_heads: 2, intermediate_size: 8}
convergence: {rows: [MedHMP, Untrained], size: "25%", epochs: 2}
rows:
  - {name: Prevalence, model: Prevalence}
  - {name: LR, model: L2 LR on summaries}
  - {name: MedHMP, model: medhmp, init: s}
  - {name: Frozen, model: medhmp, init: s, probe: true}
  - {name: Untrained, model: medhmp, learning_rates: [1.0e-3, 1.0e-2]}
  - {name: Mean of two, model: medhmp, init: s, ensemble: 2}
  - {name: LSTM + MedHMP, model: unimodal_lstm, medhmp_encoder: true, init: s}
  - {name: Moved, model: medhmp, init: s, pretrained_on: elsewhere, features: {form: binned}}
  - {name: Broken, model: cnn, model_options: {cnn_depth: 9}}
comparisons:
  - [MedHMP, Untrained]
  - [MedHMP, LR]
"""


def make_stays(folder: Path, patients: int, first: int = 1, seed: int = 0) -> None:
    """Patients whose heart rate rises where they die; one stay each."""
    rng, rows = np.random.default_rng(seed), []
    for subject in range(first, first + patients):
        dies = rng.random() < 0.4
        hours = np.sort(rng.uniform(0, 23, 8))
        values = 80 + (1.5 if dies else 0.0) * hours + rng.normal(0, 3, 8)
        measured = [
            {"hour": float(hour), "name": "X/HR", "value": float(value), "text": None}
            for hour, value in zip(hours, values, strict=True)
        ]
        stay = {"stay_id": 10 * subject, "start": day(1), "end": day(3), "measurements": measured}
        fields = {"discharged_to": "died" if dies else "home", "visit_id": subject}
        rows.append(patient(subject, [visit(0, 8, stays=[stay], **fields)], sex="F"))
    (folder / "records").mkdir(parents=True)
    for shard in range(2):
        part = records(*(row for row in rows if row["subject_id"] % 2 == shard))
        pq.write_table(part, folder / "records" / shard_name(shard, 2))
    DatasetInfo("made", {}, 2, "calendar").save(folder)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> StaySpec:
    folder = tmp_path_factory.mktemp("spec")
    make_stays(folder / "inside", 160)
    make_stays(folder / "outside", 80, first=1001, seed=1)
    (folder / "small.yaml").write_text(SMALL.replace("FOLDER", str(folder)))
    found = load_spec(folder / "small.yaml")
    assert isinstance(found, StaySpec)
    return found


@pytest.fixture(scope="module")
def output(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    paths = report(spec, ReportArguments(output=str(folder), work=str(folder / "work"), workers=1))
    return folder, paths


@pytest.fixture
def bench(spec, output) -> StayBench:
    return StayBench(spec, output[0] / "work")


def cell(spec: StaySpec, row: str, data: str = "made", size: int | str = "25%", draw: int = 0) -> StayCell:
    return StayCell(spec.data(data), TASK, spec.row(row), size, draw)


def kept(bench: StayBench, row: str, **place) -> dict[str, np.ndarray]:
    with np.load(bench.path(cell(bench.spec, row, **place))) as file:
        return dict(file)


def test_a_report_is_written_whole(spec, output):
    folder, paths = output
    assert {path.name for path in paths} == {
        "small.md", "small.csv", "small-differences.csv", "small.json", "small.png",
        "small-convergence.csv", "small-convergence.png",
    }  # fmt: skip
    assert paths[0].name == "small.md"
    text = paths[0].read_text()
    working = [row.name for row in spec.rows if row.name != "Broken"]
    assert all(f"| {name} |" in text for name in working)
    assert "Average precision" in text
    assert "25% of the labelled patients" in text
    assert {row["row"] for row in csv.DictReader((folder / "small.csv").open())} == set(working)


def test_test_patients_are_those_of_the_other_folder_and_the_rest_of_this_one_trains(bench):
    cohort = bench.cohort(bench.spec.data("made"))
    inner = cohort.data.__class__.__mro__[1](cohort.data.data).splits()
    assert set(cohort.splits["test"]) == set(range(1001, 1081))
    assert set(cohort.splits["train"]) == set(inner["train"]) | set(inner["test"])
    assert set(cohort.splits["validation"]) == set(inner["validation"])
    held = {
        split: set(bench.examples(cell(bench.spec, "LR"), split)["subject_id"]) for split in ("validation", "test")
    }
    assert held["validation"] == set(inner["validation"])  # no more than are asked for
    assert len(held["test"]) == 60
    assert held["test"] < set(range(1001, 1081))


def test_draws_are_nested_over_sizes_and_shared_by_all_rows(bench):
    seen = {
        (row, size, draw): set(bench.examples(cell(bench.spec, row, size=size, draw=draw), "train")["subject_id"])
        for row in ("LR", "MedHMP", "Moved")
        for size in (10, "25%", "all")
        for draw in (0, 1)
    }
    for draw in (0, 1):
        assert seen["LR", 10, draw] < seen["LR", "25%", draw] < seen["LR", "all", draw]
        assert all(
            seen["LR", size, draw] == seen[row, size, draw] for row in ("MedHMP", "Moved") for size in (10, "25%")
        )
    assert len(seen["LR", 10, 0]) == 10
    assert len(seen["LR", "25%", 0]) == math.ceil(0.25 * len(seen["LR", "all", 0]))
    assert seen["LR", 10, 0] != seen["LR", 10, 1]


def test_a_share_of_the_patients_is_rounded_up_and_no_size_is_more_than_all():
    assert [patients_at(size, 150) for size in ("1%", "10%", "100%", 7, 200, "all")] == [2, 15, 150, 7, 150, 150]


def test_a_low_resource_curve_goes_from_a_share_of_the_labels_to_all(spec, output, tmp_path):
    rows = (spec.row("Prevalence"), spec.row("LR"))
    curve = replace(spec, name="curve", rows=rows, sizes=("20%", "100%"), comparisons=(), convergence=None)
    bench = StayBench(curve, output[0] / "work")
    for job in stages(bench)["Cells"]:
        job.call(*job.arguments)
    names = {path.name for path in write_stays(bench, {}, tmp_path, n_resamples=20)}
    assert names == {"curve.md", "curve.csv", "curve-differences.csv", "curve.json", "curve.png"}
    found = [
        (row["row"], row["size"], float(row["n_train"])) for row in csv.DictReader((tmp_path / "curve.csv").open())
    ]
    whole = len(bench.cohort(spec.data("made")).splits["train"])
    sizes = (("20%", math.ceil(0.2 * whole)), ("100%", whole))
    assert found == [(row.name, size, n) for size, n in sizes for row in rows]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_row_is_named_and_the_others_are_there(output):
    found = json.loads((output[0] / "small.json").read_text())
    assert set(found["failures"]) == {f"Broken, made, {TASK}, 25% patients, draw {draw}" for draw in (0, 1)}
    assert all("cnn_depth" in error for error in found["failures"].values())
    assert found["missing"] == [f"Broken, made, {TASK}, 25% patients"]


def test_a_column_whose_examples_could_not_be_made_is_named_as_missing(spec, tmp_path):
    result = collect_from(StayBench(spec, tmp_path), {}, n_resamples=20)
    assert result.entries == []
    assert result.missing == [f"{row.name}, made, {TASK}, 25% patients" for row in spec.rows]


def test_a_second_run_computes_nothing_and_a_lost_cell_comes_back_as_it_was(bench):
    jobs = [job for jobs in stages(bench).values() for job in jobs]
    assert {job.name for job in jobs if not job.done.exists()} == {
        f"Broken, made, {TASK}, 25% patients, draw {draw}" for draw in (0, 1)
    }
    lost = cell(bench.spec, "MedHMP", draw=1)
    before = kept(bench, "MedHMP", draw=1)["test"]
    bench.path(lost).unlink()
    (job,) = [job for job in jobs if job.done == bench.path(lost)]
    job.call(*job.arguments)
    np.testing.assert_allclose(kept(bench, "MedHMP", draw=1)["test"], before, atol=1e-5)


def test_a_cell_is_known_by_what_determines_it_and_not_by_its_name(spec, bench):
    one = cell(spec, "MedHMP")
    assert bench.path(replace(one, row=replace(one.row, name="another"))) == bench.path(one)
    others = [
        replace(one, draw=1), replace(one, size="all"), replace(one, row=replace(one.row, init="none")),
        replace(one, row=replace(one.row, ensemble=2)), replace(one, row=replace(one.row, features={"num_bins": 3})),
        replace(one, data=replace(one.data, features=one.data.features | {"n_hours": 12})),
        replace(one, data=replace(one.data, test=None)),
    ]  # fmt: skip
    paths = {bench.path(other) for other in others}
    stays = {"training": spec.pretraining.stays["training"] | {"num_train_epochs": 3}}
    pretraining = replace(spec.pretraining, stays=spec.pretraining.stays | stays)
    for changed in ({"pretraining": pretraining}, {"finetuning": {}}, {"test_patients": 59}):
        paths.add(StayBench(replace(spec, **changed), bench.work).path(one))
    assert len(paths | {bench.path(one)}) == 11


def test_figures_and_differences_are_those_of_the_cells(spec, bench):
    result = collect_from(bench, {}, n_resamples=50)
    examples = bench.examples(cell(spec, "LR"), "test")
    truth, patients = np.asarray(examples["labels"]), np.asarray(examples["subject_id"])
    scores = {row: np.stack([kept(bench, row, draw=draw)["test"] for draw in (0, 1)]) for row in ("MedHMP", "LR")}
    entries = {entry.row: entry for entry in result.entries}
    assert entries["LR"].auroc.value == pytest.approx(np.mean([auroc(truth, draw) for draw in scores["LR"]]))
    assert entries["Prevalence"].auroc.value == 0.5
    seen = len(bench.examples(cell(spec, "LR"), "train"))
    assert (entries["LR"].n_train, entries["LR"].n_test, entries["LR"].positives) == (seen, 60, truth.sum())
    (difference,) = [d for d in result.differences if d.reference == "LR"]
    assert difference.auroc == crossed_bootstrap(
        auroc, truth, scores["MedHMP"], scores["LR"], patients, n_resamples=50
    )
    assert [d.p_adjusted for d in result.differences] == holm([d.auroc.p_value for d in result.differences])


def test_an_ensemble_is_the_mean_of_trainings_with_other_seeds(bench):
    one = cell(bench.spec, "Mean of two")
    parts = {split: bench.examples(one, split) for split in ("train", "validation", "test")}
    collate = bench.collator(one)
    members = [
        probabilities(bench.fitted(one, parts, 1e-3, collate, member), parts["test"], collate) for member in (0, 1)
    ]
    assert np.abs(members[0] - members[1]).max() > 1e-4  # one of them alone is no mean of both, to the tolerance below
    np.testing.assert_allclose(kept(bench, "Mean of two")["test"], np.mean(members, axis=0), atol=1e-5)


def test_frozen_members_are_of_different_pretrainings(spec, bench):
    two = StayBench(replace(spec, pretraining=replace(spec.pretraining, seeds=2)), bench.work)
    one = replace(cell(spec, "Frozen"), row=replace(cell(spec, "Frozen").row, ensemble=2))
    make_stage1(two.features(one), spec.pretraining, 1)
    parts = {split: two.examples(one, split) for split in ("train", "validation", "test")}
    _, test = two._neural(one, parts)
    members = [
        probabilities(two.start(one, parts, two.collator(one), member), parts["test"], two.collator(one))
        for member in (0, 1)
    ]
    assert np.abs(members[0] - members[1]).max() > 1e-3
    np.testing.assert_allclose(test, np.mean(members, axis=0), atol=1e-6)
    np.testing.assert_allclose(members[0], kept(bench, "Frozen")["test"], atol=1e-5)


def test_rows_start_from_what_their_init_names(bench):
    spec, features = bench.spec, bench.features(cell(bench.spec, "MedHMP"))
    stage = load_file(features.stage1(spec.pretraining, 0) / "model.safetensors")
    for row, prefix in (("MedHMP", "medhmp.stay_encoder"), ("LSTM + MedHMP", "model.network.hours")):
        state = new_model(bench, cell(spec, row), 0).state_dict()
        mine = {name: weight for name, weight in state.items() if name.startswith(prefix)}
        theirs = {name.replace("model.network.hours", "medhmp.stay_encoder.hourly"): name for name in mine}
        assert len(mine) > 5
        assert all(torch.equal(state[name], stage[source]) for source, name in theirs.items())
    fresh = new_model(bench, cell(spec, "Untrained"), 0).state_dict()
    lstm = "medhmp.stay_encoder.hourly.lstm.weight_hh_l0"
    assert fresh[lstm].shape == stage[lstm].shape
    assert not torch.equal(fresh[lstm], stage[lstm])


def test_a_frozen_row_is_a_regression_on_the_states_that_pre_training_left(bench):
    one = cell(bench.spec, "Frozen")
    parts = {split: bench.examples(one, split) for split in ("train", "validation", "test")}
    model = bench.start(one, parts, bench.collator(one))
    stage = load_file(bench.features(one).stage1(bench.spec.pretraining, 0) / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(value, stage[name]) for name, value in state.items() if "stay_encoder" in name)
    np.testing.assert_allclose(
        kept(bench, "Frozen")["test"], probabilities(model, parts["test"], bench.collator(one)), atol=1e-5
    )


def test_moving_to_another_feature_set_makes_the_input_layers_anew_and_says_so(bench):
    moved = cell(bench.spec, "Moved")
    source = bench.cohort(bench.spec.data("elsewhere")).features(moved.row).stage1(bench.spec.pretraining, 0)
    folder = bench.features(moved).moved(source, "s")
    told = json.loads((folder / "transfer.json").read_text())
    old, new = (load_file(path / "model.safetensors") for path in (source, folder))
    inputs = "medhmp.stay_encoder.hourly.input_lstm.weight_ih_l0"
    assert inputs in told["fresh"]
    assert set(told["fresh"]) | set(told["kept"]) == set(new)
    assert all(torch.equal(old[name], new[name]) for name in told["kept"])
    assert new[inputs].shape[1] == bench.features(moved).extractor().num_hourly_features
    state = new_model(bench, moved, 0).state_dict()
    assert torch.equal(state[inputs], new[inputs])


def test_the_curve_begins_at_the_start_and_has_every_epoch(spec, output, bench):
    rows = list(csv.DictReader((output[0] / "small-convergence.csv").open()))
    assert [(row["row"], int(row["epoch"])) for row in rows] == [
        (name, epoch) for name in ("MedHMP", "Untrained") for epoch in (0, 1, 2)
    ]
    one = cell(spec, "MedHMP")
    parts = {split: bench.examples(one, split) for split in ("train", "validation")}
    scores = probabilities(bench.start(one, parts, bench.collator(one)), parts["validation"], bench.collator(one))
    first = figures_of(parts["validation"]["labels"], scores)
    assert {name: float(rows[0][name]) for name in first} == pytest.approx(first, abs=1e-6)


def test_f1_of_the_curve_is_at_one_half_and_at_the_best_threshold():
    found = figures_of(np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.6]))
    assert found["f1"] == pytest.approx(2 / 3)  # one of two found, nothing wrong
    assert found["best_f1"] == pytest.approx(0.8)  # from 0.2 on: both, and one wrong
    assert found["auroc"] == 0.75


def test_summaries_stand_in_the_order_of_the_examples(bench):
    one = cell(bench.spec, "LR")
    parts = {split: bench.examples(one, split) for split in ("train", "validation", "test")}
    found = load_summaries(bench.summaries_path(one), parts)
    for split, part in parts.items():
        np.testing.assert_array_equal(found[split].stay_id, part["stay_id"])
        np.testing.assert_array_equal(found[split].labels, part["labels"])
    rates = found["test"].columns(["last of X/HR"])[:, 0]
    assert auroc(found["test"].labels, rates) > 0.9


def test_summaries_of_other_stays_are_refused():
    summaries = StaySummaries(np.array([1, 2]), np.array([10, 20]), np.array([0, 1]), np.zeros((2, 1)), ["age"], {})
    assert summaries.in_order(np.array([20]), np.array([1])).subject_id.tolist() == [2]
    with pytest.raises(EhrDataError, match="are not"):
        summaries.in_order(np.array([30]), np.array([1]))
    with pytest.raises(EhrDataError, match="are not"):
        replace(summaries, stay_id=np.array([20, 20]), labels=np.array([1, 1])).in_order(np.array([20]), np.array([1]))
    with pytest.raises(EhrDataError, match="are not"):
        summaries.in_order(np.array([20]), np.array([0]))


def test_vectors_of_notes_stand_beside_the_summaries_of_their_admissions():
    summaries = StaySummaries(np.array([1, 2]), np.array([10, 20]), np.array([0, 1]), np.ones((2, 1)), ["age"], {})
    found = with_notes(summaries, Dataset.from_dict({"note_vector": [[], [3.0, 4.0]]}))
    assert found.names == ["age", "note 0", "note 1"]
    np.testing.assert_array_equal(found.matrix, [[1, np.nan, np.nan], [1, 3, 4]])


def test_the_oracle_is_read_by_task_and_by_stay(tmp_path):
    (tmp_path / "truth").mkdir()
    truth = {"task": ["a", "a", "b", "a"], "stay_id": [3, 1, 1, 2], "oracle_probability": [0.9, 0.2, 0.5, 0.1]}
    pq.write_table(pa.table(truth), tmp_path / "truth" / shard_name(0, 1))
    labels, ids = np.array([0, 0, 1]), np.array([1, 2, 3])
    assert oracle_auroc(tmp_path, "a", labels, "stay_id", ids) == 1
    assert oracle_auroc(tmp_path, "a", np.array([1, 0, 0]), "stay_id", ids) == 0.5
    assert oracle_auroc(tmp_path, "c", labels, "stay_id", ids) is None
    assert oracle_auroc(tmp_path, "b", labels, "stay_id", ids) is None  # knows one of the three
    assert oracle_auroc(tmp_path / "truth", "a", labels, "stay_id", ids) is None


@pytest.mark.parametrize(
    ("objectives", "weights"), [(("mcp",), (None, 0.0)), (("cl",), (0.0, None)), (OBJECTIVES, ())]
)
def test_a_loss_that_a_row_leaves_out_weighs_nothing(bench, objectives, weights):
    features = bench.features(cell(bench.spec, "MedHMP"))
    options = json.loads(admission_arguments(features, bench.spec.pretraining, None, objectives).model_options)
    assert tuple(options.get(name) for name in ("masked_code_weight", "contrastive_weight")) == (
        weights or (None, None)
    )
    assert options["hidden_size"] == 8  # the shape of the stay stage


ADMISSIONS = """
kind: stays
title: Admissions
level: admission
datasets:
  - name: world
    source: synthetic_icu
    options: {patients: 160, seed: 0}
    features: {min_patients: 2, num_bins: 2}
tasks: [arf_onset_after_t4]
sizes: [all]
draws: 1
pretraining:
  seeds: 1
  stays:
    options: {preset: tiny, model_options: {hidden_size: 8, demographics_hidden_size: 4, intermediate_size: 8}}
    training: {num_train_epochs: 1, learning_rate: 5.0e-3, per_device_train_batch_size: 64}
  admissions:
    options: {min_patients: 2, note_max_length: 64}
    training: {num_train_epochs: 1, learning_rate: 1.0e-3, per_device_train_batch_size: 256}
  notes:
    options:
      preset: tiny
      vocabulary: word
      min_patients: 2
      next_sentence: false
      model_options: {hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 1, intermediate_size: 16}
    training: {num_train_epochs: 1, learning_rate: 1.0e-3, per_device_train_batch_size: 64}
finetuning: {num_train_epochs: 1, per_device_train_batch_size: 64, per_device_eval_batch_size: 512}
series: {hidden_size: 8, series_size: 8, demographics_size: 4, num_attention_heads: 2, intermediate_size: 16}
rows:
  - {name: LR, model: L2 LR on summaries}
  - {name: a+s, model: medhmp, init: a+s}
  - {name: masked codes, model: medhmp, init: a, objectives: [mcp]}
  - {name: s, model: medhmp, init: s}
  - {name: none, model: medhmp}
  - {name: BertLstm, model: BertLstm}
  - {name: Note, model: note}
comparisons: [[a+s, none]]
"""


@pytest.fixture(scope="module")
def admissions(tmp_path_factory) -> StayBench:
    folder = tmp_path_factory.mktemp("admissions")
    (folder / "admissions.yaml").write_text(ADMISSIONS)
    bench = StayBench(load_spec(folder / "admissions.yaml"), folder)
    bench.cohort(bench.spec.datasets[0]).make()
    for jobs in stages(bench).values():
        for job in jobs:
            job.call(*job.arguments)
    return bench


@pytest.mark.slow
def test_a_report_of_admissions_reads_codes_and_notes(admissions):
    spec = admissions.spec
    result = collect_from(admissions, {}, n_resamples=20)
    assert [entry.row for entry in result.entries] == [row.name for row in spec.rows]
    one = StayCell(spec.datasets[0], spec.tasks[0], spec.row("BertLstm"), "all", 0)
    part = admissions.examples(one, "test")
    assert {len(vector) for vector in part["note_vector"]} <= {0, 16}
    assert any(len(vector) for vector in part["note_vector"])
    batch = admissions.collator(one)([part.with_format("numpy")[index] for index in range(8)])
    model = new_model(admissions, replace(one, row=spec.row("a+s")), 0).eval()
    without = {name: value for name, value in batch.items() if not name.startswith("note_")}
    assert not torch.allclose(model(**batch).logits, model(**without).logits)


@pytest.mark.slow
def test_admissions_start_from_both_stages_one_or_none(admissions):
    spec, features = admissions.spec, admissions.cohort(admissions.spec.datasets[0]).features(admissions.spec.rows[0])
    stage1 = load_file(features.stage1(spec.pretraining, 0) / "model.safetensors")
    codes, lstm = "medhmp.admission_encoder.diagnoses.dense.weight", "medhmp.stay_encoder.hourly.lstm.weight_hh_l0"
    found = {}
    for name in ("a+s", "masked codes", "s", "none"):
        one = StayCell(spec.datasets[0], spec.tasks[0], spec.row(name), "all", 0)
        found[name] = new_model(admissions, one, 0).state_dict()
    both = load_file(features.stage2(spec.pretraining, spec.row("a+s"), 0) / "model.safetensors")
    assert torch.equal(found["a+s"][codes], both[codes])
    assert torch.equal(found["a+s"][lstm], both[lstm])
    assert torch.equal(found["s"][lstm], stage1[lstm])
    assert not torch.equal(found["s"][codes], both[codes])
    alone = load_file(features.stage2(spec.pretraining, spec.row("masked codes"), 0) / "model.safetensors")
    assert torch.equal(found["masked codes"][codes], alone[codes])
    assert not any(torch.equal(found["none"][lstm], other[lstm]) for other in (both, stage1, alone))


STAY_SPECS = sorted(path for path in SPECS.glob("medhmp_*.yaml") if path.stem != "medhmp_table3")


@pytest.mark.parametrize("path", STAY_SPECS, ids=lambda path: path.stem)
def test_the_shipped_specifications_compare_with_summaries_and_say_what_they_claim(path):
    spec = load_spec(path.stem)
    assert isinstance(spec, StaySpec)
    assert spec.comparisons
    assert spec.pretraining.seeds >= 3
    assert {"Prevalence", "L2 LR on summaries", "LightGBM on summaries"} <= {row.model for row in spec.rows}
    assert any(reference == "LightGBM on summaries" for _, reference in spec.comparisons)
    assert "CPU-minutes" in path.read_text()


def test_the_tables_have_the_papers_rows():
    def rows(name: str) -> list[StayRow]:
        return [row for row in load_spec(name).rows if row.neural]

    assert {row.model for row in rows("medhmp_table1")} == {"medhmp", *SERIES}
    ablations = {(row.init, row.objectives) for row in rows("medhmp_table1") if row.model == "medhmp"}
    both = ("mcp", "cl")
    wanted = {("a+s", both), ("a", both), ("s", both), ("none", both), ("a+s", ("mcp",)), ("a+s", ("cl",))}
    assert wanted <= ablations
    assert {(r.init, r.objectives) for r in rows("medhmp_table2") if r.model == "medhmp"} >= wanted
    assert {row.model for row in rows("medhmp_table2")} == {"medhmp", *GATES}
    assert {row.model for row in rows("medhmp_table10")} == {"medhmp", "note", *GATES}
    heads = [(row.head, row.init) for row in load_spec("medhmp_table3").rows if row.model == "rnn"]
    assert set(heads) == {
        (head, init) for head in ("lstm", "dipole", "retain", "adacare", "hitanet") for init in ("random", "medhmp")
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: medhmp, init: s}", "model: medhmp, init: t}", "`init` of 'MedHMP'"),
        ("model: medhmp, init: s}", "model: medhmp, objectives: [mlm]}", "`objectives` of 'MedHMP'"),
        ("model: cnn,", "model: rnn,", "`model` of 'Broken'"),
        ("model: cnn,", "model: BertLstm,", "does not fit `level: stay`"),
        ("model: cnn,", "model: cnn, init: s,", "`init` must be `none`"),
        ("model: cnn,", "model: cnn, medhmp_encoder: true,", "`medhmp_encoder` must be of"),
        ("model: cnn,", "model: cnn, probe: true,", "`probe` must be of"),
        ("ensemble: 2", "ensemble: 0", "`ensemble` must be a positive"),
        ("pretrained_on: elsewhere", "pretrained_on: nowhere", "`pretrained_on`"),
        ('sizes: ["25%"]', 'sizes: ["0%"]', "`sizes`"),
        ("draws: 2", "draws: {40: 2}", "`draws`"),
        ("title: Small", "title: Small\nlevel: hour", "`level`"),
        ("test: {folder: FOLDER/outside}", "test: {input: there}", "either a `source` or"),
        ("rows: [MedHMP, Untrained]", "rows: [LR]", "`convergence`"),
        ("pretraining:\n", "pretraining:\n  stage3: {}\n", "unknown fields"),
        ("    training: {num_train", "    trainin: {num_train", "`pretraining.stays` must hold"),
    ],
)
def test_a_mistake_in_a_specification_is_named_before_anything_runs(tmp_path, old, new, message):
    assert old in SMALL
    (tmp_path / "wrong.yaml").write_text(SMALL.replace(old, new, 1))
    with pytest.raises(EhrDataError, match=message):
        load_spec(tmp_path / "wrong.yaml")
