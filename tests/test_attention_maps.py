"""Attention over one patient: the weights are the model's own, the model is left as it was, and figures draw them."""

import runpy
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ehr import (
    EhrBertConfig,
    EhrBertForMaskedLM,
    EhrCodeTokenizer,
    EhrRnnConfig,
    EhrRnnModel,
    MedBertConfig,
    MedBertForMaskedLM,
    MedBertForSequenceClassification,
    MedBertModel,
)
from hf_ehr.attention_maps import (
    MAX_DRAWN,
    AttentionView,
    NoteAttention,
    attention_map,
    attention_of,
    layer_mean,
    note_attention,
    note_attention_map,
    rollout,
)

from .builders import patient, visit
from .coders import words_of

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "attention_of_a_patient.py"
HISTORY = [
    ["ICD10CM/I10", "ICD10CM/E11.65"],
    ["ICD10CM/N18.30", "ICD10CM/I10", "ICD10CM/E11.9"],
    ["ICD10CM/I50.9", "ICD10CM/I10"],
]
CODES = ["ICD10CM/I10", "ICD10CM/E11", "ICD10CM/N18.30", "ICD10CM/I50.9"]


@pytest.fixture(scope="module")
def tokenizer():
    return EhrCodeTokenizer.from_codes(CODES)


def model_of(kind=MedBertModel, **settings):
    torch.manual_seed(0)
    return kind(MedBertConfig.tiny(vocab_size=9, initializer_range=0.3, **settings))


def view_of(attention, codes=None, visits=None, **fields):
    n = attention.shape[-1]
    codes = codes or [f"LOCAL/{index}" for index in range(n)]
    numbers = np.ones(n, np.int64) if visits is None else np.asarray(visits)
    return AttentionView(codes, numbers, np.asarray(attention, np.float32), **fields)


def random_view(n=6, layers=2, heads=3, **fields):
    weights = np.random.default_rng(0).random((layers, heads, n, n)) ** 4
    return view_of(weights / weights.sum(-1, keepdims=True), **fields)


# The weights


def test_attention_rows_sum_to_one_over_the_codes_of_the_patient(tokenizer):
    view = attention_of(model_of(), tokenizer, HISTORY)
    assert view.attention.shape == (2, 4, 7, 7)
    assert view.attention.dtype == np.float32
    assert (view.attention >= 0).all()
    for weights in (view.attention, layer_mean(view), rollout(view)):
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert view.attention.std(axis=-1).min() > 1e-3, "uniform rows would sum to 1 whatever is wrong"


