"""Groups of labels, and their figures from the one call that gives all others."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ehr.code_groups import band_groups, category_of_each, chapter_groups, vocabulary_groups
from hf_ehr.multilabel import hierarchical_scores, multilabel_scores
from hf_ehr.multilabel_predictions import MultilabelPredictions

CODES = ["ICD10CM/E11.9", "ICD10CM/E11.65", "ICD10CM/I10", "ICD10CM/I50.9", "ICD10PCS/0DTJ4ZZ", "LOCAL/17"]
COUNTS = [3, 10, 11, 50, 51, 2000]


def held(scores, targets) -> MultilabelPredictions:
    predictions = MultilabelPredictions(scores.shape[1])
    predictions.add(scores, targets)
    return predictions


def drawn(seed: int):
    rng = np.random.default_rng(seed)
    targets = (rng.random((80, len(CODES))) < 0.3).astype(int)
    return rng.random(targets.shape).round(2) * 0.7 + 0.3 * targets, targets


def test_bands_are_closed_above_and_empty_ones_left_out():
    found = {name: np.flatnonzero(members).tolist() for name, members in band_groups(COUNTS).items()}
    bands = {"≤10": [0, 1], "11–50": [2, 3], "51–200": [4], ">1000": [5]}
    assert found == {f"{name} training notes": members for name, members in bands.items()}
    assert list(band_groups([1999, 2000], (1999,))) == ["≤1999 training notes", ">1999 training notes"]
    with pytest.raises(ValueError, match="ascend"):
        band_groups(COUNTS, (50, 10))


def test_chapters_vocabularies_and_categories_hold_the_codes_that_are_in_them():
    chapters = [np.flatnonzero(members).tolist() for members in chapter_groups(CODES).values()]
    assert sorted(chapters) == [[0, 1], [2, 3]]
    found = {name: np.flatnonzero(members).tolist() for name, members in vocabulary_groups(CODES).items()}
    assert found == {"ICD10CM": [0, 1, 2, 3], "ICD10PCS": [4], "LOCAL": [5]}
    assert vocabulary_groups(CODES[:4]) == {}
    assert category_of_each(CODES[:3]) == [["ICD10CM/E11"], ["ICD10CM/E11"], ["ICD10CM/I10"]]
    assert category_of_each(CODES[5:]) == [[]]


def test_one_call_scores_each_group_as_if_it_were_alone():
    scores, targets = drawn(0)
    plain = multilabel_scores(held(scores, targets), thresholds=0.5)
    found = multilabel_scores(held(scores, targets), thresholds=0.5, codes=CODES, train_counts=COUNTS)
    assert {name: found[name] for name in plain} == plain
    groups = band_groups(COUNTS) | chapter_groups(CODES) | vocabulary_groups(CODES)
    assert len(groups) == 4 + 2 + 3
    for name, members in groups.items():
        alone = multilabel_scores(held(scores[:, members], targets[:, members]), thresholds=0.5)
        figures = ("auroc_macro", "average_precision_macro", "f1_micro", "f1_macro", "f1_macro_caml", "positives")
        assert [found[f"{figure} ({name})"] for figure in figures] == pytest.approx([alone[one] for one in figures])
    above = hierarchical_scores(held(scores, targets), category_of_each(CODES), 0.5)
    assert {name: found[f"category_{name}"] for name in above} == above


@pytest.mark.parametrize("wrong", [{"codes": CODES[1:]}, {"train_counts": COUNTS[1:]}])
def test_a_group_of_another_number_of_labels_is_refused(wrong):
    with pytest.raises(ValueError, match=r"one a label \(6\), got 5"):
        multilabel_scores(held(*drawn(1)), **wrong)
