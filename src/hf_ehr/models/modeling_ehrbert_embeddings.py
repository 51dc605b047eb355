"""What a token of a note brings into the encoder, and more positions for encoders that ran out of them."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_ehrbert import EhrBertConfig


class EhrBertEmbeddings(nn.Module):
    """Token + position + type embeddings, layer norm, dropout."""

    def __init__(self, config: EhrBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, positions, token_type_ids, inputs_embeds=None):
        """Ids (rows, length) → (rows, length, hidden)."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        embedded = words + self.position_embeddings(positions) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(embedded))


def token_positions(tokens, attention_mask, packed):
    """The running index of each token within its segment, (rows, length) like `tokens`."""
    if packed is not None:
        return packed.positions()[None]
    if attention_mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


PositionInit = Literal["random", "tile", "interpolate"]


def extended_positions(table: torch.Tensor, length: int, init: PositionInit = "random", std: float = 0.02):
    """A longer position table from a shorter one, for a state dict.

    Args:
        table: (positions, hidden).
        length: Positions of the new table.
        init: `random`: the old rows, then N(0, std²) (BERT-XML, section 3.1). `tile`: the old rows again and again, so
            that each place keeps its neighbours. `interpolate`: the old rows stretched over the new length; the first
            rows change too.
        std: Standard deviation of new random rows.

    Returns:
        (length, hidden).

    Raises:
        ValueError: `length` is less than the table has.
    """
    old = len(table)
    if length < old:
        raise ValueError(
            f"`length` must be at least the {old} positions there are, got {length}. Cut segments instead."
        )
    if init == "interpolate":
        columns = table.float().t()[None]
        stretched = nn.functional.interpolate(columns, size=length, mode="linear", align_corners=True)
        return stretched[0].t().to(table.dtype).contiguous()
    if init == "tile":
        return table.repeat(-(-length // old), 1)[:length]
    return torch.cat([table, torch.randn(length - old, table.shape[1], dtype=table.dtype, device=table.device) * std])


@torch.no_grad()
def extend_position_embeddings(model: PreTrainedModel, length: int, init: PositionInit = "random") -> PreTrainedModel:
    """Lets a model with a table of positions read segments of `length` tokens; in place.

    Args:
        model: EhrBert, BERT, RoBERTa, Longformer or another with `position_embeddings`, alone or under any head.
        length: Longest segment from now on, in tokens.
        init: As in [`extended_positions`].

    Returns:
        The model.

    Raises:
        ValueError: The model has no such table (rotary models need none), or `length` is less than it has.
    """
    owners: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "position_embeddings", None), nn.Embedding)
    ]
    if not owners:
        raise ValueError(
            f"`model` must have a table of position embeddings, got {type(model).__name__} without one. Models with "
            "rotary positions read longer input as they are."
        )
    config = model.config.get_text_config()
    for owner in owners:
        table: Any = owner.position_embeddings
        # RoBERTa's family keeps the rows up to the padding id for padding, and counts tokens from the next.
        kept = 0 if table.padding_idx is None else table.padding_idx + 1
        rows = extended_positions(table.weight[kept:], length, init, config.initializer_range)
        table.weight = nn.Parameter(torch.cat([table.weight[:kept], rows]))
        table.num_embeddings = kept + length
        # BERT keeps ready-made ids of its old length.
        if "position_ids" in owner._buffers:
            owner.register_buffer("position_ids", torch.arange(kept + length, device=rows.device)[None], False)
        if "token_type_ids" in owner._buffers:
            owner.register_buffer("token_type_ids", torch.zeros_like(owner.position_ids), False)
        config.max_position_embeddings = model.config.max_position_embeddings = kept + length
    return model
