"""MedM-PLM (Liu et al., IEEE JBHI 2022): codes and notes of visits, read together.

    diagnoses ──┬─ G-BERT ─▶ Z_dx ─┐                          ┌─▶ R_dx, R_rx: codes that have read the note
    medications ┘            Z_rx ─┼─ cross-modal attention ──┤
    note ─ any text encoder ─▶ Z_W ┘                          └─▶ R_text of each kind: the note that has read it

A visit may lack the note or any kind of code: what is missing is 0, and nothing looks at it. Each visit is encoded by
itself, so that no visit, and no patient, sees another.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_medmplm import MedMPLMConfig
from .modeling_code_prediction import CodePredictionHead, code_prediction_loss, predicted
from .modeling_cross_modal import CodeSets, CrossModal, Fused, NoteStates
from .modeling_gbert import KINDS, GBertModel, code_targets
from .modeling_heads import EhrClassifierOutput, PatientClassifierMixin
from .modeling_medmplm_base import MedMPLMForPreTrainingOutput, MedMPLMModelOutput, MedMPLMPreTrainedModel
from .modeling_medmplm_notes import encode_notes, notes_there
from .modeling_note_encoder import new_note_encoder
from .modeling_recommendation import mean_of_earlier, recommendation_loss


class MedMPLMModel(MedMPLMPreTrainedModel):
    """Codes and notes of visits → vectors of both that know of each other.

    Args:
        config: The configuration.
        add_diagnoses: Whether there is anything that reads diagnoses; a model that predicts them goes without.
    """

    def __init__(self, config: MedMPLMConfig, add_diagnoses: bool = True):
        super().__init__(config)
        codes, notes = config.code_config, config.note_config
        self.code_encoder = GBertModel(codes, add_diagnoses)
        self.note_encoder: Any = new_note_encoder(notes, pooler=config.note_pooling == "pooler")
        self.cross_modal = None
        if config.cross_modal != "none":
            kinds = KINDS if add_diagnoses else KINDS[1:]
            sizes = (config.cross_modal, codes.hidden_size, notes.hidden_size)
            self.cross_modal = nn.ModuleDict({kind: CrossModal(*sizes) for kind in kinds})
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        diagnosis_ids: torch.Tensor | None = None,
        medication_ids: torch.Tensor | None = None,
        note_input_ids: torch.Tensor | None = None,
        note_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> MedMPLMModelOutput:
        """Encodes visits.

        Args:
            diagnosis_ids: (…, codes), padded, without `[CLS]`, in any order; `…` is any number of dimensions, as
                (batch, visits).
            medication_ids: The same of medications.
            note_input_ids: (…, tokens), a row of padding where a visit has no note. `None`: no visit has one.
            note_attention_mask: (…, tokens), 1 for tokens; all are when `None`.
            **kwargs: Passed to [`GBertModel`].

        Raises:
            ValueError: Leading dimensions differ, or the model reads no diagnoses and some are given.
        """
        both = {"diagnosis": diagnosis_ids, "medication": medication_ids}
        given = {kind: ids for kind, ids in both.items() if ids is not None}
        encoded = self.code_encoder(diagnosis_ids, medication_ids, **kwargs)
        shape = next(iter(given.values())).shape[:-1]
        notes = self._notes(note_input_ids, note_attention_mask, shape)
        outputs = MedMPLMModelOutput(hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        outputs.note_pooler_output = _spread(notes.pooled, notes.rows, shape)
        for kind, ids in given.items():
            pooled, states = encoded[f"{kind}_state"], encoded[f"{kind}_states"].flatten(0, -3)
            codes = (ids != self.config.code_config.pad_token_id).flatten(0, -2)
            flat = pooled.flatten(0, -2)
            fused = self._fused(kind, CodeSets(flat[notes.rows], states[notes.rows], codes[notes.rows]), notes)
            outputs[f"{kind}_pooler_output"] = pooled
            outputs[f"{kind}_state"] = _spread(fused.codes, notes.rows, shape, flat)
            outputs[f"note_{kind}_state"] = _spread(fused.text, notes.rows, shape)
            for name, weights in (
                (f"{kind}_note_attentions", fused.code_weights), (f"note_{kind}_attentions", fused.text_weights),
            ):  # fmt: skip
                outputs[name] = None if weights is None else _spread(weights, notes.rows, shape)
        return outputs

    def _notes(self, input_ids, attention_mask, shape: torch.Size) -> NoteStates:
        """The notes of the visits that have one."""
        if input_ids is None:
            input_ids = torch.zeros(*shape, 1, dtype=torch.long, device=self.device)
            attention_mask = input_ids
        if input_ids.shape[:-1] != shape:
            raise ValueError(
                f"`note_input_ids` must be {tuple(shape)} notes as there are sets of codes, got "
                f"{tuple(input_ids.shape)}. Give a row of padding where a visit has no note."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids = (input_ids.flatten(0, -2), mask.flatten(0, -2))
        return encode_notes(self.note_encoder, *ids, self.config.note_pooling)

    def _fused(self, kind: str, codes: CodeSets, notes: NoteStates) -> Fused:
        if self.cross_modal is None:
            return Fused(codes.pooled, notes.pooled)
        return self.cross_modal[kind](codes, notes)


def _spread(values: torch.Tensor, rows: torch.Tensor, shape: torch.Size, onto: torch.Tensor | None = None):
    """Values (rows, …) at their places among all visits, over `onto` (visits, …) or zeros → (*shape, …)."""
    if onto is None:
        onto = values.new_zeros(shape.numel(), *values.shape[1:])
    return onto.index_copy(0, rows, values.to(onto.dtype)).view(*shape, *values.shape[1:])


class MedMPLMForPreTraining(MedMPLMPreTrainedModel):
    """Text-to-code and code-to-code prediction over visits whose codes are masked."""

    accepts_loss_kwargs = False  # the losses are means over visits that no count of labels scales

    def __init__(self, config: MedMPLMConfig):
        super().__init__(config)
        self.medmplm = MedMPLMModel(config)
        codes = config.code_config
        sizes = (codes.hidden_size, codes.hidden_size, config.note_config.hidden_size)
        for kind in KINDS:
            heads = [CodePredictionHead(size, codes.num_codes(kind)) for size in sizes]
            self.add_module(f"{kind}_heads", nn.ModuleList(heads))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        diagnosis_ids=None,
        medication_ids=None,
        note_input_ids=None,
        note_attention_mask=None,
        diagnosis_labels=None,
        medication_labels=None,
        **kwargs,
    ) -> MedMPLMForPreTrainingOutput:
        """Predicts the codes of visits, six times: each kind from each kind and from the note.

        Args:
            diagnosis_ids: (…, codes), part of them replaced.
            medication_ids: The same of medications.
            note_input_ids: As in [`MedMPLMModel`].
            note_attention_mask: As there.
            diagnosis_labels: Of the shape of `diagnosis_ids`: the true id where one was chosen, -100 elsewhere. No
                loss without both labels.
            medication_labels: The same of medications.
            **kwargs: Passed to [`MedMPLMModel`].
        """
        encoded = self.medmplm(diagnosis_ids, medication_ids, note_input_ids, note_attention_mask, **kwargs)
        logits = []
        for kind in KINDS:
            states = (encoded.diagnosis_state, encoded.medication_state, encoded[f"note_{kind}_state"])
            logits.append(predicted(getattr(self, f"{kind}_heads"), states))
        outputs = MedMPLMForPreTrainingOutput(
            diagnosis_logits=logits[0],
            medication_logits=logits[1],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if diagnosis_labels is not None and medication_labels is not None:
            pairs = ((diagnosis_ids, diagnosis_labels), (medication_ids, medication_labels))
            notes = notes_there(note_input_ids, note_attention_mask, diagnosis_ids).flatten()
            losses = self._losses(logits, pairs, notes)
            outputs.code_to_code_loss = torch.stack([loss for row in losses for loss in row[:2]]).sum()
            outputs.text_to_code_loss = losses[0][2] + losses[1][2]
            outputs.loss = outputs.code_to_code_loss + outputs.text_to_code_loss
        return outputs

    def _losses(self, logits, pairs, notes: torch.Tensor) -> list[list[torch.Tensor]]:
        """Of each kind (rows) from diagnoses, from medications, from the note."""
        codes = self.config.code_config
        there = [(ids != codes.pad_token_id).any(dim=-1).flatten() for ids, _ in pairs]
        targets = code_targets(codes, pairs, self.config.pretraining_loss)
        return [
            [
                code_prediction_loss(scores.flatten(0, -2), target, source)
                for scores, source in zip(row.unbind(-2), (*there, notes), strict=True)
            ]
            for row, target in zip(logits, targets, strict=True)
        ]


class MedMPLMForMedicationRecommendation(MedMPLMPreTrainedModel):
    """Medications of a visit from its diagnoses and from the visits before it (Eq 11-13).

    Whether a visit's own note is seen, in which its drugs are listed, says `config.target_text`.
    """

    accepts_loss_kwargs = False  # the loss is a mean over patients that no count of labels scales

    def __init__(self, config: MedMPLMConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.medmplm = MedMPLMModel(config)
        texts = 3 if config.target_text == "full" else 2
        width = 3 * config.code_config.hidden_size + texts * config.note_config.hidden_size
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(width, self.num_labels)
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
        """Scores the medications of every visit; none of them sees its own medications, or a later visit.

        Args:
            diagnosis_ids: (batch, visits, codes), oldest visit first.
            medication_ids: The same of medications; those of the visit that is asked about may be there.
            note_input_ids: (batch, visits, tokens); the same holds of its note under `target_text="none"`.
            note_attention_mask: (batch, visits, tokens).
            labels: (batch, visits, num_labels) of 0 and 1, -100 throughout a visit that is not there. The first visit
                has no history and is never part of the loss.
            **kwargs: Passed to [`MedMPLMModel`].

        Returns:
            `logits` (batch, visits, num_labels), and `loss`: the mean over labels, visits and then patients.

        Raises:
            ValueError: As [`MedMPLMModel`], or the labels are not of the shape of the logits.
        """
        encoded = self.medmplm(diagnosis_ids, medication_ids, note_input_ids, note_attention_mask, **kwargs)
        pad = self.config.code_config.pad_token_id
        diagnosed, medicated = ((ids != pad).any(dim=-1) for ids in (diagnosis_ids, medication_ids))
        noted = notes_there(note_input_ids, note_attention_mask, diagnosis_ids)
        features = self._features(encoded, diagnosed, medicated, noted)
        logits = self.classifier(self.dropout(features))
        loss = None if labels is None else recommendation_loss(logits, labels)
        return EhrClassifierOutput(
            loss=loss,
            logits=logits,
            pooler_output=features,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _features(self, encoded, diagnosed, medicated, noted) -> torch.Tensor:
        """History of codes, the visit's diagnoses, history of notes, (batch, visits, features)."""
        own_diagnoses = (
            encoded.diagnosis_pooler_output if self.config.target_text == "none" else encoded.diagnosis_state
        )
        parts = [
            mean_of_earlier(encoded.diagnosis_state, diagnosed),
            mean_of_earlier(encoded.medication_state, medicated),
            own_diagnoses,
            mean_of_earlier(encoded.note_diagnosis_state, noted),
            mean_of_earlier(encoded.note_medication_state, noted),
        ]
        if self.config.target_text == "full":
            parts.append(encoded.note_diagnosis_state)
        return torch.cat(parts, dim=-1)


