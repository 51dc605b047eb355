"""Label vectors from descriptions: which text a code gets, and that its vector is the paper's mean."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from hf_ehr import EhrBertConfig, EhrBertForICDCoding, ontology
from hf_ehr.label_embeddings import init_label_embeddings
from hf_ehr.notes import fit_word_tokenizer

CODES = ["ICD10CM/E11.9", "ICD10CM/I50.9", "ICD10CM/E11", "LOCAL/42"]


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join(name for name in ontology.describe(CODES[:2]) if name)
    notes = pa.table({"note_id": ["0"], "subject_id": [0], "text": [f"{words} . type 2 diabetes mellitus"]})
    return fit_word_tokenizer(notes, subject_ids=[0], cleaning="none", min_patients=1)


def coder(tokenizer, codes=CODES, **options) -> EhrBertForICDCoding:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(codes)), "label2id": {code: i for i, code in enumerate(codes)}}
    return EhrBertForICDCoding(EhrBertConfig.tiny(vocab_size=len(tokenizer), **labels, **options)).eval()


@pytest.mark.parametrize("padding", [0, 7], ids=["alone", "beside a longer text"])
def test_a_label_vector_is_the_mean_of_the_last_states_over_the_words_of_its_description(tokenizer, padding):
    model = coder(tokenizer)
    text = "type 2 diabetes"
    others = {CODES[1]: "heart failure , unspecified " + "heart " * padding}
    init_label_embeddings(model, tokenizer, descriptions={CODES[0]: text} | others)
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 5)  # [CLS] type 2 diabetes [SEP]
    states = model.model(**inputs).last_hidden_state[0, 1:4]
    expected = model.head.norm(states).mean(0)
    torch.testing.assert_close(model.label_embeddings[0], expected, atol=1e-5, rtol=1e-5)


def test_word_embeddings_and_projected_keys_are_averaged_alike(tokenizer):
    model = coder(tokenizer, label_key_size=16)
    init_label_embeddings(model, tokenizer, "word_embeddings", descriptions={CODES[0]: "heart failure"})
    words = model.get_input_embeddings()(torch.tensor(tokenizer.convert_tokens_to_ids(["heart", "failure"])))
    expected = torch.tanh(model.head.key(model.head.norm(words))).mean(0)
    torch.testing.assert_close(model.label_embeddings[0], expected)


def test_parent_sum_adds_the_named_ancestors_so_that_siblings_start_near_each_other(tokenizer):
    codes = ["ICD10CM/E11.9", "ICD10CM/E11.65"]

    def similarity(method: str) -> float:
        model = coder(tokenizer, codes)
        init_label_embeddings(model, tokenizer, method)
        return torch.cosine_similarity(*model.label_embeddings, dim=0).item()

    assert similarity("parent_sum") > similarity("final_layer")


def test_labels_without_a_known_word_keep_their_random_start(tokenizer):
    model = coder(tokenizer)
    before = model.label_embeddings.detach().clone()
    report = init_label_embeddings(
        model, tokenizer, descriptions={CODES[0]: "heart failure", CODES[1]: "zyzzyva", CODES[2]: ""}
    )
    assert torch.equal(model.label_embeddings[1:], before[1:])
    assert not torch.equal(model.label_embeddings[0], before[0])
    assert (report.labels, report.described, report.from_ancestor, report.random) == (4, 1, 0, 3)


def test_the_report_counts_what_the_ontology_knows(tokenizer):
    model = coder(tokenizer, ["ICD10CM/E11.9", "ICD10CM/I50.9XYZ", "LOCAL/42"])
    report = init_label_embeddings(model, tokenizer)
    assert (report.labels, report.described, report.from_ancestor, report.random) == (3, 1, 1, 1)


def test_a_model_that_carries_descriptions_is_started_from_them(tokenizer):
    carried, passed = coder(tokenizer), coder(tokenizer)
    carried.config.label_descriptions = {"LOCAL/42": "heart failure"}
    report = init_label_embeddings(carried, tokenizer)
    assert report.random == 0
    init_label_embeddings(passed, tokenizer, descriptions={"LOCAL/42": "heart failure"})
    torch.testing.assert_close(carried.label_embeddings[3], passed.label_embeddings[3])


def test_random_changes_nothing(tokenizer):
    model = coder(tokenizer)
    before = model.label_embeddings.detach().clone()
    assert init_label_embeddings(model, tokenizer, "random").random == len(CODES)
    assert torch.equal(model.label_embeddings, before)


def test_a_label_that_starts_from_its_description_looks_at_the_words_of_its_description(tokenizer):
    model = coder(tokenizer)
    init_label_embeddings(model, tokenizer, "word_embeddings")
    note = tokenizer("complications of heart failure . type 2 diabetes mellitus", return_tensors="pt")
    ids = note["input_ids"][0].tolist()
    heart, sugar = (
        [ids.index(token) for token in tokenizer.convert_tokens_to_ids(words)]
        for words in (["heart", "failure"], ["type", "2", "diabetes", "mellitus"])
    )
    states = model.get_input_embeddings()(note["input_ids"])
    scores = model.label_embeddings @ model.head.keys(states)[0].T  # (labels, tokens)
    assert scores[0, sugar].mean() > scores[1, sugar].mean()
    assert scores[1, heart].mean() > scores[0, heart].mean()


def test_any_encoder_of_the_library_describes_labels(tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    model = EhrBertForICDCoding.from_encoder(encoder, dict(enumerate(CODES)))
    assert init_label_embeddings(model, tokenizer).random == 1
    assert model.label_embeddings.isfinite().all()


def test_unknown_methods_and_heads_without_label_vectors_are_refused(tokenizer):
    with pytest.raises(ValueError, match="`method` must be one of final_layer"):
        init_label_embeddings(coder(tokenizer), tokenizer, "last")
    with pytest.raises(ValueError, match="`head` must be 'xml'"):
        init_label_embeddings(coder(tokenizer, head="cls"), tokenizer)
