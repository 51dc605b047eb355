"""Reports of coding experiments: what runs, what is computed once, what is named, and what the tables say."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from transformers import TrainingArguments

from hf_ehr.coder_evaluation import CoderEvaluateArguments, evaluate_coder, sampled
from hf_ehr.experiments import CodingSpec, ReportArguments, load_spec, report
from hf_ehr.experiments.coding import CodingBench, cells, run
from hf_ehr.experiments.coding.cells import stages
from hf_ehr.experiments.coding.materials import CodedNotes, checkpoint_folder, write_categories
from hf_ehr.experiments.coding.spec import CodingData
from hf_ehr.experiments.coding.tables import read_rows
from hf_ehr.experiments.spec import SPECS
from hf_ehr.multilabel import multilabel_scores
from hf_ehr.notes import NoteFolder
from hf_ehr.schema import EhrDataError
from hf_ehr.training import CoderArguments, NoteArguments, predict_codes, train_coder

SMALL = """
kind: coding
title: Small
datasets:
  - name: world
    source: synthetic
    options: {patients: 60, codes: 20, codes_per_note: 3, missed: 0.02}
    min_patients: 8
draws: 2
tokenizer: {vocab_size: 400, min_patients: 2}
encoders: {tiny: {preset: tiny, hidden_size: 16, intermediate_size: 32, num_attention_heads: 2}}
pretraining:
  seeds: 1
  options: {next_sentence: false}
  training: {num_train_epochs: 1, learning_rate: 1.0e-3, save_strategy: "no"}
finetuning: {num_train_epochs: 2, per_device_train_batch_size: 8}
rows:
  - {name: TF-IDF, model: tfidf_lr}
  - {name: CAML, model: caml, model_options: {embedding_size: 8, hidden_size: 8}, learning_rates: [1.0e-5, 5.0e-2]}
  - {name: XML, model: ehrbert, size: tiny, init: pretrained, max_length: 128}
  - name: XML, bf16
    model: ehrbert
    size: tiny
    init: random
    label_init: random
    max_length: 128
    training: {bf16: true}
  - {name: BERT, model: ehrbert, encoder: "${NO_SUCH_ENCODER}", head: cls}
comparisons:
  - [XML, TF-IDF]
  - [BERT, XML]
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> CodingSpec:
    path = tmp_path_factory.mktemp("spec") / "small.yaml"
    path.write_text(SMALL)
    return load_spec(path)


