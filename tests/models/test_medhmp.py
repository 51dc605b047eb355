"""MedHMP: the common suite, and what is its own (papers.md §4, acceptance rows 76 to 85 and 104)."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, BertConfig, T5Config

from hf_ehr import (
    MedHMPConfig,
    MedHMPForAdmissionClassification,
    MedHMPForAdmissionPreTraining,
    MedHMPForStayClassification,
    MedHMPForStayPreTraining,
    MedHMPModel,
    MedHMPStayModel,
)
from hf_ehr.models.hourly_series import HourlySeries
from hf_ehr.models.modeling_contrastive import ContrastiveViews, contrastive_loss
from hf_ehr.models.modeling_masked_codes import MaskedCodes, masked_code_losses
from hf_ehr.models.modeling_medhmp_admission import CodeSetEncoder, StayPooling
from hf_ehr.models.modeling_medhmp_stay import TokenFusion
from tests.models.common import FamilySuite, Head

FEATURES, DEMOGRAPHICS, DIAGNOSES, MEDICATIONS, NOTE = 11, 4, 14, 9, 6
HOURS, OWNERS = (5, 2, 3, 0), (0, 0, 2, 3)  # four stays of four admissions: two, none, one, one without hours
LABELS = torch.tensor([0, 1, 1, 0])


def stays(seed: int = 0, hours=HOURS) -> dict[str, torch.Tensor]:
    """Random stays in sparse form: three features an hour."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.full((sum(hours),), 3)
    ids = torch.cat([torch.randperm(FEATURES, generator=generator)[:3] for _ in range(sum(hours))])
    return {
        "stay_hours": torch.tensor(hours),
        "feature_ids": ids.int(),
        "feature_counts": counts.to(torch.int16),
        "feature_values": torch.rand(3 * sum(hours), generator=generator) + 0.5,
        "demographics": torch.randn(len(hours), DEMOGRAPHICS, generator=generator),
    }


