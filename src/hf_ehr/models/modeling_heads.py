"""Sequence heads: from the states of a patient's steps (codes or visits) to one vector, and from there to logits.

    states, padded or packed ─▶ Steps ─ GRU │ Bi-GRU │ RETAIN ─▶ patient vector ─ dropout, linear ─▶ logits, loss

Recurrences run over the steps of all patients at once, longest patient first, so that padding costs nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from transformers import initialization as init
from transformers.utils import ModelOutput

from .modeling_ehr import PackedSequences


@dataclass
class EhrClassifierOutput(ModelOutput):
    """Output of the patient classifiers.

    Attributes:
        loss: Scalar, only with `labels`.
        logits: (patients, num_labels).
        pooler_output: (patients, features), what the last layer reads (before its dropout).
        hidden_states: One (batch, sequence, hidden) per layer and for the embeddings.
        attentions: One (batch, heads, sequence, sequence) per layer (eager attention only).
        head_alpha: (patients, steps), RETAIN's weights of the steps; they sum to 1 and are 0 on padding.
        head_beta: (patients, steps, state), RETAIN's gates in (-1, 1), 0 on padding.
        contributions: (patients, steps, num_labels), what each step adds to each logit:
            `contributions.sum(1) + classifier.bias` are the logits.

    The last three are there for RETAIN in evaluation mode, `None` otherwise. Padded input: `steps` are the columns of
    `input_ids`. Packed input: step t of a patient is its t-th code. Steps that are visits: its t-th visit.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    head_alpha: torch.Tensor | None = None
    head_beta: torch.Tensor | None = None
    contributions: torch.Tensor | None = None


