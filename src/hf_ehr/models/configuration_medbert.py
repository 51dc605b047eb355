"""Configuration of Med-BERT (Rasmy et al., npj Digital Medicine 2021)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class MedBertConfig(PreTrainedConfig):
    r"""Configuration of the Med-BERT models; the defaults are the paper's base model.

    Args:
        vocab_size: Number of codes plus special tokens. 82,603 is the paper's vocabulary.
        hidden_size: Width of the encoder.
        num_hidden_layers: Number of Transformer layers.
        num_attention_heads: Heads per layer, 6 × 32.
        intermediate_size: Width of the feed-forward layer. 64 < `hidden_size` is what the authors trained with.
        hidden_act: Activation. The authors' TensorFlow code uses the tanh form of gelu.
        hidden_dropout_prob: Dropout on embeddings and on the output of each sub-layer.
        attention_probs_dropout_prob: Dropout on attention probabilities. The paper has 0.1; 0 is what the packed path
            supports on every device (the variable-length kernels take no dropout).
        max_position_embeddings: Longest patient, in codes.
        max_visits: Size of the visit table (`type_vocab_size` of the authors' config); visit 0 is padding.
        serialization: What the third embedding table counts. `global`: the running index of the code in the patient
            (what the published weights used); `within_visit`: the code's rank in its visit (the paper's text);
            `none`: no such table; `visit_sinusoid`: no table but the number of the visit as fixed sinusoids (BEHRT).
        visit_segments: `numbered` gives each visit its own row, `alternating` one of two in turn (BEHRT).
        max_age: Greatest age in years with an embedding of its own (BEHRT); older is the same, unknown has another.
            `None`: ages are not read.
        pooling: How code states become one patient vector. The paper's text sums them (`sum`) and its first code takes
            the first state through a tanh layer (`first`); `sum_unmasked` also sums padding, as the authors' second
            script does, and depends on the batch. The default is `mean`: a sum of up to 512 states gives logits
            of order 10-100 at the start and a confidence that grows with the length of the history.
        norm_position: `post` is BERT's order (the paper), `pre` normalises before each sub-layer.
        objective: Pre-training objective of the codes. `masked_lm` is the paper's; `masked_set` hides half of them
            and predicts them all from the mean of the visible ones.
        stay_loss_weight: Weight of the prolonged-stay loss beside the code loss (1 in the paper).
        initializer_range: Standard deviation of the truncated normal that weights start from.
        attention_gain: `None` starts the attention projections from the truncated normal, like BERT. A number starts
            value and output projections as the identity, the value times this gain: a masked code then sees the mean
            of its patient's codes from the first step, as loud as itself at a gain of about the root of the number of
            codes. Without it, small models stay at the unigram for epochs.
        layer_norm_eps: Epsilon of the layer norms.
        classifier_dropout: Dropout before the classifier; `hidden_dropout_prob` when `None`.
        head: What the classifier reads. `ffn`: the pooled states ("Med-BERT only"); `gru`, `bigru`: the last state of
            a GRU over them, of both directions; `retain`: RETAIN's weighted sum of them (section "Fine-tuning");
            `lstm`, `dipole`, `adacare`, `hitanet`: the heads of [`EhrRnnConfig`], `hitanet` with `day_ids`.
        head_hidden_size: Width of the head's GRUs (each direction). 128 is what the authors' baselines
            (`pytorch_ehr`) and RETAIN's code use; the paper gives none. A multiple of 4 for `hitanet`.
        pad_token_id: Id of `[PAD]`.
        mask_token_id: Id of `[MASK]`. The authors used 0 for both padding and mask (see [`code_exact`]).
        tie_word_embeddings: Whether the code decoder shares the code embeddings.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import MedBertConfig, MedBertModel
    >>> model = MedBertModel(MedBertConfig.tiny(vocab_size=100))
    >>> model.config.hidden_size
    64

    ```
    """

    model_type = "ehr_medbert"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *("hidden_states", "attentions", "mlm_loss", "stay_loss"),
        *("pooler_output", "head_alpha", "head_beta", "contributions"),
    ]
    attribute_map = {"type_vocab_size": "max_visits"}  # noqa: RUF012 - the library's own declaration

    vocab_size: int = 82603
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    intermediate_size: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    max_position_embeddings: int = 512
    max_visits: int = 1000
    serialization: Literal["global", "within_visit", "none", "visit_sinusoid"] = "global"
    visit_segments: Literal["numbered", "alternating"] = "numbered"
    max_age: int | None = None
    pooling: Literal["mean", "sum", "first", "sum_unmasked"] = "mean"
    norm_position: Literal["post", "pre"] = "post"
    objective: Literal["masked_lm", "masked_set"] = "masked_lm"
    stay_loss_weight: float | int = 1.0
    initializer_range: float = 0.02
    attention_gain: float | int | None = None
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | int | None = None
    head: Literal["ffn", "gru", "bigru", "retain", "lstm", "dipole", "adacare", "hitanet"] = "ffn"
    head_hidden_size: int = 128
    pad_token_id: int | None = 0
    mask_token_id: int | None = 4
    tie_word_embeddings: bool = True
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_medbert.MedBertConfig",
            "AutoModel": "modeling_medbert.MedBertModel",
            "AutoModelForMaskedLM": "modeling_medbert.MedBertForMaskedLM",
            "AutoModelForPreTraining": "modeling_medbert.MedBertForPreTraining",
            "AutoModelForSequenceClassification": "modeling_medbert.MedBertForSequenceClassification",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def base(cls, **overrides: Any) -> "MedBertConfig":
        """The paper's model: 6 layers × 192, feed-forward 64."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> "MedBertConfig":
        """2 layers × 64 for tests, examples and the quickstart."""
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def code_exact(cls, **overrides: Any) -> "MedBertConfig":
        """The authors' released code: pooled first token, id 0 for both padding and mask, attention dropout 0.1."""
        exact: dict[str, Any] = {"pooling": "first", "mask_token_id": 0, "attention_probs_dropout_prob": 0.1}
        return cls(**(exact | overrides))

    @classmethod
    def behrt(cls, **overrides: Any) -> "MedBertConfig":
        """BEHRT (Li et al., Scientific Reports 2020), the sizes from the authors' notebook; masked codes alone.

        Its histories begin with `[CLS]` and end each visit with `[SEP]`: build the tokenizer with
        `visit_separators=True, ages=True`.
        """
        published: dict[str, Any] = {
            "hidden_size": 288,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 512,
            "hidden_act": "gelu",
            "attention_probs_dropout_prob": 0.1,
            "serialization": "visit_sinusoid",
            "visit_segments": "alternating",
            "max_age": 120,
            "pooling": "first",
            "stay_loss_weight": 0.0,
        }
        return cls(**(published | overrides))

    def validate_max_age(self):
        """`max_age` is an age."""
        if self.max_age is not None and self.max_age < 0:
            raise ValueError(f"`max_age` must be at least 0 or None, got {self.max_age}. Change it.")

    def validate_heads(self):
        """`hidden_size` splits evenly over the heads."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be divisible by `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}. Change one of them."
            )

    def validate_special_ids(self):
        """Special ids lie inside the vocabulary."""
        for name in ("pad_token_id", "mask_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"`{name}` must lie in [0, vocab_size={self.vocab_size}), got {value}. Pass len(tokenizer) as "
                    "`vocab_size` and the tokenizer's own id."
                )


MedBertConfig.register_for_auto_class()
