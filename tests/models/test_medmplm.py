"""MedM-PLM: the common suite, and what is its own (papers.md §2, rows 32 to 36, and the mistakes of §2.8)."""

import copy

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    T5Config,
)

from hf_ehr import (
    GBertForMedicationRecommendation,
    MedMPLMConfig,
    MedMPLMForICDCoding,
    MedMPLMForMedicationRecommendation,
    MedMPLMForPreTraining,
    MedMPLMForReadmission,
    MedMPLMModel,
)
from hf_ehr.models.modeling_cross_modal import CrossModal, CrossModalAttention
from tests.models.common import Head
from tests.models.test_gbert import config as code_config
from tests.models.visits import (
    MEDICATIONS,
    VisitSuite,
    masked,
    prediction_loss,
    recommendation_labels,
    recommendation_loss,
    visits,
)

MODES = ("none", "text_only", "cross", "cross_residual")
BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16,
    "initializer_range": 0.15,
}  # fmt: skip


def config(**overrides) -> MedMPLMConfig:
    drugs = {"id2label": dict(enumerate(MEDICATIONS)), "label2id": {name: n for n, name in enumerate(MEDICATIONS)}}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fields = {"code_config": code_config(**quiet), "note_config": BertConfig(**BERT), "classifier_dropout": 0.0}
    fields |= {"problem_type": "multi_label_classification", "initializer_range": 0.15}
    return MedMPLMConfig(**(fields | drugs | overrides))


def model_of(kind, **overrides):
    torch.manual_seed(0)
    return kind(config(**overrides)).eval()


def pretraining(mode: str, name: str = "", **fields) -> Head:
    return Head(
        MedMPLMForPreTraining, AutoModelForPreTraining, "diagnosis_logits", False, masked,
        lambda out, batch: prediction_loss(out, batch, mode), overrides={"pretraining_loss": mode} | fields, name=name,
    )  # fmt: skip


def recommender(name: str = "", **fields) -> Head:
    return Head(
        MedMPLMForMedicationRecommendation, AutoModelForSequenceClassification, "logits", False,
        recommendation_labels, recommendation_loss, overrides=fields, name=name,
    )  # fmt: skip


