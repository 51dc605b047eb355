"""The tables of code assignment: figures by hand, differences, codes out of scope, collapse, and files."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from scipy import sparse

from hf_ehr import EhrBertConfig
from hf_ehr.code_thresholds import tune_thresholds
from hf_ehr.coding_report import (
    CodedRow,
    CodingTest,
    adjusted,
    compare_rows,
    is_collapsed,
    provenance_scores,
    score_row,
)
from hf_ehr.coding_tables import code_records, difference_lines, sections, stored_lines, write_coding_tables
from hf_ehr.intervals import NO_DIFFERENCE, Interval, crossed_bootstrap
from hf_ehr.multilabel import document_precision, multilabel_scores
from hf_ehr.multilabel_predictions import MultilabelPredictions

CODES = ["ICD10CM/E11.9", "ICD10CM/E11.65", "ICD10CM/I10", "ICD10CM/I50.9"]
# Three notes; nobody has the last code.
SCORES = np.array([[0.9, 0.8, 0.3, 0.1], [0.7, 0.2, 0.6, 0.4], [0.1, 0.6, 0.4, 0.2]])
TARGETS = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]])


def held(scores, targets=TARGETS) -> MultilabelPredictions:
    predictions = MultilabelPredictions(np.shape(scores)[1])
    predictions.add(np.asarray(scores), targets)
    return predictions


def small_test(**fields) -> CodingTest:
    given = {
        "name": "small", "codes": CODES, "descriptions": ["a", None, "b|c", "d"],
        "train_counts": np.array([40, 3, 60, 1]), "patients": np.arange(3), "out_of_scope": np.zeros(3, int),
        "band_edges": (10, 50),
    }  # fmt: skip
    return CodingTest(**(given | fields))


def drawn_rows(seed=0, documents=80, labels=8) -> tuple[CodingTest, CodedRow, CodedRow]:
    """A test set with two notes a patient, a row of three seeds that knows something, and one that knows less."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((documents, labels)) < 0.3).astype(int)

    def row(name, strength, seeds):
        def draw():
            logits = strength * (truth - 0.5) + rng.normal(size=truth.shape)
            return held((1 / (1 + np.exp(-logits))).astype(np.float32), truth)

        return CodedRow(name, [draw() for _ in range(seeds)], [draw() for _ in range(seeds)], 2.0, [1, 2, 3][:seeds])

    codes = [f"ICD10CM/{letter}10" for letter in "ABCDEFGH"[:labels]]
    test = CodingTest(
        "drawn", codes, codes, 5 * np.arange(1, labels + 1) ** 2, np.arange(documents) // 2, np.zeros(documents, int),
        (20, 100), {"first": np.arange(labels) < 4},
    )  # fmt: skip
    return test, row("strong", 4.0, 3), row("weak", 1.0, 1)


def test_the_figures_of_a_small_table_by_hand():
    row = CodedRow("row", [held(SCORES)], [held(SCORES)])
    assert row.thresholds() == [pytest.approx(0.25)]  # all true codes lie at .3 and above, 2 × 5 / (8 + 5) is the best
    found = score_row(small_test(), row, n_resamples=5)
    # flagged: A B C | A C D | B C; hits: A C | A | B C
    assert found.figures["f1_micro"].value == pytest.approx(2 * 5 / (8 + 5))
    assert found.figures["map"].value == pytest.approx(((1 + 2 / 3) / 2 + 1 + 1) / 3)
    assert found.figures["auroc_macro"].value == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert (found.points["labels_evaluated"], found.points["labels_dropped"]) == (3, 1)
    np.testing.assert_allclose(found.auroc, [1, 0.5, 0, np.nan])
    assert found.positives.tolist() == [2, 1, 2, 0]
    # bands: ≤10 has B and the last, 11–50 A, >50 C
    bands = ["≤10", "11–50", ">50"]
    assert [found.figures[f"auroc_macro ({band} training notes)"].value for band in bands] == [0.5, 1, 0]
    # chapters E00-E89 (A, B) and I00-I99 (C and the last)
    assert found.figures["auroc_macro (ICD10CM/E00-E89)"].value == pytest.approx(0.75)
    assert found.figures["auroc_macro (ICD10CM/I00-I99)"].value == 0
    # three-character categories, counted: predicted E11 ×2 I10 | E11 I10 I50 | E11 I10; true E11 I10 | E11 | E11 I10
    assert found.points["category_f1_counts"] == pytest.approx(2 * 5 / (8 + 5))
    assert found.points["category_f1_sets"] == pytest.approx(2 * 5 / (7 + 5))
    assert math.isnan(found.sd["map"])
    shares = [found.routing[decision]["share_of_codes"] for decision in ("ignore", "review", "auto-code")]
    assert sum(shares) == pytest.approx(1)
    assert found.routing["ignore"]["share_of_codes"] == 0


