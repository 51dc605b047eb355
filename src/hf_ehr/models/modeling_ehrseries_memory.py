"""RAIM and DCMN: models of stays that go back to earlier hours by attention, on one or two channels of features."""

from typing import Any

import torch
from torch import nn

from .modeling_ehrseries_layers import StayFeatures, last_state, run_lstm

WINDOW, STRIDE = 10, 5
"""Features under DCMN's filter, and from one filter to the next."""


class Channels(nn.Module):
    """The features of each channel of hourly values."""

    def __init__(self, config):
        super().__init__()
        self.ids = config.channels

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(…, features) → those of the first channel, and of the second if there is one."""
        if not self.ids[1]:
            return values, None
        first, second = (values.index_select(-1, torch.tensor(ids, device=values.device)) for ids in self.ids)
        return first, second


def guidance(events: torch.Tensor) -> torch.Tensor:
    """RAIM's guidance (Xu et al. 2018): what each hour may weigh by its content.

    Hour t is guided to itself and to the earlier hours with an event, and to all earlier ones while there was none.
    MedHMP's code leaves the hours with events out: after the first one it is guided to hour t alone.

    Args:
        events: (stays, hours) bool, whether something happened in the hour.

    Returns:
        (stays, hours, hours) bool; entry (t, j) is meaningful for j ≤ t.
    """
    before = events.cumsum(dim=1) - events.long()
    guided = events[:, None] | (before == 0)[..., None]
    return guided | torch.eye(events.shape[1], dtype=torch.bool, device=events.device)


class Raim(nn.Module):
    """RAIM (Xu et al., KDD 2018): x_t = relu(W1 x1_t) + relu(W2 x2_t); h_t = GRU(Σ_j≤t α_tj x_j, h_t-1).

    α_t = softmax over j ≤ t of w·(g_tj x_j) + (W_h h_t-1 + b)_j, g the guidance by the second channel. The stay is
    h_T + W3 s, s its demographics. MedHMP's code lets the hours after t take part in the softmax.
    """

    def __init__(self, config):
        super().__init__()
        first, second = (len(ids) for ids in config.channels)
        self.channels = Channels(config)
        self.first = nn.Linear(first, config.hidden_size)
        self.second: Any = nn.Linear(second, config.hidden_size) if second else None
        self.demographics: Any = None
        if config.num_demographics:
            self.demographics = nn.Linear(config.num_demographics, config.hidden_size)
        self.hour_score = nn.Linear(config.hidden_size, 1, bias=False)
        self.state_score = nn.Linear(config.hidden_size, config.n_hours)
        self.cell = nn.GRUCell(config.hidden_size, config.hidden_size)

    def forward(self, values, mask, demographics) -> StayFeatures:
        """Hours (stays, hours, features) and demographics → the vector of each stay, (stays, hidden)."""
        first, second = self.channels(values)
        steps = self.first(first).relu()
        guided = None
        if second is not None:
            steps = steps + self.second(second).relu()
            guided = guidance((second != 0).any(dim=-1))
        with torch.autocast(values.device.type, enabled=False):
            states, attentions = self._recur(steps.to(self.hour_score.weight.dtype), guided)
        states, attentions = states * mask[..., None], attentions * mask[..., None]
        features = last_state(states, mask)
        if demographics is not None:
            features = features + self.demographics(demographics)
        return StayFeatures(features, states, attentions)

    def _recur(self, steps, guided) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps (stays, hours, hidden) → states and the attention of each hour; hours after a stay are read too."""
        stays, hours, _ = steps.shape
        scores = self.hour_score(steps).squeeze(-1)
        content = scores[:, None].expand(stays, hours, hours) if guided is None else scores[:, None] * guided
        later = torch.ones(hours, hours, dtype=torch.bool, device=steps.device).triu(1)
        # Unbound once: slices would each add a gradient of full size.
        content = content.float().masked_fill(later, torch.finfo(torch.float32).min).unbind(1)
        state, states, attentions = steps.new_zeros(stays, steps.shape[2]), [], []
        for score in content:
            logits = score + self.state_score(state)[:, :hours].float()
            weights = logits.softmax(dim=1).to(steps.dtype)
            state = self.cell(torch.bmm(weights[:, None], steps).squeeze(1), state)
            states.append(state)
            attentions.append(weights)
        return torch.stack(states, dim=1), torch.stack(attentions, dim=1)