def outcome_labels(batch) -> dict:
    """One row a visit, as 0 and 1 of each label."""
    return {"labels": (batch["note_input_ids"].sum(dim=-1)[..., None] // torch.arange(1, 7) % 2).float()}


def binary_cross_entropy(outputs, batch):
    p = outputs.logits.sigmoid()
    return -torch.where(batch["labels"] == 1, p.log(), (1 - p).log()).mean()


class TestMedMPLM(VisitSuite):
    heads = [  # noqa: RUF012
        Head(MedMPLMModel, AutoModel, "note_diagnosis_state", per_code=False),
        pretraining("visit_bce"),
        pretraining("masked_ce", "masked-codes-cross", cross_modal="cross"),
        recommender(),
        recommender("no-cross-modal", cross_modal="none"),
        Head(
            MedMPLMForReadmission, AutoModelForSequenceClassification, "logits", False, outcome_labels,
            binary_cross_entropy,
        ),
        Head(
            MedMPLMForReadmission, AutoModelForSequenceClassification, "logits", False, outcome_labels,
            binary_cross_entropy, overrides={"cross_modal": "text_only"}, name="text-only",
        ),
    ]  # fmt: skip
    base_class = MedMPLMModel
    fixture = "medmplm"
    no_dropout = {}  # noqa: RUF012
    frozen = {}  # noqa: RUF012

    def config(self, **overrides):
        return config(**overrides)

    def test_the_config_round_trips_and_rejects_wrong_types(self, head, tmp_path):
        saved = self.config(**head.overrides)
        saved.save_pretrained(tmp_path)
        loaded = MedMPLMConfig.from_pretrained(tmp_path)
        assert loaded.to_json_string() == saved.to_json_string()
        assert (loaded.code_config.model_type, loaded.note_config.model_type) == ("ehr_gbert", "bert")
        with pytest.raises(Exception, match="freeze_note_layers"):
            self.config(freeze_note_layers="two")


class TestMedMPLMCoding(TestMedMPLM):
    heads = [  # noqa: RUF012
        Head(
            MedMPLMForICDCoding, AutoModelForSequenceClassification, "logits", False, outcome_labels,
            binary_cross_entropy,
        )
    ]  # fmt: skip
    fixture = "medmplm_coding"

    def padded(self, seed: int = 0, **kwargs):
        return {name: value for name, value in visits(seed).items() if name != "diagnosis_ids"}


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# Cross-modal attention (rows 33 and 36)


def test_cross_modal_attention_has_the_sizes_of_the_authors_code():
    with torch.device("meta"):
        module = CrossModal("cross_residual", 300, 768)
        model = MedMPLMForReadmission(MedMPLMConfig())
        recommended = MedMPLMForMedicationRecommendation(MedMPLMConfig(target_text="full"))
    assert [count(module.code_queries), count(module.text_queries)] == [551_700, 1_052_928]
    assert model.classifier.in_features == 2136
    assert recommended.classifier.in_features == 3204
    modules = model.medmplm.cross_modal
    assert list(modules) == ["diagnosis", "medication"]
    assert count(modules) == 2 * (551_700 + 1_052_928)


@torch.no_grad()
def test_attention_equals_its_formula_with_every_token_projected():
    torch.manual_seed(0)
    attention = CrossModalAttention(6, 4)
    for weight in attention.parameters():
        nn.init.normal_(weight)
    queries, tokens = torch.randn(3, 6), torch.randn(3, 5, 4)
    there = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    attended, weights = attention(queries, tokens, there)
    for row in range(2):
        seen = there[row].nonzero().flatten()
        query = attention.query(queries[row])
        keys = tokens[row, seen] @ attention.key_weight.T + attention.key_bias
        alpha = (keys @ query / 6**0.5).softmax(dim=0)
        torch.testing.assert_close(weights[row, seen], alpha, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attended[row], alpha @ attention.value(tokens[row, seen]), atol=1e-5, rtol=1e-5)
    assert weights[~there].abs().max() == 0
    assert attended[2].abs().max() == 0


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_codes_and_notes_join_as_the_mode_says(mode):
    """Also: the note reads the codes as they were before they read the note."""
    model, batch = model_of(MedMPLMModel, cross_modal=mode), visits()
    outputs = model(**batch)
    codes = model.code_encoder(batch["diagnosis_ids"], batch["medication_ids"])
    for patient, visit in ((0, 0), (3, 2), (0, 1), (2, 1)):  # two complete, one without note, one without diagnoses
        length = int(batch["note_attention_mask"][patient, visit].sum())
        there = batch["diagnosis_ids"][patient, visit] > 0
        own, states = codes.diagnosis_state[patient, visit], codes.diagnosis_states[patient, visit][there]
        code, text = own, torch.zeros(12)
        if length:
            note = model.note_encoder(batch["note_input_ids"][patient, visit, :length][None])
            text = note.pooler_output[0]
        if length and there.any() and mode != "none":
            module, all_tokens = model.cross_modal["diagnosis"], torch.ones(1, 9, dtype=torch.bool)
            added = 1.0 if mode == "cross_residual" else 0.0
            read, _ = module.text_queries(text[None], states[None], all_tokens[:, : len(states)])
            if mode != "text_only":
                code = (
                    module.code_queries(own[None], note.last_hidden_state, all_tokens[:, :length])[0][0] + added * own
                )
            text = read[0] + added * text
        torch.testing.assert_close(outputs.diagnosis_state[patient, visit], code, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs.note_diagnosis_state[patient, visit], text, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_has_no_weight_and_the_rest_has_all_of_it():
    outputs, batch = model_of(MedMPLMModel)(**visits()), visits()
    both = {
        kind: (batch[f"{kind}_ids"] > 0).any(dim=2) & (batch["note_input_ids"] > 0).any(dim=2)
        for kind in ("diagnosis", "medication")
    }
    for kind, seen in both.items():
        for weights, there in (
            (outputs[f"{kind}_note_attentions"], batch["note_attention_mask"] > 0),
            (outputs[f"note_{kind}_attentions"], batch[f"{kind}_ids"] > 0),
        ):
            assert weights.shape == there.shape
            assert weights[~there].abs().max() == 0
            torch.testing.assert_close(weights.sum(dim=2), seen.float())


@torch.no_grad()
def test_what_stands_under_a_mask_is_never_read():
    model, batch = model_of(MedMPLMModel), visits()
    other = batch | {"note_input_ids": batch["note_input_ids"].masked_fill(batch["note_attention_mask"] == 0, 17)}
    expected, actual = model(**batch), model(**other)
    for name in ("diagnosis_state", "medication_state", "note_diagnosis_state", "note_medication_state"):
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=0)


def test_without_a_cross_modal_module_there_are_none_of_its_parameters():
    names = {mode: {n for n, _ in model_of(MedMPLMModel, cross_modal=mode).named_parameters()} for mode in MODES}
    assert not [name for name in names["none"] if "cross_modal" in name]
    assert names["cross"] == names["cross_residual"]
    assert names["text_only"] == {name for name in names["cross"] if "code_queries" not in name}
    assert names["none"] == {name for name in names["cross"] if "cross_modal" not in name}


# The text encoder (row 32)


def trained(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_the_first_layers_are_frozen_also_after_loading(layers, tmp_path):
    model = model_of(MedMPLMForReadmission, freeze_note_layers=layers)
    model.save_pretrained(tmp_path)
    loaded = MedMPLMForReadmission.from_pretrained(tmp_path)
    for each in (model, loaded):
        expected = {f"encoder.layer.{n}" for n in range(layers, 3)} | {"pooler.dense"}
        found = {".".join(name.split(".")[:3]) for name in trained(each.medmplm.note_encoder)}
        assert {name.removesuffix(".weight").removesuffix(".bias") for name in found} == expected
        each.train()(**visits(), labels=outcome_labels(visits())["labels"]).loss.backward()
        silent = {name for name, weight in each.named_parameters() if weight.grad is None}
        assert silent == {n for n, _ in each.named_parameters()} - trained(each)
        assert not each.medmplm.note_encoder.embeddings.dropout.training
        assert [layer.training for layer in each.medmplm.note_encoder.encoder.layer] == [n >= layers for n in range(3)]


OTHERS = {
    "t5": T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, dropout_rate=0.0),
    "distilbert": DistilBertConfig(vocab_size=30, dim=8, hidden_dim=8, n_layers=2, n_heads=2, dropout=0.0),
}


@pytest.mark.parametrize("family", OTHERS)
def test_any_text_encoder_plugs_in(family, tmp_path):
    fields = {"note_config": copy.deepcopy(OTHERS[family]), "note_pooling": "mean", "freeze_note_layers": 1}
    model = model_of(MedMPLMForReadmission, **fields)
    loss = model.train()(**visits(), labels=outcome_labels(visits())["labels"]).loss
    loss.backward()
    frozen = [name for name, weight in model.medmplm.note_encoder.named_parameters() if weight.grad is None]
    assert frozen
    assert all("embed" in name or "shared" in name or ".0." in name for name in frozen)
    model.eval().save_pretrained(tmp_path)
    loaded = MedMPLMForReadmission.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**visits()).logits, model(**visits()).logits, atol=1e-6, rtol=0)


