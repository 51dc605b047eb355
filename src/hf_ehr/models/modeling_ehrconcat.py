"""Baselines of MedM-PLM (Table III): the vector of a note and that of the codes end to end, or one of them alone.

    note ─ any text encoder ──────┐
                                  ├─ [note ‖ codes] ─ dropout, linear ─▶ outcomes │ diagnoses │ drugs of a visit
    codes ─ G-BERT or Med-BERT ───┘

    windows of one note ─ text encoder ─ linear ─▶ a probability each ─ (max + mean · n/c) / (1 + n/c) ─▶ of the note

Neither encoder knows of the other. What a visit lacks is 0.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ehrconcat import EhrConcatConfig
from .modeling_ehrconcat_codes import MedBertOfVisits
from .modeling_gbert import GBertModel
from .modeling_heads import EhrClassifierOutput, PatientClassifierMixin, classification_loss
from .modeling_icd_coding import checked_notes
from .modeling_medbert import MedBertModel
from .modeling_medmplm_base import MedMPLMPreTrainedModel
from .modeling_medmplm_notes import encode_notes, notes_there
from .modeling_note_encoder import new_note_encoder, opened_note_encoder
from .modeling_recommendation import mean_of_earlier, recommendation_loss


@dataclass
class EhrConcatModelOutput(ModelOutput):
    """Output of [`EhrConcatModel`]; `…` stands for the leading dimensions of the inputs, what is missing is 0.

    Attributes:
        note_state: (…, note_size); `None` without a text encoder.
        code_state: (…, features): of G-BERT the states of diagnoses and of medications, of Med-BERT its pooled one;
            `None` without a code encoder.
    """

    note_state: torch.Tensor | None = None
    code_state: torch.Tensor | None = None


@dataclass
class EhrConcatNoteOutput(ModelOutput):
    """Output of [`EhrConcatForNoteClassification`].

    Attributes:
        loss: Scalar, each window with the label of its note (Huang et al. 2019); only with `labels`.
        logits: (notes, num_labels), whose sigmoid (or softmax) is the probability of the note.
        chunk_logits: (windows, num_labels).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    chunk_logits: torch.Tensor | None = None


class EhrConcatPreTrainedModel(MedMPLMPreTrainedModel):
    """The frozen layers of the text encoder are MedM-PLM's; here either encoder may be missing."""

    config: EhrConcatConfig  # type: ignore[assignment]
    base_model_prefix = "model"
    _no_split_modules = ["CodeSetEmbeddings", "GBertLayer", "EhrLayer"]  # noqa: RUF012 - library's form

    @classmethod
    def from_encoders(
        cls,
        note_encoder: str | Path | PreTrainedModel | None = None,
        code_encoder: str | Path | PreTrainedModel | None = None,
        **fields: Any,
    ):
        """A new model on trained encoders.

        Args:
            note_encoder: Name or folder of a checkpoint, or a model, which becomes part of the new one.
            code_encoder: The same of G-BERT or Med-BERT; any of their heads will do.
            **fields: Fields of [`EhrConcatConfig`].
        """
        note = codes = None
        if note_encoder is not None:
            note = opened_note_encoder(
                note_encoder, pooler=fields.get("note_pooling", EhrConcatConfig.note_pooling) == "pooler"
            )
            fields["note_config"] = note.config
        if code_encoder is not None:
            codes = _opened_codes(code_encoder)
            fields["gbert_config" if isinstance(codes, GBertModel) else "medbert_config"] = codes.config
        model = cls(EhrConcatConfig(**fields))
        base: Any = model.base_model
        if note is not None:
            base.note_encoder = note
        if isinstance(codes, MedBertModel):
            base.code_encoder.medbert = codes
        elif codes is not None:
            if base.code_encoder.diagnosis_embeddings is None:
                codes.diagnosis_embeddings = None
            base.code_encoder = codes
        model.tie_weights()
        return model

    @classmethod
    def from_note_encoder(cls, encoder: str | Path | PreTrainedModel, **fields: Any):
        """A new model on a trained text encoder, as [`from_encoders`]."""
        return cls.from_encoders(encoder, **fields)


def _opened_codes(encoder: str | Path | PreTrainedModel) -> Any:
    if isinstance(encoder, PreTrainedModel):
        return encoder.base_model
    kind = PreTrainedConfig.get_config_dict(encoder)[0].get("model_type")
    families: dict[Any, Any] = {"ehr_gbert": GBertModel, "ehr_medbert": MedBertModel}
    if kind not in families:
        raise ValueError(
            f"`code_encoder` must be a checkpoint of one of {', '.join(families)}, got model type {kind!r}. Give the "
            "folder of a G-BERT or Med-BERT."
        )
    return families[kind].from_pretrained(encoder, dtype=torch.float32)


