"""What is asked of a model whatever its encoder: evaluation mode, and how much it reads at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
    """The longest segment, in tokens, that the encoder's positions allow."""
    tables = [getattr(module, "position_embeddings", None) for module in model.modules()]
    paddings = [getattr(table, "padding_idx", None) for table in tables]
    # RoBERTa's family counts positions from behind the padding id.
    kept = max((padding + 1 for padding in paddings if padding is not None), default=0)
    return model.config.max_position_embeddings - kept
