"""What the families that read visits of codes and notes share: a batch, and the common suite over it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.common import FamilySuite, Head

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DIAGNOSES = [
    *("ICD9CM/250.00", "ICD9CM/250.02", "ICD9CM/250", "ICD9CM/251.2", "ICD9CM/428.0", "ICD9CM/042", "ICD9CM/E812.0"),
    *("ICD10CM/E11.65", "ICD10CM/E11.9", "ICD10CM/I10", "LOCAL/1"),
]
MEDICATIONS = ["ATC/C07A", "ATC/C07AB02", "ATC/A10B", "ATC/A10BA", "ATC/B01A", "NDC/1"]
NUM_DRUGS = len(MEDICATIONS)


def visits(seed: int = 0, patients: int = 4) -> dict[str, torch.Tensor]:
    """Patients of up to three visits: codes and notes differ in number, and any of them may be missing."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for size, width, least in ((len(DIAGNOSES), 5, 0), (NUM_DRUGS, 3, 0), (25, 6, 2)):
        ids = torch.rand(patients, 3, size, generator=generator).argsort(dim=2)[..., :width] + len(SPECIAL)
        counts = torch.randint(least, width + 1, (patients, 3, 1), generator=generator)
        counts[:, 0] = width  # the first visit of every patient has everything
        sets.append(ids * (torch.arange(width) < counts))
    for ids in sets:
        ids[1, 2] = 0  # the second patient has two visits
    sets[2][0, 1] = 0  # a visit without a note
    sets[0][2, 1] = 0  # one without diagnoses
    return {
        "diagnosis_ids": sets[0],
        "medication_ids": sets[1],
        "note_input_ids": sets[2],
        "note_attention_mask": (sets[2] > 0).long(),
    }


def masked(batch: dict) -> dict:
    """The same with labels: the first code of each set hidden, the second replaced, where there are any."""
    batch = batch | {name: batch[name].clone() for name in ("diagnosis_ids", "medication_ids")}
    for kind, count in (("diagnosis", len(DIAGNOSES)), ("medication", NUM_DRUGS)):
        ids = batch[f"{kind}_ids"]
        labels = torch.full_like(ids, -100)
        labels[..., :2] = ids[..., :2].masked_fill(ids[..., :2] == 0, -100)
        ids[..., 0] = ids[..., 0].masked_fill(ids[..., 0] > 0, 4)
        ids[..., 1] = torch.where(ids[..., 1] > 0, (ids[..., 1] - 5 + 1) % count + 5, 0)
        batch[f"{kind}_labels"] = labels
    return batch


def recommendation_labels(batch: dict) -> dict:
    """The visits' own medications; -100 for visits without any code."""
    ids = batch["medication_ids"]
    labels = torch.zeros(*ids.shape[:2], NUM_DRUGS + 5).scatter(2, ids, 1.0)[..., 5:]
    there = (ids > 0).any(dim=2) | (batch["diagnosis_ids"] > 0).any(dim=2)
    return {"labels": labels.masked_fill(~there[..., None], -100.0)}


def recommendation_loss(outputs, batch):
    """Patient by patient, visit by visit from the second on."""
    patients = []
    for logits, labels in zip(outputs.logits, batch["labels"], strict=True):
        rows = [t for t in range(1, len(labels)) if labels[t, 0] >= 0]
        p = logits.sigmoid()
        losses = [-(labels[t] * p[t].log() + (1 - labels[t]) * (1 - p[t]).log()).mean() for t in rows]
        patients += [torch.stack(losses).mean()] if losses else []
    return torch.stack(patients).mean()


def prediction_loss(outputs, batch, mode: str) -> torch.Tensor:
    """All losses of pre-training, set by set and code by code."""
    shown = {kind: batch[f"{kind}_ids"].flatten(0, 1) for kind in ("diagnosis", "medication")}
    sources = [ids > 0 for ids in shown.values()] + [batch["note_attention_mask"].flatten(0, 1) > 0]
    total = torch.zeros(())
    for kind, size in (("diagnosis", len(DIAGNOSES)), ("medication", NUM_DRUGS)):
        labels = batch[f"{kind}_labels"].flatten(0, 1)
        scores = outputs[f"{kind}_logits"].flatten(0, 1)
        for source in range(scores.shape[1]):
            losses = []
            for row in range(len(scores)):
                hidden = {int(code) - 5 for code in labels[row] if code > 4}
                pairs = zip(shown[kind][row], labels[row], strict=True)
                visible = {int(code) - 5 for code, label in pairs if code > 4 and label == -100}
                positive = hidden | visible if mode == "visit_bce" else hidden - visible
                counted = [code for code in range(size) if mode == "visit_bce" or code not in visible]
                if not positive or not sources[source][row].any():
                    continue
                p = scores[row, source].sigmoid()
                cells = [-(p[code] if code in positive else 1 - p[code]).log() for code in counted]
                losses.append(torch.stack(cells).mean())
            total = total + torch.stack(losses).mean()
    return total