def test_an_encoder_without_a_pooler_is_refused_where_one_is_read():
    with pytest.raises(ValueError, match="note_pooling"):
        model_of(MedMPLMModel, note_config=copy.deepcopy(OTHERS["t5"]))


def test_a_trained_text_encoder_is_taken_over(tmp_path):
    torch.manual_seed(3)
    encoder = BertModel(BertConfig(**BERT))
    encoder.save_pretrained(tmp_path)
    for source in (tmp_path, encoder):
        model = MedMPLMForReadmission.from_note_encoder(source, code_config=code_config(), freeze_note_layers=2)
        assert trained(model.medmplm.note_encoder) == {
            n for n, _ in encoder.named_parameters() if "layer.2" in n or "pooler" in n
        }
        for name, weight in encoder.named_parameters():
            assert torch.equal(model.medmplm.note_encoder.get_parameter(name), weight)


# Pre-training (row 34)


@pytest.mark.parametrize("mode", ["visit_bce", "masked_ce"])
def test_the_loss_is_that_of_the_note_and_that_of_the_codes(mode):
    outputs = model_of(MedMPLMForPreTraining, pretraining_loss=mode)(**masked(visits()))
    torch.testing.assert_close(outputs.loss, outputs.text_to_code_loss + outputs.code_to_code_loss)
    assert outputs.diagnosis_logits.shape == (4, 3, 3, 11)
    assert outputs.medication_logits.shape == (4, 3, 3, 6)


