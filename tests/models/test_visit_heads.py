"""LSTM, Dipole, AdaCare and HiTANet against formulas written out, and in time (papers.md §4.5, rows 96-100)."""

from math import cos, sin

import pytest
import torch
from torch import nn

from hf_ehr.models.modeling_steps import HeadOutput, Steps
from hf_ehr.models.modeling_visit_heads import AdaCareHead, DipoleHead, HiTANetHead, LstmHead
from tests.models.common import LENGTHS, padded_batch
from tests.models.test_heads import HEADS, days_of, gru_by_hand, head_of, medbert, padded, states_of, timed_batch


def lstm_by_hand(lstm: nn.LSTM, steps: torch.Tensor) -> torch.Tensor:
    """Hochreiter and Schmidhuber 1997 with forget gates, in PyTorch's order: (steps, input) → (steps, hidden)."""
    state = cell = torch.zeros(lstm.hidden_size)
    states = []
    for step in steps:
        gates = lstm.weight_ih_l0 @ step + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ state + lstm.bias_hh_l0
        enter, forget, candidate, leave = gates.chunk(4)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
        state = torch.sigmoid(leave) * torch.tanh(cell)
        states.append(state)
    return torch.stack(states)


def test_lstm_pools_the_greatest_state_of_its_second_layer_over_valid_steps_by_hand():
    head, (states, mask) = head_of("lstm"), states_of()
    assert isinstance(head, LstmHead)
    output = head(padded(states, mask))
    for row, length in enumerate(LENGTHS):
        second = lstm_by_hand(head.second_lstm, lstm_by_hand(head.first_lstm, states[row, :length]))
        greatest, where = second.max(dim=0)
        torch.testing.assert_close(output.features[row], greatest, atol=1e-6, rtol=1e-5)
        shares = where.bincount(minlength=length) / 4  # of the 4 features
        torch.testing.assert_close(output.attention()["head_alpha"][row, :length], shares)


def test_equal_maxima_share_what_is_pooled():
    states = torch.tensor([[[3.0, 1.0], [3.0, 5.0], [0.0, 5.0], [-1.0, 5.0]]])
    output = HeadOutput.pooled(Steps.of(states), states[0])
    assert output.features.tolist() == [[3, 5]]
    torch.testing.assert_close(output.alpha, torch.tensor([0.25, 0.25 + 1 / 6, 1 / 6, 1 / 6]))
    torch.testing.assert_close(output.added.sum(dim=0), output.features[0])


