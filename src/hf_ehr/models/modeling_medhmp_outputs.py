"""What the MedHMP models return."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from .modeling_medhmp_admission import Modalities


@dataclass
class MedHMPStayModelOutput(ModelOutput):
    """Output of [`MedHMPStayModel`].

    Attributes:
        stay_state: (stays, hidden), b of Eq 2.
        last_hidden_state: (stays, hours, hidden), the recurrence after each hour, 0 on padding.
        attentions: One (stays, heads, 2, 2): state of the hours and demographics.
    """

    stay_state: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MedHMPModelOutput(ModelOutput):
    """Output of [`MedHMPModel`].

    Attributes:
        admission_state: (admissions, hidden), a of Eq 7.
        stay_state: (stays, hidden), b of Eq 2.
        modality_states: (admissions, 4, hidden): stays, diagnoses, medications, note; a learned token where one is
            missing.
        modality_mask: (admissions, 4) bool, which are there.
        attentions: One (admissions, heads, 4, 4), rows look at columns.
    """

    admission_state: torch.Tensor | None = None
    stay_state: torch.Tensor | None = None
    modality_states: torch.Tensor | None = None
    modality_mask: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MedHMPForStayPreTrainingOutput(ModelOutput):
    """Output of [`MedHMPForStayPreTraining`].

    Attributes:
        loss: Scalar, squared error over the hours that stays have; 0 when none has any.
        reconstruction: (stays, hours, features).
        stay_state: (stays, hidden).
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    stay_state: torch.Tensor | None = None


@dataclass
class MedHMPForAdmissionPreTrainingOutput(ModelOutput):
    """Output of [`MedHMPForAdmissionPreTraining`].

    Attributes:
        loss: Scalar, the weighted sum of the two losses (Eq 11).
        masked_code_loss: Scalar, before its weight; `None` without masks or at weight 0.
        contrastive_loss: Scalar, before its weight; `None` at weight 0.
        diagnosis_logits: (admissions, diagnosis_vocab_size), given the codes that are not hidden.
        medication_logits: (admissions, medication_vocab_size).
    """

    loss: torch.Tensor | None = None
    masked_code_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    diagnosis_logits: torch.Tensor | None = None
    medication_logits: torch.Tensor | None = None


class EncodedAdmissions(NamedTuple):
    """What the encoders make of a batch, before fusion."""

    stay_state: torch.Tensor
    """(stays, hidden)."""
    modalities: Modalities
    diagnosis_ids: torch.Tensor
    """(admissions, codes), padding where the batch had none."""
    medication_ids: torch.Tensor


class MaskedCodeParts(NamedTuple):
    """The masked-code loss in parts that add up over the chunks of a batch."""

    sums: torch.Tensor
    """(2,): losses of diagnoses and medications, summed over the admissions that have any."""
    rows: torch.Tensor
    """(2,) int: these admissions."""
    logits: tuple[torch.Tensor, ...]