def test_visible_codes_and_special_tokens_do_not_move_the_loss_of_masked_codes():
    model, batch = model_of(MedMPLMForPreTraining, pretraining_loss="masked_ce"), masked(visits())
    outputs = model(**batch)
    outputs.diagnosis_logits.retain_grad()
    outputs.loss.backward()
    moved = outputs.diagnosis_logits.grad.abs().sum(dim=2) > 0
    visible = batch["diagnosis_ids"].masked_fill(batch["diagnosis_labels"] != -100, 0)
    for patient, visit in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
        hidden = (batch["diagnosis_labels"][patient, visit] != -100).any()
        seen = [int(code) - 5 for code in visible[patient, visit] if code > 4]
        expected = [bool(hidden) and code not in seen for code in range(11)]
        assert moved[patient, visit].tolist() == expected


@pytest.mark.slow
def test_64_visits_are_learned_by_heart():
    generator = torch.Generator().manual_seed(0)
    diagnoses = torch.rand(64, 11, generator=generator).argsort(dim=1)[:, :4] + 5
    medications = torch.rand(64, 6, generator=generator).argsort(dim=1)[:, :2] + 5
    notes = torch.cat([diagnoses, medications + 11], dim=1)
    batch = {"diagnosis_ids": diagnoses, "medication_ids": medications, "note_input_ids": notes}
    none = {f"{kind}_labels": torch.full_like(batch[f"{kind}_ids"], -100) for kind in ("diagnosis", "medication")}
    none["diagnosis_labels"][:, 0], batch["diagnosis_ids"] = diagnoses[:, 0], diagnoses.clone()
    batch["diagnosis_ids"][:, 0] = 4
    model = model_of(MedMPLMForPreTraining).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        outputs = model(**batch, **none)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    truth = torch.zeros(64, 11).scatter(1, diagnoses - 5, 1.0)
    for source in (0, 2):  # from diagnoses, of which one is hidden, and from the note
        scores = outputs.diagnosis_logits[:, source].detach()
        assert average_precision_score(truth.numpy(), scores.numpy(), average="micro") > 0.9


# Mistakes of the authors' code (papers.md §2.8)


def changed_at(batch: dict, seed: int, visit: int, *, own: tuple[str, ...]) -> dict:
    """The same history with other visits from `visit` on; of that visit itself only `own` are others."""
    other, fresh = {name: value.clone() for name, value in batch.items()}, visits(seed)
    for name in batch:
        first = visit if name in own else visit + 1
        other[name][:, first:] = fresh[name][:, first:]
    return other


NOTE = ("note_input_ids", "note_attention_mask")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("visit", [0, 1, 2])
@torch.no_grad()
def test_neither_the_targets_nor_its_note_nor_the_future_are_seen(mode, visit):
    model, batch = model_of(MedMPLMForMedicationRecommendation, cross_modal=mode), visits()
    before = model(**batch).logits
    after = model(**changed_at(batch, 21, visit, own=("medication_ids", *NOTE))).logits
    torch.testing.assert_close(after[:, : visit + 1], before[:, : visit + 1], atol=1e-6, rtol=0)
    if visit < 2:
        assert (after[:, visit + 1] - before[:, visit + 1]).abs().max() > 1e-4


