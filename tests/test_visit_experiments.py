"""Reports of visits: what a cell sees, what is made once, and what the tables say (papers.md §2, rows 41 and 42)."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from hf_ehr.entity_tags import Entity
from hf_ehr.experiments import ReportArguments, load_spec, report
from hf_ehr.experiments.spec import SPECS
from hf_ehr.experiments.visits import VisitBench, VisitSpec, stages
from hf_ehr.experiments.visits.cells import VisitCell
from hf_ehr.experiments.visits.classical import classical
from hf_ehr.experiments.visits.corpora import annotated_notes, true_entities, typed_entities
from hf_ehr.experiments.visits.models import new_model
from hf_ehr.experiments.visits.scores import (
    Asked,
    Said,
    entities_from,
    entity_arrays,
    figures,
    figures_of_all_cells,
    primary_of,
    resampled,
    said_by,
)
from hf_ehr.experiments.visits.spec import VisitRow, setting_of
from hf_ehr.experiments.visits.tables import collect, write
from hf_ehr.intervals import crossed_bootstrap, holm
from hf_ehr.metrics import auroc
from hf_ehr.named_entities import entity_intervals, entity_scores
from hf_ehr.recommendation import recommendation_intervals, recommendation_metrics
from hf_ehr.schema import EhrDataError
from hf_ehr.sources.synthetic_text_codes import DRUGS as WORLD_DRUGS
from hf_ehr.training.visits import asked_visits, without_answers
from tests.test_visit_training import write as make_visits

DRUGS, READMISSION = "medication_recommendation", "readmission_30d"
SMALL = """
kind: visits
title: Small
datasets:
  - {name: made, folder: FOLDER/data, min_patients: 2}
  - name: notes
    corpus: synthetic
    options: {patients: 20, codes: 12, codes_per_note: 3.0, missed: 0.02}
    split_seed: 1
    min_patients: 1
    tasks: [named_entities]
tasks: [medication_recommendation, readmission_30d, icd_coding_top5]
sizes: ["50%"]
draws: 2
validation_patients: 15
test_patients: 15
note_max_length: 64
pretraining:
  seeds: 1
  notes:
    options:
      preset: tiny
      vocabulary: word
      min_patients: 1
      next_sentence: false
      model_options: {hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}
    training: {num_train_epochs: 1, learning_rate: 1.0e-3, per_device_train_batch_size: 64}
  medmplm:
    options:
      preset: tiny
      model_options:
        note_pooling: mean
        code_config: {hidden_size: 8, intermediate_size: 8, num_attention_heads: 2}
    training: {num_train_epochs: 1, learning_rate: 1.0e-3, per_device_train_batch_size: 64}
finetuning: {num_train_epochs: 1, per_device_train_batch_size: 64, per_device_eval_batch_size: 64}
rows:
  - {name: Repeat last visit, model: repeat_last_visit}
  - {name: Popularity, model: popularity}
  - {name: LR, model: lr, tasks: [readmission_30d]}
  - {name: TF-IDF LR, model: tfidf_lr, tasks: [icd_coding_top5]}
  - {name: RNN, model: rnn, model_options: {hidden_size: 8}, learning_rates: [1.0e-3, 1.0e-2]}
  - {name: G-BERT from MedM-PLM, model: gbert, init: medmplm, tasks: [medication_recommendation]}
  - {name: MedM-PLM, model: medmplm, init: pretrained, tasks: [medication_recommendation, readmission_30d]}
  - {name: Untrained, model: medmplm, tasks: [medication_recommendation]}
  - {name: Broken, model: rnn, model_options: {hidden_dropout_prob: 9}}
  - {name: Dictionary, model: dictionary}
  - {name: Tagger, model: tagger, model_options: {hidden_size: 8, embedding_size: 8}}
  - name: Tagger on MedM-PLM
    model: tagger
    init: medmplm
    model_options: {hidden_size: 8, freeze_note_encoder: true}
comparisons:
  - [MedM-PLM, Untrained]
  - [MedM-PLM, LR]
  - [Tagger on MedM-PLM, Tagger]
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> VisitSpec:
    folder = tmp_path_factory.mktemp("spec")
    make_visits(folder / "data", patients=80)
    (folder / "small.yaml").write_text(SMALL.replace("FOLDER", str(folder)))
    found = load_spec(folder / "small.yaml")
    assert isinstance(found, VisitSpec)
    return found


