"""Batches of stays and admissions hold what their rows hold, each at its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_ehr.models.hourly_series import HourlySeries
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.stay_collators import AdmissionCollator, CodeHiding, StayCollator, VariableHiding

STAYS = [
    {"stay_hours": 2, "feature_ids": [1, 3], "feature_counts": [2, 0], "demographics": [0.5, 1.0], "labels": 1},
    {"stay_hours": 0, "feature_ids": [], "feature_counts": [], "demographics": [0.0, 0.0], "labels": 0},
    {"stay_hours": 1, "feature_ids": [0], "feature_counts": [1], "demographics": [2.0, 1.0], "labels": 0},
]
DIAGNOSES = EhrCodeTokenizer.from_codes([f"ICD10CM/A0{n}" for n in range(10)])
DRUGS = EhrCodeTokenizer.from_codes([f"ATC/A{n:02}" for n in range(10)])


def admission(stays=(), diagnoses=(), drugs=(), note=None, **fields):
    """A row of stays (rows of STAYS) and codes."""
    row = {name: [value for stay in stays for value in stay[name]] for name in ("feature_ids", "feature_counts")}
    row["demographics"] = [value for stay in stays for value in stay["demographics"]]
    row |= {"stay_hours": [stay["stay_hours"] for stay in stays], **fields}
    row["diagnosis_ids"] = DIAGNOSES.convert_tokens_to_ids([f"ICD10CM/A0{n}" for n in diagnoses])
    row["medication_ids"] = DRUGS.convert_tokens_to_ids([f"ATC/A{n:02}" for n in drugs])
    return row if note is None else row | {"note_vector": note}


def test_hours_of_stays_lie_end_to_end_and_labels_first():
    batch = StayCollator()(STAYS)
    assert next(iter(batch)) == "labels"
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["stay_hours"].tolist() == [2, 0, 1]
    assert batch["demographics"].tolist() == [[0.5, 1.0], [0.0, 0.0], [2.0, 1.0]]
    series = HourlySeries.of(4, batch["stay_hours"], batch["feature_ids"], batch["feature_counts"])
    assert series.values[0, 0].tolist() == [0, 1, 0, 1]
    assert series.values[2, 0].tolist() == [1, 0, 0, 0]
    assert "feature_values" not in batch


def test_values_and_several_labels_are_kept_and_arrays_are_as_good_as_lists():
    rows = [row | {"feature_values": [0.5] * len(row["feature_ids"]), "labels": [1, 0]} for row in STAYS]
    batch = StayCollator()(rows)
    assert batch["feature_values"].tolist() == [0.5] * 3
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].shape == (3, 2)
    arrays = StayCollator()([{name: np.asarray(value) for name, value in row.items()} for row in rows])
    assert all(torch.equal(arrays[name], batch[name]) for name in batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"feature_counts": [2]}, "3 hours"), ({"stay_hours": 3}, "4 hours"), ({"feature_ids": [1]}, "2 `feature_ids`")],
)
def test_hours_that_do_not_agree_with_counts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        StayCollator()([STAYS[0] | change, STAYS[2]])


def test_stays_know_their_admission_and_an_admission_may_have_none():
    rows = [admission(STAYS[:2], [1, 2], [3]), admission(), admission(STAYS[2:], [4], [])]
    batch = AdmissionCollator(DIAGNOSES, DRUGS, 2)(rows)
    assert batch["stay_admissions"].tolist() == [0, 0, 2]
    assert batch["stay_hours"].tolist() == [2, 0, 1]
    assert batch["demographics"].tolist() == [[0.5, 1.0], [0.0, 0.0], [2.0, 1.0]]
    pad = DIAGNOSES.pad_token_id
    assert batch["diagnosis_ids"].tolist() == [rows[0]["diagnosis_ids"], [pad, pad], [*rows[2]["diagnosis_ids"], pad]]
    assert batch["medication_ids"].tolist()[1] == [DRUGS.pad_token_id]
    assert "diagnosis_mask" not in batch


def test_a_batch_without_any_stay_or_code_is_a_batch():
    batch = AdmissionCollator(DIAGNOSES, DRUGS, 2)([admission(labels=0), admission(labels=1)])
    assert batch["stay_hours"].shape == (0,)
    assert batch["demographics"].shape == (0, 2)
    assert batch["diagnosis_ids"].shape == (2, 1)
    assert batch["labels"].tolist() == [0, 1]


def test_notes_are_vectors_or_tokens_and_may_be_missing():
    rows = [admission(note=[1.0, 2.0]), admission(note=[])]
    batch = AdmissionCollator(DIAGNOSES, DRUGS, 2)(rows)
    assert batch["note_vectors"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert batch["note_mask"].tolist() == [True, False]
    rows = [admission(note_input_ids=[5, 6]), admission(note_input_ids=[])]
    batch = AdmissionCollator(DIAGNOSES, DRUGS, 2, note_tokenizer=DIAGNOSES)(rows)
    assert batch["note_input_ids"].tolist() == [[5, 6], [DIAGNOSES.pad_token_id] * 2]
    assert batch["note_attention_mask"].tolist() == [[1, 1], [0, 0]]


def test_the_share_that_is_asked_for_is_hidden_and_padding_never():
    rows = [admission(diagnoses=range(10), drugs=range(5)), admission(diagnoses=range(3), drugs=range(10))] * 500
    batch = AdmissionCollator(DIAGNOSES, DRUGS, 2, probability=0.15)(rows)
    for name, tokenizer in (("diagnosis", DIAGNOSES), ("medication", DRUGS)):
        there = batch[f"{name}_ids"] != tokenizer.pad_token_id
        hidden = batch[f"{name}_mask"]
        assert not (hidden & ~there).any()
        assert hidden[there].float().mean().item() == pytest.approx(0.15, abs=0.02)  # 4 sd of 6,500 draws
    assert not torch.equal(batch["diagnosis_mask"][::2, :5], batch["medication_mask"][::2, :5])


def test_another_batch_hides_others_and_the_seed_decides_which():
    ids = np.tile(np.arange(10), (20, 1))
    one, same, other = CodeHiding(DIAGNOSES, 0.5, 0), CodeHiding(DIAGNOSES, 0.5, 0), CodeHiding(DIAGNOSES, 0.5, 1)
    first, second = one(ids), one(ids)
    assert (same(ids) == first).all()
    assert (first != second).any()
    assert (other(ids) != first).any()
    assert not first[:, DIAGNOSES.all_special_ids].any()


def test_a_variable_is_hidden_with_all_its_features_and_about_as_often_as_asked():
    variables = np.array([0, 0, 2, 1, 2, 2])
    hidden = VariableHiding(variables, 0.3, seed=1)(20_000)
    assert hidden.shape == (20_000, 6)
    for first, second in ((0, 1), (2, 4), (4, 5)):
        np.testing.assert_array_equal(hidden[:, first], hidden[:, second])
    assert abs(np.corrcoef(hidden[:, 0], hidden[:, 3])[0, 1]) < 0.03  # each by itself
    np.testing.assert_allclose(hidden.mean(axis=0), 0.3, atol=0.015)


def test_batches_say_what_is_hidden_and_hide_anew_each_time():
    collate = StayCollator(VariableHiding(np.arange(40), 0.5))
    rows = [{"stay_hours": 1, "feature_ids": [3], "feature_counts": [1], "demographics": [1.0]}] * 8
    first, second = collate(rows), collate(rows)
    assert first["hidden_features"].dtype == torch.bool
    assert not torch.equal(first["hidden_features"], second["hidden_features"])
    assert "hidden_features" not in StayCollator()(rows)
    with pytest.raises(ValueError, match="`probability` must lie between 0 and 1"):
        VariableHiding(np.arange(2), 1.0)
