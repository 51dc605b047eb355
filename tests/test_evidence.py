"""Evidence spans: from token weights to characters, scored by hand and against what chance and matching reach."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.evidence import (
    Span,
    faithfulness,
    first_words,
    masked_text,
    plausibility,
    plausibility_ceiling,
    random_spans,
    string_match,
    top_spans,
    tune_relative_threshold,
)

NOTE = "Known asthma. Denies chest pain; hip fracture on the left."


def tokens_of(text, pattern=r"\w+|[^\w\s]"):
    """Offsets of words, between two special tokens."""
    return np.array([(0, 0), *(found.span() for found in re.finditer(pattern, text)), (0, 0)])


def place(text, part):
    start = text.index(part)
    return Span(start, start + len(part))


def weights_on(text, **heavy):
    """Weights of the word tokens of ``text``: those named, and .01 for the others."""
    offsets = tokens_of(text)
    return np.array([heavy.get(text[start:end], 0.01) for start, end in offsets]), offsets


def texts_of(spans, text=NOTE):
    return [text[span[0] : span[1]] for span in spans]


def test_neighbouring_heavy_tokens_become_one_span_that_weighs_their_sum():
    weights, offsets = weights_on(NOTE, hip=0.4, fracture=0.3, asthma=0.5)
    weights[0] = weights[-1] = 9  # special tokens have no text, whatever they weigh
    spans = top_spans(weights, offsets)
    assert texts_of(spans) == ["hip fracture", "asthma"]
    assert [span.weight for span in spans] == pytest.approx([0.7, 0.5])
    assert texts_of(top_spans(weights, offsets, k=1)) == ["hip fracture"]
    assert texts_of(top_spans(weights, offsets, relative_threshold=0.7)) == ["asthma", "hip"]
    assert texts_of(top_spans(weights, offsets, max_gap=0)) == ["asthma", "hip", "fracture"]


def test_without_positive_weights_there_is_no_evidence():
    offsets = tokens_of(NOTE)
    assert top_spans(np.zeros(len(offsets)), offsets) == []
    assert top_spans(-np.ones(len(offsets)), offsets) == []
    assert top_spans([], np.zeros((0, 2))) == []
    assert texts_of(top_spans(np.where(np.arange(len(offsets)) == 2, 0.2, -5), offsets)) == ["asthma"]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60), st.integers(0, 1000), st.floats(0.05, 1), st.integers(0, 3))
def test_spans_cover_the_taken_tokens_and_none_beyond_them(text, seed, threshold, gap):
    offsets = tokens_of(text)
    weights = np.random.default_rng(seed).random(len(offsets))
    shuffled = np.random.default_rng(seed + 1).permutation(len(offsets))
    spans = top_spans(weights, offsets, relative_threshold=threshold, k=None, max_gap=gap)
    assert spans == top_spans(weights[shuffled], offsets[shuffled], relative_threshold=threshold, k=None, max_gap=gap)
    real = offsets[:, 1] > offsets[:, 0]
    taken = real & (weights >= threshold * weights[real].max(initial=0))
    assert sum(span.weight for span in spans) == pytest.approx(weights[taken].sum())
    for (start, end), heavy in zip(offsets, taken, strict=True):
        assert not heavy or sum(span.start <= start and end <= span.end for span in spans) == 1
    ordered = sorted(spans)
    assert all(after.start - before.end > gap for before, after in pairwise(ordered))


@pytest.mark.parametrize(
    ("weights", "offsets", "options", "message"),
    [
        ([0.1, 0.2], [(0, 1)], {}, r"\(2,\) and \(1, 2\)"),
        ([math.nan], [(0, 1)], {}, "finite, got 1"),
        ([0.1], [(0, 1)], {"relative_threshold": 0}, "relative_threshold"),
        ([0.1], [(0, 1)], {"k": 0}, "`k`"),
    ],
    ids=["lengths", "nan", "threshold", "k"],
)
def test_malformed_weights_are_refused(weights, offsets, options, message):
    with pytest.raises(ValueError, match=message):
        top_spans(weights, offsets, **options)


# Plausibility


def test_plausibility_by_hand():
    # True: hip fracture | chest pain. Marked: "fracture on" and "Known". Words: 2 of 4 true are …, 3 are marked.
    truth = [place(NOTE, "hip fracture"), place(NOTE, "chest pain")]
    found = plausibility([place(NOTE, "fracture on"), place(NOTE, "Known")], truth, NOTE)
    assert found.precision == pytest.approx(1 / 3)
    assert found.recall == pytest.approx(1 / 4)
    assert found.f1 == pytest.approx(2 / 7)
    assert found.iou == pytest.approx(1 / 6)
    assert found.spans_found == pytest.approx(1 / 2)


def test_a_word_counts_when_a_part_of_it_is_marked_and_overlaps_count_once():
    truth = [place(NOTE, "fracture"), place(NOTE, "hip fracture")]
    marked = [place(NOTE, "ract"), place(NOTE, "p fra"), place(NOTE, "hip")]
    assert plausibility(marked, truth, NOTE) == (1, 1, 1, 1, 1)


def test_nothing_marked_and_nothing_true():
    nothing = plausibility([], [place(NOTE, "asthma")], NOTE)
    assert math.isnan(nothing.precision)
    assert (nothing.recall, nothing.f1, nothing.iou, nothing.spans_found) == (0, 0, 0, 0)
    assert all(map(math.isnan, plausibility([place(NOTE, "asthma")], [], NOTE)))
    assert all(map(math.isnan, plausibility([], [], "")))
    assert plausibility([place(NOTE, "left")], [(5, 6)], NOTE).f1 == 0  # the true span is a space


def test_offsets_beyond_the_basic_plane_and_of_other_scripts_stay_whole():
    text = "🫀 心房細動 fibrillation auriculaire"
    truth = [place(text, "心房細動")]
    offsets = tokens_of(text)
    weights = (offsets[:, 0] == truth[0].start) & (offsets[:, 1] > 0)
    assert texts_of(top_spans(weights.astype(float), offsets), text) == ["心房細動"]
    assert plausibility(truth, truth, text).f1 == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12))
def test_no_choice_of_tokens_beats_the_ceiling_and_one_reaches_it(seed, read):
    rng = np.random.default_rng(seed)
    offsets = tokens_of(NOTE)[1:-1][:read]
    starts = rng.integers(0, len(NOTE) - 3, 2)
    truth = [Span(int(start), int(start) + int(rng.integers(1, 12))) for start in starts]
    ceiling = plausibility_ceiling(truth, offsets, NOTE)
    scores = []
    for choice in range(2 ** len(offsets)) if len(offsets) <= 8 else rng.integers(0, 2 ** len(offsets), 200):
        chosen = [offset for place, offset in enumerate(offsets) if int(choice) >> place & 1]
        scores.append(plausibility(chosen, truth, NOTE))
    assert max(score.f1 for score in scores) <= ceiling.f1
    assert max(score.iou for score in scores) <= ceiling.iou
    if len(offsets) <= 8:
        assert max(score.f1 for score in scores) == ceiling.f1
        assert max(score.spans_found for score in scores) == ceiling.spans_found


def test_text_that_was_never_read_lowers_the_ceiling():
    truth = [place(NOTE, "asthma"), place(NOTE, "hip fracture")]
    whole, cut = tokens_of(NOTE), tokens_of(NOTE)[:6]
    assert plausibility_ceiling(truth, whole, NOTE) == (1, 1, 1, 1, 1)
    ceiling = plausibility_ceiling(truth, cut, NOTE)
    assert (ceiling.precision, ceiling.recall, ceiling.spans_found) == (1, pytest.approx(1 / 3), 0.5)


def test_the_threshold_is_tuned_on_what_it_does_to_f1():
    weights, offsets = weights_on(NOTE, hip=1.0, fracture=0.42, left=0.3)
    example = (weights, offsets, [place(NOTE, "hip fracture")], NOTE)
    assert tune_relative_threshold([example, (weights, offsets, [], NOTE)]) == 0.4
    with pytest.raises(ValueError, match="true span"):
        tune_relative_threshold([(weights, offsets, [], NOTE)])


# Faithfulness


def score_by_words(texts):
    """.1 for the empty note, .5 more with "hip", .3 more with "fracture"."""
    return [0.1 + 0.5 * ("hip" in text.split()) + 0.3 * ("fracture" in text.split()) for text in texts]


def test_faithfulness_by_hand():
    weights, offsets = weights_on(NOTE, hip=0.6, fracture=0.3)
    tokens = len(offsets) - 2
    found = faithfulness(score_by_words, NOTE, weights, offsets, fractions=(1 / tokens, 2 / tokens))
    assert found.probability == pytest.approx(0.9)
    assert found.masked == pytest.approx([0.4, 0.1])  # without hip; without hip and fracture
    assert found.kept == pytest.approx([0.6, 0.9])
    assert found.comprehensiveness == pytest.approx((0.5 + 0.8) / 2)
    assert found.sufficiency == pytest.approx((0.3 + 0) / 2)


def test_true_evidence_is_more_faithful_than_random_weights():
    weights, offsets = weights_on(NOTE, hip=0.6, fracture=0.3)
    rng = np.random.default_rng(0)
    true = faithfulness(score_by_words, NOTE, weights, offsets)
    random = [faithfulness(score_by_words, NOTE, rng.random(len(weights)), offsets) for _ in range(20)]
    assert true.comprehensiveness > np.mean([found.comprehensiveness for found in random]) + 0.2
    assert true.sufficiency < np.mean([found.sufficiency for found in random]) - 0.2


def test_all_texts_are_scored_at_once_and_an_empty_note_is_refused():
    calls = []
    weights, offsets = weights_on(NOTE)
    faithfulness(lambda texts: calls.append(texts) or [0.5] * len(texts), NOTE, weights, offsets, fractions=(0.2, 1))
    (texts,) = calls
    assert (texts[0], texts[2].strip(), texts[4]) == (NOTE, "", NOTE)
    with pytest.raises(ValueError, match="empty note"):
        faithfulness(score_by_words, "", [0.3], [(0, 0)])
    with pytest.raises(ValueError, match="fractions"):
        faithfulness(score_by_words, NOTE, weights, offsets, fractions=(0, 0.5))


def test_masking_replaces_runs_and_leaves_the_rest():
    assert masked_text("abcdef", [(1, 2), (2, 3), (5, 9)], "_") == "a_de_"
    assert masked_text("abcdef", np.zeros((0, 2))) == "abcdef"
    assert masked_text("abc", [(0, 3)], "") == ""


# Baselines


def test_random_spans_have_the_lengths_of_the_spans_they_stand_beside():
    like = [place(NOTE, "hip fracture"), place(NOTE, "asthma")]
    rng = np.random.default_rng(0)
    drawn = [random_spans(NOTE, like, rng) for _ in range(300)]
    assert {tuple(len(re.findall(r"\w+|[^\w\s]", part)) for part in texts_of(spans)) for spans in drawn} == {(2, 1)}
    starts = {spans[1].start for spans in drawn}
    assert starts == {int(start) for start, end in tokens_of(NOTE)[1:-1]}, "every word is drawn some time"
    assert random_spans("", like, rng) == []


def test_the_first_words_of_a_note():
    assert texts_of(first_words(NOTE, 3)) == ["Known asthma."]
    assert texts_of(first_words(NOTE, 99)) == [NOTE]
    assert first_words("", 3) == first_words(NOTE, 0) == []


def test_descriptions_match_whole_words_without_regard_to_case():
    text = "HIP replaced. Fracture of the left hip, hipster, no hip pain."
    spans = string_match(text, "Fracture of unspecified hip", k=None)
    assert texts_of(spans, text) == ["HIP", "Fracture", "hip", "hip"]
    assert [span.weight for span in spans] == [0.5] * 4
    assert texts_of(string_match("a fracture of the hip today", "Hip fracture"), "a fracture of the hip today") == [
        "fracture of the hip"
    ]
    assert string_match("a fracture of the hip", "Hip fracture")[0].weight == 1
    assert string_match("a hip of the hip", "Hip fracture") == [(2, 16, 0.5)], "a word said twice counts once"
    assert string_match(text, "Unspecified, other") == []
    assert string_match(text, "Fracture of hip joint prosthesis") == []
    assert string_match("", "Hip") == []
