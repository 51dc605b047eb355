"""Notes and stays of an admission joined by a gate (Yang & Wu, EMNLP 2021), and models of the note alone.

    hours ─ LSTM │ CNN │ Star-Transformer │ Transformer ─▶ mean over stays ─┐
    note ─ any text encoder, or vectors ────────────────────────────────────┼─ gate ─▶ admission vector ─▶ classifier
    demographics ─ one layer ─▶ mean over stays ────────────────────────────┘

An admission may lack the note or any hours: the main modality is then a learned vector, the other one adds nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ehrfusion import EhrFusionConfig
from .modeling_ehrfusion_layers import Modality, ShiftGate, StaysEncoder
from .modeling_ehrseries_layers import init_series_layer
from .modeling_heads import PatientClassifierMixin, classification_loss
from .modeling_note_encoder import (
    NoteEncoderMixin,
    encoded_notes,
    given_vectors,
    new_note_encoder,
    opened_note_encoder,
    put_note_encoder,
)


@dataclass
class EhrFusionModelOutput(ModelOutput):
    """Output of [`EhrFusionModel`].

    Attributes:
        pooler_output: (admissions, features), one vector per admission.
        gates: (admissions, 3), w2, w3 and α of [`ShiftGate`]: what it lets through of the other modality and of the
            demographics (0 where there are none), and the scale of the shift. `None` for a note alone.
    """

    pooler_output: torch.Tensor | None = None
    gates: torch.Tensor | None = None


@dataclass
class EhrFusionClassifierOutput(ModelOutput):
    """Output of [`EhrFusionForSequenceClassification`].

    Attributes:
        loss: Scalar; only with `labels`.
        logits: (admissions, num_labels).
        pooler_output: As in [`EhrFusionModelOutput`].
        gates: As there.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    gates: torch.Tensor | None = None


