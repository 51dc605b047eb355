"""Masks that hide what they should, and two shapes of batch that hold the same numbers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_ehr.collators import CodeMasking, PackedCollator, PaddedCollator, SetMasking
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.samplers import STREAMS, FlatBatch, FlatExamples

from .test_samplers import examples

TOKENIZER = EhrCodeTokenizer.from_codes([f"V/{number}" for number in range(1000)])
MASK, UNKNOWN, FIRST_CODE = 4, 1, 5


def flat(*patients, key=None, **targets):
    """A batch of the given lists of ids."""
    streams = {
        "input_ids": np.concatenate([np.array(ids, np.int32) for ids in patients]),
        "visit_ids": np.concatenate([1 + np.arange(len(ids), dtype=np.int32) // 2 for ids in patients]),
        "serial_ids": np.concatenate([np.arange(len(ids), dtype=np.int32) % 2 for ids in patients]),
    }
    offsets = np.cumsum([0, *(len(ids) for ids in patients)])
    return FlatBatch(streams, offsets, {name: np.asarray(values) for name, values in targets.items()}, key)


def many(count=100_000, seed=0):
    return flat(np.random.default_rng(seed).integers(FIRST_CODE, len(TOKENIZER), count))


def shares(batch, masked, labels):
    """Share of targets that became [MASK], another code, or stayed."""
    chosen = labels != -100
    before, after = batch.streams["input_ids"][chosen], masked.streams["input_ids"][chosen]
    return (after == MASK).mean(), ((after != MASK) & (after != before)).mean(), (after == before).mean()


def test_of_a_hundred_thousand_codes_15_percent_are_targets_split_80_10_10():
    batch = many()
    masked, labels = CodeMasking(TOKENIZER, seed=1)(batch)
    chosen = labels != -100
    assert chosen.mean() == pytest.approx(0.15, abs=0.015)
    assert shares(batch, masked, labels) == pytest.approx((0.8, 0.1, 0.1), abs=0.015)
    assert (labels[chosen] == batch.streams["input_ids"][chosen]).all()
    assert (masked.streams["input_ids"][~chosen] == batch.streams["input_ids"][~chosen]).all()


def test_of_a_hundred_thousand_patients_each_has_one_target_split_80_10_10_at_every_place():
    ids = np.random.default_rng(0).integers(FIRST_CODE, len(TOKENIZER), (100_000, 4))
    batch = flat(*ids)
    masked, labels = CodeMasking(TOKENIZER, max_predictions=1, seed=1)(batch)
    assert ((labels != -100).reshape(-1, 4).sum(1) == 1).all()
    assert shares(batch, masked, labels) == pytest.approx((0.8, 0.1, 0.1), abs=0.015)
    assert (labels != -100).reshape(-1, 4).mean(0) == pytest.approx([0.25] * 4, abs=0.015)


def test_shares_can_be_all_mask_or_all_kept():
    batch = many(20_000)
    everything_hidden = CodeMasking(TOKENIZER, 0.3, mask_share=1.0, random_share=0.0)(batch)
    assert shares(batch, *everything_hidden) == (1, 0, 0)
    nothing_hidden = CodeMasking(TOKENIZER, 0.3, max_predictions=1, mask_share=0.0, random_share=0.0)(batch)
    assert shares(batch, *nothing_hidden) == (0, 0, 1)


def test_special_tokens_are_never_chosen_and_never_put_in():
    ids = np.random.default_rng(0).integers(0, 10, 50_000)  # half of them special
    batch = flat(ids)
    masked, labels = CodeMasking(TOKENIZER, 0.5, mask_share=0.0, random_share=1.0)(batch)
    special = ids < FIRST_CODE
    assert (labels[special] == -100).all()
    assert (masked.streams["input_ids"][special] == ids[special]).all()
    put_in = masked.streams["input_ids"][labels != -100]
    assert put_in.min() >= FIRST_CODE
    assert len(np.unique(put_in)) == 1000  # every code can be put in


@pytest.mark.parametrize("max_predictions", [None, 1])
def test_a_batch_with_a_code_has_a_target_and_one_without_has_none(max_predictions):
    masking = CodeMasking(TOKENIZER, probability=1e-6, max_predictions=max_predictions)
    for _ in range(20):
        _, labels = masking(flat([UNKNOWN, 7, UNKNOWN], [UNKNOWN]))
        assert labels.tolist() == [-100, 7, -100, -100]
    _, labels = masking(flat([UNKNOWN, UNKNOWN]))
    assert labels.tolist() == [-100, -100]


def test_the_vocabulary_whose_mask_is_its_padding_is_masked_as_well():
    exact = EhrCodeTokenizer.from_codes(["V/0", "V/1"], code_exact=True)
    masked, labels = CodeMasking(exact, max_predictions=1, mask_share=1.0, random_share=0.0)(flat([1, 1]))
    assert sorted(masked.streams["input_ids"].tolist()) == [0, 1]
    assert sorted(labels.tolist()) == [-100, 1]


@pytest.mark.parametrize("masking", [CodeMasking, SetMasking])
def test_masks_depend_on_seed_epoch_and_bin_alone_and_leave_the_batch_as_it_was(masking):
    def targets(seed, key):
        batch = many(300)
        batch.key = key
        return masking(TOKENIZER, seed=seed)(batch)[1].tolist()

    assert targets(0, (1, 2)) == targets(0, (1, 2))
    different = [targets(0, (1, 2)), targets(0, (2, 1)), targets(0, (1, 3)), targets(1, (1, 2))]
    assert all(one != other for one, other in pairwise(different))
    batch, running = many(300), masking(TOKENIZER)
    before = {name: values.copy() for name, values in batch.streams.items()}
    assert running(batch)[1].tolist() != running(batch)[1].tolist()
    assert running(batch)[1].tolist() != masking(TOKENIZER)(batch)[1].tolist()
    assert all((batch.streams[name] == values).all() for name, values in before.items())


def test_each_worker_each_epoch_and_each_rank_draws_masks_of_its_own(monkeypatch):
    rows = [{name: values.tolist() for name, values in many(200).streams.items()}] * 2
    collator = PackedCollator(TOKENIZER, CodeMasking(TOKENIZER))

    def epoch():
        return [batch["labels"].tolist() for batch in DataLoader(rows, num_workers=2, collate_fn=collator)]

    torch.manual_seed(0)
    first, second = epoch(), epoch()
    assert first[0] != first[1]
    assert first != second
    torch.manual_seed(0)
    assert epoch() == first
    here = CodeMasking(TOKENIZER)(many(200))[1].tolist()
    monkeypatch.setenv("RANK", "1")
    assert CodeMasking(TOKENIZER)(many(200))[1].tolist() != here


@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=15), min_size=1, max_size=8), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_set_masking_takes_out_whole_codes_and_leaves_some_of_each_patient(patients, seed):
    batch = flat(*patients, key=(seed, 0))
    masked, labels = SetMasking(TOKENIZER)(batch)
    assert labels.shape[0] == len(patients)
    for index, ids in enumerate(patients):
        seen = masked.streams["input_ids"][masked.offsets[index] : masked.offsets[index + 1]].tolist()
        hidden = [code for code in labels[index].tolist() if code != -100]
        codes = {code for code in ids if code >= FIRST_CODE}
        assert len(hidden) == len(set(hidden))
        assert seen == [code for code in ids if code not in hidden]
        assert set(hidden) <= codes
        if len(codes) >= 2:
            assert hidden
            assert set(seen) & codes
        else:
            assert not hidden
    assert len(masked.streams["visit_ids"]) == len(masked.streams["serial_ids"]) == masked.offsets[-1]


def test_set_masking_hides_half_of_the_codes_with_their_visits():
    batch = many(50_000)
    distinct = len(np.unique(batch.streams["input_ids"]))
    masked, labels = SetMasking(TOKENIZER, seed=4)(batch)
    assert (labels != -100).sum() / distinct == pytest.approx(0.5, abs=0.05)
    visible = np.isin(batch.streams["input_ids"], masked.streams["input_ids"])
    assert (masked.streams["visit_ids"] == batch.streams["visit_ids"][visible]).all()


def test_padded_and_packed_batches_hold_the_same_numbers():
    batch = flat([5, 6, 7], [8], [9, 10], key=(0, 0), prolonged_stay_labels=[1, 0, 1])
    masking = CodeMasking(TOKENIZER, 0.5, seed=2)
    padded = PaddedCollator(TOKENIZER, masking, pad_to_multiple_of=8)([batch])
    packed = PackedCollator(TOKENIZER, masking)([batch])
    assert set(padded) == {"prolonged_stay_labels", *STREAMS, "attention_mask", "labels"}
    assert packed["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["max_seqlen"] == 3
    assert type(packed["max_seqlen"]) is int
    real = padded["attention_mask"].bool()
    assert real.sum(1).tolist() == [3, 1, 2]
    for name in ("input_ids", "visit_ids", "serial_ids", "labels"):
        assert padded[name].shape == (3, 8)
        assert padded[name].dtype == packed[name].dtype == torch.int64
        assert padded[name][real].tolist() == packed[name][0].tolist()
        assert (padded[name][~real] == (-100 if name == "labels" else 0)).all()
    assert real[:, 0].all()
    assert padded["prolonged_stay_labels"].tolist() == packed["prolonged_stay_labels"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("collator", [PaddedCollator, PackedCollator])
def test_rows_and_gathered_bins_give_equal_batches(collator):
    dataset = examples([3, 1, 7, 2], labels=[0, 1, 1, 0])
    gathered = FlatExamples(dataset).gather([2, 0, 3])
    from_rows = collator(TOKENIZER)([dataset[index] for index in (2, 0, 3)])
    from_arrays = collator(TOKENIZER)([dataset.with_format("numpy")[index] for index in (2, 0, 3)])
    from_bin = collator(TOKENIZER)([gathered])
    assert list(from_rows) == list(from_bin)
    for name, value in from_bin.items():
        for other in (from_rows[name], from_arrays[name]):
            assert other == value if name == "max_seqlen" else other.equal(value) and other.dtype == value.dtype


@pytest.mark.parametrize("collator", [PaddedCollator, PackedCollator])
def test_class_labels_come_first_as_whole_numbers_and_multi_label_ones_as_floats(collator):
    classes = collator(TOKENIZER)(list(examples([2, 3], labels=[1, 0])))
    assert next(iter(classes)) == "labels"
    assert (classes["labels"].dtype, classes["labels"].tolist()) == (torch.int64, [1, 0])
    several = collator(TOKENIZER)(list(examples([2, 3], labels=[[0.0, 1.0], [1.0, 1.0]])))
    assert (several["labels"].dtype, several["labels"].tolist()) == (torch.float32, [[0, 1], [1, 1]])
    assert "subject_id" not in classes


def test_hidden_sets_are_one_row_a_patient_in_both_shapes():
    batch = flat([5, 6, 7, 8], [9], [10, 11], key=(0, 0))
    padded, packed = (kind(TOKENIZER, SetMasking(TOKENIZER))([batch]) for kind in (PaddedCollator, PackedCollator))
    assert padded["labels"].equal(packed["labels"])
    assert padded["labels"].shape[0] == 3
    assert padded["input_ids"][padded["attention_mask"].bool()].tolist() == packed["input_ids"][0].tolist()
    assert (packed["input_ids"] != MASK).all()
    nothing = PackedCollator(TOKENIZER, SetMasking(TOKENIZER))([flat([5], [6])])
    assert nothing["labels"].tolist() == [[-100], [-100]]


def test_what_cannot_work_is_refused():
    masked = PackedCollator(TOKENIZER, CodeMasking(TOKENIZER))
    with pytest.raises(ValueError, match="`labels` must not be in the examples when codes are masked"):
        masked(list(examples([2], labels=[1])))
    with pytest.raises(ValueError, match="One bin is one batch, got 2"):
        masked([flat([5]), flat([6])])
    with pytest.raises(ValueError, match="`probability` must lie between 0 and 1"):
        CodeMasking(TOKENIZER, probability=1.5)
    with pytest.raises(ValueError, match="`max_predictions` must be None or 1"):
        CodeMasking(TOKENIZER, max_predictions=3)
    with pytest.raises(ValueError, match="add up to at most 1"):
        CodeMasking(TOKENIZER, mask_share=0.8, random_share=0.3)
    with pytest.raises(ValueError, match="at least one code"):
        CodeMasking(EhrCodeTokenizer.from_codes([]))
