"""What is asked of a model whatever its encoder: evaluation mode, and how much it reads at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def segment_length(model: Any, tokenizer: Any) -> int:
    """Tokens of a segment unless another length is asked for: the tokenizer's own, which is that of training."""
    return min(tokenizer.model_max_length, longest_segment(model))


def longest_segment(model: Any) -> int:
    """The longest segment, in tokens, that the encoder reads."""
    return table_positions(model) or model.config.max_position_embeddings


def table_positions(model: Any) -> int | None:
    """Tokens that a table of position embeddings has rows for; None where there is none (rotary positions)."""
    tables = [
        table for module in model.modules()
        if isinstance(table := getattr(module, "position_embeddings", None), nn.Embedding)
    ]  # fmt: skip
    # RoBERTa's family counts positions from behind the padding id.
    usable = [len(table.weight) - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    return min(usable, default=None)
