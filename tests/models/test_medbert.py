"""Med-BERT: the common suite, and what is its own (papers.md §1, acceptance rows 3-8)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)

from hf_ehr import (
    MedBertConfig,
    MedBertForMaskedLM,
    MedBertForPreTraining,
    MedBertForSequenceClassification,
    MedBertModel,
)
from hf_ehr.models.modeling_ehr import packed_borders
from tests.models.common import FamilySuite, Head, pack, padded_batch

STAY = torch.tensor([0, 1, 0])


def masked_labels(batch: dict) -> dict:
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[0, 7], labels[1, 3], labels[2, 0] = 7, 9, 30, 5
    return {"labels": labels}


def code_loss(logits, labels):
    return torch.stack(
        [
            -row.log_softmax(-1)[label]
            for row, label in zip(logits[labels != -100], labels[labels != -100], strict=True)
        ]
    ).mean()


def stay_loss(logits):
    return -(logits.log_softmax(-1)[torch.arange(3), STAY]).mean()


HEADS = [
    Head(MedBertModel, AutoModel, "last_hidden_state", per_code=True),
    Head(
        MedBertForMaskedLM, AutoModelForMaskedLM, "logits", True, masked_labels,
        lambda out, batch: code_loss(out.logits, batch["labels"]), logits_on_request=True,
    ),
    Head(
        MedBertForPreTraining, AutoModelForPreTraining, "prediction_logits", True,
        lambda batch: masked_labels(batch) | {"prolonged_stay_labels": STAY},
        lambda out, batch: code_loss(out.prediction_logits, batch["labels"]) + stay_loss(out.stay_logits),
        logits_on_request=True,
    ),
    Head(
        MedBertForSequenceClassification, AutoModelForSequenceClassification, "logits", False,
        lambda batch: {"labels": STAY}, lambda out, batch: stay_loss(out.logits),
    ),
]  # fmt: skip


SEQUENCE_HEADS = ("gru", "bigru", "retain", "lstm", "dipole", "adacare", "hitanet")


class TestMedBert(FamilySuite):
    heads = HEADS
    fixture = "medbert"
    lora_targets = ["qkv"]  # noqa: RUF012

    def config(self, **overrides):
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_visits": 20}
        return MedBertConfig.tiny(
            **({"vocab_size": self.vocab_size, "max_position_embeddings": 40} | sizes | overrides)
        )


class TestMedBertOptions(TestMedBert):
    """The other side of every switch: pre-norm, no serialization table, first-code pooling, head start."""

    fixture = "medbert_options"

    def config(self, **overrides):
        options = {"norm_position": "pre", "serialization": "none", "pooling": "first", "attention_gain": 2.0}
        return super().config(**(options | overrides))

    heads = [head for head in HEADS if head.model_class is not MedBertForMaskedLM]  # noqa: RUF012
    test_it_loads_without_the_package = None  # the files are the same

    def test_every_parameter_receives_a_gradient(self, head):
        if head.model_class is MedBertModel:
            pytest.skip("the pooler is read through the heads")
        super().test_every_parameter_receives_a_gradient(head)


class TestMedBertHeads(TestMedBert):
    """The sequence heads on the encoder's states."""

    fixture = "medbert_heads"
    heads = [  # noqa: RUF012
        HEADS[0],
        *(replace(HEADS[-1], name=name, overrides={"head": name, "head_hidden_size": 12}) for name in SEQUENCE_HEADS),
    ]
    test_it_loads_without_the_package = None  # the files are the same

    def padded(self, **kwargs) -> dict:
        batch = super().padded(**kwargs)
        return batch | {"day_ids": (batch["visit_ids"] * 200 - 199) * batch["attention_mask"]}


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_papers():
    model = MedBertForPreTraining(MedBertConfig.code_exact())
    assert parameters(model.model.embeddings) == 16_150_464
    assert parameters(model.model.encoder) == 1_042_944
    assert parameters(model.model.pooler) == 37_056
    assert parameters(model.model) == 17_230_464
    assert parameters(model.head) - model.head.decoder.weight.numel() == 120_043
    assert parameters(model.stay_classifier) == 386


