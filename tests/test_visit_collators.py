"""Batches of visits, and masking of sets of codes (papers.md §2.3, row 35)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ehr import EhrCodeTokenizer, GBertConfig, MedMPLMConfig
from hf_ehr.visit_collators import CodeSetMasking, VisitCollator

TOKENIZER = EhrCodeTokenizer.from_codes([f"ATC/A{n:02}" for n in range(30)])


@given(st.lists(st.integers(0, 150), min_size=1, max_size=6), st.integers(0, 9))
def test_15_percent_of_a_set_are_chosen_at_least_one_and_at_most_20(sizes, seed):
    tokenizer = EhrCodeTokenizer.from_codes([f"LOCAL/{n}" for n in range(150)])
    ids = np.where(np.arange(max(sizes)) < np.array(sizes)[:, None], np.arange(max(sizes)) + 5, 0)
    shown, labels = CodeSetMasking(tokenizer, seed=seed)(ids)
    wanted = [min(20, max(1, round(0.15 * size))) if size else 0 for size in sizes]
    assert (labels != -100).sum(axis=1).tolist() == wanted
    assert (labels == np.where(labels != -100, ids, -100)).all()
    assert (shown == ids)[labels == -100].all()


def test_of_the_chosen_80_percent_are_masked_and_10_percent_replaced_from_the_own_vocabulary():
    ids = np.tile(np.arange(5, 15), (2, 20_000, 1))
    ids[..., 7:] = [1, 3, 0]  # unknown, separator, padding: no codes
    shown, labels = CodeSetMasking(TOKENIZER, seed=1)(ids)
    chosen = labels != -100
    assert chosen.sum(axis=-1).tolist() == np.ones((2, 20_000)).tolist()
    assert (shown[..., 7:] == [1, 3, 0]).all()
    found = shown[chosen]
    kept = found == ids[chosen]
    others = found[(found != 4) & ~kept]
    assert np.mean(found == 4) == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 30, abs=0.01)
    assert set(others) == set(range(5, 35))
    assert np.bincount(np.nonzero(chosen)[2], minlength=7) / chosen.sum() == pytest.approx(np.full(7, 1 / 7), abs=0.01)


def test_each_batch_draws_anew_and_a_seed_repeats_it():
    ids = np.tile(np.arange(5, 25), (50, 1))
    masking, again = CodeSetMasking(TOKENIZER, seed=3), CodeSetMasking(TOKENIZER, seed=3)
    first, second = masking(ids)[1], masking(ids)[1]
    assert not (first == second).all()
    assert (again(ids)[1] == first).all()


def test_a_share_or_a_limit_out_of_range_is_refused():
    with pytest.raises(ValueError, match="most"):
        CodeSetMasking(TOKENIZER, most=0)
    with pytest.raises(ValueError, match="probability"):
        CodeSetMasking(TOKENIZER, probability=1.5)


ROWS = [
    {
        "visit_ids": [1, 2], "diagnosis_ids": [[5, 6], []], "medication_ids": [[7], [8, 9]],
        "note_input_ids": [[], [4, 3, 2]], "asked": [False, True], "label_ids": [[], [0, 2]],
    },
    {
        "visit_ids": [3], "diagnosis_ids": [[5]], "medication_ids": [[]], "note_input_ids": [[9]],
        "asked": [True], "label_ids": [[]],
    },
]  # fmt: skip


def test_a_batch_of_patients_by_hand():
    batch = {name: value.tolist() for name, value in VisitCollator(0, 1, num_labels=3)(ROWS).items()}
    none = [-100.0] * 3
    assert list(batch) == [
        "labels", "diagnosis_ids", "medication_ids", "note_input_ids", "note_attention_mask"
    ]  # fmt: skip
    assert batch == {
        "labels": [[none, [1, 0, 1]], [[0, 0, 0], none]],
        "diagnosis_ids": [[[5, 6], [0, 0]], [[5, 0], [0, 0]]],
        "medication_ids": [[[7, 0], [8, 9]], [[0, 0], [0, 0]]],
        "note_input_ids": [[[1, 1, 1], [4, 3, 2]], [[9, 1, 1], [1, 1, 1]]],
        "note_attention_mask": [[[0, 0, 0], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]],
    }


def test_admissions_and_coded_visits_have_no_dimension_of_visits():
    coded = [{name: row[name][:1] for name in row if name != "diagnosis_ids"} for row in ROWS]
    coded[0] |= {"asked": [True], "label_ids": [[1]]}
    batch = VisitCollator(num_labels=2)(coded)
    assert batch["labels"].tolist() == [[0, 1], [0, 0]]
    assert batch["medication_ids"].tolist() == [[7], [0]]
    admissions = [
        {"visit_ids": [1], "diagnosis_ids": [[5, 6]], "medication_ids": [[]], "labels": 1},
        {"visit_ids": [2], "diagnosis_ids": [[]], "medication_ids": [[7]], "labels": 0},
    ]
    batch = {name: value.tolist() for name, value in VisitCollator()(admissions).items()}
    assert batch == {"labels": [1, 0], "diagnosis_ids": [[5, 6], [0, 0]], "medication_ids": [[0], [7]]}


def test_hidden_codes_are_labels_of_their_own_kind():
    masking = {"diagnosis": CodeSetMasking(TOKENIZER, seed=3)}
    rows = [{"visit_ids": [n], "diagnosis_ids": [[5 + n, 6 + n]], "medication_ids": [[7]]} for n in range(20)]
    batch = VisitCollator(masking=masking)(rows)
    chosen = batch["diagnosis_labels"] != -100
    assert chosen.sum(dim=-1).flatten().tolist() == [1] * 20
    truth = VisitCollator()(rows)["diagnosis_ids"]
    assert (batch["diagnosis_labels"][chosen] == truth[chosen]).all()
    assert (batch["diagnosis_ids"][~chosen] == truth[~chosen]).all()
    assert "medication_labels" not in batch


def test_padding_ids_come_from_the_configuration_and_labels_need_their_number():
    notes = {"model_type": "roberta", "pad_token_id": 1, "hidden_size": 8, "num_attention_heads": 1}
    collate = VisitCollator.of(MedMPLMConfig(note_config=notes), num_labels=3)
    assert (collate.pad_token_id, collate.note_pad_token_id) == (0, 1)
    assert VisitCollator.of(GBertConfig()).pad_token_id == 0
    with pytest.raises(ValueError, match="`num_labels` must be given"):
        VisitCollator()(ROWS)