@pytest.fixture(scope="module")
def work(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    assert run(spec, folder, workers=2) == {}
    return folder


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_cell_scores_every_note_of_its_split_with_every_code(spec, work):
    bench = CodingBench(spec, work)
    scope = bench.notes(spec.datasets[0]).scope
    assert len(cells(spec)) == 1 + 2 + 2 + 2  # one fit of the baseline, two seeds of what is trained, none of BERT
    for cell in cells(spec):
        kept = np.load(bench.path(cell))
        for split in ("validation", "test"):
            assert kept[split].shape == (len(scope.note_ids[split]), len(scope.codes))
            assert ((kept[split] >= 0) & (kept[split] <= 1)).all()
        assert int(kept["epochs"]) in ((1, 2) if cell.row.neural else (0,))
    splits = [set(scope.subjects[split].tolist()) for split in ("train", "validation", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_labels_in_and_out_of_scope_are_all_labels(spec, work):
    notes = CodingBench(spec, work).notes(spec.datasets[0])
    labels = notes.arguments.folder.labels().to_pylist()
    scope = notes.scope
    for split in ("train", "validation", "test"):
        place = {name: index for index, name in enumerate(scope.note_ids[split])}
        codes, carried = [set() for _ in place], [set() for _ in place]
        for row in labels:
            if row["note_id"] in place:
                codes[place[row["note_id"]]].add(row["code"])
                if row["provenance"] == "imputed":
                    carried[place[row["note_id"]]].add(row["code"])
        inside = [{scope.codes[i] for i in row.indices} for row in scope.truth[split]]
        assert inside == [each & set(scope.codes) for each in codes]
        imputed = [{scope.codes[i] for i in row.indices} for row in scope.imputed[split]]
        assert imputed == [each & set(scope.codes) for each in carried]
        assert scope.out_of_scope[split].tolist() == [len(each - set(scope.codes)) for each in codes]
    assert scope.out_of_scope["test"].sum() > 0  # 20 codes of 8 patients and more: the rarest are none
    assert scope.never_seen["train"].sum() == 0
    assert (scope.never_seen["test"] <= scope.out_of_scope["test"]).all()


def test_a_second_run_computes_nothing_and_one_lost_cell_is_computed_alone(spec, work):
    before = files(work)
    assert run(spec, work, workers=1) == {}
    assert files(work) == before
    bench = CodingBench(spec, work)
    lost = bench.path(cells(spec)[-1])
    content = np.load(lost)["test"]
    lost.unlink()
    assert run(spec, work, workers=1) == {}
    after = files(work)
    assert {path for path in before if after[path] != before[path]} == {lost}
    np.testing.assert_allclose(np.load(lost)["test"], content, atol=1e-4)


def test_a_cell_is_known_by_what_determines_it_and_not_by_its_name(spec, work):
    bench, cell = CodingBench(spec, work), next(cell for cell in cells(spec) if cell.row.name == "XML")
    assert bench.path(replace(cell, row=replace(cell.row, name="another"))) == bench.path(cell)
    others = [
        replace(cell, draw=7),
        replace(cell, row=replace(cell.row, head="cls")),
        replace(cell, row=replace(cell.row, label_init="random")),
        replace(cell, data=replace(cell.data, min_patients=7)),
        replace(cell, data=replace(cell.data, level="category")),
    ]
    paths = {bench.path(cell), *(bench.path(other) for other in others)}
    paths.add(CodingBench(replace(spec, finetuning={"num_train_epochs": 3}), work).path(cell))
    more = replace(spec.pretraining, options={"next_sentence": True})
    paths.add(CodingBench(replace(spec, pretraining=more), work).path(cell))
    assert len(paths) == 8


def test_learning_rates_are_chosen_on_validation_with_a_seed_that_is_not_reported(spec, work):
    bench = CodingBench(spec, work)
    cell = next(cell for cell in cells(spec) if cell.row.name == "CAML")
    chosen = json.loads(bench.rate_path(cell).read_text())
    found = {float(rate): score for rate, score in chosen["validation_auroc_micro"].items()}
    assert found[chosen["learning_rate"]] == max(found.values()) > min(found.values())
    assert cell.untuned.draw not in range(spec.draws)
    assert not bench.path(cell.untuned).exists()  # its test notes were never scored


def test_learning_rates_are_compared_by_the_figure_that_compares_epochs(spec, work):
    cell = next(cell for cell in cells(spec) if cell.row.name == "CAML")
    cell = replace(cell, row=replace(cell.row, learning_rates=(1e-3, 3e-2)))
    settings = spec.finetuning | {"metric_for_best_model": "eval_map", "num_train_epochs": 1}
    bench = CodingBench(replace(spec, finetuning=settings), work)
    bench.tune(cell)
    chosen = json.loads(bench.rate_path(cell).read_text())
    found = {float(rate): score for rate, score in chosen["validation_map"].items()}
    assert found[chosen["learning_rate"]] == max(found.values())
    model, tokenizer, _ = bench._fitted(cell.untuned, 1e-3)
    examples = bench._examples(cell, "validation", tokenizer)
    assert found[1e-3] == pytest.approx(multilabel_scores(predict_codes(model, examples, tokenizer))["map"], abs=1e-3)


def test_no_model_is_shown_a_test_code(spec, work, monkeypatch):
    cell = next(cell for cell in cells(spec) if cell.row.name == "XML, bf16")
    bench, shown = CodingBench(spec, work), []

    def watched(model, examples, tokenizer):
        shown.append("labels" in examples.column_names)
        return predict_codes(model, examples, tokenizer)

    monkeypatch.setattr(sys.modules[CodingBench.__module__], "predict_codes", watched)
    bench._neural(cell)
    assert shown == [False, False]


def test_a_report_is_written_whole_and_says_what_did_not_run(spec, work, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_ENCODER", raising=False)
    paths = report(spec, ReportArguments(output=str(tmp_path), work=str(work), workers=1))
    suffixes = (".md", ".csv", "-differences.csv", "-codes.csv", ".json", ".png", "-codes.png")
    assert [path.name for path in paths] == [f"small{suffix}" for suffix in suffixes]
    assert all(path.stat().st_size for path in paths)
    rows = list(csv.DictReader((tmp_path / "small.csv").open()))
    assert [row["row"] for row in rows] == ["TF-IDF", "CAML", "XML", "XML, bf16"]
    _, scored, _ = read_rows(CodingBench(spec, work), spec.datasets[0])
    draws = [multilabel_scores(one)["auroc_micro"] for one in scored["CAML"].test]
    assert float(rows[1]["auroc_micro"]) == pytest.approx(np.mean(draws), abs=1e-6)
    assert float(rows[1]["auroc_micro_sd"]) == pytest.approx(np.std(draws, ddof=1), abs=1e-6)
    text = (tmp_path / "small.md").read_text()
    assert "- Not run: BERT: set NO_SUCH_ENCODER to a folder or Hub id of that encoder." in text
    assert "Synthetic notes" in text
    differences = list(csv.DictReader((tmp_path / "small-differences.csv").open()))
    assert [(one["row"], one["metric"]) for one in differences] == [("XML", "auroc_micro"), ("XML", "auroc_macro")]
    assert json.loads((tmp_path / "small.json").read_text())["failures"] == {}
    codes = list(csv.DictReader((tmp_path / "small-codes.csv").open()))
    assert len(codes) == 4 * len(CodingBench(spec, work).notes(spec.datasets[0]).scope.codes)


def test_a_failing_row_is_named_and_the_others_are_there(spec, work, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_SUCH_ENCODER", str(tmp_path / "nothing"))
    failures = run(replace(spec, rows=(spec.rows[0], spec.rows[-1]), comparisons=()), work, workers=1)
    assert sorted(failures) == ["BERT, world, seed 0", "BERT, world, seed 1"]
    _, rows, missing = read_rows(CodingBench(spec, work), spec.datasets[0])
    assert list(rows) == ["TF-IDF", "CAML", "XML", "XML, bf16"]
    assert missing == ["BERT, world"]


def test_a_coder_is_evaluated_beside_its_rivals_and_gets_a_card(spec, work, tmp_path):
    bench = CodingBench(spec, work)
    cell = next(cell for cell in cells(spec) if cell.row.name == "XML")
    notes = bench.notes(cell.data)
    encoder = checkpoint_folder(notes, spec, cell.row, 0)
    data = NoteArguments(data=notes.arguments.data, max_length=128)
    settings = {"num_train_epochs": 1, "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    training = TrainingArguments(output_dir=str(tmp_path / "coder"), **settings)
    train_coder(data, CoderArguments(model=str(encoder), min_patients=8), training)
    table = evaluate_coder(CoderEvaluateArguments(str(tmp_path / "coder"), str(tmp_path / "evaluation")))
    rows = list(csv.DictReader(table.with_suffix(".csv").open()))
    assert [row["row"] for row in rows] == ["Frequency", "String match", "TF-IDF LR", "EhrBertForICDCoding"]
    _, scored, _ = read_rows(bench, cell.data)
    same = multilabel_scores(scored["TF-IDF"].test[0])["auroc_macro"]  # fitted on the same notes, scored on the same
    assert float(rows[2]["auroc_macro"]) == pytest.approx(same, abs=1e-5)
    assert float(rows[0]["auroc_macro"]) == 0.5  # the same for every note
    assert rows[0]["collapsed"] == "0"  # by design
    card = (tmp_path / "coder" / "README.md").read_text()
    assert "not a medical device" in card
    assert "| TF-IDF LR |" in card
    assert "### As stored in the configuration" in card
    assert "### As stored in the configuration" in table.read_text()
    with pytest.raises(EhrDataError, match="finetune ehrbert"):
        evaluate_coder(CoderEvaluateArguments(str(encoder), str(tmp_path / "nothing")))


def test_explained_notes_are_drawn_from_the_whole_folder_and_the_same_for_a_seed():
    ids = pa.array([f"n{number:03}" for number in range(200)])
    few, more, other = (sampled(ids, most, seed).to_pylist() for most, seed in ((20, 0), (50, 0), (20, 1)))
    assert few == more[:20] == sampled(ids, 20, 0).to_pylist()
    assert set(few) != set(other)
    assert max(few) > "n100"
    assert sorted(sampled(ids, 500, 0).to_pylist()) == ids.to_pylist()


def test_categories_hold_each_code_once_a_note(spec, work, tmp_path):
    source = CodingBench(spec, work).notes(spec.datasets[0]).arguments.folder
    write_categories(source, tmp_path / "categories")
    found = NoteFolder.open(tmp_path / "categories")
    expected = {(row["note_id"], row["code"].split(".")[0]) for row in source.labels().to_pylist()}
    labels = [(row["note_id"], row["code"]) for row in found.labels().to_pylist()]
    assert len(labels) == len(expected)
    assert set(labels) == expected
    assert sum(found.codes()["documents"].to_pylist()) == len(expected)
    assert found.labels().num_rows < source.labels().num_rows  # siblings on one note are one category


def test_a_prepared_folder_is_read_where_it_lies(spec, work, tmp_path):
    made = CodingBench(spec, work).notes(spec.datasets[0])
    data = CodingData("again", folder=made.arguments.data, min_patients=8)
    notes = CodedNotes(data, spec.tokenizer, tmp_path)
    notes.make()
    assert notes.scope.codes == made.scope.codes
    assert len(notes.tokenizer()) == len(made.tokenizer()) == 400
    assert (notes.scope.truth["test"] != made.scope.truth["test"]).nnz == 0


def test_codes_and_their_categories_share_texts_tokenizer_and_encoders(spec, tmp_path):
    fine = replace(spec.datasets[0], options={**spec.datasets[0].options, "patients": 40}, min_patients=4)
    both = replace(
        spec, datasets=(fine, replace(fine, name="categories", level="category")), rows=spec.rows[2:3], comparisons=()
    )
    bench = CodingBench(both, tmp_path)
    one, other = (bench.notes(data) for data in both.datasets)
    one.make()
    fitted = files(one.tokenizer_folder)
    other.make()
    assert other.tokenizer_folder == one.tokenizer_folder
    assert files(one.tokenizer_folder) == fitted
    assert other.texts("test") == one.texts("test")
    assert {code.split(".")[0] for code in one.scope.codes} <= set(other.scope.codes)
    assert not any("." in code for code in other.scope.codes)
    found = stages(bench)
    assert len(found["Pre-training"]) == spec.pretraining.seeds
    assert len({job.done for job in found["Cells"]}) == len(found["Cells"]) == 2 * spec.draws


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: caml", "model: cmal", "`model` of 'CAML' must be one of"),
        ("init: pretrained", "init: trained", "`init` of 'XML'"),
        ("init: pretrained, ", "", "`init` must be `random` or `pretrained`"),
        ("size: tiny, ", "", "takes a `size` or an `encoder`"),
        ("size: tiny", "size: huge", "`size` of 'XML' must be one of tiny"),
        ("draws: 2", "draws: 0", "`draws`"),
        ("name: CAML", "nme: CAML", "unknown fields"),
        ("[BERT, XML]", "[BERT, CAML 2]", "`comparisons`"),
        ("source: synthetic", "source: synthetic\n    folder: a", "either a `source` or a prepared `folder`"),
        ("min_patients: 8", "level: chapter", "`level` of 'world'"),
    ],
)
def test_a_mistake_in_a_specification_is_named_before_anything_runs(tmp_path, old, new, message):
    path = tmp_path / "wrong.yaml"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(EhrDataError, match=message):
        load_spec(path)


@pytest.mark.parametrize("path", sorted(SPECS.glob("bertxml_*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_specifications_are_sound(path):
    spec = load_spec(path.stem)
    assert isinstance(spec, CodingSpec)
    assert spec.name == path.stem
    assert spec.comparisons
    assert spec.draws >= 3
    assert spec.pretraining.seeds >= 3


def test_table_2_has_the_papers_rows_in_their_order():
    rows = [row.name for row in load_spec("bertxml_table2").rows]
    assert rows[:14] == [
        "Logistic regression (BoW)", "Multi-head attention (bi-LSTM)", "BERT base 512", "BERT base 1024",
        "Fine-tuned BERT 1024", "BioBERT 512", "ClinicalBERT 512", "EHR Small 512", "EHR Small 1024",
        "Small + XML 1024", "EHR Big 512", "EHR Big 1024", "Big + XML 512", "Big + XML 1024",
    ]  # fmt: skip


def test_ten_seeds_and_an_opaque_control_stand_behind_label_descriptions():
    spec = load_spec("bertxml_label_init")
    assert spec.draws >= 10
    assert {row.label_init for row in spec.rows} == {"random", "final_layer", "word_embeddings", "parent_sum"}
    assert "auroc_macro (opaque)" in spec.compared
    assert any(row.training.get("bf16") for row in spec.rows)