def test_it_equals_bert_with_the_same_weights():
    ours = MedBertModel(MedBertConfig.tiny(vocab_size=50, pooling="first", max_visits=20)).eval()
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_act="gelu_new", type_vocab_size=20,
    )  # fmt: skip
    bert = BertModel(config).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.3)
        copy_into_bert(ours, bert)
        batch = padded_batch(50)
        expected = bert(batch["input_ids"], batch["attention_mask"], token_type_ids=batch["visit_ids"])
        for inputs in (batch, pack(batch)):
            actual = ours(**inputs)
            states = actual.last_hidden_state
            states = states[0] if "cu_seqlens" in inputs else states[batch["attention_mask"].bool()]
            reference = expected.last_hidden_state[batch["attention_mask"].bool()]
            torch.testing.assert_close(states, reference, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


def copy_into_bert(ours, bert) -> None:
    source, target = ours.embeddings, bert.embeddings
    pairs = [
        (source.code_embeddings, target.word_embeddings), (source.visit_embeddings, target.token_type_embeddings),
        (source.serial_embeddings, target.position_embeddings), (source.norm, target.LayerNorm),
        (ours.pooler, bert.pooler.dense),
    ]  # fmt: skip
    for mine, theirs in zip(ours.encoder.layers, bert.encoder.layer, strict=True):
        attention = theirs.attention
        pairs += [
            (mine.attention.out_proj, attention.output.dense), (mine.attention_norm, attention.output.LayerNorm),
            (mine.intermediate, theirs.intermediate.dense), (mine.output, theirs.output.dense),
            (mine.output_norm, theirs.output.LayerNorm),
        ]  # fmt: skip
        parts = (attention.self.query, attention.self.key, attention.self.value)
        for part, weight, bias in zip(
            parts, mine.attention.qkv.weight.chunk(3), mine.attention.qkv.bias.chunk(3), strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
    for mine, theirs in pairs:
        theirs.load_state_dict(mine.state_dict())


def serial_model(mode: str) -> MedBertModel:
    return MedBertModel(MedBertConfig.tiny(vocab_size=50, serialization=mode, max_visits=20)).eval()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("global", [0, 1, 2, 3, 4, 5]), ("within_visit", [0, 1, 0, 0, 1, 2])],
)
def test_serialization_counts_what_its_mode_says(mode, expected):
    visits = torch.tensor([[1, 1, 2, 3, 3, 3], [1, 1, 2, 3, 3, 3]])
    model = serial_model(mode)
    assert model._serial_ids(visits, None, torch.ones_like(visits), None).tolist() == [expected] * 2
    batch = {"input_ids": visits + 5, "attention_mask": torch.ones_like(visits), "visit_ids": visits}
    packed = packed_borders(visits.reshape(1, -1), None, pack(batch)["cu_seqlens"], None)
    assert model._serial_ids(visits.reshape(1, -1), None, None, packed).tolist() == [expected * 2]


def test_serialization_none_has_no_table_and_no_order():
    model = serial_model("none")
    assert not any("serial" in name for name, _ in model.named_parameters())
    codes, visits = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        straight = model(codes, visit_ids=visits).pooler_output
        shuffled = model(codes[:, order], visit_ids=visits).pooler_output
    torch.testing.assert_close(shuffled, straight, atol=1e-6, rtol=0)


def test_global_positions_do_not_move_under_left_padding():
    model = serial_model("global")
    codes = torch.tensor([[5, 6, 7]])
    left = torch.tensor([[0, 0, 5, 6, 7]])
    with torch.no_grad():
        plain = model(codes).pooler_output
        padded = model(left, attention_mask=(left > 0).long()).pooler_output
    torch.testing.assert_close(padded, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "sum", "sum_unmasked", "first"])
def test_poolings_by_hand_and_only_sum_unmasked_sees_padding(pooling):
    torch.manual_seed(0)
    model = MedBertModel(MedBertConfig.tiny(vocab_size=50, pooling=pooling)).eval()
    batch = padded_batch(50)
    wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    with torch.no_grad():
        narrow_out, wide_out = model(**batch), model(**wide)
        states, mask = narrow_out.last_hidden_state, batch["attention_mask"][..., None]
        expected = {
            "sum": (states * mask).sum(1),
            "mean": (states * mask).sum(1) / mask.sum(1),
            "sum_unmasked": states.sum(1),
            "first": torch.tanh(model.pooler(states[:, 0])) if pooling == "first" else None,
        }[pooling]
    torch.testing.assert_close(narrow_out.pooler_output, expected)
    same = torch.allclose(narrow_out.pooler_output, wide_out.pooler_output, atol=1e-5)
    assert same == (pooling != "sum_unmasked")


def test_code_exact_uses_id_zero_for_mask_and_padding():
    config = MedBertConfig.code_exact(vocab_size=50)
    assert (config.pad_token_id, config.mask_token_id) == (0, 0)
    assert MedBertConfig(vocab_size=50).mask_token_id != MedBertConfig(vocab_size=50).pad_token_id