@pytest.fixture(scope="module")
def output(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    paths = report(spec, ReportArguments(output=str(folder), work=str(folder / "work"), workers=1))
    return folder, paths


@pytest.fixture
def bench(spec, output) -> VisitBench:
    return VisitBench(spec, output[0] / "work")


def cell(spec: VisitSpec, row: str, task: str = DRUGS, size: int | str = "50%", draw: int = 0, data="made"):
    return VisitCell(spec.data(data), task, spec.row(row), size, draw)


def kept(bench: VisitBench, one: VisitCell) -> dict[str, np.ndarray]:
    with np.load(bench.path(one)) as file:
        return dict(file)


# What is written


def test_a_report_is_written_whole(spec, output):
    folder, paths = output
    files = {"small.md", "small.csv", "small-differences.csv", "small.json", "small.png"}
    assert {path.name for path in paths} == files
    assert paths[0].name == "small.md"
    text = paths[0].read_text()
    assert all(f"| {row.name} |" in text for row in spec.rows if row.name != "Broken")
    assert "50% of the labelled patients" in text
    assert "**Synthetic patients in notes**" in text  # the other cohort need not be
    rows = list(csv.DictReader((folder / "small.csv").open()))
    assert {row["metric"] for row in rows if row["task"] == READMISSION} == {"auroc", "average_precision", "f1"}


def test_a_low_resource_curve_goes_from_a_share_of_the_labels_to_all(spec, output, tmp_path):
    rows, tasks = (spec.row("Popularity"), spec.row("LR")), (DRUGS, READMISSION)
    comparisons = (("LR", "Popularity"),)
    curve = replace(spec, name="curve", rows=rows, sizes=("20%", "100%"), tasks=tasks, comparisons=comparisons)
    curve = replace(curve, datasets=curve.datasets[:1])
    bench = VisitBench(curve, output[0] / "work")
    for job in stages(bench)["Cells"]:
        job.call(*job.arguments)
    paths = write(collect(bench, {}, n_resamples=20), tmp_path)
    files = {"curve.md", "curve.csv", "curve-differences.csv", "curve.json", "curve-1.png", "curve-2.png"}
    assert {path.name for path in paths} == files
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")
    assert "20% of the labelled patients" in paths[0].read_text()
    found = [row for row in csv.DictReader((tmp_path / "curve.csv").open()) if row["metric"] == "auroc"]
    labelled = bench.cohort(spec.data("made")).examples(READMISSION, "train")
    whole = len(set(labelled["subject_id"]))
    sizes = (("20%", math.ceil(0.2 * whole)), ("100%", whole))
    expected = [(row.name, size, n) for size, n in sizes for row in rows]
    assert [(row["row"], row["size"], float(row["n_train"])) for row in found] == expected
    differences = list(csv.DictReader((tmp_path / "curve-differences.csv").open()))
    assert [(row["size"], row["metric"]) for row in differences] == [("20%", "auroc"), ("100%", "auroc")]


def test_a_failing_row_is_named_and_the_others_are_there(output):
    found = json.loads((output[0] / "small.json").read_text())
    assert set(found["failures"]) == {f"Broken, made, {DRUGS}, 50% patients, draw {draw}" for draw in (0, 1)}
    assert all("dropout probability" in error for error in found["failures"].values())
    assert found["missing"] == [f"Broken, made, {DRUGS}, 50% patients"]


def test_a_second_run_computes_nothing_and_a_lost_cell_comes_back_as_it_was(bench):
    jobs = [job for found in stages(bench).values() for job in found]
    assert {job.name.split(",")[0] for job in jobs if not job.done.exists()} == {"Broken"}
    lost = cell(bench.spec, "MedM-PLM", draw=1)
    before = kept(bench, lost)["test"]
    bench.path(lost).unlink()
    (job,) = [job for job in jobs if job.done == bench.path(lost)]
    job.call(*job.arguments)
    np.testing.assert_allclose(kept(bench, lost)["test"], before, atol=1e-5)


# What cells see


def test_a_cell_sees_no_test_answer_and_none_reaches_what_it_says(bench, monkeypatch):
    examples = bench.examples(cell(bench.spec, "MedM-PLM"), "test")
    assert not any(any(visit) for row in examples["label_ids"] for visit in row)
    assert any(any(row) for row in examples["asked"])
    assert not any(bench.examples(cell(bench.spec, "LR", READMISSION), "test")["labels"])
    notes = {
        s: bench.examples(cell(bench.spec, "Tagger", "named_entities", data="notes"), s) for s in ("train", "test")
    }
    assert {split: "labels" in part.column_names for split, part in notes.items()} == {"train": True, "test": False}
    # The answers of training and validation are there.
    assert any(bench.examples(cell(bench.spec, "LR", READMISSION), "validation")["labels"])
    monkeypatch.setattr(VisitBench, "asked", None)  # the one that knows them is not needed to fit
    for row, task in (("Repeat last visit", DRUGS), ("LR", READMISSION), ("MedM-PLM", READMISSION)):
        one = cell(bench.spec, row, task)
        before = kept(bench, one)["test"]
        bench.path(one).unlink()
        bench.run(one)
        np.testing.assert_allclose(kept(bench, one)["test"], before, atol=1e-5)


def test_draws_are_nested_over_sizes_shared_by_all_rows_and_of_training_patients(bench):
    train = set(bench.cohort(bench.spec.data("made")).splits["train"].tolist())
    seen = {
        (row, size, draw): set(bench.examples(cell(bench.spec, row, size=size, draw=draw), "train")["subject_id"])
        for row in ("Popularity", "MedM-PLM")
        for size in (5, "50%", "all")
        for draw in (0, 1)
    }
    for draw in (0, 1):
        assert seen["Popularity", 5, draw] < seen["Popularity", "50%", draw] < seen["Popularity", "all", draw] == train
        assert all(seen["Popularity", size, draw] == seen["MedM-PLM", size, draw] for size in (5, "50%"))
    assert seen["Popularity", 5, 0] != seen["Popularity", 5, 1]


def test_a_row_that_no_seed_changes_has_one_draw_of_all_patients(spec):
    more = replace(spec, draws=3)
    assert [more.draws_of(spec.row(name), "all") for name in ("Popularity", "MedM-PLM")] == [1, 3]
    assert more.draws_of(spec.row("Popularity"), "50%") == 3


def test_a_cell_is_known_by_what_determines_it_and_not_by_its_name(spec, bench):
    one = cell(spec, "MedM-PLM")
    assert bench.path(replace(one, row=replace(one.row, name="another", tasks=None))) == bench.path(one)
    others = [
        replace(one, draw=1), replace(one, size="all"), replace(one, row=replace(one.row, init="none")),
        replace(one, row=replace(one.row, pretrain_options={"cross_modal": "none"})),
        replace(one, data=replace(one.data, min_patients=3)), replace(one, data=replace(one.data, split_seed=1)),
        replace(one, task=READMISSION),
    ]  # fmt: skip
    paths = {bench.path(other) for other in others}
    stage = {"medmplm": spec.pretraining.medmplm | {"training": {"num_train_epochs": 2}}}
    for changed in (
        {"pretraining": replace(spec.pretraining, **stage)}, {"finetuning": {}}, {"test_patients": 14},
        {"finetuning_of_task": {DRUGS: {"num_train_epochs": 2}}}, {"note_max_length": 32},
    ):  # fmt: skip
        paths.add(VisitBench(replace(spec, **changed), bench.work).path(one))
    assert len(paths | {bench.path(one)}) == 13
    other = VisitBench(replace(spec, finetuning_of_task={READMISSION: {"num_train_epochs": 2}}), bench.work)
    assert other.path(one) == bench.path(one)


# What rows start from


def test_rows_start_from_what_their_init_names(bench):
    spec = bench.spec
    cohort = bench.cohort(spec.data("made"))
    stage = load_file(cohort.checkpoint(spec.row("MedM-PLM"), 0) / "model.safetensors")
    blank = load_file(cohort.checkpoint(spec.row("Untrained"), 0) / "model.safetensors")
    text = load_file(cohort.text_folder / "model.safetensors")
    state = new_model(cohort, spec.row("MedM-PLM"), DRUGS, 0, 0).state_dict()
    mine = {name: value for name, value in state.items() if name.startswith("medmplm.")}
    assert len(mine) > 20
    assert all(torch.equal(value, stage[name]) for name, value in mine.items())
    gbert = new_model(cohort, spec.row("G-BERT from MedM-PLM"), DRUGS, 0, 0).gbert.state_dict()
    assert len(gbert) > 10
    assert all(torch.equal(value, stage[f"medmplm.code_encoder.{name}"]) for name, value in gbert.items())
    # Without pre-training on visits, the text encoder is the one of the notes all the same.
    words = "embeddings.word_embeddings.weight"
    (known,) = [value for name, value in text.items() if name.endswith(words) and not name.startswith("head")]
    fresh = new_model(cohort, spec.row("Untrained"), DRUGS, 0, 0).state_dict()
    (taken,) = [value for name, value in fresh.items() if name.endswith(words)]
    assert torch.equal(taken, known)
    codes = next(name for name in mine if name.startswith("medmplm.code_encoder") and mine[name].ndim == 2)
    assert torch.equal(fresh[codes], blank[codes])
    assert not torch.equal(fresh[codes], stage[codes])


def test_a_tagger_reads_the_text_encoder_that_medm_plm_left(bench):
    spec, cohort = bench.spec, bench.cohort(bench.spec.data("notes"))
    stage = load_file(cohort.checkpoint(spec.row("Tagger on MedM-PLM"), 0) / "model.safetensors")
    tagger = new_model(cohort, spec.row("Tagger on MedM-PLM"), "named_entities", 0, 0)
    weights = tagger.model.note_encoder.state_dict()
    assert len(weights) > 5
    assert all(torch.equal(value, stage[f"medmplm.note_encoder.{name}"]) for name, value in weights.items())
    assert new_model(cohort, spec.row("Tagger"), "named_entities", 0, 0).model.note_encoder is None


def test_the_rate_of_a_row_is_the_best_on_validation_of_a_draw_that_is_not_reported(bench):
    told = json.loads(bench.rate_path(cell(bench.spec, "RNN")).read_text())
    scores = {float(rate): value for rate, value in told["validation"].items()}
    assert set(scores) == {1e-3, 1e-2}
    assert told["learning_rate"] == max(scores, key=lambda rate: scores[rate]) == bench.rate(cell(bench.spec, "RNN"))


# Figures


def test_figures_and_differences_are_those_of_the_cells(spec, bench):
    result = collect(bench, {}, n_resamples=40)
    entries = {(entry.row, entry.task, entry.size): entry for entry in result.entries}
    asked = bench.asked(cell(spec, "LR", READMISSION), "test")
    scores = {
        row: np.stack([kept(bench, cell(spec, row, READMISSION, draw=draw))["test"] for draw in (0, 1)])
        for row in ("MedM-PLM", "LR")
    }
    entry = entries["LR", READMISSION, "50%"]
    assert entry.figures["auroc"].value == pytest.approx(np.mean([auroc(asked.truth, p) for p in scores["LR"]]))
    assert (entry.n_test, entry.positives) == (len(asked.truth), asked.truth.sum())
    (difference,) = [d for d in result.differences if d.reference == "LR"]
    expected = crossed_bootstrap(auroc, asked.truth, scores["MedM-PLM"], scores["LR"], asked.patients, n_resamples=40)
    for name in ("value", "low", "high", "p_value"):
        assert getattr(difference.difference, name) == pytest.approx(getattr(expected, name))
    assert [d.p_adjusted for d in result.differences] == holm([d.difference.p_value for d in result.differences])
    assert all("nothing concluded" in d.verdict for d in result.differences)  # 15 patients
    drugs = bench.asked(cell(spec, "MedM-PLM"), "test")
    values = [
        recommendation_metrics(drugs.truth, kept(bench, cell(spec, "MedM-PLM", draw=draw))["test"])[
            "average_precision_samples"
        ]
        for draw in (0, 1)
    ]
    found = entries["MedM-PLM", DRUGS, "50%"]
    assert found.figures["average_precision_samples"].value == pytest.approx(np.mean(values))
    assert found.sd["average_precision_samples"] == pytest.approx(np.std(values, ddof=1))


def test_figures_of_drugs_and_entities_are_those_of_their_own_intervals():
    rng = np.random.default_rng(0)
    truth, p, patients = (rng.random((40, 6)) < 0.4).astype(int), rng.random((40, 6)), np.repeat(np.arange(20), 2)
    asked = Asked(truth, patients, np.zeros_like(truth))
    mine = resampled("recommendation", asked, [Said(p, 0.4)], 1, 300)
    theirs = recommendation_intervals(truth, p, patients, threshold=0.4, previous=asked.previous, n_resamples=300)
    assert theirs.keys() <= mine.keys()
    for name, interval in theirs.items():
        own = mine[name].interval()
        assert (own.value, own.low, own.high) == pytest.approx((interval.value, interval.low, interval.high)), name
    notes = [[Entity(0, 2, "problem"), Entity(5, 7, "test")], [Entity(1, 3, "problem")], []]
    said = [[Entity(0, 2, "problem")], [Entity(1, 4, "problem")], [Entity(0, 1, "test")]]
    of_notes = resampled("entities", Asked(notes, np.arange(3), None), [Said(said)], 1, 50)["f1"].interval()
    expected = entity_intervals(notes, said, clusters=np.arange(3), n_resamples=50)["f1"]
    assert (of_notes.value, of_notes.low, of_notes.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert of_notes.value == entity_scores(notes, said)["f1"]


def test_micro_figures_of_codes_by_hand():
    truth = np.array([[1, 0], [0, 1]])
    asked, said = Asked(truth, np.arange(2), None), Said(np.array([[0.9, 0.6], [0.2, 0.8]]), 0.5)
    both = figures("coding", asked, said, np.ones((1, 2))) | figures_of_all_cells("coding", asked, said)
    found = {name: float(value[0]) for name, value in both.items()}
    # Three cells flagged, two of them right: F1 = 4/5, Jaccard = 2/3.
    assert found["f1_micro"] == pytest.approx(0.8)
    assert found["jaccard_micro"] == pytest.approx(2 / 3)
    assert found["auroc_micro"] == found["average_precision_micro"] == 1
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures_of_all_cells("coding", asked, Said(said.values, 0.7))["f1_macro"] == 1  # .6 is below
    assert primary_of("coding", asked, said.values) == 1


def test_a_threshold_is_that_of_validation_visits():
    validation = Asked(np.array([0, 0, 1, 1]), np.arange(4), None)
    said = said_by("admission", validation, {"validation": [0.1, 0.6, 0.7, 0.9], "test": [0.6, 0.3]})
    assert 0.6 < said.threshold <= 0.7
    by_hand = figures("admission", Asked(np.array([1, 0]), np.arange(2), None), said, np.ones((1, 2)))
    assert by_hand["f1"][0] == 0  # .6 is below


def test_entities_survive_their_arrays():
    entities = [[], [Entity(0, 3, "problem"), Entity(4, 9, "treatment")], []]
    assert entities_from(entity_arrays(entities)) == entities
    assert entities_from(entity_arrays([[], []])) == [[], []]


# The corpus


def test_entities_that_lie_in_others_are_left_out_and_a_note_is_one_visit(bench):
    cohort = bench.cohort(bench.spec.data("notes"))
    notes = pq.read_table(Path(cohort.arguments.data) / "corpus_notes.parquet")
    found = true_entities(cohort.arguments.data, notes["note_id"].to_pylist()[::-1])
    texts = notes["text"].to_pylist()[::-1]
    for text, entities in zip(texts, found, strict=True):
        assert all(one.end <= other.start for one, other in pairwise(entities))
        assert all(text[one.start : one.end].strip() for one in entities)
    assert {one.type for entities in found for one in entities} == {"problem", "treatment"}
    records = [
        row
        for path in sorted(Path(cohort.arguments.data).glob("records/*"))
        for row in pq.read_table(path).to_pylist()
    ]
    visits = [visit for row in records for visit in row["visits"]]
    assert sorted(visit["notes"][0]["text"] for visit in visits) == sorted(texts)
    assert any(code.startswith("Drug/") for visit in visits for code in visit["medications"])


def test_notes_that_nobody_annotated_are_no_notes_without_entities():
    notes = pa.table({"note_id": list("abc"), "split": ["train", "unlabelled", None]})
    assert annotated_notes(notes)["note_id"].to_pylist() == ["a", "c"]


def test_procedures_are_a_type_of_their_own():
    codes, place = ["ICD10CM/I50.9", "ICD10PCS/0210093", "ICD10CM/E11.9"], pa.array([0, 1, 2], pa.int32())
    columns = {"note_id": list("aaa"), "code": codes, "start": place, "end": place}
    spans = pa.table(columns | {"kind": ["annotated", "annotated", "sign"]})
    assert typed_entities(spans)["type"].to_pylist() == ["problem", "procedure", "treatment"]


# The generator's own probabilities


def test_the_oracle_knows_what_the_generator_knew(tmp_path):
    text = SMALL.replace(
        "folder: FOLDER/data", "source: synthetic_text_codes, options: {patients: 120, seed: 0, ct: 1.0}"
    )
    (tmp_path / "world.yaml").write_text(text.replace("model: popularity", "model: oracle"))
    spec = load_spec(tmp_path / "world.yaml")
    bench = VisitBench(spec, tmp_path / "work")
    data = replace(spec.data("made"), notes=False)
    cohort = bench.cohort(data)
    cohort.make((DRUGS, READMISSION))
    cohort.make_processor()
    truth = [pq.read_table(path) for path in (Path(cohort.arguments.data) / "truth").glob("*.parquet")]
    known = {row["visit_id"]: row for table in truth for row in table.to_pylist()}
    for task in (DRUGS, READMISSION):
        cohort.make_examples(task)
        one = replace(cell(replace(spec, test_patients=10_000), "Popularity", task, "all"), data=data)
        parts = {split: bench.examples(one, split) for split in ("train", "validation", "test")}
        p = classical("oracle", cohort, task, parts, 0)[1]
        assert p.shape == bench.asked(one, "test").truth.shape
        if task == READMISSION:
            expected = [known[visits[0]]["oracle_probability"] for visits in parts["test"]["visit_ids"]]
        else:
            names, visits = cohort.label_names(task), asked_visits(parts["test"], p.shape[1]).visit_ids
            drugs = [
                dict(zip(WORLD_DRUGS, known[number]["medication_probabilities"], strict=True)) for number in visits
            ]
            expected = [[given[name] for name in names] for given in drugs]
        np.testing.assert_allclose(p, expected)


# What is refused


def test_an_unknown_field_is_named(tmp_path):
    for old, new, named in (
        ("model: repeat_last_visit", "model: repeat_last_visit, colour: red", "colour"),
        ("seeds: 1", "seeds: 1\n  epochs: 3", "epochs"),
        ("title: Small", "title: Small\nfigure: 4", "figure"),
    ):
        (tmp_path / "wrong.yaml").write_text(SMALL.replace(old, new, 1))
        with pytest.raises(EhrDataError, match=named):
            load_spec(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "model"),
        ({"model": "rnn", "init": "pretrained"}, "is not for"),
        ({"model": "rnn", "tasks": (READMISSION,)}, "cannot be asked"),
        ({"model": "tagger", "init": "all"}, "init"),
    ],
)
def test_rows_that_mean_nothing_are_refused(change, message):
    with pytest.raises(EhrDataError, match=message):
        VisitRow(**({"name": "row"} | change))