class EhrFusionPreTrainedModel(NoteEncoderMixin, PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: EhrFusionConfig
    base_model_prefix = "model"
    main_input_name = "stay_hours"
    _supports_sdpa = True
    _no_split_modules = ["StaysEncoder", "ShiftGate"]  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_series_layer(module)
        if isinstance(module, ShiftGate):
            init.ones_(module.beta)
        if isinstance(module, EhrFusionModel):
            init.normal_(module.missing_main, std=0.02)


class EhrFusionModel(EhrFusionPreTrainedModel):
    """Notes, hours and demographics of admissions → one vector per admission."""

    def __init__(self, config: EhrFusionConfig):
        super().__init__(config)
        self.note_encoder: Any = None
        if config.note_config is not None:
            self.note_encoder = new_note_encoder(config.note_config, pooler=config.note_pooling == "pooler")
        self.stays = self.gate = None
        self.num_features = config.note_size
        if config.series_encoder is not None:
            self.stays = StaysEncoder(config)
            sizes = [config.note_size, config.series_features]
            if config.main == "series":
                sizes.reverse()
            demographics_size = config.demographics_size if config.num_demographics else 0
            self.gate = ShiftGate(sizes[0], sizes[1], demographics_size, config.hidden_dropout_prob)
            self.num_features = sizes[0]
        self.missing_main = nn.Parameter(torch.zeros(self.num_features))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        stay_hours: torch.Tensor | None = None,
        feature_ids: torch.Tensor | None = None,
        feature_counts: torch.Tensor | None = None,
        feature_values: torch.Tensor | None = None,
        demographics: torch.Tensor | None = None,
        hourly_values: torch.Tensor | None = None,
        stay_admissions: torch.Tensor | None = None,
        note_input_ids: torch.Tensor | None = None,
        note_attention_mask: torch.Tensor | None = None,
        note_vectors: torch.Tensor | None = None,
        note_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> EhrFusionModelOutput:
        """Encodes admissions; there are as many as rows of notes.

        Args:
            stay_hours: (stays,) int, hours of each stay, at most `n_hours`; 0 for a stay without measurements.
            feature_ids: (entries,) int, the features that are not 0, hour after hour and stay after stay.
            feature_counts: (sum of stay_hours,) int, entries of each hour.
            feature_values: (entries,) values of `feature_ids`; all are 1 where there are none.
            demographics: (stays, num_demographics); zeros for a stay of which none are known.
            hourly_values: (stays, hours, num_hourly_features), instead of the three `feature_*`.
            stay_admissions: (stays,) int64, admission of each stay, any number of stays for each. `None`: each stay
                is an admission.
            note_input_ids: (admissions, tokens), with `note_config`.
            note_attention_mask: (admissions, tokens), 1 for tokens; a row of 0 is an admission without a note.
            note_vectors: (admissions, note_size), without `note_config`.
            note_mask: (admissions,) bool, which admissions have one.
            **kwargs: Not read.

        Raises:
            ValueError: Something of the batch is missing, or does not fit the configuration.
        """
        main, main_present = self._notes(note_input_ids, note_attention_mask, note_vectors, note_mask)
        if self.stays is None or self.gate is None:
            return EhrFusionModelOutput(pooler_output=self._filled(main, main_present))
        hours, known = self.stays(
            len(main),
            stay_admissions,
            demographics,
            self.dtype,
            stay_hours=stay_hours,
            feature_ids=feature_ids,
            feature_counts=feature_counts,
            feature_values=feature_values,
            hourly_values=hourly_values,
        )
        other = hours.vectors
        if self.config.main == "series":
            (main, main_present), other = hours, main
        features, gates = self.gate(self._filled(main, main_present), other, known)
        return EhrFusionModelOutput(pooler_output=features, gates=gates)

    def _notes(self, input_ids, attention_mask, vectors, mask) -> Modality:
        """Notes as the batch has them → one vector per admission."""
        if self.note_encoder is None:
            given, there = given_vectors(vectors, mask, self.config.note_size)
            return Modality(given.to(self.dtype), there)
        if input_ids is None:
            raise ValueError(
                "`note_input_ids` must be given, (admissions, tokens), got None. Pass rows of padding where there is "
                "no note, or make the model without `note_config` for `note_vectors`."
            )
        pooler = self.config.note_pooling == "pooler"
        return Modality(*encoded_notes(self.note_encoder, input_ids, attention_mask, pooler))

    def _filled(self, main: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """The main modality (admissions, width), and the learned vector where it is missing."""
        return torch.where(present[:, None], main, self.missing_main.to(main.dtype))


class EhrFusionForSequenceClassification(PatientClassifierMixin, EhrFusionPreTrainedModel):
    """Classification of admissions, or of stays that are an admission each."""

    def __init__(self, config: EhrFusionConfig):
        super().__init__(config)
        self.model = EhrFusionModel(config)
        self.add_classifier(self.model.num_features)
        if config.classifier_dropout is None and config.series_encoder is not None:
            self.dropout = nn.Dropout(0.0)
        self.post_init()

    @classmethod
    def from_note_encoder(cls, encoder: str | Path | PreTrainedModel, **fields: Any):
        """A new model on a trained text encoder.

        Args:
            encoder: Name or folder of a checkpoint, opened in fp32; or a model, whose encoder becomes part of the new
                one.
            **fields: Fields of [`EhrFusionConfig`].

        Raises:
            ValueError: `encoder` is a model with a decoder, or has no pooler where one is read.
        """
        text = opened_note_encoder(encoder)
        model = cls(EhrFusionConfig(note_config=text.config, **fields))
        put_note_encoder(model, text, pooler=model.config.note_pooling == "pooler")
        return model

    @can_return_tuple
    def forward(
        self,
        stay_hours: torch.Tensor | None = None,
        feature_ids: torch.Tensor | None = None,
        feature_counts: torch.Tensor | None = None,
        feature_values: torch.Tensor | None = None,
        demographics: torch.Tensor | None = None,
        hourly_values: torch.Tensor | None = None,
        stay_admissions: torch.Tensor | None = None,
        note_input_ids: torch.Tensor | None = None,
        note_attention_mask: torch.Tensor | None = None,
        note_vectors: torch.Tensor | None = None,
        note_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EhrFusionClassifierOutput:
        """Scores admissions; inputs as in [`EhrFusionModel`].

        Args:
            labels: (admissions,) class index, or (admissions, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
        """
        admission = self.model(
            stay_hours=stay_hours,
            feature_ids=feature_ids,
            feature_counts=feature_counts,
            feature_values=feature_values,
            demographics=demographics,
            hourly_values=hourly_values,
            stay_admissions=stay_admissions,
            note_input_ids=note_input_ids,
            note_attention_mask=note_attention_mask,
            note_vectors=note_vectors,
            note_mask=note_mask,
        )
        logits = self.classifier(self.dropout(admission.pooler_output))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        return EhrFusionClassifierOutput(loss, logits, admission.pooler_output, admission.gates)


EhrFusionModel.register_for_auto_class("AutoModel")
EhrFusionForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
