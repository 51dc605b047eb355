"""MedHMP (Wang et al., EMNLP 2023): hours of ICU stays → stays → admissions, pre-trained level by level.

    hours ─ LSTM ─▶ cell state ─┐
    demographics ─ MLP ─────────┴─ fusion ─▶ stay b ─┬─▶ decoder ─▶ the same hours            (stage 1)
                                                     └─ pooled ─┐
    diagnoses ─ MLP ────────────────────────────────────────────┤
    medications ─ MLP ──────────────────────────────────────────┼─ fusion ─▶ admission a ─▶ hidden codes
    note ─ text encoder, or a vector ───────────────────────────┘            modality ~ the others  (stage 2)

The stay encoder has the same name in all models, so that a checkpoint of one stage fills it in the next.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_medhmp import MedHMPConfig
from .modeling_contrastive import ContrastiveViews, contrastive_loss
from .modeling_heads import EhrClassifierOutput, PatientClassifierMixin
from .modeling_masked_codes import MaskedCodes, checked_masks, masked_code_losses
from .modeling_medhmp_admission import (
    AdmissionEncoder,
    init_layer,
    owners_of_stays,
)
from .modeling_medhmp_outputs import (
    EncodedAdmissions,
    MaskedCodeParts,
    MedHMPForAdmissionPreTrainingOutput,
    MedHMPForStayPreTrainingOutput,
    MedHMPModelOutput,
    MedHMPStayModelOutput,
)
from .modeling_medhmp_stay import HourlyDecoder, StayEncoder
from .modeling_note_encoder import NoteEncoderMixin, encoded_notes, new_note_encoder

ANCHORS = (1, 2, 3)
"""The modalities that the contrastive loss compares with the others: diagnoses, medications, note (Eq 10)."""


class MedHMPPreTrainedModel(NoteEncoderMixin, PreTrainedModel):
    """Weight initialisation, loading, and the declarations the library asks for."""

    config: MedHMPConfig
    base_model_prefix = "medhmp"
    main_input_name = "stay_hours"
    _no_split_modules = ["StayEncoder", "AdmissionEncoder"]  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_layer(module)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in the library, but a checkpoint that does not fill the whole stay encoder is refused.

        Raises:
            ValueError: Tensors of the stay encoder are missing: the next stage would train on a random one.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        lost = sorted(name for name in info["missing_keys"] if "stay_encoder." in name)
        if lost:
            raise ValueError(
                f"The checkpoint must hold every tensor of the stay encoder, {len(lost)} are missing: "
                f"{', '.join(lost)}. Load a folder that a MedHMP model was saved to."
            )
        return (model, info) if output_loading_info else model


class MedHMPStayModel(MedHMPPreTrainedModel):
    """ICU stays → one state each."""

    def __init__(self, config: MedHMPConfig):
        super().__init__(config)
        self.stay_encoder = StayEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, **inputs) -> MedHMPStayModelOutput:
        """Encodes stays.

        Args:
            **inputs: `stay_hours` (stays,) int, hours of each stay, 0 for one without any; `feature_ids` (entries,),
                the features that are not 0, hour after hour and stay after stay; `feature_counts` (sum of
                `stay_hours`,), entries of each hour; `feature_values` (entries,), all 1 where there are none; or
                `hourly_values` (stays, hours, features) in place of these three; `demographics` (stays,
                num_demographics). Others are not read.

        Raises:
            ValueError: The parts of the batch do not fit together or the configuration.
        """
        stays = self.stay_encoder.encode(**inputs)
        return MedHMPStayModelOutput(
            stay_state=stays.state, last_hidden_state=stays.hours, attentions=(stays.attention,)
        )


class MedHMPForStayPreTraining(MedHMPPreTrainedModel):
    """Stage 1: a stay's hours from its state (Eq 3)."""

    accepts_loss_kwargs = False  # the loss is a mean that no count of labels scales

    def __init__(self, config: MedHMPConfig):
        super().__init__(config)
        self.medhmp = MedHMPStayModel(config)
        self.decoder = HourlyDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, **inputs) -> MedHMPForStayPreTrainingOutput:
        """Encodes and decodes stays.

        Args:
            **inputs: As in [`MedHMPStayModel`], and `hidden_features` (stays, features) bool: what the encoder does
                not see and the decoder has to give all the same. The paper hides nothing.
        """
        stays = self.medhmp.stay_encoder.encode(**inputs)
        values, mask = stays.series
        reconstruction = self.decoder(stays.state, mask.shape[1])
        errors = (reconstruction.float() - values.float()).square().sum(dim=2) * mask
        loss = errors.sum() / mask.sum().clamp(min=1)
        if self.config.reconstruction_reduction == "mean":
            loss = loss / self.config.num_hourly_features
        return MedHMPForStayPreTrainingOutput(loss=loss, reconstruction=reconstruction, stay_state=stays.state)


