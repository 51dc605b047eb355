"""BEHRT as options of Med-BERT: the common suite on its preset, and its embeddings by hand (acceptance row 26)."""

from dataclasses import replace
from math import cos, sin

import pytest
import torch

from hf_ehr import MedBertConfig, MedBertForMaskedLM, MedBertModel
from hf_ehr.models.modeling_medbert_embeddings import sinusoids
from tests.models.common import FamilySuite, pack, padded_batch
from tests.models.test_medbert import HEADS

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # beside sinusoids of order 1, codes drawn at 0.02 are hardly seen for many steps
}  # fmt: skip


def with_ages(batch: dict) -> dict:
    """Every patient one year older at each visit; the second patient's ages are unknown."""
    ages = batch["visit_ids"] + torch.tensor([[40], [0], [70]])
    ages[1] = 0
    return batch | {"age_ids": ages * batch["attention_mask"]}


class TestBehrt(FamilySuite):
    heads = [  # noqa: RUF012
        # Only the classifier reads the layer behind [CLS]; elsewhere it would stay without a gradient.
        *(replace(HEADS[index], overrides={"pooling": "mean"}) for index in (0, 1)),
        HEADS[-1],
    ]
    fixture = "behrt"
    lora_targets = ["qkv"]  # noqa: RUF012
    test_it_loads_without_the_package = None  # the files are Med-BERT's

    def config(self, **overrides):
        return MedBertConfig.behrt(**(SMALL | overrides))

    def batch(self, head, **kwargs):
        return with_ages(super().batch(head, **kwargs))

    def inputs(self, head, **kwargs):
        return with_ages(super().inputs(head, **kwargs))


def model(**overrides) -> MedBertModel:
    torch.manual_seed(0)
    return MedBertModel(MedBertConfig.behrt(**(SMALL | overrides))).eval()


def test_the_preset_is_the_shape_of_the_authors_notebook_without_tables_of_visits_and_positions():
    config = MedBertConfig.behrt(vocab_size=50)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (288, 6, 12)
    assert (config.intermediate_size, config.hidden_act, config.stay_loss_weight) == (512, "gelu", 0)
    assert config.attention_probs_dropout_prob == 0.1
    names = {name: tuple(p.shape) for name, p in model().embeddings.named_parameters()}
    assert names == {
        "code_embeddings.weight": (50, 16), "visit_embeddings.weight": (2, 16), "age_embeddings.weight": (122, 16),
        "norm.weight": (16,), "norm.bias": (16,),
    }  # fmt: skip


def test_the_embedding_of_a_code_is_the_sum_written_by_hand():
    encoder = model()
    codes, visits = torch.tensor([[2, 7, 3, 8, 9, 3, 7, 3]]), torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3]])
    ages = torch.tensor([[61, 61, 61, 0, 0, 0, 63, 63]])
    tables = encoder.embeddings
    rows = [
        tables.code_embeddings.weight[code]
        + tables.visit_embeddings.weight[segment]
        + tables.age_embeddings.weight[age]
        + sinusoids(torch.tensor(place), 16)
        for code, segment, age, place in zip(
            codes[0], [0, 0, 0, 1, 1, 1, 0, 0], ages[0], [0, 0, 0, 1, 1, 1, 2, 2], strict=True
        )
    ]
    rows = torch.stack(rows)
    expected = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
    with torch.no_grad():
        seen = encoder(codes, visit_ids=visits, age_ids=ages, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_sinusoids_are_the_transformers():
    expected = [
        [0, 1, 0, 1],
        [sin(1), cos(1), sin(0.01), cos(0.01)],
        [sin(7), cos(7), sin(0.07), cos(0.07)],
    ]
    torch.testing.assert_close(sinusoids(torch.tensor([0, 1, 7]), 4), torch.tensor(expected))
    assert sinusoids(torch.zeros(2, 3), 5).shape == (2, 3, 5)


def test_old_ages_share_a_row_and_no_ages_are_unknown_ages():
    encoder, batch = model(max_age=90), padded_batch(50)
    with torch.no_grad():
        outputs = [
            encoder(**batch, age_ids=None if age is None else torch.full_like(batch["input_ids"], age)).pooler_output
            for age in (91, 300, None, 0, 90)
        ]
    ninety, three_hundred, missing, unknown, eighty_nine = outputs
    assert torch.equal(ninety, three_hundred)
    assert torch.equal(missing, unknown)
    assert not torch.allclose(eighty_nine, unknown, atol=1e-3)
    assert not torch.allclose(eighty_nine, ninety, atol=1e-3)


def test_the_order_of_codes_within_a_visit_does_not_matter_but_that_of_visits_does():
    encoder = model()
    codes, visits = torch.tensor([[2, 7, 8, 3, 9, 3]]), torch.tensor([[1, 1, 1, 1, 2, 2]])
    within, between = torch.tensor([0, 2, 1, 3, 4, 5]), torch.tensor([0, 4, 2, 3, 1, 5])
    with torch.no_grad():
        plain, swapped, moved = (
            encoder(codes[:, order], visit_ids=visits).pooler_output for order in (torch.arange(6), within, between)
        )
    torch.testing.assert_close(swapped, plain, atol=1e-6, rtol=0)
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_a_model_without_ages_does_not_read_them():
    torch.manual_seed(0)
    medbert, batch = MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=50)).eval(), padded_batch(50)
    with torch.no_grad():
        plain, with_them = medbert(**batch).logits, medbert(**with_ages(batch)).logits
        packed = medbert(**pack(with_ages(batch))).logits
    assert torch.equal(plain, with_them)
    torch.testing.assert_close(packed[0], plain[batch["attention_mask"].bool()], atol=1e-5, rtol=0)


def test_an_age_below_zero_is_no_greatest_age():
    with pytest.raises(Exception, match="`max_age` must be at least 0 or None, got -1"):
        MedBertConfig(max_age=-1)
