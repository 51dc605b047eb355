"""What enters Med-BERT's encoder: the sum of a code's embeddings, Med-BERT's own or BEHRT's.

BEHRT (Li et al., Scientific Reports 2020) adds the patient's age, tells neighbouring visits apart by two alternating
segments instead of by number, and gives the visit's place as fixed sinusoids.
"""

import torch
from torch import nn

from .configuration_medbert import MedBertConfig
from .modeling_ehr import sinusoids


class MedBertEmbeddings(nn.Module):
    """`LayerNorm(code + visit + serialization + age)` with dropout; without the tables that the config leaves out."""

    def __init__(self, config: MedBertConfig):
        super().__init__()
        self.config = config
        self.code_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        visits = 2 if config.visit_segments == "alternating" else config.max_visits
        self.visit_embeddings = nn.Embedding(visits, config.hidden_size)
        if config.serialization in ("global", "within_visit"):
            self.serial_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.max_age is not None:
            self.age_embeddings = nn.Embedding(config.max_age + 2, config.hidden_size)  # row 0 is an unknown age
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, visit_ids, serial_ids, inputs_embeds=None, age_ids=None):
        """Ids (batch, sequence) → (batch, sequence, hidden)."""
        embedded = self.code_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        alternating = self.config.visit_segments == "alternating"
        embedded = embedded + self.visit_embeddings((visit_ids - 1) % 2 if alternating else visit_ids)
        if serial_ids is not None:
            embedded = embedded + self.serial_embeddings(serial_ids)
        if self.config.serialization == "visit_sinusoid":
            embedded = embedded + sinusoids(visit_ids - 1, self.config.hidden_size).to(embedded.dtype)
        if self.config.max_age is not None:
            age_ids = torch.zeros_like(visit_ids) if age_ids is None else age_ids
            embedded = embedded + self.age_embeddings(age_ids.clamp(max=self.config.max_age + 1))
        return self.dropout(self.norm(embedded))
