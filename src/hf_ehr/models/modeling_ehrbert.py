"""EhrBert (BERT-XML: Zhang, Liu, Razavian, 2020): BERT over clinical notes, and ICD coding with label attention.

    tokens ─ token + position + type embeddings ─▶ encoder ─▶ states (segments, length, hidden)
                                                                  │
           masked tokens ─▶ token decoder (tied)   ◀──────────────┤
           pooled [CLS]  ─▶ next sentence │ classifier ◀──────────┤
           all segments of a note ─▶ label attention │ [CLS] head ┴─▶ codes

Every model takes padded input (`attention_mask`) or packed input (`cu_seqlens`); both give the same numbers. A long
note is several segments: flat rows, and `note_index` says which note each belongs to.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ehrbert import EhrBertConfig
from .modeling_ehr import (
    EhrAttention,
    EhrEncoder,
    EhrLayer,
    EhrPredictionHead,
    IdentityStartLinear,
    packed_borders,
    pool_states,
)
from .modeling_ehrbert_embeddings import EhrBertEmbeddings, token_positions
from .modeling_heads import EhrClassifierOutput, PatientClassifierMixin
from .modeling_icd_coding import EhrBertForICDCodingOutput, ICDCodingMixin
from .modeling_label_attention import LabelAttentionHead


@dataclass
class EhrBertForPreTrainingOutput(ModelOutput):
    """Output of [`EhrBertForPreTraining`].

    Attributes:
        loss: Scalar, `mlm_loss + next_sentence_loss`, of those that have labels.
        mlm_loss: Scalar, mean over the masked tokens.
        next_sentence_loss: Scalar, mean over pairs.
        prediction_logits: (segments, length, vocab), only when no `labels` are given or `return_logits=True`.
        seq_relationship_logits: (segments, 2); class 0: the second half continues the first, 1: it is of another note.
        hidden_states: One (segments, length, hidden) per layer and for the embeddings.
        attentions: One (segments, heads, length, length) per layer (eager attention only).
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    next_sentence_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class EhrBertPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: EhrBertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EhrBertEmbeddings", "EhrLayer"]  # noqa: RUF012 - library's form
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
        if isinstance(module, IdentityStartLinear) and module.gain:
            init.copy_(module.weight, module.identity_start())
        if isinstance(module, LabelAttentionHead):
            module.init_weights()

    def get_input_embeddings(self):
        """The token embeddings."""
        return self._embeddings().word_embeddings

    def set_input_embeddings(self, value):
        """Replaces the token embeddings."""
        self._embeddings().word_embeddings = value

    def _embeddings(self):
        return getattr(self, self.base_model_prefix, self).embeddings


class EhrBertModel(EhrBertPreTrainedModel):
    """The encoder: tokens of note segments → states, and BERT's pooled `[CLS]`."""

    def __init__(self, config: EhrBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        if config.text_config is not None:
            raise ValueError(
                "`text_config` must be None for EhrBert's own encoder, got that of another. Open the checkpoint with "
                "`EhrBertForICDCoding`, or the encoder with its own class."
            )
        self.embeddings = EhrBertEmbeddings(config)
        self.encoder = EhrEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes segments.

        Args:
            input_ids: (segments, length) token ids, `[CLS]` first; or (1, total) when packed.
            attention_mask: (segments, length), 1 for tokens and 0 for padding; padded input only.
            token_type_ids: As `input_ids`; all 0 when `None`.
            cu_seqlens: (segments + 1,) int32 borders of a packed row.
            max_seqlen: Longest segment of a packed row.
            inputs_embeds: (segments, length, hidden) in place of the token embeddings.
            **kwargs: `output_attentions` (eager attention only), `output_hidden_states`.

        Returns:
            `last_hidden_state` (segments, length, hidden) and `pooler_output` (segments, hidden).

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, a packed batch that also has a mask, or a
                segment longer than `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        tokens = inputs_embeds[..., 0] if inputs_embeds is not None else input_ids
        assert tokens is not None  # one of the two is there
        packed = packed_borders(tokens, attention_mask, cu_seqlens, max_seqlen)
        longest = tokens.shape[1] if packed is None else packed.max_seqlen
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` has a segment of {longest} tokens, `max_position_embeddings` is "
                f"{self.config.max_position_embeddings}. Cut notes into segments of that length, or use "
                "`extend_position_embeddings`."
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
        embedded = self.embeddings(
            input_ids, token_positions(tokens, attention_mask, packed), token_type_ids, inputs_embeds
        )
        states = self.encoder(embedded, attention_mask=attention_mask, packed=packed, **kwargs)
        pooled = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pool_states(states, "first", attention_mask, packed)))
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


class _TokenDecoderMixin:
    """What the pre-training classes share: the token decoder."""

    head: EhrPredictionHead

    def get_output_embeddings(self):
        """The decoder over tokens."""
        return self.head.decoder

    def set_output_embeddings(self, value):
        """Replaces the decoder over tokens."""
        self.head.decoder = value