def admissions(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four admissions: all there; no stay; no medication; no diagnosis, note, or hour of a stay."""
    generator = torch.Generator().manual_seed(seed + 1)
    return stays(seed) | {
        "stay_admissions": torch.tensor(OWNERS),
        "diagnosis_ids": torch.tensor([[3, 5, 7, 9], [2, 3, 0, 0], [13, 1, 4, 0], [0, 0, 0, 0]]),
        "medication_ids": torch.tensor([[1, 2, 3], [4, 8, 0], [0, 0, 0], [5, 6, 0]]),
        "note_vectors": torch.randn(4, NOTE, generator=generator),
        "note_mask": torch.tensor([True, True, True, False]),
    }


MASKS = {
    "diagnosis_mask": torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool(),
    "medication_mask": torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]).bool(),
}


def cross_entropy(outputs, batch):
    return -outputs.logits.log_softmax(-1)[torch.arange(len(batch["labels"])), batch["labels"]].mean()


def squared_error(outputs, batch):
    """Hour by hour, feature by feature."""
    values = HourlySeries.of(FEATURES, *(batch[name] for name in list(batch)[:4])).values
    errors = [
        (outputs.reconstruction[stay, hour] - values[stay, hour]).square().mean()
        for stay, hours in enumerate(HOURS)
        for hour in range(hours)
    ]
    return torch.stack(errors).mean()


def classifier_labels(batch):
    return {"labels": LABELS}


class TestMedHMP(FamilySuite):
    heads = [  # noqa: RUF012
        Head(MedHMPModel, AutoModel, "admission_state", per_code=False),
        Head(MedHMPStayModel, AutoModel, "stay_state", per_code=False),
        Head(MedHMPForStayPreTraining, AutoModelForPreTraining, "reconstruction", False, hand_loss=squared_error),
        Head(
            MedHMPForAdmissionPreTraining, AutoModelForPreTraining, "diagnosis_logits", False,
            hand_loss=lambda out, batch: out.masked_code_loss + 0.1 * out.contrastive_loss,
        ),
        *(
            Head(kind, AutoModelForSequenceClassification, "logits", False, classifier_labels, cross_entropy)
            for kind in (MedHMPForStayClassification, MedHMPForAdmissionClassification)
        ),
        Head(
            MedHMPForStayPreTraining, AutoModelForPreTraining, "reconstruction", False, hand_loss=squared_error,
            overrides={"decoder": "first_input"}, name="first-input",
        ),
        Head(
            MedHMPForAdmissionPreTraining, AutoModelForPreTraining, "medication_logits", False,
            hand_loss=lambda out, batch: out.masked_code_loss + 0.1 * out.contrastive_loss, name="options",
            overrides={
                "stay_pooling": "concat", "stay_projection": "linear_norm_relu", "masked_code_mode": "separate",
                "masked_code_loss": "mse_indicator", "embed_masked_count": True, "contrastive_loss": "decoupled",
            },
        ),
        Head(
            MedHMPForAdmissionClassification, AutoModelForSequenceClassification, "logits", False, classifier_labels,
            cross_entropy, overrides={"stay_pooling": "attention", "use_ffn": False}, name="attention-pooling",
        ),
    ]  # fmt: skip
    fixture = "medhmp"
    lora_targets = ["qkv"]  # noqa: RUF012
    no_dropout = {"hidden_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"hidden_size": 8, "demographics_hidden_size": 8, "intermediate_size": 8}  # noqa: RUF012

    # What follows is about codes in a row: packed input, token embeddings and their decoder.
    test_packed_equals_padded = None
    test_packed_and_padded_training_give_one_loss_and_one_gradient = None
    test_changing_one_packed_patient_leaves_the_others_bit_equal = None
    test_token_embeddings_can_be_resized = None
    test_untied_weights_survive_a_round_trip = None

    def config(self, **overrides):
        return config(**overrides)

    def padded(self, seed: int = 0, **kwargs):
        return admissions(seed) | MASKS

    def test_extra_padding_changes_nothing(self, head):
        model, batch = self.model(head), self.inputs(head)
        values, mask = HourlySeries.of(FEATURES, *(batch[name] for name in list(batch)[:4]))
        wide = {name: batch[name] for name in batch if not name.startswith("feature")}
        wide |= {name: nn.functional.pad(value, (0, 3)) for name, value in wide.items() if "_ids" in name}
        wide |= {name: nn.functional.pad(value, (0, 3)) for name, value in MASKS.items()}
        wide["hourly_values"] = nn.functional.pad(values, (0, 0, 0, 4), value=9.0)  # after the last hour of all
        expected, actual = self.output(head, model, batch), self.output(head, model, wide)
        if head.output == "reconstruction":
            actual = actual[:, : mask.shape[1]]
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)

    def test_a_batch_equals_its_patients_one_by_one(self, head):
        model, batch = self.model(head), self.inputs(head)
        together = self.output(head, model, batch)
        by_stay = "Stay" in head.model_class.__name__
        for row in range(4):
            alone = self.output(head, model, one_stay(batch, row) if by_stay else one_admission(batch, row))
            expected = together[row : row + 1]
            if head.output == "reconstruction":
                expected = expected[:, : alone.shape[1]]
            torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)

    def test_a_base_checkpoint_fills_the_head_but_for_its_own_parameters(self, head, tmp_path):
        base_class = MedHMPStayModel if "Stay" in head.model_class.__name__ else MedHMPModel
        base = self.model(Head(base_class, AutoModel, "", False, overrides=head.overrides))
        base.save_pretrained(tmp_path)
        loaded, info = head.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not [key for key in info["missing_keys"] if "encoder." in key]
        for name, weight in base.named_parameters():
            assert torch.equal(getattr(loaded, "medhmp", loaded).get_parameter(name), weight), name
        assert all(p.isfinite().all() for p in loaded.parameters())

    def test_bf16_stays_finite_and_near_fp32(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), self.batch(head)
        expected = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)

    def test_it_overfits_a_few_patients(self, head):
        """To a tenth of where it starts; 10 unlike hours from a state of 12 numbers not as far."""
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        # The least contrastive loss is not 0 where modalities are missing.
        fields = {"contrastive_weight": 0.0} if "Admission" in head.model_class.__name__ else {}
        model, batch = self.model(head, **fields).train(), self.batch(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        first = model(**batch).loss.item()
        for _ in range(200):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < (0.6 if head.output == "reconstruction" else 0.1) * first


def config(**overrides) -> MedHMPConfig:
    sizes = {
        "num_hourly_features": FEATURES, "num_demographics": DEMOGRAPHICS, "hidden_size": 12, "n_hours": 12,
        "num_attention_heads": 2, "diagnosis_vocab_size": DIAGNOSES, "medication_vocab_size": MEDICATIONS,
        "note_size": NOTE,
    }  # fmt: skip
    return MedHMPConfig.tiny(**(sizes | overrides))


def one_stay(batch: dict, row: int) -> dict:
    entries, hours = batch["feature_counts"].long(), batch["stay_hours"].tolist()
    begin, end = sum(hours[:row]), sum(hours[: row + 1])
    first, last = int(entries[:begin].sum()), int(entries[:end].sum())
    return {
        "stay_hours": batch["stay_hours"][row : row + 1],
        "feature_ids": batch["feature_ids"][first:last],
        "feature_counts": batch["feature_counts"][begin:end],
        "feature_values": batch["feature_values"][first:last],
        "demographics": batch["demographics"][row : row + 1],
    }


def one_admission(batch: dict, row: int) -> dict:
    mine = [one_stay(batch, stay) for stay, owner in enumerate(OWNERS) if owner == row]
    joined = {name: torch.cat([stay[name] for stay in mine]) for name in mine[0]} if mine else {}
    if mine:
        joined["stay_admissions"] = torch.zeros(len(mine), dtype=torch.long)
    names = ("diagnosis_ids", "medication_ids", "note_vectors", "note_mask", *MASKS)
    return joined | {name: batch[name][row : row + 1] for name in names}


def model_of(kind, **overrides):
    torch.manual_seed(0)
    return kind(config(**({"hidden_dropout_prob": 0.0} | overrides))).eval()


# Sizes and the stay encoder (row 76)


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_layers_have_the_sizes_of_the_authors_code():
    with torch.device("meta"):
        model = MedHMPModel(MedHMPConfig(stay_pooling="concat"))
        first_stage = MedHMPForStayPreTraining(MedHMPConfig(decoder="first_input"))
    stay, admission = model.stay_encoder, model.admission_encoder
    attention = count(stay.fusion) - count(stay.fusion.feed_forward)
    assert [count(stay.hourly), count(stay.demographics), attention] == [2_667_008, 21_376, 262_656]
    assert [count(stay.fusion.feed_forward), count(stay), count(first_stage)] == [526_080, 3_477_120, 12_311_872]
    assert [count(admission.diagnoses), count(admission.medications)] == [2_034_944, 502_784]
    assert [count(admission.stays), count(admission.note)] == [197_376, 197_376]


def test_the_papers_preset_is_one_head_without_feed_forward_and_its_sums():
    paper = MedHMPConfig.paper(hidden_size=12)
    assert isinstance(TokenFusion(paper).feed_forward, nn.Identity)
    assert (paper.num_attention_heads, paper.masked_code_loss, paper.contrastive_loss) == (
        1, "mse_indicator", "decoupled",
    )  # fmt: skip


@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_fusion_equals_attention_written_out_head_by_head(heads):
    torch.manual_seed(0)
    fusion = TokenFusion(config(num_attention_heads=heads, use_ffn=False)).eval()
    tokens = torch.randn(2, 4, 12)
    present = torch.tensor([[True] * 4, [True, False, True, False]])
    fused, weights = fusion(tokens, present)
    query, key, value = fusion.qkv.weight.chunk(3)
    width = 12 // heads
    for row in range(2):
        attended = []
        for i in range(4):
            parts = []
            for head in range(heads):
                mine = slice(head * width, (head + 1) * width)
                seen = [j for j in range(4) if present[row, j] or j == i]
                scores = [
                    math.exp(float((query @ tokens[row, i])[mine] @ (key @ tokens[row, j])[mine]) / math.sqrt(width))
                    for j in seen
                ]
                shares = [score / sum(scores) for score in scores]
                expected = torch.zeros(4).index_copy(0, torch.tensor(seen), torch.tensor(shares))
                torch.testing.assert_close(weights[row, head, i], expected)
                parts.append(sum(a * (value @ tokens[row, j])[mine] for a, j in zip(shares, seen, strict=True)))
            attended.append(fusion.norm(tokens[row, i] + fusion.out.weight @ torch.cat(parts)))
        torch.testing.assert_close(fused[row], torch.stack(attended).amax(dim=0), atol=1e-6, rtol=1e-5)


def test_the_state_of_a_stay_is_the_cell_after_its_last_hour():
    encoder, batch = model_of(MedHMPStayModel).stay_encoder.hourly, stays()
    series = HourlySeries.of(FEATURES, *(batch[name] for name in list(batch)[:4]))
    states, cells = encoder(series)
    for stay, hours in enumerate(HOURS):
        if hours:
            inner, _ = encoder.input_lstm(series.values[stay, :hours])
            outer, (_, last) = encoder.lstm(encoder.norm(inner))
            torch.testing.assert_close(cells[stay], last[-1], atol=1e-6, rtol=0)
            torch.testing.assert_close(states[stay, :hours], outer, atol=1e-6, rtol=0)
        assert states[stay, hours:].abs().sum() == 0
    assert cells[3].abs().sum() == 0  # no hour: where the recurrence starts


def test_packed_hours_and_padded_ones_have_the_same_states_and_gradients():
    encoder, batch = model_of(MedHMPStayModel).stay_encoder.hourly, stays()
    series = HourlySeries.of(FEATURES, *(batch[name] for name in list(batch)[:4]))
    found = []
    for read in (encoder._packed, encoder._padded):  # of GPUs and of the CPU
        states, cells = read(series)
        gradients = torch.autograd.grad(states.square().sum() + cells.sin().sum(), list(encoder.parameters()))
        found.append((states, cells, *gradients))
    for packed, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, packed, atol=1e-5, rtol=1e-5)


def test_attention_compares_hours_with_demographics():
    model, batch = model_of(MedHMPStayModel), stays()
    changed = batch | {"demographics": batch["demographics"].flip(0)}
    (before,), (after,) = model(**batch).attentions, model(**changed).attentions
    assert before.shape == (4, 2, 2, 2)
    torch.testing.assert_close(before.sum(dim=-1), torch.ones(4, 2, 2))
    assert (before - after).abs().max() > 1e-3


# Reconstruction (row 77)


@pytest.mark.parametrize("decoder", ["init_hidden", "first_input"])
def test_32_stays_are_reconstructed_far_better_than_by_their_mean(decoder):
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.rand(4, 6, FEATURES, generator=generator) < 0.5).float()
    if decoder == "first_input":  # whose states are the hours themselves: they cannot hold a new pattern every hour
        kinds = kinds[:, :1].expand(4, 6, FEATURES)
    values = kinds[torch.arange(32) % 4]
    batch = {"stay_hours": torch.full((32,), 6), "hourly_values": values, "demographics": torch.zeros(32, 4)}
    model = model_of(MedHMPForStayPreTraining, decoder=decoder, hidden_size=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.25 * (values - values.mean(dim=0)).square().mean()


@pytest.mark.parametrize("kind", ["init_hidden", "first_input"])
@torch.no_grad()
def test_hours_are_decoded_from_the_state_alone_step_by_step(kind):
    decoder, states = model_of(MedHMPForStayPreTraining, decoder=kind).decoder, torch.randn(2, 12)
    decoded, lstm = decoder(states, 4), decoder.lstm
    for row, state in enumerate(states):
        hidden, inputs = state, torch.ones(4, 1)
        if kind == "first_input":
            feed = decoder.feed_forward
            first = feed.norm(state + feed.output(feed.intermediate(state).clamp(min=0)))
            hidden, inputs = torch.zeros(FEATURES), torch.stack([first, *torch.zeros(3, 12)])
        cell = torch.zeros_like(hidden)
        for hour in range(4):
            gates = lstm.weight_ih_l0 @ inputs[hour] + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ hidden + lstm.bias_hh_l0
            enter, forget, candidate, leave = gates.chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            expected = decoder.output(hidden) if kind == "init_hidden" else hidden
            torch.testing.assert_close(decoded[row, hour], expected, atol=1e-6, rtol=1e-5)


def test_the_sum_over_features_is_the_mean_times_their_number():
    batch = stays()
    mean = model_of(MedHMPForStayPreTraining)(**batch).loss
    summed = model_of(MedHMPForStayPreTraining, reconstruction_reduction="sum")(**batch).loss
    torch.testing.assert_close(summed, FEATURES * mean)


def test_hidden_features_are_not_seen_and_reconstructed_all_the_same():
    model, batch = model_of(MedHMPForStayPreTraining).eval(), stays()
    rest = {name: batch[name] for name in ("stay_hours", "demographics")}
    series = HourlySeries.of(FEATURES, **{name: values for name, values in batch.items() if name != "demographics"})
    hidden = torch.zeros(len(HOURS), FEATURES, dtype=torch.bool)
    hidden[:, 2] = hidden[0, 1] = True
    with torch.no_grad():
        found = model(**batch, hidden_features=hidden)
        blind = model(**rest, hourly_values=series.values * ~hidden[:, None])
    torch.testing.assert_close(found.stay_state, blind.stay_state)
    errors = (blind.reconstruction - series.values).square().sum(dim=2)[series.mask]
    torch.testing.assert_close(found.loss, errors.mean() / FEATURES)
    assert not torch.isclose(found.loss, blind.loss)


# Stays of an admission (row 78)


@pytest.mark.parametrize("mode", ["mean", "attention", "concat"])
@torch.no_grad()
def test_stays_are_pooled_as_eq_4_and_its_options_say(mode):
    torch.manual_seed(0)
    pooling = StayPooling(config(stay_pooling=mode, max_stays=2, stay_projection="linear"))
    states, owners = torch.randn(6, 12), torch.tensor([0, 0, 0, 2, 3, 3])
    pooled = pooling(states, owners, 4)
    for admission in range(4):
        mine = states[owners == admission]
        if mode == "concat":
            expected = torch.cat([*mine[-2:], *torch.zeros(max(0, 2 - len(mine)), 12)])
        elif mode == "mean":
            expected = mine.mean(dim=0) if len(mine) else torch.zeros(12)
        else:
            scores = [math.exp(float(pooling.query.weight[0] @ state)) for state in mine]
            expected = sum((s / sum(scores) * state for s, state in zip(scores, mine, strict=True)), torch.zeros(12))
        torch.testing.assert_close(pooled[admission], pooling.projection(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "attention", "concat"])
def test_a_stay_without_hours_is_no_stay_of_its_admission(mode):
    model, batch = model_of(MedHMPModel, stay_pooling=mode), admissions()
    more = batch | {
        "stay_hours": torch.tensor([5, 0, 2, 3, 0]),
        "stay_admissions": torch.tensor([0, 0, 0, 2, 3]),
        "demographics": batch["demographics"][[0, 3, 1, 2, 3]],
    }
    with torch.no_grad():
        expected, actual = model(**batch), model(**more)
    torch.testing.assert_close(actual.admission_state, expected.admission_state, atol=1e-6, rtol=0)
    assert expected.modality_mask[:, 0].tolist() == [True, False, True, False]


# Codes and notes (row 79)


def test_a_set_of_codes_is_a_linear_layer_over_its_indicators():
    torch.manual_seed(0)
    encoder = CodeSetEncoder(DIAGNOSES, 0, 12, 1e-5)
    nn.init.normal_(encoder.embeddings.weight)
    nn.init.normal_(encoder.bias)
    ids = torch.tensor([[3, 5, 3, 0, 9], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    indicators = torch.zeros(3, DIAGNOSES)
    for row, codes in enumerate(ids.tolist()):
        for code in set(codes) - {0}:
            indicators[row, code] = 1
    first = nn.functional.linear(indicators, encoder.embeddings.weight.t(), encoder.bias)
    expected = encoder.dense_norm(encoder.dense(encoder.norm(first).relu())).relu()
    torch.testing.assert_close(encoder(ids), expected)


TEXT = {
    "t5": T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.5),
    "bert": BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
}
NOTES = {
    "note_input_ids": torch.tensor([[3, 4, 5], [6, 7, 0], [8, 0, 0], [0, 0, 0]]),
    "note_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]),
}


def with_tokens() -> dict:
    return {name: value for name, value in (admissions() | MASKS).items() if not name.startswith("note")} | NOTES


@pytest.mark.parametrize("family", TEXT)
def test_a_text_encoder_is_frozen_without_dropout_and_equals_its_precomputed_vectors(family, tmp_path):
    model = model_of(MedHMPForAdmissionPreTraining, note_config=copy.deepcopy(TEXT[family]))
    model.save_pretrained(tmp_path)
    saved, model = model, MedHMPForAdmissionPreTraining.from_pretrained(tmp_path).train()
    encoder, note = model.medhmp.note_encoder, model.medhmp.admission_encoder.note
    for name, weight in saved.named_parameters(remove_duplicate=False):
        assert torch.equal(model.get_parameter(name), weight), name
    model(**with_tokens()).loss.backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in encoder.parameters())
    assert note.projection.weight.grad.abs().sum() > 0
    batch = with_tokens()
    states = encoder(batch["note_input_ids"], attention_mask=batch["note_attention_mask"]).last_hidden_state
    vectors = torch.stack([states[row, :length].mean(dim=0) for row, length in enumerate((3, 2, 1))])
    precomputed = {name: value for name, value in batch.items() if not name.startswith("note")}
    precomputed |= {"note_vectors": torch.cat([vectors, torch.full((1, 8), torch.nan)])}
    precomputed |= {"note_mask": torch.tensor([True, True, True, False])}
    with torch.no_grad():
        expected, actual = model.eval()(**batch), model(**precomputed)
    torch.testing.assert_close(actual.diagnosis_logits, expected.diagnosis_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_a_text_encoder_trains_where_it_is_not_frozen():
    model = model_of(MedHMPModel, note_config=copy.deepcopy(TEXT["bert"]), freeze_note_encoder=False).train()
    model(**with_tokens()).admission_state.square().sum().backward()
    assert model.note_encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0


# Missing modalities (row 80)


@pytest.mark.parametrize("left", list(itertools.product([False, True], repeat=4)), ids=str)
def test_any_modalities_may_be_missing_and_what_is_there_is_all_that_counts(left):
    model, batch = model_of(MedHMPForAdmissionPreTraining), admissions() | MASKS
    parts = (
        ("stay_hours", "feature_ids", "feature_counts", "feature_values", "demographics", "stay_admissions"),
        ("diagnosis_ids", "diagnosis_mask"), ("medication_ids", "medication_mask"), ("note_vectors", "note_mask"),
    )  # fmt: skip
    batch = {name: batch[name] for part, kept in zip(parts, left, strict=True) if kept for name in part}
    if not any(left):
        batch["diagnosis_ids"] = torch.zeros(4, 1, dtype=torch.long)
    if left == (True, False, False, False):
        batch["stay_admissions"] = torch.tensor([0, 0, 2, 3])
    model.train()(**batch).loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
    outputs = model.eval().medhmp(**batch)
    assert outputs.admission_state.isfinite().all()
    (weights,) = outputs.attentions
    absent = ~outputs.modality_mask[:, None, None] & ~torch.eye(4, dtype=torch.bool)
    assert weights.masked_select(absent.expand_as(weights)).abs().sum() == 0


def test_what_is_left_out_has_no_part_in_the_fusion():
    model, batch = model_of(MedHMPForAdmissionPreTraining), admissions()
    encoded = model.medhmp.encode(**batch)
    other = encoded.modalities._replace(tokens=encoded.modalities.tokens.clone())
    other.tokens[:, 1] = 100.0
    fuse = model.medhmp.admission_encoder
    assert torch.equal(fuse(encoded.modalities, without=1)[0], fuse(other, without=1)[0])
    assert not torch.equal(fuse(encoded.modalities)[0], fuse(other)[0])


# Masked codes (rows 81 and 83)


def test_masked_code_losses_equal_their_formulas_code_by_code():
    logits = torch.tensor([[0.5, 1.0, -2.0, 0.3, 0.1], [2.0, -1.0, 0.4, 0.0, 1.5]])
    ids = torch.tensor([[1, 3, 0], [2, 2, 4]])
    mask = torch.tensor([[True, False, True], [True, False, True]])  # 2 stands twice, once in sight
    codes = MaskedCodes.of(ids, mask, 5, 0)
    assert [row.nonzero().flatten().tolist() for row in codes.hidden] == [[1], [4]]
    assert [row.nonzero().flatten().tolist() for row in codes.visible] == [[3], [2]]
    p = logits.sigmoid().double()
    for row, (hidden, seen) in enumerate([(1, 3), (4, 2)]):
        absent = [code for code in (1, 2, 3, 4) if code not in (hidden, seen)]
        bce = -3 * p[row, hidden].log() - sum((1 - p[row, code]).log() for code in absent)
        indicator = (p[row, hidden] - 1) ** 2 + sum(p[row, code] ** 2 for code in [*absent, seen])
        for kind, expected, cells in (("bce", bce, 3), ("mse_indicator", indicator, 4)):
            weight = 3.0 if kind == "bce" else None
            total = masked_code_losses(logits, codes, 0, kind, "sum", weight)[row]
            mean = masked_code_losses(logits, codes, 0, kind, "mean", weight)[row]
            torch.testing.assert_close([total, mean], [expected.float(), (expected / cells).float()])
        only = masked_code_losses(logits, codes, 0, "mse_masked")[row]
        torch.testing.assert_close(only, ((p[row, hidden] - 1) ** 2).float())


def test_visible_codes_and_padding_do_not_move_the_loss():
    logits = torch.zeros(1, 5, requires_grad=True)
    codes = MaskedCodes.of(torch.tensor([[1, 3]]), torch.tensor([[True, False]]), 5, 0)
    masked_code_losses(logits, codes, 0).sum().backward()
    assert (logits.grad[0] != 0).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_the_weighted_sum_of_its_parts_over_admissions_that_have_codes(reduction):
    batch = admissions() | MASKS
    fields = {"masked_code_reduction": reduction, "masked_code_weight": 2.0, "contrastive_weight": 0.25}
    outputs = model_of(MedHMPForAdmissionPreTraining, **fields)(**batch)
    both = []
    for logits, kind in ((outputs.diagnosis_logits, "diagnosis"), (outputs.medication_logits, "medication")):
        ids = batch[f"{kind}_ids"]
        codes = MaskedCodes.of(ids, MASKS[f"{kind}_mask"], logits.shape[1], 0)
        both.append(masked_code_losses(logits, codes, 0, "bce", reduction)[(ids > 0).any(dim=1)].mean())
    expected = sum(both) / (2 if reduction == "mean" else 1)
    torch.testing.assert_close(outputs.masked_code_loss, expected)
    torch.testing.assert_close(outputs.loss, 2 * expected + 0.25 * outputs.contrastive_loss)


@pytest.mark.parametrize("mode", ["joint", "separate"])
def test_hidden_codes_are_not_seen_and_the_other_kind_is_hidden_with_them_only_if_joint(mode):
    model, batch = model_of(MedHMPForAdmissionPreTraining, masked_code_mode=mode), admissions() | MASKS
    first = model(**batch)
    other = batch | {
        "diagnosis_ids": batch["diagnosis_ids"].clone(),
        "medication_ids": batch["medication_ids"].clone(),
    }
    other["diagnosis_ids"][0, 0] = 12  # hidden
    other["medication_ids"][1, 1] = 7  # hidden
    second = model(**other)
    changed = [
        ((after - before).abs().amax(dim=1) > 1e-6).tolist()
        for before, after in ((first.diagnosis_logits, second.diagnosis_logits),
                              (first.medication_logits, second.medication_logits))
    ]  # fmt: skip
    # Separate: the medications of admission 1 are in sight where its diagnoses are hidden, and the other way round.
    expected = [[False] * 4] * 2 if mode == "joint" else [[False, True, False, False], [True, False, False, False]]
    assert changed == expected


def test_a_weight_of_0_leaves_a_loss_out_exactly():
    batch = admissions() | MASKS
    both = model_of(MedHMPForAdmissionPreTraining)(**batch)
    masked = model_of(MedHMPForAdmissionPreTraining, contrastive_weight=0)(**batch)
    contrast = model_of(MedHMPForAdmissionPreTraining, masked_code_weight=0, contrastive_weight=1)(**batch)
    assert masked.contrastive_loss is None
    assert contrast.masked_code_loss is None
    assert torch.equal(masked.loss, both.masked_code_loss)
    assert torch.equal(contrast.loss, both.contrastive_loss)


def test_training_without_masks_is_refused_and_evaluation_has_the_contrastive_loss_alone():
    model, batch = model_of(MedHMPForAdmissionPreTraining), admissions()
    assert model(**batch).masked_code_loss is None
    with pytest.raises(ValueError, match="diagnosis_mask"):
        model.train()(**batch)
    with pytest.raises(ValueError, match="medication_mask"):
        model(**batch, diagnosis_mask=MASKS["diagnosis_mask"])


def test_it_learns_which_code_goes_with_which():
    """Code k and k + 6 always come together: the hidden one of a pair is found among the first of 13."""
    pairs = torch.arange(1, 7)[torch.randint(0, 6, (64,), generator=torch.Generator().manual_seed(0))]
    ids = torch.stack([pairs, pairs + 6], dim=1)
    mask = torch.stack([torch.arange(64) % 2 == 0, torch.arange(64) % 2 == 1], dim=1)
    model = model_of(MedHMPForAdmissionPreTraining, contrastive_weight=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        outputs = model(diagnosis_ids=ids, diagnosis_mask=mask)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = outputs.diagnosis_logits.detach().scatter(1, ids[~mask][:, None], -torch.inf)
    assert (scores[:, 1:].argmax(dim=1) + 1 == ids[mask]).float().mean() > 0.9


# Contrastive loss (row 82)


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_contrastive_loss_of_two_admissions_equals_its_closed_form(decoupled):
    torch.manual_seed(0)
    views, fused = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    there = torch.ones(2, 3, dtype=torch.bool)
    loss = contrastive_loss(ContrastiveViews(views, fused, there, there), 0.5, decoupled)
    terms = []
    for r, i in itertools.product(range(3), range(2)):
        own, other = (float(torch.cosine_similarity(views[i, r], fused[j, r], dim=0)) / 0.5 for j in (i, 1 - i))
        terms.append(other - own if decoupled else math.log(1 + math.exp(other - own)))
    assert loss.item() == pytest.approx(sum(terms) / 6, abs=1e-6)


def test_missing_modalities_are_no_anchors_and_empty_rests_no_keys(monkeypatch):
    torch.manual_seed(0)
    views, fused = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    anchors, keys = torch.rand(5, 3) < 0.5, torch.rand(5, 3) < 0.7
    anchors &= keys
    for decoupled in (False, True):
        total, number = 0.0, 0
        for r in range(3):
            for i in anchors[:, r].nonzero().flatten().tolist():
                scores = torch.cosine_similarity(views[i, r], fused[:, r], dim=1) / 0.1
                rivals = [j for j in keys[:, r].nonzero().flatten().tolist() if not (decoupled and j == i)]
                if rivals:
                    total += float(scores[rivals].logsumexp(0) - scores[i])
                    number += 1
        for budget in (2**24, 4):  # at once, and row by row
            monkeypatch.setattr("hf_ehr.models.modeling_contrastive.SIMILARITY_BUDGET", budget)
            loss = contrastive_loss(ContrastiveViews(views, fused, anchors, keys), 0.1, decoupled)
            assert loss.item() == pytest.approx(total / number, rel=1e-5)


def test_stays_are_never_an_anchor_and_nothing_is_compared_with_itself():
    model, batch = model_of(MedHMPForAdmissionPreTraining), admissions()
    encoded = model.medhmp.encode(**batch)
    found = model.contrastive_views(encoded)
    assert torch.equal(found.views, encoded.modalities.tokens[:, 1:])
    # Diagnoses, medications, notes of: all there; no stay; no medication; medications alone.
    assert found.anchors.tolist() == [[True] * 3, [True] * 3, [True, False, True], [False, False, False]]
    assert found.keys.tolist() == [[True] * 3, [True] * 3, [True] * 3, [True, False, True]]


def test_a_modality_has_no_part_in_the_fusion_that_it_is_compared_with():
    model, batch = model_of(MedHMPForAdmissionPreTraining), admissions()
    before = model.contrastive_views(model.medhmp.encode(**batch)).fused[0]
    for column, name in enumerate(("diagnosis_ids", "medication_ids", "note_vectors")):
        other = batch | {name: batch[name].clone()}
        other[name][0] = other[name][0].flip(0) + 1
        moved = model.contrastive_views(model.medhmp.encode(**other)).fused[0] - before
        assert (moved.abs().amax(dim=1) == 0).tolist() == [place == column for place in range(3)]


def test_an_admission_alone_has_no_contrast_and_a_finite_loss():
    alone = one_admission(admissions() | MASKS, 0)
    for kind in ("infonce", "decoupled"):
        model = model_of(MedHMPForAdmissionPreTraining, contrastive_loss=kind).train()
        outputs = model(**alone)
        assert outputs.contrastive_loss.item() == pytest.approx(0, abs=1e-6)
        outputs.loss.backward()


# Bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"demographics": None}, "demographics"), ({"demographics": torch.zeros(4, 3)}, "demographics"),
    ({"stay_hours": torch.tensor([13, 2, 3, 0])}, "feature_counts|n_hours"),
    ({"stay_admissions": torch.tensor([0, 2, 0, 3])}, "stay_admissions"),
    ({"stay_admissions": torch.tensor([0, 0, 2, 4])}, "stay_admissions"),
    ({"medication_ids": torch.zeros(3, 2, dtype=torch.long)}, "as many rows"),
    ({"note_vectors": torch.zeros(4, 5)}, "note_size"),
    ({"note_vectors": None, "note_mask": None, **NOTES}, "note_input_ids"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model_of(MedHMPModel)(**(admissions() | change))


def test_a_model_without_notes_refuses_them():
    model = model_of(MedHMPModel, note_size=None)
    batch = admissions()
    with pytest.raises(ValueError, match="note_size"):
        model(**batch)
    del batch["note_vectors"], batch["note_mask"]
    assert model(**batch).modality_mask[:, 3].tolist() == [False] * 4


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_size": 10, "num_attention_heads": 4}, "num_attention_heads"), ({"max_stays": 0}, "max_stays"),
    ({"diagnosis_vocab_size": 3, "diagnosis_pad_token_id": 3}, "diagnosis_pad_token_id"),
    ({"contrastive_temperature": 0}, "contrastive_temperature"), ({"contrastive_weight": -1}, "contrastive_weight"),
    ({"masked_code_loss": "mse_masked", "masked_code_pos_weight": 2.0}, "masked_code_pos_weight"),
    ({"stay_pooling": "max"}, "stay_pooling"),
])  # fmt: skip
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        config(**fields)
