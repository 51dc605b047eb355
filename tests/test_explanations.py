"""What codes look at: against hand-built models, the model's own output and plain autograd; and what it is worth."""

import math
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, RobertaConfig, RobertaModel

import hf_ehr.models.note_evidence as note_evidence
from hf_ehr import EhrBertForICDCoding
from hf_ehr.evidence import plausibility, top_spans
from hf_ehr.evidence_report import RANDOM_DRAWS, evidence_report
from hf_ehr.explanations import (
    attention_gradient_evidence,
    gradient_evidence,
    label_attention_evidence,
)
from hf_ehr.models.note_evidence import EncodedNotes, segment_texts
from hf_ehr.notes import EVIDENCE_KINDS
from hf_ehr.schema import EhrDataError
from hf_ehr.sources.synthetic_notes import SyntheticNotesConfig, generate_notes
from tests.coders import HIP, names, note_table, places, pointing_coder, random_coder, words_of

LABELS = ("I10", "S72", "J45")


def bounds(spans):
    return sorted((span.start, span.end) for span in spans)


@pytest.fixture(scope="module")
def tokenizer():
    return words_of(HIP)


# Label attention


@pytest.mark.parametrize("max_length", [64, 7], ids=["one segment", "segments"])
@pytest.mark.parametrize("method", [label_attention_evidence, attention_gradient_evidence, gradient_evidence])
def test_a_model_whose_label_vectors_point_at_words_has_exactly_these_as_evidence(tokenizer, method, max_length):
    model = pointing_coder(tokenizer, {"S72": ["hip", "fracture"], "J45": ["asthma"]})
    found = method(model, tokenizer, HIP, [0, 1], max_length=max_length)
    spans = [bounds(top_spans(weights, found.offsets)) for weights in found.weights]
    assert spans == [places(HIP, "hip fracture"), places(HIP, "asthma")]


def test_the_evidence_of_synthetic_notes_is_found_to_the_character():
    """A label looks at the words of its true spans; where these stand nowhere else, its spans are the true ones."""
    world = generate_notes(SyntheticNotesConfig(patients=12, codes=20, seed=3))
    texts = dict(zip(world.notes["note_id"].to_pylist(), world.notes["text"].to_pylist(), strict=True))
    true = {}
    for row in world.spans.to_pylist():
        if row["kind"] in EVIDENCE_KINDS:
            true.setdefault((row["note_id"], row["code"]), []).append((row["start"], row["end"]))
    tokenizer = words_of(*texts.values())
    words = {}
    for (note, code), spans in true.items():
        words.setdefault(code, set()).update(
            word for start, end in spans for word in tokenizer.tokenize(texts[note][start:end])
        )
    model = pointing_coder(tokenizer, {code: sorted(own) for code, own in sorted(words.items())})
    checked = 0
    for (note, code), spans in true.items():
        mention = sum(len(tokenizer.tokenize(texts[note][start:end])) for start, end in spans)
        if sum(word in words[code] for word in tokenizer.tokenize(texts[note])) == mention:
            found = label_attention_evidence(model, tokenizer, texts[note], [model.config.label2id[code]])
            assert bounds(top_spans(found.weights[0], found.offsets, k=None)) == sorted(spans)
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("pooling", ["attention", "max"])
@pytest.mark.parametrize("max_length", [64, 6], ids=["one segment", "segments"])
def test_label_attention_offsets_map_to_the_original_text_and_weights_sum_to_one(pooling, max_length):
    """Acceptance row 70."""
    text = "HIP   Fracture 12/2019 🫀\nДиабет 心房細動, ñandú"
    tokenizer = words_of(text, cleaning="bert_xml")
    model = random_coder(tokenizer, *LABELS, segment_pooling=pooling)
    found = label_attention_evidence(model, tokenizer, text, [2, 0], max_length=max_length)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, atol=1e-5)
    assert found.weights.dtype == np.float32
    assert found.weights.shape == (2, len(found.offsets))
    special = found.offsets[:, 0] == found.offsets[:, 1]
    read = [text[start:end].lower() for start, end in found.offsets[~special]]
    assert read == ["hip", "fracture", "12", "/", "2019", "🫀", "диабет", "心", "房", "細", "動", ",", "ñandú"]
    starts = np.flatnonzero(special)[::2]  # [CLS] of every segment; with [SEP] the special tokens come in pairs
    assert (found.weights[:, starts] == 0).all()