def dipole_by_hand(head: DipoleHead, visits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's formulas for one patient, (n, input) → h̃, α."""
    h = gru_by_hand(head.gru, visits)
    if head.reverse_gru is not None:
        h = torch.cat([h, gru_by_hand(head.reverse_gru, visits.flip(0)).flip(0)], dim=1)
    last, scores = h[-1], []
    for state in h:
        if head.attention == "location":
            scores.append(head.score.weight[0] @ state)
        elif head.attention == "general":
            scores.append(last @ head.score.weight @ state)
        else:
            scores.append(head.score.weight[0] @ torch.tanh(head.mix.weight @ torch.cat([last, state])))
    alpha = torch.stack(scores).exp()
    alpha = alpha / alpha.sum()
    c = sum(weight * state for weight, state in zip(alpha, h, strict=True))
    return torch.tanh(head.combine.weight @ torch.cat([c, last])), alpha


DIPOLES = [(attention, True) for attention in ("location", "general", "concat")] + [("location", False)]


@pytest.mark.parametrize(("attention", "bidirectional"), DIPOLES)
def test_dipole_equals_the_papers_formula_patient_by_patient(attention, bidirectional):
    head = head_of("dipole", attention=attention, bidirectional=bidirectional)
    states, mask = states_of()
    output = head(padded(states, mask))
    for row, length in enumerate(LENGTHS):
        vector, alpha = dipole_by_hand(head, states[row, :length])
        torch.testing.assert_close(output.features[row], vector, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention()["head_alpha"][row, :length], alpha, atol=1e-6, rtol=1e-5)


def adacare_by_hand(head: AdaCareHead, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One patient, (n, input) → the states h and the gates, the convolutions by PyTorch's own."""
    convolved = []
    for dilation, layer in zip((1, 3, 5), head.convolutions, strict=True):
        kernel = torch.stack(layer.weight.chunk(2, dim=1), dim=2)  # (channels, input, 2), the earlier tap first
        before = nn.functional.pad(x.T[None], (dilation, 0))
        convolved.append(nn.functional.conv1d(before, kernel, layer.bias, dilation=dilation)[0].T)
    z = torch.cat(convolved, dim=1).clamp(min=0)
    assert z.shape == (len(x), 192)

    def gates(se, values):
        inner = (values @ se.squeeze.weight.T + se.squeeze.bias).clamp(min=0)
        return torch.sigmoid(inner @ se.excite.weight.T + se.excite.bias)

    y = torch.cat([gates(head.convolution_gates, z), gates(head.input_gates, x)], dim=1)
    return gru_by_hand(head.gru, y * torch.cat([z, x], dim=1)), y


def test_adacare_equals_dilated_causal_convolutions_and_gates_patient_by_patient():
    head, (states, mask) = head_of("adacare"), states_of()
    assert head.convolution_gates.squeeze.out_features == 48  # a quarter of 192
    output = head(padded(states, mask))
    for row, length in enumerate(LENGTHS):
        h, gates = adacare_by_hand(head, states[row, :length])
        torch.testing.assert_close(output.features[row], h.max(dim=0).values, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.attention()["head_beta"][row, :length], gates, atol=1e-6, rtol=1e-5)


def hitanet_by_hand(head: HiTANetHead, visits: torch.Tensor, days: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One patient of visits (n, hidden) and days to the last (n,) → c, α; attention by loops over heads and steps."""

    def time(module, delta):
        inner = module.selection.weight[:, 0] * delta / 180 + module.selection.bias
        return module.output.weight @ (1 - torch.tanh(inner**2)) + module.output.bias

    n, size = visits.shape
    place = torch.zeros(n, size)
    for t in range(n):
        for i in range(size):
            angle = t / 10000 ** (2 * (i // 2) / size)
            place[t, i] = sin(angle) if i % 2 == 0 else cos(angle)
    x = visits + torch.stack([time(head.time, delta) for delta in days]) + place
    query, key, value = (x @ head.layer.qkv.weight.T + head.layer.qkv.bias).chunk(3, dim=1)
    attended, width = torch.zeros(n, size), size // 4
    for part in (slice(k * width, k * width + width) for k in range(4)):
        for t in range(n):
            scores = torch.stack([query[t, part] @ key[i, part] / width**0.5 for i in range(t + 1)]).softmax(0)
            attended[t, part] = sum(scores[i] * value[i, part] for i in range(t + 1))
    layer = head.layer
    h = nn.functional.layer_norm(x + layer.out_proj(attended), (size,))
    h = nn.functional.layer_norm(h + layer.output(layer.intermediate(h).clamp(min=0)), (size,))
    q = (head.query.weight @ h[-1] + head.query.bias).clamp(min=0)
    by_time = torch.stack([q @ time(head.global_time, delta).clamp(min=0) / 8 for delta in days]).softmax(0)
    by_state = (h @ head.local_score.weight[0]).softmax(0)
    z = (head.mixture.weight @ h[-1] + head.mixture.bias).softmax(0)
    alpha = z[0] * by_time + z[1] * by_state
    return (alpha[:, None] * h).sum(0), alpha


def test_hitanet_equals_its_formula_with_the_authors_time_function_patient_by_patient():
    head = head_of("hitanet", features=8, hidden=8)
    states, mask = states_of(features=8)
    output = head(padded(states, mask))
    for row, length in enumerate(LENGTHS):
        days = days_of(mask)[row, :length]
        c, alpha = hitanet_by_hand(head, states[row, :length], (days[-1] - days).float())
        torch.testing.assert_close(output.features[row], c, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.attention()["head_alpha"][row, :length], alpha, atol=1e-6, rtol=1e-5)


# Time


@pytest.mark.parametrize("name", ["adacare", "hitanet", "lstm"])
def test_a_later_step_changes_no_state_before_it(name):
    head, (states, _) = head_of(name), states_of((9,))
    changed = states.clone()
    changed[0, 5:] = torch.randn(4, 6)
    before, after = (head(padded(rows)).states for rows in (states, changed))
    torch.testing.assert_close(after[:5], before[:5], atol=1e-6, rtol=0)
    assert ((after[5:] - before[5:]).abs().amax(dim=1) > 1e-4).all()


def test_adacare_looks_back_one_three_and_five_steps():
    """Through the convolutions alone: what the GRU carries is taken out by looking at the gates."""
    head, (states, _) = head_of("adacare"), states_of((12,))
    changed = states.clone()
    changed[0, 2] += 1
    moved = (head(padded(changed)).beta - head(padded(states)).beta).abs().amax(dim=1)
    assert (moved > 1e-6).nonzero().flatten().tolist() == [2, 3, 5, 7]


def test_days_change_what_hitanet_says_and_only_their_distance_from_the_last_visit_counts():
    head, (states, mask) = head_of("hitanet"), states_of()
    days = days_of(mask)

    def features(days):
        return head(Steps.of(states, mask, day_ids=days)).features

    plain, moved = features(days), days.clone()
    moved[0, 3] += 40
    assert (features(moved)[0] - plain[0]).abs().max() > 1e-5
    assert torch.equal(features(moved)[1:], plain[1:])
    torch.testing.assert_close(features(days + 500), plain)
    unknown = days.clone()
    unknown[1] = 0
    same_day = days.clone()
    same_day[1] = 7
    torch.testing.assert_close(features(unknown), features(same_day))
    one_unknown, with_the_last = days.clone(), days.clone()
    one_unknown[0, 3], with_the_last[0, 3] = 0, days[0, 9]
    torch.testing.assert_close(features(one_unknown), features(with_the_last))


def test_hitanet_without_days_says_what_it_needs():
    with pytest.raises(ValueError, match=r"`day_ids` must be given .* `days=True`"):
        medbert("hitanet")(**padded_batch(50))


def test_no_other_head_reads_the_days():
    batch = timed_batch()
    for name in ("ffn", *HEADS[:-1]):
        model = medbert(name)
        assert torch.equal(model(**padded_batch(50)).logits, model(**batch).logits), name
