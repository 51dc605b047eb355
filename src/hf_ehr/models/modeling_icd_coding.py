"""ICD coding of notes on top of any text encoder: segments in, scores of all codes and their evidence out."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .modeling_ehr import packed_borders, pool_states
from .modeling_label_attention import LabelAttentionHead, UnitTokens, weighted_bce


@dataclass
class EhrBertForICDCodingOutput(ModelOutput):
    """Output of [`EhrBertForICDCoding`].

    Attributes:
        loss: Scalar, binary cross-entropy; only with `labels`.
        logits: (notes, num_labels). With `labels` and label attention the gradient flows through `loss` alone.
        label_attentions: (rows, requested labels, length), rows and length as in `input_ids`: what each requested code
            looked at. Sums to 1 over the tokens of a note; 0 on padding and `[CLS]`. Where the segments of a note are
            pooled by `max`, only the segment whose score is the note's has weight.
        hidden_states: One (segments, length, hidden) per layer and for the embeddings.
        attentions: One (segments, heads, length, length) per layer (eager attention only).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    label_attentions: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def checked_notes(note_index: torch.Tensor | None, segments: int, device) -> tuple[torch.Tensor, int]:
    """The note of each segment (segments,), and how many notes there are; without an index each is its own.

    Raises:
        ValueError: The index is not one per segment, or does not count 0, 0, …, 1, … without a gap.
    """
    if note_index is None:
        return torch.arange(segments, device=device), segments
    steps = note_index.diff() if note_index.ndim == 1 else note_index
    if note_index.shape != (segments,) or note_index[0] != 0 or ((steps != 0) & (steps != 1)).any():
        raise ValueError(
            f"`note_index` must have one entry for each of the {segments} segments and count notes as 0, 0, 1, …, got "
            f"shape {tuple(note_index.shape)}. Keep the segments of a note together, and the notes in order."
        )
    return note_index, int(note_index[-1]) + 1


def check_labels(labels: torch.Tensor | None, label_ids: Any, shape: tuple[int, int]) -> None:
    """Refuses labels that are not (notes, num_labels), and ids of labels that there are not."""
    if labels is not None and labels.shape != shape:
        raise ValueError(
            f"`labels` must have shape {shape} (notes, labels), got {tuple(labels.shape)}. Give 0 or 1 for each label "
            "of `config.id2label`, and `note_index` where notes have several segments."
        )
    if label_ids is not None and not all(0 <= index < shape[1] for index in label_ids):
        raise ValueError(
            f"`output_label_attentions` must be ids in [0, {shape[1]}), got others. Look them up in `config.label2id`."
        )


