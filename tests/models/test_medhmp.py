"""MedHMP: the common suite, and what is its own (papers.md §4, acceptance rows 76 to 85 and 104)."""


import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification

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
        """To a tenth of where it starts: hours differ between stays, so that one guess for all does not get there."""
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        # The contrastive loss of missing modalities is not 0 at its least, and values beyond 1 are not in reach.
        fields = {"contrastive_weight": 0.0} if "Admission" in head.model_class.__name__ else {}
        model, batch = self.model(head, **fields).train(), self.batch(head)
        if head.overrides.get("decoder") == "first_input":
            del batch["feature_values"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        first = model(**batch).loss.item()
        for _ in range(200):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < 0.1 * first

    def test_the_batch_is_not_mutated(self, head):
        super().test_the_batch_is_not_mutated(head)


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
