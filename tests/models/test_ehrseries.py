"""The stay-level baselines: the common suite, and what is their own (papers.md §4.5, acceptance rows 89 to 93)."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_ehr import (
    EhrSeriesConfig,
    EhrSeriesForSequenceClassification,
    EhrSeriesModel,
    MedHMPConfig,
    MedHMPForStayPreTraining,
    MedHMPModel,
    MedHMPStayModel,
)
from hf_ehr.models.modeling_ehrseries_memory import guidance
from hf_ehr.models.modeling_medhmp_transfer import load_hourly_encoder
from tests.models.common import FIXTURES, FamilySuite, Head

LABELS = torch.tensor([0, 1, 0])
HOURS = (7, 0, 4)
SECOND = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21]
KINDS = {
    "lstm": {},
    "lstm-2-layers": {"architecture": "lstm", "num_hidden_layers": 2},
    "cnn": {"cnn_depth": 3},
    "raim": {},
    "raim-guided": {"architecture": "raim", "second_channel": SECOND},
    "dcmn": {},
    "dcmn-batch-norm": {"architecture": "dcmn", "second_channel": SECOND, "memory_norm": "batch"},
    "unimodal_lstm": {},
    "unimodal_lstm-medhmp": {"architecture": "unimodal_lstm", "medhmp_encoder": True},
    "transformer": {},
    "transformer-medhmp": {"architecture": "transformer", "medhmp_encoder": True},
}


def dense_stays(*, hours=HOURS, features=23, seed=0) -> dict:
    """Stays as a rectangle; a third of the values are 0, and what lies after a stay is not."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(hours), max(hours), features, generator=generator) * 2 - 1
    values = values * (torch.rand(values.shape, generator=generator) > 1 / 3)
    after = torch.arange(max(hours)) >= torch.tensor(hours)[:, None]
    return {
        "stay_hours": torch.tensor(hours),
        "hourly_values": torch.where(after[..., None], 9.0, values),
        "demographics": torch.rand(len(hours), 4, generator=generator),
    }


def sparse(batch: dict) -> dict:
    """The same stays as entries that are not 0."""
    rest = {name: value for name, value in batch.items() if name != "hourly_values"}
    valid = torch.arange(batch["hourly_values"].shape[1]) < batch["stay_hours"][:, None]
    hours = batch["hourly_values"][valid]
    return rest | {
        "feature_ids": hours.nonzero()[:, 1].int(),
        "feature_counts": (hours != 0).sum(dim=1).short(),
        "feature_values": hours[hours != 0],
    }


