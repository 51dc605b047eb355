"""Configuration of the BiLSTM-CRF taggers: named entities from words or from the states of any text encoder."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class EhrTaggerConfig(PreTrainedConfig):
    r"""Configuration of a bidirectional LSTM with a CRF behind it (Lample et al., NAACL 2016, without characters).

    MedM-PLM's Table V puts the states of a text encoder where the word embeddings were.

    Args:
        vocab_size: Tokens of the vocabulary, special ones included; read without `note_config`.
        embedding_size: Width of the word embeddings; read without `note_config`.
        note_config: Configuration of a text encoder, any that `AutoModel` knows; of one with a decoder its encoder is
            taken. `None`: word embeddings.
        freeze_note_encoder: Whether training leaves the text encoder as it was loaded, its dropout switched off. The
            paper does not say what it did.
        hidden_size: Width of the LSTM in each direction. MedM-PLM gives none.
        hidden_dropout_prob: Dropout on what the LSTM reads, and on its states.
        pad_token_id: Id of `[PAD]`.

    Names of tags are those of `id2label`; of `B-x` and `I-x` the latter is only ever predicted behind one of them.

    Example:
    ```python
    >>> from hf_ehr import EhrTaggerConfig, EhrTaggerForTokenClassification
    >>> tags = ["O", "B-problem", "I-problem"]
    >>> config = EhrTaggerConfig.tiny(id2label=dict(enumerate(tags)), label2id={tag: n for n, tag in enumerate(tags)})
    >>> EhrTaggerForTokenClassification(config).num_labels
    3

    ```
    """

    model_type = "ehr_tagger"
    keys_to_ignore_at_inference = ["logits"]  # noqa: RUF012 - the tags are what is predicted
    sub_configs_defaults: ClassVar = {
        "note_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }

    vocab_size: int = 20000
    embedding_size: int = 100
    note_config: dict | PreTrainedConfig | None = None
    freeze_note_encoder: bool = False
    hidden_size: int = 256
    hidden_dropout_prob: float | int = 0.5
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        # A checkpoint of the tagger must open as the bare model too.
        self.auto_map = kwargs.pop("auto_map", None) or {
            "AutoConfig": "configuration_ehrtagger.EhrTaggerConfig",
            "AutoModel": "modeling_ehrtagger.EhrTaggerModel",
            "AutoModelForTokenClassification": "modeling_ehrtagger.EhrTaggerForTokenClassification",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(cls, **overrides: Any) -> "EhrTaggerConfig":
        """Width 32 for tests, examples and the quickstart."""
        return cls(**({"embedding_size": 32, "hidden_size": 32, "hidden_dropout_prob": 0.1} | overrides))

    def validate_encoder(self):
        """There is an encoder to freeze."""
        if self.freeze_note_encoder and self.note_config is None:
            raise ValueError(
                "`freeze_note_encoder` must be False with word embeddings, got True. Pass `note_config`, or use "
                "`EhrTaggerForTokenClassification.from_note_encoder`."
            )


EhrTaggerConfig.register_for_auto_class()
