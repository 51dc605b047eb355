"""The layers of models that join notes and stays of an admission: text encoder, hours, and the gate between them."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel

from .configuration_ehrfusion import EhrFusionConfig
from .modeling_ehr import pool_states
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


class NoteEncoder(nn.Module):
    """Notes of admissions as vectors: from a text encoder, or computed before."""

    def __init__(self, config: EhrFusionConfig):
        super().__init__()
        self.size, self.pooling = config.note_size, config.note_pooling
        self.encoder: Any = None
        if config.note_config is None:
            return
        model = AutoModel.from_config(config.note_config)
        self.encoder = model.get_encoder() if hasattr(model, "decoder") else model
        if self.pooling == "pooler" and getattr(self.encoder, "pooler", None) is None:
            raise ValueError(
                f"`note_pooling` must be 'mean' for {type(self.encoder).__name__}, which has no pooler, got 'pooler'. "
                "Change it."
            )
        self._drop_pooler()

    def _drop_pooler(self) -> None:
        if self.pooling == "mean" and getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # nothing would read it, and it would get no gradient

    def take_from(self, model: nn.Module) -> None:
        """Takes the part of a text model that is the encoder."""
        self.encoder = next(part for part in model.modules() if type(part) is type(self.encoder))
        self._drop_pooler()

    def forward(self, note_input_ids, note_attention_mask, note_vectors, note_mask) -> Modality:
        """Notes as the batch has them → one vector per admission."""
        if self.encoder is None:
            return self._given(note_vectors, note_mask)
        if note_input_ids is None:
            raise ValueError(
                "`note_input_ids` must be given, (admissions, tokens), got None. Pass rows of padding where there is "
                "no note, or make the model without `note_config` for `note_vectors`."
            )
        mask = torch.ones_like(note_input_ids) if note_attention_mask is None else note_attention_mask
        present = mask.any(dim=1)
        readable = mask.clone()
        readable[:, 0] |= ~present  # attention over nothing has no value
        output = self.encoder(input_ids=note_input_ids, attention_mask=readable)
        if self.pooling == "pooler":
            vectors = output.pooler_output
        else:
            vectors = pool_states(output.last_hidden_state, "mean", readable)
        return Modality(vectors * present[:, None], present)

    def _given(self, vectors, present) -> Modality:
        given = None if vectors is None else tuple(vectors.shape)
        if given is None or given[1:] != (self.size,):
            raise ValueError(
                f"`note_vectors` must have shape (admissions, {self.size}) (`note_size`), got {given}. Compute them "
                "with one encoder for all admissions; zeros with `note_mask` False where there is no note."
            )
        present = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device) if present is None else present
        return Modality(vectors.masked_fill(~present.bool()[:, None], 0), present.bool())


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
