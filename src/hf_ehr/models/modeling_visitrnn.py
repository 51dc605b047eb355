"""The recurrent medication recommender that MedM-PLM is compared with (Table III, "RNN").

    diagnoses + medications of visits before t ─ Σ embeddings ─ GRU ─▶ h ─┐
                                                                         ├─ one step of the GRU ─▶ linear ─▶ drugs of t
    diagnoses of visit t ─ Σ embeddings ──────────────────────────────────┘

No state that scores a visit has read its medications, or anything of a later visit.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_visitrnn import VisitRnnConfig
from .modeling_heads import EhrClassifierOutput, init_head
from .modeling_recommendation import recommendation_loss
from .modeling_steps import Steps, TimeMajor


@dataclass
class VisitRnnModelOutput(ModelOutput):
    """Output of [`VisitRnnModel`].

    Attributes:
        visit_state: (batch, visits, hidden), the state that knows the visits before and this one's diagnoses.
    """

    visit_state: torch.Tensor | None = None


class VisitRnnPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: VisitRnnConfig
    base_model_prefix = "model"
    main_input_name = "diagnosis_ids"
    _no_split_modules = ["VisitRnnModel"]  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_head(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)


class VisitRnnModel(VisitRnnPreTrainedModel):
    """Visits of patients → a state for each visit that has not read its medications."""

    def __init__(self, config: VisitRnnConfig):
        super().__init__(config)
        self.diagnosis_embeddings = nn.Embedding(config.diagnosis_vocab_size, config.hidden_size)
        self.medication_embeddings = nn.Embedding(config.medication_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(self, diagnosis_ids: torch.Tensor, medication_ids: torch.Tensor, **kwargs) -> VisitRnnModelOutput:
        """Encodes visits; those without any code are skipped.

        Args:
            diagnosis_ids: (batch, visits, codes), padded, oldest visit first.
            medication_ids: The same of medications, with the same batch and visits.
            **kwargs: Not read.

        Raises:
            ValueError: The batch or the visits differ in number.
        """
        if diagnosis_ids.ndim != 3 or diagnosis_ids.shape[:2] != medication_ids.shape[:2]:
            raise ValueError(
                "`diagnosis_ids` and `medication_ids` must be (batch, visits, codes) of equal batch and visits, got "
                f"{tuple(diagnosis_ids.shape)} and {tuple(medication_ids.shape)}. Pad visits with empty ones."
            )
        diagnoses, diagnosed = self._sums(self.diagnosis_embeddings, diagnosis_ids)
        medications, medicated = self._sums(self.medication_embeddings, medication_ids)
        before = self._before(self.dropout(diagnoses + medications), diagnosed | medicated)
        asked, _ = self.gru(self.dropout(diagnoses).flatten(0, 1)[None], before.flatten(0, 1)[None])
        return VisitRnnModelOutput(visit_state=asked[0].view_as(before))

    def _sums(self, table: nn.Embedding, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (batch, visits, codes) → the sums of their embeddings, and which visits have any."""
        codes = ids != self.config.pad_token_id
        return (table(ids) * codes[..., None]).sum(dim=2), codes.any(dim=2)

    def _before(self, visits: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """The state after the last visit before each, (batch, visits, hidden); 0 where there is none."""
        steps = Steps.of(visits, there)
        after = visits.new_zeros(visits.shape)
        if there.any():
            states, _ = TimeMajor.of(steps.packed).run(self.gru, steps.states)
            after = after.to(states.dtype).flatten(0, 1).index_copy(0, steps.places, states).view_as(after)
        place = torch.arange(there.shape[1], device=there.device).where(there, -1)
        last = nn.functional.pad(place.cummax(dim=1).values[:, :-1], (1, 0), value=-1)
        found = after.gather(1, last.clamp(min=0)[..., None].expand_as(after))
        return found * (last >= 0)[..., None]


class VisitRnnForMedicationRecommendation(VisitRnnPreTrainedModel):
    """Medications of a visit from its diagnoses and from the visits before it."""

    accepts_loss_kwargs = False  # the loss is a mean over patients that no count of labels scales

    def __init__(self, config: VisitRnnConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.model = VisitRnnModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, diagnosis_ids: torch.Tensor, medication_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> EhrClassifierOutput:
        """Scores the medications of every visit.

        Args:
            diagnosis_ids: (batch, visits, codes), oldest visit first.
            medication_ids: The same of medications; those of the visit that is asked about may be there.
            labels: (batch, visits, num_labels) of 0 and 1, -100 throughout a visit that is not there. The first visit
                has no history and is never part of the loss.
            **kwargs: Not read.

        Returns:
            `logits` (batch, visits, num_labels), and `loss`: the mean over labels, visits and then patients.

        Raises:
            ValueError: As [`VisitRnnModel`], or the labels are not of the shape of the logits.
        """
        states = self.model(diagnosis_ids, medication_ids).visit_state
        logits = self.classifier(self.dropout(states))
        loss = None if labels is None else recommendation_loss(logits, labels)
        return EhrClassifierOutput(loss=loss, logits=logits, pooler_output=states)


VisitRnnModel.register_for_auto_class("AutoModel")
VisitRnnForMedicationRecommendation.register_for_auto_class("AutoModelForSequenceClassification")
