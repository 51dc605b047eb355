"""Gates between notes and stays, and models of the note alone (papers.md §4.5, acceptance rows 94 and 95)."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from hf_ehr import EhrFusionConfig, EhrFusionForSequenceClassification, EhrFusionModel
from hf_ehr.models.modeling_ehrfusion_layers import ShiftGate
from hf_ehr.models.modeling_ehrseries_layers import StarTransformer
from tests.models.common import Head
from tests.models.test_ehrseries import SeriesSuite, dense_stays, lstm_by_hand

LABELS = torch.tensor([0, 1, 0])
NAMES = ("BertLstm", "LstmBert", "BertCnn", "CnnBert", "BertStar", "StarBert", "BertEncoder", "EncoderBert")
OWNERS = (0, 0, 1, 2)
HOURS = (5, 3, 0, 4)
BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 20,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}


def admissions(*, seed=0, **kwargs) -> dict:
    """Three admissions: two stays and a note; a stay without hours and a note; a stay and no note."""
    batch = dense_stays(hours=HOURS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3, 16, generator=generator)
    return batch | {
        "stay_admissions": torch.tensor(OWNERS),
        "note_vectors": vectors,
        "note_mask": torch.tensor([True, True, False]),
    }


def texts(*, seed=0, **kwargs) -> dict:
    """The notes of `admissions` as tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(8) < torch.tensor([8, 5, 0])[:, None]).long()
    batch = {name: value for name, value in admissions(seed=seed).items() if name not in ("note_vectors", "note_mask")}
    ids = torch.randint(1, 40, (3, 8), generator=generator) * mask
    return batch | {"note_input_ids": ids, "note_attention_mask": mask}


def classifier(name: str, **fields) -> Head:
    return Head(
        EhrFusionForSequenceClassification, AutoModelForSequenceClassification, "logits", False,
        lambda batch: {"labels": LABELS},
        lambda out, batch: -out.logits.log_softmax(-1)[torch.arange(3), LABELS].mean(),
        overrides=fields, name=name,
    )  # fmt: skip


class FusionSuite(SeriesSuite):
    """The suite of stays, with admissions for rows."""

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"hidden_size": 8, "intermediate_size": 8, "num_filters": 4, "series_size": 6}  # noqa: RUF012

    def config(self, **overrides):
        sizes = {"num_hourly_features": 23, "num_demographics": 4, "hidden_size": 12, "n_hours": 11}
        return EhrFusionConfig.tiny(**(sizes | overrides))

    def alone(self, batch, row):
        stays = batch["stay_admissions"] == row
        of_stays = ("stay_hours", "hourly_values", "demographics", "stay_admissions")
        single = {name: value[stays] if name in of_stays else value[row : row + 1] for name, value in batch.items()}
        single["hourly_values"] = single["hourly_values"][:, : max(int(single["stay_hours"].max()), 1)]
        return single | {"stay_admissions": torch.zeros_like(single["stay_admissions"])}


class TestEhrFusion(FusionSuite):
    heads = [  # noqa: RUF012
        Head(EhrFusionModel, AutoModel, "pooler_output", per_code=False),
        *(
            classifier(name, main=EhrFusionConfig.yang_wu(name).main,
                       series_encoder=EhrFusionConfig.yang_wu(name).series_encoder)
            for name in NAMES
        ),
    ]  # fmt: skip
    fixture = "ehrfusion"
    lora_targets = ["shift"]  # noqa: RUF012

    def padded(self, **kwargs):
        return admissions(**kwargs)