def test_reports_that_mean_nothing_are_refused(spec):
    for change, message in (
        ({"sizes": ("half",)}, "sizes"), ({"draws": 0}, "draws"),
        ({"comparisons": (("MedM-PLM", "none"),)}, "comparisons"),
        ({"pretraining": replace(spec.pretraining, notes=None)}, "reads notes"),
        ({"datasets": (replace(spec.datasets[1], tasks=None),)}, "corpus"),
        ({"tasks": ("named_entities",)}, "corpus"), ({"tasks": (READMISSION,)}, "stand in a column"),
        ({"finetuning_of_task": {"los": {}}}, "finetuning_of_task"),
    ):  # fmt: skip
        with pytest.raises(EhrDataError, match=message):
            replace(spec, **change)
    with pytest.raises(EhrDataError, match="one of `source`"):
        replace(spec.datasets[0], source="mimic3")
    with pytest.raises(EhrDataError, match="`options` and `training`"):
        replace(spec.pretraining, gbert={"epochs": 2})


def test_rows_that_read_notes_are_left_out_where_there_are_none(spec):
    data = replace(spec.data("made"), notes=False)
    assert {row.name for row in spec.rows_of(data, READMISSION)} == {"Popularity", "LR", "MedM-PLM"}
    assert setting_of("icd_coding_top50") == "coding"
    assert setting_of("readmission_30d") == "admission"


def test_answers_are_blinded_and_nothing_else(bench):
    examples = bench.cohort(bench.spec.data("made")).examples(DRUGS, "test")
    hidden = without_answers(examples)
    assert set(hidden.column_names) == set(examples.column_names)
    assert hidden.features["label_ids"] == examples.features["label_ids"]
    assert all(hidden[name][:] == examples[name][:] for name in examples.column_names if name != "label_ids")
    assert [len(row) for row in hidden["label_ids"]] == [len(row) for row in examples["label_ids"]]


@pytest.mark.parametrize("path", sorted(SPECS.glob("medmplm_*.yaml")), ids=lambda path: path.stem)
def test_the_reports_of_medm_plm_are_valid(path):
    found = load_spec(path)
    assert isinstance(found, VisitSpec)
    assert found.comparisons or found.name == "medmplm_mimic"
    assert found.notes
    for data, task in found.columns():
        assert found.rows_of(data, task)