def test_codes_out_of_scope_count_as_missed_so_that_few_labels_do_not_flatter():
    row = CodedRow("row", [held(SCORES)], [held(SCORES)])
    found = score_row(small_test(out_of_scope=np.array([1, 0, 3])), row, n_resamples=5)
    # 5 hits, 8 assigned, 5 true codes in scope and 4 beyond
    assert found.figures["recall_all_codes"].value == pytest.approx(5 / 9)
    assert found.figures["f1_all_codes"].value == pytest.approx(2 * 5 / (8 + 9))
    assert found.figures["f1_micro"].value == pytest.approx(2 * 5 / (8 + 5))
    text = "\n".join(sections(small_test(out_of_scope=np.array([1, 0, 3])), [found]))
    assert "Recall, all codes" in text
    assert "MAP, all codes" in text
    # (1 + 2/3 of the sum of two) over 3 codes, 1 over 1, 2 over 5
    assert found.figures["map_all_codes"].value == pytest.approx(((1 + 2 / 3) / 3 + 1 + 2 / 5) / 3)
    assert "0.556" in text
    plain = score_row(small_test(), row, n_resamples=5)
    assert not {"recall_all_codes", "map_all_codes"} & set(plain.figures)  # it would say the same twice


def test_the_thresholds_of_a_configuration_are_evaluated_as_they_are_stored():
    config = EhrBertConfig.tiny(
        vocab_size=9, thresholds={CODES[0]: 0.8, CODES[1]: 0.5}, common_threshold=0.35,
        auto_code_thresholds={CODES[0]: 0.85, CODES[1]: 2.0},
    )  # fmt: skip
    lines = stored_lines(config, small_test(), held(SCORES))
    # Reviewed from .8 .5 .35 .35 on: A B | C D | B C, hits A | – | B C. Coded alone: A of the first note.
    first, second = (line.split(" | ") for line in lines if "thresholds`" in line and line.startswith("|"))
    assert first[1].startswith(f"{2 * 3 / (6 + 5):.3f}")
    f1 = [2 / (1 + 2), 2 / (2 + 1), 2 / (2 + 2)]  # of A, B, C
    assert first[2].startswith(f"{np.mean(f1):.3f}")
    assert [cell.strip(" |") for cell in first[3:]] == ["0.500", "0.600", "2.000"]
    assert [cell.strip(" |") for cell in second[3:]] == ["1.000", "0.200", "0.333"]
    table = [line for line in lines if line.startswith(("| auto", "| review", "| ignore"))]
    assert table == [
        "| auto-code | 0.333 | 1.000 | 0.200 |",
        "| review | 1.667 | 0.400 | 0.400 |",
        "| ignore | 2.000 | 0.333 | 0.400 |",
    ]


