"""Strict scores of named entities, tags and spans, and the dictionary, by hand (row 40)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.entity_tags import Entity, entities_of_tags, tags_of_entities, words_of
from hf_ehr.named_entities import DictionaryMatcher, EntityCounts, entity_intervals, entity_scores


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-a I-a O", [(0, 2, "a")]),
        ("B-a B-a I-a", [(0, 1, "a"), (1, 3, "a")]),
        ("I-a I-a B-a", [(2, 3, "a")]),  # strict IOB2: what nothing began is no entity
        ("B-a I-b I-b", [(0, 1, "a")]),
        ("B-a I-b I-a", [(0, 1, "a")]),  # broken off, and not taken up again
        ("B-a O I-a", [(0, 1, "a")]),
        ("O B-a I-a", [(1, 3, "a")]),
        ("", []),
    ],
)
def test_entities_of_tags_by_hand(tags, expected):
    assert entities_of_tags(tags.split()) == expected


def test_words_that_share_a_character_with_an_entity_have_its_tags():
    text = "Known type-2 diabetes, mild."
    words = words_of(text)
    assert [text[a:b] for a, b in words] == ["Known", "type", "-", "2", "diabetes", ",", "mild", "."]
    tags = tags_of_entities([Entity(6, 21, "problem")], words)
    assert tags == ["O", "B-problem", *["I-problem"] * 3, "O", "O", "O"]
    half = tags_of_entities([Entity(15, 17, "problem"), Entity(27, 28, "test")], words)  # the midst of a word
    assert half == [*["O"] * 4, "B-problem", "O", "O", "B-test"]
    assert tags_of_entities([Entity(5, 6, "problem")], words) == ["O"] * 8  # white space alone


def test_of_entities_in_each_other_the_longest_stays():
    words = words_of("a b c d")
    tags = tags_of_entities([Entity(0, 1, "x"), Entity(0, 5, "y"), Entity(4, 7, "z")], words)
    assert tags == ["B-y", "I-y", "I-y", "O"]
    tags = tags_of_entities([Entity(2, 5, "z"), Entity(0, 3, "y")], words)
    assert tags == ["B-y", "I-y", "O", "O"]


@given(st.lists(st.sampled_from(["O", "B-a", "B-b", "I"]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_tags_of_entities_of_tags_are_the_tags(raw):
    tags: list[str] = []
    for tag in raw:
        before = tags[-1] if tags else "O"
        tags.append(tag if tag != "I" else "O" if before == "O" else f"I-{before[2:]}")
    words = [(3 * n, 3 * n + 2) for n in range(len(tags))]
    spans = [Entity(words[a][0], words[b - 1][1], kind) for a, b, kind in entities_of_tags(tags)]
    assert tags_of_entities(spans, words) == tags


TRUE = [[Entity(0, 2, "a"), Entity(5, 6, "b")], [Entity(1, 3, "a")], []]
FOUND = [[Entity(0, 2, "a"), Entity(5, 6, "a")], [Entity(1, 2, "a")], [Entity(0, 1, "b")]]


def test_an_entity_counts_where_start_end_and_type_are_right():
    """One of three: the second has another type, the third another end; four are claimed, one in an empty document."""
    found = entity_scores(TRUE, FOUND)
    assert found["precision"] == pytest.approx(1 / 4)
    assert found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(2 / 7)
    assert (found["precision (a)"], found["recall (a)"], found["f1 (a)"]) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert (found["precision (b)"], found["recall (b)"], found["f1 (b)"]) == (0, 0, 0)
    assert found["f1_macro"] == pytest.approx(1 / 5)
    assert found["entities"] == 3


def test_a_perfect_tagger_has_1_one_that_is_silent_0_and_nothing_of_nothing_is_undefined():
    assert entity_scores(TRUE, TRUE)["f1"] == 1
    silent = entity_scores(TRUE, [[], [], []])
    assert (silent["f1"], silent["recall"]) == (0, 0)
    assert np.isnan(silent["precision"])
    assert np.isnan(entity_scores([[]], [[]])["f1"])


def test_an_entity_that_is_named_twice_counts_once():
    twice = [[*FOUND[0], FOUND[0][0]], *FOUND[1:]]
    assert entity_scores(TRUE, twice) == entity_scores(TRUE, FOUND)


def test_a_resample_scores_documents_copied_as_often_as_drawn():
    intervals = entity_intervals(TRUE, FOUND, n_resamples=60)
    rng, values = np.random.default_rng(0), []
    for _ in range(60):
        rows = rng.integers(3, size=3)
        values.append(entity_scores([TRUE[row] for row in rows], [FOUND[row] for row in rows])["f1"])
    low, high = np.nanquantile(values, [0.025, 0.975])
    assert (intervals["f1"].low, intervals["f1"].high) == pytest.approx((low, high))
    expected = entity_scores(TRUE, FOUND)
    assert {name: one.value for name, one in intervals.items()} == pytest.approx(
        {name: expected[name] for name in intervals}
    )


def test_documents_of_one_patient_are_drawn_together_and_a_rival_on_the_same_ones():
    together = entity_intervals(TRUE, FOUND, clusters=[1, 1, 1], n_resamples=20)["f1"]
    assert together.low == together.high == together.value
    same = entity_intervals(TRUE, FOUND, rival=FOUND, n_resamples=20)["f1"]
    assert (same.low, same.high, same.p_value) == (0, 0, 1)
    better = entity_intervals(TRUE * 10, TRUE * 10, rival=FOUND * 10, n_resamples=50)["f1"]
    assert better.low > 0
    with pytest.raises(ValueError, match="clusters"):
        entity_intervals(TRUE, FOUND, clusters=[1])
    with pytest.raises(ValueError, match="same documents"):
        EntityCounts.of(TRUE, FOUND[:1])


def entities(text: str, *pairs: tuple[str, str]) -> list[Entity]:
    return [Entity(text.index(part), text.index(part) + len(part), kind) for part, kind in pairs]


def test_the_dictionary_takes_the_longest_known_words_wherever_they_stand():
    text = "Has heart failure, heart failure of age and severe heart failure. Took Lasix."
    problems = ("heart failure", "heart failure of age", "severe heart failure")
    pairs = (*((name, "problem") for name in problems), ("Lasix", "treatment"))
    matcher = DictionaryMatcher.fit([text], [entities(text, *pairs)])
    new = "LASIX for severe  heart\nfailure; no heart-failure, a heart and failure; "
    new += "heart failure of age, heart failure of"
    found = matcher.predict([new, ""])
    assert [(new[one.start : one.end], one.type) for one in found[0]] == [
        ("LASIX", "treatment"),
        ("severe  heart\nfailure", "problem"),
        ("heart failure of age", "problem"),
        ("heart failure", "problem"),
    ]
    assert found[1] == []


def test_words_that_are_mostly_no_entity_are_not_in_the_dictionary_and_the_commonest_type_wins():
    text = "cold hands, cold feet, a cold; iron and iron and iron"
    given = [Entity(25, 29, "problem"), Entity(31, 35, "test"), Entity(40, 44, "treatment"), Entity(49, 53, "test")]
    assert [text[one.start : one.end] for one in given] == ["cold", "iron", "iron", "iron"]
    found = DictionaryMatcher.fit([text], [given]).known
    assert found == {("iron",): "test"}
    kept = DictionaryMatcher.fit([text], [given], min_share=0.3).known
    assert kept == {("iron",): "test", ("cold",): "problem"}


def test_a_dictionary_of_nothing_finds_nothing_and_other_numbers_are_refused():
    assert DictionaryMatcher.fit(["a b"], [[]]).predict(["a b"]) == [[]]
    with pytest.raises(ValueError, match="entities"):
        DictionaryMatcher.fit(["a"], [])