class MedHMPForStayClassification(PatientClassifierMixin, MedHMPPreTrainedModel):
    """Outcomes of ICU stays from the hours that were observed."""

    def __init__(self, config: MedHMPConfig):
        super().__init__(config)
        self.medhmp = MedHMPStayModel(config)
        self.add_classifier(config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(self, labels=None, num_items_in_batch=None, **inputs) -> EhrClassifierOutput:
        """Scores stays.

        Args:
            labels: (stays,) class index, or (stays, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            **inputs: As in [`MedHMPStayModel`].
        """
        stays = self.medhmp.stay_encoder.encode(**inputs)
        return self.classify(stays.state, None, labels, num_items_in_batch, attentions=(stays.attention,))


class MedHMPModel(MedHMPPreTrainedModel):
    """Admissions with their ICU stays, codes and note → one state each."""

    def __init__(self, config: MedHMPConfig):
        super().__init__(config)
        self.stay_encoder = StayEncoder(config)
        self.admission_encoder = AdmissionEncoder(config)
        self.note_encoder: Any = None if config.note_config is None else new_note_encoder(config.note_config)
        self.post_init()

    def note_vectors(self, note_input_ids, note_attention_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of notes → what `forward` takes in their place, to be made once where the text encoder is frozen.

        Args:
            note_input_ids: (admissions, tokens).
            note_attention_mask: (admissions, tokens), 1 for tokens; `None` means no padding.

        Returns:
            The mean of the states of each note's tokens (admissions, note_size), and which notes have any.

        Raises:
            ValueError: The model has no text encoder.
        """
        if self.note_encoder is None:
            raise ValueError(
                "`note_input_ids` need a text encoder, and the model has none (`note_config=None`). Give "
                "`note_vectors`, or take an encoder with `with_note_encoder`."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_note_encoder):
            return encoded_notes(self.note_encoder, note_input_ids, note_attention_mask)

    def encode(
        self, stay_hours=None, stay_admissions=None, diagnosis_ids=None, medication_ids=None, **inputs
    ) -> EncodedAdmissions:
        """As `forward`, before fusion."""
        encoder = self.admission_encoder
        given = (diagnosis_ids, medication_ids, inputs.get("note_input_ids"), inputs.get("note_vectors"))
        count, owners = owners_of_stays([len(x) for x in given if x is not None], stay_hours, stay_admissions)
        if stay_hours is None:
            stay_hours = torch.zeros(0, dtype=torch.long, device=encoder.missing.device)
            inputs |= {"hourly_values": encoder.missing.new_zeros(0, 1, self.config.num_hourly_features)}
            inputs |= {"demographics": encoder.missing.new_zeros(0, self.config.num_demographics)}
            owners = stay_hours
        stays = self.stay_encoder.encode(stay_hours=stay_hours, **inputs).state
        # What is not there goes through its layers all the same, as padding: every parameter is in every batch.
        pads = (self.config.diagnosis_pad_token_id, self.config.medication_pad_token_id)
        diagnoses, medications = (
            torch.full((count, 1), pad, device=stays.device) if ids is None else ids
            for ids, pad in zip(given[:2], pads, strict=True)
        )
        if inputs.get("note_vectors") is None and inputs.get("note_input_ids") is not None:
            vectors, there = self.note_vectors(inputs["note_input_ids"], inputs.get("note_attention_mask"))
            inputs |= {"note_vectors": vectors, "note_mask": there}
        parts = [
            encoder.pooled(stays, stay_hours > 0, owners, count),
            encoder.codes("diagnoses", diagnoses),
            encoder.codes("medications", medications),
            encoder.notes(count, **inputs),
        ]
        return EncodedAdmissions(stays, encoder.modalities(parts), diagnoses, medications)

    @can_return_tuple
    def forward(self, **inputs) -> MedHMPModelOutput:
        """Encodes admissions. Any modality may be left out of a batch, and any admission may lack any of them.

        Args:
            **inputs: Those of [`MedHMPStayModel`] for the stays, with `stay_admissions` (stays,) int64, ascending, the
                admission of each (one stay for each admission when absent); `diagnosis_ids` and `medication_ids`
                (admissions, codes), padded; and for the notes `note_input_ids` with `note_attention_mask` (admissions,
                tokens), or `note_vectors` (admissions, note_size) with `note_mask` (admissions,) bool. Others are not
                read.

        Raises:
            ValueError: The parts of the batch do not fit together or the configuration.
        """
        encoded = self.encode(**inputs)
        tokens, present = encoded.modalities
        state, attention = self.admission_encoder(encoded.modalities)
        return MedHMPModelOutput(
            admission_state=state,
            stay_state=encoded.stay_state,
            modality_states=tokens,
            modality_mask=present,
            attentions=(attention,),
        )


class MedHMPForAdmissionPreTraining(MedHMPPreTrainedModel):
    """Stage 2: hidden codes of admissions (Eq 8-9), and each modality beside the fusion of the others (Eq 10)."""

    accepts_loss_kwargs = False  # the losses are means that no count of labels scales

    def __init__(self, config: MedHMPConfig):
        super().__init__(config)
        self.medhmp = MedHMPModel(config)
        self.diagnosis_head = nn.Linear(config.hidden_size, config.diagnosis_vocab_size)
        self.medication_head = nn.Linear(config.hidden_size, config.medication_vocab_size)
        self.masked_count = nn.Linear(1, config.hidden_size) if config.embed_masked_count else None
        self.post_init()

    def contrastive_views(self, encoded: EncodedAdmissions) -> ContrastiveViews:
        """Diagnoses, medications and note of each admission, and the admission without each of them."""
        modalities, columns = encoded.modalities, list(ANCHORS)
        fused = [self.medhmp.admission_encoder(modalities, without=column)[0] for column in columns]
        others = modalities.present.sum(dim=1, keepdim=True) - modalities.present[:, columns].long() > 0
        anchors = modalities.present[:, columns] & others
        return ContrastiveViews(modalities.tokens[:, columns], torch.stack(fused, dim=1), anchors, others)

    def contrastive_loss(self, views: ContrastiveViews) -> torch.Tensor:
        """Eq 10 over all admissions of `views`, before its weight."""
        return contrastive_loss(
            views, self.config.contrastive_temperature, decoupled=self.config.contrastive_loss == "decoupled"
        )

    def masked_codes(self, encoded: EncodedAdmissions, diagnosis_mask, medication_mask) -> MaskedCodeParts:
        """The masked-code losses of admissions; masks (admissions, codes) bool, True on what is hidden.

        Raises:
            ValueError: A mask is missing, or not of the shape of its ids.
        """
        config, sums = self.config, []
        pads = (config.diagnosis_pad_token_id, config.medication_pad_token_id)
        ids = (encoded.diagnosis_ids, encoded.medication_ids)
        masks = checked_masks(ids, (diagnosis_mask, medication_mask), pads)
        logits = self._logits_of_hidden(encoded, ids, masks)
        for scores, kind, mask, pad in zip(logits, ids, masks, pads, strict=True):
            codes = MaskedCodes.of(kind, mask, scores.shape[1], pad)
            losses = masked_code_losses(
                *(scores, codes, pad, config.masked_code_loss),
                *(config.masked_code_reduction, config.masked_code_pos_weight),
            )
            sums.append((losses * (kind != pad).any(dim=1)).sum())
        return MaskedCodeParts(torch.stack(sums), self.admissions_with_codes(*ids), logits)

    def admissions_with_codes(self, diagnosis_ids=None, medication_ids=None, **inputs) -> torch.Tensor:
        """(2,) int: the admissions of a batch that have a diagnosis, and a medication: those that the loss is over."""
        pads = (self.config.diagnosis_pad_token_id, self.config.medication_pad_token_id)
        none = torch.zeros((), dtype=torch.long, device=self.device)
        given = zip((diagnosis_ids, medication_ids), pads, strict=True)
        return torch.stack([none if ids is None else (ids != pad).any(dim=1).sum() for ids, pad in given])

    def masked_code_loss(self, sums: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Parts of a batch, or of all its chunks, → the loss before its weight: means over admissions, both kinds."""
        losses = sums / rows.clamp(min=1)
        return losses.mean() if self.config.masked_code_reduction == "mean" else losses.sum()

    @can_return_tuple
    def forward(self, diagnosis_mask=None, medication_mask=None, **inputs) -> MedHMPForAdmissionPreTrainingOutput:
        """The losses of a batch whose admissions are each other's negatives.

        Args:
            diagnosis_mask: Bool, of the shape of `diagnosis_ids`: which codes are hidden. Needed in training; without
                masks evaluation has the contrastive loss alone.
            medication_mask: The same of `medication_ids`.
            **inputs: As in [`MedHMPModel`].

        Raises:
            ValueError: As [`MedHMPModel`], or a mask is missing or does not fit.
        """
        encoded = self.medhmp.encode(**inputs)
        outputs = MedHMPForAdmissionPreTrainingOutput()
        terms: list[torch.Tensor] = []
        if self.config.contrastive_weight:
            outputs.contrastive_loss = self.contrastive_loss(self.contrastive_views(encoded))
            terms.append(self.config.contrastive_weight * outputs.contrastive_loss)
        wanted = self.training or diagnosis_mask is not None or medication_mask is not None
        if self.config.masked_code_weight and wanted:
            parts = self.masked_codes(encoded, diagnosis_mask, medication_mask)
            outputs.masked_code_loss = self.masked_code_loss(parts.sums, parts.rows)
            outputs.diagnosis_logits, outputs.medication_logits = parts.logits
            terms.append(self.config.masked_code_weight * outputs.masked_code_loss)
        outputs.loss = torch.stack(terms).sum() if terms else None
        return outputs

    def _logits_of_hidden(self, encoded: EncodedAdmissions, ids, masks) -> tuple[torch.Tensor, ...]:
        """Scores of diagnoses and of medications from what is visible, in one pass or one for each kind."""
        encoder, visible = self.medhmp.admission_encoder, []
        kinds = (("diagnoses", 1), ("medications", 2))
        for (kind, _), kind_ids, mask in zip(kinds, ids, masks, strict=True):
            token, there = encoder.codes(kind, kind_ids.masked_fill(mask, getattr(encoder, kind).pad_token_id))
            if self.masked_count is not None:
                token = token + self.masked_count(mask.sum(dim=1, keepdim=True).to(token.dtype))
            visible.append((token, there))
        passes = []
        hidden = encoded.modalities
        for (_, column), seen in zip(kinds, visible, strict=True):
            start = hidden if self.config.masked_code_mode == "joint" else encoded.modalities
            hidden = encoder.replaced(start, column, *seen)
            passes.append(hidden)
        if self.config.masked_code_mode == "joint":
            state = encoder(hidden)[0]
            return self.diagnosis_head(state), self.medication_head(state)
        return self.diagnosis_head(encoder(passes[0])[0]), self.medication_head(encoder(passes[1])[0])


class MedHMPForAdmissionClassification(PatientClassifierMixin, MedHMPPreTrainedModel):
    """Outcomes of admissions, as readmission, from everything that an admission left behind."""

    def __init__(self, config: MedHMPConfig):
        super().__init__(config)
        self.medhmp = MedHMPModel(config)
        self.add_classifier(config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(self, labels=None, num_items_in_batch=None, **inputs) -> EhrClassifierOutput:
        """Scores admissions.

        Args:
            labels: (admissions,) class index, or (admissions, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
            **inputs: As in [`MedHMPModel`].
        """
        outputs = self.medhmp(**inputs)
        return self.classify(outputs.admission_state, None, labels, num_items_in_batch, attentions=outputs.attentions)


MedHMPModel.register_for_auto_class("AutoModel")
MedHMPStayModel.register_for_auto_class("AutoModel")
MedHMPForStayPreTraining.register_for_auto_class("AutoModelForPreTraining")
MedHMPForAdmissionPreTraining.register_for_auto_class("AutoModelForPreTraining")
MedHMPForStayClassification.register_for_auto_class("AutoModelForSequenceClassification")
MedHMPForAdmissionClassification.register_for_auto_class("AutoModelForSequenceClassification")
