"""The sequence baselines of the papers of Med-BERT and MedHMP on code embeddings.

    codes ─ code + visit embeddings ─────────────────┐
                                                     ├─▶ steps ─ head ─▶ patient vector ─▶ classifier
    codes ─ code embeddings, Σ per visit (─ MLP) ────┘

    head: GRU │ Bi-GRU │ RETAIN │ LSTM │ Dipole │ AdaCare │ HiTANet

The heads are those that Med-BERT takes (`modeling_heads.py`); here they read embeddings instead of its states.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ehrrnn import EhrRnnConfig
from .modeling_ehr import packed_borders
from .modeling_heads import EhrClassifierOutput, PatientClassifierMixin, init_head, new_head
from .modeling_steps import HeadOutput, Steps


@dataclass
class EhrRnnModelOutput(ModelOutput):
    """Output of [`EhrRnnModel`].

    Attributes:
        last_hidden_state: (patients, steps, features), the state after each step, 0 on padding; for RETAIN what the
            step adds to `pooler_output`. Steps are the columns of padded `input_ids`, the codes of a packed patient,
            or the visits at level `visit`.
        pooler_output: (patients, features), one vector per patient.
        head_alpha: (patients, steps), the head's weights of the steps, see [`EhrClassifierOutput`]; pooling heads
            (`lstm`, `adacare`) and the others but `gru` and `bigru` have them.
        head_beta: (patients, steps, gates), the gates of `retain` and `adacare`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    head_alpha: torch.Tensor | None = None
    head_beta: torch.Tensor | None = None


class VisitTable(nn.Embedding):
    """Embeddings of visits, which start small: as large as those of codes they would be noise as loud as the codes."""


class VisitMlp(nn.Module):
    """MedHMP's code encoder `Linear(V, d)·LN·ReLU·Linear(d, d)·LN·ReLU` behind its first product.

    A row of 0 and 1 times `Linear(V, d).weight.T` is the sum of the rows of the visit's codes, which arrives here.
    """

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(size))
        self.norm = nn.LayerNorm(size)
        self.dense = nn.Linear(size, size)
        self.dense_norm = nn.LayerNorm(size)

    def forward(self, sums: torch.Tensor) -> torch.Tensor:
        """(visits, size) → the same shape."""
        return self.dense_norm(self.dense(self.norm(sums + self.bias).relu())).relu()


class EhrRnnEmbeddings(nn.Module):
    """Codes → steps with dropout; the table of visits is absent at level `visit`, the MLP elsewhere."""

    def __init__(self, config: EhrRnnConfig):
        super().__init__()
        self.code_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.by_visit = config.level == "visit"
        if not self.by_visit:
            self.visit_embeddings = VisitTable(config.max_visits, config.embedding_size)
        self.visit_encoder = VisitMlp(config.embedding_size) if config.visit_encoder == "mlp" else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids, visit_ids, attention_mask=None, packed=None, inputs_embeds=None, day_ids=None
    ) -> Steps:
        """Ids (batch, sequence) → one step per code, or per visit."""
        embedded = self.code_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if not self.by_visit:
            embedded = embedded + self.visit_embeddings(visit_ids)
        steps = Steps.of(embedded, attention_mask, packed, day_ids)
        if self.by_visit:
            visits = visit_ids[0] if packed is not None else visit_ids.flatten()[steps.places]
            steps = steps.sums(visits)
        return steps._replace(states=self.dropout(self.visit_encoder(steps.states)))


class EhrRnnPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: EhrRnnConfig
    base_model_prefix = "model"
    _no_split_modules = [  # noqa: RUF012 - library's form
        *("EhrRnnEmbeddings", "GruHead", "RetainHead", "LstmHead", "DipoleHead", "AdaCareHead", "HiTANetHead"),
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_head(module)
        if isinstance(module, nn.Embedding):
            # The norm behind an MLP's sums takes their size away, and steps of AdamW are large beside small weights.
            quiet = isinstance(module, VisitTable) or self.config.visit_encoder == "mlp"
            init.normal_(module.weight, std=self.config.initializer_range if quiet else 1.0)
        if isinstance(module, VisitMlp):
            init.zeros_(module.bias)

    def get_input_embeddings(self):
        """The code embeddings."""
        return self._embeddings().code_embeddings

    def set_input_embeddings(self, value):
        """Replaces the code embeddings."""
        self._embeddings().code_embeddings = value

    def _embeddings(self):
        return getattr(self, self.base_model_prefix, self).embeddings


class EhrRnnModel(EhrRnnPreTrainedModel):
    """Codes of patients → one vector per patient."""

    def __init__(self, config: EhrRnnConfig):
        super().__init__(config)
        self.embeddings = EhrRnnEmbeddings(config)
        dipole = {"attention": config.dipole_attention, "bidirectional": config.dipole_bidirectional}
        self.head = new_head(config.head, config.embedding_size, config.hidden_size, **dipole)
        self.post_init()

    def encode(
        self, input_ids, attention_mask, visit_ids, cu_seqlens, max_seqlen, inputs_embeds, day_ids
    ) -> HeadOutput:
        """As `forward`, in the heads' own form: without padding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        codes = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        packed = packed_borders(codes, attention_mask, cu_seqlens, max_seqlen)
        if visit_ids is None:
            visit_ids = torch.ones(codes.shape, dtype=torch.long, device=codes.device)
        return self.head(self.embeddings(input_ids, visit_ids, attention_mask, packed, inputs_embeds, day_ids))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visit_ids: torch.Tensor | None = None,
        serial_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        day_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> EhrRnnModelOutput:
        """Encodes patients.

        Args:
            input_ids: (batch, sequence) code ids, or (1, total) when packed.
            attention_mask: (batch, sequence), 1 for codes and 0 for padding; padded input only.
            visit_ids: As `input_ids`; 1 is the first visit, 0 padding. All codes in visit 1 when `None`.
            serial_ids: Not read; here so that the batches of Med-BERT fit.
            cu_seqlens: (patients + 1,) int32 borders of a packed row.
            max_seqlen: Longest patient of a packed row.
            inputs_embeds: (batch, sequence, embedding) in place of the code embeddings.
            day_ids: As `input_ids`, 1 + days since the patient's first visit, 0 where unknown; read by `hitanet`.
            **kwargs: Not read.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, a packed batch that also has a mask, or no
                `day_ids` for a head that reads them.
        """
        head = self.encode(input_ids, attention_mask, visit_ids, cu_seqlens, max_seqlen, inputs_embeds, day_ids)
        return EhrRnnModelOutput(
            last_hidden_state=head.steps.rectangle(head.states), pooler_output=head.features, **head.attention()
        )


class EhrRnnForSequenceClassification(PatientClassifierMixin, EhrRnnPreTrainedModel):
    """Patient classification by a recurrent model."""

    def __init__(self, config: EhrRnnConfig):
        super().__init__(config)
        self.model = EhrRnnModel(config)
        self.add_classifier(self.model.head.num_features)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visit_ids: torch.Tensor | None = None,
        serial_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        day_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EhrClassifierOutput:
        """Scores patients; inputs as in [`EhrRnnModel`].

        Args:
            labels: (patients,) class index, or (patients, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
        """
        head = self.model.encode(input_ids, attention_mask, visit_ids, cu_seqlens, max_seqlen, inputs_embeds, day_ids)
        return self.classify(head.features, head, labels, num_items_in_batch)


EhrRnnModel.register_for_auto_class("AutoModel")
EhrRnnForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