def test_codes_carried_over_are_scored_apart_by_hand():
    row = CodedRow("row", [held(SCORES)], [held(SCORES)])
    imputed = sparse.csr_array(np.array([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]))
    test = small_test(imputed=imputed)
    found = provenance_scores(test, row.test[0], 0.5)
    # Native A.9 A.7 B.6, imputed C.3 C.4; true codes of the other kind are left out of a ranking.
    assert (found["codes_native"], found["codes_imputed"]) == (3, 2)
    assert (found["recall_native"], found["recall_imputed"]) == (1, 0)
    # Without .3 and .4: .9 + | .8 | .7 + | .6 + tied with a negative .6
    assert found["average_precision_micro_native"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # Without .9 .7 .6: .8 | .6 | .4 + tied with .4 | .3 +
    assert found["average_precision_micro_imputed"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    result = score_row(test, row, n_resamples=5)
    assert result.points["recall_imputed"] == 1  # the row's own threshold is .25
    assert "| row | 1.000 | 0.756 | 1.000 | 0.325 |" in sections(test, [result])
    for none in (None, sparse.csr_array((3, 4))):
        plain = score_row(small_test(imputed=none), row, n_resamples=5)
        assert "recall_imputed" not in plain.points
        assert not any("carried over" in line for line in sections(small_test(), [plain]))


def test_seeds_are_averaged_and_their_spread_is_that_of_the_single_figures():
    test, strong, _ = drawn_rows()
    found = score_row(test, strong, n_resamples=20)
    alone = [
        multilabel_scores(one, thresholds=limit) for one, limit in zip(strong.test, strong.thresholds(), strict=True)
    ]
    for name in ("auroc_micro", "f1_micro", "map", "precision_at_5"):
        values = [one[name] for one in alone]
        assert found.figures[name].value == pytest.approx(np.mean(values), abs=1e-6)
        assert found.sd[name] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert found.points["f1_macro_caml"] == pytest.approx(np.mean([one["f1_macro_caml"] for one in alone]))
    assert (found.draws, list(found.epochs)) == (3, [1, 2, 3])


def test_thresholds_are_those_of_validation():
    _, strong, _ = drawn_rows()
    swapped = CodedRow("swapped", strong.test, strong.validation)
    expected = [tune_thresholds(one).common for one in strong.validation]
    assert strong.thresholds() == expected
    assert all(mine != other for mine, other in zip(expected, swapped.thresholds(), strict=True))


def test_a_difference_is_the_paired_one_and_its_interval_that_of_the_same_resamples():
    test, strong, weak = drawn_rows()
    (difference,) = compare_rows(test, strong, weak, ["map", "auroc_macro (nobody)"], n_resamples=60)
    own = np.stack([document_precision(one.cells, 80) for one in strong.test])
    their = np.broadcast_to(document_precision(weak.test[0].cells, 80), own.shape)
    kept = ~np.isnan(their[0])

    def mean(y, p, weight):
        return float(np.average(p, weights=weight))

    expected = crossed_bootstrap(mean, np.zeros(kept.sum()), own[:, kept], their[:, kept], test.patients[kept])
    assert difference.difference.value == pytest.approx(expected.value)
    # Notes without a code drop out here and are drawn there: the ends agree up to the resampling.
    assert difference.difference.low == pytest.approx(expected.low, abs=0.03)
    assert difference.difference.high == pytest.approx(expected.high, abs=0.03)
    assert difference.positives == weak.test[0].targets().sum()


def test_verdicts_are_adjusted_over_the_whole_table_and_nothing_follows_from_few_codes():
    test, strong, weak = drawn_rows()
    many = compare_rows(test, strong, weak, ["auroc_micro", "auroc_macro (first)"], n_resamples=200)
    same = compare_rows(test, strong, strong, ["auroc_micro"], n_resamples=200)
    assert [one.verdict for one in adjusted([*many, *same])] == ["higher", "higher", NO_DIFFERENCE]
    assert [one.p_adjusted for one in adjusted(many)] == pytest.approx([2 * 2 / 201] * 2)
    assert [one.p_adjusted for one in adjusted([*many, *same])][:2] == pytest.approx([3 * 2 / 201] * 2)
    few = CodedRow("few", [held(SCORES)], [held(SCORES)])
    (one,) = adjusted(compare_rows(small_test(), few, few, ["map"], n_resamples=5))
    assert one.verdict.startswith("nothing concluded")
    assert "nothing concluded" in "\n".join(difference_lines([one]))


def test_a_run_whose_scores_say_nothing_is_counted_as_collapsed():
    rng = np.random.default_rng(0)
    by_label, by_note = np.tile(rng.random(4), (3, 1)), np.tile(rng.random((3, 1)), 4)
    assert is_collapsed(held(by_label), 0.5)
    assert is_collapsed(held(by_note), 0.5)
    assert is_collapsed(held(SCORES), 0.05)  # recall 1: everything is assigned
    assert not is_collapsed(held(SCORES), 0.5)
    same = [held(np.tile(rng.random(4), (3, 1))) for _ in range(2)]
    counts = {
        trained: score_row(small_test(), CodedRow("same", same, same, trained=trained), n_resamples=5).collapsed
        for trained in (True, False)
    }
    assert counts == {True: 2, False: 0}  # the frequency of codes is the same for every note by design


def test_scores_of_another_test_set_are_refused():
    with pytest.raises(ValueError, match=r"must be \(3, 4\) scores, got \(3, 3\)"):
        score_row(small_test(), CodedRow("row", [held(SCORES)], [held(SCORES[:, :3], TARGETS[:, :3])]))


def test_files_are_written_whole_and_say_the_same(tmp_path):
    test, strong, weak = drawn_rows()
    results = [score_row(test, row, n_resamples=20) for row in (weak, strong)]
    differences = adjusted(compare_rows(test, strong, weak, ["auroc_micro"], n_resamples=20))
    text = "\n".join(sections(test, results))
    paths = write_coding_tables(tmp_path / "table", text, [(test, results)], differences, {"note": 1})
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["row"] for row in rows] == ["weak", "strong"]
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["note"] == 1
    for row, result, written in zip(rows, results, content["results"], strict=True):
        assert float(row["auroc_micro_low"]) == result.figures["auroc_micro"].low
        assert written["figures"]["map"]["high"] == result.figures["map"].high
        assert str(result.figures["auroc_macro"]) in text
    assert rows[0]["auroc_micro_sd"] == ""  # one seed has no spread
    codes = list(csv.DictReader((tmp_path / "table-codes.csv").open()))
    assert len(codes) == 2 * len(test.codes)
    assert {row["train_notes"] for row in codes} == {str(count) for count in test.train_counts}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("table.png", "table-codes.png"))


def test_a_code_keeps_its_description_and_an_undefined_figure_stays_empty():
    row = CodedRow("row", [held(SCORES)], [held(SCORES)])
    found = score_row(small_test(), row, n_resamples=5)
    records = code_records(small_test(), found)
    assert [one["description"] for one in records] == ["a", None, "b|c", "d"]
    assert [one["test_notes"] for one in records] == [2, 1, 2, 0]
    assert math.isnan(records[3]["auroc"])
    table = [line for line in sections(small_test(), [found]) if line.startswith("| ICD10CM/")]
    assert table[0].startswith("| ICD10CM/E11.9 | a | 2 | 1.000 |")
    assert r"b\|c" in table[1]  # a bar in a name does not break the row
    assert table[3].endswith("| 0 | – |")


def test_an_undefined_difference_is_a_dash():
    undefined = Interval(math.nan, math.nan, math.nan)
    test, strong, _ = drawn_rows()
    (one,) = compare_rows(test, strong, strong, ["map"], n_resamples=5)
    line = difference_lines([type(one)(**(vars(one) | {"difference": undefined}))])[-1]
    assert " – " in line
