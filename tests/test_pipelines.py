"""``pipeline("icd-coding")`` from note to decisions and spans, its odd notes and refusals; fill-mask on notes."""

import json

import numpy as np
import polars
import pyarrow
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import hf_ehr.models.pipeline_icd_coding as pipeline_icd_coding
from hf_ehr import EhrBertConfig, EhrBertForICDCoding, EhrBertForMaskedLM, EhrBertForSequenceClassification
from hf_ehr.explanations import label_attention_evidence
from hf_ehr.models.pipeline_frames import frame_of, rows_of
from hf_ehr.pipelines import ICDCodingPipeline, highlight_note
from tests.coders import HIP, names, places, pointing_coder, random_coder, words_of

WORDS = {"ICD10CM/S72.002A": ["hip", "fracture"], "ICD10CM/J45.909": ["asthma"], "local": ["thyroid"]}
S72, J45, LOCAL = WORDS
FIELDS = ["code", "description", "probability", "decision", "spans"]


@pytest.fixture(scope="module")
def tokenizer():
    return words_of(HIP, "thyroid")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("coder")
    pointing_coder(tokenizer, WORDS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def coder(folder):
    return pipeline("icd-coding", model=folder, device="cpu")


def coder_of(model, tokenizer, **arguments):
    return ICDCodingPipeline(model=model, tokenizer=tokenizer, device="cpu", **arguments)


def found(codes):
    """Code → characters of its spans, in order of the text."""
    return {code["code"]: sorted((span["start"], span["end"]) for span in code["spans"]) for code in codes}


def test_the_task_is_registered_by_importing_the_package():
    assert "icd-coding" in PIPELINE_REGISTRY.get_supported_tasks()


# From note to codes


def test_a_folder_codes_a_note_with_probabilities_and_the_text_of_the_evidence(coder):
    codes = coder(HIP)
    assert isinstance(coder, ICDCodingPipeline)
    assert all(list(code) == FIELDS for code in codes)
    probabilities = [code["probability"] for code in codes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert {code["code"]: code["probability"] > 0.9 for code in codes} == {S72: True, J45: True, LOCAL: False}
    first = {code["code"]: code["spans"][0] for code in codes}
    assert first[S72]["text"] == "hip fracture"
    assert first[J45] == {"start": 6, "end": 12, "weight": pytest.approx(1, abs=1e-3), "text": "asthma"}
    assert json.loads(json.dumps(codes)) == codes


def test_the_scores_are_those_of_the_model_through_its_auto_class(coder, folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(folder)(HIP, return_tensors="pt")).logits[0]
    expected = {model.config.id2label[label]: score for label, score in enumerate(logits.sigmoid().tolist())}
    assert {code["code"]: code["probability"] for code in coder(HIP)} == pytest.approx(expected, abs=1e-6)


def test_a_code_is_auto_coded_or_reviewed_from_its_own_threshold_on(tokenizer):
    model = pointing_coder(tokenizer, WORDS)
    with torch.no_grad():
        model.head.output.weight.zero_()
        model.head.output.bias.copy_(torch.tensor([0.8, 0.6, 0.4]).logit())

    def decisions(review, auto, **arguments):
        model.config.thresholds, model.config.auto_code_thresholds = review, auto
        return [code["decision"] for code in coder_of(model, tokenizer)("x", **arguments)]

    assert decisions(None, None) == ["review", "review", "ignore"]
    assert decisions({J45: 0.7, LOCAL: 0.3}, None) == ["review", "ignore", "review"]
    assert decisions(None, {S72: 0.75, LOCAL: 0.75}) == ["auto-code", "review", "ignore"]
    assert decisions({S72: 0.9}, {S72: 0.7}) == ["auto-code", "review", "ignore"]
    assert decisions({S72: 2.0}, {J45: 2.0}) == ["ignore", "review", "ignore"]
    assert decisions({J45: 0.7, LOCAL: 0.3}, {S72: 0.75}, threshold=0.61) == ["auto-code", "ignore", "ignore"]
    model.config.common_threshold = 0.35
    assert decisions({J45: 0.7}, None) == ["review", "ignore", "review"]


def test_descriptions_come_from_the_argument_then_the_configuration_then_the_public_lists(tokenizer):
    model = pointing_coder(tokenizer, WORDS)
    coder = coder_of(model, tokenizer)

    def descriptions(**arguments):
        return {code["code"]: code["description"] for code in coder(HIP, **arguments)}

    assert descriptions()[S72].startswith("Fracture of unspecified part of neck of left femur")
    assert descriptions()[LOCAL] is None
    model.config.label_descriptions = {S72: "Fractura", LOCAL: "Thyroid, local code"}
    own = descriptions(descriptions={S72: "Hip"})
    assert (own[S72], own[LOCAL], own[J45]) == ("Hip", "Thyroid, local code", "Unspecified asthma, uncomplicated")


def test_arguments_count_when_the_pipeline_is_made_and_when_it_is_called(coder, folder, tokenizer):
    assert [code["code"] for code in coder(HIP, top_k=1)] == [coder(HIP)[0]["code"]]
    assert [code["spans"] for code in coder(HIP, evidence=None)] == [[], [], []]
    made = pipeline("icd-coding", model=folder, device="cpu", top_k=2, evidence=None)
    assert len(made(HIP)) == 2
    assert [len(made(HIP, top_k=None)), made(HIP, evidence="gradient")[0]["spans"] != []] == [3, True]
    twice = "asthma left asthma day asthma"
    spans = {count: coder(twice, max_spans=count, top_k=1)[0]["spans"] for count in (2, None)}
    assert [len(spans[2]), len(spans[None])] == [2, 3]
    random = coder_of(
        random_coder(words_of(HIP, "thyroid"), *WORDS), words_of(HIP, "thyroid"), top_k=1, max_spans=None
    )
    marked = [random(HIP, relative_threshold=share)[0]["spans"] for share in (0.95, 0.05)]
    few, many = (sum(span["end"] - span["start"] for span in spans) for spans in marked)
    assert few < many


@pytest.mark.parametrize("evidence", ["label_attention", "attention_gradient", "gradient"])
@pytest.mark.parametrize("pooling", ["attention", "max"])
def test_every_kind_of_evidence_marks_the_words_that_the_code_rests_on(tokenizer, evidence, pooling):
    coder = coder_of(pointing_coder(tokenizer, WORDS, segment_pooling=pooling), tokenizer)
    spans = found(coder(HIP, evidence=evidence, max_length=12))
    assert spans[S72] == places(HIP, "hip fracture")
    assert spans[J45] == places(HIP, "asthma")


# Several notes, long notes, odd notes


def test_a_list_a_generator_and_single_notes_give_the_same(coder):
    notes = [HIP, "", "asthma " * 70, "left hip"]
    alone = [coder(note) for note in notes]
    for together in (coder(notes), coder(notes, batch_size=3), list(coder(note for note in notes))):
        assert [found(codes) for codes in together] == [found(codes) for codes in alone]
        scores = [[code["probability"] for code in codes] for codes in together]
        for own, single in zip(scores, alone, strict=True):
            assert own == pytest.approx([code["probability"] for code in single], abs=1e-6)
    assert coder([]) == []


@pytest.mark.parametrize("evidence", ["label_attention", "attention_gradient"])
def test_a_note_of_200_000_characters_is_read_to_its_end_a_few_segments_at_a_time(coder, evidence):
    filler = "Denies chest pain on the left, 1 day ago. "
    note = filler * 2400 + "Known asthma. " + filler * 2400 + "Then a hip fracture"
    assert len(note) > 200_000
    read = []
    hook = coder.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(
            next(kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs).shape[:2]
        ),
        with_kwargs=True,
    )
    codes = coder(note, batch_size=5, top_k=2, evidence=evidence)
    hook.remove()
    assert max(rows for rows, _ in read) == 5
    assert max(length for _, length in read) == 64
    assert found(codes) == {S72: places(note, "hip fracture"), J45: places(note, "asthma")}
    assert [code["spans"][0]["text"] for code in codes if code["code"] == S72] == ["hip fracture"]


def test_an_empty_note_gets_the_scores_of_a_note_that_says_nothing_and_no_spans(coder):
    for note in ("", " \n\t "):
        codes = coder(note)
        assert [code["decision"] for code in codes] == ["ignore"] * 3
        assert found(codes) == {S72: [], J45: [], LOCAL: []}


def test_offsets_count_characters_of_the_original_note_in_any_script(coder):
    note = "🫀🫀 心房細動\r\n\r\nأزمة  HIP   fracture \ud800 Ñandú ASTHMA"
    spans = found(coder(note))
    assert spans[S72] == places(note, "HIP", "fracture"), "three spaces part two spans"
    assert spans[J45] == places(note, "ASTHMA")
    assert [span["text"] for span in coder(note, top_k=3)[0]["spans"]]


# Frames


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_of_notes_becomes_a_frame_with_a_row_a_code(coder, library):
    kind = pytest.importorskip(library).DataFrame
    frame = kind({"note_id": ["a", "b", "c"], "subject_id": [7, 7, 9], "text": [HIP, "", "asthma"], "page": [1, 2, 3]})
    answers = coder(frame, top_k=2)
    assert type(answers) is kind
    assert list(answers.columns) == ["note_id", "subject_id", *FIELDS]
    rows = rows_of(answers)  # pandas shows a missing description as NaN
    assert [(row["note_id"], row["subject_id"]) for row in rows] == [("a", 7)] * 2 + [("b", 7)] * 2 + [("c", 9)] * 2
    told = [{name: row[name] for name in FIELDS} for row in rows]
    assert told == [code for note in (HIP, "", "asthma") for code in coder(note, top_k=2)]
    only = coder(frame[["text"]], top_k=1, evidence=None)
    assert list(only.columns) == FIELDS
    assert len(only) == 3


def test_a_frame_of_many_rows_without_spans_keeps_the_one_that_has_some():
    empty, full = {"description": None, "spans": []}, {"description": "Hip", "spans": [{"start": 1, "end": 2}]}
    made = frame_of([empty] * 200 + [full], like=polars.DataFrame())
    assert made.to_dicts()[-1] == full


def test_a_row_of_notes_is_a_note(coder):
    assert coder({"text": HIP, "note_id": "a"}) == coder(HIP)
    assert coder([{"text": HIP}, "asthma"]) == [coder(HIP), coder("asthma")]


# Models


def test_the_cls_head_shows_gradients_and_has_no_label_attention(tokenizer):
    coder = coder_of(random_coder(tokenizer, *WORDS, head="cls"), tokenizer)
    assert all(code["spans"] for code in coder(HIP))
    assert coder(HIP) == coder(HIP, evidence="gradient")
    with pytest.raises(ValueError, match="'gradient' with `head='cls'`"):
        coder(HIP, evidence="label_attention")


def test_a_model_of_one_label_codes(tokenizer):
    (code,) = coder_of(pointing_coder(tokenizer, {S72: ["hip"]}), tokenizer)(HIP)
    assert (code["code"], code["decision"], found([code])) == (S72, "review", {S72: places(HIP, "hip")})


def test_another_encoder_codes_from_its_folder(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=9, **sizes))
    model = EhrBertForICDCoding.from_encoder(encoder, names(*WORDS)["id2label"]).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    codes = pipeline("icd-coding", model=str(tmp_path), device="cpu")(HIP)
    assert codes == coder_of(model, tokenizer)(HIP)
    assert all(code["spans"] for code in codes)


