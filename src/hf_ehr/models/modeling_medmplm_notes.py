"""The notes of MedM-PLM: their states, and text encoders whose first layers are frozen."""

from typing import Any

import torch
from torch import nn

from .modeling_cross_modal import NoteStates
from .modeling_ehr import pool_states


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The layers of a text encoder.

    Raises:
        ValueError: It does not hold them in a list.
    """
    count = encoder.config.num_hidden_layers  # type: ignore[union-attr]
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"`freeze_note_layers` must be None for {type(encoder).__name__}, which does not hold its {count} layers in a "
        "list. Freeze its parameters by hand."
    )


def freeze_first_layers(encoder: nn.Module, count: int) -> None:
    """Takes the gradient from the embeddings of a text encoder and from its first `count` layers.

    The embeddings are what stands before the layers.
    """
    layers = list(layers_of(encoder))
    behind = {id(weight) for layer in layers[count:] for weight in layer.parameters()}
    frozen = {id(weight) for layer in layers[:count] for weight in layer.parameters()}
    before = True
    for weight in encoder.parameters():
        before = before and id(weight) not in behind | frozen
        weight.requires_grad_(not (before or id(weight) in frozen))


def quiet_frozen_layers(encoder: nn.Module, count: int) -> None:
    """Switches off the dropout of what [`freeze_first_layers`] froze."""
    for part in (*encoder.children(), *list(layers_of(encoder))[:count]):
        weights = list(part.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            part.eval()


def encode_notes(encoder: Any, input_ids: torch.Tensor, mask: torch.Tensor, pooling: str) -> NoteStates:
    """Notes (visits, tokens) and which of their tokens are there → the states of those notes that have any."""
    mask = mask.bool()
    rows = mask.any(dim=1).nonzero().squeeze(1)
    tokens = mask[rows]
    if not len(rows):
        size = encoder.config.hidden_size
        empty = torch.zeros(0, input_ids.shape[1], size, device=input_ids.device, dtype=encoder.dtype)
        return NoteStates(rows, empty[:, 0], empty, tokens)
    outputs = encoder(input_ids=input_ids[rows], attention_mask=tokens.long())
    states = outputs.last_hidden_state
    pooled = outputs.pooler_output if pooling == "pooler" else pool_states(states, "mean", tokens)
    return NoteStates(rows, pooled, states, tokens)


def notes_there(input_ids: torch.Tensor | None, mask: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
    """Which of the visits of `codes` (…, codes) have a note, (…,) bool; tensors as in [`MedMPLMModel`]."""
    if input_ids is None:
        return torch.zeros(codes.shape[:-1], dtype=torch.bool, device=codes.device)
    return (torch.ones_like(input_ids) if mask is None else mask).bool().any(dim=-1)