class MedMPLMForReadmission(PatientClassifierMixin, MedMPLMPreTrainedModel):
    """Outcomes of admissions, as readmission within 30 days, from their codes and note."""

    def __init__(self, config: MedMPLMConfig):
        super().__init__(config)
        self.medmplm = MedMPLMModel(config)
        self.add_classifier(2 * config.code_config.hidden_size + 2 * config.note_config.hidden_size)
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
        """Scores admissions.

        Args:
            diagnosis_ids: (admissions, codes).
            medication_ids: (admissions, codes).
            note_input_ids: (admissions, tokens).
            note_attention_mask: (admissions, tokens).
            labels: (admissions,) class index, or (admissions, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            **kwargs: Passed to [`MedMPLMModel`].
        """
        encoded = self.medmplm(diagnosis_ids, medication_ids, note_input_ids, note_attention_mask, **kwargs)
        parts = (
            *(encoded.note_diagnosis_state, encoded.note_medication_state),
            *(encoded.diagnosis_state, encoded.medication_state),
        )
        return self.classify(
            torch.cat(parts, dim=-1), None, labels, num_items_in_batch,
            hidden_states=encoded.hidden_states, attentions=encoded.attentions,
        )  # fmt: skip


class MedMPLMForICDCoding(PatientClassifierMixin, MedMPLMPreTrainedModel):
    """Diagnoses of admissions from their note and medications. There is nothing in it that reads diagnoses."""

    _keys_to_ignore_on_load_unexpected = [r"diagnosis"]  # noqa: RUF012 - the library's own declaration

    def __init__(self, config: MedMPLMConfig):
        super().__init__(config)
        self.medmplm = MedMPLMModel(config, add_diagnoses=False)
        self.add_classifier(config.code_config.hidden_size + config.note_config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        medication_ids=None,
        note_input_ids=None,
        note_attention_mask=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs,
    ) -> EhrClassifierOutput:
        """Scores the codes of admissions.

        Args:
            medication_ids: (admissions, codes); rows of padding where there are none.
            note_input_ids: (admissions, tokens).
            note_attention_mask: (admissions, tokens).
            labels: (admissions, num_labels) of 0 and 1 under `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            **kwargs: Passed to [`MedMPLMModel`].

        Raises:
            ValueError: Diagnoses are given.
        """
        if kwargs.pop("diagnosis_ids", None) is not None:
            raise ValueError("`diagnosis_ids` must not be given: they are what is predicted. Leave them out.")
        encoded = self.medmplm(None, medication_ids, note_input_ids, note_attention_mask, **kwargs)
        features = torch.cat([encoded.note_medication_state, encoded.medication_state], dim=-1)
        return self.classify(
            features, None, labels, num_items_in_batch,
            hidden_states=encoded.hidden_states, attentions=encoded.attentions,
        )  # fmt: skip


MedMPLMModel.register_for_auto_class("AutoModel")
MedMPLMForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MedMPLMForMedicationRecommendation.register_for_auto_class("AutoModelForSequenceClassification")
MedMPLMForReadmission.register_for_auto_class("AutoModelForSequenceClassification")
MedMPLMForICDCoding.register_for_auto_class("AutoModelForSequenceClassification")