class VisitSuite(FamilySuite):
    """The common suite for inputs (batch, visits, codes)."""

    base_class: type
    lora_targets = ["qkv"]  # noqa: RUF012

    # What follows is about codes in a row: packed input, token embeddings and their decoder.
    test_packed_equals_padded = None
    test_packed_and_padded_training_give_one_loss_and_one_gradient = None
    test_changing_one_packed_patient_leaves_the_others_bit_equal = None
    test_token_embeddings_can_be_resized = None
    test_untied_weights_survive_a_round_trip = None

    def padded(self, seed: int = 0, **kwargs):
        return visits(seed)

    def code_config(self, config):
        return getattr(config, "code_config", config)

    def test_extra_padding_changes_nothing(self, head):
        model, batch = self.model(head), self.inputs(head)
        wide = {name: nn.functional.pad(value, (0, 3, 0, 2)) for name, value in batch.items()}
        expected, actual = self.output(head, model, batch), self.output(head, model, wide)
        torch.testing.assert_close(actual[:, :3], expected, atol=1e-6, rtol=0)

    def test_a_batch_equals_its_patients_one_by_one(self, head):
        model, batch = self.model(head), visits(seed=5, patients=8)
        batch = {name: value for name, value in batch.items() if name in self.inputs(head)}
        together = self.output(head, model, batch)
        for row in range(8):
            alone = self.output(head, model, {name: value[row : row + 1] for name, value in batch.items()})
            torch.testing.assert_close(alone, together[row : row + 1], atol=1e-6, rtol=0)

    def test_changing_one_patient_leaves_the_others_as_they_are(self, head):
        model, batch = self.model(head), self.inputs(head)
        other = self.padded(seed=7)
        changed = {name: torch.cat([value[:1], other[name][1:2], value[2:]]) for name, value in batch.items()}
        before, after = self.output(head, model, batch), self.output(head, model, changed)
        # As many sets as there are lie in a product of matrices, which may flip the last bit.
        torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], atol=1e-6, rtol=0)
        assert (before[1] - after[1]).abs().max() > 1e-4

    def test_every_parameter_receives_a_gradient(self, head):
        model, batch = self.model(head).train(), self.batch(head)
        outputs = model(**batch)
        tensors = [value for name, value in outputs.items() if "state" in name and torch.is_tensor(value)]
        loss = outputs.loss if head.hand_loss else torch.stack([value.square().sum() for value in tensors]).sum()
        loss.backward()
        named = dict(model.named_parameters())
        assert not [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()]
        # A bias of keys moves all scores alike, and a softmax takes it away.
        assert not [n for n, p in named.items() if not p.grad.abs().sum() and not n.endswith(("key.bias", "key_bias"))]

    def test_gradient_checkpointing_gives_the_same_gradients(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        gradients = []
        for checkpointing in (False, True):
            model = self.model(head).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(**self.batch(head)).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)

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
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), self.batch(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
        first = model(**batch).loss.item()
        for _ in range(40):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # Sets without medications, or equal ones with others, cannot be told apart: the least loss is not 0.
        assert loss.item() < 0.4 * first

    def test_hidden_states_and_attentions_are_there_on_request(self, head):
        model, batch = self.model(head), self.inputs(head)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(**batch, output_attentions=True, output_hidden_states=True)
        ids = [nn.functional.pad(v.flatten(0, 1), (0, 5 - v.shape[2])) for n, v in batch.items() if "note" not in n]
        codes = torch.cat(ids) > 0
        codes = codes[codes.any(dim=1)]
        config = self.code_config(model.config)
        assert len(outputs.hidden_states) == config.num_hidden_layers + 1
        assert [len(states) for states in outputs.hidden_states] == [len(codes)] * len(outputs.hidden_states)
        width = outputs.attentions[0].shape[-1]
        for weights in outputs.attentions:
            assert weights.shape == (len(codes), config.num_attention_heads, width, width)
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
            assert weights[..., 0].abs().max() == 0  # nobody looks at [CLS]
            assert weights[..., 1:].sum(dim=(1, 2))[~codes[:, : width - 1]].abs().max() == 0

    def test_a_base_checkpoint_fills_the_head_but_for_its_own_parameters(self, head, tmp_path):
        base = self.model(Head(self.base_class, None, "", False, overrides=head.overrides))
        base.save_pretrained(tmp_path)
        loaded, info = head.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not [key for key in info["missing_keys"] if "encoder" in key or "embeddings" in key or "cross" in key]
        mine = dict(getattr(loaded, loaded.base_model_prefix, loaded).named_parameters())
        for name, weight in base.named_parameters():
            assert ("diagnosis" in name and name not in mine) or torch.equal(mine[name], weight), name
        assert all(p.isfinite().all() for p in loaded.parameters())