def test_many_codes_of_a_long_note_hold_few_weights_at_once(tokenizer, monkeypatch):
    coder = coder_of(random_coder(tokenizer, *[f"code {i}" for i in range(50)]), tokenizer, top_k=None)
    whole = coder(HIP)
    monkeypatch.setattr(pipeline_icd_coding, "WEIGHT_BUDGET", 60)
    assert len(whole) == 50
    assert [found([code]) for code in coder(HIP)] == [found([code]) for code in whole]


def test_the_thresholds_of_a_saved_model_decide(tokenizer, tmp_path):
    model = pointing_coder(tokenizer, WORDS)
    model.config.auto_code_thresholds = {J45: 0.9}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    codes = pipeline("icd-coding", model=tmp_path, device="cpu")(HIP)
    assert {code["code"]: code["decision"] for code in codes} == {S72: "review", J45: "auto-code", LOCAL: "ignore"}


@pytest.mark.parametrize("most", [1, 2, None])
def test_a_coder_reads_as_many_windows_of_a_note_as_it_was_trained_on_and_of_that_length(folder, most):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    short = AutoTokenizer.from_pretrained(folder)
    short.model_max_length, model.config.max_segments = 8, most
    coder, text = coder_of(model, short), "on day a on the left asthma on day a on the hip fracture"
    inside = {1: [], 2: [J45], None: [J45, S72]}[most]  # six words a window
    codes = {code["code"]: code for code in coder(text)}
    assert sorted(code for code, one in codes.items() if one["probability"] > 0.9) == sorted(inside)
    whole = {code["code"] for code in coder(text, max_length=32) if code["probability"] > 0.9}
    assert whole == {J45, S72}  # one longer window holds the whole note
    read = label_attention_evidence(model, short, text, [0]).offsets.max()
    assert read == {1: text.index(" asthma"), 2: text.index(" hip"), None: len(text)}[most]


