"""Configuration of the EhrBert models (BERT-XML: Zhang, Liu, Razavian, 2020)."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

MIRRORED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "max_position_embeddings", "pad_token_id"),
)
"""What the configuration repeats of another encoder, so that it never tells of an encoder that is not there."""


@strict
class EhrBertConfig(PreTrainedConfig):
    r"""Configuration of the EhrBert models; the defaults are the paper's big encoder with the XML head.

    The encoder is BERT over the tokens of clinical notes (section 3.1). [`EhrBertForICDCoding`] also takes any other
    text encoder of the library, through `text_config`.

    Args:
        vocab_size: Tokens of the vocabulary, special ones included. 20,000 is the paper's.
        hidden_size: Width of the encoder.
        num_hidden_layers: Number of Transformer layers.
        num_attention_heads: Heads per layer.
        intermediate_size: Width of the feed-forward layer.
        hidden_act: Activation.
        hidden_dropout_prob: Dropout on embeddings, on the output of each sub-layer and before the ICD head.
        attention_probs_dropout_prob: Dropout on attention probabilities. The paper has 0.1 (see [`paper_exact`]); 0
            is what the packed path supports on every device (the variable-length kernels take no dropout).
        max_position_embeddings: Longest segment, in tokens.
        type_vocab_size: Token types; the second is the other half of a pair in next-sentence prediction.
        norm_position: `post` is BERT's order (the paper), `pre` normalises before each sub-layer.
        initializer_range: Standard deviation of the truncated normal that weights start from.
        attention_gain: As in [`MedBertConfig`]: start of the attention projections.
        layer_norm_eps: Epsilon of the layer norms.
        classifier_dropout: Dropout before the classifier; `hidden_dropout_prob` when `None`.
        pad_token_id: Id of `[PAD]`.
        mask_token_id: Id of `[MASK]`.
        tie_word_embeddings: Whether the token decoder shares the token embeddings.
        text_config: Another encoder in place of EhrBert's: its configuration. The fields that both have are then
            that encoder's.
        head: What scores the codes. `xml`: label attention (Eq 2-4); `cls`: one layer on the `[CLS]` state (Eq 1).
        xml_hidden_sizes: Hidden layers of the network that turns a label's context into its score (`W_b` of Eq 4);
            read under `label_output="shared"`. The paper gives no size: 256 is AttentionXML's.
        label_attention_scale: Whether scores are divided by the root of their width. The paper has no scale, and label
            vectors made from code descriptions then start the softmax at 0 and 1, without a gradient.
        label_attention_norm: Whether a layer norm precedes label attention. Not in the paper; it keeps half precision
            from collapsing whatever the encoder's states look like.
        label_key_size: `None`: label vectors meet the states themselves. A number: they meet tanh of a projection to
            this width, as in LAAT (Vu et al., IJCAI 2020) and PLM-ICD (Huang et al., ClinicalNLP 2022).
        label_output: `shared`: one network scores the contexts of all labels (the paper). `per_label`: each label has
            its own output vector and bias (LAAT, PLM-ICD).
        segment_pooling: How the segments of a long note become one. `attention`: one label attention over the tokens
            of all of them; `max`: the greatest score of any segment (the paper). `None`: `attention` for `xml`, and
            `max` for `cls`, which has nothing else.
        max_segments: Windows of a note that are read, the first ones; `None` reads all. Their length in training is
            the `model_max_length` of the tokenizer that was saved beside the model.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`; from it on a code
            is worth a coder's review.
        common_threshold: One threshold for all labels, with the best micro-F1 on validation: the setting in which
            papers compare, and what a label without one of its own takes.
        auto_code_thresholds: As `thresholds`, for codes that need no review; without one a label needs it. Tuned ones
            are never below `thresholds`, and 2 where no probability is enough.
        label_descriptions: Description per label name, where the public code lists have none or another language.

    Example:
    ```python
    >>> from hf_ehr import EhrBertConfig, EhrBertForICDCoding
    >>> config = EhrBertConfig.tiny(vocab_size=100, id2label={0: "I10", 1: "E11.9"}, label2id={"I10": 0, "E11.9": 1})
    >>> EhrBertForICDCoding(config).num_labels
    2

    ```
    """

    model_type = "ehr_bert"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *("hidden_states", "attentions", "mlm_loss", "next_sentence_loss", "pooler_output", "label_attentions"),
    ]
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }

    vocab_size: int = 20000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    max_position_embeddings: int = 1024
    type_vocab_size: int = 2
    norm_position: Literal["post", "pre"] = "post"
    initializer_range: float = 0.02
    attention_gain: float | int | None = None
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | int | None = None
    pad_token_id: int | None = 0
    mask_token_id: int | None = 4
    tie_word_embeddings: bool = True
    text_config: dict | PreTrainedConfig | None = None
    head: Literal["xml", "cls"] = "xml"
    xml_hidden_sizes: list[int] | tuple[int, ...] = (256,)
    label_attention_scale: bool = True
    label_attention_norm: bool = True
    label_key_size: int | None = None
    label_output: Literal["shared", "per_label"] = "shared"
    segment_pooling: Literal["attention", "max"] | None = None
    max_segments: int | None = None
    thresholds: dict | None = None
    common_threshold: float | int | None = None
    auto_code_thresholds: dict | None = None
    label_descriptions: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrbert.EhrBertConfig",
            "AutoModel": "modeling_ehrbert.EhrBertModel",
            "AutoModelForMaskedLM": "modeling_ehrbert.EhrBertForMaskedLM",
            "AutoModelForPreTraining": "modeling_ehrbert.EhrBertForPreTraining",
            "AutoModelForSequenceClassification": "modeling_ehrbert.EhrBertForSequenceClassification",
        }
        self.xml_hidden_sizes = list(self.xml_hidden_sizes)
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            for name in MIRRORED:
                setattr(self, name, getattr(self.text_config, name, getattr(self, name)))
            self.mask_token_id = None  # a text configuration of the library knows none

    @classmethod
    def big(cls, **overrides: Any) -> "EhrBertConfig":
        """The paper's big encoder: 12 layers × 768; 101,794,560 parameters with its pooler and 20,000 tokens."""
        return cls(**overrides)

    @classmethod
    def small(cls, **overrides: Any) -> "EhrBertConfig":
        """The paper's small encoder: 8 layers × 512; 36,248,064 parameters with its pooler and 20,000 tokens."""
        sizes: dict[str, Any] = {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> "EhrBertConfig":
        """2 layers × 64 for tests, examples and the quickstart."""
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "xml_hidden_sizes": (32,),
        }
        return cls(**(sizes | overrides))

    @classmethod
    def paper_exact(cls, size: Literal["small", "big"] = "big", **overrides: Any) -> "EhrBertConfig":
        """The paper's formulas to the letter: no scale, no norm, maximum over segments, attention dropout 0.1."""
        exact: dict[str, Any] = {
            "attention_probs_dropout_prob": 0.1,
            "label_attention_scale": False,
            "label_attention_norm": False,
            "segment_pooling": "max",
        }
        return (cls.small if size == "small" else cls.big)(**(exact | overrides))

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
            if value is not None and self.text_config is None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"`{name}` must lie in [0, vocab_size={self.vocab_size}), got {value}. Pass len(tokenizer) as "
                    "`vocab_size` and the tokenizer's own id."
                )

    def validate_label_attention(self):
        """Sizes are positive, and the [CLS] head has no attention to pool with."""
        if self.max_segments is not None and self.max_segments < 1:
            raise ValueError(f"`max_segments` must be at least 1, or None for all, got {self.max_segments}.")
        sizes = [*self.xml_hidden_sizes, *([] if self.label_key_size is None else [self.label_key_size])]
        if any(size < 1 for size in sizes):
            raise ValueError(f"`xml_hidden_sizes` and `label_key_size` must be positive, got {sizes}. Change them.")
        if self.head == "cls" and self.segment_pooling == "attention":
            raise ValueError(
                "`segment_pooling` must be 'max' or None with `head='cls'`, got 'attention'. Choose `head='xml'` for "
                "one attention over all segments."
            )


EhrBertConfig.register_for_auto_class()
