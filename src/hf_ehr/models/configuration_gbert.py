"""Configuration of G-BERT (Shang et al., IJCAI 2019), which is also the code encoder of MedM-PLM."""

from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .code_tree import check_parents, code_parents, flat_parents

TINY_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.1}
"""A start at 0.02, meant for hundreds of features, lets hardly anything through 32 of them: nothing is learned in
a thousand steps."""


@strict
class GBertConfig(PreTrainedConfig):
    r"""Configuration of G-BERT: sets of diagnoses and of medications, embedded through their trees.

    The sizes are those of the authors' code, which MedM-PLM's code shares. Diagnoses and medications have a
    vocabulary and a tree each, and share the encoder. Special tokens are the first ids of both vocabularies.

    Args:
        diagnosis_vocab_size: Ids of diagnoses, special tokens included.
        medication_vocab_size: Ids of medications, special tokens included.
        diagnosis_parents: Parent of every node of the tree of diagnoses, as [`from_vocabularies`] builds it. `None`:
            all codes hang at one root.
        medication_parents: The same of medications.
        num_special_tokens: Ids that are no codes: never a target, and in no tree.
        pad_token_id: Of both vocabularies.
        cls_token_id: Of both vocabularies; the model puts it before the codes.
        hidden_size: Width of embeddings and states.
        num_hidden_layers: Blocks of the encoder.
        num_attention_heads: Heads of a block. MedM-PLM's paper says 2, both codes have 4.
        graph_attention_heads: Heads of the attention over the tree, of 75 features each.
        intermediate_size: Width of the feed-forward layer. From the codes; the papers give none.
        hidden_act: Activation of the feed-forward layer. The codes name ReLU and use GELU's tanh form.
        hidden_dropout_prob: Dropout on the states. MedM-PLM's paper has 0.1, both codes 0.4.
        attention_probs_dropout_prob: Dropout of the attention probabilities.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of starting weights; the trees start from Glorot's. A model whose
            `hidden_size` is below a hundred should start wider, as `tiny` does.
        pretraining_loss: `visit_bce`: binary cross-entropy to all codes of the visit, visible or not (the codes).
            `masked_ce`: to the hidden codes, over those that are not visible.
        thresholds: Decision threshold per label name, tuned on validation, stored beside `id2label`.

    Example:
    ```python
    >>> from hf_ehr import GBertConfig, GBertModel
    >>> special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    >>> config = GBertConfig.from_vocabularies([*special, "ICD9CM/250.00"], [*special, "ATC/C07A"], hidden_size=16)
    >>> config.diagnosis_parents
    [-1, -1, -1, -1, -1, 6, 7, 8, -1]
    >>> GBertModel(config).num_parameters() > 0
    True

    ```
    """

    model_type = "ehr_gbert"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - the library's own declaration
        *("hidden_states", "attentions", "pooler_output", "diagnosis_state", "medication_state"),
        *("diagnosis_states", "medication_states"),
    ]

    diagnosis_vocab_size: int = 6651
    medication_vocab_size: int = 160
    diagnosis_parents: list[int] | None = None
    medication_parents: list[int] | None = None
    num_special_tokens: int = 5
    pad_token_id: int = 0
    cls_token_id: int = 2
    hidden_size: int = 300
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    graph_attention_heads: int = 4
    intermediate_size: int = 300
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pretraining_loss: Literal["visit_bce", "masked_ce"] = "visit_bce"
    thresholds: dict | None = None

    def __post_init__(self, **kwargs):
        # A checkpoint of one head must open as any other; `save_pretrained` only names the saved class.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_gbert.GBertConfig",
            "AutoModel": "modeling_gbert.GBertModel",
            "AutoModelForPreTraining": "modeling_gbert.GBertForPreTraining",
            "AutoModelForSequenceClassification": "modeling_gbert.GBertForMedicationRecommendation",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def from_vocabularies(
        cls, diagnosis_tokens: Sequence[str], medication_tokens: Sequence[str], **overrides: Any
    ) -> "GBertConfig":
        """Sizes and trees of two vocabularies.

        Args:
            diagnosis_tokens: All tokens in the order of their ids, special tokens first, codes as `VOCABULARY/CODE`;
                of a tokenizer `convert_ids_to_tokens(range(len(tokenizer)))`.
            medication_tokens: The same of medications.
            **overrides: Other fields.

        Raises:
            ValueError: A token occurs twice.
        """
        special = overrides.get("num_special_tokens", cls.num_special_tokens)
        fields: dict[str, Any] = {
            "diagnosis_vocab_size": len(diagnosis_tokens),
            "medication_vocab_size": len(medication_tokens),
            "diagnosis_parents": code_parents(diagnosis_tokens, special),
            "medication_parents": code_parents(medication_tokens, special),
        }
        return cls(**(fields | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> "GBertConfig":
        """Width 32, for tests, examples and the quickstart."""
        return cls(**(TINY_SIZES | overrides))

    def tree(self, kind: str) -> list[int]:
        """The parents of `diagnosis` or `medication`."""
        parents = getattr(self, f"{kind}_parents")
        size = getattr(self, f"{kind}_vocab_size")
        return flat_parents(size, self.num_special_tokens) if parents is None else parents

    def num_codes(self, kind: str) -> int:
        """Codes of `diagnosis` or `medication`: the ids without the special tokens."""
        return getattr(self, f"{kind}_vocab_size") - self.num_special_tokens

    def validate_sizes(self):
        """`hidden_size` splits evenly over both kinds of heads."""
        for name in ("num_attention_heads", "graph_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"`hidden_size` must be divisible by `{name}`, got {self.hidden_size} and {getattr(self, name)}. "
                    "Change one of them."
                )

    def validate_codes(self):
        """Special tokens come first in both vocabularies, and both have codes and a tree."""
        if not 0 <= self.pad_token_id < self.num_special_tokens > self.cls_token_id >= 0:
            raise ValueError(
                f"`pad_token_id` and `cls_token_id` must lie in [0, num_special_tokens={self.num_special_tokens}), "
                f"got {self.pad_token_id} and {self.cls_token_id}. Pass those of the tokenizers."
            )
        for kind in ("diagnosis", "medication"):
            if self.num_codes(kind) < 1:
                raise ValueError(
                    f"`{kind}_vocab_size` must exceed `num_special_tokens={self.num_special_tokens}`, got "
                    f"{getattr(self, f'{kind}_vocab_size')}. Pass len(tokenizer)."
                )
            try:
                check_parents(self.tree(kind), getattr(self, f"{kind}_vocab_size"), self.num_special_tokens)
            except ValueError as error:
                raise ValueError(f"`{kind}_parents`: {error}") from error


GBertConfig.register_for_auto_class()
