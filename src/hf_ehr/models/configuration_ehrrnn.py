"""Configuration of the sequence baselines on code embeddings: GRU, Bi-GRU, RETAIN, LSTM, Dipole, AdaCare, HiTANet."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class EhrRnnConfig(PreTrainedConfig):
    r"""Configuration of the sequence models that the papers of Med-BERT and MedHMP compare with.

    Args:
        vocab_size: Number of codes plus special tokens. 82,603 is the paper's vocabulary.
        embedding_size: Width of the code embeddings; 192 is Med-BERT's, whose place they take.
        hidden_size: Width of each GRU (each direction). 128 is the default of the authors' `pytorch_ehr` and of
            RETAIN's code; the Med-BERT paper gives none. For `hitanet` the width of its transformer, a multiple of 4.
            MedHMP's patient-level models have 256 here and in `embedding_size`.
        head: `gru`, `bigru`, or `retain` (Choi et al., NeurIPS 2016); those of MedHMP's patient-level table: `lstm`,
            `dipole` (Ma et al., KDD 2017), `adacare` (Ma et al., AAAI 2020) and `hitanet` (Luo et al., KDD 2020),
            which reads `day_ids` and so needs a tokenizer with `days=True` and data whose intervals are true.
        level: What a step is. `token`: a code, its embedding plus that of its visit (Med-BERT paper, section
            "Fine-tuning"); `visit`: a visit, what `visit_encoder` makes of its codes.
        visit_encoder: Of level `visit`. `sum`: the sum of the codes' embeddings (`pytorch_ehr`, RETAIN); `mlp`:
            MedHMP's code encoder over it, linear, norm, ReLU, twice.
        dipole_attention: How Dipole scores steps: `location`, `general` or `concat`.
        dipole_bidirectional: Whether Dipole reads in both directions.
        max_visits: Size of the visit table at level `token`; visit 0 is padding. 1,000 is Med-BERT's, so that both
            read the same ids; the authors' notebook has 500.
        hidden_dropout_prob: Dropout on the steps. 0.1 as in `pytorch_ehr`; RETAIN's code has 0.5.
        classifier_dropout: Dropout before the classifier; `hidden_dropout_prob` when `None`.
        initializer_range: Standard deviation of the classifier and of the visit table at the start. Code embeddings
            start at 1 and GRUs within ±1/√hidden_size, as PyTorch starts them and the authors trained; a visit table
            that started at 1 too would be noise as loud as the codes.
        pad_token_id: Id of `[PAD]`.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import EhrRnnConfig, EhrRnnModel
    >>> model = EhrRnnModel(EhrRnnConfig.tiny(vocab_size=100, head="retain", level="visit"))
    >>> model.config.hidden_size
    32

    ```
    """

    model_type = "ehr_rnn"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - the library's own declaration
        *("hidden_states", "attentions", "pooler_output", "head_alpha", "head_beta", "contributions"),
    ]

    vocab_size: int = 82603
    embedding_size: int = 192
    hidden_size: int = 128
    head: Literal["gru", "bigru", "retain", "lstm", "dipole", "adacare", "hitanet"] = "gru"
    level: Literal["token", "visit"] = "token"
    visit_encoder: Literal["sum", "mlp"] = "sum"
    dipole_attention: Literal["location", "general", "concat"] = "location"
    dipole_bidirectional: bool = True
    max_visits: int = 1000
    hidden_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrrnn.EhrRnnConfig",
            "AutoModel": "modeling_ehrrnn.EhrRnnModel",
            "AutoModelForSequenceClassification": "modeling_ehrrnn.EhrRnnForSequenceClassification",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(cls, **overrides: Any) -> "EhrRnnConfig":
        """32 × 32 for tests, examples and the quickstart."""
        sizes: dict[str, Any] = {"embedding_size": 32, "hidden_size": 32}
        return cls(**(sizes | overrides))

    def validate_special_ids(self):
        """The padding lies inside the vocabulary."""
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in [0, vocab_size={self.vocab_size}), got {self.pad_token_id}. Pass "
                "len(tokenizer) as `vocab_size` and the tokenizer's own id."
            )

    def validate_visit_encoder(self):
        """An MLP reads visits, not single codes."""
        if self.visit_encoder == "mlp" and self.level != "visit":
            raise ValueError(
                f"`visit_encoder` must be 'sum' at level {self.level!r}, got 'mlp'. Pass level='visit' beside it."
            )

    def validate_heads(self):
        """HiTANet's transformer splits its width among 4 heads."""
        if self.head == "hitanet" and self.hidden_size % 4:
            raise ValueError(f"`hidden_size` must be a multiple of 4 for `hitanet`, got {self.hidden_size}. Round it.")


EhrRnnConfig.register_for_auto_class()