class ICDCodingMixin:
    """The head, the loss over notes, and what makes a model from another's encoder."""

    config: Any
    head: Any

    def add_encoder_and_head(self, encoder: Any) -> None:
        """Takes the encoder, without its pooler, and makes the head of the configuration."""
        config = self.config
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # nothing here reads it, and it would get no gradient
        if config.text_config is not None:
            encoder.config = config.text_config
        self.model = encoder
        self.takes_token_types = "token_type_ids" in signature(encoder.forward).parameters
        self.num_labels = len(config.id2label or ())
        hidden_size = config.get_text_config().hidden_size
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        if config.head == "xml":
            self.head = LabelAttentionHead(config, hidden_size, self.num_labels)
        else:
            self.head = nn.Linear(hidden_size, self.num_labels)

    @classmethod
    def from_encoder(cls: Any, encoder: str | Path | PreTrainedModel, id2label: dict[int, str], **overrides: Any):
        """A coding model on an encoder of the library (BERT, RoBERTa, ModernBERT, Longformer, …) or on EhrBert's.

        Args:
            encoder: Name or folder of a checkpoint, opened in fp32 by `AutoModel`; or a model, whose encoder then
                becomes part of the new one (without its pooler).
            id2label: Label names by id; the head starts anew.
            **overrides: Fields of [`EhrBertConfig`].

        Raises:
            ValueError: `id2label` is empty.
        """
        if not id2label:
            raise ValueError("`id2label` must name at least one label, got none. Pass {0: 'I10', …}.")
        base = _open_encoder(encoder)
        labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
        fields = {"problem_type": "multi_label_classification", **labels, **overrides}
        return cls(_coding_config(cls.config_class, base.config, fields), base).to(base.dtype)

    def set_label_embeddings(self, matrix: torch.Tensor) -> None:
        """Starts the label vectors from embeddings of the codes' descriptions (section 3.3.2); they are then trained.

        Args:
            matrix: (num_labels, hidden), or (num_labels, `label_key_size`), row j for label j. A code without a
                description keeps its start if its row is taken from `label_embeddings`.

        Raises:
            ValueError: The head has no label vectors, or `matrix` has another shape or values that are not finite.
        """
        vectors = self.label_embeddings
        matrix = torch.as_tensor(matrix)
        if matrix.shape != vectors.shape or not matrix.isfinite().all():
            raise ValueError(
                f"`matrix` must be finite and of shape {tuple(vectors.shape)}, got {tuple(matrix.shape)}. Embed one "
                "description for each label of `config.id2label`, in its order."
            )
        with torch.no_grad():
            vectors.copy_(matrix)

    @property
    def label_embeddings(self) -> torch.Tensor:
        """The label vectors l_j of Eq 2, (num_labels, hidden or `label_key_size`).

        Raises:
            ValueError: The head is the [CLS] head.
        """
        if self.config.head != "xml":
            raise ValueError("`head` must be 'xml' for label vectors, got 'cls'. Make the model with `head='xml'`.")
        return self.head.label_vectors

    def encode(self, input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, inputs_embeds, **kwargs):
        """The encoder's output; what is not there is not passed on, since encoders differ in what they take."""
        if cu_seqlens is not None and self.config.text_config is not None:
            raise ValueError(
                "`cu_seqlens` must be None with an encoder of another family, got packed input. Pad the segments."
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if self.takes_token_types:
            inputs["token_type_ids"] = token_type_ids
        return self.model(**{name: value for name, value in inputs.items() if value is not None}, **kwargs)

    def code(self, states, attention_mask, cu_seqlens, max_seqlen, note_index, labels, num_items, label_ids) -> dict:
        """States (segments, length, hidden) → `loss`, `logits` and `label_attentions` of the notes."""
        packed = packed_borders(states, attention_mask, cu_seqlens, max_seqlen)
        segments = len(states) if packed is None else len(packed.cu_seqlens) - 1
        notes, num_notes = checked_notes(note_index, segments, states.device)
        if label_ids is not None and self.config.head != "xml":
            raise ValueError("`output_label_attentions` needs label attention, got `head='cls'`. Use `head='xml'`.")
        check_labels(labels, label_ids, (num_notes, self.num_labels))
        # A unit is what is scored at once: a segment, or a note with all its segments.
        by_segment = self.config.head == "cls" or self.config.segment_pooling == "max"
        owners = notes if by_segment else torch.arange(num_notes, device=states.device)
        targets, unit_weights = (None, None) if labels is None else _targets(labels, owners)
        states, tokens = self.dropout(states), None
        if isinstance(self.head, LabelAttentionHead):
            units = torch.arange(segments, device=states.device) if by_segment else notes
            tokens = UnitTokens.of(states, attention_mask, packed, units, len(owners))
            scores, loss = self.head(tokens, targets, unit_weights)
        else:
            scores = self.head(pool_states(states, "first", attention_mask, packed))
            loss = None if targets is None else weighted_bce(scores, targets, unit_weights)
        if loss is not None:
            loss = loss / (labels.numel() if num_items is None else num_items)
        logits = _maximum(scores, owners, num_notes) if by_segment else scores
        weights = (
            None if label_ids is None else self._evidence(tokens, scores, logits, owners, label_ids, states.shape)
        )
        return {"loss": loss, "logits": logits, "label_attentions": weights}

    def _evidence(self, tokens, scores, logits, owners, label_ids, shape) -> torch.Tensor:
        """`label_attentions`; of a note pooled by maximum, those of the segment that decided."""
        ids = torch.as_tensor(label_ids, device=scores.device)
        weights = self.head.weights(tokens, ids)
        if len(scores) != len(logits):
            weights = weights * _deciding(scores[:, ids], logits[:, ids], owners)[..., None]
        return tokens.spread(weights, tuple(shape[:2]))


def _open_encoder(encoder: str | Path | PreTrainedModel) -> Any:
    """The encoder of a model or of a checkpoint."""
    if isinstance(encoder, PreTrainedModel):
        return encoder.base_model
    return AutoModel.from_pretrained(encoder, dtype=torch.float32)


def _coding_config(family: Any, config: Any, fields: dict) -> Any:
    """The configuration of a coding model on an encoder with `config`, which the encoder's layers go on reading."""
    if config.model_type == family.model_type:
        for name, value in fields.items():
            setattr(config, name, value)
        config.validate()
        return config
    implementation = config._attn_implementation
    if hasattr(config, "initializer_range"):
        fields = {"initializer_range": config.initializer_range} | fields
    coding = family(text_config=config, **fields)
    coding._attn_implementation = implementation  # a new configuration forgets that of its parts
    return coding


def _targets(labels, owners) -> tuple[torch.Tensor, torch.Tensor]:
    """Each unit is an example with its note's labels, (units, labels), and all notes count alike, (units,)."""
    return labels[owners], 1 / owners.bincount().float()[owners]


def _maximum(scores, owners, num_notes: int) -> torch.Tensor:
    """Scores (segments, labels) → the greatest of each note, (notes, labels)."""
    index = owners[:, None].expand(scores.shape)
    return scores.new_zeros(num_notes, scores.shape[1]).scatter_reduce(0, index, scores, "amax", include_self=False)


def _deciding(scores, maxima, owners) -> torch.Tensor:
    """(segments, labels): the first segment of each note that reached its maximum."""
    order = torch.arange(len(scores), device=scores.device)[:, None].expand(scores.shape)
    reached = torch.where(scores == maxima[owners], order, len(scores))
    first = reached.new_zeros(maxima.shape)
    first = first.scatter_reduce(0, owners[:, None].expand(scores.shape), reached, "amin", include_self=False)
    return order == first[owners]