@pytest.mark.parametrize("pooling", ["attention", "max"])
@pytest.mark.parametrize("form", [{}, {"label_output": "per_label", "label_key_size": 6}], ids=["shared", "laat"])
def test_evidence_and_probabilities_are_those_of_the_whole_model_at_once(tokenizer, pooling, form):
    model = random_coder(tokenizer, *LABELS, segment_pooling=pooling, **form)
    segments = segment_texts(model, tokenizer, [HIP, "asthma", HIP[::-1]], max_length=6)
    batch = {"input_ids": segments.input_ids, "attention_mask": segments.attention_mask}
    with torch.no_grad():
        outputs = model(**batch, note_index=segments.note_index, output_label_attentions=[2, 1])
    notes = EncodedNotes(model, segments, batch_size=2)
    np.testing.assert_allclose(notes.probabilities(), outputs.logits.sigmoid(), atol=1e-6)
    np.testing.assert_allclose(notes.probabilities([2, 1]), outputs.logits[:, [2, 1]].sigmoid(), atol=1e-6)
    expected = outputs.label_attentions.transpose(0, 1)[:, segments.attention_mask.bool()]
    np.testing.assert_allclose(notes.evidence("label_attention", [2, 1]).weights, expected, atol=1e-6)


# Gradients

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
# RoBERTa counts positions from behind its padding id, so that 12 rows are 10 tokens.
FOREIGN = {
    "bert": lambda size: BertModel(BertConfig(vocab_size=size, max_position_embeddings=10, **SIZES)),
    "roberta": lambda size: RobertaModel(RobertaConfig(vocab_size=size, max_position_embeddings=12, **SIZES)),
    "modernbert": lambda size: ModernBertModel(
        ModernBertConfig(vocab_size=size, max_position_embeddings=10, pad_token_id=0, **SIZES)
    ),
}
KINDS = {"xml": {}, "max": {"segment_pooling": "max"}, "laat": {"label_output": "per_label"}, "cls": {"head": "cls"}}


def by_autograd(model, segments, label):
    """‖x ⊙ ∂z/∂x‖ from one pass of everything at once."""
    inputs = model.get_input_embeddings()(segments.input_ids).detach().requires_grad_()
    notes = torch.zeros(len(segments.input_ids), dtype=torch.long)
    logits = model(inputs_embeds=inputs, attention_mask=segments.attention_mask, note_index=notes).logits
    (gradient,) = torch.autograd.grad(logits[0, label], inputs)
    return (inputs * gradient).norm(dim=-1)[segments.attention_mask.bool()].detach().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_input_times_gradient_equals_plain_autograd_over_the_whole_note(tokenizer, kind, batch_size):
    model = random_coder(tokenizer, *LABELS, **KINDS[kind])
    found = gradient_evidence(model, tokenizer, HIP, [2, 0], max_length=6, batch_size=batch_size)
    segments = segment_texts(model, tokenizer, [HIP], max_length=6)
    assert len(segments.input_ids) > 2
    for row, label in enumerate([2, 0]):
        expected = by_autograd(model, segments, label)
        assert expected.max() > 1e-3
        np.testing.assert_allclose(found.weights[row], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FOREIGN)
def test_any_encoder_is_explained(tokenizer, family):
    torch.manual_seed(0)
    encoder = FOREIGN[family](len(tokenizer))
    model = EhrBertForICDCoding.from_encoder(encoder, names(*LABELS)["id2label"]).eval()
    found = gradient_evidence(model, tokenizer, HIP, [1])
    segments = segment_texts(model, tokenizer, [HIP])
    assert segments.input_ids.shape == (3, 10), "the longest segment that the positions allow"
    np.testing.assert_allclose(found.weights[0], by_autograd(model, segments, 1), atol=1e-6, rtol=1e-3)
    attention = label_attention_evidence(model, tokenizer, HIP, [1])
    np.testing.assert_allclose(attention.weights.sum(), 1, atol=1e-5)


def test_attention_gradient_is_the_product_of_both(tokenizer):
    model = random_coder(tokenizer, *LABELS)
    one, other, product = (
        method(model, tokenizer, HIP, [0, 2], max_length=9).weights
        for method in (label_attention_evidence, gradient_evidence, attention_gradient_evidence)
    )
    np.testing.assert_allclose(product, one * other, rtol=1e-5)