class EhrConcatModel(EhrConcatPreTrainedModel):
    """Codes and notes of visits → a vector of each."""

    def __init__(self, config: EhrConcatConfig):
        super().__init__(config)
        self.note_encoder: Any = None
        self.code_encoder: Any = None
        if config.note_config is config.gbert_config is config.medbert_config is None:
            raise ValueError("`config` must name an encoder, got none. Give `note_config`, or one of codes.")
        if config.note_config is not None:
            self.note_encoder = new_note_encoder(config.note_config, pooler=config.note_pooling == "pooler")
        gbert: Any = config.gbert_config
        if gbert is not None:
            self.code_encoder = GBertModel(gbert, config.read_diagnoses)
        if config.medbert_config is not None:
            self.code_encoder = MedBertOfVisits(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, diagnosis_ids=None, medication_ids=None, note_input_ids=None, note_attention_mask=None, **kwargs
    ) -> EhrConcatModelOutput:
        """Encodes visits, each by itself.

        Args:
            diagnosis_ids: (…, codes), padded, in any order; not read under `read_diagnoses=False`.
            medication_ids: (…, codes).
            note_input_ids: (…, tokens), a row of padding where a visit has no note.
            note_attention_mask: (…, tokens), 1 for tokens; all are when `None`.
            **kwargs: Not read.

        Raises:
            ValueError: The model reads notes, or diagnoses, and none are given.
        """
        outputs = EhrConcatModelOutput()
        if self.note_encoder is not None:
            outputs.note_state = self.notes(note_input_ids, note_attention_mask)
        if self.code_encoder is not None and self.config.read_diagnoses and diagnosis_ids is None:
            raise ValueError(
                "`diagnosis_ids` must be given to a model that reads diagnoses, got None. Make it with "
                "`read_diagnoses=False` where they are what is predicted."
            )
        if isinstance(self.code_encoder, MedBertOfVisits):
            outputs.code_state = self.code_encoder.admissions(diagnosis_ids, medication_ids)
        elif self.code_encoder is not None:
            found = self.code_encoder(diagnosis_ids if self.config.read_diagnoses else None, medication_ids)
            states = (found.diagnosis_state, found.medication_state)
            outputs.code_state = torch.cat([state for state in states if state is not None], dim=-1)
        return outputs

    def notes(self, input_ids, attention_mask) -> torch.Tensor:
        """Notes (…, tokens) → their vectors (…, note_size), 0 where there is none."""
        if input_ids is None:
            raise ValueError("`note_input_ids` must be given to a model that reads notes, got None. Add rows of them.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = encode_notes(
            self.note_encoder, input_ids.flatten(0, -2), mask.flatten(0, -2), self.config.note_pooling
        )
        every = found.pooled.new_zeros(input_ids.shape[:-1].numel(), found.pooled.shape[-1])
        return every.index_copy(0, found.rows, found.pooled).unflatten(0, input_ids.shape[:-1])


def _feature_sizes(config: Any, states: int) -> int:
    """Width of the vectors end to end, with so many states of G-BERT."""
    note = 0 if config.note_config is None else config.note_config.hidden_size
    codes = 0 if config.gbert_config is None else states * config.gbert_config.hidden_size
    return note + codes + (0 if config.medbert_config is None else config.medbert_config.hidden_size)


class EhrConcatForSequenceClassification(PatientClassifierMixin, EhrConcatPreTrainedModel):
    """Outcomes or diagnoses of admissions from their note and codes."""

    def __init__(self, config: EhrConcatConfig):
        super().__init__(config)
        self.model = EhrConcatModel(config)
        self.add_classifier(_feature_sizes(config, 2 if config.read_diagnoses else 1))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        diagnosis_ids=None,
        medication_ids=None,
        note_input_ids=None,
        note_attention_mask=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs,
    ) -> EhrClassifierOutput:
        """Scores admissions; inputs as in [`EhrConcatModel`].

        Args:
            labels: (admissions,) class index, or (admissions, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
        """
        found = self.model(diagnosis_ids, medication_ids, note_input_ids, note_attention_mask)
        parts = [state for state in (found.note_state, found.code_state) if state is not None]
        return self.classify(torch.cat(parts, dim=-1), None, labels, num_items_in_batch)


