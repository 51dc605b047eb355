"""The sequence heads by themselves and on Med-BERT (papers.md §1.4 and §1.5, acceptance rows 11 and 12)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ehr import MedBertConfig, MedBertForSequenceClassification, MedBertModel
from hf_ehr.models.modeling_ehr import PackedSequences
from hf_ehr.models.modeling_heads import RetainHead, new_head
from hf_ehr.models.modeling_steps import Steps, TimeMajor, fused, stepwise
from tests.models.common import LENGTHS, pack, padded_batch

HEADS = ("gru", "bigru", "retain", "lstm", "dipole", "adacare", "hitanet")
WEIGHING = ("retain", "lstm", "dipole", "adacare", "hitanet")
"""The heads that say what each step weighs; all but Dipole also what each step adds to a logit."""


def states_of(lengths=LENGTHS, *, features=6, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random padded states and their mask; what lies in the padding is large."""
    torch.manual_seed(seed)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    states = torch.randn(*mask.shape, features)
    return torch.where(mask[..., None] == 1, states, 100.0), mask


def days_of(mask: torch.Tensor) -> torch.Tensor:
    """1 + days since the first visit: gaps of 30, 60, 90, … days, and in the padding what must not be read."""
    gaps = 30 * torch.arange(mask.shape[1])
    return torch.where(mask == 1, 1 + gaps.cumsum(0).expand_as(mask), 10**6)


def padded(states: torch.Tensor, mask: torch.Tensor | None = None) -> Steps:
    """Steps with days, of padded states."""
    mask = torch.ones(states.shape[:2], dtype=torch.long) if mask is None else mask
    return Steps.of(states, mask, day_ids=days_of(mask))


def head_of(name: str, *, features=6, hidden=4, **options) -> nn.Module:
    torch.manual_seed(1)
    return new_head(name, features, hidden, **options).eval()


def with_days(batch: dict) -> dict:
    """A batch with the days of its visits, 0 in the padding."""
    return batch | {"day_ids": (batch["visit_ids"] * 40 - 39) * batch["attention_mask"]}


def timed_batch() -> dict:
    return with_days(padded_batch(50))


def borders(lengths) -> PackedSequences:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSequences.from_cu_seqlens(cu_seqlens, int(sum(lengths)))


def medbert(head: str, **overrides) -> MedBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_visits": 20}
    options = {"hidden_dropout_prob": 0.0, "head": head, "head_hidden_size": 8}
    return MedBertForSequenceClassification(MedBertConfig.tiny(**(sizes | options | overrides))).eval()


# Against formulas written out


