"""The stay-level baselines of the MedHMP paper: hours of a stay and its demographics → one vector → classifier.

hours + demographics ─ LSTM, last state │ convolutions ─▶ one layer ────────────┐
hours ─ RAIM │ DCMN ─▶ + demographics ──────────────────────────────────────────┼─▶ stay vector ─▶ classifier
hours (─ MedHMP's encoder) ─ LSTM │ Transformer ─▶ greatest value over hours ───┘
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ehrseries import EhrSeriesConfig
from .modeling_ehrseries_layers import (
    SeriesCnn,
    SeriesLstm,
    StayFeatures,
    UnimodalSeries,
    checked_demographics,
    init_series_layer,
    window,
)
from .modeling_ehrseries_memory import Dcmn, Raim
from .modeling_heads import PatientClassifierMixin, classification_loss


@dataclass
class EhrSeriesModelOutput(ModelOutput):
    """Output of [`EhrSeriesModel`].

    Attributes:
        last_hidden_state: (stays, hours, hidden), 0 after the last hour; `None` for `cnn` and `dcmn`.
        pooler_output: (stays, features), one vector per stay.
        hour_attentions: `raim`: (stays, hours, hours), what each hour looks at, 0 after the hour itself. `dcmn`:
            (stays, 2, hours), what is read from each memory.
        memory_gates: `dcmn`: (stays, 2, hidden), the share of the memory in what is read.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hour_attentions: torch.Tensor | None = None
    memory_gates: torch.Tensor | None = None


@dataclass
class EhrSeriesClassifierOutput(ModelOutput):
    """Output of [`EhrSeriesForSequenceClassification`].

    Attributes:
        loss: Scalar; only with `labels`.
        logits: (stays, num_labels).
        pooler_output: As in [`EhrSeriesModelOutput`].
        hour_attentions: As there.
        memory_gates: As there.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hour_attentions: torch.Tensor | None = None
    memory_gates: torch.Tensor | None = None


class TiledSeries(nn.Module):
    """F-LSTM and F-CNN: the demographics of a stay stand beside each of its hours."""

    def __init__(self, config: EhrSeriesConfig):
        super().__init__()
        width = config.num_hourly_features + config.num_demographics
        self.network: SeriesLstm | SeriesCnn
        if config.architecture == "lstm":
            self.network = SeriesLstm(width, config.hidden_size, config.num_hidden_layers, config.projection_size)
        else:
            self.network = SeriesCnn(
                width, config.num_filters, config.cnn_depth, config.n_hours, config.projection_size
            )

    def forward(self, values, mask, demographics) -> StayFeatures:
        """Hours (stays, hours, features) and demographics → the vector of each stay, (stays, projection)."""
        if demographics is not None:
            values = torch.cat([values, demographics[:, None] * mask[..., None]], dim=-1)
        return self.network(values, mask)


class EhrSeriesPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations the library asks for."""

    config: EhrSeriesConfig
    base_model_prefix = "model"
    main_input_name = "stay_hours"
    _supports_sdpa = True
    _no_split_modules = ["SeriesLstm", "SeriesCnn", "UnimodalSeries", "Raim", "Dcmn"]  # noqa: RUF012 - library's form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_series_layer(module)


class EhrSeriesModel(EhrSeriesPreTrainedModel):
    """Hours and demographics of stays → one vector per stay."""

    def __init__(self, config: EhrSeriesConfig):
        super().__init__(config)
        self.network: Raim | Dcmn | TiledSeries | UnimodalSeries
        if config.architecture == "raim":
            self.network = Raim(config)
        elif config.architecture == "dcmn":
            self.network = Dcmn(config)
        else:
            self.network = (TiledSeries if config.architecture in ("lstm", "cnn") else UnimodalSeries)(config)
        self.post_init()

    def encode(self, demographics: torch.Tensor | None, **series: torch.Tensor | None) -> StayFeatures:
        """As `forward`, in the layers' own form; `series` as `HourlySeries.of` takes them."""
        values, mask = window(self.config, self.dtype, **series)
        if isinstance(self.network, UnimodalSeries):
            return self.network(values, mask)
        return self.network(values, mask, checked_demographics(self.config, demographics, len(mask), values.dtype))

    @can_return_tuple
    def forward(
        self,
        stay_hours: torch.Tensor | None = None,
        feature_ids: torch.Tensor | None = None,
        feature_counts: torch.Tensor | None = None,
        feature_values: torch.Tensor | None = None,
        demographics: torch.Tensor | None = None,
        hourly_values: torch.Tensor | None = None,
        **kwargs,
    ) -> EhrSeriesModelOutput:
        """Encodes stays.

        Args:
            stay_hours: (stays,) int, hours of each stay, at most `n_hours`. A stay of 0 hours is one without
                measurements: its hours add nothing.
            feature_ids: (entries,) int, the features that are not 0, hour after hour and stay after stay.
            feature_counts: (sum of stay_hours,) int, entries of each hour.
            feature_values: (entries,) values of `feature_ids`; all are 1 where there are none.
            demographics: (stays, num_demographics); zeros for a stay of which none are known. Not read by
                `unimodal_lstm` and `transformer`.
            hourly_values: (stays, hours, num_hourly_features), instead of the three `feature_*`.
            **kwargs: Not read.

        Raises:
            ValueError: Something of the batch is missing, or does not fit the configuration.
        """
        stays = self.encode(
            demographics,
            stay_hours=stay_hours,
            feature_ids=feature_ids,
            feature_counts=feature_counts,
            feature_values=feature_values,
            hourly_values=hourly_values,
        )
        return EhrSeriesModelOutput(
            last_hidden_state=stays.states,
            pooler_output=stays.features,
            hour_attentions=stays.hour_attentions,
            memory_gates=stays.memory_gates,
        )


class EhrSeriesForSequenceClassification(PatientClassifierMixin, EhrSeriesPreTrainedModel):
    """Classification of stays."""

    def __init__(self, config: EhrSeriesConfig):
        super().__init__(config)
        self.model = EhrSeriesModel(config)
        self.add_classifier(config.projection_size if config.architecture in ("lstm", "cnn") else config.hidden_size)
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
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EhrSeriesClassifierOutput:
        """Scores stays; inputs as in [`EhrSeriesModel`].

        Args:
            labels: (stays,) class index, or (stays, num_labels) of 0 and 1 under
                `problem_type="multi_label_classification"`.
            num_items_in_batch: Number of labels of the whole accumulated batch; the loss is the sum over it.
        """
        stays = self.model.encode(
            demographics,
            stay_hours=stay_hours,
            feature_ids=feature_ids,
            feature_counts=feature_counts,
            feature_values=feature_values,
            hourly_values=hourly_values,
        )
        logits = self.classifier(self.dropout(stays.features))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        return EhrSeriesClassifierOutput(loss, logits, stays.features, stays.hour_attentions, stays.memory_gates)


EhrSeriesModel.register_for_auto_class("AutoModel")
EhrSeriesForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
