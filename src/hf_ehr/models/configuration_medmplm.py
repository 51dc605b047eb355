"""Configuration of MedM-PLM (Liu et al., IEEE JBHI 2022): codes and notes of visits, read together."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_gbert import TINY_SIZES, GBertConfig

# What may be given is checked; afterwards it is a configuration, of a class that its user names.
if TYPE_CHECKING:
    SubConfig = Any
else:
    SubConfig = dict | PreTrainedConfig | None


@strict
class MedMPLMConfig(PreTrainedConfig):
    r"""Configuration of the MedM-PLM models: a code encoder, a text encoder, and attention between them.

    The sizes are those of the authors' code; where its mathematics is not sound, or leaks, the default is the sound
    form and [`paper`] the paper's.

    Args:
        code_config: Configuration of the code encoder, which is G-BERT.
        note_config: Configuration of a text encoder, any that `AutoModel` knows; of one with a decoder its encoder is
            taken. BERT-base by default.
        note_pooling: The vector of a note. `pooler`: the encoder's own (BERT: a layer over `[CLS]`). `mean`: over its
            tokens.
        freeze_note_layers: Layers of the text encoder that training leaves as they are, and its embeddings with them;
            0 for the embeddings alone, `None` for nothing.
        cross_modal: `cross_residual`: codes look at the note and the note at the codes, each keeping its own vector
            (Eq 6-7). `cross`: without their own. `text_only`: the note alone looks, without its own. `none`: no
            cross-modal module at all.
        pretraining_loss: As in [`GBertConfig`]. `visit_bce` is what the authors' code trains with, and copying the
            visible codes already lowers it; `masked_ce` is the paper's.
        target_text: What a recommended visit shows of its own note, which lists the drugs to be predicted. `none`.
            `augmented_dx`: its diagnoses have looked at it (the paper's Eq 11). `full`: its vector as well (the
            authors' code). Results of the latter two are optimistic.
        classifier_dropout: Dropout before the last layer of the tasks.
        initializer_range: Standard deviation of starting weights of the heads; both encoders have their own.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import MedMPLMConfig
    >>> config = MedMPLMConfig(cross_modal="none")
    >>> config.code_config.hidden_size, config.note_config.hidden_size
    (300, 768)

    ```
    """

    model_type = "ehr_medmplm"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - the library's own declaration
        *("hidden_states", "attentions", "pooler_output", "diagnosis_state", "medication_state"),
        *("note_diagnosis_state", "note_medication_state", "diagnosis_pooler_output", "medication_pooler_output"),
        *("note_pooler_output", "diagnosis_note_attentions", "medication_note_attentions"),
        *("note_diagnosis_attentions", "note_medication_attentions"),
    ]
    sub_configs_defaults: ClassVar = {
        "code_config": SubConfigSpec(config_class=GBertConfig),
        "note_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    code_config: SubConfig = None
    note_config: SubConfig = None
    note_pooling: Literal["pooler", "mean"] = "pooler"
    freeze_note_layers: int | None = None
    cross_modal: Literal["none", "text_only", "cross", "cross_residual"] = "cross_residual"
    pretraining_loss: Literal["visit_bce", "masked_ce"] = "visit_bce"
    target_text: Literal["none", "augmented_dx", "full"] = "none"
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_medmplm.MedMPLMConfig",
            "AutoModel": "modeling_medmplm.MedMPLMModel",
            "AutoModelForPreTraining": "modeling_medmplm.MedMPLMForPreTraining",
            "AutoModelForSequenceClassification": "modeling_medmplm.MedMPLMForReadmission",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def paper(cls, **overrides: Any) -> "MedMPLMConfig":
        """The paper's formulas to the letter; a `code_config` of yours should have 2 attention heads.

        Ten layers of the text encoder are frozen, the masked codes alone are predicted, and a recommended visit's
        diagnoses have seen its note.
        """
        exact: dict[str, Any] = {
            "code_config": GBertConfig(num_attention_heads=2),
            "freeze_note_layers": 10,
            "pretraining_loss": "masked_ce",
            "target_text": "augmented_dx",
        }
        return cls(**(exact | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> "MedMPLMConfig":
        """Codes of width 32 and a BERT of width 32 with 2 layers, for tests, examples and the quickstart."""
        bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        sizes: dict[str, Any] = {"code_config": GBertConfig.tiny(), "note_config": {"model_type": "bert"} | bert}
        return cls(**(sizes | {"initializer_range": TINY_SIZES["initializer_range"]} | overrides))

    def validate_layers(self):
        """There are as many layers of text as are frozen."""
        layers = self.note_config.num_hidden_layers
        if self.freeze_note_layers is not None and not 0 <= self.freeze_note_layers <= layers:
            raise ValueError(
                f"`freeze_note_layers` must lie in [0, {layers}], the layers of the text encoder, or be None, got "
                f"{self.freeze_note_layers}. Change it."
            )

    def validate_target(self):
        """A visit's diagnoses can have seen its note only if codes look at notes."""
        if self.target_text == "augmented_dx" and self.cross_modal in ("none", "text_only"):
            raise ValueError(
                f"`target_text` must be 'none' or 'full' with `cross_modal={self.cross_modal!r}`, where codes look at "
                "no note, got 'augmented_dx'. Change one of them."
            )


MedMPLMConfig.register_for_auto_class()