class TestEhrFusionText(FusionSuite):
    heads = [  # noqa: RUF012
        Head(EhrFusionModel, AutoModel, "pooler_output", per_code=False),
        classifier("bert-lstm"),
        classifier("t5-lstm", note_config=T5 | {"model_type": "t5"}, note_pooling="mean"),
        classifier("star-bert-mean", main="series", series_encoder="star", note_pooling="mean"),
        classifier("clinical-bert", series_encoder=None),
        classifier("clinical-t5", series_encoder=None, note_config=T5 | {"model_type": "t5"}, note_pooling="mean"),
    ]
    fixture = "ehrfusion_text"
    lora_targets = ["query", "q"]  # noqa: RUF012
    test_changing_one_packed_patient_leaves_the_others_bit_equal = None  # a note alone knows no hours

    def config(self, **overrides):
        return super().config(**({"note_config": BERT | {"model_type": "bert"}} | overrides))

    def padded(self, **kwargs):
        return texts(**kwargs)


def model_of(suite=TestEhrFusion, **fields) -> EhrFusionForSequenceClassification:
    return suite().model(classifier("", **fields))


every_gate = pytest.mark.parametrize("name", NAMES)


def gate_of(name: str, **fields) -> EhrFusionForSequenceClassification:
    config = EhrFusionConfig.yang_wu(name)
    return model_of(main=config.main, series_encoder=config.series_encoder, **fields)


# The gate


