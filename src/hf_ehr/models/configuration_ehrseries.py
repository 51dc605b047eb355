"""Configuration of the models that stays in intensive care are compared with: F-LSTM, F-CNN, RAIM, DCMN and others."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class EhrSeriesConfig(PreTrainedConfig):
    r"""Configuration of the stay-level baselines of the MedHMP paper (section 4.1), which read hours and demographics.

    Args:
        num_hourly_features: Features of an hour; 1,318 is the paper's.
        num_demographics: Features of a stay that do not change; 73 is the paper's. 0 where there are none.
        architecture: `lstm` and `cnn` are F-LSTM and F-CNN (Tang et al., JAMIA 2020): demographics stand beside every
            hour. `raim` (Xu et al., KDD 2018) and `dcmn` (Feng et al., ICDM 2019) add them to the vector of the stay.
            `unimodal_lstm` and `transformer` (MedHMP, Figure 4) read the hours alone, and take the greatest value of
            each feature over the stay.
        hidden_size: Width of the states; not read by `cnn`.
        n_hours: Hours of the longest window. `cnn` and `raim` have weights for each hour.
        num_hidden_layers: Layers of `lstm` and `transformer`; the others have one.
        cnn_depth: 1, 2 or 3 convolutions, each followed by a pooling of two hours.
        num_filters: Filters of each convolution.
        projection_size: Width of the last hidden layer of `lstm` and `cnn`.
        second_channel: Ids of the hourly features of the second channel. RAIM is guided by the hours in which one of
            these is not 0 (laboratory results, interventions); DCMN has a memory for each channel. `None`: RAIM has
            one channel and no guidance, and both memories of DCMN read all features.
        memory_norm: Norm of DCMN's hours. The paper's is `batch`, under which a stay is scored by its company in the
            batch while training; `layer` is not.
        medhmp_encoder: Whether `unimodal_lstm` and `transformer` read the states of MedHMP's encoder of hours.
        num_attention_heads: Heads of `transformer`.
        intermediate_size: Width of the feed-forward layer of `transformer`.
        hidden_act: Activation of the feed-forward layer of `transformer`.
        attention_probs_dropout_prob: Dropout of the attention of `transformer`.
        hidden_dropout_prob: Dropout on hidden states.
        classifier_dropout: Dropout before the classifier; `hidden_dropout_prob` when `None`.
        layer_norm_eps: Added to the variance in layer norms of `transformer` and of MedHMP's encoder.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import EhrSeriesConfig, EhrSeriesForSequenceClassification
    >>> config = EhrSeriesConfig.tiny(num_hourly_features=40, num_demographics=3, architecture="raim", num_labels=2)
    >>> EhrSeriesForSequenceClassification(config).classifier.in_features
    32

    ```
    """

    model_type = "ehr_series"
    keys_to_ignore_at_inference = ["pooler_output", "hour_attentions", "memory_gates"]  # noqa: RUF012 - library's form
    norm_position: ClassVar[str] = "post"
    attention_gain: ClassVar[None] = None

    num_hourly_features: int = 1318
    num_demographics: int = 73
    architecture: Literal["lstm", "cnn", "raim", "dcmn", "unimodal_lstm", "transformer"] = "lstm"
    hidden_size: int = 256
    n_hours: int = 48
    num_hidden_layers: int = 1
    cnn_depth: int = 2
    num_filters: int = 64
    projection_size: int = 64
    second_channel: list[int] | tuple[int, ...] | None = None
    memory_norm: Literal["layer", "batch"] = "layer"
    medhmp_encoder: bool = False
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "relu"
    attention_probs_dropout_prob: float | int = 0.0
    hidden_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of the classifier must open as the bare model too; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrseries.EhrSeriesConfig",
            "AutoModel": "modeling_ehrseries.EhrSeriesModel",
            "AutoModelForSequenceClassification": "modeling_ehrseries.EhrSeriesForSequenceClassification",
        }
        if self.second_channel is not None:
            self.second_channel = list(self.second_channel)
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(cls, **overrides: Any) -> "EhrSeriesConfig":
        """Width 32 and 8 filters for tests and examples."""
        sizes: dict[str, Any] = {"hidden_size": 32, "num_filters": 8, "projection_size": 16, "intermediate_size": 64}
        return cls(**(sizes | overrides))

    @property
    def channels(self) -> tuple[list[int], list[int]]:
        """Ids of the features of the first and of the second channel; without a second one it is empty."""
        second = set(self.second_channel or ())
        return [index for index in range(self.num_hourly_features) if index not in second], sorted(second)

    def validate_sizes(self):
        """Sizes are positive and fit each other."""
        names = (
            "num_hourly_features",
            "hidden_size",
            "n_hours",
            "num_hidden_layers",
            "num_filters",
            "projection_size",
        )
        small = {name: getattr(self, name) for name in names if getattr(self, name) < 1}
        if small or self.num_demographics < 0:
            raise ValueError(
                f"Sizes must be positive, got {small or {'num_demographics': self.num_demographics}}. Pass the "
                "numbers of features that the extractor makes."
            )
        if not 1 <= self.cnn_depth <= 3:
            raise ValueError(f"`cnn_depth` must be 1, 2 or 3, got {self.cnn_depth}. Change it.")
        if self.architecture == "transformer" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be divisible by `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}. Change one of them."
            )

    def validate_second_channel(self):
        """The second channel is there only where it is read, and leaves something for the first."""
        if self.second_channel is None:
            return
        if self.architecture not in ("raim", "dcmn"):
            raise ValueError(
                f"`second_channel` must be None for {self.architecture!r}, got {len(self.second_channel)} ids. Only "
                "'raim' and 'dcmn' tell channels apart."
            )
        ids = set(self.second_channel)
        if not 1 <= len(ids) < self.num_hourly_features or not ids <= set(range(self.num_hourly_features)):
            raise ValueError(
                f"`second_channel` must be some ids in [0, {self.num_hourly_features}) and leave others, got "
                f"{len(ids)}. Take them from the names of the extractor's features."
            )

    def validate_medhmp_encoder(self):
        """MedHMP's encoder stands before the unimodal models only."""
        if self.medhmp_encoder and self.architecture not in ("unimodal_lstm", "transformer"):
            raise ValueError(
                f"`medhmp_encoder` must be False for {self.architecture!r}, got True. Use 'unimodal_lstm' or "
                "'transformer'."
            )


EhrSeriesConfig.register_for_auto_class()