def test_joint_pretraining_overfits_64_patients():
    torch.manual_seed(0)
    lengths = tuple(np.random.default_rng(0).integers(3, 12, 64).tolist())
    batch = padded_batch(60, lengths=lengths)
    first = torch.zeros(64, dtype=torch.long)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[torch.arange(64), first] = batch["input_ids"][torch.arange(64), first]
    batch["input_ids"][torch.arange(64), first] = 4
    stays = torch.arange(64) % 2
    inputs = pack(batch | {"labels": labels, "prolonged_stay_labels": stays})
    model = MedBertForPreTraining(MedBertConfig.tiny(vocab_size=60, hidden_dropout_prob=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    outputs = model.eval()(**inputs, return_logits=True)
    rows = inputs["labels"][0] != -100
    correct = outputs.prediction_logits[0][rows].argmax(-1) == inputs["labels"][0][rows]
    assert correct.float().mean() > 0.9
    assert (outputs.stay_logits.argmax(-1) == stays).all()


def test_masked_set_loss_by_hand_and_invariant_to_the_batch():
    torch.manual_seed(0)
    model = MedBertForPreTraining(MedBertConfig.tiny(vocab_size=50, objective="masked_set")).eval()
    batch = padded_batch(50)
    hidden = torch.tensor([[7, 9, 11], [30, -100, -100], [5, 6, -100]])
    with torch.no_grad():
        outputs = model(**batch, labels=hidden, return_logits=True)
        packed = model(**pack(batch), labels=hidden)
    scores = outputs.prediction_logits.log_softmax(-1)
    expected = -sum(scores[row, code] for row, codes in enumerate(hidden) for code in codes if code >= 0) / 6
    assert outputs.prediction_logits.shape == (3, 50)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(packed.loss, expected)


@pytest.mark.parametrize(("problem", "labels"), [
    ("single_label_classification", torch.tensor([2, 0, 1])),
    ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])),
])  # fmt: skip
def test_classification_losses_by_hand_and_as_sums_over_an_accumulated_batch(problem, labels):
    config = MedBertConfig.tiny(vocab_size=50, num_labels=3, problem_type=problem, hidden_dropout_prob=0.0)
    model = MedBertForSequenceClassification(config)
    batch = padded_batch(50)
    outputs = model(**batch, labels=labels)
    if problem.startswith("multi"):
        p = outputs.logits.sigmoid()
        expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    else:
        expected = -outputs.logits.log_softmax(-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(outputs.loss, expected)
    halves = [
        model(
            **{name: value[part] for name, value in batch.items()},
            labels=labels[part],
            num_items_in_batch=labels.numel(),
        )
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(half.loss for half in halves), expected)


def test_masked_lm_loss_is_the_sum_over_the_items_of_the_whole_batch():
    model = MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=50)).eval()
    batch = padded_batch(50)
    batch |= masked_labels(batch)
    torch.testing.assert_close(model(**batch, num_items_in_batch=8).loss, model(**batch).loss * 4 / 8)


def test_no_target_gives_zero_loss_not_nan():
    model = MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=50))
    batch = padded_batch(50)
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0


def test_labels_bring_no_logits_unless_asked():
    model = MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=50)).eval()
    batch = padded_batch(50)
    assert model(**batch).logits.shape == (3, 10, 50)
    assert model(**batch, **masked_labels(batch)).logits is None
    assert model(**batch, **masked_labels(batch), return_logits=True).logits.shape == (3, 10, 50)


def test_attention_gain_starts_values_as_the_identity():
    model = MedBertModel(MedBertConfig.tiny(vocab_size=50, attention_gain=3.0))
    attention = model.encoder.layers[1].attention
    assert torch.equal(attention.qkv.weight[-64:], 3 * torch.eye(64))
    assert torch.equal(attention.out_proj.weight, torch.eye(64))
    assert 0 < attention.qkv.weight[:128].std() < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m(**b, inputs_embeds=torch.zeros(3, 10, 64)), "Exactly one of"),
        (lambda m, b: m(**b, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32)), "packed input"),
        (lambda m, b: m(b["input_ids"][:1], cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)), "must run from 0"),
        (lambda m, b: m(torch.ones(1, 600, dtype=torch.long)), "max_position_embeddings"),
    ],
)
def test_bad_input_is_refused_with_the_next_step(call, message):
    with pytest.raises(ValueError, match=message):
        call(MedBertModel(MedBertConfig.tiny(vocab_size=50)), padded_batch(50))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 50, "num_attention_heads": 4}, "divisible"),
        ({"vocab_size": 3}, "mask_token_id"),
        ({"pooling": "max"}, "pooling"),
        ({"serialization": "absolute"}, "serialization"),
    ],
)
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        MedBertConfig(**fields)


def test_the_base_preset_is_the_papers_shape():
    config = MedBertConfig.base()
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert shape == (6, 192, 6, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.max_visits) == (82_603, 512, 1_000)