def test_the_gate_equals_its_formulas_row_by_row():
    torch.manual_seed(0)
    gate = ShiftGate(3, 2, 2, 0.0)
    gate.beta.data.fill_(0.7)
    main, other, demographics = (
        torch.randn(4, 3) * torch.tensor([[0.1], [1], [5], [0]]),
        torch.randn(4, 2),
        torch.randn(4, 2),
    )
    shifted, shares = gate(main, other, demographics)
    for row in range(4):
        i1, i2, i3 = main[row], other[row], demographics[row]
        w2 = torch.sigmoid(gate.other_gate.weight[0] @ torch.cat([i1, i2]) + gate.other_gate.bias[0])
        w3 = torch.sigmoid(gate.demographics_gate.weight[0] @ torch.cat([i1, i3]) + gate.demographics_gate.bias[0])
        adjustment = gate.shift.weight @ torch.cat([w2 * i2, w3 * i3]) + gate.shift.bias
        alpha = min(0.7 * i1.square().sum().sqrt() / adjustment.square().sum().sqrt(), torch.tensor(1.0))
        expected = nn.functional.layer_norm(i1 + alpha * adjustment, (3,))
        torch.testing.assert_close(shifted[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shares[row], torch.stack([w2, w3, alpha]), atol=1e-6, rtol=1e-5)
    assert 0 < shares[0, 2] < 1 == shares[2, 2]
    shifted.sum().backward()
    assert all(p.grad.isfinite().all() for p in gate.parameters())


def test_a_gate_by_hand_in_numbers():
    """i1 = (3, 4), w2 = w3 = 1/2, a = (0, 20): α = β·5/20 = 1/4; i1 + α a = (3, 9), and its norm is (-1, 1)."""
    gate = ShiftGate(2, 1, 1, 0.0)
    for parameter in gate.parameters():
        parameter.data.zero_()
    gate.beta.data.fill_(1.0)
    gate.norm.weight.data.fill_(1.0)
    gate.shift.weight.data[1] = torch.tensor([10.0, 10.0])
    shifted, shares = gate(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    assert shares.tolist() == [[0.5, 0.5, 0.25]]
    torch.testing.assert_close(shifted, torch.tensor([[-1.0, 1.0]]), atol=1e-5, rtol=0)


@every_gate
def test_the_name_says_which_modality_is_main(name):
    model, batch = gate_of(name), admissions()
    series_width = 12 if "Encoder" in name else 16
    assert model.classifier.in_features == (16 if name.startswith("Bert") else series_width)
    model.model.gate.shift.weight.data.zero_()
    other = batch | {"note_vectors": -batch["note_vectors"]}
    with torch.no_grad():
        moved = (model(**other).logits - model(**batch).logits).abs().amax(dim=1)
    assert (moved[:2] > 1e-5).all() if name.startswith("Bert") else moved.max() == 0


@every_gate
def test_both_modalities_and_the_demographics_reach_the_admission(name):
    model, batch = gate_of(name), admissions()
    changes = {"note_vectors": [0, 1], "hourly_values": [0, 2], "demographics": [0, 1, 2]}
    for field, rows in changes.items():
        other = batch | {field: batch[field] * -1}
        with torch.no_grad():
            moved = (model(**other).logits - model(**batch).logits).abs().amax(dim=1) > 1e-6
        assert moved.nonzero().flatten().tolist() == rows, field


# Missing modalities and several stays


@every_gate
def test_what_lies_where_a_note_is_missing_is_not_read(name):
    model, batch = gate_of(name), admissions()
    other = batch | {"note_vectors": batch["note_vectors"].clone()}
    other["note_vectors"][2] = float("nan")
    with torch.no_grad():
        assert torch.equal(model(**other).logits, model(**batch).logits)


@every_gate
def test_an_admission_may_lack_everything(name):
    model, batch = gate_of(name).train(), admissions()
    batch["note_vectors"] = torch.cat([batch["note_vectors"], torch.zeros(2, 16)])
    batch["note_mask"] = torch.tensor([True, True, False, False, True])
    outputs = model(**batch, labels=torch.tensor([0, 1, 0, 1, 1]))  # the last two have no stay
    outputs.loss.backward()
    assert outputs.logits.shape == (5, 2)
    assert outputs.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    missing = [2, 3] if name.startswith("Bert") else [1, 3, 4]
    model.model.missing_main.data += torch.linspace(-1, 1, len(model.model.missing_main))
    moved = (model(**batch).logits - outputs.logits).abs().amax(dim=1) > 1e-6
    assert moved.nonzero().flatten().tolist() == missing


@every_gate
def test_a_batch_without_any_stay_is_scored(name):
    model, batch = gate_of(name), admissions()
    stays = {name: value[:0] for name, value in batch.items() if name not in ("note_vectors", "note_mask")}
    assert model(**(batch | stays)).logits.isfinite().all()


def test_stays_of_an_admission_are_averaged_without_those_that_have_no_hours():
    model, batch = gate_of("LstmBert").model, admissions()
    batch["stay_hours"] = torch.tensor([5, 3, 0, 4])
    batch["stay_admissions"] = torch.tensor([0, 1, 0, 0])
    seen = []
    model.gate.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs))
    model(**batch)
    main, _, demographics = seen[0]
    encoder = model.stays.encoder
    vectors = [
        (encoder.projection.weight @ lstm_by_hand(encoder.lstm, batch["hourly_values"][n, :hours])[-1]
         + encoder.projection.bias).clamp(min=0)
        for n, hours in ((0, 5), (3, 4), (1, 3))
    ]  # fmt: skip
    torch.testing.assert_close(main[0], (vectors[0] + vectors[1]) / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(main[1], vectors[2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(main[2], model.missing_main)
    known = model.stays.demographics(batch["demographics"])
    torch.testing.assert_close(demographics, torch.stack([known[[0, 2, 3]].mean(0), known[1], known[0] * 0]))


def test_without_owners_each_stay_is_an_admission():
    model, batch = gate_of("BertLstm"), admissions()
    del batch["stay_admissions"]
    batch |= {"note_vectors": torch.randn(4, 16), "note_mask": torch.ones(4, dtype=torch.bool)}
    explicit = batch | {"stay_admissions": torch.arange(4)}
    torch.testing.assert_close(model(**batch).logits, model(**explicit).logits)
    del batch["note_mask"]
    torch.testing.assert_close(model(**batch).logits, model(**explicit).logits)


# Star-Transformer


def test_the_star_transformer_equals_its_formulas_in_loops():
    model = gate_of("StarBert").model
    star, batch = model.stays.encoder, dense_stays(hours=(5, 1, 4))
    mask = torch.arange(5) < batch["stay_hours"][:, None]
    with torch.no_grad():
        outputs = star(batch["hourly_values"] * mask[..., None], mask).features
        for row, hours in enumerate((5, 1, 4)):
            expected = star_by_hand(star, batch["hourly_values"][row, :hours])
            torch.testing.assert_close(outputs[row], expected, atol=1e-5, rtol=1e-5)


def attend_by_hand(attention, query, places):
    q, heads = attention.query(query), []
    key, value = attention.key_value(torch.stack(places)).chunk(2, dim=1)
    for part in torch.arange(len(q)).chunk(attention.num_heads):
        weights = (key[:, part] @ q[part] / len(part) ** 0.5).softmax(0)
        heads.append(weights @ value[:, part])
    return attention.output(torch.cat(heads))


def star_by_hand(star: StarTransformer, hours):
    e = [star.projection(hour).relu() for hour in hours]
    h, relay, n = list(e), sum(e) / len(e), len(e)
    for _ in range(star.cycles):
        h = [
            star.satellite_norm(
                attend_by_hand(star.satellite, h[i], [h[i - 1], h[i], h[(i + 1) % n], e[i], relay]).relu()
            )
            for i in range(n)
        ]
        relay = star.relay_norm(attend_by_hand(star.relay, relay, [relay, *h]).relu())
    return star.output(sum(h) / n + relay)


def test_the_transformer_is_read_at_the_first_hour():
    model, batch = gate_of("EncoderBert").model, admissions()
    encoder = model.stays.encoder
    mask = torch.arange(5) < batch["stay_hours"][:, None]
    with torch.no_grad():
        stays = encoder(batch["hourly_values"] * mask[..., None], mask)
        alone = encoder.encoder(encoder.projection(batch["hourly_values"][3:, :4]).relu())
    torch.testing.assert_close(stays.features[3], alone[0, 0], atol=1e-6, rtol=1e-5)


# Text encoders (row 95)


def test_clinical_bert_is_the_librarys_classifier_under_its_weights():
    torch.manual_seed(0)
    reference = BertForSequenceClassification(BertConfig(**BERT)).eval()
    model = EhrFusionForSequenceClassification.from_note_encoder(reference, series_encoder=None).eval()
    model.classifier.load_state_dict(reference.classifier.state_dict())
    batch = texts()
    ids, mask = batch["note_input_ids"][:2], batch["note_attention_mask"][:2]
    expected = reference(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(note_input_ids=ids, note_attention_mask=mask).logits, expected)


@pytest.mark.parametrize("make", [T5EncoderModel, T5Model], ids=["encoder", "with-decoder"])
def test_clinical_t5_is_the_mean_over_tokens_without_padding(make, tmp_path):
    torch.manual_seed(0)
    t5, batch = make(T5Config(**T5)).eval(), texts()
    t5.save_pretrained(tmp_path / "t5")
    fields = {"series_encoder": None, "note_pooling": "mean"}
    source = t5 if make is T5EncoderModel else tmp_path / "t5"
    model = EhrFusionForSequenceClassification.from_note_encoder(source, **fields).eval()
    assert not any("decoder" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        outputs = model(note_input_ids=batch["note_input_ids"], note_attention_mask=batch["note_attention_mask"])
        for row, length in ((0, 8), (1, 5)):
            states = t5.get_encoder()(input_ids=batch["note_input_ids"][row : row + 1, :length]).last_hidden_state
            torch.testing.assert_close(outputs.pooler_output[row], states[0].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pooler_output[2], model.model.missing_main)
    model.save_pretrained(tmp_path / "model")
    loaded = EhrFusionForSequenceClassification.from_pretrained(tmp_path / "model")
    inputs = {name: batch[name] for name in ("note_input_ids", "note_attention_mask")}
    torch.testing.assert_close(loaded(**inputs).logits, outputs.logits, atol=1e-6, rtol=0)


def test_a_folder_of_an_encoder_opens_with_its_weights(tmp_path):
    bert = BertModel(BertConfig(**BERT))
    bert.save_pretrained(tmp_path)
    fields = {"num_hourly_features": 23, "num_demographics": 4, "freeze_note_encoder": True}
    model = EhrFusionForSequenceClassification.from_note_encoder(tmp_path, **fields)
    assert model.config.note_size == 16
    for name, weight in bert.named_parameters():
        assert torch.equal(model.model.note_encoder.get_parameter(name), weight)
        assert not model.model.note_encoder.get_parameter(name).requires_grad


def test_a_frozen_text_encoder_stays_frozen_through_files_and_without_dropout(tmp_path):
    config = BERT | {"model_type": "bert", "hidden_dropout_prob": 0.5}
    model = model_of(TestEhrFusionText, note_config=config, freeze_note_encoder=True)
    model.save_pretrained(tmp_path)
    loaded, batch = EhrFusionForSequenceClassification.from_pretrained(tmp_path).train(), texts()
    assert torch.equal(loaded(**batch).logits, loaded(**batch).logits)
    loaded(**batch, labels=LABELS).loss.backward()
    assert all((p.grad is None) == ("note_encoder." in n) for n, p in loaded.named_parameters())
    trained = model_of(TestEhrFusionText, note_config=config).train()
    assert not torch.equal(trained(**batch).logits, trained(**batch).logits)


def test_an_encoder_without_a_pooler_is_read_by_its_mean():
    config = {"model_type": "distilbert", "vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    with pytest.raises(ValueError, match="has no pooler"):
        EhrFusionModel(EhrFusionConfig.tiny(note_config=config))
    model = EhrFusionModel(EhrFusionConfig.tiny(note_config=DistilBertConfig(**config), note_pooling="mean"))
    assert model.config.note_size == 16


@pytest.mark.parametrize(
    ("encoder", "fields", "message"),
    [
        (lambda: T5Model(T5Config(**T5)), {"note_pooling": "mean"}, "must be a text encoder alone, T5EncoderModel"),
        (lambda: BertModel(BertConfig(**BERT), add_pooling_layer=False), {}, "which has no pooler"),
    ],
    ids=["decoder", "no-pooler"],
)
def test_an_encoder_that_would_not_be_read_whole_is_refused(encoder, fields, message):
    with pytest.raises(ValueError, match=message):
        EhrFusionForSequenceClassification.from_note_encoder(encoder(), **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"note_vectors": None}, "`note_vectors` must have shape"),
        ({"note_vectors": torch.zeros(3, 15)}, r"got \(3, 15\)"),
        ({"stay_admissions": torch.tensor([0, 1, 2, 3])}, "one of the 3 admissions"),
        ({"stay_admissions": torch.tensor([0, 1])}, "each of the 4 stays"),
        ({"stay_admissions": None}, "one of the 3 admissions"),
        ({"stay_hours": None}, "`stay_hours`"),
        ({"demographics": None}, "`demographics`"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_next_step(change, message):
    with pytest.raises(ValueError, match=message):
        gate_of("BertLstm")(**(admissions() | change))


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_tokens_where_a_note_is_missing_are_not_read(pooling):
    model, batch = model_of(TestEhrFusionText, main="series", note_pooling=pooling), texts()
    other = batch | {"note_input_ids": batch["note_input_ids"].clone()}
    other["note_input_ids"][2] = 7
    with torch.no_grad():
        assert torch.equal(model(**other).logits, model(**batch).logits)


def test_tokens_are_asked_for_where_the_model_has_a_text_encoder():
    with pytest.raises(ValueError, match="`note_input_ids` must be given"):
        model_of(TestEhrFusionText)(**admissions())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"main": "code"}, "main"),
        ({"main": "series", "series_encoder": None}, "must name an encoder"),
        ({"freeze_note_encoder": True}, "freeze_note_encoder"),
        ({"series_encoder": "star", "hidden_size": 30}, "divisible"),
        ({"series_size": 0}, "must be positive"),
        ({"cnn_depth": 0}, "1, 2 or 3"),
    ],
)
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        EhrFusionConfig(**fields)


def test_a_name_that_the_paper_does_not_have_is_refused():
    with pytest.raises(ValueError, match="BertLstm"):
        EhrFusionConfig.yang_wu("BertBert")
