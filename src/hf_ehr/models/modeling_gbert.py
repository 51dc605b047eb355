"""G-BERT (Shang et al., IJCAI 2019): sets of diagnoses and of medications, embedded through their trees.

    diagnoses   ─ ontology ─┐                     ┌─▶ [CLS] of the diagnoses ──┬─▶ codes of both kinds (pre-training)
                            ├─ blocks, set by set ┤                            │
    medications ─ ontology ─┘                     └─▶ [CLS] of the medications ┴─▶ medications of the next visit

Diagnoses and medications stay apart in tensors (batch, visits, codes) of their own: no row is ever told from another
by where it stands, which is how the authors' code came to mix patients, modalities and the target.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gbert import GBertConfig
from .modeling_code_prediction import CodePredictionHead, CodeTargets, code_prediction_loss, predicted
from .modeling_gbert_layers import CodeSetEmbeddings, GBertAttention, GBertEncoder, GBertLayer
from .modeling_heads import EhrClassifierOutput
from .modeling_ontology import init_ontology
from .modeling_recommendation import mean_of_earlier, recommendation_loss

KINDS = ("diagnosis", "medication")


@dataclass
class GBertModelOutput(ModelOutput):
    """Output of [`GBertModel`]; `…` stands for the leading dimensions of the ids.

    Attributes:
        diagnosis_state: (…, hidden), the state of `[CLS]`; 0 for a set without codes.
        medication_state: The same of medications.
        diagnosis_states: (…, codes, hidden), the states of the codes; 0 on padding.
        medication_states: The same of medications.
        hidden_states: One (sets, 1 + codes, hidden) per layer and for the embeddings: the sets that have a code, those
            of diagnoses before those of medications.
        attentions: One (sets, heads, 1 + codes, 1 + codes) per layer (eager attention only).
    """

    diagnosis_state: torch.Tensor | None = None
    medication_state: torch.Tensor | None = None
    diagnosis_states: torch.Tensor | None = None
    medication_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class GBertForPreTrainingOutput(ModelOutput):
    """Output of [`GBertForPreTraining`]; columns are ids without the special tokens.

    Attributes:
        loss: Scalar, the sum of four losses, or `None` without labels.
        self_prediction_loss: Scalar, diagnoses from diagnoses plus medications from medications.
        dual_prediction_loss: Scalar, each from the other.
        diagnosis_logits: (…, 2, diagnoses): from diagnoses, from medications.
        medication_logits: (…, 2, medications): likewise.
        hidden_states: As in [`GBertModel`].
        attentions: As there.
    """

    loss: torch.Tensor | None = None
    self_prediction_loss: torch.Tensor | None = None
    dual_prediction_loss: torch.Tensor | None = None
    diagnosis_logits: torch.Tensor | None = None
    medication_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class GBertPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: GBertConfig
    base_model_prefix = "gbert"
    main_input_name = "diagnosis_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CodeSetEmbeddings", "GBertLayer"]  # noqa: RUF012 - library's form
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": GBertLayer, "attentions": GBertAttention}  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_ontology(module)


class _Sets(NamedTuple):
    """The sets of one kind that have a code."""

    rows: torch.Tensor
    """(sets,): where they stand among all sets of the batch."""
    codes: torch.Tensor
    """(sets, most codes) bool: what of them is a code."""
    embedded: torch.Tensor
    """(sets, 1 + most codes, hidden)."""


class GBertModel(GBertPreTrainedModel):
    """Sets of codes → one state per set, and one per code.

    Args:
        config: The configuration.
        add_diagnoses: Whether there is anything that reads diagnoses; a model that predicts them goes without.
    """

    def __init__(self, config: GBertConfig, add_diagnoses: bool = True):
        super().__init__(config)
        self.diagnosis_embeddings = CodeSetEmbeddings(config, "diagnosis") if add_diagnoses else None
        self.medication_embeddings = CodeSetEmbeddings(config, "medication")
        self.type_embeddings = nn.Embedding(len(KINDS), config.hidden_size)
        self.encoder = GBertEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, diagnosis_ids: torch.Tensor | None = None, medication_ids: torch.Tensor | None = None, **kwargs
    ) -> GBertModelOutput:
        """Encodes sets of codes.

        Args:
            diagnosis_ids: (…, codes), padded with `pad_token_id`, without `[CLS]`, in any order; `…` is any number of
                dimensions, as (batch, visits). A kind that is `None` has no output.
            medication_ids: The same of medications, with the same leading dimensions.
            **kwargs: Passed to the attention.

        Raises:
            ValueError: No ids are given, their leading dimensions differ, or the model reads no diagnoses.
        """
        given = self._checked(diagnosis_ids, medication_ids)
        sets = {kind: self._embedded(kind, ids.flatten(0, -2)) for kind, ids in given.items()}
        width = max(part.embedded.shape[1] for part in sets.values())
        embedded, codes = [], []
        for part in sets.values():
            more = width - part.embedded.shape[1]
            embedded.append(nn.functional.pad(part.embedded, (0, 0, 0, more)))
            codes.append(nn.functional.pad(part.codes, (0, more)))
        states = self.encoder(torch.cat(embedded), torch.cat(codes), **kwargs)
        outputs = GBertModelOutput()
        parts = states.split([len(part.rows) for part in sets.values()])
        for (kind, part), found in zip(sets.items(), parts, strict=True):
            shape = given[kind].shape
            first, others = found[:, 0], found[:, 1 : 1 + shape[-1]] * part.codes[..., None]
            for name, values in (("state", first), ("states", others)):
                every = values.new_zeros(shape[:-1].numel(), *values.shape[1:]).index_copy(0, part.rows, values)
                outputs[f"{kind}_{name}"] = every.view(*shape[:-1], *values.shape[1:])
        return outputs

    def _checked(self, diagnosis_ids, medication_ids) -> dict[str, torch.Tensor]:
        """The kinds of codes that a batch has."""
        pairs = zip(KINDS, (diagnosis_ids, medication_ids), strict=True)
        given = {kind: ids for kind, ids in pairs if ids is not None}
        if not given or len({ids.shape[:-1] for ids in given.values()}) > 1:
            shapes = {f"{kind}_ids": tuple(ids.shape) for kind, ids in given.items()}
            raise ValueError(
                "`diagnosis_ids` and `medication_ids` must be (…, codes) with equal leading dimensions, got "
                f"{shapes or 'none'}. Give rows of padding where a visit has none of a kind."
            )
        if diagnosis_ids is not None and self.diagnosis_embeddings is None:
            raise ValueError("`diagnosis_ids` must not be given to a model that predicts them. Leave them out.")
        return given

    def _embedded(self, kind: str, ids: torch.Tensor) -> _Sets:
        """Ids (sets, codes) → those that have a code."""
        codes = ids != self.config.pad_token_id
        rows = codes.any(dim=1).nonzero().squeeze(1)
        place = self.type_embeddings.weight[KINDS.index(kind)]
        return _Sets(rows, codes[rows], getattr(self, f"{kind}_embeddings")(ids[rows], place))


class GBertForPreTraining(GBertPreTrainedModel):
    """Self-prediction (each kind from itself) and dual prediction (each from the other), of visits that are masked."""

    accepts_loss_kwargs = False  # the losses are means over visits that no count of labels scales

    def __init__(self, config: GBertConfig):
        super().__init__(config)
        self.gbert = GBertModel(config)
        for kind in KINDS:
            heads = [CodePredictionHead(config.hidden_size, config.num_codes(kind)) for _ in KINDS]
            self.add_module(f"{kind}_heads", nn.ModuleList(heads))
        self.post_init()

    @can_return_tuple
    def forward(
        self, diagnosis_ids=None, medication_ids=None, diagnosis_labels=None, medication_labels=None, **kwargs
    ) -> GBertForPreTrainingOutput:
        """Predicts the codes of visits.

        Args:
            diagnosis_ids: (…, codes), part of them replaced.
            medication_ids: The same of medications.
            diagnosis_labels: Of the shape of `diagnosis_ids`: the true id where one was chosen, -100 elsewhere. No
                loss without both labels.
            medication_labels: The same of medications.
            **kwargs: Passed to [`GBertModel`].
        """
        encoded = self.gbert(diagnosis_ids, medication_ids, **kwargs)
        states = (encoded.diagnosis_state, encoded.medication_state)
        logits = [predicted(getattr(self, f"{kind}_heads"), states) for kind in KINDS]
        outputs = GBertForPreTrainingOutput(
            diagnosis_logits=logits[0],
            medication_logits=logits[1],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if diagnosis_labels is not None and medication_labels is not None:
            given = ((diagnosis_ids, diagnosis_labels), (medication_ids, medication_labels))
            losses = self._losses(logits, given)
            outputs.self_prediction_loss = losses[0][0] + losses[1][1]
            outputs.dual_prediction_loss = losses[0][1] + losses[1][0]
            outputs.loss = outputs.self_prediction_loss + outputs.dual_prediction_loss
        return outputs

    def _losses(self, logits, given) -> list[list[torch.Tensor]]:
        """Of each kind (rows) from each kind."""
        there = [(ids != self.config.pad_token_id).any(dim=-1).flatten() for ids, _ in given]
        return [
            [
                code_prediction_loss(scores.flatten(0, -2), target, source)
                for scores, source in zip(row.unbind(-2), there, strict=True)
            ]
            for row, target in zip(logits, code_targets(self.config, given), strict=True)
        ]


def code_targets(config: GBertConfig, given, loss: str | None = None) -> list[CodeTargets]:
    """Targets of diagnoses and of medications from (ids, labels) of each, both (…, codes)."""
    return [
        CodeTargets.of(
            ids.flatten(0, -2),
            None if labels is None else labels.flatten(0, -2),
            getattr(config, f"{kind}_vocab_size"),
            config.num_special_tokens,
            loss or config.pretraining_loss,
        )
        for kind, (ids, labels) in zip(KINDS, given, strict=True)
    ]


class GBertForMedicationRecommendation(GBertPreTrainedModel):
    """Medications of a visit from its diagnoses and from the visits before it."""

    accepts_loss_kwargs = False  # the loss is a mean over patients that no count of labels scales

    def __init__(self, config: GBertConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.gbert = GBertModel(config)
        hidden = config.hidden_size
        self.diagnosis_mapping = nn.Linear(hidden, hidden)
        self.medication_mapping = nn.Linear(hidden, hidden)
        self.dense = nn.Linear(3 * hidden, 2 * hidden)
        self.classifier = nn.Linear(2 * hidden, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, diagnosis_ids=None, medication_ids=None, labels=None, **kwargs) -> EhrClassifierOutput:
        """Scores the medications of every visit; none of them sees its own medications, or a later visit.

        Args:
            diagnosis_ids: (batch, visits, codes), oldest visit first.
            medication_ids: The same of medications; those of the visit that is asked about may be there.
            labels: (batch, visits, num_labels) of 0 and 1, -100 throughout a visit that is not there. The first visit
                has no history and is never part of the loss.
            **kwargs: Passed to [`GBertModel`].

        Returns:
            `logits` (batch, visits, num_labels), and `loss`: the mean over labels, visits and then patients.

        Raises:
            ValueError: The labels are not of the shape of the logits.
        """
        encoded = self.gbert(diagnosis_ids, medication_ids, **kwargs)
        parts = [
            layer(states).relu()
            for layer, states in (
                (self.diagnosis_mapping, encoded.diagnosis_state),
                (self.medication_mapping, encoded.medication_state),
            )
        ]
        pad = self.config.pad_token_id
        there = [(ids != pad).any(dim=-1) for ids in (diagnosis_ids, medication_ids)]
        history = [mean_of_earlier(part, seen) for part, seen in zip(parts, there, strict=True)]
        features = self.dense(torch.cat([*history, parts[0] * there[0][..., None]], dim=-1)).relu()
        logits = self.classifier(features)
        loss = None if labels is None else recommendation_loss(logits, labels)
        return EhrClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


GBertModel.register_for_auto_class("AutoModel")
GBertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
GBertForMedicationRecommendation.register_for_auto_class("AutoModelForSequenceClassification")
