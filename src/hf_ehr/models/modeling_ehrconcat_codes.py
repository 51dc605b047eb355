"""Med-BERT over visits whose diagnoses and medications come apart: both become one sequence of its own codes."""

from typing import Any

import torch
from torch import nn

from .modeling_medbert import MedBertModel


class MedBertOfVisits(nn.Module):
    """Diagnoses and medications of visits → Med-BERT's pooled vector, 0 where there is no code.

    Of a patient with more codes than Med-BERT has places the last ones are read.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.medbert = MedBertModel(config.medbert_config)
        self.config = config

    def admissions(self, diagnosis_ids: torch.Tensor | None, medication_ids: torch.Tensor) -> torch.Tensor:
        """Sets of codes (…, codes), each an admission of its own → (…, hidden)."""
        codes = torch.cat(self._mapped(diagnosis_ids, medication_ids), dim=-1)
        found = self._pooled(codes.flatten(0, -2), torch.ones_like(codes.flatten(0, -2)))
        return found.unflatten(0, codes.shape[:-1])

    def histories(self, diagnosis_ids: torch.Tensor, medication_ids: torch.Tensor) -> torch.Tensor:
        """Sets (batch, visits, codes) → (batch, visits, hidden): the visits before each, and its own diagnoses."""
        parts = self._mapped(diagnosis_ids, medication_ids)
        # The diagnoses come first; of its own visit a patient shows nothing else.
        own = torch.cat([torch.full_like(part, kind == 0, dtype=torch.bool) for kind, part in enumerate(parts)], -1)
        batch, visits = own.shape[:2]
        numbers = torch.arange(visits, device=own.device)
        earlier = (numbers < numbers[:, None])[None, :, :, None]
        same = (numbers == numbers[:, None])[None, :, :, None]
        seen = earlier | (same & own[:, None])  # (batch, asked visit, read visit, codes)
        codes = torch.where(seen, torch.cat(parts, dim=-1)[:, None], -1)
        limit = self.config.medbert_config.max_visits - 1
        number = (numbers + 1).clamp(max=limit)[:, None].expand_as(codes)
        return self._pooled(codes.flatten(2).flatten(0, 1), number.flatten(2).flatten(0, 1)).unflatten(
            0, (batch, visits)
        )

    def _mapped(self, diagnosis_ids, medication_ids) -> list[torch.Tensor]:
        """Med-BERT's ids, -1 on padding; diagnoses first."""
        kinds = [(self.config.medication_map, medication_ids)]
        if self.config.read_diagnoses:
            kinds.insert(0, (self.config.diagnosis_map, diagnosis_ids))
        return [
            torch.tensor(ids, device=given.device)[given].masked_fill(given == self.config.pad_token_id, -1)
            for ids, given in kinds
        ]

    def _pooled(self, codes: torch.Tensor, visit_ids: torch.Tensor) -> torch.Tensor:
        """Codes (rows, places), -1 where there is none → (rows, hidden)."""
        there = codes >= 0
        from_end = there.flip(1).cumsum(1).flip(1)
        there &= from_end <= self.config.medbert_config.max_position_embeddings
        rows = there.any(dim=1).nonzero().squeeze(1)
        every = self.medbert.embeddings.code_embeddings.weight.new_zeros(len(codes), self.medbert.config.hidden_size)
        if not len(rows):
            return every
        lengths = there[rows].sum(dim=1)
        pooled = self.medbert(
            codes[there][None],
            visit_ids=visit_ids[there][None],
            cu_seqlens=nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            max_seqlen=int(lengths.max()),
        ).pooler_output
        return every.to(pooled.dtype).index_copy(0, rows, pooled)