# Refusals


@pytest.mark.parametrize(
    "note", [5, None, {"note": HIP}, {"text": 5}, (HIP, HIP), [HIP, None], [[HIP]], b"note"], ids=repr
)
def test_what_is_no_note_is_refused(coder, note):
    with pytest.raises(ValueError, match=r"`inputs` must be a note \(str\) or a list of notes"):
        coder(note)


def test_frames_that_hold_no_notes_are_refused(coder):
    with pytest.raises(ValueError, match="must have a column `text`"):
        coder(polars.DataFrame({"note": [HIP]}))
    with pytest.raises(ValueError, match=r"`inputs` must be a note \(str\).* got dict without such a `text`"):
        coder(polars.DataFrame({"text": [HIP, None]}))
    with pytest.raises(ValueError, match="`inputs` must be a note"):
        coder(pyarrow.table({"text": [HIP]}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"max_spans": 0}, "`max_spans` must be at least 1"),
        ({"threshold": 1.2}, r"`threshold` must lie in \[0, 1\]"),
        ({"evidence": "lime"}, "`evidence` must be one of label_attention"),
        ({"relative_threshold": 0}, "`relative_threshold` must lie in"),
        ({"max_length": 100}, "`max_length` must be at most 64"),
        ({"topk": 3}, "Arguments must be among top_k, threshold, .*, got topk"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments_out_of_range_are_refused(coder, arguments, message):
    with pytest.raises(ValueError, match=message):
        coder(HIP, **arguments)


def test_another_model_and_thresholds_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must be an `EhrBertForICDCoding`, got EhrBertForSequenceClassification"):
        coder_of(EhrBertForSequenceClassification(EhrBertConfig.tiny(vocab_size=9, num_labels=2)), tokenizer)
    with pytest.raises(ValueError, match="`tokenizer` must come with the model"):
        coder_of(pointing_coder(tokenizer, WORDS), None)
    for field, value, message in (
        ("thresholds", {"I99": 0.5}, "`thresholds` must name labels of the model"),
        ("auto_code_thresholds", {S72: float("nan")}, "`auto_code_thresholds` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            coder_of(pointing_coder(tokenizer, WORDS, **{field: value}), tokenizer)


def test_a_note_becomes_a_page_from_a_pipeline_a_folder_or_a_model(coder, folder, tokenizer, tmp_path):
    model = pointing_coder(tokenizer, WORDS)
    made = []
    for number, (source, arguments) in enumerate([(coder, {}), (folder, {}), (model, {"tokenizer": tokenizer})]):
        codes = highlight_note(source, HIP, tmp_path / f"{number}.html", top_k=2, **arguments)
        assert len(codes) == 2
        made.append((tmp_path / f"{number}.html").read_text())
    assert made[0] == made[1] == made[2]
    assert "hip fracture" in made[0]


# Fill-mask (acceptance row 72)


def test_fill_mask_works_with_the_notes_own_vocabulary_from_a_folder(tmp_path):
    """A model whose decoder is made to answer one word says that word, whatever the cleaning of the tokenizer."""
    tokenizer = words_of("Patient denies chest pain on 12/03.", "fever", cleaning="bert_xml")
    torch.manual_seed(0)
    config = EhrBertConfig.tiny(
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = EhrBertForMaskedLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().bias[tokenizer.convert_tokens_to_ids("fever")] = 20.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path), device="cpu")
    best, second = fill(f"Patient denies {fill.tokenizer.mask_token} on 12/03.", top_k=2)
    assert best["token_str"] == "fever"
    assert best["sequence"].split() == ["patient", "denies", "fever", "on", "nn", "/", "nn", "."]
    assert best["score"] > 0.99 > second["score"]
    two = fill("[MASK] denies [MASK]", top_k=1)
    assert [answers[0]["token_str"] for answers in two] == ["fever", "fever"]
    inputs = tokenizer("Patient denies [MASK] on 12/03.", return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id].softmax(-1)[0]
    np.testing.assert_allclose(second["score"], scores.sort(descending=True).values[1], rtol=1e-4)