def test_how_many_labels_have_gradients_at_once_changes_nothing(tokenizer, monkeypatch):
    model = random_coder(tokenizer, *LABELS)
    together = gradient_evidence(model, tokenizer, HIP, [0, 1, 2]).weights
    monkeypatch.setattr(note_evidence, "STATE_BUDGET", 1)
    np.testing.assert_allclose(gradient_evidence(model, tokenizer, HIP, [0, 1, 2]).weights, together, rtol=1e-6)


def test_the_model_is_left_as_it_was(tokenizer):
    model = random_coder(tokenizer, *LABELS).train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    vectors = model.head.label_vectors
    first, second = (attention_gradient_evidence(model, tokenizer, HIP, [1]).weights for _ in range(2))
    np.testing.assert_array_equal(first, second)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert model.head.label_vectors is vectors
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_an_empty_note_has_offsets_of_special_tokens_only(tokenizer):
    model = random_coder(tokenizer, *LABELS)
    for method in (label_attention_evidence, gradient_evidence):
        found = method(model, tokenizer, "", [0])
        assert found.offsets.tolist() == [[-1, -1]] * 2
        assert top_spans(found.weights[0], found.offsets) == []


@pytest.mark.parametrize(
    ("fields", "label_ids", "options", "message"),
    [
        ({}, [3], {}, r"`label_ids` must lie in \[0, 3\)"),
        ({}, [-1], {}, r"`label_ids` must lie in \[0, 3\)"),
        ({"max_position_embeddings": 64}, [0], {"max_length": 65}, "`max_length` must be at most 64"),
        ({}, [0], {"max_length": 2}, "`max_length` must exceed the 2 special tokens"),
        ({}, [0], {"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"head": "cls"}, [0], {}, "'gradient' with `head='cls'`"),
    ],
    ids=["unknown label", "negative label", "long segment", "no room", "no batch", "cls"],
)
def test_what_cannot_be_explained_is_refused(tokenizer, fields, label_ids, options, message):
    with pytest.raises(ValueError, match=message):
        label_attention_evidence(random_coder(tokenizer, *LABELS, **fields), tokenizer, HIP, label_ids, **options)


# The report

NOTES = [
    "asthma is known and treated well since many years now",
    "no news today but a hip fracture was seen on the film",
    "the film shows a hip fracture and asthma was not seen",
    "well known asthma and no other news was seen today",
]


def marked(*rows):
    """SPANS of rows (note, code, part of its text, kind)."""
    spans = [(*places(NOTES[note], part)[0], note, code, kind) for note, code, part, kind in rows]
    start, end, note, code, kind = zip(*spans, strict=True)
    numbers = {"start": pa.array(start, pa.int32()), "end": pa.array(end, pa.int32())}
    return pa.table({"note_id": [f"n{number}" for number in note], "code": code, **numbers, "kind": kind})


TEST_SPANS = marked(
    (1, "S72", "hip fracture", "term"),
    (2, "S72", "hip fracture", "synonym"),
    (2, "J45", "asthma was", "annotated"),  # one word more than the model looks at
    (1, "J45", "film", "negated"),  # a distractor is no evidence
    (2, "Z99", "shows", "term"),  # a code that the model does not have
)
VALIDATION_SPANS = marked((0, "J45", "asthma", "term"), (3, "J45", "asthma", "term"))
FIGURES = {"precision", "recall", "f1", "iou", "spans_found", "comprehensiveness", "sufficiency"}


def patients_of(notes, subjects):
    return notes.set_column(notes.column_names.index("subject_id"), "subject_id", pa.array(subjects, pa.int64()))


def report(model=None, spans=TEST_SPANS, patients=None, **options):
    tokenizer = words_of(*NOTES)
    model = model or pointing_coder(tokenizer, {"S72": ["hip", "fracture"], "J45": ["asthma"]})
    notes = patients_of(note_table(*NOTES), [5, 6, 7, 8] if patients is None else patients)
    parts = {"validation_notes": notes.take([0, 3]), "validation_spans": VALIDATION_SPANS, "n_resamples": 200}
    return evidence_report(model, tokenizer, notes.take([1, 2]), spans, **(parts | options))


@pytest.fixture(scope="module")
def made():
    return report(descriptions={"S72": "Fracture of hip", "J45": "Wheezing"})


def test_the_report_has_every_method_beside_the_baselines(made):
    methods = ["label_attention", "attention_gradient", "gradient"]
    assert list(made.rows) == [*methods, "random", "first words", "string match", "ceiling"]
    assert all(set(figures) == FIGURES for figures in made.rows.values())
    assert (made.pairs, made.notes, made.unknown) == (3, 2, 1)
    assert list(made.thresholds) == methods


def test_random_spans_are_scored_over_many_draws(made):
    """Against every place that a span of the method's length could have."""
    means, variances = [], []
    for note, length, evidence in ((1, 2, "hip fracture"), (2, 2, "hip fracture"), (2, 1, "asthma was")):
        words = [found.span() for found in re.finditer(r"\w+", NOTES[note])]
        anywhere = [
            plausibility([(words[i][0], words[i + length - 1][1])], places(NOTES[note], evidence), NOTES[note]).f1
            for i in range(len(words) - length + 1)
        ]
        means.append(np.mean(anywhere))
        variances.append(np.var(anywhere) / RANDOM_DRAWS)
    four_sd = 4 * math.sqrt(sum(variances)) / 3
    assert made.rows["random"]["f1"].value == pytest.approx(np.mean(means), abs=four_sd)
    assert made.rows["random"]["f1"].value > 0


def test_the_figures_of_the_report_are_means_over_pairs_by_hand(made):
    own = made.rows["label_attention"]
    # Two codes are found to the word; of "asthma was" one word of two: F1 2/3, IoU 1/2.
    assert own["f1"].value == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert own["iou"].value == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert own["precision"].value == own["spans_found"].value == 1
    # "hip fracture" is what the description says, "asthma" is not.
    assert made.rows["string match"]["f1"].value == pytest.approx(2 / 3)
    assert made.rows["ceiling"]["f1"].value == 1
    first = [plausibility([(0, 7)], [], "x").f1] + [
        plausibility([(0, end)], places(NOTES[note], part), NOTES[note]).f1
        for note, end, part in [(1, 7, "hip fracture"), (2, 8, "hip fracture"), (2, 3, "asthma was")]
    ]
    assert made.rows["first words"]["f1"].value == pytest.approx(np.mean(first[1:]))


def test_intervals_resample_patients_and_not_pairs_or_notes(made):
    """One note has F1 1, the other 1 and 2/3: a resample of notes is one of three, the ends are the extreme ones."""
    interval = made.rows["label_attention"]["f1"]
    assert interval.low == pytest.approx(5 / 6)
    assert interval.high == 1
    one_patient = report(patients=[5, 6, 6, 8]).rows["label_attention"]["f1"]
    assert one_patient.low == one_patient.high == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_evidence_that_the_model_rests_on_is_more_faithful_than_random_weights(made):
    own, random = made.rows["label_attention"], made.rows["random"]
    assert own["comprehensiveness"].value > random["comprehensiveness"].value + 0.1
    assert own["sufficiency"].value < random["sufficiency"].value
    assert math.isnan(made.rows["string match"]["sufficiency"].value)


def test_thresholds_come_from_validation_alone(made):
    """Whatever the test spans say, the thresholds stay; other validation spans move them."""
    other = report(spans=marked((1, "S72", "no news today", "term"), (2, "J45", "the film", "term")))
    assert other.thresholds == made.thresholds
    model = random_coder(words_of(*NOTES), "S72", "J45", max_position_embeddings=64)
    thresholds = [
        report(model, validation_spans=spans).thresholds["gradient"]
        for spans in (VALIDATION_SPANS, marked((0, "J45", NOTES[0], "term"), (3, "J45", NOTES[3], "term")))
    ]
    assert thresholds[1] < thresholds[0], "a true span that is the whole note wants every word"


def test_the_report_reads_as_a_table(made):
    lines = made.markdown().splitlines()
    assert lines[0].startswith("| Evidence | Precision | Recall | F1 | IoU | Spans found | Comprehensiveness")
    assert lines[2].startswith("| label attention | 1.000 (1.000 to 1.000) |")
    assert len({line.count("|") for line in lines[:9]}) == 1
    assert lines[6].endswith("| – | – |"), "first words have no faithfulness"
    assert "3 (note, code) pairs of 2 notes" in lines[-1]


def test_the_cls_head_is_reported_by_its_gradient():
    tokenizer = words_of(*NOTES)
    made = report(random_coder(tokenizer, "S72", "J45", head="cls"))
    assert list(made.rows)[:2] == ["gradient", "random"]


def test_a_report_without_evidence_or_with_leakage_is_refused():
    with pytest.raises(EhrDataError, match="got 1 codes of notes with evidence"):
        report(spans=marked((1, "Z99", "film", "term")))
    with pytest.raises(ValueError, match="other notes than `notes`"):
        report(validation_notes=note_table(*NOTES))
