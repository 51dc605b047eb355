"""Configuration of the recurrent medication recommender that MedM-PLM is compared with."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class VisitRnnConfig(PreTrainedConfig):
    r"""Configuration of a GRU over visits (the RNN of MedM-PLM's Table III, of which the paper says no more).

    Args:
        diagnosis_vocab_size: Ids of diagnoses, special tokens included.
        medication_vocab_size: Ids of medications, special tokens included.
        pad_token_id: Of both vocabularies.
        hidden_size: Width of code embeddings and of the GRU; 300 is that of MedM-PLM's codes.
        hidden_dropout_prob: Dropout on the sum of a visit's embeddings, and before the last layer.
        initializer_range: Standard deviation of starting weights; the GRU starts within ±1/√hidden_size.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import VisitRnnConfig, VisitRnnModel
    >>> VisitRnnModel(VisitRnnConfig.tiny(diagnosis_vocab_size=40, medication_vocab_size=20)).config.hidden_size
    32

    ```
    """

    model_type = "ehr_visitrnn"
    keys_to_ignore_at_inference = ["pooler_output"]  # noqa: RUF012 - the library's own declaration

    diagnosis_vocab_size: int = 6651
    medication_vocab_size: int = 160
    pad_token_id: int = 0
    hidden_size: int = 300
    hidden_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_visitrnn.VisitRnnConfig",
            "AutoModel": "modeling_visitrnn.VisitRnnModel",
            "AutoModelForSequenceClassification": "modeling_visitrnn.VisitRnnForMedicationRecommendation",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(cls, **overrides: Any) -> "VisitRnnConfig":
        """Width 32, for tests, examples and the quickstart."""
        return cls(**({"hidden_size": 32, "initializer_range": 0.1} | overrides))

    def validate_codes(self):
        """The padding lies inside both vocabularies."""
        for kind in ("diagnosis", "medication"):
            size = getattr(self, f"{kind}_vocab_size")
            if not 0 <= self.pad_token_id < size:
                raise ValueError(
                    f"`pad_token_id` must lie in [0, {kind}_vocab_size={size}), got {self.pad_token_id}. Pass "
                    "len(tokenizer) as the size and the tokenizer's own id."
                )


VisitRnnConfig.register_for_auto_class()
