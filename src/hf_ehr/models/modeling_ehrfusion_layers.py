"""The layers of models that join notes and stays of an admission: hours, and the gate between them and the note."""

from typing import Any, NamedTuple

import torch
from torch import nn

from .configuration_ehrfusion import EhrFusionConfig
from .modeling_ehrseries_layers import (
    SeriesCnn,
    SeriesLstm,
    SeriesTransformer,
    StarTransformer,
    checked_demographics,
    window,
)


class Modality(NamedTuple):
    """One modality of the admissions."""

    vectors: torch.Tensor
    """(admissions, width), 0 where it is missing."""
    present: torch.Tensor
    """(admissions,) bool."""


class ShiftGate(nn.Module):
    """Multimodal adaptation gate (Rahman et al., ACL 2020, as Yang & Wu use it), row by row.

    w2 = σ(W[i1; i2] + b), w3 = σ(W'[i1; i3] + b'), a = W''[w2 i2; w3 i3] + b'', α = min(β ‖i1‖ / ‖a‖, 1), and the
    result is LN(i1 + α a). The authors' code takes the norms over the whole batch, so that a score depends on its
    company, and starts β at random, negative half of the time; here it starts at 1.
    """

    def __init__(self, main_size: int, other_size: int, demographics_size: int, dropout: float):
        super().__init__()
        self.other_gate = nn.Linear(main_size + other_size, 1)
        self.demographics_gate = nn.Linear(main_size + demographics_size, 1) if demographics_size else None
        self.shift = nn.Linear(other_size + demographics_size, main_size)
        self.beta = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(main_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, main, other, demographics=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Shifts the main modality.

        Args:
            main: (admissions, main).
            other: (admissions, other).
            demographics: (admissions, demographics), where the gate knows them.

        Returns:
            (admissions, main), and w2, w3 and α as (admissions, 3).
        """
        share = self.other_gate(torch.cat([main, other], dim=1)).sigmoid()
        parts, shares = [share * other], [share, torch.zeros_like(share)]
        if self.demographics_gate is not None:
            shares[1] = self.demographics_gate(torch.cat([main, demographics], dim=1)).sigmoid()
            parts.append(shares[1] * demographics)
        shift = self.shift(torch.cat(parts, dim=1))
        lengths = [part.float().norm(dim=1, keepdim=True) for part in (main, shift)]
        alpha = (self.beta * lengths[0] / lengths[1].clamp(min=1e-12)).clamp(max=1)
        shifted = self.dropout(self.norm(main + (alpha * shift).to(main.dtype)))
        return shifted, torch.cat([*shares, alpha], dim=1)


class StaysEncoder(nn.Module):
    """Stays of admissions as vectors; several of one admission are averaged."""

    def __init__(self, config: EhrFusionConfig):
        super().__init__()
        self.config = config
        self.encoder: Any
        if config.series_encoder == "lstm":
            self.encoder = SeriesLstm(config.num_hourly_features, config.hidden_size, 1, config.series_size)
        elif config.series_encoder == "cnn":
            sizes = (config.num_filters, config.cnn_depth, config.n_hours, config.series_size)
            self.encoder = SeriesCnn(config.num_hourly_features, *sizes)
        elif config.series_encoder == "star":
            self.encoder = StarTransformer(config, config.series_size)
        else:
            self.encoder = SeriesTransformer(config)
        size = config.num_demographics
        self.demographics = nn.Linear(size, config.demographics_size) if size else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, admissions: int, owners, demographics, dtype, **series) -> tuple[Modality, torch.Tensor | None]:
        """Stays → the hours of each admission and its demographics (admissions, demographics)."""
        values, mask = window(self.config, dtype, **series)
        owners = checked_owners(owners, len(mask), admissions, mask.device)
        measured = mask.any(dim=1)
        hours = mean_of_stays(self.dropout(self.encoder(values, mask).features), owners, measured, admissions)
        demographics = checked_demographics(self.config, demographics, len(mask), values.dtype)
        if demographics is None or self.demographics is None:
            return hours, None
        known = self.demographics(demographics)
        return hours, mean_of_stays(known, owners, torch.ones_like(measured), admissions).vectors


def checked_owners(owners, stays: int, admissions: int, device) -> torch.Tensor:
    """The admission of each stay, (stays,) int64; without it each stay is an admission.

    Raises:
        ValueError: It is not one per stay, or does not name admissions of the batch.
    """
    if owners is None:
        owners = torch.arange(stays, device=device)
    if owners.shape != (stays,) or (stays and not (int(owners.min()) >= 0 and int(owners.max()) < admissions)):
        raise ValueError(
            f"`stay_admissions` must give one of the {admissions} admissions for each of the {stays} stays, got shape "
            f"{tuple(owners.shape)}. There are as many admissions as rows of notes."
        )
    return owners


def mean_of_stays(vectors, owners, present, admissions: int) -> Modality:
    """Means over the stays of each admission that are `present`, 0 where there is none.

    Args:
        vectors: (stays, width).
        owners: (stays,) int64, admission of each stay.
        present: (stays,) bool.
        admissions: Number of admissions.
    """
    counts = torch.zeros(admissions, dtype=torch.long, device=owners.device).index_add(0, owners, present.long())
    total = vectors.new_zeros(admissions, vectors.shape[1]).index_add(0, owners, vectors * present[:, None])
    return Modality(total / counts.clamp(min=1)[:, None], counts > 0)
