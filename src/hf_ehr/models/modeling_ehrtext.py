"""EhrText: the neural baselines for coding notes, from words to codes in one pass over the whole note.

    words ─ embeddings ─▶ convolution │ bi-LSTM │ bi-GRU ─▶ states ─┬─ max pooling ─────────────┐
                                                                    ├─ label attention (CAML, LAAT) ├─▶ codes
                                                                    └─ shared queries (Eq 5-8) ─┘

The batch is that of `EhrBertForICDCoding`: rows are segments, and `note_index` says which note each belongs to. The
segments of a note are joined, in their order and with their special tokens, into the one sequence that is read; no
token is left out, for these papers have no `[CLS]`. Padded and packed input give the same numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ehrtext import EhrTextConfig
from .modeling_ehr import packed_borders
from .modeling_ehrtext_layers import MaxPooling, MultiHeadPooling, init_layer, new_encoder, note_tokens
from .modeling_icd_coding import check_labels, checked_notes
from .modeling_label_attention import LabelAttentionHead, UnitTokens, weighted_bce


@dataclass
class EhrTextForICDCodingOutput(ModelOutput):
    """Output of [`EhrTextForICDCoding`].

    Attributes:
        loss: Scalar, binary cross-entropy; only with `labels`.
        logits: (notes, num_labels). With `labels` and label attention the gradient flows through `loss` alone.
        label_attentions: (rows, requested labels, length), rows and length as in `input_ids`: what each requested code
            looked at. Sums to 1 over the tokens of a note; 0 on padding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    label_attentions: torch.Tensor | None = None


class EhrTextPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: EhrTextConfig
    base_model_prefix = "model"
    _no_split_modules = ["TextConvolution", "TextRecurrence"]  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_layer(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        if isinstance(module, LabelAttentionHead):
            module.init_weights()

    def get_input_embeddings(self):
        """The word embeddings."""
        return self._encoder().word_embeddings

    def set_input_embeddings(self, value):
        """Replaces the word embeddings; they stay frozen where the configuration says so."""
        value.requires_grad_(not self.config.freeze_word_embeddings)
        self._encoder().word_embeddings = value

    def tie_weights(self, *args, **kwargs):
        """Freezes the word embeddings again: loading makes new parameters, and calls this at its end."""
        super().tie_weights(*args, **kwargs)
        if self.config.freeze_word_embeddings:
            self.get_input_embeddings().requires_grad_(False)

    def _encoder(self):
        return getattr(self, self.base_model_prefix, self)


class EhrTextModel(EhrTextPreTrainedModel):
    """Words of notes → a state for each word."""

    def __init__(self, config: EhrTextConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = new_encoder(config)
        self.post_init()

    def encode(
        self, input_ids, attention_mask, note_index, cu_seqlens, max_seqlen, inputs_embeds
    ) -> tuple[UnitTokens, tuple[int, int]]:
        """As `forward`, in the heads' own form: whole notes without padding; and (rows, length) of the input."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        embedded = self.dropout(self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        packed = packed_borders(embedded, attention_mask, cu_seqlens, max_seqlen)
        segments = len(embedded) if packed is None else len(packed.cu_seqlens) - 1
        tokens = note_tokens(embedded, attention_mask, packed, *checked_notes(note_index, segments, embedded.device))
        states = self.encoder(tokens.steps)
        return tokens._replace(steps=tokens.steps._replace(states=states)), tuple(embedded.shape[:2])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        note_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes notes.

        Args:
            input_ids: (segments, length) token ids, or (1, total) when packed.
            attention_mask: (segments, length), 1 for tokens and 0 for padding; padded input only.
            note_index: (segments,) int64, the note of each segment, ascending from 0. `None`: each is a note.
            cu_seqlens: (segments + 1,) int32 borders of a packed row.
            max_seqlen: Longest segment of a packed row.
            inputs_embeds: (segments, length, embedding) in place of the word embeddings.
            token_type_ids: Not read; here so that the batches of EhrBert fit.
            **kwargs: Not read.

        Returns:
            `last_hidden_state` (segments, length, states), 0 on padding.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, a packed batch that also has a mask, or a
                `note_index` that does not fit.
        """
        tokens, shape = self.encode(input_ids, attention_mask, note_index, cu_seqlens, max_seqlen, inputs_embeds)
        states = tokens.steps.states
        flat = states.new_zeros(shape[0] * shape[1], states.shape[1])
        return BaseModelOutput(last_hidden_state=flat.index_copy(0, tokens.places, states).unflatten(0, shape))


class EhrTextForICDCoding(EhrTextPreTrainedModel):
    """ICD coding of notes by a convolution or a recurrence."""

    def __init__(self, config: EhrTextConfig):
        super().__init__(config)
        self.model = EhrTextModel(config)
        self.num_labels = len(config.id2label or ())
        self.head: Any
        if config.head == "label_attention":
            self.head = LabelAttentionHead(config, config.state_size, self.num_labels)
        elif config.head == "multi_head":
            self.head = MultiHeadPooling(config, self.num_labels)
        else:
            self.head = MaxPooling(config, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        note_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> EhrTextForICDCodingOutput:
        """Scores notes; inputs as in [`EhrTextModel`].

        Args:
            labels: (notes, num_labels) of 0 and 1. A note without any is a note without these codes.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            **kwargs: `output_label_attentions`, ids of the labels whose attention is returned.

        Raises:
            ValueError: As [`EhrTextModel`], `labels` or the ids do not fit, or the head has no label attention.
        """
        # Not in the signature: there the Trainer would take it for labels, and drop the evaluation loss without it.
        label_ids = kwargs.pop("output_label_attentions", None)
        tokens, shape = self.model.encode(input_ids, attention_mask, note_index, cu_seqlens, max_seqlen, inputs_embeds)
        if label_ids is not None and self.config.head != "label_attention":
            raise ValueError(
                f"`output_label_attentions` needs `head='label_attention'`, got {self.config.head!r}. Use another "
                "method of explanation for this head."
            )
        check_labels(labels, label_ids, (tokens.steps.shape[0], self.num_labels))
        logits, loss = self._scores(tokens, labels, num_items_in_batch)
        return EhrTextForICDCodingOutput(
            loss=loss, logits=logits, label_attentions=self._evidence(tokens, label_ids, shape)
        )

    def _scores(self, tokens: UnitTokens, labels, num_items) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores (notes, labels) and, with `labels`, the loss."""
        attends = self.config.head == "label_attention"
        if labels is None:
            return (self.head(tokens)[0] if attends else self.head(tokens.steps)), None
        weights = torch.ones(len(labels), device=labels.device)
        if attends:
            logits, loss = self.head(tokens, labels, weights)
        else:
            logits = self.head(tokens.steps)
            loss = weighted_bce(logits, labels, weights)
        return logits, loss / (labels.numel() if num_items is None else num_items)

    def _evidence(self, tokens: UnitTokens, label_ids, shape: tuple[int, int]) -> torch.Tensor | None:
        if label_ids is None:
            return None
        ids = torch.as_tensor(label_ids, device=tokens.places.device)
        return tokens.spread(self.head.weights(tokens, ids), shape)


EhrTextModel.register_for_auto_class("AutoModel")
EhrTextForICDCoding.register_for_auto_class("AutoModelForSequenceClassification")
