"""Configuration of the baselines of MedM-PLM: a text encoder and a code encoder side by side, or one of them alone."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_gbert import GBertConfig
from .configuration_medbert import MedBertConfig


@strict
class EhrConcatConfig(PreTrainedConfig):
    r"""Configuration of models that join the vector of a note and that of the codes end to end (MedM-PLM, Table III).

    `note_config` alone is ClinicalBERT, `gbert_config` or `medbert_config` alone G-BERT or Med-BERT, both
    ClinicalBERT+G-BERT and ClinicalBERT+Med-BERT.

    Args:
        note_config: Configuration of a text encoder, any that `AutoModel` knows; `None`: no note is read.
        gbert_config: Configuration of G-BERT; `None`: it is not there.
        medbert_config: Configuration of Med-BERT, which reads diagnoses and medications as one vocabulary.
        diagnosis_map: Med-BERT's id of every diagnosis id; [`code_maps`] makes both from the tokens.
        medication_map: The same of every medication id.
        pad_token_id: Of diagnoses and medications.
        read_diagnoses: Whether the code encoder reads diagnoses; `False` where they are what is predicted, the paper's
            "G-BERT(Drug)".
        note_pooling: `pooler`: the encoder's own vector of a text (BERT: of `[CLS]`). `mean`: over its tokens.
        freeze_note_layers: As in [`MedMPLMConfig`].
        chunk_scale: c of (max + mean · n/c) / (1 + n/c), the probability of a note of n windows (Huang et al. 2019).
        classifier_dropout: Dropout before the last layer.
        initializer_range: Standard deviation of starting weights of the last layer; the encoders have their own.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import EhrConcatConfig
    >>> config = EhrConcatConfig(gbert_config={}, note_config={"model_type": "bert"})
    >>> config.gbert_config.hidden_size, config.note_config.hidden_size
    (300, 768)

    ```
    """

    model_type = "ehr_concat"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - the library's own declaration
        *("pooler_output", "note_state", "code_state", "chunk_logits"),
    ]
    sub_configs_defaults: ClassVar = {
        "note_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "gbert_config": SubConfigSpec(config_class=GBertConfig, optional=True),
        "medbert_config": SubConfigSpec(config_class=MedBertConfig, optional=True),
    }

    note_config: dict | PreTrainedConfig | None = None
    gbert_config: dict | PreTrainedConfig | None = None
    medbert_config: dict | PreTrainedConfig | None = None
    diagnosis_map: list[int] | None = None
    medication_map: list[int] | None = None
    pad_token_id: int = 0
    read_diagnoses: bool = True
    note_pooling: Literal["pooler", "mean"] = "pooler"
    freeze_note_layers: int | None = None
    chunk_scale: float | int = 2.0
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrconcat.EhrConcatConfig",
            "AutoModel": "modeling_ehrconcat.EhrConcatModel",
            "AutoModelForSequenceClassification": "modeling_ehrconcat.EhrConcatForSequenceClassification",
        }
        super().__post_init__(**kwargs)

    @staticmethod
    def code_maps(
        code_tokens: Sequence[str], diagnosis_tokens: Sequence[str], medication_tokens: Sequence[str]
    ) -> dict[str, list[int]]:
        """`diagnosis_map` and `medication_map`, to be passed on; what Med-BERT does not know becomes its `[UNK]`.

        Args:
            code_tokens: All tokens of Med-BERT in the order of their ids, of a tokenizer
                `convert_ids_to_tokens(range(len(tokenizer)))`.
            diagnosis_tokens: The same of diagnoses.
            medication_tokens: The same of medications.

        Raises:
            ValueError: Med-BERT has no `[UNK]`.
        """
        ids = {token: index for index, token in enumerate(code_tokens)}
        if "[UNK]" not in ids:
            raise ValueError("`code_tokens` must hold [UNK], got none. Pass those of an EhrCodeTokenizer.")
        kinds = {"diagnosis_map": diagnosis_tokens, "medication_map": medication_tokens}
        return {name: [ids.get(token, ids["[UNK]"]) for token in tokens] for name, tokens in kinds.items()}

    def validate_encoders(self):
        """There are not two encoders of codes, and options are there only with what they are about."""
        if self.gbert_config is not None and self.medbert_config is not None:
            raise ValueError(
                "`gbert_config` and `medbert_config` must not both be given, for one encoder reads the codes. Leave "
                "one out."
            )
        if self.freeze_note_layers is not None and self.note_config is None:
            raise ValueError(
                f"`freeze_note_layers` must be None without `note_config`, got {self.freeze_note_layers}. Leave it "
                "out."
            )
        if self.chunk_scale <= 0:
            raise ValueError(f"`chunk_scale` must be positive, got {self.chunk_scale}. 2 is the paper's.")

    def validate_maps(self):
        """Med-BERT's ids of all codes are there, inside its vocabulary."""
        size = getattr(self.medbert_config, "vocab_size", 0)
        for name in ("diagnosis_map", "medication_map"):
            ids = getattr(self, name)
            if (ids is None) != (self.medbert_config is None):
                raise ValueError(
                    f"`{name}` must be given with `medbert_config`, and only with it. Make it with `code_maps`."
                )
            if ids is not None and not all(0 <= index < size for index in ids):
                raise ValueError(
                    f"`{name}` must hold ids in [0, {size}), the vocabulary of Med-BERT. Make it with `code_maps`."
                )


EhrConcatConfig.register_for_auto_class()