def test_the_weights_are_those_of_the_eager_model_beside_a_longer_patient(tokenizer):
    """Padding takes no weight: row by row, the weights are those of the patient alone."""
    model = model_of(attn_implementation="eager").eval()
    longer = [["ICD10CM/I10", *CODES[1:]]] * 3
    rows = tokenizer.encode_patients([HISTORY, longer])
    batch = tokenizer.pad({name: rows[name] for name in ("input_ids", "attention_mask")}, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    for name in ("visit_ids", "serial_ids"):
        batch[name] = torch.tensor([row + [0] * (width - len(row)) for row in rows[name]])
    with torch.no_grad():
        layers = model(**batch, output_attentions=True).attentions
    together = torch.stack(layers)[:, 0].numpy()
    view = attention_of(model, tokenizer, HISTORY)
    np.testing.assert_allclose(together[:, :, :7, :7], view.attention, atol=1e-6)
    np.testing.assert_array_equal(together[:, :, :7, 7:], 0)


@pytest.mark.parametrize("kind", [MedBertForMaskedLM, MedBertForSequenceClassification], ids=["mlm", "classifier"])
def test_any_head_shows_its_encoder(tokenizer, kind):
    model = model_of(kind)
    np.testing.assert_array_equal(
        attention_of(model, tokenizer, HISTORY).attention, attention_of(model.model, tokenizer, HISTORY).attention
    )


def test_the_model_is_left_as_it_was(tokenizer):
    model = model_of(MedBertForSequenceClassification, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model.train()
    model.model.encoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    implementation, state = model.config._attn_implementation, torch.get_rng_state()
    assert implementation != "eager"
    first, second = (attention_of(model, tokenizer, HISTORY).attention for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == model.model.config._attn_implementation == implementation
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_model_is_left_as_it_was_after_an_error_too(tokenizer):
    model = model_of(max_position_embeddings=4).train()
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match="`max_position_embeddings` is 4"):
        attention_of(model, tokenizer, HISTORY, max_length=7)
    assert model.training
    assert model.config._attn_implementation == implementation


def test_half_precision_still_gives_rows_that_sum_to_one(tokenizer):
    view = attention_of(model_of().to(torch.bfloat16), tokenizer, HISTORY)
    np.testing.assert_allclose(view.attention.sum(axis=-1), 1, atol=1e-5)


# Codes, visits, dates


def test_codes_and_ticks_are_what_the_model_saw(tokenizer):
    view = attention_of(model_of(), tokenizer, HISTORY)
    assert view.ticks == ["I10@1", "E11@1", "N18.30@2", "I10@2", "E11@2", "I50.9@3", "I10@3"]
    assert view.codes[1] == "ICD10CM/E11"
    assert view.visit_dates is None
    assert view.descriptions[0] == "Essential (primary) hypertension"


def test_without_a_length_the_model_decides_how_much_it_sees(tokenizer):
    view = attention_of(model_of(max_position_embeddings=5), tokenizer, HISTORY)
    assert view.ticks == ["N18.30@1", "I10@1", "E11@1", "I50.9@2", "I10@2"]
    assert attention_of(model_of(), tokenizer, HISTORY, max_length=2).ticks == ["I50.9@1", "I10@1"]


def test_dates_follow_their_visits_through_empty_and_dropped_ones(tokenizer):
    record = patient(
        7,
        [
            visit(0, diagnoses=["ICD10CM/I10"]),
            visit(10, diagnoses=["ICD10CM/I50.9", "ICD10CM/I10"]),
            visit(20, diagnoses=[]),
            visit(30, diagnoses=["ICD10CM/N18.30"]),
        ],
    )
    view = attention_of(model_of(), tokenizer, record)
    assert view.visit_dates == [date(2020, 1, 1), date(2020, 1, 11), date(2020, 1, 31)]
    assert view.visit_numbers.tolist() == [1, 2, 2, 3]
    newest = attention_of(model_of(), tokenizer, record, max_length=3)
    assert newest.visit_dates == [date(2020, 1, 11), date(2020, 1, 31)]
    assert newest.ticks == ["I50.9@1", "I10@1", "N18.30@2"]


def test_a_patient_without_known_codes_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`visits` must hold at least one code"):
        attention_of(model_of(), tokenizer, [[], []])


@pytest.mark.parametrize("kind", ["rnn", "no layers"])
def test_a_model_without_attention_is_refused(tokenizer, kind):
    model = EhrRnnModel(EhrRnnConfig.tiny(vocab_size=9)) if kind == "rnn" else model_of(num_hidden_layers=0)
    with pytest.raises(ValueError, match="`model` must return attention weights"):
        attention_of(model, tokenizer, HISTORY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": np.ones((2, 2))}, r"\(layers, heads, n, n\)"),
        ({"attention": np.full((1, 1, 2, 2), 0.4)}, "off by 0.2"),
        ({"attention": np.full((1, 1, 2, 2), np.nan)}, "off by nan"),
        ({"visits": [2, 1]}, "ascending order"),
        ({"visits": [0, 1]}, "from 1"),
        ({"visits": [1, 2], "visit_dates": [None]}, "must hold 2 days, got 1"),
        ({"descriptions": ["one"]}, r"one name per code \(2\), got 1"),
    ],
    ids=["shape", "sum", "nan", "order", "zero", "dates", "names"],
)
def test_a_view_whose_parts_do_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        view_of(**{"attention": np.full((1, 1, 2, 2), 0.5), "codes": ["A/a", "B/b"]} | fields)


# Layer mean and rollout


def test_the_layer_mean_is_over_heads():
    view = view_of(np.array([[[[1, 0], [0.5, 0.5]], [[0, 1], [0.1, 0.9]]]]))
    np.testing.assert_allclose(layer_mean(view), [[[0.5, 0.5], [0.3, 0.7]]], atol=1e-6)


def test_rollout_by_hand():
    """Two layers that do not commute: the first one's matrix stands on the right (Abnar & Zuidema 2020)."""
    first, second = [[0, 1], [0, 1]], [[0.5, 0.5], [1, 0]]
    # with the residual: [[.5, .5], [0, 1]] and [[.75, .25], [.5, .5]]; second · first:
    expected = [[0.375, 0.625], [0.25, 0.75]]
    np.testing.assert_allclose(rollout(view_of(np.array([[first], [second]]))), expected, atol=1e-6)


def test_rollout_averages_heads_and_keeps_a_model_that_looks_at_itself():
    identity = np.broadcast_to(np.eye(4), (3, 2, 4, 4))
    np.testing.assert_allclose(rollout(view_of(identity)), np.eye(4), atol=1e-6)
    heads = np.array([[[[1, 0], [1, 0]], [[0, 1], [0, 1]]]])
    np.testing.assert_allclose(rollout(view_of(heads)), [[0.75, 0.25], [0.25, 0.75]], atol=1e-6)


# Figures


def maps_of(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.images}


def drawn(axes):
    return np.asarray(axes.images[0].get_array())


def test_the_attention_map_of_a_layer_draws_every_head(tmp_path):
    view = random_view(codes=[f"ICD10CM/{code}" for code in "ABCDEF"], visits=[1, 1, 2, 2, 2, 4])
    figure = attention_map(view, tmp_path / "layer.png", layer=2)
    maps = maps_of(figure)
    assert list(maps) == ["Head 1", "Head 2", "Head 3"]
    for weights, axes in zip(view.attention[1], maps.values(), strict=True):
        np.testing.assert_array_equal(drawn(axes), weights)
        ticks = ["A@1", "B@1", "C@2", "D@2", "E@2", "F@4"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks
        assert [label.get_text() for label in axes.get_yticklabels()] == ticks
        rows = [line.get_ydata()[0] for line in axes.lines if line.get_xdata()[0] == 0]
        assert rows == [1.5, 4.5], "borders lie where the visit changes"
        assert axes.images[0].get_clim() == (0, pytest.approx(view.attention[1].max()))
    with Image.open(tmp_path / "layer.png") as image:
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["layer.png"]


def test_a_single_head_and_the_layer_means_with_the_rollout_can_be_drawn(tmp_path):
    view = random_view()
    single = maps_of(attention_map(view, tmp_path / "head.png", layer=1, head=3))
    np.testing.assert_array_equal(drawn(single["Head 3"]), view.attention[0, 2])
    assert len(single) == 1
    means = maps_of(attention_map(view, tmp_path / "means.png"))
    assert list(means) == ["Layer 1", "Layer 2", "Rollout"]
    np.testing.assert_array_equal(drawn(means["Layer 2"]), view.attention[1].mean(axis=0))
    np.testing.assert_array_equal(drawn(means["Rollout"]), rollout(view))


def test_a_long_history_is_drawn_from_its_newest_codes_and_says_so(tmp_path):
    n = MAX_DRAWN + 6
    view = random_view(n, layers=1, heads=1, visits=np.arange(n) // 5 + 1)
    figure = attention_map(view, tmp_path / "long.png", layer=1)
    (axes,) = maps_of(figure).values()
    np.testing.assert_array_equal(drawn(axes), view.attention[0, 0, 6:, 6:])
    assert axes.get_xticklabels()[0].get_text() == "6@2"
    assert figure.get_supxlabel().startswith(f"The newest {MAX_DRAWN} of {n} codes.")
    assert attention_map(random_view(), tmp_path / "short.png", layer=1).get_supxlabel() == ""


def test_no_tick_label_touches_the_next(tmp_path):
    codes = [f"ICD10CM/S72.{i:03}A" for i in range(MAX_DRAWN)]
    view = random_view(MAX_DRAWN, layers=1, heads=2, codes=codes)
    figure = attention_map(view, tmp_path / "map.png", layer=1)
    for axes in maps_of(figure).values():
        across = [label.get_window_extent() for label in axes.get_xticklabels()]
        down = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert all(left.x1 <= right.x0 for left, right in pairwise(across))
        assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(down))


def test_a_code_with_dollar_signs_is_text(tmp_path):
    figure = attention_map(random_view(2, codes=["LOCAL/$x^", "LOCAL/$\\bad$"]), tmp_path / "map.png", layer=1)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["$x^@1", "$\\bad$@1"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layer": 3}, "`layer` must be from 1 to 2, got 3"),
        ({"layer": 0}, "`layer` must be from 1 to 2, got 0"),
        ({"layer": 1, "head": 4}, "`head` must be from 1 to 3, got 4"),
        ({"head": 1}, "`head` must come with a `layer`"),
    ],
    ids=["layer", "zero", "head", "alone"],
)
def test_what_is_not_there_is_not_drawn(tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        attention_map(random_view(), tmp_path / "map.png", **chosen)
    assert not list(tmp_path.iterdir())


# The example


def test_the_example_runs_with_a_random_model_and_with_a_checkpoint(tmp_path, tokenizer, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    model_of(MedBertForSequenceClassification).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, more in (("random", []), ("own", ["--model", str(tmp_path / "model")])):
        main(["--output", str(tmp_path / name), *more])
        assert {path.name for path in (tmp_path / name).iterdir()} == {"layers.png", "layer-1.png", "patient.html"}
        assert "patient.html" in capsys.readouterr().out
    assert "N18.4" in (tmp_path / "random" / "patient.html").read_text()


# Notes (BERT-XML, Fig 4; acceptance row 71)

LONG = " ".join(f"word{number % 300} and" for number in range(366)) + " end"  # 733 words


def text_model(tokenizer, **fields):
    torch.manual_seed(0)
    config = EhrBertConfig.tiny(vocab_size=len(tokenizer), initializer_range=0.3, **fields)
    return EhrBertForMaskedLM(config).train()


def test_the_self_attention_of_every_head_over_a_note_of_735_tokens_is_heads_by_tokens_by_tokens():
    tokenizer = words_of(LONG, max_length=1024)
    model = text_model(tokenizer)
    view = note_attention(model, tokenizer, LONG)
    assert view.attention.shape == (4, 735, 735)
    assert (view.layer, view.note_tokens, len(view.tokens)) == (2, 735, 735)
    assert view.tokens[:3] + view.tokens[-2:] == ["[CLS]", "word0", "and", "end", "[SEP]"]
    np.testing.assert_allclose(view.attention.sum(axis=-1), 1, atol=1e-5)
    assert view.attention.std(axis=-1).min() > 1e-5
    assert model.training
    eager = text_model(tokenizer, attn_implementation="eager").eval()
    with torch.no_grad():
        layers = eager(**tokenizer(LONG, return_tensors="pt"), output_attentions=True).attentions
    np.testing.assert_allclose(view.attention, layers[1][0], atol=1e-5)
    np.testing.assert_allclose(note_attention(model, tokenizer, LONG, layer=1).attention, layers[0][0], atol=1e-5)
    with pytest.raises(ValueError, match="`layer` must be from 1 to 2, got 3"):
        note_attention(model, tokenizer, LONG, layer=3)


def test_a_note_that_is_longer_than_the_model_reads_is_cut_to_its_beginning():
    tokenizer = words_of(LONG, max_length=64)
    view = note_attention(text_model(tokenizer, max_position_embeddings=40), tokenizer, LONG)
    assert (view.attention.shape, view.note_tokens) == ((4, 40, 40), 735)
    assert view.tokens[-3:] == ["word18", "and", "[SEP]"]
    assert note_attention(text_model(tokenizer), tokenizer, LONG, max_length=9).attention.shape == (4, 9, 9)


def test_the_map_of_a_note_draws_all_tokens_of_every_head_beside_words_that_can_be_read(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    attention = rng.random((5, 735, 735)).astype(np.float32)
    attention /= attention.sum(axis=-1, keepdims=True)
    tokens = [f"token{number}" for number in range(735)]
    figure = note_attention_map(NoteAttention(tokens, attention, 12, 900), tmp_path / "note.png")
    assert (tmp_path / "note.png").stat().st_size > 10_000
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == [f"Head {number}" for number in range(1, 6)]
    for axes, weights in zip(maps, attention, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), weights)
        places = axes.get_yticks().astype(int).tolist()
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [f"token{place}" for place in places]
        assert (len(places), places[0], places[-1]) == (32, 0, 734)
    assert figure._suptitle.get_text() == "Self-attention, layer 12"
    assert figure._supxlabel.get_text() == "The first 735 of 900 tokens."
