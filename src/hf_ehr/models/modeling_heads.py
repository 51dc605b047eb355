"""Sequence heads: from the states of a patient's steps (codes or visits) to one vector, and from there to logits.

    Steps ─ GRU │ Bi-GRU │ RETAIN │ LSTM │ Dipole │ AdaCare │ HiTANet ─▶ patient vector ─ dropout, linear ─▶ logits

The last four are in `modeling_visit_heads.py`; what steps are and how recurrences read them, in `modeling_steps.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .modeling_steps import HeadLinear, HeadOutput, Steps, TimeMajor
from .modeling_visit_heads import AdaCareHead, DipoleHead, HiTANetHead, LstmHead


@dataclass
class EhrClassifierOutput(ModelOutput):
    """Output of the patient classifiers.

    Attributes:
        loss: Scalar, only with `labels`.
        logits: (patients, num_labels).
        pooler_output: (patients, features), what the last layer reads (before its dropout).
        hidden_states: One (batch, sequence, hidden) per layer and for the embeddings.
        attentions: One (batch, heads, sequence, sequence) per layer (eager attention only).
        head_alpha: (patients, steps), the head's weights of the steps; they sum to 1 and are 0 on padding. For the
            heads that pool (LSTM, AdaCare) the share of the maxima that a step holds.
        head_beta: (patients, steps, gates), 0 on padding: RETAIN's gates in (-1, 1) of the state's features, AdaCare's
            in (0, 1) of its convolutions and then of its inputs.
        contributions: (patients, steps, num_labels), what each step adds to each logit:
            `contributions.sum(1) + classifier.bias` are the logits. Not for Dipole, whose last layer is no sum.

    The last three are there in evaluation mode, for the heads that have them, `None` otherwise. Padded input: `steps`
    are the columns of `input_ids`. Packed input: step t of a patient is its t-th code. Steps that are visits: its t-th
    visit.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    head_alpha: torch.Tensor | None = None
    head_beta: torch.Tensor | None = None
    contributions: torch.Tensor | None = None


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
        alpha = steps.softmax(self.alpha(reverse.run(self.alpha_gru, steps.states)[0]).squeeze(1))
        beta = self.beta(reverse.run(self.beta_gru, steps.states)[0]).tanh()
        weighted = alpha[:, None] * beta * steps.states  # in fp32, like alpha: long sums lose steps in half precision
        return HeadOutput(steps.total(weighted).to(steps.states.dtype), steps, weighted, alpha, beta, weighted)


SequenceHead = GruHead | RetainHead | LstmHead | DipoleHead | AdaCareHead | HiTANetHead


def new_head(name: str, input_size: int, hidden_size: int, **dipole: Any) -> SequenceHead:
    """The head of a configuration by its name; `dipole` are options of [`DipoleHead`]."""
    if name in ("gru", "bigru"):
        return GruHead(input_size, hidden_size, bidirectional=name == "bigru")
    if name == "dipole":
        return DipoleHead(input_size, hidden_size, **dipole)
    others: dict[str, Any] = {"retain": RetainHead, "lstm": LstmHead, "adacare": AdaCareHead, "hitanet": HiTANetHead}
    return others[name](input_size, hidden_size)


def init_head(module: nn.Module) -> None:
    """Starting weights of the heads, for `_init_weights`: the library leaves a GRU as it lies in memory."""
    if isinstance(module, nn.RNNBase | HeadLinear):  # PyTorch's own start
        size = module.hidden_size if isinstance(module, nn.RNNBase) else module.in_features
        for weight in module.parameters():
            init.uniform_(weight, -(size**-0.5), size**-0.5)
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
