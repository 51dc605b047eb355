"""Med-BERT (Rasmy et al., npj Digital Medicine 2021): BERT over a patient's diagnosis codes.

    codes ─ code + visit + serialization embeddings ─▶ encoder ─▶ code states (batch, sequence, hidden)
                                                                      │
                  masked rows only ─▶ code decoder (tied)  ◀──────────┤
                  pooled patient   ─▶ prolonged stay │ classifier ◀───┘

Every model takes padded input (`attention_mask`) or packed input (`cu_seqlens`); both give the same numbers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_medbert import MedBertConfig
from .modeling_ehr import (
    EhrAttention,
    EhrEncoder,
    EhrLayer,
    EhrPredictionHead,
    IdentityStartLinear,
    PackedSequences,
    packed_borders,
    pool_states,
)
from .modeling_heads import EhrClassifierOutput, PatientClassifierMixin, Steps, init_head, new_head
from .modeling_medbert_embeddings import MedBertEmbeddings


@dataclass
class MedBertForPreTrainingOutput(ModelOutput):
    """Output of [`MedBertForPreTraining`].

    Attributes:
        loss: Scalar, `mlm_loss + stay_loss_weight * stay_loss`.
        mlm_loss: Scalar, mean over the hidden codes.
        stay_loss: Scalar, mean over patients.
        prediction_logits: (batch, sequence, vocab), only when no `labels` are given or `return_logits=True`;
            (patients, vocab) under the objective `masked_set`.
        stay_logits: (patients, 2), prolonged stay no / yes.
        hidden_states: One (batch, sequence, hidden) per layer and for the embeddings.
        attentions: One (batch, heads, sequence, sequence) per layer (eager attention only).
    """

    loss: torch.Tensor | None = None
    stay_logits: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    stay_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MedBertPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: MedBertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MedBertEmbeddings", "EhrLayer"]  # noqa: RUF012 - library's form
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": EhrLayer, "attentions": EhrAttention}  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Embedding):
            # BERT's truncated normal; the library's own default is the untruncated one.
            std = self.config.initializer_range
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2 * std, b=2 * std)
        init_head(module)
        if isinstance(module, IdentityStartLinear) and module.gain:
            init.copy_(module.weight, module.identity_start())

    def get_input_embeddings(self):
        """The code embeddings."""
        return self._embeddings().code_embeddings

    def set_input_embeddings(self, value):
        """Replaces the code embeddings."""
        self._embeddings().code_embeddings = value

    def _embeddings(self):
        return getattr(self, self.base_model_prefix, self).embeddings


class MedBertModel(MedBertPreTrainedModel):
    """The encoder: codes of patients → code states and one pooled vector per patient."""

    def __init__(self, config: MedBertConfig):
        super().__init__(config)
        self.embeddings = MedBertEmbeddings(config)
        self.encoder = EhrEncoder(config)
        if config.pooling == "first":
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visit_ids: torch.Tensor | None = None,
        serial_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        age_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes patients.

        Args:
            input_ids: (batch, sequence) code ids, or (1, total) when packed.
            attention_mask: (batch, sequence), 1 for codes and 0 for padding; padded input only.
            visit_ids: As `input_ids`; 1 is the first visit, 0 padding. All codes in visit 1 when `None`.
            serial_ids: As `input_ids`, rank of the code in its visit; read under `serialization="within_visit"` and
                derived from `visit_ids` when `None`.
            cu_seqlens: (patients + 1,) int32 borders of a packed row.
            max_seqlen: Longest patient of a packed row.
            inputs_embeds: (batch, sequence, hidden) in place of the code embeddings.
            age_ids: As `input_ids`, 1 + the age in years at the visit, 0 where unknown; read under `max_age`, all
                unknown when `None`.
            **kwargs: `output_attentions` (eager attention only), `output_hidden_states`.

        Returns:
            `last_hidden_state` (batch, sequence, hidden) and `pooler_output` (patients, hidden).

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, a packed batch that also has a mask, or a
                patient longer than `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        codes = inputs_embeds[..., 0] if inputs_embeds is not None else input_ids
        assert codes is not None  # one of the two is there
        packed = packed_borders(codes, attention_mask, cu_seqlens, max_seqlen)
        longest = codes.shape[1] if packed is None else packed.max_seqlen
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` has a patient of {longest} codes, `max_position_embeddings` is "
                f"{self.config.max_position_embeddings}. Encode with that number as `max_length`."
            )
        if visit_ids is None:
            visit_ids = torch.ones(codes.shape, dtype=torch.long, device=codes.device)
        serial_ids = self._serial_ids(visit_ids, serial_ids, attention_mask, packed)
        embedded = self.embeddings(input_ids, visit_ids, serial_ids, inputs_embeds, age_ids)
        states = self.encoder(embedded, attention_mask=attention_mask, packed=packed, **kwargs)
        pooled = pool_states(states, self.config.pooling, attention_mask, packed)
        if self.config.pooling == "first":
            pooled = torch.tanh(self.pooler(pooled))
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

    def _serial_ids(self, visit_ids, serial_ids, attention_mask, packed):
        """What the serialization table counts, (batch, sequence), or `None` without such a table."""
        if self.config.serialization in ("none", "visit_sinusoid"):
            return None
        running = torch.arange(visit_ids.shape[1], device=visit_ids.device).expand(visit_ids.shape)
        if self.config.serialization == "within_visit":
            return serial_ids if serial_ids is not None else _rank_in_visit(visit_ids, running, packed)
        if packed is not None:
            return packed.positions()[None]
        return running if attention_mask is None else (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _rank_in_visit(visit_ids, running, packed: PackedSequences | None):
    """(batch, sequence): distance from each code to the first code of its visit."""
    begins = torch.ones_like(visit_ids, dtype=torch.bool)
    begins[:, 1:] = visit_ids[:, 1:] != visit_ids[:, :-1]
    if packed is not None:
        begins[0, packed.cu_seqlens[:-1].long()] = True
    return running - torch.where(begins, running, 0).cummax(dim=1).values


class MedBertForMaskedLM(MedBertPreTrainedModel):
    """Masked-code model. With `labels` only the masked rows reach the decoder, and no logits are returned."""

    _tied_weights_keys = {"head.decoder.weight": "model.embeddings.code_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MedBertConfig):
        super().__init__(config)
        self.model = MedBertModel(config)
        self.head = EhrPredictionHead(config)
        self.post_init()

    def get_output_embeddings(self):
        """The decoder over codes."""
        return self.head.decoder

    def set_output_embeddings(self, value):
        """Replaces the decoder over codes."""
        self.head.decoder = value

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
        age_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predicts masked codes; inputs as in [`MedBertModel`].

        Args:
            labels: As `input_ids`, the true code at masked positions and -100 elsewhere.
            return_logits: Whether to score every position, (batch, sequence, vocab). Default: only without `labels`,
                since these scores are most of the cost of a step.
            num_items_in_batch: Number of masked codes of the whole accumulated batch; the loss is the sum over it.
        """
        outputs = self.model(
            input_ids, attention_mask, visit_ids, serial_ids, cu_seqlens, max_seqlen, inputs_embeds, age_ids, **kwargs
        )
        states = outputs.last_hidden_state
        loss = None if labels is None else self.head.masked_loss(states, labels, num_items_in_batch)
        with_logits = labels is None if return_logits is None else return_logits
        return MaskedLMOutput(
            loss=loss,
            logits=self.head(states) if with_logits else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MedBertForPreTraining(MedBertPreTrainedModel):
    """Masked codes plus prolonged stay (any stay of more than 7 days), summed (section "Pretraining" of the paper)."""

    # The sum of two means cannot be rescaled by one count of items.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"head.decoder.weight": "model.embeddings.code_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MedBertConfig):
        super().__init__(config)
        self.model = MedBertModel(config)
        self.head = EhrPredictionHead(config)
        self.stay_classifier = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_output_embeddings(self):
        """The decoder over codes."""
        return self.head.decoder

    def set_output_embeddings(self, value):
        """Replaces the decoder over codes."""
        self.head.decoder = value

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
        age_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prolonged_stay_labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs,
    ) -> MedBertForPreTrainingOutput:
        """Both pre-training objectives; inputs as in [`MedBertModel`].

        Args:
            labels: Objective `masked_lm`: as `input_ids`, the true code at masked positions and -100 elsewhere.
                Objective `masked_set`: (patients, k), the codes hidden from each patient, padded with -100.
            prolonged_stay_labels: (patients,), 1 where any stay was longer than 7 days.
            return_logits: Whether to return `prediction_logits`. Default: only without `labels`.
        """
        outputs = self.model(
            input_ids, attention_mask, visit_ids, serial_ids, cu_seqlens, max_seqlen, inputs_embeds, age_ids, **kwargs
        )
        stay_logits = self.stay_classifier(outputs.pooler_output)
        code_states = outputs.last_hidden_state
        if self.config.objective == "masked_set":
            code_states = outputs.pooler_output
        mlm_loss = None if labels is None else self._code_loss(code_states, labels)
        stay_loss = None
        if prolonged_stay_labels is not None:
            stay_loss = nn.functional.cross_entropy(stay_logits.float(), prolonged_stay_labels)
        with_logits = labels is None if return_logits is None else return_logits
        return MedBertForPreTrainingOutput(
            loss=self._total(mlm_loss, stay_loss),
            stay_logits=stay_logits,
            prediction_logits=self.head(code_states) if with_logits else None,
            mlm_loss=None if mlm_loss is None else mlm_loss.detach(),
            stay_loss=None if stay_loss is None else stay_loss.detach(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _code_loss(self, states, labels):
        """Mean cross-entropy over the hidden codes of the batch."""
        if self.config.objective == "masked_set":
            return self.head.loss(states, labels) / (labels != -100).sum().clamp(min=1)
        return self.head.masked_loss(states, labels)

    def _total(self, mlm_loss, stay_loss):
        """`mlm_loss + stay_loss_weight * stay_loss`, of those that are there."""
        if stay_loss is None:
            return mlm_loss
        stay_loss = self.config.stay_loss_weight * stay_loss
        return stay_loss if mlm_loss is None else mlm_loss + stay_loss


class MedBertForSequenceClassification(PatientClassifierMixin, MedBertPreTrainedModel):
    """Patient classification from the pooled vector ("Med-BERT only" in the paper), or through a GRU or RETAIN."""

    def __init__(self, config: MedBertConfig):
        super().__init__(config)
        self.model = MedBertModel(config)
        self.head = None
        if config.head != "ffn":
            self.head = new_head(config.head, config.hidden_size, config.head_hidden_size)
        self.add_classifier(config.hidden_size if self.head is None else self.head.num_features)
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
        age_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        day_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> EhrClassifierOutput:
        """Scores patients; inputs as in [`MedBertModel`].

        Args:
            labels: (patients,) class index, or (patients, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            day_ids: As `input_ids`, 1 + days since the patient's first visit, 0 where unknown; read by `hitanet`.
        """
        outputs = self.model(
            input_ids, attention_mask, visit_ids, serial_ids, cu_seqlens, max_seqlen, inputs_embeds, age_ids, **kwargs
        )
        features, head = outputs.pooler_output, None
        if self.head is not None:
            states = outputs.last_hidden_state
            packed = packed_borders(states, attention_mask, cu_seqlens, max_seqlen)
            head = self.head(Steps.of(states, attention_mask, packed, day_ids))
            features = head.features
        encoder_fields = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return self.classify(features, head, labels, num_items_in_batch, **encoder_fields)


MedBertModel.register_for_auto_class("AutoModel")
MedBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
MedBertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MedBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
