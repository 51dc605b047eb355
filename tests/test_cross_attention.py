"""Codes × text attention of one visit: the weights are the module's own, and figure, page and command show them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import BertConfig

from hf_ehr import (
    EhrCodeTokenizer,
    GBertConfig,
    MedBertConfig,
    MedBertModel,
    MedMPLMConfig,
    MedMPLMForICDCoding,
    MedMPLMForPreTraining,
    MedMPLMForReadmission,
    MedMPLMModel,
)
from hf_ehr.cli.main import main
from hf_ehr.cross_attention_maps import (
    MAX_TOKENS,
    KindAttention,
    cross_attention_map,
    cross_attention_of,
)
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from tests.coders import words_of

NOTE = "Reports missed doses. Mother: daily smoking. Frail, slow to recover."
VISIT = {
    "diagnoses": ["ICD10CM/E11.9", "ICD10CM/I50.9", "ICD10CM/N18.30", "ICD10CM/E11.65"],
    "medications": ["ATC/A10BA", "ATC/C03CA"],
    "note": NOTE,
}
SEEN = ["ICD10CM/E11.9", "ICD10CM/I50.9", "ICD10CM/N18.30", "ICD10CM/E11"]  # the last backs off
LAST_TOKEN = 16  # [SEP]; the others are [CLS], eleven words and four marks


def code_tokenizer(codes, kind):
    return EhrCodeTokenizer.from_codes(codes, kinds=[kind])


@pytest.fixture(scope="module")
def processor():
    diagnoses = code_tokenizer([*SEEN, "ICD10CM/J44.9"], "diagnoses")
    return MedMPLMProcessor(diagnoses, code_tokenizer(["ATC/A10BA", "ATC/C03CA"], "medications"), words_of(NOTE))


def model_of(processor, kind=MedMPLMModel, scale=4.0, **fields):
    """A small model whose attention is not flat."""
    torch.manual_seed(0)
    tokens = [t.convert_ids_to_tokens(range(len(t))) for t in processor.code_tokenizers.values()]
    codes = GBertConfig.from_vocabularies(*tokens, hidden_size=16, intermediate_size=16, hidden_dropout_prob=0.5)
    bert = BertConfig(
        vocab_size=len(processor.note_tokenizer), hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    model = kind(MedMPLMConfig(code_config=codes, note_config=bert, **fields)).eval()
    for module in (model.base_model.cross_modal or {}).values():
        for layer in filter(None, (module.code_queries, module.text_queries)):
            layer.query.weight.data *= scale
            layer.key_weight.data *= scale
    return model


@pytest.fixture(scope="module")
def view(processor):
    return cross_attention_of(model_of(processor), processor, VISIT)


# The weights


def test_the_view_names_the_codes_and_tokens_that_the_model_saw(view, processor):
    assert [kind.kind for kind in view.kinds] == ["diagnosis", "medication"]
    assert list(view.kinds[0].codes) == SEEN
    assert view.kinds[0].descriptions[1] == "Heart failure, unspecified"
    assert list(view.kinds[1].codes) == VISIT["medications"]
    assert len(view.tokens) == LAST_TOKEN + 1 == view.note_tokens
    words = [view.text[start:end].lower() for start, end in view.spans]
    assert words == ["", *view.tokens[1:-1], ""]


def test_every_row_of_tokens_by_codes_and_of_codes_by_tokens_sums_to_one(view):
    tokens = len(view.tokens)
    for kind in view.kinds:
        codes = len(kind.codes)
        assert kind.text_looks.shape == (1 + tokens, codes)
        assert kind.codes_look.shape == (1 + codes, tokens)
        for weights in (kind.text_looks, kind.codes_look):
            assert weights.dtype == np.float32
            assert (weights >= 0).all()
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
            assert weights.std(axis=1).min() > 1e-3, "flat rows would sum to 1 whatever is wrong"


@pytest.mark.parametrize("mode", ["cross", "cross_residual"])
def test_the_first_rows_are_what_the_model_returns_of_the_visit_in_a_batch(processor, mode):
    model = model_of(processor, cross_modal=mode)
    longer = {"diagnoses": [*SEEN, "ICD10CM/J44.9"], "medications": ["ATC/A10BA"], "note": NOTE + " " + NOTE}
    with torch.no_grad():
        outputs = model(**processor([longer, VISIT]))
    view = cross_attention_of(model, processor, VISIT)
    for kind in view.kinds:
        codes, tokens = len(kind.codes), len(view.tokens)
        expected = outputs[f"note_{kind.kind}_attentions"][1]
        np.testing.assert_allclose(kind.text_looks[0], expected[:codes], atol=1e-6)
        assert not expected[codes:].any()
        np.testing.assert_allclose(kind.codes_look[0], outputs[f"{kind.kind}_note_attentions"][1][:tokens], atol=1e-6)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_the_other_rows_put_one_code_or_token_in_the_place_of_the_whole(processor, pooling):
    model = model_of(processor, note_pooling=pooling)
    view = cross_attention_of(model, processor, VISIT)
    batch = processor([VISIT])
    with torch.no_grad():
        states = model.note_encoder(batch["note_input_ids"], batch["note_attention_mask"]).last_hidden_state[0]
        encoded = model.code_encoder(batch["diagnosis_ids"], batch["medication_ids"])
        vectors = torch.tanh(model.note_encoder.pooler.dense(states)) if pooling == "pooler" else states
        for kind in view.kinds:
            module, codes = model.cross_modal[kind.kind], encoded[f"{kind.kind}_states"][0]
            for layer, queries, keys, found in (
                (module.text_queries, vectors, codes, kind.text_looks[1:]),
                (module.code_queries, codes, states, kind.codes_look[1:]),
            ):
                for row, query in enumerate(queries):
                    q = layer.query.weight @ query + layer.query.bias
                    k = keys @ layer.key_weight.T + layer.key_bias
                    np.testing.assert_allclose(found[row], (k @ q / len(q) ** 0.5).softmax(0), atol=1e-5)
    if pooling == "pooler":  # the note's own vector is that of its first token
        np.testing.assert_allclose(view.kinds[0].text_looks[1], view.kinds[0].text_looks[0], atol=1e-6)


def test_where_codes_look_at_nothing_only_the_note_looks(processor, tmp_path):
    view = cross_attention_of(model_of(processor, cross_modal="text_only"), processor, VISIT)
    assert [kind.codes_look for kind in view.kinds] == [None, None]
    figure = cross_attention_map(view, tmp_path / "text.png")
    assert [axes.get_title(loc="left")[:8] for axes in figure.axes if axes.images] == ["The note"]


@pytest.mark.parametrize("kind", [MedMPLMForPreTraining, MedMPLMForReadmission])
def test_any_head_shows_its_base(processor, kind):
    model = model_of(processor, kind)
    expected = cross_attention_of(model.base_model, processor, VISIT)
    found = cross_attention_of(model, processor, VISIT)
    np.testing.assert_array_equal(found.kinds[0].codes_look, expected.kinds[0].codes_look)


def test_a_coder_has_no_diagnoses_to_show_and_a_visit_only_the_kinds_it_has(processor):
    coder = model_of(processor, MedMPLMForICDCoding)
    assert [kind.kind for kind in cross_attention_of(coder, processor, VISIT).kinds] == ["medication"]
    view = cross_attention_of(model_of(processor), processor, VISIT | {"medications": None})
    assert [kind.kind for kind in view.kinds] == ["diagnosis"]


def test_the_model_is_left_as_it_was(processor):
    model = model_of(processor).train()
    model.note_encoder.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first, second = (cross_attention_of(model, processor, VISIT).kinds[0].codes_look for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_shown_says_what_is_missing(processor):
    model = model_of(processor)
    for changed, message in (
        ({"note": None}, "`visit` must hold a `note`"),
        ({"note": "  "}, "`visit` must hold a `note`"),
        ({"diagnoses": [], "medications": []}, "at least one code"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_attention_of(model, processor, VISIT | changed)
    with pytest.raises(ValueError, match="must have a cross-modal module"):
        cross_attention_of(model_of(processor, cross_modal="none"), processor, VISIT)
    blind = MedMPLMProcessor(processor.diagnosis_tokenizer, processor.medication_tokenizer)
    with pytest.raises(ValueError, match="tokenizer of notes"):
        cross_attention_of(model, blind, VISIT)


def test_weights_that_do_not_sum_to_one_or_do_not_fit_are_refused():
    rows = np.full((3, 2), 0.5, np.float32)
    KindAttention("diagnosis", SEEN[:2], [None] * 2, rows)
    with pytest.raises(ValueError, match="rows that sum to 1"):
        KindAttention("diagnosis", SEEN[:2], [None] * 2, 2 * rows)
    with pytest.raises(ValueError, match=r"`text_looks` must be \(1 \+ tokens, 3\)"):
        KindAttention("diagnosis", SEEN[:3], [None] * 3, rows)
    with pytest.raises(ValueError, match=r"`codes_look` must be \(3, 2\)"):
        KindAttention("diagnosis", SEEN[:2], [None] * 2, rows, rows.T)


# The figure


def images(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_figure_draws_codes_by_tokens_both_ways(view, tmp_path):
    figure = cross_attention_map(view, tmp_path / "visit.png")
    upper, lower = images(figure)
    np.testing.assert_array_equal(upper, np.concatenate([kind.codes_look for kind in view.kinds]))
    np.testing.assert_array_equal(lower, np.concatenate([kind.text_looks for kind in view.kinds], axis=1).T)
    np.testing.assert_allclose(upper.sum(axis=1), 1, atol=1e-5)
    first, second = (axes for axes in figure.axes if axes.images)
    assert ticks(first.yaxis)[0] == "all diagnoses"
    assert ticks(first.yaxis)[1].startswith("E11.9 Type 2 diabetes")
    assert ticks(first.yaxis)[5:] == ["all medications", "A10BA", "C03CA"]
    assert ticks(first.xaxis) == list(view.tokens)
    assert ticks(second.xaxis) == ["whole note", *view.tokens]
    assert [len(axes.lines) for axes in (first, second)] == [1, 1]  # between the kinds
    with Image.open(tmp_path / "visit.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


def test_a_long_note_is_drawn_where_codes_look_and_says_what_is_left_out(processor, tmp_path):
    long = VISIT | {"note": " ".join([NOTE] * 8)}  # 122 tokens, of which the tokenizer keeps 64
    view = cross_attention_of(model_of(processor), processor, long)
    assert (len(view.tokens), view.note_tokens) == (64, 8 * 15 + 2)
    figure = cross_attention_map(view, tmp_path / "long.png")
    upper, lower = images(figure)
    assert (upper.shape[1], lower.shape[1]) == (MAX_TOKENS, MAX_TOKENS + 1)
    strongest = np.max([kind.codes_look[0] for kind in view.kinds], axis=0)
    left_out = np.sort(strongest)[: 64 - MAX_TOKENS]
    assert np.max([upper[0], upper[5]], axis=0).min() >= left_out.max() - 1e-7
    text = figure._supxlabel.get_text()
    assert "Drawn are 48 of 64 tokens" in text
    assert "the first 64 of 122 tokens" in text


# The command


def test_the_command_draws_a_visit_of_a_checkpoint(tmp_path, capsys):
    data = tmp_path / "data"
    prepare("synthetic_text_codes", None, data, shards=1, workers=1, progress=False, options={"patients": 3})
    records = pq.read_table(shard_paths(data, "records")[0]).to_pylist()
    visits = [visit for record in records for visit in record["visits"]]
    codes = {kind: sorted({code for visit in visits for code in visit[kind]}) for kind in ("diagnoses", "medications")}
    notes = words_of(*(visit["notes"][0]["text"] for visit in visits), max_length=128)
    processor = MedMPLMProcessor(*(code_tokenizer(found, kind) for kind, found in codes.items()), notes)
    folder = tmp_path / "model"
    model_of(processor, MedMPLMForReadmission).save_pretrained(folder)
    processor.save_pretrained(folder)
    words = ["attention", "--model", str(folder), "--data", str(data), "--row", "1", "--output"]
    assert main([*words, str(tmp_path / "newest")]) == 0
    assert main([*words, str(tmp_path / "first"), "--visit", "1"]) == 0
    for name, visit in (("newest", records[1]["visits"][-1]), ("first", records[1]["visits"][0])):
        assert (tmp_path / name / "attention.png").read_bytes().startswith(b"\x89PNG")
        page = (tmp_path / name / "attention.html").read_text()
        shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
        assert [code["code"] for code in shown["kinds"][0]["codes"]] == visit["diagnoses"]
        assert visit["notes"][0]["text"] in "".join(piece for piece, _ in shown["pieces"])
    capsys.readouterr()
    assert main([*words, str(tmp_path / "none"), "--visit", "9"]) == 2
    assert "`visit` must be one of" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "none"), "--layer", "1"]) == 2
    assert "`layer` must be left out for MedM-PLM" in capsys.readouterr().err
    plain = code_tokenizer(codes["diagnoses"], "diagnoses")
    MedBertModel(MedBertConfig.tiny(vocab_size=len(plain))).save_pretrained(tmp_path / "medbert")
    plain.save_pretrained(tmp_path / "medbert")
    words[2] = str(tmp_path / "medbert")
    assert main([*words, str(tmp_path / "none"), "--visit", "1"]) == 2
    assert "`visit` must be left out" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
