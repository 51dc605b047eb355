"""Configuration of the MedHMP models (Wang et al., EMNLP 2023)."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class MedHMPConfig(PreTrainedConfig):
    r"""Configuration of the MedHMP models: hours of an ICU stay → stay → admission.

    The sizes are those of the authors' code; where its mathematics is not the paper's, or neither is sound, the
    default is the sound form and [`paper`] the paper's.

    Args:
        num_hourly_features: Features of an hour.
        num_demographics: Features of a patient.
        n_hours: Most hours of a stay.
        hidden_size: Width of the states of stays, modalities and admissions.
        demographics_hidden_size: Hidden layer over the demographics. From the authors' code.
        num_attention_heads: Heads of both fusion blocks. The paper has 1 (Eq 2, 7), its code 4, whose split never
            compares two tokens; here the split is right.
        use_ffn: Whether a feed-forward layer follows the attention, as in the authors' code. Not in the paper.
        intermediate_size: Width of that layer.
        hidden_dropout_prob: Dropout between the recurrences, on attention and in the feed-forward layer.
        classifier_dropout: Dropout before the classifier; `hidden_dropout_prob` when `None`. The authors' code has 0.2
            for stays and 0.8 for admissions.
        layer_norm_eps: Epsilon of the layer norms.
        decoder: How the hours are decoded from a stay's state b. `init_hidden`: b is the first hidden state of a
            recurrence without input, and one layer follows (the paper's `LSTM_dec(b)`). `first_input`: b is the first
            input, zeros follow, and the hidden states are the hours (the code): they lie in (-1, 1), as continuous
            features do not.
        reconstruction_reduction: `mean`: squared error over hours and features (the code). `sum`: summed over
            features, mean over hours (Eq 3).
        stay_pooling: How the stays of an admission become one. `mean` and `attention` take any number; `concat` the
            last `max_stays`, with zeros for those that are not there (Eq 4).
        max_stays: Read by `concat`. 3 is the code's; the paper gives no number.
        stay_projection: The layer after pooling: `linear` (Eq 4), with a norm, or with a norm and ReLU (the code).
        diagnosis_vocab_size: Ids of diagnoses, padding included.
        medication_vocab_size: Ids of medications, padding included.
        diagnosis_pad_token_id: Id that is no diagnosis.
        medication_pad_token_id: Id that is no medication.
        note_size: Width of the vectors of notes. That of `note_config` where there is one. `None`: no notes.
        note_config: Configuration of a text encoder of the library; `None` for notes that come as vectors only.
        freeze_note_encoder: Whether training leaves the text encoder as it was loaded (the paper).
        masked_code_mode: `joint`: codes of both kinds are hidden in one pass (Eq 6). `separate`: one pass for each
            kind, which sees the other in full (the code).
        masked_code_loss: `bce`: binary cross-entropy over all codes that are not visible. `mse_indicator`: squared
            error to the indicator of hidden codes over the whole vocabulary, visible codes counting as absent (Eq 9).
            `mse_masked`: squared error on the hidden codes alone, which nothing keeps from saying 1 to every code.
        masked_code_reduction: `mean` over codes and over both kinds, or `sum` (Eq 9). With `sum` the contrastive
            loss at its weight of 0.1 is a thousand times smaller.
        masked_code_pos_weight: Weight of hidden codes beside absent ones under `bce`; 1 when `None`.
        embed_masked_count: Whether the number of hidden codes is embedded and added to the modality (the code). It
            tells the model how many codes to find.
        contrastive_loss: `infonce`: the positive is in the denominator (the code). `decoupled`: it is not (Eq 10).
        contrastive_temperature: Divides the cosines.
        masked_code_weight: Of the masked-code loss; 0 leaves it out.
        contrastive_weight: Of the contrastive loss, λ of Eq 11; 0 leaves it out.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import MedHMPConfig, MedHMPForStayClassification
    >>> config = MedHMPConfig.tiny(num_hourly_features=20, num_demographics=4)
    >>> MedHMPForStayClassification(config).num_labels
    2

    ```
    """

    model_type = "ehr_medhmp"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - the library's own declaration
        *("hidden_states", "attentions", "pooler_output", "last_hidden_state", "reconstruction", "stay_state"),
        *("admission_state", "modality_states", "stay_attentions"),
    ]
    sub_configs_defaults: ClassVar = {
        "note_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }

    num_hourly_features: int = 1318
    num_demographics: int = 73
    n_hours: int = 48
    hidden_size: int = 256
    demographics_hidden_size: int = 64
    num_attention_heads: int = 4
    use_ffn: bool = True
    intermediate_size: int = 1024
    hidden_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    decoder: Literal["init_hidden", "first_input"] = "init_hidden"
    reconstruction_reduction: Literal["mean", "sum"] = "mean"
    stay_pooling: Literal["mean", "attention", "concat"] = "mean"
    max_stays: int = 3
    stay_projection: Literal["linear", "linear_norm", "linear_norm_relu"] = "linear_norm"
    diagnosis_vocab_size: int = 7687
    medication_vocab_size: int = 1702
    diagnosis_pad_token_id: int = 0
    medication_pad_token_id: int = 0
    note_size: int | None = 768
    note_config: dict | PreTrainedConfig | None = None
    freeze_note_encoder: bool = True
    masked_code_mode: Literal["joint", "separate"] = "joint"
    masked_code_loss: Literal["bce", "mse_indicator", "mse_masked"] = "bce"
    masked_code_reduction: Literal["mean", "sum"] = "mean"
    masked_code_pos_weight: float | int | None = None
    embed_masked_count: bool = False
    contrastive_loss: Literal["infonce", "decoupled"] = "infonce"
    contrastive_temperature: float | int = 0.1
    masked_code_weight: float | int = 1.0
    contrastive_weight: float | int = 0.1
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_medhmp.MedHMPConfig",
            "AutoModel": "modeling_medhmp.MedHMPModel",
            "AutoModelForPreTraining": "modeling_medhmp.MedHMPForAdmissionPreTraining",
            "AutoModelForSequenceClassification": "modeling_medhmp.MedHMPForAdmissionClassification",
        }
        super().__post_init__(**kwargs)
        if self.note_config is not None:
            note_config: Any = self.note_config  # by now no dict
            self.note_size = note_config.hidden_size

    @classmethod
    def paper(cls, **overrides: Any) -> "MedHMPConfig":
        """The paper's formulas to the letter: one head, no feed-forward layer, sums, Eq 4, 9 and 10."""
        exact: dict[str, Any] = {
            "num_attention_heads": 1,
            "use_ffn": False,
            "reconstruction_reduction": "sum",
            "stay_pooling": "concat",
            "stay_projection": "linear",
            "masked_code_loss": "mse_indicator",
            "masked_code_reduction": "sum",
            "contrastive_loss": "decoupled",
        }
        return cls(**(exact | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> "MedHMPConfig":
        """Width 32, for tests, examples and the quickstart."""
        sizes: dict[str, Any] = {"hidden_size": 32, "demographics_hidden_size": 16, "intermediate_size": 64}
        return cls(**(sizes | overrides))

    def validate_sizes(self):
        """Sizes are positive, and `hidden_size` splits evenly over the heads."""
        names = ("num_hourly_features", "num_demographics", "n_hours", "max_stays", "demographics_hidden_size")
        for name in (*names, "intermediate_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}. Change it.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be divisible by `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}. Change one of them."
            )

    def validate_codes(self):
        """The padding of each kind of code lies inside its vocabulary."""
        for kind in ("diagnosis", "medication"):
            pad, size = getattr(self, f"{kind}_pad_token_id"), getattr(self, f"{kind}_vocab_size")
            if not 0 <= pad < size:
                raise ValueError(
                    f"`{kind}_pad_token_id` must lie in [0, {kind}_vocab_size={size}), got {pad}. Pass len(tokenizer) "
                    "as the size and the tokenizer's own id."
                )

    def validate_objectives(self):
        """The temperature is positive, weights are not negative, and no option goes unread."""
        if self.contrastive_temperature <= 0:
            raise ValueError(f"`contrastive_temperature` must be positive, got {self.contrastive_temperature}.")
        if min(self.masked_code_weight, self.contrastive_weight) < 0:
            raise ValueError(
                "`masked_code_weight` and `contrastive_weight` must not be negative, got "
                f"{self.masked_code_weight} and {self.contrastive_weight}. 0 leaves a loss out."
            )
        if self.masked_code_pos_weight is not None and self.masked_code_loss != "bce":
            raise ValueError(
                f"`masked_code_pos_weight` must be None with `masked_code_loss={self.masked_code_loss!r}`, got "
                f"{self.masked_code_pos_weight}. Only 'bce' reads it."
            )


MedHMPConfig.register_for_auto_class()
