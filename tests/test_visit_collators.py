"""Masking of sets of codes (papers.md §2.3, row 35)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ehr import EhrCodeTokenizer
from hf_ehr.visit_collators import CodeSetMasking

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