class EhrBertForMaskedLM(_TokenDecoderMixin, EhrBertPreTrainedModel):
    """Masked-token model. With `labels` only the masked rows reach the decoder, and no logits are returned."""

    _tied_weights_keys = {"head.decoder.weight": "model.embeddings.word_embeddings.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^model\.pooler", r"^pooler"]  # noqa: RUF012 - library's form

    def __init__(self, config: EhrBertConfig):
        super().__init__(config)
        self.model = EhrBertModel(config, add_pooling_layer=False)
        self.head = EhrPredictionHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predicts masked tokens; inputs as in [`EhrBertModel`].

        Args:
            labels: As `input_ids`, the true token at masked positions and -100 elsewhere.
            return_logits: Whether to score every position, (segments, length, vocab). Default: only without `labels`,
                since these scores are much of the cost of a step.
            num_items_in_batch: Number of masked tokens of the whole accumulated batch; the loss is the sum over it.
        """
        outputs = self.model(
            input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, inputs_embeds, **kwargs
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


class EhrBertForPreTraining(_TokenDecoderMixin, EhrBertPreTrainedModel):
    """BERT's two objectives, masked tokens and next sentence (section 3.1); without pairs use the other model."""

    # The sum of two means cannot be rescaled by one count of items.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"head.decoder.weight": "model.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: EhrBertConfig):
        super().__init__(config)
        self.model = EhrBertModel(config)
        self.head = EhrPredictionHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs,
    ) -> EhrBertForPreTrainingOutput:
        """Both objectives; inputs as in [`EhrBertModel`].

        Args:
            labels: As `input_ids`, the true token at masked positions and -100 elsewhere.
            next_sentence_label: (segments,), 0 where the second half continues the first, 1 where it is of another
                note. `None`: masked tokens alone.
            return_logits: Whether to return `prediction_logits`. Default: only without `labels`.
        """
        outputs = self.model(
            input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, inputs_embeds, **kwargs
        )
        states, pair_logits = outputs.last_hidden_state, self.next_sentence(outputs.pooler_output)
        losses = {}
        if labels is not None:
            losses["mlm_loss"] = self.head.masked_loss(states, labels)
        if next_sentence_label is not None:
            losses["next_sentence_loss"] = nn.functional.cross_entropy(pair_logits.float(), next_sentence_label)
        with_logits = labels is None if return_logits is None else return_logits
        return EhrBertForPreTrainingOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            prediction_logits=self.head(states) if with_logits else None,
            seq_relationship_logits=pair_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: loss.detach() for name, loss in losses.items()},
        )


class EhrBertForSequenceClassification(PatientClassifierMixin, EhrBertPreTrainedModel):
    """Classification of notes of one segment from BERT's pooled `[CLS]`."""

    def __init__(self, config: EhrBertConfig):
        super().__init__(config)
        self.model = EhrBertModel(config)
        self.add_classifier(config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EhrClassifierOutput:
        """Scores segments; inputs as in [`EhrBertModel`].

        Args:
            labels: (segments,) class index, or (segments, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
        """
        outputs = self.model(
            input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, inputs_embeds, **kwargs
        )
        encoder_fields = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return self.classify(outputs.pooler_output, None, labels, num_items_in_batch, **encoder_fields)


class EhrBertForICDCoding(ICDCodingMixin, EhrBertPreTrainedModel):
    """ICD coding of notes: label attention (Eq 2-4) or the [CLS] head (Eq 1) on EhrBert or on any other encoder."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.pooler", r"^pooler"]  # noqa: RUF012 - library's form

    def __init__(self, config: EhrBertConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        if encoder is None:
            own = config.text_config is None
            encoder = (
                EhrBertModel(config, add_pooling_layer=False) if own else AutoModel.from_config(config.text_config)
            )
        self.add_encoder_and_head(encoder)
        self.post_init()

    def get_input_embeddings(self):
        """The token embeddings of the encoder."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replaces the token embeddings of the encoder."""
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        note_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EhrBertForICDCodingOutput:
        """Scores notes; the segments of all notes are the rows of the input, as in [`EhrBertModel`].

        Args:
            note_index: (segments,) int64, the note of each segment, ascending from 0. `None`: each is a note.
            labels: (notes, num_labels) of 0 and 1. A note without any is a note without these codes.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            **kwargs: `output_label_attentions`, ids of the labels whose attention is returned, `output_attentions`
                (eager attention only), `output_hidden_states`.

        Raises:
            ValueError: `note_index`, `labels` or the ids do not fit the batch, or the input is packed and the encoder
                is of another family.
        """
        # Not in the signature: there the Trainer would take it for labels, and drop the evaluation loss without it.
        label_ids = kwargs.pop("output_label_attentions", None)
        borders = (cu_seqlens, max_seqlen)
        outputs = self.encode(input_ids, attention_mask, token_type_ids, *borders, inputs_embeds, **kwargs)
        coded = self.code(
            outputs.last_hidden_state, attention_mask, *borders, note_index, labels, num_items_in_batch, label_ids
        )
        return EhrBertForICDCodingOutput(**coded, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


EhrBertModel.register_for_auto_class("AutoModel")
EhrBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
EhrBertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
EhrBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
EhrBertForICDCoding.register_for_auto_class("AutoModelForSequenceClassification")