class Steps(NamedTuple):
    """The steps of all patients of a batch, end to end and without padding."""

    states: torch.Tensor
    """(total, features)."""
    packed: PackedSequences
    places: torch.Tensor
    """(total,) int64: where each step lies in the flattened (patients, width) rectangle of the batch."""
    shape: tuple[int, int]

    @classmethod
    def of(cls, states, attention_mask=None, packed: PackedSequences | None = None) -> "Steps":
        """The valid steps of padded states (batch, sequence, features) or of packed ones (1, total, features)."""
        if packed is not None:
            patients, width = len(packed.cu_seqlens) - 1, packed.max_seqlen
            return cls(states[0], packed, packed.segment_ids * width + packed.positions(), (patients, width))
        patients, width = states.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(patients, width, device=states.device)
        places = attention_mask.flatten().nonzero().squeeze(1)
        owners = places // width
        return cls(states.flatten(0, 1).index_select(0, places), _borders(owners, patients), places, (patients, width))

    def sums(self, visit_ids: torch.Tensor) -> "Steps":
        """One step per visit, the sum of its steps; `visit_ids` (total,), neighbours of one visit have equal ids."""
        owners = self.packed.segment_ids
        begins = torch.ones_like(visit_ids, dtype=torch.bool)
        begins[1:] = (visit_ids[1:] != visit_ids[:-1]) | (owners[1:] != owners[:-1])
        owners = owners[begins]
        sums = self.states.new_zeros(len(owners), self.states.shape[1])
        sums = sums.index_add(0, begins.cumsum(0) - 1, self.states)
        return Steps.of(sums[None], packed=_borders(owners, self.shape[0]))

    def rectangle(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Values of the steps (total, …) → (patients, width, …), `fill` where there is no step."""
        flat = values.new_full((self.shape[0] * self.shape[1], *values.shape[1:]), fill)
        return flat.index_copy(0, self.places, values).unflatten(0, self.shape)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the steps (total, features) → their sum for each patient, (patients, features)."""
        return values.new_zeros(self.shape[0], values.shape[1]).index_add(0, self.packed.segment_ids, values)


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

    def run(self, gru: nn.GRU, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patient from a zero state, in the precision of the weights.

        Args:
            gru: One layer, one direction.
            states: (total, input), steps of the patients end to end.

        Returns:
            The state after each step, (total, hidden), where `states` has the step; and the state each patient ends
            in, (patients, hidden), zero for one without steps.
        """
        states = states.to(gru.all_weights[0][0].dtype)
        inputs = torch.empty_like(states).index_copy(0, self.rows, states)
        with torch.autocast(states.device.type, enabled=False):
            outputs, ends = (fused_gru if states.is_cuda else stepwise_gru)(gru, inputs, self.batch_sizes)
        last = ends.new_zeros(len(self.order), ends.shape[1]).index_copy(0, self.order[: len(ends)], ends)
        return outputs.index_select(0, self.rows), last


def fused_gru(gru: nn.GRU, inputs: torch.Tensor, batch_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States (total, hidden) and last states (patients, hidden) of time-major `inputs`, by PyTorch's own kernel."""
    outputs, ends = gru(PackedSequence(inputs, batch_sizes))
    return outputs.data, ends[0]


def stepwise_gru(gru: nn.GRU, inputs: torch.Tensor, batch_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused_gru`, which on the CPU fills a gradient of the size of all steps with zeros for every step.

    Here the inputs are split once, and the backward of that is one concatenation.
    """
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


class HeadOutput(NamedTuple):
    """What a head makes of the steps."""

    features: torch.Tensor
    """(patients, features)."""
    steps: Steps
    states: torch.Tensor
    """(total, features): the state after each step; for RETAIN what the step adds to `features`."""
    alpha: torch.Tensor | None = None
    """(total,), RETAIN only."""
    beta: torch.Tensor | None = None
    """(total, state), RETAIN only."""

    def attention(self) -> dict[str, torch.Tensor]:
        """RETAIN's `head_alpha` (patients, steps) and `head_beta` (patients, steps, state); empty for a GRU."""
        if self.alpha is None or self.beta is None:
            return {}
        return {"head_alpha": self.steps.rectangle(self.alpha), "head_beta": self.steps.rectangle(self.beta)}

    def contributions(self, classifier: nn.Linear) -> dict[str, torch.Tensor]:
        """RETAIN's `contributions` (patients, steps, labels): α_j W (β_j ⊙ v_j), its eq. 5; empty for a GRU."""
        if self.alpha is None:
            return {}
        weight = classifier.weight.to(self.states.dtype)
        return {"contributions": self.steps.rectangle(nn.functional.linear(self.states, weight))}


class GruHead(nn.Module):
    """GRU over the steps; the patient's vector is its last state, with a second GRU in reverse time that one's too."""

    def __init__(self, input_size: int, hidden_size: int, bidirectional: bool = False):
        super().__init__()
        self.gru = nn.GRU(input_size, hidden_size)
        self.reverse_gru = nn.GRU(input_size, hidden_size) if bidirectional else None
        self.num_features = hidden_size * (2 if bidirectional else 1)

    def forward(self, steps: Steps) -> HeadOutput:
        """Steps → the patients' vectors, (patients, features)."""
        states, last = TimeMajor.of(steps.packed).run(self.gru, steps.states)
        if self.reverse_gru is not None:
            reverse_states, first = TimeMajor.of(steps.packed, reverse=True).run(self.reverse_gru, steps.states)
            states, last = torch.cat([states, reverse_states], dim=1), torch.cat([last, first], dim=1)
        return HeadOutput(last, steps, states)


class RetainLinear(nn.Linear):
    """A layer of RETAIN's attention, which its authors start within ±0.1 (`get_random_weight` in their retain.py)."""


class RetainHead(nn.Module):
    """RETAIN (Choi et al., NeurIPS 2016, section 2.2): two GRUs in reverse time weigh the steps themselves.

        g, h = GRU_α, GRU_β over v_n … v_1;   α = softmax_j(w·g_j);   β_j = tanh(W h_j + b);   c = Σ_j α_j β_j ⊙ v_j

    The paper's bias beside `w·g_j` is left out: it shifts all scores alike, and the softmax takes it away.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.alpha_gru = nn.GRU(input_size, hidden_size)
        self.beta_gru = nn.GRU(input_size, hidden_size)
        self.alpha = RetainLinear(hidden_size, 1, bias=False)
        self.beta = RetainLinear(hidden_size, input_size)
        self.num_features = input_size

    def forward(self, steps: Steps) -> HeadOutput:
        """Steps → the patients' vectors c, (patients, input)."""
        reverse = TimeMajor.of(steps.packed, reverse=True)
        scores = self.alpha(reverse.run(self.alpha_gru, steps.states)[0]).squeeze(1).float()
        weights = steps.rectangle(scores, fill=torch.finfo(scores.dtype).min).softmax(dim=1)
        alpha = weights.flatten().index_select(0, steps.places)
        beta = self.beta(reverse.run(self.beta_gru, steps.states)[0]).tanh()
        weighted = alpha[:, None] * beta * steps.states  # in fp32, like alpha: long sums lose steps in half precision
        return HeadOutput(steps.total(weighted).to(steps.states.dtype), steps, weighted, alpha, beta)


def new_head(name: str, input_size: int, hidden_size: int) -> GruHead | RetainHead:
    """The head of a configuration: `gru`, `bigru` or `retain`."""
    if name == "retain":
        return RetainHead(input_size, hidden_size)
    return GruHead(input_size, hidden_size, bidirectional=name == "bigru")


def init_head(module: nn.Module) -> None:
    """Starting weights of the heads, for `_init_weights`: the library leaves a GRU as it lies in memory."""
    if isinstance(module, nn.GRU):  # PyTorch's own start
        bound = module.hidden_size**-0.5
        for weight in module.parameters():
            init.uniform_(weight, -bound, bound)
    if isinstance(module, RetainLinear):
        init.uniform_(module.weight, -0.1, 0.1)


class PatientClassifierMixin:
    """What the classifiers of all families share: the last layer, the loss, and the output."""

    config: Any
    training: bool

    def add_classifier(self, num_features: int) -> None:
        """Makes the last layer; `num_features` is the width of the patients' vectors."""
        config = self.config
        self.num_labels = len(config.id2label or ())
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(num_features, self.num_labels)

    def classify(
        self, features: torch.Tensor, head: HeadOutput | None, labels=None, num_items=None, **fields
    ) -> EhrClassifierOutput:
        """Patients' vectors → logits, loss and, in evaluation mode, the head's attention; `fields` go through."""
        logits = self.classifier(self.dropout(features))
        if head is not None and not self.training:  # dropout would make the contributions those of another logit
            fields |= head.attention() | head.contributions(self.classifier)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items)
        return EhrClassifierOutput(loss=loss, logits=logits, pooler_output=features, **fields)


def classification_loss(logits, labels, problem_type: str | None = None, num_items=None) -> torch.Tensor:
    """Cross-entropy over classes, or binary cross-entropy over labels.

    Args:
        logits: (patients, num_labels).
        labels: (patients,) class index, or (patients, num_labels) of 0 and 1 under `multi_label_classification`.
        problem_type: As in the configuration.
        num_items: Number of labels of the whole accumulated batch; the loss is the sum over it. Default: the mean.

    Returns:
        Scalar in fp32.
    """
    reduction = "mean" if num_items is None else "sum"
    if problem_type == "multi_label_classification":
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction=reduction)
    else:
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction=reduction)
    return loss if num_items is None else loss / num_items