class MemoryChannel(nn.Module):
    """One channel of DCMN: its hours become a memory and a query, and the query of the other channel reads it."""

    def __init__(self, num_features: int, hidden_size: int, norm: str):
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, WINDOW, STRIDE)
        windows = max(-(-(num_features - WINDOW) // STRIDE), 0) + 1
        self.missing = WINDOW + STRIDE * (windows - 1) - num_features
        self.embedding = nn.Linear(windows, hidden_size)
        self.norm = (nn.BatchNorm1d if norm == "batch" else nn.LayerNorm)(hidden_size)
        self.memory_lstm = nn.LSTM(hidden_size, hidden_size, batch_first=True)
        self.query_lstm = nn.LSTM(hidden_size, hidden_size, batch_first=True)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)  # a bias would add the same to all scores
        self.value = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size)

    def embed(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(stays, hours, features) → (stays, hours, hidden), 0 after the last hour, whose norm never sees it."""
        hours = nn.functional.pad(values[mask], (0, self.missing))
        embedded = self.embedding(self.convolution(hours[:, None]).relu().squeeze(1))
        states = embedded.new_zeros(*mask.shape, embedded.shape[1])
        return states.index_put((mask,), self._normed(embedded).to(states.dtype))

    def _normed(self, hours: torch.Tensor) -> torch.Tensor:
        if isinstance(self.norm, nn.BatchNorm1d) and len(hours) < 2:  # no variance: take that of the training so far
            norm = self.norm
            return nn.functional.batch_norm(
                hours, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        return self.norm(hours)

    def remember(self, embedded: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(stays, hours, hidden) → memory (stays, hours, hidden) and query (stays, hidden)."""
        memory = run_lstm(self.memory_lstm, embedded) * mask[..., None]
        return memory, last_state(run_lstm(self.query_lstm, embedded), mask)

    def read(self, memory: torch.Tensor, query: torch.Tensor, mask: torch.Tensor):
        """What `query` of the other channel reads: p = softmax(q·Em), o = p·Fm, g = σ(Gq), y = g o + (1 - g) q.

        Returns:
            y (stays, hidden), p (stays, hours) and g (stays, hidden).
        """
        scores = (self.key(memory) @ query[..., None]).squeeze(-1).float()
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1)
        found = (weights.to(memory.dtype)[:, None] @ self.value(memory)).squeeze(1)
        gate = self.gate(query).sigmoid()
        return gate * found + (1 - gate) * query, weights * mask, gate


class Dcmn(nn.Module):
    """DCMN (Feng et al., ICDM 2019): two memories, each read by the query of the other channel.

    The filter goes over the features of an hour, and zeros follow the last one where filters do not end there; the
    authors' code leaves these features out.
    """

    def __init__(self, config):
        super().__init__()
        first, second = (len(ids) for ids in config.channels)
        self.channels = Channels(config)
        sizes = (first, second or first)
        self.memories: Any = nn.ModuleList(
            MemoryChannel(size, config.hidden_size, config.memory_norm) for size in sizes
        )
        self.demographics: Any = None
        if config.num_demographics:
            self.demographics = nn.Linear(config.num_demographics, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, values, mask, demographics) -> StayFeatures:
        """Hours (stays, hours, features) and demographics → the vector of each stay, (stays, hidden)."""
        first, second = self.channels(values)
        parts = (first, first if second is None else second)
        pairs = zip(self.memories, parts, strict=True)
        memories, queries = zip(*(m.remember(m.embed(part, mask), mask) for m, part in pairs), strict=True)
        triples = zip(self.memories, memories, reversed(queries), strict=True)
        outputs, weights, gates = zip(*(m.read(memory, query, mask) for m, memory, query in triples), strict=True)
        features = outputs[0] + outputs[1]
        if demographics is not None:
            features = features + self.dropout(self.demographics(demographics))
        return StayFeatures(
            features, hour_attentions=torch.stack(weights, dim=1), memory_gates=torch.stack(gates, dim=1)
        )
