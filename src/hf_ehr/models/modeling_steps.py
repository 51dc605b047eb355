"""The steps of patients (codes or visits) end to end, and the order in which recurrences read them.

    states, padded or packed ─▶ Steps ─ head ─▶ HeadOutput

Recurrences run over the steps of all patients at once, longest patient first, so that padding costs nothing.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .modeling_ehr import PackedSequences


class Steps(NamedTuple):
    """The steps of all patients of a batch, end to end and without padding."""

    states: torch.Tensor
    """(total, features)."""
    packed: PackedSequences
    places: torch.Tensor
    """(total,) int64: where each step lies in the flattened (patients, width) rectangle of the batch."""
    shape: tuple[int, int]
    day_ids: torch.Tensor | None = None
    """(total,) int64: 1 + days since the patient's first visit, 0 where unknown."""

    @classmethod
    def of(cls, states, attention_mask=None, packed: PackedSequences | None = None, day_ids=None) -> "Steps":
        """The valid steps of padded states (batch, sequence, features) or of packed ones (1, total, features)."""
        if packed is not None:
            patients, width = len(packed.cu_seqlens) - 1, packed.max_seqlen
            places = packed.segment_ids * width + packed.positions()
            return cls(states[0], packed, places, (patients, width), None if day_ids is None else day_ids[0])
        patients, width = states.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(patients, width, device=states.device)
        places = attention_mask.flatten().nonzero().squeeze(1)
        owners = places // width
        days = None if day_ids is None else day_ids.flatten()[places]
        valid = states.flatten(0, 1).index_select(0, places)
        return cls(valid, _borders(owners, patients), places, (patients, width), days)

    def sums(self, visit_ids: torch.Tensor) -> "Steps":
        """One step per visit, the sum of its steps; `visit_ids` (total,), neighbours of one visit have equal ids."""
        owners = self.packed.segment_ids
        begins = torch.ones_like(visit_ids, dtype=torch.bool)
        begins[1:] = (visit_ids[1:] != visit_ids[:-1]) | (owners[1:] != owners[:-1])
        owners = owners[begins]
        sums = self.states.new_zeros(len(owners), self.states.shape[1])
        sums = sums.index_add(0, begins.cumsum(0) - 1, self.states)
        days = None if self.day_ids is None else self.day_ids[begins][None]
        return Steps.of(sums[None], packed=_borders(owners, self.shape[0]), day_ids=days)

    def rectangle(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Values of the steps (total, …) → (patients, width, …), `fill` where there is no step."""
        flat = values.new_full((self.shape[0] * self.shape[1], *values.shape[1:]), fill)
        return flat.index_copy(0, self.places, values).unflatten(0, self.shape)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the steps (total, features) → their sum for each patient, (patients, features)."""
        return values.new_zeros(self.shape[0], values.shape[1]).index_add(0, self.packed.segment_ids, values)

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the steps (total,) → weights (total,) float32 that sum to 1 over the steps of each patient."""
        scores = scores.float()
        weights = self.rectangle(scores, fill=torch.finfo(scores.dtype).min).softmax(dim=1)
        return weights.flatten().index_select(0, self.places)

    def maxima(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the steps (total, features) → each patient's greatest, (patients, features); 0 without steps."""
        owners = self.packed.segment_ids[:, None].expand_as(values)
        empty = values.new_zeros(self.shape[0], values.shape[1])
        return empty.scatter_reduce(0, owners, values, "amax", include_self=False)

    def last(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the steps (total, features) → those of each patient's last step, (patients, features)."""
        ends = self.packed.cu_seqlens[1:].long() - 1
        has_steps = self.packed.cu_seqlens.diff() > 0
        return values.index_select(0, ends.clamp(min=0)) * has_steps[:, None]

    def before(self, lag: int) -> torch.Tensor:
        """The states `lag` steps earlier, (total, features); 0 where a patient has no step there."""
        return self.states.roll(lag, 0) * (self.packed.positions() >= lag)[:, None]

    def days_to_last(self) -> torch.Tensor:
        """(total,) float32: days from each step to the patient's last visit; 0 where the day of a step is unknown.

        Raises:
            ValueError: The batch has no `day_ids`.
        """
        if self.day_ids is None:
            raise ValueError(
                "`day_ids` must be given to a head that reads time, got None. Build the examples with a tokenizer "
                "that has `days=True`."
            )
        owners = self.packed.segment_ids
        last = self.day_ids.new_zeros(self.shape[0]).scatter_reduce(0, owners, self.day_ids, "amax")
        return ((last[owners] - self.day_ids) * (self.day_ids > 0)).float()


def _borders(owners: torch.Tensor, patients: int) -> PackedSequences:
    """The borders of patients from the (ascending) patient of each step, (total,)."""
    lengths = owners.bincount(minlength=patients)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return PackedSequences(cu_seqlens, int(lengths.max()), owners)


class TimeMajor(NamedTuple):
    """The order in which a recurrence reads steps: the first step of all patients, then the second of all, …"""

    rows: torch.Tensor
    """(total,) int64: the place of each step in that order."""
    batch_sizes: torch.Tensor
    """(longest,) int64 on the CPU: how many patients have a t-th step."""
    order: torch.Tensor
    """(patients,) int64: patients by falling number of steps."""

    @classmethod
    def of(cls, packed: PackedSequences, reverse: bool = False) -> "TimeMajor":
        """The order for these patients; `reverse` begins with the last step of each."""
        lengths = packed.cu_seqlens.diff().long()
        order = lengths.argsort(descending=True, stable=True)
        # The number of patients longer than t, for every t: the kernels want it on the CPU.
        batch_sizes = len(lengths) - lengths.bincount().cumsum(0)[:-1]
        time = packed.positions()
        if reverse:
            time = lengths[packed.segment_ids] - 1 - time
        starts = batch_sizes.cumsum(0) - batch_sizes
        rows = starts[time] + order.argsort()[packed.segment_ids]
        return cls(rows, batch_sizes.cpu(), order)

    def run(self, rnn: nn.GRU | nn.LSTM, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patient from a zero state, in the precision of the weights.

        Args:
            rnn: One layer, one direction.
            states: (total, input), steps of the patients end to end.

        Returns:
            The state after each step, (total, hidden), where `states` has the step; and the state each patient ends
            in, (patients, hidden), zero for one without steps.
        """
        states = states.to(rnn.all_weights[0][0].dtype)
        inputs = torch.empty_like(states).index_copy(0, self.rows, states)
        with torch.autocast(states.device.type, enabled=False):
            outputs, ends = (fused if states.is_cuda else stepwise)(rnn, inputs, self.batch_sizes)
        last = ends.new_zeros(len(self.order), ends.shape[1]).index_copy(0, self.order[: len(ends)], ends)
        return outputs.index_select(0, self.rows), last


def fused(rnn: nn.GRU | nn.LSTM, inputs: torch.Tensor, batch_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States (total, hidden) and last states (patients, hidden) of time-major `inputs`, by PyTorch's own kernel."""
    outputs, ends = rnn(PackedSequence(inputs, batch_sizes))
    return outputs.data, (ends[0] if isinstance(rnn, nn.LSTM) else ends)[0]


def stepwise(
    rnn: nn.GRU | nn.LSTM, inputs: torch.Tensor, batch_sizes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused`, which on the CPU fills a gradient of the size of all steps with zeros for every step.

    Here the inputs are split once, and the backward of that is one concatenation.
    """
    if isinstance(rnn, nn.LSTM):
        return stepwise_lstm(rnn, inputs, batch_sizes)
    return stepwise_gru(rnn, inputs, batch_sizes)


def stepwise_gru(gru: nn.GRU, inputs: torch.Tensor, batch_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`stepwise` of a GRU."""
    weight_input, weight_state, bias_input, bias_state = gru.all_weights[0]
    sizes, gates = batch_sizes.tolist(), 2 * gru.hidden_size
    state, states, ended = inputs.new_zeros(sizes[0], gru.hidden_size), [], []
    for from_input in nn.functional.linear(inputs, weight_input, bias_input).split(sizes):
        if len(from_input) < len(state):  # the shortest patients come last
            state, ends = state.tensor_split([len(from_input)])
            ended.append(ends)
        from_state = nn.functional.linear(state, weight_state, bias_state)
        reset, update = (from_input[:, :gates] + from_state[:, :gates]).sigmoid().chunk(2, dim=1)
        candidate = (from_input[:, gates:] + reset * from_state[:, gates:]).tanh()
        state = torch.lerp(candidate, state, update)
        states.append(state)
    return torch.cat(states), torch.cat([state, *reversed(ended)])


def stepwise_lstm(lstm: nn.LSTM, inputs: torch.Tensor, batch_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`stepwise` of an LSTM."""
    weight_input, weight_state, bias_input, bias_state = lstm.all_weights[0]
    sizes = batch_sizes.tolist()
    state = cell = inputs.new_zeros(sizes[0], lstm.hidden_size)
    states, ended = [], []
    for from_input in nn.functional.linear(inputs, weight_input, bias_input + bias_state).split(sizes):
        if len(from_input) < len(state):
            state, ends = state.tensor_split([len(from_input)])
            cell = cell[: len(from_input)]
            ended.append(ends)
        gates = from_input + nn.functional.linear(state, weight_state)
        enter, forget, candidate, leave = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        state = leave.sigmoid() * cell.tanh()
        states.append(state)
    return torch.cat(states), torch.cat([state, *reversed(ended)])


class HeadOutput(NamedTuple):
    """What a head makes of the steps; `attention` and `contributions` say it in the words of the models' outputs."""

    features: torch.Tensor
    """(patients, features)."""
    steps: Steps
    states: torch.Tensor
    """(total, features): the state after each step; for RETAIN what the step adds to `features`."""
    alpha: torch.Tensor | None = None
    """(total,): the weight of each step; they sum to 1 over a patient."""
    beta: torch.Tensor | None = None
    """(total, gates): gates of what enters at each step."""
    added: torch.Tensor | None = None
    """(total, features): what each step adds to `features`, where they are a sum over the steps."""

    @classmethod
    def pooled(cls, steps: Steps, states: torch.Tensor, beta: torch.Tensor | None = None) -> "HeadOutput":
        """The greatest state over the steps, feature by feature; the weight of a step is its share of the maxima."""
        features = steps.maxima(states)
        greatest = (states == features[steps.packed.segment_ids]).float()
        share = greatest / steps.total(greatest).clamp(min=1)[steps.packed.segment_ids]  # equal maxima share it
        return cls(features, steps, states, share.mean(dim=1), beta, share * states)

    def attention(self) -> dict[str, torch.Tensor]:
        """`head_alpha` (patients, steps) and `head_beta` (patients, steps, gates), those that the head has."""
        fields = {"head_alpha": self.alpha, "head_beta": self.beta}
        return {name: self.steps.rectangle(values) for name, values in fields.items() if values is not None}

    def contributions(self, classifier: nn.Linear) -> dict[str, torch.Tensor]:
        """`contributions` (patients, steps, labels) to each logit, e.g. RETAIN's eq. 5; empty without `added`."""
        if self.added is None:
            return {}
        weight = classifier.weight.to(self.added.dtype)
        return {"contributions": self.steps.rectangle(nn.functional.linear(self.added, weight))}


class HeadLinear(nn.Linear):
    """A layer of a head that starts as PyTorch starts it, within ±1/√inputs, as the heads' authors trained theirs."""
