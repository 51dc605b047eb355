"""Codes of a visit predicted from vectors of it: heads, targets and the two losses of G-BERT and MedM-PLM."""

from typing import NamedTuple

import torch
from torch import nn

from .modeling_masked_codes import indicators

IGNORED = -100


class CodePredictionHead(nn.Module):
    """A vector of a visit → scores of all codes of a kind: Linear, ReLU, Linear."""

    def __init__(self, size: int, num_codes: int):
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.decoder = nn.Linear(size, num_codes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(…, size) → (…, num_codes)."""
        return self.decoder(self.dense(states).relu())


def predicted(heads: nn.ModuleList, states) -> torch.Tensor:
    """What each head says of the vector that it reads → (…, heads, num_codes)."""
    return torch.stack([head(state) for head, state in zip(heads, states, strict=True)], dim=-2)


class CodeTargets(NamedTuple):
    """What is to be predicted of the codes of one kind; columns are ids without the special tokens."""

    positives: torch.Tensor
    """(visits, codes) bool."""
    counted: torch.Tensor
    """(visits, codes) bool: what the loss is over."""
    there: torch.Tensor
    """(visits,) bool: the visits that have a target."""

    @classmethod
    def of(cls, ids: torch.Tensor, labels: torch.Tensor | None, vocab_size: int, num_special_tokens: int, loss: str):
        """Targets of sets of codes.

        Args:
            ids: (visits, codes), what the model is shown.
            labels: Of the same shape, the true code where one was chosen, -100 elsewhere; `None` where none was.
            vocab_size: Ids of this kind, special tokens included.
            num_special_tokens: The first ids, which are no targets.
            loss: `visit_bce` or `masked_ce` of [`GBertConfig`].

        Raises:
            ValueError: The labels do not have the shape of the ids.
        """
        labels = torch.full_like(ids, IGNORED) if labels is None else labels
        if labels.shape != ids.shape:
            raise ValueError(
                f"Labels of codes must have the shape {tuple(ids.shape)} of their ids, got {tuple(labels.shape)}. "
                "Give the true id where a code was chosen, and -100 elsewhere."
            )
        chosen, first = labels != IGNORED, num_special_tokens
        true = torch.where(chosen, labels, ids)
        columns, codes = (true - first).clamp(min=0), true >= first
        everything = indicators(columns, codes, vocab_size - first)
        if loss == "visit_bce":
            return cls(everything, torch.ones_like(everything), everything.any(dim=1))
        # A code that stands twice is hidden where it is hidden each time.
        visible = indicators(columns, codes & ~chosen, vocab_size - first)
        hidden = everything & ~visible
        return cls(hidden, ~visible, hidden.any(dim=1))


def code_prediction_loss(logits: torch.Tensor, targets: CodeTargets, sources: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, the mean over the counted codes of a visit and then over visits.

    Args:
        logits: (visits, codes).
        targets: What they should say.
        sources: (visits,) bool, which visits have what the scores were made from.

    Returns:
        Scalar in fp32; 0 where no visit has both a source and a target.
    """
    cells = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets.positives.float(), reduction="none")
    losses = (cells * targets.counted).sum(dim=1) / targets.counted.sum(dim=1).clamp(min=1)
    visits = (targets.there & sources).float()
    return (losses * visits).sum() / visits.sum().clamp(min=1)
