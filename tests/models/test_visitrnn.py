"""The recurrent recommender: the common suite, its formula, and that it reads nothing it must not (row 44)."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_ehr import VisitRnnConfig, VisitRnnForMedicationRecommendation, VisitRnnModel
from tests.models.common import Head
from tests.models.visits import (
    DIAGNOSES,
    MEDICATIONS,
    NUM_DRUGS,
    VisitSuite,
    recommendation_labels,
    recommendation_loss,
    visits,
)


class TestVisitRnn(VisitSuite):
    heads = [  # noqa: RUF012
        Head(VisitRnnModel, AutoModel, "visit_state", per_code=False),
        Head(
            VisitRnnForMedicationRecommendation, AutoModelForSequenceClassification, "logits", False,
            recommendation_labels, recommendation_loss,
        ),
    ]  # fmt: skip
    base_class = VisitRnnModel
    fixture = "visitrnn"
    lora_targets = ["diagnosis_embeddings"]  # noqa: RUF012
    no_dropout = {"hidden_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"hidden_size": 8}  # noqa: RUF012
    test_hidden_states_and_attentions_are_there_on_request = None
    test_gradient_checkpointing_gives_the_same_gradients = None

    def config(self, **overrides):
        drugs = {"id2label": dict(enumerate(MEDICATIONS)), "label2id": {name: n for n, name in enumerate(MEDICATIONS)}}
        sizes = {"diagnosis_vocab_size": len(DIAGNOSES) + 5, "medication_vocab_size": NUM_DRUGS + 5}
        sizes |= {"hidden_size": 16, "initializer_range": 0.3, "problem_type": "multi_label_classification"}
        return VisitRnnConfig(**(drugs | sizes | overrides))

    def padded(self, seed: int = 0, **kwargs):
        return {name: value for name, value in visits(seed).items() if "note" not in name}

    def batch(self, head, **kwargs):
        return self.padded() | (head.labels(visits()))


def recommender() -> VisitRnnForMedicationRecommendation:
    return TestVisitRnn().model(TestVisitRnn.heads[1])


def step(gru: nn.GRU, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Equations of a GRU, one step."""
    i, s = (x @ gru.weight_ih_l0.T + gru.bias_ih_l0).chunk(3), (h @ gru.weight_hh_l0.T + gru.bias_hh_l0).chunk(3)
    reset, update = (i[0] + s[0]).sigmoid(), (i[1] + s[1]).sigmoid()
    return (1 - update) * (i[2] + reset * s[2]).tanh() + update * h


@torch.no_grad()
def test_it_equals_its_formula_visit_by_visit():
    model, batch = recommender(), TestVisitRnn().padded()
    base, logits = model.model, model(**batch).logits
    for patient in range(4):
        state = torch.zeros(16)
        for t in range(3):
            ids = [batch[f"{kind}_ids"][patient, t] for kind in ("diagnosis", "medication")]
            tables = (base.diagnosis_embeddings.weight, base.medication_embeddings.weight)
            own, drugs = (table[i[i > 0]].sum(dim=0) for table, i in zip(tables, ids, strict=True))
            expected = model.classifier(step(base.gru, own, state))
            torch.testing.assert_close(logits[patient, t], expected, atol=1e-5, rtol=1e-5)
            if any((i > 0).any() for i in ids):  # a visit without a code is no step
                state = step(base.gru, own + drugs, state)


@pytest.mark.parametrize("visit", [0, 1, 2])
@torch.no_grad()
def test_a_visit_is_scored_without_its_medications_and_without_later_visits(visit):
    model, batch, fresh = recommender(), TestVisitRnn().padded(), visits(seed=11)
    before = model(**batch).logits
    other = {name: value.clone() for name, value in batch.items()}
    other["medication_ids"][:, visit:] = fresh["medication_ids"][:, visit:]
    other["diagnosis_ids"][:, visit + 1 :] = fresh["diagnosis_ids"][:, visit + 1 :]
    after = model(**other).logits
    torch.testing.assert_close(after[:, : visit + 1], before[:, : visit + 1], atol=1e-6, rtol=0)
    if visit < 2:
        assert (after[:, visit + 1] - before[:, visit + 1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_visits_medications_are_read_by_the_next():
    model, batch = recommender(), TestVisitRnn().padded()
    other = {name: value.clone() for name, value in batch.items()}
    other["medication_ids"][:, 0] = torch.tensor([10, 5, 9])
    assert (model(**other).logits[:, 1] - model(**batch).logits[:, 1]).abs().amax(dim=1)[1:].max() > 1e-3


@torch.no_grad()
def test_the_order_of_codes_does_not_matter_and_an_empty_batch_of_visits_is_scored():
    model, batch = recommender(), TestVisitRnn().padded()
    shuffled = model(batch["diagnosis_ids"][..., [3, 1, 4, 0, 2]], batch["medication_ids"].flip(2)).logits
    torch.testing.assert_close(shuffled, model(**batch).logits, atol=1e-6, rtol=0)
    empty = {name: torch.zeros_like(value) for name, value in batch.items()}
    assert model(**empty).logits.isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch and visits"):
        recommender()(torch.ones(2, 3, 1, dtype=torch.long), torch.ones(2, 2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="labels"):
        recommender()(**TestVisitRnn().padded(), labels=torch.zeros(4, NUM_DRUGS))
    with pytest.raises(Exception, match="pad_token_id"):
        VisitRnnConfig(pad_token_id=200)