@pytest.mark.parametrize("seen", ["augmented_dx", "full"])
@torch.no_grad()
def test_the_papers_forms_do_see_the_note_but_not_the_medications(seen):
    model, batch = model_of(MedMPLMForMedicationRecommendation, target_text=seen), visits()
    before = model(**batch).logits
    assert (model(**changed_at(batch, 21, 1, own=NOTE)).logits[:, 1] - before[:, 1]).abs().max() > 1e-5
    after = model(**changed_at(batch, 21, 1, own=("medication_ids",))).logits
    torch.testing.assert_close(after[:, :2], before[:, :2], atol=1e-6, rtol=0)
    narrow = {name: value[:, :2] for name, value in batch.items()}
    torch.testing.assert_close(model(**narrow).logits, before[:, :2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [MedMPLMForReadmission, MedMPLMForMedicationRecommendation, MedMPLMForPreTraining])
@torch.no_grad()
def test_a_batch_of_eight_equals_eight_batches_of_one(kind, mode):
    model, batch = model_of(kind, cross_modal=mode), visits(seed=2, patients=8)
    name = "diagnosis_logits" if kind is MedMPLMForPreTraining else "logits"
    together = model(**batch)[name]
    alone = [model(**{key: value[row : row + 1] for key, value in batch.items()})[name] for row in range(8)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-6, rtol=0)
    assert len(together.flatten(1).unique(dim=0)) == 8  # and no patient is a copy of another


@torch.no_grad()
def test_each_kind_moves_its_own_vectors_alone():
    model, batch = model_of(MedMPLMModel), visits()
    before = model(**batch)
    after = model(**(batch | {"medication_ids": visits(seed=8)["medication_ids"]}))
    for name, moved in (
        ("diagnosis_state", False), ("note_diagnosis_state", False), ("diagnosis_pooler_output", False),
        ("note_pooler_output", False), ("medication_state", True), ("note_medication_state", True),
    ):  # fmt: skip
        assert bool((after[name] - before[name]).abs().max() > 1e-6) == moved, name


def test_the_coder_has_nothing_that_reads_diagnoses_and_refuses_them(tmp_path):
    pretrained = model_of(MedMPLMForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model, info = MedMPLMForICDCoding.from_pretrained(tmp_path, output_loading_info=True)
    assert not [name for name, _ in model.named_parameters() if "diagnosis" in name]
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"medication_heads"}
    with pytest.raises(ValueError, match="diagnosis_ids"):
        model(**visits())


def test_the_code_encoder_of_a_pretrained_model_fills_g_bert():
    source = model_of(MedMPLMForPreTraining).medmplm.code_encoder
    target = GBertForMedicationRecommendation(code_config())
    found = target.gbert.load_state_dict(source.state_dict())
    assert not found.missing_keys
    assert not found.unexpected_keys
    for name, weight in source.named_parameters():
        assert torch.equal(target.gbert.get_parameter(name), weight)


# Missing modalities, bad input


def test_a_batch_without_notes_or_without_a_kind_is_read():
    model, batch = model_of(MedMPLMModel), visits()
    bare = {name: value for name, value in batch.items() if name not in NOTE}
    outputs = model(**bare)
    assert torch.equal(outputs.diagnosis_state, outputs.diagnosis_pooler_output)
    assert outputs.note_diagnosis_state.abs().max() == 0
    empty = {name: torch.zeros_like(value) for name, value in batch.items()}
    assert model(**empty).diagnosis_state.abs().max() == 0
    one = {name: value for name, value in batch.items() if name != "diagnosis_ids"}
    assert model(**one).diagnosis_state is None


def test_notes_for_other_visits_are_refused():
    batch = visits()
    with pytest.raises(ValueError, match="note_input_ids"):
        model_of(MedMPLMModel)(**(batch | {"note_input_ids": batch["note_input_ids"][:, :2]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_note_layers": 4}, "freeze_note_layers"),
        ({"cross_modal": "both"}, "cross_modal"),
        ({"cross_modal": "none", "target_text": "augmented_dx"}, "target_text"),
        ({"note_config": 3}, "note_config"),
    ],
)
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        config(**fields)


def test_the_papers_preset():
    paper = MedMPLMConfig.paper()
    assert (paper.code_config.num_attention_heads, paper.freeze_note_layers) == (2, 10)
    assert (paper.pretraining_loss, paper.target_text) == ("masked_ce", "augmented_dx")
