"""Contrastive loss between modalities and the fusion of the others (MedHMP, Eq 10), over any number of admissions."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

SIMILARITY_BUDGET = 2**24
"""Similarities held at once (64 MiB in fp32), however large the batch."""


class ContrastiveViews(NamedTuple):
    """What the loss compares; rows are admissions, columns the modalities that are anchors."""

    views: torch.Tensor
    """(admissions, anchors, hidden): each modality by itself."""
    fused: torch.Tensor
    """(admissions, anchors, hidden): the admission without that modality."""
    anchors: torch.Tensor
    """(admissions, anchors) bool: the admission has this modality, and another beside it."""
    keys: torch.Tensor
    """(admissions, anchors) bool: the admission has something without this modality."""


def contrastive_loss(batch: ContrastiveViews, temperature: float, decoupled: bool = False) -> torch.Tensor:
    """Mean over anchors of −log( e^{cos(r_i, a_i∖r)/τ} / Σ_j e^{cos(r_i, a_j∖r)/τ} ), Eq 10 of MedHMP.

    A modality that is missing is no anchor, and an admission with nothing else is neither anchor nor key for it. The
    similarities are made in fp32, some rows at a time, and again in the backward pass.

    Args:
        batch: The admissions; all that are compared with each other.
        temperature: τ.
        decoupled: Whether the sum leaves out j = i, as the paper writes it; an anchor without any other key then
            counts as none. Without: InfoNCE, which the authors' code has.

    Returns:
        Scalar in fp32; 0 when there is no anchor.
    """
    total = batch.views.new_zeros((), dtype=torch.float32)
    anchors = batch.anchors
    if decoupled:
        anchors = anchors & (batch.keys.sum(dim=0) > 1)
    with torch.autocast(batch.views.device.type, enabled=False):
        queries = nn.functional.normalize(batch.views.float(), dim=-1) / temperature
        fused = nn.functional.normalize(batch.fused.float(), dim=-1)
        for column in range(anchors.shape[1]):
            keys = fused[:, column][batch.keys[:, column]]
            # Where each anchor's own key lies among the keys: every anchor is one.
            places = (batch.keys[:, column].cumsum(0) - 1)[anchors[:, column]]
            rows = max(1, SIMILARITY_BUDGET // max(len(keys), 1))
            for chunk, own in zip(queries[:, column][anchors[:, column]].split(rows), places.split(rows), strict=True):
                if len(own):
                    total = total + checkpoint(_loss_of_rows, chunk, keys, own, decoupled, use_reentrant=False)
    return total / anchors.sum().clamp(min=1)


def _loss_of_rows(queries, keys, own, decoupled: bool) -> torch.Tensor:
    """Sum over some anchors; queries (rows, hidden) by temperature, keys (keys, hidden), own (rows,)."""
    similarities = queries @ keys.t()
    positive = similarities.gather(1, own[:, None])
    if decoupled:
        similarities = similarities.scatter(1, own[:, None], -torch.inf)
    return (similarities.logsumexp(dim=1) - positive[:, 0]).sum()
