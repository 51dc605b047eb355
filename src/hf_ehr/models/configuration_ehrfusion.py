"""Configuration of the models that join the notes and the stays of an admission by a gate."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

SERIES_ENCODERS = {"Lstm": "lstm", "Cnn": "cnn", "Star": "star", "Encoder": "transformer"}


@strict
class EhrFusionConfig(PreTrainedConfig):
    r"""Configuration of the models of note and series by Yang & Wu (EMNLP 2021), and of models of the note alone.

    A main modality is shifted by what a gate lets through of the other one and of the demographics. The paper's names
    put the main modality first; `yang_wu("BertLstm")` makes the configuration of a name. ClinicalBERT is
    `main="note", series_encoder=None, note_pooling="pooler"` (with labels alone, `BertForSequenceClassification` is
    the same model), ClinicalT5 the same with `note_pooling="mean"`.

    Args:
        main: The main modality, `note` or `series`.
        series_encoder: What reads the hours: `lstm`, `cnn`, `star` (Star-Transformer) or `transformer`. `None`: the
            note alone is read, and no demographics.
        num_hourly_features: Features of an hour.
        num_demographics: Features of a stay that do not change; 0 where there are none.
        n_hours: Hours of the longest window. `cnn` has weights for each hour.
        hidden_size: Width of the states of `lstm`, `star` and `transformer`.
        series_size: Width of the vector of a stay; that of `transformer` is `hidden_size`, as in the authors' code.
        num_hidden_layers: Layers of `transformer`, cycles of `star`.
        cnn_depth: 1, 2 or 3 convolutions, each followed by a pooling of two hours.
        num_filters: Filters of each convolution.
        demographics_size: Width of the layer that reads demographics.
        note_config: Configuration of the text encoder, any that `AutoModel` knows; of an encoder with a decoder the
            encoder is taken. `None`: notes come as vectors, computed before.
        note_size: Width of these vectors; with `note_config` that of its states.
        note_pooling: `pooler`: the encoder's own vector of a text (BERT: of `[CLS]`). `mean`: over the tokens without
            padding. Vectors computed before are taken as they are.
        freeze_note_encoder: Whether training leaves the text encoder as it was loaded, its dropout switched off.
        num_attention_heads: Heads of `star` and `transformer`; the paper has one for each 64 of `hidden_size`.
        intermediate_size: Width of the feed-forward layer of `transformer`.
        hidden_act: Activation of the feed-forward layer of `transformer`.
        attention_probs_dropout_prob: Dropout of the attention of `star` and `transformer`.
        hidden_dropout_prob: Dropout on hidden states and after the gate.
        classifier_dropout: Dropout before the classifier; 0 when `None`, for the gate ends in one. For a note alone
            `hidden_dropout_prob` when `None`.
        layer_norm_eps: Added to the variance in layer norms of `transformer`.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import EhrFusionConfig
    >>> config = EhrFusionConfig.yang_wu("StarBert", note_size=32)
    >>> config.main, config.series_encoder
    ('series', 'star')

    ```
    """

    model_type = "ehr_fusion"
    keys_to_ignore_at_inference = ["pooler_output", "gates"]  # noqa: RUF012 - library's form
    sub_configs_defaults: ClassVar = {
        "note_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }
    norm_position: ClassVar[str] = "post"
    attention_gain: ClassVar[None] = None

    main: Literal["note", "series"] = "note"
    series_encoder: Literal["lstm", "cnn", "star", "transformer"] | None = "lstm"
    num_hourly_features: int = 1318
    num_demographics: int = 73
    n_hours: int = 48
    hidden_size: int = 1024
    series_size: int = 512
    num_hidden_layers: int = 3
    cnn_depth: int = 2
    num_filters: int = 64
    demographics_size: int = 64
    note_config: dict | PreTrainedConfig | None = None
    note_size: int = 768
    note_pooling: Literal["pooler", "mean"] = "pooler"
    freeze_note_encoder: bool = False
    num_attention_heads: int = 16
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    attention_probs_dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of the classifier must open as the bare model too; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrfusion.EhrFusionConfig",
            "AutoModel": "modeling_ehrfusion.EhrFusionModel",
            "AutoModelForSequenceClassification": "modeling_ehrfusion.EhrFusionForSequenceClassification",
        }
        super().__post_init__(**kwargs)
        if self.note_config is not None:
            self.note_size = self.note_config.hidden_size  # type: ignore[union-attr]

    @classmethod
    def yang_wu(cls, name: str, **overrides: Any) -> "EhrFusionConfig":
        """The configuration of one of the paper's eight names: `BertLstm`, `LstmBert`, …, `EncoderBert`.

        Raises:
            ValueError: There is no such name.
        """
        names = {f"Bert{key}": ("note", value) for key, value in SERIES_ENCODERS.items()}
        names |= {f"{key}Bert": ("series", value) for key, value in SERIES_ENCODERS.items()}
        if name not in names:
            raise ValueError(f"`name` must be one of {', '.join(names)}, got {name!r}. Choose one of them.")
        main, series_encoder = names[name]
        return cls(**({"main": main, "series_encoder": series_encoder} | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> "EhrFusionConfig":
        """Width 32, 2 layers and 8 filters for tests and examples; notes are vectors of 16."""
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "series_size": 16,
            "num_hidden_layers": 2,
            "num_filters": 8,
            "demographics_size": 8,
            "note_size": 16,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        return cls(**(sizes | overrides))

    @property
    def series_features(self) -> int:
        """Width of the vector of a stay."""
        return self.hidden_size if self.series_encoder == "transformer" else self.series_size

    def validate_sizes(self):
        """Sizes are positive and fit each other."""
        names = ("num_hourly_features", "hidden_size", "series_size", "n_hours", "num_hidden_layers", "num_filters")
        small = {name: getattr(self, name) for name in (*names, "note_size") if getattr(self, name) < 1}
        if small or self.num_demographics < 0:
            raise ValueError(
                f"Sizes must be positive, got {small or {'num_demographics': self.num_demographics}}. Pass the "
                "numbers of features that the extractor makes."
            )
        if not 1 <= self.cnn_depth <= 3:
            raise ValueError(f"`cnn_depth` must be 1, 2 or 3, got {self.cnn_depth}. Change it.")
        if self.series_encoder in ("star", "transformer") and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be divisible by `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}. Change one of them."
            )

    def validate_modalities(self):
        """The main modality is read, and options of a text encoder are there only with one."""
        if self.main == "series" and self.series_encoder is None:
            raise ValueError(
                "`series_encoder` must name an encoder where `main` is 'series', got None. Choose 'lstm', 'cnn', "
                "'star' or 'transformer'."
            )
        if self.freeze_note_encoder and self.note_config is None:
            raise ValueError(
                "`freeze_note_encoder` must be False where notes come as vectors, got True. Pass `note_config`."
            )


EhrFusionConfig.register_for_auto_class()
