"""Configuration of the neural baselines for coding notes: convolution or recurrence over words, and a head."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class EhrTextConfig(PreTrainedConfig):
    r"""Configuration of the models that coding with Transformers is compared with.

    Args:
        vocab_size: Tokens of the vocabulary, special ones included.
        embedding_size: Width of the word embeddings.
        encoder: `cnn`, one convolution with tanh; `lstm` or `gru`, one layer in both directions.
        hidden_size: Filters of the convolution, or width of each direction of the recurrence.
        kernel_size: Words under a filter; read by `cnn`.
        head: What scores the codes. `max`: the greatest value of each feature over the note and one layer;
            `label_attention`: every code looks for its own evidence (CAML, LAAT); `multi_head`: queries that all codes
            share (BERT-XML, Eq 5-8).
        num_attention_queries: Queries of `multi_head`; 200 is the paper's. The last layer has
            `num_labels × num_attention_queries × states` weights: 469 million for the paper's 2,292 codes.
        label_attention_scale: Whether scores of label attention are divided by the root of their width. CAML and LAAT
            do not; wide states then start the softmax at 0 and 1.
        label_attention_norm: Whether a layer norm precedes label attention. CAML and LAAT have none.
        label_key_size: `None`: label vectors meet the states themselves (CAML). A number: they meet tanh of a
            projection to this width (LAAT).
        label_output: `per_label`: each label has its own output vector and bias (CAML, LAAT). `shared`: one network
            scores the contexts of all labels (AttentionXML, with `encoder="lstm"`).
        xml_hidden_sizes: Hidden layers of the `shared` network.
        hidden_dropout_prob: Dropout on the word embeddings.
        freeze_word_embeddings: Whether training leaves the word embeddings as they were loaded.
        pad_token_id: Id of `[PAD]`.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import EhrTextConfig, EhrTextForICDCoding
    >>> config = EhrTextConfig.tiny(vocab_size=100, id2label={0: "I10", 1: "E11.9"}, label2id={"I10": 0, "E11.9": 1})
    >>> EhrTextForICDCoding(config).num_labels
    2

    ```
    """

    model_type = "ehr_text"
    keys_to_ignore_at_inference = ["label_attentions"]  # noqa: RUF012 - the library's own declaration

    vocab_size: int = 20000
    embedding_size: int = 100
    encoder: Literal["cnn", "lstm", "gru"] = "cnn"
    hidden_size: int = 50
    kernel_size: int = 10
    head: Literal["max", "label_attention", "multi_head"] = "label_attention"
    num_attention_queries: int = 200
    label_attention_scale: bool = True
    label_attention_norm: bool = True
    label_key_size: int | None = None
    label_output: Literal["per_label", "shared"] = "per_label"
    xml_hidden_sizes: list[int] | tuple[int, ...] = (256,)
    hidden_dropout_prob: float | int = 0.2
    freeze_word_embeddings: bool = False
    pad_token_id: int | None = 0
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of the model with its head must open as the bare encoder too.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrtext.EhrTextConfig",
            "AutoModel": "modeling_ehrtext.EhrTextModel",
            "AutoModelForSequenceClassification": "modeling_ehrtext.EhrTextForICDCoding",
        }
        self.xml_hidden_sizes = list(self.xml_hidden_sizes)
        super().__post_init__(**kwargs)

    @property
    def state_size(self) -> int:
        """Width of the state of a word: of both directions together."""
        return self.hidden_size * (1 if self.encoder == "cnn" else 2)

    @classmethod
    def cnn(cls, **overrides: Any) -> "EhrTextConfig":
        """The convolution with max pooling that CAML is compared with: 500 filters of 4 words (their Table 3)."""
        sizes: dict[str, Any] = {"encoder": "cnn", "head": "max", "hidden_size": 500, "kernel_size": 4}
        return cls(**(sizes | overrides))

    @classmethod
    def caml(cls, **overrides: Any) -> "EhrTextConfig":
        """CAML (Mullenbach et al., NAACL 2018): 50 filters of 10 words, per-label attention to the letter."""
        sizes: dict[str, Any] = {"encoder": "cnn", "hidden_size": 50, "kernel_size": 10}
        return cls(**(sizes | _BARE_LABEL_ATTENTION | overrides))

    @classmethod
    def laat(cls, **overrides: Any) -> "EhrTextConfig":
        """LAAT (Vu et al., IJCAI 2020): bi-LSTM of 512 a direction, keys of 512, dropout 0.3."""
        sizes: dict[str, Any] = {"encoder": "lstm", "hidden_size": 512, "label_key_size": 512}
        return cls(**(sizes | {"hidden_dropout_prob": 0.3} | _BARE_LABEL_ATTENTION | overrides))

    @classmethod
    def multi_head_attention(cls, **overrides: Any) -> "EhrTextConfig":
        """The baseline of BERT-XML (Eq 5-8): frozen 300-d words, bi-LSTM of 512 a direction, 200 queries.

        The paper calls it a bi-LSTM "with GRU"; `encoder="gru"` is the other reading.
        """
        sizes: dict[str, Any] = {"encoder": "lstm", "head": "multi_head", "embedding_size": 300, "hidden_size": 512}
        return cls(**(sizes | {"hidden_dropout_prob": 0.1, "freeze_word_embeddings": True} | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> "EhrTextConfig":
        """Width 32 and 4 queries, for tests, examples and the quickstart."""
        sizes: dict[str, Any] = {"embedding_size": 32, "hidden_size": 32, "kernel_size": 3}
        return cls(**(sizes | {"num_attention_queries": 4, "xml_hidden_sizes": (32,)} | overrides))

    def validate_sizes(self):
        """Sizes are positive, and the padding lies inside the vocabulary."""
        keys = [] if self.label_key_size is None else [self.label_key_size]
        sizes = [self.kernel_size, self.num_attention_queries, *self.xml_hidden_sizes, *keys]
        if any(size < 1 for size in sizes):
            raise ValueError(
                "`kernel_size`, `num_attention_queries`, `xml_hidden_sizes` and `label_key_size` must be positive, "
                f"got {sizes}. Change them."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in [0, vocab_size={self.vocab_size}), got {self.pad_token_id}. Pass "
                "len(tokenizer) as `vocab_size` and the tokenizer's own id."
            )


_BARE_LABEL_ATTENTION = {"head": "label_attention", "label_attention_scale": False, "label_attention_norm": False}

EhrTextConfig.register_for_auto_class()
