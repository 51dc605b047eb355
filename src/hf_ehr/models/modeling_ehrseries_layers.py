"""Layers over the hours of stays that several models share: recurrence, convolution, Transformer, Star-Transformer.

All take `values` (stays, hours, features), which are 0 after the last hour of a stay, and `mask` (stays, hours), true
for its hours. How long the other stays of the batch are changes no number.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .hourly_series import HourlySeries
from .modeling_ehr import EhrEncoder
from .modeling_medhmp_stay import HourlyEncoder


class StayFeatures(NamedTuple):
    """What a model makes of stays."""

    features: torch.Tensor
    """(stays, width)."""
    states: torch.Tensor | None = None
    """(stays, hours, hidden), 0 after the last hour."""
    hour_attentions: torch.Tensor | None = None
    """RAIM: (stays, hours, hours), what each hour looks at; DCMN: (stays, 2, hours), what is read from each memory."""
    memory_gates: torch.Tensor | None = None
    """DCMN: (stays, 2, hidden)."""


def window(config: Any, dtype: torch.dtype, **inputs: Any) -> HourlySeries:
    """The series of a batch, at most `config.n_hours` wide.

    Args:
        config: With `num_hourly_features` and `n_hours`.
        dtype: Of the values.
        **inputs: As [`HourlySeries.of`] takes them.

    Raises:
        ValueError: There is no `stay_hours`, features do not fit the configuration, or a stay is longer than the
            window.
    """
    if inputs.get("stay_hours") is None:
        raise ValueError("`stay_hours` must be given, (stays,) hours of each stay, got None. Add it to the batch.")
    dense = inputs.get("hourly_values")
    if dense is not None and dense.shape[-1] != config.num_hourly_features:
        raise ValueError(
            f"`hourly_values` must have {config.num_hourly_features} features (`num_hourly_features`), got "
            f"{dense.shape[-1]}. Use the extractor that the model was trained with."
        )
    series = HourlySeries.of(config.num_hourly_features, dtype=dtype, **inputs)
    if series.mask.shape[1] <= config.n_hours:
        return series
    if series.mask[:, config.n_hours :].any():
        raise ValueError(
            f"`stay_hours` must be at most {config.n_hours} (`n_hours`), got {int(series.mask.sum(1).max())}. Cut the "
            "window, or make the model with a longer one."
        )
    return HourlySeries(series.values[:, : config.n_hours], series.mask[:, : config.n_hours])


def checked_demographics(config, demographics, stays: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Demographics (stays, num_demographics) in the precision of the model; `None` where it knows none.

    Raises:
        ValueError: They are missing or have another shape.
    """
    if not config.num_demographics:
        return None
    given = None if demographics is None else tuple(demographics.shape)
    if given != (stays, config.num_demographics):
        raise ValueError(
            f"`demographics` must have shape ({stays}, {config.num_demographics}) (stays, `num_demographics`), got "
            f"{given}. Pass zeros for a stay of which none are known."
        )
    return demographics.to(dtype)


def last_state(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States (stays, hours, hidden) → those of the last hours, (stays, hidden); 0 for a stay without hours."""
    last = mask.sum(dim=1) - 1
    index = last.clamp(min=0)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, index).squeeze(1) * (last >= 0)[:, None]


def greatest(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States (stays, hours, hidden) → the maximum over hours, (stays, hidden); 0 for a stay without hours."""
    maximum = states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min).amax(dim=1)
    return torch.where(mask.any(dim=1)[:, None], maximum, 0)


def run_lstm(lstm: nn.LSTM, values: torch.Tensor) -> torch.Tensor:
    """The state after each hour, (stays, hours, hidden), in the precision of the weights.

    Hours after the last one are read too, and no state before them knows: PyTorch's packed sequences would skip them,
    but their backward pass is slower on the CPU.
    """
    with torch.autocast(values.device.type, enabled=False):
        return lstm(values.to(lstm.all_weights[0][0].dtype))[0]


class SeriesLstm(nn.Module):
    """LSTM, its state after the last hour, one layer: F-LSTM without its classifier (Tang et al. 2020)."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, output_size: int):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.projection = nn.Linear(hidden_size, output_size)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> StayFeatures:
        """Hours → the vector of each stay, (stays, output)."""
        states = run_lstm(self.lstm, values) * mask[..., None]
        return StayFeatures(self.projection(last_state(states, mask)).relu(), states)


class SeriesCnn(nn.Module):
    """Convolutions over three hours, each followed by a pooling of two, and one layer: F-CNN (Tang et al. 2020).

    The layer has weights for each place of the window, as the paper's. What the convolutions make of the time after a
    stay is 0. An odd number of hours keeps its last one; the authors' code drops it.
    """

    def __init__(self, input_size: int, num_filters: int, depth: int, n_hours: int, output_size: int):
        super().__init__()
        sizes = [input_size] + [num_filters] * depth
        self.convolutions = nn.ModuleList(nn.Conv1d(before, after, 3, padding=1) for before, after in pairwise(sizes))
        self.n_hours = n_hours
        places = -(-n_hours // 2**depth)
        self.projection = nn.Linear(places * num_filters, output_size)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> StayFeatures:
        """Hours → the vector of each stay, (stays, output)."""
        missing = self.n_hours - mask.shape[1]
        states = nn.functional.pad(values.transpose(1, 2), (0, missing))
        valid = nn.functional.pad(mask, (0, missing))[:, None].to(values.dtype)
        for convolution in self.convolutions:
            states = convolution(states).relu() * valid
            states, valid = (nn.functional.max_pool1d(x, 2, ceil_mode=True) for x in (states, valid))
        return StayFeatures(self.projection(states.flatten(1)).relu())


class UnimodalSeries(nn.Module):
    """`unimodal_lstm` and `transformer`: hours, states, the greatest value of each feature (MedHMP, Figure 4)."""

    def __init__(self, config):
        super().__init__()
        hidden_size, recurrent = config.hidden_size, config.architecture == "unimodal_lstm"
        self.hours: Any = None
        self.projection: Any = None
        self.lstm: Any = None
        self.encoder: Any = None
        if config.medhmp_encoder:
            self.hours = HourlyEncoder(config)
        elif not recurrent:
            self.projection = nn.Linear(config.num_hourly_features, hidden_size)
        if recurrent:
            input_size = hidden_size if config.medhmp_encoder else config.num_hourly_features
            self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        else:
            self.encoder = EhrEncoder(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> StayFeatures:
        """Hours → the vector of each stay, (stays, hidden)."""
        if self.hours is not None:
            values = self.dropout(self.hours(HourlySeries(values, mask))[0])
        if self.lstm is not None:
            states = run_lstm(self.lstm, values)
        else:
            inputs = values if self.projection is None else self.projection(values).relu()
            states = self.dropout(attend_to_hours(self.encoder, inputs, mask))
        states = states * mask[..., None]
        return StayFeatures(greatest(states, mask), states)


def attend_to_hours(encoder: EhrEncoder, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(stays, hours, hidden) through an encoder; a stay without hours reads its first place, for it must read one."""
    if not len(states):  # the library's attention does not take a batch of none
        return states
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return encoder(states, (mask | (first & ~mask.any(dim=1, keepdim=True))).long())