def gru_by_hand(gru: nn.GRU, steps: torch.Tensor) -> torch.Tensor:
    """Cho et al. 2014 in PyTorch's order of gates, one step after the other: (steps, input) → (steps, hidden)."""
    weights = {name: getattr(gru, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    state, states = torch.zeros(gru.hidden_size), []
    for step in steps:
        from_input = (weights["weight_ih"] @ step + weights["bias_ih"]).chunk(3)
        from_state = (weights["weight_hh"] @ state + weights["bias_hh"]).chunk(3)
        reset, update = (torch.sigmoid(a + b) for a, b in zip(from_input[:2], from_state[:2], strict=True))
        candidate = torch.tanh(from_input[2] + reset * from_state[2])
        state = (1 - update) * candidate + update * state
        states.append(state)
    return torch.stack(states)


def retain_by_hand(head: RetainHead, visits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Section 2.2 of the paper for one patient v_1 … v_n, (n, input) → c, α, β."""
    g = gru_by_hand(head.alpha_gru, visits.flip(0)).flip(0)
    h = gru_by_hand(head.beta_gru, visits.flip(0)).flip(0)
    e = torch.stack([head.alpha.weight[0] @ state for state in g])
    alpha = e.exp() / e.exp().sum()
    beta = torch.stack([torch.tanh(head.beta.weight @ state + head.beta.bias) for state in h])
    c = sum(a * b * v for a, b, v in zip(alpha, beta, visits, strict=True))
    return c, alpha, beta


def test_gru_ends_in_the_state_after_the_last_valid_step_by_hand():
    head, (states, mask) = head_of("gru"), states_of()
    output = head(padded(states, mask))
    expected = torch.stack([gru_by_hand(head.gru, states[row, :n])[-1] for row, n in enumerate(LENGTHS)])
    torch.testing.assert_close(output.features, expected, atol=1e-6, rtol=1e-5)


def test_bigru_reads_the_last_valid_forward_and_the_first_backward_state_by_hand():
    head, (states, mask) = head_of("bigru"), states_of()
    output = head(padded(states, mask))
    for row, length in enumerate(LENGTHS):
        steps = states[row, :length]
        forward = gru_by_hand(head.gru, steps)[-1]
        backward = gru_by_hand(head.reverse_gru, steps.flip(0)).flip(0)[0]
        torch.testing.assert_close(output.features[row], torch.cat([forward, backward]), atol=1e-6, rtol=1e-5)


def test_retain_equals_the_papers_formula_patient_by_patient():
    head, (states, mask) = head_of("retain"), states_of()
    output = head(padded(states, mask))
    attention = output.attention()
    for row, length in enumerate(LENGTHS):
        c, alpha, beta = retain_by_hand(head, states[row, :length])
        torch.testing.assert_close(output.features[row], c, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(attention["head_alpha"][row, :length], alpha, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(attention["head_beta"][row, :length], beta, atol=1e-6, rtol=1e-5)


# What a batch looks like must not matter


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    reverse=st.booleans(), seed=st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_lengths_give_what_each_patient_gives_alone(kind, lengths, reverse, seed):
    torch.manual_seed(seed)
    rnn, states = kind(3, 4), torch.randn(sum(lengths), 3)
    with torch.no_grad():
        outputs, last = TimeMajor.of(borders(lengths), reverse).run(rnn, states)
        for patient, steps in enumerate(states.split(lengths)):
            if not len(steps):
                assert last[patient].abs().max() == 0
                continue
            alone, _ = rnn(steps.flip(0) if reverse else steps)
            mine = outputs[sum(lengths[:patient]) : sum(lengths[: patient + 1])]
            torch.testing.assert_close(mine, alone.flip(0) if reverse else alone, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(last[patient], alone[-1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_the_kernel_of_the_gpu_and_the_steps_of_the_cpu_give_the_same_states_and_gradients(kind):
    torch.manual_seed(0)
    rnn, weights = kind(6, 4), torch.randn(19, 4)
    order = TimeMajor.of(borders(LENGTHS))
    results = []
    for run in (fused, stepwise):
        inputs = torch.linspace(-2, 2, 19 * 6).view(19, 6).requires_grad_()
        states, last = run(rnn, inputs, order.batch_sizes)
        rnn.zero_grad()
        ((states * weights).sum() + last.square().sum()).backward()
        results.append([states, last, inputs.grad, *(p.grad.clone() for p in rnn.parameters())])
    for of_the_kernel, of_the_steps in zip(*results, strict=True):
        torch.testing.assert_close(of_the_steps, of_the_kernel, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_padding_on_either_side_and_packing_give_the_same_vectors(name):
    head, (states, mask) = head_of(name), states_of()
    days = days_of(mask)
    right = head(Steps.of(states, mask, day_ids=days)).features
    rolled, rolled_days = (
        torch.stack([rows[row].roll(10 - n, 0) for row, n in enumerate(LENGTHS)]) for rows in (states, days)
    )
    left = head(Steps.of(rolled, mask.flip(1), day_ids=rolled_days)).features
    valid = mask.bool()
    packed = head(Steps.of(states[valid][None], packed=borders(LENGTHS), day_ids=days[valid][None])).features
    more = {"attention_mask": nn.functional.pad(mask, (0, 5)), "day_ids": nn.functional.pad(days, (0, 5))}
    wide = head(Steps.of(nn.functional.pad(states, (0, 0, 0, 5)), **more)).features
    for other in (left, packed, wide):
        torch.testing.assert_close(other, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_a_patient_without_steps_has_the_zero_vector_and_disturbs_no_one(name):
    head, (states, mask) = head_of(name), states_of()
    states.requires_grad_()
    alone = head(padded(states, mask)).features
    with_empty = head(padded(torch.cat([states[:1], states]), torch.cat([torch.zeros_like(mask[:1]), mask]))).features
    assert with_empty[0].abs().max() == 0
    torch.testing.assert_close(with_empty[1:], alone, atol=1e-6, rtol=0)
    with_empty.sum().backward()
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_every_valid_code_through_the_encoder_and_no_padding(name):
    model, batch = medbert(name).train(), timed_batch()
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embedded, **batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    size, valid = embedded.grad.abs().amax(dim=-1), batch["attention_mask"].bool()
    assert (size[valid] > 0).all()
    assert size[~valid].max() == 0
    assert all(p.grad.abs().sum() > 0 for name, p in model.model.encoder.named_parameters() if "qkv.bias" not in name)


# What the heads say of the steps


@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("name", WEIGHING)
def test_alpha_sums_to_one_over_valid_steps_and_is_zero_on_padding(name, packing):
    batch = timed_batch()
    outputs = medbert(name)(**packing(batch))
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.head_alpha.sum(dim=1), torch.ones(3))
    # A step may hold no maximum; every other weight comes from a softmax.
    assert (outputs.head_alpha[valid] >= (0 if name in ("lstm", "adacare") else 1e-9)).all()
    for field in (outputs.head_alpha, outputs.head_beta, outputs.contributions):
        assert field is None or field[~valid].abs().max() == 0


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [name for name in WEIGHING if name != "dipole"])
def test_contributions_sum_to_the_logits(name, packing, labels):
    model = medbert(name, num_labels=labels, initializer_range=0.5)
    nn.init.normal_(model.classifier.bias)
    outputs = model(**packing(timed_batch()))
    assert outputs.contributions.abs().max() > 0.01
    torch.testing.assert_close(
        outputs.contributions.sum(dim=1) + model.classifier.bias, outputs.logits, atol=1e-5, rtol=0
    )


def test_a_contribution_is_what_the_logit_loses_without_the_step():
    """α_j W (β_j ⊙ v_j): with attention held fast, taking v_j away takes exactly this away."""
    head, (states, mask) = head_of("retain"), states_of()
    classifier, output = nn.Linear(6, 3), head(padded(states, mask))
    contributions = output.contributions(classifier)["contributions"]
    for row, length in enumerate(LENGTHS):
        _, alpha, beta = retain_by_hand(head, states[row, :length])
        without = states[row, :length].clone()
        without[1] = 0
        lost = classifier((alpha[:, None] * beta * states[row, :length]).sum(0)) - classifier(
            (alpha[:, None] * beta * without).sum(0)
        )
        torch.testing.assert_close(contributions[row, 1], lost, atol=1e-5, rtol=0)


def test_reversing_the_states_changes_retains_vector():
    head, (states, _) = head_of("retain"), states_of((5,))
    straight, reversed_ = head(padded(states)), head(padded(states.flip(1)))
    assert (straight.features - reversed_.features).abs().max() > 1e-3


def test_attention_columns_of_left_padded_input_are_those_of_the_codes():
    codes = torch.tensor([[5, 6, 7]])
    plain = medbert("retain")(codes)
    left = medbert("retain")(torch.tensor([[0, 0, 5, 6, 7]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    torch.testing.assert_close(left.head_alpha[:, 2:], plain.head_alpha, atol=1e-6, rtol=0)
    assert left.head_alpha[0, :2].tolist() == [0, 0]


def test_attention_is_returned_in_evaluation_mode_by_the_heads_that_have_it():
    batch, fields = timed_batch(), ("head_alpha", "head_beta", "contributions")
    for name in ("ffn", *HEADS):
        outputs = medbert(name)(**batch)
        expected = [name in WEIGHING, name in ("retain", "adacare"), name in WEIGHING and name != "dipole"]
        assert [getattr(outputs, field) is not None for field in fields] == expected, name
        outputs = medbert(name).train()(**batch)
        assert [getattr(outputs, field) for field in fields] == [None] * 3


@pytest.mark.parametrize("name", WEIGHING)
def test_attention_stays_exact_in_half_precision(name):
    model = medbert(name).bfloat16()
    with torch.no_grad():
        outputs = model(**pack(timed_batch()))
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.head_alpha.dtype == torch.float32
    assert outputs.contributions is None or outputs.contributions.dtype == torch.float32
    torch.testing.assert_close(outputs.head_alpha.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_reads_half_precision_states_in_its_own_precision(name):
    """What an encoder under autocast hands over; a recurrence in half precision would pile up its errors."""
    head, (states, mask) = head_of(name), states_of()
    rounded = states.bfloat16()
    half, full = head(padded(rounded, mask)).states, head(padded(rounded.float(), mask)).states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = head(padded(rounded, mask)).states
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full)
    if name in ("gru", "bigru", "lstm", "dipole"):  # the others read through layers that are no recurrence
        assert under_autocast.dtype == torch.float32
        torch.testing.assert_close(under_autocast, full)


# The model around the head


@pytest.mark.parametrize("name", ["gru", "retain"])
def test_prediction_returns_plain_logits(name, tmp_path):
    batch = padded_batch(50)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    predictions = Trainer(medbert(name), arguments).predict(rows).predictions
    torch.testing.assert_close(torch.from_numpy(predictions), medbert(name)(**batch).logits.detach())


def test_the_classifier_is_the_last_layer_and_reads_the_pooler_output():
    """A probe fitted on `pooler_output` can be written into `classifier`, whatever the head."""
    widths = {"ffn": 16, "bigru": 16, "retain": 16}
    for name, width in (dict.fromkeys(HEADS, 8) | widths).items():
        model = medbert(name)
        outputs = model(**timed_batch())
        assert outputs.pooler_output.shape == (3, width)
        torch.testing.assert_close(model.classifier(outputs.pooler_output), outputs.logits)


def test_a_checkpoint_without_a_head_in_its_config_is_the_feed_forward_classifier(tmp_path):
    """Classifiers saved before there were heads keep loading, key by key."""
    model = medbert("ffn")
    assert {name.split(".")[0] for name in model.state_dict()} == {"model", "classifier"}
    assert MedBertConfig().head == "ffn"


@pytest.mark.parametrize("name", HEADS)
def test_a_head_on_a_pretrained_encoder_starts_from_random_weights_not_from_bare_memory(name, tmp_path):
    MedBertModel(medbert("ffn").config).save_pretrained(tmp_path)
    fields = {"head": name, "head_hidden_size": 64}
    model, info = MedBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True, **fields)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"head", "classifier"}
    for key, weight in model.head.named_parameters():
        if "gru" in key or "lstm" in key:
            assert weight.abs().max() <= 1 / 8
            assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.2)
    for key, layer in model.head.named_modules():
        if isinstance(layer, nn.Linear) and name != "retain" and layer.weight.numel() >= 256:
            bound = layer.in_features**-0.5
            assert layer.weight.abs().max() <= bound, key
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2), key
    if name == "retain":
        assert 0.05 < model.head.beta.weight.std() < 0.065
        assert model.head.beta.bias.abs().max() == 0
