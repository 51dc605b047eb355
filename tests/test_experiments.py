"""Reports of whole experiments: what a cell sees, what is computed once, and what the tables say."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from hf_ehr.experiments import ReportArguments, ReportSpec, report
from hf_ehr.experiments.cells import Bench, Cell
from hf_ehr.experiments.runner import cells, run_cells
from hf_ehr.experiments.spec import SPECS, RowSpec
from hf_ehr.experiments.tables import UNSOUND, collect
from hf_ehr.intervals import crossed_bootstrap, holm, resamples_for
from hf_ehr.metrics import auroc
from hf_ehr.schema import EhrDataError

SMALL = """
title: Small
datasets:
  - {name: site A, source: synthetic, options: {world: C, patients: 700, seed: 0}, tasks: [], min_patients: 2}
  - {name: site B, source: synthetic, options: {world: site_b, patients: 700, seed: 0}, min_patients: 2}
tasks: [synthetic_outcome]
sizes: [60, all]
draws: {60: 2, all: 1}
validation_patients: 50
test_patients: 100
pretraining:
  seeds: 2
  options: {preset: tiny, max_tokens: 2048}
  training: {num_train_epochs: 1, learning_rate: 1.0e-3, save_strategy: "no"}
finetuning: {num_train_epochs: 1, per_device_train_batch_size: 32, per_device_eval_batch_size: 512}
rnn: {embedding_size: 8, hidden_size: 8}
rows:
  - {name: L2 LR, model: Bag-of-codes LR}
  - {name: PPMI + LR, model: PPMI-SVD + LR}
  - {name: GRU, model: rnn, head: gru, learning_rates: [1.0e-3, 1.0e-2]}
  - {name: RETAIN + t-W2V, model: rnn, head: retain, init: t-w2v, freeze: true}
  - {name: Untrained Med-BERT, model: medbert, head: bigru}
  - {name: Med-BERT of site A, model: medbert, init: pretrained, pretrained_on: site A, linear_probe: true}
comparisons:
  - [GRU, L2 LR]
  - [Med-BERT of site A, Untrained Med-BERT]
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ReportSpec:
    path = tmp_path_factory.mktemp("spec") / "small.yaml"
    path.write_text(SMALL)
    return ReportSpec.from_yaml(path)


