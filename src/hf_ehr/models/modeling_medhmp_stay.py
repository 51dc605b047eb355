"""The stay level of MedHMP: hours and demographics → one state, and back to the hours; fusion of a few tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .hourly_series import HourlySeries


class TokenFusion(nn.Module):
    """A few tokens → one vector, MaxPool(LN(x + SelfAttn(x))) (Eq 2 and 7), with a feed-forward layer before the pool.

    With keys that are not there a token still sees itself: no softmax is over nothing.
    """

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.head_dim = config.num_attention_heads, hidden // config.num_attention_heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config) if config.use_ffn else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens, present=None, pooled=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuses tokens (rows, tokens, hidden).

        Args:
            tokens: (rows, tokens, hidden).
            present: (rows, tokens) bool, which tokens others look at; all when `None`.
            pooled: (rows, tokens) bool, which tokens enter the maximum; all when `None`.

        Returns:
            (rows, hidden), and the attention weights (rows, heads, tokens, tokens).
        """
        rows, count, hidden = tokens.shape
        split = self.qkv(tokens).view(rows, count, 3, self.num_heads, self.head_dim)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(2, 3)).float() * self.head_dim**-0.5
        if present is not None:
            seen = present[:, None, :] | torch.eye(count, dtype=torch.bool, device=tokens.device)
            scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).to(value.dtype)
        attended = self.out((weights @ value).transpose(1, 2).reshape(rows, count, hidden))
        states = self.feed_forward(self.norm(tokens + self.dropout(attended)))
        if pooled is not None:
            states = states.masked_fill(~pooled[..., None], torch.finfo(states.dtype).min)
        return states.amax(dim=1), weights


