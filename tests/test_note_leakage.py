"""Copies of training notes are found in other splits, and what gives codes or outcomes away."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hf_ehr.notes.leakage import TELLING_SECTIONS, WORDS, note_leakage, note_signatures


def notes(*texts, start=0):
    return pa.table({"note_id": [f"n{start + number}" for number in range(len(texts))], "text": list(texts)})


def words(seed: int, count: int = 200) -> list[str]:
    return [f"w{number}" for number in np.random.default_rng(seed).integers(0, 5000, count)]


def jaccard(one: list[str], other: list[str]) -> float:
    sets = [{tuple(text[i : i + WORDS]) for i in range(len(text) - WORDS + 1)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("changed", [0, 3, 20, 100, 200])
def test_signatures_agree_in_the_share_in_which_runs_of_words_overlap(changed):
    one = words(0)
    other = [*words(1)[:changed], *one[changed:]]
    signatures = note_signatures(pa.array([" ".join(one), " ".join(other)]))
    true = jaccard(one, other)
    assert (signatures[0] == signatures[1]).mean() == pytest.approx(true, abs=4 * (true * (1 - true) / 128) ** 0.5)


def test_runs_do_not_cross_from_one_note_to_the_next_and_order_counts():
    one, other = words(0), words(1)
    alone = note_signatures(pa.array([" ".join(other)]))[0]
    assert (note_signatures(pa.array([" ".join(one), "", "short", " ".join(other)]))[3] == alone).all()
    assert (note_signatures(pa.array([" ".join(reversed(other))]))[0] == alone).mean() < 0.05
    assert (note_signatures(pa.array(["  ".join(other).upper() + "."]))[0] == alone).all()


def test_a_copy_is_named_with_its_original_and_others_are_not():
    train = [" ".join(words(seed)) for seed in range(50)]
    near, far = words(7), words(8)
    near[30:34] = ["another", "four", "words", "here"]
    far[:50] = words(99)[:50]  # overlap 0.6
    held_out = notes(" ".join(near), " ".join(far), " ".join(words(1000)), "too short", start=100)
    found = note_leakage({"train": [notes(*train[:20]), notes(*train[20:], start=20)], "test": [held_out]})
    assert found.copies["note_id"].to_pylist() == ["n100"]
    assert found.copies["train_note_id"].to_pylist() == ["n7"]
    assert found.copies["similarity"][0].as_py() == pytest.approx(jaccard(near, words(7)), abs=0.12)
    assert found.copied == {"test": 1}
    assert found.too_short == {"train": 0, "test": 1}
    assert found.notes == {"train": 50, "test": 4}
    assert "n100" not in found.summary()
    assert "1 are nearly the same as a training note" in found.summary()
    lower = note_leakage({"train": [notes(*train)], "test": [held_out]}, threshold=0.5)
    assert lower.copies["note_id"].to_pylist() == ["n100", "n101"]


def test_a_template_that_all_notes_share_is_no_burden():
    same = " ".join(words(0))
    found = note_leakage({"train": [notes(*[same] * 3000)], "test": [notes(*[same] * 500, start=3000)]})
    assert found.copied == {"test": 500}


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("discharge medications", "Course: fine\n\nDischarge Medications:\n1. aspirin"),
        ("discharge disposition", "DISPOSITION: home"),
        ("follow-up", "\n- Follow-up: in two weeks"),
        ("death", "At 03:10 the patient expired."),
        ("final diagnoses", "Final Diagnosis: hip fracture"),
        ("addendum", "ADDENDUM after coding"),
        ("billing codes", "coded as ICD-10 S72"),
    ],
)
def test_telling_sections_are_counted(section, text):
    found = note_leakage({"train": [notes(text, "Admitted with cough. Discharged the abscess.")]})
    assert found.sections["train"] == {name: int(name == section) for name in TELLING_SECTIONS}
    assert f"1 with {section}" in found.summary()


def test_a_split_without_training_notes_or_a_wrong_threshold_is_refused():
    with pytest.raises(ValueError, match="must hold `train`"):
        note_leakage({"test": [notes("a")]})
    with pytest.raises(ValueError, match=r"`threshold` must lie in \[0.5, 1\], .*got 0.1"):
        note_leakage({"train": [notes("a")]}, threshold=0.1)
