"""G-BERT: the common suite, and what is its own (papers.md §2.2, §2.5, rows 31 and 45)."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification

from hf_ehr import GBertConfig, GBertForMedicationRecommendation, GBertForPreTraining, GBertModel
from tests.models.common import Head
from tests.models.visits import (
    DIAGNOSES,
    MEDICATIONS,
    NUM_DRUGS,
    SPECIAL,
    VisitSuite,
    masked,
    prediction_loss,
    recommendation_labels,
    recommendation_loss,
    visits,
)


def config(**overrides) -> GBertConfig:
    drugs = {"id2label": dict(enumerate(MEDICATIONS)), "label2id": {name: n for n, name in enumerate(MEDICATIONS)}}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "problem_type": "multi_label_classification"}
    sizes["initializer_range"] = 0.15  # with less, what a leak adds would lie below every tolerance
    return GBertConfig.from_vocabularies(
        [*SPECIAL, *DIAGNOSES], [*SPECIAL, *MEDICATIONS], **(drugs | sizes | overrides)
    )


def pretraining(mode: str, **fields) -> Head:
    return Head(
        GBertForPreTraining, AutoModelForPreTraining, "diagnosis_logits", False, masked,
        lambda out, batch: prediction_loss(out, batch, mode), overrides={"pretraining_loss": mode}, **fields,
    )  # fmt: skip


class TestGBert(VisitSuite):
    heads = [  # noqa: RUF012
        Head(GBertModel, AutoModel, "diagnosis_state", per_code=False),
        pretraining("visit_bce"),
        pretraining("masked_ce", name="masked-codes"),
        Head(
            GBertForMedicationRecommendation, AutoModelForSequenceClassification, "logits", False,
            recommendation_labels, recommendation_loss,
        ),
    ]  # fmt: skip
    base_class = GBertModel
    fixture = "gbert"
    frozen = {"hidden_size": 8, "intermediate_size": 8}  # noqa: RUF012

    def config(self, **overrides):
        return config(**overrides)

    def padded(self, seed: int = 0, **kwargs):
        return {name: value for name, value in visits(seed).items() if "note" not in name}

    def batch(self, head, **kwargs):
        return {name: v for name, v in (visits() | head.labels(visits())).items() if name != "note_input_ids"}


def model_of(kind, **overrides):
    torch.manual_seed(0)
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(config(**(fields | overrides))).eval()


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_a_block_and_the_ontology_have_the_sizes_of_the_authors_code():
    with torch.device("meta"):
        model = GBertModel(GBertConfig())
    assert [count(layer) for layer in model.encoder.layers] == [542_100, 542_100]
    attention = model.diagnosis_embeddings.ontology.graph_attention
    assert attention.target_scores.shape == (4, 75)
    assert count(attention) == 300 * 300 + 2 * 300 + 300


def test_the_recommender_has_the_sizes_of_the_authors_code():
    with torch.device("meta"):
        model = GBertForMedicationRecommendation(GBertConfig(id2label=dict(enumerate(range(155)))))
    layers = (model.diagnosis_mapping, model.medication_mapping, model.dense, model.classifier)
    assert [tuple(layer.weight.shape) for layer in layers] == [(300, 300), (300, 300), (600, 900), (155, 600)]


@torch.no_grad()
def test_the_order_of_codes_does_not_matter():
    model, batch = model_of(GBertModel), visits()
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = model(batch["diagnosis_ids"][..., order], batch["medication_ids"].flip(2))
    plain = model(batch["diagnosis_ids"], batch["medication_ids"])
    torch.testing.assert_close(shuffled.diagnosis_state, plain.diagnosis_state, atol=1e-6, rtol=0)
    torch.testing.assert_close(shuffled.medication_state, plain.medication_state, atol=1e-6, rtol=0)
    torch.testing.assert_close(shuffled.diagnosis_states, plain.diagnosis_states[..., order, :], atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_kind_knows_nothing_of_the_other_and_a_missing_one_is_0():
    model, batch = model_of(GBertModel), visits()
    both = model(batch["diagnosis_ids"], batch["medication_ids"])
    alone = model(diagnosis_ids=batch["diagnosis_ids"])
    assert alone.medication_state is None
    torch.testing.assert_close(alone.diagnosis_state, both.diagnosis_state, atol=1e-6, rtol=0)
    empty = ~(batch["diagnosis_ids"] > 0).any(dim=2)
    assert empty.any()
    assert torch.equal(both.diagnosis_state.abs().sum(dim=2) == 0, empty)
    assert both.diagnosis_states[batch["diagnosis_ids"] == 0].abs().max() == 0


@torch.no_grad()
def test_a_block_is_pre_norm_attention_and_feed_forward_written_out():
    model = model_of(GBertModel, num_hidden_layers=1)
    ids = torch.tensor([[5, 8, 10]])
    embedded = model.diagnosis_embeddings(ids, model.type_embeddings.weight[0])[0]
    layer = model.encoder.layers[0]
    query, key, value = layer.attention.qkv(layer.attention_norm(embedded)).chunk(3, dim=1)
    heads = []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        scores = query[:, part] @ key[1:, part].T / 2  # [CLS] is no key
        heads.append(scores.softmax(dim=1) @ value[1:, part])
    x = embedded + layer.attention.out_proj(torch.cat(heads, dim=1))
    inner = layer.intermediate(layer.feed_forward_norm(x))
    x = x + layer.output(nn.functional.gelu(inner, approximate="tanh"))
    outputs = model(diagnosis_ids=ids)
    torch.testing.assert_close(outputs.diagnosis_state[0], x[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.diagnosis_states[0], x[1:], atol=1e-5, rtol=1e-5)


def test_self_and_dual_prediction_add_up_and_read_what_they_should():
    model, batch = model_of(GBertForPreTraining), masked(visits())
    del batch["note_input_ids"], batch["note_attention_mask"]
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, outputs.self_prediction_loss + outputs.dual_prediction_loss)
    other = batch | {"medication_ids": visits(seed=9)["medication_ids"]}
    changed = (model(**other).diagnosis_logits - outputs.diagnosis_logits).abs().amax(dim=(0, 1, 3)) > 1e-6
    assert changed.tolist() == [False, True]  # from diagnoses; from medications


@pytest.mark.parametrize("visit", [1, 2])
def test_a_visit_is_scored_without_its_medications_and_without_later_visits(visit):
    model, batch = model_of(GBertForMedicationRecommendation), TestGBert().padded()
    before = model(**batch).logits
    other = {name: value.clone() for name, value in batch.items()}
    fresh = visits(seed=11)
    other["medication_ids"][:, visit:] = fresh["medication_ids"][:, visit:]
    other["diagnosis_ids"][:, visit + 1 :] = fresh["diagnosis_ids"][:, visit + 1 :]
    after = model(**other).logits
    torch.testing.assert_close(after[:, : visit + 1], before[:, : visit + 1], atol=1e-6, rtol=0)
    earlier = {name: value.clone() for name, value in batch.items()}
    earlier["medication_ids"][:, 0] = torch.tensor([10, 5, 9])
    assert (model(**earlier).logits[:, visit] - before[:, visit]).abs().amax(dim=1).max() > 1e-4


@torch.no_grad()
def test_the_recommender_equals_its_formula_visit_by_visit():
    model, batch = model_of(GBertForMedicationRecommendation), TestGBert().padded()
    encoded = model.gbert(**batch)
    logits = model(**batch).logits
    states = (
        model.diagnosis_mapping(encoded.diagnosis_state).relu(),
        model.medication_mapping(encoded.medication_state).relu(),
    )
    there = [(batch[name] > 0).any(dim=2) for name in ("diagnosis_ids", "medication_ids")]
    for patient in range(4):
        for t in range(3):
            means = []
            for part, seen in zip(states, there, strict=True):
                rows = [part[patient, i] for i in range(t) if seen[patient, i]]
                means.append(torch.stack(rows).mean(dim=0) if rows else torch.zeros(16))
            own = states[0][patient, t] if there[0][patient, t] else torch.zeros(16)
            expected = model.classifier(model.dense(torch.cat([*means, own])).relu())
            torch.testing.assert_close(logits[patient, t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "diagnosis_ids"),
        ({"diagnosis_ids": torch.ones(2, 3, 1), "medication_ids": torch.ones(2, 2, 1)}, "leading dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        model_of(GBertModel)(**inputs)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="labels"):
        model_of(GBertForMedicationRecommendation)(**TestGBert().padded(), labels=torch.zeros(4, NUM_DRUGS))
    model, batch = model_of(GBertForPreTraining), TestGBert().padded()
    wrong = {"diagnosis_labels": batch["medication_ids"], "medication_labels": batch["medication_ids"]}
    with pytest.raises(ValueError, match="Labels of codes"):
        model(**batch, **wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"graph_attention_heads": 3}, "graph_attention_heads"),
        ({"cls_token_id": 7}, "cls_token_id"),
        ({"medication_vocab_size": 5}, "medication_vocab_size"),
        ({"pretraining_loss": "mse"}, "pretraining_loss"),
    ],
)
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        config(**fields)


def test_the_tiny_one_learns_in_200_steps_which_drug_goes_with_which_diagnosis():
    """Of 20 drugs a visit has the two that its two diagnoses ask for: told from the diagnoses the loss goes to 0, told
    from nothing it stays at the entropy of 10 %."""
    torch.manual_seed(0)
    model = GBertForPreTraining(GBertConfig.tiny(diagnosis_vocab_size=20 + 5, medication_vocab_size=20 + 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    nothing = torch.full((64, 2), -100)
    for _ in range(200):
        ids = torch.rand(64, 20).argsort(dim=1)[:, :2] + model.config.num_special_tokens
        outputs = model(ids, ids, diagnosis_labels=nothing, medication_labels=nothing)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    drugs = nn.functional.one_hot(ids - model.config.num_special_tokens, 20).sum(dim=1)
    told = nn.functional.binary_cross_entropy_with_logits(outputs.medication_logits[:, 0], drugs.float())
    entropy = -(0.1 * torch.tensor(0.1).log() + 0.9 * torch.tensor(0.9).log())
    assert told < entropy / 2
