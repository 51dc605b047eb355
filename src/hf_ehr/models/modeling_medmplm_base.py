"""What the MedM-PLM models share: their outputs, weight initialisation, and the frozen layers of the text encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_medmplm import MedMPLMConfig
from .modeling_cross_modal import init_cross_modal
from .modeling_medmplm_notes import freeze_first_layers, quiet_frozen_layers
from .modeling_note_encoder import opened_note_encoder


@dataclass
class MedMPLMModelOutput(ModelOutput):
    """Output of [`MedMPLMModel`]; `…` stands for the leading dimensions of the inputs, what is missing is 0.

    Attributes:
        diagnosis_state: (…, hidden), R_dx.
        medication_state: (…, hidden), R_rx.
        note_diagnosis_state: (…, note_size), R_text that has read the diagnoses.
        note_medication_state: (…, note_size), R_text that has read the medications.
        diagnosis_pooler_output: (…, hidden), Z_dx, which knows no note.
        medication_pooler_output: (…, hidden), Z_rx.
        note_pooler_output: (…, note_size), Z_W, which knows no code.
        diagnosis_note_attentions: (…, tokens), what the diagnoses looked at. `None` where codes look at nothing.
        medication_note_attentions: The same of the medications.
        note_diagnosis_attentions: (…, codes), what the note looked at. `None` without a cross-modal module.
        note_medication_attentions: The same in the medications.
        hidden_states: Of the code encoder, as in [`GBertModel`].
        attentions: Likewise.
    """

    diagnosis_state: torch.Tensor | None = None
    medication_state: torch.Tensor | None = None
    note_diagnosis_state: torch.Tensor | None = None
    note_medication_state: torch.Tensor | None = None
    diagnosis_pooler_output: torch.Tensor | None = None
    medication_pooler_output: torch.Tensor | None = None
    note_pooler_output: torch.Tensor | None = None
    diagnosis_note_attentions: torch.Tensor | None = None
    medication_note_attentions: torch.Tensor | None = None
    note_diagnosis_attentions: torch.Tensor | None = None
    note_medication_attentions: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MedMPLMForPreTrainingOutput(ModelOutput):
    """Output of [`MedMPLMForPreTraining`]; columns are ids without the special tokens.

    Attributes:
        loss: Scalar, the sum of the two, or `None` without labels.
        text_to_code_loss: Scalar, both kinds of codes from the note.
        code_to_code_loss: Scalar, both kinds from both kinds.
        diagnosis_logits: (…, 3, diagnoses): from diagnoses, from medications, from the note.
        medication_logits: (…, 3, medications): likewise.
        hidden_states: Of the code encoder, as in [`GBertModel`].
        attentions: Likewise.
    """

    loss: torch.Tensor | None = None
    text_to_code_loss: torch.Tensor | None = None
    code_to_code_loss: torch.Tensor | None = None
    diagnosis_logits: torch.Tensor | None = None
    medication_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MedMPLMPreTrainedModel(PreTrainedModel):
    """Weight initialisation, the frozen layers, and the declarations the library asks for."""

    config: MedMPLMConfig
    base_model_prefix = "medmplm"
    main_input_name = "medication_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CodeSetEmbeddings", "GBertLayer", "CrossModal"]  # noqa: RUF012 - library's form
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_cross_modal(module)

    @classmethod
    def from_note_encoder(cls, encoder: str | Path | PreTrainedModel, **fields: Any):
        """A new model on a trained text encoder.

        Args:
            encoder: Name or folder of a checkpoint, opened in fp32; or a model, which becomes part of the new one.
            **fields: Fields of [`MedMPLMConfig`].
        """
        note_encoder = opened_note_encoder(
            encoder, pooler=fields.get("note_pooling", MedMPLMConfig.note_pooling) == "pooler"
        )
        model = cls(MedMPLMConfig(note_config=note_encoder.config, **fields))
        model.base_model.note_encoder = note_encoder
        model.tie_weights()
        return model

    def tie_weights(self, *args, **kwargs):
        """Freezes the text encoder again: loading makes new parameters, and calls this at its end."""
        super().tie_weights(*args, **kwargs)
        if self.config.freeze_note_layers is not None:
            freeze_first_layers(self._note_encoder(), self.config.freeze_note_layers)

    def train(self, mode: bool = True):
        """As always, but frozen layers have no dropout."""
        super().train(mode)
        if self.config.freeze_note_layers is not None:
            quiet_frozen_layers(self._note_encoder(), self.config.freeze_note_layers)
        return self

    def _note_encoder(self) -> Any:
        return getattr(self, self.base_model_prefix, self).note_encoder