class SeriesTransformer(nn.Module):
    """Transformer over hours, read at the first one (Yang & Wu 2021, `Encoder`)."""

    def __init__(self, config):
        super().__init__()
        self.projection = nn.Linear(config.num_hourly_features, config.hidden_size)
        self.encoder = EhrEncoder(config)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> StayFeatures:
        """Hours → the vector of each stay, (stays, hidden)."""
        states = attend_to_hours(self.encoder, self.projection(values).relu(), mask) * mask[..., None]
        return StayFeatures(states[:, 0], states)


class StarAttention(nn.Module):
    """Multi-head attention of one query over a few places; keys and values are made once and gathered."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, query: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One query per row looks at its places.

        Args:
            query: (rows, hidden).
            places: (rows, places, 2 × hidden), of `key_value`.
            mask: (rows, places) bool, what may be looked at.

        Returns:
            (rows, hidden).
        """
        heads = (self.num_heads, query.shape[1] // self.num_heads)
        key, value = (part.unflatten(2, heads).transpose(1, 2) for part in places.chunk(2, dim=2))
        attended = nn.functional.scaled_dot_product_attention(
            self.query(query)[:, None].unflatten(2, heads).transpose(1, 2), key, value,
            attn_mask=None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.output(attended.flatten(1))


class StarTransformer(nn.Module):
    """Star-Transformer over hours (Guo et al. 2019; Yang & Wu 2021, `Star`).

    Each cycle an hour looks at itself, its two neighbours (the last hour is next to the first), its input and the
    relay; then the relay looks at itself and all hours. The two share their start in the authors' code only.
    """

    def __init__(self, config, output_size: int):
        super().__init__()
        width, sizes = config.hidden_size, (config.num_attention_heads, config.attention_probs_dropout_prob)
        self.projection = nn.Linear(config.num_hourly_features, width)
        self.satellite, self.relay = StarAttention(width, *sizes), StarAttention(width, *sizes)
        self.satellite_norm, self.relay_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.output = nn.Linear(width, output_size)
        self.cycles = config.num_hidden_layers

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> StayFeatures:
        """Hours → the vector of each stay, (stays, output)."""
        inputs = self.projection(values).relu() * mask[..., None]
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        neighbours, states, relay = self._neighbours(mask, lengths), inputs, inputs.sum(dim=1) / lengths
        anchors = self.satellite.key_value(inputs)
        seen = nn.functional.pad(mask, (1, 0), value=True)
        for _ in range(self.cycles):
            states = self._cycle(states, relay, anchors, neighbours) * mask[..., None]
            hours = self.relay.key_value(torch.cat([relay[:, None], states], dim=1))
            relay = self.relay_norm(self.relay(relay, hours, seen).relu())
        return StayFeatures(self.output(states.sum(dim=1) / lengths + relay), states)

    def _cycle(self, states, relay, anchors, neighbours) -> torch.Tensor:
        own = self.satellite.key_value(states)
        before, after = (own.gather(1, index[..., None].expand(own.shape)) for index in neighbours)
        shared = self.satellite.key_value(relay)[:, None].expand(own.shape)
        places = torch.stack([before, own, after, anchors, shared], dim=2).flatten(0, 1)
        attended = self.satellite(states.flatten(0, 1), places).view(states.shape)
        return self.satellite_norm(attended.relu())

    @staticmethod
    def _neighbours(mask, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Places (stays, hours) of the hours before and after, in a circle over the hours of the stay."""
        places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        return (places - 1) % lengths, (places + 1) % lengths


@torch.no_grad()
def init_series_layer(module: nn.Module) -> None:
    """PyTorch's own start of these layers, with which the authors trained, for `_init_weights`."""
    bound = 0.0
    if isinstance(module, nn.LSTM | nn.GRUCell):
        bound = module.hidden_size**-0.5
    elif isinstance(module, nn.Linear | nn.Conv1d):
        bound = module.weight[0].numel() ** -0.5
    if bound:
        for weight in module.parameters(recurse=False):
            init.uniform_(weight, -bound, bound)