class EhrConcatForMedicationRecommendation(EhrConcatPreTrainedModel):
    """Medications of a visit from its diagnoses and from the visits before it, notes among them."""

    accepts_loss_kwargs = False  # the loss is a mean over patients that no count of labels scales

    def __init__(self, config: EhrConcatConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        if not config.read_diagnoses:
            raise ValueError(
                "`read_diagnoses` must be True, got False: a visit's drugs are asked for by its diagnoses."
            )
        self.model = EhrConcatModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(_feature_sizes(config, 3), self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        diagnosis_ids=None,
        medication_ids=None,
        note_input_ids=None,
        note_attention_mask=None,
        labels=None,
        **kwargs,
    ) -> EhrClassifierOutput:
        """Scores the medications of every visit; none of them sees its own medications or note, or a later visit.

        Args:
            diagnosis_ids: (batch, visits, codes), oldest visit first.
            medication_ids: The same of medications; those of the visit that is asked about may be there.
            note_input_ids: (batch, visits, tokens); the same holds of its note.
            note_attention_mask: (batch, visits, tokens).
            labels: (batch, visits, num_labels) of 0 and 1, -100 throughout a visit that is not there. The first visit
                has no history and is never part of the loss.
            **kwargs: Not read.

        Returns:
            `logits` (batch, visits, num_labels), and `loss`: the mean over labels, visits and then patients.

        Raises:
            ValueError: As [`EhrConcatModel`], or the labels are not of the shape of the logits.
        """
        parts = []
        if self.model.note_encoder is not None:
            states = self.model.notes(note_input_ids, note_attention_mask)
            there = notes_there(note_input_ids, note_attention_mask, note_input_ids)
            parts.append(mean_of_earlier(states, there))
        if self.model.code_encoder is not None:
            parts += self._codes(diagnosis_ids, medication_ids)
        features = torch.cat(parts, dim=-1)
        logits = self.classifier(self.dropout(features))
        loss = None if labels is None else recommendation_loss(logits, labels)
        return EhrClassifierOutput(loss=loss, logits=logits, pooler_output=features)

    def _codes(self, diagnosis_ids, medication_ids) -> list[torch.Tensor]:
        """What a visit may know of codes, (batch, visits, features) each."""
        encoder = self.model.code_encoder
        if isinstance(encoder, MedBertOfVisits):
            return [encoder.histories(diagnosis_ids, medication_ids)]
        found, pad = encoder(diagnosis_ids, medication_ids), encoder.config.pad_token_id
        diagnosed, medicated = ((ids != pad).any(dim=-1) for ids in (diagnosis_ids, medication_ids))
        history = mean_of_earlier(found.diagnosis_state, diagnosed)
        return [history, mean_of_earlier(found.medication_state, medicated), found.diagnosis_state]


def chunk_vote(probabilities: torch.Tensor, notes: torch.Tensor, num_notes: int, scale: float = 2.0) -> torch.Tensor:
    """The probability of a note from those of its n windows: (max + mean · n/c) / (1 + n/c) (Huang et al. 2019).

    Args:
        probabilities: (windows, labels).
        notes: (windows,) int64, the note of each window.
        num_notes: Number of notes, each with a window.
        scale: c.

    Returns:
        (notes, labels).
    """
    empty = probabilities.new_zeros(num_notes, probabilities.shape[1])
    greatest = empty.scatter_reduce(0, notes[:, None].expand_as(probabilities), probabilities, "amax")
    count = notes.bincount(minlength=num_notes)[:, None]
    total = empty.index_add(0, notes, probabilities)  # the mean times n
    return (greatest + total / scale) / (1 + count / scale)


class EhrConcatForNoteClassification(EhrConcatPreTrainedModel):
    """ClinicalBERT as its authors use it: each window of a long note votes (Huang et al. 2019)."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean over windows, which no count of labels scales

    def __init__(self, config: EhrConcatConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        several = config.problem_type == "multi_label_classification"
        if config.note_config is None or not (several or self.num_labels == 2):
            raise ValueError(
                "`config` must have `note_config`, and 2 labels unless `problem_type` is multi_label_classification: "
                f"votes are over probabilities of yes, got {self.num_labels} labels. Change it."
            )
        self.model = EhrConcatModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.note_config.hidden_size, self.num_labels)  # type: ignore[union-attr]
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, note_index=None, labels=None, **kwargs
    ) -> EhrConcatNoteOutput:
        """Scores notes of several windows, as [`EhrBertForICDCoding`] reads them.

        Args:
            input_ids: (windows, length).
            attention_mask: (windows, length), 1 for tokens and 0 for padding.
            note_index: (windows,) int64, the note of each window, ascending from 0. `None`: each is a note.
            labels: (notes,) class index, or (notes, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            **kwargs: Not read.

        Raises:
            ValueError: The `note_index` does not fit.
        """
        notes, count = checked_notes(note_index, len(input_ids), input_ids.device)
        chunks = self.classifier(self.dropout(self.model.notes(input_ids, attention_mask)))
        several = self.config.problem_type == "multi_label_classification"
        yes = chunks.float().sigmoid() if several else chunks.float().softmax(dim=1)[:, 1:]
        vote = chunk_vote(yes, notes, count, self.config.chunk_scale)
        logits = torch.logit(vote, eps=1e-7)
        loss = None
        if labels is not None:
            loss = classification_loss(chunks, labels[notes], self.config.problem_type)
        if not several:
            logits = nn.functional.pad(logits, (1, 0))
        return EhrConcatNoteOutput(loss=loss, logits=logits, chunk_logits=chunks)


EhrConcatModel.register_for_auto_class("AutoModel")
EhrConcatForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
EhrConcatForMedicationRecommendation.register_for_auto_class("AutoModelForSequenceClassification")
EhrConcatForNoteClassification.register_for_auto_class("AutoModelForSequenceClassification")
