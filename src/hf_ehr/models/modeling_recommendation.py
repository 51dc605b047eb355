"""Medication recommendation: the history of a visit, and the loss over visits (MedM-PLM Eq 11-13)."""

import torch
from torch import nn


def mean_of_earlier(states: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Of every visit the mean over the visits before it that have what is averaged, 0 where there are none.

    Args:
        states: (batch, visits, size), oldest visit first.
        there: (batch, visits) bool.

    Returns:
        (batch, visits, size). Row t holds nothing of visit t or of a later one, not even a rounding error.
    """
    weights = there[..., None].to(states.dtype)
    total = nn.functional.pad((states * weights)[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)
    return total / nn.functional.pad(weights[:, :-1], (0, 0, 1, 0)).cumsum(dim=1).clamp(min=1)


def recommendation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over the visits from the second on: means over labels, visits of a patient, patients.

    Args:
        logits: (batch, visits, labels).
        labels: Of the same shape, 0 and 1; -100 throughout a visit that is not asked about.

    Returns:
        Scalar in fp32; 0 where no visit is asked about.

    Raises:
        ValueError: The shapes differ.
    """
    if labels.shape != logits.shape:
        raise ValueError(
            f"`labels` must have the shape {tuple(logits.shape)} (batch, visits, num_labels), got "
            f"{tuple(labels.shape)}. Give 0 or 1 for each label of `config.id2label`, -100 for padding."
        )
    cells = nn.functional.binary_cross_entropy_with_logits(
        logits[:, 1:].float(), labels[:, 1:].clamp(min=0).float(), reduction="none"
    )
    asked = (labels[:, 1:, 0] >= 0).float()
    visits = asked.sum(dim=1)
    patients = (cells.mean(dim=2) * asked).sum(dim=1) / visits.clamp(min=1)
    return patients.sum() / (visits > 0).sum().clamp(min=1)