@pytest.fixture(scope="module")
def work(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    assert run_cells(spec, folder, workers=2) == {}
    return folder


def test_every_cell_has_probabilities_of_every_test_patient(spec, work):
    bench = Bench(spec, work)
    for cell in cells(spec):
        saved = np.load(bench.path(cell))
        assert saved["test"].shape == (100,)
        assert ((saved["test"] >= 0) & (saved["test"] <= 1)).all()
        assert saved["n_train"] == len(bench.examples(cell, "train"))


def test_draws_are_nested_shared_by_all_rows_and_apart_from_validation_and_test(spec, work):
    bench, data = Bench(spec, work), spec.data("site B")
    seen = {
        (size, draw, row.name): set(
            bench.examples(Cell(data, "synthetic_outcome", row, size, draw), "train")["subject_id"]
        )
        for size in (30, 60)
        for draw in (0, 1)
        for row in spec.rows[:2]
    }
    for draw in (0, 1):
        assert seen[30, draw, "L2 LR"] < seen[60, draw, "L2 LR"] == seen[60, draw, "PPMI + LR"]
        assert len(seen[60, draw, "L2 LR"]) == 60
    assert seen[60, 0, "L2 LR"] != seen[60, 1, "L2 LR"]
    cell = Cell(data, "synthetic_outcome", spec.rows[0], 60, 0)
    held = {split: set(bench.examples(cell, split)["subject_id"]) for split in ("validation", "test")}
    assert (len(held["validation"]), len(held["test"])) == (50, 100)
    assert not held["validation"] & held["test"]
    assert not (held["validation"] | held["test"]) & seen[60, 0, "L2 LR"]
    other = replace(cell, draw=1)
    assert held == {split: set(bench.examples(other, split)["subject_id"]) for split in held}


def test_a_cell_is_known_by_what_determines_it_and_not_by_its_name(spec, work):
    bench, data = Bench(spec, work), spec.data("site B")
    cell = Cell(data, "synthetic_outcome", spec.rows[2], 60, 0)
    renamed = replace(cell, row=replace(cell.row, name="another name"))
    assert bench.path(renamed) == bench.path(cell)
    others = [
        replace(cell, draw=1),
        replace(cell, size="all"),
        replace(cell, row=replace(cell.row, head="bigru")),
        replace(cell, row=replace(cell.row, learning_rates=(1e-3,))),
        replace(cell, data=replace(data, options=data.options | {"seed": 1})),
    ]
    paths = {bench.path(other) for other in others}
    paths.add(Bench(replace(spec, finetuning=spec.finetuning | {"num_train_epochs": 2}), work).path(cell))
    paths.add(Bench(replace(spec, test_patients=99), work).path(cell))
    assert len(paths | {bench.path(cell)}) == 8


def test_learning_rates_are_chosen_on_validation_and_on_a_draw_that_is_not_reported(spec, work):
    bench = Bench(spec, work)
    row = RowSpec("RETAIN", "rnn", head="retain", level="visit", learning_rates=(1e-7, 1e-2))
    cell = Cell(spec.data("site B"), "synthetic_outcome", row, 60, 0)
    bench.tune(cell)
    chosen = json.loads(bench.rate_path(cell).read_text())
    scores = {float(rate): score for rate, score in chosen["validation_auroc"].items()}
    assert set(scores) == set(row.learning_rates)
    assert scores[chosen["learning_rate"]] == max(scores.values()) > min(scores.values())
    assert cell.untuned.draw not in range(spec.draws_at(60))
    assert not bench.path(cell.untuned).exists()  # its test patients were never scored
    truth = np.asarray(bench.examples(cell, "validation")["labels"])
    for draw, same in ((cell.untuned.draw, True), (0, False)):
        alone = replace(cell, draw=draw, row=replace(row, learning_rates=(1e-2,)))
        bench.run(alone)
        score = auroc(truth, np.load(bench.path(alone))["validation"])
        assert (score == pytest.approx(scores[1e-2], abs=0.01)) == same


def test_a_second_run_computes_nothing_and_one_lost_cell_is_computed_alone(spec, work):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert run_cells(spec, work, workers=1) == {}
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == before
    bench = Bench(spec, work)
    lost = Cell(spec.data("site B"), "synthetic_outcome", spec.rows[2], 60, 1)
    content = np.load(bench.path(lost))["test"]
    bench.path(lost).unlink()
    assert run_cells(spec, work, workers=1) == {}
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert {path for path in before if after[path] != before[path]} == {bench.path(lost)}
    np.testing.assert_allclose(np.load(bench.path(lost))["test"], content, atol=1e-5)


def test_a_failing_row_is_named_and_the_others_are_there(spec, work, tmp_path):
    broken = replace(spec, rows=(spec.rows[0], replace(spec.rows[2], name="Broken", learning_rates=(-1.0,))),
                     comparisons=(), sizes=(60,))  # fmt: skip
    failures = run_cells(broken, work, workers=1)
    assert len(failures) == 2
    assert all(name.startswith("Broken, site B, synthetic_outcome, 60 patients, draw") for name in failures)
    result = collect(broken, work, failures, n_resamples=20)
    assert [entry.row for entry in result.entries] == ["L2 LR"]
    assert result.missing == ["Broken, site B, synthetic_outcome, 60 patients"]


def test_figures_and_differences_are_those_of_the_cells(spec, work):
    bench, data = Bench(spec, work), spec.data("site B")
    result = collect(spec, work, {}, n_resamples=100)
    examples = bench.examples(Cell(data, "synthetic_outcome", spec.rows[0], 60, 0), "test")
    truth, patients = np.asarray(examples["labels"]), np.asarray(examples["subject_id"])

    def draws(row: RowSpec) -> np.ndarray:
        paths = [bench.path(Cell(data, "synthetic_outcome", row, 60, draw)) for draw in range(2)]
        return np.stack([np.load(path)["test"] for path in paths])

    (entry,) = [e for e in result.entries if (e.row, e.size) == ("GRU", 60)]
    scores = [auroc(truth, draw) for draw in draws(spec.rows[2])]
    assert entry.auroc.value == pytest.approx(np.mean(scores))
    assert entry.sd == pytest.approx(np.std(scores, ddof=1))
    assert (entry.draws, entry.n_test, entry.positives) == (2, 100, truth.sum())
    (difference,) = [d for d in result.differences if (d.row, d.size) == ("GRU", 60)]
    expected = crossed_bootstrap(auroc, truth, draws(spec.rows[2]), draws(spec.rows[0]), patients, n_resamples=100)
    assert difference.auroc == expected
    family = holm([d.auroc.p_value for d in result.differences])
    assert [d.p_adjusted for d in result.differences] == family
    assert len(family) == 4  # two comparisons at two sizes
    assert {d.verdict for d in result.differences} == {UNSOUND}  # 100 test patients prove nothing


def test_the_oracle_is_the_generators_and_beats_every_row(spec, work):
    result = collect(spec, work, {}, n_resamples=20)
    assert all(entry.oracle_fraction < 1 for entry in result.entries)


def test_a_report_is_written_whole(spec, work, tmp_path):
    paths = report(spec, ReportArguments(output=str(tmp_path), work=str(work), workers=1))
    assert {path.name for path in paths} == {
        "small.md", "small.csv", "small-differences.csv", "small.json", "small.png",
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "small.csv").open()))
    assert [row["row"] for row in rows[:6]] == [row.name for row in spec.rows]
    text = (tmp_path / "small.md").read_text()
    assert "Synthetic patients" in text
    assert all(row.name in text for row in spec.rows)
    assert json.loads((tmp_path / "small.json").read_text())["failures"] == {}
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(SPECS.glob("medbert_*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_specifications_are_sound(path):
    spec = ReportSpec.from_yaml(path.stem)
    assert spec.name == path.stem
    assert spec.comparisons
    assert spec.pretraining.seeds >= 3
    least = {
        size: 20 if size != "all" and size <= 300 else 10 if size != "all" and size <= 1_000 else 5
        for size in spec.sizes
    }
    assert all(spec.draws_at(size) >= draws for size, draws in least.items())
    assert spec.test_patients >= 10_000


def test_table_4_has_the_papers_rows_and_tasks():
    spec = ReportSpec.from_yaml("medbert_table4")
    assert [row.name for row in spec.rows] == [
        "GRU", "GRU + t-W2V", "GRU + Med-BERT", "Bi-GRU", "Bi-GRU + t-W2V", "Bi-GRU + Med-BERT", "RETAIN",
        "RETAIN + t-W2V", "RETAIN + Med-BERT", "Med-BERT only", "Untrained Med-BERT", "L2 LR", "RF",
    ]  # fmt: skip
    assert spec.tasks == ("diabetes_heart_failure", "pancreatic_cancer")
    assert len(spec.datasets) >= 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("head: gru,", "head: cnn,", "`head` of 'GRU' must be one of"),
        ("model: rnn, head: gru", "model: rnn, head: ffn", "recurrent `head`"),
        ("model: Bag-of-codes LR", "model: Bag LR", "`model` of 'L2 LR'"),
        ("- [GRU, L2 LR]", "- [GRU, LR]", "`comparisons`"),
        ("sizes: [60, all]", "sizes: [60, most]", "`sizes`"),
        ("draws: {60: 2, all: 1}", "draws: {60: 2}", "`draws`.*for 'all'"),
        ("draws: {60: 2, all: 1}", "draws: 0", "`draws`"),
        ("name: GRU", "nme: GRU", "unknown fields"),
        ("pretrained_on: site A", "pretrained_on: site C", "`pretrained_on`"),
        ("title: Small", "", "incomplete"),
        ("name: GRU, ", "name: L2 LR, ", "distinct names"),
    ],
)
def test_a_mistake_in_a_specification_is_named_before_anything_runs(tmp_path, old, new, message):
    path = tmp_path / "wrong.yaml"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(EhrDataError, match=message):
        ReportSpec.from_yaml(path)


def test_an_unknown_specification_lists_the_shipped_ones():
    with pytest.raises(EhrDataError, match="medbert_table4"):
        ReportSpec.from_yaml("medbert_table5")


def test_a_table_of_many_comparisons_is_drawn_as_often_as_they_need(spec, work):
    many = replace(spec, comparisons=spec.comparisons[:1] * 20)
    wanted = resamples_for(20 * len(spec.columns()) * len(spec.sizes))
    assert wanted > 1000
    (interval, *_) = [difference.auroc for difference in collect(many, work, {}).differences]
    assert interval.resamples + interval.skipped == wanted