class FeedForward(nn.Module):
    """LN(x + W₂ ReLU(W₁ x)), of the authors' code."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states):
        """(…, hidden) → (…, hidden)."""
        states = self.dropout(states)
        return self.norm(states + self.output(self.intermediate(states).relu()))


class HourlyEncoder(nn.Module):
    """Hours → LSTM → norm → LSTM of two layers; a stay's state is the last layer's cell after its last hour."""

    def __init__(self, config):
        super().__init__()
        self.input_lstm = nn.LSTM(config.num_hourly_features, config.hidden_size, batch_first=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, num_layers=2, batch_first=True)

    def forward(self, series: HourlySeries) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes hours, in the precision of the weights.

        Returns:
            The state after each hour (stays, hours, hidden), 0 on padding; and the cell state after the last one
            (stays, hidden), which for a stay of no hours is what the recurrence starts from, 0.
        """
        # cuDNN skips padding in packed sequences; on the CPU these miss the fused kernel, at twice its cost.
        read = self._packed if series.values.is_cuda else self._padded
        with torch.autocast(series.values.device.type, enabled=False):
            return read(series)

    def _packed(self, series: HourlySeries) -> tuple[torch.Tensor, torch.Tensor]:
        stays, width = series.mask.shape
        states = series.values.new_zeros(stays, width, self.lstm.hidden_size)
        cells = series.values.new_zeros(stays, self.lstm.hidden_size)
        lengths = series.mask.sum(dim=1).cpu()
        rows = lengths.nonzero().squeeze(1)
        if not len(rows):
            return states, cells
        read, rows = series.values[rows.to(cells.device)], rows.to(cells.device)
        packed = pack_padded_sequence(read, lengths[lengths > 0], batch_first=True, enforce_sorted=False)
        inner, _ = self.input_lstm(packed)
        inner = PackedSequence(self.norm(self.dropout(inner.data)), *inner[1:])
        outer, (_, last) = self.lstm(inner)
        outer, _ = pad_packed_sequence(outer, batch_first=True, total_length=width)
        return states.index_copy(0, rows, outer), cells.index_copy(0, rows, last[-1])

    def _padded(self, series: HourlySeries) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_packed`, by the fused kernel of the CPU, which reads rectangles alone."""
        if not len(series.mask):
            return self._packed(series)
        states, _ = kept_after_the_end(self.input_lstm.all_weights[0], series)
        states = self.norm(self.dropout(states))
        for weights in self.lstm.all_weights:
            states, cells = kept_after_the_end(weights, HourlySeries(states, series.mask))
        return states * series.mask[..., None], cells


SHUT = 1000.0
"""The sigmoid of its negative is 0, and its own 1, in every floating type."""


def kept_after_the_end(weights: Sequence[torch.Tensor], series: HourlySeries) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of an LSTM that keeps its cell on padding, where one more input shuts what enters and forgets nothing.

    Args:
        weights: Of the layer, as `nn.LSTM.all_weights` has them.
        series: What it reads.

    Returns:
        The state after each hour, (stays, hours, hidden), of no meaning on padding; and the cell after the last hour
        of each stay, (stays, hidden), 0 for one without hours.
    """
    from_input, from_state, *biases = weights
    hidden = from_state.shape[1]
    shut = from_input.new_tensor([-SHUT, SHUT, 0, 0]).repeat_interleave(hidden)[:, None]
    values = torch.cat([series.values, ~series.mask[..., None]], dim=2)
    start = values.new_zeros(1, len(values), hidden)
    widened = [torch.cat([from_input, shut], dim=1), from_state, *biases]
    states, _, cells = torch.lstm(values, (start, start), widened, True, 1, 0.0, False, False, True)
    return states, cells[0]


class EncodedStays(NamedTuple):
    """What the encoder makes of stays."""

    state: torch.Tensor
    """(stays, hidden), b of Eq 2."""
    hours: torch.Tensor
    """(stays, hours, hidden), the recurrence after each hour, 0 on padding."""
    attention: torch.Tensor
    """(stays, heads, 2, 2)."""
    series: HourlySeries


class StayEncoder(nn.Module):
    """Hours and demographics of stays → one state each, b of Eq 2."""

    def __init__(self, config):
        super().__init__()
        self.num_features, self.num_demographics = config.num_hourly_features, config.num_demographics
        self.n_hours = config.n_hours
        self.hourly = HourlyEncoder(config)
        self.demographics = nn.Sequential(
            nn.Linear(config.num_demographics, config.demographics_hidden_size),
            nn.ReLU(),
            nn.Linear(config.demographics_hidden_size, config.hidden_size),
        )
        self.fusion = TokenFusion(config)

    def encode(
        self,
        stay_hours=None,
        feature_ids=None,
        feature_counts=None,
        feature_values=None,
        hourly_values=None,
        demographics=None,
        hidden_features=None,
        **kwargs,
    ) -> EncodedStays:
        """A batch of stays, as [`MedHMPStayModel`] takes it.

        `hidden_features` (stays, features) bool is what the encoder reads as 0 at every hour; the series that it
        returns holds it.

        Raises:
            ValueError: A stay is longer than `n_hours`, or the parts do not fit together.
        """
        self._check(stay_hours, hourly_values, demographics)
        dtype = self.fusion.norm.weight.dtype
        parts = (feature_ids, feature_counts, feature_values, hourly_values)
        series = HourlySeries.of(self.num_features, stay_hours, *parts, dtype=dtype)
        if series.mask.shape[1] > self.n_hours:
            raise ValueError(
                f"A stay must have at most `n_hours={self.n_hours}` hours, got {series.mask.shape[1]}. Cut it at the "
                "end of the observation window."
            )
        seen = series
        if hidden_features is not None:
            seen = series._replace(values=series.values.masked_fill(hidden_features[:, None], 0))
        hours, cells = self.hourly(seen)
        about = self.demographics(demographics.to(dtype)).to(dtype)
        state, attention = self.fusion(torch.stack([cells, about], dim=1))
        return EncodedStays(state, hours, attention, series)

    def _check(self, stay_hours, hourly_values, demographics) -> None:
        """Refuses a batch whose widths are not the configuration's."""
        if stay_hours is None:
            raise ValueError(
                "`stay_hours` must be given, (stays,) hours of each stay, got None. Make a batch of stays."
            )
        stays = len(stay_hours)
        for name, value, width in (
            ("hourly_values", hourly_values, self.num_features),
            ("demographics", demographics, self.num_demographics),
        ):
            if value is None and name == "hourly_values":
                continue
            if value is None or len(value) != stays or value.shape[-1] != width:
                shape = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"`{name}` must have {stays} rows, one a stay, and {width} features, got {shape}. Make the batch "
                    "with the feature extractor of this model."
                )


class HourlyDecoder(nn.Module):
    """A stay's state b → its hours, as `config.decoder` says."""

    def __init__(self, config):
        super().__init__()
        self.from_input = config.decoder == "first_input"
        features, hidden = config.num_hourly_features, config.hidden_size
        if self.from_input:
            self.feed_forward = FeedForward(config)
            self.lstm = nn.LSTM(hidden, features, batch_first=True)
        else:
            # A recurrence without input: what it reads at every hour is a constant, hence one more bias.
            self.lstm = nn.LSTM(1, hidden, batch_first=True)
            self.output = nn.Linear(hidden, features)

    def forward(self, states, hours: int) -> torch.Tensor:
        """(stays, hidden) → (stays, hours, features)."""
        dtype = self.lstm.weight_ih_l0.dtype
        if self.from_input:
            states = self.feed_forward(states)
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(dtype)
            if self.from_input:
                return self.lstm(nn.functional.pad(states[:, None], (0, 0, 0, hours - 1)))[0]
            decoded, _ = self.lstm(
                states.new_ones(len(states), hours, 1), (states[None], torch.zeros_like(states[None]))
            )
        return self.output(decoded)
