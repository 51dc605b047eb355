"""The patient-level models that MedHMP is compared with, as sequence heads: LSTM, Dipole, AdaCare and HiTANet.

They were written for visits, the sum or the MLP of a visit's codes, and read the states of an encoder as well. Each is
its paper's; where MedHMP's code has another form of it, the head says which it follows.
"""

from typing import Literal

import torch
from torch import nn

from .modeling_ehr import sinusoids
from .modeling_steps import HeadLinear, HeadOutput, Steps, TimeMajor

DipoleAttention = Literal["location", "general", "concat"]


class LstmHead(nn.Module):
    """Two layers of LSTM over the steps; the patient's vector is the greatest state of each feature."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.first_lstm = nn.LSTM(input_size, hidden_size)
        self.second_lstm = nn.LSTM(hidden_size, hidden_size)
        self.num_features = hidden_size

    def forward(self, steps: Steps) -> HeadOutput:
        """Steps → the patients' vectors, (patients, hidden)."""
        order = TimeMajor.of(steps.packed)
        states, _ = order.run(self.first_lstm, steps.states)
        states, _ = order.run(self.second_lstm, states)
        return HeadOutput.pooled(steps, states)


class DipoleHead(nn.Module):
    """Dipole (Ma et al., KDD 2017): a Bi-GRU, and attention of the last state to all.

        h_i = [GRU →, GRU ←] over v_1 … v_t;   α = softmax_i(score);   c = Σ_i α_i h_i;   h̃ = tanh(W_c [c; h_t])

        location: w·h_i      general: h_t·W h_i      concat: v·tanh(W [h_t; h_i])

    The paper's sums run to t-1, so that a first visit has nothing to look at; here the last step is among them. The
    bias of `location` is left out: it shifts all scores alike, and the softmax takes it away. MedHMP's code for it
    is `location` on a GRU of two layers in one direction, without h̃.

    Args:
        input_size: Width of a step.
        hidden_size: Width of each GRU, of h̃, and of the inner layer of `concat`.
        attention: How the last state scores the others.
        bidirectional: Whether there is a GRU in reverse time as well.
    """

    def __init__(
        self, input_size: int, hidden_size: int, attention: DipoleAttention = "location", bidirectional: bool = True
    ):
        super().__init__()
        self.gru = nn.GRU(input_size, hidden_size)
        self.reverse_gru = nn.GRU(input_size, hidden_size) if bidirectional else None
        self.attention = attention
        width = hidden_size * (2 if bidirectional else 1)
        if attention == "concat":
            self.mix = HeadLinear(2 * width, hidden_size, bias=False)
        scored = hidden_size if attention == "concat" else width
        self.score = HeadLinear(scored, width if attention == "general" else 1, bias=False)
        self.combine = HeadLinear(2 * width, hidden_size, bias=False)
        self.num_features = hidden_size

    def forward(self, steps: Steps) -> HeadOutput:
        """Steps → the patients' vectors h̃, (patients, hidden)."""
        states, _ = TimeMajor.of(steps.packed).run(self.gru, steps.states)
        if self.reverse_gru is not None:
            reverse_states, _ = TimeMajor.of(steps.packed, reverse=True).run(self.reverse_gru, steps.states)
            states = torch.cat([states, reverse_states], dim=1)
        last = steps.last(states)
        alpha = steps.softmax(self.scores(states, last[steps.packed.segment_ids]))
        context = steps.total(alpha[:, None] * states).to(states.dtype)
        return HeadOutput(self.combine(torch.cat([context, last], dim=1)).tanh(), steps, states, alpha)

    def scores(self, states: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """States of the steps and of each step's patient at the last one, both (total, width) → (total,)."""
        if self.attention == "general":
            return (last * self.score(states)).sum(dim=1)
        if self.attention == "concat":
            states = self.mix(torch.cat([last, states], dim=1)).tanh()
        return self.score(states).squeeze(1)


class Recalibration(nn.Module):
    """AdaCare's gates of the features of a step, σ(W₂ relu(W₁ z)), read from this step alone."""

    reduction = 4

    def __init__(self, features: int):
        super().__init__()
        narrow = max(features // self.reduction, 1)
        self.squeeze = HeadLinear(features, narrow)
        self.excite = HeadLinear(narrow, features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(total, features) → gates in (0, 1) of the same shape."""
        return self.excite(self.squeeze(states).relu()).sigmoid()


class AdaCareHead(nn.Module):
    """AdaCare (Ma et al., AAAI 2020): convolutions that look back 1, 3 and 5 steps, recalibrated, then a GRU.

        z_t = relu([Conv_d (x_{t-d}, x_t)] for d = 1, 3, 5);   h_t = GRU([g(z_t) ⊙ z_t; g(x_t) ⊙ x_t], h_{t-1})

    The patient's vector is the greatest h_t of each feature, as in MedHMP's code, over the valid steps alone (there
    over padding too). 64 channels a convolution, as the authors have. No state knows a later step.
    """

    dilations = (1, 3, 5)
    channels = 64

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        # Two taps: a layer over the step that lies `dilation` back and this one.
        self.convolutions = nn.ModuleList([HeadLinear(2 * input_size, self.channels) for _ in self.dilations])
        width = self.channels * len(self.dilations)
        self.convolution_gates = Recalibration(width)
        self.input_gates = Recalibration(input_size)
        self.gru = nn.GRU(width + input_size, hidden_size)
        self.num_features = hidden_size

    def forward(self, steps: Steps) -> HeadOutput:
        """Steps → the patients' vectors, (patients, hidden)."""
        steps = steps._replace(states=steps.states.to(self.gru.all_weights[0][0].dtype))
        inputs = steps.states
        pairs = zip(self.dilations, self.convolutions, strict=True)
        convolved = torch.cat([layer(torch.cat([steps.before(lag), inputs], 1)) for lag, layer in pairs], 1).relu()
        gates = torch.cat([self.convolution_gates(convolved), self.input_gates(inputs)], dim=1)
        gated = gates * torch.cat([convolved, inputs], dim=1)
        states, _ = TimeMajor.of(steps.packed).run(self.gru, gated)
        return HeadOutput.pooled(steps, states, gates)


class HiTANetTime(nn.Module):
    """HiTANet's time function 1 - tanh((w Δ / 180 + b)²) of the days Δ to the last visit, and a layer over it.

    MedHMP's code leaves the `1 - tanh` out; this is the authors' (HiTANet2020/HiTANet, models/transformer.py).
    """

    size = 64

    def __init__(self, num_features: int):
        super().__init__()
        self.selection = HeadLinear(1, self.size)
        self.output = HeadLinear(self.size, num_features)

    def forward(self, days: torch.Tensor) -> torch.Tensor:
        """(total,) float32 → (total, num_features)."""
        return self.output(1 - self.selection(days[:, None] / 180).square().tanh())


class HiTANetLayer(nn.Module):
    """Causal self-attention over the steps of each patient and a feed-forward layer, both with BERT's post-norm."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = HeadLinear(hidden_size, 3 * hidden_size)
        self.out_proj = HeadLinear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.intermediate = HeadLinear(hidden_size, 4 * hidden_size)
        self.output = HeadLinear(4 * hidden_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)

    def forward(self, states: torch.Tensor, steps: Steps) -> torch.Tensor:
        """(total, hidden) → the same shape; `steps` only say whose they are."""
        # Each patient from column 0: what a causal mask lets a step see is then never padding.
        rows = Steps.of(states[None], packed=steps.packed)
        query, key, value = (
            rows.rectangle(self.qkv(states)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, rows.places)
        states = self.attention_norm(states + self.out_proj(attended))
        return self.output_norm(states + self.output(self.intermediate(states).relu()))


class HiTANetHead(nn.Module):
    """HiTANet (Luo et al., KDD 2020): a transformer that knows the days, and two attentions mixed by the last state.

        x_i = v_i + sinusoid(i) + time(Δ_i);   h = causal transformer over x;   q = relu(W_q h_n)
        global: softmax_i(q·relu(time'(Δ_i)) / 8)      local: softmax_i(w·h_i)
        z = softmax(W_z h_n);   α_i = z_1 global_i + z_2 local_i;   c = Σ_i α_i h_i

    The time function is the authors' (`HiTANetTime`), and so are one layer, 4 heads and 64 features of time and query.
    Where their code differs: heads are split by feature, it cuts the flattened rows (head by head, neither comparing
    all steps nor causal) and scales by that; h_n is the last visit itself and is attended to, they append an empty
    one; α sums to 1 without the division by its sum that their 1e-5 keeps from being exact. The bias of `local` is
    left out, for the softmax takes it away.

    Args:
        input_size: Width of a step.
        hidden_size: Width of the transformer; a layer in front of it where the step has another.
    """

    num_heads = 4

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.projection = nn.Identity() if input_size == hidden_size else HeadLinear(input_size, hidden_size)
        self.time = HiTANetTime(hidden_size)
        self.layer = HiTANetLayer(hidden_size, self.num_heads)
        self.query = HeadLinear(hidden_size, HiTANetTime.size)
        self.global_time = HiTANetTime(HiTANetTime.size)
        self.local_score = HeadLinear(hidden_size, 1, bias=False)
        self.mixture = HeadLinear(hidden_size, 2)
        self.num_features = hidden_size

    def forward(self, steps: Steps) -> HeadOutput:
        """Steps with `day_ids` → the patients' vectors c, (patients, hidden).

        Raises:
            ValueError: The batch has no `day_ids`.
        """
        dtype = self.query.weight.dtype
        days, owners = steps.days_to_last().to(dtype), steps.packed.segment_ids
        embedded = self.projection(steps.states.to(dtype)) + self.time(days)
        places = sinusoids(steps.packed.positions(), embedded.shape[1]).to(embedded.dtype)
        states = self.layer(embedded + places, steps)
        last = steps.last(states)
        query = self.query(last).relu()[owners]
        by_time = steps.softmax((query * self.global_time(days).relu()).sum(dim=1) * query.shape[1] ** -0.5)
        by_state = steps.softmax(self.local_score(states).squeeze(1))
        share = self.mixture(last).float().softmax(dim=1)[owners]
        alpha = share[:, 0] * by_time + share[:, 1] * by_state
        weighted = alpha[:, None] * states
        return HeadOutput(steps.total(weighted).to(states.dtype), steps, states, alpha, added=weighted)
