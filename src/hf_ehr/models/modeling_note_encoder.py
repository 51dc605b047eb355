"""Text encoders inside models of admissions: fresh or opened, read by their pooler or their mean, frozen or not."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from .modeling_ehr import pool_states


class NoteEncoderMixin:
    """Of models whose base has a `note_encoder`, which may be None, and a config with `freeze_note_encoder`.

    The encoder must be an attribute of the base model itself: of all modules under that one the library ties the
    weights of its children alone, and T5 has tied ones.
    """

    config: Any
    base_model_prefix: str

    def tie_weights(self, *args, **kwargs):
        """Freezes the text encoder again: loading makes new parameters, and calls this at its end."""
        super().tie_weights(*args, **kwargs)  # type: ignore[misc]
        for encoder in self._frozen():
            encoder.requires_grad_(False)

    def train(self, mode: bool = True):
        """As always, but a frozen text encoder has no dropout."""
        super().train(mode)  # type: ignore[misc]
        for encoder in self._frozen():
            encoder.eval()
        return self

    def _frozen(self) -> list[Any]:
        encoder = getattr(getattr(self, self.base_model_prefix, self), "note_encoder", None)
        return [encoder] if encoder is not None and self.config.freeze_note_encoder else []


def new_note_encoder(config: Any, pooler: bool = False) -> Any:
    """A text encoder with fresh weights; of a family with a decoder (T5) its encoder alone.

    Args:
        config: Of any text encoder of the library.
        pooler: Whether its own vector of a text is read; a layer that nothing reads would get no gradient.

    Raises:
        ValueError: `pooler` is asked for, and the family has none.
    """
    return _fitted(_family(config).from_config(config), pooler)


def put_note_encoder(model: Any, encoder: Any, pooler: bool = False) -> None:
    """Puts a trained text encoder in the place of the fresh one of a model.

    Args:
        model: One with [`NoteEncoderMixin`]; changed in place.
        encoder: As `opened_note_encoder` returns it.
        pooler: As above.

    Raises:
        ValueError: The encoder has a decoder too, or no pooler where one is read.
    """
    wanted = type(model.base_model.note_encoder)
    if type(encoder) is not wanted:
        raise ValueError(
            f"`encoder` must be a text encoder alone, {wanted.__name__}, got {type(encoder).__name__}. Open it with "
            "`AutoModelForTextEncoding`, or give its folder."
        )
    model.base_model.note_encoder = _fitted(encoder, pooler).requires_grad_(True)
    model.tie_weights()


def opened_note_encoder(encoder: str | Path | PreTrainedModel, pooler: bool | None = None) -> Any:
    """The text encoder of a model, or of a checkpoint in fp32.

    Args:
        encoder: A model, or a folder or Hub id.
        pooler: As above; `None` leaves it as it is.

    Raises:
        ValueError: `pooler` is asked for, and the encoder has none.
    """
    if isinstance(encoder, PreTrainedModel):
        found = encoder.base_model
    else:
        found = _family(AutoConfig.from_pretrained(encoder)).from_pretrained(encoder, dtype=torch.float32)
    return found if pooler is None else _fitted(found, pooler)


def encoded_notes(encoder: Any, input_ids, attention_mask=None, pooler: bool = False) -> tuple[Any, torch.Tensor]:
    """Notes → one vector each.

    Args:
        encoder: A text encoder.
        input_ids: (notes, tokens).
        attention_mask: (notes, tokens), 1 for tokens; a row of 0 is no note. `None` means no padding.
        pooler: Whether the vector is the encoder's own of a text, instead of the mean over the states of its tokens.

    Returns:
        (notes, note_size), 0 for no note; and which rows are one, (notes,) bool.
    """
    tokens = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    there = tokens.any(dim=1)
    seen = tokens | ~there[:, None]  # attention over nothing would be NaN
    output = encoder(input_ids=input_ids, attention_mask=seen.long())
    if pooler:
        return output.pooler_output * there[:, None], there
    return pool_states(output.last_hidden_state, "mean", tokens), there


def given_vectors(vectors, mask, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of notes that a batch brings, 0 where it has none; and which rows are a note, (notes,) bool.

    Args:
        vectors: (notes, size).
        mask: (notes,), which rows are one; all when `None`.
        size: What the model reads.

    Raises:
        ValueError: They are missing or have another width.
    """
    shape = None if vectors is None else tuple(vectors.shape)
    if shape is None or shape[1:] != (size,):
        raise ValueError(
            f"`note_vectors` must have shape (admissions, {size}) (`note_size`), got {shape}. Compute them with one "
            "encoder for all admissions; any numbers with `note_mask` False where there is no note."
        )
    there = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device) if mask is None else mask.bool()
    return vectors.masked_fill(~there[:, None], 0), there


def _family(config: Any) -> Any:
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _fitted(encoder: Any, pooler: bool) -> Any:
    """The encoder with its pooler only if that is read."""
    has_one = getattr(encoder, "pooler", None) is not None
    if pooler and not has_one:
        raise ValueError(
            f"`note_pooling` must be 'mean' for {type(encoder).__name__}, which has no pooler, got 'pooler'. Take it."
        )
    if has_one and not pooler:
        encoder.pooler = None
    return encoder