class SeriesSuite(FamilySuite):
    """The common suite for models that read hours; `patients` are the rows that share nothing with each other."""

    test_token_embeddings_can_be_resized = None
    test_packed_and_padded_training_give_one_loss_and_one_gradient = None
    test_hidden_states_and_attentions_are_there_on_request = None
    test_gradient_checkpointing_gives_the_same_gradients = None

    def alone(self, batch: dict, row: int) -> dict:
        raise NotImplementedError

    def frozen_output(self, head: Head) -> torch.Tensor:
        model = head.model_class.from_pretrained(FIXTURES / self.fixture / str(head)).eval()
        return self.output(head, model, self.inputs(head, seed=3)).flatten(1)[:, :8]

    def test_extra_padding_changes_nothing(self, head):
        model, batch = self.model(head), self.inputs(head)
        wide = batch | {"hourly_values": nn.functional.pad(batch["hourly_values"], (0, 0, 0, 30), value=5.0)}
        expected = self.output(head, model, batch)
        torch.testing.assert_close(self.output(head, model, wide), expected, atol=1e-6, rtol=0)

    def test_a_batch_equals_its_patients_one_by_one(self, head):
        model, batch = self.model(head), self.inputs(head)
        together = self.output(head, model, batch)
        for row in range(3):
            alone = self.output(head, model, self.alone(batch, row))
            torch.testing.assert_close(alone, together[row : row + 1], atol=1e-6, rtol=0)

    def test_packed_equals_padded(self, head):
        model, batch = self.model(head), self.inputs(head)
        expected = self.output(head, model, batch)
        torch.testing.assert_close(self.output(head, model, sparse(batch)), expected, atol=1e-6, rtol=0)

    def test_changing_one_packed_patient_leaves_the_others_bit_equal(self, head):
        model, batch = self.model(head), self.inputs(head)
        changed = batch | {"hourly_values": batch["hourly_values"].clone()}
        changed["hourly_values"][0] *= -1
        before, after = self.output(head, model, batch), self.output(head, model, changed)
        assert torch.equal(before[1:], after[1:])
        assert (before[0] - after[0]).abs().max() > 1e-6

    def test_eager_equals_sdpa(self, head):
        model, batch = self.model(head), self.inputs(head)
        assert model.config._attn_implementation == "sdpa"
        sdpa = self.output(head, model, batch)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(self.output(head, model, batch), sdpa, atol=1e-6, rtol=1e-5)

    def test_bf16_stays_finite_and_near_fp32(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), self.batch(head)
        expected = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**sparse(batch)).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)
        halved = self.model(head).to(torch.bfloat16)
        torch.testing.assert_close(halved(**batch).loss, expected, atol=5e-2, rtol=5e-2)

    def test_it_overfits_a_few_patients(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), self.batch(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(120):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < 0.1

    def test_a_base_checkpoint_fills_the_head_but_for_its_own_parameters(self, head, tmp_path):
        base = self.model(replace(self.heads[0], overrides=head.overrides))
        base.save_pretrained(tmp_path)
        loaded, info = head.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert {key.split(".")[0] for key in info["missing_keys"]} <= {"classifier"}
        assert all(torch.equal(p, loaded.base_model.get_parameter(name)) for name, p in base.named_parameters())
        assert all(p.isfinite().all() for p in loaded.parameters())


def classifier(name: str, fields: dict) -> Head:
    return Head(
        EhrSeriesForSequenceClassification, AutoModelForSequenceClassification, "logits", False,
        lambda batch: {"labels": LABELS},
        lambda out, batch: -out.logits.log_softmax(-1)[torch.arange(3), LABELS].mean(),
        overrides={"architecture": name} | fields, name=name,
    )  # fmt: skip


class TestEhrSeries(SeriesSuite):
    heads = [  # noqa: RUF012
        Head(EhrSeriesModel, AutoModel, "pooler_output", per_code=False),
        *(classifier(name, fields) for name, fields in KINDS.items()),
    ]
    fixture = "ehrseries"
    lora_targets = ["classifier", "projection"]  # noqa: RUF012
    no_dropout = {"hidden_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"hidden_size": 8, "intermediate_size": 8, "num_filters": 4, "projection_size": 8}  # noqa: RUF012

    def config(self, **overrides):
        sizes = {"num_hourly_features": 23, "num_demographics": 4, "hidden_size": 12, "n_hours": 11}
        return EhrSeriesConfig.tiny(**(sizes | overrides))

    def padded(self, **kwargs):
        return dense_stays(**kwargs)

    def alone(self, batch, row):
        width = max(int(batch["stay_hours"][row]), 1)
        single = {name: value[row : row + 1] for name, value in batch.items()}
        return single | {"hourly_values": single["hourly_values"][:, :width]}


def model_of(architecture: str, **fields) -> EhrSeriesForSequenceClassification:
    return TestEhrSeries().model(classifier(architecture, fields))


every_kind = pytest.mark.parametrize("kind", KINDS)


def kind_of(kind: str, **fields) -> EhrSeriesForSequenceClassification:
    return model_of(**({"architecture": kind} | KINDS[kind] | fields))


def test_the_expected_outputs_are_those_of_all_heads():
    expected = json.loads((FIXTURES / "ehrseries" / "expected.json").read_text())
    assert set(expected) == {"EhrSeriesModel", *KINDS}


@every_kind
def test_a_stay_without_hours_is_scored_and_trained_on(kind):
    model = kind_of(kind).train()
    batch = sparse(dense_stays(hours=(0, 0, 1)))
    outputs = model(**batch, labels=LABELS)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    empty = {name: value[:2] if len(value) == 3 else value[:0] for name, value in batch.items()}
    assert model(**empty).logits.isfinite().all()


@every_kind
def test_values_are_1_where_a_batch_gives_none(kind):
    model, batch = kind_of(kind), dense_stays()
    batch["hourly_values"] = (batch["hourly_values"] > 0).float()
    entries = sparse(batch)
    del entries["feature_values"]
    with torch.no_grad():
        torch.testing.assert_close(model(**entries).logits, model(**batch).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("cnn", "dcmn", "dcmn-batch-norm")])
def test_no_state_knows_a_later_hour_and_states_end_with_the_stay(kind):
    model, batch = kind_of(kind).model, dense_stays()
    later = batch | {"hourly_values": batch["hourly_values"].clone()}
    later["hourly_values"][0, 5:] += 1
    with torch.no_grad():
        before, after = model(**batch).last_hidden_state, model(**later).last_hidden_state
    assert before.shape == (3, 7, 12)
    assert before[1].abs().max() == 0
    assert before[2, 4:].abs().max() == 0
    assert (before[0, 5:] - after[0, 5:]).abs().amax(dim=1).min() > 1e-6
    if "transformer" not in kind:
        torch.testing.assert_close(after[0, :5], before[0, :5], atol=0, rtol=0)


@every_kind
def test_demographics_are_read_but_by_the_unimodal_models(kind):
    model, batch = kind_of(kind), dense_stays()
    other = batch | {"demographics": batch["demographics"] + 1}
    with torch.no_grad():
        difference = (model(**other).logits - model(**batch).logits).abs().amax(dim=1)
    if kind.startswith(("unimodal", "transformer")):
        assert difference.max() == 0
        del batch["demographics"]
        assert model(**batch).logits.isfinite().all()
    else:
        assert difference[0] > 1e-5
        assert kind_of(kind, num_demographics=0)(**batch).logits.isfinite().all()


# Against formulas written out


def lstm_by_hand(lstm: nn.LSTM, steps: torch.Tensor) -> torch.Tensor:
    """Hochreiter & Schmidhuber in PyTorch's order of gates, one layer: (hours, input) → (hours, hidden)."""
    state, cell, states = torch.zeros(lstm.hidden_size), torch.zeros(lstm.hidden_size), []
    for step in steps:
        gates = lstm.weight_ih_l0 @ step + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ state + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        state = o.sigmoid() * cell.tanh()
        states.append(state)
    return torch.stack(states)


def test_f_lstm_reads_demographics_at_every_hour_and_ends_at_the_last_one():
    model, batch = model_of("lstm"), dense_stays()
    network = model.model.network.network
    hours = torch.cat([batch["hourly_values"][2, :4], batch["demographics"][2].expand(4, -1)], dim=1)
    last = lstm_by_hand(network.lstm, hours)[-1]
    hidden = (network.projection.weight @ last + network.projection.bias).clamp(min=0)
    expected = model.classifier.weight @ hidden + model.classifier.bias
    torch.testing.assert_close(model(**batch).logits[2], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("depth", "n_hours"), [(1, 7), (2, 7), (3, 7), (3, 11), (2, 8)])
def test_f_cnn_equals_loops_over_filters_and_keeps_an_odd_last_hour(depth, n_hours):
    model, batch = model_of("cnn", cnn_depth=depth, n_hours=n_hours), dense_stays()
    network = model.model.network.network
    for row, hours in ((0, 7), (2, 4)):
        states = torch.zeros(n_hours, 27)
        states[:hours] = torch.cat([batch["hourly_values"][row, :hours], batch["demographics"][[row] * hours]], 1)
        for layer in network.convolutions:
            padded = torch.cat([torch.zeros(1, states.shape[1]), states, torch.zeros(1, states.shape[1])])
            hidden = torch.zeros(len(states), 8)
            for t in range(hours):  # what comes after the stay is 0
                hidden[t] = sum(layer.weight[:, :, k] @ padded[t + k] for k in range(3)) + layer.bias
            hidden = hidden.clamp(min=0)
            states = torch.stack([hidden[t : t + 2].amax(0) for t in range(0, len(hidden), 2)])
            hours = -(-hours // 2)
        flat = states.t().flatten()
        expected = (network.projection.weight @ flat + network.projection.bias).clamp(min=0)
        torch.testing.assert_close(model(**batch).pooler_output[row], expected, atol=1e-5, rtol=1e-5)


def test_the_last_of_an_odd_number_of_hours_reaches_f_cnn():
    for depth in (1, 2, 3):
        model, batch = model_of("cnn", cnn_depth=depth, n_hours=7), dense_stays()
        model.model.network.network.projection.weight.data.abs_()  # so that no ReLU hides it
        other = batch | {"hourly_values": batch["hourly_values"].clone()}
        other["hourly_values"][0, 6] += 3
        with torch.no_grad():
            assert (model(**batch).pooler_output[0] - model(**other).pooler_output[0]).abs().max() > 1e-3


def raim_by_hand(network, hours, events, demographics):
    """One stay: x1 and x2 (hours, features) → its vector and α (hours, hours)."""
    x = network.first(hours).clamp(min=0)
    if events is not None:
        x = x + network.second(events).clamp(min=0)
    state, alphas = torch.zeros(1, x.shape[1]), torch.zeros(len(x), len(x))
    happened = torch.zeros(len(x), dtype=torch.bool) if events is None else (events != 0).any(dim=1)
    for t in range(len(x)):
        scores = []
        for j in range(t + 1):
            guided = j == t or bool(happened[j]) or not happened[:t].any()
            content = (network.hour_score.weight[0] * x[j]).sum() if guided else 0.0
            scores.append(content + network.state_score.weight[j] @ state[0] + network.state_score.bias[j])
        weights = torch.stack(scores).exp()
        weights = weights / weights.sum()
        alphas[t, : t + 1] = weights
        state = network.cell((weights[:, None] * x[: t + 1]).sum(0, keepdim=True), state)
    return state[0] + network.demographics(demographics), alphas


@pytest.mark.parametrize("second", [None, SECOND], ids=["one-channel", "guided"])
def test_raim_equals_its_formulas_in_loops(second):
    model, batch = model_of("raim", second_channel=second).model, dense_stays()
    first = [index for index in range(23) if index not in (second or [])]
    if second:
        batch["hourly_values"][:, [0, 1, 4]] = batch["hourly_values"][:, [0, 1, 4]].index_fill(
            2, torch.tensor(second), 0.0
        )
    with torch.no_grad():
        outputs = model(**batch)
        for row, hours in ((0, 7), (2, 4)):
            x1 = batch["hourly_values"][row, :hours, first]
            x2 = batch["hourly_values"][row, :hours, second] if second else None
            vector, alphas = raim_by_hand(model.network, x1, x2, batch["demographics"][row])
            torch.testing.assert_close(outputs.pooler_output[row], vector, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(outputs.hour_attentions[row, :hours, :hours], alphas, atol=1e-6, rtol=1e-5)
    # Row 91: nothing later, nothing after the stay, and everything sums to 1.
    assert outputs.hour_attentions.triu(1).abs().max() == 0
    assert outputs.hour_attentions[2, 4:].abs().max() == 0
    torch.testing.assert_close(outputs.hour_attentions[0].sum(dim=1), torch.ones(7))


def test_raim_is_guided_to_hours_with_events_and_to_itself():
    allowed = guidance(torch.tensor([[False, True, False, False, True, False]]))[0].tril().int()
    assert allowed.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],  # no event before: all that is past
        [0, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1, 1],
    ]


def dcmn_by_hand(network, parts, demographics):
    memories, queries = [], []
    for channel, part in zip(network.memories, parts, strict=True):
        part = nn.functional.pad(part, (0, channel.missing))
        filters, bias = channel.convolution.weight[0, 0], channel.convolution.bias
        rows = []
        for hour in part:
            windows = [(hour[n : n + 10] * filters).sum() + bias[0] for n in range(0, len(hour) - 9, 5)]
            rows.append(channel.norm(channel.embedding(torch.stack(windows).clamp(min=0))))
        memories.append(lstm_by_hand(channel.memory_lstm, torch.stack(rows)))
        queries.append(lstm_by_hand(channel.query_lstm, torch.stack(rows))[-1])
    total, probabilities, gates = network.demographics(demographics), [], []
    for channel, memory, query in zip(network.memories, memories, queries[::-1], strict=True):
        p = torch.stack([query @ (channel.key.weight @ m) for m in memory]).exp()
        p = p / p.sum()
        o = sum(weight * (channel.value.weight @ m + channel.value.bias) for weight, m in zip(p, memory, strict=True))
        g = 1 / (1 + (-(channel.gate.weight @ query + channel.gate.bias)).exp())
        total = total + g * o + (1 - g) * query
        probabilities.append(p)
        gates.append(g)
    return total, torch.stack(probabilities), torch.stack(gates)


@pytest.mark.parametrize("second", [None, SECOND], ids=["one-channel", "two-channels"])
def test_dcmn_equals_its_formulas_in_loops_and_its_gates_lie_between_0_and_1(second):
    model, batch = model_of("dcmn", second_channel=second).model, dense_stays()
    first = [index for index in range(23) if index not in (second or [])]
    with torch.no_grad():
        outputs = model(**batch)
        for row, hours in ((0, 7), (2, 4)):
            values = batch["hourly_values"][row, :hours]
            parts = (values[:, first], values[:, second or first])
            vector, weights, gates = dcmn_by_hand(model.network, parts, batch["demographics"][row])
            torch.testing.assert_close(outputs.pooler_output[row], vector, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(outputs.hour_attentions[row, :, :hours], weights, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(outputs.memory_gates[row], gates, atol=1e-6, rtol=1e-5)
    assert ((outputs.memory_gates > 0) & (outputs.memory_gates < 1)).all()
    assert outputs.hour_attentions[2, :, 4:].abs().max() == 0


@pytest.mark.parametrize("features", [1, 9, 10, 14, 15, 23])
def test_every_feature_lies_under_a_filter_of_dcmn(features):
    model = model_of("dcmn", num_hourly_features=features).model
    for channel in model.network.memories:
        channel.convolution.weight.data.fill_(1.0)
        channel.embedding.weight.data.abs_()
        channel.convolution.bias.data.fill_(0.5)
    values = torch.zeros(features + 1, 1, features)
    values[1:, 0] = torch.eye(features)
    hidden = model.network.memories[0].embed(values, torch.ones(features + 1, 1, dtype=torch.bool))
    assert (hidden[1:] - hidden[0]).abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("hours", [1, 5])
def test_dcmn_takes_a_batch_of_one_stay_in_training(hours, norm):
    model = model_of("dcmn", memory_norm=norm).train()
    model(**dense_stays(hours=(hours,)), labels=LABELS[:1]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_batch_norm_of_dcmn_counts_the_hours_of_stays_and_nothing_else():
    model = model_of("dcmn", memory_norm="batch").train()
    batch = dense_stays()
    wide = batch | {"hourly_values": nn.functional.pad(batch["hourly_values"], (0, 0, 0, 4), value=5.0)}
    torch.testing.assert_close(model(**wide).logits, model(**batch).logits, atol=1e-6, rtol=0)
    channel, hours = model.model.network.memories[0], batch["hourly_values"][[0] * 7 + [2] * 4, [*range(7), *range(4)]]
    raw = channel.embedding(channel.convolution(nn.functional.pad(hours, (0, channel.missing))[:, None]).relu()[:, 0])
    mean = 0.1 * raw.mean(0) * (1 + 0.9)  # two batches with momentum 0.1
    torch.testing.assert_close(channel.norm.running_mean, mean, atol=1e-6, rtol=1e-5)


def test_the_unimodal_models_take_the_greatest_value_of_each_feature_over_valid_hours():
    for kind in ("unimodal_lstm", "transformer"):
        outputs = model_of(kind).model(**dense_stays())
        for row, hours in ((0, 7), (2, 4)):
            torch.testing.assert_close(outputs.pooler_output[row], outputs.last_hidden_state[row, :hours].amax(0))
        assert outputs.pooler_output[1].abs().max() == 0


def test_the_transformer_is_one_block_over_rectified_projections():
    model, batch = model_of("transformer").model, dense_stays()
    network, hours = model.network, dense_stays()["hourly_values"][2, :4]
    layer = network.encoder.layers[0]
    x = network.projection(hours).relu()
    query, key, value = (part.view(4, 4, 3).transpose(0, 1) for part in layer.attention.qkv(x).chunk(3, dim=1))
    weights = (query @ key.transpose(1, 2) / 3**0.5).softmax(-1)
    x = layer.attention_norm(x + layer.attention.out_proj((weights @ value).transpose(0, 1).reshape(4, 12)))
    x = layer.output_norm(x + layer.output(layer.intermediate(x).relu()))
    torch.testing.assert_close(model(**batch).last_hidden_state[2, :4], x, atol=1e-5, rtol=1e-5)


# MedHMP's encoder of hours (row 93)


def test_the_encoder_of_hours_has_the_structure_and_the_size_of_medhmps():
    config = EhrSeriesConfig(architecture="unimodal_lstm", medhmp_encoder=True)
    with torch.device("meta"):
        hours = EhrSeriesModel(config).network.hours
    assert sum(p.numel() for p in hours.parameters()) == 2_667_008


@pytest.mark.parametrize("architecture", ["unimodal_lstm", "transformer"])
def test_the_unimodal_models_read_the_states_of_the_encoder_of_hours(architecture):
    model, batch = model_of(architecture, medhmp_encoder=True).model, dense_stays()
    network = model.network
    hours = network.hours
    with torch.no_grad():
        first, _ = hours.input_lstm(batch["hourly_values"][2:, :4])
        states, _ = hours.lstm(hours.norm(first))
        states = network.lstm(states)[0] if network.lstm is not None else network.encoder(states)
        torch.testing.assert_close(model(**batch).pooler_output[2], states[0].amax(0), atol=1e-6, rtol=1e-5)


def pretrained(kind, folder, **fields):
    """A MedHMP of the sizes of these tests in a folder."""
    torch.manual_seed(1)
    sizes = {"num_hourly_features": 23, "num_demographics": 4, "hidden_size": 12, "num_attention_heads": 4}
    medhmp = kind(MedHMPConfig(**(sizes | {"n_hours": 11} | fields))).eval()
    medhmp.save_pretrained(folder)
    return medhmp


@pytest.mark.parametrize("kind", [MedHMPForStayPreTraining, MedHMPModel])
@pytest.mark.parametrize("architecture", ["unimodal_lstm", "transformer"])
def test_the_encoder_of_a_pretrained_medhmp_is_taken_over_and_says_the_same(architecture, kind, tmp_path):
    medhmp, batch = pretrained(kind, tmp_path), dense_stays()
    model = model_of(architecture, medhmp_encoder=True)
    stays = getattr(medhmp, "medhmp", medhmp).stay_encoder
    assert load_hourly_encoder(model, tmp_path) == list(stays.hourly.state_dict())
    hours, seen = model.model.network.hours, []
    for name, weight in stays.hourly.state_dict().items():
        assert torch.equal(hours.state_dict()[name], weight), name
    hours.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    with torch.no_grad():
        model(**batch)
        torch.testing.assert_close(seen[0], stays.encode(**batch).hours, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "other", "message"),
    [
        ({"medhmp_encoder": False}, {}, "`medhmp_encoder=True`"),
        ({"medhmp_encoder": True}, {"num_hourly_features": 22}, "input_lstm.weight_ih_l0"),
        ({"medhmp_encoder": True}, {"layer_norm_eps": 1e-3}, "layer_norm_eps"),
    ],
    ids=["none", "features", "epsilon"],
)
def test_an_encoder_of_hours_that_does_not_fit_is_refused_and_changes_nothing(fields, other, message, tmp_path):
    pretrained(MedHMPStayModel, tmp_path, **other)
    model = model_of("transformer", **fields)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_hourly_encoder(model, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_frozen_encoder_of_hours_stays_as_it_is():
    model = model_of("transformer", medhmp_encoder=True).train()
    model.model.network.hours.requires_grad_(False)
    model(**dense_stays(), labels=LABELS).loss.backward()
    assert all((p.grad is None) == (".hours." in name) for name, p in model.named_parameters())


# Starting weights, learning, refusals


def test_weights_start_as_pytorchs_own():
    torch.manual_seed(0)
    network = EhrSeriesModel(EhrSeriesConfig(num_hourly_features=100, architecture="raim", hidden_size=64)).network
    for weight, fan in ((network.first.weight, 100), (network.first.bias, 100), (network.cell.weight_hh, 64)):
        assert weight.abs().max() <= fan**-0.5
        assert weight.std().item() == pytest.approx((fan * 3) ** -0.5, rel=0.2)


@pytest.mark.parametrize("kind", ["lstm", "cnn", "raim", "dcmn", "unimodal_lstm"])
def test_it_learns_whether_an_hour_came_before_another(kind):
    """Feature 0 and feature 1 occur once each; the label is which comes first: no sum over hours can tell."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(200, 8, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    labels, rows = torch.arange(200) % 2, torch.arange(200)
    values = torch.rand(200, 8, 6, generator=generator) * 0.2
    values[rows, places[:, 0], labels] = 1
    values[rows, places[:, 1], 1 - labels] = 1
    torch.manual_seed(0)
    model = EhrSeriesForSequenceClassification(
        EhrSeriesConfig.tiny(num_hourly_features=6, num_demographics=0, architecture=kind, n_hours=8)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hours = torch.full((200,), 8)
    for _ in range(60):
        model(stay_hours=hours[:150], hourly_values=values[:150], labels=labels[:150]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model.eval()(stay_hours=hours[150:], hourly_values=values[150:]).logits
    assert (logits.argmax(dim=1) == labels[150:]).float().mean() > 0.85


def test_gradient_accumulation_gives_the_mean_over_all_stays():
    model, batch = model_of("lstm"), dense_stays()
    whole = model(**batch, labels=LABELS).loss
    rows = (slice(0, 1), slice(1, 3))
    parts = [model(**{k: v[r] for k, v in batch.items()}, labels=LABELS[r], num_items_in_batch=3).loss for r in rows]
    torch.testing.assert_close(sum(parts), whole)


def test_the_stock_trainer_trains_and_predicts_plain_logits(tmp_path):
    batch = dense_stays(hours=(7, 3, 4, 2, 6, 1))
    rows = [{name: value[n] for name, value in batch.items()} | {"labels": n % 2} for n in range(6)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model_of("raim"), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (6, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stay_hours": None}, "`stay_hours` must be given"),
        ({"stay_hours": torch.tensor([12, 1, 1]), "hourly_values": torch.zeros(3, 12, 23)}, "at most 11"),
        ({"hourly_values": torch.zeros(3, 7, 22)}, "must have 23 features"),
        ({"demographics": None}, r"shape \(3, 4\)"),
        ({"demographics": torch.zeros(3, 5)}, r"got \(3, 5\)"),
        ({"hourly_values": None}, "got neither"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_next_step(change, message):
    with pytest.raises(ValueError, match=message):
        model_of("lstm")(**(dense_stays() | change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gru"}, "architecture"),
        ({"num_hourly_features": 0}, "must be positive"),
        ({"num_demographics": -1}, "must be positive"),
        ({"cnn_depth": 4}, "1, 2 or 3"),
        ({"architecture": "transformer", "hidden_size": 30, "num_attention_heads": 4}, "divisible"),
        ({"second_channel": [1]}, "must be None"),
        ({"architecture": "raim", "second_channel": [1318]}, "some ids"),
        ({"architecture": "raim", "second_channel": []}, "some ids"),
        ({"architecture": "dcmn", "num_hourly_features": 2, "second_channel": [0, 1]}, "leave others"),
        ({"architecture": "raim", "medhmp_encoder": True}, "must be False"),
    ],
)
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        EhrSeriesConfig(**fields)
